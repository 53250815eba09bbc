"""measure/effects.py: metrics against hand computation, scipy and cell-eval; baselines against their formulas."""

import contextlib
import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import DataError
from measure import effects
from measure.baselines import Baselines, control_rows, train_baselines
from measure.effects import (
    LABELS,
    METRICS,
    best_baseline,
    differential_expression,
    discrimination,
    energy_distance,
    evaluate_conditions,
    format_table,
    is_defined,
    mean_distance,
    overlap_top,
    pearson,
    plot_metrics,
    pseudobulk,
    write_metrics,
)


def expression(rng: np.random.Generator, n: int, G: int, level=1.0) -> np.ndarray:
    """Cells [n, G] as log1p data are: many zeros, ties, no negative value."""
    return np.log1p(rng.poisson(np.broadcast_to(level, (n, G)))).astype(np.float32)


@pytest.fixture(scope="module")
def screen() -> dict:
    """Two cell types, four perturbations of each, named after genes where they can be; the prediction errs."""
    return make_screen(160)


def make_screen(G: int) -> dict:
    rng = np.random.default_rng(3)
    base, effect = rng.gamma(1, 2, (2, G)), np.exp(rng.normal(0, 1, (4, G)))
    conditions = [(f"type{t}", p) for t in (0, 1) for p in ("g3", "g7", "drug", "g0")]
    size = [25, 40, 1, 33, 28, 30, 21, 50]
    cells = {"real": [], "pred": []}
    for c, n in enumerate(size):
        for what, wrong in (("real", 0), ("pred", 0.4)):
            level = base[c // 4] * effect[c % 4] * np.exp(wrong * rng.normal(size=G))
            cells[what].append(expression(rng, n + (7 if what == "pred" else 0), G, level))
    code = {what: np.repeat(np.arange(8), [len(x) for x in sets]) for what, sets in cells.items()}
    mixed = {what: rng.permutation(len(code[what])) for what in code}
    control_type = np.repeat([1, 0], [60, 45])
    return {"pred": np.concatenate(cells["pred"])[mixed["pred"]], "pred_condition": code["pred"][mixed["pred"]],
            "real": np.concatenate(cells["real"])[mixed["real"]], "real_condition": code["real"][mixed["real"]],
            "control": np.concatenate([expression(rng, 60, G, base[1]), expression(rng, 45, G, base[0])]),
            "control_type": control_type, "conditions": conditions, "cell_types": ["type0", "type1"],
            "genes": [f"g{i}" for i in range(G)]}


def test_pseudobulk_is_the_mean_of_each_group_in_any_order():
    x = np.array([[1, 2], [3, 5], [10, 0], [5, 5]], np.float32)
    means = pseudobulk(x, np.array([2, 0, 2, -1]), 4)
    assert means.dtype == np.float64
    np.testing.assert_array_equal(means, [[3, 5], [np.nan] * 2, [5.5, 1], [np.nan] * 2])
    many = np.full((300_000, 1), 16.1, np.float32)  # a float32 sum of these is wrong in the fourth digit
    assert pseudobulk(many, np.zeros(len(many), int), 1)[0, 0] == pytest.approx(float(np.float32(16.1)), abs=1e-9)


def test_pearson_is_that_of_scipy_and_nan_for_constant_rows():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).normal(size=(2, 5, 9))
    np.testing.assert_allclose(pearson(a, b), [stats.pearsonr(x, y)[0] for x, y in zip(a, b, strict=True)], rtol=1e-12)
    assert pearson(np.array([[1.0, 2, 3]]), np.array([[-2.0, -4, -6]])) == pytest.approx(-1)
    a[1], b[2] = 0.1, 0  # 0.1 less its own mean is not exactly 0
    assert list(np.isnan(pearson(a, b))) == [False, True, True, False, False]


def test_energy_distance_by_hand_and_over_all_pairs():
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0]])
    assert energy_distance(x, y) == pytest.approx(2.5 - 0.5 / 2 - 0, abs=1e-12)
    assert energy_distance(y, y) == pytest.approx(0, abs=1e-9) and energy_distance(x, x) == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(37, 6)), rng.normal(0.5, 1, size=(23, 6)) + 100  # far from the origin

    def mean(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2).mean()

    expected = mean(x, y) - mean(x, x) / 2 - mean(y, y) / 2
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert energy_distance(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-5)
    for a, b in ((x, y), (x, x), (y, x)):  # blocks that do not divide the sets
        assert mean_distance(a, b, block=8) == pytest.approx(mean(a, b), rel=1e-9)
    single = x.astype(np.float32)  # a point is at distance 0 from itself, not at the root of a rounding error
    assert mean_distance(single, single) == pytest.approx(mean(x, x), rel=1e-5)


