"""Train a language model that keeps a belief over a latent plan, and see what the plan is worth.

Text is written in chunks of C tokens. Each chunk follows one of K discrete plans, nobody says which; plans follow one
another as a Markov chain whose steps may depend on the text so far. The model holds the exact posterior of the plan
(Bayes' rule at every token, the chain at every boundary), in training as in generation. Because the filter is exact,
the loss is a likelihood, and on planted data both loss and plan have a known optimum to be held against.

    python train_apelr.py                             # offline English text, v2, 3 minutes on two cores
    python train_apelr.py config/planted.py           # a known plan: loss and plan recovered, 2 minutes
    python train_apelr.py config/v2_fast.py           # TinyStories on one GPU, after prepare_data.py text
    torchrun --nproc_per_node=8 train_apelr.py config/v2_fast.py
    python sample.py out/apelr --prompt="The" --sweep_states

Versions: v1_filtered_mixture (one head fed by state and plan), v2_planner_required (K expert heads, no shared one),
baseline (one softmax). Dimensions: B batch, L tokens, V vocabulary, H hidden, K plans, C chunk, N chunks, T = B * L
rows, J tokens looked up a row. x_t is read, y_t = x_{t+1} predicted; log b is a belief, always in log space, natural
logarithms. A forward filter over chunks is Rabiner (1989); with transitions that depend on inputs it is the
input-output HMM of Bengio & Frasconi (1995).
"""

import json
import math
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
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
from sources.shared import make_once
from sources.text import prepare_text, read_stream
from sources.tokenizer import load_tokenizer

EXPERIMENT = "apelr"  # how sample.py treats this page and its copies

OFFLINE = "data/text"  # made when it is missing
V2_TERMS = ("boundary_entropy", "usage_balance", "future_contrastive", "plan_js_div", "rep_unlikelihood")
V1_TERMS = ("belief_entropy", "usage_kl", "chunk_bow", "plan_mi", "chunk_post_kl")
MAXIMISED = ("plan_mi", "plan_js_div")
HEAD_GAIN = 4.0  # of the heads' start: at 1 the loss after 400 steps is 0.2 nats higher (lab book)


@dataclass
class Config:
    # output
    out_dir: str = checkpoint.default_out_dir(__file__)  # run folder
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    init_from: str = ""  # weights to start from: a checkpoint of this repository or of the source
    analyze: str = ""  # run folder or checkpoint to measure again instead of training
    log_interval: int = 20  # steps between log lines
    eval_interval: int = 200  # steps between evaluations
    save_interval: int | None = None  # steps between saves of last.pt; default eval_interval
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    preview_prompt: str = ""  # what the sample at every evaluation goes on from; default a document's beginning
    preview_tokens: int = 48  # its length; 0 shows none
    wandb: Literal["", "online", "offline"] = ""  # log to Weights & Biases
    tensorboard: bool = False  # log to TensorBoard
    # data
    data: str = OFFLINE  # folder of train.bin, val.bin and meta.json, by prepare_data.py text or planted
    seq_len: int = 128  # tokens predicted in a window, L
    # model
    version: Literal["v1_filtered_mixture", "v2_planner_required", "baseline"] = "v2_planner_required"
    backbone: Literal["gru", "transformer"] = "gru"
    vocab_size: int | None = None  # default that of the data
    num_plan_states: int = 8  # K
    num_experts: int | None = None  # of v2, one a plan: default and only choice num_plan_states
    experts: Literal["full", "bias"] = "full"  # of v2. full: K heads | bias: one head and K vocabulary biases
    chunk_size: int = 16  # tokens that share a plan, C
    token_dim: int = 96  # of token embeddings
    hidden_dim: int = 128  # H
    fusion_dim: int = 128  # of v1: where state and plan meet
    num_layers: int = 2
    num_heads: int = 4  # of backbone=transformer
    dropout: float = 0.0
    compat: Literal["", "source"] = ""  # source: boundary, lookahead feedback and repetition window as the source has
    boundary: Literal["iohmm", "source"] | None = None  # iohmm: exact, default | source: bias after the transition
    planner_context_scale: float = 1.0  # weight of the text in a transition
    planner_self_bias: float | None = None  # initial logit of staying in a plan; default 1.5 (v1), 1.8 (v2)
    planner_temperature: float = 1.0  # tau: the gate is softmax(log b / tau); other than 1 is no Bayes mixture
    token_filtering: bool = True  # update the belief by every token, not at boundaries alone
    carry_posterior: bool = True  # and carry that across boundaries. false is the source's older v2: boundaries
    # ^ know of earlier boundaries alone, chunks begin one token later, tau acts on samples but not on the gate
    lookahead_horizon: int = 2  # plans ahead that are mixed into the gate, S
    lookahead_feedback_scale: float | None = None  # a, their share; default 0 (exact), 0.25 with compat=source
    # loss
    entropy_reg_weight: float = 0.0  # v1: entropy of the belief; v2: boundary_entropy, if loss_weights lacks it
    usage_balance_weight: float = 0.0  # KL(mean belief || uniform); v2: if loss_weights lacks usage_balance
    chunk_bow_weight: float = 0.0  # v1: bag of words of the chunk under the plan believed at its start
    chunk_bow_warmup_steps: int = 0  # linear warm-up of chunk_bow_weight
    plan_mi_weight: float = 0.0  # v1: mutual information of plan and next token, maximised
    chunk_post_kl_weight: float = 0.0  # v1: symmetric KL of a recognizer of the chunk and the posterior at its end
    loss_weights: dict[str, float] = field(default_factory=lambda: {"usage_balance": 0.02, "future_contrastive": 0.02})
    # ^ v2: future_contrastive, plan_js_div (maximised), boundary_entropy, usage_balance, rep_unlikelihood, rep_window
    rep_window: int = 0  # recent tokens that rep_unlikelihood looks at
    rep_include_current: bool | None = None  # whether x_t is among them; default true, false with compat=source
    aux_token_fraction: float = 0.25  # share of the tokens, drawn anew each step, that plan_mi and plan_js_div look at
    future_horizon_chunks: int = 2  # chunks ahead that future_contrastive predicts
    # commitment (v2)
    plan_commitment: Literal["soft", "gumbel_st"] = "soft"  # gumbel_st: a straight-through sample at each chunk's start
    commitment_warmup_steps: int = 0  # soft until then
    commitment_ramp_steps: int = 0  # then the sample's share grows to 1
    plan_temperature_start: float | None = None  # tau over training, linear; default planner_temperature
    plan_temperature_end: float | None = None
    # optimizer
    batch_size: int | Literal["auto"] = 16  # windows a step, over all ranks and micro-steps; auto: what fits a GPU
    cpu_batch_size: int = 16  # of batch_size=auto without a GPU
    grad_accum_steps: int = 1  # micro-steps a step
    lr: float = 8e-3  # peak learning rate of AdamW
    weight_decay: float = 0.01  # of matrices, not of biases and planner logits
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    grad_clip: float = 1.0  # largest gradient norm; 0 does not clip
    # schedule
    max_steps: int = 600  # optimizer steps
    warmup_steps: int = 50  # linear warm-up
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: float = 0.1  # what cosine ends at, as a fraction of lr
    # evaluation
    eval_batches: int = 8  # validation batches during training
    final_eval_batches: int = 64  # and at the end
    # system
    seed: int = 1337
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        positive = ("log_interval", "eval_interval", "save_interval", "seq_len", "vocab_size", "num_plan_states",
                    "chunk_size", "token_dim", "hidden_dim", "fusion_dim", "num_layers", "num_heads", "cpu_batch_size",
                    "grad_accum_steps", "max_steps", "eval_batches", "final_eval_batches", "future_horizon_chunks")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in positive
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        negative = ("lr", "weight_decay", "grad_clip", "warmup_steps", "min_lr_ratio", "preview_tokens", "rep_window",
                    "lookahead_horizon", "chunk_bow_warmup_steps", "commitment_warmup_steps", "commitment_ramp_steps",
                    "seed", "entropy_reg_weight", "usage_balance_weight", "chunk_bow_weight", "plan_mi_weight",
                    "chunk_post_kl_weight")
        wrong += [f"{k} = {getattr(self, k)}: must not be negative" for k in negative if getattr(self, k) < 0]
        wrong += [f"{k} = {getattr(self, k)}: must be in [0, 1)" for k in ("adam_beta1", "adam_beta2", "dropout")
                  if not 0 <= getattr(self, k) < 1]
        wrong += [f"{k} = {getattr(self, k)}: must be above 0" for k in
                  ("planner_temperature", "plan_temperature_start", "plan_temperature_end")
                  if getattr(self, k) is not None and getattr(self, k) <= 0]
        if self.batch_size != "auto" and self.batch_size < 1:
            wrong.append(f"batch_size = {self.batch_size}: must be at least 1, or auto")
        if not 0 <= (self.lookahead_feedback_scale or 0) <= 1:
            wrong.append(f"lookahead_feedback_scale = {self.lookahead_feedback_scale}: must be in [0, 1]")
        if not 0 < self.aux_token_fraction <= 1:
            wrong.append(f"aux_token_fraction = {self.aux_token_fraction}: must be in (0, 1]")
        if self.num_experts not in (None, self.num_plan_states):
            wrong.append(f"num_experts = {self.num_experts} must equal num_plan_states = {self.num_plan_states}")
        if self.version != "baseline" and self.chunk_size >= self.seq_len:
            wrong.append(f"chunk_size = {self.chunk_size} must be smaller than seq_len = {self.seq_len}")
        if self.backbone == "transformer" and self.hidden_dim % max(1, 2 * self.num_heads):
            wrong.append(f"hidden_dim = {self.hidden_dim} is no multiple of 2 * num_heads = {2 * self.num_heads}")
        known = (*V2_TERMS, "rep_window")
        wrong += [f"loss_weights has no {k!r}: it has {', '.join(known)}" for k in self.loss_weights if k not in known]
        wrong += [f"loss_weights.{k} = {v}: must not be negative" for k, v in self.loss_weights.items() if v < 0]
        if self.loss_weights.get("rep_unlikelihood") and not self.repetition_window() and self.version[:2] == "v2":
            wrong.append("loss_weights.rep_unlikelihood needs rep_window, the number of recent tokens")
        if self.version != "v2_planner_required" and (self.experts, self.plan_commitment) != ("full", "soft"):
            wrong.append(f"experts and plan_commitment are settings of v2_planner_required, not of {self.version}")
        return wrong

    # What the settings that depend on others come to.
    def plans(self) -> int:
        return 1 if self.version == "baseline" else self.num_plan_states

    def boundary_rule(self) -> str:
        return self.boundary or ("source" if self.compat else "iohmm")

    def feedback(self) -> float:
        default = 0.25 if self.compat and self.version == "v2_planner_required" else 0.0
        return default if self.lookahead_feedback_scale is None else self.lookahead_feedback_scale

    def self_bias(self) -> float:
        return self.planner_self_bias if self.planner_self_bias is not None else \
            1.5 if self.version == "v1_filtered_mixture" else 1.8

    def repetition_window(self) -> int:
        return self.rep_window or int(self.loss_weights.get("rep_window", 0))

    def include_current(self) -> bool:
        return not self.compat if self.rep_include_current is None else self.rep_include_current

    def weights(self, step: int = 0) -> dict[str, float]:
        """Weight of every auxiliary term at a step; those of weight 0 are left out and never computed."""
        if self.version == "v1_filtered_mixture":
            warm = min(1.0, (step + 1) / self.chunk_bow_warmup_steps) if self.chunk_bow_warmup_steps else 1.0
            found = dict(zip(V1_TERMS, (
                self.entropy_reg_weight, self.usage_balance_weight, self.chunk_bow_weight * warm, self.plan_mi_weight,
                self.chunk_post_kl_weight), strict=True))
        elif self.version == "v2_planner_required":
            found = {"boundary_entropy": self.entropy_reg_weight, "usage_balance": self.usage_balance_weight}
            found |= {k: v for k, v in self.loss_weights.items() if k != "rep_window"}
        else:
            found = {}
        return {k: v for k, v in found.items() if v}


