"""Synthetic cell populations under perturbations whose true effects are known."""

import json
from types import SimpleNamespace

import numpy as np
from scipy.sparse import csr_array

from sources.h5ad import write_h5ad
from sources.preprocess import log_normalized
from sources.shared import Workshop, counter_rng

CONTROL = "non-targeting"


def make_populations(cfg) -> dict[str, np.ndarray]:
    """What the synthetic populations are made of, on log expression; K types, M = 2 pathways, P perturbations, G genes.

    A type has an activity in each pathway, seen in its control cells through the pathway's genes. Perturbation p adds
    shared[p] + activity @ modulated[p]: what it does to a new type can be read from that type's control cells, and
    neither the mean over the other types nor its basal expression alone says it. The activities of the training types
    lie on a circle, so that their mean is no guide, and those of the last type inside the hull, between two of them.
    """
    K, P, G = cfg.num_cell_types, cfg.num_perturbations, cfg.num_genes
    draw = counter_rng(cfg.seed, 0)
    angle = 2 * np.pi * np.append(np.arange(K - 1), 0.5) / (K - 1)
    radius = np.append(np.ones(K - 1), 0.9 * np.cos(np.pi / (K - 1)))
    touched = draw.random((P + 1, 1, G)) < 0.3  # of the genes; row 0 is the control
    touched[0] = False
    effects = cfg.effect * draw.normal(size=(P + 1, 3, G)) * touched
    return {
        "base": draw.normal(0, 0.8, G), "activity": radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1),
        "program": draw.normal(0, 0.15, (K, G)), "batch": draw.normal(0, 0.08, (cfg.num_batches, G)),
        "pathways": draw.normal(0, 0.8, (2, G)) * (draw.random((2, G)) < 0.3), "shared": effects[:, 0],
        "modulated": 1.2 * effects[:, 1:], "variation": draw.normal(0, 0.15, (3, G))}


def simulate(parts: dict, cell_type: np.ndarray, pert: np.ndarray, draw: np.random.Generator, cfg
             ) -> tuple[np.ndarray, np.ndarray]:
    """(counts [n, G], batch [n]) of cells of these types and perturbations (0 is the control)."""
    n = len(cell_type)
    batch = draw.integers(0, cfg.num_batches, n)
    activity = parts["activity"][cell_type] + draw.normal(0, 0.25, (n, 2))  # cells of a type differ in it too
    log_rate = (parts["base"] + parts["program"][cell_type] + activity @ parts["pathways"] + parts["batch"][batch]
                + draw.normal(size=(n, 3)) @ parts["variation"] + parts["shared"][pert]
                + np.einsum("nm,nmg->ng", activity, parts["modulated"][pert]))
    rate = np.exp(log_rate)
    rate *= cfg.depth * np.exp(draw.normal(0, 0.3, (n, 1))) / rate.sum(1, keepdims=True)
    kept = draw.random(rate.shape) >= cfg.dropout**rate
    return draw.poisson(rate) * kept, batch


def true_deltas(parts: dict, cfg, cells: int = 600) -> np.ndarray:
    """Expected log1p expression of perturbed cells minus control cells [K, P, G], as a mean over simulated cells.

    Control and perturbed cells share their generator's draws, so that their difference has little noise.
    """
    means = np.empty((cfg.num_cell_types, cfg.num_perturbations + 1, cfg.num_genes))
    for k, p in np.ndindex(means.shape[:2]):
        counts, _ = simulate(parts, np.full(cells, k), np.full(cells, p), counter_rng(cfg.seed, 2, k), cfg)
        means[k, p] = log_normalized(counts, np.maximum(counts.sum(1, keepdims=True), 1), cfg.target_sum).mean(0)
    return means[:, 1:] - means[:, :1]


