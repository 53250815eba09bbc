"""Figures of a run, in one style: a context manager that yields axes and saves folder/plots/name.png."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import reason, replacing, system_sentence
from common.telling import note

STRICT = False  # for tests: a picture that cannot be drawn is an error


@contextlib.contextmanager
def figure(folder: Path, name: str, width: float = 7.0, height: float = 4.5, rows: int = 1, columns: int = 1,
           title: str = "", **subplots) -> Iterator:
    """Yield the axes of a new figure (an array of them where there are several) and save it as folder/plots/name.png.

    A picture that cannot be drawn or written is a line on stderr: it ends no run, and nothing is written. Sizes in
    inches; subplots: further options, such as width_ratios or sharex.
    """
    drawn = axes = trouble = None
    try:
        drawn = new_figure(width, height)
        axes = drawn.subplots(rows, columns, **subplots)
        if title:
            drawn.suptitle(title, fontsize=10, wrap=True)
    except Exception as error:
        trouble = error  # said below: the body cannot be left out, and stumbles over its missing axes
    try:
        yield axes
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        with replacing(folder / "plots" / f"{name}.png") as fresh:
            drawn.savefig(fresh)
    except Exception as error:
        if STRICT:
            raise
        trouble = trouble or error
        note(f"the picture {name} was not drawn ({system_sentence(trouble) or reason(trouble)})")


def new_figure(width: float, height: float):
    """A matplotlib figure that no window shows. Imported here: slow, and needed at the end of a run only.

    A notebook hands its MPLBACKEND to the processes it starts. Where that backend is not installed matplotlib cannot be
    imported with it, and pictures that go into files need none.
    """
    first = "matplotlib" not in sys.modules
    asked = os.environ.pop("MPLBACKEND", "") if first else ""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    finally:
        if asked:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with contextlib.suppress(ValueError):  # a notebook that draws by itself keeps its backend
            rcParams["backend"] = asked
    return Figure(figsize=(width, height), layout="constrained", dpi=150)
