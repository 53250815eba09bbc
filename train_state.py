"""Train a model that turns sets of control cells into the cells a perturbation would make of them.

A sentence is a set of control cells of one cell type and the name of a perturbation. The model (State Transition,
Adduri et al. 2025) reads the cells together, without order, and writes as many perturbed cells; it is trained by a
distance between the two sets, because no measured cell is seen both before and after. What counts is measured on cell
types and perturbations that were never seen together, beside three baselines that know only means.

    python train_state.py                                      # synthetic cells with known effects, two CPU cores
    python train_state.py config/state_sm.py --toml=data/my.toml --embed_key=X_hvg        # your own h5ad files
    python train_state.py --toml=data/my.toml data.kwargs.pert_col=target_gene training.max_steps=400
    python prepare_data.py state inspect data/my.toml          # what a TOML selects, before any training
    torchrun --nproc_per_node=8 train_state.py config/state.py --toml=data/my.toml

Dimensions: B sentences, S cells of a sentence, N cells, D input features, G genes, P perturbation features, H width.
"""

import contextlib
import csv
import json
import math
import pickle
import re
import sys
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from geomloss import SamplesLoss

from common import checkpoint
from common.errors import DataError
from common.runlog import RunLog, read_metrics
from common.runtime import FiniteCheck, Runtime, Stopwatch
from configurator import config_dict, config_hash, configure, differences, fail, from_dict
from sources.cells import Batches, Experiment, Sentences, Store, load_features, make_batch
from sources.populations import synthetic
from sources.shared import make_once, suggest

EXPERIMENT = "state"  # how sample.py treats this page and its copies

SYNTHETIC = "data/state/synthetic.toml"  # made when it is missing


@dataclass
class Config:
    # output
    out_dir: str | None = checkpoint.default_out_dir(__file__)  # run folder
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    analyze: str = ""  # run folder or checkpoint to measure again instead of training
    source_files: bool = False  # also write the file names of the source: final.ckpt, var_dims.pkl, *_onehot_map.torch
    log_interval: int = 50  # steps between log lines
    eval_interval: int = 200  # steps between evaluations
    save_interval: int | None = None  # steps between saves of last.pt; default eval_interval
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    wandb: Literal["", "online", "offline"] = ""  # log to Weights & Biases; project and entity below or from .env
    wandb_project: str = ""
    wandb_entity: str = ""
    tensorboard: bool = False  # log to TensorBoard
    # data
    toml_config_path: str | None = SYNTHETIC  # or --toml: which cells train, validate and test
    strict: bool = True  # false: where the source has a trap, do as it does and warn
    pert_col: str = "gene"  # column of obs: the perturbation
    cell_type_key: str = "cell_type"  # column of obs: the cell type
    batch_col: str | None = "gem_group"  # column of obs: the experimental batch; empty: all cells are of one
    control_pert: str = "non-targeting"  # the perturbation that is none
    embed_key: str | None = "X_hvg"  # matrix of obsm that cells are read from; none: X
    output_space: Literal["gene", "all", "embedding"] = "gene"  # gene: X_hvg | all: every gene of X | embedding
    counts: Literal["auto", "log1p", "counts", "convert"] = "auto"  # what X is; convert: counts to log1p(1e4 a cell)
    perturbation_features_file: str | None = None  # .pt or .npz, name -> vector; default one-hot
    zeroshot_controls: bool = True  # controls of cell types held out whole take part in training
    val_fraction: float = 0.1  # of training conditions, where the TOML has no validation split
    ram_budget_gb: float = 8.0  # cells that need more are read from disk
    # sentences
    cell_set_len: int = 64  # S, cells of a sentence
    basal_mapping_strategy: Literal["random", "batch"] = "random"  # controls of the cell type | and of the batch
    n_basal_samples: int = 1  # control cells averaged into one input
    should_yield_control_cells: bool = True  # control cells are targets too
    map_controls: bool = True  # of a control target: input is another control cell; false: the cell itself
    downsample_cells: int | None = None  # most cells of one condition
    # model
    hidden_dim: int = 128  # H, width of the transformer and of the encoders
    n_layers: int = 4  # blocks of the transformer
    n_heads: int = 4  # of attention
    n_kv_heads: int | None = None  # of keys and values; default n_heads
    head_dim: int | None = None  # default hidden_dim / n_heads
    d_ff: int = 512  # width of the MLP of a block
    transformer_backbone_key: Literal["llama", "GPT2"] = "llama"  # kind of the blocks; neither has positions
    bidirectional_attention: bool = True  # false: causal, as some checkpoints of the source are
    rotary: bool = False  # rotary positions, which a set does not have: for such checkpoints
    n_encoder_layers: int = 2  # linear layers of the encoders of perturbation and control cells
    n_decoder_layers: int = 2  # linear layers of project_out, from the transformer to a cell
    use_basal_projection: bool = True  # control cells through n_encoder_layers; false: one linear layer
    activation: Literal["gelu", "relu", "leakyrelu", "elu", "selu"] = "gelu"  # of the encoders and project_out
    dropout: float = 0.1  # in the encoders and project_out
    attention_dropout: float = 0.0  # of attention weights
    residual_dropout: float = 0.0  # GPT2: of what a block adds
    embedding_dropout: float = 0.0  # GPT2: of its input
    predict_residual: bool = True  # predict the change of the control cells
    pert_norm: bool = False  # layer norm on the encoded perturbation, as SmolState has
    batch_encoder: bool = False  # add an embedding of the batch
    use_batch_token: bool = False  # a token that must name the batch
    confidence_token: bool = False  # a token that predicts the loss
    mask_attn: bool = False  # each cell sees only itself
    compat_relu: bool = False  # clip embeddings at 0 without a decoder, as the source does
    freeze_pert_backbone: bool = False  # train neither the transformer nor project_out
    init_from: str | None = None  # checkpoint to start from, ours or the source's; its sizes are taken over
    source_attention: Literal["auto", "bidirectional", "causal", "rotary"] = "auto"  # of a source checkpoint
    # gene decoder, from embedding to genes
    gene_decoder_bool: bool | None = None  # default: where there are counts to learn from
    decoder_hidden_dims: list[int] = field(default_factory=lambda: [1024, 1024, 512])  # its hidden layers
    decoder_dropout: float = 0.1  # after each of them
    residual_decoder: bool = False  # every second one adds what the one before it gave
    # low-rank adapters of the transformer (Hu et al. 2021)
    lora: bool = False  # train these in place of the transformer's weights
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # adapters count alpha / rank
    lora_dropout: float = 0.05  # of their input
    lora_mlp: bool = False  # of the MLPs too
    # loss
    loss: Literal["energy", "sinkhorn", "se", "mse"] = "energy"  # se: sinkhorn and energy
    distributional_loss: Literal["energy", "gaussian", "laplacian", "sinkhorn"] = "energy"  # what loss=energy is
    blur: float = 0.05  # of sinkhorn, gaussian and laplacian, in units of the features
    sinkhorn_weight: float = 0.01  # of se
    energy_weight: float = 1.0  # of se
    mmd_num_chunks: int = 1  # distances of this many groups of features, averaged
    randomize_mmd_chunks: bool = False  # other groups each time, in training
    decoder_weight: float = 1.0  # times the distance of decoded and measured genes
    detach_decoder: bool = False  # the decoder learns without a say in the cells it reads
    regularization: float = 0.0  # times the mean absolute change of a cell
    batch_token_weight: float = 0.1  # times the cross entropy of the batch, nats
    confidence_target_scale: float = 10.0  # the confidence token predicts this times the loss of its sentence
    confidence_weight: float = 0.01  # times the squared error of that prediction
    confidence_per_set: bool = True  # false: times the mean loss, as SmolState does
    # optimizer
    optimizer: Literal["adamw", "adam"] = "adamw"  # SmolState's | State's
    batch_size: int = 16  # sentences a step, over all ranks and micro-steps
    grad_accum: int = 1  # micro-steps a step
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 5e-4  # of adamw
    grad_clip: float = 10.0  # largest gradient norm; 0 does not clip
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up
    min_lr: float = 1e-6  # what cosine ends at
    warmup_steps: int = 50  # linear warm-up
    max_steps: int = 1_500  # optimizer steps
    # evaluation
    eval_sentences: int = 256  # of validation, during training
    # system
    seed: int = 42  # of weights, sentences and held-out conditions
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on GPUs that have it, else fp32
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only

    def __post_init__(self):
        self.out_dir = self.out_dir or type(self).out_dir  # null in files of the source

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        positive = ("log_interval", "eval_interval", "save_interval", "cell_set_len", "n_basal_samples", "hidden_dim",
                    "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_encoder_layers", "n_decoder_layers",
                    "mmd_num_chunks", "batch_size", "grad_accum", "max_steps", "eval_sentences",
                    "lora_r", "downsample_cells")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in positive
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        negative = ("lr", "weight_decay", "grad_clip", "warmup_steps", "min_lr", "seed", "decoder_weight",
                    "regularization", "sinkhorn_weight", "energy_weight", "batch_token_weight", "confidence_weight",
                    "lora_alpha")
        wrong += [f"{k} = {getattr(self, k)}: must not be negative" for k in negative if getattr(self, k) < 0]
        shares = ("dropout", "attention_dropout", "residual_dropout", "embedding_dropout", "decoder_dropout",
                  "lora_dropout", "val_fraction")
        wrong += [f"{k} = {getattr(self, k)}: must be in [0, 1)" for k in shares if not 0 <= getattr(self, k) < 1]
        wrong += [f"{k} = {getattr(self, k)}: must be above 0" for k in ("blur", "ram_budget_gb")
                  if getattr(self, k) <= 0]
        if self.head_dim is None and self.hidden_dim % max(1, self.n_heads):
            wrong.append(f"hidden_dim = {self.hidden_dim} is no multiple of n_heads = {self.n_heads}: set head_dim")
        if self.n_heads % (self.n_kv_heads or 1):
            wrong.append(f"n_heads = {self.n_heads} is no multiple of n_kv_heads = {self.n_kv_heads}")
        if self.rotary and (self.head_dim or self.hidden_dim // max(1, self.n_heads)) % 2:
            wrong.append("rotary positions need an even head_dim")
        if self.transformer_backbone_key == "GPT2" and (self.rotary or not self.bidirectional_attention):
            wrong.append("transformer_backbone_key = GPT2 is bidirectional and has no positions")
        if self.use_batch_token and (self.batch_encoder or self.basal_mapping_strategy != "batch"):
            wrong.append("use_batch_token needs basal_mapping_strategy = batch, and no batch_encoder: all cells of a "
                         "sentence are then of the batch that the token must name")
        if self.confidence_token and self.hidden_dim < 4:
            wrong.append(f"hidden_dim = {self.hidden_dim}: a confidence token needs at least 4")
        if not all(size > 0 for size in self.decoder_hidden_dims):
            wrong.append(f"decoder_hidden_dims = {self.decoder_hidden_dims}: must be positive")
        if not self.toml_config_path:
            wrong.append("toml_config_path is empty: name the TOML of your data, or leave it out for synthetic cells")
        return wrong


ALIASES: dict[str, str | None] = {  # names of the source's settings; None: without effect, there or here
    "toml": "toml_config_path", "train_seed": "seed", "random_seed": "seed", "val_freq": "eval_interval",
    "ckpt_every_n_steps": "save_interval", "gradient_clip_val": "grad_clip", "log_every_n_steps": "log_interval",
    "gradient_accumulation_steps": "grad_accum", "output_dir": "out_dir", "wd": "weight_decay",
    "num_hidden_layers": "n_layers", "n_layer": "n_layers", "num_attention_heads": "n_heads", "n_head": "n_heads",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "d_ff", "n_inner": "d_ff",
    "attn_pdrop": "attention_dropout", "resid_pdrop": "residual_dropout", "embd_pdrop": "embedding_dropout",
    "freeze_pert": "freeze_pert_backbone", "decoder_loss_weight": "decoder_weight", "wandb.entity": "wandb_entity",
    "wandb.project": "wandb_project", "lora.enable": "lora", "lora.r": "lora_r", "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout", "lora.adapt_mlp": "lora_mlp", "cell_sentence_len": "cell_set_len",
    "wandb.local_wandb_dir": None, "wandb.tags": None, "lora.bias": None, "lora.target": None, "lora.task_type": None,
    "lora.merge_on_eval": None, "lora.target_modules": None,
    # The backbone's width is hidden_dim and its cells have no positions, whatever these say.
    **dict.fromkeys((
        "hidden_size", "n_embd", "max_position_embeddings", "n_positions", "extra_tokens", "use_cache", "pad_token_id",
        "hidden_dropout", "layer_norm_eps", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rotary_dim",
        "use_rotary_embeddings", "name", "checkpoint", "softplus", "confidence_head", "transformer_decoder",
        "finetune_vci_decoder", "use_effect_gating_token", "nb_decoder", "batch_predictor", "llm_name", "wandb_track",
        "use_wandb", "loss_fn", "devices", "strategy", "use_mfu", "mfu_kwargs", "cumulative_flops_use_backward",
        "overwrite", "return_adatas", "pred_adata_path", "true_adata_path", "debug", "num_workers", "pin_memory",
        "pert_rep", "basal_rep", "embed_size", "downsample", "additional_obs", "store_raw_basal", "int_counts",
        "barcode", "use_consecutive_loading", "val_subsample_fraction", "normalize", "pseudobulk", "load_from_path",
        "sampling_random_state", "split_random_state", "predict_mean", "wandb_dir",
    )),
}  # fmt: skip
SIZES = {  # model=NAME of the source's command lines
    "state": "state", "state_sm": "state_sm", "state_lg": "state_lg", "tahoe_llama_212693232": "state_lg",
    "tahoe_llama_62089464": "state_tahoe", "tahoe_best": "state_tahoe_best", "pertsets": "state_pertsets",
    "smolstate": "state_smol",
}


# ---------------------------------------------------------------------------------------------------------------
# Model: the names of its parameters are the source's, so that checkpoints travel both ways
# ---------------------------------------------------------------------------------------------------------------
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU}


