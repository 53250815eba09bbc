"""Train a small sequence model on a generalized hidden Markov process and look for its belief states inside.

The process is known exactly, so the loss has an exact floor (the entropy of the next token given the context) and every
context an exact belief (the predictive state, for a hidden Markov model the posterior over hidden states). A model
trained on nothing but next tokens reaches the floor and carries the belief, fractal and all, linearly in its residual
stream (Shai et al. 2024, arXiv:2405.15943).

    python train_ghmm.py                            # Mess3 on two CPU cores, 2 minutes: excess < 0.1%, r2 > 0.99
    python train_ghmm.py config/ghmm_rrxor.py       # RRXOR: its belief geometry is spread over the layers
    python train_ghmm.py --process=tom_quantum --alpha=1 --beta=7.14 --out_dir=out/tom   # any process of --help
    python train_ghmm.py --matrices=my.npz --out_dir=out/my   # a process of your own, T[x][i, j] [V, S, S]
    torchrun --nproc_per_node=8 train_ghmm.py config/ghmm_mess3.py
    python train_ghmm.py --analyze=out/ghmm         # the analysis and pictures of any run folder or checkpoint

Dimensions: B batch, L or T tokens, V tokens of the vocabulary, S states, D width, N or P words and prefixes.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import InputError, clear_errors, reason, rehearsal  # isort: skip

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import checkpoint, store
from common.runlog import RunLog, ended_before, first_line, run_facts, say_again, write_json
from common.runtime import Meter, Runtime, learning_rate
from common.telling import bar, doing
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
from measure.belief_pictures import plot_run
from measure.beliefs import DEALS, analyse, belief_in_words, words_at_once
from measure.pages import run_page
from measure.tracker import MetricTracker
from sources.foreign import SIMPLEXITY
from sources.foreign_checkpoints import checkpoint_in
from sources.foreign_ghmm import ALIASES, agree, config_beside, convert_checkpoint, is_source_checkpoint
from sources.processes import (  # noqa: F401
    PROCESSES,
    Process,
    all_parameters,
    counted,
    listing,
    make_process,
    parameters,
)

EXPERIMENT = "ghmm"  # what sample.py takes a run of this page for; a copy keeps it
# Of summary.json, said at the end.
HEADLINES = ("loss", "optimal_loss", "excess_loss", "r2_concat", "seconds")


@dataclass
class Config:
    # output
    out_dir: str = checkpoint.default_out_dir(__file__)  # run folder
    s3_config: str = ""  # .ini of a bucket that out_dir is copied to, see docs/runs.md
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    analyze: str = ""  # run folder or checkpoint to analyse instead of training
    out: str = ""  # with analyze: folder of what is written; default analysis/ of the run
    # data
    process: str | None = None  # by name, see below; default mess3, custom with matrices, nonergodic with components
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
    matrices: str | list | None = None  # custom: .npy or .npz file or list [V, S, S], T[x][i, j] = p(x, to j | from i)
    initial_state: list[float] | None = None  # where sequences start, [S]; default the stationary state
    add_bos: bool = False  # a token that begins every sequence
    add_eos: bool = False  # a token that ends a sequence with probability eos_prob at every step; then it starts anew
    eos_prob: float = 0.05  # see add_eos
    n_ctx: Count = 10  # tokens the model reads
    carry_state: bool = False  # each batch continues the sequences of the one before instead of starting anew
    # model
    model: Literal["transformer", "rnn", "gru", "lstm"] = "transformer"
    n_layers: Count = 4
    d_model: Count = 64  # width of the residual stream (transformer) or of the hidden state
    n_heads: Count = 1  # transformer: attention heads
    d_head: Count | None = None  # transformer: width of a head; default d_model / n_heads
    d_mlp: Count = 256  # transformer: width of the MLP
    act: Literal["relu", "gelu", "silu"] = "relu"  # transformer: nonlinearity of the MLP
    positional: Literal["learned", "rope", "none"] = "learned"  # transformer: positional encoding
    normalization: Literal["LN", "LNPre", "RMS", "RMSPre", "none"] = "LN"  # transformer; Pre learns no scale and shift
    norm_eps: Positive | None = None  # transformer: added to what a normalization divides by; default PyTorch's
    one_hot: bool = False  # recurrent: the first layer reads tokens as they are, without an embedding
    init_scale: Positive = 1.0  # factor on initial weight matrices; below 1 a network learns fewer, cleaner features
    writer_scale: Positive | None = None  # transformer: one more on those that write to the stream; default GPT-2's
    # optimizer
    batch_size: Count = 512  # sequences a step, over all ranks and micro-steps
    grad_accum: Count = 1  # micro-steps a step
    lr: NonNegative = 3e-3  # peak learning rate of AdamW
    min_lr: NonNegative = 0.0  # what cosine ends at
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_steps: Whole = 100  # linear warm-up
    max_steps: Count = 1_500  # optimizer steps
    weight_decay: NonNegative = 0.0
    beta1: Share = 0.9  # of AdamW
    beta2: Share = 0.95
    grad_clip: NonNegative = 1.0  # largest gradient norm; 0 does not clip
    # evaluation
    eval_interval: Count = 250  # steps between evaluations
    log_interval: Count = 50  # steps between log lines
    save_interval: Count | None = None  # steps between saves of last.pt and step_N.pt; default eval_interval
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    eval_sequences: Count = 2_048  # sampled contexts of an evaluation during training
    max_words: Count = 60_000  # final evaluation and analysis: all contexts if no more, else a third as many sampled
    last_token_only: bool = False  # analysis: full contexts only, not their prefixes
    deal_seed: Whole = 0  # analysis: deals contexts into those that fit a map and those it is judged on
    # system
    seed: Whole = 1337
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products: torch's own names
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only
    wandb: bool | Literal["online", "offline"] = False  # log to Weights & Biases
    tensorboard: bool = False  # log to TensorBoard

    def __post_init__(self):
        if self.process is None:
            own = "custom" if self.matrices else "nonergodic" if self.components else "mess3"
            self.process = own

    def head_width(self) -> int:
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @staticmethod
    def more_help() -> str:
        return listing()

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        wrong = []
        if self.seed >= 2**63:
            wrong.append(f"seed = {self.seed}: must be below 2**63")
        if self.model == "transformer" and self.d_head is None and self.d_model % self.n_heads:
            wrong.append(f"d_model = {self.d_model} is no multiple of n_heads = {self.n_heads}: set d_head")
        elif self.model == "transformer" and self.positional == "rope" and self.head_width() % 2:
            wrong.append(f"positional = rope needs an even head width, not {self.head_width()}: set d_head")
        if self.carry_state and (self.initial_state or self.add_bos):
            wrong.append("carry_state continues sequences, so it goes with neither initial_state nor add_bos")
        return wrong


# ---------------------------------------------------------------------------------------------------------------
# Batches, and contexts to evaluate on
# ---------------------------------------------------------------------------------------------------------------
# Only this section knows what the data are. For a process of your own, add a function to PROCESSES. For data that are
# no process (a text, recorded tokens), give build_process, entropy_floor, Batches.__call__ and make_contexts bodies of
# your own, and evaluate a plain cross entropy: without a floor and beliefs, what is said of them is left out.


def build_process(cfg: Config) -> Process:
    """The process of the settings: any function of sources/processes.py, or one that a copy adds to PROCESSES.

    Its parameters are the settings of the same names. One left at None takes the process's own default, one that was
    set for another process is refused.
    """
    params = {}
    for name in all_parameters():
        value = getattr(cfg, name, None)
        # A setting with a default, such as seed, is not a process's alone: of another process it is no mistake.
        has_default = getattr(Config, name, None) is not None
        if value is not None and (name in parameters(cfg.process) or not has_default):
            params[name] = value
    return make_process(cfg.process, initial_state=cfg.initial_state, add_bos=cfg.add_bos, add_eos=cfg.add_eos,
                        eos_prob=cfg.eos_prob, **params)


def entropy_floor(process: Process, n_ctx: int) -> tuple[torch.Tensor, float]:
    """(floor [T] in nats, its error): no model that reads n_ctx tokens can have a lower loss. Zeros: not known."""
    # H(next token | the first t tokens) for t = 1 ... T. Without a token before it nothing is predicted: no t = 0.
    with doing(f"the entropy of the next token after 1 to {n_ctx:,} tokens"):
        entropies = process.entropies(n_ctx)[1:]
    return torch.tensor(entropies, dtype=torch.float64), max(entropy.error for entropy in entropies)


def exact_device(rt: Runtime) -> torch.device:
    """Where processes live: beside the model, except that Metal lacks their float64."""
    return torch.device("cpu") if rt.device.type == "mps" else rt.device


class Batches:
    """Fresh sequences at every step, drawn on the device.

    The uniforms of step i are a pure function of (seed, i); rank r turns its share into tokens. Any number of ranks
    thus trains on the same data, and resuming needs no loader state (but `carried`, where sequences go on).
    """

    def __init__(self, rt: Runtime, process: Process, cfg: Config):
        self.rt, self.process, self.cfg = rt, process, cfg
        self.carried = None

    def __call__(self, step: int) -> torch.Tensor:
        """This rank's tokens of a step, [B / world_size, n_ctx + 1]."""
        # Uniform numbers of all ranks' sequences: one starts a sequence, one more draws each of its n_ctx + 1 tokens.
        generator = self.rt.generator(step, device=self.process.device)
        shape = (self.cfg.batch_size, self.cfg.n_ctx + 2)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        # Only this rank's share becomes tokens, time first: the process steps through all sequences at once.
        uniforms = self.rt.share(uniforms).t().contiguous()  # [n_ctx + 2, B]
        tokens, state = self.process.generate(uniforms, self.carried)
        if self.cfg.carry_state:
            self.carried = state  # hidden states, or beliefs of a process that has none: where the next batch goes on
        return tokens.to(self.rt.device)

    def left(self) -> torch.Tensor | None:
        """Where this rank's sequences stand, for a checkpoint: states [B] or beliefs [B, S], on the CPU."""
        return None if self.carried is None else self.carried.cpu()

    def take_up(self, left: list[torch.Tensor | None]) -> None:
        """Go on where the ranks of a checkpoint, however many there were, left their sequences.

        Raises InputError if there were more or fewer sequences than now, or if they are of a process of other states.
        """
        if not self.cfg.carry_state or left[0] is None:
            return
        # Sequence b of rank r of R is number b R + r of the batch, whose new shares are taken from there.
        try:
            state = torch.stack(left, 1).flatten(0, 1)  # [B] or [B, S]
        except (TypeError, RuntimeError, IndexError) as e:
            raise InputError(f"the checkpoint's ranks do not say where their sequences stand ({reason(e)})") from e
        if len(state) != self.cfg.batch_size:
            sequences = counted(len(state), "sequence")
            raise InputError(f"carry_state goes on with {sequences}, but batch_size = {self.cfg.batch_size}: "
                             f"use batch_size={len(state)}, or resume=never")
        if not self.process.can_start_from(state):
            raise InputError(f"carry_state goes on with sequences of another process than {self.process.name}: use "
                             "carry_state=false, or the process they are of, or resume=never")
        self.carried = self.rt.share(state).to(self.process.device)


