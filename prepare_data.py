"""Turn raw sources into training files: the first argument is the job, the rest are its settings.

    python prepare_data.py text --input=stories/                 # for train_apelr.py
    python prepare_data.py arxiv --input=papers.jsonl            # for train_arxiv.py
    python prepare_data.py state preprocess --input=counts.h5ad  # for train_state.py
    python prepare_data.py inspect data/papers                   # what is in it, what is wrong
    python prepare_data.py arxiv --help                          # what a job reads and writes

Each job says at its end what it made, and the command that trains on it. Files are written beside
their final place and renamed at the end: what exists is complete.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import DataError, clear_errors  # isort: skip

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from common.telling import begin, doing
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
    help_text,
    print_text,
)
from sources.files import KINDS, PACKED, kind_of
from sources.planted import planted
from sources.shared import closest, counted, suggest
from sources.tokenizer import HALF_BYTES, SPECIAL

# What brings torch, HDF5 or scipy is imported by the job that needs it: the first line does not wait for it.


def at_least(least: int):
    """The annotation of a number that a job needs more than one of."""
    return Annotated[int, Range(f"int >= {least}", f"must be at least {least}, and at most 10**12",
                                lambda value: least <= value <= MOST)]


Part = Annotated[float, Range("float in (0, 1)", "must lie between 0 and 1", lambda value: 0 < value < 1)]

# ---------------------------------------------------------------------------------------------------------------
# Settings of the jobs
# ---------------------------------------------------------------------------------------------------------------


def folder_for(source: str, default: str) -> str:
    """data/NAME for a source of the user's own: `default` is what a page makes for itself, or trains on unasked."""
    if not source:
        return default
    name = Path(source).name
    while Path(name).suffix.lower() in (*KINDS, *PACKED):
        name = Path(name).stem
    folder = Path("data") / (re.sub(r"[^\w.-]+", "_", name) or "text")
    return f"{folder}_tokens" if folder.resolve() == Path(source).resolve() else str(folder)


