"""Synthetic cell populations under perturbations whose true effects are known.

K cell types, M = 2 pathways, P perturbations, G genes, n cells.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from common.errors import DataError
from common.telling import bar, doing
from sources.h5ad import write_h5ad
from sources.preprocess import log_normalized
from sources.shared import Workshop, counted, counter_rng

CONTROL = "non-targeting"
MOST_COUNTS = 10**9  # of a gene in a cell


@dataclass
class Populations:
    """What the synthetic populations are made of, on log expression.

    A type has an activity in each pathway, seen in its control cells through the pathway's genes. Perturbation p adds
    shared[p] + activity @ modulated[p]: what it does to a new type can be read from that type's control cells, and
    neither the mean over the other types nor its basal expression alone says it.
    """

    base: np.ndarray  # [G] of every cell
    activity: np.ndarray  # [K, M] of a type in the pathways
    program: np.ndarray  # [K, G] of a type besides
    batch: np.ndarray  # [batches, G]
    pathways: np.ndarray  # [M, G]
    shared: np.ndarray  # [P + 1, G] effect on every type; row 0 is the control
    modulated: np.ndarray  # [P + 1, M, G] effect by activity
    variation: np.ndarray  # [3, G] directions in which cells of a condition differ


def make_populations(
    num_cell_types: int,
    num_perturbations: int,
    num_genes: int,
    num_batches: int,
    effect: float,
    seed: int,
) -> Populations:
    """The activities of the training types lie on a circle, so that their mean is no guide, and those of the last type
    inside the hull, between two of them."""
    K = num_cell_types
    P = num_perturbations
    G = num_genes
    draw = counter_rng(seed, 0)
    angle = 2 * np.pi * np.append(np.arange(K - 1), 0.5) / (K - 1)
    # The chord between two neighbours on the circle is cos(pi / (K - 1)) away from the centre: the last type is inside.
    radius = np.append(np.ones(K - 1), 0.9 * np.cos(np.pi / (K - 1)))
    direction = np.stack((np.cos(angle), np.sin(angle)), 1)  # [K, M]
    touched = draw.random((P + 1, 1, G)) < 0.3  # of the genes; row 0 is the control
    touched[0] = False
    effects = effect * draw.normal(size=(P + 1, 3, G)) * touched
    # In the order of the fields: what is drawn depends on what was drawn before.
    return Populations(
        base=draw.normal(0, 0.8, G),
        activity=radius[:, None] * direction,
        program=draw.normal(0, 0.15, (K, G)),
        batch=draw.normal(0, 0.08, (num_batches, G)),
        pathways=draw.normal(0, 0.8, (2, G)) * (draw.random((2, G)) < 0.3),
        shared=effects[:, 0],
        modulated=1.2 * effects[:, 1:],
        variation=draw.normal(0, 0.15, (3, G)),
    )


def simulate(
    populations: Populations,
    cell_type: np.ndarray,
    pert: np.ndarray,
    depth: float,
    dropout: float,
    draw: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(counts [n, G], batch [n]) of cells of these types and perturbations (0 is the control).

    depth: median counts of a cell. dropout: probability that a gene is lost where its expected count is 1.
    """
    n = len(cell_type)
    batch = draw.integers(0, len(populations.batch), n)
    activity = populations.activity[cell_type] + draw.normal(0, 0.25, (n, 2))  # cells of a type differ in it too
    log_rate = populations.base + populations.program[cell_type]
    log_rate = log_rate + activity @ populations.pathways + populations.batch[batch]
    log_rate = log_rate + draw.normal(size=(n, 3)) @ populations.variation + populations.shared[pert]
    log_rate = log_rate + np.einsum("nm,nmg->ng", activity, populations.modulated[pert])
    # Expected counts, after the depth of a cell, which is log-normal.
    cell_depth = depth * np.exp(draw.normal(0, 0.3, (n, 1)))
    with np.errstate(all="ignore"):
        rate = np.exp(log_rate)
        rate *= cell_depth / rate.sum(1, keepdims=True)
    if not (rate < MOST_COUNTS).all():  # NaN neither
        raise DataError(f"depth = {depth:g} or the effects are too large: a gene has more than {MOST_COUNTS:,} counts")
    kept = draw.random(rate.shape) >= dropout**rate  # the rarer a gene, the easier it is lost
    return draw.poisson(rate) * kept, batch


def true_deltas(
    populations: Populations,
    depth: float,
    dropout: float,
    target_sum: float,
    seed: int,
    cells: int = 600,
) -> np.ndarray:
    """Expected log1p expression of perturbed cells minus control cells [K, P, G], as a mean over simulated cells.

    Control and perturbed cells share their generator's draws, so that their difference has little noise.
    """
    K, G = populations.program.shape
    conditions = len(populations.shared)
    means = np.empty((K, conditions, G))
    for k in bar(range(K), f"true effects of {counted(conditions - 1, 'perturbation')} on {counted(K, 'type')}"):
        cell_type = np.full(cells, k)
        for p in range(conditions):
            draw = counter_rng(seed, 2, k)
            counts, _ = simulate(populations, cell_type, np.full(cells, p), depth, dropout, draw)
            means[k, p] = expression(counts, target_sum).mean(0)
    return means[:, 1:] - means[:, :1]


def expression(counts: np.ndarray, target_sum: float) -> np.ndarray:
    """log(1 + x) of counts scaled to the same sum in every cell; a cell without counts stays without."""
    totals = counts.sum(1, keepdims=True)
    return log_normalized(counts, np.maximum(totals, 1), target_sum)


