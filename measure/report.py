"""Studies: which sets of categories are trained on, and the report of their runs: tables, pictures, report.html."""

import base64
import csv
import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.errors import DataError
from measure.curves import binned
from measure.figures import figure
from sources.shared import closest

# ---------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------


def run_name(categories: list[str]) -> str:
    """K3_csDS_csIT_csPL for ["cs.PL", "cs.DS", "cs.IT"]."""
    names = sorted(category.replace(".", "") for category in categories)
    return "_".join([f"K{len(categories)}", *names])


def plan_study(study: str, names: list[str]) -> list[list[str]]:
    """The sets of categories that a study trains on.

    all31 (or all): every non-empty subset; k=1,2: all of these sizes; nested:1,2,4: the first 1, 2, 4; else run names.
    Raises DataError for anything else.
    """
    every = subsets(names, range(1, len(names) + 1))
    if study == "all31" and len(every) != 31:
        raise DataError(
            f"study=all31 is about five categories, but there are {len(names)}: use study=all, or choose "
            "five with categories=a,b,c,d,e"
        )
    if study in ("all", "all31"):
        return every
    sizes = re.fullmatch(r"(k=|nested:)(\d+(?:,\d+)*)", study)
    if not sizes:
        known = {run_name(subset): subset for subset in every}
        return named_runs(study, known, names)
    kind, numbers = sizes.groups()
    wanted = [int(K) for K in numbers.split(",")]
    for K in wanted:
        if not 1 <= K <= len(names):
            raise DataError(f"study={study}: {K} is not between 1 and the {len(names)} categories")
    if kind == "nested:":
        return [names[:K] for K in wanted]
    return subsets(names, wanted)


def subsets(names: list[str], sizes: Iterable[int]) -> list[list[str]]:
    """All subsets of these sizes, in that order."""
    sets = []
    for K in sizes:
        for subset in itertools.combinations(names, K):
            sets.append(list(subset))
    return sets


def named_runs(study: str, known: dict[str, list[str]], names: list[str]) -> list[list[str]]:
    """The sets of runs that are called by their names, K1_a,K2_a_b. Raises DataError for a name that no run has."""
    sets = []
    for name in study.split(","):
        if name not in known:
            hint = closest(name, known) or "."
            raise DataError(
                f"study={study}: no run is called {name!r}{hint} Use all, all31, k=1,2, nested:1,2,4, or "
                f"names like {run_name(names[:2])}"
            )
        sets.append(known[name])
    return sets


# ---------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------
def make_report(folder: Path) -> list[dict]:
    """XE against K over the runs of a folder: xe_by_k.csv, xe_by_category.csv, plots/, a self-contained report.html.

    Error bars are standard deviations over subsets and seeds of the same K. Returns the rows of xe_by_k.csv.
    """
    results = read_results(folder)
    # Runs may differ in their context: curves are compared as far as all go.
    T = min(len(result["groups"]["seen"]["xe_by_position"]) for result in results)
    positions = sorted({position for position in (1, 2, 5, 10, 20, 50, T) if position <= T})
    by_k = {}
    for result in sorted(results, key=lambda result: result["K"]):
        by_k.setdefault(result["K"], []).append(result)

    table = [row_of(K, runs, positions) for K, runs in by_k.items()]
    categories = category_rows(by_k)
    write_csv(folder / "xe_by_k.csv", table)
    write_csv(folder / "xe_by_category.csv", categories)
    draw_curves(folder, by_k, T)
    draw_against_k(folder, by_k, positions)
    draw_categories(folder, categories, list(by_k))
    write_html(folder, table, categories, [run_row(result) for result in results])
    return table


