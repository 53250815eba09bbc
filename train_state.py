"""Train a model that turns sets of control cells into the cells a perturbation would make of them.

A sentence is a set of control cells of one cell type and the name of a perturbation. The model (State Transition,
Adduri et al. 2025) reads the cells together, without order, and writes as many perturbed cells; it is trained by a
distance between the two sets, because no measured cell is seen both before and after. What counts is measured on cell
types and perturbations that were never seen together, beside three baselines that know only means.

    python train_state.py      # synthetic cells, 2 minutes on two CPU cores: Pearson delta 0.950, best baseline 0.697
    python train_state.py config/state_sm.py --toml=data/my.toml --embed_key=X_hvg        # your own h5ad files
    python train_state.py tx train model=state_sm data.kwargs.toml_config_path=data/my.toml    # as State's own command
    python prepare_data.py state inspect data/my.toml          # what a TOML selects, before any training
    torchrun --nproc_per_node=8 train_state.py config/state.py --toml=data/my.toml

Dimensions: B sentences, S cells of a sentence, N cells, D input features, G genes, P perturbation features, H width.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import DataError, clear_errors, rehearsal  # isort: skip

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import checkpoint, store
from common.ahead import send
from common.compiling import uncompiled
from common.runlog import RunLog, ended_before, first_line, run_facts, say_again
from common.runtime import Meter, Runtime, learning_rate
from common.telling import Work, bar, note
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
    take_over,
)
from kernels.energy import energy_distance
from kernels.geomloss_distance import geomloss_distance
from measure import baselines, effects
from measure.pages import run_page
from sources.cell_sets import (  # noqa: F401
    choose,
    codes_of,
    control_pools,
    known_perturbations,
    renumber,
    same_lengths,
    same_meaning,
    summary_of,
)
from sources.cells import Cells, open_cells
from sources.foreign import STATE
from sources.foreign_blocks import GPT2, ConfidenceToken, LatentToGeneDecoder, add_lora, in_sentences, rotate
from sources.foreign_checkpoints import source_file
from sources.foreign_state import SHAPE, load_parts, load_source_state_dict, translate
from sources.foreign_state_files import convert, convert_whole, unlike_smolstate, write_maps, write_source_files
from sources.foreign_state_settings import ALIASES, command, from_the_source
from sources.populations import synthetic
from sources.shared import counted, counter_rng, make_once
from sources.splits import SPLITS, grouped

EXPERIMENT = "state"  # what sample.py treats a run of this page as; a copy keeps it
# Of summary.json, said at the end beside the table of model and baselines.
HEADLINES = ("val_loss", "seconds")
SYNTHETIC = "data/state/synthetic.toml"  # made when it is missing


@dataclass
class Config:
    # output
    out_dir: str = checkpoint.default_out_dir(__file__)  # run folder
    s3_config: str = ""  # .ini of a bucket that out_dir is copied to, see docs/runs.md
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    analyze: str = ""  # run folder or checkpoint to measure again instead of training
    out: str = ""  # with analyze: folder of what is written; default analysis/ of the run
    source_files: bool | Literal["state", "smolstate"] = False  # also write the run as arc-state (true) or SmolState do
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
    drop_unlabelled: bool = False  # leave cells without cell type, perturbation or batch out
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
    d_head: Count | None = None  # default d_model / n_heads
    d_mlp: Count = 512  # width of the MLP of a block
    transformer_backbone_key: Literal["llama", "GPT2"] = "llama"  # kind of the blocks; neither has positions
    bidirectional_attention: bool = True  # false: causal, as some checkpoints of the source are
    rotary: bool = False  # rotary positions, which a set does not have: for such checkpoints
    rope_theta: Positive = 10_000.0  # their base
    norm_eps: Positive | None = None  # of the norms of the transformer; default 1e-6 (llama), 1e-5 (GPT2)
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
    init_from: str | None = None  # run or checkpoint to start from, ours or the source's; its sizes are taken over
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
    eval_interval: Count = 200  # steps between evaluations
    log_interval: Count = 50  # steps between log lines
    save_interval: Count | None = None  # steps between saves of last.pt; default eval_interval
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    eval_sentences: Count = 256  # of validation, during training
    # system
    seed: Whole = 42  # of weights, sentences and held-out conditions
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on GPUs that have it, else fp32
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products: torch's own names
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only
    wandb: bool | Literal["online", "offline"] = False  # log to Weights & Biases; project and entity below or from .env
    wandb_project: str = ""
    wandb_entity: str = ""
    tensorboard: bool = False  # log to TensorBoard

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        wrong = []
        if self.d_head is None and self.d_model % self.n_heads:
            wrong.append(f"d_model = {self.d_model} is no multiple of n_heads = {self.n_heads}: set d_head")
        if self.n_heads % (self.n_kv_heads or 1):
            wrong.append(f"n_heads = {self.n_heads} is no multiple of n_kv_heads = {self.n_kv_heads}")
        if self.rotary and (self.d_head or self.d_model // self.n_heads) % 2:
            wrong.append("rotary positions need an even d_head")
        if self.transformer_backbone_key == "GPT2" and (self.rotary or not self.bidirectional_attention):
            wrong.append("transformer_backbone_key = GPT2 is bidirectional and has no positions")
        if self.use_batch_token and (self.batch_encoder or self.basal_mapping_strategy != "batch"):
            wrong.append("use_batch_token needs basal_mapping_strategy = batch, and no batch_encoder: all cells of a "
                         "sentence are then of the batch that the token must name")
        widths = self.decoder_hidden_dims
        if self.residual_decoder and widths[: len(widths) // 2 * 2 : 2] != widths[1::2]:
            wrong.append(f"residual_decoder needs hidden layers of equal width in pairs, not {widths}")
        if self.source_files == "smolstate":
            wrong += unlike_smolstate(self)
        if not self.toml_config_path:
            wrong.append("toml_config_path is empty: name the TOML of your data, or leave it out for synthetic cells")
        return wrong


# ---------------------------------------------------------------------------------------------------------------
# Batches: sentences of cells, and the control cells that each of them is predicted from
# ---------------------------------------------------------------------------------------------------------------
OF_DATA = ("pert_col cell_type_key batch_col control_pert embed_key output_space counts drop_unlabelled strict "
           "zeroshot_controls val_fraction seed perturbation_features_file ram_budget_gb").split()


def open_data(cfg: Config) -> Cells:
    """The cells that cfg.toml_config_path names; the synthetic default is made where it is missing."""
    path = Path(cfg.toml_config_path)
    # 10,240 cells of 16 cell types under 12 perturbations; one type is never seen perturbed.
    if cfg.toml_config_path == SYNTHETIC:
        make_once(path, lambda: synthetic(out_dir=str(path.parent)))
    return open_cells(toml=path, **{name: getattr(cfg, name) for name in OF_DATA})


class Sentences:
    """Sets of cell_set_len cells of one group: file, cell type, perturbation, with basal_mapping_strategy=batch also
    batch; and a control cell for each, drawn from those of the same file, cell type and, if batch, batch.

    All of it is a pure function of (seed, split, epoch). Raises DataError where the split has no cells.
    """

    def __init__(self, cells: Cells, split: str, cfg: Config):
        self.cells, self.split, self.cfg = cells, SPLITS.index(split), cfg
        by_batch = cfg.basal_mapping_strategy == "batch"
        # Groups never cross files: control cells of another experiment are no controls.
        keys = [cells.file, cells.cell_type, cells.perturbation]
        if by_batch:
            keys.append(cells.batch)
        rows, bounds = grouped(cells.rows(split, cfg.should_yield_control_cells), *keys)
        if not len(rows):
            raise DataError(f"{cells.toml} has no cells to {'train on' if split == 'train' else split}: see python "
                            f"prepare_data.py inspect {cells.toml}")
        # A choice of each group, the same in every epoch: how much do more cells of a condition help?
        if cfg.downsample_cells:
            rng = counter_rng(cfg.seed, 2, self.split)
            rows, bounds = grouped(choose(rows, bounds, cfg.downsample_cells, rng), *keys)
        self.rows = rows
        self.starts = bounds[:-1]
        self.sizes = np.diff(bounds)
        # Sentence i is the stretch of its group from offset on; the last of a group may be short of cells.
        count = -(-self.sizes // cfg.cell_set_len)
        first = np.cumsum(count) - count
        self.group = np.repeat(np.arange(len(count)), count)
        self.offset = (np.arange(len(self.group)) - first[self.group]) * cfg.cell_set_len
        # Control cells of a group: a stretch of the pool.
        self.pool, self.pool_start, self.pool_size = control_pools(cells, split, rows[self.starts], by_batch)

    def __len__(self) -> int:
        return len(self.group)

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(targets [n, S], controls [n, S, n_basal_samples]), rows of the cells; -1: there is no control cell."""
        rng = counter_rng(self.cfg.seed, 3, self.split, epoch)
        # Every cell once an epoch, each time in other company: shuffled within its group.
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        shuffled = self.rows[np.argsort(group + rng.random(len(group)), kind="stable")]
        targets, controls, _ = self.fill(shuffled, rng)
        # Groups mixed: a batch of one perturbation would pull the model its way.
        order = rng.permutation(len(targets))
        return targets[order], controls[order]

    def whole(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(targets [s], controls [s, n_basal_samples]) of every sentence, s <= S: each cell once, none filled up."""
        targets, controls, sizes = self.fill(self.rows, counter_rng(self.cfg.seed, 3, self.split, 0))
        return [(targets[i, :size], controls[i, :size]) for i, size in enumerate(sizes)]

    def fill(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets and controls of all sentences of rows sorted by group, and how many cells of each are its own."""
        # Targets: a stretch of the group, completed by cells of the group drawn with replacement.
        place = self.offset[:, None] + np.arange(self.cfg.cell_set_len)  # [n, S], within the group
        size = np.broadcast_to(self.sizes[self.group, None], place.shape)
        beyond = place >= size
        place[beyond] = draw(rng, size[beyond])
        targets = rows[self.starts[self.group, None] + place]
        # Controls: any of the pool. Which one is no matter, for what counts is the set.
        start = self.pool_start[self.group, None, None]
        size = self.pool_size[self.group, None, None]
        drawn = draw(rng, np.broadcast_to(size, (*place.shape, self.cfg.n_basal_samples)))
        pool = np.append(self.pool, -1)  # an empty stretch may begin at its end
        controls = np.where(size > 0, pool[start + drawn], -1)
        # A control cell as target is predicted from another one, or from itself (which cell-load 0.10.4 ignores).
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
    b, S, k = controls.shape
    # No control cell of this type: zeros, as cell-load takes them.
    lonely = controls < 0
    basal = cells.read(np.where(lonely, targets[..., None], controls).ravel(), "input", device)
    basal = basal.view(b, S, k, -1)
    if lonely.any():
        # An index of booleans would wait for the device, to count them.
        basal.masked_fill_(send(torch.from_numpy(lonely), device)[..., None], 0.0)
    # The perturbation: its number as a one-hot vector, or its features, which a new one may have too.
    pert = torch.from_numpy(cells.perturbation[targets[:, 0]].astype(np.int64))
    features = F.one_hot(pert, cells.pert_dim).float() if cells.features is None else cells.features[pert]
    batch = {
        "pert_emb": send(features, device),
        # Of n_basal_samples cells: less noise, and less of a cell. A mean of one would cost as much as reading it.
        "ctrl_cell_emb": basal.mean(2) if k > 1 else basal[:, :, 0],
        "pert_cell_emb": cells.read(targets.ravel(), "input", device).view(b, S, -1),
        "batch": send(torch.from_numpy(cells.batch[targets].astype(np.int64)), device),
    }
    # What a decoder learns from, where the model's cells are embeddings.
    if cells.count_genes is not None:
        batch["pert_cell_counts"] = cells.read(targets.ravel(), "counts", device).view(b, S, -1)
    return batch


class Batches:
    """Sentences of every step: a pure function of (seed, step, rank). Epochs follow one another without a seam."""

    def __init__(self, rt: Runtime, cells: Cells, cfg: Config):
        self.rt, self.cells, self.cfg = rt, cells, cfg
        self.sentences = Sentences(cells, "train", cfg)
        # Two epochs at a time: a batch may hold the end of one and the start of the next.
        self.plan = lru_cache(2)(self.sentences.plan)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Targets [B, S] and controls [B, S, n_basal_samples] of the whole batch of a step."""
        targets, controls = [], []
        # Sentence number `place` of the run, whatever the number of ranks and wherever the run was resumed.
        for place in range(step * self.cfg.batch_size, (step + 1) * self.cfg.batch_size):
            epoch, sentence = divmod(place, len(self.sentences))
            plan = self.plan(epoch)
            targets.append(plan[0][sentence])
            controls.append(plan[1][sentence])
        return np.stack(targets), np.stack(controls)

    def __call__(self, step: int) -> dict:
        """This rank's batch, as make_batch has it, of b = batch_size / world_size sentences."""
        targets, controls = self.rows(step)
        # Rows are shared before cells are read: a rank reads its own only.
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


class Attention(nn.Module):
    """Among the cells of a sentence. Llama's own form: no biases, heads of any width, grouped keys and values."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, H = cfg, cfg.d_model
        self.width = cfg.d_head or H // cfg.n_heads
        # Heads need not add up to H, and keys and values may have fewer of them.
        wide = cfg.n_heads * self.width
        narrow = (cfg.n_kv_heads or cfg.n_heads) * self.width
        self.q_proj = nn.Linear(H, wide, bias=False)
        self.k_proj = nn.Linear(H, narrow, bias=False)
        self.v_proj = nn.Linear(H, narrow, bias=False)
        self.o_proj = nn.Linear(wide, H, bias=False)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)  # [B, heads, T, C]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]."""
        cfg = self.cfg
        q = self.heads(self.q_proj(x))
        k = self.heads(self.k_proj(x))
        v = self.heads(self.v_proj(x))
        # No positions: a set has no order, and without them what a cell becomes does not depend on where it stands.
        # Rotary ones, and causal attention, are for checkpoints that were trained so.
        if cfg.rotary:
            q = rotate(q, cfg.rope_theta)
            k = rotate(k, cfg.rope_theta)
        # Grouped keys and values: each head of them serves a group of neighbouring queries.
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k = k.repeat_interleave(group, 1)
            v = v.repeat_interleave(group, 1)
        # A masked cell sees only itself and has nothing to weigh: the softmax of one number is 1.
        if not cfg.mask_attn:
            dropout = cfg.attention_dropout if self.training else 0.0
            v = F.scaled_dot_product_attention(q, k, v, is_causal=not cfg.bidirectional_attention, dropout_p=dropout)
        return self.o_proj(v.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.down_proj = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), in the precision of x."""

    def __init__(self, cfg: Config):
        super().__init__(cfg.d_model, eps=cfg.norm_eps or 1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The weight is float32, which would make the whole stream so under autocast.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LlamaBlock(nn.Module):
    """Pre-norm block of Llama (Touvron et al. 2023): RMSNorm, attention, RMSNorm, SwiGLU."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = GatedMLP(cfg)
        # Before each part, not after it: the stream from first to last block stays free of norms.
        self.input_layernorm = RMSNorm(cfg)
        self.post_attention_layernorm = RMSNorm(cfg)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A stack of Llama blocks over the cells of a sentence."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.layers = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg)
        for weight in self.parameters():
            if weight.ndim == 2:  # the norms start at 1
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]."""
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


BACKBONES = {"llama": Llama, "GPT2": GPT2}


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
        # Encoders: the perturbation, and the control cell that it befalls.
        self.pert_encoder = mlp(dims["pert_dim"], H, H, cfg.n_encoder_layers, cfg)
        layers = cfg.n_encoder_layers if cfg.use_basal_projection else 1
        basal = mlp(dims["input_dim"], H, H, layers, cfg)
        self.basal_encoder = basal if cfg.use_basal_projection else basal[0]  # named as the source names it
        self.pert_norm = nn.LayerNorm(H) if cfg.pert_norm else nn.Identity()
        # Backbone and output. The genes of X, all of them, go through an eighth of their number once more.
        self.transformer_backbone = BACKBONES[cfg.transformer_backbone_key](cfg)
        self.project_out = mlp(H, H, D, cfg.n_decoder_layers, cfg)
        if cfg.output_space == "all":
            narrow = max(1, D // 8)
            self.final_down_then_up = nn.Sequential(nn.Linear(D, narrow), nn.GELU(), nn.Linear(narrow, D))
        # Batches: told to the model, or asked of it.
        if cfg.batch_encoder:
            self.batch_encoder = nn.Embedding(dims["batch_dim"], H)
        if cfg.use_batch_token:
            self.batch_token = nn.Parameter(torch.randn(1, 1, H))
            self.batch_classifier = mlp(H, H, dims["batch_dim"], 1, cfg)
        # Confidence: what its own loss will be, where no measured cells tell.
        if cfg.confidence_token:
            self.confidence_token = ConfidenceToken(cfg)
        # Genes, where cells are embeddings.
        self.gene_decoder = None
        if dims["decodes"] and cfg.gene_decoder_bool is not False:
            genes = dims["hvg_dim" if cfg.output_space == "gene" else "gene_dim"]
            self.gene_decoder = LatentToGeneDecoder(D, genes, cfg)
        # Expression is never negative; embeddings may be, where the source clips them unless a decoder reads them.
        self.clips = cfg.embed_key in ("X_hvg", None, "") or (cfg.compat_relu and self.gene_decoder is None)
        # Adapters last, so that a model with them starts from the weights of one without.
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
        # Adapters train in a frozen backbone; queries and keys of masked cells are never asked.
        for name, weight in self.transformer_backbone.named_parameters():
            frozen = cfg.freeze_pert_backbone and "lora_" not in name
            unused = cfg.mask_attn and re.search(r"\.[qk]_proj\.", name)
            if frozen or unused:
                weight.requires_grad_(False)

    def forward(self, batch: dict, padded: bool = True, losses: bool = False):
        """Predicted cells [B * S, output_dim], with the confidence [B, 1] where there is such a token.

        batch: as make_batch has it, or with a row a cell; padded=False: these are one sentence.
        losses=True: the terms of the loss instead (see `losses`), in one call, as DistributedDataParallel needs it.
        """
        cfg = self.cfg
        knows_batches = cfg.batch_encoder or cfg.use_batch_token
        S = cfg.cell_set_len if padded else len(batch["ctrl_cell_emb"])
        batch = in_sentences(batch, S, self.dims["batch_dim"] if knows_batches else None)
        out = self.predict(batch)
        if losses:
            return self.losses(batch, out)
        cells = out["cells"].flatten(0, 1)
        return (cells, out["confidence"]) if "confidence" in out else cells

    def predict(self, batch: dict) -> dict:
        """Predicted cells of sentences, and what else the model's tokens say.

        batch: ctrl_cell_emb [B, S, D]; pert_emb [B, S or 1, P] or [B, P]; batch, codes [B, S or 1], if it is used.
        Returns: cells [B, S, output_dim]; of the tokens there are, confidence [B, 1] and batch_logits [B, batch_dim].
        """
        cfg, S = self.cfg, batch["ctrl_cell_emb"].shape[1]
        pert = batch["pert_emb"]
        if pert.ndim == 2:  # one of the whole sentence
            pert = pert[:, None]
        # Every cell starts as the sum of what it is and of what befalls it.
        pert = self.pert_norm(self.pert_encoder(pert))  # [B, S or 1, H], the same for all cells of a sentence
        control = self.basal_encoder(batch["ctrl_cell_emb"])  # [B, S, H]
        x = pert + control
        if cfg.batch_encoder:
            x = x + self.batch_encoder(batch["batch"])

        # Tokens that are no cells: the batch before them, the confidence after them.
        if cfg.use_batch_token:
            # One learned token, so that nothing but the cells can tell it the batch.
            x = torch.cat([self.batch_token.expand(len(x), -1, -1), x], 1)
        if cfg.confidence_token:
            x = torch.cat([x, self.confidence_token.confidence_token.expand(len(x), -1, -1)], 1)
        # The transformer: a cell answers as its population does, which is told by the other cells alone.
        x = self.transformer_backbone(x)
        out = {}
        if cfg.confidence_token:
            out["confidence"] = self.confidence_token.confidence_projection(x[:, -1])
        if cfg.use_batch_token:
            out["batch_logits"] = self.batch_classifier(x[:, 0])
            x = x[:, 1:]
        x = x[:, :S]  # the cells

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

    # Loss ------------------------------------------------------------------------------------------------------
    def set_loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The configured distance of every sentence: pred and target [B, S, D] or [B * S, D] -> [B]."""
        cfg, D = self.cfg, pred.shape[-1]
        if pred.ndim == 2:
            pred = pred.unflatten(0, (-1, cfg.cell_set_len))
            target = target.unflatten(0, (-1, cfg.cell_set_len))
        # The source has two settings for one thing.
        loss = cfg.distributional_loss if cfg.loss == "energy" else cfg.loss
        weights = cfg.blur, cfg.sinkhorn_weight, cfg.energy_weight
        if cfg.mmd_num_chunks == 1 or loss in ("se", "mse"):
            return set_loss(pred, target, loss, *weights)
        # Groups of features: the few genes that vary most rule a distance of all; a mean over groups hears the others.
        order = torch.arange(D, device=pred.device)
        # Other groups each time, so that no two genes are held apart for ever; not where losses are compared.
        if cfg.randomize_mmd_chunks and self.training:
            order = torch.randperm(D, device=pred.device)
        groups = order.chunk(cfg.mmd_num_chunks)
        distances = [set_loss(pred[..., group], target[..., group], loss, *weights) for group in groups]
        return torch.stack(distances).nanmean(0)

    def losses(self, batch: dict, out: dict) -> dict:
        """All terms of the loss, "loss" their sum and "per_set" [B] the distance of each sentence.

        batch: in sentences; pert_cell_emb, the measured cells; pert_cell_counts, their genes, where a decoder learns.
        """
        cfg, pred = self.cfg, out["cells"]
        # The distance between sets. A sentence that has none (nan) is left out of the mean.
        per_set = self.set_loss(pred, batch["pert_cell_emb"])
        terms = {"per_set": per_set.detach(), "distance": per_set.nanmean()}
        total = terms["distance"]  # weighed terms are added to it
        # The batch: the token must name the one that all cells of its sentence are of.
        if "batch_logits" in out:
            terms["batch_token"] = F.cross_entropy(out["batch_logits"].float(), batch["batch"][:, 0])
            total = total + cfg.batch_token_weight * terms["batch_token"]
        # Genes: the same distance, of decoded and measured ones.
        if self.gene_decoder is not None and "pert_cell_counts" in batch:
            genes = self.gene_decoder(self.latent(pred, batch["pert_cell_emb"]))
            terms["decoder"] = self.set_loss(genes, batch["pert_cell_counts"]).mean()
            total = total + cfg.decoder_weight * terms["decoder"]
        # Confidence: the loss of the sentence is foretold, and not changed by that.
        if "confidence" in out:
            # Detached, else the cells would be made worse where that is easier to foretell.
            wanted = per_set if cfg.confidence_per_set else total.expand(len(pred))
            scaled = cfg.confidence_target_scale * wanted.detach()
            terms["confidence"] = F.mse_loss(out["confidence"][:, 0].to(scaled), scaled)
            total = total + cfg.confidence_weight * terms["confidence"]
        # Sparse change: most genes do not answer to most perturbations.
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
    # The keywords hold the sizes of the data too.
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
@uncompiled  # of custom gradients and geomloss there is nothing to gain
def set_loss(pred: torch.Tensor, target: torch.Tensor, loss: str = "energy", blur: float = 0.05,
             sinkhorn_weight: float = 0.01, energy_weight: float = 1.0) -> torch.Tensor:
    """The distance between predicted and measured cells of each sentence: [B, S, D] twice -> [B], in float32 or better.

    Args:
        loss: energy | sinkhorn | se, sinkhorn_weight * sinkhorn + energy_weight * energy | mse, cell by cell |
            gaussian | laplacian, kernels of geomloss with this blur.
    Two sets [S, D] give a number. Gradients are for pred; target has none. Raises ValueError for an
    unknown loss and for sets that cannot be compared.
    """
    # Two sets alone: a batch of one sentence.
    if pred.ndim == 2:
        return set_loss(pred[None], target[None], loss, blur, sinkhorn_weight, energy_weight)[0]
    # Sets may have different numbers of cells, but not of features.
    comparable = pred.shape == target.shape if loss == "mse" else pred.shape[::2] == target.shape[::2]
    if not comparable or not pred.numel() * target.numel():
        raise ValueError(f"sets of cells {list(pred.shape)} and {list(target.shape)} cannot be compared by {loss}")
    # Half precision would round away squared distances, which are small differences of large numbers.
    with torch.autocast(pred.device.type, enabled=False):
        pred = pred if pred.dtype == torch.float64 else pred.float()
        target = target.to(pred.dtype)
        # Cell by cell, for comparison: right only where the order of cells means something.
        if loss == "mse":
            return (pred - target).square().mean((1, 2))
        # E|x - y| - E|x - x'| / 2 - E|y - y'| / 2 over all pairs is zero if and only if both sets are of one
        # distribution. No cell is paired with another, for none is measured both before and after. |x - y| pulls a
        # predicted cell to the measured ones, |x - x'| pushes it off its like: without it all would be the mean.
        if loss == "energy":
            return energy_distance(pred, target)
        # Optimal transport, blurred by the entropy of its plan; by default a hundredth of it beside the energy.
        if loss == "se":
            sinkhorn = geomloss_distance(pred, target, "sinkhorn", blur)
            return sinkhorn_weight * sinkhorn + energy_weight * energy_distance(pred, target)
        # Maximum mean discrepancies, and sinkhorn alone.
        if loss in ("sinkhorn", "gaussian", "laplacian"):
            return geomloss_distance(pred, target, loss, blur)
    raise ValueError(f"loss = {loss!r}: use energy, sinkhorn, se, mse, gaussian or laplacian")


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
def held_out(cells: Cells) -> str:
    """The split that a run is measured on: test, or validation where there is none. Raises DataError without both."""
    # Perturbed cells only: the controls of a split serve as its inputs.
    for split in ("test", "val"):
        if len(cells.rows(split, controls=False)):
            return split
    raise DataError(f"{cells.toml} holds nothing out: name cells for test or val, or leave some conditions for "
                    "validation with val_fraction = 0.1")


