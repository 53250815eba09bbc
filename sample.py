"""Sample from a trained model: the experiment and its settings are read from the checkpoint.

    python sample.py out/ghmm                              # sequences of the model beside sequences of its process
    python sample.py out/ghmm --num_samples=2 --length=30 --prompt=0,1 --temperature=0.8
    python sample.py out/arxiv_small/K1_csDS --prompt="We give a faster algorithm" --top_k=50
    python sample.py out/ghmm/best.pt --json=samples.json
    python sample.py out/apelr --prompt="Once upon a time" --top_p=0.9 --show_plan
    python sample.py out/apelr --prompt="Once upon a time" --sweep_states    # what each plan would write
    echo "Once upon a time" | python sample.py out/apelr --force_state=3
    python sample.py out/state                             # held-out conditions: pred.h5ad, real.h5ad, metrics, plots
    python sample.py out/state --adata=controls.h5ad --perturbations=p3,p7    # what these cells would become

ghmm: tokens with their log-probabilities under the true process, and how far the model's predictions are from the
optimal ones at each position. arxiv: text that goes on from the prompt, with the cross entropy of every token. apelr:
text and the belief about its plan, which can be read, forced and frozen; a checkpoint of the source will do. state:
cells, written as h5ad; a .ckpt of the source will do, with --toml.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import train_apelr
import train_arxiv
import train_ghmm
import train_state
from common import checkpoint
from common.errors import DataError, InputError
from common.runtime import Runtime
from configurator import configure, fail
from sources.cells import Store, align, column_names, read_rows
from sources.h5ad import H5ad, write_h5ad
from sources.shared import suggest
from sources.tokenizer import load_tokenizer


@dataclass
class Config:
    # sampling
    num_samples: int = 4  # sequences of the model, and as many of the process
    length: int | None = None  # tokens a sequence; default the model's n_ctx
    prompt: str = ""  # what every sequence begins with: token ids like 0,1,2, or text where the run has a tokenizer
    temperature: float = 1.0  # divides the logits; 1 samples what the model believes
    top_k: int | None = None  # sample from the k likeliest tokens only
    # sampling, of apelr
    max_new_tokens: int | None = None  # tokens to write after the prompt; default length less the prompt, or 200
    top_p: float = 1.0  # sample from the fewest tokens that have this share of the probability
    repetition_penalty: float = 1.0  # its logarithm is taken off tokens that the text has already
    no_repeat_ngram_size: int = 0  # never write n tokens a second time; 0: do
    # planner, of apelr
    lookahead_steps: int | None = None  # print forecasts of the plan this many chunks ahead; v2 also looks that far
    lookahead_feedback_scale: float | None = None  # v2: share of the forecast in the gate; default as trained
    force_state: int | None = None  # write by this plan alone
    freeze_planner: bool = False  # v2: the belief stays what the prompt made it
    planner_temperature: float | None = None  # v2: sharpness of the gate; default as trained
    async_planner: bool = False  # v2: forecasts are computed beside the writing, by a thread; the same text
    show_plan: bool = False  # print the belief under the text, and draw it
    sweep_states: bool = False  # write by each plan in turn and by the belief: a table
    json: str = ""  # file to write the samples to as well
    # prediction, of state
    toml: str = ""  # predict what this TOML holds out; default the run's own
    adata: str = ""  # predict from the control cells of this h5ad instead
    perturbations: list[str] = field(default_factory=list)  # with adata; default those of its cells, or all
    cells: int | None = None  # with adata: predicted cells of a condition; default as many as the file has
    out: str = ""  # folder of what is written; default RUN/predictions
    source_attention: Literal["auto", "bidirectional", "causal", "rotary"] = "auto"  # of a .ckpt of the source
    columns: dict[str, str] = field(default_factory=dict)  # pert_col, cell_type_key, batch_col, control_pert, if others
    # system
    precision: Literal["fp32", "bf16"] = "fp32"  # apelr: of the heads, which every token reads whole
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps

    def check(self) -> list[str]:
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in ("num_samples", "length", "top_k", "cells")
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        wrong += [f"seed = {self.seed}: must be in [0, 2**63)"] if not 0 <= self.seed < 2**63 else []
        wrong += [f"{k} = {getattr(self, k)}: must be at least {least}" for k, least in (
            ("temperature", 1e-6), ("repetition_penalty", 1), ("no_repeat_ngram_size", 0), ("max_new_tokens", 1),
            ("lookahead_steps", 0)) if getattr(self, k) is not None and getattr(self, k) < least]
        wrong += [f"top_p = {self.top_p}: must be in (0, 1]"] if not 0 < self.top_p <= 1 else []
        if self.planner_temperature is not None and self.planner_temperature <= 0:
            wrong.append(f"planner_temperature = {self.planner_temperature}: must be above 0")
        if self.lookahead_feedback_scale is not None and not 0 <= self.lookahead_feedback_scale <= 1:
            wrong.append(f"lookahead_feedback_scale = {self.lookahead_feedback_scale}: must be in [0, 1]")
        known = ("pert_col", "cell_type_key", "batch_col", "control_pert", "embed_key")
        wrong += [f"columns: {k!r} is none of {', '.join(known)}" for k in self.columns if k not in known]
        if self.perturbations and not self.adata:
            wrong.append("perturbations go with adata: what a TOML holds out says by itself what is predicted")
        if self.force_state is not None and (self.sweep_states or self.freeze_planner):
            wrong.append("force_state goes neither with sweep_states nor with freeze_planner: choose one")
        return wrong


@torch.no_grad()
def continue_sequences(model, device, tokens: torch.Tensor, length: int, n_ctx: int, cfg: Config, generator):
    """Draw from the model until the sequences [B, T] have the length; it reads the last n_ctx tokens of each."""
    while tokens.shape[1] < length:
        logits, _ = model(tokens[:, -n_ctx:].to(device))
        logits = logits[:, -1].to(tokens.device).double() / cfg.temperature
        if cfg.top_k and cfg.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(cfg.top_k).values[:, -1:], -torch.inf)
        probs = logits.softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], 1)
    return tokens


def token_ids(prompt: str, vocab_size: int) -> list[int]:
    """The prompt as token ids; exits with code 2 where it is something else."""
    parts = [part.strip() for part in prompt.split(",")] if prompt.strip() else []
    if not all(part.isdigit() and int(part) < vocab_size for part in parts):
        fail(f"prompt = {prompt!r}: expected token ids from 0 to {vocab_size - 1}, like 0,1")
    return [int(part) for part in parts]


def sample_ghmm(path: Path, cfg: Config) -> dict:
    """Sequences from the model and from the process, each token's true log-probability, and the KL by position."""
    run, process, model, step = train_ghmm.load_run(path, cfg.device)
    run.seed, run.precision = cfg.seed, "fp32"
    length = cfg.length or run.n_ctx
    prompt = torch.tensor([token_ids(cfg.prompt, process.vocab_size)], dtype=torch.int64)
    if process.log_prob(prompt).isinf().any():
        fail(f"prompt = {cfg.prompt}: these tokens have probability 0 under {process.name}")
    with Runtime(run) as rt:
        floor = process.optimal_loss(run.n_ctx)
        place = train_ghmm.exact_device(rt)
        process.to(place)
        model.to(rt.device).eval()
        start = prompt.to(place).expand(cfg.num_samples, -1)
        belief = process.beliefs(start)[:, -1]
        shape = (length + 1, cfg.num_samples)
        drawn = torch.rand(shape, generator=rt.generator(0, device=place), dtype=torch.float64, device=place)
        if process.is_hmm:  # a belief is the distribution of the hidden state to go on from
            belief = torch.multinomial(belief, 1, generator=rt.generator(3, device=place))[:, 0]
        true, _ = process.generate(drawn, belief)
        true = torch.cat([start, true], 1)[:, :max(length, start.shape[1])]
        # The model predicts from one token on; without a prompt the process gives the first.
        tokens = start if start.shape[1] else true[:, :1]
        generator = rt.generator(1, device=place)
        tokens = continue_sequences(model, rt.device, tokens, length, run.n_ctx, cfg, generator)
        contexts = train_ghmm.make_contexts(process, run.n_ctx, run.max_words, 4_096, cfg.seed)
        kl = train_ghmm.evaluate(model, contexts, floor, rt)["kl_by_position"]
        result = {"experiment": "ghmm", "step": step, "kl_by_position": kl}
        for name, sequences in (("model", tokens), ("process", true)):
            result[name] = {"tokens": sequences.tolist(), "log_prob": process.log_prob(sequences).tolist()}
    print(f"{process.name}, {run.model} after {step} steps. Log-probabilities in nats, under the true process.")
    for name in ("model", "process"):
        print(f"\nfrom the {name}:")
        for row, log_probs in zip(result[name]["tokens"], result[name]["log_prob"], strict=True):
            print("  token " + " ".join(f"{x:>6}" for x in row))
            print("  log p " + " ".join(f"{x:6.2f}" for x in log_probs) + f"   sum {sum(log_probs):.2f}")
    print("\nKL(optimal || model) in nats, after reading")
    print("  tokens " + " ".join(f"{i:>8}" for i in range(1, len(kl) + 1)))
    print("  KL     " + " ".join(f"{x:8.1e}" for x in kl))
    return result