ALIASES = {  # names of the source's settings; data.* and tokenizer.* are prepare_data.py's
    "resume_from": "resume", "val_batches": "eval_batches", "plan_temperature": "planner_temperature",
    "grad_accum": "grad_accum_steps", "learning_rate": "lr", "architecture": "version", "tokenizer": None,
    "adaptive_batch": None, "distributed": None, "async_planner": None,
    "compile.enabled": "compile", "compile.mode": None, "compile.fullgraph": None, "compile.dynamic": None,
    "fused_adamw": None, "allow_tf32": None, "matmul_precision": None, "save_optimizer_state": None, "stride": None,
    "max_nonfinite_steps": None, "preview_interval": None, "data.source": "data", "max_train_examples": None,
    "max_val_examples": None, "min_chars": None, "max_train_chars": None, "max_val_chars": None, "streaming": None,
    "train_split": None, "val_split": None, "cache_dir": None, "token_cache": None, "token_cache_dir": None,
    "reuse_token_cache": None, "max_train_tokens": None, "max_val_tokens": None, "train_token_file": None,
    "val_token_file": None, "tokenizer_fit_split": None, "tokenizer_fit_max_examples": None,
    "tokenizer_fit_max_chars": None, "tokenizer_fit_streaming": None, "eval_planner_diagnostics": None,
    "num_workers": None,
    "final_eval_planner_diagnostics": None, "allow_zero_v2_planner_losses": None, "pin_memory": None,
    "persistent_workers": None, "prefetch_factor": None, "drop_last": None,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------
class Corpus:
    """Token streams of a data folder, mapped into memory: train, val [tokens], meta, tokenizer (None for planted).

    Raises DataError for a folder that is missing, damaged, or whose tokenizer is not the one the tokens were made with.
    """

    def __init__(self, folder: str):
        named = Path("data") / folder  # data=tinystories is data/tinystories
        self.folder = named if not Path(folder).exists() and named.exists() else Path(folder)
        self.meta, streams = read_stream(self.folder)
        self.train, self.val = streams["train"], streams["val"]
        self.vocab_size, self.kind = self.meta["vocab_size"], self.meta["kind"]
        for name, tokens in streams.items():
            top = max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
            if top >= self.vocab_size:
                raise DataError(f"{self.folder / name}.bin has the token {top}, beyond its vocabulary of "
                                             f"{self.vocab_size}: prepare the folder again")
        self.tokenizer = None
        if self.meta["tokenizer"]:
            path = self.folder / self.meta["tokenizer"]
            self.tokenizer = load_tokenizer(path)
            if self.tokenizer.hash() != self.meta["tokenizer_hash"]:
                raise DataError(f"{path} is not the tokenizer that the tokens beside it were made with: "
                                             "prepare the folder again")

    def starts(self, split: str, cfg: Config) -> tuple[int, int]:
        """(number of places where a window may start, distance between them); raises DataError where there is none."""
        tokens, distance = getattr(self, split), 1
        if self.kind == "planted":
            distance = self.meta["document_length"]
            if cfg.seq_len >= distance:
                raise DataError(f"seq_len = {cfg.seq_len}, but the planted documents predict only "
                                             f"{distance - 1} tokens: use seq_len={distance - 1}")
            if self.meta["version"] != cfg.version and cfg.version != "baseline":
                raise DataError(f"{self.folder} has its chunks where {self.meta['version']} has them: "
                                             f"make it anew by prepare_data.py planted --version={cfg.version}")
        count = (len(tokens) - cfg.seq_len - 1) // distance + 1
        if count < 1:
            raise DataError(f"{self.folder / split}.bin has {len(tokens):,} tokens, less than a window of "
                                         f"seq_len + 1 = {cfg.seq_len + 1}: use more text or a shorter seq_len")
        return count, distance

    def windows(self, split: str, starts: np.ndarray, length: int) -> torch.Tensor:
        """Tokens [B, length + 1] int64 from the places `starts` [B]."""
        tokens = getattr(self, split)[starts[:, None] + np.arange(length + 1)]
        return torch.from_numpy(tokens.astype(np.int64))


def open_data(cfg: Config) -> Corpus:
    """The corpus of cfg.data; the offline default is made where it is missing. Raises DataError."""
    if cfg.data == OFFLINE:
        make_once(Path(OFFLINE) / "meta.json", lambda: prepare_text(out_dir=OFFLINE, vocab_size=1_024))
    corpus = Corpus(cfg.data)
    if cfg.vocab_size not in (None, corpus.vocab_size):
        raise DataError(f"vocab_size = {cfg.vocab_size}, but {cfg.data} has {corpus.vocab_size}: leave it "
                                     "out")
    return corpus


class Batches:
    """Windows of every step: a pure function of (seed, step), the same for any number of ranks."""

    def __init__(self, rt: Runtime, corpus: Corpus, cfg: Config, batch_size: int):
        self.rt, self.corpus, self.cfg, self.batch_size = rt, corpus, cfg, batch_size
        self.count, self.distance = corpus.starts("train", cfg)

    def __call__(self, step: int) -> torch.Tensor:
        """This rank's windows, [B / world_size, L + 1] int64, on the device."""
        rng = np.random.default_rng(np.random.SeedSequence(self.cfg.seed, spawn_key=(1, step)))
        starts = rng.integers(self.count, size=self.batch_size)[self.rt.rank :: self.rt.world_size] * self.distance
        tokens = self.corpus.windows("train", starts, self.cfg.seq_len)
        if self.rt.device.type == "cuda":
            return tokens.pin_memory().to(self.rt.device, non_blocking=True)
        return tokens.to(self.rt.device)


def validation_windows(corpus: Corpus, cfg: Config, most: int) -> np.ndarray:
    """Starts of at most `most` windows that do not overlap, spread evenly over the validation tokens."""
    count, distance = corpus.starts("val", cfg)
    places = np.arange(0, count, 1 if corpus.kind == "planted" else cfg.seq_len)
    pick = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))
    return places[pick] * distance


