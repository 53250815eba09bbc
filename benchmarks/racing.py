"""How the benchmarks measure: warm up until the rate is steady, rounds in turns, medians with their spread.

A shared machine has slow minutes, so sides that are compared run in turns, each in a process of its own where it has
state (`race`), and a ratio is the median of the ratios of each round. Every process flushes denormal numbers before its
first operator, as a training run does: otherwise some processors measure how slow they are.
"""

import contextlib
import importlib.util
import io
import logging
import math
import os
import platform
import resource
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from common.runtime import Runtime
from configurator import fail
from measure.speed import matmul_rate

RESULTS: list[dict] = []  # of this run, for --json
DOUBTFUL = 0.25  # the spread above which a figure is marked
LEGEND = ("+-: (q3 - q1) / median of the rounds; a `!` after it: above 25%, not to be relied on; "
          "ratio: value / the other's, of memory below 1 is less")
STEADY = 0.10  # warmed up once a window's median differs by less than this from that of the window before
WARM_WINDOWS, WARM_SECONDS = 10, 20.0  # after so many windows, or so long, it counts as warm all the same
POOL = 32  # different batches that a side trains on, over and over, where it has no loader
AS_OURS = ", with the float32 products of ours"  # a peer's side that has the settings of a run of ours
SHORT = False  # with --short: two rounds of one call each, to see that a benchmark runs


class Rounds(tuple):
    """One positive number a round, such as seconds or tokens/s."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    @property
    def spread(self) -> float | None:
        """(q3 - q1) / median; None of a single round."""
        if len(self) < 2:
            return None
        first, _, third = statistics.quantiles(self, n=4, method="inclusive")
        return (third - first) / self.median

    def rate(self, count: float) -> "Rounds":
        """count a second, of rounds in seconds."""
        return Rounds(count / seconds for seconds in self)

    def rate_at(self, flops: float) -> "Rounds":
        """Tokens/s, of rounds in FLOP/s, at so many FLOP a token."""
        return Rounds(rate / flops for rate in self)

    def over(self, other: "Rounds") -> "Rounds":
        """The ratio in every round."""
        return Rounds(a / b for a, b in zip(self, other, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------
def result(name: str, value: float | None, unit: str, against: str = "", ratio: float | None = None,
           spread: float | None = None, ratio_spread: float | None = None) -> dict:
    """As --json has it."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "against": against,
        "ratio": ratio,
        "spread": spread,
        "ratio_spread": ratio_spread,
        "marked": max(spread or 0, ratio_spread or 0) > DOUBTFUL,
    }


def report(name: str, value: float | Rounds, unit: str, against: str = "", peer: float | Rounds | None = None,
           spread: float | None = None) -> dict:
    """Print a result and keep it. spread is that of value where it is a number; of rounds it is known.

    The ratio is the median of the rounds' ratios where both sides have as many.
    """
    ratio = ratio_spread = None
    if peer and isinstance(value, Rounds) and isinstance(peer, Rounds) and len(value) == len(peer):
        ratios = value.over(peer)
        ratio, ratio_spread = ratios.median, ratios.spread
    elif peer:
        ratio = _middle(value) / _middle(peer)
    if isinstance(value, Rounds):
        spread = value.spread
    found = result(name, _middle(value), unit, against, ratio, spread, ratio_spread)
    RESULTS.append(found)
    versus = f"{ratio:7.2f} x {against}{_told(ratio_spread)}" if ratio else against
    print(f"{name:<58} {found['value']:12.4g} {unit}{_told(spread)}  {versus}".rstrip(), flush=True)
    return found


def _middle(value: float | Rounds) -> float:
    return value.median if isinstance(value, Rounds) else value


def _told(spread: float | None) -> str:
    return "" if spread is None else f" +-{spread:.0%}{' !' if spread > DOUBTFUL else ''}"


def absent(name: str, advice: str) -> None:
    """A line for what cannot take part, with what to do about it: a result without a value."""
    RESULTS.append(result(name, None, "", f"missing: {advice}"))
    print(f"{name:<58} missing: {advice}", flush=True)


def chosen(rows: Iterable[str], only: str) -> list[str]:
    """The rows of a benchmark whose names hold the text of --only; exits with code 2 where none does."""
    found = [name for name in rows if only in name]
    if not found:
        fail(f"--only={only}: no row has it in its name. There are: {', '.join(rows)}")
    return found


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


