"""Cells arranged for a model: control cells of each group, a choice of each group, the numbers of an earlier run."""

import numpy as np
import torch

from common.errors import DataError
from sources.cells import Cells, load_features
from sources.shared import suggest
from sources.splits import SPLITS, grouped, objection


def choose(rows: np.ndarray, bounds: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most so many rows of each group bounds[i] : bounds[i + 1], drawn; ascending."""
    group = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    shuffled = rows[np.argsort(group + rng.random(len(rows)), kind="stable")]
    rank = np.arange(len(rows)) - bounds[group]
    return np.sort(shuffled[rank < most])


def control_pools(cells: Cells, split: str, first: np.ndarray, by_batch: bool) -> tuple[np.ndarray, ...]:
    """(pool, start, size): the control cells that serve a group are pool[start : start + size].

    Those of the same file and cell type, by_batch also of the same batch; where the batch has none, all of the type.

    Args:
        first: a cell of each group.
    """
    controls = cells.rows(split, True)
    pool, _ = grouped(controls[cells.is_control[controls]], cells.file, cells.cell_type, cells.batch)
    kind = cells.file.astype(np.int64) * len(cells.cell_types) + cells.cell_type
    start, stop = _stretches(kind[pool], kind[first])
    if by_batch:
        kind = kind * len(cells.batches) + cells.batch
        left, right = _stretches(kind[pool], kind[first])
        lonely = first[(left == right) & (start < stop)]
        if len(lonely):
            objection(False, f"batch {cells.batches[cells.batch[lonely[0]]]!r} has no "
                             f"{cells.cell_types[cells.cell_type[lonely[0]]]} control cells, perhaps others too: "
                             "those of the cell type in any batch take their place")
        start, stop = np.where(left < right, (left, right), (start, stop))
    return pool, start, stop - start


def _stretches(ascending: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the stretch of each code begins and ends."""
    return np.searchsorted(ascending, codes, "left"), np.searchsorted(ascending, codes, "right")


def codes_of(names: list[str], known: list[str], what: str, where: str) -> list[int]:
    """Places of names in `known`. Raises DataError for one that is not there."""
    places = {name: i for i, name in enumerate(known)}
    for name in names:
        if name not in places:
            raise DataError(f"{where}: the {what} {name!r} is not of this model's training{suggest(name, known)}")
    return [places[name] for name in names]


def known_perturbations(cfg, extra: dict) -> dict[str, torch.Tensor]:
    """The features [pert_dim] of every perturbation a run knows: one-hot by its own list, or of its features file."""
    if cfg.perturbation_features_file:
        return load_features(cfg.perturbation_features_file)
    names = extra.get("perturbations") or []
    return dict(zip(names, torch.eye(len(names)), strict=True))


def renumber(cells: Cells, extra: dict, one_hot: bool, batch_encoder: bool) -> Cells:
    """Give cells the numbers for perturbations and batches that a run has, from the extra state of its checkpoint.

    Args:
        one_hot: its perturbations are numbers. batch_encoder: its model knows batches by number.
    Raises DataError for other genes, and for perturbations or batches that the model has no number for.
    """
    dims = extra["dims"]
    for name, genes in (("genes", cells.genes), ("count_genes", cells.count_genes)):
        if extra.get(name) is not None and list(genes or []) != list(extra[name]):
            raise DataError(f"{cells.toml} has other {name} than this run, or in another order: "
                            f"{len(genes or [])} against {len(extra[name])}")
    if one_hot and "perturbations" in extra:
        places = codes_of(cells.perturbations, extra["perturbations"], "perturbation", str(cells.toml))
        cells.pert_dim = len(extra["perturbations"])
        cells.features = torch.eye(cells.pert_dim)[places]
    if batch_encoder and "batches" in extra:
        places = codes_of(cells.batches, extra["batches"], "batch", str(cells.toml))
        cells.batch, cells.batches = np.array(places, np.int32)[cells.batch], extra["batches"]
    elif batch_encoder and cells.batch_dim > (dims["batch_dim"] or 0):
        raise DataError(f"{cells.toml} has {cells.batch_dim} batches, more than the model's {dims['batch_dim']}")
    cells.batch_dim = dims["batch_dim"]
    if (cells.input_dim, cells.pert_dim) != (dims["input_dim"], dims["pert_dim"]):
        raise DataError(f"{cells.toml} is not the data of this run: cells have {cells.input_dim} and perturbations "
                        f"{cells.pert_dim} features, the model's {dims['input_dim']} and {dims['pert_dim']}")
    return cells


def summary_of(cells: Cells) -> str:
    """How many cells of what there are, in words."""
    control = cells.perturbations[cells.control]
    counts = ", ".join(f"{split} {len(cells.rows(split, controls=False)):,}" for split in SPLITS)
    return (f"{cells.toml}: {len(cells.cell_type):,} cells of {len(cells.cell_types)} cell types, "
            f"{len(cells.perturbations) - 1} perturbations and {control}; perturbed cells: {counts} | "
            f"{'read from disk' if cells.streamed else 'held in memory'}")
