"""A search over settings: the ranges and lists that it is in, and the study of Optuna that chooses what is tried next.

    lr=log:1e-5..1e-2     uniform in log lr; also tag(log, interval(1e-5, 1e-2)), as Hydra writes it
    n_layers=int:2..8     2, 3, ... 8; int:2..8:2 has 2, 4, 6, 8; log:16..1024 of a setting that is a whole number
    dropout=0..0.5        uniform; 0..0.5:0.1 in steps; float: before it where the setting does not tell
    act=relu,gelu         a list: one of them

A study lives in a journal file or in a database, where any number of processes and machines share it. Akiba et al.,
Optuna: a next-generation hyperparameter optimization framework, KDD 2019; its TPE: Bergstra et al., NeurIPS 2011.
"""

import contextlib
import math
import os
import random
import re
import socket
import time
import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from common.errors import InputError, reason
from sources.sweeps import range_values, split_list

SAMPLERS = ("tpe", "random")
# Trials at random before TPE has enough of them to learn from: Optuna's default, and that of Simplexity's file.
RANDOM_TRIALS = 10
# Before a run is compared with others: so many runs must have come to their end, and this share of their steps be done.
# A learning rate that warms up looks hopeless at first.
RUNS_BEFORE_PRUNING = 5
STEPS_BEFORE_PRUNING = 1 / 4
DATABASE_ATTEMPTS = 4
FORMS = re.compile(r"((?:(?:log|int|float|logint):)*)(.*)", re.DOTALL)
IN_WORDS = "log:LOW..HIGH, int:LOW..HIGH, LOW..HIGH or LOW..HIGH:STEP"
# What a file of Simplexity searches, by the name of --config-name, in Hydra's words: simplexity/configs/experiment.yaml
# of commit 192039cfb09cadb7fafb74e071b9a4b739cda214.
SEARCHES = {
    "experiment": {
        "hydra/sweeper": "optuna",
        "hydra.sweeper.direction": "minimize",
        "hydra.sweeper.n_trials": "20",
        "hydra.sweeper.params.train.optimizer.instance.learning_rate": "tag(log, interval(1e-4, 1e-1))",
        "hydra.sweeper.params.train.batch_size": "choice(16, 32, 64, 128)",
        "hydra.sweeper.params.predictive_model.instance.hidden_size": "int(interval(32, 256))",
        "hydra.sweeper.params.predictive_model.instance.num_layers": "int(interval(1, 4))",
    },
}
SEARCHES["experiment.yaml"] = SEARCHES["experiment"]


class Space(NamedTuple):
    """What a setting is searched in: numbers from low to high, both included, or listed values as they are typed."""

    is_int: bool = False
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    values: tuple[str, ...] = ()

    def ends(self) -> list[str]:
        """What is to be checked before anything runs: both ends of a range, every value of a list."""
        return list(self.values) or [written(self, self.low), written(self, self.high)]


class Trial(NamedTuple):
    """A run as the study has it.

    state: running, done, pruned or failed. value: the objective, of a pruned run the last one that it reported.
    values: {setting: value to type}. host, folder: where it runs, "" while nobody said.
    """

    number: int
    state: str
    value: float | None
    values: dict[str, str]
    host: str
    folder: str


# ---------------------------------------------------------------------------------------------------------------
# Ranges
# ---------------------------------------------------------------------------------------------------------------
def read_space(key: str, text: str, kind: str = "", is_searched: bool = False) -> Space | None:
    """The range that key=text asks for; None where it is a value, or a list. Raises InputError.

    Args:
        kind: int, float, another name of a type, or "" where nobody knows.
        is_searched: whether range(1, 5), which lists numbers in a sweep, is a range of a search.
    """
    where = f"{key}={text}"
    forms, body = FORMS.fullmatch(text.strip()).groups()
    forms = set(re.findall("log|int|float", forms))
    numbers = re.fullmatch(r"([^.].*?|\.\d.*?)\.\.([^:]+?)(?::(.+))?", body)
    if re.match(r"(tag|int|float|interval)\(", body) and "interval(" in body:
        return checked(where, kind, *read_interval(where, body, forms))
    if is_searched and not forms and (call := re.fullmatch(r"range\((.*)\)", body)):
        return read_range(where, call[1])
    if kind in ("int", "float", "") and (forms or (numbers and is_number(numbers[1]))) and not numbers:
        raise InputError(f"{where}: expected {IN_WORDS}, of numbers")
    if numbers is None or not (forms or is_number(numbers[1]) or kind in ("int", "float")):
        return None
    if kind not in ("int", "float", "") and not (is_number(numbers[1]) and is_number(numbers[2])):
        return None
    is_int = "int" in forms or (kind == "int" and "float" not in forms)
    return checked(where, kind, is_int, "log" in forms, *numbers.groups())


