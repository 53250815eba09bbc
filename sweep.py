"""Train a page once for every combination of listed settings, each run in a folder of its own, and compare the results.

    python sweep.py train_ghmm.py config/ghmm_mess3.py --lr=1e-3,1e-4 --seed=0,1,2 --jobs=2    # 6 runs, 2 at a time
    python sweep.py train_state.py --decoder_hidden_dims='[1024],[512,512]'   # two values of a setting that is a list
    python sweep.py train_arxiv.py --study=nested:1,2,4 --seed=0,1            # the runs of a study
    python sweep.py train_ghmm.py --lr=1e-3,1e-4 --print_config               # the commands that it would run, and stop
    python sweep.py report out/ghmm_sweep_1a2b3c                              # compare runs that there are
    python train_ghmm.py -m lr=1e-3,1e-4 'seed=range(3)' hydra.sweep.dir=out/lr    # the same in Hydra's words

A value with commas lists values, except of a setting that is a list itself; brackets and quotes keep commas together.
Every combination is checked before the first run. The folder of the sweep has a folder for each run, named by what
differs (lr=0.001,seed=0; what the run prints is in its console.log), and sweep.jsonl, a line for each run that ended.
The same command again goes on: what has ended is not run again, what was interrupted goes on from its checkpoint, what
failed is tried again. Several such commands at once share the runs. Ctrl-C lets the runs at work save; a second one
does not wait for that. Exit code 1 if a run failed.
"""

import contextlib
import os
import re
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_type_hints

from tqdm import tqdm

from common.errors import InputError, clear_errors, leave
from common.jobs import run_all, signals
from configurator import Count, Range, Settings, Whole, configure, note
from measure.sweeps import OBJECTIVES, append, in_words, read, record, table
from sources.runs import Grid, Run, has_ended, import_page, plan_runs
from sources.shared import counted
from sources.sweeps import HYDRA, Sweeper, Word, hydra_settings, read_sweeper, take_apart

Jobs = Annotated[int, Range("int >= 1 or -1", "must be at least 1, or -1", lambda jobs: jobs >= 1 or jobs == -1)]


@dataclass
class Config:
    out_dir: str = ""  # folder of the sweep; default that of a single run with _sweep_ and a digest of what is constant
    jobs: Jobs = 1  # runs at a time; -1: one a core
    trials: Count | None = None  # run only so many of the combinations, drawn at random without repetition
    trials_seed: Whole = 0  # of that draw
    # studies
    study: str = ""  # of train_arxiv.py, XE against K: all (every subset) | k=1,2 (of these sizes) | nested:1,2,4
    orders: Count | None = None  # of the categories, for nested sets
    controls: bool = False  # beside a study each category alone at its share of the tokens
    holdout: str = ""  # of train_state.py: leave out each cell type in turn, or NAME,NAME
    equal_parameters: bool = False  # choose the width of each run for models of one size


@dataclass
class Sweep:
    """What is swept: the page, its file, the settings of the sweep, and its folder."""

    page: ModuleType
    script: Path
    cfg: Config
    folder: Path

    def has_ended(self, run: Run) -> bool:
        return has_ended(run, self.page, self.script)


def read_words(page: ModuleType, argv: list[str]) -> tuple[Config, list[Word], Sweeper]:
    """(settings of the sweep, the page's words, what Hydra's words mean). Raises InputError."""
    kinds = get_type_hints(Config)
    own, words = take_apart(argv, kinds, [name for name, kind in kinds.items() if kind is bool])
    # Hydra's words: those of files, then those of the command line, which win. None of them is the page's.
    settings, hydra = Settings(page.Config, getattr(page, "ALIASES", {})), {}
    for word in words:
        if not word.key:
            hydra |= hydra_settings(settings.peek(word.value))
    hydra |= {word.key: word.value for word in words if HYDRA.match(word.key)}
    sweeper = read_sweeper(hydra)
    if sweeper.unused:
        note(f"without effect here: {', '.join(sweeper.unused)}")
    cfg = configure(Config, [f"--{name}={value}" for name, value in (sweeper.ours | own).items()])
    words = [word for word in words if not HYDRA.match(word.key)]
    typed = [word.key for word in words]
    words = [Word(key, f"{key}=", value) for key, value in sweeper.params.items() if key not in typed] + words
    return cfg, words, sweeper


