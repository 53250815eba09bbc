"""Cells of an experiment, prepared: checked and converted once into a folder of arrays, which every run maps.

    data/cells/NAME-HASH/
        meta.json         the files, what the codes mean, genes, formats, bytes of everything below
        file.npy row.npy cell_type.npy perturbation.npy batch.npy    int32 [N], in the order of the files and their rows
        place.npy         int64 [N]: the row of each cell in the matrices below, which are sorted by file, cell type,
                          perturbation and batch, so that the cells of a sentence lie side by side
        input.npy         float32 [N, D]; of a sparse matrix input_data.npy, input_indices.npy, input_indptr.npy (CSR)
        counts*.npy       the same of what a gene decoder learns, if one does

HASH is of what the arrays are made from: the files of the TOML (path, size, time of change), the columns, the keys and
`counts`. All cells are stored, and who trains is worked out at every start (0.1 s a million cells): a change of
[zeroshot], of the seed or of val_fraction makes no second copy, and several TOMLs of the same files share one.

Reading, measured on 200,000 x 2,000: a map of the file is as fast as the matrix in memory, and ranks share its pages.
But a mapped page counts as resident, with up to 2 MB around it. So what exceeds ram_budget_gb is read instead, row by
row: a third of the speed, and no memory beyond the rows of a batch.
"""

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from tqdm import tqdm

from common.errors import DataError
from sources.h5ad import H5ad, Matrix, as_dense, looks_log1p, row_sums, stored
from sources.shared import suggest
from sources.splits import (
    SPLITS,
    Plan,
    assign_splits,
    check_controls,
    grouped,
    in_split,
    objection,
    read_toml,
)

VERSION = 1  # of the folder's layout
TARGET_SUM = 1e4  # molecules of a cell after normalisation
CODES = ("file", "row", "cell_type", "perturbation", "batch")


# ---------------------------------------------------------------------------------------------------------------
# What the files hold, without their expression
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Survey:
    """What the cells of some files are, and what the columns of their matrices mean."""

    codes: dict[str, np.ndarray]  # CODES -> int32 [N]
    cell_types: list[str]  # sorted; what the codes mean
    perturbations: list[str]
    batches: list[str]
    genes: list[str]  # columns of the input
    count_genes: list[str] | None  # columns of the counts
    gene_dim: int  # genes of X in the first file
    hvg_dim: int  # genes of its X_hvg
    differences: list[str]  # sentences about genes that not all files have
    orders: dict[str, list[np.ndarray | None]]  # input, counts -> for each file, its columns that make `genes`


def matrix_keys(embed_key: str | None, output_space: str) -> dict[str, str]:
    """Which matrices of an h5ad are read: "input", and "counts" where a decoder learns other genes than the input's."""
    keys = {"input": embed_key or "X"}
    learned = {"gene": "X_hvg", "all": "X"}.get(output_space)
    if learned and embed_key not in (None, learned):
        keys["counts"] = learned
    return keys


def survey_files(files: list[Path], columns: dict[str, str | None], keys: dict[str, str]) -> Survey:
    """Read what the cells of h5ad files are. columns: cell_type, perturbation, batch -> name of the obs column."""
    parts, tables, sizes = {name: [] for name in columns}, {which: [] for which in keys}, []
    gene_dim = hvg_dim = 0
    for path in files:
        with H5ad(path) as file:
            for name, column in columns.items():
                parts[name].append(file.column(column) if column else (np.zeros(file.n_obs, np.int32), ["all"]))
            for which, key in keys.items():
                tables[which].append(column_names(file, key))
            if not sizes:
                gene_dim = file.n_vars
                hvg_dim = file.matrix("X_hvg").shape[1] if "obsm/X_hvg" in file.keys else 0
            sizes.append(file.n_obs)

    codes = {"file": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
             "row": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])}
    meanings = {}
    for name, read in parts.items():
        meanings[name] = sorted({value for _, values in read for value in values})
        translated = [np.searchsorted(meanings[name], values).astype(np.int32)[own] for own, values in read]
        codes[name] = np.concatenate(translated)

    genes, orders, differences = {"counts": None}, {}, []
    for which, key in keys.items():
        genes[which], orders[which], notes = align(files, tables[which], key)
        differences += notes
    if keys["input"] == "X":
        gene_dim = len(genes["input"])
    return Survey(codes, meanings["cell_type"], meanings["perturbation"], meanings["batch"], genes["input"],
                  genes["counts"], gene_dim, hvg_dim, differences, orders)