class Contexts(NamedTuple):
    """Words to evaluate on, in lexicographic order, with what is known of each.

    words [N, T]; weights [N] sum to 1; optimal [N, T, V]: true probabilities of the next token after each token;
    beliefs [N, T, S] after each token, or None where there are none to look for; exact: whether all words are there;
    states: what pictures call the S states.
    """

    words: torch.Tensor
    weights: torch.Tensor
    optimal: torch.Tensor
    beliefs: torch.Tensor | None
    exact: bool
    states: list[str] | None = None


def make_contexts(process: Process, length: int, max_words: int, samples: int, seed: int) -> Contexts:
    """All words of the length with their probabilities if there are at most max_words, else distinct sampled ones."""
    every = process.all_words(length, max_words)
    if every is not None:
        words, weights = every
    else:
        generator = torch.Generator(process.device).manual_seed(seed)
        sampled = process.sample(samples, length, generator)
        words, counts = torch.unique(sampled, dim=0, return_counts=True)  # sorted; each word once, as often as it came
        weights = counts.double()
    # The belief after a token knows all that the tokens so far say of the next: p(x | belief) = belief T[x] r.
    beliefs = process.beliefs(words)[:, 1:]  # [N, T, S], without the one before the first token
    optimal = process.next_token_probs(beliefs)  # [N, T, V]
    return Contexts(words, weights / weights.sum(), optimal, beliefs, every is not None, process.state_names)


