"""How well effects of perturbations are predicted: metrics as cell-eval and pdex define them, tables and pictures.

P conditions or groups of cells, N cells, G genes. A figure that is not defined, such as the rank of a perturbation
among one, is nan in arrays and records, a blank in a CSV, null in JSON, and stands in no picture, mean or sentence.
"""

import csv
import math
from pathlib import Path

import numpy as np
import torch

from common.errors import DataError, replacing
from common.runlog import read_metrics, write_json
from common.telling import doing
from kernels.rank_sum import rank_sum
from measure.baselines import Baselines
from measure.figures import COLOURS, GREY, curve, figure, legend, legend_below, panels, plain_log, spans
from sources.shared import counted

METRICS = {  # column of the table: larger is better
    "pearson_delta": True,
    "mae": False,
    "mse": False,
    "discrimination": True,
    "overlap_at_50": True,
    "energy_distance": False,
}
TOPS = (50, 100, 200, 500, None)  # sizes of the lists of differentially expressed genes; None is every significant one
FALSE_DISCOVERY_RATE = 0.05
ROUNDING = 1e-6  # effects below this are none: means of the same cells by another order of summation
PANELS = {1: (4.8, 1), 2: (3.8, 2), 3: (3.2, 3), 6: (3.0, 3), 12: (2.5, 4)}  # up to so many: inches, panels in a row
RING = {"color": GREY, "markerfacecolor": "none"}  # of a baseline
LABELS = ("dataset", "file", "cell_type", "perturbation", "n_cells")  # of a condition; all else are its metrics


# ---------------------------------------------------------------------------------------------------------------
# Single metrics
# ---------------------------------------------------------------------------------------------------------------
def rows_by_group(group: np.ndarray, n_groups: int) -> list[np.ndarray]:
    """The rows of every group 0..n_groups - 1, in order; codes outside that range belong to none."""
    order = np.argsort(group, kind="stable")
    codes = np.arange(n_groups + 1)
    bounds = np.searchsorted(group[order], codes)
    rows = []
    for g in range(n_groups):
        rows.append(order[bounds[g] : bounds[g + 1]])
    return rows


def evenly(n: int, most: int) -> np.ndarray:
    """At most so many of n places, evenly spaced."""
    count = min(n, most)
    return np.arange(count) * n // max(1, count)


