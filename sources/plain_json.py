"""JSON of anybody, read so that whatever is wrong with it is a sentence."""

import json
from pathlib import Path

from common.errors import DataError, regular_file

MOST_BYTES = 1 << 30  # of a file that describes others: the largest tokenizers have a fiftieth of that


def read_json(path: str | Path) -> dict:
    """The object that a JSON file holds, a byte order mark or not before it.

    Raises DataError for a file that is missing, none, empty, too large, not UTF-8, damaged, nested too deeply or no
    object, for a key that comes twice, of which one would be lost, and for numbers that are none.
    """
    path = regular_file(path)
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes, which is too large for what it should describe")
    try:
        value = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=once, parse_constant=no_number)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{path} is damaged, or no JSON: {in_words(error)}; copy or make it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged or foreign: it holds no object, but {type(value).__name__}")
    return value


def once(pairs: list[tuple]) -> dict:
    """An object of JSON; raises ValueError for a key that comes twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} comes twice")
    return table


def no_number(name: str):
    raise ValueError(f"{name} is no number")


def in_words(error: BaseException) -> str:
    """What Python says of JSON that it cannot read."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not UTF-8"
    return str(error).split("; use sys.")[0] or "it does not fit in memory"  # of a number of thousands of digits
