"""Sample from a trained model: the page it is of, its experiment and its settings are read from the checkpoint.

    python sample.py out/ghmm                              # sequences of the model beside sequences of its process
    python sample.py out/ghmm --num_samples=2 --length=30 --prompt=0,1 --temperature=0.8
    python sample.py out/arxiv_small/K1_cs.DS_seed1337 --prompt="We give a faster algorithm" --top_k=50
    python sample.py out/ghmm/best.pt --json=samples.json
    python sample.py out/apelr --prompt="Once upon a time" --top_p=0.9 --show_plan
    python sample.py out/apelr --prompt="Once upon a time" --sweep_states    # what each plan would write
    echo "Once upon a time" | python sample.py out/apelr --force_state=3
    python sample.py out/state                             # held-out conditions: pred.h5ad, real.h5ad, metrics, plots
    python sample.py out/state --adata=controls.h5ad --perturbations=p3,p7    # what these cells would become

ghmm: tokens with their log-probabilities under the true process, and how far the model's predictions are from the
optimal ones at each position. arxiv: text that goes on from the prompt, with the cross entropy of every token. apelr:
text and the belief about its plan, which can be read, forced and frozen; a checkpoint.pt of the source will do, with
the defaults of its sampler. state: cells, written as h5ad; a .ckpt or run folder of the source will do (a .ckpt with
--toml). ghmm, arxiv: a checkpoint of the source will do. A copy of a page is sampled as what its EXPERIMENT
says; the page must still be in the folder of this script.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import CheckpointError, DataError, InputError, clear_errors, reason, rehearsal  # isort: skip

import importlib
import importlib.util
import json
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import numpy as np
import torch

from common import checkpoint, store
from common.runlog import write_json
from common.runtime import Runtime
from configurator import Count, Fraction, Positive, Probability, Range, Whole, configure, fail
from measure.effects import verdict
from measure.plan_pictures import draw_beliefs
from measure.predictions import draw_controls, predict_cells
from measure.sequences import continue_sequences, process_sequences, sequence_xe
from measure.writing import generate
from sources import foreign_checkpoints
from sources.controls import control_expression, find_controls, gene_order, matrix_to_read, names_in
from sources.foreign_apelr import is_source_checkpoint, untold
from sources.h5ad import H5ad, write_h5ad
from sources.shared import counted
from sources.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).resolve().parent  # where pages are imported from, and only here: no code of a run folder runs

Temperature = Annotated[float, Range("0 or float >= 1e-6", "must be 0 or at least 1e-6", lambda t: t == 0 or t >= 1e-6)]
Penalty = Annotated[float, Range("float >= 1", "must be at least 1", lambda value: value >= 1)]
Seed = Annotated[int, Range("int >= 0", "must be in [0, 2**63)", lambda value: 0 <= value < 2**63)]
COLUMNS = ("pert_col", "cell_type_key", "batch_col", "control_pert", "embed_key")  # of an h5ad, that may have others


@dataclass
class Config:
    # sampling
    num_samples: Count | None = None  # sequences of the model, and as many of the process; default 4
    length: Count | None = None  # tokens a sequence, prompt included; default the model's n_ctx; apelr: 200 new ones
    max_new_tokens: Count | None = None  # instead of length: tokens to write after the prompt
    prompt: str = ""  # what every sequence begins with: token ids like 0,1,2, or text where the run has a tokenizer
    temperature: Temperature | None = None  # divides the logits; 1, the default, samples what the model believes, 0
    # ^ takes the likeliest token
    top_k: Whole | None = None  # sample from the k likeliest tokens only; 0, the default: from all
    # sampling, of apelr
    top_p: Fraction = 1.0  # sample from the fewest tokens that have this share of the probability
    repetition_penalty: Penalty = 1.0  # its logarithm is taken off tokens that the text has already
    no_repeat_ngram_size: Whole = 0  # never write n tokens a second time; 0: do
    # planner, of apelr
    lookahead_steps: Whole | None = None  # print forecasts of the plan this many chunks ahead; v2 also looks that far,
    # ^ by default as far as trained
    lookahead_feedback_scale: Probability | None = None  # v2: share of the forecast in the gate; default as trained
    force_state: int | None = None  # write by this plan alone
    freeze_planner: bool = False  # v2: the belief stays what the prompt made it; of a source checkpoint: the prior
    planner_temperature: Positive | None = None  # v2: sharpness of the gate; default as trained
    async_planner: bool = False  # v2: forecasts are computed beside the writing, by a thread; the same text
    show_plan: bool = False  # print the belief under the text, and draw it
    sweep_states: bool = False  # write by each plan in turn and by the belief: a table
    # prediction, of state
    toml: str = ""  # predict what this TOML holds out; default the run's own
    adata: str = ""  # predict from the control cells of this h5ad instead
    perturbations: list[str] = field(default_factory=list)  # with adata: NAME or NAME,NAME; default its cells', or all
    cells: Count | None = None  # with adata: predicted cells of a condition; default as many as the file has
    drop_unlabelled: bool = False  # leave cells without cell type, perturbation or batch out
    source_attention: Literal["auto", "bidirectional", "causal", "rotary"] = "auto"  # of a .ckpt of the source
    columns: dict[str, str] = field(default_factory=dict)  # pert_col, cell_type_key, batch_col, control_pert, if others
    # output
    json: str = ""  # file to write the samples to as well
    out: str = ""  # of state and apelr: folder of what is written; default RUN/predictions, or RUN for pictures
    # system
    precision: Literal["fp32", "bf16"] = "fp32"  # apelr: of the heads, which every token reads whole
    seed: Seed = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps

    def check(self) -> list[str]:
        wrong = [f"columns: {name!r} is none of {', '.join(COLUMNS)}" for name in self.columns if name not in COLUMNS]
        if self.length and self.max_new_tokens:
            wrong.append("length counts the prompt and max_new_tokens does not: choose one")
        if self.perturbations and not self.adata:
            wrong.append("perturbations go with adata: what a TOML holds out says by itself what is predicted")
        if self.force_state is not None and (self.sweep_states or self.freeze_planner):
            wrong.append("force_state goes neither with sweep_states nor with freeze_planner: choose one")
        return wrong


PLAIN = {"num_samples": 4, "temperature": 1.0, "top_k": 0}  # what is not asked for
OF_SOURCE = {"num_samples": 1, "temperature": 0.9, "top_k": 40}  # by APEL-R's sampler, of its checkpoints


def with_defaults(cfg: Config, defaults: dict) -> Config:
    """The settings with what is not asked for."""
    return replace(cfg, **{name: value for name, value in defaults.items() if getattr(cfg, name) is None})


def length_of(cfg: Config, prompt_length: int, default: int) -> int:
    """Tokens of a sequence, prompt included."""
    if cfg.max_new_tokens:
        return prompt_length + cfg.max_new_tokens
    return cfg.length or default


def token_ids(prompt: str, vocab_size: int) -> list[int]:
    """The prompt as token ids; exits with code 2 where it is something else."""
    if not prompt.strip():
        return []
    ids = []
    for part in prompt.split(","):
        part = part.strip()
        if not part.isdigit() or int(part) >= vocab_size:
            fail(f"prompt = {prompt!r}: expected token ids from 0 to {vocab_size - 1}, like 0,1")
        ids.append(int(part))
    return ids


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


# ---------------------------------------------------------------------------------------------------------------
# ghmm
# ---------------------------------------------------------------------------------------------------------------
def sample_ghmm(page: ModuleType, path: Path, cfg: Config) -> dict:
    """Sequences from the model and from the process, each token's true log-probability, and the KL by position."""
    cfg = with_defaults(cfg, PLAIN)
    run, process, model, step = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    prompt = torch.tensor([token_ids(cfg.prompt, process.vocab_size)], dtype=torch.int64)
    length = length_of(cfg, prompt.shape[1], run.n_ctx)
    if process.log_prob(prompt).isinf().any():
        fail(f"prompt = {cfg.prompt}: these tokens have probability 0 under {process.name}")
    with Runtime(run) as rt:
        place = page.exact_device(rt)  # float64, which not every accelerator has
        process.to(place)
        model.to(rt.device).eval()
        start = prompt.to(place).expand(cfg.num_samples, -1)  # [B, T]
        # Each draw has a generator of its own, so that longer sequences begin like shorter ones of the same seed.
        token_draws = rt.generator(0, device=place)
        state_draws = rt.generator(3, device=place)
        true = process_sequences(process, start, length, token_draws, state_draws)
        # The model predicts from one token on; without a prompt the process gives the first.
        if not start.shape[1]:
            start = true[:, :1]
        model_draws = rt.generator(1, device=place)
        tokens = continue_sequences(
            model,
            start,
            length,
            run.n_ctx,
            model_draws,
            rt.device,
            cfg.temperature,
            cfg.top_k,
        )
        # Over all words of the length where they are few, else over sampled ones: what the run's own evaluation does.
        contexts = page.make_contexts(process, run.n_ctx, run.max_words, 4_096, cfg.seed)
        optimal = process.optimal_loss(run.n_ctx)
        evaluation = page.evaluate(model, contexts, optimal, rt)
        result = {
            "experiment": "ghmm",
            "step": step,
            "kl_by_position": evaluation["kl_by_position"],
        }
        for name, sequences in (("model", tokens), ("process", true)):
            log_prob = process.log_prob(sequences)
            result[name] = {"tokens": sequences.tolist(), "log_prob": log_prob.tolist()}
    show_ghmm(result, f"{process.name}, {run.model} after {counted(step, 'step')}")
    return result


