"""Runs of a study of train_arxiv.py as arrays: cross entropy (XE) by run, category and position, on which documents."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import reason, regular_file
from measure.curves import TOGETHER, reported_positions, score_positions
from measure.xe_by_k import Study, draw_documents

RESAMPLES = 1000  # of intervals
SEED = 0  # of these


class Arrays(NamedTuple):
    """Runs as arrays: study (xe_by_k.Study) of its runs, optimum (of the exact one, or None), controls by K.

    names: of the categories. positions: those reported, early and late of the in-context score among them. documents:
    how many of each category, None where they are not known, and why not.
    """

    study: Study
    optimum: Study | None
    controls: dict[int, Study]
    names: list[str]
    positions: list[int]
    early: int
    late: int
    documents: np.ndarray | None
    why: str


def arrays_of(studied: list[dict], controls: list[dict]) -> Arrays:
    """Of runs that may be averaged and of controls, each as results.json has it, with its folder and name."""
    runs = [*studied, *controls]
    T = min(len(run["groups"]["seen"]["xe_by_position"]) for run in runs)
    early, late = positions_of_score(studied, T)
    positions = sorted({*reported_positions(T), early, late})
    names = sorted({name for run in runs for name in run["groups"] if name not in TOGETHER})
    xe = np.stack([losses(run, names, positions, "xe_by_position") for run in runs])
    seen = np.array([[name in run["categories"] for name in names] for run in runs])
    seeds = np.array([run["seed"] for run in runs])
    draws, documents, why = drawn(runs, names, positions, xe)
    everything = Study(xe, seen, seeds, draws)
    of_controls = np.array([run.get("control_of") or 0 for run in runs])
    study = everything.among(of_controls == 0)
    optimum = np.stack([losses(run, names, positions, "oracle_xe_by_position") for run in studied])
    exact = np.isfinite(optimum[study.seen]).all()
    of_share = {}
    for K in sorted({*of_controls.tolist()} - {0}):
        of_share[K] = everything.among(of_controls == K)
    return Arrays(
        study,
        study._replace(xe=optimum, draws=None) if exact else None,
        of_share,
        names,
        positions,
        early,
        late,
        documents,
        why,
    )


def positions_of_score(runs: list[dict], T: int) -> tuple[int, int]:
    """(early, late) of the in-context score: those that all runs say, where they say the same; else 10 and the last."""
    said = set()
    for run in runs:
        score = run["groups"]["seen"].get("icl_score") or {}
        if {"early", "late"} <= set(score):
            said.add((score["early"], score["late"]))
    if len(said) == 1 and max(said)[1] <= T:
        return said.pop()
    return score_positions(None, None, T) or (T, T)


def losses(
    run: dict,
    names: list[str],
    positions: list[int],
    key: str,
) -> np.ndarray:
    """XE of each category at the positions and their mean over all, [C, P]; nan where a run has none."""
    rows = np.full((len(names), len(positions) + 1), np.nan)
    for c, name in enumerate(names):
        curve = run["groups"].get(name, {}).get(key)
        if curve is not None:
            rows[c, :-1] = [curve[position - 1] for position in positions]
            rows[c, -1] = np.mean(curve)
    return rows


def drawn(
    runs: list[dict], names: list[str], positions: list[int], xe: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """(XE on documents drawn with replacement [B, R, C, P], documents by category, ""), or (None, None, why not)."""
    first = None
    sums = []
    for run, measured in zip(runs, xe, strict=True):
        path = run["folder"] / "documents.npz"
        if not path.exists():
            return None, None, f"{run['run']} has no documents.npz, as runs of before have none"
        try:
            documents = read_documents(path, names, positions)
        except Exception as error:  # a damaged archive makes numpy, zipfile and zlib raise a dozen kinds
            return None, None, f"documents.npz of {run['run']} cannot be used ({reason(error)})"
        codes, _, counts, values = documents
        # The same documents are drawn for all runs, so they must have the same.
        first = first or documents
        if not all(np.array_equal(*pair) for pair in zip(documents[:3], first[:3], strict=True)):
            return None, None, f"{run['run']} was measured on other documents than {runs[0]['run']}"
        # Sums and results of two lives of a run would give intervals around another mean.
        for c in np.unique(codes):
            chosen = codes == c
            mean = values[chosen].sum(0) / counts[chosen].sum()
            if not np.allclose(mean, measured[c], rtol=1e-3, atol=1e-3):
                return None, None, f"documents.npz of {run['run']} is not of its results.json"
        sums.append(values)
    codes, _, counts, _ = first
    if np.bincount(codes).min() < 2:
        return None, None, "a category has a single document, which says nothing of others"
    draws = draw_documents(sums, counts, codes, len(names), RESAMPLES, SEED)
    return draws, np.bincount(codes, minlength=len(names)), ""


def read_documents(
    path: Path,
    names: list[str],
    positions: list[int],
) -> tuple[np.ndarray, ...]:
    """(category of each document as a number into names, its number, its chunks, sums over these [M, P]).

    Raises ValueError where the arrays do not fit together, and what numpy raises of a damaged file.
    """
    with np.load(regular_file(path), allow_pickle=False) as file:
        known, codes, counts, kept = (file[name] for name in ("names", "codes", "counts", "positions"))
        sums, total, documents = file["sums"], file["total"], file["documents"]
    M = len(codes)
    whole = all(array.dtype.kind in "iu" for array in (codes, counts, kept, documents)) and known.dtype.kind == "U"
    whole = whole and sums.dtype.kind == total.dtype.kind == "f"
    shapes = [array.shape for array in (codes, counts, documents, total, sums)]
    whole = whole and shapes == [(M,)] * 4 + [(M, len(kept))] and known.ndim == kept.ndim == 1
    if not whole or not M or codes.min() < 0 or counts.min() < 1:
        raise ValueError("its arrays do not fit together")
    places = [names.index(name) if name in names else -1 for name in known.tolist()]
    kept = kept.tolist()
    columns = [kept.index(position) for position in positions]
    values = np.concatenate([sums[:, columns], total[:, None]], 1).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return np.array(places)[codes], documents, counts, values
