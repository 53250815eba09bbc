"""Train a language model on documents of K kinds, and see it find out in context which kind it reads.

A document comes from one of K ergodic components (categories, or hidden Markov processes) and does not say which. A
model that predicts well must infer it: the cross entropy (XE) falls with the position in the context towards the
component's own, and what is lost on the way is information: summed over positions, XE of the mixture less XE with the
component known is I(component; document) <= log K nats. On synthetic documents both are known exactly.

    python train_arxiv.py                                      # 4 hidden Markov components beside the exact optimum
    python train_arxiv.py --study=nested:1,2,4 --jobs=2 --out_dir=out/nested    # XE against K: 9 runs, 8 minutes
    python train_arxiv.py config/arxiv.py --study=all31 --controls     # every subset of five arXiv categories
    python train_arxiv.py --report=out/nested                  # the report again, of the runs that there are
    torchrun --nproc_per_node=8 train_arxiv.py config/arxiv.py

The default takes 2 minutes on two cores and ends within 1% of the optimum at every position. The model is GPT-2's
(Radford et al. 2019); the budget and the subsets of categories are those of the source, ICL-non-ergodic-arxiv.

Dimensions: B batch, n tokens of a chunk, T = n - 1 predictions (position t is made after t tokens), V tokens of the
vocabulary, D width, H heads, K components, R chunks, M documents.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import DataError, clear_errors, rehearsal  # isort: skip

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import checkpoint, store
from common.ahead import send
from common.runlog import RunLog, ended_before, first_line, read_metrics, run_facts, say_again, write_json
from common.runtime import Meter, Runtime, learning_rate
from common.telling import bar
from configurator import (
    Count,
    NonNegative,
    Share,
    Whole,
    config_dict,
    config_hash,
    configure,
    differences,
    from_dict,
    take_over,
)
from kernels.dropout import attention, dropout
from kernels.mean_xe import mean_xe, row_xe
from measure.curves import (
    TOGETHER,
    Curves,
    draw_run,
    gains,
    information,
    measure,
    oracle_curves,
    probe,
    probed_positions,
    residual_stream,
    summarize,
    verdict,
    write_curves,
    write_documents,
)
from measure.pages import run_page
from measure.report import training_facts
from measure.speed import matmul_rate
from sources.chunks import copy_tokenizer, test_chunks, train_and_validation, whole_documents
from sources.ergodic import ergodic
from sources.foreign import ICL
from sources.foreign_arxiv import ALIASES, source_checkpoint, without_last_position
from sources.foreign_checkpoints import checkpoint_in
from sources.shared import closest, counted, counter_rng, make_once, quoted
from sources.study_arxiv import STUDIES

EXPERIMENT = "arxiv"  # what sample.py treats a run of this page as; a copy keeps it
# Of summary.json, said at the end.
HEADLINES = ("test_xe", "val_xe", "icl_gain", "oracle_icl_gain", "largest_relative_excess", "seconds")
SYNTHETIC = "data/ergodic"  # made when it is missing
MOST_RESAMPLES = 100_000


@dataclass
class Config:
    # output
    out_dir: str = checkpoint.default_out_dir(__file__)  # run folder; of a study, the folder of its runs
    s3_config: str = ""  # .ini of a bucket that out_dir is copied to, see docs/runs.md
    resume: str = "auto"  # auto: go on from out_dir/last.pt if there is one | never: start anew | path of a checkpoint
    load_checkpoint_step: int | None = None  # go on from out_dir/step_N.pt
    analyze: str = ""  # run folder or checkpoint to measure again instead of training
    out: str = ""  # with analyze: folder of what is written; default analysis/ of the run
    # data
    data: str = SYNTHETIC  # folder of train.h5 and validation.h5, by prepare_data.py arxiv or ergodic; or one of them
    validation_data: str = ""  # file of validation chunks, where it is not beside the other
    categories: list[str] | None = None  # what to train on, K names; default all in the file. Others count as unseen
    budget: Literal["constant", "tokens", "proportional"] = "constant"  # constant: smallest category / K chunks of each
    budget_tokens: Count | None = None  # of budget=tokens: all categories together
    choice: Literal["random", "first"] = "random"  # which chunks of a category make its share
    control_of: Count | None = None  # marks a run on one category, by its share of K: a study has it beside those of K
    allow_short: bool = False  # take what there is where a category has less than its share
    random_windows: bool = False  # start each chunk at a random token, where its document goes on
    # model
    n_layers: Count = 2
    d_model: Count = 64  # width
    n_heads: Count = 2
    d_mlp: Count = 256
    dropout: Share = 0.0
    init: Literal["waves", "normal"] = "waves"  # positions start as sinusoids, writes to the stream small | all alike
    # optimizer
    batch_size: Count = 32  # chunks a step, over all ranks and micro-steps
    grad_accum: Count = 1  # micro-steps a step
    lr: NonNegative = 4e-3  # peak learning rate of AdamW
    min_lr: NonNegative | None = None  # what cosine ends at; default lr / 10
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    schedule_over: Literal["steps", "epochs"] = "steps"  # epochs: as if max_steps did not stop it before their end
    warmup_steps: Whole = 100  # linear warm-up
    epochs: Count = 4  # passes over the training chunks
    max_steps: Count | None = None  # optimizer steps; default as the epochs have
    weight_decay: NonNegative = 0.1
    decay: Literal["matrices", "all"] = "matrices"  # what decays; all: norms and biases too
    beta1: Share = 0.9
    beta2: Share = 0.95
    grad_clip: NonNegative = 1.0  # largest gradient norm; 0 does not clip
    patience: Whole = 10  # evaluations without improvement to stop after; 0: never, as in a study
    min_delta: NonNegative = 1e-3  # improvement in nats that counts
    # evaluation
    eval_interval: Count | None = None  # steps between evaluations; default eval_epochs
    eval_epochs: Count = 1  # epochs between evaluations
    log_interval: Count = 50  # steps between log lines
    save_interval: Count | None = None  # steps between saves of last.pt; default eval_interval
    keep_last: int = 0  # newest step_N.pt files to keep; 0 writes none, -1 keeps all
    eval_chunks: Count = 1_000  # validation chunks of a category, during training; the final evaluation uses all
    final_split: Literal["test", "validation"] = "test"  # what the final numbers are of; validation has chosen best.pt
    icl_early: Count | None = None  # in-context score: XE after icl_late tokens less XE after icl_early; default 10
    icl_late: Count | None = None  # default all that there are
    bootstrap: Count = 1_000  # resamples of documents for 95% intervals
    probe: bool = True  # linear probe of the component by position and layer
    # system
    seed: Whole = 1337
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products: torch's own names
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA only
    wandb: bool | Literal["online", "offline"] = False  # log to Weights & Biases; project and entity below or from .env
    wandb_project: str = ""
    wandb_entity: str = ""
    tensorboard: bool = False  # log to TensorBoard
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"  # DEBUG: every step, all settings

    def __post_init__(self):
        if self.min_lr is None:
            self.min_lr = self.lr / 10

    @staticmethod
    def more_help() -> str:
        return STUDIES

    def check(self) -> list[str]:
        """What is wrong with the combination of settings, a sentence each."""
        wrong = []
        if self.d_model % self.n_heads:
            wrong.append(f"d_model = {self.d_model} is no multiple of n_heads = {self.n_heads}")
        if (self.budget == "tokens") != (self.budget_tokens is not None):
            wrong.append("budget = tokens and budget_tokens go together")
        if self.bootstrap > MOST_RESAMPLES:
            wrong.append(f"bootstrap = {self.bootstrap:,} resamples lie in memory together: take at most "
                         f"{MOST_RESAMPLES:,}")
        if self.control_of and len(self.categories or ()) != 1:
            wrong.append(f"control_of = {self.control_of} is of a run on one category: name it with categories")
        if self.categories is not None and (not self.categories or len(set(self.categories)) != len(self.categories)):
            wrong.append(f"categories = {self.categories}: name at least one, and each once")
        return wrong


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Chunks:
    """Token chunks of documents of several categories: all that this page asks of a data set."""

    tokens: np.ndarray  # [R, n], a memory map: gathered from, never held in memory
    codes: np.ndarray  # [R], the category of each chunk, as a number into names
    documents: np.ndarray  # [R], the document of each chunk; its chunks follow one another
    names: list[str]
    vocab_size: int
    budget: int  # chunks to train on, whatever K: those of the smallest category
    oracle: np.ndarray | None = None  # [R, all components, n]: log p_k(x_t | x_<t), where the processes are known
    fingerprint: str = ""  # of the content; a checkpoint keeps it
    split: str = "validation"  # what results call the numbers measured on these

    @property
    def size(self) -> int:
        """Tokens of a chunk, n."""
        return self.tokens.shape[1]

    @property
    def n_ctx(self) -> int:
        """Positions that predict, T: the last token of a chunk is predicted, and never read."""
        return self.size - 1

    def code(self, name: str) -> int:
        return self.names.index(name)

    def rows(self, name: str) -> np.ndarray:
        """Rows of a category, in their order."""
        return np.flatnonzero(self.codes == self.code(name))


def open_data(cfg: Config, vocab_size: int = 0) -> tuple[Chunks, Chunks]:
    """(train, validation); the synthetic default is made where it is missing. vocab_size: the least, if known."""
    if cfg.data == SYNTHETIC:
        make_once(Path(cfg.data) / "validation.h5", lambda: ergodic(out_dir=cfg.data))
    train, validation = train_and_validation(cfg.data, cfg.validation_data, vocab_size)
    return Chunks(**train), Chunks(**validation)


def final_chunks(cfg: Config, train: Chunks, validation: Chunks) -> Chunks:
    """What the final numbers are measured on: not what has chosen the weights, where there are test data."""
    test = test_chunks(cfg.data, train) if cfg.final_split == "test" else None
    return Chunks(**test, split="test") if test else validation


def active_categories(train: Chunks, validation: Chunks, cfg: Config) -> list[str]:
    """What to train on. Raises DataError, naming the nearest category for a misspelt one."""
    for name in TOGETHER:  # results name groups of categories so
        if name in validation.names:
            raise DataError(f"{cfg.data}: a category is called {name!r}, as results call several together: prepare it "
                            "by another name")
    active = train.names if cfg.categories is None else cfg.categories
    for name in active:
        if name not in train.names or name not in validation.names:
            hint = closest(name, train.names) or "."
            raise DataError(f"{cfg.data} has no category {name!r}{hint} It has: {quoted(train.names)}")
    return list(active)


def training_rows(train: Chunks, active: list[str], cfg: Config) -> np.ndarray:
    """Rows to train on: each active category's share of the token budget, sorted.

    constant: B / K chunks of each, with B the chunks of the smallest category of the file, so that the total does not
    depend on K (to within K chunks). tokens: the same from budget_tokens. proportional: B in all, in proportion to
    what there is of each category. With random_windows a random share is of whole documents (to within one). Raises
    DataError if a category has less than its share, unless allow_short.
    """
    budget = train.budget
    if cfg.budget == "tokens":
        budget = cfg.budget_tokens // train.size
    available = sum(len(train.rows(name)) for name in active)
    chosen = []
    for name in active:
        rows = train.rows(name)
        # Equal shares: runs of different K then differ in what they read, not in how much.
        share = budget // len(active)
        if cfg.budget == "proportional":
            share = budget * len(rows) // available
        if share < 1:
            raise DataError(f"the budget of {budget} chunks is less than one for each of {len(active)} categories")
        if share > len(rows) and not cfg.allow_short:
            raise DataError(f"{name} has {len(rows):,} chunks, less than its share of {share:,}: lower budget_tokens, "
                            "or take what there is with allow_short=true")
        # The choice of a category's chunks is the same in every run of a seed, with whatever others it is trained.
        if cfg.choice == "random":
            rng = counter_rng(cfg.seed, 1, train.code(name))
            # A window goes on into the next chunk if that is chosen too: of chunks one by one that is the rarer the
            # smaller the share, and runs of larger K would see fewer windows.
            rows = whole_documents(rows, train.documents, rng) if cfg.random_windows else rng.permutation(rows)
        chosen.append(rows[:share])
    return np.sort(np.concatenate(chosen))


class Batches:
    """Chunks of every step: a pure function of (seed, step). Epochs follow one another without a seam.

    Each epoch passes once through a permutation of the rows keyed by (seed, epoch); a batch may end one and begin the
    next, so that all batches are full and each row comes exactly once an epoch.
    """

    def __init__(self, rt: Runtime, chunks: Chunks, rows: np.ndarray, cfg: Config):
        self.rt = rt
        self.cfg = cfg
        self.chunks = chunks
        self.pool = rows  # what an epoch passes through, in the order of the file
        self.chosen = np.zeros(len(chunks.codes), dtype=bool)  # [R], whether a row is among them
        self.chosen[rows] = True
        self.permutations = {}  # of the last two epochs: a batch may need both

    def __call__(self, step: int) -> torch.Tensor:
        """This rank's chunks, [B / world_size, n] int64, on the device."""
        rows = self.rows(step)
        tokens = self.chunks.tokens[rows]  # one gather from the map, [B, n]
        if self.cfg.random_windows:
            rng = counter_rng(self.cfg.seed, 3, step)
            tokens = self.windows(rows, tokens, rng)
        # Every rank draws the whole batch and keeps its part, so that any number of ranks trains on the same.
        tokens = torch.from_numpy(tokens.astype(np.int64))
        return send(self.rt.share(tokens), self.rt.device)

    def rows(self, step: int) -> np.ndarray:
        """Rows of the whole batch of a step, [B]."""
        B = self.cfg.batch_size
        # Chunk i of the whole run is place i mod R of epoch i div R: no state, and no batch that is not full.
        numbers = np.arange(step * B, (step + 1) * B)
        epochs, places = np.divmod(numbers, len(self.pool))
        rows = np.empty(B, dtype=np.int64)
        for epoch in np.unique(epochs):
            within = epochs == epoch
            rows[within] = self.permutation(int(epoch))[places[within]]
        return rows

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self.permutations:
            rng = counter_rng(self.cfg.seed, 2, epoch)
            self.permutations.pop(epoch - 2, None)
            self.permutations[epoch] = rng.permutation(self.pool)
        return self.permutations[epoch]

    def windows(self, rows: np.ndarray, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Move every chunk [B, n] forward by 0..n-1 tokens where its document goes on in the next row."""
        documents = self.chunks.documents
        n = self.chunks.size
        following = np.minimum(rows + 1, len(documents) - 1)  # the last row of all follows itself
        goes_on = (documents[following] == documents[rows]) & (following > rows)
        goes_on &= self.chosen[following]  # tokens beyond the budget would be more tokens to learn from
        offsets = rng.integers(0, n, len(rows))
        offsets[~goes_on] = 0
        # The window is cut out of the chunk and the one behind it.
        both = np.concatenate([tokens, self.chunks.tokens[following]], 1)  # [B, 2n]
        columns = offsets[:, None] + np.arange(n)  # [B, n]
        return np.take_along_axis(both, columns, 1)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.dropout = cfg.dropout
        self.attention_norm = nn.LayerNorm(cfg.d_model)
        self.mlp_norm = nn.LayerNorm(cfg.d_model)
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.attention_out = nn.Linear(cfg.d_model, cfg.d_model)
        self.mlp_in = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.mlp_out = nn.Linear(cfg.d_mlp, cfg.d_model)

    def forward(self, x: torch.Tensor, B: int) -> torch.Tensor:
        """x [B*T, D] -> [B*T, D]."""
        # Queries, keys, values: one product for all three, then heads of width C = D / H.
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.view(B, -1, 3, self.n_heads, x.shape[1] // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, C] each
        # Causal mask: position t reads tokens 1..t, or its cross entropy would be no prediction.
        rate = self.dropout if self.training else 0.0
        attended = attention(q, k, v, rate)
        attended = attended.transpose(1, 2).reshape(x.shape)  # heads side by side again, [B*T, D]
        x = x + self.drop(self.attention_out(attended))
        # MLP: each position by itself.
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)))
        return x + self.drop(self.mlp_out(hidden))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout of what a layer writes to the stream."""
        return dropout(x, self.dropout) if self.training else x


class GPT(nn.Module):
    """Decoder-only transformer with learned positions and tied embeddings (Radford et al. 2019)."""

    def __init__(self, cfg: Config, vocab_size: int, n_ctx: int):
        super().__init__()
        self.dropout = cfg.dropout
        self.embed = nn.Embedding(vocab_size, cfg.d_model)
        self.position = nn.Parameter(torch.empty(n_ctx, cfg.d_model))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm = nn.LayerNorm(cfg.d_model)
        # Matrices start small (std 0.02): all tokens are then about equally likely, and the first XE is log V.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                # What writes to the stream shrinks with depth, as in GPT-2: the sum of 2 L writes keeps its size.
                writes = 2 * cfg.n_layers if "_out" in name and cfg.init == "waves" else 1
                nn.init.normal_(parameter, std=0.02 * writes**-0.5)
        if cfg.init == "normal":
            return
        # Learned positions that start as sinusoids (Vaswani et al. 2017), larger than tokens: "k tokens ago" is then
        # one linear map from the first step on. Random ones must find it for each position by itself, and the last,
        # which no later token attends to, lags behind: 2.8% above the optimum on synthetic data, not 0.7%.
        frequencies = 10_000.0 ** (-torch.arange(0, cfg.d_model, 2) / cfg.d_model)
        angles = torch.arange(n_ctx)[:, None] * frequencies  # [n_ctx, D / 2]
        waves = torch.cat([angles.sin(), angles.cos()], 1)[:, : cfg.d_model]
        with torch.no_grad():
            self.position.copy_(0.1 * 2**0.5 * waves)  # root mean square 0.1

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None):
        """tokens [B, T] -> logits [B, T, V], residual stream after the embedding and every block, each [B, T, D].

        With targets [B, T]: their cross entropies in nats in place of the logits, which never exist as a whole; in
        training the mean, otherwise [B, T].
        """
        B, T = tokens.shape
        x = self.embed(tokens) + self.position[:T]
        # Positions of all chunks are rows of one matrix [B*T, D]: attention alone asks which of them belong together.
        if self.training:
            x = dropout(x, self.dropout)
        x = x.flatten(0, 1)
        stream = [x]  # what the probe reads the component from
        for block in self.blocks:
            x = block(x, B)
            stream.append(x)
        x = self.final_norm(x)
        stream = [layer.view(B, T, -1) for layer in stream]
        head = self.embed.weight  # tied: the embedding read backwards, [V, D]
        if targets is None:
            return F.linear(x, head).view(B, T, -1), stream
        # The numbers of token_xe below, a block of rows at a time: logits [B, T, V] would be the largest tensor of all.
        if torch.is_grad_enabled():
            return mean_xe(x, head, targets.flatten()), stream
        return row_xe(x, head, targets.flatten()).view(B, T), stream


