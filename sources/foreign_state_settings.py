"""Settings and command lines of arc-state and SmolState: their names, and what no table of defaults can say.

Their tables of defaults are STATE of sources/foreign.py. Here are the names of their settings, what depends on several
of them, what they have and we have not, and the verbs of their commands.
"""

import contextlib
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import store
from common.errors import InputError, regular_file
from common.runlog import read_json
from configurator import READ, note
from sources.foreign_checkpoints import system_of
from sources.given import is_on, value_of

ALIASES: dict[str, str | None] = {  # names of the sources' settings; None: without effect, there or here
    "toml": "toml_config_path",
    "output_dir": "out_dir",
    "data.output_dir": None,
    "hidden_dim": "d_model",
    "num_hidden_layers": "n_layers",
    "n_layer": "n_layers",
    "num_attention_heads": "n_heads",
    "n_head": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_mlp",
    "n_inner": "d_mlp",
    "attn_pdrop": "attention_dropout",
    "resid_pdrop": "residual_dropout",
    "embd_pdrop": "embedding_dropout",
    "cell_sentence_len": "cell_set_len",
    "freeze_pert": "freeze_pert_backbone",
    "decoder_cfg.hidden_dims": "decoder_hidden_dims",
    "decoder_cfg.dropout": "decoder_dropout",
    "lora.enable": "lora",
    "lora.r": "lora_r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.adapt_mlp": "lora_mlp",
    "train_seed": "seed",
    "random_seed": "seed",
    "wd": "weight_decay",
    "gradient_clip_val": "grad_clip",
    "head_dim": "d_head",
    "d_ff": "d_mlp",
    "rms_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "gradient_accumulation_steps": "grad_accum",
    "val_freq": "eval_interval",
    "ckpt_every_n_steps": "save_interval",
    "log_every_n_steps": "log_interval",
    "wandb.entity": "wandb_entity",
    "wandb.project": "wandb_project",
    "entity": "wandb_entity",
    "project": "wandb_project",
    **dict.fromkeys((
        "lora.bias", "lora.target", "lora.task_type", "lora.merge_on_eval", "lora.target_modules",
        "local_wandb_dir", "tags",
        # The backbone's width is d_model and its cells have no positions, whatever these say.
        "hidden_size", "n_embd", "max_position_embeddings", "n_positions", "extra_tokens", "use_cache", "pad_token_id",
        "hidden_dropout", "layer_norm_eps", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rotary_dim",
        "use_rotary_embeddings", "d_inner", "attn_implementation",
        # Read by no line of the model that the sources train.
        "checkpoint", "softplus", "confidence_head", "transformer_decoder", "use_effect_gating_token", "predict_mean",
        "batch_predictor", "batch_predictor_weight", "llm_name", "decoder_loss_weight", "counts_target_sum",
        # Of training and its records.
        "wandb_track", "loss_fn", "strategy", "use_mfu", "mfu_kwargs", "cumulative_flops_use_backward", "wandb_dir",
        "return_adatas", "pred_adata_path", "true_adata_path", "debug", "gene_decoder_lr", "scheduler_type",
        "scheduler_step_size", "scheduler_gamma", "scheduler_T_max", "scheduler_patience", "scheduler_factor",
        "scheduler_monitor", "warmup_epochs",
        # Of how cells are loaded.
        "num_workers", "pin_memory", "pert_rep", "basal_rep", "embed_size", "additional_obs", "store_raw_basal",
        "barcode", "use_consecutive_loading", "val_subsample_fraction", "normalize", "pseudobulk", "load_from_path",
        "sampling_random_state", "split_random_state", "is_log1p", "normalize_counts", "h5_open_kwargs",
        # Sizes and names of the data, which are read anew.
        "input_dim", "output_dim", "pert_dim", "batch_dim", "gene_dim", "hvg_dim", "latent_dim", "n_cell_types",
        "n_perts", "n_batches", "gene_names", "datasets", "training_spec", "zeroshot", "fewshot", "state_path",
        # Read by complete_state and complete_smolstate.
        "downsample", "finetune_vci_decoder", "nb_decoder",
        "log1p_from_raw_counts", "zero_perturbation_encoder", "int_counts", "exp_counts", "drop_last",
        "cache_perturbation_control_pairs",
    )),
    **dict.fromkeys(("name", "overwrite", "use_wandb", "devices"), READ),
}  # fmt: skip
SMOLSTATE_MARKS = ("training_spec.", "state_path")  # keys of SmolState alone, and beginnings of such
STATE_MARKS = (  # of both
    "data.kwargs.", "model.kwargs.", "kwargs.", "training.", "wandb_track", "use_mfu", "train_seed", "val_freq",
    "ckpt_every_n_steps", "gradient_clip_val", "use_wandb", "local_wandb_dir",
)  # fmt: skip
REFUSED = {  # what has no effect with this value alone, or with null, and what to do instead of another
    "downsample": ("1.0", "counts are not thinned here: thin those of the h5ad before"),
    "finetune_vci_decoder": ("false", "the embedding model of State is not here: leave it out"),
    "nb_decoder": ("false", "the decoder here has no negative binomial: leave it out"),
    "log1p_from_raw_counts": ("false", "python prepare_data.py state preprocess takes logarithms"),
    "zero_perturbation_encoder": ("false", "perturbations are always encoded here: leave it out"),
    "int_counts": ("false", "cells are read as they are: leave it out"),
    "exp_counts": ("false", "cells are read as they are: leave it out"),
    "drop_last": ("false", "short sets are filled up here: leave it out"),
    "cache_perturbation_control_pairs": ("false", "control cells are drawn anew in each epoch: leave it out"),
    "lora.bias": ("none", "adapters have no biases here: leave it out"),
    "lora.target": ("auto", "all of attention is adapted, and the MLPs with lora.adapt_mlp=true: leave it out"),
}
OURS = {"state", "pertsets", "neuralot"}  # names of the model that is trained here
BASELINES = {"perturb_mean", "context_mean", "globalsimplesum", "celltypemean"}
OTHERS = {"cpa", "scvi", "scgpt-chemical", "scgpt-genetic", "embedsum", "old_neuralot", "decoder_only", "pseudobulk"}
OF_OTHERS = ("step_size_lr", "n_epochs_kl_warmup")  # settings of their training
PARTS = OURS | {"perturbationdatamodule"}  # what the files of a model and of the data have as name
DEFAULTS = {  # what the source has where a setting of its model is absent, under our names
    "d_model": None,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": None,
    "d_head": None,
    "d_mlp": 11_008,
    "transformer_backbone_key": "GPT2",
    "bidirectional_attention": False,
    "rope_theta": 10_000.0,
    "norm_eps": None,
    "rotary": None,  # as a causal Llama of transformers has, and a bidirectional one of State has not
    "n_encoder_layers": 2,
    "n_decoder_layers": 2,
    "use_basal_projection": True,
    "activation": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "predict_residual": True,
    "pert_norm": False,
    "batch_encoder": False,
    "use_batch_token": False,
    "confidence_token": False,
    "mask_attn": False,
    "compat_relu": False,
    "freeze_pert_backbone": False,
    "cell_set_len": 256,
    "basal_mapping_strategy": "random",
    "output_space": "gene",
    "loss": "energy",
    "distributional_loss": "energy",
    "blur": 0.05,
    "sinkhorn_weight": 0.01,
    "energy_weight": 1.0,
    "mmd_num_chunks": 1,
    "randomize_mmd_chunks": False,
    "decoder_weight": 1.0,
    "detach_decoder": False,
    "regularization": 0.0,
    "batch_token_weight": 0.1,
    "confidence_target_scale": 10.0,
    "confidence_weight": 0.01,
    "confidence_per_set": True,
}
GPT2_DEFAULTS = {"n_layers": 12, "n_heads": 12, "d_mlp": None, "bidirectional_attention": True, "rotary": False,
                 "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}
# The file of a model has the first, or two of the others: all of them unless the command line has another.
OF_A_MODEL_FILE = ("transformer_backbone_key", "n_encoder_layers", "n_layers", "d_mlp")
# What the data and the source decide, whatever such a file leaves out.
NOT_OF_MODEL_FILES = ("d_model", "basal_mapping_strategy", "output_space", "pert_norm", "compat_relu", "rotary",
                      "confidence_weight", "confidence_per_set")  # fmt: skip
NO_EMBEDDING = ("the embedding model of State (state emb) is not here: embed_key names an embedding that your h5ad has "
                "in obsm already")
TAHOE_CONTROL = "[('DMSO_TF', 0.0, 'uM')]"  # which State sets, for it is hard to write on a command line


# ---------------------------------------------------------------------------------------------------------------
# What depends on several settings: see Dialect.completed
# ---------------------------------------------------------------------------------------------------------------
def names_of(keys: Iterable[str]) -> set[str]:
    """The last words of dotted keys."""
    return {key.split(".")[-1] for key in keys}


def is_of_smolstate(given: dict[str, Any]) -> bool:
    """Whether settings have keys of SmolState, or are those that it writes for the tools of State."""
    by_project = "wandb.local_wandb_dir" in given and given.get("wandb.project") == "smolstate"
    return by_project or any(key.startswith(SMOLSTATE_MARKS) for key in given)


def is_of_state(given: dict[str, Any]) -> bool:
    """Whether settings have keys of State, and none of SmolState, whose files have State's as well."""
    return not is_of_smolstate(given) and any(key.startswith(STATE_MARKS) for key in given)


def is_file_of_a_part(given: dict[str, Any]) -> bool:
    """Whether a file of the model or of the data is among the settings: what it calls name is no run."""
    return any(key.startswith("kwargs.") for key in given)


def refusal(given: dict[str, Any]) -> str:
    """Why settings {dotted key: value as written} cannot be read at all; "" where they can."""
    if any(key.startswith(("embeddings.", "tokenizer.", "experiment.")) for key in given):
        return NO_EMBEDDING
    model = model_name(given)
    if model.lower() in BASELINES:
        return f"model {model}: the baselines of means stand in the table that every run ends with: model=state"
    if model.lower() in OTHERS or any(key in OF_OTHERS for key in given):
        return f"model {model or 'CPA, scVI, scGPT'}: of State's models state is here, no other: model=state"
    if model and model.lower() not in OURS:
        return f"model.name = {model}: there is no such model in State: model=state, state_sm, state_lg, ..."
    if given.get("data") == "default" or "kwargs.k562_rpe1_name" in given:
        return "data=default names no module that loads cells: data=perturbation"
    name = str(given.get("name"))
    module = value_of(given, "data.name") or (name if name.endswith("DataModule") else "PerturbationDataModule")
    if module != "PerturbationDataModule":
        return f"data.name = {module}: there is no such module in cell-load: data.name=PerturbationDataModule"
    for name, (inert, remedy) in REFUSED.items():
        value = value_of(given, name) or inert
        if value.lower() not in (inert, inert.removesuffix(".0")):
            return f"{name} = {value}: {remedy}"
    return ""


def model_name(given: dict[str, Any]) -> str:
    """The kind of model that settings name: in a file of it, as model.name, or by model=NAME; "" where they do not."""
    if value_of(given, "model.name"):
        return str(value_of(given, "model.name"))
    names = [given.get("model"), given.get("name") if is_file_of_a_part(given) else None]
    listed = given.get("defaults")
    for group in listed if isinstance(listed, list) else ():
        names += [group.get("model"), group.get("override model")] if isinstance(group, dict) else []
    return next((str(name) for name in names if str(name).lower() in BASELINES | OTHERS), "")


def run_folder(given: dict[str, Any], values: dict[str, Any], parent: str, run: str) -> str:
    """Where a run lies: in output_dir/name, or in the defaults of these; out_dir, which is our word, is the folder."""
    if "out_dir" in given:
        return values["out_dir"]
    if value_of({"output_dir": given.get("output_dir")}, "output_dir"):
        parent = values["out_dir"]
    name = value_of({"name": given.get("name")}, "name")
    if name and not (is_file_of_a_part(given) and name.lower() in PARTS):
        run = name
    # What has no setting of its own was not filled in.
    run = re.sub(r"\$\{([\w.]+)\}", lambda match: str(given.get(match[1], match[0])), run)
    if "${" in run:
        raise ValueError(f"name = {run} refers to what is not there: write it out")
    return f"{parent.rstrip('/')}/{run}"


def complete_both(values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """What State and SmolState make of the same settings of a model."""
    more = {}
    gpt2 = values["transformer_backbone_key"] == "GPT2"
    by_file = [name for name in OF_A_MODEL_FILE if fields.get(name, "command line") != "command line"]
    if "transformer_backbone_key" in by_file or len(by_file) > 1:
        # A file, or model=NAME, replaces another model whole: what it leaves out is the default of the code.
        more = {name: value for name, value in DEFAULTS.items() if name not in NOT_OF_MODEL_FILES}
        more |= {"lora_dropout": 0.0, "gene_decoder_bool": None, "decoder_hidden_dims": [1_024, 1_024, 512]}
        more |= GPT2_DEFAULTS if gpt2 else {}
    elif gpt2:
        # On top of the default Llama, whose names of the dropouts a GPT-2 does not know.
        more = {name: value for name, value in GPT2_DEFAULTS.items() if name.endswith("_dropout")}
    if gpt2:
        more["d_mlp"] = 4 * values["d_model"]
    # That of a model which another took the place of, as model=NAME does with that of a list of defaults, is gone.
    chosen = fields.get("transformer_backbone_key")
    gone = {name for name, where in fields.items() if where.startswith("model=") and where != chosen}
    more = {name: value for name, value in more.items() if name not in fields or name in gone}
    if gpt2:
        more |= {"d_head": None, "n_kv_heads": None, "bidirectional_attention": True, "rotary": False}
    return more


def llama_of_state(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Whether cells see each other, and have positions, in a Llama of State."""
    more = {}
    # In the first months each was bidirectional, without a setting; then transformers' own became the default.
    named = {str(given.get(key)).lower() for key in ("name", "model.name")}
    old = value_of(given, "freeze_pert") or value_of(given, "nb_decoder") or "pertsets" in named
    if old and "bidirectional_attention" not in fields:
        more["bidirectional_attention"] = True
    bidirectional = (values | more)["bidirectional_attention"]
    if "rotary" not in fields:
        more["rotary"] = not bidirectional
    if not bidirectional:
        note("without bidirectional_attention = true a Llama of State is causal, with rotary positions: the order of "
             "cells counts")
    return more


def units_of_lightning(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """A batch there is that of one micro-step on one device, and validation counts micro-steps."""
    more = {}
    accumulated = values["grad_accum"] if value_of(given, "gradient_accumulation_steps") else 1
    written = value_of(given, "devices") or "1"
    devices = int(written) if written.isdigit() else 1
    if value_of(given, "batch_size") or "batch_size" not in fields:
        more["batch_size"] = values["batch_size"] * accumulated * devices
    if value_of(given, "val_freq") or "eval_interval" not in fields:
        more["eval_interval"] = -(-values["eval_interval"] // accumulated)
    if written != "1":
        note(f"devices = {written}: torchrun --nproc_per_node=N starts a run on N; a batch is that of {devices}")
    return more


def complete_state(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """What arc-state makes of settings together: see Dialect.completed."""
    more = complete_both(values, fields)
    now = values | more
    if now["transformer_backbone_key"] == "llama":
        more |= llama_of_state(given, now, fields)
    more |= units_of_lightning(given, values, fields)
    if not values["toml_config_path"]:
        raise ValueError("data.kwargs.toml_config_path is empty: it names the TOML that says which cells train")
    if "matmul_precision" not in fields:
        note("matmul_precision = medium, as State sets it: float32 products of less precision, where the device has "
             "faster ones (matmul_precision=highest: full precision)")
    # What it switches off or replaces.
    if now["use_batch_token"] and (now["batch_encoder"] or values["basal_mapping_strategy"] == "random"):
        note("use_batch_token = false: State has no batch token with batch_encoder or basal_mapping_strategy = random")
        more["use_batch_token"] = False
    if values["pert_col"] == "drugname_drugconc" and values["control_pert"] != TAHOE_CONTROL:
        note(f"control_pert = {TAHOE_CONTROL}, as State sets it for pert_col = drugname_drugconc")
        more["control_pert"] = TAHOE_CONTROL
    decodes = values["gene_decoder_bool"] is not False and values["output_space"] != "embedding"
    if values["embed_key"] not in (None, "X_hvg") and values["compat_relu"] and not decodes:
        note("predicted embeddings are clipped at 0, as State does without a decoder (compat_relu=false: they are not)")
    # Of its training file, that of July 2025 and SmolState's are the same.
    file = fields.get("seed", "command line")
    trains = {"optimizer", "schedule"} & fields.keys()
    if file != "command line" and value_of(given, "use_mfu") is None and not trains:
        note(f"{file} does not say how it trains: by Adam at a constant rate, as State does, is an assumption "
             "(--dialect=smolstate: by AdamW along a cosine)")
    if is_on(given, "overwrite") and "resume" not in fields:
        more["resume"] = "never"
    if is_on(given, "use_wandb") and "wandb" not in fields:
        if importlib.util.find_spec("wandb"):
            more["wandb"] = True
        else:
            note("use_wandb = true, but wandb is not installed: the run goes on without it, as State does")
    # No limit, where a null of another setting is none.
    if "gradient_clip_val" in names_of(given) and not value_of(given, "gradient_clip_val"):
        more["grad_clip"] = 0.0
    if values["wandb_entity"] == "your_entity_name":
        more["wandb_entity"] = ""
    return more | {"out_dir": run_folder(given, values, "debugging", "debug")}


def complete_smolstate(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """What SmolState makes of settings together: see Dialect.completed."""
    more = complete_both(values, fields)
    more |= {"bidirectional_attention": True, "rotary": False, "grad_accum": 1}
    # Its data module overwrites what the files say, and passes over data.kwargs of the command line.
    for name, value in (("pert_col", "target_gene"), ("batch_col", "batch_var"), ("control_pert", "non-targeting"),
                        ("output_space", "gene")):
        if fields.get(name) != "command line":
            more[name] = value
    of_data = names_of(key for key in given if key.startswith("data.kwargs."))
    if any(fields.get(name) == "command line" for name in of_data):
        note("SmolState passes over data.kwargs of its command line; here they count")
    # Parts of State that it has not.
    lacks = ["lora", "use_batch_token"] + ["freeze_pert_backbone"] * (value_of(given, "freeze_pert") is not None)
    for name in lacks:
        if values[name]:
            note(f"{name} = false: SmolState passes over it")
            more[name] = False
    more["mmd_num_chunks"] = 1
    toml = values["toml_config_path"] or "starter.toml"
    if has_fewshot(toml):
        note(f"{toml}: SmolState passes over [fewshot] and trains on all of it; here it is held out")
    more["toml_config_path"] = toml
    return more | {"out_dir": run_folder(given, values, "out", "smolstate_run")}


def has_fewshot(path: str) -> bool:
    """Whether a TOML holds perturbations out. What is wrong with the file, reading its cells tells."""
    try:
        return bool(tomllib.loads(regular_file(path).read_text(encoding="utf-8")).get("fewshot"))
    except (OSError, ValueError, RecursionError):
        return False


# ---------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------
PROGRAMS = {"state", "state-sets", "smolstate"}  # and python main.py, whose first word is the verb
VERBS = {"train", "predict", "infer", "preprocess_train", "preprocess_infer", "info"}
ROOMS = {"tx", "sets", "emb"}  # of State's commands
EARLY_EMBEDDING = ["state-sets", "state"], ["state", "state"]  # what `emb` was called at first
UNNEEDED = {"quiet", "verbose", "profile", "predict_only", "skip_adatas"}  # options that change no prediction


def command(argv: list[str] | None) -> list[str]:
    """A command line of arc-state (`tx train ...`) or SmolState (`train ...`), or this one, as one of train_state.py.

    Raises InputError for verbs that other scripts serve, naming the command to type.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] in EARLY_EMBEDDING:
        raise InputError(NO_EMBEDDING)
    program = words.pop(0) if words and words[0] in PROGRAMS and set(words[1:2]) & (VERBS | ROOMS) else ""
    room = words.pop(0) if words and words[0] in ROOMS else ""
    verb = words.pop(0) if words and words[0] in VERBS else ""
    if room == "emb":
        raise InputError(NO_EMBEDDING)
    if room and not verb:
        raise InputError(f"{' '.join([room, *words[:1]])}: of its commands there are {', '.join(sorted(VERBS))}: "
                         "python train_state.py tx train ...")
    if verb not in ("", "train"):
        raise InputError(f"{' '.join(filter(None, (room, verb)))}: type {command_of(verb, options_of(words))}")
    ours = []
    for word in words:
        # Switches of SmolState, before the word that follows is taken for their value.
        if word in ("--no-resume", "--no_resume"):
            word = "--resume=never"
        elif word == "--overwrite":
            word = "overwrite=false"  # it goes on in a folder that is not empty, and so do we
        if word != "wandb=default":
            ours.append(word)
    if verb and not any(word.startswith("--dialect") for word in words):
        ours.append("--dialect=state" if room or program.startswith("state") else "--dialect=smolstate")
    return ours


def options_of(words: list[str]) -> dict[str, str]:
    """--key value, --key=value and key=value as {key: value}, with _ for -."""
    options, key = {}, ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--") or equals:
            key = name.lstrip("-").replace("-", "_")
            options[key] = value
        elif key:
            options[key], key = word, ""
    return options


def command_of(verb: str, options: dict[str, str]) -> str:
    """The command of ours for a verb of the sources other than train."""
    if verb == "info":
        return "python bench.py, which begins with what this machine has"
    if verb == "preprocess_train":
        names = {"adata": "input", "output": "output", "num_hvgs": "num_hvgs"}
        words = ["python", "prepare_data.py", "state", "preprocess", *renamed(options, names)]
        return f"{shlex.join(words)} --target_sum=N, N the median count of a cell, as State has it (ours: 10000)"
    if verb == "preprocess_infer":
        return ("python sample.py RUN --adata=FILE --perturbations=NAME,NAME instead of infer: it draws the control "
                "cells itself")
    folder = options.get("model_dir") or options.get("output_dir") or "RUN"
    checkpoint = options.get("checkpoint", "")
    last = Path(folder, "checkpoints", "last.ckpt")
    if checkpoint and "/" not in checkpoint:
        checkpoint = f"{folder.rstrip('/')}/checkpoints/{checkpoint}"
    elif not checkpoint and verb == "predict" and last.is_file():
        checkpoint = str(last)  # its default, where ours is the final one
    names = {"toml": "toml", "adata": "adata", "seed": "seed"}
    columns = {"pert_col": "columns.pert_col", "celltype_col": "columns.cell_type_key",
               "batch_col": "columns.batch_col", "control_pert": "columns.control_pert",
               "embed_key": "columns.embed_key"}
    if verb == "infer":
        names |= {"output": "out"} | columns
        options["output"] = options.get("output", "predictions").rsplit(".", 1)[0]  # ours is a folder
    known = {"model_dir", "output_dir", "checkpoint", *names, *UNNEEDED}
    others = [f"--{name.replace('_', '-')}" for name in options if name not in known]
    lacking = f" (of which {', '.join(others)} is not here)" if others else ""
    return shlex.join(["python", "sample.py", checkpoint or folder, *renamed(options, names)]) + lacking


def renamed(options: dict[str, str], names: dict[str, str]) -> list[str]:
    return [f"--{names[name]}={value}" for name, value in options.items() if name in names]


# ---------------------------------------------------------------------------------------------------------------
# Runs that go on
# ---------------------------------------------------------------------------------------------------------------
def from_the_source(cfg):
    """The settings of a run that goes on from a checkpoint of the source: those of one that starts from its weights.

    That is resume=FILE, or resume=auto where the run folder is the source's: its checkpoints/last.ckpt, and no last.pt
    but of a run that began so. Perturbations keep the numbers that they have there, if pert_onehot_map.pt tells. Prints
    a note where it begins.
    """
    folder, *_ = store.place_of(cfg.out_dir, cfg.s3_config)
    path = Path(cfg.resume)
    if cfg.resume == "auto":
        path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file() or system_of(path) != "state":
        return cfg
    ours, saved = (folder / "last.pt").exists(), folder / "config.json"
    began = None
    if ours and saved.exists():
        with contextlib.suppress(OSError, ValueError):  # a damaged one tells nothing of how the run began
            began = read_json(saved).get("init_from")
    if ours and cfg.resume == "auto" and began != str(path):
        return cfg
    if not ours:
        note(f"{path} is a checkpoint of another system: training starts from its weights, at step 0, with a new "
             "optimizer")
    features = cfg.perturbation_features_file
    for file in (path.parent / "pert_onehot_map.pt", path.parent.parent / "pert_onehot_map.pt"):
        if file.exists():
            features = features or str(file)
    return replace(cfg, resume="auto", init_from=str(path), perturbation_features_file=features)
