"""Pictures of runs side by side: their curves over the steps, and what they came to."""

import textwrap
from pathlib import Path
from statistics import fmean, stdev

from common.runlog import read_metrics
from measure.figures import COLOURS, figure, plain_log, spans  # noqa: F401
from measure.sweeps import HEADS, Group
from sources.outcomes import is_number
from sources.sweeps import digest

SPLITS = {"train": "training", "eval": "evaluation"}  # of metrics.jsonl
MOST_CURVES = 10  # groups with a colour
MOST_ROWS = 30  # of the picture of results
SHORT = 40  # signs of a value in a terminal or a legend
LABEL_LINE = 48  # signs of a line of a label beside an axis


def label(group: Group) -> str:
    """What a group is called in a legend or a sentence."""
    # What has no value here has one elsewhere.
    told = [f"{name}={shorter(text)}" for name, text in group.settings.items() if text not in ("", "none")]
    if not told:
        told = [f"{name}={text or 'none'}" for name, text in group.settings.items()]
    if not told:
        return "one run" if len(group.runs) == 1 else "all runs"
    return ("; " if any("," in text for text in told) else ", ").join(told)


def shorter(text: str) -> str:
    """A text cut for a terminal, and still unlike its likes: of a path the end tells most."""
    if len(text) <= SHORT:
        return text
    if "/" in text:
        return f"{digest(text)}...{text[10 - SHORT :]}"
    return f"{text[: SHORT - 10]}...{digest(text)}"


# ---------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------
def draw_curves(out: Path, ranked: list[Group], keys: tuple[str, str]) -> None:
    """plots/curves.png: the training loss and what evaluations measure, over steps; none where nothing was logged.

    keys: names of the two in metrics.jsonl, "" for the first number of a line. ranked: the best first.
    """
    panels = {}  # title: for each group the curves of its runs
    for split, key in zip(("train", "eval"), keys, strict=True):
        name, curves = curves_of(ranked, split, key)
        if name:
            panels[f"{name} ({SPLITS[split]})"] = curves
    if not panels:
        (out / "plots" / "curves.png").unlink(missing_ok=True)
        return
    width = max(8, 5 * len(panels))  # inches
    height = 4 + 0.22 * (min(len(ranked), MOST_CURVES) + 1)  # with the legend
    with figure(out, "curves", width, height, 1, len(panels), squeeze=False) as axes:
        for panel, (title, curves) in zip(axes[0], panels.items(), strict=True):
            for place, runs in enumerate(curves):
                draw_group(panel, runs, place, name_in_legend(ranked, place))
            fit_axis(panel, curves)
            panel.set(xlabel="step", title=title)
            panel.grid(linewidth=0.3)
        first = axes[0, 0]
        first.figure.legend(*first.get_legend_handles_labels(), loc="outside lower center")


def name_in_legend(ranked: list[Group], place: int) -> str | None:
    """The name of a group, by its place; those without a colour have one name in all."""
    if place < MOST_CURVES:
        return label(ranked[place])
    return f"{len(ranked) - MOST_CURVES} others" if place == MOST_CURVES else None


def curves_of(ranked: list[Group], split: str, key: str) -> tuple[str, list[list[dict[int, float]]]]:
    """(name of a number in metrics.jsonl, "" if no run has one; for each group its runs' {step: value})."""
    curves = []
    for group in ranked:
        runs = []
        for run in group.runs:
            records = [record for record in read_metrics(Path(run["folder"])) if record["split"] == split]
            if records and not key:
                key = first_number(records[0])
            points = {record["step"]: record[key] for record in records if is_number(record.get(key))}
            if points:
                runs.append(points)
        curves.append(runs)
    return key if any(curves) else "", curves


def first_number(record: dict) -> str:
    """The name of the first number of a line that is a result."""
    for name, value in record.items():
        if isinstance(value, float) and name != "time_s":
            return name
    return ""


def draw_group(axes, runs: list[dict[int, float]], place: int, name: str | None) -> None:
    """The curves of a group, by its place among the best; only the first have a colour."""
    if not runs:
        return
    steps = sorted(set(runs[0]).intersection(*runs[1:]))
    columns = [[points[step] for points in runs] for step in steps]
    mean = [fmean(column) for column in columns]
    if place >= MOST_CURVES:
        axes.plot(steps, mean, color="0.8", linewidth=0.6, zorder=1, label=name)
        return
    colour = COLOURS[place % len(COLOURS)]
    axes.plot(
        steps,
        mean,
        color=colour,
        linestyle="-" if place < len(COLOURS) else "--",
        linewidth=1.6,
        marker="." if len(steps) == 1 else None,
        zorder=4 + MOST_CURVES - place,  # the best is on top
        label=name,
    )
    if len(runs) == 1:
        return
    low = [min(column) for column in columns]
    high = [max(column) for column in columns]
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
    for points in runs:
        axes.plot(list(points), list(points.values()), color=colour, linewidth=0.5, zorder=3)


def fit_axis(axes, curves: list[list[dict[int, float]]]) -> None:
    """Logarithmic where values above 0 span more than a factor of ten; else without the heights of the first steps."""
    values = []
    later = []
    for runs in curves:
        for points in runs:
            values += points.values()
            begin = max(points) / 10
            later += [value for step, value in points.items() if step >= begin]
    if spans(values):
        log_axis(axes, "y")
        return
    low = min(values)
    margin = 0.05 * (max(later) - low)
    if margin > 0:
        axes.set_ylim(low - margin, max(later) + margin)


log_axis = plain_log  # as some pictures call it


# ---------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------
def draw_results(out: Path, ranked: list[Group], name: str, less_is_better: bool) -> None:
    """plots/results.png: what each group came to, the best on top; no picture of one group or of no number."""
    known = [group for group in ranked if group.values(name)]
    if len(known) < 2:
        (out / "plots" / "results.png").unlink(missing_ok=True)
        return
    title = ""
    if len(known) > MOST_ROWS:
        title = f"the first {MOST_ROWS} of {len(known)}"
        known = known[:MOST_ROWS]
    labels = [textwrap.wrap(label(group), LABEL_LINE) for group in known]
    height = 0.16 * max(map(len, labels)) + 0.12  # of a row, in inches
    with figure(out, "results", 8, 1.2 + height * len(known), title=title) as axes:
        every = []
        for place, group in enumerate(known):
            values = group.values(name)
            every += values
            axes.plot(values, [place] * len(values), "o", color=COLOURS[0], markersize=4, alpha=0.6)
            if len(values) > 1:
                mean, deviation = fmean(values), stdev(values)
                axes.errorbar(mean, place + 0.2, xerr=deviation, fmt="|", color="k", capsize=3, markersize=8)
        if spans(every):
            log_axis(axes, "x")
        axes.set_yticks(range(len(known)), ["\n".join(lines) for lines in labels], fontsize=8)
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.set_xlabel(f"{HEADS.get(name, name)} ({'less' if less_is_better else 'more'} is better)")
        axes.grid(axis="x", linewidth=0.3)
