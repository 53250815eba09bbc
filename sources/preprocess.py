"""Counts of cells to expression: normalise, log1p, choose variable genes."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from scipy.sparse import csr_array

from common.errors import DataError
from sources.h5ad import H5ad, Matrix, as_dense, looks_log1p, matrix_space, new_h5ad, write_frame
from sources.shared import progress, suggest


def log_normalized(data: np.ndarray, totals: np.ndarray, target_sum: float) -> np.ndarray:
    """log(1 + target_sum x / total), float32."""
    return np.log1p(data * (target_sum / totals)).astype(np.float32)


def variable_genes(sums: np.ndarray, squares: np.ndarray, cells: int, most: int, bins: int = 20) -> dict:
    """The genes of largest normalised dispersion (Seurat's, Satija et al. 2015, as scanpy does it), as columns of var.

    Dispersion is log(variance / mean) of the normalised counts, standardised within `bins` equal ranges of the log
    mean; a gene alone in its range gets 1, one that never varies is not taken, and ties are all taken.

    Args:
        sums, squares: sums over the cells of expm1(X) and of its square, float64 [genes].
        cells: how many there are, those with a zero too. most: genes to take.
    Returns:
        highly_variable, bool, and means, dispersions, dispersions_norm, float64: [genes] each, named as by scanpy.
    """
    # Mean and variance of a gene over the cells; the zeros of a sparse matrix are in `cells` alone.
    mean = sums / cells
    spread = squares / cells - mean**2
    spread[spread <= 1e-12 * mean**2] = 0  # it is rounding
    variance = spread * cells / max(cells - 1, 1)
    mean[mean == 0] = 1e-12
    ratio = variance / mean
    dispersion = np.log(np.where(ratio > 0, ratio, np.nan))
    level = np.log1p(mean)
    # Dispersion falls with the mean, so a gene is compared with those of its own range of the mean.
    edges = np.linspace(level.min(), level.max(), bins + 1)
    group = np.searchsorted(edges[1:-1], level)
    score = np.full(len(mean), np.nan)
    for b in range(bins):
        here = (group == b) & np.isfinite(dispersion)
        members = dispersion[here]
        if len(members) > 1:
            scale = members.std(ddof=1) or np.nan  # all alike: no score
            score[here] = (members - members.mean()) / scale
        else:
            score[here] = 1  # alone in its range
    # The score of the last gene to be taken; with it come all that have the same.
    known = np.sort(score[np.isfinite(score)])[::-1]
    if len(known):
        least = known[min(most, len(known)) - 1]
        chosen = score >= least
    else:
        chosen = np.zeros(len(mean), bool)
    return {
        "highly_variable": chosen,
        "means": level,
        "dispersions": dispersion,
        "dispersions_norm": score,
    }


def checked_counts(cells: H5ad, layer: str, columns: dict[str, str], control_pert: str) -> tuple[Matrix, dict, bool]:
    """(matrix, its check, whether it is log1p already); DataError if it is neither that nor counts.

    columns: pert_col, cell_type_key, batch_col -> obs column, those that must be there.
    """
    names = {}
    for key, column in columns.items():
        _, names[key] = cells.column(column)
    if control_pert and control_pert not in names["pert_col"]:
        hint = suggest(control_pert, names["pert_col"])
        raise DataError(f"{cells.path}: no cell has {columns['pert_col']} = {control_pert!r}{hint}")
    matrix = cells.matrix(layer or None)
    if matrix.shape[1] != cells.n_vars:
        raise DataError(f"{matrix.where} has {matrix.shape[1]} columns for {cells.n_vars} genes: choose X or a layer")
    values = matrix.check()
    log1p = looks_log1p(values)
    usable = values["integer"] or log1p
    if values["min"] < 0 or not usable:
        fractions = "" if values["integer"] else ", fractions among them"
        raise DataError(
            f"{matrix.where} holds values from {values['min']:g} to {values['max']:g}{fractions}: "
            "neither counts nor log1p; if the counts are elsewhere, "
            f"use --layer= one of {', '.join(cells.keys)}"
        )
    return matrix, values, log1p


def expression(matrix: Matrix, totals: np.ndarray, target_sum: float | None, text: str
               ) -> Iterator[tuple[slice, csr_array, csr_array]]:
    """(rows of the new file, expression, counts) of every block; no stored zeros, no empty cells.

    Expression is log1p of the normalised counts; with target_sum None, what the matrix holds.

    Args:
        totals: counts of each cell, [cells]. text: what the progress bar says.
    """
    written = 0
    for start, stop, block in progress(matrix.blocks(), text, "blocks"):
        total = totals[start:stop]
        filled = total > 0  # an empty cell is left out
        counts = csr_array(block)[filled]
        counts.eliminate_zeros()
        values = counts.data
        if target_sum:
            total_of_value = np.repeat(total[filled], np.diff(counts.indptr))
            values = log_normalized(values, total_of_value, target_sum)
        logged = csr_array((values, counts.indices, counts.indptr), shape=counts.shape)
        rows = slice(written, written + counts.shape[0])
        yield rows, logged, counts
        written = rows.stop


def write_expression(file: h5py.File, blocks: Iterator[tuple], shape: tuple, nnz: int, keep_counts: bool) -> np.ndarray:
    """X, and layers/counts if kept, of a new file; returns sums over cells of expm1(X) and its squares [2, genes].

    Args:
        blocks: of expression(). shape: (cells, genes) of the new file. nnz: values other than 0.
    """
    expression_node = matrix_space(file, "X", shape, nnz)
    counts_node = matrix_space(file["layers"], "counts", shape, nnz) if keep_counts else None
    pointers = np.zeros(shape[0] + 1, np.int64)
    moments = np.zeros((2, shape[1]))
    filled = 0  # values written
    for rows, values, counts in blocks:
        part = slice(filled, filled + values.nnz)
        expression_node["data"][part] = values.data
        expression_node["indices"][part] = values.indices
        if keep_counts:
            counts_node["data"][part] = counts.data
            counts_node["indices"][part] = counts.indices
        pointers[rows.start + 1 : rows.stop + 1] = filled + values.indptr[1:]
        filled = part.stop
        # Variable genes are chosen on normalised counts, the logarithm taken back.
        rate = np.expm1(values.data.astype(np.float64))
        moments[0] += np.bincount(values.indices, rate, shape[1])
        moments[1] += np.bincount(values.indices, rate**2, shape[1])
    expression_node["indptr"][...] = pointers
    if keep_counts:
        counts_node["indptr"][...] = pointers
    return moments


def write_variable(file: h5py.File, blocks: Iterator[tuple], shape: tuple, chosen: np.ndarray) -> None:
    """obsm/X_hvg of a new file: the chosen genes [genes] of the blocks, dense."""
    space = matrix_space(file["obsm"], "X_hvg", shape)
    columns = np.flatnonzero(chosen)
    for rows, values, _ in blocks:
        space[rows] = values[:, columns].toarray()


def copy_obsm(file: h5py.File, cells: H5ad, keep: np.ndarray) -> None:
    """The kept rows, bool [cells], of the other matrices in obsm of the input."""
    for key in cells.keys:
        if not key.startswith("obsm/") or key == "obsm/X_hvg":
            continue
        matrix = cells.matrix(key)
        name = key.removeprefix("obsm/")
        shape = (int(keep.sum()), matrix.shape[1])
        space = matrix_space(file["obsm"], name, shape)
        written = 0
        for start, stop, block in matrix.blocks():
            rows = as_dense(block)[keep[start:stop]]
            space[written : written + len(rows)] = rows
            written += len(rows)


def preprocess(
    *,
    input: str = "",
    layer: str = "",
    output: str = "",
    target_sum: float = 1e4,
    num_hvgs: int = 2_000,
    drop_empty: bool = False,
    keep_counts: bool = False,
    pert_col: str = "",
    cell_type_key: str = "",
    batch_col: str = "",
    control_pert: str = "",
    out_dir: str = "data/state",
) -> dict:
    """Counts of an h5ad -> X log1p CSR, obsm X_hvg; returns numbers of cells and genes.

    Three passes over blocks of rows: check, write X and sum up the genes, write X_hvg; memory does not grow with cells
    but for obs. Raises DataError for what is neither counts nor log1p, and for cells without counts unless drop_empty.
    """
    path = Path(output or Path(out_dir) / Path(input).name)
    if path.exists() and Path(input).exists() and path.samefile(input):
        raise DataError(f"{path} is the input: give another --output")
    columns = {}
    for key, column in (("pert_col", pert_col), ("cell_type_key", cell_type_key), ("batch_col", batch_col)):
        if column:
            columns[key] = column
    if control_pert:
        columns.setdefault("pert_col", "gene")

    with H5ad(input) as cells:
        matrix, values, log1p = checked_counts(cells, layer, columns, control_pert)
        totals = values["row_sums"]
        keep = totals > 0
        empty = int((~keep).sum())
        if empty and (not drop_empty or empty == cells.n_obs):
            first = int(keep.argmin())
            raise DataError(
                f"{matrix.where} has {empty:,} cells without any count, first cell {first} "
                f"({cells.obs_names[first]}): leave them out with --drop_empty"
            )
        scale = None if log1p else target_sum
        shape = (int(keep.sum()), cells.n_vars)
        obs = {name: column[keep] for name, column in cells.frame("obs").items()}
        with new_h5ad(path, cells.obs_names[keep], obs, {"log1p": {}}) as file:
            # Which genes vary is known only when all cells were written, so X_hvg takes another pass.
            blocks = expression(matrix, totals, scale, "expression")
            sums, squares = write_expression(file, blocks, shape, values["nnz"], keep_counts)
            genes = variable_genes(sums, squares, shape[0], num_hvgs)
            chosen = genes["highly_variable"]
            width = int(chosen.sum())
            if not width:
                raise DataError(f"{matrix.where}: no gene differs between cells, so there are none to choose")
            write_frame(file, "var", cells.var_names, {**cells.frame("var"), **genes})
            blocks = expression(matrix, totals, scale, "X_hvg")
            write_variable(file, blocks, (shape[0], width), chosen)
            copy_obsm(file, cells, keep)

    how = "log1p already, so kept as they are" if log1p else f"counts to {target_sum:g} a cell, log1p"
    limit = f", all that vary: num_hvgs is {num_hvgs:,}" if width < num_hvgs else ""
    print(
        f"preprocess: {shape[0]:,} cells ({empty:,} empty ones left out), {shape[1]:,} genes; {how}; "
        f"X_hvg has the {width:,} most variable genes{limit}; written to {path}"
    )
    return {
        "cells": shape[0],
        "genes": shape[1],
        "hvgs": width,
        "dropped": empty,
        "log1p": log1p,
        "path": str(path),
    }
