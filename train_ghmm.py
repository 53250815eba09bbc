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

import difflib
import inspect
import json
import math
import sys
import time
import zipfile
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


@dataclass
class Config:
    # output
    out_dir: str = "out/ghmm"  # run folder
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
class ProcessError(ValueError):
    """A process that was asked for cannot exist; the message says why and what is allowed."""


def _probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ProcessError(f"{name} = {value:g} is no probability: use a value in [0, 1]")


def coin(p: float = 0.5) -> np.ndarray:
    """A biased coin: emits 0 with probability p. One state."""
    _probabilities(p=p)
    return np.array([[[p]], [[1 - p]]])


def even_ones(p: float = 0.5) -> np.ndarray:
    """The even process: runs of ones have even length. Two states."""
    _probabilities(p=p)
    return np.array([[[1 - p, 0], [0, 0]], [[0, p], [1, 0]]])


def no_consecutive_ones(p: float = 0.5) -> np.ndarray:
    """The golden-mean process: a one is followed by a zero. Two states."""
    _probabilities(p=p)
    return np.array([[[1 - p, 0], [1, 0]], [[0, p], [0, 0]]])


def zero_one_random(p: float = 0.5) -> np.ndarray:
    """0, 1, then a random bit (1 with probability p), over and over; the phase is hidden. Three states."""
    _probabilities(p=p)
    return np.array([[[0, 1, 0], [0, 0, 0], [1 - p, 0, 0]], [[0, 0, 0], [0, 0, 1], [p, 0, 0]]])


def sns(p: float = 0.5, q: float = 0.5) -> np.ndarray:
    """The simple nonunifilar source: two states, infinitely many beliefs (Crutchfield 1994)."""
    _probabilities(p=p, q=q)
    return np.array([[[1 - p, p], [0, 1 - q]], [[0, 0], [q, 0]]])


def mess3(x: float = 0.05, a: float = 0.85) -> np.ndarray:
    """Mess3 (Marzen and Crutchfield 2017): three states, and beliefs that form a fractal in the simplex."""
    _probabilities(a=a)
    if not 0 <= x <= 0.5:
        raise ProcessError(f"x = {x:g} leaves a negative probability of staying, 1 - 2x: use a value in [0, 0.5]")
    move = np.where(np.eye(3), 1 - 2 * x, x)  # [from, to]
    emit = np.where(np.eye(3), a, (1 - a) / 2)  # [token, to]
    return emit[:, None, :] * move


def rrxor(p1: float = 0.5, p2: float = 0.5) -> np.ndarray:
    """Two random bits, then their exclusive or. States S, 0, 1, T, F."""
    _probabilities(p1=p1, p2=p2)
    T = np.zeros((2, 5, 5))
    T[0, 0, 1], T[1, 0, 2] = p1, 1 - p1
    T[0, 1, 4], T[1, 1, 3] = p2, 1 - p2
    T[0, 2, 3], T[1, 2, 4] = p2, 1 - p2
    T[1, 3, 0] = T[0, 4, 0] = 1
    return T


def leaky_rrxor(p1: float = 0.5, p2: float = 0.5, epsilon: float = 0.1) -> np.ndarray:
    """rrxor that jumps, with probability epsilon, to any state under any token."""
    _probabilities(epsilon=epsilon)
    return (1 - epsilon) * rrxor(p1, p2) + epsilon / 10


def matching_parens(open_probs: list = (1.0, 0.5, 0.4)) -> np.ndarray:
    """Nested parentheses: 0 opens with probability open_probs[depth], 1 closes. States are depths."""
    open_probs = [float(p) for p in open_probs]
    if open_probs and open_probs[-1] != 0:
        open_probs = [*open_probs, 0.0]
    if len(open_probs) < 2 or open_probs[0] != 1:
        raise ProcessError(f"open_probs = {open_probs}: at depth 0 one can only open, so it must start with 1")
    _probabilities(**{f"open_probs[{i}]": p for i, p in enumerate(open_probs)})
    p = np.array(open_probs)
    return np.stack([np.diag(p[:-1], 1), np.diag(1 - p[1:], -1)])


def mr_name(p: float = 0.4, q: float = 0.25) -> np.ndarray:
    """Tokens Mr., Something, Blah, name; the state is the last token."""
    _probabilities(p=p, q=q, **{"1 - p - q": 1 - p - q})
    s = 1 - p - q
    chain = np.array([[0, 0, 0, 1], [q, s, p, 0], [q, p, s, 0], [0, 0.5, 0.5, 0]])  # [from, to]
    return np.eye(4)[:, None, :] * chain


