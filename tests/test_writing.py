"""What the system refuses while something is written: one sentence, and what was there stays whole."""

import contextlib
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT, SCRIPTS, Job, refusal

import bench
import prepare_data
import sample
import train_ghmm
from common import checkpoint, errors
from common.errors import InputError, RunError, os_sentence, replacing, system_sentence, writing
from common.runlog import RunLog, write_json
from common.runtime import Runtime
from configurator import config_hash
from measure import figures
from sources import shared
from sources.shared import Workshop, room_for, spooled_array
from train_ghmm import Config

TINY = ("--n_layers=1", "--d_model=8", "--d_mlp=8", "--n_ctx=4", "--batch_size=8", "--max_words=100", "--device=cpu",
        "--eval_sequences=20", "--warmup_steps=2", "--max_steps=4", "--eval_interval=2", "--log_interval=1")
FILES = ("config.json", "metrics.jsonl", "train.log", "train.log.1", "summary.json", "last.pt", "best.pt", "step_2.pt",
         "train_ghmm.py", "analysis.json", "results.json", "documents.npz", "xe_by_position.csv", "report.html",
         "wandb_id.txt", "tokenizer.json", ".saving-1-last.pt", "plots/beliefs.png")
FOLDERS = ("plots", "tensorboard", "wandb")


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    monkeypatch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """In bytes, as `ulimit -f` has it: what writes more gets EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@contextlib.contextmanager
def open_log(resume: str = "auto", step: int = 0, wandb: bool = False):
    cfg = Config(device="cpu", resume=resume, wandb=wandb)
    with Runtime(cfg) as rt, RunLog(rt, cfg, {"lr": 0.1}, Path("run"), train_ghmm.__file__, step, 10) as log:
        yield log


# ----------------------------------------------------------------------------------------------------- the sentences


@pytest.mark.parametrize("number, told, advice", [
    (errno.ENOSPC, "no space left on device", "free some space, or choose another place"),
    (errno.EDQUOT, "disk quota exceeded", "free some space, or choose another place"),
    (errno.EROFS, "read-only file system", "choose another place"),
    (errno.EACCES, "permission denied", "get the rights to it, or choose another place"),
    (errno.EISDIR, "is a directory", "move what is in the way, or choose another name"),
    (errno.ENAMETOOLONG, "file name too long", "choose a shorter name"),
    (errno.EMFILE, "too many open files", "raise the limit of open files (ulimit -n)"),
    (errno.EIO, "input/output error", "the disk, or the way to it, fails: the system's log knows more"),
])  # fmt: skip
def test_an_error_of_the_system_says_where_why_and_what_to_do(number, told, advice):
    assert os_sentence(OSError(number, "x", "out/last.pt")) == f"out/last.pt: {told}: {advice}"


def test_of_a_renaming_the_wanted_name_is_told():
    with pytest.raises(OSError) as caught:
        Path("new").touch()
        Path("old/x").mkdir(parents=True)
        os.replace("new", "old")
    assert os_sentence(caught.value).startswith("old: is a directory: move what is in the way")


def test_errors_without_a_name_of_a_file_get_it_and_others_keep_theirs():
    for error, told in [
        (OSError(errno.ENOSPC, "full"), "run/last.pt: no space"),
        (OSError(errno.ENOSPC, "full", "run/.saving-1.pt"), "run/last.pt: no space"),
        (OSError(errno.ENOENT, "gone", "data/x.h5"), "data/x.h5: no such file"),
        (RuntimeError("Can't decrement id ref count (errno = 27, error message = ...)"), "run/last.pt: file"),
    ]:
        with pytest.raises(OSError) as caught, writing("run/last.pt"):
            raise error
        assert os_sentence(caught.value).startswith(told)
    with pytest.raises(RuntimeError, match="another"), writing("run/last.pt"):
        raise RuntimeError("another")


def test_what_is_no_error_of_the_machine_keeps_its_traceback():
    assert system_sentence(KeyError("x")) == "" == system_sentence(RuntimeError("shape")) == system_sentence(None)
    with pytest.raises(KeyError), errors.clear_errors():
        raise KeyError("x")
    for error, told in [(MemoryError(), "out of memory"), (RecursionError("deep"), "nested too deep"),
                        (ValueError("embedded null byte"), "NUL"), (OSError("odd"), "odd")]:  # fmt: skip
        assert told in system_sentence(error)
    with pytest.raises(UnicodeEncodeError) as caught:
        "out/\xe9".encode("ascii")
    told = r"'out/\xe9' cannot be spelled in ascii: leave '\xe9' out, or set PYTHONUTF8=1"
    assert system_sentence(caught.value) == told


@pytest.mark.parametrize("error, code, told", [
    (InputError("wrong"), 2, "error: wrong"), (RunError("failed"), 1, "error: failed"),
    (FloatingPointError("nan"), 1, "error: nan"), (KeyboardInterrupt(), 130, "stopped"),
    (PermissionError(errno.EACCES, "x", "data"), 2, "error: data: permission denied: get the rights to it, or choose "
                                                     "another place"),
])  # fmt: skip
def test_a_command_ends_with_one_line_and_its_code(error, code, told, capsys):
    with pytest.raises(SystemExit) as end, errors.clear_errors():
        raise error
    assert end.value.code == code and capsys.readouterr().err == told + "\n"


def test_a_file_is_replaced_as_a_whole_or_stays():
    Path("table.csv").write_text("before")
    with pytest.raises(OSError) as caught, files_of_at_most(100), replacing(Path("table.csv")) as fresh:
        fresh.write_bytes(bytes(1000))
    assert os_sentence(caught.value).startswith("table.csv: file too large") and os.listdir() == ["table.csv"]
    assert Path("table.csv").read_text() == "before"


def test_names_that_are_no_text_are_written_as_json_that_is_read_as_they_were():
    write_json(Path("config.json"), {"out_dir": "out/\udc80", "name": "é"})
    assert json.loads(Path("config.json").read_text(encoding="utf-8")) == {"out_dir": "out/\udc80", "name": "é"}


# ---------------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_is_in_the_way_of_any_name_is_found_before_a_run_begins(name):
    place = Path("run") / name
    place.parent.mkdir(parents=True)
    place.touch() if name in FOLDERS else place.mkdir()
    with pytest.raises(InputError, match=f"^run/{name} is .*: move it, or use another out_dir$"):
        open_log().__enter__()
    assert contents("run") == ({str(place): b""} if name in FOLDERS else {})


def test_a_pipe_with_the_name_of_a_file_is_not_waited_for():
    Path("run").mkdir()
    os.mkfifo("run/train.log")
    with pytest.raises(InputError, match="^run/train.log is no file"), open_log():
        pass


def test_a_disk_that_is_full_before_the_first_step_ends_with_2_and_removes_nothing(capsys):
    train_ghmm.main([*TINY, "--out_dir=run"])
    before = contents("run")
    with files_of_at_most(1000):
        told = refusal(capsys, train_ghmm.main, *TINY, "--max_steps=6", "--resume=run/last.pt", "--out_dir=run")
    assert told.startswith("error: run/config.json: file too large") and contents("run") == before


def test_a_disk_that_fills_up_in_training_ends_with_1_and_the_run_goes_on_to_the_bit(capsys, monkeypatch):
    """The file of the checkpoint takes no more at the second save, inside torch's writer."""
    train_ghmm.main([*TINY, "--out_dir=whole"])
    save, limits = checkpoint.save, iter([1 << 30, 2000])

    def save_into_less(*args) -> None:
        with files_of_at_most(next(limits)):
            save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_into_less)
        told = refusal(capsys, train_ghmm.main, *TINY, "--out_dir=run", code=1)
    assert told.startswith("error: run/last.pt: file too large: ")
    assert told.endswith(". run/last.pt of step 2 is whole, and the same command goes on from there")
    assert "stopped by OSError: run/last.pt: file too large" in Path("run/train.log").read_text()
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "split": "tr')  # torn, as a full disk leaves it
    train_ghmm.main([*TINY, "--out_dir=run"])
    weights, same = (checkpoint.load(Path(folder))["model"] for folder in ("run", "whole"))
    assert all((weights[name] == same[name]).all() for name in same) and not list(Path("run").glob(".saving*"))
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == [1, 2, 3, 4]


