"""Cells arranged for a model: control cells of each group, a choice of each group, the numbers of an earlier run."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from common.errors import CheckpointError, DataError
from sources.cells import Cells, load_features
from sources.shared import counted, suggest
from sources.splits import SPLITS, grouped, objection


def choose(
    rows: np.ndarray,
    bounds: np.ndarray,
    most: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """A random choice of at most `most` rows of each group, ascending.

    Args:
        rows: cells [n], group after group. bounds: [groups + 1]; group i is rows[bounds[i] : bounds[i + 1]].
    """
    sizes = np.diff(bounds)
    group = np.repeat(np.arange(len(bounds) - 1), sizes)
    # A random number below 1 added to a group's number shuffles the cells within their group.
    order = np.argsort(group + rng.random(len(rows)), kind="stable")
    shuffled = rows[order]
    rank = np.arange(len(rows)) - bounds[group]  # place of a cell in its shuffled group
    return np.sort(shuffled[rank < most])


def control_pools(
    cells: Cells,
    split: str,
    first: np.ndarray,
    by_batch: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pool, start, size): the control cells that serve a group are pool[start : start + size].

    Those of the same file and cell type, by_batch also of the same batch; where the batch has none, all of the type.

    Args:
        first: a cell of each group, [groups].
    """
    served = cells.rows(split, controls=True)
    controls = served[cells.is_control[served]]
    # Sorted by file, type and batch, the controls of a type are one stretch, and those of a batch a part of it.
    pool, _ = grouped(controls, cells.file, cells.cell_type, cells.batch)
    kind = cells.file.astype(np.int64) * len(cells.cell_types) + cells.cell_type
    start, stop = _stretches(kind[pool], kind[first])
    if by_batch:
        kind = kind * len(cells.batches) + cells.batch
        batch_start, batch_stop = _stretches(kind[pool], kind[first])
        has_batch = batch_start < batch_stop
        lonely = first[~has_batch & (start < stop)]
        if len(lonely):
            batch = cells.batches[cells.batch[lonely[0]]]
            cell_type = cells.cell_types[cells.cell_type[lonely[0]]]
            objection(
                False,
                f"batch {batch!r} has no {cell_type} control cells, perhaps others too: "
                "those of the cell type in any batch take their place",
            )
        start = np.where(has_batch, batch_start, start)
        stop = np.where(has_batch, batch_stop, stop)
    return pool, start, stop - start


def _stretches(ascending: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the stretch of each code begins and ends."""
    begin = np.searchsorted(ascending, codes, "left")
    end = np.searchsorted(ascending, codes, "right")
    return begin, end


def same_lengths(sentences: list, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Targets [b, s] and controls [b, s, k] of sentences that have one length, of at most so many cells."""
    for length in sorted({len(targets) for targets, _ in sentences}):
        members = [sentence for sentence in sentences if len(sentence[0]) == length]
        at_once = max(1, most // length)
        for i in range(0, len(members), at_once):
            targets, controls = zip(*members[i : i + at_once], strict=True)
            yield np.stack(targets), np.stack(controls)


def codes_of(names: list[str], known: list[str], what: str, where: str) -> list[int]:
    """Places of names in `known`. Raises DataError for one that is not there."""
    places = {name: i for i, name in enumerate(known)}
    codes = []
    for name in names:
        if name not in places:
            raise DataError(f"{where}: the {what} {name!r} is not of this model's training{suggest(name, known)}")
        codes.append(places[name])
    return codes


def known_perturbations(cfg, extra: dict) -> dict[str, torch.Tensor]:
    """The features [pert_dim] of every perturbation a run knows: one-hot by its own list, or of its features file."""
    if cfg.perturbation_features_file:
        return load_features(cfg.perturbation_features_file)
    names = extra.get("perturbations") or []
    one_hot = torch.eye(len(names))
    return dict(zip(names, one_hot, strict=True))


def check_genes(toml: str, name: str, genes: list[str] | None, extra: dict) -> None:
    """Raise DataError unless the cells have the genes of a run, in the same order; where it names none, all serve."""
    trained = extra.get(name)
    if trained is None:
        return
    genes = list(genes or [])
    if genes != list(trained):
        odd = next(((gene, known) for gene, known in zip(genes, trained, strict=False) if gene != known), None)
        first = f", the first that differ are {odd[0]!r} and {odd[1]!r}" if odd else ""
        raise DataError(
            f"{toml} has other {name} than this run, or in another order: {len(genes)} against {len(trained)}{first}"
        )


def same_meaning(extra: dict, known: dict, path: Path) -> None:
    """Raise CheckpointError where the numbers of a checkpoint, by its extra state, mean others than those of the cells.

    known: {name: sizes or names} of the cells.
    """
    other = []
    for name, value in known.items():
        try:
            same = bool(extra.get(name) == value)
        except (RuntimeError, TypeError):  # tensors, of a file that is no whole one
            same = False
        if not same:
            other.append(name)
    if other:
        raise CheckpointError(
            f"{path} is of other data ({', '.join(other)} differ): use another out_dir, or resume=never to train anew "
            "there, which replaces the checkpoints"
        )


def renumber(cells: Cells, extra: dict, one_hot: bool, batch_encoder: bool) -> Cells:
    """Give cells the numbers for perturbations and batches that a run has, from the extra state of its checkpoint.

    Changes `cells` in place and returns them.

    Args:
        one_hot: its perturbations are numbers. batch_encoder: its model knows batches by number.
    Raises DataError for other genes, and for perturbations or batches that the model has no number for.
    """
    toml = str(cells.toml)
    dims = extra["dims"]
    check_genes(toml, "genes", cells.genes, extra)
    check_genes(toml, "count_genes", cells.count_genes, extra)
    if one_hot and "perturbations" in extra:
        places = codes_of(cells.perturbations, extra["perturbations"], "perturbation", toml)
        cells.pert_dim = len(extra["perturbations"])
        cells.features = torch.eye(cells.pert_dim)[places]
    if batch_encoder and "batches" in extra:
        places = codes_of(cells.batches, extra["batches"], "batch", toml)
        cells.batch = np.array(places, np.int32)[cells.batch]
        cells.batches = extra["batches"]
    elif batch_encoder and cells.batch_dim > (dims["batch_dim"] or 0):
        # The checkpoint does not name its batches: those of the data may be others, but not more.
        batches = counted(cells.batch_dim, "batch", "batches")
        raise DataError(f"{toml} has {batches}, more than the model's {dims['batch_dim']}")
    cells.batch_dim = dims["batch_dim"]
    if (cells.input_dim, cells.pert_dim) != (dims["input_dim"], dims["pert_dim"]):
        raise DataError(
            f"{toml} is not the data of this run: cells have {cells.input_dim} and perturbations "
            f"{cells.pert_dim} features, the model's {dims['input_dim']} and {dims['pert_dim']}"
        )
    return cells


def summary_of(cells: Cells) -> str:
    """How many cells of what there are, in words."""
    control = cells.perturbations[cells.control]
    counts = []
    for split in SPLITS:
        perturbed = cells.rows(split, controls=False)
        counts.append(f"{split} {len(perturbed):,}")
    where = "read from disk" if cells.streamed else "held in memory"
    return (
        f"{cells.toml}: {counted(len(cells.cell_type), 'cell')} of {counted(len(cells.cell_types), 'cell type')}, "
        f"{counted(len(cells.perturbations) - 1, 'perturbation')} and {control}; "
        f"perturbed cells: {', '.join(counts)} | {where}"
    )
