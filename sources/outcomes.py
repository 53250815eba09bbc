"""What came of the runs of a sweep: sweep.jsonl, which has a line for each run that ended."""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from common import store

BOOK = "sweep.jsonl"
PARTS = {"run", "status", "exit_code", "seconds", "time", "settings"}  # that each of its lines has
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no settings or results")
    return value


def append(path: Path, told: dict) -> None:
    """Add a line to sweep.jsonl, whole, where several processes do so at once."""
    with open(path, "ab") as file:  # appending, so that all is written behind what there is
        store.flock(file)  # a network's file system appends in one piece under a lock alone
        os.write(file.fileno(), (json.dumps(told) + "\n").encode())


def read(path: Path) -> dict[str, dict]:
    """{name of a run: its last line in sweep.jsonl}; lines that are none are passed over."""
    told = {}
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, TypeError, AttributeError):  # torn by a full disk
                line = json.loads(text)
                if PARTS <= line.keys():
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
    if all(isinstance(value, float | int) for value in (excess, optimum)) and optimum:
        flat["excess_percent"] = 100 * excess / optimum
    return flat
