"""state: loader, training, energy distance and memory, against cell-load, arc-state and geomloss."""

import argparse
import copy
import functools
import itertools
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import geomloss
import numpy as np
import torch
from scipy.sparse import csr_array

import train_state
from benchmarks import racing
from benchmarks.racing import (
    POOL,
    Trainer,
    absent,
    both_ways,
    in_turns,
    linear_weights,
    missing,
    peak_memory,
    peer_name,
    pool,
    quiet,
    race,
    report,
)
from common.runtime import Runtime
from sources.cells import open_cells
from sources.foreign_state import source_settings, source_state_dict
from sources.h5ad import write_h5ad

GENES = 2_000
SIZES = {  # sets of cells a step, and settings; the second: arc-state's state_sm, fewer sets
    "hidden 128": (8, {"cell_set_len": 64, "d_model": 128, "n_layers": 4, "n_heads": 4, "d_mlp": 512}),
    "state_sm": (4, {"cell_set_len": 128, "d_model": 672, "n_layers": 4, "n_heads": 8, "d_head": 84, "d_mlp": 2_688,
                     "n_encoder_layers": 4, "n_decoder_layers": 4})}
PRECISIONS = {  # the same of both sides
    "highest": {"precision": "fp32", "matmul_precision": "highest"},
    "medium": {"precision": "fp32", "matmul_precision": "medium"},
    "bf16": {"precision": "bf16", "matmul_precision": "highest"}}
TOLD = {"highest": "both with float32 products at highest", "bf16": "both under bf16 autocast",
        "medium": "both with float32 products at medium, as arc-state runs by default"}
LOSSES = ((8, 64, 2_000), (4, 512, 2_000))  # sets, cells, genes
LARGE = (1_024, 20_000)  # cells, genes of the sets that memory is measured with


