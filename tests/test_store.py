"""common/store.py and common/mirror.py: one run a folder, and runs at URLs that end as if they had been here."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fsspec
import pytest
from commands import Job, two_ranks, wait_for
from comparison import unequal

import sample
import sweep
import train_ghmm
from common import checkpoint, mirror, store
from common.errors import InputError
from common.runtime import Runtime
from sources import jobs, outcomes

TINY = ("--n_layers=1", "--d_model=16", "--d_mlp=32", "--n_ctx=6", "--batch_size=16", "--max_words=100",
        "--eval_sequences=16", "--device=cpu", "--max_steps=12", "--save_interval=4", "--eval_interval=6")
SECRET = "wJalrXUtnFEMI0K7MDENG"
INI = "[aws]\nprofile_name = lab\n\n[s3]\nbucket = bucket\nprefix = some/runs/\n"


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    """A test draws nothing, waits little, and knows no account of whoever runs it."""
    monkeypatch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)
    monkeypatch.setattr(train_ghmm, "run_page", lambda *args, **options: "done")
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "PATIENCE_SECONDS", 0.2)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(Path(name).absolute()))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store.note_once.cache_clear()


def run(*settings: str) -> dict:
    return train_ghmm.main([*TINY, *settings])


def run_until(step: int, *settings: str) -> None:
    """A run that a signal stops after a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda rt, now: now >= step)
        assert run(*settings) == {"stopped_at": step}


def refused(capsys, *words: str, main=None) -> str:
    """The error line of a command that must end with exit code 2, behind notes."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        (main or run)(*([list(words)] if main else words))
    *notes, told = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and told.startswith("error: ") and all(line.startswith("note: ") for line in notes)
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> Path:
    """The run that nothing disturbed, in a folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)
        patch.setattr(train_ghmm, "run_page", lambda *args, **options: "done")
        run(f"--out_dir={folder}")
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    """Weights, optimizer, random numbers and the measured numbers, to the bit."""
    for name in ("last.pt", "best.pt"):
        found, expected = checkpoint.load(folder / name), checkpoint.load(whole / name)
        for key in ("step", "best", "model", "optimizer", "ranks"):
            assert not unequal(found[key], expected[key])
    found, expected = (json.loads((path / "analysis.json").read_text()) for path in (folder, whole))
    assert found == expected


# ------------------------------------------------------------------------------------------ one run a folder


def test_a_second_run_is_refused_by_name_and_a_killed_one_leaves_no_lock(capsys):
    job = Job("train_ghmm", *TINY, "--max_steps=1000000", "--out_dir=a/run")
    wait_for(lambda: Path("a/run/last.pt").exists(), job)
    before = Path("a/run/config.json").read_bytes()
    told = refused(capsys, "--out_dir=a/run", "--resume=never")
    assert re.fullmatch(rf"error: a/run is in use by a run on {os.uname().nodename}, pid {job.pid}, since 20[-\d]+ "
                        r"[:\d]+: wait for it, stop it, or use another out_dir", told)
    assert Path("a/run/config.json").read_bytes() == before and jobs.take(Path("a/run")) is None
    assert not jobs.is_free(Path("a/run"))
    job.kill()
    job.process.join()
    assert Path("a/run/run.lock").exists() and jobs.is_free(Path("a/run"))
    run("--out_dir=a/run", "--resume=never")
    assert not Path("a/run/run.lock").exists()


def test_of_two_ranks_one_line_tells_who_holds_the_folder():
    with store.locked(Path("run")):
        told = two_ranks("train_ghmm", *TINY, "--out_dir=run", code=2)
    assert told.count("in use by a run on") == 1


def test_what_a_run_starts_does_not_hold_its_lock():
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with store.locked(Path("run")):
        child = subprocess.Popen(wait, stdin=subprocess.PIPE, close_fds=False)
        reader, writer = os.pipe()
        with warnings.catch_warnings(action="ignore"):  # newer Pythons warn of threads that a child does not have
            forked = os.fork()
        if not forked:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    with store.locked(Path("run")):
        assert child.poll() is None
    os.close(writer)
    os.close(reader)
    os.waitpid(forked, 0)
    child.communicate()