def show_ghmm(result: dict, title: str) -> None:
    print(f"{title}. Log-probabilities in nats, under the true process.")
    for name in ("model", "process"):
        print(f"\nfrom the {name}:")
        for tokens, log_probs in zip(result[name]["tokens"], result[name]["log_prob"], strict=True):
            print("  token " + " ".join(f"{x:>6}" for x in tokens))
            print("  log p " + " ".join(f"{x:6.2f}" for x in log_probs) + f"   sum {sum(log_probs):.2f}")
    kl = result["kl_by_position"]
    print("\nKL(optimal || model) in nats, after reading")
    print("  tokens " + " ".join(f"{i:>8}" for i in range(1, len(kl) + 1)))
    print("  KL     " + " ".join(f"{x:8.1e}" for x in kl))


# ---------------------------------------------------------------------------------------------------------------
# arxiv
# ---------------------------------------------------------------------------------------------------------------
def sample_arxiv(page: ModuleType, path: Path, cfg: Config) -> dict:
    """Texts that go on from the prompt, with the model's cross entropy of every token, prompt included."""
    cfg = with_defaults(cfg, PLAIN)
    run, model, step, extra = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    tokenizer = tokenizer_of(path)
    n_ctx = extra["n_ctx"]
    vocab_size = extra["vocab_size"]
    ids = tokenizer.encode(cfg.prompt) if tokenizer else token_ids(cfg.prompt, vocab_size)
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        generator = rt.generator(0, device="cpu")
        length = length_of(cfg, len(ids), n_ctx)
        if not ids:  # the model predicts from one token on
            ids = torch.randint(vocab_size, (1,), generator=generator).tolist()
        start = torch.tensor([ids]).expand(cfg.num_samples, -1)
        tokens = continue_sequences(
            model,
            start,
            length,
            n_ctx,
            generator,
            rt.device,
            cfg.temperature,
            cfg.top_k,
        )
        xe = sequence_xe(model, tokens.to(rt.device), n_ctx).tolist()
    result = {"experiment": "arxiv", "step": step, "tokens": tokens.tolist(), "xe": xe}
    if tokenizer:
        result["text"] = [tokenizer.decode(row) for row in tokens]
    categories = extra["categories"]
    print(f"K = {len(categories)} ({', '.join(categories)}), {counted(step, 'step')}. Cross entropies in nats.")
    for row, values in zip(result["tokens"], xe, strict=True):
        show_judged(row, values, tokenizer)
    return result