def bench(options: argparse.Namespace) -> None:
    """Loader against cell-load, the energy distance against geomloss, training against arc-state, peak memory.

    arc-state: the installed release's model with its training_step and optimizer, gradients clipped at 10; "with
    loaders": each model fed by its own loader in its own process, without workers, cell-load's one batch after another
    as a Lightning trainer draws them; else 32 batches in turn. The same weights and no dropout on both sides.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lacking = [name for name, module in (("arc-state", "state"), ("cell-load", "cell_load")) if missing(module)]
    for name in lacking:
        absent(f"state {name}", f"pip install {name}")
    with tempfile.TemporaryDirectory() as folder:
        toml = str(write_cells(Path(folder)))
        with ProcessPoolExecutor(1, get_context("spawn"), _start, (racing.SHORT,)) as worker:
            for measure in (measure_cells, measure_distance, measure_agreement)[: 3 - ("arc-state" in lacking)]:
                for line in worker.submit(measure, toml, device, lacking).result():
                    report(*line)
        for size in SIZES:
            bench_training(size, toml, device, lacking)
        for size in SIZES if options.full else ("hidden 128",):
            bench_training(size, toml, device, lacking, loads=True)
    measure_large(lacking)


def _start(short: bool) -> None:
    racing.SHORT = short
    warnings.simplefilter("ignore")  # the peers', of what they deprecate
    torch.set_flush_denormal(True)


def bench_training(size: str, toml: str, device: str, lacking: list[str], loads: bool = False) -> None:
    batch, settings = SIZES[size]
    for precision in ("highest",) if loads else PRECISIONS:
        sides = {}
        if not lacking or lacking == ["cell-load"] and not loads:
            sides["arc-state"] = f"arc-state{' fed by cell-load' * loads}, {TOLD[precision]}"
        if precision == "highest":
            sides = both_ways(sides, train_state.Config(device=device, **PRECISIONS[precision]))
        name = f"state training, {size}{', with loaders' * loads}, {precision} {device}"
        shape, cells = (size, toml, loads, precision, device), batch * settings["cell_set_len"]
        race(StateTrainer, {"ours": ""} | sides, shape, cells, name, unit="cell")


# ---------------------------------------------------------------------------------------------------------------
# Cells, and the loaders
# ---------------------------------------------------------------------------------------------------------------
def write_cells(folder: Path, each: int = 128) -> Path:
    """A TOML of 10,240 cells, a tenth of their 2,000 genes above 0: dense in X_hvg, sparse in X. Returns its path.

    4 cell types of 16 perturbations, 128 cells of each, and of 512 control cells: no set lacks a cell.
    """
    rng, kind = np.random.default_rng(0), np.repeat(np.arange(4 * 20), each)
    uniform = rng.random((len(kind), GENES), np.float32)
    cells = 30 * np.maximum(uniform - np.float32(0.9), 0)  # up to 3: log1p
    perturbation, cell_type = kind % 20, kind // 20
    obs = {
        "gene": [f"p{k}" if k < 16 else "non-targeting" for k in perturbation],
        "cell_type": [f"c{k}" for k in cell_type],
        "gem_group": ["b0", "b1"] * (len(kind) // 2),
    }
    genes = [f"g{i}" for i in range(GENES)]
    file, path = folder / "cells.h5ad", folder / "cells.toml"
    write_h5ad(file, csr_array(cells), obs, genes, {"X_hvg": cells})
    path.write_text(f'[datasets]\nbench = "{file}"\n[training]\nbench = "train"\n')
    return path


def cell_batches(toml: str, device: str, **settings) -> train_state.Batches:
    """The loader of train_state.py on the cells of write_cells, prepared beside them."""
    ours = {
        "toml_config_path": toml,
        "val_fraction": 0.0,
        "dropout": 0.0,
        "optimizer": "adam",
        "use_basal_projection": False,
        "device": device,
        "precision": "fp32",
    }
    cfg = train_state.Config(**ours | settings)
    reading = {name: getattr(cfg, name) for name in train_state.OF_DATA}
    cells = open_cells(toml=toml, folder=Path(toml).parent / "cells", **reading)
    return train_state.Batches(Runtime(cfg), cells, cfg)


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
    sparse = {"embed_key": None, "output_space": "all"}
    ours = {
        "dense X_hvg in memory": {},
        "dense X_hvg, streamed": {"ram_budget_gb": 0.01},
        "sparse X in memory": sparse,
        "sparse X, streamed": sparse | {"ram_budget_gb": 0.01},
    }
    runs, found = {}, []
    with quiet(), Runtime(train_state.Config(device=device)):  # as in a run
        for name, settings in ours.items():
            batches = cell_batches(toml, device, batch_size=16, cell_set_len=64, **settings)
            runs[name] = functools.partial(lambda batches, steps: batches(next(steps)), batches, itertools.count())
            if "cell-load" not in lacking and "streamed" not in name:
                runs[f"cell-load, {name.split()[0]}"] = functools.partial(next, cell_load(toml, batches.cfg))
        times = in_turns(runs, device)
    for name in ours:
        peer = f"cell-load, {name.split()[0]}"
        against = (peer, times[peer].rate(16 * 64)) if peer in times else ()
        found.append((f"state loader, {name} {device}", times[name].rate(16 * 64), "cells/s", *against))
    return found


# ---------------------------------------------------------------------------------------------------------------
# The energy distance
# ---------------------------------------------------------------------------------------------------------------
def measure_distance(toml: str, device: str, lacking: list[str]) -> list[tuple]:
    """The energy distance with its gradient, against geomloss; and how far their values are apart."""
    plain, found = geomloss.SamplesLoss("energy", backend="tensorized"), []
    with Runtime(train_state.Config(device=device)):
        for shape in LOSSES:
            x, y = cell_sets(shape, device)
            runs = {"ours": functools.partial(gradient, train_state.set_loss, x, y),
                    "geomloss": functools.partial(gradient, plain, x, y)}
            times = in_turns(runs, device)
            name = "state energy distance, [{}, {}, {}] {}".format(*shape, device)
            rates = {side: it.rate(shape[0] * shape[1]) for side, it in times.items()}
            found.append((name, rates["ours"], "cells/s", "geomloss, tensorized", rates["geomloss"]))
            with torch.no_grad():
                theirs = plain(x, y)
                gap = ((train_state.set_loss(x, y) - theirs) / theirs).abs().max()
            against = "of the value of geomloss, whose |x - x| is rounding"
            found.append((f"{name}, difference", float(gap), "relative", against))
    return found


def cell_sets(shape: tuple, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, *shape, generator=generator)
    x, y = (uniform - 0.9).relu().to(device)  # a tenth of them above 0
    return (30 * x).requires_grad_(), 40 * y


def gradient(distance, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(distance(x, y).sum(), x)[0]


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------
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
    return {
        "pert_emb": batch["pert_emb"].repeat_interleave(S, 0),
        "batch": batch["batch"].flatten(),
        "ctrl_cell_emb": batch["ctrl_cell_emb"].flatten(0, 1),
        "pert_cell_emb": batch["pert_cell_emb"].flatten(0, 1),
    }


def measure_agreement(toml: str, device: str, lacking: list[str]) -> list[tuple]:
    """Loss and gradient norm of arc-state and ours with its weights, on the same batch, relative differences.

    Its |x - x| is rounding noise under a root, by which its loss is up to 1e-4 too large in single precision.
    """
    found = []
    for size, (batch_size, settings) in SIZES.items():
        batches = cell_batches(toml, device, batch_size=batch_size, **settings)
        cfg, dims, batch = batches.cfg, batches.cells.dims(), batches(0)
        torch.manual_seed(0)
        peer = arc_state(cfg, dims).to(device)
        model = train_state.build_model(cfg, dims).to(device)
        model.load_source_state_dict(peer.state_dict())
        theirs = loss_and_norm(peer, peer.training_step(in_rows(batch), 0))
        ours = loss_and_norm(model, model(batch, losses=True)["loss"])
        for what in theirs:
            gap = abs(ours[what] / theirs[what] - 1)
            if not gap <= {"loss": 1e-4, "gradient norm": 1e-5}[what]:
                raise AssertionError(f"arc-state and train_state disagree by {gap:.1e} in the {what} of {size}")
            found.append((f"state {what}, {size} {device}, difference", gap, "relative", "of arc-state's"))
    return found


def loss_and_norm(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, float]:
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return {"loss": loss.item(), "gradient norm": norm.item()}


class StateTrainer(Trainer):
    """train_state.py or arc-state, in one of PRECISIONS; on 32 batches in turn, or with the loader of either side."""

    def __init__(self, side: str, size: str, toml: str, loads: bool, precision: str, device: str):
        self.device = torch.device(device)
        batch_size, settings = SIZES[size]
        batches = cell_batches(toml, device, batch_size=batch_size, **PRECISIONS[precision], **settings)
        self.cfg = batches.cfg
        self.model = train_state.build_model(self.cfg, batches.cells.dims()).to(self.device)
        if side == "ours":
            self.take_ours(batches, loads)
        else:
            torch.set_float32_matmul_precision(self.cfg.matmul_precision)  # as torch has them, or else by:
            peer_name(side, self.cfg)
            self.take_peer(batches, toml, loads)

    def take_ours(self, batches: train_state.Batches, loads: bool) -> None:
        cfg, steps = self.cfg, itertools.count()
        self.rt = rt = batches.rt.__enter__()
        trained, parameters = rt.wrap(self.model), list(self.model.parameters())
        optimizer = train_state.make_optimizer(self.model, cfg, rt)
        draw = (lambda: batches(next(steps))) if loads else pool([batches(step) for step in range(POOL)])

        def step() -> None:
            train_state.train_step(trained, draw(), rt, cfg)
            rt.step(optimizer, parameters, cfg.grad_clip, cfg.lr)

        self.step = step

    def take_peer(self, batches: train_state.Batches, toml: str, loads: bool) -> None:
        """As its trainer steps it. Precision and float32 products are set as ours has them."""
        cfg, rt = self.cfg, batches.rt  # not entered: it would set more than a race allows
        peer = arc_state(cfg, batches.cells.dims(), self.model).to(self.device)
        optimizer = peer.configure_optimizers()
        if loads:
            stream = cell_load(toml, cfg)
        else:
            stream = iter(pool([in_rows(batches(step)) for step in range(POOL)]), None)

        def step() -> None:
            batch = peer.transfer_batch_to_device(next(stream), self.device, 0)
            with rt.autocast():
                loss = peer.training_step(batch, 0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad()

        self.step = step

    def flops_per_token(self) -> float:
        return cell_flops(self.model, self.cfg)


def cell_flops(model: torch.nn.Module, cfg: train_state.Config) -> float:
    """Of a cell: 6 x Linear weights, of the basal encoder 4, as cells need no gradient, and the perturbation's once a
    set; full attention, 12 x layers x cells x width; the distance, 3 products of cells and 2 for its gradient."""
    S = cfg.cell_set_len
    weights = {}
    for name, part in model.named_children():
        weights[name] = linear_weights(part)
    dense = 6 * sum(weights.values())
    dense -= 2 * weights["basal_encoder"]
    dense -= 6 * weights["pert_encoder"] * (1 - 1 / S)
    d_head = cfg.d_head or cfg.d_model // cfg.n_heads
    attention = 12 * cfg.n_layers * S * cfg.n_heads * d_head
    return dense + attention + 10 * S * model.dims["output_dim"]


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------
def measure_large(lacking: list[str]) -> None:
    """Peak memory of one training step, and of the energy distance alone, with one set of many cells and genes."""
    S, G = LARGE
    where, cells = f"one set of {S:,} cells, {G:,} genes", S * G * 4 / 2**20
    report(f"state cells, {where}", cells, "MB", "predicted or measured, for comparison")
    found = {}
    for kind in ("ours", "energy", "geomloss", "arc-state"):
        if kind not in lacking:
            with ProcessPoolExecutor(1, get_context("spawn")) as worker:
                found[kind] = worker.submit(measure_peak, kind).result()
    for name, kind, peer in (("training step", "ours", "arc-state"), ("energy distance", "energy", "geomloss")):
        against = (peer, found[peer]) if peer in found else ()
        report(f"state {name}, {where}, peak memory", found[kind], "MB", *against)


def measure_peak(kind: str) -> float:
    """MB that one forward and backward pass adds to what model, weights and cells take; on the CPU."""
    cells, measured = torch.rand(2, 1, *LARGE)
    if kind in ("ours", "arc-state"):
        run = large_step(kind, cells, measured)
    else:
        cells.requires_grad_()
        distance = train_state.set_loss if kind == "energy" else geomloss.SamplesLoss("energy", backend="tensorized")
        run = functools.partial(distance, cells, measured)
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # torch's own footprint
    before = peak_memory()
    run().sum().backward()
    return peak_memory() - before


def large_step(kind: str, cells: torch.Tensor, measured: torch.Tensor):
    """The loss of a model on one set, to call."""
    S, G = LARGE
    cfg = train_state.Config(cell_set_len=S, dropout=0.0, use_basal_projection=False, optimizer="adam")
    dims = dict.fromkeys(("input_dim", "output_dim", "gene_dim", "hvg_dim"), G)
    dims |= {"pert_dim": 16, "batch_dim": 2, "decodes": False}
    batch = {"pert_emb": torch.eye(16)[:1], "ctrl_cell_emb": cells, "pert_cell_emb": measured,
             "batch": torch.zeros(1, S, dtype=torch.long)}
    if kind == "arc-state":
        return functools.partial(arc_state(cfg, dims).training_step, in_rows(batch), 0)
    model = train_state.build_model(cfg, dims)
    return lambda: model(batch, losses=True)["loss"]
