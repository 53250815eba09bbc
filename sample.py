"""Sample from a trained model: whose run it is, and how it was trained, is read from the checkpoint.

    python sample.py out/ghmm                     # sequences of the model, and of its process
    python sample.py out/ghmm --prompt=0,1 --length=30 --temperature=0
    python sample.py out/arxiv_small/K1_cs.DS_seed0 --prompt="We give a faster algorithm" --top_k=50
    python sample.py out/apelr --prompt="Once upon a time" --top_p=0.9 --show_plan
    python sample.py out/apelr --prompt="Once upon a time" --sweep_states   # what each plan writes
    python sample.py out/apelr --prompts=prompts.txt --json=samples.json    # a prompt a line
    echo "Once upon a time" | python sample.py out/apelr --force_state=3
    python sample.py out/state                    # held-out conditions: h5ad, metrics, pictures
    python sample.py out/state --adata=controls.h5ad --perturbations=p03,p07  # they become
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
from common.errors import CheckpointError, InputError, clear_errors, reason, rehearsal  # isort: skip

import contextlib
import difflib
import importlib
import importlib.util
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, NoReturn

from common import checkpoint
from common.runlog import json_text, write_json
from common.telling import begin
from configurator import Count, Fraction, Positive, Probability, Range, Whole, configure, fail, help_text, print_text
from measure.sample_cells import sample_state
from measure.sample_sequences import sample_arxiv, sample_ghmm
from measure.sample_texts import OF_PLANNER, sample_apelr
from measure.transcript import sentence
from sources import foreign_checkpoints
from sources.shared import counted

HERE = Path(__file__).resolve().parent  # where pages are imported from, and only here: no code of a run folder runs

Temperature = Annotated[float, Range("0 or float >= 1e-6", "must be 0 or at least 1e-6", lambda t: t == 0 or t >= 1e-6)]
Penalty = Annotated[float, Range("float >= 1", "must be at least 1", lambda value: value >= 1)]
Seed = Annotated[int, Range("int >= 0", "must be in [0, 2**63)", lambda value: 0 <= value < 2**63)]
BESIDE = (".json", ".jsonl", ".log", ".html", ".csv", ".txt", ".py")  # files of a run folder that are no checkpoints
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
    is_beside = path.is_dir() or path.is_file() and path.suffix in BESIDE
    if is_beside and not (path / "last.pt").exists() and (path.parent / "last.pt").exists():
        raise CheckpointError(f"{path} is no checkpoint, but lies in the run {path.parent}: name that")
    if path.is_file() or path.exists() and not path.is_dir() or (path / "last.pt").exists():
        return path
    inside = runs_in(path)
    if inside:
        raise CheckpointError(f"{path} is a folder of {counted(len(inside), 'run')}: name one of {some_of(inside)}")
    if path.is_dir():
        return path  # reading it says what is wrong with it
    around = runs_in(path.parent) or runs_in(Path("out"))
    near = difflib.get_close_matches(str(path), map(str, around), 1, 0.75)
    told = f"there is no run or checkpoint {name}"
    if near:
        told += f", did you mean {near[0]}? There are {some_of(around)}"
    elif around:
        told += f": there are {some_of(around)}"
    else:
        told += ": name a folder that a page trained in, or a checkpoint file"
    raise CheckpointError(told)


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
    runs = [word for word in words if Path(word, "last.pt").exists() or Path(word).is_file() and word.endswith(".pt")]
    run = runs[0] if runs else "RUN"
    words = [word for word in words if word != run]
    told = shlex.join(["python", "sample.py", run, *words])
    return f"the first argument is a run folder or checkpoint, not {argv[0]!r}: {told}"


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
