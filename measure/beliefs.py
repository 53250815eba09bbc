"""Is the belief in the activations, linearly? Regression on held-out prefixes, principal components.

Dimensions: N words of T tokens, P prefixes, D width of a layer, W of all layers, S states, Q columns of moments.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.errors import InputError
from common.telling import bar

FOLDS = 5  # four fit, the fifth is predicted, in turn
STRATA = 5  # prefixes are dealt into FOLDS * STRATA hands once, and hands into folds in every deal
DEALS = 10  # deals that a result is averaged over
RCONDS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)  # 1 keeps only the mean
SLACK = 1.01  # of rconds that err as little as the best, to a hundredth, the largest is taken
FLOAT32 = 6e-8  # relative rounding of activations
FEW_PREFIXES = 2_000  # are analysed before anybody asks
TOKENS = 40_960  # tokens of a forward pass
ROWS = 8_192  # prefixes of a block
KEPT_BYTES = 2**28  # activations are kept for a second pass up to this size, and computed again beyond
MOMENT_BYTES = 2**30  # moments of all hands; beyond, as of networks wider than 2,300 in all, there is one deal alone


# ---------------------------------------------------------------------------------------------------------------
# Prefixes
# ---------------------------------------------------------------------------------------------------------------
class Prefixes(NamedTuple):
    """Distinct prefixes of the words.

    activations: blocks [p, W], one after another [P, W] in all; may be passed over several times.
    columns: where the W columns hold "embed", "layer_1", ..., and "concat", which is all layers.
    beliefs [P, S]; weights [P], summing to 1; lengths [P].
    """

    activations: Iterable[torch.Tensor]
    columns: dict[str, slice]
    beliefs: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor


def first_occurrences(words: torch.Tensor) -> torch.Tensor:
    """[N, T]: whether the prefix of sorted words [N, T] that ends there occurs for the first time."""
    differs = (words[1:] != words[:-1]).int()  # equal prefixes are neighbours
    differs = differs.cummax(1).values.bool()
    first = torch.ones_like(words[:1]).bool()
    return torch.cat([first, differs])


def words_at_once(length: int) -> int:
    """How many words of a length go through a model together, so that its memory does not grow with the length."""
    return max(1, TOKENS // length)


class Activations:
    """Blocks [p, W] of a model's activations at the prefixes, embedding and layers side by side; see Prefixes.

    Few are kept after the first pass. Many are computed again in each: memory does not grow with their number.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        words: torch.Tensor,
        first: torch.Tensor,
        device,
        batch: int,
    ):
        self.model, self.words, self.first = model, words, first
        self.device, self.batch = device, batch
        begin = 0
        self.columns = {}
        for i, layer in enumerate(self._layers(slice(0, 1))):
            end = begin + layer.shape[-1]
            self.columns[f"layer_{i}" if i else "embed"] = slice(begin, end)
            begin = end
        self.columns["concat"] = slice(self.columns["embed"].stop, end)
        size = int(first.sum()) * end * layer.element_size()
        self.kept = [] if size <= KEPT_BYTES else None

    @torch.no_grad()
    def _layers(self, rows: slice) -> list[torch.Tensor]:
        """Checked activations [n, T, D] of these words, the embedding first."""
        words = self.words[rows]
        self.model.eval()
        _, layers = self.model(words.to(self.device))
        self.model.train()
        _check_activations(layers, words.shape)
        return layers

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.kept:
            yield from self.kept
            return
        for begin in range(0, len(self.words), self.batch):
            rows = slice(begin, begin + self.batch)
            # Where the beliefs are, in which place the regression is done.
            layers = [layer.to(self.words.device) for layer in self._layers(rows)]
            blocks = torch.cat(layers, -1)[self.first[rows]].split(ROWS)
            if self.kept is not None:
                self.kept += [block.clone() for block in blocks]
            yield from blocks


