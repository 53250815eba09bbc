"""The identity of prepared data: a digest of all of it, made while it is written, or a sample where there is none."""

import hashlib
import json

import numpy as np

SAMPLES = 64  # blocks of an array that a sample reads
SAMPLE_TOKENS = 1 << 15  # of each: 64 kB of the usual type
PIECE = 1 << 20  # tokens that are copied at once


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
