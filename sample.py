"""Sample from a trained model: whose run it is, and how it was trained, is read from the checkpoint.

    python sample.py out/ghmm                     # sequences of the model, and of its process
    python sample.py out/ghmm --prompt=0,1 --length=30 --temperature=0
    python sample.py out/arxiv_small/K1_cs.DS_seed0 --prompt="We give a faster algorithm" --top_k=50
    python sample.py out/apelr --prompt="Once upon a time" --top_p=0.9 --show_plan
    python sample.py out/apelr --prompt="Once upon a time" --sweep_states   # what each plan writes
    python sample.py out/apelr --prompts=prompts.txt --json=samples.json    # a prompt a line
    echo "Once upon a time" | python sample.py out/apelr --force_state=3
    python sample.py out/state                    # held-out conditions: h5ad, metrics, pictures
    python sample.py out/state --adata=controls.h5ad --perturbations=p3,p7  # what they would become
    python sample.py out/apelr --help             # the settings of its experiment alone

ghmm: tokens, with their log-probabilities under the true process and under the model. arxiv: text
that goes on from the prompt, with the cross entropy of every token. apelr: text and the belief about
its plan, which can be read, forced and frozen. state: cells, written as h5ad. Checkpoints and run
folders of the source systems will do, with the defaults of their samplers. A copy of a page is
sampled as what its EXPERIMENT says; it must be in the folder of this script.

--json writes JSON to standard output and nothing else there, --json=FILE to a file: experiment,
step, and of texts and sequences `samples`, a list of
    prompt, tokens, text   as it was given; ids, prompt included; text, where there is a tokenizer
    xe                     ghmm, arxiv: -log p of each token but the first by the model, in nats
    log_prob               ghmm: log p of each token by the process, in nats; null: impossible
    nll                    apelr: mean -log p of what was written, by the model with its own belief
    state                  apelr: the plan that was forced, or null
    beliefs, forecasts     apelr: before each token written [K], and so many chunks ahead [steps, K]
ghmm has `process` too, such a list of sequences that the process made, and kl_by_position (nats).
state has the figures of summary.json, and `written`, files and folders.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import CheckpointError, DataError, InputError, clear_errors, reason, rehearsal  # isort: skip

import contextlib
import difflib
import importlib
import importlib.util
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, NamedTuple, NoReturn

import numpy as np
import torch

from common import checkpoint, store
from common.runlog import json_text, write_json
from common.runtime import Runtime
from common.telling import bar, begin, doing, note
from configurator import Count, Fraction, Positive, Probability, Range, Whole, configure, fail, help_text, print_text
from measure.effects import table_of, verdict
from measure.forced import plan_legend, plan_table, written_nll
from measure.plan_pictures import draw_beliefs
from measure.predictions import draw_controls, predict_cells
from measure.sequences import continue_sequences, process_sequences, sequence_xe
from measure.transcript import (
    OF_STRIP,
    beneath,
    console_columns,
    likeliest_plans,
    mark,
    sentence,
    strip,
    table,
    title,
    wrapped,
)
from measure.writing import generate
from sources import foreign_checkpoints
from sources.controls import Controls, control_expression, find_controls, gene_order, matrix_to_read, names_in
from sources.foreign_apelr import is_source_checkpoint, untold
from sources.h5ad import H5ad, write_h5ad
from sources.plain_json import read_json
from sources.prompts import Prompt, read_prompt, written_prompts
from sources.shared import counted
from sources.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).resolve().parent  # where pages are imported from, and only here: no code of a run folder runs

Temperature = Annotated[float, Range("0 or float >= 1e-6", "must be 0 or at least 1e-6", lambda t: t == 0 or t >= 1e-6)]
Penalty = Annotated[float, Range("float >= 1", "must be at least 1", lambda value: value >= 1)]
Seed = Annotated[int, Range("int >= 0", "must be in [0, 2**63)", lambda value: 0 <= value < 2**63)]
COLUMNS = ("pert_col", "cell_type_key", "batch_col", "control_pert", "embed_key")  # of an h5ad, that may have others


@dataclass
class Config:
    # samples, of ghmm, arxiv and apelr
    num_samples: Count | None = None  # of each prompt; default 4, or 1 at temperature 0 and of sweep_states
    length: Count | None = None  # tokens of a sample, prompt included; default n_ctx; apelr: 200 new ones
    max_new_tokens: Count | None = None  # instead of length: tokens to write after the prompt
    prompt: str = ""  # to go on from: text, token ids like 0,1 where there is no tokenizer, or FILE:NAME
    prompts: str = ""  # a file of prompts, a line each; of .jsonl {"prompt": ...}; -: standard input
    temperature: Temperature | None = None  # divides the logits; default 1; 0: always the likeliest token
    top_k: Whole | None = None  # draw from the k likeliest tokens only; default 0: from all
    top_p: Fraction = 1.0  # draw from the fewest tokens that have this share of the probability
    # writing, of apelr
    repetition_penalty: Penalty = 1.0  # its logarithm is taken off tokens that the text has already
    no_repeat_ngram_size: Whole = 0  # never write n tokens a second time; 0: do
    precision: Literal["fp32", "bf16"] = "fp32"  # of the heads, which every token reads whole
    # plans, of apelr
    show_plan: bool = False  # print the likeliest plan under the text, and draw the belief
    sweep_states: bool = False  # write by the belief and by each plan in turn: a table
    force_state: int | None = None  # write by this plan alone
    lookahead_steps: Whole | None = None  # print forecasts so many chunks ahead; v2 looks as far; default as trained
    freeze_planner: bool = False  # v2: the belief stays what the prompt made it; of a source checkpoint: the prior
    planner_temperature: Positive | None = None  # v2: sharpness of the gate; default as trained
    lookahead_feedback_scale: Probability | None = None  # v2: share of the forecast in the gate; default as trained
    async_planner: bool = False  # v2: forecasts are computed beside the writing, by a thread; the same text
    # cells, of state
    toml: str = ""  # predict what this TOML holds out; default the run's own
    adata: str = ""  # predict from the control cells of this h5ad instead
    perturbations: list[str] = field(default_factory=list)  # with adata: NAME or NAME,NAME; default its cells', or all
    cells: Count | None = None  # with adata: predicted cells of a condition; default as many as the file has
    drop_unlabelled: bool = False  # leave cells without cell type, perturbation or batch out
    source_attention: Literal["auto", "bidirectional", "causal", "rotary"] = "auto"  # of a .ckpt of the source
    columns: dict[str, str] = field(default_factory=dict)  # pert_col, cell_type_key, batch_col, control_pert, if others
    # output
    json: bool | str = False  # to standard output, and nothing else there; --json=FILE: to a file
    out: str = ""  # state, apelr: folder of files; default RUN/predictions, or RUN for pictures
    # system
    seed: Seed = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps

    def check(self) -> list[str]:
        wrong = [f"columns: {name!r} is none of {', '.join(COLUMNS)}" for name in self.columns if name not in COLUMNS]
        if self.length and self.max_new_tokens:
            wrong.append("length counts the prompt and max_new_tokens does not: choose one")
        if self.prompt and self.prompts:
            wrong.append("prompt is one and prompts is a file of them: choose one")
        if self.perturbations and not self.adata:
            wrong.append("perturbations go with adata: what a TOML holds out says by itself what is predicted")
        if self.force_state is not None and (self.sweep_states or self.freeze_planner):
            wrong.append("force_state goes neither with sweep_states nor with freeze_planner: choose one")
        return wrong


PLAIN = {"num_samples": 4, "temperature": 1.0, "top_k": 0}  # what is not asked for
OF_SOURCE = {"num_samples": 1, "temperature": 0.9, "top_k": 40}  # by APEL-R's sampler, of its checkpoints
MOST_TOKENS = 10**9  # of all samples together: their ids alone take 8 GB
Show = Callable[[str], None]  # what results are printed by: print, or nothing where they are JSON


def settled(cfg: Config, defaults: dict) -> Config:
    """The settings with what is not asked for. At temperature 0 all samples of a prompt would be equal: one is made."""
    settings = {name: value for name, value in defaults.items() if getattr(cfg, name) is None}
    if cfg.sweep_states and cfg.num_samples is None:
        settings["num_samples"] = 1
    if cfg.temperature == 0:
        settings["num_samples"] = 1
        if (cfg.num_samples or 1) > 1:
            note("at temperature 0 every sample of a prompt would be the same: one is written")
    return replace(cfg, **settings)


def manner(cfg: Config) -> str:
    """How tokens are chosen, in a few words."""
    if cfg.temperature == 0:
        return "temperature 0: always the likeliest token"
    words = [f"temperature {cfg.temperature:g}"]
    if cfg.top_k:
        words.append(f"top_k {cfg.top_k}")
    if cfg.top_p < 1:
        words.append(f"top_p {cfg.top_p:g}")
    return ", ".join([*words, f"seed {cfg.seed}"])


def prompts_of(cfg: Config, tokenizer: Tokenizer | None, vocab_size: int, reads_pipe: bool = False) -> list[Prompt]:
    """What is to be gone on from, in the order it was given; one empty prompt where nothing was."""
    prompts = []
    for place, written in written_prompts(cfg.prompt, cfg.prompts, reads_pipe):
        prompts.append(read_prompt(written, place, tokenizer, vocab_size))
    return prompts or [Prompt("", [], "prompt")]


def lengths_of(cfg: Config, prompts: list[Prompt], default: int, default_new: int = 0) -> list[int]:
    """Tokens of a sample of each prompt, prompt included: as asked, or `default` in all, or `default_new` new ones.

    Exits with code 2 where a prompt leaves no room, or all samples together are beyond reason.
    """
    lengths = []
    for prompt in prompts:
        count = len(prompt.ids)
        length = cfg.length or default
        if cfg.max_new_tokens or not cfg.length and default_new:
            length = count + (cfg.max_new_tokens or default_new)
        if count >= length:
            fail(f"{prompt.place} has {counted(count, 'token')}, and length = {length} counts it: to go on from it, "
                 f"use --max_new_tokens=N, or a length above {count}")
        lengths.append(length)
    total = cfg.num_samples * sum(lengths)
    if total > MOST_TOKENS:
        fail(f"{total:,} tokens are more than {MOST_TOKENS:,}: ask for fewer or shorter samples")
    return lengths


def run_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder  # of a source's run


def tokenizer_of(path: Path, known: str | None = None) -> Tokenizer | None:
    """The tokenizer that lies beside a checkpoint, if there is one, or that is known to be of it."""
    file = Path(known) if known else run_folder(path) / "tokenizer.json"
    return load_tokenizer(file) if file.exists() else None


def spell(tokens: list[int], tokenizer: Tokenizer | None) -> str:
    """Tokens as text, or as their ids where there is no tokenizer."""
    if tokenizer:
        return tokenizer.decode(tokens)
    return " ".join(str(token) for token in tokens)


def spelled(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as a cell of a line: with line ends and the like as they are written in code."""
    return repr(tokenizer.decode([token]))[1:-1] if tokenizer else str(token)