def final_contexts(process: Process, cfg: Config) -> Contexts:
    """The contexts of the final evaluation and analysis, others than those evaluated on while training."""
    with doing(f"contexts of {cfg.n_ctx:,} tokens for the final evaluation"):
        return make_contexts(process, cfg.n_ctx, cfg.max_words, cfg.max_words // 3 + 1, cfg.seed + 1)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
def build_norm(cfg: Config) -> nn.Module:
    learned = not cfg.normalization.endswith("Pre")
    if cfg.normalization.startswith("LN"):
        return nn.LayerNorm(cfg.d_model, cfg.norm_eps or 1e-5, elementwise_affine=learned)
    if cfg.normalization.startswith("RMS"):
        return nn.RMSNorm(cfg.d_model, cfg.norm_eps, elementwise_affine=learned)
    return nn.Identity()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) for queries or keys [B, H, T, C], C even."""
    T, C = x.shape[-2:]
    # Pair c = 0 ... C/2 - 1 turns by the angle t w_c at position t, w_c = 10000^(-2c / C): the product of a query and a
    # key then depends on the distance of their positions only.
    speed = 10_000.0 ** (-torch.arange(0, C, 2, device=x.device) / C)  # [C / 2]
    position = torch.arange(T, device=x.device)
    angle = position[:, None] * speed  # [T, C / 2]
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    # A pair is an entry of the left half with its counterpart in the right half.
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: Config):
        super().__init__()
        width = cfg.n_heads * cfg.head_width()
        self.n_heads = cfg.n_heads
        self.rope = cfg.positional == "rope"
        self.attention_norm = build_norm(cfg)
        self.mlp_norm = build_norm(cfg)
        self.qkv = nn.Linear(cfg.d_model, 3 * width)
        self.attention_out = nn.Linear(width, cfg.d_model)
        self.mlp_in = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.mlp_out = nn.Linear(cfg.d_mlp, cfg.d_model)
        # In place: half the memory traffic of the widest tensor.
        self.act = {"relu": F.relu_, "gelu": F.gelu, "silu": F.silu}[cfg.act]

    def forward(self, x: torch.Tensor, B: int) -> torch.Tensor:
        """x [B*T, D] -> [B*T, D]. Rows stay flat: in-place operations on views of 3-D tensors would copy them."""
        # Attention, causal: position t reads positions up to t. Queries, keys and values come from one product.
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.view(B, len(x) // B, 3, self.n_heads, -1)  # [B, T, 3, H, C]
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, H, T, C]
        if self.rope:
            q, k = rotate(q), rotate(k)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(len(x), -1)  # [B*T, H*C]
        x = x + self.attention_out(attended)
        # MLP, at each position on its own.
        hidden = self.act(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out(hidden)


class Transformer(nn.Module):
    """Decoder-only transformer. The activations are the residual stream after the embedding and after every block."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.position = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model)) if cfg.positional == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm = build_norm(cfg)
        self.unembed = nn.Linear(cfg.d_model, vocab_size)
        # Weights of standard deviation D^-1/2 keep the scale of what they read. What writes to the stream, twice a
        # layer, is smaller by the root of the number of writers, so that their sum does not grow with depth (GPT-2).
        writer_scale = cfg.writer_scale or (2 * cfg.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("_out.weight"):
                nn.init.normal_(parameter, std=writer_scale * cfg.d_model**-0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=cfg.d_model**-0.5)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """tokens [B, T] -> logits [B, T, V], activations [n_layers + 1] of [B, T, D]."""
        B, T = tokens.shape
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position[:T]  # learned positions; rotary ones act inside attention
        x = x.flatten(0, 1)  # [B*T, D]
        # The residual stream is kept at every depth: where the belief is looked for.
        activations = [x]
        for block in self.blocks:
            x = block(x, B)
            activations.append(x)
        logits = self.unembed(self.final_norm(x))
        return logits.view(B, T, -1), [activation.view(B, T, -1) for activation in activations]


class Recurrent(nn.Module):
    """A stack of rnn, gru or lstm layers. The activations are the embedding and the hidden state of every layer."""

    def __init__(self, cfg: Config, vocab_size: int):
        super().__init__()
        layer = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cfg.model]
        D = cfg.d_model
        self.embed = None if cfg.one_hot else nn.Embedding(vocab_size, D)
        self.register_buffer("identity", torch.eye(vocab_size) if cfg.one_hot else None, persistent=False)
        # One layer a module instead of one module of n layers, which would return the last layer's states only.
        first = vocab_size if cfg.one_hot else D
        widths = [first] + [D] * (cfg.n_layers - 1)
        self.layers = nn.ModuleList(layer(width, D, batch_first=True) for width in widths)
        self.unembed = nn.Linear(D, vocab_size)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """tokens [B, T] -> logits [B, T, V], activations [n_layers + 1] of [B, T, D]."""
        x = F.embedding(tokens, self.identity) if self.embed is None else self.embed(tokens)
        activations = [x]
        for layer in self.layers:
            x, _ = layer(x)  # [B, T, D] its hidden state after every token
            activations.append(x)
        return self.unembed(x), activations


