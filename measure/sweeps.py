"""What the runs of a sweep came to: a record of each, and a table with the best first."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# What the runs of an experiment are compared by and what is shown beside; whether less of the first is better.
OBJECTIVES = {
    "ghmm": (["excess_loss", "excess_percent", "loss", "r2_concat"], True),
    "arxiv": (["val_xe", "test_xe", "icl_gain"], True),
    "apelr": (["val_nll", "plan_gain", "parameters"], True),
    "state": (["pearson_delta", "mae", "baselines.perturbation_mean.pearson_delta"], False),
}
HEADS = {"baselines.perturbation_mean.pearson_delta": "perturbation_mean"}  # of columns, where the name is long
DIRECTIONS = {"min": True, "max": False}
SEED = "seed"  # the setting over which runs are averaged
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
        # What torchrun adds behind the error of a page says less than that.
        errors = [line for line in lines if line.startswith("error: ")]
        if errors and errors[-1] not in told["last_lines"]:
            told["last_lines"].append(errors[-1])
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
        summary = told["summary"]
        results = [f"{HEADS.get(name, name)} {number(summary[name])}" for name in shown if number(summary.get(name))]
        return ", ".join(results) or "done"
    if told["status"] == "stopped":
        return "stopped by a signal"
    # The last line is the error of a page that refuses, and that of Python's traceback.
    last = "it said nothing"
    if told["last_lines"]:
        last = told["last_lines"][-1]
    if told["status"] == "pruned":
        value = number(told.get("value"))
        place = f" at {shown[0]} {value}" if value and shown else ""
        return f"pruned{place}: no hope beside the median of the others"
    code = told["exit_code"]
    if code is None:  # of a run that another process has seen
        return f"{told['status']}: {last}"
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"  # as when memory runs out
    return f"{told['status']} ({how}): {last}"


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
    if excess is not None and optimum:
        flat["excess_percent"] = 100 * excess / optimum
    return flat


def objective(experiment: str, word: str = "") -> tuple[list[str], bool]:
    """(names of what runs are compared by and what is shown beside, whether less of the first is better).

    word: NAME of a number in summary.json, -NAME or max:NAME where more of it is better, "" for the experiment's own.
    """
    shown, less_is_better = OBJECTIVES.get(experiment, ([], True))
    if not word:
        return shown, less_is_better
    direction, colon, name = word.rpartition(":")
    name = name.removeprefix("-")
    if direction in DIRECTIONS and colon:
        less_is_better = DIRECTIONS[direction]
    elif word.startswith("-"):
        less_is_better = False
    elif name not in shown[:1]:
        less_is_better = True
    return [name, *(other for other in shown if other != name)], less_is_better


@dataclass
class Group:
    """Runs that differ in their seed alone. settings: {setting: value} of what they share."""

    settings: dict[str, str]
    runs: list[dict]  # lines of sweep.jsonl

    def values(self, name: str) -> list[float]:
        """What their summaries have under a name, where it is a number."""
        values = [run["summary"].get(name) for run in self.runs]
        return [value for value in values if isinstance(value, float | int)]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return fmean(values) if values else None

    def text(self, name: str) -> str:
        """Mean and, of several runs, the standard deviation over their seeds; of how many, where some have none."""
        values = self.values(name)
        text = number(self.mean(name))
        if len(values) > 1:
            text = with_spread(fmean(values), stdev(values))
        if 0 < len(values) < len(self.runs):
            text += f" ({len(values)} of {len(self.runs)})"
        return text


def with_spread(mean: float, spread: float) -> str:
    """A mean with two digits of its standard deviation, as in 0.0146 ± 0.0034."""
    if not 0 < spread < math.inf:
        return f"{number(mean)} ± {number(spread)}"
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def groups(told: list[dict], shown: list[str], less_is_better: bool) -> list[Group]:
    """The runs that are done, grouped by all settings but the seed, the best by shown[0] first.

    Those that have no such number are last.
    """
    found: dict[tuple, Group] = {}
    for line in told:
        if line["status"] == "done":
            settings = {name: value for name, value in line["settings"].items() if name != SEED}
            found.setdefault(tuple(settings.items()), Group(settings, [])).runs.append(line)
    known, unknown = [], []
    for group in found.values():
        is_known = shown and group.mean(shown[0]) is not None
        (known if is_known else unknown).append(group)
    known.sort(key=lambda group: group.mean(shown[0]), reverse=not less_is_better)
    return known + unknown


def number(value: Any) -> str:
    """A number of a summary, a whole one with all its digits; what is undefined there is blank."""
    if not isinstance(value, float | int):
        return ""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def table(told: list[dict], shown: list[str], less_is_better: bool) -> list[str]:
    """The lines of a table of the runs that are done, the best by shown[0] first; then a line of each other run.

    Runs that differ in their seed alone are one row. A column in which no run has anything is left out.
    """
    ranked = groups(told, shown, less_is_better)
    # Runs of a study need not have the same settings: a control has others than the sets of categories.
    settings = list({name: None for group in ranked for name in group.settings})
    seeds = [line["settings"][SEED] for line in told if SEED in line["settings"]]
    averaged = any(len(group.runs) > 1 for group in ranked)
    rows = [[*settings, *(["seeds" if averaged else SEED] if seeds else []),
             *(HEADS.get(name, name) for name in shown), "seconds", "folder"]]  # fmt: skip
    for group in ranked:
        row = [group.settings.get(name, "") for name in settings]
        if seeds:
            row.append(str(len(group.runs)) if averaged else group.runs[0]["settings"][SEED])
        row += [group.text(name) for name in shown]
        row.append(number(mean_seconds(group)))
        row.append(group.runs[0]["folder"] if len(group.runs) == 1 else "")
        rows.append(row)
    # A column without a text, such as that of folders where all runs are averaged, is left out.
    filled = [any(column[1:]) for column in zip(*rows, strict=True)]
    lines = in_columns([list(itertools.compress(row, filled)) for row in rows]) if ranked else []
    for line in told:
        if line["status"] != "done":
            lines.append(f"{line['run']}: {in_words(line, shown)}")
    return lines


def mean_seconds(group: Group) -> float | None:
    seconds = [run["seconds"] for run in group.runs if run["seconds"] is not None]
    return round(fmean(seconds), 1) if seconds else None


def in_columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return lines
