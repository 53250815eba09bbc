"""Train a language model that keeps a belief over a latent plan, and see what the plan is worth.

Text is written in chunks of C tokens. Each chunk follows one of K discrete plans, nobody says which; plans follow one
another as a Markov chain whose steps may depend on the text so far. The model holds the exact posterior of the plan
(Bayes' rule at every token, the chain at every boundary), in training as in generation. Because the filter is exact,
the loss is a likelihood, and on planted data both loss and plan have a known optimum to be held against.

    python train_apelr.py                             # offline English text, v2, 2 minutes on two cores
    python train_apelr.py --compare_baseline          # and first a baseline of equal size, on the same batches
    python train_apelr.py config/planted.py           # a known plan: loss and plan recovered, 3 minutes
    python train_apelr.py config/v2_fast.py           # TinyStories on one GPU, after prepare_data.py text
    torchrun --nproc_per_node=8 train_apelr.py config/v2_fast.py
    python train_apelr.py theirs.yaml                 # a file of APEL-R: what it leaves out has the defaults of there
    python sample.py out/apelr --prompt="The" --sweep_states

Versions: v1_filtered_mixture (one head fed by state and plan), v2_planner_required (K expert heads, no shared one),
baseline (one softmax). Dimensions: B batch, L tokens, V vocabulary, H hidden, K plans, C chunk, N chunks, T = B * L
rows, J tokens looked up a row. x_t is read, y_t = x_{t+1} predicted; log b is a belief, always in log space, natural
logarithms. A forward filter over chunks is Rabiner (1989); with transitions that depend on inputs it is the
input-output HMM of Bengio & Frasconi (1995).
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import DataError, clear_errors, rehearsal  # isort: skip

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import checkpoint, store
from common.runlog import RunLog, ended_before, first_line, run_facts, say_again
from common.runtime import Meter, Runtime, learning_rate
from common.telling import bar
from configurator import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Probability,
    Share,
    Whole,
    config_dict,
    config_hash,
    configure,
    differences,
    take_over,
)
from kernels.log_probs import log_probs, shared_log_probs
from kernels.plan_contrast import plan_divergence, plan_information, some_rows
from kernels.token_terms import check_terms, chunk_bow, chunk_targets, recent_tokens, repetition
from measure import compare_baseline, plans
from measure.pages import run_page
from measure.plans import entropy, kl_to_uniform
from measure.speed import fitting_batch_size, flops_per_token, matmul_rate
from measure.writing import preview
from sources.corpus import Corpus, read_corpus
from sources.foreign import APELR
from sources.foreign_apelr import ALIASES
from sources.foreign_apelr_start import converted, go_on, opened, put_in, start_from, to_go_on
from sources.foreign_checkpoints import checkpoint_in
from sources.foreign_plans import commit_source, cross_source, start_as_source
from sources.foreign_transformer import TransformerLM, plain_head
from sources.prepared import check_prepared
from sources.shared import make_once
from sources.text import prepare_text

EXPERIMENT = "apelr"  # what sample.py treats a run as; a copy of this page keeps it
# Of summary.json, said at the end.
HEADLINES = ("val_ppl", "oracle_nll", "plan_gain", "planner_mask_delta_loss", "plan_nmi", "seconds")
OFFLINE = "data/text"  # made when it is missing
V1_TERMS = ("belief_entropy", "usage_kl", "chunk_bow", "plan_mi", "chunk_post_kl")
V2_TERMS = ("boundary_entropy", "usage_balance", "future_contrastive", "plan_js_div", "rep_unlikelihood")
MAXIMISED = ("plan_mi", "plan_js_div")
DEMO_WEIGHTS = {"usage_balance": 0.02, "future_contrastive": 0.02}  # of v2, where loss_weights is not given
HEAD_GAIN = 4.0  # of the heads' start: at 1 the loss after 400 steps is 0.2 nats higher (lab book)


@dataclass
class Config:
    # output
    out_dir: str = checkpoint.default_out_dir(__file__)  # run folder
    s3_config: str = ""  # .ini of a bucket that out_dir is copied to, see docs/runs.md
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint,
    # ^ ours or the source's
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    compare_baseline: bool = False  # first train a baseline of equal size on the same batches, in out_dir/baseline
    init_from: str = ""  # weights to start from, with their sizes: a checkpoint of this repository or of the source
    analyze: str = ""  # run folder or checkpoint to measure again instead of training
    out: str = ""  # with analyze: folder of what is written; default analysis/ of the run
    # data
    data: str = OFFLINE  # folder of train.bin, val.bin and meta.json, by prepare_data.py text or planted
    prepare: dict | None = None  # settings of prepare_data.py text that must have made it; checked at the start
    seq_len: Count = 128  # tokens predicted in a window, L
    # model
    version: Literal["v1_filtered_mixture", "v2_planner_required", "baseline", "transformer_lm"] = "v2_planner_required"
    backbone: Literal["transformer_lm"] | Literal["gru", "transformer"] = "gru"  # transformer_lm: the source's,
    # ^ with learned positions; version=transformer_lm is baseline with it
    n_layers: Count = 2
    d_model: Count = 128  # H
    n_heads: Count = 4  # of a transformer
    d_ff: Count | None = None  # of a transformer, width of its MLP; default 4 * d_model
    max_seq_len: Count = 1_024  # of backbone=transformer_lm: tokens that it has positions for
    dropout: Share = 0.0
    vocab_size: Count | None = None  # default that of the data
    token_dim: Count = 96  # of token embeddings
    num_plan_states: Count = 8  # K
    num_experts: Count | None = None  # of v2, one a plan: default and only choice num_plan_states
    experts: Literal["full", "bias", "lowrank"] = "full"  # of v2. full: K heads | bias: one head, K vocabulary biases |
    # ^ lowrank: and K matrices of rank expert_rank
    expert_rank: Count = 16  # r
    chunk_size: Count = 16  # tokens that share a plan, C
    fusion_dim: Count = 128  # of v1: where state and plan meet
    compat: Literal["", "source"] = ""  # source: boundary, lookahead, repetition, samples, start, decay as it has them
    boundary: Literal["iohmm", "source"] | None = None  # iohmm: exact, default | source: bias after the transition
    planner_context_scale: float = 1.0  # weight of the text in a transition
    planner_self_bias: float | None = None  # initial logit of staying in a plan; default 1.5 (v1), 1.8 (v2)
    planner_temperature: Positive = 1.0  # tau: the gate is softmax(log b / tau); other than 1 is no Bayes mixture
    token_filtering: bool = True  # update the belief by every token, not at boundaries alone
    carry_posterior: bool = True  # and carry that across boundaries. false is the source's older v2: boundaries
    # ^ know of earlier boundaries alone, chunks begin one token later, tau acts on samples but not on the gate
    lookahead_horizon: Whole = 2  # plans ahead that are mixed into the gate, S
    lookahead_feedback_scale: NonNegative | None = None  # a, their share; default 0 (exact), 0.25 with compat=source
    # loss
    entropy_reg_weight: float = 0.0  # v1: entropy of the belief; v2: boundary_entropy, if loss_weights lacks it
    usage_balance_weight: NonNegative | None = None  # KL(mean belief || uniform); v2: as entropy_reg_weight
    chunk_bow_weight: NonNegative = 0.0  # v1: bag of words of the chunk under the plan believed at its start
    chunk_bow_warmup_steps: Whole = 0  # linear warm-up of chunk_bow_weight
    plan_mi_weight: NonNegative = 0.0  # v1: mutual information of plan and next token, maximised
    chunk_post_kl_weight: NonNegative = 0.0  # v1: symmetric KL of a recognizer of the chunk and its last posterior
    loss_weights: dict[str, NonNegative] | None = None  # of v2, all there are if given: future_contrastive, plan_js_div
    # ^ (maximised), boundary_entropy, usage_balance, rep_unlikelihood, rep_window; default 0.02 of the first and of
    # ^ usage_balance, for which usage_balance_weight is another name then
    rep_window: Whole = 0  # recent tokens that rep_unlikelihood looks at
    rep_include_current: bool | None = None  # whether x_t is among them; default true, false with compat=source
    aux_token_fraction: Fraction = 0.25  # share of the tokens, drawn anew each step, for plan_mi and plan_js_div
    future_horizon_chunks: Count = 2  # chunks ahead that future_contrastive predicts
    # commitment (v2)
    plan_commitment: Literal["soft", "gumbel_st"] = "soft"  # gumbel_st: a straight-through sample at each chunk's start
    commitment_warmup_steps: Whole = 0  # soft until then
    commitment_ramp_steps: Whole = 0  # then the sample's share grows, in so many steps to 1
    commitment_max_hard_fraction: Probability = 1.0  # but no further than this
    plan_temperature_start: Positive | None = None  # tau over training, linear; default planner_temperature
    plan_temperature_end: Positive | None = None  # and of evaluations
    # optimizer
    batch_size: Count | Literal["auto"] = 16  # windows a step, over all ranks and micro-steps; auto: what fits a GPU
    cpu_batch_size: Count = 16  # of batch_size=auto without a GPU
    batch_size_min: Count = 1  # of batch_size=auto on a GPU, windows of a rank's micro-step
    batch_size_cap: Count = 4_096
    batch_size_safety: Fraction = 0.85  # share of the GPU's memory that it may fill
    grad_accum: Count = 1  # micro-steps a step
    lr: NonNegative = 8e-3  # peak learning rate of AdamW
    min_lr: NonNegative | None = None  # what cosine ends at; default lr / 10
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_steps: Whole = 50  # linear warm-up
    max_steps: Count = 600  # optimizer steps
    weight_decay: NonNegative = 0.01  # of matrices, not of biases and planner logits
    beta1: Share = 0.9
    beta2: Share = 0.95
    grad_clip: NonNegative = 1.0  # largest gradient norm; 0 does not clip
    # evaluation
    eval_interval: Count = 200  # steps between evaluations
    log_interval: Count = 20  # steps between log lines
    save_interval: Whole | None = None  # steps between saves of last.pt; default, and 0: eval_interval
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    eval_batches: Count = 8  # validation batches of 16 windows during training
    final_eval_batches: Count = 64  # and at the end
    preview_prompt: str = ""  # what the sample at every evaluation goes on from; default a document's beginning
    preview_tokens: Whole = 48  # its length; 0 shows none
    # system
    seed: Whole = 1337
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products: torch's own names
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only
    wandb: bool | Literal["online", "offline"] = False  # log to Weights & Biases
    tensorboard: bool = False  # log to TensorBoard

    def __post_init__(self):
        if self.version == "transformer_lm":
            self.version = "baseline"
            self.backbone = "transformer_lm"
        if self.min_lr is None:
            self.min_lr = 0.1 * self.lr
        # Weights that are given are all there are; a weight beside them adds what they lack (see weights).
        if self.loss_weights is None:
            self.loss_weights = dict(DEMO_WEIGHTS)
            if self.version == "v2_planner_required" and self.usage_balance_weight is not None:
                self.loss_weights["usage_balance"] = self.usage_balance_weight
        self.usage_balance_weight = self.usage_balance_weight or 0.0

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        version, known = self.version, (*V2_TERMS, "rep_window")
        rules = [
            (self.num_experts not in (None, self.num_plan_states),
             f"num_experts = {self.num_experts} must equal num_plan_states = {self.num_plan_states}"),
            (version != "baseline" and self.chunk_size >= self.seq_len,
             f"chunk_size = {self.chunk_size} must be smaller than seq_len = {self.seq_len}"),
            (self.backbone == "transformer" and self.d_model % (2 * self.n_heads),
             f"d_model = {self.d_model} is no multiple of 2 * n_heads = {2 * self.n_heads}"),
            (self.feedback() > 1, f"lookahead_feedback_scale = {self.feedback()}: must be in [0, 1]"),
            ("rep_unlikelihood" in self.weights() and not self.repetition_window(),
             "loss_weights.rep_unlikelihood needs rep_window, the number of recent tokens"),
            (self.compare_baseline and (version == "baseline" or self.init_from),
             "compare_baseline is for a planner, without init_from: the baseline has no weights to start from"),
            (version != "v2_planner_required" and (self.experts, self.plan_commitment) != ("full", "soft"),
             f"experts and plan_commitment are settings of v2_planner_required, not of {version}"),
        ]
        for name in self.loss_weights:
            rules.append((name not in known, f"loss_weights has no {name!r}: it has {', '.join(known)}"))
        return [sentence for broken, sentence in rules if broken]

    # What the settings that depend on others come to.
    def plans(self) -> int:
        return 1 if self.version == "baseline" else self.num_plan_states

    def boundary_rule(self) -> str:
        return self.boundary or ("source" if self.compat else "iohmm")

    def feedback(self) -> float:
        if self.lookahead_feedback_scale is not None:
            return self.lookahead_feedback_scale
        return 0.25 if self.compat and self.version == "v2_planner_required" else 0.0

    def repetition_window(self) -> int:
        return self.rep_window or int(self.loss_weights.get("rep_window", 0))

    def include_current(self) -> bool:
        return not self.compat if self.rep_include_current is None else self.rep_include_current

    def weights(self, step: int = 0) -> dict[str, float]:
        """Weight of every auxiliary term at a step; those of weight 0 are left out and never computed."""
        weights = {}
        if self.version == "v1_filtered_mixture":
            warm = min(1.0, (step + 1) / max(1, self.chunk_bow_warmup_steps))
            weights = {
                "belief_entropy": self.entropy_reg_weight,
                "usage_kl": self.usage_balance_weight,
                "chunk_bow": self.chunk_bow_weight * warm,
                "plan_mi": self.plan_mi_weight,
                "chunk_post_kl": self.chunk_post_kl_weight,
            }
        elif self.version == "v2_planner_required":
            weights = {"boundary_entropy": self.entropy_reg_weight, "usage_balance": self.usage_balance_weight}
            weights |= self.loss_weights
        return {name: weight for name, weight in weights.items() if weight and name != "rep_window"}


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------
def open_data(cfg: Config) -> Corpus:
    """The corpus of cfg.data; the offline default is made where it is missing. Raises DataError.

    For data of your own return Corpus(train, val, vocab_size) with two arrays of token ids.
    """
    # The default: text that every Python carries, so that the first run needs no download.
    if cfg.data == OFFLINE:
        make_once(Path(OFFLINE) / "meta.json", lambda: prepare_text(out_dir=OFFLINE, vocab_size=1_024))
    corpus = read_corpus(cfg.data)
    if cfg.vocab_size not in (None, corpus.vocab_size):
        raise DataError(f"vocab_size = {cfg.vocab_size}, but {cfg.data} has {corpus.vocab_size}: leave it out")
    return corpus


class Batches:
    """Windows of every step: a pure function of (seed, step), the same for any number of ranks."""

    def __init__(self, rt: Runtime, corpus: Corpus, cfg: Config, batch_size: int):
        self.rt = rt
        self.corpus = corpus
        self.cfg = cfg
        self.batch_size = batch_size
        self.count, self.distance = corpus.places("train", cfg.seq_len, cfg.version)

    def __call__(self, step: int) -> Tensor:
        """This rank's windows, [B / world_size, L + 1] int64, on the device."""
        # SeedSequence hashes (seed, step), so that neighbouring steps are unrelated and a resumed run needs no state.
        seeds = np.random.SeedSequence(self.cfg.seed, spawn_key=(1, step))
        rng = np.random.default_rng(seeds)
        starts = rng.integers(self.count, size=self.batch_size) * self.distance
        return self.corpus.windows("train", self.rt.share(starts), self.cfg.seq_len, self.rt.device)