@dataclass
class ArxivConfig:
    """Labelled documents of any source -> chunks of tokens, for train_arxiv.py.

        python prepare_data.py arxiv --input=papers.jsonl             # 22,000 abstracts (25 MB): 5 s on two cores
        python prepare_data.py arxiv --input=papers.csv --categories=cs.DS,math.ST --chunk_size=64
        python prepare_data.py arxiv --input=FOLDER                   # of CATEGORY/*.txt, .jsonl, .csv, .parquet, .json
        python prepare_data.py arxiv                                  # ccdv/arxiv-classification (pip install datasets)

    Reads a text and a label of each document: columns text (else title and abstract) and category, label or categories,
    in upper case too; other names by text_column and label_column. All categories there are become the K components.
    Documents that name no split are dealt by their text; each is cut into chunks, and its tail, which fills none, is
    dropped. Writes train.h5, validation.h5, test.h5 and tokenizer.json into out_dir.

    Next: python train_arxiv.py --data=data/papers
    """

    # input
    input: str = "ccdv/arxiv-classification"  # hub data set; .jsonl .json .csv .parquet; folder, also of CATEGORY/*.txt
    hub_config: str = "no_ref"  # configuration of the hub data set
    text_column: str = "text"  # where there is none: title and abstract
    label_column: str = ""  # default: category, label, categories, labels, class or topic, the first that there is
    several_labels: Literal["first", "any"] = "first"  # of a document: which counts; any: the first in categories
    split_column: str = "split"  # train, validation or test; where missing, documents are dealt by their text
    categories: list[str] | None = None  # default: all there are; five of ccdv's
    max_documents: Count | None = None  # most documents of a category and split
    validation_fraction: Part = 0.05  # of documents without a split
    test_fraction: Share = 0.05
    # tokens
    tokenizer: str = "bpe"  # bpe: train one | gpt2 | path of a tokenizer.json
    vocab_size: int | None = None  # of a trained one; default: one for 1,000 characters, 512 to 8,192, a power of two
    tokenizer_chars: Count = 20_000_000  # most characters to train it on, the same number of each category
    chunk_size: at_least(2) = 100  # tokens: one to read and one to predict
    # output
    out_dir: str = ""  # default: data/NAME OF THE INPUT; of ccdv's data set data/arxiv
    # system
    seed: int = 1337  # deals documents to splits
    threads: Whole = 0  # of encoding; 0: one a core

    def __post_init__(self):
        own = "" if self.input == "ccdv/arxiv-classification" else self.input
        self.out_dir = self.out_dir or folder_for(own, "data/arxiv")

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
    """Plain text -> two streams of tokens, for train_apelr.py.

        python prepare_data.py text --input=stories/                  # all text files below a folder (2 MB: 2 s)
        python prepare_data.py text --input=book.txt --tokenizer=char --val_fraction=0.1
        python prepare_data.py text --input=tinystories               # a name on the hub (pip install datasets)
        python prepare_data.py text                                   # the documentation in Python itself: 5 s

    Reads .txt, .jsonl, .json, .csv and .parquet, packed or not; what it skips is counted. A .txt file is one document,
    but is cut at <|endoftext|> where it has that, and else, if it is longer than 2,000 bytes, at blank lines. Documents
    are dealt to training and validation by their text. Writes train.bin, val.bin, tokenizer.json and meta.json into
    out_dir.

    Next: python train_apelr.py --data=data/stories
    """

    # input
    input: str = ""  # default: the documentation in Python itself; .txt .json .jsonl .csv .parquet; folder; hub name
    text_column: str = "text"  # of .jsonl and tables; where there is none: title and abstract
    max_bytes: Count | None = None  # of text, UTF-8; default: 1e9 from the hub, else no limit
    max_documents: Count | None = None
    val_fraction: Part = 0.05  # of documents, dealt by their text; of the limits for validation text of its own
    val_input: str = ""  # validation text of its own, as input; default: the hub's validation split if it has one
    min_chars: Whole = 0  # documents with fewer characters, blanks around them aside, are left out
    whole_files: bool = False  # a .txt is one document, however long, whatever is in it
    max_tokens: Count | None = None  # of training; the document that goes beyond is the first to be left out
    max_val_tokens: Count | None = None  # of validation
    # tokens
    tokenizer: str = "bpe"  # bpe, char: train one | gpt2 | path of a tokenizer.json that has an eos
    vocab_size: int | None = None  # of a trained one, 4 or 20 special tokens among them; default: char all, bpe one for
    # ^ 1,000 characters, 512 to 4,096
    min_frequency: Count = 1  # char: how often a character occurs that gets a token; others are spelled in half bytes
    lowercase: bool = False  # char, bpe, gpt2
    tokenizer_chars: Count = 20_000_000  # most characters to train it on, of documents all over the text
    # output
    out_dir: str = ""  # default: data/NAME OF THE INPUT; without one data/text, the default of train_apelr.py
    # system
    seed: int = 1337  # deals documents to the splits
    threads: Whole = 0  # of encoding; 0: one a core

    def __post_init__(self):
        self.out_dir = self.out_dir or folder_for(self.input, "data/text")

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
    """Documents of K known hidden Markov components, with their optimum, for train_arxiv.py.

        python prepare_data.py ergodic                                # 4 components, 48,000 documents: 2 s
        python prepare_data.py ergodic --chunk_size=50 --train_documents=2000 --out_dir=data/short
        python prepare_data.py ergodic --components='[{"process": "mess3"}, {"process": "coin", "p": 0.9}]'

    A component is a process of train_ghmm.py with its parameters, a name and a vocab_map, the tokens that it emits.
    Writes train.h5, validation.h5 and test.h5 into out_dir; the last two hold the optimum of every subset.

    Next: python train_arxiv.py, which makes the default for itself
    """

    # components
    components: list[dict] | None = None  # processes of train_ghmm.py; default: four, see sources/ergodic.py
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
    """Documents of known plans, with the exact filter over them, for train_apelr.py.

        python prepare_data.py planted                                # 20,000 documents of 4 plans: 2 s
        python prepare_data.py planted --num_plans=8 --self_transition=0.9 --out_dir=data/planted8

    K plans, each a hidden Markov model of S states over V tokens, follow one another as a Markov chain, a chunk of C
    tokens each. Writes train.bin, val.bin, their true plans and the exact -log p of validation into out_dir.

    Next: python train_apelr.py config/planted.py
    """

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
    """Cells for train_state.py: synthetic ones, or counts of your own to expression.

        python prepare_data.py state preprocess --input=counts.h5ad --out_dir=data/mine     # counts to log1p and X_hvg
        python prepare_data.py state toml --input=FILE.h5ad           # a first TOML of cells that are log1p already
        python prepare_data.py state                                  # 10,240 synthetic cells of known effects: 3 s
        python prepare_data.py state inspect data/mine/my.toml        # what a TOML selects, before any training

    preprocess reads an h5ad file of any anndata and writes another, of log1p expression and its most variable genes,
    into out_dir, and a first TOML beside it. synthetic writes synthetic.h5ad, synthetic.toml and truth.npz.

    Next: python train_state.py, which makes the synthetic default for itself, or train_state.py --toml=FILE
    """

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
    control_pert: str = ""  # a value that pert_col must have, or gene where that is not named
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
        if self.action == "synthetic" and self.input:
            return [f"input = {self.input}: synthetic cells need none; for yours: state preprocess --input=FILE.h5ad, "
                    "or state toml --input=FILE.h5ad where they are log1p already"]
        missing = self.action != "synthetic" and not self.input
        return [f"{self.action} needs cells: --input=FILE.h5ad"] if missing else []


