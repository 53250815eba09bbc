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

import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from geomloss import SamplesLoss

from common import checkpoint
from common.errors import CheckpointError, DataError, InputError, clear_errors, rehearsal
from common.runlog import RunLog, run_facts
from common.runtime import FiniteCheck, Runtime, Stopwatch, learning_rate
from configurator import (
    Count,
    NonNegative,
    Positive,
    Share,
    Whole,
    config_dict,
    config_hash,
    configure,
    differences,
    from_dict,
)
from kernels.energy import energy_distance, full_float32
from measure import effects
from sources.cells import SPLITS, Cells, grouped, load_features, objection, open_cells
from sources.foreign_state import (
    ALIASES,
    SHAPE,
    convert,
    load_parts,
    load_source_state_dict,
    source_device,
    source_words,
    translate,
    write_maps,
    write_source_files,
)
from sources.populations import synthetic
from sources.shared import counter_rng, make_once, suggest

EXPERIMENT = "state"  # what sample.py treats a run of this page as; a copy keeps it
SYNTHETIC = "data/state/synthetic.toml"  # made when it is missing


@dataclass
class Config:
    # output
    out_dir: str | None = checkpoint.default_out_dir(__file__)  # run folder
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    analyze: str = ""  # run folder or checkpoint to measure again instead of training
    source_files: bool = False  # also write the file names of the source: final.ckpt, var_dims.pkl, *_onehot_map.torch
    log_interval: Count = 50  # steps between log lines
    eval_interval: Count = 200  # steps between evaluations
    save_interval: Count | None = None  # steps between saves of last.pt; default eval_interval
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
    val_fraction: Share = 0.1  # of training conditions, where the TOML has no validation split
    ram_budget_gb: Positive = 8.0  # cells that need more are read from disk
    # sentences
    cell_set_len: Count = 64  # S, cells of a sentence
    basal_mapping_strategy: Literal["random", "batch"] = "random"  # controls of the cell type | and of the batch
    n_basal_samples: Count = 1  # control cells averaged into one input
    should_yield_control_cells: bool = True  # control cells are targets too
    map_controls: bool = True  # of a control target: input is another control cell; false: the cell itself
    downsample_cells: Count | None = None  # most cells of one condition
    # model
    n_layers: Count = 4  # blocks of the transformer
    d_model: Count = 128  # H, width of the transformer and of the encoders
    n_heads: Count = 4  # of attention
    n_kv_heads: Count | None = None  # of keys and values; default n_heads
    head_dim: Count | None = None  # default d_model / n_heads
    d_ff: Count = 512  # width of the MLP of a block
    transformer_backbone_key: Literal["llama", "GPT2"] = "llama"  # kind of the blocks; neither has positions
    bidirectional_attention: bool = True  # false: causal, as some checkpoints of the source are
    rotary: bool = False  # rotary positions, which a set does not have: for such checkpoints
    n_encoder_layers: Count = 2  # linear layers of the encoders of perturbation and control cells
    n_decoder_layers: Count = 2  # linear layers of project_out, from the transformer to a cell
    use_basal_projection: bool = True  # control cells through n_encoder_layers; false: one linear layer
    activation: Literal["gelu", "relu", "leakyrelu", "elu", "selu"] = "gelu"  # of the encoders and project_out
    dropout: Share = 0.1  # in the encoders and project_out
    attention_dropout: Share = 0.0  # of attention weights
    residual_dropout: Share = 0.0  # GPT2: of what a block adds
    embedding_dropout: Share = 0.0  # GPT2: of its input
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
    decoder_hidden_dims: list[Count] = field(default_factory=lambda: [1024, 1024, 512])  # its hidden layers
    decoder_dropout: Share = 0.1  # after each of them
    residual_decoder: bool = False  # every second one adds what the one before it gave
    # low-rank adapters of the transformer (Hu et al. 2021)
    lora: bool = False  # train these in place of the transformer's weights
    lora_r: Count = 16  # rank
    lora_alpha: Whole = 32  # adapters count alpha / rank
    lora_dropout: Share = 0.05  # of their input
    lora_mlp: bool = False  # of the MLPs too
    # loss
    loss: Literal["energy", "sinkhorn", "se", "mse"] = "energy"  # se: sinkhorn and energy
    distributional_loss: Literal["energy", "gaussian", "laplacian", "sinkhorn"] = "energy"  # what loss=energy is
    blur: Positive = 0.05  # of sinkhorn, gaussian and laplacian, in units of the features
    sinkhorn_weight: NonNegative = 0.01  # of se
    energy_weight: NonNegative = 1.0  # of se
    mmd_num_chunks: Count = 1  # distances of this many groups of features, averaged
    randomize_mmd_chunks: bool = False  # other groups each time, in training
    decoder_weight: NonNegative = 1.0  # times the distance of decoded and measured genes
    detach_decoder: bool = False  # the decoder learns without a say in the cells it reads
    regularization: NonNegative = 0.0  # times the mean absolute change of a cell
    batch_token_weight: NonNegative = 0.1  # times the cross entropy of the batch, nats
    confidence_target_scale: float = 10.0  # the confidence token predicts this times the loss of its sentence
    confidence_weight: NonNegative = 0.01  # times the squared error of that prediction
    confidence_per_set: bool = True  # false: times the mean loss, as SmolState does
    # optimizer
    optimizer: Literal["adamw", "adam"] = "adamw"  # SmolState's | State's
    batch_size: Count = 16  # sentences a step, over all ranks and micro-steps
    grad_accum: Count = 1  # micro-steps a step
    lr: NonNegative = 1e-3  # peak learning rate
    min_lr: NonNegative = 1e-6  # what cosine ends at
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up
    warmup_steps: Whole = 50  # linear warm-up
    max_steps: Count = 1_500  # optimizer steps
    weight_decay: NonNegative = 5e-4  # of adamw
    beta1: Share = 0.9  # decay of the mean of gradients
    beta2: Share = 0.999  # of their squares
    grad_clip: NonNegative = 10.0  # largest gradient norm; 0 does not clip
    # evaluation
    eval_sentences: Count = 256  # of validation, during training
    # system
    seed: Whole = 42  # of weights, sentences and held-out conditions
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on GPUs that have it, else fp32
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only

    def __post_init__(self):
        self.out_dir = self.out_dir or type(self).out_dir  # null in files of the source

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        wrong = []
        if self.head_dim is None and self.d_model % self.n_heads:
            wrong.append(f"d_model = {self.d_model} is no multiple of n_heads = {self.n_heads}: set head_dim")
        if self.n_heads % (self.n_kv_heads or 1):
            wrong.append(f"n_heads = {self.n_heads} is no multiple of n_kv_heads = {self.n_kv_heads}")
        if self.rotary and head_width(self) % 2:
            wrong.append("rotary positions need an even head_dim")
        if self.transformer_backbone_key == "GPT2" and (self.rotary or not self.bidirectional_attention):
            wrong.append("transformer_backbone_key = GPT2 is bidirectional and has no positions")
        if self.use_batch_token and (self.batch_encoder or self.basal_mapping_strategy != "batch"):
            wrong.append("use_batch_token needs basal_mapping_strategy = batch, and no batch_encoder: all cells of a "
                         "sentence are then of the batch that the token must name")
        if self.confidence_token and self.d_model < 4:
            wrong.append(f"d_model = {self.d_model}: a confidence token needs at least 4")
        widths = self.decoder_hidden_dims
        if self.residual_decoder and widths[: len(widths) // 2 * 2 : 2] != widths[1::2]:
            wrong.append(f"residual_decoder needs hidden layers of equal width in pairs, not {widths}")
        if not self.toml_config_path:
            wrong.append("toml_config_path is empty: name the TOML of your data, or leave it out for synthetic cells")
        return wrong


# ---------------------------------------------------------------------------------------------------------------
# Batches: sentences of cells, and the control cells that each of them is predicted from
# ---------------------------------------------------------------------------------------------------------------
OF_DATA = ("pert_col", "cell_type_key", "batch_col", "control_pert", "embed_key", "output_space", "counts", "strict",
           "zeroshot_controls", "val_fraction", "seed", "perturbation_features_file", "ram_budget_gb")


def open_data(cfg: Config) -> Cells:
    """The cells that cfg.toml_config_path names; the synthetic default is made where it is missing."""
    path = Path(cfg.toml_config_path)
    if cfg.toml_config_path == SYNTHETIC:
        make_once(path, lambda: synthetic(out_dir=str(path.parent)))
    return open_cells(toml=cfg.toml_config_path, **{name: getattr(cfg, name) for name in OF_DATA})


class Sentences:
    """Sets of cell_set_len cells of one (file, cell type, perturbation), with basal_mapping_strategy=batch also of one
    batch, and a control cell for each; all of it a pure function of (seed, split, epoch).

    In an epoch every cell comes once, in a new order and company; a set that its group cannot fill is completed by
    cells of the group drawn with replacement. A control cell is drawn from those of the same file, cell type and, if
    batch, batch (where the batch has none: from all of the type). For a control cell as target so too, or itself if not
    map_controls (cell-load 0.10.4 ignores this setting).
    """

    def __init__(self, cells: Cells, split: str, cfg: Config):
        self.cells, self.split, self.cfg = cells, split, cfg
        self.by_batch = cfg.basal_mapping_strategy == "batch"
        keys = [cells.file, cells.cell_type, cells.perturbation]
        if self.by_batch:
            keys.append(cells.batch)
        rows = cells.rows(split, cfg.should_yield_control_cells)
        if not len(rows):
            raise DataError(f"{cells.toml} has no cells to {'train on' if split == 'train' else split}: see python "
                            f"prepare_data.py inspect {cells.toml}")
        if cfg.downsample_cells:
            rows = self.downsample(*grouped(rows, *keys))
        self.rows, bounds = grouped(rows, *keys)
        self.starts, self.sizes = bounds[:-1], np.diff(bounds)
        # Sentence i is the stretch of its group from offset on.
        count = -(-self.sizes // cfg.cell_set_len)  # sentences of a group
        self.group = np.repeat(np.arange(len(count)), count)
        self.offset = (np.arange(len(self.group)) - np.repeat(np.cumsum(count) - count, count)) * cfg.cell_set_len
        self.find_controls(self.rows[self.starts])

    def __len__(self) -> int:
        return len(self.group)

    def random(self, *counter: int) -> np.random.Generator:
        return counter_rng(self.cfg.seed, counter[0], SPLITS.index(self.split), *counter[1:])

    def downsample(self, rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """A seeded choice of downsample_cells of each group, the same in every epoch."""
        group = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        order = np.argsort(group + self.random(2).random(len(rows)), kind="stable")
        rank = np.arange(len(rows)) - bounds[group]
        return np.sort(rows[order][rank < self.cfg.downsample_cells])

    def find_controls(self, first: np.ndarray) -> None:
        """Controls sorted by file, type and batch: those of a group, whose first cell is given, are a stretch."""
        cells, controls = self.cells, self.cells.rows(self.split, True)
        self.pool, _ = grouped(controls[cells.is_control[controls]], cells.file, cells.cell_type, cells.batch)
        kind = cells.file.astype(np.int64) * len(cells.cell_types) + cells.cell_type
        start = np.searchsorted(kind[self.pool], kind[first], "left")
        stop = np.searchsorted(kind[self.pool], kind[first], "right")
        if self.by_batch:
            kind = kind * len(cells.batches) + cells.batch
            left = np.searchsorted(kind[self.pool], kind[first], "left")
            right = np.searchsorted(kind[self.pool], kind[first], "right")
            lonely = first[(left == right) & (start < stop)]
            if len(lonely):
                objection(False, f"batch {cells.batches[cells.batch[lonely[0]]]!r} has no "
                                 f"{cells.cell_types[cells.cell_type[lonely[0]]]} control cells, perhaps others too: "
                                 "those of the cell type in any batch take their place")
            start, stop = np.where(left < right, (left, right), (start, stop))
        self.pool_start, self.pool_size = start, stop - start

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(targets [n, S], controls [n, S, n_basal_samples]), rows of the cells; -1: there is no control cell."""
        rng = self.random(3, epoch)
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        shuffled = self.rows[np.argsort(group + rng.random(len(group)), kind="stable")]
        targets, controls, _ = self.fill(shuffled, rng)
        order = rng.permutation(len(targets))
        return targets[order], controls[order]

    def whole(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(targets [s], controls [s, n_basal_samples]) of every sentence, s <= S: each cell once, none filled up."""
        targets, controls, sizes = self.fill(self.rows, self.random(3, 0))
        return [(targets[i, :size], controls[i, :size]) for i, size in enumerate(sizes)]

    def fill(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets and controls of sentences of rows sorted by group, and how many cells of each are its own."""
        place = self.offset[:, None] + np.arange(self.cfg.cell_set_len)  # [n, S], within the group
        size = np.broadcast_to(self.sizes[self.group, None], place.shape)
        beyond = place >= size
        place[beyond] = draw(rng, size[beyond])
        targets = rows[self.starts[self.group, None] + place]
        first, pool = self.pool_start[self.group, None, None], self.pool_size[self.group, None, None]
        drawn = first + draw(rng, np.broadcast_to(pool, (*place.shape, self.cfg.n_basal_samples)))
        controls = np.where(pool > 0, np.append(self.pool, -1)[drawn], -1)
        if not self.cfg.map_controls:
            controls = np.where(self.cells.is_control[targets][..., None], targets[..., None], controls)
        return targets, controls, (~beyond).sum(1)


def draw(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    """Integers in [0, size), for sizes far below 2^53."""
    return (rng.random(size.shape) * size).astype(np.int64)


def make_batch(cells: Cells, targets: np.ndarray, controls: np.ndarray, device: torch.device) -> dict:
    """A batch of b sentences from the rows of their cells, targets [b, S] and controls [b, S, n_basal_samples].

    pert_cell_emb and ctrl_cell_emb [b, S, D] (the mean of its control cells), pert_emb [b, pert_dim], batch [b, S]
    (codes), pert_cell_counts [b, S, G] if a decoder learns.
    """
    b, S = targets.shape
    # No control cell of this type: zeros, as cell-load takes them.
    lonely = controls < 0
    basal = cells.read(np.where(lonely, targets[..., None], controls).ravel(), "input", device)
    basal = basal.view(b, S, controls.shape[2], -1)
    if lonely.any():
        basal[torch.from_numpy(lonely).to(device)] = 0
    pert = torch.from_numpy(cells.perturbation[targets[:, 0]].astype(np.int64))
    if cells.features is None:
        features = F.one_hot(pert, cells.pert_dim).float()
    else:
        features = cells.features[pert]
    batch = {
        "pert_emb": features.to(device),
        "ctrl_cell_emb": basal.mean(2) if controls.shape[2] > 1 else basal[:, :, 0],
        "pert_cell_emb": cells.read(targets.ravel(), "input", device).view(b, S, -1),
        "batch": torch.from_numpy(cells.batch[targets].astype(np.int64)).to(device),
    }
    if cells.count_genes is not None:
        batch["pert_cell_counts"] = cells.read(targets.ravel(), "counts", device).view(b, S, -1)
    return batch


class Batches:
    """Sentences of every step: a pure function of (seed, step, rank). Epochs follow one another without a seam."""

    def __init__(self, rt: Runtime, cells: Cells, cfg: Config):
        self.rt, self.cells, self.cfg = rt, cells, cfg
        self.sentences, self.plans = Sentences(cells, "train", cfg), {}

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self.plans:
            self.plans = {known: plan for known, plan in self.plans.items() if known == epoch - 1}
            self.plans[epoch] = self.sentences.plan(epoch)
        return self.plans[epoch]

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Targets [B, S] and controls [B, S, n_basal_samples] of the whole batch of a step."""
        place = np.arange(step * self.cfg.batch_size, (step + 1) * self.cfg.batch_size)
        epoch, sentence = np.divmod(place, len(self.sentences))
        targets, controls = [], []
        for current in np.unique(epoch):
            plan = self.plan(int(current))
            targets.append(plan[0][sentence[epoch == current]])
            controls.append(plan[1][sentence[epoch == current]])
        return np.concatenate(targets), np.concatenate(controls)

    def __call__(self, step: int) -> dict:
        """This rank's batch, as make_batch has it, of b = batch_size / world_size sentences."""
        targets, controls = self.rows(step)
        return make_batch(self.cells, self.rt.share(targets), self.rt.share(controls), self.rt.device)


# ---------------------------------------------------------------------------------------------------------------
# Model: the names of its parameters are the source's, so that checkpoints travel both ways
# ---------------------------------------------------------------------------------------------------------------
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU}


def mlp(width_in: int, hidden: int, width_out: int, layers: int, cfg: Config) -> nn.Sequential:
    """Linear, activation, dropout, ..., Linear: `layers` linear maps, at 0, 3, 6 and so on."""
    modules = []
    for _ in range(layers - 1):
        modules += [nn.Linear(width_in, hidden), ACTIVATIONS[cfg.activation](), nn.Dropout(cfg.dropout)]
        width_in = hidden
    return nn.Sequential(*modules, nn.Linear(width_in, width_out))


def head_width(cfg: Config) -> int:
    return cfg.head_dim or cfg.d_model // cfg.n_heads


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, cfg: Config) -> torch.Tensor:
    """softmax(q k' / sqrt(C)) v for q [B, heads, T, C], k and v [B, kv_heads, T, C] -> [B, T, heads * C]."""
    # Grouped keys and values: each head of them serves a group of neighbouring queries.
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # A masked cell sees only itself and has nothing to weigh: the softmax of one number is 1.
    if not cfg.mask_attn:
        causal = not cfg.bidirectional_attention
        v = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    return v.transpose(1, 2).flatten(2)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021), pairing feature i with i + C / 2 as Llama does. x [B, heads, T, C]."""
    T, C = x.shape[2:]
    frequency = 10_000.0 ** (-torch.arange(0, C, 2, device=x.device) / C)
    angle = torch.arange(T, device=x.device)[:, None] * torch.cat([frequency, frequency])  # [T, C]
    left, right = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat([-right, left], -1) * angle.sin().to(x.dtype)


class Attention(nn.Module):
    """Among the cells of a sentence. Llama's own form: no biases, heads of any width, grouped keys and values."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        wide = cfg.n_heads * head_width(cfg)
        narrow = (cfg.n_kv_heads or cfg.n_heads) * head_width(cfg)
        self.q_proj = nn.Linear(cfg.d_model, wide, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, narrow, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, narrow, bias=False)
        self.o_proj = nn.Linear(wide, cfg.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]."""
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        if self.cfg.rotary:
            q, k = rotate(q), rotate(k)
        dropout = self.cfg.attention_dropout if self.training else 0.0
        return self.o_proj(attend(q, k, v, dropout, self.cfg))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, head_width(self.cfg))).transpose(1, 2)  # [B, heads, T, C]


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) * weight (Zhang and Sennrich 2019), in the precision of x."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LlamaBlock(nn.Module):
    """Pre-norm block of Llama (Touvron et al. 2023): RMSNorm, attention, RMSNorm, SwiGLU."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(cfg), GatedMLP(cfg)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(cfg.d_model), RMSNorm(cfg.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A stack of Llama blocks over cells.

    A set has no order, so its cells have no positions: without them, and with all cells in sight of each other, the
    output of a cell does not depend on where it stands. Causal and rotary are for old checkpoints only.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.layers = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Conv1D(nn.Module):
    """A linear layer with its weight [in, out] the other way round, as GPT-2 stores it."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(width_out))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.T, self.bias)


class GPT2Block(nn.Module):
    """Pre-norm block of GPT-2 (Radford et al. 2019): LayerNorm, attention, LayerNorm, GELU; all with biases."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, H = cfg, cfg.d_model
        self.ln_1, self.ln_2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(H, 3 * H), "c_proj": Conv1D(H, H)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(H, cfg.d_ff), "c_proj": Conv1D(cfg.d_ff, H)})
        self.drop = nn.Dropout(cfg.residual_dropout)  # on what a block adds to the stream
        for part in (self.attn, self.mlp):  # what writes to the stream shrinks with depth
            nn.init.normal_(part["c_proj"].weight, std=0.02 * (2 * cfg.n_layers) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3, self.cfg.n_heads, -1)).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, C]
        dropout = self.cfg.attention_dropout if self.training else 0.0
        x = x + self.drop(self.attn["c_proj"](attend(q, k, v, dropout, self.cfg)))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.drop(self.mlp["c_proj"](hidden))