def read_results(folder: Path) -> list[dict]:
    """results.json of every run below a folder. Raises DataError if there is none or one is damaged."""
    results = []
    for path in sorted(folder.glob("**/results.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            check_result(result)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged or foreign ({error}): --analyze that run again") from error
        result["run"] = str(path.parent.relative_to(folder))
        results.append(result)
    if not results:
        raise DataError(f"{folder} holds no run with a results.json: train some with --study=all --out_dir={folder}")
    return results


def check_result(result: dict) -> None:
    """Raises KeyError or TypeError where a result lacks what the report shows."""
    _ = result["K"] + result["seed"]  # adding fails for what is no number
    for name in ("seen", *result["categories"]):
        group = result["groups"][name]
        losses = group["xe_by_position"][0] + group["xe"]
        _ = losses + group["icl_gain"] + group["total_gain"]
        fit = group["fit"]
        _ = fit["alpha"]["value"] + fit["xe_inf"]["value"]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of a single value."""
    deviation = 0.0
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation


def mean_of(values: list[float]) -> float | str:
    """The mean, an empty cell of nothing."""
    return float(np.mean(values)) if values else ""


def row_of(K: int, runs: list[dict], positions: list[int]) -> dict:
    """A row of xe_by_k.csv: the runs of one K."""
    seen = [run["groups"]["seen"] for run in runs]
    xe, xe_sd = spread([group["xe"] for group in seen])
    gain, gain_sd = spread([group["icl_gain"] for group in seen])
    row = {
        "K": K,
        "runs": len(runs),
        "xe": xe,
        "xe_sd": xe_sd,
        "perplexity": math.exp(xe),
        "icl_gain": gain,
        "icl_gain_sd": gain_sd,
        "total_gain": mean_of([group["total_gain"] for group in seen]),
        "alpha": mean_of([group["fit"]["alpha"]["value"] for group in seen]),
        "xe_inf": mean_of([group["fit"]["xe_inf"]["value"] for group in seen]),
    }
    for position in positions:
        row[f"xe_at_{position}"] = mean_of([group["xe_by_position"][position - 1] for group in seen])
    # Real documents have no oracle, and a run on all categories has seen them all.
    oracle = []
    unseen = []
    for run in runs:
        groups = run["groups"]
        if "oracle_xe_by_position" in groups["seen"]:
            oracle.append(np.mean(groups["seen"]["oracle_xe_by_position"]))
        if "unseen" in groups:
            unseen.append(groups["unseen"]["xe"])
    row["oracle_xe"] = mean_of(oracle)
    row["unseen_xe"] = mean_of(unseen)
    return row


def category_rows(by_k: dict[int, list[dict]]) -> list[dict]:
    """Rows of xe_by_category.csv: each category in the runs of each K that trained on it."""
    rows = []
    for K, runs in by_k.items():
        values = {}  # XE by category
        for run in runs:
            for category in set(run["categories"]):
                values.setdefault(category, []).append(run["groups"][category]["xe"])
        for category in sorted(values):
            xe, xe_sd = spread(values[category])
            rows.append({
                "K": K,
                "category": category,
                "runs": len(values[category]),
                "xe": xe,
                "xe_sd": xe_sd,
            })
    return rows


def run_row(result: dict) -> dict:
    """A row of the table of runs: the probe's best position in the last layer stands for the probe."""
    seen = result["groups"]["seen"]
    probe_accuracy = ""
    if "probe" in result:
        probe_accuracy = max(result["probe"]["accuracy"][-1])
    return {
        "run": result["run"],
        "K": result["K"],
        "seed": result["seed"],
        "xe": seen["xe"],
        "icl_gain": seen["icl_gain"],
        "total_gain": seen["total_gain"],
        "probe_accuracy": probe_accuracy,
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table whose columns are the keys of the first row."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_html(folder: Path, by_k: list[dict], by_category: list[dict], runs: list[dict]) -> None:
    """report.html by the template of that name beside this file: one file, with the pictures inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import, and only needed here

    pictures = {}
    for path in (folder / "plots").glob("*.png"):
        pictures[path.stem] = base64.b64encode(path.read_bytes()).decode()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    page = environment.get_template("report.html")
    text = page.render(by_k=by_k, by_category=by_category, runs=runs, pictures=pictures)
    (folder / "report.html").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------
BARS = {"fmt": "o-", "markersize": 4, "capsize": 3}  # of error bars


def stack(runs: list[dict], key: str, T: int) -> np.ndarray:
    """Curves of the runs that have them, to T positions, [runs, T]."""
    curves = []
    for run in runs:
        seen = run["groups"]["seen"]
        if key in seen:
            curves.append(seen[key][:T])
    return np.array(curves)


def shade(name: str, i: int, count: int, top: float):
    """Colour i of count, in the order of a colour map."""
    from matplotlib import colormaps

    return colormaps[name](top * i / max(1, count - 1))


def draw_curves(folder: Path, by_k: dict[int, list[dict]], T: int) -> None:
    """XE by position for every K, beside the exact optimum where it is known."""
    with figure(folder, "xe_by_position", title="in-context cross entropy, equal training tokens") as axes:
        for i, (K, runs) in enumerate(by_k.items()):
            colour = shade("viridis", i, len(by_k), 0.9)
            positions, xe = binned(stack(runs, "xe_by_position", T))
            mean = xe.mean(0)
            label = f"K = {K}"
            if len(runs) > 1:
                label += f" ({len(runs)} runs)"
                sd = xe.std(0, ddof=1)
                axes.fill_between(positions, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
            axes.plot(positions, mean, color=colour, label=label)
            oracle = stack(runs, "oracle_xe_by_position", T)
            if len(oracle):
                _, optimum = binned(oracle)
                label = "exact optimum" if K == max(by_k) else None  # once in the legend
                axes.plot(positions, optimum.mean(0), color="k", linestyle="--", linewidth=0.8, label=label)
        axes.set(xscale="log", xlabel="tokens read", ylabel="cross entropy of the next token (nats)")
        axes.legend(fontsize=8)


def draw_against_k(folder: Path, by_k: dict[int, list[dict]], positions: list[int]) -> None:
    """XE against K at some positions."""
    title = "cross entropy against K (bars: s.d. over subsets and seeds)"
    with figure(folder, "xe_against_k", title=title) as axes:
        for i, position in enumerate(positions):
            means = []
            deviations = []
            for runs in by_k.values():
                curves = [run["groups"]["seen"]["xe_by_position"] for run in runs]
                mean, sd = spread([curve[position - 1] for curve in curves])
                means.append(mean)
                deviations.append(sd)
            colour = shade("plasma", i, len(positions), 0.85)
            axes.errorbar(list(by_k), means, deviations, color=colour, label=f"{position} read", **BARS)
        axes.set(xlabel="components K", ylabel="cross entropy (nats)", xticks=list(by_k))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="tokens")


def draw_categories(folder: Path, rows: list[dict], ks: list[int]) -> None:
    """XE of each category against K, from the rows of xe_by_category.csv."""
    with figure(folder, "xe_by_category", title="cross entropy of each category against K") as axes:
        for category in dict.fromkeys(row["category"] for row in rows):
            points = [row for row in rows if row["category"] == category]
            K = [row["K"] for row in points]
            means = [row["xe"] for row in points]
            deviations = [row["xe_sd"] for row in points]
            axes.errorbar(K, means, deviations, label=category, **BARS)
        axes.set(xlabel="components K", ylabel="cross entropy (nats)", xticks=ks)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
