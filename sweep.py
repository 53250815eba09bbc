"""Train a page once for every combination of listed settings, each run in a folder of its own, and compare the results.

    python sweep.py train_ghmm.py config/ghmm_mess3.py --lr=1e-3,1e-4 --seed=0,1,2 --jobs=2    # 6 runs, 2 at a time
    python sweep.py train_state.py --decoder_hidden_dims='[1024],[512,512]'   # two values of a setting that is a list
    python sweep.py train_arxiv.py --study=nested:1,2,4 --seed=0,1            # the runs of a study
    python sweep.py train_ghmm.py --lr=1e-3,1e-4 --shard=3/10                 # every tenth run, for an array of jobs
    python sweep.py train_ghmm.py --trials=20 --lr=log:1e-5..1e-2 --n_layers=int:2..8 --act=relu,gelu  # a search by TPE
    python sweep.py train_ghmm.py --lr=1e-3,1e-4 --print_config               # the commands that it would run, and stop
    python sweep.py report out/ghmm_sweep_1a2b3c                              # compare runs that there are
    python train_ghmm.py -m lr=1e-3,1e-4 'seed=range(3)' hydra.sweep.dir=out/lr    # the same in Hydra's words

A value with commas lists values, except of a setting that is a list itself; brackets and quotes keep commas together.
Every combination is checked before the first run. The folder of the sweep has a folder for each run, named by what
differs (lr=0.001,seed=0; what the run prints is in its console.log), and sweep.jsonl, a line for each run that ended.
The same command again goes on: what has ended is not run again, what was interrupted goes on from its checkpoint, what
failed is tried again. Several such commands at once share the runs. Ctrl-C lets the runs at work save; a second one
does not wait for that. Exit code 1 if a run failed.

A range makes it a search (pip install optuna): log:LOW..HIGH, int:LOW..HIGH, LOW..HIGH, with steps LOW..HIGH:STEP.
--trials is of the whole study, which any number of such commands share; with more of them it goes on. A run whose
evaluations stay worse than the median of the others' is stopped (not of train_state.py: what it is judged by is known
at its end). A failed run is not tried again. best.json has the command that repeats the best run.
"""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_type_hints

from tqdm import tqdm

from common.errors import InputError, clear_errors, leave
from common.jobs import Job, devices, launch, run_all, signals
from common.progress import Progress
from common.runlog import write_json
from configurator import Count, Range, Settings, Whole, configure, note
from measure.sweeps import HEADS, append, in_words, objective, read, record, table
from sources.runs import Grid, Run, has_ended, import_page, plan_runs
from sources.search import SEARCHES, Trial, import_optuna
from sources.shared import closest, counted
from sources.sweeps import (
    CONFIG_NAME,
    HYDRA,
    Sweeper,
    Word,
    hydra_settings,
    in_shard,
    read_sweeper,
    take_apart,
)
from sources.trials import Plan, Trials, plan_search, shown_as

Jobs = Annotated[int, Range("int >= 1 or -1", "must be at least 1, or -1", lambda jobs: jobs >= 1 or jobs == -1)]
CLOCK_SECONDS = 120  # by which clocks of two machines may differ before it is said


@dataclass
class Config:
    out_dir: str = ""  # folder of the sweep; default that of a single run with _sweep_ and a digest of what is constant
    jobs: Jobs | None = None  # runs at a time; -1: one a GPU, or a core without any; default 1, or one a GPU of several
    gpus: Whole | None = None  # give each run one of so many GPUs; default all that are visible; 0: leave them alone
    launcher: str = ""  # words before the script, such as "torchrun --nproc_per_node=8"; default Python alone
    shard: str = ""  # K/N: every Nth run from the Kth on, for arrays of jobs
    objective: str = ""  # what runs are compared by: NAME of a number in summary.json; -NAME: more of it is better
    trials: Count | None = None  # run only so many of the combinations, drawn at random; of a search, how many in all
    trials_seed: Whole = 0  # of that draw, and of a search
    # search, where a setting has a range
    sampler: Literal["tpe", "random"] | None = None  # default tpe; given, it searches lists alone too
    storage: str = ""  # of the study: path of a journal file, or URL of a database; default study.journal in out_dir
    study_name: str = ""  # in that storage; default by its settings
    prune: bool = True  # stop a run that stays worse than the median of the others
    # studies
    study: str = ""  # of train_arxiv.py, XE against K: all (every subset) | k=1,2 (of these sizes) | nested:1,2,4
    orders: Count | None = None  # of the categories, for nested sets
    controls: bool = False  # beside a study each category alone at its share of the tokens
    holdout: str = ""  # of train_state.py: leave out "each" cell type in turn, or NAME,NAME
    equal_parameters: bool = False  # choose the width of each run for models of one size


