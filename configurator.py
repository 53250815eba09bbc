"""Typed configuration of a script: dataclass defaults <- config files <- command line.

    cfg = configure(Config, argv)       # python train_x.py config/small.py --lr=1e-3 --no-compile

Config is a dataclass whose every field has a default and a comment. Its annotations say how values are read
(int, float, bool, str, Literal, Optional and other unions, list, tuple, dict), its comments are the --help. Numbers
may have a range: Count (1, 2, ...), Whole (0, 1, ...), NonNegative, Positive, Share.

- .py files run with the current values as globals: `batch_size = batch_size * 2`. Names that begin with an
  underscore, imports and functions are the file's own; any other name must be a field.
- .yaml and .json files may be nested, and keys may be dotted: only the last part counts, so that
  `model.kwargs.hidden_dim` is hidden_dim. A dict field takes the mapping, or the keys, below its name.
- A text that begins with ~/ is below the home folder. Texts that no file name can hold (NUL, half a character) are
  refused.
- The command line wins over the files: --key=value, --key value, key=value, --flag, --no-flag.
- Settings of another system, recognised by its names of them, are read as its dialect: what they leave out has the
  default that it has there, Hydra's group=NAME stands for settings, and a line says so.

Bad input is the user's mistake, not ours: every error of a call is one line on stderr, then exit code 2.
"""
import ast
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import numbers
import os
import re
import shlex
import shutil
import sys
import textwrap
import tokenize
import traceback
import types
import typing
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union

from common.errors import speaks
from common.telling import begin, note

SUFFIXES = (".py", ".yaml", ".yml", ".json")
BOOLS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False,
         "1": True, "0": False}
NONES = {"none": None, "null": None}
IGNORED = "(ignored)"  # where the keys go that an alias sends to None
READ = "(read by the dialect)"  # what an alias is of a key that only a dialect's `complete` knows how to read
CONFIG_GROUP = "config_name"  # of a dialect: what --config-name=NAME stands for
BARE = "files go bare, without {key}: {command}"
ELSEWHERE = {  # names of other systems, for which a page has its own way: what a refusal adds
    **dict.fromkeys(("config", "config_file", "cfg", "c", "conf", "yaml", "f", "file"), BARE),
    "config_path": "name the configuration file itself, bare: FOLDER/NAME.yaml",
    "config_dir": "name the configuration file itself, bare: FOLDER/NAME.yaml",
    "checkpoint": BARE,
    "set": "settings go bare too, without {key}: {value}",
}  # fmt: skip
LARGEST_FILE = 4_000_000  # bytes of a configuration file
MOST_NODES = 100_000  # of a YAML file with its aliases written out, and of references looked up in one
LONGEST_TEXT = 100_000  # letters of a value with references
LONGEST_ERROR = 1_000  # letters
LONGEST_LINE, COMMENTS_AT = 100, 32  # of --help, columns
SWEEP_WORDS = ("study", "orders", "controls", "holdout", "equal_parameters", "trials", "jobs", "report")  # of sweep.py


class Range(NamedTuple):
    """What numbers a setting takes: how --help writes it, how a refusal says it, and the test."""

    sign: str
    rule: str
    holds: Callable[[float], bool]


class Derived(NamedTuple):
    """An alias in another unit: the field's value is function(number given, all settings), once these are known."""

    field: str
    function: Callable[[float, dict[str, Any]], Any]


Aliases = dict[str, str | Derived | None]
MOST = 10**12  # of anything that is counted: what is multiplied by another such number still fits into 64 bits
Count = Annotated[int, Range("int >= 1", "must be at least 1, and at most 10**12", lambda value: 1 <= value <= MOST)]
Whole = Annotated[int, Range("int >= 0", "must not be negative", lambda value: value >= 0)]
NonNegative = Annotated[float, Range("float >= 0", "must be finite, not negative", lambda value: 0 <= value < math.inf)]
Positive = Annotated[float, Range("float > 0", "must be finite and above 0", lambda value: 0 < value < math.inf)]
Share = Annotated[float, Range("float in [0, 1)", "must be in [0, 1)", lambda value: 0 <= value < 1)]
Probability = Annotated[float, Range("float in [0, 1]", "must be in [0, 1]", lambda value: 0 <= value <= 1)]
Fraction = Annotated[float, Range("float in (0, 1]", "must be in (0, 1]", lambda value: 0 < value <= 1)]

# -------------------------------------------------------------------------------------------- for the scripts


def configure(Config: type, argv: list[str] | None = None, aliases: Aliases | None = None,
              dialects: Iterable[Any] = ()) -> Any:
    """A Config from its defaults, then the config files in argv in their order, then the overrides in theirs.

    aliases: foreign names, plain or dotted ("optim.learning_rate"), and the fields they mean; None is a name
    that is accepted and has no effect here (one warning lists those met), READ one that a dialect makes something of
    once all settings are known. A dotted alias beats a plain one. A name of
    another unit is Derived(field, function): {"min_lr_ratio": Derived("min_lr", lambda ratio, cfg: ratio * cfg["lr"])}.
    dialects: of sources.foreign.Dialect. That of the settings, or that of --dialect=NAME, gives defaults of its own to
    what they leave out; --dialect=none takes no notice of any.
    --multirun, -m, hydra.sweeper.* and the words of a study hand the command line to sweep.py.
    If Config has a method check(self) -> list[str], what it returns are errors too.
    If it has a static method more_help() -> str, that is the end of --help.
    Exits: 0 after --help and --print_config, 2 on bad input.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    dialects = tuple(dialects)
    if "--help" in argv or "-h" in argv:
        print_text(help_text(Config, _script(Config).name, dialects))
        raise SystemExit(0)
    if any(_asks_for_several_runs(Config, word) for word in argv):
        hand_to_sweep(Config, argv)
    settings = Settings(Config, aliases or {}, dialects)
    show = {"--print_config", "--print-config"}
    files, overrides = settings.split(word for word in argv if word not in show)
    overrides = settings.choose_dialect(files, overrides)
    for name in files:
        settings.load(name)
    overrides = settings.apply_groups(overrides)
    for key, raw in overrides:
        plain = key.replace("-", "_")
        settings.given.pop(plain, None)  # what is typed comes last, after what a file or a group has of it
        settings.given[plain] = raw
        if not settings.is_absent(key.split("."), raw):
            settings.assign(key.split("."), raw, "command line")
    cfg = settings.build()
    if show & set(argv):
        print_text(print_config(cfg))
        raise SystemExit(0)
    return cfg


def fail(*messages: str) -> NoReturn:
    """Exit with code 2 after one `error:` line a message; of several ranks the first that ends prints."""
    if speaks(2):
        for message in messages:
            text = " ".join(str(message).splitlines())
            if len(text) > LONGEST_ERROR:
                text = f"{text[: LONGEST_ERROR - 200]} ... {text[-150:]}"
            print("error:", text, file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    """A warning that reads as a note: where it comes from is of no use to who typed the settings."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    try:
        warnings.warn(message, stacklevel=3)
    finally:
        warnings.formatwarning = usual


