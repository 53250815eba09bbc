"""measure/report.py: names of runs, which of them are averaged, and what a report says where a figure is undefined."""

import contextlib
import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from common.errors import DataError
from measure import curves, figures, report
from sources.study_arxiv import plan_study, run_name

T = 12
SETTINGS = {"lr": 1e-3, "d_model": 16, "epochs": 2, "patience": 0}


TITLES, LABELS = {}, {}  # of the pictures of a test, by name


@contextlib.contextmanager
def quick_figure(folder: Path, name: str, title: str = "", **options):
    """As figures.figure, but what is drawn is not turned into a picture."""
    axes = Figure().subplots()
    yield axes
    TITLES[name] = f"{title} {axes.get_title()}"
    LABELS[name] = axes.get_legend_handles_labels()[1]
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    (folder / "plots" / f"{name}.png").write_bytes(b"")


@pytest.fixture(autouse=True)
def here(in_a_folder_of_its_own, monkeypatch):
    TITLES.clear()
    monkeypatch.setattr(figures, "STRICT", True)
    monkeypatch.setattr(report, "figure", quick_figure)


def a_result(categories: str, seed: int = 1, xe: float = 2.0, **changes) -> dict:
    """results.json of a run on these categories, a letter each, whose curve falls by 0.5 nats as t^-1."""
    t = np.arange(1, T + 1)
    curve = xe + 0.5 / t
    gain, total = curves.gains(curve)
    fit = {name: {"value": value, "interval": [value, value]}
           for name, value in (("xe_inf", xe), ("c", 0.5), ("alpha", 1.0))}
    group = {"xe": float(curve.mean()), "xe_by_position": curve.tolist(), "icl_gain": float(gain),
             "total_gain": float(total), "fit": fit}
    return {"categories": list(categories), "K": len(categories), "seed": seed,
            "data": {"path": "data/x", "fingerprint": "f1"}, "budget": {"kind": "constant", "tokens": 1200},
            "steps": 10, "tokens": 880, "settings": SETTINGS,
            "groups": {name: dict(group) for name in (*categories, "seen")}} | changes


def write(folder: str, result: dict) -> None:
    Path(folder).mkdir(parents=True)
    Path(folder, "results.json").write_text(json.dumps(result))