# ---------------------------------------------------------------------------------------------------------------
# Backbones
# ---------------------------------------------------------------------------------------------------------------
# A backbone of your own is one class, made from cfg, with its name in BACKBONES and in Config.backbone:
#     forward(x [B, L, D]) -> (h [B, L, H], state)    a whole text: h_t has seen x_0 .. x_t and nothing after
#     step(x [B, D], state) -> (h [B, H], state)      one token more, which is how it writes
class GRU(nn.GRU):
    """The state is h of every layer, so a token costs the same anywhere in the text."""

    def __init__(self, cfg: Config):
        # Dropout acts between layers; torch warns where there is but one.
        dropout = cfg.dropout if cfg.n_layers > 1 else 0.0
        super().__init__(cfg.token_dim, cfg.d_model, cfg.n_layers, batch_first=True, dropout=dropout)

    def step(self, x: Tensor, state):
        """By GRU cells: a call of nn.GRU costs more than a token."""
        states = []
        for weights, past in zip(self.all_weights, state, strict=True):
            x = torch.gru_cell(x, past, *weights)
            states.append(x)
        return x, states


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, cfg: Config):
        super().__init__()
        H = cfg.d_model
        self.n_heads = cfg.n_heads
        self.drop = nn.Dropout(cfg.dropout)
        self.attention_norm = nn.LayerNorm(H)
        self.qkv = nn.Linear(H, 3 * H)
        self.out = nn.Linear(H, H)
        self.mlp_norm = nn.LayerNorm(H)
        self.mlp_in = nn.Linear(H, cfg.d_ff or 4 * H)
        self.mlp_out = nn.Linear(cfg.d_ff or 4 * H, H)

    def forward(self, x: Tensor, angle: Tensor, past: tuple | None):
        """(x [B, L, H], (keys, values)); past: keys and values of the tokens before, where L is 1."""
        B, L, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, L, 3, self.n_heads, -1).transpose(1, 3)
        q, k, v = qkv.unbind(2)  # [B, heads, L, 2 R]
        q = rotate(q, angle)
        k = rotate(k, angle)
        if past:
            k = torch.cat([past[0], k], 2)
            v = torch.cat([past[1], v], 2)
        # A single token sees all of its past; the tokens of a whole text see themselves and those before them.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        attended = attended.transpose(1, 2).reshape(B, L, -1)
        # Residual branches, each normalised before and thinned by dropout after.
        x = x + self.drop(self.out(attended))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)))
        x = x + self.drop(self.mlp_out(hidden))
        return x, (k, v)


