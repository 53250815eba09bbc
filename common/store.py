"""Where a run lives: a folder that one process trains in at a time, and the URL that it is copied to.

out_dir=URL (s3://bucket/prefix, file://, memory://, whatever fsspec knows) works in a folder that stands for the URL,
out/.remote/NAME; s3_config=FILE copies out_dir=FOLDER to s3://BUCKET/PREFIX/FOLDER. See common/mirror.py.
"""

import configparser
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import CheckpointError, InputError, reason, regular_file
from common.mirror import CHECKPOINT, MIRRORS, Mirror, mirrored
from common.telling import note_once

LOCK = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP)
REMOTE = Path("out/.remote")  # where folders stand for URLs
KEPT = ("last.pt", "best.pt")  # what is fetched of a run that is looked at, beside all that is no checkpoint
KINDS = (".pt", ".ckpt", ".eqx")  # of checkpoints, the first for other files, too

# ---------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(cfg, rt) -> Iterator[Path]:
    """The folder of the run of cfg, locked and brought up to date by rank 0; at the end its copy is, too.

    A folder that is made for it and stays empty is removed, so a refused command leaves nothing.
    Raises InputError where the place cannot be used, or is in use.
    """
    if getattr(cfg, "out", ""):
        raise InputError(f"out = {cfg.out} is of a look at a run, with analyze: a run writes into out_dir")
    folder, url, profile = place_of(cfg.out_dir, cfg.s3_config)
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(locked(folder))
            if url:
                stack.enter_context(mirrored(folder, url, profile, cfg.resume == "never"))

        rt.from_main(enter)
        yield folder


def place_of(out_dir: str, s3_config: str = "") -> tuple[Path, str, str]:
    """(folder, URL of its copy or "", AWS profile or "") of a run. Raises InputError."""
    if not out_dir.strip():
        raise InputError("out_dir is empty: name a folder, . for this one")
    if is_url(out_dir):
        if s3_config:
            raise InputError("out_dir is a URL, and s3_config says where a folder is copied: give one of them")
        return staging(out_dir), plain_url(out_dir), ""
    if not s3_config:
        return Path(out_dir), "", ""
    bucket, prefix, profile = read_s3_config(s3_config)
    name = os.path.normpath(out_dir)
    if os.path.isabs(name):
        inside = os.path.relpath(name)
        name = name.lstrip("/") if inside.startswith("..") else inside
    if name.startswith(".."):
        raise InputError(f"out_dir={out_dir}: with s3_config it is a name below the bucket's prefix, which .. is not")
    return Path(out_dir), plain_url("/".join(["s3:/", *filter(None, (bucket, prefix, name))])), profile


def read_s3_config(path: str) -> tuple[str, str, str]:
    """(bucket, prefix, profile) of an .ini: [s3] bucket, prefix (may be missing), [aws] profile_name. InputError."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(regular_file(path, InputError).read_text(encoding="utf-8"))
        bucket, profile = parser["s3"]["bucket"].strip(), parser["aws"]["profile_name"].strip()
        prefix = parser["s3"].get("prefix", "").strip(" /")
    except (InputError, OSError) as error:
        raise InputError(f"s3_config = {getattr(error, 'strerror', error)}: name an .ini file, or --s3_config= for no "
                         "copy") from error
    except (ValueError, configparser.Error) as error:
        raise InputError(f"s3_config={path} is no .ini file ({reason(error)}): mend it") from error
    except KeyError as error:
        raise InputError(f"s3_config={path} has no {error.args[0]}: it needs [aws] with profile_name, [s3] with bucket "
                         "and, if wanted, prefix") from error
    if not bucket or "/" in bucket or is_url(prefix) or not profile:
        raise InputError(f"s3_config={path}: [s3] bucket is the name of a bucket, prefix a path in it, [aws] "
                         "profile_name the name of a profile")
    return bucket, prefix, profile


def is_url(place: str | Path) -> bool:
    """Whether this begins as a URL does; one that is written wrong, such as s3:/x, is refused by plain_url."""
    return bool(re.match(r"[\w+.:-]*:/", str(place)))


def plain_url(url: str | Path) -> str:
    """A URL without a slash at its end. Raises InputError where it names no place or, untold, may hold a secret."""
    scheme, _, rest = str(url).partition("://")
    where, _, path = rest.partition("/")
    if "@" in where or (":" in where and "@" in path) or "?" in rest:
        raise InputError(f"the URL {scheme}://... has a name, password or query in it, which would go to logs and "
                         "checkpoints: keep those in ~/.aws/credentials or in the environment")
    is_plain = re.fullmatch(r"[a-z][a-z0-9+]*", scheme) and "::" not in rest and rest.strip("/")
    if not is_plain or {".", ".."} & {*rest.split("/")} or bool(where) == (scheme in ("file", "local")):
        raise InputError(f"{url} is no place for a run: name s3://BUCKET/NAME, file:///FOLDER or what else fsspec has")
    return str(url).rstrip("/")


def staging(url: str) -> Path:
    """The folder of this machine that stands for a URL."""
    url = plain_url(url)
    name = re.sub(r"[^\w.=,-]+", "-", url.partition("://")[2]).strip("-.")[-60:]
    return REMOTE / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def on_disk(folder: str | Path, instead: str = "use a path", setting: str = "out_dir") -> Path:
    """A folder where URLs are not for. Raises InputError."""
    if is_url(folder):
        raise InputError(f"{setting}={plain_url(folder)} is a URL; here a folder of this machine is needed: {instead}")
    return Path(folder)


def local(place: str | Path) -> Path:
    """A run folder or checkpoint: itself, or, of a URL, what is fetched of it. Raises InputError, CheckpointError.

    Of a run its last and best weights are, of a checkpoint itself; while a run is at work here, its folder as it is.
    """
    if not is_url(place):
        return Path(place)
    url, name = plain_url(place), ""
    if url.endswith(KINDS):
        url, _, name = url.rpartition("/")

    def is_wanted(file: str) -> bool:
        return file == name or not (CHECKPOINT.fullmatch(file) or file.endswith(KINDS[1:])) or not name and file in KEPT

    folder = staging(url)
    if not holder(folder):
        made = make(folder)
        try:
            copy = Mirror(folder, url)
            if not copy.fetch(is_wanted, name):
                raise CheckpointError(f"there is no {'checkpoint' if name else 'run'} at {place}")
        finally:
            remove(made)
    return folder / name


def mirror(folder: Path, step: int | None = None) -> None:
    """Send what is new in a run folder to its URL, in the background; nothing for a folder that has none."""
    copy = MIRRORS.get(os.path.abspath(folder))
    if copy:
        copy.send_soon(step)


# ---------------------------------------------------------------------------------------------------------------
# One run a folder
# ---------------------------------------------------------------------------------------------------------------
HELD: weakref.WeakSet = weakref.WeakSet()


def let_go() -> None:
    """In a forked child, which must not hold a lock beyond the life of the run."""
    while HELD:
        HELD.pop().close()


os.register_at_fork(after_in_child=let_go)


def flock(file: IO, how: int = fcntl.LOCK_EX) -> None:
    """Lock a file; where its file system has no locks a note says so once, and all is as if it had. Raises OSError."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        note_once(f"there are no locks on the file system of {os.path.dirname(file.name) or '.'} ({error.strerror}): "
                 "see to it that no folder has two runs")


