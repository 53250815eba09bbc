"""Searches: what ranges may be typed, a study that processes share, that is killed and goes on, and its runs."""

import json
import math
import multiprocessing
import re
import signal
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from commands import ROOT, Job, refusal, sweep_tiny, wait_for

import sweep
from common.errors import InputError
from sources import jobs
from sources.search import SEARCHES, Space, open_search, read_space, written

# ------------------------------------------------------------------------------------------------------ ranges


@pytest.mark.parametrize(
    ("kind", "text", "space"),
    [
        ("float", "log:1e-5..1e-2", Space(False, 1e-5, 1e-2, log=True)),
        ("float", "0..0.5", Space(False, 0, 0.5)),
        ("float", ".1...5", Space(False, 0.1, 0.5)),
        ("float", "-1..1:0.5", Space(False, -1, 1, step=0.5)),
        ("float", "int:2..8", Space(True, 2, 8)),
        ("int", "int:2..8", Space(True, 2, 8)),
        ("int", "2..8", Space(True, 2, 8)),
        ("int", "int:2..8:2", Space(True, 2, 8, step=2)),
        ("int", "log:16..1024", Space(True, 16, 1024, log=True)),
        ("int", "logint:16..1e3", Space(True, 16, 1000, log=True)),
        ("float", "int:log:1..100", Space(True, 1, 100, log=True)),
        ("", "float:1..8", Space(False, 1, 8)),
        # Hydra's words: between whole numbers are whole numbers, of which int() makes some and float() none.
        ("float", "interval(1e-5, 1e-2)", Space(False, 1e-5, 1e-2)),
        ("float", "interval(start=0.5,end=1)", Space(False, 0.5, 1)),
        ("float", "tag(log, interval(1e-4, 1e-1))", Space(False, 1e-4, 1e-1, log=True)),
        ("", "interval(1,5)", Space(True, 1, 5)),
        ("float", "float(interval(1,5))", Space(False, 1, 5)),
        ("int", "int(interval(32, 256))", Space(True, 32, 256)),
        ("int", "tag(log, int(interval(1, 100)))", Space(True, 1, 100, log=True)),
        ("int", "int(tag(log, interval(1.0, 100.0)))", Space(True, 1, 100, log=True)),
        # No ranges: values and lists of them.
        ("float", "1e-3", None),
        ("float", "1e-3,1e-4", None),
        ("str", "../data..b", None),
        ("str", "int:eger", None),
        ("str", "choice(a,b)", None),
        ("int", "range(1,5)", None),
        ("", "2.5", None),
    ],
)
def test_ranges(kind, text, space):
    assert read_space("x", text, kind) == space


def test_range_of_hydra_has_its_end_where_it_is_searched():
    assert read_space("x", "range(1,5)", "int", is_searched=True) == Space(True, 1, 5, step=1)
    assert read_space("x", "range(0.1,0.4,0.1)", "float", is_searched=True) == Space(False, 0.1, 0.4, step=0.1)
    assert read_space("x", "range(5,1,-2)", "int", is_searched=True) == Space(True, 1, 5, step=2)
    assert read_space("x", "range(2,2)", "int", is_searched=True) == Space(values=("2",))


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("str", "1..2", "a range is of numbers, and x is str: list values instead, as in x=VALUE,VALUE"),
        ("bool", "log:1..2", "a range is of numbers, and x is bool"),
        ("str", "interval(1,2)", "a range is of numbers, and x is str"),
        ("float", "2..1", "2 is not below 1"),
        ("float", "1..1", "1 is not below 1"),
        ("float", "0..inf", "both ends of a range must be finite"),
        ("float", "nan..1", "expected log:LOW..HIGH"),
        ("float", "log:0..1", "a logarithm needs LOW above 0, not 0"),
        ("float", "log:-1..1", "a logarithm needs LOW above 0, not -1"),
        ("float", "log:1e-5", "expected log:LOW..HIGH"),
        ("float", "log:1e-5..1e-2,1e-1", "expected log:LOW..HIGH"),
        ("float", "2..x", "expected log:LOW..HIGH"),
        ("int", "int:2-8", "expected log:LOW..HIGH"),
        ("int", "int:1.5..3", "the ends of a range of whole numbers must be whole numbers"),
        ("int", "interval(1.5,3)", "x is a whole number: x=int:LOW..HIGH"),
        ("int", "float:1..3", "x is a whole number: x=int:LOW..HIGH"),
        ("float", "log:1..2:0.1", "there are no steps in a range of logarithms: leave :0.1 out"),
        ("float", "0..1:2", "STEP must be above 0 and no wider than the range"),
        ("float", "0..1:0", "STEP must be above 0"),
        ("int", "1..8:1.5", "STEP must be above 0 and no wider than the range, and whole"),
        ("", "interval(1)", "expected interval(LOW, HIGH)"),
        ("", "interval(1,2,3)", "expected interval(LOW, HIGH)"),
        ("", "interval(a,b)", "of numbers"),
    ],
)
def test_what_is_no_range_is_one_sentence(kind, text, sentence):
    with pytest.raises(InputError, match=f"^x={re.escape(text)}: ") as told:
        read_space("x", text, kind)
    assert sentence in str(told.value)


