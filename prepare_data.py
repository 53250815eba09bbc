"""Turn raw sources into training files. The first argument is the job, the rest are its typed settings.

    python prepare_data.py text                             # plain text: the documentation in Python itself
    python prepare_data.py text --input=tinystories         # the same from the hub, or --input=FILE or FOLDER
    python prepare_data.py planted                          # synthetic: documents of known plans, with exact oracle
    python prepare_data.py arxiv --input=papers.jsonl --out_dir=data/arxiv     # labelled documents, any source
    python prepare_data.py arxiv                            # the same from the hub (pip install datasets)
    python prepare_data.py ergodic                          # synthetic: hidden Markov components with exact oracles
    python prepare_data.py state                            # synthetic: cell populations of known perturbation effects
    python prepare_data.py state preprocess --input=counts.h5ad     # counts of cells to log1p and X_hvg
    python prepare_data.py state toml --input=FILE.h5ad     # a first TOML of cells that are log1p already
    python prepare_data.py cells --toml=my.toml             # make cells ready for train_state.py, which else does it
    python prepare_data.py inspect data/arxiv/train.h5      # what is in a file, and what is wrong with it
    python prepare_data.py import FILE --out_dir=out/x      # a checkpoint of a source system to ours
    python prepare_data.py arxiv --help                     # the settings of a job

Files are written beside their final place and renamed at the end: what exists is complete. N chunks, n tokens of a
chunk, K components; in `planted` N documents of D tokens, K plans, S states, V tokens, chunks of C tokens.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import DataError, clear_errors  # isort: skip

import importlib
import re
import shutil
import sys
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Annotated, Literal

from common import checkpoint, store
from common.runlog import write_json
from configurator import (
    MOST,
    Count,
    NonNegative,
    Positive,
    Probability,
    Range,
    Share,
    Whole,
    config_dict,
    configure,
    fail,
)
from sources import foreign_checkpoints
from sources.cells import inspect as inspect_experiment
from sources.cells import load_features, prepare_cells
from sources.chunks import inspect_chunks, inspect_folder, prepare_chunks, split_files
from sources.contents import holds_cells, holds_store, inspect_cells, inspect_store
from sources.ergodic import COMPONENTS, ergodic
from sources.foreign_apelr import untold
from sources.foreign_arxiv import training_state
from sources.papers import cut_papers, holds_papers
from sources.planted import planted
from sources.populations import synthetic
from sources.preprocess import preprocess
from sources.shared import closest, counted, suggest
from sources.starter import write_starter
from sources.streams import inspect_stream
from sources.text import prepare_text
from sources.tokenizer import HALF_BYTES, SPECIAL


def at_least(least: int):
    """The annotation of a number that a job needs more than one of."""
    return Annotated[int, Range(f"int >= {least}", f"must be at least {least}, and at most 10**12",
                                lambda value: least <= value <= MOST)]


Part = Annotated[float, Range("float in (0, 1)", "must lie between 0 and 1", lambda value: 0 < value < 1)]

# ---------------------------------------------------------------------------------------------------------------
# Settings of the jobs
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class ArxivConfig:
    # input
    input: str = "ccdv/arxiv-classification"  # hub data set; .jsonl .json .csv .parquet; folder, also of CATEGORY/*.txt
    hub_config: str = "no_ref"  # configuration of the hub data set
    text_column: str = "text"
    label_column: str = ""  # default: category if there is such a column, else label
    several_labels: Literal["first", "any"] = "first"  # of a document: which counts; any: the first in categories
    split_column: str = "split"  # train, validation or test; where missing, documents are dealt by their text
    categories: list[str] | None = None  # default: all there are; five of ccdv's
    max_documents: Count | None = None  # most documents of a category and split
    validation_fraction: Part = 0.05  # of documents without a split
    test_fraction: Share = 0.05
    # tokens
    tokenizer: str = "bpe"  # bpe: train one | gpt2 | path of a tokenizer.json
    vocab_size: int = 8_192  # of a trained tokenizer
    tokenizer_chars: Count = 20_000_000  # most characters to train it on, the same number of each category
    chunk_size: at_least(2) = 100  # tokens: one to read and one to predict
    # output
    out_dir: str = "data/arxiv"
    # system
    seed: int = 1337  # deals documents to splits
    threads: Whole = 0  # of encoding; 0: one a core

    def check(self) -> list[str]:
        wrong = []
        if self.validation_fraction + self.test_fraction >= 1:
            wrong.append("validation_fraction and test_fraction must leave something to train on")
        if self.several_labels == "any" and self.categories is None:
            wrong.append("several_labels = any takes the first label that categories names: name them")
        if self.categories is not None and (not self.categories or len(set(self.categories)) != len(self.categories)):
            wrong.append(f"categories = {self.categories}: name at least one, and each once")
        return wrong


@dataclass
class TextConfig:
    # input
    input: str = ""  # default: the documentation in Python itself; .txt .json .jsonl .csv .parquet; folder; hub name
    text_column: str = "text"
    max_bytes: Count | None = None  # of text, UTF-8; default: 1e9 from the hub, else no limit
    max_documents: Count | None = None
    val_fraction: Part = 0.05  # of documents, dealt by their text; of the limits for validation text of its own
    val_input: str = ""  # validation text of its own, as input; default: the hub's validation split if it has one
    min_chars: Whole = 0  # documents with fewer characters, blanks around them aside, are left out
    max_tokens: Count | None = None  # of training; the document that goes beyond is the first to be left out
    max_val_tokens: Count | None = None  # of validation
    # tokens
    tokenizer: str = "bpe"  # bpe, char: train one | gpt2 | path of a tokenizer.json that has an eos
    vocab_size: int | None = None  # of a trained one, 4 or 20 special tokens among them; default: bpe 4,096, char all
    min_frequency: Count = 1  # char: how often a character occurs that gets a token; others are spelled in half bytes
    lowercase: bool = False  # char, bpe, gpt2
    tokenizer_chars: Count = 20_000_000  # most characters to train it on, of documents all over the text
    # output
    out_dir: str = "data/text"
    # system
    seed: int = 1337  # deals documents to the splits
    threads: Whole = 0  # of encoding; 0: one a core

    def check(self) -> list[str]:
        wrong = []
        if self.min_frequency > 1 and self.tokenizer != "char":
            wrong.append(f"min_frequency = {self.min_frequency} is for tokenizer=char: set vocab_size instead")
        if self.lowercase and self.tokenizer not in ("char", "bpe", "gpt2"):
            wrong.append(f"lowercase: {self.tokenizer} says itself whether it reads lower case")
        if self.vocab_size is not None:
            smallest = {"char": len(SPECIAL) + HALF_BYTES + 1, "bpe": len(SPECIAL) + 256}
            if self.tokenizer not in smallest:
                wrong.append(f"vocab_size = {self.vocab_size} is of a trained tokenizer; {self.tokenizer} has its own")
            elif self.vocab_size < smallest[self.tokenizer]:
                wrong.append(f"vocab_size = {self.vocab_size}: {self.tokenizer} needs at least "
                             f"{smallest[self.tokenizer]}, special tokens too")
        return wrong


@dataclass
class ErgodicConfig:
    # components
    components: list[dict] = field(default_factory=lambda: list(COMPONENTS))  # processes of train_ghmm.py, their tokens
    # documents
    train_documents: Count = 10_000  # of each component
    validation_documents: Count = 1_000
    test_documents: Whole | None = None  # default validation_documents; 0 writes no test.h5
    chunks_per_document: Count = 2
    chunk_size: Count = 100  # tokens
    # output
    out_dir: str = "data/ergodic"
    # system
    seed: int = 1337


@dataclass
class PlantedConfig:
    # plans
    num_plans: Count = 4  # K
    num_states: Count = 3  # S, hidden states of a plan's own process inside a chunk
    vocab_size: at_least(2) = 32  # V; bos comes after them, with id V
    self_transition: Probability = 0.6  # probability that the next chunk keeps the plan; the others share the rest
    transition_matrix: list[list[float]] | None = None  # [K][K], in place of self_transition
    plan_sharpness: NonNegative = 1.5  # logit by which a plan prefers its half of the tokens
    state_sharpness: NonNegative = 2.0  # standard deviation of the logits by which a state differs from its plan
    state_persistence: Probability = 0.8  # probability that a state stays
    # documents
    version: Literal["v2_planner_required", "v1_filtered_mixture"] = "v2_planner_required"  # v2: bos is in chunk 0
    chunk_size: at_least(2) = 16  # C, tokens
    document_chunks: Count = 8
    train_documents: Count = 20_000
    validation_documents: Count = 1_000
    # output
    out_dir: str = "data/planted"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        K, matrix = self.num_plans, self.transition_matrix
        if matrix is None:
            return []
        square = len(matrix) == K and all(len(row) == K for row in matrix)
        if square and all(min(row) >= 0 and abs(sum(row) - 1) <= 1e-6 for row in matrix):
            return []
        return [f"transition_matrix: needs {K} rows of {K} probabilities that sum to 1"]


@dataclass
class StateConfig:
    # job
    action: Literal["synthetic", "preprocess", "toml"] = "synthetic"  # also a bare word: state toml --input=FILE.h5ad
    # preprocess; toml, the starter TOML that preprocess writes too, takes input and the columns
    input: str = ""  # an h5ad file of any anndata; its obs, var and obsm are kept
    layer: str = ""  # the matrix with the counts; default: X
    output: str = ""  # the file to write; default: OUT_DIR/NAME OF THE INPUT
    target_sum: Positive = 1e4  # counts a cell after normalisation, before log(1 + x)
    num_hvgs: Count = 2_000  # most variable genes, for obsm X_hvg
    drop_empty: bool = False  # leave cells without any count out
    drop_unlabelled: bool = False  # leave cells without a value in the columns below out
    keep_counts: bool = False  # as layers/counts
    pert_col: str = ""  # obs columns that must be there, with a value for every cell; default: as they are found
    cell_type_key: str = ""
    batch_col: str = ""
    control_pert: str = ""  # a value that pert_col (default: gene) must have
    # synthetic
    num_cell_types: at_least(4) = 16  # c0, c1, ...; the last is for zero-shot prediction, the one before for few-shot
    num_perturbations: at_least(2) = 12  # p0, p1, ... and non-targeting
    num_genes: at_least(20) = 200
    num_batches: Count = 4
    cells_per_condition: at_least(2) = 40  # of a cell type and perturbation
    controls_per_cell_type: at_least(2) = 160
    depth: Positive = 5_000.0  # median counts of a cell
    dropout: Share = 0.2  # probability that a gene is lost in a cell where its expected count is 1; at r: dropout**r
    effect: Positive = 0.7  # standard deviation of a perturbation's effects on log expression
    # output
    out_dir: str = "data/state"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        missing = self.action != "synthetic" and not self.input
        return [f"{self.action} needs cells: --input=FILE.h5ad"] if missing else []


@dataclass
class CellsConfig:
    """Settings of train_state.py: with the same ones there, its start finds the cells ready."""

    toml: str = ""  # which cells train, validate and test
    pert_col: str = "gene"  # column of obs: the perturbation
    cell_type_key: str = "cell_type"  # column of obs: the cell type
    batch_col: str | None = "gem_group"  # column of obs: the experimental batch; empty: all cells are of one
    control_pert: str = "non-targeting"  # the perturbation that is none
    embed_key: str | None = "X_hvg"  # matrix of obsm that cells are read from; none: X
    output_space: Literal["gene", "all", "embedding"] = "gene"  # gene: X_hvg | all: every gene of X | embedding
    counts: Literal["auto", "log1p", "counts", "convert"] = "auto"  # what X is; convert: counts to log1p(1e4 a cell)
    drop_unlabelled: bool = False  # leave cells without cell type, perturbation or batch out
    strict: bool = True  # false: where the source has a trap, do as it does and warn
    ram_budget_gb: Positive = 8.0  # bounds the blocks that are read
    folder: str = "data/cells"  # where train_state.py looks

    def check(self) -> list[str]:
        return [] if self.toml else ["cells needs the TOML of your data: --toml=my.toml"]


@dataclass
class InspectConfig:
    tokens: Count = 20  # most frequent tokens to show
    # of an experiment's .toml: settings of train_state.py
    pert_col: str = "gene"
    cell_type_key: str = "cell_type"
    batch_col: str | None = "gem_group"
    control_pert: str = "non-targeting"
    drop_unlabelled: bool = False
    strict: bool = True
    zeroshot_controls: bool = True
    val_fraction: float = 0.1


@dataclass
class ImportConfig:
    out_dir: str = ""  # run folder to write; default: out/NAME OF THE FILE
    source_attention: Literal["auto", "bidirectional", "causal", "rotary"] = "auto"  # of a .ckpt, see train_state.py


# ---------------------------------------------------------------------------------------------------------------
# Jobs that dispatch
# ---------------------------------------------------------------------------------------------------------------
ACTIONS = {"synthetic": synthetic, "preprocess": preprocess, "toml": write_starter}  # of the job `state`


def state(action: str, **settings) -> dict:
    """Synthetic cells, or counts to expression."""
    work = ACTIONS[action]
    return work(**{name: settings[name] for name in signature(work).parameters})


def arxiv(**settings) -> dict:
    """Labelled documents, or those that the source's fetch_arxiv.py has made tokens, to chunks."""
    work = cut_papers if holds_papers(settings["input"]) else prepare_chunks
    return work(**{name: settings[name] for name in signature(work).parameters})