def column_names(file: H5ad, key: str | None) -> np.ndarray | int:
    """Genes of the columns of a matrix; their number where the file does not tell, as of an embedding."""
    matrix = file.matrix(key)
    if not matrix.key.startswith("obsm/"):
        return file.gene_names
    if matrix.key == "obsm/X_hvg":
        chosen, names = file.frame("var").get("highly_variable"), file.file.get("uns/hvg_names")
        if chosen is not None and chosen.dtype == bool and chosen.sum() == matrix.shape[1]:
            return file.gene_names[chosen]
        if names is not None and len(names) == matrix.shape[1]:
            return np.array([name.decode() if isinstance(name, bytes) else str(name) for name in names[:]])
    return matrix.shape[1]


def align(files: list[Path], tables: list, key: str) -> tuple[list[str], list[np.ndarray | None], list[str]]:
    """(names of the columns, for each file the order that brings its columns there, what differs); None: as they are.

    Where the files have different genes, those that all have are used. Embeddings must be of one width.
    """
    as_they_are = [None] * len(files)
    if any(isinstance(names, int) for names in tables):
        widths = [names if isinstance(names, int) else len(names) for names in tables]
        for file, width in zip(files, widths, strict=True):
            if width != widths[0]:
                raise DataError(f"{key} has {widths[0]} columns in {files[0]} but {width} in {file}")
        return [f"{key}_{i}" for i in range(widths[0])], as_they_are, []
    if all(np.array_equal(names, tables[0]) for names in tables):
        return list(map(str, tables[0])), as_they_are, []

    places = [{str(name): i for i, name in enumerate(names)} for names in tables]
    differences = []
    for file, names, place in zip(files, tables, places, strict=True):
        if len(place) < len(names):
            raise DataError(f"{file} has genes of the same name and another order than {files[0]}: make the names "
                            "unique, so that the files can be aligned")
        odd = sorted(place.keys() ^ places[0].keys())
        if odd:
            differences.append(f"{file} and {files[0]} have different genes in {key}: {len(odd):,} are in one only, "
                               f"such as {odd[0]}; with strict=False those that all have are used")
    genes = [gene for gene in places[0] if all(gene in place for place in places)]
    if not genes:
        raise DataError(f"{files[0]} and the other files have no gene in common")
    orders = []
    for place in places:
        order = np.array([place[gene] for gene in genes])
        same = len(order) == len(place) and np.array_equal(order, np.arange(len(order)))
        orders.append(None if same else order)
    return genes, orders, differences


def load_features(path: str | Path) -> dict[str, torch.Tensor]:
    """Vectors float32 of one length by name, from a .pt or .npz dict. Raises DataError for anything else."""
    if not Path(path).is_file():
        raise DataError(f"{path} cannot be read: there is no such file (perturbation_features_file)")
    try:
        with open(path, "rb") as file:
            table = dict(np.load(file)) if str(path).endswith(".npz") else torch.load(file, "cpu", weights_only=True)
        vectors = {str(name): torch.as_tensor(vector, dtype=torch.float32) for name, vector in table.items()}
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
            zipfile.BadZipFile) as e:
        reason = (str(e).splitlines() or ["it is damaged"])[0]
        if isinstance(e, pickle.UnpicklingError):  # torch's own text is advice to run what is in there
            reason = "it is damaged, or holds other things than tensors (.npz takes arrays)"
        raise DataError(f"{path} cannot be read as a .pt or .npz dict name -> vector: {reason}") from e
    shapes = sorted({tuple(vector.shape) for vector in vectors.values()})
    if len(shapes) != 1 or len(shapes[0]) != 1 or not all(v.isfinite().all() for v in vectors.values()):
        raise DataError(f"{path} should hold finite vectors of one length; their shapes are {shapes}")
    return vectors


def read_features(path: str | Path, perturbations: list[str], control_pert: str, strict: bool) -> torch.Tensor:
    """[P, pert_dim] of a perturbation_features_file; zeros for the control if it has none."""
    vectors = load_features(path)
    missing = [name for name in perturbations if name not in vectors and name != control_pert]
    if missing:
        objection(strict, f"{path} has no vector for {len(missing)} perturbations, such as {missing[0]!r}"
                          f"{suggest(missing[0], vectors)}; with strict=False they are zeros, as the control")
    zero = torch.zeros_like(next(iter(vectors.values())))
    return torch.stack([vectors.get(name, zero) for name in perturbations])


