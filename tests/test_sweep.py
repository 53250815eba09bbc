"""sweep.py: what a command line lists, what is run, what a killed, stopped or failing run leaves, and the table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import ROOT, SCRIPTS, Job, python, refusal, sweep_tiny, wait_for

import sweep
import train_ghmm
from measure import comparison, progress
from measure.sweeps import OBJECTIVES, groups, in_words, objective, sorted_table, table
from sources import equal_size, holdouts, jobs, study_arxiv
from sources.outcomes import append, numbers, record
from sources.runs import Grid, import_page, plan_runs
from sources.studies import Variation
from sources.sweeps import hydra_settings, labels, listed_values, plain, read_sweeper, run_name, take_apart

COMPARISON = sweep.comparison  # it draws: left out of the tests that are not of it
# A page without torch, that starts within a tenth of a second: it trains by waiting.
PAGE = '''
import json, os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from configurator import config_dict, config_hash, configure

EXPERIMENT = "ghmm"
ALIASES = {"learning_rate": "lr"}

@dataclass
class Config:
    out_dir: str = "out/tiny"
    resume: str = "auto"
    analyze: str = ""
    lr: float = 0.1
    seed: int = 0
    act: str = "relu"
    widths: list[int] | None = None
    max_steps: int = 1  # of 10 ms
    meets: str = ""  # a file that another run makes
    deaf: bool = False  # to signals, as is a process that it starts

    def check(self):
        return ["lr = 0.5 goes with no seed"] if self.lr == 0.5 else []

def write(path, value):
    path.with_suffix(".new").write_text(json.dumps(value))
    path.with_suffix(".new").rename(path)

def main(argv=None):
    cfg = configure(Config, argv, ALIASES)
    folder, stops = Path(cfg.out_dir), []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    write(folder / "config.json", config_dict(cfg))
    (folder / "train_tiny.py").write_bytes(Path(__file__).read_bytes())
    last = folder / "last.pt"
    step = json.loads(last.read_text()) if last.exists() and cfg.resume == "auto" else 0
    with open(folder / "starts", "a") as starts:
        starts.write(f"{step}\\n")
    if cfg.lr > 1:
        print("a first line")
        sys.exit("error: the loss is not finite")
    Path(f"seed{cfg.seed}").touch()
    if cfg.deaf:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "30"], start_new_session=True)
        (folder / "child").write_text(str(child.pid))
    began = time.monotonic()
    while step < cfg.max_steps:
        if time.monotonic() > began + 20:
            sys.exit("error: nobody came")
        time.sleep(0.01)
        step += not cfg.meets or Path(cfg.meets).exists()
        write(last, step)
        with open(folder / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps({"step": step, "split": "train", "loss": cfg.lr}) + "\\n")
        if stops:
            print(f"stopped after {step}")
            return
    facts = {"seconds": 2.0, "own_session": os.getsid(0) == os.getpid(), "config_hash": config_hash(cfg)}
    facts |= {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "LAUNCHED", "OMP_NUM_THREADS")}
    results = {"excess_loss": cfg.lr + cfg.seed / 100, "loss": 1 + cfg.lr, "loss_by_position": [1]}
    write(folder / "summary.json", results | facts)

if __name__ == "__main__":
    main()
'''


@pytest.fixture(autouse=True)
def page(stand_in_page):
    """The page, in the folder where the test stands."""
    stand_in_page(PAGE)


def swept(*words: str, code: int = 0) -> list[dict]:
    """The lines of sweep.jsonl in the folder `sweep`, after the command has ended with this code."""
    sweep_tiny(words, "sweep", code)
    return lines()


def lines() -> list[dict]:
    """The last line of each run in sweep.jsonl."""
    told = [json.loads(line) for line in Path("sweep/sweep.jsonl").read_text().splitlines()]
    return list({line["run"]: line for line in told}.values())


def planned(capsys, *words: str, page: str = "train_tiny.py") -> list[list[str]]:
    """The words of each run that a command line would start, but for its folder."""
    capsys.readouterr()
    assert sweep.main([page, *words, "--print_config"]) == []
    return [command.split()[2:-1] for command in capsys.readouterr().out.splitlines()]


def starts(name: str) -> list[int]:
    """At which step a run began, each time that it was started."""
    path = Path("sweep", name, "starts")
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def refused(capsys, *words: str) -> str:
    told = refusal(capsys, sweep.main, "train_tiny.py", *words)
    assert not Path("out").exists() and not Path("sweep").exists()
    return told


# ------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3,1e-4", ["1e-3", "1e-4"]),
        ("1e-3", ["1e-3"]),
        ("", [""]),
        ("a, b", ["a", "b"]),
        ("'a,b',c", ["a,b", "c"]),
        ('"a,b"', ['"a,b"']),  # one value: nothing is listed, the page reads it
        ("don't,do", ["don't", "do"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("[1,2]", ["[1,2]"]),
        ("{a: 1, b: 2},{a: 2}", ["{a: 1, b: 2}", "{a: 2}"]),
        ("choice(1,2)", ["1", "2"]),
        ("choice(7)", ["7"]),
        ("choice([1,2],[3])", ["[1,2]", "[3]"]),
        ("range(3)", ["0", "1", "2"]),
        ("range(1,5)", ["1", "2", "3", "4"]),
        ("range(1, 6, step=2)", ["1", "3", "5"]),
        ("range(0,1,0.25)", ["0.00", "0.25", "0.50", "0.75"]),
        ("range(0.1,0.4,0.1)", ["0.1", "0.2", "0.3"]),
        ("range(5,1,-2)", ["5", "3"]),
        ("range(start=2,stop=4)", ["2", "3"]),
        ("f(1,2)", ["f(1,2)"]),
    ],
)
def test_values_that_a_word_lists(text, values):
    assert listed_values("x", text) == values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1,2"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ("[1,2]", ["[1,2]"]),
        ("(1,2),(3,)", ["(1,2)", "(3,)"]),
        ("choice([1,2],3)", ["[1,2]", "3"]),
    ],
)
def test_a_list_is_one_value_of_a_setting_that_is_a_list(text, values):
    assert listed_values("x", text, is_list=True) == values


def test_optuna_draws_the_end_of_a_range_too():
    assert listed_values("x", "range(1,5)", inclusive=True) == ["1", "2", "3", "4", "5"]
    assert listed_values("x", "range(1,6,2)", inclusive=True) == ["1", "3", "5"]
    assert listed_values("x", "range(2,2)", inclusive=True) == ["2"]
    assert read_sweeper({"hydra/sweeper": "optuna"}).inclusive
    assert not read_sweeper({"hydra/sweeper": "optuna", "hydra/sweeper/sampler": "grid"}).inclusive
    assert not read_sweeper({}).inclusive


def test_words_of_all_forms_are_taken_apart():
    own, words = take_apart(
        ["a.py", "--jobs", "2", "--lr=1,2", "--seed", "0,1", "+x.y=3", "--wandb", "b.yaml", "--n", "4", "out_dir=o",
         "--no-compile", "group@part=a,b"],
        ("jobs", "out_dir"),
    )
    assert own == {"jobs": "2", "out_dir": "o"}
    assert [(word.key, word.head + word.value) for word in words] == [
        ("", "a.py"), ("lr", "--lr=1,2"), ("seed", "--seed=0,1"), ("x.y", "+x.y=3"), ("", "--wandb"), ("", "b.yaml"),
        ("", "--n"), ("", "4"), ("", "--no-compile"), ("group@part", "group@part=a,b"),
    ]  # fmt: skip


def test_a_run_is_named_by_what_differs():
    assert run_name({"lr": "0.001", "seed": "0"}) == "lr=0.001,seed=0"
    assert run_name({}) == "run"
    assert labels(["optim.lr", "seed"]) == ["lr", "seed"]
    assert labels(["train.size", "eval.size"]) == ["train.size", "eval.size"]
    assert labels(["generative_process@training_data_generator"]) == ["training_data_generator"]
    paths = {run_name({"data": path}) for path in ("a/b", "a-b", "a b", "../a/b")}
    assert len(paths) == 4 and not any("/" in path or " " in path for path in paths)
    long = {run_name({f"setting{i}": "x" * 100 + end for i in range(9)}) for end in "ab"}
    assert len(long) == 2 and all(len(name) < 220 for name in long)


def test_one_number_is_written_in_one_way():
    texts = ("1e-3", "0.0010", "1e5", "007", "1.0", "-2", "1e-5", "inf", "relu", "123456789012345678")
    assert [plain(text) for text in texts] == [
        "0.001", "0.001", "100000", "7", "1", "-2", "1e-05", "inf", "relu", "123456789012345678"]  # fmt: skip


def test_the_combinations_are_in_the_order_of_nested_loops(capsys):
    assert planned(capsys, "--lr=1e-3,1e-4", "--act=gelu", "seed=0,1") == [
        ["--lr=1e-3", "--act=gelu", "seed=0"], ["--lr=1e-3", "--act=gelu", "seed=1"],
        ["--lr=1e-4", "--act=gelu", "seed=0"], ["--lr=1e-4", "--act=gelu", "seed=1"]]  # fmt: skip


def test_what_a_page_takes_for_a_list_stays_one_value(capsys):
    assert planned(capsys, "--widths=1,2", "--seed=0,1") == [["--widths=1,2", "--seed=0"],
                                                             ["--widths=1,2", "--seed=1"]]
    assert planned(capsys, "--widths=[1,2],[3]") == [["'--widths=[1,2]'"], ["'--widths=[3]'"]]


def test_the_folder_is_beside_that_of_a_single_run_and_the_same_for_more_values(capsys):
    def folder(*words: str) -> str:
        sweep.main(["train_tiny.py", *words, "--print_config"])
        return capsys.readouterr().out.split()[-1].removeprefix("--out_dir=").rpartition("/")[0]

    assert folder("--lr=1,2").startswith("out/tiny_sweep_")
    assert folder("--lr=1,2") == folder("--lr=1,2,3")
    assert len({folder("--lr=1,2"), folder("--lr=1,2", "--seed=3"), folder("--seed=1,2")}) == 3
    Path("own.py").write_text("out_dir = 'elsewhere'")
    assert folder("own.py", "--lr=1,2").startswith("elsewhere_sweep_")


# ---------------------------------------------------------------------------------------------- Hydra's words


def test_hydra_words_mean_what_they_mean_there(capsys):
    words = ("-m", "learning_rate=choice(0.1,0.2)", "seed=range(2)", "hydra.sweep.dir=there", "hydra.launcher.n_jobs=2")
    sweep.main(["train_tiny.py", *words, "--print_config"])
    out = capsys.readouterr().out.splitlines()
    place = "--out_dir=there/learning_rate=0.1,seed=0"
    assert len(out) == 4 and out[0] == f"python train_tiny.py learning_rate=0.1 seed=0 {place}"
    assert read_sweeper({"hydra.launcher.n_jobs": "2"}).ours == {"jobs": "2"}
    assert read_sweeper({"hydra/launcher": "joblib"}).ours == {"jobs": "-1"}


def test_the_sweeper_of_a_yaml_file_is_read_and_the_command_line_wins(capsys):
    Path("experiment.yaml").write_text(
        "seed: 7\nhydra:\n  sweeper:\n    n_trials: 3\n"
        "    study_name: a\n    sampler:\n      seed: ${seed}\n    params:\n      train.lr: choice(0.1, 0.2, 0.3)\n"
        "      seed: range(1, 2)\n"
    )
    Path("plain.yaml").write_text("seed: 7\n")
    rates = [f"train.lr={lr}" for lr in (0.1, 0.2, 0.3)]
    everything = [[rate, f"seed={seed}"] for rate in rates for seed in (1, 2)]
    runs = planned(capsys, "experiment.yaml")
    assert len(runs) == 3 and [run[:2] for run in runs] == sorted(run[:2] for run in runs)
    assert all(run[2] == "experiment.yaml" and run[:2] in everything for run in runs)
    assert planned(capsys, "experiment.yaml", "seed=5", "hydra.sweeper.n_trials=9") == [
        [rate, "experiment.yaml", "seed=5"] for rate in rates]
    # What only a dialect of the page knows is swept beside other such words.
    own, words, _ = sweep.read_words(train_ghmm, ["hydra.sweeper.params.generative_process=choice(a,b)", "model=gru"])
    assert [word.key for word in words] == ["generative_process", "model"]
    told = hydra_settings({"defaults": [{"override hydra/sweeper": "optuna"}, "_self_"], "hydra.sweeper.n_trials": 3,
                           "hydra.sweeper.sampler.seed": "${seed}", "seed": 7, "hydra.sweeper.storage": None})
    assert told == {"hydra/sweeper": "optuna", "hydra.sweeper.n_trials": "3", "hydra.sweeper.sampler.seed": "7"}


def test_of_more_combinations_than_trials_some_are_drawn_and_more_trials_keep_them(capsys):
    words = ("--lr=0.1,0.2,0.3", "--seed=0,1,2")
    draws = {trials: planned(capsys, *words, f"--trials={trials}") for trials in (2, 4, 9, 20)}
    assert [len(runs) for runs in draws.values()] == [2, 4, 9, 9]
    for fewer, more in ((2, 4), (4, 9)):
        assert all(run in draws[more] for run in draws[fewer])
    assert draws[9] == draws[20] == planned(capsys, *words)
    assert len({str(planned(capsys, *words, "--trials=2", f"--trials_seed={seed}")) for seed in range(6)}) > 1
    sweep.main(["train_tiny.py", *words, "hydra.sweeper.n_trials=4", "--print_config"])
    assert "trials = 4 of 9 combinations" in capsys.readouterr().err
    assert len(planned(capsys, "seed=range(30)", "hydra/sweeper=optuna")) == 20  # hydra-optuna-sweeper's own default


def test_hydra_words_without_effect_are_named(capsys):
    sweep.main(["train_tiny.py", "seed=0,1", "hydra.sweep.subdir=x", "hydra.sweep.dir=${now:%H}", "--print_config"])
    told = capsys.readouterr()
    assert "note: without effect here: hydra.sweep.subdir, hydra.sweep.dir" in told.err
    assert "out/tiny_sweep_" in told.out and "subdir" not in told.out


def test_a_yaml_file_without_sweeper_is_a_constant(capsys):
    Path("plain.yaml").write_text("seed: 7\n")
    assert planned(capsys, "plain.yaml", "lr=0.1,0.2") == [["plain.yaml", "lr=0.1"], ["plain.yaml", "lr=0.2"]]


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lr=0.1,abc"], "lr: expected float, got 'abc'"),
        (["--lrr=0.1,0.2"], "lrr: no such setting, did you mean lr?"),
        (["--lr=0.1,0.2", "--job=2"], "job: no such setting, did you mean jobs?"),
        (["--lr=0.1,0.2", "trial=2"], "trial: no such setting, did you mean trials?"),
        (["--lr=0.1,0.5"], "lr = 0.5 goes with no seed"),
        (["--seed=range(1.5,3)"], "seed: expected int, got '1.5'"),
        (["--lr=0.1,,0.2"], "one of the listed values is empty"),
        (["--lr=choice()"], "one of the listed values is empty"),
        (["--lr=range(3,1)"], "there is no number from 3 up to 1 by steps of 1"),
        (["--lr=range(1,1)"], "there is no number from 1 up to 1"),
        (["--lr=range(a,b)"], "expected range(STOP), range(START, STOP) or range(START, STOP, STEP)"),
        (["--lr=range(1,2,0)"], "expected range(STOP)"),
        (["--lr=range(1,inf)"], "expected range(STOP)"),
        (["--lr=range(0,1,1e-9)"], "more than 10000 values"),
        (["--act=tag(a,choice(b,c))"], "tag() is not read: list values instead"),
        (["lr=sort(1,2)"], "sort() is not read: list values instead"),
        (["--lr=0.1,0.10"], "lr=0.1 would be run twice"),
        (["lr=0.1,0.2", "lr=0.3,0.4"], "lr=0.1,0.2 and lr=0.3,0.4: lr is given twice, leave one out"),
        (["--lr=0.1,0.2", "learning_rate=0.3"], "--lr=0.1,0.2 and learning_rate=0.3: lr is given twice, leave one out"),
        (["--seed=range(1001)"], "the lists make 1001 combinations, more than 1000"),
        ([], "no setting lists values"),
        (["--lr=0.1"], "no setting lists values"),
        (["--lr="], "--lr=: the list is empty: --lr=VALUE,VALUE lists two values"),
        (["--lr=0.1,0.2", "--jobs=0"], "jobs: expected int >= 1 or -1|none, got '0'"),
        (["--lr=0.1,0.2", "hydra.launcher.n_jobs=many"], "jobs: expected int >= 1 or -1|none, got 'many'"),
        (["--lr=0.1,0.2", "hydra/launcher=submitit_slurm"], "sweep.py starts runs on this machine"),
        (["--lr=0.1,0.2", "hydra/sweeper=ax"], "hydra/sweeper=ax"),
        (["--lr=0.1,0.2", "hydra.sweeper.search_space.lr.type=float"], "does not read search spaces"),
        (["--lr=0.1,0.2", "--shard=11/10"], "shard=11/10: expected K/N with K from 1 to N"),
        (["--lr=0.1,0.2", "--shard=0/10"], "of an array that counts from 0 it is --shard=$((SLURM_ARRAY_TASK_ID + 1))"),
        (["--lr=0.1,0.2", "--shard=two"], "shard=two: expected K/N"),
        (["--lr=0.1,0.2", "--launcher=absent --n=2"], "there is no program absent: install it, or give its path"),
        (["--lr=0.1,0.2", "--launcher='a"], "No closing quotation"),
        (["--lr=0.1,0.2", "--gpus=3"], "gpus=3: there are 2 that can be used here: leave it out, or use fewer"),
        (["--lr=0.1,0.2", "--gpus=1", "--launcher=env"], "gpus=1: a launcher starts a run on several"),
        (["--act=range(3)"], "act=range(3): a range is of numbers, and act is a text: list values instead"),
        (["--controls"], "--controls is of the study of train_arxiv.py, which train_tiny.py has not"),
        (["--holdout=each"], "--holdout is of the study of train_state.py"),
        (["--lr=0.1,0.2", "--equal_parameters"], "makes models of train_apelr.py equal in size"),
        (["--lr=0.1,0.2", "--analyze=run"], "analyze=run is no training of one model"),
        (["--lr=0.1,0.2", "--out_dir=s3://bucket/x"], "is a URL"),
        (["--lr=0.1,0.2", "--out_dir=train_tiny.py"], "the folder train_tiny.py cannot be used"),
    ],
)
def test_bad_input_is_one_sentence_before_the_first_run(capsys, monkeypatch, words, sentence):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert sentence in refused(capsys, *words)


def test_what_is_no_page_is_refused(capsys):
    Path("broken.py").write_text("import nothing_of_this_name")
    Path("settings.py").write_text("lr = 1")
    for name, sentence in (("train_tin.py", "or report, not 'train_tin.py', did you mean 'train_tiny.py'?"),
                           ("rport", "did you mean 'report'?"), ("--lr=1,2", "or report, not '--lr=1,2'"),
                           ("broken.py", "cannot be imported (ModuleNotFoundError"), ("settings.py", "is no page")):
        assert sentence in refusal(capsys, sweep.main, name, "--lr=1,2")
    assert str(Path.cwd()) not in sys.path


def test_help_is_of_the_sweep_or_of_the_report(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    told = {}
    for words in ([], ["--help"], ["report", "--help"], ["report", "out/x", "-h"]):
        with pytest.raises(SystemExit) as end:
            sweep.main(words)
        told[" ".join(words)] = capsys.readouterr().out
        assert end.value.code == 0
    assert told[""] == told["--help"] and "usage: python sweep.py PAGE" in told[""] and "--holdout=" in told[""]
    assert told["report --help"] == told["report out/x -h"] and "--lr" not in told["report --help"]
    assert "usage: python sweep.py report FOLDER" in told["report --help"]
    assert max(map(len, "\n".join(told.values()).splitlines())) <= 100


def test_commands_are_shown_to_who_has_seen_enough():
    words = [sys.executable, ROOT / "sweep.py", "train_tiny.py", "--lr=0.1,0.2", "--print_config"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as head does
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


def test_a_page_has_short_names_and_is_shown_as_it_can_be_typed(capsys):
    for name in ("tiny", "train_tiny", "./train_tiny.py", "train_ghmm"):
        script = str(ROOT / "train_ghmm.py") if name == "train_ghmm" else "train_tiny.py"
        sweep.main([name, "--lr=1,2", "--out_dir=o", "--print_config"])
        shown = capsys.readouterr().out.splitlines()
        assert shown == [f"python {script} --lr={lr} --out_dir=o/lr={lr}" for lr in (1, 2)]


# --------------------------------------------------------------------------------------------------------- runs


def test_a_sweep_runs_every_combination_and_shows_the_best_first(capsys, monkeypatch):
    monkeypatch.setattr(sweep, "comparison", COMPARISON)
    # The last of two names of one setting holds, as on a page.
    told = swept("learning_rate=0.3", "--lr=0.2,0.1", "--seed=0,1")
    assert [line["run"] for line in told] == ["lr=0.2,seed=0", "lr=0.2,seed=1", "lr=0.1,seed=0", "lr=0.1,seed=1"]
    assert {line["status"] for line in told} == {"done"} and {line["exit_code"] for line in told} == {0}
    assert told[1]["settings"] == {"lr": "0.2", "seed": "1"}
    assert told[1]["summary"]["own_session"]  # so that Ctrl-C at the terminal does not reach it twice
    assert told[1]["folder"] == "sweep/lr=0.2,seed=1"
    assert "loss" in told[1]["summary"] and "loss_by_position" not in told[1]["summary"]
    assert told[1]["summary"]["excess_loss"] == pytest.approx(0.21)
    out = capsys.readouterr().out
    assert "[4/4] lr=0.1,seed=1: excess_loss 0.11, loss 1.1 | " in out
    [last, verdict, *rows] = out[out.index("[4/4]") :].replace("\n\n", "\n").splitlines()
    assert verdict.startswith("done: Best of 2 by excess_loss (less is better): lr=0.1, 0.1050 ± 0.0071; next lr=0.2, ")
    assert [row.split()[:7] for row in rows[:3]] == [
        ["lr", "seeds", "excess_loss", "loss", "seconds"],
        ["0.1", "2", "0.1050", "±", "0.0071", "1.1", "±"],
        ["0.2", "2", "0.2050", "±", "0.0071", "1.2", "±"]]  # fmt: skip
    assert len(rows) <= 3 + 8 and rows[-1] == "all of it in sweep/report.html"
    assert Path("sweep/report.html").stat().st_size > 10_000


def test_the_same_command_again_runs_nothing_and_more_values_run_what_is_new(capsys):
    swept("--lr=0.1,0.2")
    again = swept("--lr=0.1,0.2")
    assert starts("lr=0.1") == starts("lr=0.2") == [0]
    assert [line["summary"]["loss"] for line in again] == [1.1, 1.2] and again[0]["seconds"] < 2
    assert "2 runs of train_tiny.py in sweep, 2 ended before" in capsys.readouterr().out
    assert [line["run"] for line in swept("--lr=0.1,0.2,0.3")] == ["lr=0.1", "lr=0.2", "lr=0.3"]
    assert starts("lr=0.1") == starts("lr=0.3") == [0]


def test_a_failing_run_is_recorded_and_passed_over_and_tried_again(capsys, monkeypatch):
    monkeypatch.setattr(sweep, "comparison", lambda runs, folder, wanted: ["One run: excess_loss 0.11.", "all of it"])
    told = swept("--lr=7,0.1", code=1)
    assert [(line["run"], line["status"], line["exit_code"]) for line in told] == [
        ("lr=7", "failed", 1), ("lr=0.1", "done", 0)]
    assert told[0]["last_lines"] == ["a first line", "error: the loss is not finite"] and "summary" not in told[0]
    out = capsys.readouterr().out
    assert "lr=7: failed (exit code 1): error: the loss is not finite" in out.splitlines()
    assert "\ndone, but 1 of 2 runs failed: One run: excess_loss 0.11.\n" in out
    swept("--lr=7,0.1", code=1)
    assert starts("lr=7") == [0, 0] and starts("lr=0.1") == [0]


@pytest.mark.parametrize("word", ["--jobs=2", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2"])
def test_two_runs_at_a_time_are_two_and_share_the_cores(word, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = str(max(1, os.cpu_count() // 2))
    # Each ends only when the other has begun; one at a time, the first would wait for ever.
    told = swept("--seed=0,1", "--meets=seed1", word)
    assert [(line["status"], line["summary"]["OMP_NUM_THREADS"]) for line in told] == [("done", threads)] * 2


def test_other_settings_are_not_mixed_into_a_sweep(capsys):
    swept("--lr=0.1,0.2")
    told = refusal(capsys, sweep.main, "train_tiny.py", "--lr=0.1,0.2", "--max_steps=2", "--out_dir=sweep")
    assert "sweep/lr=0.1 holds another run (max_steps: 1 -> 2)" in told and "--resume=never" in told
    assert starts("lr=0.1") == [0]
    # They are trained anew where that is asked for, and once.
    for _ in range(2):
        swept("--lr=0.1,0.2", "--max_steps=2", "--resume=never")
    assert starts("lr=0.1") == [0, 0]
    # So is what an edited page made.
    Path("train_tiny.py").write_text(PAGE + "\n# edited\n")
    told = refusal(capsys, sweep.main, "train_tiny.py", "--lr=0.1,0.2", "--max_steps=2", "--out_dir=sweep")
    assert "train_tiny.py: edited since" in told
    swept("--lr=0.1,0.2", "--max_steps=2", "--resume=never")
    assert starts("lr=0.1") == [0, 0, 0]


def test_a_damaged_folder_is_refused_and_a_removed_one_run_again(capsys):
    swept("--lr=0.1,0.2")
    whole = {}
    for name, text in (("summary.json", '{"loss": 1'), ("summary.json", "[1]"), ("config.json", "{"),
                       ("config.json", "[1]")):  # fmt: skip
        path = Path("sweep/lr=0.1", name)
        whole.setdefault(path, path.read_text())
        path.write_text(text)
        told = refusal(capsys, sweep.main, "train_tiny.py", "--lr=0.1,0.2", "--out_dir=sweep")
        assert "sweep/lr=0.1 holds no whole run of train_tiny.py" in told and told.endswith("): remove it")
        path.write_text(whole[path])
    Path("sweep/lr=0.1/train_tiny.py").unlink()
    os.mkfifo("sweep/lr=0.1/train_tiny.py")
    told = refusal(capsys, sweep.main, "train_tiny.py", "--lr=0.1,0.2", "--out_dir=sweep")
    assert "sweep/lr=0.1 holds another run (train_tiny.py: edited since)" in told
    for path in Path("sweep/lr=0.1").iterdir():
        path.unlink()
    Path("sweep/lr=0.1").rmdir()
    assert {line["status"] for line in swept("--lr=0.1,0.2")} == {"done"}


def test_what_cannot_be_written_is_one_sentence(capsys):
    Path("sweep").mkdir()
    Path("sweep/lr=0.2").touch()
    told = refusal(capsys, sweep.main, "train_tiny.py", "--lr=0.1,0.2", "--out_dir=sweep", code=1)
    assert "sweep/lr=0.2: file exists: move what is in the way" in told and "The same command goes on" in told
    Path("sweep/lr=0.2").unlink()
    assert [line["status"] for line in swept("--lr=0.1,0.2")] == ["done", "done"] and starts("lr=0.1") == [0]


@pytest.mark.parametrize("name", ["sweep.jsonl", "lr=0.1/console.log", "lr=0.1/run.lock", "lr=0.1/job.lock"])
def test_a_pipe_with_the_name_of_a_file_is_refused(name, capsys):
    Path("sweep/lr=0.1").mkdir(parents=True)
    os.mkfifo(f"sweep/{name}")  # to open it is to wait for whoever has its other end
    told = refusal(capsys, sweep.main, "train_tiny.py", "--lr=0.1,0.2", "--out_dir=sweep")
    assert told.endswith(f"sweep/{name} is no file, where a file may be written: move it, or use another out_dir")


LONG = ("train_tiny.py", "--lr=0.1", "--seed=0,1,2", "--max_steps=30", "--out_dir=sweep")


def test_a_killed_sweep_goes_on_and_no_run_is_started_twice(capsys):
    job = Job("commands", *LONG, function="sweep_quickly", PYTHONPATH=str(ROOT))
    wait_for(lambda: len(starts("seed=1")) > 0, job, "the second run")
    job.kill()
    job.process.join()
    # The run at work was not killed: the sweep that goes on waits for its end, and takes it as it is.
    assert not Path("sweep/seed=1/summary.json").exists()
    sweep.main(list(LONG))
    assert "at work here: waiting for its end" in capsys.readouterr().out
    assert [line["status"] for line in lines()] == ["done"] * 3
    assert [starts(f"seed={seed}") for seed in range(3)] == [[0]] * 3


def test_two_sweeps_at_once_share_the_runs(capsys):
    words = ("train_tiny.py", "--seed=0,1,2,3", "--max_steps=20", "--out_dir=sweep")
    job = Job("commands", *words, function="sweep_quickly", PYTHONPATH=str(ROOT))
    wait_for(lambda: len(starts("seed=0")) > 0, job, "the first run")
    sweep.main(list(words))
    assert job.wait() == 0
    assert [starts(f"seed={seed}") for seed in range(4)] == [[0]] * 4
    for out in (capsys.readouterr().out, job.console.read_text()):
        assert "by excess_loss" in out and "4/4" in out


def test_shards_share_the_runs_and_the_last_one_shows_all(capsys):
    words = ("--lr=0.3,0.2,0.1", "--max_steps=2")
    swept(*words, "--shard=2/2")
    out = capsys.readouterr().out
    assert starts("lr=0.2") == [0] and starts("lr=0.1") == []
    assert "3 runs of train_tiny.py in sweep, 1 of them in shard 2/2" in out and "[1/1] lr=0.2" in out
    assert "2 runs of other shards not ended yet" in out
    told = swept(*words, "--shard=1/2")
    assert [line["run"] for line in told] == ["lr=0.2", "lr=0.3", "lr=0.1"]
    rows = capsys.readouterr().out.split("is better:\n")[1].splitlines()[1:4]
    assert [row.split()[0] for row in rows] == ["0.1", "0.2", "0.3"]


def test_each_run_has_a_gpu_and_a_launcher_none(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    # Two runs at a time, one on each: the first waits for the second.
    told = swept("--seed=0,1,2", "--meets=seed1")
    assert {line["summary"]["CUDA_VISIBLE_DEVICES"] for line in told[:2]} == {"5", "7"}
    told = swept("--seed=0,1", "--gpus=1", "--resume=never", "--lr=0.2")
    assert [line["summary"]["CUDA_VISIBLE_DEVICES"] for line in told if "0.2" in line["folder"]] == []
    assert [line["summary"]["CUDA_VISIBLE_DEVICES"] for line in told if line["run"] != "seed=2"] == ["5", "5"]
    told = swept("--seed=3,4", f"--launcher=env LAUNCHED=yes {sys.executable}")
    assert [(line["summary"]["LAUNCHED"], line["summary"]["CUDA_VISIBLE_DEVICES"]) for line in told[-2:]] == [
        ("yes", "5,7")] * 2  # fmt: skip


def test_what_another_shard_has_come_to_since_is_told():
    source = plan("--lr=0.1,0.2", "--shard=1/2").open()
    source.told["lr=0.1"] = {"status": "failed", "run": "lr=0.1"}
    other = record(Path("sweep/lr=0.2"), {}, "stopped", 0, 1.0)
    append(source.book, other)
    assert not source.is_whole() and len(source.elsewhere()) == 1
    append(source.book, other | {"status": "failed"})
    assert source.is_whole() and [line["status"] for line in source.lines()] == ["failed"] * 2


def test_runs_on_the_cpu_need_no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for device, expected in (("cpu", (1, [])), ("auto", (2, ["0", "1"]))):
        source = SimpleNamespace(known=[SimpleNamespace(device=device)])
        assert sweep.processes(sweep.Config(), source, Path("x.py"))[1:] == expected


def test_a_program_of_the_environment_launches_also_where_that_is_not_activated(monkeypatch):
    python = Path(sys.executable)
    monkeypatch.setenv("PATH", "")
    assert jobs.launch(f"{python.name} -X 'a b'") == [str(python.parent / python.name), "-X", "a b"]
    assert jobs.launch(" ") == [sys.executable]


def test_gpus_are_shared_evenly(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,-1,4")
    assert jobs.devices(None, None, "") == (2, ["0", "3"])
    assert jobs.devices(5, None, "") == (5, ["0", "3"]) and jobs.devices(-1, None, "") == (2, ["0", "3"])
    assert jobs.devices(None, 1, "") == (1, ["0"])
    assert jobs.devices(None, 0, "") == jobs.devices(None, None, "torchrun") == (1, [])
    working = [SimpleNamespace(gpu="0"), SimpleNamespace(gpu="3"), SimpleNamespace(gpu="0")]
    assert jobs.least_used(["0", "3"], working) == "3" and jobs.least_used([], working) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert jobs.devices(None, None, "") == (1, []) and jobs.devices(-1, None, "")[0] == os.cpu_count()


def test_lines_of_sweep_jsonl_are_mended(capsys):
    swept("--lr=0.1,0.2")
    file = Path("sweep/sweep.jsonl")
    before = lines()
    file.unlink()
    assert [line["summary"] for line in swept("--lr=0.1,0.2")] == [line["summary"] for line in before]
    # One that was torn by a full disk, and one that another machine's clock wrote.
    odd = '{"run": "lr=0.1", "sta\n[1]\n7\n{"run": "lr=0.1", "status": "failed"}\n'
    odd += json.dumps(before[0] | {"time": "noon"}) + "\n"
    file.write_text(file.read_text() + odd + json.dumps(before[1] | {"time": 4e9}) + "\n")
    capsys.readouterr()
    sweep.main(["train_tiny.py", "--lr=0.1,0.2", "--out_dir=sweep"])
    told = capsys.readouterr()
    assert "2 ended before" in told.out and told.err.count("the clocks of two machines differ") == 1
    shutil.rmtree("sweep/lr=0.1")
    sweep.main(["train_tiny.py", "--lr=0.1,0.2", "--out_dir=sweep"])
    assert "sweep/lr=0.1: a run has ended here, and its results are gone: it is run again" in capsys.readouterr().out
    assert starts("lr=0.1") == starts("lr=0.2") == [0]


def test_lines_of_several_processes_are_whole():
    writers = [Job("test_sweep", str(number), function="write_lines", PYTHONPATH=os.pathsep.join(sys.path))
               for number in range(3)]
    assert [job.wait() for job in writers] == [0, 0, 0]
    told = [json.loads(line) for line in Path("lines.jsonl").read_text().splitlines()]
    assert sorted((line["writer"], line["line"]) for line in told) == [
        (str(writer), line) for writer in range(3) for line in range(50)]  # fmt: skip


def write_lines(argv: list[str]) -> None:
    for number in range(50):
        append(Path("lines.jsonl"), {"writer": argv[0], "line": number, "long": "x" * 10_000})


def plan(*words: str, name: str = "train_tiny.py") -> Grid:
    """The runs that a command line plans."""
    page, script = import_page(name)
    cfg, own, sweeper = sweep.read_words(page, [*words, "--out_dir=sweep"])
    return plan_runs(page, script, own, sweeper, cfg)


def run_all(source: Grid, came: list[int]) -> Iterator[tuple]:
    return jobs.run_all(source, [sys.executable, source.script], 1, [], came, [])


def test_a_hopeless_run_is_stopped_and_recorded():
    source = plan("--lr=0.9,0.1", "--max_steps=60").open()
    runs, seen = source.runs, []

    def hopeless(run, records):
        seen.append([record["step"] for record in records])
        return records[-1]["loss"] > 0.5

    source.hopeless = hopeless
    found = [(run.name, status) for run, status, _ in run_all(source, []) if status]
    assert found == [("lr=0.9", "pruned"), ("lr=0.1", "done")]
    assert all(steps == list(range(1, len(steps) + 1)) for steps in seen)
    told = record(runs[0].folder, runs[0].values, "pruned", 0, 1.0)
    assert "stopped after" in told["last_lines"][-1] and "no hope" in in_words(told, ["loss"])
    assert not Path("sweep/lr=0.9/summary.json").exists()


@pytest.mark.parametrize(("grace", "signals"), [(0.2, 1), (120, 3)])
def test_a_run_that_takes_no_notice_of_signals_is_killed_with_what_it_started(monkeypatch, grace, signals):
    monkeypatch.setattr(jobs, "GRACE_SECONDS", grace)
    source = plan("--seed=0,1", "--max_steps=10000", "--deaf").open()
    runs, came = source.runs, []
    for run, status, job in run_all(source, came):
        if not came and (runs[0].folder / "child").exists():
            child = (runs[0].folder / "child").read_text()
            came += [signal.SIGINT] * signals
        if status:
            assert (run, status, job.process.poll()) == (runs[0], "stopped", -signal.SIGKILL)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split():
        assert time.monotonic() < deadline
    assert jobs.is_free(runs[0].folder) and not runs[1].folder.exists()


def test_records_are_read_as_they_grow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = jobs.Records(path)
    assert not records.grown()
    path.write_text('{"split": "eval", "step": 1}\n{"split": "eval", "st')
    first = [{"split": "eval", "step": 1}]
    assert records.grown() and records.records == first and not records.grown()
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert records.grown() and records.last_step() == 2
    with open(path, "ab") as file:  # what damage makes of a line is no record: who looks at it counts with numbers
        file.write(b'[3]\n{"split": "eval", "step": "3"}\n{"split": "eval", "step": 3, "loss": {}}\n\xff\n')
        file.write(b'{"step": 1e99}\n' + b"[" * 100_000 + b'\n{"split": "eval", "step": true}\n')
    assert not records.grown() and records.last_step() == 2
    # A run that goes on writes the file anew, without what its checkpoint does not have.
    (tmp_path / "new").write_text('{"split": "eval", "step": 1}\n')
    (tmp_path / "new").rename(path)
    assert records.grown() and records.records == first


class Simulated:
    """A run by a clock: it gets ready, takes its steps with a record of every tenth, and ends."""

    def __init__(self, name: str, steps: int, began: float, ready: float, pace: float, ending: float):
        self.run = SimpleNamespace(name=name, cfg=SimpleNamespace(max_steps=steps), folder=Path("none"))
        self.steps, self.began, self.ready, self.pace = steps, began, ready, pace
        self.seconds, self.first_step, self.total = ready + steps * pace + ending, 0, None

    def at(self, now: float) -> "Simulated":
        done = min(self.steps, int(max(0.0, now - self.began - self.ready) / self.pace))
        self.records = SimpleNamespace(records=[{"step": step, "time_s": step * self.pace, "loss": 0.5}
                                                for step in range(10, done + 1, 10)])  # fmt: skip
        return self


@pytest.mark.parametrize("known", [True, False])
def test_time_left_is_near_what_it_comes_to(monkeypatch, known):
    """Two at a time of eight runs, every second one of half the length, which take longer to get ready than to step."""
    lengths = {f"run{i}": 100 if i % 2 else 200 for i in range(8)}
    source = SimpleNamespace(total=8, count_ended=lambda: 0, steps=lambda: dict(lengths) if known else {})
    shown = progress.Progress(source, at_a_time=2)
    waiting, working, now, told = deque(lengths.items()), [], 1000.0, []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    while waiting or working:
        while waiting and len(working) < 2:
            working.append(Simulated(*waiting.popleft(), now, ready=20, pace=0.1, ending=10))
        for _ in range(4):
            now += 0.25 * min(job.began + job.seconds - now for job in working)
            shown.show([job.at(now) for job in working])
            told.append((now, shown.left()))
        now = min(job.began + job.seconds for job in working)
        for job in [job.at(now) for job in working if job.began + job.seconds <= now]:
            working.remove(job)
            shown.show(working)
            shown.end(job.run.name, "", job, shown.ended + 1, True)
            told.append((now, shown.left()))
    first = next(left for _, left in told if left is not None)
    assert told[0][1] is None and first > 0.4 * (now - 1000)  # the end of a run is not known before one has ended
    # Where another process ends as many, half of what waits is left to it.
    shown.total, shown.steps = 18, {}
    alone = shown.left()
    shown.ended = 16
    assert alone == pytest.approx(10 * 45 / 2)
    shown.total = 26
    assert shown.left() == pytest.approx(alone / 2)
    ended = [(now - then, left) for then, left in told if left is not None and then > 1050]
    for comes_to, left in ended:
        assert abs(left - comes_to) < (8 if known else 20), (comes_to, left)
    assert len(ended) > 20 and ended[-1] == (0, 0)


def test_where_nobody_watches_a_run_at_work_is_told_of_ever_more_rarely(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    source = SimpleNamespace(total=2, count_ended=lambda: 0, steps=lambda: {"a": 1000, "b": 1000})
    shown = progress.Progress(source, at_a_time=1)
    run, times = Simulated("a", 1000, now, ready=6, pace=0.1, ending=0), []
    for _ in range(200):
        now += 1
        shown.show([run.at(now)])
        times += [now - 1000] * bool(lines := capsys.readouterr().out.splitlines())
        if len(times) <= 2 and lines:
            assert lines == [["[0/2] a: getting ready"], ["[0/2] a: step 40 of 1,000 | 03:22 left"]][len(times) - 1]
    assert times[:9] == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    waits = [later - time for time, later in pairwise(times)]
    assert all(wait <= max(5, time / 9 + 1) for time, wait in zip(times, waits, strict=False)) and waits[-1] > 15


def test_what_a_run_takes_is_by_its_steps_and_what_it_takes_beside():
    def far(steps: int, seconds: float, pace: float | None) -> progress.HowFar:
        return progress.HowFar(steps, steps, steps, pace, seconds)

    assert progress.expected([far(200, 50, 0.1), far(100, 40, 0.1)], 400) == pytest.approx(70)
    assert progress.expected([far(200, 50, 0.1), far(100, 40, 0.1)], None) == 45
    assert progress.expected([far(200, 50, None)], 100) == 50  # too short a run to tell
    # Of 400 steps from step 100 on, 50 of them done here in 20 s: its share of 80 s, or its own pace.
    here = progress.HowFar(150, 50, 400, 0.1, 20)
    assert progress.rest(here, 80) == 40 and progress.rest(here, 10) == pytest.approx(25)
    assert progress.rest(here._replace(total=None), 80) == 60
    records = [{"step": 50, "time_s": 99}, {"step": 110, "time_s": 31}, {"step": 120}, {"step": 130, "time_s": 33}]
    assert progress.pace(records, 100) == 0.1 and progress.pace(records[:2], 100) is None
    # The last to end has no other beside it, which halves nothing.
    source = SimpleNamespace(total=2, count_ended=lambda: 1, steps=lambda: {})
    shown = progress.Progress(source, at_a_time=2)
    shown.costs = [far(100, 200, None)]
    shown.jobs = [Simulated("a", 100, progress.time.perf_counter(), 0, 1, 0).at(0)]
    assert shown.left() == pytest.approx(200, abs=5)
    Path("train.log").write_text("step     10/1200 | loss 1\nstep     20/1200 | loss 1\n")
    assert progress.total_steps(Path("train.log")) == 1200 and progress.total_steps(Path("absent")) is None


def test_a_signal_lets_the_runs_save_and_the_same_command_goes_on():
    job = Job("commands", *LONG, function="sweep_quickly", PYTHONPATH=str(ROOT))
    wait_for(lambda: Path("sweep/seed=0/last.pt").exists(), job, "the first run")
    job.send_signal(signal.SIGINT)
    assert job.wait() == 128 + signal.SIGINT
    assert "stopped after" in Path("sweep/seed=0/console.log").read_text()
    assert [(line["run"], line["status"]) for line in lines()] == [("seed=0", "stopped")]
    assert "error: stopped by a signal with 0 of 3 ended; the same command goes on" in job.console.read_text()
    saved = json.loads(Path("sweep/seed=0/last.pt").read_text())
    sweep.main(list(LONG))
    assert starts("seed=0") == [0, saved] and [line["status"] for line in lines()] == ["done"] * 3


# -------------------------------------------------------------------------------------------------- studies


def test_the_runs_of_a_study_are_multiplied_by_the_lists(monkeypatch, capsys):
    asked = []

    def plan(page, cfg, words):
        asked.append((cfg.lr, cfg.seed, words.study, words.orders, words.controls))
        return [Variation("K1_a", {"act": "gelu"}, {"K": "1"}), Variation("K2_a_b", {"widths": "1,2"}, {"K": "2"})]

    monkeypatch.setattr(study_arxiv, "plan", plan, raising=False)
    page = PAGE.replace('"ghmm"', '"arxiv"').replace('"lr"}', '"lr", "random_seed": "seed"}')
    Path("train_tiny.py").write_text(page)
    words = ("--lr=0.2", "--study=all", "--orders", "2", "--controls", "--act=relu")
    names = []
    for listed in ([], ["--study_seeds=[3,4]"], ["--max_steps=1,2", "random_seed=3,4"]):
        sweep.main(["train_tiny.py", *words, *listed, "--print_config"])
        commands = capsys.readouterr().out.splitlines()
        names.append([command.rpartition("/")[2] for command in commands])
        # What a variation says holds, whatever was typed; its folder is in that of a single run, as it always was.
        first = commands[0].split()
        assert first.index("--act=relu") < first.index("--act=gelu") and "--out_dir=out/tiny/K1_a_seed" in commands[0]
    assert asked == [(0.2, 0, "all", 2, True)] * 3
    assert names[0] == ["K1_a_seed0", "K2_a_b_seed0"]
    assert names[1] == ["K1_a_seed3", "K2_a_b_seed3", "K1_a_seed4", "K2_a_b_seed4"]
    assert names[2][:3] == ["K1_a_seed3,max_steps=1", "K2_a_b_seed3,max_steps=1", "K1_a_seed4,max_steps=1"]
    told = swept(*words, "--study_seeds=3,4")
    assert told[1]["settings"] == {"K": "2", "seed": "3"} and told[1]["run"] == "K2_a_b_seed3"


def test_a_finished_run_of_other_data_is_no_run_of_the_study(monkeypatch, capsys):
    """The settings of two runs may name the same data, and find others there."""
    page = PAGE.replace('"ghmm"', '"arxiv"').replace('"loss_by_position": [1]}', '"data": {"data/x": "old"}}')
    Path("train_tiny.py").write_text(page)
    for content, goes_on in (("old", True), (None, True), ("new", False)):
        data = content and {"data/x": content}
        runs = [Variation("K1_a", {}, {"K": "1"}, data), Variation("K2_a_b", {"lr": "0.2"}, {"K": "2"}, data)]
        monkeypatch.setattr(study_arxiv, "plan", lambda *_, runs=runs: runs, raising=False)
        if goes_on:
            swept("--study=all")
        else:
            told = refusal(capsys, sweep.main, "train_tiny.py", "--study=all", "--out_dir=sweep")
            assert "K1_a_seed0 holds another run (other data lie in data/x now)" in told
    assert starts("K1_a_seed0") == [0]


def test_a_study_stops_nothing_early_unless_it_was_typed(monkeypatch, capsys):
    monkeypatch.setattr(study_arxiv, "plan", lambda *_: [Variation("K1_a", {}, {"K": "1"})], raising=False)
    page = PAGE.replace('"ghmm"', '"arxiv"').replace("    seed: int", "    patience: int = 10\n    seed: int")
    Path("train_tiny.py").write_text(page)
    Path("own.py").write_text("patience = 3")
    for words, ours in (([], True), (["--patience=3"], False), (["own.py"], False)):
        sweep.main(["train_tiny.py", *words, "--study=all", "--print_config"])
        assert ("--patience=0" in capsys.readouterr().out) == ours


def test_models_of_one_size_have_their_width_in_the_table_alone(monkeypatch):
    def resize(page, reference, cfgs):
        assert reference.max_steps == 1
        return [{"widths": f"[{cfg.max_steps}]"} for cfg in cfgs]

    monkeypatch.setattr(equal_size, "resize", resize)
    told = swept("--max_steps=2,3", "--equal_parameters")
    assert [(line["run"], line["settings"]) for line in told] == [
        (f"max_steps={n}", {"max_steps": f"{n}", "widths": f"[{n}]"}) for n in (2, 3)]  # fmt: skip
    assert json.loads(Path("sweep/max_steps=3/config.json").read_text())["widths"] == [3]


def test_held_out_types_have_one_table(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "comparison", COMPARISON)
    Path("train_tiny.py").write_text(PAGE.replace('"ghmm"', '"state"'))
    monkeypatch.setattr(holdouts, "plan", lambda *_: [Variation("a", {}, {"held_out": "a"}),
                                                      Variation("b", {"lr": "7"}, {"held_out": "b"})])  # fmt: skip
    for answer, tables in ((["its table"], 0), (None, 1)):

        def compare(runs, folder, wanted, answer=answer):
            assert [run.name for run in runs] == ["a_seed0"]
            if answer is None:
                raise ValueError("a failure never hides the table")
            return answer

        monkeypatch.setattr(comparison, "compare", compare)
        swept("--holdout=each", code=1)
        out = capsys.readouterr().out
        assert out.count("held_out") == tables and "b_seed0: failed (exit code 1): error: the loss" in out


# -------------------------------------------------------------------------------------------------- the table


def test_an_objective_that_no_summary_has_is_told(capsys):
    swept("--lr=0.1,0.2", "--objective=los")
    assert "note: los is no number in summary.json, did you mean 'loss'?" in capsys.readouterr().err
    swept("--lr=0.1,0.2", "--objective=-loss")
    out = capsys.readouterr().out
    assert "by loss, of which more is better:" in out and out.index("sweep/lr=0.2") < out.index("sweep/lr=0.1")


def test_the_error_of_a_run_is_told_whatever_a_launcher_says_after_it():
    Path("console.log").write_text("\n".join(["error: first", "error: no such file", *"abcdef"]))
    told = record(Path("."), {}, "failed", 1, 1.0)
    assert told["last_lines"] == [*"bcdef", "error: no such file"]
    assert in_words(told, []) == "failed (exit code 1): error: no such file"
    ranks = ["[rank1]: Traceback (most recent call last):", "[rank1]:    main()", "[rank1]: MemoryError: too much"]
    Path("console.log").write_text("\n".join([*ranks, "ChildFailedError:", *"=====", "Root Cause", "====="]))
    assert in_words(record(Path("."), {}, "failed", 1, 1.0), []) == "failed (exit code 1): MemoryError: too much"


def test_what_runs_are_compared_by():
    assert objective("state") == (OBJECTIVES["state"][0], False) and objective("another") == ([], True)
    assert objective("state", "mae") == (["mae", "pearson_delta", *OBJECTIVES["state"][0][2:]], True)
    assert objective("state", "pearson_delta") == objective("state")
    assert objective("ghmm", "-r2_concat")[0][0] == "r2_concat" and objective("ghmm", "-r2_concat")[1] is False
    assert objective("ghmm", "max:loss")[1] is False and objective("ghmm", "min:baselines.a.b")[0][0] == "baselines.a.b"


def test_seeds_are_averaged_and_nothing_else_is():
    def line(lr: str, seed: int, **summary) -> dict:
        return {"run": f"{lr},{seed}", "status": "done", "folder": f"f{lr}{seed}", "seconds": 1.0,
                "settings": {"lr": lr, "seed": str(seed)}, "summary": summary}  # fmt: skip

    told = [line("1", 0, loss=1.0, plan_gain=None), line("1", 1, loss=2.0), line("1", 2, loss=4.5, plan_gain=7.0),
            line("2", 0, loss=2.0), line("3", 0, loss=float("nan"))]  # fmt: skip
    ranked = groups(told, ["loss"], less_is_better=True)
    assert [group.settings for group in ranked] == [{"lr": "2"}, {"lr": "1"}, {"lr": "3"}]
    assert ranked[1].mean("loss") == 2.5
    rows = table(told, ["loss", "plan_gain", "nothing"], less_is_better=True)
    assert [row.split() for row in rows] == [
        ["lr", "seeds", "loss", "plan_gain", "seconds", "folder"], ["2", "1", "2", "1", "f20"],
        ["1", "3", "2.5", "±", "1.8", "7", "(1", "of", "3)", "1"], ["3", "1", "1", "f30"]]  # fmt: skip


def test_numbers_of_a_summary():
    summary = {"loss": 1.5, "excess_loss": 0.5, "optimal_loss": 1.0, "curve": [1], "baselines": {"a": {"mae": 2}}}
    flat = {"loss": 1.5, "excess_loss": 0.5, "optimal_loss": 1.0, "baselines.a.mae": 2, "excess_percent": 50}
    assert numbers(summary) == flat
    assert "excess_percent" not in numbers({"excess_loss": 0.1, "optimal_loss": 0.0})


def test_what_has_no_number_is_last_in_the_table():
    told = [{"run": f"a={i}", "status": "done", "folder": f"f{i}", "seconds": None, "settings": {"a": str(i)},
             "summary": {"pearson_delta": value}} for i, value in enumerate([None, 0.1, 0.9])]
    rows = [line.split() for line in table(told, ["pearson_delta"], less_is_better=False)]
    assert rows == [["a", "pearson_delta", "folder"], ["2", "0.9", "f2"], ["1", "0.1", "f1"], ["0", "f0"]]


@pytest.mark.parametrize(
    ("name", "optima", "apart"),
    [("categories", (0, 0), "categories"), ("lr", (1, 2), "optimal_loss"), ("lr", (2, 2.001), "")],
)
def test_what_learns_different_things_is_not_ranked(name, optima, apart):
    told = [{"run": f"{i}", "status": "done", "folder": f"f{i}", "seconds": 1, "settings": {name: str(i)},
             "summary": {"loss": 3 - i, "optimal_loss": optima[i]}} for i in (0, 1)]
    (head, _, *rows), _ = sorted_table(told, ["loss"], less_is_better=True)
    order = f"of different {apart}, none the best" if apart else "by loss, of which less is better"
    assert head == f"\n{order}:" and [row[0] for row in rows] == (["0", "1"] if apart else ["1", "0"])


def test_a_run_that_was_killed_says_by_what():
    told = {"run": "a=0", "status": "failed", "exit_code": -9, "settings": {"a": "0"}, "last_lines": []}
    assert in_words(told, ["loss"]) == "failed (killed by signal 9): it said nothing"
    assert table([told], ["loss"], less_is_better=True) == ["a=0: failed (killed by signal 9): it said nothing"]


# -------------------------------------------------------------------------------------------------- real pages


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_page_can_be_swept(script, capsys):
    assert planned(capsys, "--seed=0,1", page=f"{script}.py") == [["--seed=0"], ["--seed=1"]]
    assert OBJECTIVES.keys() >= {sys.modules[script].EXPERIMENT}
    assert "lr: expected float >= 0, got 'much'" in refusal(capsys, sweep.main, f"{script}.py", "--lr=1e-3,much")


def test_lists_of_real_pages(capsys):
    assert planned(capsys, "--decoder_hidden_dims=[8],[8,16]", page="train_state.py") == [
        ["'--decoder_hidden_dims=[8]'"], ["'--decoder_hidden_dims=[8,16]'"]]
    assert planned(capsys, "--categories=cs.DS,cs.PL", "--seed=0,1", page="train_arxiv.py") == [
        ["--categories=cs.DS,cs.PL", "--seed=0"], ["--categories=cs.DS,cs.PL", "--seed=1"]]
    assert planned(capsys, "process=mess3,rrxor", page="train_ghmm.py") == [["process=mess3"], ["process=rrxor"]]


def test_what_a_real_page_saves_is_what_its_run_was_planned_with(capsys, monkeypatch):
    words = ("seed=choice(0)", "n_layers=1", "d_model=8", "d_mlp=8", "n_ctx=4", "num_steps=1", "batch_size=4",
             "eval_sequences=16", "device=cpu", "hydra.sweep.dir=sweep", "--no-tensorboard")  # fmt: skip
    page, _ = import_page("train_ghmm.py")
    monkeypatch.setattr(page, "plot_run", lambda *args, **options: None)
    page.main(plan(*words, name="train_ghmm.py").runs[0].words)
    sweep.main(["train_ghmm.py", *words])
    out = capsys.readouterr().out
    assert "1 run of train_ghmm.py in sweep, 1 ended before" in out
    assert lines()[0]["summary"]["steps"] == 1 and lines()[0]["summary"]["excess_loss"] > 0


def test_a_page_hands_over_what_hydra_calls_a_multirun():
    done = python("train_tiny.py", "seed=0,1", "-m", "hydra.sweep.dir=sweep", "--print-config", folder=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert [line.split()[-2:] for line in done.stdout.splitlines()] == [
        ["seed=0", "--out_dir=sweep/seed=0"], ["seed=1", "--out_dir=sweep/seed=1"]]  # fmt: skip


def test_a_process_of_the_source_is_swept_by_its_own_words(capsys):
    words = ("-m", "training_data_generator=mess3,rrxor", "seed=0,1")
    sweep.main(["train_ghmm.py", *words, "--print_config"])
    told = capsys.readouterr()
    assert told.err.count("read as Simplexity") == 1
    names = [line.rpartition("/")[2] for line in told.out.splitlines()]
    assert names == [f"training_data_generator={name},seed={seed}" for name in ("mess3", "rrxor") for seed in (0, 1)]
    Path("mine.yaml").write_text(
        "defaults:\n  - _self_\n  - generative_process: mess3\n  - override hydra/sweeper: optuna\nseed: 3\n"
        "hydra:\n  sweeper:\n    n_trials: 2\n    sampler:\n      seed: ${seed}\n    params:\n"
        "      train.batch_size: choice(16, 32, 64)\n  run:\n    dir: x/${hydra.job.num}\n"
    )
    runs = planned(capsys, "mine.yaml", page="train_ghmm.py")
    assert len(runs) == 2 and {run[0] for run in runs} < {f"train.batch_size={size}" for size in (16, 32, 64)}
    interval = "hydra:\n  sweeper:\n    params:\n      train.lr: tag(log, interval(1e-4, 1e-1))\n"
    Path("interval.yaml").write_text(interval)
    assert "is searched: say for how many runs" in refusal(capsys, sweep.main, "train_ghmm.py", "interval.yaml")
