"""Cells of an experiment: what each is, its splits, and its expression out of the prepared folder (cell_store.py)."""

import hashlib
import pickle
import shlex
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import CheckpointError, DataError
from sources.cell_store import (
    Dense,
    Sparse,
    content_digest,
    find_store,
    load_codes,
    make_store,
    read_meta,
    store_hash,
    stored_survey,
    wait_for_store,
    write_store,
)
from sources.foreign_checkpoints import read_checkpoint
from sources.h5ad import H5ad
from sources.labels import LABELS, in_words, no_control
from sources.shared import counted, is_first_of_machine, suggest
from sources.splits import (
    SPLITS,
    Plan,
    assign_splits,
    check_controls,
    in_split,
    objection,
    read_toml,
    with_validation,
)
from sources.starter import toml_of
from sources.survey import CODES, Survey, labelled, matrix_keys, survey_files


# ---------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------
@dataclass(kw_only=True)
class Reading:
    """How the cells of a TOML are read; the settings are train_state.py's."""

    pert_col: str = "gene"
    cell_type_key: str = "cell_type"
    batch_col: str | None = "gem_group"
    control_pert: str = "non-targeting"
    embed_key: str | None = "X_hvg"
    output_space: str = "gene"
    drop_unlabelled: bool = False
    strict: bool = True
    zeroshot_controls: bool = True
    val_fraction: float = 0.1
    seed: int = 42
    perturbation_features_file: str | None = None

    def columns(self) -> dict[str, str | None]:
        """Columns of obs by what they say of a cell."""
        return {"cell_type": self.cell_type_key, "perturbation": self.pert_col, "batch": self.batch_col}

    def keys(self) -> dict[str, str]:
        """Matrices by what they are for."""
        return matrix_keys(self.embed_key, self.output_space)


