"""The copy of a run folder at a URL: fetched at the start of a run, sent in the background.

An object changes from one whole file to the next, and index.json tells what each may be, by size and SHA-256: before
files are sent as they are and as they will be, afterwards as they are. So a copy that broke off anywhere is a whole
run. An index that another machine has written since is never written over.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from common.errors import CheckpointError, InputError, reason, say_aside

INDEX, RECORD = "index.json", ".remote.json"
CHECKPOINT = re.compile(r"(last|best|step_\d+)\.pt")
AT_ONCE = ("s3", "s3a")  # where a put arrives whole or not at all; elsewhere a file gets its name once it is whole
RETRY_SECONDS, MOST_SECONDS = 1.0, 30.0  # before a failed upload is tried again: doubled up to the most
WAIT_SECONDS, PATIENCE_SECONDS = 600.0, 30.0  # at the end of a run, for uploads; for uploads that fail
NOT_OF_THE_RUN = (".lock", "console.log")
RUN_FILES = ("config.json", "config.yaml", "metrics.jsonl")  # by which a folder is known as that of a run
MIRRORS: dict[str, "Mirror"] = {}  # of the runs at work in this process, by folder


@contextlib.contextmanager
def mirrored(folder: Path, url: str, profile: str, anew: bool) -> Iterator[None]:
    """Bring a folder up to date with its copy, send what Mirror.send_soon asks for, and all at the end.

    anew: the run replaces what is there. Raises InputError.
    """
    for left in (*folder.glob(".sending-*"), *folder.rglob(".fetching-*")):  # by a kill
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    copy = Mirror(folder, url, profile)
    copy.replace() if anew else copy.fetch(lambda file: True)
    copy.try_out()
    MIRRORS[os.path.abspath(folder)] = copy
    try:
        yield
    finally:
        del MIRRORS[os.path.abspath(folder)]
        copy.finish()


class Mirror:
    """A folder and its copy at a URL.

    Attributes:
        index: of the URL, as read or written last: {"writer", "mark": of this version, "host", "time", "step", "files":
            {name: what it may be, [{"bytes", "sha256"}, ...]}, "new": names that may not be there yet, "gone": names
            that may still be there}.
        record: kept in the folder: {"writer": a name of its own, "seen": mark of the index that was fetched last,
            "synced": {file: facts_of it as sent or fetched}}.
    """

    def __init__(self, folder: Path, url: str, profile: str = ""):
        self.folder, self.url, self.scheme = folder, url, urlsplit(url).scheme
        self.fs, self.root = file_system(url, profile)
        self.record = {"writer": uuid.uuid4().hex, "seen": "", "synced": {}}
        with contextlib.suppress(OSError, ValueError, TypeError):
            self.record |= json.loads((folder / RECORD).read_text(encoding="utf-8"))
        self.index: dict | None = None
        self.change = threading.Condition()
        self.next: tuple[Path, set] | None = None  # a snapshot to send, and the names of all files
        self.thread: threading.Thread | None = None
        self.trouble, self.number, self.step, self.at_work, self.is_over = "", 0, 0, False, False

    # Fetching --------------------------------------------------------------------------------------------------

    def look(self) -> dict[str, list]:
        """{file: what it may be} at the URL. Raises InputError, CheckpointError."""
        with self.in_words():
            self.index = self.read_index()
            if self.index is None and self.scheme in AT_ONCE and not self.fs.exists(self.root.partition("/")[0]):
                raise InputError(f"{self.url}: there is no such bucket: make it, or name another")
            self.step = (self.index or {}).get("step", 0)
            return self.index["files"] if self.index else self.files_without_index()

    def read_index(self) -> dict | None:
        try:
            text = self.fs.cat_file(f"{self.root}/{INDEX}")
        except FileNotFoundError:
            return None
        try:
            index = json.loads(text)
            for versions in index["files"].values():
                _ = versions[0], [(int(one["bytes"]), str(one["sha256"])) for one in versions]
            names = [*index["files"], *index.setdefault("new", []), *index.setdefault("gone", [])]
            outside = [name for name in names if name.startswith("/") or ".." in PurePosixPath(name).parts]
            if outside:
                raise ValueError(f"{outside[0]!a} is not below it")
            return index
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{self.url}/{INDEX} is damaged ({reason(error)}): remove it, and the files beside "
                                  "it are taken as they are") from error

    def files_without_index(self) -> dict[str, list]:
        """The top level of a run that was copied there by other means, without checksums."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            entries = [entry for entry in self.fs.ls(self.root, detail=True) if entry["type"] == "file"]
            files = {PurePosixPath(entry["name"]).name: [{"bytes": entry["size"]}] for entry in entries}
            if any(name in RUN_FILES or name.endswith((".pt", ".ckpt", ".eqx")) for name in files):
                return files
        return {}

    def who(self, index: dict | None) -> str:
        if not index:
            return "somebody"
        return f"{index.get('host')} at {index.get('time')} (step {index.get('step')})"

    def replace(self) -> None:
        """Know what is at the URL, to be replaced by a run that starts anew."""
        self.look()
        self.record = {"writer": uuid.uuid4().hex, "seen": "", "synced": {}}
        if (self.folder / RECORD).exists():
            self.keep_record()

    def try_out(self) -> None:
        """Write where nothing is yet, so that what cannot be written is known before training. Raises InputError."""
        if self.index is None:
            with self.in_words():
                with self.whole("empty") as target:
                    self.fs.pipe_file(target, b"")
                with contextlib.suppress(Exception):  # who may write may not remove, maybe
                    self.fs.rm_file(f"{self.root}/empty")

    def fetch(self, wanted: Callable[[str], bool], name: str = "") -> bool:
        """Get what the folder lacks of the files that are wanted; whether there is a copy at all, or that name in it.

        Raises InputError, and CheckpointError where a file is missing or damaged, or both sides have a newer one.
        """
        files = self.look()
        if not files or (name and name not in files):
            return False
        index = self.index or {}
        # Nobody else has written since this folder was sent or fetched.
        is_mine = index.get("writer") == self.record["writer"] or index.get("mark", "none") == self.record["seen"]
        todo = []
        for file, versions in files.items():
            path = self.folder / file
            if not wanted(file) or (path.exists() and (is_mine or self.is_one_of(path, versions))):
                continue
            if path.exists() and self.has_changed(file):
                raise CheckpointError(f"{self.url} was written by {self.who(self.index)}, and {path} holds what never "
                                      f"arrived there: remove {self.folder} to go on from the URL, use another "
                                      "out_dir, or resume=never to train anew")
            todo.append(file)
        if todo:
            note(f"fetching files of {self.url}: {len(todo)}, to {self.folder}")
        for file in todo:
            self.get(file, files[file])
        if todo or not is_mine:
            self.record["seen"] = index.get("mark", "")
            self.keep_record()
        return True

    def get(self, file: str, versions: list) -> None:
        path = self.folder / file
        fresh = path.with_name(f".fetching-{os.getpid()}-{path.name}")
        try:
            with self.in_words():
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    self.fs.get_file(f"{self.root}/{file}", str(fresh))
            if not fresh.exists() and self.index and file in self.index.get("new", ()):  # it never arrived
                return
            if not fresh.exists() or (self.index and not self.is_one_of(fresh, versions)):
                what = "is damaged: it is not what" if fresh.exists() else "is missing, though it is in what"
                raise CheckpointError(f"{self.url}/{file} {what} {INDEX} beside it says: bring it back, or name "
                                      "another checkpoint of that run by its URL")
            os.replace(fresh, path)
            self.record["synced"][file] = facts_of(path)
        finally:
            fresh.unlink(missing_ok=True)

    def is_one_of(self, path: Path, versions: list) -> bool:
        """Whether a file is as the index has it; without an index nobody knows."""
        if path.stat().st_size not in [one["bytes"] for one in versions]:
            return False
        return self.index is not None and digest(path) in [one["sha256"] for one in versions]

    def has_changed(self, file: str) -> bool:
        """Whether a file is another than was sent or fetched."""
        synced = self.record["synced"].get(file)
        return synced is None or facts_of(self.folder / file, synced)[2] != synced[2]

    # Sending ---------------------------------------------------------------------------------------------------

    def send_soon(self, step: int | None = None) -> None:
        """Take a snapshot of what is not at the URL yet, in place of one that waits to be sent."""
        self.number += 1
        self.step = self.step if step is None else step
        place, names = self.folder / f".sending-{os.getpid()}-{self.number}", set()
        try:
            for path in files_of(self.folder):
                name, status = path.relative_to(self.folder).as_posix(), path.stat()
                names.add(name)
                if self.record["synced"].get(name, [])[:2] != [status.st_size, status.st_mtime_ns]:
                    twin(path, place / name)
        except OSError as error:  # a full disk, say; the next save has all of it
            self.tell(reason(error))
            shutil.rmtree(place, ignore_errors=True)
            return
        with self.change:
            old, self.next = self.next, (place, names)
            self.change.notify_all()
        if old:
            shutil.rmtree(old[0], ignore_errors=True)
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, daemon=True)
            self.thread.start()

    def work(self) -> None:
        """Send one snapshot after the other, each until it arrives or there is a newer one, which has all of it."""
        while not self.is_over:
            with self.change:
                self.change.wait_for(lambda: self.next or self.is_over)
                if self.is_over:
                    return
                (place, names), self.next, self.at_work = self.next, None, True
            pause = RETRY_SECONDS
            while not self.has_sent(place, names):
                with self.change:
                    if self.change.wait_for(lambda: self.next or self.is_over, pause):
                        break
                pause = min(2 * pause, MOST_SECONDS)
            shutil.rmtree(place, ignore_errors=True)
            with self.change:
                self.at_work = False
                self.change.notify_all()

    def has_sent(self, place: Path, names: set[str]) -> bool:
        try:
            self.send(place, names)
        except Exception as error:  # whatever a network does; training does not end for it
            self.tell(redacted(reason(error)))
            return False
        self.tell("")
        return True

    def send(self, place: Path, names: set[str]) -> None:
        """Send the files of a snapshot, and remove those at the URL that are not among the names any more."""
        if "config.json" not in names:  # a run that was refused before it began
            return
        theirs = self.read_index()
        if theirs != self.index and (theirs or {}).get("writer") != self.record["writer"]:
            raise RuntimeError(f"{self.who(theirs)} has written there since, and is not written over")
        synced, fresh = self.record["synced"], {}
        for path in sorted(files_of(place), key=turn):
            name = path.relative_to(place).as_posix()
            facts = facts_of(path, synced.get(name))
            if facts != synced.get(name):
                fresh[name] = facts
        new = {name: {"bytes": facts[0], "sha256": facts[2]} for name, facts in fresh.items()}
        before = theirs["files"] if theirs else {}
        gone = {*before, *(theirs or {}).get("gone", ())} - names  # such as step files beyond keep_last
        if not fresh and not gone & {*before}:
            return
        may_be = {name: [*(other for other in before.get(name, []) if other != one), one] for name, one in new.items()}
        unseen = {*new} - {*before} | {*(theirs or {}).get("new", ())}
        self.write_index(before | may_be, new=unseen)
        for name in fresh:
            with self.whole(name) as target:
                self.fs.put_file(str(place / name), target)
        files = before | {name: [one] for name, one in new.items()}
        self.write_index({name: versions for name, versions in files.items() if name in names}, gone=gone)
        for name in gone:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{name}")
        self.record["synced"] = {name: facts for name, facts in (synced | fresh).items() if name in names}
        self.keep_record()

    def write_index(self, files: dict, new: Iterable[str] = (), gone: Iterable[str] = ()) -> None:
        index = {"writer": self.record["writer"], "mark": uuid.uuid4().hex, "host": socket.gethostname(),
                 "time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": self.step, "files": files, "new": sorted(new),
                 "gone": sorted(gone)}
        if not (self.folder / RECORD).exists():
            self.keep_record()  # so that the writer is known again after a kill
        with self.whole(INDEX) as target:
            self.fs.pipe_file(target, json.dumps(index, indent=1).encode())
        self.index = index

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[str]:
        """Where to write so that an object is whole at any time."""
        target = f"{self.root}/{name}"
        if self.scheme in AT_ONCE:
            yield target
            return
        folder, _, last = target.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        yield f"{folder}/.sending-{last}"
        self.fs.mv(f"{folder}/.sending-{last}", target)

    def finish(self) -> None:
        """Send what is new, and wait for it, to a limit or a signal. Says what did not arrive."""
        self.send_soon()
        try:
            self.wait()
        finally:
            with self.change:
                is_missing = self.next or self.at_work or self.trouble
                self.is_over = True
                self.change.notify_all()
            if is_missing:
                note(f"not all of {self.folder} is at {self.url} ({self.trouble or 'nobody waited any longer'}): "
                     "the same command sends what is missing, and trains no step twice")
            if self.thread:
                self.thread.join(1.0)
            for place in self.folder.glob(".sending-*"):
                shutil.rmtree(place, ignore_errors=True)

    def wait(self) -> None:
        began, is_told = time.monotonic(), False
        with self.change:
            while self.next or self.at_work:
                waited = time.monotonic() - began
                if waited > (PATIENCE_SECONDS if self.trouble else WAIT_SECONDS):
                    break
                if waited > 1 and not is_told:
                    is_told = True
                    note(f"waiting for uploads to {self.url}")
                self.change.wait(0.1)

    # Words -----------------------------------------------------------------------------------------------------

    def tell(self, trouble: str) -> None:
        """Say that uploads fail, once, and that they arrive again."""
        if self.is_over:
            return
        if trouble and not self.trouble:
            note(f"uploads to {self.url} fail ({trouble}): training goes on, and they are tried again")
        if self.trouble and not trouble:
            note(f"uploads to {self.url} arrive again")
        self.trouble = trouble

    def keep_record(self) -> None:
        fresh = self.folder / f"{RECORD}-{os.getpid()}"
        fresh.write_text(json.dumps(self.record), encoding="utf-8")
        os.replace(fresh, self.folder / RECORD)

    @contextlib.contextmanager
    def in_words(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # each store has its own kinds
            raise InputError(f"{self.url} cannot be used ({redacted(reason(error))}): see to the name, the network and "
                             "the credentials (for S3 AWS_PROFILE, AWS_ENDPOINT_URL)") from error


def file_system(url: str, profile: str):
    """(fsspec's file system, path in it) of a URL. Raises InputError."""
    import fsspec

    options, is_s3 = {}, urlsplit(url).scheme in AT_ONCE
    if is_s3:  # by default a network that swallows packets is waited for by the hour
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
        options |= {"use_listings_cache": False, "skip_instance_cache": True}
        options |= {"profile": profile} if profile else {}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        how = "pip install s3fs" if is_s3 else "install what it names"
        raise InputError(f"{url} needs a package ({reason(error)}): {how}") from error
    except Exception as error:
        raise InputError(f"{url} cannot be used ({redacted(reason(error))}): use s3://BUCKET/NAME or a path") from error


def files_of(folder: Path) -> list[Path]:
    """The files of a run, without hidden ones, those of a sweep, and runs below it that have copies of their own."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and not Path(place, name, RECORD).exists()]
        found += [Path(place, name) for name in files if name[0] != "." and not name.endswith(NOT_OF_THE_RUN)]
    return found


def turn(path: Path) -> tuple:
    """Sorts files into the order in which they are sent: what people read, then step files, best.pt, last.pt."""
    return path.name == "last.pt", path.name == "best.pt", bool(CHECKPOINT.fullmatch(path.name)), str(path)


def twin(path: Path, target: Path) -> None:
    """A second name for a checkpoint, which is replaced and never written over; a copy of what grows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(path, target)
            return
    shutil.copy2(path, target)


def facts_of(path: Path, known: list | None = None) -> list:
    """[bytes, time of its last change in ns, SHA-256] of a file; as known where bytes and time are."""
    status = path.stat()
    now = [status.st_size, status.st_mtime_ns]
    return known if known and known[:2] == now else [*now, digest(path)]


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def redacted(text: str) -> str:
    return re.sub(r"//[^/\s@]+@", "//***@", text)


def note(text: str) -> None:
    """A line on stderr that no progress bar tears."""
    with tqdm.external_write_mode(file=sys.stderr):
        say_aside(f"note: {text}")