def inspect(path: str, tokens: int = 20, **columns) -> dict:
    """Print what a file, folder or experiment on cells holds (HDF5 chunks, train.bin, cells), and its faults."""
    file = Path(path)
    if file.suffix == ".toml":
        return inspect_experiment(path, **columns)
    if file.suffix == ".h5ad" or holds_cells(path):
        return inspect_cells(path)
    if holds_store(file):
        return inspect_store(file)
    if file.is_dir() and split_files(file):
        return inspect_folder(file, tokens)
    if file.is_dir():
        return inspect_stream(file, tokens)
    if file.suffix in (".bin", ".json"):
        return inspect_stream(file.parent, tokens)
    return inspect_chunks(path, tokens)


def check_features(path: str | None, width: int) -> None:
    """Raises DataError where the vectors of perturbations that an imported run would take along are no use to it."""
    vectors = load_features(path) if path else {}
    found = len(next(iter(vectors.values()), range(width)))
    if found != width:
        raise DataError(f"{path} has vectors of {found} numbers, where this checkpoint reads {width}")


def features_beside(file: Path, cfg, extra: dict, folder: Path) -> None:
    """For an imported run of train_state.py: what its perturbations mean."""
    if cfg.perturbation_features_file:
        features = shutil.copyfile(cfg.perturbation_features_file, folder / "pert_onehot_map.pt")
        cfg.perturbation_features_file = str(features)


