"""What the settings of the source systems mean: a table for each of their dialects, by our names of settings.

A command line or file of a source names some settings and leaves the rest to the source's defaults. A page takes those
where it recognises the source (configurator.configure). Names that differ from ours are the ALIASES of
sources/foreign_EXPERIMENT.py, and so are the functions for what no table can say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sources import foreign_arxiv

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
    reads: tuple[str, ...] = ()  # keys, their last parts or their beginnings that `complete` makes something of

    def is_spoken(self, given: dict[str, Any]) -> bool:
        """Whether settings {dotted key: value as written} are of this source."""
        for key in given:
            beginnings = (mark for mark in self.marks if mark.endswith("."))
            if key in self.marks or key.startswith(tuple(beginnings)):
                return True
        return bool(self.speaks and self.speaks(given))

    def makes_use_of(self, key: str) -> bool:
        """Whether a dotted key has an effect though its alias is None."""
        plain = key.replace("-", "_")
        beginnings = tuple(name for name in self.reads if name.endswith("."))
        return plain.startswith(beginnings) or any(f".{plain}".endswith(f".{name}") for name in self.reads)

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
ICL_NEWEST = Dialect(
    name="icl",
    title="ICL-non-ergodic-arxiv",
    commit="4a47ff0403556cbe8002591b4c462ef3c6bea4d2",
    marks=foreign_arxiv.MARKS,
    defaults={  # of configs/, as src/main_hydra_app.py uses them
        "data": foreign_arxiv.CHUNKS,
        "categories": ["cs.DS"],
        "choice": "first",
        "allow_short": True,
        "n_layers": 2,
        "d_model": 128,
        "n_heads": 2,
        "d_mlp": 512,
        "dropout": 0.1,
        "init": "normal",
        "batch_size": 32,  # of a micro-step: 16 of them are a step of 512
        "lr": 5e-4,
        "min_lr": 0.0,
        "schedule": "cosine",
        "schedule_over": "epochs",
        "warmup_steps": 1_000,
        "epochs": 20,
        "weight_decay": 0.1,
        "decay": "all",
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
        "patience": 10,
        "min_delta": 1e-3,
        "log_interval": 100,
        "save_interval": 1_000,
        "eval_chunks": foreign_arxiv.NEVER,  # all
        "seed": 42,
        "precision": "fp32",
    },
    groups={
        "config_name": {"config": {}},
        "dataset": {"default_dataset": {}, "arxiv_custom_filtered": {}},
        "model": {
            "default_model": {"architecture": {"d_model": 128, "n_layers": 2, "n_heads": 2, "d_ff": 512}},
            "micro_decoder": {"architecture": {"d_model": 256, "n_layers": 6, "n_heads": 4, "d_ff": 1_024}},
        },
        "training": {"default_training": {}},
        "optimizer": {"adamw": {}},
        "scheduler": {"cosine_warmup": {}},
        "experiment": foreign_arxiv.experiments(),
    },
    complete=foreign_arxiv.completed,
    reads=foreign_arxiv.READ,
)
ICL_EARLY = Dialect(
    name="icl_early",
    title="ICL-non-ergodic-arxiv, its earlier train.py",
    commit="093404ae2a0c7c6b98f31483ba0afa654c0a11ac",
    marks=foreign_arxiv.EARLY,
    defaults={"batch_size": 8, "lr": 5e-5, "warmup_steps": 0, "weight_decay": 0.01, "epochs": 3, "seed": 42},
    complete=foreign_arxiv.earlier,
    reads=foreign_arxiv.EARLY,
)
ICL = (ICL_NEWEST, ICL_EARLY)
