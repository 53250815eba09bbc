"""The words of a sweep's command line: what is listed, what a run is called, and what Hydra's words mean here."""

import hashlib
import re
from collections import deque
from collections.abc import Collection
from decimal import Decimal
from typing import NamedTuple

from common.errors import InputError

HYDRA = re.compile(r"hydra[./]")  # how the names of Hydra's own settings begin
# Hydra's name of what sweep.py has too.
OURS = {
    "hydra.sweep.dir": "out_dir",
    "hydra.sweeper.n_jobs": "jobs",  # of Optuna's
    "hydra.launcher.n_jobs": "jobs",
    "hydra.sweeper.n_trials": "trials",
    "hydra.sweeper.sampler.seed": "trials_seed",
    "hydra.sweeper.storage": "storage",
    "hydra.sweeper.study_name": "study_name",
}
PARAMS = "hydra.sweeper.params."
SWEEPERS = ("basic", "optuna")
# Optuna's samplers, by Hydra's name and by that of their class, and what the setting sampler has; none of a grid.
OPTUNA_SAMPLERS = {"tpe": "tpe", "TPESampler": "tpe", "random": "random", "RandomSampler": "random"}
GRIDS = ("grid", "GridSampler")
LAUNCHERS = ("basic", "joblib")
OPTUNA_TRIALS = "20"  # hydra-optuna-sweeper 1.3: n_trials where nobody says
# What Hydra does with values beyond listing them.
ABSENT = ("interval", "tag", "int", "float", "str", "bool", "json_str", "sort", "shuffle", "glob", "extend_list")
READ_HERE = (
    "hydra/sweeper", "hydra/launcher", "hydra.mode", "hydra/sweeper/sampler", "hydra.sweeper.sampler._target_",
    "hydra.sweeper.direction", "hydra.sweeper._target_",
)  # fmt: skip
CONFIG_NAME = "config_name"
MOST_VALUES = 10_000  # of one range
PAIRS = {"(": ")", "[": "]", "{": "}"}


class Word(NamedTuple):
    """A word as it was typed, head + value; key is the setting that it gives a value, "" of a file or a switch."""

    key: str
    head: str
    value: str


class Sweeper(NamedTuple):
    """What the words that begin with hydra mean here.

    ours: {setting of sweep.py: value as written}. params: {setting of the page: values as written}. unused: words
    without effect here. inclusive: whether range(1, 4) has the 4, as it does where Optuna draws from it. direction:
    minimize, maximize, or "" where nobody says.
    """

    ours: dict[str, str]
    params: dict[str, str]
    unused: list[str]
    inclusive: bool
    direction: str = ""


# ---------------------------------------------------------------------------------------------------------------
# Words and the values that they list
# ---------------------------------------------------------------------------------------------------------------
def take_apart(argv: list[str], own_names: Collection[str], switches: Collection[str] = ()
               ) -> tuple[dict[str, str], list[Word]]:
    """({own name: value}, the other words): --key=value, --key value, key=value, switches and files.

    switches: own names that need no value. Raises InputError for another without one.
    """
    own, words = {}, []
    left = deque(argv)
    while left:
        typed = left.popleft()
        switch = typed.removeprefix("--").replace("-", "_")
        if typed.startswith("--") and switch.removeprefix("no_") in switches:
            own[switch.removeprefix("no_")] = str(not switch.startswith("no_"))
            continue
        match = re.fullmatch(r"(--|\+{0,2})(\w[\w./@-]*)=(.*)", typed, re.DOTALL)
        is_word = left and not left[0].startswith("--") and not re.match(r"\+{0,2}\w[\w./@-]*=", left[0])
        if not match and typed.startswith("--") and is_word:
            # A switch before a file looks the same. It is left alone, as is a single value, which the page reads.
            name = typed[2:].replace("-", "_")
            if re.search("[,(]", left[0]) or name in own_names or name == CONFIG_NAME:
                match = re.fullmatch(r"(--)(.*?)=(.*)", f"{typed}={left.popleft()}", re.DOTALL)
        if not match and typed.startswith("--") and switch in own_names:
            raise InputError(f"{typed} needs a value: {typed}=VALUE")
        if not match:
            words.append(Word("", "", typed))
            continue
        sign, key, value = match.groups()
        name = key.replace("-", "_")
        if name in own_names:
            own[name] = value
        else:
            words.append(Word(key, f"{sign}{key}=", value))
    return own, words


