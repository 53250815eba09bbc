"""measure/xe_by_k.py: means by category and K, laws, intervals that cover, dilution apart from interference."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from measure import xe_by_k
from measure.xe_by_k import LAWS, Study

LOG, BOUNDED, POWER = LAWS


def every_set(C: int, sizes) -> np.ndarray:
    """All sets of these sizes, [S, C]."""
    rows = [np.isin(np.arange(C), chosen) for K in sizes for chosen in itertools.combinations(range(C), K)]
    return np.array(rows)


def rotations(C: int, sizes) -> np.ndarray:
    """Sets of neighbours in a circle of C, [S, C]: every category is in K of those of size K."""
    rows = [np.isin(np.arange(C), (start + np.arange(K)) % C) for K in sizes for start in range(C)]
    return np.unique(rows, axis=0)


def a_study(seen: np.ndarray, xe_of, seeds: int = 1) -> Study:
    """xe_of(set [C], number of the run) -> [C, P]."""
    xe, sets, numbers = [], [], []
    for run, (categories, seed) in enumerate(itertools.product(seen, range(seeds))):
        xe.append(xe_of(categories, run))
        sets.append(categories)
        numbers.append(seed)
    return Study(np.array(xe), np.array(sets), np.array(numbers))


def a_table(rng, *shape) -> np.ndarray:
    """m [..., C, J, P] about 2 nats, with holes in the same cells of all."""
    m = 2 + 0.3 * rng.standard_normal(shape)
    m[..., 0, -1, :] = np.nan
    m[..., 1, 0, :] = np.nan
    return m


# ---------------------------------------------------------------------------------------------------------- means


def test_cell_means_are_over_seeds_then_sets_that_have_the_category():
    rng = np.random.default_rng(0)
    seen = every_set(4, (1, 2, 4))
    runs = np.repeat(np.arange(len(seen)), rng.integers(1, 4, len(seen)))  # unequal numbers of seeds
    xe = rng.random((len(runs), 4, 3))
    study = Study(xe, seen[runs], np.arange(len(runs)))
    for among in (True, False):
        m = xe_by_k.cell_means(xe, xe_by_k.cell_weights(study, np.array([1, 2, 4]), among))
        for c, (j, K) in itertools.product(range(4), enumerate((1, 2, 4))):
            sets = [s for s in range(len(seen)) if seen[s].sum() == K and seen[s, c] == among]
            if not sets:
                assert K == 4 and not among and np.isnan(m[c, j]).all()
                continue
            expected = np.mean([xe[runs == s, c].mean(0) for s in sets], 0)
            assert np.allclose(m[c, j], expected, atol=1e-12)


def test_paired_means_take_composition_for_no_effect():
    """Categories of other levels at each K, and no effect of K."""
    levels = np.array([1.0, 2.0, 3.0])
    m = np.repeat(levels[:, None, None], 3, 1)
    m[2, 0] = m[0, 2] = np.nan
    assert np.nanmean(m, 0).ravel() == pytest.approx([1.5, 2, 2.5])
    assert xe_by_k.paired_means(m).ravel() == pytest.approx([2, 2, 2])
    whole = np.random.default_rng(1).random((5, 4, 2))
    assert np.allclose(xe_by_k.paired_means(whole), whole.mean(0), atol=1e-12)


def test_additive_levels_and_effects_are_least_squares():
    m = a_table(np.random.default_rng(2), 4, 3, 1)
    effects, levels = xe_by_k.additive(m)
    rows, values = [], []
    for c, j in zip(*np.nonzero(np.isfinite(m[..., 0])), strict=True):
        rows.append([*(np.arange(4) == c), *(np.arange(3) == j)])
        values.append(m[c, j, 0])
    found = np.linalg.lstsq(np.array(rows, float), np.array(values), rcond=None)[0]
    assert effects[:, 0] == pytest.approx(found[4:] - found[4:].mean(), abs=1e-9)
    assert levels[:, 0] == pytest.approx(found[:4] + found[4:].mean(), abs=1e-9)


def test_paired_errors_are_those_of_a_paired_difference():
    """Of two K the error of each mean is that of the mean difference over the root of 2, whatever the levels are."""
    m = np.random.default_rng(3).random((6, 2, 1))
    difference = m[:, 1, 0] - m[:, 0, 0]
    expected = difference.std(ddof=1) / 6**0.5 / 2**0.5
    errors = xe_by_k.paired_errors(m)
    assert errors[:, 0] == pytest.approx([expected, expected])
    assert np.allclose(xe_by_k.paired_errors(m + 10 * np.arange(6)[:, None, None]), errors)
    assert np.isnan(xe_by_k.paired_errors(m[:1])).all() and np.isnan(xe_by_k.paired_errors(m[:, :1])).all()


# ----------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("law, f", [(LOG, np.log), (BOUNDED, lambda K: 1 - 1 / K)])
def test_linear_laws_are_least_squares_with_a_level_a_category(law, f):
    sizes = np.array([1, 2, 5])
    m = a_table(np.random.default_rng(4), 2, 4, 3, 2)  # two tables, two positions
    fit = xe_by_k.fit_law(law, m, sizes)
    for table, p in itertools.product(range(2), range(2)):
        cells = list(zip(*np.nonzero(np.isfinite(m[table, :, :, p])), strict=True))
        rows = np.array([[f(sizes[j]), *(np.arange(4) == c)] for c, j in cells], float)
        found = np.linalg.lstsq(rows, np.array([m[table, c, j, p] for c, j in cells]), rcond=None)[0]
        assert fit.b[table, p] == pytest.approx(found[0])
        assert fit.levels[table, :, p] == pytest.approx(found[1:])


def test_the_power_law_is_that_of_a_search_in_one_dimension():
    sizes = np.array([1, 2, 5])
    m = a_table(np.random.default_rng(5), 3, 4, 3, 2)
    fit = xe_by_k.fit_law(POWER, m, sizes)
    for table, p in itertools.product(range(3), range(2)):
        y = m[table, :, :, p]

        def error(b, y=y):
            g = np.where(np.isfinite(y), sizes**b, 0)
            levels = np.nansum(y * g, 1) / (g**2).sum(1)
            return np.nansum((y - levels[:, None] * sizes**b) ** 2)

        best = minimize_scalar(error, bounds=(-2, 2), method="bounded", options={"xatol": 1e-10})
        assert fit.b[table, p] == pytest.approx(best.x, abs=1e-6)
        errors = xe_by_k.squared_errors(POWER, m[table], sizes)[..., p]
        assert np.nansum(errors) == pytest.approx(best.fun, rel=1e-6)


@pytest.mark.parametrize("law", LAWS)
def test_a_planted_law_is_found_and_told_from_the_others(law):
    """Noise is a hundredth of the effect: five values of K do tell then."""
    levels = np.array([1.0, 1.5, 2.2, 3.0, 4.0])
    rng = np.random.default_rng(6)
    b = 0.4

    def xe_of(categories, run):
        K = categories.sum()
        mean = {LOG: levels + b * np.log(K), BOUNDED: levels + b * (1 - 1 / K), POWER: levels * K**b}[law]
        return (mean + 0.004 * rng.standard_normal(5))[:, None]

    found = xe_by_k.law_of_k(a_study(every_set(5, range(1, 6)), xe_of), 200)
    assert found["laws"][law]["b"][0] == pytest.approx(b, abs=0.01) and found["varied"] == "sets"
    assert found["laws"][law]["low"][0] < b < found["laws"][law]["high"][0]
    best, told = xe_by_k.told_apart(found)
    assert best == law and told == {other: True for other in LAWS if other != law}


def test_noise_as_large_as_the_effect_tells_no_law_from_another():
    rng = np.random.default_rng(7)

    def xe_of(categories, run):
        return (2 + 0.05 * np.log(categories.sum()) + 0.1 * rng.standard_normal(5))[:, None]

    noisy = a_study(every_set(5, range(1, 6)), xe_of)
    _, told = xe_by_k.told_apart(xe_by_k.law_of_k(noisy, 200))
    assert not any(told.values())


def test_held_out_errors_are_those_of_a_loop():
    sizes = np.array([1, 2, 4])
    m = a_table(np.random.default_rng(8), 4, 3, 1)
    errors = []
    for j in range(3):
        rest = np.delete(m, j, 1)
        fit = xe_by_k.fit_law(LOG, rest, np.delete(sizes, j))
        errors += ((m[:, j] - fit.levels - fit.b * np.log(sizes[j])) ** 2).ravel().tolist()
    assert xe_by_k.held_out_errors(LOG, m, sizes)[0] == pytest.approx(np.nanmean(errors))
    assert np.isnan(xe_by_k.held_out_errors(LOG, m[:, :2], sizes[:2])).all()  # one K left has any slope


def test_no_law_without_a_category_in_runs_of_two_sizes():
    seen = np.array([[True, False, False], [False, True, True]])
    assert xe_by_k.law_of_k(a_study(seen, lambda s, run: np.ones((3, 1)))) is None
    assert xe_by_k.law_of_k(a_study(every_set(3, (2,)), lambda s, run: np.ones((3, 1)))) is None


# ------------------------------------------------------------------------------------------------------ intervals


def documents_of(rng, seen: np.ndarray, b: float, set_sd: float, M: int = 20) -> Study:
    """A study of the law a + b log K whose documents are hard or easy in all runs, and noisy in each; a run a set."""
    C = seen.shape[1]
    codes = np.repeat(np.arange(C), M)
    counts = rng.integers(1, 4, len(codes))
    level = 2 + rng.standard_normal(C)[codes] + 0.5 * rng.standard_normal(len(codes))
    sums = []
    for categories in seen:
        together = set_sd * rng.standard_normal()  # what the categories of a run share
        apart = 0.5 * set_sd * rng.standard_normal(C)[codes]
        xe = level + b * np.log(categories.sum()) + together + apart + 0.1 * rng.standard_normal(len(codes))
        sums.append((xe * counts)[:, None])
    totals = [np.bincount(codes, run[:, 0]) / np.bincount(codes, counts) for run in sums]
    draws = xe_by_k.draw_documents(sums, counts, codes, C, 200, 0)
    return Study(np.array(totals)[..., None], seen, np.zeros(len(seen)), draws)


@pytest.mark.parametrize("seen, set_sd, studies", [(rotations(4, (1, 2, 4)), 0.03, 60),
                                                   (every_set(5, range(1, 6)), 0.03, 30),
                                                   (rotations(4, (1, 2, 4)), 0.0, 40)])
def test_95_percent_intervals_cover_the_slope(seen, set_sd, studies):
    """Documents are few and hard, sets differ, and the largest K has a single one."""
    sizes = np.unique(seen.sum(1))
    covered = 0
    slopes, widths = [], []
    for seed in range(studies):
        study = documents_of(np.random.default_rng(seed), seen, 0.1, set_sd)
        tables, varied = xe_by_k.resampled_tables(study, sizes, LOG, 200, seed)
        low, high = xe_by_k.interval(xe_by_k.fit_law(LOG, tables, sizes).b[:, 0])
        covered += low <= 0.1 <= high
        widths.append(high - low)
        m = xe_by_k.cell_means(study.xe, xe_by_k.cell_weights(study, sizes))
        slopes.append(xe_by_k.fit_law(LOG, m, sizes).b[0])
    assert varied == "documents and sets" and 0.88 <= covered / studies
    assert np.median(widths) < 2.5 * 4 * np.std(slopes)  # and not by being wide


def test_documents_are_drawn_alike_in_all_runs_and_within_their_category():
    rng = np.random.default_rng(9)
    codes = np.array([0] * 40 + [2] * 30 + [1])
    counts = rng.integers(1, 4, len(codes))
    xe = 3 + rng.standard_normal(len(codes)) + 10 * codes
    first = (xe * counts)[:, None]
    draws = xe_by_k.draw_documents([first, first + 0.5 * counts[:, None]], counts, codes, 4, 2000, 1)
    assert draws.shape == (2000, 2, 4, 1)
    assert np.allclose(draws[:, 1, [0, 2]] - draws[:, 0, [0, 2]], 0.5)  # hard documents cancel between runs
    assert np.isnan(draws[:, :, [1, 3]]).all()  # one document, and none
    chosen = codes == 0
    mean = (xe * counts)[chosen].sum() / counts[chosen].sum()
    left = (xe[chosen] - mean) * counts[chosen]
    error = np.sqrt((left**2).sum()) / counts[chosen].sum()  # of a ratio of means, by the delta method
    assert draws[:, 0, 0].mean() == pytest.approx(mean, abs=4 * error / 2000**0.5 + 0.01)
    assert draws[:, 0, 0].std() == pytest.approx(error, rel=0.1)


def test_without_a_second_set_nothing_says_how_sets_vary():
    """Two K, the larger of one set: a law without that set has no slope."""
    found = xe_by_k.law_of_k(a_study(rotations(3, (1, 3)), lambda s, run: np.full((3, 1), 2 + 0.1 * s.sum())))
    assert found["varied"] == "" and np.isnan(found["laws"][LOG]["low"]).all()
    assert found["laws"][LOG]["b"][0] == pytest.approx(0.2 / np.log(3))
    assert np.isnan(found["laws"][LOG]["held_out"]).all()


def test_resamples_are_joint_over_positions():
    """Two positions of the same numbers vary as one: their difference has no error."""
    rng = np.random.default_rng(10)
    study = documents_of(rng, rotations(4, (1, 2, 4)), 0.1, 0.03)
    twice = Study(np.repeat(study.xe, 2, 2), study.seen, study.seeds, np.repeat(study.draws, 2, 3))
    tables = xe_by_k.law_of_k(twice, 200)["tables"]
    assert np.allclose(tables[..., 0], tables[..., 1]) and tables[..., 0].std(0).min() > 0


def test_bars_by_kind_are_deviations_of_sets_and_of_seeds_within_them():
    rng = np.random.default_rng(11)
    seen = every_set(3, (1, 2, 3))
    levels = np.array([1.0, 5.0, 9.0])
    of_set = rng.standard_normal(len(seen))
    noise = rng.standard_normal((len(seen), 2))
    study = a_study(seen, lambda s, run: (levels + of_set[run // 2] + noise[run // 2, run % 2])[:, None], seeds=2)
    rows = xe_by_k.bars_by_kind(study)
    assert [(row["K"], row["sets"], row["runs"]) for row in rows] == [(1, 3, 6), (2, 3, 6), (3, 1, 2)]
    for row, sets in zip(rows, (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
        within = noise[sets] - noise[sets].mean(1, keepdims=True)
        assert row["sd_seeds"] == pytest.approx(np.sqrt((within**2).sum() / len(within)))
        assert row["se_documents"] is None
    assert rows[2]["sd_sets"] is None and rows[2]["xe"] == pytest.approx(levels.mean() + of_set[6] + noise[6].mean())
    # of sets of other levels: what is left of these is a share of the sets' own spread
    assert 0 < rows[1]["sd_sets"] < 4
    single = xe_by_k.bars_by_kind(a_study(seen, lambda s, run: levels[:, None]))
    assert [row["sd_seeds"] for row in single] == [None] * 3 and single[0]["sd_sets"] == pytest.approx(0, abs=1e-9)


# --------------------------------------------------------------------------------- dilution, interference, trade-off


def test_growth_is_dilution_and_interference_paired_by_category_and_seed():
    levels = np.array([1.0, 2.0, 3.0])
    of_seed = {0: 0.0, 1: 10.0, 2: 50.0}  # a seed that one side lacks would show
    seen = every_set(3, (1, 2))
    study = a_study(seen, lambda s, run: (levels + 0.5 * np.log(s.sum()) + of_seed[run % 2])[:, None], seeds=2)
    alone = every_set(3, (1,))
    control = a_study(alone, lambda s, run: (levels + 0.2 + np.array([0, 0, 0.1]) + of_seed[run % 3])[:, None], seeds=3)
    parts = xe_by_k.growth_parts(study, {2: control})
    assert [(part["K"], part["category"], part["seeds"]) for part in parts] == [(2, 0, 2), (2, 1, 2), (2, 2, 2)]
    for part, dilution in zip(parts, (0.2, 0.2, 0.3), strict=True):
        assert part["growth"][0] == pytest.approx(0.5 * np.log(2))
        assert part["dilution"][0] == pytest.approx(dilution)
        assert part["interference"][0] == pytest.approx(0.5 * np.log(2) - dilution)
    assert xe_by_k.growth_parts(study, {3: control}) == []


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_a_run_adds_to_all_of_its_categories_is_in_the_error_of_growth(seeds):
    """The largest K has one set: its luck is in every category, and errors over categories alone know nothing of it."""
    seen = rotations(4, (1, 2, 4))
    covered, narrow = 0, 0
    for number in range(100):
        rng = np.random.default_rng(number)

        def xe_of(categories, run, rng=rng):
            luck = 0.03 * rng.standard_normal()
            return (2 + 0.1 * np.log(categories.sum()) + luck + 0.01 * rng.standard_normal(4))[:, None]

        study = a_study(seen, xe_of, seeds)
        parts = xe_by_k.growth_parts(study, {4: study.among(study.sizes == 1)})
        growth = [part["growth"][0] for part in parts]
        shared = xe_by_k.shared_errors(study, np.array([1, 2, 4]))
        low, high = xe_by_k.t_interval(growth, shared[2])
        covered += low <= 0.1 * np.log(4) <= high
        low, high = xe_by_k.t_interval(growth)
        narrow += low <= 0.1 * np.log(4) <= high
    assert covered > 0.92 * 100 and narrow < 0.9 * 100


def test_shared_errors_are_of_seeds_and_of_sets_as_far_as_some_were_left_out():
    levels = np.array([1.0, 5.0, 9.0, 2.0])
    sizes = np.array([1, 2, 4])
    seen = rotations(4, (1, 2, 4))
    noise = 3 * np.random.default_rng(12).standard_normal((9, 1)) + np.random.default_rng(13).standard_normal((9, 2))
    study = a_study(seen, lambda s, run: (levels + noise[run // 2, run % 2])[:, None], seeds=2)
    several = seen.sum(1) > 1
    within = noise - noise.mean(1, keepdims=True)
    of_seeds = (within[several] ** 2).sum() / several.sum() / 2  # in a mean over two
    of_pairs = study.xe[study.sizes == 2, :, 0] - levels_of(study, sizes)
    pairs = np.array([run[s].mean() for run, s in zip(of_pairs, study.seen[study.sizes == 2], strict=True)])
    beyond = pairs.reshape(4, 2).mean(1).var(ddof=1) - of_seeds
    assert beyond > 0  # four of six pairs were trained on, and the only set of four
    assert xe_by_k.shared_errors(study, sizes) == pytest.approx(
        [0, np.sqrt((of_seeds + beyond * (1 - 4 / 6)) / 4), np.sqrt(of_seeds)])
    few = study.among(study.sizes != 2)
    of_four = (within[seen.sum(1) == 4] ** 2).sum() / 2
    assert xe_by_k.shared_errors(few, sizes[[0, 2]]) == pytest.approx([0, np.sqrt(of_four)])
    one = study.among(study.seeds == 0)  # seeds are not known apart from sets
    pairs = one.xe[one.sizes == 2, :, 0] - levels_of(one, sizes)
    pairs = np.array([run[s].mean() for run, s in zip(pairs, one.seen[one.sizes == 2], strict=True)])
    assert xe_by_k.shared_errors(one, sizes) == pytest.approx([0, pairs.std(ddof=1) / 2, pairs.std(ddof=1)])
    assert np.isnan(xe_by_k.shared_errors(few.among(few.seeds == 0), sizes[[0, 2]])[1])


def levels_of(study: Study, sizes: np.ndarray) -> np.ndarray:
    """The level of each category, [C]."""
    return xe_by_k.additive(xe_by_k.cell_means(study.xe, xe_by_k.cell_weights(study, sizes)))[1][:, 0]


def test_the_tradeoff_is_of_the_same_categories_seen_and_unseen():
    levels = np.array([1.0, 2.0, 6.0])

    def xe_of(categories, run):
        K = categories.sum()
        return (levels + np.where(categories, 0.1 * K, 1 - 0.2 * K))[:, None]

    rows = xe_by_k.tradeoff(a_study(every_set(3, (1, 2, 3)), xe_of))
    assert [row["seen_xe"] for row in rows] == pytest.approx([3.1, 3.2, 3.3])
    assert [row["unseen_xe"] for row in rows[:2]] == pytest.approx([3.8, 3.6])
    assert rows[2]["unseen_xe"] is None and rows[2]["unseen_se"] is None
    assert [row["seen_se"] for row in rows] == pytest.approx([0, 0, 0], abs=1e-9)
    # The luck of a run is in all of its categories alike: errors over categories alone do not have it.
    luck = np.random.default_rng(13).standard_normal(7)
    lucky = a_study(every_set(3, (1, 2, 3)), lambda s, run: xe_of(s, run) + luck[run])
    for name, seen in (("seen", True), ("unseen", False)):
        sizes = np.array([1, 2, 3])
        m = xe_by_k.cell_means(lucky.xe, xe_by_k.cell_weights(lucky, sizes, seen))
        shared = xe_by_k.shared_errors(lucky, sizes, seen)
        expected = np.hypot(xe_by_k.paired_errors(m)[:, 0], shared)
        found = [row[f"{name}_se"] for row in xe_by_k.tradeoff(lucky)]
        assert shared[1] > 0.1 and found[:2] == pytest.approx(expected[:2])
        assert found[2] == (pytest.approx(expected[2]) if seen else None)


def test_an_interval_over_few_categories_is_students():
    values = [1.0, 2.0, 4.0]
    low, high = xe_by_k.t_interval(values)
    mean, error = xe_by_k.mean_and_error(values)
    assert (high - mean) / error == pytest.approx(4.3027, abs=1e-4) and mean - low == pytest.approx(high - mean)
    assert xe_by_k.mean_and_error(values, 2.0)[1] == pytest.approx(np.hypot(error, 2))
    assert xe_by_k.t_interval([1.0]) is None and xe_by_k.mean_and_error([1.0]) == (1.0, None)