class Transformer(nn.Module):
    """Causal, with rotary positions (Su et al. 2021). The state is keys and values of every layer: it grows."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.embed = nn.Linear(cfg.token_dim, cfg.d_model, bias=False)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm = nn.LayerNorm(cfg.d_model)
        R = cfg.d_model // cfg.n_heads // 2  # pairs of a head that turn
        self.register_buffer("frequency", 10_000.0 ** (-torch.arange(R) / R), persistent=False)

    def forward(self, x: Tensor, state: list | None = None):
        state = state or [None] * len(self.layers)
        past = state[0][0].shape[2] if state[0] else 0
        # Angles of the places past, past + 1, ...: attention then knows distances, not places.
        places = torch.arange(past, past + x.shape[1], device=x.device)
        angle = places[:, None] * self.frequency  # [L, R]
        x = self.embed(x)
        states = []
        for layer, before in zip(self.layers, state, strict=True):
            x, after = layer(x, angle, before)
            states.append(after)
        return self.final_norm(x), states

    def step(self, x: Tensor, state: list):
        h, state = self(x[:, None], state)
        return h[:, 0], state


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """x [B, heads, L, 2 R] turned by angle [L, R]."""
    a, b = x.chunk(2, -1)
    cos = angle.cos().to(x)
    sin = angle.sin().to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


BACKBONES = {"gru": GRU, "transformer": Transformer}
BACKBONES["transformer_lm"] = TransformerLM  # the source's own, for what it trained


# ---------------------------------------------------------------------------------------------------------------
# Experts: what every plan predicts, log p_{t,k} = log_softmax(logits_{t,k})
# ---------------------------------------------------------------------------------------------------------------
# Logits [T, K, V] never exist as a whole. Experts say what the heads read (`inputs`, [T, P, H], one input a plan or one
# for all) and the heads (`table`: a matrix [V, H], [K V, H] or of low rank, a bias [K, V]); kernels/log_probs.py
# streams the rest.
# Dropout has one mask for all plans, which would otherwise differ by their masks alone.
class LinearExperts(nn.Module):
    """logits_{t,k} = W_k h_t + c_k: a head for each plan and nothing shared (K = 1 is the baseline)."""

    log_probs = staticmethod(log_probs)

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.drop = nn.Dropout(cfg.dropout)
        self.weight = nn.Parameter(torch.empty(cfg.plans(), vocab_size, cfg.d_model))
        self.bias = nn.Parameter(torch.zeros(cfg.plans(), vocab_size))
        # Head by head: Xavier's bound depends on the shape, which is [V, H] and not [K, V, H].
        for head in self.weight:
            nn.init.xavier_uniform_(head.data, HEAD_GAIN)

    def inputs(self, h: Tensor) -> Tensor:
        return self.drop(h)[:, None]

    def table(self) -> tuple[Tensor, Tensor]:
        return self.weight.flatten(0, 1), self.bias


class BiasExperts(nn.Module):
    """logits_{t,k} = W h_t + c + v_k: plans differ by a bias over the vocabulary, and cost about one softmax."""

    log_probs = staticmethod(shared_log_probs)

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.drop = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(cfg.d_model, vocab_size)
        # Noise, for plans that start equal get equal gradients and stay equal.
        self.plan_bias = nn.Parameter(0.1 * torch.randn(cfg.num_plan_states, vocab_size))
        xavier(self.head, HEAD_GAIN)

    inputs = LinearExperts.inputs

    def table(self) -> tuple[Tensor, Tensor]:
        return self.head.weight, self.head.bias + self.plan_bias


class LowRankExperts(BiasExperts):
    """logits_{t,k} = W h_t + U_k F h_t + c + v_k: plans also differ by what r features of the state, F h, mean to each.

    Costs K vectors of length r a token of the vocabulary, and of time less than K heads of any width.
    """

    log_probs = staticmethod(log_probs)

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__(cfg, vocab_size)
        self.features = nn.Linear(cfg.d_model, cfg.expert_rank, bias=False)  # F
        xavier(self.features)
        # Near the shared head: noise, as of the biases, of 0.1 a logit where features are of size 1.
        noise = torch.randn(cfg.num_plan_states, vocab_size, cfg.expert_rank)
        self.plan_weight = nn.Parameter(noise * 0.1 / cfg.expert_rank**0.5)  # U

    def inputs(self, h: Tensor) -> Tensor:
        h = self.drop(h)
        return torch.cat([h, self.features(h)], 1)[:, None]  # [T, 1, H + r]

    def table(self) -> tuple[Tensor, Tensor]:
        weight, bias = super().table()
        return torch.cat([weight, *self.plan_weight], 1), bias  # [V, H + K r]


class TanhExperts(nn.Module):
    """logits_{t,k} = W_o tanh(W_s h_t + c_s + W_p u_k) + c_o + v_k: state and plan meet before one shared head."""

    log_probs = staticmethod(log_probs)

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.drop = nn.Dropout(cfg.dropout)
        self.plan_emb = nn.Embedding(cfg.num_plan_states, cfg.fusion_dim)
        self.state_proj = nn.Linear(cfg.d_model, cfg.fusion_dim)
        self.plan_proj = nn.Linear(cfg.fusion_dim, cfg.fusion_dim, bias=False)
        self.out_proj = nn.Linear(cfg.fusion_dim, vocab_size)
        self.plan_vocab_bias = nn.Parameter(torch.zeros(cfg.num_plan_states, vocab_size))
        # Small but not zero, which again tells plans apart.
        nn.init.normal_(self.plan_emb.weight, std=0.02)
        xavier(self.state_proj)
        xavier(self.plan_proj)
        xavier(self.out_proj, HEAD_GAIN)

    def inputs(self, h: Tensor) -> Tensor:
        plans = self.plan_proj(self.plan_emb.weight)  # [K, F]
        joint = torch.tanh(self.state_proj(h)[:, None] + plans)  # [T, K, F]
        # One dropout mask [T, 1, F] for all plans.
        if self.training and self.drop.p:
            joint = joint * self.drop(torch.ones_like(joint[:, :1]))
        return joint

    def table(self) -> tuple[Tensor, Tensor]:
        return self.out_proj.weight, self.out_proj.bias + self.plan_vocab_bias


EXPERTS = {"full": LinearExperts, "bias": BiasExperts, "lowrank": LowRankExperts}  # of v2


def xavier(layer: nn.Linear, gain: float = 1.0) -> None:
    """Xavier's start; biases 0."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------------------------