def expressed(model: StateTransitionPerturbationModel, cells: torch.Tensor) -> torch.Tensor:
    """Predicted cells as what they are measured in: genes by the decoder where there is one."""
    return cells if model.gene_decoder is None else model.gene_decoder(cells)


@torch.no_grad()
def validate(
    model: StateTransitionPerturbationModel,
    sentences: tuple,
    cells: Cells,
    rt: Runtime,
    cfg: Config,
) -> dict:
    """Mean loss terms over sentences, rows of targets [n, S] and of controls [n, S, k]. Collective."""
    model.eval()
    targets, controls = map(rt.share, sentences)
    results = []
    at_once = rt.divide(cfg.batch_size, cfg.grad_accum)  # what fits in training
    for i in range(0, len(targets), at_once):
        batch = make_batch(cells, targets[i : i + at_once], controls[i : i + at_once], rt.device)
        with rt.autocast():
            terms = model(batch, losses=True)
        results.append((len(terms.pop("per_set")), terms))
    model.train()
    # Read from the device when all of them are on their way: a read waits.
    sums, count = {}, 0
    for n, terms in results:
        count += n
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * n
    # Ranks have different numbers of sentences, perhaps none: sums travel, not means.
    shares = [share for share in rt.gather((sums, count)) if share[1]]
    total = sum(n for _, n in shares)
    return {name: sum(part[name] for part, _ in shares) / total for name in shares[0][0]}


