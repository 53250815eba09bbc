"""Train a small sequence model on a generalized hidden Markov process and look for its belief states inside.

The process is known exactly, so the loss has an exact floor (the entropy of the next token given the context) and every
context an exact belief (the predictive state, for a hidden Markov model the posterior over hidden states). A model
trained on nothing but next tokens reaches the floor and carries the belief, fractal and all, linearly in its residual
stream (Shai et al. 2024, arXiv:2405.15943).

    python train_ghmm.py                            # Mess3 on two CPU cores, 3 minutes: excess < 0.1%, r2 > 0.99
    python train_ghmm.py config/ghmm_rrxor.py       # RRXOR: its belief geometry is spread over the layers
    python train_ghmm.py --process=tom_quantum --alpha=1 --beta=7.14 --out_dir=out/tom   # any process of --help
    torchrun --nproc_per_node=8 train_ghmm.py config/ghmm_mess3.py
    python train_ghmm.py --analyze=out/ghmm         # the analysis and pictures of any run folder or checkpoint

Dimensions: B batch, L or T tokens, V tokens of the vocabulary, S states, D width, N or P words and prefixes.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import checkpoint
from common.runlog import RunLog, read_metrics
from common.runtime import FiniteCheck, Runtime, Stopwatch
from configurator import config_dict, config_hash, configure, differences, fail, from_dict
from sources.processes import Process, ProcessError, make_process

EXPERIMENT = "ghmm"  # how sample.py treats this page and its copies


@dataclass
class Config:
    # output
    out_dir: str = checkpoint.default_out_dir(__file__)  # run folder
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    analyze: str = ""  # run folder or checkpoint to analyse instead of training
    log_interval: int = 50  # steps between log lines
    eval_interval: int = 250  # steps between evaluations
    save_interval: int = 250  # steps between saves of last.pt (and of best.pt and step_N.pt)
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    wandb: bool = False  # log to Weights & Biases
    tensorboard: bool = False  # log to TensorBoard
    # data
    process: str = "mess3"  # a process by name, nonergodic (see components) or custom (see matrices)
    x: float | None = None  # mess3: probability of moving to each other state
    a: float | None = None  # mess3: probability of emitting the state's own token
    p: float | None = None  # coin, even_ones, no_consecutive_ones, zero_one_random, sns, mr_name
    q: float | None = None  # sns, mr_name
    p1: float | None = None  # rrxor, leaky_rrxor: probability that the first bit is 0
    p2: float | None = None  # rrxor, leaky_rrxor: probability that the second bit is 0
    epsilon: float | None = None  # leaky_rrxor: probability of a jump
    open_probs: list[float] | None = None  # matching_parens: probability of opening at each depth, the first 1
    alpha: float | None = None  # tom_quantum: amplitude; fanizza: angle in radians
    beta: float | None = None  # tom_quantum: amplitude; post_quantum: second growth factor, in (0, 1)
    lamb: float | None = None  # fanizza: decay
    log_alpha: float | None = None  # post_quantum: log of the first growth factor
    components: list[dict] | None = None  # nonergodic: [{"process": NAME, "weight": 1, "vocab_map": [0, 2], ...}, ...]
    matrices: str | list | None = None  # custom: path of an .npy or .npz file, or nested list, [V, S, S]
    initial_state: list[float] | None = None  # where sequences start, [S]; default the stationary state
    add_bos: bool = False  # a token that begins every sequence
    add_eos: bool = False  # a token that ends a sequence with probability eos_prob at every step; then it starts anew
    eos_prob: float = 0.05  # see add_eos
    n_ctx: int = 10  # tokens the model reads
    carry_state: bool = False  # each batch continues the sequences of the one before instead of starting anew
    # model
    model: Literal["transformer", "rnn", "gru", "lstm"] = "transformer"
    n_layers: int = 4
    d_model: int = 64  # width of the residual stream (transformer) or of the hidden state
    n_heads: int = 1  # transformer: attention heads
    d_head: int | None = None  # transformer: width of a head; default d_model / n_heads
    d_mlp: int = 256  # transformer: width of the MLP
    act: Literal["relu", "gelu"] = "relu"  # transformer: nonlinearity of the MLP
    positional: Literal["learned", "rope", "none"] = "learned"  # transformer: positional encoding
    normalization: Literal["LN", "RMS", "none"] = "LN"  # transformer: normalization before each block and at the end
    init_scale: float = 1.0  # factor on all initial weight matrices; below 1 a network learns fewer, cleaner features
    # optimizer
    batch_size: int = 512  # sequences a step, over all ranks and micro-steps
    grad_accum: int = 1  # micro-steps a step
    lr: float = 3e-3  # peak learning rate of AdamW
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    grad_clip: float = 1.0  # largest gradient norm; 0 does not clip
    # schedule
    max_steps: int = 1_500  # optimizer steps
    warmup_steps: int = 100  # linear warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    min_lr: float = 0.0  # what cosine ends at
    # evaluation
    eval_sequences: int = 2_048  # sampled contexts of an evaluation during training
    max_words: int = 60_000  # final evaluation and analysis: all contexts if there are no more, else as many sampled
    last_token_only: bool = False  # analysis: full contexts only, not their prefixes
    # system
    seed: int = 1337
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only

    def head_width(self) -> int:
        return self.d_model // max(1, self.n_heads) if self.d_head is None else self.d_head

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        positive = ("log_interval", "eval_interval", "save_interval", "n_ctx", "n_layers", "d_model", "n_heads",
                    "d_mlp", "batch_size", "grad_accum", "max_steps", "eval_sequences", "max_words")
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in positive if getattr(self, k) < 1]
        negative = ("lr", "weight_decay", "grad_clip", "warmup_steps", "min_lr", "seed")
        wrong += [f"{k} = {getattr(self, k)}: must not be negative" for k in negative if getattr(self, k) < 0]
        wrong += [f"{k} = {getattr(self, k)}: must be finite" for k in negative if getattr(self, k) == math.inf]
        if not 0 < self.init_scale < math.inf:
            wrong.append(f"init_scale = {self.init_scale}: must be positive")
        wrong += [f"{k} = {getattr(self, k)}: must be in [0, 1)" for k in ("adam_beta1", "adam_beta2")
                  if not 0 <= getattr(self, k) < 1]
        if self.d_head is not None and self.d_head < 1:
            wrong.append(f"d_head = {self.d_head}: must be at least 1")
            return wrong
        if self.seed >= 2**63:
            wrong.append(f"seed = {self.seed}: must be below 2**63")
        if self.model == "transformer" and self.d_head is None and self.d_model % max(1, self.n_heads):
            wrong.append(f"d_model = {self.d_model} is no multiple of n_heads = {self.n_heads}: set d_head")
        elif self.model == "transformer" and self.positional == "rope" and self.head_width() % 2:
            wrong.append(f"positional = rope needs an even head width, not {self.head_width()}: set d_head")
        if self.carry_state and (self.initial_state or self.add_bos):
            wrong.append("carry_state continues sequences, so it goes with neither initial_state nor add_bos")
        return wrong


ALIASES = {  # names of the source's command lines and YAML files
    "learning_rate": "lr", "num_train_steps": "max_steps", "num_steps": "max_steps", "sequence_len": "n_ctx",
    "hidden_size": "d_model", "embedding_dim": "d_model", "embedding_size": "d_model", "num_layers": "n_layers",
    "num_heads": "n_heads", "process_name": "process", "act_fn": "act", "normalization_type": "normalization",
    "log_every": "log_interval", "validate_every": "eval_interval", "checkpoint_every": "save_interval",
    "positional_embedding_type": "positional", "mlp_hidden_dim": "d_mlp",
}  # fmt: skip
PROCESS_PARAMS = ("x", "a", "p", "q", "p1", "p2", "epsilon", "open_probs", "alpha", "beta", "lamb", "log_alpha",
                  "components", "matrices")


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------
def build_process(cfg: Config) -> Process:
    """The process a Config asks for; parameters left at None take the process's own defaults."""
    params = {k: getattr(cfg, k) for k in PROCESS_PARAMS if getattr(cfg, k) is not None}
    return make_process(cfg.process, initial_state=cfg.initial_state, add_bos=cfg.add_bos, add_eos=cfg.add_eos,
                        eos_prob=cfg.eos_prob, **params)


