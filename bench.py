"""Benchmarks: ratios against a named peer, or against what the machine can do, measured side by side in one run.

    python bench.py                      # everything
    python bench.py ghmm --json=out.json # one experiment, the results written too
    python bench.py arxiv --peer=PATH    # against a checkout of nanoGPT (its model.py) too
    python bench.py apelr --peer=PATH    # against a checkout of APEL-R (its src/apelr) too
    python bench.py apelr --full         # the whole grid of shapes: an hour on two cores
    python bench.py state --full         # five rounds in place of three, and the sizes of state_sm with its loader too

Each result is {name, value, unit, against, ratio}: ratio is value / the peer's value, so above 1 is faster (of memory,
below 1 is less). Peers take part where they can be imported: hmmlearn, transformer-lens before version 4 (`pip install
"transformer-lens<4"`), tokenizers, transformers, arc-state, cell-load; a line says which was missing. Times are
medians; on a shared machine trust the ratios.
"""

# First, as a Ctrl-C while what follows is imported shall be quiet.
from common.errors import clear_errors  # isort: skip

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import logging
import os
import resource
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import geomloss
import h5py
import numpy as np
import torch
from scipy.sparse import csr_array

import train_apelr
import train_arxiv
import train_ghmm
import train_state
from common.runlog import write_json
from common.runtime import Runtime
from configurator import fail
from measure.speed import matmul_rate
from sources.cells import open_cells
from sources.chunks import ChunkSpool, chunk_arrays
from sources.foreign_state import source_settings, source_state_dict
from sources.h5ad import write_h5ad
from sources.shared import closest
from sources.tokenizer import train_bpe

RESULTS: list[dict] = []


def report(name: str, value: float, unit: str, against: str = "", peer: float | None = None) -> None:
    """Print a result and keep it for --json."""
    ratio = value / peer if peer else None
    RESULTS.append({"name": name, "value": value, "unit": unit, "against": against, "ratio": ratio})
    versus = f"  {ratio:7.2f} x {against}" if ratio else f"  {against}"
    print(f"{name:<58} {value:12.4g} {unit}{versus}", flush=True)


def seconds(run, device: torch.device, repeats: int = 7) -> float:
    """Median time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory() -> float:
    """MB that this process held at most. (Linux's ru_maxrss of a started process includes its parent's.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


# ---------------------------------------------------------------------------------------------------------------
# ghmm
# ---------------------------------------------------------------------------------------------------------------
SOURCE_RATES = {"sampling": 19e6, "beliefs": 12e6}  # tokens/s of the source's jitted JAX on two cores, Mess3, 1024x256
TRAINING_SHAPES = ((64, 10, 1), (64, 64, 4), (512, 10, 1))  # sequences, n_ctx, heads


def bench_ghmm(peer_path: str | None) -> None:
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    for device in devices:
        with Runtime(train_ghmm.Config(device=device.type)):  # as in a run
            for name in ("mess3", "rrxor", "tom_quantum"):
                for batch, length in ((64, 65), (1024, 256)):
                    bench_process(name, batch, length, device)
    bench_training(devices[-1])


def bench_process(name: str, batch: int, length: int, device: torch.device) -> None:
    process = train_ghmm.make_process(name).to(device)
    generator = torch.Generator(device).manual_seed(0)
    tokens = process.sample(batch, length, generator)
    count, where = batch * length, f"{name} {batch}x{length} {device.type}"
    runs = {"sampling": lambda: process.sample(batch, length, generator), "beliefs": lambda: process.beliefs(tokens),
            "log_prob": lambda: process.log_prob(tokens)}
    rates = {kind: count / seconds(run, device) for kind, run in runs.items()}
    for kind in ("sampling", "beliefs"):
        if (name, batch) == ("mess3", 1024):
            report(f"ghmm {kind}, {where}", rates[kind], "tokens/s", "the source's jitted JAX, two cores (a constant)",
                   SOURCE_RATES[kind])
        else:
            report(f"ghmm {kind}, {where}", rates[kind], "tokens/s")
    if device.type == "cpu" and process.is_hmm:
        against_hmmlearn(process, tokens, rates, where)


def against_hmmlearn(process, tokens: torch.Tensor, rates: dict, where: str) -> None:
    """hmmlearn emits from states, we from transitions: its states are our pairs (token, next state)."""
    try:
        from hmmlearn.hmm import CategoricalHMM
    except ImportError:
        report(f"ghmm hmmlearn, {where}", 0.0, "tokens/s", "hmmlearn missing: pip install hmmlearn")
        return
    T = process.transition_matrices.numpy()
    V, S = process.vocab_size, process.num_states
    peer = CategoricalHMM(n_components=V * S, n_features=V)
    peer.startprob_ = np.einsum("i,xij->xj", process.initial_state.numpy(), T).reshape(-1)
    peer.transmat_ = np.tile(T.transpose(1, 0, 2).reshape(S, V * S), (V, 1))  # from (x, i) to (y, j)
    peer.emissionprob_ = np.repeat(np.eye(V), S, axis=0)
    lengths, flat = [tokens.shape[1]] * len(tokens), tokens.reshape(-1, 1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of states that are never visited
        drawn = min(10_000, len(flat))
        sampling = drawn / seconds(lambda: peer.sample(drawn, random_state=0), torch.device("cpu"), repeats=3)
        scoring = len(flat) / seconds(lambda: peer.score(flat, lengths), torch.device("cpu"), repeats=3)
        gap = abs(peer.score(flat, lengths) - float(process.log_prob(tokens).sum())) / len(flat)
    if gap > 1e-9:
        raise AssertionError(f"hmmlearn and train_ghmm disagree by {gap:.1e} nats a token on {where}")
    report(f"ghmm sampling, {where}", rates["sampling"], "tokens/s", "hmmlearn sample", sampling)
    report(f"ghmm log_prob, {where}", rates["log_prob"], "tokens/s", "hmmlearn score", scoring)


class Trainer:
    """A training loop of one side, living in a process of its own so that each side runs as its users run it."""

    def loss(self) -> torch.Tensor:
        return train_ghmm.next_token_loss(self.logits(self.tokens[:, :-1]), self.tokens[:, 1:])

    def step(self) -> None:
        with self.autocast():
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def median_step(self) -> float:
        return seconds(self.step, self.device, repeats=15)


class SlowTrainer(Trainer):
    """One whose steps take up to seconds."""

    def median_step(self) -> float:
        """Of a second's steps, one where it takes longer, as it does at the source; the first ever does not count."""
        if not hasattr(self, "warm"):
            self.warm = self.step()
        times = []
        while sum(times) < 1:
            _wait(self.device)
            began = time.perf_counter()
            self.step()
            _wait(self.device)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


class GhmmTrainer(Trainer):
    """train_ghmm.py, or HookedTransformer of the same shape."""

    def __init__(self, side: str, batch: int, n_ctx: int, heads: int, device: str):
        self.device = torch.device(device)
        cfg = train_ghmm.Config(n_ctx=n_ctx, n_heads=heads, batch_size=batch, device=device)
        process = train_ghmm.build_process(cfg)
        self.tokens = process.sample(batch, n_ctx + 1, torch.Generator().manual_seed(0)).to(self.device)
        if side == "ours":
            rt = Runtime(cfg).__enter__()
            self.model = train_ghmm.build_model(cfg, process.vocab_size).to(self.device)
            trained = rt.wrap(self.model)
            self.logits, self.autocast = lambda tokens: trained(tokens)[0], rt.autocast
            self.optimizer = rt.adamw(self.model.parameters(), lr=1e-3)
        else:
            self.model = hooked_transformer(cfg, process.vocab_size)
            self.logits = self.model
            self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.parameters = list(self.model.parameters())

    def flops_per_token(self) -> float:
        """6 x Linear weights + full attention, the convention of PaLM (Chowdhery et al. 2022)."""
        cfg, n_ctx = train_ghmm.Config(), self.tokens.shape[1] - 1
        weights = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, torch.nn.Linear))
        return 6 * weights + 12 * cfg.n_layers * n_ctx * cfg.d_model


