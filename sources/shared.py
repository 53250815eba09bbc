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


def counter_rng(seed: int, *counters: int) -> np.random.Generator:
    """A generator that is a pure function of a seed and of counters such as the epoch: neighbours are unrelated."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=counters))


def optional(module: str, package: str):
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"this needs the package {package}: pip install {package}") from None


SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev":
               "validation", "test": "test"}


def progress(things: Iterable, text: str, unit: str, total: int | None = None) -> Iterable:
    return tqdm(things, desc=text, unit=unit, total=total, disable=not sys.stderr.isatty(), leave=False)


# all that a job may leave in its folder
WRITTEN = ("meta.json", "tokenizer.json", "train.bin", "val.bin", "train_plans.npy", "val_plans.npy",
           "val_oracle_nll.npy", *(f"{split}.h5" for split in SPLITS))


class Workshop:
    """A folder beside the final one; `finish` renames its files into place, leaving early removes it."""

    def __init__(self, out_dir: str):
        self.target = Path(out_dir)
        self.folder = self.target / f".saving-{os.getpid()}"

    def __enter__(self) -> "Workshop":
        try:
            self.folder.mkdir(parents=True)
        except OSError as e:
            raise DataError(f"out_dir = {self.target} cannot be made ({e.strerror}): use another folder") from e
        return self

    def finish(self, *names: str) -> None:
        """Put the files into place; what an earlier preparation left goes, and first of all its last name.

        So a kill between two renames cannot leave a set that looks whole.
        """
        for name in [names[-1], *(name for name in WRITTEN if name not in names)]:
            (self.target / name).unlink(missing_ok=True)
        for name in names:
            os.replace(self.folder / name, self.target / name)

    def __exit__(self, kind, error, trace) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if kind and not any(self.target.iterdir()):
            self.target.rmdir()


def suggest(name: str, names: Iterable[str]) -> str:
    """"; did you mean 'x'? There are x, y, z": what follows a name that is none of names."""
    names = list(map(str, names))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return (f"; did you mean {near[0]!r}? There are" if near else "; there are") + f" {listed or 'none'}"


def report(problems: list[str]) -> None:
    for problem in problems:
        print(f"  problem: {problem}")
    print("  no problem found" if not problems else f"  {len(problems)} problems")


def make_once(path: Path, make: Callable[[], object]) -> None:
    """Call make(), which ends with the file `path`, if that is not there: on rank 0, while the others wait."""
    if not path.exists() and int(os.environ.get("RANK", 0)) == 0:
        make()
    for _ in range(6_000):  # ten minutes
        if path.exists():
            return
        time.sleep(0.1)
