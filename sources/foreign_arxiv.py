"""Checkpoints of train_arxiv.py as it was, with a position more than it predicts from, as it reads them now."""

from pathlib import Path

from common.errors import CheckpointError


def without_last_position(state: dict, path: Path) -> dict:
    """The checkpoint with positions for the T = n - 1 predictions of a chunk of n tokens, where it has n.

    The last row of an older table was never trained: no prediction of training is made after n tokens. It goes, with
    its moments in the optimizer's state. Newer checkpoints say chunk_size and pass as they are, and so do the weights
    of an edited copy without such a table. Raises CheckpointError if the optimizer's state is not of this table.
    """
    extra = state["extra"]
    if "chunk_size" in extra:
        return state
    n = extra["n_ctx"]
    newer = dict(state)
    newer["extra"] = extra | {"n_ctx": n - 1, "chunk_size": n}
    table = state["model"].get("position")
    if table is None or len(table) != n:
        return newer
    newer["model"] = state["model"] | {"position": table[:-1].clone()}
    if state["optimizer"]:
        newer["optimizer"] = _without_last_moments(state, path)
    return newer


def _without_last_moments(state: dict, path: Path) -> dict:
    """The optimizer's state, whose first parameters are the matrices, in the order of the weights."""
    shape = state["model"]["position"].shape
    matrices = [name for name, weight in state["model"].items() if weight.ndim >= 2]
    number = matrices.index("position")
    by_number = dict(state["optimizer"]["state"])
    if number in by_number:  # it is not, before the first step
        moments = dict(by_number[number])
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != shape:
                raise CheckpointError(
                    f"{path} is of an older train_arxiv.py, and its optimizer's state is not of the matrices in their "
                    "order: train anew in another out_dir, or here with resume=never"
                )
            moments[name] = moments[name][:-1].clone()
        by_number[number] = moments
    return state["optimizer"] | {"state": by_number}
