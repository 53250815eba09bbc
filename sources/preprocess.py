"""Counts of cells to expression: normalise, log1p, choose variable genes."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy.sparse import csr_array

from common.errors import DataError
from common.telling import doing, note
from sources import hdf5
from sources.h5ad import (
    H5ad,
    Matrix,
    attribute,
    encoded,
    is_matrix,
    kind_of_values,
    matrix_space,
    new_h5ad,
    stored,
    write_frame,
)
from sources.labels import check_labels
from sources.shared import counted, progress
from sources.starter import write_starter


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


@dataclass
class Found:
    """A matrix that can be preprocessed."""

    matrix: Matrix
    values: dict  # of its check
    kind: str  # "counts", "log1p" or "normalised, not logged"
    labelled: np.ndarray  # bool [cells]: which have a value in every column that was asked for


def checked_counts(
    cells: H5ad,
    layer: str,
    columns: dict[str, str],
    control_pert: str,
    drop_unlabelled: bool,
) -> Found:
    """The matrix of a layer, its values and what they are; DataError if neither counts nor log1p can be made of them.

    columns: pert_col, cell_type_key, batch_col -> obs column, those that must be there.
    """
    check_labels(cells, columns, control_pert)
    labelled = np.ones(cells.n_obs, bool)
    for column in columns.values():
        codes, _ = cells.column(column, missing=drop_unlabelled)
        labelled &= codes >= 0
    matrix = cells.matrix(layer or None)
    if matrix.key.startswith("obsm/"):
        raise DataError(f"{matrix.where} is not of all genes: choose X, a layer or raw/X")
    with doing(f"looking at {matrix.where}, {counted(cells.n_obs, 'cell')}"):
        values = matrix.check()
    kind = kind_of_values(values)
    layers = [key for key in cells.keys if key != matrix.key and not key.startswith("obsm/")]
    others = "there is no layer beside"
    if layers:
        others = f"if the counts are elsewhere, use --layer= one of {', '.join(layers)}"
    if kind == "nothing but zeros":
        raise DataError(f"{matrix.where} holds nothing but zeros; {others}")
    if kind not in ("counts", "log1p", "normalised, not logged"):
        fractions = "" if values["integer"] else ", fractions among them"
        raise DataError(
            f"{matrix.where} holds values from {values['min']:g} to {values['max']:g}{fractions}: "
            f"neither counts nor log1p; {others}"
        )
    return Found(matrix, values, kind, labelled)


def kept_cells(found: Found, drop_empty: bool) -> np.ndarray:
    """Which cells the new file has, bool [cells]. Raises DataError for cells without counts unless drop_empty."""
    empty = found.values["row_sums"] == 0
    if empty.any() and not drop_empty:
        first = int(empty.argmax())
        raise DataError(
            f"{found.matrix.where} has {counted(empty.sum(), 'cell')} without any count, first cell {first} "
            f"({found.matrix.source.obs_names[first]}): leave them out with --drop_empty"
        )
    keep = found.labelled & ~empty
    if not keep.any():
        raise DataError(f"{found.matrix.where}: no cell has both counts and a value in every column asked for")
    return keep


def values_of(found: Found, keep: np.ndarray) -> int:
    """How many values other than 0 the kept cells have; the others that the check counted have labels missing."""
    if found.labelled.all():
        return found.values["nnz"]  # cells without counts add none
    count = 0
    for start, stop, block in found.matrix.blocks():
        count += int(np.count_nonzero(stored(block[keep[start:stop]])))
    return count


def expression(
    found: Found,
    keep: np.ndarray,
    target_sum: float,
    text: str,
) -> Iterator[tuple[slice, csr_array, csr_array]]:
    """(rows of the new file, expression, what the matrix holds) of every block; no stored zeros.

    Expression is log1p of the counts, scaled to target_sum a cell; of what is log1p already, its natural logarithm.

    Args:
        keep: cells of the new file, bool [cells]. text: what the progress bar says.
    """
    written = 0
    per_log = math.log(found.values["log_base"])  # 1 to base e
    for start, stop, block in progress(found.matrix.blocks(), text, "blocks"):
        kept = keep[start:stop]
        counts = csr_array(block)[kept]
        counts.eliminate_zeros()
        values = counts.data
        if found.kind != "log1p":
            total = found.values["row_sums"][start:stop][kept]
            total_of_value = np.repeat(total, np.diff(counts.indptr))
            values = log_normalized(values, total_of_value, target_sum)
        elif per_log != 1:
            values = (values * per_log).astype(np.float32)
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


def names_in(file: h5py.File, part: str) -> list[str]:
    """What a part of a file holds: a group, or the fields of a compound data set before anndata 0.7."""
    if not hdf5.has(file, part):
        return []
    node = hdf5.member(file, part)
    return list(node.dtype.names or ()) if isinstance(node, h5py.Dataset) else hdf5.names(node)


def copy_obsm(file: h5py.File, cells: H5ad, keep: np.ndarray) -> list[str]:
    """The kept rows, bool [cells], of what obsm has but for X_hvg; returns the names of what cannot be copied."""
    left_out = []
    for name in names_in(cells.file, "obsm"):
        if name == "X_hvg":
            left_out.append("X_hvg (chosen anew)")
            continue
        with cells.guard(f"obsm/{name}"):
            source = hdf5.member(cells.file, "obsm")
            node = source.fields(name)[:] if isinstance(source, h5py.Dataset) else hdf5.member(source, name)
            if isinstance(node, h5py.Group):
                is_copied = copy_group(file["obsm"], name, cells, keep)
            else:
                is_copied = node.shape[:1] == keep.shape and node.dtype.kind in "iufb"
                if is_copied:
                    copy_rows(file["obsm"], name, node, keep)
        if not is_copied:
            left_out.append(name)
    return left_out


def copy_group(group: h5py.Group, name: str, cells: H5ad, keep: np.ndarray) -> bool:
    """The kept rows of a table or a sparse matrix in obsm; False if it is neither."""
    node = hdf5.member(cells.file, f"obsm/{name}")
    if attribute(node, "encoding-type") == "dataframe":
        columns = {column: values[keep] for column, values in cells.frame(f"obsm/{name}").items()}
        write_frame(group, name, cells.obs_names[keep], columns, cells.index_name("obs"))
        return True
    if is_matrix(node):
        copy_sparse(group, name, cells.matrix(f"obsm/{name}"), keep)
        return True
    return False


def copy_rows(group: h5py.Group, name: str, values: np.ndarray | h5py.Dataset, keep: np.ndarray, most: int = 8_192
              ) -> None:
    """The kept rows of an array of any type and number of axes, at most so many at once."""
    space = encoded(group.create_dataset(name, (int(keep.sum()), *values.shape[1:]), values.dtype), "array")
    written = 0
    for start in range(0, len(keep), most):
        part = slice(start, start + most)
        rows = values[part][keep[part]]
        space[written : written + len(rows)] = rows
        written += len(rows)


def copy_sparse(group: h5py.Group, name: str, matrix: Matrix, keep: np.ndarray) -> None:
    """The kept rows of a sparse matrix, as CSR."""
    lengths = [np.diff(block.indptr)[keep[start:stop]] for start, stop, block in matrix.blocks()]
    pointers = np.append(0, np.concatenate(lengths).cumsum())
    node = matrix_space(group, name, (int(keep.sum()), matrix.shape[1]), int(pointers[-1]))
    node["indptr"][...] = pointers
    filled = 0
    for start, stop, block in matrix.blocks():
        rows = block[keep[start:stop]]
        part = slice(filled, filled + rows.nnz)
        node["data"][part] = rows.data
        node["indices"][part] = rows.indices
        filled = part.stop


OF_X_HVG = ("log1p", "X_hvg_var_names", "hvg_names")  # in uns: what is said of the matrices that are made anew


def copy_rest(file: h5py.File, cells: H5ad, key: str, keep: np.ndarray) -> list[str]:
    """What else the input has and still fits: uns, varm, varp, obsp; returns a text for each part that is left out.

    key: of the matrix that became X. keep: cells of the new file, bool [cells].
    """
    is_old = isinstance(hdf5.member(cells.file, "obs"), h5py.Dataset)  # anndata before 0.7
    same_genes = key != "raw/X"
    fits = {"uns": True, "varm": same_genes, "varp": same_genes, "obsp": keep.all()}
    left_out = []
    for part in hdf5.names(cells.file):
        if part in ("X", "obs", "var", "obsm"):
            continue
        names = [f"{part}/{name}" for name in names_in(cells.file, part)]
        if part == "uns":
            names = [name for name in names if name.removeprefix("uns/") not in OF_X_HVG]
        if is_old:  # it keeps the categories of obs there
            names = [name for name in names if not name.endswith("_categories")]
        if fits.get(part, False) and isinstance(hdf5.member(cells.file, part), h5py.Group):
            with cells.guard(part):
                for name in names:
                    hdf5.check_below(cells.file, name)
                    cells.file.copy(name, file[part])
        elif part.startswith("raw"):  # "raw", or "raw.X" and "raw.var" of old files
            if key != "raw/X" and part in ("raw", "raw.X"):
                left_out.append("raw")
        else:
            others = [name.partition("/")[2] for name in names if name != key]
            if others:
                left_out.append(f"{part} ({', '.join(others)})")
    if key != "X" and "X" in cells.keys:
        left_out.append("X as it was")
    return left_out


def preprocess(
    *,
    input: str = "",
    layer: str = "",
    output: str = "",
    target_sum: float = 1e4,
    num_hvgs: int = 2_000,
    drop_empty: bool = False,
    drop_unlabelled: bool = False,
    keep_counts: bool = False,
    pert_col: str = "",
    cell_type_key: str = "",
    batch_col: str = "",
    control_pert: str = "",
    out_dir: str = "data/state",
) -> dict:
    """Counts of an h5ad -> X log1p CSR, obsm X_hvg; returns numbers of cells and genes.

    obs, var, obsm, varm, varp, obsp and uns go along as far as they still fit, and what is left out is said. Three
    passes over blocks of rows: check, write X and sum up the genes, write X_hvg; memory does not grow with cells but
    for obs. Raises DataError for what is neither counts nor log1p nor normalised, for cells without counts unless
    drop_empty, and for cells without a value in the columns that are named unless drop_unlabelled.
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
        found = checked_counts(cells, layer, columns, control_pert, drop_unlabelled)
        if keep_counts and found.kind != "counts":
            raise DataError(f"{found.matrix.where} holds {found.kind}, so there are no counts: without --keep_counts")
        keep = kept_cells(found, drop_empty)
        shape = (int(keep.sum()), found.matrix.shape[1])
        width, left_out = write_preprocessed(path, cells, found, keep, target_sum, num_hvgs, keep_counts)

    empty = int((found.values["row_sums"] == 0).sum())
    unlabelled = len(keep) - shape[0] - empty
    dropped = [counted(empty, "empty one") + " left out"] if empty else []
    if unlabelled:
        dropped.append(f"{unlabelled:,} without a value in a column that was named")
    of_them = f" ({', '.join(dropped)})" if dropped else ""
    limit = f", all that vary: num_hvgs is {num_hvgs:,}" if width < num_hvgs else ""
    print(
        f"preprocess: {counted(shape[0], 'cell')}{of_them}, {counted(shape[1], 'gene')}; "
        f"{what_was_done(found, target_sum)}\n"
        f"X_hvg has the {width:,} most variable of them{limit}; written to {path}"
    )
    if left_out:
        note(f"left out of {input}: {', '.join(left_out)}")
    next_step(path, columns, control_pert)
    return {
        "cells": shape[0],
        "genes": shape[1],
        "hvgs": width,
        "dropped": len(keep) - shape[0],
        "log1p": found.kind == "log1p",
        "left_out": left_out,
        "path": str(path),
    }


