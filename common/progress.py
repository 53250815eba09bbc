"""How far a sweep is: a line for each run that ends, on a terminal bars of those at work, and the time that is left."""

import contextlib
import re
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from common.jobs import Job

LOSSES = ("loss", "loss/ema", "val_loss", "val_xe", "val_nll")  # what is shown of a run, whichever comes first
SHOW_SECONDS = 0.5


class Progress:
    """Bars where stderr is a terminal; else the same numbers for the lines of runs that end.

    Args:
        total: runs of the sweep. ended: how many of them ended before. at_a_time: how many are at work at once.
        steps: {name of a run that has not ended: its steps, None where its settings do not tell}.
    """

    def __init__(self, total: int, ended: int, steps: dict[str, int | None], at_a_time: int):
        self.total, self.ended, self.steps, self.at_a_time = total, ended, dict(steps), at_a_time
        self.steps_done, self.seconds_spent, self.shown = 0.0, 0.0, 0.0
        self.jobs: list[Job] = []
        self.bars: dict[str, tqdm] = {}  # by name of a run
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=ended, disable=not self.is_terminal, leave=False, position=0,
                        dynamic_ncols=True, bar_format="{n_fmt}/{total_fmt} runs |{bar}| {elapsed}{postfix}")

    def show(self, jobs: list[Job]) -> None:
        """Draw the bars of the runs at work, twice a second."""
        self.jobs = jobs
        now = time.perf_counter()
        if not self.is_terminal or now < self.shown + SHOW_SECONDS:
            return
        self.shown = now
        for job in jobs:
            step, total, loss = how_far(job)
            if job.run.name not in self.bars:
                rows = {-bar.pos for bar in self.bars.values()}
                row = min(set(range(1, len(jobs) + len(rows) + 1)) - rows)
                width = max(20, shutil.get_terminal_size().columns // 2)
                self.bars[job.run.name] = tqdm(
                    total=total, initial=step, desc="  " + job.run.name[-width:], position=row, leave=False,
                    dynamic_ncols=True, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}")  # fmt: skip
            bar = self.bars[job.run.name]
            bar.n, bar.total = step, total
            bar.set_postfix_str(f"loss {loss:.4f}" if loss is not None else "", refresh=False)
            bar.refresh()
        left = self.left()
        self.bar.set_postfix_str(f"{tqdm.format_interval(left)} left" if left is not None else "", refresh=False)
        self.bar.n, self.bar.total = self.ended, self.total
        self.bar.refresh()

    def end(self, name: str, job: Job | None) -> None:
        """A run has ended, here or elsewhere; job: here."""
        self.ended += 1
        steps = self.steps.pop(name, None)
        if job:
            _, total, _ = how_far(job)
            whole = total or steps or self.usual_steps()
            self.steps_done += max(0, whole - job.first_step)
            self.seconds_spent += job.seconds
        if name in self.bars:
            self.bars.pop(name).close()

    def left(self) -> float | None:
        """Seconds until the last run of the sweep ends; None where nothing tells it yet.

        A step costs what it has cost in the runs that ended here, with their begin and end, or in those at work before
        one has ended. A run at work takes the longer of what it has left by that and by its own pace.
        """
        now, usual, names = time.perf_counter(), self.usual_steps(), set()
        done, spent, begun = self.steps_done, self.seconds_spent, []
        for job in self.jobs:
            step, total, _ = how_far(job)
            whole = total or self.steps.get(job.run.name) or usual
            begun.append((max(0, step - job.first_step), max(0, whole - step), now - job.began))
            names.add(job.run.name)
        if not done:
            done, spent = sum(steps for steps, _, _ in begun), sum(seconds for _, _, seconds in begun)
        if not done:
            return None
        price = spent / done  # seconds of a step
        waiting = [steps or usual for name, steps in self.steps.items() if name not in names]
        unknown = max(0, self.total - self.ended - len(names) - len(waiting))  # of a search
        left = (sum(waiting) + unknown * usual) * price
        longest = 0.0
        for steps, todo, seconds in begun:
            rest = max(0.0, (steps + todo) * price - seconds)
            if 4 * steps > steps + todo:  # before, its pace is that of getting ready
                rest = max(rest, todo * seconds / steps)
            longest = max(longest, rest)
            left += rest
        # Shared among the runs at a time; the last to end may be one that has no other beside it.
        return max(longest, left / self.at_a_time)

    def usual_steps(self) -> float:
        """Steps of a run that nothing is known of."""
        known = [steps for steps in self.steps.values() if steps]
        known += [total for job in self.jobs if (total := how_far(job)[1])]
        return fmean(known) if known else 1.0

    def say(self, line: str) -> None:
        """A line above the bars."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        for bar in [*self.bars.values(), self.bar]:
            bar.close()


def how_far(job: Job) -> tuple[int, int | None, float | None]:
    """(steps done, steps in all where known, newest loss where there is one) of a run at work."""
    records = job.records.records
    step = records[-1].get("step", 0) if records else 0
    total = getattr(job.run.cfg, "max_steps", None)
    if not total:  # such as one that is trained for some epochs
        total = job.total = job.total or total_steps(job.run.folder / "train.log")
    for record in reversed(records):
        for name in LOSSES:
            if isinstance(record.get(name), float):
                return step, total, record[name]
    return step, total, None


def total_steps(log: Path) -> int | None:
    """What a train.log counts its steps up to, by its last lines."""
    with contextlib.suppress(OSError):
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4_096))
            counts = re.findall(rb"^step +\d+/(\d+) ", file.read(), re.MULTILINE)
        return int(counts[-1]) if counts else None
    return None