# ---------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------
class Cells:
    """The cells of a TOML: what each is, its splits, and its expression.

    Attributes over the N cells, in the order of the files and of the rows in them: file, row, cell_type, perturbation,
    batch: codes int32 [N]; member uint8 [N], bit s for SPLITS[s]; is_control bool [N]. control: the code of
    control_pert. files, names (the data set of each file), cell_types, perturbations, batches, genes (columns of the
    input), count_genes (columns of the counts, or None): lists. features: [P, pert_dim], or None: one-hot.
    Dimensions as cell-load's var_dims: input_dim, output_dim, gene_dim, hvg_dim, pert_dim, batch_dim.
    streamed: the matrices exceed ram_budget_gb and are read from disk. toml: path.

    Raises DataError: no control cells in a file, cell types and perturbations of the TOML that are not there,
    perturbed cells without control cells of their type and file, files of different genes.
    """

    def __init__(self, plan: Plan, survey: Survey, *, pert_col: str, control_pert: str, embed_key: str | None,
                 strict: bool, zeroshot_controls: bool, val_fraction: float, seed: int,
                 perturbation_features_file: str | None):
        self.toml, self.files, self.names = plan.path, plan.files, plan.names
        for name in CODES:
            setattr(self, name, survey.codes[name])
        self.cell_types, self.perturbations, self.batches = survey.cell_types, survey.perturbations, survey.batches
        self.genes, self.count_genes = survey.genes, survey.count_genes
        self._find_controls(pert_col, control_pert)
        for difference in survey.differences:
            objection(strict, difference)

        self.features = None
        if perturbation_features_file:
            self.features = read_features(perturbation_features_file, self.perturbations, control_pert, strict)
        self.input_dim = self.output_dim = len(self.genes)
        self.gene_dim, self.hvg_dim = survey.gene_dim, survey.hvg_dim
        self.pert_dim = len(self.perturbations) if self.features is None else self.features.shape[1]
        self.batch_dim = len(self.batches)

        self.member = assign_splits(plan, self, strict, zeroshot_controls, val_fraction, seed)
        # An embedding may be zero, as that of no cell; expression of zeros is no cell.
        check_controls(self, self.member, strict or embed_key is None, pert_col)
        self.matrices, self.streamed = {}, False

    def open_matrices(self, store: Path, meta: dict, ram_budget_gb: float) -> None:
        """Map the matrices of a prepared folder, or what exceeds the budget: find it in its files."""
        self.store, self.place = store, load_codes(store, "place")
        files = [file for entry in meta["matrices"].values() for file in entry["files"]]
        self.streamed = sum(meta["sizes"][file] for file in files) > ram_budget_gb * 1e9
        for which, entry in meta["matrices"].items():
            kind = Sparse if entry["format"] == "csr" else Dense
            self.matrices[which] = kind(store, which, entry["columns"], held=not self.streamed)

    def _find_controls(self, pert_col: str, control_pert: str) -> None:
        self.control = -1
        if control_pert in self.perturbations:
            self.control = self.perturbations.index(control_pert)
        self.is_control = self.perturbation == self.control
        controls = np.bincount(self.file[self.is_control], minlength=len(self.files))
        for f, path in enumerate(self.files):
            if not controls[f]:
                known = [self.perturbations[p] for p in np.unique(self.perturbation[self.file == f])]
                raise DataError(f"{path} has no control cells: no cell has {pert_col} = {control_pert!r}"
                                f"{suggest(control_pert, known)}; set control_pert")

    @property
    def needs_counts(self) -> bool:
        """Whether a decoder has counts of genes to learn."""
        return self.count_genes is not None

    @property
    def perturbation_features(self) -> torch.Tensor:
        """[P, pert_dim] float32; one-hot without a perturbation_features_file."""
        return torch.eye(self.pert_dim) if self.features is None else self.features

    def dims(self) -> dict:
        """Sizes for a model, as cell-load's var_dims; decodes: a decoder has counts of genes to learn."""
        names = ("input_dim", "output_dim", "pert_dim", "batch_dim", "gene_dim", "hvg_dim")
        return {name: int(getattr(self, name)) for name in names} | {"decodes": self.needs_counts}

    def maps(self) -> dict:
        """What the codes, and the columns of cells, mean: lists of names."""
        return {
            "cell_types": list(self.cell_types),
            "perturbations": list(self.perturbations),
            "batches": list(self.batches),
            "genes": list(self.genes),
            "count_genes": list(self.count_genes) if self.needs_counts else None,
        }

    def rows(self, split: str, controls: bool) -> np.ndarray:
        """Cells of a split, ascending: the perturbed ones, and the controls that serve them if `controls`."""
        chosen = in_split(self.member, split)
        return np.flatnonzero(chosen if controls else chosen & ~self.is_control)

    def read(self, rows: np.ndarray, which: str = "input", device: torch.device | str = "cpu") -> torch.Tensor:
        """Expression of these cells, [n] -> [n, D] float32 on the device; which: "input" or "counts"."""
        return self.matrices[which].read(self.place[rows], torch.device(device))