def nats(values: list[float]) -> list[str]:
    """-0.39 and the like, in cells; -inf of what is impossible."""
    return [f"{value:.2f}" for value in values]


# ---------------------------------------------------------------------------------------------------------------
# ghmm
# ---------------------------------------------------------------------------------------------------------------
def sample_ghmm(page: ModuleType, path: Path, cfg: Config, show: Show) -> dict:
    """Sequences from the model and from the process, what both say of each token, and the KL by position."""
    cfg = settled(cfg, PLAIN)
    run, process, model, step = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    prompts = prompts_of(cfg, None, process.vocab_size)
    lengths = lengths_of(cfg, prompts, run.n_ctx)
    for prompt in prompts:
        ids = torch.tensor([prompt.ids], dtype=torch.int64)
        if process.log_prob(ids).isinf().any():
            fail(f"{prompt.place} = {prompt.text}: these tokens have probability 0 under {process.name}")
    result = {"experiment": "ghmm", "step": step, "samples": [], "process": []}
    show(sentence(f"{process.name}, {run.model} after {counted(step, 'step')}; {manner(cfg)}"))
    show(sentence("Under each token its log-probability in nats, given the tokens before it: by the process, which is "
                  "exact, and by the model."))
    with Runtime(run) as rt:
        place = page.exact_device(rt)  # float64, which not every accelerator has
        process.to(place)
        model.to(rt.device).eval()
        for prompt, length in zip(prompts, lengths, strict=True):
            drawn, true = draw_sequences(process, model, prompt, length, run.n_ctx, cfg, rt, place)
            for name, source, sequences in (("samples", "model", drawn), ("process", "process", true)):
                entries = judged(sequences, prompt, process, model, run.n_ctx, rt)
                result[name] += entries
                show_sequences(entries, f"from the {source}, sample", show)
        # Over all words of the length where they are few, else over sampled ones: what the run's own evaluation does.
        with doing("comparing the model's predictions with the optimal ones"):
            contexts = page.make_contexts(process, run.n_ctx, run.max_words, 4_096, cfg.seed)
            optimal = process.optimal_loss(run.n_ctx)
            evaluation = page.evaluate(model, contexts, optimal, rt)
    kl = evaluation["kl_by_position"]
    result["kl_by_position"] = kl
    show("\nKL(optimal || model) in nats: what its prediction loses to the best possible one, after reading")
    show(beneath({"tokens": [str(i) for i in range(1, len(kl) + 1)], "KL": [f"{x:.1e}" for x in kl]}))
    return result


