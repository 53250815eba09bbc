"""Checkpoints, settings and run folders of arc-state and SmolState, to ours and back.

Both systems build their model from keyword arguments, which also hold the settings of a transformer of Hugging Face
and of PEFT. Here these become settings of train_state.py (`translate`), and ours become theirs (`source_settings`).
"""

import re
from pathlib import Path

import numpy as np
import torch

from common.errors import CheckpointError
from sources.foreign_checkpoints import Inert, read_checkpoint
from sources.foreign_state_settings import ALIASES, DEFAULTS, GPT2_DEFAULTS

SHAPE = (  # settings that decide what the weights of a checkpoint mean
    "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "transformer_backbone_key",
    "bidirectional_attention", "rotary", "n_encoder_layers", "n_decoder_layers", "use_basal_projection", "activation",
    "predict_residual", "pert_norm",
)  # fmt: skip
# Not among the source's own keywords, but in transformer_backbone_kwargs.
OF_BACKBONE = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "bidirectional_attention", "rotary",
               "rope_theta", "norm_eps", "attention_dropout", "residual_dropout", "embedding_dropout")
UNUSED = ("embed_tokens.", ".wte.", ".wpe.", ".attn.bias", ".attn.masked_bias", "inv_freq")  # weights never read
SIZES_OF_DATA = ("input_dim", "output_dim", "pert_dim", "batch_dim", "gene_dim", "hvg_dim")


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------
def translate(keywords: dict, attention: str = "auto") -> tuple[dict, dict]:
    """(settings under our names, sizes of the data) of the keyword arguments of the source's model.

    A Llama without bidirectional_attention: true is causal with rotary positions, as transformers has it. What else a
    checkpoint meant, `attention` (bidirectional | causal | rotary) may say. Raises ValueError for what we have not.
    """
    backbone = keywords.get("transformer_backbone_kwargs") or {}
    key = keywords.get("transformer_backbone_key", "GPT2")
    if key not in ("llama", "GPT2"):
        raise ValueError(f"transformer_backbone_key = {key!r}: use llama or GPT2")
    gpt2 = key == "GPT2"
    settings = DEFAULTS | (GPT2_DEFAULTS if gpt2 else {})
    for name, value in {**keywords, **backbone}.items():
        name = ALIASES.get(name) or name
        if name in settings and value is not None:
            settings[name] = value
    settings["activation"] = settings["activation"].lower()
    if "embed_key" in keywords:
        settings["embed_key"] = keywords["embed_key"]
    if keywords.get("control_pert"):
        settings["control_pert"] = keywords["control_pert"]

    if gpt2 and settings["d_mlp"] is None:
        settings["d_mlp"] = 4 * settings["d_model"]
    if not gpt2 and attention != "auto":
        settings["bidirectional_attention"] = attention == "bidirectional"
        settings["rotary"] = attention == "rotary"
    if settings["rotary"] is None:
        settings["rotary"] = not settings["bidirectional_attention"]

    settings["freeze_pert_backbone"] = bool(keywords.get("freeze_pert_backbone") or keywords.get("freeze_pert"))
    # What the source switches off without a word.
    settings["batch_encoder"] = bool(settings["batch_encoder"] and keywords.get("batch_dim"))
    tokens = settings["use_batch_token"] and settings["basal_mapping_strategy"] == "batch"
    settings["use_batch_token"] = bool(tokens and not settings["batch_encoder"])

    lora = keywords.get("lora") or {}
    settings |= {
        "lora": bool(lora.get("enable", False)),
        "lora_r": lora.get("r", 16),
        "lora_alpha": lora.get("alpha", 32),
        "lora_dropout": lora.get("dropout", 0.0),
        "lora_mlp": lora.get("adapt_mlp", False),
    }
    decoder = keywords.get("decoder_cfg") or {}
    decodes = bool(keywords.get("gene_decoder_bool", True) and decoder and settings["output_space"] != "embedding")
    settings |= {
        "gene_decoder_bool": decodes,
        "decoder_hidden_dims": list(decoder.get("hidden_dims") or [512, 1024]),
        "decoder_dropout": decoder.get("dropout", 0.1),
        "residual_decoder": decoder.get("residual_decoder", False),
    }
    dims = {name: keywords.get(name) for name in SIZES_OF_DATA} | {"decodes": decodes}
    if decodes:
        dims["hvg_dim" if settings["output_space"] == "gene" else "gene_dim"] = decoder["gene_dim"]
    return settings, dims


