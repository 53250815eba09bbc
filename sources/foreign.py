"""What the settings of the source systems mean: a table for each of their dialects, by our names of settings.

A command line or file of a source names some settings and leaves the rest to the source's defaults. A page takes those
where it recognises the source (configurator.configure). Names that differ from ours are the ALIASES of
sources/foreign_EXPERIMENT.py, and so are the functions for what no table can say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sources import foreign_apelr
from sources.foreign_apelr import V1, V2

Complete = Callable[[dict[str, Any], dict[str, Any], dict[str, str]], dict[str, Any]]


def is_among(key: str, marks: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of the marks, or begins with one that ends in a dot."""
    return key in marks or key.startswith(tuple(mark for mark in marks if mark.endswith(".")))


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
    reads: tuple[str, ...] = ()  # keys without an alias of their own that `complete` makes something of, as marks are

    def is_spoken(self, given: dict[str, Any]) -> bool:
        """Whether settings {dotted key: value as written} are of this source."""
        return any(is_among(key, self.marks) for key in given) or bool(self.speaks and self.speaks(given))

    def makes_use_of(self, key: str) -> bool:
        """Whether a dotted key that no alias names is more than accepted."""
        return is_among(key, self.reads)

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
APELR_DEFAULTS = {
    # Of model.*, the defaults of its model classes where its training wants a value.
    "compat": "source",
    "version": V2,
    "backbone": "gru",
    "n_layers": 2,
    "d_model": 768,
    "n_heads": 8,
    "dropout": 0.1,
    "token_dim": 256,
    "num_plan_states": 8,
    "chunk_size": 16,
    "fusion_dim": 512,
    "planner_context_scale": 1.0,
    "planner_self_bias": None,  # 1.5 of version 1, 1.8 of version 2, as ours
    "planner_temperature": 1.0,
    "token_filtering": True,
    "future_horizon_chunks": 2,
    "lookahead_horizon": 2,
    "lookahead_feedback_scale": None,  # 0.25 with compat=source
    "plan_commitment": "soft",
    "commitment_warmup_steps": 0,
    "commitment_ramp_steps": 0,
    "commitment_max_hard_fraction": 1.0,
    # Of train.*; seq_len, lr and max_steps have none.
    "batch_size": 1,
    "cpu_batch_size": 1,
    "batch_size_min": 1,
    "batch_size_cap": 1_024,
    "batch_size_safety": 0.85,
    "grad_accum": 1,
    "schedule": "constant",
    "warmup_steps": 0,
    "min_lr": None,  # a tenth of lr, as ours
    "weight_decay": 0.01,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "log_interval": 20,
    "eval_interval": 200,
    "eval_batches": 20,
    "aux_token_fraction": 1.0,
    "save_interval": 0,
    "preview_prompt": "Once upon a time",
    "preview_tokens": 120,
    "entropy_reg_weight": 0.0,
    "usage_balance_weight": 0.0,
    "chunk_bow_weight": 0.0,
    "chunk_bow_warmup_steps": 0,
    "plan_mi_weight": 0.0,
    "chunk_post_kl_weight": 0.0,
    "loss_weights": {},
    "compile": "false",
    "seed": 42,
}
APELR_MARKS = ("tokenizer.", "data.source", "data.max_train_examples", "model.hidden_dim", "model.num_layers",
               "train.lr_schedule", "train.val_batches", "train.grad_accum_steps")  # fmt: skip
APELR_NEWEST = Dialect(
    name="apelr",
    title="APEL-R, newest commit",
    commit="284801eb5e08b46d5af565c9e91b551ae836305a",
    marks=APELR_MARKS,
    defaults=APELR_DEFAULTS,
    speaks=foreign_apelr.has_its_sections,
    complete=foreign_apelr.complete,
    reads=foreign_apelr.READS,
)
# Its version 2 knows neither lookahead nor what a chunk learned from its tokens, and samples no share of a plan.
APELR_EARLY = Dialect(
    name="apelr_early",
    title="APEL-R, commit before February 15",
    commit="9cebc4175274dab3ddaa1e217c45ce51a71c7191",
    marks=APELR_MARKS,
    defaults=APELR_DEFAULTS | {"version": V1},
    speaks=foreign_apelr.has_its_sections,
    complete=foreign_apelr.complete_early,
    reads=foreign_apelr.READS,
)
APELR = (APELR_NEWEST, APELR_EARLY)  # what both could have written is of the newest

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