def _asks_for_several_runs(Config: type, word: str) -> bool:
    """Whether a word of a page's command line is one for sweep.py: Hydra's, or that of a study or of its report."""
    if word in ("-m", "--multirun") or re.match(r"[-+]*hydra[./]sweeper", word):
        return True
    name, equals, _ = word.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    is_setting = equals or word.startswith("--")
    is_page = hasattr(sys.modules.get(Config.__module__), "train")  # sample.py and its like have no runs to start
    return is_page and is_setting and name in SWEEP_WORDS and name not in Config.__annotations__


def hand_to_sweep(Config: type, argv: list[str]) -> NoReturn:
    """Leave a command line that asks for several runs, or for a report of runs, to sweep.py."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("of several runs sweep.py starts each: python sweep.py PAGE ... --launcher='torchrun --nproc_per_node=N'")
    script = _script(Config)
    sweep = Path(__file__).with_name("sweep.py")
    words = [str(script), *(word for word in argv if word not in ("-m", "--multirun"))]
    for place, word in enumerate(argv):
        name, equals, folder = word.removeprefix("--").partition("=")
        if name == "report" and name not in Config.__annotations__:
            words = ["report", *argv[:place], *([folder] if equals else ()), *argv[place + 1:]]
    if not {"--print_config", "--print-config"} & set(argv):  # torch is imported once more: this is before it
        begin(str(script), f"{'a report' if words[0] == 'report' else 'several runs'}, by sweep.py", file=sys.stdout)
    # In the place of this process: one that waited for it would kill it at Ctrl-C, before its runs have saved.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(sweep), *words])


def print_config(cfg: Any) -> str:
    """The text of a .py config file that sets every field to its value in cfg."""
    lines, last_group = [f"# every setting of a run of {_script(type(cfg)).name}"], ""
    for name, group, comment in described_fields(type(cfg)):
        lines += ["", f"# {group}"] if group != last_group else []
        lines.append(f"{name} = {_source(getattr(cfg, name))}" + (f"  # {comment}" if comment else ""))
        last_group = group
    return "\n".join(lines) + "\n"


def help_text(Config: type, prog: str, dialects: Iterable[Any] = (), usage: str = "", only: Iterable[str] | None = None
              ) -> str:
    """What --help prints, in lines that fit a terminal: what it is for, how to pass settings, each field from its line.

    It is for what the docstring of Config says, where it has one of its own, else for what that of its script says.

    Args:
        prog: the command, train_x.py. usage: in place of what follows "usage: " otherwise. only: these fields, in place
        of all.
    """
    doc = inspect.getdoc(Config) or ""
    if doc.startswith(f"{Config.__name__}("):  # the one that every dataclass gets
        doc = inspect.cleandoc(sys.modules[Config.__module__].__doc__ or "")
    example = re.search(r"config/[\w/]+\.py", doc)
    usage = usage or f"""python {prog} [CONFIG FILE ...] [--key=value ...]

  CONFIG FILE     .py, .yaml or .json, such as {example[0] if example else "config/NAME.py"}; files come first, in order
  --key=value     also --key value, key=value, and for switches --key and --no-key
  --print_config  print all settings as a .py config file, and stop"""
    if names := "|".join(dialect.name for dialect in dialects):
        usage += f"\n  --dialect=NAME  {names}|none: whose settings these are; default what they look like"
    width = min(LONGEST_LINE, shutil.get_terminal_size((LONGEST_LINE, 24)).columns)
    lines, last_group = [*_fitted(doc, width), ""] if doc else [], ""
    lines += _fitted(f"usage: {usage}", width)
    kinds, defaults = _kinds(Config), _defaults(Config)
    for name, group, comment in described_fields(Config):
        if only is None or name in only:
            lines += ["", group] if group != last_group else []
            lines += _row(f"  --{name}={_typed(defaults[name])}", comment, _type_name(kinds[name]), width)
            last_group = group
    if callable(getattr(Config, "more_help", None)):
        lines += ["", *_fitted(Config.more_help(), width)]
    return "\n".join(lines)


def _row(start: str, comment: str, kind: str, width: int) -> list[str]:
    """The lines of a setting: --name=default, what it is and [what it takes], beside it where there is room."""
    unbroken = f"[{kind}]".replace(" ", "\N{NO-BREAK SPACE}")
    told = textwrap.wrap(f"{comment} {unbroken}".strip(), width - COMMENTS_AT, break_long_words=False,
                         break_on_hyphens=False)
    told = [line.replace("\N{NO-BREAK SPACE}", " ") for line in told]
    rows = [" " * COMMENTS_AT + line for line in told]
    if len(start) < COMMENTS_AT - 1:
        return [start.ljust(COMMENTS_AT) + told[0], *rows[1:]]
    return [start, *rows]


def _fitted(text: str, width: int) -> list[str]:
    """The lines of a text in paragraphs, with indented lines that stay as they are where they fit."""
    lines = []
    for is_indented, block in itertools.groupby(text.splitlines(), lambda line: line[:1] in (" ", "")):
        for line in block if is_indented else textwrap.wrap(" ".join(block), width, break_on_hyphens=False):
            before, mark, comment = line.partition("  # ")
            if len(line) > width and mark and before.strip():  # a command, and what it does
                line, comment = before.rstrip(), f"# {comment.strip()}"
                tight = f"{line}  {comment}"
                lines += [tight] if len(tight) <= width else [line, f"        {comment}"]
                continue
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return lines


def _typed(value: Any) -> str:
    """A value as it is typed on a command line, where it has no blanks; else as Python has it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if value and shlex.quote(value) == value else repr(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, int | float) for item in value):
        return ",".join(map(_typed, value))
    return _source(value)


def take_over(cfg: Any, asked: Any, *names: str) -> None:
    """Give cfg, the settings of a run, those of these names that are `asked` for: that are not as by default."""
    for name in names:
        if getattr(asked, name) != getattr(type(asked)(), name):
            setattr(cfg, name, getattr(asked, name))


