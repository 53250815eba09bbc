"""Train a language model on documents of K kinds, and see it find out in context which kind it reads.

A document comes from one of K ergodic components (categories, or hidden Markov processes) and does not say which. A
model that predicts well must infer it: the cross entropy (XE) falls with the position in the context towards the
component's own, and what is lost on the way is information: summed over positions, XE of the mixture less XE with the
component known is I(component; document) <= log K nats. On synthetic documents both are known exactly.

    python train_arxiv.py                                      # 4 hidden Markov components beside the exact optimum
    python train_arxiv.py --study=nested:1,2,4                 # XE against K at equal tokens, 5 minutes on two cores
    python train_arxiv.py config/arxiv.py --study=all31        # every subset of five arXiv categories, then a report
    python train_arxiv.py --report=out/arxiv_study             # tables, pictures and report.html of a folder of runs
    torchrun --nproc_per_node=8 train_arxiv.py config/arxiv.py

Dimensions: B batch, n tokens of a chunk, T = n - 1 predictions (position t is made after t tokens), V tokens of the
vocabulary, D width, K components, R chunks, M documents.
"""

import base64
import csv
import difflib
import html
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import checkpoint
from common.errors import DataError
from common.runlog import RunLog, read_metrics
from common.runtime import FiniteCheck, Runtime, Stopwatch
from configurator import config_dict, config_hash, configure, differences, fail, from_dict
from sources.chunks import map_tokens, open_chunks
from sources.ergodic import ergodic, mixture_log_prob
from sources.shared import counter_rng, make_once

EXPERIMENT = "arxiv"  # how sample.py treats this page and its copies

SYNTHETIC = "data/ergodic"  # made when it is missing


@dataclass
class Config:
    # output
    out_dir: str = checkpoint.default_out_dir(__file__)  # run folder; of a study, the folder of its runs
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    analyze: str = ""  # run folder or checkpoint to measure again instead of training
    study: str = ""  # all31 (every subset) | k=1,2 (all of these sizes) | nested:1,2,4 (the first 1, 2, 4) | K2_a_b,...
    study_seeds: list[int] = field(default_factory=list)  # seeds of each run of a study; default seed alone
    report: str = ""  # folder of runs to report on instead of training
    log_interval: int = 50  # steps between log lines
    eval_interval: int | None = None  # steps between evaluations; default an epoch
    save_interval: int | None = None  # steps between saves of last.pt; default eval_interval
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    wandb: Literal["", "online", "offline"] = ""  # log to Weights & Biases; project and entity below or from .env
    wandb_project: str = ""
    wandb_entity: str = ""
    tensorboard: bool = False  # log to TensorBoard
    # data
    data: str = SYNTHETIC  # folder of train.h5 and validation.h5, by prepare_data.py arxiv or ergodic
    categories: list[str] | None = None  # what to train on, K names; default all in the file. Others count as unseen
    budget: Literal["constant", "tokens", "proportional"] = "constant"  # constant: smallest category / K chunks of each
    budget_tokens: int | None = None  # of budget=tokens: all categories together
    choice: Literal["random", "first"] = "random"  # which chunks of a category make its share
    allow_short: bool = False  # take what there is where a category has less than its share
    random_windows: bool = False  # start each chunk at a random token, where its document goes on
    # model
    n_layers: int = 2
    d_model: int = 64  # width
    n_heads: int = 2
    d_mlp: int = 256
    dropout: float = 0.0
    # optimizer
    batch_size: int = 32  # chunks a step, over all ranks and micro-steps
    grad_accum: int = 1  # micro-steps a step
    lr: float = 4e-3  # peak learning rate of AdamW
    weight_decay: float = 0.1  # of matrices, not of norms and biases
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    grad_clip: float = 1.0  # largest gradient norm; 0 does not clip
    # schedule
    epochs: int = 4  # passes over the training chunks
    max_steps: int | None = None  # optimizer steps; default as the epochs have
    warmup_steps: int = 100  # linear warm-up
    min_lr_ratio: float = 0.1  # what cosine ends at, as a fraction of lr
    patience: int = 10  # evaluations without improvement before training stops; 0: never stop early
    min_delta: float = 1e-3  # improvement in nats that counts
    # evaluation
    eval_chunks: int = 1_000  # validation chunks of a category, during training; the final evaluation uses all
    bootstrap: int = 1_000  # resamples of documents for 95% intervals
    probe: bool = True  # linear probe of the component by position and layer
    # system
    seed: int = 1337
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        positive = ("log_interval", "eval_interval", "save_interval", "n_layers", "d_model", "n_heads", "d_mlp",
                    "batch_size", "grad_accum", "epochs", "max_steps", "eval_chunks", "bootstrap", "budget_tokens")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in positive
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        negative = ("lr", "weight_decay", "grad_clip", "warmup_steps", "min_lr_ratio", "patience", "min_delta", "seed")
        wrong += [f"{k} = {getattr(self, k)}: must not be negative" for k in negative if getattr(self, k) < 0]
        wrong += [f"{k} = {getattr(self, k)}: must be in [0, 1)" for k in ("adam_beta1", "adam_beta2", "dropout")
                  if not 0 <= getattr(self, k) < 1]
        if self.d_model % max(1, self.n_heads):
            wrong.append(f"d_model = {self.d_model} is no multiple of n_heads = {self.n_heads}")
        if (self.budget == "tokens") != (self.budget_tokens is not None):
            wrong.append("budget = tokens and budget_tokens go together")
        if self.categories is not None and (not self.categories or len(set(self.categories)) != len(self.categories)):
            wrong.append(f"categories = {self.categories}: name at least one, and each once")
        return wrong