def collect_prefixes(
    model: torch.nn.Module,
    contexts,
    device: torch.device,
    last_token_only: bool = False,
    batch: int | None = None,
) -> Prefixes:
    """Activations and beliefs at every distinct prefix of the words, once each, weighted by probability.

    Args:
        model: tokens [B, T] -> logits, activations [B, T, D] after the embedding and after every layer.
        contexts: has words [N, T] in lexicographic order, weights [N] and beliefs [N, T, S].
        last_token_only: whole words only.
        batch: words of a forward pass; default as many as words_at_once says.
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
    batch = batch or words_at_once(T)
    activations = Activations(model, words, first, device, batch)
    positions = torch.arange(1, T + 1, device=words.device)
    weight = weights[first]
    return Prefixes(
        activations=activations,
        columns=activations.columns,
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
# Principal components
# ---------------------------------------------------------------------------------------------------------------
def pca(features: torch.Tensor, weights: torch.Tensor, components: int = 3) -> dict:
    """Weighted principal components of [P, D]: axes, coordinates, explained fractions, how many explain 80%, ..."""
    centred = features - weights @ features
    covariance = (centred * weights[:, None]).t() @ centred
    vectors = torch.linalg.eigh(covariance).eigenvectors  # ascending
    axes = vectors.flip(1)[:, :components]
    return {"coordinates": centred @ axes, "axes": axes} | spectrum(covariance)


def spectrum(covariance: torch.Tensor) -> dict:
    """What principal components explain of a covariance [D, D], and how many explain 80, 90, 95, 99%."""
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    explained = values / values.sum().clamp_min(1e-300)
    total = explained.cumsum(0)
    result = {"explained": explained.tolist()}
    for percent in (80, 90, 95, 99):
        too_few = total < percent / 100 - 1e-12
        result[f"components_{percent}"] = int(too_few.sum()) + 1
    return result


# ---------------------------------------------------------------------------------------------------------------
# Regression on held-out prefixes
# ---------------------------------------------------------------------------------------------------------------
# A map is fitted to some prefixes and judged on others. Where few prefixes hold most of the weight, it matters much
# which are seen: with one deal, r2 of the same weights was 0.17 with one seed and 0.98 with another. So prefixes are
# dealt by weight, and results are means over deals.
#
# All that least squares needs of a set of prefixes are its moments, sums of w z z' with z = (1, features, beliefs):
# those of a union are the sum, those of a layer a part, and the prefixes themselves need not be in memory. A square
# loses half of the digits, but activations have no more than seven.


def deal_hands(weights: torch.Tensor, generator: torch.Generator, strata: int = STRATA) -> torch.Tensor:
    """The hand [P] of each prefix, one of FOLDS * strata: every five of neighbouring weight go to five hands.

    The next five go to the next five hands, and so on: hands k FOLDS to k FOLDS + 4 are alike.
    """
    P = len(weights)
    rank = weights.argsort(descending=True).argsort()
    five = rank // FOLDS
    # Sorted by a number in [five, five + 1): fives in order, shuffled within.
    noise = torch.rand(P, generator=generator, dtype=torch.float64)
    order = (five + noise).argsort()
    place = torch.empty_like(rank)
    place[order] = torch.arange(P)
    return place % FOLDS + FOLDS * (five % strata)


def deal_folds(strata: int, generator: torch.Generator) -> torch.Tensor:
    """The fold of each hand [FOLDS * strata] in one deal: of every five like hands, each goes to another fold."""
    orders = [torch.randperm(FOLDS, generator=generator) for _ in range(strata)]
    return torch.cat(orders)


class Moments(NamedTuple):
    """hands [H, Q, Q]: sums of w z z' over the prefixes of a hand, z = (1, features - shift, beliefs - mean, shuffled).

    shift [W]: a typical activation, taken off so that squares do not lose the digits that differ. hand [P].
    """

    hands: torch.Tensor
    shift: torch.Tensor
    hand: torch.Tensor


def moments_of(prefixes: Prefixes, generator: torch.Generator) -> Moments:
    """Moments of prefixes dealt into hands, in one pass over their activations, on the CPU in float64.

    Raises InputError for fewer prefixes than folds.
    """
    beliefs = prefixes.beliefs
    P, S = beliefs.shape
    if P < FOLDS:
        raise InputError(
            f"there are too few different contexts to hold some out ({P}): raise n_ctx or max_words, "
            "or analyse prefixes too (last_token_only=false)"
        )
    Q = 1 + prefixes.columns["concat"].stop + 2 * S
    size = FOLDS * STRATA * Q**2 * 8  # bytes
    strata = STRATA if size <= MOMENT_BYTES else 1
    hand = deal_hands(prefixes.weights.cpu(), generator, strata)
    hand = hand.to(beliefs.device)
    order = torch.randperm(P, generator=generator).to(beliefs.device)
    centred = beliefs - prefixes.weights @ beliefs  # a constant belief has no variance then, not that of rounding
    targets = torch.cat([centred, centred[order]], 1)  # the true ones, and the control
    root = prefixes.weights.sqrt()[:, None]
    hands = torch.zeros(FOLDS * strata, Q, Q).to(beliefs)
    shift = None
    begin = 0
    for block in prefixes.activations:
        block = block.to(beliefs)
        if shift is None:
            shift = block.mean(0)
        rows = slice(begin, begin + len(block))
        begin = rows.stop
        one = torch.ones_like(block[:, :1])
        z = torch.cat([one, block - shift, targets[rows]], 1)
        z *= root[rows]
        for h in range(len(hands)):
            part = z[hand[rows] == h]
            hands[h] += part.t() @ part
    return Moments(hands.cpu(), shift, hand)


def covariances(moments: torch.Tensor, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(means [..., Q - 1], covariance of features [..., D, D], of features and targets [..., D, Q - 1 - D]) of moments
    [..., Q, Q], the covariances times the weight."""
    weight = moments[..., :1, :1]
    means = moments[..., :1, 1:] / weight
    centred = moments[..., 1:, 1:] - weight * means.mT * means
    return means[..., 0, :], centred[..., :D, :D], centred[..., :D, D:]


