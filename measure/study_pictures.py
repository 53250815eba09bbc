"""Pictures of a study: cross entropy (XE) by position and against K, the law's slope, its causes, what is gained."""

from pathlib import Path

import numpy as np

from measure.curves import binned, gain_definition
from measure.figures import (
    COLOURS,
    FAINT,
    GREY,
    MARKERS,
    band,
    curve,
    curve_with_optimum,
    figure,
    legend,
    legend_below,
    look,
    plain_log,
)
from measure.xe_by_k import LAWS, Fit, fit_law, interval, mean_of, paired_means, predicted

BARS = {"fmt": "o", "markersize": 4}  # of error bars
STYLES = ("-", "--", ":", "-.")  # of groups, and of laws
BLUE, ORANGE, GREEN = COLOURS[0], COLOURS[1], COLOURS[3]


def shade(name: str, i: int, count: int, top: float):
    """Colour i of count, in the order of a colour map."""
    from matplotlib import colormaps

    return colormaps[name](top * i / max(1, count - 1))


def bars(deviations: list[float | None]) -> np.ndarray:
    """Error bars; none where there is no deviation."""
    return np.array(deviations, dtype=np.float64)  # nan, which is not drawn, for None


def stack(runs: list[dict], key: str, levels: dict[str, np.ndarray]) -> np.ndarray:
    """Curves of the runs that have them, [runs, T], without the levels [T] of their categories."""
    curves = []
    for run in runs:
        seen = run["groups"]["seen"]
        if key in seen:
            level = np.mean([levels[name] for name in run["categories"]], 0)
            curves.append(np.array(seen[key][: len(level)]) - level)
    return np.array(curves)


# ---------------------------------------------------------------------------------------------------------------
# Of all groups of runs
# ---------------------------------------------------------------------------------------------------------------
def draw_curves(folder: Path, by_group: dict, T: int, tokens: str) -> None:
    """XE by position for every group and K, beside the exact optimum of each where it is known.

    What a set has by its composition, the levels of its categories, is taken off each curve: it would hide all else.
    """
    ks = sorted({K for by_k in by_group.values() for K in by_k})
    with figure(folder, "xe_by_position", title=f"Cross entropy by tokens read, for every K. {tokens}") as axes:
        for g, (group, by_k) in enumerate(by_group.items()):
            levels = category_levels(by_k, T)
            for K, runs in by_k.items():
                place = ks.index(K)
                style = look(place) | {"color": shade("viridis", place, len(ks), 0.8), "linestyle": STYLES[g % 4]}
                positions, xe = binned(stack(runs, "xe_by_position", levels))
                label = f"{group}: K = {K}" if group else f"K = {K}"
                if len(runs) > 1:
                    label += f" ({len(runs)} runs)"
                oracle = stack(runs, "oracle_xe_by_position", levels)
                if len(oracle):
                    _, optimum = binned(oracle)
                    curve_with_optimum(axes, positions, xe.mean(0), optimum.mean(0), label, **style)
                else:
                    curve(axes, positions, xe.mean(0), label, **style)
                if len(runs) > 1:
                    mean, sd = xe.mean(0), xe.std(0, ddof=1)
                    band(axes, positions, mean - sd, mean + sd, style["color"])
        if axes.collections:
            axes.fill_between([], [], color=GREY, alpha=FAINT, linewidth=0, label="standard deviation over runs")
        axes.set_title(f"icl_gain: {gain_definition(T)}")
        plain_log(axes)
        axes.set(xlabel="tokens read", ylabel="cross entropy of the next token (nats)")
        legend(axes)


def category_levels(by_k: dict[int, list[dict]], T: int) -> dict[str, np.ndarray]:
    """How far each category is above their mean at each position, [T], over all runs that trained on it."""
    curves = {}
    for runs in by_k.values():
        for run in runs:
            for name in run["categories"]:
                curves.setdefault(name, []).append(run["groups"][name]["xe_by_position"][:T])
    means = {name: np.mean(of_name, 0) for name, of_name in curves.items()}
    together = np.mean(list(means.values()), 0)
    return {name: mean - together for name, mean in means.items()}


