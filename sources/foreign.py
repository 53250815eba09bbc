"""What the settings of the source systems mean: a table for each of their dialects, by our names of settings.

A command line or file of a source names some settings and leaves the rest to the source's defaults. A page takes those
where it recognises the source (configurator.configure). Names that differ from ours are the ALIASES of
sources/foreign_EXPERIMENT.py, and so are the functions for what no table can say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Complete = Callable[[dict[str, Any], dict[str, Any], dict[str, str]], dict[str, Any]]


@dataclass(frozen=True)
class Dialect:
    """The settings of one source system, at one commit."""

    name: str  # of --dialect
    title: str  # how a run says it
    commit: str  # of the source that the defaults are of
    marks: tuple[str, ...] = ()  # dotted keys that only this source has, or beginnings of such, which end in a dot
    defaults: dict[str, Any] = field(default_factory=dict)  # our setting: what the source has where it is absent
    groups: dict[str, dict[str, dict]] = field(default_factory=dict)  # Hydra's group=NAME: settings, by its own names
    speaks: Callable[[dict[str, Any]], bool] | None = None  # of {dotted key: value as written}, beyond the marks
    complete: Complete | None = None  # see completed

    def is_spoken(self, given: dict[str, Any]) -> bool:
        """Whether settings {dotted key: value as written} are of this source."""
        for key in given:
            beginnings = (mark for mark in self.marks if mark.endswith("."))
            if key in self.marks or key.startswith(tuple(beginnings)):
                return True
        return bool(self.speaks and self.speaks(given))

    def completed(self, given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
        """More settings, once all that was given is known: {our setting: value}.

        Args:
            given: {dotted key of the source: value as written}, of files, groups and the command line.
            values: {our setting: value}.
            fields: {our setting that somebody set: by which file, or "command line"}.
        Raises ValueError, whose text is the error to tell, for what cannot be what it was there.
        """
        more = self.complete(given, values, fields) if self.complete else {}
        # A file that asks for CUDA was written for another machine; a command line means this one.
        asked = fields.get("device", "command line") == "command line"
        if values.get("device") == "cuda" and not asked and not torch.cuda.is_available():
            more["device"] = "auto"
        return more


# ---------------------------------------------------------------------------------------------------------------
# APEL-R (train_apelr.py)
# ---------------------------------------------------------------------------------------------------------------
APELR = ()

# ---------------------------------------------------------------------------------------------------------------
# Arc State, SmolState (train_state.py)
# ---------------------------------------------------------------------------------------------------------------
STATE = ()

# ---------------------------------------------------------------------------------------------------------------
# Simplexity (train_ghmm.py)
# ---------------------------------------------------------------------------------------------------------------
SIMPLEXITY = ()

# ---------------------------------------------------------------------------------------------------------------
# ICL-non-ergodic-arxiv (train_arxiv.py)
# ---------------------------------------------------------------------------------------------------------------
ICL = ()
