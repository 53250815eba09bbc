"""A file of token chunks as arrays: read, checked once, mapped into memory. What train_arxiv.py learns from."""

from pathlib import Path

import numpy as np

from common.errors import DataError
from sources.chunks import map_tokens, open_chunks


def read_corpus(path: Path, vocab_size: int = 0) -> dict:
    """The arrays of an HDF5 file of prepare_data.py, or of the source, which does not say its vocabulary.

    Returns: tokens [R, n] (a memory map), codes [R] (the category of each chunk, a number of names), documents [R],
    names, vocab_size (where the file does not say it: what its tokens need, and at least the argument), budget (chunks
    of the smallest category), oracle [R, K, n] (log p_k(x_t | x_<t)) or None.
    Raises DataError for a file that is missing, damaged or foreign, or has tokens beyond its vocabulary.
    """
    file, names, codes = open_chunks(path)
    with file:
        tokens = map_tokens(file)
        low, top = token_range(tokens)
        size = int(file.attrs.get("vocab_size", max(vocab_size, top + 1)))
        if low < 0 or top >= size:
            raise DataError(f"{path} has the token {low if low < 0 else top}, but vocab_size = {size}: see python "
                            f"prepare_data.py inspect {path}")
        # Numbers of documents may begin anew in each category: the pair is what tells them apart.
        pairs = np.stack([codes.astype(np.int64), file["doc_idx_for_chunk"][:].astype(np.int64)], 1)
        smallest = np.bincount(codes, minlength=len(names)).min()
        return {
            "tokens": tokens,
            "codes": codes,
            "documents": np.unique(pairs, axis=0, return_inverse=True)[1].ravel(),
            "names": names,
            "vocab_size": size,
            "budget": int(file.attrs.get("reference_chunk_budget_smallest_top_category", smallest)),
            "oracle": file["oracle_log_prob"][:] if "oracle_log_prob" in file else None,
        }


def open_corpus(folder: Path) -> tuple[dict, dict]:
    """(train, validation) of a folder with train.h5 and validation.h5, over one vocabulary and size of chunks."""
    validation = read_corpus(folder / "validation.h5")
    train = read_corpus(folder / "train.h5", validation["vocab_size"])
    if train["vocab_size"] > validation["vocab_size"]:
        validation = read_corpus(folder / "validation.h5", train["vocab_size"])
    if (train["tokens"].shape[1], train["vocab_size"]) != (validation["tokens"].shape[1], validation["vocab_size"]):
        raise DataError(f"train.h5 and validation.h5 of {folder} differ in chunk size or vocabulary: they are not of "
                        "one preparation")
    return train, validation


def token_range(tokens: np.ndarray) -> tuple[int, int]:
    """The least and the largest of tokens [R, n], read a block at a time."""
    lows, tops = [], []
    for begin in range(0, len(tokens), 100_000):
        block = tokens[begin : begin + 100_000]
        lows.append(int(block.min()))
        tops.append(int(block.max()))
    return min(lows), max(tops)
