"""What the sources share: a folder that is complete or not there, optional packages, progress, seeds."""

import contextlib
import difflib
import errno
import importlib
import math
import os
import platform
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np

from common.errors import DataError, os_error, os_sentence
from common.store import on_disk
from common.telling import bar

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
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
HDF5_BYTES = 1 << 16  # that a small file has beside its arrays
WAIT_S = 600  # for data that another process makes
LATE_S = 60  # after which a disk of the network shows what another machine has written


class Workshop:
    """A folder beside the final one; `finish` renames its files into place, leaving early removes it.

    What the system refuses meanwhile is a DataError, which says what became of the folder.
    """

    def __init__(self, out_dir: str):
        self.target = on_disk(out_dir)
        self.folder = self.target / f".saving-{os.getpid()}"
        self.is_whole = True  # what an earlier preparation left

    def __enter__(self) -> "Workshop":
        try:
            self.refuse_folders(WRITTEN)
            shutil.rmtree(self.folder, ignore_errors=True)  # of a killed process that had this number
            self.folder.mkdir(parents=True)
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            what = getattr(error, "strerror", None) or error
            raise DataError(f"out_dir = {self.target} cannot be made ({what}): use another folder") from error
        return self

    def refuse_folders(self, names: Iterable[str]) -> None:
        """Raises DataError where a folder has the name of a file that is to be put into place."""
        for name in names:
            if (self.target / name).is_dir():
                raise DataError(f"{self.target / name} is a folder, where a file shall be written: move it, or use "
                                "another out_dir")

    def finish(self, *names: str) -> None:
        """Put the files into place; what an earlier preparation left goes, and first of all its last name.

        So a kill between two renames cannot leave a set that looks whole.
        """
        self.refuse_folders(names)
        stale = [name for name in WRITTEN if name not in names]
        self.is_whole = False
        for name in [names[-1], *stale]:
            (self.target / name).unlink(missing_ok=True)
        for name in names:
            os.replace(self.folder / name, self.target / name)

    def __exit__(self, kind, error, trace) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if kind:
            with contextlib.suppress(OSError):  # it is not empty
                self.target.rmdir()
        failed = os_error(error)
        if failed is None:
            return
        if failed.filename is None and failed.errno in DISK_ERRORS:
            failed.filename = str(self.target)
        became = f"{self.target} is incomplete: the same command makes it anew"
        if self.is_whole:
            became = f"{self.target} is as it was" if self.target.exists() else "Nothing was written"
        sentence = os_sentence(failed).replace(f"{self.folder}{os.sep}", f"{self.target}{os.sep}")
        raise DataError(f"{sentence}. {became}") from error


def reserve(file: IO, size: int) -> None:
    """Take the space of a file's `size` bytes now. Raises OSError.

    A file that is mapped with holes in it ends the process by SIGBUS where the disk is full when they are written.
    """
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file.fileno(), 0, size)


def room_for(path: str | Path, size: int) -> None:
    """Raises OSError where a file of `size` bytes has no room beside `path`.

    HDF5 that meets a full disk cannot close its file, and may crash when the process ends: it is asked for before.
    """
    size += HDF5_BYTES
    place = os.statvfs(Path(path).parent)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if place.f_bavail * place.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    if most != resource.RLIM_INFINITY and most < size:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))


def spooled_array(dtype: np.dtype | type, *shape: int) -> np.ndarray:
    """An array in an unnamed temporary file, memory-mapped. Raises DataError where it does not fit there."""
    try:
        with tempfile.TemporaryFile() as file:
            reserve(file, np.dtype(dtype).itemsize * math.prod(shape))
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise DataError(f"{math.prod(shape) * np.dtype(dtype).itemsize:,} bytes do not fit into the folder of "
                        f"temporary files ({error.strerror or error}): set TMPDIR to a folder with room") from error


def make_once(path: Path, make: Callable[[], object]) -> None:
    """Call make(), which ends with the file `path`, if that is not there: on rank 0, while the others wait.

    Where machines do not share the disk, the first rank of each makes the file that it cannot see.
    """
    from common import ranks  # which brings torch: not for what starts no ranks

    word, is_first = f"{path} is made", is_first_of_machine()
    if int(os.environ.get("RANK") or 0) == 0:
        if not path.exists():
            make()
        ranks.tell(word)
    elif not wait_until(path.exists, word if is_first else on_this_machine(word)):
        if not is_first or not ranks.is_told(word):
            raise DataError(not_here(path))
        make()
    if is_first:
        ranks.tell(on_this_machine(word))


def wait_until(is_there: Callable[[], object], word: str) -> bool:
    """Wait for what another rank makes; False where it is not there LATE_S after a rank has told `word`.

    Where nobody could tell, as this process is in no job, for WAIT_S.
    """
    from common import ranks

    deadline = time.monotonic() + (WAIT_S if ranks.is_told(word) is None else LATE_S)
    while not is_there():
        if ranks.is_told(word) is False:  # who makes it lives, and is at it
            deadline = time.monotonic() + LATE_S
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def not_here(path: Path) -> str:
    return (f"{path} did not come into {os.getcwd()}, the folder of a rank which waited for another to make it: start "
            "the ranks of a machine in one folder, or make it there first, with one process")


def is_first_of_machine() -> bool:
    """Whether this process is the first rank of its machine, or alone."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


def on_this_machine(word: str) -> str:
    return f"{word} on {platform.node()}"


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
    """The things, with how far they are: see telling.bar."""
    return bar(things, text, total, unit)


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
    """", did you mean 'x'?", or "" where none of names is near, and not one alone has it as a word."""
    names = list(map(str, names))
    having = [known for known in names if name and str(name).casefold() in re.split(r"[^a-z0-9]", known.casefold())]
    near = nearest(name, names) or (having[0] if len(having) == 1 else None)
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