def open_cells(*, toml: str | Path, pert_col: str = "gene", cell_type_key: str = "cell_type",
               batch_col: str | None = "gem_group", control_pert: str = "non-targeting",
               embed_key: str | None = "X_hvg", output_space: str = "gene", counts: str = "auto", strict: bool = True,
               zeroshot_controls: bool = True, val_fraction: float = 0.1, seed: int = 42,
               perturbation_features_file: str | None = None, ram_budget_gb: float = 8.0,
               folder: str | Path = "data/cells") -> Cells:
    """The cells that a TOML names; the settings are train_state.py's. Raises DataError.

    Where they are not prepared yet, or the files have changed since, this makes a folder of arrays in `folder`: the
    first rank of a machine does, the others wait.
    """
    plan = read_toml(toml, strict)
    columns = {"cell_type": cell_type_key, "perturbation": pert_col, "batch": batch_col}
    keys = matrix_keys(embed_key, output_space)
    settings = {
        "pert_col": pert_col,
        "control_pert": control_pert,
        "embed_key": embed_key,
        "strict": strict,
        "zeroshot_controls": zeroshot_controls,
        "val_fraction": val_fraction,
        "seed": seed,
        "perturbation_features_file": perturbation_features_file,
    }
    name = fingerprint(plan.files, columns, keys, counts)
    cells = None
    if not find_store(folder, name) and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        survey = survey_files(plan.files, columns, keys)
        cells = Cells(plan, survey, **settings)  # what is wrong with the TOML is said before anything is written
        make_store(Path(folder) / f"{plan.path.stem}-{name}",
                   lambda work: write_store(work, plan, survey, keys, counts, ram_budget_gb))
    store = wait_for_store(folder, name)
    meta = read_meta(store)
    if cells is None:
        cells = Cells(plan, stored_survey(store, meta), **settings)
    cells.open_matrices(store, meta, ram_budget_gb)
    return cells


def prepare_cells(*, toml: str = "", **settings) -> dict:
    """Make the cells of a TOML ready, as open_cells does at the first start; returns what they are and where."""
    cells = open_cells(toml=toml, **settings)
    size = sum(file.stat().st_size for file in cells.store.iterdir())
    print(f"{toml}: {len(cells.file):,} cells x {cells.input_dim:,} columns, {size / 1e9:.2f} GB, are ready in "
          f"{cells.store}")
    return {"folder": str(cells.store), "cells": len(cells.file), "columns": cells.input_dim, "bytes": size}


