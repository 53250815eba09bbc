"""What an h5ad file or a folder of prepared cells holds and what is wrong with it, printed and returned."""

import math
import shlex
from pathlib import Path

import h5py

from common.errors import DataError
from sources import hdf5
from sources.cell_store import content_digest, load_codes, read_meta, verify
from sources.h5ad import H5ad, kind_of_values
from sources.labels import Labels, find_labels, in_words
from sources.shared import counted, progress, report

MOST_SHOWN = 6  # values of a column
ROOM = 51  # signs of them, on a line of 100


def inspect_cells(path: str) -> dict:
    """Print what an h5ad file holds; returns it with the list of problems found."""
    problems = []
    with H5ad(path) as cells:
        print(f"{path}: {counted(cells.n_obs, 'cell')}, {counted(cells.n_vars, 'gene')}")
        columns = inspect_columns(cells, problems)
        for kind, names in (("cells", cells.obs_names), ("genes", cells.gene_names)):
            repeated = len(names) - len(set(names.tolist()))
            if repeated:
                problems.append(f"the names of {kind} are not unique: {repeated:,} repeat an earlier one")
        matrices = inspect_matrices(cells, problems)
        labels = find_labels(cells)
    report(problems)
    if matrices and not problems:
        print(next_command(path, labels, matrices))
    return {"columns": columns, "matrices": matrices, "problems": problems}


def next_command(path: str, labels: Labels, matrices: dict[str, dict]) -> str:
    """What to do with cells, by what their columns look like: a matrix X_hvg to train on first, then a TOML."""
    action = "toml" if "obsm/X_hvg" in matrices else "preprocess"
    columns = labels.words() if labels.pert_col and labels.control_pert else "--pert_col=... --control_pert=..."
    if labels.pert_col and labels.control_pert and labels.batch_col and labels.are_of_one_type():
        # The next job finds the rest itself, and lets batches take the place of types.
        columns = in_words({name: getattr(labels, name) for name in ("pert_col", "control_pert")})
    return f"next: python prepare_data.py state {action} --input={shlex.quote(path)} {columns}"


def inspect_columns(cells: H5ad, problems: list[str]) -> dict[str, list[str]]:
    """Print the columns of obs; returns their values, and adds to the problems."""
    columns = {}
    for name in cells.columns:
        try:
            _, values = cells.column(name)
        except DataError as error:
            problems.append(str(error))
            continue
        columns[name] = values
        shown = values[:MOST_SHOWN]
        while len(shown) > 1 and len(", ".join(shown)) > ROOM:
            shown = shown[:-1]
        more = ", ..." if len(shown) < len(values) else ""
        print(f"  obs {name:<20} {counted(len(values), 'value'):>15}: {', '.join(shown)}{more}")
    return columns


def inspect_matrices(cells: H5ad, problems: list[str]) -> dict[str, dict]:
    """Print what each matrix holds; returns shape, format and kind of each, and adds to the problems."""
    matrices = {}
    for key in cells.keys:
        try:
            matrix = cells.matrix(key)
            values = matrix.check()
        except DataError as error:
            problems.append(str(error))
            continue
        kind = kind_of_values(values)
        if key == "X" and kind == "normalised, not logged":
            problems.append(
                "X is normalised, not logged: cells have the same sum, or none more than 1. python prepare_data.py "
                "state preprocess, or counts=convert of train_state.py, takes the logarithm"
            )
        elif key == "X" and kind not in ("log1p", "counts"):
            problems.append(f"X holds {kind}")
        empty = int((values["row_sums"] == 0).sum())
        if kind == "counts" and empty:
            problems.append(f"{key}: no count in {counted(empty, 'cell')}")
        matrices[key] = {"shape": matrix.shape, "format": matrix.format, "kind": kind}
        filled = values["nnz"] / math.prod(matrix.shape)
        if kind == "log1p" and values["log_base"] != math.e:
            kind += f" to base {values['log_base']:g}"
        print(
            f"  {key:<24} {matrix.shape[0]:,} x {matrix.shape[1]:,} {matrix.format}, {kind}, "
            f"{filled:.1%} not 0, {values['min']:g} to {values['max']:g}"
        )
    return matrices


def holds_cells(path: str) -> bool:
    """Whether an HDF5 file of any name is one of cells."""
    if not Path(path).is_file() or not h5py.is_hdf5(path):
        return False
    with hdf5.open_hdf5(path) as file:
        return hdf5.has(file, "obs")


def holds_store(folder: str | Path) -> bool:
    """Whether a folder is one of prepared cells."""
    return (Path(folder) / "place.npy").exists()


def inspect_store(folder: str | Path) -> dict:
    """Print what a folder of prepared cells holds, every byte of it read and compared with its checksum.

    Raises DataError for a folder that does not hold what was written.
    """
    store = Path(folder)
    meta = read_meta(store, values=False)  # which verifies all but the matrices
    for name in progress(sorted(meta["sizes"]), "verifying", "files"):
        verify(store, name, meta)
    survey = meta["survey"]
    cells = len(load_codes(store, "place"))
    content = content_digest(meta)
    types = counted(len(survey["cell_types"]), "cell type")
    perturbations = counted(len(survey["perturbations"]), "perturbation")
    print(
        f"{store}: {counted(cells, 'cell')} of {types} under {perturbations}, control included; "
        f"{sum(meta['sizes'].values()) / 1e9:.2f} GB, whole; content {content}"
    )
    print(f"  made for {meta['made_for']} from {', '.join(meta['files'])}")
    for which, entry in meta["matrices"].items():
        converted = sorted(set(filter(None, entry["converted"])))
        note = f", converted: {', '.join(converted)}" if converted else ""
        print(f"  {which:<8} {counted(entry['columns'], 'column')} of {entry['key']}, {entry['format']}{note}")
    return {"cells": cells, "content": content, "files": meta["files"], "matrices": meta["matrices"]}