def tokenizer_beside(file: Path, cfg, extra: dict, folder: Path) -> None:
    """For an imported run of train_apelr.py: the tokenizer whose hash is in `extra`."""
    if untold(file):
        print(untold(file))
    known = extra.pop("tokenizer_file", None)
    if known:
        shutil.copyfile(known, folder / "tokenizer.json")
    else:
        print(f"note: there is no tokenizer.json beside {file}: prompts and samples will be token ids")


def vocabulary_beside(file: Path, cfg, extra: dict, folder: Path) -> None:
    """For an imported run of train_arxiv.py: the tokenizer, where there is one."""
    if "tokenizer_file" in extra:
        shutil.copyfile(extra.pop("tokenizer_file"), folder / "tokenizer.json")


TUNED = "python train_{page}.py --init_from={run} {data} --out_dir=out/tuned"
# By page: what puts beside an imported run what it needs, and the commands that may follow.
IMPORTS = {
    "apelr": (tokenizer_beside, ["python sample.py {run}", TUNED]),
    "arxiv": (vocabulary_beside, ["python sample.py {run}", "python train_arxiv.py --analyze={run} {data}"]),
    "ghmm": (None, ["python sample.py {run}", "python train_ghmm.py --analyze={run}"]),
    "state": (features_beside, ["python sample.py {run} {data}", TUNED]),
}
GO_ON = "python train_arxiv.py {run}/config.json --resume={run}/last.pt {data} --out_dir=out/on"


