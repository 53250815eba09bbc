"""arxiv: tokenizer, chunk loader and training, against Hugging Face's tokenizers and GPT-2, h5py and nanoGPT."""

import argparse
import functools
import importlib
import os
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import torch

import train_arxiv
from benchmarks.racing import (
    Trainer,
    absent,
    both_ways,
    in_turns,
    missing,
    peak_memory,
    peer_name,
    pool,
    race,
    report,
    zipf_tokens,
)
from common.runtime import Runtime
from sources.chunks import ChunkSpool, chunk_arrays
from sources.tokenizer import train_bpe

SHAPES = {"published": (6, 256, 1_024, 8_192, 16), "small": (2, 96, 384, 2_048, 32)}  # layers, D, MLP, V, batch
PRECISIONS = (("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.1))  # with dropout
CHUNK = 100  # tokens


def bench(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench_tokenizer()
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:  # a process of its own, for its peak memory
        for line in worker.submit(measure_loader).result():
            report(*line)
    sides = peers(options.peer)
    for name, shape in SHAPES.items():
        for precision, dropout in PRECISIONS:
            against = {side: f"{text} in {precision}" for side, text in sides.items()}
            if precision == "fp32":
                against = both_ways(against, train_arxiv.Config(device=device.type, precision=precision))
            elif "transformers" in sides:
                against["transformers fp32"] = f"{sides['transformers']} in fp32"
            race(ArxivTrainer, {"ours": ""} | against, (*shape, dropout, precision, device.type),
                 shape[-1] * (CHUNK - 1), f"arxiv training, {name}, {precision}, dropout {dropout} {device.type}")


def peers(checkout: Path | None) -> dict[str, str]:
    """Those that can take part, by the side that ArxivTrainer knows them as."""
    found = {}
    if missing("transformers"):
        absent("arxiv transformers", "pip install transformers")
    else:
        found["transformers"] = "GPT2LMHeadModel of transformers"
    if checkout:
        found[str(checkout)] = "nanoGPT"
    else:
        absent("arxiv nanoGPT", "--peer=PATH of a checkout with model.py")
    return found


def bench_tokenizer(size: int = 6_000_000) -> None:
    """Training and encoding in MB/s on the text of Python's own library, one thread a side."""
    documents = python_texts(size)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    ours = train_bpe(documents, 4_096)
    runs = {"training": lambda: train_bpe(documents, 4_096), "encoding": lambda: ours.encode_batch(documents, 1)}
    names = {"training": "arxiv BPE training", "encoding": "arxiv BPE encoding, one thread"}
    if missing("tokenizers"):
        absent("arxiv tokenizers", "pip install tokenizers")
        for kind, times in in_turns(runs, rounds=3).items():
            report(names[kind], times.rate(megabytes), "MB/s")
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    peer = trained_peer(documents)
    theirs = {"training": lambda: trained_peer(documents), "encoding": lambda: peer.encode_batch(documents)}
    for kind, run in runs.items():
        times = in_turns({"ours": run, "theirs": theirs[kind]}, rounds=3)
        report(names[kind], times["ours"].rate(megabytes), "MB/s", "Hugging Face tokenizers",
               times["theirs"].rate(megabytes))


def python_texts(size: int) -> list[str]:
    """Documents of 2,000 characters, `size` in all."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        texts.append(file.read_text(encoding="utf-8", errors="replace")[:size])
        size -= len(texts[-1])
        if size <= 0:
            break
    return [text[i : i + 2_000] for text in texts for i in range(0, len(text), 2_000)]


def trained_peer(documents: list[str]):
    from tokenizers import ByteLevelBPETokenizer

    peer = ByteLevelBPETokenizer()
    peer.train_from_iterator(documents, vocab_size=4_096, show_progress=False)
    return peer


def measure_loader(chunks: int = 500_000) -> list[tuple]:
    """A file of 50 M tokens: seconds to open it, chunks/s at random, and the memory that takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_chunks(Path(folder), chunks, ["a", "b"])
        before, began = peak_memory(), time.perf_counter()
        data = train_arxiv.Chunks(**chunk_arrays(path))
        opened = time.perf_counter() - began
        cfg = train_arxiv.Config(batch_size=512, device="cpu")
        batches = train_arxiv.Batches(Runtime(cfg), data, train_arxiv.training_rows(data, ["a", "b"], cfg), cfg)
        steps, rng = iter(range(10**9)), np.random.default_rng(0)
        with h5py.File(path) as file:
            rows = iter(rng.integers(0, chunks, 10**6).tolist())
            runs = {"ours": lambda: batches(next(steps)), "h5py": lambda: file["token_chunks"][next(rows)]}
            times = in_turns(runs)
        grown = peak_memory() - before
    return [("arxiv open 50 M tokens", opened, "s"),
            ("arxiv loader", times["ours"].rate(512), "chunks/s", "h5py, a row at a time", times["h5py"].rate(1)),
            ("arxiv loader, memory grown by (50 M tokens, 100 MB on disk)", grown, "MB")]


def write_chunks(folder: Path, chunks: int, names: list[str], split: str = "train") -> Path:
    """A chunk file of 8,192 tokens in categories of these names, 500 chunks a document."""
    rng = np.random.default_rng(0)
    spool = ChunkSpool(folder, split, CHUNK, 8_192)
    for name in names:
        for _ in range(chunks // len(names) // 500):
            spool.add(name, rng.integers(0, 8_192, 500 * CHUNK))
    path = folder / f"{split}.h5"
    spool.write(path, tokenizer="", source="bench", seed=0)
    spool.close()
    return path


class ArxivTrainer(Trainer):
    """train_arxiv.py, transformers' GPT-2 or nanoGPT of the same shape, on tokens as frequent as words.

    The peers as their users train them: GPT-2 with torch's AdamW, nanoGPT with the optimizer that it configures. By
    default nanoGPT's own loop has bf16 and compiles on a GPU; transformers' has fp32.
    """

    def __init__(self, side: str, layers: int, width: int, mlp: int, vocab: int, batch: int, dropout: float,
                 precision: str, device: str):
        self.device = torch.device(device)
        self.cfg = cfg = train_arxiv.Config(n_layers=layers, d_model=width, d_mlp=mlp, dropout=dropout, device=device,
                                            precision=precision)
        self.draw = pool(zipf_tokens(vocab, batch, CHUNK, self.device))
        half = precision == "bf16" and not side.endswith("fp32")
        peer = peer_name(side, cfg)
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=half)
        if side == "ours":
            self.take_ours(vocab)
        elif side.startswith("transformers"):
            self.model = gpt2(cfg, vocab).to(self.device)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr)
            self.loss = lambda tokens: train_arxiv.token_xe(
                self.model(tokens[:, :-1], use_cache=False).logits, tokens[:, 1:]).mean()
        else:
            self.take_nanogpt(peer, vocab)
        self.model.train()
        self.parameters = list(self.model.parameters())

    def take_ours(self, vocab: int) -> None:
        cfg = self.cfg
        self.rt = rt = Runtime(cfg).__enter__()
        self.model = train_arxiv.build_model(cfg, vocab, CHUNK).to(self.device)
        trained, optimizer = rt.wrap(self.model), rt.adamw(train_arxiv.parameter_groups(self.model, cfg), lr=cfg.lr)

        def step() -> None:
            train_arxiv.train_step(trained, self.draw(), rt, cfg)
            rt.step(optimizer, self.parameters, cfg.grad_clip, cfg.lr)

        self.step = step

    def take_nanogpt(self, checkout: str, vocab: int) -> None:
        sys.path.insert(0, checkout)
        nanogpt, cfg = importlib.import_module("model"), self.cfg
        self.model = nanogpt.GPT(nanogpt.GPTConfig(
            block_size=CHUNK, vocab_size=vocab, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_embd=cfg.d_model,
            dropout=cfg.dropout)).to(self.device)
        self.optimizer = self.model.configure_optimizers(cfg.weight_decay, cfg.lr, (0.9, 0.95), self.device.type)
        # Its call is (tokens, targets) -> (logits, loss), and its loss views the targets, which must be in one piece.
        self.loss = lambda tokens: self.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]

    def flops_per_token(self) -> float:
        return train_arxiv.flops_per_token(self.model, self.cfg, CHUNK)


def gpt2(cfg: train_arxiv.Config, vocab: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()  # it remarks on special tokens that a small vocabulary lacks
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab, n_positions=CHUNK, n_embd=cfg.d_model, n_layer=cfg.n_layers, n_head=cfg.n_heads,
        n_inner=cfg.d_mlp, resid_pdrop=cfg.dropout, embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout))