@torch.no_grad()
def predict_sentences(
    model: StateTransitionPerturbationModel,
    sentences: list,
    cells: Cells,
    rt: Runtime,
    cfg: Config,
    work: Work | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted cells of sentences of any lengths: rows of the targets [N], ascending, cells [N, G]. Collective."""
    model.eval()
    parts = []
    # Short sentences are not filled up, so that no cell is counted twice.
    for targets, controls in same_lengths(rt.share(sentences), cfg.batch_size * cfg.cell_set_len):
        batch = make_batch(cells, targets, controls, rt.device)
        with rt.autocast():
            predicted = expressed(model, model.predict(batch)["cells"])  # [b, s, G]
        predicted = predicted.flatten(0, 1).float().cpu().numpy()
        parts.append((targets.ravel(), predicted))
        if work:
            work.update(len(predicted) * rt.world_size)
    model.train()
    # Of all ranks, in the order of the cells.
    parts = sum(rt.gather(parts), [])
    rows, predicted = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], predicted[order]


def measured_as(model: StateTransitionPerturbationModel) -> tuple[str, bool]:
    """(what predictions are compared with: "input" or "counts", whether that is expression)."""
    if model.gene_decoder is not None:
        return "counts", True
    return "input", model.cfg.embed_key in (None, "", "X", "X_hvg")


def predictions(
    model: StateTransitionPerturbationModel,
    cells: Cells,
    cfg: Config,
    rt: Runtime,
    most: int | None = None,
    work: Work | None = None,
) -> Iterator[dict]:
    """One held-out cell type of a file after the other: {file, cell_type, rows, pred [N, G], real [N, G], controls,
    control [C, G]}.

    rows and controls are rows of the cells: the perturbed ones predicted, once each, and all control cells of the type
    in that file, which they were predicted from. most: only of so many sentences and controls. Yields on every rank;
    what is measured, on rank 0 alone. Memory is that of one cell type. work: counts cells.
    """
    which, _ = measured_as(model)
    by_context = {}
    for targets, controls in Sentences(cells, held_out(cells), cfg).whole():
        # A control cell as target has no effect to measure.
        if not cells.is_control[targets[0]]:
            context = int(cells.file[targets[0]]), int(cells.cell_type[targets[0]])
            by_context.setdefault(context, []).append((targets, controls))
    for context, sentences in sorted(by_context.items()):
        rows, predicted = predict_sentences(model, sentences[:most], cells, rt, cfg, work)
        part = {"file": context[0], "cell_type": context[1], "rows": rows, "pred": predicted}
        # Measured cells are read where they are compared.
        if rt.is_main:
            part["controls"] = baselines.control_rows(cells, context)[:most]
            part["real"] = cells.read(rows, which).numpy()
            part["control"] = cells.read(part["controls"], which).numpy()
        yield part


def evaluate(model: StateTransitionPerturbationModel, cells: Cells, cfg: Config, rt: Runtime, keep=None) -> dict:
    """The model and the baselines on every held-out condition: what effects.evaluate_conditions returns. Collective.

    keep: called with what `predictions` yields.
    """
    which, expression = measured_as(model)
    # Means of the cells trained on: all that the baselines know.
    known = baselines.train_baselines(cells, which) if rt.is_main else None
    results = []
    count = len(cells.rows(held_out(cells), controls=False))
    # Each cell is predicted, and then measured with those of its type.
    with bar(None, f"predicting and measuring {counted(count, 'held-out cell')}", 2 * count, active=rt.is_main) as work:
        for part in predictions(model, cells, cfg, rt, work=work):
            if rt.is_main:
                results.append(effects.evaluate_context(part, cells, known, which, expression))
                work.update(len(part["rows"]))
                if keep:
                    keep(part)
    return effects.join(results) if rt.is_main else {}


def finish(
    model: StateTransitionPerturbationModel,
    cells: Cells,
    cfg: Config,
    rt: Runtime,
    folder: Path,
    keep=None,
) -> dict:
    """Measure on what was held out: metrics.csv, results.json, pictures; returns the summary. Collective."""
    results = evaluate(model, cells, cfg, rt, keep)
    summary = {}
    if rt.is_main:
        summary = effects.write_results(folder, Path(cfg.toml_config_path).stem, results)
    rt.barrier()
    return summary


def rehearse(model: StateTransitionPerturbationModel, batches: Batches, rt: Runtime, cfg: Config) -> None:
    """What training and its end ask of model and data, on a few sentences. Collective."""
    cells = batches.cells
    with rehearsal():
        # A step with its gradients, the loss of one sentence, and cells against measured ones, as after training.
        train_step(model, {name: value[:2] for name, value in batches(0).items()}, rt, replace(cfg, grad_accum=1))
        model.zero_grad(set_to_none=True)
        validate(model, [part[:1] for part in batches.rows(0)], cells, rt, cfg)
        part = next(predictions(model, cells, cfg, rt, most=4))
        if rt.is_main:
            effects.evaluate_context(part, cells, None, *measured_as(model))


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def start_from_checkpoint(cfg: Config) -> tuple[Config, dict]:
    """For init_from: (cfg with the shape of that checkpoint, its weights). Raises CheckpointError."""
    path = store.local(cfg.init_from)
    source = source_file(path)
    # The source's, or ours, of this page or of a copy. Only what decides the shape is taken over from its settings.
    if source:
        saved, weights, *_ = convert(source, cfg.source_attention)
        if saved:
            saved = vars(from_dict(Config, {name: saved[name] for name in SHAPE}, str(source)))
    else:
        state = checkpoint.load(checkpoint.best_of(path))
        weights, saved = state["model"], vars(from_dict(Config, state["config"], str(path), ALIASES))
    taken = {name: saved[name] for name in SHAPE if name in saved and saved[name] != getattr(cfg, name)}
    if taken:
        note(f"taken over from {path}: {', '.join(f'{name} = {value}' for name, value in taken.items())}")
    return replace(cfg, **taken), weights


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
    """Set the last biases to the mean control cell of training, or where no control cell trains to that of all cells.

    Without it, output features that are negative for all cells at the start stay 0 behind the ReLU for ever, as nothing
    of the loss reaches them, and the others need hundreds of steps to find the mean.
    """
    rows = cells.rows("train", controls=True)
    controls = rows[cells.is_control[rows]]
    rows = controls if len(controls) else rows
    rows = rows[:: max(1, -(-len(rows) // most))]  # evenly spaced, for the mean of some thousands is that of all
    output = model.project_out
    if model.cfg.output_space == "all" and model.cfg.predict_residual:
        output = model.final_down_then_up
    output[-1].bias.copy_(cells.read(rows).mean(0))
    # The decoder ends in a ReLU too.
    if model.gene_decoder is not None:
        model.gene_decoder.last.bias.copy_(cells.read(rows, "counts").mean(0))


def make_optimizer(model: nn.Module, cfg: Config, rt: Runtime) -> torch.optim.Optimizer:
    """Of what is not frozen: AdamW as SmolState has it, or Adam as State has."""
    params = [weight for weight in model.parameters() if weight.requires_grad]
    # Fused: one kernel for all tensors, 2-4 times faster than a loop over them.
    betas = cfg.beta1, cfg.beta2
    if cfg.optimizer == "adam":
        return torch.optim.Adam(params, lr=cfg.lr, betas=betas, fused=rt.device.type in ("cuda", "cpu"))
    return rt.adamw(params, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay)


def train_step(model: nn.Module, batch: dict, rt: Runtime, cfg: Config) -> dict:
    """Forward and backward over the micro-batches of a batch; returns the loss terms, means over all ranks."""
    sums = {}
    # Micro-batches: gradients add up, and travel between ranks with the last one only.
    for i in range(cfg.grad_accum):
        micro_batch = {name: value.chunk(cfg.grad_accum)[i] for name, value in batch.items()}
        with rt.sync(model, last=i == cfg.grad_accum - 1):
            with rt.autocast():
                terms = model(micro_batch, losses=True)
            rt.backward(terms["loss"] / cfg.grad_accum)
        del terms["per_set"]
        for name, value in terms.items():  # on the device: nothing waits for their values
            sums[name] = sums.get(name, 0.0) + value.detach() / cfg.grad_accum
    means = rt.mean(torch.stack(list(sums.values())))  # one exchange for all terms
    return dict(zip(sums, means, strict=True))


def prepare(cfg: Config, rt: Runtime) -> tuple[Config, Cells, StateTransitionPerturbationModel, list[str]]:
    """(cfg with the shape that init_from gives it, cells, model on the device, what starts anew beside init_from)."""
    weights, fresh = {}, []
    if cfg.init_from:
        cfg, weights = start_from_checkpoint(cfg)
    cells = open_data(cfg)
    held_out(cells)  # a run that could not be measured ends here
    model = rt.build(build_model, cfg, cells.dims())
    if weights:
        fresh = initialise(model, weights, cfg)
    if not weights or "project_out.0.weight" in fresh:
        start_at_mean(model, cells)
    return cfg, cells, model.to(rt.device), fresh


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises InputError (before anything is written) and FloatingPointError (the loss).
    """
    cfg = from_the_source(cfg)
    began = time.perf_counter()
    with Runtime(cfg) as rt, store.run_folder(cfg, rt) as folder:
        rt.divide(cfg.batch_size, cfg.grad_accum)
        cfg, cells, model, fresh = prepare(cfg, rt)
        optimizer = make_optimizer(model, cfg, rt)
        params = optimizer.param_groups[0]["params"]  # those that are not frozen
        batches = rt.ahead(Batches(rt, cells, cfg), cfg.max_steps)  # on a GPU each is made during the step before
        validation = None  # without it the last step is the best
        if len(cells.rows("val", controls=False)):
            validation = [rows[: cfg.eval_sentences] for rows in Sentences(cells, "val", cfg).plan(0)]
        rehearse(model, batches, rt, cfg)
        rt.reseed(rt.rank)  # ranks draw other masks of dropout

        # A fresh run, or one that goes on; a finished run of other settings is refused.
        data = {cfg.toml_config_path: cells.fingerprint}
        path, state, changes = checkpoint.start_from(
            rt, cfg, folder, __file__, lambda old, path: differences(old, cfg, ALIASES, path), data
        )
        summary = ended_before(rt, folder, path, state, changes, HEADLINES, effects.table_of)
        if summary:
            return summary
        step, best = 0, math.inf
        meter = Meter(rt, cfg.batch_size * cfg.cell_set_len, began, state)
        known = {"data": data, "dims": cells.dims(), **cells.maps()}  # what the model's numbers mean
        if state:
            # Resume: with other perturbations or genes the same numbers would mean others.
            same_meaning(state["extra"], {"dims": cells.dims(), **cells.maps()}, path)
            step, best, _, _ = checkpoint.restore(rt, state, path, model, optimizer)
        trained = rt.wrap(model)

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, cfg.max_steps, cells.task) as log:
            if rt.is_main:
                checkpoint.clear(folder, step, best, cfg.keep_last)
                write_maps(folder, cells)
            log.say(rt.describe())
            log.say(summary_of(cells))
            log.say(describe(model, params, cfg))
            if fresh:
                log.say(f"from {cfg.init_from}; these start anew: {', '.join(fresh)}")
            if state:
                log.resumed(path, step, changes)
            meter.start(step)

            while step < cfg.max_steps:
                batch = batches(step)  # sentences of this rank, [B, S, D]
                lr = learning_rate(step, cfg)
                terms = train_step(trained, batch, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)
                step += 1
                meter.check(step, terms["loss"])
                meter.add(terms)
                log.progress(step, terms["loss"], meter)
                due = rt.due(step, cfg.max_steps, cfg.log_interval, cfg.eval_interval, cfg.save_interval)
                if due.nothing:
                    continue

                # Numbers are read from the device here and only here: a read waits for all queued work.
                speed = meter.pause(step, model, lr)
                improved = False
                if due.logs:
                    # Terms are means over the steps since the last line; an epoch is once through all sentences.
                    values = meter.read()
                    values |= {"lr": lr, "grad_norm": float(norm), "cells_per_s": speed}
                    values["epoch"] = step * cfg.batch_size / len(batches.sentences)
                    log.train(
                        step,
                        values,
                        lr,
                        norm,
                        speed,
                        left=(cfg.max_steps - step) * meter.units_per_step / speed,
                        unit="cells",
                        loss=values["loss"],
                    )
                # Validation: held-out conditions as sentences; its loss, not the metrics, chooses the best weights.
                if due.evaluates and validation:
                    values = validate(model, validation, cells, rt, cfg)  # the same sentences each time
                    improved = values["loss"] < best
                    best = min(best, values["loss"])
                    log.metrics(step, "eval", {f"val_{name}": value for name, value in values.items()})
                    log.say(f"step {step:>6} eval | val_loss {values['loss']:.5f}{' *' if improved else ''}")
                # Every rank has its own random state, so all take part.
                if due.saves or improved:
                    saved = checkpoint.capture(
                        rt,
                        __file__,
                        config_dict(cfg),
                        step,
                        model,
                        optimizer,
                        best,
                        meter,
                        extra=known,
                        rank_extra={},
                    )
                    if rt.is_main:
                        checkpoint.save(saved, folder, improved, cfg.keep_last != 0, cfg.keep_last)
                # A signal: saved above, so that the same command goes on to the bit.
                if due.stops:
                    log.stopped(step)
                    return {"stopped_at": step}
                meter.start(step)

            # The weights that validated best are what is measured on cells that were never seen.
            rt.barrier()
            checkpoint.load_best(rt, folder, __file__, model)
            if cfg.source_files and rt.is_main:
                write_source_files(folder, model, cells, step)
            result = finish(model, cells, cfg, rt, folder)
            summary = result | {
                "val_loss": best if validation else None,
                **run_facts(rt, step, meter, "cells"),
                "config_hash": config_hash(cfg),
            }
            log.summary(summary, HEADLINES)
            if rt.is_main:
                log.say(effects.table_of(summary))
                log.say(run_page(folder, Config))
            return summary


