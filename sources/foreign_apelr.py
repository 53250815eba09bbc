"""APEL-R, the source of train_apelr.py: its settings, and its checkpoints as our settings and weights.

A checkpoint of the source is a dict of model_state_dict, model_config, model_version (missing in the oldest, which are
of version 1), global_step, optimizer_state_dict (AdamW over all parameters in the order of the weights), where its
tokenizer is, and train_config, the YAML; a bare state dict is read too, its sizes from the shapes.
"""

import contextlib
import hashlib
import io
import json
import numbers
import os
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from common import checkpoint
from common.errors import CheckpointError, DataError
from configurator import READ, Derived, note
from sources.corpus import folder_of
from sources.foreign_checkpoints import checkpoint_in, converting, read_checkpoint, system_of
from sources.given import is_on, value_of
from sources.prepared import place_for
from sources.text import HUB
from sources.tokenizer import hash_of, read_spec

V1, V2 = "v1_filtered_mixture", "v2_planner_required"
OF_V2_ALONE = {"plan_commitment": "soft", "num_experts": None}  # what other versions do not look at
SPECIAL_TOKENS = ["<bos>", "<eos>", "<pad>", "<unk>"]
NO_EFFECT = (  # what decides how fast the same is computed, where it is kept, or what is printed on the way
    "adaptive_batch.probe_batch_size",
    "adaptive_batch.reprobe_interval_steps", "batch_size_probe", "distributed", "async_planner", "compile.mode",
    "compile.fullgraph", "compile.dynamic", "fused_adamw", "allow_tf32", "save_optimizer_state",
    "stride", "max_nonfinite_steps", "preview_interval", "max_train_examples", "max_val_examples",
    "max_train_chars", "max_val_chars", "min_chars", "streaming", "train_split", "val_split", "cache_dir",
    "token_cache", "token_cache_dir", "reuse_token_cache", "max_train_tokens", "max_val_tokens",
    "train_token_file", "val_token_file", "tokenizer_fit_split", "tokenizer_fit_max_examples",
    "tokenizer_fit_max_chars", "tokenizer_fit_streaming", "eval_planner_diagnostics",
    "final_eval_planner_diagnostics", "allow_zero_v2_planner_losses", "num_workers", "pin_memory",
    "pin_memory_device", "persistent_workers", "prefetch_factor", "drop_last", "tokenizer.min_frequency")  # fmt: skip
TOGETHER = (  # but for these, of which `complete` makes something
    "tokenizer.type", "tokenizer.vocab_size", "tokenizer.byte_level", "tokenizer.lowercase",
    "tokenizer.special_tokens",
    "data.max_train_examples", "data.max_val_examples", "data.max_train_chars",
    "data.min_chars", "data.max_train_tokens", "data.max_val_tokens", "data.tokenizer_fit_max_chars",
    "data.train_split", "data.val_split", "data.train_token_file", "data.val_token_file",
    "adaptive_batch", "adaptive_batch.enabled", "train.allow_zero_v2_planner_losses")  # fmt: skip
ALIASES = {  # names of the source, and of older versions of train_apelr.py, and ours
    "architecture": "version",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "hidden_dim": "d_model",
    "plan_temperature": "planner_temperature",
    "grad_accum_steps": "grad_accum",
    "learning_rate": "lr",
    "min_lr_ratio": Derived("min_lr", lambda ratio, settings: ratio * settings["lr"]),
    "lr_schedule": "schedule",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "val_batches": "eval_batches",
    "resume_from": "resume",
    "compile.enabled": "compile",
    "data.source": "data",
    "adaptive_batch.min_batch_size": "batch_size_min",
    "adaptive_batch.max_batch_size": "batch_size_cap",
    "adaptive_batch.safety_factor": "batch_size_safety",
    **dict.fromkeys(NO_EFFECT),
    **dict.fromkeys(TOGETHER, READ),
}
MODEL_SETTINGS = (  # what a model_config may say of a model, by our names
    "vocab_size", "num_plan_states", "num_experts", "chunk_size", "token_dim", "d_model", "fusion_dim", "n_layers",
    "dropout", "planner_context_scale", "planner_self_bias", "planner_temperature", "token_filtering",
    "future_horizon_chunks", "lookahead_horizon", "lookahead_feedback_scale", "rep_window")  # fmt: skip
COUNTS = ("num_plan_states", "chunk_size", "token_dim", "d_model", "fusion_dim", "n_layers")  # of these, 1 or more
V1_EXPERTS = ("plan_emb", "state_proj", "plan_proj", "out_proj", "plan_vocab_bias")  # ours are in model.experts