@torch.no_grad()
def sequence_xe(model, tokens: torch.Tensor, n_ctx: int) -> torch.Tensor:
    """Cross entropy in nats of every token but the first, [B, L - 1]; each is predicted from the n_ctx before it."""
    head = tokens[:, : n_ctx + 1]
    found = [train_arxiv.token_xe(model(head[:, :-1])[0], head[:, 1:])] if head.shape[1] > 1 else []
    for t in range(n_ctx + 1, tokens.shape[1]):
        found.append(train_arxiv.token_xe(model(tokens[:, t - n_ctx : t])[0][:, -1:], tokens[:, t : t + 1]))
    return torch.cat(found, 1) if found else torch.zeros(len(tokens), 0)


def sample_arxiv(path: Path, cfg: Config) -> dict:
    """Texts that go on from the prompt, with the model's cross entropy of every token, prompt included."""
    run, model, step, extra = train_arxiv.load_run(path, cfg.device)
    run.seed, run.precision = cfg.seed, "fp32"
    speller = (path if path.is_dir() else path.parent) / "tokenizer.json"
    tokenizer = load_tokenizer(speller) if speller.exists() else None
    ids = tokenizer.encode(cfg.prompt) if tokenizer else token_ids(cfg.prompt, extra["vocab_size"])
    length = max(cfg.length or extra["n_ctx"], len(ids))
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        generator = rt.generator(0, device="cpu")
        if not ids:  # the model predicts from one token on
            ids = torch.randint(extra["vocab_size"], (1,), generator=generator).tolist()
        tokens = torch.tensor([ids]).expand(cfg.num_samples, -1)
        tokens = continue_sequences(model, rt.device, tokens, length, extra["n_ctx"], cfg, generator)
        xe = sequence_xe(model, tokens.to(rt.device), extra["n_ctx"]).tolist()
    result = {"experiment": "arxiv", "step": step, "tokens": tokens.tolist(), "xe": xe}
    print(f"K = {len(extra['categories'])} ({', '.join(extra['categories'])}), {step} steps. Cross entropies in nats.")
    if tokenizer:
        result["text"] = [tokenizer.decode(row) for row in tokens]
    for i, row in enumerate(tokens.tolist()):
        words = [repr(tokenizer.decode([t]))[1:-1] if tokenizer else str(t) for t in row]
        print("\n" + (result["text"][i] if tokenizer else " ".join(words)))
        print("  " + " ".join([words[0]] + [f"{w}|{x:.2f}" for w, x in zip(words[1:], xe[i], strict=True)]))
        print(f"  mean {sum(xe[i]) / max(1, len(xe[i])):.3f}")
    return result