ALIASES = {  # names of the source's settings
    "learning_rate": "lr", "n_layer": "n_layers", "n_head": "n_heads", "n_embd": "d_model", "d_ff": "d_mlp",
    "num_epochs": "epochs", "max_global_steps": "max_steps", "warmup": "warmup_steps", "beta1": "adam_beta1",
    "beta2": "adam_beta2", "gradient_accumulation_steps": "grad_accum", "selected_categories": "categories",
    "early_stopping_patience": "patience", "max_grad_norm": "grad_clip", "output_dir": "out_dir",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------
class Chunks:
    """Token chunks of an HDF5 file, mapped into memory and never held in it.

    Attributes: tokens [R, n] (a memory map), names of the categories, codes [R], documents [R], vocab_size, file.
    Raises DataError for a file that is missing, damaged or foreign, or has tokens beyond its vocabulary.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file, self.names, self.codes = open_chunks(path)
        pairs = np.stack([self.codes.astype(np.int64), self.file["doc_idx_for_chunk"][:].astype(np.int64)], 1)
        self.documents = np.unique(pairs, axis=0, return_inverse=True)[1].ravel()  # ids may begin anew in a category
        self.tokens = map_tokens(self.file)
        blocks = [self.tokens[i : i + 100_000] for i in range(0, len(self.tokens), 100_000)]
        low, top = min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
        self.vocab_size = int(self.file.attrs.get("vocab_size", top + 1))
        if low < 0 or top >= self.vocab_size:
            raise DataError(f"{path} has the token {low if low < 0 else top}, but vocab_size = "
                                         f"{self.vocab_size}: see python prepare_data.py inspect {path}")

    @property
    def size(self) -> int:
        """Tokens of a chunk."""
        return self.tokens.shape[1]

    def rows(self, name: str) -> np.ndarray:
        """Rows of a category, in the order of the file."""
        return np.flatnonzero(self.codes == self.names.index(name))

    def code(self, name: str) -> int:
        return self.names.index(name)


def open_data(cfg: Config) -> tuple[Chunks, Chunks, list[str]]:
    """(train, validation, active categories); the synthetic default is made where it is missing.

    Raises DataError, naming the nearest category for a misspelt one.
    """
    folder = Path(cfg.data)
    last = folder / "validation.h5"
    if cfg.data == SYNTHETIC:
        make_once(last, lambda: ergodic(out_dir=str(folder)))
    train, validation = Chunks(folder / "train.h5"), Chunks(last)
    if not all("vocab_size" in chunks.file.attrs for chunks in (train, validation)):  # then known from the tokens only
        train.vocab_size = validation.vocab_size = max(train.vocab_size, validation.vocab_size)
    if (train.size, train.vocab_size) != (validation.size, validation.vocab_size):
        raise DataError(f"{train.path} and {validation.path} differ in chunk size or vocabulary: they are "
                                     "not of one preparation")
    active = list(train.names) if cfg.categories is None else cfg.categories
    for name in active:
        if name not in train.names or name not in validation.names:
            near = difflib.get_close_matches(name, train.names, n=1)
            raise DataError(f"{folder} has no category {name!r}"
                                         + (f", did you mean {near[0]!r}?" if near else "")
                                         + f" It has: {', '.join(train.names)}")
    return train, validation, active


def training_rows(train: Chunks, active: list[str], cfg: Config) -> np.ndarray:
    """Rows to train on: each active category's share of the token budget, sorted.

    constant: B / K chunks of each, with B the chunks of the smallest category of the file, so that the total does not
    depend on K (to within K chunks). tokens: the same from budget_tokens. proportional: B in all, in proportion to
    what there is of each category. Raises DataError if a category has less than its share, unless allow_short.
    """
    K, have = len(active), {name: train.rows(name) for name in active}
    total = int(train.file.attrs.get("reference_chunk_budget_smallest_top_category",
                                     min(len(train.rows(name)) for name in train.names)))
    if cfg.budget == "tokens":
        total = cfg.budget_tokens // train.size
    chosen = []
    for name, rows in have.items():
        share = total * len(rows) // sum(map(len, have.values())) if cfg.budget == "proportional" else total // K
        if share < 1:
            raise DataError(f"the budget of {total} chunks is less than one for each of {K} categories")
        if share > len(rows) and not cfg.allow_short:
            raise DataError(f"{name} has {len(rows):,} chunks, less than its share of {share:,}: lower "
                                         "budget_tokens, or take what there is with allow_short=true")
        if cfg.choice == "random":
            rows = counter_rng(cfg.seed, 1, train.code(name)).permutation(rows)
        chosen.append(rows[:share])
    return np.sort(np.concatenate(chosen))


class Batches:
    """Chunks of every step: a pure function of (seed, step). Epochs follow one another without a seam.

    Each epoch passes once through a permutation of the rows keyed by (seed, epoch); a batch may end one and begin the
    next, so that all batches are full and each row comes exactly once an epoch.
    """

    def __init__(self, rt: Runtime, chunks: Chunks, rows: np.ndarray, cfg: Config):
        self.rt, self.chunks, self.rows_, self.cfg, self.permutations = rt, chunks, rows, cfg, {}
        self.chosen = np.isin(np.arange(len(chunks.codes)), rows)

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self.permutations:
            self.permutations = {e: p for e, p in self.permutations.items() if e == epoch - 1}
            self.permutations[epoch] = counter_rng(self.cfg.seed, 2, epoch).permutation(self.rows_)
        return self.permutations[epoch]

    def rows(self, step: int) -> np.ndarray:
        """Rows of the whole batch of a step, [B]."""
        place = np.arange(step * self.cfg.batch_size, (step + 1) * self.cfg.batch_size)
        epoch, at = np.divmod(place, len(self.rows_))
        return np.concatenate([self.permutation(int(e))[at[epoch == e]] for e in np.unique(epoch)])

    def __call__(self, step: int) -> torch.Tensor:
        """This rank's chunks, [B / world_size, n] int64, on the device."""
        rows = self.rows(step)
        tokens = self.chunks.tokens[rows]
        if self.cfg.random_windows:
            tokens = self.windows(rows, tokens, counter_rng(self.cfg.seed, 3, step))
        tokens = self.rt.share(torch.from_numpy(tokens.astype(np.int64)))
        if self.rt.device.type == "cuda":
            return tokens.pin_memory().to(self.rt.device, non_blocking=True)
        return tokens.to(self.rt.device)

    def windows(self, rows: np.ndarray, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Move every chunk forward by 0..n-1 tokens where its document goes on in the next row and that is chosen."""
        following = np.minimum(rows + 1, len(self.chunks.documents) - 1)
        goes_on = (self.chunks.documents[following] == self.chunks.documents[rows]) & (following > rows)
        goes_on &= (self.chunks.codes[following] == self.chunks.codes[rows]) & self.chosen[following]
        offset = rng.integers(0, self.chunks.size, len(rows)) * goes_on
        both = np.concatenate([tokens, self.chunks.tokens[following]], 1)
        return np.take_along_axis(both, offset[:, None] + np.arange(self.chunks.size), 1)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.n_heads, self.dropout = cfg.n_heads, cfg.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(cfg.d_model), nn.LayerNorm(cfg.d_model)
        self.qkv, self.attention_out = nn.Linear(cfg.d_model, 3 * cfg.d_model), nn.Linear(cfg.d_model, cfg.d_model)
        self.mlp_in, self.mlp_out = nn.Linear(cfg.d_model, cfg.d_mlp), nn.Linear(cfg.d_mlp, cfg.d_model)

    def forward(self, x: torch.Tensor, B: int) -> torch.Tensor:
        """x [B*T, D] -> [B*T, D]."""
        qkv = self.qkv(self.attention_norm(x)).view(B, len(x) // B, 3, self.n_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, T, C]
        rate = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = x + self.drop(self.attention_out(attended.transpose(1, 2).reshape(x.shape)))
        return x + self.drop(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and tied embeddings (Radford et al. 2019)."""

    def __init__(self, cfg: Config, vocab_size: int, n_ctx: int):
        super().__init__()
        self.dropout = cfg.dropout
        self.embed, self.position = nn.Embedding(vocab_size, cfg.d_model), nn.Parameter(torch.empty(n_ctx, cfg.d_model))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm = nn.LayerNorm(cfg.d_model)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:  # what writes to the stream shrinks with depth, as in GPT-2
                nn.init.normal_(parameter, std=0.02 * ((2 * cfg.n_layers) ** -0.5 if "_out" in name else 1.0))
        # Learned positions that start as sinusoids (Vaswani et al. 2017), larger than tokens: "k tokens ago" is then
        # one linear map from the first step on. Random ones must find it for each position by itself, and the last,
        # which no later token attends to, lags behind: 2.8% above the optimum on synthetic data, not 0.7%.
        angle = torch.arange(n_ctx)[:, None] * 10_000.0 ** (-torch.arange(0, cfg.d_model, 2) / cfg.d_model)
        with torch.no_grad():
            self.position.copy_(0.1 * 2**0.5 * torch.cat([angle.sin(), angle.cos()], 1)[:, : cfg.d_model])

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None):
        """tokens [B, T] -> logits [B, T, V], residual stream after the embedding and every block, each [B, T, D].

        With targets [B, T]: their cross entropies in nats in place of the logits, which never exist as a whole; in
        training the mean, otherwise [B, T].
        """
        B, T = tokens.shape
        x = F.dropout(self.embed(tokens) + self.position[:T], self.dropout, self.training).flatten(0, 1)
        stream = [x]
        for block in self.blocks:
            stream.append(block(stream[-1], B))
        x, stream = self.final_norm(stream[-1]), [x.view(B, T, -1) for x in stream]
        if targets is None:
            return F.linear(x, self.embed.weight).view(B, T, -1), stream
        if torch.is_grad_enabled():
            return mean_xe(x, self.embed.weight, targets.flatten()), stream
        return row_xe(x, self.embed.weight, targets.flatten()).view(B, T), stream


def build_model(cfg: Config, vocab_size: int, n_ctx: int) -> nn.Module:
    return GPT(cfg, vocab_size, n_ctx)


def parameter_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """Matrices decay; norms, biases and other vectors do not."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------------------------
# Losses and statistics
# ---------------------------------------------------------------------------------------------------------------
def token_xe(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every target [B, T] under logits [B, T, V], in nats, [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def stream_xe(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor):
    """Yield (rows, exp of the shifted logits, their sums, cross entropies) a few rows of x [R, D] at a time.

    Logits x W^T [R, V] as a whole would be the largest tensor of all, written and read five times in a step, and its
    memory fresh each time; blocks of 16 MB (CPU) are reused, and large enough for full speed.
    """
    half = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
    size = max(64, (1 << 22 if x.device.type == "cpu" else 1 << 26) // len(weight))
    with torch.autocast(x.device.type, enabled=False):
        table = weight.detach().to(half)
        for begin in range(0, len(x), size):
            rows = slice(begin, min(begin + size, len(x)))
            logits = (x[rows].detach().to(half) @ table.t()).float()
            top, target = logits.amax(1, keepdim=True), targets[rows, None]
            right = logits.gather(1, target)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            yield rows, logits, total, (total.log() + top - right)[:, 0]


class MeanXE(torch.autograd.Function):
    """Mean cross entropy of targets [R] under logits x W^T, for x [R, D], W [V, D]; its gradients come with it.

    The gradient of the logits of a row is softmax - onehot, known as soon as the row is: so both matrix products of the
    backward pass are done in the forward one, and nothing of size R x V is kept.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        dx, dw, loss = torch.empty_like(x), torch.zeros_like(weight), torch.zeros((), device=x.device)
        half = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            table = weight.to(half)
            for rows, delta, total, xe in stream_xe(x, table, targets):
                loss += xe.sum()
                delta.div_(total).scatter_add_(1, targets[rows, None], -torch.ones_like(total))
                delta = delta.to(half)
                dx[rows] = delta @ table
                dw += delta.t() @ x[rows].to(half)
        ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)
        return dx * scale, dw * scale, None


