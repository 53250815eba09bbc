"""APEL-R, the source of train_apelr.py: its names of settings, and its checkpoints as our settings and weights.

A checkpoint of the source is a dict of model_state_dict, model_config, model_version (missing in the oldest, which are
of version 1), global_step, optimizer_state_dict (AdamW over all parameters in the order of the weights), where its
tokenizer is, and train_config, the YAML; a bare state dict is read too, its sizes from the shapes.
"""

import hashlib
import zipfile
from pathlib import Path, PureWindowsPath

import torch

from common.errors import CheckpointError, DataError
from configurator import Derived
from sources.tokenizer import hash_of, read_spec

V1, V2 = "v1_filtered_mixture", "v2_planner_required"
NO_EFFECT = (  # data.* and tokenizer.* are prepare_data.py's
    "tokenizer", "adaptive_batch", "distributed", "async_planner", "compile.mode", "compile.fullgraph",
    "compile.dynamic", "fused_adamw", "allow_tf32", "matmul_precision", "save_optimizer_state", "stride",
    "max_nonfinite_steps", "preview_interval", "max_train_examples", "max_val_examples", "min_chars",
    "max_train_chars", "max_val_chars", "streaming", "train_split", "val_split", "cache_dir", "token_cache",
    "token_cache_dir", "reuse_token_cache", "max_train_tokens", "max_val_tokens", "train_token_file", "val_token_file",
    "tokenizer_fit_split", "tokenizer_fit_max_examples", "tokenizer_fit_max_chars", "tokenizer_fit_streaming",
    "eval_planner_diagnostics", "final_eval_planner_diagnostics", "allow_zero_v2_planner_losses", "num_workers",
    "pin_memory", "persistent_workers", "prefetch_factor", "drop_last")  # fmt: skip
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
    **dict.fromkeys(NO_EFFECT),
}
MODEL_SETTINGS = (  # what a model_config may say of a model, by our names
    "vocab_size", "num_plan_states", "num_experts", "chunk_size", "token_dim", "d_model", "fusion_dim", "n_layers",
    "dropout", "planner_context_scale", "planner_self_bias", "planner_temperature", "token_filtering",
    "future_horizon_chunks", "lookahead_horizon", "lookahead_feedback_scale", "rep_window")  # fmt: skip
V1_EXPERTS = ("plan_emb", "state_proj", "plan_proj", "out_proj", "plan_vocab_bias")  # ours are in model.experts


def checkpoint_in(path: Path) -> Path:
    """checkpoint.pt of a run folder of the source; any other path as it is."""
    file = path / "checkpoint.pt"
    return file if file.is_file() and not (path / "last.pt").exists() else path


def is_source_checkpoint(path: str | Path) -> bool:
    """Whether a file is a checkpoint of the source rather than of this repository; reads no tensor."""
    try:
        with zipfile.ZipFile(path) as file:
            index = next(name for name in file.namelist() if name.endswith("data.pkl"))
            names = file.read(index)
            bare = b"token_emb.weight" in names and b"format_version" not in names  # a state dict and nothing else
            return bare or b"model_state_dict" in names
    except (OSError, zipfile.BadZipFile, StopIteration):  # what is wrong with it is told by whoever reads it
        return False


def convert(source: str | Path | dict) -> tuple[dict, dict[str, torch.Tensor], int]:
    """(settings of Config, weights by our parameter names, steps done) of a checkpoint of the source.

    The settings are those of the model, and compat=source. A weight that we have no name for keeps its own; a head that
    is missing is zero, and printed. Raises CheckpointError where it is no such checkpoint.
    """
    if isinstance(source, (str, Path)):
        source = read(source)
    weights = plain_weights(source)
    settings = sizes_of(weights) | {"compat": "source"}
    saved = {}
    if "model_state_dict" in source:
        saved = source.get("model_config") or {}
        settings["version"] = source.get("model_version", V1)
        settings |= window_of(source)
    for name, value in saved.items():
        name = ALIASES.get(name, name)
        if name in MODEL_SETTINGS:
            settings[name] = value
    if settings["version"] == V1:  # has neither lookahead nor a temperature
        settings |= {"lookahead_feedback_scale": 0.0, "planner_temperature": 1.0}
    elif settings["version"] != V2:
        raise CheckpointError(f"a source checkpoint of model version {settings['version']!r} cannot be read")
    elif saved and "lookahead_horizon" not in saved:  # a version 2 that is older than lookahead
        settings |= {"carry_posterior": False, "lookahead_feedback_scale": 0.0}
    return settings, our_names(weights, settings), steps(source)


def window_of(source: dict) -> dict[str, int]:
    """{"seq_len": tokens} of the windows that a checkpoint was trained on, where it says so."""
    trained = source.get("train_config")
    for name in ("train", "seq_len"):
        trained = trained.get(name) if isinstance(trained, dict) else None
    return {"seq_len": trained} if isinstance(trained, int) else {}


def our_names(weights: dict[str, torch.Tensor], settings: dict) -> dict[str, torch.Tensor]:
    """Tensors by names of the source, by ours: weights, or what an optimizer knows of each."""
    if settings["version"] == V1:
        return v1_names(weights)
    return stack_heads(weights, settings.get("num_plan_states", 0))


def read(path: str | Path) -> dict:
    """What is in a checkpoint, on the CPU; its tensors are read when they are used."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen kinds for torn files; each means the same here
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error


def steps(source: dict) -> int:
    return int(source.get("global_step", 0)) if "model_state_dict" in source else 0


def plain_weights(source: dict) -> dict[str, torch.Tensor]:
    """The weights without what torch.compile and DistributedDataParallel put before their names."""
    saved = source.get("model_state_dict", source) if isinstance(source, dict) else None
    weights = {}
    for name, value in saved.items() if isinstance(saved, dict) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            weights[name.replace("_orig_mod.", "").removeprefix("module.")] = value
    if "token_emb.weight" not in weights or weights["token_emb.weight"].ndim != 2:
        raise CheckpointError("this is no APEL-R checkpoint: it has no weights token_emb.weight [V, D]")
    return weights


def sizes_of(weights: dict[str, torch.Tensor]) -> dict:
    """Settings that the shapes of a source state dict tell."""
    vocab_size, token_dim = weights["token_emb.weight"].shape
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


# ---------------------------------------------------------------------------------------------------------------
# What lies beside a checkpoint
# ---------------------------------------------------------------------------------------------------------------
def tokenizer_file(path: str | Path) -> Path | None:
    """The tokenizer of a checkpoint: beside it, or where it says that it was; None where there is none.

    Raises DataError where it is not the one that the checkpoint was trained with, by its digest.
    """
    path = Path(path)
    source = read(path)
    written = str(source.get("tokenizer_path") or "tokenizer.json")
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
    """SHA-256 of a text file, with line ends as it has them, as on Windows and as elsewhere."""
    content = file.read_bytes()
    plain = content.replace(b"\r\n", b"\n")
    return {hashlib.sha256(form).hexdigest() for form in (content, plain, plain.replace(b"\n", b"\r\n"))}


def known_beside(path: str | Path) -> dict:
    """What a run of ours would keep in `extra` of the tokenizer of a checkpoint: its hash, and where it is."""
    file = tokenizer_file(path)
    return {"tokenizer_hash": hash_of(read_spec(file)), "tokenizer_file": str(file)} if file else {}