def test_a_folder_that_is_moved_away_ends_its_run_which_makes_no_other(capsys, monkeypatch):
    train_ghmm.main([*TINY, "--out_dir=whole"])
    save = checkpoint.save

    def save_and_go(state, folder, *args) -> None:
        save(state, folder, *args)
        os.rename(folder, "moved")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_go)
        told = refusal(capsys, train_ghmm.main, *TINY, "--out_dir=run", code=1)
    assert told == ("error: run/metrics.jsonl is gone: it or its folder was moved or removed under this run. Put the "
                    "folder back, and the same command goes on from the last checkpoint in it")
    assert sorted(path.name for path in Path().iterdir()) == ["moved", "whole"]
    with pytest.raises(FileNotFoundError):
        save(checkpoint.load(Path("moved")), Path("run"))
    os.rename("moved", "run")
    train_ghmm.main([*TINY, "--out_dir=run"])
    weights, same = (checkpoint.load(Path(folder))["model"] for folder in ("run", "whole"))
    assert all((weights[name] == same[name]).all() for name in same)


@pytest.mark.parametrize("resume, again", [("auto", "the same command begins"),
                                           ("never", "the same command with resume=auto begins")])
def test_a_log_on_a_full_disk_is_an_error_that_says_what_was_kept(resume, again):
    """/dev/full takes nothing, as a full disk does."""
    Path("run").mkdir()
    os.symlink("/dev/full", "run/train.log")
    with pytest.raises(RunError, match=f"run/train.log: no space left .*No checkpoint was saved before: {again}"):
        with open_log(resume) as log:
            log.say("a line")


