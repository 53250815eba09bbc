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
        sums, squares: of expm1(X) over the cells, float64 [genes].
    """
    # Mean and variance of a gene over the cells; the zeros of a sparse matrix are in `cells` alone.
    mean = sums / cells
    spread = squares / cells - mean**2
    spread[spread <= 1e-12 * mean**2] = 0  # it is rounding
    variance = spread * cells / max(cells - 1, 1)
    mean[mean == 0] = 1e-12
    ratio = variance / mean
    dispersion, level = np.log(np.where(ratio > 0, ratio, np.nan)), np.log1p(mean)
    # Dispersion falls with the mean, so a gene is compared with those of its own range of the mean.
    edges = np.linspace(level.min(), level.max(), bins + 1)
    group, score = np.searchsorted(edges[1:-1], level), np.full(len(mean), np.nan)
    for b in range(bins):
        here = (group == b) & np.isfinite(dispersion)
        if here.sum() > 1:
            center, scale = dispersion[here].mean(), dispersion[here].std(ddof=1)
            score[here] = (dispersion[here] - center) / (scale or np.nan)
        else:
            score[here] = 1  # alone in its range
    # The score of the last gene to be taken; with it come all that have the same.
    known = np.sort(score[np.isfinite(score)])[::-1]
    chosen = score >= known[min(most, len(known)) - 1] if len(known) else np.zeros(len(mean), bool)
    return {"highly_variable": chosen, "means": level, "dispersions": dispersion, "dispersions_norm": score}


def checked_counts(cells: H5ad, layer: str, columns: dict[str, str], control_pert: str) -> tuple[Matrix, dict, bool]:
    """(matrix, its check, whether it is log1p already); DataError if it is neither that nor counts.

    columns: pert_col, cell_type_key, batch_col -> obs column, those that must be there.
    """
    names = {key: cells.column(column)[1] for key, column in columns.items()}
    if control_pert and control_pert not in names["pert_col"]:
        raise DataError(f"{cells.path}: no cell has {columns['pert_col']} = {control_pert!r}"
                        + suggest(control_pert, names["pert_col"]))
    matrix = cells.matrix(layer or None)
    if matrix.shape[1] != cells.n_vars:
        raise DataError(f"{matrix.where} has {matrix.shape[1]} columns for {cells.n_vars} genes: choose X or a layer")
    found = matrix.check()
    log1p = looks_log1p(found)
    if found["min"] < 0 or not (found["integer"] or log1p):
        fractions = "" if found["integer"] else ", fractions among them"
        raise DataError(f"{matrix.where} holds values from {found['min']:g} to {found['max']:g}{fractions}: neither "
                        f"counts nor log1p; if the counts are elsewhere, use --layer= one of {', '.join(cells.keys)}")
    return matrix, found, log1p


def expression(matrix: Matrix, totals: np.ndarray, target_sum: float | None, text: str
               ) -> Iterator[tuple[slice, csr_array, csr_array]]:
    """(rows of the new file, expression, counts) of every block; no stored zeros, no empty cells.

    Expression is log1p of the normalised counts; with target_sum None, what the matrix holds.
    """
    written = 0
    for start, stop, block in progress(matrix.blocks(), text, "blocks"):
        total = totals[start:stop]  # 0: an empty cell, which is left out
        counts = csr_array(block)[total > 0]
        counts.eliminate_zeros()
        values = counts.data
        if target_sum:
            values = log_normalized(values, np.repeat(total[total > 0], np.diff(counts.indptr)), target_sum)
        rows = slice(written, written + counts.shape[0])
        yield rows, csr_array((values, counts.indices, counts.indptr), shape=counts.shape), counts
        written = rows.stop


def write_expression(file: h5py.File, blocks: Iterator[tuple], shape: tuple, nnz: int, keep_counts: bool) -> np.ndarray:
    """X, and layers/counts if kept, of a new file; returns sums over cells of expm1(X) and its squares [2, genes]."""
    nodes = [matrix_space(file, "X", shape, nnz)]
    if keep_counts:
        nodes.append(matrix_space(file["layers"], "counts", shape, nnz))
    pointers, moments, filled = np.zeros(shape[0] + 1, np.int64), np.zeros((2, shape[1])), 0
    for rows, values, counts in blocks:
        part = slice(filled, filled + values.nnz)
        for node, block in zip(nodes, (values, counts), strict=False):
            node["data"][part], node["indices"][part] = block.data, block.indices
        pointers[rows.start + 1 : rows.stop + 1] = filled + values.indptr[1:]
        filled = part.stop
        # Variable genes are chosen on normalised counts, the logarithm taken back.
        rate = np.expm1(values.data.astype(np.float64))
        moments[0] += np.bincount(values.indices, rate, shape[1])
        moments[1] += np.bincount(values.indices, rate**2, shape[1])
    for node in nodes:
        node["indptr"][...] = pointers
    return moments


def write_variable(file: h5py.File, blocks: Iterator[tuple], shape: tuple, chosen: np.ndarray) -> None:
    """obsm/X_hvg of a new file: the chosen genes [genes] of the blocks, dense."""
    space = matrix_space(file["obsm"], "X_hvg", shape)
    for rows, values, _ in blocks:
        space[rows] = values[:, np.flatnonzero(chosen)].toarray()


def copy_obsm(file: h5py.File, cells: H5ad, keep: np.ndarray) -> None:
    """The kept rows of the other matrices in obsm of the input."""
    for key in cells.keys:
        if not key.startswith("obsm/") or key == "obsm/X_hvg":
            continue
        matrix, written = cells.matrix(key), 0
        space = matrix_space(file["obsm"], key.removeprefix("obsm/"), (int(keep.sum()), matrix.shape[1]))
        for start, stop, block in matrix.blocks():
            rows = as_dense(block)[keep[start:stop]]
            space[written : written + len(rows)] = rows
            written += len(rows)


def preprocess(*, input: str = "", layer: str = "", output: str = "", target_sum: float = 1e4, num_hvgs: int = 2_000,
               drop_empty: bool = False, keep_counts: bool = False, pert_col: str = "", cell_type_key: str = "",
               batch_col: str = "", control_pert: str = "", out_dir: str = "data/state") -> dict:
    """Counts of an h5ad -> X log1p CSR, obsm X_hvg; returns numbers of cells and genes.

    Three passes over blocks of rows: check, write X and sum up the genes, write X_hvg; memory does not grow with cells
    but for obs. Raises DataError for what is neither counts nor log1p, and for cells without counts unless drop_empty.
    """
    path = Path(output or Path(out_dir) / Path(input).name)
    if path.exists() and Path(input).exists() and path.samefile(input):
        raise DataError(f"{path} is the input: give another --output")
    columns = {"pert_col": pert_col, "cell_type_key": cell_type_key, "batch_col": batch_col}
    columns = {key: column for key, column in columns.items() if column}
    if control_pert:
        columns.setdefault("pert_col", "gene")

    with H5ad(input) as cells:
        matrix, found, log1p = checked_counts(cells, layer, columns, control_pert)
        totals = found["row_sums"]
        keep = totals > 0
        empty = int((~keep).sum())
        if empty and (not drop_empty or empty == cells.n_obs):
            first = int(keep.argmin())
            raise DataError(f"{matrix.where} has {empty:,} cells without any count, first cell {first} "
                            f"({cells.obs_names[first]}): leave them out with --drop_empty")
        scale = None if log1p else target_sum
        shape = (int(keep.sum()), cells.n_vars)
        obs = {name: values[keep] for name, values in cells.frame("obs").items()}
        with new_h5ad(path, cells.obs_names[keep], obs, {"log1p": {}}) as file:
            blocks = expression(matrix, totals, scale, "expression")
            moments = write_expression(file, blocks, shape, found["nnz"], keep_counts)
            genes = variable_genes(*moments, shape[0], num_hvgs)
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
    print(f"preprocess: {shape[0]:,} cells ({empty:,} empty ones left out), {shape[1]:,} genes; {how}; X_hvg has the "
          f"{width:,} most variable genes{limit}; written to {path}")
    return {"cells": shape[0], "genes": shape[1], "hvgs": width, "dropped": empty, "log1p": log1p, "path": str(path)}
