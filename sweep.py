"""Train a page once for every combination of listed settings, each run in a folder of its own, and compare the results.

    python sweep.py train_ghmm.py --lr=1e-3,1e-4 --seed=0,1,2 --jobs=2     # 6 runs, 2 at a time
    python sweep.py train_state.py --decoder_hidden_dims='[1024],[512,512]'  # values that are lists
    python sweep.py train_arxiv.py --study=nested:1,2,4 --seed=0,1         # the runs of a study
    python sweep.py train_ghmm.py --lr=1e-3,1e-4 --shard=3/10              # for an array of jobs
    python sweep.py train_ghmm.py --trials=20 --lr=log:1e-5..1e-2          # a search by TPE
    python sweep.py train_ghmm.py --lr=1e-3,1e-4 --print_config            # its commands, no run
    python sweep.py report out/ghmm_sweep_1a2b3c                           # runs that there are
    python train_ghmm.py -m lr=1e-3,1e-4 'seed=range(3)'                   # in Hydra's words

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

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import InputError, RunError, clear_errors, leave, os_sentence  # isort: skip

import contextlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_type_hints

from common import store
from common.telling import begin, doing, note
from configurator import Count, Range, Settings, Whole, configure, help_text, print_text
from measure.progress import Progress
from measure.sweeps import in_words, objective, sorted_table
from sources.jobs import devices, launch, run_all, signals
from sources.runs import import_page, meant, plan_runs
from sources.search import SEARCHES
from sources.shared import closest, counted, nearest
from sources.sweeps import CONFIG_NAME, HYDRA, Sweeper, Word, hydra_settings, read_sweeper, take_apart
from sources.trials import plan_search

USAGE = """python sweep.py PAGE [CONFIG FILE ...] --key=value,value ... [settings of the sweep]
       python sweep.py report FOLDER ...        (its own: python sweep.py report --help)

  PAGE            train_ghmm.py or another, or your copy of one; its settings: python PAGE --help
  --key=value     one value or several of a setting of the page
  --print_config  print the commands of the runs, and stop"""
REPORT = """Compare runs that there are: which is best and how sure that is, a table, pictures, report.html.

    python sweep.py report out/ghmm_sweep_1a2b3c           # all runs in a folder, into that folder
    python sweep.py report out/a out/b --out=out/a_and_b   # some runs, into a folder of their own
    python sweep.py report out/ghmm_sweep_1a2b3c --open    # then shown in a browser

Runs that differ in their seed alone are averaged. Runs of a page and of its copies are compared,
those of a study (train_arxiv.py --study, train_state.py --holdout) beside what they are a study of.
Of runs that have not ended it says how far they are. Nothing is trained, and no run is changed.

