"""Faults on purpose: kill, damage, fill the disk, type nonsense, and count what comes of it.

    python tests/faults.py                     # all kinds, as often as KINDS says: 10,000 trials
    python tests/faults.py --short             # a few of each kind, as tests/test_faults.py does
    python tests/faults.py --only=last.pt,toml --seed=7 --json=found.json
    python tests/faults.py --only=toml:31      # one trial again, with what it printed and where its files are

What is damaged, and how, is in damage.py. A trial is a function of (seed, kind, number). It runs the scripts as they
are, in a forked process: their exit code, what they print and what they compute is all that counts. It ends in one of
these columns:

    clear       exit code 1 or 2 and one `error:` line that names what is wrong; or a line that names the file left out
    right       exit code 0, and what was computed is what the undisturbed run computes, or for a text file what an
                independent parser says that the damaged text means
    traceback   a traceback or a crash of the process
    hang        it did not end
    silent      exit code 0 and something else was computed, without a word
    vague       an error line that does not say which file
    unnoticed   other values in a file that has no checksum and reads as a file of those values: nobody could tell
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import tqdm  # noqa: E402
import yaml  # noqa: E402
from commands import server  # noqa: E402
from damage import CELLS, FORMATS, STORIES, TINY, Format, analysis, make_goods, training  # noqa: E402

COLUMNS = ("clear", "right", "traceback", "hang", "silent", "vague", "unnoticed")
GOOD = ("clear", "right", "unnoticed")
KNOWN_CODES = (0, 1, 2, 130, 143)  # 130: it obeyed SIGINT, 143: SIGTERM
PATIENCE_S = 100  # a trial that takes longer hangs: the slowest takes 10 on two busy cores
MEMORY = 12 << 30  # bytes of address space of a trial: what asks for more is refused by the system
TIMED = set("""time_s seconds tokens_per_second cells_per_second tokens_per_s cells_per_s mfu torch out_dir folder
               step/tokens_per_second cum/tokens_per_second""".split())
Hook = Callable[[], None]  # something to do in a process before its command starts


# ---------------------------------------------------------------------------------------------------------------
# A command in a process of its own
# ---------------------------------------------------------------------------------------------------------------
class Ending(NamedTuple):
    """How a command ended: exit code (negative: the signal that ended it; None: it did not end), what it printed, and
    digests of what it computed, a line each."""

    code: int | None
    text: str
    finding: str

    def verdict(self) -> str:
        """A column, or "" where it ended with 0 and its finding decides."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent" in self.text or self.code not in KNOWN_CODES:
            return "traceback"
        if self.code == 0:
            return ""
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return "clear" if errors and min(map(len, errors)) > 20 else "vague"


class Process:
    """A command that runs in the current folder, forked: hooks are called in it before its script's main."""

    def __init__(self, command: str | list[str], *hooks: Hook, **environment: str):
        words = command.split() if isinstance(command, str) else command
        stem = Path("..", str(time.monotonic_ns())).resolve()
        self.console, self.finding = stem.with_suffix(".console"), stem.with_suffix(".finding")
        self.code: int | None = None
        self.is_over = False
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.environ.update(environment)
                code = perform(words, hooks, self.console, self.finding)
            except BaseException:  # of the harness
                traceback.print_exc()
                code = 70
            os._exit(code)

    def poll(self) -> bool:
        """Whether it is over."""
        if not self.is_over:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.is_over, self.code = True, os.waitstatus_to_exitcode(status)
        return self.is_over

    def wait(self, seconds: float = PATIENCE_S) -> Ending:
        """Its end; it is killed where that does not come in time."""
        if not until(self.poll, seconds):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.is_over = True
        texts = []
        for file in (self.console, self.finding):
            texts.append(file.read_text(errors="replace") if file.exists() else "")
        return Ending(self.code, *texts)


