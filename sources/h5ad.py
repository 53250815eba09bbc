"""h5ad files by h5py alone: those of all anndata versions read, dense, CSR and CSC, in blocks; our own written."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
from scipy.sparse import csc_array, csr_array

from common.errors import DataError, replacing
from sources import hdf5
from sources.columns import Categorical, Column, Nullable
from sources.hdf5 import as_text, member, numbers, read, where
from sources.shared import counted, room_for, spooled_array, suggest


def attribute(node, *names: str) -> str:
    """The first of these attributes that there is, as text."""
    for name in names:
        value = hdf5.attribute(node, name)
        if value is not None:
            return as_text(value, f"{where(node)}, attribute {name!r},")
    return ""


def column_order(frame: h5py.Group, names: list[str]) -> list[str]:
    """The columns of a frame in their order; names, where it does not say one."""
    order = hdf5.attribute(frame, "column-order", names)
    what = f"{where(frame)}, attribute 'column-order',"
    return [as_text(name, what) for name in np.atleast_1d(order).ravel().tolist()]


def plain(values, what: str) -> np.ndarray:
    """A column as h5py reads it, at least one value: byte strings become text (dtype object), numbers stay.

    Raises DataError for what is neither text nor numbers; what: whose values they are.
    """
    values = np.atleast_1d(values)
    if values.dtype.kind in hdf5.NUMBERS:
        return values
    texts = values.ravel().tolist()
    if values.dtype.kind not in "SO" or not all(isinstance(text, bytes | str) for text in texts):
        raise DataError(f"{what} holds {values.dtype}, neither numbers nor text")
    array = np.array([as_text(text, what) for text in texts], object)
    return array.reshape(values.shape)


def column_of(node: h5py.Dataset) -> np.ndarray:
    """All values of a data set, numbers or text."""
    if node.dtype.kind in hdf5.NUMBERS:
        hdf5.check_numbers(node)
    return plain(read(node), where(node))


def categories_of(node: h5py.Dataset | h5py.Group) -> np.ndarray:
    """The values that codes stand for. Raises DataError for one that is there twice."""
    if isinstance(node, h5py.Group):  # of nullable text
        node = member(node, "values", h5py.Dataset)
    return distinct(column_of(node), where(node))


def distinct(values: np.ndarray, what: str) -> np.ndarray:
    """The values [n] as they are. Raises DataError for one that is there twice: the codes would say one thing."""
    if values.ndim != 1:
        raise DataError(f"{what} has shape {values.shape}, not 1 dimension")
    known, times = np.unique(values, return_counts=True)
    if (times > 1).any():
        raise DataError(f"{what} has the category {known[times.argmax()]!r} twice: the file is damaged")
    return values


def codes(values: np.ndarray, what: str) -> np.ndarray:
    """Values that should be codes. Raises DataError for others."""
    if values.dtype.kind not in "iu":
        raise DataError(f"{what} holds {values.dtype}, where its categories need codes")
    return values


def factor(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(codes int32, the values that occur as sorted text)."""
    if values.dtype.kind == "O":
        values = values.astype(str)
    distinct, codes = np.unique(values, return_inverse=True)
    texts = [str(value) for value in distinct.tolist()]
    names = sorted(set(texts))  # numbers sort otherwise than their text, and two may have the same
    code_of_distinct = np.searchsorted(names, texts).astype(np.int32)
    return code_of_distinct[codes.reshape(-1)], names


