"""What a command says beside its results: its first line, notes, and what is going on where that takes long.

Rank 0 speaks alone. Light to import: what says the first line must not wait for torch.
"""

import contextlib
import functools
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from common.errors import print_aside

SILENT_S = 2.0  # a piece of work with a count that is over sooner says nothing where nobody watches
SHORT_S = 1.0  # and one without
QUIET_S = 3.0  # pieces that follow one another, each over sooner: from then on the one at work speaks
AGAIN_S, RARER = 4.5, 0.1  # to the next line, or as a share of the time so far, where that is longer


def is_rank_0() -> bool:
    """Whether this process is rank 0, or alone."""
    return os.environ.get("RANK") in (None, "", "0")


quiet = {"since": 0.0, "until": 0.0}  # pieces of work that said nothing: their begin, and the end of the last


def say(line: str) -> None:
    """A line on stderr that no progress bar tears, if stderr takes any."""
    quiet["since"] = time.monotonic()
    if "tqdm" not in sys.modules:
        print_aside(line)
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        print_aside(line)


def note(text: str) -> None:
    """Something worth knowing that is neither result nor error."""
    if is_rank_0():
        say(f"note: {text}")


@functools.cache
def note_once(text: str) -> None:
    """The same once in a process, however often it is met."""
    note(text)


def begin(script: str, makes: str, place: object = "", file: IO | None = None) -> None:
    """The first line of a command: who it is, what it makes of what, and where.

    script: its __file__. file: a stream in place of stderr, for a page, whose lines are a log on standard output.
    "train_ghmm: mess3, transformer, 1,500 steps -> out/ghmm"
    """
    line = f"{Path(script).stem}: {makes}" + (f" -> {place}" if str(place) else "")
    if is_rank_0() and not file:
        say(line)
    elif is_rank_0():
        with contextlib.suppress(OSError):  # a stream that takes nothing is told of where results are lost
            print(line, file=file, flush=True)


def fitted(text: str) -> str:
    """Lines for standard output: on a terminal broken at words, the rest of each indented; elsewhere as they are."""
    try:
        width = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return text
    fill = functools.partial(textwrap.fill, width=width, subsequent_indent="  ", break_long_words=False,
                             break_on_hyphens=False)
    return "\n".join(fill(line) if 20 < width < len(line) else line for line in text.split("\n"))


def duration(seconds: float) -> str:
    """15 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 6_000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def bar(items: Iterable | None, what: str, total: int | None = None, unit: str = "", active: bool = True):
    """The items, with how far they are: a bar on a terminal, else lines on stderr where they take over two seconds.

    "analysing 88,572 prefixes ... 12%, about 15 s left": at two seconds, then every five, after a minute more rarely.

    Args:
        items: or None, for work that is counted by update(n) inside `with bar(None, ...) as work`.
        what: is made, from what, how much. total: of items, where they have no length. active: whether to say anything.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    work = Work(what, total, unit, active)
    return work if items is None else work.through(items)


def doing(what: str, active: bool = True) -> "Work":
    """Context of a piece of work without a count: a line on a terminal that is cleared at its end, else one that stays,
    after a second."""
    return Work(what, None, None, active)


class Work:
    """See bar and doing. The thread that speaks for it ends with it.

    unit: of what is counted, "" where it has no name, None where nothing is.
    """

    def __init__(self, what: str, total: int | None, unit: str | None, active: bool):
        self.what, self.total, self.unit = what, total, unit
        self.active = active and is_rank_0()
        self.done, self.drawn = 0, None
        self.is_over = threading.Event()

    def through(self, items: Iterable) -> Iterator:
        with self:
            for item in items:
                yield item
                self.update()

    def __enter__(self) -> "Work":
        self.began = time.monotonic()
        if self.began - quiet["until"] > SHORT_S:  # something else was going on
            quiet["since"] = self.began
        if not self.active:
            return self
        if sys.stderr.isatty():
            self.draw()
        if self.drawn is None or self.unit is None:
            self.thread = threading.Thread(target=self.speak, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.is_over.set()
        quiet["until"] = time.monotonic()
        if self.drawn is not None:
            self.drawn.close()

    def update(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number
        if self.drawn is not None:
            self.drawn.update(number)

    def draw(self) -> None:
        from tqdm import tqdm  # slow to import, and only needed here

        form = "{desc} ... {elapsed}" if self.unit is None else None
        self.drawn = tqdm(desc=self.what, total=self.total, unit=f" {self.unit or ''}", bar_format=form, leave=False,
                          dynamic_ncols=True, mininterval=0.2)

    def speak(self) -> None:
        """In a thread: a line from time to time, or the seconds on a terminal."""
        wait = SHORT_S if self.unit is None else SILENT_S
        left = QUIET_S - (self.began - quiet["since"])
        wait = min(wait, max(left, SHORT_S / 5))
        while not self.is_over.wait(wait):
            if self.drawn is not None:
                self.drawn.refresh()
                continue
            say(f"{self.what} ...{self.so_far()}")
            wait = max(AGAIN_S, RARER * (time.monotonic() - self.began))

    def so_far(self) -> str:
        """How much is done, and how long the rest will take at the pace so far."""
        seconds = time.monotonic() - self.began
        if self.unit is None or not self.done:
            return f" {duration(seconds)}" if seconds > 2 * SHORT_S else ""
        if not self.total:
            return f" {self.done:,} {self.unit}".rstrip()
        left = seconds / self.done * max(0, self.total - self.done)
        return f" {min(self.done / self.total, 1):.0%}, about {duration(left)} left"