def draw_categories(folder: Path, rows: list[dict]) -> None:
    """XE of each category against K in every group, from the rows of xe_by_category.csv."""
    ks = sorted({row["K"] for row in rows})
    lines = {}
    for row in rows:
        lines.setdefault((row.get("group", ""), row["category"]), []).append(row)
    with figure(folder, "xe_by_category", title="Cross entropy of each category against K") as axes:
        for place, ((group, category), points) in enumerate(lines.items()):
            K = [row["K"] for row in points]
            means = [row["xe"] for row in points]
            deviations = [row["xe_sd"] for row in points]
            label = f"{group}: {category}" if group else category
            style = BARS | {"fmt": MARKERS[(place + place // len(MARKERS)) % len(MARKERS)]}
            axes.errorbar(K, means, bars(deviations), linestyle="-", label=label, **style)
        plain_log(axes, "x", ks)
        axes.set(xlabel="categories K", ylabel="cross entropy (nats)")
        legend_below(axes.figure, *axes.get_legend_handles_labels())


# ---------------------------------------------------------------------------------------------------------------
# Of one group
# ---------------------------------------------------------------------------------------------------------------
def draw_law(folder: Path, name: str, found: dict, optimum: dict | None, title: str) -> None:
    """XE against K at the mean over positions with its laws, on a linear and on a logarithmic axis.

    found, optimum: as xe_by_k.law_of_k returns them, of the model and of the exact optimum.
    """
    sizes = found["sizes"]
    fine = np.geomspace(sizes[0], sizes[-1], 60)
    with figure(folder, name, width=8, columns=2, title=title, sharey=True) as (linear, logarithmic):
        for axes, is_named in ((linear, True), (logarithmic, False)):  # in the legend, once
            for law, style in zip(LAWS, STYLES, strict=False):
                curve = mean_curve(law, found["laws"][law]["fit"], fine)
                axes.plot(fine, curve, style, color=BLUE, linewidth=1.2, label=law if is_named else None)
            draw_points(axes, found, BLUE, "model" if is_named else None)
            if found["varied"]:
                samples = fit_law(LAWS[0], level_tables(found), sizes)
                low, high = interval(mean_curve(LAWS[0], samples, fine))
                label = "95% of a + b log K" if is_named else None
                axes.fill_between(fine, low, high, color=BLUE, alpha=FAINT, linewidth=0, label=label)
            if optimum:
                draw_points(axes, optimum, BLUE, "exact optimum" if is_named else None, hollow=True)
                curve = mean_curve(LAWS[0], optimum["laws"][LAWS[0]]["fit"], fine)
                label = "a + b log K of the optimum" if is_named else None
                axes.plot(fine, curve, "-.", color=BLUE, linewidth=0.8, label=label)
        linear.set_xticks(sizes)
        linear.set(xlabel="categories K", ylabel="cross entropy, mean over positions (nats)")
        plain_log(logarithmic, "x", list(sizes))
        logarithmic.set_xlabel("categories K (logarithmic)")
        legend_below(linear.figure, *linear.get_legend_handles_labels())


def draw_points(axes, found: dict, colour: str, label: str | None, hollow: bool = False) -> None:
    """Paired means over categories against K, with 95% intervals where something varies."""
    means = paired_means(found["means"])[:, -1]
    errors = None
    if found["varied"]:
        low, high = interval(paired_means(level_tables(found))[..., -1])
        errors = np.maximum([means - low, high - means], 0)
    face = "white" if hollow else colour
    axes.errorbar(found["sizes"], means, errors, color=colour, markerfacecolor=face, label=label, **BARS)


def level_tables(found: dict) -> np.ndarray:
    """Resampled means of the mean over positions, [B, C, J, 1], all on the level of the study.

    Documents that are hard at every K move all points alike, by more than K does: what they say of K is what is left.
    """
    tables = found["tables"][..., -1:]
    levels = np.nanmean(tables, (1, 2), keepdims=True)
    return tables - levels + np.nanmean(found["means"][..., -1])


def mean_curve(law: str, fit: Fit, K: np.ndarray) -> np.ndarray:
    """What a law says of the mean over categories at the mean over positions, [..., J]."""
    return mean_of(predicted(law, fit, K), -3)[..., -1]


def draw_slopes(folder: Path, name: str, found: dict, optimum: dict | None, positions: list[int], title: str) -> None:
    """b of a + b log K by position with its interval, beside that of the exact optimum."""
    with figure(folder, name, title=title) as axes:
        shown = [("model", found, BLUE)]
        if optimum:
            shown.append(("exact optimum", optimum, BLUE))
        for label, law_of, colour in shown:
            law = law_of["laws"][LAWS[0]]
            b = law["b"]
            errors = None
            if label == "model" and found["varied"]:
                errors = np.maximum([b - law["low"], law["high"] - b], 0)[:, :-1]
            style = {"linestyle": "-"} if label == "model" else {"linestyle": "--", "markerfacecolor": "white"}
            axes.errorbar(positions, b[:-1], errors, color=colour, label=label, **BARS, **style)
        axes.axhline(0, color="k", linewidth=0.6)
        plain_log(axes)
        axes.set(xlabel="tokens read", ylabel="growth of XE (nats per e-fold of K)")
        axes.legend()


def draw_controls(folder: Path, name: str, by_k: list[dict], by_category: list[dict], title: str) -> None:
    """Growth from K = 1 and its two parts against K: means over categories with errors, categories as small points."""
    ks = [row["K"] for row in by_k]
    with figure(folder, name, title=title) as axes:
        parts = (("growth", "k", 1.0), ("dilution", BLUE, 0.97), ("interference", ORANGE, 1.03))
        for part, colour, aside in parts:
            places = np.array(ks) * aside
            means = [row[part] for row in by_k]
            errors = bars([row[f"{part}_se"] for row in by_k])
            axes.errorbar(places, means, errors, color=colour, linestyle="-", label=part, **BARS)
            for row in by_category:
                axes.plot(row["K"] * aside, row[part], ".", color=colour, alpha=0.35, markersize=5)
        optimum = bars([row["optimum_growth"] for row in by_k])
        if np.isfinite(optimum).any():
            axes.plot(
                ks, optimum, "o--", color="k", markerfacecolor="none", linewidth=0.8, label="of the exact optimum"
            )
        axes.axhline(0, color="k", linewidth=0.6)
        plain_log(axes, "x", ks)
        axes.set_xlim(min(ks) / 1.2, max(ks) * 1.2)
        axes.set(xlabel="categories K", ylabel="XE above that of K = 1 (nats)")
        axes.legend()


def draw_tradeoff(folder: Path, name: str, rows: list[dict], title: str) -> None:
    """XE on categories seen and unseen against K; and one against the other, a point for each K."""
    ks = [row["K"] for row in rows]
    both = [row for row in rows if row["unseen_xe"] is not None]
    with figure(folder, name, width=8, height=4, columns=2, title=title) as (against, curve):
        for kind, colour in (("seen", BLUE), ("unseen", ORANGE)):
            values = bars([row[f"{kind}_xe"] for row in rows])
            errors = bars([row[f"{kind}_se"] for row in rows])
            against.errorbar(ks, values, errors, color=colour, linestyle="-", label=kind, **BARS)
        plain_log(against, "x", ks)
        against.set(xlabel="categories K", ylabel="cross entropy (nats)")
        against.legend()
        curve.errorbar(
            [row["seen_xe"] for row in both],
            [row["unseen_xe"] for row in both],
            bars([row["unseen_se"] for row in both]),
            bars([row["seen_se"] for row in both]),
            color=GREEN,
            linestyle="-",
            **BARS,
        )
        for row in both:
            curve.annotate(
                f"K = {row['K']}", (row["seen_xe"], row["unseen_xe"]), xytext=(6, 6), textcoords="offset points", size=8
            )
        curve.margins(0.15)
        curve.set(xlabel="XE on seen categories (nats)", ylabel="XE on unseen categories (nats)")


def draw_context(folder: Path, name: str, rows: list[dict], title: str) -> None:
    """The in-context score by K; on synthetic documents also information beside log K, and the excess."""
    ks = [row["K"] for row in rows]
    synthetic = any(row["information_predictions"] is not None for row in rows)
    columns = 3 if synthetic else 1
    size = {"width": 3.6 * columns + 0.8, "height": 3.6}
    with figure(folder, name, columns=columns, squeeze=False, title=title, **size) as panels:
        axes = panels[0, 0]
        values = bars([row["icl_score"] for row in rows])
        low = bars([row["icl_score_low"] for row in rows])
        high = bars([row["icl_score_high"] for row in rows])
        axes.errorbar(ks, values, np.maximum([values - low, high - values], 0), color=BLUE, label="model", **BARS)
        optimum = bars([row.get("optimum_icl_score") for row in rows])
        if np.isfinite(optimum).any():
            axes.plot(ks, optimum, "o--", color=BLUE, markerfacecolor="white", linewidth=0.8, label="exact optimum")
        axes.axhline(0, color="k", linewidth=0.6)
        axes.set(ylabel="in-context score (nats)")
        drawn = [axes]
        if synthetic:
            information, excess = panels[0, 1:]
            drawn += [information, excess]
            log_k = np.log(ks)
            information.plot(ks, log_k, ":", color="k", label="log K")
            for key, label, style, colour in (
                ("information_document", "of the document", "o-", BLUE),
                ("information_predictions", "of its predictions", "s--", GREEN),
                ("information_model", "that the model pays", "^-.", ORANGE),
            ):
                values = bars([row.get(key) for row in rows])
                information.plot(ks, values, style, color=colour, label=label, markersize=4)
            information.set(ylabel="summed XE above the known (nats)")
            for key, label, colour in (("excess", "mean", BLUE), ("worst_excess", "worst position", ORANGE)):
                excess.plot(ks, bars([row.get(key) for row in rows]), "o-", color=colour, label=label, markersize=4)
            excess.axhline(0, color="k", linewidth=0.6)
            excess.set(ylabel="excess over the exact optimum (nats)")
        for axes in drawn:
            plain_log(axes, "x", ks)
            axes.set_xlabel("categories K")
            axes.legend()
