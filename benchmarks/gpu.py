"""gpu: what the pages do on a GPU, in one command; `--device=cpu --short` drives all of it in miniature.

Of every page its default and its published config: tokens or cells a second, share of the measured matrix rate, peak
memory, eager and compiled (the tiny models with CUDA graphs too), against its peer in the same run; the loss after 500
steps in bf16 against fp32; kill and resume; the tests that need a GPU. Data are stand-ins of the right shape, made on
the spot. Goals are printed beside what was reached.
"""

import argparse
import contextlib
import functools
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

import train_apelr
import train_arxiv
import train_ghmm
import train_state
from benchmarks import racing
from benchmarks.apelr import TERMS, source_model
from benchmarks.arxiv import CHUNK, gpt2, python_texts, write_chunks
from benchmarks.ghmm import hooked_transformer, linear_flops
from benchmarks.racing import Trainer, absent, missing, race, report, result
from benchmarks.state import arc_state, cell_flops, in_rows, write_cells
from common.runtime import Runtime, learning_rate
from configurator import configure
from measure.speed import fitting_batch_size, flops_per_token
from sources.cells import open_cells
from sources.text import prepare_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"ghmm": train_ghmm, "arxiv": train_arxiv, "apelr": train_apelr, "state": train_state}
PEERS = {"ghmm": "HookedTransformer", "arxiv": "GPT-2 of transformers", "apelr": "APEL-R source", "state": "arc-state"}
MODULES = {"ghmm": "transformer_lens", "arxiv": "transformers", "state": "state"}  # what they are imported from
RESULT = {"ghmm": "loss", "arxiv": "val_xe", "apelr": "val_nll", "state": "mae"}  # of summary.json
COMPILED = {"ours": "true", "eager": "false", "CUDA graphs": "false"}  # sides of ours, and their --compile
CELLS = {"default": 128, "state_sm": 128, "state_lg": 512}  # of each condition: as many as a set
LOSS_STEPS, LOSS_MEAN = 500, 50  # steps in each precision; the mean over the last so many is compared
TESTS = ("tests/test_ghmm_process.py", "tests/test_ahead.py", "tests/test_device.py")
RUN_STEPS, SAVE_STEPS = 60, 20  # of the run that is killed
SHORT_SHAPE = {  # of --short: the same settings, small
    "ghmm": ["--n_layers=1", "--d_model=16", "--batch_size=8"],
    "arxiv": ["--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=32", "--batch_size=8"],
    "apelr": ["--d_model=16", "--token_dim=16", "--seq_len=32", "--batch_size=2"],
    "state": ["--n_layers=1", "--d_model=16", "--n_heads=2", "--d_head=8", "--d_mlp=32", "--batch_size=2",
              "--cell_set_len=8"],
}


class Workload(NamedTuple):
    """A run of a page: its config file, goals (share of the matrix rate, times the peer), whether graphs are tried.

    alone: nothing else is on the GPU, whose memory it fills. more: words of its command line.
    """

    page: str
    config: str = ""
    share: float | None = None
    times: float | None = None
    tiny: bool = False
    alone: bool = False
    more: tuple = ()


WORKLOADS = {
    "ghmm default": Workload("ghmm", times=2, tiny=True),
    "ghmm published": Workload("ghmm", "ghmm_mess3", times=2, tiny=True),
    "arxiv default": Workload("arxiv", tiny=True),
    "arxiv published": Workload("arxiv", "arxiv", share=0.4),
    "apelr default": Workload("apelr", times=5),
    "apelr v2_fast": Workload("apelr", "v2_fast", alone=True),
    "apelr v2_fast, 32 windows": Workload("apelr", "v2_fast", times=5, more=("--batch_size=32",)),
    "state default": Workload("state", times=2, tiny=True),
    "state state_sm": Workload("state", "state_sm", share=0.4, times=2),
    "state state_lg": Workload("state", "state_lg", times=2),
}


def bench(options: argparse.Namespace) -> None:
    device, short = options.device or "cuda", options.short
    source = str(options.peers["apelr"] / "src") if "apelr" in options.peers else None
    chosen = racing.chosen(WORKLOADS, options.only)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            it = WORKLOADS[name]
            words = settings(name, Path(folder), device, short)
            bench_speed(name, it, words, source)
            if not it.alone:
                compare_losses(name, it, words, 4 if short else LOSS_STEPS)
            if name.endswith("default"):
                kill_and_resume(it.page, words, Path(folder))
    if not options.only:
        run_tests(short)