@dataclass
class CellsConfig:
    """The cells of a TOML, made ready for train_state.py, which else does so as it starts.

        python prepare_data.py cells --toml=my.toml                   # with the settings that train_state.py is to have

    Reads the h5ad files that the TOML names; writes data/cells/NAME-HASH, checked and sorted.

    Next: python train_state.py --toml=my.toml, with the same settings: its start finds the cells ready
    """

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
    """What is in a file or folder, and what is wrong with it.

        python prepare_data.py inspect data/papers                    # a folder that a job made
        python prepare_data.py inspect counts.h5ad                    # matrices, columns, whether these are counts
        python prepare_data.py inspect my.toml                        # cells of every split, type and perturbation

    Reads all of it, holds it against its checksums, looks for repeated chunks and those that are in two splits, and
    writes nothing.
    """

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
    """A checkpoint or run folder of a source system -> a run of ours.

        python prepare_data.py import theirs/checkpoint.pt --out_dir=out/x
        python prepare_data.py import runs/x                          # APEL-R, State, SmolState, Simplexity, ICL-arxiv

    Writes last.pt, best.pt and config.json into out_dir, and what the run needs beside them.

    Next: python sample.py out/x
    """

    out_dir: str = ""  # run folder to write; default: out/NAME OF THE FILE
    source_attention: Literal["auto", "bidirectional", "causal", "rotary"] = "auto"  # of a .ckpt, see train_state.py


# ---------------------------------------------------------------------------------------------------------------
# Jobs that dispatch
# ---------------------------------------------------------------------------------------------------------------
ACTIONS = {  # of the job `state`
    "synthetic": "sources.populations.synthetic",
    "preprocess": "sources.preprocess.preprocess",
    "toml": "sources.starter.write_starter",
}


def function(name: str) -> Callable:
    """That of a dotted name, whose module is imported now."""
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def call(name: str, settings: dict) -> dict:
    """What the function of a dotted name makes of those of the settings that it takes."""
    work = function(name)
    return work(**{name: settings[name] for name in signature(work).parameters})


def state(action: str, **settings) -> dict:
    """Synthetic cells, or counts to expression."""
    return call(ACTIONS[action], settings)


def arxiv(**settings) -> dict:
    """Labelled documents, or those that the source's fetch_arxiv.py has made tokens, to chunks."""
    is_tokens = function("sources.papers.holds_papers")(settings["input"])
    return call("sources.papers.cut_papers" if is_tokens else "sources.chunks.prepare_chunks", settings)