def test_a_float_is_written_as_short_as_its_range_allows_and_within_it():
    rate = Space(False, 1e-5, 1e-2, log=True)
    assert written(rate, 0.00012345678) == "0.0001235"
    assert written(rate, 1e-5) == "1e-05" and written(rate, 1e-2) == "0.01"
    assert written(Space(False, 1000, 1001), 1000.123456) == "1000.1235"
    assert written(Space(False, 0, 0.12345), 0.12345) == "0.12345"  # 0.1235 is not in the range
    assert written(Space(False, 0, 1, step=0.1), 0.1 + 0.2) == "0.3"
    assert written(Space(True, 2, 8), 3) == "3"
    assert Space(True, 2, 8).ends() == ["2", "8"] and Space(values=("a", "b")).ends() == ["a", "b"]


def test_the_search_of_the_source_is_of_ranges():
    words = {key: text for key, text in SEARCHES["experiment"].items() if ".params." in key}
    spaces = [read_space(key, text) for key, text in words.items()]
    assert spaces == [Space(False, 1e-4, 1e-1, log=True), None, Space(True, 32, 256), Space(True, 1, 4)]


# ------------------------------------------------------------------------------------------------------- studies

SPACES = {"lr": Space(False, 1e-4, 1, log=True), "layers": Space(True, 1, 8), "act": Space(values=("relu", "gelu"))}


def study(storage: Path | str = "study.journal", **given):
    pytest.importorskip("optuna")
    settings = {"name": "s", "spaces": SPACES, "less_is_better": True, "terms": {"page": "train_x.py"}} | given
    return open_search(str(storage), **settings)


def loss(values: dict[str, str]) -> float:
    """Least, 0, at lr 0.01, 4 layers, gelu."""
    return (math.log10(float(values["lr"])) + 2) ** 2 + (int(values["layers"]) - 4) ** 2 / 8 + (values["act"] == "relu")


def run(search, total: int) -> list[dict[str, str]]:
    """Run what is left of a study of so many trials."""
    while trial := search.ask(total):
        search.tell(trial.number, "done", loss(trial.values))
    return [trial.values for trial in search.trials()]


def test_a_study_finds_what_is_best(in_a_folder_of_its_own):
    best = {}
    for sampler in ("tpe", "random"):
        found = []
        for seed in range(3):
            search = study(f"{sampler}{seed}", sampler=sampler, seed=seed)
            values = run(search, 30)
            assert len(values) == 30 and all(1e-4 <= float(each["lr"]) <= 1 for each in values)
            assert {each["layers"] for each in values} <= set("12345678") and {each["act"] for each in values} == {
                "relu", "gelu"}
            found.append(sum(sorted(map(loss, values))[:5]))
        best[sampler] = sum(found)
    assert best["tpe"] < best["random"] / 2


def test_one_seed_is_one_study_also_where_it_is_continued(in_a_folder_of_its_own):
    whole = run(study("a"), 14)
    assert run(study("b"), 5) == whole[:5]
    assert run(study("b"), 14) == whole
    assert run(study("c", seed=1), 2) != whole[:2]
    assert len({json.dumps(values) for values in whole}) == 14