# ---------------------------------------------------------------------------------------------------------------
# Expert emissions, streamed: logits [T, K, V] never exist as a whole
# ---------------------------------------------------------------------------------------------------------------
def block_rows(experts: str, K: int, V: int, device: torch.device) -> int:
    """Rows whose logits fill 64 MB (CPU: one buffer, reused; smaller products are slower) or 1 GB (GPU)."""
    return max(16, (1 << 24 if device.type == "cpu" else 1 << 28) // (K * V))


def half_type(tensor: torch.Tensor) -> torch.dtype:
    """What matrix products run in: autocast's type, or the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def block_logits(experts: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logits [R, K, V] of a block, in one matrix product for all experts; bias [K, V].

    full: x [R, H], weight [K V, H]. tanh: x [R K, F], weight [V, F]. bias: x [R, H], weight [V, H].
    """
    K, V = bias.shape
    product = (x @ weight.t()).to(bias.dtype)
    if experts == "bias":
        return product[:, None] + bias
    return product.view(-1, K, V).add_(bias)


class Gradients:
    """Gradients of an emission, added up block by block: of x (whole), weight and bias."""

    def __init__(self, experts: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
        self.experts, self.x, self.weight, self.half = experts, x, weight, weight.dtype
        self.dx = torch.empty(x.shape, dtype=bias.dtype, device=x.device)
        self.dweight = torch.zeros(weight.shape, dtype=bias.dtype, device=x.device)
        self.dbias = torch.zeros_like(bias)

    def add(self, rows: slice, delta: torch.Tensor) -> None:
        """delta [R, K, V]: the gradient of the block's logits."""
        self.dbias += delta.sum(0)
        flat = delta.sum(1) if self.experts == "bias" else delta.view(-1, len(self.weight))
        flat, x = flat.to(self.half), self.x[rows]
        self.dx[rows] = flat @ self.weight
        if flat.dtype == self.dweight.dtype:
            self.dweight.addmm_(flat.t(), x)
        else:
            self.dweight += flat.t() @ x


class LogProbs(torch.autograd.Function):
    """log p_{t,k}(v) for the tokens v of index [T, J]: [T, K, J]. Memory grows with T K J and with the block.

    Forward keeps the normalisers [T, K] only; backward computes the logits of a block again, turns them into
    scatter(g) - softmax * sum_j g in place, and does the two products of that block.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, index, experts: str):
        half, K, (T, J) = half_type(x), len(bias), index.shape
        each, size = len(x) // T, block_rows(experts, *bias.shape, x.device)
        found, normaliser = bias.new_empty(T, K, J), bias.new_empty(T, K)
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(half), weight.to(half)
            for begin in range(0, T, size):
                rows = slice(begin, min(begin + size, T))
                logits = block_logits(experts, x[rows.start * each : rows.stop * each], weight, bias)
                torch.gather(logits, 2, index[rows, None].expand(-1, K, -1), out=found[rows])
                top = logits.amax(2, keepdim=True)
                torch.add(logits.sub_(top).exp_().sum(2).log_(), top[:, :, 0], out=normaliser[rows])
        ctx.save_for_backward(x, weight, bias, index, normaliser)
        ctx.experts, ctx.each, ctx.size = experts, each, size
        return found.sub_(normaliser[..., None])

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, index, normaliser = ctx.saved_tensors
        T, each, gradients = len(index), ctx.each, Gradients(ctx.experts, x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            for begin in range(0, T, ctx.size):
                rows = slice(begin, min(begin + ctx.size, T))
                wide = slice(rows.start * each, rows.stop * each)
                delta = block_logits(ctx.experts, x[wide], weight, bias).sub_(normaliser[rows, :, None]).exp_()
                delta.mul_(grad[rows].sum(2, keepdim=True).neg_())
                delta.scatter_add_(2, index[rows, None].expand_as(grad[rows]), grad[rows])
                gradients.add(wide, delta)
        return gradients.dx, gradients.dweight, gradients.dbias, None, None


class SharedLogProbs(torch.autograd.Function):
    """The same for experts=bias, where log p_{t,k}(v) = z_t(v) + b_k(v) - Z_{t,k} with one z = W h for all plans.

    All K normalisers come from one product, Z = m + n + log(exp(z - m) . exp(b - n)), m and n the maxima of z_t and
    b_k: K plans cost about as much as one softmax, and nothing of size K V is made for a token.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, index):
        half, (K, V), (T, J) = half_type(x), bias.shape, index.shape
        size = block_rows("bias", 1, V, x.device)
        found, normaliser, tops = bias.new_empty(T, K, J), bias.new_empty(T, K), bias.new_empty(T, 1)
        high = bias.amax(1, keepdim=True)
        table = (bias - high).exp()
        tiny = torch.finfo(bias.dtype).tiny
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(half), weight.to(half)
            for begin in range(0, T, size):
                rows = slice(begin, min(begin + size, T))
                z = (x[rows] @ weight.t()).to(bias.dtype)
                found[rows] = z.gather(1, index[rows])[:, None]
                tops[rows] = z.amax(1, keepdim=True)
                total = z.sub_(tops[rows]).exp_() @ table.t()
                normaliser[rows] = total.clamp_min_(tiny).log_() + tops[rows] + high.t()
        ctx.save_for_backward(x, weight, table, index, normaliser, tops, high)
        ctx.size = size
        return found + bias.t()[index].transpose(1, 2) - normaliser[..., None]

    @staticmethod
    def backward(ctx, grad):
        x, weight, table, index, normaliser, tops, high = ctx.saved_tensors
        dx, dbias = torch.empty(x.shape, dtype=table.dtype, device=x.device), torch.zeros_like(table)
        dweight = torch.zeros_like(weight, dtype=table.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for begin in range(0, len(index), ctx.size):
                rows = slice(begin, min(begin + ctx.size, len(index)))
                z = (x[rows] @ weight.t()).to(table.dtype).sub_(tops[rows]).exp_()
                share = grad[rows].sum(2) * (tops[rows] + high.t() - normaliser[rows]).exp_()  # G / total, [R, K]
                dbias -= table * (share.t() @ z)
                z.mul_(share @ table).neg_().scatter_add_(1, index[rows], grad[rows].sum(1))
                half = z.to(weight.dtype)
                dx[rows] = half @ weight
                dweight += half.t() @ x[rows]
        flat = grad.transpose(0, 1).reshape(len(table), -1)  # [K, T J]
        dbias.scatter_add_(1, index.reshape(1, -1).expand_as(flat), flat)
        return dx, dweight, dbias, None


class PlanContrast(torch.autograd.Function):
    """How much plans differ in what they predict: a mean over rows, its gradients found in the same pass.

    With log_belief [T, K], the mutual information of plan and token, sum_k b_k KL(p_k || sum_j b_j p_j). Without, the
    mean Jensen-Shannon divergence of all pairs (Lin 1991), with m_ij = (p_i + p_j) / 2 and d JS / d p_i =
    (log p_i - log m_ij) / 2.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, log_belief, rows_count: int, experts: str):
        half, (K, V), each = half_type(x), bias.shape, len(x) // rows_count
        size = max(8, block_rows(experts, K, V, x.device) // 4)
        total, dbelief = bias.new_zeros(()), None if log_belief is None else torch.empty_like(log_belief)
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(half), weight.to(half)
            gradients = Gradients(experts, x, weight, bias)
            for begin in range(0, rows_count, size):
                rows = slice(begin, min(begin + size, rows_count))
                wide = slice(rows.start * each, rows.stop * each)
                logs = block_logits(experts, x[wide], weight, bias)
                logs = logs.sub_(logs.logsumexp(2, keepdim=True))
                probs = logs.exp()
                if log_belief is None:
                    scale = torch.full_like(probs[:, :, :1], 0.5 / max(1, K * (K - 1) // 2))
                    slope = pairwise(logs, probs)
                else:
                    scale = log_belief[rows].exp()[:, :, None]
                    mixture = (scale * probs).sum(1, keepdim=True).clamp_min_(torch.finfo(bias.dtype).tiny)
                    slope = logs.sub_(mixture.log_())
                inner = (probs * slope).sum(2, keepdim=True)  # KL_k, or the sum of them over the other plans
                value = scale * inner
                total += value.sum()
                if log_belief is not None:
                    dbelief[rows] = (value - scale)[:, :, 0] / rows_count
                gradients.add(wide, slope.sub_(inner).mul_(probs).mul_(scale / rows_count))
        ctx.found = gradients.dx, gradients.dweight, gradients.dbias, dbelief
        return total / rows_count

    @staticmethod
    def backward(ctx, grad):
        dx, dweight, dbias, dbelief = ctx.found
        return dx * grad, dweight * grad, dbias * grad, None if dbelief is None else dbelief * grad, None, None


def pairwise(logs: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """sum_{j != i} log p_i - log m_ij for every plan i, [R, K, V]."""
    K, tiny = logs.shape[1], torch.finfo(logs.dtype).tiny
    found = logs * (K - 1)
    for i in range(K - 1):
        middle = (probs[:, i + 1 :] + probs[:, i : i + 1]).mul_(0.5).clamp_min_(tiny).log_()
        found[:, i] -= middle.sum(1)
        found[:, i + 1 :] -= middle
    return found


# Loops over blocks, which tracing would unroll.
log_probs = torch.compiler.disable(LogProbs.apply)
shared_log_probs = torch.compiler.disable(SharedLogProbs.apply)
plan_contrast = torch.compiler.disable(PlanContrast.apply)


# ---------------------------------------------------------------------------------------------------------------
# The exact filter
# ---------------------------------------------------------------------------------------------------------------
class Beliefs(NamedTuple):
    """What a pass of the filter knows; beliefs are log-probabilities over K plans."""

    nll: torch.Tensor  # -log p(y_t | x_<=t) in nats [B, L]
    before: torch.Tensor  # belief before y_t [B, L, K]
    gate: torch.Tensor  # weights of the experts for y_t [B, L, K]; before, unless lookahead or tau change it
    start: torch.Tensor  # belief at the start of each chunk [B, N, K]
    state: torch.Tensor  # and what the chunk works with: start, or a sample, or what a planner mode puts there
    end: torch.Tensor  # belief after the last token of each chunk [B, N, K]


def cross_boundary(belief: torch.Tensor, transition: torch.Tensor, context: torch.Tensor, rule: str) -> torch.Tensor:
    """Log belief [B, K] over the next chunk's plan. transition: logits A [K, K] (from, to); context: g [B, K].

    iohmm: b P with P_ij = softmax_j(A_ij + g_j), a Markov chain whose steps depend on the text. source: softmax(log(b
    softmax(A)) + g), which renormalises over all plans at once, as no chain does.
    """
    if rule == "iohmm":
        return torch.logsumexp(belief[:, :, None] + F.log_softmax(transition + context[:, None], 2), 1)
    return F.log_softmax(torch.logsumexp(belief[:, :, None] + F.log_softmax(transition, 1), 1) + context, 1)


def look_ahead(belief: torch.Tensor, transition: torch.Tensor, steps: int) -> torch.Tensor:
    """Probabilities [..., steps, K] of the plans 1..steps chunks ahead, by the chain alone."""
    P, found = transition.softmax(1), [belief.exp()]
    with torch.autocast(belief.device.type, enabled=False):
        for _ in range(steps):
            found.append(found[-1] @ P)
    return torch.stack(found[1:], -2)


def gate_of(belief: torch.Tensor, transition: torch.Tensor, feedback: float, horizon: int, tau: float) -> torch.Tensor:
    """Log weights of the experts: softmax(log[(1 - a) b + a mean_s b P^s] / tau), [..., K]."""
    if feedback and horizon:
        P, power, mean = transition.softmax(1), None, 0.0
        with torch.autocast(belief.device.type, enabled=False):
            for _ in range(horizon):
                power = P if power is None else power @ P
                mean = mean + power / horizon
        mix = (1 - feedback) * torch.eye(len(P), dtype=P.dtype, device=P.device) + feedback * mean
        belief = torch.logsumexp(belief[..., :, None] + mix.clamp_min(torch.finfo(mix.dtype).tiny).log(), -2)
    return belief if tau == 1 else F.log_softmax(belief / tau, -1)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
class SharedDropout(nn.Module):
    """Dropout of states [T, H]: one mask for all plans, which would otherwise differ by their masks alone."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.dropout(h, self.rate, self.training) if self.rate else h


class LinearExperts(nn.Module):
    """logits_{t,k} = W_k h_t + c_k: a head for each plan and nothing shared (experts=full; K = 1 is the baseline).

    Experts of every kind have `rows` of states h [T, H] (what the matrix meets) and a `table` of (matrix, bias [K, V]);
    block_logits says what becomes of the two.
    """

    kind = "full"

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.drop = SharedDropout(cfg.dropout)
        self.weight = nn.Parameter(torch.empty(cfg.plans(), vocab_size, cfg.hidden_dim))
        self.bias = nn.Parameter(torch.zeros(cfg.plans(), vocab_size))
        for head in self.weight:
            nn.init.xavier_uniform_(head.data, HEAD_GAIN)

    def rows(self, h: torch.Tensor) -> torch.Tensor:
        return self.drop(h)

    def table(self) -> tuple:
        return self.weight.flatten(0, 1), self.bias


class BiasExperts(nn.Module):
    """logits_{t,k} = W h_t + c + v_k: plans differ by a bias over the vocabulary (experts=bias)."""

    kind = "bias"

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.drop = SharedDropout(cfg.dropout)
        self.head = nn.Linear(cfg.hidden_dim, vocab_size)
        self.plan_bias = nn.Parameter(0.1 * torch.randn(cfg.plans(), vocab_size))  # equal plans would stay equal
        nn.init.xavier_uniform_(self.head.weight, HEAD_GAIN)
        nn.init.zeros_(self.head.bias)

    def rows(self, h: torch.Tensor) -> torch.Tensor:
        return self.drop(h)

    def table(self) -> tuple:
        return self.head.weight, self.head.bias + self.plan_bias


class TanhExperts(nn.Module):
    """logits_{t,k} = W_o tanh(W_s h_t + c_s + W_p u_k) + c_o + v_k (version 1)."""

    kind = "tanh"

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.drop = SharedDropout(cfg.dropout)
        self.plan_emb = nn.Embedding(cfg.plans(), cfg.fusion_dim)
        self.state_proj = nn.Linear(cfg.hidden_dim, cfg.fusion_dim)
        self.plan_proj = nn.Linear(cfg.fusion_dim, cfg.fusion_dim, bias=False)
        self.out_proj = nn.Linear(cfg.fusion_dim, vocab_size)
        self.plan_vocab_bias = nn.Parameter(torch.zeros(cfg.plans(), vocab_size))
        nn.init.normal_(self.plan_emb.weight, std=0.02)
        for layer in (self.state_proj, self.plan_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight, HEAD_GAIN if layer is self.out_proj else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def rows(self, h: torch.Tensor) -> torch.Tensor:
        joint = torch.tanh(self.state_proj(h)[:, None] + self.plan_proj(self.plan_emb.weight))  # [T, K, F]
        if self.drop.rate and self.training:
            joint = joint * self.drop(torch.ones_like(joint[:, :1]))
        return joint.flatten(0, 1)

    def table(self) -> tuple:
        return self.out_proj.weight, self.out_proj.bias + self.plan_vocab_bias


class Transformer(nn.Module):
    """Causal pre-norm transformer with rotary positions (Su et al. 2021), called like nn.GRU: (x, state) -> (h, state).

    The state is a list of keys and values of every layer, which grows with the text.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.num_heads, width = cfg.num_heads, cfg.hidden_dim
        self.embed = nn.Linear(cfg.token_dim, width, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "attention_norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
            "mlp_norm": nn.LayerNorm(width), "mlp_in": nn.Linear(width, 4 * width),
            "mlp_out": nn.Linear(4 * width, width)}) for _ in range(cfg.num_layers))
        self.final_norm, self.drop = nn.LayerNorm(width), SharedDropout(cfg.dropout)
        R = width // cfg.num_heads // 2
        self.register_buffer("frequency", 10_000.0 ** (-torch.arange(R) / R), persistent=False)

    def rotate(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """x [B, heads, L, 2 R] turned by angle [L, R]."""
        a, b = x.chunk(2, -1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: torch.Tensor, state: list | None = None):
        (B, L, _), past = x.shape, 0 if state is None else state[0][0].shape[2]
        angle = torch.arange(past, past + L, device=x.device)[:, None] * self.frequency
        mask = None if past == 0 else torch.ones(L, past + L, dtype=torch.bool, device=x.device).tril(past)
        x, kept = self.embed(x), []
        for i, layer in enumerate(self.layers):
            qkv = layer["qkv"](layer["attention_norm"](x)).view(B, L, 3, self.num_heads, -1)
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, L, 2 R]
            q, k = self.rotate(q, angle), self.rotate(k, angle)
            if past:
                k, v = torch.cat([state[i][0], k], 2), torch.cat([state[i][1], v], 2)
            kept.append((k, v))
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            x = x + self.drop(layer["out"](found.transpose(1, 2).reshape(B, L, -1)))
            x = x + self.drop(layer["mlp_out"](F.gelu(layer["mlp_in"](layer["mlp_norm"](x)))))
        return self.final_norm(x), kept


class PlannerLM(nn.Module):
    """Executor (backbone and experts) and planner (initial plan, transitions, what of the text moves them).

    State-dict names of the planner are the source's. Beliefs, transitions and their products stay float32 (or float64)
    under autocast.
    """

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.cfg, K, H = cfg, cfg.plans(), cfg.hidden_dim
        # y_t is in chunk (t + offset) // C: in v2 the first token read counts as one of the first chunk.
        self.offset = int(cfg.version == "v2_planner_required" and cfg.carry_posterior)
        self.token_emb = nn.Embedding(vocab_size, cfg.token_dim)
        nn.init.normal_(self.token_emb.weight)  # of size 1: with 0.02 a GRU needs 200 steps to leave the unigrams
        self.backbone = Transformer(cfg) if cfg.backbone == "transformer" else nn.GRU(
            cfg.token_dim, H, cfg.num_layers, batch_first=True, dropout=cfg.dropout if cfg.num_layers > 1 else 0.0)
        kinds = {"v1_filtered_mixture": TanhExperts, "baseline": LinearExperts,
                 "v2_planner_required": BiasExperts if cfg.experts == "bias" else LinearExperts}
        self.experts = kinds[cfg.version](cfg, vocab_size)
        if cfg.version == "baseline":
            return
        self.planner_init_logits = nn.Parameter(torch.zeros(K))
        self.planner_transition_logits = nn.Parameter(cfg.self_bias() * torch.eye(K))
        if cfg.version == "v1_filtered_mixture":
            self.planner_ctx_proj, self.chunk_post_proj = nn.Linear(H, K), nn.Linear(H, K)
        else:
            self.planner_boundary_proj, self.planner_obs_proj = nn.Linear(H, K), nn.Linear(H, K)
            self.plan_state_emb, self.future_chunk_proj = nn.Embedding(K, H), nn.Linear(H, H, bias=False)
            nn.init.normal_(self.plan_state_emb.weight, std=0.02)
        for name, layer in self.named_children():
            if name.endswith("_proj"):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    # What the text says ----------------------------------------------------------------------------------------

    def read(self, input_ids: torch.Tensor, state=None):
        """Tokens [B, L] -> (h [B, L, H] after reading each, backbone state)."""
        return self.backbone(self.token_emb(input_ids), state)

    def read_one(self, token: torch.Tensor, memory):
        """One token [B] -> (h [B, H], backbone state), by GRU cells: a call of nn.GRU costs more than a token."""
        if self.cfg.backbone == "transformer":
            h, memory = self.read(token[:, None], memory)
            return h[:, 0], memory
        x, kept = self.token_emb(token), []
        for weights, past in zip(self.backbone.all_weights, memory, strict=True):
            x = torch.gru_cell(x, past, *weights)
            kept.append(x)
        return x, kept

    def look_up(self, h: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """log p_{t,k}(v) for v in index [B, L, J], h [B, L, H]: [B, L, K, J], float32 or float64."""
        emission = self.experts.rows(h.flatten(0, 1)), *self.experts.table(), index.flatten(0, 1)
        kind = self.experts.kind
        found = shared_log_probs(*emission) if kind == "bias" else log_probs(*emission, kind)
        return found.view(*index.shape[:2], *found.shape[1:])

    def chunk_means(self, h: torch.Tensor) -> torch.Tensor:
        """Means of h [B, L, H] over chunks of the tokens read, [B, ceil(L / C), H], the last one maybe partial."""
        C, (B, L, H), h = self.cfg.chunk_size, h.shape, h.to(self.planner_init_logits.dtype)
        padded = F.pad(h, (0, 0, 0, -L % C)).view(B, -1, C, H)
        count = torch.full((padded.shape[1], 1), float(C), dtype=h.dtype, device=h.device)
        count[-1] = C - -L % C
        return padded.sum(2) / count

    def contexts(self, h: torch.Tensor) -> torch.Tensor:
        """g [B, N - 1, K]: what the text adds to the transition logits at every boundary."""
        C = self.cfg.chunk_size
        with torch.autocast(h.device.type, enabled=False):
            if self.cfg.version == "v1_filtered_mixture":
                return self.context(h[:, C::C])
            return self.context(self.chunk_means(h)[:, : -(-(h.shape[1] + self.offset) // C) - 1])

    def context(self, h: torch.Tensor) -> torch.Tensor:
        """g [..., K] from the state at the boundary (v1) or the mean state of the chunk before it (v2), [..., H]."""
        h = h.to(self.planner_init_logits.dtype)
        if self.cfg.version == "v1_filtered_mixture":
            return self.cfg.planner_context_scale * self.planner_ctx_proj(h)
        return self.cfg.planner_context_scale * self.planner_boundary_proj(h) + self.planner_obs_proj(h)

    # What follows for the plan ---------------------------------------------------------------------------------

    def filter(self, evidence: torch.Tensor, context: torch.Tensor, planner_mode: str = "normal",
               forced_state: int | None = None, tau: float | None = None, hard_fraction: float = 0.0) -> Beliefs:
        """Run the belief over a text: sums within a chunk, a step of the chain between chunks.

        Args:
            evidence: log p_{t,k}(y_t) [B, L, K]. context: g [B, N - 1, K].
            planner_mode: normal | uniform_mask | forced_state (the belief is replaced and does not learn from tokens).
            tau: temperature of the gate. hard_fraction: share of a straight-through sample at each chunk's start.
        """
        cfg, (B, L, K), C, o = self.cfg, evidence.shape, self.cfg.chunk_size, self.offset
        tau = cfg.planner_temperature if tau is None else tau
        normal, N = planner_mode == "normal", -(-(L + o) // C)
        filtering = cfg.token_filtering and normal
        padded = F.pad(evidence, (0, 0, o, N * C - L - o)).view(B, N, C, K)  # zeros are no evidence
        total = padded.sum(2)
        prior = F.log_softmax(self.planner_init_logits, 0).expand(B, K)
        start, state, end = [prior], [], []
        for c in range(N):
            if c:
                last = end[-1] if cfg.carry_posterior else start[-1]
                crossed = self.cross(last, context[:, c - 1]) if normal or not cfg.carry_posterior else state[-1]
                start.append(crossed)
            state.append(self.commit(start[-1], planner_mode, forced_state, tau, hard_fraction))
            end.append(F.log_softmax(state[-1] + total[:, c], 1) if filtering else state[-1])
        start, state, end = torch.stack(start, 1), torch.stack(state, 1), torch.stack(end, 1)
        before = state[:, :, None].expand(B, N, C, K)
        if filtering:
            before = F.log_softmax(before + padded.cumsum(2) - padded, 3)
        before = before.reshape(B, N * C, K)[:, o : o + L]
        gate = self.gate(before, normal, tau)
        return Beliefs(-torch.logsumexp(gate + evidence, 2), before, gate, start, state, end)

    def cross(self, belief: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return cross_boundary(belief, self.planner_transition_logits, context, self.cfg.boundary_rule())

    def gate(self, belief: torch.Tensor, normal: bool = True, tau: float | None = None, feedback: float | None = None,
             horizon: int | None = None) -> torch.Tensor:
        """Log weights of the experts, given the log belief [..., K]; what is None is the config's."""
        cfg = self.cfg
        tau = cfg.planner_temperature if tau is None else tau
        feedback = (cfg.feedback() if feedback is None else feedback) * normal
        horizon = cfg.lookahead_horizon if horizon is None else horizon
        return gate_of(belief, self.planner_transition_logits, feedback, horizon, tau if cfg.carry_posterior else 1.0)

    def commit(self, belief: torch.Tensor, planner_mode: str, forced_state: int | None, tau: float,
               hard_fraction: float) -> torch.Tensor:
        """What a chunk works with, given the log belief [B, K] at its start."""
        if planner_mode == "uniform_mask":
            return torch.full_like(belief, -math.log(belief.shape[1]))
        if planner_mode == "forced_state":
            if forced_state is None or not 0 <= forced_state < belief.shape[1]:
                raise ValueError(f"forced_state = {forced_state}: expected a plan from 0 to {belief.shape[1] - 1}")
            plans = torch.arange(belief.shape[1], device=belief.device)
            return torch.where(plans == forced_state, 0.0, -torch.inf).to(belief.dtype).expand_as(belief)
        if planner_mode != "normal":
            raise ValueError(f"planner_mode = {planner_mode}: expected normal, uniform_mask or forced_state")
        if not hard_fraction:
            return belief
        sample = F.gumbel_softmax(belief.float(), tau, hard=True, dim=1).to(belief.dtype)
        mixed = hard_fraction * sample + (1 - hard_fraction) * belief.exp()
        return (mixed.clamp_min(0) + 1e-9).log()  # a sample's zeros need a floor: gradients pass through them

    # Losses ----------------------------------------------------------------------------------------------------

    def losses(self, input_ids: torch.Tensor, target_ids: torch.Tensor, planner_mode: str = "normal",
               forced_state: int | None = None, terms: tuple | None = None, tau: float | None = None,
               hard_fraction: float = 0.0, rep_window: int | None = None) -> dict[str, torch.Tensor]:
        """nll and the auxiliary terms of this version by their names in nats, and metrics of the planner; scalars.

        Args:
            input_ids, target_ids: [B, L] with target y_t = x_{t+1}.
            terms: which auxiliary terms to compute; default all. rep_window: of rep_unlikelihood, default the config's.
            planner_mode, forced_state, tau, hard_fraction: see filter.
        """
        cfg, h = self.cfg, self.read(input_ids)[0]
        if cfg.version == "baseline":
            return {"nll": -self.look_up(h, target_ids[..., None]).mean()}
        version_terms = V1_TERMS if cfg.version == "v1_filtered_mixture" else V2_TERMS
        terms = version_terms if terms is None else terms
        if strange := set(terms) - set(version_terms):
            raise ValueError(f"{cfg.version} has no term {strange.pop()!r}: it has {', '.join(version_terms)}")
        window = cfg.repetition_window() if rep_window is None else rep_window
        index = [target_ids[..., None]]
        if "chunk_bow" in terms:
            index.append(self.chunk_targets(target_ids))
        if "rep_unlikelihood" in terms and window:
            recent, counts = recent_tokens(input_ids, target_ids, window, cfg.include_current())
            index.append(recent)
        found = self.look_up(h, torch.cat(index, 2))  # [B, L, K, J]
        evidence, found = found[..., 0], found[..., 1:]
        tau = cfg.planner_temperature if tau is None else tau
        beliefs = self.filter(evidence, self.contexts(h), planner_mode, forced_state, tau, hard_fraction)
        values = {"nll": beliefs.nll.mean()}
        usage = beliefs.state.exp().mean((0, 1))
        for term in terms:
            if term in ("belief_entropy", "usage_kl"):
                after = F.log_softmax(beliefs.before + evidence, 2) if planner_mode == "normal" else beliefs.before
                mean = after.exp().mean((0, 1))
                values[term] = entropy(after).mean() if term == "belief_entropy" else kl_to_uniform(mean)
            elif term == "boundary_entropy":
                values[term] = entropy(beliefs.start).mean()
            elif term == "usage_balance":
                values[term] = kl_to_uniform(usage)
            elif term == "chunk_bow":
                values[term] = self.chunk_bow(found[..., : cfg.chunk_size], beliefs.start)
            elif term == "chunk_post_kl":
                values[term] = self.chunk_post_kl(h, beliefs.end)
            elif term == "future_contrastive":
                values[term] = self.future_contrastive(h, beliefs.state)
            elif term == "rep_unlikelihood":
                values[term] = repetition(beliefs.gate, found, counts) if window else torch.zeros_like(values["nll"])
            else:
                values[term] = self.contrast(h, beliefs.before if term == "plan_mi" else None)
        with torch.no_grad():
            chosen = beliefs.state.argmax(2)
            same = (chosen[:, 1:] == chosen[:, :-1]).to(usage)
            values["state_persistence"] = same.mean() if same.numel() else torch.ones_like(usage[0])
            values["expert_utilization"] = entropy(usage.log()) / math.log(max(2, cfg.plans()))
        return values

    def chunk_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """The targets of the chunk that y_t is in, [B, L, C]; version 1, whose chunks begin with y_0. Padded by 0."""
        C, (B, L) = self.cfg.chunk_size, targets.shape
        chunks = F.pad(targets, (0, -L % C)).view(B, -1, 1, C)
        return chunks.expand(-1, -1, C, -1).reshape(B, -1, C)[:, :L]

    def chunk_bow(self, found: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Cross entropy of a chunk's bag of words under sum_k b_start(k) mean_t p_{t,k}; found [B, L, K, C]."""
        C, (B, L, K, _) = self.cfg.chunk_size, found.shape
        size = torch.full((-(-L // C),), float(C), dtype=found.dtype, device=found.device)
        size[-1] = C - -L % C
        valid = (torch.arange(C, device=found.device) < size[:, None]).to(found.dtype)  # [N, C]
        padded = F.pad(found, (0, 0, 0, 0, 0, -L % C), value=-torch.inf).view(B, -1, C, K, C)
        mean = torch.logsumexp(padded, 2) - size[:, None, None].log()  # over t: [B, N, K, C]
        words = torch.logsumexp(start[..., None] + mean, 2)  # [B, N, C]
        return -((words * valid).sum(2) / size).mean()

    def chunk_post_kl(self, h: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Symmetric KL of the recognizer q = softmax(W_q mean h + c_q) and the posterior at the chunk's end."""
        with torch.autocast(h.device.type, enabled=False):
            q = F.log_softmax(self.chunk_post_proj(self.chunk_means(h)), 2)
        return 0.5 * ((q.exp() - end.exp()) * (q - end)).sum(2).mean()

    def future_contrastive(self, h: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """InfoNCE (van den Oord et al. 2018): a chunk's plan tells its own future chunks from those of the batch."""
        with torch.autocast(h.device.type, enabled=False):
            means = self.chunk_means(h)
            n = means.shape[1]
            plan = F.normalize(state[:, :n].exp() @ self.plan_state_emb.weight, dim=2)
            future = F.normalize(self.future_chunk_proj(means), dim=2)
            terms = []
            for d in range(1, min(self.cfg.future_horizon_chunks, n - 1) + 1):
                anchor, positive = plan[:, :-d].flatten(0, 1), future[:, d:].flatten(0, 1)
                scores = anchor @ positive.t() / self.cfg.planner_temperature
                terms.append(F.cross_entropy(scores, torch.arange(len(scores), device=scores.device)))
        return torch.stack(terms).mean() if terms else h.new_zeros(())

    def contrast(self, h: torch.Tensor, log_belief: torch.Tensor | None) -> torch.Tensor:
        """plan_mi (given beliefs) or plan_js_div over tokens; in training over a random share, which is unbiased."""
        h = h.flatten(0, 1)
        log_belief = None if log_belief is None else log_belief.flatten(0, 1)
        if self.training and self.cfg.aux_token_fraction < 1:
            pick = torch.randperm(len(h), device=h.device)[: max(1, round(self.cfg.aux_token_fraction * len(h)))]
            h, log_belief = h[pick], None if log_belief is None else log_belief[pick]
        return plan_contrast(self.experts.rows(h), *self.experts.table(), log_belief, len(h), self.experts.kind)

    def forward(self, input_ids: torch.Tensor, target_ids: torch.Tensor, weights: dict[str, float] | None = None,
                tau: float | None = None, hard_fraction: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(total loss, its terms): nll + sum of weight * term, less for terms that are maximised."""
        weights = self.cfg.weights() if weights is None else weights
        values = self.losses(input_ids, target_ids, terms=tuple(weights), tau=tau, hard_fraction=hard_fraction)
        total = values["nll"]
        for term, weight in weights.items():
            total = total + (-weight if term in MAXIMISED else weight) * values[term]
        return total, {k: v.detach() for k, v in values.items()}

    # Writing ---------------------------------------------------------------------------------------------------

    def prefill(self, ids: torch.Tensor, head_type: torch.dtype | None = None) -> dict:
        """The state after reading ids [B, P], from which `advance` and `predict` go on token by token.

        head_type: of the experts' matrix, which every token reads whole; bfloat16 halves that. Default as it is.
        """
        B, P = ids.shape
        h, memory = self.read(ids)
        weight, bias = self.experts.table()
        head = weight.t().to(head_type or weight.dtype).contiguous(), bias  # transposed, a few rows times it are faster
        state = {"memory": memory, "h": h[:, -1], "count": P, "head": head}
        if self.cfg.version == "baseline":
            return state
        evidence = self.look_up(h[:, :-1], ids[:, 1:, None])[..., 0] if P > 1 else h.new_zeros(B, 0, self.cfg.plans())
        # A last step without evidence: the belief before the token to come, its boundary crossed if it is due.
        found = self.filter(F.pad(evidence, (0, 0, 0, 1)), self.contexts(h))
        state |= {"belief": found.before[:, -1], "start": found.start[:, -1]}
        tail = h[:, (P - 1) // self.cfg.chunk_size * self.cfg.chunk_size :]
        state["sum"] = tail.to(self.planner_init_logits.dtype).sum(1)  # of the chunk being read
        return state

    def predict(self, state: dict, planner_mode: str = "normal", forced_state: int | None = None,
                tau: float | None = None, feedback: float | None = None, horizon: int | None = None):
        """(log p of the next token [B, V], log p_k [B, K, V]) of a state."""
        x, (table, bias) = self.experts.rows(state["h"]), state["head"]
        logs = block_logits(self.experts.kind, x.to(table.dtype), table.t(), bias)
        logs -= logs.amax(2, keepdim=True)
        probs = logs.exp()
        total = probs.sum(2)  # [B, K]
        logs -= total.log()[:, :, None]
        if self.cfg.version == "baseline":
            return logs[:, 0], logs
        belief = self.commit(state["belief"], planner_mode, forced_state, 1.0, 0.0)
        gate = self.gate(belief, planner_mode == "normal", tau, feedback, horizon)
        mixture = ((gate.exp() / total)[:, None] @ probs)[:, 0]
        return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log(), logs

    def advance(self, state: dict, token: torch.Tensor, logs: torch.Tensor, planner_mode: str = "normal",
                forced_state: int | None = None, frozen: bool = False) -> dict:
        """The state after one more token [B]; logs [B, K, V] is what predict said of it. frozen: the belief stays."""
        h, memory = self.read_one(token, state["memory"])
        found = state | {"memory": memory, "h": h, "count": state["count"] + 1}
        if self.cfg.version == "baseline":
            return found
        cfg, start = self.cfg, state["start"]
        belief = self.commit(state["belief"], planner_mode, forced_state, 1.0, 0.0)
        if cfg.token_filtering and planner_mode == "normal" and not frozen:
            evidence = logs.gather(2, token[:, None, None].expand(-1, logs.shape[1], 1))[..., 0]
            belief = F.log_softmax(belief + evidence, 1)
        last = found["count"] - 1  # the index of the token just read
        total = found["h"].to(belief.dtype) + (state["sum"] if last % cfg.chunk_size else 0)
        if (last + self.offset) % cfg.chunk_size == 0 and planner_mode == "normal" and not frozen:
            seen = found["h"] if cfg.version[:2] == "v1" else (total if self.offset else state["sum"]) / cfg.chunk_size
            belief = start = self.cross(belief if cfg.carry_posterior else start, self.context(seen))
        return found | {"belief": belief, "start": start, "sum": total}


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension; 0 log 0 = 0."""
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def kl_to_uniform(p: torch.Tensor) -> torch.Tensor:
    """KL(p || uniform) in nats, p [K]."""
    return math.log(len(p)) - entropy(p.clamp_min(torch.finfo(p.dtype).tiny).log())


def recent_tokens(inputs: torch.Tensor, targets: torch.Tensor, window: int, include_current: bool):
    """(the `window` tokens before y_t [B, L, W], where one counts): each once, not y_t itself, not before the text."""
    B, L = inputs.shape
    lags = torch.arange(window, device=inputs.device) + (0 if include_current else 1)
    place = torch.arange(L, device=inputs.device)[:, None] - lags  # [L, W]
    recent = inputs[:, place.clamp_min(0)]
    repeats = (recent[..., :, None] == recent[..., None, :]).tril(-1).any(3)
    return recent, (place >= 0) & (recent != targets[..., None]) & ~repeats


def repetition(gate: torch.Tensor, found: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Unlikelihood of recent tokens (Welleck et al. 2020): mean over t of the mean -log(1 - p) of those that count.

    gate [B, L, K], found [B, L, K, W] log p_{t,k}, counts [B, L, W].
    """
    p = torch.logsumexp(gate[..., None] + found[..., -counts.shape[2] :], 2).exp().clamp_max(1 - 1e-6)
    each = (-torch.log1p(-p) * counts).sum(2) / counts.sum(2).clamp_min(1)
    some = counts.any(2)
    return (each * some).sum() / some.sum().clamp_min(1)


def build_model(cfg: Config, vocab_size: int | None = None) -> PlannerLM:
    """The model of a config; the vocabulary is cfg.vocab_size unless given. Raises ValueError where neither is."""
    if not (vocab_size or cfg.vocab_size):
        raise ValueError("build_model needs cfg.vocab_size, or the vocabulary of the data")
    return PlannerLM(cfg, vocab_size or cfg.vocab_size)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints of the source, and of ours
# ---------------------------------------------------------------------------------------------------------------
def load_source_checkpoint(source: str | Path | dict, cfg: Config | None = None) -> PlannerLM:
    """A model with the weights of an APEL-R checkpoint, computing as the source does (compat=source).

    Args:
        source: a checkpoint file, what is in it (model_state_dict, model_config, model_version), or a bare state dict,
            whose sizes are read off its tensors and whose other settings come from cfg.
        cfg: settings that the checkpoint does not name.
    Weights that are missing keep their start and unknown ones are left out; both are printed. Weights of compiled
    models are recognised. Raises CheckpointError if the file is no such checkpoint.
    """
    if isinstance(source, (str, Path)):
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as e:  # torch raises a dozen kinds for torn files; each means the same here
            raise checkpoint.CheckpointError(f"{source} is damaged or no checkpoint ({type(e).__name__})") from e
    weights = source.get("model_state_dict", source) if isinstance(source, dict) else None
    weights = {_plain_name(k): v for k, v in weights.items() if isinstance(k, str) and isinstance(v, torch.Tensor)
               } if isinstance(weights, dict) else {}
    if "token_emb.weight" not in weights or weights["token_emb.weight"].ndim != 2:
        raise checkpoint.CheckpointError("this is no APEL-R checkpoint: it has no weights token_emb.weight [V, D]")
    settings = config_dict(cfg or Config()) | _sizes(weights) | {"compat": "source"}
    saved = source.get("model_config") or {} if "model_state_dict" in source else {}
    names = {f.name for f in fields(Config)}
    settings |= {ALIASES.get(k) or k: v for k, v in saved.items() if (ALIASES.get(k) or k) in names}
    if "model_state_dict" in source:
        settings["version"] = source.get("model_version", "v1_filtered_mixture")
    version = settings["version"]
    if version not in ("v1_filtered_mixture", "v2_planner_required"):
        raise checkpoint.CheckpointError(f"a source checkpoint of model version {version!r} cannot be read")
    if version[:2] == "v2" and saved and "lookahead_horizon" not in saved:  # an older v2 than lookahead
        settings |= {"carry_posterior": False, "lookahead_feedback_scale": 0.0}
    if version[:2] == "v1":  # which has neither
        settings |= {"lookahead_feedback_scale": 0.0, "planner_temperature": 1.0}
    model = build_model(Config(**settings)).to(weights["token_emb.weight"].dtype)
    own = model.state_dict()
    names = {f"expert_heads.{k}.{part}": ("experts." + part, k) for k in range(settings["num_plan_states"])
             for part in ("weight", "bias")} if version[:2] == "v2" else {}
    names |= {k.removeprefix("experts."): (k, None) for k in own if version[:2] == "v1" or not k.startswith("experts.")}
    for name, wrong in (("missing", names.keys() - weights.keys()), ("unknown", weights.keys() - names.keys())):
        if wrong:
            print(f"note: {name} weights in the source checkpoint: {', '.join(sorted(wrong))}")
    found = {k: v.clone() for k, v in own.items()}
    for name, (target, head) in names.items():
        if name in weights and head is None:
            found[target] = weights[name]
        elif name in weights:
            if found[target][head].shape != weights[name].shape:
                raise checkpoint.CheckpointError(f"the source checkpoint does not fit its settings: {name}")
            found[target][head] = weights[name]
    try:
        model.load_state_dict({k: v for k, v in found.items() if k in own}, strict=False)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise checkpoint.CheckpointError(f"the source checkpoint does not fit its settings: {reason}") from e
    return model.eval()


def _plain_name(name: str) -> str:
    """Without what torch.compile and DistributedDataParallel put in front."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _sizes(weights: dict[str, torch.Tensor]) -> dict:
    """Settings that the shapes of a source state dict tell."""
    V, token_dim = weights["token_emb.weight"].shape
    found = {"vocab_size": V, "token_dim": token_dim, "backbone": "gru", "dropout": 0.0,
             "num_layers": len({k.rsplit("_", 1)[1] for k in weights if k.startswith("backbone.")}),
             "num_experts": None, "experts": "full",
             "version": "v1_filtered_mixture" if "plan_emb.weight" in weights else "v2_planner_required"}
    for name, setting, axis in (("backbone.weight_hh_l0", "hidden_dim", 1), ("plan_emb.weight", "fusion_dim", 1),
                                ("planner_init_logits", "num_plan_states", 0)):
        found |= {setting: weights[name].shape[axis]} if name in weights else {}
    return found


def is_source_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of the source rather than of this repository."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what is wrong with it is told by whoever reads it
        return False
    return isinstance(state, dict) and "model_state_dict" in state


def load_run(path: Path, device: str = "auto") -> tuple[Config, PlannerLM, int, dict]:
    """(settings, model, steps done, extra state) of a run folder, a checkpoint or a source checkpoint.

    Raises CheckpointError.
    """
    path = Path(path)
    if path.is_file() and is_source_checkpoint(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = load_source_checkpoint(state)
        model.cfg.device = device
        return model.cfg, model, int(state.get("global_step", 0)), {"vocab_size": model.cfg.vocab_size}
    state = checkpoint.load(path / "best.pt" if (path / "best.pt").exists() else path, __file__)
    cfg, extra = from_dict(Config, state["config"], str(path)), state["extra"]
    cfg.device = device
    model = build_model(cfg, extra["vocab_size"])
    model.load_state_dict(state["model"])
    return cfg, model, state["step"], extra


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------
class Written(NamedTuple):
    tokens: torch.Tensor  # prompt and what was written [B, P + n]
    beliefs: torch.Tensor  # of the plan before each token written [B, n, K]
    forecasts: torch.Tensor  # of the plan one chunk ahead, then two ... [B, n, steps, K]


@torch.no_grad()
def generate(model: PlannerLM, prompt: torch.Tensor, tokens: int, generator: torch.Generator,
             temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, repetition_penalty: float = 1.0,
             no_repeat_ngram_size: int = 0, eos_id: int | None = None, forecast_steps: int = 0,
             background: bool = False, frozen: bool = False, head_type: torch.dtype | None = None,
             **planner) -> Written:
    """Go on from prompts [B, P] for at most `tokens` tokens; the state is carried, so a token costs the same anywhere.

    Args:
        repetition_penalty: log of it is taken off the log-probability of every token already in the text.
        no_repeat_ngram_size: no n tokens twice; eos_id: a text that has it is complete, and filled up with it.
        frozen: the belief stays what the prompt made it. planner: see PlannerLM.predict.
        forecast_steps: chunks ahead to forecast the plan; background: by a thread, while the next token is written.
    """
    forecaster = ThreadPoolExecutor(1) if background else None
    model.eval()
    state, found = model.prefill(prompt, head_type), [prompt]
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    seen = torch.zeros(len(prompt), model.token_emb.num_embeddings, dtype=torch.bool, device=prompt.device)
    seen.scatter_(1, prompt, True)
    beliefs, forecasts, planned = [], [], "belief" in state
    history = prompt.tolist()
    mode = {k: planner[k] for k in ("planner_mode", "forced_state") if k in planner}
    for _ in range(tokens):
        log_p, logs = model.predict(state, **planner)
        if planned:
            beliefs.append(model.commit(state["belief"], mode.get("planner_mode", "normal"), mode.get("forced_state"),
                                        1.0, 0.0))
            if forecast_steps:
                task = beliefs[-1], model.planner_transition_logits.detach(), forecast_steps
                forecasts.append(forecaster.submit(look_ahead, *task) if forecaster else look_ahead(*task))
        if repetition_penalty != 1:
            log_p = log_p - seen * math.log(repetition_penalty)
        if temperature != 1:
            log_p = log_p / temperature
        if no_repeat_ngram_size:
            log_p = ban_ngrams(log_p, history, no_repeat_ngram_size)
        chosen = draw(log_p, top_k, top_p, generator)
        if eos_id is not None:
            chosen = torch.where(done, eos_id, chosen)
            done |= chosen == eos_id
        found.append(chosen[:, None])
        if repetition_penalty != 1:
            seen.scatter_(1, chosen[:, None], True)
        if no_repeat_ngram_size:
            for row, token in zip(history, chosen.tolist(), strict=True):
                row.append(token)
        if eos_id is not None and done.all():
            break
        state = model.advance(state, chosen, logs, frozen=frozen, **mode)
    if forecaster:
        forecasts = [task.result() for task in forecasts]
        forecaster.shutdown()
    stack = [torch.stack(parts, 1) if parts else torch.zeros(len(prompt), 0) for parts in (beliefs, forecasts)]
    return Written(torch.cat(found, 1), *stack)


def ban_ngrams(log_p: torch.Tensor, history: list[list[int]], n: int) -> torch.Tensor:
    """-inf for tokens that would repeat n tokens of the text [B, V]; a row with no other choice is left as it is."""
    banned = torch.zeros_like(log_p, dtype=torch.bool)
    for i, row in enumerate(history):
        end = row[len(row) - n + 1 :]
        for j in range(len(row) - n + 1):
            if row[j : j + n - 1] == end:
                banned[i, row[j + n - 1]] = True
    banned &= ~banned.all(1, keepdim=True)
    return log_p.masked_fill(banned, -torch.inf)


def draw(log_p: torch.Tensor, top_k: int | None, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """A token [B] from log weights [B, V], of the top_k likeliest and of the fewest that have a share of top_p.

    The token that crosses top_p is kept. The draw is an exponential race: the largest p over Exp(1) noise.
    """
    if top_k and top_k < log_p.shape[1]:
        log_p = log_p.masked_fill(log_p < log_p.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = log_p.softmax(1).sort(1, descending=True)
        drop = ordered.cumsum(1) - ordered >= top_p
        drop[:, 0] = False
        log_p = log_p.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    noise = torch.empty(log_p.shape, device=generator.device).exponential_(generator=generator).to(log_p.device)
    return (log_p - noise.log_()).argmax(1)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model: PlannerLM, corpus: Corpus, starts: np.ndarray, rt: Runtime, cfg: Config, batch: int = 16) -> dict:
    """Losses on validation windows in nats a token, and what the plan is worth. Collective: ranks share the windows.

    planner_mask_delta_loss: nll with the belief replaced by the uniform one, less nll. plan_gain: nll of the best
    single plan, less nll. On planted data also oracle_nll of the same tokens and plan_nmi, the normalised mutual
    information of the likeliest plan at each chunk's end with the true one.
    """
    K, planned = cfg.plans(), cfg.version != "baseline"
    sums = torch.zeros(2 * K + 4, dtype=torch.float64)  # nll, masked, persistence, count | forced [K] | usage [K]
    plans, mine = [], starts[rt.rank :: rt.world_size]
    model.eval()
    for begin in range(0, len(mine), batch):
        tokens = corpus.windows("val", mine[begin : begin + batch], cfg.seq_len).to(rt.device)
        x, y = tokens[:, :-1], tokens[:, 1:]
        with rt.autocast():
            h, _ = model.read(x)
            evidence = model.look_up(h, y[..., None])[..., 0]  # [B, L, K]
        B = len(x)
        if not planned:
            sums[0] += -evidence.mean((1, 2)).sum().cpu().double()
        else:
            beliefs = model.filter(evidence, model.contexts(h))
            masked = -torch.logsumexp(evidence - math.log(K), 2).mean(1).sum()
            chosen = beliefs.state.argmax(2)
            stays = (chosen[:, 1:] == chosen[:, :-1]).to(masked).mean(1).sum()
            each = torch.stack([beliefs.nll.mean(1).sum(), masked, stays])
            usage = beliefs.state.exp().mean(1).sum(0)
            sums += torch.cat([each, each.new_zeros(1), -evidence.mean(1).sum(0), usage]).cpu().double()
            plans.append(beliefs.end.argmax(2).cpu())
        sums[3] += B
    model.train()
    place = rt.device if rt.device.type == "cuda" else "cpu"
    sums = (rt.mean(sums.to(place)) * rt.world_size).cpu()
    nll, masked, stays, count = (float(v) for v in sums[:4] / sums[3])
    count = float(sums[3])
    found = {"val_nll": nll, "val_ppl": math.exp(min(nll, 700.0))}
    if corpus.meta.get("val_bytes") and corpus.kind == "text":
        found["bits_per_byte"] = nll / math.log(2) * corpus.meta["val_tokens"] / corpus.meta["val_bytes"]
    if planned:
        forced, usage = (sums[4:] / count).view(2, K)
        found |= {"planner_mask_delta_loss": masked - nll, "plan_gain": float(forced.min()) - nll,
                  "state_persistence": stays, "usage": usage.tolist(), "forced_nll": forced.tolist(),
                  "expert_utilization": float(entropy(usage.log())) / math.log(max(2, K))}
        P = model.planner_transition_logits.detach().double().softmax(1).cpu()
        found |= {"transition_mean_diagonal": float(P.diagonal().mean()),
                  "transition_row_entropy": float(entropy(P.log()).mean())}
    if corpus.kind == "planted":
        documents = starts // corpus.meta["document_length"]
        oracle = np.load(corpus.folder / "val_oracle_nll.npy", mmap_mode="r")[documents, : cfg.seq_len]
        found["oracle_nll"] = float(oracle.mean(dtype=np.float64))
        found["excess_over_oracle"] = nll / found["oracle_nll"] - 1
        if planned:
            gathered = rt.gather(torch.cat(plans).tolist() if plans else [])
            ours = np.concatenate([np.array(part) for part in gathered if part])
            order = np.concatenate([documents[r :: rt.world_size] for r in range(rt.world_size)])
            true = np.load(corpus.folder / "val_plans.npy")[order, : ours.shape[1]]
            found["plan_nmi"] = normalised_mutual_information(ours.ravel(), true.ravel())
    return found


def normalised_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """I(a; b) / sqrt(H(a) H(b)) of two labellings, in [0, 1]; 0 where one of them is constant."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    table /= len(a)
    pa, pb = table.sum(1), table.sum(0)

    def H(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    return float((H(pa) + H(pb) - H(table)) / math.sqrt(H(pa) * H(pb))) if H(pa) * H(pb) > 0 else 0.0


@torch.no_grad()
def compare_experts(model: PlannerLM, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Jensen-Shannon divergence of every pair of plans [K, K], mean probability of every token [K, V]), h [T, H]."""
    x, (weight, bias) = model.experts.rows(h), model.experts.table()
    (K, V), each = bias.shape, len(x) // len(h)
    size = max(8, block_rows(model.experts.kind, K, V, h.device) // 4)
    divergence, mean, tiny = bias.new_zeros(K, K), bias.new_zeros(K, V), torch.finfo(bias.dtype).tiny
    for begin in range(0, len(h), size):
        end = min(begin + size, len(h))
        probs = block_logits(model.experts.kind, x[begin * each : end * each].to(bias.dtype), weight, bias).softmax(2)
        mean += probs.sum(0)
        own = entropy(probs.clamp_min(tiny).log())  # [R, K]
        for i in range(K - 1):
            middle = ((probs[:, i + 1 :] + probs[:, i : i + 1]) / 2).clamp_min(tiny)
            divergence[i, i + 1 :] += (entropy(middle.log()) - (own[:, i + 1 :] + own[:, i : i + 1]) / 2).sum(0)
    return (divergence + divergence.t()) / len(h), mean / len(h)


def planner_report(model: PlannerLM, corpus: Corpus, starts: np.ndarray, rt: Runtime, cfg: Config, most: int = 2_048,
                   top: int = 12) -> dict:
    """What planner_eval.json says beyond evaluate(): how far forced plans are apart, and each plan's typical tokens.

    Typical is what a plan predicts more than the plans do on average: the largest p_k(v) log(p_k(v) / mean p(v)).
    """
    windows = max(1, most // cfg.seq_len)
    tokens = corpus.windows("val", starts[:windows], cfg.seq_len).to(rt.device)
    model.eval()
    with torch.no_grad(), rt.autocast():
        h = model.read(tokens[:, :-1])[0].flatten(0, 1).float()
    divergence, mean = compare_experts(model, h)
    model.train()
    K = len(divergence)
    typical = mean * (mean / mean.mean(0)).clamp_min(torch.finfo(mean.dtype).tiny).log()

    def name(token: int) -> str:
        return corpus.tokenizer.decode([token]) if corpus.tokenizer else str(token)

    return {"forced_state_divergence": float(divergence[0, min(1, K - 1)]),
            "forced_state_divergence_all_pairs": float(divergence.sum() / max(1, K * (K - 1))),
            "top_tokens": {str(k): [{"token": name(t), "id": t, "probability": float(mean[k, t])}
                                    for t in mean[k].topk(min(top, mean.shape[1])).indices.tolist()] for k in range(K)},
            "typical_tokens": {str(k): [{"token": name(t), "id": t, "probability": float(mean[k, t])}
                                        for t in typical[k].topk(min(top, mean.shape[1])).indices.tolist()]
                               for k in range(K)}}


# ---------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------
def plot(folder: Path, name: str, draw_on, width: float = 7.0, height: float = 4.5) -> None:
    """Save folder/plots/name.png as drawn by draw_on(axes)."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    draw_on(figure.subplots())
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not: drawn as boxes
        figure.savefig(folder / "plots" / f"{name}.png")


def drawable(text: str) -> str:
    """A token as a label: line ends as an arrow, what cannot be printed as a dot, dollars as dollars."""
    shown = "".join(c if c.isprintable() else "\u21b5" if c == "\n" else "\u00b7" for c in text)
    return shown.replace("$", "\\$") or "\u00b7"


def draw_strip(axes, beliefs: np.ndarray, labels: list[str], boundaries: list[int], title: str, true=()) -> None:
    """Beliefs [L, K] as a heat map over the text; boundaries: where a chunk begins; true: plans of the chunks."""
    image = axes.imshow(beliefs.T, aspect="auto", vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="belief", pad=0.01)
    for column in boundaries:
        axes.axvline(column - 0.5, color="tab:blue", linewidth=0.8)
    for column, plan in zip([0, *(b for b in boundaries if b + 6 < len(beliefs))], true, strict=False):
        axes.text(column, -0.55, f"true plan {plan}", fontsize=7, va="bottom")
    shown = [drawable(text[:12]) for text in labels]
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=6)
    axes.set(yticks=range(beliefs.shape[1]), ylabel="plan")
    axes.set_title(title, fontsize=9, pad=14 if len(true) else 6)


@torch.no_grad()
def plot_run(folder: Path, model: PlannerLM, corpus: Corpus, starts: np.ndarray, found: dict, rt: Runtime, cfg: Config,
             most: int = 96) -> None:
    """Loss over training; and of a planner: usage of the plans, transitions, the belief over a validation passage."""
    history = read_metrics(folder)

    def over_time(axes):
        for split, key, label in (("train", "nll", "training"), ("eval", "val_nll", "validation")):
            line = [(r["step"], r[key]) for r in history if r["split"] == split and key in r]
            if line:
                axes.plot(*zip(*line, strict=True), label=label)
        if "oracle_nll" in found:
            line = [(r["step"], r["oracle_nll"]) for r in history if "oracle_nll" in r]
            axes.plot(*zip(*line, strict=True), "k--", linewidth=0.8, label="exact optimum on the validation windows")
        axes.set(xlabel="step", ylabel="nats a token", title=f"{cfg.version}, {cfg.backbone}")
        axes.legend(fontsize=8)

    plot(folder, "loss", over_time)
    if cfg.version == "baseline":
        return
    K, evals = cfg.plans(), [r for r in history if r["split"] == "eval" and "usage" in r]
    colours = [f"C{k % 10}" for k in range(K)]

    def usage(axes):
        if len(evals) > 1:
            axes.stackplot([r["step"] for r in evals], np.array([r["usage"] for r in evals]).T, colors=colours,
                           labels=[f"plan {k}" for k in range(K)], alpha=0.85)
            axes.set(xlabel="step", ylim=(0, 1), ylabel="mean belief at chunk starts", title="usage of the plans")
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            axes.bar(range(K), found["usage"], color=colours)
            axes.set(xlabel="plan", ylabel="mean belief at chunk starts", title="usage of the plans", xticks=range(K))

    def transitions(axes):
        P = model.planner_transition_logits.softmax(1).float().cpu().numpy()
        image = axes.imshow(P, vmin=0, vmax=1, cmap="magma_r")
        axes.figure.colorbar(image, ax=axes, label="probability")
        if K <= 16:
            for i in range(K):
                for j in range(K):
                    axes.text(j, i, f"{P[i, j]:.2f}", ha="center", va="center", fontsize=7,
                              color="white" if P[i, j] > 0.45 else "black")
        axes.set(xlabel="to plan", ylabel="from plan", xticks=range(K), yticks=range(K),
                 title="transition matrix, without what the text adds")

    plot(folder, "plan_usage", usage)
    plot(folder, "transition_matrix", transitions, 5.5, 4.5)
    tokens = corpus.windows("val", starts[:1], cfg.seq_len).to(rt.device)
    model.eval()
    with rt.autocast():
        h = model.read(tokens[:, :-1])[0]
        evidence = model.look_up(h, tokens[:, 1:, None])[..., 0]
    beliefs = model.filter(evidence, model.contexts(h))
    model.train()
    after = F.softmax(beliefs.before + evidence, 2)[0, :most].float().cpu().numpy()
    ids = tokens[0, 1 : most + 1].tolist()
    labels = [corpus.tokenizer.decode([t]) if corpus.tokenizer else str(t) for t in ids]
    begins = [t for t in range(1, len(ids)) if (t + model.offset) % cfg.chunk_size == 0]
    title, true = "belief after each token of a validation passage (blue: a chunk begins)", ()
    if corpus.kind == "planted":
        true = np.load(corpus.folder / "val_plans.npy")[starts[0] // corpus.meta["document_length"], : len(begins) + 1]
        title += "; which of our plans stands for which true one is arbitrary"
    plot(folder, "belief", lambda axes: draw_strip(axes, after, labels, begins, title, true), max(7.0, 0.13 * len(ids)),
         1.7 + 0.18 * K)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up to lr, then a cosine down to min_lr_ratio * lr at the last step, or lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def commitment(step: int, cfg: Config) -> tuple[float, float]:
    """(tau, hard fraction) of a training step."""
    first = cfg.planner_temperature if cfg.plan_temperature_start is None else cfg.plan_temperature_start
    last = first if cfg.plan_temperature_end is None else cfg.plan_temperature_end
    tau = first + (last - first) * min(1.0, step / max(1, cfg.max_steps - 1))
    if cfg.plan_commitment == "soft" or step < cfg.commitment_warmup_steps:
        return tau, 0.0
    ramp = (step - cfg.commitment_warmup_steps) / cfg.commitment_ramp_steps if cfg.commitment_ramp_steps else 1.0
    return tau, min(1.0, ramp)


def train_step(model: nn.Module, tokens: torch.Tensor, step: int, rt: Runtime, cfg: Config) -> dict[str, torch.Tensor]:
    """Forward and backward over the micro-batches of tokens [B, L + 1]; returns loss and terms, the mean over ranks."""
    weights, (tau, hard_fraction), sums = cfg.weights(step), commitment(step, cfg), {}
    for i, part in enumerate(tokens.chunk(cfg.grad_accum_steps)):
        with rt.sync(model, last=i == cfg.grad_accum_steps - 1):
            with rt.autocast():
                loss, terms = model(part[:, :-1], part[:, 1:], weights, tau, hard_fraction)
            rt.backward(loss / cfg.grad_accum_steps)
        for name, value in ({"loss": loss.detach()} | terms).items():
            sums[name] = sums.get(name, 0) + value.float() / cfg.grad_accum_steps
    means = rt.mean(torch.stack(list(sums.values())))
    return dict(zip(sums, means, strict=True))


def parameter_groups(model: PlannerLM, cfg: Config) -> list[dict]:
    """Matrices decay; biases, norms and the planner's own logits do not. What no term of the loss uses is left out."""
    unused = {"chunk_post_proj": "chunk_post_kl", "plan_state_emb": "future_contrastive",
              "future_chunk_proj": "future_contrastive"}
    terms = cfg.weights()
    if cfg.chunk_bow_weight:
        terms["chunk_bow"] = 1.0
    for name, parameter in model.named_parameters():
        if unused.get(name.split(".")[0], "") not in {"", *terms}:
            parameter.requires_grad_(False)
    used = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in used if p.ndim < 2 or n.endswith(("bias", "_logits"))]
    return [{"params": [p for n, p in used if not any(p is q for q in plain)], "weight_decay": cfg.weight_decay},
            {"params": plain, "weight_decay": 0.0}]


def fitting_batch_size(model: PlannerLM, rt: Runtime, cfg: Config) -> int:
    """What batch_size=auto comes to: on a GPU the largest power of two a micro-step that leaves 15% of it free.

    Probed once, with a forward and a backward pass at doubling sizes; every rank takes the smallest of all.
    """
    parts = rt.world_size * cfg.grad_accum_steps
    if rt.device.type != "cuda":
        return max(1, cfg.cpu_batch_size // parts) * parts
    size, total = 1, torch.cuda.get_device_properties(rt.device).total_memory
    optimizer_bytes = 8 * sum(p.numel() for p in model.parameters())
    while size < 4_096:
        try:
            torch.cuda.reset_peak_memory_stats(rt.device)
            tokens = torch.zeros(2 * size, cfg.seq_len + 1, dtype=torch.int64, device=rt.device)
            with rt.autocast():
                loss, _ = model(tokens[:, :-1], tokens[:, 1:], cfg.weights())
            loss.backward()
            peak = torch.cuda.max_memory_allocated(rt.device) + optimizer_bytes
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if peak > 0.85 * total:
            break
        size *= 2
    return min(rt.gather(size)) * parts


def flops_per_token(model: PlannerLM, cfg: Config) -> float:
    """6 x weights of matrix products + full attention, the convention of PaLM (Chowdhery et al. 2022).

    The head of every plan counts, and the fusion layer of v1 once a plan.
    """
    K = cfg.plans()
    total = sum(p.numel() for n, p in model.backbone.named_parameters() if p.ndim == 2)
    for name, p in model.experts.named_parameters():
        if p.ndim >= 2 and "emb" not in name and "bias" not in name and "plan_proj" not in name:
            total += p.numel() * (K if "out_proj" in name else 1)
    attention = 2 * cfg.num_layers * cfg.seq_len * cfg.hidden_dim if cfg.backbone == "transformer" else 0
    return 6.0 * (total + attention)


def warn_of_idle_plans(found: dict, say) -> None:
    if found["plan_gain"] < 0.01 and found["forced_state_divergence_all_pairs"] > 0.1:
        say(f"warning: the plans differ (divergence {found['forced_state_divergence_all_pairs']:.2f}) but one of them "
            f"does as well alone (plan_gain {found['plan_gain']:.4f}): lower loss_weights.plan_js_div")


def finish(model: PlannerLM, corpus: Corpus, cfg: Config, rt: Runtime, folder: Path, say=print) -> dict:
    """Measure on the validation text: planner_eval.json, metrics.json, pictures; returns the metrics. Collective."""
    starts = validation_windows(corpus, cfg, cfg.final_eval_batches * 16)
    found = evaluate(model, corpus, starts, rt, cfg)
    if rt.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if cfg.version != "baseline":
            report = planner_report(model, corpus, starts, rt, cfg)
            found |= {k: v for k, v in report.items() if k.startswith("forced")}
            write_json(folder / "planner_eval.json", found | report)
            warn_of_idle_plans(found, say)
        write_json(folder / "metrics.json", found)
        plot_run(folder, model, corpus, starts, found, rt, cfg)
    rt.barrier()
    return found


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def first_ids(corpus: Corpus, cfg: Config) -> list[int]:
    """What a sample begins with: the preview's prompt, or what a document begins after."""
    if cfg.preview_prompt and corpus.tokenizer:
        return corpus.tokenizer.encode(cfg.preview_prompt)
    start = next((corpus.meta[k] for k in ("bos_id", "eos_id") if corpus.meta.get(k) is not None and
                  (k == "eos_id" or corpus.kind == "planted")), 0)
    return [start]


def preview(model: PlannerLM, corpus: Corpus, rt: Runtime, cfg: Config) -> str:
    """One sample, the same random numbers every time."""
    prompt = torch.tensor([first_ids(corpus, cfg)], device=rt.device)
    with torch.random.fork_rng(devices=[rt.device] if rt.device.type == "cuda" else []):
        written = generate(model, prompt, cfg.preview_tokens, rt.generator(7, device="cpu"), temperature=0.8, top_k=50)
    model.train()
    ids = written.tokens[0].tolist()
    return repr(corpus.tokenizer.decode(ids)) if corpus.tokenizer else " ".join(map(str, ids))


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises DataError, CheckpointError (bad input, before anything is written) and FloatingPointError (the loss).
    """
    began, folder = time.perf_counter(), checkpoint.local_folder(cfg.out_dir)
    if cfg.resume not in ("auto", "never") and Path(cfg.resume).is_file() and is_source_checkpoint(Path(cfg.resume)):
        cfg.init_from, cfg.resume = cfg.resume, "auto"
    with Runtime(cfg) as rt:
        parts = cfg.grad_accum_steps * rt.world_size
        if cfg.batch_size != "auto" and cfg.batch_size % parts:
            fail(f"batch_size = {cfg.batch_size} must be a multiple of grad_accum_steps * ranks = {parts}")
        corpus = open_data(cfg)
        path, state, changes = checkpoint.start_from(cfg, folder, __file__, lambda old: differences(old, cfg))
        model = build_model(cfg, corpus.vocab_size)
        if cfg.init_from and not state:
            start_from_weights(model, cfg)
        model.to(rt.device)
        if rt.device.type == "cuda" and cfg.backbone == "gru":
            model.backbone.flatten_parameters()
        optimizer = rt.adamw(parameter_groups(model, cfg), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2))
        params = [p for p in model.parameters() if p.requires_grad]
        step, best, totals = 0, math.inf, {}
        if state:
            if state["extra"]["tokenizer_hash"] != corpus.meta["tokenizer_hash"]:
                raise DataError(f"{path} was trained with another tokenizer than {cfg.data} has")
            step, best, extra, _ = checkpoint.restore(rt, state, path, folder, model, optimizer)
            batch_size = extra["batch_size"] if cfg.batch_size == "auto" else cfg.batch_size
        else:
            batch_size = fitting_batch_size(model, rt, cfg) if cfg.batch_size == "auto" else cfg.batch_size
            rt.reseed(rt.rank)
        batches, finite, watch = Batches(rt, corpus, cfg, batch_size), FiniteCheck(rt.device), Stopwatch()
        starts = validation_windows(corpus, cfg, cfg.eval_batches * 16)
        save_interval, tokens_per_step = cfg.save_interval or cfg.eval_interval, batch_size * cfg.seq_len
        trained = rt.wrap(model)

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, cfg.max_steps) as log:
            if rt.is_main:
                checkpoint.clear(folder, after=step)
                if corpus.tokenizer:
                    shutil.copyfile(corpus.folder / "tokenizer.json", folder / "tokenizer.json")
            peak = rt.matmul_rate()
            log.say(rt.describe())
            log.say(describe(model, corpus, cfg, batch_size))
            if state:
                log.say(f"resumed from {path} at step {step}" + "".join(f"\n  {line}" for line in changes))
            lap = step
            watch.start()
            while step < cfg.max_steps:
                tokens = batches(step)  # [B, L + 1]
                lr = learning_rate(step, cfg)
                terms = train_step(trained, tokens, step, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)
                step += 1

                last, stops = step == cfg.max_steps, rt.stopping(step)
                evaluates = last or step % cfg.eval_interval == 0
                logs = evaluates or step % cfg.log_interval == 0
                saves = last or stops or step % save_interval == 0
                finite.add(step, terms["loss"])
                for name, value in terms.items():
                    totals.setdefault(name, []).append(value)
                log.progress(step)
                if not (logs or saves):
                    continue

                finite.verify(step, model, lr)
                rt.synchronize()
                speed = watch.pause((step - lap) * tokens_per_step)
                if logs:
                    means = {name: float(torch.stack(v).mean()) for name, v in totals.items()}  # since the last line
                    totals = {}
                    log.train(step, means | {"lr": lr, "grad_norm": float(norm), "tokens_per_s": speed,
                                             "mfu": speed * flops_per_token(model, cfg) / peak},
                              lr, norm, speed, (cfg.max_steps - step) * tokens_per_step / speed, loss=means["loss"])
                improved = False
                if evaluates:
                    found = evaluate(model, corpus, starts, rt, cfg)
                    improved = found["val_nll"] < best
                    best = min(best, found["val_nll"])
                    log.metrics(step, "eval", found)
                    shown = " | ".join(f"{k} {found[k]:.4f}" for k in SHOWN if k in found)
                    log.say(f"step {step:>6} eval | {shown}" + " *" * improved)
                    if cfg.preview_tokens and rt.is_main:
                        log.say("  " + preview(model, corpus, rt, cfg))
                if saves or improved:
                    extra = {"ended": last, "batch_size": batch_size, "vocab_size": corpus.vocab_size,
                             "tokenizer_hash": corpus.meta["tokenizer_hash"]}
                    saved = checkpoint.capture(rt, __file__, config_dict(cfg), step, model, optimizer, best, extra, {})
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
            result = finish(model, corpus, cfg, rt, folder, log.say)
            summary = result | {"version": cfg.version, "parameters": sum(p.numel() for p in model.parameters()),
                                "steps": step, "seconds": time.perf_counter() - began,
                                "tokens_per_second": watch.units / watch.seconds if watch.seconds else 0.0,
                                "config_hash": config_hash(cfg), "torch": torch.__version__, "device": str(rt.device)}
            log.summary(summary)
            log.say(verdict(result, cfg, folder))
            return summary


SHOWN = ("val_nll", "val_ppl", "plan_gain", "planner_mask_delta_loss", "oracle_nll", "plan_nmi")


def start_from_weights(model: PlannerLM, cfg: Config) -> None:
    """Weights of cfg.init_from; raises CheckpointError where they do not fit."""
    other = load_run(Path(cfg.init_from))[1]
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise checkpoint.CheckpointError(f"{cfg.init_from} does not fit this model: {reason}") from e


def describe(model: PlannerLM, corpus: Corpus, cfg: Config, batch_size: int) -> str:
    lines = [f"{cfg.version}, {cfg.backbone} | {sum(p.numel() for p in model.parameters()):,} parameters | vocabulary "
             f"{corpus.vocab_size:,} | {len(corpus.train):,} training tokens of {corpus.folder}",
             f"{batch_size} x {cfg.seq_len} = {batch_size * cfg.seq_len:,} tokens a step, {cfg.max_steps:,} steps"]
    if cfg.version != "baseline":
        weights = ", ".join(f"{k} {v:g}" for k, v in cfg.weights().items()) or "none"
        lines.append(f"{cfg.plans()} plans, chunks of {cfg.chunk_size}, boundary {cfg.boundary_rule()}, lookahead "
                     f"{cfg.feedback():g} | auxiliary terms: {weights}")
    return "\n".join(lines)


def verdict(found: dict, cfg: Config, folder: Path) -> str:
    """The run in one line."""
    line = f"done: validation nll {found['val_nll']:.4f} nats a token, perplexity {found['val_ppl']:.2f}"
    if "oracle_nll" in found:
        line += f"; exact optimum {found['oracle_nll']:.4f} ({100 * found['excess_over_oracle']:+.2f}%)"
    if "plan_nmi" in found:
        line += f"; plan recovered with nmi {found['plan_nmi']:.3f}"
    if cfg.version != "baseline":
        line += (f"; without the plan {found['planner_mask_delta_loss']:+.4f}, with one plan alone "
                 f"{found['plan_gain']:+.4f}")
    return line + f"; files in {folder}, pictures in {folder / 'plots'}"


def analyze(cfg: Config) -> dict:
    """The final measurements and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = Path(cfg.analyze)
    saved, model, step, extra = load_run(path, cfg.device)
    for name in ("precision", "data", "seq_len", "final_eval_batches"):  # what may differ from the run, if asked to
        if getattr(cfg, name) != getattr(Config(), name):
            setattr(saved, name, getattr(cfg, name))
    with Runtime(saved) as rt:
        corpus = open_data(saved)
        if extra.get("tokenizer_hash", corpus.meta["tokenizer_hash"]) != corpus.meta["tokenizer_hash"]:
            raise DataError(f"{path} was trained with another tokenizer than {saved.data} has")
        folder = path if path.is_dir() else path.parent
        found = finish(model.to(rt.device), corpus, saved, rt, folder)
    print(f"step {step}: " + verdict(found, saved, folder).removeprefix("done: "))
    return found


def main(argv: list[str] | None = None) -> dict:
    cfg = configure(Config, argv, aliases=ALIASES)
    try:
        return analyze(cfg) if cfg.analyze else train(cfg)
    except (DataError, checkpoint.CheckpointError) as e:
        fail(str(e))
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
