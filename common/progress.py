"""How far a sweep is: a line for each run that ends, on a terminal bars of those at work, and the time that is left."""

import contextlib
import re
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from common.jobs import Job

LOSSES = ("loss", "loss/ema", "val_loss", "val_xe", "val_nll")  # what is shown of a run, whichever comes first
SHOW_SECONDS = 0.5


class HowFar(NamedTuple):
    """Of a run at work: steps done, here alone, and in all where known; its newest loss where there is one; seconds."""

    step: int
    here: int
    total: int | None
    loss: float | None
    seconds: float


class Progress:
    """Bars where stderr is a terminal; else the same numbers for the lines of runs that end.

    Args:
        total: runs of the sweep. ended: how many of them ended before. at_a_time: how many are at work at once.
        steps: {name of a run that has not ended: its steps, None where its settings do not tell}.
    """

    def __init__(self, total: int, ended: int, steps: dict[str, int | None], at_a_time: int):
        self.total, self.ended, self.at_a_time = total, ended, at_a_time
        self.steps = dict(steps)
        # Of the runs that ended here.
        self.steps_done = 0.0
        self.seconds_spent = 0.0
        self.last_total = 1.0
        self.jobs: list[Job] = []
        self.shown = 0.0
        self.is_terminal = sys.stderr.isatty()
        self.bars: dict[str, tqdm] = {}  # by name of a run
        self.bar = self.new_bar(0, total, "{n_fmt}/{total_fmt} runs |{bar}| {elapsed}{postfix}")

    def new_bar(self, row: int, total: int | None, form: str, name: str = "") -> tqdm:
        return tqdm(total=total, desc=name, position=row, bar_format=form, disable=not self.is_terminal, leave=False,
                    dynamic_ncols=True)

    def show(self, jobs: list[Job]) -> None:
        """Draw the bars of the runs at work, twice a second."""
        self.jobs = jobs
        now = time.perf_counter()
        if not self.is_terminal or now < self.shown + SHOW_SECONDS:
            return
        self.shown = now
        for job in jobs:
            self.show_run(job)
        left = self.left()
        text = f"{tqdm.format_interval(left)} left" if left is not None else ""
        draw(self.bar, self.ended, self.total, text)

    def show_run(self, job: Job) -> None:
        name, far = job.run.name, how_far(job)
        if name not in self.bars:
            taken = [-bar.pos for bar in self.bars.values()]
            row = min(row for row in range(1, len(taken) + 2) if row not in taken)
            width = max(20, shutil.get_terminal_size().columns // 2)
            form = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bars[name] = self.new_bar(row, far.total, form, f"  {name[-width:]}")
        text = f"loss {far.loss:.4f}" if far.loss is not None else ""
        draw(self.bars[name], far.step, far.total, text)

    def end(self, name: str, job: Job | None) -> None:
        """A run has ended, here or elsewhere; job: here."""
        self.ended += 1
        steps = self.steps.pop(name, None)
        if job:
            total = how_far(job).total or steps or self.usual_steps()
            self.last_total = total
            self.steps_done += max(0, total - job.first_step)
            self.seconds_spent += job.seconds
        if name in self.bars:
            self.bars.pop(name).close()

    def left(self) -> float | None:
        """Seconds until the last run of the sweep ends; None where nothing tells it yet.

        A step costs what it has cost in the runs that ended here, with their begin and end, or in those at work before
        one has ended.
        """
        begun = [how_far(job) for job in self.jobs]
        done, spent = self.steps_done, self.seconds_spent
        if not done:
            done = sum(far.here for far in begun)
            spent = sum(far.seconds for far in begun)
        if not done:
            return None
        price = spent / done
        usual = self.usual_steps()
        names = [job.run.name for job in self.jobs]
        waiting = []
        for name, steps in self.steps.items():
            if name not in names:
                waiting.append(steps or usual)
        unknown = max(0, self.total - self.ended - len(names) - len(waiting))  # of a search
        rests = [self.rest(job, far, price) for job, far in zip(self.jobs, begun, strict=True)]
        shared = sum(rests) + price * (sum(waiting) + unknown * usual)
        # The last to end may be one that has no other beside it.
        return max([shared / self.at_a_time, *rests])

    def rest(self, job: Job, far: HowFar, price: float) -> float:
        """Seconds that a run at work has left, by the price of a step or its own pace, whichever is longer."""
        total = far.total or self.steps.get(job.run.name) or self.usual_steps()
        todo = max(0, total - far.step)
        rest = max(0.0, (far.here + todo) * price - far.seconds)
        if far.here > todo / 3:  # before, its pace is that of getting ready
            rest = max(rest, todo * far.seconds / far.here)
        return rest

    def usual_steps(self) -> float:
        """Steps of a run that nothing is known of."""
        known = [*self.steps.values(), *(how_far(job).total for job in self.jobs)]
        known = [steps for steps in known if steps]
        return fmean(known) if known else self.last_total

    def say(self, line: str) -> None:
        """A line above the bars."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        for bar in [*self.bars.values(), self.bar]:
            bar.close()


def draw(bar: tqdm, done: int, total: int | None, text: str) -> None:
    bar.n, bar.total = done, total
    bar.set_postfix_str(text, refresh=False)
    bar.refresh()


def how_far(job: Job) -> HowFar:
    records = job.records.records
    step = records[-1].get("step", 0) if records else 0
    total = getattr(job.run.cfg, "max_steps", None)
    if not total:  # such as one that is trained for some epochs
        total = job.total = job.total or total_steps(job.run.folder / "train.log")
    seconds = time.perf_counter() - job.began
    return HowFar(step, max(0, step - job.first_step), total, newest_loss(records), seconds)


def newest_loss(records: list[dict]) -> float | None:
    for record in reversed(records):
        for name in LOSSES:
            if isinstance(record.get(name), float):
                return record[name]
    return None


def total_steps(log: Path) -> int | None:
    """What a train.log counts its steps up to, by its last lines."""
    with contextlib.suppress(OSError):
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4_096))
            counts = re.findall(rb"^step +\d+/(\d+) ", file.read(), re.MULTILINE)
        return int(counts[-1]) if counts else None
    return None