def show_judged(tokens: list[int], xe: list[float], tokenizer: Tokenizer | None) -> None:
    """Print a text, and each token after the first with its cross entropy."""
    words = []
    for token in tokens:
        # repr shows line ends and the like; its quotes are left out.
        words.append(repr(tokenizer.decode([token]))[1:-1] if tokenizer else str(token))
    judged = [words[0]]
    for word, value in zip(words[1:], xe, strict=True):
        judged.append(f"{word}|{value:.2f}")
    print("\n" + spell(tokens, tokenizer))
    print("  " + " ".join(judged))
    if xe:  # a token alone is predicted by nobody
        print(f"  mean {sum(xe) / len(xe):.3f}")


# ---------------------------------------------------------------------------------------------------------------
# apelr
# ---------------------------------------------------------------------------------------------------------------
V2_ONLY = ("freeze_planner", "planner_temperature", "lookahead_feedback_scale", "async_planner")
OF_PLANNER = (*V2_ONLY, "force_state", "sweep_states", "show_plan", "lookahead_steps")
SOURCE_PROMPT = "Once upon a time"  # of APEL-R's sampler
SOURCE_FORECAST = 2  # chunks ahead that it prints
SHADES = " .:-=+*#%@"  # a belief of 0 to 1
STRIP = 100  # tokens in a line of a printed belief
DRAWN = 96  # tokens of a drawn belief