def test_more_than_all_is_not_asked_for_and_other_terms_are_refused(in_a_folder_of_its_own):
    search = study()
    assert len(run(search, 3)) == 3 and search.ask(3) is None and search.ask(2) is None
    assert len(run(study(), 4)) == 4
    for given, sentence in (
        ({"spaces": SPACES | {"lr": Space(False, 1e-3, 1, log=True)}}, "lr = log:float:0.0001..1, and here it is "
                                                                       "log:float:0.001..1"),
        ({"spaces": {"lr": SPACES["lr"]}}, "layers = int:1..8, and here it is not there"),
        ({"terms": {"page": "train_y.py"}}, "page = train_x.py, and here it is train_y.py"),
        ({"less_is_better": False}, "to minimize its objective, which here is the other way round"),
    ):
        with pytest.raises(InputError) as told:
            study(**given)
        assert sentence in str(told.value) and "the study 's' in study.journal" in str(told.value)
    assert study(name="another", terms={"page": "train_y.py"}).trials() == []


def test_what_is_told_is_what_the_study_says(in_a_folder_of_its_own):
    search = study()
    for state, value in (("done", 0.5), ("failed", None), ("done", None), ("done", math.nan), ("pruned", None)):
        trial = search.ask(9)
        assert trial.state == "running" and trial.values.keys() == SPACES.keys()
        if state == "pruned":
            search.report(trial.number, 10, 3.0)
            search.report(trial.number, 20, 2.0)
        told = search.tell(trial.number, state, value)
        assert told.values == trial.values
    assert [(trial.number, trial.state, trial.value) for trial in study().trials()] == [
        (0, "done", 0.5), (1, "failed", None), (2, "failed", None), (3, "failed", None), (4, "pruned", 2.0)]
    # What was told is not told again, as by a process that was believed dead.
    assert study().tell(0, "failed").state == "done"


def test_what_a_killed_process_left_is_taken_over_with_its_settings(in_a_folder_of_its_own):
    search = study()
    trial = search.ask(2)
    search.place_of(trial.number, Path("trial0000"))
    search.report(trial.number, 10, 1.0)
    search.study.ask()  # killed before it had chosen settings
    again = study()
    left = again.trials()
    assert [each.state for each in left] == ["running", "running"] and again.ask(2) is None
    assert left[0].folder == str(Path("trial0000").resolve()) and left[0].host and left[1].folder == ""
    assert again.take_over(0).values == trial.values
    # The other one gets what it would have got.
    unharmed = study("unharmed")
    run(unharmed, 1)
    assert again.take_over(1).values.keys() == SPACES.keys() and left[1].values == {}
    assert not again.report(0, 10, 1.0)  # comes by again, where the run goes on from its checkpoint
    assert again.tell(0, "done", 0.1).value == 0.1


def curve(number: int, step: int) -> float:
    """Runs 0 to 5 come down to their number, 6 stays high, 7 begins high and comes down to 0."""
    high = number == 6 or (number == 7 and step < 30)
    return 100 if high else number % 7 + 100 / (step + 1)


def test_only_what_stays_worse_than_the_median_is_hopeless(in_a_folder_of_its_own):
    search = study()
    pruned = {}
    for _ in range(8):
        trial = search.ask(8)
        for step in range(10, 101, 10):
            if search.report(trial.number, step, curve(trial.number, step)):
                pruned[trial.number] = step
                break
        search.tell(trial.number, "pruned" if trial.number in pruned else "done", curve(trial.number, 100))
    # Run 5 is the worst of six, but five had to end before one is compared; a quarter of the steps is let pass.
    assert pruned == {5: 30, 6: 30}
    # Steps at which nobody else was evaluated, and the last, are not compared.
    trial = search.ask(9)
    assert not search.report(trial.number, 45, 1e9) and not search.report(trial.number, 100, 1e9)
    assert not search.report(trial.number, 200, 1e9)


def take_part(storage: str, total: int, out: str) -> None:
    search = study(storage)
    taken = []
    while trial := search.ask(total):
        taken.append(trial.number)
        search.report(trial.number, 10, 1.0)
        search.tell(trial.number, "done", loss(trial.values))
    Path(out).write_text(json.dumps(taken))


