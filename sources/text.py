"""Text: documents from files, the hub or Python's own documentation, made streams of tokens."""

import ast
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import DataError
from common.telling import bar, doing, note
from sources.files import (
    KINDS,
    MOST_CHARACTERS,
    UNREADABLE,
    kind_of,
    lines_of,
    open_text,
    read_whole,
    text_files,
    utf8_blocks,
)
from sources.plain_json import in_words
from sources.shared import Workshop, closest, counted, optional, quoted
from sources.streams import stream_dtype, write_meta
from sources.tokenizer import (
    ESCAPED,
    SPECIAL,
    Tokenizer,
    is_unicode,
    load_tokenizer,
    readable,
    train_bpe,
    train_char,
)

LEAST, MOST = 2_000, 1 << 16  # bytes of a document cut from a running text
READ_BYTES = 1 << 20  # of such a file, at once
MARK = b"<|endoftext|>"  # between the documents of a .txt
BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 1 << 22  # to the tokenizer at once
OFFLINE_VOCABULARY = 1_024  # of Python's documentation, as train_apelr.py makes it for itself
MOST_VOCABULARY = 4_096  # tokens that a BPE has unless it is asked for more
CHARACTERS_A_TOKEN = 1_000  # of training text, for a vocabulary that nobody names: rarer tokens are hardly learned
HELD_OUT = re.compile(r"(^|[._-])(val|valid|validation|dev|test)([._-]|$)", re.IGNORECASE)  # in the name of a file
HUB_BYTES = 1e9  # read of a hub data set where the settings name no limit


class HubText(NamedTuple):
    name: str
    config: str
    has_validation: bool


HUB = {  # input=NAME
    "tinystories": HubText("roneneldan/TinyStories", "", True),
    "c4_en": HubText("allenai/c4", "en", True),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", True),
    "wikitext103": HubText("Salesforce/wikitext", "wikitext-103-raw-v1", True),
    "fineweb_edu": HubText("HuggingFaceFW/fineweb-edu", "sample-10BT", False),
    "fineweb": HubText("HuggingFaceFW/fineweb", "sample-10BT", False),
    "wiki40b_en": HubText("google/wiki40b", "en", True),
    "cc_news": HubText("vblagoje/cc_news", "", False),
}

# --------------------------------------------------------------------------------------------------------------- files


def read_file(path: Path, column: str, texts: Callable[[Path], Iterable[str | bytes]]) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of a file; `texts` cuts a .txt file. A .json is read whole, unless it has a record a
    line, the others as a stream. Raises DataError for a file that is damaged or of no kind that is known."""
    kind = kind_of(path)
    try:
        if kind == ".txt":
            for text in texts(path):
                yield str(path), {column: text, "category": Path(os.path.abspath(path)).parent.name}
        elif kind == ".jsonl" or kind == ".json" and has_lines(path):
            yield from jsonl_records(path, column)
        elif kind == ".json":
            yield from json_records(path, column)
        elif kind == ".csv":
            yield from csv_records(path)
        elif kind == ".parquet":
            yield from parquet_records(path)
        else:
            raise DataError(f"{path}: use {', '.join(KINDS)}, or a folder of such files")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"cannot read {path}: it is not {error.encoding} (byte {byte:#x}: {error.reason}); save it as "
                        "UTF-8") from error
    except UNREADABLE as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except Exception as error:  # pyarrow's own errors for damaged files
        if type(error).__module__.startswith("pyarrow"):
            raise DataError(f"cannot read {path}: {error}") from error
        raise


def holds_documents(path: Path) -> bool:
    """Whether a .json is a list, or has a value a line: settings are one object."""
    with open_text(path) as file:
        return file.read(1 << 16).lstrip().startswith("[") or has_lines(path)


def has_lines(path: Path) -> bool:
    """Whether a .json has a value a line, as Kaggle's have: the first line is one, and another follows."""
    with open_text(path) as file:
        lines = iter(lambda: file.readline(MOST_CHARACTERS), "")
        filled = (line for line in lines if line.strip())
        first = next(filled, "")
        if not first.endswith("\n") or not next(filled, ""):
            return False
    try:
        parsed(first, str(path))
    except DataError:
        return False
    return True