# ---------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------
def machine() -> dict:
    """What it is: processor, instructions, cores, threads, memory in GB, GPU, versions."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    found = Path("/proc/cpuinfo")
    if found.exists():
        for line in found.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(it: dict) -> str:
    """A line of what machine() gives."""
    gpu = f", {it['gpu']}" if it["gpu"] else ""
    return (f"{it['processor']} ({it['instructions']}), {it['cores']} cores, {it['threads']} threads, "
            f"{it['memory_gb']} GB{gpu} | torch {it['torch']}, python {it['python']} | load {os.getloadavg()[0]:.2f}")


@contextlib.contextmanager
def load_told(name: str) -> Iterator[None]:
    """Print the load before and after, and the share of the cores that other processes took meanwhile."""
    print(f"{name}: load {os.getloadavg()[0]:.2f} before", flush=True)
    began, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    yield
    seconds = time.perf_counter() - began
    others = ""
    if busy is not None:
        share = max(0.0, _busy_seconds() - busy - (_own_seconds() - own)) / seconds / os.cpu_count()
        others = f"; other processes took {share:.0%} of the cores"
    print(f"{name}: load {os.getloadavg()[0]:.2f} after {seconds:.0f} s, its own in it{others}", flush=True)


def _busy_seconds() -> float | None:
    """CPU time of the whole machine since it started, where Linux tells it."""
    found = Path("/proc/stat")
    if not found.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, found.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


_own: list[float] = []  # CPU seconds of processes that another one, such as a fork server, waits for


def count_as_own(seconds: float) -> None:
    """CPU time of a process that is of this benchmark and no child of this process."""
    _own.append(seconds)


def _own_seconds() -> float:
    """CPU time of this process, of those it started that have ended, and of those that are counted as its own."""
    return sum(os.times()[:4]) + sum(_own)


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Numbers too small for all their digits are 0, in threads that are started meanwhile too, as in a run."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def peak_memory() -> float:
    """MB that this process held at most. (Linux's ru_maxrss of a started process includes its parent's.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


# ---------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------
def seconds(run: Callable, device: torch.device | str = "cpu", rounds: int = 5, lasting: float = 0.2) -> Rounds:
    """Seconds a call in each round, once it is warm. A round takes `lasting` seconds, or one call."""
    return in_turns({"": run}, device, rounds, lasting)[""]


def in_turns(runs: dict[str, Callable], device: torch.device | str = "cpu", rounds: int = 5,
             lasting: float = 0.2) -> dict[str, Rounds]:
    """The same of several in one process, in turns."""
    rounds, lasting = pace(rounds, lasting)
    for run in runs.values():
        warm_up(run, torch.device(device), lasting)
    rows = [{name: window(run, torch.device(device), lasting) for name, run in runs.items()} for _ in range(rounds)]
    return {name: Rounds(row[name] for row in rows) for name in runs}


def pace(rounds: int, lasting: float) -> tuple[int, float]:
    return (2, 0.0) if SHORT else (rounds, lasting)


def warm_up(run: Callable, device: torch.device, lasting: float) -> None:
    """Call until the rate is steady: two windows one after the other differ by less than a tenth."""
    before, end = math.inf, time.perf_counter() + WARM_SECONDS
    for _ in range(WARM_WINDOWS):
        now = window(run, device, lasting)
        if abs(now - before) < STEADY * now or time.perf_counter() > end:
            return
        before = now


def window(run: Callable, device: torch.device, lasting: float) -> float:
    """Median seconds a call of `lasting` seconds of calls. A GPU gets ten at a time, as it works behind the calls."""
    calls, times = 10 if device.type == "cuda" else 1, []
    while not times or sum(times) * calls < lasting:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------
# Races: each side in a process of its own
# ---------------------------------------------------------------------------------------------------------------
class Trainer:
    """One side's training, made from (side, *shape): sets device, step() and, of ours, rt and flops_per_token().

    The step here is that of a peer which leaves it to its users; it needs draw() -> a fresh batch, loss(batch),
    autocast(), parameters and optimizer.
    """

    def step(self) -> None:
        batch = self.draw()
        with self.autocast():
            loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def linear_weights(model: torch.nn.Module) -> int:
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))


_entered: list[Runtime] = []  # which undo their settings when they are dropped


def both_ways(sides: dict[str, str], cfg) -> dict[str, str]:
    """The peers as they come and, where Runtime has another library make float32 products, with those of ours too."""
    with Runtime(cfg):
        differs = torch.get_float32_matmul_precision() != cfg.matmul_precision
    more = {side + AS_OURS: text + AS_OURS for side, text in sides.items()}
    return sides | more if differs else sides


def peer_name(side: str, cfg) -> str:
    """A side of both_ways() without its suffix; with it this process takes the settings of a run of ours."""
    if side.endswith(AS_OURS):
        _entered.append(Runtime(cfg).__enter__())
    return side.removesuffix(AS_OURS)