def build_model(cfg: Config, vocab_size: int) -> nn.Module:
    """The model of the settings. Yours goes here: it maps tokens to (logits, activations) as the two above do."""
    model = Transformer(cfg, vocab_size) if cfg.model == "transformer" else Recurrent(cfg, vocab_size)
    # Small initial weights make a network learn its features one by one instead of using the random ones it has.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= cfg.init_scale
    return model


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------
def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats, -log softmax(logits)[target], of targets [B, T] under logits [B, T, V]."""
    logits = logits.flatten(0, 1).float()  # bf16 is too coarse for a softmax
    return F.cross_entropy(logits, targets.flatten())


def training_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What a step minimizes, of tokens [B, T + 1]: each position predicts the token after it. Yours goes here."""
    logits, _ = model(tokens[:, :-1])
    return next_token_loss(logits, tokens[:, 1:])


def train_step(model: nn.Module, tokens: torch.Tensor, rt: Runtime, cfg: Config) -> torch.Tensor:
    """Forward and backward over the micro-batches of tokens [B, T + 1]; returns the mean loss over ranks."""
    total = torch.zeros((), device=rt.device)
    for i, part in enumerate(tokens.chunk(cfg.grad_accum)):
        is_last = i == cfg.grad_accum - 1
        with rt.sync(model, is_last):  # ranks exchange gradients once a step, with the last micro-batch
            with rt.autocast():
                loss = training_loss(model, part) / cfg.grad_accum  # gradients add up: to that of the mean
            rt.backward(loss)
        total += loss.detach()
    return rt.mean(total)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model: nn.Module, contexts: Contexts, floor: torch.Tensor, rt: Runtime, batch: int | None = None,
             told: bool = False) -> dict:
    """Loss against the floor [T], by position. Collective: ranks share the contexts. batch: words at once.

    told: whether to say how far it is, where that takes long.

    The loss is not measured on drawn targets but is floor + KL(optimal || model), its exact mean over the next token:
    an excess of 1e-4 nats shows on a few thousand contexts, where drawn targets would need some 10^8.
    """
    # Each rank takes its share of the contexts; a context counts by its probability.
    words = rt.share(contexts.words)
    weights = rt.share(contexts.weights)
    optimal = rt.share(contexts.optimal)
    divergence = torch.zeros_like(floor, device=words.device)  # [T]
    batch = batch or words_at_once(len(floor))  # fewer of longer words: memory stays the same
    model.eval()
    for begin in bar(range(0, len(words), batch), f"evaluating on {len(contexts.words):,} contexts", active=told):
        rows = slice(begin, begin + batch)
        with rt.autocast():
            logits, _ = model(words[rows].to(rt.device))
        # The model's predictions q beside the true ones p, in float64: their difference may be tiny.
        p = optimal[rows]  # [B, T, V]
        log_q = F.log_softmax(logits.to(p.device).to(p), -1)  # on to float64 where there is one: Metal has none
        # H(p, q), the loss on these contexts. A token that cannot come (p = 0) adds nothing, whatever its log q.
        cross_entropy = -torch.where(p > 0, p * log_q, 0).sum(-1)  # [B, T]
        entropy = -torch.xlogy(p, p).sum(-1)
        # KL(p || q) = H(p, q) - H(p), a mean over contexts by their probability.
        divergence += weights[rows] @ (cross_entropy - entropy)
    model.train()
    divergence = rt.sum(divergence).cpu()
    # The floor is the entropy over all contexts, not over these: a sample of them moves only the small divergence.
    loss = floor + divergence
    return {
        "loss": float(loss.mean()),
        "optimal_loss": float(floor.mean()),
        "excess_loss": float(divergence.mean()),
        "loss_by_position": loss.tolist(),
        "optimal_loss_by_position": floor.tolist(),
        "kl_by_position": divergence.tolist(),
    }