def inspect(path: str, tokens: int = 20, **columns) -> dict:
    """Print what a file, folder or experiment on cells holds (HDF5 chunks, train.bin, cells), and its faults."""
    from sources import cells, chunks, contents, streams

    file = Path(path)
    if file.suffix == ".toml":
        return cells.inspect(path, **columns)
    if not file.exists():
        near = closest(path, map(str, file.parent.glob("*"))) or ""
        raise DataError(f"{path}: no such file or folder{near}")
    if file.suffix == ".h5ad" or contents.holds_cells(path):
        return contents.inspect_cells(path)
    if contents.holds_store(file):
        return contents.inspect_store(file)
    if file.is_dir() and chunks.split_files(file):
        return chunks.inspect_folder(file, tokens)
    if file.is_dir() and not (file / "meta.json").exists() and any(file.glob("*.h5ad")):
        return {path.name: contents.inspect_cells(str(path)) for path in sorted(file.glob("*.h5ad"))}
    if (file / "last.pt").exists():
        raise DataError(f"{path} is a run, which its report.html shows; inspect reads data")
    if file.is_dir():
        return streams.inspect_stream(file, tokens)
    if file.suffix == ".bin" or file.name in ("meta.json", "tokenizer.json"):
        return streams.inspect_stream(file.parent, tokens)
    if kind_of(file):
        raise DataError(f"{path} is text, and inspect reads what is made of it: a folder of prepare_data.py, .h5, "
                        ".hdf5, .h5ad or .toml")
    return chunks.inspect_chunks(path, tokens)


def check_features(path: str | None, width: int) -> None:
    """Raises DataError where the vectors of perturbations that an imported run would take along are no use to it."""
    vectors = function("sources.cells.load_features")(path) if path else {}
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
    untold = function("sources.foreign_apelr.untold")(file)
    if untold:
        print(untold)
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
    from common import checkpoint, runlog, store
    from sources import foreign_checkpoints

    file = foreign_checkpoints.checkpoint_in(path)
    name = Path(path).name if Path(path).is_dir() else file.stem
    folder = store.on_disk(out_dir or f"out/{name}")
    system = foreign_checkpoints.importable(file)
    if (folder / "last.pt").exists():
        raise DataError(f"{folder} holds a run: use another out_dir")
    if file.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder} holds what is to be imported: name another folder, --out_dir=out/x")
    with doing(f"reading {file} for train_{system}.py"):
        page = importlib.import_module(f"train_{system}")
        cfg, model, step, extra = load_foreign(page, system, file, source_attention)
    folder.mkdir(parents=True, exist_ok=True)
    cfg.out_dir = str(folder)
    put_beside, commands = IMPORTS[system]
    if put_beside:
        put_beside(file, cfg, extra, folder)
    config = config_dict(cfg)
    runlog.write_json(folder / "config.json", config)
    state = checkpoint.weights_alone(page.__file__, config, step, model, extra)
    if system == "arxiv":
        with foreign_checkpoints.converting(file, system):
            groups = page.parameter_groups(model, cfg)
            training = function("sources.foreign_arxiv.training_state")(file, model, groups)
        extra |= training.pop("patience", {})
        state |= training
        commands = commands + [GO_ON] if state["optimizer"] else commands
    checkpoint.save(state, folder, is_best=True)
    count = sum(p.numel() for p in model.parameters())
    print(f"{file}: {count:,} parameters after {counted(step, 'step')}, written to {folder}")
    data = "--toml=my.toml" if system == "state" else "--data=FOLDER"
    told = [command.format(page=system, run=shlex.quote(str(folder)), data=data) for command in commands]
    # First what can be typed as it stands.
    ready = [command for command in told if data not in command]
    for word, command in zip(("next:", *[" " * 5] * len(ready)), ready, strict=False):
        print(word, command)
    waiting = [command for command in told if data in command]
    if waiting:
        print(f"{'and' if ready else 'next'}, with data of yours in the place of {data}:", *waiting, sep="\n      ")
    return {"experiment": system, "step": step, "parameters": count, "out_dir": str(folder)}


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------
class Job(NamedTuple):
    settings: type
    work: Callable
    makes: Callable[[Any], str]  # of its settings: what it makes of what, for the first line
    following: Callable[[Any, dict], list[str]]  # of its settings and its result: the commands that use it