@dataclass
class Sweep:
    """What is swept: the page, its file, the settings of the sweep, its folder, and its runs, other shards' too."""

    page: ModuleType
    script: Path
    cfg: Config
    folder: Path
    runs: list[Run]

    @property
    def lines(self) -> Path:
        return self.folder / "sweep.jsonl"

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
        elif word.key.replace("-", "_") == CONFIG_NAME:
            hydra |= SEARCHES.get(word.value, {})
    hydra |= {word.key: word.value for word in words if HYDRA.match(word.key)}
    sweeper = read_sweeper(hydra)
    if sweeper.unused:
        note(f"without effect here: {', '.join(sweeper.unused)}")
    cfg = configure(Config, [f"--{name}={value}" for name, value in (sweeper.ours | own).items()])
    words = [word for word in words if not HYDRA.match(word.key)]
    typed = [settings.resolve(word.key.split(".")) for word in words if word.key]
    searched = [Word(key, f"{key}=", value) for key, value in sweeper.params.items()]
    words = [word for word in searched if settings.resolve(word.key.split(".")) not in typed] + words
    return cfg, words, sweeper


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be used ({error.strerror}): use another --out_dir") from error


def look_back(sweep: Sweep) -> tuple[dict[str, dict], list[Run]]:
    """({name: line of sweep.jsonl} of the runs that have ended before, the others). Raises InputError."""
    lines = read(sweep.lines)
    told = {}
    todo = []
    times = [line.get("time") or 0 for line in lines.values()]
    late = max(times, default=0) - time.time()
    if late > CLOCK_SECONDS:
        late = tqdm.format_interval(late)
        note(f"{sweep.lines} has a line of {late} from now: the clocks of two machines differ, which changes nothing")
    for run in sweep.runs:
        last = lines.get(run.name, {})
        if sweep.has_ended(run):
            told[run.name] = record(run.folder, run.values, "done", None, last.get("seconds"))
            if last.get("summary") != told[run.name]["summary"]:  # a sweep that was killed has not told of it
                append(sweep.lines, told[run.name])
            continue
        todo.append(run)
        if last.get("status") == "done":
            print(f"{run.folder}: a run has ended here, and its results are gone: it is run again")
    return told, todo


def run_sweep(sweep: Sweep) -> list[dict]:
    """Run what has not ended yet, telling of each; returns the lines of sweep.jsonl. Exits with 1 if a run failed."""
    cfg = sweep.cfg
    shown, less_is_better = objective(getattr(sweep.page, "EXPERIMENT", ""), cfg.objective)
    how = processes(sweep, [run.cfg for run in sweep.runs])
    mine = in_shard(cfg.shard, sweep.runs)
    make_folder(sweep.folder)

    told, todo = look_back(sweep)
    todo = [run for run in todo if run in mine]
    before = f", {len(told)} ended before" if told else ""
    share = f", {len(mine)} of them in shard {cfg.shard}" if cfg.shard else ""
    print(f"{counted(len(sweep.runs), 'run')} of {sweep.script.name} in {sweep.folder}{share}{before}", flush=True)
    steps = {run.name: getattr(run.cfg, "max_steps", None) for run in todo}
    progress = Progress(len(mine), len(mine) - len(todo), steps, how[1])

    def tell(run: Run, status: str, job: Job | None) -> dict:
        line = record(run.folder, run.values, status, *(job.end() if job else (None, None)))
        append(sweep.lines, line)
        return line

    new, came = run_and_tell(sweep, Grid(todo), progress, how, sweep.has_ended, tell)
    told |= new
    told, missing = look_around(sweep, told)
    show_table(told, shown, less_is_better)
    if came:
        waiting = len([run for run in missing if run in mine])
        begun = f"{waiting} not begun" if waiting else "all begun"
        leave(f"stopped by a signal, {begun}; the same command goes on from there", 128 + came[0])
    if missing:
        print(f"{counted(len(missing), 'run')} of other shards not ended yet: the last shard to end compares all runs")
    else:
        done = [sweep.folder / line["run"] for line in told if line["status"] == "done"]
        show_comparison(done, sweep.folder, cfg.objective)
    if any(line["status"] == "failed" for line in new.values()):
        raise SystemExit(1)
    return told


def processes(sweep: Sweep, settings: list[Any]) -> tuple[list, int, list[str]]:
    """(the words before those of a run, runs at a time, the GPUs that they share). Raises InputError.

    settings: the page's Config of the runs, as far as they are known.
    """
    cfg = sweep.cfg
    on_cpu = all(getattr(each, "device", "auto") == "cpu" for each in settings)
    jobs, gpus = devices(cfg.jobs, 0 if on_cpu and cfg.gpus is None else cfg.gpus, cfg.launcher)
    return [*launch(cfg.launcher), sweep.script], jobs, gpus