def read_interval(where: str, text: str, forms: set[str]) -> tuple[bool, bool, str, str, None]:
    """(is_int, log, low, high, no step) of Hydra's interval(LOW, HIGH), in tag(log, ...), int(...) and float(...)."""
    casts, inner = [], text.strip()
    while call := re.fullmatch(r"(tag|int|float)\((.*)\)", inner, re.DOTALL):
        *tags, inner = split_list(call[2])
        if call[1] == "tag":
            forms = forms | set(tags)
        else:
            casts.append(call[1])
    call = re.fullmatch(r"interval\((.*)\)", inner, re.DOTALL)
    ends = [part.removeprefix(name).strip(" =") for name, part in zip(("start", "end"), split_list(call[1]),
                                                                      strict=False)] if call else []
    if len(ends) != 2 or call[1].count(",") != 1:
        raise InputError(f"{where}: expected interval(LOW, HIGH), tag(log, interval(LOW, HIGH)) or int(interval(LOW, "
                         "HIGH)), of numbers")
    # As hydra-optuna-sweeper has it: whole numbers between ends that are written as whole numbers.
    whole = all(re.fullmatch(r"[+-]?\d+", end) for end in ends)
    is_int = casts[0] == "int" if casts else whole
    if is_int and casts:
        ends = [str(int(float(end))) if is_number(end) and math.isfinite(float(end)) else end for end in ends]
    return is_int, "log" in forms, ends[0], ends[1], None


def read_range(where: str, inner: str) -> Space:
    """Hydra's range(START, STOP, STEP), whose STOP Optuna draws too."""
    values = range_values(where, inner, inclusive=True)
    if len(values) == 1:
        return Space(values=tuple(values))
    low, high = sorted((values[0], values[-1]), key=Decimal)
    step = abs(Decimal(values[1]) - Decimal(values[0]))
    is_int = all(Decimal(value) % 1 == 0 for value in values)
    return Space(is_int, float(low), float(high), step=float(step))


def checked(where: str, kind: str, is_int: bool, log: bool, low: str, high: str, step: str | None) -> Space:
    """The range of these words. Raises InputError where there is none, or where a setting of this kind has none."""
    key = where.partition("=")[0]
    if kind not in ("int", "float", ""):
        raise InputError(f"{where}: a range is of numbers, and {key} is {kind}: list values instead, as in "
                         f"{key}=VALUE,VALUE")
    if not all(map(is_number, (low, high, step or "1"))):
        raise InputError(f"{where}: expected {IN_WORDS}, of numbers")
    ends = float(low), float(high)
    if not all(map(math.isfinite, ends)):
        raise InputError(f"{where}: both ends of a range must be finite")
    if kind == "int" and not is_int:
        raise InputError(f"{where}: {key} is a whole number: {key}=int:LOW..HIGH")
    if is_int and not all(end.is_integer() for end in ends):
        raise InputError(f"{where}: the ends of a range of whole numbers must be whole numbers")
    if ends[0] >= ends[1]:
        raise InputError(f"{where}: a range goes from LOW up to HIGH, and {low} is not below {high}")
    if log and ends[0] <= 0:
        raise InputError(f"{where}: a logarithm needs LOW above 0, not {low}")
    if step is None:
        return Space(is_int, *ends, log)
    width = float(step)
    if log:
        raise InputError(f"{where}: there are no steps in a range of logarithms: leave :{step} out")
    if not 0 < width <= ends[1] - ends[0] or (is_int and not width.is_integer()):
        raise InputError(f"{where}: STEP must be above 0 and no wider than the range, and whole where that is")
    return Space(is_int, *ends, step=width)


def is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def written(space: Space, value: Any) -> str:
    """A value of a space as it is typed: what is trained with is what the folder, the table and the command say.

    A float gets the fewest digits, four at least, that move it by less than 1/10,000 of its range.
    """
    if space.values:
        return value
    if space.is_int:
        return str(int(value))
    scale = math.log if space.log else float
    width = scale(space.high) - scale(space.low)
    for digits in range(4, 18):
        text = f"{value:.{digits}g}"
        near = float(text)
        if space.low <= near <= space.high and abs(scale(near) - scale(value)) < 1e-4 * width:
            break
    return text


