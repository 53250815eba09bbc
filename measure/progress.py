"""How far a sweep is: a line for each run that ends, on a terminal bars of those at work, and the time that is left."""

import contextlib
import re
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tqdm import tqdm

from common.telling import AGAIN_S, RARER
from sources.jobs import Job

LOSSES = ("loss", "loss/ema", "val_loss", "val_xe", "val_nll")  # what is shown of a run, whichever comes first
SHOW_SECONDS = 0.5


class HowFar(NamedTuple):
    """Of a run here: the step it is at, steps done, in all where known, seconds of a step where known, seconds."""

    step: int
    here: int
    total: int | None
    pace: float | None
    seconds: float


class Progress:
    """Bars where stderr is a terminal; else the same numbers for the lines of runs that end.

    Args:
        source: of runs, as sources.runs.Grid is. at_a_time: how many of them are at work at once.
    """

    def __init__(self, source: Any, at_a_time: int):
        self.total, self.at_a_time = source.total, at_a_time
        self.before = self.ended = source.count_ended()
        self.steps = source.steps()  # {name of a run that has not ended: its steps, None where nobody knows}
        self.costs: list[HowFar] = []  # of the runs that ended here
        self.jobs: list[Job] = []
        self.shown = 0.0
        self.began = self.told = time.perf_counter()  # of the sweep, and of its last line
        self.is_terminal = sys.stderr.isatty()
        self.bars: dict[str, tqdm] = {}  # by name of a run
        self.bar = self.new_bar(0, self.total, "{n_fmt}/{total_fmt} runs |{bar}| {elapsed}{postfix}")

    def new_bar(self, row: int, total: int | None, form: str, name: str = "") -> tqdm:
        return tqdm(total=total, desc=name, position=row, bar_format=form, disable=not self.is_terminal, leave=False,
                    dynamic_ncols=True)

    def show(self, jobs: list[Job]) -> None:
        """Draw the bars of the runs at work, twice a second; where nobody watches, tell of them ever more rarely."""
        self.jobs = jobs
        now = time.perf_counter()
        if not self.is_terminal:
            if jobs and now > self.told + max(AGAIN_S, RARER * (now - self.began)):
                self.tell(jobs[0])
            return
        if now < self.shown + SHOW_SECONDS:
            return
        self.shown = now
        for job in jobs:
            self.show_run(job)
        left = self.left()
        text = f"{tqdm.format_interval(left)} left" if left is not None else ""
        draw(self.bar, self.ended, self.total, text)

    def tell(self, job: Job) -> None:
        """A line of the run that began first among those at work, and of the time that is left for all."""
        far, left = how_far(job), self.left()
        text = f"step {far.step:,}" if far.step else "getting ready"
        if far.step and far.total:
            text += f" of {far.total:,}"
        if left is not None:
            text += f" | {tqdm.format_interval(left)} left"
        self.say(f"[{self.ended}/{self.total}] {job.run.name}: {text}")

    def show_run(self, job: Job) -> None:
        name, far = job.run.name, how_far(job)
        if name not in self.bars:
            taken = [-bar.pos for bar in self.bars.values()]
            row = min(row for row in range(1, len(taken) + 2) if row not in taken)
            width = max(20, shutil.get_terminal_size().columns // 2)
            form = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
            self.bars[name] = self.new_bar(row, far.total, form, f"  {name[-width:]}")
        loss = newest_loss(job.records.records)
        text = f"loss {loss:.4f}" if loss is not None else ""
        draw(self.bars[name], far.step, far.total, text)

    def end(self, name: str, text: str, job: Job | None, ended: int, is_going_on: bool) -> None:
        """Tell of a run that has ended, here or elsewhere.

        text: what came of it. job: here. ended: how many have, with it. is_going_on: whether others follow.
        """
        self.ended = ended
        self.steps.pop(name, None)
        text = f"[{ended}/{self.total}] {name}: {text}"
        if job:
            self.costs.append(how_far(job)._replace(seconds=job.seconds))
            text += f" | {job.seconds:.0f} s"
        if name in self.bars:
            self.bars.pop(name).close()
        left = self.left()
        if left and left >= 1 and is_going_on:
            text += f" | {tqdm.format_interval(left)} left"
        self.say(text)

    def left(self) -> float | None:
        """Seconds until the last run of the sweep ends; None where nothing tells it yet."""
        working = [how_far(job) for job in self.jobs]
        names = [job.run.name for job in self.jobs]
        costs = self.costs
        if not costs:
            costs = [projected(far) for far in working if far.pace and far.total]
        if not costs:
            return None
        waiting = []
        for name, steps in self.steps.items():
            if name not in names:
                waiting.append(expected(costs, steps))
        unknown = max(0, self.total - self.ended - len(working) - len(waiting))  # of a search
        later = sum(waiting) + unknown * expected(costs, None)
        here = len(self.costs)
        if here:  # others may be at work on them too, and have a share as they had so far
            later *= here / max(here, self.ended - self.before)
        rests = []
        for far in working:
            seconds = expected(costs, far.total)
            rests.append(rest(far, seconds))
        # The last to end may be one that has no other beside it.
        return max([(sum(rests) + later) / self.at_a_time, *rests])

    def say(self, line: str) -> None:
        """A line above the bars."""
        self.told = time.perf_counter()
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        for bar in [*self.bars.values(), self.bar]:
            bar.close()


def expected(costs: list[HowFar], steps: int | None) -> float:
    """Seconds of a run of so many steps, by those that ended: what a run takes beside its steps, and the steps.

    A run of unknown length takes as long as the others.
    """
    known = [far for far in costs if far.pace]
    if not steps or not known:
        return fmean(far.seconds for far in costs)
    stepping = sum(far.here * far.pace for far in known)
    done = sum(far.here for far in known)
    seconds = sum(far.seconds for far in known)
    beside = (seconds - stepping) / len(known)  # to get ready, and to end
    return max(0.0, beside) + steps * stepping / done


def projected(far: HowFar) -> HowFar:
    """A run at work as it will have ended, if its end takes no time beside its steps."""
    todo = max(0, far.total - far.step)
    return far._replace(here=far.here + todo, seconds=far.seconds + todo * far.pace)


def rest(far: HowFar, seconds: float) -> float:
    """Seconds that a run at work has left, where such a run is expected to take so many in all, or by its own pace."""
    if not far.total:
        return max(0.0, seconds - far.seconds)
    done_before = far.step - far.here
    share = 1 - done_before / far.total  # of a run that goes on
    todo = max(0, far.total - far.step)
    own = todo * (far.pace or 0.0)
    return max(0.0, share * seconds - far.seconds, own)


def draw(bar: tqdm, done: int, total: int | None, text: str) -> None:
    bar.n, bar.total = done, total
    bar.set_postfix_str(text, refresh=False)
    bar.refresh()


def how_far(job: Job) -> HowFar:
    records = job.records.records
    step = records[-1]["step"] if records else 0
    total = getattr(job.run.cfg, "max_steps", None)
    if not total:  # such as one that is trained for some epochs
        total = job.total = job.total or total_steps(job.run.folder / "train.log")
    seconds = time.perf_counter() - job.began
    return HowFar(step, max(0, step - job.first_step), total, pace(records, job.first_step), seconds)


def pace(records: list[dict], first_step: int) -> float | None:
    """Seconds of a step, between the first record after first_step and the last; None before there are two."""
    timed = [record for record in records if record["step"] > first_step and record.get("time_s") is not None]
    if not timed:
        return None
    first, last = timed[0], timed[-1]
    steps = last["step"] - first["step"]
    seconds = last["time_s"] - first["time_s"]
    return seconds / steps if steps > 0 and seconds > 0 else None


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
