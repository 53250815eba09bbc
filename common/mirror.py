"""The copy of a run folder at a URL: fetched at the start of a run, sent in the background.

An object changes from one whole file to the next: logs first, then step files, best.pt, last.pt, and index.json, which
names them and says who wrote. So a copy that broke off anywhere is a whole run; that a checkpoint is whole it says
itself where it is read. What another machine has written since is never written over.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import CheckpointError, InputError, reason, replacing
from common.telling import note

INDEX, RECORD = "index.json", ".remote.json"
CHECKPOINT = re.compile(r"(last|best|step_\d+)\.pt")
RETRY_SECONDS, MOST_SECONDS = 1.0, 30.0  # before a failed upload is tried again: doubled up to the most
WAIT_SECONDS, PATIENCE_SECONDS = 600.0, 30.0  # at the end of a run, for uploads; for uploads that fail
SLOW_SECONDS = 10.0  # until a start says that it waits
NOT_OF_THE_RUN = (".lock", "console.log", INDEX)
RUN_FILES = ("config.json", "config.yaml", "metrics.jsonl")  # by which a folder is known as that of a run
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)  # of a disk, not of a network
MIRRORS: dict[str, "Mirror"] = {}  # of the runs at work in this process, by folder


@contextlib.contextmanager
def mirrored(folder: Path, url: str, profile: str, anew: bool) -> Iterator[None]:
    """Bring a folder up to date with its copy, send what Mirror.send_soon asks for, and all at the end.

    anew: the run replaces what is there, once it has something to send. Raises InputError.
    """
    for left in (*folder.glob(".sending-*"), *folder.rglob(".fetching-*")):  # by a kill
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    copy = Mirror(folder, url, profile, anew)
    copy.look() if anew else copy.fetch(lambda name: True)
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
        index: of the URL, as read or written last: {"writer", "mark": of this version, "host", "time", "step",
            "names": of files that are there}, or None.
        there: names of the run's files at the URL.
        record: kept in the folder: {"writer": its name, "inode": of the folder, which a copy of it does not have,
            "files": {name: [bytes, time of its last change in ns, mark of the index it was fetched or sent under]}}.
    """

    def __init__(self, folder: Path, url: str, profile: str = "", anew: bool = False):
        self.folder, self.url, self.is_s3 = folder, url, urlsplit(url).scheme in ("s3", "s3a")
        self.fs, self.root = file_system(url, profile)
        self.index, self.there, self.step, self.is_anew = None, set(), 0, anew
        self.record = {"writer": "", "inode": 0, "files": {}}
        with contextlib.suppress(OSError, ValueError, TypeError):
            self.record |= json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if self.record["inode"] != (inode := folder.stat().st_ino):
            self.record |= {"writer": uuid.uuid4().hex, "inode": inode}
        if anew:
            self.record["files"] = {}
        self.change = threading.Condition()
        self.next: Path | None = None  # a snapshot to send
        self.thread: threading.Thread | None = None
        self.trouble, self.at_work, self.is_over = "", False, False

    # Fetching --------------------------------------------------------------------------------------------------

    def look(self) -> str:
        """Find what is at the URL; returns the mark of this version of it. Raises InputError, CheckpointError."""
        entries, slow = [], threading.Timer(SLOW_SECONDS, note, [f"waiting for an answer from {self.url}"])
        with self.in_words(), contextlib.ExitStack() as stack:
            slow.start()
            stack.callback(slow.cancel)
            self.index = self.read_index()
            if self.index is None and self.is_s3 and not self.fs.exists(self.root.partition("/")[0]):
                raise InputError(f"{self.url}: there is no such bucket: make it, or name another")
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                entries = [entry for entry in self.fs.ls(self.root, detail=True) if entry["type"] == "file"]
        names = {name for entry in entries if is_of_a_run(name := os.path.basename(entry["name"]))}
        if self.index:  # step files may have arrived before their index
            self.there = {*self.index["names"], *filter(CHECKPOINT.fullmatch, names)}
            self.step = self.index["step"]
            return self.index["mark"]
        # The top level of a run that was copied there by other means.
        is_run = any(name in RUN_FILES or name.endswith((".pt", ".ckpt", ".eqx")) for name in names)
        self.there = names if is_run else set()
        return hashlib.sha256(str(entries).encode()).hexdigest()

    def read_index(self) -> dict | None:
        try:
            text = self.fs.cat_file(f"{self.root}/{INDEX}")
        except FileNotFoundError:
            return None
        try:
            index = json.loads(text)
            if wrong := [name for name in index["names"] if not is_of_a_run(name)]:
                raise ValueError(f"{wrong[0]!a} is no file of a run")
            return index | {"writer": str(index["writer"]), "mark": str(index["mark"]), "step": int(index["step"])}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.url}/{INDEX} is damaged ({reason(error)}): remove it, and the files beside "
                                  "it are taken as they are") from error

    def try_out(self) -> None:
        """Write where nothing is yet, so that what cannot be written is known before training. Raises InputError."""
        if self.index is None:
            with self.in_words():
                self.put(b"", ".trial")
                with contextlib.suppress(Exception):  # who may write may not remove, maybe
                    self.fs.rm_file(f"{self.root}/.trial")

    def fetch(self, wanted: Callable[[str], bool], name: str = "") -> bool:
        """Get what the folder lacks of the files that are wanted; whether there is a copy at all, or that name in it.

        Raises InputError, and CheckpointError where a file is missing, or both sides have a newer one.
        """
        mark, known, todo = self.look(), self.record["files"], []
        if not self.there or (name and name not in self.there):
            return False
        is_mine = self.index is not None and self.index["writer"] == self.record["writer"]
        for file in filter(wanted, sorted(self.there, key=turn)):
            path, (*facts, seen) = self.folder / file, known.get(file, (0, 0, "never"))
            if path.exists() and (seen == mark or is_mine and seen):
                continue
            if CHECKPOINT.fullmatch(file) and path.exists() and facts != facts_of(path):
                raise CheckpointError(f"{self.url} was written by {who(self.index)}, and {path} holds what never "
                                      f"arrived there: remove {self.folder} to go on from the URL, use another "
                                      "out_dir, or resume=never to train anew")
            todo.append(file)
        if todo:
            note(f"fetching files of {self.url}: {len(todo)}, to {self.folder}")
        for file in todo:
            self.get(file)
            # A damaged one is fetched again next time: it may be put right.
            is_good = not CHECKPOINT.fullmatch(file) or is_whole(self.folder / file)
            known[file] = [*facts_of(self.folder / file), mark if is_good else ""]
            self.keep_record()
        return True

    def get(self, file: str) -> None:
        path = self.folder / file
        fresh = path.with_name(f".fetching-{os.getpid()}-{path.name[-100:]}")
        try:
            with self.in_words():
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    self.fs.get_file(f"{self.root}/{file}", str(fresh))
            if not fresh.exists():
                raise CheckpointError(f"{self.url}/{file} is missing, though {INDEX} beside it names it: bring it "
                                      "back, or go on in another out_dir from another checkpoint, by resume=URL")
            os.replace(fresh, path)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    # Sending ---------------------------------------------------------------------------------------------------

    def send_soon(self, step: int | None = None) -> None:
        """Take a snapshot of the folder, in place of one that waits to be sent."""
        self.step = self.step if step is None else step
        place = self.folder / f".sending-{uuid.uuid4().hex}"
        try:
            shutil.copytree(self.folder, place, copy_function=twin, ignore=what_is_not_sent)
        except OSError as error:  # a full disk, say; the next save has all of it
            self.tell(reason(error))
            shutil.rmtree(place, ignore_errors=True)
            return
        with self.change:
            old, self.next = self.next, place
            self.change.notify_all()
        if old:
            shutil.rmtree(old, ignore_errors=True)
        if self.thread is None:
            self.thread = threading.Thread(target=self.work, daemon=True)
            self.thread.start()

    def work(self) -> None:
        """Send one snapshot after the other, each until it arrives or there is a newer one, which has all of it."""
        place, pause = None, None
        while True:
            with self.change:
                if self.change.wait_for(lambda: self.next or self.is_over, pause):
                    if self.is_over:
                        return
                    old, place, self.next, self.at_work, pause = place, self.next, None, True, RETRY_SECONDS / 2
                    shutil.rmtree(old or "", ignore_errors=True)
            try:
                self.send(place)
                trouble, pause = "", None
            except Exception as error:  # whatever a network does; training does not end for it
                trouble, pause = redacted(reason(error)), min(2 * pause, MOST_SECONDS)
            self.tell(trouble)
            with self.change:
                self.at_work = bool(trouble)
                self.change.notify_all()

    def send(self, place: Path) -> None:
        """Send the files of a snapshot, and remove those at the URL that are not in it any more."""
        files, known = files_of(place), self.record["files"]
        fresh = [name for name in sorted(files, key=turn) if known.get(name, [])[:2] != files[name]]
        gone = self.there - (set() if self.is_anew else files.keys())  # such as step files beyond keep_last
        if "config.json" not in files or not (fresh or gone):  # a run that was refused before it began
            return
        self.keep_record()  # so that the writer is known again after a kill
        self.write_index(self.there - gone)
        for name in gone:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{name}")
            self.there.discard(name)
        self.is_anew = False
        for name in fresh:
            self.put(place / name, name)
            self.there.add(name)
        self.write_index(files)
        self.record["files"] = {name: [*facts, self.index["mark"]] for name, facts in files.items()}
        self.keep_record()

    def write_index(self, names) -> None:
        theirs = self.read_index()
        if theirs and theirs != self.index and theirs["writer"] != self.record["writer"]:
            raise RuntimeError(f"{who(theirs)} has written there since, and is not written over")
        index = {"writer": self.record["writer"], "mark": uuid.uuid4().hex, "host": socket.gethostname(),
                 "time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": self.step, "names": sorted(names)}
        self.put(json.dumps(index, indent=1).encode(), INDEX)
        self.index = index

    def put(self, content: Path | bytes, name: str) -> None:
        """Write an object so that its name has a whole one at any time: a put to S3 arrives whole or not at all."""
        target = f"{self.root}/{name}"
        folder, _, last = target.rpartition("/")
        fresh = target if self.is_s3 else f"{folder}/.sending-{last}"
        if not self.is_s3:
            self.fs.makedirs(folder, exist_ok=True)
        if isinstance(content, bytes):
            self.fs.pipe_file(fresh, content)
        else:
            self.fs.put_file(str(content), fresh)
        if not self.is_s3:
            self.fs.mv(fresh, target)

    def finish(self) -> None:
        """Send what is new, and wait for it, to a limit or a signal. Says what did not arrive."""
        if self.is_anew and not self.thread:  # refused before it began: what is at the URL stays
            return
        self.send_soon()
        began, is_told = time.monotonic(), False
        try:
            with self.change:
                while self.next or self.at_work:
                    waited = time.monotonic() - began
                    if waited > (PATIENCE_SECONDS if self.trouble else WAIT_SECONDS):
                        break
                    if waited > 1 and not is_told:
                        is_told = True
                        note(f"waiting for uploads to {self.url}")
                    self.change.wait(0.1)
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

    # Words -----------------------------------------------------------------------------------------------------

    def tell(self, trouble: str) -> None:
        """Say that uploads fail, once, and that they arrive again."""
        if trouble and not self.trouble and not self.is_over:
            note(f"uploads to {self.url} fail ({trouble}): training goes on, and they are tried again")
        if self.trouble and not trouble and not self.is_over:
            note(f"uploads to {self.url} arrive again")
        self.trouble = trouble

    def keep_record(self) -> None:
        with replacing(self.folder / RECORD) as fresh:
            fresh.write_text(json.dumps(self.record), encoding="utf-8")

    @contextlib.contextmanager
    def in_words(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store has its own kinds
            if isinstance(error, InputError) or getattr(error, "errno", None) in DISK:
                raise
            raise InputError(f"{self.url} cannot be used ({redacted(reason(error))}): see to the name, the network and "
                             "the credentials (for S3 AWS_PROFILE, AWS_ENDPOINT_URL)") from error


def file_system(url: str, profile: str):
    """(fsspec's file system, path in it) of a URL. Raises InputError."""
    import fsspec

    options, is_s3 = {}, url.startswith("s3")
    if is_s3:  # five tries, of s3fs; with botocore's a network that swallows packets is waited for by the hour
        options = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 0}},
                   "use_listings_cache": False, "skip_instance_cache": True} | ({"profile": profile} if profile else {})
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        how = "pip install s3fs" if is_s3 else "install what it names"
        raise InputError(f"{url} needs a package ({reason(error)}): {how}") from error
    except Exception as error:
        raise InputError(f"{url} cannot be used ({redacted(reason(error))}): use s3://BUCKET/NAME or a path") from error