def exact_device(rt: Runtime) -> torch.device:
    """Where processes live: beside the model, except that Metal lacks their float64."""
    return torch.device("cpu") if rt.device.type == "mps" else rt.device


class Batches:
    """Fresh sequences at every step, drawn on the device.

    The uniforms of step i are a pure function of (seed, i); rank r turns its share into tokens. Any number of ranks
    thus trains on the same data, and resuming needs no loader state (but `carried`, where sequences go on).
    """

    def __init__(self, rt: Runtime, process: Process, cfg: Config):
        self.rt, self.process, self.cfg, self.carried = rt, process, cfg, None

    def __call__(self, step: int) -> torch.Tensor:
        """This rank's tokens of a step, [B / world_size, n_ctx + 1]."""
        shape = (self.cfg.batch_size, self.cfg.n_ctx + 2)  # one uniform starts a sequence, one more draws each token
        generator = self.rt.generator(step, device=self.process.device)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        tokens, state = self.process.generate(self.rt.share(uniforms).t().contiguous(), self.carried)
        self.carried = state if self.cfg.carry_state else None
        return tokens.to(self.rt.device)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
def build_norm(cfg: Config) -> nn.Module:
    return {"LN": nn.LayerNorm, "RMS": nn.RMSNorm, "none": nn.Identity}[cfg.normalization](cfg.d_model)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) for queries or keys [B, H, T, C], C even."""
    T, C = x.shape[-2:]
    speed = 10_000.0 ** (-torch.arange(0, C, 2, device=x.device) / C)
    angle = torch.arange(T, device=x.device)[:, None] * speed  # [T, C / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.n_heads, self.rope = cfg.n_heads, cfg.positional == "rope"
        self.attention_norm, self.mlp_norm = build_norm(cfg), build_norm(cfg)
        width = cfg.n_heads * cfg.head_width()
        self.qkv, self.attention_out = nn.Linear(cfg.d_model, 3 * width), nn.Linear(width, cfg.d_model)
        self.mlp_in, self.mlp_out = nn.Linear(cfg.d_model, cfg.d_mlp), nn.Linear(cfg.d_mlp, cfg.d_model)
        self.act = {"relu": F.relu_, "gelu": F.gelu}[cfg.act]  # in place: half the memory traffic of the widest tensor

    def forward(self, x: torch.Tensor, B: int) -> torch.Tensor:
        """x [B*T, D] -> [B*T, D]. Rows stay flat: in-place operations on views of 3-D tensors would copy them."""
        qkv = self.qkv(self.attention_norm(x)).view(B, len(x) // B, 3, self.n_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, T, C]
        if self.rope:
            q, k = rotate(q), rotate(k)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(len(x), -1))
        return x + self.mlp_out(self.act(self.mlp_in(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Decoder-only transformer. The activations are the residual stream after the embedding and after every block."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.position = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model)) if cfg.positional == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm, self.unembed = build_norm(cfg), nn.Linear(cfg.d_model, vocab_size)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:  # width^-1/2 keeps the scale; what writes to the stream shrinks with depth
                shrink = (2 * cfg.n_layers) ** -0.5 if name.endswith("_out.weight") else 1.0
                nn.init.normal_(parameter, std=shrink * cfg.d_model**-0.5)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """tokens [B, T] -> logits [B, T, V], activations [n_layers + 1] of [B, T, D]."""
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position[: tokens.shape[1]]
        shape, x = x.shape, x.flatten(0, 1)
        activations = [x]
        for block in self.blocks:
            activations.append(block(activations[-1], shape[0]))
        logits = self.unembed(self.final_norm(activations[-1]))
        return logits.view(*shape[:2], -1), [a.view(shape) for a in activations]


class Recurrent(nn.Module):
    """A stack of rnn, gru or lstm layers. The activations are the embedding and the hidden state of every layer."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        layer = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cfg.model]
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(layer(cfg.d_model, cfg.d_model, batch_first=True) for _ in range(cfg.n_layers))
        self.unembed = nn.Linear(cfg.d_model, vocab_size)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """tokens [B, T] -> logits [B, T, V], activations [n_layers + 1] of [B, T, D]."""
        activations = [self.embed(tokens)]
        for layer in self.layers:
            activations.append(layer(activations[-1])[0])
        return self.unembed(activations[-1]), activations


