"""The machine under a training loop: device, precision, ranks, seeds, signals.

One `Runtime` object holds it all. A script under `torchrun` becomes one rank of a DistributedDataParallel job; without
it, a job of one rank. Nothing here knows a model, a data set or a loss.
"""

import atexit
import contextlib
import ctypes
import itertools
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.ahead import Ahead
from common.compiling import Compiler
from common.errors import ECHO_SECONDS, InputError, leave, machine_memory, signals_to, stop_now, within_memory
from common.products import exact, float32_products
from common.ranks import Ranks, environment

_GROUP: list = []  # the last process group
# Ranks agree on stopping at every tenth step, a 0.1 ms exchange of two numbers, or more often where steps are slow.
STOP_CHECK_STEPS, STOP_CHECK_SECONDS = 10, 1.0


MOST_TENSORS = 10_000  # of weights: some hundred layers
TOO_DEEP = f"the settings make a model of more than {MOST_TENSORS:,} tensors of weights: take fewer layers"


class Due(NamedTuple):
    """What follows a step: a log line, an evaluation, a save, the end because of a signal."""

    logs: bool
    evaluates: bool
    saves: bool
    stops: bool

    @property
    def nothing(self) -> bool:
        return not (self.logs or self.saves)  # an evaluation is logged, a stop is saved