# ---------------------------------------------------------------------------------------------------------------
# apelr
# ---------------------------------------------------------------------------------------------------------------
V2_ONLY = ("freeze_planner", "planner_temperature", "lookahead_feedback_scale", "async_planner")
SHADES = " .:-=+*#%@"  # a belief of 0 to 1


def apelr_prompts(cfg: Config, tokenizer, extra: dict) -> list[list[int]]:
    """Token ids of the prompt, or of every line of stdin where that is a pipe and there is no prompt."""
    lines = [cfg.prompt] if cfg.prompt or sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().splitlines()
    start = [] if tokenizer is None else [tokenizer.special[k] for k in ("eos", "bos") if k in tokenizer.special][:1]
    found = []
    for line in [line for line in lines if line.strip()] or [""]:
        ids = tokenizer.encode(line) if tokenizer else token_ids(line, extra["vocab_size"])
        found.append(ids or start or [extra["vocab_size"] - 1])  # planted documents begin with their last token
    return found


def is_set(cfg: Config, name: str) -> bool:
    return getattr(cfg, name) is not None and getattr(cfg, name) is not False


def planner_settings(run, cfg: Config, state: int | None) -> dict:
    """What the flags mean to PlannerLM.predict; exits with code 2 where this model has no such thing."""
    if run.version == "baseline":
        asked = [k for k in (*V2_ONLY, "force_state", "sweep_states", "show_plan", "lookahead_steps") if is_set(cfg, k)]
        if asked:
            fail(f"{asked[0]} needs a planner, and this is a baseline model: use a run of v1 or v2")
        return {}
    asked = [k for k in V2_ONLY if is_set(cfg, k)]
    if asked and run.version == "v1_filtered_mixture":
        fail(f"{asked[0]} is a flag of v2_planner_required, and this is a run of {run.version}: leave it out")
    if state is not None and not 0 <= state < run.plans():
        fail(f"force_state = {state}: this model has the plans 0 to {run.plans() - 1}")
    found = {"tau": cfg.planner_temperature, "feedback": cfg.lookahead_feedback_scale}
    if run.version == "v2_planner_required" and cfg.lookahead_steps:
        found["horizon"] = cfg.lookahead_steps
    return found | ({} if state is None else {"planner_mode": "forced_state", "forced_state": state})