def config_dict(cfg: Any) -> dict[str, Any]:
    """The settings as plain JSON types (tuples as lists): for config.json, checkpoints and loggers."""
    return {field.name: _jsonable(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}


def from_dict(Config: type, saved: dict[str, Any], where: str, aliases: Aliases | None = None) -> Any:
    """The Config that config_dict saved in `where` (a file name, for messages).

    Settings that Config has no more are ignored with one warning, unless an alias says what they are called now; those
    it has since gained take defaults.
    """
    if not isinstance(saved, dict):
        fail(f"{where}: expected the settings of a run, got {_short(saved)}")
    settings = Settings(Config, aliases or {})
    unknown = [str(name) for name in saved if settings.field_at([str(name)], 1) in (None, READ)]
    if unknown:
        warn(f"{where}: ignored settings of another version: {', '.join(unknown)}")
    for name in saved:
        if name not in unknown:
            settings.assign([str(name)], saved[name], where)
    settings.ignored.clear()
    return settings.build(check=False)


def config_hash(cfg: Any) -> str:
    """12 hexadecimal digits that tell resolved configurations apart, the same in every process."""
    known = config_dict(cfg)
    for name in ("s3_config", "out"):  # a copy of a run is no other run, and no run has anything to do with out
        known.pop(name, None)
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: dict[str, Any], cfg: Any, aliases: Aliases | None = None, where: Any = "the checkpoint"
                ) -> list[str]:
    """Lines "lr: 0.001 -> 0.0001" for what changed since `old` was saved in `where`; what it lacks had the default."""
    with warnings.catch_warnings(action="ignore"):
        before = config_dict(from_dict(type(cfg), old, str(where), aliases))
    return [f"{name}: {_source(before[name])} -> {_source(value)}"
            for name, value in config_dict(cfg).items() if value != before[name]]


# ---------------------------------------------------------------------------------- from settings to a Config