@torch.compiler.disable  # a loop over blocks of rows, which tracing would unroll
def mean_xe(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return MeanXE.apply(x, weight, targets)


@torch.compiler.disable
def row_xe(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every row, [R]; without gradients."""
    return torch.cat([xe for *_, xe in stream_xe(x, weight, targets)])


class Curves(NamedTuple):
    """XE by position of documents: sums over the chunks of each [M, T] (nats), counts of chunks [M], categories [M]."""

    sums: np.ndarray
    counts: np.ndarray
    codes: np.ndarray

    def mean(self, code: int) -> np.ndarray:
        """XE by position of a category, [T]."""
        mine = self.codes == code
        return self.sums[mine].sum(0) / self.counts[mine].sum()

    def resampled(self, code: int, resamples: int, seed: int) -> np.ndarray:
        """The mean of as many documents drawn with replacement, [resamples, T]: the bootstrap over documents."""
        mine = np.flatnonzero(self.codes == code)
        rng, found = counter_rng(seed, 4, code), np.empty((resamples, self.sums.shape[1]))
        for begin in range(0, resamples, 100):  # a block of draws at a time: [100, M] counts
            part = slice(begin, min(begin + 100, resamples))
            draws = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), part.stop - part.start)
            found[part] = draws @ self.sums[mine] / (draws @ self.counts[mine])[:, None]
        return found


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The central 95% of samples [resamples, ...]."""
    return tuple(np.quantile(samples, (0.025, 0.975), axis=0))


def fit_power_law(xe: np.ndarray) -> np.ndarray:
    """Least-squares (XE_inf, c, alpha) of XE(t) = XE_inf + c t^-alpha, t = 1..T, for curves [..., T] -> [..., 3].

    alpha is searched on a grid three times refined; given alpha the rest is linear (variable projection).
    """
    xe = np.asarray(xe, dtype=np.float64)
    t, flat = np.arange(1, xe.shape[-1] + 1), xe.reshape(-1, xe.shape[-1])
    low, high = np.full(len(flat), 0.01), np.full(len(flat), 8.0)
    for _ in range(5):
        alphas = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 41)  # [curves, 41]
        x = t ** -alphas[..., None]
        centred, y = x - x.mean(-1, keepdims=True), (flat - flat.mean(-1, keepdims=True))[:, None]
        c = (centred * y).sum(-1) / (centred**2).sum(-1)
        error = ((y - c[..., None] * centred) ** 2).sum(-1)
        best = error.argmin(-1)
        pick = np.arange(len(flat)), best
        step = (high - low) / 40
        alpha, c = alphas[pick], c[pick]
        low, high = np.maximum(0.01, alpha - step), np.minimum(8.0, alpha + step)
    infinity = flat.mean(-1) - c * (t ** -alpha[:, None]).mean(-1)
    return np.stack([infinity, c, alpha], -1).reshape(*xe.shape[:-1], 3)


def gains(xe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(XE(first) - XE(last), sum over t of XE(t) - XE(last)) in nats, for curves [..., T]."""
    return xe[..., 0] - xe[..., -1], (xe - xe[..., -1:]).sum(-1)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model: nn.Module, chunks: Chunks, rows: np.ndarray, rt: Runtime, batch: int = 256) -> Curves:
    """XE by position of every document among the rows. Collective: ranks share the rows."""
    documents, index = np.unique(chunks.documents[rows], return_inverse=True)
    sums = torch.zeros(len(documents), chunks.size - 1, dtype=torch.float64)
    model.eval()
    mine = np.arange(len(rows))[rt.rank :: rt.world_size]
    for begin in range(0, len(mine), batch):
        part = mine[begin : begin + batch]
        tokens = torch.from_numpy(chunks.tokens[rows[part]].astype(np.int64)).to(rt.device)
        with rt.autocast():
            xe, _ = model(tokens[:, :-1], tokens[:, 1:])
        sums.index_add_(0, torch.from_numpy(index[part]), xe.cpu().double())
    model.train()
    sums = (rt.mean(sums.to(rt.device if rt.device.type == "cuda" else "cpu")) * rt.world_size).cpu().numpy()
    codes = np.zeros(len(documents), dtype=np.int64)
    codes[index] = chunks.codes[rows]
    return Curves(sums, np.bincount(index, minlength=len(documents)), codes)


def oracle_curves(chunks: Chunks, rows: np.ndarray, active: list[str]) -> tuple[Curves, Curves] | None:
    """The exact predictors on the same rows: of the uniform mixture of the active components, and of the known one.

    None where the file has no oracle (real documents).
    """
    if "oracle_log_prob" not in chunks.file:
        return None
    log_prob = chunks.file["oracle_log_prob"][:][rows].astype(np.float64)  # [R, all components, n]
    codes = [chunks.code(name) for name in active]
    mixture = mixture_log_prob(log_prob[:, codes])
    known = np.take_along_axis(log_prob, chunks.codes[rows].astype(np.int64)[:, None, None], 1)[:, 0]
    documents, index = np.unique(chunks.documents[rows], return_inverse=True)
    document_codes = np.zeros(len(documents), dtype=np.int64)
    document_codes[index] = chunks.codes[rows]
    found = []
    for values in (mixture, known):
        sums = np.zeros((len(documents), chunks.size - 1))
        np.add.at(sums, index, -values[:, 1:])  # the model predicts from the second token on
        found.append(Curves(sums, np.bincount(index), document_codes))
    return found[0], found[1]


def binned(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean positions, means) of curves [..., T] over bins that grow with the position: single late ones are noisy."""
    edges = np.unique(np.geomspace(1, curves.shape[-1] + 1, 24).round().astype(int))
    bins = [slice(a - 1, b - 1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return (np.array([(b.start + 1 + b.stop) / 2 for b in bins]),
            np.stack([curves[..., b].mean(-1) for b in bins], -1))


def measure(curves: Curves, names: list[str], active: list[str], oracle, cfg: Config) -> dict:
    """What results.json says of the XE by position: each category, seen and unseen ones together, gains, fit, oracle.

    Categories count alike where they are together. Intervals are 95%, by the bootstrap over documents.
    """
    present = [name for code, name in enumerate(names) if (curves.codes == code).any()]
    samples = {name: curves.resampled(names.index(name), cfg.bootstrap, cfg.seed) for name in present}
    means = {name: curves.mean(names.index(name)) for name in present}
    groups = {name: [name] for name in present} | {"seen": active}
    if unseen := [name for name in present if name not in active]:
        groups["unseen"] = unseen
    found = {}
    for group, members in groups.items():
        mean, sample = np.mean([means[m] for m in members], 0), np.mean([samples[m] for m in members], 0)
        low, high = interval(sample)
        gain, total = gains(mean)
        fit, fits = fit_power_law(mean), fit_power_law(sample[:200])
        found[group] = {
            "xe": float(mean.mean()), "xe_interval": [float(x) for x in interval(sample.mean(1))],
            "perplexity": float(np.exp(mean.mean())), "xe_by_position": mean.tolist(),
            "low": low.tolist(), "high": high.tolist(),
            "binned_interval": [x.tolist() for x in interval(binned(sample)[1])],
            "icl_gain": float(gain), "icl_gain_interval": [float(x) for x in interval(gains(sample)[0])],
            "total_gain": float(total), "total_gain_interval": [float(x) for x in interval(gains(sample)[1])],
            "fit": {k: {"value": float(fit[i]), "interval": [float(x) for x in interval(fits[:, i])]}
                    for i, k in enumerate(("xe_inf", "c", "alpha"))}}  # fmt: skip
        if oracle and set(members) <= set(active):
            mixture, known = (np.mean([o.mean(names.index(m)) for m in members], 0) for o in oracle)
            found[group] |= {
                "oracle_xe_by_position": mixture.tolist(), "known_xe_by_position": known.tolist(),
                "excess_by_position": (mean - mixture).tolist(), "oracle_icl_gain": float(gains(mixture)[0]),
                "largest_relative_excess": float(np.abs(mean / mixture - 1).max())}
    return found


def probe(model: nn.Module, chunks: Chunks, rows: np.ndarray, rt: Runtime, seed: int, most: int = 2_000) -> dict:
    """Read the component out of the residual stream by a linear classifier, for every layer at some positions.

    Half of the documents train the classifier (multinomial logistic regression, L2 penalty, L-BFGS), the other half
    give accuracy and cross entropy in nats, to be held against log K.
    """
    rng = counter_rng(seed, 5)
    rows = np.sort(rng.permutation(rows)[:most])
    positions = sorted({min(chunks.size - 1, p) for p in (1, 2, 3, 5, 8, 12, 20, 35, 60, chunks.size - 1)})
    tokens = torch.from_numpy(chunks.tokens[rows].astype(np.int64))
    model.eval()
    with torch.no_grad():
        parts = [model(part[:, :-1].to(rt.device))[1] for part in tokens.split(256)]
    model.train()
    names, codes = np.unique(chunks.codes[rows], return_inverse=True)
    target = torch.from_numpy(codes).to(rt.device)
    documents, inverse = np.unique(chunks.documents[rows], return_inverse=True)
    fit = torch.from_numpy((rng.permutation(len(documents)) % 2 == 0)[inverse]).to(rt.device)
    found = {"positions": positions, "log_K": math.log(len(names)), "accuracy": [], "cross_entropy": []}
    for layer in range(len(parts[0])):
        x = torch.cat([part[layer][:, [p - 1 for p in positions]] for part in parts]).float()  # [R, P, D]
        x = (x - x[fit].mean(0)) / x[fit].std(0).clamp_min(1e-6)
        logits = _logistic(x, target, fit, len(names))[~fit]  # [R', P, K]
        held = target[~fit]
        found["accuracy"].append((logits.argmax(-1) == held[:, None]).float().mean(0).tolist())
        xe = F.cross_entropy(logits.transpose(1, 2), held[:, None].expand(-1, len(positions)), reduction="none")
        found["cross_entropy"].append(xe.mean(0).tolist())
    return found


def _logistic(x: torch.Tensor, target: torch.Tensor, fit: torch.Tensor, K: int, penalty: float = 1e-2) -> torch.Tensor:
    """Logits [R, P, K] of one classifier a position, trained on the rows `fit` of x [R, P, D]."""
    weight = torch.zeros(x.shape[1], x.shape[2], K, device=x.device, requires_grad=True)
    bias = torch.zeros(x.shape[1], K, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")
    wanted = target[fit][:, None].expand(-1, x.shape[1])

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("rpd,pdk->rpk", rows, weight) + bias

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(x[fit]).transpose(1, 2), wanted) * x.shape[1] + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return logits(x)


# ---------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------
def plot(folder: Path, name: str, draw, width: float = 7.0, height: float = 4.5) -> None:
    """Save folder/plots/name.png as drawn by draw(axes)."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    draw(figure.subplots())
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "plots" / f"{name}.png")


def plot_run(folder: Path, title: str, found: dict) -> None:
    """XE by position with intervals, by category; excess over the oracle; the probe; loss over training."""
    groups, colours = found["groups"], [f"C{i}" for i in range(10)]
    names = [name for name in groups if name not in ("seen", "unseen")]

    def by_position(axes):
        for i, name in enumerate(names):
            group, colour = groups[name], colours[i % 10]
            label = name if name in found["categories"] else f"{name} (unseen)"
            positions, xe = binned(np.array(group["xe_by_position"]))
            axes.plot(positions, xe, color=colour, label=label, linewidth=1.3,
                      linestyle="-" if name in found["categories"] else ":")
            axes.fill_between(positions, *group["binned_interval"], color=colour, alpha=0.2, linewidth=0)
            if "oracle_xe_by_position" in group:
                axes.plot(positions, binned(np.array(group["oracle_xe_by_position"]))[1], color="k", linewidth=0.8,
                          linestyle="--", label="exact optimum" if i == len(names) - 1 else None)
        axes.set(xscale="log", xlabel="tokens read", ylabel="cross entropy of the next token (nats)")
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend(fontsize=8)

    def excess(axes):
        for name in found["categories"]:
            positions, over = binned(np.array(groups[name]["excess_by_position"]))
            relative = 100 * over / binned(np.array(groups[name]["oracle_xe_by_position"]))[1]
            axes.plot(positions, relative, color=colours[names.index(name) % 10], label=name, linewidth=1)
        axes.axhline(0, color="k", linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens read", ylabel="excess over the exact optimum (%)")
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend(fontsize=8)

    def probed(axes):
        layers = found["probe"]["accuracy"]
        for layer, accuracy in enumerate(layers):
            shade = (0.1, 0.3, 0.7, 0.25 + 0.75 * layer / max(1, len(layers) - 1))
            axes.plot(found["probe"]["positions"], accuracy, "o-", markersize=3, color=shade,
                      label=f"layer {layer}" if layer else "embed")
        axes.axhline(1 / len(found["categories"]), color="k", linestyle=":", linewidth=0.8, label="chance")
        axes.set(xscale="log", xlabel="tokens read", ylabel="held-out accuracy of the component", ylim=(0, 1.02))
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend(fontsize=8)

    def over_time(axes):
        history = read_metrics(folder)
        for split, key in (("train", "loss"), ("eval", "val_xe")):
            line = [(r["step"], r[key]) for r in history if r["split"] == split]
            if line:
                axes.plot(*zip(*line, strict=True), label="training" if split == "train" else "validation")
        axes.set(xlabel="step", ylabel="cross entropy (nats)")
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend(fontsize=8)

    plot(folder, "xe_by_position", by_position)
    if "oracle_xe_by_position" in groups["seen"]:
        plot(folder, "excess_by_position", excess)
    if "probe" in found:
        plot(folder, "component_probe", probed)
    plot(folder, "loss", over_time)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def learning_rate(step: int, steps: int, cfg: Config) -> float:
    """Linear warm-up to lr, then a cosine down to min_lr_ratio * lr at the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train_step(model: nn.Module, tokens: torch.Tensor, rt: Runtime, cfg: Config) -> torch.Tensor:
    """Forward and backward over the micro-batches of tokens [B, n]; returns the mean loss over ranks."""
    total = torch.zeros((), device=rt.device)
    for i, part in enumerate(tokens.chunk(cfg.grad_accum)):
        with rt.sync(model, last=i == cfg.grad_accum - 1):
            with rt.autocast():
                loss = model(part[:, :-1], part[:, 1:])[0] / cfg.grad_accum
            rt.backward(loss)
        total += loss.detach()
    return rt.mean(total)


def finish(model: nn.Module, validation: Chunks, active: list[str], cfg: Config, rt: Runtime, folder: Path,
           title: str) -> dict:
    """Measure on all validation chunks: results.json, xe_by_position.csv, pictures; returns the summary. Collective."""
    rows = np.arange(len(validation.codes))
    curves = evaluate(model, validation, rows, rt)
    if rt.is_main:
        mine = np.flatnonzero(np.isin(validation.codes, [validation.code(name) for name in active]))
        oracle = oracle_curves(validation, mine, active)
        found = {"categories": active, "K": len(active), "seed": cfg.seed, "groups":
                 measure(curves, validation.names, active, oracle, cfg)}
        if cfg.probe and len(active) > 1:
            found["probe"] = probe(model, validation, mine, rt, cfg.seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_curves(folder / "xe_by_position.csv", found)
        plot_run(folder, title, found)
        seen = found["groups"]["seen"]
        result = {"val_xe": seen["xe"], "perplexity": seen["perplexity"], "icl_gain": seen["icl_gain"],
                  "total_gain": seen["total_gain"], "xe_by_position": seen["xe_by_position"],
                  "fit": {k: v["value"] for k, v in seen["fit"].items()}}
        for key in ("oracle_xe_by_position", "oracle_icl_gain", "largest_relative_excess"):
            result |= {key: seen[key]} if key in seen else {}
        if "unseen" in found["groups"]:
            result["unseen_xe"] = found["groups"]["unseen"]["xe"]
    else:
        result = {}
    rt.barrier()
    return result


def write_curves(path: Path, found: dict) -> None:
    """results.json's curves as a table: group, position, xe, low, high, oracle."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["group", "position", "xe", "low", "high", "oracle_xe"])
        for name, group in found["groups"].items():
            oracle = group.get("oracle_xe_by_position", [""] * len(group["low"]))
            columns = zip(group["xe_by_position"], group["low"], group["high"], oracle, strict=True)
            table.writerows([name, t, *values] for t, values in enumerate(columns, 1))


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises DataError, CheckpointError (bad input, before anything is written) and FloatingPointError (the loss).
    """
    began, folder = time.perf_counter(), checkpoint.local_folder(cfg.out_dir)
    with Runtime(cfg) as rt:
        if cfg.batch_size % (cfg.grad_accum * rt.world_size):
            fail(f"batch_size = {cfg.batch_size} must be a multiple of grad_accum * ranks = "
                 f"{cfg.grad_accum * rt.world_size}")
        chunks, validation, active = open_data(cfg)
        rows = training_rows(chunks, active, cfg)
        model = build_model(cfg, chunks.vocab_size, chunks.size).to(rt.device)
        rt.reseed(rt.rank)
        params = list(model.parameters())
        optimizer = rt.adamw(parameter_groups(model, cfg), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2))
        batches, finite, watch = Batches(rt, chunks, rows, cfg), FiniteCheck(rt.device), Stopwatch()
        epoch_steps = math.ceil(len(rows) / cfg.batch_size)
        steps = cfg.max_steps or math.ceil(cfg.epochs * len(rows) / cfg.batch_size)
        eval_interval = cfg.eval_interval or epoch_steps
        save_interval = cfg.save_interval or eval_interval
        watched = np.concatenate([validation.rows(name)[: cfg.eval_chunks] for name in active])
        tokens_per_step = cfg.batch_size * (chunks.size - 1)

        path, state, changes = checkpoint.start_from(cfg, folder, __file__, lambda old: differences(old, cfg))
        step, best, total, waited, reference = 0, math.inf, torch.zeros(2, device=rt.device), 0, math.inf
        if state:
            step, best, extra, _ = checkpoint.restore(rt, state, path, folder, model, optimizer)
            waited, reference = extra["waited"], extra["reference"]
        trained = rt.wrap(model)

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, steps) as log:
            if rt.is_main:
                checkpoint.clear(folder, after=step)
            log.say(rt.describe())
            log.say(describe(chunks, rows, active, model, steps, cfg))
            if state:
                log.say(f"resumed from {path} at step {step}" + "".join(f"\n  {line}" for line in changes))
            lap, ended = step, bool(state and state["extra"]["ended"] and not changes)
            watch.start()
            while step < steps and not ended:
                tokens = batches(step)  # [B, n]
                lr = learning_rate(step, steps, cfg)
                loss = train_step(trained, tokens, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)
                step += 1

                last, stops = step == steps, rt.stopping(step)
                evaluates = last or step % eval_interval == 0
                logs = evaluates or step % cfg.log_interval == 0
                saves = last or stops or step % save_interval == 0
                finite.add(step, loss)
                total += torch.stack([loss, torch.ones_like(loss)])
                log.progress(step)
                if not (logs or saves):
                    continue

                finite.verify(step, model, lr)
                rt.synchronize()
                speed = watch.pause((step - lap) * tokens_per_step)
                if logs:
                    mean = float(total[0] / total[1])  # of the steps since the last line
                    total.zero_()
                    mfu = speed * flops_per_token(model, cfg, chunks.size) / peak(rt)
                    log.train(step, {"loss": mean, "lr": lr, "grad_norm": float(norm), "epoch": step / epoch_steps,
                                     "tokens_per_s": speed, "mfu": mfu},
                              lr, norm, speed, left=(steps - step) * tokens_per_step / speed, loss=mean)
                improved = False
                if evaluates:
                    curves = evaluate(model, validation, watched, rt)
                    xe = np.mean([curves.mean(validation.code(name)) for name in active], 0)
                    val_xe, (gain, _) = float(xe.mean()), gains(xe)
                    improved = val_xe < best
                    waited, best = waited + 1, min(best, val_xe)
                    if val_xe < reference - cfg.min_delta:  # small improvements add up
                        waited, reference = 0, val_xe
                    ended = bool(cfg.patience) and waited >= cfg.patience
                    log.metrics(step, "eval",
                                {"val_xe": val_xe, "icl_gain": float(gain), "xe_by_position": xe.tolist()})
                    log.say(f"step {step:>6} eval | val_xe {val_xe:.5f} | first {xe[0]:.4f} last {xe[-1]:.4f}"
                            + " *" * improved + f" | no better for {waited}: stopping" * ended)
                if saves or improved or ended:
                    saved = checkpoint.capture(rt, __file__, config_dict(cfg), step, model, optimizer, best,
                                               {"waited": waited, "reference": reference, "ended": ended or last,
                                                "n_ctx": chunks.size, "vocab_size": chunks.vocab_size,
                                                "categories": active}, {})
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
            copy_tokenizer(Path(cfg.data), folder, rt)
            result = finish(model, validation, active, cfg, rt, folder, f"K = {len(active)}: {', '.join(active)}")
            summary = result | {"K": len(active), "categories": active, "steps": step,
                                "train_chunks": len(rows), "seconds": time.perf_counter() - began,
                                "tokens_per_second": watch.units / watch.seconds if watch.seconds else 0.0,
                                "config_hash": config_hash(cfg), "torch": torch.__version__, "device": str(rt.device)}
            log.summary(summary)
            if rt.is_main:
                log.say(verdict(result, len(active), folder))
            return summary


def verdict(result: dict, K: int, folder: Path) -> str:
    text = (f"done: validation XE {result['val_xe']:.4f} nats over K = {K}, falling by {result['icl_gain']:.4f} from "
            "the first position to the last")
    if "oracle_icl_gain" in result:
        text += (f" (exact optimum {result['oracle_icl_gain']:.4f}), at most {result['largest_relative_excess']:.2%} "
                 "from the optimum at any position")
    return f"{text}; pictures in {folder / 'plots'}"


def describe(chunks: Chunks, rows: np.ndarray, active: list[str], model: nn.Module, steps: int, cfg: Config) -> str:
    size = sum(p.numel() for p in model.parameters())
    share = np.bincount(chunks.codes[rows], minlength=len(chunks.names))
    return (f"K = {len(active)} of {len(chunks.names)} categories of {cfg.data}: "
            + ", ".join(f"{name} {share[chunks.code(name)]:,}" for name in active)
            + f" chunks of {chunks.size} tokens, vocabulary {chunks.vocab_size:,}\n"
            f"GPT: {size:,} parameters | {steps:,} steps of {cfg.batch_size * (chunks.size - 1):,} tokens | "
            f"{cfg.out_dir}")


def flops_per_token(model: nn.Module, cfg: Config, n_ctx: int) -> float:
    """Forward and backward: 6 x weights of matrix products + full attention (Chowdhery et al. 2022, appendix B)."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    return 6 * weights + 12 * cfg.n_layers * n_ctx * cfg.d_model


_PEAK: dict[str, float] = {}


def peak(rt: Runtime) -> float:
    """FLOP/s of matrix products over all ranks: what a large one reaches here, measured once."""
    key = f"{rt.device} {rt.precision}"
    if key not in _PEAK:
        _PEAK[key] = rt.matmul_rate()
    return _PEAK[key] * rt.world_size


def copy_tokenizer(data: Path, folder: Path, rt: Runtime) -> None:
    """sample.py reads prompts with the tokenizer of the run."""
    if rt.is_main and (data / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())


def load_run(path: Path, device: str = "auto") -> tuple[Config, nn.Module, int, dict]:
    """(settings, model, steps done, extra state) of a run folder or checkpoint. Raises CheckpointError."""
    path = Path(path)
    state = checkpoint.load(path / "best.pt" if (path / "best.pt").exists() else path, __file__)
    cfg, extra = from_dict(Config, state["config"], str(path)), state["extra"]
    cfg.device = device
    model = build_model(cfg, extra["vocab_size"], extra["n_ctx"])
    model.load_state_dict(state["model"])
    return cfg, model, state["step"], extra


def analyze(cfg: Config) -> dict:
    """The final measurements and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = Path(cfg.analyze)
    folder = path if path.is_dir() else path.parent
    saved, model, step, extra = load_run(path, cfg.device)
    for name in ("precision", "bootstrap", "probe", "data"):  # what may differ from the run, if asked to
        if getattr(cfg, name) != getattr(Config(), name):
            setattr(saved, name, getattr(cfg, name))
    with Runtime(saved) as rt:
        _, validation, _ = open_data(saved)
        active = extra["categories"]
        if (validation.vocab_size, validation.size) != (extra["vocab_size"], extra["n_ctx"]):
            raise DataError(f"{saved.data} is not the data of this run: vocabulary or chunk size differ")
        title = f"K = {len(active)}: {', '.join(active)}"
        result = finish(model.to(rt.device), validation, active, saved, rt, folder, title)
    print(f"step {step}: " + verdict(result, len(active), folder).removeprefix("done: "))
    return result


# ---------------------------------------------------------------------------------------------------------------
# Studies and reports
# ---------------------------------------------------------------------------------------------------------------
def run_name(categories: list[str]) -> str:
    """K3_csDS_csIT_csPL for ["cs.PL", "cs.DS", "cs.IT"]."""
    return "_".join([f"K{len(categories)}", *sorted(c.replace(".", "") for c in categories)])


def plan_study(study: str, names: list[str]) -> list[list[str]]:
    """The subsets of categories that a study trains on.

    all31 (or all): every non-empty subset; k=1,2: all of these sizes; nested:1,2,4: the first 1, 2, 4; else run names.
    Raises DataError for anything else.
    """
    sizes = re.fullmatch(r"(k=|nested:)(\d+(?:,\d+)*)", study)
    if study in ("all", "all31"):
        subsets = [list(s) for K in range(1, len(names) + 1) for s in itertools.combinations(names, K)]
        if study == "all31" and len(subsets) != 31:
            raise DataError(f"study=all31 is about five categories, but there are {len(names)}: use "
                                         "study=all, or choose five with categories=a,b,c,d,e")
        return subsets
    if sizes:
        wanted = [int(K) for K in sizes[2].split(",")]
        if bad := [K for K in wanted if not 1 <= K <= len(names)]:
            raise DataError(f"study={study}: {bad[0]} is not between 1 and the {len(names)} categories")
        if sizes[1] == "nested:":
            return [names[:K] for K in wanted]
        return [list(s) for K in wanted for s in itertools.combinations(names, K)]
    known = {run_name(list(s)): list(s) for K in range(1, len(names) + 1) for s in itertools.combinations(names, K)}
    for name in study.split(","):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise DataError(f"study={study}: no run is called {name!r}"
                                         + (f", did you mean {near[0]!r}?" if near else ".")
                                         + " Use all, all31, k=1,2, nested:1,2,4, or names like "
                                         + run_name(names[: min(2, len(names))]))
    return [known[name] for name in study.split(",")]


def run_study(cfg: Config) -> dict:
    """Train every subset of the study in a folder of its own, skipping finished ones, then report."""
    _, _, names = open_data(cfg)
    subsets, seeds = plan_study(cfg.study, names), cfg.study_seeds or [cfg.seed]
    runs = []
    for seed, subset in itertools.product(seeds, subsets):
        name = run_name(subset) + (f"_seed{seed}" if len(seeds) > 1 else "")
        runs.append(replace(cfg, categories=subset, seed=seed, study="", study_seeds=[],
                            out_dir=str(Path(cfg.out_dir) / name)))
    for number, run in enumerate(runs, 1):
        summary = Path(run.out_dir) / "summary.json"
        if summary.exists() and json.loads(summary.read_text(encoding="utf-8")).get("config_hash") == config_hash(run):
            print(f"[{number}/{len(runs)}] {Path(run.out_dir).name}: finished before")
            continue
        print(f"[{number}/{len(runs)}] {Path(run.out_dir).name}")
        result = train(run)
        if "stopped_at" in result:
            return result
    return report(Path(cfg.out_dir)) if int(os.environ.get("RANK", 0)) == 0 else {}


def read_results(folder: Path) -> list[dict]:
    """results.json of every run below a folder. Raises DataError if there is none or one is damaged."""
    found = []
    for path in sorted(folder.glob("**/results.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            found.append(result | {"run": str(path.parent.relative_to(folder))})
            for group in (result["groups"]["seen"], *(result["groups"][c] for c in result["categories"])):
                _ = group["xe_by_position"], group["xe"], group["icl_gain"], group["total_gain"], group["fit"]["alpha"]
            _ = result["K"], result["seed"]
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path} is damaged or foreign ({e}): --analyze that run again") from e
    if not found:
        raise DataError(f"{folder} holds no run with a results.json: python train_arxiv.py --study=all "
                                     f"--out_dir={folder}")
    return found


def report(folder: Path) -> dict:
    """XE against K over the runs of a folder: xe_by_k.csv, xe_by_category.csv, pictures, a self-contained report.html.

    Error bars are standard deviations over subsets and seeds of the same K. Returns {K: mean XE}.
    """
    results = read_results(folder)
    T = min(len(r["groups"]["seen"]["xe_by_position"]) for r in results)
    positions = sorted({p for p in (1, 2, 5, 10, 20, 50, T) if p <= T})
    by_k = {K: [r for r in results if r["K"] == K] for K in sorted({r["K"] for r in results})}

    def spread(values: list[float]) -> tuple[float, float]:
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    header = ["K", "runs", "xe", "xe_sd", "perplexity", "icl_gain", "icl_gain_sd", "total_gain", "alpha", "xe_inf"]
    header += [f"xe_at_{p}" for p in positions] + ["oracle_xe", "unseen_xe"]
    table = []
    for K, runs in by_k.items():
        seen = [r["groups"]["seen"] for r in runs]
        (xe, xe_sd), (gain, gain_sd) = spread([s["xe"] for s in seen]), spread([s["icl_gain"] for s in seen])
        oracle = [np.mean(s["oracle_xe_by_position"]) for s in seen if "oracle_xe_by_position" in s]
        unseen = [r["groups"]["unseen"]["xe"] for r in runs if "unseen" in r["groups"]]
        table.append([K, len(runs), xe, xe_sd, math.exp(xe), gain, gain_sd, *(
            float(np.mean(v)) for v in ([s["total_gain"] for s in seen], [s["fit"]["alpha"]["value"] for s in seen],
                                        [s["fit"]["xe_inf"]["value"] for s in seen])),
            *(float(np.mean([s["xe_by_position"][p - 1] for s in seen])) for p in positions),
            float(np.mean(oracle)) if oracle else "", float(np.mean(unseen)) if unseen else ""])
    categories = sorted({c for r in results for c in r["categories"]})
    per_category = []
    for K, runs in by_k.items():
        for category in categories:
            values = [r["groups"][category]["xe"] for r in runs if category in r["categories"]]
            if values:
                per_category.append([K, category, len(values), *spread(values)])
    _write_csv(folder / "xe_by_k.csv", header, table)
    _write_csv(folder / "xe_by_category.csv", ["K", "category", "runs", "xe", "xe_sd"], per_category)
    plot_report(folder, by_k, positions, per_category, T)
    write_html(folder, results, header, table, per_category)
    for K, runs, xe, sd, *_ in table:
        print(f"K = {K}: XE {xe:.4f} +- {sd:.4f} nats over {runs} runs")
    print(f"report of {len(results)} runs in {folder / 'report.html'}")
    return {K: xe for K, _, xe, *_ in table}


def _write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def plot_report(folder: Path, by_k: dict, positions: list[int], per_category: list[list], T: int) -> None:
    """XE by position for every K; XE against K at some positions; XE against K by category."""
    from matplotlib import colormaps

    shades = [colormaps["viridis"](0.9 * i / max(1, len(by_k) - 1)) for i in range(len(by_k))]

    def stack(runs: list[dict], key: str) -> np.ndarray:
        return np.array([r["groups"]["seen"][key][:T] for r in runs if key in r["groups"]["seen"]])

    def curves(axes):
        for (K, runs), shade in zip(by_k.items(), shades, strict=True):
            t, xe = binned(stack(runs, "xe_by_position"))
            axes.plot(t, xe.mean(0), color=shade, label=f"K = {K}" + (f" ({len(runs)} runs)" if len(runs) > 1 else ""))
            if len(runs) > 1:
                sd = xe.std(0, ddof=1)
                axes.fill_between(t, xe.mean(0) - sd, xe.mean(0) + sd, color=shade, alpha=0.15, linewidth=0)
            if len(oracle := stack(runs, "oracle_xe_by_position")):
                axes.plot(t, binned(oracle)[1].mean(0), color="k", linestyle="--", linewidth=0.8,
                          label="exact optimum" if K == max(by_k) else None)
        axes.set(xscale="log", xlabel="tokens read", ylabel="cross entropy of the next token (nats)",
                 title="in-context cross entropy, equal training tokens")
        axes.legend(fontsize=8)

    def against_k(axes):
        for i, p in enumerate(positions):
            points = [(K, stack(runs, "xe_by_position")[:, p - 1]) for K, runs in by_k.items()]
            axes.errorbar([K for K, _ in points], [v.mean() for _, v in points],
                          [v.std(ddof=1) if len(v) > 1 else 0 for _, v in points], fmt="o-", markersize=4, capsize=3,
                          color=colormaps["plasma"](0.85 * i / max(1, len(positions) - 1)), label=f"after {p} tokens")
        axes.set(xlabel="components K", ylabel="cross entropy (nats)", xticks=list(by_k),
                 title="cross entropy against K (bars: s.d. over subsets and seeds)")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    def by_category(axes):
        for category in dict.fromkeys(row[1] for row in per_category):
            rows = [row for row in per_category if row[1] == category]
            axes.errorbar([r[0] for r in rows], [r[3] for r in rows], [r[4] for r in rows], fmt="o-", markersize=4,
                          capsize=3, label=category)
        axes.set(xlabel="components K", ylabel="cross entropy (nats)", xticks=list(by_k),
                 title="cross entropy of each category against K")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    plot(folder, "xe_by_position", curves)
    plot(folder, "xe_against_k", against_k)
    plot(folder, "xe_by_category", by_category)


def write_html(folder: Path, results: list[dict], header: list[str], table: list, per_category: list) -> None:
    """report.html: one file with the pictures inside."""

    def cell(value) -> str:
        return f"<td>{value:.4f}</td>" if isinstance(value, float) else f"<td>{html.escape(str(value))}</td>"

    def rows(head: list[str], lines: list[list]) -> str:
        return ("<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"
                + "".join("<tr>" + "".join(map(cell, line)) + "</tr>" for line in lines) + "</table>")

    def picture(name: str, text: str) -> str:
        data = base64.b64encode((folder / "plots" / f"{name}.png").read_bytes()).decode()
        return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'

    runs = [[r["run"], r["K"], r["seed"], r["groups"]["seen"]["xe"], r["groups"]["seen"]["icl_gain"],
             r["groups"]["seen"]["total_gain"],
             max(r["probe"]["accuracy"][-1]) if "probe" in r else ""] for r in results]
    style = ("body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
             "table{border-collapse:collapse;margin:1em 0;font-size:13px}"
             "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}"
             "img{max-width:100%}figure{margin:2em 0}figcaption{color:#555}div{overflow-x:auto}")
    page = ["<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Cross entropy against K</title>",
            f"<style>{style}</style></head><body><h1>In-context cross entropy against the number of components</h1>",
            f"<p>{len(results)} runs. Unless set otherwise all train on the same number of tokens, divided among K "
            "components. Cross entropies are in nats, on validation documents of the components trained on; "
            "unseen_xe is on the others.</p>",
            picture("xe_by_position", "Cross entropy of the next token by tokens read, for every K. Bands: standard "
                    "deviation over subsets and seeds."),
            picture("xe_against_k", "The same at some positions, against K."), "<h2>By K</h2><div>",
            rows(header, table), "</div>", picture("xe_by_category", "Each category's cross entropy against K."),
            "<h2>By category</h2>", rows(["K", "category", "runs", "xe", "xe_sd"], per_category), "<h2>Runs</h2>",
            rows(["run", "K", "seed", "xe", "icl_gain", "total_gain", "probe_accuracy"], runs), "</body></html>"]
    (folder / "report.html").write_text("\n".join(page) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> dict:
    cfg = configure(Config, argv, aliases=ALIASES)
    try:
        if cfg.report:
            return report(Path(cfg.report))
        if cfg.study:
            return run_study(cfg)
        return analyze(cfg) if cfg.analyze else train(cfg)
    except (DataError, checkpoint.CheckpointError) as e:
        fail(str(e))
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