def build_model(cfg: Config, vocab_size: int, n_ctx: int) -> nn.Module:
    return GPT(cfg, vocab_size, n_ctx)


def parameter_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """Matrices decay; norms, biases and other vectors do not, unless all are to."""
    # A norm or a bias has one number a channel: little to overfit with, and nothing gained by shrinking it.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    rest = cfg.weight_decay if cfg.decay == "all" else 0.0
    return [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": rest}]


def flops_per_token(model: nn.Module, cfg: Config, n_ctx: int) -> float:
    """Forward and backward: 6 x weights of matrix products + full attention (Chowdhery et al. 2022, appendix B)."""
    weights = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weights += module.weight.numel()
    attention = 12 * cfg.n_layers * n_ctx * cfg.d_model
    return 6 * weights + attention


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------
def token_xe(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy -log q(target) of every target [B, T] under logits [B, T, V], in nats, [B, T]."""
    rows = logits.flatten(0, 1).float()  # sums over V in half precision would cost the third digit
    return F.cross_entropy(rows, targets.flatten(), reduction="none").view(targets.shape)


def train_step(model: nn.Module, tokens: torch.Tensor, rt: Runtime, cfg: Config) -> torch.Tensor:
    """Forward and backward over the micro-batches of tokens [B, n]; returns the mean loss over ranks."""
    total = torch.zeros((), device=rt.device)
    for i, part in enumerate(tokens.chunk(cfg.grad_accum)):
        # Gradients add up over the micro-steps, and travel between ranks on the last one only.
        with rt.sync(model, last=i == cfg.grad_accum - 1):
            with rt.autocast():
                # Tokens 1..T predict tokens 2..n: the shift is here, and only here and in evaluate.
                xe, _ = model(part[:, :-1], part[:, 1:])
            # The mean of the micro-steps' means, which are of equal size: that of the whole batch.
            loss = xe.mean() / cfg.grad_accum
            rt.backward(loss)
        total += loss.detach()
    return rt.mean(total)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model: nn.Module, chunks: Chunks, rows: np.ndarray, rt: Runtime, batch: int = 256,
             told: bool = False) -> Curves:
    """Cross entropy by position of every document among the rows. Collective: ranks share the rows.

    told: whether to say how far it is, where that takes long.

    XE(t) = mean over documents of -log q(x_t+1 | x_1 .. x_t), t = 1..T. A chunk says nothing of its component, so what
    XE(t) loses as t grows is what the model has found out by reading t tokens.
    """
    # Documents, not chunks, are the unit: chunks of one document are alike, and would make intervals too narrow.
    documents, place = np.unique(chunks.documents[rows], return_inverse=True)  # [M], [R]
    place = torch.from_numpy(place)
    # Sums in double precision: one number a document and position is all that is kept of the rows.
    sums = torch.zeros(len(documents), chunks.n_ctx, dtype=torch.float64)  # [M, T]
    model.eval()
    # Ranks take turns by the row, so that each has about as many of every category.
    turns = np.arange(rt.rank, len(rows), rt.world_size)
    for begin in bar(range(0, len(turns), batch), f"evaluating on {counted(len(rows), 'chunk')}", active=told):
        part = turns[begin : begin + batch]
        tokens = torch.from_numpy(chunks.tokens[rows[part]].astype(np.int64))
        tokens = tokens.to(rt.device)  # [b, n]
        with rt.autocast():
            # Tokens 1..t predict token t + 1. The first is predicted by nobody: there is nothing to read before it.
            xe, _ = model(tokens[:, :-1], tokens[:, 1:])  # [b, T]
        # Positions stay apart: their mean is the loss, their differences are what this page is about.
        sums.index_add_(0, place[part], xe.cpu().double())
    model.train()
    # Another rank may have read other chunks of the same document: sums add up, means would not.
    sums = rt.sum(sums)
    codes = np.empty(len(documents), dtype=np.int64)  # [M]
    codes[place] = chunks.codes[rows]
    return Curves(sums.cpu().numpy(), np.bincount(place), codes)


def exact_curves(chunks: Chunks, rows: np.ndarray, active: list[str]) -> tuple[Curves, Curves] | None:
    """(of the mixture of the active components, of the known component) on these rows; None for real documents.

    The first is the least XE that any model can reach; it less the second is what not knowing the component costs.
    """
    if chunks.oracle is None:
        return None
    codes = [chunks.code(name) for name in active]
    return oracle_curves(chunks.oracle[rows], chunks.codes[rows], chunks.documents[rows], codes)


def rehearse(model: nn.Module, final: Chunks, active: list[str], cfg: Config, rt: Runtime) -> None:
    """A training step, and what the end of the run asks of model and data, on three chunks of each category."""
    with rehearsal():
        # Three: a tensor of two rows would pass for the pair (cross entropy, stream) that a model should return.
        rows = np.concatenate([final.rows(name)[:3] for name in active])
        tokens = torch.from_numpy(final.tokens[rows].astype(np.int64)).to(rt.device)
        train_step(model, tokens, rt, replace(cfg, grad_accum=1))
        model.zero_grad(set_to_none=True)
        curves = evaluate(model, final, rows, rt)
        exact = exact_curves(final, rows, active)
        measure(curves, final.names, active, exact, 2, cfg.seed, cfg.icl_early, cfg.icl_late)
        if cfg.probe:
            positions = probed_positions(final.n_ctx)
            residual_stream(model, final.tokens[rows], positions, rt.device)


def finish(model: nn.Module, validation: Chunks, final: Chunks, active: list[str], lesson: dict, cfg: Config,
           rt: Runtime, folder: Path) -> dict:
    """Measure on all final chunks: results.json, tables, pictures; returns the summary. Collective.

    lesson: what the run was trained on, and how much, by training_facts.
    """
    val_xe = None  # that of the final numbers, unless they are of a test
    if final is not validation:
        codes = [validation.code(name) for name in active]
        rows = np.flatnonzero(np.isin(validation.codes, codes))
        xe = evaluate(model, validation, rows, rt, told=True).mean_of(codes)  # [T]
        val_xe = float(xe.mean())
    # Categories that the model has not been trained on are evaluated too: "unseen".
    everything = np.arange(len(final.codes))
    curves = evaluate(model, final, everything, rt, told=True)
    summary = {}
    if rt.is_main:
        codes = [final.code(name) for name in active]
        rows = np.flatnonzero(np.isin(final.codes, codes))
        exact = exact_curves(final, rows, active)
        # Bootstrap, fits and oracles are the room's matter; the curves they start from are made above.
        groups = measure(curves, final.names, active, exact, cfg.bootstrap, cfg.seed, cfg.icl_early, cfg.icl_late)
        results = {
            "categories": active,
            "K": len(active),
            "seed": cfg.seed,
            "control_of": cfg.control_of,
            "final_split": final.split,
            "final_fingerprint": final.fingerprint,
            **lesson,
            "groups": groups,
        }
        if exact:
            results["information"] = information(final.oracle[rows], final.codes[rows], codes)
        if cfg.probe and len(active) > 1:  # of one component there is nothing to find out
            results["probe"] = probe(model, final, rows, rt.device, cfg.seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_documents(folder / "documents.npz", curves, final.names, np.unique(final.documents), groups)
        write_json(folder / "results.json", results)
        write_curves(folder / "xe_by_position.csv", groups)
        title = f"K = {len(active)}: {', '.join(active)}"
        draw_run(folder, title, results, read_metrics(folder))
        summary = summarize(groups, final.split, val_xe)
        summary["verdict"] = verdict(summary, len(active))
    rt.barrier()
    return summary


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """The lowest validation XE, and how long early stopping has waited for a lower one."""

    best: float = math.inf
    reference: float = math.inf  # the last that was lower than the one before by min_delta
    waited: int = 0  # evaluations since then
    ended: bool = False  # whether the run is over

    def add(self, xe: float, cfg: Config) -> bool:
        """Whether this evaluation is the best so far."""
        improved = xe < self.best
        self.best = min(self.best, xe)
        self.waited += 1
        # The reference stays until it is beaten by min_delta, so that small improvements add up to one that counts.
        if xe < self.reference - cfg.min_delta:
            self.reference = xe
            self.waited = 0
        self.ended = 0 < cfg.patience <= self.waited
        return improved


def describe(chunks: Chunks, rows: np.ndarray, active: list[str], model: nn.Module, max_steps: int, cfg: Config) -> str:
    """What is trained on what, two lines."""
    counts = np.bincount(chunks.codes[rows], minlength=len(chunks.names))
    shares = ", ".join(f"{name} {counts[chunks.code(name)]:,}" for name in active)
    size = sum(parameter.numel() for parameter in model.parameters())  # a tied matrix counts once
    return (f"K = {len(active)} of {counted(len(chunks.names), 'category', 'categories')} of {cfg.data}: {shares} "
            f"chunks of {chunks.size} tokens, vocabulary {chunks.vocab_size:,}\n"
            f"{type(model).__name__}: {size:,} parameters | {counted(max_steps, 'step')} of "
            f"{counted(cfg.batch_size * chunks.n_ctx, 'token')} | {cfg.out_dir}")


def log_evaluation(log: RunLog, step: int, xe: np.ndarray, improved: bool, progress: Progress) -> None:
    """XE by position [T] for metrics.jsonl, its mean and ends for the console."""
    mean = float(xe.mean())
    gain, _ = gains(xe)
    log.metrics(step, "eval", {"val_xe": mean, "icl_gain": float(gain), "xe_by_position": xe.tolist()})
    line = f"step {step:>6} eval | val_xe {mean:.5f} | first {xe[0]:.4f} last {xe[-1]:.4f}"
    if improved:
        line += " *"
    if progress.ended:
        line += f" | no better for {progress.waited}: stopping"
    log.say(line)


def train(cfg: Config) -> dict:
    """Train as configured; returns the metrics of summary.json ({"stopped_at": step} if a signal ended it).

    Raises DataError, CheckpointError (bad input, before anything is written) and FloatingPointError (the loss).
    """
    began = time.perf_counter()
    with Runtime(cfg) as rt, store.run_folder(cfg, rt) as folder:
        rt.divide(cfg.batch_size, cfg.grad_accum)
        chunks, validation = open_data(cfg)
        active = active_categories(chunks, validation, cfg)
        rows = training_rows(chunks, active, cfg)
        final = final_chunks(cfg, chunks, validation)
        # The weights are the same on every rank; random numbers of dropout afterwards are not.
        model = rt.build(build_model, cfg, chunks.vocab_size, chunks.n_ctx).to(rt.device)
        rehearse(model, final, active, cfg, rt)  # an edit that cannot be measured fails here, not after training
        rt.reseed(rt.rank)
        params = list(model.parameters())
        optimizer = rt.adamw(parameter_groups(model, cfg), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))

        # Steps follow from the epochs. An epoch is as long for every K: the budget is.
        epoch_steps = math.ceil(len(rows) / cfg.batch_size)
        all_steps = math.ceil(cfg.epochs * len(rows) / cfg.batch_size)
        max_steps = cfg.max_steps or all_steps
        batches = rt.ahead(Batches(rt, chunks, rows, cfg), max_steps)  # on a GPU each is made during the step before
        # What the learning rate falls over, and its warm-up.
        fall, pace = max_steps, cfg
        if cfg.schedule_over == "epochs":
            fall, pace = all_steps, replace(cfg, warmup_steps=min(cfg.warmup_steps, all_steps))
        eval_interval = cfg.eval_interval or cfg.eval_epochs * epoch_steps
        log_interval = 1 if cfg.log_level == "DEBUG" else cfg.log_interval
        # Evaluations during training see the first chunks of each category alone, for speed.
        codes = [validation.code(name) for name in active]
        watched = np.concatenate([validation.rows(name)[: cfg.eval_chunks] for name in active])

        # A run that was stopped goes on; of one that has ended there is nothing left to train.
        data = {cfg.data: chunks.fingerprint + validation.fingerprint}
        path, state, changes = checkpoint.start_from(
            rt, cfg, folder, __file__, lambda old, path: differences(old, cfg, ALIASES, path), data,
            n_ctx=int, reference=float, waited=int, ended=bool
        )
        summary = ended_before(rt, folder, path, state, changes, HEADLINES)
        if summary:
            return summary
        meter = Meter(rt, cfg.batch_size * chunks.n_ctx, began, state)
        step, progress = 0, Progress()
        if state:
            state = without_last_position(state, path)
            step, best, extra, _ = checkpoint.restore(rt, state, path, model, optimizer)
            ended = extra["ended"] and not changes  # with more epochs or more patience it is not over
            progress = Progress(best, extra["reference"], extra["waited"], ended)
        trained = rt.wrap(model)  # compiled, or synchronised over ranks; the same weights as `model`
        # For load_run; chunk_size tells it that the table of positions has no row that was never trained.
        facts = {"n_ctx": chunks.n_ctx, "chunk_size": chunks.size, "vocab_size": chunks.vocab_size,
                 "categories": active, "data": data}

        with RunLog(rt, cfg, config_dict(cfg), folder, __file__, step, max_steps) as log:
            if rt.is_main:
                checkpoint.clear(folder, step, progress.best, cfg.keep_last)
                copy_tokenizer(cfg.data, folder)  # now: an interrupted run can be prompted too
                # Those of an earlier run: like summary.json they are there when the run has ended, and only then.
                for name in ("results.json", "documents.npz"):
                    (folder / name).unlink(missing_ok=True)
            log.say(rt.describe())
            log.say(describe(chunks, rows, active, model, max_steps, cfg))
            if state:
                log.resumed(path, step, changes)
            # Model FLOP/s utilisation is held against large matrix products on this machine, in this precision.
            flops = flops_per_token(model, cfg, chunks.n_ctx)
            peak = matmul_rate(rt) * rt.world_size
            meter.start(step)
            while step < max_steps and not progress.ended:
                tokens = batches(step)  # [B / ranks, n]
                lr = learning_rate(step, pace, fall)
                loss = train_step(trained, tokens, rt, cfg)
                norm = rt.step(optimizer, params, cfg.grad_clip, lr)
                step += 1
                meter.check(step, loss)  # on the device, like the means: nobody waits
                meter.add({"loss": loss})
                log.progress(step, loss, meter)
                due = rt.due(step, max_steps, log_interval, eval_interval, cfg.save_interval)
                if due.nothing:
                    continue

                # Numbers are read from the device here and only here: a read waits for all queued work.
                speed = meter.pause(step, model, lr)
                if due.logs:
                    values = meter.read()
                    values |= {"lr": lr, "grad_norm": float(norm), "epoch": step / epoch_steps,
                               "tokens_per_s": speed, "mfu": speed * flops / peak}
                    left = (max_steps - step) * meter.units_per_step / speed
                    log.train(step, values, lr, norm, speed, left, loss=values["loss"])
                improved = False
                if due.evaluates:
                    # Categories count alike, as they do in training with equal shares.
                    xe = evaluate(model, validation, watched, rt).mean_of(codes)  # [T]
                    improved = progress.add(float(xe.mean()), cfg)
                    log_evaluation(log, step, xe, improved, progress)
                if due.saves or improved or progress.ended:
                    # Early stopping is part of the state: a run that is stopped and goes on ends where it would have.
                    progress.ended = progress.ended or step == max_steps
                    extra = facts | asdict(progress)
                    saved = checkpoint.capture(
                        rt, __file__, config_dict(cfg), step, model, optimizer, progress.best, meter, extra, {}
                    )
                    if rt.is_main:
                        checkpoint.save(saved, folder, improved, cfg.keep_last != 0, cfg.keep_last)
                if due.stops:
                    log.stopped(step)
                    return {"stopped_at": step}
                meter.start(step)

            # The weights of the lowest validation XE are measured, not the last. Rank 0 has written them by now.
            rt.barrier()
            checkpoint.load_best(rt, folder, __file__, model, without_last_position)
            lesson = training_facts(config_dict(cfg), data, chunks, step)
            summary = finish(model, validation, final, active, lesson, cfg, rt, folder)
            summary["K"] = len(active)
            summary["categories"] = active
            summary["train_chunks"] = len(rows)
            summary["config_hash"] = config_hash(cfg)
            summary |= run_facts(rt, step, meter)
            log.summary(summary, HEADLINES)
            if rt.is_main:
                log.say(run_page(folder, Config))
            return summary


# ---------------------------------------------------------------------------------------------------------------
# Runs again: load, analyze
# ---------------------------------------------------------------------------------------------------------------
def load_run(path: Path, device: str = "auto") -> tuple[Config, nn.Module, int, dict]:
    """(settings, model, steps done, extra state) of a run folder or checkpoint, also the source's.

    Raises CheckpointError.
    """
    path = checkpoint_in(path)
    if (path / "best.pt").exists():  # the weights that the run's numbers are of
        path = path / "best.pt"
    state = source_checkpoint(path, ICL[0].defaults) or without_last_position(
        checkpoint.load(path, __file__, vocab_size=int, n_ctx=int, categories=list), path
    )
    cfg = from_dict(Config, state["config"], str(path), ALIASES)  # settings of older runs by their newer names
    cfg.device = device
    extra = state["extra"]
    model = checkpoint.build_with(
        state["model"], path, lambda: build_model(cfg, extra["vocab_size"], extra["n_ctx"])
    )
    return cfg, model, state["step"], extra


def analyze(cfg: Config) -> dict:
    """The final measurements and pictures again, for the run folder or checkpoint cfg.analyze."""
    path = store.local(cfg.analyze)
    folder = checkpoint.analysis_of(path, cfg)
    saved, model, step, extra = load_run(path, cfg.device)
    # What may differ from the run, if asked to.
    take_over(saved, cfg, "precision", "matmul_precision", "bootstrap", "probe", "data", "validation_data",
              "final_split", "icl_early", "icl_late")
    with Runtime(saved) as rt:
        chunks, validation = open_data(saved, extra["vocab_size"])
        data = {saved.data: chunks.fingerprint + validation.fingerprint}
        checkpoint.same_data(extra, data, path)
        if (validation.vocab_size, validation.n_ctx) != (extra["vocab_size"], extra["n_ctx"]):
            raise DataError(f"{saved.data} is not the data of this run: vocabulary or chunk size differ")
        final = final_chunks(saved, chunks, validation)
        active = extra["categories"]
        # The weights measured are those of the best step; what the run was trained on is up to its last.
        if (path / "last.pt").exists():
            step = checkpoint.load(path)["step"]
        lesson = training_facts(config_dict(saved), extra.get("data", data), chunks, step, data)
        result = finish(model.to(rt.device), validation, final, active, lesson, saved, rt, folder)
        if rt.is_main:
            say_again(step, result, HEADLINES, run_page(folder, Config, result))
    return result


def main(argv: list[str] | None = None) -> dict:
    with clear_errors():
        cfg = configure(Config, argv, ALIASES, ICL)  # a study, and a report, are sweep.py's from here on
        length = f"{cfg.max_steps:,} steps" if cfg.max_steps else f"{cfg.epochs:g} epochs"
        first_line(__file__, cfg, f"{cfg.data}, {length}")
        return analyze(cfg) if cfg.analyze else train(cfg)


if __name__ == "__main__":
    main()
