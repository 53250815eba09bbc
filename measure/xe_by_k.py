"""The law of cross entropy (XE) against the number of categories K, from the runs of a study: arrays in, dicts out.

A run trains on a set of K categories; a set may have runs of several seeds. Everything is in nats. Positions P are some
of those of the context, and after them the mean over all. What is undefined is nan, and None in a dict.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from measure.curves import interval
from sources.shared import counter_rng

LAWS = ("a + b log K", "a + b (1 - 1/K)", "a K^b")


class Study(NamedTuple):
    """XE of C categories in R runs.

    xe [R, C, P]: nan where a category was not measured. seen [R, C]: whether the run trained on it. seeds [R]. draws
    [B, R, C, P]: xe on documents drawn with replacement, as `draw_documents` gives it; None where none are known.
    """

    xe: ndarray
    seen: ndarray
    seeds: ndarray
    draws: ndarray | None = None

    @property
    def sizes(self) -> ndarray:
        """K of each run, [R]."""
        return self.seen.sum(1)

    @property
    def sets(self) -> ndarray:
        """The set of categories of each run, as a number, [R]."""
        return np.unique(self.seen, axis=0, return_inverse=True)[1].reshape(-1)

    def among(self, runs: ndarray) -> "Study":
        """Of these runs alone."""
        draws = None if self.draws is None else self.draws[:, runs]
        return Study(self.xe[runs], self.seen[runs], self.seeds[runs], draws)


def draw_documents(
    sums: list[ndarray], counts: ndarray, codes: ndarray, categories: int, resamples: int, seed: int
) -> ndarray:
    """XE by run, category and position on as many documents drawn with replacement, [B, R, C, P].

    Documents are drawn within their category, and the same ones for all runs, which are measured on the same: what is
    hard about a document is so in every run, and cancels in their differences. A category of one document is nan.

    Args:
        sums: [M, P] of each run, over the chunks of each document. counts: of these chunks [M]. codes: categories [M].
    """
    R, P = len(sums), sums[0].shape[1]
    draws = np.full((resamples, R, categories, P), np.nan)
    for code in np.unique(codes):
        chosen = np.flatnonzero(codes == code)
        M = len(chosen)
        if M < 2:
            continue
        runs = np.concatenate([run[chosen] for run in sums], 1)  # [M, R P]
        rng = counter_rng(seed, 6, int(code))
        for begin in range(0, resamples, 100):
            block = draws[begin : begin + 100, :, code]
            often = rng.multinomial(M, np.full(M, 1 / M), len(block))  # how often each document is drawn, [100, M]
            chunks = often @ counts[chosen]
            block[:] = (often @ runs / chunks[:, None]).reshape(-1, R, P)
    return draws


# ---------------------------------------------------------------------------------------------------------------
# Means by category and K
# ---------------------------------------------------------------------------------------------------------------
def cell_weights(
    study: Study,
    sizes: ndarray,
    seen: bool = True,
) -> ndarray:
    """What makes a mean m[c, K] of runs: seeds of a set count alike, then sets, [R, C, J] for J sizes K.

    seen: means over runs that trained on the category; else over those that did not. A mean of no run weighs 0.
    """
    trained = study.seen if seen else ~study.seen
    measured = np.isfinite(study.xe).all(2)
    sets = study.sets
    runs_of_set = np.bincount(sets)[sets]  # of the set of each run, [R]
    weights = []
    for K in sizes:
        chosen = trained & measured & (study.sizes == K)[:, None]
        share = chosen / runs_of_set[:, None]
        number_of_sets = share.sum(0)  # by category
        weights.append(np.nan_to_num(ratio(share, number_of_sets)))
    return np.stack(weights, 2)


def cell_means(xe: ndarray, weights: ndarray) -> ndarray:
    """m[c, K] from xe [..., R, C, P] and weights [R, C, J]: [..., C, J, P], nan where there is no run."""
    values = np.nan_to_num(xe)
    means = np.einsum("...rcp,rcj->...cjp", values, weights, optimize=True)
    has_runs = weights.any(0)  # [C, J]
    return np.where(has_runs[..., None], means, np.nan)


def ratio(total: ndarray, count: ndarray) -> ndarray:
    """total / count; nan where the count is 0."""
    there = count > 0
    return np.where(there, total / np.where(there, count, 1), np.nan)


def mean_of(values: ndarray, axis: int | tuple[int, ...]) -> ndarray:
    """The mean of what there is along axes; nan of nothing."""
    count = np.isfinite(values).sum(axis)
    return ratio(np.nansum(values, axis), count)


def paired_means(m: ndarray) -> ndarray:
    """The mean over categories by K, [..., J, P], of m [..., C, J, P], with the level of each category held fixed.

    Where every category has a mean at every K this is the plain mean. Otherwise a plain mean at one K would be of other
    categories than at the next, and their difference no effect of K.
    """
    effects, levels = additive(m)
    level = mean_of(levels, -2)
    return effects + level[..., None, :]


def additive(m: ndarray) -> tuple[ndarray, ndarray]:
    """Least squares of m[c, K] = level[c] + effect[K]: effects [..., J, P], levels [..., C, P].

    Effects are 0 on average. By alternation, which ends at once for complete tables; nan for rows and columns of nan.
    """
    effects = np.zeros_like(m[..., 0, :, :])
    for _ in range(200):
        before = effects
        levels = mean_of(m - effects[..., None, :, :], -2)
        effects = mean_of(m - levels[..., None, :], -3)
        effects = effects - mean_of(effects, -2)[..., None, :]
        change = np.abs(effects - before)
        if np.nanmax(change, initial=0.0) < 1e-13:
            break
    levels = mean_of(m - effects[..., None, :, :], -2)
    return effects, levels


def paired_errors(m: ndarray) -> ndarray:
    """Standard errors of paired_means over the C categories, [J, P]: of what is left without each one's own level.

    The within-subject error of Cousineau, with the factor of Morey (2008) for what the level has taken along. nan of a
    single category, or of a single K.
    """
    effects, levels = additive(m)
    K_there = np.isfinite(effects).any(1)
    J = K_there.sum()
    left = m - levels[:, None] - effects
    count = np.isfinite(left).sum(0)  # categories at each K
    square = np.nansum(left**2, 0)
    variance = ratio(square, np.where(count > 1, count - 1, 0))
    if J > 1:
        variance = variance * J / (J - 1)
    else:
        variance = np.full_like(variance, np.nan)
    return np.sqrt(ratio(variance, count))


# ---------------------------------------------------------------------------------------------------------------
# Laws of m[c, K], with a level a[c] of each category
# ---------------------------------------------------------------------------------------------------------------
class Fit(NamedTuple):
    """b [..., P], and the level of each category, [..., C, P]."""

    b: ndarray
    levels: ndarray


def fit_law(
    law: str,
    m: ndarray,
    sizes: ndarray,
) -> Fit:
    """Least squares of a law on m [..., C, J, P]; nan where no category has two sizes K."""
    if law == "a K^b":
        return fit_power(m, sizes)
    return fit_linear(m, shape_of(law, sizes))


def shape_of(law: str, K: ndarray) -> ndarray:
    """f of the linear laws a + b f(K)."""
    K = np.asarray(K, dtype=np.float64)
    return np.log(K) if law == "a + b log K" else 1 - 1 / K


def of_cells(b: ndarray) -> ndarray:
    """b [..., P] beside tables: [..., 1, 1, P]."""
    return b[..., None, None, :]


def predicted(
    law: str,
    fit: Fit,
    K: ndarray,
) -> ndarray:
    """What a law says of every category at sizes K [J]: [..., C, J, P]."""
    b = of_cells(fit.b)
    levels = fit.levels[..., None, :]
    if law == "a K^b":
        K = np.asarray(K, dtype=np.float64)
        return levels * K[:, None] ** b
    f = shape_of(law, K)
    return levels + b * f[:, None]


def fit_linear(m: ndarray, f: ndarray) -> Fit:
    """m[c, K] = a[c] + b f(K): b = sum (f - f_c) m / sum (f - f_c)^2, with f_c the mean of f over the sizes of c."""
    there = np.isfinite(m)
    f = f[:, None]
    x = np.where(there, f, np.nan)
    x = x - mean_of(x, -2)[..., None, :]
    product = np.nansum(x * m, (-3, -2))
    square = np.nansum(x**2, (-3, -2))
    b = ratio(product, square)
    levels = mean_of(m - of_cells(b) * f, -2)
    return Fit(b, levels)


def fit_power(m: ndarray, sizes: ndarray) -> Fit:
    """m[c, K] = a[c] K^b, in nats: given b the levels are linear, so b alone is searched (variable projection).

    By Gauss-Newton steps for all tables at once, from b = 0, which is near: XE differs by some percent over K.
    scipy.optimize.minimize_scalar finds the same, one table at a time.
    """
    there = np.isfinite(m)
    log_k = np.log(sizes)[:, None]
    has_slope = (there.sum(-2) > 1).any(-2)  # [..., P]
    b = np.where(has_slope, 0.0, np.nan)
    for _ in range(50):
        powers = np.exp(of_cells(b) * log_k)
        powers = np.where(there, powers, np.nan)
        levels = projection(m, powers)
        left = m - levels * powers
        # How the rest changes with b, where the levels follow: what of it the powers themselves are not.
        slope = levels * powers * log_k
        slope = slope - projection(slope, powers) * powers
        product = np.nansum(left * slope, (-3, -2))
        square = np.nansum(slope**2, (-3, -2))
        step = ratio(product, square)
        b = b + np.clip(step, -1, 1)
        size = np.abs(step)
        if np.nanmax(size, initial=0.0) < 1e-12:
            break
    return Fit(b, levels[..., 0, :])


def projection(y: ndarray, x: ndarray) -> ndarray:
    """The multiple of x [..., C, J, P] nearest to y, by category: [..., C, 1, P]."""
    product = np.nansum(y * x, -2, keepdims=True)
    square = np.nansum(x**2, -2, keepdims=True)
    return ratio(product, square)


def squared_errors(
    law: str,
    m: ndarray,
    sizes: ndarray,
) -> ndarray:
    """Squares of what a law leaves of m [..., C, J, P], the same shape."""
    fit = fit_law(law, m, sizes)
    left = m - predicted(law, fit, sizes)
    return left**2


def held_out_errors(
    law: str,
    m: ndarray,
    sizes: ndarray,
) -> ndarray:
    """Mean squared error of what a law, fitted without a K, says of that K: over cells of all K in turn, [..., P].

    nan of less than three sizes: a line through the one that is left would be any line.
    """
    errors = np.full_like(m, np.nan)
    if len(sizes) < 3:
        return mean_of(errors, (-3, -2))
    for j, K in enumerate(sizes):
        rest = m.copy()
        rest[..., j, :] = np.nan
        fit = fit_law(law, rest, sizes)
        said = predicted(law, fit, np.array([K]))[..., 0, :]
        errors[..., j, :] = (m[..., j, :] - said) ** 2
    return mean_of(errors, (-3, -2))


# ---------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------
def set_errors(
    study: Study,
    sizes: ndarray,
    law: str,
) -> ndarray | None:
    """How far each set is from what a law says of it that is fitted without it, [S, C, P].

    Of categories that a set lacks too, which have no weight in its means.

    Delete-one-cluster residuals: a set is the cluster, for what its categories share. None where a law has no slope
    without some set, as where a K has a single set and there is but one other K: then nothing tells how sets vary.
    """
    sets = study.sets
    errors = []
    for place in range(sets.max() + 1):
        runs = sets == place
        rest = study.among(~runs)
        weights = cell_weights(rest, sizes)
        fit = fit_law(law, cell_means(rest.xe, weights), sizes)
        if np.isnan(fit.b).any():
            return None
        K = study.sizes[runs][:1]
        said = predicted(law, fit, K)[:, 0]  # [C, P]
        # A category of this set alone takes no part in a slope: its error is nan, and counts as 0.
        error = study.xe[runs].mean(0) - said
        errors.append(np.nan_to_num(error))
    return np.array(errors)


def resampled_tables(
    study: Study,
    sizes: ndarray,
    law: str,
    resamples: int,
    seed: int,
) -> tuple[ndarray, str]:
    """(m [B, C, J, P] as it might have been, what varies: "documents and sets", one of them, or "").

    Documents are drawn with replacement. Sets are varied by a wild cluster bootstrap: each adds its delete-one residual
    times a random number, which for the slope is the jackknife over clusters (CR3; MacKinnon, Nielsen and Webb 2023,
    J. Applied Econometrics 38). Drawing sets with replacement would take no account of a K that has one set. The
    numbers are Student's with S - 2 degrees of freedom, for sets are few; they and the documents are the same for all
    positions. Sets count as independent but for their categories' levels: where pairs of categories help or hurt each
    other, the same pairs are in many sets, and the interval is of the law of these categories. As one for categories
    drawn at random it would be too narrow (85% in place of 95 in simulations of such pairs and 31 sets of 5).
    """
    weights = cell_weights(study, sizes)
    varied = []
    if study.draws is None:
        m = cell_means(study.xe, weights)
        tables = np.repeat(m[None], resamples, 0)
    else:
        tables = cell_means(study.draws[:resamples], weights)
        varied.append("documents")
    errors = set_errors(study, sizes, law)
    if errors is not None:
        S = len(errors)
        sets = study.sets
        of_sets = [weights[sets == place].sum(0) for place in range(S)]
        moved = errors[:, :, None] * np.array(of_sets)[..., None]  # means, by a set's error, [S, C, J, P]
        rng = counter_rng(seed, 7)
        freedom = max(1, S - 2)
        B = len(tables)
        scale = np.sqrt(freedom / rng.chisquare(freedom, B))
        factors = scale[:, None] * rng.standard_normal((B, S))
        tables = tables + np.tensordot(factors, moved, 1)
        varied.append("sets")
    return tables, " and ".join(varied)


# ---------------------------------------------------------------------------------------------------------------
# What a study says
# ---------------------------------------------------------------------------------------------------------------
def common_sizes(study: Study) -> ndarray:
    """The sizes K that a law can be fitted over: of categories that runs of several K have trained on."""
    sizes = np.unique(study.sizes)
    m = cell_means(study.xe, cell_weights(study, sizes))[..., -1]
    several = np.isfinite(m).sum(1) > 1
    return sizes[np.isfinite(m[several]).any(0)]


def law_of_k(study: Study, resamples: int = 1000, seed: int = 0) -> dict | None:
    """The laws of XE in K, at every position and of their mean; None where no category is in runs of two sizes.

    Returns:
        sizes [J], means [C, J, P], tables [B, C, J, P] about a + b log K, varied (what intervals are over), and laws:
        each with fit, b, low, high (nan where nothing varies), rms, held_out (rms over cells), all [P], and
        held_out_samples [B, P] of the square of the last.
    """
    sizes = common_sizes(study)
    if len(sizes) < 2:
        return None
    m = cell_means(study.xe, cell_weights(study, sizes))
    held_out = {law: held_out_errors(law, m, sizes) for law in LAWS}
    best = min(LAWS, key=lambda law: held_out[law][-1]) if len(sizes) > 2 else LAWS[0]
    # Sets vary about each law by what they are off it: where it does not fit, its own interval is the wider.
    tables = {law: resampled_tables(study, sizes, law, resamples, seed) for law in LAWS}
    laws = {}
    for law in LAWS:
        fit = fit_law(law, m, sizes)
        about, varied = tables[law]
        low = high = np.full(fit.b.shape, np.nan)
        if varied:
            low, high = interval(fit_law(law, about, sizes).b)
        laws[law] = {
            "fit": fit,
            "b": fit.b,
            "low": low,
            "high": high,
            "rms": np.sqrt(mean_of(squared_errors(law, m, sizes), (0, 1))),
            "held_out": np.sqrt(held_out[law]),
            # Laws are compared where they vary about the best of them.
            "held_out_samples": held_out_errors(law, tables[best][0], sizes),
        }
    about, varied = tables[LAWS[0]]
    return {"sizes": sizes, "means": m, "tables": about, "varied": varied, "laws": laws}


def told_apart(found: dict, p: int = -1) -> tuple[str, dict[str, bool]]:
    """(the best law at position p, for each other whether the study tells it from the best).

    The best misses a K that is held out by the least. It is told from another where the 95% interval of the difference
    of their squared errors, over documents and sets, is above 0. No criterion of information: cells m[c, K] are not
    independent, for a set adds the same to all of its categories, and how many they count as is not known.
    """
    laws = found["laws"]
    best = min(LAWS, key=lambda law: laws[law]["held_out"][p])
    others = {}
    for law in LAWS:
        if law == best:
            continue
        difference = laws[law]["held_out_samples"] - laws[best]["held_out_samples"]
        low, _ = interval(difference[:, p])
        others[law] = bool(found["varied"] and low > 0)
    return best, others


def bars_by_kind(study: Study) -> list[dict]:
    """For every K: the mean over categories, and how it varies by kind, at the mean over positions.

    sd_sets: over the sets' means over seeds and categories, each category's level taken off (another set is of other
    categories); sd_seeds: over seeds, pooled within sets; se_documents: of the mean, by drawing documents. None where
    there is one set, one seed a set, or where documents are not known.
    """
    sizes = np.unique(study.sizes)
    weights = cell_weights(study, sizes)
    m = cell_means(study.xe, weights)[..., -1:]
    _, levels = additive(m)
    left = study.xe[..., -1] - levels[:, 0]
    run_means = mean_of(np.where(study.seen, left, np.nan), 1)  # [R]
    rows = []
    for j, K in enumerate(sizes):
        chosen = study.sizes == K
        of_sets = [run_means[study.sets == place] for place in np.unique(study.sets[chosen])]
        row = {
            "K": int(K),
            "sets": len(of_sets),
            "runs": int(chosen.sum()),
            "xe": float(mean_of(m[:, j, 0], 0)),
            "sd_sets": deviation([seeds.mean() for seeds in of_sets]),
            "sd_seeds": pooled_deviation(of_sets),
            "se_documents": None,
        }
        if study.draws is not None:
            drawn = cell_means(study.draws[..., -1:], weights[..., j : j + 1])  # [B, C, 1, 1]
            means = mean_of(drawn[..., 0, 0], 1)
            row["se_documents"] = number(means.std(ddof=1))
        rows.append(row)
    return rows


def deviation(values: list[float]) -> float | None:
    """The standard deviation; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pooled_deviation(groups: list[ndarray]) -> float | None:
    """The standard deviation within groups, pooled; None of groups of one."""
    square = 0.0
    freedom = 0
    for values in groups:
        square += ((values - values.mean()) ** 2).sum()
        freedom += len(values) - 1
    return float(np.sqrt(square / freedom)) if freedom else None