def test_a_file_system_without_locks_is_told_once(monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    run_until(4, "--out_dir=run")
    run("--out_dir=run")
    with jobs.take(Path("run")), jobs.take(Path("run")):
        outcomes.append(Path("run/sweep.jsonl"), {"run": "a"})
    told = capsys.readouterr().err
    assert told.count("there are no locks on the file system of run (No locks available)") == 1


def test_a_refused_command_leaves_nothing_and_one_that_is_there_stays(capsys):
    refused(capsys, "--out_dir=a/b/run", "--resume=absent.pt")
    assert list(Path().iterdir()) == []
    assert "out_dir is empty: name a folder" in refused(capsys, "--out_dir=")
    assert list(Path().iterdir()) == []
    Path("a/run").mkdir(parents=True)
    refused(capsys, "--out_dir=a/run", "--resume=absent.pt")
    assert list(Path().rglob("*")) == [Path("a"), Path("a/run")]


@pytest.mark.parametrize(("out_dir", "why"), [
    ("file", "File exists"), ("file/run", "Not a directory"), ("n" * 300, "File name too long"), ("a\0b", "null"),
    ("/proc/run", "No such file"), ("loop/run", "symbolic links"),
])  # fmt: skip
def test_a_place_that_cannot_be_is_one_sentence(capsys, out_dir, why):
    Path("file").touch()
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError) as error, store.locked(Path(out_dir)):
        pass
    assert why in str(error.value) and "use another folder" in str(error.value)
    assert sorted(path.name for path in Path().iterdir()) == ["file", "loop"]