class Runtime:
    """Use as a context manager around the whole of train(); leaving it closes the process group, also on error.

    Reads from the config: device (auto | cpu | cuda | cuda:N | mps), precision (auto | fp32 | bf16 | fp16),
    matmul_precision (highest | high | medium; highest where a page has no such setting), compile (auto | true | false),
    seed. Exits with code 2 where the machine does not have what was asked for.

    Attributes: device, precision, reason (why this precision), matmul_precision, rank, local_rank, world_size, is_main,
    scaler.
    """

    def __init__(self, cfg):
        self.seed = cfg.seed
        self.rank, self.local_rank, self.world_size = environment()
        self.is_main = self.rank == 0
        self.device = _pick_device(cfg.device, self.local_rank)
        self.precision, self.reason = _pick_precision(cfg.precision, self.device)
        self.matmul_precision = getattr(cfg, "matmul_precision", "highest")
        self.compile = str(cfg.compile).lower() == "true" or (cfg.compile == "auto" and self.device.type == "cuda")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.compiler: Compiler | None = None  # where the model is compiled
        self.ranks: Ranks | None = None  # where there are several
        self.stop_signal: int | None = None
        self._echoes_until = 0.0
        self.doing = "this step"  # what a signal waits for
        self._stack = contextlib.ExitStack()
        self._looked, self._next_look = (0, time.monotonic()), 0  # when ranks asked each other for signals

    def __enter__(self) -> "Runtime":
        try:
            self._set_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _set_up(self) -> None:
        _keep_freed_memory()
        if self.device.type == "cpu":
            self._stack.enter_context(_without_denormals())
            self._stack.enter_context(within_memory())  # what drivers of a GPU set aside is no memory that is used
        # As asked with any precision: the products that autocast leaves, and all of them without it.
        self._stack.enter_context(float32_products(self.matmul_precision, self.device))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            self._join()
        self.reseed()

    def _join(self) -> None:
        gpu = str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else None
        self.ranks = Ranks(self.rank, self.world_size, gpu=gpu)
        place = (platform.node(), gpu)
        sharing = [str(rank) for rank, it in enumerate(self.ranks.members) if (it["host"], it["gpu"]) == place]
        if gpu and len(sharing) > 1:
            leave(f"ranks {', '.join(sharing)} of {place[0]} would share one GPU: use device=cuda, and start as many "
                  "ranks as there are GPUs", 2)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=self.ranks.store, rank=self.rank,
                                world_size=self.world_size)
        # Gloo's threads need the interpreter to free the tensors of the last exchange. So nobody may close the
        # group with the interpreter locked, as DDP's destructor would (a hang), and Python must not end in the
        # middle of it (an abort): the last reference is ours, and the threads get half a second before the end.
        if not _GROUP:
            atexit.register(time.sleep, 0.5)
        _GROUP[:] = [dist.group.WORLD]

    def __exit__(self, kind, error, trace) -> None:
        try:
            code = self._part(error) if self.ranks else None
        finally:
            self._stack.close()
        if code is not None:
            raise SystemExit(code) from error

    def _part(self, error: BaseException | None) -> int | None:
        """Leave the group; returns an exit code where another rank has ended the job."""
        try:
            if error is not None:
                return self.ranks.leave(error)
            self.ranks.meet()  # nobody leaves while another still talks
            self.synchronize()
            self.ranks.close()
            with contextlib.suppress(RuntimeError):
                dist.barrier()  # nor rank 0, which may have the store, while another asks it
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            self.ranks.close()
        return None

    def reseed(self, rank: int = 0) -> None:
        """Seed the global generators, which only parameter initialisation and dropout draw from.

        The same seed on every rank for the weights, which are then equal even before they are synchronised; with the
        rank afterwards, where there is dropout: ranks must not draw the same masks.
        """
        torch.manual_seed(self.seed + rank)
        np.random.seed(self.seed % 2**32)

    def generator(self, *counter: int, device: torch.device | str | None = None) -> torch.Generator:
        """A generator that is a pure function of (seed, *counter), for example of the step: data that need no state.

        (seed, counter) is hashed by numpy's SeedSequence, so that neighbouring steps and seeds are unrelated.
        """
        state = np.random.SeedSequence(self.seed, spawn_key=counter).generate_state(1, np.uint64)[0]
        return torch.Generator(device or self.device).manual_seed(int(state >> np.uint64(1)))

    # Model and optimizer ---------------------------------------------------------------------------------------

    def build(self, build: Callable[..., torch.nn.Module], *args) -> torch.nn.Module:
        """build(*args), a model on the CPU, once its shapes alone show that there is memory to train it.

        Raises InputError where there is not.
        """
        try:
            with torch.random.fork_rng(devices=()), tensors_at_most(MOST_TENSORS, InputError(TOO_DEEP)), \
                    torch.device("meta"):
                parameters = list(build(*args).parameters())
            # A weight that is trained has a gradient and two moments of AdamW.
            size = sum(it.numel() * it.element_size() * (4 if it.requires_grad else 1) for it in parameters)
        except InputError:
            raise
        except Exception:  # an edited model may not know meta tensors; what else is wrong is told below
            return build(*args)
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else machine_memory()
        if size > memory:
            raise InputError(f"the settings make a model of {sum(it.numel() for it in parameters):,} parameters, which "
                             f"needs {size / 1e9:,.0f} GB in training, and this {'GPU' if on_gpu else 'machine'} has "
                             f"{memory / 1e9:,.0f} GB: make the model smaller")
        return build(*args)

    def wrap(self, model: torch.nn.Module, mode: str | None = None) -> torch.nn.Module:
        """The module to call in training: compiled if asked, synchronised over ranks. Keep `model` for the rest.

        mode: of torch.compile, such as reduce-overhead (CUDA graphs, for models so small that launches are all).
        """
        if self.compile:
            self.compiler = self._stack.enter_context(Compiler(says=self.is_main))
            model = self.compiler.compile(model, mode)
        if self.world_size > 1:
            model = DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        return model

    def adamw(self, params, **options) -> torch.optim.AdamW:
        """AdamW in one fused kernel: 2-4 times faster than the loop over tensors, on CPU too."""
        return torch.optim.AdamW(params, fused=self.device.type in ("cuda", "cpu"), **options)

    def ahead(self, batches: Callable[[int], object], last: int) -> Callable[[int], object]:
        """Batches of a loop that ends at step `last`, each made by a thread while the step before it is trained.

        On a CPU batches stay as they are: a thread could only take from the step what it gives.
        """
        if self.device.type == "cpu":
            return batches
        ahead = Ahead(batches, last, self.device)
        self._stack.callback(ahead.close)
        return ahead

    def autocast(self):
        """Context of the forward pass and the loss."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def sync(self, module: torch.nn.Module, last: bool):
        """Context of a micro-step: gradients travel between ranks on the last one only."""
        return contextlib.nullcontext() if last or self.world_size == 1 else module.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, params: list, max_norm: float, lr: float) -> torch.Tensor:
        """Clip the (synchronised) gradients to max_norm (0: do not), step at this rate, drop the gradients.

        Returns their norm before clipping.
        """
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm if max_norm > 0 else float("inf"))
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    # Ranks -----------------------------------------------------------------------------------------------------

    def divide(self, batch_size: int | str, grad_accum: int) -> int | str:
        """Sequences of one rank's micro-step; exits where batch_size cannot be dealt evenly. "auto" stays "auto"."""
        parts = grad_accum * self.world_size
        if batch_size == "auto":
            return batch_size
        if batch_size > machine_memory() // 64:  # bytes: what the least of sequences takes
            leave(f"batch_size = {batch_size} is more than this machine has memory for", 2)
        if batch_size % parts:
            leave(f"batch_size = {batch_size} must be a multiple of grad_accum * ranks = {parts}", 2)
        return batch_size // parts

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a global batch: every world_size-th element, so any number of ranks trains the same."""
        return tensor[self.rank :: self.world_size]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, on every rank."""
        return self.sum(tensor) / self.world_size if self.world_size > 1 else tensor

    def gather(self, value) -> list:
        """[value of rank 0, value of rank 1, ...], on every rank; tensors in them on the CPU, where there are several.
        """
        values = [None] * self.world_size
        if self.world_size == 1:
            return [value]
        self.barrier()
        dist.all_gather_object(values, on_cpu(value))
        return values

    def barrier(self) -> None:
        """Wait for all ranks, for hours if it must be: an exchange of tensors waits for minutes."""
        if self.ranks:
            self.ranks.meet()

    def from_main(self, function: Callable[[], object]):
        """function() as rank 0 finds it, on every rank: of what lies on a disk that others may not see, or see older.

        An InputError of rank 0 is raised on all; any other error of it on rank 0 alone, which ends the others.
        """
        self.doing = "the analysis"  # which what is read in the end, such as the best weights, is for
        if self.world_size == 1:
            return function()
        found = [None]
        if self.is_main:
            try:
                found = [function()]
            except InputError as error:
                found = [error]
        self.barrier()
        dist.broadcast_object_list(found, device=torch.device("cpu"))
        if isinstance(found[0], InputError):
            raise found[0]
        return found[0]

    def agree(self, **facts) -> None:
        """Raise InputError where ranks do not have the same of something, such as the fingerprint of the data."""
        everywhere = self.gather((platform.node(), facts))
        for name in facts:
            values = [of_rank.get(name) for _, of_rank in everywhere]
            if all(value == values[0] for value in values):
                continue
            told = [f"{value} on rank {rank} ({host})"
                    for rank, ((host, _), value) in enumerate(zip(everywhere, values, strict=True))
                    if rank == 0 or value != values[0]]
            raise InputError(f"{name} is not the same on all ranks: {', '.join(told)}. Give all the same settings "
                             "and the same files, on a disk that they share or copied to each host")

    # Stopping --------------------------------------------------------------------------------------------------

    def take_signals(self) -> None:
        """From now on a signal to stop waits for what is being done, which is then saved; a second one does not."""
        self.doing = "this step"
        self._stack.enter_context(signals_to(self._on_signal))

    def _on_signal(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.stop_signal is None:
            self.stop_signal, self._echoes_until = number, now + ECHO_SECONDS
            if self.is_main and not (self.ranks and self.ranks.end):
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):  # past Python's buffers, which this may have interrupted
                    os.write(2, f"{name}: stopping after {self.doing}; again to end now\n".encode())
        elif now > self._echoes_until:
            stop_now(number, frame)

    def stopping(self, step: int) -> bool:
        """Whether to finish after this step because of a signal; all ranks get the same answer, now and then."""
        if self.world_size == 1:
            return self.stop_signal is not None
        if 0 < step < self._next_look:
            return False
        (before, began), now = self._looked, time.monotonic()
        # On the CPU: gloo, no wait for the accelerator.
        facts = torch.tensor([float(self.stop_signal is not None), now - began], dtype=torch.float64)
        dist.all_reduce(facts, op=dist.ReduceOp.MAX)
        stops, seconds = facts.tolist()
        steps = STOP_CHECK_SECONDS * max(1, step - before) / max(seconds, 1e-9)
        self._looked, self._next_look = (step, now), step + int(min(max(steps, 1), STOP_CHECK_STEPS))
        return bool(stops)

    def due(self, step: int, last: int, log_interval: int, eval_interval: int, save_interval: int | None) -> Due:
        """What follows step `step` of `last`; by default a save goes with an evaluation. The last step asks for all."""
        ends = step == last
        evaluates = ends or step % eval_interval == 0
        if evaluates:
            self._next_look = step  # an evaluation takes long: ask now
        stops = self.stopping(step)
        self.doing = "the analysis" if ends else "this evaluation" if evaluates else "this step"
        return Due(logs=evaluates or step % log_interval == 0, evaluates=evaluates, stops=stops and not ends,
                   saves=ends or stops or step % (save_interval or eval_interval) == 0)

    def synchronize(self) -> None:
        """Wait for the accelerator, before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        products = self.matmul_precision
        if self.device.type == "cpu" and exact():
            products += " by oneDNN" if products == "highest" else " (of full precision here) by oneDNN"
        return (f"device {self.device} ({name}, threads {torch.get_num_threads()}) | precision {self.precision} "
                f"({self.reason}), float32 products {products} | "
                f"compile {'on' if self.compile else 'off'} | ranks {self.world_size}")


def on_cpu(value):
    """The value with the tensors in it on the CPU: unpickled by another rank, one of a GPU would take memory there."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_cpu(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_cpu(part) for part in value)
    return value