class Cells:
    """The cells of a TOML: what each is, its splits, and its expression.

    Attributes over the N cells that have a value in every column, in the order of the files and of the rows in them:
    file, row, cell_type, perturbation, batch: codes int32 [N]; member uint8 [N], bit s for SPLITS[s]; is_control
    bool [N]. control: the code of control_pert. files, names (the data set of each file), cell_types, perturbations,
    batches, genes (columns of the input), count_genes (columns of the counts, or None): lists. features:
    [P, pert_dim], or None: one-hot. Dimensions as cell-load's var_dims: input_dim, output_dim, gene_dim, hvg_dim,
    pert_dim, batch_dim. streamed: the matrices exceed ram_budget_gb and are read from disk. toml, store: paths.
    fingerprint: 16 hex digits of all that a run sees: the cells and their expression, what the codes and columns mean,
    which cells are in which split, the features of perturbations; not of paths and times. "" without expression.
    assigned: member as the TOML has it, before a seed draws a validation split. task: {toml: 16 hex digits of the cells
    alone, and 16 of the cells as assigned}: by it runs of other seeds are compared.

    Raises DataError: cells without a value in a column, unless drop_unlabelled; no control cells in a file; cell types
    and perturbations of the TOML that are not there; perturbed cells without control cells of their type and file;
    files of different genes.
    """

    fingerprint = ""  # of the content; a checkpoint keeps it
    task: dict[str, str] = {}

    def __init__(self, plan: Plan, survey: Survey, reading: Reading):
        self.toml = plan.path
        self.files = plan.files
        self.names = plan.names
        # Of all that were stored.
        self.labelled = labelled(survey.codes, reading.columns(), self.files, reading.drop_unlabelled)
        lost = int((~self.labelled).sum())
        if lost:
            objection(False, f"{plan.path}: left out are {counted(lost, 'cell')} without a value in a column")
        for name in CODES:
            codes = survey.codes[name]
            setattr(self, name, codes[self.labelled] if lost else codes)  # what is whole stays mapped
        self.cell_types = survey.cell_types
        self.perturbations = survey.perturbations
        self.batches = survey.batches
        self.genes = survey.genes
        self.count_genes = survey.count_genes
        self._find_controls(reading.pert_col, reading.control_pert)
        for difference in survey.differences:
            objection(reading.strict, difference)

        self.features = None
        features = reading.perturbation_features_file
        if features:
            self.features = read_features(features, self.perturbations, reading.control_pert, reading.strict)
        self.input_dim = len(self.genes)
        self.output_dim = self.input_dim
        self.gene_dim = survey.gene_dim
        self.hvg_dim = survey.hvg_dim
        self.pert_dim = len(self.perturbations) if self.features is None else self.features.shape[1]
        self.batch_dim = len(self.batches)

        self.assigned = assign_splits(plan, self, reading.strict, reading.zeroshot_controls)
        self.member = with_validation(self.assigned, self, reading.val_fraction, reading.seed)
        check_controls(self, self.member, reading.strict, bool(reading.embed_key), reading.pert_col)
        # Until open_matrices.
        self.store = None
        self.matrices = {}
        self.streamed = False

    def open_matrices(self, store: Path, meta: dict, ram_budget_gb: float) -> None:
        """Map the matrices of a prepared folder, or what exceeds the budget: find it in its files."""
        self.store = store
        place = load_codes(store, "place")
        self.place = place if self.labelled.all() else place[self.labelled]
        content = content_digest(meta)
        self.fingerprint = self._identity(content, self.member)
        self.task = {str(self.toml): f"{content}-{self._identity(content, self.assigned)}"}
        size = 0  # bytes
        for entry in meta["matrices"].values():
            size += sum(meta["sizes"][file] for file in entry["files"])
        self.streamed = size > ram_budget_gb * 1e9
        for which, entry in meta["matrices"].items():
            kind = Sparse if entry["format"] == "csr" else Dense
            self.matrices[which] = kind(store, which, entry["columns"], held=not self.streamed)

    def _identity(self, content: str, member: np.ndarray) -> str:
        """16 hex digits of what is stored, and of what this TOML and the settings make of it."""
        arrays = [getattr(self, name) for name in CODES] + [member, self.is_control]
        if self.features is not None:
            arrays.append(self.features.numpy())
        checksums = [zlib.crc32(np.ascontiguousarray(array)) for array in arrays]
        return hashlib.sha256(f"{content} {checksums}".encode()).hexdigest()[:16]

    def _find_controls(self, pert_col: str, control_pert: str) -> None:
        """control and is_control; DataError for a file without control cells."""
        self.control = -1
        if control_pert in self.perturbations:
            self.control = self.perturbations.index(control_pert)
        self.is_control = self.perturbation == self.control
        controls = np.bincount(self.file[self.is_control], minlength=len(self.files))
        for f, path in enumerate(self.files):
            if not controls[f]:
                codes = np.unique(self.perturbation[self.file == f])
                known = [self.perturbations[code] for code in codes]
                told, likely = no_control(pert_col, control_pert, known)
                again = f"; try {in_words({'control_pert': likely})}" if likely else ""
                raise DataError(f"{path}: {told}{again}")

    @property
    def needs_counts(self) -> bool:
        """Whether a decoder has counts of genes to learn."""
        return self.count_genes is not None

    @property
    def perturbation_features(self) -> torch.Tensor:
        """[P, pert_dim] float32; one-hot without a perturbation_features_file."""
        if self.features is None:
            return torch.eye(self.pert_dim)
        return self.features

    def dims(self) -> dict:
        """Sizes for a model, as cell-load's var_dims; decodes: a decoder has counts of genes to learn."""
        names = ("input_dim", "output_dim", "pert_dim", "batch_dim", "gene_dim", "hvg_dim")
        sizes = {name: int(getattr(self, name)) for name in names}
        return {**sizes, "decodes": self.needs_counts}

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
        if not controls:
            chosen = chosen & ~self.is_control
        return np.flatnonzero(chosen)

    def read(self, rows: np.ndarray, which: str = "input", device: torch.device | str = "cpu") -> torch.Tensor:
        """Expression of these cells, [n] -> [n, D] float32 on the device; which: "input" or "counts"."""
        return self.matrices[which].read(self.place[rows], torch.device(device))


def read_plan(toml: str | Path, reading: Reading) -> Plan:
    """What a TOML says of who trains, or an h5ad file's starter. Raises DataError."""
    labels = {name: getattr(reading, name) for name in LABELS}
    return read_toml(toml_of(toml, reading.keys()["input"], **labels), reading.strict)