def mean_pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean over rows of the Pearson correlation of a and b [n, G]; of constant rows there is none, and None of all."""
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    products = (a * b).sum(1)
    known = norms > 0
    return float((products[known] / norms[known]).mean()) if known.any() else None


def noise_report(X: np.ndarray, cell_type: np.ndarray, pert: np.ndarray, truth: np.ndarray) -> dict:
    """Pearson of deltas with the truth, for the last cell type: of half its cells, and of the mean over other types.

    None where no perturbation has an effect.
    """
    K, P, _ = truth.shape

    def deltas(k: int, part: slice) -> np.ndarray:
        means = []
        for p in range(P + 1):
            cells = X[(cell_type == k) & (pert == p)]
            means.append(cells[part].mean(0))
        return np.stack(means[1:]) - means[0]

    last = K - 1
    others = np.mean([deltas(k, slice(None)) for k in range(last)], axis=0)
    even_cells = mean_pearson(deltas(last, slice(0, None, 2)), truth[last])
    odd_cells = mean_pearson(deltas(last, slice(1, None, 2)), truth[last])
    defined = even_cells is not None and odd_cells is not None
    return {
        "noise_ceiling": (even_cells + odd_cells) / 2 if defined else None,
        "perturbation_mean": mean_pearson(others, truth[last]),
    }


def noise_in_words(noise: dict, cell_type: str) -> str:
    """The noise report as part of a sentence, without what is undefined."""
    parts = []
    for name, of_what in (("noise_ceiling", "half its own cells (noise ceiling)"),
                          ("perturbation_mean", "the mean over the other types")):
        if noise[name] is not None:
            parts.append(f"{noise[name]:.3f} of {of_what}")
    if not parts:
        return f"no perturbation has an effect on {cell_type}"
    return f"Pearson delta with the truth on {cell_type}: {', '.join(parts)}"


def synthetic(
    *,
    target_sum: float = 1e4,
    num_cell_types: int = 16,
    num_perturbations: int = 12,
    num_genes: int = 200,
    num_batches: int = 4,
    cells_per_condition: int = 40,
    controls_per_cell_type: int = 160,
    depth: float = 5_000.0,
    dropout: float = 0.2,
    effect: float = 0.7,
    out_dir: str = "data/state",
    seed: int = 1337,
) -> dict:
    """Populations of known effects -> synthetic.h5ad, synthetic.toml, truth.npz; returns the noise report.

    truth.npz: delta [K, P, G], expected log1p expression over control, with cell_types, perturbations and genes.
    """
    K, P, G = num_cell_types, num_perturbations, num_genes
    populations = make_populations(K, P, G, num_batches, effect, seed)
    sizes = np.tile([controls_per_cell_type, *[cells_per_condition] * P], K)  # cells of each condition
    types, perts = np.indices((K, P + 1))
    cell_type, pert = np.repeat(types.ravel(), sizes), np.repeat(perts.ravel(), sizes)
    with doing(f"making {counted(len(pert), 'cell')} of {counted(K, 'type')} under {counted(P, 'perturbation')}"):
        counts, batch = simulate(populations, cell_type, pert, depth, dropout, counter_rng(seed, 1))
        X = expression(counts, target_sum)
    truth = true_deltas(populations, depth, dropout, target_sum, seed)
    noise = noise_report(X, cell_type, pert, truth)
    type_names, pert_names, genes = numbered("c", K), numbered("p", P), numbered("g", G)
    with Workshop(out_dir) as shop:
        obs = {
            "gene": np.array([CONTROL, *pert_names])[pert],
            "cell_type": np.array(type_names)[cell_type],
            "gem_group": np.array([f"b{i}" for i in range(num_batches)])[batch],
        }
        write_h5ad(
            shop.folder / "synthetic.h5ad",
            csr_array(X),
            obs,
            genes,
            {"X_hvg": X},
            var={"highly_variable": np.ones(G, bool)},
            uns={"log1p": {}, "seed": seed},
            layers={"counts": csr_array(counts.astype(np.float32))},
        )
        np.savez(shop.folder / "truth.npz", delta=truth, cell_types=type_names, perturbations=pert_names, genes=genes)
        write_toml(shop.folder / "synthetic.toml", type_names, pert_names)
        shop.finish("synthetic.h5ad", "truth.npz", "synthetic.toml")
    perturbations = counted(P, "perturbation")
    print(f"{counted(len(X), 'cell')}, {counted(K, 'cell type')}, {perturbations} and {CONTROL}, {counted(G, 'gene')}; "
          f"written to {out_dir}")
    print(noise_in_words(noise, type_names[-1]))
    return {"cells": len(X), **noise}


def numbered(letter: str, count: int) -> list[str]:
    """Names that sort as text as their numbers do: g000, g001, ..."""
    width = len(str(count - 1))
    return [f"{letter}{i:0{width}}" for i in range(count)]


def write_toml(path: Path, types: list[str], perts: list[str]) -> None:
    """The split: the last type is held out as a whole, of the one before some perturbations, for validation."""
    lines = [
        "[datasets]",
        'synthetic = "synthetic.h5ad"',
        "",
        "[training]",
        'synthetic = "train"',
        "",
        "[zeroshot]",
        f'"synthetic.{types[-1]}" = "test"',
        "",
        f'[fewshot."synthetic.{types[-2]}"]',
        f"val = {json.dumps(perts[1::4])}",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