def write_apelr(model, run, ids: list[int], cfg: Config, rt: Runtime, tokenizer, state: int | None):
    """num_samples texts that go on from one prompt."""
    tokens = cfg.max_new_tokens or max(1, cfg.length - len(ids) if cfg.length else 200)
    prompt = torch.tensor([ids], device=rt.device).expand(cfg.num_samples, -1)
    return train_apelr.generate(
        model, prompt, tokens, rt.generator(0, device="cpu"), temperature=cfg.temperature, top_k=cfg.top_k,
        top_p=cfg.top_p, repetition_penalty=cfg.repetition_penalty, no_repeat_ngram_size=cfg.no_repeat_ngram_size,
        eos_id=tokenizer.special.get("eos") if tokenizer else None, frozen=cfg.freeze_planner,
        forecast_steps=cfg.lookahead_steps or 0, background=cfg.async_planner,
        head_type=torch.bfloat16 if cfg.precision == "bf16" else None, **planner_settings(run, cfg, state))


def print_plan(written, row: int, words: list[str], boundaries: set[int]) -> None:
    """The belief before each token written as a strip of shades, a line a plan; | where a chunk begins."""
    beliefs = written.beliefs[row].exp().tolist()
    for begin in range(0, len(beliefs), 100):
        part = range(begin, min(begin + 100, len(beliefs)))
        print(f"  tokens {begin}-{part[-1]}: " + "".join(words[t] for t in part)[:100].replace("\n", " "))
        for k in range(len(beliefs[0])):
            print(f"  plan {k:>2} " + "".join(("|" if t in boundaries else "") + SHADES[min(9, int(10 * beliefs[t][k]))]
                                            for t in part))


