"""ghmm: drawing, filtering and training, against hmmlearn, the source (Simplexity, in JAX) and HookedTransformer."""

import argparse
import json
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import train_ghmm
from benchmarks import racing
from benchmarks.racing import (
    POOL,
    Rounds,
    Trainer,
    absent,
    both_ways,
    in_turns,
    linear_weights,
    missing,
    peer_name,
    pool,
    race,
    report,
)
from common.errors import InputError
from common.runtime import Runtime
from configurator import fail
from sources.processes import Process

PROCESSES, SHAPES = ("mess3", "rrxor", "tom_quantum"), ((64, 65), (1_024, 256))  # sequences, length
TRAINING_SHAPES = ((64, 10, 1), (64, 64, 4), (512, 10, 1))  # sequences, n_ctx, heads
LOG_PROB_GAP = {"hmmlearn": 1e-9, "Simplexity": 1e-5}  # nats a token that a peer may differ by: Simplexity has float32
DRAWN = 10_000  # tokens that hmmlearn draws at once


def bench(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Runtime(train_ghmm.Config(device=device.type)):  # as in a run
        for name in PROCESSES:
            for batch, length in SHAPES:
                bench_process(name, batch, length, device)
    if options.peer:
        against_simplexity(options.peer, options.peer_python)
    else:
        absent("ghmm Simplexity", "--peer=PATH of a checkout, and --peer_python=PATH of a Python with jax and equinox")
    bench_training(device)


def bench_process(name: str, batch: int, length: int, device: torch.device) -> None:
    process = train_ghmm.make_process(name).to(device)
    generator = torch.Generator(device).manual_seed(0)
    tokens = process.sample(batch, length, generator)
    where = f"{name} {batch}x{length} {device.type}"
    runs = our_runs(process, tokens, generator)
    hmm = hmmlearn_runs(process, tokens, where) if process.is_hmm and device.type == "cpu" else {}
    times = in_turns(runs | hmm, device)
    rates = {kind: found.rate(DRAWN if kind == "sample" else tokens.numel()) for kind, found in times.items()}
    for kind, peer in (("sampling", "sample"), ("beliefs", ""), ("log_prob", "score")):
        line = f"ghmm {kind}, {where}", rates[kind], "tokens/s"
        if peer in rates:
            report(*line, f"hmmlearn {peer}", rates[peer])
        else:
            report(*line)


def our_runs(process: Process, tokens: torch.Tensor, generator: torch.Generator) -> dict:
    return {
        "sampling": lambda: process.sample(*tokens.shape, generator),
        "beliefs": lambda: process.beliefs(tokens),
        "log_prob": lambda: process.log_prob(tokens),
    }


def hmmlearn_runs(process: Process, tokens: torch.Tensor, where: str) -> dict:
    """hmmlearn emits from states, we from transitions: its states are our pairs (token, next state)."""
    if missing("hmmlearn"):
        absent(f"ghmm hmmlearn, {where}", "pip install hmmlearn")
        return {}
    from hmmlearn.hmm import CategoricalHMM

    T = process.transition_matrices.numpy()
    V, S = process.vocab_size, process.num_states
    peer = CategoricalHMM(n_components=V * S, n_features=V)
    peer.startprob_ = np.einsum("i,xij->xj", process.initial_state.numpy(), T).reshape(-1)
    peer.transmat_ = np.tile(T.transpose(1, 0, 2).reshape(S, V * S), (V, 1))  # from (x, i) to (y, j)
    peer.emissionprob_ = np.repeat(np.eye(V), S, axis=0)
    lengths, flat = [tokens.shape[1]] * len(tokens), tokens.reshape(-1, 1).numpy()

    def quietly(method, *arguments, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of states that are never visited
            return method(*arguments, **options)

    agree("hmmlearn", quietly(peer.score, flat, lengths), process.log_prob(tokens).sum(), len(flat), where)
    return {"sample": lambda: quietly(peer.sample, min(DRAWN, len(flat)), random_state=0),
            "score": lambda: quietly(peer.score, flat, lengths)}


def agree(peer: str, theirs: float, ours: float, tokens: int, where: str) -> None:
    """Raise AssertionError where the log-probabilities of the same words differ: then a race means nothing."""
    gap = abs(float(theirs) - float(ours)) / tokens
    if not gap <= LOG_PROB_GAP[peer]:
        raise AssertionError(f"{peer} and train_ghmm disagree by {gap:.1e} nats a token on {where}")


# ---------------------------------------------------------------------------------------------------------------
# Simplexity: JAX, in a Python of its own
# ---------------------------------------------------------------------------------------------------------------
def check_jax(path: Path, python: str | None) -> None:
    """Exit with code 2 where that Python cannot import Simplexity."""
    if not python:
        fail(f"--peer={path}: Simplexity needs JAX: name a Python that has jax, equinox, chex and jaxtyping with "
             "--peer_python=PATH")
    place = f"import sys; sys.path.insert(0, {str(path)!r})"
    code = f"{place}; import jax, equinox, simplexity.generative_processes.hidden_markov_model"
    try:
        tried = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        fail(f"--peer_python={python}: {error.strerror}")
    if tried.returncode:
        fail(f"--peer_python={python} cannot import Simplexity: {tried.stderr.strip().splitlines()[-1]}")


class Simplexity:
    """benchmarks/simplexity_side.py as a process that times its own calls, jitted and in float32 as it comes."""

    def __init__(self, path: Path, python: str, folder: str):
        script = Path(__file__).with_name("simplexity_side.py")
        self.process = subprocess.Popen([python, script, path, folder], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)

    def ask(self, **question):
        """The answer to a JSON line, a JSON line too."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise InputError("Simplexity's process ended: its last lines are above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def against_simplexity(path: Path, python: str) -> None:
    """Mess3, 1,024 x 256: drawing words, the beliefs along given words, their log-probabilities."""
    batch, length = SHAPES[-1]
    process, generator = train_ghmm.make_process("mess3"), torch.Generator().manual_seed(0)
    tokens = process.sample(batch, length, generator)
    runs = our_runs(process, tokens, generator)
    rounds, lasting = racing.pace(5, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens.numpy())
        peer = Simplexity(path, python, folder)
        try:
            theirs = peer.ask(total="log_prob")
            agree("Simplexity", theirs, process.log_prob(tokens).sum(), tokens.numel(), "mess3")
            for kind, run in runs.items():
                racing.warm_up(run, torch.device("cpu"), lasting)
                ours, others = [], []
                for _ in range(rounds):
                    ours.append(racing.window(run, torch.device("cpu"), lasting))
                    others.append(peer.ask(window=kind, lasting=lasting))
                report(f"ghmm {kind}, mess3 {batch}x{length} cpu", Rounds(ours).rate(tokens.numel()), "tokens/s",
                       "Simplexity's JAX, jitted, float32", Rounds(others).rate(tokens.numel()))
        finally:
            peer.close()


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
class GhmmTrainer(Trainer):
    """train_ghmm.py, or HookedTransformer of the same shape, on batches drawn from Mess3."""

    def __init__(self, side: str, batch: int, n_ctx: int, heads: int, device: str):
        self.device = torch.device(device)
        self.cfg = cfg = train_ghmm.Config(n_ctx=n_ctx, n_heads=heads, batch_size=batch, device=device)
        process, generator = train_ghmm.build_process(cfg), torch.Generator().manual_seed(0)
        self.draw = pool([process.sample(batch, n_ctx + 1, generator).to(self.device) for _ in range(POOL)])
        if side == "ours":
            self.rt = rt = Runtime(cfg).__enter__()
            self.model = train_ghmm.build_model(cfg, process.vocab_size).to(self.device)
            trained, parameters = rt.wrap(self.model), list(self.model.parameters())
            optimizer = rt.adamw(parameters, lr=cfg.lr)

            def step() -> None:
                train_ghmm.train_step(trained, self.draw(), rt, cfg)
                rt.step(optimizer, parameters, cfg.grad_clip, cfg.lr)

            self.step = step
        else:
            peer_name(side, cfg)
            self.model = hooked_transformer(cfg, process.vocab_size)
            self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
            self.parameters = list(self.model.parameters())
            self.optimizer = torch.optim.AdamW(self.parameters, lr=cfg.lr)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        return train_ghmm.next_token_loss(self.model(tokens[:, :-1]), tokens[:, 1:])

    def flops_per_token(self) -> float:
        return linear_flops(self.model, self.cfg)


def linear_flops(model: torch.nn.Module, cfg: train_ghmm.Config) -> float:
    """6 x Linear weights + full attention, the convention of PaLM (Chowdhery et al. 2022)."""
    return 6 * linear_weights(model) + 12 * cfg.n_layers * cfg.n_ctx * cfg.d_model


def hooked_transformer(cfg: train_ghmm.Config, vocab_size: int) -> torch.nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(HookedTransformerConfig(
        n_layers=cfg.n_layers, d_model=cfg.d_model, n_ctx=cfg.n_ctx, d_head=cfg.head_width(), n_heads=cfg.n_heads,
        d_mlp=cfg.d_mlp, d_vocab=vocab_size, act_fn=cfg.act, normalization_type="LN", device=cfg.device, seed=0))


def bench_training(device: torch.device) -> None:
    sides = {"HookedTransformer": "HookedTransformer with torch's AdamW"}
    if missing("transformer_lens"):
        absent("ghmm HookedTransformer", 'pip install "transformer-lens<4"')
        sides = {}
    sides = {"ours": ""} | both_ways(sides, train_ghmm.Config(device=device.type))
    for batch, n_ctx, heads in TRAINING_SHAPES:
        race(GhmmTrainer, sides, (batch, n_ctx, heads, device.type), batch * n_ctx,
             f"ghmm training, {batch}x{n_ctx} {heads} heads {device.type}")
