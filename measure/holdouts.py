"""One cell type left out at a time: how well each is predicted that was never seen perturbed, and what that is worth.

A run counts once, for the cell type that it held out; its numbers are means over the conditions of that type. Runs of
several seeds are averaged by type, and the mean over types gives each type the same weight. The types are of one data
set and train each other's models, so their spread is no error of that mean: it is told, and no interval made of it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from textwrap import shorten

from common.checkpoint import NO_SETTINGS
from measure.figures import COLOURS, GREY, figure, legend_below
from measure.pages import Cell, Section
from measure.sweeps import in_columns
from sources.outcomes import NUMBER, TABLE, TEXTS, check, read_object
from sources.shared import counted
from sources.sweeps import digest

DELTA = "Pearson delta"
ENERGY = "energy distance"
METRICS = {DELTA: "pearson_delta", ENERGY: "energy_distance"}
BETTER = {DELTA: "more", ENERGY: "less"}
SHORT = {DELTA: "delta", ENERGY: "energy"}  # of further columns
RIVAL = "perturbation mean"  # what is known without a model: the mean effect on the types that train
CAPTION = "Rings: the mean effect on the other types. Small dots: the model, one a seed; large ones: their mean."
APART = (*NO_SETTINGS, "toml_config_path", "seed")  # settings in which the runs of one study differ

Number = float | None  # None is undefined


@dataclass
class HeldOut:
    """A run: the cell type that it held out, its seed, what it came to, and what it shares with those of its study.

    files: of the cells that it held out. settings: {name: text} of its other settings, its script and all its cells.
    """

    cell_type: str
    seed: int | None
    files: list[str]
    model: dict[str, Number]  # by METRICS
    rival: dict[str, Number]
    settings: dict[str, str]


def study_sections(runs: list[Path], out: Path) -> tuple[list[Section], list[str]]:
    """(sections of a page, lines for a terminal) of runs of train_state.py that held out one cell type each.

    Neither, where a run is not that, or all are of one type. Runs of other settings, cells or scripts are a section of
    their own. The pictures go to out/plots.
    """
    studies = {}
    for folder in runs:
        run = read_run(folder)
        if run is None:
            return [], []
        key = json.dumps(run.settings, sort_keys=True)
        studies.setdefault(key, []).append(run)
    studies = list(studies.values())
    if all(len(by_type(study)) == 1 for study in studies):
        return [], []
    sections, lines = [], []
    for number, study in enumerate(studies):
        title = ", ".join(["Each cell type held out", *what_differs(study, studies)])
        rows = readable(table(study))
        sentence = in_words(study)
        name = f"holdouts_{number}" if number else "holdouts"
        draw(out, name, study)
        picture = out / "plots" / f"{name}.png"
        sections.append(Section(title, [sentence], [rows], [(picture, CAPTION)]))
        lines += [f"{title}:", *as_text(rows), sentence, ""]
    return sections, lines


def read_run(folder: Path) -> HeldOut | None:
    """A run by the files in its folder; None if it is none that tested a single cell type."""
    try:
        settings, results, summary = [
            read_object(folder / name)
            for name in ("config.json", "results.json", "summary.json")
        ]
        copies = filter(Path.is_file, sorted(folder.glob("*.py")))
        scripts = [path.read_text(encoding="utf-8", errors="replace") for path in copies]
        conditions = results["model"]["per_condition"]
        (cell_type,) = {record["cell_type"] for record in conditions}
        files = sorted({record["file"] for record in conditions})
        numbers = []
        for who in ("model", "perturbation_mean"):
            means = results[who]["mean"]
            check(means, dict.fromkeys(METRICS.values(), NUMBER), "results.json")
            numbers.append({title: means.get(metric) for title, metric in METRICS.items()})
        check(summary, {"data": TABLE}, "summary.json")
        tasks = (summary.get("data") or {}).values()
        check(settings, {"seed": NUMBER}, "config.json")
        named = TEXTS.holds([cell_type, *files, *tasks])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not whole, or of something else
    if not named:
        return None
    # Of the cells alone, as sources.cells.Cells.task has it: who trains is another thing in each run.
    cells = [task.split("-")[0] for task in tasks if "-" in task]  # none of runs of before
    others = {"cells": " ".join(cells), "script": digest("".join(scripts))}
    for name, value in settings.items():
        if name not in APART:
            others[name] = json.dumps(value)
    return HeldOut(cell_type, settings.get("seed"), files, *numbers, others)


def what_differs(study: list[HeldOut], studies: list[list[HeldOut]]) -> list[str]:
    """name = value of what the runs of a study share, and the studies differ in."""
    texts = []
    for name, value in study[0].settings.items():
        values = {other[0].settings.get(name) for other in studies}
        if len(values) > 1:
            if name == "cells":
                files = {file for run in study for file in run.files}
                value = f"{', '.join(sorted(files))} ({value[:6]})"
            texts.append(f"{name} = {value}")
    return texts


# ---------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------
def by_type(study: list[HeldOut]) -> dict[str, list[HeldOut]]:
    """The runs of each cell type, by its name."""
    types = {}
    for run in sorted(study, key=lambda run: run.cell_type):
        types.setdefault(run.cell_type, []).append(run)
    return types


def mean_of(values: list[Number]) -> Number:
    """The mean of the values that are defined; None of none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def spread_of(values: list[Number]) -> Number:
    """The standard deviation of the values that are defined; None of one or none."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 else None


def pairs(study: list[HeldOut], metric: str) -> list[tuple[float, float]]:
    """(model, rival), means over seeds, for each type for which both have this metric."""
    found = []
    for runs in by_type(study).values():
        model = mean_of([run.model[metric] for run in runs])
        rival = mean_of([run.rival[metric] for run in runs])
        if None not in (model, rival):
            found.append((model, rival))
    return found


def table(study: list[HeldOut]) -> list[dict]:
    """A row for each cell type, and one of the means over the types for which model and rival both have the metric."""
    types = by_type(study)
    several = any(len(runs) > 1 for runs in types.values())  # of one seed there is no spread
    rows = []
    for cell_type, runs in types.items():
        row = {"held out": cell_type, "seeds": len(runs)}
        for metric in METRICS:
            values = [run.model[metric] for run in runs]
            row[metric] = mean_of(values)
            if several:
                row[f"{SHORT[metric]}, sd"] = spread_of(values)
            row[f"{SHORT[metric]}, {RIVAL}"] = mean_of([run.rival[metric] for run in runs])
        rows.append(row)
    last = {"held out": "mean", "seeds": None}
    for metric in METRICS:
        both = pairs(study, metric)
        last[metric] = mean_of([model for model, _ in both])
        if several:
            last[f"{SHORT[metric]}, sd"] = spread_of_seeds(study, metric)
        last[f"{SHORT[metric]}, {RIVAL}"] = mean_of([rival for _, rival in both])
    return [*rows, last]


def spread_of_seeds(study: list[HeldOut], metric: str) -> Number:
    """The standard deviation over seeds of the mean over types; None unless two seeds or more have all the types."""
    types = by_type(study)
    seeds = {}
    for run in study:
        seeds.setdefault(run.seed, {})[run.cell_type] = run.model[metric]
    means = []
    for values in seeds.values():
        if len(values) == len(types) and None not in values.values():
            means.append(fmean(values.values()))
    return spread_of(means)


def in_words(study: list[HeldOut]) -> str:
    """What the study comes to."""
    gains = [model - rival for model, rival in pairs(study, DELTA)]
    if not gains:
        return f"No type has a Pearson delta of the model and of the {RIVAL}: there is nothing to compare."
    better = sum(gain > 0 for gain in gains)
    spread = ""
    if len(gains) > 1:
        spread = f" (standard deviation over types {stdev(gains):.3f})"
    counts = [len(runs) for runs in by_type(study).values()]
    seeds = counted(max(counts), "seed")
    if min(counts) < max(counts):
        seeds = f"up to {seeds}"
    gain = fmean(gains)
    side = "above" if gain > 0 else "below"
    return (
        f"Pearson delta of the model is {abs(gain):.3f} {side} that of the {RIVAL}{spread}, the mean over "
        f"{counted(len(gains), 'held-out cell type')} with {seeds} each; it is better on "
        f"{better} of {len(gains)}. The types train each other's models: they are no independent repetitions."
    )


# ---------------------------------------------------------------------------------------------------------------
# To be read
# ---------------------------------------------------------------------------------------------------------------
def readable(rows: list[dict]) -> list[dict]:
    """Rows of `table` for people: a mean and its standard deviation in one cell, as in 0.862 ± 0.006."""
    shown = []
    for row in rows:
        cells = {"held out": row["held out"], "seeds": row["seeds"]}
        for metric, short in SHORT.items():
            spread = row.get(f"{short}, sd")
            more = ""
            if spread is not None:
                more = f" ± {spread:.3f}"
            cells[metric] = cell(row[metric], more)
            rival = f"{short}, {RIVAL}"
            cells[rival] = cell(row[rival])
        shown.append(cells)
    return shown


def cell(value: Number, more: str = "") -> Cell | None:
    """A number with three digits behind the point, sorted by its value; None is blank."""
    if value is None:
        return None
    return Cell(f"{value:.3f}{more}", str(value), True)


def as_text(rows: list[dict]) -> list[str]:
    """The lines of a readable table; None is blank."""
    texts = [list(rows[0])]
    for row in rows:
        texts.append([text_of(value) for value in row.values()])
    return in_columns(texts)


def text_of(value: Cell | str | int | None) -> str:
    if isinstance(value, Cell):
        return value.text
    if value is None:
        return ""
    return str(value)


def draw(out: Path, name: str, study: list[HeldOut]) -> None:
    """plots/NAME.png: a line for each type, a panel for each metric."""
    types = by_type(study)
    places = range(len(types))
    height = 1.5 + 0.3 * len(types)
    with figure(out, name, 8, height, 1, len(METRICS), sharey=True) as axes:
        for panel, metric in zip(axes, METRICS, strict=True):
            means, rivals = [], []
            for place, runs in enumerate(types.values()):
                values = drawn([run.model[metric] for run in runs])
                panel.plot(values, [place] * len(runs), ".", color=COLOURS[0], markersize=4)
                means.append(mean_of([run.model[metric] for run in runs]))
                rivals.append(mean_of([run.rival[metric] for run in runs]))
            ring = {"color": GREY, "markersize": 8, "markerfacecolor": "none", "label": RIVAL}
            dot = {"color": COLOURS[0], "markersize": 5, "label": "model"}
            panel.plot(drawn(rivals), places, "o", **ring)
            panel.plot(drawn(means), places, "o", **dot)
            panel.set_xlabel(f"{metric} ({BETTER[metric]} is better)")
        axes[0].set_yticks(places, [shorten(name, 30, placeholder=" ...") for name in types])
        axes[0].set_ylim(len(types) - 0.5, -0.5)  # the first on top
        legend_below(axes[0].figure, *axes[0].get_legend_handles_labels())


def drawn(values: list[Number]) -> list[float]:
    """What is undefined is not drawn."""
    numbers = []
    for value in values:
        numbers.append(math.nan if value is None else value)
    return numbers