def mlp(width_in: int, hidden: int, width_out: int, layers: int, dropout: float = 0.0, activation=nn.GELU
        ) -> nn.Sequential:
    """Linear, activation, dropout, ..., Linear: `layers` linear maps, at 0, 3, 6 and so on."""
    widths, parts = [width_in, *[hidden] * (layers - 1), width_out], []
    for i in range(layers):
        parts += [nn.Linear(widths[i], widths[i + 1]), activation(), nn.Dropout(dropout)]
    return nn.Sequential(*parts[:-2])


class Attention(nn.Module):
    """Among the cells of a sentence. Llama's own form: no biases, heads of any width, grouped keys and values."""

    def __init__(self, H: int, heads: int, kv_heads: int, head_dim: int, dropout: float):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.dropout = heads, kv_heads, head_dim, dropout
        self.q_proj = nn.Linear(H, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(H, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(H, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, H, bias=False)

    def forward(self, x: torch.Tensor, seen: str, turn: tuple | None) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]. seen: all | causal | self; turn: cosine, sine [T, head_dim] of rotary positions."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))  # [B, heads, T, head_dim]
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        return self.o_proj(attend(q, k, v, seen, self.dropout if self.training else 0.0))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: str, dropout: float) -> torch.Tensor:
    """softmax(q k' / sqrt(C)) v for q [B, heads, T, C], k and v [B, kv_heads, T, C] -> [B, T, heads * C]."""
    if k.shape[1] != q.shape[1]:  # each key and value head serves a group of neighbouring queries
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if seen != "self":  # one cell alone has nothing to weigh: softmax over itself is 1
        v = F.scaled_dot_product_attention(q, k, v, is_causal=seen == "causal", dropout_p=dropout)
    return v.transpose(1, 2).flatten(2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021), pairing feature i with i + C / 2 as Llama does. x [B, heads, T, C]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, H: int, d_ff: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, d_ff, bias=False), nn.Linear(H, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, H, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), in the precision of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LlamaBlock(nn.Module):
    """Pre-norm block of Llama (Touvron et al. 2023): RMSNorm, attention, RMSNorm, SwiGLU."""

    def __init__(self, H: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, dropout: float, eps: float):
        super().__init__()
        self.self_attn = Attention(H, heads, kv_heads, head_dim, dropout)
        self.mlp = GatedMLP(H, d_ff)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(H, eps), RMSNorm(H, eps)

    def forward(self, x: torch.Tensor, seen: str, turn: tuple | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), seen, turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A stack of Llama blocks over cells: no tokens, no positions; with rotary positions for old checkpoints only."""

    def __init__(self, H: int, layers: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, dropout: float,
                 eps: float, bidirectional: bool, rotary: bool, theta: float = 10_000.0):
        super().__init__()
        self.layers = nn.ModuleList(LlamaBlock(H, heads, kv_heads, head_dim, d_ff, dropout, eps)
                                    for _ in range(layers))
        self.norm = RMSNorm(H, eps)
        self.seen, self.head_dim = "all" if bidirectional else "causal", head_dim
        self.theta = theta if rotary else None
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor, alone: bool = False) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]; alone: each cell sees only itself."""
        turn = None
        if self.theta:
            frequency = self.theta ** (-torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim)
            angle = torch.arange(x.shape[1], device=x.device)[:, None] * torch.cat([frequency, frequency])
            turn = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, "self" if alone else self.seen, turn)
        return self.norm(x)


class Conv1D(nn.Module):
    """A linear layer with its weight [in, out] the other way round, as GPT-2 stores it."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width_in, width_out)), nn.Parameter(torch.zeros(width_out))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.T, self.bias)


class GPT2Block(nn.Module):
    """Pre-norm block of GPT-2 (Radford et al. 2019): LayerNorm, attention, LayerNorm, GELU; all with biases."""

    def __init__(self, H: int, heads: int, d_ff: int, layers: int, attention_dropout: float, dropout: float,
                 eps: float):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(H, eps), nn.LayerNorm(H, eps)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(H, 3 * H), "c_proj": Conv1D(H, H)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(H, d_ff), "c_proj": Conv1D(d_ff, H)})
        for part in (self.attn, self.mlp):  # what writes to the stream shrinks with depth
            nn.init.normal_(part["c_proj"].weight, std=0.02 * (2 * layers) ** -0.5)
        self.heads, self.attention_dropout, self.dropout = heads, attention_dropout, dropout

    def forward(self, x: torch.Tensor, seen: str) -> torch.Tensor:
        qkv = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, T, C]
        attended = attend(q, k, v, seen, self.attention_dropout if self.training else 0.0)
        x = x + self.drop(self.attn["c_proj"](attended))
        return x + self.drop(self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT2(nn.Module):
    """A stack of GPT-2 blocks over cells: bidirectional, no positions."""

    def __init__(self, H: int, layers: int, heads: int, d_ff: int, attention_dropout: float, residual_dropout: float,
                 embedding_dropout: float, eps: float):
        super().__init__()
        self.h = nn.ModuleList(GPT2Block(H, heads, d_ff, layers, attention_dropout, residual_dropout, eps)
                               for _ in range(layers))
        self.ln_f, self.embedding_dropout = nn.LayerNorm(H, eps), embedding_dropout

    def forward(self, x: torch.Tensor, alone: bool = False) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]; alone: each cell sees only itself."""
        x = F.dropout(x, self.embedding_dropout, self.training) if self.embedding_dropout else x
        for block in self.h:
            x = block(x, "self" if alone else "all")
        return self.ln_f(x)


def make_backbone(key: str, H: int, given: dict) -> nn.Module:
    """The transformer from the source's settings: those of the configurations of Llama and GPT-2 in transformers."""
    if key == "GPT2":
        return GPT2(H, given.get("n_layer", 12), given.get("n_head", 12), given.get("n_inner") or 4 * H,
                    given.get("attn_pdrop", 0.1), given.get("resid_pdrop", 0.1), given.get("embd_pdrop", 0.1),
                    given.get("layer_norm_epsilon", 1e-5))
    if key != "llama":
        raise ValueError(f"transformer_backbone_key = {key!r}: use llama or GPT2")
    heads, bidirectional = given.get("num_attention_heads", 32), bool(given.get("bidirectional_attention", False))
    return Llama(H, given.get("num_hidden_layers", 32), heads, given.get("num_key_value_heads") or heads,
                 given.get("head_dim") or H // heads, given.get("intermediate_size", 11008),
                 given.get("attention_dropout", 0.0), given.get("rms_norm_eps", 1e-6), bidirectional,
                 given.get("rotary", not bidirectional), given.get("rope_theta", 10_000.0))