def hooked_transformer(cfg: train_ghmm.Config, vocab_size: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        return HookedTransformer(HookedTransformerConfig(
            n_layers=cfg.n_layers, d_model=cfg.d_model, n_ctx=cfg.n_ctx, d_head=cfg.head_width(), n_heads=cfg.n_heads,
            d_mlp=cfg.d_mlp, d_vocab=vocab_size, act_fn=cfg.act, normalization_type="LN", device=cfg.device, seed=0))


_trainer: Trainer | None = None  # of the worker process
_before = 0.0  # its memory before that


def _start(kind: str, *shape) -> None:
    global _trainer, _before
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # torch's own footprint
    _before = peak_memory()
    _trainer = globals()[kind](*shape)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # Runtime waits for the end of a step, which a worker has not


def _ask(name: str) -> float:
    return getattr(_trainer, name)()


def _memory() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else peak_memory() - _before


def alternate(kind: str, sides: dict[str, str], shape: tuple, rounds: int) -> tuple[dict, dict, dict]:
    """Train the sides in turns, each in its own process, so that a slow minute of the machine meets all of them.

    Returns by side: seconds a step in every round; peak MB beyond torch's own; FLOP a token of sides without a text.
    """
    pools = {side: ProcessPoolExecutor(1, get_context("spawn")) for side in sides}
    times = {side: [] for side in sides}
    try:
        for started in [pools[side].submit(_start, kind, side, *shape) for side in sides]:
            started.result()
        for _ in range(rounds):
            for side in sides:
                times[side].append(pools[side].submit(_ask, "median_step").result())
        return (times, {side: pool.submit(_memory).result() for side, pool in pools.items()},
                {s: pools[s].submit(_ask, "flops_per_token").result() for s, text in sides.items() if not text})
    finally:
        for pool in pools.values():
            pool.shutdown()


def race(kind: str, sides: dict[str, str], shape: tuple, tokens: int, name: str, peak: float, rounds: int = 5,
         memory: bool = False, unit: str = "token") -> None:
    """Reports tokens/s of "ours" against the matrix-multiply rate (FLOP/s) and every other side's description."""
    times, peaks, flops = alternate(kind, sides, shape, rounds)
    rate = tokens / statistics.median(times["ours"])
    report(name, rate, f"{unit}s/s", f"matrix-multiply rate, at {flops['ours'] / 1e6:.2f} MFLOP a {unit}",
           peak / flops["ours"])
    for side, text in sides.items():
        if side != "ours":
            ratio = statistics.median(p / o for o, p in zip(times["ours"], times[side], strict=True))
            report(name, rate, f"{unit}s/s", text, rate / ratio)
        if memory:
            report(f"{name}, peak memory", peaks[side], "MB", text)


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def bench_training(device: torch.device) -> None:
    sides = {"ours": ""}
    if missing("transformer_lens"):
        report("ghmm HookedTransformer", 0.0, "tokens/s", 'missing: pip install "transformer-lens<4"')
    else:
        sides["peer"] = "HookedTransformer with torch's AdamW"
    peak = matmul_rate(Runtime(train_ghmm.Config(device=device.type)))
    report(f"ghmm matrix-multiply rate, {device.type}", peak / 1e9, "GFLOP/s")
    for batch, n_ctx, heads in TRAINING_SHAPES:
        race("GhmmTrainer", sides, (batch, n_ctx, heads, device.type), batch * n_ctx,
             f"ghmm training, {batch}x{n_ctx} {heads} heads {device.type}", peak)


# ---------------------------------------------------------------------------------------------------------------
# arxiv
# ---------------------------------------------------------------------------------------------------------------
ARXIV_SHAPES = {"published": (6, 256, 1_024, 8_192, 16), "small": (2, 96, 384, 2_048, 32)}  # layers, D, MLP, V, batch


def bench_arxiv(peer_path: str | None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench_tokenizer()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process of its own, for its peak memory
        for line in pool.submit(measure_loader).result():
            report(*line)
    sides = {"ours": ""}
    if missing("transformers"):
        report("arxiv transformers", 0.0, "tokens/s", "missing: pip install transformers")
    else:
        sides["transformers"] = "GPT2LMHeadModel of transformers"
    if peer_path and (Path(peer_path) / "model.py").exists():
        sides[peer_path] = "nanoGPT"
    else:
        report("arxiv nanoGPT", 0.0, "tokens/s", "missing: --peer=PATH of a checkout with model.py")
    peak = matmul_rate(Runtime(train_arxiv.Config(device=device.type)))
    for name, shape in ARXIV_SHAPES.items():
        for precision, dropout in (("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.1)):
            against = {side: text + (f" in {precision}" if text else "") for side, text in sides.items()}
            if precision == "bf16" and "transformers" in sides:
                against["transformers fp32"] = "GPT2LMHeadModel of transformers in fp32"
            race("ArxivTrainer", against, (*shape, dropout, precision, device.type), shape[-1] * 99,
                 f"arxiv training, {name}, {precision}, dropout {dropout} {device.type}", peak)


def bench_tokenizer(size: int = 6_000_000) -> None:
    """Training and encoding in MB/s on the text of Python's own library, one thread a side."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) + \
        sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    texts, left = [], size
    for file in files:
        texts.append(file.read_text(encoding="utf-8", errors="replace")[:left])
        if (left := left - len(texts[-1])) <= 0:
            break
    documents = [text[i : i + 2_000] for text in texts for i in range(0, len(text), 2_000)]
    megabytes, cpu = sum(len(d.encode()) for d in documents) / 1e6, torch.device("cpu")
    ours = train_bpe(documents, 4_096)
    training = megabytes / seconds(lambda: train_bpe(documents, 4_096), cpu, repeats=3)
    encoding = megabytes / seconds(lambda: ours.encode_batch(documents, 1), cpu, repeats=3)
    if missing("tokenizers"):
        report("arxiv BPE training", training, "MB/s", "tokenizers missing: pip install tokenizers")
        report("arxiv BPE encoding, one thread", encoding, "MB/s", "tokenizers missing")
        return
    from tokenizers import ByteLevelBPETokenizer

    def train_peer():
        peer = ByteLevelBPETokenizer()
        peer.train_from_iterator(documents, vocab_size=4_096, show_progress=False)
        return peer

    peer = train_peer()
    report("arxiv BPE training", training, "MB/s", "Hugging Face tokenizers",
           megabytes / seconds(train_peer, cpu, repeats=3))
    report("arxiv BPE encoding, one thread", encoding, "MB/s", "Hugging Face tokenizers",
           megabytes / seconds(lambda: peer.encode_batch(documents), cpu, repeats=3))


def measure_loader(chunks: int = 500_000) -> list[tuple]:
    """A file of 50 M tokens: seconds to open it, chunks/s at random, and the memory that takes."""
    with tempfile.TemporaryDirectory() as folder:
        path, rng = Path(folder) / "train.h5", np.random.default_rng(0)
        spool = ChunkSpool(Path(folder), "train", 100, 8_192)
        for document in range(chunks // 500):
            spool.add("ab"[document * 1_000 // chunks], rng.integers(0, 8_192, 50_000))
        spool.write(path, tokenizer="", source="bench", seed=0)
        spool.close()
        before, began = peak_memory(), time.perf_counter()
        data = train_arxiv.Chunks(**chunk_arrays(path))
        opened = time.perf_counter() - began
        cfg = train_arxiv.Config(batch_size=512, device="cpu")
        batches = train_arxiv.Batches(Runtime(cfg), data, train_arxiv.training_rows(data, ["a", "b"], cfg), cfg)
        steps = iter(range(10**9))
        rate = 512 / seconds(lambda: batches(next(steps)), torch.device("cpu"), repeats=200)
        with h5py.File(path) as file:
            rows = iter(rng.integers(0, chunks, 10**6).tolist())
            one_by_one = 1 / seconds(lambda: file["token_chunks"][next(rows)], torch.device("cpu"), repeats=200)
        grown = peak_memory() - before
    return [("arxiv open 50 M tokens", opened, "s"),
            ("arxiv loader", rate, "chunks/s", "h5py, a row at a time", one_by_one),
            ("arxiv loader, memory grown by (50 M tokens, 100 MB on disk)", grown, "MB")]


class ArxivTrainer(Trainer):
    """train_arxiv.py, transformers' GPT-2 or nanoGPT of the same shape."""

    def __init__(self, side: str, layers: int, width: int, mlp: int, vocab: int, batch: int, dropout: float,
                 precision: str, device: str):
        self.device = torch.device(device)
        self.cfg = cfg = train_arxiv.Config(n_layers=layers, d_model=width, d_mlp=mlp, dropout=dropout, device=device,
                                            precision=precision)
        self.tokens = torch.randint(vocab, (batch, 100), generator=torch.Generator().manual_seed(0)).to(self.device)
        half = precision == "bf16" and not side.endswith("fp32")
        self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=half)
        if side == "ours":
            rt = Runtime(cfg).__enter__()
            self.model = train_arxiv.build_model(cfg, vocab, 100).to(self.device)
            trained, self.autocast = rt.wrap(self.model), rt.autocast
            self.loss = lambda: trained(self.tokens[:, :-1], self.tokens[:, 1:])[0]
            self.optimizer = rt.adamw(train_arxiv.parameter_groups(self.model, cfg), lr=1e-3)
        elif side.startswith("transformers"):
            from transformers import GPT2Config, GPT2LMHeadModel, logging

            logging.set_verbosity_error()  # it remarks on special tokens that a small vocabulary lacks
            self.model = GPT2LMHeadModel(GPT2Config(
                vocab_size=vocab, n_positions=100, n_embd=width, n_layer=layers, n_head=cfg.n_heads, n_inner=mlp,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)).to(self.device)
            self.logits = lambda tokens: self.model(tokens, use_cache=False).logits
        else:
            sys.path.insert(0, side)
            from model import GPT, GPTConfig

            self.model = GPT(GPTConfig(block_size=100, vocab_size=vocab, n_layer=layers, n_head=cfg.n_heads,
                                       n_embd=width, dropout=dropout)).to(self.device)
            self.logits = lambda tokens: self.model(tokens, tokens)[0]  # targets make it give all logits
        if side != "ours":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.model.train()
        self.parameters = list(self.model.parameters())

    def flops_per_token(self) -> float:
        return train_arxiv.flops_per_token(self.model, self.cfg, 100)


# ---------------------------------------------------------------------------------------------------------------
# apelr
# ---------------------------------------------------------------------------------------------------------------
APELR = {"baseline": {"version": "baseline"}, "v1": {"version": "v1_filtered_mixture"},
         "v2": {"version": "v2_planner_required"}, "v2 bias": {"version": "v2_planner_required", "experts": "bias"}}
APELR_TERMS = {  # our name: (the source's, weight)
    "v1": {"belief_entropy": ("belief_entropy", 0.01), "usage_kl": ("usage_kl_to_uniform", 0.01),
           "chunk_bow": ("chunk_bow_loss", 0.1), "plan_mi": ("plan_mi", 0.01),
           "chunk_post_kl": ("chunk_post_kl", 0.01)},
    "v2": {"boundary_entropy": ("boundary_entropy", 0.01), "usage_balance": ("usage_kl_to_uniform", 0.01),
           "future_contrastive": ("future_contrastive_loss", 0.1), "plan_js_div": ("plan_js_div_loss", 0.01),
           "rep_unlikelihood": ("rep_unlikelihood_loss", 0.1)}}
APELR_BATCH, ONE_BY_ONE = 8, ((128, 8, 128, 256), (2_048, 8, 128, 256), (8_192, 8, 128, 256), (2_048, 4, 128, 256),
                              (2_048, 16, 128, 256), (2_048, 8, 512, 256), (2_048, 8, 128, 768))  # V, K, L, H


def bench_apelr(peer_path: str | None, full: bool = False) -> None:
    """The planner against the plain softmax of the same shape, against the source, and sampling.

    Shapes: around V = 2048, K = 8, L = 128, H = 256 one changes at a time (V 128, 8192; K 4, 16; L 512; H 768); full is
    the whole grid. They train on the likelihood alone, in fp32 (bf16 on a GPU), 8 windows a step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = peer_path and str(Path(peer_path).resolve() / "src")
    if not (peer and (Path(peer) / "apelr" / "model_v2.py").exists()):
        report("apelr source", 0.0, "tokens/s", "missing: --peer=PATH of a checkout with src/apelr")
        peer = None
    against_source(peer, device)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for line in pool.submit(measure_writing, peer, device).result():
            report(*line)
    peak = matmul_rate(Runtime(train_apelr.Config(device=device)))
    report(f"apelr matrix-multiply rate, {device}", peak / 1e9, "GFLOP/s")
    for shape in itertools.product((128, 2_048, 8_192), (4, 8, 16), (128, 512), (256, 768)) if full else ONE_BY_ONE:
        where, tokens = "V {} K {} L {} H {}".format(*shape), APELR_BATCH * shape[2]
        sides = dict.fromkeys(APELR, "")
        times, memory, flops = alternate("ApelrTrainer", sides, ("", *shape, False, "auto", device), 2)
        rates = {side: tokens / statistics.median(times[side]) for side in APELR}
        for side in APELR:
            name = f"apelr {side}, {where}"
            report(name, rates[side], "tokens/s", f"matrix-multiply rate, at {flops[side] / 1e6:.1f} MFLOP a token",
                   peak / flops[side])
            if side != "baseline":
                report(name, rates[side], "tokens/s", "the baseline", rates["baseline"])
            report(f"{name}, peak memory", memory[side], "MB")


def against_source(peer: str | None, device: str) -> None:
    """Every auxiliary term on, the source's boundaries and lookahead; V = 2048, K = 8, L = 128, H = 256, batch 8."""
    for precision in ("fp32", "bf16"):
        peak = matmul_rate(Runtime(train_apelr.Config(device=device, precision=precision)))
        sides = {"ours": "", "every token": "the same, plan_mi and plan_js_div on every token instead of a quarter"}
        if peer:
            sides[peer] = f"APEL-R source in {precision}"
        for version in APELR_TERMS:
            race("ApelrTrainer", sides, (version, 2_048, 8, 128, 256, True, precision, device), APELR_BATCH * 128,
                 f"apelr {version}, all terms, {precision} {device}", peak, rounds=3, memory=True)


def apelr_model(side: str, version: str, V: int, K: int, L: int, H: int, terms: bool, precision: str, device: str):
    """(model, settings) of train_apelr.py; (the source's model, None) where side is the path it is in."""
    shape = {"vocab_size": V, "num_plan_states": K, "token_dim": 256, "dropout": 0.1}
    if Path(side).is_absolute():
        sys.path.insert(0, side)
        from apelr import model, model_v2

        shape["hidden_dim"] = H
        if version == "v1":
            found = model.APELRModel(model.APELRModelConfig(fusion_dim=H, **shape))
        else:
            found = model_v2.APELRV2Model(model_v2.APELRV2ModelConfig(num_experts=K, **shape))
        return found.to(device), None
    weights = {ours: weight for ours, (_, weight) in APELR_TERMS[version].items()} if terms else {}
    names = {"belief_entropy": "entropy_reg_weight", "usage_kl": "usage_balance_weight"}
    settings = {names.get(k, f"{k}_weight"): w for k, w in weights.items()} if version == "v1" else {}
    cfg = train_apelr.Config(
        **APELR[version], **shape, **settings, d_model=H, fusion_dim=H, seq_len=L, precision=precision, device=device,
        loss_weights=weights if version == "v2" else {}, rep_window=32, compat="source" if terms else "",
        aux_token_fraction=1.0 if side == "every token" else 0.25)
    return train_apelr.build_model(cfg).to(device), cfg


class ApelrTrainer(SlowTrainer):
    """train_apelr.py, or the source, in the shape of apelr_model."""

    def __init__(self, side: str, version: str, *shape):
        self.version, (V, _, L, _, _, precision, device) = version or side, shape
        self.device = torch.device(device)
        self.model, self.cfg = apelr_model(side, self.version, *shape)
        tokens = torch.randint(V, (APELR_BATCH, L + 1), generator=torch.Generator().manual_seed(0)).to(self.device)
        self.inputs = tokens[:, :-1], tokens[:, 1:]
        if self.cfg:
            rt = Runtime(self.cfg).__enter__()
            trained, self.autocast = rt.wrap(self.model), rt.autocast
            self.loss = lambda: trained(*self.inputs, self.cfg.weights(), 1.0, 0.0)[0]
            self.optimizer = rt.adamw(train_apelr.parameter_groups(self.model, self.cfg), lr=1e-3)
        else:
            self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
            self.loss = self.loss_of_source
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def loss_of_source(self) -> torch.Tensor:
        if self.version == "v1":
            total, terms = self.model.filtered_nll(*self.inputs)
        else:
            total, terms = self.model.compute_losses(*self.inputs, rep_unlikelihood_window=32)
        for ours, (name, weight) in APELR_TERMS[self.version].items():
            total = total + (-weight if ours in train_apelr.MAXIMISED else weight) * terms[name]
        return total

    def flops_per_token(self) -> float:
        return train_apelr.flops_per_token(self.model)


def measure_writing(peer: str | None, device: str, count: int = 128) -> list[tuple]:
    """128 tokens after a prompt of 8; V = 2048, K = 8, H = 256, fp32. The source writes one text at a time."""
    shape, found = (2_048, 8, 128, 256, True, "fp32", device), []
    for version in APELR_TERMS:
        model, cfg = apelr_model("ours", version, *shape)
        with Runtime(cfg) as rt:
            prompts = {batch: torch.arange(8, device=device).expand(batch, -1) for batch in (1, 8, 64)}
            sides = {batch: functools.partial(train_apelr.generate, model, prompt, count, rt.generator())
                     for batch, prompt in prompts.items()}
            if peer:
                source = apelr_model(peer, version, *shape)[0]
                sides["APEL-R source"] = functools.partial(
                    source.generate_filtered if version == "v1" else source.generate_planned, list(range(8)), count)
            rounds = [{side: seconds(write, rt.device, repeats=1) for side, write in sides.items()} for _ in range(5)]
        for side in sides:
            batch = side if isinstance(side, int) else 1
            rate = statistics.median(batch * count / r[side] for r in rounds)
            ratio = statistics.median(r[1] * batch / r[side] for r in rounds)  # to ours at batch 1
            name = f"apelr {version} writing, batch {batch} {device}"
            if side == batch:
                found.append((name, rate, "tokens/s", *(("batch 1", rate / ratio) if batch > 1 else ())))
            else:
                ours = statistics.median(count / r[1] for r in rounds)
                found.append((name, ours, "tokens/s", side, ours * ratio))
    return found


# ---------------------------------------------------------------------------------------------------------------
# state
# ---------------------------------------------------------------------------------------------------------------
STATE_GENES = 2_000
STATE_SIZES = {  # sets of cells a step, and settings; the second: arc-state's state_sm, fewer sets
    "hidden 128": (8, {"cell_set_len": 64, "d_model": 128, "n_layers": 4, "n_heads": 4, "d_mlp": 512}),
    "state_sm": (4, {"cell_set_len": 128, "d_model": 672, "n_layers": 4, "n_heads": 8, "d_head": 84,
                     "d_mlp": 2_688, "n_encoder_layers": 4, "n_decoder_layers": 4})}
STATE_LOSSES = ((8, 64, 2_000), (4, 512, 2_000))  # sets, cells, genes
STATE_LARGE = (1_024, 20_000)  # cells, genes of the sets that memory is measured with


def bench_state(peer_path: str | None, full: bool = False) -> None:
    """Loader against cell-load, training against arc-state, the energy distance against geomloss, peak memory.

    arc-state: the newest release's model with its training_step and optimizer, gradients clipped at 10; "with loaders":
    each model fed by its own loader in its own process, without workers, cell-load's one batch after another as a
    Lightning trainer draws them. The same weights and no dropout on both sides.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lacking = [name for name, module in (("arc-state", "state"), ("cell-load", "cell_load")) if missing(module)]
    for name in lacking:
        report(f"state {name}", 0.0, "cells/s", f"{name} missing: pip install {name}")
    with tempfile.TemporaryDirectory() as folder:
        toml = str(write_cells(Path(folder)))
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            for measure in (measure_cells, measure_distance, measure_agreement)[: 3 - ("arc-state" in lacking)]:
                for line in pool.submit(measure, toml, device, lacking).result():
                    report(*line)
        peak = matmul_rate(Runtime(train_state.Config(device=device, precision="fp32")))
        report(f"state matrix-multiply rate, {device}", peak / 1e9, "GFLOP/s")
        for size, (batch, settings) in STATE_SIZES.items():
            for loads in (False, True)[: 1 + (full or size == "hidden 128")]:
                sides = {"ours": ""}
                if settings["d_model"] >= 256 and not loads:
                    sides["bf16"] = "the same in bf16"
                if not lacking or lacking == ["cell-load"] and not loads:
                    sides["arc-state"] = "arc-state" + " fed by cell-load" * loads
                race("StateTrainer", sides, (size, toml, loads, device), batch * settings["cell_set_len"],
                     f"state training, {size}{', with loaders' * loads} {device}", peak, 5 if full else 3, unit="cell")
    measure_large(lacking)


def write_cells(folder: Path) -> Path:
    """A TOML of 10,240 cells, a tenth of their 2,000 genes above 0: dense in X_hvg, sparse in X. Returns its path.

    4 cell types of 16 perturbations, 128 cells of each, and of 512 control cells: no set lacks a cell.
    """
    rng, kind = np.random.default_rng(0), np.repeat(np.arange(4 * 20), 128)
    cells = 30 * np.maximum(rng.random((len(kind), STATE_GENES), np.float32) - np.float32(0.9), 0)  # up to 3: log1p
    obs = {"gene": [f"p{k % 20}" if k % 20 < 16 else "non-targeting" for k in kind],
           "cell_type": [f"c{k // 20}" for k in kind], "gem_group": [f"b{i % 2}" for i in range(len(kind))]}
    write_h5ad(folder / "cells.h5ad", csr_array(cells), obs,
                            [f"g{i}" for i in range(STATE_GENES)], {"X_hvg": cells})
    path = folder / "cells.toml"
    path.write_text(f'[datasets]\nbench = "{folder / "cells.h5ad"}"\n[training]\nbench = "train"\n')
    return path


def cell_batches(toml: str, device: str, **settings) -> train_state.Batches:
    """The loader of train_state.py on the cells of write_cells, prepared beside them."""
    cfg = train_state.Config(**{"toml_config_path": toml, "val_fraction": 0.0, "dropout": 0.0, "optimizer": "adam",
                                "use_basal_projection": False, "device": device, "precision": "fp32"} | settings)
    cells = open_cells(toml=toml, folder=Path(toml).parent / "cells",
                       **{name: getattr(cfg, name) for name in train_state.OF_DATA})
    return train_state.Batches(Runtime(cfg), cells, cfg)


@contextlib.contextmanager
def quiet():
    """The peers print their models, and warn of what is set by their own defaults."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cell_load(toml: str, cfg: train_state.Config):
    """The training batches of cell-load, epoch after epoch."""
    from cell_load.data_modules import PerturbationDataModule

    module = PerturbationDataModule(
        toml, batch_size=cfg.batch_size, num_workers=0, embed_key=cfg.embed_key, cell_sentence_len=cfg.cell_set_len,
        output_space="gene" if cfg.embed_key else "all", basal_mapping_strategy="random")
    module.setup()
    return itertools.chain.from_iterable(itertools.repeat(module.train_dataloader()))


def measure_cells(toml: str, device: str, lacking: list[str]) -> list[tuple]:
    """Batches of 16 sets of 64 cells with their control cells, on the device, all of one process."""
    ours = {"dense X_hvg in memory": {}, "dense X_hvg, streamed": {"ram_budget_gb": 0.01},
            "sparse X in memory": {"embed_key": None, "output_space": "all"},
            "sparse X, streamed": {"embed_key": None, "output_space": "all", "ram_budget_gb": 0.01}}
    draws, peers, found = {}, {}, []
    with quiet(), Runtime(train_state.Config(device=device)):  # as in a run
        for name, settings in ours.items():
            batches = cell_batches(toml, device, batch_size=16, cell_set_len=64, **settings)
            draws[name] = functools.partial(lambda batches, steps: batches(next(steps)), batches, itertools.count())
            if "cell-load" not in lacking and "streamed" not in name:
                peers[name.split()[0]] = functools.partial(next, cell_load(toml, batches.cfg))
        rounds = [{name: seconds(draw, torch.device(device), repeats=1 if name in peers else 10)
                   for name, draw in (draws | peers).items()} for _ in range(3)]
    for name in draws:
        rate, kind = 16 * 64 / statistics.median(r[name] for r in rounds), name.split()[0]
        ratio = statistics.median(r[kind] / r[name] for r in rounds) if kind in peers else None
        found.append((f"state loader, {name} {device}", rate, "cells/s", *(
            (f"cell-load, {kind}", rate / ratio) if ratio else ())))
    return found


def measure_distance(toml: str, device: str, lacking: list[str]) -> list[tuple]:
    """The energy distance with its gradient, against geomloss; and how far their values are apart."""
    plain, found = geomloss.SamplesLoss("energy", backend="tensorized"), []
    for shape in STATE_LOSSES:
        generator = torch.Generator().manual_seed(0)
        x, y = (scale * (torch.rand(shape, generator=generator) - 0.9).relu().to(device) for scale in (30, 40))
        x.requires_grad_()

        def run(distance, x=x, y=y):
            return torch.autograd.grad(distance(x, y).sum(), x)

        sides = {"ours": train_state.set_loss, "geomloss": plain}
        rounds = [{side: seconds(functools.partial(run, distance), x.device, repeats=2)
                   for side, distance in sides.items()} for _ in range(3)]
        rate = shape[0] * shape[1] / statistics.median(r["ours"] for r in rounds)
        ratio = statistics.median(r["geomloss"] / r["ours"] for r in rounds)
        where = "[{}, {}, {}]".format(*shape) + f" {device}"
        found.append((f"state energy distance, {where}", rate, "cells/s", "geomloss, tensorized", rate / ratio))
        with torch.no_grad():
            gap = float(((train_state.set_loss(x, y) - plain(x, y)) / plain(x, y)).abs().max())
        found.append((f"state energy distance, {where}, difference", gap, "relative", "of the value of geomloss"))
    return found


def arc_state(cfg: train_state.Config, dims: dict, model=None):
    """arc-state's model of these settings, with the weights of ours if there is one."""
    with quiet():
        from state.tx.models.state_transition import StateTransitionPerturbationModel

        settings = copy.deepcopy(source_settings(cfg, dims))
        peer = StateTransitionPerturbationModel(**settings, lr=cfg.lr)
    peer.log = lambda *arguments, **options: None  # its trainer's
    if model is not None:
        peer.load_state_dict(source_state_dict(model))
    return peer


def in_rows(batch: dict) -> dict:
    """A batch of ours as cell-load gives it: a row a cell."""
    S = batch["ctrl_cell_emb"].shape[1]
    return {"pert_emb": batch["pert_emb"].repeat_interleave(S, 0), "batch": batch["batch"].flatten(),
            **{name: batch[name].flatten(0, 1) for name in ("ctrl_cell_emb", "pert_cell_emb")}}


def measure_agreement(toml: str, device: str, lacking: list[str]) -> list[tuple]:
    """Loss and gradient norm of arc-state and ours with its weights, on the same batch, relative differences."""
    found = []
    for size, (batch_size, settings) in STATE_SIZES.items():
        batches = cell_batches(toml, device, batch_size=batch_size, **settings)
        cfg, dims = batches.cfg, batches.cells.dims()
        torch.manual_seed(0)
        peer, model = arc_state(cfg, dims).to(device), train_state.build_model(cfg, dims).to(device)
        model.load_source_state_dict(peer.state_dict())
        batch = batches(0)
        losses = [peer.training_step(in_rows(batch), 0), model(batch, losses=True)["loss"]]
        for loss in losses:
            loss.backward()
        norms = [torch.nn.utils.get_total_norm([p.grad for p in side.parameters() if p.grad is not None])
                 for side in (peer, model)]
        for what, (theirs, own) in {"loss": losses, "gradient norm": norms}.items():
            gap = abs(own.item() / theirs.item() - 1)
            if not gap <= 1e-5:
                raise AssertionError(f"arc-state and train_state disagree by {gap:.1e} in the {what} of {size}")
            found.append((f"state {what}, {size} {device}, difference", gap, "relative", "of arc-state's"))
    return found


class StateTrainer(SlowTrainer):
    """train_state.py, in fp32 or bf16, or arc-state; on one batch, or with the loader of either side."""

    def __init__(self, side: str, size: str, toml: str, loads: bool, device: str):
        self.device = torch.device(device)
        batch_size, settings = STATE_SIZES[size]
        precision = "bf16" if side == "bf16" else "fp32"
        batches = cell_batches(toml, device, batch_size=batch_size, precision=precision, **settings)
        self.cfg, rt, batch, dims = batches.cfg, batches.rt.__enter__(), batches(0), batches.cells.dims()
        self.model, cfg = train_state.build_model(self.cfg, dims).to(self.device), self.cfg
        if side != "arc-state":
            trained, steps = rt.wrap(self.model), itertools.count()
            optimizer = train_state.make_optimizer(self.model, cfg, rt)
            parameters = list(self.model.parameters())
            draw = (lambda: batches(next(steps))) if loads else (lambda: batch)

            def step() -> None:
                train_state.train_step(trained, draw(), rt, cfg)
                rt.step(optimizer, parameters, cfg.grad_clip, cfg.lr)
                optimizer.zero_grad(set_to_none=True)
        else:
            peer, rows = arc_state(cfg, dims, self.model).to(self.device), in_rows(batch)
            optimizer, self.model = peer.configure_optimizers(), None
            torch.set_float32_matmul_precision("medium")  # as its command line does; of effect on a GPU
            with quiet():
                stream = cell_load(toml, cfg) if loads else itertools.repeat(rows)

            def step() -> None:
                with quiet():
                    given = peer.transfer_batch_to_device(next(stream), self.device, 0)
                peer.training_step(given, 0).backward()
                torch.nn.utils.clip_grad_norm_(peer.parameters(), cfg.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
        self.step = step

    def flops_per_token(self) -> float:
        """Of a cell: 6 x Linear weights, of the basal encoder 4, as cells need no gradient, and the perturbation's once
        a set; full attention, 12 x layers x cells x width; the distance, 3 products of cells and 2 for its gradient."""
        S, model, cfg = self.cfg.cell_set_len, self.model, self.cfg
        weights = {name: sum(m.weight.numel() for m in part.modules() if isinstance(m, torch.nn.Linear))
                   for name, part in model.named_children()}
        dense = 6 * sum(weights.values()) - 2 * weights["basal_encoder"] - 6 * weights["pert_encoder"] * (1 - 1 / S)
        width = cfg.n_heads * (cfg.d_head or cfg.d_model // cfg.n_heads)
        return dense + 12 * cfg.n_layers * S * width + 10 * S * model.dims["output_dim"]


def measure_large(lacking: list[str]) -> None:
    """Peak memory of one training step, and of the energy distance alone, with one set of many cells and genes."""
    S, G = STATE_LARGE
    where, cells = f"one set of {S:,} cells, {G:,} genes", S * G * 4 / 2**20
    report(f"state cells, {where}", cells, "MB", "predicted or measured, for comparison")
    kinds = ["ours", "energy"] + ["arc-state"] * ("arc-state" not in lacking) + ["geomloss"]
    pools = {kind: ProcessPoolExecutor(1, get_context("spawn")) for kind in kinds}  # at once: nothing is timed
    started = {kind: pool.submit(measure_peak, kind) for kind, pool in pools.items()}
    found = {kind: future.result() for kind, future in started.items()}
    for pool in pools.values():
        pool.shutdown()
    for name, kind, peer in (("training step", "ours", "arc-state"), ("energy distance", "energy", "geomloss")):
        against = (peer, found[peer]) if peer in found else ()
        report(f"state {name}, {where}, peak memory", found[kind], "MB", *against)


def measure_peak(kind: str) -> float:
    """MB that one forward and backward pass adds to what model, weights and cells take; on the CPU."""
    S, G = STATE_LARGE
    cells, measured = torch.rand(2, 1, S, G)
    if kind in ("ours", "arc-state"):
        cfg = train_state.Config(cell_set_len=S, dropout=0.0, use_basal_projection=False, optimizer="adam")
        dims = dict.fromkeys(("input_dim", "output_dim", "gene_dim", "hvg_dim"), G) | {
            "pert_dim": 16, "batch_dim": 2, "decodes": False}
        batch = {"pert_emb": torch.eye(16)[:1], "ctrl_cell_emb": cells, "pert_cell_emb": measured,
                 "batch": torch.zeros(1, S, dtype=torch.long)}
        if kind == "ours":
            model = train_state.build_model(cfg, dims)
            run = lambda: model(batch, losses=True)["loss"]  # noqa: E731
        else:
            peer, rows = arc_state(cfg, dims), in_rows(batch)
            run = lambda: peer.training_step(rows, 0)  # noqa: E731
    else:
        cells.requires_grad_()
        distance = train_state.set_loss if kind == "energy" else geomloss.SamplesLoss("energy", backend="tensorized")
        run = lambda: distance(cells, measured).sum()  # noqa: E731
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # torch's own footprint
    before = peak_memory()
    run().backward()
    return peak_memory() - before


BENCHES = {"ghmm": bench_ghmm, "arxiv": bench_arxiv, "apelr": bench_apelr, "state": bench_state}
LONGER = ("apelr", "state")  # with --full


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; default all")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--peer", metavar="PATH", help="checkout of the peer, for the benchmarks that take one by path")
    parser.add_argument("--full", action="store_true", help="apelr: the whole grid of shapes; state: more rounds")
    parser.error = fail  # one line, as everywhere
    with clear_errors():
        return measure(parser.parse_args(argv))


def measure(args: argparse.Namespace) -> list[dict]:
    """What the command line asks for: the results."""
    for name in args.names:
        if name not in BENCHES:
            fail(f"no benchmark {name!r}{closest(name, BENCHES) or '.'} There are {', '.join(BENCHES)}")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        fail(f"--json={args.json}: its folder does not exist")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, python {sys.version.split()[0]}")
    RESULTS.clear()
    for name in args.names or BENCHES:
        run = BENCHES[name]
        run(args.peer, full=True) if args.full and name in LONGER else run(args.peer)
    if args.json:
        write_json(Path(args.json), RESULTS)
    return RESULTS


if __name__ == "__main__":
    main()
