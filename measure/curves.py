"""Cross entropy (XE) by position in the context: curves of documents, their intervals, gains, fits, oracles, the probe.

Position t = 1..T is the prediction made after t tokens. Everything is in nats.
"""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import DataError, replacing
from common.telling import bar, doing
from measure.figures import (
    GREY,
    band,
    curve,
    curve_with_optimum,
    figure,
    in_order,
    legend,
    legend_below,
    look,
    plain_log,
)
from sources.ergodic import mixture_log_prob
from sources.shared import counter_rng

TOGETHER = ("seen", "unseen")  # groups of categories, beside each category by its name
PROBED = (1, 2, 3, 5, 8, 12, 20, 35, 60)  # positions of the probe, and the last
REPORTED = (1, 2, 5, 10, 20, 50)  # positions of documents.npz, and the last
EARLY = 10  # position that the in-context score starts from
ALPHAS = (0.01, 8.0)  # exponents that a fit looks among
LEAST_FALL = 1e-4  # nats from the first position to the last: a curve that falls by less is flat, and has no fit
MOST_INSIDE = 9  # names of a legend inside of a picture
LEAST_OPTIMUM = 1e-6  # nats: a ratio to less says nothing


class Curves(NamedTuple):
    """XE by position of M documents, the unit of all statistics: chunks of one document are not independent.

    sums [M, T] over the chunks of each document, counts of its chunks [M], its category as a number [M].
    """

    sums: np.ndarray
    counts: np.ndarray
    codes: np.ndarray

    def mean(self, code: int) -> np.ndarray:
        """XE by position of a category, a mean over chunks, [T]."""
        chosen = self.codes == code
        return self.sums[chosen].sum(0) / self.counts[chosen].sum()

    def mean_of(self, codes: list[int]) -> np.ndarray:
        """XE by position of several categories, which count alike, [T]."""
        return np.mean([self.mean(code) for code in codes], 0)

    def resampled(self, code: int, resamples: int, seed: int) -> np.ndarray:
        """The mean of as many documents drawn with replacement, [resamples, T]: the bootstrap over documents.

        nan of a single document, whose mean would never vary: an interval without width would look like certainty.
        """
        chosen = np.flatnonzero(self.codes == code)
        M = len(chosen)
        if M < 2:
            return np.full((resamples, self.sums.shape[1]), np.nan)
        equal = np.full(M, 1 / M)
        rng = counter_rng(seed, 4, code)
        means = np.empty((resamples, self.sums.shape[1]))
        for begin in bar(range(0, resamples, 100), f"resampling {M:,} documents {resamples:,} times"):
            block = means[begin : begin + 100]
            draws = rng.multinomial(M, equal, len(block))  # how often each document is drawn, [100, M]
            totals = draws @ self.sums[chosen]
            chunks = draws @ self.counts[chosen]
            block[:] = totals / chunks[:, None]
        return means


def curves_of(xe: np.ndarray, codes: np.ndarray, documents: np.ndarray) -> Curves:
    """Curves from the XE of chunks [R, T], the category [R] and the document [R] of each."""
    names, place = np.unique(documents, return_inverse=True)
    sums = np.zeros((len(names), xe.shape[1]))
    np.add.at(sums, place, xe)
    document_codes = np.zeros(len(names), dtype=np.int64)
    document_codes[place] = codes
    return Curves(sums, np.bincount(place), document_codes)


def oracle_curves(
    log_prob: np.ndarray,
    codes: np.ndarray,
    documents: np.ndarray,
    active: list[int],
) -> tuple[Curves, Curves]:
    """The exact predictors: of the uniform mixture of the active components, and of the known one.

    Args:
        log_prob: log p_k(x_t | x_<t) of each of the K components, [R, K, n].
        codes: the true component of each chunk [R]. documents [R].
    """
    log_prob = log_prob.astype(np.float64)
    mixture = mixture_log_prob(log_prob[:, active])  # [R, n]
    component = codes.astype(np.int64)[:, None, None]
    known = np.take_along_axis(log_prob, component, 1)[:, 0]  # [R, n]
    # without the first token of a chunk: a model predicts from the second on
    mixture_curves = curves_of(-mixture[:, 1:], codes, documents)
    known_curves = curves_of(-known[:, 1:], codes, documents)
    return mixture_curves, known_curves