UNASKED = {"apelr": "data/text", "arxiv": "data/ergodic", "state": "data/state"}  # what a page trains on by itself


def train_on(page: str, folder: str, *more: str, run: str = "", data: str = "--data={}") -> str:
    """The command that trains a page on what a job has put into a folder; run: what its own folder is called more."""
    if folder == UNASKED[page]:
        return shlex.join(["python", f"train_{page}.py", *more])
    words = [data.format(folder), *more, f"--out_dir=out/{Path(folder).name}{run}"]
    return shlex.join(["python", f"train_{page}.py", *words])


def after_text(cfg: TextConfig, meta: dict) -> list[str]:
    most = min(meta["train_tokens"], meta["val_tokens"]) - 1  # tokens that a window may predict
    return [train_on("apelr", cfg.out_dir, *([f"--seq_len={max(1, most)}"] if most < SEQ_LEN else []))]


def after_planted(cfg: PlantedConfig, meta: dict) -> list[str]:
    """The command of config/planted.py, with what of these documents is not as there."""
    usual = {"num_plan_states": (cfg.num_plans, 4), "chunk_size": (cfg.chunk_size, 16),
             "seq_len": (meta["document_length"] - 1, 127), "version": (cfg.version, "v2_planner_required"),
             "data": (cfg.out_dir, "data/planted"), "out_dir": (f"out/{Path(cfg.out_dir).name}", "out/planted")}
    words = [f"--{name}={value}" for name, (value, there) in usual.items() if value != there]
    return [shlex.join(["python", "train_apelr.py", "config/planted.py", *words])]


def after_chunks(cfg: ArxivConfig | ErgodicConfig, sizes: dict) -> list[str]:
    """A training on all components, on as much of each as the smallest has, and a study over their number."""
    chunks = sizes["train"].values()
    K = len(chunks)
    if K == 1:
        return [train_on("arxiv", cfg.out_dir)]
    everything = ["--budget=tokens", f"--budget_tokens={K * min(chunks) * cfg.chunk_size}"]
    if cfg.out_dir == UNASKED["arxiv"]:
        everything = []  # it is made for the page's own budget
    study = f"--study=nested:{','.join(powers(K))}"
    return [train_on("arxiv", cfg.out_dir, *everything), train_on("arxiv", cfg.out_dir, study, run="_study")]


def powers(K: int) -> list[str]:
    """1, 2, 4, ..., K."""
    return [*(str(2**i) for i in range((K - 1).bit_length())), str(K)]


def after_state(cfg: StateConfig, found: dict) -> list[str]:
    if cfg.action != "synthetic":
        return []  # which say it themselves
    return [train_on("state", cfg.out_dir, data="--toml={}/synthetic.toml")]


def after_cells(cfg: CellsConfig, found: dict) -> list[str]:
    plain = CellsConfig()
    words = [f"--{name}={'none' if value is None else value}" for name, value in vars(cfg).items()
             if name != "folder" and value != getattr(plain, name)]
    return [f"python train_state.py {shlex.join(words)}"]