def source_settings(cfg, dims: dict) -> dict:
    """The keyword arguments of the source's model of our settings cfg and sizes of the data."""
    backbone = {
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_mlp,
        "n_embd": cfg.d_model,
        "attn_pdrop": cfg.attention_dropout,
        "resid_pdrop": cfg.residual_dropout,
        "embd_pdrop": cfg.embedding_dropout,
    }
    if cfg.transformer_backbone_key == "llama":
        backbone = {
            "num_hidden_layers": cfg.n_layers,
            "num_attention_heads": cfg.n_heads,
            "num_key_value_heads": cfg.n_kv_heads or cfg.n_heads,
            "hidden_size": cfg.d_model,
            "head_dim": cfg.d_head or cfg.d_model // cfg.n_heads,
            "intermediate_size": cfg.d_mlp,
            "attention_dropout": cfg.attention_dropout,
            "max_position_embeddings": cfg.cell_set_len,
            "bidirectional_attention": cfg.bidirectional_attention,
        }
        if cfg.rotary == cfg.bidirectional_attention:  # else it follows
            backbone["rotary"] = cfg.rotary
        if cfg.rotary:
            backbone["rope_theta"] = cfg.rope_theta
    if cfg.norm_eps:
        backbone["rms_norm_eps" if cfg.transformer_backbone_key == "llama" else "layer_norm_epsilon"] = cfg.norm_eps
    keywords = {name: getattr(cfg, name) for name in DEFAULTS if name not in OF_BACKBONE}
    keywords |= {name: dims[name] for name in SIZES_OF_DATA}
    keywords |= {
        "hidden_dim": cfg.d_model,
        "embed_key": cfg.embed_key,
        "control_pert": cfg.control_pert,
        "transformer_backbone_kwargs": backbone,
        "gene_decoder_bool": dims["decodes"] and cfg.gene_decoder_bool is not False,
    }
    if keywords["gene_decoder_bool"]:
        keywords["decoder_cfg"] = {
            "latent_dim": dims["output_dim"],
            "gene_dim": dims["hvg_dim" if cfg.output_space == "gene" else "gene_dim"],
            "hidden_dims": cfg.decoder_hidden_dims,
            "dropout": cfg.decoder_dropout,
            "residual_decoder": cfg.residual_decoder,
        }
    if cfg.lora:
        keywords["lora"] = {
            "enable": True,
            "r": cfg.lora_r,
            "alpha": cfg.lora_alpha,
            "dropout": cfg.lora_dropout,
            "adapt_mlp": cfg.lora_mlp,
        }
    return keywords


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------
def read_source_checkpoint(path: str | Path) -> tuple[dict, dict, int]:
    """(weights, keyword arguments of the source's model, steps done)."""
    content = read_checkpoint(path)
    content = content if isinstance(content, dict) else {}
    smol = "model_state_dict" in content
    stored = content.get("model_state_dict" if smol else "state_dict", content)
    weights = {}
    for name, value in stored.items() if isinstance(stored, dict) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            weights[plain_name(name)] = value
    weights = used(weights)
    if not any(name.startswith("pert_encoder.") for name in weights):
        raise CheckpointError(f"{path} is no checkpoint of State: it has no weights pert_encoder.*")
    keywords = {}
    for place in (_inside(content, "config", "model", "kwargs"), _inside(content, "hyper_parameters")):
        for name, value in place.items():
            if value or not isinstance(value, Inert):
                keywords[name] = without_numpy(value)
    backbone = dict(_inside(keywords, "transformer_backbone_kwargs"))
    # Before release 0.9.32 every Llama of State was bidirectional, and so is SmolState's, whatever the settings say.
    # That release brought the setting, and the argument basal_mapping_strategy, which Lightning saves with the others.
    old = {"control_pert", "gene_names", "batch_size"} <= keywords.keys() and "basal_mapping_strategy" not in keywords
    if smol or old:
        backbone.setdefault("bidirectional_attention", True)
    keywords |= {"transformer_backbone_kwargs": backbone, "pert_norm": "pert_norm.weight" in weights}
    # SmolState's model is not told what its cells are read from; the settings of its data, at the root, say it.
    of_data = _inside(content, "config", "kwargs")
    if smol and of_data:
        keywords.setdefault("embed_key", of_data.get("embed_key"))
    step = content.get("global_step", content.get("step", 0))
    return weights, keywords, int(step) if isinstance(step, (int, np.integer)) else 0