def run_and_tell(sweep: Sweep, source: Grid | Trials, progress: Progress, how: tuple[list, int, list[str]],
                 has_ended: Callable, tell: Callable) -> tuple[dict[str, dict], list[int]]:
    """Run what a source has, telling of each; returns ({name: line of sweep.jsonl}, the signals that came).

    Args:
        how: of processes. has_ended: whether a run has.
        tell: makes the line of a run that ended, of its status and job, and adds it to sweep.jsonl.
    """
    shown, _ = objective(getattr(sweep.page, "EXPERIMENT", ""), sweep.cfg.objective)
    told, working = {}, []
    with (
        signals() as came,
        contextlib.closing(progress),
        contextlib.closing(run_all(source, has_ended, *how, came, working)) as events,
    ):
        for run, status, job in events:
            progress.show(working)
            if status == "elsewhere":
                progress.say(f"{run.folder}: another process is at work here: waiting for its end")
            if status in ("", "elsewhere"):
                continue
            line = tell(run, status, job)
            told[run.name] = line
            source.ended(run, line)
            progress.end(run.name, job)
            if isinstance(source, Trials):
                progress.ended = source.count_ended()
            text = f"[{progress.ended}/{progress.total}] {run.name}: {in_words(line, shown)}"
            if job:
                text += f" | {job.seconds:.0f} s"
            left = progress.left()
            if left and left >= 1 and not came:
                text += f" | {tqdm.format_interval(left)} left"
            progress.say(text)
    return told, came


def run_search(sweep: Sweep, plan: Plan) -> list[dict]:
    """Run what is left of a study, which other processes may do too; returns the lines of all its runs that ended.

    Exits with 1 if a run failed here.
    """
    shown, less_is_better = objective(getattr(sweep.page, "EXPERIMENT", ""), sweep.cfg.objective)
    how = processes(sweep, [plan.first])
    import_optuna()  # before anything is written
    make_folder(sweep.folder)
    source = plan.open()
    ended = source.count_ended()
    before = f", {ended} ended before" if ended else ""
    print(f"a study of {counted(source.total, 'run')} of {sweep.script.name} in {sweep.folder}{before}", flush=True)

    def has_ended(run: Run) -> bool:
        return source.has_ended(run, sweep.page, sweep.script)

    def tell(run: Run, status: str, job: Job | None) -> dict:
        trial = source.trial_of(run)
        if job is None and trial.state != "running":  # of another process, which has told of it
            return line_of_trial(source, trial, {})
        line = record(run.folder, run.values, status, *(job.end() if job else (None, None)))
        if status == "pruned":
            line["value"] = trial.value
        append(sweep.lines, line)
        return line

    progress = Progress(source.total, ended, {}, how[1])
    new, came = run_and_tell(sweep, source, progress, how, has_ended, tell)
    trials = source.search.trials()
    lines = read(sweep.lines)
    told = [line_of_trial(source, trial, lines) for trial in trials if trial.state != "running"]
    show_table(told, shown, less_is_better)
    for trial in trials:
        if trial.state == "running" and not came:
            print(f"{source.name_of(trial)}: at work on {trial.host or 'another machine'}, or left by a sweep that was "
                  "killed there")
    if came:
        leave(f"stopped by a signal with {len(told)} of {source.total} ended; the same command goes on from there",
              128 + came[0])
    show_best(sweep, source, less_is_better)
    folders = [Path(line["folder"]) for line in told if line["status"] == "done"]
    show_comparison([folder for folder in folders if folder.is_dir()], sweep.folder, sweep.cfg.objective)
    if any(line["status"] == "failed" for line in new.values()):
        raise SystemExit(1)
    return told


def line_of_trial(source: Trials, trial: Trial, lines: dict[str, dict]) -> dict:
    """The line of sweep.jsonl of a run that has ended in this or another process, on this or another machine.

    lines: {name: line} of those that sweep.jsonl has.
    """
    folder, values, status = source.place_of(trial), shown_as(trial.values), trial.state
    has_summary = folder and (folder / "summary.json").exists()
    if has_summary and status == "failed":
        status = "done"  # for its page, but without the number that the study asks for
    if has_summary or (folder and status != "done"):
        before = lines.get(folder.name, {})
        line = record(folder, values, status, before.get("exit_code"), before.get("seconds"))
    else:
        line = {
            "run": source.name_of(trial),
            "status": status,
            "exit_code": None,
            "seconds": None,
            "folder": f"{trial.host}:{trial.folder}",
            "settings": values,
            "summary": {source.objective: trial.value},
            "last_lines": [],
        }
    if status == "pruned":
        line["value"] = trial.value
    return line


