"""The processes of a job that trains on several: who takes part, who lives, and how all end when one does.

They share a store, that of torchrun or rank 0's own. The first rank that ends with an error, or that finds another one
dead, writes so there under "end" and is the one that says why; the others end quietly, with its exit code.
"""

import contextlib
import json
import os
import platform
import select
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from common.errors import exit_code, leave, print_aside
from common.telling import note

JOIN_SECONDS = 600  # for all ranks to come: to import from a shared disk may take minutes
GRACE_SECONDS = 10  # for a rank to end by itself after another did; NCCL blocks for ever
NOTICE_SECONDS = 3  # for word of who ended, after a connection broke
_job: dict = {}  # of this process: the store, and how many groups it was in


def environment() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of ranks), as torchrun sets them, or SLURM's where WORLD_SIZE alone is set.

    Exits with code 2 where the variables are not those of a job.
    """
    for name, slurm in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if "WORLD_SIZE" in os.environ and slurm in os.environ:
            os.environ.setdefault(name, os.environ[slurm])
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    told |= {name: os.environ[name] for name in (*told, "MASTER_PORT") if os.environ.get(name)}
    advice = "start ranks by torchrun, which sets it, or unset WORLD_SIZE and RANK to train alone"
    for name, text in told.items():
        if not text.isdecimal():
            leave(f"{name}={text} is no number: {advice}", 2)
    rank, local_rank, size = (int(told[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if size > 1 and not os.environ.get(name)]
    if missing:
        leave(f"WORLD_SIZE={size} without {', '.join(missing)}: {advice}", 2)
    if rank >= size:
        leave(f"RANK={rank} with WORLD_SIZE={size}, where ranks are below: {advice}", 2)
    if size == 1 and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and os.environ.get("SLURM_PROCID") == "0":
        note("every task of srun trains a run of its own: for one run of all start torchrun once a node")
    return rank, local_rank, size


def ends_first(code: int) -> bool:
    """Tell the other ranks that this one ends with an error; whether it is the first of all, and so says why."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 2:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = _job["store"] if "store" in _job else _connect(1)
    except (OSError, ValueError, KeyError, dist.DistError):
        store = None
    if store is None:
        return True  # nobody to ask, and it may be wrong on this rank alone
    end = _end(store, int(os.environ.get("RANK") or 0), code)
    return end is None or end["by"] == _me()


def tell(word: str) -> None:
    """Let the other ranks know something; it stays known."""
    if _job.get("store"):
        _job["store"].set(word, "")


def is_told(word: str) -> bool | None:
    """Whether a rank has told this word; None where this process is in no job. Ends with a job that ends."""
    store = _job.get("store")
    if store and store.check(["end"]):
        raise SystemExit(json.loads(store.get("end"))["code"])
    return store and store.check([word])


def _me() -> list:
    return [platform.node(), os.getpid()]


def _end(store: dist.Store, rank: int | None, code: int, died: str = "") -> dict | None:
    """How the job ends, by the first who said so, which may be this call; None where the store is gone."""
    mine = {
        "rank": rank,
        "code": code,
        "died": died,
        "by": _me(),
    }
    with contextlib.suppress(dist.DistError):
        return json.loads(store.compare_set("end", "", json.dumps(mine)))
    return None


