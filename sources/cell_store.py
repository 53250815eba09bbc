"""Prepared cells: checked and converted once into a folder of arrays, which every run maps.

    data/cells/NAME-HASH/
        meta.json         the files, what the codes mean, genes, formats, bytes and checksums of everything below
        file.npy row.npy cell_type.npy perturbation.npy batch.npy    int32 [N], in the order of the files and their
                          rows; -1 for a cell without a value, which takes part in nothing
        place.npy         int64 [N]: the row of each cell in the matrices below, which are sorted by file, cell type,
                          perturbation and batch, so that the cells of a sentence lie side by side
        input.npy         float32 [N, D]; of a sparse matrix input_data.npy, input_indices.npy, input_indptr.npy (CSR)
        counts*.npy       the same of what a gene decoder learns, if one does

HASH is of what the arrays are made from: the files of the TOML (path, size, time of change), the columns, the keys and
`counts`. All cells are stored, and who trains is worked out at every start (0.1 s a million cells): a change of
[zeroshot], of the seed or of val_fraction makes no second copy, and several TOMLs of the same files share one. A folder
that no TOML needs any more may be deleted; nothing here does it.

Reading, measured on 200,000 x 2,000: a map of the file is as fast as the matrix in memory (640,000 cells a second and
core dense, 960,000 sparse), and ranks share its pages. But a mapped page counts as resident, with up to 2 MB around it.
So what exceeds ram_budget_gb is read instead, row by row: 240,000 and 200,000 cells, and no memory but for a batch.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from scipy.sparse import csr_array

from common import telling
from common.ahead import send
from common.errors import DataError, reason, regular_file
from common.ranks import tell
from common.store import flock
from sources import hdf5
from sources.h5ad import H5ad, Matrix, as_dense, kind_of_values, row_sums, stored
from sources.shared import counted, is_first_of_machine, not_here, on_this_machine, wait_until
from sources.splits import Plan, grouped
from sources.survey import CODES, Survey

VERSION = 3  # of the folder's layout
HEADER = 128  # bytes before the values of a .npy file
BLOCK = 1 << 24  # bytes under one checksum
PIECE = 1 << 20  # bytes of a block that are read at once
MOST_BLOCKS = 16  # of a file, that a start reads: one of 256 MB is verified whole, of a larger one a sample
MOST_OPEN = 64  # files of a TOML that are open at once
TARGET_SUM = 1e4  # molecules of a cell after normalisation
STORED_NAMES = (  # of a survey, in meta.json
    "cell_types",
    "perturbations",
    "batches",
    "genes",
    "count_genes",
    "gene_dim",
    "hvg_dim",
    "differences",
)


# ---------------------------------------------------------------------------------------------------------------
# Matrices of a prepared folder
# ---------------------------------------------------------------------------------------------------------------
class Stretches:
    """A .npy file that is read or written in stretches of elements: memory holds what is asked for, and no more."""

    def __init__(self, path: Path, mode: int = os.O_RDONLY):
        array = np.load(path, mmap_mode="r")  # which reads the header
        self.path = path
        self.dtype = array.dtype
        self.offset = array.offset
        self.file = os.open(path, mode)
        weakref.finalize(self, os.close, self.file)

    def read(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The elements start ... start + length - 1 of every pair, one pair after another."""
        if out is None:
            out = np.empty(int(lengths.sum()), self.dtype)
        self._transfer(os.preadv, starts, lengths, out)
        return out

    def write(self, starts: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> None:
        """Put values, one stretch after another, to their places."""
        self._transfer(os.pwritev, starts, lengths, np.ascontiguousarray(values, self.dtype))

    def _transfer(self, call: Callable, starts: np.ndarray, lengths: np.ndarray, array: np.ndarray) -> None:
        """Read or write (preadv or pwritev) the stretches of the file from or to the array, where they are in a row."""
        if not array.size:
            return
        buffer = memoryview(array).cast("B")
        size = self.dtype.itemsize
        ends = np.cumsum(lengths)
        order = np.argsort(starts)  # as they lie in the file: neighbours share its pages
        first = (size * (ends - lengths))[order].tolist()  # bytes in the array ...
        last = (size * ends)[order].tolist()
        at = (self.offset + size * starts)[order].tolist()  # ... and in the file
        for i in range(len(order)):
            stretch = buffer[first[i] : last[i]]
            moved = call(self.file, [stretch], at[i])
            if moved != len(stretch):
                raise DataError(
                    f"{self.path} was changed, or its disk is full: delete {self.path.parent} to make it anew"
                )


class Dense:
    """Rows of float32 [N, D]; held: a map, whose pages all ranks share, else read row by row."""

    def __init__(self, store: Path, which: str, columns: int, held: bool):
        self.columns = columns
        path = store / f"{which}.npy"
        self.values = np.load(path, mmap_mode="r") if held else None
        self.stretches = None if held else Stretches(path)

    def read(self, places: np.ndarray, device: torch.device) -> torch.Tensor:
        """Rows [n] of the matrix as float32 [n, D] on the device."""
        rows = torch.empty(len(places), self.columns, pin_memory=device.type == "cuda")
        if self.values is not None:
            # One thread copies nearly as fast as memory gives, and two lose all where they must wait for a core.
            # clip: numpy copies the result once more if it may have to take it back.
            np.take(self.values, places, 0, out=rows.numpy(), mode="clip")
        else:
            lengths = np.full(len(places), self.columns)
            self.stretches.read(places * self.columns, lengths, rows.numpy())
        return rows.to(device, non_blocking=True)


class Sparse:
    """Rows of a CSR matrix [N, D]; held: a map, whose pages all ranks share, else read row by row."""

    def __init__(self, store: Path, which: str, columns: int, held: bool):
        self.columns = columns
        data_file = store / f"{which}_data.npy"
        indices_file = store / f"{which}_indices.npy"
        self.indptr = np.load(store / f"{which}_indptr.npy", mmap_mode="r")
        # With more than 2^31 values indptr is of 64 bits, and scipy would copy indices to 64 bits too.
        self.held = held and self.indptr.dtype == np.int32
        if self.held:
            data = np.load(data_file, mmap_mode="r")
            indices = np.load(indices_file, mmap_mode="r")
            shape = (len(self.indptr) - 1, columns)
            self.matrix = csr_array((data, indices, self.indptr), shape=shape)
        else:
            self.data = Stretches(data_file)
            self.indices = Stretches(indices_file)

    def read(self, places: np.ndarray, device: torch.device) -> torch.Tensor:
        """Rows [n] of the matrix as float32 [n, D] on the device, dense."""
        rows = self.matrix[places] if self.held else self._stream(places)
        if device.type == "cpu":
            return torch.from_numpy(rows.toarray())
        return unpack(rows, device)

    def _stream(self, places: np.ndarray) -> csr_array:
        starts = self.indptr[places].astype(np.int64)
        lengths = self.indptr[places + 1] - starts
        pointers = np.append(0, lengths.cumsum()).astype(np.int32)
        data = self.data.read(starts, lengths)
        indices = self.indices.read(starts, lengths)
        return csr_array((data, indices, pointers), shape=(len(places), self.columns))


def unpack(rows: csr_array, device: torch.device) -> torch.Tensor:
    """Sparse rows as dense ones on a device that fills in the zeros itself: a tenth of the bytes travel."""
    parts = (rows.data, rows.indices, rows.indptr)
    values, columns, pointers = (send(torch.from_numpy(part), device) for part in parts)
    n, D = rows.shape
    first = torch.arange(n, device=device) * D  # place of each row's first column in the flat result
    place = torch.repeat_interleave(first, pointers.diff(), output_size=len(values)) + columns
    dense = torch.zeros(n * D, device=device)
    return dense.scatter_(0, place, values).view(rows.shape)


# ---------------------------------------------------------------------------------------------------------------
# The folder: found, made once, opened
# ---------------------------------------------------------------------------------------------------------------
REMEDY = "delete this folder, and the next start makes it anew"


def store_hash(files: list[Path], columns: dict, keys: dict, counts: str) -> str:
    """Twelve digits that change with all that the arrays are made from: files by size and time, so none is read."""
    stats = []
    for file in files:
        stat = regular_file(file).stat()
        stats.append((os.path.realpath(file), stat.st_size, stat.st_mtime_ns))
    text = json.dumps([VERSION, stats, columns, keys, counts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def find_store(folder: str | Path, name: str) -> Path | None:
    """The folder of this hash, whichever TOML it was made for."""
    return next(Path(folder).glob(f"*-{name}"), None)


def wait_for_store(folder: str | Path, name: str) -> Path:
    """The folder, once the first rank of the machine has made it. Raises DataError where it does not come."""
    word = on_this_machine(f"{name} is made")
    if is_first_of_machine():
        tell(word)
    elif not wait_until(lambda: find_store(folder, name), word):
        raise DataError(not_here(Path(folder) / name))
    return find_store(folder, name)


def make_store(target: Path, write: Callable[[Path], None]) -> None:
    """write(work) fills a folder beside `target`, which takes that name at the end: it is complete or not there.

    Of several processes one writes, and the others wait. What a killed one left is cleared away by the next.
    Raises DataError where it cannot be written.
    """
    work = target.with_name(f"{target.name}.making")
    lock = target.with_name(f"{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as handle:
            lock_file(handle)
            if not target.exists():
                fill_and_rename(work, target, write)
            lock.unlink(missing_ok=True)  # who still waits for this one finds the folder
    except OSError as error:
        raise DataError(
            f"the prepared cells cannot be written to {target} ({error.strerror or error}): "
            "free some space, or start where data/ can be written"
        ) from error


def lock_file(handle: IO) -> None:
    """Wait for a lock, which the kernel lets go when its holder ends, however it ends."""
    try:
        flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process, which prepares these cells and holds {handle.name}", flush=True)
        flock(handle)


def fill_and_rename(work: Path, target: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        write(work)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def holds_values(name: str) -> bool:
    """Whether a file holds expression, of which a start reads at most MOST_BLOCKS; the others it reads whole."""
    return name in ("input.npy", "counts.npy") or name.endswith(("_data.npy", "_indices.npy"))


def checksums_of(path: Path) -> tuple[int, list[int]]:
    """(CRC-32 of a file, those of its blocks); memory holds a piece of a block."""
    whole = 0
    blocks = []
    buffer = memoryview(bytearray(PIECE))
    done = 0
    with open(path, "rb") as file:
        while count := file.readinto(buffer):
            if done % BLOCK == 0:
                blocks.append(0)
            whole = zlib.crc32(buffer[:count], whole)
            blocks[-1] = zlib.crc32(buffer[:count], blocks[-1])
            done += count
    return whole, blocks


def write_meta(store: Path, meta: dict) -> None:
    """meta.json, with a checksum of its own."""
    sealed = meta | {"checksum": zlib.crc32(json.dumps(meta, sort_keys=True).encode())}
    (store / "meta.json").write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")


def read_meta(store: Path, values: bool = True) -> dict:
    """meta.json of a prepared folder whose files are all there and as they were written. Raises DataError.

    Each file is compared with its checksum, as far as it is read; values: also those with expression.
    """
    try:
        meta = json.loads(regular_file(store / "meta.json").read_text(encoding="utf-8"))
        whole = meta.pop("checksum") == zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{store} is damaged, its meta.json cannot be read ({reason(error)}): {REMEDY}") from error
    if not whole:
        raise DataError(f"{store} is damaged, its meta.json was changed: {REMEDY}")
    try:
        if meta["version"] != VERSION:
            raise DataError(f"{store} is of an earlier version, which no start reads: delete it")
        verify_files(store, meta, values)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{store} is damaged, its meta.json says something else ({reason(error)}): {REMEDY}"
                        ) from error
    return meta


def verify_files(store: Path, meta: dict, values: bool) -> None:
    """Sizes, contents and headers of the files of a folder; DataError where they are not as they were written."""
    for name, size in meta["sizes"].items():
        file = store / name
        actual = file.stat().st_size if file.is_file() else 0
        if actual != size:
            raise DataError(f"{store} is damaged, {name} has {actual:,} bytes instead of {size:,}: {REMEDY}")
        # Codes and places of a million cells: some milliseconds. A wrong one would be another cell, without a word.
        if not holds_values(name):
            verify(store, name, meta)
        elif values:
            verify_blocks(store, name, meta)
    cells = (meta["sizes"]["place.npy"] - HEADER) // 8
    for name, (kind, shape) in expected_arrays(meta, cells).items():
        try:
            array = np.load(store / name, mmap_mode="r")  # the header
        except Exception as error:  # which is a text of Python: it raises whatever its bytes happen to ask for
            raise DataError(f"{store} is damaged, {name} cannot be read ({reason(error)}): {REMEDY}") from error
        if array.dtype not in kind or array.shape != shape:
            raise DataError(f"{store} is damaged, {name} holds {array.dtype} of shape {array.shape}: {REMEDY}")


def expected_arrays(meta: dict, cells: int) -> dict[str, tuple]:
    """(types, shape) of the arrays of a folder by their files."""
    if set(meta["survey"]) != set(STORED_NAMES):
        raise LookupError("survey")
    arrays = {f"{name}.npy": ([np.int32], (cells,)) for name in CODES}
    arrays["place.npy"] = [np.int64], (cells,)
    for which, entry in meta["matrices"].items():
        if entry["format"] == "dense":
            arrays[f"{which}.npy"] = [np.float32], (cells, entry["columns"])
        else:
            values = (meta["sizes"][f"{which}_data.npy"] - HEADER) // 4
            arrays[f"{which}_data.npy"] = [np.float32], (values,)
            arrays[f"{which}_indices.npy"] = [np.int32], (values,)
            arrays[f"{which}_indptr.npy"] = [np.int32, np.int64], (cells + 1,)
    return arrays


def verify(store: Path, name: str, meta: dict) -> None:
    """Read a file whole; DataError unless it holds what was written."""
    if checksums_of(store / name)[0] != meta["checksums"][name]:
        raise DataError(f"{store} is damaged, {name} does not hold what was written: {REMEDY}")


def verify_blocks(store: Path, name: str, meta: dict) -> None:
    """Read a file up to MOST_BLOCKS: its first block, and others that differ from start to start.

    A folder of before has no checksums of blocks: its larger files are not read. DataError as of verify.
    """
    size = meta["sizes"][name]
    if size <= MOST_BLOCKS * BLOCK:
        verify(store, name, meta)
        return
    blocks = meta.get("blocks", {}).get(name)
    if blocks is None:
        telling.note(
            f"{store} has no checksums of parts, so {name} is not verified: python prepare_data.py inspect {store} "
            "reads it whole; deleted, the next start makes it anew with them"
        )
        return
    others = np.random.default_rng().permutation(np.arange(1, len(blocks)))
    with open(store / name, "rb") as file:
        for block in sorted([0, *others[: MOST_BLOCKS - 1].tolist()]):
            file.seek(block * BLOCK)
            if zlib.crc32(file.read(BLOCK)) != blocks[block]:
                raise DataError(f"{store} is damaged, {name} does not hold what was written: {REMEDY}")


def content_digest(meta: dict) -> str:
    """16 hex digits of the expression in a folder, as it was read, and of what codes and columns mean.

    Made of checksums, so nothing is read. Where the files were, and how they are arranged here, plays no part; of a
    sparse and of a dense file with the same values the digests differ.
    """
    of_matrices = {}
    for which, entry in meta["matrices"].items():
        of_matrices[which] = [entry[name] for name in ("key", "columns", "converted", "digests")]
    survey = {name: value for name, value in meta["survey"].items() if name != "differences"}  # which name paths
    text = json.dumps([of_matrices, survey], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_codes(store: Path, name: str) -> np.ndarray:
    """A column of the cells, mapped: ranks share it."""
    return np.asarray(np.load(store / f"{name}.npy", mmap_mode="r"))


def stored_survey(store: Path, meta: dict) -> Survey:
    """The survey that a folder was made from; its orders were applied when the matrices were written."""
    codes = {name: load_codes(store, name) for name in CODES}
    return Survey(codes=codes, orders={}, **meta["survey"])


# ---------------------------------------------------------------------------------------------------------------
# Writing the folder
# ---------------------------------------------------------------------------------------------------------------
def write_store(
    work: Path,
    plan: Plan,
    survey: Survey,
    keys: dict[str, str],
    counts: str,
    ram_budget_gb: float,
) -> None:
    """Fill a folder: two passes over the matrices, one that checks their values and one that writes them in order."""
    codes = survey.codes
    total = len(codes["file"])
    # A sentence has cells of one file, type and perturbation, perhaps one batch: in this order they are neighbours.
    sorted_by = [codes[name] for name in ("file", "cell_type", "perturbation", "batch")]
    order, _ = grouped(np.arange(total), *sorted_by)
    place = np.empty(total, np.int64)
    place[order] = np.arange(total)
    for name, values in codes.items():
        np.save(work / f"{name}.npy", values)
    np.save(work / "place.npy", place)

    size = min(ram_budget_gb * 1e9, 1 << 62)  # a number above that is no size
    most_values = max(1 << 16, int(size) // 256)  # memory holds a block and a few copies of it
    with ExitStack() as stack:
        drafts = {}
        for which, key in keys.items():
            source = Source(plan.files, key, most_values, stack)
            genes = survey.genes if which == "input" else survey.count_genes
            drafts[which] = Draft(work, which, source, survey.orders[which], len(genes), place)
        announce(work, plan, total, drafts)
        text = f"preparing {counted(total, 'cell')}: checked, then written"
        with telling.bar(None, text, 2 * total * len(drafts), "cells") as bar:
            for draft in drafts.values():
                draft.check(counts, bar)
            for draft in drafts.values():
                draft.write(bar)

    written = sorted(file.name for file in work.iterdir())
    # Read back at once, from memory: 7 GB a second where the disk writes at less than one.
    checksums = {name: checksums_of(work / name) for name in written}
    meta = {
        "version": VERSION,
        "made_for": str(plan.path),
        "files": [str(file) for file in plan.files],
        "matrices": {which: draft.entry() for which, draft in drafts.items()},
        "survey": {name: getattr(survey, name) for name in STORED_NAMES},
        "sizes": {name: (work / name).stat().st_size for name in written},
        "checksums": {name: whole for name, (whole, _) in checksums.items()},
        "blocks": {name: blocks for name, (_, blocks) in checksums.items() if holds_values(name)},
    }
    write_meta(work, meta)
    for name in [*written, "meta.json"]:
        settle(work / name)


def settle(path: Path) -> None:
    """Bring a file to the disk, and out of memory: read again in one piece it lies in larger pages, 20% faster."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def announce(work: Path, plan: Plan, total: int, drafts: dict) -> None:
    """Say what is made, from what and where; DataError if it does not fit on the disk."""
    size = sum(draft.bytes for draft in drafts.values())
    free = shutil.disk_usage(work).free
    target = work.with_suffix("")
    if size > free:
        raise DataError(
            f"the prepared cells take {size / 1e9:.1f} GB in {target}, where {free / 1e9:.1f} GB are free: "
            "free some, or start where data/ has room"
        )
    widths = " and ".join(f"{counted(draft.columns, 'column')} of {draft.source.key}" for draft in drafts.values())
    files = counted(len(plan.files), "file")
    print(
        f"preparing {counted(total, 'cell')} x {widths} of {plan.path} ({files}), once: "
        f"{size / 1e9:.2f} GB in {target}",
        flush=True,
    )


class Source:
    """The matrix of one key in several files. Of more than MOST_OPEN one is open at a time: a system opens a thousand
    or so, and each holds the names of its cells. Of fewer all stay open: what is stored by columns is turned once."""

    def __init__(self, paths: list[Path], key: str, most_values: int, stack: ExitStack):
        self.paths = paths
        self.key = key
        self.most_values = most_values  # of a block
        self.stack = stack  # closes those that stay open
        self.matrices = {}  # of these, by file

    def __len__(self) -> int:
        return len(self.paths)

    @contextmanager
    def open(self, f: int) -> Iterator[Matrix]:
        """That of a file."""
        if f in self.matrices:
            yield self.matrices[f]
            return
        with ExitStack() as here:
            stays = len(self.paths) <= MOST_OPEN
            file = (self.stack if stays else here).enter_context(H5ad(self.paths[f]))
            matrix = file.matrix(self.key)
            matrix.entries = min(matrix.entries, self.most_values)
            if stays:
                self.matrices[f] = matrix
            yield matrix


class Draft:
    """One matrix of the folder while it is made, from that of every file."""

    def __init__(
        self,
        work: Path,
        which: str,
        source: Source,
        orders: list[np.ndarray | None],
        columns: int,
        place: np.ndarray,
    ):
        self.work = work
        self.which = which
        self.source = source
        self.orders = orders
        self.columns = columns
        self.place = place
        self.converted = [""] * len(source)  # of each file: see conversion
        self.digests = [""] * len(source)  # of each file: of its values as they are read, before conversion
        # Sparse if most cells are: a CSR matrix with more than half of its values is larger than a dense one.
        sizes = [0]  # cells of each file, after the 0
        values = 0
        sparse_cells = 0
        for f in range(len(source)):
            with source.open(f) as matrix:
                rows, width = matrix.shape
                sizes.append(rows)
                values += matrix.nnz
                if matrix.format != "dense" and matrix.nnz <= 0.5 * rows * width:
                    sparse_cells += rows
        self.first = np.cumsum(sizes)  # cell where each file begins
        self.sparse = 2 * sparse_cells > len(place)
        if self.sparse:
            self.bytes = 8 * values + 8 * len(place)  # data and indices of 4 bytes each; indptr of at most 8
        else:
            self.bytes = 4 * len(place) * columns

    def entry(self) -> dict:
        """What meta.json says of it."""
        parts = ("_data", "_indices", "_indptr") if self.sparse else ("",)
        return {
            "key": self.source.key,
            "format": "csr" if self.sparse else "dense",
            "columns": self.columns,
            "files": [f"{self.which}{part}.npy" for part in parts],
            "converted": self.converted,
            "digests": self.digests,
        }

    def blocks(self, f: int) -> Iterator[tuple[np.ndarray, np.ndarray | csr_array]]:
        """(rows in the folder, expression) of the blocks of a file: converted, in the order of the genes."""
        place = self.place[self.first[f] : self.first[f + 1]]  # of the cells of the file
        with self.source.open(f) as matrix:
            for start, stop, block in matrix.blocks():
                block = convert(block, self.converted[f], matrix)
                if self.orders[f] is not None:
                    block = block[:, self.orders[f]]
                block = csr_array(block) if self.sparse else as_dense(block)
                yield place[start:stop], block

    def check(self, counts: str, bar: telling.Work) -> None:
        """The first pass: raises DataError for values that cannot serve, and finds what is to be converted."""
        for f in range(len(self.source)):
            digest = Digest(self.orders[f])
            with self.source.open(f) as matrix:
                self.converted[f] = conversion(matrix, counts, bar.update, digest.add)
            self.digests[f] = digest.text()

    def write(self, bar: telling.Work) -> None:
        """The second pass: every block to the rows of its cells."""
        if self.sparse:
            self.write_sparse(bar)
        else:
            self.write_dense(bar)

    def write_dense(self, bar: telling.Work) -> None:
        shape = (len(self.place), self.columns)
        values = empty_array(self.work / f"{self.which}.npy", np.float32, shape)
        for f in range(len(self.source)):
            for place, block in self.blocks(f):
                starts = place * self.columns
                lengths = np.full(len(place), self.columns)
                values.write(starts, lengths, block)
                bar.update(len(place))

    def write_sparse(self, bar: telling.Work) -> None:
        indptr = np.concatenate(([0], self.row_lengths().cumsum()))
        total = int(indptr[-1])
        kind = np.int32 if total < 2**31 else np.int64
        np.save(self.work / f"{self.which}_indptr.npy", indptr.astype(kind))
        data = empty_array(self.work / f"{self.which}_data.npy", np.float32, (total,))
        indices = empty_array(self.work / f"{self.which}_indices.npy", np.int32, (total,))
        for f in range(len(self.source)):
            for place, block in self.blocks(f):
                starts = indptr[place]
                lengths = np.diff(block.indptr)
                data.write(starts, lengths, block.data)
                indices.write(starts, lengths, block.indices)
                bar.update(len(place))

    def row_lengths(self) -> np.ndarray:
        """Values of every row in the folder, int64 [N]: where a row goes depends on all before it."""
        lengths = np.zeros(len(self.place), np.int64)
        for f in range(len(self.source)):
            with self.source.open(f) as matrix:
                if matrix.format == "csr" and self.orders[f] is None:
                    rows = self.place[self.first[f] : self.first[f + 1]]
                    lengths[rows] = np.diff(hdf5.read(matrix.parts["indptr"]))
                    continue
            for place, block in self.blocks(f):  # not told by the file: dense, by columns, or genes are left out
                lengths[place] = np.diff(block.indptr)
        return lengths


def empty_array(path: Path, kind: type, shape: tuple) -> Stretches:
    """A new .npy file of this size, to be written in stretches."""
    dtype = np.dtype(kind)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))  # bytes
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + size)
    return Stretches(path, os.O_RDWR)


def normalized(block: np.ndarray | csr_array) -> np.ndarray | csr_array:
    """Counts -> log(1 + TARGET_SUM x / total of the cell), float32."""
    scale = TARGET_SUM / np.maximum(row_sums(block), 1e-30)  # [rows]; a cell without counts stays without
    if isinstance(block, csr_array):
        scale_of_value = np.repeat(scale, np.diff(block.indptr))
        scaled = (block.data * scale_of_value).astype(np.float32)
        return csr_array((np.log1p(scaled), block.indices, block.indptr), shape=block.shape)
    scaled = (block * scale[:, None]).astype(np.float32)
    return np.log1p(scaled)


class Digest:
    """CRC-32 of a matrix as it is read, block after block: however it is cut, whatever becomes of it afterwards.

    So it says the same on every processor, while logarithms may differ in the last bit. order: of its columns.
    """

    def __init__(self, order: np.ndarray | None):
        self.order = 0 if order is None else zlib.crc32(order.astype(np.int64))
        self.values = 0
        self.columns = 0  # of the values, where not all are stored
        self.lengths = 0  # of the rows, likewise

    def add(self, block: np.ndarray | csr_array) -> None:
        self.values = zlib.crc32(np.ascontiguousarray(stored(block)), self.values)
        if isinstance(block, csr_array):
            self.columns = zlib.crc32(block.indices.astype(np.int32, copy=False), self.columns)
            self.lengths = zlib.crc32(np.diff(block.indptr).astype(np.int64), self.lengths)

    def text(self) -> str:
        return f"{self.values:08x}{self.columns:08x}{self.lengths:08x}{self.order:08x}"


def is_expression(matrix: Matrix) -> bool:
    """Whether a matrix should hold expression; what else obsm has may be anything, as embeddings are."""
    return matrix.key == "obsm/X_hvg" or not matrix.key.startswith("obsm/")


def conversion(matrix: Matrix, counts: str, done: Callable | None = None, read: Callable | None = None) -> str:
    """Read a matrix once; what makes expression of it: "normalise", "rescale" (a logarithm to another base) or "".

    Args:
        counts: the setting of train_state.py. done, read: as of Matrix.check.
    Raises DataError for what is not finite, negative, raw counts, not logged, or nothing but zeros.
    """
    values = matrix.check(done, read)
    kind = kind_of_values(values)
    if kind == "nothing but zeros":
        raise DataError(f"{matrix.where} holds nothing but zeros, nothing to learn from: is the file whole?")
    if not is_expression(matrix):
        return ""
    if kind == "negative values":
        refuse_negative(matrix)
    if counts == "counts":
        return ""
    if counts == "log1p" or kind == "log1p":
        if values["log_base"] == math.e:
            return ""
        telling.note(f"{matrix.where} is log1p to base {values['log_base']:g}: brought to the natural logarithm")
        return "rescale"
    in_obsm = matrix.key.startswith("obsm/")
    if counts == "convert" and not in_obsm:
        return "normalise"
    what = {"counts": "raw counts", "normalised, not logged": "normalised values"}.get(kind, "values")
    layer = "" if in_obsm or matrix.key == "X" else f" --layer={matrix.key}"
    remedy = "" if in_obsm else ", or train with counts=convert, which normalises while reading"
    if kind == "normalised, not logged":  # told by their sums, which logarithms of few genes may have too
        remedy += ", or with counts=log1p if these are logarithms after all"
    raise DataError(
        f"{matrix.where} holds {what} up to {values['max']:g}, not log1p: python prepare_data.py state "
        f"--action=preprocess --input={matrix.source.path}{layer}{remedy}"
    )


def convert(block: np.ndarray | csr_array, how: str, matrix: Matrix) -> np.ndarray | csr_array:
    """A block of a matrix as expression; how: of conversion."""
    if how == "normalise":
        return normalized(block)
    if how == "rescale":
        factor = np.float32(math.log(matrix.source.log_base))
        if isinstance(block, csr_array):
            return csr_array((block.data * factor, block.indices, block.indptr), shape=block.shape)
        return block * factor
    return block


def refuse_negative(matrix: Matrix) -> None:
    """Raise DataError that names the first cell with a negative value."""
    remedy = ""
    if "raw/X" in matrix.source.keys and matrix.key != "raw/X":
        command = f"python prepare_data.py state preprocess --input={matrix.source.path} --layer=raw/X"
        remedy = f"; what it was made from may be in raw/X: {command}"
    for start, _, block in matrix.blocks():
        negative = stored(block) < 0
        if negative.any():
            raise DataError(
                f"{matrix.where} holds {matrix.first_row(start, block, negative)}: "
                f"expression is never negative; an embedding belongs in obsm under another name{remedy}"
            )


def read_rows(file: H5ad, embed_key: str | None, counts: str, rows: np.ndarray, columns=slice(None)) -> np.ndarray:
    """These columns of these (ascending) rows of a file of no TOML, [n, D] float32, checked. Raises DataError."""
    matrix = file.matrix(embed_key)
    how = conversion(matrix, counts)
    parts = []
    for start, stop, block in matrix.blocks():
        block = convert(block, how, matrix)
        inside = rows[(rows >= start) & (rows < stop)]
        parts.append(as_dense(block[inside - start])[:, columns])
    return np.concatenate(parts)