def load_foreign(page, system: str, file: Path, source_attention: str) -> tuple:
    """(settings, model, steps done, `extra` of a checkpoint) of a checkpoint of a source, as a page reads it."""
    if system == "ghmm":
        cfg, process, model, step = page.load_run(file)
        return cfg, model, step, {"data": page.data_of(cfg, process)}
    if system == "state":
        run = page.load_run(file, attention=source_attention)
        check_features(run[0].perturbation_features_file, run[3]["dims"]["pert_dim"])
        return run
    return page.load_run(file)


def import_run(path: str, out_dir: str = "", source_attention: str = "auto") -> dict:
    """A checkpoint of a source system as a run of ours, by the function that init_from and sample.py read it with."""
    file = foreign_checkpoints.checkpoint_in(path)
    name = Path(path).name if Path(path).is_dir() else file.stem
    folder = store.on_disk(out_dir or f"out/{name}")
    system = foreign_checkpoints.importable(file)
    if (folder / "last.pt").exists():
        raise DataError(f"{folder} holds a run: use another out_dir")
    if file.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder} holds what is to be imported: name another folder, --out_dir=out/x")
    page = importlib.import_module(f"train_{system}")
    cfg, model, step, extra = load_foreign(page, system, file, source_attention)
    folder.mkdir(parents=True, exist_ok=True)
    cfg.out_dir = str(folder)
    put_beside, commands = IMPORTS[system]
    if put_beside:
        put_beside(file, cfg, extra, folder)
    config = config_dict(cfg)
    write_json(folder / "config.json", config)
    state = checkpoint.weights_alone(page.__file__, config, step, model, extra)
    if system == "arxiv":
        with foreign_checkpoints.converting(file, system):
            training = training_state(file, model, page.parameter_groups(model, cfg))
        extra |= training.pop("patience", {})
        state |= training
        commands = commands + [GO_ON] if state["optimizer"] else commands
    checkpoint.save(state, folder, is_best=True)
    count = sum(p.numel() for p in model.parameters())
    print(f"{file}: {count:,} parameters after {counted(step, 'step')}, written to {folder}")
    data = "--toml=my.toml" if system == "state" else "--data=FOLDER"
    for command in commands:
        print(" ", command.format(page=system, run=folder, data=data))
    return {"experiment": system, "step": step, "parameters": count, "out_dir": str(folder)}


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------
JOBS = {
    "text": (TextConfig, prepare_text),
    "planted": (PlantedConfig, planted),
    "arxiv": (ArxivConfig, arxiv),
    "ergodic": (ErgodicConfig, ergodic),
    "state": (StateConfig, state),
    "cells": (CellsConfig, prepare_cells),
    "inspect": (InspectConfig, inspect),
    "import": (ImportConfig, import_run),
}
ALIASES = {  # names of the sources
    "state": {"adata": "input"},
    "cells": {"toml_config_path": "toml"},
    "arxiv": {"output_dir": "out_dir", **dict.fromkeys(("full_dataset", "raw_cache_dir", "dataset", "model",
                                                        "tokenization_batch_size", "target_split"))},
}
EXAMPLES = {  # of the jobs whose first argument is a file
    "inspect": "data/arxiv/train.h5, or FILE.h5ad, FILE.toml, data/cells/NAME-HASH",
    "import": "FILE.pt --out_dir=out/x",
}


