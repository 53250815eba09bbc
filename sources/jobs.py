"""Runs as processes: who is at work on a run, how one starts, on which GPU, and how it ends."""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from common import store
from common.errors import InputError, signals_to
from common.runlog import record_of

LOCK = "job.lock"  # of a sweep, in the folder of a run; the run itself holds store.LOCK
LOOK_SECONDS = 1.0  # between two looks at a run of another process, and at metrics.jsonl
GRACE_SECONDS = 120.0  # for a run that is asked to stop; it ends its step and saves


@dataclass
class Records:
    """The lines of a metrics.jsonl, read as it grows."""

    path: Path
    records: list[dict] = field(default_factory=list)
    seen: tuple = ()  # inode and length when it was read last

    def grown(self) -> bool:
        """Read on; whether there are new records."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                inode, done = self.seen or (status.st_ino, 0)
                if inode != status.st_ino:  # a run that goes on writes the file anew, without what it goes back on
                    done, self.records = 0, []
                file.seek(done)
                lines = file.read().split(b"\n")
        except OSError:
            return False
        lines.pop()  # one that is not whole yet
        new = [record for line in lines if (record := record_of(line.decode("utf-8", "replace")))]
        self.seen = status.st_ino, done + sum(len(line) + 1 for line in lines)
        self.records += new
        return bool(new)

    def last_step(self) -> int:
        return self.records[-1]["step"] if self.records else 0


@dataclass
class Job:
    """A run at work."""

    run: Any
    process: subprocess.Popen
    lock: IO
    gpu: str | None
    records: Records
    began: float
    seconds: float = 0.0  # that it took, once it has ended
    first_step: int = 0  # that it goes on from
    total: int | None = None  # of steps, as its log says
    looked: float = 0.0
    pruned: bool = False
    told: list[float] = field(default_factory=list)  # when it was asked to stop

    def end(self) -> tuple[int | None, float]:
        """(exit code, seconds) of a run that has ended."""
        return self.process.poll(), self.seconds


def take(folder: Path) -> IO | None:
    """Hold the lock of a run's folder, made if missing; None while another process is at work on it.

    Its process holds it as well, by the descriptor: where a sweep was killed and its runs were not, nobody starts one
    of them twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = store.hold(folder / LOCK)
    if lock and store.holder(folder):  # a page that nobody but its user started
        lock.close()
        return None
    return lock