def json_records(path: Path, column: str) -> Iterator[tuple[str, dict]]:
    """Those of the list that the file is, or of the only list in its object; an object with a text is a record."""
    value = parsed(read_whole(path), str(path))
    if isinstance(value, dict) and isinstance(value.get(column), str):
        yield str(path), value
        return
    lists = [value]
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
    if len(lists) != 1 or not isinstance(lists[0], list):
        content = f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path}: expected a list of documents, or an object with one list, not {content}")
    for number, item in enumerate(lists[0], 1):
        where = f"{path}, item {number}"
        yield where, record_of(item, where, column)


def jsonl_records(path: Path, column: str) -> Iterator[tuple[str, dict]]:
    with open_text(path) as file:
        for number, line in enumerate(lines_of(file, path), 1):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, record_of(parsed(line, where), where, column)


def csv_records(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a table. Raises DataError for a row that only a guess could read: what follows it would be wrong."""
    csv.field_size_limit(MOST_CHARACTERS)
    with open_text(path, newline="") as file:
        rows = csv.reader(lines_of(file, path), delimiter=delimiter_of(path), strict=True)
        names = None
        number = 1  # of a row: the names are row 1, and a text may go over many lines
        while True:
            where = f"{path}, row {number}"
            begin = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{where}, from line {begin} on: {error}; a quote that is not closed, or stands alone "
                                "in a quoted text (write it twice)?") from error
            if row is None:
                return
            if not row:  # an empty line
                continue
            number += 1
            if names is None:
                names = row
                twice = [name for name, times in Counter(names).items() if name and times > 1]
                if twice:
                    raise DataError(f"{where}: two columns are called {twice[0]!r}, and a document has one text: give "
                                    "each column a name of its own")
                continue
            if any(row[len(names) :]):
                raise DataError(f"{where}, line {begin}: {len(row)} cells under {counted(len(names), 'name')}; a text "
                                "that has a comma needs quotes around it")
            yield where, dict(zip_longest(names, row[: len(names)]))


def delimiter_of(path: Path) -> str:
    """What stands between the names of a table's columns: a comma, or what takes its place where commas are decimal."""
    with open_text(path) as file:
        names = next((line for line in lines_of(file, path) if line.strip()), "")
    return max(",;\t", key=names.count)


def parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    parquet = optional("pyarrow.parquet", "pyarrow")
    for batch in parquet.ParquetFile(path, page_checksum_verification=True).iter_batches(1_000):
        for record in batch.to_pylist():
            yield str(path), record


def parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({getattr(error, 'msg', in_words(error))})") from error


def record_of(value, where: str, column: str) -> dict:
    """The record of a JSON value; a bare text is its only column."""
    if not isinstance(value, dict | str):
        raise DataError(f"{where}: expected an object or a text, not {json.dumps(value)[:40]!r}")
    return {column: value} if isinstance(value, str) else value


def in_record(record: dict, column: str) -> str | None:
    """The name of a column in a record, which may have it in other case; None where there is none."""
    if column in record:
        return column
    return next((name for name in record if str(name).casefold() == column.casefold()), None)


def text_columns(record: dict, column: str) -> list[str]:
    """The columns that hold a document: that of this name; for text also title and abstract, as arXiv has them."""
    for names in ([column], ["title", "abstract"] if column == "text" else [column]):
        found = [in_record(record, name) for name in names]
        if None not in found:
            return found
    return []


def no_column(where: str, record: dict, column: str, setting: str, near: str) -> DataError:
    """near: the column of the record that may be meant, or "NAME"."""
    return DataError(f"{where}: no column {column!r}; there are {quoted(record)}. Name it: --{setting}={near}")


def is_nothing(cell) -> bool:
    """Whether a cell says nothing: null, or the nan that tables have for it."""
    return cell is None or cell != cell


def is_missing(record: dict, column: str) -> bool:
    """Whether the column, or all that its document is in, is there and says nothing."""
    names = text_columns(record, column)
    return bool(names) and all(is_nothing(record[name]) for name in names)


def text_of(where: str, record: dict, column: str) -> str:
    """The document of a record. Raises DataError where it has none, and says which column may hold one."""
    names = text_columns(record, column)
    if not names:
        lengths = {name: len(cell) for name, cell in record.items() if isinstance(cell, str) and len(cell) > 40}
        raise no_column(where, record, column, "text_column", max(lengths, key=lengths.get, default="NAME"))
    if len(names) == 1:
        return as_text(where, record, names[0])
    title, abstract = ["" if is_nothing(record[name]) else as_text(where, record, name) for name in names]
    return f"{' '.join(title.split())}\n\n{abstract.strip()}".strip("\n")


def as_text(where: str, record: dict, column: str) -> str:
    text = record[column]
    if isinstance(text, bytes):
        return readable(text)
    if not isinstance(text, str):
        raise DataError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
    return ESCAPED.sub("\ufffd", readable(text))


def whole(path: Path) -> Iterator[str]:
    """A .txt file as one document."""
    yield read_whole(path)


def cut_text(path: Path, whole_files: bool = False, seen: Counter | None = None) -> Iterator[bytes]:
    """The documents of a .txt file, read in blocks: between <|endoftext|> where it has that, else a cut at a blank line
    every 2,000 bytes or more (at a line's end, or a space, where the next 64 KiB have no blank line).

    whole_files: the file is one document, whatever is in it. seen: counts how files were cut: whole, marked, running.
    """
    marked = not whole_files and holds(path, MARK)

    def cut(data: bytes, left: int) -> list[bytes]:
        if whole_files:
            return [data]
        return data.split(MARK) if marked else cut_running(data, left)

    rest, pieces = b"", 0
    for block in utf8_blocks(path, READ_BYTES):
        *texts, rest = cut(rest + block, MOST)
        if len(rest) > MOST_CHARACTERS:
            raise DataError(f"{path} has a document of more than {MOST_CHARACTERS:,} bytes: put {MARK.decode()} "
                            "between documents")
        pieces += len(texts)
        for text in texts:
            yield text.strip(b"\r\n")
    texts = cut(rest, LEAST)
    if pieces + len(texts) > 1 and not texts[-1].strip():
        texts.pop()  # what stands behind the last mark or cut is no document without text, but nothing
    if seen is not None:
        is_whole = pieces + len(texts) == 1
        seen["whole" if is_whole else "marked" if marked else "running"] += 1
    for text in texts:
        yield text.strip(b"\r\n")


def holds(path: Path, mark: bytes) -> bool:
    """Whether the mark is anywhere in the file, also across the blocks in which it is read."""
    tail = b""
    for block in utf8_blocks(path, READ_BYTES):
        data = tail + block
        if mark in data:
            return True
        tail = data[-len(mark) :]
    return False


def cut_running(data: bytes, left: int) -> list[bytes]:
    """Pieces of a text without marks, until fewer than `left` bytes are left, which come last."""
    pieces, begin = [], 0
    while len(data) - begin >= left:
        end, after = next_cut(data, begin)
        pieces.append(data[begin:end])
        begin = after
    pieces.append(data[begin:])
    return pieces


def next_cut(data: bytes, begin: int) -> tuple[int, int]:
    """(where a piece that begins there ends, where the next begins): at a blank line, a line's end, a space, or never.
    """
    for pattern in (rb"\n\s*\n", rb"\n", rb"\s"):
        match = re.compile(pattern).search(data, begin + LEAST, begin + MOST)
        if match:
            return match.span()
    end = min(begin + MOST, len(data))
    return end, end


# ------------------------------------------------------------------------------------------ the hub, and Python itself


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library raises what its transports raise
        raise DataError(f"cannot read {name} from the hub ({type(error).__name__}: {error}); local files work too: "
                        "--input=FILE.jsonl") from error


def open_hub(name: str, config: str) -> dict:
    """{split: rows}, streamed."""
    try:
        datasets = optional("datasets", "datasets")
    except DataError as error:
        raise DataError(f"{name}: {error}; files of your own need none: --input=FILE or FOLDER") from error
    with hub_errors(name):
        return datasets.load_dataset(name, config or None, streaming=True)


def hub_records(source: str, column: str, split: str) -> Iterator[tuple[str, dict]]:
    name, config, has_validation = HUB[source]
    with hub_errors(name):
        rows = open_hub(name, config)[split if has_validation else "train"]
        if source.startswith("wikitext"):
            rows = articles(rows, column)
        for number, record in enumerate(rows):
            yield f"{name}, {split}, document {number}", record


def articles(rows: Iterable[dict], column: str) -> Iterator[dict]:
    """WikiText has a row a line; an article begins at ' = Title = '."""
    lines = []
    for row in rows:
        line = text_of("WikiText", row, column)
        if lines and re.fullmatch(r" = [^=].* = \n?", line):
            yield {column: "".join(lines)}
            lines = []
        lines.append(line)
    yield {column: "".join(lines)}


def documentation() -> Iterator[tuple[str, str]]:
    """(where it stands, text) of the topics of Python's help and of the standard library's longer docstrings."""
    topics = optional("pydoc_data.topics", "pydoc_data, which a full Python has").topics
    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    root = Path(sysconfig.get_paths()["stdlib"])
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if any(part.startswith(("test", "site-packages", "dist-packages")) for part in place.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates, which are no Python yet
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) >= 200:
                yield str(place), text


# ----------------------------------------------------------------------------------------------------------- documents


class Reading(NamedTuple):
    """What is read of a source."""

    text_column: str
    max_bytes: int | None  # of text, UTF-8
    max_documents: int | None
    val_fraction: float  # of documents; of the limits for validation text of its own
    min_chars: int = 0  # shorter documents are left out, like those without a text
    whole_files: bool = False  # a .txt is one document


def source_records(source: str, split: str, reading: Reading, seen: Counter) -> Iterator[tuple[str, dict]]:
    """(where it stands, record) of every document of one source; how they are cut is counted in `seen`."""
    path, column = Path(source), reading.text_column
    if not source:
        for where, text in documentation():
            yield where, {column: text}
    elif source in HUB:
        yield from hub_records(source, column, split)
    elif path.exists():
        files = text_files(path)
        if split == "train" and len(files) > 1:
            point_at_held_out(files)
        for file in files:
            seen["tables"] += kind_of(file) != ".txt"
            yield from read_file(file, column, partial(cut_text, whole_files=reading.whole_files, seen=seen))
    else:
        beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        near = closest(source, [*HUB, *beside]) or "."
        raise DataError(f"{source}: no such file or folder{near} Names of the hub: {', '.join(HUB)}")


def point_at_held_out(files: list[Path]) -> None:
    """A note where a file among others calls itself held out, and is going to be trained on."""
    held_out = [file for file in files if HELD_OUT.search(file.stem)]
    if held_out and len(held_out) < len(files):
        note(f"{held_out[0]} is read as training text too; to hold it out, give --input=FILE and "
             f"--val_input={held_out[0]}")


def how_cut(seen: Counter) -> list[str]:
    """Where the documents of files end, a line for each way: "98 files are a document each"."""
    lines = []
    if seen["whole"]:
        lines.append(counted(seen["whole"], "file is a document", "files are a document each"))
    if seen["marked"]:
        lines.append(f"{counted(seen['marked'], 'file is', 'files are')} cut at {MARK.decode()}")
    if seen["running"]:
        files = counted(seen["running"], "file is", "files are")
        lines.append(f"{files} cut at blank lines, every {LEAST:,} bytes or more; --whole_files does not cut")
    if seen["tables"] and seen["records"]:
        lines.append(f"{counted(seen['tables'], 'file has', 'files have')} a document a line, row or item")
    return lines


def documents_of(source: str, split: str, reading: Reading, seen: Counter) -> Iterator[str]:
    """The documents with a text, until a limit is reached; a limit for validation is val_fraction of it.

    Those without are counted in seen["empty"], those that are not UTF-8 in seen["bytes"].
    """
    column = reading.text_column
    bytes_left = reading.max_bytes or (HUB_BYTES if source in HUB else math.inf)
    documents_left = reading.max_documents or math.inf
    if split == "validation":
        bytes_left *= reading.val_fraction
        documents_left *= reading.val_fraction
    with contextlib.closing(source_records(source, split, reading, seen)) as records:
        for where, record in bar(records, f"reading {source or 'documentation of Python'}", unit="documents"):
            text = "" if is_missing(record, column) else text_of(where, record, column)
            if len(text.strip()) < max(1, reading.min_chars):
                seen["empty"] += 1
                continue
            seen["records"] += 1
            if not text.isascii() and not is_unicode(text):
                if not seen["bytes"]:
                    note(f"{where} is not UTF-8: its bytes stay as they are; save it as UTF-8 if it is text, or "
                         "else leave it out")
                seen["bytes"] += 1
            yield text
            bytes_left -= size_of(text)
            documents_left -= 1
            if bytes_left <= 0 or documents_left <= 0:
                return


def size_of(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def place_of(text: str, seed: int) -> float:
    """A number between 0 and 1 that only the text and the seed decide: which split a document is of."""
    data = f"{seed} {text}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64


class Spool:
    """Documents on disk by (split, category), so that none of it need fit in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts = Counter()  # documents of a (split, category)
        self.chars = Counter()
        self.files = {}
        self.paths = {}  # by number: a category may be longer than the name of a file
        self.numbers = count()

    def add(self, split: str, category: str, text: str) -> None:
        key = split, category
        if key not in self.files:
            self.paths[key] = self.folder / f"documents-{next(self.numbers)}.jsonl"
            self.files[key] = open(self.paths[key], "w", encoding="utf-8")
        self.files[key].write(json.dumps(text) + "\n")
        self.counts[key] += 1
        self.chars[key] += len(text)

    def texts(self, split: str, category: str) -> Iterator[str]:
        if (split, category) not in self.files:
            return
        self.files[split, category].flush()
        with open(self.paths[split, category], encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def move(self, category: str, begin: str, end: str, chosen: Callable[[str], bool]) -> None:
        """Those documents of a category that are chosen, from the split `begin` to the split `end`."""
        key = begin, category
        texts = self.texts(*key)
        first = next(texts)  # which opens the file that is replaced
        self.files.pop(key).close()
        del self.counts[key], self.chars[key]
        for text in chain([first], texts):
            self.add(end if chosen(text) else begin, category, text)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, also where one has no room for what it holds
            for file in self.files.values():
                stack.callback(file.close)


def fill_splits(spool: Spool, category: str, splits: Iterable[str], order: Callable[[str], Any]) -> int:
    """Give each split without a document of a category the first, in this order, of the split that has most of them.

    Chance leaves a small data set without any to validate on. Returns how many splits were given one.
    """
    given = 0
    for split in splits:
        richest = max(splits, key=lambda split: spool.counts[split, category])
        if spool.counts[split, category] or spool.counts[richest, category] < 2:
            continue
        first = min(map(order, spool.texts(richest, category)))
        spool.move(category, richest, split, lambda text, first=first: order(text) == first)
        given += 1
    return given


def gather_text(source: str, val_source: str, reading: Reading, seed: int, spool: Spool) -> None:
    """Sort all documents into the spool; those that repeat, in whatever case, are all of one split."""
    if not val_source and source in HUB and HUB[source].has_validation:
        val_source = source
    def place(text: str) -> float:
        # Of a text without case and margins: copies share it, so that none is trained on where another is held out.
        return place_of(text.strip().casefold(), seed)

    seen = Counter()  # how documents were cut, and which were left out
    held, left_out = set(), 0  # places of the documents of val_source; training documents that are among them
    if val_source:
        for text in documents_of(val_source, "validation", reading, seen):
            held.add(place(text))
            spool.add("val", "", text)
    for text in documents_of(source, "train", reading, seen):
        of_text = place(text)
        if of_text in held:
            left_out += 1
        elif val_source or of_text >= reading.val_fraction:
            spool.add("train", "", text)
        else:
            spool.add("val", "", text)
    if not val_source:
        fill_splits(spool, "", ("train", "val"), place)
    name, train, val = source or "Python's help", spool.counts["train", ""], spool.counts["val", ""]
    if not val_source and train + val == 1:
        raise DataError(f"{name} is one document, of which none can be held out to validate on: use more text, put "
                        f"{MARK.decode()} between documents, or name other text, --val_input=FILE")
    if not train:
        raise DataError(f"{name} leaves no training document: use more text, or a smaller val_fraction")
    if not val:
        raise DataError(f"{val_source or name} leaves no validation document: use more text, or --val_input=FILE")
    if left_out:
        seen["left out"] = left_out
    say_gathered(train, val, seen, reading)


def say_gathered(train: int, val: int, seen: Counter, reading: Reading) -> None:
    """How many documents there are for what, where they were cut, and what was left out."""
    told = [f"{train:,} for training, {val:,} for validation"]
    if seen["left out"]:
        told.append(f"left out {seen['left out']:,} that are in validation too")
    if seen["empty"]:
        kind = f"of less than {counted(reading.min_chars, 'character')}" if reading.min_chars else "without text"
        told.append(f"skipped {seen['empty']:,} {kind}")
    if seen["bytes"]:
        told.append(f"{seen['bytes']:,} not UTF-8")
    print(f"documents: {'; '.join(told)}")
    for line in how_cut(seen):
        print(f"  {line}")


# -------------------------------------------------------------------------------------------------------------- tokens


def sampled(spool: Spool, most: int) -> Iterator[str]:
    """Training texts from all over the corpus, at most `most` characters, without bytes that are no UTF-8."""
    stride = math.ceil(spool.chars["train", ""] / most)  # not the first documents alone: a corpus may be sorted
    left = most
    with contextlib.closing(spool.texts("train", "")) as texts:
        for text in islice(texts, 0, None, stride):
            yield text[:left].encode("utf-8", "ignore").decode()
            left -= len(text)
            if left <= 0:
                break


def likely_vocabulary(characters: int, most: int) -> int:
    """Tokens of a vocabulary that nobody names: a power of two, 512 at least, by the training text that there is."""
    return min(most, 1 << max(9, (characters // CHARACTERS_A_TOKEN).bit_length() - 1))


def text_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None, likely: int, min_frequency: int,
                   lowercase: bool) -> Tokenizer:
    """Train the tokenizer that the settings ask for; likely: tokens of a BPE where they name no vocab_size."""
    spec = {}
    if lowercase:
        spec["lowercase"] = True
        texts = (text.lower() for text in texts)
    if kind == "char":
        return train_char(texts, vocab_size, min_frequency, **spec)
    return train_bpe(texts, vocab_size or likely, exactly=vocab_size is not None, special=list(SPECIAL), **spec)


def load_text_tokenizer(source: str, lowercase: bool) -> Tokenizer:
    tokenizer = load_tokenizer(source)
    if lowercase:
        tokenizer.spec["lowercase"] = True
    if "eos" not in tokenizer.special:
        raise DataError(f"{source} has no eos, which ends every document: use one of this job, or gpt2")
    if tokenizer.spec.get("normalizer"):  # of Hugging Face's files, APEL-R's byte pairs among them
        note(f"{source} rewrites text before it cuts it, by its normalizer: tokens do not spell all of the text")
    return tokenizer


def batches(texts: Iterable[str], most: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """512 texts at a time, fewer if they are long."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == BATCH_DOCUMENTS or size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_tokens(path: Path, spool: Spool, split: str, tokenizer: Tokenizer, threads: int, most: int | None = None
                 ) -> dict:
    """All documents of a split in one stream, each followed by eos; returns {tokens, documents, bytes}.

    most: the stream ends before the document that would make it longer than so many tokens.
    Says how many tokens are unk: tokenizers of others have no token for some characters.
    """
    sizes = {"tokens": 0, "documents": 0, "bytes": 0}
    unk, unknown = tokenizer.special.get("unk", -1), 0
    eos, dtype = tokenizer.special["eos"], stream_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "wb"))
        texts = stack.enter_context(contextlib.closing(spool.texts(split, "")))
        what = f"encoding the {'training' if split == 'train' else 'validation'} text"
        work = stack.enter_context(bar(None, what, spool.counts[split, ""], "documents"))
        for batch in batches(texts):
            flat = []
            fits = 0  # documents of the batch
            for row in tokenizer.encode_batch(batch, threads):
                if most and sizes["tokens"] + len(flat) + len(row) + 1 > most:
                    break
                flat += row
                flat.append(eos)
                fits += 1
            if not flat:
                break
            full = fits < len(batch)
            batch = batch[:fits]
            ids = np.array(flat, np.int64)
            # A tokenizer.json of others may claim fewer tokens than it gives.
            if not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise DataError(f"the tokenizer gives the token {ids.max()}, but vocab_size = {tokenizer.vocab_size}")
            file.write(ids.astype(dtype))
            unknown += int((ids == unk).sum())
            sizes["tokens"] += len(ids)
            sizes["documents"] += len(batch)
            sizes["bytes"] += sum(map(size_of, batch))
            work.update(len(batch))
            if full:
                break
    if not sizes["tokens"]:
        setting, kind = ("max_tokens", "training") if split == "train" else ("max_val_tokens", "validation")
        raise DataError(f"{setting} = {most:,}: the first document of {kind} has more tokens; allow more")
    if unknown:
        note(f"{unknown:,} of {sizes['tokens']:,} tokens of the {split} text are unk: characters that the tokenizer "
             "has no token for, which are lost")
    return sizes