def run_sweep(sweep: Sweep, runs: list[Run]) -> list[dict]:
    """Run what has not ended yet, telling of each; returns its lines of sweep.jsonl. Exits with 1 if a run failed."""
    cfg, folder, lines = sweep.cfg, sweep.folder, sweep.folder / "sweep.jsonl"
    shown, less_is_better = OBJECTIVES.get(getattr(sweep.page, "EXPERIMENT", ""), ([], True))
    before, told, todo = read(lines), {}, []
    for run in runs:
        last = before.get(run.name, {})
        if sweep.has_ended(run):
            told[run.name] = record(run.folder, run.values, "done", None, None)
            if last.get("summary") == told[run.name]["summary"]:
                told[run.name] = last
            else:  # a sweep that was killed has not told of it
                append(lines, told[run.name])
            continue
        todo.append(run)
        if last.get("status") == "done":
            print(f"{run.folder} has ended before and is gone: it is run again")
    before = f", {len(told)} ended before" if told else ""
    print(f"{counted(len(runs), 'run')} of {sweep.script.name} in {folder}{before}", flush=True)
    jobs = (os.cpu_count() or 1) if cfg.jobs == -1 else cfg.jobs
    source, spent, working = Grid(todo), [], []
    command = [sys.executable, sweep.script]
    with signals() as came:
        events = run_all(source, sweep.has_ended, command, jobs, [], came, working)
        with contextlib.closing(events):
            for run, status, code, seconds in events:
                if run is None:
                    continue
                if status == "elsewhere":
                    print(f"{run.folder}: another process is at work here: waiting for its end", flush=True)
                    continue
                told[run.name] = record(run.folder, run.values, status, code, seconds)
                append(lines, told[run.name])
                source.ended(run, told[run.name])
                spent.append(told[run.name]["seconds"] or 0)
                line = f"[{len(told)}/{len(runs)}] {run.name}: {in_words(told[run.name], shown)} | {spent[-1]:.0f} s"
                left = len(todo) - len(spent)
                if left and not came:
                    line += f" | {tqdm.format_interval(sum(spent) / len(spent) * left / jobs)} left"
                print(line, flush=True)
    told = [told[run.name] for run in runs if run.name in told]
    if shown and any(line["status"] == "done" for line in told):
        print(f"\nby {shown[0]}, of which {'less' if less_is_better else 'more'} is better:")
    if told:
        print("\n".join(table(told, shown, less_is_better)))
    if came:
        begun = f"{len(runs) - len(told)} not begun" if len(told) < len(runs) else "all begun"
        leave(f"stopped by a signal, {begun}; the same command goes on from there", 128 + came[0])
    show_comparison([Path(line["folder"]) for line in told if line["status"] == "done"], folder)
    if any(line["status"] == "failed" for line in told):
        raise SystemExit(1)
    return told


def show_comparison(runs: list[Path], folder: Path) -> list[str]:
    """Compare the runs in report.html of the folder, and print what it says in short; a failure is a note."""
    if not runs:
        return []
    try:
        from measure.comparison import compare

        lines = compare(runs, folder)
    except Exception as error:  # the table stands above already
        note(f"no comparison in {folder}: {error}")
        return []
    print("\n".join(lines))
    return lines


def report(argv: list[str]) -> list[str]:
    """sweep.py report FOLDER_OR_RUNS... [--out=FOLDER] [--open]."""
    from measure.comparison import compare, find_runs

    options = [word for word in argv if re.match("--(open$|out[=])", word)]
    paths = [Path(word) for word in argv if word not in options]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such folder, or no such option: sweep.py report FOLDER... [--out=FOLDER] "
                             "[--open]")
    if not paths:
        raise InputError("name the folders of runs to compare: sweep.py report FOLDER... [--out=FOLDER] [--open]")
    out = paths[0]
    for option in options:
        if option.startswith("--out="):
            out = Path(option.partition("=")[2])
    lines = compare(find_runs(paths), out)
    print("\n".join(lines))
    if "--open" in options:
        import webbrowser

        webbrowser.open((out / "report.html").resolve().as_uri())
    return lines


def main(argv: list[str] | None = None) -> Any:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "--help" in argv or "-h" in argv:
        configure(Config, ["--help"])
    shows = {"--print_config", "--print-config"} & set(argv)
    words = [word for word in argv[1:] if word not in ("-m", "--multirun", *shows)]
    with clear_errors():
        if argv[0] == "report":
            return report(argv[1:])
        page, script = import_page(argv[0])
        cfg, words, sweeper = read_words(page, words)
        folder, runs = plan_runs(page, words, sweeper, cfg)
        if shows:
            for run in runs:
                print(shlex.join(["python", argv[0], *run.words]))
            return []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the folder {folder} cannot be used ({error.strerror}): use another --out_dir") from error
        try:
            return run_sweep(Sweep(page, script, cfg, folder), runs)
        except KeyboardInterrupt:  # before the first run, or after the last
            leave("interrupted", 128 + signal.SIGINT)
        except OSError as error:  # a full disk, a file where a folder should be; the runs at work save
            leave(f"{error.filename or folder}: {error.strerror}; the same command goes on once that is mended", 1)


if __name__ == "__main__":
    main()