class GPT2(nn.Module):
    """A stack of GPT-2 blocks over cells: bidirectional, no positions."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.h = nn.ModuleList(GPT2Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f, self.drop = nn.LayerNorm(cfg.d_model), nn.Dropout(cfg.embedding_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]."""
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


BACKBONES = {"llama": Llama, "GPT2": GPT2}


class LoRA(nn.Module):
    """W x + alpha / r * B A dropout(x), with W frozen and B zero at first (Hu et al. 2021). Names as in PEFT."""

    def __init__(self, base: nn.Module, cfg: Config):
        super().__init__()
        self.base_layer, self.scale, self.drop = base, cfg.lora_alpha / cfg.lora_r, nn.Dropout(cfg.lora_dropout)
        out, width = reversed(base.weight.shape) if isinstance(base, Conv1D) else base.weight.shape
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, cfg.lora_r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(cfg.lora_r, out, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.lora_A["default"](self.drop(x))
        return self.base_layer(x) + self.scale * self.lora_B["default"](low)


def add_lora(backbone: nn.Module, cfg: Config) -> None:
    """Freeze the backbone, and put an adapter on every attention projection (and the MLPs' where asked)."""
    backbone.requires_grad_(False)
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj"}
    if cfg.lora_mlp:
        targets |= {"gate_proj", "up_proj", "down_proj", "c_fc"}
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, (nn.Linear, Conv1D)):
                parent.add_module(name, LoRA(child, cfg))