def _connect(seconds: float, hosts: bool = False) -> dist.Store:
    """A connection to the store of the job; a call that waits blocks all others on the same one.

    Raises OSError where nobody answers at MASTER_ADDR and MASTER_PORT for so long.
    """
    address = "localhost" if hosts else os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + seconds
    while True:  # torch would try too, with a page of warnings
        try:
            socket.create_connection(address, 5).close()
            if hosts:
                raise ValueError("another program is there")
            break
        except OSError:
            if hosts:
                break
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)
    store = dist.TCPStore(*address, None, hosts, timedelta(seconds=30), wait_for_workers=False, multi_tenant=hosts)
    # What torchrun starts again after a failure finds nothing of what was before.
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_with_rank_0() -> bool:
    """Whether rank 0 has the store, as it must where no torchrun has."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _rendezvous(rank: int) -> dist.Store:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    hosts = rank == 0 and _is_with_rank_0()
    try:
        return _connect(JOIN_SECONDS, hosts)
    except (dist.DistError, OSError, ValueError, OverflowError) as e:
        _job["store"] = None
        if hosts:
            leave(f"rank 0 cannot be found by the others at {place} ({str(e)[-60:]}): set another MASTER_PORT, "
                  "the same on all ranks", 2)
        leave(f"nobody answers at MASTER_ADDR and MASTER_PORT, {place}, within {JOIN_SECONDS} s ({e}): start rank 0 "
              "there, or correct them", 1)


class Ranks:
    """The ranks of a job, from when all have come until this one leaves. Collective.

    A thread sees a rank of this machine die at once, and what any rank says of the end of the job within a second.
    Where that does not end this rank within GRACE_SECONDS, blocked as it may be, the thread does.

    Args:
        facts: of this rank. Attributes: members: [{host, pid, machine, **facts}] by rank; kept: calls for words on what
        the job has saved; end: how the job ends, {rank, code, died, by}, once that is known.
    """

    def __init__(self, rank: int, size: int, **facts):
        self.rank, self.size, self.meetings = rank, size, 0
        self.end: dict | None = None
        self.kept = lambda: "start it again"
        _job["store"] = _job.get("store") or _rendezvous(rank)
        _job["groups"] = number = _job.get("groups", 0) + 1  # several runs of one process, as for a comparison
        self.store = dist.PrefixStore(f"group {number}", _job["store"])
        if self.store.add(f"came {rank}", 1) > 1:
            leave(f"a rank {rank} is there already: give every process a RANK of its own, and every job of a machine "
                  "another MASTER_PORT", 2)
        # Processes see one another where they share a table of processes: not in two containers of a host.
        table = "/proc/self/ns/pid"
        machine = f"{platform.node()} {os.stat(table).st_ino if os.path.exists(table) else ''}"
        me = {
            "host": platform.node(),
            "pid": os.getpid(),
            "machine": machine,
            **facts,
        }
        self.store.set(f"rank {rank}", json.dumps(me))
        names = [f"rank {other}" for other in range(size)]
        self._wait(names, JOIN_SECONDS)
        self.members = [json.loads(self.store.get(name)) for name in names]
        self.left, (self._bell, self._cord) = threading.Event(), os.pipe()
        self._watcher = threading.Thread(target=self._watch, args=(_connect(JOIN_SECONDS),), daemon=True)
        self._watcher.start()

    def meet(self) -> None:
        """Wait for all ranks while they live: one may analyse or write for hours, which no group's timeout allows."""
        self.meetings += 1
        name = f"meeting {self.meetings}"
        if self.store.add(name, 1) == self.size:
            self.store.set(f"{name} is full", "")
        self._wait([f"{name} is full"])

    def _wait(self, keys: list[str], seconds: float = float("inf")) -> None:
        began, pause = time.monotonic(), 0.0005
        while not self.store.check(keys):
            if self.end or _job["store"].check(["end"]):
                self.end = self.end or json.loads(_job["store"].get("end"))
                raise SystemExit(self.end["code"])
            if time.monotonic() > began + seconds:
                away = [key for key in keys if not self.store.check([key])]
                leave(f"{len(keys) - len(away)} of {len(keys)} ranks came within {seconds:g} s, not {', '.join(away)}: "
                      "start as many as WORLD_SIZE says", 1)
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)

    def leave(self, error: BaseException | None) -> int | None:
        """To be called by a rank that ends by an error: returns the exit code where another one has ended the job."""
        broken = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)
        if self.end is None and broken:
            self._find_who_died(error)
        elif self.end is None:
            self.end = _end(_job["store"], self.rank, exit_code(error)) or {"code": 1, "by": _me()}
        if self.end["by"] == _me() and not broken:
            return None
        if self.end["by"][0] != platform.node() and os.environ.get("LOCAL_RANK", "0") == "0":
            print_aside(f"error: rank {self.end['rank']} ended this job: see what {self.end['by'][0]} says")
        return self.end["code"]

    def close(self) -> None:
        """Stop watching: all ranks are at the end, or this one ends by an error of its own."""
        if self.left.is_set():
            return
        self.left.set()
        os.write(self._cord, b".")
        self._watcher.join(2)
        os.close(self._bell)
        os.close(self._cord)

    # Who died ----------------------------------------------------------------------------------------------------

    def _watch(self, store: dist.Store) -> None:
        eyes, peers = select.poll(), {}
        eyes.register(self._bell, select.POLLIN)
        for rank, member in enumerate(self.members):
            if rank != self.rank and member["machine"] == self.members[self.rank]["machine"]:
                with contextlib.suppress(AttributeError, OSError):  # not Linux; dead by now, as its connections tell
                    peers[os.pidfd_open(member["pid"])] = rank
        for descriptor in peers:
            eyes.register(descriptor, select.POLLIN)
        while not self.left.is_set() and self.end is None:
            dead = [peers[descriptor] for descriptor, _ in eyes.poll(1000) if descriptor in peers]
            try:
                if dead:
                    self._tell_who_died(store, dead[0], "")
                    break
                store.set(f"beat {self.rank}", str(time.monotonic()))
                if store.check(["end"]):
                    self.end = json.loads(store.get("end"))
            except dist.DistError:
                if not self.left.is_set():
                    self._tell_who_died(store, 0 if _is_with_rank_0() else None, "torchrun died")
        for descriptor in peers:
            os.close(descriptor)
        if self.end and not self.left.wait(GRACE_SECONDS):
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(self.end["code"])

    def _find_who_died(self, error: BaseException) -> None:
        """An exchange failed: wait for word of who ended the job, or see whose watch has stopped."""
        before, deadline = self._beats(), time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < deadline:
            if self.end:
                return
            time.sleep(0.02)
        rank = min((rank for rank, _ in before.items() & self._beats().items()), default=None)
        self._tell_who_died(_job["store"], rank, f"the connection to a rank broke ({str(error)[-100:]})")

    def _beats(self) -> dict[int, bytes]:
        """The last sign of life of each other rank, empty before its first."""
        store = _job["store"]
        with contextlib.suppress(dist.DistError):
            names = {rank: f"beat {rank}" for rank in range(self.size) if rank != self.rank}
            return {rank: store.get(name) if store.check([name]) else b"" for rank, name in names.items()}
        return {}

    def _tell_who_died(self, store: dist.Store, rank: int | None, otherwise: str) -> None:
        """Write into the store how the job ends, and say so if nobody has."""
        if rank is not None:
            otherwise = f"rank {rank} died ({self.members[rank]['host']}, pid {self.members[rank]['pid']})"
        speaker = self.members[min(1, self.size - 1)]  # where there is no store to ask, as rank 0 had it
        end = None if rank == 0 and _is_with_rank_0() else _end(store, rank, 1, otherwise)
        end = end or {
            "rank": rank,
            "code": 1,
            "died": otherwise,
            "by": [speaker["host"], speaker["pid"]],
        }
        if self.end is None and end["by"] == _me():
            print(f"error: {otherwise}: {self.kept()}", file=sys.stderr, flush=True)
        self.end = end
