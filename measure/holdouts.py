"""One cell type left out at a time: how well each is predicted that was never seen perturbed, and what that is worth.

A run counts once for the cell type that it held out; its numbers are means over the conditions of that type. Runs of
several seeds are averaged by type, and the mean over types gives each type the same weight. The types are of one data
set and learn from one another, so their spread is no error of that mean: it is told, and no interval is made of it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from common.checkpoint import NO_SETTINGS
from measure.figures import figure
from measure.pages import Section
from sources.shared import counted

RIVAL = "perturbation_mean"  # what is known without a model: the mean effect on the types that train
METRICS = {"pearson_delta": "Pearson delta", "energy_distance": "energy distance"}
CAPTION = "Rings: the mean effect on the other types. Dots: the model, a small one a seed, a large one their mean."
APART = (*NO_SETTINGS, "toml_config_path", "seed")  # what runs of one study differ in


@dataclass
class HeldOut:
    """A run: the type it held out, its seed, {metric: value or None} of the model and of the rival, other settings."""

    cell_type: str
    seed: int
    model: dict[str, float | None]
    rival: dict[str, float | None]
    settings: dict[str, str]


def study_sections(runs: list[Path], out: Path) -> tuple[list[Section], list[str]]:
    """(sections of a page, lines for a terminal) of runs of train_state.py that held out one cell type each.

    Neither, where they are not that or are all of one type. The picture goes to out/plots. Runs of different settings
    are kept apart: a section each.
    """
    studies = {}
    for folder in runs:
        held_out = read_run(folder)
        if held_out is None:
            return [], []
        studies.setdefault(json.dumps(held_out.settings, sort_keys=True), []).append(held_out)
    if not any(len({run.cell_type for run in study}) > 1 for study in studies.values()):
        return [], []
    sections, lines = [], []
    for number, study in enumerate(studies.values()):
        title = ", ".join(["Each cell type held out", *what_differs(study[0], studies.values())])
        rows, sentence = table(study)
        name = f"holdouts_{number}" if number else "holdouts"
        draw(out, name, study)
        picture = out / "plots" / f"{name}.png"
        sections.append(Section(title, [sentence], [rows], [(picture, CAPTION)]))
        lines += [f"{title}:", *in_columns(rows), sentence, ""]
    return sections, lines


def read_run(folder: Path) -> HeldOut | None:
    """A run by the files in its folder; None if it is not one that tested a single cell type."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        (cell_type,) = {record["cell_type"] for record in results["model"]["per_condition"]}
        model = dict(results["model"]["mean"])
        rival = dict(results[RIVAL]["mean"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not whole, or none of these
    others = {name: json.dumps(value) for name, value in settings.items() if name not in APART}
    return HeldOut(cell_type, settings.get("seed"), model, rival, others)


def what_differs(run: HeldOut, studies) -> list[str]:
    """name = value of the settings of a run in which studies differ."""
    texts = []
    for name, value in run.settings.items():
        if any(other.settings.get(name) != value for study in studies for other in study):
            texts.append(f"{name} = {value}")
    return texts


# ---------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------
def by_type(study: list[HeldOut]) -> dict[str, list[HeldOut]]:
    """The runs of each cell type, by name."""
    types = {}
    for run in sorted(study, key=lambda run: run.cell_type):
        types.setdefault(run.cell_type, []).append(run)
    return types


def mean_of(values: list[float | None]) -> float | None:
    """The mean of the values that are defined; None of none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def table(study: list[HeldOut]) -> tuple[list[dict], str]:
    """(a row for each cell type and one of their means, a sentence about Pearson delta).

    The last row is over the types for which model and rival both have the figure, by metric.
    """
    rows = []
    for cell_type, runs in by_type(study).items():
        row = {"held out": cell_type, "seeds": len(runs)}
        for metric, title in METRICS.items():
            values = [run.model.get(metric) for run in runs]
            row[title] = mean_of(values)
            row[f"{title}, sd"] = spread_of(values)
            row[f"{title}, {RIVAL}"] = mean_of([run.rival.get(metric) for run in runs])
        rows.append(row)
    sentence = in_words(rows, max(row["seeds"] for row in rows))
    last = {"held out": "mean", "seeds": None}
    for metric, title in METRICS.items():
        rival = f"{title}, {RIVAL}"
        both = [row for row in rows if row[title] is not None and row[rival] is not None]
        last[title] = mean_of([row[title] for row in both])
        last[f"{title}, sd"] = spread_of_seeds(study, metric)
        last[rival] = mean_of([row[rival] for row in both])
    rows.append(last)
    if all(len(runs) == 1 for runs in by_type(study).values()):  # then there is no spread
        for row in rows:
            for title in METRICS.values():
                del row[f"{title}, sd"]
    return rows, sentence


def spread_of(values: list[float | None]) -> float | None:
    """The standard deviation of the values that are defined; None of one or none."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 else None


def spread_of_seeds(study: list[HeldOut], metric: str) -> float | None:
    """The standard deviation over seeds of the mean over types; None unless two seeds or more have all the types."""
    types = by_type(study)
    means = []
    for seed in {run.seed for run in study}:
        values = {run.cell_type: run.model.get(metric) for run in study if run.seed == seed}
        if len(values) == len(types) and None not in values.values():
            means.append(fmean(values.values()))
    return spread_of(means)


def in_words(rows: list[dict], seeds: int) -> str:
    """What the rows of the types come to."""
    title = METRICS["pearson_delta"]
    gains = []
    for row in rows:
        model, rival = row[title], row[f"{title}, {RIVAL}"]
        if model is not None and rival is not None:
            gains.append(model - rival)
    if not gains:
        return "No type has a Pearson delta of the model and of the perturbation mean: there is nothing to compare."
    better = sum(gain > 0 for gain in gains)
    spread = f" (standard deviation over types {stdev(gains):.3f})" if len(gains) > 1 else ""
    return (
        f"Pearson delta of the model is {fmean(gains):+.3f} against the perturbation mean{spread}, the mean over "
        f"{counted(len(gains), 'held-out cell type')} with up to {counted(seeds, 'seed')} each; it is better on "
        f"{better} of {len(gains)}. The types train each other's models: they are no independent repetitions."
    )


# ---------------------------------------------------------------------------------------------------------------
# To be read
# ---------------------------------------------------------------------------------------------------------------
def in_columns(rows: list[dict]) -> list[str]:
    """The lines of a table; numbers with three digits behind the point, None blank."""
    cells = [list(rows[0])]
    for row in rows:
        line = []
        for value in row.values():
            line.append("" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value))
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def draw(out: Path, name: str, study: list[HeldOut]) -> None:
    """plots/NAME.png: a line for each type, a panel for each metric."""
    types = by_type(study)
    places = range(len(types))
    with figure(out, name, 8, 1.3 + 0.3 * len(types), 1, len(METRICS), sharey=True) as axes:
        for panel, (metric, title) in zip(axes, METRICS.items(), strict=True):
            means, rivals = [], []
            for place, runs in enumerate(types.values()):
                values = [run.model.get(metric) for run in runs]
                means.append(mean_of(values))
                rivals.append(mean_of([run.rival.get(metric) for run in runs]))
                known = [value for value in values if value is not None]
                panel.plot(known, [place] * len(known), ".", color="C0", markersize=4)
            panel.plot(numbers(rivals), places, "o", color="k", markerfacecolor="none", markersize=8)
            panel.plot(numbers(means), places, "o", color="C0", markersize=5)
            better = "more" if metric == "pearson_delta" else "less"
            panel.set_xlabel(f"{title} ({better} is better)")
            panel.grid(axis="x", linewidth=0.3)
        axes[0].set_yticks(places, list(types), fontsize=8)
        axes[0].invert_yaxis()


def numbers(values: list[float | None]) -> list[float]:
    """None as nan, which is not drawn."""
    return [math.nan if value is None else value for value in values]
