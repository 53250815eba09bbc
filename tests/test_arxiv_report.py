"""measure/report.py: names of runs, which of them are averaged, and what a report says where a figure is undefined."""

import contextlib
import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from measure import curves, figures, report, study_arrays, study_pictures
from measure.pages import write_page
from measure.report import study_sections
from measure.xe_by_k import LAWS
from sources.study_arxiv import plan_study, run_name

T = 12
SETTINGS = {"lr": 1e-3, "d_model": 16, "epochs": 2, "patience": 0}


TITLES, LABELS = {}, {}  # of the pictures of a test, by name


@contextlib.contextmanager
def quick_figure(folder: Path, name: str, title: str = "", rows: int = 1, columns: int = 1, width=0,
                 height=0, **options):
    """As figures.figure, but nothing is rendered: labels and titles are taken down."""
    axes = figures.new_figure(4, 3).subplots(rows, columns, **options)
    yield axes
    first = np.ravel(axes)[0]
    TITLES[name] = f"{title} {first.get_title()}"
    LABELS[name] = first.get_legend_handles_labels()[1]
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    (folder / "plots" / f"{name}.png").write_bytes(b"")


@pytest.fixture(autouse=True)
def here(in_a_folder_of_its_own, monkeypatch):
    TITLES.clear()
    monkeypatch.setattr(figures, "STRICT", True)
    monkeypatch.setattr(study_pictures, "figure", quick_figure)
    for module in (report, study_arrays):
        monkeypatch.setattr(module, "RESAMPLES", 200)


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


def told(folder: str = "runs") -> str:
    """Sections of the runs below a folder as a page, report.html there, and its lines for a terminal, printed."""
    runs = sorted(path.parent for path in Path(folder).glob("**/results.json"))
    sections, lines = study_sections(runs, Path(folder))
    print(*lines, sep="\n")
    write_page(Path(folder, "report.html"), "XE", lines[0], sections)
    page = Path(folder, "report.html").read_text().replace("<wbr>", "")
    for path in Path(folder).glob("*.csv"):
        cells = set(path.read_text().replace("\n", ",").split(","))
        assert not {"nan", "inf", "None"} & cells, path
    assert not any(f">{word}<" in page for word in ("nan", "inf", "None"))
    return page


def reported(folder: str = "runs") -> tuple[list[dict], str]:
    """(rows of xe_by_k.csv, the text of report.html)."""
    page = told(folder)
    return rows_of(f"{folder}/xe_by_k.csv"), page


def rows_of(path: str) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


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
    assert rows[1]["group"] == told and told in page
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"group 2 is {told}" and lines[-1] == "group 2: XE in nats: 7.1293 for K = 1 (1 run)"
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
    for name in ("xe_by_position", "xe_by_category"):
        labels = LABELS[name]
        assert any("group 1: " in label for label in labels) and any("group 2: " in label for label in labels)
        assert not any("lr=" in label for label in labels)
    assert "group 1 is lr=0.001;" in page and "group 2 is lr=0.01." in page


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


def test_a_terminal_is_told_no_more_than_eight_lines():
    """With the one that says where the report is."""
    write("runs/K1_a", a_result("a"))
    for i in range(12):
        write(f"runs/again/{i}", a_result("a"))
    sections, lines = study_sections([path.parent for path in Path("runs").rglob("results.json")], Path("out"))
    assert len(lines) == 7 and lines[-1] == "and 8 lines more, in the report"
    assert lines[0].startswith("All runs are of K = 1") and lines[1].startswith("XE in nats: ")
    notes, = (section.text for section in sections if section.title == "Notes")
    assert len(notes) == 12


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


def test_a_single_run_has_no_deviation(capsys):
    write("runs/0", a_result("a"))
    write("runs/1", a_result("ab", 1))
    write("runs/2", a_result("ab", 2, 4.0))
    rows, page = reported()
    one, two = rows
    assert (one["xe_sd"], one["icl_gain_sd"], one["unseen_xe"], one["oracle_xe"]) == ("", "", "", "")
    assert float(two["xe_sd"]) == pytest.approx(2 / 2**0.5)
    told = capsys.readouterr().out
    assert re.search(r"XE in nats: 2\.1293 for K = 1 \(1 run\), 3\.\d{4} for K = 2 \(2 runs\)\n", told)
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
    sections, _ = study_sections([Path(f"runs/{i}") for i in range(3)], Path("report"))
    (table,) = [section.tables[0] for section in sections if section.title == "Runs"]
    assert [row["probe_accuracy"] for row in table] == [None, None, 0.75]


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