@pytest.mark.parametrize("known, told", [(b"abc123\n", "abc123"), (b"\xff\0", None), (b"a/b", None), (b"", None)])
def test_the_name_of_a_wandb_run_may_be_damaged(monkeypatch, known, told, capsys):
    started = []

    def init(**options):
        started.append(options["id"])
        if len(started) > 1:
            raise ConnectionError("no network")
        return SimpleNamespace(id="new")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, finish=lambda **options: None))
    Path("run").mkdir()
    Path("run/wandb_id.txt").write_bytes(known)
    with open_log(step=3, wandb=True):
        pass
    assert started == [told] and Path("run/wandb_id.txt").read_text() == "new"
    assert ("run/wandb_id.txt is damaged" in capsys.readouterr().err) == (told is None)
    with pytest.raises(InputError, match="W&B does not start .ConnectionError: no network"), open_log(wandb=True):
        pass


def test_a_run_that_fails_does_not_promise_to_go_on_from_a_damaged_checkpoint():
    with pytest.raises(RunError, match=r"run/train.log: no space left .*\. run/last.pt is damaged .*no other good"):
        with open_log():
            Path("run/last.pt").write_text("x")
            raise OSError(errno.ENOSPC, "", "run/train.log")


def test_pictures_and_pages_that_cannot_be_written_are_notes(monkeypatch, capsys):
    monkeypatch.setattr(figures, "STRICT", False)
    Path("run").mkdir()
    Path("run/plots").touch()
    with figures.figure(Path("run"), "loss"):
        pass
    told = capsys.readouterr().err
    assert told.startswith("note: the picture loss was not drawn (run/plots: file exists: move")
    assert told.count("\n") == 1


# --------------------------------------------------------------------------------------------------- looks at a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)
        train_ghmm.main([*TINY, f"--out_dir={folder}"])
    return folder


def read_only(**options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), options["dir"])