def is_of_a_run(name: str) -> bool:
    """Whether this names a file that is sent: below the folder, not hidden, no lock or console of a sweep."""
    return not name.endswith(NOT_OF_THE_RUN) and all(part and part[0] != "." for part in name.split("/"))


def what_is_not_sent(folder: str, names: list[str]) -> list[str]:
    """Beside hidden files what is no file, and folders of runs that have copies of their own."""
    paths = {name: Path(folder, name) for name in names}
    return [name for name, path in paths.items() if not is_of_a_run(name) or not path.is_file()
            and (path.is_symlink() or not path.is_dir() or (path / RECORD).exists())]


def twin(path: str, target: str) -> None:
    """A second name for a file that is replaced and never written over; a copy of one that grows."""
    if not path.endswith((".jsonl", ".log")):
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(path, target)
            return
    shutil.copy2(path, target)


def files_of(folder: Path) -> dict[str, list[int]]:
    return {path.relative_to(folder).as_posix(): facts_of(path) for path in folder.rglob("*") if path.is_file()}


def facts_of(path: Path) -> list[int]:
    """[bytes, time of its last change in ns] of a file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is as the checksums of its archive say."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged ones raise a dozen kinds
        return False


def turn(name: str) -> tuple:
    """Sorts files into the order in which they are sent: what people read, then step files, best.pt, last.pt."""
    return name == "last.pt", name == "best.pt", bool(CHECKPOINT.fullmatch(name)), name


def who(index: dict | None) -> str:
    return f"{index.get('host')} at {index.get('time')} (step {index['step']})" if index else "somebody"


def redacted(text: str) -> str:
    return re.sub(r"//[^/\s@]+@", "//***@", text)
