"""Files of text: which of a folder are read, how they are packed, and what their bytes mean."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from common.errors import DataError, regular_file
from sources.shared import counted

KINDS = (".txt", ".json", ".jsonl", ".csv", ".parquet")  # in upper case too, and all but the last packed
PACKED = (".gz", ".bz2", ".xz")
MOST_CHARACTERS = 1 << 28  # of a line, or a file read whole: more is a quote that is not closed, or fills the memory
MOST_UNPACKED = 64  # characters for each byte of a file read whole, where that is more; text packs to a fifth
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # what damaged files raise
MARKS = (  # byte order marks and what they say; the first that fits counts, for UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
READ_BYTES = 1 << 16  # of a packed file, at once
HEAD_BYTES = 1 << 16  # looked at to tell UTF-16 that has no mark
NAMED_KINDS, NAMED = 6, 2  # kinds of skipped files that are told, and files of each that are named; others are counted


def kind_of(path: Path) -> str:
    """Its ending in lower case, without that of a compression: .jsonl of Papers.JSONL.gz; "" for none of KINDS."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = bool(endings) and endings[-1] in PACKED
    if packed:
        endings.pop()
    kind = endings[-1] if endings else ""
    readable = kind in KINDS and not (packed and kind == ".parquet")  # which is read at random, and packs by itself
    return kind if readable else ""


def text_files(path: Path) -> list[Path]:
    """A file, or those of a folder that can be read, sorted; says which others it has.

    Hidden files are no data: a hidden folder may be this preparation's own. Raises DataError if none is left, and for a
    folder that may not be read: what is in it could not be counted.
    """
    if not path.is_dir():
        return [regular_file(path)]
    refuse_locked(path)
    files, skipped = [], []
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if file.is_dir() and not file.is_symlink():
            refuse_locked(file)
            continue
        if file.is_file() and kind_of(file) and not is_prepared(file):
            files.append(file)
        else:
            skipped.append(str(file.relative_to(path)))
    if not files:
        there = f"; there are {by_kind(skipped)}" if skipped else ""
        raise DataError(f"{path} holds no {', '.join(KINDS)} files, which may be packed as {', '.join(PACKED)}{there}")
    if skipped:
        print(f"{path}: {counted(len(files), 'file')} read, {len(skipped):,} skipped: {by_kind(skipped)}")
    return files


def refuse_locked(folder: Path) -> None:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"the folder {folder} may not be read: get the right to it, or leave it out")


def by_kind(names: list[str]) -> str:
    """How many files there are of each ending, with the names of some: "5 .log (a.log, b.log, ...), 1 .md (c.md)"."""
    kinds = {}
    for name in names:
        kinds.setdefault(Path(name).suffix.lower() or "without an ending", []).append(name)
    listed = sorted(kinds.items(), key=lambda item: -len(item[1]))
    parts = []
    for kind, here in listed[:NAMED_KINDS]:
        more = ", ..." if len(here) > NAMED else ""
        parts.append(f"{len(here):,} {kind} ({', '.join(here[:NAMED])}{more})")
    rest = listed[NAMED_KINDS:]
    if rest:
        parts.append(f"{sum(len(here) for _, here in rest):,} of {counted(len(rest), 'other kind')}")
    return ", ".join(parts)


def is_prepared(file: Path) -> bool:
    """Whether a .json is no text but what an earlier preparation wrote beside its tokens."""
    if file.name not in ("meta.json", "tokenizer.json"):
        return False
    return any((file.parent / name).exists() for name in ("train.bin", "train.h5"))


class Streams(io.RawIOBase):
    """The bytes of a file of one packed stream after another, as bzip2 and xz write them.

    Python's own readers take a damaged stream after the first for the end of the file.

    Args:
        file: what is packed. decompressor: makes one for each stream.
    """

    def __init__(self, file: BinaryIO, decompressor: Callable):
        self.file = file
        self.decompressor = decompressor
        self.stream = decompressor()
        self.rest = b""  # what follows the stream, as far as it is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while True:
            if self.stream.eof:
                self.rest = (self.stream.unused_data or self.rest).lstrip(b"\0") or self.file.read(READ_BYTES)
                if not self.rest:
                    return 0
                if not self.rest.strip(b"\0"):  # padding
                    continue
                self.stream = self.decompressor()
            elif self.stream.needs_input and not self.rest:
                self.rest = self.file.read(READ_BYTES)
                if not self.rest:
                    raise EOFError("it ends in the middle of a packed stream")
            packed, self.rest = self.rest, b""
            data = self.stream.decompress(packed, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def open_packed(path: Path) -> BinaryIO:
    """A file's bytes, unpacked as they are read."""
    packing = path.suffix.lower()
    if packing == ".gz":
        return gzip.open(path, "rb")
    if packing in (".bz2", ".xz"):
        decompressor = bz2.BZ2Decompressor if packing == ".bz2" else lzma.LZMADecompressor
        return io.BufferedReader(Streams(open(path, "rb"), decompressor), READ_BYTES)
    return open(path, "rb")


def lines_of(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file. Raises DataError for one without end, before it fills the memory."""
    while line := file.readline(MOST_CHARACTERS + 1):
        if len(line) > MOST_CHARACTERS:
            raise DataError(f"{path} has a line of more than {MOST_CHARACTERS:,} characters: put a document on a line")
        yield line


def read_whole(path: Path) -> str:
    """A file's text at once. Raises DataError for one that would fill the memory, as a small packed file can."""
    most = max(MOST_CHARACTERS, MOST_UNPACKED * path.stat().st_size)
    with open_text(path) as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise DataError(f"{path} unpacks to more than {most:,} characters, which is read at once: use .jsonl, with a "
                        "document a line")
    return text


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A file's text, unpacked, without its byte order mark; newline as open() takes it."""
    encoding = encoding_of(path)
    return io.TextIOWrapper(open_packed(path), encoding=encoding, newline=newline)


def encoding_of(path: Path) -> str:
    """UTF-8, or what the byte order mark says. Raises DataError for UTF-16 and UTF-32 without a mark."""
    with open_packed(path) as file:
        head = file.read(HEAD_BYTES)
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    # A letter of ASCII has a zero beside it there, always on the same side. Bytes of no text have zeros on both.
    few, many = sorted((head[0::2].count(0), head[1::2].count(0)))
    if many > 3 and many > len(head) / 100 and few < 0.7 * many:
        raise DataError(f"{path} seems to be UTF-16 or UTF-32 without a byte order mark: save it as UTF-8, or with the "
                        "mark")
    return "utf-8"


def utf8_blocks(path: Path, size: int) -> Iterator[bytes]:
    """A file's bytes, unpacked, without its byte order mark, `size` at once; UTF-16 and UTF-32 become UTF-8.

    What calls itself UTF-8, or nothing, need not be: its bytes stay as they are.
    """
    encoding = encoding_of(path)
    with open_packed(path) as file:
        if encoding == "utf-8-sig":
            file.read(len(codecs.BOM_UTF8))
        decoder = None if encoding.startswith("utf-8") else codecs.getincrementaldecoder(encoding)()
        while block := file.read(size):
            yield decoder.decode(block).encode() if decoder else block
        if decoder:
            decoder.decode(b"", final=True)  # raises ValueError for half a character
