"""What a command says beside its results: its first line, what takes long, the end of a run."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import runlog, telling

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hurry(monkeypatch):
    """All waits a hundred times shorter."""
    for name in ("SILENT_S", "SHORT_S", "AGAIN_S"):
        monkeypatch.setattr(telling, name, getattr(telling, name) / 100)


def test_what_is_over_soon_says_nothing_and_leaves_no_thread(capsys):
    before = threading.active_count()
    with telling.doing("reading"):
        assert list(telling.bar(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    time.sleep(0.05)
    assert threading.active_count() == before


def test_a_long_count_says_how_far_it_is_ever_more_rarely(hurry, capsys):
    for _ in telling.bar(range(100), "analysing 100 prefixes"):
        time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    # At 0.02 s, then every 0.045 and, later, after a tenth of the time so far: about 17 of one second.
    assert 2 <= len(lines) <= 40
    shares = [int(re.fullmatch(r"analysing 100 prefixes \.\.\. (\d+)%, about \d+ s left", line)[1]) for line in lines]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 100


@pytest.mark.parametrize("done, seconds, told", [
    (0, 2, ""),  # nobody knows yet
    (0, 7, " 7 s"),
    (25, 10, " 25%, about 30 s left"),
    (1, 10, " 1%, about 16 min left"),  # 990 s
    (1, 1_000, " 1%, about 27.5 h left"),
    (100, 10, " 100%, about 1 s left"),
])
def test_the_estimate_is_of_the_pace_so_far(monkeypatch, done, seconds, told):
    work = telling.Work("counting", 100, "", active=False)
    work.began, work.done = 0.0, done
    monkeypatch.setattr(telling.time, "monotonic", lambda: float(seconds))
    assert work.so_far() == told


def test_a_long_piece_without_a_count_has_its_line(hurry, capsys):
    with telling.doing("fitting laws"):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"fitting laws \.\.\.( 1 s)?", line) for line in lines)


def test_work_that_counts_by_itself_and_a_total_that_nobody_knows(hurry, capsys):
    with telling.bar(None, "reading", unit="files") as work:
        work.update(1_234)
        time.sleep(0.06)
    assert capsys.readouterr().err.splitlines()[0] == "reading ... 1,234 files"


def test_short_pieces_in_a_row_are_not_silent_together(hurry, capsys, monkeypatch):
    monkeypatch.setattr(telling, "SILENT_S", 0.2)
    monkeypatch.setattr(telling, "QUIET_S", 0.3)
    for name in ("one", "two", "three"):
        for _ in telling.bar(range(15), name):
            time.sleep(0.01)
    assert capsys.readouterr().err  # of the second or third; of the first on a busy machine


def test_other_ranks_and_what_is_not_active_say_nothing(hurry, capsys, monkeypatch):
    with telling.doing("reading", active=False):
        time.sleep(0.05)
    monkeypatch.setenv("RANK", "1")
    telling.begin("train_x.py", "x")
    telling.note("x")
    for _ in telling.bar(range(2), "counting"):
        time.sleep(0.04)
    assert capsys.readouterr() == ("", "")


def test_a_break_ends_what_is_said(hurry, capsys):
    for _ in telling.bar(range(100), "counting"):
        break
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_the_first_line(capsys):
    telling.begin("there/train_x.py", "mess3, 2 steps", Path("out/x"))
    runlog.first_line("train_x.py", SimpleNamespace(analyze="out/x", out="", out_dir="out/y"), "mess3")
    told = capsys.readouterr()
    assert told.err == "train_x: mess3, 2 steps -> out/x\n" and told.out == "train_x: a look at out/x\n"


def test_a_run_ends_with_its_verdict_and_few_numbers(tmp_path):
    summary = {"loss": 0.123456789, "K": 3, "by": [1, 2], "text": "x", "more": 1_234_567, "none": None}
    summary["verdict"] = "good"
    assert runlog.conclusion(summary, ("K", "loss", "absent", "none")) == ["done: good", "K: 3", "loss: 0.123457"]
    assert runlog.conclusion(summary)[1:] == ["loss: 0.123457", "K: 3", "more: 1234567"]
    many = {f"n{i}": i for i in range(20)} | {"verdict": "good"}
    assert len(runlog.conclusion(many, tuple(many))) == 7  # and one line for the places
    assert runlog.places(tmp_path) == f"results in {tmp_path}"
    (tmp_path / "plots").mkdir()
    (tmp_path / "report.html").touch()
    assert runlog.places(tmp_path) == f"pictures in {tmp_path / 'plots'}, all of it in {tmp_path / 'report.html'}"


@pytest.mark.parametrize("columns", [0, 40, None])
def test_a_long_line_is_broken_at_words_on_a_terminal_alone(monkeypatch, capsys, columns):
    def size(descriptor):
        if columns is None:
            raise OSError
        return SimpleNamespace(columns=columns)

    monkeypatch.setattr(telling.os, "get_terminal_size", size)
    monkeypatch.setattr(telling.sys, "stdout", SimpleNamespace(fileno=lambda: 1, write=sys.stdout.write))
    text = "step      1/20 | loss 1.0\ndone: " + "the least of all " * 3 + "0" * 50
    lines = telling.fitted(text).split("\n")
    if columns == 40:
        assert lines[0] == "step      1/20 | loss 1.0" and max(map(len, lines[:-1])) <= 40
        assert lines[1:] == ["done: the least of all the least of all", "  the least of all", "  " + "0" * 50]
    else:
        assert lines == text.split("\n")


def test_no_page_waits_for_a_compiler_that_it_does_not_use():
    """To import torch's takes over a second, before the first line."""
    pages = ", ".join(sorted(path.stem for path in ROOT.glob("train_*.py")))
    asks = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {pages}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