def split_list(text: str) -> list[str]:
    """The parts between the commas of a text that are inside of neither brackets nor quotes."""
    parts, inside, quote, begin = [], [], "", 0
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and not text[begin:place].strip(" [({"):
            quote = sign  # one at the beginning of a part; that of "don't" is a letter
        elif sign in PAIRS:
            inside.append(PAIRS[sign])
        elif inside and sign == inside[-1]:
            inside.pop()
        elif sign == "," and not inside:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]


def listed_values(key: str, text: str, is_list: bool = False, inclusive: bool = False) -> list[str]:
    """The values that key=text lists: one, unless a sweep was asked for. Raises InputError.

    Args:
        is_list: the setting is a list itself, so that 1,2 is one value of it, and [1,2],[3] are two.
        inclusive: of Sweeper.
    """
    call = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", text, re.DOTALL)
    name, inner = call.groups() if call else ("", "")
    if name in ABSENT:
        raise InputError(f"{key}={text}: {name}() is not read: list values instead, as in {key}=VALUE,VALUE")
    if name == "range":
        values = range_values(f"{key}={text}", inner, inclusive)
    else:
        values = split_list(inner if name == "choice" else text)
        if is_list and name != "choice" and not all(value.startswith(tuple(PAIRS)) for value in values):
            return [text]
        if len(values) == 1 and name != "choice":
            return [text]
    if "" in values:
        raise InputError(f"{key}={text}: one of the listed values is empty: {key}=VALUE,VALUE lists two")
    return [unquoted(value) for value in values]


def unquoted(text: str) -> str:
    """A value without the quotes that kept its commas together."""
    quoted = re.fullmatch(r"(['\"])(.*)\1", text, re.DOTALL)
    return quoted[2] if quoted else text


def range_values(where: str, inner: str, inclusive: bool) -> list[str]:
    """The numbers of range(stop), range(start, stop) or range(start, stop, step). Raises InputError."""
    named = {"start": "0", "step": "1"}
    plain = []
    for part in inner.split(","):
        name, equals, number = part.partition("=")
        if equals:
            named[name.strip()] = number
        else:
            plain.append(part)
    names = ("stop",) if len(plain) == 1 and "stop" not in named else ("start", "stop", "step")
    named |= dict(zip(names, plain, strict=False))
    try:
        # Decimal numbers: ten steps of 0.1 are 1.
        start, stop, step = (Decimal(named.pop(name).strip()) for name in ("start", "stop", "step"))
        steps = (stop - start) / step
    except (KeyError, ArithmeticError):
        steps = Decimal("nan")
    if named or len(plain) > 3 or not steps.is_finite():
        raise InputError(f"{where}: expected range(STOP), range(START, STOP) or range(START, STOP, STEP), of numbers")
    if steps < 0 or (steps == 0 and not inclusive):
        raise InputError(f"{where}: there is no number from {start} up to {stop} by steps of {step}")
    if steps > MOST_VALUES:
        raise InputError(f"{where}: more than {MOST_VALUES} values")
    values = [start + number * step for number in range(int(steps) + 1)]
    if values[-1] == stop and not inclusive:
        values.pop()
    return [f"{value:f}" for value in values]


# ---------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------
def labels(keys: list[str]) -> list[str]:
    """What dotted keys are called: by their last part, where no two have the same."""
    last_parts = [re.split("[.@]", key)[-1] for key in keys]
    return [part if last_parts.count(part) == 1 else key for part, key in zip(last_parts, keys, strict=True)]


