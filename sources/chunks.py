"""Labelled documents as HDF5 files of token chunks, N chunks of n tokens: made, opened, mapped, inspected."""

import ast
import contextlib
import hashlib
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from common.errors import DataError, reason
from common.telling import bar, doing, note
from sources.chunk_checks import (
    MOST_TOKENS,
    is_mapped,
    layout,
    oracle,
    seal,
    text_attribute,
    verify,
    whole_attribute,
)
from sources.digests import ChunkDigest, Seen, fingerprint, sample
from sources.files import kind_of, text_files
from sources.hdf5 import member, open_hdf5, read
from sources.shared import (
    SPLIT_NAMES,
    SPLITS,
    Workshop,
    closest,
    counted,
    nearest,
    quoted,
    report,
    room_for,
    spooled_array,
)
from sources.streams import RAW
from sources.text import (
    Spool,
    fill_splits,
    hub_errors,
    in_record,
    is_missing,
    likely_vocabulary,
    no_column,
    open_hub,
    place_of,
    read_file,
    text_columns,
    text_of,
    whole,
)
from sources.tokenizer import Tokenizer, load_tokenizer, read_spec, readable, train_bpe

CCDV = "ccdv/arxiv-classification"  # a data set of the hub whose labels are numbers
CATEGORIES = ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"]  # of those that it has
CCDV_LABELS = ("math.AC", "cs.CV", "cs.AI", "cs.SY", "math.GR", "cs.CE", "cs.PL", "cs.IT", "cs.DS", "cs.NE", "math.ST")
ARXIV = re.compile(r"[a-z]+(-[a-z]+)*\.[A-Za-z-]{2,}|[a-z]+(-[a-z]+)+")  # cs.DS, cond-mat.str-el, hep-th
MOST_CATEGORIES = 256  # more of them are no categories: each holds a file open while documents are sorted
LABELS = ("category", "label", "categories", "labels", "class", "topic")  # columns of a label, the first that there is
MOST_VOCABULARY = 8_192  # tokens of a trained tokenizer, unless it is asked for more
MOST_LISTED = 8  # categories whose chunks are told one by one
CHARACTERS = 6  # characters a token that a document should have for a chunk, where one is chosen to be held out
FEW = 32  # training chunks of a category that are worth a word: a batch
LONGEST_NAME = 200  # bytes of a category's: an HDF5 file holds all names in 64 kB
BLOCK = 1 << 16  # chunks read or copied at once
BATCH_DOCUMENTS = 512  # to the tokenizer at once
TOKENIZER_NAME = "tokenizer_name_or_path"  # attribute of the source's files
SPLIT_END = re.compile(rf"(^|_)({'|'.join(SPLITS)})$")  # of the name of a file of one split

# ----------------------------------------------------------------------------------------------------------- documents


class Source(NamedTuple):
    """Where labelled documents come from, and which column of a record says what."""

    input: str  # a file, a folder or a hub data set
    hub_config: str
    text_column: str
    label_column: str  # "": the first of LABELS that there is
    split_column: str


class Shares(NamedTuple):
    """How documents that name no split are dealt."""

    validation: float
    test: float
    seed: int
    long: int = 0  # characters that make a chunk in all likelihood

    def split(self, text: str) -> str:
        """That of a document, which only its text and the seed decide."""
        place = place_of(text, self.seed)  # in [0, 1)
        if place < self.test:
            return "test"
        if place < self.test + self.validation:
            return "validation"
        return "train"

    def order(self, text: str) -> tuple[bool, float]:
        """What documents are sorted by, where the first is to be held out: long ones by chance, then short ones."""
        return len(text) < self.long, place_of(text, self.seed)