def draw_sequences(process, model, prompt: Prompt, length: int, n_ctx: int, cfg: Config, rt: Runtime, place
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequences [B, L] of the model, as many of the process) that go on from a prompt, on the process's device."""
    start = torch.tensor([prompt.ids], dtype=torch.int64, device=place)
    start = start.expand(cfg.num_samples, -1)  # [B, T]
    # Each draw has a generator of its own, so that longer sequences begin like shorter ones of the same seed.
    token_draws = rt.generator(0, device=place)
    state_draws = rt.generator(3, device=place)
    size = f"{counted(cfg.num_samples, 'sequence')} of {length:,} tokens"
    told = f"drawing {size} from the process"
    true = process_sequences(process, start, length, token_draws, state_draws, told)
    # The model predicts from one token on; without a prompt the process gives the first, or its likeliest one.
    if not prompt.ids:
        start = true[:, :1]
        if cfg.temperature == 0:
            chances = [round(process.word_probability([token]), 12) for token in range(process.vocab_size)]
            start = torch.full_like(start, chances.index(max(chances)))
    model_draws = rt.generator(1, device=place)
    drawn = continue_sequences(
        model,
        start,
        length,
        n_ctx,
        model_draws,
        rt.device,
        cfg.temperature,
        cfg.top_k,
        cfg.top_p,
        told=f"drawing {size} from the model",
    )
    return drawn, true


def judged(sequences: torch.Tensor, prompt: Prompt, process, model, n_ctx: int, rt: Runtime) -> list[dict]:
    """Sequences as plain data, with what the process and the model say of each token."""
    with doing("reading them by the process"):
        log_prob = process.log_prob(sequences).tolist()
    xe = sequence_xe(model, sequences.to(rt.device), n_ctx, "reading them by the model").tolist()
    entries = []
    for b, tokens in enumerate(sequences.tolist()):
        entries.append({"prompt": prompt.text, "tokens": tokens, "log_prob": log_prob[b], "xe": xe[b]})
    return entries


def show_sequences(entries: list[dict], kind: str, show: Show) -> None:
    for i, entry in enumerate(entries, 1):
        total = f"log p {sum(entry['log_prob']):.2f} nats by the process"
        show("\n" + title(kind, i, len(entries), entry["prompt"], total))
        rows = {
            "token": [str(token) for token in entry["tokens"]],
            "process": nats(entry["log_prob"]),
            "model": ["", *nats([-value for value in entry["xe"]])],  # which does not predict the first token
        }
        show(beneath(rows))


# ---------------------------------------------------------------------------------------------------------------
# arxiv
# ---------------------------------------------------------------------------------------------------------------
def sample_arxiv(page: ModuleType, path: Path, cfg: Config, show: Show) -> dict:
    """Texts that go on from the prompts, with the model's cross entropy of every token, prompt included."""
    cfg = settled(cfg, PLAIN)
    run, model, step, extra = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    tokenizer = tokenizer_of(path)
    n_ctx = extra["n_ctx"]
    vocab_size = extra["vocab_size"]
    prompts = prompts_of(cfg, tokenizer, vocab_size)
    lengths = lengths_of(cfg, prompts, n_ctx)
    categories = extra["categories"]
    kinds = f"K = {len(categories)} ({', '.join(categories)})"
    show(sentence(f"{kinds} after {counted(step, 'step')}; {manner(cfg)}"))
    show(sentence("Under each token its cross entropy in nats: -log p by the model, given the tokens before it."))
    result = {"experiment": "arxiv", "step": step, "samples": []}
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        for prompt, length in zip(prompts, lengths, strict=True):
            generator = rt.generator(0, device="cpu")  # anew: a prompt in a file gives what it gives alone
            ids = prompt.ids
            if not ids:  # the model predicts from one token on
                ids = torch.randint(vocab_size, (1,), generator=generator).tolist()
                note(f"no prompt: samples begin with a token drawn at random, {spelled(ids[0], tokenizer)!r}")
            tokens = continue_sequences(
                model,
                torch.tensor([ids]).expand(cfg.num_samples, -1),
                length,
                n_ctx,
                generator,
                rt.device,
                cfg.temperature,
                cfg.top_k,
                cfg.top_p,
                told=f"writing {counted(cfg.num_samples, 'text')} of {length:,} tokens",
            )
            xe = sequence_xe(model, tokens.to(rt.device), n_ctx, "reading them by the model").tolist()
            entries = []
            for row, values in zip(tokens.tolist(), xe, strict=True):
                entry = {"prompt": prompt.text, "tokens": row, "xe": values}
                if tokenizer:
                    entry["text"] = tokenizer.decode(row)
                entries.append(entry)
            result["samples"] += entries
            for i, entry in enumerate(entries, 1):
                show_judged(entry, i, len(entries), tokenizer, show)
    return result


