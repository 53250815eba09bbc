"""sources/search.py: the ranges of a search, and a study that several processes share, that is killed and goes on."""

import json
import math
import multiprocessing
import re
import sys
from pathlib import Path

import pytest

from common.errors import InputError
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


@pytest.mark.parametrize(("storage", "count", "more"), [("study.journal", 12, 16), ("sqlite:///study.db", 5, 6)])
def test_processes_that_share_a_study_run_each_trial_once(in_a_folder_of_its_own, storage, count, more):
    pytest.importorskip("optuna")
    fork = multiprocessing.get_context("fork")
    for total, before in ((count, 0), (more, count)):
        processes = [fork.Process(target=take_part, args=(storage, total, f"taken{i}")) for i in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            assert process.exitcode == 0
        taken = [json.loads(Path(f"taken{i}").read_text()) for i in range(3)]
        assert sorted(sum(taken, [])) == list(range(before, total))
    trials = study(storage).trials()
    assert [trial.number for trial in trials] == list(range(more)) and {trial.state for trial in trials} == {"done"}
    assert len({json.dumps(trial.values) for trial in trials}) == more  # those that began together drew different ones


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


def test_importances_tell_what_matters_and_nothing_of_few_runs(in_a_folder_of_its_own):
    search = study(sampler="random")
    run(search, 12)
    assert search.importances() == {}
    while trial := search.ask(60):
        search.tell(trial.number, "done", (math.log10(float(trial.values["lr"])) + 2) ** 2)
    shares = search.importances()
    assert list(shares)[0] == "lr" and shares["lr"] > 0.5 and sum(shares.values()) == pytest.approx(1)