def run_name(values: dict[str, str]) -> str:
    """The name of the folder of a run, of {what differs: its value}."""
    name = ",".join(f"{safe(label)}={safe(value)}" for label, value in values.items())
    if len(name) > 200:  # a file system takes 255 bytes
        name = f"{name[:190]}-{digest(name)}"
    return name or "run"


def plain(text: str) -> str:
    """A number in the one way to write it, 0.001 for 1e-3; any other text as it is."""
    if re.fullmatch(r"[+-]?\d+", text):
        return str(int(text))
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def safe(text: str) -> str:
    """A text as a part of a file name; where signs had to go, a digest keeps it apart from its likes."""
    name = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-")[:60]
    return text if name == text else f"{name}-{digest(text)}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


# ---------------------------------------------------------------------------------------------------------------
# Hydra's sweepers
# ---------------------------------------------------------------------------------------------------------------
def hydra_settings(tree: dict) -> dict[str, str]:
    """What a configuration file {dotted key: value} says of Hydra, its defaults list too."""
    choices = {}
    for choice in tree.get("defaults") or []:
        if isinstance(choice, dict):
            choices |= choice
    settings = {}
    for key, value in (choices | tree).items():
        name = key.removeprefix("override ")
        reference = re.fullmatch(r"\$\{([\w.]+)\}", str(value))
        if reference:
            value = tree.get(reference[1])
        if HYDRA.match(name) and value is not None:
            settings[name] = str(value)
    return settings


def read_sweeper(given: dict[str, str]) -> Sweeper:
    """Take the words that begin with hydra, {name: value as written}. Raises InputError for what cannot be had here."""
    sweeper, launcher = given.get("hydra/sweeper", "basic"), given.get("hydra/launcher", "basic")
    if "Optuna" in given.get("hydra.sweeper._target_", "") or "hydra.sweeper.n_trials" in given:
        sweeper = "optuna"
    if sweeper not in SWEEPERS:
        raise InputError(f"hydra/sweeper={sweeper}: sweep.py has {' and '.join(SWEEPERS)} alone: list the values, "
                         "as in lr=1e-3,1e-4")
    if launcher not in LAUNCHERS:
        raise InputError(f"hydra/launcher={launcher}: sweep.py starts runs on this machine: --jobs=2 for two at a time")
    ours = {"trials": OPTUNA_TRIALS} if sweeper == "optuna" else {}
    if launcher == "joblib":
        ours["jobs"] = "-1"  # its own default: one a core
    params, unused = {}, []
    for key, value in given.items():
        if key.startswith(PARAMS):
            params[key.removeprefix(PARAMS)] = value
        elif key.startswith("hydra.sweeper.search_space"):
            raise InputError(f"{key}: sweep.py does not read search spaces: {PARAMS}NAME=VALUE,VALUE lists values")
        elif key in OURS and "${" not in value and value != "null":
            ours[OURS[key]] = value
        elif key not in READ_HERE:
            unused.append(key)
    sampler = given.get("hydra/sweeper/sampler", "") or given.get("hydra.sweeper.sampler._target_", "").split(".")[-1]
    if sampler in OPTUNA_SAMPLERS:
        ours["sampler"] = OPTUNA_SAMPLERS[sampler]
    elif sampler and sampler not in GRIDS:
        raise InputError(f"{sampler}: sweep.py samples by tpe or at random: hydra/sweeper/sampler=tpe")
    direction = given.get("hydra.sweeper.direction", "")
    return Sweeper(ours, params, unused, sweeper == "optuna" and sampler not in GRIDS, direction)


def in_shard(shard: str, runs: list) -> list:
    """The runs of shard K/N, every Nth from the Kth on; all of "". Raises InputError."""
    if not shard:
        return runs
    numbers = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", shard)
    number, shards = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= number <= shards:
        raise InputError(f"shard={shard}: expected K/N with K from 1 to N, as in --shard=3/10; of an array that counts "
                         "from 0 it is --shard=$((SLURM_ARRAY_TASK_ID + 1))/10")
    return runs[number - 1 :: shards]
