"""Is the belief in the activations, linearly? Regression on held-out prefixes, principal components, pictures.

Dimensions: N words of T tokens, P prefixes, D width, S states.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import InputError
from common.runlog import read_metrics
from measure.figures import figure

FOLDS = 5
RCONDS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)  # 1 keeps only the mean


# ---------------------------------------------------------------------------------------------------------------
# Prefixes
# ---------------------------------------------------------------------------------------------------------------
class Prefixes(NamedTuple):
    """Distinct prefixes: activations by layer, each [P, D]; beliefs [P, S]; weights [P], summing to 1; lengths [P]."""

    activations: dict
    beliefs: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor


def first_occurrences(words: torch.Tensor) -> torch.Tensor:
    """[N, T]: whether the prefix of sorted words [N, T] that ends there occurs for the first time."""
    differs = (words[1:] != words[:-1]).int().cummax(1).values.bool()  # equal prefixes are neighbours
    return torch.cat([torch.ones_like(words[:1]).bool(), differs])


@torch.no_grad()
def collect_prefixes(
    model: torch.nn.Module,
    contexts,
    device: torch.device,
    last_token_only: bool = False,
    batch: int = 4_096,
) -> Prefixes:
    """Activations and beliefs at every distinct prefix of the words, once each, weighted by probability.

    Args:
        model: tokens [B, T] -> logits, activations [B, T, D] after the embedding and after every layer.
        contexts: has words [N, T] in lexicographic order, weights [N] and beliefs [N, T, S].
        last_token_only: whole words only.
    Raises InputError where the activations are not what they should be.
    """
    words = contexts.words
    N, T = words.shape
    first = first_occurrences(words)  # [N, T]
    # The words that begin with a prefix follow one another: their weights add up to the prefix's probability.
    group = first.long().cumsum(0) - 1
    spread = contexts.weights[:, None].expand(group.shape).contiguous()
    sums = torch.zeros_like(spread)
    sums.scatter_add_(0, group, spread)
    weights = sums.gather(0, group)
    if last_token_only:
        first[:, :-1] = False

    model.eval()
    parts = []
    for begin in range(0, N, batch):
        rows = slice(begin, begin + batch)
        _, activations = model(words[rows].to(device))
        _check_activations(activations, words[rows].shape)
        # On the device and in the type of the beliefs, which regression is done in.
        parts.append([layer.to(contexts.beliefs)[first[rows]] for layer in activations])
    model.train()

    layers = [torch.cat(layer) for layer in zip(*parts, strict=True)]  # each [P, D]
    activations = {"embed": layers[0]}
    for i, layer in enumerate(layers[1:], 1):
        activations[f"layer_{i}"] = layer
    activations["concat"] = torch.cat(layers[1:], 1)
    positions = torch.arange(1, T + 1, device=words.device)
    weight = weights[first]
    return Prefixes(
        activations=activations,
        beliefs=contexts.beliefs[first],
        weights=weight / weight.sum(),
        lengths=positions.expand(N, T)[first],
    )


def _check_activations(activations, shape: torch.Size) -> None:
    """One sentence for a model that returns something else; shape: that of its tokens, (B, T)."""
    expected = "a list of [B, T, D]: the embedding, then the stream after every layer"
    if isinstance(activations, torch.Tensor) or len(activations) < 2:
        raise InputError(f"the model returns its last activation alone; the analysis needs {expected}")
    for i, layer in enumerate(activations):
        if layer.ndim != 3 or layer.shape[:2] != shape:
            raise InputError(
                f"activation {i} of the model has the shape {list(layer.shape)} for tokens of {list(shape)}; "
                f"the analysis needs {expected}"
            )


# ---------------------------------------------------------------------------------------------------------------
# Regression and principal components
# ---------------------------------------------------------------------------------------------------------------
def pca(features: torch.Tensor, weights: torch.Tensor, components: int = 3) -> dict:
    """Weighted principal components of [P, D]: axes, coordinates, explained fractions, how many explain 80%, ..."""
    centred = features - weights @ features
    covariance = (centred * weights[:, None]).t() @ centred
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    values = values.flip(0).clamp_min(0)
    axes = vectors.flip(1)[:, :components]
    explained = values / values.sum().clamp_min(1e-300)
    total = explained.cumsum(0)
    result = {
        "coordinates": centred @ axes,
        "axes": axes,
        "explained": explained.tolist(),
    }
    for percent in (80, 90, 95, 99):
        too_few = total < percent / 100 - 1e-12
        result[f"components_{percent}"] = int(too_few.sum()) + 1
    return result


def deal(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The fold [P] of each prefix: every five of neighbouring weight go to different folds, at random."""
    P = len(weights)
    rank = weights.argsort(descending=True).argsort()
    five = rank // FOLDS
    # Sorted by a number in [five, five + 1): fives in order, shuffled within.
    noise = torch.rand(P, generator=generator, dtype=torch.float64)
    order = (five + noise).argsort()
    place = torch.empty_like(rank)
    place[order] = torch.arange(P)
    return place % FOLDS