@pytest.mark.parametrize(("storage", "totals"), [("study.journal", (12, 16)), ("sqlite:///study.db", (4,))])
def test_processes_that_share_a_study_run_each_trial_once(in_a_folder_of_its_own, storage, totals):
    pytest.importorskip("optuna")
    fork, before = multiprocessing.get_context("fork"), 0
    for total in totals:
        processes = [fork.Process(target=take_part, args=(storage, total, f"taken{i}")) for i in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            assert process.exitcode == 0
        taken = [json.loads(Path(f"taken{i}").read_text()) for i in range(2)]
        assert sorted(sum(taken, [])) == list(range(before, total))
        before = total
    trials = study(storage).trials()
    assert [trial.number for trial in trials] == list(range(total)) and {trial.state for trial in trials} == {"done"}
    assert len({json.dumps(trial.values) for trial in trials}) == total  # who begin together draw different ones


def test_a_trial_too_many_waits_for_who_asks_for_more(in_a_folder_of_its_own):
    for storage in ("study.journal", "sqlite:///study.db"):
        search = study(storage)
        run(search, 2)
        # Another process takes the last trial after this one has counted.
        frozen = search.frozen_trials
        search.frozen_trials = lambda frozen=frozen: frozen()[:1]
        assert search.ask(2) is None
        search.frozen_trials = frozen
        assert [trial.number for trial in search.trials()] == [0, 1]
        assert search.ask(3).number == 2 and search.ask(3) is None




def test_a_line_that_was_torn_is_taken_off_the_journal(in_a_folder_of_its_own):
    run(study(), 2)
    whole = Path("study.journal").read_bytes()
    Path("study.journal").write_bytes(whole + b'{"op_code": 4, "torn')
    assert len(study().trials()) == 2
    text = Path("study.journal").read_bytes()
    assert text.startswith(whole) and b'torn' not in text
    assert len(run(study(), 3)) == 3
    Path("study.journal").write_bytes(b"")  # torn before its first line
    assert study().trials() == []


def test_a_storage_that_cannot_be_used_is_one_sentence(in_a_folder_of_its_own):
    run(study(), 1)
    with open("study.journal", "a") as journal:
        journal.write('{"op_code": 4\n')
    Path("text.db").write_text("no database, but a text that is long enough to be taken for one " * 9)
    for storage, sentence in (
        ("study.journal", "the study in study.journal cannot be used (JSONDecodeError"),
        ("sqlite:///absent/study.db", "unable to open database file"),
        ("sqlite:///text.db", "file is not a database"),
        ("nosuch://host/db", "the study in nosuch://host/db cannot be used"),
        ("nosuch://me:secret@host/db", "the study in nosuch://me:***@host/db cannot be used"),
        ("text.db/study.journal", "cannot be used (FileExistsError"),
    ):
        with pytest.raises(InputError) as told:
            study(storage)
        assert sentence in str(told.value) and "secret" not in str(told.value), told.value


def test_without_optuna_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="a search over ranges needs the package optuna.*pip install -U optuna"):
        open_search("study.journal", "s", SPACES, True, {})