def show_judged(entry: dict, number: int, count: int, tokenizer: Tokenizer | None, show: Show) -> None:
    """A text, and each token with its cross entropy, but for the first, which nobody predicts."""
    xe = entry["xe"]
    figures = [f"mean {sum(xe) / len(xe):.3f} nats a token"] if xe else []
    show("\n" + title("sample", number, count, entry["prompt"], *figures))
    if tokenizer:
        show(wrapped(entry["text"]) + "\n")
    words = [spelled(token, tokenizer) for token in entry["tokens"]]
    show(beneath({"token": words, "nats": ["", *nats(xe)]}))


# ---------------------------------------------------------------------------------------------------------------
# apelr
# ---------------------------------------------------------------------------------------------------------------
V2_ONLY = ("freeze_planner", "planner_temperature", "lookahead_feedback_scale", "async_planner")
OF_PLANNER = (*V2_ONLY, "force_state", "sweep_states", "show_plan", "lookahead_steps")
SOURCE_PROMPT = "Once upon a time"  # of APEL-R's sampler
SOURCE_FORECAST = 2  # chunks ahead that it prints
NEW_TOKENS = 200


def sample_apelr(page: ModuleType, path: Path, cfg: Config, show: Show) -> dict:
    """Texts that go on from the prompts, by the belief over plans or by one plan, with beliefs and forecasts."""
    run, model, step, extra = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    is_source = is_source_checkpoint(path)
    tokenizer = tokenizer_of(path, extra.get("tokenizer_file"))
    if tokenizer and extra.get("tokenizer_hash", tokenizer.hash()) != tokenizer.hash():
        raise DataError(f"{run_folder(path) / 'tokenizer.json'} is not the tokenizer that {path} was trained with")
    check_planner(run, cfg)
    cfg = settled(cfg, OF_SOURCE if is_source else PLAIN)
    if is_source:
        check_tokenizer(tokenizer, path, extra, cfg)
        for line in (untold(path), source_note(run, getattr(model, "tau", 1.0), cfg)):
            if line:
                show(sentence(line))
    folder = store.on_disk(cfg.out or run_folder(path), setting="out")
    if cfg.show_plan:
        checkpoint.try_place(folder / "plots")
    prompts = [begun(p, tokenizer, extra["vocab_size"], is_source)
               for p in prompts_of(cfg, tokenizer, extra["vocab_size"], reads_pipe=True)]
    lengths = lengths_of(cfg, prompts, 0, NEW_TOKENS)
    plans = run.plans()
    told = f", {plans} plans" if plans > 1 else ""
    show(sentence(f"{run.version} after {counted(step, 'step')}{told}; {manner(cfg)}"))
    states = [None, *range(plans)] if cfg.sweep_states else [cfg.force_state]  # None: by the belief
    result = {"experiment": "apelr", "step": step, "version": run.version, "samples": []}
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        for prompt, length in zip(prompts, lengths, strict=True):
            by_state = []
            for state in states:
                written = write_texts(model, run, prompt, length, tokenizer, state, cfg, rt, is_source)
                by_state.append(entries_of(written, model, prompt, tokenizer, state))
                result["samples"] += by_state[-1]
            if cfg.sweep_states:
                show_sweep(by_state, len(prompt.ids), tokenizer, show)
            else:
                show_texts(by_state[0], model, run, prompt, tokenizer, cfg, show)
    if cfg.show_plan and not cfg.sweep_states:
        beliefs = np.concatenate([entry["beliefs"] for entry in result["samples"]])
        beside = [f"({mark(k)})" for k in range(plans)] if plans > 10 else ()
        names = plan_legend(beliefs.mean(0), typical_tokens(run_folder(path)), beside, console_columns())
        show("\n".join(["", sentence(OF_STRIP), *names]))
        draw_plans(folder, model, run, prompts, result["samples"], tokenizer, cfg, names, show)
    return result


def begun(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, is_source: bool) -> Prompt:
    """A prompt with what a text begins with: of a source with bos, and where there is none with that of its sampler."""
    special = tokenizer.special if tokenizer else {}
    if is_source and tokenizer:
        text = prompt.text or SOURCE_PROMPT
        ids = prompt.ids or tokenizer.encode(text)
        return Prompt(text, [special["bos"], *ids], prompt.place)
    start = special.get("eos", special.get("bos", vocab_size - 1))  # planted documents begin with their last token
    return prompt._replace(ids=prompt.ids or [start])


def check_tokenizer(tokenizer: Tokenizer | None, path: Path, extra: dict, cfg: Config) -> None:
    """Raises DataError where the prompt of a source checkpoint cannot be read, or only by another tokenizer."""
    if tokenizer is None and not cfg.prompts and not cfg.prompt.replace(",", "").strip().isdigit():
        raise DataError(
            f"the tokenizer of {path} is neither where it says nor beside it: put its tokenizer.json beside it, or "
            "give token ids as the prompt, like --prompt=1,17,5"
        )
    if tokenizer and tokenizer.vocab_size != extra["vocab_size"]:
        raise DataError(
            f"{extra['tokenizer_file']} has {tokenizer.vocab_size:,} tokens and {path} knows {extra['vocab_size']:,}: "
            "put the tokenizer that it was trained with beside it"
        )
    if tokenizer and "bos" not in tokenizer.special:
        raise DataError(f"{extra['tokenizer_file']} has no <bos>, with which APEL-R begins a prompt")


def source_note(run, tau: float, cfg: Config) -> str:
    """What a checkpoint of APEL-R is sampled with: its sampler's defaults, but the planner as it was trained."""
    line = f"read as APEL-R: temperature {cfg.temperature}, top_k {cfg.top_k}, bos before a prompt of words"
    if run.version != "v2_planner_required":
        return line
    # APEL-R's own sampler has 1 and 2 here, whatever the checkpoint was trained with.
    if cfg.planner_temperature is None and tau != 1:
        line += f"; planner_temperature {tau:g} as trained (APEL-R's sampler: 1)"
    if cfg.lookahead_steps is None and run.lookahead_horizon != SOURCE_FORECAST:
        line += f"; lookahead_steps {run.lookahead_horizon} as trained (APEL-R's sampler: {SOURCE_FORECAST})"
    return line