# ---------------------------------------------------------------------------------------------------------------
# Settings: what no table of defaults can say. given {dotted key of the source: value as written}, values {our setting:
# value}, fields {our setting that somebody set: where}. A name without a section, as in --batch_size=4, is ours.
# ---------------------------------------------------------------------------------------------------------------
def has_its_sections(given: dict[str, Any]) -> bool:
    """Whether settings are in the sections without which the source reads no file."""
    return all(any(key.startswith(section) for key in given) for section in ("data.", "model.", "train."))


def complete(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """The rest of what the source trains. Raises ValueError for what it refuses, and for what has no place here."""
    return completed(given, values, fields, early=False)


def complete_early(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """As complete, for a version 2 that neither looks ahead nor carries what tokens said across boundaries."""
    return completed(given, values, fields, early=True)


def completed(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str], early: bool) -> dict[str, Any]:
    for key, name in (("train.seq_len", "seq_len"), ("train.lr", "lr"), ("train.max_steps", "max_steps"),
                      ("data.source", "data")):
        if name not in fields:
            raise ValueError(f"{key} is missing, and the source has no default for it")
    more = {"version": version_of(values, fields), "final_eval_batches": values["eval_batches"]}
    if not values["resume"]:  # of a file that names none
        more["resume"] = "auto"
    if more["version"] == V2:
        more |= loss_of_v2(given, values, early) | planner_of_v2(values, early)
    elif more["version"] == V1:
        # It has one temperature, looks nowhere ahead, samples no plan and learns from every token.
        more |= {"planner_temperature": 1.0, "plan_temperature_start": None, "plan_temperature_end": None,
                 "lookahead_feedback_scale": 0.0, "token_filtering": True} | OF_V2_ALONE
    else:
        more |= transformer(values, fields)
    if values["schedule"] == "constant":
        more["warmup_steps"] = 0  # the source warms up to a cosine alone
    more |= precision_of(given, values, fields, early) | batch_of(given, values)
    return more | data_of(given, values)


def version_of(values: dict[str, Any], fields: dict[str, str]) -> str:
    """The version to train: that of the file, of the checkpoint that it goes on from, or the default."""
    path = to_resume(values["resume"], values["out_dir"])
    known = convert(path)[0]["version"] if path else None
    if "version" in fields:
        version = values["version"]
        if known and known != version.replace("transformer_lm", "baseline"):
            raise ValueError(f"model.version = {version}, and {path} is of {known}, which the source refuses: leave "
                             "model.version out, or go on from another checkpoint")
        return version
    if known:
        return known
    note(f"model.version is absent: {values['version']} (v1 before February 15: --dialect=apelr_early, v2 since)")
    return values["version"]


def planner_of_v2(values: dict[str, Any], early: bool) -> dict[str, Any]:
    # The temperature of the contrastive loss of the early version, and what a checkpoint of it says.
    start = values["plan_temperature_start"] or values["planner_temperature"]
    if not early:
        return {"planner_temperature": start}
    return {"planner_temperature": start, "carry_posterior": False, "lookahead_feedback_scale": 0.0,
            "token_filtering": True, "commitment_ramp_steps": 0, "commitment_max_hard_fraction": 1.0}


def loss_of_v2(given: dict[str, Any], values: dict[str, Any], early: bool) -> dict[str, Any]:
    weights = dict(values["loss_weights"] or {})
    if early:
        weights.setdefault("boundary_entropy", 0.0)  # entropy_reg_weight is of version 1
    if not (weights.get("rep_window") or values["rep_window"]):
        weights.pop("rep_unlikelihood", None)  # a mean over no tokens, which is 0
    core = {"boundary_entropy": values["entropy_reg_weight"], "usage_balance": values["usage_balance_weight"]}
    core |= {name: weight for name, weight in weights.items() if not name.startswith("rep_")}
    if not (early or any(core.values()) or is_on(given, "train.allow_zero_v2_planner_losses")):
        raise ValueError("no loss_weights of future_contrastive, plan_js_div, boundary_entropy and usage_balance is "
                         "above 0, which the source refuses: set one, or train.allow_zero_v2_planner_losses=true")
    return {"loss_weights": weights}


def transformer(values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """transformer_lm: its own sizes where they are absent, and embeddings as wide as the model."""
    if values["version"] != "transformer_lm":  # a baseline of ours
        return {}
    if values["seq_len"] > values["max_seq_len"]:
        raise ValueError(f"train.seq_len = {values['seq_len']} is more than model.max_seq_len = "
                         f"{values['max_seq_len']}, which the source refuses: set model.max_seq_len as well")
    sizes = {"d_model": 512, "n_layers": 6, "n_heads": 8}
    sizes = {name: size for name, size in sizes.items() if name not in fields}
    return sizes | {"token_dim": sizes.get("d_model", values["d_model"])} | OF_V2_ALONE


def precision_of(given: dict[str, Any], values: dict[str, Any], fields: dict[str, str], early: bool) -> dict[str, Any]:
    """fp16, and float32 products of precision high, on CUDA where nothing is said; less than full is for CUDA alone."""
    on_cuda = torch.cuda.is_available() and values["device"].startswith(("auto", "cuda"))
    more = {}
    for name, there, full in (("precision", "fp16", "fp32"), ("matmul_precision", "high", "highest")):
        if early and name == "matmul_precision":
            there = full  # which it does not touch
        if name in given:  # as asked for here
            continue
        if not on_cuda and name in fields and values[name] != full:
            note(f"{name} = {values[name]} of {fields[name]} is for CUDA alone: {name} = {full}")
        if not on_cuda or name not in fields:
            more[name] = there if on_cuda else full
    return more


def batch_of(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """batch_size of a whole step, which the source names for one rank and micro-step."""
    parts = values["grad_accum"] * int(os.environ.get("WORLD_SIZE", 1))
    size, alone = values["batch_size"], values["cpu_batch_size"]
    adapts = is_on(given, "train.adaptive_batch.enabled") or is_on(given, "train.adaptive_batch")
    if size != "auto" and adapts:
        if torch.cuda.is_available() and values["device"] != "cpu":
            raise ValueError(f"train.adaptive_batch.enabled makes the source take {size} windows for a measure: write "
                             f"train.batch_size=auto to fill the GPU, or train.adaptive_batch.enabled=false for {size}")
        size = alone if "train.cpu_batch_size" in given else size
    more = {}
    if size != "auto" and "batch_size" not in given:
        more["batch_size"] = size * parts
    if "cpu_batch_size" not in given:
        more["cpu_batch_size"] = alone * parts
    return more


def data_of(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The folder of the text, and the settings of prepare_data.py text that make it (see sources/prepared.py)."""
    source = values["data"]
    if "data" in given or "data.source" not in given:
        # --data=FOLDER is a text of the user's own choice, whose vocabulary is held against the file's.
        return {"prepare": tokenizer_of(given) if any(key.startswith("tokenizer.") for key in given) else None}
    if (folder_of(source) / "meta.json").exists() and source not in HUB:
        return {"prepare": tokenizer_of(given)}
    held_out = "train" if source in HUB and not HUB[source].has_validation else "validation"
    for key, known in (("data.train_split", "train"), ("data.val_split", held_out)):
        if given.get(key) not in (None, known):
            raise ValueError(f"{key} = {given[key]}: of {source} prepare_data.py text reads {known}, leave it out")
    prepare = {"input": source} | tokenizer_of(given) | limits(given, source)
    return {"data": str(place_for(prepare)), "prepare": prepare}


def tokenizer_of(given: dict[str, Any]) -> dict[str, Any]:
    kind = str(given.get("tokenizer.type") or "char").lower()
    if kind not in ("char", "bpe"):
        raise ValueError(f"tokenizer.type = {kind}: the source has char and bpe")
    prepare = {"tokenizer": kind}
    if kind == "char":
        return prepare
    if "tokenizer.byte_level" in given and not is_on(given, "tokenizer.byte_level"):
        raise ValueError("tokenizer.byte_level = false: the BPE here is of bytes, leave it out")
    names = given.get("tokenizer.special_tokens") or SPECIAL_TOKENS
    if not isinstance(names, list) or sorted(map(str, names)) != SPECIAL_TOKENS:
        raise ValueError("tokenizer.special_tokens: the BPE here has <pad>, <bos>, <eos> and <unk>, leave it out")
    prepare["vocab_size"] = value_of(given, "tokenizer.vocab_size", int) or 4_096
    if is_on(given, "tokenizer.lowercase"):
        prepare["lowercase"] = True
    return prepare


def limits(given: dict[str, Any], source: str) -> dict[str, Any]:
    """How much of the text is read, by settings of prepare_data.py text."""
    shortest = value_of(given, "data.min_chars", int)
    prepare = {"min_chars": 8 if shortest is None else max(0, shortest)}
    documents = value_of(given, "data.max_train_examples", int)
    held_out = value_of(given, "data.max_val_examples", int)
    if source.startswith("wikitext"):
        if documents:
            note(f"data.max_train_examples and max_val_examples count lines of {source}, of which articles are read "
                 "here: all of them are")
    elif documents and held_out and min(documents, held_out) > 0:
        total = documents if source in HUB and HUB[source].has_validation else documents + held_out
        prepare |= {"max_documents": total, "val_fraction": min(held_out * 10**6 // total / 10**6, 0.5)}
    wanted = {"max_bytes": "data.max_train_chars"}
    if is_on(given, "data.token_cache"):
        wanted |= {"max_tokens": "data.max_train_tokens", "max_val_tokens": "data.max_val_tokens",
                   "tokenizer_chars": "data.tokenizer_fit_max_chars"}
        for key in ("data.train_token_file", "data.val_token_file"):
            if given.get(key):
                raise ValueError(f"{key} = {given[key]}: prepare_data.py text makes the tokens here, leave it out")
    for name, key in wanted.items():
        most = value_of(given, key, int)
        if most and most > 0:  # below that it is no limit, there too
            prepare[name] = most
    if "max_tokens" in prepare:
        prepare.setdefault("max_bytes", 8 * prepare["max_tokens"])  # more than so many tokens of English have
    return prepare


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------
MOST = 1e6  # of any setting of a model


def is_source_checkpoint(path: str | Path) -> bool:
    """Whether a file is a checkpoint of the source rather than of this repository."""
    return system_of(Path(path)) == "apelr"


def to_resume(resume: str, out_dir: str) -> Path | None:
    """The checkpoint of the source that `resume` names, itself or by its run folder; None where that is none.

    The folder of the run itself stands for it even when checkpoints of ours are there as well: the same command again.
    """
    beside = Path(out_dir) / "checkpoint.pt"
    path = beside if Path(resume) == beside.parent and beside.is_file() else checkpoint_in(resume)
    return path if is_source_checkpoint(path) else None


def convert(source: str | Path | dict) -> tuple[dict, dict[str, torch.Tensor], int]:
    """(settings of Config, weights by our parameter names, steps done) of a checkpoint of the source.

    The settings are those of the model, and compat=source. A weight that we have no name for keeps its own; a head that
    is missing is zero, and printed. Raises CheckpointError where it is no such checkpoint.
    """
    where = source if isinstance(source, (str, Path)) else "the source checkpoint"
    with converting(where, "APEL-R"):
        return as_ours(checked(source, where) if isinstance(source, dict) else read(source))


def as_ours(source: dict) -> tuple[dict, dict[str, torch.Tensor], int]:
    """What `convert` returns, of what is in a checkpoint."""
    weights = plain_weights(source)
    settings = sizes_of(weights) | {"compat": "source"}
    saved = {}
    if "model_state_dict" in source:
        saved = source.get("model_config") or {}
        settings["version"] = source.get("model_version", V1)
        settings |= of_training(source)
    if "tok_emb.weight" in weights:
        settings |= transformer_sizes(weights, saved)
    for name, value in saved.items():
        name = ALIASES.get(name, name)
        if name in MODEL_SETTINGS:
            settings[name] = value
    if settings["version"] == V1:  # has neither lookahead nor a temperature
        settings |= {"lookahead_feedback_scale": 0.0, "planner_temperature": 1.0}
    elif settings["version"] not in (V2, "baseline"):
        raise CheckpointError(f"a source checkpoint of model version {settings['version']!r} cannot be read")
    elif settings["version"] == V2 and saved and "lookahead_horizon" not in saved:  # older than lookahead
        settings |= {"carry_posterior": False, "lookahead_feedback_scale": 0.0}
    return settings, our_names(weights, settings), steps(source)


def trained_with(source: dict, section: str, name: str):
    """A setting of the YAML that a checkpoint was trained with; None where it is not known."""
    found = source.get("train_config")
    for key in (section, name):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def of_training(source: dict) -> dict:
    """What a model of ours needs of the YAML: tokens of a window, and where the gate's temperature ended."""
    known = {}
    for section, name in (("train", "seq_len"), ("model", "plan_temperature_end")):
        value = trained_with(source, section, name)
        if isinstance(value, (int, float)) and value > 0:
            known[name] = value
    return known


def our_names(weights: dict[str, torch.Tensor], settings: dict) -> dict[str, torch.Tensor]:
    """Tensors by names of the source, by ours: weights, or what an optimizer knows of each."""
    if settings["version"] == V1:
        return v1_names(weights)
    if settings["version"] == "baseline":
        return transformer_names(weights)
    return stack_heads(weights, settings.get("num_plan_states", 0))


def read(path: str | Path) -> dict:
    """What is in a checkpoint, on the CPU; its tensors are read when they are used. Raises CheckpointError."""
    return checked(read_checkpoint(path, mmap=True), path)


def checked(source: object, where: str | Path) -> dict:
    """A checkpoint as it is, if its parts are of the kinds that the source writes. Raises CheckpointError."""
    if not isinstance(source, dict) or "model_state_dict" not in source:
        return source  # plain_weights tells what is wrong with it
    model_config = source.get("model_config") or {}
    wrong = []
    if not isinstance(source.get("global_step", 0), numbers.Real):
        wrong.append("global_step")
    if not isinstance(model_config, dict):
        wrong.append("model_config")
        model_config = {}
    for name, value in model_config.items():
        setting = ALIASES.get(name, name)
        fits = setting not in MODEL_SETTINGS or value is None or isinstance(value, numbers.Real)  # a switch is one too
        if setting in COUNTS:
            fits = isinstance(value, numbers.Integral) and value >= 1
        if isinstance(value, numbers.Real) and not abs(value) <= MOST:
            fits = False
        if not fits:
            wrong.append(f"model_config.{name} = {value}")
    if wrong:
        raise CheckpointError(f"{where} is no checkpoint as APEL-R writes it: look at its {', '.join(wrong)}")
    return source


def steps(source: dict) -> int:
    return int(source.get("global_step", 0)) if "model_state_dict" in source else 0


def plain_weights(source: dict) -> dict[str, torch.Tensor]:
    """The weights without what torch.compile and DistributedDataParallel put before their names."""
    saved = source.get("model_state_dict", source) if isinstance(source, dict) else None
    weights = {}
    for name, value in saved.items() if isinstance(saved, dict) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            weights[name.replace("_orig_mod.", "").removeprefix("module.")] = value
    embeddings = weights.get("token_emb.weight", weights.get("tok_emb.weight"))
    if embeddings is None or embeddings.ndim != 2:
        raise CheckpointError("this is no APEL-R checkpoint: it has no weights token_emb.weight [V, D]")
    return weights


def sizes_of(weights: dict[str, torch.Tensor]) -> dict:
    """Settings that the shapes of a source state dict tell."""
    vocab_size, token_dim = weights.get("token_emb.weight", weights.get("tok_emb.weight")).shape
    layers = {name.rsplit("_", 1)[1] for name in weights if name.startswith("backbone.")}
    settings = {"vocab_size": vocab_size, "token_dim": token_dim, "backbone": "gru", "dropout": 0.0,
                "n_layers": len(layers), "num_experts": None, "experts": "full",
                "version": V1 if "plan_emb.weight" in weights else V2}
    heads = {name.split(".")[1] for name in weights if name.startswith("expert_heads.")}
    if heads:
        settings["num_plan_states"] = len(heads)
    for name, setting, axis in (("backbone.weight_hh_l0", "d_model", 1), ("plan_emb.weight", "fusion_dim", 1),
                                ("planner_init_logits", "num_plan_states", 0)):
        if name in weights:
            settings[setting] = weights[name].shape[axis]
    return settings


def transformer_sizes(weights: dict[str, torch.Tensor], saved: dict) -> dict:
    """Settings of transformer_lm, whose shapes tell all but the number of heads. Raises CheckpointError without it."""
    missing = {"pos_emb.weight", "blocks.0.mlp.fc1.weight"} - weights.keys()
    if missing or "n_heads" not in saved:
        raise CheckpointError(
            f"this transformer_lm cannot be read without {', '.join(sorted(missing)) or 'n_heads of its model_config'}"
        )
    d_ff, H = weights["blocks.0.mlp.fc1.weight"].shape
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    return {"version": "baseline", "backbone": "transformer_lm", "n_layers": len(layers), "n_heads": saved["n_heads"],
            "d_model": H, "token_dim": H, "d_ff": d_ff, "max_seq_len": len(weights["pos_emb.weight"])}  # fmt: skip


def transformer_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """experts.weight [1, V, H] for lm_head.weight, backbone.blocks for blocks, and so on; a bias that is 0."""
    ours = {}
    for name, value in weights.items():
        if name == "lm_head.weight":
            ours["experts.weight"] = value[None]
            ours["experts.bias"] = value.new_zeros(1, len(value)) if value.ndim else value[None]
        else:
            ours["token_emb.weight" if name == "tok_emb.weight" else "backbone." + name] = value
    return ours


def v1_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """experts.plan_emb.weight for plan_emb.weight, and so on."""
    ours = {}
    for name, value in weights.items():
        ours["experts." + name if name.split(".")[0] in V1_EXPERTS else name] = value
    return ours


def stack_heads(weights: dict[str, torch.Tensor], K: int) -> dict[str, torch.Tensor]:
    """experts.weight [K, V, H] and experts.bias [K, V] for expert_heads.k.weight and expert_heads.k.bias."""
    weights = dict(weights)
    for part in ("weight", "bias"):
        names = [f"expert_heads.{k}.{part}" for k in range(K)]
        heads = [weights.pop(name, None) for name in names]
        known = [head for head in heads if head is not None]
        missing = [name for name, head in zip(names, heads, strict=True) if head is None]
        if not known:
            continue
        if missing:
            print(f"note: missing weights in the source checkpoint: {', '.join(missing)}")
        if any(head.shape != known[0].shape for head in known):
            raise CheckpointError(f"the source checkpoint does not fit its settings: expert_heads.*.{part} differ")
        weights["experts." + part] = torch.stack([torch.zeros_like(known[0]) if h is None else h for h in heads])
    return weights


def fill(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's own state dict with converted weights in place; missing ones keep their start, and both are printed."""
    for what, names in (("missing", own.keys() - weights.keys()), ("unknown", weights.keys() - own.keys())):
        if names:
            print(f"note: {what} weights in the source checkpoint: {', '.join(sorted(names))}")
    return {name: weights.get(name, value) for name, value in own.items()}


def fill_in(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Give a model what there is of its weights, see fill; silent for one that is built to be tried, without memory."""
    own = model.state_dict()
    is_trial = any(value.is_meta for value in own.values())
    with contextlib.redirect_stdout(io.StringIO()) if is_trial else contextlib.nullcontext():
        weights = fill(own, weights)
    checkpoint.load_weights(model, weights, path)


# ---------------------------------------------------------------------------------------------------------------
# What lies beside a checkpoint
# ---------------------------------------------------------------------------------------------------------------
def tokenizer_file(path: str | Path) -> Path | None:
    """The tokenizer of a checkpoint: beside it, or where it says that it was; None where there is none.

    Raises DataError where it is not the one that the checkpoint was trained with, by its digest.
    """
    path = Path(path)
    source = read(path)
    written = source.get("tokenizer_path") or "tokenizer.json"
    if not isinstance(written, str):  # of a class, which is not built here
        written = "tokenizer.json"
    beside = PureWindowsPath(written).name  # which takes either slash
    places = [path.parent / beside, path.parent / "tokenizer.json", Path(written)]
    files = [place for place in places if place.is_file()]
    if not files:
        return None
    digest = source.get("tokenizer_hash")
    for file in files:
        if not digest or digest in digests(file):
            return file
    raise DataError(
        f"{files[0]} is not the tokenizer that {path} was trained with (its SHA-256 is not {digest}): put that one "
        "beside the checkpoint"
    )


def digests(file: Path) -> set[str]:
    """SHA-256 of a tokenizer.json as it is, and as the source would have written the same, here or on Windows.

    A copy by prepare_data.py or in a run of ours says the same in other words.
    """
    content = file.read_bytes()
    forms = {content, content.replace(b"\r\n", b"\n")}
    try:
        spec = json.loads(content)
    except (ValueError, RecursionError):
        spec = None  # told by whoever reads it
    for is_ascii in (True, False):  # characters, byte pairs
        written = json.dumps(spec, indent=2, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
        forms |= {written, written.replace(b"\n", b"\r\n")}
    return {hashlib.sha256(form).hexdigest() for form in forms}


def untold(path: str | Path) -> str:
    """What a bare state dict leaves to our defaults, as a note; "" for a whole checkpoint."""
    if "model_state_dict" in read(path):
        return ""
    return (f"note: {path} is a bare state dict, which tells sizes and no more: chunk_size, planner_context_scale, "
            "planner_temperature, lookahead and steps are our defaults")


def known_beside(path: str | Path) -> dict:
    """What a run of ours would keep in `extra` of the tokenizer of a checkpoint: its hash, and where it is."""
    file = tokenizer_file(path)
    return {"tokenizer_hash": hash_of(read_spec(file)), "tokenizer_file": str(file)} if file else {}