def pseudobulk(x: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean of the cells x [N, G] of every group [n_groups, G], in float64; an empty group is nan."""
    means = np.full((n_groups, x.shape[1]), np.nan)
    for mean, rows in zip(means, rows_by_group(group, n_groups), strict=True):
        if len(rows):
            x[rows].mean(0, dtype=np.float64, out=mean)
    return means


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of rows of a and b [P, G] -> [P]; nan where a row is constant, as scipy and cell-eval do."""
    x = a - a.mean(1, keepdims=True)
    y = b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        r = (x * y).sum(1) / norms
    # Asked of the values: rounding of the mean can leave a constant row a norm that is not 0.
    a_constant = (a == a[:, :1]).all(1)
    b_constant = (b == b[:, :1]).all(1)
    return np.where(a_constant | b_constant, np.nan, r.clip(-1, 1))


def mean_distance(x: np.ndarray, y: np.ndarray, block: int = 1024) -> float:
    """Mean Euclidean distance of all pairs of rows of x [n, G] and y [m, G]; a set to itself (x is y) counts the
    zeros of its diagonal. Holds [block, block] distances at a time, computes in the precision of x."""
    itself = x is y
    centre = y.mean(0, keepdims=True)  # |x|^2 + |y|^2 - 2xy loses least near the origin
    a = torch.from_numpy(np.ascontiguousarray(x - centre))
    b = a
    if not itself:
        b = torch.from_numpy(np.ascontiguousarray(y - centre)).to(a.dtype)
    total = 0.0
    for i in range(0, len(a), block):
        first = i if itself else 0  # each pair of blocks of one set once
        for j in range(first, len(b), block):
            distances = torch.cdist(a[i : i + block], b[j : j + block])
            if itself and i == j:
                distances.fill_diagonal_(0)  # rounding, which is far from zero under the root
            weight = 2 if itself and j > i else 1
            total += weight * distances.sum(dtype=torch.float64).item()
    return total / (len(a) * len(b))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """E|x - y| - E|x - x'|/2 - E|y - y'|/2 over all pairs (V-statistic), as geomloss' "energy" of uniform weights."""
    return mean_distance(x, y) - (mean_distance(x, x) + mean_distance(y, y)) / 2


def discrimination(predicted: np.ndarray, real: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """1 - rank / P of the true perturbation among all real pseudobulks [P, G] by L1 distance to the predicted one.

    target [P]: column of the perturbed gene, left out of the distances (knocking it down is no finding), -1 for none.
    Equals cell-eval's discrimination_score_l1; ties, arbitrary there, share their mean rank. Chance is (P + 1) / 2P.
    nan where there is nothing to rank: one perturbation (1 in cell-eval), no gene but the target, no prediction.
    """
    score = np.full(len(real), np.nan)
    if len(real) < 2:
        return score
    for p, guess in enumerate(predicted):
        difference = np.abs(real - guess)
        if target is not None and target[p] >= 0:
            difference[:, target[p]] = 0
            if real.shape[1] == 1:
                continue
        distance = difference.sum(1)
        if np.isnan(distance[p]):
            continue
        nearer = (distance < distance[p]).sum()
        tied = (distance == distance[p]).sum() - 1
        score[p] = 1 - (nearer + tied / 2) / len(real)
    return score


def differential_expression(
    x: np.ndarray,
    control: np.ndarray,
    group: np.ndarray | None = None,
    n_groups: int = 1,
) -> dict[str, np.ndarray]:
    """Genes in which groups of cells x [n, G] (log1p) differ from the cells control [m, G].

    Returns arrays [n_groups, G]: p (rank-sum test), adjusted (Benjamini-Hochberg), log_fold_change (base 2, of expm1
    of the means, as pdex does: infinite where one mean is 0, 0 where both are), order (significant genes by falling
    |log_fold_change|, then the others); and significant [n_groups], how many there are.
    """
    from scipy.stats import false_discovery_control  # half a second to import, and only needed here

    if group is None:
        group = np.zeros(len(x), int)
    p = rank_sum(x, control, group, n_groups)
    adjusted = false_discovery_control(p, axis=1)
    significant = adjusted < FALSE_DISCOVERY_RATE

    mean = np.expm1(pseudobulk(x, group, n_groups))
    control_mean = np.expm1(control.mean(0, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(mean / control_mean)
    change[np.isnan(change)] = 0

    rank = np.where(significant, -np.abs(change), np.inf)
    return {
        "p": p,
        "adjusted": adjusted,
        "log_fold_change": change,
        "order": np.argsort(rank, axis=1, kind="stable"),
        "significant": significant.sum(1),
    }


def overlap_top(predicted: dict, real: dict, n: int | None = 50, kind: str = "overlap") -> np.ndarray:
    """Part [P] of the n strongest significant genes that two results of differential_expression share.

    n shrinks to the significant genes there are: real ones for kind "overlap" (recall), predicted ones for
    "precision"; None takes them all (cell-eval's overlap_at_N and precision_at_N).
    nan (0 in cell-eval, or what a smaller n has) where no real gene is significant, for "precision" no predicted one
    either, and for an n beyond the number of genes. To predict none where there are some is 0.
    """
    genes = real["order"].shape[1]
    available = real["significant"] if kind == "overlap" else predicted["significant"]
    share = np.full(len(available), np.nan)
    if n is not None and n > genes:
        return share
    for i, most in enumerate(available):
        if most == 0:
            if real["significant"][i]:
                share[i] = 0  # precision of nothing predicted
            continue
        k = most if n is None else min(n, most)
        predicted_k = min(k, predicted["significant"][i])
        real_k = min(k, real["significant"][i])
        predicted_genes = predicted["order"][i, :predicted_k]
        real_genes = real["order"][i, :real_k]
        shared = np.intersect1d(predicted_genes, real_genes)
        share[i] = len(shared) / k
    return share


# ---------------------------------------------------------------------------------------------------------------
# All metrics of all conditions
# ---------------------------------------------------------------------------------------------------------------
def evaluate_conditions(
    pred: np.ndarray,
    pred_condition: np.ndarray,
    real: np.ndarray,
    real_condition: np.ndarray,
    control: np.ndarray,
    control_type: np.ndarray,
    conditions: list[tuple[str, str]],
    cell_types: list[str],
    baseline_means: dict[str, np.ndarray] | None = None,
    genes: list[str] | None = None,
    expression: bool = True,
    energy_cells: int = 1000,
) -> dict:
    """Every metric of every condition, for the model and each baseline against the same real cells.

    pred [N, G], real [M, G] float32 cells, pred_condition [N] and real_condition [M] codes into conditions, the names
    (cell type, perturbation); control [C, G] real control cells, control_type [C] codes into cell_types;
    baseline_means: name -> [len(conditions), G] as of baselines. genes [G] names: a perturbation that bears a gene's
    name is discriminated without that gene. expression: log1p values, for which there is differential expression.

    Conditions of a cell type are compared with one another and with that type's control, predicted ones too. The cells
    of a baseline are control cells (as many as are real, evenly spaced) shifted by the predicted effect, expression
    clipped at 0; its pearson_delta, mae, mse and discrimination are of the predicted means themselves. A prediction
    without effect is given pearson_delta 0 (nan in cell-eval), for it must not drop out of the mean; where there is no
    real effect, or one gene alone, it is nan. Without control cells of a type there are no effects and no cells of a
    baseline: what needs them is nan. Of more than energy_cells cells the energy distance takes that many, evenly
    spaced.

    Returns {"model" or baseline: {"per_condition": [{cell_type, perturbation, n_cells, metrics}], "mean": {metrics},
    "delta": predicted effects [P, G], "real_delta": real ones [P, G]}}; means weigh conditions the same (see _means).
    Raises DataError for a condition without predicted or real cells.
    """
    _require_cells("predicted", pred_condition, conditions)
    _require_cells("real", real_condition, conditions)
    if pred.shape[1] != real.shape[1]:
        raise DataError(f"predicted cells have {pred.shape[1]} values, measured ones {real.shape[1]}")
    column = {gene: g for g, gene in enumerate(genes or [])}
    target = np.array([column.get(perturbation, -1) for _, perturbation in conditions])
    type_of = np.array([cell_types.index(cell_type) for cell_type, _ in conditions])

    members_by_type = []
    results = []
    for cell_type in np.unique(type_of):
        members = np.flatnonzero(type_of == cell_type)  # the conditions of this type
        base = control[control_type == cell_type]
        code = np.full(len(conditions), -1)  # of a condition, among those of its type
        code[members] = np.arange(len(members))
        means = {}
        for name, mean in (baseline_means or {}).items():
            means[name] = np.asarray(mean, np.float64)[members]
        truth = _describe(real, code[real_condition], base, expression, energy_cells)
        guess = _describe(pred, code[pred_condition], base, expression, energy_cells)
        result = _evaluate_type(
            guess,
            truth,
            base,
            means,
            conditions=[conditions[c] for c in members],
            target=target[members],
            expression=expression,
            energy_cells=energy_cells,
        )
        members_by_type.append(members)
        results.append(result)

    # Back into the order of `conditions`.
    order = np.argsort(np.concatenate(members_by_type))
    joined = join(results)
    for result in joined.values():
        records = result["per_condition"]
        result["per_condition"] = [records[i] for i in order]
        result["delta"] = result["delta"][order]
        result["real_delta"] = result["real_delta"][order]
    return joined


def _require_cells(what: str, codes: np.ndarray, conditions: list[tuple[str, str]]) -> None:
    """Raises DataError for a condition that none of the codes names."""
    absent = np.setdiff1d(np.arange(len(conditions)), codes)
    if len(absent):
        condition = ", ".join(conditions[absent[0]])
        raise DataError(f"condition ({condition}) has no {what} cells: leave it out")


def _evaluate_type(
    guess: dict,
    truth: dict,
    base: np.ndarray,
    means: dict,
    conditions: list[tuple[str, str]],
    target: np.ndarray,
    expression: bool,
    energy_cells: int,
) -> dict:
    """The result of evaluate_conditions for the conditions of one cell type, base its control cells."""
    control_mean = pseudobulk(base, np.zeros(len(base), int), 1)[0]  # nan without control cells
    guesses = {"model": guess}
    for name, mean in means.items():
        guesses[name] = _describe_baseline(mean, base, control_mean, truth["n"], expression, energy_cells)

    results = {}
    for name, guess in guesses.items():
        metrics = _compare(guess, truth, control_mean, target, expression)
        records = []
        for i, (cell_type, perturbation) in enumerate(conditions):
            record = {
                "cell_type": cell_type,
                "perturbation": perturbation,
                "n_cells": truth["n"][i],
            }
            for metric, values in metrics.items():
                record[metric] = float(values[i])
            records.append(record)
        results[name] = {
            "per_condition": records,
            "delta": guess["mean"] - control_mean,
            "real_delta": truth["mean"] - control_mean,
        }
    return results


def _describe_baseline(
    mean: np.ndarray,
    base: np.ndarray,
    control_mean: np.ndarray,
    sizes: list[int],
    expression: bool,
    energy_cells: int,
) -> dict:
    """_describe of a baseline's conditions: it knows means only, its cells are control cells moved by its effect."""
    if not len(base) or np.isnan(mean).any():  # of one context all means are known, or none
        return {"mean": mean, "sets": None, "genes": None}
    cells = _shifted(base, mean - control_mean, sizes)
    if expression:
        cells = cells.clip(min=0)
    group = np.repeat(np.arange(len(sizes)), sizes)
    description = _describe(cells, group, base, expression, energy_cells)
    description["mean"] = mean  # exact, where that of the cells is clipped and rounded
    return description


def _shifted(base: np.ndarray, shifts: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Control cells shifted by each of the effects [P, G], as many as sizes say."""
    shifts = shifts.astype(base.dtype)
    shifts[np.abs(shifts) < ROUNDING] = 0  # rounding would lift all zeros, which the ranks would see
    sets = []
    for n, shift in zip(sizes, shifts, strict=True):
        rows = np.arange(n) * len(base) // n  # evenly spaced, and again where there are fewer than n
        sets.append(base[rows] + shift)
    return np.concatenate(sets)


def _describe(
    cells: np.ndarray,
    group: np.ndarray,
    control: np.ndarray,
    expression: bool,
    energy_cells: int,
) -> dict:
    """What the metrics need to know of the groups of cells 0..; a negative code is another cell type's."""
    ours = group >= 0
    cells = cells[ours]
    group = group[ours]
    rows = rows_by_group(group, group.max() + 1)
    sets = []  # of the energy distance
    for members in rows:
        places = evenly(len(members), energy_cells)
        sets.append(cells[members[places]])
    genes = None
    if expression and len(control):
        genes = differential_expression(cells, control, group, len(rows))
    return {
        "n": [len(members) for members in rows],
        "sets": sets,
        "within": np.array([mean_distance(members, members) for members in sets]),
        "mean": pseudobulk(cells, group, len(rows)),
        "genes": genes,
    }


def _compare(
    guess: dict,
    truth: dict,
    control_mean: np.ndarray,
    target: np.ndarray,
    expression: bool,
) -> dict[str, np.ndarray]:
    """All metrics [P] of the conditions of a cell type, nan where undefined; guess and truth by _describe."""
    effect = guess["mean"] - control_mean
    real_effect = truth["mean"] - control_mean
    error = guess["mean"] - truth["mean"]
    undefined = np.full(len(error), np.nan)

    # To predict no effect where there is one is worth nothing, and must not drop out of the mean as nan.
    r = pearson(effect, real_effect)
    flat = np.ptp(effect, axis=1) < ROUNDING
    real = np.ptp(real_effect, axis=1) >= ROUNDING
    r[flat] = 0
    r[~real] = np.nan  # no effect, one gene, or no control cells

    metrics = {
        "pearson_delta": r,
        "mae": np.abs(error).mean(1),
        "mse": (error**2).mean(1),
        "discrimination": discrimination(guess["mean"], truth["mean"], target),
    }
    if expression:
        for kind in ("overlap", "precision"):
            for n in TOPS:
                name = f"{kind}_at_{n or 'N'}"
                metrics[name] = undefined
                if truth["genes"] and guess["genes"]:
                    metrics[name] = overlap_top(guess["genes"], truth["genes"], n, kind)
    metrics["energy_distance"] = undefined
    if guess["sets"]:
        pairs = zip(guess["sets"], truth["sets"], strict=True)
        between = np.array([mean_distance(predicted, measured) for predicted, measured in pairs])
        metrics["energy_distance"] = between - (guess["within"] + truth["within"]) / 2
    return metrics


def _shared(results: dict, metric: str) -> np.ndarray:
    """The conditions for which all of model and baselines have a metric, bool [P].

    Who has it for no condition has no say in that.
    """
    shared = np.ones(len(results["model"]["per_condition"]), bool)
    for result in results.values():
        values = np.array([record[metric] for record in result["per_condition"]])
        if not np.isnan(values).all():
            shared &= ~np.isnan(values)
    return shared


def _means(results: dict) -> dict[str, dict[str, float]]:
    """The mean of every metric for the model and each baseline, over the conditions for which all of them have it.

    Who has a metric for no condition has no mean (nan); nobody has one where no condition is left.
    """
    means = {name: {} for name in results}
    metrics = [name for name in results["model"]["per_condition"][0] if name not in LABELS]
    for metric in metrics:
        shared = _shared(results, metric)
        for name, result in results.items():
            values = np.array([record[metric] for record in result["per_condition"]])
            of_shared = values[shared]
            means[name][metric] = float(of_shared.mean()) if of_shared.size else math.nan
    return means


def join(results: list[dict]) -> dict:
    """One result of evaluate_conditions of those of several contexts."""
    joined = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        records = []
        for part in parts:
            records.extend(part["per_condition"])
        joined[name] = {
            "per_condition": records,
            "delta": np.concatenate([part["delta"] for part in parts]),
            "real_delta": np.concatenate([part["real_delta"] for part in parts]),
        }
    for name, means in _means(joined).items():
        joined[name]["mean"] = means
    return joined


def evaluate_context(part: dict, cells, known: Baselines | None, which: str, expression: bool) -> dict:
    """evaluate_conditions of the predicted cells of one type of one file, beside the baselines where they are known.

    part: file, cell_type (codes), rows (of the cells predicted), pred and real [N, G], control [C, G]; cells: a Cells
    of sources.cells; which: "input" or "counts", what pred is. Records also name the data set and the file.
    """
    perturbations, condition = np.unique(cells.perturbation[part["rows"]], return_inverse=True)
    cell_type = cells.cell_types[part["cell_type"]]
    means = {}
    if known:
        context = part["file"], part["cell_type"]
        held_out = [(context, int(perturbation)) for perturbation in perturbations]
        means = known.predict(held_out, part["real"].shape[1])
    results = evaluate_conditions(
        pred=part["pred"],
        pred_condition=condition,
        real=part["real"],
        real_condition=condition,
        control=part["control"],
        control_type=np.zeros(len(part["control"]), int),
        conditions=[(cell_type, cells.perturbations[pert]) for pert in perturbations],
        cell_types=[cell_type],
        baseline_means=means,
        genes=cells.genes if which == "input" else cells.count_genes,
        expression=expression,
    )
    place = {
        "dataset": cells.names[part["file"]],
        "file": cells.files[part["file"]].name,
    }
    for result in results.values():
        result["per_condition"] = [place | record for record in result["per_condition"]]
    return results


# ---------------------------------------------------------------------------------------------------------------
# Tables, words and pictures
# ---------------------------------------------------------------------------------------------------------------
def is_defined(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def best_of(metric: str, values: dict[str, float | None]) -> str | None:
    """The name of the best value of a metric, of those that are defined; None where none is."""
    defined = {name: value for name, value in values.items() if is_defined(value)}
    choose = max if METRICS[metric] else min
    return choose(defined, key=defined.get, default=None)


def best_baseline(results: dict, metric: str = "pearson_delta") -> str | None:
    """The baseline to beat: the name of the best of all but the model; None where none has the metric."""
    rivals = {name: result["mean"][metric] for name, result in results.items() if name != "model"}
    return best_of(metric, rivals)


def format_table(results: dict) -> str:
    """The means of evaluate_conditions as aligned text, a row the model and each baseline; * marks a column's best.

    - stands for what is not defined; a metric that nobody has is no column.
    """
    best = {}  # of each column
    for metric in METRICS:
        values = {name: result["mean"].get(metric) for name, result in results.items()}
        winner = best_of(metric, values)
        if winner:
            best[metric] = values[winner]

    longest = max(map(len, results))
    width = {metric: max(len(metric), 8) for metric in best}  # all six fit into 100 columns
    lines = [" " * longest + "".join(f" {metric:>{width[metric]}} " for metric in best)]
    for name, result in results.items():
        line = f"{name:<{longest}}"
        for metric in best:
            value = result["mean"].get(metric)
            text = f"{value:.4g}" if is_defined(value) else "-"
            mark = "*" if value == best[metric] else " "
            line += f" {text:>{width[metric]}}{mark}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def table_of(summary: dict) -> str:
    """The same of what summary.json says."""
    means = {"model": summary} | summary.get("baselines", {})
    return format_table({name: {"mean": metrics} for name, metrics in means.items()})


def verdict(means: dict) -> str:
    """The result of a run in a sentence: whether the model is better than knowing means. means: as in summary.json."""
    conditions = means["conditions"]
    held_out = counted(conditions, "held-out condition")
    judged_on = means.get("conditions_judged", conditions)
    if 0 < judged_on < conditions:
        held_out = f"{judged_on} of {held_out}"
    correlation = means["pearson_delta"]
    correlations = {name: values["pearson_delta"] for name, values in means["baselines"].items()}
    best = best_of("pearson_delta", correlations)
    is_worse, on_error = _verdict_on_error(means)
    if not is_defined(correlation):
        line = f"nothing to judge on {held_out}: Pearson delta needs an effect, control cells and several genes"
    elif best is None:
        line = f"no baseline to compare with on {held_out}: Pearson delta {correlation:.4f}"
    else:
        judged = f"DOES NOT BEAT the baseline {best}"
        if correlation > correlations[best]:
            all_known = all(map(is_defined, correlations.values()))
            judged = "beats every baseline" if all_known else "beats every baseline that has a figure"
            if is_worse:
                judged += " by Pearson delta alone"
        line = (
            f"the model {judged} on {held_out}: "
            f"Pearson delta {correlation:.4f}, best baseline {correlations[best]:.4f} ({best})"
        )
    return line + on_error


def _verdict_on_error(means: dict) -> tuple[bool, str]:
    """Whether the mean absolute error is no better than a baseline's, and the part of the verdict on it, which may be
    defined where correlation is not."""
    error = means["mae"]
    if not is_defined(error):
        return False, ""
    errors = {name: values["mae"] for name, values in means["baselines"].items()}
    nearest = best_of("mae", errors)
    if nearest is None:
        return False, f"; MAE {error:.4f}"
    is_worse = error >= errors[nearest]
    worse = " (worse)" if is_worse else ""
    return is_worse, f"; MAE {error:.4f}{worse}, best baseline {errors[nearest]:.4f} ({nearest})"


def write_metrics(path: Path, results: dict) -> None:
    """A CSV of all metrics, a row for each condition under the model and under each baseline; undefined is blank."""
    rows = []
    for name, result in results.items():
        for record in result["per_condition"]:
            row = {"model": name}
            for column, value in record.items():
                is_blank = column not in LABELS and not is_defined(value)
                row[column] = "" if is_blank else value
            rows.append(row)
    with replacing(path) as fresh, open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_results(folder: Path, name: str, results: dict) -> dict:
    """metrics.csv, results.json and plots of what evaluate_conditions returns; returns the numbers of summary.json.

    What is undefined is null in results.json, and None in what is returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(folder / "metrics.csv", results)
    saved = {}
    means = {}
    for rival, result in results.items():
        saved[rival] = {"mean": result["mean"], "per_condition": result["per_condition"]}
        means[rival] = {}
        for metric, value in result["mean"].items():
            means[rival][metric] = value if is_defined(value) else None
    write_json(folder / "results.json", saved)
    judged = _shared(results, "pearson_delta")
    conditions = len(judged)
    with doing("drawing pictures"):
        plot_metrics(folder, f"{name}: {counted(conditions, 'held-out condition')}", results)
    model = means.pop("model")
    numbers = {"conditions": conditions, "conditions_judged": int(judged.sum())}
    summary = model | {"baselines": means} | numbers
    return summary | {"verdict": verdict(summary)}


def plot_metrics(folder: Path, title: str, results: dict, most: int = 40) -> None:
    """plots/delta.png, metrics.png, METRIC_by_perturbation.png of several conditions, and loss.png (metrics.jsonl).

    Of many conditions 12 and `most` are shown, evenly spaced from the best to the worst. Of a metric that the model has
    for no condition there is no picture.
    """
    types = {record["cell_type"] for record in results["model"]["per_condition"]}
    if len(types) == 1:  # then the names of conditions leave it out
        title = f"{title} of {min(types)}"
    plot_effects(folder, title, results)
    plot_means(folder, title, results)
    for metric in METRICS:
        plot_by_perturbation(folder, title, results, metric, most)
    plot_losses(folder)


def _ranked(records: list[dict], metric: str, most: int) -> np.ndarray:
    """Places of at most so many conditions, from the best to the worst, without those that lack the metric."""
    values = np.array([record.get(metric, math.nan) for record in records])
    if METRICS[metric]:
        values = -values
    order = np.argsort(values, kind="stable")  # nan comes last
    order = order[: np.count_nonzero(~np.isnan(values))]
    count = min(most, len(order))
    if not count:
        return order
    places = np.linspace(0, len(order) - 1, count)
    return order[places.round().astype(int)]


def _labels(records: list[dict]) -> list[str]:
    """Names of conditions, with the cell type where there are several, and with the file where two have one name."""
    types = {record["cell_type"] for record in records}
    labels = []
    for record in records:
        kind = f"{short(record['cell_type'], 24)}, " if len(types) > 1 else ""
        labels.append(kind + short(record["perturbation"], 36))
    if len(set(labels)) == len(labels):
        return labels
    longer = []
    for label, record in zip(labels, records, strict=True):
        longer.append(f"{record['dataset']} {record['file']}: {label}")
    return longer


def _part_shown(shown: np.ndarray, labels: list[str]) -> str:
    """What a title says where not all conditions are in the picture."""
    return f", {len(shown)} shown, best to worst" if len(shown) < len(labels) else ""


def plot_effects(folder: Path, title: str, results: dict, most: int = 12) -> None:
    """plots/delta.png: true against predicted effect of every gene, a panel each condition, and the best baseline's."""
    model, rival = results["model"], best_baseline(results)
    shown = _ranked(model["per_condition"], "pearson_delta", most)
    if not len(shown):
        return
    labels = _labels(model["per_condition"])
    title += _part_shown(shown, labels)
    size, in_a_row = next(layout for count, layout in PANELS.items() if len(shown) <= count)
    title = f"{title}: mean change of each gene from control cells"
    with panels(folder, "delta", len(shown), size, size + 0.3, title, in_a_row) as axes:
        row = None
        for panel, c in zip(axes, shown, strict=True):
            true = model["real_delta"][c]
            predicted = {"model": model["delta"][c]}
            if rival and is_defined(results[rival]["delta"][c].sum()):
                predicted = {rival: results[rival]["delta"][c], **predicted}
            panel.axline((0, 0), slope=1, color=GREY, linewidth=0.6)
            for name, effect in predicted.items():
                is_ours = name == "model"
                panel.plot(
                    true,
                    effect,
                    "o" if is_ours else "^",
                    color=COLOURS[0] if is_ours else COLOURS[1],
                    markersize=max(2.6, size * 0.8),
                    markeredgewidth=0,
                    alpha=0.9 if is_ours else 0.6,
                    label=name if is_ours else f"{name}, the best baseline",
                )
            # One scale for both: on the diagonal the prediction is right.
            least = min(true.min(), *(effect.min() for effect in predicted.values()))
            top = max(true.max(), *(effect.max() for effect in predicted.values()))
            margin = 0.05 * (top - least)
            limits = (least - margin, top + margin)
            panel.set(xlim=limits, ylim=limits, aspect="equal")
            panel.locator_params(nbins=5)
            panel.set_title(f"{labels[c]}\nr = {model['per_condition'][c]['pearson_delta']:.3f}")
            place = panel.get_subplotspec()
            if place.rowspan.start != row:
                panel.set_ylabel("predicted")
            if place.is_last_row():
                panel.set_xlabel("measured")
            row = place.rowspan.start
        handles, names = axes[0].get_legend_handles_labels()
        legend_below(axes[0].figure, handles[::-1], names[::-1])


def short(name: str, signs: int) -> str:
    """A name of at most so many signs: its begin and its end, which tell it from its likes."""
    return name if len(name) <= signs else f"{name[: signs // 2 - 1]} ... {name[3 - signs // 2 :]}"


def plot_means(folder: Path, title: str, results: dict) -> None:
    """plots/metrics.png: the means of model and baselines, a panel each metric that there is."""
    means = {name: result["mean"] for name, result in results.items()}
    metrics = [metric for metric in METRICS if is_defined(means["model"].get(metric))]
    if not metrics:
        return
    with panels(folder, "metrics", len(metrics), 3.0, 1.0 + 0.25 * len(means), title) as axes:
        for panel, metric in zip(axes, metrics, strict=True):
            for line, (name, mean) in enumerate(means.items()):
                if is_defined(mean[metric]):
                    style = {"color": COLOURS[0]} if name == "model" else RING
                    panel.plot([mean[metric]], [line], "o", markersize=6, **style)
            panel.set_yticks(range(len(means)), means)
            panel.set_ylim(len(means) - 0.5, -0.5)  # the model on top
            panel.margins(x=0.15)
            panel.locator_params(axis="x", nbins=5)
            panel.set_title(metric)
            panel.set_xlabel(f"{'larger' if METRICS[metric] else 'smaller'} is better")


def plot_by_perturbation(folder: Path, title: str, results: dict, metric: str, most: int) -> None:
    """plots/METRIC_by_perturbation.png: the model beside the best baseline, if there is one, a line each condition.

    Of one condition metrics.png says it all.
    """
    records = results["model"]["per_condition"]
    shown = _ranked(records, metric, most)
    if len(shown) < 2:
        return
    labels = _labels(records)
    title += _part_shown(shown, labels)
    rival = best_baseline(results, metric)
    lines = range(len(shown))
    # Rings for the rival, drawn first, so that both are seen where they agree.
    ring = RING | {"markersize": 8, "label": f"{rival} (best baseline)"}
    dot = {"color": COLOURS[0], "label": "model"}
    with figure(folder, f"{metric}_by_perturbation", 7, 1.5 + 0.17 * len(shown), title=title) as axes:
        for name, style in ((rival, ring), ("model", dot)):
            if name is None:
                continue
            conditions = results[name]["per_condition"]
            values = [conditions[c][metric] for c in shown]
            axes.plot(values, lines, "o", **style)
        axes.set_yticks(lines, [labels[c] for c in shown], fontsize=7)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        better = "larger" if METRICS[metric] else "smaller"
        axes.set_xlabel(f"{metric} ({better} is better)")
        legend_below(axes.figure, *axes.get_legend_handles_labels())


def plot_losses(folder: Path) -> None:
    """plots/loss.png: training and validation loss by step, where metrics.jsonl has them."""
    history = read_metrics(folder)
    curves = {}
    for split, key, label in (("train", "loss", "training"), ("eval", "val_loss", "validation")):
        points = [(record["step"], record[key]) for record in history if record["split"] == split and key in record]
        if points:
            curves[label] = tuple(zip(*points, strict=True))
    if not curves:
        return
    with figure(folder, "loss") as axes:
        for label, (steps, losses) in curves.items():
            curve(axes, steps, losses, label)
        axes.set(xlabel="step", ylabel="loss (distance between sets)")
        if spans([loss for _, losses in curves.values() for loss in losses]):
            plain_log(axes, "y")
        legend(axes)
