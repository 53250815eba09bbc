"""What came of the runs of a sweep: sweep.jsonl, which has a line for each run that ended."""

import contextlib
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from common import store
from common.errors import DataError
from common.runlog import parse_json, read_json

BOOK = "sweep.jsonl"
PARTS = {"run", "status", "exit_code", "seconds", "time", "settings"}  # that each of its lines has
STATES = ("done", "failed", "stopped", "pruned")
RANK_ERROR = re.compile(r"\[rank\d+\]: (\w[\w.]*(?:Error|Exception)\b.*)")  # as torch.distributed has it
LAST_LINES = 5  # of the console of a run that failed


def record(folder: Path, values: dict[str, str], status: str, code: int | None, seconds: float | None) -> dict:
    """A line of sweep.jsonl: what differs, what came out, and the last lines of a run that is not done.

    Args:
        values: {setting: value} of what differs between the runs.
        status: done, failed, stopped or pruned. code: of the exit, None of a run that had ended before. seconds: of its
            process, or None for what its summary says.
    """
    told = {
        "run": folder.name,
        "status": status,
        "exit_code": code,
        "seconds": seconds,
        "time": time.time(),  # for people: nothing is decided by it, for clocks of two machines differ
        "folder": str(folder),
        "settings": values,
    }
    if status == "done":
        summary = read_object(folder / "summary.json")
        told["summary"] = numbers(summary)
        if seconds is None:
            told["seconds"] = summary.get("seconds")
    else:
        try:
            text = (folder / "console.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = "its folder was removed while it was at work"
        lines = [line for line in text.split("\n") if line.strip()]
        told["last_lines"] = lines[-LAST_LINES:]
        # What torchrun adds behind the error of a page, or of Python, says less than that.
        errors = [line for line in lines if line.startswith("error: ")]
        errors = errors or [match[1] for line in lines if (match := RANK_ERROR.match(line))]
        if errors and errors[-1] not in told["last_lines"]:
            told["last_lines"].append(errors[-1])
    return told


def read_object(path: Path) -> dict:
    """What a JSON file holds. Raises ValueError if that is no object, OSError if it cannot be read."""
    try:
        return read_json(path)
    except DataError:  # which names the file already
        raise
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. true is none, and neither is an integer that no float can hold."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


class Kind(NamedTuple):
    """What a value of a file must be: as a refusal says it, and the test."""

    name: str
    holds: Callable[[Any], bool]


NUMBER = Kind("number", is_number)
COUNT = Kind("number of at least 0", lambda value: is_number(value) and value >= 0)
NUMBERS = Kind("list of numbers", lambda value: isinstance(value, list) and all(map(is_number, value)))
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind("list of texts", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value))
TABLE = Kind("table", lambda value: isinstance(value, dict))


def check(table: dict, kinds: dict[str, Kind], where: str, needed: Collection[str] = ()) -> None:
    """Raise ValueError where a value of a table is not what it must be; None, and what is absent, are, unless needed.
    """
    for name, kind in kinds.items():
        value = table.get(name)
        if value is None and name not in needed:
            continue
        if not kind.holds(value):
            text = textwrap.shorten(repr(value), 60, placeholder=" ...")
            raise ValueError(f"{where} says {name} = {text}, which is no {kind.name}")


# Of the lines of sweep.jsonl.
KINDS = {
    "run": TEXT,
    "status": Kind(f"one of {', '.join(STATES)}", lambda value: value in STATES),
    "exit_code": Kind("exit code", lambda value: type(value) is int),
    "seconds": COUNT,
    "time": COUNT,
    "settings": Kind("table of texts", lambda value: TABLE.holds(value) and TEXTS.holds([*value.values()])),
    "summary": TABLE,
    "last_lines": TEXTS,
    "value": NUMBER,
}  # fmt: skip


def append(path: Path, told: dict) -> None:
    """Add a line to sweep.jsonl, whole, where several processes do so at once."""
    with open(path, "ab") as file:  # appending, so that all is written behind what there is
        store.flock(file)  # a network's file system appends in one piece under a lock alone
        os.write(file.fileno(), (json.dumps(told) + "\n").encode())


def read(path: Path) -> dict[str, dict]:
    """{name of a run: its last line in sweep.jsonl}; lines that are none are passed over."""
    told = {}
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):  # torn by a full disk
                line = parse_json(text)
                if PARTS <= line.keys():
                    check(line, KINDS, BOOK, ("run", "status", "settings"))
                    told[line["run"]] = line
    return told


def numbers(summary: dict, above: str = "") -> dict[str, Any]:
    """What fits into a table, {dotted name: value}; curves and the like stay in summary.json.

    excess_percent is excess_loss in percent of optimal_loss: processes differ in what there is to lose.
    """
    flat = {}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= numbers(value, f"{above}{key}.")
        elif not isinstance(value, list):
            flat[above + key] = value
    excess, optimum = flat.get("excess_loss"), flat.get("optimal_loss")
    if is_number(excess) and is_number(optimum) and optimum:
        flat["excess_percent"] = 100 * excess / optimum
    return flat