def prepare_text(
    *,
    input: str = "",
    text_column: str = "text",
    max_bytes: int | None = None,
    max_documents: int | None = None,
    val_fraction: float = 0.05,
    val_input: str = "",
    min_chars: int = 0,
    whole_files: bool = False,
    max_tokens: int | None = None,
    max_val_tokens: int | None = None,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    min_frequency: int = 1,
    lowercase: bool = False,
    tokenizer_chars: int = 20_000_000,
    out_dir: str = "data/text",
    seed: int = 1337,
    threads: int = 0,
) -> dict:
    """Documents -> train.bin, val.bin, tokenizer.json, meta.json. Returns what meta.json says."""
    threads = threads or os.cpu_count() or 1
    trains = tokenizer in ("char", "bpe")
    # A tokenizer that cannot be read is found before all documents are.
    encoder = None if trains else load_text_tokenizer(tokenizer, lowercase)
    with Workshop(out_dir) as shop, contextlib.closing(Spool(shop.folder)) as spool:
        reading = Reading(text_column, max_bytes, max_documents, val_fraction, min_chars, whole_files)
        gather_text(input, val_input, reading, seed, spool)
        if trains:
            characters = min(tokenizer_chars, spool.chars["train", ""])
            likely = likely_vocabulary(characters, MOST_VOCABULARY) if input else OFFLINE_VOCABULARY
            with doing(f"training a tokenizer on {characters:,} characters"):
                texts = sampled(spool, tokenizer_chars)
                encoder = text_tokenizer(tokenizer, texts, vocab_size, likely, min_frequency, lowercase)
        encoder.save(shop.folder / "tokenizer.json")
        sizes = {}
        for split, most in (("train", max_tokens), ("val", max_val_tokens)):
            sizes[split] = write_tokens(shop.folder / f"{split}.bin", spool, split, encoder, threads, most)
        with doing(f"taking checksums of {out_dir}"):
            meta = write_meta(
                shop.folder,
                "text",
                encoder.vocab_size,
                encoder.special,
                sizes,
                ["tokenizer.json", "train.bin", "val.bin"],
                tokenizer="tokenizer.json",
                tokenizer_hash=encoder.hash(),
                source=input or f"documentation of Python {platform.python_version()}",
                seed=seed,
            )
        shop.finish("tokenizer.json", "train.bin", "val.bin", "meta.json")
    print(f"tokens: {meta['train_tokens']:,} for training, {meta['val_tokens']:,} for validation, of "
          f"{meta['val_bytes'] / meta['val_tokens']:.2f} bytes each")
    print(f"written to {out_dir}; vocabulary of {encoder.vocab_size:,} ({encoder.kind})")
    return meta
