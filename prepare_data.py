"""Turn raw sources into training files. The first argument is the job, the rest are its typed settings.

    python prepare_data.py text                             # plain text: the documentation in Python itself
    python prepare_data.py text --input=tinystories         # the same from the hub, or --input=FILE or FOLDER
    python prepare_data.py planted                          # synthetic: documents of known plans, with exact oracle
    python prepare_data.py arxiv --input=papers.jsonl --out_dir=data/arxiv     # labelled documents, any source
    python prepare_data.py arxiv                            # the same from the hub (pip install datasets)
    python prepare_data.py ergodic                          # synthetic: hidden Markov components with exact oracles
    python prepare_data.py state                            # synthetic: cell populations of known perturbation effects
    python prepare_data.py state preprocess --input=counts.h5ad     # counts of cells to log1p and X_hvg
    python prepare_data.py cells --toml=my.toml             # make cells ready for train_state.py, which else does it
    python prepare_data.py inspect data/arxiv/train.h5      # what is in a file, and what is wrong with it
    python prepare_data.py arxiv --help                     # the settings of a job

Files are written beside their final place and renamed at the end: what exists is complete. N chunks, n tokens of a
chunk, K components; in `planted` N documents of D tokens, K plans, S states, V tokens, chunks of C tokens.
"""

import difflib
import re
import sys
from dataclasses import dataclass, field
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import clear_errors
from configurator import Positive, configure, fail
from sources.cells import inspect as inspect_experiment
from sources.cells import prepare_cells
from sources.chunks import arxiv, hashes, open_chunks
from sources.ergodic import ergodic
from sources.h5ad import holds_cells, inspect_cells
from sources.planted import planted
from sources.populations import synthetic
from sources.preprocess import preprocess
from sources.shared import report, suggest
from sources.text import inspect_stream, prepare_text
from sources.tokenizer import SPECIAL, load_tokenizer