@pytest.mark.parametrize("damage, said", [
    (lambda result: result.update(K=3), "says K = 3 of 2 categories"),
    (lambda result: result.update(seed="0"), "seed = '0', which is no number"),
    (lambda result: result["groups"]["seen"].update(xe="1.5"), "xe = '1.5', which is no number"),
    (lambda result: result["groups"]["seen"].update(xe=None), "xe = None, which is no number"),
    (lambda result: result["groups"]["a"]["xe_by_position"].pop(), "curves of other lengths"),
    (lambda result: result["groups"]["a"]["xe_by_position"].append(True), "which is no list of numbers"),
    (lambda result: result["groups"].update(b=[1]), "which is no table"),
    (lambda result: result.update(probe={"accuracy": [["x"]]}), "accuracy = [['x']]"),
    (lambda result: result.update(data="x"), "data = 'x', which is no table"),
])
def test_a_result_with_something_else_for_a_number_is_left_out_and_said(damage, said):
    result = json.loads(json.dumps(a_result("ab")))
    damage(result)
    write("runs/one", result)
    write("runs/two", a_result("ab", 1))
    _, lines = study_sections([Path("runs/one"), Path("runs/two")], Path("out"))
    assert any("runs/one/results.json is damaged" in line and said in line for line in lines), lines
    assert [row["runs"] for row in rows_of("out/xe_by_k.csv")] == ["1"]


@pytest.mark.parametrize("text", ["{", "[]", '{"K": 1}', '{"groups": {"seen": {"xe_by_position": []}}}'])
def test_a_damaged_result_is_a_line_and_the_rest_is_reported(text):
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/results.json").write_text(text)
    sections, (line, nothing) = study_sections([Path("runs/one"), Path("runs/no_result")], Path("out"))
    assert sections == [] and "runs/one/results.json is damaged" in line and "no run has a results.json" in nothing
    assert not Path("out").exists()
    write("runs/two", a_result("ab"))
    sections, lines = study_sections([Path("runs/one"), Path("runs/two")], Path("out"))
    assert line in lines and sections[-1].title == "Notes" and rows_of("out/xe_by_k.csv")[0]["runs"] == "1"


# ------------------------------------------------------------------------------------------------------- the answer
NAMES = "abcd"
LEVELS = np.array([2.0, 2.5, 3.0, 3.5])
SETS = ("a", "b", "c", "d", "ab", "bc", "cd", "ad", "abcd")  # rotations
OPTIMUM = 0.05  # nats that the model is above it