# ---------------------------------------------------------------------------------------------------------------
# Statistics of curves [..., T]
# ---------------------------------------------------------------------------------------------------------------
def gains(xe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(XE(first) - XE(last), sum over t of XE(t) - XE(last)): what the context is worth, at its end and in total."""
    last = xe[..., -1:]
    gain = xe[..., 0] - xe[..., -1]
    total = (xe - last).sum(-1)
    return gain, total


def score_positions(early: int | None, late: int | None, T: int) -> tuple[int, int] | None:
    """The two positions of the in-context score, by default 10 and T; None in a context of one prediction.

    In a context of 10 or less the early one is by default half of it. Raises DataError for positions that are not
    1 <= early < late <= T.
    """
    if T < 2 and early is None and late is None:
        return None
    late = T if late is None else late
    if early is None:
        early = EARLY if late > EARLY else max(1, late // 2)
    if not 1 <= early < late <= T:
        raise DataError(
            f"icl_early = {early}, icl_late = {late}: the in-context score is between two positions, the first before "
            f"the second, of the {T} that predict"
        )
    return early, late


def reported_positions(T: int) -> list[int]:
    """Positions of tables and of documents.npz, of a context of T."""
    return sorted({position for position in (*REPORTED, T) if position <= T})


def score(xe: np.ndarray, early: int, late: int) -> np.ndarray:
    """The in-context score of curves [..., T]: XE(late) - XE(early), negative where context helps.

    Olsson et al. 2022, "In-context Learning and Induction Heads": there between tokens 500 and 50.
    """
    return xe[..., late - 1] - xe[..., early - 1]


def gain_definition(T: int) -> str:
    """What icl_gain is, for everything that shows it."""
    return f"XE after 1 token less XE after {T}, in nats"


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The central 95% of samples [resamples, ...]."""
    low, high = np.quantile(samples, (0.025, 0.975), axis=0)
    return low, high


def binned(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean positions, means) over bins that grow with the position: single late positions are noisy."""
    T = curves.shape[-1]
    edges = np.geomspace(1, T + 1, 24).round().astype(int)
    edges = np.unique(edges)  # early bins are narrower than a position
    positions = []
    means = []
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        positions.append((first + end - 1) / 2)
        means.append(curves[..., first - 1 : end - 1].mean(-1))
    return np.array(positions), np.stack(means, -1)


def fit_power_law(xe: np.ndarray) -> np.ndarray:
    """Least-squares (XE_inf, c, alpha) of XE(t) = XE_inf + c t^-alpha, t = 1..T, for curves [..., T] -> [..., 3].

    Given alpha the rest is linear (variable projection), so alpha alone is searched, on a grid that is refined four
    times. scipy.optimize.curve_fit agrees, but fits one curve at a time (200 resamples of each category would take
    longer than the evaluation) and needs a start that is near: from far, it ends in a local minimum.
    """
    xe = np.asarray(xe, dtype=np.float64)
    T = xe.shape[-1]
    t = np.arange(1, T + 1)
    flat = xe.reshape(-1, T)
    n_curves = len(flat)
    y = flat - flat.mean(-1, keepdims=True)
    y = y[:, None]  # [curves, 1, T]
    grid = np.linspace(0, 1, 41)
    least, most = ALPHAS
    low = np.full(n_curves, least)
    high = np.full(n_curves, most)
    for _ in range(5):
        alphas = low[:, None] + (high - low)[:, None] * grid  # [curves, 41]
        # Regression of the curve on t^-alpha, for every alpha of the grid: the slope is c, XE_inf drops out.
        x = t ** -alphas[..., None]  # [curves, 41, T]
        x -= x.mean(-1, keepdims=True)
        slopes = (x * y).sum(-1) / (x**2).sum(-1)
        residual = y - slopes[..., None] * x
        error = (residual**2).sum(-1)  # [curves, 41]
        best = np.arange(n_curves), error.argmin(-1)
        alpha = alphas[best]
        c = slopes[best]
        # The next grid is between the neighbours of the best, 20 times finer.
        step = (high - low) / 40
        low = np.maximum(least, alpha - step)
        high = np.minimum(most, alpha + step)
    powers = t ** -alpha[:, None]
    infinity = flat.mean(-1) - c * powers.mean(-1)
    fits = np.stack([infinity, c, alpha], -1)
    return fits.reshape(*xe.shape[:-1], 3)


def is_fit(fits: np.ndarray, T: int) -> np.ndarray:
    """Whether (XE_inf, c, alpha) [..., 3] say anything of a curve over T positions: [...].

    Not where the search ended at a bound (the best exponent is further out), where the curve does not fall, or where it
    would fall below 0, which no cross entropy does.
    """
    infinity, c, alpha = np.moveaxis(np.asarray(fits, dtype=np.float64), -1, 0)
    least, most = ALPHAS
    inside = (alpha > least * (1 + 1e-9)) & (alpha < most * (1 - 1e-9))
    fall = c * (1 - float(T) ** -alpha)  # from the first position to the last
    return inside & (fall > LEAST_FALL) & (infinity >= 0)


def describe_fit(mean: np.ndarray, samples: np.ndarray) -> dict | None:
    """The power law of a curve [T] with intervals from its resamples [resamples, T]; None where there is no fit.

    There is none, either, where more than 5% of the resamples have none: what a curve of noise gives is chance.
    """
    T = len(mean)
    if T < 4 or not len(samples):  # three parameters go through any three points
        return None
    fit = fit_power_law(mean)
    fits = fit_power_law(samples[:200])  # 200 are enough for an interval
    good = is_fit(fits, T)
    if not is_fit(fit, T) or good.mean() < 0.95:
        return None
    parameters = {}
    for i, name in enumerate(("xe_inf", "c", "alpha")):
        parameters[name] = {"value": float(fit[i]), "interval": listed(interval(fits[good, i]))}
    return parameters


# ---------------------------------------------------------------------------------------------------------------
# What results.json says
# ---------------------------------------------------------------------------------------------------------------
def measure(
    curves: Curves,
    names: list[str],
    active: list[str],
    oracle: tuple[Curves, Curves] | None,
    resamples: int,
    seed: int,
    early: int | None = None,
    late: int | None = None,
) -> dict:
    """The XE by position of each category, of the active ones together ("seen") and of the others ("unseen").

    Categories count alike where they are together. Intervals are 95%, by the bootstrap over documents.

    Args:
        names: of all categories, in the order of their numbers. oracle: what oracle_curves gave, where it is known.
        early, late: of the in-context score, as score_positions has them. It raises DataError.
    """
    positions = score_positions(early, late, curves.sums.shape[1])
    present = [name for code, name in enumerate(names) if (curves.codes == code).any()]
    samples = {}
    groups = {}
    for name in present:
        samples[name] = curves.resampled(names.index(name), resamples, seed)
        groups[name] = [name]
    groups["seen"] = active
    unseen = [name for name in present if name not in active]
    if unseen:
        groups["unseen"] = unseen

    results = {}
    for group, members in bar(groups.items(), f"intervals and fits of {len(groups)} curves", len(groups)):
        codes = [names.index(name) for name in members]
        mean = curves.mean_of(codes)
        group_samples = np.mean([samples[name] for name in members], 0)
        results[group] = describe_curve(mean, group_samples)
        results[group]["icl_score"] = positions and describe_score(mean, group_samples, *positions)
        if oracle and set(members) <= set(active):  # the exact predictor of a mixture of other components is another
            mixture, known = oracle
            results[group] |= describe_excess(mean, mixture.mean_of(codes), known.mean_of(codes))
    return results


def describe_curve(mean: np.ndarray, samples: np.ndarray) -> dict:
    """Mean, perplexity, gains and fit of a curve [T], with intervals from its resamples [resamples, T]."""
    low, high = interval(samples)
    gain, total = gains(mean)
    gain_samples, total_samples = gains(samples)
    _, binned_samples = binned(samples)
    return {
        "xe": float(mean.mean()),
        "xe_interval": listed(interval(samples.mean(1))),
        "perplexity": perplexity(mean.mean()),
        "xe_by_position": mean.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "binned_interval": listed(interval(binned_samples)),
        "icl_gain": float(gain),
        "icl_gain_interval": listed(interval(gain_samples)),
        "total_gain": float(total),
        "total_gain_interval": listed(interval(total_samples)),
        "fit": describe_fit(mean, samples),
    }


def describe_score(mean: np.ndarray, samples: np.ndarray, early: int, late: int) -> dict:
    """The in-context score of a curve [T], with its interval from resamples [resamples, T]."""
    return {
        "value": float(score(mean, early, late)),
        "interval": listed(interval(score(samples, early, late))),
        "early": early,
        "late": late,
    }


def perplexity(xe: float) -> float | None:
    """exp(XE); None where that is beyond double precision."""
    return math.exp(xe) if xe < 700 else None


def describe_excess(mean: np.ndarray, mixture: np.ndarray, known: np.ndarray) -> dict:
    """A curve [T] beside those of the exact predictors, [T] each.

    largest_relative_excess is None where the optimum is 0 at a position, as a constant component's is: nats remain.
    """
    excess = mean - mixture
    relative = None
    if mixture.min() > LEAST_OPTIMUM:
        relative = float(np.abs(excess / mixture).max())
    gain, _ = gains(mixture)
    return {
        "oracle_xe_by_position": mixture.tolist(),
        "known_xe_by_position": known.tolist(),
        "excess_by_position": excess.tolist(),
        "oracle_icl_gain": float(gain),
        "largest_excess": float(np.abs(excess).max()),
        "largest_relative_excess": relative,
    }


def information(log_prob: np.ndarray, codes: np.ndarray, active: list[int]) -> dict:
    """What a chunk tells of its component, in nats: the sum over its tokens of (XE of the mixture - XE of the known).

    Over all n tokens that is I(component; chunk), log p_k(x) - log(1/K sum_j p_j(x)) on average, at most log K. Over
    the T predictions that a model makes it is less by what the first token tells, which nobody predicts.

    Args:
        log_prob: log p_k(x_t | x_<t) of every component, [R, all components, n]. codes: the true one of each chunk [R].
        active: the components of the mixture, each of which has a chunk and counts alike.
    """
    log_prob = log_prob[:, active].astype(np.float64)  # [R, K, n]
    document = []
    predictions = []
    for k, code in enumerate(active):
        own = log_prob[codes == code]
        told = pointwise_information(own.sum(-1), k).mean()
        document.append(told)
        predictions.append(told - pointwise_information(own[..., 0], k).mean())
    return {
        "document": float(np.mean(document)),
        "predictions": float(np.mean(predictions)),
        "log_K": math.log(len(active)),
    }


def pointwise_information(log_prob: np.ndarray, k: int) -> np.ndarray:
    """log p_k(x) - log(1/K sum_j p_j(x)) of each x, [R], from log p_j(x) [R, K]."""
    mixture = np.logaddexp.reduce(log_prob, axis=1) - math.log(log_prob.shape[1])
    return log_prob[:, k] - mixture


def summarize(groups: dict, split: str = "validation", val_xe: float | None = None) -> dict:
    """What summary.json takes over of `measure`: of the categories trained on, and the XE of the others.

    split: what was measured on, "validation" or "test"; of a test val_xe is the XE on validation, by which the weights
    were chosen.
    """
    seen = groups["seen"]
    fit = None
    if seen["fit"]:
        fit = {name: parameter["value"] for name, parameter in seen["fit"].items()}
    xe = {"val_xe": seen["xe"]}
    if split == "test":
        xe = {"val_xe": val_xe, "test_xe": seen["xe"]}
    summary = {
        **xe,
        "final_split": split,
        "perplexity": seen["perplexity"],
        "icl_gain": seen["icl_gain"],
        "icl_gain_definition": gain_definition(len(seen["xe_by_position"])),
        "total_gain": seen["total_gain"],
        "icl_score": seen["icl_score"] and seen["icl_score"]["value"],
        "xe_by_position": seen["xe_by_position"],
        "fit": fit,
    }
    for key in ("oracle_xe_by_position", "oracle_icl_gain", "largest_excess", "largest_relative_excess"):
        if key in seen:
            summary[key] = seen[key]
    if "unseen" in groups:
        summary["unseen_xe"] = groups["unseen"]["xe"]
    return summary


def verdict(summary: dict, K: int) -> str:
    """The result of a run in a sentence, of what is defined: summary as `summarize` makes it."""
    xe = f"validation XE {summary['val_xe']:.4f} nats over K = {K}"
    if "test_xe" in summary:
        xe = f"test XE {summary['test_xe']:.4f} nats over K = {K} (validation {summary['val_xe']:.4f})"
    gain = f"icl_gain {summary['icl_gain']:.4f} ({summary['icl_gain_definition']}"
    if "oracle_icl_gain" in summary:
        gain += f"; the exact optimum gains {summary['oracle_icl_gain']:.4f}"
    parts = [f"{xe}, the cross entropy of the next token", gain + ")"]
    if summary.get("largest_relative_excess") is not None:
        parts.append(f"at most {summary['largest_relative_excess']:.2%} from the optimum at any position")
    elif "largest_excess" in summary:  # percent of an optimum that is 0 somewhere are none
        parts.append(f"at most {summary['largest_excess']:.4f} nats from the optimum at any position")
    parts.append(fit_sentence(summary["fit"]))
    return "; ".join(parts)


def fit_sentence(fit: dict | None) -> str:
    """A fit, parameters by their names, or that there is none."""
    if fit is None:
        return "no fit of a power law to XE by position"
    return f"after t tokens XE is about {fit['xe_inf']:.4f} + {fit['c']:.4f} t^-{fit['alpha']:.3f}"


def listed(pair: tuple[np.ndarray, np.ndarray]) -> list:
    """Two arrays or numbers as JSON has them."""
    return [side.tolist() for side in pair]


# ---------------------------------------------------------------------------------------------------------------
# The probe
# ---------------------------------------------------------------------------------------------------------------
def probe(
    model: torch.nn.Module,
    chunks,
    rows: np.ndarray,
    device: torch.device,
    seed: int,
    most: int = 2_000,
) -> dict | None:
    """Read the component out of the residual stream by a linear classifier, for every layer at some positions.

    Half of the documents train the classifier (multinomial logistic regression, L2 penalty, L-BFGS), the other half
    give accuracy and cross entropy in nats, to be held against log K. None where a half lacks a category.

    Args:
        model: model(tokens [B, T]) -> (anything, residual stream: a [B, T, D] a layer).
        chunks: has tokens [R, n], codes [R] and documents [R]. rows: those to use, at most `most`.
    """
    rng = counter_rng(seed, 5)
    rows = np.sort(rng.permutation(rows)[:most])
    names, codes = np.unique(chunks.codes[rows], return_inverse=True)
    target = torch.from_numpy(codes).to(device)
    # Halves by document: chunks of one document in both would let the classifier know it again.
    documents, place = np.unique(chunks.documents[rows], return_inverse=True)
    document_trains = rng.permutation(len(documents)) % 2 == 0
    row_trains = document_trains[place]
    for half in (codes[row_trains], codes[~row_trains]):
        if len(np.unique(half)) < len(names):
            return None
    trains = torch.from_numpy(row_trains).to(device)  # [R]

    T = chunks.tokens.shape[1] - 1
    positions = probed_positions(T)
    held_target = target[~trains, None].expand(-1, len(positions))  # [R', P]
    accuracy = []
    cross_entropy = []
    layers = residual_stream(model, chunks.tokens[rows], positions, device)  # a [R, P, D] each
    for x in bar(layers, f"reading the component of {len(rows):,} chunks out of each layer"):
        # Standardised by the training half alone.
        mean = x[trains].mean(0)
        deviation = x[trains].std(0).clamp_min(1e-6)
        x = (x - mean) / deviation
        logits = logistic_regression(x[trains], target[trains], x[~trains], len(names))  # [R', P, K]
        xe = F.cross_entropy(logits.transpose(1, 2), held_target, reduction="none")
        right = logits.argmax(-1) == held_target
        accuracy.append(right.float().mean(0).tolist())
        cross_entropy.append(xe.mean(0).tolist())
    return {
        "positions": positions,
        "log_K": math.log(len(names)),
        "accuracy": accuracy,
        "cross_entropy": cross_entropy,
    }


def probed_positions(T: int) -> list[int]:
    """PROBED as far as a context of T tokens goes, and T."""
    positions = {T}
    for position in PROBED:
        positions.add(min(T, position))
    return sorted(positions)


@torch.no_grad()
def residual_stream(
    model: torch.nn.Module,
    tokens: np.ndarray,
    positions: list[int],
    device: torch.device,
) -> list[torch.Tensor]:
    """The stream after the embedding and every block at some positions, a [R, P, D] each, from chunks [R, n]."""
    index = [position - 1 for position in positions]
    parts = []
    model.eval()
    for chunk in torch.from_numpy(tokens.astype(np.int64)).split(256):
        inputs = chunk[:, :-1].to(device)  # [B, T]
        stream = model(inputs)[1]
        for x in stream:
            if x.shape[:-1] != inputs.shape:
                raise ValueError(
                    f"the model's residual stream should hold a [B, T, D] = {[*inputs.shape, 'D']} a layer, "
                    f"and has one of shape {list(x.shape)}"
                )
        parts.append([x[:, index].float() for x in stream])
    model.train()
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def logistic_regression(
    x: torch.Tensor,
    target: torch.Tensor,
    held: torch.Tensor,
    K: int,
    penalty: float = 1e-2,
) -> torch.Tensor:
    """Logits [R', P, K] of held [R', P, D] by one classifier a position, trained on x [R, P, D], target [R].

    All positions are one problem, which is separable: so they share the iterations, on the device where the stream is.
    """
    _, P, D = x.shape
    weight = torch.zeros(P, D, K, device=x.device, requires_grad=True)
    bias = torch.zeros(P, K, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")
    target = target[:, None].expand(-1, P)

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rpd,pdk->rpk", x, weight) + bias

    def loss() -> torch.Tensor:
        """The sum over positions of a mean cross entropy and a penalty: so each position has its own optimum."""
        optimizer.zero_grad()
        logits = logits_of(x)
        xe = F.cross_entropy(logits.transpose(1, 2), target)
        value = xe * P + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return logits_of(held)


# ---------------------------------------------------------------------------------------------------------------
# Files of a run
# ---------------------------------------------------------------------------------------------------------------
def write_curves(path: Path, groups: dict) -> None:
    """The curves of `measure` as a table: group, position, xe, low, high, oracle_xe."""
    with replacing(path) as fresh, open(fresh, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["group", "position", "xe", "low", "high", "oracle_xe"])
        for name, group in groups.items():
            empty = [""] * len(group["low"])
            columns = zip(
                group["xe_by_position"],
                group["low"],
                group["high"],
                group.get("oracle_xe_by_position", empty),
                strict=True,
            )
            for position, values in enumerate(columns, 1):
                table.writerow([name, position, *map(blank, values)])


def write_documents(path: Path, curves: Curves, names: list[str], documents: np.ndarray, groups: dict) -> None:
    """documents.npz: the XE of each document at some positions, for statistics over documents across runs.

    names [C] of categories, codes [M] (the category of each document, a number of names), documents [M] (their numbers
    in the file), counts [M] (chunks), positions [P] (1 is the prediction after one token; those reported, and of the
    in-context score), sums [M, P] (nats, over the chunks of a document), total [M] (the same of the mean over all T).

    Args:
        documents: numbers of the M documents of the curves, ascending. groups: of `measure`.
    """
    T = curves.sums.shape[1]
    positions = set(reported_positions(T))
    said = groups["seen"]["icl_score"]
    if said:
        positions |= {said["early"], said["late"]}
    positions = np.array(sorted(positions))
    arrays = {
        "names": np.array(names),
        "codes": curves.codes,
        "documents": documents,
        "counts": curves.counts,
        "positions": positions,
        "sums": curves.sums[:, positions - 1].astype(np.float32),
        "total": curves.sums.mean(1).astype(np.float32),
    }
    with replacing(path) as fresh:
        np.savez(fresh, **arrays)


def blank(value: float | str | None) -> float | str:
    """A cell of a table: empty where there is no number."""
    undefined = value is None or (isinstance(value, float) and not math.isfinite(value))
    return "" if undefined else value


def draw_run(folder: Path, title: str, results: dict, history: list[dict]) -> None:
    """Pictures of a run: XE by position, excess over the oracle, the probe, the loss over training.

    Args:
        results: of results.json: categories, groups and, where there was one, probe. history: of metrics.jsonl.
    """
    groups = results["groups"]
    seen = results["categories"]
    with doing("drawing pictures"):
        draw_curves(folder, title, groups, seen)
        if "oracle_xe_by_position" in groups["seen"]:
            draw_excess(folder, title, groups, seen)
        if results.get("probe"):
            draw_probe(folder, title, results["probe"])
        draw_history(folder, title, history)


def looks(groups: dict) -> dict[str, dict]:
    """The style of each category's curve, the same in all pictures."""
    names = [name for name in groups if name not in TOGETHER]
    return {name: look(place) for place, name in enumerate(names)}


def draw_curves(folder: Path, title: str, groups: dict, seen: list[str]) -> None:
    """XE by position of every category with its interval, dotted where it was not trained on, and its exact optimum."""
    with figure(folder, "xe_by_position", title=title) as axes:
        for name, style in looks(groups).items():
            group = groups[name]
            positions, xe = binned(np.array(group["xe_by_position"]))
            label = name if name in seen else f"{name} (unseen)"
            style = style | {"linestyle": "-" if name in seen else ":"}
            if "oracle_xe_by_position" in group:
                _, optimum = binned(np.array(group["oracle_xe_by_position"]))
                curve_with_optimum(axes, positions, xe, optimum, label, **style)
            else:
                curve(axes, positions, xe, label, **style)
            band(axes, positions, *group["binned_interval"], style["color"])
        T = len(groups["seen"]["xe_by_position"])
        axes.set_title(f"icl_gain {groups['seen']['icl_gain']:.4f}: {gain_definition(T)}")
        plain_log(axes)
        axes.set(xlabel="tokens read", ylabel="cross entropy of the next token (nats)")
        show_names(axes)


def show_names(axes) -> None:
    """A legend inside, or below where it has more names than there is room for."""
    named = in_order(axes)
    if len(named[0]) > MOST_INSIDE:
        legend_below(axes.figure, *named)
    else:
        legend(axes)


def draw_excess(folder: Path, title: str, groups: dict, seen: list[str]) -> None:
    """How far each category trained on is above the exact optimum by position, in percent of it.

    In nats where an optimum comes near 0: percent of that would hide all others.
    """
    styles = looks(groups)
    lowest = min(min(groups[name]["oracle_xe_by_position"]) for name in seen)
    in_percent = lowest > 0.01
    unit = "%" if in_percent else "nats"
    with figure(folder, "excess_by_position", title=title) as axes:
        for name in seen:
            group = groups[name]
            positions, excess = binned(np.array(group["excess_by_position"]))
            if in_percent:
                _, optimum = binned(np.array(group["oracle_xe_by_position"]))
                excess = 100 * excess / optimum
            curve(axes, positions, excess, name, **styles[name])
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--", label="exact optimum")
        plain_log(axes)
        axes.set(xlabel="tokens read", ylabel=f"excess over the exact optimum ({unit})")
        show_names(axes)


def draw_probe(folder: Path, title: str, probed: dict) -> None:
    """Accuracy of the probe of every layer by position."""
    layers = probed["accuracy"]
    chance = math.exp(-probed["log_K"])
    with figure(folder, "component_probe", title=title) as axes:
        for layer, accuracy in enumerate(layers):
            depth = layer / max(1, len(layers) - 1)
            shade = (0.0, 0.3, 0.53, 0.25 + 0.75 * depth)  # deeper layers are darker
            axes.plot(probed["positions"], accuracy, "o-", color=shade, label=f"layer {layer}" if layer else "embed")
        axes.axhline(chance, color=GREY, linestyle=":", label=f"chance, {chance:.2f}")
        plain_log(axes)
        axes.set(xlabel="tokens read", ylabel="held-out accuracy of the component", ylim=(0, 1.02))
        show_names(axes)


def draw_history(folder: Path, title: str, history: list[dict]) -> None:
    """Training and validation XE by step; nothing where no step is known, as of an imported run."""
    if not history:
        return
    with figure(folder, "loss", title=title) as axes:
        for split, key, label in (("train", "loss", "training"), ("eval", "val_xe", "validation")):
            records = [record for record in history if record["split"] == split]
            if records:
                curve(axes, [record["step"] for record in records], [record[key] for record in records], label)
        axes.set(xlabel="step", ylabel="cross entropy (nats)")
        legend(axes)
