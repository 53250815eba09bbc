"""What the settings of the source systems mean: a table for each of their dialects, by our names of settings.

A command line or file of a source names some settings and leaves the rest to the source's defaults. A page takes those
where it recognises the source (configurator.configure). Names that differ from ours are the ALIASES of
sources/foreign_EXPERIMENT.py, and so are the functions for what no table can say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sources import foreign_state_settings

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
    reads: tuple[str, ...] = ()  # last parts of keys without a field that `complete` reads: they have an effect
    refusal: Callable[[dict[str, Any]], str] | None = None  # of {dotted key: value as written}: why they cannot be read

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
def _state_model(cells: int, width: int, layers: int, heads: int, head: int, mlp: int, deep: int, **more) -> dict:
    """A file of State's configs/model, by the names there: set of cells, widths, blocks, MLP layers of the encoders."""
    return {
        "cell_set_len": cells,
        "hidden_dim": width,
        "n_encoder_layers": deep,
        "n_decoder_layers": deep,
        "transformer_backbone_key": "llama",
        "bidirectional_attention": True,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head,
        "intermediate_size": mlp,
        "attention_dropout": 0.0,
    } | more


_SMALL = {"use_basal_projection": False, "gene_decoder_bool": False}
_LORA = {"lora.dropout": 0.05}  # which the files have that have the table
_STATE_MODELS = {  # model=NAME
    "state": _state_model(512, 768, 8, 12, 64, 3_072, 1, **_LORA),
    "state_sm": _state_model(128, 672, 4, 8, 84, 2_688, 4, **_SMALL, **_LORA),
    "state_lg": _state_model(512, 1_488, 6, 12, 124, 5_952, 4, use_basal_projection=False, **_LORA),
    "tahoe_llama_212693232": _state_model(512, 1_488, 6, 12, 124, 5_952, 4, use_basal_projection=False),
    "tahoe_llama_62089464": _state_model(512, 696, 8, 12, 58, 2_784, 4),
    "tahoe_llama_58562784": _state_model(512, 1_104, 4, 12, 92, 4_416, 4, decoder_hidden_dims=[1_024, 2_048, 2_048]),
    "tahoe_best": _state_model(512, 1_440, 4, 12, 120, 4_416, 4),
    "replogle_llama_21712320": _state_model(64, 672, 4, 12, 56, 2_688, 4),
    "replogle_llama_best": _state_model(64, 672, 4, 8, 84, 2_688, 4),
    "pertsets": {"cell_set_len": 512, "hidden_dim": 328, "n_encoder_layers": 4, "n_decoder_layers": 4, "n_layer": 8,
                 "n_head": 8, "transformer_backbone_key": "GPT2", "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                 "attn_pdrop": 0.0, "use_basal_projection": False},
}  # fmt: skip
# configs/config.yaml with data=perturbation, model=state, training=default, and what the code adds to them.
_STATE_DEFAULTS = {
    "out_dir": "debugging/debug",
    "toml_config_path": None,
    "strict": False,
    "pert_col": "gene",
    "cell_type_key": "cell_type",
    "batch_col": "gem_group",
    "control_pert": "DMSO_TF",
    "embed_key": None,
    "output_space": "all",
    "zeroshot_controls": True,
    "val_fraction": 0.0,  # all that is not held out trains
    "cell_set_len": 512,
    "n_layers": 8,
    "d_model": 768,
    "n_heads": 12,
    "n_kv_heads": 12,
    "d_head": 64,
    "d_mlp": 3_072,
    "n_encoder_layers": 1,
    "n_decoder_layers": 1,
    "compat_relu": True,
    "optimizer": "adam",
    "batch_size": 16,
    "lr": 1e-4,
    "schedule": "constant",
    "warmup_steps": 0,
    "max_steps": 400_000,
    "eval_interval": 2_000,
    "log_interval": 50,
    "save_interval": 2_000,
    "eval_sentences": 1_000_000,  # all
    "precision": "fp32",
    "wandb_project": "state",
}
_STATE = Dialect(
    name="state",
    title="State (arc-state 0.11.1)",
    commit="arc-state 0.11.1 of PyPI",
    speaks=foreign_state_settings.is_of_state,
    defaults=_STATE_DEFAULTS,
    groups={"model": _STATE_MODELS, "training": {"default": {}}, "data": {"perturbation": {}}},
    complete=foreign_state_settings.complete_state,
    reads=foreign_state_settings.READS,
    refusal=foreign_state_settings.refusal,
)  # fmt: skip
_SMOLSTATE = Dialect(
    name="smolstate",
    title="SmolState",
    commit="005d485168e79cce132cf730b3efb41418163467",
    marks=foreign_state_settings.SMOLSTATE_MARKS,
    defaults=_STATE_DEFAULTS | {
        "out_dir": "out/smolstate_run",
        "toml_config_path": "starter.toml",
        "pert_col": "target_gene",
        "batch_col": "batch_var",
        "control_pert": "non-targeting",
        "output_space": "gene",
        "zeroshot_controls": False,
        "cell_set_len": 256,
        "n_layers": 6,
        "d_model": 672,
        "d_head": 84,
        "d_mlp": 2_688,
        "n_encoder_layers": 4,
        "n_decoder_layers": 4,
        "pert_norm": True,
        "confidence_per_set": False,
        "confidence_weight": 0.1,
        "optimizer": "adamw",
        "batch_size": 8,
        "schedule": "cosine",
        "max_steps": 10_000,
        "log_interval": 100,
        "wandb_project": "smolstate",
    } | _SMALL,
    groups={
        "model": _STATE_MODELS | {"state_sm": _state_model(256, 672, 6, 12, 84, 2_688, 4, **_SMALL),
                                  "state_sm_128": _state_model(128, 672, 6, 12, 84, 2_688, 4, **_SMALL)},
        "training": {"default": {}, "state_default": {"batch_size": 16, "max_steps": 40_000}},
        "data": {"perturbation": {}},
    },
    complete=foreign_state_settings.complete_smolstate,
    reads=foreign_state_settings.READS,
    refusal=foreign_state_settings.refusal,
)  # fmt: skip
STATE = (_STATE, _SMOLSTATE)

# ---------------------------------------------------------------------------------------------------------------
# Simplexity (train_ghmm.py)
# ---------------------------------------------------------------------------------------------------------------
SIMPLEXITY = ()

# ---------------------------------------------------------------------------------------------------------------
# ICL-non-ergodic-arxiv (train_arxiv.py)
# ---------------------------------------------------------------------------------------------------------------
ICL = ()