def is_free(folder: Path) -> bool:
    """Whether no process is at work on the run of a folder."""
    if not (folder / LOCK).exists():
        return not store.holder(folder)
    lock = take(folder)
    if lock:
        lock.close()
    return lock is not None


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list of the signals to stop that came. They do nothing else for now."""
    came = []
    with signals_to(lambda number, frame: came.append(number)):
        yield came


def start(run: Any, command: list, lock: IO, jobs: int, gpu: str | None) -> Job:
    """A process for a run, in a session of its own: Ctrl-C reaches it by run_all alone."""
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    if jobs > 1:  # several runs of as many threads as there are cores would be in each other's way
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with open(run.folder / "console.log", "w") as console:
        process = subprocess.Popen([*command, *run.words], env=environment, stdin=subprocess.DEVNULL, stdout=console,
                                   stderr=console, start_new_session=True, pass_fds=[lock.fileno()])
    job = Job(run, process, lock, gpu, Records(run.folder / "metrics.jsonl"), time.perf_counter())
    job.records.grown()
    job.first_step = job.records.last_step()
    return job


def run_all(source: Any, command: list, jobs: int, gpus: list[str], came: list[int], working: list[Job]
            ) -> Iterator[tuple[Any, str, Job | None]]:
    """(run, status, what it was) of each run as it ends: done, failed, stopped or pruned.

    There is no job of a run that turns out to have ended before, nor of one that another process is at work on, whose
    status is elsewhere: it is told again when it has ended there, or here. None in the place of a run, some twenty
    times a second, tells that all are at work.

    Args:
        source: of runs, as sources.runs.Grid is.
        command: the words before those of a run. jobs: runs at a time. gpus: names of those to share, one a run.
        came: signals, after which no run starts and those at work save. working: filled with the runs at work.
    """
    elsewhere = deque()  # runs that other processes are at work on
    passed_on, asked, looked = 0, 0.0, 0.0
    try:
        while True:
            for job in [job for job in working if job.process.poll() is not None]:
                working.remove(job)
                asked = 0.0
                job.records.grown()
                job.seconds = time.perf_counter() - job.began
                with job.lock:  # nobody takes the run for one that was left before it is told what came of it
                    yield job.run, how_it_ended(job, came), job
            while len(working) < jobs and not came:
                now, run = time.monotonic(), None
                if now >= asked + LOOK_SECONDS:
                    run = source.next()
                    asked = 0.0 if run else now
                if run is None and elsewhere and now >= looked + LOOK_SECONDS / len(elsewhere):
                    run, looked = elsewhere.popleft(), now
                if run is None:
                    break
                lock, run.lock = run.lock or take(run.folder), None
                if lock is None:
                    if looked != now:  # not one that was elsewhere already
                        yield run, "elsewhere", None
                    elsewhere.append(run)
                elif source.has_ended(run):
                    with lock:
                        yield run, "done", None
                else:
                    working.append(start(run, command, lock, jobs, least_used(gpus, working)))
            if not working and (came or not elsewhere):
                return
            # A page saves and ends at the first signal; a second one, if it is SIGINT, ends it where it is.
            while passed_on < len(came):
                for job in working:
                    stop(job, signal.SIGINT if passed_on else signal.SIGTERM)
                passed_on += 1
            for job in working:
                watch(job, source)
            yield None, "", None
            time.sleep(0.05)
    finally:
        for job in working:
            stop(job, signal.SIGTERM)


def how_it_ended(job: Job, came: list[int]) -> str:
    if job.process.poll() == 0 and (job.run.folder / "summary.json").exists():
        return "done"
    if job.pruned:
        return "pruned"
    return "stopped" if came else "failed"


def watch(job: Job, source: Any) -> None:
    """Look at what a run at work has written, and stop it where there is no hope for it."""
    now = time.monotonic()
    if job.told and now > job.told[0] + GRACE_SECONDS:
        kill(job)
    if now < job.looked + LOOK_SECONDS:
        return
    job.looked = now
    if not job.records.grown():
        return
    # A run that starts anew in a folder goes back to the first step.
    job.first_step = min(job.first_step, job.records.last_step())
    if not job.told and source.hopeless(job.run, job.records.records):
        job.pruned = True
        stop(job, signal.SIGTERM)


def stop(job: Job, number: int) -> None:
    """Ask a run to stop; asked a third time, it is not asked any more."""
    job.told.append(time.monotonic())
    if len(job.told) > 2:
        kill(job)
    else:
        job.process.send_signal(number)


def kill(job: Job) -> None:
    """End a run that does not stop, and all processes that it started."""
    for pid in [*descendants(job.process.pid), job.process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have; none where there is no /proc."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended since
            parent = path.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def devices(jobs: int | None, gpus: int | None, launcher: str) -> tuple[int, list[str]]:
    """(runs at a time, names of the GPUs to share among them, one each).

    Args:
        jobs: that were asked for; -1: one a GPU, or a core without any; None: one a GPU of several, else one.
        gpus: how many to use; None: all, 0: none. launcher: words; what they start uses GPUs as it likes.

    Raises InputError.
    """
    names = [] if launcher or gpus == 0 else visible_gpus()
    if gpus is not None and gpus > len(names):
        why = "a launcher starts a run on several" if launcher else f"there are {len(names)} that can be used here"
        raise InputError(f"gpus={gpus}: {why}: leave it out, or use fewer")
    names = names[:gpus]
    at_a_time = jobs or max(1, len(names))
    if at_a_time == -1:
        at_a_time = len(names) or os.cpu_count() or 1
    # The only GPU there is needs no name, unless it was chosen among several.
    return at_a_time, names if len(names) > 1 or gpus else []


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that may be used."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in given.split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA reads it


def launch(words: str) -> list[str]:
    """The words of --launcher, which a Python script follows, with its program found. Raises InputError."""
    if not words.strip():
        return [sys.executable]
    try:
        program, *options = shlex.split(words)
    except ValueError as error:
        raise InputError(f"launcher={words}: {error}") from error
    # Beside Python too: torchrun is there in an environment that was not activated.
    place = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
    if not place:
        raise InputError(f"launcher={words}: there is no program {program}: install it, or give its path")
    return [place, *options]


def least_used(gpus: list[str], working: list[Job]) -> str | None:
    """The GPU with the fewest runs at work; None where there is nothing to choose."""
    if not gpus:
        return None
    used = Counter(job.gpu for job in working)
    return min(gpus, key=lambda gpu: used[gpu])