def sample_apelr(path: Path, cfg: Config) -> dict:
    """Texts that go on from the prompts, by the belief over plans or by one plan, with beliefs and forecasts."""
    run, model, step, extra = train_apelr.load_run(path, cfg.device)
    run.seed, run.precision = cfg.seed, "fp32"
    folder = path if path.is_dir() else path.parent
    tokenizer = load_tokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None
    if tokenizer and extra.get("tokenizer_hash", tokenizer.hash()) != tokenizer.hash():
        raise DataError(f"{folder / 'tokenizer.json'} is not the tokenizer that {path} was trained with")
    planner_settings(run, cfg, cfg.force_state)
    prompts = apelr_prompts(cfg, tokenizer, extra)
    result = {"experiment": "apelr", "step": step, "version": run.version, "samples": []}
    print(f"{run.version} after {step} steps" + (f", {run.plans()} plans" if run.plans() > 1 else ""))
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        states = [None, *range(run.plans())] if cfg.sweep_states else [cfg.force_state]
        for ids in prompts:
            for state in states:
                written = write_apelr(model, run, ids, cfg, rt, tokenizer, state)
                result["samples"] += show_apelr(model, run, ids, cfg, tokenizer, state, written, folder)
    return result


def show_apelr(model, run, ids: list[int], cfg: Config, tokenizer, state: int | None, written, folder: Path) -> list:
    """Print what was written; returns it as plain data."""
    def text(tokens) -> str:
        return tokenizer.decode(tokens) if tokenizer else " ".join(map(str, tokens))

    found = []
    for row, tokens in enumerate(written.tokens.tolist()):
        new = tokens[len(ids):]
        entry = {"prompt": text(ids), "state": state, "tokens": tokens, "text": text(tokens)}
        if cfg.sweep_states:
            label = "belief" if state is None else f"plan {state}"
            print(f"{label:<7}| " + text(new).replace("\n", " ")[:160])
        else:
            print("\n" + text(tokens))
        if written.beliefs.numel():
            entry["beliefs"] = written.beliefs[row].exp().tolist()
        if written.forecasts.numel():
            entry["forecasts"] = written.forecasts[row].tolist()
            ahead = " -> ".join("[" + " ".join(f"{p:.2f}" for p in step) + "]" for step in entry["forecasts"][0])
            print(f"  forecast at the first token, chunk by chunk: {ahead}")
        if cfg.show_plan and not cfg.sweep_states:
            words = [text([t]) if tokenizer else f"{t} " for t in new]
            begins = {t for t in range(1, len(words)) if (len(ids) - 1 + t + model.offset) % run.chunk_size == 0}
            print_plan(written, row, words, begins)
            if row == 0:
                name = f"sampled_belief_{cfg.seed}"
                train_apelr.plot(folder, name, lambda axes, words=words, begins=begins: train_apelr.draw_strip(
                    axes, written.beliefs[0, :96].exp().cpu().numpy(), words[:96], [t for t in begins if t < 96],
                    "belief before each token (blue: a chunk begins)"), max(7.0, 0.13 * min(96, len(words))),
                    1.6 + 0.18 * run.plans())
                print(f"  picture: {folder / 'plots' / name}.png")
        found.append(entry)
    return found