class LoRA(nn.Module):
    """W x + alpha / r * B A dropout(x), with W frozen and B zero at first (Hu et al. 2021). Names as in PEFT."""

    def __init__(self, base: nn.Module, r: int, alpha: int, dropout: float):
        super().__init__()
        self.base_layer, self.scale, self.dropout = base, alpha / r, dropout
        wide, out = base.weight.shape if isinstance(base, Conv1D) else base.weight.shape[::-1]
        self.lora_A = nn.ModuleDict({"default": nn.Linear(wide, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, out, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.lora_A["default"](F.dropout(x, self.dropout, self.training) if self.dropout else x)
        return self.base_layer(x) + self.scale * self.lora_B["default"](low)


def add_lora(backbone: nn.Module, r: int, alpha: int, dropout: float, adapt_mlp: bool) -> None:
    """Freeze the backbone, and put an adapter on every attention projection (and the MLPs' where asked)."""
    backbone.requires_grad_(False)
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj"}
    targets |= {"gate_proj", "up_proj", "down_proj", "c_fc"} if adapt_mlp else set()
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, (nn.Linear, Conv1D)):
                parent.add_module(name, LoRA(child, r, alpha, dropout))


class ConfidenceToken(nn.Module):
    """A token at the end of every sentence whose output predicts the sentence's loss."""

    def __init__(self, H: int, dropout: float):
        super().__init__()
        self.confidence_token = nn.Parameter(torch.randn(1, 1, H))
        self.confidence_projection = nn.Sequential(
            nn.Linear(H, H // 2), nn.LayerNorm(H // 2), nn.GELU(), nn.Dropout(dropout), nn.Linear(H // 2, H // 4),
            nn.LayerNorm(H // 4), nn.GELU(), nn.Dropout(dropout), nn.Linear(H // 4, 1), nn.ReLU())


class LatentToGeneDecoder(nn.Module):
    """From the embedding of a cell to its genes: Linear, LayerNorm, GELU, dropout, ..., Linear, ReLU.

    residual_decoder: every second hidden layer also adds the output of the one before it, as the source does; equal
    neighbouring widths are needed for that. Raises ValueError where they differ.
    """

    def __init__(self, latent_dim: int, gene_dim: int, hidden_dims: list[int] | None = None, dropout: float = 0.1,
                 residual_decoder: bool = False):
        super().__init__()
        widths = [latent_dim, *(hidden_dims or [512, 1024])]
        self.genes, self.residual = gene_dim, residual_decoder
        parts = [[nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Dropout(dropout)]
                 for a, b in zip(widths, widths[1:], strict=False)]
        last = [nn.Linear(widths[-1], gene_dim), nn.ReLU()]
        if residual_decoder:
            if any(a != b for a, b in zip(widths[1::2], widths[2::2], strict=False)):
                raise ValueError(f"residual_decoder needs hidden layers of equal width in pairs, not {widths[1:]}")
            self.blocks = nn.ModuleList(nn.Sequential(*part) for part in parts)
            self.final_layer = nn.Sequential(*last)
        else:
            self.decoder = nn.Sequential(*[layer for part in parts for layer in part], *last)

    def gene_dim(self) -> int:
        return self.genes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., latent_dim] -> [..., G], not negative."""
        if not self.residual:
            return self.decoder(x)
        for i, block in enumerate(self.blocks):
            before, x = x, block(x)
            x = x + before if i % 2 else x
        return self.final_layer(x)


class StateTransitionPerturbationModel(nn.Module):
    """Set of control cells + perturbation -> set of perturbed cells. Keyword arguments and defaults are the source's.

    Args:
        input_dim D, hidden_dim H, output_dim, pert_dim P, batch_dim: sizes.
        transformer_backbone_kwargs: as of the configurations of Llama and GPT-2; bidirectional_attention for Llama.
        decoder_cfg: {latent_dim, gene_dim, hidden_dims, dropout, residual_decoder} of the gene decoder.
        lora: {enable, r, alpha, dropout, adapt_mlp}.
        ignored: further settings of the source, without effect there or here.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, pert_dim: int, batch_dim: int | None = None,
                 basal_mapping_strategy: str = "random", predict_residual: bool = True,
                 distributional_loss: str = "energy", transformer_backbone_key: str = "GPT2",
                 transformer_backbone_kwargs: dict | None = None, output_space: str = "gene",
                 gene_dim: int | None = None, *, embed_key: str | None = None, cell_set_len: int = 256,
                 n_encoder_layers: int = 2, n_decoder_layers: int = 2, activation: str = "gelu", dropout: float = 0.1,
                 use_basal_projection: bool = True, pert_norm: bool = False, batch_encoder: bool = False,
                 use_batch_token: bool = False, batch_token_weight: float = 0.1, confidence_token: bool = False,
                 confidence_target_scale: float = 10.0, confidence_weight: float = 0.01,
                 confidence_per_set: bool = True, mask_attn: bool = False, compat_relu: bool = False,
                 gene_decoder_bool: bool = True, decoder_cfg: dict | None = None, decoder_weight: float = 1.0,
                 detach_decoder: bool = False, regularization: float = 0.0, loss: str = "energy", blur: float = 0.05,
                 sinkhorn_weight: float = 0.01, energy_weight: float = 1.0, mmd_num_chunks: int = 1,
                 randomize_mmd_chunks: bool = False, freeze_pert_backbone: bool = False, freeze_pert: bool = False,
                 lora: dict | None = None, **ignored):
        super().__init__()
        H, act = hidden_dim, ACTIVATIONS[activation.lower()]
        self.input_dim, self.output_dim, self.pert_dim, self.batch_dim = input_dim, output_dim, pert_dim, batch_dim
        self.cell_sentence_len, self.output_space, self.predict_residual = cell_set_len, output_space, predict_residual
        self.mask_attn, self.detach_decoder, self.regularization = mask_attn, detach_decoder, regularization
        self.decoder_weight, self.batch_token_weight = decoder_weight, batch_token_weight
        self.confidence = {"scale": confidence_target_scale, "weight": confidence_weight, "per_set": confidence_per_set}
        self.distance = {"loss": distributional_loss if loss == "energy" else loss, "blur": blur,
                         "sinkhorn_weight": sinkhorn_weight, "energy_weight": energy_weight, "chunks": mmd_num_chunks}
        self.randomize_mmd_chunks = randomize_mmd_chunks

        self.pert_encoder = mlp(pert_dim, H, H, n_encoder_layers, dropout, act)
        self.basal_encoder = (mlp(input_dim, H, H, n_encoder_layers, dropout, act) if use_basal_projection
                              else nn.Linear(input_dim, H))
        if pert_norm:
            self.pert_norm = nn.LayerNorm(H)
        self.transformer_backbone = make_backbone(transformer_backbone_key, H, transformer_backbone_kwargs or {})
        self.project_out = mlp(H, H, output_dim, n_decoder_layers, dropout, act)
        if output_space == "all":
            narrow = max(1, output_dim // 8)
            self.final_down_then_up = nn.Sequential(nn.Linear(output_dim, narrow), nn.GELU(),
                                                    nn.Linear(narrow, output_dim))
        if batch_encoder and batch_dim:
            self.batch_encoder = nn.Embedding(batch_dim, H)
        if use_batch_token and basal_mapping_strategy == "batch" and not batch_encoder:
            self.batch_token = nn.Parameter(torch.randn(1, 1, H))
            self.batch_classifier = mlp(H, H, batch_dim, 1)
        if confidence_token:
            self.confidence_token = ConfidenceToken(H, dropout)
        self.gene_decoder = None
        if gene_decoder_bool and decoder_cfg and output_space != "embedding":
            self.gene_decoder = LatentToGeneDecoder(**decoder_cfg)
        if not predict_residual and output_space == "all":  # then it has no part in the output
            self.final_down_then_up.requires_grad_(False)
        self.clips = embed_key in ("X_hvg", None) or (compat_relu and self.gene_decoder is None)
        if lora and lora.get("enable", False):
            add_lora(self.transformer_backbone, lora.get("r", 16), lora.get("alpha", 32), lora.get("dropout", 0.0),
                     lora.get("adapt_mlp", False))
        for name, weight in self.transformer_backbone.named_parameters():
            frozen = (freeze_pert_backbone or freeze_pert) and "lora_" not in name
            if frozen or (mask_attn and re.search(r"\.[qk]_proj\.", name)):  # one cell alone has nothing to weigh
                weight.requires_grad_(False)
        if freeze_pert_backbone or freeze_pert:
            self.project_out.requires_grad_(False)

    def sentences(self, x: torch.Tensor, width: int, padded: bool) -> torch.Tensor:
        """Cells [B * S, width], or [B, S, width] already, as sentences; padded=False: one sentence of all of them."""
        if x.ndim == 3:
            return x
        if padded and len(x) % self.cell_sentence_len:
            raise ValueError(f"{len(x)} cells are no whole sentences of {self.cell_sentence_len}")
        return x.reshape(-1, self.cell_sentence_len, width) if padded else x.reshape(1, -1, width)

    def predict(self, batch: dict, padded: bool = True) -> dict:
        """Predicted cells [B, S, output_dim], and what else the model's tokens say.

        Args:
            batch: ctrl_cell_emb, cells [B * S, D] or [B, S, D]; pert_emb, features of the perturbation, of each cell
                [B * S, P], or of each sentence [B, P] beside cells [B, S, D]; batch, one-hot or codes, if it is used.
        Returns: cells; confidence [B, 1] and batch_logits [B, batch_dim] where there are such tokens.
        """
        basal = self.sentences(batch["ctrl_cell_emb"], self.input_dim, padded)  # [B, S, D]
        pert, per_cell = batch["pert_emb"], batch["ctrl_cell_emb"].ndim == 2
        pert = self.sentences(pert, self.pert_dim, padded) if per_cell or pert.ndim == 3 else pert[:, None]
        encoded = self.pert_encoder(pert)  # [B, S or 1, H]
        encoded = self.pert_norm(encoded) if hasattr(self, "pert_norm") else encoded
        control = self.basal_encoder(basal)
        x = encoded + control
        if hasattr(self, "batch_encoder"):
            x = x + self.batch_encoder(self.batch_codes(batch["batch"], basal))
        first, last = hasattr(self, "batch_token"), hasattr(self, "confidence_token")
        tokens = [self.batch_token.expand(len(x), -1, -1), x] if first else [x]
        tokens += [self.confidence_token.confidence_token.expand(len(x), -1, -1)] if last else []
        out = self.transformer_backbone(torch.cat(tokens, 1) if first or last else x, self.mask_attn)
        found = {}
        if first:
            found["batch_logits"] = self.batch_classifier(out[:, 0])
        if last:
            found["confidence"] = self.confidence_token.confidence_projection(out[:, -1])
        change = out[:, int(first) : out.shape[1] - int(last)]
        if not self.predict_residual:
            cells = self.project_out(change)
        elif self.output_space == "all":
            cells = self.final_down_then_up(self.project_out(change) + basal)
        else:
            cells = self.project_out(change + control)
        return found | {"cells": cells.relu() if self.clips else cells}

    def extra_tokens(self) -> int:
        """Tokens of a sentence that are no cells."""
        return hasattr(self, "batch_token") + hasattr(self, "confidence_token")

    def batch_codes(self, batch: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Batches of cells [B, S, ...] as codes [B, S], from codes or one-hot vectors of each cell or each sentence."""
        B, S = cells.shape[:2]
        if self.batch_dim == 1:
            return torch.zeros(B, S, dtype=torch.long, device=cells.device)
        if batch.numel() not in (B, B * S) or (batch.is_floating_point() and batch.numel() == B * self.batch_dim):
            batch = batch.argmax(-1)
        return batch.reshape(B, -1).long()

    def forward(self, batch: dict, padded: bool = True, losses: bool = False):
        """Predicted cells [B * S, output_dim], with the confidence [B, 1] where there is such a token.

        losses=True: the terms of the loss instead (see `losses`), in one call, as DistributedDataParallel needs it.
        """
        found = self.predict(batch, padded)
        if losses:
            return self.losses(batch, found, padded)
        cells = found["cells"].reshape(-1, self.output_dim)
        return (cells, found["confidence"]) if "confidence" in found else cells

    def set_loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The configured distance of every sentence: pred and target [B, S, D] or [B * S, D] -> [B]."""
        pred, target = (self.sentences(cells, cells.shape[-1], padded=True) for cells in (pred, target))
        order = None
        if self.randomize_mmd_chunks and self.training and self.distance["chunks"] > 1:
            order = torch.randperm(pred.shape[-1], device=pred.device)
        return set_loss(pred, target, **self.distance, order=order)

    def losses(self, batch: dict, found: dict, padded: bool = True) -> dict:
        """All terms of the loss, "loss" their sum and "per_set" [B] the distance of each sentence.

        batch: pert_cell_emb, the measured cells; pert_cell_counts, their genes, where a decoder learns.
        """
        pred = found["cells"]
        target = self.sentences(batch["pert_cell_emb"], self.output_dim, padded)
        per_set = self.set_loss(pred, target)
        terms = {"per_set": per_set.detach(), "distance": per_set.nanmean()}
        total = terms["distance"]
        if "batch_logits" in found:
            named = self.batch_codes(batch["batch"], pred)[:, 0]
            terms["batch_token"] = F.cross_entropy(found["batch_logits"].float(), named)
            total = total + self.batch_token_weight * terms["batch_token"]
        if self.gene_decoder is not None and "pert_cell_counts" in batch:
            # Detached, the decoder learns from the model's cells; one batch in ten from measured ones.
            measured = self.detach_decoder and self.training and torch.rand(()) < 0.1
            latent = target if measured else pred.detach() if self.detach_decoder else pred
            genes = self.sentences(batch["pert_cell_counts"], self.gene_decoder.gene_dim(), padded)
            terms["decoder"] = self.set_loss(self.gene_decoder(latent), genes).mean()
            total = total + self.decoder_weight * terms["decoder"]
        if "confidence" in found:
            wanted = (per_set if self.confidence["per_set"] else total.expand(len(pred))).detach()
            terms["confidence"] = F.mse_loss(found["confidence"][:, 0].float(), self.confidence["scale"] * wanted)
            total = total + self.confidence["weight"] * terms["confidence"]
        if self.regularization:
            terms["l1"] = (pred - self.sentences(batch["ctrl_cell_emb"], self.input_dim, padded)).abs().mean()
            total = total + self.regularization * terms["l1"]
        return terms | {"loss": total}

    def load_source_state_dict(self, weights: dict, partial: bool = False) -> list[str]:
        """Load weights under the source's names; see the function of the same name."""
        return load_source_state_dict(self, weights, partial)


def build_model(cfg, dims: dict | None = None) -> StateTransitionPerturbationModel:
    """The model of a Config, or of a dict of the source's keyword arguments.

    Args:
        dims: sizes of the data, as Experiment.dims has them; default those of the data that cfg names.
    Raises DataError if a decoder is asked for where there is nothing to learn it from.
    """
    settings = cfg if isinstance(cfg, dict) else model_settings(cfg, dims or open_data(cfg).dims())
    return StateTransitionPerturbationModel(**settings)


def model_settings(cfg: Config, dims: dict) -> dict:
    """The source's keyword arguments of the model. Raises DataError if a decoder has nothing to learn from."""
    if cfg.gene_decoder_bool and not dims["decodes"]:
        raise DataError(f"gene_decoder_bool = true, but with embed_key = {cfg.embed_key} and output_space = "
                        f"{cfg.output_space} there are no genes for a decoder to learn: leave it out, or use an "
                        "embedding as embed_key, or output_space = all")
    backbone = {"n_layer": cfg.n_layers, "n_head": cfg.n_heads, "n_inner": cfg.d_ff, "n_embd": cfg.hidden_dim,
                "attn_pdrop": cfg.attention_dropout, "resid_pdrop": cfg.residual_dropout,
                "embd_pdrop": cfg.embedding_dropout}
    if cfg.transformer_backbone_key == "llama":
        backbone = {"num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.n_heads,
                    "num_key_value_heads": cfg.n_kv_heads or cfg.n_heads, "hidden_size": cfg.hidden_dim,
                    "head_dim": cfg.head_dim or cfg.hidden_dim // cfg.n_heads, "intermediate_size": cfg.d_ff,
                    "attention_dropout": cfg.attention_dropout, "max_position_embeddings": cfg.cell_set_len,
                    "bidirectional_attention": cfg.bidirectional_attention}
        if cfg.rotary == cfg.bidirectional_attention:  # else it follows
            backbone["rotary"] = cfg.rotary
    same = ("hidden_dim", "basal_mapping_strategy", "predict_residual", "distributional_loss", "output_space",
            "transformer_backbone_key", "embed_key", "cell_set_len", "n_encoder_layers", "n_decoder_layers",
            "activation", "dropout", "use_basal_projection", "pert_norm", "batch_encoder", "use_batch_token",
            "batch_token_weight", "confidence_token", "confidence_target_scale", "confidence_weight",
            "confidence_per_set", "mask_attn", "compat_relu", "decoder_weight", "detach_decoder", "regularization",
            "loss", "blur", "sinkhorn_weight", "energy_weight", "mmd_num_chunks", "randomize_mmd_chunks",
            "freeze_pert_backbone", "control_pert")
    settings = {name: getattr(cfg, name) for name in same} | {k: v for k, v in dims.items() if k != "decodes"}
    decodes = dims["decodes"] and cfg.gene_decoder_bool is not False
    if decodes:
        settings["decoder_cfg"] = {
            "latent_dim": dims["output_dim"], "gene_dim": dims["hvg_dim" if cfg.output_space == "gene" else "gene_dim"],
            "hidden_dims": cfg.decoder_hidden_dims, "dropout": cfg.decoder_dropout,
            "residual_decoder": cfg.residual_decoder}
    if cfg.lora:
        settings["lora"] = {"enable": True, "r": cfg.lora_r, "alpha": cfg.lora_alpha, "dropout": cfg.lora_dropout,
                            "adapt_mlp": cfg.lora_mlp}
    return settings | {"transformer_backbone_kwargs": backbone, "gene_decoder_bool": decodes}


# ---------------------------------------------------------------------------------------------------------------
# Losses: distances between sets of cells
# ---------------------------------------------------------------------------------------------------------------
SMALLEST = 1e-8  # squared distances below are taken for it and have no gradient, as in geomloss


class EnergyDistance(torch.autograd.Function):
    """E|x - y| - E|x - x'| / 2 - E|y - y'| / 2 of every pair of sets (Szekely and Rizzo 2013), as geomloss computes it.

    The gradient, sum_j (x_i - y_j) / (N M |x_i - y_j|) - sum_j (x_i - x_j) / (N^2 |x_i - x_j|), is made on the way, so
    that no matrix of distances outlives a block of rows: memory is that of the cells, not of their pairs. Squared
    distances are |x|^2 - 2 x y + |y|^2 in geomloss's own order of operations, so that values agree to the last digits
    with it, in float32 too.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, y: torch.Tensor, pairs: int) -> torch.Tensor:
        """x [B, N, D], y [B, M, D] float -> [B]; pairs: most distances held at a time."""
        (B, N, _), M = x.shape, y.shape[1]
        xx, yy = x.square().sum(-1), y.square().sum(-1)
        total, gradient = x.new_zeros(B), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        block = max(1, pairs // (B * max(N, M)))
        for start in range(0, N, block):
            rows = slice(start, start + block)
            part, own = x[:, rows], xx[:, rows, None]
            among = _distances(part, x, own, xx)
            across = _distances(part, y, own, yy)
            total += across.sum((1, 2)) / (N * M) - among.sum((1, 2)) / (2 * N * N)
            if gradient is not None:
                pull = _pull(across, N * M)
                push = _pull(among, N * N)
                own = push.diagonal(start, 1, 2)  # of a cell with itself, where rounding may have left a little
                own.zero_().copy_(pull.sum(-1) - push.sum(-1))  # what multiplies x_i
                torch.bmm(push, x, out=gradient[:, rows]).baddbmm_(pull, y, alpha=-1)
        block = min(block, max(32, M // 4))  # each pair once: of four blocks of rows that leaves 5/8 of the work
        for start in range(0, M, block):
            rows = slice(start, start + block)
            apart = _distances(y[:, rows], y[:, start:], yy[:, rows, None], yy[:, start:])
            total -= (2 * apart.sum((1, 2)) - apart[:, :, :block].sum((1, 2))) / (2 * M * M)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        return outer[:, None, None] * ctx.saved_tensors[0], None, None


def _distances(a: torch.Tensor, b: torch.Tensor, aa: torch.Tensor, bb: torch.Tensor) -> torch.Tensor:
    """|a_i - b_j| [B, n, m] from squared norms aa [B, n, 1] and bb [B, m]."""
    return torch.bmm(a, b.transpose(1, 2)).mul_(-2).add_(aa).add_(bb[:, None]).clamp_min_(SMALLEST).sqrt_()


def _pull(distances: torch.Tensor, count: int) -> torch.Tensor:
    """1 / (count * distance), 0 where two cells are the same; takes the place of the distances."""
    near = distances <= SMALLEST**0.5
    return distances.mul_(count).reciprocal_().masked_fill_(near, 0.0)


@contextlib.contextmanager
def full_float32():
    """No TF32: squared distances are small differences of large numbers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.compiler.disable  # of custom gradients and geomloss there is nothing to gain
def set_loss(pred: torch.Tensor, target: torch.Tensor, loss: str = "energy", blur: float = 0.05,
             sinkhorn_weight: float = 0.01, energy_weight: float = 1.0, chunks: int = 1,
             order: torch.Tensor | None = None, pairs: int = 1 << 23) -> torch.Tensor:
    """The distance between predicted and measured cells of each sentence: [B, S, D] twice -> [B], in float32 or better.

    Args:
        loss: energy | sinkhorn | se, sinkhorn_weight * sinkhorn + energy_weight * energy | mse, cell by cell |
            gaussian | laplacian, kernels of geomloss with this blur.
        chunks: distances of so many groups of features, averaged (not of se, as in the source); order [D]: features
            in this order before.
        pairs: most distances of the energy held in memory at a time.
    Two sets [S, D] give a number. Gradients are for pred; the energy gives target none. Raises ValueError for an
    unknown loss and for sets that cannot be compared.
    """
    if pred.ndim == target.ndim == 2:
        return set_loss(pred[None], target[None], loss, blur, sinkhorn_weight, energy_weight, chunks, order, pairs)[0]
    comparable = pred.shape == target.shape if loss == "mse" else pred.shape[::2] == target.shape[::2]
    if not comparable or not pred.numel() * target.numel():
        raise ValueError(f"sets of cells {list(pred.shape)} and {list(target.shape)} cannot be compared by {loss}")
    with torch.autocast(pred.device.type, enabled=False), full_float32():
        pred = pred if pred.dtype == torch.float64 else pred.float()
        target = target.to(pred.dtype)
        if loss == "mse":
            return (pred - target).square().mean((1, 2))
        if chunks > 1 and pred.shape[-1] > 1 and loss != "se":
            if order is not None:
                pred, target = pred[..., order], target[..., order]
            groups = zip(pred.chunk(min(chunks, pred.shape[-1]), -1), target.chunk(min(chunks, pred.shape[-1]), -1),
                         strict=True)
            parts = [set_loss(p, t, loss, blur, sinkhorn_weight, energy_weight, pairs=pairs) for p, t in groups]
            return torch.stack(parts).nanmean(0)
        if loss == "energy":
            return EnergyDistance.apply(pred, target.detach(), pairs)
        if loss not in ("sinkhorn", "se", "gaussian", "laplacian"):
            raise ValueError(f"loss = {loss!r}: use energy, sinkhorn, se, mse, gaussian or laplacian")
        plain = SamplesLoss("sinkhorn" if loss == "se" else loss, blur=blur, backend="tensorized")
        records = torch.is_grad_enabled()
        with torch.set_grad_enabled(records):  # geomloss switches gradients on and leaves them so
            found = plain(pred.contiguous(), target.contiguous())
        found = found if records else found.detach()
        return found if loss != "se" else (sinkhorn_weight * found
                                           + energy_weight * EnergyDistance.apply(pred, target.detach(), pairs))


# ---------------------------------------------------------------------------------------------------------------
# Metrics (as cell-eval and pdex define them; P groups of cells, G genes)
# ---------------------------------------------------------------------------------------------------------------
METRICS = {  # column of the table: larger is better
    "pearson_delta": True, "mae": False, "mse": False, "discrimination": True, "overlap_at_50": True,
    "energy_distance": False,
}  # fmt: skip
TOPS = (50, 100, 200, 500, None)  # sizes of the lists of differentially expressed genes; None is every significant one
FALSE_DISCOVERY_RATE = 0.05
ROUNDING = 1e-6  # effects below this are none: means of the same cells by another order of summation


def rows_by_group(group: np.ndarray, n_groups: int) -> list[np.ndarray]:
    """The rows of every group 0..n_groups - 1, in order; codes outside that range belong to none."""
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(n_groups + 1))
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def pseudobulk(x: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean of the cells x [N, G] of every group [n_groups, G], in float64; an empty group is nan."""
    means = np.full((n_groups, x.shape[1]), np.nan)
    for mean, rows in zip(means, rows_by_group(group, n_groups), strict=True):
        if len(rows):
            x[rows].mean(0, dtype=np.float64, out=mean)
    return means


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of rows of a and b [P, G] -> [P]; nan where a row is constant, as scipy and cell-eval do."""
    x, y = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return np.where((a == a[:, :1]).all(1) | (b == b[:, :1]).all(1), np.nan, r.clip(-1, 1))


def mean_distance(x: np.ndarray, y: np.ndarray, block: int = 1024) -> float:
    """Mean Euclidean distance of all pairs of rows of x [n, G] and y [m, G]; a set to itself (x is y) counts the
    zeros of its diagonal. Holds [block, block] distances at a time, computes in the precision of x."""
    itself, centre = x is y, y.mean(0, keepdims=True)  # |x|^2 + |y|^2 - 2xy loses least near the origin
    a = torch.from_numpy(np.ascontiguousarray(x - centre))
    b = a if itself else torch.from_numpy(np.ascontiguousarray(y - centre).astype(a.numpy().dtype))
    total = 0.0
    for i in range(0, len(a), block):
        for j in range(i if itself else 0, len(b), block):
            d = torch.cdist(a[i:i + block], b[j:j + block])
            if itself and i == j:
                d.fill_diagonal_(0)  # rounding, which is far from zero under the root
            total += d.sum(dtype=torch.float64).item() * (2 if itself and j > i else 1)
    return total / (len(a) * len(b))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """E|x - y| - E|x - x'|/2 - E|y - y'|/2 over all pairs (V-statistic), as geomloss' "energy" of uniform weights."""
    return mean_distance(x, y) - (mean_distance(x, x) + mean_distance(y, y)) / 2


def discrimination(predicted: np.ndarray, real: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """1 - rank / P of the true perturbation among all real pseudobulks [P, G] by L1 distance to the predicted one.

    target [P]: column of the perturbed gene, left out of the distances (knocking it down is no finding), -1 for none.
    Equals cell-eval's discrimination_score_l1; ties, arbitrary there, share their mean rank. Chance is (P + 1) / 2P.
    """
    score = np.empty(len(real))
    for p, guess in enumerate(predicted):
        difference = np.abs(real - guess)
        if target is not None and target[p] >= 0:
            difference[:, target[p]] = 0
        distance = difference.sum(1)
        rank = (distance < distance[p]).sum() + ((distance == distance[p]).sum() - 1) / 2
        score[p] = 1 - rank / len(real)
    return score


def rank_sum(x: np.ndarray, y: np.ndarray, group: np.ndarray | None = None, n_groups: int = 1,
             block: int = 1 << 18) -> np.ndarray:
    """Two-sided p-values [n_groups, G] of the Mann-Whitney test of every group of cells x [n, G] against y [m, G].

    Normal approximation with tie and continuity correction (scipy.stats.mannwhitneyu, method="asymptotic"), of
    float32 values; 1 where all values are equal. Without group, all of x is one. All groups are ranked by one sort
    of (gene, value, group) packed into 64 bits; zeros, most of expression, are counted and not sorted. block: values
    of a pass, which bound the memory.
    """
    n, m, G = len(x), len(y), x.shape[1]
    group = np.zeros(n, int) if group is None else group
    size = np.bincount(np.append(np.zeros(m, int), group + 1), minlength=n_groups + 1)  # group 0: y
    shift = np.uint64(n_groups.bit_length())
    code = np.append(np.zeros(m, np.uint64), (group + 1).astype(np.uint64))
    u, ties = np.zeros((2, n_groups, G))
    step = min(max(1, block // (m + n)), 1 << (32 - int(shift)))
    for start in range(0, G, step):
        genes = slice(start, start + step)
        values = np.ascontiguousarray(np.concatenate([y[:, genes], x[:, genes]]).T, np.float32)  # [genes, m + n]
        gene, cell = np.nonzero(values)
        bits = values[gene, cell].view(np.uint32)
        bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # as ordered as the numbers are
        key = (((gene.astype(np.uint64) << np.uint64(32)) | bits) << shift) | code[cell]
        key.sort()
        first = np.flatnonzero(np.append(True, key[1:] != key[:-1])[:len(key)])  # runs of gene, value and group
        count, key = np.diff(first, append=len(key)), key[first]
        member, value = (key & np.uint64((1 << int(shift)) - 1)).astype(int), key >> shift
        gene, control = (value >> np.uint64(32)).astype(int), member == 0
        head = np.append(True, value[1:] != value[:-1])[:len(value)]  # y's run comes first among equal values
        head = np.maximum.accumulate(np.where(head, np.arange(len(head)), 0))
        equal = np.where(control[head], count[head], 0)  # of y
        zeros, negative = (values[:, :m] == 0).sum(1), (values[:, :m] < 0).sum(1)
        before = np.cumsum(m - zeros) - (m - zeros)  # sorted values of y that belong to earlier genes
        below = np.cumsum(np.where(control, count, 0)) - before[gene] - equal / 2
        below += np.where((value >> np.uint64(31)) & np.uint64(1), zeros[gene], 0)
        equal[control] = 0  # from here on: of another run than this
        place, shape = gene * (n_groups + 1) + member, (len(values), n_groups + 1)
        pairs, tied, nonzero = (np.bincount(place, weight, shape[0] * shape[1]).reshape(shape)
                                for weight in (count * below, _ties(equal + count) - _ties(equal), count))
        zero = size - nonzero
        u[:, genes] = (pairs[:, 1:] + zero[:, 1:] * (negative + zeros / 2)[:, None]).T
        ties[:, genes] = (tied[:, 1:] + tied[:, :1] + _ties(zero[:, :1] + zero[:, 1:])).T
    size = size[1:, None].astype(float)
    total = size + m
    with np.errstate(divide="ignore", invalid="ignore"):  # all equal, or a group without cells
        sd = np.sqrt(size * m / 12 * (total + 1 - ties / (total * (total - 1))))
        z = (np.maximum(u, size * m - u) - size * m / 2 - 0.5) / sd
    p = torch.special.erfc(torch.from_numpy(z / np.sqrt(2))).numpy().clip(0, 1)
    return np.where(size == 0, np.nan, np.where(sd > 0, p, 1.0))


def _ties(n: np.ndarray) -> np.ndarray:
    n = n.astype(float)
    return n * n * n - n  # several times faster than n**3


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """p-values [..., G] adjusted to control the false discovery rate over the last axis (Benjamini, Hochberg 1995)."""
    order = np.argsort(p, axis=-1)[..., ::-1]  # from the largest
    scaled = np.take_along_axis(p, order, -1) * p.shape[-1] / np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(scaled)
    np.put_along_axis(adjusted, order, np.minimum.accumulate(scaled, -1).clip(0, 1), -1)
    return adjusted


def differential_expression(x: np.ndarray, control: np.ndarray, group: np.ndarray | None = None,
                            n_groups: int = 1) -> dict[str, np.ndarray]:
    """Genes in which groups of cells x [n, G] (log1p) differ from the cells control [m, G].

    Returns arrays [n_groups, G]: p (rank-sum test), adjusted (Benjamini-Hochberg), log_fold_change (base 2, of expm1
    of the means, as pdex does: infinite where one mean is 0, 0 where both are), order (significant genes by falling
    |log_fold_change|, then the others); and significant [n_groups], how many there are.
    """
    group = np.zeros(len(x), int) if group is None else group
    p = rank_sum(x, control, group, n_groups)
    adjusted = benjamini_hochberg(p)
    means = pseudobulk(x, group, n_groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(np.expm1(means) / np.expm1(control.mean(0, dtype=np.float64)))
    change[np.isnan(change)] = 0
    significant = adjusted < FALSE_DISCOVERY_RATE
    order = np.argsort(np.where(significant, -np.abs(change), np.inf), axis=1, kind="stable")
    return {"p": p, "adjusted": adjusted, "log_fold_change": change, "order": order, "significant": significant.sum(1)}


def overlap_top(predicted: dict, real: dict, n: int | None = 50, kind: str = "overlap") -> np.ndarray:
    """Part [P] of the n strongest significant genes that two results of differential_expression share.

    n shrinks to the significant genes there are: real ones for kind "overlap" (recall), predicted ones for
    "precision"; None takes them all; 0 where there are none (cell-eval's overlap_at_N and precision_at_N).
    """
    available, shared = (real if kind == "overlap" else predicted)["significant"], np.zeros(len(real["order"]))
    for i, most in enumerate(available):
        k = most if n is None else min(n, most)
        tops = [de["order"][i, :min(k, de["significant"][i])] for de in (predicted, real)]
        shared[i] = len(np.intersect1d(*tops)) / max(1, k)
    return shared


def baselines(means: np.ndarray, counts: np.ndarray, control_means: np.ndarray, control_counts: np.ndarray,
              held_out: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Predicted means [len(held_out), G] of every (cell type, perturbation), from the cells trained on alone.

    means [n_types, n_perts, G], counts [n_types, n_perts]: perturbed training cells, 0 where there are none (the
    control's own column, if any, must count 0 too); control_means [n_types, G], control_counts [n_types].
    An effect is mean - control mean of the same type.
    - control_mean: no effect.
    - perturbation_mean: control mean + mean effect of the perturbation over training types, each type weighing the same
      (arc-state's perturb_mean); of a perturbation never trained on, the mean effect of all (there: none).
    - context_mean: mean of all perturbed training cells of the type, each cell weighing the same (arc-state's
      context_mean); of a type without any, control mean + mean effect of all (there: the control mean, a weaker rival).
    The mean effect of all weighs perturbations the same, each averaged over types as above; zero if nothing trains.
    """
    seen = (counts > 0) & (control_counts > 0)[:, None]

    def effect(pert: int) -> np.ndarray:
        types = np.flatnonzero(seen[:, pert])
        return (means[types, pert] - control_means[types]).mean(0, dtype=np.float64)

    trained = np.flatnonzero(seen.any(0))
    effects = {p: effect(p) for p in trained}
    average = sum(effects.values()) / len(trained) if len(trained) else np.zeros(means.shape[2])
    base = np.array([control_means[t] for t, _ in held_out], np.float64)
    context = {t: np.average(means[t][known], axis=0, weights=counts[t][known]) if (known := counts[t] > 0).any()
               else control_means[t] + average for t in {t for t, _ in held_out}}
    return {"control_mean": base,
            "perturbation_mean": base + np.array([effects.get(p, average) for _, p in held_out]),
            "context_mean": np.array([context[t] for t, _ in held_out])}


def evaluate_conditions(pred: np.ndarray, pred_condition: np.ndarray, real: np.ndarray, real_condition: np.ndarray,
                        control: np.ndarray, control_type: np.ndarray, conditions: list[tuple[str, str]],
                        cell_types: list[str], baseline_means: dict[str, np.ndarray] | None = None,
                        genes: list[str] | None = None, expression: bool = True, energy_cells: int = 1000) -> dict:
    """Every metric of every condition, for the model and each baseline against the same real cells.

    pred [N, G], real [M, G] float32 cells, pred_condition [N] and real_condition [M] codes into conditions, the names
    (cell type, perturbation); control [C, G] real control cells, control_type [C] codes into cell_types;
    baseline_means: name -> [len(conditions), G] as of baselines. genes [G] names: a perturbation that bears a gene's
    name is discriminated without that gene. expression: log1p values, for which there is differential expression.

    Conditions of a cell type are compared with one another and with that type's control, predicted ones too. The cells
    of a baseline are control cells (as many as are real, evenly spaced) shifted by the predicted effect, expression
    clipped at 0; its pearson_delta, mae, mse and discrimination are of the predicted means themselves. A prediction
    without effect has pearson_delta 0 (nan in cell-eval); a real effect of none, nan, left out of the mean. Of more
    than energy_cells cells the energy distance takes that many, evenly spaced.

    Returns {"model" or baseline: {"per_condition": [{cell_type, perturbation, n_cells, metrics}], "mean": {metrics},
    "delta": predicted effects [P, G], "real_delta": real ones [P, G]}}; means weigh conditions the same.
    Raises DataError for a condition without predicted or real cells and a cell type without control cells.
    """
    for what, codes in (("predicted", pred_condition), ("real", real_condition)):
        for c in np.setdiff1d(np.arange(len(conditions)), codes)[:1]:
            raise DataError(f"condition ({', '.join(conditions[c])}) has no {what} cells: leave it out")
    names, shape = ["model", *(baseline_means or {})], (len(conditions), control.shape[1])
    delta, real_delta = {name: np.empty(shape) for name in names}, np.empty(shape)
    records: dict[str, list] = {name: [None] * len(conditions) for name in names}
    type_of = np.array([cell_types.index(cell_type) for cell_type, _ in conditions])
    column = {gene: g for g, gene in enumerate(genes or [])}
    target = np.array([column.get(perturbation, -1) for _, perturbation in conditions])
    for t in np.unique(type_of):
        members, base = np.flatnonzero(type_of == t), control[control_type == t]
        if not len(base):
            raise DataError(f"cell type {cell_types[t]} has no control cells: nothing to measure its effects against")
        code, control_mean = np.full(len(conditions), -1), base.mean(0, dtype=np.float64)
        code[members] = np.arange(len(members))
        truth = _describe(real, code[real_condition], base, expression, energy_cells)
        real_delta[members] = truth["mean"] - control_mean
        for name in names:
            if name == "model":
                guess = _describe(pred, code[pred_condition], base, expression, energy_cells)
            else:
                means = np.asarray(baseline_means[name], np.float64)[members]
                shifts = (means - control_mean).astype(base.dtype)
                shifts[np.abs(shifts) < ROUNDING] = 0  # rounding would lift all zeros, which the ranks would see
                cells = np.concatenate([base[np.arange(n) * len(base) // n] + shift
                                        for n, shift in zip(truth["n"], shifts, strict=True)])
                guess = _describe(cells.clip(min=0) if expression else cells, np.repeat(code[members], truth["n"]),
                                  base, expression, energy_cells) | {"mean": means}
            delta[name][members] = guess["mean"] - control_mean
            found = _compare(guess, truth, control_mean, target[members])
            for i, c in enumerate(members):
                records[name][c] = {"cell_type": conditions[c][0], "perturbation": conditions[c][1],
                                    "n_cells": truth["n"][i], **{k: float(v[i]) for k, v in found.items()}}
    return {name: {"per_condition": rows, "mean": _means(rows), "delta": delta[name], "real_delta": real_delta}
            for name, rows in records.items()}


def _describe(cells: np.ndarray, group: np.ndarray, control: np.ndarray, expression: bool, energy_cells: int) -> dict:
    """What the metrics need to know of the groups of cells 0..; a negative code is another cell type's."""
    if (group < 0).any():
        cells, group = cells[group >= 0], group[group >= 0]
    rows = rows_by_group(group, group.max() + 1)
    sets = [cells[r[np.arange(k) * len(r) // k]] for r in rows for k in [min(len(r), energy_cells)]]
    return {"n": [len(r) for r in rows], "sets": sets, "within": np.array([mean_distance(s, s) for s in sets]),
            "mean": pseudobulk(cells, group, len(rows)),
            "genes": differential_expression(cells, control, group, len(rows)) if expression else None}


def _compare(guess: dict, truth: dict, control_mean: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics [P] of the conditions of a cell type; guess and truth by _describe."""
    effect, real_effect = guess["mean"] - control_mean, truth["mean"] - control_mean
    error = guess["mean"] - truth["mean"]
    r = pearson(effect, real_effect)
    r[(np.ptp(effect, axis=1) < ROUNDING) & (np.ptp(real_effect, axis=1) > 0)] = 0
    found = {"pearson_delta": r, "mae": np.abs(error).mean(1), "mse": (error**2).mean(1),
             "discrimination": discrimination(guess["mean"], truth["mean"], target)}
    if truth["genes"]:
        found |= {f"{kind}_at_{n or 'N'}": overlap_top(guess["genes"], truth["genes"], n, kind)
                  for kind in ("overlap", "precision") for n in TOPS}
    between = np.array([mean_distance(a, b) for a, b in zip(guess["sets"], truth["sets"], strict=True)])
    return found | {"energy_distance": between - (guess["within"] + truth["within"]) / 2}


def _means(records: list[dict]) -> dict[str, float]:
    names = [k for k in records[0] if k not in ("cell_type", "perturbation", "n_cells")]
    columns = {k: np.array([r[k] for r in records]) for k in names}
    return {k: float(v[~np.isnan(v)].mean()) if not np.isnan(v).all() else float("nan") for k, v in columns.items()}


def best_baseline(results: dict, metric: str = "pearson_delta") -> str:
    """The baseline to beat: the name of the best of all but the model."""
    choose = max if METRICS[metric] else min
    return choose((name for name in results if name != "model"), key=lambda name: results[name]["mean"][metric])


def format_table(results: dict) -> str:
    """The means of evaluate_conditions as aligned text, a row the model and each baseline; * marks a column's best."""
    columns = [m for m in METRICS if m in results["model"]["mean"]]
    lines = [f"{'':<18}" + "".join(f"{m:>17}" for m in columns)]
    best = {m: (max if METRICS[m] else min)(r["mean"][m] for r in results.values()) for m in columns}
    for name, result in results.items():
        mean = result["mean"]
        lines.append(f"{name:<18}" + "".join(f"{mean[m]:>16.4g}{'*' if mean[m] == best[m] else ' '}" for m in columns))
    return "\n".join(line.rstrip() for line in lines)


def write_metrics(path: Path, results: dict) -> None:
    """A CSV of all metrics, a row for each condition under the model and under each baseline."""
    rows = [{"model": name, **record} for name, result in results.items() for record in result["per_condition"]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(folder: Path, name: str, draw, width: float = 7.0, height: float = 4.5) -> None:
    """Save folder/plots/name.png as drawn by draw(axes)."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    draw(figure.subplots())
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "plots" / f"{name}.png")


def plot_metrics(folder: Path, title: str, results: dict, most: int = 40) -> None:
    """plots/delta.png, METRIC_by_perturbation.png of the model and the best baseline, and loss.png (metrics.jsonl).

    Of many conditions 12 and `most` are shown, evenly spaced from the best to the worst.
    """
    model, history = results["model"], read_metrics(folder)
    records = model["per_condition"]
    labels = [f"{record['cell_type']}, {record['perturbation']}" for record in records]

    def ranked(metric: str, most: int) -> np.ndarray:
        values = np.array([record[metric] for record in records])
        order = np.argsort(-values if METRICS[metric] else values, kind="stable")  # nan comes last
        return order[np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)]

    def effects(axes):
        figure, shown = axes.figure, ranked("pearson_delta", 12)
        axes.remove()
        panels = figure.subplots(-(-len(shown) // 4), min(4, len(shown)), squeeze=False).flat
        for panel, c in zip(panels, shown, strict=False):
            true, guess = model["real_delta"][c], model["delta"][c]
            panel.axline((0, 0), slope=1, color="k", linewidth=0.6)
            panel.plot(true, guess, ".", markersize=2)
            least, top = min(true.min(), guess.min()), max(true.max(), guess.max())
            limits = (least - 0.05 * (top - least), top + 0.05 * (top - least))
            panel.set(xlim=limits, ylim=limits, aspect="equal")
            panel.set_title(f"{labels[c]}\nr = {records[c]['pearson_delta']:.3f}", fontsize=7)
            panel.tick_params(labelsize=6)
        for panel in figure.axes[len(shown):]:
            panel.set_axis_off()
        figure.supxlabel("true mean effect on each gene or feature (log1p, if expression)", fontsize=8)
        figure.supylabel("predicted", fontsize=8)
        figure.suptitle(title, fontsize=9, wrap=True)

    def by_perturbation(axes):
        shown = ranked(metric, most)
        rows = range(len(shown))
        for name in (best_baseline(results, metric), "model"):
            style = {"color": "C0", "markersize": 4} if name == "model" else {"color": "k", "markersize": 8,
                                                                              "markerfacecolor": "none"}
            axes.plot([results[name]["per_condition"][c][metric] for c in shown], rows, "o", **style,
                      label=name + " (best baseline)" * (name != "model"))
        axes.set_yticks(rows, [labels[c] for c in shown], fontsize=7)
        axes.invert_yaxis()
        axes.grid(axis="y", linewidth=0.3)
        axes.set_xlabel(f"{metric} ({'larger' if METRICS[metric] else 'smaller'} is better)")
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend(fontsize=8)

    def over_time(axes):
        for split, key in (("train", "loss"), ("eval", "val_loss")):
            line = [(r["step"], r[key]) for r in history if r["split"] == split and key in r]
            if line:
                axes.plot(*zip(*line, strict=True), marker=".", label="training" if split == "train" else "validation")
                axes.legend(fontsize=8)
        axes.set(xlabel="step", ylabel="loss")

    plot(folder, "delta", effects, width=8, height=1 + 2 * -(-min(12, len(records)) // 4))
    for metric in METRICS:
        if metric in model["mean"]:
            plot(folder, f"{metric}_by_perturbation", by_perturbation, height=1.5 + 0.14 * min(most, len(records)))
    if history:
        plot(folder, "loss", over_time)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints of the source, and of ours
# ---------------------------------------------------------------------------------------------------------------
SHAPE = {  # the settings that decide what a checkpoint's weights mean, and what the source has where they are absent
    "hidden_dim": None, "n_layers": 32, "n_heads": 32, "n_kv_heads": None, "head_dim": None, "d_ff": 11008,
    "transformer_backbone_key": "GPT2", "bidirectional_attention": False, "rotary": False, "n_encoder_layers": 2,
    "n_decoder_layers": 2, "use_basal_projection": True, "activation": "gelu", "predict_residual": True,
    "pert_norm": False,
}  # fmt: skip
GPT2_SHAPE = {"n_layers": 12, "n_heads": 12, "d_ff": None}
UNUSED = ("embed_tokens.", ".wte.", ".wpe.", ".attn.bias", ".attn.masked_bias", "inv_freq")  # never read here


class Inert(dict):
    """Takes the place of a class or function that a checkpoint names: it holds what it is given, and does nothing."""

    kind: type | None = None  # what torch's reader, which fills these only, must see instead: OrderedDict, list

    def __init__(self, *arguments, **named):
        super().__init__()

    def __setstate__(self, state) -> None:
        self.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key, value) -> None:
        type(self).kind = OrderedDict

    def append(self, item) -> None:
        type(self).kind = list

    extend = append


class Structure(pickle.Unpickler):
    """Reads a pickle without calling anything that it names, to learn which names stand for dicts and for lists."""

    def __init__(self, file):
        super().__init__(file)
        self.found: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str):
        return self.found.setdefault(f"{module}.{name}", type(name, (Inert,), {}))

    def persistent_load(self, tensor) -> None:
        return None


def stand_ins(path: Path) -> list[tuple]:
    """(what to use, name) for all that a checkpoint names beyond what torch's safe reader knows: nothing of it runs."""
    number = np.float64(0).__reduce__()[0]  # makes a numpy scalar of a dtype and bytes
    known = {"numpy.dtype": np.dtype, "numpy.core.multiarray.scalar": number, "numpy._core.multiarray.scalar": number}
    with zipfile.ZipFile(path) as archive:
        content = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(content) as file:
            structure = Structure(file)
            structure.load()
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [type(np.dtype(kind)) for kind in np.typecodes["All"]] + [
        (known.get(name) or structure.found[name].kind or Inert, name) for name in names]


def read_source_checkpoint(path: str | Path) -> tuple[dict, dict]:
    """(weights, settings) of a .ckpt of arc-state, of the State of July 2025 or of SmolState, or a bare state dict.

    Raises CheckpointError if the file is missing, damaged or foreign. No code of it runs.
    """
    path = Path(path)
    if not path.is_file():
        raise checkpoint.CheckpointError(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(stand_ins(path)):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for torn files; each means the same here
        raise checkpoint.CheckpointError(f"{path} is damaged or no checkpoint ({type(e).__name__})") from e
    found = found if isinstance(found, dict) else {}
    smol = "model_state_dict" in found
    weights = found.get("model_state_dict" if smol else "state_dict", found)
    weights = {plain_name(k): v for k, v in weights.items() if isinstance(k, str) and isinstance(v, torch.Tensor)
               } if isinstance(weights, dict) else {}
    if not any(name.startswith("pert_encoder.") for name in weights):
        raise checkpoint.CheckpointError(f"{path} is no checkpoint of State: it has no weights pert_encoder.*")
    config = found.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    settings = {}
    for given in ((model or {}).get("kwargs") if isinstance(model, dict) else {}, found.get("hyper_parameters")):
        plain = given if isinstance(given, dict) else {}
        settings |= {k: v.item() if isinstance(v, np.generic) else v for k, v in plain.items()
                     if v or not isinstance(v, Inert)}
    backbone = settings.get("transformer_backbone_kwargs")
    backbone = dict(backbone) if isinstance(backbone, dict) else {}
    # Before release 0.9.32 every Llama of State was bidirectional, and so is SmolState's, whatever the settings say.
    # That release brought the setting, and the argument basal_mapping_strategy, which Lightning saves with the others.
    old = {"control_pert", "gene_names", "batch_size"} <= settings.keys() and "basal_mapping_strategy" not in settings
    if (smol or old) and settings.get("transformer_backbone_key") == "llama":
        backbone.setdefault("bidirectional_attention", True)
    step = found.get("global_step", found.get("step", 0))
    return weights, settings | {"transformer_backbone_kwargs": backbone, "pert_norm": "pert_norm.weight" in weights,
                                "step": int(step) if isinstance(step, (int, np.integer)) else 0}


def plain_name(name: str) -> str:
    """A weight's name without what compilation, wrapping and PEFT put before it."""
    name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)
    return name.replace("transformer_backbone.base_model.model.", "transformer_backbone.").replace("._orig_mod", "")


def load_source_state_dict(model: StateTransitionPerturbationModel, weights: dict, partial: bool = False) -> list[str]:
    """Load weights under the source's names; its token and position embeddings, which are zero, are left out.

    Args:
        partial: what is missing, or of another shape, keeps its start.
    Returns: names of the model that were not loaded. Raises CheckpointError naming what does not fit, unless partial.
    """
    weights = {plain_name(k): v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if not any(part in k for part in UNUSED)}
    own = model.state_dict()
    fits = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    missing, unknown = [k for k in own if k not in fits], [k for k in weights if k not in own]
    if not partial and (missing or unknown):
        wrong = [f"{k} is {list(weights[k].shape)}, not {list(own[k].shape)}" for k in missing if k in weights]
        wrong += [f"{k} is missing" for k in missing if k not in weights] + [f"{k} is unknown" for k in unknown]
        raise checkpoint.CheckpointError(f"the weights do not fit this model: {'; '.join(wrong[:5])}"
                                         + f"; and {len(wrong) - 5} more" * (len(wrong) > 5))
    model.load_state_dict(fits, strict=False)
    return missing


def source_state_dict(model: StateTransitionPerturbationModel) -> dict[str, torch.Tensor]:
    """The weights as the source names them, with its frozen embedding of zeros."""
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    H = model.pert_encoder[-1].out_features
    backbone = model.transformer_backbone
    if any("lora_A" in k for k in weights):
        weights = {k.replace("transformer_backbone.", "transformer_backbone.base_model.model."): v
                   for k, v in weights.items()}
    prefix = "transformer_backbone." + "base_model.model." * any("lora_A" in k for k in weights)
    if isinstance(backbone, Llama):
        return weights | {prefix + "embed_tokens.weight": torch.zeros(32_000, H)}
    return weights | {prefix + "wte.weight": torch.zeros(50_257, H),
                      prefix + "wpe.weight": torch.zeros(model.cell_sentence_len + model.extra_tokens(), H)}


def source_shape(settings: dict, attention: str = "auto") -> dict:
    """Settings of the source as fields of Config: those of SHAPE, which decide what the weights mean.

    A Llama without bidirectional_attention: true is causal with rotary positions, as transformers has it. What else a
    checkpoint meant, `attention` (bidirectional | causal | rotary) may say.
    """
    backbone = settings.get("transformer_backbone_kwargs") or {}
    key = settings.get("transformer_backbone_key", "GPT2")
    found = SHAPE | (GPT2_SHAPE if key == "GPT2" else {})
    for name, value in {**settings, **backbone}.items():
        name = ALIASES.get(name) or name
        if name in found and value is not None:
            found[name] = value
    if key == "GPT2":
        found |= {"d_ff": found["d_ff"] or 4 * found["hidden_dim"], "bidirectional_attention": True}
        return found
    if attention != "auto":
        found |= {"bidirectional_attention": attention == "bidirectional"}
    found["rotary"] = attention == "rotary" or (attention == "auto" and not found["bidirectional_attention"])
    return found


def load_source_checkpoint(path: str | Path, attention: str = "auto") -> tuple[StateTransitionPerturbationModel, dict]:
    """(model, settings) of a checkpoint of the source, computing as it did. Raises CheckpointError."""
    weights, settings = read_source_checkpoint(path)
    sizes = {"input_dim", "output_dim", "pert_dim", "hidden_dim"}
    if missing := sorted(sizes - settings.keys()):
        raise checkpoint.CheckpointError(f"{path} has weights but not the settings {', '.join(missing)}: it can be "
                                         "trained from with init_from, but not be used by itself")
    shape = source_shape(settings, attention)
    if shape["transformer_backbone_key"] == "llama":
        settings["transformer_backbone_kwargs"] |= {k: shape[k] for k in ("bidirectional_attention", "rotary")}
        if not shape["bidirectional_attention"]:
            print(f"note: {path} is causal{' with rotary positions' * shape['rotary']}: the order of cells counts. If "
                  "it was trained otherwise: source_attention=bidirectional")
    if not any(name.startswith("gene_decoder.") for name in weights):
        settings["gene_decoder_bool"] = False
    decoder = settings.get("decoder_cfg")
    if decoder is None and any(name.startswith("gene_decoder.") for name in weights):  # old releases: read it off
        linear = [v for k, v in weights.items() if k.startswith("gene_decoder.") and v.ndim == 2]
        settings |= {"gene_decoder_bool": True, "decoder_cfg": {
            "latent_dim": linear[0].shape[1], "gene_dim": linear[-1].shape[0],
            "hidden_dims": [len(v) for v in linear[:-1]],
            "residual_decoder": "gene_decoder.final_layer.0.weight" in weights}}
    settings.setdefault("compat_relu", True)  # as it computed
    for name, part in (("lora", "lora_"), ("use_batch_token", "batch_token")):  # which older releases pass over
        settings[name] = settings.get(name) if any(part in key for key in weights) else None
    try:
        model = StateTransitionPerturbationModel(**{k: v for k, v in settings.items() if k != "step"})
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise checkpoint.CheckpointError(f"{path}: its settings make no model ({type(e).__name__}: {e})") from e
    load_source_state_dict(model, weights)
    return model, settings


def start_from_checkpoint(cfg: Config) -> tuple[Config, dict]:
    """For init_from: (cfg with the shape of that checkpoint, its weights). Raises CheckpointError."""
    path = Path(cfg.init_from)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise checkpoint.CheckpointError(f"init_from = {cfg.init_from}: there is no checkpoint {path}")
    if checkpoint.experiment_of(path) == "train_state":
        state = checkpoint.load(path, __file__)
        weights = state["model"]
        shape = {k: state["config"][k] for k in SHAPE}
    else:
        weights, settings = read_source_checkpoint(path)
        shape = source_shape(settings, cfg.source_attention) if "hidden_dim" in settings else {}
    taken = [f"{k} = {v}" for k, v in shape.items() if getattr(cfg, k) != v]
    for k, v in shape.items():
        setattr(cfg, k, v)
    if taken:
        print(f"note: taken over from {path}: {', '.join(taken)}")
    return cfg, weights


def initialise(model: StateTransitionPerturbationModel, weights: dict, cfg: Config) -> list[str]:
    """Put the weights of another run in; returns the names of those that stay fresh.

    The perturbation encoder stays fresh where it reads one-hot names, which mean other perturbations in other data;
    what knows batches does so always.
    Encoders and decoders of other widths stay fresh as a whole, so that no half of one is trained and the other not.
    """
    own = model.state_dict()
    adapted = {k.replace(".base_layer.", "."): k for k in own if ".base_layer." in k}  # what LoRA has wrapped
    weights = {adapted.get(plain_name(k), plain_name(k)): v for k, v in weights.items()}
    parts = ("pert_encoder", "basal_encoder", "project_out", "final_down_then_up",
                                      "gene_decoder", "batch_encoder", "batch_classifier")
    fresh = {part for part in parts if any(k.startswith(part + ".") and k in own and own[k].shape != v.shape
                                           for k, v in weights.items())}
    fresh |= {"batch_encoder", "batch_classifier"} | (set() if cfg.perturbation_features_file else {"pert_encoder"})
    kept = {k: v for k, v in weights.items() if k.split(".")[0] not in fresh}
    missing = load_source_state_dict(model, kept, partial=True)
    lost = [k for k in missing if k.startswith("transformer_backbone.") and "lora_" not in k]
    adapters = any("lora_" in k and k not in own for k in weights)
    if lost or adapters:
        raise checkpoint.CheckpointError(f"init_from = {cfg.init_from}: its transformer does not fit this model"
                                         + (", for it has LoRA adapters: set lora = true and its lora_r" if adapters
                                            else f" ({lost[0]} and {len(lost) - 1} more): is it of another size?"))
    return missing


# ---------------------------------------------------------------------------------------------------------------
# Prediction and evaluation
# ---------------------------------------------------------------------------------------------------------------
def expressed(model: StateTransitionPerturbationModel, cells: torch.Tensor) -> torch.Tensor:
    """Predicted cells as what they are measured in: genes by the decoder where there is one."""
    return cells if model.gene_decoder is None else model.gene_decoder(cells)


@torch.no_grad()
def validate(model: StateTransitionPerturbationModel, sentences: tuple, experiment: Experiment, store: Store,
             rt: Runtime, cfg: Config) -> dict:
    """Mean loss terms over sentences, rows of targets [n, S] and of controls [n, S, k]. Collective."""
    model.eval()
    targets, controls = sentences
    total, count, step = {}, 0, max(1, cfg.batch_size // (cfg.grad_accum * rt.world_size))
    for i in range(0, len(targets), step * rt.world_size):
        mine = np.arange(i, min(i + step * rt.world_size, len(targets)))[rt.rank :: rt.world_size]
        if not len(mine):
            continue
        with rt.autocast():
            terms = model(make_batch(experiment, store, targets[mine], controls[mine]), losses=True)
        for name, value in terms.items():
            if name != "per_set":
                total[name] = total.get(name, 0.0) + float(value) * len(mine)
        count += len(mine)
    model.train()
    parts = [part for part in rt.gather((total, count)) if part[1]]
    n = sum(count for _, count in parts)
    return {name: sum(part[name] for part, _ in parts) / n for name in parts[0][0]}


@torch.no_grad()
def predict_sentences(model: StateTransitionPerturbationModel, sentences: list, experiment: Experiment, store: Store,
                      rt: Runtime, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """Predicted cells of sentences of any lengths: rows of the targets [N], cells [N, G]. Collective.

    Sentences of one length make a batch together; none is filled up, so that no cell is counted twice.
    """
    model.eval()
    mine, found = sorted(sentences[rt.rank :: rt.world_size], key=lambda s: len(s[0])), []
    at, most = 0, max(1, cfg.batch_size) * cfg.cell_set_len
    while at < len(mine):
        size = len(mine[at][0])
        end = at + 1
        while end < len(mine) and len(mine[end][0]) == size and (end + 1 - at) * size <= most:
            end += 1
        targets, controls = (np.stack([s[i] for s in mine[at:end]]) for i in (0, 1))
        with rt.autocast():
            cells = expressed(model, model.predict(make_batch(experiment, store, targets, controls))["cells"])
        found.append((targets.ravel(), cells.flatten(0, 1).float().cpu().numpy()))
        at = end
    model.train()
    rows = np.concatenate([rows for rows, _ in found]) if found else np.empty(0, np.int64)
    cells = np.concatenate([cells for _, cells in found]) if found else np.empty((0, 0), np.float32)
    parts = [part for part in rt.gather((rows, cells)) if len(part[0])]
    rows, cells = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    order = np.argsort(rows, kind="stable")
    return rows[order], cells[order]


def predictions(model: StateTransitionPerturbationModel, experiment: Experiment, store: Store, split: str, cfg: Config,
                rt: Runtime):
    """One held-out cell type after the other: {cell_type, rows, pred [N, G], real [N, G], controls, control [C, G]}.

    rows and controls are rows of the experiment: the perturbed cells predicted, once each, and all control cells of
    the type. Yields on every rank; what is measured, on rank 0 alone. Memory is that of one cell type.
    """
    which = "input" if model.gene_decoder is None else "counts"
    sentences = list(zip(*Sentences(experiment, split, cfg, whole=True).plan(0), strict=True))

    for code in sorted({int(experiment.cell_type[targets[0]]) for targets, _ in sentences}):
        chosen = [s for s in sentences if experiment.cell_type[s[0][0]] == code
                  and experiment.perturbation[s[0][0]] != experiment.control]
        if not chosen:
            continue
        rows, cells = predict_sentences(model, chosen, experiment, store, rt, cfg)
        found = {"cell_type": code, "rows": rows, "pred": cells}
        if rt.is_main:
            found["controls"] = np.flatnonzero(experiment.is_control & (experiment.cell_type == code)
                                               & (experiment.member > 0))
            for name, of in (("real", rows), ("control", found["controls"])):
                found[name] = fetch(store, of, which)
        yield found


def fetch(store, rows: np.ndarray, which: str = "input", block: int = 8_192) -> np.ndarray:
    """Cells of rows as a float32 array [N, G] in memory, read in blocks."""
    parts = [store.rows(rows[i : i + block], which).float().cpu().numpy() for i in range(0, len(rows), block)]
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


def training_means(experiment: Experiment, store: Store, which: str, block: int = 8_192) -> tuple[np.ndarray, ...]:
    """What `baselines` reads of the cells trained on, in float64: means [types, perturbations, G] and numbers
    [types, perturbations] of perturbed cells, means [types, G] and numbers [types] of control cells."""
    e = experiment
    shape = len(e.cell_types), len(e.perturbations)
    perturbed, controls = e.rows("train", controls=False), np.flatnonzero(e.is_control & (e.member > 0))
    rows = np.concatenate([perturbed, controls])
    place = e.cell_type[rows].astype(np.int64) * shape[1] + e.perturbation[rows]
    order = np.argsort(place, kind="stable")
    rows, place = rows[order], place[order]
    counts = np.bincount(place, minlength=shape[0] * shape[1])
    sums = None
    for i in range(0, len(rows), block):
        cells = store.rows(rows[i : i + block], which).double().cpu().numpy()
        sums = np.zeros((len(counts), cells.shape[1])) if sums is None else sums
        first = np.flatnonzero(np.diff(place[i : i + block], prepend=-1))
        sums[place[i : i + block][first]] += np.add.reduceat(cells, first)
    means = (sums / np.maximum(counts, 1)[:, None]).reshape(*shape, -1)
    counts = counts.reshape(shape)
    base, number = means[:, e.control].copy(), counts[:, e.control].copy()
    counts[:, e.control] = 0
    return means, counts, base, number


def evaluate(model: StateTransitionPerturbationModel, experiment: Experiment, store: Store, cfg: Config, rt: Runtime,
             keep=None) -> dict:
    """The model and the baselines on every held-out condition: what evaluate_conditions returns. Collective.

    Held out is the test split, or validation where there is none. keep: called with what `predictions` yields.
    """
    split = "test" if len(experiment.rows("test", controls=False)) else "val"
    which = "input" if model.gene_decoder is None else "counts"
    known = training_means(experiment, store, which) if rt.is_main else None
    found = []
    for part in predictions(model, experiment, store, split, cfg, rt):
        if not rt.is_main:
            continue
        if keep:
            keep(part)
        code, perts = part["cell_type"], experiment.perturbation[part["rows"]]
        held, condition = np.unique(perts, return_inverse=True)
        name = experiment.cell_types[code]
        conditions = [(name, experiment.perturbations[p]) for p in held]
        means = baselines(*known, [(code, int(p)) for p in held])
        genes = experiment.genes if which == "input" else experiment.count_genes
        found.append(evaluate_conditions(
            part["pred"], condition, part["real"], condition, part["control"], np.zeros(len(part["control"]), int),
            conditions, [name], means, genes, expression=cfg.embed_key in (None, "X", "X_hvg") or which == "counts"))
    if not rt.is_main:
        return {}
    joined = {}
    for name in found[0]:
        records = [record for part in found for record in part[name]["per_condition"]]
        joined[name] = {"per_condition": records, "mean": _means(records), **{
            k: np.concatenate([part[name][k] for part in found]) for k in ("delta", "real_delta")}}
    return joined


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def open_data(cfg: Config) -> Experiment:
    """The experiment that cfg.toml_config_path describes; the synthetic default is made where it is missing.

    Raises DataError.
    """
    path = Path(cfg.toml_config_path)
    if cfg.toml_config_path == SYNTHETIC:
        make_once(path, lambda: synthetic(out_dir=str(path.parent)))
    return Experiment(cfg)


def start_at_mean(model: StateTransitionPerturbationModel, experiment: Experiment, store: Store, most: int = 4_096
                  ) -> None:
    """Set the last biases to the mean control cell of training.

    Without it, output features that are negative for all cells at the start stay 0 behind the ReLU for ever, as nothing
    of the loss reaches them, and the others need hundreds of steps to find the mean.
    """
    rows = experiment.rows("train", controls=True)
    rows = rows[experiment.is_control[rows]]
    rows = rows[:: -(-len(rows) // most)]
    last = model.project_out
    if model.output_space == "all" and model.predict_residual:
        last = model.final_down_then_up
    with torch.no_grad():
        last[-1].bias.copy_(store.rows(rows).mean(0))
        if model.gene_decoder is not None:
            decoder = model.gene_decoder
            (decoder.final_layer if decoder.residual else decoder.decoder)[-2].bias.copy_(
                store.rows(rows, "counts").mean(0))


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up to lr, then constant, or a cosine down to min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    least = min(cfg.lr, cfg.min_lr)
    return least + (cfg.lr - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: nn.Module, cfg: Config, rt: Runtime) -> torch.optim.Optimizer:
    """Of what is not frozen: AdamW as SmolState has it, or Adam as State has."""
    params = [p for p in model.parameters() if p.requires_grad]
    if cfg.optimizer == "adam":
        return torch.optim.Adam(params, lr=cfg.lr, fused=rt.device.type in ("cuda", "cpu"))
    return rt.adamw(params, lr=cfg.lr, weight_decay=cfg.weight_decay)


def train_step(model: nn.Module, batch: dict, rt: Runtime, cfg: Config) -> dict:
    """Forward and backward over the micro-batches of a batch; returns the loss terms, means over all ranks."""
    totals, parts = {}, [dict(zip(batch, values, strict=True))
                         for values in zip(*(value.chunk(cfg.grad_accum) for value in batch.values()), strict=True)]
    for i, part in enumerate(parts):
        with rt.sync(model, last=i == len(parts) - 1):
            with rt.autocast():
                terms = model(part, losses=True)
            rt.backward(terms["loss"] / len(parts))
        for name, value in terms.items():
            if name != "per_set":
                totals[name] = totals.get(name, 0.0) + value.detach() / len(parts)
    return dict(zip(totals, rt.mean(torch.stack([*totals.values()])), strict=True))


def finish(model, experiment: Experiment, store: Store, cfg: Config, rt: Runtime, folder: Path, keep=None) -> dict:
    """Measure on what was held out: metrics.csv, results.json, pictures; returns the summary. Collective."""
    results = evaluate(model, experiment, store, cfg, rt, keep)
    summary = {}
    if rt.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_metrics(folder / "metrics.csv", results)
        means = {name: result["mean"] for name, result in results.items()}
        (folder / "results.json").write_text(json.dumps({
            name: {"mean": result["mean"], "per_condition": result["per_condition"]}
            for name, result in results.items()}, indent=1) + "\n", encoding="utf-8")
        title = f"{Path(cfg.toml_config_path).stem}: {len(results['model']['per_condition'])} held-out conditions"
        plot_metrics(folder, title, results)
        summary = means["model"] | {"baselines": {k: v for k, v in means.items() if k != "model"},
                                    "conditions": len(results["model"]["per_condition"])}
        print(format_table(results))
    rt.barrier()
    return summary


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises DataError, CheckpointError (bad input, before anything is written) and FloatingPointError (the loss).
    """
    began, folder = time.perf_counter(), checkpoint.local_folder(cfg.out_dir)
    with Runtime(cfg) as rt:
        if cfg.batch_size % (cfg.grad_accum * rt.world_size):
            fail(f"batch_size = {cfg.batch_size} must be a multiple of grad_accum * ranks = "
                 f"{cfg.grad_accum * rt.world_size}")
        initial = {}
        if cfg.init_from:
            cfg, initial = start_from_checkpoint(cfg)
        experiment = open_data(cfg)
        if not any(len(experiment.rows(split, controls=False)) for split in ("val", "test")):
            raise DataError(f"{cfg.toml_config_path} holds nothing out: name cells for test or val, or leave some "
                            "conditions for validation with val_fraction = 0.1")
        dims = experiment.dims()
        model = build_model(cfg, dims)
        fresh = initialise(model, initial, cfg) if initial else []
        model.to(rt.device)
        rt.reseed(rt.rank)
        params = [p for p in model.parameters() if p.requires_grad]
        if not params:
            fail("nothing is left to train: freeze_pert_backbone froze everything")
        optimizer = make_optimizer(model, cfg, rt)
        store = Store(experiment, rt.device, cfg)
        if not cfg.init_from or "project_out.0.weight" in fresh:
            start_at_mean(model, experiment, store)
        batches, finite, watch = Batches(rt, experiment, store, cfg), FiniteCheck(rt.device), Stopwatch()
        held = None  # without validation the last step is the best
        if len(experiment.rows("val", controls=False)):
            held = [part[: cfg.eval_sentences] for part in Sentences(experiment, "val", cfg).plan(0)]
        save_interval = cfg.save_interval or cfg.eval_interval
        cells_per_step = cfg.batch_size * cfg.cell_set_len

        path, state, changes = checkpoint.start_from(cfg, folder, __file__, lambda old: differences(old, cfg))
        step, best, terms, laps = 0, math.inf, {}, 0
        known = {"dims": dims, **experiment.maps()}
        if state:
            if other := [k for k, v in known.items() if state["extra"].get(k) != v]:
                raise checkpoint.CheckpointError(f"{path} is of other data ({', '.join(other)} differ): use another "
                                                 "out_dir, or resume=never to train anew there")
            step, best, _, _ = checkpoint.restore(rt, state, path, folder, model, optimizer)
        trained = rt.wrap(model)

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, cfg.max_steps) as log:
            if rt.is_main:
                checkpoint.clear(folder, after=step)
                write_maps(folder, experiment, dims)
            log.say(rt.describe())
            log.say(describe(experiment, store, model, cfg))
            if fresh:
                log.say(f"from {cfg.init_from}; these start anew: {', '.join(fresh)}")
            if state:
                log.say(f"resumed from {path} at step {step}" + "".join(f"\n  {line}" for line in changes))
            lap = step
            watch.start()
            while step < cfg.max_steps:
                batch = batches(step)
                lr = learning_rate(step, cfg)
                found = train_step(trained, batch, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)
                step += 1

                last, stops = step == cfg.max_steps, rt.stopping(step)
                evaluates = last or step % cfg.eval_interval == 0
                logs = evaluates or step % cfg.log_interval == 0
                saves = last or stops or step % save_interval == 0
                finite.add(step, found["loss"])
                terms = {k: terms.get(k, 0.0) + v for k, v in found.items()}
                laps += 1
                log.progress(step)
                if not (logs or saves):
                    continue

                finite.verify(step, model, lr)
                rt.synchronize()
                speed = watch.pause((step - lap) * cells_per_step)
                if logs:
                    means = {k: float(v) / laps for k, v in terms.items()}  # of the steps since the last line
                    terms, laps = {}, 0
                    log.train(step, means | {"lr": lr, "grad_norm": float(norm), "cells_per_s": speed,
                                             "epoch": step * cfg.batch_size / len(batches.sentences)},
                              lr, norm, speed, left=(cfg.max_steps - step) * cells_per_step / speed, unit="cells",
                              loss=means["loss"])
                improved = False
                if evaluates and held:
                    values = {f"val_{k}": v for k, v in validate(model, held, experiment, store, rt, cfg).items()}
                    improved = values["val_loss"] < best
                    best = min(best, values["val_loss"])
                    log.metrics(step, "eval", values)
                    shown = {"val_loss": values["val_loss"]} | (values if len(values) > 2 else {})
                    log.say(f"step {step:>6} eval | " + " | ".join(f"{k} {v:.5f}" for k, v in shown.items())
                            + " *" * improved)
                if saves or improved:
                    saved = checkpoint.capture(rt, __file__, config_dict(cfg), step, model, optimizer, best,
                                               known | {"ended": last}, {})
                    if rt.is_main:
                        checkpoint.save(saved, folder, improved, cfg.keep_last != 0, cfg.keep_last)
                if stops and not last:
                    log.say(f"stopped by a signal after step {step}; the same command goes on from there")
                    return {"stopped_at": step}
                lap = step
                watch.start()

            rt.barrier()
            if (folder / "best.pt").exists():
                model.load_state_dict(checkpoint.load(folder / "best.pt", __file__)["model"])
            if cfg.source_files and rt.is_main:
                write_source_files(folder, model, experiment, dims, cfg, step)
            result = finish(model, experiment, store, cfg, rt, folder)
            summary = result | {"val_loss": best, "steps": step, "seconds": time.perf_counter() - began,
                                "cells_per_second": watch.units / watch.seconds if watch.seconds else 0.0,
                                "config_hash": config_hash(cfg), "torch": torch.__version__, "device": str(rt.device)}
            log.summary(summary)
            if rt.is_main:
                log.say(verdict(result, folder))
            return summary


def verdict(result: dict, folder: Path) -> str:
    """The last line of a run: whether the model is better than knowing means."""
    rivals = result["baselines"]
    name, least = max(rivals, key=lambda k: rivals[k]["pearson_delta"]), min(rivals, key=lambda k: rivals[k]["mae"])
    best, mine = rivals[name]["pearson_delta"], result["pearson_delta"]
    judged = "beats every baseline" if mine > best else f"DOES NOT BEAT the baseline {name}"
    worse = " (worse)" if result["mae"] >= rivals[least]["mae"] else ""
    return (f"done: the model {judged} on {result['conditions']} held-out conditions: Pearson delta {mine:.4f}, best "
            f"baseline {best:.4f} ({name}); MAE {result['mae']:.4f}{worse}, best baseline {rivals[least]['mae']:.4f} "
            f"({least}); pictures in {folder / 'plots'}")


def describe(experiment, store, model: nn.Module, cfg: Config) -> str:
    size, moving = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    counts = {split: len(experiment.rows(split, controls=False)) for split in ("train", "val", "test")}
    return (f"{cfg.toml_config_path}: {len(experiment.cell_type):,} cells of {len(experiment.cell_types)} cell types, "
            f"{len(experiment.perturbations) - 1} perturbations and {cfg.control_pert}; perturbed cells: "
            + ", ".join(f"{split} {n:,}" for split, n in counts.items())
            + f" | {'read from disk' if store.streamed else 'held in memory'}\n"
            f"State: {size:,} parameters" + f", {moving:,} trained" * (moving != size)
            + f" | {cfg.max_steps:,} steps of {cfg.batch_size} sentences of {cfg.cell_set_len} cells | {cfg.out_dir}")


def write_maps(folder: Path, experiment, dims: dict) -> None:
    """var_dims.json, pert_onehot_map.pt, cell_type_map.json and batch_map.json: what the model's numbers mean."""
    (folder / "var_dims.json").write_text(json.dumps(dims | {
        "gene_names": experiment.count_genes if dims["decodes"] else experiment.genes,
        "pert_names": experiment.perturbations}, indent=1) + "\n", encoding="utf-8")
    torch.save(dict(zip(experiment.perturbations, torch.as_tensor(experiment.perturbation_features), strict=True)),
               folder / "pert_onehot_map.pt")
    for name, values in (("cell_type", experiment.cell_types), ("batch", experiment.batches)):
        codes = {value: code for code, value in enumerate(values)}
        (folder / f"{name}_map.json").write_text(json.dumps(codes, indent=1) + "\n", encoding="utf-8")


def write_source_files(folder: Path, model, experiment, dims: dict, cfg: Config, step: int) -> None:
    """The run as arc-state lays it out, for its own tools (`state tx infer`): config.yaml, var_dims.pkl,
    checkpoints/final.ckpt, *_onehot_map.torch."""
    import yaml

    settings = model_settings(cfg, dims)
    columns = ("toml_config_path", "embed_key", "output_space", "pert_col", "cell_type_key", "batch_col",
               "control_pert", "basal_mapping_strategy")
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "data": {"name": "PerturbationDataModule", "kwargs": {k: getattr(cfg, k) for k in columns}},
        "model": {"name": "state", "kwargs": settings}, "training": {"max_steps": cfg.max_steps, "lr": cfg.lr}}))
    (folder / "checkpoints").mkdir(exist_ok=True)
    torch.save({"state_dict": source_state_dict(model), "hyper_parameters": settings, "global_step": step, "epoch": 0,
                "pytorch-lightning_version": "2.5.0", "loops": {}, "callbacks": {}, "optimizer_states": [],
                "lr_schedulers": []}, folder / "checkpoints" / "final.ckpt")
    names = {"gene_names": experiment.genes, "pert_names": experiment.perturbations}
    (folder / "var_dims.pkl").write_bytes(pickle.dumps({k: v for k, v in dims.items() if k != "decodes"} | names))
    for name, values in (("cell_type", experiment.cell_types), ("batch", experiment.batches)):
        torch.save(dict(zip(values, torch.eye(len(values)), strict=True)), folder / f"{name}_onehot_map.torch")


def load_source_run(path: Path, device: str, attention: str = "auto") -> tuple[Config, nn.Module, int, dict]:
    """The same of a .ckpt of the source; its perturbations mean what pert_onehot_map.pt of its run folder says."""
    model, settings = load_source_checkpoint(path, attention)
    dims = {k: settings.get(k) for k in ("input_dim", "output_dim", "pert_dim", "batch_dim", "gene_dim", "hvg_dim")}
    if hasattr(model, "batch_encoder"):
        print(f"note: {path} knows batches by number: those of other data, or in another order, are others to it")
    features = next((file for folder in (path.parent, path.parent.parent)
                     if (file := folder / "pert_onehot_map.pt").exists()), None)
    if features is None:
        print(f"note: there is no pert_onehot_map.pt beside {path}: perturbations are numbered as sorted in the TOML")
    names = ("cell_set_len", "embed_key", "output_space", "basal_mapping_strategy", "control_pert", "batch_encoder")
    cfg = Config(device=device, perturbation_features_file=str(features or ""),
                 **{k: settings[k] for k in names if k in settings})
    return cfg, model, settings["step"], {"dims": dims | {"decodes": model.gene_decoder is not None}}


def load_run(path: str | Path, device: str = "auto", attention: str = "auto") -> tuple[Config, nn.Module, int, dict]:
    """(settings, model, steps done, extra state) of a run folder or checkpoint, ours or the source's .ckpt.

    attention: of a source checkpoint, see source_shape. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_file() and checkpoint.experiment_of(path) != "train_state":
        return load_source_run(path, device, attention)
    state = checkpoint.load(path / "best.pt" if (path / "best.pt").exists() else path, __file__)
    cfg, extra = from_dict(Config, state["config"], str(path)), state["extra"]
    cfg.device = device
    if cfg.perturbation_features_file and not Path(cfg.perturbation_features_file).exists():
        cfg.perturbation_features_file = str((path if path.is_dir() else path.parent) / "pert_onehot_map.pt")
    model = build_model(cfg, extra["dims"])
    model.load_state_dict(state["model"])
    return cfg, model, state["step"], extra


def open_run_data(cfg: Config, extra: dict) -> Experiment:
    """The experiment of a run's settings, with the run's numbers for perturbations and batches, whatever its TOML.

    Raises DataError for other genes, and for perturbations or batches that the model has no number for.
    """
    experiment = open_data(cfg)
    for name, genes in (("genes", experiment.genes), ("count_genes", experiment.count_genes)):
        if extra.get(name) is not None and list(genes or []) != list(extra[name]):
            raise DataError(f"{cfg.toml_config_path} has other {name} than this run, or in another order: "
                            f"{len(genes or [])} against {len(extra[name])}")
    if "perturbations" in extra and not cfg.perturbation_features_file:
        places = codes_of(experiment.perturbations, extra["perturbations"], "perturbation", cfg.toml_config_path)
        experiment.pert_dim = len(extra["perturbations"])
        experiment.features = torch.eye(experiment.pert_dim)[places]
    if "batches" in extra and cfg.batch_encoder:
        places = codes_of(experiment.batches, extra["batches"], "batch", cfg.toml_config_path)
        experiment.batch, experiment.batches = np.array(places, np.int32)[experiment.batch], extra["batches"]
    elif cfg.batch_encoder and experiment.batch_dim > (extra["dims"]["batch_dim"] or 0):
        raise DataError(f"{cfg.toml_config_path} has {experiment.batch_dim} batches, more than the model's "
                        f"{extra['dims']['batch_dim']}")
    experiment.batch_dim = extra["dims"]["batch_dim"]
    if experiment.input_dim != extra["dims"]["input_dim"] or experiment.pert_dim != extra["dims"]["pert_dim"]:
        raise DataError(f"{cfg.toml_config_path} is not the data of this run: cells have {experiment.input_dim} and "
                        f"perturbations {experiment.pert_dim} features, the model's {extra['dims']['input_dim']} and "
                        f"{extra['dims']['pert_dim']}")
    return experiment


def known_perturbations(cfg: Config, extra: dict) -> dict[str, torch.Tensor]:
    """The features [pert_dim] of every perturbation a run knows: one-hot by its own list, or of its features file."""
    if cfg.perturbation_features_file:
        return load_features(cfg.perturbation_features_file)
    names = extra.get("perturbations") or []
    return dict(zip(names, torch.eye(len(names)), strict=True))


def codes_of(names: list[str], known: list[str], what: str, where: str) -> list[int]:
    """Places of names in `known`. Raises DataError for one that is not there."""
    places = {name: i for i, name in enumerate(known)}
    for name in names:
        if name not in places:
            raise DataError(f"{where}: the {what} {name!r} is not of this model's training{suggest(name, known)}")
    return [places[name] for name in names]


def analyze(cfg: Config) -> dict:
    """The final measurements and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = Path(cfg.analyze)
    folder = path if path.is_dir() else path.parent
    saved, model, step, extra = load_run(path, cfg.device, cfg.source_attention)
    for name in ("precision", "toml_config_path", "ram_budget_gb"):  # what may differ from the run, if asked to
        if getattr(cfg, name) != getattr(Config(), name):
            setattr(saved, name, getattr(cfg, name))
    with Runtime(saved) as rt:
        experiment = open_run_data(saved, extra)
        result = finish(model.to(rt.device), experiment, Store(experiment, rt.device, saved), saved, rt, folder)
    print(f"step {step}: " + verdict(result, folder).removeprefix("done: "))
    return result


def arguments(argv: list[str]) -> list[str]:
    """A command line of the source as one of ours: model=state_sm is config/state_sm.py, other groups are left out."""
    found = []
    for word in argv:
        key, _, value = word.partition("=")
        if key.lstrip("-") == "model" and value not in SIZES:
            fail(f"there is no model {value!r}{suggest(value, SIZES)}")
        if word not in ("data=perturbation", "training=default", "wandb=default"):
            found.append(f"config/{SIZES[value]}.py" if key.lstrip("-") == "model" else word)
    return found


def source_training(argv: list[str]) -> list[str]:
    """How the source trains, where its training YAML, which does not say so, is among the configuration files: State
    by Adam at a constant rate, SmolState by AdamW along a cosine."""
    for path in (Path(word) for word in argv if word.endswith((".yaml", ".yml")) and Path(word).is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "train_seed:" in text and "gradient_clip_val:" in text:
            kind = ("adam", "constant") if "use_mfu:" in text else ("adamw", "cosine")
            print(f"note: as the source of {path} trains: optimizer={kind[0]}, schedule={kind[1]}, warmup_steps=0")
            return [f"--optimizer={kind[0]}", f"--schedule={kind[1]}", "--warmup_steps=0"]
    return []


def main(argv: list[str] | None = None) -> dict:
    argv = arguments(sys.argv[1:] if argv is None else argv)
    argv = source_training(argv) + argv
    cfg = configure(Config, argv, aliases=ALIASES)
    asked = any(re.match(r"-*([\w.]+\.)?device(=|$)", word) for word in argv)
    if cfg.device == "cuda" and not torch.cuda.is_available() and not asked:
        print("note: device = cuda of the configuration file is not there: device = auto")  # the source ignores it
        cfg.device = "auto"
    try:
        return analyze(cfg) if cfg.analyze else train(cfg)
    except (DataError, checkpoint.CheckpointError) as e:
        fail(str(e))
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
