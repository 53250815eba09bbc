"""Train a page once for every combination of listed settings, each run in a folder of its own, and compare the results.

    python sweep.py train_ghmm.py config/ghmm_mess3.py --lr=1e-3,1e-4 --seed=0,1,2 --jobs=2    # 6 runs, 2 at a time
    python sweep.py train_state.py --decoder_hidden_dims='[1024],[512,512]'   # two values of a setting that is a list
    python sweep.py train_ghmm.py --lr=1e-3,1e-4 --print_config               # the commands that it would run, and stop
    python train_ghmm.py -m lr=1e-3,1e-4 'seed=range(3)' hydra.sweep.dir=out/lr    # the same in Hydra's words

A value with commas lists values, except of a setting that is a list itself; brackets and quotes keep commas together.
Every combination is checked before the first run. The folder of the sweep has a folder for each run, named by what
differs (lr=0.001,seed=0; what the run prints is in its console.log), and sweep.jsonl, a line for each run. The same
command again goes on: what has ended is not run again, what was interrupted goes on from its checkpoint, what failed is
tried again. Ctrl-C lets the runs at work save; a second one does not wait for that. Exit code 1 if a run failed.
"""

import contextlib
import fcntl
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from tqdm import tqdm

from common import checkpoint
from common.errors import InputError, clear_errors, leave, reason
from configurator import Count, Range, Settings, Whole, configure, differences, note
from measure.sweeps import OBJECTIVES, in_words, record, table
from sources.shared import counted
from sources.sweeps import (
    CONFIG_NAME,
    HYDRA,
    SEARCHING,
    Sweeper,
    Word,
    digest,
    hydra_settings,
    labels,
    listed_values,
    plain,
    read_sweeper,
    run_name,
    take_apart,
)

HERE = Path(__file__).resolve().parent
Jobs = Annotated[int, Range("int >= 1 or -1", "must be at least 1, or -1", lambda jobs: jobs >= 1 or jobs == -1)]
MOST_RUNS = 1_000
NO_TRAINING = ("analyze", "report", "study")  # settings that ask a page for something else than to train one model


@dataclass
class Config:
    out_dir: str = ""  # folder of the sweep; default that of a single run with _sweep_ and a digest of what is constant
    jobs: Jobs = 1  # runs at a time; -1: one a core
    trials: Count | None = None  # run only so many of the combinations, drawn at random without repetition
    trials_seed: Whole = 0  # of that draw


@dataclass
class Run:
    """A combination: {what differs: its value}, the page's command line, its folder, and all its settings."""

    values: dict[str, str]
    words: list[str]
    folder: Path
    cfg: Any

    @property
    def name(self) -> str:
        return self.folder.name


# ---------------------------------------------------------------------------------------------------------------
# From a command line to runs
# ---------------------------------------------------------------------------------------------------------------
def import_page(word: str) -> tuple[ModuleType, Path]:
    """The module of a page, and its file. Raises InputError."""
    places = [path.resolve() for path in (Path(word), HERE / word) if path.is_file() and path.suffix == ".py"]
    if not places:
        pages = ", ".join(sorted(path.name for path in HERE.glob("train_*.py")))
        raise InputError(f"the first word is the page to run, such as {pages}, not {word!r}")
    script = places[0]
    sys.path.insert(0, str(script.parent))  # as it is for the page's own process
    try:
        page = importlib.import_module(script.stem)
    except Exception as error:  # an edited page may do anything
        raise InputError(f"{word} cannot be imported ({reason(error)}): mend it") from error
    finally:
        sys.path.remove(str(script.parent))
    file = getattr(page, "__file__", None) or ""
    if Path(file).resolve() != script or not hasattr(page, "main") or not hasattr(page, "Config"):
        raise InputError(f"{word} is no page to train: it needs a Config, a main, and a name that no other module has")
    return page, script


def settings_of(page: ModuleType, words: list[str], show_notes: bool = False) -> Any:
    """The Config that the page makes of a command line; where it makes none, exits with the page's own errors."""
    out, err, values = io.StringIO(), io.StringIO(), {}
    code = 0
    with warnings.catch_warnings(record=True, action="always") as warned:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                page.main([*words, "--print_config"])
        except SystemExit as end:
            code = end.code
    for line in err.getvalue().splitlines():
        if line.startswith("error: ") or (show_notes and line.startswith("note: ")):
            print(line, file=sys.stderr)
    if code:
        raise SystemExit(code)
    for warning in warned if show_notes else ():
        note(str(warning.message))
    exec(out.getvalue(), {}, values)  # what is printed is a configuration file in Python
    return page.Config(**values)