# ---------------------------------------------------------------------------------------------------------------
# state
# ---------------------------------------------------------------------------------------------------------------
def sample_state(path: Path, cfg: Config) -> dict:
    """Predicted cells as h5ad: of what a TOML holds out, with the measured ones and metrics, or from given controls."""
    run, model, step, extra = train_state.load_run(path, cfg.device, cfg.source_attention)
    for name, value in cfg.columns.items():
        setattr(run, name, value)
    run.toml_config_path = cfg.toml or run.toml_config_path
    folder = Path(cfg.out) if cfg.out else (path if path.is_dir() else path.parent) / "predictions"
    with Runtime(run) as rt:
        model.to(rt.device)
        if cfg.adata:
            return predict_adata(run, model, extra, folder, cfg, rt)
        experiment = train_state.open_run_data(run, extra)
        store, parts = Store(experiment, rt.device, run), []
        result = train_state.finish(model, experiment, store, run, rt, folder, parts.append)
    rows = np.concatenate([np.concatenate([part["rows"], part["controls"]]) for part in parts])
    columns = {run.cell_type_key: np.array(experiment.cell_types)[experiment.cell_type[rows]],
               run.pert_col: np.array(experiment.perturbations)[experiment.perturbation[rows]]}
    if run.batch_col:
        columns[run.batch_col] = np.array(experiment.batches)[experiment.batch[rows]]
    genes = experiment.genes if model.gene_decoder is None else experiment.count_genes
    names = np.empty(len(rows), object)
    for f, source in enumerate(experiment.files):
        with H5ad(source) as file:
            here = experiment.file[rows] == f
            names[here] = [f"{name}-{f}" if f else str(name) for name in file.obs_names[experiment.row[rows[here]]]]
    for name in ("pred", "real"):  # control cells are as measured in both
        cells = np.concatenate([np.concatenate([part[name], part["control"]]) for part in parts])
        write_h5ad(folder / f"{name}.h5ad", cells, columns, genes, obs_names=names.astype(str))
    print(f"written to {folder}: pred.h5ad and real.h5ad ({len(rows):,} cells, controls included), metrics.csv, plots")
    print(f"after {step} steps: " + train_state.verdict(result, folder).removeprefix("done: "))
    return {"experiment": "state", "step": step, **result}


