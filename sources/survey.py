"""What the cells of h5ad files are and what the columns of their matrices mean, without their expression."""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from common.errors import DataError
from common.telling import doing
from sources import hdf5
from sources.h5ad import H5ad, column_of, no_value
from sources.labels import check_labels
from sources.shared import counted

CODES = ("file", "row", "cell_type", "perturbation", "batch")
SETTINGS = {"perturbation": "pert_col", "cell_type": "cell_type_key", "batch": "batch_col"}  # that name the columns


@dataclass
class Survey:
    """What the cells of some files are, and what the columns of their matrices mean."""

    codes: dict[str, np.ndarray]  # CODES -> int32 [N]; -1 for a cell without a value
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
    if learned and embed_key and embed_key != learned:
        keys["counts"] = learned
    return keys


def survey_files(
    files: list[Path],
    columns: dict[str, str | None],
    keys: dict[str, str],
    control_pert: str = "",
) -> Survey:
    """Read what the cells of h5ad files are.

    Args:
        columns: cell_type, perturbation, batch -> name of the obs column; None: all cells are of one.
        keys: of matrix_keys. control_pert: the perturbation that is none, which each file must have; or empty.
    Raises DataError for a file, a column or a matrix that cannot be read, and for matrices that do not fit together.
    """
    columns_of_files = {name: [] for name in columns}  # (codes, values) of each file
    names_of_files = {which: [] for which in keys}  # names of the columns of a matrix, of each file
    sizes = []
    gene_dim = 0
    hvg_dim = 0
    for path in files:
        size = path.stat().st_size / 1e6 if path.is_file() else 0
        with doing(f"reading {path} ({size:,.0f} MB)"), H5ad(path) as file:
            asked = {setting: columns[name] for name, setting in SETTINGS.items()}
            check_labels(file, asked, control_pert, keys["input"])
            for name, column in columns.items():
                if column:
                    codes_and_values = file.column(column, missing=True)
                else:
                    codes_and_values = (np.zeros(file.n_obs, np.int32), ["all"])
                columns_of_files[name].append(codes_and_values)
            for which, key in keys.items():
                if which == "counts" and key == "X_hvg" and "obsm/X_hvg" not in file.keys:
                    raise DataError(
                        f"{path} has no X_hvg, which output_space=gene learns from {keys['input']}: use "
                        "output_space=all or output_space=embedding, or embed_key=none to read X and predict it"
                    )
                names_of_files[which].append(column_names(file, key))
            if not sizes:  # the first file
                gene_dim = file.n_vars
                if "obsm/X_hvg" in file.keys:
                    hvg_dim = file.matrix("X_hvg").shape[1]
            sizes.append(file.n_obs)

    codes = {
        "file": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        "row": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
    }
    meanings = {}
    for name, of_files in columns_of_files.items():
        meanings[name], codes[name] = joined(of_files)

    genes = {"counts": None}
    orders = {}
    differences = []
    for which, key in keys.items():
        genes[which], orders[which], notes = align(files, names_of_files[which], key)
        differences += notes
    if keys["input"] == "X":
        gene_dim = len(genes["input"])  # fewer, where files have different genes
    return Survey(
        codes=codes,
        cell_types=meanings["cell_type"],
        perturbations=meanings["perturbation"],
        batches=meanings["batch"],
        genes=genes["input"],
        count_genes=genes["counts"],
        gene_dim=gene_dim,
        hvg_dim=hvg_dim,
        differences=differences,
        orders=orders,
    )


def joined(columns: list[tuple[np.ndarray, list[str]]]) -> tuple[list[str], np.ndarray]:
    """(sorted values of all files, codes int32 [N] of all cells) from (codes, values) of a column of each file."""
    values_of_all = set()
    for _, values in columns:
        values_of_all.update(values)
    meaning = sorted(values_of_all)
    number = {value: code for code, value in enumerate(meaning)}
    codes_of_all = []
    for codes, values in columns:
        places = np.array([number[value] for value in values], np.int32)  # of a file's values among those of all
        codes_of_all.append(np.append(places, np.int32(-1))[codes])  # -1, of a missing value, finds the last
    return meaning, np.concatenate(codes_of_all)


def labelled(
    codes: dict[str, np.ndarray],
    columns: dict[str, str | None],
    files: list[Path],
    drop_unlabelled: bool,
) -> np.ndarray:
    """Which cells have a cell type, a perturbation and a batch, bool [N].

    Args: as of Survey and survey_files. Raises DataError, naming the first that lacks one, unless drop_unlabelled.
    """
    known = np.ones(len(codes["file"]), bool)
    for name, column in columns.items():
        lost = codes[name] < 0
        if lost.any() and not drop_unlabelled:
            f = codes["file"][lost.argmax()]
            lost_in_file = lost[codes["file"] == f]
            raise DataError(f"{files[f]}: obs column {column!r} {no_value(lost_in_file)}")
        known &= ~lost
    if not known.any():
        raise DataError(f"{files[0]}: no cell has a value in all of {', '.join(filter(None, columns.values()))}")
    return known


