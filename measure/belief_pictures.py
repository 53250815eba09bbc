"""Pictures of a run on a hidden Markov process: losses beside the floor, and beliefs beside what is read out of them.

Dimensions: P prefixes, S states.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.runlog import read_metrics
from common.telling import doing
from measure.beliefs import pca
from measure.figures import COLOURS, curve, curve_with_optimum, figure, legend, legend_below, plain_log, spans
from sources.outcomes import is_number

MOST_SHOWN = 60_000  # prefixes of a picture, the likeliest
CORNERS = COLOURS[:3]  # of the triangle, mixed inside
FLAT = 1e-9  # share of the variance from which on a direction is one of rounding
MOST_NAMED = 2  # states on each side of an axis
NEAR = 0.03  # of a panel: states so near one another have one label
NAME_SIZE = 7  # points of the names of states
PANEL = 3.9  # side of a panel of a plane, in inches
WEAK = 0.01  # share of the variance from which on a third direction has a panel


# ---------------------------------------------------------------------------------------------------------------
# Losses, and r2 by layer
# ---------------------------------------------------------------------------------------------------------------
def plot_run(folder: Path, title: str, result: dict, analysis: dict | None, geometry: dict | None) -> None:
    """All pictures of a run, in folder/plots; those of beliefs only where there is an analysis and beliefs vary."""
    with doing("drawing pictures"):
        plot_loss_by_position(folder, title, result)
        plot_excess_loss(folder, title)
        if analysis is not None and analysis["r2_concat"] is not None:
            plot_r2_by_layer(folder, title, analysis)
            plot_beliefs(folder, title, geometry, analysis["r2_concat"])


def plot_loss_by_position(folder: Path, title: str, result: dict) -> None:
    """The loss by position against its floor."""
    loss = result["loss_by_position"]
    floor = result["optimal_loss_by_position"]
    positions = range(1, len(loss) + 1)
    with figure(folder, "loss_by_position", 6, 4, title=title) as axes:
        if any(floor):
            curve_with_optimum(axes, positions, loss, floor, "model", "floor, the least that is possible")
        else:
            curve(axes, positions, loss, "model")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="tokens read", ylabel="loss of the next token (nats)")
        legend(axes)


def plot_excess_loss(folder: Path, title: str) -> None:
    """The excess loss over training, from metrics.jsonl; rounding below 0 has no place on a logarithmic axis."""
    steps = []
    excess = []
    for record in read_metrics(folder):
        value = record.get("excess_loss")
        if record["split"] == "eval" and is_number(value) and value > 0:
            steps.append(record["step"])
            excess.append(value)
    if not steps:
        return
    with figure(folder, "excess_loss", 6, 4, title=title) as axes:
        curve(axes, steps, excess)
        if spans(excess):
            plain_log(axes, "y")
        axes.set(xlabel="step", ylabel="loss above the floor (nats)")


def plot_r2_by_layer(folder: Path, title: str, analysis: dict) -> None:
    """How much of the belief a linear map reads out of each layer and of all together, with the controls."""
    layers = analysis["layers"]
    r2 = [layer["r2"] for layer in layers.values()]
    heights = [max(0.0, value) for value in r2]
    # A bar of no height stands for an r2 below 0, which a spread around 0 would belie.
    shown = [layer["r2_spread"] if layer["r2"] > 0 else None for layer in layers.values()]
    spread = [value or 0.0 for value in shown]
    names = [name.replace("_", " ").replace("concat", "all layers") for name in layers]
    labels = [f"{value:.4f}" for value in r2]  # what a bar of no height stands for, too
    controls = (
        (analysis["untrained_r2_concat"], "--", "all layers before training"),
        (analysis["shuffled_r2_concat"], ":", "all layers, beliefs shuffled"),
    )
    with figure(folder, "r2_by_layer", max(6, 1.2 * len(r2)), 4.4, title=title) as axes:
        bars = axes.bar(names, heights, yerr=spread, error_kw={"ecolor": "0.3", "capsize": 3})
        # A control's line may pass where a number stands.
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.bar_label(bars, labels, fontsize=8, padding=4, bbox=behind)
        for value, style, name in controls:
            axes.axhline(max(0.0, value), color="0.25", linestyle=style, label=f"{name}: {value:.4f}", zorder=1.5,
                         path_effects=halo(3) if value > 0 else None)  # on a dark bar, too
        axes.set(ylabel="r2 of the belief, held out", ylim=(0, 1.16))
        axes.grid(visible=False, axis="x")
        legend_below(axes.figure, *axes.get_legend_handles_labels())


# ---------------------------------------------------------------------------------------------------------------
# Beliefs
# ---------------------------------------------------------------------------------------------------------------
class Cloud(NamedTuple):
    """Beliefs [P, S] of the likeliest prefixes, on top the likeliest of all, and what is read out of activations there.

    sizes: of dots [P]. names: of the states [S]. is_posterior: beliefs are probabilities of states.
    """

    beliefs: torch.Tensor
    predicted: torch.Tensor
    sizes: np.ndarray
    names: list[str]
    is_posterior: bool


class Directions(NamedTuple):
    """Principal components of all beliefs: their mean [S], axes [S, 4 or fewer], shares of the variance."""

    mean: torch.Tensor
    axes: torch.Tensor
    explained: list[float]

    def place(self, points: torch.Tensor) -> torch.Tensor:
        """Coordinates of points [P, S] along the axes."""
        return (points - self.mean) @ self.axes


def plot_beliefs(folder: Path, title: str, geometry: dict, r2: float) -> None:
    """True beliefs beside what a linear map reads out of the activations: a line, a triangle, or planes of more.

    Args:
        geometry: beliefs [P, S], predicted [P, S], weights [P]; names [S] of the states where they have any.
    """
    beliefs, weights = geometry["beliefs"], geometry["weights"]
    rows = weights.argsort()[-MOST_SHOWN:]
    share = (weights[rows] / weights.max()).numpy()
    sizes = np.clip(30 * share**0.3, 0.3, 30)
    is_posterior = is_distribution(beliefs)
    kind = "state" if is_posterior else "dimension"
    names = geometry.get("names") or [f"{kind} {i}" for i in range(beliefs.shape[1])]
    cloud = Cloud(beliefs[rows], geometry["predicted"][rows], sizes, names, is_posterior)
    parts = pca(beliefs, weights, 4)
    directions = Directions(weights @ beliefs, parts["axes"], parts["explained"])
    title = f"{title}: r2 of the belief {r2:.4f}, held out"
    if sum(parts["explained"][1:]) < FLAT:  # as of two states: a second axis would show rounding
        plot_line(folder, title, cloud, directions)
    elif is_posterior and len(names) == 3:
        plot_triangle(folder, title, cloud)
    else:
        plot_planes(folder, title, cloud, directions)


def is_distribution(beliefs: torch.Tensor) -> bool:
    """Whether these are distributions over states (those of a generalised process need not be any)."""
    error = (beliefs.sum(1) - 1).abs()
    return bool(beliefs.min() > -1e-9 and error.max() < 1e-6)


def plot_line(folder: Path, title: str, cloud: Cloud, directions: Directions) -> None:
    """Read out against true belief, along the one direction in which beliefs differ."""
    if cloud.is_posterior and len(cloud.names) == 2:
        name = f"probability of {cloud.names[1]}"
        true, said = cloud.beliefs[:, 1], cloud.predicted[:, 1]
    else:
        name = "belief, along the line on which all lie"
        true, said = (directions.place(points)[:, 0] for points in (cloud.beliefs, cloud.predicted))
    ends = [float(true.min()), float(true.max())]
    with figure(folder, "beliefs", 5.5, 5.5, title=title) as axes:
        axes.plot(ends, ends, color="0.5", linewidth=0.8, label="equal")
        axes.scatter(true, said, s=2 * cloud.sizes, c=shades(true).to_rgba(true), linewidths=0, label="a context")
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xlabel=f"true {name}", ylabel="the same, read out of the activations")
        axes.legend(loc="upper left")


def shades(values: torch.Tensor):
    """The scale of shades for values [P], without the pale end of the map."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    low, high = float(values.min()), float(values.max())
    dark = ListedColormap(colormaps["viridis"](np.linspace(0, 0.85, 256)))
    return ScalarMappable(Normalize(low, max(high, low + 1e-12)), dark)