def analyse_beliefs(model: nn.Module, contexts: Contexts, cfg: Config, rt: Runtime, deals: int = DEALS
                    ) -> tuple[dict, dict]:
    """(analysis, what its pictures need): how much of the belief a linear map reads out of the activations."""
    # The control: this network as initialised. Random features of the context hold some of the belief too.
    rt.reseed()
    untrained = build_model(cfg, contexts.optimal.shape[-1]).to(rt.device)
    # Its deals have a seed of their own: how they fall is no part of how the network was trained.
    return analyse(model, untrained, contexts, rt.device, cfg.last_token_only, cfg.deal_seed, deals)


def rehearse(model: nn.Module, contexts: Contexts, floor: torch.Tensor, cfg: Config, rt: Runtime) -> None:
    """What training and its end ask of the model, asked of 64 contexts: an edited copy fails here, not at the end."""
    few = contexts._replace(
        words=contexts.words[:64],
        weights=contexts.weights[:64],
        optimal=contexts.optimal[:64],
        beliefs=None if contexts.beliefs is None else contexts.beliefs[:64],
    )
    with rehearsal():
        # As in training: loss and gradient.
        tokens = few.words.to(rt.device)
        tokens = torch.cat([tokens, tokens[:, :1]], 1)  # [64, T + 1]; any last token will do
        with rt.autocast():
            loss = training_loss(model, tokens)
        loss.backward()
        model.zero_grad(set_to_none=True)
        # As at the end: loss by position, activations of every layer, regression.
        evaluate(model, few, floor, rt)
        if few.beliefs is not None:
            analyse_beliefs(model, few, cfg, rt, deals=1)


