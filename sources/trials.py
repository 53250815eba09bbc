"""The runs of a search: a line of settings with ranges becomes a study, and each of its trials a run of the page."""

import contextlib
import fcntl
import io
import json
import re
import socket
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, NamedTuple

from common import checkpoint
from common.errors import InputError
from common.jobs import is_free, take
from common.runlog import read_metrics
from configurator import Settings, note
from sources.runs import STUDIES, Run, has_ended, run_in, settings_of
from sources.search import Search, Space, Trial, in_words, open_search, read_space
from sources.sweeps import Sweeper, Word, digest, labels, listed_values, plain, run_name

# Settings of which a run's length, and where it is evaluated, depend.
LENGTHS = ("max_steps", "epochs", "eval_interval", "eval_epochs", "schedule_over", "patience", "budget")
JOURNAL = "study.journal"


class Trials:
    """A source of runs, as sources.runs.Grid is: the trials of a study, of which other processes may have a share.

    Args:
        run_of: makes the run of {setting: value} in a folder.
        total: trials of the whole study. objective: its name in summary.json and in metrics.jsonl.
        prunes: whether to stop runs that are hopeless.
    """

    def __init__(self, search: Search, run_of: Callable[[dict[str, str], Path], Run], folder: Path, total: int,
                 objective: str, prunes: bool):
        self.search, self.run_of, self.folder, self.total = search, run_of, folder, total
        self.objective, self.prunes = objective, prunes
        self.numbers: dict[str, int] = {}  # of the runs that this process has begun or taken over
        self.reported: dict[str, set[int]] = {}  # {name of a run: steps}
        self.is_own_journal = Path(search.place) == folder / JOURNAL

    def next(self) -> Run | None:
        """A run that a killed process left, or one with settings that the study chooses; None where all are begun."""
        with self.alone():
            for trial in self.search.trials():
                if trial.state == "running" and trial.number not in self.numbers.values() and self.is_left(trial):
                    return self.begin(self.search.take_over(trial.number))
            trial = self.search.ask(self.total)
            return self.begin(trial) if trial else None

    def ended(self, run: Run, told: dict) -> None:
        """Tell the study what came of a run, by its line of sweep.jsonl. One that was interrupted goes on later."""
        if told["status"] == "stopped":
            return
        if told["status"] == "done":
            self.report(run, read_metrics(run.folder))  # others are compared with all of it
        value = told.get("summary", {}).get(self.objective)
        self.search.tell(self.numbers[run.name], told["status"], value)

    def hopeless(self, run: Run, records: list[dict]) -> bool:
        """Report the evaluations of a run at work; whether it is to be stopped."""
        return self.report(run, records)

    def report(self, run: Run, records: list[dict]) -> bool:
        """Report what was not yet; whether the run was hopeless when it was evaluated last."""
        known, is_hopeless = self.reported.setdefault(run.name, set()), False
        for record in records if self.prunes else ():
            value, step = record.get(self.objective), record.get("step")
            if record.get("split") == "eval" and isinstance(value, float | int) and step not in known:
                known.add(step)
                is_hopeless = self.search.report(self.numbers[run.name], step, value)
        return is_hopeless

    def has_ended(self, run: Run, page: ModuleType, script: Path) -> bool:
        """Whether a run is over, here or in another process."""
        return self.trial_of(run).state != "running" or has_ended(run, page, script)

    def count_ended(self) -> int:
        return len([trial for trial in self.search.trials() if trial.state != "running"])

    def trial_of(self, run: Run) -> Trial:
        return self.search.trials()[self.numbers[run.name]]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While one process begins a trial, no other of this folder takes it for one that was left."""
        with open(self.folder / "study.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def begin(self, trial: Trial) -> Run:
        place = self.place_of(trial) or self.folder / self.name_of(trial)
        lock = take(place)
        self.search.place_of(trial.number, place)
        self.numbers[place.name] = trial.number
        run = self.run_of(trial.values, place)
        run.lock = lock
        return run

    def is_left(self, trial: Trial) -> bool:
        """Whether nobody is at work on a trial that is said to be running."""
        place = self.place_of(trial)
        if place is None:
            # Killed before it had a folder. Whose journal is another's may run it where we cannot see.
            return self.is_own_journal
        return is_free(place)

    def place_of(self, trial: Trial) -> Path | None:
        """The folder of a trial, where it is on this machine, or on a disk that it shares."""
        places = [self.folder / self.name_of(trial)]
        if trial.host == socket.gethostname():
            places.append(Path(trial.folder))
        return next((place for place in places if place.is_dir()), None)

    def name_of(self, trial: Trial) -> str:
        """trial0007,lr=0.000123,n_layers=4"""
        return f"trial{trial.number:04d},{run_name(self.labelled(trial.values))}"

    def labelled(self, values: dict[str, str]) -> dict[str, str]:
        """{what a setting is called in names and tables: its value}."""
        shown = [plain(value) for value in values.values()]
        return dict(zip(labels(list(values)), shown, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# From a command line to a search
# ---------------------------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """A search before anything is written: its spaces, folder, the Config of the first values, and what opens it."""

    spaces: dict[str, Space]
    folder: Path
    first: Any
    open: Callable[[], Trials]


def read_spaces(words: list[Word], settings: Settings, sweeper: Sweeper, is_asked_for: bool) -> dict[str, Space]:
    """{key: what it is searched in}; none where the words have no range, and only lists or values.

    is_asked_for: whether lists alone are to be searched too. Raises InputError.
    """
    ranges, spaces = {}, {}
    for word in words:
        kind, _ = kind_of(word, settings)
        space = read_space(word.key, word.value, kind) if word.key else None
        if space:
            ranges[word.key] = space
    if not ranges and not is_asked_for:
        return {}
    for word in words:
        if not word.key:
            continue
        kind, is_list = kind_of(word, settings)
        space = ranges.get(word.key) or read_space(word.key, word.value, kind, is_searched=True)
        if space is None:
            values = listed_values(word.key, word.value, is_list, sweeper.inclusive)
            space = Space(values=tuple(values)) if values != [word.value] else None
        if space and word.key in spaces:
            raise InputError(f"{word.key} is searched twice: give it one range or one list")
        if space:
            spaces[word.key] = space
    if not spaces:
        raise InputError("there is nothing to search: no setting has a range, as lr=log:1e-5..1e-2, or lists values")
    return spaces


def kind_of(word: Word, settings: Settings) -> tuple[str, bool]:
    """(int, float or in words what else a setting is, "" where only the page knows; whether it is a list itself)."""
    field, inside = settings.resolve(word.key.split("."))
    kind = settings.kinds.get(field) if not inside else None
    if kind is None:
        return "", False
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)
    bases = []
    for option in options:
        ranged = typing.get_origin(option) is typing.Annotated
        bases.append(typing.get_args(option)[0] if ranged else typing.get_origin(option) or option)
    is_list = bool({list, tuple, dict}.intersection(bases))
    for base, name in ((float, "float"), (int, "int"), (str, "a text"), (bool, "a switch")):
        if base in bases:
            return name, is_list
    return "no number", is_list


def plan_search(page: ModuleType, script: Path, words: list[Word], sweeper: Sweeper, cfg: Any, objective: str,
                less_is_better: bool) -> Plan | None:
    """The search that the words ask for, its ends checked by the page; None where they ask for none.

    Args:
        words: of the page. cfg: settings of the sweep. objective: a name in summary.json, "" where the page has none.
    Raises InputError; exits with the page's own errors.
    """
    settings = Settings(page.Config, getattr(page, "ALIASES", {}))
    spaces = read_spaces(words, settings, sweeper, cfg.sampler is not None)
    if not spaces:
        return None
    key, space = next(iter(spaces.items()))
    if cfg.trials is None:
        raise InputError(f"{key}={in_words(space)} is searched: say for how many runs, as in --trials=20")
    for name in STUDIES:
        if getattr(cfg, name):
            raise InputError(f"--{name} plans its runs, and a range is searched: sweep one, then the other")
    if not objective:
        raise InputError(f"{script.name} names no number to search by: list values instead, as in lr=1e-3,1e-4")
    if sweeper.direction not in ("", "minimize" if less_is_better else "maximize"):
        raise InputError(f"hydra.sweeper.direction={sweeper.direction}: {script.name} is searched by {objective}, of "
                         f"which {'less' if less_is_better else 'more'} is better: leave it out")
    first = check_ends(page, words, spaces)
    constant = [word for word in words if word.key not in spaces]
    terms = {"page": script.name, "settings": " ".join(map(without_sign, filter(finds_something, constant)))}
    facts = [terms, {key: in_words(space) for key, space in spaces.items()}, cfg.study_name]
    folder = checkpoint.local_folder(cfg.out_dir or f"{first.out_dir}_search_{digest(json.dumps(facts))}")
    storage = cfg.storage or str(folder / JOURNAL)
    name = cfg.study_name or (folder.name if cfg.storage else "study")
    prunes = cfg.prune
    varying = [key for key in spaces if settings.resolve(key.split("."))[0] in lengths(first)]
    if prunes and varying:
        note(f"no run is stopped early: {varying[0]} is searched, so that equal steps are not equal progress")
        prunes = False

    def run_of(values: dict[str, str], place: Path) -> Run:
        typed = [word.head + values.get(word.key, word.value) for word in words]
        shown = dict(zip(labels(list(values)), map(plain, values.values()), strict=True))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return run_in(page, typed, shown, place)
        except SystemExit:  # settings that do not go together: the run says so itself, and fails
            return Run(shown, [*typed, f"--out_dir={place}"], place, None)

    def open_it() -> Trials:
        folder.mkdir(parents=True, exist_ok=True)
        search = open_search(storage, name, spaces, less_is_better, terms, cfg.sampler or "tpe", cfg.trials_seed)
        return Trials(search, run_of, folder, cfg.trials, objective, prunes)

    return Plan(spaces, folder, first, open_it)


def check_ends(page: ModuleType, words: list[Word], spaces: dict[str, Space]) -> Any:
    """The Config of the first values; every end of a range and every listed value is read by the page beside them."""
    firsts = {key: space.ends()[0] for key, space in spaces.items()}

    def typed(values: dict[str, str]) -> list[str]:
        return [word.head + values.get(word.key, word.value) for word in words]

    first = settings_of(page, typed(firsts), show_notes=True)
    for key, space in spaces.items():
        for value in space.ends()[1:]:
            settings_of(page, typed(firsts | {key: value}))
    return first


def lengths(cfg: Any) -> tuple[str, ...]:
    """The settings that decide how long a run is; the batch does where the length is in epochs."""
    return LENGTHS if getattr(cfg, "max_steps", None) else (*LENGTHS, "batch_size")


def finds_something(word: Word) -> bool:
    return re.split("[.]", word.key)[-1].replace("-", "_") not in checkpoint.NO_SETTINGS


def without_sign(word: Word) -> str:
    return f"{word.key}={word.value}" if word.key else word.value