# ---------------------------------------------------------------------------------------------------------------
# Settings and data
# ---------------------------------------------------------------------------------------------------------------
def settings(name: str, folder: Path, device: str, short: bool) -> list[str]:
    """The words of a command line of the page: its config file, and data of the right shape in the folder."""
    it = WORKLOADS[name]
    words = [f"--device={device}"]
    if it.config:
        words.append(str(ROOT / "config" / f"{it.config}.py"))
    words += data_words(it.page, it.config or "default", folder, short)
    words += it.more
    if short:
        words += SHORT_SHAPE[it.page]
    return words


def data_words(page: str, kind: str, folder: Path, short: bool) -> list[str]:
    """What names the stand-ins, made here if this run has not yet."""
    place = folder / f"{page}_{kind}"
    is_new = not place.exists()
    place.mkdir(parents=True, exist_ok=True)
    if page == "ghmm":
        return []  # it draws its own
    if page == "state":
        if is_new:
            write_cells(place, 8 if short else CELLS[kind])
        return [f"--toml_config_path={place / 'cells.toml'}"]
    if page == "arxiv" and is_new:
        names = ["cs.DS", "math.ST", "math.GR", "cs.IT", "cs.PL"]
        for split in ("train", "validation"):
            write_chunks(place, 5_000 if short else 100_000, names, split)
    if page == "apelr" and is_new:
        text = place / "texts.txt"
        text.write_text("\n\n".join(python_texts(50_000 if short else 20_000_000)))
        size = 300 if short else 4_096 if kind == "v2_fast" else 1_024
        with contextlib.redirect_stdout(sys.stderr):
            prepare_text(input=str(text), out_dir=str(place), vocab_size=size)
    return [f"--data={place}"]


# ---------------------------------------------------------------------------------------------------------------
# One side
# ---------------------------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """What train() of a page has before its first step."""

    model: torch.nn.Module
    batches: Callable  # step -> batch
    optimizer: torch.optim.Optimizer
    units: int  # tokens or cells a step
    flops: float  # of one
    about: object  # what a peer needs to know: the vocabulary, or the sizes of the cells


def open_run(page: str, cfg, rt: Runtime, last: int) -> Run:
    """As train() opens it, but for the rehearsal and the run folder."""
    openers = {"ghmm": open_ghmm, "arxiv": open_arxiv, "apelr": open_apelr, "state": open_state}
    return openers[page](cfg, rt, last)


def open_ghmm(cfg, rt: Runtime, last: int) -> Run:
    process = train_ghmm.build_process(cfg)
    process.to(train_ghmm.exact_device(rt))
    model = train_ghmm.build_model(cfg, process.vocab_size).to(rt.device)
    return Run(
        model,
        batches=train_ghmm.Batches(rt, process, cfg),
        optimizer=rt.adamw(model.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2)),
        units=cfg.batch_size * cfg.n_ctx,
        flops=linear_flops(model, cfg),
        about=process.vocab_size,
    )


def open_arxiv(cfg, rt: Runtime, last: int) -> Run:
    page = train_arxiv
    chunks, validation = page.open_data(cfg)
    active = page.active_categories(chunks, validation, cfg)
    rows = page.training_rows(chunks, active, cfg)
    model = page.build_model(cfg, chunks.vocab_size, chunks.n_ctx).to(rt.device)
    return Run(
        model,
        batches=rt.ahead(page.Batches(rt, chunks, rows, cfg), last),
        optimizer=rt.adamw(page.parameter_groups(model, cfg), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2)),
        units=cfg.batch_size * (CHUNK - 1),
        flops=page.flops_per_token(model, cfg, CHUNK),
        about=chunks.vocab_size,
    )


def open_apelr(cfg, rt: Runtime, last: int) -> Run:
    page, size = train_apelr, cfg.batch_size
    corpus = page.open_data(cfg)
    model = page.build_model(cfg, corpus.vocab_size).to(rt.device)
    if size == "auto":
        size = fitting_batch_size(rt, model, cfg, lambda windows: page.trial(model, windows, rt, cfg))
    return Run(
        model,
        batches=rt.ahead(page.Batches(rt, corpus, cfg, size), last),
        optimizer=rt.adamw(page.parameter_groups(model, cfg), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2)),
        units=size * cfg.seq_len,
        flops=flops_per_token(model),
        about=corpus.vocab_size,
    )