class Settings:
    """The values so far, and every error met on the way to them."""

    def __init__(self, Config: type, aliases: Aliases, dialects: tuple[Any, ...] = ()):
        self.Config, self.kinds, self.values = Config, _kinds(Config), _defaults(Config)
        names = {key.replace("-", "_"): name for key, name in aliases.items()}
        self.units = {key: name for key, name in names.items() if isinstance(name, Derived)}
        self.aliases = {key: getattr(name, "field", name) or IGNORED for key, name in names.items()}
        self.alias_depth = max((key.count(".") + 1 for key in self.aliases), default=0)
        self.derived: dict[str, tuple[float, Derived, str]] = {}
        self.argv: list[str] = []
        self.errors: list[str] = []
        self.ignored: list[str] = []
        self.dialects, self.dialect = dialects, None
        self.is_ours = False  # by --dialect=none
        self.group_names = {name for dialect in dialects for name in dialect.groups if name not in self.kinds}
        self.given: dict[str, Any] = {}  # {dotted key: value as written}
        self.fields: dict[str, str] = {}  # {field that was set, or dotted key to READ: where}
        strays = set(self.aliases.values()) - {*self.kinds, IGNORED, READ}
        assert not strays, f"aliases for fields that {Config.__name__} does not have: {sorted(strays)}"

    def build(self, check: bool = True) -> Any:
        """The Config, or exit with all errors; check: ask Config.check() as well."""
        for name, (number, unit, where) in self.derived.items():
            try:
                self.values[name] = convert(unit.function(number, self.values), self.kinds[name])
            except ValueError as error:
                self.errors.append(f"{where}: {error}")
        if self.dialect and not self.errors:
            self.complete()
        for name, value in self.values.items():
            if isinstance(value, str) and "${now:" in value:
                self.errors.append(f"{name} = {value} is not the same in all processes of a run: set --{name}=...")
        if not self.errors:
            cfg = self.Config(**self.values)
            if check and callable(getattr(cfg, "check", None)):
                self.errors += cfg.check()
        if self.errors:
            fail(*self.errors)
        if self.ignored:
            warn(f"settings without effect here: {', '.join(self.ignored)}")
        return cfg

    def field_at(self, path: list[str], end: int) -> str | None:
        """The field that path[:end] names: by the longest alias that ends it, or by its last part."""
        for start in range(max(0, end - self.alias_depth), end):
            key = ".".join(path[start:end])
            if key in self.aliases and key not in self.kinds:
                return self.aliases[key]
        return path[end - 1] if path[end - 1] in self.kinds else None

    def resolve(self, parts: list[str]) -> tuple[str | None, list[str]]:
        """The field that a dotted key means, and the keys inside of it where it is a dict."""
        path = [part.replace("-", "_") for part in parts]
        if "" in path:
            return None, []
        if path[0] == "hydra" and ".".join(path) not in self.aliases:
            return IGNORED, []  # of what starts runs: its sweeper's seed is no setting of a run
        if (whole := self.field_at(path, len(path))) not in (None, path[-1]):
            return whole, []  # an alias is more deliberate than the name of a dict on the way
        for end in range(1, len(path)):
            name = self.field_at(path, end)
            if self.takes_dict(name):
                return name, parts[end:]
        return whole, []

    def takes_dict(self, name: str | None) -> bool:
        return name == IGNORED or name in self.kinds and _takes_dict(self.kinds[name])

    def assign(self, parts: list[str], raw: Any, source: str) -> tuple[str, ...] | None:
        """Set what a dotted key means, and return its place (field, keys...); None after an error."""
        key = ".".join(parts)
        where = f"{source}: {key if key.isprintable() and key == key.strip() and len(key) < 80 else _short(key)}"
        name, inside = self.resolve(parts)
        if name == READ and self.dialect:
            self.fields[key] = source
            return None
        is_foreign = name == READ or key in self.group_names
        if name == READ:  # of a file that --dialect=none reads as ours, such a key has no effect; else it is a mistake
            name = IGNORED if self.is_ours else None
        plain = key.replace("-", "_")
        if plain in ELSEWHERE and plain not in self.kinds and source == "command line":
            typed = f"-{key}" if len(key) == 1 else f"--{key}"
            hint = ELSEWHERE[plain].format(key=typed, value=raw, command=self.command_with(key, raw))
            if isinstance(raw, Alone):
                hint = hint.partition(":")[0]
            elif plain == "checkpoint" and "resume" in self.kinds:
                hint = f"--resume={raw} goes on from it, --analyze={raw} measures it, sample.py {raw} uses it"
            if plain == "cfg" and raw in ("job", "hydra", "all"):
                hint = "--print_config prints all settings, and stops"
            self.errors.append(f"{where}: {hint}")
        elif name is None and (parts[0].startswith("hydra/") or raw is None and self.dialect):
            self.ignored.append(key)
        elif name is None and is_foreign and self.dialects and not self.dialect and not self.is_ours:
            asked = f"--dialect={self.dialects[0].name}"
            self.errors.append(f"{where}: no setting of ours; {asked} reads all of them as another system's")
        elif name is None:
            self.errors.append(f"{where}: no such setting{self.suggest(parts[-1])}")
        elif name == IGNORED:
            self.ignored.append(key)
        else:
            try:
                unit = self.units.get(parts[-1].replace("-", "_")) if name not in parts else None
                self.derived.pop(name, None)
                self.fields[name] = source
                if unit:
                    self.derived[name] = convert(raw, float), unit, where
                    return name,
                value = _with_item(self.values[name], inside, raw) if inside else raw
                self.values[name] = convert(value, self.kinds[name])
                return name, *inside
            except Exception as error:  # an object of a .py file may do anything when it is read
                alias = f" ({name})" if key.replace("-", "_") != name else ""
                expected = f"expected {_type_name(self.kinds[name])}, got {_short(raw)}"
                self.errors.append(f"{where}{alias}: {expected}: {_reason(error)}")
        return None

    def command_with(self, key: str, file: str) -> str:
        """The command line as it would be right, with a file bare in the place of --key=file."""
        begin = len(sys.argv) - len(self.argv)
        words = sys.argv[1:begin] if sys.argv[begin:] == self.argv else []  # a job or a run, which a script has read
        for word in self.argv:
            name, equals, _ = word.lstrip("-").partition("=")
            if name == key and word != key:
                words.append(file)
            elif not (words and words[-1] == word == file):  # behind --key, as a word of its own
                words.append(word)
        return shlex.join(["python", _script(self.Config).name, *words])

    def suggest(self, key: str) -> str:
        """What a name may have been meant as: one that is spelled nearly so, else those that it is a part of."""
        key = key.replace("-", "_").lower().removeprefix("no_")
        names = [*self.kinds, *(alias for alias in self.aliases if "." not in alias and not alias.startswith("_"))]
        parts = [name for name in self.kinds
                 if len(key) > 2 and (f"_{key}_" in f"_{name}_" or f"_{name}_" in f"_{key}_" or name.startswith(key))
                 or len(name) > 2 and key.startswith(name)]
        near = _nearest(key, names, 1, 0.8) or parts[:3] or _nearest(key, [name for name in names if len(name) > 3], 1)
        return f", did you mean {' or '.join(near)}?" if near else "; --help lists them all"

    # ------------------------------------------------------------------------------- dialects of other systems

    def choose_dialect(self, files: list[str], overrides: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """Find out whose settings these are, and start from its defaults; the overrides without --dialect.

        A Python file is ours, and so is a command line with one.
        """
        if not self.dialects:
            return overrides
        forced = [raw for key, raw in overrides if key == "dialect" and key not in self.kinds]
        if forced:
            overrides = [(key, raw) for key, raw in overrides if key != "dialect"]
        names = {dialect.name: dialect for dialect in self.dialects} | {"none": None}
        if forced and forced[-1] not in names:
            self.errors.append(f"command line: dialect: there is no {_short(forced[-1])}, there is {', '.join(names)}")
            return overrides
        for name in files:
            self.given |= self.peek(name)
        if not any(name.endswith(".py") for name in files):
            self.given |= {key.replace("-", "_"): raw for key, raw in overrides}
        if forced:
            self.dialect = names[forced[-1]]
            self.is_ours = self.dialect is None
        else:
            groups = self.group_names & set(self.given)
            spoken = (d for d in self.dialects if d.is_spoken(self.given) or not groups.isdisjoint(d.groups))
            self.dialect = next(spoken, None)
        if self.dialect:
            for name, value in copy.deepcopy(self.dialect.defaults).items():
                self.values[name] = convert(value, self.kinds[name])
            if self.dialect.refusal and (why := self.dialect.refusal(self.given)):
                fail(why)
            note(f"read as {self.dialect.title}: absent keys take its defaults (--dialect=none: ours)")
        return overrides

    def peek(self, name: str) -> dict[str, Any]:
        """{dotted key: value as written} of a file that is no Python; what is wrong with it, loading it tells."""
        for path in self.places(name):
            if path.suffix in SUFFIXES[1:] and os.path.isfile(path):
                try:
                    tree = _read_tree(path)
                    return dict(_flat(tree)) | dict(_groups(tree.get("defaults")))
                except Exception:
                    return {}
        return {}

    def add_group(self, key: str, value: Any, source: str) -> None:
        """What group=NAME stands for there, as if it were written in its place."""
        known = self.dialect.groups.get(key.replace("-", "_"))
        if known is None or value is None or isinstance(value, Text) and value.lower() in NONES:
            return
        if key == CONFIG_GROUP and isinstance(value, str):
            value = value.removesuffix(".yaml")
        if not isinstance(value, str) or value not in known:
            near = _nearest(str(value), known, 1)
            more = ", ..." if len(known) > 24 else ""
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join([*known][:24])}{more}"
            self.errors.append(f"{source}: {key}: {self.dialect.title} has no {_short(value)}, {hint}")
            return
        self.given[key] = value
        for parts, raw in self.leaves(known[value], lambda value: value, f"{key}={value}"):
            if not self.is_absent(parts, raw):
                self.assign(parts, raw, f"{key}={value}")

    def apply_groups(self, overrides: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """Read the groups among the overrides, which come before these in Hydra; the overrides without them."""
        rest = []
        for key, raw in sorted(overrides, key=lambda pair: pair[0].replace("-", "_") != CONFIG_GROUP):
            plain = key.replace("-", "_")
            if self.dialect and plain in self.group_names & set(self.dialect.groups):
                self.add_group(plain, raw, "command line")
            elif plain == CONFIG_GROUP:
                self.errors.append(f"command line: {key}: name the configuration file itself, bare: {raw}.yaml")
            else:
                rest.append((key, raw))
        return rest

    def complete(self) -> None:
        """Add what the dialect makes of all settings together."""
        try:
            more = self.dialect.completed(self.given, self.values, self.fields)
        except ValueError as error:
            self.errors.append(str(error))
            return
        if "device" in more and self.fields.get("device"):
            asked, where = self.values["device"], self.fields["device"]
            note(f"device = {asked} of {where} is not there: device = {more['device']}")
        for name, value in more.items():
            try:
                self.values[name] = convert(value, self.kinds[name])
            except ValueError as error:
                self.errors.append(f"{name} = {_short(value)}: {error}")

    def place(self, parts: list[str]) -> tuple[str | None, ...]:
        """The field that a dotted key means, and the keys inside of it."""
        name, inside = self.resolve(parts)
        return name, *inside

    def is_absent(self, parts: list[str], raw: Any) -> bool:
        """Whether a value of another system leaves a setting to its default.

        That is OmegaConf's ???, for what is still to be set, and a null where none is no value of the setting here.
        """
        if not self.dialect or raw == "???":
            return bool(self.dialect)
        if raw is None and len(parts) == 1 and parts[0] in self.dialect.groups:
            return True  # a part of the other system that a run goes without
        name, inside = self.resolve(parts)
        if raw is not None and not (isinstance(raw, Text) and raw.lower() in NONES):
            return False
        unit = parts[-1].replace("-", "_") in self.units
        return name in self.kinds and not inside and (unit or "none" not in _words(self.kinds[name]))

    # ------------------------------------------------------------------------------------------- command line

    def split(self, argv: Iterable[str]) -> tuple[list[str], list[tuple[str, Any]]]:
        """The config files and the (key, value) overrides of a command line."""
        self.argv = list(argv)
        files, overrides, words = [], [], deque(self.argv)
        while words:
            word = words.popleft()
            key, equals, value = word.partition("=")
            if word.startswith("--") and key != "--":
                key = key.removeprefix("--")
                overrides += [(key, Text(value))] if equals else self.option(key, words)
            elif equals and (re.fullmatch(r"\+{0,2}(hydra/)?\w[\w.-]*", key) or key.lstrip("+") in self.group_names):
                # Hydra's +key=value and ++key=value too
                overrides.append((key.lstrip("+"), Text(value)))
            elif match := re.fullmatch(r"\+{0,2}[\w/]+@([\w.]+)=.*", word):
                # group@package=NAME of a group that stands for no settings here
                overrides.append((match[1], Text(value)))
            elif word.endswith(SUFFIXES) and not word.startswith("-"):
                files.append(word)
            elif word.startswith("-") and key.lstrip("-") in {*ELSEWHERE, *self.kinds, *self.aliases}:
                overrides += self.one_dash(word, words)
            else:
                self.errors.append(f"command line: {_short(word)}: {self.no_setting(word)}")
        return files, overrides

    def one_dash(self, word: str, words: deque[str]) -> list[tuple[str, Any]]:
        """-c FILE is told how files go; -lr=3 is one dash short."""
        key, equals, value = word.lstrip("-").partition("=")
        if key in self.kinds or key in self.aliases:
            self.errors.append(f"command line: {_short(word)}: two dashes, -{word}")
            return []
        return [(key, Text(value))] if equals else self.option(key, words)

    def no_setting(self, word: str) -> str:
        """What a word may have been meant as that is no setting and no file of them."""
        if os.path.isfile(os.path.join(word, "config.json")) and "analyze" in self.kinds:
            return f"a run goes behind a setting: --analyze={word} measures it again, --resume={word} goes on from it"
        files = self.config_files()
        near = _nearest(Path(word).name, [Path(name).stem for name in files], 1)
        if near and not word.startswith("-"):
            return f"did you mean {next(path for name, path in files.items() if Path(name).stem == near[0])}?"
        return f"expected --key=value, or a config file that ends in {', '.join(SUFFIXES)}"

    def config_files(self) -> dict[str, str]:
        """{name: path} of what is in config/, beside the script."""
        folder = _script(self.Config).parent
        return {file.name: file.relative_to(folder).as_posix()
                for file in sorted((folder / "config").rglob("*")) if file.suffix in SUFFIXES}

    def option(self, key: str, words: deque[str]) -> list[tuple[str, Any]]:
        """`--key` without a value of its own is a switch, or takes the next word."""
        name, negated = (self.resolve(given.split("."))[0] for given in (key, key[3:]))
        if name is None and key[:3] in ("no-", "no_") and "true" in _words(self.kinds.get(negated)):
            return [(key[3:], Text("false"))]
        known = _words(self.kinds.get(name))
        if words and (words[0].lower() in known if "true" in known else not words[0].startswith("--")):
            return [(key, Text(words.popleft()))]
        if "true" in known or name not in self.kinds:  # an unknown name is the error to report
            return [(key, Alone("true"))]
        self.errors.append(f"command line: {key}: needs a value, as in --{key}={_source(self.values[name])}")
        return []

    # ------------------------------------------------------------------------------------------- config files

    def load(self, name: str) -> None:
        """Apply one config file."""
        path = self.find(name)
        if path is None:
            return
        try:
            settings = list(self.read(path, name))
        except BaseException as error:  # whatever a user's file does wrong is told in one line
            if isinstance(error, KeyboardInterrupt) and path.suffix != ".py":
                raise
            self.errors.append(f"{name}{_line_number(error, path)}: {_reason(error)}")
            return
        seen: dict[tuple[str, ...], tuple[str, Any]] = {}
        # Nulls come last: they never compete with a value.
        for parts, raw in sorted(settings, key=lambda setting: setting[1] is None):
            key = ".".join(parts)
            if self.is_absent(parts, raw) or raw is None and self.place(parts) in seen:
                continue
            place = self.assign(parts, raw, name)
            if place:
                value = raw if place[1:] else self.values[place[0]]
                other, before = seen.setdefault(place, (key, value))
                if before != value:
                    self.errors.append(f"{name}: {key}: ambiguous, {other} sets {'.'.join(place)} too: "
                                       f"{_short(before)} or {_short(value)}?")

    def find(self, name: str) -> Path | None:
        """The config file `name`, from the working directory or from the folder of the script."""
        for path in self.places(name):
            if os.path.isfile(path):
                return path
        if "\0" not in name and os.path.lexists(name):  # a folder, a pipe, a link to nothing
            self.errors.append(f"command line: no config file {_short(name)}: what has this name is no regular file")
            return None
        there = self.config_files()
        near = _nearest(Path(name).name, there, 3) or list(there)[:8]
        more = ", ..." if len(near) == 8 < len(there) else ""
        hint = f"; there is {', '.join(there[file] for file in near)}{more}" if near else ""
        self.errors.append(f"command line: no config file {_short(name)}{hint}")
        return None

    def places(self, name: str) -> tuple[Path, Path]:
        return Path(_at_home(name)), _script(self.Config).parent / name

    def read(self, path: Path, name: str) -> Iterator[tuple[list[str], Any]]:
        """The (key path, value) pairs of one config file."""
        if path.suffix == ".py":
            return (([key], value) for key, value in _run_python(path, self.values).items())
        tree = _read_tree(path)
        is_json = path.suffix == ".json"
        if self.dialect and isinstance(chosen := tree.pop("defaults", None), list):  # Hydra's list of files to add
            for key, value in _groups(chosen):
                self.add_group(key, value, name)
        return self.leaves(tree, (lambda value: value) if is_json else _reference_filler(tree), name)

    def leaves(self, tree: dict, fill: Callable[[Any], Any], source: str, above: Iterable[str] = ()
               ) -> Iterator[tuple[list[str], Any]]:
        """The (key path, value) pairs of nested settings; what is below a dict field stays one value."""
        for key, value in tree.items():
            parts = [*above, *str(key).split(".")]
            if parts[-1].startswith("_"):
                continue  # the file's own names: anchors, _target_
            field = self.resolve(parts)[0]
            whole = self.takes_dict(field)
            if field == IGNORED or field is None and parts[0] == "hydra":
                yield parts, value  # whatever it refers to
                continue
            if isinstance(value, str) and "${hydra:" in value:
                self.ignored.append(".".join(parts))  # a place or number that Hydra alone knows
                continue
            try:
                value = value if isinstance(value, dict) and not whole else fill(value)
                self.given |= _flat({".".join(parts): value})
                # A setting that has nothing below it is no section: it is told that {} is no value of its own.
                nested = isinstance(value, dict) and not whole and (value or field is None)
                yield from self.leaves(value, fill, source, parts) if nested else [(parts, value)]
            except ValueError as error:
                self.errors.append(f"{source}: {'.'.join(parts)}: {error}")


def _read_tree(path: Path) -> dict:
    """The settings of a .yaml or .json file. Raises ValueError and what the readers raise."""
    data = _content(path)
    tree = json.loads(data, object_pairs_hook=_without_repeats) if path.suffix == ".json" else _read_yaml(data)
    if not isinstance(tree, dict | None):
        raise ValueError(f"expected a mapping of settings at the top, got {_short(tree)}")
    return tree or {}


def _content(path: Path) -> bytes:
    """The bytes of a config file. Raises ValueError for one that is too large to hold settings."""
    with open(path, "rb") as file:
        data = file.read(LARGEST_FILE + 1)  # a file that says it has none, as in /proc, may have no end
    if len(data) > LARGEST_FILE:
        raise ValueError(f"is larger than {LARGEST_FILE / 1e6:.0f} MB: too large for a file of settings")
    return data


def _groups(defaults: Any) -> Iterator[tuple[str, Any]]:
    """(group, name) of Hydra's list of defaults, whose items may be "override /group@package: name"."""
    for item in defaults if isinstance(defaults, list) else ():
        for key, value in item.items() if isinstance(item, dict) else ():
            group = re.sub(r"^(optional |override )*/?|@.*$", "", str(key))
            yield group, value


def _flat(tree: dict, above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _run_python(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What a .py file sets when the current values are its globals."""
    scope = {**copy.deepcopy(values), "__file__": str(path.absolute()), "__name__": "config"}
    code = compile(_content(path), str(path), "exec")
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is no part of --print_config
        exec(code, scope)
    changed = {name: value for name, value in scope.items()
               if name not in values or not _is_same(value, values[name])}  # also what was changed in place
    return {name: value for name, value in changed.items() if name in values
            or not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType))}


def _is_same(value: Any, before: Any) -> bool:
    try:
        return repr(value) == repr(before)
    except Exception:  # of an object that cannot be shown, or an integer of 5,000 digits
        return False


def _read_yaml(data: bytes) -> Any:
    """A YAML file in which unquoted words stay words (Text), for the field's type to read.

    YAML 1.1 would take `off` for False, 1.10 for 1.1, 12:30 for 750 and 1e-4 for a string.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}

        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node, keys = super().compose_mapping_node(anchor), set()
            for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
                if str(key.value) in keys:
                    problem = f"{key.value} is set twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                keys.add(str(key.value))
            return node

        def get_single_node(self) -> yaml.Node:
            node = super().get_single_node()
            _size_written_out(node, {})
            return node

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (yaml.YAMLError, RecursionError):
                raise
            except Exception as error:  # !!int abc, !!timestamp 2026-99-99
                problem = f"{_short(node.value)} is no {node.tag.rpartition(':')[2]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("merge", "<<", ["<"]),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", [*"-+."]),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), first)
    Loader.add_constructor("tag:yaml.org,2002:str",
                           lambda _, node: node.value if node.style else Text(node.value))
    return yaml.load(data, Loader)


