"""scale: time and memory against the work, the exponent of each, and what grows faster than its law.

Every size is measured in a process of its own, forked from one that has imported everything: seconds of the processor,
on one thread, of a call (the fastest of some, where it is short), which the load of the machine hardly moves; and the
peak of memory beyond what was there before, pages of mapped files left out. The exponent p of cost = a + b work^p is
the slope of log(cost - a) over log(work), by least squares: a is the cost of the least size, which counts for nothing
else, nor do those that cost less than 1.5 times as much. Where fewer than three are left, as of what should not grow,
it is the slope of log(cost) over all sizes; of memory, which grows until its blocks are full, over the last three.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import forkserver, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import linregress

import train_apelr
import train_arxiv
import train_ghmm
import train_state
from benchmarks import racing
from common import runlog
from common.runtime import Runtime
from measure import curves, sequences, writing, xe_by_k
from sources.cells import open_cells
from sources.chunks import ChunkSpool, chunk_arrays, prepare_chunks
from sources.corpus import Corpus
from sources.ergodic import ergodic
from sources.h5ad import Matrix, write_h5ad
from sources.planted import planted
from sources.preprocess import preprocess
from sources.text import prepare_text

TOLERANCE = 0.2  # that an exponent, less twice its error, may exceed its law by: sorts and caches count as linear
LEAST_MB = 8.0  # below, memory is that of the allocator
LASTING = 0.3  # seconds of calls, of which the fastest counts
GROWN = 1.5  # times the fixed cost: what costs less says nothing of the law

Work = Callable[[], object]


class Law(NamedTuple):
    """What may grow how fast with what. start(size, folder) makes a call of this much work; None: not measured."""

    name: str
    work: str
    start: Callable[[int, Path], Work]
    sizes: Sequence[int]  # the first far below the others: its cost is the fixed one
    time: float | None
    memory: float | None = None


# ---------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------
def bench(options: argparse.Namespace) -> None:
    """Report every law, or those whose names have a word of options.only in them."""
    rows = {f"{law.name} in {law.work}": number for number, law in enumerate(LAWS)}
    chosen = racing.chosen(rows, options.only)
    context = server()
    for name in chosen:
        law = LAWS[rows[name]]
        sizes = law.sizes[:3] if options.short else law.sizes
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            costs = [pool.submit(measure, rows[name], size).result() for size in sizes]
        seconds, held, spent = zip(*costs, strict=True)
        racing.count_as_own(sum(spent))
        for kind, allowed, unit, of_size in (("time", law.time, "s", seconds), ("memory", law.memory, "MB", held)):
            if allowed is not None:
                tell(f"{law.name}: {kind} in {law.work}", sizes, of_size, allowed, unit)


def server() -> BaseContext:
    """Makes processes that have imported this file, on one thread."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def tell(name: str, sizes: Sequence[int], costs: Sequence[float], law: float, unit: str) -> dict:
    """Report one exponent, and whether it is above its law."""
    p, error = exponent(sizes, costs) if unit == "s" else slope(sizes[-3:], np.maximum(costs[-3:], LEAST_MB))
    verdict = ": ABOVE ITS LAW" if p - 2 * error > law + TOLERANCE else ""
    span = f"{sizes[0]:,} to {sizes[-1]:,}: {costs[0]:.2g} to {costs[-1]:.2g} {unit}"
    return racing.report(name, p, "exponent", f"+- {error:.2f}, law {law:g}, {span}{verdict}")


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> tuple[float, float]:
    """(exponent, its standard error) of costs that are a + b size^p; see the top."""
    x, y = np.array(sizes, float), np.array(costs, float)
    grown = y >= GROWN * y[0]
    if grown.sum() < 3:
        return slope(x, y)
    return slope(x[grown], y[grown] - y[0])