class ConfidenceToken(nn.Module):
    """A token at the end of every sentence whose output predicts the sentence's loss."""

    def __init__(self, cfg: Config):
        super().__init__()
        H = cfg.d_model
        self.confidence_token = nn.Parameter(torch.randn(1, 1, H))
        self.confidence_projection = nn.Sequential(
            nn.Linear(H, H // 2), nn.LayerNorm(H // 2), nn.GELU(), nn.Dropout(cfg.dropout),
            nn.Linear(H // 2, H // 4), nn.LayerNorm(H // 4), nn.GELU(), nn.Dropout(cfg.dropout),
            nn.Linear(H // 4, 1), nn.ReLU(),
        )  # fmt: skip


class LatentToGeneDecoder(nn.Module):
    """From the embedding of a cell to its genes: Linear, LayerNorm, GELU, dropout, ..., Linear, ReLU.

    residual_decoder: every second hidden layer also adds the output of the one before it, as the source does.
    """

    def __init__(self, latent_dim: int, gene_dim: int, cfg: Config):
        super().__init__()
        self.residual = cfg.residual_decoder
        widths = [latent_dim, *cfg.decoder_hidden_dims]
        blocks = []
        for a, b in pairwise(widths):
            blocks.append([nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Dropout(cfg.decoder_dropout)])
        last = [nn.Linear(widths[-1], gene_dim), nn.ReLU()]
        if self.residual:
            self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks)
            self.final_layer = nn.Sequential(*last)
        else:
            self.decoder = nn.Sequential(*[layer for block in blocks for layer in block], *last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., latent_dim] -> [..., G], not negative."""
        if not self.residual:
            return self.decoder(x)
        for i, block in enumerate(self.blocks):
            y = block(x)
            x = y + x if i % 2 else y
        return self.final_layer(x)


class StateTransitionPerturbationModel(nn.Module):
    """Set of control cells + perturbation -> set of perturbed cells.

    Args:
        dims: sizes of the data, as Cells.dims has them: input_dim D, output_dim, pert_dim P, batch_dim, gene_dim,
            hvg_dim; decodes: there are counts of genes that a decoder can learn.
    """

    load_source_state_dict = load_source_state_dict

    def __init__(self, cfg: Config, dims: dict):
        super().__init__()
        self.cfg, self.dims = cfg, dims
        H, D = cfg.d_model, dims["output_dim"]
        self.pert_encoder = mlp(dims["pert_dim"], H, H, cfg.n_encoder_layers, cfg)
        if cfg.use_basal_projection:
            self.basal_encoder = mlp(dims["input_dim"], H, H, cfg.n_encoder_layers, cfg)
        else:
            self.basal_encoder = nn.Linear(dims["input_dim"], H)
        self.pert_norm = nn.LayerNorm(H) if cfg.pert_norm else nn.Identity()
        self.transformer_backbone = BACKBONES[cfg.transformer_backbone_key](cfg)
        self.project_out = mlp(H, H, D, cfg.n_decoder_layers, cfg)
        if cfg.output_space == "all":
            narrow = max(1, D // 8)
            self.final_down_then_up = nn.Sequential(nn.Linear(D, narrow), nn.GELU(), nn.Linear(narrow, D))
        if cfg.batch_encoder:
            self.batch_encoder = nn.Embedding(dims["batch_dim"], H)
        if cfg.use_batch_token:
            self.batch_token = nn.Parameter(torch.randn(1, 1, H))
            self.batch_classifier = mlp(H, H, dims["batch_dim"], 1, cfg)
        if cfg.confidence_token:
            self.confidence_token = ConfidenceToken(cfg)
        self.gene_decoder = None
        if dims["decodes"] and cfg.gene_decoder_bool is not False:
            genes = dims["hvg_dim" if cfg.output_space == "gene" else "gene_dim"]
            self.gene_decoder = LatentToGeneDecoder(D, genes, cfg)
        # Expression is never negative; embeddings may be, where the source clips them unless a decoder reads them.
        self.clips = cfg.embed_key in ("X_hvg", None) or (cfg.compat_relu and self.gene_decoder is None)
        if cfg.lora:
            add_lora(self.transformer_backbone, cfg)
        self.freeze()

    def freeze(self) -> None:
        """Take out of training what is to stay, and what has no part in the output: of that DistributedDataParallel
        would wait for a gradient for ever."""
        cfg = self.cfg
        if cfg.freeze_pert_backbone:
            self.project_out.requires_grad_(False)
        if cfg.output_space == "all" and not cfg.predict_residual:
            self.final_down_then_up.requires_grad_(False)
        for name, weight in self.transformer_backbone.named_parameters():
            frozen = cfg.freeze_pert_backbone and "lora_" not in name
            unused = cfg.mask_attn and re.search(r"\.[qk]_proj\.", name)
            if frozen or unused:
                weight.requires_grad_(False)

    def in_sentences(self, batch: dict, padded: bool = True) -> dict:
        """A batch with a row a cell [B * S, D], as the source's loaders give it, or with sentences [B, S, D] already,
        as sentences; padded=False: one sentence of all rows. The perturbation becomes [B, S or 1, P]."""
        batch, rows = dict(batch), batch["ctrl_cell_emb"]
        S = self.cfg.cell_set_len if padded else len(rows)
        if rows.ndim == 3 and batch["pert_emb"].ndim == 2:
            batch["pert_emb"] = batch["pert_emb"][:, None]
        for name in ("pert_emb", "ctrl_cell_emb", "pert_cell_emb", "pert_cell_counts"):
            if name in batch and batch[name].ndim == 2:
                if len(batch[name]) % S:
                    raise ValueError(f"{len(rows)} cells are no whole sentences of {S}")
                batch[name] = batch[name].unflatten(0, (-1, S))
        return batch

    def batch_codes(self, batch: dict) -> torch.Tensor:
        """Batches as codes [B, S or 1], from codes or one-hot vectors of each cell or each sentence."""
        codes, (B, S) = batch["batch"], batch["ctrl_cell_emb"].shape[:2]
        if self.dims["batch_dim"] == 1:
            return torch.zeros(B, 1, dtype=torch.long, device=codes.device)
        as_floats = codes.is_floating_point() and codes.numel() == B * self.dims["batch_dim"]
        if codes.numel() not in (B, B * S) or as_floats:
            codes = codes.argmax(-1)
        return codes.reshape(B, -1).long()

    def predict(self, batch: dict, padded: bool = True) -> dict:
        """Predicted cells [B, S, output_dim], and what else the model's tokens say.

        Args:
            batch: ctrl_cell_emb, cells [B * S, D] or [B, S, D]; pert_emb, features of the perturbation, of each cell
                [B * S, P], or of each sentence [B, P] beside cells [B, S, D]; batch, one-hot or codes, if it is used.
        Returns: cells; confidence [B, 1] and batch_logits [B, batch_dim] where there are such tokens.
        """
        cfg, batch = self.cfg, self.in_sentences(batch, padded)
        # Every cell starts as the sum of what it is and of what is done to it.
        pert = self.pert_norm(self.pert_encoder(batch["pert_emb"]))  # [B, S or 1, H]
        control = self.basal_encoder(batch["ctrl_cell_emb"])  # [B, S, H]
        x = pert + control
        if cfg.batch_encoder:
            x = x + self.batch_encoder(self.batch_codes(batch))
        S = x.shape[1]

        # Tokens that are no cells: the batch before them, the confidence after them.
        if cfg.use_batch_token:
            x = torch.cat([self.batch_token.expand(len(x), -1, -1), x], 1)
        if cfg.confidence_token:
            x = torch.cat([x, self.confidence_token.confidence_token.expand(len(x), -1, -1)], 1)
        x = self.transformer_backbone(x)
        out = {}
        if cfg.use_batch_token:
            out["batch_logits"] = self.batch_classifier(x[:, 0])
            x = x[:, 1:]
        if cfg.confidence_token:
            out["confidence"] = self.confidence_token.confidence_projection(x[:, -1])
        x = x[:, :S]

        # Residual prediction: the transformer says how a control cell changes, which is little, and not what it is. In
        # the space of all genes the change is added to the cell itself, else to its encoding.
        if not cfg.predict_residual:
            cells = self.project_out(x)
        elif cfg.output_space == "all":
            cells = self.final_down_then_up(self.project_out(x) + batch["ctrl_cell_emb"])
        else:
            cells = self.project_out(x + control)
        out["cells"] = cells.relu() if self.clips else cells
        return out

    def forward(self, batch: dict, padded: bool = True, losses: bool = False):
        """Predicted cells [B * S, output_dim], with the confidence [B, 1] where there is such a token.

        losses=True: the terms of the loss instead (see `losses`), in one call, as DistributedDataParallel needs it.
        """
        out = self.predict(batch, padded)
        if losses:
            return self.losses(self.in_sentences(batch, padded), out)
        cells = out["cells"].flatten(0, 1)
        return (cells, out["confidence"]) if "confidence" in out else cells

    # Loss ------------------------------------------------------------------------------------------------------
    def set_loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The configured distance of every sentence: pred and target [B, S, D] or [B * S, D] -> [B]."""
        cfg, S = self.cfg, self.cfg.cell_set_len
        if pred.ndim == 2:
            pred, target = pred.unflatten(0, (-1, S)), target.unflatten(0, (-1, S))
        loss = cfg.distributional_loss if cfg.loss == "energy" else cfg.loss
        weights = cfg.blur, cfg.sinkhorn_weight, cfg.energy_weight
        if cfg.mmd_num_chunks == 1 or loss in ("se", "mse"):
            return set_loss(pred, target, loss, *weights)
        # Groups of features: the mean of their distances weighs a few genes that matter more than one of all does.
        D = pred.shape[-1]
        shuffled = cfg.randomize_mmd_chunks and self.training
        order = torch.randperm(D, device=pred.device) if shuffled else torch.arange(D, device=pred.device)
        groups = order.chunk(cfg.mmd_num_chunks)
        return torch.stack([set_loss(pred[..., g], target[..., g], loss, *weights) for g in groups]).nanmean(0)

    def losses(self, batch: dict, out: dict) -> dict:
        """All terms of the loss, "loss" their sum and "per_set" [B] the distance of each sentence.

        batch: in sentences; pert_cell_emb, the measured cells; pert_cell_counts, their genes, where a decoder learns.
        """
        cfg, pred, target = self.cfg, out["cells"], batch["pert_cell_emb"]
        # The distance between sets. A sentence that has none (nan) is left out of the mean.
        per_set = self.set_loss(pred, target)
        terms = {"per_set": per_set.detach(), "distance": per_set.nanmean()}
        total = terms["distance"]
        # The batch: the token must name the one that all cells of its sentence are of.
        if "batch_logits" in out:
            terms["batch_token"] = F.cross_entropy(out["batch_logits"].float(), self.batch_codes(batch)[:, 0])
            total = total + cfg.batch_token_weight * terms["batch_token"]
        # Genes: the distance once more, of decoded and measured ones.
        if self.gene_decoder is not None and "pert_cell_counts" in batch:
            genes = self.gene_decoder(self.latent(pred, target))
            terms["decoder"] = self.set_loss(genes, batch["pert_cell_counts"]).mean()
            total = total + cfg.decoder_weight * terms["decoder"]
        # Confidence: the loss of the sentence is foretold, and not changed by that.
        if "confidence" in out:
            wanted = per_set if cfg.confidence_per_set else total.expand(len(pred))
            scaled = cfg.confidence_target_scale * wanted.detach()
            terms["confidence"] = F.mse_loss(out["confidence"][:, 0].float(), scaled)
            total = total + cfg.confidence_weight * terms["confidence"]
        if cfg.regularization:
            terms["l1"] = (pred - batch["ctrl_cell_emb"]).abs().mean()
            total = total + cfg.regularization * terms["l1"]
        return terms | {"loss": total}

    def latent(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the decoder reads. Detached, it learns from the model's cells; one batch in ten from measured ones."""
        if not self.cfg.detach_decoder:
            return pred
        if self.training and torch.rand(()) < 0.1:
            return target
        return pred.detach()


def build_model(cfg, dims: dict | None = None) -> StateTransitionPerturbationModel:
    """The model of a Config, or of a dict of the keyword arguments of the source's model.

    Args:
        dims: sizes of the data, as Cells.dims has them; default those of the data that cfg names.
    Raises DataError if a decoder is asked for where there is nothing to learn it from.
    """
    if isinstance(cfg, dict):
        settings, dims = translate(cfg)
        cfg = Config(**settings)
    dims = dims or open_data(cfg).dims()
    if cfg.gene_decoder_bool and not dims["decodes"]:
        raise DataError(f"gene_decoder_bool = true, but with embed_key = {cfg.embed_key} and output_space = "
                        f"{cfg.output_space} there are no genes for a decoder to learn: leave it out, or use an "
                        "embedding as embed_key, or output_space = all")
    return StateTransitionPerturbationModel(cfg, dims)


# ---------------------------------------------------------------------------------------------------------------
# Loss: the distance between two sets of cells
# ---------------------------------------------------------------------------------------------------------------
@torch.compiler.disable  # of custom gradients and geomloss there is nothing to gain
def set_loss(pred: torch.Tensor, target: torch.Tensor, loss: str = "energy", blur: float = 0.05,
             sinkhorn_weight: float = 0.01, energy_weight: float = 1.0) -> torch.Tensor:
    """The distance between predicted and measured cells of each sentence: [B, S, D] twice -> [B], in float32 or better.

    Args:
        loss: energy | sinkhorn | se, sinkhorn_weight * sinkhorn + energy_weight * energy | mse, cell by cell |
            gaussian | laplacian, kernels of geomloss with this blur.
    Two sets [S, D] give a number. Gradients are for pred; the energy gives target none. Raises ValueError for an
    unknown loss and for sets that cannot be compared.
    """
    if pred.ndim == 2:
        return set_loss(pred[None], target[None], loss, blur, sinkhorn_weight, energy_weight)[0]
    comparable = pred.shape == target.shape if loss == "mse" else pred.shape[::2] == target.shape[::2]
    if not comparable or not pred.numel() * target.numel():
        raise ValueError(f"sets of cells {list(pred.shape)} and {list(target.shape)} cannot be compared by {loss}")
    # Half precision would round squared distances, small differences of large numbers, away.
    with torch.autocast(pred.device.type, enabled=False):
        pred = pred if pred.dtype == torch.float64 else pred.float()
        target = target.to(pred.dtype)
        if loss == "mse":
            return (pred - target).square().mean((1, 2))
        # E|x - y| - E|x - x'| / 2 - E|y - y'| / 2 is zero if and only if both sets are of one distribution; no cell is
        # paired with another, for no measured cell is seen both before and after.
        if loss == "energy":
            return energy_distance(pred, target)
        if loss == "se":
            sinkhorn = geomloss_distance(pred, target, "sinkhorn", blur)
            return sinkhorn_weight * sinkhorn + energy_weight * energy_distance(pred, target)
        if loss in ("sinkhorn", "gaussian", "laplacian"):
            return geomloss_distance(pred, target, loss, blur)
    raise ValueError(f"loss = {loss!r}: use energy, sinkhorn, se, mse, gaussian or laplacian")


def geomloss_distance(pred: torch.Tensor, target: torch.Tensor, loss: str, blur: float) -> torch.Tensor:
    """sinkhorn | gaussian | laplacian of geomloss (Feydy et al. 2019), [B]."""
    distance = SamplesLoss(loss, blur=blur, backend="tensorized")
    records = torch.is_grad_enabled()
    with torch.set_grad_enabled(records), full_float32():  # geomloss switches gradients on and leaves them so
        value = distance(pred.contiguous(), target.contiguous())
    return value if records else value.detach()


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
def held_out(cells: Cells) -> str:
    """The split that a run is measured on: test, or validation where there is none. Raises DataError without both."""
    for split in ("test", "val"):
        if len(cells.rows(split, controls=False)):
            return split
    raise DataError(f"{cells.toml} holds nothing out: name cells for test or val, or leave some conditions for "
                    "validation with val_fraction = 0.1")


def expressed(model: StateTransitionPerturbationModel, cells: torch.Tensor) -> torch.Tensor:
    """Predicted cells as what they are measured in: genes by the decoder where there is one."""
    return cells if model.gene_decoder is None else model.gene_decoder(cells)


@torch.no_grad()
def validate(model: StateTransitionPerturbationModel, sentences: tuple, cells: Cells, rt: Runtime, cfg: Config) -> dict:
    """Mean loss terms over sentences, rows of targets [n, S] and of controls [n, S, k]. Collective."""
    model.eval()
    targets, controls = sentences
    sums, count = {}, 0
    at_once = max(1, cfg.batch_size // (cfg.grad_accum * rt.world_size))
    for i in range(rt.rank * at_once, len(targets), rt.world_size * at_once):
        some = slice(i, i + at_once)
        with rt.autocast():
            terms = model(make_batch(cells, targets[some], controls[some], rt.device), losses=True)
        n = len(targets[some])
        count += n
        for name, value in terms.items():
            if name != "per_set":
                sums[name] = sums.get(name, 0.0) + float(value) * n
    model.train()
    shares = [share for share in rt.gather((sums, count)) if share[1]]
    total = sum(n for _, n in shares)
    return {name: sum(part[name] for part, _ in shares) / total for name in shares[0][0]}


@torch.no_grad()
def predict_sentences(model: StateTransitionPerturbationModel, sentences: list, cells: Cells, rt: Runtime, cfg: Config
                      ) -> tuple[np.ndarray, np.ndarray]:
    """Predicted cells of sentences of any lengths: rows of the targets [N], ascending, cells [N, G]. Collective."""
    model.eval()
    rows, predicted = [np.empty(0, np.int64)], []
    for targets, controls in same_lengths(rt.share(sentences), cfg.batch_size * cfg.cell_set_len):
        with rt.autocast():
            cells_out = model.predict(make_batch(cells, targets, controls, rt.device))["cells"]
            genes = expressed(model, cells_out)
        rows.append(targets.ravel())
        predicted.append(genes.flatten(0, 1).float().cpu().numpy())
    model.train()
    shares = rt.gather((np.concatenate(rows), predicted))
    rows = np.concatenate([share for share, _ in shares])
    order = np.argsort(rows, kind="stable")
    return rows[order], np.concatenate([part for _, parts in shares for part in parts])[order]


def same_lengths(sentences: list, most: int):
    """Batches [b, s] of sentences that have one length, of at most so many cells; none is filled up, so that no cell
    is counted twice."""
    by_length = {}
    for targets, controls in sentences:
        by_length.setdefault(len(targets), []).append((targets, controls))
    for length, members in sorted(by_length.items()):
        at_once = max(1, most // length)
        for i in range(0, len(members), at_once):
            targets, controls = zip(*members[i : i + at_once], strict=True)
            yield np.stack(targets), np.stack(controls)


def predictions(model: StateTransitionPerturbationModel, cells: Cells, split: str, cfg: Config, rt: Runtime,
                most: int | None = None):
    """One held-out cell type after the other: {cell_type, rows, pred [N, G], real [N, G], controls, control [C, G]}.

    rows and controls are rows of the cells: the perturbed ones predicted, once each, and all control cells of the type;
    most: only of so many sentences and controls. Yields on every rank; what is measured, on rank 0 alone. Memory is
    that of one cell type.
    """
    which = "input" if model.gene_decoder is None else "counts"
    by_type = {}
    for targets, controls in Sentences(cells, split, cfg).whole():
        if cells.perturbation[targets[0]] != cells.control:
            by_type.setdefault(int(cells.cell_type[targets[0]]), []).append((targets, controls))
    for code, sentences in sorted(by_type.items()):
        rows, predicted = predict_sentences(model, sentences[:most], cells, rt, cfg)
        part = {"cell_type": code, "rows": rows, "pred": predicted}
        if rt.is_main:
            of_type = cells.is_control & (cells.cell_type == code) & (cells.member > 0)
            part["controls"] = np.flatnonzero(of_type)[:most]
            part["real"] = fetch(cells, rows, which)
            part["control"] = fetch(cells, part["controls"], which)
        yield part


def fetch(cells: Cells, rows: np.ndarray, which: str, block: int = 8_192) -> np.ndarray:
    """Cells of rows as a float32 array [N, G] in memory, read in blocks."""
    blocks = [cells.read(rows[i : i + block], which).numpy() for i in range(0, len(rows), block)]
    return np.concatenate(blocks) if blocks else np.empty((0, 0), np.float32)


def evaluate(model: StateTransitionPerturbationModel, cells: Cells, cfg: Config, rt: Runtime, keep=None,
             most: int | None = None) -> dict:
    """The model and the baselines on every held-out condition: what effects.evaluate_conditions returns. Collective.

    keep: called with what `predictions` yields. most: a rehearsal with so many sentences, without baselines.
    """
    which = "input" if model.gene_decoder is None else "counts"
    expression = cfg.embed_key in (None, "X", "X_hvg") or which == "counts"
    known = effects.training_means(cells, which) if rt.is_main and most is None else None
    results = []
    for part in predictions(model, cells, held_out(cells), cfg, rt, most):
        if rt.is_main:
            if keep:
                keep(part)
            results.append(effects.evaluate_cell_type(part, cells, known, which, expression))
        if most:
            break
    return effects.join(results) if results else {}


def finish(model: StateTransitionPerturbationModel, cells: Cells, cfg: Config, rt: Runtime, folder: Path, keep=None
           ) -> dict:
    """Measure on what was held out: metrics.csv, results.json, pictures; returns the summary. Collective."""
    results = evaluate(model, cells, cfg, rt, keep)
    rt.barrier()
    if not rt.is_main:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    conditions = len(results["model"]["per_condition"])
    effects.write_metrics(folder / "metrics.csv", results)
    saved = {name: {"mean": result["mean"], "per_condition": result["per_condition"]}
             for name, result in results.items()}
    (folder / "results.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    effects.plot_metrics(folder, f"{Path(cfg.toml_config_path).stem}: {conditions} held-out conditions", results)
    print(effects.format_table(results))
    means = {name: result["mean"] for name, result in results.items()}
    return means.pop("model") | {"baselines": means, "conditions": conditions}


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def start_from_checkpoint(cfg: Config) -> tuple[Config, dict]:
    """For init_from: (cfg with the shape of that checkpoint, its weights). Raises CheckpointError."""
    path = Path(cfg.init_from)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"init_from = {cfg.init_from}: there is no checkpoint {path}")
    if checkpoint.experiment_of(path):
        state = checkpoint.load(path)
        weights, saved = state["model"], vars(from_dict(Config, state["config"], str(path), ALIASES))
    else:
        saved, weights, *_ = convert(path, cfg.source_attention)
    taken = [name for name in SHAPE if name in saved and saved[name] != getattr(cfg, name)]
    for name in taken:
        setattr(cfg, name, saved[name])
    if taken:
        print(f"note: taken over from {path}: {', '.join(f'{name} = {saved[name]}' for name in taken)}")
    return cfg, weights


def initialise(model: StateTransitionPerturbationModel, weights: dict, cfg: Config) -> list[str]:
    """Put the weights of another run in; returns the names of those that stay fresh.

    One-hot names mean other perturbations in other data, and so do the numbers of batches: what reads them starts anew.
    """
    anew = {"batch_encoder", "batch_classifier"}
    if not cfg.perturbation_features_file:
        anew.add("pert_encoder")
    return load_parts(model, weights, anew, f"init_from = {cfg.init_from}")


@torch.no_grad()
def start_at_mean(model: StateTransitionPerturbationModel, cells: Cells, most: int = 4_096) -> None:
    """Set the last biases to the mean control cell of training.

    Without it, output features that are negative for all cells at the start stay 0 behind the ReLU for ever, as nothing
    of the loss reaches them, and the others need hundreds of steps to find the mean.
    """
    rows = cells.rows("train", controls=True)
    rows = rows[cells.is_control[rows]]
    rows = rows[:: -(-len(rows) // most)]
    output = model.project_out
    if model.cfg.output_space == "all" and model.cfg.predict_residual:
        output = model.final_down_then_up
    output[-1].bias.copy_(cells.read(rows).mean(0))
    if model.gene_decoder is not None:
        last = [module for module in model.gene_decoder.modules() if isinstance(module, nn.Linear)][-1]
        last.bias.copy_(cells.read(rows, "counts").mean(0))


def make_optimizer(model: nn.Module, cfg: Config, rt: Runtime) -> torch.optim.Optimizer:
    """Of what is not frozen: AdamW as SmolState has it, or Adam as State has."""
    params = [weight for weight in model.parameters() if weight.requires_grad]
    if not params:
        raise InputError("nothing is left to train: freeze_pert_backbone froze everything")
    betas = cfg.beta1, cfg.beta2
    if cfg.optimizer == "adam":
        return torch.optim.Adam(params, lr=cfg.lr, betas=betas, fused=rt.device.type in ("cuda", "cpu"))
    return rt.adamw(params, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay)


def train_step(model: nn.Module, batch: dict, rt: Runtime, cfg: Config) -> dict:
    """Forward and backward over the micro-batches of a batch; returns the loss terms, means over all ranks."""
    sums = {}
    micro_batches = zip(*(value.chunk(cfg.grad_accum) for value in batch.values()), strict=True)
    for i, values in enumerate(micro_batches):
        with rt.sync(model, last=i == cfg.grad_accum - 1):
            with rt.autocast():
                terms = model(dict(zip(batch, values, strict=True)), losses=True)
            rt.backward(terms["loss"] / cfg.grad_accum)
        for name, value in terms.items():
            if name != "per_set":
                sums[name] = sums.get(name, 0.0) + value.detach() / cfg.grad_accum
    means = rt.mean(torch.stack(list(sums.values())))
    return dict(zip(sums, means, strict=True))


class Progress:
    """Means of the loss terms over the steps since the last log line, read from the device when they are asked for."""

    def __init__(self):
        self.sums, self.steps = {}, 0

    def add(self, terms: dict) -> None:
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in terms.items()}
        self.steps += 1

    def means(self) -> dict:
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises InputError (before anything is written) and FloatingPointError (the loss).
    """
    began, folder = time.perf_counter(), checkpoint.local_folder(cfg.out_dir)
    with Runtime(cfg) as rt:
        rt.divide(cfg.batch_size, cfg.grad_accum)
        initial, fresh = {}, []
        if cfg.init_from:
            cfg, initial = start_from_checkpoint(cfg)
        cells = open_data(cfg)
        held_out(cells)
        model = build_model(cfg, cells.dims())
        if initial:
            fresh = initialise(model, initial, cfg)
        model.to(rt.device)
        rt.reseed(rt.rank)
        optimizer = make_optimizer(model, cfg, rt)
        params = optimizer.param_groups[0]["params"]
        if not initial or "project_out.0.weight" in fresh:
            start_at_mean(model, cells)
        batches, finite, watch, progress = Batches(rt, cells, cfg), FiniteCheck(rt.device), Stopwatch(), Progress()
        validation = None  # without it the last step is the best
        if len(cells.rows("val", controls=False)):
            validation = [part[: cfg.eval_sentences] for part in Sentences(cells, "val", cfg).plan(0)]
        with rehearsal():
            validate(model, [part[:1] for part in batches.rows(0)], cells, rt, cfg)
            evaluate(model, cells, cfg, rt, most=4)

        path, state, changes = checkpoint.start_from(cfg, folder, __file__, lambda old: differences(old, cfg, ALIASES))
        step, best, known = 0, math.inf, {"dims": cells.dims(), **cells.maps()}
        if state:
            other = [name for name in known if state["extra"].get(name) != known[name]]
            if other:
                raise CheckpointError(f"{path} is of other data ({', '.join(other)} differ): use another out_dir, or "
                                      "resume=never to train anew there, which replaces the checkpoints")
            step, best, _, _ = checkpoint.restore(rt, state, path, folder, model, optimizer)
        trained = rt.wrap(model)

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, cfg.max_steps) as log:
            if rt.is_main:
                checkpoint.clear(folder, after=step)
                write_maps(folder, cells)
            log.say(rt.describe())
            log.say(describe(cells, model, cfg))
            if fresh:
                log.say(f"from {cfg.init_from}; these start anew: {', '.join(fresh)}")
            if state:
                log.say("\n  ".join([f"resumed from {path} at step {step}", *changes]))
            cells_per_step, lap = cfg.batch_size * cfg.cell_set_len, step
            watch.start()
            while step < cfg.max_steps:
                batch = batches(step)  # sentences [B, S, D] of this rank
                lr = learning_rate(step, cfg)
                terms = train_step(trained, batch, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)
                step += 1
                finite.add(step, terms["loss"])
                progress.add(terms)
                log.progress(step)
                due = rt.due(step, cfg.max_steps, cfg.log_interval, cfg.eval_interval, cfg.save_interval)
                if due.nothing:
                    continue

                # Numbers are read from the device here and only here: a read waits for all queued work.
                finite.verify(step, model, lr)
                rt.synchronize()
                speed = watch.pause((step - lap) * cells_per_step)
                if due.logs:
                    values = progress.means() | {"lr": lr, "grad_norm": float(norm), "cells_per_s": speed}
                    values["epoch"] = step * cfg.batch_size / len(batches.sentences)
                    left = (cfg.max_steps - step) * cells_per_step / speed
                    log.train(step, values, lr, norm, speed, left, "cells", loss=values["loss"])
                improved = False
                if due.evaluates and validation:
                    values = validate(model, validation, cells, rt, cfg)
                    improved = values["loss"] < best
                    best = min(best, values["loss"])
                    log_validation(log, step, values, improved)
                if due.saves or improved:
                    extra = known | {"ended": step == cfg.max_steps}
                    saved = checkpoint.capture(rt, __file__, config_dict(cfg), step, model, optimizer, best, extra, {})
                    if rt.is_main:
                        checkpoint.save(saved, folder, improved, cfg.keep_last != 0, cfg.keep_last)
                if due.stops:
                    log.say(f"stopped by a signal after step {step}; the same command goes on from there")
                    return {"stopped_at": step}
                lap = step
                watch.start()

            rt.barrier()
            if (folder / "best.pt").exists():
                checkpoint.load_weights(model, checkpoint.load(folder / "best.pt", __file__)["model"], folder)
            if cfg.source_files and rt.is_main:
                write_source_files(folder, model, cells, step)
            result = finish(model, cells, cfg, rt, folder)
            summary = result | {"val_loss": best, **run_facts(rt, step, began, watch, "cells")}
            log.summary(summary | {"config_hash": config_hash(cfg)})
            if rt.is_main:
                log.say(effects.verdict(result, folder))
            return summary | {"config_hash": config_hash(cfg)}


def log_validation(log: RunLog, step: int, values: dict, improved: bool) -> None:
    """The line of an evaluation: the loss, and its terms where there are several."""
    values = {f"val_{name}": value for name, value in values.items()}
    log.metrics(step, "eval", values)
    shown = {"val_loss": values["val_loss"]} | (values if len(values) > 2 else {})
    line = " | ".join(f"{name} {value:.5f}" for name, value in shown.items())
    log.say(f"step {step:>6} eval | {line}{' *' if improved else ''}")


def describe(cells: Cells, model: nn.Module, cfg: Config) -> str:
    size = sum(weight.numel() for weight in model.parameters())
    moving = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    parameters = f"{size:,} parameters" if moving == size else f"{size:,} parameters, {moving:,} trained"
    counts = ", ".join(f"{split} {len(cells.rows(split, controls=False)):,}" for split in SPLITS)
    return (f"{cfg.toml_config_path}: {len(cells.cell_type):,} cells of {len(cells.cell_types)} cell types, "
            f"{len(cells.perturbations) - 1} perturbations and {cfg.control_pert}; perturbed cells: {counts} | "
            f"{'read from disk' if cells.streamed else 'held in memory'}\n"
            f"State: {parameters} | {cfg.max_steps:,} steps of {cfg.batch_size} sentences of {cfg.cell_set_len} cells "
            f"| {cfg.out_dir}")


# ---------------------------------------------------------------------------------------------------------------
# Runs that are there: sample.py and --analyze
# ---------------------------------------------------------------------------------------------------------------
def load_run(path: str | Path, device: str = "auto", attention: str = "auto") -> tuple[Config, nn.Module, int, dict]:
    """(settings, model, steps done, extra state) of a run folder or checkpoint, ours or the source's .ckpt.

    attention: of a source checkpoint, see foreign_state.translate. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_file() and not checkpoint.experiment_of(path):
        return load_source_run(path, device, attention)
    path = path / "best.pt" if (path / "best.pt").exists() else path
    state = checkpoint.load(path, __file__)
    cfg, extra = from_dict(Config, state["config"], str(path), ALIASES), state["extra"]
    cfg.device = device
    if cfg.perturbation_features_file and not Path(cfg.perturbation_features_file).exists():
        folder = path if path.is_dir() else path.parent
        cfg.perturbation_features_file = str(folder / "pert_onehot_map.pt")
    model = build_model(cfg, extra["dims"])
    checkpoint.load_weights(model, state["model"], path)
    return cfg, model, state["step"], extra


def load_source_run(path: Path, device: str, attention: str) -> tuple[Config, nn.Module, int, dict]:
    """The same of a .ckpt of the source; its perturbations mean what pert_onehot_map.pt of its run folder says."""
    settings, weights, step, dims, notes = convert(path, attention)
    if not settings:
        raise CheckpointError(f"{path} has weights but not the settings of its model (input_dim, hidden_dim, ...): it "
                              "can be trained from with init_from, but not be used by itself")
    for note in notes:
        print(f"note: {note}")
    try:
        cfg = Config(device=device, **settings)
        model = build_model(cfg, dims)
    except (TypeError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path}: its settings make no model ({type(e).__name__}: {e})") from e
    load_source_state_dict(model, weights)
    return cfg, model, step, {"dims": dims}


def open_run_data(cfg: Config, extra: dict) -> Cells:
    """The cells of a run's settings, with the run's numbers for perturbations and batches, whatever its TOML.

    Raises DataError for other genes, and for perturbations or batches that the model has no number for.
    """
    cells, dims, where = open_data(cfg), extra["dims"], cfg.toml_config_path
    for name, genes in (("genes", cells.genes), ("count_genes", cells.count_genes)):
        if extra.get(name) is not None and list(genes or []) != list(extra[name]):
            raise DataError(f"{where} has other {name} than this run, or in another order: "
                            f"{len(genes or [])} against {len(extra[name])}")
    if "perturbations" in extra and not cfg.perturbation_features_file:
        places = codes_of(cells.perturbations, extra["perturbations"], "perturbation", where)
        cells.pert_dim = len(extra["perturbations"])
        cells.features = torch.eye(cells.pert_dim)[places]
    if "batches" in extra and cfg.batch_encoder:
        places = codes_of(cells.batches, extra["batches"], "batch", where)
        cells.batch, cells.batches = np.array(places, np.int32)[cells.batch], extra["batches"]
    elif cfg.batch_encoder and cells.batch_dim > (dims["batch_dim"] or 0):
        raise DataError(f"{where} has {cells.batch_dim} batches, more than the model's {dims['batch_dim']}")
    cells.batch_dim = dims["batch_dim"]
    if (cells.input_dim, cells.pert_dim) != (dims["input_dim"], dims["pert_dim"]):
        raise DataError(f"{where} is not the data of this run: cells have {cells.input_dim} and perturbations "
                        f"{cells.pert_dim} features, the model's {dims['input_dim']} and {dims['pert_dim']}")
    return cells


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
        result = finish(model.to(rt.device), open_run_data(saved, extra), saved, rt, folder)
    print(f"step {step}: " + effects.verdict(result, folder).removeprefix("done: "))
    return result


def main(argv: list[str] | None = None) -> dict:
    words = sys.argv[1:] if argv is None else argv
    with clear_errors():
        cfg = configure(Config, source_words(words), ALIASES)
        cfg.device = source_device(cfg.device, words)
        return analyze(cfg) if cfg.analyze else train(cfg)


if __name__ == "__main__":
    main()
