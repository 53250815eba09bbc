"""HDF5 files of chunks held against what they must be: layout, categories, exact predictors, and the checksums in them.

A file of ours says, in its attribute sha256, the digest of its tokens and categories, which is its identity too, and
in its attribute checksums those of all else that is read of it, with a sample of the tokens for files too large to be
read whole whenever training starts.
"""

import json
import math
from pathlib import Path

import h5py
import numpy as np

from common.errors import DataError
from configurator import note
from sources.digests import CHECKED_WHOLE, ChunkDigest, content, sample, sha256
from sources.hdf5 import as_text, attribute, guard, has, member, numbers, read, where
from sources.hdf5 import names as names_in

BLOCK = 1 << 16  # chunks read at once
MOST_TOKENS = 1 << 31  # of a vocabulary
ROUNDING = 1e-6  # nats that a log-probability may be above 0
ARRAYS = {  # beside tokens and categories, with the type whose bytes count
    "doc_idx_for_chunk": "<i8",
    "oracle_log_prob": "<f4",
    "oracle_xe_mixture": "<f8",
    "oracle_xe_component": "<f8",
}
AGAIN = "prepare the folder again"

# -------------------------------------------------------------------------------------------------------------- layout


def layout(file: h5py.File) -> tuple[list[str], np.ndarray]:
    """(category names, category code of every chunk) of a file of this layout or of the source's.

    Raises DataError for a file that is foreign or damaged, lacks a data set, or says two categories of one chunk.
    """
    path = file.filename
    for name, ndim in (("token_chunks", 2), ("category_for_chunk", 1), ("doc_idx_for_chunk", 1)):
        node = member(file, name, h5py.Dataset) if has(file, name) else None
        if node is None or len(node.shape or ()) != ndim:
            there = ", ".join(map(str, names_in(file))) or "none"
            raise DataError(f"{path} has no dataset {name!r} of {ndim} dimensions; it has {there}")
    tokens = numbers(file, "token_chunks", "iu", 2)
    documents = numbers(file, "doc_idx_for_chunk", "iu")
    labels = member(file, "category_for_chunk", h5py.Dataset)
    have_one_length = len(tokens) == len(labels) == len(documents)
    if not tokens.size or not have_one_length:
        raise DataError(f"{path}: token_chunks, category_for_chunk and doc_idx_for_chunk must have one length, above 0")
    if h5py.check_string_dtype(labels.dtype) is None:
        raise DataError(f"{path}: category_for_chunk holds {labels.dtype}, not names")
    if has(file, "category_code"):
        return coded(file, labels)
    what = where(labels)
    read_labels = read(labels).tolist()
    texts = np.array([as_text(label, what) for label in read_labels])
    names, first, codes = np.unique(texts, return_index=True, return_inverse=True)
    order = first.argsort()  # as they come in the file
    place = order.argsort()  # of each name in that order
    return names[order].tolist(), place[codes].astype(np.uint16)


def coded(file: h5py.File, labels: h5py.Dataset) -> tuple[list[str], np.ndarray]:
    """(names, codes) as a file of ours has them, which must say of every chunk what its name says."""
    node = numbers(file, "category_code", "iu")
    what = where(node)
    listed = np.atleast_1d(attribute(node, "names", []))
    names = [as_text(name, what) for name in listed.tolist()]
    codes = read(node)
    if not names or len(set(names)) < len(names):
        raise DataError(f"{what} has no names, or one twice: {AGAIN}")
    in_range = len(codes) and codes.min() >= 0 and codes.max() < len(names)
    if len(codes) != len(labels) or not in_range:
        raise DataError(f"{what} has not one number below {len(names)} for each of {len(labels):,} chunks: {AGAIN}")
    encoded = np.array([name.encode() for name in names])
    for begin in range(0, len(labels), BLOCK):
        rows = slice(begin, begin + BLOCK)
        told = read(labels, rows).astype("S")
        wrong = np.flatnonzero(told != encoded[codes[rows]])
        if len(wrong):
            chunk = begin + wrong[0]
            raise DataError(
                f"{file.filename}: category_code and category_for_chunk disagree about chunk {chunk:,}: {AGAIN}"
            )
    return names, codes


def whole_attribute(file: h5py.File, name: str, least: int, most: float = math.inf) -> int | None:
    """An attribute that is one whole number; None where there is none. Raises DataError for anything else."""
    value = attribute(file, name)
    if value is None:
        return None
    number = value
    if isinstance(value, np.generic | np.ndarray) and value.size == 1:
        number = value.item()
    is_whole = isinstance(number, int) and not isinstance(number, bool)
    if not is_whole or not least <= number <= most:
        raise DataError(f"{file.filename}: its attribute {name} is {value!r:.60}, not a whole number from {least:,} "
                        f"on: {AGAIN}")
    return number


def text_attribute(file: h5py.File, name: str) -> str:
    """An attribute as text, "" where there is none."""
    return as_text(attribute(file, name, ""), f"{file.filename}, attribute {name!r},")


