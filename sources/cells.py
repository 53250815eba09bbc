"""Cells of an experiment: what each is, its splits, and its expression out of the prepared folder (cell_store.py)."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from common.errors import DataError
from sources.cell_store import (
    Dense,
    Sparse,
    find_store,
    fingerprint,
    load_codes,
    make_store,
    read_meta,
    stored_survey,
    wait_for_store,
    write_store,
)
from sources.h5ad import H5ad
from sources.shared import suggest
from sources.splits import SPLITS, Plan, assign_splits, check_controls, in_split, objection, read_toml
from sources.survey import CODES, Survey, matrix_keys, survey_files


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
    streamed: the matrices exceed ram_budget_gb and are read from disk. toml, store: paths.

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
        self.store, self.matrices, self.streamed = None, {}, False  # until open_matrices

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
# Without expression
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


# ---------------------------------------------------------------------------------------------------------------
# Features of perturbations
# ---------------------------------------------------------------------------------------------------------------
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