def open_cells(
    *,
    toml: str | Path,
    counts: str = "auto",
    ram_budget_gb: float = 8.0,
    folder: str | Path = "data/cells",
    **settings,
) -> Cells:
    """The cells that a TOML names; settings: those of Reading. Raises DataError.

    Where they are not prepared yet, or the files have changed since, this makes a folder of arrays in `folder`: the
    first rank of a machine does, the others wait.
    """
    reading = Reading(**settings)
    plan = read_plan(toml, reading)
    columns = reading.columns()
    keys = reading.keys()
    name = store_hash(plan.files, columns, keys, counts)
    is_first_rank = is_first_of_machine()
    cells = None
    if is_first_rank and not find_store(folder, name):
        survey = survey_files(plan.files, columns, keys, reading.control_pert)
        cells = Cells(plan, survey, reading)  # what is wrong with the TOML is said before anything is written

        def write(work: Path) -> None:
            write_store(work, plan, survey, keys, counts, ram_budget_gb)

        make_store(Path(folder) / f"{plan.path.stem}-{name}", write)
    store = wait_for_store(folder, name)
    meta = read_meta(store, values=is_first_rank)  # who reads expression for the others
    if cells is None:
        cells = Cells(plan, stored_survey(store, meta), reading)
    cells.open_matrices(store, meta, ram_budget_gb)
    return cells


def prepare_cells(*, toml: str = "", **settings) -> dict:
    """Make the cells of a TOML ready, as open_cells does at the first start; returns what they are and where."""
    cells = open_cells(toml=toml, **settings)
    size = sum(file.stat().st_size for file in cells.store.iterdir())
    print(
        f"{toml}: {counted(len(cells.file), 'cell')} x {counted(cells.input_dim, 'column')}, {size / 1e9:.2f} GB, "
        f"are ready in {cells.store}"
    )
    return {
        "folder": str(cells.store),
        "cells": len(cells.file),
        "columns": cells.input_dim,
        "bytes": size,
    }


# ---------------------------------------------------------------------------------------------------------------
# Without expression
# ---------------------------------------------------------------------------------------------------------------
def survey_toml(toml: str | Path, reading: Reading) -> Cells:
    """The cells that a TOML names without their expression, read from its files: nothing is prepared."""
    plan = read_plan(toml, reading)
    return Cells(plan, survey_files(plan.files, reading.columns(), reading.keys(), reading.control_pert), reading)


def has_hvg(path: Path) -> bool:
    with H5ad(path) as cells:
        return "obsm/X_hvg" in cells.keys


def inspect(path: str | Path, **settings) -> dict:
    """Print and return how many cells are in each split: in all, of each cell type, of each perturbation.

    settings: those of Reading. Reads no expression.
    """
    reading = Reading(**settings)
    if "embed_key" not in settings:
        files = read_toml(path, reading.strict).files
        if not all(has_hvg(file) for file in files):  # then X is what there is to train on
            reading.embed_key = None
            reading.output_space = "all"
    cells = survey_toml(path, reading)
    splits = {split: count_cells(cells, split) for split in SPLITS}

    skipped = int((cells.member == 0).sum())
    note = f"; in no split: {counted(skipped, 'cell')}" if skipped else ""
    print(
        f"{path}: {counted(len(cells.file), 'cell')} in {counted(len(cells.files), 'file')}, "
        f"{counted(cells.input_dim, 'column')}, {counted(len(cells.cell_types), 'cell type')}, "
        f"{counted(len(cells.perturbations) - 1, 'perturbation')}, "
        f"{counted(cells.batch_dim, 'batch', 'batches')}{note}"
    )
    print_line("", SPLITS)
    print_line("perturbed cells", [splits[split]["perturbed"] for split in SPLITS])
    print_line("control cells", [splits[split]["control"] for split in SPLITS])
    print("  (the control cells of a type serve each of its splits)")
    for title, names in (("cell_type", cells.cell_types), ("perturbation", cells.perturbations)):
        for name in names:
            print_line(f"{title} {name}", [splits[split][title].get(name, 0) for split in SPLITS])
    words = in_words({name: getattr(reading, name) or "" for name in LABELS})
    if not reading.embed_key:
        words += " --embed_key=none --output_space=all"
    print(f"next: python train_state.py --toml={shlex.quote(str(path))} {words}")
    return {
        "toml": str(path),
        "files": [str(file) for file in cells.files],
        "genes": cells.input_dim,
        "splits": splits,
    }


