"""What the runs of a sweep came to: a record of each, and a table with the best first."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

# What the runs of an experiment are compared by and what is shown beside; whether less of the first is better.
OBJECTIVES = {
    "ghmm": (["excess_loss", "loss"], True),
    "arxiv": (["val_xe"], True),
    "apelr": (["val_nll"], True),
    "state": (["pearson_delta", "mae"], False),
}
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
        text = (folder / "summary.json").read_text(encoding="utf-8")
        summary = json.loads(text)
        # What fits into a table; curves and the like stay in summary.json.
        told["summary"] = {key: value for key, value in summary.items() if not isinstance(value, dict | list)}
        if seconds is None:
            told["seconds"] = summary.get("seconds")
    else:
        try:
            text = (folder / "console.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = "its folder was removed while it was at work"
        lines = [line for line in text.split("\n") if line.strip()]
        told["last_lines"] = lines[-LAST_LINES:]
    return told


def append(path: Path, told: dict) -> None:
    """Add a line to sweep.jsonl, whole, where several processes do so at once."""
    with open(path, "ab") as file:  # appending, so that all is written behind what there is
        fcntl.flock(file, fcntl.LOCK_EX)  # a network's file system appends in one piece under a lock alone
        os.write(file.fileno(), (json.dumps(told) + "\n").encode())


def read(path: Path) -> dict[str, dict]:
    """{name of a run: its last line in sweep.jsonl}; lines that are none are passed over."""
    told = {}
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # torn by a full disk
                line = json.loads(text)
                told[line["run"]] = line
    return told


def in_words(told: dict, shown: list[str]) -> str:
    """What came of a run, by its record; shown: names in its summary."""
    if told["status"] == "done":
        results = [f"{name} {number(told['summary'].get(name))}" for name in shown]
        return ", ".join(results) or "done"
    # The last line is the error of a page that refuses, and that of Python's traceback.
    last = "it said nothing"
    if told["last_lines"]:
        last = told["last_lines"][-1]
    if told["status"] == "pruned":
        return "pruned: stopped early, for there was no hope for it"
    code = told["exit_code"]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"  # as when memory runs out
    return f"{told['status']} ({how}): {last}"


def number(value: Any) -> str:
    """A number of a summary; what is undefined there is none."""
    return f"{value:.6g}" if isinstance(value, float | int) else "-"


def table(told: list[dict], shown: list[str], less_is_better: bool) -> list[str]:
    """The lines of a table of the runs that are done, the best by shown[0] first; then a line of each other run."""
    rows = []
    for line in best_first(told, shown, less_is_better):
        row = list(line["settings"].values())
        for name in shown:
            row.append(number(line["summary"].get(name)))
        row.append(number(line["seconds"]))
        row.append(line["folder"])
        rows.append(row)
    lines = []
    if rows:
        rows.insert(0, [*told[0]["settings"], *shown, "seconds", "folder"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = map(str.ljust, row, widths)
            lines.append("  ".join(cells).rstrip())
    for line in told:
        if line["status"] != "done":
            lines.append(f"{line['run']}: {in_words(line, shown)}")
    return lines


def best_first(told: list[dict], shown: list[str], less_is_better: bool) -> list[dict]:
    """The runs that are done by their shown[0]; those that have no such number are last."""
    known, unknown = [], []
    for line in told:
        if line["status"] == "done":
            value = line["summary"].get(shown[0]) if shown else None
            group = known if isinstance(value, float | int) else unknown
            group.append(line)
    known.sort(key=lambda line: line["summary"][shown[0]], reverse=not less_is_better)
    return known + unknown
