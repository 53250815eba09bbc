"""Runs side by side: which are averaged, what is said of them, and what a folder may hold besides."""

import contextlib
import csv
import json
import math
import os
import re
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.image
import pytest
from commands import colours

import sweep
from common.errors import DataError, InputError
from common.runlog import parse_json, read_metrics
from measure import comparison, overlays
from measure.comparison import compare, find_runs
from measure.figures import new_figure
from measure.overlays import MOST_CURVES, MOST_ROWS, curves_of
from measure.pages import Section
from measure.sweeps import Group
from sources import outcomes

SCRIPT = 'EXPERIMENT = "ghmm"\n'


def write_run(
    folder: Path | str,
    excess: float | None = 0.5,
    script: str = "train_ghmm.py",
    text: str = SCRIPT,
    summary: dict | None = None,
    **settings,
) -> Path:
    """A run of two evaluations; excess=None: not ended."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {"out_dir": str(folder), "lr": 0.1, "seed": 0, "max_steps": 40, "device": "cpu"} | settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / script).write_text(text)
    records = []
    for step in (10, 20):
        records.append({"step": step, "time_s": 1.0, "split": "train", "loss/ema": 2.0 + config["seed"] + 1 / step})
        records.append({"step": step, "time_s": 1.0, "split": "eval", "excess_loss": (excess or 1) + 1 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    if excess is not None:
        known = {"excess_loss": excess, "optimal_loss": 1.0, "loss": 1 + excess, "steps": 40, "seconds": 3.0,
                 "torch": "2", "device": "cpu", "loss_by_position": [1.0], "verdict": "fine"}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(known | (summary or {})))
    return folder


def rows(path: Path | str = "comparison.csv") -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cells(section: str, page: Path | str = "report.html") -> list[list[str]]:
    """The rows of the first table below a title of the page, as texts."""
    text = Path(page).read_text().replace("<wbr>", "").split(f">{section}</", 1)[1].split("</table>", 1)[0]
    found = []
    for row in re.findall("<tr>(.*?)</tr>", text, re.DOTALL):
        found.append(re.findall(r"(?:<button>|data-value=\"[^\"]*\">)(.*?)</", row))
    return found


@pytest.fixture(autouse=True)
def a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("summary, said", [
    ({"loss": "1.5"}, "loss = '1.5', which is no number"),
    ({"loss": True}, "loss = True, which is no number"),
    ({"excess_loss": [0.1]}, "excess_loss = [0.1], which is no number"),
    ({"steps": -40}, "steps = -40, which is no number of at least 0"),
    ({"data": "x"}, "data = 'x', which is no table"),
    ({"data": {"x": [1]}}, "x = [1], which is no text"),
    ({"device": {"a": 1}}, "device = {'a': 1}, which is no text"),
])
def test_a_summary_with_something_else_for_a_number_is_left_out_and_said(summary, said, undrawn):
    write_run("runs/good", 0.5)
    write_run("runs/odd", 0.1, lr=0.3, summary=summary)
    told = "\n".join(compare(find_runs([Path("runs")]), Path("runs")))
    assert f"runs/odd: left out, for summary.json says {said}" in told
    assert [row["excess_loss"] for row in rows("runs/comparison.csv")] == ["0.5"]


@pytest.mark.parametrize("text", ["1e999", "-Infinity", "NaN", "9" * 400, "9" * 5000])
def test_a_number_that_is_none_is_blank_and_the_others_stand(text, undrawn):
    write_run("runs/good", 0.5)
    folder = write_run("runs/odd", 0.1, lr=0.3)
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(summary.replace('"loss": 1.1', f'"loss": {text}'))
    compare(find_runs([Path("runs")]), Path("runs"))
    assert [(row["excess_loss"], row["loss"]) for row in rows("runs/comparison.csv")] == [("0.1", ""), ("0.5", "1.5")]


@pytest.mark.parametrize("text, said", [
    ('{"a": 1, "a": 2}', "a name is set twice"),
    ('{"a":' * 5000, "nested too deeply"),
    ('{"a":' * 60 + "1" + "}" * 60, "nested too deeply"),
    ('{"a": "\\ud800"}', "surrogates not allowed"),
])
def test_json_that_nobody_could_use_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_lines_of_metrics_that_are_none_are_passed_over():
    lines = [{"step": 1, "split": "eval", "loss": 1.5, "curve": [1.0, None]}, {"step": True, "split": "eval"},
             {"step": -1, "split": "eval"}, {"step": 2, "split": "eval", "loss": "1.5"}, {"step": 3, "split": 4},
             {"step": 4, "split": "eval", "loss": {"a": 1}}, [1], {"step": 10**30, "split": "eval"}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 5, "split": "eval", "loss": math.nan}])
    Path("metrics.jsonl").write_text(text)
    assert read_metrics(Path()) == [lines[0], {"step": 5, "split": "eval", "loss": None}]


def test_lines_of_a_sweep_that_are_none_are_passed_over():
    line = {"run": "a", "status": "done", "exit_code": 0, "seconds": 1.0, "time": 2.0, "settings": {"lr": "1"}}
    wrong = [{"run": ["a"]}, {"status": "over"}, {"exit_code": "0"}, {"seconds": "1"}, {"time": -1}, {"settings": []},
             {"settings": {"lr": 1}}, {"summary": 3}, {"last_lines": "x"}]  # fmt: skip
    Path("sweep.jsonl").write_text("".join(json.dumps(line | {"run": "b"} | each) + "\n" for each in wrong)
                                   + json.dumps(line) + "\n" + "[" * 9000)  # fmt: skip
    assert outcomes.read(Path("sweep.jsonl")) == {"a": line}


def test_runs_of_which_some_have_no_seed_are_compared(undrawn):
    write_run("runs/a", 0.5)
    folder = write_run("runs/b", 0.4, lr=0.3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "seed"}))
    assert any("0.4" in line for line in compare(find_runs([Path("runs")]), Path("runs")))


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_mean_and_deviation():
    values = {0.1: [0.5, 0.7, 0.9], 0.01: [0.2, 0.3, 0.25]}
    for lr, losses in values.items():
        for seed, loss in enumerate(losses):
            write_run(f"runs/lr={lr},seed={seed}", loss, lr=lr, seed=seed, log_interval=seed)  # which only watches
    lines = compare(find_runs([Path("runs")]), Path("."))
    best, second = rows()
    assert [best["lr"], best["runs"], best["seeds"]] == ["0.01", "3", "0, 1, 2"] and second["lr"] == "0.1"
    for row in (best, second):
        losses = values[float(row["lr"])]
        assert float(row["excess_loss"]) == pytest.approx(fmean(losses)) and row["excess_loss n"] == "3"
        assert float(row["excess_loss sd"]) == pytest.approx(stdev(losses))
    error = math.sqrt(stdev(values[0.1]) ** 2 / 3 + stdev(values[0.01]) ** 2 / 3)
    assert error == pytest.approx(0.1190, abs=1e-4)
    sentence = (
        "Best of 2 by excess_loss (less is better): lr=0.01, 0.250 ± 0.050; "
        "next lr=0.1, 0.70 ± 0.20 (mean ± standard deviation of 3 seeds). They are 0.45 ± 0.12 (standard error) apart."
    )
    assert any(sentence in line for line in lines) and sentence in Path("report.html").read_text()
    assert "0.250 ± 0.050" in "\n".join(lines) and lines[-1] == "all of it in report.html"
    table = cells("By settings")
    assert table[0][:5] == ["lr", "runs", "seeds", "excess_loss", "excess_percent"]
    assert table[1][:5] == ["0.01", "3", "0, 1, 2", "0.250 ± 0.050", "25.0 ± 5.0"] and len(cells("Single runs")) == 7
    assert ["device", "cpu"] not in cells("What the runs share") and ["max_steps", "40"] in cells("What the runs share")
    assert '"0.25">0.250 ± 0.050<' in Path("report.html").read_text()  # sorted by the mean
    assert not any("stopped by" in line for line in lines)
    for name in ("curves", "results"):
        assert colours(matplotlib.image.imread(f"plots/{name}.png")) > 50


@pytest.fixture
def undrawn(monkeypatch):
    """Without pictures, which take long."""
    for name in ("draw_curves", "draw_results"):
        monkeypatch.setattr(comparison, name, lambda *args: None)


@pytest.mark.parametrize("other, column, shown", [
    ({"lr": 0.2}, "lr", {"0.1", "0.2"}),
    ({"components": [{"x": 1}]}, "components", {"", '[{"x": 1}]'}),
    ({"text": SCRIPT + "# edited"}, "script", None),
    ({"summary": {"steps": 20}}, "steps", {"40", "20"}),
    ({"summary": {"final_split": "test"}}, "final_split", {"", "test"}),
    ({"output_space": "all"}, "output_space", {"", "all"}),
    ({"precision": "auto", "summary": {"device": "cuda:1"}}, "precision", {"auto on cpu", "auto on cuda"}),
    ({"summary": {"data": {"d": "f" * 16}}, "data": "d"}, "data", None),
])  # fmt: skip
def test_what_differs_is_never_averaged(other, column, shown, undrawn):
    known = {"data": "d", "summary": {"data": {"d": "e" * 16}}} if column == "data" else {}
    known |= {"precision": "auto"} if column == "precision" else {}
    write_run("a", 0.5, seed=0, **known)
    write_run("b", 0.6, seed=1, **other)
    compare([Path("a"), Path("b")], Path("out"))
    told = rows("out/comparison.csv")
    assert [row["runs"] for row in told] == ["1", "1"] and all(row["excess_loss sd"] == "" for row in told)
    texts = {row[column] for row in told}
    assert len(texts) == 2 and (shown is None or texts == shown)
    names = {"lr", "components", "script", "steps", "final_split", "data", "precision", "output_space"}
    assert names & told[0].keys() == {column}
    asked = ("data", "components", "final_split", "output_space")  # other problems: the numbers say how hard each is
    said = "none is the best" if column in asked else "the order may be chance"
    assert said in Path("out/report.html").read_text()


def test_the_same_data_elsewhere_are_the_same_and_early_stops_are_averaged_and_said():
    write_run("a", 0.5, seed=0, data="here", patience=3, summary={"data": {"here": "f1"}, "steps": 20})
    write_run("b", 0.7, seed=1, data="there", patience=3, summary={"data": {"there": "f1"}, "device": "cuda:0"})
    lines = compare([Path("a"), Path("b")], Path("."))
    [row] = rows()
    assert row["runs"] == "2" and float(row["excess_loss"]) == pytest.approx(0.6)
    assert any("stopped by their own loss" in line for line in lines)
    assert any("torch 2 on cpu (1 run), torch 2 on cuda (1 run)" in line for line in lines)
    assert "Runs of the same settings: excess_loss 0.60 ± 0.14 (mean ± standard deviation of 2 seeds)." in lines
    assert not Path("plots/results.png").exists() and Path("plots/curves.png").exists()


@pytest.mark.parametrize("column, runs, shown", [
    # Three runs on two data, of which one lies at two places.
    ("data", [("x", {"x": "f1"}), ("y", {"y": "f1"}), ("x", {"x": "f2"})], {"1": "x", "2": "x"}),
    ("data", [("./x", {"x": "f1"}), ("x", {"x": "f1"}), ("./x", {"x": "f2"})], {"1": "./x", "2": "./x"}),
    # Matrices in files that a setting names among other things.
    ("components", [([{"m": "a"}], {"components": "f1"}), ([{"m": "a"}], {"components": "f1"}),
                    ([{"m": "a"}], {"components": "f2"})], {"1": '[{"m": "a"}]', "2": '[{"m": "a"}]'}),
    ("data", [(None, {"p": "f1"}), (None, {"p": "f1"}), (None, {"p": "f2"})], {"1": "p", "2": "p"}),
    # A list of one is not the text, nor a text with a comma a list of two.
    ("categories", [(["a", "b"], {}), (["a", "b"], {}), (["a, b"], {})], {"1": "a, b", "2": "a, b"}),
    ("categories", [(["a", "b"], {}), (["a", "b"], {}), (["b"], {})], {"1": "b", "2": "a, b"}),
])  # fmt: skip
def test_what_looks_the_same_and_is_not_is_told_apart_by_a_digest(column, runs, shown, undrawn):
    for seed, (value, data) in enumerate(runs):
        settings = {} if value is None else {column: value}
        write_run(f"r{seed}", 0.5, seed=seed, summary={"data": data} if data else None, **settings)
    compare(find_runs([Path(".")]), Path("out"))
    told = {row["runs"]: row[column] for row in rows("out/comparison.csv")}
    assert told.keys() == {"1", "2"}
    for count, text in told.items():
        assert re.sub(r" ?\(\w{6}\)$", "", text) == shown[count]
    assert len({*told.values()}) == 2


def test_a_copy_of_a_page_is_compared_with_it_and_averaged_only_while_it_is_the_same(undrawn):
    for seed, (script, text) in enumerate([("train_ghmm.py", SCRIPT), ("train_mine.py", SCRIPT),
                                           ("train_mine.py", SCRIPT + "# edited")]):  # fmt: skip
        write_run(f"r{seed}", seed=seed, script=script, text=text)
    compare(find_runs([Path(".")]), Path("."))
    told = {row["seeds"]: row["script"].split()[0] for row in rows()}
    assert told == {"0, 1": "train_ghmm.py", "2": "train_mine.py"}
    assert "<h1>3 runs of train_ghmm.py, train_mine.py</h1>" in Path("report.html").read_text()


def test_the_split_of_the_final_numbers_is_that_of_the_summary_and_its_content_counts(undrawn):
    known = [("test", "f1", "d1"), ("test", "f1", "d1"), ("test", "f2", "d1"), ("validation", "", "d1"),
             ("test", "f1", "d2")]  # fmt: skip
    for seed, (split, content, data) in enumerate(known):
        run = write_run(f"r{seed}", seed=seed, final_split="test", summary={"final_split": split, "control_of": 2},
                        control_of=2, data="x")  # fmt: skip
        results = {"final_fingerprint": content, "data": {"path": "x", "fingerprint": data}}
        (run / "results.json").write_text(json.dumps(results))
    compare(find_runs([Path(".")]), Path("."))
    told = {row["seeds"]: row["final_split"] for row in rows()}
    assert told.keys() == {"0, 1", "2", "3", "4"} and told["3"] == "validation"
    assert len({row["data"] for row in rows()}) == 2  # other training data under the same name
    assert told["0, 1"] != told["2"] and told["2"].startswith("test (")
    assert not [name for name in rows()[0] if "control_of" in name]  # a setting that the summary says again


def test_of_equal_results_none_is_the_best_and_the_only_result_has_no_next(undrawn):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        write_run(name, 0.5, lr=lr)
    lines = compare([Path("a"), Path("b")], Path("."))
    assert lines[0] == "None of 2 is the best by excess_loss: lr=0.1 and lr=0.2 came to the same, 0.5."
    assert "repeats the best run" not in Path("report.html").read_text()
    write_run("c", 0.4, lr=0.3)
    assert compare([Path("a"), Path("c")], Path("."))[0].startswith("Best of 2 by excess_loss")
    assert "repeats the best run" in Path("report.html").read_text()
    write_run("d", math.nan, lr=0.4)
    told = compare([Path("a"), Path("d")], Path("."))[0]
    assert told == "Best of 2 by excess_loss (less is better): lr=0.1, 0.5; of the others none has a number there."


def test_steps_that_follow_from_other_settings_are_no_column_and_another_optimum_has_no_best(undrawn):
    write_run("a", 0.5, lr=0.1, summary={"steps": 10})
    write_run("b", 0.6, lr=0.2, summary={"steps": 20, "optimal_loss": 1.0001})
    compare([Path("a"), Path("b")], Path("."))
    assert "steps" not in rows()[0] and "Best of 2 by" in Path("report.html").read_text()
    write_run("b2", 0.7, lr=0.2, seed=1, summary={"steps": 20})
    lines = compare([Path("a"), Path("b"), Path("b2")], Path("."))
    assert any("next lr=0.2, 0.650 ± 0.071" in line and line.endswith("the order may be chance.") for line in lines)
    write_run("c", 0.7, lr=0.2, seed=1, summary={"steps": 30, "optimal_loss": 1.1})
    lines = compare([Path("a"), Path("b"), Path("c")], Path("."))
    assert [row["steps"] for row in rows()] == ["10", "20", "30"]
    assert "The rows differ in optimal_loss: excess_loss tells how hard each is, and none is the best." in lines


def test_a_label_is_short():
    def of(**settings) -> str:
        return overlays.label(Group(settings, []))

    assert of(lr="0.1", act="relu") == "lr=0.1, act=relu" and of() == "all runs"
    assert of(categories="cs.DS, math.ST", budget="none", x="") == "categories=cs.DS, math.ST"
    assert of(categories="a, b", lr="1") == "categories=a, b; lr=1" and of(x="none", y="") == "x=none, y=none"
    assert overlays.label(Group({}, [{}])) == "one run"
    paths = [overlays.shorter(f"/data/{place}/a_rather_long_name_of_a_folder/x.toml") for place in (1, 2)]
    texts = [overlays.shorter("b" * 60 + end) for end in "12"]
    assert len({*paths, *texts}) == 4 and all(len(text) <= 40 for text in paths + texts)
    assert paths[0].endswith("of_a_folder/x.toml") and texts[0].startswith("bbbb") and overlays.shorter("b") == "b"
    assert of(x="b" * 60 + "1") == f"x={texts[0]}"


def test_groups_that_differ_in_a_path_are_called_by_its_last_name_while_that_tells_them_apart():
    def called(*paths: str) -> list[str]:
        return overlays.labels([Group({"data": path, "lr": "1"}, [{}]) for path in paths])

    assert called("a/long/way/to/B.toml", "a/long/way/to/NK.toml") == ["data=B.toml, lr=1", "data=NK.toml, lr=1"]
    assert called("one/cells.toml", "two/cells.toml") == ["data=one/cells.toml, lr=1", "data=two/cells.toml, lr=1"]


def test_the_page_has_the_commands_that_make_it_again_and_repeat_the_best_run(undrawn):
    for seed, lr in ((0, 0.1), (0, 0.01)):
        write_run(f"runs/{lr}", lr, lr=lr, seed=seed)
    compare([Path("runs/0.1"), Path("runs/0.01")], Path("."))
    commands = re.findall("<pre>(.*?)</pre>", Path("report.html").read_text(), re.DOTALL)
    assert len(commands) == 2 and commands[0].endswith("sweep.py report .")
    assert re.search(r"train_ghmm.py runs/0.01/config.json[\\\s]+--out_dir=runs/0.01_again$", commands[1])
    compare([Path("runs/0.1"), Path("runs/0.01")], Path("elsewhere"))
    [first, _] = re.findall("<pre>(.*?)</pre>", Path("elsewhere/report.html").read_text(), re.DOTALL)
    assert first.replace("\\\n", "").split()[2:] == ["report", "runs/0.1", "runs/0.01", "--out=elsewhere"]


def test_a_setting_without_effect_is_told(undrawn):
    for folder, excess, settings in (("a", 0.5, {"x": 1}), ("b", 0.5, {"x": 2}), ("c", 0.6, {"x": 1, "y": 1}),
                                     ("d", 0.6, {"x": 2, "seed": 1})):  # fmt: skip
        write_run(folder, excess, summary={"seconds": ord(folder) / 7}, **settings)
    told = [line for line in compare(find_runs([Path(".")]), Path(".")) if "no effect" in line]
    assert told == ["Runs that differ in x alone came to the same numbers: that had no effect."]


def test_long_values_are_cut_for_a_terminal_alone(undrawn):
    for folder, value in (("a", "v" * 60), ("b", "w" * 60)):
        write_run(folder, process=value)
    lines = compare([Path("a"), Path("b")], Path("."))
    assert not any("v" * 40 in line for line in lines) and any("v" * 30 in line for line in lines)
    assert {row["process"] for row in rows()} == {"v" * 60, "w" * 60}


def test_an_axis_is_logarithmic_over_a_factor_of_ten_and_else_without_the_first_steps():
    axes = new_figure(2, 2).subplots()
    overlays.fit_axis(axes, [[{1: 5.0, 10: 1.1, 20: 1.0}], [{1: 6.0, 20: 1.2}]])
    assert axes.get_yscale() == "linear" and axes.get_ylim() == pytest.approx((0.99, 1.21))
    overlays.fit_axis(axes, [[{1: 11.0, 20: 1.0}]])
    assert axes.get_yscale() == "log"
    axes = new_figure(2, 2).subplots()
    overlays.fit_axis(axes, [[{1: 11.0, 20: -1.0}]])
    assert axes.get_yscale() == "linear"


def test_what_is_no_whole_run_is_a_line_and_the_rest_goes_on(undrawn):
    write_run("runs/good", 0.5)
    write_run("runs/again", 0.5, device="cuda")
    write_run("runs/begun", None, seed=3)
    write_run("runs/torn", 0.5, lr=0.3)
    Path("runs/torn/summary.json").write_text('{"excess')
    write_run("runs/null", 0.5, lr=0.4)
    Path("runs/null/config.json").write_text("null")
    write_run("runs/bare", 0.5, lr=0.5)
    Path("runs/bare/train_ghmm.py").unlink()
    write_run("runs/pipe", 0.5, lr=0.55)
    Path("runs/pipe/train_ghmm.py").unlink()
    os.mkfifo("runs/pipe/train_ghmm.py")  # to open it is to wait for its writer
    write_run("runs/nan", 0.5, lr=0.6, summary={"excess_loss": None, "loss": float("nan")})
    Path("runs/good/aaa.py").write_text("")  # of the user's own
    Path("runs/good/analysis").mkdir()
    Path("runs/good/analysis/summary.json").write_text("{}")  # no run: it has nothing else
    Path("runs/begun/train.log").write_text("step 20\nstopped by FloatingPointError: the loss was not finite\n")
    lines = compare(find_runs([Path("runs"), Path("runs/good"), Path("runs/good/summary.json")]), Path("runs"))
    told = Path("runs/report.html").read_text()
    assert lines[-2] == "... and 3 more of such lines there:" and all(line in told for line in lines[-5:-2])
    assert "runs/begun: not ended, step 20 of 40, stopped by FloatingPointError: the loss was not finite" in told
    assert "runs/torn: left out, for summary.json is damaged" in told
    assert "runs/null: left out, for config.json is damaged (holds no" in told
    assert "runs/bare: left out, for it has no copy" in told
    assert "runs/pipe: left out, for it has no copy" in told
    assert "runs/good: left out, for runs/again has the same settings and seed" in told and "analysis" not in told
    assert [(row["lr"], row["excess_loss"], row["loss"]) for row in rows("runs/comparison.csv")] == [
        ("0.1", "0.5", "1.5"), ("0.6", "", "")]  # fmt: skip
    page = Path("runs/report.html").read_text()
    assert "nan" not in page.split("</style>")[1].split("<script>")[0].replace("runs/nan", "")
    assert "Not compared" in page and "runs/torn" in page


def test_a_comparison_in_the_folder_of_a_run_leaves_its_files_as_they_are(undrawn):
    write_run("run", 0.5)
    Path("run/report.html").write_text("mine")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert compare([Path("run")], Path("run"))[-1] == "all of it in run/report/report.html"
    told = sweep.report(["run/summary.json", "--objective=-loss"])
    assert "loss" in told[0] and "excess_loss" not in told[0] and told[-1] == "all of it in run/report/report.html"
    assert before == {path: path.read_bytes() for path in Path("run").iterdir() if path.is_file()}
    assert find_runs([Path("run")]) == [Path("run")] == find_runs([Path("run/summary.json")])


def test_what_cannot_be_compared_is_one_sentence(undrawn):
    write_run("a")
    write_run("b", script="train_mine.py", text="")
    with pytest.raises(DataError, match="^a is a run of train_ghmm.py and b one of train_mine.py: compare runs of one"):
        compare([Path("a"), Path("b")], Path("."))
    with pytest.raises(DataError, match="^absent: there is no such folder"):
        find_runs([Path("a"), Path("absent")])
    Path("empty").mkdir()
    with pytest.raises(DataError, match="^empty: no run here"):
        find_runs([Path("empty")])
    write_run("c", None)
    with pytest.raises(DataError, match="^no run has ended yet: c: not ended, step 20 of 40$"):
        compare([Path("c")], Path("."))
    Path("file").write_text("")
    with pytest.raises(InputError, match="^file/?.* cannot be written .*: name another folder, --out=FOLDER$"):
        compare([Path("a")], Path("file"))


def test_an_experiment_of_the_users_own_is_shown_without_a_best(undrawn):
    summary = {"steps": 9, "mine": 2.0, "other": 3.0}
    write_run("a", 0.5, "train_mine.py", "", summary | {"mine": 4.0}, lr=1.0)
    write_run("b", 0.5, "train_mine.py", 'EXPERIMENT = "mine"', summary, lr=2.0)
    lines = compare([Path("a"), Path("b")], Path("."))
    assert not any("Best" in line for line in lines) and [row["mine"] for row in rows()] == ["4.0", "2.0"]
    lines = compare([Path("a"), Path("b")], Path("."), wanted="max:mine")
    assert any(line.startswith("Best of 2 by mine (more is better): ") for line in lines) and rows()[0]["mine"] == "4.0"
    page = Path("report.html").read_text().replace(" \\\n   ", "")
    assert "--objective=max:mine" in page


def test_curves_are_those_of_the_files_and_many_groups_have_one_grey(monkeypatch):
    write_run("a", 0.5, seed=0)
    write_run("b", 0.5, seed=1)
    group = Group({}, [{"folder": "a"}, {"folder": "b"}])
    assert curves_of([group], "train", "loss/ema") == ("loss/ema", [[{10: 2.1, 20: 2.05}, {10: 3.1, 20: 3.05}]])
    for line in (b"[1]", b'{"step": "7", "split": "train", "loss/ema": 1}', b'{"step": 7}', b'{"step": \xff\xfe'):
        with open("a/metrics.jsonl", "ab") as file:  # of a full disk, or another program
            file.write(b"\n" + line)
    assert curves_of([group], "train", "loss/ema")[1][0][0] == {10: 2.1, 20: 2.05}
    assert curves_of([group], "train", "")[0] == "loss/ema" and curves_of([group], "eval", "absent") == ("", [[]])
    drawn = []
    monkeypatch.setattr(overlays, "draw_group", lambda axes, runs, place, name: drawn.append((place, name)))
    many = [Group({"lr": f"{i}"}, group.runs) for i in range(MOST_CURVES + 3)]
    overlays.draw_curves(Path("."), many, ("loss/ema", ""))
    expected = [(i, f"lr={i}") for i in range(10)] + [(10, "3 others"), (11, None), (12, None)]
    assert drawn == 2 * expected


def test_a_band_is_from_the_smallest_to_the_largest_where_all_runs_of_a_group_have_a_value():
    axes = new_figure(2, 2).subplots()
    overlays.draw_group(axes, [{10: 1.0, 20: 2.0, 30: 9.0}, {10: 3.0, 20: 5.0}], 0, "name")
    mean, *single = axes.lines
    assert mean.get_xydata().tolist() == [[10, 2], [20, 3.5]] and mean.get_label() == "name"
    assert [len(line.get_xydata()) for line in single] == [3, 2]
    [band] = axes.collections
    assert {(10, 1), (10, 3), (20, 2), (20, 5)} == {tuple(point) for point in band.get_paths()[0].vertices}


def test_a_picture_of_results_has_the_first_rows_alone_and_their_labels_in_lines(monkeypatch):
    drawn = []

    @contextlib.contextmanager
    def figure(out, name, width, height, title):
        drawn.extend([height, title, new_figure(width, height).subplots()])
        yield drawn[-1]

    monkeypatch.setattr(overlays, "figure", figure)
    many = [Group({"lr": str(i), "data": "d" * 30}, [{"summary": {"loss": 1.0 + i}}]) for i in range(MOST_ROWS + 5)]
    overlays.draw_results(Path("."), [*many, Group({"lr": "x"}, [{"summary": {}}])], "loss", True)
    height, title, axes = drawn
    assert title == f"the first {MOST_ROWS} of {MOST_ROWS + 5}" and len(axes.get_yticks()) == MOST_ROWS
    many[1].settings["act"] = "relu" * 8
    overlays.draw_results(Path("."), many[:2], "loss", True)
    texts = [label.get_text() for label in drawn[-1].get_yticklabels()]
    assert "\n" not in texts[0] and all(len(line) <= 48 for line in texts[1].split("\n")) and drawn[-2] == ""
    assert drawn[-3] / 2 > 1.2 * (height - 1.2) / MOST_ROWS


def test_a_study_that_fails_is_a_line_beside_the_comparison(monkeypatch, undrawn):
    def fails(runs, out):
        raise DataError("results.json of a is damaged")

    monkeypatch.setattr("measure.holdouts.study_sections", fails)
    write_run("a", 0.5, "train_state.py", 'EXPERIMENT = "state"', {"pearson_delta": 0.5})
    lines = compare([Path("a")], Path("."))
    assert any("left out: results.json of a is damaged" in line for line in lines)
    assert any("pearson_delta 0.5" in line for line in lines)


def test_the_page_of_a_study_begins_with_its_answer_once_and_the_rest_is_folded(monkeypatch):
    answer = [Section("Held out", ["The answer.", "How."]), Section("More", ["Else."])]
    monkeypatch.setattr("measure.holdouts.study_sections", lambda runs, out: (answer, ["The answer."]))
    for seed in (0, 1):
        write_run(f"r{seed}", 0.5, "train_state.py", 'EXPERIMENT = "state"', {"pearson_delta": 0.5}, lr=seed)
    Path("plots").mkdir()
    for name in ("results", "curves"):
        Path("plots", f"{name}.png").write_text("of a comparison before")
    overlays.draw_curves(Path("."), [Group({}, [{"folder": "absent"}])], ("loss", "val_loss"))
    assert not Path("plots/curves.png").exists()
    lines = compare([Path("r0"), Path("r1")], Path("."))
    text = Path("report.html").read_text()
    assert text.count("The answer.") == 1 and '<p class="lead">The answer.</p>' in text and "<p>How.</p>" in text
    assert not any("Best of" in line for line in lines) and "Best of" not in text
    assert "results.png" not in text and not Path("plots/results.png").exists()
    folded = re.findall("<summary>(.*?)</summary>", text)
    assert folded == ["By settings", "While training", "Single runs", "What the runs share", "What the columns are"]
    assert answer[0].text == ["The answer.", "How."]