class H5ad:
    """An h5ad file of any anndata, 0.1 to now, read by h5py alone. Opening checks structure, not values.

    X may be absent: it is asked for only where it is read. Raises DataError for a file that is missing, cut short or no
    HDF5, lacks obs or var, or whose shapes disagree.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.file = hdf5.open_hdf5(path)
        for part in ("obs", "var"):
            if not hdf5.has(self.file, part):
                raise DataError(
                    f"{path} has no {part}, so it is no h5ad file of cells; "
                    f"it has {', '.join(hdf5.names(self.file)) or 'nothing'}"
                )
        self.rows = {}  # of obs and var, once their names are read
        self.obs_names = self._text("obs", None)
        self.var_names = self._text("var", None)
        self.n_obs = len(self.obs_names)
        self.n_vars = len(self.var_names)
        self.rows = {"obs": self.n_obs, "var": self.n_vars}
        keys = self.keys
        if not keys:
            raise DataError(f"{path} has no X, and nothing in layers, obsm or raw: nothing to read")
        if not self.n_obs or not self.n_vars and "X" in keys:
            raise DataError(f"{path} has {self.n_obs} cells and {self.n_vars} genes: nothing to read")
        if "X" in keys:
            self.matrix(None)  # which must fit

    def __enter__(self) -> "H5ad":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def guard(self, what: str):
        """What HDF5 says of bytes that are not as they should be, as a DataError."""
        return hdf5.guard(f"{self.path}: {what}")

    # A frame, obs or var, is one compound data set in files of anndata before 0.7, and since then a group of columns.

    def _names(self, part: str) -> list[str]:
        """Everything in a frame: its columns, its index, and what older files keep beside them."""
        frame = member(self.file, part)
        if isinstance(frame, h5py.Group):
            return hdf5.names(frame)
        if not frame.dtype.names or len(frame.shape or ()) != 1:
            raise DataError(f"{where(frame)} holds {frame.dtype} of shape {frame.shape}, not a table")
        return list(frame.dtype.names)

    def _index(self, part: str) -> str:
        """The column that names the rows."""
        names = self._names(part)
        told = attribute(member(self.file, part), "_index")
        if told:
            return told
        if not names:
            raise DataError(f"{self.path}: {part} is empty: it has no names of its rows")
        return next(name for name in ("_index", "index", *names) if name in names)

    def index_name(self, part: str) -> str:
        """What the names of the rows are called; "_index" where they are not."""
        return attribute(member(self.file, part), "_index") or "_index"

    def _columns(self, part: str) -> list[str]:
        """The columns of a frame in their order, without its index."""
        frame = member(self.file, part)
        names = self._names(part)
        hidden = (self._index(part), "__categories")
        columns = []
        for name in column_order(frame, names):
            # A name of column-order may have slashes: then it is in the group, but not in its list.
            if name not in names and not (isinstance(frame, h5py.Group) and hdf5.has(frame, name)):
                raise DataError(f"{where(frame)} has no column {name!r}, which its column-order names: the file is "
                                "damaged")
            if name not in hidden:
                columns.append(name)
        return columns

    def _parts(self, part: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(values, None), or (codes, categories) with code -1 for a missing value."""
        frame = member(self.file, part)
        if isinstance(frame, h5py.Dataset):  # anndata before 0.7
            with self.guard(f"{part} column {name!r}"):
                hdf5.check_field(frame, name)
                values = plain(frame.fields(name)[:], where(frame, name))
            categories = f"uns/{name}_categories"
            if not hdf5.has(self.file, categories):
                return values, None
            return codes(values, where(frame, name)), categories_of(member(self.file, categories))
        node = member(frame, name)
        if isinstance(node, h5py.Dataset):
            reference = hdf5.attribute(node, "categories")
            if isinstance(reference, h5py.Reference):  # anndata 0.7
                return read(numbers(frame, name, "iu")), categories_of(hdf5.referred(node, reference))
            return column_of(node), None
        if hdf5.has(node, "codes"):
            return read(numbers(node, "codes", "iu")), categories_of(member(node, "categories"))
        # Nullable, with a mask.
        values, places = np.unique(column_of(member(node, "values", h5py.Dataset)), return_inverse=True)
        mask = read(numbers(node, "mask", "biu"))
        if mask.shape != places.shape:
            raise DataError(f"{where(node)}: its mask has shape {mask.shape} for {places.size:,} values")
        return np.where(mask, -1, places), values

    def _coded(self, part: str, name: str | None, missing: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """As _parts, checked: a value for each row, unless some may be missing. None is the index."""
        what = f"{part} column {name!r}" if name else f"the names of {part}"
        with self.guard(what):
            values, categories = self._parts(part, name or self._index(part))
            rows = self.rows.get(part, len(values))
            if values.shape != (rows,):
                raise DataError(f"{self.path}: {what} has shape {values.shape} for {rows:,} rows")
            if categories is None:
                lost = values != values  # NaN differs from itself
            else:
                if rows and (values.max() >= len(categories) or values.min() < -1):
                    raise DataError(
                        f"{self.path}: {what} has codes {values.min()} to {values.max()} "
                        f"for {len(categories)} categories"
                    )
                lost = values < 0
            if lost.any() and not missing:
                remedy = no_value(lost) if part == "obs" else f"has no value for row {lost.argmax()}: fill it in"
                raise DataError(f"{self.path}: {what} {remedy}")
        return values, categories

    def _text(self, part: str, name: str | None) -> np.ndarray:
        """A column as text [rows]; None is the index."""
        values, categories = self._coded(part, name)
        if categories is not None:
            values = categories[values]
        return values.astype(str)

    def frame(self, part: str) -> dict[str, Column]:
        """The columns of obs, var, or a table of obsm, as write_frame takes them: nothing is lost on the way."""
        columns = {}
        for name in self._columns(part):
            values, categories = self._coded(part, name, missing=True)
            if categories is None:
                columns[name] = values
            elif self._is_masked(part, name):
                columns[name] = Nullable(categories[values], values < 0)
            else:
                columns[name] = Categorical(values, categories, self._is_ordered(part, name))
        return columns

    def _is_masked(self, part: str, name: str) -> bool:
        frame = member(self.file, part)
        return isinstance(frame, h5py.Group) and hdf5.has(frame, f"{name}/mask")

    def _is_ordered(self, part: str, name: str) -> bool:
        """Whether the order of a column's categories means something: an attribute of theirs in anndata 0.7."""
        frame = member(self.file, part)
        if isinstance(frame, h5py.Dataset):
            return False
        node = member(frame, name)
        if isinstance(node, h5py.Dataset):
            node = hdf5.referred(node, hdf5.attribute(node, "categories"))
        return bool(np.any(hdf5.attribute(node, "ordered", False)))

    def flags(self, part: str, name: str) -> np.ndarray | None:
        """A column of yes and no, bool [rows], however it is stored; a missing value is no. None if it is no such."""
        if name not in self._columns(part):
            return None
        values, categories = self._coded(part, name, missing=True)
        if categories is None:
            texts = values.astype(str)
        else:
            texts = np.append(categories.astype(str), "")[values]  # code -1 finds what is appended
        texts = np.char.lower(texts)
        yes = np.isin(texts, ("true", "1", "1.0"))
        no = np.isin(texts, ("false", "0", "0.0", "nan", ""))
        return yes if (yes | no).all() else None

    @property
    def columns(self) -> list[str]:
        """Names of the columns of obs."""
        return self._columns("obs")

    def column(self, name: str, missing: bool = False) -> tuple[np.ndarray, list[str]]:
        """(codes int32 [n_obs], names) of an obs column; names are the text of the values that occur, sorted.

        Raises DataError if there is no such column, or it lacks the value of a cell; with `missing` its code is -1.
        """
        if name not in self.columns:
            raise DataError(f"{self.path} has no column {name!r} in obs{suggest(name, self.columns)}")
        values, categories = self._coded("obs", name, missing)
        if categories is None:
            is_known = values == values
            known, names = factor(values[is_known])
        else:
            is_known = values >= 0
            codes_of_categories, texts = factor(categories)
            occurring, known = np.unique(codes_of_categories[values[is_known]], return_inverse=True)
            names = [texts[i] for i in occurring]
        codes = np.full(self.n_obs, -1, np.int32)
        codes[is_known] = known.reshape(-1)
        return codes, names

    @property
    def gene_names(self) -> np.ndarray:
        """The genes of X, of layers and of what is chosen from them: see genes_of."""
        return self.genes_of("var")

    def row_names(self, part: str) -> np.ndarray:
        """The index of obs, var, or raw's var (see var_part), as text."""
        return self._text(part, None)

    def genes_of(self, part: str) -> np.ndarray:
        """The column gene_name of var, or of raw's; without one, and where a gene has none, its name in the index.

        As they are, repeated or not.
        """
        index = self._text(part, None)
        if "gene_name" not in self._columns(part):
            return index
        values, categories = self._coded(part, "gene_name", missing=True)
        if categories is None:
            names = values.astype(str)
        else:
            names = np.append(categories.astype(object), "")[values].astype(str)
        return np.where(np.isin(names, ("", "nan")), index, names)

    @property
    def raw(self) -> str:
        """What the parts of raw begin with in the file: "raw/", "raw." before anndata 0.7, "" where there is none."""
        for prefix in ("raw/", "raw."):
            if hdf5.has(self.file, f"{prefix}X") and hdf5.has(self.file, f"{prefix}var"):
                return prefix
        return ""

    def var_part(self, key: str) -> str:
        """Where the genes of a matrix are: those of raw are its own."""
        return f"{self.raw}var" if key == "raw/X" else "var"

    @property
    def log_base(self) -> float:
        """What the logarithm of log(1 + x) is to, as uns/log1p/base says. Raises DataError for what is no base."""
        if not hdf5.has(self.file, "uns/log1p/base"):
            return math.e
        base = member(self.file, "uns/log1p/base", h5py.Dataset)
        if base.shape is None:  # None is stored as an empty data set
            return math.e
        hdf5.check_numbers(base)
        if base.size != 1:
            raise DataError(f"{where(base)} has shape {base.shape}, not one number: correct or delete it")
        value = float(read(base).item())
        if not math.isfinite(value) or value <= 1:
            raise DataError(f"{self.path}: uns/log1p/base is {value:g}, no base of a logarithm: correct or delete it")
        return value

    @property
    def keys(self) -> list[str]:
        """"X", "obsm/NAME", "layers/NAME", "raw/X", of those that there are: what matrix takes."""
        keys = ["X"] if hdf5.has(self.file, "X") else []
        for part in ("obsm", "layers"):
            if not hdf5.has(self.file, part):
                continue
            node = member(self.file, part)
            if isinstance(node, h5py.Dataset):  # anndata before 0.7
                names = [name for name in node.dtype.names or () if node.dtype[name].ndim == 1]
            else:
                parts = {name: member(node, name) for name in hdf5.names(node)}
                names = [name for name, inner in parts.items() if is_matrix(inner) or is_table(inner)]
            keys += [f"{part}/{name}" for name in names]
        if self.raw:
            keys.append("raw/X")
        return keys

    def place(self, key: str | None) -> str | None:
        """The one of keys that a key means, as `matrix` takes it; None where there is none."""
        keys = self.keys
        candidates = (key or "X", f"obsm/{key}", f"layers/{key}")
        return next((candidate for candidate in candidates if candidate in keys), None)

    def no_matrix(self, key: str | None) -> str:
        """What is wrong where there is no matrix of this key, and what to do."""
        if hdf5.has(self.file, f"obsm/{key}"):
            return f"obsm/{key} is no table of numbers: write it as an array"
        names = [known.removeprefix("obsm/").removeprefix("layers/") for known in self.keys]
        if key == "X_hvg" and "X" in names:
            return (f"no matrix 'X_hvg': python prepare_data.py state preprocess --input={self.path} makes it, or read "
                    "X with --embed_key=none --output_space=all")
        return f"no matrix {key or 'X'!r}{suggest(key or 'X', names)}"

    def matrix(self, key: str | None) -> "Matrix":
        """The matrix of a key; a bare name is sought in obsm, then in layers. None is X.

        Raises DataError if there is none, if it is no table of numbers, and if its shape is not that of the file.
        """
        place = self.place(key)
        if place is None:
            raise DataError(f"{self.path}: {self.no_matrix(key)}")
        with self.guard(place):
            matrix = Matrix(self, place)
        if place.startswith("obsm/"):
            genes = matrix.shape[1]
        elif place == "raw/X":
            genes = len(self._text(self.var_part(place), None))
        else:
            genes = self.n_vars
        if matrix.shape != (self.n_obs, genes) or not genes:
            raise DataError(
                f"{self.path}: {place} is {matrix.shape[0]:,} x {matrix.shape[1]:,}, but there are "
                f"{self.n_obs:,} cells and {genes:,} genes: the file does not fit together"
            )
        return matrix


def no_value(lost: np.ndarray) -> str:
    """What is wrong with a column that lacks the values that are marked, bool [rows], and what to do."""
    return (
        f"has no value for {lost.sum():,} of {counted(len(lost), 'row')}, first for row {lost.argmax()}: fill these "
        "in, or leave such cells out with --drop_unlabelled"
    )


def is_matrix(node: h5py.Dataset | h5py.Group) -> bool:
    if isinstance(node, h5py.Dataset):
        return node.ndim == 2
    return attribute(node, "encoding-type", "h5sparse_format")[:3] in ("csr", "csc")


def is_table(node: h5py.Dataset | h5py.Group) -> bool:
    """Whether it is a data frame whose columns are all numbers, and so as good as a matrix."""
    if attribute(node, "encoding-type") != "dataframe":
        return False
    columns = [member(node, name) for name in column_order(node, [])]
    kinds = [column.dtype.kind if isinstance(column, h5py.Dataset) else "" for column in columns]
    return bool(kinds) and all(kind and kind in hdf5.NUMBERS for kind in kinds)


class Table:
    """A data frame of numbers in the place of a data set [rows, columns]."""

    def __init__(self, frame: h5py.Group):
        self.names = column_order(frame, [])
        self.columns = [numbers(frame, name) for name in self.names]
        lengths = {len(column) for column in self.columns}
        if len(lengths) > 1:
            raise DataError(f"{where(frame)} has columns of different lengths, {sorted(lengths)}: the file is damaged")
        self.shape = (lengths.pop(), len(self.columns))
        self.dtype = np.result_type(*(column.dtype for column in self.columns))

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.stack([column[rows] for column in self.columns], axis=1)


class Matrix:
    """A matrix [rows, columns] of an h5ad file, read in blocks of rows. format: dense, csr or csc.

    A block is an array float32, or a csr_array of scipy with its columns ascending.
    """

    entries = 1 << 22  # most values of a block: 32 MB

    def __init__(self, source: H5ad, key: str):
        self.source = source
        self.key = key
        self.where = f"{source.path}: {key}"
        place = f"{source.raw}X" if key == "raw/X" else key
        part, _, name = place.partition("/")
        parent = member(source.file, part)
        self.by_rows = None  # a CSC matrix once it is transposed
        if isinstance(parent, h5py.Dataset) and name:  # a field of a compound data set: anndata before 0.7
            hdf5.check_field(parent, name)
            self.node = parent.fields(name)
            kind = parent.dtype[name]
        else:
            self.node = member(parent, name) if name else parent
            if is_table(self.node):
                self.node = Table(self.node)
            kind = getattr(self.node, "dtype", None)
        if isinstance(self.node, h5py.Group):
            kinds = self._open_sparse()
        else:
            self.format = "dense"
            if kind.shape:
                self.shape = (len(parent), *kind.shape)
            else:
                self.shape = tuple(self.node.shape or ())
            self.nnz = math.prod(self.shape)
            kinds = [kind.base]
        are_numbers = kinds[0].kind in "iufb"
        whole_numbers = all(kind.kind in "iu" for kind in kinds[1:])  # of indices and indptr
        if len(self.shape) != 2 or not are_numbers or not whole_numbers:
            raise DataError(f"{self.where} holds {kinds[0]} of shape {self.shape}, not a table of numbers")
        if isinstance(self.node, h5py.Dataset):
            hdf5.check_numbers(self.node)

    def _open_sparse(self) -> list[np.dtype]:
        """Format, shape and number of values; the types of data, indices and indptr."""
        node = self.node
        self.format = attribute(node, "encoding-type", "h5sparse_format")[:3]
        if self.format not in ("csr", "csc"):
            raise DataError(f"{self.where} is {self.format or 'of no known encoding'}, not dense, CSR or CSC")
        name = "shape" if hdf5.attribute(node, "shape") is not None else "h5sparse_shape"
        shape = np.asarray(hdf5.attribute(node, name, ()))
        if shape.shape != (2,) or shape.dtype.kind not in "iu" or shape.min() < 0:
            raise DataError(f"{self.where} has the shape {shape.tolist()}, not rows and columns: the file is damaged")
        self.shape = tuple(map(int, shape))
        # The matrix keeps them: each is checked once, and read many times.
        self.parts = {"data": numbers(node, "data")}
        for part in ("indices", "indptr"):
            self.parts[part] = numbers(node, part, "iu")
        self.nnz = len(self.parts["data"])
        pointers = self.parts["indptr"]
        major = self.shape[0] if self.format == "csr" else self.shape[1]
        is_whole = len(pointers) == major + 1 and len(self.parts["indices"]) == self.nnz
        if not is_whole or read(pointers, 0) != 0 or read(pointers, major) != self.nnz:
            raise DataError(
                f"{self.where}: its data, indices and indptr are not of one sparse matrix of "
                f"{self.shape[0]:,} x {self.shape[1]:,}"
            )
        return [stored_part.dtype for stored_part in self.parts.values()]

    def _pointers(self) -> np.ndarray:
        """indptr, int64, ascending."""
        pointers = read(self.parts["indptr"]).astype(np.int64)
        if (np.diff(pointers) < 0).any():
            raise DataError(f"{self.where}: indptr falls, so the matrix is damaged")
        return pointers

    def _stretches(self, pointers: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of runs of rows (CSC: columns) of at most `most` rows and `entries` values, or of one row."""
        start = 0
        end = len(pointers) - 1
        while start < end:
            last_value = pointers[start] + self.entries
            stop = int(np.searchsorted(pointers, last_value, "right")) - 1
            stop = max(stop, start + 1)  # a row of more values is read whole
            stop = min(stop, start + most, end)
            yield start, stop
            start = stop

    def _read(self, start: int, stop: int, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(data, indices) of these rows (CSC: columns), indices in range."""
        part = slice(int(pointers[start]), int(pointers[stop]))
        data = single(read(self.parts["data"], part))
        indices = read(self.parts["indices"], part)
        rows, columns = self.shape
        if self.format == "csr":
            bound, names = columns, "columns"
        else:
            bound, names = rows, "rows"
        if len(indices) and (indices.min() < 0 or indices.max() >= bound):
            raise DataError(
                f"{self.where} has indices {indices.min()} to {indices.max()} for {bound:,} {names}: "
                "the matrix is damaged"
            )
        return data, indices.astype(np.int32)

    def _block(self, start: int, data: np.ndarray, indices: np.ndarray, pointers: np.ndarray) -> csr_array:
        """A block of rows with its columns ascending; DataError for a value that is there twice."""
        shape = (len(pointers) - 1, self.shape[1])
        block = csr_array((data, indices, pointers.astype(np.int32)), shape=shape)
        block.sort_indices()
        if not block.has_canonical_format:
            twice = block.indices[1:] == block.indices[:-1]
            begins = block.indptr[1:-1]
            twice[begins[begins > 0] - 1] = False  # the last of a row and the first of the next
            at = int(twice.argmax())
            row = int(np.searchsorted(block.indptr, at, "right")) - 1
            raise DataError(f"{self.where} has two values for row {start + row}, column {block.indices[at]}")
        return block

    def _transposed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CSC to CSR through unnamed files, in two passes over blocks of columns: count the rows, then fill them."""
        rows, columns = self.shape
        by_column = self._pointers()
        counts = np.zeros(rows, np.int64)
        for start, stop in self._stretches(by_column, columns):
            _, row_of_value = self._read(start, stop, by_column)
            counts += np.bincount(row_of_value, minlength=rows)
        pointers = np.concatenate(([0], counts.cumsum()))
        size = max(self.nnz, 1)  # an empty file cannot be mapped
        data = spooled_array(np.float32, size)
        indices = spooled_array(np.int32, size)
        free = pointers[:-1].copy()  # where the next value of each row goes
        for start, stop in self._stretches(by_column, columns):
            values, row_of_value = self._read(start, stop, by_column)
            block_pointers = by_column[start : stop + 1] - by_column[start]
            block = csc_array((values, row_of_value, block_pointers), shape=(rows, stop - start)).tocsr()
            lengths = np.diff(block.indptr)
            # A value goes as far behind its row's free place as it is behind the row's begin in the block.
            place = np.repeat(free - block.indptr[:-1], lengths) + np.arange(block.nnz)
            data[place] = block.data
            indices[place] = block.indices + start
            free += lengths
        return data, indices, pointers

    def blocks(self, rows: int = 8_192) -> Iterator[tuple[int, int, np.ndarray | csr_array]]:
        """(start, stop, block) of all rows in order, at most `rows` and `entries` values at once."""
        with self.source.guard(self.key):
            if self.format == "dense":
                yield from self._dense_blocks(rows)
            else:
                yield from self._sparse_blocks(rows)

    def _dense_blocks(self, rows: int) -> Iterator[tuple[int, int, np.ndarray]]:
        width = max(self.shape[1], 1)
        most = min(rows, max(1, self.entries // width))
        chunks = getattr(self.node, "chunks", None) or (1,)
        rows_of_chunk = chunks[0]
        most = most // rows_of_chunk * rows_of_chunk or most  # whole chunks, so that each is unpacked once
        for start in range(0, self.shape[0], most):
            stop = min(start + most, self.shape[0])
            yield start, stop, single(np.asarray(self.node[start:stop]))

    def _sparse_blocks(self, rows: int) -> Iterator[tuple[int, int, csr_array]]:
        if self.format == "csc" and self.by_rows is None:
            self.by_rows = self._transposed()
        pointers = self.by_rows[2] if self.by_rows else self._pointers()
        for start, stop in self._stretches(pointers, rows):
            if self.by_rows:
                part = slice(int(pointers[start]), int(pointers[stop]))
                data = np.array(self.by_rows[0][part])
                indices = np.array(self.by_rows[1][part])
            else:
                data, indices = self._read(start, stop, pointers)
            block_pointers = pointers[start : stop + 1] - pointers[start]
            yield start, stop, self._block(start, data, indices, block_pointers)

    def first_row(self, start: int, block: np.ndarray | csr_array, wrong: np.ndarray) -> str:
        """Value, number and name of the first cell of a block of which a stored value is marked, for a message."""
        place = int(wrong.ravel().argmax())
        if isinstance(block, csr_array):
            row = int(np.searchsorted(block.indptr, place, "right")) - 1
        else:
            row = place // self.shape[1]
        value = stored(block).ravel()[place]
        name = self.source.obs_names[start + row]
        return f"{value:g} for cell {start + row} ({name})"

    @property
    def names(self) -> list[str] | None:
        """What its columns are called, where it is a table."""
        return self.node.names if isinstance(self.node, Table) else None

    def check(
        self,
        done: Callable[[int], object] | None = None,
        read: Callable[[np.ndarray | csr_array], object] | None = None,
    ) -> dict:
        """{min, max, integer, nnz, row_sums [rows], largest_row_sum, normalised, log_base} of the values, in one pass.

        normalised: no logarithm was taken, for the values of each cell have the same sum, and not those of expm1 of
        them (a second pass finds it, where the sums are equal), or no cell more than 1, as shares of it have, which
        the logarithm of a single molecule exceeds. log_base: what the file says it is to, if one was.

        done: called with the number of rows of each block, for a progress bar. read: called with each block.
        Raises DataError for a value that is not finite and for a sparse matrix that is none.
        """
        low = np.inf
        high = -np.inf
        integer = True
        nnz = 0
        sums = np.zeros(self.shape[0])
        for start, stop, block in self.blocks():
            data = stored(block)
            infinite = ~np.isfinite(data)
            if infinite.any():
                raise DataError(
                    f"{self.where} holds {self.first_row(start, block, infinite)}: "
                    "every value must be a finite number"
                )
            sums[start:stop] = row_sums(block)
            nnz += int(np.count_nonzero(data))
            if data.size:
                low = min(low, float(data.min()))
                high = max(high, float(data.max()))
                integer = integer and bool((data == np.rint(data)).all())
            if data.size < (stop - start) * self.shape[1]:  # the zeros that are not stored
                low = min(low, 0.0)
                high = max(high, 0.0)
            if read:
                read(block)
            if done:
                done(stop - start)
        return {
            "min": low,
            "max": high,
            "integer": integer,
            "nnz": nnz,
            "row_sums": sums,
            "largest_row_sum": float(sums.max()),
            "normalised": not integer and low >= 0 and self._are_shares(sums),
            "log_base": self.source.log_base,
        }

    def _are_shares(self, sums: np.ndarray) -> bool:
        """Whether fractions of these sums over columns [rows] are parts of a cell, and no logarithms."""
        return bool(sums.max() <= 1 + 1e-3) or are_alike(sums) and not are_alike(self._rates())

    def _rates(self) -> np.ndarray:
        """Sums over the columns of base^x - 1, the inverse of log(1 + x): float64 [rows]."""
        scale = math.log(self.source.log_base)
        sums = np.zeros(self.shape[0])
        for start, stop, block in self.blocks():
            rates = csr_array(block, dtype=np.float64)
            rates.data = np.expm1(np.minimum(scale * rates.data, 600))  # more are no logarithms
            sums[start:stop] = row_sums(rates)
        return sums

    def dense(self) -> np.ndarray:
        """The whole matrix in memory, float32."""
        whole = np.empty(self.shape, np.float32)
        for start, stop, block in self.blocks():
            whole[start:stop] = as_dense(block)
        return whole


def single(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found so
        return values.astype(np.float32, copy=False)


def stored(block: np.ndarray | csr_array) -> np.ndarray:
    """The values that a block stores: all of a dense one."""
    return block.data if isinstance(block, csr_array) else block


def as_dense(block: np.ndarray | csr_array) -> np.ndarray:
    return block.toarray() if isinstance(block, csr_array) else block


def row_sums(block: np.ndarray | csr_array) -> np.ndarray:
    """Sums over the columns of a block, float64 [rows]."""
    return np.asarray(block.sum(axis=1, dtype=np.float64)).reshape(-1)


def are_alike(sums: np.ndarray) -> bool:
    """Whether the sums of all cells that have any [cells] are equal, but for rounding: cells were scaled to that."""
    filled = sums[sums > 0]
    return len(filled) > 1 and bool(filled.max() - filled.min() <= 1e-3 * filled.max())


def kind_of_values(found: dict) -> str:
    """What the check of a matrix says it holds."""
    if found["min"] == found["max"] == 0:
        return "nothing but zeros"
    if found["min"] < 0:
        return "negative values"
    if found["integer"]:
        return "counts"
    if found["normalised"]:
        return "normalised, not logged"
    # exp(15) is three million molecules of one gene in one cell.
    if found["max"] * math.log(found["log_base"]) < 15:
        return "log1p"
    return "neither counts nor log1p"


def looks_log1p(found: "Matrix | dict") -> bool:
    """Whether a matrix, or what its check found, holds log(1 + x), to whatever base."""
    if isinstance(found, Matrix):
        found = found.check()
    return kind_of_values(found) == "log1p"


def encoded(node, kind: str, version: str = "0.2.0", **attributes):
    """Mark a group or data set as anndata does; returns it."""
    node.attrs.update({
        "encoding-type": kind,
        "encoding-version": version,
        **attributes,
    })
    return node


def write_values(group: h5py.Group, name: str, value, categorical: bool = False) -> None:
    """A dict, text, number, array or column into a group, in anndata's encoding; text may have None for missing."""
    if isinstance(value, dict):
        inner = encoded(group.create_group(name), "dict", "0.1.0")
        for key, item in value.items():
            write_values(inner, key, item)
        return
    if isinstance(value, Categorical):
        write_categorical(group, name, value)
        return
    if isinstance(value, Nullable):
        write_nullable(group, name, value)
        return
    values = np.asarray(value)
    is_text = values.dtype.kind in "UO"
    if not values.ndim:
        kind = "string" if values.dtype.kind == "U" else "numeric-scalar"
        encoded(group.create_dataset(name, data=value), kind)
    elif not is_text:
        encoded(group.create_dataset(name, data=values), "array")
    elif categorical or any(text is None for text in values.ravel().tolist()):
        write_categorical(group, name, coded(values))
    else:
        texts = values.astype(object)
        encoded(group.create_dataset(name, data=texts, dtype=h5py.string_dtype()), "string-array")


def coded(values: np.ndarray) -> Categorical:
    """Text, None for missing, as codes and the sorted texts that they mean."""
    is_known = np.array([text is not None for text in values.tolist()], bool)
    codes = np.full(len(values), -1, np.int32)  # -1 is missing
    codes[is_known], names = factor(values[is_known].astype(object))
    return Categorical(codes, np.array(names, object))


def write_categorical(group: h5py.Group, name: str, column: Categorical) -> None:
    # anndata takes the smallest type that holds the codes
    most = len(column.categories)
    kind = next(kind for kind in (np.int8, np.int16, np.int32) if most <= np.iinfo(kind).max)
    inner = encoded(group.create_group(name), "categorical", ordered=column.ordered)
    encoded(inner.create_dataset("codes", data=column.codes.astype(kind)), "array")
    write_values(inner, "categories", column.categories)


def write_nullable(group: h5py.Group, name: str, column: Nullable) -> None:
    kinds = {"b": "nullable-boolean", "i": "nullable-integer", "u": "nullable-integer"}
    inner = encoded(group.create_group(name), kinds.get(column.values.dtype.kind, "nullable-string-array"), "0.1.0")
    write_values(inner, "values", column.values)
    write_values(inner, "mask", column.missing)


def write_frame(
    file: h5py.File | h5py.Group,
    part: str,
    names: np.ndarray,
    columns: dict[str, Column],
    index: str = "_index",
) -> None:
    """obs (text as categoricals), var or another table (text as it is); index: what its rows' names are called."""
    if index in columns:
        index = "_index"
    order = np.array(list(columns), dtype=h5py.string_dtype())
    attributes = {"_index": index, "column-order": order}
    frame = encoded(file.create_group(part), "dataframe", **attributes)
    for name, values in {index: np.asarray(names), **columns}.items():
        if len(values) != len(names):
            raise DataError(f"{part} column {name!r} has {len(values):,} values for {len(names):,} rows")
        is_categorical = part == "obs" and name != index
        write_values(frame, name, values, categorical=is_categorical)


def matrix_space(
    group: h5py.Group,
    name: str,
    shape: tuple[int, int],
    nnz: int | None = None,
) -> h5py.Dataset | h5py.Group:
    """Room for a dense matrix, or for a CSR one of nnz values, in one piece each, so that it can be memory-mapped."""
    room_for(group.file.filename, 4 * math.prod(shape) if nnz is None else 8 * (nnz + shape[0]))
    if nnz is None:
        return encoded(group.create_dataset(name, shape, np.float32), "array")
    node = encoded(group.create_group(name), "csr_matrix", "0.1.0", shape=np.array(shape))
    node.create_dataset("data", (nnz,), np.float32)
    node.create_dataset("indices", (nnz,), np.int32)
    node.create_dataset("indptr", (shape[0] + 1,), np.int64)
    return node


@contextlib.contextmanager
def new_h5ad(path: str | Path, obs_names, obs: dict, uns: dict, index: str = "_index") -> Iterator[h5py.File]:
    """A new h5ad without X and var, for the caller to fill; it takes its name at the end, or is removed.

    index: what the names of the cells are called.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be made ({error.strerror}): use another folder") from error
    room_for(path, 8 * len(obs_names) * (1 + len(obs)))
    with replacing(path) as saving, h5py.File(saving, "w") as file:
        encoded(file, "anndata", "0.1.0")
        write_frame(file, "obs", np.asarray(obs_names), obs, index)
        for name in ("obsm", "layers", "varm", "obsp", "varp"):
            write_values(file, name, {})
        write_values(file, "uns", uns)
        yield file


def write_h5ad(
    path: str | Path,
    X,
    obs: dict,
    var_names,
    obsm: dict | None = None,
    obs_names=None,
    var: dict | None = None,
    layers: dict | None = None,
    uns: dict | None = None,
) -> None:
    """Write an h5ad that anndata opens, whole or not at all.

    X and the matrices of obsm and layers are arrays [n, d] or csr_arrays; obs and var are {column: values}, text of obs
    as categoricals; uns nests dicts, text, numbers and arrays.
    """
    if obs_names is None:
        obs_names = [str(i) for i in range(X.shape[0])]
    with new_h5ad(path, obs_names, obs, uns or {}) as file:
        write_frame(file, "var", np.asarray(var_names), var or {})
        write_matrix(file, "X", X)
        for name, matrix in (obsm or {}).items():
            write_matrix(file["obsm"], name, matrix)
        for name, matrix in (layers or {}).items():
            write_matrix(file["layers"], name, matrix)


def write_matrix(group: h5py.Group, name: str, matrix: np.ndarray | csr_array) -> None:
    """A matrix into a group, dense or CSR as it is."""
    if not isinstance(matrix, csr_array):
        space = matrix_space(group, name, matrix.shape)
        space[...] = matrix
        return
    node = matrix_space(group, name, matrix.shape, matrix.nnz)
    node["data"][...] = matrix.data
    node["indices"][...] = matrix.indices
    node["indptr"][...] = matrix.indptr