def check_planner(run, cfg: Config) -> None:
    """Exits with code 2 where a flag asks for what this model has not."""
    asked = []
    for name in OF_PLANNER:
        value = getattr(cfg, name)
        # Plan 0, a temperature or a share of 0 are asked for: only None and False are not.
        if value is not None and value is not False:
            asked.append(name)
    of_v2 = [name for name in asked if name in V2_ONLY]
    if run.version == "baseline" and asked:
        fail(f"{asked[0]} needs a planner, and this is a baseline model: use a run of v1 or v2")
    if run.version == "v1_filtered_mixture" and of_v2:
        fail(f"{of_v2[0]} is a flag of v2_planner_required, and this is a run of {run.version}: leave it out")
    if cfg.force_state is not None and not 0 <= cfg.force_state < run.plans():
        fail(f"force_state = {cfg.force_state}: this model has the plans 0 to {run.plans() - 1}")


def write_texts(
    model,
    run,
    prompt: Prompt,
    length: int,
    tokenizer: Tokenizer | None,
    state: int | None,
    cfg: Config,
    rt: Runtime,
    is_source: bool = False,
):
    """num_samples texts that go on from one prompt, by one plan if there is a state; is_source: as APEL-R writes."""
    planner = {}
    forecast_steps = cfg.lookahead_steps or 0
    if run.version != "baseline":
        if is_source and cfg.lookahead_steps is None:
            forecast_steps = SOURCE_FORECAST
        planner["tau"] = cfg.planner_temperature
        planner["feedback"] = cfg.lookahead_feedback_scale
    if run.version == "v2_planner_required" and cfg.lookahead_steps is not None:
        planner["horizon"] = cfg.lookahead_steps
    told = f"writing {counted(cfg.num_samples, 'text')} of {length - len(prompt.ids):,} tokens"
    if state is not None:
        planner["planner_mode"] = "forced_state"
        planner["forced_state"] = state
        told += f" by plan {state}"
    return generate(
        model,
        torch.tensor([prompt.ids], device=rt.device).expand(cfg.num_samples, -1),
        length - len(prompt.ids),
        rt.generator(0, device="cpu"),
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        repetition_penalty=cfg.repetition_penalty,
        no_repeat_ngram_size=cfg.no_repeat_ngram_size,
        eos_id=tokenizer.special.get("eos") if tokenizer else None,
        frozen=cfg.freeze_planner,
        unread=cfg.freeze_planner and is_source,
        tempers_plans=is_source and run.version == "v1_filtered_mixture",
        forecast_steps=forecast_steps,
        background=cfg.async_planner,
        head_type=torch.bfloat16 if cfg.precision == "bf16" else None,
        told=told,
        **planner,
    )


def entries_of(written, model, prompt: Prompt, tokenizer: Tokenizer | None, state: int | None) -> list[dict]:
    """Texts as plain data; one that ended before others of its batch up to its end."""
    begin = len(prompt.ids)
    eos = tokenizer.special.get("eos") if tokenizer else None
    entries = []
    for row, tokens in enumerate(written.tokens.tolist()):
        end = tokens.index(eos, begin) + 1 if eos in tokens[begin:] else len(tokens)
        count = end - begin
        entry = {
            "prompt": prompt.text,
            "state": state,
            "tokens": tokens[:end],
            "text": spell(tokens[:end], tokenizer),
            "nll": None,
        }
        if end <= readable_at_once(model.cfg):
            nll = written_nll(model, written.tokens[row : row + 1, :end], begin)
            entry["nll"] = float(nll[0])
        if written.beliefs.numel():
            entry["beliefs"] = written.beliefs[row, :count].exp().tolist()
        if written.forecasts.numel():
            entry["forecasts"] = written.forecasts[row, :count].tolist()
        entries.append(entry)
    return entries


def readable_at_once(cfg) -> float:
    """Tokens of a text that a model of these settings has positions for; it writes on beyond them by its last ones."""
    return cfg.max_seq_len if cfg.backbone == "transformer_lm" else math.inf


def show_texts(entries: list[dict], model, run, prompt: Prompt, tokenizer: Tokenizer | None, cfg: Config, show: Show
               ) -> None:
    """Texts, and what is asked for of their plans."""
    for i, entry in enumerate(entries, 1):
        figures = [] if entry["nll"] is None else [f"{entry['nll']:.2f} nats a token written"]
        if cfg.force_state is not None:
            figures.insert(0, f"by plan {cfg.force_state}")
        show("\n" + title("sample", i, len(entries), prompt.text, *figures))
        if cfg.show_plan:
            words, begins = words_of(entry, len(prompt.ids), model, run, tokenizer)
            show(strip(words, likeliest_plans(entry["beliefs"]), begins))
        else:
            show(wrapped(entry["text"]))
        if "forecasts" in entry:
            show("  forecast at the first token: the plan's probability so many chunks ahead")
            rows = {"plan": [str(k) for k in range(run.plans())]}
            for n, belief in enumerate(entry["forecasts"][0], 1):
                rows[f"in {n}"] = nats(belief)
            show(beneath(rows))


def show_sweep(by_state: list[list[dict]], prompt_length: int, tokenizer: Tokenizer | None, show: Show) -> None:
    """What the belief and each plan in turn write, side by side: a table for each sample."""
    samples = list(zip(*by_state, strict=True))
    for i, entries in enumerate(samples, 1):
        rows = []
        for entry in entries:
            label = "belief" if entry["state"] is None else f"plan {entry['state']}"
            rows.append((label, spell(entry["tokens"][prompt_length:], tokenizer), entry["nll"]))
        show("\n" + title("sample", i, len(samples), entries[0]["prompt"]))
        show(plan_table(rows, console_columns()))
    show("\nnats: -log p a token by the model and its own belief, whoever wrote it.")