def test_a_finished_run_in_a_read_only_folder_is_told_again(monkeypatch, capsys, whole):
    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(store, "hold", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    run(f"--out_dir={whole}")
    assert "nothing was left to train" in capsys.readouterr().out


def test_a_lock_that_was_removed_while_it_was_waited_for_is_none():
    first = store.hold(Path("x.lock"))
    Path("x.lock").unlink()
    second = store.hold(Path("x.lock"))  # of a new file: the first holds a name that is gone
    assert second and store.hold(Path("x.lock")) is None
    first.close()
    second.close()


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_what_has_the_name_of_a_lock_is_neither_overwritten_nor_waited_for(kind):
    Path("run").mkdir()
    Path("precious").write_text("precious")
    lock = Path("run/run.lock")
    {"link": lambda: lock.symlink_to("../precious"), "dangling": lambda: lock.symlink_to("../nowhere"),
     "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[kind]()
    assert store.holder(Path("run")) == ""
    with pytest.raises(InputError, match="run/run.lock is no file of ours, .*: move it"), store.locked(Path("run")):
        pass
    assert os.path.lexists(lock) and Path("precious").read_text() == "precious" and not Path("nowhere").exists()


def as_nobody(function) -> int:
    """The exit code of a child that calls function() as a user without rights, of 3 where that is an InputError."""
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    with contextlib.suppress(BaseException):
        os.setuid(65534)
        try:
            function()
            code = 0
        except InputError:
            code = 3
    os._exit(code)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_the_lock_of_another_user_is_held_by_that_run_and_nobodys_when_it_died(tmp_path):
    folder = Path("run").absolute()
    folder.mkdir()
    for place in [*folder.parents][:-1]:
        if place.stat().st_uid == 0 and place != Path("/tmp"):
            place.chmod(0o755)
    folder.chmod(0o777)

    def use() -> None:
        with store.locked(folder):
            assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()

    with store.locked(folder):
        (folder / "run.lock").chmod(0o644)
        assert as_nobody(use) == 3
    (folder / "run.lock").write_text("of a run that was killed")
    assert as_nobody(use) == 0 and not (folder / "run.lock").exists()


def test_a_run_whose_folder_was_moved_leaves_the_lock_of_the_next_alone():
    with store.locked(Path("run")):
        os.rename("run", "moved")
        second = store.locked(Path("run"))
        second.__enter__()
    assert store.holder(Path("run")).startswith("a run on")
    second.__exit__(None, None, None)


# ------------------------------------------------------------------------------------------ URLs: any store


@pytest.fixture
def remote() -> str:
    return f"file://{Path('remote/run').absolute()}"


def here(url: str) -> Path:
    return store.staging(url)


def names_at(url: str) -> set[str]:
    fs, root = fsspec.core.url_to_fs(url)
    return {name[len(root):].lstrip("/") for name in fs.find(root)}


def test_a_run_goes_on_from_its_url_where_nothing_else_is_left(remote, whole, capsys):
    run_until(4, f"--out_dir={remote}", "--keep_last=1")
    shutil.rmtree("out")
    run(f"--out_dir={remote}", "--keep_last=1")
    told = capsys.readouterr()
    assert "resumed from" in told.out and "at step 4" in told.out and "fetching files of file://" in told.err
    assert_same(Path("remote/run"), whole)
    # keep_last holds there, too; and nothing is there that is no part of the run.
    assert names_at(remote) == {"config.json", "metrics.jsonl", "train.log", "train_ghmm.py", "analysis.json",
                                "best.pt", "step_12.pt", "last.pt", "summary.json", "index.json"}
    index = json.loads(Path("remote/run/index.json").read_text())
    assert index["step"] == 12 and set(index["names"]) == names_at(remote) - {"index.json"}
    shutil.rmtree("out")
    run(f"--out_dir={remote}", "--keep_last=1")
    assert "nothing was left to train" in capsys.readouterr().out


def test_memory_is_a_url_as_any(whole):
    run_until(4, "--out_dir=memory://a/run", "--keep_last=-1")
    shutil.rmtree("out")
    run("--out_dir=memory://a/run/", "--keep_last=-1")
    assert_same(here("memory://a/run"), whole)
    other = here("memory://b/run")
    run("--out_dir=memory://b/run", "--resume=memory://a/run/step_4.pt")
    assert_same(other, whole)


def test_what_looks_at_runs_takes_urls(remote, whole, capsys, monkeypatch):
    shutil.copytree(whole, "remote/run")  # by other means: without an index
    found = train_ghmm.main([f"--analyze={remote}"])
    assert found["loss"] == train_ghmm.main([f"--analyze={whole}"])["loss"]
    assert (here(remote) / "analysis/analysis.json").exists() and not Path("remote/run/analysis").exists()
    capsys.readouterr()
    assert sample.main([remote]) == sample.main([str(whole)])
    monkeypatch.setenv("HOME", os.getcwd())
    assert "One run: " in "\n".join(sweep.main(["report", remote, "--out=~/told"]))
    assert Path("told/report.html").exists() and not Path("~").exists()
    assert "out=s3://b/x is a URL; here a folder" in refused(capsys, f"--analyze={remote}", "--out=s3://b/x")
    assert "there is no run at file://" in refused(capsys, remote + "s", main=sample.main)
    assert "there is no checkpoint at file://" in refused(capsys, f"--analyze={remote}/step_9.pt")


def test_a_url_where_nothing_can_be_written_here_says_where_to_start(remote, capsys):
    Path("out").touch()
    for told in (refused(capsys, remote, main=sample.main), refused(capsys, f"--out_dir={remote}")):
        assert f"'{here(remote)}' cannot be made (Not a directory): start in a folder that can be written" in told


def test_a_url_that_takes_its_time_is_said_to_be_waited_for(remote, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "SLOW_SECONDS", 0.01)
    monkeypatch.setattr(mirror.Mirror, "read_index", lambda copy: time.sleep(0.3))
    with pytest.raises(SystemExit):
        sample.main([remote])
    assert capsys.readouterr().err.startswith(f"note: waiting for an answer from {remote}\nerror: there is no run at ")


def spoil(path: Path) -> None:
    text = bytearray(path.read_bytes())
    middle = len(text) // 2
    text[middle : middle + 200] = bytes(200)  # more than lies between two parts
    path.write_bytes(text)


def test_damage_at_a_url_is_one_sentence(remote, whole, capsys):
    run_until(8, f"--out_dir={remote}", "--keep_last=-1")
    shutil.rmtree("out")
    good = Path("remote/run/last.pt").read_bytes()
    spoil(Path("remote/run/last.pt"))
    damaged = f"{here(remote)}/last.pt is damaged"
    assert damaged in refused(capsys, f"{remote}/last.pt", main=sample.main)
    told = refused(capsys, f"--out_dir={remote}")
    assert damaged in told
    # What is put right there is not hidden by what was fetched.
    Path("remote/run/last.pt").write_bytes(good)
    shutil.copytree("remote", "kept")
    run(f"--out_dir={remote}", "--keep_last=-1")
    assert_same(here(remote), whole)
    # And the advice is true.
    shutil.rmtree("out")
    shutil.rmtree("remote")
    Path("kept").rename("remote")
    spoil(Path("remote/run/last.pt"))
    assert refused(capsys, f"--out_dir={remote}") == told
    run(f"--out_dir={remote}", "--keep_last=-1", re.search(r"resume=\S+?\.pt", told)[0])
    assert_same(Path("remote/run"), whole)


def test_what_is_missing_at_a_url_is_one_sentence(remote, capsys):
    run_until(4, f"--out_dir={remote}", "--keep_last=-1")
    shutil.rmtree("out")
    Path("remote/run/last.pt").unlink()
    told = refused(capsys, f"--out_dir={remote}")
    assert f"{remote}/last.pt is missing, though index.json beside it names it" in told
    # Another checkpoint of it does not need the one that is gone.
    run("--out_dir=b", f"--resume={remote}/step_4.pt")


def test_a_damaged_index_is_one_sentence(remote, capsys):
    run_until(4, f"--out_dir={remote}")
    known = {"writer": "a", "mark": "b", "step": 1}
    bad = ["{", "[]", json.dumps(known), '{"names": 1}', json.dumps({"names": [], **known, "step": "x"}), "[" * 9999]
    bad += [json.dumps({"names": [name], **known}) for name in
            ("../../escaped", "/escaped", "", "a//b", ".remote.json", "run.lock", "plots/../../x", 3)]
    for text in (*map(str.encode, bad), b"\xff"):
        Path("remote/run/index.json").write_bytes(text)
        assert "index.json is damaged" in refused(capsys, f"--out_dir={remote}")


class Store:
    """A file system whose uploads fail while fails(name) is true, after half of the file."""

    def __init__(self, monkeypatch, fails):
        self.tried, put = [], fsspec.implementations.local.LocalFileSystem.put_file

        def put_file(fs, source, target, **options):
            self.tried.append(Path(target).name.removeprefix(".sending-"))
            if not fails(self.tried[-1]):
                return put(fs, source, target, **options)
            text = Path(source).read_bytes()
            Path(target).write_bytes(text[: len(text) // 2])
            raise OSError("the network is down at http://me:hidden@host/")

        monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "put_file", put_file)


def test_uploads_that_fail_are_tried_again_and_told(remote, whole, monkeypatch, capsys):
    lost = []
    Store(monkeypatch, lambda name: lost.append(name) or len(lost) < 4)
    run(f"--out_dir={remote}")
    told = capsys.readouterr().err
    assert told.count(f"uploads to {remote} fail (OSError: the network is down at http://***@host/)") == 1
    assert told.count("arrive again") == 1 and "not all of" not in told
    assert_same(Path("remote/run"), whole)


def test_slow_uploads_are_of_the_newest_save(remote, whole, monkeypatch, capsys):
    store = Store(monkeypatch, lambda name: name == "config.json" and time.sleep(0.5))
    run(f"--out_dir={remote}", "--save_interval=1", "--keep_last=1")
    assert_same(Path("remote/run"), whole)
    assert store.tried.count("last.pt") < 6 and "fail" not in capsys.readouterr().err
    assert {name for name in names_at(remote) if name.startswith("step")} == {"step_12.pt"}
    assert not list(Path("out").rglob(".sending*"))


@pytest.mark.parametrize("lost", ["best.pt", "last.pt"])
def test_an_upload_that_broke_off_leaves_a_whole_run(remote, whole, monkeypatch, capsys, lost):
    run_until(4, f"--out_dir={remote}")
    with pytest.MonkeyPatch.context() as patch:
        Store(patch, lambda name: name == lost)
        run(f"--out_dir={remote}")
    told = capsys.readouterr().err
    assert told.count("training goes on") == 1 and told.count("the same command sends what is missing") == 1
    # Elsewhere the run goes on from what arrived: each object is whole, old or new.
    shutil.copytree("remote", "kept")
    Path("out").rename("machine")
    run(f"--out_dir={remote}")
    assert_same(here(remote), whole)
    # Where it was, the same command sends what is missing.
    shutil.rmtree("out")
    shutil.rmtree("remote")
    Path("kept").rename("remote")
    Path("machine").rename("out")
    run(f"--out_dir={remote}")
    assert_same(Path("remote/run"), whole)


def test_of_two_machines_none_writes_over_the_other(remote, capsys):
    run_until(4, f"--out_dir={remote}")
    shutil.copytree("out", "machine")
    shutil.rmtree("out")
    # Another machine goes on; the first has gone on by itself, and is told.
    run_until(8, f"--out_dir={remote}")
    newer = Path("remote/run/index.json").read_bytes()
    shutil.rmtree("out")
    Path("machine").rename("out")
    shutil.copytree("remote", "kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror.Mirror, "fetch", lambda self, *args: self.look())
        patch.setattr(mirror.Mirror, "send", lambda self, *args: None)
        run(f"--out_dir={remote}")
    told = refused(capsys, f"--out_dir={remote}")
    assert "(step 8), and" in told and "holds what never arrived there: remove" in told
    assert Path("remote/run/index.json").read_bytes() == newer


def test_a_url_that_another_machine_writes_to_meanwhile_is_left_to_it(remote, monkeypatch, capsys):
    save = checkpoint.save
    theirs = json.dumps({"writer": "they", "host": "there", "time": "now", "step": 9, "mark": "x", "names": []})

    def save_and_be_overtaken(state, *args):
        save(state, *args)
        if state["step"] == 4:
            copy, = mirror.MIRRORS.values()
            with copy.change:
                copy.change.wait_for(lambda: not (copy.next or copy.at_work), 10)
            Path("remote/run/index.json").write_text(theirs)

    monkeypatch.setattr(checkpoint, "save", save_and_be_overtaken)
    run(f"--out_dir={remote}")
    told = capsys.readouterr().err
    assert told.count("there at now (step 9) has written there since, and is not written over") == 2
    assert Path("remote/run/index.json").read_text() == theirs


def test_a_run_anew_replaces_what_is_at_its_url_once_it_has_begun(remote, capsys):
    run(f"--out_dir={remote}")
    before = names_at(remote)
    refused(capsys, f"--out_dir={remote}", "--resume=never", "--matrices=absent.npy", "--process=custom")
    assert names_at(remote) == before
    shutil.rmtree("out")
    run_until(4, f"--out_dir={remote}", "--resume=never", "--seed=5")
    assert "step_12.pt" not in names_at(remote) and "summary.json" not in names_at(remote)


def test_a_run_anew_that_is_refused_sends_nothing(remote, capsys):
    run_until(4, f"--out_dir={remote}")
    shutil.copytree("out", "other/out")
    run_until(8, f"--out_dir={remote}")
    before = {name: (Path("remote/run") / name).read_bytes() for name in names_at(remote)}
    shutil.rmtree("out")
    Path("other/out").rename("out")  # of a machine that has step 4
    refused(capsys, f"--out_dir={remote}", "--resume=never", "--matrices=absent.npy", "--process=custom")
    assert before == {name: (Path("remote/run") / name).read_bytes() for name in names_at(remote)}


def test_a_copy_of_the_folder_of_a_url_is_another_machine(remote, whole, capsys):
    run_until(4, f"--out_dir={remote}")
    shutil.copytree("out", "other/out")
    run_until(8, f"--out_dir={remote}")
    shutil.rmtree("out")
    Path("other/out").rename("out")
    run(f"--out_dir={remote}")  # the copy has step 4, the URL step 8
    assert "at step 8" in capsys.readouterr().out
    assert_same(Path("remote/run"), whole)


def test_what_is_no_part_of_a_run_stays_at_its_url(remote):
    for name in ("notes.txt", ".hidden", "below/last.pt"):
        (Path("remote/run") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("remote/run") / name).touch()
    for resume in ("auto", "never"):
        run_until(4, f"--out_dir={remote}", f"--resume={resume}", "--keep_last=1")
        assert {"notes.txt", ".hidden", "below/last.pt"} <= names_at(remote)


@pytest.mark.parametrize(("url", "sentence"), [
    (f"s3://me:{SECRET}@bucket/x", "has a name, password or query in it"),
    (f"s3://AKIA:{SECRET[:5]}/{SECRET}@bucket/x", "has a name, password or query in it"),
    (f"https://host/x?signature={SECRET}", "has a name, password or query in it"),
    ("s3://", "is no place for a run: name s3://BUCKET/NAME"),
    ("s3:///x", "is no place for a run"),
    ("file://relative", "is no place for a run"),
    ("file:///", "is no place for a run"),
    ("://x", "is no place for a run"),
    ("s3://bucket/x/../y", "is no place for a run"),
    ("s3:/bucket/x", "is no place for a run: name s3://BUCKET/NAME"),
    ("simplecache::memory://x", "is no place for a run"),
    ("file:///proc/x", "file:///proc/x cannot be used (FileNotFoundError"),
    ("nosuch://host/x", "nosuch://host/x cannot be used (ValueError: Protocol not known: nosuch"),
    ("s3://bucket/x", "credentials"),
])  # fmt: skip
def test_urls_that_cannot_be_used_are_one_sentence_without_secrets(capsys, url, sentence):
    pytest.importorskip("s3fs")
    told = refused(capsys, f"--out_dir={url}")
    assert sentence in told and SECRET not in told
    for words in (f"--resume={url}/last.pt", f"--analyze={url}"):
        assert SECRET not in refused(capsys, words)
    assert list(Path().iterdir()) == []


def test_s3_without_its_package_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    assert "pip install s3fs" in refused(capsys, "--out_dir=s3://bucket/x")


@pytest.mark.parametrize(("ini", "sentence"), [
    (None, "s3_config = s3.ini: no such file: name an .ini file"),
    ("", "s3_config = s3.ini is empty"),
    ("[s4]\n", "has no s3"),
    ("[s3]\nbucket = b\n", "has no aws"),
    ("[aws]\nprofile_name = p\n[s3]\nprefix = b\n", "has no bucket"),
    ("[aws]\nprofile_name =\n[s3]\nbucket = b\n", "profile_name the name of a profile"),
    ("[aws]\nprofile_name = p\n[s3]\nbucket = b\nprefix = s3://b/x\n", "prefix a path in it"),
    ("[aws]\nprofile_name = p\n[s3]\nbucket = s3://b\n", "bucket is the name of a bucket"),
    ("[aws]\nprofile_name = p\n[s3]\nbucket = b\nprefix = ../x\n", "s3://b/../x/run is no place for a run"),
    (f"[aws]\nprofile_name = p\n[s3]\nbucket = me:{SECRET}@b\n", "has a name, password or query in it"),
    ("bucket = b", "is no .ini file"),
    ("[aws]\nprofile_name = nobody\n[s3]\nbucket = b\n", "The config profile (nobody) could not be found"),
])  # fmt: skip
def test_a_bad_s3_config_is_one_sentence_before_training(capsys, ini, sentence):
    pytest.importorskip("s3fs")
    if ini is not None:
        Path("s3.ini").write_text(ini)
    told = refused(capsys, "--s3_config=s3.ini", "--out_dir=run")
    assert sentence in told and SECRET not in told and not Path("run").exists()


def test_an_s3_config_that_is_a_pipe_is_not_waited_for(capsys):
    os.mkfifo("s3.ini")
    assert "s3_config = s3.ini is a pipe, and no file" in refused(capsys, "--s3_config=s3.ini", "--out_dir=run")


def test_where_a_folder_is_copied_to():
    Path("s3.ini").write_text(INI)
    where = {name: store.place_of(name, "s3.ini") for name in ("out/x/", str(Path("out/y").absolute()), "/data/z")}
    assert [url for _, url, _ in where.values()] == [
        "s3://bucket/some/runs/out/x", "s3://bucket/some/runs/out/y", "s3://bucket/some/runs/data/z"]
    assert {(str(folder), profile) for folder, _, profile in where.values()} == {
        ("out/x", "lab"), (str(Path("out/y").absolute()), "lab"), ("/data/z", "lab")}
    for place in ("../x", "s3://bucket/x"):
        with pytest.raises(InputError):
            store.place_of(place, "s3.ini")


# ------------------------------------------------------------------------------------------ URLs: S3


@pytest.fixture(scope="module")
def server():
    """S3, as moto plays it."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch) -> str:
    import logging

    logging.getLogger("werkzeug").disabled = True
    Path("CONFIG_FILE").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {server}\n")
    Path("SHARED_CREDENTIALS_FILE").write_text(f"[lab]\naws_access_key_id = me\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    with contextlib.suppress(FileExistsError):
        fs.mkdir("bucket")
    return "bucket"


def test_a_run_at_s3_is_the_run_and_its_secret_is_nowhere(bucket, whole, capsys, monkeypatch):
    url = "s3://bucket/some/runs/out/x"
    Path("s3.ini").write_text(INI)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE")  # the file names it
        run_until(4, "--out_dir=out/x", "--s3_config=s3.ini")
    shutil.rmtree("out/x")
    # The same run by its URL, in the folder that stands for it.
    run(f"--out_dir={url}")
    assert_same(here(url), whole)
    shutil.rmtree("out")
    assert sample.main([url]) == sample.main([str(whole)])
    shutil.rmtree("out")
    Path("out/x").mkdir(parents=True)
    Path("out/x/console.log").write_text("what a sweep has written")
    run("--out_dir=out/x", "--s3_config=s3.ini")
    assert_same(Path("out/x"), whole)
    told = capsys.readouterr()
    assert "nothing was left to train" in told.out and SECRET not in told.out + told.err
    files = [path for path in Path("out").rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert "there is no such bucket" in refused(capsys, "--out_dir=s3://absent/x")


def test_an_s3_that_does_not_answer_is_one_sentence(bucket, capsys, monkeypatch):
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    told = refused(capsys, "--out_dir=s3://bucket/away")
    assert "s3://bucket/away cannot be used (EndpointConnectionError" in told
