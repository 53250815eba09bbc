"""Figures of a run, in one style: a context manager that yields axes and saves folder/plots/name.png.

    with figure(folder, "loss", title="a title of any length") as axes:
        curve(axes, steps, losses, "training")                              # a single point is a marker
        curve_with_optimum(axes, steps, val_losses, floor, "validation")    # the optimum dashed, in the same colour
        band(axis=axes, x=steps, low=low, high=high, colour=COLOURS[0])     # over seeds, or an interval
        plain_log(axes, "x")                                                # 1, 10, 100
        legend(axes)
    with panels(folder, "delta", 5, title="five in rows of 3 and 2") as axes: ...   # a list of five

When it is saved, every logarithmic axis gets plain numbers, a line of one point its marker, titles and names of axes
their breaks, and a legend that lies on data another place, so that a page of your own has the style by drawing into
`figure`. "C0" to "C6" are COLOURS.
"""

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from common.errors import reason, replacing, system_sentence
from common.telling import note

STRICT = False  # for tests: a picture that cannot be drawn is an error

# After Okabe and Ito, with lightness apart too: at least 20 (CIE76) between any two for eyes without one of the three
# cones, and 7 of lightness in grey print. The order is that of use: the first ones are furthest apart.
COLOURS = ("#004C86", "#D55E00", "#56B4E9", "#00805C", "#CC79A7", "#E8C030", "#4B0030")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # of the same places, where a curve has few points
GREY = "0.35"  # of what is beside the results: an optimum of all curves, chance, zero
FEW_POINTS = 12  # so many of a curve are drawn as markers too
FAINT = 0.18  # opacity of a band
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "figure.titlesize": 10,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "errorbar.capsize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "axes.formatter.limits": (-5, 7),  # beyond these powers of ten an axis has a factor beside it
    "axes.formatter.useoffset": False,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "text.parse_math": False,  # names of drugs and types may have a $
    "image.cmap": "cividis",  # as good as the same to all eyes, and ordered in grey
}
SIGN = 0.6 / 72  # width of a sign in inches, a point of font size
LEGEND_LINE = 0.19  # height of a line of a legend, in inches


# ---------------------------------------------------------------------------------------------------------------
# A figure
# ---------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def figure(folder: Path, name: str, width: float = 7.0, height: float = 4.5, rows: int = 1, columns: int = 1,
           title: str = "", **subplots) -> Iterator:
    """Yield the axes of a new figure (an array of them where there are several) and save it as folder/plots/name.png.

    A picture that cannot be drawn or written is a line on stderr: it ends no run, and nothing is written. Sizes in
    inches; subplots: further options, such as width_ratios or sharex.
    """
    with drawing(folder, name, width, height, title, lambda whole: whole.subplots(rows, columns, **subplots)) as axes:
        yield axes


@contextlib.contextmanager
def panels(folder: Path, name: str, count: int, width: float = 3.2, height: float = 3.0, title: str = "",
           most: int = 3) -> Iterator[list]:
    """As figure, for a list of `count` axes of one size in rows as even as can be, at most `most` in one.

    width, height: of a panel, in inches. A shorter row stands in the middle.
    """
    rows = row_lengths(count, most)
    with drawing(folder, name, width * rows[0], height * len(rows), title, lambda whole: placed(whole, rows)) as axes:
        yield axes


@contextlib.contextmanager
def drawing(folder: Path, name: str, width: float, height: float, title: str, lay_out) -> Iterator:
    """A figure in our style, whatever style a notebook has; lay_out: makes its axes."""
    drawn = axes = trouble = None
    with contextlib.ExitStack() as style:
        try:
            drawn = new_figure(width, height)
            style.enter_context(in_style())
            axes = lay_out(drawn)
            if title:
                drawn.suptitle(wrapped(title, width, STYLE["figure.titlesize"]))
        except Exception as error:
            trouble = error  # said below: the body cannot be left out, and stumbles over its missing axes
        try:
            yield axes
            finish(drawn)
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            with replacing(folder / "plots" / f"{name}.png") as fresh:
                drawn.savefig(fresh)
        except Exception as error:
            if STRICT:
                raise
            trouble = trouble or error
            note(f"the picture {name} was not drawn ({system_sentence(trouble) or reason(trouble)})")


def new_figure(width: float, height: float):
    """A matplotlib figure that no window shows. Imported here: slow, and needed at the end of a run only.

    A notebook hands its MPLBACKEND to the processes it starts. Where that backend is not installed matplotlib cannot be
    imported with it, and pictures that go into files need none.
    """
    first = "matplotlib" not in sys.modules
    asked = os.environ.pop("MPLBACKEND", "") if first else ""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    finally:
        if asked:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with contextlib.suppress(ValueError):  # a notebook that draws by itself keeps its backend
            rcParams["backend"] = asked
    return Figure(figsize=(width, height), layout="constrained", dpi=150, facecolor="white")