def test_energy_distance_is_that_of_the_loss():
    geomloss = pytest.importorskip("geomloss")
    import torch

    x, y = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = geomloss.SamplesLoss("energy")(x, y + 1).item()
    ours = energy_distance(x.numpy(), y.numpy() + 1)  # geomloss counts 1e-4 for a point to itself, ours 0
    assert ours == pytest.approx(expected + 1e-4 / 40, abs=1e-9)


def test_discrimination_ranks_the_true_perturbation():
    real = np.array([[0.0, 0], [1, 0], [4, 0], [9, 0]])
    guess = np.array([[0.1, 0], [3, 0], [-5, 0], [6.5, 0]])  # nearest: 0 | 2, then 1 | 0, 1, then 2 | 2 and 3 tie
    np.testing.assert_allclose(discrimination(guess, real), [1, 3 / 4, 2 / 4, 1 - 0.5 / 4])
    assert np.isnan(discrimination(guess[:1], real[:1])).all()  # one alone has no rank
    real, guess = np.array([[0.0, 5], [1, 0]]), np.array([[0.0, -9], [1, 0]])  # the second gene misleads the first row
    assert list(discrimination(guess, real)) == [0.5, 1]
    assert list(discrimination(guess, real, np.array([1, -1]))) == [1, 1]


def test_p_values_are_adjusted_as_benjamini_and_hochberg_do():
    rng = np.random.default_rng(2)
    found = differential_expression(expression(rng, 40, 5, [1, 2, 3, 4, 5]), expression(rng, 50, 5, 3))
    p, adjusted = found["p"][0], found["adjusted"][0]
    for i, value in enumerate(adjusted):  # the least, over all that are no smaller, of p * G / rank
        ranks = [(p <= q).sum() for q in p]
        assert value == pytest.approx(min(q * 5 / rank for q, rank in zip(p, ranks, strict=True) if q >= p[i]))


def test_differential_expression_orders_significant_genes_by_fold_change():
    rng = np.random.default_rng(2)
    control = expression(rng, 200, 6, [5, 5, 5, 5, 0, 0])
    x = expression(rng, 100, 6, [5, 10, 40, 0.5, 0, 9])
    found = differential_expression(x, control)
    change = found["log_fold_change"][0]
    assert found["significant"] == [4] and list(found["order"][0]) == [5, 3, 2, 1, 0, 4]
    assert change[5] == np.inf and change[4] == 0
    ratio = np.expm1(x[:, 2].mean(dtype=np.float64)) / np.expm1(control[:, 2].mean(dtype=np.float64))
    assert change[2] == pytest.approx(math.log2(ratio))


def test_overlap_counts_shared_genes_among_as_many_as_there_are():
    def genes(order, significant):
        return {"order": np.array([order]), "significant": np.array([significant])}

    real, guess = genes([4, 2, 0, 1, 3, 5], 4), genes([2, 5, 4, 0, 1, 3], 3)
    assert overlap_top(guess, real, 2) == [1 / 2]  # {4, 2} and {2, 5}
    assert overlap_top(guess, real, 6) == [2 / 4]  # {4, 2, 0, 1} and {2, 5, 4}
    assert overlap_top(guess, real, None, "precision") == [2 / 3]  # {2, 5, 4} among {4, 2, 0}
    nothing = genes([0, 1, 2, 3, 4, 5], 0)
    assert overlap_top(nothing, real, 5) == overlap_top(nothing, real, 5, "precision") == [0]  # nothing found of four
    assert overlap_top(guess, nothing, 5, "precision") == [0]  # nothing right of three
    for undefined in ((guess, nothing, 5), (nothing, nothing, 5, "precision"), (guess, nothing, None),
                      (guess, real, 7), (guess, real, 7, "precision")):  # nothing to find, or more than there are genes
        assert np.isnan(overlap_top(*undefined)).all()


