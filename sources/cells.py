"""Cells of an experiment: which files, who trains, sentences of cells, and the matrices they are read from."""

import glob
import os
import pickle
import re
import shutil
import tempfile
import tomllib
import weakref
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.errors import DataError
from sources.h5ad import H5ad, Matrix, as_csr, as_dense, looks_log1p, row_sums
from sources.shared import counter_rng, suggest

SPLITS = ("train", "val", "test")
TABLES = ("datasets", "training", "zeroshot", "fewshot")
TARGET_SUM = 1e4  # molecules of a cell after normalisation


def objection(strict: bool, message: str) -> None:
    """What cell-load passes over in silence: refused, or with strict=False told and passed over."""
    if strict:
        raise DataError(message)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {message}")


@dataclass(frozen=True)
class Plan:
    """A TOML as it was read: which files, and who trains. Pairs are (name of a data set, cell type)."""

    path: Path
    datasets: dict[str, list[Path]]  # those that training, zeroshot or fewshot name, in the order of the TOML
    training: set[str]
    zeroshot: dict[tuple[str, str], str]  # -> split
    fewshot: dict[tuple[str, str], dict[str, list[str]]]  # -> {val or test: perturbations}


def read_toml(path: str | Path, strict: bool = True) -> Plan:
    """Read the TOML of an experiment: [datasets], [training], [zeroshot], [fewshot."NAME.TYPE"], as cell-load does.

    Raises DataError for what is no such TOML and for a data set without files; if strict, also for anything in it
    that would have no effect (unknown tables, keys and values) and for a perturbation in val and test both.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}: give the TOML of your data, or leave --toml out for synthetic cells")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read as TOML: {e}") from e
    for name, table in tables.items():
        if name not in TABLES:
            objection(strict, f"{path} has a table [{name}], which means nothing{suggest(name, TABLES)}")
        elif not isinstance(table, dict):
            raise DataError(f"{path}: {name} = {table!r} should be a table [{name}]")
    sources, training = tables.get("datasets", {}), tables.get("training", {})
    used, pairs = set(training), {"zeroshot": {}, "fewshot": {}}
    for table, found in pairs.items():
        for key, value in tables.get(table, {}).items():
            name, dot, cell_type = key.partition(".")  # the first dot: cell types may have others
            used.add(name)
            if dot and (table == "zeroshot" or isinstance(value, dict)):
                found[name, cell_type] = value
            else:
                objection(strict, f'{path}: [{table}] {key} should be "{name}.CELL TYPE" in quotes, with '
                                  + ('"train", "val" or "test"' if table == "zeroshot" else "lists val and test"))
    if unknown := sorted(used - set(sources)):
        raise DataError(f"{path} names the data set {unknown[0]!r}, which is none of [datasets]"
                        f"{suggest(unknown[0], sources)}")
    for name, value in training.items():
        if value != "train":
            objection(strict, f'{path}: [training] {name} = {value!r}: only "train" counts')
    for pair, split in pairs["zeroshot"].items():
        if split not in SPLITS:
            raise DataError(f'{path}: [zeroshot] "{".".join(pair)}" = {split!r} is none of train, val, test')
    for pair, lists in pairs["fewshot"].items():
        where = f'{path}: [fewshot."{".".join(pair)}"]'
        for split, names in lists.items():
            if split not in ("val", "test"):
                objection(strict, f"{where} {split}: only val and test count, the rest trains"
                                  f"{suggest(split, ('val', 'test'))}")
            elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(f"{where} {split} = {names!r} should be a list of perturbations")
        if both := sorted({*lists.get("val", ())} & {*lists.get("test", ())}):
            objection(strict, f"{where} has {', '.join(both)} in val and in test: a cell belongs to one")
    files, home = {name: find_files(path, name, text, strict) for name, text in sources.items() if name in used}, {}
    for name, file in ((name, file.resolve()) for name, found in files.items() for file in found):
        if home.setdefault(file, name) != name:
            objection(strict, f"{path}: {file} is in the data sets {home[file]} and {name}: test cells of the one may "
                              "train in the other")
    if not files:
        raise DataError(f"{path} names no cells: it needs [datasets] name = path, and name in [training] or [zeroshot]")
    return Plan(path, files, {name for name, value in training.items() if value == "train"}, **pairs)


def find_files(toml: Path, name: str, text: str, strict: bool) -> list[Path]:
    """The h5 and h5ad files of a path or pattern, relative to the TOML: a file, the files of a folder, a glob, {a,b}.

    A pattern that does not say .h5 or .h5ad stands for folders, *.h5 before *.h5ad, or else for names without them.
    """
    if not isinstance(text, str):
        raise DataError(f"{toml}: [datasets] {name} = {text!r} should be a path or a pattern in quotes")
    found: dict[str, Path] = {}
    for pattern in expand_braces(os.path.join(toml.parent, os.path.expanduser(text))):
        if Path(pattern).is_file():
            matches = [pattern]
        elif pattern.endswith((".h5", ".h5ad")):
            matches = sorted(glob.glob(pattern))
        else:
            inside = [f for end in ("/*.h5", "/*.h5ad") for f in sorted(glob.glob(pattern.rstrip("/") + end))]
            named = {*glob.glob(pattern), *glob.glob(pattern + ".h5"), *glob.glob(pattern + ".h5ad")}
            matches = inside or [f for end in (".h5", ".h5ad") for f in sorted(named) if f.endswith(end)]
        if not matches:
            objection(strict, f"{toml}: [datasets] {name} = {text!r}: there is no h5 or h5ad file at {pattern}")
        for file in map(Path, matches):
            twin = found.get(file.stem)
            if twin and twin.resolve() != file.resolve():
                objection(strict, f"{toml}: data set {name} has two files called {file.stem}: {twin} and {file}; "
                                  "cell-load reads the last only, so rename one")
            found[file.stem] = file
    if not found:
        raise DataError(f"{toml}: [datasets] {name} = {text!r} has no file")
    return list(found.values())


def expand_braces(pattern: str) -> list[str]:
    """a{b,c}d -> abd, acd; several groups give every combination, the first one slowest."""
    group = re.search(r"\{([^{}]+)\}", pattern)
    if not group:
        return [pattern]
    return [text for option in group[1].split(",")
            for text in expand_braces(pattern[: group.start()] + option.strip() + pattern[group.end() :])]


class Experiment:
    """Every cell of every file of a TOML: what it is, and to which splits it belongs. Reads no expression.

    Attributes over the N cells: file, row (in the file), cell_type, perturbation, batch: codes int32 [N] into files,
    -, cell_types, perturbations, batches (sorted); member uint8 [N], bit s for SPLITS[s]; control, the code of
    control_pert. names: the data set of each file. genes: columns of the input; count_genes: those of what a decoder
    learns, or None. Dimensions as cell-load's var_dims: input_dim, output_dim, gene_dim, hvg_dim, pert_dim, batch_dim.
    Raises DataError: files without these columns or the control, cell types and perturbations that are not there,
    perturbed cells without control cells of their type and file, data sets of different genes.
    """

    def __init__(self, cfg):
        self.cfg, self.plan = cfg, read_toml(cfg.toml_config_path, cfg.strict)
        self.files = [file for files in self.plan.datasets.values() for file in files]
        self.names = [name for name, files in self.plan.datasets.items() for _ in files]
        columns = {"cell_type": cfg.cell_type_key, "perturbation": cfg.pert_col, "batch": cfg.batch_col}
        parts = {part: [] for part in columns}
        tables = {"input": [], "counts": []}
        self.count_key = {"gene": "X_hvg", "all": "X"}.get(cfg.output_space)
        self.needs_counts = cfg.embed_key not in (None, self.count_key) and self.count_key is not None
        self.gene_dim = self.hvg_dim = 0
        for path in self.files:
            with H5ad(path) as file:
                for part, column in columns.items():
                    parts[part].append(file.column(column) if column else (np.zeros(file.n_obs, np.int32), ["all"]))
                if cfg.control_pert not in (known := parts["perturbation"][-1][1]):
                    raise DataError(f"{path} has no control cells: no cell has {cfg.pert_col} = {cfg.control_pert!r}"
                                    f"{suggest(cfg.control_pert, known)}; set control_pert")
                tables["input"].append(column_names(file, cfg.embed_key))
                if self.needs_counts:
                    tables["counts"].append(column_names(file, self.count_key))
                if not self.gene_dim:
                    self.gene_dim = file.n_vars
                    self.hvg_dim = file.matrix("X_hvg").shape[1] if "obsm/X_hvg" in file.keys else 0
        for part, read in parts.items():
            values = sorted({name for _, names in read for name in names})
            codes = [np.searchsorted(values, names).astype(np.int32)[codes] for codes, names in read]
            setattr(self, part, np.concatenate(codes))
            setattr(self, "batches" if part == "batch" else part + "s", values)
        sizes = [len(codes) for codes, _ in parts["batch"]]
        self.file = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self.row = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        self.control = self.perturbations.index(cfg.control_pert)
        self.is_control = self.perturbation == self.control
        self.genes, self.orders = align(self.files, tables["input"], cfg.embed_key or "X", cfg.strict)
        self.count_genes, self.count_orders = None, None
        if self.needs_counts:
            self.count_genes, self.count_orders = align(self.files, tables["counts"], self.count_key, cfg.strict)
        self.input_dim = self.output_dim = len(self.genes)
        self.gene_dim = len(self.genes) if cfg.embed_key in (None, "X") else self.gene_dim
        self.batch_dim = len(self.batches)
        self.features = read_features(cfg, self.perturbations)
        self.pert_dim = len(self.perturbations) if self.features is None else self.features.shape[1]
        self.member = np.zeros(len(self.file), np.uint8)
        self._assign_splits()

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
        names = ("cell_types", "perturbations", "batches", "genes", "count_genes")
        return {name: None if (found := getattr(self, name)) is None else list(map(str, found)) for name in names}

    def rows(self, split: str, controls: bool) -> np.ndarray:
        """Cells of a split, ascending: the perturbed ones, and the controls that serve them if `controls`."""
        return np.flatnonzero((self.member >> SPLITS.index(split) & 1).astype(bool) & (~self.is_control | controls))

    def _assign_splits(self) -> None:
        order, starts = grouped(np.arange(len(self.file)), self.file, self.cell_type)
        for cells in np.split(order, starts[1:-1]):
            self._assign(self.names[self.file[cells[0]]], self.cell_types[self.cell_type[cells[0]]], cells)
        self._check_plan()
        if not len(self.rows("val", False)) and self.cfg.val_fraction > 0:
            self._hold_out_conditions()
        if lonely := sorted(f"{self.cell_types[t]} in {self.files[f]}" for f, t in
                            self._types(~self.is_control) - self._types(self.is_control)):
            objection(self.cfg.strict or self.cfg.embed_key is None,
                      f"{lonely[0]}{f' and {len(lonely) - 1} more' if lonely[1:] else ''} has perturbed cells but no "
                      f"control cells ({self.cfg.pert_col} = {self.cfg.control_pert}) to start from: leave the cell "
                      "type out, or with strict=False its input is zero")

    def _types(self, which: np.ndarray) -> set[tuple[int, int]]:
        """(file, cell type) of these cells, of those that are in a split."""
        which = which & (self.member > 0)
        kinds = np.unique(self.file[which].astype(np.int64) * len(self.cell_types) + self.cell_type[which])
        return {divmod(int(kind), len(self.cell_types)) for kind in kinds}

    def _assign(self, name: str, cell_type: str, cells: np.ndarray) -> None:
        """Members of the splits, of the cells of one type of one file: zeroshot before fewshot before training."""
        controls, perturbed = cells[self.is_control[cells]], cells[~self.is_control[cells]]
        if (name, cell_type) in self.plan.zeroshot:
            split = self.plan.zeroshot[name, cell_type]
            self.member[cells] |= 1 << SPLITS.index(split)
            if self.cfg.zeroshot_controls or split == "train":
                self.member[controls] |= 1
        elif (name, cell_type) in self.plan.fewshot:
            lists, rest = self.plan.fewshot[name, cell_type], np.ones(len(perturbed), bool)
            for s, split in ((1, "val"), (2, "test")):
                codes = [self.perturbations.index(p) for p in lists.get(split, ()) if p in self.perturbations]
                chosen = np.isin(self.perturbation[perturbed], codes)
                self.member[perturbed[chosen]] |= 1 << s
                self.member[controls] |= int(chosen.any()) << s
                rest &= ~chosen
            self.member[perturbed[rest]] |= 1
            self.member[controls] |= len(perturbed) > 0  # a type of controls alone gives nothing, as in cell-load
        elif name in self.plan.training:
            self.member[cells] |= 1

    def _check_plan(self) -> None:
        """Whether there are cells of what the TOML names."""
        for name, cell_type in [*self.plan.zeroshot, *self.plan.fewshot]:
            mine = np.isin(self.file, [f for f, other in enumerate(self.names) if other == name])
            types = [self.cell_types[t] for t in np.unique(self.cell_type[mine])]
            if cell_type not in types:
                objection(self.cfg.strict, f"{self.plan.path}: data set {name} has no cell type {cell_type!r}"
                                           f"{suggest(cell_type, types)}")
                continue
            mine &= self.cell_type == self.cell_types.index(cell_type)
            known = [self.perturbations[p] for p in np.unique(self.perturbation[mine & ~self.is_control])]
            lists = self.plan.fewshot.get((name, cell_type), {})
            for p in [p for split in ("val", "test") for p in lists.get(split, ()) if p not in known]:
                objection(self.cfg.strict, f'{self.plan.path}: [fewshot."{name}.{cell_type}"]: ' + (
                    f"{p!r} is the control, which is never split" if p == self.cfg.control_pert
                    else f"{name} has no {cell_type} cells of {p!r}{suggest(p, known)}"))

    def _hold_out_conditions(self) -> None:
        """A seeded fraction of the (cell type, perturbation) pairs of train becomes val: at least one, never all."""
        train = self.rows("train", False)
        pairs = self.cell_type[train].astype(np.int64) * len(self.perturbations) + self.perturbation[train]
        conditions = np.unique(pairs)
        count = min(max(1, round(self.cfg.val_fraction * len(conditions))), len(conditions) - 1)
        if count < 1:
            return
        held = train[np.isin(pairs, counter_rng(self.cfg.seed, 1).permutation(conditions)[:count])]
        self.member[held] = 2
        for f, t in self._types(self.member == 2):
            self.member[(self.file == f) & (self.cell_type == t) & self.is_control] |= 2


def grouped(rows: np.ndarray, *codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows sorted by these codes, the first one slowest, else as they were; where each group starts, and the end)."""
    order = rows[np.lexsort([code[rows] for code in codes[::-1]])]
    change = np.zeros(len(order) + 1, bool)
    change[[0, -1]] = True
    for code in codes:
        change[1:-1] |= code[order[1:]] != code[order[:-1]]
    return order, np.flatnonzero(change)


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
            return np.array([n.decode() if isinstance(n, bytes) else str(n) for n in names[:]])
    return matrix.shape[1]


