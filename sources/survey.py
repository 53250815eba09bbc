"""What the cells of h5ad files are and what the columns of their matrices mean, without their expression."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from sources.h5ad import H5ad

CODES = ("file", "row", "cell_type", "perturbation", "batch")


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