def pool(batches: list) -> Callable:
    """draw() over batches that were made before, in turn."""
    step = iter(range(sys.maxsize))
    return lambda: batches[next(step) % len(batches)]


def zipf_tokens(vocab: int, batch: int, length: int, device: torch.device, count: int = POOL) -> list[torch.Tensor]:
    """Batches of tokens [B, L] whose frequencies fall as those of words do, 1 / (rank + 2.7) (Mandelbrot 1953)."""
    weights = 1 / (torch.arange(vocab, dtype=torch.float64) + 3.7)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(weights, count * batch * length, replacement=True, generator=generator)
    return list(tokens.view(count, batch, length).to(device))


class Side:
    """A process that holds one side of a race."""

    def __init__(self, make: Callable, side: str, shape: tuple):
        self.pool = ProcessPoolExecutor(1, get_context("spawn"))
        self.ready = self.pool.submit(_start, make, side, *shape)

    def ask(self, question: Callable, *about):
        return self.pool.submit(question, *about).result()


_trainer: Trainer | None = None  # of the worker process
_before = 0.0  # MB that it held before that


def _start(make: Callable, *shape) -> None:
    global _trainer, _before
    warnings.simplefilter("ignore")  # the peers', of what they deprecate
    torch.set_flush_denormal(True)  # threads that are started from here on have it too
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # torch's own footprint
    _before = peak_memory()
    with quiet():
        _trainer = make(*shape)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # Runtime waits for the end of a step, which a worker has not


def _warm_up(lasting: float) -> None:
    warm_up(_trainer.step, _trainer.device, lasting)


def _window(lasting: float) -> float:
    return window(_trainer.step, _trainer.device, lasting)


def _memory() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else peak_memory() - _before


def _matmul_rate() -> float | None:
    """FLOP/s of this process, with the same settings as the training in it."""
    return matmul_rate(_trainer.rt) if hasattr(_trainer, "rt") else None


def _flops() -> float | None:
    return _trainer.flops_per_token() if hasattr(_trainer, "rt") else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The peers print their models, and warn of what is set by their own defaults."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def alternate(make: Callable, sides: list[str], shape: tuple, rounds: int = 5, lasting: float = 0.5) -> dict[str, dict]:
    """Train the sides in turns, each in its own process, so that a slow minute of the machine meets all of them.

    make(side, *shape) gives a Trainer. Returns of each side {"seconds": of a step (Rounds); "memory": peak MB beyond
    torch's own}, and of ours {"peak": FLOP/s of large products in its process, every round; "flops": a token's}.
    """
    rounds, lasting = pace(rounds, lasting)
    processes = {side: Side(make, side, shape) for side in sides}
    try:
        for it in processes.values():
            it.ready.result()
        for it in processes.values():
            it.ask(_warm_up, lasting)
        times, peaks = {side: [] for side in sides}, {side: [] for side in sides}
        for _ in range(rounds):
            for side, it in processes.items():
                times[side].append(it.ask(_window, lasting))
                peaks[side].append(it.ask(_matmul_rate))
        return {side: {"seconds": Rounds(times[side]), "peak": Rounds(peaks[side]), "memory": it.ask(_memory),
                       "flops": it.ask(_flops)} for side, it in processes.items()}
    finally:
        for it in processes.values():
            it.pool.shutdown()


def race(make: Callable, sides: dict[str, str], shape: tuple, tokens: int, name: str, rounds: int = 5,
         lasting: float = 0.5, memory: bool = False, unit: str = "token") -> dict[str, dict]:
    """Report tokens/s of "ours" against the machine's matrix-multiply rate and every other side's description.

    sides: what alternate() takes, with the words to print of each. Returns what alternate() does.
    """
    found = alternate(make, list(sides), shape, rounds, lasting)
    rates = {side: it["seconds"].rate(tokens) for side, it in found.items()}
    report_share(name, rates["ours"], found["ours"], unit)
    for side, text in sides.items():
        if side != "ours":
            report(name, rates["ours"], f"{unit}s/s", text, rates[side])
        if memory:
            report(f"{name}, peak memory", found[side]["memory"], "MB", text)
    return found


def report_share(name: str, rate: Rounds, one: dict, unit: str = "token") -> None:
    """tokens/s of a side of alternate() against what its arithmetic would take at the matrix-multiply rate."""
    report(name, rate, f"{unit}s/s", f"matrix-multiply rate of {one['peak'].median / 1e9:,.0f} GFLOP/s, at "
           f"{one['flops'] / 1e6:.2f} MFLOP a {unit}", one["peak"].rate_at(one["flops"]))
