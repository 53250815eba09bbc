"""Counts of cells to expression: normalise, log1p, choose variable genes."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np

from common.errors import DataError
from sources.h5ad import H5ad, Matrix, as_csr, as_dense, looks_log1p, matrix_space, new_h5ad, write_frame
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
    mean = sums / cells
    spread = squares / cells - mean**2
    variance = np.where(spread > 1e-12 * mean**2, spread, 0) * cells / max(cells - 1, 1)  # below, it is rounding
    mean[mean == 0] = 1e-12
    ratio = variance / mean
    dispersion, level = np.log(np.where(ratio > 0, ratio, np.nan)), np.log1p(mean)
    edges = np.linspace(level.min(), level.max(), bins + 1)
    group, score = np.searchsorted(edges[1:-1], level), np.full(len(mean), np.nan)
    for b in range(bins):
        here = (group == b) & np.isfinite(dispersion)
        center, scale = (dispersion[here].mean(), dispersion[here].std(ddof=1)) if here.sum() > 1 else (0, 1)
        score[here] = (dispersion[here] - center) / (scale or np.nan) if here.sum() > 1 else 1
    known = np.sort(score[np.isfinite(score)])[::-1]
    chosen = score >= known[min(most, len(known)) - 1] if len(known) else np.zeros(len(mean), bool)
    return {"highly_variable": chosen, "means": level, "dispersions": dispersion, "dispersions_norm": score}


def checked_counts(cells: H5ad, cfg) -> tuple[Matrix, dict, bool]:
    """(matrix, its check, whether it is log1p already); DataError if it is neither that nor counts."""
    columns = {k: getattr(cfg, k) for k in ("pert_col", "cell_type_key", "batch_col") if getattr(cfg, k)}
    if cfg.control_pert:
        columns.setdefault("pert_col", "gene")
    names = {key: cells.column(column)[1] for key, column in columns.items()}
    if cfg.control_pert and cfg.control_pert not in names["pert_col"]:
        raise DataError(f"{cells.path}: no cell has {columns['pert_col']} = {cfg.control_pert!r}"
                        + suggest(cfg.control_pert, names["pert_col"]))
    matrix = cells.matrix(cfg.layer or None)
    if matrix.shape[1] != cells.n_vars:
        raise DataError(f"{matrix.where} has {matrix.shape[1]} columns for {cells.n_vars} genes: choose X or a layer")
    found = matrix.check()
    log1p = looks_log1p(found)
    if found["min"] < 0 or not (found["integer"] or log1p):
        raise DataError(f"{matrix.where} holds values from {found['min']:g} to {found['max']:g}"
                        + ", fractions among them" * (not found["integer"]) + ": neither counts nor log1p; if the "
                        f"counts are elsewhere, use --layer= one of {', '.join(cells.keys)}")
    return matrix, found, log1p


def expression(matrix: Matrix, totals: np.ndarray, target_sum: float | None, text: str) -> Iterator[tuple]:
    """(rows written, values, row of each within the block, indices, counts) of every block; no zeros, no empty cells.

    values are log1p of the normalised counts; with target_sum None, what the matrix holds.
    """
    done = 0
    for start, stop, block in progress(matrix.blocks(), text, "blocks"):
        data, indices, pointers = as_csr(block)
        solid = data != 0
        row = np.repeat(np.arange(start, stop), np.diff(pointers))[solid]
        data, indices, kept = data[solid], indices[solid], (totals[start:stop] > 0).cumsum()
        values = log_normalized(data, totals[row], target_sum) if target_sum else data
        yield slice(done, done + int(kept[-1])), values, kept[row - start] - 1, indices, data
        done += int(kept[-1])


def write_expression(file: h5py.File, blocks: Iterator[tuple], shape: tuple, nnz: int, keep_counts: bool) -> np.ndarray:
    """X, and layers/counts if kept, of a new file; returns sums over cells of expm1(X) and its squares [2, genes]."""
    nodes = [matrix_space(group, name, shape, nnz)
             for group, name in ((file, "X"), (file["layers"], "counts"))[: 1 + keep_counts]]
    pointers, moments, filled = np.zeros(shape[0] + 1, np.int64), np.zeros((2, shape[1])), 0
    for rows, values, row, indices, counts in blocks:
        part = slice(filled, filled + len(values))
        for node, data in zip(nodes, (values, counts), strict=False):
            node["data"][part], node["indices"][part] = data, indices
        pointers[rows.start + 1 : rows.stop + 1] = filled + np.bincount(row, minlength=rows.stop - rows.start).cumsum()
        rate, filled = np.expm1(values.astype(np.float64)), part.stop
        moments += [np.bincount(indices, rate**power, shape[1]) for power in (1, 2)]
    for node in nodes:
        node["indptr"][...] = pointers
    return moments


def write_obsm(file: h5py.File, cells: H5ad, blocks: Iterator[tuple], chosen: np.ndarray, keep: np.ndarray) -> None:
    """obsm of a new file: X_hvg, the chosen genes [genes] of the blocks, and the kept rows of what the input has."""
    place, shape = chosen.cumsum() - 1, (int(keep.sum()), int(chosen.sum()))
    space = matrix_space(file["obsm"], "X_hvg", shape)
    for rows, values, row, indices, _ in blocks:
        block, taken = np.zeros((rows.stop - rows.start, shape[1]), np.float32), chosen[indices]
        block[row[taken], place[indices[taken]]] = values[taken]
        space[rows] = block
    for key in (k for k in cells.keys if k.startswith("obsm/") and k != "obsm/X_hvg"):
        matrix, done = cells.matrix(key), 0
        space = matrix_space(file["obsm"], key[5:], (shape[0], matrix.shape[1]))
        for start, stop, block in matrix.blocks():
            part = as_dense(block, matrix.shape[1])[keep[start:stop]]
            space[done : done + len(part)], done = part, done + len(part)


def preprocess(*, input: str = "", layer: str = "", output: str = "", target_sum: float = 1e4, num_hvgs: int = 2_000,
               drop_empty: bool = False, keep_counts: bool = False, pert_col: str = "",
               cell_type_key: str = "", batch_col: str = "", control_pert: str = "", out_dir: str = "data/state"
               ) -> dict:
    """Counts of an h5ad -> X log1p CSR, obsm X_hvg; returns numbers of cells and genes.

    Three passes over blocks of rows: check, write X and sum up the genes, write X_hvg; memory does not grow with cells
    but for obs. Raises DataError for what is neither counts nor log1p, and for cells without counts unless drop_empty.
    """
    cfg = SimpleNamespace(**locals())
    path = Path(cfg.output or Path(cfg.out_dir) / Path(cfg.input).name)
    if path.exists() and Path(cfg.input).exists() and path.samefile(cfg.input):
        raise DataError(f"{path} is the input: give another --output")
    with H5ad(cfg.input) as cells:
        matrix, found, log1p = checked_counts(cells, cfg)
        totals, target_sum = found["row_sums"], None if log1p else cfg.target_sum
        keep = totals > 0
        if (empty := int((~keep).sum())) and (not cfg.drop_empty or empty == cells.n_obs):
            first = int(keep.argmin())
            raise DataError(f"{matrix.where} has {empty:,} cells without any count, first cell {first} "
                            f"({cells.obs_names[first]}): leave them out with --drop_empty")
        shape = (int(keep.sum()), cells.n_vars)
        obs = {name: values[keep] for name, values in cells.frame("obs").items()}
        with new_h5ad(path, cells.obs_names[keep], obs, {"log1p": {}}) as file:
            blocks = expression(matrix, totals, target_sum, "expression")
            moments = write_expression(file, blocks, shape, found["nnz"], cfg.keep_counts)
            genes = variable_genes(*moments, shape[0], cfg.num_hvgs)
            if not (width := int(genes["highly_variable"].sum())):
                raise DataError(f"{matrix.where}: no gene differs between cells, so there are none to choose")
            write_frame(file, "var", cells.var_names, {**cells.frame("var"), **genes})
            blocks = expression(matrix, totals, target_sum, "X_hvg")
            write_obsm(file, cells, blocks, genes["highly_variable"], keep)
    print(f"preprocess: {shape[0]:,} cells ({empty:,} empty ones left out), {shape[1]:,} genes; "
          + ("log1p already, so kept as they are; " if log1p else f"counts to {cfg.target_sum:g} a cell, log1p; ")
          + f"X_hvg has the {width:,} most variable genes"
          + f", all that vary: num_hvgs is {cfg.num_hvgs:,}" * (width < cfg.num_hvgs) + f"; written to {path}")
    return {"cells": shape[0], "genes": shape[1], "hvgs": width, "dropped": empty, "log1p": log1p, "path": str(path)}
