"""What the sources share: a folder that is complete or not there, optional packages, progress, seeds."""

import difflib
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import DataError

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {  # what files call them
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
WRITTEN = (  # all that a job may leave in its folder
    "meta.json",
    "tokenizer.json",
    "train.bin",
    "val.bin",
    "train_plans.npy",
    "val_plans.npy",
    "val_oracle_nll.npy",
    "train.h5",
    "validation.h5",
    "test.h5",
)
WAIT_S = 600  # that ranks wait for data which rank 0 makes


class Workshop:
    """A folder beside the final one; `finish` renames its files into place, leaving early removes it."""

    def __init__(self, out_dir: str):
        self.target = Path(out_dir)
        self.folder = self.target / f".saving-{os.getpid()}"

    def __enter__(self) -> "Workshop":
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"out_dir = {self.target} cannot be made ({error.strerror}): use another folder") from error
        return self

    def finish(self, *names: str) -> None:
        """Put the files into place; what an earlier preparation left goes, and first of all its last name.

        So a kill between two renames cannot leave a set that looks whole.
        """
        stale = [name for name in WRITTEN if name not in names]
        for name in [names[-1], *stale]:
            (self.target / name).unlink(missing_ok=True)
        for name in names:
            os.replace(self.folder / name, self.target / name)

    def __exit__(self, kind, error, trace) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if kind and not any(self.target.iterdir()):
            self.target.rmdir()


def make_once(path: Path, make: Callable[[], object]) -> None:
    """Call make(), which ends with the file `path`, if that is not there: on rank 0, while the others wait."""
    if path.exists():
        return
    if int(os.environ.get("RANK", 0)) == 0:
        make()
        return
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise DataError(f"{path} did not come within {WAIT_S} s: make it first, with one process")
        time.sleep(0.1)


def counter_rng(seed: int, *counters: int) -> np.random.Generator:
    """A generator that is a pure function of a seed and of counters such as the epoch: neighbours are unrelated."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=counters))


def optional(module: str, package: str):
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"this needs the package {package}: pip install {package}") from None


def progress(things: Iterable, text: str, unit: str, total: int | None = None) -> Iterable:
    """The things, with a bar where somebody is watching."""
    return tqdm(things, desc=text, unit=unit, total=total, disable=not sys.stderr.isatty(), leave=False)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of names that is most like `name`, upper and lower case being the same; None where none is near.

    cutoff: least likeness, as of difflib.get_close_matches.
    """
    spellings = {}
    for known in names:
        spellings.setdefault(str(known).casefold(), str(known))
    near = difflib.get_close_matches(str(name).casefold(), spellings, n=1, cutoff=cutoff)
    return spellings[near[0]] if near else None


def quoted(names: Iterable[str], most: int = 12) -> str:
    """"'x', 'y' and 3 more", or "none": in quotes, a blank at the end of a name is seen."""
    texts = [repr(str(name)) for name in names]
    listed = ", ".join(texts[:most]) or "none"
    if len(texts) > most:
        listed += f" and {len(texts) - most} more"
    return listed


def closest(name: str, names: Iterable[str]) -> str:
    """", did you mean 'x'?", or "" where none of names is near."""
    near = nearest(name, names)
    return "" if near is None else f", did you mean {near!r}?"


def suggest(name: str, names: Iterable[str]) -> str:
    """"; did you mean 'x'? There are 'x', 'y', 'z'": what follows a name that is none of names."""
    names = list(names)
    near = nearest(name, names, cutoff=0.5)
    if near is None:
        return f"; there are {quoted(names)}"
    return f"; did you mean {near!r}? There are {quoted(names)}"


def from_here(path: Path) -> str:
    """A file as it can be named in the current folder: the way to it if it is below, else in full."""
    way = os.path.relpath(path)
    return os.path.abspath(path) if way.startswith("..") else way


def counted(number: int, noun: str, plural: str = "") -> str:
    """1 file, 2 files; with a plural of its own: 1 batch, 2 batches; 1 token is, 2 tokens are."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def report(problems: list[str]) -> None:
    """What an inspection ends with."""
    for problem in problems:
        print(f"  problem: {problem}")
    print(f"  {counted(len(problems), 'problem')}" if problems else "  no problem found")