def shared_errors(study: Study, sizes: ndarray, seen: bool = True) -> ndarray:
    """Standard error of the mean over categories at each K by what a run adds to all of its categories, [J].

    Errors over categories do not have it: a K of a single set has the luck of its seeds in every category. Variances
    are of means over the categories of a run, each one's own level taken off, pooled over K. That of seeds is divided
    by the runs of each K; that of sets, beyond it, counts as far as sets were left out: all sets of a K are no sample
    of others. Where there is one seed a set, sets vary by seeds too, and count whole. nan where there are no two sets
    of a K either. 0 at K = 1, where every category is of runs of its own. At the mean over positions.

    Args:
        seen: of categories that a set trained on; else of those that it did not, which share a run at K = 1 too.
    """
    trained = study.seen if seen else ~study.seen
    m = cell_means(study.xe, cell_weights(study, sizes, seen))[..., -1:]
    _, levels = additive(m)
    left = np.where(trained, study.xe[..., -1] - levels[:, 0], np.nan)
    run_means = mean_of(left, 1)  # [R]
    shares_runs = study.sizes > 1 if seen else np.isfinite(run_means)
    by_size, by_set, numbers, left_out = [], [], [], []
    C = int(study.seen.any(0).sum())
    for K in sizes:
        chosen = (study.sizes == K) & shares_runs
        sets = [run_means[chosen & (study.sets == place)] for place in np.unique(study.sets[chosen])]
        numbers.append(len(sets))
        left_out.append(1 - len(sets) / math.comb(C, int(K)))
        by_set += sets
        if sets:
            by_size.append(np.array([seeds.mean() for seeds in sets]))
    of_seeds = pooled_deviation(by_set)
    of_sets = pooled_deviation(by_size)
    if of_seeds is None:
        variance = np.full(len(sizes), np.nan if of_sets is None else of_sets**2)
    else:
        variance = of_seeds**2 / np.mean([len(seeds) for seeds in by_set])  # of a mean over the seeds of a set
        beyond = max(0.0, (of_sets or 0.0) ** 2 - variance)
        variance = variance + beyond * np.array(left_out)
    shared = np.sqrt(ratio(variance, np.array(numbers)))
    return np.where((np.array(sizes) == 1) & seen, 0.0, shared)