def days_of_week() -> np.ndarray:
    """Tokens M Tu W Th F Sa Su Tmrw Yest Wknd Wkdy; the state is the day the last token spoke of."""
    T = np.zeros((11, 7, 7))
    for day in range(7):
        for named in range(7):
            T[named, day, named] = 5 if named == (day + 1) % 7 else 1
        T[7, day, (day + 1) % 7] = T[8, day, (day - 1) % 7] = 1
        T[9, day, 5:], T[10, day, :5] = 1 / 2, 1 / 5
    return T / T.sum((0, 2))[:, None]


def tom_quantum(alpha: float = 1.0, beta: float = 7.14) -> np.ndarray:
    """Tom's quantum process: a qubit seen through four outcomes; no finite hidden Markov model generates it."""
    if not alpha**2 + beta**2 > 0:
        raise ProcessError("alpha and beta are both 0: one of them must not be")
    g = 1 / (4 * (alpha**2 + beta**2))
    d, m, o = 1 / 4, (alpha**2 - beta**2) * g, 2 * alpha * beta * g
    return np.array([
        [[d, 0, o], [0, m, 0], [o, 0, d]], [[d, 0, -o], [0, m, 0], [-o, 0, d]],
        [[d, o, 0], [o, d, 0], [0, 0, m]], [[d, -o, 0], [-o, d, 0], [0, 0, m]],
    ])  # fmt: skip


def fanizza(alpha: float = 2000.0, lamb: float = 0.49) -> np.ndarray:
    """The process of Fanizza et al. (2024) that four real dimensions generate and no finite hidden Markov model."""
    if not 0 < lamb < 1:
        raise ProcessError(f"lamb = {lamb:g}: use a value in (0, 1); up to 0.5 all words have non-negative weight")
    c, s = math.cos(alpha), math.sin(alpha)
    det = 1 - 2 * lamb * c + lamb**2
    A, B = (1 - lamb * c + lamb * s) / det, (1 - lamb * c - lamb * s) / det
    pi0 = np.array([1 - (2 / (1 - lamb) - A - B) / 4, 1 / (2 * (1 - lamb)), -A / 4, -B / 4])
    w = np.array([1, 1 - lamb, 1 + lamb * (s - c), 1 - lamb * (s + c)])
    T1 = np.zeros((4, 4))
    T1[1, 1], T1[2:, 2:] = 1, [[c, -s], [s, c]]
    return np.stack([np.outer(w, pi0), lamb * T1])


def post_quantum(log_alpha: float = 1.0, beta: float = 0.5) -> np.ndarray:
    """A process beyond quantum theory: three real dimensions, no finite-dimensional quantum model (Fanizza 2024)."""
    if not (log_alpha > 0 and 0 < beta < 1):
        raise ProcessError(f"log_alpha = {log_alpha:g}, beta = {beta:g}: needs log_alpha > 0 and 0 < beta < 1")
    alpha, ratio = math.exp(log_alpha), log_alpha / math.log(beta)
    if abs(alpha + beta - 2) < 1e-12 or abs(ratio - round(ratio)) < 1e-12:
        raise ProcessError(f"log_alpha = {log_alpha:g}, beta = {beta:g}: needs exp(log_alpha) + beta != 2 and "
                           "log_alpha / log(beta) no integer")
    M = [np.array([[v, 0, 0], [0, 1, 0], [0, math.log(v), 1]]) for v in (alpha, beta)]
    return np.stack([np.outer([1, 1, 0], [1, -1, -1]), *M])


PROCESSES = {f.__name__: f for f in (
    coin, even_ones, no_consecutive_ones, zero_one_random, sns, mess3, rrxor, leaky_rrxor, matching_parens, mr_name,
    days_of_week, tom_quantum, fanizza, post_quantum,
)}  # fmt: skip


class Estimate(float):
    """A number with `error`: 0 where it is exact, else a standard error or (for brackets) a half width, in nats."""

    error: float

    def __new__(cls, value: float, error: float = 0.0):
        self = super().__new__(cls, value)
        self.error = float(error)
        return self


class MixedState(NamedTuple):
    """A node of the mixed-state tree: a word, its probability and the belief [S] after it."""

    word: tuple
    probability: float
    belief: torch.Tensor


IMPOSSIBLE = 1e-13  # a conditional probability below this is rounding of an exact 0


