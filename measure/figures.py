"""Figures of a run, in one style: a context manager that yields axes and saves folder/plots/name.png."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def figure(folder: Path, name: str, width: float = 7.0, height: float = 4.5, rows: int = 1, columns: int = 1,
           title: str = "", **subplots) -> Iterator:
    """Yield the axes of a new figure (an array of them where there are several) and save it as folder/plots/name.png.

    Nothing is written if the body raises. Sizes in inches; subplots: further options, such as width_ratios or sharex.
    """
    from matplotlib.figure import Figure  # slow to import, and needed at the end of a run only

    drawn = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = drawn.subplots(rows, columns, **subplots)
    if title:
        drawn.suptitle(title, fontsize=10, wrap=True)
    yield axes
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    drawn.savefig(folder / "plots" / f"{name}.png")