def align(files: list[Path], tables: list, key: str, strict: bool) -> tuple[list[str], list[np.ndarray | None]]:
    """(names of the columns, for each file the order that brings its columns there; None: they are).

    Other genes than the first file's: an error, or with strict=False the genes that all have. Embeddings: one width.
    """
    if any(isinstance(names, int) for names in tables):
        widths = [names if isinstance(names, int) else len(names) for names in tables]
        other = next((i for i, width in enumerate(widths) if width != widths[0]), None)
        if other is not None:
            raise DataError(f"{key} has {widths[0]} columns in {files[0]} but {widths[other]} in {files[other]}")
        return [f"{key}_{i}" for i in range(widths[0])], [None] * len(files)
    if all(np.array_equal(names, tables[0]) for names in tables):
        return list(map(str, tables[0])), [None] * len(files)
    places = [{str(name): i for i, name in enumerate(names)} for names in tables]
    for file, names, place in zip(files, tables, places, strict=True):
        if len(place) < len(names):
            raise DataError(f"{file} has genes of the same name and another order than {files[0]}: make the names "
                            "unique, so that the files can be aligned")
        if odd := sorted(place.keys() ^ places[0].keys()):
            objection(strict, f"{file} and {files[0]} have different genes in {key}: {len(odd):,} are in one only, such"
                              f" as {odd[0]}; with strict=False those that all have are used")
    genes = [gene for gene in places[0] if all(gene in place for place in places)]
    if not genes:
        raise DataError(f"{files[0]} and the other files have no gene in common")
    orders = [np.array([place[gene] for gene in genes]) for place in places]
    return genes, [None if len(genes) == len(place) and (order == np.arange(len(order))).all() else order
                   for order, place in zip(orders, places, strict=True)]


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