def finish(model: nn.Module, contexts: Contexts, floor: torch.Tensor, cfg: Config, rt: Runtime, folder: Path,
           title: str) -> dict:
    """Final evaluation, analysis.json and pictures; returns the metrics of summary.json. Collective."""
    result = evaluate(model, contexts, floor, rt, told=True)
    if rt.is_main:  # the regression is one problem and takes seconds: one rank does it
        folder.mkdir(parents=True, exist_ok=True)
        analysis, geometry = None, None
        if contexts.beliefs is not None:
            analysis, geometry = analyse_beliefs(model, contexts, cfg, rt)
            write_json(folder / "analysis.json", analysis | {"evaluation": result})
            # What the summary says of the belief: r2 by layer and of all, its spread over deals, the controls.
            for name, value in analysis.items():
                if "r2" in name:
                    result[name] = value
        plot_run(folder, title, result, analysis, geometry)
        result["exact"] = contexts.exact
        result["verdict"] = f"{title}: {verdict(result)}"
    rt.barrier()
    return result


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
NO_FLOOR = 1e-9  # below, in nats, the floor is that of a process without chance, or is not known


def describe(process: Process, model: nn.Module, floor: torch.Tensor, error: float, cfg: Config) -> str:
    """What is trained on what, in two lines; between them what was done to matrices that could not stay as given."""
    size = sum(parameter.numel() for parameter in model.parameters())
    tokens = counted(process.vocab_size, "token")
    states = counted(process.num_states, "state")
    parts = [
        f"process {process.name}: {tokens}, {states}",
        f"{cfg.model}: {size:,} parameters",
        f"{counted(cfg.batch_size * cfg.n_ctx, 'token')} a step",
        cfg.out_dir,
    ]
    exact = f"+- {error:.1e}" if error else "(exact)"
    notes = getattr(process, "notes", [])
    told = f"floor {floor.mean():.6f} nats a token {exact}"
    if float(floor.mean()) < NO_FLOOR:
        told = "floor 0, or not known"
    return "\n".join([" | ".join(parts), *notes, told])