def hold(path: Path) -> IO | None:
    """Hold a lock file, made if missing, until it is closed or the process ends; None while another process does.

    Raises OSError, and InputError where something else has its name: through a link another file would be overwritten.
    """
    for _ in range(10):  # those who look whether it is held (see holder) hold it for a moment
        if path.is_symlink() or path.exists() and not path.is_file():
            raise InputError(f"{path} is no file of ours, but has the name of a lock: move it, or use another folder")
        try:
            file = open(path, "a+", encoding="utf-8")  # which programs that are started do not inherit
        except PermissionError:
            if not path.exists():
                raise
            file = open(path, encoding="utf-8")  # of another user: a file that one may read one may lock
        with contextlib.ExitStack() as stack:
            stack.callback(file.close)
            try:
                flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
                continue
            if not is_at(path, file):  # who held it before has removed it meanwhile
                continue
            if not file.writable():  # left by a run of that user which died: ours takes its place
                os.unlink(path)
                continue
            HELD.add(file)
            stack.pop_all()
            return file
    return None


def is_at(path: Path, file: IO) -> bool:
    """Whether an open file is still the one of this name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    return False


def holder(folder: Path) -> str:
    """Who trains in a folder: "a run on HOST, pid N, since TIME"; "" where nobody does."""
    if not (folder / LOCK).is_file():  # a pipe would be waited for
        return ""
    try:
        with open(folder / LOCK, encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return ""
            except BlockingIOError:
                return in_words(file.read())
    except OSError:  # no such file, or no locks
        return ""


def in_words(text: str) -> str:
    try:
        known = json.loads(text)
        return f"a run on {known['host']}, pid {known['pid']}, since {known['since']}"
    except (ValueError, KeyError, TypeError):  # it has just begun
        return "another run"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, made if missing. Raises InputError while another run does."""
    made, lock = [], None
    try:
        for is_last in (False, False, True):
            try:
                made += make(folder)
                lock = hold(folder / LOCK)
                break
            except FileNotFoundError:  # another run that was refused has just removed its folder
                if is_last:
                    raise
        if lock is None:
            who = holder(folder) or "another run"
            raise InputError(f"{folder} is in use by {who}: wait for it, stop it, or use another out_dir")
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                 "command": shlex.join(sys.argv)}
        lock.truncate(0)
        lock.write(json.dumps(facts) + "\n")
        lock.flush()
    except OSError as error:
        # A finished run in a folder that is read-only is only told again; any other ends where it first writes.
        if lock or made or os.access(folder, os.W_OK) or not folder.is_dir():
            release(lock, folder)
            remove(made)
            raise InputError(f"out_dir={folder} cannot be used ({error.strerror}): use another folder") from error
    try:
        yield
    finally:
        release(lock, folder)
        remove(made)


def release(lock: IO | None, folder: Path) -> None:
    if lock:
        HELD.discard(lock)
        with contextlib.suppress(OSError):
            if is_at(folder / LOCK, lock):  # not another run's, where the folder was moved and made anew
                os.unlink(folder / LOCK)  # before it is let go: nobody else holds it by that name
            lock.close()


def make(folder: Path) -> list[Path]:
    """Make a folder; returns those that are new, the innermost first. Raises InputError."""
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL, or letters that no file name here has
        what = getattr(error, "strerror", None) or str(error)
        advice = "start in a folder that can be written" if folder.is_relative_to(REMOTE) else "use another folder"
        raise InputError(f"{str(folder)!a} cannot be made ({what}): {advice}") from error
    return new


def remove(folders: list[Path]) -> None:
    """Remove folders that are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
