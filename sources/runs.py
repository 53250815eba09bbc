"""From a command line to the runs of a sweep: the page, what is listed, and the folder and settings of each run."""

import contextlib
import filecmp
import importlib
import io
import itertools
import json
import math
import random
import re
import shlex
import sys
import time
import warnings
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, get_args

from common import checkpoint, store
from common.errors import InputError, reason, rehearsal
from common.runlog import look_at_names
from configurator import Settings, differences, note
from sources.outcomes import BOOK, append, read, read_object, record
from sources.shared import closest, counted, from_here
from sources.studies import Variation, resized, variations
from sources.sweeps import Sweeper, Word, digest, in_shard, labels, listed_values, plain, run_name

HERE = Path(__file__).resolve().parents[1]
MOST_RUNS = 1_000
CLOCK_SECONDS = 120  # by which clocks of two machines may differ before it is said
STUDIES = ("study", "orders", "controls", "holdout", "equal_parameters")  # settings of a sweep that choose its runs
COPIED = "--out_dir=FOLDER --s3_config=FILE copies each run of it to a bucket"
NO_TRAINING = ("analyze", "report", "study")  # settings that ask a page for something else than to train one model


@dataclass
class Run:
    """A run of a sweep: {what differs: its value}, the page's command line, its folder, and all its settings.

    lock: of the folder, where its source has taken it already. data: {what names the data: fingerprint}, of a study.
    """

    values: dict[str, str]
    words: list[str]
    folder: Path
    cfg: Any
    lock: IO | None = None
    data: dict[str, str] | None = None

    @property
    def name(self) -> str:
        return self.folder.name


class Grid:
    """The runs of lists and studies in their order: a source of runs, as a search is one.

    What runs them (sources.jobs.run_all) asks a source for the next run, whether it has ended before, and whether one
    at work is hopeless; it tells the source of those that ended.

    Args:
        page, script: the module of a page, and its file. folder: of the sweep. shard: of in_shard.
    """

    def __init__(self, page: ModuleType, script: Path, folder: Path, runs: list[Run], shard: str = ""):
        self.page, self.script, self.folder, self.runs, self.shard = page, script, folder, runs, shard
        self.mine = in_shard(shard, runs)
        self.known = [run.cfg for run in runs]  # the page's settings, as far as they are known before the first run
        self.total = len(self.mine)
        self.book = folder / BOOK
        self.told: dict[str, dict] = {}  # {name of a run that has ended: its line of sweep.jsonl}
        self.waiting: deque[Run] = deque()

    def commands(self) -> list[str]:
        """What could be typed in the place of the sweep."""
        return [command(self.script, run.words) for run in self.mine]

    def open(self) -> "Grid":
        """Look what has ended before; what has not waits. Raises InputError where a folder holds something else."""
        make_folder(self.folder)
        lines = read(self.book)
        times = [line["time"] for line in lines.values() if isinstance(line["time"], float | int)]
        late = max(times, default=0) - time.time()
        if late > CLOCK_SECONDS:
            note(f"{self.book} has a line of {late:.0f} s from now: the clocks of two machines differ, which changes "
                 "nothing")
        for run in self.runs:
            last = lines.get(run.name, {})
            if self.has_ended(run):
                line = record(run.folder, run.values, "done", None, last.get("seconds"))
                self.told[run.name] = line
                if last.get("summary") != line["summary"]:  # a sweep that was killed has not told of it
                    append(self.book, line)
            elif last.get("status") == "done":
                print(f"{run.folder}: a run has ended here, and its results are gone: it is run again")
        for run in self.mine:
            if run.name not in self.told:
                look_at_names(run.folder)
                self.waiting.append(run)
        return self

    def title(self) -> str:
        text = f"{counted(len(self.runs), 'run')} of {self.script.name} in {self.folder}"
        if self.shard:
            text += f", {self.total} of them in shard {self.shard}"
        if self.told:
            text += f", {len(self.told)} ended before"
        return text

    def steps(self) -> dict[str, int | None]:
        """{name of a run that waits: its steps, None where its settings do not tell}."""
        return {run.name: getattr(run.cfg, "max_steps", None) for run in self.waiting}

    def next(self) -> Run | None:
        """The next run to start; None where there is none now. Asked again as runs end."""
        return self.waiting.popleft() if self.waiting else None

    def has_ended(self, run: Run) -> bool:
        return has_ended(run, self.page, self.script)

    def hopeless(self, run: Run, records: list[dict]) -> bool:
        """Whether to stop a run at work, by all records of its metrics.jsonl; asked whenever there are new ones."""
        return False

    def ended(self, run: Run, status: str, code: int | None = None, seconds: float | None = None) -> dict:
        """Learn what came of a run, as outcomes.record has it; returns its line of sweep.jsonl."""
        line = record(run.folder, run.values, status, code, seconds)
        append(self.book, line)
        self.told[run.name] = line
        return line

    def count_ended(self) -> int:
        count = 0
        for run in self.mine:
            line = self.told.get(run.name)
            if line and line["status"] != "stopped":
                count += 1
        return count

    def lines(self) -> list[dict]:
        """The lines of all runs that have ended, other shards' too."""
        others = read(self.book)
        lines = []
        for run in self.runs:
            line = self.told.get(run.name) or others.get(run.name)
            if line and (line["status"] != "done" or run.folder.exists()):
                lines.append(line | {"folder": str(run.folder)})  # as it is called from here
        return lines

    def elsewhere(self) -> list[str]:
        """What is said of runs that others have not ended."""
        ended = [line for line in self.lines() if line["status"] != "stopped"]
        missing = len(self.runs) - len(ended)
        if not missing:
            return []
        return [f"{counted(missing, 'run')} of other shards not ended yet: the last shard to end compares all runs"]

    def is_whole(self) -> bool:
        """Whether it is time to compare the runs."""
        return not self.elsewhere()

    def answer(self, less_is_better: bool) -> list[str]:
        """What the runs come to, beside their table."""
        return []