def show_best(sweep: Sweep, source: Trials, less_is_better: bool) -> None:
    """Print the command that repeats the best run of a study, write best.json, and say which settings matter."""
    done = [trial for trial in source.search.trials() if trial.state == "done"]
    if not done:
        return
    done.sort(key=lambda trial: trial.value, reverse=not less_is_better)
    best = done[0]
    run = source.run_of(best.values, sweep.folder / source.name_of(best))
    command = shlex.join(["python", sweep.script.name, *run.words[:-1]])  # into the page's own folder
    facts = {
        "run": run.name,
        source.objective: best.value,
        "settings": run.values,
        "command": command,
    }
    write_json(sweep.folder / "best.json", facts)
    print(f"\nthe best again: {command}")
    shares = source.search.importances()
    if shares:
        listed = [f"{name} {share}" for name, share in shown_as({key: f"{shares[key]:.2f}" for key in shares}).items()]
        print(f"what tells the best quarter of {len(done)} runs from the others (PED-ANOVA): {', '.join(listed)}")


def look_around(sweep: Sweep, told: dict[str, dict]) -> tuple[list[dict], list[Run]]:
    """(lines of all runs of the sweep that have ended, other shards' too; the runs that have not)."""
    lines = read(sweep.lines)
    ended = []
    missing = []
    for run in sweep.runs:
        line = told.get(run.name) or lines.get(run.name)
        if line and (line["status"] != "done" or run.folder.exists()):
            ended.append(line)
        else:
            missing.append(run)
    return ended, missing


def show_table(told: list[dict], shown: list[str], less_is_better: bool) -> None:
    """Print the table of the runs that ended, and what it is sorted by."""
    done = [line["summary"] for line in told if line["status"] == "done"]
    if shown and done:
        name = HEADS.get(shown[0], shown[0])
        better = "less" if less_is_better else "more"
        print(f"\nby {name}, of which {better} is better:")
    print("\n".join(table(told, shown, less_is_better)))
    known = set().union(*done)
    if shown and done and shown[0] not in known:
        hint = closest(shown[0], known)
        note(f"{shown[0]} is no number in summary.json{hint}")


def show_comparison(runs: list[Path], folder: Path, wanted: str) -> list[str]:
    """Compare the runs in report.html of the folder, and print what it says in short; a failure is a note."""
    if not runs:
        return []
    try:
        from measure.comparison import compare

        lines = compare(runs, folder, wanted, shows_table=False)
    except Exception as error:  # the table stands above already
        note(f"no comparison in {folder}: {error}")
        return []
    print("\n".join(lines))
    return lines


def report(argv: list[str]) -> list[str]:
    """sweep.py report FOLDER_OR_RUNS... [--out=FOLDER] [--open]: what compare says of runs that there are."""
    from measure.comparison import compare, find_runs, place_for

    options, words = take_apart(argv, ("out", "open"), ("open",))
    paths = [Path(word.head + word.value) for word in words]
    usage = "sweep.py report FOLDER... [--out=FOLDER] [--open]"
    for path in paths:
        if not path.exists():
            what = "option" if str(path).startswith("--") else "folder"
            raise InputError(f"{path}: no such {what}: {usage}")
    if not paths:
        raise InputError(f"name the folders of runs to compare: {usage}")
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    out = Path(options.get("out", first))
    lines = compare(find_runs(paths), out)
    print("\n".join(lines))
    if options.get("open") == "True":
        import webbrowser

        webbrowser.open((place_for(out) / "report.html").resolve().as_uri())
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
        shown, less_is_better = objective(getattr(page, "EXPERIMENT", ""), cfg.objective)
        search = plan_search(page, script, words, sweeper, cfg, (shown or [""])[0], less_is_better)
        if search and shows:
            typed = shlex.join(["python", argv[0], *(word.head + word.value for word in words)])
            print(f"{typed}  # {counted(cfg.trials, 'run')} of a search in {search.folder}")
            return []
        folder, runs = (search.folder, []) if search else plan_runs(page, words, sweeper, cfg)
        if shows:
            for run in in_shard(cfg.shard, runs):
                print(shlex.join(["python", argv[0], *run.words]))
            return []
        sweep = Sweep(page, script, cfg, folder, runs)
        try:
            return run_search(sweep, search) if search else run_sweep(sweep)
        except KeyboardInterrupt:  # before the first run, or after the last
            leave("interrupted", 128 + signal.SIGINT)
        except OSError as error:  # a full disk, a file where a folder should be; the runs at work save
            leave(f"{error.filename or folder}: {error.strerror}; the same command goes on once that is mended", 1)


if __name__ == "__main__":
    main()