usage: python sweep.py report FOLDER ... [--out=FOLDER] [--objective=NAME] [--open]

  FOLDER          of a run, or of any number of them, at any depth
  --out=FOLDER    where report.html, comparison.csv and plots/ are written; default the first FOLDER
  --objective=NAME
                  what runs are compared by, of summary.json; -NAME: more of it is better
  --open          show report.html in a browser"""
LIKE = 0.85  # from here on a word of no page is a setting of the sweep with a slip of the pen
Jobs = Annotated[int, Range("int >= 1 or -1", "must be at least 1, or -1", lambda jobs: jobs >= 1 or jobs == -1)]


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
    for name, example in (("study", "nested:1,2,4"), ("holdout", "each")):
        if own.get(name) == "":
            raise InputError(f"{name} is empty: --{name}={example}, or leave it out")
    cfg = configure(Config, [f"--{name}={value}" for name, value in (sweeper.ours | own).items()])
    words = [word for word in words if not HYDRA.match(word.key)]
    for word in words:
        near = nearest(word.key, kinds, LIKE)
        if near and settings.resolve([word.key])[0] is None:
            raise InputError(f"{word.key}: no such setting, did you mean {near}?")
    typed = [meant(word.key, settings) for word in words]
    searched = [Word(key, f"{key}=", value) for key, value in sweeper.params.items()]
    words = [word for word in searched if meant(word.key, settings) not in typed] + words
    return cfg, words, sweeper


def processes(cfg: Config, source: Any, script: Path) -> tuple[list, int, list[str]]:
    """(the words before those of a run, runs at a time, the GPUs that they share). Raises InputError."""
    on_cpu = all(getattr(known, "device", "auto") == "cpu" for known in source.known)
    jobs, gpus = devices(cfg.jobs, 0 if on_cpu and cfg.gpus is None else cfg.gpus, cfg.launcher)
    return [*launch(cfg.launcher), script], jobs, gpus


def run_and_tell(source: Any, how: tuple[list, int, list[str]], shown: list[str]) -> tuple[list[dict], list[int]]:
    """Run what a source has, telling of each that ends; returns (lines of sweep.jsonl, signals that came).

    source: sources.runs.Grid or sources.trials.Trials. how: of processes. shown: names in summary.json.
    """
    told, working = [], []
    progress = Progress(source, how[1])
    with (
        signals() as came,
        contextlib.closing(progress),
        contextlib.closing(run_all(source, *how, came, working)) as events,
    ):
        for run, status, job in events:
            progress.show(working)
            if status == "elsewhere":
                progress.say(f"{run.folder}: another process is at work here: waiting for its end")
            elif status:
                line = source.ended(run, status, *(job.end() if job else ()))
                told.append(line)
                progress.end(run.name, in_words(line, shown), job, source.count_ended(), not came)
    return told, came


def run_sweep(plan: Any, cfg: Config, script: Path, shown: list[str], less_is_better: bool) -> list[dict]:
    """Run what has not ended yet, and compare; returns the lines of sweep.jsonl. Exits with 1 if a run failed.

    plan: sources.runs.Grid or sources.trials.Plan. shown, less_is_better: of measure.sweeps.objective.
    """
    how = processes(cfg, plan, script)
    source = plan.open()
    print(f"{source.title()}, {counted(how[1], 'run')} at a time", flush=True)
    new, came = run_and_tell(source, how, shown)
    told = source.lines()
    compares = source.is_whole() and not came
    done = [Path(line["folder"]) for line in told if line["status"] == "done"]
    lines = comparison([path for path in done if path.is_dir()], source.folder, cfg.objective) if compares else []
    if lines:
        failed = sum(line["status"] == "failed" for line in told)
        but = f", but {failed} of {counted(len(told), 'run')} failed" if failed else ""
        print(f"\ndone{but}: {lines[0]}")
    show_table([line for line in told if line["status"] != "done" or not lines], shown, less_is_better)
    if came:
        leave(f"stopped by a signal with {source.count_ended()} of {source.total} ended; the same command goes on from "
              "there", 128 + came[0])
    for text in [*lines[1:-1], *source.elsewhere(), *(source.answer(less_is_better) if compares else ()), *lines[-1:]]:
        print(text)
    if any(line["status"] == "failed" for line in new):
        raise SystemExit(1)
    return told


def show_table(told: list[dict], shown: list[str], less_is_better: bool) -> None:
    lines, warning = sorted_table(told, shown, less_is_better)
    for line in lines:
        print(line)
    if warning:
        note(warning)


def comparison(runs: list[Path], folder: Path, wanted: str) -> list[str]:
    """Compare the runs in report.html of the folder; returns what it says in short, the verdict first.

    Args: those of measure.comparison.compare. A failure is a note, and
    there is no line.
    """
    if not runs:
        return []
    try:
        from measure.comparison import compare

        with doing(f"comparing {counted(len(runs), 'run')}"):
            return compare(runs, folder, wanted)
    except Exception as error:  # there is a table without it
        note(f"no comparison in {folder}: {error}")
        return []


def report(argv: list[str]) -> list[str]:
    """sweep.py report FOLDER_OR_RUNS... [--out=FOLDER] [--objective=NAME] [--open]: what compare says of them."""
    if "--help" in argv or "-h" in argv:
        print_text(REPORT)
        raise SystemExit(0)
    from measure.comparison import compare, find_runs, place_for

    options, words = take_apart(argv, ("out", "objective", "open"), ("open",))
    paths = [store.local(word.head + word.value) for word in words if word.head + word.value]
    usage = "sweep.py report FOLDER... [--out=FOLDER] [--objective=NAME] [--open]"
    for path in paths:
        if not path.exists():
            what = "option" if str(path).startswith("--") else "folder"
            near = closest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
            raise InputError(f"{path}: no such {what}{near}: {usage}")
    if not paths:
        raise InputError(f"name the folders of runs to compare: {usage}")
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    out = store.on_disk(os.path.expanduser(options.get("out", first)), setting="out")
    found = find_runs(paths)
    begin(__file__, f"comparing {counted(len(found), 'run')}", place_for(out) / "report.html")
    with doing(f"reading and drawing {counted(len(found), 'run')}"):
        lines = compare(found, out, options.get("objective", ""))
    print_text("\n".join(lines))
    if options.get("open") == "True":
        import webbrowser

        webbrowser.open((place_for(out) / "report.html").resolve().as_uri())
    return lines


def main(argv: list[str] | None = None) -> Any:
    with clear_errors():
        return sweep(list(sys.argv[1:] if argv is None else argv))


def sweep(argv: list[str]) -> Any:
    """The words of a command line -> the lines of sweep.jsonl, or of a report."""
    if argv[:1] == ["report"]:
        return report(argv[1:])
    if not argv or "--help" in argv or "-h" in argv:
        print_text(help_text(Config, "sweep.py", usage=USAGE))
        raise SystemExit(0)
    shows = {"--print_config", "--print-config"} & set(argv)
    words = [word for word in argv[1:] if word not in ("-m", "--multirun", *shows)]
    page, script = import_page(argv[0])
    cfg, words, sweeper = read_words(page, words)
    if not shows:  # what follows may have to read or to make data
        typed = [word for word in argv[1:] if word not in ("-m", "--multirun")]
        begin(__file__, shlex.join([script.name, *typed]), file=sys.stdout)
    shown, less_is_better = objective(getattr(page, "EXPERIMENT", ""), cfg.objective)
    plan = plan_search(page, script, words, sweeper, cfg, (shown or [""])[0], less_is_better)
    plan = plan or plan_runs(page, script, words, sweeper, cfg)
    if shows:
        print_text("\n".join(plan.commands()))
        return []
    try:
        return run_sweep(plan, cfg, script, shown, less_is_better)
    except OSError as error:  # a full disk, a file where a folder should be; the runs at work save
        raise RunError(f"{os_sentence(error)}. The same command goes on once that is mended") from error


if __name__ == "__main__":
    main()