@dataclass
class ArxivConfig:
    # input
    input: str = "ccdv/arxiv-classification"  # hub data set; .jsonl, .csv, .parquet; folder of these or CATEGORY/*.txt
    hub_config: str = "no_ref"  # configuration of the hub data set
    text_column: str = "text"
    label_column: str = ""  # default: category if there is such a column, else label
    split_column: str = "split"  # train, validation or test; where missing, documents are dealt by their text
    categories: list[str] = field(default_factory=lambda: ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"])
    max_documents: int | None = None  # most documents of a category and split
    validation_fraction: float = 0.05  # of documents without a split
    test_fraction: float = 0.05
    # tokens
    tokenizer: str = "bpe"  # bpe: train one | gpt2 | path of a tokenizer.json
    vocab_size: int = 8_192  # of a trained tokenizer
    tokenizer_chars: int = 20_000_000  # most characters to train it on, the same number of each category
    chunk_size: int = 100  # tokens
    # output
    out_dir: str = "data/arxiv"
    # system
    seed: int = 1337  # deals documents to splits
    threads: int = 0  # of encoding; 0: one a core

    def check(self) -> list[str]:
        counts = ("tokenizer_chars", "max_documents")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in counts
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        if self.chunk_size < 2:
            wrong.append(f"chunk_size = {self.chunk_size}: must be at least 2, a token to read and one to predict")
        if not 0 < self.validation_fraction < 1 or not 0 <= self.test_fraction < 1 - self.validation_fraction:
            wrong.append("validation_fraction and test_fraction must leave something to train on")
        if not self.categories or len(set(self.categories)) != len(self.categories):
            wrong.append(f"categories = {self.categories}: name at least one, and each once")
        return wrong


@dataclass
class TextConfig:
    # input
    input: str = ""  # default: the documentation in Python itself; .txt .json .jsonl .parquet .csv; folder; hub name
    text_column: str = "text"
    max_bytes: int | None = None  # of text, UTF-8; default: 1e9 from the hub, else no limit
    max_documents: int | None = None
    val_fraction: float = 0.05  # of documents, dealt by their text; of the limits for validation text of its own
    val_input: str = ""  # validation text of its own, as input; default: the hub's validation split if it has one
    # tokens
    tokenizer: str = "bpe"  # bpe, char: train one | gpt2 | path of a tokenizer.json that has an eos
    vocab_size: int | None = None  # of a trained one, 4 or 20 special tokens among them; default: bpe 4,096, char all
    min_frequency: int = 1  # char: how often a character occurs that gets a token; others are spelled in half bytes
    lowercase: bool = False  # char, bpe, gpt2
    tokenizer_chars: int = 20_000_000  # most characters to train it on, of documents all over the text
    # output
    out_dir: str = "data/text"
    # system
    seed: int = 1337  # deals documents to the splits
    threads: int = 0  # of encoding; 0: one a core

    def check(self) -> list[str]:
        counts = ("max_bytes", "max_documents", "min_frequency", "tokenizer_chars")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in counts
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        if not 0 < self.val_fraction < 1:
            wrong.append(f"val_fraction = {self.val_fraction}: must lie between 0 and 1")
        if self.min_frequency > 1 and self.tokenizer != "char":
            wrong.append(f"min_frequency = {self.min_frequency} is for tokenizer=char: set vocab_size instead")
        if self.vocab_size is not None and self.tokenizer not in ("char", "bpe"):
            wrong.append(f"vocab_size = {self.vocab_size} is of a trained tokenizer; {self.tokenizer} has its own")
        least = {"char": len(SPECIAL) + 16 + 1, "bpe": len(SPECIAL) + 256}.get(self.tokenizer, 0)
        if self.vocab_size is not None and self.vocab_size < least:
            wrong.append(f"vocab_size = {self.vocab_size}: {self.tokenizer} needs at least {least}, special tokens too")
        if self.lowercase and self.tokenizer not in ("char", "bpe", "gpt2"):
            wrong.append(f"lowercase: {self.tokenizer} says itself whether it reads lower case")
        return wrong


@dataclass
class ErgodicConfig:
    # components
    components: list[dict] = field(default_factory=lambda: [
        {"name": "sticky", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [0, 1, 2]},
        {"name": "restless", "process": "mess3", "x": 0.2, "a": 0.9, "vocab_map": [0, 1, 2]},
        {"name": "shifted", "process": "mess3", "x": 0.05, "a": 0.85, "vocab_map": [1, 2, 3]},
        {"name": "golden", "process": "no_consecutive_ones", "p": 0.5, "vocab_map": [0, 3]},
    ])  # hidden Markov processes of train_ghmm.py, with their tokens
    # documents
    train_documents: int = 10_000  # of each component
    validation_documents: int = 1_000
    test_documents: int = 0
    chunks_per_document: int = 2
    chunk_size: int = 100  # tokens
    # output
    out_dir: str = "data/ergodic"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        counts = ("train_documents", "validation_documents", "chunks_per_document", "chunk_size")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in counts if getattr(self, k) < 1]
        return wrong + ([f"test_documents = {self.test_documents}: must not be negative"] * (self.test_documents < 0))


@dataclass
class PlantedConfig:
    # plans
    num_plans: int = 4  # K
    num_states: int = 3  # S, hidden states of a plan's own process inside a chunk
    vocab_size: int = 32  # V; bos comes after them, with id V
    self_transition: float = 0.6  # probability that the next chunk keeps the plan; the others share the rest
    transition_matrix: list[list[float]] | None = None  # [K][K], in place of self_transition
    plan_sharpness: float = 1.5  # logit by which a plan prefers its half of the tokens
    state_sharpness: float = 2.0  # standard deviation of the logits by which a state differs from its plan
    state_persistence: float = 0.8  # probability that a state stays
    # documents
    version: Literal["v2_planner_required", "v1_filtered_mixture"] = "v2_planner_required"  # v2: bos is in chunk 0
    chunk_size: int = 16  # C, tokens
    document_chunks: int = 8
    train_documents: int = 20_000
    validation_documents: int = 1_000
    # output
    out_dir: str = "data/planted"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        least = {"num_plans": 1, "num_states": 1, "vocab_size": 2, "chunk_size": 2, "document_chunks": 1,
                 "train_documents": 1, "validation_documents": 1, "plan_sharpness": 0, "state_sharpness": 0}
        wrong = [f"{k} = {getattr(self, k)}: must be at least {n}" for k, n in least.items() if getattr(self, k) < n]
        wrong += [f"{k} = {getattr(self, k)}: must lie between 0 and 1" for k in (
            "self_transition", "state_persistence") if not 0 <= getattr(self, k) <= 1]
        K, rows = self.num_plans, self.transition_matrix
        if rows is not None and ([len(row) for row in rows] != [K] * K or any(
                min(row) < 0 or abs(sum(row) - 1) > 1e-6 for row in rows)):
            wrong.append(f"transition_matrix: needs {K} rows of {K} probabilities that sum to 1")
        return wrong


