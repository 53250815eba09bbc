"""Benchmarks: ratios against a named peer, or against what the machine can do, measured side by side in one run.

    python bench.py                      # everything
    python bench.py ghmm --json=out.json # one experiment, the results written too

Each result is {name, value, unit, against, ratio}: ratio is value / the peer's value, so above 1 is faster. Peers take
part where they can be imported: hmmlearn, and transformer-lens before version 4 (`pip install "transformer-lens<4"`);
a line says which was missing. Times are medians; on a shared machine trust the ratios, not the values.
"""

import argparse
import difflib
import json
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train_ghmm
from common.runtime import Runtime
from configurator import fail

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


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the rate that nothing here can beat."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device, repeats=15)


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

    def step(self) -> None:
        with self.autocast():
            loss = train_ghmm.next_token_loss(self.logits(self.tokens[:, :-1]), self.tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def median_step(self) -> float:
        return seconds(self.step, self.device, repeats=15)

    def linear_parameters(self) -> int:
        return sum(m.weight.numel() for m in self.model.modules() if isinstance(m, torch.nn.Linear))


def hooked_transformer(cfg: train_ghmm.Config, vocab_size: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        return HookedTransformer(HookedTransformerConfig(
            n_layers=cfg.n_layers, d_model=cfg.d_model, n_ctx=cfg.n_ctx, d_head=cfg.head_width(), n_heads=cfg.n_heads,
            d_mlp=cfg.d_mlp, d_vocab=vocab_size, act_fn=cfg.act, normalization_type="LN", device=cfg.device, seed=0))


_trainer: Trainer | None = None  # of the worker process


def _start(*shape) -> int:
    global _trainer
    _trainer = Trainer(*shape)
    return _trainer.linear_parameters()


def _measure() -> float:
    return _trainer.median_step()


def bench_training(device: torch.device, rounds: int = 5) -> None:
    """Training tokens/s and the fraction of the matrix-multiply rate: 6 x Linear weights + full attention per token."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
        sides = ("ours", "peer")
    except ImportError:
        sides = ("ours",)
    peak = matmul_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    report(f"ghmm matrix-multiply rate, {device.type}", peak / 1e9, "GFLOP/s")
    for batch, n_ctx, heads in TRAINING_SHAPES:
        cfg = train_ghmm.Config()
        with ProcessPoolExecutor(1, get_context("spawn")) as a, ProcessPoolExecutor(1, get_context("spawn")) as b:
            pools = dict(zip(("ours", "peer"), (a, b), strict=True))
            weights = [pools[side].submit(_start, side, batch, n_ctx, heads, device.type).result() for side in sides][0]
            times = {side: [] for side in sides}
            for _ in range(rounds):  # in turns, so that a slow minute of the machine meets both
                for side in sides:
                    times[side].append(pools[side].submit(_measure).result())
        count, name = batch * n_ctx, f"ghmm training, {batch}x{n_ctx} {heads} heads {device.type}"
        rate = count / statistics.median(times["ours"])
        flops = 6 * weights + 12 * cfg.n_layers * n_ctx * cfg.d_model  # per token, the convention of PaLM (2022)
        report(name, rate, "tokens/s", f"matrix-multiply rate, at {flops / 1e6:.2f} MFLOP a token", peak / flops)
        if "peer" in sides:
            ratio = statistics.median(p / o for o, p in zip(times["ours"], times["peer"], strict=True))
            report(name, rate, "tokens/s", "HookedTransformer with torch's AdamW", rate / ratio)
        else:
            report(name, rate, "tokens/s", 'HookedTransformer missing: pip install "transformer-lens<4"')


BENCHES = {"ghmm": bench_ghmm}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; default all")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--peer", metavar="PATH", help="checkout of the peer, for the benchmarks that take one by path")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in BENCHES:
            near = difflib.get_close_matches(name, BENCHES, n=1)
            fail(f"no benchmark {name!r}: " + (f"did you mean {near[0]!r}? " if near else "")
                 + f"There are {', '.join(BENCHES)}")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        fail(f"--json={args.json}: its folder does not exist")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, python {sys.version.split()[0]}")
    RESULTS.clear()
    for name in args.names or BENCHES:
        BENCHES[name](args.peer)
    if args.json:
        Path(args.json).write_text(json.dumps(RESULTS, indent=2) + "\n")
    return RESULTS


if __name__ == "__main__":
    main()