@contextlib.contextmanager
def tensors_at_most(most: int, error: Exception) -> Iterator[None]:
    """Raise the error in whatever builds a model of more tensors of weights."""
    found = itertools.count(1)

    def count(*parameter) -> None:
        if next(found) > most:
            raise error

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def learning_rate(step: int, cfg, max_steps: int | None = None) -> float:
    """Linear warm-up to lr over warmup_steps, then constant or a cosine down to min_lr at the last step.

    Reads lr, min_lr, warmup_steps, schedule and, unless it is given, max_steps of cfg.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    end = cfg.max_steps if max_steps is None else max_steps
    done = min(1.0, (step - cfg.warmup_steps) / max(1, end - cfg.warmup_steps))
    least = min(cfg.lr, cfg.min_lr)
    return least + (cfg.lr - least) * 0.5 * (1 + math.cos(math.pi * done))


class Meter:
    """What a loop counts: whether the loss is finite, means since the last line, the time of training steps alone.

    Adding does not wait for the device. The counts are part of a checkpoint: a resumed run logs what an uninterrupted
    one would, and its summary is of the whole run.

    Args:
        units_per_step: tokens or cells, of all ranks. state: the checkpoint that a run goes on from.
    Attributes: seconds and units (tokens, cells) of training steps; began: when the run did, by time.perf_counter,
    moved back by what earlier starts of it took.
    """

    def __init__(self, rt: Runtime, units_per_step: int, began: float, state: dict | None = None):
        self.rt, self.units_per_step, self.began = rt, units_per_step, began
        self.seconds, self.units = 0.0, 0
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=rt.device)
        self._values: list[dict[str, torch.Tensor]] = []  # of each step since the last read
        self._lap = (0.0, 0)  # when the clock was started, less the seconds of compilation by then; at which step
        if state and "meter" in state:
            self._restore(**state["meter"])

    def start(self, step: int) -> None:
        """Start the clock: what follows are training steps."""
        self._lap = (self._clock(), step)
        if self.rt.doing == "this evaluation":
            self.rt.doing = "this step"

    def since_start(self) -> float:
        """Seconds of training since the clock was started, without those of compilation."""
        return self._clock() - self._lap[0]

    def _clock(self) -> float:
        """Seconds, of which those of compilation are none."""
        return time.perf_counter() - (self.rt.compiler.seconds if self.rt.compiler else 0.0)

    def check(self, step: int, loss: torch.Tensor) -> None:
        """Remember the first step whose loss is not finite."""
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, step)

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Numbers of a step, equal on all ranks, for the means."""
        if self._values and self._values[-1].keys() != values.keys():
            self._values = []  # of a checkpoint whose loss had other terms
        self._values.append(values)

    def read(self) -> dict[str, float]:
        """Means over the steps since the last read."""
        steps, self._values = self._values, []
        return {name: float(torch.stack([values[name] for values in steps]).mean()) for name in steps[-1]}

    def pause(self, step: int, model: torch.nn.Module, lr: float) -> float:
        """Stop the clock after this step, once the device is done; returns units a second since start().

        Raises FloatingPointError if a loss or a weight is not finite, naming the step and what is known of the cause.
        Comes before anything is saved, so the last good checkpoint survives.
        """
        self._verify(step, model, lr)
        self.rt.synchronize()
        began, first = self._lap
        lap, units = self._clock() - began, (step - first) * self.units_per_step
        self.seconds, self.units = self.seconds + lap, self.units + units
        return units / max(lap, 1e-9)

    def _verify(self, step: int, model: torch.nn.Module, lr: float) -> None:
        # One wait for all parameters.
        finite = torch.stack([torch.isfinite(p).all() for p in model.parameters()]).tolist()
        broken = [n for (n, _), is_finite in zip(model.named_parameters(), finite, strict=True) if not is_finite]
        if int(self.first_bad) < 0 and not broken:
            return
        cause = f"{len(broken)} parameters are not finite, the first being {broken[0]}" if broken else \
            "all parameters are still finite, so the forward pass overflowed"
        what = f"the weights are not finite after step {step}" if int(self.first_bad) < 0 else \
            f"the loss was not finite at step {int(self.first_bad)}"
        raise FloatingPointError(f"{what} (now lr = {lr:.3g}; {cause}). Nothing was saved since. Try a lower lr, "
                                 "grad_clip=1 or precision=fp32")

    def state(self) -> dict:
        """For a checkpoint."""
        names = self._values[-1] if self._values else ()
        since = {name: torch.stack([values[name] for values in self._values]).cpu() for name in names}
        return {"seconds": self.seconds, "units": self.units, "since": since,
                "elapsed": time.perf_counter() - self.began}

    def _restore(self, seconds: float, units: int, since: dict[str, torch.Tensor], elapsed: float) -> None:
        self.seconds, self.units = seconds, units
        self.began -= elapsed
        columns = [column.to(self.rt.device).unbind() for column in since.values()]
        self._values = [dict(zip(since, row, strict=True)) for row in zip(*columns, strict=True)]