def sample_apelr(page: ModuleType, path: Path, cfg: Config) -> dict:
    """Texts that go on from the prompts, by the belief over plans or by one plan, with beliefs and forecasts."""
    run, model, step, extra = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    is_source = is_source_checkpoint(path)
    tokenizer = tokenizer_of(path, extra.get("tokenizer_file"))
    if tokenizer and extra.get("tokenizer_hash", tokenizer.hash()) != tokenizer.hash():
        raise DataError(f"{run_folder(path) / 'tokenizer.json'} is not the tokenizer that {path} was trained with")
    check_planner(run, cfg)
    cfg = with_defaults(cfg, OF_SOURCE if is_source else PLAIN)
    if is_source:
        check_tokenizer(tokenizer, path, extra, cfg)
        notes = untold(path), source_note(run, getattr(model, "tau", 1.0), cfg)
        print("\n".join(note for note in notes if note))
    result = {"experiment": "apelr", "step": step, "version": run.version, "samples": []}
    folder = store.on_disk(cfg.out or run_folder(path), setting="out")
    if cfg.show_plan:
        checkpoint.try_place(folder / "plots")
    plans = run.plans()
    note = f", {plans} plans" if plans > 1 else ""
    print(f"{run.version} after {counted(step, 'step')}{note}")
    states = [cfg.force_state]
    if cfg.sweep_states:
        states = [None, *range(plans)]  # None: by the belief
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        for ids in prompts_of(cfg, tokenizer, extra["vocab_size"], is_source):
            for state in states:
                written = write_texts(model, run, ids, tokenizer, state, cfg, rt, is_source)
                entries = [entry_of(written, row, ids, tokenizer, state) for row in range(cfg.num_samples)]
                result["samples"] += entries
                for entry in entries:
                    show_text(entry, model, run, len(ids), tokenizer, cfg)
                if cfg.show_plan and not cfg.sweep_states:
                    name = f"sampled_belief_{cfg.seed}"
                    strip = strip_of(entries[0], len(ids), model, run, tokenizer)
                    draw_plan(folder, name, *strip)
    return result