class Process:
    """A stack T[x][i, j] = weight of "emit token x and go to j, from i", in row-vector convention.

    The stack is scaled so that M = sum_x T[x] has principal eigenvalue 1, with right eigenvector r (summing to S)
    and left eigenvector pi (summing to 1). The belief after a word w is v T[w1] ... T[wL], scaled to belief . r = 1;
    the probability of the next token x is then belief T[x] r (Upper 1997; Jaeger 2000). With T >= 0 and r = 1 this is
    a hidden Markov model, and a belief is the posterior over its S states.

    Args:
        matrices: [V, S, S], weights.
        initial_state: [S], where sequences start; default the stationary state.
        eigenvector, stationary: r and pi where the caller knows them (a mixture has no unique ones).
    Raises:
        ProcessError: if the stack is no process: wrong shape, not finite, no positive principal eigenvalue, several
            stationary states and no initial_state, or a word of negative weight.
    """

    def __init__(self, matrices, initial_state=None, eigenvector=None, stationary=None, name: str = "custom"):
        T = np.asarray(matrices, dtype=np.float64)
        if T.ndim != 3 or T.shape[1] != T.shape[2] or 0 in T.shape:
            raise ProcessError(f"{name}: matrices have shape {list(T.shape)}; expected [V, S, S]")
        if not np.isfinite(T).all():
            raise ProcessError(f"{name}: matrices hold NaN or infinite weights")
        self.name, self.vocab_size, self.num_states = name, T.shape[0], T.shape[1]
        start = None if initial_state is None else np.asarray(initial_state, dtype=np.float64)
        if start is not None and (start.shape != (self.num_states,) or not np.isfinite(start).all()):
            raise ProcessError(f"{name}: initial_state must be {self.num_states} numbers, finite and one a state")
        T, r, pi = _normalize(T, name, start) if eigenvector is None else (T, eigenvector, stationary)
        r, pi = np.asarray(r, dtype=np.float64), np.asarray(pi, dtype=np.float64)
        start = pi if start is None else start
        if not start @ r > 0:
            raise ProcessError(f"{name}: initial_state must have positive weight")
        self.is_hmm = bool((T >= 0).all() and np.allclose(r, 1, atol=1e-9))
        if self.is_hmm and (start < 0).any():
            raise ProcessError(f"{name}: initial_state holds a negative probability")
        self.transition_matrices, self.normalizing_eigenvector = torch.from_numpy(T.copy()), torch.from_numpy(r.copy())
        self.stationary_state, self.initial_state = torch.from_numpy(pi.copy()), torch.from_numpy(start / (start @ r))
        self._tables()
        if not self.is_hmm:
            self._check_words()

    def _tables(self) -> None:
        """What sampling and filtering look up, derived from the stack (see `generate` and `_filter`)."""
        T, r, S = self.transition_matrices, self.normalizing_eigenvector, self.num_states
        emit = T @ r  # [V, S] weight of a token from a state
        self._step = torch.cat([emit.cumsum(0), T.transpose(1, 2).reshape(-1, S)])  # [V + V*S, S] acting on columns
        if self.is_hmm:
            joint = T.permute(1, 0, 2).reshape(S, -1)  # [S, V*S] probability of (token, next state)
            state, outcome = joint.nonzero(as_tuple=True)
            edges = (joint / joint.sum(1, keepdim=True)).cumsum(1)[state, outcome]
            last = torch.cat([state[1:] != state[:-1], torch.ones(1, dtype=torch.bool, device=state.device)])
            # State s owns [2s, 2s + 1.5): the slack keeps u + 2s, rounded up, out of the next state's interval.
            self._edges = torch.where(last, 1.5, edges) + 2 * state
            self._edge_token, self._edge_next = outcome // S, outcome % S
            self._edge_offset = 2.0 * self._edge_next
            self._start_edges = (self.initial_state.cumsum(0) / self.initial_state.sum())[:-1].contiguous()

    def to(self, device) -> "Process":
        """Move to a device, in place."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    @property
    def device(self) -> torch.device:
        return self.transition_matrices.device

    # Sampling --------------------------------------------------------------------------------------------------

    def sample(self, batch: int, length: int, generator: torch.Generator | None = None, return_states: bool = False):
        """Draw tokens [batch, length] (int64); with return_states also the hidden path [batch, length + 1].

        Raises ProcessError if states are asked of a process that is no hidden Markov model.
        """
        if return_states and not self.is_hmm:
            raise ProcessError(f"{self.name} has no hidden path: its weights are no probabilities of states")
        uniforms = torch.rand(length + 1, batch, generator=generator, dtype=torch.float64, device=self.device)
        return self.generate(uniforms, whole_path=True) if return_states else self.generate(uniforms)[0]

    def generate(self, uniforms: torch.Tensor, start: torch.Tensor | None = None, whole_path: bool = False):
        """Turn uniforms [L + 1, B] into tokens [B, L], by inverting the distribution function at every step.

        Row 0 draws the starting state, unless `start` continues an earlier call. Returns the tokens and what to
        continue from: a hidden Markov model's last states [B] (or whole path, [B, L + 1]), else the beliefs [B, S].
        """
        length, batch = uniforms.shape[0] - 1, uniforms.shape[1]
        if not self.is_hmm:
            return self._generate_by_belief(uniforms[1:], start)
        if start is None:
            start = torch.searchsorted(self._start_edges, uniforms[0], right=True)
        chosen = torch.empty(length, batch, dtype=torch.int64, device=self.device)
        offset = 2.0 * start
        for t in range(length):  # one search among all (state, outcome) intervals: the hot loop, three kernels a token
            torch.searchsorted(self._edges, uniforms[t + 1] + offset, right=True, out=chosen[t])
            offset = self._edge_offset[chosen[t]]
        path = torch.cat([start[None], self._edge_next[chosen]]).t() if whole_path else (0.5 * offset).long()
        return self._edge_token[chosen].t().contiguous(), path

    def _generate_by_belief(self, uniforms: torch.Tensor, start: torch.Tensor | None):
        """Sampling where only the belief is known: GHMM states are no random variables."""
        (length, batch), V, S = uniforms.shape, self.vocab_size, self.num_states
        belief = (self.initial_state[:, None].expand(S, batch) if start is None else start.t()).contiguous()  # [S, B]
        tokens = torch.empty(length, batch, dtype=torch.int64, device=self.device)
        for t in range(length):
            step = self._step @ belief  # [V + V*S, B]: running sums over tokens, then all successors
            token = (uniforms[t] * step[V - 1] >= step[: V - 1]).sum(0)
            belief = step[V:].view(V, S, batch).gather(0, token.expand(1, S, batch))[0] / step[V - 1]
            tokens[t] = token
        belief = belief / (self.normalizing_eigenvector @ belief)  # each division lagged a step; the last is still due
        return tokens.t().contiguous(), belief.t()

    # Filtering -------------------------------------------------------------------------------------------------

    def _filter(self, tokens: torch.Tensor, start: torch.Tensor | None = None):
        """Beliefs [L + 1, S, B] and p(token | before) [L, B] of tokens [B, L], time first for contiguous rows.

        After an impossible token both are meaningless. Beliefs are rescaled every 16 tokens only: float64 holds the
        product of 16 conditional probabilities.
        """
        tokens = self._checked(tokens)
        (batch, length), V, S = tokens.shape, self.vocab_size, self.num_states
        columns, successors = tokens.t().contiguous(), self._step[V:]
        beliefs = torch.empty(length + 1, S, batch, dtype=torch.float64, device=self.device)
        beliefs[0] = self.initial_state[:, None] if start is None else start.t()
        probs = torch.empty(length, batch, dtype=torch.float64, device=self.device)
        for begin in range(0, length, 16):
            block = slice(begin, min(begin + 16, length))
            for t in range(block.start, block.stop):
                following = (successors @ beliefs[t]).view(V, S, batch)
                torch.gather(following, 0, columns[t].expand(1, S, batch), out=beliefs[t + 1][None])
            weights = self.normalizing_eigenvector @ beliefs[begin : block.stop + 1]  # [t, B]
            torch.div(weights[1:], weights[:-1], out=probs[block])
            beliefs[begin + 1 : block.stop + 1] /= weights[1:, None]
        return beliefs, probs

    def _checked(self, tokens) -> torch.Tensor:
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        if tokens.ndim != 2:
            raise ProcessError(f"tokens have shape {list(tokens.shape)}; expected [B, L]")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ProcessError(f"tokens of {self.name} are 0..{self.vocab_size - 1}; "
                               f"got {int(tokens.min())}..{int(tokens.max())}")
        return tokens

    def beliefs(self, tokens) -> torch.Tensor:
        """Predictive state before each token and after the last, [B, L + 1, S], for tokens [B, L].

        Raises ProcessError for a word of probability 0, naming the first token that cannot be.
        """
        beliefs, probs = self._filter(tokens)
        if not (probs > IMPOSSIBLE).all():
            t, b = (~(probs > IMPOSSIBLE)).nonzero()[0].tolist()
            word = self._checked(tokens)[b, : t + 1].tolist()
            raise ProcessError(f"token {word[-1]} at position {t} of sequence {b} is impossible under {self.name} "
                               f"after {word[max(0, t - 8):-1]}: no belief follows it")
        return beliefs.permute(2, 0, 1)

    def log_prob(self, tokens) -> torch.Tensor:
        """log p(token | tokens before it) in nats, [B, L]; -inf from the first impossible token on."""
        possible = (probs := self._filter(tokens)[1]) > IMPOSSIBLE
        if not possible.all():  # nothing follows an impossible word, whatever 0/0 gave
            probs = torch.where(possible.long().cumprod(0).bool(), probs, 0)
        return probs.log().t()

    def word_probability(self, word) -> float:
        """Probability that a sequence from the initial state begins with the word."""
        word = [int(x) for x in word]
        return math.exp(self.log_prob([word]).sum()) if word else 1.0

    def next_token_probs(self, belief) -> torch.Tensor:
        """p(next token | belief), [..., V] for beliefs [..., S]."""
        belief = torch.as_tensor(belief, dtype=torch.float64, device=self.device)
        return (belief @ (self.transition_matrices @ self.normalizing_eigenvector).t()).clamp_min(0)

    # Entropies -------------------------------------------------------------------------------------------------

    def _children(self, belief: torch.Tensor, weight: torch.Tensor):
        """All possible one-token continuations of beliefs [N, S]: (parent, token, belief, weight), parent-major."""
        joint = torch.einsum("ns,vsj->nvj", belief, self.transition_matrices)
        prob = joint @ self.normalizing_eigenvector  # [N, V]
        parent, token = (prob > IMPOSSIBLE).nonzero(as_tuple=True)
        prob = prob[parent, token]
        return parent, token, joint[parent, token] / prob[:, None], weight[parent] * prob

    def _levels(self, depth: int, max_nodes: int, belief: torch.Tensor | None = None, weight=None):
        """Yield (beliefs [N, S], weights [N]) of all words of length 0, 1, ..., depth, equal beliefs merged.

        Starts from the initial state unless told otherwise; stops early where a level could exceed max_nodes.
        """
        belief = self.initial_state[None] if belief is None else belief
        weight = torch.ones_like(belief[:, 0]) if weight is None else weight
        for length in range(depth + 1):
            yield belief, weight
            if length == depth or len(belief) * self.vocab_size > max_nodes:
                return
            belief, weight = _merge(*self._children(belief, weight)[2:])

    def _entropy(self, belief: torch.Tensor) -> torch.Tensor:
        """Entropy in nats of the next token, [...] for beliefs [..., S]."""
        return torch.special.entr(self.next_token_probs(belief)).sum(-1)

    def entropies(self, length: int, max_nodes: int = 300_000, samples: int = 20_000, seed: int = 0) -> list[Estimate]:
        """H(next token | the first l tokens) for l = 0..length: exact while enumeration fits in max_nodes.

        Beyond that, the mean over sampled words of the entropy of the exact prediction, with its standard error.
        """
        found = [Estimate(float(w @ self._entropy(b))) for b, w in self._levels(length, max_nodes)]
        if len(found) <= length:
            generator = torch.Generator(self.device).manual_seed(seed)
            beliefs, _ = self._filter(self.sample(samples, length, generator))
            entropy = self._entropy(beliefs[len(found) :].transpose(1, 2))  # [l, samples]
            found += map(Estimate, entropy.mean(1).tolist(), (entropy.std(1) / samples**0.5).tolist())
        return found

    def myopic_entropy(self, length: int, max_nodes: int = 300_000) -> Estimate:
        """H(next token | first `length` tokens) in nats; `.error` is 0 if exact, else a standard error."""
        return self.entropies(length, max_nodes)[-1]

    def optimal_loss(self, length: int, max_nodes: int = 300_000) -> torch.Tensor:
        """[length]: the least loss a model can have at each position, having read 1, 2, ..., length tokens."""
        return torch.tensor(self.entropies(length, max_nodes)[1:], dtype=torch.float64)

    def entropy_rate(self, max_nodes: int = 100_000, samples: int = 2_000, length: int = 1_000) -> Estimate:
        """Entropy per token in the limit, in nats, with an error.

        Finitely many beliefs: the average over the chain of beliefs, exact. A hidden Markov model otherwise: halfway
        between H(next | L tokens), which bounds it from above, and H(next | first state, L tokens), from below (Cover
        and Thomas, theorem 4.5.1), with half the gap as error. Failing both, Monte Carlo and its standard error.
        """
        chain = self._belief_chain()
        if chain is not None:
            beliefs, transitions = chain
            return Estimate(_limit(transitions)[0] @ self._entropy(beliefs))
        if self.is_hmm:
            pi = self.initial_state @ _limit(self.transition_matrices.sum(0))  # a mixture keeps its start's weights
            bounds = zip(self._levels(200, max_nodes, pi[None]),
                         self._levels(200, max_nodes, torch.eye(self.num_states).to(pi), pi), strict=False)
            for level in bounds:
                upper, lower = (float(w @ self._entropy(b)) for b, w in level)
                if upper - lower < 1e-12:
                    break
            if upper - lower < 1e-3:
                return Estimate((upper + lower) / 2, max(0.0, upper - lower) / 2)
        tokens = self.sample(samples, length, torch.Generator(self.device).manual_seed(0))
        entropy = self._entropy(self._filter(tokens)[0][length // 2 :].transpose(1, 2)).mean(0)  # [samples]
        return Estimate(entropy.mean(), entropy.std() / samples**0.5)

    def _belief_chain(self, max_beliefs: int = 1_000):
        """The Markov chain of beliefs, (beliefs [N, S], transitions [N, N]), from the initial one; None if large."""
        beliefs, edges, new = self.initial_state[None], [], slice(0, 1)
        while new.start < new.stop:
            parent, _, child, prob = self._children(beliefs[new], torch.ones_like(beliefs[new, 0]))
            keys, ids = torch.unique(_keys(torch.cat([beliefs, child])), return_inverse=True)
            size = len(beliefs)
            number = torch.full_like(keys, -1)
            number[ids[:size]] = torch.arange(size, device=self.device)
            unseen, where = torch.unique(ids[size:][number[ids[size:]] < 0], return_inverse=True)
            number[unseen] = torch.arange(size, size + len(unseen), device=self.device)
            edges.append((parent + new.start, number[ids[size:]], prob))
            fresh = torch.empty(len(unseen), self.num_states).to(beliefs)
            fresh[where] = child[edges[-1][1] >= size]
            beliefs, new = torch.cat([beliefs, fresh]), slice(size, size + len(fresh))
            if len(beliefs) > max_beliefs:
                return None
        source, target, prob = (torch.cat(column) for column in zip(*edges, strict=True))
        transitions = torch.zeros(len(beliefs), len(beliefs)).to(beliefs)
        return beliefs, transitions.index_put_((source, target), prob, accumulate=True)

    def mixed_state_tree(self, depth: int, min_prob: float = 0.0, order: str = "breadth") -> list[MixedState]:
        """Every word of up to `depth` tokens whose probability is at least min_prob (and not 0), with its belief.

        order: "breadth" lists short words first, "depth" lists each word directly before its continuations.
        """
        if order not in ("breadth", "depth"):
            raise ProcessError(f"order = {order!r}: use 'breadth' or 'depth'")
        words, belief = [()], self.initial_state[None]
        weight, nodes = torch.ones_like(belief[:, 0]), []
        for length in range(depth + 1):
            nodes += map(MixedState, words, weight.tolist(), belief)
            if length < depth:
                parent, token, belief, weight = self._children(belief, weight)
                keep = weight >= min_prob
                belief, weight = belief[keep], weight[keep]
                words = [(*words[p], x) for p, x in zip(parent[keep].tolist(), token[keep].tolist(), strict=True)]
        return nodes if order == "breadth" else sorted(nodes, key=lambda node: node.word)

    def _check_words(self, depth: int = 24, beam: int = 4_000) -> None:
        """Look for a word of negative weight: all short words, then the beam of those nearest to having one."""
        emit = (self.transition_matrices @ self.normalizing_eigenvector).t()  # [S, V]
        belief, words = self.initial_state[None], torch.empty(1, 0, dtype=torch.int64)
        for _ in range(depth):
            prob = belief @ emit  # [N, V]
            if prob.min() < -1e-9:
                n, token = divmod(int(prob.argmin()), self.vocab_size)
                raise ProcessError(f"{self.name} is no process: after {words[n].tolist()} the token {token} has the "
                                   f"negative weight {prob.min():.3g}")
            parent, token, belief, _ = self._children(belief, torch.ones_like(belief[:, 0]))
            _, first = _unique(belief)
            first = first[(belief[first] @ emit).min(1).values.argsort()[:beam]]
            belief, words = belief[first], torch.cat([words[parent[first]], token[first, None]], 1)


def _keys(belief: torch.Tensor) -> torch.Tensor:
    """[N] int64 hashes of beliefs [N, S]; beliefs that agree to about 1e-10 have the same one."""
    odd = torch.from_numpy(np.random.default_rng(0).integers(2**62, size=belief.shape[1]) * 2 + 1).to(belief.device)
    return ((belief * 1e10).round().long() * odd).sum(1)


def _unique(belief: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(group of each belief [N], one member of each group [G])."""
    _, group = torch.unique(_keys(belief), return_inverse=True)
    member = torch.empty(int(group.max()) + 1, dtype=torch.int64, device=belief.device)
    return group, member.scatter_(0, group, torch.arange(len(group), device=belief.device))