def reported(folder: str = "runs") -> tuple[list[dict], str]:
    """(rows of xe_by_k.csv, the text of report.html), and no cell holds what is no number."""
    means = {}
    for row in report.make_report(Path(folder)):
        print(report.row_sentence(row))
        means[report.row_key(row)] = row["xe"]
    with open(f"{folder}/xe_by_k.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(means.values()) == [float(row["xe"]) for row in rows]
    page = Path(folder, "report.html").read_text()
    for path in Path(folder).glob("*.csv"):
        cells = set(path.read_text().replace("\n", ",").split(","))
        assert not {"nan", "inf", "None"} & cells, path
    assert not any(f">{word}<" in page for word in ("nan", "inf", "None"))
    return rows, page


def mean_xe(*results: dict) -> float:
    return float(np.mean([result["groups"]["seen"]["xe"] for result in results]))


# -------------------------------------------------------------------------------------------------------------- names


def test_no_two_sets_of_categories_share_a_name():
    names = ["a", "b", "c", "a_b", "b_c", "ab", "a.b", "a+b", "a/b", "a%5Fb", "a b", "%", "."]
    sets = [list(s) for K in (1, 2, 3) for s in itertools.combinations(names, K)]
    called = [run_name(subset) for subset in sets]
    assert len(set(called)) == len(sets)
    assert all(Path("out", name).parent == Path("out") and "," not in name for name in called)
    assert run_name(["a_b", "c"], 3) == "K2_a%5Fb_c_seed3" != run_name(["a", "b_c"], 3)
    assert run_name(["b", "a"]) == run_name(["a", "b"])


def test_a_name_too_long_for_a_folder_is_cut_and_stays_the_only_one():
    names = [f"a_rather_long_name_of_a_category_{i}" for i in range(12)]
    sets = [names[:8], names[:9], [*names[:8], names[11]], names]
    called = [run_name(subset, 1337) for subset in sets]
    assert len(set(called)) == len(sets) and all(len(name.encode()) <= 255 for name in called)
    assert plan_study(run_name(sets[2]), names) == [sets[2]] and run_name(sets[2][::-1], 1337) == called[2]


def test_an_older_name_that_several_sets_share_is_refused_with_their_names():
    names = ["a_b", "c", "a", "b_c", "ab", "a.b"]
    with pytest.raises(DataError, match="K2_a_b_c is not one set.*K2_a%5Fb_c or K2_a_b%5Fc"):
        plan_study("K2_a_b_c", names)
    assert plan_study("K1_ab", names) == [["ab"]]  # a name of today before one of yesterday
    assert plan_study("K2_c_c", ["c", "c."]) == [["c", "c."]]


# ------------------------------------------------------------------------------------------------- what is averaged


@pytest.mark.parametrize("change, told", [
    ({"data": {"path": "data/x", "fingerprint": "f2"}}, "data=data/x (f2)"),
    ({"data": {"path": "data/y", "fingerprint": ""}}, "data=data/y"),
    ({"budget": {"kind": "tokens", "tokens": 600}}, "budget=tokens, budget_tokens=600"),
    ({"settings": SETTINGS | {"lr": 1e-2}}, "lr=0.01"),
    ({"settings": SETTINGS | {"epochs": 3}}, "epochs=3"),
])
def test_runs_that_differ_in_data_budget_or_settings_are_not_averaged(change, told, capsys):
    alike = a_result("a", 1, 2.0), a_result("b", 1, 3.0)
    other = a_result("a", 1, 7.0, **change)
    for i, result in enumerate((*alike, other)):
        write(f"runs/{i}", result)
    rows, page = reported()
    assert [(row["K"], row["runs"]) for row in rows] == [("1", "2"), ("1", "1")]
    assert [float(row["xe"]) for row in rows] == pytest.approx([mean_xe(*alike), mean_xe(other)])
    assert rows[1]["group"] == told and told in page and f"{told}: K = 1: XE" in capsys.readouterr().out
    with open("runs/xe_by_category.csv") as file:
        assert [row["runs"] for row in csv.DictReader(file)] == ["1", "1", "1"]


def test_data_that_differ_in_validation_alone_are_told_apart():
    for i, digest in enumerate(("0" * 16 + "1" * 16, "0" * 16 + "2" * 16)):
        write(f"runs/{i}", a_result("a", data={"path": "data/x", "fingerprint": digest}))
    groups = [row["group"] for row in reported()[0]]
    assert groups == ["data=data/x (00000000-11111111)", "data=data/x (00000000-22222222)"]


def test_pictures_call_groups_by_numbers_that_the_page_explains():
    write("runs/0", a_result("a"))
    write("runs/1", a_result("a", settings=SETTINGS | {"lr": 1e-2}))
    _, page = reported()
    for name in ("xe_by_position", "xe_against_k", "xe_by_category"):
        labels = LABELS[name]
        assert any("group 1: " in label for label in labels) and any("group 2: " in label for label in labels)
        assert not any("lr=" in label for label in labels)
    assert "group 1 is lr=0.001;" in page and "group 2 is lr=0.01." in page


def test_a_report_on_a_folder_that_is_a_run_leaves_the_pictures_of_the_run():
    write("runs", a_result("ab"))
    write("runs/K1_a_seed1", a_result("a"))
    picture = Path("runs/plots/xe_by_position.png")
    picture.parent.mkdir()
    picture.write_bytes(b"of the run")
    rows, _ = reported()
    assert [row["K"] for row in rows] == ["1", "2"]
    assert picture.read_bytes() == b"of the run" and Path("runs/report/plots/xe_by_position.png").exists()


def test_the_same_data_in_another_folder_are_the_same_data():
    write("runs/0", a_result("a"))
    write("runs/1", a_result("b", data={"path": "elsewhere", "fingerprint": "f1"}))
    rows, _ = reported()
    assert [(row["runs"], row["tokens"]) for row in rows] == [("2", "880")] and "group" not in rows[0]


def test_runs_of_another_context_are_not_averaged():
    longer = a_result("b")
    for group in longer["groups"].values():
        group["xe_by_position"] = [*group["xe_by_position"], 2.0]
    write("runs/0", a_result("a"))
    write("runs/1", longer)
    assert [row["group"] for row in reported()[0]] == [f"n_ctx={T}", f"n_ctx={T + 1}"]


def test_a_run_is_counted_once(capsys):
    """The same set and seed in two folders, by names of two times or copied; and what a later look at it wrote."""
    first, second = a_result("ab", 1, 2.0), a_result("ab", 2, 3.0)
    write("runs/K2_a_b", first)
    write("runs/K2_a_b_seed1", first)
    write("runs/old/K2_a_b", first)
    write("runs/K2_a_b_seed1/analysis", first)
    write("runs/K2_a_b_seed2", second)
    rows, page = reported()
    assert [row["runs"] for row in rows] == ["2"] and float(rows[0]["xe"]) == pytest.approx(mean_xe(first, second))
    told = capsys.readouterr().out
    assert told.count("counted once") == 2 and "old/K2_a_b is K2_a_b again" in told
    assert page.startswith("<!doctype") and "2 runs." in page


def test_runs_of_before_results_said_what_they_are_of_are_read_by_their_settings():
    config = {"data": "data/x", "budget": "constant", "budget_tokens": None, "categories": ["a"], "seed": 1, **SETTINGS}
    older = a_result("a", 1, 5.0), a_result("b", 1, 6.0), a_result("c", 1, 7.0)
    for i, (result, changes) in enumerate(zip(older, ({}, {}, {"lr": 0.5}), strict=True)):
        for key in ("data", "budget", "steps", "tokens", "settings"):
            del result[key]
        write(f"runs/K1_{i}", result)
        Path(f"runs/K1_{i}/config.json").write_text(json.dumps(config | changes | {"out_dir": f"runs/K1_{i}"}))
    write("runs/K1_a_seed1", a_result("a", 1, 2.0))
    rows, page = reported()
    assert sorted((row["runs"], round(float(row["xe_inf"]), 6)) for row in rows) == [
        ("1", 2.0), ("1", 7.0), ("2", 5.5)]
    assert sum("not said" in row["group"] for row in rows) == 2 and "Older runs do not say" in page


def test_older_runs_alone_need_nothing_but_their_results():
    for i, seed in enumerate((1, 2)):
        result = a_result("ab", seed)
        for key in ("data", "budget", "steps", "tokens", "settings"):
            del result[key]
        write(f"runs/{i}", result)
    rows, _ = reported()
    assert [(row["runs"], row["tokens"]) for row in rows] == [("2", "")]


# ------------------------------------------------------------------------------------------------ what is undefined


def test_a_single_run_has_no_deviation(capsys, monkeypatch):
    monkeypatch.setattr(report, "figure", figures.figure)
    write("runs/0", a_result("a"))
    write("runs/1", a_result("ab", 1))
    write("runs/2", a_result("ab", 2, 4.0))
    rows, page = reported()
    one, two = rows
    assert (one["xe_sd"], one["icl_gain_sd"], one["unseen_xe"], one["oracle_xe"]) == ("", "", "", "")
    assert float(two["xe_sd"]) == pytest.approx(2 / 2**0.5)
    told = capsys.readouterr().out
    assert "K = 1: XE 2.1293 nats over 1 run\n" in told and "+- 1.4142 nats over 2 runs" in told
    with open("runs/xe_by_category.csv") as file:
        assert [row["xe_sd"] != "" for row in csv.DictReader(file)] == [False, True, True]


@pytest.mark.parametrize("fit", [None, (-1.0, 3.0, 0.01), (2.0, 0.5, 8.0), (2.0, -0.5, 1.0)])
def test_a_fit_at_its_bound_is_no_fit_in_a_report_of_older_runs_too(fit):
    without = a_result("ab", 1)
    for group in without["groups"].values():
        group["fit"] = fit and {name: {"value": value, "interval": [0, 9]}
                                for name, value in zip(("xe_inf", "c", "alpha"), fit, strict=True)}
    write("runs/0", without)
    rows, page = reported()
    assert [rows[0][name] for name in ("fits", "alpha", "xe_inf")] == ["0", "", ""] and ">no fit<" in page
    write("runs/1", a_result("ab", 2))
    rows, _ = reported()
    assert [float(rows[0][name]) for name in ("fits", "alpha", "xe_inf")] == [1, 1.0, 2.0]


def test_a_probe_that_was_undefined_is_an_empty_cell():
    write("runs/0", a_result("ab", 1, probe={"accuracy": [[0.5], [None]]}))
    write("runs/1", a_result("ab", 2, probe=None))
    write("runs/2", a_result("ab", 3, probe={"accuracy": [[0.5], [0.75, None]]}))
    _, page = reported()
    assert page.count("<td></td></tr>") >= 2 and "0.7500" in page


@pytest.mark.parametrize("tokens, told", [
    ((880, 880), "Every run was trained on 880 tokens."),
    ((880, 440), "Runs were trained on 440 to 880 tokens, by run in the last table."),
    ((880, None), "Older runs do not say how many tokens"),
])
def test_a_report_claims_equal_tokens_only_where_they_are(tokens, told):
    for i, count in enumerate(tokens):
        result = a_result("ab", i)
        result["tokens"] = count
        if count is None:
            del result["tokens"]
        write(f"runs/{i}", result)
    _, page = reported()
    assert told in page and "equal" not in page and "same number" not in page


def test_runs_on_other_amounts_of_tokens_are_not_averaged():
    for name, tokens in (("a", 880), ("b", 880), ("c", 440)):  # c had less than its share, which was allowed
        write(f"runs/{name}", a_result(name, tokens=tokens))
    rows, _ = reported()
    assert [(row["group"], row["runs"], row["tokens"]) for row in rows] == [("tokens=880", "2", "880"),
                                                                           ("tokens=440", "1", "440")]


def test_tokens_that_differ_by_whole_chunks_or_by_stopping_make_no_groups():
    write("runs/0", a_result("a"))
    write("runs/1", a_result("abc", tokens=880 - 2 * 3 * T))  # 3 chunks less in each of 2 epochs
    assert "group" not in reported()[0][0]
    stopping = SETTINGS | {"patience": 3}
    for seed, tokens in enumerate((880, 440)):
        write(f"stopped/{seed}", a_result("a", seed, settings=stopping, tokens=tokens))
    rows, page = reported("stopped")
    assert [row["runs"] for row in rows] == ["2"] and "440 to 880 tokens, by run" in page


def test_a_report_and_its_picture_say_what_icl_gain_is():
    write("runs/0", a_result("a"))
    _, page = reported()
    assert f"icl_gain is XE after 1 token less XE after {T}, in nats" in page
    assert f"icl_gain: XE after 1 token less XE after {T}" in TITLES["xe_by_position"]
    assert "Every run was trained on 880 tokens" in TITLES["xe_by_position"]