def growth_parts(study: Study, controls: dict[int, Study]) -> list[dict]:
    """What each category loses from K = 1 to K, apart by cause, at each position: a dict for each category and K.

    growth = m[c, K] - m[c, 1], of which dilution = XE of the control less m[c, 1]: it reads less of its own, and
    nothing else; interference = m[c, K] less the control: the others, which take room or help. Seeds are paired: only
    those that all three have count, a mean over them of means over sets.

    Args:
        controls: by K the runs on one category alone, at the share it has among K.
    """
    rows = []
    for K, control in controls.items():
        for c in np.flatnonzero(control.seen.any(0)):
            parts = []
            for seed in np.unique(control.seeds):
                alone = mean_at(study, 1, c, seed)
                among = mean_at(study, K, c, seed)
                diluted = mean_at(control, 1, c, seed)
                part = np.stack([among - alone, diluted - alone, among - diluted])  # [3, P]
                if np.isfinite(part).all():
                    parts.append(part)
            if parts:
                growth, dilution, interference = np.mean(parts, 0)
                rows.append(
                    {
                        "K": int(K),
                        "category": int(c),
                        "seeds": len(parts),
                        "growth": growth,
                        "dilution": dilution,
                        "interference": interference,
                    }
                )
    return rows


def mean_at(
    study: Study,
    K: int,
    c: int,
    seed: int,
) -> ndarray:
    """XE of category c over the sets of K that trained on it, of one seed, [P]; nan of none."""
    runs = study.sizes == K
    runs &= study.seen[:, c]
    runs &= study.seeds == seed
    return mean_of(study.xe[runs, c], 0)


