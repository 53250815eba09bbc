"""What goes wrong, and how a command ends: one sentence on stderr, exit code 2 for bad input and 1 for a failed run."""

import contextlib
import errno
import os
import re
import resource
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a scheduler's or torchrun's, a terminal closed
ECHO_SECONDS = 1.0  # of a signal: a scheduler sends it to all processes, of which torchrun passes it on to the others
ANOTHER_PLACE = "free some space, or choose another place"
IN_THE_WAY = "move what is in the way, or choose another name"
BROKEN = "the disk, or the way to it, fails: the system's log knows more"
ADVICE = {  # by what the system says
    errno.ENOSPC: ANOTHER_PLACE, errno.EDQUOT: ANOTHER_PLACE,
    errno.EFBIG: "files may not grow so large here: raise the limit (ulimit -f), or choose another place",
    errno.EROFS: "choose another place", errno.EACCES: "get the rights to it, or choose another place",
    errno.EPERM: "get the rights to it, or choose another place",
    errno.EISDIR: IN_THE_WAY, errno.ENOTDIR: IN_THE_WAY, errno.EEXIST: IN_THE_WAY, errno.ENOTEMPTY: IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter name", errno.ELOOP: "remove the link, which leads to itself",
    errno.ENOENT: "is the name right?",
    errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENFILE: "close what has many files open",
    errno.EIO: BROKEN, errno.ESTALE: BROKEN, errno.ENODEV: BROKEN, errno.ENXIO: BROKEN,
}  # fmt: skip
TOO_LARGE = (  # what numpy and torch say of sizes that are more than any machine has
    "Storage size calculation overflowed", "Overflow when unpacking long", "array is too big", "iterator is too large",
    "Maximum allowed dimension exceeded",
)  # fmt: skip
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


class Stopped(KeyboardInterrupt):
    """A signal that asks to stop came where nothing is lost by stopping at once."""

    def __init__(self, number: int):
        super().__init__("stopped" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")
        self.number = number


class RunError(Exception):
    """A run that had begun and cannot go on; the message says why, what was kept, and what to do, in one line."""


def reason(error: BaseException) -> str:
    """What an exception says, as part of a sentence: its kind and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def os_sentence(error: OSError) -> str:
    """What the system could not do: the file, the reason in words, what to do."""
    known = error.errno in errno.errorcode
    said = os.strerror(error.errno) if known else " ".join(str(error).split())[:200] or type(error).__name__
    names = [name for name in (error.filename, error.filename2) if name is not None]
    # Of the two names of a renaming the second is what was asked for, and the first may be a temporary one.
    place = f"{os.fsdecode(names[-1])}: " if names and not isinstance(names[-1], int) else ""
    advice = ADVICE.get(error.errno)
    return place + said[:1].lower() + said[1:] + (f": {advice}" if advice else "")


def os_error(error: BaseException | None) -> OSError | None:
    """The error of the system that this is, or that HDF5 or torch's writer made another of; None for any other."""
    if isinstance(error, OSError):
        return error
    if not isinstance(error, RuntimeError):
        return None
    if found := re.search(r"errno = (\d+)", str(error)):  # in a message of HDF5
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
        cause = error.__context__  # of the file that torch wrote to
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
        return OSError(number, os.strerror(number))
    return None


def system_sentence(error: BaseException | None) -> str:
    """What an error of the machine comes to, in a sentence; "" for any other, whose traceback is wanted."""
    text = str(error)
    if failed := os_error(error):
        return os_sentence(failed)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text \
            or isinstance(error, (RuntimeError, TypeError, ValueError)) and any(words in text for words in TOO_LARGE):
        return f"out of memory ({reason(error)}): make the batch, the model or the data smaller"
    if isinstance(error, OverflowError):
        return f"a number is too large ({reason(error)}): make the sizes smaller"
    if isinstance(error, RecursionError):
        return f"{reason(error)}: what was given is nested too deep"
    if isinstance(error, UnicodeEncodeError):
        wrong, told = error.object[error.start], error.object[max(0, error.start - 40) : error.start + 40]
        return (f"{told!a} cannot be spelled in {error.encoding}: leave {wrong!a} out"
                + ("" if error.encoding.startswith("utf") else ", or set PYTHONUTF8=1"))
    if isinstance(error, ValueError) and "embedded null" in text:
        return "a file name holds a NUL character: use another name"
    return ""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Around the writing of a file, maybe by another name in its folder: what fails names it. Raises OSError."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        failed = os_error(e)
        if failed is None:
            raise
        named = (failed.filename, failed.filename2)
        names = [os.fsdecode(name) for name in named if name is not None and not isinstance(name, int)]
        if not names or os.path.dirname(path) in map(os.path.dirname, names):
            failed.filename, failed.filename2 = os.fspath(path), None
        raise failed from e.__cause__


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end: that is whole, or as it was before.

    A pipe or device, such as /dev/stdout, is written to as it is. Raises OSError, naming `path`.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with writing(path):
            yield path
        return
    fresh = path.with_name(f".saving-{os.getpid()}-{path.name[-100:]}")
    with writing(path):
        try:
            yield fresh
            os.replace(fresh, path)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)


