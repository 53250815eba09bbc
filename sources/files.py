"""Files of text: which of a folder are read, how they are packed, and what their bytes mean."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from common.errors import DataError
from sources.shared import counted

KINDS = (".txt", ".json", ".jsonl", ".csv", ".parquet")  # in upper case too, and all but the last packed
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # what damaged files raise
MARKS = (  # byte order marks and what they say; the first that fits counts, for UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HEAD_BYTES = 1 << 16  # looked at to tell UTF-16 that has no mark
NAMED = 5  # skipped files that are named; the others are counted


def kind_of(path: Path) -> str:
    """Its ending in lower case, without that of a compression: .jsonl of Papers.JSONL.gz; "" for none of KINDS."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = bool(endings) and endings[-1] in OPENERS
    if packed:
        endings.pop()
    kind = endings[-1] if endings else ""
    readable = kind in KINDS and not (packed and kind == ".parquet")  # which is read at random, and packs by itself
    return kind if readable else ""


def text_files(path: Path) -> list[Path]:
    """A file, or those of a folder that can be read, sorted; says which others it has.

    Hidden files are no data: a hidden folder may be this preparation's own. Raises DataError if none is left.
    """
    if not path.is_dir():
        return [path]
    files, skipped = [], []
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if file.is_dir() and not file.is_symlink():
            continue
        if file.is_file() and kind_of(file) and not is_prepared(file):
            files.append(file)
        else:
            skipped.append(str(file.relative_to(path)))
    kinds = ", ".join(KINDS)
    if not files:
        raise DataError(f"{path} holds no {kinds} files; they may be packed as {', '.join(OPENERS)}")
    if skipped:
        more = f" and {len(skipped) - NAMED:,} more" if len(skipped) > NAMED else ""
        print(f"{path}: {counted(len(files), 'file')} read, {len(skipped):,} skipped as no documents ({kinds} are): "
              f"{', '.join(skipped[:NAMED])}{more}")
    return files


def is_prepared(file: Path) -> bool:
    """Whether a .json is no text but what an earlier preparation wrote beside its tokens."""
    if file.name not in ("meta.json", "tokenizer.json"):
        return False
    return any((file.parent / name).exists() for name in ("train.bin", "train.h5"))


def open_packed(path: Path) -> BinaryIO:
    """A file's bytes, unpacked."""
    opener = OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rb")


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
