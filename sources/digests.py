"""The identity of prepared data: digests of all of it and of samples, by which damage is found."""

import hashlib
import json
from pathlib import Path

import numpy as np

from common.errors import DataError

SAMPLES = 64  # blocks of an array that a sample reads
SAMPLE_TOKENS = 1 << 15  # of each: 64 kB of the usual type
PIECE = 1 << 20  # tokens that are copied at once
CHECKED_WHOLE = 1 << 28  # bytes: when training starts, a larger file is held against a digest of a sample alone


def fingerprint(*parts: str) -> str:
    """16 hex digits that only these decide: what a checkpoint keeps of the data that it was trained on."""
    return sha256(list(parts))[:16]


def sha256(facts: list) -> str:
    """That of strings, numbers and lists of them."""
    text = json.dumps(facts)
    return hashlib.sha256(text.encode()).hexdigest()


def sample(array: np.ndarray) -> str:
    """A digest of an array's shape and of 64 blocks of 32,768 tokens, spread evenly over it: as fast for any size.

    For integer tokens [R] or [R, n] below 2**32, of whatever type and byte order; all of them if they are few.
    """
    shape = str(array.shape)
    digest = hashlib.sha256(shape.encode())
    count = len(array)
    rows = max(1, SAMPLE_TOKENS * count // max(array.size, 1))  # of a block
    last = max(0, count - rows)
    begins = np.linspace(0, last, SAMPLES)
    for begin in np.unique(begins.astype(int)):
        block = array[begin : begin + rows]
        digest.update(plain(block, "<u4"))
    return digest.hexdigest()


def content(array: np.ndarray, dtype: str) -> str:
    """A digest of an array's shape and of all its numbers as this type, whatever layout a file has them in."""
    shape = str(array.shape)
    digest = hashlib.sha256(shape.encode())
    rows = max(1, PIECE * len(array) // max(array.size, 1))
    for begin in range(0, len(array), rows):
        digest.update(plain(array[begin : begin + rows], dtype))
    return digest.hexdigest()


def of_file(path: Path) -> dict:
    """{bytes, sha256, sample} of a file; the sample is of its bytes as an array."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    return {"bytes": size, "sha256": digest, "sample": sample(as_bytes(path))}


def as_bytes(path: Path) -> np.ndarray:
    """All bytes of a file as a memory map."""
    return np.memmap(path, np.uint8, "r")


def check_file(path: Path, facts: dict, whole: bool) -> None:
    """Hold a file against what `of_file` said of it; raises DataError for one that has changed.

    whole: read all of it, and not a sample alone where it is large.
    """
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise DataError(f"{path} has {size:,} bytes, but meta.json says {facts['bytes']:,}: prepare the folder again")
    if whole or size <= CHECKED_WHOLE:
        with open(path, "rb") as file:
            kind, digest = "sha256", hashlib.file_digest(file, "sha256").hexdigest()
    else:
        kind, digest = "sample", sample(as_bytes(path))
    if digest != facts[kind]:
        raise DataError(f"{path} is not what was prepared: its {kind} is {digest[:16]}..., but meta.json says "
                        f"{facts[kind][:16]}...; prepare the folder again")


def plain(array: np.ndarray, dtype: str) -> np.ndarray:
    """The same numbers in one piece of memory and of this type, so that equal numbers are equal bytes."""
    return np.ascontiguousarray(array, dtype)


class ChunkDigest:
    """sha256 of chunks of tokens and of their categories, row by row: the same in whatever layout a file has them."""

    def __init__(self):
        self.tokens = hashlib.sha256()
        self.codes = hashlib.sha256()

    def add(self, tokens: np.ndarray, codes: np.ndarray) -> None:
        """Rows [B, n], and the numbers of their categories [B]."""
        rows = max(1, PIECE // tokens.shape[1])
        for begin in range(0, len(tokens), rows):  # copies of a few megabytes, however long the chunks are
            self.tokens.update(plain(tokens[begin : begin + rows], "<u4"))
        self.codes.update(plain(codes, "<u2"))

    def hexdigest(self, size: int, names: list[str]) -> str:
        """That of chunks of `size` tokens whose categories have these names, by number."""
        tokens = self.tokens.hexdigest()
        codes = self.codes.hexdigest()
        return sha256([size, names, tokens, codes])


class Seen:
    """A set of numbers of 64 bits, at most 20 bytes each, where Python's takes 100: those that came last are in one of
    Python's, those before in order in an array."""

    FEW = 1 << 16  # that one of Python's may always have

    def __init__(self):
        self.earlier = np.empty(0, np.uint64)  # ascending
        self.latest = set()

    def __contains__(self, number: int) -> bool:
        if number in self.latest:
            return True
        place = int(self.earlier.searchsorted(np.uint64(number)))
        return place < len(self.earlier) and int(self.earlier[place]) == number

    def add(self, number: int) -> None:
        self.latest.add(number)
        # A sixteenth of all: what is moved in all stays in proportion to their number.
        if len(self.latest) > max(self.FEW, len(self.earlier) // 16):
            latest = np.fromiter(self.latest, np.uint64, len(self.latest))
            self.latest = set()
            self.earlier = np.concatenate([self.earlier, latest])
            self.earlier.sort()