def listed_words(words: list[Word], settings: Settings, sweeper: Sweeper) -> tuple[list[list[Word]], list[str]]:
    """(the words that may stand in the place of each word, the keys that list values). Raises InputError."""
    choices, listed = [], []
    for word in words:
        if word.key.replace("-", "_") == CONFIG_NAME and word.value in SEARCHING:
            raise InputError(f"{word.key}={word.value} searches over intervals, which needs Optuna: leave it out, and "
                             "list values instead, as in lr=1e-3,1e-4")
        field, inside = settings.resolve(word.key.split("."))
        kind = str(settings.kinds.get(field)) if not inside else ""
        is_list = bool(re.search(r"\b(list|tuple|dict)\b", kind))
        values = listed_values(word.key, word.value, is_list, sweeper.inclusive) if word.key else [word.value]
        choices.append([word._replace(value=value) for value in values])
        if values != [word.value]:
            listed.append(word.key)
    if not listed:
        raise InputError("no setting lists values, as lr=1e-3,1e-4 does, or x=[1,2],[3] where x is a list itself: list "
                         "some, or run the page by itself")
    for key in listed:
        # The last of two words for a setting holds, as on a page; of two lists one is a mistake.
        if listed.count(key) > 1:
            raise InputError(f"{key} lists values twice: list them once")
    return choices, listed


def draw(choices: list[list[Word]], cfg: Config) -> list[tuple[Word, ...]]:
    """All combinations in the order of nested loops, or cfg.trials of them. Raises InputError for very many."""
    count = math.prod(map(len, choices))
    if count > MOST_RUNS:
        raise InputError(f"the lists make {count} combinations, more than {MOST_RUNS}: list fewer values")
    combinations = list(itertools.product(*choices))
    if cfg.trials is None:
        return combinations
    if cfg.trials >= count:
        note(f"trials = {cfg.trials}: {counted(count, 'combination')} in all, each is run once")
        return combinations
    note(f"trials = {cfg.trials} of {count} combinations, drawn with trials_seed = {cfg.trials_seed}, not searched for")
    # The first of a shuffled list: more trials add runs, and keep those that there are.
    order = random.Random(cfg.trials_seed).sample(range(count), count)
    return [combinations[number] for number in sorted(order[:cfg.trials])]


def plan(page: ModuleType, argv: list[str]) -> tuple[Config, Path, list[Run]]:
    """(settings of the sweep, its folder, its runs), each checked by the page. Raises InputError."""
    own, words = take_apart(argv, Config.__annotations__)
    settings = Settings(page.Config, getattr(page, "ALIASES", {}))
    # Hydra's words: those of files, then those of the command line, which win. None of them is the page's.
    hydra = {}
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

    choices, swept = listed_words(words, settings, sweeper)
    combinations = draw(choices, cfg)
    constant = [word.head + word.value for word in words if word.key not in swept]
    # Where a single run would go, and beside it: the same command finds its sweep again.
    first = settings_of(page, [word.head + word.value for word in combinations[0]], show_notes=True)
    default = f"{first.out_dir}_sweep_{digest(json.dumps([constant, swept]))}"
    folder = checkpoint.local_folder(cfg.out_dir or default)
    runs = [make_run(page, combination, swept, folder) for combination in combinations]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} would be run twice: list each value once")
    return cfg, folder, runs


def make_run(page: ModuleType, combination: tuple[Word, ...], swept: list[str], folder: Path) -> Run:
    """A run of a sweep. Raises InputError; exits with the page's own errors."""
    listed = {word.key: plain(word.value) for word in combination if word.key in swept}
    values = dict(zip(labels(swept), listed.values(), strict=True))
    place = folder / run_name(values)
    words = [word.head + word.value for word in combination] + [f"--out_dir={place}"]
    cfg = settings_of(page, words)
    for setting in NO_TRAINING:
        if getattr(cfg, setting, ""):
            raise InputError(f"{setting}={getattr(cfg, setting)} is no training of one model: run the page by itself")
    if Path(cfg.out_dir) != place:
        raise InputError(f"a setting puts the run {place.name} into {cfg.out_dir}: leave that out, --out_dir=FOLDER is "
                         "the folder of the sweep")
    return Run(values, words, place, cfg)


def has_ended(run: Run, page: ModuleType, script: Path) -> bool:
    """Whether the run was trained to its end before. Raises InputError if its folder holds another run."""
    ended = (run.folder / "summary.json").exists()
    if not ended and not (run.folder / "last.pt").exists():
        return False
    try:
        saved = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
        same_script = (run.folder / script.name).read_bytes() == script.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{run.folder} holds no whole run of {script.name} ({reason(error)}): remove it") from error
    lines = differences(saved, run.cfg, getattr(page, "ALIASES", {}))
    changes = [line for line in lines if line.split(":")[0] not in checkpoint.NO_SETTINGS]
    if not same_script:
        changes.append(f"{script.name}: edited since")
    if not changes:
        return ended
    if getattr(run.cfg, "resume", "") == "never":
        return False
    raise InputError(f"{run.folder} holds a run with other settings ({'; '.join(changes)}): use another --out_dir, "
                     "or --resume=never to train it anew")