def halo(width: float = 2) -> list:
    """What keeps a text readable on dots, and a line on bars. width: in points, of the line with it."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="white")]


def name_sides(left, right) -> None:
    left.set_title("beliefs of the process")
    right.set_title("read out of the activations")


def plot_triangle(folder: Path, title: str, cloud: Cloud) -> None:
    """Beliefs over three states as points of a triangle, its corners certainty, each mixed of its corners' colours."""
    from matplotlib.colors import to_rgb

    corners = torch.tensor([[0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
    mixed = torch.tensor([to_rgb(colour) for colour in CORNERS], dtype=torch.float64)
    colours = (cloud.beliefs @ mixed).clamp(0, 1).numpy()
    with figure(folder, "beliefs", 10, 5, columns=2, title=title, sharex=True, sharey=True) as panels:
        name_sides(*panels)
        for axes, points in zip(panels, (cloud.beliefs, cloud.predicted), strict=True):
            x, y = (points @ corners).t().numpy()
            axes.scatter(x, y, s=cloud.sizes, c=colours, linewidths=0)
            axes.plot([0, 1, 0.5, 0], [0, 0, 0.75**0.5, 0], color="0.6", linewidth=0.8)
            for (x, y), name, colour in zip(corners.tolist(), cloud.names, CORNERS, strict=True):
                above = y > 0
                axes.text(x, y + (0.02 if above else -0.02), name, color=colour, ha="center",
                          va="bottom" if above else "top", path_effects=halo())
            axes.set_aspect("equal")
            axes.set_axis_off()


def plot_planes(folder: Path, title: str, cloud: Cloud, directions: Directions) -> None:
    """Beliefs of more dimensions in planes of principal components, each in the shades of the first that it has not."""
    true, said = directions.place(cloud.beliefs), directions.place(cloud.predicted)
    planes = [(0, 1)]
    strong = sum(share > WEAK for share in directions.explained[:4])
    if strong > 2:
        planes.append((2, 3) if strong > 3 else (0, 2))
    with figure(folder, "beliefs", 10.6, 0.6 + 4.9 * len(planes), len(planes), 2, title=title, squeeze=False) as rows:
        name_sides(*rows[0])
        for (i, j), panels in zip(planes, rows, strict=True):
            others = [k for k in range(min(strong, 3)) if k not in (i, j)]
            shade = others[0] if others else i
            scale = shades(true[:, shade])
            colours = scale.to_rgba(true[:, shade])
            for axes, points in zip(panels, (true, said), strict=True):
                axes.scatter(points[:, i], points[:, j], s=cloud.sizes, c=colours, linewidths=0)
                axes.set_xlabel(direction_name(cloud, directions, i))
            panels[0].set_ylabel(direction_name(cloud, directions, j))
            name = f"shade in both: component {shade + 1} of the process's belief"
            panels[0].figure.colorbar(scale, ax=list(panels), label=name, shrink=0.75, aspect=30, pad=0.02)
            share_limits(panels)
            if cloud.is_posterior:
                certain = directions.place(torch.eye(len(cloud.names), dtype=torch.float64))
                mark_states(panels, cloud.names, certain[:, [i, j]])


def direction_name(cloud: Cloud, directions: Directions, i: int) -> str:
    """component 1, 46% of the variance: state 1, state 4 against state 2, in two lines."""
    loadings = directions.axes[:, i]
    largest = float(loadings.abs().max())
    sides = []
    for side in (loadings, -loadings):
        order = side.argsort(descending=True).tolist()
        names = [cloud.names[s] for s in order if float(side[s]) > 0.4 * largest]
        sides.append(listed(names))
    against = " against ".join(side for side in sides if side)
    return f"component {i + 1}, {directions.explained[i]:.0%} of the variance\n{against}"


def share_limits(panels) -> None:
    """The same range on two axes, and on both sides of each where they are of about one length."""
    limits = [axes.axis() for axes in panels]
    x0, x1, y0, y1 = ((min if k % 2 == 0 else max)(limit[k] for limit in limits) for k in range(4))
    wide, high = x1 - x0, y1 - y0
    is_square = max(wide, high) < 4 * min(wide, high)
    if is_square:
        side = max(wide, high) / 2
        x0, x1 = (x0 + x1) / 2 - side, (x0 + x1) / 2 + side
        y0, y1 = (y0 + y1) / 2 - side, (y0 + y1) / 2 + side
    for axes in panels:
        axes.set(xlim=(x0, x1), ylim=(y0, y1))
        if is_square:
            axes.set_aspect("equal")


def mark_states(panels, names: list[str], places: torch.Tensor) -> None:
    """Where certainty of a state lies, places [S, 2], in panels that reach there; on the left by name."""
    left, _ = panels
    (x0, x1), (y0, y1) = left.get_xlim(), left.get_ylim()
    shares = [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in places.tolist()]  # of the panel
    spots = []  # each with the states of about one place
    for name, (x, y) in zip(names, shares, strict=True):
        if not (0 <= x <= 1 and 0 <= y <= 1):
            continue
        for axes in panels:
            axes.plot(x, y, "x", color="0.4", markersize=5, zorder=3, transform=axes.transAxes)
        near = [said for said, x_said, y_said in spots if max(abs(x - x_said), abs(y - y_said)) < NEAR]
        if near:
            near[0].append(name)
        else:
            spots.append(([name], x, y))
    taken = []
    for said, x, y in spots:
        write_beside(left, listed(said), x, y, taken)


def write_beside(axes, text: str, x: float, y: float, taken: list[tuple]) -> None:
    """A text at a corner of a point, given in shares of the axes, where it is off those that were written before.

    taken: boxes (left, bottom, right, top) of texts, to which this one's is added.
    """
    wide, high = (0.62 * len(text) * NAME_SIZE / 72 / PANEL, 1.5 * NAME_SIZE / 72 / PANEL)
    boxes = {}
    for up, right in itertools.product((1, -1), (1, -1) if x < 0.5 else (-1, 1)):
        left, bottom = x + (0.012 if right > 0 else -0.012 - wide), y + (0.008 if up > 0 else -0.008 - high)
        boxes[up, right] = (left, bottom, left + wide, bottom + high)
    free = [corner for corner, box in boxes.items() if is_free(box, taken)]
    up, right = (free or list(boxes))[0]
    taken.append(boxes[up, right])
    axes.annotate(text, (x, y), (5 * right, 3 * up), xycoords="axes fraction", textcoords="offset points",
                  ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top", color="0.2", size=NAME_SIZE,
                  path_effects=halo(), zorder=4)


def is_free(box: tuple, taken: list[tuple]) -> bool:
    """Whether a box (left, bottom, right, top) is inside of the axes and on no other one."""
    left, bottom, right, top = box
    if left < 0 or bottom < 0 or right > 1 or top > 1:
        return False
    for other_left, other_bottom, other_right, other_top in taken:
        if left < other_right and right > other_left and bottom < other_top and top > other_bottom:
            return False
    return True


def listed(names: list[str]) -> str:
    """state 1, state 4 ..."""
    return ", ".join(names[:MOST_NAMED]) + (" ..." if len(names) > MOST_NAMED else "")
