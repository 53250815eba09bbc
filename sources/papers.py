"""Whole documents as tokens, the folder of the source's earlier fetch_arxiv.py, cut into files of chunks."""

import contextlib
import json
from pathlib import Path

import numpy as np

from common.errors import DataError, reason
from sources.chunks import ChunkSpool
from sources.shared import SPLITS, Workshop, closest, counted, quoted

TOKENS, INDEX, SPLIT_IDS = FILES = ("tokens.bin", "index.jsonl", "splits.json")
VOCAB_SIZE = 50_304  # rows of the embedding of Pythia, whose tokenizer made the tokens


def holds_papers(folder: str | Path) -> bool:
    """Whether a folder is one of fetch_arxiv.py's."""
    return all((Path(folder) / name).is_file() for name in FILES)


def read_papers(folder: Path) -> tuple[np.ndarray, list[dict], dict[str, list[str]]]:
    """(tokens uint16 of all documents, a record of each: paper_id, cat, offset, length; ids of each split).

    Raises DataError for files that are damaged or do not fit together.
    """
    tokens = np.memmap(folder / TOKENS, np.uint16, "r")
    try:
        index = folder / INDEX
        lines = index.read_text(encoding="utf-8").splitlines()
        papers = list(map(json.loads, filter(str.strip, lines)))
        ids = folder / SPLIT_IDS
        splits = json.loads(ids.read_text(encoding="utf-8"))
        ends = [paper["offset"] + paper["length"] for paper in papers]
        end = max(ends)
        names = {paper["cat"] for paper in papers}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: {INDEX} or {SPLIT_IDS} is not of fetch_arxiv.py: {reason(error)}") from error
    fits = end <= len(tokens) and names
    if not fits or not isinstance(splits, dict):
        raise DataError(f"{folder}: {INDEX} speaks of {end:,} tokens, {TOKENS} has {len(tokens):,}")
    return tokens, papers, splits


def cut_papers(
    input: str, out_dir: str, chunk_size: int, categories: list[str] | None, max_documents: int | None, tokenizer: str
) -> dict:
    """A folder of fetch_arxiv.py -> train.h5, validation.h5, test.h5. Returns chunks by split and category.

    Args: see prepare_chunks. Raises DataError for what is not in the folder, and for a tokenizer: its tokens are made.
    """
    if tokenizer != "bpe":  # the default, which is not asked for
        raise DataError(f"tokenizer = {tokenizer}: the documents of {input} are tokens already, of Pythia's tokenizer")
    tokens, papers, splits = read_papers(Path(input))
    known = sorted({paper["cat"] for paper in papers})
    for name in categories or ():
        if name not in known:
            hint = closest(name, known) or "."
            raise DataError(f"{input} has no category {name!r}{hint} It has: {quoted(known)}")
    sizes = {}
    with Workshop(out_dir) as shop:
        for split in SPLITS:
            chunks = ChunkSpool(shop.folder, split, chunk_size, VOCAB_SIZE)
            with contextlib.closing(chunks):
                ids = splits.get(split, ())
                for category in categories or known:
                    found = places(papers, category, ids)
                    for begin, end in found[:max_documents]:
                        chunks.add(category, tokens[begin:end])
                if not chunks.sizes:
                    continue
                chunks.write(shop.folder / f"{split}.h5", source=input)
            sizes[split] = dict(chunks.sizes)
            made = counted(chunks.sizes.total(), "chunk")
            size = counted(chunk_size, "token")
            dropped = counted(chunks.dropped, "tail token")
            print(f"{split}: {made} of {size}; {dropped} dropped")
        if "train" not in sizes or "validation" not in sizes:
            raise DataError(f"{input} has no documents to train on or to validate on: see its {SPLIT_IDS}")
        shop.finish(*(f"{split}.h5" for split in sizes))
    print(f"tokens as they were, without their tokenizer: samples are token ids; written to {out_dir}")
    return sizes


def places(papers: list[dict], category: str, names: list[str]) -> list[tuple[int, int]]:
    """(first token, the one after the last) of the documents of a category among those of these names."""
    here = set(names)
    found = []
    for paper in papers:
        is_here = paper["paper_id"] in here
        if is_here and paper["cat"] == category:
            begin = paper["offset"]
            end = begin + paper["length"]
            found.append((begin, end))
    return found