def belief_regression(features: torch.Tensor, beliefs: torch.Tensor, weights: torch.Tensor, seed: int = 0) -> dict:
    """Weighted least squares of beliefs [P, S] on features [P, D] with an intercept, scored on what it has not seen.

    Prefixes are dealt into five folds of like weight. Three of them fit, a fourth chooses how small a singular value
    counts (rcond), and the fifth is predicted; in turn, so that every prefix is held out once. Of these predictions are
    r2 (the fraction of the variance of all coordinates explained), rmse, mae (means over coordinates) and dist (mean
    Euclidean distance). shuffled_* is the same with beliefs shuffled over prefixes: what mere dimension reproduces.
    *r2_fit is the r2 of a map fitted to all prefixes, and `predicted` [P, S] what that one says.
    """
    if len(features) < FOLDS:
        raise InputError(
            f"{len(features)} different contexts are too few to hold some out: raise n_ctx or max_words, "
            "or analyse prefixes too (last_token_only=false)"
        )
    generator = torch.Generator().manual_seed(seed)
    fold = deal(weights.cpu(), generator).to(features.device)
    order = torch.randperm(len(beliefs), generator=generator)
    shuffled = beliefs[order.to(beliefs.device)]
    share = weights / weights.sum()

    # Both problems at once, the beliefs and the shuffled ones, stacked. Features are centred and have an intercept
    # still, since a fold's mean is not the whole's.
    centred = features - share @ features
    intercept = torch.ones_like(centred[:, :1])
    X = torch.cat([centred, intercept], 1)  # [P, D + 1]
    Y = torch.stack([beliefs, shuffled])  # [2, P, S]
    means = (share @ Y)[:, None]  # [2, 1, S]

    # Triangular factors stand in for the rows of a fold: any union of folds is then a small problem.
    root = share.sqrt()[:, None]
    weighted_X = X * root
    weighted_Y = (Y - means) * root
    factors = []
    targets = []
    for k in range(FOLDS):
        Q, R = torch.linalg.qr(weighted_X[fold == k])
        factors.append(R)
        targets.append(Q.t() @ weighted_Y[:, fold == k])

    def maps(folds: list[int]) -> torch.Tensor:
        """Least-squares maps [rcond, 2, D + 1, S] of these folds."""
        return least_squares(
            torch.cat([factors[k] for k in folds]),
            torch.cat([targets[k] for k in folds], 1),
        )

    predicted = torch.empty_like(Y)
    chosen = []
    both = torch.arange(2, device=Y.device)
    for k in range(FOLDS):
        judge = (k + 1) % FOLDS
        candidates = maps([other for other in range(FOLDS) if other not in (k, judge)])
        # The rcond of each problem that errs least on the judging fold ...
        judged = fold == judge
        residual = X[judged] @ candidates + means - Y[:, judged]  # [rcond, 2, rows, S]
        error = (share[judged] @ residual.square()).sum(-1)  # [rcond, 2]
        best = error.argmin(0)  # [2]
        chosen.append(best)
        # ... predicts the one that nothing has seen.
        held_out = fold == k
        predicted[:, held_out] = X[held_out] @ candidates[best, both] + means
    typical = torch.stack(chosen).median(0).values  # [2]
    on_all = maps(list(range(FOLDS)))[typical, both]
    fitted = X @ on_all + means

    result = {"predicted": fitted[0]}
    for i, name in enumerate(("", "shuffled_")):
        for key, value in regression_metrics(predicted[i], Y[i], weights).items():
            result[name + key] = value
        result[f"{name}rcond"] = RCONDS[typical[i]]
        result[f"{name}r2_fit"] = regression_metrics(fitted[i], Y[i], weights)["r2"]
    return result


