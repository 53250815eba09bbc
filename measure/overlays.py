"""Pictures of runs side by side: their curves over the steps, and what they came to."""

import textwrap
from pathlib import Path
from statistics import fmean, stdev

from common.runlog import read_metrics
from measure.figures import COLOURS, FEW_POINTS, MARKERS, band, curve, figure, legend_below, panels, plain_log, spans
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


def labels(ranked: list[Group]) -> list[str]:
    """What groups are called beside one another: of paths that end in different names those alone."""
    names = {}
    for name in {name for group in ranked for name in group.settings}:
        texts = [group.settings.get(name, "") for group in ranked]
        ends = {text: Path(text).name for text in texts}
        if any("/" in text for text in texts) and len(set(ends.values())) == len(ends):
            names[name] = ends
    called = []
    for group in ranked:
        settings = {name: names.get(name, {}).get(text, text) for name, text in group.settings.items()}
        called.append(label(Group(settings, group.runs)))
    return called


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
    shown = {}  # title: for each group the curves of its runs
    for split, key in zip(("train", "eval"), keys, strict=True):
        name, curves = curves_of(ranked, split, key)
        if name:
            shown[f"{name} ({SPLITS[split]})"] = curves
    if not shown:
        (out / "plots" / "curves.png").unlink(missing_ok=True)
        return
    width = 5.0 if len(shown) > 1 else 7.0  # inches
    with panels(out, "curves", len(shown), width, 4.0) as axes:
        for panel, (title, curves) in zip(axes, shown.items(), strict=True):
            for place, runs in enumerate(curves):
                draw_group(panel, runs, place, name_in_legend(ranked, place))
            fit_axis(panel, curves)
            panel.set(xlabel="step", title=title)
        named = {}  # a group may have a curve in one panel alone
        for panel in axes:
            handles, names = panel.get_legend_handles_labels()
            named |= dict(zip(names, handles, strict=True))
        legend_below(axes[0].figure, list(named.values()), list(named))


def name_in_legend(ranked: list[Group], place: int) -> str | None:
    """The name of a group, by its place; those without a colour have one name in all."""
    if place < MOST_CURVES:
        return labels(ranked)[place]
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
        axes.plot(steps, mean, color="0.8", linewidth=0.6, zorder=1.8, label=name)
        return
    style = "-" if place < len(COLOURS) else "-."
    order = 4 + MOST_CURVES - place  # the best is on top
    # Markers tell curves apart on paper, and groups of one colour: a few of them, at other steps for each group.
    marker = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
    stride = 1 + len(steps) // FEW_POINTS
    line = {"linestyle": style, "zorder": order, "marker": marker, "markevery": (place % stride, stride)}
    colour = curve(axes, steps, mean, name, color=colour_of(place), **line)
    if len(runs) == 1:
        return
    band(axes, steps, [min(column) for column in columns], [max(column) for column in columns], colour)
    for points in runs:
        marker = "." if len(points) == 1 else None
        axes.plot(list(points), list(points.values()), color=colour, linewidth=0.5, marker=marker, zorder=3)


def colour_of(place: int) -> str:
    """The colour of a group by its place among the best, the same in all pictures; grey after the first ones."""
    return COLOURS[place % len(COLOURS)] if place < MOST_CURVES else "0.6"


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
        plain_log(axes, "y")
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
    names = [textwrap.wrap(name, LABEL_LINE) for name in labels(known)]
    height = 0.16 * max(map(len, names)) + 0.12  # of a row, in inches
    with figure(out, "results", 8, 1.2 + height * len(known), title=title) as axes:
        every = []
        for place, group in enumerate(known):
            values = group.values(name)
            every += values
            colour, marker = colour_of(ranked.index(group)), MARKERS[0]
            axes.plot(values, [place] * len(values), marker, color=colour)
            if len(values) > 1:
                mean, deviation = fmean(values), stdev(values)
                axes.errorbar(mean, place + 0.22, xerr=deviation, fmt="|", color="k", markersize=6)
        if spans(every):
            plain_log(axes, "x")
        axes.set_yticks(range(len(known)), ["\n".join(lines) for lines in names])
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.set_xlabel(f"{HEADS.get(name, name)} ({'less' if less_is_better else 'more'} is better)")
        axes.grid(visible=False, axis="y")