def until(ready: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
    """Wait until ready() is true; whether it came to that."""
    deadline = time.monotonic() + seconds
    while not (is_ready := ready()) and time.monotonic() < deadline:
        time.sleep(0.003)
    return is_ready


def run(command: str | list[str], *hooks: Hook, seconds: float = PATIENCE_S, **environment: str) -> Ending:
    return Process(command, *hooks, **environment).wait(seconds)


def perform(words: list[str], hooks: tuple[Hook, ...], console: Path, finding: Path) -> int:
    """What a forked process does: main of a script as the interpreter would; returns the exit code."""
    redirect(console)
    here, value, code = os.getcwd(), None, 0
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        without_pictures()
        for hook in hooks:
            hook()
        value = importlib.import_module(words[0]).main(words[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    if code == 0:
        os.chdir(here)
        says_it_all = value is None or "inspect" in words
        parts = {"returned": value, "printed": console.read_text(errors="replace") if says_it_all else ""}
        lines = [f"{name} {fingerprint(part)}" for name, part in flat(parts | written(words))]
        finding.write_text("\n".join(lines))
    return code


def redirect(console: Path) -> None:
    """The standard streams of this process: nothing to read, and a file to write to."""
    output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(descriptor, stream)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def nothing(*args, **options) -> None:
    """Takes the place of what a trial does without."""


def without_pictures() -> None:
    """Pictures take a second and are not what is asked about; nor need anything survive a power cut."""
    import train_arxiv
    import train_ghmm
    from measure import effects, plans, speed

    train_ghmm.plot_run = train_arxiv.draw_run = nothing
    plans.draw_loss = plans.draw_plans = effects.plot_metrics = nothing
    speed.RATE_SECONDS = 0
    os.fsync = nothing


# ---------------------------------------------------------------------------------------------------------------
# What a command computed
# ---------------------------------------------------------------------------------------------------------------
def written(words: list[str]) -> dict:
    """{file: content} that a command left in its out_dir, but for what depends on the clock."""
    folders = [word.partition("=")[2] for word in words if re.match(r"--out(_dir)?=", word)]
    found = {}
    for file in sorted(Path(folders[-1]).rglob("*")) if folders else ():
        if not file.is_file():  # a link to nowhere, which a trial has left there
            continue
        if file.suffix == ".pt":
            state = torch.load(file, weights_only=True)
            found[file.name] = {k: v for k, v in state.items() if k not in ("meter", "config", "digest")}
        elif file.name == "metrics.jsonl":
            found[file.name] = records_of(file)
        elif file.suffix in (".bin", ".npy"):
            found[file.name] = file.read_bytes()
    return found


def records_of(file: Path) -> list:
    """The lines of metrics.jsonl that can be read."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def flat(parts: dict, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(name, value) of the values of nested dicts, so that a difference has a name."""
    for name, value in parts.items():
        if isinstance(value, dict) and depth and value:
            yield from ((f"{name}/{key}", part) for key, part in flat(value, depth - 1))
        elif name not in TIMED:
            yield str(name).replace(" ", "_"), value


def fingerprint(value: Any) -> str:
    """A digest of plain values, arrays and tensors, but for times: equal to the bit or another."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(set(part) - TIMED, key=str):
                digest.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            digest.update(str(len(part)).encode())
            for item in part:
                add(item)
        elif isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            if part.numel():
                digest.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, bytes):
            digest.update(part)
        elif isinstance(part, float) and not math.isfinite(part):
            add(None)  # as in files
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


def differing(finding: str, expected: str) -> str:
    """The names of what is not as expected."""
    lines = set(finding.split("\n")) ^ set(expected.split("\n"))
    return "differ: " + ", ".join(sorted({line.split()[0] for line in lines if line}))


def holds(finding: str, expected: str) -> bool:
    """Whether all that is expected was found. A run that was stopped has a step_N.pt more; `data` is in summary.json
    only, from where a run that has ended returns it."""
    lines = {line for line in expected.split("\n") if not line.startswith("returned/data")}
    return lines <= set(finding.split("\n"))


def undisturbed(command: str, needs: str, goods: Path, ranks: int = 1) -> tuple[str, float]:
    """(the finding, the seconds) of a command that nothing disturbs; kept beside the goods."""
    known = goods.parent / "findings" / hashlib.sha256(f"{ranks} {command}".encode()).hexdigest()
    if not known.exists():
        known.parent.mkdir(exist_ok=True)
        with folder_apart("../whole"):
            fetch(goods, needs)
            began = time.monotonic()
            ending = run(command) if ranks == 1 else on_ranks(command, ranks)[0]
            seconds = time.monotonic() - began
        if ending.code or not ending.finding:
            raise RuntimeError(f"{command} fails undisturbed: {ending.code} {ending.text[-2000:]}")
        fresh = known.with_suffix(f".{os.getpid()}")
        fresh.write_text(f"{seconds}\n{ending.finding}")
        fresh.rename(known)
    seconds, _, finding = known.read_text().partition("\n")
    return finding, float(seconds)


def fetch(goods: Path, needs: str) -> None:
    """Copies of these folders of the goods."""
    for name in needs.split():
        shutil.copytree(goods / name, name, dirs_exist_ok=True)


@contextlib.contextmanager
def folder_apart(name: str) -> Iterator[None]:
    """Stand in an empty folder for a while."""
    here = os.getcwd()
    shutil.rmtree(name, ignore_errors=True)
    Path(name, "here").mkdir(parents=True)
    os.chdir(Path(name, "here"))
    try:
        yield
    finally:
        os.chdir(here)
        shutil.rmtree(name, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------------------------
class Spoilt(NamedTuple):
    """A command that reads a damaged file."""

    file: Path
    command: str
    is_accident: bool
    is_forbidden: bool  # whether any reading of it is wrong


def spoil(form: Format, draw: random.Random) -> Spoilt:
    """Damage a file of this format in the current folder."""
    pattern, readers = draw.choice(form.cases)
    file = draw.choice(sorted(Path().glob(pattern)))
    command = draw.choice(readers).replace("{folder}", str(file.parent))
    before, whole = file.read_bytes(), file.with_name("whole")
    whole.write_bytes(before)
    is_accident = form.inside is None or draw.random() < 0.5
    is_forbidden = False
    while file.read_bytes() == before:
        try:
            if is_accident:
                file.write_bytes(form.accident(before, draw))
            else:
                is_forbidden = bool(form.inside(file, draw))
        except Exception:  # such a file cannot hold this value
            file.write_bytes(before)
    whole.unlink()
    return Spoilt(file, command, is_accident, is_forbidden)


def damage_trial(kind: str, draw: random.Random, goods: Path) -> tuple[str, str]:
    """Damage a file of a format and let somebody read it; returns (column, what was done and printed)."""
    form = FORMATS[kind]
    fetch(goods, form.needs)
    spoilt = spoil(form, draw)
    expected, _ = undisturbed(spoilt.command, form.needs, goods)
    damaged = spoilt.file.read_bytes()
    ending = run(spoilt.command)
    column = judge(form, spoilt, ending, expected)
    if not column:
        column = reads_as_parsed(form, spoilt, ending, damaged, goods)
    where = "by accident" if spoilt.is_accident else "to lead elsewhere" if spoilt.is_forbidden else "inside"
    text = f"{spoilt.file} damaged {where}\n{spoilt.command}\n{ending.text}\n{differing(ending.finding, expected)}"
    return column, text


def judge(form: Format, spoilt: Spoilt, ending: Ending, expected: str) -> str:
    """The column of a command whose input was damaged; "" where that depends on what a text means."""
    if Path("../exploded").exists():
        return "silent"  # code of the file was run
    column = ending.verdict()
    if column == "clear" and not names_file(ending.text, spoilt.file):
        return "vague"
    if column or form.parse:
        return column
    if ending.finding == expected:
        return "right"
    if names_file(ending.text, spoilt.file, "note|warning|damaged|cannot") or "\n  problem: " in ending.text:
        return "clear"
    is_noticeable = form.is_checked and (spoilt.is_accident or form.guards_values)
    return "silent" if is_noticeable or spoilt.is_forbidden else "unnoticed"


def names_file(text: str, file: Path, words: str = "") -> bool:
    """Whether a line of what was printed names a file, or the folder it is in, together with one of these words."""
    lines = [line for line in text.splitlines() if re.search(words, line)]
    return any(name in line for name in (file.name, file.stem, str(file.parent)) for line in lines)


def reads_as_parsed(form: Format, spoilt: Spoilt, ending: Ending, damaged: bytes, goods: Path) -> str:
    """Whether a text means to the scripts what it means to an independent parser: the same as in another spelling."""
    try:
        text = form.write(form.parse(damaged))
    except LookupError:
        return "unnoticed"  # the parser is not up to it
    except (ValueError, RecursionError, yaml.YAMLError):
        return "silent"  # the parser refuses it
    with folder_apart("../parsed"):
        fetch(goods, form.needs)
        spoilt.file.write_text(text, encoding="utf-8")
        again = run(spoilt.command)
    return "right" if again.finding == ending.finding else "silent"


# ---------------------------------------------------------------------------------------------------------------
# Faults at a place in the code: kills, signals, refusals of the system
# ---------------------------------------------------------------------------------------------------------------
def hook(place: str, call: int, action: Callable[[], None], counts: Callable = lambda *args, **options: True) -> Hook:
    """The action at the call-th call of place, "module:name" or "module:class.name", of those that count."""

    def install() -> None:
        module, _, way = place.partition(":")
        holder = importlib.import_module(module)
        *outer, name = way.split(".")
        for part in outer:
            holder = getattr(holder, part)
        original, calls = getattr(holder, name), []

        def hooked(*args, **options):
            if counts(*args, **options):
                calls.append(place)
                if len(calls) == call:
                    action()
            return original(*args, **options)

        setattr(holder, name, hooked)

    return install


def send(*numbers: int) -> Callable[[], None]:
    """An action: these signals to the process itself."""

    def sent() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return sent


def refuse(number: int) -> Callable[[], None]:
    """An action: the system refuses, for the reason of this number of errno."""

    def refused() -> None:
        raise OSError(number, os.strerror(number))

    return refused


class Stumbling:
    """A file whose call-th write, counted over all such files of the process, begins with an action."""

    writes = 0

    def __init__(self, file, call: int, action: Callable[[], None]):
        self.file, self.call, self.action = file, call, action

    def write(self, data) -> int:
        Stumbling.writes += 1
        if Stumbling.writes == self.call:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            self.action()
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def stumble(call: int, action: Callable[[], None]) -> Hook:
    """The action in the midst of the call-th write of bytes of a checkpoint."""

    def install() -> None:
        save = torch.save

        def stumbling(state: Any, file: Any, **options) -> None:
            is_open = hasattr(file, "write")
            save(state, Stumbling(file, call, action) if is_open else file, **options)

        torch.save = stumbling

    return install


WRITING = [("os:replace", 12), ("os:fsync", 6), ("os:link", 4), ("torch:save", 4), ("bytes", 60), ("bytes", 60)]


def in_writing(draw: random.Random, action: Callable[[], None]) -> Hook:
    """The action at a random moment in which a run writes."""
    place, most = draw.choice(WRITING)
    call = draw.randint(1, most)
    return stumble(call, action) if place == "bytes" else hook(place, call, action)


def goes_on(command: str, expected: str, first: Ending) -> tuple[str, str]:
    """Whether, after a run that was disturbed, the same command ends as if nothing had happened; (column, text)."""
    if first.code != -signal.SIGKILL and first.verdict() in ("hang", "traceback"):
        return first.verdict(), first.text
    again = run(command)
    column = again.verdict() or ("right" if holds(again.finding, expected) else "silent")
    text = f"{first.code}: {first.text}\n--- again: {again.code}\n{again.text}\n{differing(again.finding, expected)}"
    return "vague" if column == "clear" else column, text


def kill_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """SIGKILL at a random moment, in every second trial in the midst of writing; then the same command."""
    command = training(draw.choice(list(TINY)), "--max_steps=20 --keep_last=-1")
    expected, seconds = undisturbed(command, "data", goods)
    fetch(goods, "data")
    if draw.random() < 0.5:
        first = run(command, in_writing(draw, send(signal.SIGKILL)))
    else:
        first = Process(command).wait(draw.uniform(0, seconds))
        first = first._replace(code=-signal.SIGKILL if first.code is None else first.code)
    return goes_on(command, expected, first)


STEP = "common.runtime:Runtime.step"
EVALUATIONS = {"ghmm": "train_ghmm:evaluate", "arxiv": "train_arxiv:evaluate", "apelr": "train_apelr:evaluate",
               "state": "train_state:validate"}


def signal_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """SIGINT or SIGTERM, once or twice, in training, evaluation, saving or analysis; then the same command."""
    page = draw.choice(list(TINY))
    command = training(page, "--keep_last=-1")
    expected, _ = undisturbed(command, "data", goods)
    fetch(goods, "data")
    places = [
        (STEP, 6),
        (EVALUATIONS[page], 3),
        ("torch:save", 3),
        (f"train_{page}:finish", 1),
    ]
    place, most = draw.choice(places)
    numbers = [draw.choice([signal.SIGINT, signal.SIGTERM])] * draw.randint(1, 2)
    first = run(command, hook(place, draw.randint(1, most), send(*numbers)))
    column, text = goes_on(command, expected, first)
    return column, f"{numbers} at {place} of {command}\n{text}"


# ---------------------------------------------------------------------------------------------------------------
# Disks that are full, read-only or in the way
# ---------------------------------------------------------------------------------------------------------------
REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
DISKS = "bytes replace open open mkdir size folder folder full file dangling".split()
IN_THE_WAY = """last.pt best.pt metrics.jsonl config.json train.log summary.json step_6.pt results.json analysis.json
                metrics.csv documents.npz plots run.lock""".split()
WRITERS = [  # commands that write, and what to
    (f"{STORIES} --tokenizer=char --out_dir=new", "new"),
    ("prepare_data ergodic --train_documents=3 --validation_documents=2 --out_dir=new", "new"),
    ("prepare_data planted --train_documents=3 --validation_documents=2 --out_dir=new", "new"),
    (f"{CELLS} --out_dir=new", "new"),
    ("prepare_data state preprocess --input=data/cells.h5ad --out_dir=new", "new"),
    ("prepare_data cells --toml=data/cells.toml --folder=new", "new"),
    ("prepare_data import foreign/ghmm/40/model.pt --out_dir=new", "new"),
    ("sample ended/ghmm --num_samples=1 --device=cpu --json=new", "new"),
    ("sample ended/state --device=cpu --out=new", "new"),
    ("sweep report ended/ghmm --out=new", "new"),
    *((analysis(page, f"ended/{page}"), f"ended/{page}/analysis") for page in TINY),
]


def is_for_writing(*args, **options) -> bool:
    """Whether a call of open is for writing."""
    mode = options.get("mode", args[1] if len(args) > 1 else "r")
    return any(letter in str(mode) for letter in "wxa+")


def small_files() -> None:
    """A hook: no file may grow beyond 4 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, 4_096))


def disk_fault(draw: random.Random, out: Path) -> tuple[str, list[Hook], Callable[[], None]]:
    """(what is wrong with the disk, hooks for it, how it is mended), as it befalls a command that writes to out."""
    kind, action, call = draw.choice(DISKS), refuse(draw.choice(REASONS)), draw.randint(1, 8)
    target = out / draw.choice(IN_THE_WAY)
    if kind == "bytes":
        return kind, [stumble(5 * call, action)], nothing
    if kind in ("replace", "mkdir"):
        return kind, [hook(f"os:{kind}", call, action)], nothing
    if kind == "open":
        return kind, [hook("builtins:open", call, action, is_for_writing)], nothing
    if kind == "size":
        return kind, [small_files], nothing
    if kind == "file" and not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("in the way")
        return f"a file {out}", [], out.unlink
    return f"{kind} at {target}", [], put_in_the_way(kind, target)


def put_in_the_way(kind: str, target: Path) -> Callable[[], None]:
    """A folder, a full disk or a link to nowhere in the place of a file; returns how that is mended."""
    is_new = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = target.rename(target.with_name("kept")) if target.exists() else None
    if kind == "full":
        target.symlink_to("/dev/full")
    elif kind == "dangling":
        target.symlink_to("/nowhere/file")
    else:
        (target / "full").mkdir(parents=True)

    def mend() -> None:
        if is_new:
            shutil.rmtree(target.parent)
        elif target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if kept:
            kept.rename(target)

    return mend


def disk_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """A command that cannot write; then, the disk mended, the same command."""
    page, needs = draw.choice(list(TINY)), "data out ended foreign"
    commands = [
        (training(page), "new"),
        (training(page, out=f"out/{page}"), f"out/{page}"),
        draw.choice(WRITERS),
    ]
    command, out = draw.choice(commands)
    expected, _ = undisturbed(command, needs, goods)
    fetch(goods, needs)
    what, hooks, mend = disk_fault(draw, Path(out))
    first = run(command, *hooks)
    mend()
    if first.code == 0:  # it was not in the way
        column = "right" if holds(first.finding, expected) else "silent"
        return column, f"{what}: {command}\n{first.text}\n{differing(first.finding, expected)}"
    column, text = goes_on(command, expected, first)
    if column == "right":
        column = first.verdict()
    return column, f"{what}: {command}\n{text}"


# ---------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------
ODD_WORDS = ["", "[1", "\udcff", "é", "١", "x" * 300, "\n", "{'a': 1}"]
ODD_WORDS += """-1 0 1 2 0.5 nan inf -inf 1e400 None null true x [] {} [1,2] a,b ../x ~ ~nobody/x ' nowhere.pt data
                1_000 s3:// file:// http://x/y % $HOME 1,2 * a=b -- 1 2 3 0.5 0.1 true false none""".split()
ODD_FILES = ["config/nowhere.py", "data/stories.jsonl", "/dev/null", "data", "train_ghmm.py", "x.yaml"]
LEFT_OUT = {"wandb", "tensorboard", "compile", "max_steps", "multirun", "max_words"}  # what asks for more or for long
COMMANDS = {f"train_{page}": [training(page)] for page in TINY} | {  # by script: such as end soon
    "sample": [f"sample out/{page} --device=cpu --max_new_tokens=2 --out=new" for page in TINY],
    "prepare_data": [
        "prepare_data inspect data/ergodic",
        "prepare_data arxiv --input=data/papers.jsonl --vocab_size=280",
        *(command for command, _ in WRITERS if command.startswith("prepare_data")),
    ],
    "sweep": ["sweep train_ghmm.py --print_config"],
}


def settings_of(words: list[str]) -> list[str]:
    """The names of the settings that a command takes."""
    module = importlib.import_module(words[0])
    configs = [module.JOBS[words[1]][0]] if words[0] == "prepare_data" else [module.Config]
    if words[0] == "sweep":
        configs.append(importlib.import_module("train_ghmm").Config)
    return sorted({name for config in configs for name in config.__dataclass_fields__} - LEFT_OUT)


def line_trial(script: str, draw: random.Random, goods: Path) -> tuple[str, str]:
    """A command line with odd words in it."""
    fetch(goods, "data out foreign")
    words = draw.choice(COMMANDS[script]).split()
    settings, is_unknown = settings_of(words), False
    for _ in range(draw.randint(1, 2)):
        name, value = draw.choice(settings), draw.choice(ODD_WORDS)
        unknown = "".join(draw.choices("bcdfghjkq", k=9))
        odd = [
            f"--{name}",
            f"--no-{name}",
            f"--{name[:-1]}q={value}",
            f"--{name} {value}",
            f"--{unknown}={value}",
            value,
            draw.choice(ODD_FILES),
        ]
        word = draw.choice([f"--{name}={value}"] * len(odd) + odd)
        is_unknown |= unknown in word
        words.append(word)
    if draw.random() < 0.3:
        words.append("--print_config")
    if script.startswith("train"):
        words.append("--max_steps=2")
    ending = run(words)
    column = ending.verdict() or ("silent" if is_unknown else "right")
    return column, f"{words!r}\n{ending.text}"


# ---------------------------------------------------------------------------------------------------------------
# Long runs, two runs in one folder, two ranks
# ---------------------------------------------------------------------------------------------------------------
LONG_STEPS, LOOKS, MOST_GROWTH = 20_000, 20, 5 << 20  # steps, looks at the process, bytes


def endurance_trial(draw: random.Random, goods: Path, steps: int = LONG_STEPS) -> tuple[str, str]:
    """A long run: after a quarter of it neither memory nor open files may grow."""
    log = Path("../memory").resolve()

    def look(done: list) -> None:
        done.append(None)
        if len(done) % (steps // LOOKS) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(log, "a") as file:
                print(pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")), file=file)

    done: list = []
    command = training("ghmm", f"--max_steps={steps} --log_interval=50 --eval_interval=500 --save_interval=500 "
                       "--keep_last=2")
    ending = run(command, hook(STEP, 0, nothing, lambda *args, **options: look(done)), seconds=40 * PATIENCE_S)
    rows = []
    for line in log.read_text().splitlines() if log.exists() else ():
        rows.append(tuple(map(int, line.split())))
    late = rows[len(rows) // 4 :]
    text = f"bytes and descriptors: {rows}\n{ending.text[-3000:]}"
    if ending.verdict() or not late:
        return ending.verdict() or "silent", text
    grows = late[-1][0] - late[0][0] > MOST_GROWTH or len({descriptors for _, descriptors in late}) > 1
    return "silent" if grows else "right", text


def folder_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """A second run in the folder of one at work is refused; the first ends as if alone, or is killed, and the same
    command goes on."""
    command = training(draw.choice(list(TINY)))
    expected, _ = undisturbed(command, "data", goods)
    fetch(goods, "data")
    waiting, go = Path("../waiting").resolve(), Path("../go").resolve()

    def wait() -> None:
        waiting.touch()
        until(go.exists)

    first = Process(command, hook(STEP, 3, wait))
    until(lambda: waiting.exists() or first.poll())
    second = run(command)
    if draw.random() < 0.5:
        os.kill(first.pid, signal.SIGKILL)
    go.touch()
    column, text = goes_on(command, expected, first.wait())
    if second.verdict() != "clear":
        column = second.verdict() or "silent"
    return "clear" if column == "right" else column, f"second: {second.text}\nfirst: {text}"


def rank_trial(draw: random.Random, goods: Path) -> tuple[str, str]:
    """Two ranks, one of which is killed or fails: the other ends in 30 seconds too, and one of them says why; then the
    same command on both."""
    page, victim = draw.choice(list(TINY)), draw.randrange(2)
    command = training(page)
    expected, _ = undisturbed(command, "data", goods, ranks=2)
    fetch(goods, "data")
    place, call = draw.choice([(STEP, draw.randint(2, 5)), (EVALUATIONS[page], 2)])
    action = draw.choice([send(signal.SIGKILL), refuse(errno.ENOSPC)])
    endings = on_ranks(command, 2, {victim: hook(place, call, action)})
    again = on_ranks(command, 2)
    told = "\n".join(f"--- {ending.code}\n{ending.text}" for ending in (*endings, *again))
    text = f"rank {victim} hit at {place} of {command}\n{told}\n{differing(again[0].finding, expected)}"
    other = endings[1 - victim]
    column = other._replace(text="".join(ending.text for ending in endings)).verdict()
    if any(ending.code for ending in again):
        return next(filter(None, (ending.verdict() for ending in again))).replace("clear", "vague"), text
    return column if column and holds(again[0].finding, expected) else "silent", text


def on_ranks(command: str, count: int, faults: dict[int, Hook] | None = None, seconds: float = 30) -> list[Ending]:
    """A command on several ranks, with these faults in some: how each ended; the last, so many seconds after the first.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank in range(count):
        hooks = [faults[rank]] if rank in (faults or {}) else []
        ranks.append(Process(command, *hooks, **shared, RANK=str(rank), LOCAL_RANK=str(rank)))
    until(lambda: any([rank.poll() for rank in ranks]))
    until(lambda: all([rank.poll() for rank in ranks]), seconds)
    return [rank.wait(0) for rank in ranks]


# ---------------------------------------------------------------------------------------------------------------
# Trials and their table
# ---------------------------------------------------------------------------------------------------------------
class Kind(NamedTuple):
    """Trials of one kind: trial(draw, goods) -> (column, text), and how many in the short form and in the long one."""

    trial: Callable
    short: int
    long: int


KINDS = {name: Kind(functools.partial(damage_trial, name), 2, 500) for name in FORMATS}
KINDS |= {f"line {script}": Kind(functools.partial(line_trial, script), 2, 300) for script in COMMANDS}
KINDS |= {
    "kill": Kind(kill_trial, 2, 100),
    "signal": Kind(signal_trial, 2, 40),
    "disk": Kind(disk_trial, 4, 200),
    "two runs": Kind(folder_trial, 1, 12),
    "ranks": Kind(rank_trial, 1, 12),
    "endurance": Kind(endurance_trial, 0, 1),
}


class Told(NamedTuple):
    """What came of a trial."""

    kind: str
    number: int
    column: str
    text: str
    seconds: float


def nursery(pipe, goods: Path, seed: int) -> None:
    """A process that imports everything once and forks for every command; it takes (kind, number) from a pipe."""
    for module in (*COMMANDS, "jinja2", "matplotlib.figure", "rustbpe", "tiktoken"):
        importlib.import_module(module)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is one between processes, which those that are killed leave behind
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            kind, number = pipe.recv()
            pipe.send(tried(kind, number, goods, seed))


def tried(kind: str, number: int, goods: Path, seed: int) -> Told:
    """One trial, in a folder of its own, which stays where something went wrong."""
    folder, began = goods.parent / f"{kind}.{number}".replace(" ", "_"), time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "here").mkdir(parents=True)
    os.chdir(folder / "here")
    try:
        column, text = KINDS[kind].trial(random.Random(f"{seed} {kind} {number}"), goods)
    except Exception:  # of the harness
        column, text = "broken", traceback.format_exc()
    os.chdir(goods)
    if column in GOOD:
        shutil.rmtree(folder, ignore_errors=True)
    return Told(kind, number, column, text, time.monotonic() - began)


def make_quietly(goods: Path) -> None:
    """make_goods in another process."""
    os.chdir(goods)
    redirect(goods / "console")
    torch.set_num_threads(1)
    without_pictures()
    make_goods()


def in_another_process(function: Callable, *arguments) -> multiprocessing.Process:
    process = server().Process(target=function, args=arguments)
    process.start()
    return process


def all_trials(wanted: list[tuple[str, int]], folder: Path, seed: int, jobs: int) -> Iterator[Told]:
    """Each (kind, number), in the order in which they end."""
    goods = folder / "goods"
    if not goods.exists():
        goods.mkdir(parents=True)
        process = in_another_process(make_quietly, goods)
        process.join()
        if process.exitcode:
            raise RuntimeError("the files to damage cannot be made: " + (goods / "console").read_text()[-3000:])
    workers = []
    for _ in range(jobs):
        pipe, theirs = multiprocessing.Pipe()
        workers.append((in_another_process(nursery, theirs, goods, seed), pipe))
        theirs.close()
    waiting, idle, busy = list(reversed(wanted)), [pipe for _, pipe in workers], []
    while waiting or busy:
        while waiting and idle:
            busy.append(idle.pop())
            busy[-1].send(waiting.pop())
        for pipe in multiprocessing.connection.wait(busy):
            yield pipe.recv()
            busy.remove(pipe)
            idle.append(pipe)
    for process, pipe in workers:
        pipe.close()
        process.join()


def table_of(told: list[Told]) -> dict[str, dict[str, int]]:
    """{kind: {"tried": n, column: n}}"""
    table: dict[str, dict[str, int]] = {}
    for trial in told:
        row = table.setdefault(trial.kind, dict.fromkeys(("tried", *COLUMNS), 0))
        row["tried"] += 1
        row[trial.column] = row.get(trial.column, 0) + 1
    return table


def lines_of(table: dict[str, dict[str, int]]) -> list[str]:
    """The table as text, with a row of sums."""
    names = ["tried", *COLUMNS] + ["broken"] * any("broken" in row for row in table.values())
    sums = {name: sum(row.get(name, 0) for row in table.values()) for name in names}
    head = dict(zip(names, names, strict=True))
    lines = []
    for kind, row in ({"kind": head} | table | {"all": sums}).items():
        cells = [f"{row.get(name, 0):>9}" for name in names]
        lines.append(" | ".join([f"{kind:<18}", *cells]))
    return lines


ERROR = re.compile(r"(error: |[\w.]*(Error|Exception|Interrupt|Panic\w*)\b)")


def gist(text: str) -> str:
    """What went wrong in a line: the last error, the innermost line of ours, and what was done."""
    lines = text.strip().splitlines() or [""]
    errors = [line for line in lines if ERROR.match(line)] or lines[-1:]
    frames = [line for line in lines if line.startswith("  File ") and not re.search("site-packages|faults.py", line)]
    where = frames[-1].rpartition("/")[2].replace('"', "") if frames else ""
    return " | ".join([errors[-1][:200], where, *(line[:200] for line in lines[:2])])


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few trials of each kind")
    parser.add_argument("--only", default="", help=f"KIND,KIND or KIND:NUMBER; kinds: {', '.join(KINDS)}")
    parser.add_argument("--most", type=int, help="trials of a kind at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials at a time")
    parser.add_argument("--json", default="", help="file for the table and for every trial that went wrong")
    parser.add_argument("--folder", default="", help="where to work; default a new folder of the system's")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = read_arguments(argv)
    wanted = []
    for word in args.only.split(",") if args.only else KINDS:
        name, _, number = word.partition(":")
        count = KINDS[name].short if args.short else KINDS[name].long
        numbers = [int(number)] if number else range(min(count, args.most or count))
        wanted += [(name, i) for i in numbers]
    folder = Path(args.folder or tempfile.mkdtemp(prefix="faults-")).resolve()
    told = []
    for trial in all_trials(wanted, folder, args.seed, args.jobs):
        told.append(trial)
        if len(wanted) == 1:
            print(f"{trial.text}\nin {folder}")
        if trial.column not in GOOD:
            print(f"{trial.kind}:{trial.number} {trial.column} | {gist(trial.text)}", flush=True)
    table = table_of(told)
    print("\n".join(lines_of(table)))
    if args.json:
        wrong = [trial._asdict() for trial in told if trial.column not in ("clear", "right")]
        Path(args.json).write_text(json.dumps({"seed": args.seed, "table": table, "wrong": wrong}, indent=1))
    return table


if __name__ == "__main__":
    main()