def count_cells(cells: Cells, split: str) -> dict:
    """Cells of a split: perturbed, control, and of each cell_type and perturbation that it has."""
    rows = cells.rows(split, controls=True)
    controls = int(cells.is_control[rows].sum())
    return {
        "perturbed": len(rows) - controls,
        "control": controls,
        "cell_type": count_names(cells.cell_type[rows], cells.cell_types),
        "perturbation": count_names(cells.perturbation[rows], cells.perturbations),
    }


def count_names(codes: np.ndarray, names: list[str]) -> dict[str, int]:
    """How often each name occurs, of those that do."""
    counts = np.bincount(codes, minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def print_line(title: str, values) -> None:
    """A title and a number or name of each split in columns; - for none."""
    columns = [value if isinstance(value, str) else f"{value:,}" if value else "-" for value in values]
    print(f"{title:32}" + "".join(f"{text:>12}" for text in columns))


# ---------------------------------------------------------------------------------------------------------------
# Features of perturbations
# ---------------------------------------------------------------------------------------------------------------
def load_features(path: str | Path) -> dict[str, torch.Tensor]:
    """Vectors float32 of one length by name, from a .pt or .npz dict. Raises DataError for anything else."""
    if not Path(path).is_file():
        raise DataError(f"{path} cannot be read: there is no such file (perturbation_features_file)")
    try:
        with open(path, "rb") as file:
            if str(path).endswith(".npz"):
                table = dict(np.load(file))
            else:
                table = load_table(file, path)
        vectors = {str(name): torch.as_tensor(vector, dtype=torch.float32) for name, vector in table.items()}
    except Exception as error:  # a torn file raises whatever its bytes happen to ask for
        reason = (str(error).splitlines() or ["it is damaged"])[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # torch's own text is advice to run what is in there
            reason = "it is damaged, or holds other things than tensors (.npz takes arrays)"
        raise DataError(f"{path} cannot be read as a .pt or .npz dict name -> vector: {reason}") from error
    shapes = sorted({tuple(vector.shape) for vector in vectors.values()})
    of_one_length = len(shapes) == 1 and len(shapes[0]) == 1
    if not of_one_length or not all(vector.isfinite().all() for vector in vectors.values()):
        raise DataError(f"{path} should hold finite vectors of one length; their shapes are {shapes!s:.200}")
    return vectors


def load_table(file, path: str | Path) -> dict:
    """What torch.save wrote, names of numpy (as other systems have them) among it. No code of it runs."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            torn = archive.testzip()  # torch does not look at the checksums that it writes
        if torn:
            raise ValueError(f"it is damaged, {torn} is not what was written")
    file.seek(0)
    try:
        return torch.load(file, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        try:
            table = read_checkpoint(path)
        except CheckpointError:
            table = None
        # Whatever else was in there is an empty dict now.
        is_table = isinstance(table, dict) and table
        if not is_table or not all(isinstance(value, torch.Tensor) for value in table.values()):
            raise
        return table


def read_features(path: str | Path, perturbations: list[str], control_pert: str, strict: bool) -> torch.Tensor:
    """[P, pert_dim] of a perturbation_features_file; zeros for the control if it has none."""
    vectors = load_features(path)
    missing = [name for name in perturbations if name not in vectors and name != control_pert]
    if missing:
        objection(
            strict,
            f"{path} has no vector for {counted(len(missing), 'perturbation')}, such as {missing[0]!r}"
            f"{suggest(missing[0], vectors)}; with strict=False they are zeros, as the control",
        )
    zero = torch.zeros_like(next(iter(vectors.values())))
    return torch.stack([vectors.get(name, zero) for name in perturbations])