@dataclass
class StateConfig:
    # job
    action: Literal["synthetic", "preprocess"] = "synthetic"  # also a bare word: state preprocess --input=FILE.h5ad
    # preprocess
    input: str = ""  # an h5ad file of any anndata; its obs, var and obsm are kept
    layer: str = ""  # the matrix with the counts; default: X
    output: str = ""  # the file to write; default: OUT_DIR/NAME OF THE INPUT
    target_sum: float = 1e4  # counts a cell after normalisation, before log(1 + x)
    num_hvgs: int = 2_000  # most variable genes, for obsm X_hvg
    drop_empty: bool = False  # leave cells without any count out
    keep_counts: bool = False  # as layers/counts
    pert_col: str = ""  # obs columns that must be there, with a value for every cell
    cell_type_key: str = ""
    batch_col: str = ""
    control_pert: str = ""  # a value that pert_col (default: gene) must have
    # synthetic
    num_cell_types: int = 16  # c0, c1, ...; the last is for zero-shot prediction, of the one before some perturbations
    num_perturbations: int = 12  # p0, p1, ... and non-targeting
    num_genes: int = 200
    num_batches: int = 4
    cells_per_condition: int = 40  # of a cell type and perturbation
    controls_per_cell_type: int = 160
    depth: float = 5_000.0  # median counts of a cell
    dropout: float = 0.2  # probability that a gene is lost in a cell where its expected count is 1; at r: dropout**r
    effect: float = 0.7  # standard deviation of a perturbation's effects on log expression
    # output
    out_dir: str = "data/state"
    # system
    seed: int = 1337

    def check(self) -> list[str]:
        least = {"num_hvgs": 1, "num_cell_types": 4, "num_perturbations": 2, "num_genes": 20, "num_batches": 1,
                 "cells_per_condition": 2, "controls_per_cell_type": 2}
        wrong = [f"{k} = {getattr(self, k)}: must be at least {n}" for k, n in least.items() if getattr(self, k) < n]
        wrong += [f"{k} = {getattr(self, k)}: must be above 0" for k in ("target_sum", "depth", "effect")
                  if not 0 < getattr(self, k) < np.inf]
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout = {self.dropout}: must be at least 0 and below 1")
        if self.action == "preprocess" and not self.input:
            wrong.append("preprocess needs counts: --input=FILE.h5ad")
        return wrong


STATE_ALIASES = {"adata": "input"}  # the source's name
CELLS_ALIASES = {"toml_config_path": "toml"}


def state(**settings) -> dict:
    """The action of the job: synthetic cells, or counts to expression."""
    work = {"synthetic": synthetic, "preprocess": preprocess}[settings["action"]]
    return work(**{name: settings[name] for name in signature(work).parameters})


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
    strict: bool = True  # false: where the source has a trap, do as it does and warn
    ram_budget_gb: Positive = 8.0  # bounds the blocks that are read
    folder: str = "data/cells"  # where train_state.py looks

    def check(self) -> list[str]:
        return [] if self.toml else ["cells needs the TOML of your data: --toml=my.toml"]


@dataclass
class InspectConfig:
    tokens: int = 20  # most frequent tokens to show
    # of an experiment's .toml: settings of train_state.py
    pert_col: str = "gene"
    cell_type_key: str = "cell_type"
    batch_col: str | None = "gem_group"
    control_pert: str = "non-targeting"
    strict: bool = True
    zeroshot_controls: bool = True
    val_fraction: float = 0.1

    def check(self) -> list[str]:
        return [f"tokens = {self.tokens}: must be at least 1"] if self.tokens < 1 else []


