"""The runs of a search: a line of settings with ranges becomes a study, and each of its trials a run of the page."""

import contextlib
import io
import json
import socket
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

from common import checkpoint, store
from common.errors import InputError, reason
from common.runlog import read_metrics, write_json
from configurator import Settings, note
from sources.jobs import is_free, take
from sources.outcomes import BOOK, append, read, record
from sources.runs import COPIED, STUDIES, Run, command, has_ended, make_folder, refuse_later, run_in, settings_of
from sources.search import Search, Space, Trial, import_optuna, in_words, open_search, read_space
from sources.shared import counted
from sources.sweeps import Sweeper, Word, digest, labels, listed_values, plain, run_name

# Settings of which a run's length, and where it is evaluated, depend.
LENGTHS = ("max_steps", "epochs", "eval_interval", "eval_epochs", "schedule_over", "patience", "budget",
           "budget_tokens")
JOURNAL = "study.journal"


class Trials:
    """A source of runs, as sources.runs.Grid is: the trials of a study, of which other processes may have a share.

    Its total is of the whole study.
    """

    def __init__(self, search: Search, plan: "Plan"):
        self.search, self.plan, self.folder = search, plan, plan.folder
        self.total, self.objective, self.prunes = plan.cfg.trials, plan.terms["objective"], plan.prunes
        self.book = self.folder / BOOK
        self.numbers: dict[str, int] = {}  # of the runs that this process has begun or taken over
        self.reported: dict[str, set[int]] = {}  # {name of a run: steps}
        self.is_own_journal = Path(search.place) == self.folder / JOURNAL

    def title(self) -> str:
        ended = self.count_ended()
        before = f", {ended} ended before" if ended else ""
        return f"a study of {counted(self.total, 'run')} of {self.plan.script.name} in {self.folder}{before}"

    def steps(self) -> dict[str, int | None]:
        return {}  # what waits is not known yet

    def next(self) -> Run | None:
        """A run that a killed process left, or one with settings that the study chooses; None where all are begun."""
        with self.alone():
            for trial in self.search.trials():
                if trial.state == "running" and trial.number not in self.numbers.values() and self.is_left(trial):
                    return self.begin(self.search.take_over(trial.number))
            asked = self.search.ask(self.total)
            if asked is None:
                return None
            return self.begin(asked)

    def ended(self, run: Run, status: str, code: int | None = None, seconds: float | None = None) -> dict:
        """Tell the study what came of a run, unless it was interrupted; returns its line of sweep.jsonl."""
        trial = self.trial_of(run)
        if code is None and trial.state != "running":  # of another process, which has told of it
            return self.line_of(trial, {})
        line = record(run.folder, run.values, status, code, seconds)
        if status == "pruned":
            line["value"] = trial.value
        append(self.book, line)
        if status == "done":
            self.report(run, read_metrics(run.folder))  # others are compared with all of it
        if status != "stopped":
            self.search.tell(trial.number, status, line.get("summary", {}).get(self.objective))
        return line

    def hopeless(self, run: Run, records: list[dict]) -> bool:
        """Report the evaluations of a run at work; whether it is to be stopped."""
        return self.report(run, records)

    def report(self, run: Run, records: list[dict]) -> bool:
        """Report what was not yet; whether the run was hopeless when it was evaluated last."""
        known, is_hopeless = self.reported.setdefault(run.name, set()), False
        for seen in records if self.prunes else ():
            value, step = seen.get(self.objective), seen.get("step")
            is_new = seen.get("split") == "eval" and step not in known
            if is_new and isinstance(value, float | int):
                known.add(step)
                is_hopeless = self.search.report(self.numbers[run.name], step, value)
        return is_hopeless

    def has_ended(self, run: Run) -> bool:
        """Whether a run is over, here or in another process."""
        if self.trial_of(run).state != "running":
            return True
        return has_ended(run, self.plan.page, self.plan.script)

    def count_ended(self) -> int:
        return len([trial for trial in self.search.trials() if trial.state != "running"])

    def trial_of(self, run: Run) -> Trial:
        return self.search.trials()[self.numbers[run.name]]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While one process begins a trial, no other of this folder takes it for one that was left."""
        with open(self.folder / "study.lock", "a") as lock:
            store.flock(lock)
            yield

    def begin(self, trial: Trial) -> Run:
        place = self.place_of(trial) or self.folder / self.name_of(trial)
        lock = take(place)
        self.search.place_of(trial.number, place)
        self.numbers[place.name] = trial.number
        run = self.plan.run_of(trial.values, place)
        run.lock = lock
        return run

    def is_left(self, trial: Trial) -> bool:
        """Whether nobody is at work on a trial that is said to be running."""
        place = self.place_of(trial)
        if place is None:
            # Killed before it had a folder. Whose journal is another's may run it where we cannot see.
            return self.is_own_journal
        # Its process may have ended it meanwhile: it tells of it before it lets go.
        return is_free(place) and self.search.trials()[trial.number].state == "running"

    def place_of(self, trial: Trial) -> Path | None:
        """The folder of a trial, where it is on this machine, or on a disk that it shares."""
        places = [self.folder / self.name_of(trial)]
        if trial.host == socket.gethostname():
            places.append(Path(trial.folder))
        return next((place for place in places if place.is_dir()), None)

    def name_of(self, trial: Trial) -> str:
        """trial0007,lr=0.000123,n_layers=4"""
        return f"trial{trial.number:04d},{run_name(shown_as(trial.values))}"

    def lines(self) -> list[dict]:
        """The lines of all runs of the study that have ended, also on other machines."""
        told = read(self.book)
        return [self.line_of(trial, told) for trial in self.search.trials() if trial.state != "running"]

    def line_of(self, trial: Trial, told: dict[str, dict]) -> dict:
        """The line of sweep.jsonl of a run that has ended in any process; told: {name: line} of those that it has."""
        folder, values, status = self.place_of(trial), shown_as(trial.values), trial.state
        has_summary = folder and (folder / "summary.json").exists()
        if has_summary and status == "failed":
            status = "done"  # for its page, but without the number that the study asks for
        if has_summary or (folder and status != "done"):
            before = told.get(folder.name, {})
            try:
                line = record(folder, values, status, before.get("exit_code"), before.get("seconds"))
            except (OSError, ValueError) as error:
                raise InputError(f"{folder} holds no whole run ({reason(error)}): remove it, the study goes on without "
                                 "it") from error
        else:
            line = {
                "run": self.name_of(trial),
                "status": status,
                "exit_code": None,
                "seconds": None,
                "folder": f"{trial.host}:{trial.folder}",
                "settings": values,
                "summary": {self.objective: trial.value},
                "last_lines": [],
            }
        if status == "pruned":
            line["value"] = trial.value
        return line

    def elsewhere(self) -> list[str]:
        """What is said of runs that others have not ended."""
        texts = []
        for trial in self.search.trials():
            if trial.state == "running":
                where = trial.host or "another machine"
                texts.append(f"{self.name_of(trial)}: at work on {where}, or left by a sweep that was killed there")
        return texts

    def is_whole(self) -> bool:
        return True  # whoever else is at work compares again

    def answer(self, less_is_better: bool) -> list[str]:
        """The command that repeats the best run, also in best.json, and which settings matter."""
        done = [trial for trial in self.search.trials() if trial.state == "done"]
        if not done:
            return []
        done.sort(key=lambda trial: trial.value, reverse=not less_is_better)
        best = done[0]
        # Beside the study: the folder of a run that names none may be taken.
        again = command(self.plan.script, [*self.plan.typed(best.values), f"--out_dir={self.folder}_best"])
        facts = {
            "run": self.name_of(best),
            self.objective: best.value,
            "settings": shown_as(best.values),
            "command": again,
        }
        write_json(self.folder / "best.json", facts)
        texts = [f"the best again: {again}"]
        shares = {name: f"{share:.2f}" for name, share in self.search.importances().items()}
        if shares:
            listed = ", ".join(f"{name} {share}" for name, share in shown_as(shares).items())
            texts.append(f"what tells the best quarter of {len(done)} runs from the others (PED-ANOVA): {listed}")
        return texts


# ---------------------------------------------------------------------------------------------------------------
# From a command line to a search
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Plan:
    """A search before anything is written.

    first: the page's Config of the first values. terms: facts that all runs of the study share. prunes: whether runs
    that are hopeless are stopped.
    """

    page: ModuleType
    script: Path
    words: list[Word]
    cfg: Any
    spaces: dict[str, Space]
    terms: dict[str, str]
    folder: Path
    first: Any
    less_is_better: bool
    prunes: bool

    @property
    def known(self) -> list:
        return [self.first]

    def commands(self) -> list[str]:
        """What was typed, with the number of runs and their place."""
        typed = command(self.script, [word.head + word.value for word in self.words])
        return [f"{typed}  # {counted(self.cfg.trials, 'run')} of a search in {self.folder}"]

    def open(self) -> Trials:
        """The study, made if it is not there. Raises InputError where that is another one, or cannot be used."""
        import_optuna()  # before anything is written
        cfg, folder = self.cfg, self.folder
        make_folder(folder)
        storage = cfg.storage or str(folder / JOURNAL)
        # In its own journal it is alone; in a database it needs a name of its own.
        name = cfg.study_name or (folder.name if cfg.storage else "study")
        search = open_search(storage, name, self.spaces, self.less_is_better, self.terms, cfg.sampler or "tpe",
                             cfg.trials_seed)
        return Trials(search, self)

    def run_of(self, values: dict[str, str], place: Path) -> Run:
        """The run of {setting: value} in a folder."""
        words = self.typed(values)
        shown = shown_as(values)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return run_in(self.page, words, shown, place)
        except (SystemExit, InputError):
            # Settings that do not go together: the run says so itself, and fails.
            return Run(shown, [*words, f"--out_dir={place}"], place, None)

    def typed(self, values: dict[str, str]) -> list[str]:
        """The page's words with these values."""
        return [word.head + values.get(word.key, word.value) for word in self.words]

    def check_ends(self) -> Any:
        """The Config of the first values. Every other end and every listed value is read by the page beside them."""
        firsts = {key: space.ends()[0] for key, space in self.spaces.items()}
        first = settings_of(self.page, self.typed(firsts), show_notes=True)
        for key, space in self.spaces.items():
            for value in space.ends()[1:]:
                settings_of(self.page, self.typed(firsts | {key: value}))
        return first