def _pick_device(asked: str, local_rank: int) -> torch.device:
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        leave(f"device={asked} is unknown: use auto, cpu, cuda, cuda:N or mps", 2)
    if device.type == "cuda" and not torch.cuda.is_available():
        leave(f"device={asked}, but this torch ({torch.__version__}) sees no CUDA device: use device=cpu or auto", 2)
    if device.type == "mps" and not torch.backends.mps.is_available():
        leave(f"device={asked}, but this machine has no Metal device: use device=cpu or auto", 2)
    if device.type == "cuda" and device.index is None:  # of one GPU each rank is shown its own, as some schedulers do
        device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        leave(f"device={device} does not exist: there are {torch.cuda.device_count()}; start as many ranks as devices",
              2)
    return device


def _pick_precision(asked: str, device: torch.device) -> tuple[str, str]:
    if asked == "fp16" and device.type == "cpu":
        leave("precision=fp16 needs a GPU: use fp32 or bf16 on the CPU", 2)
    if asked != "auto":
        return asked, "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return "bf16", "auto: this GPU has it"
    return "fp32", "auto: bf16 only pays on this device for wide layers" if device.type == "cpu" else "auto"


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    """Take numbers too small for all their digits as 0: a product with one costs some Intel processors 100 cycles.

    Adam's moments of what has no gradient any more fade into such numbers. The threads that compute have this from the
    one that starts them, so it comes before the first operator of a run. They keep it: put back is that of the caller
    alone, and a program that has computed before it calls train() has threads without it.
    """
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # whose least numbers older numpy looks for, and warns where there are none
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)  # False where the processor has no such mode
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of returning them: fresh pages cost 20 times a warm copy on Linux."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, bytes; the largest glibc takes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes
