"""What goes wrong, and how a command ends: one sentence on stderr, exit code 2 for bad input and 1 for a failed run."""

import contextlib
import errno
import os
import stat
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

KINDS_OF_FILES = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK,
                  "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode)}


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was wrong, where, and what to do, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class DataError(InputError):
    """A source or a data file cannot be used."""


class CheckpointError(InputError):
    """A checkpoint cannot be used."""


class RunError(Exception):
    """A run that had begun has failed; the message says why, what was kept, and what to do."""


def reason(error: BaseException) -> str:
    """What an exception says, as part of a sentence: its kind and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def leave(message: str, code: int) -> NoReturn:
    """End the process after one `error:` line; of the processes torchrun starts, one prints."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", " ".join(message.splitlines()), file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Around the work of a command: bad input ends it with code 2, a loss or weight that is not finite with code 1."""
    try:
        yield
    except InputError as e:
        leave(str(e), 2)
    except (RunError, FloatingPointError) as e:
        leave(str(e), 1)


@contextlib.contextmanager
def rehearsal(what: str = "what the end of the run asks of model and data", advice: str = "mend that before it trains"
              ) -> Iterator[None]:
    """Around a trial, before the first step, of what the end of a run asks of model and data.

    A page edited by its user fails here within a second, with a sentence that names the line, not after training.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename]
        line = (ours or frames)[-1]  # the innermost of the repository, not of torch
        raise InputError(f"{what} does not work ({reason(e)}; {os.path.basename(line.filename)}, line "
                         f"{line.lineno}): {advice}") from e


def regular_file(path: str | os.PathLike, error: type[InputError] = DataError) -> Path:
    """The path of a file that has an end and something in it; raises `error` for what is none, without opening it.

    To open a pipe is to wait for its writer, a device may never end, and a name with NUL opens another file in HDF5.
    """
    try:
        status = os.stat(path)
    except ValueError as e:
        raise error(f"{str(path)!r} is no name of a file ({e})") from e
    except OSError as e:
        raise error(f"{path}: {'no such file' if e.errno == errno.ENOENT else e.strerror}") from e
    kind = next((kind for kind, is_of in KINDS_OF_FILES.items() if is_of(status.st_mode)), "")
    if kind:
        raise error(f"{path} is a {kind}, and no file: name a file")
    if not status.st_size:
        raise error(f"{path} is empty: copy or make it again")
    return Path(path)