def slope(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(that of log(cost) over log(size), its standard error)."""
    fit = linregress(np.log(sizes), np.log(costs))
    return float(fit.slope), float(np.nan_to_num(fit.stderr))  # nan: of costs that are all the same


def measure(number: int, size: int) -> tuple[float, float, float]:
    """(seconds, MB) of one size of LAWS[number], in a process that does nothing else; and the seconds of all of it."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        run = LAWS[number].start(size, Path(folder))
        reset_peak()
        held, mapped = memory("VmRSS"), memory("RssFile")
        times = []
        while not times or sum(times) < LASTING:
            kept = None  # what the call before gave
            began = processor_seconds()
            kept = run()
            times.append(processor_seconds() - began)
        grown = memory("VmHWM") - held - max(0.0, memory("RssFile") - mapped)
        del kept
    return min(times), max(0.0, grown), processor_seconds()


def processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def memory(name: str) -> float:
    """MB of this process, as Linux has them in /proc; 0 elsewhere."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(name + ":")[1].split()[0]) / 1024 if status.exists() else 0.0


def reset_peak() -> None:
    """Let VmHWM begin anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def steps(step: Callable[[int], object]) -> Work:
    """A call that makes the next step; the first, which warms up, is made here."""
    numbers = itertools.count()
    step(next(numbers))
    return lambda: step(next(numbers))


def training(loss: Callable[[int], torch.Tensor], model: torch.nn.Module) -> Work:
    """A step: gradient of loss(step), and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(number: int) -> None:
        loss(number).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return steps(step)


# ---------------------------------------------------------------------------------------------------------------
# ghmm
# ---------------------------------------------------------------------------------------------------------------
def ghmm(cfg: train_ghmm.Config) -> tuple:
    process = train_ghmm.build_process(cfg)
    return process, train_ghmm.build_model(cfg, process.vocab_size)


def ghmm_step(n_ctx: int, folder: Path, model: str) -> Work:
    cfg = train_ghmm.Config(n_ctx=n_ctx, batch_size=8, model=model, device="cpu")
    process, network = ghmm(cfg)
    batches = train_ghmm.Batches(Runtime(cfg), process, cfg)
    return training(lambda step: train_ghmm.training_loss(network, batches(step)), network)


def ghmm_analysis(words: int, folder: Path) -> Work:
    """Of sampled contexts of 16 tokens, of which few repeat: 16 prefixes a word, and less."""
    cfg = train_ghmm.Config(n_ctx=16, max_words=3 * words, n_layers=2, device="cpu")
    process, network = ghmm(cfg)
    return lambda: train_ghmm.analyse_beliefs(
        network, train_ghmm.final_contexts(process, cfg), cfg, Runtime(cfg), deals=1)


def ghmm_process(length: int, folder: Path, what: str) -> Work:
    process, generator = train_ghmm.make_process("mess3"), torch.Generator().manual_seed(0)
    tokens = process.sample(64, length, generator)
    return (lambda: process.sample(64, length, generator)) if what == "sample" else (lambda: process.beliefs(tokens))


def ghmm_writing(batch: int, folder: Path) -> Work:
    process, network = ghmm(train_ghmm.Config(n_ctx=16))
    return continued(network.eval(), batch, 16)


def continued(model: torch.nn.Module, batch: int, n_ctx: int) -> Work:
    start = torch.zeros(batch, 1, dtype=torch.int64)
    return lambda: sequences.continue_sequences(
        model, start, n_ctx, n_ctx, torch.Generator().manual_seed(0), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------
# arxiv
# ---------------------------------------------------------------------------------------------------------------
def chunk_file(folder: Path, chunks: int, size: int = 100, document: int = 50) -> Path:
    """train.h5 of two categories, 8,192 tokens and documents of so many chunks."""
    rng = np.random.default_rng(0)
    with contextlib.closing(ChunkSpool(folder, "train", size, 8_192)) as spool:
        for number in range(-(-chunks // document)):
            spool.add("ab"[number * document * 2 // chunks], rng.integers(0, 8_192, document * size))
        spool.write(folder / "train.h5", tokenizer="", source="bench", seed=0)
    return folder / "train.h5"


def arxiv_opening(chunks: int, folder: Path) -> Work:
    return partial(chunk_arrays, chunk_file(folder, chunks))


def arxiv_batch(chunks: int, folder: Path) -> Work:
    data, cfg = train_arxiv.Chunks(**chunk_arrays(chunk_file(folder, chunks))), train_arxiv.Config(device="cpu")
    rows = train_arxiv.training_rows(data, ["a", "b"], cfg)
    return steps(train_arxiv.Batches(Runtime(cfg), data, rows, cfg))


def arxiv_step(folder: Path, vocab_size: int = 2_048, n_ctx: int = 100) -> Work:
    model = train_arxiv.build_model(train_arxiv.Config(n_layers=2, d_model=96, d_mlp=384), vocab_size, n_ctx)
    tokens = torch.randint(vocab_size, (4, n_ctx + 1), generator=torch.Generator().manual_seed(0))
    return training(lambda step: model(tokens[:, :-1], tokens[:, 1:])[0], model)


def arxiv_writing(batch: int, folder: Path) -> Work:
    model = train_arxiv.build_model(train_arxiv.Config(n_layers=2, d_model=96, d_mlp=384), 2_048, 16)
    return continued(model.eval(), batch, 16)


def arxiv_measuring(documents: int, folder: Path) -> Work:
    """The curves, bootstrap and fits of one run."""
    rng, codes = np.random.default_rng(0), np.arange(documents) % 2
    xe = rng.random((documents, 99))
    return lambda: curves.measure(
        curves.curves_of(xe, codes, np.arange(documents)), ["a", "b"], ["a", "b"], None, 200, 0, 10, 99)


def arxiv_law(documents: int, folder: Path) -> Work:
    """XE against K of eight runs, over resampled documents."""
    rng, codes = np.random.default_rng(0), np.arange(documents) % 4
    sums = [rng.random((documents, 8)) for _ in range(8)]
    seen = np.array([[(code >= run % 4) or run == code for code in range(4)] for run in range(8)])

    def run() -> dict | None:
        draws = xe_by_k.draw_documents(sums, np.ones(documents), codes, 4, 200, 0)
        return xe_by_k.law_of_k(xe_by_k.Study(draws.mean(0), seen, np.arange(8), draws), 200)

    return run


# ---------------------------------------------------------------------------------------------------------------
# apelr
# ---------------------------------------------------------------------------------------------------------------
def apelr_model(K: int = 4, V: int = 512, L: int = 64, experts: str = "full") -> tuple:
    cfg = train_apelr.Config(version="v2_planner_required", num_plan_states=K, vocab_size=V, seq_len=L, d_model=64,
                             token_dim=64, experts=experts, batch_size=4, device="cpu")
    return train_apelr.build_model(cfg), cfg


def apelr_step(folder: Path, **shape) -> Work:
    model, cfg = apelr_model(**shape)
    tokens = torch.randint(cfg.vocab_size, (4, cfg.seq_len + 1), generator=torch.Generator().manual_seed(0))
    rt = Runtime(cfg)
    optimizer = rt.adamw(train_apelr.parameter_groups(model, cfg), lr=1e-3)

    def step(number: int) -> None:
        train_apelr.train_step(model, tokens, number, rt, cfg)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return steps(step)


def apelr_writing(batch: int, folder: Path) -> Work:
    model, cfg = apelr_model()
    prompt, generator = torch.zeros(batch, 1, dtype=torch.int64), torch.Generator().manual_seed(0)
    return lambda: writing.generate(model.eval(), prompt, 16, generator)


def apelr_window(tokens: int, folder: Path) -> Work:
    """A batch out of a corpus of so many tokens."""
    stream = np.lib.format.open_memmap(folder / "train.npy", "w+", np.uint16, (tokens,))
    corpus = Corpus(stream, stream[:4_096], 512)
    cfg = train_apelr.Config(seq_len=64, device="cpu")
    return steps(train_apelr.Batches(Runtime(cfg), corpus, cfg, 64))


# ---------------------------------------------------------------------------------------------------------------
# state
# ---------------------------------------------------------------------------------------------------------------
def cell_files(
    folder: Path, cells: int, files: int = 1, types: int = 4, perturbations: int = 16, genes: int = 4
) -> str:
    """A TOML of so many cells, in a group of file, type and perturbation alike; the first type is held out."""
    n, names = cells // files, [f"g{i}" for i in range(genes)]
    kind = np.arange(n) % (types * perturbations)
    rng = np.random.default_rng(0)
    for file in range(files):
        X = rng.random((n, genes), np.float32)
        perturbation = np.char.add("p", (kind % perturbations).astype(str))
        obs = {"gene": np.where(kind % perturbations, perturbation, "non-targeting"),
               "cell_type": np.char.add("c", (kind // perturbations).astype(str)), "gem_group": [f"b{file}"] * n}
        write_h5ad(folder / f"{file}.h5ad", csr_array(X), obs, names, {"X_hvg": X}, uns={"X_hvg_var_names": names})
    held_out = "".join(f'"bench.c{i}" = "test"\n' for i in range(max(1, types // 4)))
    toml = folder / "cells.toml"
    toml.write_text(f'[datasets]\nbench = "{folder}/*.h5ad"\n[training]\nbench = "train"\n[zeroshot]\n{held_out}')
    return str(toml)


def state_preparing(folder: Path, **made) -> Work:
    """Into a new folder at every call."""
    toml, numbers = cell_files(folder, **made), itertools.count()
    return lambda: open_cells(toml=toml, folder=folder / f"store{next(numbers)}")


def state_start(folder: Path, **made) -> Work:
    toml = cell_files(folder, **made)
    start = partial(open_cells, toml=toml, folder=folder / "store")
    start()  # makes the folder
    return start


def state_batches(cells: int, folder: Path, streamed: bool = False) -> train_state.Batches:
    budget = 1e-9 if streamed else 8.0
    prepared = open_cells(toml=cell_files(folder, cells), folder=folder / "store", ram_budget_gb=budget)
    cfg = train_state.Config(toml_config_path=str(folder / "cells.toml"), batch_size=4, device="cpu")
    return train_state.Batches(Runtime(cfg), prepared, cfg)


def state_batch(cells: int, folder: Path, streamed: bool) -> Work:
    """Within the first epoch, whose plan is made before."""
    batches = state_batches(cells, folder, streamed)
    return steps(lambda step: batches(step % (len(batches.sentences) // 4)))


def state_epoch(cells: int, folder: Path) -> Work:
    return steps(state_batches(cells, folder).sentences.plan)


def state_model(S: int, genes: int) -> tuple:
    cfg = train_state.Config(cell_set_len=S, d_model=32, d_mlp=128, n_layers=2, dropout=0.0, device="cpu")
    dims = dict.fromkeys(("input_dim", "output_dim", "gene_dim", "hvg_dim"), genes)
    dims |= {"pert_dim": 4, "batch_dim": 2, "decodes": False}
    cells = torch.rand(2, 1, S, genes, generator=torch.Generator().manual_seed(0))
    batch = {"ctrl_cell_emb": cells[0], "pert_cell_emb": cells[1], "pert_emb": torch.eye(4)[:1],
             "batch": torch.zeros(1, S, dtype=torch.int64)}
    return train_state.build_model(cfg, dims), batch


def state_step(folder: Path, S: int = 64, genes: int = 256) -> Work:
    model, batch = state_model(S, genes)
    return training(lambda step: model(batch, losses=True)["loss"], model)


def state_predictions(cells: int, folder: Path) -> Work:
    """Of all cells of the held-out type, a quarter of so many, with metrics and baselines."""
    batches = state_batches(cells, folder)
    model = train_state.build_model(batches.cfg, batches.cells.dims())
    return lambda: train_state.evaluate(model, batches.cells, batches.cfg, batches.rt)


# ---------------------------------------------------------------------------------------------------------------
# prepare_data.py, runs
# ---------------------------------------------------------------------------------------------------------------
WORDS = np.array([f"{a}{b}{c}" for a, b, c in itertools.product("bdfgklmn", "aeiou", ("", "r", "st"))])


def document_file(folder: Path, documents: int) -> Path:
    """documents.jsonl of 200 words each."""
    rng, path = np.random.default_rng(0), folder / "documents.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(rng.choice(WORDS, 200))
            file.write(json.dumps({"text": text, "category": "ab"[number % 2]}) + "\n")
    return path


def prepared_text(documents: int, folder: Path) -> Work:
    source = str(document_file(folder, documents))
    return lambda: prepare_text(input=source, out_dir=str(folder / "text"), vocab_size=400, threads=1,
                                tokenizer_chars=100_000)


def prepared_chunks(documents: int, folder: Path) -> Work:
    source = str(document_file(folder, documents))
    return lambda: prepare_chunks(input=source, out_dir=str(folder / "arxiv"), vocab_size=400, threads=1,
                                  tokenizer_chars=100_000, chunk_size=20)


def prepared_ergodic(documents: int, folder: Path) -> Work:
    return lambda: ergodic(train_documents=documents, validation_documents=64, chunk_size=20,
                           out_dir=str(folder / "ergodic"))


def prepared_planted(documents: int, folder: Path) -> Work:
    return lambda: planted(train_documents=documents, validation_documents=documents // 10,
                           out_dir=str(folder / "planted"))


def preprocessed(cells: int, folder: Path) -> Work:
    """Counts of 400 genes, a tenth above 0, in blocks of 65,536: memory has a few of these, and the whole of obs."""
    Matrix.entries = 1 << 16
    counts = np.random.default_rng(0).poisson(0.1, (cells, 400)).astype(np.float32)
    counts[:, 0] += 1  # no cell is empty
    write_h5ad(folder / "counts.h5ad", csr_array(counts), {"gene": ["a"] * cells}, [f"g{i}" for i in range(400)])
    del counts
    return lambda: preprocess(input=str(folder / "counts.h5ad"), output=str(folder / "new.h5ad"), num_hvgs=50)


def reopened_log(lines: int, folder: Path) -> Work:
    record = {"step": 0, "split": "train", "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1e5, "mfu": 0.1}
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(lines):
            file.write(json.dumps(record | {"step": step}) + "\n")
    return lambda: runlog._reopen(folder / "metrics.jsonl", lines).close()


def by(name: str, start: Callable, **more) -> Callable[[int, Path], Work]:
    """start(folder, name=size, ...) as a Law has it."""
    return lambda size, folder: start(folder, **{name: size}, **more)


def doubled(first: int, least: int, count: int = 4) -> list[int]:
    """`first`, for the fixed cost, and `least` doubled and doubled again."""
    return [first, *(least * 2**i for i in range(count))]


LAWS = [
    Law("ghmm step, transformer", "n_ctx",
        partial(ghmm_step, model="transformer"),
        doubled(8, 128), 2, 2),
    Law("ghmm step, GRU", "n_ctx",
        partial(ghmm_step, model="gru"),
        doubled(8, 64), 1, 1),
    Law("ghmm analysis", "words",
        ghmm_analysis,
        doubled(100, 2_000), 1, 1),
    Law("ghmm sampling", "length",
        partial(ghmm_process, what="sample"),
        doubled(16, 256), 1, 1),
    Law("ghmm beliefs", "length",
        partial(ghmm_process, what="beliefs"),
        doubled(16, 256), 1, 1),
    Law("ghmm writing", "batch",
        ghmm_writing,
        doubled(1, 64), 1, 1),
    Law("arxiv step", "V",
        by("vocab_size", arxiv_step),
        doubled(64, 2_048), 1, 1),
    Law("arxiv step", "n_ctx",
        by("n_ctx", arxiv_step),
        doubled(8, 100), 2, 2),
    Law("arxiv start", "chunks",
        arxiv_opening,
        doubled(1_000, 50_000), 1, 1),
    Law("arxiv batch", "chunks",
        arxiv_batch,
        doubled(5_000, 50_000), 0, 0),
    Law("arxiv curves of a run", "documents",
        arxiv_measuring,
        doubled(50, 8_000), 1, 1),
    Law("arxiv XE by K", "documents",
        arxiv_law,
        doubled(50, 10_000), 1, 1),
    Law("arxiv writing", "batch",
        arxiv_writing,
        doubled(1, 32), 1, 1),
    Law("apelr step, full", "K",
        by("K", apelr_step),
        doubled(2, 16), 1, 1),
    Law("apelr step, bias", "K",
        by("K", apelr_step, experts="bias"),
        [2, 4, 8, 16, 32], 0, 0),
    Law("apelr step, lowrank", "K",
        by("K", apelr_step, experts="lowrank"),
        [2, 4, 8, 16, 32], 1, 1),
    Law("apelr step, full", "V",
        by("V", apelr_step),
        doubled(32, 1_024), 1, 1),
    Law("apelr step, full", "L",
        by("L", apelr_step),
        doubled(16, 128), 1, 1),
    Law("apelr writing", "batch",
        apelr_writing,
        doubled(1, 32), 1, 1),
    Law("apelr batch", "tokens of the corpus",
        apelr_window,
        [100_000, 1_000_000, 10_000_000], 0, 0),
    Law("state step", "S",
        by("S", state_step),
        doubled(8, 128), 2, 2),
    Law("state step", "genes",
        by("genes", state_step),
        doubled(16, 2_000), 1, 1),
    Law("state start", "cells",
        by("cells", state_start),
        doubled(5_000, 100_000), 1, 1),
    Law("state start", "cell types",
        by("types", state_start, cells=200_000),
        doubled(4, 8, 5), 0, 0),
    Law("state start", "files",
        lambda size, folder: state_start(folder, files=size, cells=64 * size),
        doubled(2, 16), 1, 0),
    Law("state batch, held in memory", "cells",
        partial(state_batch, streamed=False),
        doubled(10_000, 40_000), 0, 0),
    Law("state batch, streamed", "cells",
        partial(state_batch, streamed=True),
        doubled(10_000, 40_000), 0, 0),
    Law("state plan of an epoch", "cells",
        state_epoch,
        doubled(10_000, 100_000), 1, 1),
    Law("state predictions", "cells",
        state_predictions,
        doubled(2_000, 10_000), 1, 1),
    Law("prepare cells", "cells",
        by("cells", state_preparing, genes=64),
        doubled(2_000, 20_000), 1, 1),  # of memory: names and codes of the cells, not their expression
    Law("prepare cells", "files",
        lambda size, folder: state_preparing(folder, files=size, cells=64 * size),
        doubled(2, 16), 1, 0),
    Law("prepare state preprocess", "cells",
        preprocessed,
        doubled(1_000, 8_000), 1, 1),
    Law("prepare text", "documents",
        prepared_text,
        doubled(100, 8_000), 1, 0),
    Law("prepare arxiv", "documents",
        prepared_chunks,
        doubled(100, 8_000), 1, 0),
    Law("prepare ergodic", "documents",
        prepared_ergodic,
        doubled(100, 8_000), 1, 0),
    Law("prepare planted", "documents",
        prepared_planted,
        doubled(1_000, 10_000), 1, 1),  # of memory: maps of the files that it writes count while they are there
    Law("metrics.jsonl at a resume", "lines",
        reopened_log,
        doubled(1_000, 20_000), 1, 0),
]