def predict_adata(run, model, extra: dict, folder: Path, cfg: Config, rt: Runtime) -> dict:
    """What the control cells of cfg.adata become under the wanted perturbations: predicted.h5ad.

    Wanted of each cell type are cfg.perturbations, or those of the file's own perturbed cells, as many cells as there
    are, or else all that the model knows. Every predicted cell has a control cell of its type for input (the mean of
    n_basal_samples, if the model was trained so): each once as far as they go, in an order drawn from the seed.
    """
    with H5ad(cfg.adata) as file:
        types, type_names = file.column(run.cell_type_key)
        perts, pert_names = file.column(run.pert_col)
        if run.control_pert not in pert_names:
            raise DataError(f"{cfg.adata} has no control cells: no cell has {run.pert_col} = "
                                         f"{run.control_pert!r}; say --columns='{{\"control_pert\": \"NAME\"}}'")
        batches = file.column(run.batch_col) if hasattr(model, "batch_encoder") else None
        names, _ = align([cfg.adata], [column_names(file, run.embed_key)], run.embed_key or "X",
                                     run.strict)
        place, genes = {name: i for i, name in enumerate(names)}, extra.get("genes") or names
        for gene in (gene for gene in genes if gene not in place):
            raise DataError(f"{cfg.adata} has no gene {gene!r}, which this model reads"
                                         + suggest(gene, names))
        order = [place[gene] for gene in genes]
        is_control = perts == pert_names.index(run.control_pert)
        known = train_state.known_perturbations(run, extra)
        wanted = cfg.perturbations or [n for n in pert_names if n != run.control_pert] or [
            n for n in known if n != run.control_pert]
        train_state.codes_of(wanted, list(known), "perturbation", cfg.adata)
        codes = None
        if batches is not None:
            places = train_state.codes_of(batches[1], extra["batches"], "batch", cfg.adata)
            codes = np.array(places)[batches[0]]
        if empty := [name for t, name in enumerate(type_names) if not (is_control & (types == t)).any()]:
            raise DataError(f"{cfg.adata}: cell type {empty[0]} has no control cells to start from")
        cells, columns, S = [], {run.cell_type_key: [], run.pert_col: []}, run.cell_set_len
        basal = np.full(file.n_obs, -1)
        basal[is_control] = np.arange(is_control.sum())
        expression = read_rows(file, run, np.flatnonzero(is_control))[:, order]
        for t, name in enumerate(type_names):
            controls = np.flatnonzero(is_control & (types == t))
            inputs = torch.from_numpy(expression[basal[controls]])
            for p in wanted:
                here = int(((types == t) & (perts == pert_names.index(p))).sum()) if p in pert_names else 0
                n, k = cfg.cells or here or len(controls), run.n_basal_samples
                rng = np.random.default_rng([cfg.seed, t, wanted.index(p)])
                rounds = range(-(-n * k // len(controls)))
                drawn = np.concatenate([rng.permutation(len(controls)) for _ in rounds])[: n * k].reshape(n, k)
                for i in range(0, n, S):
                    some = drawn[i : i + S]
                    batch = {"ctrl_cell_emb": inputs[some].mean(1)[None].to(rt.device),
                             "pert_emb": known[p][None].float().to(rt.device)}
                    if codes is not None:
                        batch["batch"] = torch.from_numpy(codes[controls[some[:, 0]]])[None].to(rt.device)
                    with torch.no_grad():
                        out = train_state.expressed(model.eval(), model.predict(batch)["cells"])
                    cells.append(out[0].float().cpu().numpy())
                columns[run.cell_type_key] += [name] * n
                columns[run.pert_col] += [p] * n
    folder.mkdir(parents=True, exist_ok=True)
    genes = genes if model.gene_decoder is None else extra.get("count_genes")
    genes = genes or [f"feature_{i}" for i in range(cells[0].shape[1])]
    write_h5ad(folder / "predicted.h5ad", np.concatenate(cells),
                            {k: np.array(v) for k, v in columns.items()}, np.array(genes))
    total = len(columns[run.pert_col])
    print(f"{total:,} cells of {len(type_names)} cell types under {len(wanted)} perturbations written to "
          f"{folder / 'predicted.h5ad'}")
    return {"experiment": "state", "cells": total, "cell_types": type_names, "perturbations": wanted}


SAMPLERS = {"train_ghmm": sample_ghmm, "train_arxiv": sample_arxiv, "train_apelr": sample_apelr,
            "train_state": sample_state}


def experiment_of(path: Path) -> str:
    """Which experiment a run folder or checkpoint is of, also one of the sources. Raises CheckpointError."""
    if path.suffix == ".ckpt" and path.is_file():
        return "train_state"
    source = path.is_file() and train_apelr.is_source_checkpoint(path)
    return "train_apelr" if source else checkpoint.load(path)["experiment"]


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        configure(Config, ["--help"])
    if argv[0].startswith("-"):
        fail(f"the first argument is a run folder or checkpoint, not {argv[0]!r}: python sample.py out/ghmm {argv[0]}")
    cfg = configure(Config, argv[1:])
    if cfg.json and (Path(cfg.json).is_dir() or not Path(cfg.json).resolve().parent.is_dir()):
        fail(f"json = {cfg.json}: not a file in a folder that exists")
    try:
        experiment = experiment_of(Path(argv[0]))
        if experiment not in SAMPLERS:
            fail(f"{argv[0]} is a run of {experiment!r}; sample.py knows {', '.join(SAMPLERS)}")
        result = SAMPLERS[experiment](Path(argv[0]), cfg)
    except InputError as e:
        fail(str(e))
    if cfg.json:
        finite = json.loads(json.dumps(result), parse_constant=lambda _: None)  # -inf of impossible tokens becomes null
        Path(cfg.json).write_text(json.dumps(finite) + "\n", encoding="utf-8")
        print(f"\nwritten to {cfg.json}")
    return result


if __name__ == "__main__":
    main()
