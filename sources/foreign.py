"""What the settings of the source systems mean: a table for each of their dialects, by our names of settings.

A command line or file of a source names some settings and leaves the rest to the source's defaults. A page takes those
where it recognises the source (configurator.configure). Names that differ from ours are the ALIASES of
sources/foreign_EXPERIMENT.py, and so are the functions for what no table can say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sources import foreign_ghmm

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
            fields: {our setting that somebody set, or dotted key that is READ: by which file, or "command line"}.
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
# Networks, processes and loops by the names that the source gives them. What is not built here has an empty table:
# sources/foreign_ghmm.py refuses it by name.
GRU = {"model": "gru", "one_hot": True, "n_layers": 4, "d_model": 64}
HOOKED = {  # a HookedTransformer of transformer-lens
    "model": "transformer",
    "n_layers": 2,
    "d_model": 64,
    "d_head": 32,
    "d_mlp": 256,
    "act": "gelu",
    "normalization": "LN",
    "positional": "learned",
    "cfg": {"n_heads": 2, "n_ctx": 6},
}
PLAIN = {  # without normalization
    "model": "transformer",
    "n_layers": 1,
    "n_heads": 4,
    "d_model": 128,
    "d_head": None,
    "d_mlp": 512,
    "act": "relu",
    "normalization": "none",
    "positional": "learned",
    "cfg": {"n_ctx": 16},
}
GHMM_MODELS = {
    "gru_rnn": GRU,
    "rnn": GRU,
    "small_rnn": GRU | {"n_layers": 2, "d_model": 16},
    "transformer_lens_2L2H": HOOKED,
    "tiny_transformer": HOOKED
    | {"n_layers": 1, "d_model": 1, "d_head": 1, "d_mlp": 1, "act": "relu", "cfg": {"n_heads": 1, "n_ctx": 128}},
    "pytorch_transformer": PLAIN,
    "transformer": {},
    "small_transformer": {},
    "medium_transformer": {},
    "gruformer": {},
}
MR_NAMES = {
    "process_names": ["mr_name", "mr_name"],
    "process_kwargs": [{"p": 0.4, "q": 0.25}, {"p": 0.4, "q": 0.25}],
    "process_weights": [0.5, 0.5],
    "vocab_maps": [[0, 1, 2, 3], [0, 1, 2, 4]],
    "bos_token": "???",
}
GHMM_PROCESSES = {
    "mess3": {"process": "mess3", "x": 0.15, "a": 0.6},
    "mess3_085": {"process": "mess3", "x": 0.05, "a": 0.85, "bos_token": "???"},
    "even_ones": {"process": "even_ones", "p": 0.5},
    "no_consecutive_ones": {"process": "no_consecutive_ones", "p": 0.5},
    "zero_one_random": {"process": "zero_one_random", "p": 0.5},
    "rrxor": {"process": "rrxor", "pR1": 0.5, "pR2": 0.5},
    "days_of_week": {"process": "days_of_week"},
    "tom_quantum": {"process": "tom_quantum", "alpha": 1.0, "beta": 1.0},
    "fanizza": {"process": "fanizza", "alpha": 2000.0, "lamb": 0.49},
    "post_quantum": {"process": "post_quantum", "log_alpha": 1.0, "beta": 0.5},
    "dursley_wonka": MR_NAMES,
    "wonka_dursley": MR_NAMES,
    "rpn_arithmetic": {},
    "binary_tree_arithmetic": {},
    "single_addition": {},
    "product_mess3x2": {},
    "product_mess3_zero_one": {},
    "product_mess3_tom_quantum": {},
    "product_even_ones_rrxor": {},
}
ADAM = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0}
GHMM_OPTIMIZERS = {"adam": ADAM, "pytorch": ADAM, "pytorch_adam": ADAM, "adamw": ADAM | {"weight_decay": 1e-4}}


def _loop(sequence_len: int, batch_size: int, num_steps: int, log: int, validate: int, checkpoint: int | None) -> dict:
    """A file of configs/training: all of them train with Adam; intervals in steps."""
    return ADAM | {
        "sequence_len": sequence_len,
        "batch_size": batch_size,
        "num_steps": num_steps,
        "log_every": log,
        "validate_every": validate,
        "checkpoint_every": checkpoint,
    }


GHMM_LOOPS = {
    "small": _loop(8, 4, 10, 1, 2, 5),
    "medium": _loop(64, 128, 10_000, 100, 1_000, 5_000),
    "large": _loop(100, 512, 1_000_000, 100, 1_000, 100_000),
    "test": _loop(16, 64, 100, 10, 50, None),
    "phase_change": _loop(100, 512, 120, 1, 1, -1),
    "transformerlens": _loop(6, 32, 100, 10, 20, 50),
    # Of the newest layout, whose loop evaluates instead of validating.
    "minimal": _loop(2, 1, 10, 1, 2, 5) | {"evaluate_every": 2},
    "full": _loop(65, 64, 100_000, 10, 100, 20_000) | {"evaluate_every": 100},
}
GHMM_FILES = {  # of --config-name
    "train_model": {},
    "experiment": GHMM_LOOPS["medium"],
    "train_rnn": MR_NAMES | GHMM_MODELS["small_rnn"] | _loop(100, 512, 1_000, 1, 10, None),
    "transformerlens_mess3": GHMM_PROCESSES["mess3_085"] | HOOKED | GHMM_LOOPS["transformerlens"] | {"seed": 42},
}
SIMPLEXITY_PARTS = ("training_data_generator", "generative_process", "predictive_model", "training", "train",
                    "persistence", "persister", "logging", "evaluation", "validation", "mlflow")  # fmt: skip
NOWHERE = {}  # where and how a run is kept or judged changes nothing of it
SIMPLEXITY = (
    Dialect(
        name="simplexity",
        title="Simplexity (configs/train_model.yaml: mess3, a GRU, Adam)",
        commit="82425771604f30fd2c5f215fe2a229df2462f745",
        marks=(*(f"{part}." for part in SIMPLEXITY_PARTS), "optimizer.instance.", "validation_data_generator."),
        defaults=GRU | {
            "process": "mess3", "x": 0.15, "a": 0.6, "n_ctx": 7, "batch_size": 4, "seed": 0, "max_steps": 10,
            "lr": 1e-3, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999,
            "grad_clip": 0.0, "log_interval": 1, "eval_interval": 2, "save_interval": 5, "keep_last": -1,
            "precision": "fp32",
        },
        groups={
            "training_data_generator": GHMM_PROCESSES,
            "generative_process": GHMM_PROCESSES,
            "generative_process@training_data_generator": GHMM_PROCESSES,
            "predictive_model": GHMM_MODELS,
            "training": GHMM_LOOPS,
            "train": GHMM_LOOPS,
            "optimizer": GHMM_OPTIMIZERS,
            "training/optimizer": GHMM_OPTIMIZERS,
            "train/optimizer": GHMM_OPTIMIZERS,
            "config_name": GHMM_FILES,
            "logging": dict.fromkeys(
                ("mlflow_logger", "local_mlflow_logger", "print_logger", "file_logger"), NOWHERE
            ),
            **dict.fromkeys(
                ("persistence", "persister"),
                dict.fromkeys(
                    ("local", "s3", "local_persister", "local_equinox_persister", "local_penzai_persister",
                     "local_pytorch_persister", "s3_persister", "s3_eqx_persister", "mlflow_persister"), NOWHERE
                ),
            ),
        },
        speaks=foreign_ghmm.speaks,
        complete=foreign_ghmm.complete,
    ),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# ICL-non-ergodic-arxiv (train_arxiv.py)
# ---------------------------------------------------------------------------------------------------------------
ICL = ()
