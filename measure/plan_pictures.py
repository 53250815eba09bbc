"""Pictures of a run of train_apelr.py: its loss, how its plans are used, and the belief along a text.

Dimensions: B windows, L tokens of one, N chunks of a window, K plans.
"""

import functools
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.runlog import read_metrics
from measure.figures import COLOURS, GREY, curve, curve_with_optimum, figure, legend, wrapped
from measure.forced import cut_short, drawable, plan_legend, share_of
from sources.outcomes import is_number
from sources.shared import counted

# Of a strip of beliefs, in inches. Its letters are all as wide, so that a token's columns stand above its text.
SIZE = 8  # points of a letter
LETTER = 0.602 * SIZE / 72  # its width, in DejaVu Sans Mono
LINE = 0.17  # height of a line of text
COLUMNS = 96  # letters in a row
TALLEST = 8.5  # of all rows together
LEFT = 0.65  # of a row, for the names of plans
BOUNDARY = COLOURS[1]  # a chunk begins
SHADES = "Blues"  # from white to dark, in print and for all eyes
PASSAGES = 16  # windows of which one is drawn


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------
def draw_loss(folder: Path, title: str, beside: Path | None = None) -> None:
    """Loss over training, from metrics.jsonl of the run and of a baseline beside it, and the exact optimum if known."""
    own = read_metrics(folder)
    rival = read_metrics(beside) if beside else []
    with figure(folder, "loss", title=title) as axes:
        steps, values = series(own, "train", "nll")
        if steps:
            axes.plot(
                steps,
                values,
                color=GREY,
                linewidth=0.8,
                label="training",
            )
        begun = max(values, default=0.0)
        steps, values = series(own, "eval", "val_nll")
        known, optimum = series(own, "eval", "oracle_nll")
        if steps and known == steps:
            curve_with_optimum(
                axes,
                steps,
                values,
                optimum,
                "validation",
                color=COLOURS[0],
                marker="o",
            )
        elif steps:
            curve(axes, steps, values, "validation", color=COLOURS[0], marker="o")
        steps, values = series(rival, "eval", "val_nll")
        if steps:
            curve(axes, steps, values, "validation of the baseline of equal size", color=COLOURS[1], marker="s")
        # Where evaluations differ by little the fall of the first steps comes in from above.
        seen = [y for line in axes.lines[1:] for y in line.get_ydata()]
        if seen and begun - min(seen) > 5 * (max(seen) - min(seen)) > 0:
            top = max(seen)
            least = min(y for line in axes.lines for y in line.get_ydata())
            axes.set_ylim(least - 0.2 * (top - least), top + 2 * (top - least))
        axes.set(xlabel="step", ylabel="nats a token")
        if axes.lines:  # a checkpoint of the source has no history here
            legend(axes)


def series(history: list[dict], split: str, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a figure where it is defined."""
    records = [record for record in history if record["split"] == split and is_number(record.get(key))]
    return [record["step"] for record in records], [record[key] for record in records]


# ---------------------------------------------------------------------------------------------------------------
# Usage and transitions
# ---------------------------------------------------------------------------------------------------------------
def draw_usage(folder: Path, usage: Sequence[float]) -> None:
    """Mean beliefs at chunk starts over training, or the last ones [K] where there was one evaluation."""
    K = len(usage)
    records = [record for record in read_metrics(folder) if record["split"] == "eval" and "usage" in record]
    title = "Usage of the plans: mean belief at chunk starts"
    with figure(folder, "plan_usage", 7.0, max(3.0, 1.5 + 0.17 * K), title=title) as axes:
        if len(records) < 2:
            axes.bar(range(K), usage, color=COLOURS[0])
            axes.set(xlabel="plan", xticks=range(K), ylabel="share")
            return
        steps = [record["step"] for record in records]
        shares = np.array([record["usage"] for record in records])  # [evaluations, K]
        colours = [COLOURS[k % len(COLOURS)] for k in range(K)]
        axes.stackplot(steps, shares.T, colors=colours, edgecolor="white", linewidth=0.8)
        axes.set(
            xlabel="step",
            ylabel="share",
            ylim=(0, 1),
            xlim=(steps[0], steps[-1]),
        )
        # Each plan has its name where its share ends, which needs no eye for colours.
        middles = shares[-1].cumsum() - shares[-1] / 2
        for k, height in enumerate(apart(middles, 1.0 / max(K, 16))):
            name = f"plan {k}  {share_of(shares[-1, k])}"
            axes.annotate(
                name,
                (steps[-1], middles[k]),
                (1.05, height),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                # From the left edge of the name, over which it would else be drawn.
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "relpos": (0, 0.5)},
            )
        axes.xaxis.get_major_locator().set_params(integer=True)


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Ascending heights in [0, 1], moved as little as keeps neighbours `least` apart and all of them inside."""
    moved = []
    for height in heights:
        moved.append(max(height, moved[-1] + least if moved else least / 2))
    top = 1 - least / 2
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top)
        top = moved[i] - least
    return moved