def open_state(cfg, rt: Runtime, last: int) -> Run:
    page, toml = train_state, Path(cfg.toml_config_path)
    reading = {name: getattr(cfg, name) for name in page.OF_DATA}
    cells = open_cells(toml=toml, folder=toml.parent / "cells", **reading)
    model = page.build_model(cfg, cells.dims()).to(rt.device)
    return Run(
        model,
        batches=rt.ahead(page.Batches(rt, cells, cfg), last),
        optimizer=page.make_optimizer(model, cfg, rt),
        units=cfg.batch_size * cfg.cell_set_len,
        flops=cell_flops(model, cfg),
        about=cells.dims(),
    )


class PageTrainer(Trainer):
    """One side of a workload: ours eager, compiled, with CUDA graphs; or the peer, in the same precision."""

    def __init__(self, side: str, page: str, words: list[str], source: str | None, more: list[str] = ()):
        wrapped = [f"--compile={COMPILED.get(side, 'false')}"]
        self.cfg = cfg = configure(PAGES[page].Config, [*words, *wrapped, *more])
        self.rt = rt = Runtime(cfg).__enter__()
        self.page, self.device = page, rt.device
        self.run, self.steps = open_run(page, cfg, rt, sys.maxsize), itertools.count()
        if side in COMPILED:
            self.take_ours(graphs=side == "CUDA graphs")
        else:
            self.take_peer(source)

    def take_ours(self, graphs: bool) -> None:
        cfg, rt, run = self.cfg, self.rt, self.run
        model = torch.compile(run.model, dynamic=False, mode="reduce-overhead") if graphs else rt.wrap(run.model)
        train_step, parameters = PAGES[self.page].train_step, list(run.model.parameters())
        model.train()

        def step() -> torch.Tensor:
            number = next(self.steps)
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()  # what the step before gave may be written over
            numbered = (number,) if self.page == "apelr" else ()
            found = train_step(model, run.batches(number), *numbered, rt, cfg)
            rt.step(run.optimizer, parameters, cfg.grad_clip, learning_rate(number, cfg, LOSS_STEPS))
            return found["loss"] if isinstance(found, dict) else found

        self.step = step

    def take_peer(self, source: str | None) -> None:
        """Eager, with its own optimizer or torch's AdamW, on the same batches and micro-batches."""
        run, cfg = self.run, self.cfg
        make = {"ghmm": peer_ghmm, "arxiv": peer_arxiv, "apelr": peer_apelr, "state": peer_state}[self.page]
        peer, loss_of = make(cfg, run, source)
        peer.to(self.device).train()
        optimizer = torch.optim.AdamW(peer.parameters(), lr=cfg.lr)

        def step() -> None:
            batch = run.batches(next(self.steps))
            for part in batch.chunk(cfg.grad_accum) if torch.is_tensor(batch) else [batch]:
                with self.rt.autocast():
                    loss = loss_of(part) / cfg.grad_accum
                loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), cfg.grad_clip or torch.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        self.step = step

    def flops_per_token(self) -> float:
        return self.run.flops

    def units(self) -> int:
        return self.run.units


def peer_ghmm(cfg, run: Run, source: None) -> tuple[torch.nn.Module, Callable]:
    peer = hooked_transformer(cfg, run.about)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return train_ghmm.next_token_loss(peer(tokens[:, :-1]), tokens[:, 1:])

    return peer, loss


def peer_arxiv(cfg, run: Run, source: None) -> tuple[torch.nn.Module, Callable]:
    peer = gpt2(cfg, run.about)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = peer(tokens[:, :-1], use_cache=False).logits
        return train_arxiv.token_xe(logits, tokens[:, 1:]).mean()

    return peer, loss


def peer_apelr(cfg, run: Run, source: str) -> tuple[torch.nn.Module, Callable]:
    """Version 2 of the source, with the terms that ours has weights of."""
    shape = (run.about, cfg.num_plan_states, cfg.seq_len, cfg.d_model)
    peer = source_model(source, "v2", *shape, token_dim=cfg.token_dim)
    weights = cfg.weights()
    window = cfg.repetition_window() if "rep_unlikelihood" in weights else 0

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        total, terms = peer.compute_losses(inputs, targets, rep_unlikelihood_window=window)
        for name, weight in weights.items():
            sign = -1 if name in train_apelr.MAXIMISED else 1
            total = total + sign * weight * terms[TERMS["v2"][name][0]]
        return total

    return peer, loss