def test_without_optuna_a_search_writes_nothing(page, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    told = refusal(capsys, sweep.main, "train_tiny.py", LR, "--trials=2")
    assert "pip install -U optuna" in told and not Path("out").exists()


def test_importances_tell_what_matters_and_nothing_of_few_runs(in_a_folder_of_its_own):
    search = study(sampler="random")
    run(search, 12)
    assert search.importances() == {}
    while trial := search.ask(60):
        search.tell(trial.number, "done", (math.log10(float(trial.values["lr"])) + 2) ** 2)
    shares = search.importances()
    assert list(shares)[0] == "lr" and shares["lr"] > 0.5 and sum(shares.values()) == pytest.approx(1)


# -------------------------------------------------------------------------------------------------------- runs

# A page without torch: its loss comes down to |log10(lr) + 2|, by steps of 10 ms.
PAGE = '''
import json, math, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from configurator import Count, config_dict, configure

EXPERIMENT = "ghmm"

@dataclass
class Config:
    out_dir: str = "out/tiny"
    resume: str = "auto"
    lr: float = 0.1
    layers: Count = 1
    act: str = "relu"
    wide: bool = False
    max_steps: int = 4
    waits_for: str = ""  # a file without which it takes no second step

    def check(self):
        return ["wide goes with gelu"] if self.wide and self.act != "gelu" else []

def build_process(cfg):
    assert cfg.layers != 6, "no process has 6 of them"

def main(argv=None):
    cfg = configure(Config, argv)
    folder, stops = Path(cfg.out_dir), []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_dict(cfg)))
    (folder / "train_tiny.py").write_bytes(Path(__file__).read_bytes())
    last = folder / "last.pt"
    step = json.loads(last.read_text()) if last.exists() else 0
    with open(folder / "starts", "a") as starts:
        starts.write(f"{step}\\n")
    if cfg.layers in (6, 7):
        sys.exit(f"error: the loss is not finite with {cfg.layers}")
    best, began = abs(math.log10(cfg.lr) + 2), time.monotonic()
    with open(folder / "metrics.jsonl", "a") as metrics:
        while step < cfg.max_steps:
            if time.monotonic() > began + 30:
                sys.exit("error: nobody came")
            time.sleep(0.01)
            if step == 1 and cfg.waits_for and not Path(cfg.waits_for).exists() and not stops:
                continue
            step += 1
            record = {"step": step, "split": "eval", "excess_loss": best + 1 / step}
            metrics.write(json.dumps(record) + "\\n")
            metrics.flush()
            last.with_suffix(".new").write_text(json.dumps(step))
            last.with_suffix(".new").rename(last)
            if stops:
                print(f"stopped after {step}")
                return
    summary = {"excess_loss": best + 1 / step, "seconds": 1.0}
    (folder / "summary.new").write_text(json.dumps(summary))
    (folder / "summary.new").rename(folder / "summary.json")

if __name__ == "__main__":
    main()
'''
LR = "--lr=log:1e-4..1"


@pytest.fixture
def page(stand_in_page):
    """The page, in the folder where the test stands."""
    pytest.importorskip("optuna")
    stand_in_page(PAGE)


def searched(*words: str, code: int = 0) -> list[dict]:
    """The lines of sweep.jsonl in the folder `s`, in the order of trials."""
    sweep_tiny(words, "s", code)
    return sorted(lines(), key=lambda line: line["run"])


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("s/sweep.jsonl").read_text().splitlines()]


def starts(number: int) -> list[int]:
    """At which step a run began, each time that it was started."""
    path, = Path("s").glob(f"trial{number:04d},*/starts")
    return [int(line) for line in path.read_text().split()]


def test_a_search_runs_its_trials_shows_the_best_first_and_goes_on_to_more(page, capsys):
    typed = (LR, "--layers=int:1..4", "--act=relu,gelu", "--jobs=2")
    told = searched(*typed, "--trials=4")
    out = capsys.readouterr().out
    assert "a study of 4 runs of train_tiny.py in s" in out and "by excess_loss, of which less is better:" in out
    assert [line["status"] for line in told] == ["done"] * 4 and told[0]["run"].startswith("trial0000,lr=")
    for line in told:
        values = line["settings"]
        assert line["run"][10:] == ",".join(f"{name}={value}" for name, value in values.items())
        saved = json.loads(Path(line["folder"], "config.json").read_text())
        assert saved["lr"] == float(values["lr"]) and saved["layers"] == int(values["layers"])
        assert line["summary"]["excess_loss"] == pytest.approx(abs(math.log10(saved["lr"]) + 2) + 1 / 4)
    ranked = sorted(told, key=lambda line: line["summary"]["excess_loss"])
    table = out[out.index("by excess_loss"):].splitlines()[1:6]
    assert [line.split()[-1] for line in table] == ["folder", *(line["folder"] for line in ranked)]
    best = json.loads(Path("s/best.json").read_text())
    chosen = ranked[0]["settings"]
    assert best["run"] == ranked[0]["run"] and best["excess_loss"] == ranked[0]["summary"]["excess_loss"]
    words = "--lr={lr} --layers={layers} --act={act} --out_dir=s_best".format(**chosen)
    assert best["command"] == f"python train_tiny.py {words}"
    assert f"the best again: {best['command']}" in out

    # The same command has nothing to do; a larger number adds trials.
    searched(*typed, "--trials=4")
    again = capsys.readouterr().out
    assert "in s, 4 ended before" in again and again[again.index("\nby "):] == out[out.index("\nby "):]
    assert len(searched(*typed, "--trials=6")) == 6
    assert [starts(number) for number in range(6)] == [[0]] * 6


