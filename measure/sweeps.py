"""What the runs of a sweep came to, in words and as a table with the best first."""

import itertools
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from sources.outcomes import is_number
from sources.shared import closest

# What the runs of an experiment are compared by and what is shown beside; whether less of the first is better.
OBJECTIVES = {
    "ghmm": (["excess_loss", "excess_percent", "loss", "r2_concat"], True),
    "arxiv": (["val_xe", "test_xe", "icl_gain"], True),
    "apelr": (["val_nll", "plan_gain", "parameters"], True),
    "state": (["pearson_delta", "mae", "baselines.perturbation_mean.pearson_delta"], False),
}
HEADS = {"baselines.perturbation_mean.pearson_delta": "perturbation_mean"}  # of columns, where the name is long
# What says what is to be learned: settings, words of a study, and the optimum that a problem of other parameters has.
PROBLEMS = ("process", "components", "matrices", "data", "validation_data", "categories", "final_split", "held_out",
            "toml_config_path", "pert_col", "control_pert", "output_space", "counts")  # fmt: skip
OPTIMUM = "optimal_loss"
SAME_OPTIMUM = 1e-3  # of it
DIRECTIONS = {"min": True, "max": False}
WIDTH = 100  # of a terminal that nobody knows
SEED = "seed"  # the setting over which runs are averaged


def in_words(told: dict, shown: list[str]) -> str:
    """What came of a run, by its record; shown: names in its summary."""
    if told["status"] == "done":
        results = []
        for name in shown:
            value = number(told["summary"].get(name))
            if value:
                head = HEADS.get(name, name)
                results.append(f"{head} {value}")
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
    others = [other for other in shown if other != name]
    return [name, *others], less_is_better


@dataclass
class Group:
    """Runs that differ in their seed alone. settings: {setting: value} of what they share."""

    settings: dict[str, str]
    runs: list[dict]  # lines of sweep.jsonl

    def values(self, name: str) -> list[float]:
        """What their summaries have under a name, where it is a number."""
        values = [run["summary"].get(name) for run in self.runs]
        return [value for value in values if number(value)]

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

    Those that have no such number are last. Groups that learn different things stay in the order of their runs.
    """
    found: dict[tuple, Group] = {}
    for line in told:
        if line["status"] == "done":
            settings = {name: value for name, value in line["settings"].items() if name != SEED}
            found.setdefault(tuple(settings.items()), Group(settings, [])).runs.append(line)
    if problems(found.values()):
        return list(found.values())
    known, unknown = [], []
    for group in found.values():
        if shown and group.mean(shown[0]) is not None:
            known.append(group)
        else:
            unknown.append(group)
    known.sort(key=lambda group: group.mean(shown[0]), reverse=not less_is_better)
    return known + unknown


def problems(found: Collection[Group]) -> list[str]:
    """In what groups differ that says what is to be learned: a result then tells how hard each is, and none is best."""
    if len(found) < 2:
        return []
    settings = {name for group in found for name in group.settings}
    apart = [name for name in PROBLEMS if name in settings]
    optima = [group.mean(OPTIMUM) for group in found if group.values(OPTIMUM)]
    if not apart and optima and max(optima) - min(optima) > SAME_OPTIMUM * abs(max(optima)):
        apart = [OPTIMUM]
    return apart


def number(value: Any) -> str:
    """A number of a summary, a whole one with all its digits; what is undefined there is blank."""
    if not is_number(value):
        return ""
    is_whole = float(value).is_integer() and abs(value) < 1e15
    return f"{value:.0f}" if is_whole else f"{value:.6g}"


def table(told: list[dict], shown: list[str], less_is_better: bool) -> list[str]:
    """The lines of a table of the runs that are done, the best by shown[0] first; then a line of each other run.

    Runs that differ in their seed alone are one row. A column in which no run has anything is left out.
    """
    ranked = groups(told, shown, less_is_better)
    # Runs of a study need not have the same settings: a control has others than the sets of categories.
    settings = {}
    for group in ranked:
        settings |= dict.fromkeys(group.settings)
    seeds = [line["settings"][SEED] for line in told if SEED in line["settings"]]
    averaged = any(len(group.runs) > 1 for group in ranked)
    head = list(settings)
    if seeds:
        head.append("seeds" if averaged else SEED)
    head += [HEADS.get(name, name) for name in shown]
    rows = [[*head, "seconds", "folder"]]
    for group in ranked:
        row = [group.settings.get(name, "") for name in settings]
        if seeds:
            seed = group.runs[0]["settings"].get(SEED, "")
            row.append(str(len(group.runs)) if averaged else seed)
        row += [group.text(name) for name in shown]
        row.append(number(mean_seconds(group)))
        row.append(group.runs[0]["folder"] if len(group.runs) == 1 else "")
        rows.append(row)
    # A column without a text, such as that of folders where all runs are averaged, is left out.
    filled = [any(column[1:]) for column in zip(*rows, strict=True)]
    rows = [list(itertools.compress(row, filled)) for row in rows]
    lines = in_columns(rows) if ranked else []
    if filled[-1] and max(map(len, lines), default=0) > shutil.get_terminal_size((WIDTH, 24)).columns:
        lines = in_columns([row[:-1] for row in rows])  # a folder is called by its settings
    for line in told:
        if line["status"] != "done":
            lines.append(f"{line['run']}: {in_words(line, shown)}")
    return lines


def sorted_table(told: list[dict], shown: list[str], less_is_better: bool) -> tuple[list[str], str]:
    """(the lines of a table below what it is sorted by, a note where no run has that number or "")."""
    lines = table(told, shown, less_is_better)
    done = [line["summary"] for line in told if line["status"] == "done"]
    if not shown or not done:
        return lines, ""
    first = shown[0]
    known = set().union(*done)
    if first not in known:
        return lines, f"{first} is no number in summary.json{closest(first, known)}"
    apart = problems(groups(told, shown, less_is_better))
    if apart:
        order = f"of different {', '.join(apart)}, none the best"
    else:
        name = HEADS.get(first, first)
        better = "less" if less_is_better else "more"
        order = f"by {name}, of which {better} is better"
    return [f"\n{order}:", *lines], ""


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