def _size_written_out(node: Any, known: dict[Any, int]) -> int:
    """The nodes of a YAML file with each alias written out: nine nested ones can stand for billions.

    known: sizes of the nodes met so far, 0 of those around this one. Raises ValueError for too many, and for a circle.
    """
    if node in known:
        if not known[node]:
            raise ValueError("an alias refers to what it is a part of")
        return known[node]
    known[node] = 0
    inside = node.value if isinstance(getattr(node, "value", None), list) else []
    size = 1
    for part in inside:
        size += sum(_size_written_out(each, known) for each in (part if isinstance(part, tuple) else (part,)))
    if size > MOST_NODES:
        raise ValueError(f"holds more than {MOST_NODES:,} values once its aliases are written out")
    known[node] = size
    return size


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"{_short(key)} is set twice")
        tree[key] = value
    return tree


def _reference_filler(tree: Any) -> Callable[[Any], Any]:
    """A function that replaces "${a.b}" in a value by what `tree` holds at a.b, as OmegaConf does."""
    reference = re.compile(r"\$\{([^${}]*)\}")
    looked_up = 0

    def look_up(path: str, seen: tuple[str, ...]) -> Any:
        nonlocal looked_up
        looked_up += 1
        if looked_up > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES:,} references, with those that they lead to")
        resolver, colon, argument = path.partition(":")
        if colon and resolver == "now":
            # Processes of one run start at times of their own: build() refuses what is left of this.
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            return datetime.now().strftime(argument) if alone else f"${{{path}}}"
        if colon and resolver == "oc.env":
            variable, comma, otherwise = argument.partition(",")
            if variable.strip() not in os.environ and not comma:
                raise ValueError(f"${{{path}}}: the environment has no {variable.strip()}")
            return Text(os.environ.get(variable.strip(), otherwise.strip()))
        if path in seen:
            raise ValueError(f"references in a circle: {' -> '.join([*seen, path])}")
        value, keys = tree, path.split(".")
        if keys[0] not in tree and len(keys) > 1 and keys[1] in tree:
            keys = keys[1:]  # Hydra reads config/model/x.yaml as what is below `model`
        for key in keys:
            value = fill(value, (*seen, path)) if isinstance(value, str) else value
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"${{{path}}} is not in this file")
            value = value[key]
        return fill(value, (*seen, path))

    def fill(value: Any, seen: tuple[str, ...] = ()) -> Any:
        if isinstance(value, dict):
            return {key: fill(item, seen) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item, seen) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if match := reference.fullmatch(value):
            return look_up(match[1].strip(), seen)
        text = reference.sub(lambda match: str(look_up(match[1].strip(), seen)), value)
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"its references make a text of {len(text):,} letters")
        if "${" in text.replace("${now:", ""):
            raise ValueError(f"cannot read the reference in {_short(value)}, expected ${{key.path}}")
        return type(value)(text)

    return fill