def test_the_best_is_the_largest_where_more_is_better(page):
    told = searched(LR, "--max_steps=1", "--trials=3", "--objective=-excess_loss")
    best = json.loads(Path("s/best.json").read_text())
    assert best["excess_loss"] == max(line["summary"]["excess_loss"] for line in told)


def test_hopeless_runs_are_stopped_and_recorded_with_their_last_value(page, capsys):
    told = searched(LR, "--max_steps=24", "--trials=8")
    out = capsys.readouterr().out
    # At every step the page's loss is as far from that of another run as log10(lr) is from -2.
    losses = [abs(math.log10(float(line["settings"]["lr"])) + 2) for line in told]
    stopped = [line["status"] == "pruned" for line in told]
    assert any(stopped) and not any(stopped[:5])
    for number, line in enumerate(told):
        before = [loss for loss, pruned in zip(losses[:number], stopped[:number], strict=True) if not pruned]
        if stopped[number]:
            assert losses[number] > median(before)
            step = json.loads((Path(line["folder"]) / "last.pt").read_text())
            # A quarter of the steps is let pass. What was seen when it was stopped is what it is recorded with.
            assert 6 <= step < 24 and line["value"] >= losses[number] + 1 / step
            assert line["exit_code"] == 0 and line["last_lines"] == [f"stopped after {step}"] and "summary" not in line
            assert f"{line['run']}: pruned at excess_loss {line['value']:.6g}: no hope" in out
        else:
            assert line["status"] == "done"


@pytest.mark.parametrize(
    ("words", "stops", "told"),
    [
        ([LR], True, ""),
        ([LR, "--prune=false"], False, ""),
        ([LR, "--no-prune"], False, ""),
        (["--max_steps=int:4..8"], False, "note: no run is stopped early: max_steps is searched, so that equal steps"),
    ],
)
def test_when_runs_are_stopped(page, capsys, monkeypatch, words, stops, told):
    sources = []

    def no_runs(source, *args):
        sources.append(source)
        yield from ()

    monkeypatch.setattr(sweep, "run_all", no_runs)
    sweep.main(["train_tiny.py", *words, "--trials=1"])
    assert [source.prunes for source in sources] == [stops] and capsys.readouterr().err.startswith(told)
    records = [{"step": 1, "split": "eval", "excess_loss": 1.0}]
    records += [{"step": 2, "split": "train", "excess_loss": 2.0}, {"step": 3, "split": "eval", "excess_loss": None}]
    run = sources[0].next()
    run.lock.close()
    sources[0].hopeless(run, records)
    reported = sources[0].search.frozen(0).intermediate_values
    assert reported == ({1: 1.0} if stops else {})


def test_the_commands_of_a_search_are_shown_and_nothing_is_written(page, capsys):
    sweep.main(["train_tiny.py", "--layers=int:4..8", "--trials=2", "--out_dir=s", "--print_config"])
    assert capsys.readouterr().out == "python train_tiny.py --layers=int:4..8  # 2 runs of a search in s\n"
    assert not Path("s").exists()


def test_a_failing_trial_is_told_and_the_study_goes_on(page, capsys):
    words = ("--layers=6,7,8,9", "--act=gelu,relu", "--wide=false,true", "--sampler=random")
    told = searched(*words, "--trials=8", code=1)
    for line in told:
        values = line["settings"]
        fails = values["layers"] in "67" or (values["wide"] == "true" and values["act"] == "relu")
        assert line["status"] == ("failed" if fails else "done")
    last = {line["last_lines"][-1] for line in told if line["status"] == "failed"}
    # Settings that do not go together, or of which nothing can be made, fail as well, and say why.
    assert last == {"error: the loss is not finite with 6", "error: the loss is not finite with 7",
                    "error: wide goes with gelu"}  # fmt: skip
    assert len(searched(*words, "--trials=8")) == 8 and "8 ended before" in capsys.readouterr().out
    done = next(Path(line["folder"]) for line in told if line["status"] == "done")
    (done / "summary.json").write_text("{")
    assert f"{done} holds no whole run (ValueError: summary.json is damaged (Expecting" in refusal(
        capsys, sweep.main, "train_tiny.py", *words, "--trials=8", "--out_dir=s")