def without_numpy(value):
    """Settings with numbers and texts of numpy, which an imported run could not be read back with, as plain ones."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict) and not isinstance(value, Inert):
        return {without_numpy(key): without_numpy(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(without_numpy, value))
    return value


def _inside(content: dict, *keys: str) -> dict:
    """The dict at content[key][key]...; empty where there is none."""
    for key in keys:
        value = content.get(key)
        content = value if isinstance(value, dict) else {}
    return content


def complete_decoder(keywords: dict, weights: dict) -> bool:
    """Settings of the gene decoder that its weights tell: whether there is one, and in old releases its sizes.

    Returns whether it is to be left out: where cells are genes already, the source builds one too, but never trains it
    and does not ask it for predictions.
    """
    linear = [value for name, value in weights.items() if name.startswith("gene_decoder.") and value.ndim == 2]
    if not linear:
        keywords["gene_decoder_bool"] = False
    elif keywords.get("decoder_cfg") is None:
        keywords["gene_decoder_bool"] = True
        keywords["decoder_cfg"] = {
            "latent_dim": linear[0].shape[1],
            "gene_dim": linear[-1].shape[0],
            "hidden_dims": [len(weight) for weight in linear[:-1]],
            "residual_decoder": "gene_decoder.final_layer.0.weight" in weights,
        }
    embed_key = keywords.get("embed_key", "")  # "": not said
    is_genes = embed_key is None or (embed_key == "X_hvg" and keywords.get("output_space", "gene") == "gene")
    if not linear or not is_genes:
        return False
    keywords["gene_decoder_bool"] = False
    return True


def plain_name(name: str) -> str:
    """A weight's name without what compilation, wrapping and PEFT put before it."""
    name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)
    return name.replace("transformer_backbone.base_model.model.", "transformer_backbone.").replace("._orig_mod", "")


def used(weights: dict) -> dict:
    """Without the embeddings of tokens and positions, which are zero in the source."""
    return {name: value for name, value in weights.items() if not any(part in name for part in UNUSED)}


def load_source_state_dict(model: torch.nn.Module, weights: dict, partial: bool = False) -> list[str]:
    """Load weights under the source's names; its token and position embeddings, which are zero, are left out.

    Args:
        partial: what is missing, or of another shape, keeps its start.
    Returns: names of the model that were not loaded. Raises CheckpointError naming what does not fit, unless partial.
    """
    weights = used({plain_name(name): value for name, value in weights.items()})
    own = model.state_dict()
    fits = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    missing = [name for name in own if name not in fits]
    wrong = []
    for name in missing:
        if name in weights:
            wrong.append(f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}")
        else:
            wrong.append(f"{name} is missing")
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    if wrong and not partial:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the weights do not fit this model: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(fits, strict=False)
    return missing


PARTS = ("pert_encoder", "basal_encoder", "project_out", "final_down_then_up", "gene_decoder", "batch_encoder",
         "batch_classifier")


def load_parts(model: torch.nn.Module, weights: dict, anew: set[str], where: str) -> list[str]:
    """Put the weights of another run in, but for the parts that start anew; returns the names that stay fresh.

    A part of another width stays fresh as a whole, so that no half of one is trained and the other not.
    Raises CheckpointError where the transformer does not fit.
    """
    own = model.state_dict()
    wrapped = {name.replace(".base_layer.", "."): name for name in own}  # what LoRA has wrapped
    weights = {wrapped.get(plain_name(name), plain_name(name)): value for name, value in weights.items()}
    anew = set(anew)
    for name, value in weights.items():
        part = name.split(".")[0]
        if part in PARTS and name in own and own[name].shape != value.shape:
            anew.add(part)
    kept = {name: value for name, value in weights.items() if name.split(".")[0] not in anew}
    missing = load_source_state_dict(model, kept, partial=True)
    if any("lora_" in name and name not in own for name in weights):
        raise CheckpointError(f"{where}: its transformer does not fit this model, for it has LoRA adapters: set lora = "
                              "true and its lora_r")
    lost = [name for name in missing if name.startswith("transformer_backbone.") and "lora_" not in name]
    if lost:
        raise CheckpointError(f"{where}: its transformer does not fit this model ({lost[0]} and {len(lost) - 1} more): "
                              "is it of another size?")
    return missing


def source_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model of train_state.py as the source names them."""
    return source_weights(model.state_dict(), model.cfg)


def source_weights(weights: dict, cfg) -> dict[str, torch.Tensor]:
    """A state dict of a model of settings cfg as the source names it, with its frozen embedding of zeros."""
    weights = {name: value.detach().cpu() for name, value in weights.items()}
    prefix = "transformer_backbone."
    if any("lora_A" in name for name in weights):
        prefix = "transformer_backbone.base_model.model."
        weights = {name.replace("transformer_backbone.", prefix): value for name, value in weights.items()}
    width = cfg.d_model
    if prefix + "norm.weight" in weights:  # a Llama
        return weights | {prefix + "embed_tokens.weight": torch.zeros(32_000, width)}
    tokens = cfg.cell_set_len + cfg.use_batch_token + cfg.confidence_token
    return weights | {prefix + "wte.weight": torch.zeros(50_257, width),
                      prefix + "wpe.weight": torch.zeros(tokens, width)}
