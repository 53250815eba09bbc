"""common/checkpoint.py and resuming: a run killed, stopped or damaged anywhere ends as if nothing had happened."""

import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from commands import Job, wait_for
from comparison import unequal

import train_ghmm
from common import checkpoint
from common.runtime import Runtime

TINY = ("--n_layers=1", "--d_model=16", "--d_mlp=32", "--n_ctx=6", "--batch_size=16", "--max_words=800", "--lr=3e-3",
        "--eval_sequences=64", "--warmup_steps=10", "--device=cpu", "--precision=fp32", "--out_dir=run")
SHORT = (*TINY, "--max_steps=60", "--log_interval=5", "--eval_interval=20", "--save_interval=10", "--keep_last=-1")
LONG = (*TINY, "--max_steps=240", "--log_interval=1", "--eval_interval=40", "--save_interval=7")
TIMED = {"time_s", "step/tokens_per_second", "cum/tokens_per_second", "seconds", "tokens_per_second"}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Every test stands in tmp_path, computes on one thread as the subprocesses do, and draws no pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """settings -> the run folder of a run with them that nothing disturbed; each is trained once."""

    @functools.cache
    def trained(*settings: str) -> Path:
        folder, before, threads = tmp_path_factory.mktemp("whole"), os.getcwd(), torch.get_num_threads()
        os.chdir(folder)
        torch.set_num_threads(1)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)
                train_ghmm.main(list(settings))
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
        return folder / "run"

    return trained