SEQ_LEN = 128  # of train_apelr.py, unless it is asked for another
JOBS = {
    "text": Job(TextConfig, lambda **settings: call("sources.text.prepare_text", settings),
                lambda cfg: cfg.input or "the documentation in Python", after_text),
    "arxiv": Job(ArxivConfig, arxiv, lambda cfg: f"chunks of {cfg.chunk_size} tokens of {cfg.input}", after_chunks),
    "planted": Job(PlantedConfig, planted,
                   lambda cfg: f"{cfg.train_documents:,} documents of {counted(cfg.num_plans, 'plan')}", after_planted),
    "ergodic": Job(ErgodicConfig, lambda **settings: call("sources.ergodic.ergodic", settings),
                   lambda cfg: f"{cfg.train_documents:,} documents of each component", after_chunks),
    "state": Job(StateConfig, state, lambda cfg: f"{cfg.action} {cfg.input or f'cells of {cfg.num_cell_types} types'}",
                 after_state),
    "cells": Job(CellsConfig, lambda **settings: function("sources.cells.prepare_cells")(**settings),
                 lambda cfg: cfg.toml, after_cells),
    "inspect": Job(InspectConfig, inspect, lambda cfg: "", lambda cfg, found: []),
    "import": Job(ImportConfig, import_run, lambda cfg: "", lambda cfg, found: []),
}
ALIASES = {  # names of the sources
    "state": {"adata": "input"},
    "cells": {"toml_config_path": "toml"},
    "arxiv": {"output_dir": "out_dir", **dict.fromkeys(("full_dataset", "raw_cache_dir", "dataset", "model",
                                                        "tokenization_batch_size", "target_split"))},
}
INPUTS = ("text", "arxiv", "state")  # jobs whose input may be a bare word, the first
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


def bare_input(job: str, words: list[str]) -> list[str]:
    """The words of a job, of which the first may be its input: a bare word that is no file of settings."""
    if job not in INPUTS or not words or words[0].startswith("-") or "=" in words[0]:
        return words
    is_settings = words[0].endswith((".py", ".yaml", ".yml", ".json"))
    if words[0].endswith(".json") and Path(words[0]).is_file():
        is_settings = not function("sources.text.holds_documents")(Path(words[0]))
    return words if is_settings else [f"--input={words[0]}", *words[1:]]


def job_help(job: str) -> str:
    """What --help of a job prints: what it is for, how to call it, its settings."""
    first = "FILE" if job in EXAMPLES else "[INPUT]" if job in INPUTS else ""
    return help_text(JOBS[job].settings, f"prepare_data.py {job} {first}".strip())


def overview() -> str:
    """What --help prints: the script's docstring, and each job in a line."""
    lines = [f"  {job:<9} {settings.__doc__.splitlines()[0]}" for job, (settings, *_) in JOBS.items()]
    return "\n".join([__doc__.strip(), "", "jobs", *lines])


def main(argv: list[str] | None = None) -> dict:
    with clear_errors():
        return prepare(list(sys.argv[1:] if argv is None else argv))


def prepare(argv: list[str]) -> dict:
    """The words of a command line -> what the job returns."""
    if not argv or argv[0] in ("-h", "--help"):
        print_text(overview())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "state" and argv[1:] and re.fullmatch(r"\w+", argv[1]):
        argv = bare_action(argv[1:])
    job, *words = argv
    if job == "arxiv" and any(word.startswith(("--download_from_s3", "--upload_to_s3")) for word in words):
        fail("arxiv: folders in S3 are copied first: aws s3 cp --recursive s3://BUCKET/PREFIX data/papers, then python "
             "prepare_data.py arxiv --input=data/papers")
    if job not in JOBS:
        fail(f"no job {job!r}{closest(job, JOBS) or '.'} Jobs: {', '.join(JOBS)}")
    if {"-h", "--help"} & set(words):
        print_text(job_help(job))
        raise SystemExit(0)
    files = []
    if job in EXAMPLES:
        files = [word for word in words if not word.startswith("-")][:1]
        if not files:
            fail(f"{job} needs a file: python prepare_data.py {job} {EXAMPLES[job]}")
        words.remove(files[0])
    settings, work, makes, following = JOBS[job]
    cfg = configure(settings, bare_input(job, words), ALIASES.get(job))
    is_beside = getattr(cfg, "action", "") == "toml"  # its input
    place = "" if is_beside else getattr(cfg, "output", "") or getattr(cfg, "out_dir", "")
    begin(f"prepare_data {job}", *files or [makes(cfg)], place, file=sys.stdout)
    result = work(*files, **vars(cfg))
    for word, command in zip(("next:", " " * 5), following(cfg, result), strict=False):
        print(word, command)
    return result


if __name__ == "__main__":
    main()