# ---------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the lock of the sweep's folder, made if missing; gives its descriptor, by which the runs hold it as well:
    where a sweep was killed and its runs were not, nobody starts one of them twice. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "sweep.lock", "a")
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be used ({error.strerror}): use another --out_dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another sweep, or a run that a killed one left, is at work here: waiting for its end",
                  flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list of the signals to stop that came. They do nothing else for now."""
    came, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            before[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(script: Path, run: Run, jobs: int, lock: int) -> subprocess.Popen:
    """A process for a run, in a session of its own: Ctrl-C reaches it by run_all alone."""
    run.folder.mkdir(exist_ok=True)
    environment = dict(os.environ)
    if jobs > 1:  # several runs of as many threads as there are cores would be in each other's way
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(run.folder / "console.log", "w") as console:
        return subprocess.Popen([sys.executable, script, *run.words], env=environment, stdin=subprocess.DEVNULL,
                                stdout=console, stderr=console, start_new_session=True, pass_fds=[lock])


def run_all(script: Path, runs: list[Run], jobs: int, lock: int, came: list[int]) -> Iterator[tuple[Run, int, float]]:
    """(run, exit code, seconds) of each as it ends. came: signals, after which no run starts and those at work save."""
    waiting, working, passed_on = deque(runs), {}, 0
    try:
        while working or (waiting and not came):
            while waiting and len(working) < jobs and not came:
                run = waiting.popleft()
                working[start(script, run, jobs, lock)] = run, time.perf_counter()
            for process, (run, began) in list(working.items()):
                if process.poll() is not None:
                    del working[process]
                    yield run, process.poll(), time.perf_counter() - began
            # A page saves and ends at the first signal; a second one, if it is SIGINT, ends it where it is.
            while passed_on < len(came):
                for process in working:
                    process.send_signal(signal.SIGINT if passed_on else signal.SIGTERM)
                passed_on += 1
            time.sleep(0.05)
    finally:
        for process in working:
            process.send_signal(signal.SIGTERM)


def run_sweep(page: ModuleType, script: Path, jobs: int, folder: Path, runs: list[Run], lock: int) -> list[dict]:
    """Run what has not ended yet, telling of each; returns the lines of sweep.jsonl. Exits with 1 if a run failed."""
    shown, less_is_better = OBJECTIVES.get(getattr(page, "EXPERIMENT", ""), ([], True))
    told, todo = [], []
    for run in runs:
        if has_ended(run, page, script):
            told.append(record(run.folder, run.values, "done", None, None))
        else:
            todo.append(run)
    before = f", {len(told)} ended before" if told else ""
    print(f"{counted(len(runs), 'run')} of {script.name} in {folder}{before}", flush=True)
    spent = []  # seconds of each run that ended now
    with (
        open(folder / "sweep.jsonl", "w", encoding="utf-8") as file,
        signals() as came,
        contextlib.closing(run_all(script, todo, jobs, lock, came)) as ends,
    ):
        for line in told:
            file.write(json.dumps(line) + "\n")
        for run, code, seconds in ends:
            done = code == 0 and (run.folder / "summary.json").exists()
            status = "done" if done else "stopped" if came else "failed"
            told.append(record(run.folder, run.values, status, code, seconds))
            file.write(json.dumps(told[-1]) + "\n")
            file.flush()
            spent.append(seconds)
            line = f"[{len(told)}/{len(runs)}] {run.name}: {in_words(told[-1], shown)} | {seconds:.0f} s"
            left = len(todo) - len(spent)
            if left and not came:
                line += f" | {tqdm.format_interval(sum(spent) / len(spent) * left / jobs)} left"
            print(line, flush=True)
    if shown and any(line["status"] == "done" for line in told):
        print(f"\nby {shown[0]}, of which {'less' if less_is_better else 'more'} is better:")
    if told:
        print("\n".join(table(told, shown, less_is_better)))
    if came:
        begun = f"{len(runs) - len(told)} not begun" if len(told) < len(runs) else "all begun"
        leave(f"stopped by a signal, {begun}; the same command goes on from there", 128 + came[0])
    if any(line["status"] != "done" for line in told):
        raise SystemExit(1)
    return told


def main(argv: list[str] | None = None) -> list[dict]:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "--help" in argv or "-h" in argv:
        configure(Config, ["--help"])
    shows = {"--print_config", "--print-config"} & set(argv)
    words = [word for word in argv[1:] if word not in ("-m", "--multirun", *shows)]
    with clear_errors():
        page, script = import_page(argv[0])
        cfg, folder, runs = plan(page, words)
        if shows:
            for run in runs:
                print(shlex.join(["python", argv[0], *run.words]))
            return []
        jobs = (os.cpu_count() or 1) if cfg.jobs == -1 else cfg.jobs
        try:
            with alone(folder) as lock:
                return run_sweep(page, script, jobs, folder, runs, lock)
        except KeyboardInterrupt:  # before the first run, or after the last
            leave("interrupted", 128 + signal.SIGINT)
        except OSError as error:  # a full disk, a file where a folder should be; the runs at work save
            leave(f"{error.filename or folder}: {error.strerror}; the same command goes on once that is mended", 1)


if __name__ == "__main__":
    main()