def _line_number(error: BaseException, path: Path) -> str:
    """":12" for the line of a config file that an exception comes from, "" if it is not known."""
    number = None
    if mark := getattr(error, "problem_mark", None):  # PyYAML
        number = mark.line + 1
    elif path.suffix == ".json" or getattr(error, "filename", "") == str(path):  # syntax of JSON, of Python
        number = getattr(error, "lineno", None)
    if not number:
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_filename == str(path)]
        number = lines[-1] if lines else None
    return f":{number}" if number else ""


def _nearest(word: str, names: Iterable[str], most: int, cutoff: float = 0.6) -> list[str]:
    """Those of names that are like the word, the likest first; upper and lower case are the same."""
    spellings = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), spellings, most, cutoff)
    return [spellings[name] for name in near]


def _reason(error: BaseException) -> str:
    """What an exception says, in one line of some length."""
    if isinstance(error, RecursionError):
        return "nested too deeply, or in a circle"
    try:
        told = getattr(error, "problem", None) or getattr(error, "msg", None)  # by PyYAML; by Python and JSON
        told = str(told or error)
    except Exception:  # of a class of the user's
        told = ""
    is_clear = type(error) is ValueError or told and hasattr(error, "problem") or hasattr(error, "msg")
    text = told if is_clear else f"{type(error).__name__}: {told}"
    return textwrap.shorten(text.removesuffix(": "), LONGEST_ERROR // 2, placeholder=" ...")


# --------------------------------------------------------------------------------------- from values to types


class Text(str):
    """A word as typed on the command line or unquoted in YAML: 5 may be a number or a name, none may be None.

    A plain str comes from .py, JSON or quotes, and means itself wherever a str is allowed.
    """


class Alone(Text):
    """The "true" of a key without a value."""


def convert(value: Any, kind: Any) -> Any:
    """A fresh copy of value in the type of the annotation `kind`; ValueError says why it cannot be."""
    if isinstance(ranged := _range(kind), Range):
        number = convert(value, _origin(kind))
        if not ranged.holds(number):
            raise ValueError(ranged.rule)
        return number
    origin, args = _origin(kind), typing.get_args(kind)
    if len(_options(kind)) > 1:
        return _to_union(value, args)
    if origin is Literal:
        return _to_choice(value, args)
    if origin in (list, tuple):
        return _to_sequence(value, origin, args)
    if origin is dict:
        return _to_dict(value, args or (str, Any))
    if kind not in _SCALARS:
        raise TypeError(f"configurator.py does not know how to read the annotation {kind}")
    return _SCALARS[kind](value)


def _to_union(value: Any, kinds: tuple) -> Any:
    """Into the type that value has already, else into the most specific one that takes it."""
    one_word = isinstance(value, str) and "," not in value and not value.startswith(("[", "("))
    if value == "" and bool in kinds and str not in kinds:
        return False  # bool | Literal: nothing is off

    def rank(kind: Any) -> tuple[bool, bool, int]:
        origin = _origin(kind)
        return type(value) is not origin, one_word and origin in (list, tuple), _SPECIFIC.index(origin)

    reasons = []
    for kind in sorted(kinds, key=rank):
        try:
            return convert(value, kind)
        except ValueError as error:
            reasons += [str(error)] if kind is not types.NoneType else []
    raise ValueError(", ".join(sorted(dict.fromkeys(reasons), key=lambda reason: reason.endswith("?"))))


def _to_choice(value: Any, choices: tuple) -> Any:
    if value is None or isinstance(value, Text) and value.lower() == "null":
        value = "none"  # where that is a choice
    for choice in sorted(choices, key=lambda choice: type(choice) is not type(value)):
        try:
            if convert(value, type(choice)) == choice:
                return choice
        except ValueError:
            continue
    for choice in choices:  # upper and lower case are the same where no choice is so written
        if isinstance(choice, str) and isinstance(value, str) and choice.lower() == value.lower():
            return choice
    near = _likely(value, [choice for choice in choices if isinstance(choice, str) and choice])
    raise ValueError(f"did you mean {near}?" if near else "not one of these")


def _likely(value: Any, choices: list[str]) -> str | None:
    """The one of the choices that a word begins, or is like; None where there is no such one."""
    word = str(value).lower()
    begun = [choice for choice in choices if word and choice.lower().startswith(word)]
    near = begun if len(begun) == 1 else _nearest(word, choices, 1)
    return near[0] if near else None


def _to_sequence(value: Any, origin: type, args: tuple) -> list | tuple:
    items = _split_list(value) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("not a list")
    if origin is tuple and args and args[-1] is not ...:
        if len(args) != len(items):
            raise ValueError(f"needs {len(args)} values")
        return tuple(map(convert, items, args))
    return origin(convert(item, args[0] if args else Any) for item in items)


def _split_list(text: str) -> list:
    """1,2,3 or [1, 2, 3] or (1, 2) or ['a', 'b,c'] or [[1, 2], [3]]."""
    text = text.strip()
    bracketed = text.startswith(("[", "(")) and text.endswith(("]", ")"))
    inner = text[1:-1] if bracketed else text
    if re.search(r"""["'{}()\[\]]""", inner):
        try:
            return _literal(f"[{inner}]")
        except ValueError:
            if bracketed:
                raise
    inner = inner.strip().removesuffix(",")
    return [Text(part.strip()) for part in inner.split(",")] if inner else []


def _to_dict(value: Any, args: tuple) -> dict:
    value = _literal(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError("not a dict")
    return {convert(key, args[0]): convert(item, args[1]) for key, item in value.items()}


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # of Python about odd escapes and numbers
                return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise ValueError("neither JSON nor a Python literal")


def _to_int(value: Any) -> int:
    if isinstance(value, str):
        _refuse_octal(value)
        try:
            value = int(value)
        except ValueError:
            value = _to_float(value)  # 1e5
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("not a number")
    if value % 1 != 0:  # inf too: inf % 1 is nan
        raise ValueError("not a whole number")
    if not -(2**63) <= value < 2**63:
        raise ValueError("does not fit into 64 bits")
    return int(value)


def _refuse_octal(text: str) -> None:
    """YAML 1.1 reads 010 as 8, and other digits than ours as a text: who wrote them may mean either."""
    if re.fullmatch(r"[-+]?0[0-9_]+", text.strip()):
        raise ValueError("YAML reads a number that begins with 0 as octal: leave the 0 out")
    if not text.isascii():
        raise ValueError("not a number")


def _to_float(value: Any) -> float:
    if isinstance(value, str):
        _refuse_octal(value)
    try:
        number = None if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        number = None
    if number is None and isinstance(value, str) and re.fullmatch(r"\d{1,3}(,\d{3})+", value):
        raise ValueError("leave the commas out")
    if number is None:
        raise ValueError("not a number")
    if math.isnan(number):
        raise ValueError("nan is not allowed")
    return number


def _to_bool(value: Any) -> bool:
    word = str(value).lower() if isinstance(value, str | int) else ""
    if word not in BOOLS:
        raise ValueError(f"not one of {', '.join(BOOLS)}")
    return BOOLS[word]


def _to_str(value: Any) -> str:
    if isinstance(value, str | os.PathLike | numbers.Integral) and not isinstance(value, bool):
        return _plain_text(str(value))
    raise ValueError("not a text, and only whole numbers become one without quotes")


def _plain_text(text: str) -> str:
    """A text that files can hold and be named by; ~/x in the home folder."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a character (a lone surrogate), or bytes that are no UTF-8") from error
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return _at_home(text)


def _at_home(path: str) -> str:
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def _to_none(value: Any) -> None:
    if value is not None and str(value).lower() not in NONES:
        raise ValueError("not none")


def _to_plain(value: Any, depth: int = 0) -> Any:
    """For the items of a bare list or dict, which have no annotation: what JSON can hold, and tuples."""
    if depth > 50:
        raise ValueError("nested too deeply")
    if isinstance(value, Text):
        try:
            return _to_plain(_jsonable(_literal(value)), depth)
        except ValueError:
            return _plain_text(str(value))
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(_to_plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return {_to_str(key): _to_plain(item, depth + 1) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_text(value)
    if isinstance(value, numbers.Real):  # numpy's too
        return _to_int(value) if isinstance(value, numbers.Integral) else _to_float(value)
    return _to_str(value)


_SCALARS = {
    int: _to_int, float: _to_float, bool: _to_bool, str: _to_str, types.NoneType: _to_none, Any: _to_plain,
}
# A word in a union means the first of these that takes it; bool after the numbers: 1 is a boolean word too.
_SPECIFIC = [Literal, types.NoneType, int, float, bool, dict, list, tuple, str, Any]


def _origin(kind: Any) -> Any:
    """list of list[int], int of a Count."""
    origin = typing.get_origin(kind) or kind
    return typing.get_args(kind)[0] if origin is Annotated else origin


def _range(kind: Any) -> Range | None:
    """The Range of an annotation such as Count."""
    return kind.__metadata__[0] if typing.get_origin(kind) is Annotated else None


def _options(kind: Any) -> tuple:
    """The members of a union; a type that is none is its only option."""
    return typing.get_args(kind) if _origin(kind) in (Union, types.UnionType) else (kind,)


def _takes_dict(kind: Any) -> bool:
    return any(_origin(option) is dict for option in _options(kind))


def _words(kind: Any) -> set[str]:
    """The words that mean something of their own to a type. If "true" is one, the type can be a switch."""
    fixed = {bool: BOOLS, types.NoneType: NONES}
    return {str(word).lower() for option in _options(kind)
            for word in (typing.get_args(option) if _origin(option) is Literal else fixed.get(option, ()))}


def _type_name(kind: Any) -> str:
    if len(_options(kind)) > 1:
        return "|".join(map(_type_name, _options(kind)))
    if _origin(kind) is Literal:
        return "|".join(str(choice) or "''" for choice in typing.get_args(kind))
    if kind is types.NoneType:
        return "none"
    if isinstance(ranged := _range(kind), Range):
        return ranged.sign
    inside = [_type_name(part) for part in typing.get_args(kind) if part is not ...]
    return _origin(kind).__name__ + (f"[{', '.join(inside)}]" if inside else "")


# ------------------------------------------------------------------------------------- the dataclass's source


def _kinds(Config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(Config, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(Config)}


def _defaults(Config: type) -> dict[str, Any]:
    """Fresh default values, in the types of their annotations (`lr: float = 1` is 1.0)."""
    defaults, kinds = {}, _kinds(Config)
    for field in dataclasses.fields(Config):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        try:
            defaults[field.name] = convert(value, kinds[field.name])
        except ValueError as error:
            raise TypeError(f"{Config.__name__}.{field.name}: its default {value!r}: {error}") from error
    return defaults


def _script(Config: type) -> Path:
    """The file that defines Config; a class typed at a prompt belongs to a nameless script of this folder."""
    return Path(getattr(sys.modules.get(Config.__module__), "__file__", None) or "script.py")


def described_fields(Config: type) -> list[tuple[str, str, str]]:
    """(field, group heading, comment) in the fields' order; a subclass may reword its base's comments."""
    described: dict[str, tuple[str, str]] = {}
    for cls in reversed(Config.__mro__):
        for name, group, comment in _comments(cls) if dataclasses.is_dataclass(cls) else ():
            old_group, old_comment = described.get(name, (group, ""))
            described[name] = old_group, comment or old_comment
    return [(name, *described.get(name, ("settings", ""))) for name in _kinds(Config)]


@functools.cache
def _comments(cls: type) -> tuple[tuple[str, str, str], ...]:
    """(field, group heading, comment) of each, from a class's own source: a comment line of its own heads a group, or
    goes on with the comment above it where it begins with ^."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ()  # no source, as at a prompt: the settings work without their comments
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type == tokenize.COMMENT]
    comments = {token.start[0]: token.string.lstrip("#").strip() for token in tokens}
    for number in sorted(comments, reverse=True):
        if comments[number].startswith("^") and number - 1 in comments:
            comments[number - 1] += comments.pop(number)[1:]
    found = []
    group, line = "settings", tree.lineno
    for node in tree.body:
        heading = " ".join(comments.get(above, "").strip("-= ") for above in range(line + 1, node.lineno))
        group, line = heading.strip() or group, node.end_lineno
        if isinstance(node, ast.AnnAssign):
            found.append((node.target.id, group, comments.get(line, "")))
    return tuple(found)


# --------------------------------------------------------------------------------------------- values as text


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value


def _source(value: Any) -> str:
    """repr(value), except that an infinite float has a Python expression too."""
    if isinstance(value, float) and math.isinf(value):
        return f'float("{value}")'
    if isinstance(value, list):
        return f"[{', '.join(map(_source, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_source, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_source(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _short(value: Any) -> str:
    """repr(value), cut to fit an error line."""
    try:
        text = repr(value)
    except Exception:  # an integer of 5,000 digits, a list in a list in a list, an object of the user's
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def _with_item(mapping: Any, keys: list[str], value: Any) -> dict:
    """A copy of mapping in which mapping[keys[0]][keys[1]]... is value."""
    old = mapping if isinstance(mapping, dict) else {}
    return {**old, keys[0]: _with_item(old.get(keys[0]), keys[1:], value) if keys[1:] else value}


def print_text(text: str) -> None:
    """Print in any encoding, also into a closed pipe; of the processes torchrun starts, one prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        encoding = sys.stdout.encoding or "utf-8"
        try:
            print(text.encode(encoding, "backslashreplace").decode(encoding).removesuffix("\n"), flush=True)
        except BrokenPipeError:  # who reads, as head does, has seen enough; nothing may be left to flush at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