def test_a_killed_search_goes_on_with_the_trial_that_it_left(page, capsys):
    words = ("train_tiny.py", LR, "--layers=1,2", "--trials=2", "--waits_for=go", "--out_dir=s")
    job = Job("commands", *words, function="sweep_quickly", PYTHONPATH=str(ROOT))
    wait_for(lambda: list(Path("s").glob("trial0000,*/last.pt")), job, "the first run")
    job.kill()
    job.process.join()
    # The run outlives its sweep, and is not begun a second time beside it.
    folder, = Path("s").glob("trial0000,*")
    assert not jobs.is_free(folder)
    Path("go").touch()
    while not jobs.is_free(folder):
        time.sleep(0.02)
    sweep.main(list(words))
    assert [line["status"] for line in lines()] == ["done"] * 2
    assert [starts(number) for number in range(2)] == [[0]] * 2


def test_a_signal_lets_trials_save_and_they_go_on_with_their_settings(page):
    words = ("train_tiny.py", LR, "--trials=2", "--waits_for=go", "--out_dir=s")
    job = Job("commands", *words, function="sweep_quickly", PYTHONPATH=str(ROOT))
    wait_for(lambda: list(Path("s").glob("trial0000,*/last.pt")), job, "the first run")
    job.send_signal(signal.SIGINT)
    assert job.wait() == 128 + signal.SIGINT
    assert "error: stopped by a signal with 0 of 2 ended; the same command goes on" in job.console.read_text()
    folder, = Path("s").glob("trial*")
    saved = json.loads((folder / "last.pt").read_text())
    Path("go").touch()
    sweep.main(list(words))
    assert [line["status"] for line in lines()] == ["stopped", "done", "done"]
    assert lines()[1]["run"] == folder.name and starts(0) == [0, saved] and starts(1) == [0]


def test_two_searches_at_once_share_a_study(page):
    words = ("train_tiny.py", LR, "--layers=1..4", "--out_dir=s")
    both = [Job("commands", *words, "--trials=5", function="sweep_quickly", console=f"console{i}", PYTHONPATH=str(ROOT))
            for i in range(2)]  # fmt: skip
    assert [job.wait() for job in both] == [0, 0], both[0].console.read_text() + both[1].console.read_text()
    assert sorted(line["run"][:9] for line in lines()) == [f"trial{number:04d}" for number in range(5)]
    assert [starts(number) for number in range(5)] == [[0]] * 5