def describe(model: nn.Module, params: list, cfg: Config) -> str:
    size = sum(weight.numel() for weight in model.parameters())
    moving = sum(weight.numel() for weight in params)
    trained = f", {moving:,} trained" if moving != size else ""
    return (f"State: {size:,} parameters{trained} | {counted(cfg.max_steps, 'step')} of "
            f"{counted(cfg.batch_size, 'sentence')} of {counted(cfg.cell_set_len, 'cell')} | {cfg.out_dir}")


# ---------------------------------------------------------------------------------------------------------------
# Runs that are there: sample.py and --analyze
# ---------------------------------------------------------------------------------------------------------------
def load_run(path: str | Path, device: str = "auto", attention: str = "auto") -> tuple[Config, nn.Module, int, dict]:
    """(settings, model, steps done, extra state) of a run folder or checkpoint, ours or the source's .ckpt.

    attention: of a source checkpoint, see foreign_state.translate. Raises CheckpointError.
    """
    path = Path(path)
    source = source_file(path)
    if source:
        return load_source_run(source, device, attention)
    # What a run was measured with: its best weights, or the last where nothing validated.
    folder = path if path.is_dir() else path.parent
    names = dict.fromkeys(("genes", "count_genes", "batches"), list | None)  # what it keeps beside its sizes
    state = checkpoint.load(checkpoint.best_of(path), __file__, dims=dict, perturbations=list | None, **names)
    cfg, extra = from_dict(Config, state["config"], str(path), ALIASES), state["extra"]
    cfg.device = device
    # The features of its perturbations are in the run folder too, should their file be gone.
    features = cfg.perturbation_features_file
    if features and not Path(features).exists():
        cfg.perturbation_features_file = str(folder / "pert_onehot_map.pt")
    model = checkpoint.build_with(state["model"], path, lambda: build_model(cfg, extra["dims"]))
    return cfg, model, state["step"], extra


