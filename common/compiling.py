"""torch.compile with its costs told: how many graphs, in how many seconds, and what of a model stays as it is."""

import functools
import logging
import textwrap
import time
import warnings
from collections.abc import Callable

import torch

from common.telling import say

BACKEND = "inductor"
LOGGER = logging.getLogger("torch._dynamo.convert_frame")  # where a failed compilation is told, in pages
UNCOMPILED: list[tuple[Callable, list]] = []  # functions, and what torch.compiler.disable makes of them


def uncompiled(function: Callable) -> Callable:
    """A function that compiled code calls as it is: torch.compiler.disable, whose import takes a second, without that
    import where nothing is compiled."""
    twin: list[Callable] = []
    UNCOMPILED.append((function, twin))

    @functools.wraps(function)
    def call(*args, **kwargs):
        if twin and torch.compiler.is_compiling():
            return twin[0](*args, **kwargs)
        return function(*args, **kwargs)

    return call


class Compiler:
    """Use as a context manager around all calls of what it compiles: compilation comes with the first of them.

    What fails to compile runs as it is, and a line says what and why; TORCH_LOGS=dynamo shows the whole story instead.

    Attributes: seconds of compilation so far, on this rank.
    """

    def __init__(self, says: bool):
        self.says, self.seconds = says, 0.0
        self._began, self._told, self._failed = 0.0, -1, set()

    def __enter__(self) -> "Compiler":
        from torch._dynamo import callback, config, utils  # seconds that a run without compilation has no use for

        for function, twin in UNCOMPILED:
            twin[:] = [torch.compiler.disable(function)]
        self._callbacks, self._counters, self._config = callback.callback_handler, utils.counters, config
        self._before, config.suppress_errors = config.suppress_errors, True
        self._counters.clear()
        self._callbacks.register_start_callback(self._begin)
        self._callbacks.register_end_callback(self._end)
        LOGGER.addFilter(self._in_a_line)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        # Of torch to itself: it looks at gradients of what it traces.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        return self

    def __exit__(self, *error) -> None:
        self._warnings.__exit__(*error)
        LOGGER.removeFilter(self._in_a_line)
        self._callbacks.remove_start_callback(self._begin)
        self._callbacks.remove_end_callback(self._end)
        self._config.suppress_errors = self._before

    def compile(self, model: torch.nn.Module, mode: str | None = None) -> torch.nn.Module:
        """The module to call in place of a model, whose parameters it shares; mode: see torch.compile."""
        return torch.compile(model, dynamic=False, backend=BACKEND, mode=mode)

    def news(self) -> str:
        """What was compiled, where that is more than at the last call; else nothing."""
        graphs = self._counters["stats"]["unique_graphs"]
        if graphs == self._told:
            return ""
        self._told = graphs
        if not graphs:
            return "nothing was compiled: torch leaves recurrent layers, and what it cannot follow, as they are"
        # Parts that are disabled on purpose are loops over blocks, written to run as they are.
        breaks = self._counters["graph_break"]
        reasons = {reason.splitlines()[0] for reason in breaks if "torch.compiler.disable" not in reason}
        eager = f"; not compiled: {textwrap.shorten('; '.join(sorted(reasons)), 160)}" if reasons else ""
        number = f"{graphs} graph{'s' if graphs > 1 else ''}"
        return f"compiled {number} in {self.seconds:.0f} s, which are no part of the speed{eager}"

    def _begin(self, *args) -> None:
        self._began = time.perf_counter()

    def _end(self, *args) -> None:
        self.seconds += time.perf_counter() - self._began

    def _in_a_line(self, record: logging.LogRecord) -> bool:
        """A filter: whether a record is told as torch tells it."""
        if record.levelno < logging.WARNING or LOGGER.isEnabledFor(logging.INFO):
            return True
        what, _, why = record.getMessage().partition("due to:")
        if record.exc_info and record.exc_info[1]:
            why = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        line = textwrap.shorten(" ".join(what.replace("WON'T CONVERT", "").split()), 120)
        if self.says and line not in self._failed:
            say(f"note: not compiled, runs eager: {line} ({textwrap.shorten(' '.join(why.split()), 200)})")
        self._failed.add(line)
        return False