def check_tokenizer(tokenizer: Tokenizer | None, path: Path, extra: dict, cfg: Config) -> None:
    """Raises DataError where the prompt of a source checkpoint cannot be read, or only by another tokenizer."""
    if tokenizer is None and not cfg.prompt.replace(",", "").strip().isdigit():
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
    note = f"read as APEL-R: temperature {cfg.temperature}, top_k {cfg.top_k}, bos before a prompt of words"
    if run.version != "v2_planner_required":
        return note
    # APEL-R's own sampler has 1 and 2 here, whatever the checkpoint was trained with.
    if cfg.planner_temperature is None and tau != 1:
        note += f"; planner_temperature {tau:g} as trained (APEL-R's sampler: 1)"
    if cfg.lookahead_steps is None and run.lookahead_horizon != SOURCE_FORECAST:
        note += f"; lookahead_steps {run.lookahead_horizon} as trained (APEL-R's sampler: {SOURCE_FORECAST})"
    return note


def prompts_of(cfg: Config, tokenizer: Tokenizer | None, vocab_size: int, is_source: bool = False) -> list[list[int]]:
    """Token ids of the prompt, or of every line of stdin where that is a pipe and there is no prompt.

    is_source: begin with bos, and where nothing is given with the prompt of APEL-R's sampler.
    """
    lines = [cfg.prompt]
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    if is_piped and not cfg.prompt:
        lines = sys.stdin.read().splitlines()
    lines = [line for line in lines if line.strip()]
    if is_source and tokenizer:
        bos = tokenizer.special["bos"]
        return [[bos, *tokenizer.encode(line)] for line in lines or [SOURCE_PROMPT]]
    lines = lines or [""]
    start = [vocab_size - 1]  # planted documents begin with their last token
    if tokenizer:
        for name in ("bos", "eos"):  # eos where it has both
            if name in tokenizer.special:
                start = [tokenizer.special[name]]
    prompts = []
    for line in lines:
        ids = tokenizer.encode(line) if tokenizer else token_ids(line, vocab_size)
        prompts.append(ids or start)
    return prompts


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
    ids: list[int],
    tokenizer: Tokenizer | None,
    state: int | None,
    cfg: Config,
    rt: Runtime,
    is_source: bool = False,
):
    """num_samples texts that go on from one prompt, by one plan if there is a state; is_source: as APEL-R writes."""
    tokens = length_of(cfg, len(ids), len(ids) + 200) - len(ids)
    planner = {}
    forecast_steps = cfg.lookahead_steps or 0
    if run.version != "baseline":
        if is_source and cfg.lookahead_steps is None:
            forecast_steps = SOURCE_FORECAST
        planner["tau"] = cfg.planner_temperature
        planner["feedback"] = cfg.lookahead_feedback_scale
    if run.version == "v2_planner_required" and cfg.lookahead_steps is not None:
        planner["horizon"] = cfg.lookahead_steps
    if state is not None:
        planner["planner_mode"] = "forced_state"
        planner["forced_state"] = state
    return generate(
        model,
        torch.tensor([ids], device=rt.device).expand(cfg.num_samples, -1),
        max(1, tokens),
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
        **planner,
    )


def entry_of(written, row: int, ids: list[int], tokenizer: Tokenizer | None, state: int | None) -> dict:
    """One text as plain data."""
    tokens = written.tokens[row].tolist()
    entry = {
        "prompt": spell(ids, tokenizer),
        "state": state,
        "tokens": tokens,
        "text": spell(tokens, tokenizer),
    }
    if written.beliefs.numel():
        entry["beliefs"] = written.beliefs[row].exp().tolist()
    if written.forecasts.numel():
        entry["forecasts"] = written.forecasts[row].tolist()
    return entry


def show_text(entry: dict, model, run, prompt_length: int, tokenizer: Tokenizer | None, cfg: Config) -> None:
    """Print a text, as a line of a table where all plans write, and what is asked for of its plan."""
    if cfg.sweep_states:
        label = "belief" if entry["state"] is None else f"plan {entry['state']}"
        new = spell(entry["tokens"][prompt_length:], tokenizer)
        line = new.replace("\n", " ")[:160]
        print(f"{label:<7}| {line}")
    else:
        print("\n" + entry["text"])
    if "forecasts" in entry:
        ahead = []
        for belief in entry["forecasts"][0]:
            numbers = " ".join(f"{probability:.2f}" for probability in belief)
            ahead.append(f"[{numbers}]")
        print(f"  forecast at the first token, chunk by chunk: {' -> '.join(ahead)}")
    if cfg.show_plan and not cfg.sweep_states:
        strip = strip_of(entry, prompt_length, model, run, tokenizer)
        print_strip(*strip)


def strip_of(entry: dict, prompt_length: int, model, run, tokenizer: Tokenizer | None
             ) -> tuple[list[list[float]], list[str], list[int]]:
    """(beliefs before each token written, the tokens as words, where a chunk begins) of a text."""
    new = entry["tokens"][prompt_length:]
    words = []
    for token in new:
        words.append(spell([token], tokenizer) if tokenizer else f"{token} ")
    begins = []
    for t in range(1, len(new)):
        place = prompt_length - 1 + t + model.offset  # in the text, as the model cuts it into chunks
        if place % run.chunk_size == 0:
            begins.append(t)
    return entry["beliefs"], words, begins


def print_strip(beliefs: list[list[float]], words: list[str], begins: list[int]) -> None:
    """Beliefs as shades, a line a plan; | where a chunk begins."""
    for begin in range(0, len(beliefs), STRIP):
        end = min(begin + STRIP, len(beliefs))
        text = "".join(words[begin:end])[:STRIP].replace("\n", " ")
        print(f"  tokens {begin}-{end - 1}: {text}")
        for k in range(len(beliefs[0])):
            strip = ""
            for t in range(begin, end):
                if t in begins:
                    strip += "|"
                shade = min(9, int(10 * beliefs[t][k]))
                strip += SHADES[shade]
            print(f"  plan {k:>2} {strip}")


def draw_plan(folder: Path, name: str, beliefs: list[list[float]], words: list[str], begins: list[int]) -> None:
    """Draw the first beliefs of a text into plots/ of a folder."""
    draw_beliefs(
        folder,
        name,
        np.array(beliefs[:DRAWN]),
        words[:DRAWN],
        [t for t in begins if t < DRAWN],
        "belief before each token (blue: a chunk begins)",
    )
    print(f"  picture: {folder / 'plots' / name}.png")


# ---------------------------------------------------------------------------------------------------------------
# state
# ---------------------------------------------------------------------------------------------------------------
def sample_state(page: ModuleType, path: Path, cfg: Config) -> dict:
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
            return predict_adata(page, run, model, extra, folder, cfg, rt)
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
    for name in ("pred", "real"):  # control cells are as measured in both
        expression = joined(conditions, name, "control")
        write_h5ad(folder / f"{name}.h5ad", expression, columns, genes, obs_names=names_of(cells, rows))
    size = counted(len(rows), "cell")
    print(f"written to {folder}: pred.h5ad and real.h5ad ({size}, controls included), metrics.csv, plots")
    print(f"after {counted(step, 'step')}: {verdict(result)}; pictures in {folder / 'plots'}")
    return {"experiment": "state", "step": step, **result}


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


def predict_adata(page: ModuleType, run, model, extra: dict, folder: Path, cfg: Config, rt: Runtime) -> dict:
    """What the control cells of cfg.adata become under the wanted perturbations: predicted.h5ad.

    Wanted of each cell type are cfg.perturbations, or those of the file's own perturbed cells, as many cells as there
    are, or else all that the model knows. Every predicted cell has a control cell of its type for input (the mean of
    n_basal_samples, if the model was trained so): each once as far as they go, in an order drawn from the seed.
    """
    known = page.known_perturbations(run, extra)
    reads_batches = hasattr(model, "batch_encoder")
    batch_col = run.batch_col if reads_batches else None
    with H5ad(cfg.adata) as file:
        columns = (run.cell_type_key, run.pert_col, batch_col, run.control_pert)
        controls = find_controls(file, *columns, drop_unlabelled=run.drop_unlabelled)
        key = matrix_to_read(file, run.embed_key, extra.get("genes"))
        if key != run.embed_key:
            print(f"note: {cfg.adata} has no X_hvg of this model's genes: they are read from X, by name")
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

    def express(batch: dict) -> torch.Tensor:
        return page.expressed(model, model.predict(batch)["cells"])

    model.eval()
    predicted = []
    types = []
    perturbations = []
    for t, cell_type in enumerate(controls.cell_types):
        places = controls.of_type(cell_type)
        for p, name in enumerate(wanted):
            n = cfg.cells or controls.perturbed[cell_type, name] or len(places)
            draws = np.random.default_rng([cfg.seed, t, p])  # of this condition alone
            chosen = draw_controls(len(places), n, run.n_basal_samples, draws)
            predicted += predict_cells(
                express,
                expression,
                batches,
                places[chosen],
                known[name],
                run.cell_set_len,
                rt.device,
            )
            types += [cell_type] * n
            perturbations += [name] * n
    if model.gene_decoder is not None:
        width = predicted[0].shape[1]
        genes = extra.get("count_genes") or [f"feature_{i}" for i in range(width)]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "predicted.h5ad"
    columns = {
        run.cell_type_key: np.array(types),
        run.pert_col: np.array(perturbations),
    }
    write_h5ad(target, np.concatenate(predicted), columns, np.array(genes))
    cells = counted(len(types), "cell")
    cell_types = counted(len(controls.cell_types), "cell type")
    print(f"{cells} of {cell_types} under {counted(len(wanted), 'perturbation')} written to {target}")
    return {
        "experiment": "state",
        "cells": len(types),
        "cell_types": controls.cell_types,
        "perturbations": wanted,
    }


# ---------------------------------------------------------------------------------------------------------------
# Which page, and the command line
# ---------------------------------------------------------------------------------------------------------------
SAMPLERS = {"ghmm": sample_ghmm, "arxiv": sample_arxiv, "apelr": sample_apelr, "state": sample_state}
SHARED = ("json", "seed", "device")
OF_TEXT = ("num_samples", "length", "max_new_tokens", "prompt", "temperature", "top_k")
OPTIONS = {
    "ghmm": OF_TEXT,
    "arxiv": OF_TEXT,
    "apelr": (*OF_TEXT, "top_p", "repetition_penalty", "no_repeat_ngram_size", "precision", *OF_PLANNER, "out"),
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
        fail("; ".join(wrong))


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


def sample(argv: list[str]) -> dict:
    """The words of a command line -> what was sampled."""
    if not argv or argv[0] in ("-h", "--help"):
        configure(Config, ["--help"])
    if argv[0].startswith("-"):
        fail(bare_command(argv))
    cfg = configure(Config, as_one_text(argv[1:], "perturbations"))
    if cfg.json:
        target = Path(cfg.json)
        if target.is_dir() or not target.resolve().parent.is_dir():
            fail(f"json = {cfg.json}: not a file in a folder that exists")
    path = foreign_checkpoints.checkpoint_in(argv[0])
    stem = page_stem(path)
    page = import_page(stem, path)
    refuse_others(cfg, page.EXPERIMENT)
    sampler = SAMPLERS[page.EXPERIMENT]
    with rehearsal(f"sampling {path} by {stem}.py", "is the page still as the run was trained?"):
        result = sampler(page, path, cfg)
    if cfg.json:
        write_json(Path(cfg.json), result)  # -inf of impossible tokens becomes null
        print(f"\nwritten to {cfg.json}")
    return result


if __name__ == "__main__":
    main()