def words_of(entry: dict, prompt_length: int, model, run, tokenizer: Tokenizer | None) -> tuple[list[str], list[int]]:
    """(the tokens written as words, which of them begin a chunk)."""
    new = entry["tokens"][prompt_length:]
    words = [spell([token], tokenizer) if tokenizer else f"{token} " for token in new]
    begins = []
    for t in range(1, len(new)):
        place = prompt_length - 1 + t + model.offset  # in the text, as the model cuts it into chunks
        if place % run.chunk_size == 0:
            begins.append(t)
    return words, begins


def typical_tokens(folder: Path) -> dict | None:
    """Of each plan, as the end of its run has measured it; None where it has not."""
    file = folder / "planner_eval.json"
    return read_json(file).get("typical_tokens") if file.is_file() else None


def draw_plans(folder: Path, model, run, prompts: list[Prompt], entries: list[dict], tokenizer: Tokenizer | None,
               cfg: Config, names: list[str], show: Show) -> None:
    """Draw the belief of the first sample of every prompt into plots/ of a folder; names: a line for each plan."""
    for i, prompt in enumerate(prompts):
        name = f"sampled_belief_{cfg.seed}" + (f"_prompt_{i + 1}" if len(prompts) > 1 else "")
        entry = entries[i * cfg.num_samples]
        words, begins = words_of(entry, len(prompt.ids), model, run, tokenizer)
        told = f"Belief over {counted(run.plans(), 'plan')} before each token written; a line: a chunk begins."
        draw_beliefs(folder, name, np.array(entry["beliefs"]), words, begins, told, names=names)
        show(f"picture: {folder / 'plots' / name}.png")


# ---------------------------------------------------------------------------------------------------------------
# state
# ---------------------------------------------------------------------------------------------------------------
def sample_state(page: ModuleType, path: Path, cfg: Config, show: Show) -> dict:
    """Predicted cells as h5ad: of what a TOML holds out, with the measured ones and metrics, or from given controls."""
    run, model, step, extra = page.load_run(path, cfg.device, cfg.source_attention)
    for name, value in cfg.columns.items():
        setattr(run, name, value)
    run.drop_unlabelled = run.drop_unlabelled or cfg.drop_unlabelled
    if cfg.toml:
        run.toml_config_path = cfg.toml
    folder = store.on_disk(cfg.out or run_folder(path) / "predictions", setting="out")
    checkpoint.try_place(folder)
    with Runtime(run) as rt:
        model.to(rt.device)
        if cfg.adata:
            return predict_adata(page, run, model, extra, folder, cfg, rt, show) | {"step": step}
        cells = page.open_run_data(run, extra)
        conditions = []  # what was predicted and measured of each
        result = page.finish(model, cells, run, rt, folder, conditions.append)
    rows = joined(conditions, "rows", "controls")
    columns = {
        run.cell_type_key: np.array(cells.cell_types)[cells.cell_type[rows]],
        run.pert_col: np.array(cells.perturbations)[cells.perturbation[rows]],
    }
    if run.batch_col:
        columns[run.batch_col] = np.array(cells.batches)[cells.batch[rows]]
    if len(cells.files) > 1:  # a cell type of one file is no other's, and its control cells are not
        columns = origins_of(cells, rows) | columns
    genes = cells.genes if model.gene_decoder is None else cells.count_genes
    size = counted(len(rows), "cell")
    for name in ("pred", "real"):  # control cells are as measured in both
        expression = joined(conditions, name, "control")
        with doing(f"writing {folder / name}.h5ad, {size}"):
            write_h5ad(folder / f"{name}.h5ad", expression, columns, genes, obs_names=names_of(cells, rows))
    show(sentence(f"after {counted(step, 'step')} {verdict(result)}"))
    show(f"\n{table_of(result)}\n")
    files = f"pred.h5ad, real.h5ad ({size}, with controls), metrics.csv, results.json, plots"
    show(sentence(f"written to {folder}: {files}"))
    places = [folder / name for name in ("pred.h5ad", "real.h5ad", "metrics.csv", "results.json", "plots")]
    written = [str(place) for place in places if place.exists()]
    return {"experiment": "state", "step": step, **result, "written": written}


def joined(conditions: list[dict], cells: str, controls: str) -> np.ndarray:
    """Of each condition these arrays of its perturbed and of its control cells, one after another."""
    arrays = []
    for condition in conditions:
        arrays += [condition[cells], condition[controls]]
    return np.concatenate(arrays)


def origins_of(cells, rows: np.ndarray) -> dict[str, np.ndarray]:
    """obs columns dataset and file of these cells."""
    file = cells.file[rows]
    names = [path.name for path in cells.files]
    return {"dataset": np.array(cells.names)[file], "file": np.array(names)[file]}


def names_of(cells, rows: np.ndarray) -> np.ndarray:
    """What the files call these cells; -1, -2 ... tell those of the second file and later ones apart."""
    names = np.empty(len(rows), object)
    for f, path in enumerate(cells.files):
        here = cells.file[rows] == f
        with H5ad(path) as file:
            known = file.obs_names[cells.row[rows[here]]]
        ending = f"-{f}" if f else ""
        names[here] = [f"{name}{ending}" for name in known]
    return names.astype(str)


class Given(NamedTuple):
    """Control cells of a file, as a model reads them."""

    controls: Controls
    expression: torch.Tensor  # [cells, D]
    batches: np.ndarray | None  # codes [cells], where the model reads batches
    wanted: list[str]  # perturbations
    genes: np.ndarray | None