def peer_state(cfg, run: Run, source: None) -> tuple[torch.nn.Module, Callable]:
    peer = arc_state(cfg, run.about)
    return peer, lambda batch: peer.training_step(in_rows(batch), 0)


# ---------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------
def bench_speed(name: str, it: Workload, words: list[str], source: str | None) -> None:
    unit = "cell" if it.page == "state" else "token"
    sides = {"ours": "", "eager": "the same without torch.compile"}
    if it.tiny:
        sides["CUDA graphs"] = "the same with CUDA graphs (reduce-overhead)"
    peer = PEERS[it.page]
    if it.alone:
        sides = {"ours": ""}
    elif it.page == "apelr" and not source:
        absent(f"gpu {name}, {peer}", "--peer=PATH of a checkout with src/apelr")
    elif it.page != "apelr" and missing(MODULES[it.page]):
        absent(f"gpu {name}, {peer}", f"pip install {MODULES[it.page].replace('_', '-')}")
    else:
        sides[peer] = f"{peer}, eager"
    shape = (it.page, words, source)
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        units = worker.submit(units_of, *shape).result()
    found = race(PageTrainer, sides, shape, units, f"gpu {name}", memory=True, unit=unit)
    ours = found["ours"]
    share = ours["flops"] * units / ours["seconds"].median / ours["peak"].median
    say_goal(f"gpu {name}, share of the matrix rate", share, it.share)
    if peer in found and it.times:
        say_goal(f"gpu {name}, times {peer}", found[peer]["seconds"].over(ours["seconds"]).median, it.times)


def units_of(*shape) -> int:
    with racing.quiet():
        return PageTrainer("eager", *shape).units()


def say_goal(name: str, value: float, goal: float | None) -> None:
    if goal is None:
        told = "no goal"
    else:
        verdict = "not judged in miniature" if racing.SHORT else "met" if value >= goal else "not met"
        told = f"goal >= {goal:g}: {verdict}"
    report(name, value, "", told)


def compare_losses(name: str, it: Workload, words: list[str], steps: int) -> None:
    """The loss that bf16 and fp32 come to on the same batches from the same weights."""
    losses = {}
    for precision in ("fp32", "bf16"):
        with ProcessPoolExecutor(1, get_context("spawn")) as worker:
            losses[precision] = worker.submit(loss_after, steps, it.page, words, precision).result()
    unit = "distance" if it.page == "state" else "nats"
    report(f"gpu {name}, loss after {steps} steps in bf16", losses["bf16"], unit, f"fp32's {losses['fp32']:.5g}",
           losses["fp32"])


def loss_after(steps: int, page: str, words: list[str], precision: str) -> float:
    torch.set_flush_denormal(True)
    with racing.quiet():
        side = PageTrainer("eager", page, words, None, [f"--precision={precision}"])
    losses = [side.step().detach().clone() for _ in range(steps)]
    return float(torch.stack(losses[-LOSS_MEAN:]).mean())


def kill_and_resume(page: str, words: list[str], folder: Path) -> None:
    """A run that is killed after its first checkpoint and started again, against one that nothing disturbs."""
    losses = {}
    for name in ("whole", "killed"):
        out = folder / f"{page}_{name}"
        command = [sys.executable, str(ROOT / f"train_{page}.py"), *words, f"--out_dir={out}", "--log_interval=10",
                   f"--max_steps={RUN_STEPS}", f"--eval_interval={SAVE_STEPS}", f"--save_interval={SAVE_STEPS}"]
        run = functools.partial(subprocess.run, command, cwd=folder, capture_output=True, text=True)
        if name == "killed":
            kill_at_first_save(command, folder, out)
        ended = run()
        if ended.returncode:
            report(f"gpu {page}, kill and resume", 0.0, "", f"failed: {ended.stderr.strip().splitlines()[-1]}")
            return
        losses[name] = json.loads((out / "summary.json").read_text())[RESULT[page]]
    gap = abs(losses["killed"] / losses["whole"] - 1)
    report(f"gpu {page}, killed and resumed, {RESULT[page]}, difference", gap, "relative", "of an undisturbed run's")


def kill_at_first_save(command: list[str], folder: Path, out: Path) -> None:
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def run_tests(short: bool) -> None:
    """The tests that do more where there is a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", *TESTS, *["--collect-only"] * short]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = ended.stdout.strip().splitlines() or ["nothing"]
    racing.RESULTS.append(result("gpu tests", float(ended.returncode), "exit code", lines[-1]))
    print(f"gpu tests: {lines[-1]}", flush=True)