def column_names(file: H5ad, key: str | None) -> np.ndarray | int:
    """Genes of the columns of a matrix; their number where the file does not tell, as of an embedding."""
    matrix = file.matrix(key)
    width = matrix.shape[1]
    if not matrix.key.startswith("obsm/"):
        return file.genes_of(file.var_part(matrix.key))
    if matrix.names is not None:  # a table
        return as_genes(file, matrix.names)
    if matrix.key == "obsm/X_hvg":
        return variable_names(file, width)
    return width


def variable_names(file: H5ad, width: int) -> np.ndarray | int:
    """Genes of the columns of X_hvg, or their number: uns names them, or var.highly_variable marks them in order.

    Raises DataError if uns has another number of names.
    """
    names = uns_texts(file, "X_hvg_var_names")
    if names is not None:
        if len(names) != width:
            raise DataError(
                f"{file.path}: uns/X_hvg_var_names has {counted(len(names), 'name')}, and obsm/X_hvg "
                f"{counted(width, 'column')}: "
                "it is of another X_hvg, so write it anew or delete it"
            )
        return as_genes(file, names)
    marked = file.flags("var", "highly_variable")
    if marked is not None and marked.sum() == width:
        return file.gene_names[marked]
    names = uns_texts(file, "hvg_names")
    if names is not None and len(names) == width:
        return as_genes(file, names)
    return width


def uns_texts(file: H5ad, name: str) -> list[str] | None:
    """A list of texts in uns; None where there is none."""
    if not hdf5.has(file.file, f"uns/{name}"):
        return None
    node = hdf5.member(file.file, f"uns/{name}")
    if isinstance(node, h5py.Group) and hdf5.has(node, "values"):  # nullable text
        node = hdf5.member(node, "values")
    if not isinstance(node, h5py.Dataset) or len(node.shape or ()) != 1:
        return None
    return [str(value) for value in column_of(node).tolist()]


def as_genes(file: H5ad, names: list[str]) -> np.ndarray:
    """Names of genes; where all are of the index of var, their gene_name, as the other matrices have them."""
    gene_of_index = dict(zip(file.var_names.tolist(), file.gene_names.tolist(), strict=True))
    if all(name in gene_of_index for name in names):
        names = [gene_of_index[name] for name in names]
    return np.array(names)


def numbered_columns(files: list[Path], tables: list, key: str) -> list[str]:
    """Names KEY_0, KEY_1, ... of columns that not all files name; DataError unless all are of one width."""
    widths = [names if isinstance(names, int) else len(names) for names in tables]
    for file, width in zip(files, widths, strict=True):
        if width != widths[0]:
            raise DataError(f"{key} has {counted(widths[0], 'column')} in {files[0]} but {width} in {file}")
    return [f"{key}_{i}" for i in range(widths[0])]


def align(files: list[Path], tables: list, key: str) -> tuple[list[str], list[np.ndarray | None], list[str]]:
    """(names of the columns, for each file the order that brings its columns there, what differs); None: as they are.

    Where the files have different genes, those that all have are used. Embeddings must be of one width.

    Args:
        tables: for each file the names of its columns, or their number where it does not name them.
    Raises DataError for embeddings of different widths, repeated names, and files without a common gene.
    """
    as_they_are = [None] * len(files)
    unnamed = [file for file, names in zip(files, tables, strict=True) if isinstance(names, int)]
    if unnamed:
        differences = []
        if key == "X_hvg" and len(files) > 1:
            differences.append(
                f"{unnamed[0]} does not say which genes the columns of its X_hvg are, so they cannot be put beside "
                "those of the other files: write uns['X_hvg_var_names'] or var['highly_variable']; with strict=False "
                "they are taken to be the same genes in the same order"
            )
        return numbered_columns(files, tables, key), as_they_are, differences
    if all(np.array_equal(names, tables[0]) for names in tables):
        return [str(name) for name in tables[0]], as_they_are, []

    places = []  # for each file: name -> column
    for names in tables:
        places.append({str(name): i for i, name in enumerate(names)})
    differences = []
    for file, names, place in zip(files, tables, places, strict=True):
        if len(place) < len(names):
            distinct, numbers = np.unique(names, return_counts=True)
            raise DataError(
                f"{file} has several genes of the name {str(distinct[numbers.argmax()])!r}, and the files have not the "
                "same genes in the same order: make the names unique, so that they can be aligned"
            )
        odd = sorted(place.keys() ^ places[0].keys())
        if odd:
            differences.append(
                f"{file} and {files[0]} have different genes in {key}: {counted(len(odd), 'gene')} in one only, "
                f"such as {odd[0]}; with strict=False those that all have are used"
            )
    genes = [gene for gene in places[0] if all(gene in place for place in places)]
    if not genes:
        raise DataError(f"{files[0]} and the other files have no gene in common")
    orders = []
    for place in places:
        order = np.array([place[gene] for gene in genes])
        is_whole = len(order) == len(place)
        if is_whole and np.array_equal(order, np.arange(len(order))):
            order = None
        orders.append(order)
    return genes, orders, differences
