"""Labelled documents as HDF5 files of token chunks, N chunks of n tokens: made, opened, mapped, inspected."""

import contextlib
import difflib
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np

from common.errors import DataError
from sources.shared import SPLIT_NAMES, SPLITS, Workshop, progress
from sources.text import Spool, column_of, dealt, hub_errors, open_hub, read_file, text_of, whole
from sources.tokenizer import Tokenizer, load_tokenizer, train_bpe

CCDV_LABELS = ("math.AC", "cs.CV", "cs.AI", "cs.SY", "math.GR", "cs.CE", "cs.PL", "cs.IT", "cs.DS", "cs.NE", "math.ST")


def read_records(cfg) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of every document of cfg.input."""
    path = Path(cfg.input)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".csv", ".parquet", ".txt"))
        if not files:
            raise DataError(f"{path} holds no .jsonl, .csv, .parquet or CATEGORY/*.txt files")
        for file in files:
            yield from read_file(file, cfg.text_column, whole)
    elif path.exists():
        yield from read_file(path, cfg.text_column, whole)
    elif re.fullmatch(r"[\w-]+/[\w.-]+", cfg.input) and path.suffix not in (".jsonl", ".csv", ".parquet", ".txt"):
        yield from read_hub(cfg)
    else:
        raise DataError(f"input = {cfg.input}: no such file, folder or hub data set")


def read_hub(cfg) -> Iterator[tuple[str, dict]]:
    """Records of a hub data set with their split and the names of integer labels."""
    column = cfg.label_column or "label"
    for split, rows in open_hub(cfg.input, cfg.hub_config).items():
        names = getattr((rows.features or {}).get(column), "names", None) or []
        with hub_errors(cfg.input):
            for number, record in enumerate(rows):
                label = record.get(column)
                if isinstance(label, int) and 0 <= label < len(names):
                    record = {**record, column: names[label]}
                yield f"{cfg.input}, {split}, row {number}", {cfg.split_column: split, **record}


def document(where: str, record: dict, cfg) -> tuple[str, str, str]:
    """(split, category, text) of a record; raises DataError for a missing column or an unknown split."""
    column = cfg.label_column or ("category" if "category" in record else "label")
    text, label = text_of(where, record, cfg.text_column), column_of(where, record, column, "label_column")
    if isinstance(label, int) or (isinstance(label, str) and label.isdigit()):  # ccdv's numbers
        label = CCDV_LABELS[int(label)] if 0 <= int(label) < len(CCDV_LABELS) else str(label)
    split = record.get(cfg.split_column)
    if split in (None, ""):
        place = dealt(text, cfg.seed)
        return ("test" if place < cfg.test_fraction else "validation"
                if place < cfg.test_fraction + cfg.validation_fraction else "train"), str(label), text
    if str(split) not in SPLIT_NAMES:
        raise DataError(f"{where}: split {split!r} is none of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[str(split)], str(label), text


def gather(cfg, spool: Spool) -> None:
    """Sort all documents of the wanted categories into the spool; each text once, in the first split it has."""
    wanted, others, seen, dropped = set(cfg.categories), Counter(), set(), 0
    with contextlib.closing(read_records(cfg)) as records:
        for where, record in progress(records, "documents read", "doc"):
            split, category, text = document(where, record, cfg)
            if category not in wanted:
                others[category] += 1
                continue
            print_of = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if print_of in seen or not text.strip():
                dropped += 1
            elif cfg.max_documents is None or spool.counts[split, category] < cfg.max_documents:
                seen.add(print_of)
                spool.add(split, category, text)
    for category in cfg.categories:
        if not spool.counts["train", category]:
            known = sorted(others) + sorted({c for _, c in spool.counts})
            near = difflib.get_close_matches(category, known, n=1)
            raise DataError(f"{cfg.input} has no training document of category {category!r}"
                            + (f", did you mean {near[0]!r}?" if near else "")
                            + f" It has: {', '.join(known) or 'none'}")
    print(f"documents: {sum(spool.counts.values()):,} of {len(wanted)} categories; dropped {dropped:,} empty or "
          f"repeated, {sum(others.values()):,} of other categories")


def balanced_sample(spool: Spool, categories: list[str], most: int) -> Iterator[str]:
    """Training texts, as many characters of each category as the smallest has (and at most most / K)."""
    each = min(min(spool.chars["train", c] for c in categories), most // len(categories))
    for category in categories:
        left = max(1, each)
        for text in spool.texts("train", category):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


class ChunkSpool:
    """Token chunks on disk, category after category, until their number is known; then an HDF5 file.

    The file has token_chunks [N, n] in one contiguous block (which can be mapped into memory), category_for_chunk [N]
    (names) and its codes category_code [N], doc_idx_for_chunk [N], and the attributes of the source.
    """

    BLOCK = 1 << 16  # chunks copied at once

    def __init__(self, folder: Path, name: str, chunk_size: int, vocab_size: int):
        self.dtype = np.min_scalar_type(vocab_size - 1)
        self.tokens, self.documents = open(folder / f"{name}.tokens", "w+b"), open(folder / f"{name}.documents", "w+b")
        self.chunk_size, self.vocab_size = chunk_size, vocab_size
        self.document, self.sizes, self.dropped = 0, Counter(), 0

    def add(self, category: str, ids: list[int] | np.ndarray) -> None:
        """Cut a document into chunks; the tail that fills none is dropped and counted."""
        count = len(ids) // self.chunk_size
        array = np.asarray(ids[: count * self.chunk_size], dtype=np.int64)
        if len(array) and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise DataError(f"a document of {category} has the token {array.max()}, but vocab_size = {self.vocab_size}")
        array.astype(self.dtype).tofile(self.tokens)
        np.full(count, self.document, dtype=np.int64).tofile(self.documents)
        self.dropped += len(ids) - count * self.chunk_size
        self.sizes[category] += count
        self.document += 1

    def write(self, path: Path, **attributes) -> None:
        """The HDF5 file; raises DataError if a category has no chunk."""
        for category, count in self.sizes.items():
            if not count:
                raise DataError(f"category {category!r} has no document of {self.chunk_size} tokens for {path.name}: "
                                "use a smaller chunk_size, more documents or fewer categories")
        names, N = list(self.sizes), sum(self.sizes.values())
        codes = np.repeat(np.arange(len(names)), [self.sizes[c] for c in names]).astype(np.uint16)
        with h5py.File(path, "w") as file:
            tokens = file.create_dataset("token_chunks", (N, self.chunk_size), dtype=self.dtype)
            documents = file.create_dataset("doc_idx_for_chunk", (N,), dtype=np.int64)
            encoded = np.array([c.encode() for c in names])  # of fixed length: a row costs no pointer
            labels = file.create_dataset("category_for_chunk", (N,), dtype=encoded.dtype)
            self.tokens.seek(0)
            self.documents.seek(0)
            for begin in range(0, N, self.BLOCK):
                rows = slice(begin, min(begin + self.BLOCK, N))
                size = rows.stop - rows.start
                tokens[rows] = np.fromfile(self.tokens, self.dtype, size * self.chunk_size).reshape(size, -1)
                documents[rows] = np.fromfile(self.documents, np.int64, size)
                labels[rows] = encoded[codes[rows]]
            file["category_code"] = codes
            file["category_code"].attrs["names"] = names
            file.attrs.update({
                "token_chunk_size": self.chunk_size, "selected_categories_in_file": names,
                "reference_chunk_budget_smallest_top_category": min(self.sizes.values()),
                "vocab_size": self.vocab_size, **attributes})

    def close(self) -> None:
        self.tokens.close()
        self.documents.close()


def encode(spool: Spool, split: str, category: str, tokenizer: Tokenizer, threads: int, chunks: ChunkSpool) -> None:
    """Add the chunks of all documents of a category, 512 documents at a time."""
    with progress(None, f"{split} {category}", "doc", spool.counts[split, category]) as bar, \
            contextlib.closing(spool.texts(split, category)) as rest:
        while texts := list(islice(rest, 512)):
            for ids in tokenizer.encode_batch(texts, threads):
                chunks.add(category, ids)
            bar.update(len(texts))


CATEGORIES = ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"]


def arxiv(*, input: str = "ccdv/arxiv-classification", hub_config: str = "no_ref", text_column: str = "text",
          label_column: str = "", split_column: str = "split", categories: list[str] = CATEGORIES, max_documents: int
          | None = None, validation_fraction: float = 0.05, test_fraction: float = 0.05, tokenizer: str = "bpe",
          vocab_size: int = 8_192, tokenizer_chars: int = 20_000_000, chunk_size: int = 100, out_dir: str =
          "data/arxiv", seed: int = 1337, threads: int = 0) -> dict:
    """Documents -> tokenizer.json, train.h5, validation.h5, test.h5. Returns chunks by split and category."""
    cfg = SimpleNamespace(**locals())
    threads = cfg.threads or os.cpu_count() or 1
    tokenizer = None if cfg.tokenizer == "bpe" else load_tokenizer(cfg.tokenizer)
    with Workshop(cfg.out_dir) as shop, contextlib.closing(Spool(shop.folder)) as spool:
        gather(cfg, spool)
        if tokenizer is None:
            sample = balanced_sample(spool, cfg.categories, cfg.tokenizer_chars)
            tokenizer = train_bpe(progress(sample, "training the tokenizer", "doc"), cfg.vocab_size)
        tokenizer.save(shop.folder / "tokenizer.json")
        done, names = {}, ["tokenizer.json"]
        for split in SPLITS:
            present = [c for c in cfg.categories if spool.counts[split, c]]
            if not present:
                continue
            if missing := sorted(set(cfg.categories) - set(present)):
                raise DataError(f"{cfg.input}, {split}: no document of {', '.join(missing)}; use more documents")
            with contextlib.closing(ChunkSpool(shop.folder, split, cfg.chunk_size, tokenizer.vocab_size)) as chunks:
                for category in cfg.categories:
                    encode(spool, split, category, tokenizer, threads, chunks)
                chunks.write(shop.folder / f"{split}.h5", tokenizer="tokenizer.json", source=cfg.input, seed=cfg.seed)
            done[split], names = dict(chunks.sizes), [*names, f"{split}.h5"]
            sizes = ", ".join(f"{c} {n:,}" for c, n in chunks.sizes.items())
            print(f"{split}: {sum(chunks.sizes.values()):,} chunks of {cfg.chunk_size} tokens ({sizes}); "
                  f"{chunks.dropped:,} tail tokens dropped")
        if "train" not in done or "validation" not in done:
            raise DataError(f"{cfg.input} leaves no validation documents: raise validation_fraction or add documents")
        shop.finish(*names)
    print(f"vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}); written to {cfg.out_dir}")
    return done


def open_chunks(path: str | Path) -> tuple[h5py.File, list[str], np.ndarray]:
    """(file, category names, category code of every chunk) of an HDF5 file of this layout or of the source's.

    Raises DataError for a file that is missing, truncated or foreign, or lacks a dataset.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as e:
        reason = "no such file" if not Path(path).exists() else "damaged or no HDF5 file"
        raise DataError(f"{path}: {reason}; make it with python prepare_data.py arxiv or ergodic") from e
    for name, ndim in (("token_chunks", 2), ("category_for_chunk", 1), ("doc_idx_for_chunk", 1)):
        if name not in file or file[name].ndim != ndim:
            raise DataError(f"{path} has no dataset {name!r} of {ndim} dimensions; it has {', '.join(file) or 'none'}")
    N = file["token_chunks"].shape[0]
    if not N or any(len(file[name]) != N for name in ("category_for_chunk", "doc_idx_for_chunk")):
        raise DataError(f"{path}: token_chunks, category_for_chunk and doc_idx_for_chunk must have one length, above 0")
    if file["token_chunks"].dtype.kind not in "ui":
        raise DataError(f"{path}: token_chunks holds {file['token_chunks'].dtype}, not whole numbers")
    if "category_code" in file and "names" in file["category_code"].attrs:
        return file, [str(n) for n in file["category_code"].attrs["names"]], file["category_code"][:]
    if h5py.check_string_dtype(file["category_for_chunk"].dtype) is None:
        raise DataError(f"{path}: category_for_chunk holds {file['category_for_chunk'].dtype}, not names")
    labels = file["category_for_chunk"].asstr("utf-8")[:].astype(str)
    names, first, codes = np.unique(labels, return_index=True, return_inverse=True)
    order = first.argsort()  # as they come in the file
    return file, names[order].tolist(), order.argsort()[codes].astype(np.uint16)