def in_words(result: dict) -> str:
    """The loss and, where there is a floor, how far it is above. Of a floor of 0 there is no percent."""
    if result["optimal_loss"] < NO_FLOOR:
        return f"loss {result['loss']:.6f} nats"
    excess = result["excess_loss"]
    return f"loss {result['loss']:.6f} | excess {excess:.6f} nats ({excess / result['optimal_loss']:.3%})"


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises InputError (bad input, before anything is written) and FloatingPointError (the loss).
    """
    began = time.perf_counter()
    with Runtime(cfg) as rt, store.run_folder(cfg, rt) as folder:
        # Data: a process, its floor, batches of it, and the contexts to evaluate on while training and at the end.
        rt.divide(cfg.batch_size, cfg.grad_accum)
        process = build_process(cfg)
        floor, error = entropy_floor(process, cfg.n_ctx)
        data = data_of(cfg, process)
        process.to(exact_device(rt))
        batches = Batches(rt, process, cfg)
        contexts = make_contexts(process, cfg.n_ctx, cfg.eval_sequences, cfg.eval_sequences, cfg.seed)
        final = final_contexts(process, cfg)

        # Model and optimizer, tried out before anything is written.
        model = rt.build(build_model, cfg, process.vocab_size).to(rt.device)
        params = list(model.parameters())
        optimizer = rt.adamw(params, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
        tracker = MetricTracker(model, optimizer, float(floor.mean()))
        rehearse(model, final, floor, cfg, rt)

        # Start: anew, or where a checkpoint stopped.
        step, best = 0, math.inf
        path, state, changes = checkpoint.start_from(
            rt, cfg, folder, __file__, lambda old, path: differences(old, cfg, ALIASES, path), data, tracker=dict
        )
        summary = ended_before(rt, folder, path, state, changes, HEADLINES)
        if summary:
            return summary
        meter = Meter(rt, cfg.batch_size * cfg.n_ctx, began, state)
        if state:
            step, best, extra, _ = checkpoint.restore(rt, state, path, model, optimizer)
            tracker.load_state_dict(extra["tracker"], path)
            batches.take_up([rank.get("carried") for rank in state["ranks"]])
        trained = rt.wrap(model)  # what steps go through: compiled and synchronised; `model` is the same weights

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, cfg.max_steps, data) as log:
            if rt.is_main:
                checkpoint.clear(folder, step, best, cfg.keep_last)
            # The first lines: the machine, what is trained on what, where it starts.
            log.say(rt.describe())
            log.say(describe(process, model, floor, error, cfg))
            if state:  # with the settings that changed since, a line each
                log.resumed(path, step, changes)
            else:  # progress counts from here
                untrained = evaluate(model, contexts, floor, rt)
                tracker.record_initial_loss(untrained["loss"])
            meter.start(step)
            while step < cfg.max_steps:
                tokens = batches(step)  # [B, T + 1]
                lr = learning_rate(step, cfg)
                loss = train_step(trained, tokens, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)  # of the gradient, before it is clipped
                step += 1
                meter.check(step, loss)
                log.progress(step, loss, meter)
                due = rt.due(step, cfg.max_steps, cfg.log_interval, cfg.eval_interval, cfg.save_interval)
                # Sums over all steps, on the device. Costly metrics are norms over all parameters.
                metrics = tracker.update(step=step, loss=loss, tokens_in_batch=meter.units_per_step, grad_norm=norm,
                                         log=due.logs, costly=due.evaluates)
                if due.nothing:
                    continue

                # Numbers are read from the device here and only here: a read waits for all queued work.
                speed = meter.pause(step, model, lr)
                if due.logs:
                    left = (cfg.max_steps - step) * meter.units_per_step / speed
                    log.train(step, metrics, lr, norm, speed, left, loss=metrics["loss/ema"], floor=float(floor.mean()))
                # Evaluation on the same contexts each time: its noise does not hide the progress.
                improved = False
                if due.evaluates:
                    result = evaluate(model, contexts, floor, rt)
                    improved = result["loss"] < best
                    best = min(best, result["loss"])
                    log.metrics(step, "eval", result)
                    log.say(f"step {step:>6} eval | {in_words(result)}{' *' if improved else ''}")
                # All that it takes to go on to the bit. Collective, as each rank has random numbers and sequences.
                if due.saves or improved:
                    extra = {"data": data, "tracker": tracker.state_dict()}
                    rank_extra = {"carried": batches.left()}
                    saved = checkpoint.capture(
                        rt, __file__, config_dict(cfg), step, model, optimizer, best, meter, extra, rank_extra
                    )
                    if rt.is_main:
                        checkpoint.save(saved, folder, improved, cfg.keep_last != 0, cfg.keep_last)
                # A signal came, and the state is saved.
                if due.stops:
                    log.stopped(step)
                    return {"stopped_at": step}
                meter.start(step)  # what came between pause and here is no training time

            title = f"{process.name}, {cfg.model}, {counted(step, 'step')}"
            result = finish(model, final, floor, cfg, rt, folder, title)
            summary = result | run_facts(rt, step, meter) | {"config_hash": config_hash(cfg)}
            log.summary(summary, HEADLINES)
            if rt.is_main:
                log.say(run_page(folder, Config))
            return summary


def verdict(summary: dict) -> str:
    """The result in words."""
    # The loss, in percent of its floor where that is above 0.
    text = f"loss {summary['loss']:.5f} nats a token"
    floor = summary["optimal_loss"]
    if floor >= NO_FLOOR:
        text += f", {summary['excess_loss'] / floor:.3%} above the floor {floor:.5f}, the least possible"
    # The belief, beside what the network held of it before it was trained.
    if "r2_concat" in summary:
        text += f"; {belief_in_words(summary)}"
    return text


def data_of(cfg: Config, process: Process) -> dict[str, str]:
    """{what names the matrices: their fingerprint}, which is empty where settings say all; see checkpoint.same_data."""
    name = cfg.matrices or "components"  # those that read matrices of their own
    return {str(name): getattr(process, "fingerprint", "")}


def load_run(path: Path, device: str = "auto") -> tuple[Config, Process, nn.Module, int]:
    """(settings, process, model, steps done) of a run folder or checkpoint, on the CPU; the settings name `device`.

    A checkpoint of Simplexity is read with the config.yaml of its run.
    Raises CheckpointError for a missing, damaged or foreign file.
    """
    path = checkpoint_in(path)
    if is_source_checkpoint(path):
        return load_source(path, device)
    state = checkpoint.load(path, __file__)
    cfg = from_dict(Config, state["config"], str(path), ALIASES)
    cfg.device = device  # that of this machine, not of the one it was trained on
    process = build_process(cfg)
    checkpoint.same_data(state["extra"], data_of(cfg, process), path)
    model = checkpoint.build_with(state["model"], path, lambda: build_model(cfg, process.vocab_size))
    return cfg, process, model, state["step"]


def load_source(path: Path, device: str) -> tuple[Config, Process, nn.Module, int]:
    """What load_run returns, of a checkpoint of Simplexity."""
    cfg = configure(Config, [str(config_beside(path)), "--dialect=simplexity"], ALIASES, SIMPLEXITY)
    process = build_process(cfg)
    told, weights, step = convert_checkpoint(path)
    cfg = Config(**agree(told, config_dict(cfg), process.vocab_size, path))
    cfg.device = device
    if "position" in weights:
        weights["position"] = weights["position"][: cfg.n_ctx]  # it was trained on no longer sequences
    model = checkpoint.build_with(weights, path, lambda: build_model(cfg, process.vocab_size))
    return cfg, process, model, step


def analyze(cfg: Config) -> dict:
    """The final evaluation, analysis and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = store.local(cfg.analyze)
    folder = checkpoint.analysis_of(path, cfg)
    run, process, model, step = load_run(path, cfg.device)
    # The settings are the run's, but for what was asked for here and changes no weight.
    take_over(run, cfg, "precision", "matmul_precision", "max_words", "last_token_only", "deal_seed")
    with Runtime(run) as rt:
        floor, _ = entropy_floor(process, run.n_ctx)
        process.to(exact_device(rt))
        contexts = final_contexts(process, run)
        title = f"{process.name}, {run.model}, {counted(step, 'step')}"
        result = finish(model.to(rt.device), contexts, floor, run, rt, folder, title)
        if rt.is_main:
            say_again(step, result, HEADLINES, run_page(folder, Config, result))
    return result


def main(argv: list[str] | None = None) -> dict:
    with clear_errors():
        cfg = configure(Config, argv, ALIASES, SIMPLEXITY)
        process = cfg.matrices if isinstance(cfg.matrices, str) else cfg.process
        first_line(__file__, cfg, f"{process}, {cfg.model}, {counted(cfg.max_steps, 'step')}")
        return analyze(cfg) if cfg.analyze else train(cfg)


if __name__ == "__main__":
    main()