def test_a_look_at_a_run_that_is_read_only_asks_for_out(trained, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    before = contents(trained)
    told = refusal(capsys, train_ghmm.main, f"--analyze={trained}", "--device=cpu")
    assert f"{trained}/analysis cannot be written (Read-only file system): name another folder, --out=FOLDER" in told
    assert contents(trained) == before and not (trained / "analysis").exists()


def test_a_look_at_a_run_writes_to_out_what_it_would_have_written_beside_it(trained, monkeypatch):
    before = contents(trained)
    train_ghmm.main([f"--analyze={trained}", "--out=look", "--device=cpu"])
    assert contents(trained) == before
    assert {"analysis.json", "config.json", "metrics.jsonl", "report.html"} == set(os.listdir("look"))
    assert "n_layers" in Path("look/report.html").read_text()  # the settings of the run are in


def test_out_is_neither_of_a_training_nor_another_run(trained, capsys):
    assert "with analyze" in refusal(capsys, train_ghmm.main, *TINY, "--out=look", "--out_dir=new")
    assert "holds a run" in refusal(capsys, train_ghmm.main, f"--analyze={trained}", f"--out={trained}")
    assert not Path("new").exists() and not Path("look").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_page_has_out_which_makes_no_other_run(script):
    page = importlib.import_module(script)
    assert config_hash(page.Config(out="x")) == config_hash(page.Config())


def test_samples_that_cannot_be_written_are_one_sentence(trained, capsys):
    with files_of_at_most(10):
        told = refusal(capsys, sample.main, str(trained), "--json=s.json", "--device=cpu", "--length=6")
    assert told.startswith("error: s.json: file too large") and not Path("s.json").exists()


def test_a_home_is_expanded_wherever_a_path_is_asked_for(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    train_ghmm.main([*TINY, "--out_dir=~/run"])
    shutil.copytree(trained, "home/other")
    train_ghmm.main(["--analyze=~/other", "--out=~/look", "--device=cpu"])
    assert set(os.listdir("home")) == {"run", "other", "look"} and os.listdir() == ["home"]


# -------------------------------------------------------------------------------------------------------- the doors

JOBS = {
    "text": ("--input=text.txt", "--tokenizer=char"),
    "planted": ("--train_documents=40", "--validation_documents=20"),
    "ergodic": ("--train_documents=20", "--validation_documents=20"),
    "state": ("--action=synthetic", "--num_cell_types=4", "--num_perturbations=4", "--num_genes=20"),
}


@pytest.mark.parametrize("size", [100, 6_000])  # bytes: the first file takes no more, a later one
@pytest.mark.parametrize("job", JOBS)
def test_a_preparation_on_a_full_disk_leaves_what_was_there(job, size, capsys):
    Path("text.txt").write_text("\n\n".join(f"{i} a text of some words and some more" for i in range(2000)))
    Path("out").mkdir()
    Path("out/meta.json").write_text("before")
    with files_of_at_most(size):
        told = refusal(capsys, prepare_data.main, job, *JOBS[job], "--out_dir=out")
    assert "file too large" in told and told.endswith(". out is as it was") and ".saving" not in told
    assert contents("out") == {"out/meta.json": b"before"}


def test_a_folder_in_the_way_of_a_prepared_file_is_found_first(capsys):
    Path("out/train.bin").mkdir(parents=True)
    told = refusal(capsys, prepare_data.main, "planted", "--train_documents=40", "--out_dir=out")
    assert told == ("error: out/train.bin is a folder, where a file shall be written: move it, or use another out_dir")
    assert os.listdir("out") == ["train.bin"]


def test_a_preparation_clears_away_what_a_killed_one_of_its_number_left():
    Path(f"out/.saving-{os.getpid()}").mkdir(parents=True)  # numbers come again, above all in containers
    with Workshop("out") as shop:
        (shop.folder / "meta.json").touch()
        shop.finish("meta.json")
    assert os.listdir("out") == ["meta.json"]


def test_maps_into_temporary_files_that_have_no_room_are_refused_before_they_are_filled():
    """Filling them would end the process by SIGBUS."""
    with files_of_at_most(1000), pytest.raises(InputError, match="2,000 bytes do not fit .*TMPDIR"):
        spooled_array(np.uint16, 10, 100)
    array = spooled_array(np.uint16, 10, 100)
    array[:] = 7
    assert array.shape == (10, 100) and array.sum() == 7000


def test_hdf5_is_not_begun_where_it_has_no_room(monkeypatch):
    with files_of_at_most(1 << 20), pytest.raises(OSError, match="File too large"):
        room_for("x.h5", 1 << 20)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=4096))
    with pytest.raises(OSError, match="No space left"):
        room_for("x.h5", 1)
    monkeypatch.setattr(shared, "HDF5_BYTES", 0)
    room_for("x.h5", 40960)


def test_results_of_the_benchmark_that_cannot_be_written_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.ghmm.bench", lambda options: None)
    told = refusal(capsys, bench.main, "ghmm", "--json=/dev/full")
    assert told == "error: /dev/full: no space left on device: free some space, or choose another place"


# -------------------------------------------------------------------------------------------------------- the console


@pytest.mark.parametrize("kind, told", [
    ("ascii", ["in_\\xe9"]), ("closed", []), ("deaf", []),
    ("full", ["note: standard output takes no more (No space left on device): the run goes on, and its lines are in"]),
    ("pipe", ["note: standard output takes no more (Broken pipe): the run goes on, and its lines are in"]),
])  # fmt: skip
def test_a_console_that_takes_nothing_ends_no_run(kind, told):
    job = Job("commands", kind, "train_ghmm", *TINY, "--out_dir=in_é", function="with_console")
    assert job.wait() == 0, job.console.read_text()
    printed = job.console.read_text()
    assert "Traceback" not in printed and all(text in printed for text in told)
    assert json.loads(Path("in_é/summary.json").read_text())["steps"] == 4
    assert "done: " in Path("in_é/train.log").read_text(encoding="utf-8")


def test_a_result_that_the_console_does_not_take_is_an_error(trained):
    job = Job("commands", "full", "sample", trained, "--device=cpu", "--length=6", function="with_console")
    assert job.wait() == 1
    assert job.console.read_text() == ("error: standard output: no space left on device: free some space, or choose "
                                       "another place\n")


def test_ctrl_c_while_the_imports_take_their_time_is_one_line():
    """Some of them swallow exceptions: it must not be one."""
    process = subprocess.Popen([sys.executable, ROOT / "train_ghmm.py", "--help"], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # until torch is on its way
        with contextlib.suppress(OSError):
            if not maps.exists() or "torch" in maps.read_text():
                break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert (process.returncode, told) == (130, "stopped\n")


def test_importing_a_page_leaves_signals_to_who_imports_it():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