def oracle(file: h5py.File, codes: np.ndarray, count: int) -> np.ndarray | None:
    """log p_k(x_t | x_<t) [R, K, n], where the file has it.

    Raises DataError where it is of other chunks or categories, or holds what no log-probability is: a component may
    exclude what another says, but not what it has said itself.
    """
    if not has(file, "oracle_log_prob"):
        return None
    node = numbers(file, "oracle_log_prob", "f", 3)
    R, n = member(file, "token_chunks").shape
    if node.shape != (R, count, n):
        raise DataError(f"{where(node)} has shape {node.shape}, not {(R, count, n)}: {AGAIN}")
    values = read(node)
    for begin in range(0, R, BLOCK):
        rows = slice(begin, begin + BLOCK)
        block = values[rows]
        component = codes[rows].astype(np.int64)
        own = block[np.arange(len(block)), component]
        are_below_0 = (block <= ROUNDING).all()  # false for what is no number too
        if not are_below_0 or not np.isfinite(own).all():
            raise DataError(
                f"{where(node)} holds values that no log-probability has (above 0, infinite, none): {AGAIN}"
            )
    return values


# ----------------------------------------------------------------------------------------------------------- checksums


def seal(file: h5py.File, codes: np.ndarray, names: list[str]) -> None:
    """Write the digests of all that is in a file beside its tokens, in its attribute checksums; nothing follows it."""
    arrays = [name for name in ARRAYS if name in file]
    digests = checksums(file, codes, names, arrays, list(file.attrs))
    file.attrs["checksums"] = json.dumps(digests)


def checksums(file: h5py.File, codes: np.ndarray, names: list[str], arrays: list[str], attributes: list[str]) -> dict:
    """Digests of a sample of the tokens, of the categories, and of the arrays and attributes of these names."""
    digests = {
        "a sample of its tokens": sample(member(file, "token_chunks")),
        "its categories": sha256([names, content(codes, "<u2")]),
    }
    for name in arrays:
        node = member(file, name, h5py.Dataset)
        with guard(where(node)):
            digests[name] = content(node, ARRAYS[name])
    for name in attributes:
        value = attribute(file, name)
        plain = None if value is None else np.asarray(value).tolist()
        digests[f"its attribute {name}"] = sha256([plain])
    return digests


def verify(file: h5py.File, tokens: np.ndarray, codes: np.ndarray, names: list[str], every: bool) -> bool:
    """Hold a file against its checksums; raises DataError for one that has changed. Returns whether it has any.

    tokens: [R, n], an array or data set. every: read all of them, however many there are.
    """
    path = file.filename
    expected = text_attribute(file, "sha256")
    rest = text_attribute(file, "checksums")
    if not expected and not rest:
        return False
    if every or tokens.size * tokens.dtype.itemsize <= CHECKED_WHOLE:
        digest = digest_of(tokens, codes, names)
        if digest != expected:
            raise DataError(
                f"{path} is not what was prepared: its tokens and categories have the sha256 {digest[:16]}..., "
                f"not {expected[:16]}... as the file says; {AGAIN}"
            )
    if not rest:
        note(f"{path} was prepared by an earlier version, without checksums of all that it holds: prepared again by "
             "prepare_data.py it has them, and damage is found")
        return True
    try:
        known = json.loads(rest)
        arrays = [name for name in known if name in ARRAYS]
        attributes = [name.removeprefix("its attribute ") for name in known if name.startswith("its attribute ")]
        now = checksums(file, codes, names, arrays, attributes)
        changed = [name for name in now | known if now.get(name) != known.get(name)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not what was prepared: its checksums cannot be read; {AGAIN}") from error
    if changed or "sha256" not in attributes:
        named = ", ".join(changed) or "its checksums"
        raise DataError(f"{path} is not what was prepared, by its checksums: {named} changed; {AGAIN}")
    return True


def digest_of(tokens: np.ndarray | h5py.Dataset, codes: np.ndarray, names: list[str]) -> str:
    """The digest of all rows [R, n] and their categories, read block by block."""
    digest = ChunkDigest()
    for begin in range(0, len(tokens), BLOCK):
        rows = slice(begin, begin + BLOCK)
        digest.add(tokens[rows], codes[rows])
    return digest.hexdigest(tokens.shape[1], names)


def is_mapped(file: h5py.File) -> bool:
    """Whether token_chunks is one block of the file in this machine's byte order, that lies inside it."""
    node = member(file, "token_chunks", h5py.Dataset)
    with guard(where(node)):
        offset = node.id.get_offset()
        is_one_block = node.chunks is None and offset is not None and not node.is_virtual
        if not is_one_block or not node.dtype.isnative:
            return False
        end = offset + node.size * node.dtype.itemsize
        if end > Path(file.filename).stat().st_size:
            raise DataError(f"{where(node)} goes beyond the end of the file: it is cut short; copy it again")
        return True