def mean_and_error(values: list[float], shared: float = 0.0) -> tuple[float, float | None]:
    """Mean and its standard error over units, with the error that they share; None of a single one."""
    error = deviation(values)
    if error is not None:
        error = float(np.hypot(error / len(values) ** 0.5, shared))
    return float(np.mean(values)), error


def t_interval(values: list[float], shared: float = 0.0) -> tuple[float, float] | None:
    """The 95% interval of a mean over few units, by Student's t, with the error that they share; None of one."""
    from scipy.special import stdtrit  # slow to import, and only needed here

    mean, error = mean_and_error(values, shared)
    if error is None:
        return None
    width = float(stdtrit(len(values) - 1, 0.975)) * error
    return mean - width, mean + width


def tradeoff(study: Study) -> list[dict]:
    """XE of the same categories by K, in runs that trained on them and in runs that did not, at the mean position.

    Errors are over categories, paired: each one's own level is taken off; with what those of a set share, where that is
    known (shared_errors). None where a K has no unseen ones.
    """
    sizes = np.unique(study.sizes)
    rows = [{"K": int(K)} for K in sizes]
    for name, seen in (("seen", True), ("unseen", False)):
        weights = cell_weights(study, sizes, seen)
        m = cell_means(study.xe, weights)[..., -1:]
        means = paired_means(m)[:, 0]
        shared = np.nan_to_num(shared_errors(study, sizes, seen))
        errors = np.hypot(paired_errors(m)[:, 0], shared)
        for row, mean, error in zip(rows, means, errors, strict=True):
            row[f"{name}_xe"] = number(mean)
            row[f"{name}_se"] = number(error)
    return rows


def number(value: float) -> float | None:
    """A number for a table; None of nan."""
    return float(value) if np.isfinite(value) else None
