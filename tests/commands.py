"""Running the scripts as a user does."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import common
import sweep

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_ghmm", "train_arxiv", "train_apelr", "train_state")
# What runs import late: torch._dynamo comes with the first optimizer, and takes a second.
LATE = ("jinja2", "matplotlib.backends.backend_agg", "matplotlib.figure", "scipy.stats", "torch._dynamo")


def python(*command, folder: Path) -> subprocess.CompletedProcess:
    """A Python of one thread, in this folder."""
    return ended(begun(*command, folder=folder))


def begun(*command, folder: Path) -> subprocess.Popen:
    """The same, at work."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def ended(process: subprocess.Popen, timeout: float = 100) -> subprocess.CompletedProcess:
    """What such a process printed; it is killed, with all that it started, after so many seconds."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stop(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def meanwhile(request, name: str, *command, folder: Path) -> Iterator[tuple[subprocess.Popen | None, Path]]:
    """For a fixture that another one, called name, waits for: such a process, at work on another core while tests that
    do without it go on, and its folder. No process where no test asks for name."""
    tests = [item for item in request.session.items if request.scope == "session" or item.path == request.path]
    if not any(name in item.fixturenames for item in tests):
        yield None, folder
        return
    process = begun(*command, folder=folder)
    yield process, folder
    if not process.stdout.closed:  # nobody waited for its end
        stop(process)


def refusal(capsys, main, *argv: str, code: int = 2) -> str:
    """The error line of a command that must end with this exit code; before it stands at most what it does, and notes.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    told = capsys.readouterr().err.splitlines()
    asides = [line for line in told[:-1] if line.startswith("note: ") or " ..." in line or " -> " in line]
    assert exit_.value.code == code and told[:-1] == asides and told[-1].startswith("error: "), told
    return told[-1]


def sweep_tiny(words: tuple[str, ...], folder: str, code: int) -> None:
    """A sweep of train_tiny.py in this folder, which must end with this exit code."""
    command = ["train_tiny.py", *words, f"--out_dir={folder}"]
    if code:
        with pytest.raises(SystemExit) as end:
            sweep.main(command)
        assert end.value.code == code
    else:
        sweep.main(command)


def colours(image) -> int:
    """How many colours a picture [height, width, 3 or 4] in 0..1 has."""
    packed = (255 * image[..., :3]).astype(np.int64) @ [1 << 16, 1 << 8, 1]
    return len(np.unique(packed))


# Processes to kill and ranks to join: forked from a server that has imported the scripts, and what these import late,
# and has computed nothing yet, which spares each of them the seconds that importing takes.


class Job:
    """A process that runs a function of a module, with what Popen has of it; its console is a file."""

    def __init__(self, module: str, *argv, folder: Path | str = ".", console: str = "console", function: str = "main",
                 **environment):
        self.console = Path(folder).resolve() / console
        self.process = server().Process(daemon=True, target=work, args=(
            module, function, list(map(str, argv)), str(Path(folder).resolve()), str(self.console), environment))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = 100) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            pytest.fail(f"still running after {timeout} s: {self.console.read_text()[-3000:]}")
        return self.poll()


def server():
    context = multiprocessing.get_context("forkserver")
    if not server.started:
        context.set_forkserver_preload(["commands", *SCRIPTS, *LATE])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as common has it for processes that import it first
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            multiprocessing.forkserver.ensure_running()
        server.started = True
    return context


server.started = False


def work(module: str, function: str, argv: list, folder: str, console: str, environment: dict) -> None:
    """What a Job does."""
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.fsync = lambda descriptor: None  # as in conftest.py
    torch.set_num_threads(1)
    getattr(importlib.import_module(module), function)(argv)


def brought_in_by(*scripts: str) -> set[str]:
    """Import these where nothing of this repository is imported yet: the modules that come with them, beside those
    that any script needs. They print nothing and write nothing."""
    job = Job("commands", *scripts, function="import_anew", console="../imported")
    assert job.wait() == 0 and list(Path.cwd().iterdir()) == [], job.console.read_text()
    line, = job.console.read_text().splitlines()
    return set(json.loads(line))


def import_anew(scripts: list[str]) -> None:
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        theirs = file.is_relative_to(ROOT / "tests") or "site-packages" in file.parts
        if file.is_relative_to(ROOT) and not theirs or name.split(".")[0] in ("matplotlib", "mpl_toolkits"):
            del sys.modules[name]
    before = set(sys.modules)
    for script in scripts:
        importlib.import_module(script)
    print(json.dumps(sorted(set(sys.modules) - before)))


def sweep_quickly(argv: list[str]) -> None:
    """sweep.py for a Job, without the pictures of its end and with short waits between two looks at a run."""
    import sweep
    from sources import jobs

    sweep.comparison, jobs.LOOK_SECONDS = lambda *args: [], 0.05
    sweep.main(argv)


def with_console(argv: list[str]) -> None:
    """For a Job: a script with a console of some kind, without pictures of train_ghmm.py."""
    kind, script, *argv = argv
    if kind == "ascii":
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
    elif kind == "closed":
        sys.stdout = None
        os.close(1)
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif kind == "pipe":
        ours, theirs = os.pipe()
        os.close(ours)
        os.dup2(theirs, 1)
    elif kind == "deaf":  # and dumb
        for number in (1, 2):
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    common.open_streams()
    importlib.import_module("train_ghmm").plot_run = lambda *args, **options: None
    importlib.import_module(script).main(argv)


def wait_for(ready, job: Job, what: str = "what is awaited", timeout: float = 60) -> None:
    """Until ready() is true; fails if the job ends before."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert job.poll() is None and time.monotonic() < deadline, f"{what} never came: {job.console.read_text()}"
        time.sleep(0.001)


def two_ranks(module: str, *argv, folder: Path | str = ".", function: str = "main", code: int | tuple[int, int] = 0,
              timeout: float = 100, agent: bool = True) -> str:
    """Run a function of a module in two ranks to this exit code, or these; what they printed.

    They have the environment that torchrun gives them, or with agent=False that of a job without it.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    if agent:
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    else:
        del store  # its port is free now, for rank 0
    jobs = [Job(module, *argv, folder=folder, console=f"console.{rank}", function=function, **shared, RANK=str(rank),
                LOCAL_RANK=str(rank)) for rank in range(2)]
    deadline = time.monotonic() + timeout
    while None in (codes := [job.poll() for job in jobs]) and time.monotonic() < deadline:
        if any(codes):  # the other may wait for this one in vain
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.005)
    for job in jobs:
        if job.poll() is None:
            job.kill()
    texts = [job.console.read_text() for job in jobs]
    with contextlib.suppress(OSError):
        for job in jobs:
            job.console.unlink()
    expected = [code, code] if isinstance(code, int) else list(code)
    assert codes == expected, f"exit codes {codes}: {texts[0][-3000:]}\n{texts[1][-3000:]}"
    return "".join(texts)
