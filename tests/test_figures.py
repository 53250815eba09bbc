"""The one style of figures: colours for all eyes and for print, plain axes, optima, single points, panels, titles."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from measure import figures
from measure.figures import (
    COLOURS,
    band,
    covers,
    curve,
    curve_with_optimum,
    figure,
    legend,
    legend_below,
    look,
    panels,
    plain_log,
    wrapped,
)

# Of Machado, Oliveira and Fernandes 2009, without one of the three cones, for linear RGB.
EYES = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def linear(colour: str) -> np.ndarray:
    """#rrggbb as linear RGB."""
    share = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB in CIELAB: lightness, and two of colour."""
    ratio = TO_XYZ @ rgb.clip(0, 1) / WHITE
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
def test_any_two_colours_are_apart_for_eyes_with(eyes):
    seen = [lab(np.array(EYES[eyes]) @ linear(colour)) for colour in COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_any_two_colours_are_apart_in_grey_print():
    lightness = sorted(lab(linear(colour))[0] for colour in COLOURS)
    assert min(np.diff(lightness)) > 6.5 and lightness[-1] < 85  # and all are seen on white


@pytest.fixture
def axes():
    return figures.new_figure(4, 3).subplots()


def labels(axes, which: str = "x") -> list[str]:
    axes.figure.draw_without_rendering()
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    axis = getattr(axes, f"{which}axis")
    texts = [(tick.get_position()[which == "y"], tick.get_text()) for tick in axis.get_ticklabels()]
    return [text for place, text in texts if 0.999 * low <= place <= 1.001 * high]


@pytest.mark.parametrize(("low", "high", "expected"), [
    (1, 1000, ["1", "10", "100", "1,000"]),
    (0.0001, 0.01, ["0.0001", "0.001", "0.01"]),
    (1, 20, ["1", "2", "5", "10", "20"]),
    (1.1, 1.4, ["1.1", "1.2", "1.3", "1.4"]),
    (1, 1e12, ["1", "100", "10,000", "1,000,000", "100,000,000", "10,000,000,000", "1,000,000,000,000"]),
])  # fmt: skip
def test_a_logarithmic_axis_has_plain_numbers(axes, low, high, expected):
    axes.plot([low, high], [1, 2])
    plain_log(axes, "x")
    axes.set_xlim(low, high)
    assert labels(axes) == expected


def test_ticks_that_are_asked_for_stay_through_the_finish(tmp_path):
    with figure(tmp_path, "asked") as axes:
        axes.plot([1, 16], [1, 2])
        plain_log(axes, "x", ticks=(1, 4, 16))
    assert labels(axes) == ["1", "4", "16"]


def test_what_draws_in_its_own_way_gets_plain_axes_visible_points_and_titles_in_lines(tmp_path):
    with figure(tmp_path, "own", 4, 3) as axes:
        axes.set(yscale="log", xlabel="step", title="a title that is longer than four inches of a picture can hold")
        axes.plot([1500], [0.1], label="one evaluation")
        axes.plot([1500], [10.0])
    assert labels(axes, "y") == ["0.1", "1", "10"] and labels(axes) == ["1500"]
    assert [line.get_marker() for line in axes.lines] == ["o", "o"]
    assert axes.get_title().count("\n") == 1
    width = axes.title.get_window_extent().width
    assert width < axes.figure.bbox.width
    assert (tmp_path / "plots" / "own.png").exists()


def test_an_optimum_has_the_colour_of_its_curve_and_one_line_last_in_the_legend(axes):
    x = np.arange(1, 30)
    for name in ("a", "b"):
        colour = curve_with_optimum(axes, x, 2 / x, 1 / x, name)
        band(axes, x, 1.9 / x, 2.1 / x, colour)
    legend(axes)
    a, optimum_of_a, _, b, optimum_of_b = axes.lines
    for line, optimum in ((a, optimum_of_a), (b, optimum_of_b)):
        assert optimum.get_color() == line.get_color() and optimum.get_linestyle() == "--"
        np.testing.assert_array_equal(optimum.get_ydata(), 1 / x)
    assert a.get_color() != b.get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "exact optimum"]


def test_one_evaluation_and_its_optimum_are_told_apart(tmp_path):
    with figure(tmp_path, "one") as axes:
        curve_with_optimum(axes, [100], [3.0], [2.5], "validation")
    model, optimum, _ = axes.lines
    assert model.get_marker() == "o" and optimum.get_marker() == "_"


def test_few_points_have_markers_that_differ_by_curve_and_many_have_none(axes):
    for colour in COLOURS[:2]:
        curve(axes, [1, 2], [3, 4], color=colour)
    curve(axes, range(100), range(100))
    curve(axes, [1], [3], **look(2))
    assert axes.lines[-1].get_markevery() is None
    markers = [line.get_marker() for line in axes.lines]
    assert markers[0] != markers[1] and "None" not in markers[:2] and markers[2] == "None"


def zigzag(axes, name: str = "a") -> None:
    axes.plot(np.arange(40), np.arange(40) % 2, label=name)


def test_a_legend_on_data_goes_below_and_one_beside_it_stays(tmp_path):
    with figure(tmp_path, "full") as full:
        zigzag(full)
        legend(full)
    (below,) = full.figure.legends
    assert full.get_legend() is None and [text.get_text() for text in below.get_texts()] == ["a"]
    with figure(tmp_path, "free") as free:
        free.plot([0, 1], [0, 1], label="a")
        legend(free)
    assert free.get_legend() and not free.figure.legends
    with figure(tmp_path, "two", columns=2) as two:
        for axes in two:
            zigzag(axes)
            legend(axes)
    assert not any(map(covers, two)) and all(axes.get_ylim()[1] > 1.1 for axes in two)


@pytest.mark.parametrize("draw", [
    lambda axes: axes.plot([0, 1], [0, 1]),
    lambda axes: axes.scatter([0.5, 9], [0.5, 9]),
    lambda axes: axes.fill_between([0, 1], [0, 0], [1, 1]),
    lambda axes: axes.errorbar([0.5], [0.5], [0.5], fmt="none"),
    lambda axes: axes.bar([0.5], [1]),
])  # fmt: skip
def test_a_legend_is_seen_to_lie_on_whatever_is_drawn(axes, draw):
    axes.plot([], [], label="a")
    legend(axes, loc="center")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.figure.draw_without_rendering()
    assert not covers(axes)
    draw(axes)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.figure.draw_without_rendering()
    assert covers(axes)


def test_many_names_below_a_picture_take_nothing_from_it_and_long_names_of_axes_are_inside(tmp_path):
    heights = {}
    for count in (2, 14):
        with figure(tmp_path, "names") as axes:
            axes.set(xlabel=12 * "a long name ", ylabel=12 * "a long name ")
            for place in range(count):
                axes.plot([1, 2], [place, place], label=f"category_of_a_long_name_{place}" * 2, **look(place))
            legend_below(axes.figure, *axes.get_legend_handles_labels())
        heights[count] = axes.get_window_extent().height
        for text in (axes.xaxis.label, axes.yaxis.label):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= axes.figure.bbox.x1 and box.y1 <= axes.figure.bbox.y1
    assert heights[14] > 0.9 * heights[2]
    styles = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(styles) == 14


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2])])
def test_panels_have_one_size_and_fill_their_rows(count, rows, tmp_path):
    with panels(tmp_path, "panels", count) as drawn:
        pass
    whole = drawn[0].figure
    whole.draw_without_rendering()
    places = [axes.get_position() for axes in drawn]
    assert len(drawn) == count
    assert [len(list(row)) for _, row in itertools.groupby(places, lambda place: round(place.y0, 3))] == rows
    assert np.ptp([place.width for place in places]) < 0.01 and np.ptp([place.height for place in places]) < 0.01
    for _, row in itertools.groupby(places, lambda place: round(place.y0, 3)):  # as much room left as right
        row = list(row)
        assert abs(row[0].x0 - (1 - row[-1].x1)) < 0.12


def test_the_style_of_a_notebook_is_neither_taken_nor_changed(tmp_path):
    from matplotlib import rcParams

    before = dict(rcParams)
    with rcParams_of("dark_background"), figure(tmp_path, "light") as axes:
        (line,) = axes.plot([1, 2], [1, 2])
    assert axes.get_facecolor() == (1.0, 1.0, 1.0, 1.0) and line.get_color() == COLOURS[0]
    assert dict(rcParams) == before


def rcParams_of(name: str):
    from matplotlib import style

    return style.context(name)


def test_what_has_breaks_keeps_them_and_long_words_are_broken():
    assert wrapped("first\nsecond", 4) == "first\nsecond"
    assert max(map(len, wrapped("/a/very/long/path" * 9, 3, 9).split("\n"))) <= 3 / (0.6 / 72 * 9)


def test_a_page_of_pictures_is_written_where_nothing_was_drawn(tmp_path: Path):
    with panels(tmp_path, "empty", 2):
        pass
    assert (tmp_path / "plots" / "empty.png").read_bytes().startswith(b"\x89PNG")