def read_features(cfg, perturbations: list[str]) -> torch.Tensor | None:
    """[P, pert_dim] of cfg.perturbation_features_file; zeros for the control if it has none. None: no file."""
    if not (path := cfg.perturbation_features_file):
        return None
    vectors = load_features(path)
    if missing := [name for name in perturbations if name not in vectors and name != cfg.control_pert]:
        objection(cfg.strict, f"{path} has no vector for {len(missing)} perturbations, such as {missing[0]!r}"
                              f"{suggest(missing[0], vectors)}; with strict=False they are zeros, as the control")
    zero = torch.zeros_like(next(iter(vectors.values())))
    return torch.stack([vectors.get(name, zero) for name in perturbations])


def check_values(matrix: Matrix, expression: bool, counts: str) -> bool:
    """Read a matrix once; whether it is to be normalised and logged. DataError: not finite, negative, raw counts."""
    found, where = matrix.check(), f"{matrix.source.path}: {matrix.key}"
    if not expression:
        return False
    if found["min"] < 0:
        for start, _, block in matrix.blocks():
            data = block[0] if isinstance(block, tuple) else block
            if (data < 0).any():
                at = int((data < 0).ravel().argmax())
                row = start + (int(np.searchsorted(block[2], at, "right")) - 1 if isinstance(block, tuple)
                               else at // matrix.shape[1])
                raise DataError(f"{where} holds {data.ravel()[at]:g} for cell {row} ({matrix.source.obs_names[row]}): "
                                "expression is never negative; an embedding belongs in obsm under another name")
    raw = found["max"] > 0 and not looks_log1p(found)
    if not raw or counts in ("log1p", "counts"):
        return False
    if counts == "convert" and not matrix.key.startswith("obsm/"):
        return True
    what = "raw counts" if found["integer"] else "values"
    raise DataError(f"{where} holds {what} up to {found['max']:g}, not log1p: python prepare_data.py state "
                    f"--action=preprocess --input={matrix.source.path}"
                    + (", or counts=convert to normalise while reading" if matrix.key == "X" else ""))


def read_rows(file: H5ad, cfg, rows: np.ndarray) -> np.ndarray:
    """The input features of these (ascending) rows of a file, [n, D] float32, checked. Raises DataError."""
    matrix, parts = file.matrix(cfg.embed_key), []
    convert = check_values(matrix, cfg.embed_key in (None, "X", "X_hvg"), cfg.counts)
    for start, stop, block in matrix.blocks(8_192):
        dense = as_dense(block, matrix.shape[1])[rows[(rows >= start) & (rows < stop)] - start]
        if convert:
            dense = np.log1p(dense * (TARGET_SUM / np.maximum(dense.sum(1, keepdims=True), 1e-30)))
        parts.append(dense.astype(np.float32))
    return np.concatenate(parts)


class Part:
    """Rows of one matrix of one file, of those cells that are in a split: dense [n, D], or CSR with starts and lengths.

    In memory, or read row by row from the h5ad itself where it is not packed, else from an unnamed copy of these rows.
    Reads, not memory maps: a kernel may map 2 MB around a byte that is touched, so that maps keep no budget. Row i of
    the file is the row place[i] here.
    """

    def __init__(self, matrix: Matrix, used: np.ndarray, width: int, order: np.ndarray | None, convert: bool):
        self.matrix, self.used, self.width, self.order, self.convert = matrix, used, width, order, convert
        dense = matrix.format == "dense" or matrix.nnz > 0.5 * matrix.shape[0] * matrix.shape[1]  # CSR would be larger
        self.lengths = None if dense else row_lengths(matrix)[used]
        self.bytes = 4 * len(used) * width if dense else int(8 * self.lengths.sum() + 12 * len(used))
        maps = matrix.mappable() if not convert and order is None and dense == (matrix.format == "dense") else None
        self.direct = maps and [(m.filename, m.offset, m.dtype) for m in maps[: 2 - dense]]
        self.indptr = maps[2] if maps and not dense else None
        self.files, self.arrays = [], []

    def load(self, streamed: bool) -> None:
        """Bring the rows into memory, or find them in the file, or copy them to an unnamed one."""
        self.place = np.full(self.matrix.shape[0], -1, np.int32)
        self.place[self.used] = np.arange(len(self.used))
        if streamed and self.direct:
            self.files = [(self._keep(os.open(path, os.O_RDONLY)), offset, kind) for path, offset, kind in self.direct]
            self.starts = self.used * np.int64(self.width) if self.lengths is None else self.indptr[self.used]
            return
        if self.lengths is None:
            self.starts, total = np.arange(len(self.used)) * self.width, len(self.used) * self.width
        else:
            self.starts, total = np.cumsum(self.lengths) - self.lengths, int(self.lengths.sum())
        for kind in (np.float32, np.int32)[: 1 + (self.lengths is not None)]:
            if streamed:
                with tempfile.TemporaryFile() as file:
                    self.files.append((self._keep(os.dup(file.fileno())), 0, np.dtype(kind)))
            else:
                self.arrays.append(np.empty(total, kind))
        most = 8_192 if self.lengths is not None else max(1, self.matrix.entries // self.matrix.shape[1])
        for start, stop, block in self.matrix.blocks(most):
            at = self.place[start:stop]
            if (at >= 0).any():
                self._put(at, block)

    def _keep(self, descriptor: int) -> int:
        """An open file that closes with this object."""
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _put(self, at: np.ndarray, block: np.ndarray | tuple) -> None:
        """Store the rows of a block of the file, at[i] being the place of row i, or -1: it is in no split."""
        keep, scale = at >= 0, TARGET_SUM / np.maximum(row_sums(block), 1e-30) if self.convert else None
        if self.lengths is None:
            rows, lengths = as_dense(block, self.matrix.shape[1])[keep], self.width
            if self.convert:
                rows = np.log1p((rows * scale[keep, None]).astype(np.float32))
            parts = [rows if self.order is None else rows[:, self.order]]
        else:
            data, columns, pointers = as_csr(block)
            row = np.repeat(np.arange(len(at)), np.diff(pointers))
            if self.convert:
                data = np.log1p((data * scale[row]).astype(np.float32))
            if self.order is not None:
                new = np.full(self.matrix.shape[1], -1, np.int32)
                new[self.order] = np.arange(len(self.order))
                columns = new[columns]
            wanted = keep[row] & (columns >= 0)
            parts = [data[wanted], columns[wanted]]
            lengths = self.lengths[at[keep]] = np.bincount(row[wanted], minlength=len(at))[keep]
        starts, lengths = self.starts[at[keep]], np.broadcast_to(lengths, keep.sum())
        for array, values in zip(self.arrays, parts, strict=False):
            if self.lengths is None:
                array.reshape(-1, self.width)[at[keep]] = values
            else:
                array[spans(starts, lengths)] = values
        for (file, offset, _), values in zip(self.files, parts, strict=False):
            transfer(os.pwritev, file, offset, np.ascontiguousarray(values).ravel(), starts, lengths)

    def gather(self, place: np.ndarray, device: torch.device) -> torch.Tensor:
        """Rows as [n, D] float32 on the device; sparse ones become dense there."""
        if self.lengths is None and self.arrays:
            rows = torch.empty(len(place), self.width, pin_memory=device.type == "cuda")
            stored = torch.from_numpy(self.arrays[0]).view(-1, self.width)
            torch.index_select(stored, 0, torch.from_numpy(place), out=rows)
            return rows.to(device, non_blocking=True)
        lengths = np.full(len(place), self.width) if self.lengths is None else self.lengths[place]
        starts = self.starts[place]
        found = [array[at] for at in [spans(starts, lengths) if self.arrays else None] for array in self.arrays]
        for file, offset, kind in self.files:
            found.append(np.empty(lengths.sum(), kind))
            transfer(os.preadv, file, offset, found[-1], starts, lengths)
        values = torch.from_numpy(found[0].astype(np.float32, copy=False)).to(device)
        if self.lengths is None:
            return values.view(-1, self.width)
        first = torch.arange(len(place), device=device) * self.width
        flat = torch.repeat_interleave(first, torch.from_numpy(lengths).to(device), output_size=len(values))
        flat += torch.from_numpy(found[1].astype(np.int32, copy=False)).to(device)
        return torch.zeros(len(place) * self.width, device=device).scatter_(0, flat, values).view(-1, self.width)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... start + length - 1 of every pair, one after another."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def transfer(call: Callable, file: int, offset: int, array: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
    """Read (os.preadv) or write (os.pwritev) these spans of a file of such items, in its order, to or from an array."""
    if not len(array):
        return
    view, item, order = memoryview(array).cast("B"), array.itemsize, np.argsort(starts)
    ends = np.cumsum(lengths)
    spots = (item * (ends - lengths), item * ends, offset + item * starts)
    for a, b, at in zip(*(spot[order].tolist() for spot in spots), strict=True):
        if call(file, [view[a:b]], at) != b - a:
            raise DataError("cells cannot be streamed: the h5ad was changed meanwhile, or the disk of TMPDIR is full")


def row_lengths(matrix: Matrix) -> np.ndarray:
    """Stored values of every row of a sparse matrix, int64."""
    if matrix.format == "csr":
        return np.diff(matrix.node["indptr"][:].astype(np.int64))
    return np.concatenate([np.diff(block[2]) for _, _, block in matrix.blocks()])


class Store:
    """Expression of the cells that are in a split, in no more memory than cfg.ram_budget_gb.

    Dense files stay dense, sparse ones sparse, in memory if all fit; otherwise rows are read when they are asked for.
    A packed file is then copied once into an unnamed file in TMPDIR, the cells of a group side by side. Values are
    checked before: DataError for what is not finite, negative or not log1p.
    """

    def __init__(self, experiment: Experiment, device: torch.device | str, cfg):
        self.experiment, self.device = experiment, torch.device(device)
        e, budget, opened = experiment, int(cfg.ram_budget_gb * 1e9), [H5ad(path) for path in experiment.files]
        keys = {"input": (cfg.embed_key, e.genes, e.orders)}
        if e.needs_counts:
            keys["counts"] = (e.count_key, e.count_genes, e.count_orders)
        self.parts = {which: [] for which in keys}
        for which, (key, genes, orders) in keys.items():
            for f, file in enumerate(opened):
                matrix = file.matrix(key)
                matrix.entries = min(matrix.entries, max(1 << 16, budget // 256))  # a block, and work on it
                convert = check_values(matrix, key in (None, "X", "X_hvg") or matrix.key[:6] == "layers", cfg.counts)
                used = np.flatnonzero((e.file == f) & (e.member > 0))
                used = e.row[grouped(used, e.cell_type, e.perturbation, e.batch)[0]]
                self.parts[which].append(Part(matrix, used, len(genes), orders[f], convert))
        every = [part for parts in self.parts.values() for part in parts]
        total = sum(part.bytes for part in every)
        self.streamed = total > budget
        free, copied = shutil.disk_usage(tempfile.gettempdir()).free, sum(p.bytes for p in every if not p.direct)
        if self.streamed and copied > free:
            raise DataError(f"the cells take {total / 1e9:.1f} GB, more than ram_budget_gb = {cfg.ram_budget_gb:g}, and"
                            f" a copy has {free / 1e9:.1f} GB in {tempfile.gettempdir()}: set TMPDIR or the budget")
        for part in every:
            part.load(self.streamed)
            part.matrix = None
        for file in opened:
            file.file.close()

    def rows(self, rows: np.ndarray, which: str = "input") -> torch.Tensor:
        """Expression of these cells, [n] -> [n, D] float32 on the device."""
        e, parts = self.experiment, self.parts[which]
        assert (e.member[rows] > 0).all(), "only cells of a split are stored"
        files = np.unique(e.file[rows])
        if len(files) == 1:
            return parts[files[0]].gather(parts[files[0]].place[e.row[rows]], self.device)
        out = torch.empty(len(rows), parts[0].width, device=self.device)
        for f in files:
            at = np.flatnonzero(e.file[rows] == f)
            out[torch.from_numpy(at).to(self.device)] = parts[f].gather(parts[f].place[e.row[rows[at]]], self.device)
        return out


class Sentences:
    """Sets of cell_set_len cells of one (file, cell type, perturbation), with basal_mapping_strategy=batch also of one
    batch, and a control cell for each; all of it a pure function of (seed, split, epoch).

    In an epoch every cell comes once, in a new order and company; a set that its group cannot fill is completed by
    cells of the group drawn with replacement, but not in test or if `whole`. downsample_cells keeps a seeded choice of
    each group, in every split. A control cell is drawn from those of the same file, cell type and, if batch, batch
    (where the batch has none: from all of the type). For a control cell as target so too, or itself if not
    map_controls (cell-load 0.10.4 ignores this setting).
    """

    def __init__(self, experiment: Experiment, split: str, cfg, whole: bool = False):
        e, self.cfg, self.split, self.whole = experiment, cfg, split, whole or split == "test"
        by_batch = (e.batch,) if cfg.basal_mapping_strategy == "batch" else ()
        keys = (e.file, e.cell_type, e.perturbation, *by_batch)
        rows, starts = grouped(e.rows(split, cfg.should_yield_control_cells), *keys)
        if not len(rows):
            raise DataError(f"{e.plan.path} has no cells to {'train on' if split == 'train' else split}: see python "
                            f"prepare_data.py inspect {e.plan.path}")
        if cfg.downsample_cells:
            group = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            order = np.argsort(group + counter_rng(cfg.seed, 2, SPLITS.index(split)).random(len(rows)), kind="stable")
            kept = np.sort(rows[order][np.arange(len(rows)) - starts[group] < cfg.downsample_cells])
            rows, starts = grouped(kept, *keys)
        self.cells, self.starts, self.sizes = rows, starts[:-1], np.diff(starts)
        each = -(-self.sizes // cfg.cell_set_len)  # sentences of a group
        self.group = np.repeat(np.arange(len(each)), each)
        self.offset = (np.arange(len(self.group)) - np.repeat(np.cumsum(each) - each, each)) * cfg.cell_set_len
        self.is_control = e.is_control
        self._make_pools(e, rows[self.starts], by_batch)

    def _make_pools(self, e: Experiment, first: np.ndarray, by_batch: tuple) -> None:
        """Controls sorted by file, type and batch: the pool of a group is a stretch of them, from pool_start on."""
        controls = e.rows(self.split, True)
        self.pool, _ = grouped(controls[e.is_control[controls]], e.file, e.cell_type, e.batch)
        kind = e.file.astype(np.int64) * len(e.cell_types) + e.cell_type
        key = kind * len(e.batches) + e.batch
        low, high = (np.searchsorted(kind[self.pool], kind[first], side) for side in ("left", "right"))
        if by_batch:
            left, right = (np.searchsorted(key[self.pool], key[first], side) for side in ("left", "right"))
            if ((left == right) & (low < high)).any():
                some = first[np.argmax((left == right) & (low < high))]
                objection(False, f"batch {e.batches[e.batch[some]]!r} has no {e.cell_types[e.cell_type[some]]} control "
                                 "cells, perhaps others too: those of the cell type in any batch take their place")
            low, high = np.where(left < right, (left, right), (low, high))
        self.pool_start, self.pool_size = low, high - low

    def __len__(self) -> int:
        return len(self.group)

    def plan(self, epoch: int) -> tuple:
        """(targets [n, S], controls [n, S, n_basal_samples]), rows of the experiment; -1: there is no control cell.

        For test or whole: lists of n arrays [s] and [s, n_basal_samples], s <= S, in the order of the groups.
        """
        S, rng = self.cfg.cell_set_len, counter_rng(self.cfg.seed, 3, SPLITS.index(self.split), epoch)
        cells = self.cells
        if not self.whole:
            group = np.repeat(np.arange(len(self.sizes)), self.sizes)
            cells = cells[np.argsort(group + rng.random(len(cells)), kind="stable")]
        size = self.sizes[self.group, None]
        place = self.offset[:, None] + np.arange(S)  # [n, S], within the group
        beyond = place >= size
        place[beyond] = _draw(rng, np.broadcast_to(size, place.shape)[beyond])
        targets = cells[self.starts[self.group, None] + place]
        first, pool = (array[self.group, None, None] for array in (self.pool_start, self.pool_size))
        drawn = first + _draw(rng, np.broadcast_to(pool, (*targets.shape, self.cfg.n_basal_samples)))
        controls = np.where(pool > 0, np.append(self.pool, -1)[drawn], -1)  # first <= len(pool)
        if not self.cfg.map_controls:
            controls = np.where(self.is_control[targets][..., None], targets[..., None], controls)
        if self.whole:
            lengths = (~beyond).sum(1)
            return tuple([row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (targets, controls))
        order = rng.permutation(len(targets))
        return targets[order], controls[order]


def _draw(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    """Integers in [0, size), for sizes far below 2^53."""
    return (rng.random(size.shape) * size).astype(np.int64)


def make_batch(experiment: Experiment, store: Store, targets: np.ndarray, controls: np.ndarray) -> dict:
    """A batch of b sentences from the rows of their cells, targets [b, S] and controls [b, S, n_basal_samples].

    pert_cell_emb and ctrl_cell_emb [b, S, D] (the mean of its control cells), pert_emb [b, pert_dim], batch [b, S],
    pert and cell_type [b] (codes), pert_cell_counts [b, S, G] if a decoder learns; on the device of the store.
    """
    (b, S), e, device = targets.shape, experiment, store.device
    ctrl = store.rows(np.where(controls < 0, targets[..., None], controls).ravel()).view(b, S, controls.shape[2], -1)
    if (controls < 0).any():  # no control cell of this type: cell-load takes zeros
        ctrl[torch.from_numpy(controls < 0).to(device)] = 0
    ctrl = ctrl.mean(2) if controls.shape[2] > 1 else ctrl[:, :, 0]
    codes = {"pert": e.perturbation[targets[:, 0]], "cell_type": e.cell_type[targets[:, 0]], "batch": e.batch[targets]}
    codes = {name: torch.from_numpy(array.astype(np.int64)).to(device) for name, array in codes.items()}
    features = (torch.nn.functional.one_hot(codes["pert"], e.pert_dim).float() if e.features is None
                else e.features[codes["pert"].cpu()].to(device))
    batch = {"pert_emb": features, "ctrl_cell_emb": ctrl, "pert_cell_emb": store.rows(targets.ravel()).view(b, S, -1),
             **codes}
    if "counts" in store.parts:
        batch["pert_cell_counts"] = store.rows(targets.ravel(), "counts").view(b, S, -1)
    return batch


class Batches:
    """Sentences of every step: a pure function of (seed, step, rank). Epochs follow one another without a seam."""

    def __init__(self, rt, experiment: Experiment, store: Store, cfg, split: str = "train"):
        self.rt, self.experiment, self.store, self.cfg = rt, experiment, store, cfg
        self.sentences, self.plans = Sentences(experiment, split, cfg), {}

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self.plans:
            self.plans = {e: p for e, p in self.plans.items() if e == epoch - 1}
            self.plans[epoch] = self.sentences.plan(epoch)
        return self.plans[epoch]

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Targets [B, S] and controls [B, S, n_basal_samples] of the whole batch of a step."""
        place = np.arange(step * self.cfg.batch_size, (step + 1) * self.cfg.batch_size)
        epoch, at = np.divmod(place, len(self.sentences))
        parts = [[array[at[epoch == e]] for array in self.plan(int(e))] for e in np.unique(epoch)]
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def __call__(self, step: int) -> dict:
        """This rank's batch, as make_batch has it, of b = batch_size / world_size sentences."""
        return make_batch(self.experiment, self.store, *map(self.rt.share, self.rows(step)))


def inspect(path: str | Path, cfg=None, **columns) -> dict:
    """Print and return how many cells are in each split: in all, of each cell type, of each perturbation.

    columns: settings such as pert_col and control_pert, where no cfg is given. Reads no expression.
    """
    if cfg is None:
        defaults = {"embed_key": "X_hvg", "output_space": "gene", "perturbation_features_file": None, "seed": 42}
        cfg = SimpleNamespace(toml_config_path=str(path), **{**defaults, **columns})
        for file in (file for files in read_toml(path, cfg.strict).datasets.values() for file in files):
            with H5ad(file) as cells:
                if "obsm/X_hvg" not in cells.keys:  # then X is what there is to train on
                    cfg.embed_key, cfg.output_space = None, "all"
    e = Experiment(cfg)
    result = {"toml": str(path), "files": list(map(str, e.files)), "genes": e.input_dim, "splits": {}}
    tables = {"cell_type": (e.cell_type, e.cell_types), "perturbation": (e.perturbation, e.perturbations)}
    lines = {f"{title} {name}": [] for title, (_, names) in tables.items() for name in names}
    lines = {"perturbed cells": [], "control cells": [], **lines}
    for split in SPLITS:
        rows = e.rows(split, True)
        made = {"perturbed": int((~e.is_control[rows]).sum()), "control": int(e.is_control[rows].sum())}
        lines["perturbed cells"].append(made["perturbed"])
        lines["control cells"].append(made["control"])
        for title, (codes, names) in tables.items():
            counts = dict(zip(names, np.bincount(codes[rows], minlength=len(names)).tolist(), strict=True))
            made[title] = {name: n for name, n in counts.items() if n}
            for name, n in counts.items():
                lines[f"{title} {name}"].append(n)
        result["splits"][split] = made
    skipped = int((e.member == 0).sum())
    print(f"{path}: {len(e.file):,} cells in {len(e.files)} files, {e.input_dim:,} columns, {len(e.cell_types)} cell "
          f"types, {len(e.perturbations) - 1} perturbations, {e.batch_dim} batches"
          + (f"; {skipped:,} cells are in no split" if skipped else "")
          + f"\n{'':32}" + "".join(f"{split:>12}" for split in SPLITS))
    for title, counts in lines.items():
        print(f"{title:32}" + "".join(f"{n or '-':>12}" for n in counts)
              + ("  (the control cells of a type serve each of its splits)" if title == "control cells" else ""))
    return result


class Cells:
    """The cells of a TOML: what each is, its splits, and its expression. See open_cells.

    Attributes over the N cells, in the order of the files and of the rows in them: file, row, cell_type, perturbation,
    batch: codes int32 [N]; member uint8 [N], bit s for SPLITS[s]; is_control bool [N]. control: the code of
    control_pert. files, names (the data set of each file), cell_types, perturbations, batches, genes (columns of the
    input), count_genes (columns of the counts, or None): lists. features [P, pert_dim] or None: one-hot.
    streamed: the matrices are larger than ram_budget_gb and stay on disk. toml: path.
    """

    def __init__(self, experiment: Experiment, store: Store):
        for name in ("file", "row", "cell_type", "perturbation", "batch", "member", "is_control", "control", "files",
                     "names", "cell_types", "perturbations", "batches", "genes", "count_genes", "features",
                     "needs_counts", "input_dim", "output_dim", "pert_dim", "batch_dim", "gene_dim", "hvg_dim"):
            setattr(self, name, getattr(experiment, name))
        self.toml, self.streamed, self._store = experiment.plan.path, store.streamed, store

    perturbation_features = Experiment.perturbation_features
    dims = Experiment.dims
    maps = Experiment.maps
    rows = Experiment.rows

    def read(self, rows: np.ndarray, which: str = "input", device: torch.device | str = "cpu") -> torch.Tensor:
        """Expression of these cells, [n] -> [n, D] float32 on the device; which: "input" or "counts"."""
        return self._store.rows(rows, which).to(device)


def open_cells(*, toml: str | Path, pert_col: str = "gene", cell_type_key: str = "cell_type",
               batch_col: str | None = "gem_group", control_pert: str = "non-targeting",
               embed_key: str | None = "X_hvg", output_space: str = "gene", counts: str = "auto", strict: bool = True,
               zeroshot_controls: bool = True, val_fraction: float = 0.1, seed: int = 42,
               perturbation_features_file: str | None = None, ram_budget_gb: float = 8.0,
               folder: str | Path = "data/cells") -> Cells:
    """The cells that a TOML names. Raises DataError."""
    cfg = SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("toml", "folder")},
                          toml_config_path=str(toml))
    experiment = Experiment(cfg)
    return Cells(experiment, Store(experiment, "cpu", cfg))