def least_squares(moments: torch.Tensor, D: int, floor: float) -> torch.Tensor:
    """Maps [..., D + 1, rcond, 2, S] from (1, features) to both targets, an intercept first, for every one of RCONDS.

    Only principal components count whose deviation is above rcond times the largest, and whose variance is above
    floor: what is below is rounding. Many moments [..., Q, Q] at once, as a small one costs its operators' time.
    """
    means, covariance, shared = covariances(moments, D)
    values, vectors = torch.linalg.eigh(covariance)
    values = values[..., None]  # [..., D, 1]
    rcond = torch.tensor(RCONDS, dtype=values.dtype)
    largest = values[..., -1:, :]
    is_large = values > largest * rcond.square()
    is_real = values > floor * moments[..., :1, :1]
    inverse = torch.where(is_large & is_real, 1 / values, 0)  # [..., D, rcond]
    projected = vectors.mT @ shared
    scaled = inverse[..., None] * projected[..., None, :]  # [..., D, rcond, 2 S]
    slopes = vectors @ scaled.flatten(-2)
    every = means[..., None, D:].repeat_interleave(len(RCONDS), -2).flatten(-2)
    intercepts = every[..., None, :] - means[..., None, :D] @ slopes
    maps = torch.cat([intercepts, slopes], -2)
    return maps.unflatten(-1, (len(RCONDS), 2, -1))