def print_aside(text: str) -> None:
    """A line on stderr, if that takes any."""
    try:
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        hush(sys.stderr)


def hush(stream) -> None:
    """Let a stream that takes no more lead nowhere: what it still holds would fail once more when Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def leave(message: str, code: int) -> NoReturn:
    """End the process after one `error:` line; of several ranks the first that ends prints."""
    _end(f"error: {message}", code)


def _end(last_line: str, code: int) -> NoReturn:
    flush_console()
    if speaks(code):
        print_aside(last_line)
    raise SystemExit(code)


def speaks(code: int) -> bool:
    """Whether this process says why it ends, with this exit code: alone, or as the first of several ranks."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return os.environ.get("LOCAL_RANK", "0") == "0"
    from common.ranks import ends_first  # with torch, which the one process of a command may not need

    return ends_first(code)


def exit_code(error: BaseException) -> int:
    """Of a command that this error ends: 2 for bad input and what the machine refuses, 1 for a run that failed."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT)
    return 2 if isinstance(error, InputError) or system_sentence(error) else 1


@contextlib.contextmanager
def signals_to(handler: Callable) -> Iterator[None]:
    """Let the signals that ask to stop call handler(number, frame); a hang-up that nohup has off stays off."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in STOPS
                  if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def stop_now(number: int, frame) -> NoReturn:
    """A signal ends what is being done, by an exception: what is half written goes. A second one ends the process."""
    came = time.monotonic()

    def end(number: int, frame) -> None:
        if time.monotonic() > came + ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for other in STOPS:
        if signal.getsignal(other) != signal.SIG_IGN:
            signal.signal(other, end)
    raise Stopped(number)


@contextlib.contextmanager
def no_stop_is_lost() -> Iterator[None]:
    """Python passes over what is raised while an object is finalised; a signal to stop is then sent once more."""
    before = sys.unraisablehook

    def send_again(passed_over) -> None:
        if not isinstance(passed_over.exc_value, Stopped):
            return before(passed_over)
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, stop_now)
        threading.Timer(0.05, os.kill, (os.getpid(), passed_over.exc_value.number)).start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = before


def flush_console(last: str = "") -> OSError | None:
    """Print what is waiting for it; returns what is wrong where standard output takes no more, which is then hushed."""
    try:
        sys.stdout.write(last)
        sys.stdout.flush()
    except (OSError, ValueError) as e:
        hush(sys.stdout)
        return e if isinstance(e, OSError) else None


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Around the whole of a command, which any error that is not a mistake of ours ends with one line.

    Exit codes: 2 for bad input and what the machine refuses before a run has begun, 1 for a run that failed, 130 for
    Ctrl-C, 143 for SIGTERM. Who reads standard output and goes, as head does, has seen enough: no line.
    """
    with signals_to(stop_now), no_stop_is_lost():
        try:
            yield
            if trouble := flush_console():
                raise trouble
        except (InputError, RunError, FloatingPointError) as e:
            leave(str(e), exit_code(e))
        except KeyboardInterrupt as e:
            _end(str(e) or "stopped", exit_code(e))
        except Exception as e:
            # What print could not print it has forgotten: whether that was the trouble a line more shows.
            trouble = flush_console("\n" if isinstance(e, OSError) and e.filename is None else "")
            if isinstance(trouble, BrokenPipeError):
                raise SystemExit(1) from e
            if trouble:
                leave(f"standard output: {os_sentence(trouble)}", 1)
            sentence = system_sentence(e)
            if not sentence:
                raise
            leave(sentence, exit_code(e))


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
        if system_sentence(e):
            raise
        frames = traceback.extract_tb(e.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename]
        line = (ours or frames)[-1]  # the innermost of the repository, not of torch
        raise InputError(f"{what} does not work ({reason(e)}; {os.path.basename(line.filename)}, line "
                         f"{line.lineno}): {advice}") from e


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """What asks for more memory than there is gets an error, which is a sentence; Linux would kill the process later.

    No less than half of the machine's is allowed, as others may give back what they have. Elsewhere nothing changes.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        told = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
        kilobytes = {name: int(number) for name, number in re.findall(r"(\w+):\s+(\d+) kB", told)}
        most = 1024 * (kilobytes["VmData"] + max(kilobytes["MemAvailable"], kilobytes["MemTotal"] // 2))
        resource.setrlimit(resource.RLIMIT_DATA, (min([most, *(limit for limit in before if limit >= 0)]), before[1]))
    except (OSError, KeyError, ValueError):  # no Linux
        pass
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


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