def bare_action(words: list[str]) -> list[str]:
    """The words after `state`, of which the first may be its action, as a whole command."""
    action, *rest = words
    actions = [*ACTIONS, "inspect"]
    if action not in actions:
        fail(f"no action {action!r} of state{suggest(action, actions)}")
    return ["inspect", *rest] if action == "inspect" else ["state", f"--action={action}", *rest]


def main(argv: list[str] | None = None) -> dict:
    with clear_errors():
        return prepare(list(sys.argv[1:] if argv is None else argv))


def prepare(argv: list[str]) -> dict:
    """The words of a command line -> what the job returns."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if argv else 2)
    if argv[0] == "state" and argv[1:] and re.fullmatch(r"\w+", argv[1]):
        argv = bare_action(argv[1:])
    job, *words = argv
    if job == "arxiv" and any(word.startswith(("--download_from_s3", "--upload_to_s3")) for word in words):
        fail("arxiv: folders in S3 are copied first: aws s3 cp --recursive s3://BUCKET/PREFIX data/papers, then python "
             "prepare_data.py arxiv --input=data/papers")
    if job not in JOBS:
        fail(f"no job {job!r}{closest(job, JOBS)} Jobs: {', '.join(JOBS)}")
    files = []
    if job in EXAMPLES and not {"-h", "--help"} & set(words):
        files = [word for word in words if not word.startswith("-")][:1]
        if not files:
            fail(f"{job} needs a file: python prepare_data.py {job} {EXAMPLES[job]}")
        words.remove(files[0])
    settings, work = JOBS[job]
    cfg = configure(settings, words, ALIASES.get(job))
    return work(*files, **vars(cfg))


if __name__ == "__main__":
    main()