def load_source_run(path: Path, device: str, attention: str) -> tuple[Config, nn.Module, int, dict]:
    """The same of a .ckpt of the source; what its numbers mean is in the files of its run folder."""
    settings, weights, step, known = convert_whole(path, attention)
    cfg = from_dict(Config, settings, str(path))  # which ends here where a setting has a value that is none of ours
    cfg.device = device
    put = load_source_state_dict
    model = checkpoint.build_with(weights, path, lambda: build_model(cfg, known["dims"]), lambda m, w, _: put(m, w))
    return cfg, model, step, known


def open_run_data(cfg: Config, extra: dict) -> Cells:
    """The cells of a run's settings, with the run's numbers for perturbations and batches, whatever its TOML."""
    if not cfg.toml_config_path:
        raise DataError("this checkpoint does not say which cells it is of: name your TOML, --toml=my.toml")
    cells = open_data(cfg)
    checkpoint.same_data(extra, {cfg.toml_config_path: cells.fingerprint}, Path(cfg.out_dir))
    return renumber(cells, extra, not cfg.perturbation_features_file, cfg.batch_encoder)


def analyze(cfg: Config) -> dict:
    """The final measurements and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = store.local(cfg.analyze)
    folder = checkpoint.analysis_of(path, cfg)
    saved, model, step, extra = load_run(path, cfg.device, cfg.source_attention)
    # On another machine, or of the same cells elsewhere.
    take_over(saved, cfg, "precision", "matmul_precision", "toml_config_path", "ram_budget_gb")
    with Runtime(saved) as rt:
        result = finish(model.to(rt.device), open_run_data(saved, extra), saved, rt, folder)
        if rt.is_main:
            last_line = run_page(folder, Config, result)
            say_again(step, result, HEADLINES, f"{effects.table_of(result)}\n{last_line}")
    return result


def main(argv: list[str] | None = None) -> dict:
    with clear_errors():
        cfg = configure(Config, command(argv), ALIASES, STATE)
        first_line(__file__, cfg, f"{cfg.toml_config_path}, {counted(cfg.max_steps, 'step')}")
        return analyze(cfg) if cfg.analyze else train(cfg)


if __name__ == "__main__":
    main()