@pytest.fixture
def finished(uninterrupted, tmp_path) -> Path:
    """A copy of the finished SHORT run, in ./run."""
    shutil.copytree(uninterrupted(*SHORT), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def unfinished(finished) -> Path:
    """The SHORT run as it was when it died between the steps 40 and 50."""
    for name in ("step_50.pt", "step_60.pt", "summary.json", "analysis.json"):
        (finished / name).unlink()
    shutil.copyfile(finished / "step_40.pt", finished / "last.pt")
    shutil.copyfile(finished / "step_40.pt", finished / "best.pt")
    return finished


def run(*settings: str) -> dict:
    return train_ghmm.main([*SHORT, *settings])


def refused(capsys, *settings: str) -> str:
    """The one error line of a run that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*settings)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def written_lines() -> int:
    path = Path("run/metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0




def records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def assert_as_if_uninterrupted(folder: Path, whole: Path) -> None:
    keys = ("step", "best", "model", "optimizer", "scaler", "ranks", "extra")
    found, expected = (checkpoint.load(path) for path in (folder, whole))
    assert len(expected["optimizer"]["state"]) == len(expected["model"]) > 0
    assert unequal({k: found[k] for k in keys}, {k: expected[k] for k in keys}) == []
    places = [(r["step"], r["split"]) for r in records(folder)]
    assert len(places) == len(set(places)) and [p[0] for p in places] == sorted(p[0] for p in places)
    assert records(folder) == records(whole)


def temporary_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def weights(path: Path) -> dict:
    return checkpoint.load(path)["model"]


# ----------------------------------------------------------------------------------------- killed and stopped runs


@pytest.mark.parametrize("changes, kills", [((), 3), (("--carry_state=true",), 1), (("--grad_accum=2",), 1)],
                         ids=["plain", "carry_state", "grad_accum"])
def test_a_run_killed_at_random_moments_ends_bit_identical(changes, kills, uninterrupted, capsys):
    draw, settings, died_at = random.Random(20_240_613 + kills + len(str(changes))), (*LONG, *changes), []
    for _ in range(kills):
        goal = written_lines() + draw.randint(5, 45)
        job = Job("train_ghmm", *settings)
        wait_for(lambda goal=goal: written_lines() >= goal, job, f"line {goal} of metrics.jsonl")
        job.kill()
        assert job.wait() == -signal.SIGKILL, "it was over before it could be killed: " + Path("console").read_text()
        died_at.append(written_lines())
    assert died_at[0] >= 5
    assert train_ghmm.main(list(settings))["steps"] == 240
    resumed = re.search(r"resumed from \S*last\.pt at step (\d+)\n", capsys.readouterr().out)
    assert resumed and 0 < int(resumed[1]) < 240
    assert_as_if_uninterrupted(Path("run"), uninterrupted(*settings))


def killed_in_save(argv: list[str]) -> None:
    replace, saves = os.replace, []

    def dying_replace(source, target):
        saves.append(target) if str(target).endswith("last.pt") else None
        if len(saves) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying_replace
    train_ghmm.main(argv)


def test_a_kill_between_writing_and_renaming_leaves_the_checkpoint_before(uninterrupted):
    assert Job("test_resume", *SHORT, function="killed_in_save").wait() == -signal.SIGKILL
    assert checkpoint.load(Path("run"))["step"] == 30
    assert len(temporary_files(Path("run"))) == 1  # what the dying save had written: the next run may not trip over it
    run()
    assert_as_if_uninterrupted(Path("run"), uninterrupted(*SHORT))


def test_the_next_run_removes_what_a_killed_save_left(unfinished):
    (unfinished / ".saving-4194305.pt").write_bytes(b"half a checkpoint")
    (unfinished / ".saving-4194305.twin").write_bytes(b"a twin")
    run()
    assert temporary_files(unfinished) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_with_0_and_the_same_command_goes_on(number, uninterrupted):
    job = Job("train_ghmm", *LONG)
    wait_for(lambda: written_lines() >= 60, job, "line 60 of metrics.jsonl")
    job.send_signal(number)
    assert job.wait() == 0, Path("console").read_text()
    stopped = re.search(r"stopped by a signal after step (\d+)", Path("console").read_text())
    assert stopped and 50 < int(stopped[1]) < 240
    assert checkpoint.load(Path("run"))["step"] == int(stopped[1])
    assert not Path("run/summary.json").exists()
    assert train_ghmm.main(list(LONG))["steps"] == 240
    assert_as_if_uninterrupted(Path("run"), uninterrupted(*LONG))


def test_runs_with_other_seeds_do_not_compare_equal(uninterrupted):
    """What the tests above call bit-identical can be told from what is not."""
    with pytest.raises(AssertionError):
        assert_as_if_uninterrupted(uninterrupted(*SHORT, "--seed=2"), uninterrupted(*SHORT))
    with pytest.raises(AssertionError):
        assert_as_if_uninterrupted(uninterrupted(*LONG, "--carry_state=true"), uninterrupted(*LONG))


def test_a_torn_last_line_of_metrics_is_dropped_on_resume(unfinished, uninterrupted):
    path = unfinished / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 50, "split": "tra')
    run()
    assert_as_if_uninterrupted(unfinished, uninterrupted(*SHORT))


# --------------------------------------------------------------------------------------------- what a run starts from


def test_a_finished_run_without_its_summary_is_evaluated_again_and_not_trained(finished, capsys):
    names = ("last.pt", "best.pt", "step_20.pt", "metrics.jsonl", "config.json")
    before = {name: (finished / name).read_bytes() for name in names}
    summary = json.loads((finished / "summary.json").read_text())
    (finished / "summary.json").unlink()
    result = run()
    assert {name: (finished / name).read_bytes() for name in names} == before
    again = json.loads((finished / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k not in TIMED} == {k: v for k, v in summary.items() if k not in TIMED}
    assert result["steps"] == 60 and "resumed from" in capsys.readouterr().out


def test_a_finished_run_with_another_setting_is_refused_with_the_choices(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    error = refused(capsys, "--lr=1e-3")
    for words in ("lr: 0.003 -> 0.001", "another --out_dir", "resume=never", f"resume={Path('run/last.pt')}"):
        assert words in error
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before
    assert "max_steps: 60 -> 70" in refused(capsys, "--max_steps=70")


def test_a_finished_run_goes_on_from_its_weights_when_told_to(finished):
    assert run("--max_steps=70", "--resume=run/last.pt")["steps"] == 70
    assert [r["step"] for r in records(finished) if r["split"] == "eval"] == [20, 40, 60, 70]


def test_a_finished_run_whose_script_was_edited_is_refused(finished, capsys):
    (finished / "train_ghmm.py").write_text("# an older version\n")
    assert "train_ghmm.py: edited since" in refused(capsys)


def test_a_finished_run_can_be_moved(finished):
    shutil.move(finished, "elsewhere")
    assert run("--out_dir=elsewhere")["steps"] == 60


@pytest.mark.parametrize("how", ["--resume=never", "--load_checkpoint_step=20"])
def test_how_a_finished_run_once_started_is_no_setting_that_changed(finished, how):
    first = run(how)
    assert run()["loss"] == first["loss"]


def test_an_unfinished_run_goes_on_with_another_learning_rate_and_says_so(unfinished, capsys):
    run("--lr=1e-3", "--schedule=constant")
    out = capsys.readouterr().out
    assert "at step 40\n  lr: 0.003 -> 0.001\n" in out and "schedule: 'cosine' -> 'constant'" in out
    assert [r["lr/step"] for r in records(unfinished) if r["split"] == "train" and r["step"] > 40] == [1e-3] * 4


def test_a_resume_without_changes_claims_none(unfinished, capsys):
    run()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(" -> run") and not any(" -> " in line for line in lines)


@pytest.mark.parametrize("setting, key, value", [("--weight_decay=0.5", "weight_decay", 0.5),
                                                 ("--adam_beta2=0.5", "betas", (0.9, 0.5))])
def test_a_changed_optimizer_setting_takes_effect_on_resume(unfinished, uninterrupted, setting, key, value):
    run(setting)
    assert checkpoint.load(unfinished)["optimizer"]["param_groups"][0][key] == value
    assert unequal(weights(unfinished), weights(uninterrupted(*SHORT))) != []


@pytest.mark.parametrize("change", ["--d_model=8", "--model=gru", "--n_layers=2"])
def test_a_checkpoint_of_another_model_is_refused(unfinished, capsys, change):
    error = refused(capsys, change)
    assert f"{Path('run/last.pt')} does not fit the model" in error and "resume=never" in error


def test_resume_never_trains_anew(finished, uninterrupted, capsys):
    run("--resume=never")
    assert "resumed" not in capsys.readouterr().out
    assert_as_if_uninterrupted(finished, uninterrupted(*SHORT))
    assert len((finished / "train.log").read_text().split("device cpu")) == 2


def test_resume_never_leaves_no_checkpoint_of_the_run_before(finished, monkeypatch):
    monkeypatch.setattr(Runtime, "stopping", lambda self, step: step == 3)
    assert run("--resume=never", "--lr=1e-4") == {"stopped_at": 3}
    found = {path.name: checkpoint.load(path)["step"] for path in finished.glob("*.pt")}
    assert found == {"last.pt": 3, "step_3.pt": 3}


def test_resume_never_forgets_the_run_before_even_if_it_dies_at_once(finished, monkeypatch):
    def die(*args, **options):
        raise RuntimeError("died before its first save")

    monkeypatch.setattr(Runtime, "backward", die)
    with pytest.raises(RuntimeError, match="first save"):
        run("--resume=never", "--lr=1e-4")
    assert not (finished / "last.pt").exists()


def test_resume_never_leaves_no_summary_of_the_run_before(finished, monkeypatch):
    monkeypatch.setattr(Runtime, "stopping", lambda self, step: step == 3)
    run("--resume=never", "--lr=1e-4")
    assert not (finished / "summary.json").exists()


def test_bad_input_under_resume_never_removes_nothing(finished, capsys):
    before = sorted(path.name for path in finished.iterdir())
    assert "batch_size" in refused(capsys, "--resume=never", "--grad_accum=3")
    assert sorted(path.name for path in finished.iterdir()) == before


@pytest.mark.parametrize("path", ["run/step_40.pt", "run"])
def test_resume_takes_a_path(unfinished, uninterrupted, path):
    run(f"--resume={path}", "--out_dir=new")
    assert unequal(weights(Path("new")), weights(uninterrupted(*SHORT))) == []
    assert [r["step"] for r in records(Path("new")) if r["split"] == "eval"] == [60]
    assert checkpoint.load(unfinished)["step"] == 40  # where it came from stays as it was


def test_load_checkpoint_step_goes_back_to_that_step(finished, uninterrupted, capsys):
    run("--load_checkpoint_step=20")
    assert "step_20.pt at step 20" in capsys.readouterr().out
    assert_as_if_uninterrupted(finished, uninterrupted(*SHORT))


def test_going_back_to_a_step_keeps_its_own_newest_step_files(finished, monkeypatch):
    monkeypatch.setattr(Runtime, "stopping", lambda self, step: step == 33)
    run("--load_checkpoint_step=20", "--keep_last=1", "--lr=1e-4")
    assert sorted(path.name for path in finished.glob("step_*.pt")) == ["step_33.pt"]


def test_the_best_checkpoint_after_going_back_is_not_one_of_the_abandoned_future(finished, monkeypatch):
    assert checkpoint.load(finished / "best.pt")["step"] > 20
    monkeypatch.setattr(Runtime, "stopping", lambda self, step: step == 23)
    run("--load_checkpoint_step=20", "--lr=1e-4")
    best = finished / "best.pt"
    assert not best.exists() or checkpoint.load(best)["step"] <= 23


@pytest.mark.parametrize("setting, words", [
    ("--load_checkpoint_step=33", "step_33.pt"), ("--resume=nowhere.pt", "nowhere.pt"),
    ("--analyze=nowhere", "nowhere")])
def test_a_missing_checkpoint_is_named(finished, capsys, setting, words):
    assert f"no checkpoint at {'run/' if 'step' in words else ''}{words}" in refused(capsys, setting)


# ------------------------------------------------------------------------------------------------- damaged checkpoints


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def change(key: str, value):
    """Another value, and the digest that goes with it."""

    def damage(path: Path) -> None:
        state = torch.load(path, weights_only=True) | {key: value}
        torch.save(checkpoint.seal(state) | ({key: value} if key == "format_version" else {}), path)

    return damage


def drop_model(path: Path) -> None:
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != "model"}, path)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one_byte_short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "random_bytes": lambda path: path.write_bytes(random.Random(1).randbytes(5_000)),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "foreign": lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
    "foreign_list": lambda path: torch.save([1, 2], path),
    "incomplete": drop_model,
    "newer": change("format_version", checkpoint.FORMAT_VERSION + 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_pt_is_named_with_the_newest_good_one_which_works(finished, uninterrupted, capsys, damage):
    for name in ("step_60.pt", "best.pt"):
        (finished / name).unlink()
    DAMAGES[damage](finished / "last.pt")
    before = (finished / "last.pt").read_bytes()
    error = refused(capsys)
    assert str(Path("run/last.pt")) in error and "Traceback" not in error
    named = re.search(r"resume=(\S+\.pt)", error)
    assert named and named[1] == str(Path("run/step_50.pt"))
    assert (finished / "last.pt").read_bytes() == before
    if damage in ("truncated", "foreign", "newer"):  # a file that is torn, of another kind, or good to another version
        run(f"--resume={named[1]}")
        assert_as_if_uninterrupted(finished, uninterrupted(*SHORT))


def test_a_newer_format_is_not_called_damaged(finished, capsys):
    change("format_version", 99)(finished / "last.pt")
    error = refused(capsys)
    assert "format 99" in error and "update the code" in error and "damaged" not in error


def test_a_checkpoint_of_another_experiment_is_refused(finished, capsys):
    change("experiment", "arxiv")(finished / "last.pt")
    error = refused(capsys)
    assert str(Path("run/last.pt")) in error and "arxiv" in error and "ghmm" in error


@pytest.mark.parametrize("wrap", [lambda bomb: pickle.dumps(bomb), lambda bomb: bomb], ids=["pickle", "torch"])
def test_code_inside_a_checkpoint_is_never_run(finished, capsys, tmp_path, wrap):
    target = tmp_path / "exploded"
    create, arguments = Bomb(target).__reduce__()  # what a reader of pickles would call
    create(*arguments).close()
    assert target.exists()
    target.unlink()
    payload = wrap(Bomb(target))
    if isinstance(payload, bytes):
        (finished / "last.pt").write_bytes(payload)
    else:
        torch.save({**torch.load(finished / "last.pt", weights_only=True), "extra": payload}, finished / "last.pt")
    error = refused(capsys)
    assert "last.pt is damaged or no checkpoint" in error and re.search(r"use resume=\S*(step_60|best)\.pt", error)
    assert not target.exists()


def test_the_newest_good_checkpoint_is_the_one_of_most_steps_whatever_a_copy_did_to_file_times(finished, capsys):
    for age, path in enumerate(sorted(finished.glob("step_*.pt"))):
        os.utime(path, (10_000_000 - age, 10_000_000 - age))
    (finished / "best.pt").unlink()
    DAMAGES["truncated"](finished / "last.pt")
    assert f"resume={Path('run/step_60.pt')}" in refused(capsys)


def test_damaged_files_are_not_recommended(finished, capsys):
    for path in finished.glob("*.pt"):
        if path.name != "step_20.pt":
            DAMAGES["truncated"](path)
    assert f"resume={Path('run/step_20.pt')}" in refused(capsys)
    DAMAGES["truncated"](finished / "step_20.pt")
    error = refused(capsys)
    assert "no other good checkpoint" in error and "resume=" not in error


def test_a_process_tells_of_damage_in_one_line(finished):
    DAMAGES["truncated"](finished / "last.pt")
    job = Job("train_ghmm", *SHORT)
    assert job.wait() == 2
    first, told = job.console.read_text().splitlines()
    assert first == "train_ghmm: mess3, transformer, 60 steps -> run"
    assert told.startswith("error: ") and "last.pt" in told


# --------------------------------------------------------------------------------------------------------- saving


def state_of(step: int) -> dict:
    lists_and_dicts = dict.fromkeys(checkpoint.KINDS.keys() - {"meter"}, {}) | {"ranks": []}
    return {**lists_and_dicts, "format_version": 1, "experiment": "ghmm", "step": step, "best": 0.5,
            "model": {"w": torch.full((100,), float(step))}}


def steps_in(folder: Path) -> dict[str, int]:
    return {path.name: checkpoint.load(path)["step"] for path in sorted(folder.iterdir())}


def test_a_full_disk_leaves_the_old_checkpoint_and_no_scraps(tmp_path, monkeypatch):
    checkpoint.save(state_of(1), tmp_path, is_best=True, keep_step=True)

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(state_of(2), tmp_path, is_best=True, keep_step=True)
    assert steps_in(tmp_path) == {"best.pt": 1, "last.pt": 1, "step_1.pt": 1}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_rename_that_fails_leaves_the_old_last_pt_and_no_scraps(tmp_path, monkeypatch, fails_at):
    checkpoint.save(state_of(1), tmp_path, is_best=True, keep_step=True)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(state_of(2), tmp_path, is_best=True, keep_step=True)
    assert len(calls) == fails_at
    assert temporary_files(tmp_path) == []
    found = steps_in(tmp_path)
    assert found["last.pt"] == 1 and set(found.values()) <= {1, 2}


@pytest.mark.parametrize("hard_links", [True, False])
def test_best_pt_stays_when_last_pt_is_replaced(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        def no_links(*args):
            raise OSError("this file system has none")

        monkeypatch.setattr(os, "link", no_links)
    for step, is_best in ((1, False), (2, True), (3, False)):
        checkpoint.save(state_of(step), tmp_path, is_best=is_best, keep_step=step == 1)
    assert steps_in(tmp_path) == {"best.pt": 2, "last.pt": 3, "step_1.pt": 1}
    assert float(weights(tmp_path / "best.pt")["w"][0]) == 2


def test_last_pt_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(Path(b).name) or replace(a, b))
    checkpoint.save(state_of(1), tmp_path, is_best=True)
    assert events[0] == "fsync" and events.index("best.pt") < events.index("last.pt") < len(events) - 1
    assert events[-1] == "fsync"  # the folder


@pytest.mark.parametrize("keep_last, kept", [(0, []), (1, [60]), (2, [50, 60]), (-1, [10, 20, 30, 40, 50, 60])])
def test_keep_last_says_how_many_step_files_stay(keep_last, kept, tmp_path):
    run(f"--keep_last={keep_last}")
    found = {path.name: checkpoint.load(path)["step"] for path in (tmp_path / "run").glob("step_*.pt")}
    assert found == {f"step_{step}.pt": step for step in kept}
    assert checkpoint.load(tmp_path / "run")["step"] == 60 and (tmp_path / "run" / "best.pt").exists()


def test_pruning_counts_in_numbers_and_leaves_other_files_alone(tmp_path):
    for name in ("step_notes.pt", "step_1.pt.bak"):
        (tmp_path / name).write_text("mine")
    for step in (8, 9, 10, 100):
        checkpoint.save(state_of(step), tmp_path, keep_step=True, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.pt", "step_1.pt.bak", "step_10.pt", "step_100.pt", "step_notes.pt"]


def test_clear_removes_the_checkpoints_and_nothing_else(tmp_path):
    checkpoint.save(state_of(1), tmp_path, is_best=True, keep_step=True)
    for name in (".saving-1.pt", "config.json", "step_notes.pt"):
        (tmp_path / name).write_text("x")
    checkpoint.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "step_notes.pt"]


def test_the_best_checkpoint_is_that_of_the_lowest_evaluation_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(train_ghmm, "learning_rate", lambda step, cfg: 3e-3 if step < 40 else 3.0)
    run("--eval_interval=5")
    losses = {r["step"]: r["loss"] for r in records(tmp_path / "run") if r["split"] == "eval"}
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert min(losses, key=losses.get) <= 45  # a rate this high improves nothing
    assert best["step"] == min(losses, key=losses.get) and best["best"] == min(losses.values())
    assert checkpoint.load(tmp_path / "run")["best"] == best["best"]


def test_a_checkpoint_holds_plain_values_only_and_loads_safely(finished):
    state = torch.load(finished / "last.pt", weights_only=True)
    assert set(state) == {*checkpoint.KINDS, "digest"}

    def kinds(value) -> set:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return {type(value)}.union(*map(kinds, items))

    plain = {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert {kind for kind in kinds(state) if kind.__name__ != "OrderedDict"} <= plain