def map_tokens(file: h5py.File) -> np.ndarray:
    """token_chunks [N, n] as a memory map, so that rows of a file of any size can be gathered at random.

    A file whose chunks are compressed or scattered (the source's may be) is first copied to an unnamed temporary file.
    """
    tokens = file["token_chunks"]
    if tokens.chunks is None and tokens.id.get_offset() is not None and tokens.dtype.isnative:
        return np.memmap(file.filename, tokens.dtype, "r", tokens.id.get_offset(), tokens.shape)
    with tempfile.TemporaryFile() as copy:
        mapped = np.memmap(copy, tokens.dtype.newbyteorder("="), "w+", shape=tokens.shape)
        for begin in range(0, len(tokens), 1 << 16):
            mapped[begin : begin + (1 << 16)] = tokens[begin : begin + (1 << 16)]
        return mapped


def hashes(tokens: h5py.Dataset, block: int = 1 << 16) -> np.ndarray:
    """A 64-bit hash of every chunk [N]."""
    odd = np.random.default_rng(0).integers(2**63, size=tokens.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    parts = []
    for begin in range(0, len(tokens), block):
        rows = tokens[begin : begin + block].astype(np.uint64) + np.uint64(1)
        mixed = (rows * odd) ^ ((rows * odd) >> np.uint64(29))
        parts.append((mixed * odd[::-1]).sum(1, dtype=np.uint64))
    return np.concatenate(parts)


def chunk_arrays(path: Path, vocab_size: int = 0) -> dict:
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


def train_and_validation(folder: Path) -> tuple[dict, dict]:
    """(train, validation) of a folder with train.h5 and validation.h5, over one vocabulary and size of chunks."""
    validation = chunk_arrays(folder / "validation.h5")
    train = chunk_arrays(folder / "train.h5", validation["vocab_size"])
    if train["vocab_size"] > validation["vocab_size"]:
        validation = chunk_arrays(folder / "validation.h5", train["vocab_size"])
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