def read_given(page: ModuleType, run, model, extra: dict, known: dict, cfg: Config) -> Given:
    """The control cells of cfg.adata, and what is wanted of them: cfg.perturbations, or those of the file's own
    perturbed cells, or else all that the model knows. Raises InputError.
    """
    reads_batches = hasattr(model, "batch_encoder")
    batch_col = run.batch_col if reads_batches else None
    with H5ad(cfg.adata) as file:
        columns = (run.cell_type_key, run.pert_col, batch_col, run.control_pert)
        controls = find_controls(file, *columns, drop_unlabelled=run.drop_unlabelled)
        key = matrix_to_read(file, run.embed_key, extra.get("genes"))
        if key != run.embed_key:
            note(f"{cfg.adata} has no X_hvg of this model's genes: they are read from X, by name")
        genes, order = gene_order(file, key, extra.get("genes"))
        everything = sorted({*known, *controls.perturbations})
        wanted = names_in(cfg.perturbations, everything, f"the model or {cfg.adata}") or controls.perturbations
        if not wanted:
            wanted = [name for name in known if name != run.control_pert]
        page.codes_of(wanted, list(known), "perturbation", cfg.adata)
        batches = None
        if reads_batches and "batches" not in extra:
            raise InputError(f"{cfg.adata}: this model reads batches, and its checkpoint does not name them: it needs "
                             "the batch_onehot_map of its run folder beside it")
        if reads_batches:
            codes = page.codes_of(controls.batches, extra["batches"], "batch", cfg.adata)
            batches = np.array(codes)[controls.batch]
        expression = torch.from_numpy(control_expression(file, controls, key, run.counts, order))
    return Given(controls, expression, batches, wanted, genes)


def predict_adata(page: ModuleType, run, model, extra: dict, folder: Path, cfg: Config, rt: Runtime, show: Show
                  ) -> dict:
    """What the control cells of cfg.adata become under the wanted perturbations: predicted.h5ad.

    Of a condition as many cells are predicted as the file has of it, or as it has control cells. Each has a control
    cell of its type for input (the mean of n_basal_samples, if the model was trained so): each once as far as they go,
    in an order drawn from the seed.
    """
    known = page.known_perturbations(run, extra)
    given = read_given(page, run, model, extra, known, cfg)
    controls = given.controls

    def express(batch: dict) -> torch.Tensor:
        return page.expressed(model, model.predict(batch)["cells"])

    model.eval()
    predicted = []
    types = []
    perturbations = []
    rows = []  # of what is printed
    conditions = [(t, p) for t in range(len(controls.cell_types)) for p in range(len(given.wanted))]
    for t, p in bar(conditions, f"predicting {counted(len(conditions), 'condition')}", unit="condition"):
        cell_type = controls.cell_types[t]
        name = given.wanted[p]
        places = controls.of_type(cell_type)
        n = cfg.cells or controls.perturbed[cell_type, name] or len(places)
        draws = np.random.default_rng([cfg.seed, t, p])  # of this condition alone
        chosen = draw_controls(len(places), n, run.n_basal_samples, draws)
        predicted += predict_cells(
            express,
            given.expression,
            given.batches,
            places[chosen],
            known[name],
            run.cell_set_len,
            rt.device,
        )
        types += [cell_type] * n
        perturbations += [name] * n
        rows.append((cell_type, name, f"{len(places):,}", f"{n:,}"))

    genes = given.genes
    if model.gene_decoder is not None:
        width = predicted[0].shape[1]
        genes = extra.get("count_genes") or [f"feature_{i}" for i in range(width)]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "predicted.h5ad"
    columns = {
        run.cell_type_key: np.array(types),
        run.pert_col: np.array(perturbations),
    }
    cells = counted(len(types), "cell")
    with doing(f"writing {target}, {cells}"):
        write_h5ad(target, np.concatenate(predicted), columns, np.array(genes))
    cell_types = counted(len(controls.cell_types), "cell type")
    show(sentence(f"{cells} of {cell_types} under {counted(len(given.wanted), 'perturbation')} written to {target}"))
    show(table(("cell type", "perturbation", "control cells", "predicted"), rows))
    return {
        "experiment": "state",
        "cells": len(types),
        "cell_types": controls.cell_types,
        "perturbations": given.wanted,
        "written": [str(target)],
    }


# ---------------------------------------------------------------------------------------------------------------
# Which page, and the command line
# ---------------------------------------------------------------------------------------------------------------
SAMPLERS = {"ghmm": sample_ghmm, "arxiv": sample_arxiv, "apelr": sample_apelr, "state": sample_state}
SHARED = ("json", "seed", "device")
OF_TEXT = ("num_samples", "length", "max_new_tokens", "prompt", "prompts", "temperature", "top_k", "top_p")
OPTIONS = {
    "ghmm": OF_TEXT,
    "arxiv": OF_TEXT,
    "apelr": (*OF_TEXT, "repetition_penalty", "no_repeat_ngram_size", "precision", *OF_PLANNER, "out"),
    "state": ("toml", "adata", "perturbations", "cells", "drop_unlabelled", "source_attention", "columns", "out"),
}
NEEDS = {  # what sampling asks of a page
    "ghmm": ("load_run", "exact_device", "make_contexts", "evaluate"),
    "arxiv": ("load_run",),
    "apelr": ("load_run",),
    "state": ("load_run", "open_run_data", "finish", "known_perturbations", "codes_of", "expressed"),
}


def refuse_others(cfg: Config, experiment: str) -> None:
    """Exit where an option was given that means nothing in this experiment."""
    default = Config()
    wrong = []
    for name, value in vars(cfg).items():
        if value != getattr(default, name) and name not in (*SHARED, *OPTIONS[experiment]):
            owners = [owner for owner, options in OPTIONS.items() if name in options]
            wrong.append(f"{name} is an option of {' and '.join(owners)}, not of {experiment}")
    if wrong:
        fail(f"{'; '.join(wrong)}: leave it out (python sample.py RUN --help lists what there is)")


def page_stem(path: Path) -> str:
    """The name of the page that made a run or checkpoint, or that reads it, where it is of a source."""
    stem = checkpoint.experiment_of(path)
    if not stem:
        system = foreign_checkpoints.system_of(path)
        stem = f"train_{system}" if system else ""
    return stem or checkpoint.load(path)["experiment"]  # which says what is wrong with it