# The exact filter
# ---------------------------------------------------------------------------------------------------------------
class Beliefs(NamedTuple):
    """What a pass of the filter knows; beliefs are log-probabilities over K plans."""

    nll: Tensor  # -log p(y_t | x_<=t) in nats [B, L]
    before: Tensor  # belief before y_t [B, L, K]
    gate: Tensor  # weights of the experts for y_t [B, L, K]; before, unless lookahead or tau change it
    start: Tensor  # belief at the start of each chunk [B, N, K]
    state: Tensor  # and what the chunk works with: start, or a sample, or what a planner mode puts there
    end: Tensor  # belief after the last token of each chunk [B, N, K]


Scheduled = float | Tensor  # a number of a schedule: a tensor where it moves, see as_tensor


def stays(value: Scheduled, number: float) -> bool:
    """Whether it is this number, and not a tensor, which may be another at the next step."""
    return not isinstance(value, Tensor) and value == number


def cross_iohmm(belief: Tensor, transition: Tensor, context: Tensor) -> Tensor:
    """b P_c with P_c[i, j] = softmax_j(A_ij + g_j), a Markov chain whose steps depend on the text.

    Log beliefs [B, K] in and out. transition: logits A [K, K] (from, to); context: g [B, K].
    """
    log_P = F.log_softmax(transition + context[:, None], 2)  # [B, K, K]
    return torch.logsumexp(belief[:, :, None] + log_P, 1)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
