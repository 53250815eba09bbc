"""The control cells of one h5ad file, to predict from, and which perturbed cells stand beside them."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from sources.cell_store import read_rows
from sources.h5ad import H5ad
from sources.shared import suggest
from sources.survey import align, column_names


@dataclass
class Controls:
    """n control cells of a file."""

    rows: np.ndarray  # in the file, ascending [n]
    cell_type: np.ndarray  # codes [n]
    cell_types: list[str]  # what they mean
    batch: np.ndarray | None  # codes [n], if a batch column was asked for
    batches: list[str]
    perturbed: Counter  # {(cell type, perturbation): cells}, names

    @property
    def perturbations(self) -> list[str]:
        """Those that cells of the file have, but for the control."""
        return sorted({name for _, name in self.perturbed})

    def of_type(self, name: str) -> np.ndarray:
        """Places among the control cells."""
        return np.flatnonzero(self.cell_type == self.cell_types.index(name))


def find_controls(
    file: H5ad,
    cell_type_key: str,
    pert_col: str,
    batch_col: str | None,
    control_pert: str,
    drop_unlabelled: bool = False,
) -> Controls:
    """Raises DataError for a column that is not there, and for a cell type without control cells.

    drop_unlabelled: leave cells without a value in a column out, which else is a DataError.
    """
    types, cell_types = file.column(cell_type_key, missing=drop_unlabelled)
    perts, perturbations = file.column(pert_col, missing=drop_unlabelled)
    batch, batches = None, []
    if batch_col:
        batch, batches = file.column(batch_col, missing=drop_unlabelled)
    if control_pert not in perturbations:
        raise DataError(
            f"{file.path} has no control cells: no cell has {pert_col} = {control_pert!r}; "
            "say --columns='{\"control_pert\": \"NAME\"}'"
        )
    is_known = (types >= 0) & (perts >= 0)  # -1: without a value
    if batch is not None:
        is_known &= batch >= 0
    is_control = is_known & (perts == perturbations.index(control_pert))
    for code, name in enumerate(cell_types):
        of_type = types == code
        if not (is_control & of_type).any():
            raise DataError(f"{file.path}: cell type {name} has no control cells to start from")
    perturbed = Counter()
    pairs, counts = np.unique(np.stack([types, perts])[:, is_known], axis=1, return_counts=True)
    for (t, p), count in zip(pairs.T, counts.tolist(), strict=True):
        if perturbations[p] != control_pert:
            perturbed[cell_types[t], perturbations[p]] = count
    rows = np.flatnonzero(is_control)
    return Controls(
        rows=rows,
        cell_type=types[rows],
        cell_types=cell_types,
        batch=None if batch is None else batch[rows],
        batches=batches,
        perturbed=perturbed,
    )


def gene_order(file: H5ad, embed_key: str | None, genes: list[str] | None) -> tuple[list[str], np.ndarray]:
    """(names of the columns that a model reads, where they are in the file); without a list, all as they are."""
    names, _, _ = align([file.path], [column_names(file, embed_key)], embed_key or "X")
    places = {name: i for i, name in enumerate(names)}
    genes = genes or names
    for gene in genes:
        if gene not in places:
            raise DataError(f"{file.path} has no gene {gene!r}, which this model reads{suggest(gene, names)}")
    return genes, np.array([places[gene] for gene in genes])


def control_expression(file: H5ad, controls: Controls, embed_key: str | None, counts: str, order: np.ndarray
                       ) -> np.ndarray:
    """[n, D] float32, checked."""
    return read_rows(file, embed_key, counts, controls.rows)[:, order]