def command(script: Path, words: list[str]) -> str:
    """What can be typed to run a page from here."""
    return shlex.join(["python", from_here(script), *words])


def make_folder(folder: Path) -> None:
    """Raises InputError where there can be none, or something in it is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be used ({error.strerror}): use another --out_dir") from error
    look_at_names(folder, (BOOK, "study.lock"))


# ---------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------
def import_page(word: str) -> tuple[ModuleType, Path]:
    """The module of a page, and its file; train_ghmm and ghmm are train_ghmm.py. Raises InputError."""
    names = (word, f"{word}.py", f"train_{word}.py")
    places = []
    for name in names:
        for path in (Path(name), HERE / name):
            if path.is_file() and path.suffix == ".py":
                places.append(path.resolve())
    if not places:
        pages = sorted({path.name for folder in (Path(), HERE) for path in folder.glob("train_*.py")})
        known = [*pages, *(name.removeprefix("train_").removesuffix(".py") for name in pages), "report"]
        near = "" if word.startswith("-") else closest(Path(word).name, known)
        raise InputError(f"the first word is the page to run ({', '.join(pages)}) or report, not {word!r}{near}")
    script = places[0]
    sys.path.insert(0, str(script.parent))  # as it is for the page's own process
    try:
        page = importlib.import_module(script.stem)
    except Exception as error:  # an edited page may do anything
        raise InputError(f"{word} cannot be imported ({reason(error)}): mend it") from error
    finally:
        sys.path.remove(str(script.parent))
    file = getattr(page, "__file__", None) or ""
    is_page = hasattr(page, "main") and hasattr(page, "Config")
    if Path(file).resolve() != script or not is_page:
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


# ---------------------------------------------------------------------------------------------------------------
# What is listed
# ---------------------------------------------------------------------------------------------------------------
def listed_words(words: list[Word], settings: Settings, sweeper: Sweeper) -> tuple[list[list[Word]], list[str]]:
    """(the words that may stand in the place of each word, the keys that list values). Raises InputError."""
    choices, listed, numbers = [], [], []
    for number, word in enumerate(words):
        field, inside = settings.resolve(word.key.split("."))
        kind = str(settings.kinds.get(field)) if not inside else ""
        is_list = bool(re.search(r"\b(list|tuple|dict)\b", kind))
        is_text = not inside and settings.kinds.get(field) is str
        if is_text and re.match(r"\s*range\(", word.value):
            raise InputError(f"{word.key}={word.value}: a range is of numbers, and {word.key} is a text: list values "
                             f"instead, as in {word.key}=VALUE,VALUE")
        values = listed_values(word.key, word.value, is_list, sweeper.inclusive) if word.key else [word.value]
        choices.append([word._replace(value=value) for value in values])
        if values != [word.value]:
            listed.append(word.key)
            numbers.append(number)
    refuse_later(words, numbers, settings)
    return choices, listed


def meant(key: str, settings: Settings) -> tuple | str:
    """The place of a setting of the page, which may have several names; of others, the name."""
    field, inside = settings.resolve(key.split("."))
    return (field, *inside) if field else key


def refuse_later(words: list[Word], numbers: list[int], settings: Settings) -> None:
    """Raise InputError where a word for the same setting follows one that lists values, by its number.

    It would hold for all runs, as the last one does on a page.
    """
    places = [meant(word.key, settings) for word in words]
    for number in numbers:
        if places[number] in places[number + 1 :]:
            later = words[places.index(places[number], number + 1)]
            word = words[number]
            raise InputError(f"{word.head}{word.value} and {later.head}{later.value}: {word.key} is given twice, leave "
                             "one out")


def draw(combinations: list, trials: int | None, seed: int) -> list:
    """All combinations, or so many of them, drawn with this seed."""
    count = len(combinations)
    if trials is None:
        return combinations
    if trials >= count:
        note(f"trials = {trials}: {counted(count, 'combination')} in all, each is run once")
        return combinations
    note(f"trials = {trials} of {count} combinations, drawn with trials_seed = {seed}, not searched for")
    # The first of a shuffled list: more trials add runs, and keep those that there are.
    order = random.Random(seed).sample(range(count), count)
    return [combinations[number] for number in sorted(order[:trials])]


# ---------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------
def plan_runs(page: ModuleType, script: Path, words: list[Word], sweeper: Sweeper, cfg: Any) -> Grid:
    """The runs of a sweep, each checked by the page.

    Args:
        script: the page's file. words: of the page. cfg: settings of the sweep.
    Raises InputError; exits with the page's own errors.
    """
    settings = Settings(page.Config, getattr(page, "ALIASES", {}))
    words = words_of_study(words, settings, cfg)
    choices, listed = listed_words(words, settings, sweeper)
    constant = [word.head + word.value for word in words if word.key not in listed]
    studied = [f"{name}={getattr(cfg, name)}" for name in STUDIES if getattr(cfg, name)]
    reference, varied = None, [None]
    if studied:
        reference = settings_of(page, constant)
        varied = variations(page, reference, cfg) or varied
    if not listed and varied == [None]:
        for word in words:
            kind = settings.kinds.get(settings.resolve(word.key.split("."))[0])
            may_be_none = type(None) in get_args(kind)  # such as batch_col, of which empty is a value
            if word.key and not word.value and not may_be_none:
                raise InputError(f"{word.head}: the list is empty: {word.head}VALUE,VALUE lists two values")
        raise InputError("no setting lists values, as --lr=1e-3,1e-4 does, or --x=[1,2],[3] where x is a list itself: "
                         "list some, or run the page by itself")
    first = settings_of(page, [word.head + word.value for word, *_ in choices], show_notes=True)
    count = math.prod(map(len, choices)) * len(varied)
    if count > MOST_RUNS:
        raise InputError(f"the lists make {count} combinations, more than {MOST_RUNS}: list fewer values")
    # Nested loops, the variations innermost: a study that is stopped early is whole for the seeds it has.
    everything = list(itertools.product(*choices, varied))
    combinations = draw(everything, cfg.trials, cfg.trials_seed)

    # Where a single run would go, and beside it: the same command finds its sweep again. A study's runs are in it.
    default = first.out_dir
    if not cfg.study:
        default += f"_sweep_{digest(json.dumps([constant + studied, listed]))}"
    folder = store.on_disk(cfg.out_dir or default, COPIED)
    heads = named(listed, settings)
    runs = [make_run(page, combination, heads, variation, folder) for *combination, variation in combinations]
    if cfg.equal_parameters:
        sizes = resized(page, reference, [run.cfg for run in runs])
        runs = []
        for (*combination, variation), size in zip(combinations, sizes, strict=True):
            runs.append(make_run(page, combination, heads, variation, folder, size))
    names = [run.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{twice[0]} would be run twice: list each value once")
    return Grid(page, script, folder, runs, cfg.shard)


def words_of_study(words: list[Word], settings: Settings, cfg: Any) -> list[Word]:
    """The words with the names that a study has for some of them: its seeds, and no early stopping unless typed."""
    words = [seeds(word) if word.key in ("study_seeds", "study-seeds") else word for word in words]
    if cfg.study and "patience" in settings.kinds:
        if not any(says_patience(word) for word in words):
            words = [Word("patience", "--patience=", "0"), *words]
    return words


def says_patience(word: Word) -> bool:
    """Whether a word or the file that it names sets patience."""
    file = Path(word.value)
    if word.key or not file.is_file():
        return word.key.endswith("patience")
    return bool(re.search(r"(?m)^\s*[\w.\"]*patience\"?\s*[:=]", file.read_text(encoding="utf-8", errors="replace")))


def seeds(word: Word) -> Word:
    """study_seeds=[0,1] as seed=0,1."""
    return Word("seed", "--seed=", word.value.strip().strip("[]"))


def named(listed: list[str], settings: Settings) -> dict[str, str]:
    """{key that lists values: what it is called in names and tables}; the seed by that name, to be averaged over."""
    heads = dict(zip(listed, labels(listed), strict=True))
    for key in listed:
        if settings.resolve(key.split("."))[0] == "seed" and "seed" not in heads.values():
            heads[key] = "seed"
    return heads


def make_run(page: ModuleType, combination: Collection[Word], heads: dict[str, str], variation: Variation | None,
             folder: Path, sizes: dict[str, str] | None = None) -> Run:
    """A run of a sweep.

    Args:
        combination: all words of the page. heads: {key of those that list values: what it is called}.
        variation: of a study. sizes: {setting: value} beside.
    Raises InputError; exits with the page's own errors.
    """
    values = {heads[word.key]: plain(word.value) for word in combination if word.key in heads}
    sizes = sizes or {}
    words = [word.head + word.value for word in combination]
    for settings in (variation.settings if variation else {}, sizes):
        words += [f"--{name}={value}" for name, value in settings.items()]
    name = run_name(values)
    values |= sizes  # in the table; what follows from the others is in no name
    if variation:
        others = dict(values)
        for label in ("seed", *sizes):
            others.pop(label, None)
        name = f"{variation.name}_seed{settings_of(page, words).seed}"
        if others:
            name += "," + run_name(others)
        values = variation.values | values
    run = run_in(page, words, values, folder / name)
    run.data = variation.data if variation else None
    return run


def run_in(page: ModuleType, words: list[str], values: dict[str, str], place: Path) -> Run:
    """The run of a page's command line in this folder. Raises InputError; exits with the page's own errors."""
    words = [*words, f"--out_dir={place}"]
    cfg = settings_of(page, words)
    for setting in NO_TRAINING:
        value = getattr(cfg, setting, "")
        if value:
            raise InputError(f"{setting}={value} is no training of one model: run the page by itself")
    if Path(cfg.out_dir) != place:
        raise InputError(f"a setting puts the run {place.name} into {cfg.out_dir}: leave that out, --out_dir=FOLDER is "
                         "the folder of the sweep")
    # Which parameters a process of train_ghmm.py takes shows once it is built: before the first run, not at its turn.
    if hasattr(page, "build_process"):
        with rehearsal(f"the process of {place.name}", "mend it before it is swept over"):
            page.build_process(cfg)
    return Run(values, words, place, cfg)


def has_ended(run: Run, page: ModuleType, script: Path) -> bool:
    """Whether the run was trained to its end before. Raises InputError if its folder holds another run."""
    ended = (run.folder / "summary.json").exists()
    if not ended and not (run.folder / "last.pt").exists():
        return False
    try:
        summary = read_object(run.folder / "summary.json") if ended else {}
        saved = read_object(run.folder / "config.json")
        same_script = filecmp.cmp(run.folder / script.name, script, shallow=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{run.folder} holds no whole run of {script.name} ({reason(error)}): remove it") from error
    lines = differences(saved, run.cfg, getattr(page, "ALIASES", {}))
    changes = [line for line in lines if line.split(":")[0] not in checkpoint.NO_SETTINGS]
    if not same_script:
        changes.append(f"{script.name}: edited since")
    recorded = summary.get("data")
    if run.data and recorded and list(recorded.values()) != list(run.data.values()):
        changes.append(f"other data lie in {', '.join(run.data)} now")
    if not changes:
        return ended
    if getattr(run.cfg, "resume", "") == "never":
        return False
    raise InputError(f"{run.folder} holds another run ({'; '.join(changes)}): use another --out_dir, "
                     "or --resume=never to train it anew")
