"""What the settings of the source systems mean: a table for each of their dialects, by our names of settings.

A command line or file of a source names some settings and leaves the rest to the source's defaults. A page takes those
where it recognises the source (configurator.configure). Names that differ from ours are the ALIASES of
sources/foreign_EXPERIMENT.py, and so are the functions for what no table can say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sources import foreign_apelr, foreign_arxiv, foreign_ghmm, foreign_state_settings
from sources.foreign_apelr import V1, V2

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
    refusal: Callable[[dict[str, Any]], str] | None = None  # of {dotted key: value as written}: why they cannot be read

    def is_spoken(self, given: dict[str, Any]) -> bool:
        """Whether settings {dotted key: value as written} are of this source."""
        beginnings = tuple(mark for mark in self.marks if mark.endswith("."))
        for key in given:
            if key in self.marks or key.startswith(beginnings):
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
        if str(values.get("device")).startswith("cuda") and not asked and not torch.cuda.is_available():
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
)
APELR = (APELR_NEWEST, APELR_EARLY)  # what both could have written is of the newest

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
    defaults=_STATE_DEFAULTS | {"matmul_precision": "medium"},  # its command sets it, whatever the device
    groups={"model": _STATE_MODELS, "training": {"default": {}}, "data": {"perturbation": {}}},
    complete=foreign_state_settings.complete_state,
    refusal=foreign_state_settings.refusal,
)  # fmt: skip
_SMOLSTATE = Dialect(
    name="smolstate",
    title="SmolState",
    commit="005d485168e79cce132cf730b3efb41418163467",
    speaks=foreign_state_settings.is_of_smolstate,
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
    refusal=foreign_state_settings.refusal,
)  # fmt: skip
STATE = (_STATE, _SMOLSTATE)

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
SIMPLEXITY_PARTS = ("training_data_generator", "generative_process", "predictive_model", "persistence", "persister",
                    "logging", "evaluation", "validation", "mlflow")  # fmt: skip
NOWHERE = {}  # where and how a run is kept or judged changes nothing of it
SIMPLEXITY = (
    Dialect(
        name="simplexity",
        title="Simplexity (configs/train_model.yaml: mess3, a GRU, Adam)",
        commit="82425771604f30fd2c5f215fe2a229df2462f745",
        marks=(*(f"{part}." for part in SIMPLEXITY_PARTS), "optimizer.instance.", "validation_data_generator.",
               "training.optimizer.", "train.optimizer."),
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
        "final_split": "validation",
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
)
ICL_EARLY = Dialect(
    name="icl_early",
    title="ICL-non-ergodic-arxiv, its earlier train.py",
    commit="093404ae2a0c7c6b98f31483ba0afa654c0a11ac",
    marks=foreign_arxiv.EARLY,
    defaults={"batch_size": 8, "lr": 5e-5, "warmup_steps": 0, "weight_decay": 0.01, "epochs": 3, "seed": 42},
    complete=foreign_arxiv.earlier,
)
ICL = (ICL_NEWEST, ICL_EARLY)