def next_step(path: Path, columns: dict[str, str], control_pert: str) -> None:
    """A starter TOML beside the new file, and the command that trains by it; or a note that says why there is none."""
    try:
        write_starter(input=str(path), **columns, control_pert=control_pert)
    except DataError as error:
        note(f"no TOML that says which cells train was written: {error}")
        asked = "--pert_col=... --control_pert=... --cell_type_key=..."
        print(f"next: python prepare_data.py state toml --input={shlex.quote(str(path))} {asked}")


def what_was_done(found: Found, target_sum: float) -> str:
    """How the matrix became expression, in words."""
    if found.kind == "counts":
        return f"counts to {target_sum:g} a cell, log1p"
    if found.kind == "normalised, not logged":
        return f"normalised already, but not logged: scaled to {target_sum:g} a cell, log1p"
    base = found.values["log_base"]
    if base != math.e:
        return f"log1p already, to base {base:g}: brought to the natural logarithm"
    return "log1p already, so kept as they are"


def write_preprocessed(
    path: Path,
    cells: H5ad,
    found: Found,
    keep: np.ndarray,
    target_sum: float,
    num_hvgs: int,
    keep_counts: bool,
) -> tuple[int, list[str]]:
    """Write the new file, whole or not at all; returns how many variable genes it has, and what was left out."""
    matrix = found.matrix
    shape = (int(keep.sum()), matrix.shape[1])
    obs = {name: column[keep] for name, column in cells.frame("obs").items()}
    with new_h5ad(path, cells.obs_names[keep], obs, {"log1p": {}}, cells.index_name("obs")) as file:
        # Which genes vary is known only when all cells were written, so X_hvg takes another pass.
        blocks = expression(found, keep, target_sum, f"expression of {counted(shape[0], 'cell')}")
        sums, squares = write_expression(file, blocks, shape, values_of(found, keep), keep_counts)
        genes = variable_genes(sums, squares, shape[0], num_hvgs)
        chosen = genes["highly_variable"]
        width = int(chosen.sum())
        if not width:
            raise DataError(f"{matrix.where}: no gene differs between cells, so there are none to choose")
        part = cells.var_part(matrix.key)
        columns = {**cells.frame(part), **genes}
        write_frame(file, "var", cells.row_names(part), columns, cells.index_name(part))
        blocks = expression(found, keep, target_sum, f"X_hvg of {counted(shape[0], 'cell')}")
        write_variable(file, blocks, (shape[0], width), chosen)
        left_out = copy_rest(file, cells, matrix.key, keep)
        tables = copy_obsm(file, cells, keep)
        if tables:
            left_out.append(f"obsm ({', '.join(tables)})")
    return width, left_out