# ---------------------------------------------------------------------------------------------------------------
# Matrices of a prepared folder
# ---------------------------------------------------------------------------------------------------------------
class Stretches:
    """A .npy file that is read or written in stretches of elements: memory holds what is asked for, and no more."""

    def __init__(self, path: Path, mode: int = os.O_RDONLY):
        array = np.load(path, mmap_mode="r")
        self.path, self.dtype, self.offset = path, array.dtype, array.offset
        self.file = os.open(path, mode)
        weakref.finalize(self, os.close, self.file)

    def read(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The elements start ... start + length - 1 of every pair, one pair after another."""
        out = np.empty(int(lengths.sum()), self.dtype) if out is None else out
        self._transfer(os.preadv, starts, lengths, out)
        return out

    def write(self, starts: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> None:
        """Put values, one stretch after another, to their places."""
        self._transfer(os.pwritev, starts, lengths, np.ascontiguousarray(values, self.dtype))

    def _transfer(self, call: Callable, starts: np.ndarray, lengths: np.ndarray, array: np.ndarray) -> None:
        if not array.size:
            return
        buffer, size = memoryview(array).cast("B"), self.dtype.itemsize
        ends = np.cumsum(lengths)
        order = np.argsort(starts)  # as they lie in the file
        places = zip((size * (ends - lengths))[order].tolist(), (size * ends)[order].tolist(),
                     (self.offset + size * starts)[order].tolist(), strict=True)
        for start, end, at in places:
            if call(self.file, [buffer[start:end]], at) != end - start:
                raise DataError(f"{self.path} was changed, or its disk is full: delete {self.path.parent} to make it "
                                "anew")


class Dense:
    """Rows of float32 [N, D]; held: a map, whose pages all ranks share, else read row by row."""

    def __init__(self, store: Path, which: str, columns: int, held: bool):
        self.columns = columns
        path = store / f"{which}.npy"
        self.values = np.load(path, mmap_mode="r") if held else None
        self.stretches = None if held else Stretches(path)

    def read(self, places: np.ndarray, device: torch.device) -> torch.Tensor:
        rows = torch.empty(len(places), self.columns, pin_memory=device.type == "cuda")
        if self.values is not None:
            # one thread copies as fast as memory gives; clip: without a check the rows need no second copy
            np.take(self.values, places, 0, out=rows.numpy(), mode="clip")
        else:
            lengths = np.full(len(places), self.columns)
            self.stretches.read(places * self.columns, lengths, rows.numpy())
        return rows.to(device, non_blocking=True)


class Sparse:
    """Rows of a CSR matrix [N, D]; held: a map, whose pages all ranks share, else read row by row."""

    def __init__(self, store: Path, which: str, columns: int, held: bool):
        self.columns = columns
        parts = [store / f"{which}_{part}.npy" for part in ("data", "indices", "indptr")]
        self.indptr = np.load(parts[2], mmap_mode="r")
        # With more than 2^31 values indptr is of 64 bits, and scipy would copy indices to 64 bits too.
        self.held = held and self.indptr.dtype == np.int32
        if self.held:
            data, indices = (np.load(part, mmap_mode="r") for part in parts[:2])
            self.matrix = csr_array((data, indices, self.indptr), shape=(len(self.indptr) - 1, columns))
        else:
            self.data, self.indices = Stretches(parts[0]), Stretches(parts[1])

    def read(self, places: np.ndarray, device: torch.device) -> torch.Tensor:
        rows = self.matrix[places] if self.held else self._stream(places)
        if device.type == "cpu":
            return torch.from_numpy(rows.toarray())
        # A GPU gets the values alone, a tenth of the bytes, and fills in the zeros itself.
        where = torch.from_numpy(np.repeat(np.arange(len(places)) * self.columns, np.diff(rows.indptr)) + rows.indices)
        dense = torch.zeros(len(places) * self.columns, device=device)
        dense[where.to(device)] = torch.from_numpy(rows.data).to(device)
        return dense.view(-1, self.columns)

    def _stream(self, places: np.ndarray) -> csr_array:
        starts = self.indptr[places].astype(np.int64)
        lengths = self.indptr[places + 1] - starts
        pointers = np.append(0, lengths.cumsum()).astype(np.int32)
        data, indices = self.data.read(starts, lengths), self.indices.read(starts, lengths)
        return csr_array((data, indices, pointers), shape=(len(places), self.columns))


# ---------------------------------------------------------------------------------------------------------------
# The folder: found, made once, opened
# ---------------------------------------------------------------------------------------------------------------
def fingerprint(files: list[Path], columns: dict, keys: dict, counts: str) -> str:
    """Twelve digits that change with all that the arrays are made from."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([VERSION, stats, columns, keys, counts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def find_store(folder: str | Path, name: str) -> Path | None:
    """The folder of this fingerprint, whichever TOML it was made for."""
    return next(Path(folder).glob(f"*-{name}"), None)


def wait_for_store(folder: str | Path, name: str) -> Path:
    """The folder, once the first rank of the machine has made it; where that one fails, torchrun ends all."""
    while not (store := find_store(folder, name)):
        time.sleep(0.1)
    return store


def make_store(target: Path, write: Callable[[Path], None]) -> None:
    """write(work) fills a folder beside `target`, which takes that name at the end: it is complete or not there.

    Of several processes one writes, and the others wait. What a killed one left is cleared away by the next.
    """
    work, lock = target.with_name(f"{target.name}.making"), target.with_name(f"{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel lets go when its holder ends, however it ends
            if not target.exists():
                fill_and_rename(work, target, write)
            lock.unlink(missing_ok=True)  # who still waits for this one finds the folder
    except OSError as e:
        raise DataError(f"the prepared cells cannot be written to {target} ({e.strerror or e}): free some space, or "
                        "start where data/ can be written") from e


def fill_and_rename(work: Path, target: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        write(work)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_meta(store: Path) -> dict:
    """meta.json of a prepared folder whose files are all there and of their sizes. Raises DataError."""
    remedy = "delete this folder, and the next start makes it anew"
    try:
        meta = json.loads((store / "meta.json").read_text(encoding="utf-8"))
        sizes = meta["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{store} is damaged, its meta.json cannot be read ({e}): {remedy}") from e
    for name, size in sizes.items():
        file = store / name
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise DataError(f"{store} is damaged, {name} has {found:,} bytes instead of {size:,}: {remedy}")
    return meta


def load_codes(store: Path, name: str) -> np.ndarray:
    """A column of the cells, mapped: ranks share it."""
    return np.asarray(np.load(store / f"{name}.npy", mmap_mode="r"))


def stored_survey(store: Path, meta: dict) -> Survey:
    codes = {name: load_codes(store, name) for name in CODES}
    return Survey(codes=codes, orders={}, **meta["survey"])


# ---------------------------------------------------------------------------------------------------------------
# Writing the folder
# ---------------------------------------------------------------------------------------------------------------
def write_store(work: Path, plan: Plan, survey: Survey, keys: dict[str, str], counts: str, ram_budget_gb: float
                ) -> None:
    """Fill a folder: two passes over the matrices, one that checks their values and one that writes them in order."""
    codes, total = survey.codes, len(survey.codes["file"])
    order, _ = grouped(np.arange(total), codes["file"], codes["cell_type"], codes["perturbation"], codes["batch"])
    place = np.empty(total, np.int64)
    place[order] = np.arange(total)
    for name, values in {**codes, "place": place}.items():
        np.save(work / f"{name}.npy", values)

    with ExitStack() as stack:
        files = [stack.enter_context(H5ad(path)) for path in plan.files]
        drafts = {}
        for which, key in keys.items():
            matrices = [file.matrix(key) for file in files]
            for matrix in matrices:  # a block, and work on it
                matrix.entries = min(matrix.entries, max(1 << 16, int(ram_budget_gb * 1e9) // 256))
            genes = survey.genes if which == "input" else survey.count_genes
            drafts[which] = Draft(work, which, key, matrices, survey.orders[which], len(genes), place)
        announce(work, plan, total, drafts)
        with tqdm(total=2 * total * len(drafts), desc="cells", unit=" cells", unit_scale=True, leave=False,
                  disable=not sys.stderr.isatty()) as bar:
            for draft in drafts.values():
                draft.check(counts, bar)
            for draft in drafts.values():
                draft.write(bar)

    known = {name: getattr(survey, name) for name in (
        "cell_types", "perturbations", "batches", "genes", "count_genes", "gene_dim", "hvg_dim", "differences")}
    files = sorted(file.name for file in work.iterdir())
    meta = {
        "version": VERSION,
        "made_for": str(plan.path),
        "files": list(map(str, plan.files)),
        "matrices": {which: draft.entry() for which, draft in drafts.items()},
        "survey": known,
        "sizes": {name: (work / name).stat().st_size for name in files},
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    for name in [*files, "meta.json"]:
        settle(work / name)


def settle(path: Path) -> None:
    """Bring a file to the disk, and out of memory: read again in one piece it lies in larger pages, 20% faster."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def announce(work: Path, plan: Plan, total: int, drafts: dict) -> None:
    """Say what is made, from what and where; DataError if it does not fit on the disk."""
    size, free = sum(draft.bytes for draft in drafts.values()), shutil.disk_usage(work).free
    target = work.with_suffix("")
    if size > free:
        raise DataError(f"the prepared cells take {size / 1e9:.1f} GB in {target}, where {free / 1e9:.1f} GB are free: "
                        "free some, or start where data/ has room")
    widths = " and ".join(f"{draft.columns:,} columns of {draft.key}" for draft in drafts.values())
    print(f"preparing {total:,} cells x {widths} of {plan.path} ({len(plan.files)} files), once: {size / 1e9:.2f} GB "
          f"in {target}", flush=True)


class Draft:
    """One matrix of the folder while it is made, from that of every file."""

    def __init__(self, work: Path, which: str, key: str, matrices: list[Matrix], orders: list[np.ndarray | None],
                 columns: int, place: np.ndarray):
        self.work, self.which, self.key, self.columns, self.place = work, which, key, columns, place
        self.matrices, self.orders = matrices, orders
        self.first = np.cumsum([0, *(matrix.shape[0] for matrix in matrices)])  # cell where each file begins
        # Sparse if most cells are: a CSR matrix with more than half of its values is larger than a dense one.
        sparse = [m.shape[0] for m in matrices if m.format != "dense" and m.nnz <= 0.5 * m.shape[0] * m.shape[1]]
        self.sparse = 2 * sum(sparse) > len(place)
        self.bytes = 4 * len(place) * columns
        if self.sparse:
            self.bytes = 8 * sum(matrix.nnz for matrix in matrices) + 8 * len(place)

    def entry(self) -> dict:
        """What meta.json says of it."""
        parts = ("_data", "_indices", "_indptr") if self.sparse else ("",)
        return {
            "key": self.key,
            "format": "csr" if self.sparse else "dense",
            "columns": self.columns,
            "files": [f"{self.which}{part}.npy" for part in parts],
            "converted": self.converts,
        }

    def blocks(self, f: int) -> Iterator[tuple[np.ndarray, np.ndarray | csr_array]]:
        """(rows in the folder, expression) of the blocks of a file: converted, in the order of the genes."""
        for start, stop, block in self.matrices[f].blocks():
            if self.converts[f]:
                block = normalized(block)
            if self.orders[f] is not None:
                block = block[:, self.orders[f]]
            block = csr_array(block) if self.sparse else as_dense(block)
            yield self.place[self.first[f] + start : self.first[f] + stop], block

    def check(self, counts: str, bar: tqdm) -> None:
        self.converts = []
        for matrix in self.matrices:
            expression = self.key in ("X", "X_hvg") or matrix.key.startswith("layers/")
            self.converts.append(check_values(matrix, expression, counts, bar.update))

    def write(self, bar: tqdm) -> None:
        parts = self._open_sparse() if self.sparse else self._open_dense()
        for f in range(len(self.matrices)):
            for place, block in self.blocks(f):
                if self.sparse:
                    starts, lengths = self.indptr[place], np.diff(block.indptr)
                    parts[0].write(starts, lengths, block.data)
                    parts[1].write(starts, lengths, block.indices)
                else:
                    parts[0].write(place * self.columns, np.full(len(place), self.columns), block)
                bar.update(len(place))

    def _open_dense(self) -> list[Stretches]:
        return [empty_array(self.work / f"{self.which}.npy", np.float32, (len(self.place), self.columns))]

    def _open_sparse(self) -> list[Stretches]:
        lengths = np.zeros(len(self.place), np.int64)
        for f, matrix in enumerate(self.matrices):
            if matrix.format == "csr" and self.orders[f] is None:
                lengths[self.place[self.first[f] : self.first[f + 1]]] = np.diff(matrix.node["indptr"][:])
            else:
                for place, block in self.blocks(f):
                    lengths[place] = np.diff(block.indptr)
        self.indptr = np.concatenate(([0], lengths.cumsum()))
        total = int(self.indptr[-1])
        kind = np.int32 if total < 2**31 else np.int64
        np.save(self.work / f"{self.which}_indptr.npy", self.indptr.astype(kind))
        return [empty_array(self.work / f"{self.which}_data.npy", np.float32, (total,)),
                empty_array(self.work / f"{self.which}_indices.npy", np.int32, (total,))]


def empty_array(path: Path, kind: type, shape: tuple) -> Stretches:
    """A new .npy file of this size, to be written in stretches."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(kind).str, "fortran_order": False,
                                                    "shape": shape})
        file.truncate(file.tell() + np.dtype(kind).itemsize * int(np.prod(shape, dtype=np.int64)))
    return Stretches(path, os.O_RDWR)


def normalized(block: np.ndarray | csr_array) -> np.ndarray | csr_array:
    """Counts -> log(1 + TARGET_SUM x / total of the cell), float32."""
    scale = TARGET_SUM / np.maximum(row_sums(block), 1e-30)
    if isinstance(block, csr_array):
        values = np.log1p((block.data * np.repeat(scale, np.diff(block.indptr))).astype(np.float32))
        return csr_array((values, block.indices, block.indptr), shape=block.shape)
    return np.log1p((block * scale[:, None]).astype(np.float32))


def check_values(matrix: Matrix, expression: bool, counts: str, done: Callable | None = None) -> bool:
    """Read a matrix once; whether it is to be normalised and logged. DataError: not finite, negative, raw counts."""
    found = matrix.check(done)
    if not expression:
        return False
    if found["min"] < 0:
        for start, _, block in matrix.blocks():
            negative = stored(block) < 0
            if negative.any():
                raise DataError(f"{matrix.where} holds {matrix.first_row(start, block, negative)}: expression is never "
                                "negative; an embedding belongs in obsm under another name")
    raw = found["max"] > 0 and not looks_log1p(found)
    if not raw or counts in ("log1p", "counts"):
        return False
    if counts == "convert" and not matrix.key.startswith("obsm/"):
        return True
    what = "raw counts" if found["integer"] else "values"
    remedy = ", or counts=convert to normalise while reading" if matrix.key == "X" else ""
    raise DataError(f"{matrix.where} holds {what} up to {found['max']:g}, not log1p: python prepare_data.py state "
                    f"--action=preprocess --input={matrix.source.path}{remedy}")


def read_rows(file: H5ad, embed_key: str | None, counts: str, rows: np.ndarray) -> np.ndarray:
    """The input features of these (ascending) rows of a file, [n, D] float32, checked. Raises DataError."""
    matrix, parts = file.matrix(embed_key), []
    converts = check_values(matrix, embed_key in (None, "X", "X_hvg"), counts)
    for start, stop, block in matrix.blocks():
        block = normalized(block) if converts else block
        parts.append(as_dense(block)[rows[(rows >= start) & (rows < stop)] - start])
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------
# Inspection
# ---------------------------------------------------------------------------------------------------------------
def survey_toml(toml: str | Path, *, pert_col: str = "gene", cell_type_key: str = "cell_type",
                batch_col: str | None = "gem_group", control_pert: str = "non-targeting",
                embed_key: str | None = "X_hvg", output_space: str = "gene", strict: bool = True,
                zeroshot_controls: bool = True, val_fraction: float = 0.1, seed: int = 42,
                perturbation_features_file: str | None = None) -> Cells:
    """The cells that a TOML names without their expression, read from its files: nothing is prepared."""
    plan = read_toml(toml, strict)
    columns = {"cell_type": cell_type_key, "perturbation": pert_col, "batch": batch_col}
    survey = survey_files(plan.files, columns, matrix_keys(embed_key, output_space))
    return Cells(plan, survey, pert_col=pert_col, control_pert=control_pert, embed_key=embed_key, strict=strict,
                 zeroshot_controls=zeroshot_controls, val_fraction=val_fraction, seed=seed,
                 perturbation_features_file=perturbation_features_file)


def has_hvg(path: Path) -> bool:
    with H5ad(path) as cells:
        return "obsm/X_hvg" in cells.keys


def inspect(path: str | Path, **settings) -> dict:
    """Print and return how many cells are in each split: in all, of each cell type, of each perturbation.

    settings: those of survey_toml. Reads no expression.
    """
    if "embed_key" not in settings:
        files = read_toml(path, settings.get("strict", True)).files
        if not all(has_hvg(file) for file in files):  # then X is what there is to train on
            settings |= {"embed_key": None, "output_space": "all"}
    cells = survey_toml(path, **settings)
    tables = {"cell_type": (cells.cell_type, cells.cell_types),
              "perturbation": (cells.perturbation, cells.perturbations)}
    splits, lines = {}, {}
    for split in SPLITS:
        rows = cells.rows(split, controls=True)
        controls = int(cells.is_control[rows].sum())
        splits[split] = {"perturbed": len(rows) - controls, "control": controls}
        lines.setdefault("perturbed cells", []).append(len(rows) - controls)
        lines.setdefault("control cells", []).append(controls)
        for title, (codes, names) in tables.items():
            counts = np.bincount(codes[rows], minlength=len(names)).tolist()
            splits[split][title] = {name: n for name, n in zip(names, counts, strict=True) if n}
            for name, n in zip(names, counts, strict=True):
                lines.setdefault(f"{title} {name}", []).append(n)

    skipped = int((cells.member == 0).sum())
    print(f"{path}: {len(cells.file):,} cells in {len(cells.files)} files, {cells.input_dim:,} columns, "
          f"{len(cells.cell_types)} cell types, {len(cells.perturbations) - 1} perturbations, {cells.batch_dim} batches"
          + (f"; {skipped:,} cells are in no split" if skipped else ""))
    print(f"{'':32}" + "".join(f"{split:>12}" for split in SPLITS))
    for title, counts in lines.items():
        note = "  (the control cells of a type serve each of its splits)" if title == "control cells" else ""
        print(f"{title:32}" + "".join(f"{n or '-':>12}" for n in counts) + note)
    return {"toml": str(path), "files": list(map(str, cells.files)), "genes": cells.input_dim, "splits": splits}