def mean_pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of the Pearson correlation of a and b [n, G]."""
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    return float(((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))).mean())


def noise_report(X: np.ndarray, cell_type: np.ndarray, pert: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Pearson of deltas with the truth, for the last cell type: of half its cells, and of the mean over other types."""
    K, P, G = truth.shape

    def deltas(k: int, part: slice) -> np.ndarray:
        means = np.stack([X[(cell_type == k) & (pert == p)][part].mean(0) for p in range(P + 1)])
        return means[1:] - means[0]

    whole = np.mean([deltas(k, slice(None)) for k in range(K - 1)], axis=0)
    halves = [mean_pearson(deltas(K - 1, slice(start, None, 2)), truth[-1]) for start in (0, 1)]
    return {"noise_ceiling": sum(halves) / 2, "perturbation_mean": mean_pearson(whole, truth[-1])}


def synthetic(*, target_sum: float = 1e4, num_cell_types: int = 16, num_perturbations: int = 12, num_genes: int = 200,
              num_batches: int = 4, cells_per_condition: int = 40, controls_per_cell_type: int = 160, depth: float =
              5_000.0, dropout: float = 0.2, effect: float = 0.7, out_dir: str = "data/state", seed: int = 1337
              ) -> dict:
    """Populations of known effects -> synthetic.h5ad, synthetic.toml, truth.npz; returns the noise report.

    truth.npz: delta [K, P, G], expected log1p expression over control, with cell_types, perturbations and genes.
    """
    cfg = SimpleNamespace(**locals())
    parts, K, P, G = make_populations(cfg), cfg.num_cell_types, cfg.num_perturbations, cfg.num_genes
    types, perts, genes = ([f"{letter}{i:0{len(str(n - 1))}}" for i in range(n)]  # as sorted as text as they are here
                           for letter, n in (("c", K), ("p", P), ("g", G)))
    sizes = np.tile([cfg.controls_per_cell_type, *[cfg.cells_per_condition] * P], K)
    cell_type, pert = (np.repeat(x.ravel(), sizes) for x in np.indices((K, P + 1)))
    counts, batch = simulate(parts, cell_type, pert, counter_rng(cfg.seed, 1), cfg)
    X = log_normalized(counts, np.maximum(counts.sum(1, keepdims=True), 1), cfg.target_sum)
    truth = true_deltas(parts, cfg)
    found = noise_report(X, cell_type, pert, truth)
    obs = {"gene": np.array([CONTROL, *perts])[pert], "cell_type": np.array(types)[cell_type],
           "gem_group": np.array([f"b{i}" for i in range(cfg.num_batches)])[batch]}
    toml = (f'[datasets]\nsynthetic = "synthetic.h5ad"\n\n[training]\nsynthetic = "train"\n\n[zeroshot]\n'
            f'"synthetic.{types[-1]}" = "test"\n\n[fewshot."synthetic.{types[-2]}"]\nval = {json.dumps(perts[1::4])}\n')
    with Workshop(cfg.out_dir) as shop:
        write_h5ad(shop.folder / "synthetic.h5ad", csr_array(X), obs, genes, {"X_hvg": X},
                   var={"highly_variable": np.ones(len(genes), bool)}, uns={"log1p": {}, "seed": cfg.seed},
                   layers={"counts": csr_array(counts.astype(np.float32))})
        np.savez(shop.folder / "truth.npz", delta=truth, cell_types=types, perturbations=perts, genes=genes)
        (shop.folder / "synthetic.toml").write_text(toml, encoding="utf-8")
        shop.finish("synthetic.h5ad", "truth.npz", "synthetic.toml")
    print(f"synthetic: {len(X):,} cells, {K} cell types, {P} perturbations and {CONTROL}, {len(genes)} genes; Pearson "
          f"delta with the truth on {types[-1]}: {found['noise_ceiling']:.3f} of half its own cells (noise ceiling), "
          f"{found['perturbation_mean']:.3f} of the mean over the other types; written to {cfg.out_dir}")
    return {"cells": len(X), **found}