def _merge(belief: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equal beliefs [N, S] become one, their weights [N] add up."""
    group, member = _unique(belief)
    return belief[member], torch.zeros_like(weight[: len(member)]).index_add_(0, group, weight)


def _limit(chain):
    """lim (I + P)^n / 2^n of a stochastic matrix P [N, N]: row i is where a chain from i is found in the long run."""
    P = torch.as_tensor(chain)
    P = (torch.eye(len(P)).to(P) + P) / 2  # lazy, hence aperiodic: the limit exists and is P's time average
    for _ in range(60):
        P = P @ P
        P = P / P.sum(1, keepdim=True)
    return P


def _normalize(T: np.ndarray, name: str, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale a stack to principal eigenvalue 1; return it with its right and left eigenvectors r and pi."""
    M = T.sum(0)
    values, right = np.linalg.eig(M)
    real = np.where(np.abs(values.imag) < 1e-9, values.real, -np.inf)
    top = int(real.argmax())
    if not real[top] > 1e-12 or np.abs(values).max() > real[top] * (1 + 1e-7):
        raise ProcessError(f"{name} is no process: sum_x T[x] has the eigenvalues {np.round(values, 4).tolist()}; "
                           "the one of largest modulus must be real and positive")
    T, M = T / real[top], M / real[top]
    if (np.abs(values / real[top] - 1) < 1e-8).sum() > 1:  # several ergodic components
        if start is None or not ((T >= 0).all() and np.allclose(M.sum(1), 1)):
            raise ProcessError(f"{name} has several stationary states: say where it starts with initial_state, "
                               "or build it as process='nonergodic' from components")
        pi = start @ _limit(M).numpy()
        return T, np.ones(len(M)), pi / pi.sum()
    r = right[:, top].real
    left_values, left = np.linalg.eig(M.T)
    pi = left[:, int(np.abs(left_values - 1).argmin())].real
    if abs(r.sum()) < 1e-12 or abs(pi.sum()) < 1e-12 or abs(pi @ r) < 1e-12:
        raise ProcessError(f"{name} is no process: its stationary state has no weight")
    return T, r * len(r) / r.sum(), pi / pi.sum()


def make_process(name: str = "mess3", *, initial_state=None, add_bos: bool = False, add_eos: bool = False,
                 eos_prob: float = 0.05, **params) -> Process:
    """Build a process by name.

    name: one of PROCESSES with its parameters; "custom" with matrices=PATH (.npy, .npz) or a nested list [V, S, S];
        "nonergodic" with components=[{"process": NAME, "weight": 1, "vocab_map": [token, ...], ...params}, ...].
    initial_state: [S], where sequences start instead of the stationary state.
    add_eos: a token V that ends the sequence with probability eos_prob at every step, after which it starts anew.
    add_bos: a further token that begins each sequence. Both are part of the stack, so everything stays exact.
    Raises ProcessError, naming the allowed range or the known processes.
    """
    try:
        if name == "nonergodic":
            process = _mixture(initial_state=initial_state, **_only(name, params, "components"))
        elif name == "custom":
            process = Process(_read_matrices(**_only(name, params, "matrices")), initial_state)
        elif name in PROCESSES:
            params = _only(name, params, *inspect.signature(PROCESSES[name]).parameters)
            process = Process(PROCESSES[name](**params), initial_state, name=name)
        else:
            near = difflib.get_close_matches(str(name), [*PROCESSES, "nonergodic", "custom"], n=1)
            raise ProcessError(f"unknown process {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
                               + f" Known: {', '.join(PROCESSES)}, nonergodic, custom")
    except ProcessError:
        raise
    except (TypeError, ValueError, OverflowError) as e:  # a parameter of another type, or far out of range
        given = {**params, "initial_state": initial_state} if initial_state is not None else params
        raise ProcessError(f"process {name} cannot be built from {given}: {e}") from e
    return _framed(process, add_bos, eos_prob if add_eos else 0.0) if add_bos or add_eos else process


def _only(name: str, params: dict, *allowed: str) -> dict:
    for key in params:
        if key not in allowed:
            raise ProcessError(f"process {name} has no parameter {key!r}: it takes {', '.join(allowed) or 'none'}")
    return params


def _read_matrices(matrices=None) -> np.ndarray:
    """A stack [V, S, S] from a nested list or from an .npy or .npz file (the only array in it, or `matrices`)."""
    if matrices is None or (isinstance(matrices, str) and not matrices):
        raise ProcessError("process custom needs matrices: a nested list [V, S, S] or the path of an .npy or .npz file")
    try:
        if not isinstance(matrices, (str, Path)):
            return np.asarray(matrices, dtype=np.float64)
        data = np.load(matrices, allow_pickle=False)
        if isinstance(data, np.lib.npyio.NpzFile):
            names = data.files
            data = data["matrices" if "matrices" in names or len(names) != 1 else names[0]]
        if not np.isrealobj(data):
            raise ValueError("the numbers are complex")
        return np.asarray(data, dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        source = matrices if isinstance(matrices, (str, Path)) else "the nested list"
        raise ProcessError(f"cannot read matrices from {source}: {e}; expected numbers of shape [V, S, S]") from e


def _mixture(components: list | None = None, initial_state=None) -> Process:
    """A process that draws one of its components once and stays in it: block-diagonal, not ergodic."""
    if not components:
        raise ProcessError("process nonergodic needs components: a list of {'process': NAME, 'weight': 1, ...}")
    parts, maps, weights = [], [], []
    for i, component in enumerate(components):
        if not isinstance(component, dict) or "process" not in component:
            raise ProcessError(f"components[{i}] = {component!r}: expected {{'process': NAME, ...}}")
        spec = dict(component)
        weights.append(spec.pop("weight", 1.0))
        vocab_map = spec.pop("vocab_map", None)
        parts.append(make_process(spec.pop("process"), **spec))
        maps.append(list(range(parts[-1].vocab_size)) if vocab_map is None else list(vocab_map))
        if len(set(maps[-1])) != parts[-1].vocab_size or not all(isinstance(x, int) and x >= 0 for x in maps[-1]):
            raise ProcessError(f"components[{i}]: vocab_map = {maps[-1]} needs {parts[-1].vocab_size} distinct tokens")
        if not weights[-1] > 0:
            raise ProcessError(f"components[{i}]: weight = {weights[-1]} must be positive")
    S, V = sum(p.num_states for p in parts), 1 + max(max(m) for m in maps)
    T, start, pi, at = np.zeros((V, S, S)), np.zeros(S), np.zeros(S), 0
    for part, vocab_map, weight in zip(parts, maps, np.array(weights) / sum(weights), strict=True):
        block = slice(at, at := at + part.num_states)
        T[vocab_map, block, block] = part.transition_matrices.numpy()
        start[block] = weight * part.initial_state.numpy()
        pi[block] = weight * (part.stationary_state / (part.stationary_state @ part.normalizing_eigenvector)).numpy()
    r = np.concatenate([p.normalizing_eigenvector.numpy() for p in parts])
    name = "nonergodic(" + " + ".join(p.name for p in parts) + ")"
    return Process(T, start if initial_state is None else initial_state, r, pi / pi.sum(), name)


def _framed(process: Process, add_bos: bool, eos_prob: float) -> Process:
    """The process with tokens for the end (V) and the beginning (the last one) of a sequence.

    EOS turns weight v T[x] into (1 - e) v T[x] and adds e (v . r) times the start, which leaves r the eigenvector.
    """
    _probabilities(eos_prob=eos_prob)
    V, S = process.vocab_size, process.num_states
    r, start = process.normalizing_eigenvector.numpy(), process.initial_state.numpy()
    T = np.zeros((V + (eos_prob > 0) + add_bos, S + add_bos, S + add_bos))
    T[:V, :S, :S] = (1 - eos_prob) * process.transition_matrices.numpy()
    begin = np.append(start, 0.0) if add_bos else start
    if add_bos:
        T[-1, S, :S], begin, r = start, np.eye(S + 1)[S], np.append(r, 1.0)
    if eos_prob > 0:
        T[V, :S] = eos_prob * np.outer(r[:S], begin)
        M = T.sum(0)
        pi = np.linalg.lstsq(np.vstack([M.T - np.eye(len(M)), r]), np.eye(len(M) + 1)[-1], rcond=None)[0]
    else:
        pi = np.append(process.stationary_state.numpy(), 0.0)
    return Process(T, begin, r, pi / pi.sum(), process.name)


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

        path, state, changes = checkpoint.start_from(cfg, folder, "ghmm", __file__, lambda old: differences(old, cfg))
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
                optimizer.param_groups[0]["lr"] = lr = learning_rate(step, cfg)
                loss = train_step(trained, tokens, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip)
                step += 1

                last, stops = step == cfg.max_steps, rt.stopping(step)
                evaluates = last or step % cfg.eval_interval == 0
                logs = evaluates or step % cfg.log_interval == 0
                saves = last or stops or step % cfg.save_interval == 0
                finite.add(step, loss)
                metrics = tracker.update(step=step, loss=loss, tokens_in_batch=tokens_per_step, grad_norm=norm,
                                         log=logs, costly=evaluates)
                optimizer.zero_grad(set_to_none=True)
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
                    saved = checkpoint.capture(rt, "ghmm", config_dict(cfg), step, model, optimizer, best,
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
    state = checkpoint.load(path, "ghmm")
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