def shown_as(values: dict[str, str]) -> dict[str, str]:
    """{what a setting is called in names and tables: its value}."""
    texts = [plain(value) for value in values.values()]
    return dict(zip(labels(list(values)), texts, strict=True))


def read_spaces(words: list[Word], settings: Settings, sweeper: Sweeper, is_asked_for: bool) -> dict[str, Space]:
    """{key: what it is searched in}; none where the words have no range, and only lists or values.

    is_asked_for: whether lists alone are to be searched too. Raises InputError.
    """
    keyed = [word for word in words if word.key]
    ranges = [read_space(word.key, word.value, kind_of(word, settings)[0]) for word in keyed]
    if not any(ranges) and not is_asked_for:
        return {}
    spaces, numbers = {}, []
    for number, (word, space) in enumerate(zip(keyed, ranges, strict=True)):
        kind, is_list = kind_of(word, settings)
        space = space or read_space(word.key, word.value, kind, is_searched=True)
        if space is None:
            values = listed_values(word.key, word.value, is_list, sweeper.inclusive)
            space = Space(values=tuple(values)) if values != [word.value] else None
        if space:
            spaces[word.key] = space
            numbers.append(number)
    refuse_later(keyed, numbers, settings)
    if not spaces:
        raise InputError("there is nothing to search: no setting has a range, as lr=log:1e-5..1e-2, or lists values")
    return spaces


