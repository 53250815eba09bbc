"""Rows of the tables of a study: by K, by category, of single runs; and their files."""

import csv
from pathlib import Path

import numpy as np

from common.errors import replacing
from measure.curves import blank, is_fit, perplexity
from sources.shared import counted


def fit_of(group: dict) -> dict[str, float] | None:
    """The fit of a group of categories; None where there is none, or where that of an older run is at its bound."""
    if group["fit"] is None:
        return None
    values = {name: parameter["value"] for name, parameter in group["fit"].items()}
    T = len(group["xe_by_position"])
    return values if is_fit([values["xe_inf"], values["c"], values["alpha"]], T) else None


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None of a single value, which has none."""
    deviation = None
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation


def mean_or_none(values: list[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if values else None


def row_of(K: int, runs: list[dict], positions: list[int]) -> dict:
    """A row of xe_by_k.csv: the runs of one K in a group. None where a figure is undefined."""
    seen = [run["groups"]["seen"] for run in runs]
    xe, xe_sd = spread([group["xe"] for group in seen])
    gain, gain_sd = spread([group["icl_gain"] for group in seen])
    fits = [fit for group in seen if (fit := fit_of(group))]
    tokens = mean_or_none([run["tokens"] for run in runs if "tokens" in run])
    row = {
        "K": K,
        "runs": len(runs),
        "tokens": None if tokens is None else round(tokens),
        "xe": xe,
        "xe_sd": xe_sd,
        "perplexity": perplexity(xe),
        "icl_gain": gain,
        "icl_gain_sd": gain_sd,
        "total_gain": mean_or_none([group["total_gain"] for group in seen]),
        "fits": len(fits),
        "alpha": mean_or_none([fit["alpha"] for fit in fits]),
        "xe_inf": mean_or_none([fit["xe_inf"] for fit in fits]),
    }
    for position in positions:
        row[f"xe_at_{position}"] = mean_or_none([group["xe_by_position"][position - 1] for group in seen])
    # Real documents have no oracle, and a run on all categories has seen them all.
    oracle = []
    unseen = []
    for run in runs:
        groups = run["groups"]
        if "oracle_xe_by_position" in groups["seen"]:
            oracle.append(np.mean(groups["seen"]["oracle_xe_by_position"]))
        if "unseen" in groups:
            unseen.append(groups["unseen"]["xe"])
    row["oracle_xe"] = mean_or_none(oracle)
    row["unseen_xe"] = mean_or_none(unseen)
    return row


def by_k_sentence(rows: list[dict]) -> str:
    """The rows of xe_by_k.csv of a group in a line for the console."""
    values = [f"{row['xe']:.4f} for K = {row['K']} ({counted(row['runs'], 'run')})" for row in rows]
    return f"XE in nats: {', '.join(values)}"


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
            row = {"K": K, "category": category, "runs": len(values[category]), "xe": xe, "xe_sd": xe_sd}
            rows.append(row)
    return rows


def run_row(result: dict) -> dict:
    """A row of the table of runs: the probe's best position in the last layer stands for the probe."""
    seen = result["groups"]["seen"]
    fit = fit_of(seen)
    probe_accuracy = None
    if result.get("probe"):  # not of one component, nor of very few documents
        accuracy = result["probe"]["accuracy"][-1]
        probe_accuracy = max((value for value in accuracy if value is not None), default=None)
    return {
        "run": result["run"],
        "K": result["K"],
        "control_of": result.get("control_of"),
        "seed": result["seed"],
        "data": result.get("data", {}).get("path"),
        "steps": result.get("steps"),
        "tokens": result.get("tokens"),
        "xe": seen["xe"],
        "icl_gain": seen["icl_gain"],
        "total_gain": seen["total_gain"],
        "alpha": fit["alpha"] if fit else "no fit",
        "probe_accuracy": probe_accuracy,
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table whose columns are the keys of the first row; empty cells for None."""
    with replacing(path) as fresh, open(fresh, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(rows[0])
        for row in rows:
            table.writerow([blank(value) for value in row.values()])