def test_machines_without_a_common_disk_share_a_database(page, capsys):
    words = ("train_tiny.py", LR, "--storage=sqlite:///study.db", "--study_name=a")
    sweep.main([*words, "--trials=1", "--out_dir=s"])
    # As if it had been run elsewhere.
    for path in Path("s").glob("trial*/*"):
        path.unlink()
    Path("s").rename("elsewhere")
    capsys.readouterr()
    sweep.main([*words, "--trials=2", "--out_dir=there"])
    assert len(list(Path("there").glob("trial0001,*"))) == 1 and not list(Path("there").glob("trial0000,*"))
    out = capsys.readouterr().out
    assert "1 ended before" in out and len(out[out.index("\nby "):].split("\n")[2:5]) == 3
    told = refusal(capsys, sweep.main, *words, "--trials=2", "--layers=2", "--out_dir=there", "--jobs=2")
    assert "the study 'a' in sqlite:///study.db has settings = , and here it is layers=2" in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lr=log:1e-5..1e-2"], "lr is searched: say for how many runs, as in --trials=20"),
        (["--act=1..2", "--trials=2"], "act=1..2: a range is of numbers, and act is a text"),
        (["--wide=log:1..2", "--trials=2"], "wide=log:1..2: a range is of numbers, and wide is a switch"),
        (["--layers=float:1..2", "--trials=2"], "layers is a whole number: layers=int:LOW..HIGH"),
        (["--layers=int:0..2", "--trials=2"], "layers: expected int >= 1, got '0'"),
        (["--lr=2..1", "--trials=2"], "2 is not below 1"),
        (["--lr=1..2", "--trials=0"], "trials: expected int >= 1|none, got '0'"),
        (["--lr=1..2", "lr=3..4", "--trials=2"], "--lr=1..2 and lr=3..4: lr is given twice, leave one out"),
        (["--lr=1..2", "--lr=1.5", "--trials=2"], "lr is given twice"),
        (["--lr=1..2", "--layer=1,2", "--trials=2"], "layer: no such setting, did you mean layers?"),
        (["--lr=1..2", "--act=a,,b", "--trials=2"], "one of the listed values is empty"),
        (["--lr=1", "--sampler=tpe", "--trials=2"], "there is nothing to search"),
        (["--lr=1,2", "--sampler=cmaes", "--trials=2"], "sampler: expected tpe|random|none, got 'cmaes'"),
        (["--lr=1..2", "--trials=2", "--shard=1/2"], "a search has no shards"),
        (["--lr=1..2", "--trials=2", "--holdout=each"], "--holdout plans its runs, and a range is searched"),
        (["--lr=interval(1,2)", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize"], "of which less is better"),
        (["--lr=interval(1,2)", "hydra/sweeper/sampler=cmaes"], "cmaes: sweep.py samples by tpe or at random"),
        (["--lr=1..2", "--trials=2", "--storage=nosuch://host/db"], "the study in nosuch://host/db cannot be used"),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_run(page, capsys, words, sentence):
    told = refusal(capsys, sweep.main, "train_tiny.py", *words)
    assert sentence in told
    assert not list(Path(".").rglob("trial*"))


def test_a_search_for_a_number_that_no_run_has_says_so(page, capsys):
    sweep.main(["train_tiny.py", LR, "--trials=1", "--objective=exces_loss", "--out_dir=s"])
    assert "note: exces_loss is no number in summary.json, did you mean 'excess_loss'?" in capsys.readouterr().err
    told = refusal(capsys, sweep.main, "train_tiny.py", LR, "--trials=2", "--out_dir=s")
    assert "has objective = exces_loss, and here it is excess_loss" in told


def test_hydra_words_mean_a_search(page, capsys):
    Path("experiment.yaml").write_text(
        "hydra:\n  sweeper:\n    n_trials: 3\n    direction: minimize\n    study_name: test\n    storage: null\n"
        "    sampler:\n      _target_: optuna.samplers.TPESampler\n      seed: 5\n"
        "    params:\n      train.lr: tag(log, interval(1e-4, 1e-1))\n      layers: int(interval(1, 4))\n"
        "      act: choice(relu, gelu)\n"
    )
    told = searched("-m", "experiment.yaml", "layers=range(2,3)")
    assert len(told) == 3 and all(line["settings"].keys() == {"lr", "act", "layers"} for line in told)
    assert all(1e-4 <= float(line["settings"]["lr"]) <= 0.1 and line["settings"]["layers"] in "23" for line in told)
    assert "hydra." not in capsys.readouterr().err  # all of them had an effect
    # Lists alone are drawn without repetition, unless a sampler is named.
    sweep.main(["train_tiny.py", "layers=1,2", "act=a,b", "hydra.sweeper.n_trials=3", "--print_config"])
    assert "drawn with trials_seed = 0, not searched for" in capsys.readouterr().err
    sweep.main(["train_tiny.py", "layers=1,2", "hydra/sweeper/sampler=tpe", "--trials=3", "--print_config"])
    assert "# 3 runs of a search in out/tiny_search_" in capsys.readouterr().out


def test_the_search_of_the_source_is_planned_for_the_real_page(capsys):
    sweep.main(["train_ghmm.py", "-m", "--config-name=experiment", "train.batch_size=16,32", "--print_config"])
    told = capsys.readouterr()
    words = told.out.split("  # ")
    assert words[1].startswith("20 runs of a search in out/ghmm_search_")
    assert "train.optimizer.instance.learning_rate=tag(log, interval(1e-4, 1e-1))" in words[0]
    assert words[0].count("batch_size") == 1 and "train.batch_size=16,32" in words[0]