def kind_of(word: Word, settings: Settings) -> tuple[str, bool]:
    """(int, float or in words what else a setting is, "" where only the page knows; whether it is a list itself)."""
    field, inside = settings.resolve(word.key.split("."))
    kind = settings.kinds.get(field) if not inside else None
    if kind is None:
        return "", False
    is_union = typing.get_origin(kind) in (typing.Union, UnionType)
    bases = set()
    for option in typing.get_args(kind) if is_union else (kind,):
        base = typing.get_origin(option) or option
        if base is typing.Annotated:  # as a Count, which is an int
            base = typing.get_args(option)[0]
        bases.add(base)
    is_list = bool(bases & {list, tuple, dict})
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
    refuse(script.name, spaces, sweeper, cfg, objective, less_is_better)
    constant = [word for word in words if word.key not in spaces and finds_something(word)]
    typed = " ".join(f"{word.key}={word.value}" if word.key else word.value for word in constant)
    terms = {"page": script.name, "settings": typed, "objective": objective}
    plan = Plan(page, script, words, cfg, spaces, terms, Path(cfg.out_dir), None, less_is_better, cfg.prune)
    plan.first = plan.check_ends()
    # Beside a single run, by what is searched and what is not: the same command finds its study again.
    ranges = {key: in_words(space) for key, space in spaces.items()}
    facts = json.dumps([terms, ranges, cfg.study_name])
    default = f"{plan.first.out_dir}_search_{digest(facts)}"
    plan.folder = store.on_disk(cfg.out_dir or default, COPIED)
    for key in spaces:
        field, _ = settings.resolve(key.split("."))
        if field == "seed":
            note("seed is searched like any setting, and the best run may be the one with most luck")
        if field in lengths(plan.first) and plan.prunes:
            note(f"no run is stopped early: {key} is searched, so that equal steps are not equal progress")
            plan.prunes = False
    return plan


def refuse(script: str, spaces: dict[str, Space], sweeper: Sweeper, cfg: Any, objective: str, less_is_better: bool
           ) -> None:
    """Raise InputError for settings of a sweep that a search cannot have."""
    if cfg.trials is None:
        raise InputError(f"{next(iter(spaces))} is searched: say for how many runs, as in --trials=20")
    for name in STUDIES:
        if getattr(cfg, name):
            raise InputError(f"--{name} plans its runs, and a range is searched: sweep one, then the other")
    if cfg.shard:
        raise InputError("a search has no shards: the same command without --shard, several times at once, shares it")
    if not objective:
        raise InputError(f"{script} names no number to search by: give one, as in --objective=loss")
    less = "less" if less_is_better else "more"
    if sweeper.direction not in ("", "minimize" if less_is_better else "maximize"):
        raise InputError(f"hydra.sweeper.direction={sweeper.direction}: {script} is searched by {objective}, of which "
                         f"{less} is better: leave it out")


def lengths(cfg: Any) -> tuple[str, ...]:
    """The settings that decide how long a run is; the batch does where the length is in epochs."""
    return LENGTHS if getattr(cfg, "max_steps", None) else (*LENGTHS, "batch_size")


def finds_something(word: Word) -> bool:
    name = word.key.rpartition(".")[2]
    return name.replace("-", "_") not in checkpoint.NO_SETTINGS