def import_page(stem: str, path: Path) -> ModuleType:
    """The page of this name, from the folder of this script; raises InputError where it is gone or does not fit."""
    file = HERE / f"{stem}.py"
    if not str(stem).isidentifier() or not file.is_file():
        raise CheckpointError(f"{path} is a run of {stem}.py, which is not in {HERE}: put that page back to sample it")
    spec = importlib.util.find_spec(stem)
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != file:
        raise CheckpointError(f"{path} is a run of {file}, but Python finds another module {stem}: use another name")
    try:
        page = importlib.import_module(stem)
    except Exception as error:  # an edited page may do anything
        raise InputError(f"{file}, the page of {path}, cannot be imported ({reason(error)}): mend it") from error
    experiment = getattr(page, "EXPERIMENT", None)
    if experiment not in SAMPLERS:
        raise InputError(
            f"{stem}.py, the page of {path}, does not say how to sample it: "
            f"it needs a line EXPERIMENT = \"NAME\", one of {', '.join(SAMPLERS)}"
        )
    missing = [name for name in NEEDS[experiment] if not hasattr(page, name)]
    if missing:
        raise InputError(
            f"{stem}.py, the page of {path}, has no {', '.join(missing)}, "
            f"which sample.py asks of a page with EXPERIMENT = \"{experiment}\""
        )
    return page


def as_one_text(argv: list[str], setting: str) -> list[str]:
    """The words of a command line with the value of a setting as one text in a list, whatever is in it: whether it is
    a name or a list of names is asked of the data."""
    words = []
    is_value = False
    for word in argv:
        key, _, value = word.partition("=")
        if is_value and not word.startswith("--"):
            word = json.dumps([word])
        elif value and key.lstrip("-+") == setting:
            word = f"{key}={json.dumps([value])}"
        is_value = word == f"--{setting}"
        words.append(word)
    return words


def with_json_file(argv: list[str]) -> list[str]:
    """The words of a command line with `--json FILE` as --json=FILE: alone, --json is a switch."""
    words = []
    for word in argv:
        if words and words[-1] == "--json" and not word.startswith("-") and "=" not in word:
            words[-1] = f"--json={word}"
        else:
            words.append(word)
    return words


def run_named(name: str) -> Path:
    """The run folder or checkpoint of the first argument. Raises CheckpointError, naming those that it may mean."""
    path = foreign_checkpoints.checkpoint_in(name)
    if path.is_file() or path.exists() and not path.is_dir() or (path / "last.pt").exists():
        return path
    inside = runs_in(path)
    if inside:
        raise CheckpointError(f"{name} is a folder of {counted(len(inside), 'run')}: name one of {some_of(inside)}")
    if path.is_dir():
        return path  # reading it says what is wrong with it
    around = runs_in(path.parent) or runs_in(Path("out"))
    near = difflib.get_close_matches(str(path), map(str, around), 1, 0.75)
    told = f"there is no run or checkpoint {name}"
    if near:
        told += f", did you mean {near[0]}?"
    raise CheckpointError(f"{told} There are {some_of(around)}" if around else
                          f"{told}: name a folder that a page trained in, or a checkpoint file")


def runs_in(folder: Path) -> list[Path]:
    """The run folders in a folder, and in the folders in it, such as a sweep or a study."""
    files = [file for pattern in ("*/last.pt", "*/*/last.pt") for file in folder.glob(pattern)]
    return sorted(file.parent for file in files)


def some_of(paths: list[Path], most: int = 6) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(str, paths[:most])) + more


def bare_command(argv: list[str]) -> str:
    """What to type instead of a command line that does not begin with a run folder or checkpoint."""
    words = list(argv)
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "--checkpoint":
            file = value or "".join(words[i + 1 : i + 2]) or "CHECKPOINT"
            rest = words[:i] + words[i + (1 if value else 2) :]
            return f"a checkpoint goes bare, before the options: {shlex.join(['python', 'sample.py', file, *rest])}"
    return f"the first argument is a run folder or checkpoint, not {argv[0]!r}: python sample.py out/ghmm {argv[0]}"


def main(argv: list[str] | None = None) -> dict:
    with clear_errors():
        return sample(list(sys.argv[1:] if argv is None else argv))


USAGE = """python sample.py RUN [--key=value ...]

  RUN             a run folder or a checkpoint, also of a source system, also at a URL
  --key=value     also --key value, and for switches --key and --no-key"""


def show_help(name: str) -> NoReturn:
    """--help: of a run the settings of its experiment alone; where none is named, which there are."""
    if name:
        path = run_named(name)
        experiment = import_page(page_stem(path), path).EXPERIMENT
        print_text(help_text(Config, "sample.py", usage=USAGE, only=(*SHARED, *OPTIONS[experiment])))
    else:
        found = runs_in(Path("out"))
        here = "\n\n" + sentence(f"runs in out/: {some_of(found)}") if found else ""
        print_text(help_text(Config, "sample.py", usage=USAGE) + here)
    raise SystemExit(0)


def sample(argv: list[str]) -> dict:
    """The words of a command line -> what was sampled."""
    if not argv or {"-h", "--help"} & set(argv):
        show_help(argv[0] if argv and not argv[0].startswith("-") else "")
    if argv[0].startswith("-"):
        fail(bare_command(argv))
    words = as_one_text(with_json_file(argv[1:]), "perturbations")
    cfg = configure(Config, words, {"start": "prompt"})  # as nanoGPT calls it
    is_bare = cfg.json is True or cfg.json == "-"  # all of standard output is JSON
    if cfg.json and not is_bare:
        target = Path(cfg.json)
        if target.is_dir() or not target.resolve().parent.is_dir():
            fail(f"json = {cfg.json}: not a file in a folder that exists")
    with contextlib.redirect_stdout(sys.stderr) if is_bare else contextlib.nullcontext():
        begin(__file__, f"reading {argv[0]}", file=sys.stdout)
        path = run_named(argv[0])
        stem = page_stem(path)
        page = import_page(stem, path)
        refuse_others(cfg, page.EXPERIMENT)
        sampler = SAMPLERS[page.EXPERIMENT]
        with rehearsal(f"sampling {path} by {stem}.py", "is the page still as the run was trained?"):
            result = sampler(page, path, cfg, no_show if is_bare else print)
    if is_bare:
        print(json_text(result), end="")
    elif cfg.json:
        write_json(Path(cfg.json), result)  # -inf of impossible tokens becomes null
        print(f"\nwritten to {cfg.json}")
    return result


def no_show(text: str) -> None:
    """In the place of print where results are JSON."""


if __name__ == "__main__":
    main()