def build_model(cfg: Config, vocab_size: int) -> nn.Module:
    model = Transformer(cfg, vocab_size) if cfg.model == "transformer" else Recurrent(cfg, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= cfg.init_scale if parameter.ndim == 2 else 1.0
    return model


# ---------------------------------------------------------------------------------------------------------------
# Losses and metrics
# ---------------------------------------------------------------------------------------------------------------
def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats of targets [B, T] under logits [B, T, V]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class MetricTracker:
    """Running training metrics under the source's keys; serves any loop that calls update() after each optimizer step.

    Sums live on the device, so that a step with log=False waits for nothing. With lr the learning rate, g the gradient
    norm and n the tokens of a step: cum/lr_weighted_tokens = sum lr n, cum/gradient_signal = sum lr g n,
    cum/fisher_proxy = sum g^2; loss/ma is over 100 steps, loss/ema decays by 0.9; loss/progress_to_optimal is
    (initial - loss) / (initial - optimal). Losses in nats.

    Args:
        lr_schedule_fn: step -> lr, where the optimizer's first parameter group does not hold it.
    """

    WINDOW, DECAY = 100, 0.9

    def __init__(self, model: nn.Module, optimizer, optimal_loss: float = 0.0, lr_schedule_fn=None):
        self.params, self.optimizer = [p for p in model.parameters() if p.requires_grad], optimizer
        self.optimal_loss, self.lr_schedule_fn = float(optimal_loss), lr_schedule_fn
        self.initial = [p.detach().clone() for p in self.params]
        self.previous = [p.detach().clone() for p in self.params]
        device = self.params[0].device  # Metal has no float64
        zero = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.sums = {k: zero.clone() for k in ("cum/gradient_signal", "cum/fisher_proxy", "params/update_l2_norm/cum")}
        self.tokens, self.lr_weighted_tokens, self.steps, self.initial_loss = 0, 0.0, 0, None
        self.window, self.ema, self.min = zero.repeat(self.WINDOW), zero.clone(), zero + math.inf
        self.lap = (time.perf_counter(), 0)

    def record_initial_loss(self, loss) -> None:
        """The loss before training, from which loss/progress_to_optimal counts; default the first step's."""
        self.initial_loss = float(loss)

    @torch.no_grad()
    def update(self, *, step: int, loss, tokens_in_batch: int, grad_norm=None, log: bool = True,
               costly: bool = True) -> dict:
        """Count a step (of the given loss, in nats); return the metrics if log, with the costly ones if costly too."""
        lr = self.optimizer.param_groups[0]["lr"] if self.lr_schedule_fn is None else float(self.lr_schedule_fn(step))
        loss = torch.as_tensor(loss, dtype=self.ema.dtype, device=self.ema.device).detach()
        norm = _norm([p.grad for p in self.params if p.grad is not None]) if grad_norm is None else grad_norm
        moved = _norm(torch._foreach_sub(self.params, self.previous))
        torch._foreach_copy_(self.previous, self.params)
        self.initial_loss = loss.clone() if self.initial_loss is None else self.initial_loss
        self.tokens += tokens_in_batch
        self.lr_weighted_tokens += lr * tokens_in_batch
        self.sums["cum/gradient_signal"] += lr * tokens_in_batch * norm
        self.sums["cum/fisher_proxy"] += norm**2
        self.sums["params/update_l2_norm/cum"] += moved
        self.window[self.steps % self.WINDOW] = loss
        self.ema = loss.clone() if self.steps == 0 else self.DECAY * self.ema + (1 - self.DECAY) * loss
        self.min = torch.minimum(self.min, loss)
        self.steps += 1
        if not log:
            return {}
        values = {"loss/step": loss, "loss/ema": self.ema, "loss/min": self.min, "grads/l2_norm/step": norm,
                  "loss/ma": self.window[: self.steps].mean(), "params/update_l2_norm/step": moved, **self.sums}
        if costly:
            values["params/l2_norm"] = _norm(self.params)
            values["params/distance_from_init"] = _norm(torch._foreach_sub(self.params, self.initial))
        values = {k: float(v) for k, v in values.items()}
        return {**values, **self._counted(lr, values["loss/step"], tokens_in_batch)}

    def _counted(self, lr: float, loss: float, tokens: int) -> dict:
        (began, done), self.lap = self.lap, (time.perf_counter(), self.tokens)
        initial = float(self.initial_loss)
        gap = initial - self.optimal_loss
        return {"step/tokens": tokens, "cum/tokens": self.tokens, "lr/step": lr,
                "step/tokens_per_second": (self.tokens - done) / max(self.lap[0] - began, 1e-9),
                "cum/lr_weighted_tokens": self.lr_weighted_tokens,
                "loss/progress_to_optimal": (initial - loss) / gap if gap else math.nan}

    def state_dict(self) -> dict:
        """Plain state for a checkpoint; the initial parameters come again from the seed."""
        return {"sums": self.sums, "tokens": self.tokens, "lr_weighted_tokens": self.lr_weighted_tokens,
                "steps": self.steps, "initial_loss": self.initial_loss, "window": self.window, "ema": self.ema,
                "min": self.min}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take up a saved state; call it after the model's own weights are loaded."""
        def own(value):
            return value.to(self.ema.device, copy=True) if isinstance(value, torch.Tensor) else value

        for key, value in state.items():
            setattr(self, key, {k: own(v) for k, v in value.items()} if key == "sums" else own(value))
        torch._foreach_copy_(self.previous, self.params)
        self.lap = (time.perf_counter(), self.tokens)


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """l2 norm of all tensors together."""
    return torch.stack(torch._foreach_norm(tensors)).norm()


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
class Contexts(NamedTuple):
    """Words to evaluate on, in lexicographic order: all there are, or a sample.

    words [N, T]; weights [N] sum to 1; beliefs [N, T, S] after each token; exact: whether all words are there.
    """

    words: torch.Tensor
    weights: torch.Tensor
    beliefs: torch.Tensor
    exact: bool


def all_words(process: Process, length: int, max_words: int):
    """(words [N, length], probabilities [N]) of all possible words, or None if there are more than max_words."""
    words, belief = torch.empty(1, 0, dtype=torch.int64, device=process.device), process.initial_state[None]
    weight = torch.ones_like(belief[:, 0])
    for _ in range(length):
        parent, token, belief, weight = process._children(belief, weight)
        if len(token) > max_words:
            return None
        words = torch.cat([words[parent], token[:, None]], 1)
    return words, weight


def make_contexts(process: Process, length: int, max_words: int, samples: int, seed: int) -> Contexts:
    """All words of the length with their probabilities if there are at most max_words, else distinct sampled ones."""
    found = all_words(process, length, max_words)
    if found is None:
        sampled = process.sample(samples, length, torch.Generator(process.device).manual_seed(seed))
        words, counts = torch.unique(sampled, dim=0, return_counts=True)
        return Contexts(words, counts.double() / samples, process.beliefs(words)[:, 1:], False)
    words, weights = found
    return Contexts(words, weights / weights.sum(), process.beliefs(words)[:, 1:], True)


@torch.no_grad()
def evaluate(model: nn.Module, process: Process, contexts: Contexts, floor: torch.Tensor, rt: Runtime,
             batch: int = 4_096) -> dict:
    """Loss against the floor, by position. Collective: ranks share the contexts.

    The loss is not measured on drawn targets but is floor + KL(optimal || model), its exact mean over the next token:
    an excess of 1e-4 nats shows on a few thousand contexts.
    """
    words, weights, beliefs = rt.share(contexts.words), rt.share(contexts.weights), rt.share(contexts.beliefs)
    divergence = torch.zeros_like(floor, device=process.device)  # [T]
    model.eval()
    for begin in range(0, len(words), batch):
        part = slice(begin, begin + batch)
        optimal = process.next_token_probs(beliefs[part])  # [B, T, V]
        with rt.autocast():
            logits, _ = model(words[part].to(rt.device))
        log_q = F.log_softmax(logits.to(optimal), -1)  # float64: the excess may be tiny
        kl = (torch.xlogy(optimal, optimal) - torch.where(optimal > 0, optimal * log_q, 0)).sum(-1)  # [B, T]
        divergence += weights[part] @ kl
    model.train()
    divergence = rt.mean(divergence).cpu() * rt.world_size
    return {"loss": float((floor + divergence).mean()), "optimal_loss": float(floor.mean()),
            "excess_loss": float(divergence.mean()), "loss_by_position": (floor + divergence).tolist(),
            "optimal_loss_by_position": floor.tolist(), "kl_by_position": divergence.tolist()}


# ---------------------------------------------------------------------------------------------------------------
# Analysis: is the belief in the activations, linearly?
# ---------------------------------------------------------------------------------------------------------------
class Prefixes(NamedTuple):
    """Distinct prefixes: activations by layer, each [P, D]; beliefs [P, S]; weights [P], summing to 1; lengths [P]."""

    activations: dict
    beliefs: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor


def first_occurrences(words: torch.Tensor) -> torch.Tensor:
    """[N, T]: whether the prefix of sorted words [N, T] that ends there occurs for the first time."""
    differs = (words[1:] != words[:-1]).int().cummax(1).values.bool()  # equal prefixes are neighbours
    return torch.cat([torch.ones_like(words[:1]).bool(), differs])


@torch.no_grad()
def collect_prefixes(model: nn.Module, contexts: Contexts, rt: Runtime, last_token_only: bool = False,
                     batch: int = 4_096) -> Prefixes:
    """Activations and beliefs at every distinct prefix of the words, once each, weighted by probability."""
    words, first = contexts.words, first_occurrences(contexts.words)
    group = first.long().cumsum(0) - 1
    weights = torch.zeros_like(contexts.beliefs[..., 0]).scatter_add_(
        0, group, contexts.weights[:, None].expand(group.shape).contiguous())  # [N, T], by group of each position
    if last_token_only:
        first[:, :-1] = False
    model.eval()
    parts = []
    for begin in range(0, len(words), batch):
        rows = slice(begin, begin + batch)
        _, activations = model(words[rows].to(rt.device))
        parts.append([a.to(contexts.beliefs)[first[rows]] for a in activations])
    model.train()
    layers = [torch.cat(layer) for layer in zip(*parts, strict=True)]  # each [P, D]
    names = ["embed"] + [f"layer_{i}" for i in range(1, len(layers))]
    lengths = torch.arange(1, words.shape[1] + 1, device=words.device).expand(first.shape)[first]
    weight = weights.gather(0, group)[first]
    found = dict(zip(names, layers, strict=True)) | {"concat": torch.cat(layers[1:], 1)}
    return Prefixes(found, contexts.beliefs[first], weight / weight.sum(), lengths)


def pca(features: torch.Tensor, weights: torch.Tensor, components: int = 3) -> dict:
    """Weighted principal components of [P, D]: axes, coordinates, explained fractions, how many explain 80%, ..."""
    centred = features - weights @ features
    values, vectors = torch.linalg.eigh((centred * weights[:, None]).t() @ centred)
    explained = values.flip(0).clamp_min(0) / values.clamp_min(0).sum().clamp_min(1e-300)
    total = explained.cumsum(0)
    needed = {f"components_{p}": int((total < p / 100 - 1e-12).sum()) + 1 for p in (80, 90, 95, 99)}
    return {"coordinates": centred @ vectors.flip(1)[:, :components], "axes": vectors.flip(1)[:, :components],
            "explained": explained.tolist(), **needed}


FOLDS = 5
RCONDS = (1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)  # 1 keeps only the mean


def deal(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The fold [P] of each prefix: every five of neighbouring weight go to different folds, at random."""
    rank = weights.argsort(descending=True).argsort() // FOLDS
    fold = torch.empty_like(rank)
    fold[(rank + torch.rand(len(rank), generator=generator, dtype=torch.float64)).argsort()] = torch.arange(len(rank))
    return fold % FOLDS


def belief_regression(features: torch.Tensor, beliefs: torch.Tensor, weights: torch.Tensor, seed: int = 0) -> dict:
    """Weighted least squares of beliefs [P, S] on features [P, D] with an intercept, scored on what it has not seen.

    Prefixes are dealt into five folds of like weight. Three of them fit, a fourth chooses how small a singular value
    counts (rcond), and the fifth is predicted; in turn, so that every prefix is held out once. Of these predictions are
    r2 (the fraction of the variance of all coordinates explained), rmse, mae (means over coordinates) and dist (mean
    Euclidean distance). shuffled_* is the same with beliefs shuffled over prefixes: what mere dimension reproduces.
    *r2_fit is the r2 of a map fitted to all prefixes, and `predicted` [P, S] what that one says.
    """
    if len(features) < FOLDS:
        raise ProcessError(f"{len(features)} prefixes are too few to hold some out: raise n_ctx or max_words")
    generator = torch.Generator().manual_seed(seed)
    fold = deal(weights.cpu(), generator).to(features.device)
    shuffled = beliefs[torch.randperm(len(beliefs), generator=generator).to(beliefs.device)]
    share = weights / weights.sum()
    X, Y = features - share @ features, torch.stack([beliefs, shuffled])  # [P, D], [2, P, S]
    X, means = torch.cat([X, torch.ones_like(X[:, :1])], 1), share @ Y
    root = share.sqrt()[:, None]
    # Triangular factors stand in for the rows of a fold: any union of folds is then a small problem.
    factors = [torch.linalg.qr((X * root)[fold == k]) for k in range(FOLDS)]
    targets = [q.t() @ ((Y - means[:, None]) * root)[:, fold == k] for k, (q, _) in enumerate(factors)]

    def maps(folds: list[int]) -> torch.Tensor:
        """Least-squares maps [rcond, 2, D + 1, S] of these folds."""
        U, s, Vh = torch.linalg.svd(torch.cat([factors[k][1] for k in folds]), full_matrices=False)
        inverse = torch.stack([torch.where((s > rcond * s[0]) & (s > 0), 1 / s, 0) for rcond in RCONDS])
        return Vh.t() @ (inverse[:, None, :, None] * (U.t() @ torch.cat([targets[k] for k in folds], 1)))

    predicted, chosen, both = torch.empty_like(Y), [], torch.arange(2, device=Y.device)
    for held in range(FOLDS):
        judge = (held + 1) % FOLDS
        candidates = maps([k for k in range(FOLDS) if k not in (held, judge)])
        at, of = fold == judge, fold == held
        error = (share[at] @ (X[at] @ candidates + means[:, None] - Y[:, at]).square()).sum(-1)  # [rcond, 2]
        chosen.append(error.argmin(0))
        predicted[:, of] = X[of] @ candidates[chosen[-1], both] + means[:, None]
    typical = torch.stack(chosen).median(0).values  # [2]
    fitted = X @ maps(list(range(FOLDS)))[typical, both] + means[:, None]
    found = {"predicted": fitted[0]}
    for i, name in enumerate(("", "shuffled_")):
        found |= {name + k: v for k, v in regression_metrics(predicted[i], Y[i], weights).items()}
        fit = regression_metrics(fitted[i], Y[i], weights)["r2"]
        found |= {f"{name}rcond": RCONDS[typical[i]], f"{name}r2_fit": fit}
    return found


def regression_metrics(predicted: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> dict:
    """r2, rmse, mae, dist of predictions [P, S], weighted; see belief_regression."""
    w = weights / weights.sum()
    residual, centred = predicted - target, target - w @ target
    variance = float((w @ centred**2).sum())
    return {"r2": 1 - float((w @ residual**2).sum()) / variance if variance > 1e-20 else 0.0,
            "rmse": float((w @ residual**2).sqrt().mean()), "mae": float((w @ residual.abs()).mean()),
            "dist": float(w @ residual.norm(dim=1))}


def analyse(model: nn.Module, process: Process, contexts: Contexts, cfg: Config, rt: Runtime) -> tuple[dict, dict]:
    """Regress beliefs on the activations of every layer and on all of them together.

    Returns (what analysis.json holds, what the pictures need). `untrained_r2_concat` is the same regression on the
    network as initialised: how much of the belief any random features of the context give.
    """
    prefixes = collect_prefixes(model, contexts, rt, cfg.last_token_only)
    layers, predicted = {}, None
    for name, features in prefixes.activations.items():
        found = belief_regression(features, prefixes.beliefs, prefixes.weights, cfg.seed)
        predicted = found.pop("predicted")
        parts = pca(features, prefixes.weights)
        layers[name] = found | {"pca": {k: v for k, v in parts.items() if k not in ("coordinates", "axes")}}
    rt.reseed()
    untrained = collect_prefixes(build_model(cfg, process.vocab_size).to(rt.device), contexts, rt, cfg.last_token_only)
    control = belief_regression(untrained.activations["concat"], untrained.beliefs, untrained.weights, cfg.seed)
    result = {"prefixes": len(prefixes.weights), "all_prefixes": contexts.exact, "layers": layers,
              "r2_concat": layers["concat"]["r2"],
              "r2_by_layer": {k: v["r2"] for k, v in layers.items() if k != "concat"},
              "shuffled_r2_concat": layers["concat"]["shuffled_r2"], "untrained_r2_concat": control["r2"]}
    return result, {"beliefs": prefixes.beliefs.cpu(), "predicted": predicted.cpu(), "weights": prefixes.weights.cpu()}


# ---------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------
def plot(folder: Path, name: str, draw, width: float = 6.0, height: float = 4.0, columns: int = 1) -> None:
    """Save folder/plots/name.png as drawn by draw(axes, figure)."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    draw(figure.subplots(1, columns), figure)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "plots" / f"{name}.png")


def plane(beliefs: torch.Tensor, weights: torch.Tensor):
    """(map of points [P, S] to the plane [P, 2], map to colours [P, 3], whether it is the simplex of three states)."""
    low, high = beliefs.min(0).values, beliefs.max(0).values
    if beliefs.shape[1] == 3 and low.min() > -1e-9 and (beliefs.sum(1) - 1).abs().max() < 1e-6:
        corners = torch.tensor([[0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
        return lambda x: x @ corners, lambda x: x, True
    axes, mean = pca(beliefs, weights)["axes"], weights @ beliefs
    axes = F.pad(axes, (0, max(0, 3 - axes.shape[1])))  # processes of one or two states leave axes empty
    low, high = ((beliefs - mean) @ axes).aminmax(dim=0)
    width = (high - low).clamp_min(1e-9)
    return lambda x: (x - mean) @ axes[:, :2], lambda x: ((x - mean) @ axes - low) / width, False


def plot_simplex(folder: Path, title: str, geometry: dict, r2: float) -> None:
    """True beliefs beside what a linear map reads out of the residual stream, in the colours of the true ones."""
    place, colour, simplex = plane(geometry["beliefs"], geometry["weights"])
    rows = geometry["weights"].argsort()[-60_000:]  # the likeliest prefixes, on top the likeliest of all
    colours = colour(geometry["beliefs"][rows]).clamp(0, 1).numpy()
    size = np.clip(30 * (geometry["weights"][rows] / geometry["weights"].max()).numpy() ** 0.3, 0.3, 30)

    def draw(panels, figure):
        figure.suptitle(title)
        titles = ("beliefs of the process", f"linear image of the activations (held-out r2 = {r2:.4f})")
        for axes, points, text in zip(panels, (geometry["beliefs"], geometry["predicted"]), titles, strict=True):
            x, y = place(points[rows]).t().numpy()
            axes.scatter(x, y, s=size, c=colours, linewidths=0)
            axes.set_title(text, fontsize=10)
            axes.set_aspect("equal" if simplex else "auto")
            if simplex:
                axes.plot([0, 1, 0.5, 0], [0, 0, 0.75**0.5, 0], color="0.6", linewidth=0.8)
                for i, (x, y) in enumerate([(-0.06, -0.04), (1.01, -0.04), (0.47, 0.89)]):
                    axes.text(x, y, f"state {i}", fontsize=8)
                axes.set_axis_off()
            else:
                axes.set_xlabel("first principal component of the beliefs")
                axes.set_ylabel("second")
        if not simplex:
            panels[1].sharex(panels[0])
            panels[1].sharey(panels[0])

    plot(folder, "beliefs", draw, 10, 5, columns=2)


def plot_run(folder: Path, title: str, result: dict, analysis: dict) -> None:
    """Loss by position against the floor, r2 by layer, and excess loss over training (from metrics.jsonl)."""
    layers = [k for k in analysis["layers"] if k != "concat"] + ["concat"]
    history = [(r["step"], r["excess_loss"]) for r in read_metrics(folder) if r["split"] == "eval"]

    def by_position(axes, figure):
        positions = range(1, len(result["loss_by_position"]) + 1)
        axes.plot(positions, result["optimal_loss_by_position"], "k--", label="floor: entropy given the context")
        axes.plot(positions, result["loss_by_position"], "o-", markersize=4, label="model")
        axes.set(xlabel="tokens read", ylabel="loss of the next token (nats)")
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend()

    def by_layer(axes, figure):
        bars = axes.bar(layers, [max(0.0, analysis["layers"][k]["r2"]) for k in layers])
        axes.bar_label(bars, [f"{analysis['layers'][k]['r2']:.4f}" for k in layers], fontsize=8)
        axes.axhline(analysis["untrained_r2_concat"], color="0.4", linestyle="--", label="concat, untrained network")
        shuffled = max(0.0, analysis["shuffled_r2_concat"])
        axes.axhline(shuffled, color="0.4", linestyle=":", label="concat, shuffled beliefs")
        axes.set(ylabel="held-out r2 of the belief", ylim=(0, 1.12))
        axes.set_title(title, fontsize=9, wrap=True)
        axes.legend(loc="lower right", fontsize=8)

    def over_time(axes, figure):
        axes.semilogy(*zip(*history, strict=True), "o-", markersize=3)
        axes.set(xlabel="step", ylabel="excess over the floor (nats)")
        axes.set_title(title, fontsize=9, wrap=True)

    plot(folder, "loss_by_position", by_position)
    plot(folder, "r2_by_layer", by_layer, width=max(6, 1.2 * len(layers)))
    if history:
        plot(folder, "excess_loss", over_time)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up to lr, then constant or a cosine down to min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def final_contexts(process: Process, cfg: Config) -> Contexts:
    """The contexts of the final evaluation and analysis. Raises ProcessError if they are too few for an analysis."""
    contexts = make_contexts(process, cfg.n_ctx, cfg.max_words, cfg.max_words // 3 + 1, cfg.seed + 1)
    first = first_occurrences(contexts.words)
    count = int(first[:, -1].sum() if cfg.last_token_only else first.sum())
    if count < FOLDS:
        raise ProcessError(f"{process.name}: {count} different contexts are too few to hold some out: raise n_ctx or "
                           "max_words, or analyse prefixes too (last_token_only=false)")
    return contexts


def finish(model: nn.Module, process: Process, contexts: Contexts, floor: torch.Tensor, cfg: Config, rt: Runtime,
           folder: Path, title: str) -> dict:
    """Final evaluation, analysis.json and pictures; returns the metrics of summary.json. Collective."""
    result = evaluate(model, process, contexts, floor, rt)
    if rt.is_main:
        analysis, geometry = analyse(model, process, contexts, cfg, rt)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "analysis.json").write_text(json.dumps(analysis | {"evaluation": result}, indent=2) + "\n")
        plot_simplex(folder, title, geometry, analysis["r2_concat"])
        plot_run(folder, title, result, analysis)
        result |= {k: analysis[k] for k in ("r2_concat", "r2_by_layer", "shuffled_r2_concat", "untrained_r2_concat")}
        result["exact"] = contexts.exact
    rt.barrier()
    return result


def describe(process: Process, model: nn.Module, floor: torch.Tensor, error: float, cfg: Config) -> str:
    size = sum(p.numel() for p in model.parameters())
    return (f"process {process.name}: {process.vocab_size} tokens, {process.num_states} states | {cfg.model}: {size:,} "
            f"parameters | {cfg.batch_size * cfg.n_ctx:,} tokens a step | {cfg.out_dir}\n"
            f"floor {floor.mean():.6f} nats a token " + (f"+- {error:.1e}" if error else "(exact)"))


def train_step(model: nn.Module, tokens: torch.Tensor, rt: Runtime, cfg: Config) -> torch.Tensor:
    """Forward and backward over the micro-batches of tokens [B, T + 1]; returns the mean loss over ranks."""
    total = torch.zeros((), device=rt.device)
    for i, part in enumerate(tokens.chunk(cfg.grad_accum)):
        with rt.sync(model, last=i == cfg.grad_accum - 1):
            with rt.autocast():
                logits, _ = model(part[:, :-1])
                loss = next_token_loss(logits, part[:, 1:]) / cfg.grad_accum
            rt.backward(loss)
        total += loss.detach()
    return rt.mean(total)


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises ProcessError, CheckpointError (bad input, before anything is written) and FloatingPointError (the loss).
    """
    began, folder = time.perf_counter(), checkpoint.local_folder(cfg.out_dir)
    with Runtime(cfg) as rt:
        if cfg.batch_size % (cfg.grad_accum * rt.world_size):
            fail(f"batch_size = {cfg.batch_size} must be a multiple of grad_accum * ranks = "
                 f"{cfg.grad_accum * rt.world_size}")
        process = build_process(cfg)
        entropies = process.entropies(cfg.n_ctx)[1:]
        floor = torch.tensor(entropies, dtype=torch.float64)  # [T], nats
        process.to(exact_device(rt))
        model = build_model(cfg, process.vocab_size).to(rt.device)
        params = list(model.parameters())
        optimizer = rt.adamw(params, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay)
        tracker = MetricTracker(model, optimizer, float(floor.mean()))
        batches, finite, watch = Batches(rt, process, cfg), FiniteCheck(rt.device), Stopwatch()
        contexts = make_contexts(process, cfg.n_ctx, cfg.eval_sequences, cfg.eval_sequences, cfg.seed)
        final = final_contexts(process, cfg)

        path, state, changes = checkpoint.start_from(cfg, folder, __file__, lambda old: differences(old, cfg))
        step, best = 0, math.inf
        if state:
            step, best, extra, mine = checkpoint.restore(rt, state, path, folder, model, optimizer)
            tracker.load_state_dict(extra["tracker"])
            batches.carried = mine.get("carried")
        trained = rt.wrap(model)
        tokens_per_step = cfg.batch_size * cfg.n_ctx

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, cfg.max_steps) as log:
            if rt.is_main:
                checkpoint.clear(folder, after=step)
            log.say(rt.describe())
            log.say(describe(process, model, floor, max(e.error for e in entropies), cfg))
            if state:
                log.say(f"resumed from {path} at step {step}" + "".join(f"\n  {line}" for line in changes))
            else:
                tracker.record_initial_loss(evaluate(model, process, contexts, floor, rt)["loss"])
            lap = step
            watch.start()
            while step < cfg.max_steps:
                tokens = batches(step)  # [B, T + 1]
                lr = learning_rate(step, cfg)
                loss = train_step(trained, tokens, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)
                step += 1

                last, stops = step == cfg.max_steps, rt.stopping(step)
                evaluates = last or step % cfg.eval_interval == 0
                logs = evaluates or step % cfg.log_interval == 0
                saves = last or stops or step % cfg.save_interval == 0
                finite.add(step, loss)
                metrics = tracker.update(step=step, loss=loss, tokens_in_batch=tokens_per_step, grad_norm=norm,
                                         log=logs, costly=evaluates)
                log.progress(step)
                if not (logs or saves):
                    continue

                finite.verify(step, model, lr)
                rt.synchronize()
                speed = watch.pause((step - lap) * tokens_per_step)
                if logs:
                    log.train(step, metrics, lr, norm, speed, left=(cfg.max_steps - step) * tokens_per_step / speed,
                              loss=metrics["loss/ema"], floor=float(floor.mean()))
                improved = False
                if evaluates:
                    result = evaluate(model, process, contexts, floor, rt)
                    improved, best = result["loss"] < best, min(best, result["loss"])
                    log.metrics(step, "eval", result)
                    log.say(f"step {step:>6} eval | loss {result['loss']:.6f} | excess {result['excess_loss']:.6f} "
                            f"nats ({percent(result)})" + " *" * improved)
                if saves or improved:
                    saved = checkpoint.capture(rt, __file__, config_dict(cfg), step, model, optimizer, best,
                                               {"tracker": tracker.state_dict()}, {"carried": batches.carried})
                    if rt.is_main:
                        checkpoint.save(saved, folder, improved, cfg.keep_last != 0, cfg.keep_last)
                if stops and not last:
                    log.say(f"stopped by a signal after step {step}; the same command goes on from there")
                    return {"stopped_at": step}
                lap = step
                watch.start()

            result = finish(model, process, final, floor, cfg, rt, folder, f"{process.name}, {cfg.model}, {step} steps")
            summary = result | {"steps": step, "seconds": time.perf_counter() - began,
                                "tokens_per_second": watch.units / watch.seconds if watch.seconds else 0.0,
                                "config_hash": config_hash(cfg), "torch": torch.__version__, "device": str(rt.device)}
            log.summary(summary)
            if rt.is_main:
                log.say(f"done: loss {result['loss']:.5f} is {percent(result)} above the floor, and the activations "
                        f"hold the belief with held-out r2 {result['r2_concat']:.4f}; pictures in {folder / 'plots'}")
            return summary


def percent(result: dict) -> str:
    """Excess loss relative to the floor."""
    return f"{result['excess_loss'] / max(result['optimal_loss'], 1e-9):.3%}"


def load_run(path: Path, device: str = "auto") -> tuple[Config, Process, nn.Module, int]:
    """(settings, process, model, steps done) of a run folder or checkpoint, on the CPU; the settings name `device`.

    Raises CheckpointError for a missing, damaged or foreign file.
    """
    state = checkpoint.load(path, __file__)
    cfg = from_dict(Config, state["config"], str(path))
    cfg.device = device
    process = build_process(cfg)
    model = build_model(cfg, process.vocab_size)
    model.load_state_dict(state["model"])
    return cfg, process, model, state["step"]


def analyze(cfg: Config) -> dict:
    """The final evaluation, analysis and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = Path(cfg.analyze)
    folder = path if path.is_dir() else path.parent
    saved, process, model, step = load_run(path, cfg.device)
    for name in ("precision", "max_words", "last_token_only"):  # what may differ from the run, if asked to
        if getattr(cfg, name) != getattr(Config(), name):
            setattr(saved, name, getattr(cfg, name))
    with Runtime(saved) as rt:
        floor = process.optimal_loss(saved.n_ctx)
        title = f"{process.name}, {saved.model}, {step} steps"
        contexts = final_contexts(process.to(exact_device(rt)), saved)
        result = finish(model.to(rt.device), process, contexts, floor, saved, rt, folder, title)
    print(f"step {step}: loss {result['loss']:.6f}, floor {result['optimal_loss']:.6f}, excess "
          f"{result['excess_loss']:.6f} nats, r2_concat {result['r2_concat']:.4f}; see {folder / 'analysis.json'}")
    return result


def main(argv: list[str] | None = None) -> dict:
    cfg = configure(Config, argv, aliases=ALIASES)
    try:
        return analyze(cfg) if cfg.analyze else train(cfg)
    except (ProcessError, checkpoint.CheckpointError) as e:
        fail(str(e))
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