class Baseline(nn.Module):
    """The executor alone: token embedding, backbone, one softmax head. A planner adds to it and is held against it."""

    def __init__(self, cfg: Config, vocab_size: int, experts: type):
        super().__init__()
        self.cfg = cfg
        self.token_emb = nn.Embedding(vocab_size, cfg.token_dim)
        nn.init.normal_(self.token_emb.weight)  # of size 1: with 0.02 a GRU needs 200 steps to leave the unigrams
        self.backbone = BACKBONES[cfg.backbone](cfg)
        self.experts = experts(cfg, vocab_size)

    def read(self, input_ids: Tensor):
        """Tokens [B, L] -> (h [B, L, H] after reading each, backbone state)."""
        return self.backbone(self.token_emb(input_ids))

    def look_up(self, h: Tensor, index: Tensor) -> Tensor:
        """log p_{t,k}(v) for v in index [B, L, J], h [B, L, H]: [B, L, K, J], float32 or float64."""
        # T = B L rows: heads know no order, and a block of rows is what fits the memory.
        rows = self.experts.inputs(h.flatten(0, 1))
        logs = self.experts.log_probs(rows, *self.experts.table(), index.flatten(0, 1))  # [T, K, J]
        return logs.unflatten(0, index.shape[:2])

    def losses(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        terms: tuple = (),
        tau: Scheduled | None = None,
        hard_fraction: Scheduled = 0.0,
    ) -> dict[str, Tensor]:
        """{"nll"} in nats a token; input_ids, target_ids [B, L] with target y_t = x_{t+1}."""
        check_terms(terms, ())
        h, _ = self.read(input_ids)
        # One expert: log p_{t,1}(y_t) is the log-softmax of its head.
        return {"nll": -self.look_up(h, target_ids[..., None]).mean()}

    def forward(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        weights: dict[str, Scheduled] | None = None,
        tau: Scheduled | None = None,
        hard_fraction: Scheduled = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total loss, its terms): nll + sum of weight * term, less for terms that are maximised.

        The losses are inside `forward` because DDP synchronises the gradients of what goes through it, and of no more.
        """
        weights = self.cfg.weights() if weights is None else weights
        values = self.losses(input_ids, target_ids, terms=tuple(weights), tau=tau, hard_fraction=hard_fraction)
        total = values["nll"]
        for term, weight in weights.items():
            sign = -1 if term in MAXIMISED else 1
            total = total + sign * weight * values[term]
        return total, {name: value.detach() for name, value in values.items()}


class Planner(Baseline):
    """An executor of K experts, and the belief over which of them writes. What the versions add is in their classes.

    Names in the state dict are the source's. Beliefs, transitions and their products stay float32 (or float64) under
    autocast.
    """

    SELF_BIAS: float  # default of planner_self_bias

    def __init__(self, cfg: Config, vocab_size: int, experts: type):
        super().__init__(cfg, vocab_size, experts)
        K = cfg.num_plan_states
        stay = self.SELF_BIAS if cfg.planner_self_bias is None else cfg.planner_self_bias
        # pi_0 = softmax(0): at first no plan is likelier than another.
        self.planner_init_logits = nn.Parameter(torch.zeros(K))
        # A [from, to]: with 1.8 on the diagonal and K = 8 a plan stays with probability 0.46.
        self.planner_transition_logits = nn.Parameter(stay * torch.eye(K))
        self.rule = cross_iohmm if cfg.boundary_rule() == "iohmm" else cross_source
        self.offset = 0  # y_t is in chunk (t + offset) // C
        self.tau, _ = commitment(cfg.max_steps, cfg)  # of evaluation and writing: where the schedule ends

    def filter(
        self,
        evidence: Tensor,
        context: Tensor,
        planner_mode: str = "normal",
        forced_state: int | None = None,
        tau: Scheduled | None = None,
        hard_fraction: Scheduled = 0.0,
    ) -> Beliefs:
        """Run the belief over a text: sums within a chunk, a step of the chain between chunks.

        Args:
            evidence: log p_{t,k}(y_t) [B, L, K]. context: g [B, N - 1, K], what the text adds at each boundary.
            planner_mode: normal | uniform_mask | forced_state (the belief is replaced and does not learn from tokens).
            tau: temperature of the gate. hard_fraction: share of a straight-through sample at each chunk's start.
        """
        cfg = self.cfg
        C = cfg.chunk_size
        tau = self.tau if tau is None else tau
        fixed = plans.fixed_belief(self.planner_init_logits, planner_mode, forced_state)

        B, L, K = evidence.shape
        # Layout: the evidence by chunk. Places before the first token and after the last one hold log 1 = 0, which says
        # nothing of any plan; without token filtering no token does, and none changes a belief that a mode has fixed.
        N = -(-(L + self.offset) // C)
        learned = F.pad(evidence, (0, 0, self.offset, N * C - L - self.offset)).view(B, N, C, K)
        if not cfg.token_filtering or fixed is not None:
            learned = torch.zeros_like(learned)
        total = learned.sum(2)  # [B, N, K]

        # Prior: b = pi_0 = softmax(planner_init_logits), before any text.
        belief = F.log_softmax(self.planner_init_logits, 0).expand(B, K)
        start = []
        state = []
        end = []
        for c in range(N):
            # Boundary: a step of the chain, b <- b P_c, from all that is known when the chunk before ends.
            if c:
                last = end[-1] if cfg.carry_posterior else start[-1]
                held = fixed is not None and cfg.carry_posterior
                belief = last if held else self.cross(last, context[:, c - 1])
            # Commitment: the chunk works with the belief, or in training with a sample of it (gumbel_st).
            start.append(belief)
            state.append(self.commit(belief, tau, hard_fraction) if fixed is None else fixed.expand_as(belief))
            # Bayes' rule for the whole chunk, b(k) <- b(k) prod_t p_{t,k}(y_t) / Z. The plan does not change within a
            # chunk, so its tokens may be taken together; this loop runs over N chunks and never over L tokens.
            end.append(F.log_softmax(state[-1] + total[:, c], 1))
        start, state, end = (torch.stack(beliefs, 1) for beliefs in (start, state, end))  # [B, N, K]

        # Bayes' rule token by token: before y_t the belief has learned from the tokens of its chunk up to y_{t-1}, and
        # their evidence is the cumulative sum less the token's own.
        before = F.log_softmax(state[:, :, None] + learned.cumsum(2) - learned, 3)
        before = before.reshape(B, N * C, K)[:, self.offset : self.offset + L]
        # Gate: the belief itself (a = 0, tau = 1: exact), or with the plans to come, or sharpened. No other plan is
        # mixed into a belief that a mode has fixed.
        a = cfg.feedback() if fixed is None else 0.0
        gate = self.gate(before, tau, self.ahead(a, cfg.lookahead_horizon))
        # Mixture: p(y_t | x_<=t) = sum_k gate_t(k) p_{t,k}(y_t). Summed over t this is the log-likelihood of the text.
        nll = -torch.logsumexp(gate + evidence, 2)
        return Beliefs(nll, before, gate, start, state, end)

    def cross(self, belief: Tensor, context: Tensor) -> Tensor:
        return self.rule(belief, self.planner_transition_logits, context)

    def ahead(self, a: float, horizon: int) -> Tensor | None:
        """Lookahead: log M, M = (1 - a) I + a mean_{s=1..S} P^s, which turns a belief b into b M; None where M = I."""
        if not a or not horizon:
            return None
        P = self.planner_transition_logits.softmax(1)
        powers = [P]
        with torch.autocast(P.device.type, enabled=False):
            while len(powers) < horizon:
                powers.append(powers[-1] @ P)
        mix = (1 - a) * torch.eye(len(P), device=P.device).to(P) + a * torch.stack(powers).mean(0)
        # Floor: a step that the chain never takes is a 0 in M, and gradients pass through its logarithm.
        return mix.clamp_min(torch.finfo(mix.dtype).tiny).log()

    def gate(self, belief: Tensor, tau: Scheduled, log_M: Tensor | None = None) -> Tensor:
        """Log weights of the experts: softmax(log(b M) / tau), [..., K]."""
        if log_M is not None:
            belief = torch.logsumexp(belief[..., :, None] + log_M, -2)
        # Temperature: below 1 the likeliest plan gets more than its due, above 1 less.
        if stays(tau, 1) or not self.cfg.carry_posterior:
            return belief
        return F.log_softmax(belief / tau, -1)

    def commit(self, belief: Tensor, tau: Scheduled, hard_fraction: Scheduled) -> Tensor:
        """What a chunk works with, given the log belief [B, K] at its start."""
        if stays(hard_fraction, 0):
            return belief
        if self.cfg.compat:
            return commit_source(belief, tau, hard_fraction)
        # Straight-through sample: one plan going forward, the softmax of (log b + Gumbel noise) / tau going back.
        sample = F.gumbel_softmax(belief.float(), tau, hard=True, dim=1).to(belief)
        mixed = hard_fraction * sample + (1 - hard_fraction) * belief.exp()
        # Floor: the sample has zeros, and gradients pass through their logarithm.
        return (mixed.clamp_min(0) + 1e-9).log()

    def counted(self, beliefs: Tensor, L: int) -> Tensor:
        """Of beliefs [B, N, K] the chunks that terms and metrics are means over, of L tokens."""
        # With the last token of whole chunks another chunk begins, which the source does not count.
        return beliefs[:, : -(-L // self.cfg.chunk_size)] if self.cfg.compat else beliefs

    def project(self, layer: nn.Linear, h: Tensor) -> Tensor:
        """layer(h), never in half precision."""
        with torch.autocast(h.device.type, enabled=False):
            return layer(h.to(layer.weight))

    def chunk_means(self, h: Tensor) -> Tensor:
        """Means of h [B, L, H] over chunks of the tokens read, [B, ceil(L / C), H], the last one maybe partial."""
        # In full precision: a sum of C states in bfloat16 has two digits.
        chunks = h.to(self.planner_init_logits).split(self.cfg.chunk_size, 1)
        return torch.stack([chunk.mean(1) for chunk in chunks], 1)

    def aux_rows(self, h: Tensor):
        """Which of the B L tokens plan_mi and plan_js_div look at: in training a random share."""
        # These two terms cost as much as the likelihood itself; a quarter of the tokens estimates them without bias.
        share = self.cfg.aux_token_fraction if self.training else 1
        return some_rows(h.shape[0] * h.shape[1], share, h.device)


class FilteredMixture(Planner):
    """Version 1: plans speak through one shared head. Chunks begin with y_0; the state at a boundary moves the plan."""

    SELF_BIAS = 1.5

    def __init__(self, cfg: Config, vocab_size: int, experts: type):
        super().__init__(cfg, vocab_size, experts)
        self.planner_ctx_proj = nn.Linear(cfg.d_model, cfg.num_plan_states)
        self.chunk_post_proj = nn.Linear(cfg.d_model, cfg.num_plan_states)
        xavier(self.planner_ctx_proj)
        xavier(self.chunk_post_proj)

    def contexts(self, h: Tensor) -> Tensor:
        """g [B, N - 1, K]: what the text adds to the transition logits at every boundary."""
        # h_t has read x_t = y_{t-1}: all of the chunk before the boundary, nothing of y_t.
        return self.context(h[:, self.cfg.chunk_size :: self.cfg.chunk_size])

    def context(self, h: Tensor) -> Tensor:
        """g = planner_context_scale * (W_c h_t + c_c), h_t the state at the boundary."""
        return self.cfg.planner_context_scale * self.project(self.planner_ctx_proj, h)

    def boundary_state(self, h: Tensor, before: Tensor, total: Tensor) -> Tensor:
        """What `context` reads when token by token a boundary comes: h is the newest state [B, H]."""
        return h

    def losses(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        planner_mode: str = "normal",
        forced_state: int | None = None,
        terms: tuple = V1_TERMS,
        tau: Scheduled | None = None,
        hard_fraction: Scheduled = 0.0,
    ) -> dict[str, Tensor]:
        """nll and the auxiliary terms in nats, and metrics of the planner; scalars. See PlannerRequired.losses."""
        check_terms(terms, V1_TERMS)
        h, _ = self.read(input_ids)
        # Look-up: log p_{t,k} of y_t, and for chunk_bow of all targets of its chunk. Nothing else is ever needed.
        index = target_ids[..., None]
        if "chunk_bow" in terms:
            index = torch.cat([index, chunk_targets(target_ids, self.cfg.chunk_size)], 2)
        logs = self.look_up(h, index)  # [B, L, K, J]
        evidence = logs[..., 0]
        beliefs = self.filter(evidence, self.contexts(h), planner_mode, forced_state, tau, hard_fraction)
        # b after y_t, by Bayes' rule; a belief that is held in place does not learn.
        after = beliefs.before
        if planner_mode == "normal":
            after = F.log_softmax(after + evidence, 2)

        # nll = -mean_t log sum_k b(k) p_{t,k}(y_t)
        values = {"nll": beliefs.nll.mean()}
        # belief_entropy = mean_t H(b after y_t): small where the text tells its plan
        if "belief_entropy" in terms:
            values["belief_entropy"] = entropy(after).mean()
        # usage_kl = KL(mean_t b || uniform): small where all plans are used
        if "usage_kl" in terms:
            values["usage_kl"] = kl_to_uniform(after.exp().mean((0, 1)))
        # chunk_bow = mean_c CE(histogram of the chunk's tokens, sum_k b_start(k) mean_{t in c} p_{t,k})
        if "chunk_bow" in terms:
            values["chunk_bow"] = chunk_bow(logs[..., 1:], beliefs.start)
        # plan_mi = mean_t [H(sum_k b(k) p_{t,k}) - sum_k b(k) H(p_{t,k})], b before y_t: large where plans disagree
        if "plan_mi" in terms:
            rows = self.aux_rows(h)
            x = self.experts.inputs(h.flatten(0, 1)[rows])
            belief = beliefs.before.flatten(0, 1)[rows]
            values["plan_mi"] = plan_information(x, *self.experts.table(), belief)
        # chunk_post_kl = mean_c [KL(q || b_end) + KL(b_end || q)] / 2, q = softmax(W_q mean_{t in c} h_t + c_q)
        if "chunk_post_kl" in terms:
            q = F.log_softmax(self.project(self.chunk_post_proj, self.chunk_means(h)), 2)
            end = beliefs.end
            both = (q.exp() - end.exp()) * (q - end)  # summed over plans the two KLs together
            values["chunk_post_kl"] = 0.5 * both.sum(2).mean()
        return values | plans.usage_metrics(beliefs.state)


class PlannerRequired(Planner):
    """Version 2: every logit comes from a plan's own head. The first token read counts as one of the first chunk."""

    SELF_BIAS = 1.8

    def __init__(self, cfg: Config, vocab_size: int, experts: type):
        super().__init__(cfg, vocab_size, experts)
        H = cfg.d_model
        K = cfg.num_plan_states
        # A boundary comes before y_t with (t + 1) mod C = 0; the source's older v2 has it a token later.
        self.offset = int(cfg.carry_posterior)
        self.planner_boundary_proj = nn.Linear(H, K)
        self.planner_obs_proj = nn.Linear(H, K)
        self.plan_state_emb = nn.Embedding(K, H)
        self.future_chunk_proj = nn.Linear(H, H, bias=False)
        nn.init.normal_(self.plan_state_emb.weight, std=0.02)
        for layer in (self.planner_boundary_proj, self.planner_obs_proj, self.future_chunk_proj):
            xavier(layer)

    def contexts(self, h: Tensor) -> Tensor:
        """g [B, N - 1, K]: what the text adds to the transition logits at every boundary."""
        N = -(-(h.shape[1] + self.offset) // self.cfg.chunk_size)
        # The last chunk, maybe a partial one, ends without a boundary.
        return self.context(self.chunk_means(h)[:, : N - 1])

    def context(self, mean: Tensor) -> Tensor:
        """g = planner_context_scale * B(m) + O(m), m the mean state of the chunk just finished."""
        boundary = self.project(self.planner_boundary_proj, mean)
        return self.cfg.planner_context_scale * boundary + self.project(self.planner_obs_proj, mean)

    def boundary_state(self, h: Tensor, before: Tensor, total: Tensor) -> Tensor:
        """What `context` reads when token by token a boundary comes: the states [B, H] of its chunk were summed up,
        before the newest token and with it."""
        return (total if self.offset else before) / self.cfg.chunk_size

    def losses(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        planner_mode: str = "normal",
        forced_state: int | None = None,
        terms: tuple = V2_TERMS,
        tau: Scheduled | None = None,
        hard_fraction: Scheduled = 0.0,
    ) -> dict[str, Tensor]:
        """nll and the auxiliary terms in nats, and metrics of the planner; scalars.

        Args:
            input_ids, target_ids: [B, L] with target y_t = x_{t+1}.
            terms: which auxiliary terms to compute.
            planner_mode, forced_state, tau, hard_fraction: see filter.
        Raises InputError for a term that it does not have.
        """
        check_terms(terms, V2_TERMS)
        h, _ = self.read(input_ids)
        # Look-up: log p_{t,k} of y_t, and for rep_unlikelihood of the tokens before it. Nothing else is ever needed.
        index = target_ids[..., None]
        if "rep_unlikelihood" in terms:
            window = self.cfg.repetition_window()
            recent, counts = recent_tokens(input_ids, target_ids, window, self.cfg.include_current())
            index = torch.cat([index, recent], 2)
        logs = self.look_up(h, index)  # [B, L, K, J]
        evidence = logs[..., 0]
        beliefs = self.filter(evidence, self.contexts(h), planner_mode, forced_state, tau, hard_fraction)

        # Chunks: terms and metrics are means over those of the text, start what they began with, state what they use.
        L = target_ids.shape[1]
        start, state = self.counted(beliefs.start, L), self.counted(beliefs.state, L)
        # nll = -mean_t log sum_k gate_t(k) p_{t,k}(y_t)
        values = {"nll": beliefs.nll.mean()}
        # boundary_entropy = mean_c H(b at the chunk's start): small where the next plan is known
        if "boundary_entropy" in terms:
            values["boundary_entropy"] = entropy(start).mean()
        # usage_balance = KL(mean_c state_c || uniform): small where all plans are used
        if "usage_balance" in terms:
            values["usage_balance"] = kl_to_uniform(state.exp().mean((0, 1)))
        # future_contrastive = InfoNCE: the chunk's plan tells its own future chunks from those of the batch
        if "future_contrastive" in terms:
            values["future_contrastive"] = self.future_contrastive(h, state, tau)
        # plan_js_div = mean over t and pairs i < j of JS(p_{t,i}, p_{t,j}): large where experts predict otherwise
        if "plan_js_div" in terms:
            x = self.experts.inputs(h.flatten(0, 1)[self.aux_rows(h)])
            values["plan_js_div"] = plan_divergence(x, *self.experts.table())
        # rep_unlikelihood = mean_t mean over recent tokens v != y_t of -log(1 - p_t(v))
        if "rep_unlikelihood" in terms:
            values["rep_unlikelihood"] = repetition(beliefs.gate, logs[..., 1:], counts)
        return values | plans.usage_metrics(state)

    def future_contrastive(self, h: Tensor, state: Tensor, tau: Scheduled | None = None) -> Tensor:
        """InfoNCE (van den Oord et al. 2018) over the batch, of plan vectors and the chunks d = 1, 2, ... ahead."""
        # The source's older v2 has a temperature that no schedule moves.
        if tau is None or not self.cfg.carry_posterior:
            tau = self.cfg.planner_temperature
        with torch.autocast(h.device.type, enabled=False):
            means = self.chunk_means(h)
            n = means.shape[1]
            # Cosines: the plan a chunk works with, and what each chunk was about, as unit vectors.
            plan = F.normalize(state[:, :n].exp() @ self.plan_state_emb.weight, dim=2)
            future = F.normalize(self.future_chunk_proj(means), dim=2)
            terms = []
            for d in range(1, min(self.cfg.future_horizon_chunks, n - 1) + 1):
                anchor = plan[:, :-d].flatten(0, 1)
                positive = future[:, d:].flatten(0, 1)
                # Scores [B (n - d), B (n - d)]: a chunk's own future is on the diagonal, all others are negatives.
                scores = anchor @ positive.t() / tau
                terms.append(-scores.log_softmax(1).diagonal().mean())
        return torch.stack(terms).mean() if terms else h.new_zeros(())


def build_model(cfg: Config, vocab_size: int | None = None) -> Baseline:
    """The model of a config; the vocabulary is cfg.vocab_size unless given. Raises ValueError where neither is."""
    V = vocab_size or cfg.vocab_size
    if not V:
        raise ValueError("build_model needs cfg.vocab_size, or the vocabulary of the data")
    # The one place where a model asks which version it is: what a version does is in its class.
    if cfg.version == "baseline":
        model = Baseline(cfg, V, LinearExperts)
    elif cfg.version == "v1_filtered_mixture":
        model = FilteredMixture(cfg, V, TanhExperts)
    else:
        model = PlannerRequired(cfg, V, EXPERTS[cfg.experts])
    if cfg.backbone == "transformer_lm":
        plain_head(model)
    elif cfg.compat:
        start_as_source(model, HEAD_GAIN)
    return model


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------
def commitment(step: int, cfg: Config) -> tuple[float, float]:
    """(tau, hard fraction) of a training step."""
    # Temperature: a straight line over the run.
    first = cfg.plan_temperature_start or cfg.planner_temperature
    last = cfg.plan_temperature_end or first
    tau = first + (last - first) * min(1.0, step / max(1, cfg.max_steps - 1))
    # Hard fraction: 0 during the warm-up, then a ramp.
    done = step - cfg.commitment_warmup_steps
    if cfg.plan_commitment == "soft" or done < 0:
        return tau, 0.0
    ramped = done / cfg.commitment_ramp_steps if cfg.commitment_ramp_steps else 1.0
    # The source samples from the ramp's first step on, when no share of the sample is hard yet.
    least = 1e-9 if cfg.compat else 0.0
    return tau, max(least, min(cfg.commitment_max_hard_fraction, ramped))


def as_tensor(value: float, tokens: Tensor) -> Tensor:
    """A number of a schedule where the tokens are: for another number a compiled model would be compiled anew."""
    return tokens.new_full((), value, dtype=torch.float32)


def train_step(model: nn.Module, tokens: Tensor, step: int, rt: Runtime, cfg: Config) -> dict[str, Tensor]:
    """Forward and backward over the micro-batches of tokens [B, L + 1]; returns loss and terms, the mean over ranks."""
    tau, hard_fraction = commitment(step, cfg)
    weights = {name: as_tensor(weight, tokens) for name, weight in cfg.weights(step).items()}
    if cfg.plan_temperature_end not in (None, cfg.plan_temperature_start):
        tau = as_tensor(tau, tokens)
    if hard_fraction:
        hard_fraction = as_tensor(hard_fraction, tokens)
    values = []
    for i, part in enumerate(tokens.chunk(cfg.grad_accum)):
        # Gradients travel between ranks once, with the last micro-batch.
        with rt.sync(model, last=i == cfg.grad_accum - 1):
            with rt.autocast():
                # Half precision where the device has it; beliefs stay in single (see Planner).
                loss, terms = model(part[:, :-1], part[:, 1:], weights, tau, hard_fraction)
            rt.backward(loss / cfg.grad_accum)
        values.append(torch.stack([loss.detach(), *terms.values()]))
    # One tensor for all terms, so that ranks exchange one message a step.
    means = rt.mean(torch.stack(values).mean(0))
    return dict(zip(("loss", *terms), means, strict=True))


def parameter_groups(model: Baseline, cfg: Config) -> list[dict]:
    """Matrices decay; biases, norms and the planner's own logits do not, unless compat=source."""
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Decay would pull transitions towards even ones and biases towards even words: a prior that nobody asked for,
        # and that the source has.
        if not cfg.compat and (parameter.ndim < 2 or name.endswith(("bias", "_logits"))):
            others.append(parameter)
        else:
            matrices.append(parameter)
    return [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def trial(model: Baseline, windows: int, rt: Runtime, cfg: Config) -> Tensor:
    """The loss of so many windows of token 0, with every term of the run."""
    tokens = torch.zeros(windows, cfg.seq_len + 1, dtype=torch.int64, device=rt.device)
    with rt.autocast():
        return model(tokens[:, :-1], tokens[:, 1:], cfg.weights(cfg.max_steps))[0]


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model: Baseline, corpus: Corpus, starts: np.ndarray, rt: Runtime, cfg: Config, batch: int = 16) -> dict:
    """Losses on validation windows in nats a token, and what the plan is worth. Collective: ranks share the windows.

    planner_mask_delta_loss: nll with the belief replaced by the uniform one, less nll. plan_gain: nll of the best
    single plan, less nll. On planted data also oracle_nll of the same tokens and plan_nmi, the normalised mutual
    information of the likeliest plan at each chunk's end with the true one.
    """
    model.eval()
    windows = []
    own = rt.share(starts)
    for begin in bar(range(0, len(own), batch), "measuring on validation windows"):
        tokens = corpus.windows("val", own[begin : begin + batch], cfg.seq_len, rt.device)
        with rt.autocast():
            h, _ = model.read(tokens[:, :-1])
            evidence = model.look_up(h, tokens[:, 1:, None])[..., 0]  # [B, L, K]
        windows.append([part.cpu() for part in plans.window_numbers(model, h, evidence)])
    model.train()
    # In order of rank: the windows of rank 0, of rank 1, ..., and their starts likewise.
    windows = sum(rt.gather(windows), [])
    starts = np.concatenate([starts[rank :: rt.world_size] for rank in range(rt.world_size)])
    nll, *planned = [torch.cat(parts).double() for parts in zip(*windows, strict=True)]
    nll = float(nll.mean())
    metrics = {"val_nll": nll, "val_ppl": plans.perplexity(nll)} | corpus.yardsticks(nll, starts, cfg.seq_len)
    if planned:
        true = corpus.true_plans(starts, cfg.chunk_size)
        metrics |= plans.plan_worth(nll, *planned[:2])
        metrics |= plans.plan_metrics(*planned[2:], model.planner_transition_logits, true)
    return metrics


def finish(model: Baseline, corpus: Corpus, cfg: Config, rt: Runtime, folder: Path, say=print) -> dict:
    """Measure on the validation text: planner_eval.json, metrics.json, pictures; returns the metrics. Collective."""
    starts = corpus.spread(cfg.final_eval_batches * 16, cfg.seq_len, cfg.version)
    metrics = evaluate(model, corpus, starts, rt, cfg)
    if rt.is_main:
        with rt.autocast():
            metrics = plans.write_report(folder, model, corpus, starts, metrics, say)
    rt.barrier()
    return metrics


def rehearse(model: Baseline, corpus: Corpus, rt: Runtime, cfg: Config) -> None:
    """A step on two windows, and all that the end of the run asks of model and data.

    Parameters that the loss does not reach, such as those of terms of weight 0, are left out of training.
    """
    starts = corpus.spread(rt.world_size, cfg.seq_len, cfg.version)
    with rehearsal():
        # Masks of dropout may be drawn here: the run's own random numbers begin, or are restored, after this.
        trial(model, 2, rt, cfg).backward()
        # DDP waits for the gradient of every parameter that asks for one.
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        model.zero_grad(set_to_none=True)
        evaluate(model, corpus, starts, rt, cfg)
        if isinstance(model, Planner):
            plans.planner_report(model, corpus, starts)
        preview(model, corpus, rt, tokens=2)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
def train(cfg: Config, rehearsal_only: bool = False, beside: dict | None = None) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    With compare_baseline a baseline is trained before. rehearsal_only: say what the run would train, and stop before it
    does. beside: what summary.json has of the baseline.
    Raises InputError (bad input, before anything is written) and FloatingPointError (the loss).
    """
    began = time.perf_counter()
    cfg, source = to_go_on(cfg)  # a checkpoint of the source, whose sizes, weights, step and AdamW this run takes over
    if cfg.compare_baseline and not (rehearsal_only or beside):
        return compare_baseline.train_beside(cfg, train, build_model)
    with Runtime(cfg) as rt, store.run_folder(cfg, rt) as folder:
        cfg, weights = start_from(cfg, Config(), rt.is_main)
        rt.divide(cfg.batch_size, cfg.grad_accum)
        check_prepared(cfg.data, cfg.prepare)
        corpus = open_data(cfg)
        data = {cfg.data: corpus.fingerprint}
        path, state, changes = checkpoint.start_from(
            rt, cfg, folder, __file__, lambda old, path: differences(old, cfg, ALIASES, path), data, batch_size=int
        )
        summary = None if beside else ended_before(rt, folder, path, state, changes, HEADLINES)
        if summary and (not rehearsal_only or "baseline_nll" in summary):
            return summary
        model = rt.build(build_model, cfg, corpus.vocab_size)
        if not state:
            put_in(model, weights, cfg, corpus)
        model.to(rt.device)
        # Before step 0: whatever the end of the run asks of an edited copy fails now.
        rehearse(model, corpus, rt, cfg)
        optimizer = rt.adamw(parameter_groups(model, cfg), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
        params = list(model.parameters())
        step = 0
        best = math.inf
        batch_size = cfg.batch_size
        if state:
            corpus.same_tokenizer(state["extra"], path)
            step, best, extra, _ = checkpoint.restore(rt, state, path, model, optimizer)
            if batch_size == "auto":
                batch_size = extra["batch_size"]
        else:
            if source:
                step, resumed = go_on(source, corpus, model, optimizer, cfg.max_steps)
            if batch_size == "auto":
                batch_size = fitting_batch_size(rt, model, cfg, lambda windows: trial(model, windows, rt, cfg))
            rt.reseed(rt.rank)  # ranks must not draw the same dropout masks
        meter = Meter(rt, batch_size * cfg.seq_len, began, state)
        batches = rt.ahead(Batches(rt, corpus, cfg, batch_size), cfg.max_steps)  # made during the step before
        starts = corpus.spread(cfg.eval_batches * 16, cfg.seq_len, cfg.version)
        extra = {
            "batch_size": batch_size,
            "vocab_size": corpus.vocab_size,
            "tokenizer_hash": corpus.tokenizer_hash,
            "data": data,
        }
        if rehearsal_only:
            stopped = {"stopped_at": step} if rt.stopping(0) else {}
            return stopped | extra | {"parameters": plans.size_of(model)}
        trained = rt.wrap(model)

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, cfg.max_steps, data) as log:
            if rt.is_main:
                checkpoint.clear(folder, step, best, cfg.keep_last)
                corpus.copy_tokenizer(folder)
            peak = matmul_rate(rt) * rt.world_size  # what these devices reach: the 1 of mfu
            log.say(rt.describe())
            log.say(plans.describe(model, corpus, batch_size, DEMO_WEIGHTS))
            if state:
                log.resumed(path, step, changes)
            elif source:
                log.say(resumed)
            meter.start(step)
            while step < cfg.max_steps:
                tokens = batches(step)  # [B, L + 1]
                lr = learning_rate(step, cfg)
                terms = train_step(trained, tokens, step, rt, cfg)
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
                    means = meter.read()
                    values = {
                        "lr": lr,
                        "grad_norm": float(norm),
                        "tokens_per_s": speed,
                        "mfu": speed * flops_per_token(model) / peak,
                    }
                    left = (cfg.max_steps - step) * meter.units_per_step / speed  # seconds
                    log.train(step, means | values, lr, norm, speed, left, loss=means["loss"])
                # The best weights are those of the lowest validation loss; the end of the run measures these.
                if due.evaluates:
                    metrics = evaluate(model, corpus, starts, rt, cfg)
                    improved = metrics["val_nll"] < best
                    best = min(best, metrics["val_nll"])
                    log.metrics(step, "eval", metrics)
                    log.say(plans.evaluation_line(step, metrics) + (" *" if improved else ""))
                    if cfg.preview_tokens and rt.is_main:
                        log.say(preview(model, corpus, rt, cfg.preview_tokens))
                if due.saves or improved:
                    # Collective: every rank adds the state of its random numbers.
                    saved = checkpoint.capture(
                        rt, __file__, config_dict(cfg), step, model, optimizer, best, meter, extra, {}
                    )
                    if rt.is_main:
                        checkpoint.save(saved, folder, improved, cfg.keep_last != 0, cfg.keep_last)
                # A signal: all is saved, so the run can leave.
                if due.stops:
                    log.stopped(step)
                    return {"stopped_at": step}
                meter.start(step)

            # The result is that of the best weights; rank 0 has written them by now.
            rt.barrier()
            checkpoint.load_best(rt, folder, __file__, model)
            metrics = finish(model, corpus, cfg, rt, folder, log.say)
            summary = metrics | {
                "version": cfg.version,
                "parameters": plans.size_of(model),
                "config_hash": config_hash(cfg),
            } | (beside or {}) | run_facts(rt, step, meter)
            summary["verdict"] = plans.verdict(summary)
            log.summary(summary, HEADLINES)
            if rt.is_main:
                log.say(run_page(folder, Config))
            # A signal that came too late to stop anything here stops what would come next.
            return summary | ({"stopped_at": step} if rt.stopping(0) else {})


# ---------------------------------------------------------------------------------------------------------------
# Runs and checkpoints, ours and the source's
# ---------------------------------------------------------------------------------------------------------------
def load_run(path: Path, device: str = "auto") -> tuple[Config, Baseline, int, dict]:
    """(settings, model, steps done, extra state) of a run folder, a checkpoint or a source checkpoint.

    Raises CheckpointError.
    """
    return opened(path, __file__, Config(device=device), build_model)


def load_source_checkpoint(source: str | Path | dict, cfg: Config | None = None) -> Baseline:
    """A model with the weights of an APEL-R checkpoint, computing as the source does (compat=source).

    Args:
        source: a checkpoint file, what is in it, or a bare state dict. cfg: settings that it does not tell.
    Weights that are missing keep their start and unknown ones are left out; both are printed. Raises CheckpointError.
    """
    return converted(source, cfg or Config(), build_model)


def analyze(cfg: Config) -> dict:
    """The final measurements and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = checkpoint_in(cfg.analyze)
    saved, model, step, extra = load_run(path, cfg.device)
    # What may differ from the run, if asked to; all else is as it was trained.
    take_over(saved, cfg, "precision", "matmul_precision", "data", "seq_len", "final_eval_batches")
    with Runtime(saved) as rt:
        corpus = open_data(saved)
        corpus.same_tokenizer(extra, path)
        checkpoint.same_data(extra, {saved.data: corpus.fingerprint}, path)
        folder = checkpoint.analysis_of(path, cfg)
        metrics = finish(model.to(rt.device), corpus, saved, rt, folder)
        if rt.is_main:
            metrics["verdict"] = plans.verdict(metrics)
            say_again(step, metrics, HEADLINES, run_page(folder, Config, metrics))
    return metrics


def main(argv: list[str] | None = None) -> dict:
    with clear_errors():
        cfg = configure(Config, argv, ALIASES, APELR)
        first_line(__file__, cfg, f"{cfg.data}, {cfg.version}, {cfg.max_steps:,} steps")
        return analyze(cfg) if cfg.analyze else train(cfg)


if __name__ == "__main__":
    main()