def inspect(path: str, cfg: InspectConfig) -> dict:
    """Print what an HDF5 file, a folder of train.bin or an experiment on cells holds, and what is wrong with it."""
    if Path(path).suffix == ".toml":
        return inspect_experiment(path, **{k: v for k, v in vars(cfg).items() if k != "tokens"})
    if Path(path).suffix == ".h5ad" or holds_cells(path):
        return inspect_cells(path)
    if Path(path).is_dir() or Path(path).suffix in (".bin", ".json"):
        return inspect_stream(Path(path) if Path(path).is_dir() else Path(path).parent, cfg)
    file, names, codes = open_chunks(path)
    with file:
        tokens, documents = file["token_chunks"], file["doc_idx_for_chunk"][:]
        N, n = tokens.shape
        vocab_size = int(file.attrs.get("vocab_size", 0))
        counts, negative = np.zeros(max(vocab_size, 1), dtype=np.int64), 0
        for begin in range(0, N, 1 << 16):
            block = tokens[begin : begin + (1 << 16)].ravel().astype(np.int64)
            negative += int((block < 0).sum())
            found = np.bincount(block[block >= 0])
            if len(found) > len(counts):
                counts = np.pad(counts, (0, len(found) - len(counts)))
            counts[: len(found)] += found
        problems, prints = [], hashes(tokens)
        if not vocab_size:
            problems.append("no attribute vocab_size: ranges cannot be checked")
        elif len(counts) > vocab_size:
            problems.append(f"{counts[vocab_size:].sum():,} tokens are beyond vocab_size = {vocab_size}")
        if negative:
            problems.append(f"{negative:,} tokens are negative")
        if repeated := N - len(np.unique(prints)):
            problems.append(f"{repeated:,} chunks repeat an earlier one")
        for other in sorted(Path(path).parent.glob("*.h5")):
            if other.resolve() != Path(path).resolve():
                second, _, _ = open_chunks(other)
                with second:
                    if second["token_chunks"].shape[1] == n and (
                            shared := int(np.isin(prints, hashes(second["token_chunks"])).sum())):
                        problems.append(f"{shared:,} chunks are in {other.name} too: the splits leak")
        rows = [(name, int((codes == k).sum()), len(np.unique(documents[codes == k]))) for k, name in enumerate(names)]
        print(f"{path}: {N:,} chunks of {n} tokens, {N * n:,} tokens, vocabulary {vocab_size or 'unknown'}")
        for name, size, docs in rows:
            print(f"  {name:<16} {size:>10,} chunks {size * n:>12,} tokens {docs:>9,} documents")
        speller = Path(path).parent / (str(file.attrs.get("tokenizer", "")) or "none")
        spelled = load_tokenizer(speller) if speller.exists() else None
        top = counts.argsort()[::-1][: cfg.tokens]
        words = [f"{spelled.decode([t])!r}" if spelled and t < spelled.vocab_size else str(t) for t in top if counts[t]]
        print(f"  most frequent: {', '.join(words)} (the first is {counts.max() / N / n:.1%} of all)")
    report(problems)
    return {"chunks": {name: size for name, size, _ in rows}, "documents": {name: docs for name, _, docs in rows},
            "problems": problems}


JOBS = {"text": (TextConfig, prepare_text), "planted": (PlantedConfig, planted), "arxiv": (ArxivConfig, arxiv),
        "ergodic": (ErgodicConfig, ergodic), "state": (StateConfig, state), "cells": (CellsConfig, prepare_cells),
        "inspect": (InspectConfig, inspect)}


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if argv else 2)
    if argv[0] not in JOBS:
        near = difflib.get_close_matches(argv[0], JOBS, n=1)
        fail(f"no job {argv[0]!r}" + (f", did you mean {near[0]!r}?" if near else "") + f" Jobs: {', '.join(JOBS)}")
    if argv[0] == "state" and argv[1:] and re.fullmatch(r"\w+", argv[1]):  # the action as a bare word
        actions = ("synthetic", "preprocess", "inspect")
        if argv[1] not in actions:
            fail(f"no action {argv[1]!r} of state{suggest(argv[1], actions)}")
        argv = argv[1:] if argv[1] == "inspect" else ["state", f"--action={argv[1]}", *argv[2:]]
    settings, work = JOBS[argv[0]]
    positional = list(islice((a for a in argv[1:] if not a.startswith("-")), 1)) if argv[0] == "inspect" else []
    if argv[0] == "inspect" and not positional and "--help" not in argv and "-h" not in argv:
        fail("inspect needs a file: python prepare_data.py inspect data/arxiv/train.h5, or FILE.h5ad, or FILE.toml")
    aliases = {"state": STATE_ALIASES, "cells": CELLS_ALIASES}.get(argv[0])
    cfg = configure(settings, [a for a in argv[1:] if a not in positional], aliases)
    with clear_errors():
        return work(*positional, cfg) if work is inspect else work(**vars(cfg))


if __name__ == "__main__":
    main()