def write_run(folder: str, categories: str, seed: int = 0, growth: float = 0.1, control_of: int | None = None,
              synthetic: bool = False, documents: int = 8, **changes) -> dict:
    """A run with its documents.npz: XE is the level of a category + growth log K, and 1 nat more where it is unseen."""
    rng = np.random.default_rng([len(categories), seed, *categories.encode(), control_of or 0])
    codes = np.repeat(np.arange(4), documents)
    M = len(codes)
    counts = 1 + np.arange(M) % 3
    t = np.arange(1, T + 1)
    active = np.isin(list(NAMES), list(categories))
    K = control_of or len(categories)
    mean = LEVELS + np.where(active, growth * np.log(K), 1.0 - 0.05 * K)
    documents = mean[codes] + 0.2 * np.sin(np.arange(M)) + 0.01 * rng.standard_normal(M)
    xe = documents[:, None] + 0.5 / t
    sums = xe * counts[:, None]
    groups = {}
    for c, name in enumerate(NAMES):
        groups[name] = group_of(sums[codes == c].sum(0) / counts[codes == c].sum())
    for together, members in (("seen", active), ("unseen", ~active)):
        if members.any():
            curves_of = [groups[NAMES[c]]["xe_by_position"] for c in np.flatnonzero(members)]
            groups[together] = group_of(np.mean(curves_of, 0))
    if synthetic:
        for name in (*categories, "seen"):
            curve = np.array(groups[name]["xe_by_position"]) - OPTIMUM
            groups[name] |= {"oracle_xe_by_position": curve.tolist(),
                             "known_xe_by_position": (curve - np.log(K) / (2 * T)).tolist()}
    result = a_result(categories, seed, groups=groups, control_of=control_of, final_split="test",
                      tokens=880 // (control_of or 1), **changes)
    write(folder, result)
    positions = np.array([1, 2, 5, 10, T])
    np.savez(Path(folder, "documents.npz"), names=np.array(list(NAMES)), codes=codes, documents=np.arange(M),
             counts=counts, positions=positions, sums=sums[:, positions - 1].astype(np.float32),
             total=sums.mean(1).astype(np.float32))
    return result


def group_of(curve: np.ndarray) -> dict:
    gain, total = curves.gains(curve)
    return {"xe": float(curve.mean()), "xe_by_position": curve.tolist(), "icl_gain": float(gain),
            "total_gain": float(total), "fit": None}


def write_study(sets=SETS, seeds=(0, 1), controls: bool = False, **options) -> None:
    for seed in seeds:
        for categories in sets:
            write_run(f"runs/{run_name(list(categories), seed)}", categories, seed, **options)
        for K, name in itertools.product((2, 4), NAMES if controls else ""):
            growth = 0.1 if K == 2 else 0.06  # of K = 4 less than among the others
            write_run(f"runs/control{K}_{name}_seed{seed}", name, seed, growth, control_of=K, **options)


@pytest.mark.parametrize("growth, told_as", [(0.1, "XE grows by"), (-0.1, "XE falls by")])
def test_the_answer_is_first_with_its_interval_and_what_it_is_of(growth, told_as, capsys):
    write_study(growth=growth)
    page = told()
    answer, comparison = capsys.readouterr().out.splitlines()[:2]
    low, high = (float(word) for word in re.search(r"interval ([\d.]+) to ([\d.]+)", answer).groups())
    assert answer.startswith(f"At equal tokens {told_as} 0.10") or answer.startswith(f"At equal tokens {told_as} 0.09")
    assert low < 0.1 < high and high - low < 0.05
    assert "over documents and sets; 4 categories, 9 sets, 2 seeds, 32 documents" in answer
    assert comparison.startswith("Over three values of K a + b log K is a better law than")
    assert re.search(r"; the 95% interval of the difference is above 0( for a \+ b \(1 - 1/K\) alone)?\).$", comparison)
    assert "overlap" in page
    rows = rows_of("runs/xe_law.csv")
    assert len(rows) == 3 * 6 and {row["position"] for row in rows} == {"1", "2", "5", "10", str(T), "mean"}
    by_k = rows_of("runs/xe_by_k.csv")
    assert [row["sd_sets"] != "" for row in by_k] == [True, True, False]  # one set of K = 4
    assert all(float(row["se_documents"]) > 0 and float(row["sd_seeds"]) > 0 for row in by_k)
    assert [float(row["icl_score"]) for row in by_k] == pytest.approx([0.5 / T - 0.5 / 10] * 3, abs=1e-6)


def test_laws_that_a_study_cannot_tell_apart_are_said_to_be_so(capsys):
    write_study(growth=0.005)
    told()
    words = "Three values of K cannot tell (a .*) from (a .*) or (a [^(]*|a .* \\(1 - 1/K\\)) \\("
    said = capsys.readouterr().out
    assert sorted(re.search(words, said).groups()) == sorted(LAWS)
    assert "the 95% intervals of the differences include 0)." in said


def test_where_runs_stopped_by_themselves_the_answer_claims_no_equal_tokens(capsys):
    write_study(seeds=(0,), settings=SETTINGS | {"patience": 3})
    write_run("runs/more", "a", 1, settings=SETTINGS | {"patience": 3}, steps=5)
    changed = json.loads(Path("runs/more/results.json").read_text()) | {"tokens": 440}
    Path("runs/more/results.json").write_text(json.dumps(changed))
    assert "equal tokens" not in told() and capsys.readouterr().out.startswith("XE grows by")


def test_controls_are_no_runs_of_the_study_and_tell_dilution_from_interference(capsys):
    write_study(controls=True)
    write_run("runs/stray", "a", control_of=2, settings=SETTINGS | {"lr": 7.0})
    other_share = write_run("runs/longer", "a", seed=5, control_of=2) | {"tokens": 880}
    Path("runs/longer/results.json").write_text(json.dumps(other_share))
    page = told()
    assert [(row["K"], row["runs"]) for row in rows_of("runs/xe_by_k.csv")] == [("1", "8"), ("2", "8"), ("4", "2")]
    lines = capsys.readouterr().out
    for name in ("stray", "longer"):
        assert f"{name} is a control of K = 2 of no runs here: not used" in lines
    table = rows_of("runs/xe_controls.csv")
    assert len(table) == 2 * 4 + 2
    for row in table:
        assert float(row["growth"]) == pytest.approx(0.1 * np.log(int(row["K"])), abs=0.02)
        assert float(row["dilution"]) + float(row["interference"]) == pytest.approx(float(row["growth"]), abs=1e-9)
    means = {row["K"]: row for row in table if row["category"] == "mean"}
    assert float(means["2"]["interference"]) == pytest.approx(0, abs=0.01)
    assert float(means["4"]["interference"]) == pytest.approx(0.04 * np.log(4), abs=0.01)
    assert float(means["4"]["dilution_low"]) < 0.06 * np.log(4) < float(means["4"]["dilution_high"])
    assert "by interference (the rest; means over 4 categories, with standard errors)." in lines
    assert "(a category alone with 1/4 of the tokens and of the steps)" in page and "also makes a K-th of the" in page
    # Errors of growth, not of dilution, are also over what a set adds to all of its categories: more than over these.
    for K, row in means.items():
        for part in ("growth", "dilution"):
            values = [float(row[part]) for row in table if row["K"] == K and row["category"] != "mean"]
            over_categories = np.std(values, ddof=1) / 2
            more = float(row[f"{part}_se"]) / over_categories
            assert more > 1.01 if part == "growth" else more == pytest.approx(1)


def test_without_controls_the_report_says_how_to_get_them():
    write_study(seeds=(0,))
    assert "the same command with --controls trains them" in told() and not Path("runs/xe_controls.csv").exists()


def test_a_control_with_nothing_beside_it_is_named(capsys):
    write_study(sets=("ab", "cd", "abcd"), seeds=(0,), controls=True)
    told()
    assert "by dilution" not in capsys.readouterr().out
    write_run("runs/K1_a_seed0", "a")
    told()
    said = capsys.readouterr().out
    assert "(the rest; of 1 category)." in said and " +- " not in said.split("From K = 1 to 4 ")[1].splitlines()[0]
    assert "The controls of b at K = 2" in Path("runs/report.html").read_text()  # is in no run of K = 1


def test_seen_and_unseen_are_traded_off_by_k(capsys):
    write_study()
    told()
    table = rows_of("runs/xe_tradeoff.csv")
    seen = [float(row["seen_xe"]) for row in table]
    unseen = [float(row["unseen_xe"]) for row in table[:2]]
    assert np.diff(seen) == pytest.approx([0.1 * np.log(2)] * 2, abs=0.01)
    assert np.diff(unseen) == pytest.approx([-0.05], abs=0.01) and table[2]["unseen_xe"] == ""
    said = re.search(r"by ([+-][.\d]+) \+- ([.\d]+) nats on categories trained on", capsys.readouterr().out).groups()
    error = np.hypot(*(float(row["seen_se"]) for row in table[:2]))
    assert [float(word) for word in said] == pytest.approx([seen[1] - seen[0], error], abs=1e-4)


def test_information_and_excess_stand_beside_the_exact_optimum(capsys, monkeypatch):
    monkeypatch.setattr(study_pictures, "figure", figures.figure)
    write_study(synthetic=True, controls=True, information={"document": 0.6, "predictions": 0.5, "log_K": 1.0})
    page = told()
    drawn = {path.stem for path in Path("runs/plots").iterdir()}
    assert drawn == {"xe_against_k", "law_by_position", "dilution", "tradeoff", "in_context", "xe_by_position",
                     "xe_by_category"} and page.count("<img") == len(drawn)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("The exact optimum has 0.10") or lines[1].startswith("The exact optimum has 0.09")
    for row in rows_of("runs/xe_by_k.csv"):
        assert float(row["excess"]) == pytest.approx(OPTIMUM) and float(row["worst_excess"]) == pytest.approx(OPTIMUM)
        assert float(row["information_document"]) == 0.6
    for row in rows_of("runs/xe_controls.csv"):
        if row["category"] == "mean":
            assert float(row["optimum_growth"]) == pytest.approx(float(row["growth"]))
    write("older", json.loads(Path("runs/K4_a_b_c_d_seed0/results.json").read_text()) | {"information": None})
    sections, _ = study_sections([Path("older")], Path("report"))
    (section,) = [section for section in sections if section.title == "In context"]
    (row,) = section.tables[1]
    assert row["information_predictions"] == pytest.approx(np.log(4) / 2)
    assert row["information_model"] == pytest.approx(np.log(4) / 2 + OPTIMUM * T) and "information_document" not in row


@pytest.mark.parametrize("sets, words", [
    (("a", "b"), "All runs are of K = 1: how XE grows with K takes runs of another K"),
    (("ab", "cd"), "All runs are of K = 2"),
    (("a", "bc"), "No category is in runs of two sizes K"),
    (("a", "ab"), "Two values of K fit every law of two parameters"),
])
def test_what_cannot_be_said_of_k_is_said_to_be_so(sets, words):
    write_study(sets=sets, seeds=(0,))
    page = told()
    assert words in page
    laws = Path("runs/xe_law.csv")
    assert laws.exists() == ("Two values" in words)
    if laws.exists():  # no interval over sets: without "ab" there is no slope; over documents there is one
        assert "over documents alone: how sets vary is not known; 1 category, 2 sets, 1 seed, 8 documents)" in page
        assert all(row["interval_over"] == "documents" and row["held_out_rms"] == "" for row in rows_of(str(laws)))


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.unlink(), "has no documents.npz, as runs of before have none"),
    (lambda path: path.write_bytes(b"PK"), "cannot be used"),
    (lambda path: rewrite(path, names=lambda x: np.arange(len(x))), "its arrays do not fit together"),
    (lambda path: rewrite(path, names=lambda x: x.astype(object)), "cannot be used"),  # a pickle
    (lambda path: rewrite(path, counts=lambda x: -x), "its arrays do not fit together"),
    (lambda path: rewrite(path, codes=lambda x: x - 1), "its arrays do not fit together"),
    (lambda path: rewrite(path, sums=lambda x: x * np.nan), "values that are not finite"),
    (lambda path: rewrite(path, documents=lambda x: x[::-1]), "was measured on other documents"),
    (lambda path: rewrite(path, sums=lambda x: x + 1), "is not of its results.json"),
])
def test_without_the_same_documents_intervals_are_over_sets_alone(damage, words):
    write_study()
    damage(Path("runs/K1_b_seed1/documents.npz"))
    page = told()
    assert "over sets; 4 categories" in page and words in page
    assert all(row["se_documents"] == "" for row in rows_of("runs/xe_by_k.csv"))


@pytest.mark.parametrize("second, positions", [((2, 5), (2, 5)), ((1, T), (10, T)), (None, (2, 5))])
def test_the_score_is_between_positions_that_all_runs_say(second, positions):
    for i, pair in enumerate(((2, 5), second)):
        result = write_run(f"runs/{i}", "ab", i)
        if pair:
            result["groups"]["seen"]["icl_score"] = dict(zip(("early", "late"), pair, strict=True))
            Path(f"runs/{i}/results.json").write_text(json.dumps(result))
    assert f"XE after {positions[1]} tokens less XE after {positions[0]} (Olsson" in told()
    assert rows_of("runs/xe_by_k.csv")[0]["se_documents"]


def test_a_single_document_of_a_category_says_nothing_of_others(capsys):
    write_study(documents=1)
    assert "a category has a single document" in told() and "nan" not in capsys.readouterr().out


def rewrite(path: Path, **changes) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {name: change(arrays[name]) for name, change in changes.items()})


def test_numbers_of_validation_and_of_test_are_not_averaged():
    write("runs/0", a_result("a"))  # of before: of validation
    write("runs/1", a_result("a", 2, final_split="test"))
    assert [row["group"] for row in reported()[0]] == ["final_split=validation", "final_split=test"]