@pytest.mark.filterwarnings("ignore")  # of the packages compared with
def test_evaluation_equals_cell_eval(tmp_path):
    screen = make_screen(500)  # of fewer genes cell-eval gives overlap_at_500 what overlap_at_N is
    anndata = pytest.importorskip("anndata")
    cell_eval = pytest.importorskip("cell_eval")
    found, depth = evaluate_conditions(**screen)["model"]["per_condition"], set()
    for t, cell_type in enumerate(screen["cell_types"]):
        ours = {r["perturbation"]: r for r in found if r["cell_type"] == cell_type}
        control, both = screen["control"][screen["control_type"] == t], {}
        for what in ("pred", "real"):
            code = screen[f"{what}_condition"]
            rows = np.flatnonzero(code // 4 == t)
            names = [screen["conditions"][c][1] for c in code[rows]] + ["non-targeting"] * len(control)
            both[what] = anndata.AnnData(np.concatenate([screen[what][rows], control]))
            both[what].obs_names = [f"cell{i}" for i in range(len(names))]
            both[what].var_names, both[what].obs["target"] = screen["genes"], names
        theirs, _ = cell_eval.MetricsEvaluator(
            both["pred"], both["real"], num_threads=1, outdir=str(tmp_path)
        ).compute(write_csv=False, skip_metrics=["clustering_agreement"], break_on_error=True)
        assert theirs.height == len(ours) == 4
        for row in theirs.iter_rows(named=True):
            record = ours[row["perturbation"]]
            record["discrimination_score_l1"] = record["discrimination"]
            same = [k for k in record if k in row and k != "perturbation"]
            assert len(same) == 14
            depth.add(len({record["overlap_at_50"], record["overlap_at_100"], record["overlap_at_N"]}))
            for metric in same:
                assert record[metric] == pytest.approx(row[metric], rel=1e-5, abs=1e-7), (cell_type, metric, row)
    assert max(depth) > 1  # lists of 50 are not all there is


def test_evaluation_is_the_single_metrics_of_each_condition(screen):
    result = evaluate_conditions(**screen)["model"]
    for c, record in enumerate(result["per_condition"]):
        real, guess = (screen[w][screen[f"{w}_condition"] == c].astype(float) for w in ("real", "pred"))
        cells = screen["control"][screen["control_type"] == c // 4]
        control = cells.astype(float).mean(0)
        assert (record["cell_type"], record["perturbation"]) == screen["conditions"][c]
        assert record["n_cells"] == len(real)
        assert record["mae"] == pytest.approx(np.abs(real.mean(0) - guess.mean(0)).mean())
        assert record["energy_distance"] == pytest.approx(energy_distance(guess, real), rel=1e-4)
        r = np.corrcoef(real.mean(0) - control, guess.mean(0) - control)[0, 1]
        assert record["pearson_delta"] == pytest.approx(r)
        both = [differential_expression(x.astype(np.float32), cells) for x in (guess, real)]
        np.testing.assert_equal(record["overlap_at_100"], overlap_top(*both, 100)[0])
        np.testing.assert_allclose(result["delta"][c], guess.mean(0) - control, atol=1e-7)
        np.testing.assert_allclose(result["real_delta"][c], real.mean(0) - control, atol=1e-7)
    for metric, value in result["mean"].items():
        values = [r[metric] for r in result["per_condition"]]
        assert np.isnan(values).all() or value == pytest.approx(np.nanmean(values))
    beyond = {f"{kind}_at_{n}" for kind in ("overlap", "precision") for n in (200, 500)}  # of 160 genes
    assert {name for name, value in result["mean"].items() if value != value} == beyond
    for record in result["per_condition"]:
        lacks = {name for name, value in record.items() if value != value}
        assert lacks == beyond or record["n_cells"] == 1  # of one cell no gene is significant: there is none to find
    assert np.isnan(result["per_condition"][2]["overlap_at_N"]) and result["per_condition"][2]["energy_distance"] > 0


def test_a_perfect_prediction_is_perfect_and_no_effect_is_worth_nothing(screen):
    G = screen["control"].shape[1]
    control = np.array([screen["control"][screen["control_type"] == c // 4].mean(0, dtype=float) for c in range(8)])
    truth = pseudobulk(screen["real"], screen["real_condition"], 8)
    result = evaluate_conditions(**screen | {"pred": screen["real"], "pred_condition": screen["real_condition"]},
                                 baseline_means={"control_mean": control + 1e-12 * np.arange(G), "truth": truth})
    best = {"pearson_delta": 1, "mae": 0, "mse": 0, "discrimination": 1, "energy_distance": 0}
    for metric, value in best.items():
        assert result["model"]["mean"][metric] == pytest.approx(value, abs=2e-4), metric
        if metric != "energy_distance":  # shifted control cells have the mean and not the shape
            assert result["truth"]["mean"][metric] == pytest.approx(value, abs=1e-9), metric
    for metric in ("pearson_delta", "overlap_at_50"):
        assert result["control_mean"]["mean"][metric] == pytest.approx(0, abs=1e-9)
    assert result["truth"]["mean"]["energy_distance"] < result["control_mean"]["mean"]["energy_distance"]
    assert best_baseline(result) == best_baseline(result, "mse") == "truth"


def test_the_cells_of_a_baseline_are_clipped_shifted_controls(screen):
    control = screen["control"][screen["control_type"] == 0]
    means = np.array([control.mean(0, dtype=float) - 0.5] * 8)
    given = {k: v for k, v in screen.items() if k != "genes"}
    for clip in (True, False):
        record = evaluate_conditions(**given, baseline_means={"b": means}, expression=clip)["b"]["per_condition"][1]
        cells = control[np.arange(40) * 45 // 40] - 0.5
        real = screen["real"][screen["real_condition"] == 1]
        expected = energy_distance(cells.clip(min=0) if clip else cells, real)
        assert record["energy_distance"] == pytest.approx(expected, rel=1e-4)
        assert ("overlap_at_50" in record) == clip


def test_energy_distance_of_many_cells_takes_evenly_spaced_ones(screen):
    record = evaluate_conditions(**screen, energy_cells=10)["model"]["per_condition"][3]
    sets = [screen[w][screen[f"{w}_condition"] == 3] for w in ("pred", "real")]
    expected = energy_distance(*(x[np.arange(10) * len(x) // 10] for x in sets))
    assert record["energy_distance"] == pytest.approx(expected, rel=1e-4) and record["n_cells"] == 33


def test_a_real_effect_of_none_is_left_out_of_the_mean(screen):
    flat, of = {w: screen[w].copy() for w in ("real", "control")}, screen["real_condition"] == 6
    flat["control"][:], flat["real"][of] = 1, 1
    result = evaluate_conditions(**screen | flat)["model"]
    values = [r["pearson_delta"] for r in result["per_condition"]]
    assert list(np.flatnonzero(np.isnan(values))) == [6]
    assert result["mean"]["pearson_delta"] == pytest.approx(np.nanmean(values))


def test_missing_cells_are_named(screen):
    with pytest.raises(DataError, match=r"condition \(type0, drug\) has no predicted cells"):
        keep = screen["pred_condition"] != 2
        evaluate_conditions(**screen | {"pred": screen["pred"][keep], "pred_condition": screen["pred_condition"][keep]})
    with pytest.raises(DataError, match=r"condition \(type1, g0\) has no real cells"):
        keep = screen["real_condition"] != 7
        evaluate_conditions(**screen | {"real": screen["real"][keep], "real_condition": screen["real_condition"][keep]})


# Baselines: 3 types x 4 perturbations x 2 genes; type 2 has no perturbed cell, perturbation 3 never trains.
CONTROL = np.array([[1.0, 2], [3, 1], [5, 5]])
COUNTS = np.array([[10, 30, 0, 0], [50, 0, 20, 0], [0, 0, 0, 0]])
MEANS = np.where(COUNTS[:, :, None] > 0, CONTROL[:, None] + np.array([[[1.0, 0], [0, 2], [9, 9], [9, 9]],
                                                                      [[3, 1], [9, 9], [-1, 0], [9, 9]],
                                                                      [[9, 9]] * 4]), np.nan)


def baselines(means, counts, control_means, control_counts, held_out) -> dict[str, np.ndarray]:
    """Of tables over types (of one file) and perturbations, with zeros in counts for what there is not."""
    seen = {(0, int(t), int(p)): int(counts[t, p]) for t, p in zip(*np.nonzero(counts), strict=True)}
    by_condition = {((f, t), p): n for (f, t, p), n in seen.items()}
    controls = {(0, t): mean for t, mean in enumerate(control_means) if control_counts[t]}
    known = Baselines({key: means[key[0][1], key[1]] for key in by_condition}, by_condition, controls)
    return known.predict([((0, t), p) for t, p in held_out], means.shape[2])


def test_baselines_are_their_formulas():
    found = baselines(MEANS, COUNTS, CONTROL, np.array([5, 1, 7]), [(2, 0), (0, 2), (1, 1), (2, 3)])
    effect = np.array([[2.0, 0.5], [0, 2], [-1, 0]])  # of perturbations 0, 1, 2: types weigh the same, not cells
    everything = effect.mean(0)
    np.testing.assert_array_equal(found["control_mean"], CONTROL[[2, 0, 1, 2]])
    expected = CONTROL[[2, 0, 1, 2]] + [effect[0], effect[2], effect[1], everything]
    np.testing.assert_allclose(found["perturbation_mean"], expected)
    type0 = (10 * (CONTROL[0] + [1, 0]) + 30 * (CONTROL[0] + [0, 2])) / 40  # cells weigh the same
    type1 = (50 * (CONTROL[1] + [3, 1]) + 20 * (CONTROL[1] + [-1, 0])) / 70
    np.testing.assert_allclose(found["context_mean"], [CONTROL[2] + everything, type0, type1, CONTROL[2] + everything])


def test_baselines_without_controls_or_training_cells():
    found = baselines(MEANS, COUNTS, CONTROL, np.array([5, 0, 7]), [(2, 0), (2, 2), (1, 0)])  # type 1 has no controls
    np.testing.assert_allclose(found["perturbation_mean"][:2], CONTROL[[2, 2]] + [[1, 0], [0.5, 1]])
    assert np.isnan(found["control_mean"][2]).all() and np.isnan(found["perturbation_mean"][2]).all()
    np.testing.assert_allclose(found["context_mean"][2], (50 * MEANS[1, 0] + 20 * MEANS[1, 2]) / 70)
    found = baselines(MEANS, COUNTS * 0, CONTROL, np.array([5, 1, 7]), [(1, 0)])
    assert (found["control_mean"] == CONTROL[1]).all()  # no effect is known: not even that there is none
    assert np.isnan(found["perturbation_mean"]).all() and np.isnan(found["context_mean"]).all()


def test_a_type_of_another_file_is_another_context():
    """Far from it and moved another way: neither its level nor its control cells reach the type of the same name."""
    ours, theirs = (1, 0), (0, 0)
    means = {(theirs, 1): np.array([100.0, 102]), (ours, 2): np.array([6.0, 5])}
    known = Baselines(means, dict.fromkeys(means, 4), {theirs: np.array([100.0, 100]), ours: np.array([5.0, 5])})
    found = known.predict([(ours, 1), (theirs, 2)], 2)
    np.testing.assert_array_equal(found["control_mean"], [[5, 5], [100, 100]])
    np.testing.assert_array_equal(found["perturbation_mean"], [[5, 7], [101, 100]])
    np.testing.assert_array_equal(found["context_mean"], [[6, 5], [100, 102]])


@pytest.mark.parametrize("block", [1, 7, 100])
def test_baselines_learn_the_means_of_each_file_and_type_from_the_cells_that_train(block):
    rng, n = np.random.default_rng(4), 200
    file, kind, pert = rng.integers(0, 2, n), rng.integers(0, 3, n), rng.integers(0, 4, n)
    member = rng.choice([0, 1, 4], n)  # in no split, in training, in the test
    X = rng.normal(size=(n, 3)).astype(np.float32)
    cells = SimpleNamespace(
        file=file, cell_type=kind, perturbation=pert, member=member, control=2, is_control=pert == 2,
        cell_types=list("abc"), perturbations=list("pqcr"), read=lambda rows, which: torch.from_numpy(X[rows]),
        rows=lambda split, controls: np.flatnonzero((member & 1 > 0) & (pert != 2)))
    held_out = [((f, t), p) for f in range(2) for t in range(3) for p in (0, 1, 3)]
    found = train_baselines(cells, "input", block).predict(held_out, 3)
    for i, ((f, t), _) in enumerate(held_out):
        of_context = (file == f) & (kind == t)
        controls = of_context & (pert == 2) & (member > 0)
        assert controls.any() and control_rows(cells, (f, t)).tolist() == np.flatnonzero(controls).tolist()
        np.testing.assert_allclose(found["control_mean"][i], X[controls].mean(0, dtype=float), atol=1e-12)
        trained = of_context & (pert != 2) & (member == 1)
        if trained.any():
            np.testing.assert_allclose(found["context_mean"][i], X[trained].mean(0, dtype=float), atol=1e-12)


@pytest.fixture(scope="module")
def table(screen) -> dict:
    control = np.array([screen["control"][screen["control_type"] == c // 4].mean(0, dtype=float) for c in range(8)])
    return evaluate_conditions(**screen, baseline_means={"control_mean": control, "context_mean": control + 0.2})


def test_table_is_aligned_and_marks_the_best(table):
    head, *rows = format_table(table).splitlines()
    assert head.split() == list(METRICS) and [r.split()[0] for r in rows] == ["model", "control_mean", "context_mean"]
    ends = {i for i in range(1, len(head)) if head[i - 1] != " " and (i == len(head) or head[i] == " ")} | {len(head)}
    for row in rows:
        assert all(row[end - 1] != " " for end in ends) and len(row) <= 100
    assert float(rows[0].split()[1].rstrip("*")) == pytest.approx(table["model"]["mean"]["pearson_delta"], rel=1e-3)
    assert rows[0].split()[1].endswith("*") and not rows[1].split()[1].endswith("*")
    without = {k: v | {"mean": {m: x for m, x in v["mean"].items() if m != "overlap_at_50"}} for k, v in table.items()}
    assert "overlap" not in format_table(without)


def test_csv_holds_every_number(table, tmp_path):
    write_metrics(tmp_path / "metrics.csv", table)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    assert [r["model"] for r in rows] == ["model"] * 8 + ["control_mean"] * 8 + ["context_mean"] * 8
    for row, record in zip(rows[16:], table["context_mean"]["per_condition"], strict=True):
        blank = {k for k in record if row[k] == ""}
        assert blank == {k for k, v in record.items() if v != v} >= {"overlap_at_200", "precision_at_500"}
        assert {k: type(record[k])(row[k]) for k in record if k not in blank} == {
            k: v for k, v in record.items() if v == v}


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """Axes of the pictures that are drawn, by name."""
    axes_by_name = {}

    def keeping(draw):
        @contextlib.contextmanager
        def kept(folder, name, *sizes, **options):
            with draw(folder, name, *sizes, **options) as axes:
                axes_by_name[name] = axes
                yield axes

        return kept

    for draw in (effects.figure, effects.panels):
        monkeypatch.setattr(effects, draw.__name__, keeping(draw))
    return axes_by_name


def test_pictures(table, screen, tmp_path, drawn):
    lines = [{"step": 1, "split": "train", "loss": 2.0}, {"step": 2, "split": "train", "loss": 1.5},
             {"step": 2, "split": "eval", "val_loss": 1.7}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plot_metrics(tmp_path, "a title", table)
    made = {f"{m}_by_perturbation" for m in METRICS} | {"delta", "metrics", "loss"}
    assert {p.stem for p in (tmp_path / "plots").iterdir()} == set(drawn) == made
    panels = drawn["delta"]
    first = max(range(8), key=lambda c: table["model"]["per_condition"][c]["pearson_delta"])
    assert len(panels) == 8 and panels[0].get_title().startswith(", ".join(screen["conditions"][first]))
    best = best_baseline(table)
    for line, name in zip(panels[0].lines[1:], (best, "model"), strict=True):
        assert line.get_label().startswith(name)
        np.testing.assert_array_equal(line.get_ydata(), table[name]["delta"][first])
    points = [line.get_xdata()[0] for line in drawn["metrics"][1].lines]  # mae
    assert points == [result["mean"]["mae"] for result in table.values()]
    rival, model = drawn["mae_by_perturbation"].lines
    assert rival.get_label() == best_baseline(table, "mae") + " (best baseline)" and list(model.get_xdata()) == sorted(
        r["mae"] for r in table["model"]["per_condition"])
    assert [list(line.get_ydata()) for line in drawn["loss"].lines] == [[2.0, 1.5], [1.7]]


# Figures that are not defined ----------------------------------------------------------------------------------------


def part_of(screen: dict, conditions: list[int], genes=slice(None)) -> dict:
    """The screen with these conditions and genes alone."""
    code = np.full(8, -1)
    code[conditions] = np.arange(len(conditions))
    kept = {name: code[screen[f"{name}_condition"]] >= 0 for name in ("real", "pred")}
    return screen | {"conditions": [screen["conditions"][c] for c in conditions], "genes": screen["genes"][genes],
                     "control": screen["control"][:, genes]} | {
        name: screen[name][kept[name]][:, genes] for name in kept} | {
        f"{name}_condition": code[screen[f"{name}_condition"]][kept[name]] for name in kept}


def controls_of(screen: dict) -> np.ndarray:
    """The mean control cell of each condition's type [P, G]; nan where the type has none."""
    means = pseudobulk(screen["control"], screen["control_type"], 2)
    return np.array([means[screen["cell_types"].index(cell_type)] for cell_type, _ in screen["conditions"]])


def everything_written(folder, results: dict) -> tuple[dict, list[dict], dict, str]:
    """(summary, rows of the CSV, results.json, verdict) of results; nowhere a nan."""
    summary = effects.write_results(folder, "a title", results)
    said = summary["verdict"]
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("metrics.csv", "results.json")]
    for text in (*texts, said, format_table(results), json.dumps(summary, allow_nan=False)):
        assert "nan" not in text.replace("perturbation_mean", "").lower()
    return summary, list(csv.DictReader(texts[0].splitlines())), json.loads(texts[1]), said


def test_one_perturbation_of_each_type_has_no_rank(screen, tmp_path):
    one = part_of(screen, [1, 5])
    results = evaluate_conditions(**one, baseline_means={"control_mean": controls_of(one)})
    summary, rows, saved, said = everything_written(tmp_path, results)
    assert summary["discrimination"] is None and saved["model"]["mean"]["discrimination"] is None
    assert [row["discrimination"] for row in rows] == [""] * 4 and "discrimination" not in format_table(results)
    assert best_baseline(results, "discrimination") is None and "beats every baseline on 2 held-out conditions" in said
    made = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert "mae_by_perturbation" in made and "discrimination_by_perturbation" not in made
    several = evaluate_conditions(**part_of(screen, [1, 3, 5]))["model"]  # of the other type there are two to rank
    assert [np.isnan(r["discrimination"]) for r in several["per_condition"]] == [False, False, True]
    assert several["mean"]["discrimination"] == np.mean([r["discrimination"] for r in several["per_condition"][:2]])


def test_where_all_that_tells_perturbations_apart_is_the_target_there_is_no_rank():
    real = np.array([[1.0], [2], [3]])
    assert list(np.isnan(discrimination(real, real, np.array([0, -1, 0])))) == [True, False, True]


@pytest.mark.parametrize("G", [49, 50])
def test_an_overlap_of_more_genes_than_there_are_is_undefined(G, screen, tmp_path):
    few = part_of(screen, [0, 1, 4], slice(G))
    results = evaluate_conditions(**few, baseline_means={"control_mean": controls_of(few)})
    summary, rows, _, _ = everything_written(tmp_path, results)
    assert (summary["overlap_at_50"] is None) == (rows[0]["overlap_at_50"] == "") == (G == 49)
    assert ("overlap_at_50" in format_table(results)) == (G == 50)
    assert summary["overlap_at_100"] is None and summary["overlap_at_N"] > 0


def test_one_gene_has_errors_and_no_correlation(screen, tmp_path):
    one = part_of(screen, [0, 1, 2, 3], slice(1))
    results = evaluate_conditions(**one, baseline_means={"b": controls_of(one) + 1})
    summary, rows, _, said = everything_written(tmp_path, results)
    assert summary["pearson_delta"] is None and {row["pearson_delta"] for row in rows} == {""}
    assert "nothing to judge on 4 held-out conditions" in said and f"MAE {summary['mae']:.4f}" in said
    assert "beat" not in said.lower() and not (tmp_path / "plots/delta.png").exists()


def test_the_same_cells_in_another_order_have_no_effect_to_correlate_with(screen):
    """The difference of their means is rounding, of which a correlation can be anything."""
    control = screen["control"][screen["control_type"] == 0]
    same = control[np.random.default_rng(0).permutation(len(control))] * np.float32(1 / 3)
    result = evaluate_conditions(same + np.float32(0.1), np.zeros(len(same), int), same, np.zeros(len(same), int),
                                 control * np.float32(1 / 3), np.zeros(len(control), int), [("t", "p")], ["t"])["model"]
    assert np.isnan(result["mean"]["pearson_delta"]) and np.isnan(result["mean"]["overlap_at_N"])


def test_a_type_without_control_cells_has_what_needs_none_and_means_are_of_common_conditions(screen, tmp_path):
    alone = screen | {"control_type": np.zeros(105, int)}
    means = {"control_mean": controls_of(alone), "context_mean": pseudobulk(alone["real"], alone["real_condition"], 8)}
    results = evaluate_conditions(**alone, baseline_means=means)
    summary, rows, _, said = everything_written(tmp_path, results)
    needs_control = {"pearson_delta", "overlap_at_50", "overlap_at_N", "precision_at_N"}
    lacking = {"model": needs_control, "context_mean": needs_control | {"energy_distance"},
               "control_mean": needs_control | {"mae", "mse", "discrimination", "energy_distance"}}
    for row in rows:
        if row["cell_type"] == "type1":
            assert {name for name in lacking["control_mean"] if not row[name]} == lacking[row["model"]]
    for result in results.values():  # only of the first four conditions can all be compared
        errors = [record["mae"] for record in result["per_condition"][:4]]
        assert result["mean"]["mae"] == pytest.approx(np.mean(errors))
    assert "best baseline" in said and summary["baselines"]["control_mean"]["mae"] > 0
    assert "on 4 of 8 held-out conditions: Pearson delta" in said
    assert (summary["conditions"], summary["conditions_judged"]) == (8, 4)
    means["control_mean"] = np.full_like(means["control_mean"], np.nan)
    nothing = evaluate_conditions(**alone | {"control_type": np.full(105, 9)}, baseline_means=means)
    assert nothing["model"]["mean"]["mae"] > 0 and np.isnan(nothing["control_mean"]["mean"]["mae"])
    assert best_baseline(nothing, "mae") == "context_mean" and best_baseline(nothing) is None
    everything_written(tmp_path / "nothing", nothing)


def test_a_baseline_that_knows_no_effect_has_no_figures(screen, tmp_path):
    controls = controls_of(screen)
    means = {"control_mean": controls, "perturbation_mean": np.full_like(controls, np.nan)}
    results = evaluate_conditions(**screen, baseline_means=means)
    _, rows, _, said = everything_written(tmp_path, results)
    figures = [value for row in rows for name, value in row.items()
               if row["model"] == "perturbation_mean" and name not in (*LABELS, "model")]
    assert set(figures) == {""} and "best baseline 0.0000 (control_mean)" in said
    assert "beats every baseline that has a figure on 8 held-out conditions" in said
    assert all(is_defined(results["control_mean"]["mean"][name]) for name in METRICS)


def test_a_baseline_is_best_on_defined_figures_alone(table):
    odd = {name: {"mean": dict(result["mean"])} for name, result in table.items()}
    odd["context_mean"]["mean"] |= {"pearson_delta": math.nan, "mae": math.nan}
    assert best_baseline(odd) == best_baseline(odd, "mae") == "control_mean"
    assert [line.split()[1:3] for line in format_table(odd).splitlines()][3] == ["-", "-"]


@pytest.mark.parametrize("model, rival, words, absent", [
    ((None, 1.0), (0.5, 2.0), "nothing to judge on 1 held-out condition: ", "beat"),
    ((0.5, 1.0), (None, 2.0), "no baseline to compare with on 1 held-out condition: Pearson delta 0.5000; MAE", "beat"),
    ((0.5, None), (0.4, None), "beats every baseline on 1 held-out condition: Pearson delta 0.5000", "MAE"),
    ((0.5, 1.0), (0.4, None), "; MAE 1.0000", "worse"),
    ((0.5, 1.0), (0.4, 2.0), "beats every baseline on 1 held-out", "alone"),
    ((0.5, 3.0), (0.4, 2.0), "beats every baseline by Pearson delta alone on 1 held-out", "NOT"),
])
def test_a_verdict_leaves_out_what_is_undefined(model, rival, words, absent):
    names = ("pearson_delta", "mae")
    means = dict(zip(names, model, strict=True))
    means |= {"conditions": 1, "baselines": {"b": dict(zip(names, rival, strict=True))}}
    said = effects.verdict(means)
    assert words in said and absent not in said and "None" not in said and not said.endswith((";", " "))


def test_pictures_show_what_is_defined(screen, tmp_path, drawn):
    alone = screen | {"control_type": np.zeros(105, int)}
    title = "a $\\frac{$ title"  # no mathematics
    plot_metrics(tmp_path, title, evaluate_conditions(**alone, baseline_means={"control_mean": controls_of(alone)}))
    assert len(drawn["pearson_delta_by_perturbation"].get_yticks()) == 4 == len(drawn["delta"])
    assert ", 4 shown, best to worst" in drawn["delta"][0].figure.get_suptitle()
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(drawn)
    assert len(drawn["mae_by_perturbation"].get_yticks()) == 8
    nobody = evaluate_conditions(**screen | {"control_type": np.full(105, 9)})
    plot_metrics(tmp_path, "a title", nobody)
    (line,) = drawn["mae_by_perturbation"].lines
    assert line.get_label() == "model"


def test_conditions_of_one_name_in_two_files_are_told_apart_in_pictures():
    record = {"cell_type": "c", "perturbation": "p", "dataset": "d", "file": "a.h5ad"}
    assert effects._labels([record]) == ["p"]  # the type is in the title
    assert effects._labels([record, record | {"cell_type": "b"}]) == ["c, p", "b, p"]
    assert effects._labels([record, record | {"dataset": "e"}]) == ["d a.h5ad: p", "e a.h5ad: p"]
    long = record | {"perturbation": "[('8-Hydroxyquinoline-5-sulfonic acid monohydrate', 5.0, 'uM')]"}
    assert effects._labels([long]) == ["[('8-Hydroxyquino ... e', 5.0, 'uM')]"]  # its begin, and its end


def test_of_one_condition_there_is_a_picture_of_its_effects_and_one_of_all_metrics(screen, tmp_path, drawn):
    one = part_of(screen, [1])
    plot_metrics(tmp_path, "a title", evaluate_conditions(**one, baseline_means={"control_mean": controls_of(one)}))
    assert set(drawn) == {"delta", "metrics"} and len(drawn["delta"]) == 1
    assert "discrimination" not in str([panel.get_title() for panel in drawn["metrics"]])