def squared_errors(moments: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Sums of w (target - prediction)^2 over the prefixes of these moments, [..., rcond, 2, S], of maps
    [..., D + 1, rcond, 2, S]."""
    inputs = maps.shape[-4]
    targets = (1, *maps.shape[-2:])
    between = moments[..., :inputs, :inputs]
    shared = moments[..., :inputs, inputs:].unflatten(-1, targets)
    squares = moments[..., inputs:, inputs:].diagonal(dim1=-2, dim2=-1).unflatten(-1, targets)
    flat = maps.flatten(-3)
    products = flat * (between @ flat)
    quadratic = products.sum(-2).unflatten(-1, maps.shape[-3:])
    linear = (shared * maps).sum(-4)
    return (squares - 2 * linear + quadratic).clamp_min(0)


def held_out_maps(folds: torch.Tensor, D: int, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(maps [FOLDS, D + 1, 2, S], each fitted without its fold; their rconds' numbers [FOLDS, 2]), of fold moments.

    The rcond of a fold is chosen without it as well: three of the other four fit, the fourth judges, in turn.
    """
    pairs = torch.combinations(torch.arange(FOLDS))  # [10, 2]
    candidates = least_squares(without(folds, pairs), D, floor)
    errors = torch.zeros(FOLDS, len(RCONDS), 2, dtype=folds.dtype)
    for held_out, judge in (pairs.t(), pairs.t().flip(0)):
        errors.index_add_(0, held_out, squared_errors(folds[judge], candidates).sum(-1))
    # Rounding decides between rconds that err alike, so of these it is the one that keeps least.
    least = errors.min(1, keepdim=True).values
    rounding = 1e-12 * folds.sum(0).diagonal()[1 + D :].sum()
    alike = errors <= SLACK * least + rounding
    number = torch.arange(len(RCONDS))[:, None]
    chosen = torch.where(alike, number, 0).max(1).values  # [FOLDS, 2]
    candidates = least_squares(without(folds, torch.arange(FOLDS)[:, None]), D, floor)
    maps = [take(fitted, numbers) for fitted, numbers in zip(candidates, chosen, strict=True)]
    return torch.stack(maps), chosen


def without(folds: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Sums [N, Q, Q] of the folds' moments but those left out, numbers [N, some]."""
    sums = []
    for numbers in left_out.tolist():
        others = [k for k in range(FOLDS) if k not in numbers]
        sums.append(folds[others].sum(0))
    return torch.stack(sums)


def take(maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Of maps [D + 1, rcond, 2, S] those of each problem's rcond, numbers [2]: [D + 1, 2, S]."""
    both = torch.arange(2)
    return maps[:, numbers, both]


def regress(
    prefixes: Prefixes,
    seed: int = 0,
    deals: int = DEALS,
    advance: Callable[[int], None] = lambda columns: None,
) -> dict[str, dict]:
    """Weighted least squares of beliefs on the features of every layer, scored on prefixes it has not seen.

    Prefixes are dealt into five folds of like weight. Four of them fit, the fifth is predicted; in turn, so that every
    prefix is held out once. Of these predictions is r2 (the fraction of the variance of all coordinates explained): its
    mean over deals and its standard deviation, r2_spread. None where it is not defined: r2 of beliefs that do not vary,
    the spread of one deal. rmse is a mean over coordinates and deals, and so on. shuffled_* is the same with
    beliefs shuffled over prefixes: what mere dimension reproduces. *r2_fit is the r2 of a map fitted to all prefixes.

    Args:
        seed: of the deals. advance: told the columns of each map that is fitted.
    Returns {layer: result}, with `maps` [deals, FOLDS, D + 1, S] and `map` [D + 1, S], fitted to all, for `predict`;
    they give the belief less its mean.
    Raises InputError for too few prefixes.
    """
    generator = torch.Generator().manual_seed(seed)
    moments = moments_of(prefixes, generator)
    strata = len(moments.hands) // FOLDS
    deals = deals if strata > 1 else 1
    fold_of_hand = torch.stack([deal_folds(strata, generator) for _ in range(deals)])  # [deals, H]
    folds = fold_of_hand.to(moments.hand.device)[:, moments.hand]  # [deals, P]
    numbers = torch.arange(moments.hands.shape[-1])
    last = prefixes.columns["concat"].stop
    results = {}
    for name, columns in prefixes.columns.items():
        shift = moments.shift[columns]
        floor = float(FLOAT32**2 * shift.square().sum())
        # Of the columns of moments: the one, the features of this layer, the targets.
        features = numbers[1:][columns]
        part = torch.cat([numbers[:1], features, numbers[1 + last :]])
        hands = moments.hands[:, part][:, :, part]
        result = _regress_layer(hands, len(shift), floor, fold_of_hand, advance)
        result["shift"] = shift
        result["folds"] = folds
        results[name] = result
    return results


def _regress_layer(
    hands: torch.Tensor,
    D: int,
    floor: float,
    fold_of_hand: torch.Tensor,
    advance: Callable[[int], None],
) -> dict:
    """The result of one layer; see regress."""
    total = hands.sum(0)
    S = (total.shape[-1] - 1 - D) // 2
    means = total[0, 1 + D :]
    variance = total.diagonal()[1 + D :] - means.square()
    variance = variance.view(2, S).sum(1)  # of the beliefs, and as shuffled
    r2, rmse, maps, chosen = [], [], [], []
    for fold in fold_of_hand:
        folds = [hands[fold == k].sum(0) for k in range(FOLDS)]
        folds = torch.stack(folds)
        of_folds, numbers = held_out_maps(folds, D, floor)
        error = squared_errors(folds, of_folds[:, :, None]).sum((0, 1))  # [2, S]
        r2.append(1 - error.sum(1) / variance)
        rmse.append(error.sqrt().mean(1))
        maps.append(of_folds[:, :, 0])
        chosen.append(numbers)
        advance(D)
    result = {"maps": torch.stack(maps)}
    r2 = torch.stack(r2)  # [deals, 2]
    rmse = torch.stack(rmse).mean(0)
    typical = torch.cat(chosen).median(0).values  # [2]
    candidates = least_squares(total, D, floor)
    unexplained = squared_errors(total, candidates).sum(-1)  # [rcond, 2]
    result["map"] = candidates[:, typical[0], 0]
    for i, name in enumerate(("", "shuffled_")):
        varies = variance[i] > 1e-20
        has_spread = varies and len(r2) > 1
        fit = 1 - unexplained[typical[i], i] / variance[i]
        of_deals = r2[:, i]
        result[f"{name}r2"] = float(of_deals.mean()) if varies else None
        result[f"{name}r2_spread"] = float(of_deals.std()) if has_spread else None
        result[f"{name}r2_fit"] = float(fit) if varies else None
        result[f"{name}rmse"] = float(rmse[i])
        result[f"{name}rcond"] = RCONDS[typical[i]]
    _, covariance, _ = covariances(total, D)
    result["pca"] = spectrum(covariance)
    return result


def predict(prefixes: Prefixes, results: dict[str, dict]) -> torch.Tensor:
    """A second pass over the activations: adds mae (mean over coordinates and deals) and dist (mean Euclidean distance)
    of held-out predictions to the results of regress; returns what the map of "concat" says that saw all, [P, S]."""
    mean = prefixes.weights @ prefixes.beliefs
    sums = {name: torch.zeros(2).to(mean) for name in results}  # of mae and dist
    said = []
    begin = 0
    for block in prefixes.activations:
        rows = slice(begin, begin + len(block))
        begin = rows.stop
        beliefs = prefixes.beliefs[rows] - mean
        weights = prefixes.weights[rows]
        for name, result in results.items():
            features = block[:, prefixes.columns[name]].to(beliefs) - result["shift"]
            inputs = F.pad(features, (1, 0), value=1.0)
            folds = result["folds"][:, rows]
            of_deals = result["maps"].to(beliefs)
            for fold, maps in zip(folds, of_deals, strict=True):
                every = torch.einsum("pd,kds->pks", inputs, maps)  # by all maps; each prefix takes that of its fold
                own = fold[:, None, None].expand(-1, 1, every.shape[2])
                residual = every.gather(1, own)[:, 0] - beliefs
                mae = weights @ residual.abs().mean(1)
                dist = weights @ residual.norm(dim=1)
                sums[name] += torch.stack([mae, dist])
        said.append(mean + inputs @ result["map"].to(beliefs))  # of the last layer, "concat"
    for name, result in results.items():
        means = sums[name] / len(result["maps"])
        result["mae"] = float(means[0])
        result["dist"] = float(means[1])
    return torch.cat(said)


def analyse(
    model: torch.nn.Module,
    untrained: torch.nn.Module,
    contexts,
    device: torch.device,
    last_token_only: bool = False,
    seed: int = 0,
    deals: int = DEALS,
) -> tuple[dict, dict]:
    """Regress beliefs on the activations of every layer and on all of them together; see collect_prefixes, regress.

    Returns (what analysis.json holds, what the pictures need). `untrained_r2_concat` is the same regression on the
    network as initialised: how much of the belief any random features of the context give. Every r2 is None where the
    beliefs do not vary: there is nothing to hold.
    """
    prefixes = collect_prefixes(model, contexts, device, last_token_only)
    control = collect_prefixes(untrained, contexts, device, last_token_only)
    whole = {"concat": control.columns["concat"]}
    widths = [columns.stop - columns.start for columns in (*prefixes.columns.values(), *whole.values())]
    P = len(prefixes.weights)
    with bar(None, f"analysing {P:,} prefixes", deals * sum(widths), "column", active=P > FEW_PREFIXES) as work:
        results = regress(prefixes, seed, deals, work.update)
        predicted = predict(prefixes, results)
        untrained_fit = regress(control._replace(columns=whole), seed, deals, work.update)["concat"]
    deals = len(results["concat"]["maps"])
    layers = {}
    r2_by_layer = {}
    for name, result in results.items():
        for tensor in ("maps", "map", "shift", "folds"):
            del result[tensor]
        layers[name] = result
        if name != "concat":
            r2_by_layer[name] = result["r2"]
    concat = layers["concat"]

    result = {
        "prefixes": P,
        "all_prefixes": contexts.exact,
        "deals": deals,
        "layers": layers,
        "r2_concat": concat["r2"],
        "r2_concat_spread": concat["r2_spread"],
        "r2_by_layer": r2_by_layer,
        "shuffled_r2_concat": concat["shuffled_r2"],
        "untrained_r2_concat": untrained_fit["r2"],
        "untrained_r2_concat_spread": untrained_fit["r2_spread"],
    }
    geometry = {
        "beliefs": prefixes.beliefs.cpu(),
        "predicted": predicted.cpu(),
        "weights": prefixes.weights.cpu(),
        "names": getattr(contexts, "states", None),  # of a copy's own contexts there may be none
    }
    return result, geometry


def has_gain(result: dict) -> bool:
    """Whether training put the belief there: r2 is above 0, and above the untrained network's by more than deals move
    either."""
    spread = result["r2_concat_spread"] or 0.0
    untrained_spread = result["untrained_r2_concat_spread"] or 0.0
    reached = result["untrained_r2_concat"] + max(spread, untrained_spread)
    return result["r2_concat"] > max(0.0, reached)


def belief_in_words(result: dict) -> str:
    """What the activations hold of the belief, beside the untrained network, as part of a sentence; see analyse."""
    if result["r2_concat"] is None:
        return "the belief is the same after every context, so there is none to look for"
    r2 = f"{result['r2_concat']:.4f}"
    if result["r2_concat_spread"] is not None:
        r2 += f" +- {result['r2_concat_spread']:.4f}"
    untrained = f"{result['untrained_r2_concat']:.4f}"
    if has_gain(result):
        return f"a linear map reads the belief out of the activations, held-out r2 {r2} (before training {untrained})"
    return f"held-out r2 of the belief {r2} is no gain over the untrained network's {untrained}"