# ---------------------------------------------------------------------------------------------------------------
# The study
# ---------------------------------------------------------------------------------------------------------------
def import_optuna() -> ModuleType:
    """Optuna, silent: what is worth a line is printed by the sweep. Raises InputError where it is missing."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend  # noqa: F401, of version 4 on
    except ImportError as error:
        raise InputError("a search over ranges needs the package optuna, version 4 or later: pip install -U "
                         "optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextlib.contextmanager
def plainly(place: str) -> Iterator[None]:
    """What Optuna and a database raise becomes an InputError that names the place; their warnings are not shown."""
    from sqlalchemy.exc import SQLAlchemyError

    optuna = import_optuna()
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        except InputError:
            raise
        except (optuna.exceptions.OptunaError, SQLAlchemyError, ImportError, OSError, ValueError) as error:
            cause = error.__cause__ or error  # of a database: what its driver says
            raise InputError(f"the study in {place} cannot be used ({without_password(reason(cause))}): mend that, or "
                             "use another --storage") from error


def without_password(text: str) -> str:
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


class Search:
    """A study and the spaces of its settings. Every method raises InputError where the storage cannot be used."""

    def __init__(self, study: Any, place: str, spaces: dict[str, Space], sampler: str, seed: int):
        self.study, self.place, self.spaces, self.sampler, self.seed = study, place, spaces, sampler, seed

    def trials(self) -> list[Trial]:
        """All that were begun, by number."""
        with plainly(self.place):
            return [self.told(frozen) for frozen in self.frozen_trials() if frozen.state.name != "WAITING"]

    def ask(self, total: int) -> Trial | None:
        """The next trial of a study of `total`, which nobody else gets; None where all were begun."""
        with plainly(self.place):
            if len([frozen for frozen in self.frozen_trials() if frozen.state.name != "WAITING"]) >= total:
                return None
            trial = self.study.ask()
            if trial.number >= total:
                # Another process took the last one since. This one waits for who asks for more.
                waiting = import_optuna().trial.TrialState.WAITING
                self.study._storage.set_trial_state_values(trial._trial_id, waiting)
                return None
            return self.suggested(trial)

    def take_over(self, number: int) -> Trial:
        """A trial that a killed process left running, with its settings; chosen now if that process had not yet."""
        with plainly(self.place):
            return self.suggested(self.handle(number))

    def place_of(self, number: int, folder: Path) -> None:
        """Say that a trial runs on this machine, in this folder."""
        with plainly(self.place):
            trial = self.handle(number)
            trial.set_user_attr("host", socket.gethostname())
            trial.set_user_attr("folder", str(folder.resolve()))

    def report(self, number: int, step: int, value: float) -> bool:
        """Note the objective of a running trial at a step; returns whether the trial is hopeless.

        It is where the best of its values so far is worse than the median of the other runs' values at this step.
        """
        optuna = import_optuna()
        with plainly(self.place):
            trial = self.handle(number)
            if step not in self.frozen(number).intermediate_values:  # as a resumed run comes by again
                trial.report(value, step)
            done = [frozen for frozen in self.frozen_trials() if frozen.state.name == "COMPLETE"]
            length = max((max(frozen.intermediate_values, default=0) for frozen in done), default=0)
            if step >= length:  # the end of a run, or longer than any: nothing is to be spared, or to compare with
                return False
            passed = int(length * STEPS_BEFORE_PRUNING)
            # Of at least so many runs that were evaluated at this very step.
            enough = RUNS_BEFORE_PRUNING
            self.study.pruner = optuna.pruners.MedianPruner(enough, passed, n_min_trials=enough)
            return trial.should_prune()

    def tell(self, number: int, state: str, value: float | None = None) -> Trial:
        """End a trial: done with its objective, pruned or failed. Done without an objective is failed."""
        with plainly(self.place):
            states = import_optuna().trial.TrialState
            if state == "done" and value is not None and math.isfinite(value):
                self.study.tell(number, value, skip_if_finished=True)
            else:
                ending = states.PRUNED if state == "pruned" else states.FAIL
                self.study.tell(number, state=ending, skip_if_finished=True)
            return self.told(self.frozen(number))

    def importances(self) -> dict[str, float]:
        """{setting: its share}, the largest first, of what makes a run one of the best; none of few runs or settings.

        PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023) of the quarter of the runs that came out best.
        """
        optuna = import_optuna()
        with plainly(self.place):
            done = [frozen for frozen in self.frozen_trials() if frozen.state.name == "COMPLETE"]
            if len(self.spaces) < 2 or len(done) < 2 * RANDOM_TRIALS or len({frozen.value for frozen in done}) < 4:
                return {}
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            return optuna.importance.get_param_importances(self.study, evaluator=evaluator)

    def frozen_trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def frozen(self, number: int) -> Any:
        return self.frozen_trials()[number]

    def handle(self, number: int) -> Any:
        """What a running trial is asked and told by, also where another process had begun it."""
        return import_optuna().trial.Trial(self.study, self.frozen(number)._trial_id)

    def suggested(self, trial: Any) -> Trial:
        """A trial with a value for each setting, from the study if it has them already."""
        # A stream of numbers of its own for each trial: processes that begin together do not draw the same, and a study
        # that goes on draws what it would have drawn at once.
        self.study.sampler = make_sampler(self.sampler, random.Random(f"{self.seed} {trial.number}").getrandbits(32))
        for name, space in self.spaces.items():
            if space.values:
                trial.suggest_categorical(name, space.values)
            elif space.is_int:
                trial.suggest_int(name, int(space.low), int(space.high), step=int(space.step or 1), log=space.log)
            else:
                trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)
        return self.told(self.frozen(trial.number))

    def told(self, frozen: Any) -> Trial:
        states = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
        values = {}
        for name, space in self.spaces.items():
            if name in frozen.params:
                values[name] = written(space, frozen.params[name])
        value = frozen.value
        if value is None and frozen.intermediate_values:
            value = frozen.intermediate_values[max(frozen.intermediate_values)]
        notes = frozen.user_attrs
        return Trial(frozen.number, states.get(frozen.state.name, "running"), value, values, notes.get("host", ""),
                     notes.get("folder", ""))


def make_sampler(name: str, seed: int) -> Any:
    samplers = import_optuna().samplers
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    # constant_liar: what others are at work on counts as bad, so that nobody tries the same beside them.
    return samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed, constant_liar=True)


def open_search(storage: str, name: str, spaces: dict[str, Space], less_is_better: bool, terms: dict[str, Any],
                sampler: str = "tpe", seed: int = 0) -> Search:
    """The study of a name in a storage, made if it is not there.

    Args:
        storage: path of a journal file, made if missing, or URL of a database, as in sqlite:///study.db.
        spaces: {setting: what it is searched in}.
        terms: plain facts, such as the page and its constant settings, that the runs of a study have in common.
        sampler: of SAMPLERS.
        seed: of what the sampler draws. With one run at a time the same seed gives the same study.

    Raises:
        InputError: there is no Optuna; the storage cannot be used; the study there is of other spaces or terms.
    """
    place = without_password(storage)
    optuna = import_optuna()
    with plainly(place):
        study = optuna.create_study(storage=open_storage(storage), study_name=name, load_if_exists=True,
                                    direction="minimize" if less_is_better else "maximize")
        ranges = {key: in_words(space) for key, space in spaces.items()}
        asked = terms | ranges | {"direction": study.direction.name.lower()}
        before = study.user_attrs.get("search")
        if before is None:
            study.set_user_attr("search", asked)
            before = asked
        if study.direction.name.lower() != ("minimize" if less_is_better else "maximize"):
            raise InputError(f"the study {name!r} in {place} is to {study.direction.name.lower()} its objective, which "
                             "here is the other way round: use another --study_name")
        for key in asked | before:
            if asked.get(key) != before.get(key):
                old, new = (str(of.get(key, "not there")) for of in (before, asked))
                raise InputError(f"the study {name!r} in {place} has {key} = {old}, and here it is {new}: go on with "
                                 "what it has, or use another --study_name and --out_dir")
        return Search(study, place, spaces, sampler, seed)


def open_storage(storage: str) -> Any:
    """A journal file by its path, or a database by its URL."""
    optuna = import_optuna()
    if "://" in storage:
        return open_database(storage)
    journal = optuna.storages.journal
    path = Path(storage).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # O_EXCL is atomic over NFS since version 3, where flock may not be.
    lock = journal.JournalFileOpenLock(str(path))
    mend_journal(path, lock)
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=lock))


def mend_journal(path: Path, lock: Any) -> None:
    """Take off a last line that a full disk or a power cut tore, which the next one would be written onto."""
    if not path.exists():
        return
    lock.acquire()
    try:
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
    finally:
        lock.release()


def open_database(url: str) -> Any:
    from sqlalchemy.exc import IntegrityError, SQLAlchemyError

    # SQLite's own patience of 5 s is short where several processes write.
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    for attempt in range(DATABASE_ATTEMPTS):
        try:
            return import_optuna().storages.RDBStorage(url, engine_kwargs=options)
        except SQLAlchemyError as error:
            # Of processes that make the tables of a new database at once, all but one come to this.
            made_meanwhile = isinstance(error, IntegrityError) or "already exists" in str(error)
            if not made_meanwhile or attempt == DATABASE_ATTEMPTS - 1:
                raise
            time.sleep(0.2 * (attempt + 1))


def in_words(space: Space) -> str:
    """A space as it can be typed."""
    if space.values:
        return ",".join(space.values)
    forms = ("log:" if space.log else "") + ("int:" if space.is_int else "float:")
    low, high = written(space, space.low), written(space, space.high)
    step = f":{space.step:g}" if space.step else ""
    return f"{forms}{low}..{high}{step}"