def in_style():
    """The context of our style: matplotlib's own defaults, and ours on top."""
    from matplotlib import cycler, style

    return style.context(["default", STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}])


def row_lengths(count: int, most: int = 3) -> list[int]:
    """Panels in each row, the longer rows first: 5 are [3, 2], 4 are [2, 2], 7 are [3, 2, 2]."""
    rows = max(1, ceil(count / most))
    return [count // rows + (row < count % rows) for row in range(rows)]


def placed(whole, rows: list[int]) -> list:
    """Axes of one size; a shorter row in the middle."""
    columns = rows[0]
    grid = whole.add_gridspec(len(rows), 2 * columns)
    axes = []
    for row, length in enumerate(rows):
        for place in range(length):
            begin = columns - length + 2 * place
            axes.append(whole.add_subplot(grid[row, begin : begin + 2]))
    return axes


def finish(drawn) -> None:
    """What makes any figure one of ours: plain numbers, single points to be seen, texts that wrap, legends off data."""
    for axes in drawn.axes:
        for which in ("x", "y"):
            if getattr(axes, f"get_{which}scale")() == "log":
                plain_log(axes, which)
        for line in axes.lines:
            if len(line.get_xdata()) == 1 and line.get_marker() in ("None", "none", "", None):
                line.set(marker="x" if line.get_color() == GREY else "o")
        steps = {x for line in axes.lines for x in line.get_xdata()}
        if len(steps) == 1 and axes.get_xlabel() == "step":
            axes.set_xticks(list(steps))  # a run with one evaluation
        grid = axes.get_subplotspec()
        whole = grid.get_gridspec() if grid else None
        width = drawn.get_figwidth() * (len(grid.colspan) / whole.ncols if grid else 1.0)
        height = drawn.get_figheight() - getattr(drawn, "below", 0)
        height *= len(grid.rowspan) / whole.nrows if grid else 1.0
        for text, room in ((axes.title, width), (axes.xaxis.label, width - 0.4), (axes.yaxis.label, height - 0.4)):
            text.set_text(wrapped(text.get_text(), room - 0.4, text.get_fontsize()))
    free_legends(drawn)


def free_legends(drawn) -> None:
    """A legend that lies on data goes below the picture; of several axes with legends, it gets room above the data."""
    named = [axes for axes in drawn.axes if axes.get_legend()]
    if not named:
        return
    drawn.draw_without_rendering()
    for axes in named:
        if not covers(axes):
            continue
        if len(named) == 1:
            axes.get_legend().remove()
            legend_below(drawn, *in_order(axes))
            return
        raise_top(axes)


def raise_top(axes) -> None:
    """Room above the data, a tenth of the axis at a time, until the legend has a place there."""
    for _ in range(6):
        low, high = axes.get_ylim()
        top = high * (high / low) ** 0.1 if axes.get_yscale() == "log" else high + 0.1 * (high - low)
        axes.set_ylim(low, top)
        axes.figure.draw_without_rendering()
        if not covers(axes):
            return


def covers(axes) -> bool:
    """Whether the legend lies on a line, a dot, an area or a bar of its axes."""
    box = axes.get_legend().get_window_extent()
    for line in axes.lines:
        if len(line.get_xdata()) and line.get_transform().transform_path(line.get_path()).intersects_bbox(box, False):
            return True
    for drawn in axes.collections:
        dots = drawn.get_offset_transform().transform(drawn.get_offsets())
        paths = [] if len(dots) > 1 else [drawn.get_transform().transform_path(path) for path in drawn.get_paths()]
        is_filled = len(drawn.get_facecolor()) > 0
        inside = (dots > (box.x0, box.y0)) & (dots < (box.x1, box.y1))
        if inside.all(1).any() or any(path.intersects_bbox(box, is_filled) for path in paths):
            return True
    return any(patch.get_window_extent().overlaps(box) for patch in axes.patches)


def wrapped(text: str, width: float, size: float = 9) -> str:
    """A text broken into lines of so many inches, in letters of so many points; what has breaks keeps them."""
    signs = max(12, int(width / (SIGN * size)))
    lines = []
    for line in text.split("\n"):
        lines += textwrap.wrap(line, signs) or [""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------
def curve(axes, x: Sequence, y: Sequence, label: str | None = None, **style) -> str:
    """A line, with markers where it has few points; returns its colour, by default the next of COLOURS."""
    (line,) = axes.plot(x, y, label=label, **style)
    colour = line.get_color()
    if len(x) <= FEW_POINTS:
        line.set_markevery(None)  # each of them
    if len(x) <= FEW_POINTS and "marker" not in style:
        line.set(marker=MARKERS[COLOURS.index(colour)] if colour in COLOURS else MARKERS[0])
    return colour


def look(place: int) -> dict[str, Any]:
    """Style of the curve in a place of a picture: a colour and, for print and where colours begin again, a marker."""
    marker = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[place % len(COLOURS)], "marker": marker, "markevery": (place % 3, 3)}


def curve_with_optimum(axes, x: Sequence, y: Sequence, optimum: Sequence, label: str | None = None,
                       optimum_label: str = "exact optimum", **style) -> str:
    """A curve and, dashed in its colour, the best that any predictor can do; returns the colour.

    The legend has the curve's label, and one line for all optima.
    """
    colour = curve(axes, x, y, label, **style)
    dash = {"marker": "_", "markersize": 14} if len(x) == 1 else {}  # unlike the point of the curve
    axes.plot(x, optimum, "--", color=colour, linewidth=1.0, zorder=1.9, **dash)  # under the curves, which are at 2
    if optimum_label not in axes.get_legend_handles_labels()[1]:
        axes.optima = axes.plot([], [], "--", color=GREY, linewidth=1.0, label=optimum_label)
    return colour


def band(axis, x: Sequence, low: Sequence, high: Sequence, colour: str, label: str | None = None) -> None:
    """What seeds or an interval span around a curve of that colour."""
    axis.fill_between(x, low, high, color=colour, alpha=FAINT, linewidth=0, label=label, zorder=1.5)


def legend(axes, **options) -> None:
    """A legend of axes, the line for the optimum of all curves last. options: such as loc, ncols."""
    axes.legend(*in_order(axes), **options)


def in_order(axes) -> tuple[list, list[str]]:
    """(handles, labels) of a legend, the line for the optimum of all curves last."""
    named = list(zip(*axes.get_legend_handles_labels(), strict=True))
    named.sort(key=lambda pair: pair[0] in getattr(axes, "optima", ()))
    return [handle for handle, label in named], [label for handle, label in named]


def legend_below(drawn, handles: list, labels: list[str]) -> None:
    """A legend under all panels of a figure, which grows by its lines, in as many columns as have room."""
    size = STYLE["legend.fontsize"]
    labels = [wrapped(label, drawn.get_figwidth() - 0.8, size) for label in labels]
    room = drawn.get_figwidth() / (SIGN * size)  # in signs
    columns = max(1, int(room / (max(map(len, labels), default=1) + 6)))  # 6 for the line beside a name
    columns = max(1, min(columns, len(labels), 5))
    columns = ceil(len(labels) / max(1, ceil(len(labels) / columns)))  # of about one length
    longest = max((label.count("\n") + 1 for label in labels), default=1)
    lines = longest * ceil(len(labels) / max(1, columns))
    drawn.below = LEGEND_LINE * (lines - 1)  # for one there is room
    drawn.set_figheight(drawn.get_figheight() + drawn.below)
    drawn.legend(handles, labels, loc="outside lower center", ncols=max(1, columns))


# ---------------------------------------------------------------------------------------------------------------
# Axes
# ---------------------------------------------------------------------------------------------------------------
def spans(values: Sequence[float]) -> bool:
    """Whether values are all positive, and some more than ten times others: for a logarithmic axis."""
    return min(values) > 0 and max(values) > 10 * min(values)


def plain_log(axes, which: str = "x", ticks: Sequence[float] = ()) -> None:
    """A logarithmic axis ("x" or "y") with plain numbers: 1, 10, 100, over less than two decades 1, 2, 5 too.

    ticks: those there shall be, such as the few K of a study. May be called before or after drawing.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis = getattr(axes, f"{which}axis")
    if axis.get_scale() == "log" and getattr(axis.get_major_locator(), "is_plain", False):
        return  # with its ticks
    axes.set(**{f"{which}scale": "log"})
    locator = FixedLocator(ticks) if len(ticks) else plain_locator()()
    locator.is_plain = True
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, place: plain_number(value)))


@cache
def plain_locator() -> type:
    """A locator of plain_ticks. A class is made here as matplotlib is imported late."""
    from matplotlib.ticker import Locator

    class PlainTicks(Locator):
        def __call__(self) -> list[float]:
            return self.tick_values(*self.axis.get_view_interval())

        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            return plain_ticks(*sorted((vmin, vmax)))

    return PlainTicks


def plain_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, over less than two decades 1, 2, 5, over less than one even steps."""
    from matplotlib.ticker import MaxNLocator

    if not 0 < low < high:
        return []
    first, last = floor(log10(low)), ceil(log10(high))
    stride = 1 + (last - first) // 8  # of powers, of which there is room for eight
    every = (
        [10.0**power for power in range(first, last + 1, stride)],
        [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)],
        MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high),
    )
    for ticks in every:
        seen = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(seen) >= 3:
            break
    return seen


def plain_number(value: float) -> str:
    """0.00005, 20 and 10,000, without an exponent."""
    return f"{value:,.10f}".rstrip("0").rstrip(".")