def draw_transition(folder: Path, P: np.ndarray) -> None:
    """The transition matrix [K, K], with numbers where there is room."""
    K = len(P)
    title = "Transitions between plans, without what the text adds"
    with figure(folder, "transition_matrix", 5.5, 4.6, title=title) as axes:
        image = axes.imshow(P, vmin=0, vmax=1, cmap=SHADES)
        axes.figure.colorbar(image, ax=axes, label="probability")
        axes.grid(False)
        if K <= 16:
            for i, j in np.ndindex(P.shape):
                colour = "white" if P[i, j] > 0.55 else "black"  # on a dark square or a bright one
                axes.text(
                    j,
                    i,
                    f"{P[i, j]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8 if K <= 8 else 5,
                    color=colour,
                )
        axes.set(
            xlabel="to plan",
            ylabel="from plan",
            xticks=range(K),
            yticks=range(K),
        )


# ---------------------------------------------------------------------------------------------------------------
# The belief along a text
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def draw_plans(
    folder: Path,
    model,
    corpus,
    starts: np.ndarray,
    usage: Sequence[float],
    typical: dict[str, list] | None = None,
) -> None:
    """The belief along a validation passage, usage of the plans, and transitions.

    Drawn is that of the first PASSAGES windows in which most plans are the likeliest one at a chunk's end.
    typical: tokens of each plan, as of token_table.
    """
    K = len(usage)
    starts = starts[:PASSAGES]
    tokens = corpus.windows("val", starts, model.cfg.seq_len, model.token_emb.weight.device)  # [B, L + 1]
    model.eval()
    h, _ = model.read(tokens[:, :-1])
    evidence = model.look_up(h, tokens[:, 1:, None])[..., 0]  # log p_k of each token [B, L, K]
    beliefs = model.filter(evidence, model.contexts(h))
    model.train()
    # Bayes' rule: the belief after a token is what it was before times what each plan said of the token.
    after = (beliefs.before + evidence).softmax(2).float().cpu().numpy()
    ends = beliefs.end.argmax(2).cpu().numpy()  # the likeliest plan of each chunk [B, N]

    C = model.cfg.chunk_size
    labels = [[corpus.spell(token) for token in row] for row in tokens[:, 1:].tolist()]
    true = corpus.true_plans(starts, C)
    block = heights(K, true is not None)[2]
    drawn = [that_fit(lay_out(row, corpus.tokenizer is None), block) for row in labels]
    variety = [len(set(row[: -(-length // C)])) for row, length in zip(ends, drawn, strict=True)]
    chosen = int(np.argmax(variety))
    begins = [t for t in range(1, after.shape[1]) if (t + model.offset) % C == 0]
    title = f"Belief over {counted(K, 'plan')} after each token of validation text, with a line where a chunk begins."
    if len(starts) > 1 and K > 1:
        title += f" Of {len(starts)} passages the one in which most plans become the likeliest."
    draw_beliefs(
        folder,
        "belief",
        after[chosen],
        labels[chosen],
        begins,
        title,
        () if true is None else true[chosen],
        plan_legend(usage, typical, true_names(ends, true, K), COLUMNS + 8),
        are_words=corpus.tokenizer is None,
    )
    draw_usage(folder, usage)
    P = model.planner_transition_logits.softmax(1)
    draw_transition(folder, P.float().cpu().numpy())


def true_names(ends: np.ndarray, true: np.ndarray | None, K: int) -> list[str]:
    """Which true plan [B, N] each of ours stands for, by the likeliest at chunks' ends [B, N]; none if unknown."""
    if true is None:
        return []
    names = []
    for k in range(K):
        there = np.bincount(true[:, : ends.shape[1]][ends == k])
        names.append(f"true plan {there.argmax()}" if len(there) else "nowhere the likeliest")
    return names


class Letters(NamedTuple):
    """Where a token is drawn: its row, its first column in letters and its width, and its text."""

    row: int
    column: int
    width: int
    text: str


def lay_out(labels: Sequence[str], are_words: bool = False) -> list[Letters]:
    """The places of tokens, in rows of COLUMNS letters; are_words: a blank is between them."""
    places = []
    row = column = 0
    for label in labels:
        text = cut_short(drawable(label))
        width = max(1, letters_of(text)) + are_words
        if column + width > COLUMNS:
            row += 1
            column = 0
        places.append(Letters(row, column, width, text))
        column += width
    return places


def heights(K: int, has_names: bool) -> tuple[float, float, float]:
    """(height above a strip, of a plan's line, of a row with its strip and its text) in inches."""
    above = LINE if has_names else 0.06
    line = {1: 0.2, 2: 0.16}.get(K, 0.13)
    return above, line, above + K * line + 1.6 * LINE


def that_fit(places: Sequence[Letters], block: float) -> int:
    """How many tokens have room in a picture whose rows are so high."""
    rows = max(1, int(TALLEST / block))
    return sum(place.row < rows for place in places)


def letters_of(text: str) -> int:
    """The width of a drawn text in letters: a box for what the font has not is as wide as two, an accent as none.

    An accent that begins a token has nothing to stand on: it is drawn on a circle.
    """
    width = 0
    for i, character in enumerate(text):
        if ord(character) not in glyphs():
            width += 2
        elif not unicodedata.combining(character) or i == 0:
            width += 1
    return width


@functools.cache
def glyphs() -> frozenset[int]:
    """What the font of the text can draw."""
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono")).get_charmap())


def draw_beliefs(
    folder: Path,
    name: str,
    beliefs: np.ndarray,
    labels: Sequence[str],
    boundaries: Sequence[int],
    title: str,
    true: Sequence[int] = (),
    names: Sequence[str] = (),
    are_words: bool = False,
) -> None:
    """Beliefs [L, K] as strips over the text, row below row: a line a plan, each token's belief above its letters.

    Args:
        labels: the tokens [L]; what has no room at the end is left out. boundaries: where a chunk begins.
        true: plans of the chunks, where they are known. names: a line of the legend for each plan.
        are_words: tokens have no blanks of their own.
    """
    K = beliefs.shape[1]
    above, line, block = heights(K, len(true) > 0)
    places = lay_out(labels, are_words)
    length = that_fit(places, block)
    if length < len(places):
        title += f" The first {length:,} of {len(places):,} tokens."
    places = places[:length]
    if not glyphs().issuperset(map(ord, "".join(place.text for place in places))):
        title += " Boxes are letters that the font has not."
    boundaries = [begin for begin in boundaries if begin < length]
    width = LEFT + COLUMNS * LETTER + 0.15
    heading = wrapped(title, width - 0.2).split("\n")
    top = LINE * (len(heading) + 0.7)
    legend_top = top + (places[-1].row + 1) * block
    height = legend_top + LINE * (len(names) + 1.8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not: drawn as boxes
        with figure(folder, name, width, height) as axes:
            # Everything is placed in inches from the upper left corner.
            axes.figure.set_layout_engine("none")
            axes.set_position((0, 0, 1, 1))
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.axis("off")
            axes.text(0.1, 0.08, "\n".join(heading), va="top", linespacing=1.3, parse_math=False)
            for row in range(places[-1].row + 1):
                tokens = [t for t, place in enumerate(places) if place.row == row]
                draw_row(axes, beliefs, places, tokens, top + row * block + above, line)
            mark_chunks(axes, places, boundaries, true, top, block, above)
            draw_legend(axes, names, legend_top)


def write(axes, x: float, y: float, text: str, size: float = 7, **options) -> None:
    """A text that begins at x inches and has its middle at y."""
    axes.text(x, y, text, fontsize=size, va="center", parse_math=False, **options)


def draw_row(axes, beliefs: np.ndarray, places: list[Letters], tokens: list[int], top: float, line: float) -> None:
    """One row: its strip, whose plans are named at the left, and its text under it. top: inches; line: of a plan."""
    K = beliefs.shape[1]
    edges = [LEFT + places[t].column * LETTER for t in tokens]
    edges.append(edges[-1] + places[tokens[-1]].width * LETTER)
    lines = top + line * np.arange(K + 1)
    shown = beliefs[tokens].T  # [K, tokens]
    axes.pcolormesh(
        edges,
        lines,
        shown,
        vmin=0,
        vmax=1,
        cmap=SHADES,
        edgecolors="0.85",
        linewidth=0.3,
    )
    for k in range(K):
        write(axes, LEFT - 0.05, lines[k] + line / 2, f"plan {k}", ha="right")
    for t, left in zip(tokens, edges, strict=False):
        write(axes, left, lines[-1] + 0.6 * LINE, places[t].text, SIZE, family="monospace")


def mark_chunks(
    axes,
    places: list[Letters],
    boundaries: Sequence[int],
    true: Sequence[int],
    top: float,
    block: float,
    above: float,
) -> None:
    """A line where a chunk begins, and above it the name of its true plan, again where a row begins within it."""
    for c, begin in enumerate([0, *boundaries]):
        left = LEFT + places[begin].column * LETTER
        head = top + places[begin].row * block
        text = head + block - 1.6 * LINE  # where the letters are it is thin
        if begin:
            axes.plot([left, left], [head, text], color=BOUNDARY, linewidth=1.6)
            axes.plot([left, left], [text, text + LINE], color=BOUNDARY, linewidth=0.5)
        if c >= len(true):
            continue
        end = [*boundaries, len(places)][c]
        for row in range(places[begin].row, places[end - 1].row + 1):
            inside = [place for place in places[begin:end] if place.row == row]
            room = inside[-1].column + inside[-1].width - inside[0].column
            name = f"true plan {true[c]}" if room > 8 else str(true[c])
            left = LEFT + inside[0].column * LETTER
            write(axes, left + 0.03, top + row * block + above / 2, name)


def draw_legend(axes, names: Sequence[str], top: float) -> None:
    """The shades of beliefs, and a line a plan."""
    steps = np.linspace(0, 1, 21)
    scale = LEFT + 0.08 * np.arange(len(steps) + 1)
    edges = [top + 0.2 * LINE, top + LINE]
    axes.pcolormesh(
        scale,
        edges,
        steps[None],
        vmin=0,
        vmax=1,
        cmap=SHADES,
    )
    write(axes, LEFT - 0.05, top + 0.6 * LINE, "belief 0", ha="right")
    write(axes, scale[-1] + 0.05, top + 0.6 * LINE, "1")
    for k, name in enumerate(names):
        write(axes, 0.1, top + (k + 1.9) * LINE, name, SIZE - 0.5, family="monospace")