def read_records(source: Source) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of every document of a source."""
    path = Path(source.input)
    if path.exists():
        for file in text_files(path):
            yield from read_file(file, source.text_column, whole)
    elif re.fullmatch(r"[\w-]+/[\w.-]+", source.input) and not kind_of(path):
        yield from hub_records(source)
    else:
        beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        near = closest(source.input, beside) or ""
        raise DataError(f"input = {source.input}: no such file, folder or hub data set{near}")


def hub_records(source: Source) -> Iterator[tuple[str, dict]]:
    """Records of a hub data set with their split and the names of integer labels."""
    column = source.label_column or "label"
    for split, rows in open_hub(source.input, source.hub_config).items():
        features = rows.features or {}
        names = getattr(features.get(column), "names", None) or (CCDV_LABELS if source.input == CCDV else ())
        with hub_errors(source.input):
            for number, record in enumerate(rows):
                label = record.get(column)
                if isinstance(label, int) and names:  # -1 stands for a label that is withheld
                    record = {**record, column: names[label] if 0 <= label < len(names) else None}
                yield f"{source.input}, {split}, row {number}", {source.split_column: split, **record}


def label_column(where: str, record: dict, source: Source) -> str:
    """The column of a record that has its label. Raises DataError where there is none."""
    wanted = [source.label_column] if source.label_column else LABELS
    for name in wanted:
        found = in_record(record, name)
        if found is not None:
            return found
    near = [name for name in (nearest(label, record) for label in wanted) if name]
    raise no_column(where, record, source.label_column or "label", "label_column", near[0] if near else "NAME")


def names_split(record: dict, column: str) -> bool:
    """Whether a record says which split it is of."""
    return record.get(column) not in (None, "") and not is_missing(record, column)


def document(where: str, record: dict, source: Source, shares: Shares) -> tuple[str, list[str], str]:
    """(split, labels, text) of a record; raises DataError for a missing column or an unknown split."""
    text = text_of(where, record, source.text_column)
    labels = labels_of(record[label_column(where, record, source)])
    if not names_split(record, source.split_column):
        return shares.split(text), labels, text
    split = record[source.split_column]
    if str(split) not in SPLIT_NAMES:
        raise DataError(f"{where}: split {split!r} is none of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[str(split)], labels, text


def labels_of(cell) -> list[str]:
    """The labels in a cell: one, or a list of them, as "['cs.DS', 'cs.CC']" in a table too, or arXiv's "cs.DS cs.CC".
    """
    if isinstance(cell, str) and cell.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            cell = ast.literal_eval(cell)
    labels = []
    for label in cell if isinstance(cell, list | tuple) else [cell]:
        if label is None or label == "" or label != label:  # null, empty, nan
            continue
        if isinstance(label, float) and label.is_integer():  # as tables spell 3 in a column where a cell is empty
            label = int(label)
        words = re.split(r"[\s,;]+", str(label).strip())
        if all(ARXIV.fullmatch(word) for word in words):
            labels += words
        else:
            labels.append(readable(str(label)))
    return labels


def category_of(labels: list[str], wanted: list[str] | None, several_labels: str) -> str:
    """first: the first of the labels. any: the first of them that is wanted, if one is."""
    if several_labels == "any":
        for label in labels:
            if wanted and label in wanted:
                return label
    return labels[0]


def gather(
    source: Source,
    categories: list[str] | None,
    several_labels: str,
    max_documents: int | None,
    shares: Shares,
    spool: Spool,
) -> list[str]:
    """Sort all documents of the wanted categories into the spool; each text once, in the first split it has.

    Where no document names its split, each split gets one of every category, as far as they last.
    Returns the categories: those that are wanted, else all there are.
    Raises DataError for a record that cannot serve and a category without training documents.
    """
    columns = Counter()  # (of the text, of the label), by how often they were met
    is_dealt = True  # no document names its split
    others = Counter()  # documents of other categories
    left_out = Counter()  # documents, by reason
    found = set()  # categories that have a document
    several = 0
    seen = Seen()  # of the texts, which themselves may not fit in memory
    with contextlib.closing(read_records(source)) as records:
        for where, record in bar(records, f"reading {source.input}", unit="documents"):
            if is_missing(record, source.text_column):
                left_out["without text"] += 1
                continue
            split, labels, text = document(where, record, source, shares)
            if not labels:
                left_out["without a label"] += 1
                continue
            columns[" and ".join(text_columns(record, source.text_column)), label_column(where, record, source)] += 1
            is_dealt = is_dealt and not names_split(record, source.split_column)
            several += len(labels) > 1
            category = category_of(labels, categories, several_labels)
            if categories is not None and category not in categories:
                others[category] += 1
                continue
            digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
            if digest in seen or not text.strip():
                left_out["empty or repeated"] += 1
            elif max_documents is None or spool.counts[split, category] < max_documents:
                seen.add(digest)
                found.add(category)
                if categories is None:
                    check_names(where, label_column(where, record, source), category, len(found))
                spool.add(split, category, text)
    if several and several_labels == "first":
        print(f"{counted(several, 'document')} of several labels: the first counts (several_labels=any: the first that "
              "categories names)")
    elif several:
        print(f"{counted(several, 'document')} of several labels: the first that categories names counts")
    lone = []  # categories of a single document, which cannot be both trained on and held out
    if is_dealt:
        splits = [split for split in SPLITS if split != "test" or shares.test]
        for category in sorted(found):
            fill_splits(spool, category, splits, shares.order)
        if categories is None:
            lone = [name for name in found if sum(spool.counts[split, name] for split in SPLITS) == 1]
            found -= set(lone) if len(lone) < len(found) else set()
    if categories is None:
        categories = all_of(found, spool, source)
    for category in categories:
        if not spool.counts["train", category]:
            spooled = {name for _, name in spool.counts}
            known = sorted(others) + sorted(spooled)
            raise DataError(
                f"{source.input} has no training document of category {category!r}"
                f"{closest(category, known)} It has: {quoted(known)}"
            )
    left_out["of other categories"] = others.total()
    left_out[f"alone in their categories ({quoted(sorted(lone), 4)})"] = len(lone)
    say_gathered(spool, categories, left_out, columns)
    return categories


def say_gathered(spool: Spool, categories: list[str], left_out: Counter, columns: Counter) -> None:
    """What was gathered of which columns, and what was not; left_out: documents by reason."""
    of_each = [sum(spool.counts[split, category] for split in SPLITS) for category in categories]
    told = [f"{sum(of_each):,} of {counted(len(categories), 'category', 'categories')}"]
    if len(of_each) > 1:
        least, most = min(of_each), max(of_each)
        told[0] += f", {least:,} of each" if least == most else f", {least:,} to {most:,} of each"
    (text, label), _ = columns.most_common(1)[0]
    if (text, label) not in (("text", "label"), ("text", "category")):
        told.append(f"text: {text}, label: {label}")
    dropped = [f"{number:,} {why}" for why, number in left_out.items() if number]
    if dropped:
        told.append(f"dropped {', '.join(dropped)}")
    print(f"documents: {'; '.join(told)}")


def check_names(where: str, column: str, name: str, count: int) -> None:
    """Raises DataError for labels that name no categories."""
    if count > MOST_CATEGORIES or len(name.encode()) > LONGEST_NAME:
        what = f"more than {MOST_CATEGORIES} labels" if count > MOST_CATEGORIES else f"the label {name[:40]!r}..."
        raise DataError(f"{where}: column {column!r} has {what}, so it names no categories: use another "
                        "label_column=NAME, or name those to keep by categories=NAME,NAME")


def all_of(found: set[str], spool: Spool, source: Source) -> list[str]:
    """The categories that were found, sorted, numbers as numbers; raises DataError if one cannot be held out."""
    names = sorted(found, key=by_number)
    for split in ("train", "validation"):
        lacking = [name for name in names if not spool.counts[split, name]]
        rest = [name for name in names if spool.counts[split, name]]
        if lacking and rest:
            raise DataError(f"{source.input}, {split}: no document of {', '.join(lacking)}; use more documents, "
                            f"deal them anew by --split_column='', or name what to keep: categories={','.join(rest)}")
    return names


def by_number(name: str) -> tuple[bool, int, str]:
    """What to sort names by, so that 10 comes after 9."""
    if name.isdecimal():
        return False, int(name), name
    return True, 0, name


# -------------------------------------------------------------------------------------------------------------- chunks


class ChunkSpool:
    """Token chunks on disk, category after category, until their number is known; then an HDF5 file.

    The file has token_chunks [N, n] in one contiguous block (which can be mapped into memory), category_for_chunk [N]
    (names) and its codes category_code [N], doc_idx_for_chunk [N], and the attributes of the source; sha256 is a digest
    of tokens and categories.
    """

    def __init__(self, folder: Path, name: str, chunk_size: int, vocab_size: int):
        self.chunk_size = chunk_size
        self.vocab_size = vocab_size
        self.dtype = np.min_scalar_type(vocab_size - 1)  # the smallest that holds all tokens
        self.tokens = open(folder / f"{name}.tokens", "w+b")
        self.documents = open(folder / f"{name}.documents", "w+b")
        self.document = 0  # the number of the next
        self.sizes = Counter()  # chunks of a category
        self.dropped = 0  # tokens
        self.longest = Counter()  # tokens of the longest document of a category

    def add(self, category: str, ids: list[int] | np.ndarray) -> None:
        """Cut a document into chunks; the tail that fills none is dropped and counted."""
        count = len(ids) // self.chunk_size
        array = np.asarray(ids[: count * self.chunk_size], dtype=np.int64)
        if len(array) and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise DataError(f"a document of {category} has the token {array.max()}, but vocab_size = {self.vocab_size}")
        self.tokens.write(array.astype(self.dtype))
        self.documents.write(np.full(count, self.document, dtype=np.int64))
        self.dropped += len(ids) - len(array)
        self.longest[category] = max(self.longest[category], len(ids))
        self.sizes[category] += count
        self.document += 1

    def write(self, path: Path, arrays: dict[str, np.ndarray] | None = None, **attributes) -> None:
        """The HDF5 file, with further arrays by name and attributes; raises DataError if a category has no chunk."""
        for category, count in self.sizes.items():
            if not count:
                raise DataError(
                    f"category {category!r} has no document of {counted(self.chunk_size, 'token')} for {path.name}: "
                    f"its longest has {self.longest[category]:,}; use a chunk_size of that or less, more documents or "
                    "fewer categories"
                )
        names = list(self.sizes)
        N = self.sizes.total()
        codes = np.repeat(np.arange(len(names)), list(self.sizes.values())).astype(np.uint16)
        encoded = np.array([name.encode() for name in names])  # of fixed length: a row costs no pointer
        digest = ChunkDigest()
        size = N * (self.chunk_size * self.dtype.itemsize + 8 + encoded.dtype.itemsize + 2)
        room_for(path, size + sum(array.nbytes for array in (arrays or {}).values()))
        with h5py.File(path, "w") as file:
            tokens = file.create_dataset("token_chunks", (N, self.chunk_size), dtype=self.dtype)
            documents = file.create_dataset("doc_idx_for_chunk", (N,), dtype=np.int64)
            labels = file.create_dataset("category_for_chunk", (N,), dtype=encoded.dtype)
            self.tokens.seek(0)
            self.documents.seek(0)
            for begin in bar(range(0, N, BLOCK), f"writing {path.name}", unit="blocks"):
                rows = slice(begin, min(begin + BLOCK, N))
                size = rows.stop - rows.start
                block = np.fromfile(self.tokens, self.dtype, size * self.chunk_size).reshape(size, -1)
                tokens[rows] = block
                digest.add(block, codes[rows])
                documents[rows] = np.fromfile(self.documents, np.int64, size)
                labels[rows] = encoded[codes[rows]]
            file["category_code"] = codes
            file["category_code"].attrs["names"] = names
            file.attrs["sha256"] = digest.hexdigest(self.chunk_size, names)
            file.attrs["token_chunk_size"] = self.chunk_size
            file.attrs["vocab_size"] = self.vocab_size
            file.attrs["selected_categories_in_file"] = names
            file.attrs["reference_chunk_budget_smallest_top_category"] = min(self.sizes.values())
            file.attrs.update(attributes)
            for name, array in (arrays or {}).items():
                file[name] = array
            seal(file, codes, names)

    def close(self) -> None:
        with contextlib.closing(self.documents):  # also where the other has no room for what it holds
            self.tokens.close()


def balanced_sample(spool: Spool, categories: list[str], most: int) -> Iterator[str]:
    """Training texts, as many characters of each category as the smallest has (and at most most / K)."""
    # Merges go to what is frequent: a large category would get most of the vocabulary.
    smallest = min(spool.chars["train", category] for category in categories)
    share = max(1, min(smallest, most // len(categories)))
    for category in categories:
        left = share
        for text in spool.texts("train", category):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def encode(spool: Spool, split: str, category: str, tokenizer: Tokenizer, threads: int, chunks: ChunkSpool) -> None:
    """Add the chunks of all documents of a category."""
    with contextlib.ExitStack() as stack:
        what = f"encoding {category}, {split}"
        work = stack.enter_context(bar(None, what, spool.counts[split, category], "documents"))
        rest = stack.enter_context(contextlib.closing(spool.texts(split, category)))
        while True:
            texts = list(islice(rest, BATCH_DOCUMENTS))
            if not texts:
                break
            for ids in tokenizer.encode_batch(texts, threads):
                chunks.add(category, ids)
            work.update(len(texts))


def point_at_small(sizes: dict[str, int]) -> None:
    """A note where a category has next to nothing: each is trained on for as long as the smallest."""
    smallest = min(sizes, key=sizes.get)
    if sizes[smallest] < FEW:
        note(f"{smallest} has {counted(sizes[smallest], 'chunk')} to train on, and of each category as many are taken: "
             "more documents or a smaller chunk_size make more, categories=NAME,NAME goes without it")


def of_each(sizes: Counter, most_listed: int = MOST_LISTED) -> str:
    """Chunks of each category, or of the smallest and the largest of many."""
    if len(sizes) <= most_listed:
        return ", ".join(f"{category} {size:,}" for category, size in sizes.items())
    ranked = sizes.most_common()
    (largest, most), (smallest, least) = ranked[0], ranked[-1]
    return f"{smallest} {least:,} to {largest} {most:,}"


def prepare_chunks(
    *,
    input: str = "ccdv/arxiv-classification",
    hub_config: str = "no_ref",
    text_column: str = "text",
    label_column: str = "",
    split_column: str = "split",
    categories: list[str] | None = None,
    several_labels: str = "first",
    max_documents: int | None = None,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    tokenizer_chars: int = 20_000_000,
    chunk_size: int = 100,
    out_dir: str = "data/arxiv",
    seed: int = 1337,
    threads: int = 0,
) -> dict:
    """Documents -> tokenizer.json, train.h5, validation.h5, test.h5. Returns chunks by split and category.

    categories: default all that the input has, but five of ccdv's data set. several_labels: of which category is a
    document of several labels, its first or that of "any" of them, the first that categories names.
    """
    named = categories is not None
    if input == CCDV and not named:
        categories = CATEGORIES
    threads = threads or os.cpu_count() or 1
    # A tokenizer that cannot be read is found before all documents are.
    encoder = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
    with Workshop(out_dir) as shop, contextlib.closing(Spool(shop.folder)) as spool:
        source = Source(input, hub_config, text_column, label_column, split_column)
        shares = Shares(validation_fraction, test_fraction, seed, CHARACTERS * chunk_size)
        categories = gather(source, categories, several_labels, max_documents, shares, spool)
        if encoder is None:
            smallest = min(spool.chars["train", category] for category in categories)
            characters = min(smallest * len(categories), tokenizer_chars)
            size = vocab_size or likely_vocabulary(characters, MOST_VOCABULARY)
            with doing(f"training a tokenizer on {characters:,} characters, as many of each category"):
                texts = balanced_sample(spool, categories, tokenizer_chars)
                encoder = train_bpe(texts, size, exactly=vocab_size is not None)
        encoder.save(shop.folder / "tokenizer.json")
        sizes = {}
        for split in SPLITS:
            present = [category for category in categories if spool.counts[split, category]]
            if not present:
                continue
            missing = ", ".join(sorted(set(categories) - set(present)))
            if missing and (named or split != "test"):
                raise DataError(f"{input}, {split}: no document of {missing}; raise {split}_fraction, use more "
                                "documents, or leave that out of categories")
            if missing:
                print(f"{split}: no document of {missing}")
            with contextlib.closing(ChunkSpool(shop.folder, split, chunk_size, encoder.vocab_size)) as chunks:
                for category in present:
                    encode(spool, split, category, encoder, threads, chunks)
                chunks.write(shop.folder / f"{split}.h5", tokenizer="tokenizer.json", source=input, seed=seed)
            sizes[split] = dict(chunks.sizes)
            listed = of_each(chunks.sizes, MOST_LISTED if split == "train" else 2)
            print(
                f"{split}: {counted(chunks.sizes.total(), 'chunk')} of {counted(chunk_size, 'token')} ({listed}); "
                f"{counted(chunks.dropped, 'tail token')} dropped"
            )
        if "train" not in sizes or "validation" not in sizes:
            raise DataError(f"{input} leaves no validation documents: raise validation_fraction or add documents")
        point_at_small(sizes["train"])
        shop.finish("tokenizer.json", *(f"{split}.h5" for split in sizes))
    print(f"vocabulary {encoder.vocab_size:,} ({encoder.kind}); written to {out_dir}")
    return sizes


# ------------------------------------------------------------------------------------------------------------- reading


def how_to_make(folder: Path) -> str:
    """The end of a sentence about a folder without chunks: what makes them of its documents, or which one may be meant.
    """
    if folder.is_file() or any(file.suffix in RAW for file in folder.glob("*")):
        making = shlex.join(["python", "prepare_data.py", "arxiv", f"--input={folder}"])
        return f". {folder} holds documents, and data is a folder of chunks made of them: {making}"
    near = nearest(folder.name, [file.parent.name for file in folder.parent.glob("*/train.h5")])
    meant = f"; did you mean {folder.parent / near}? Or" if near else ";"
    return f"{meant} make it with python prepare_data.py arxiv or ergodic"


def open_chunks(path: str | Path) -> tuple[h5py.File, list[str], np.ndarray]:
    """(file, category names, category code of every chunk) of an HDF5 file of this layout or of the source's.

    Raises DataError for a file that is missing, truncated or foreign, or lacks a dataset.
    """
    if not Path(path).exists():
        raise DataError(f"{path}: no such file{how_to_make(Path(path).parent)}")
    file = open_hdf5(path)
    try:
        return file, *layout(file)
    except DataError:
        file.close()
        raise


def map_tokens(file: h5py.File) -> np.ndarray:
    """token_chunks [N, n] as a memory map, so that rows of a file of any size can be gathered at random.

    A file whose chunks are compressed or scattered (the source's may be) is first copied to an unnamed temporary file.
    """
    tokens = member(file, "token_chunks", h5py.Dataset)
    if is_mapped(file):
        return np.memmap(file.filename, tokens.dtype, "r", tokens.id.get_offset(), tokens.shape)
    mapped = spooled_array(tokens.dtype.newbyteorder("="), *tokens.shape)
    for begin in range(0, len(tokens), BLOCK):
        rows = slice(begin, begin + BLOCK)
        mapped[rows] = read(tokens, rows)
    return mapped


def chunk_arrays(path: Path, vocab_size: int = 0) -> dict:
    """The arrays of an HDF5 file of prepare_data.py, or of the source, which does not say its vocabulary.

    Returns: tokens [R, n] (a memory map), codes [R] (the category of each chunk, a number of names), documents [R],
    names, vocab_size (where the file does not say it: what its tokens need, and at least the argument), budget (chunks
    of the smallest category), oracle [R, K, n] (log p_k(x_t | x_<t)) or None, fingerprint (16 hex digits: of the
    digest in the file, or of a sample of what the file holds).
    Raises DataError for a file that is missing, damaged or foreign, or has tokens beyond its vocabulary.
    """
    file, names, codes = open_chunks(path)
    with file:
        tokens = map_tokens(file)
        low, top = token_range(tokens)
        if not verify(file, tokens, codes, names, every=False) and "vocab_size" in file.attrs:  # one of ours
            note(f"{path} has no checksums: whether it has changed cannot be said; prepared again it has them")
        size = whole_attribute(file, "vocab_size", 1, MOST_TOKENS) or vocabulary_of(path, file, vocab_size, top + 1)
        if low < 0 or top >= size:
            wrong = low if low < 0 else top
            raise DataError(
                f"{path} has the token {wrong}, but vocab_size = {size}: see python prepare_data.py inspect {path}"
            )
        # Numbers of documents may begin anew in each category: the pair is what tells them apart.
        documents = numbered(codes, read(member(file, "doc_idx_for_chunk")))
        smallest = np.bincount(codes, minlength=len(names)).min()
        budget = whole_attribute(file, "reference_chunk_budget_smallest_top_category", 0)
        return {
            "tokens": tokens,
            "codes": codes,
            "documents": documents,
            "names": names,
            "vocab_size": size,
            "budget": int(smallest) if budget is None else budget,
            "oracle": oracle(file, codes, len(names)),
            "fingerprint": chunk_fingerprint(file, tokens, codes, names),
        }


def chunk_fingerprint(file: h5py.File, tokens: np.ndarray, codes: np.ndarray, names: list[str]) -> str:
    """The identity of chunks; of a file without a digest, that of a sample of its tokens and of its categories."""
    digest = text_attribute(file, "sha256")
    if digest:
        return fingerprint(digest)
    return fingerprint(sample(tokens), sample(codes), *names)


def train_and_validation(data: str | Path, validation_data: str = "", vocab_size: int = 0) -> tuple[dict, dict]:
    """(train, validation), as chunk_arrays has them, of one vocabulary and size of chunks.

    Args:
        data, validation_data: see split_paths.
        vocab_size: the least that the vocabulary counts as, where the files do not say it.
    """
    train_path, validation_path = split_paths(Path(data), validation_data)
    if train_path.suffix == ".hdf5" and not SPLIT_END.search(train_path.stem):
        note(f"{train_path} may hold the documents of validation too, as the source makes it: python prepare_data.py "
             f"inspect {validation_path} tells")
    # A file of the source does not say its vocabulary: what the tokens of both need counts.
    validation = chunk_arrays(validation_path, vocab_size)
    train = chunk_arrays(train_path, validation["vocab_size"])
    if train["vocab_size"] > validation["vocab_size"]:
        validation = chunk_arrays(validation_path, train["vocab_size"])
    same_size = train["tokens"].shape[1] == validation["tokens"].shape[1]
    if not same_size or train["vocab_size"] != validation["vocab_size"]:
        raise DataError(
            f"{train_path.name} and {validation_path.name} of {train_path.parent} differ in chunk size or vocabulary: "
            "they are not of one preparation"
        )
    return train, validation


def test_chunks(data: str | Path, train) -> dict | None:
    """The test split, as chunk_arrays has it; None, and a note, where there is none or it lacks a category of training.

    Args:
        data: see split_paths. train: of training chunks, names, vocab_size and size.
    Raises DataError for a file that is damaged or of another preparation.
    """
    path = split_paths(Path(data))[0]
    path = path.with_name(f"{SPLIT_END.sub('', path.stem)}_test".removeprefix("_") + path.suffix)
    if not path.exists():
        note(f"there is no {path}: the final numbers are of validation, by which the weights are chosen too")
        return None
    test = chunk_arrays(path, train.vocab_size)
    if test["vocab_size"] != train.vocab_size or test["tokens"].shape[1] != train.size:
        raise DataError(f"{path} differs from the training chunks in chunk size or vocabulary: they are not of one "
                        "preparation; final_split=validation goes without it")
    lacking = [name for name in train.names if name not in test["names"]]
    if lacking:  # the same for every run on these data, whichever categories it is about
        note(f"{path} has no chunk of {quoted(lacking)}: the final numbers are of validation, by which the weights are "
             "chosen too")
        return None
    return test


def split_paths(data: Path, validation_data: str = "") -> tuple[Path, Path]:
    """The files of training and of validation chunks in a folder, or those that a file of one split belongs to.

    Ours are called train.h5 and validation.h5. Where these are not there, the names of the source are looked for: of
    its STEM_train.hdf5, STEM_validation.hdf5 and STEM.hdf5, which holds all splits and trains where there is no other.

    Args:
        data: a folder, or a file of any split.
        validation_data: the file of validation chunks, where it is not beside the other.
    Raises DataError for a folder that leaves the choice, or is of the source's older fetch_arxiv.py.
    """
    if data.suffix not in (".h5", ".hdf5"):
        data = file_in(data)
    stem = SPLIT_END.sub("", data.stem)  # "" for ours
    whole = data.with_name(f"{stem}{data.suffix}")
    of_split = {split: data.with_name(f"{stem}_{split}".removeprefix("_") + data.suffix) for split in SPLITS}
    train = of_split["train"]
    if whole.exists() and (data == whole or not train.exists()):
        train = whole
    return train, Path(validation_data) if validation_data else of_split["validation"]


def file_in(folder: Path) -> Path:
    """The file of training chunks in a folder, or what it would be called."""
    ours = folder / "train.h5"
    theirs = sorted(folder.glob("*_validation.hdf5"))
    if ours.exists() or (folder / "validation.h5").exists() or not folder.is_dir():
        return ours
    if len(theirs) > 1:
        names = ", ".join(file.name for file in theirs)
        raise DataError(f"{folder} has several files of validation chunks ({names}): name the one with --data=FILE")
    if not theirs and (folder / "tokens.bin").exists():
        raise DataError(
            f"{folder} holds whole documents (tokens.bin, index.jsonl), not chunks: python prepare_data.py arxiv "
            f"--input={folder} --out_dir=data/arxiv cuts them"
        )
    return theirs[0] if theirs else ours


def vocabulary_of(path: Path, file: h5py.File, least: int, needed: int) -> int:
    """Tokens of the vocabulary of a file of the source: of the tokenizer that it names, or else as many as needed.

    least: what another file of the same vocabulary needs, 0 where this is the first.
    """
    named = text_attribute(file, TOKENIZER_NAME)
    tokenizer = tokenizer_beside(path, named)
    if tokenizer:
        try:
            spec = read_spec(tokenizer)
            tokens = {*spec["model"]["vocab"], *(token["content"] for token in spec.get("added_tokens") or ())}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot read the tokenizer {tokenizer}, which {path} names: {reason(error)}") from error
        return max(least, needed, len(tokens))
    if named.endswith(".json") and not least:
        note(f"{path} names the tokenizer {named}, which is not there: the vocabulary counts as its tokens need it")
    return max(least, needed)


def tokenizer_beside(path: Path, named: str) -> Path | None:
    """The tokenizer that a file of chunks names: beside it, as ours do, or from the root of a project with data/.

    Raises DataError for a name that leads out of these folders: a file of others may name any file of the machine.
    """
    if Path(named).is_absolute() or ".." in Path(named).parts or "\0" in named:
        raise DataError(f"{path} names the tokenizer {named!r}, outside its project, which is not read: put it beside "
                        "the file and name it so")
    for folder in (path.parent, path.parent.parent, Path()):
        if named and (folder / named).is_file():
            return folder / named
    return None


def copy_tokenizer(data: str | Path, folder: Path) -> None:
    """The tokenizer of chunks into a run folder, where sample.py reads prompts with it; one of others does not stay.

    data: see split_paths.
    """
    path, _ = split_paths(Path(data))
    target = folder / "tokenizer.json"
    tokenizer = path.with_name(target.name)
    if not tokenizer.is_file():
        tokenizer = None
    if path.is_file() and not tokenizer:
        with open_chunks(path)[0] as file:
            tokenizer = tokenizer_beside(path, text_attribute(file, TOKENIZER_NAME))
    if tokenizer:
        read_spec(tokenizer)  # a damaged one ends here
        shutil.copyfile(tokenizer, target)
    else:
        target.unlink(missing_ok=True)


def whole_documents(rows: np.ndarray, documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows, document after document in random order, those of each document in theirs."""
    names, place = np.unique(documents[rows], return_inverse=True)
    rank = rng.permutation(len(names))  # of each document
    return rows[np.argsort(rank[place], kind="stable")]


def numbered(*columns: np.ndarray) -> np.ndarray:
    """The rank [R] of each row of some columns [R] among those that differ, the first column compared first."""
    # Sorted column by column: a hundred times faster than np.unique(axis=0) where a file is in order, as ours are.
    order = np.lexsort(columns[::-1])
    is_new = np.zeros(len(order), bool)
    for column in columns:
        ascending = column[order]
        is_new[1:] |= ascending[1:] != ascending[:-1]
    ranks = np.empty(len(order), np.int64)
    ranks[order] = is_new.cumsum()
    return ranks


def token_range(tokens: np.ndarray) -> tuple[int, int]:
    """The least and the largest of tokens [R, n], read a block at a time."""
    lows, tops = [], []
    for begin in range(0, len(tokens), 100_000):
        block = tokens[begin : begin + 100_000]
        lows.append(int(block.min()))
        tops.append(int(block.max()))
    return min(lows), max(tops)


# ---------------------------------------------------------------------------------------------------------- inspection


def inspect_chunks(path: str | Path, tokens: int = 20) -> dict:
    """Print what a file of chunks holds, the most frequent tokens too; returns it with the list of problems."""
    path = Path(path)
    file, names, codes = open_chunks(path)
    with file:
        vocab_size = whole_attribute(file, "vocab_size", 1, MOST_TOKENS) or 0  # 0: the file does not say
        with doing(f"reading {path}, and looking for chunks that repeat"):
            chunks = map_tokens(file)
            documents = read(member(file, "doc_idx_for_chunk"))
            N, n = chunks.shape  # read block by block: the file may be larger than memory
            counts, negative = count_tokens(chunks, vocab_size)
            problems = range_problems(counts, negative, vocab_size)
            problems += repeats(path, chunks)
        of_each = counted(n, "token")
        print(f"{path}: {counted(N, 'chunk')} of {of_each}, {N * n:,} in all, vocabulary {vocab_size or 'unknown'}")
        sizes = {}
        owners = {}  # documents of each category
        for k, name in enumerate(names):
            here = codes == k
            size = int(here.sum())
            owner = len(np.unique(documents[here]))
            held = [counted(size, "chunk"), counted(size * n, "token"), counted(owner, "document")]
            print(f"  {name:<16} {held[0]:>17} {held[1]:>19} {held[2]:>19}")
            sizes[name] = size
            owners[name] = owner
        most_frequent = counts.argsort()[::-1][:tokens].tolist()
        most_frequent = [token for token in most_frequent if counts[token]]
        words = spelled(most_frequent, tokenizer_beside(path, text_attribute(file, "tokenizer")))
        print(f"  most frequent: {', '.join(words)} (the first is {counts.max() / N / n:.1%} of all)")
        if problems:
            report(problems)
        oracle(file, codes, len(names))
        if verify(file, chunks, codes, names, every=True):
            print(f"  tokens and categories are as they were prepared: sha256 {text_attribute(file, 'sha256')}")
        else:
            print("  prepared without a digest: whether it has changed cannot be said")
    if not problems:  # known only now
        report(problems)
    return {"chunks": sizes, "documents": owners, "problems": problems}


def inspect_folder(folder: Path, tokens: int = 20) -> dict:
    """inspect_chunks of every split of a folder."""
    return {path.stem: inspect_chunks(path, tokens) for path in split_files(folder)}


def split_files(folder: Path) -> list[Path]:
    """The files of chunks in a folder: ours, or those of the source."""
    files = [folder / f"{split}.h5" for split in SPLITS]
    return [file for file in files if file.exists()] or sorted(folder.glob("*.hdf5"))


def count_tokens(chunks: np.ndarray, vocab_size: int) -> tuple[np.ndarray, int]:
    """(how often each token occurs, at least vocab_size of them; how many are negative)."""
    counts = np.zeros(max(vocab_size, 1), dtype=np.int64)
    negative = 0
    for begin in range(0, len(chunks), BLOCK):
        block = chunks[begin : begin + BLOCK].ravel().astype(np.int64)
        negative += int((block < 0).sum())
        here = np.bincount(block[block >= 0], minlength=len(counts))
        here[: len(counts)] += counts  # a larger token has made it longer
        counts = here
    return counts, negative


def range_problems(counts: np.ndarray, negative: int, vocab_size: int) -> list[str]:
    """Problems: tokens out of range."""
    problems = []
    if not vocab_size:
        problems.append("no attribute vocab_size: ranges cannot be checked")
    elif len(counts) > vocab_size:
        beyond = counts[vocab_size:].sum()
        problems.append(f"{counted(beyond, 'token is', 'tokens are')} beyond vocab_size = {vocab_size}")
    if negative:
        problems.append(f"{counted(negative, 'token is', 'tokens are')} negative")
    return problems


def repeats(path: Path, chunks: np.ndarray) -> list[str]:
    """Problems: chunks that come twice in this file, or in another split beside it."""
    problems = []
    digests = hashes(chunks)
    repeated = len(digests) - len(np.unique(digests))
    if repeated:
        problems.append(f"{counted(repeated, 'chunk repeats', 'chunks repeat')} an earlier one")
    for other in sorted(path.parent.glob(f"*{path.suffix}")):
        if other.resolve() == path.resolve():
            continue
        file, _, _ = open_chunks(other)
        with file:
            other_chunks = map_tokens(file)
            if other_chunks.shape[1] != chunks.shape[1]:
                continue
            shared = int(np.isin(digests, hashes(other_chunks)).sum())
        if shared:
            problems.append(f"{counted(shared, 'chunk is', 'chunks are')} in {other.name} too: the splits leak")
    return problems


def hashes(chunks: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every chunk [N]."""
    one = np.uint64(1)
    draws = np.random.default_rng(0)  # the same odd factors for every file; one for each place in a chunk
    odd = draws.integers(2**63, size=chunks.shape[1], dtype=np.uint64) * np.uint64(2) + one
    parts = []
    for begin in range(0, len(chunks), BLOCK):
        tokens = chunks[begin : begin + BLOCK].astype(np.uint64)
        rows = (tokens + one) * odd
        mixed = rows ^ (rows >> np.uint64(29))
        digest = (mixed * odd[::-1]).sum(1, dtype=np.uint64)
        parts.append(digest)
    return np.concatenate(parts)


def spelled(tokens: list[int], path: Path | None) -> list[str]:
    """Tokens in the spelling of the tokenizer in this file, where there is one."""
    if path is None:
        return [str(token) for token in tokens]
    tokenizer = load_tokenizer(path)
    words = []
    for token in tokens:
        is_known = token < tokenizer.vocab_size
        words.append(repr(tokenizer.decode([token])) if is_known else str(token))
    return words