def least_squares(factor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Maps [rcond, 2, D + 1, S] of the problem factor [R, D + 1], targets [2, R, S]: V diag(1 / s) U', small s left
    out, for every one of RCONDS."""
    U, s, Vh = torch.linalg.svd(factor, full_matrices=False)
    inverses = []
    for rcond in RCONDS:
        counts = (s > rcond * s[0]) & (s > 0)
        inverses.append(torch.where(counts, 1 / s, 0))
    inverse = torch.stack(inverses)[:, None, :, None]  # [rcond, 1, D + 1, 1]
    return Vh.t() @ (inverse * (U.t() @ target))


def regression_metrics(predicted: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> dict:
    """r2, rmse, mae, dist of predictions [P, S], weighted; see belief_regression."""
    share = weights / weights.sum()
    residual = predicted - target
    centred = target - share @ target
    error = share @ residual**2  # [S]
    unexplained = float(error.sum())
    variance = float((share @ centred**2).sum())
    r2 = 0.0  # of beliefs that do not vary
    if variance > 1e-20:
        r2 = 1 - unexplained / variance
    return {
        "r2": r2,
        "rmse": float(error.sqrt().mean()),
        "mae": float((share @ residual.abs()).mean()),
        "dist": float(share @ residual.norm(dim=1)),
    }


def analyse(
    model: torch.nn.Module,
    untrained: torch.nn.Module,
    contexts,
    device: torch.device,
    last_token_only: bool = False,
    seed: int = 0,
) -> tuple[dict, dict]:
    """Regress beliefs on the activations of every layer and on all of them together; see collect_prefixes.

    Returns (what analysis.json holds, what the pictures need). `untrained_r2_concat` is the same regression on the
    network as initialised: how much of the belief any random features of the context give.
    """
    prefixes = collect_prefixes(model, contexts, device, last_token_only)
    layers = {}
    r2_by_layer = {}
    for name, features in prefixes.activations.items():
        layer = belief_regression(features, prefixes.beliefs, prefixes.weights, seed)
        predicted = layer.pop("predicted")  # in the end that of "concat"
        components = pca(features, prefixes.weights)
        del components["coordinates"], components["axes"]
        layer["pca"] = components
        layers[name] = layer
        if name != "concat":
            r2_by_layer[name] = layer["r2"]

    control = collect_prefixes(untrained, contexts, device, last_token_only)
    features = control.activations["concat"]
    untrained_fit = belief_regression(features, control.beliefs, control.weights, seed)
    result = {
        "prefixes": len(prefixes.weights),
        "all_prefixes": contexts.exact,
        "layers": layers,
        "r2_concat": layers["concat"]["r2"],
        "r2_by_layer": r2_by_layer,
        "shuffled_r2_concat": layers["concat"]["shuffled_r2"],
        "untrained_r2_concat": untrained_fit["r2"],
    }
    geometry = {
        "beliefs": prefixes.beliefs.cpu(),
        "predicted": predicted.cpu(),
        "weights": prefixes.weights.cpu(),
    }
    return result, geometry


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------
def plot_run(folder: Path, title: str, result: dict, analysis: dict | None, geometry: dict | None) -> None:
    """All pictures of a run, in folder/plots; those of beliefs only where there is an analysis."""
    plot_loss_by_position(folder, title, result)
    plot_excess_loss(folder, title)
    if analysis is not None:
        plot_r2_by_layer(folder, title, analysis)
        plot_simplex(folder, title, geometry, analysis["r2_concat"])


def plot_loss_by_position(folder: Path, title: str, result: dict) -> None:
    """The loss by position against its floor."""
    loss = result["loss_by_position"]
    floor = result["optimal_loss_by_position"]
    positions = range(1, len(loss) + 1)
    with figure(folder, "loss_by_position", 6, 4) as axes:
        if any(floor):
            axes.plot(positions, floor, "k--", label="floor: entropy given the context")
        axes.plot(positions, loss, "o-", markersize=4, label="model")
        axes.set(xlabel="tokens read", ylabel="loss of the next token (nats)")
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend()


def plot_excess_loss(folder: Path, title: str) -> None:
    """The excess loss over training, from metrics.jsonl."""
    evaluations = [record for record in read_metrics(folder) if record["split"] == "eval"]
    if not evaluations:
        return
    steps = [record["step"] for record in evaluations]
    excess = [record["excess_loss"] for record in evaluations]
    with figure(folder, "excess_loss", 6, 4) as axes:
        axes.semilogy(steps, excess, "o-", markersize=3)
        axes.set(xlabel="step", ylabel="excess over the floor (nats)")
        axes.set_title(title, fontsize=9, wrap=True)


def plot_r2_by_layer(folder: Path, title: str, analysis: dict) -> None:
    """How much of the belief a linear map reads out of each layer and of all together, with the controls."""
    r2 = {**analysis["r2_by_layer"], "concat": analysis["r2_concat"]}
    heights = [max(0.0, value) for value in r2.values()]
    labels = [f"{value:.4f}" for value in r2.values()]  # what a bar of no height stands for, too
    untrained = analysis["untrained_r2_concat"]
    shuffled = max(0.0, analysis["shuffled_r2_concat"])
    with figure(folder, "r2_by_layer", max(6, 1.2 * len(r2)), 4) as axes:
        bars = axes.bar(list(r2), heights)
        axes.bar_label(bars, labels, fontsize=8)
        axes.axhline(untrained, color="0.4", linestyle="--", label="concat, untrained network")
        axes.axhline(shuffled, color="0.4", linestyle=":", label="concat, shuffled beliefs")
        axes.set(ylabel="held-out r2 of the belief", ylim=(0, 1.12))
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend(loc="lower right", fontsize=8)


def plot_simplex(folder: Path, title: str, geometry: dict, r2: float) -> None:
    """True beliefs beside what a linear map reads out of the residual stream, in the colours of the true ones."""
    beliefs = geometry["beliefs"]
    weights = geometry["weights"]
    simplex = is_simplex(beliefs)
    if simplex:
        place, colour = simplex_plane()
        shared_axes = {}
    else:
        place, colour = component_plane(beliefs, weights)
        shared_axes = {"sharex": True, "sharey": True}
    rows = weights.argsort()[-60_000:]  # the likeliest prefixes, on top the likeliest of all
    colours = colour(beliefs[rows]).clamp(0, 1).numpy()
    share = (weights[rows] / weights.max()).numpy()
    sizes = np.clip(30 * share**0.3, 0.3, 30)
    with figure(folder, "beliefs", 10, 5, columns=2, title=title, **shared_axes) as (left, right):
        left.set_title("beliefs of the process", fontsize=10)
        right.set_title(f"linear image of the activations (held-out r2 = {r2:.4f})", fontsize=10)
        for axes, points in ((left, beliefs), (right, geometry["predicted"])):
            x, y = place(points[rows]).t().numpy()
            axes.scatter(x, y, s=sizes, c=colours, linewidths=0)
            if simplex:
                draw_triangle(axes)
            else:
                axes.set_xlabel("first principal component of the beliefs")
                axes.set_ylabel("second")


def is_simplex(beliefs: torch.Tensor) -> bool:
    """Whether these are distributions over three states (those of a generalised process need not be any)."""
    if beliefs.shape[1] != 3 or beliefs.min() <= -1e-9:
        return False
    return bool((beliefs.sum(1) - 1).abs().max() < 1e-6)


def simplex_plane():
    """(map of beliefs [P, 3] to an equilateral triangle [P, 2], map to colours [P, 3]: the beliefs themselves)."""
    corners = torch.tensor([[0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
    return lambda points: points @ corners, lambda points: points


def component_plane(beliefs: torch.Tensor, weights: torch.Tensor):
    """(map of points [P, S] to the first two principal components of the beliefs, map to colours [P, 3] by three)."""
    axes = pca(beliefs, weights)["axes"]
    missing = max(0, 3 - axes.shape[1])  # processes of one or two states leave axes empty
    axes = F.pad(axes, (0, missing))
    mean = weights @ beliefs
    low, high = ((beliefs - mean) @ axes).aminmax(dim=0)
    width = (high - low).clamp_min(1e-9)

    def place(points: torch.Tensor) -> torch.Tensor:
        return (points - mean) @ axes[:, :2]

    def colour(points: torch.Tensor) -> torch.Tensor:
        return ((points - mean) @ axes - low) / width

    return place, colour


def draw_triangle(axes) -> None:
    """The simplex of three states, its corners named."""
    top = 0.75**0.5
    axes.plot([0, 1, 0.5, 0], [0, 0, top, 0], color="0.6", linewidth=0.8)
    labels = ((-0.06, -0.04), (1.01, -0.04), (0.47, 0.89))  # a little outside of the corners
    for state, (x, y) in enumerate(labels):
        axes.text(x, y, f"state {state}", fontsize=8)
    axes.set_aspect("equal")
    axes.set_axis_off()
