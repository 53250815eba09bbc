"""Cells predicted from control cells that are given, as a model of train_state.py does in sentences of S cells."""

from collections.abc import Callable

import numpy as np
import torch


def draw_controls(count: int, cells: int, each: int, rng: np.random.Generator) -> np.ndarray:
    """Places [cells, each] among `count` control cells: each once as far as they go, in a random order."""
    needed = cells * each
    rounds = []
    while len(rounds) * count < needed:
        rounds.append(rng.permutation(count))
    places = np.concatenate(rounds)[:needed]
    return places.reshape(cells, each)


@torch.no_grad()
def predict_cells(
    predict: Callable[[dict], torch.Tensor],
    expression: torch.Tensor,
    batches: np.ndarray | None,
    chosen: np.ndarray,
    perturbation: torch.Tensor,
    cell_set_len: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Cells under one perturbation, arrays [S, G]: each predicted from the mean of its control cells.

    Args:
        predict: batch -> cells [1, S, G]. expression: of the control cells [m, D]; batches: their codes [m], if the
            model reads them. chosen: places of the control cells of each predicted one [n, k].
    """
    parts = []
    for begin in range(0, len(chosen), cell_set_len):
        places = chosen[begin : begin + cell_set_len]  # [S, k]
        controls = expression[places].mean(1)  # [S, D]
        batch = {
            "ctrl_cell_emb": controls[None].to(device),  # a sentence, [1, S, D]
            "pert_emb": perturbation[None].float().to(device),
        }
        if batches is not None:  # that of the first of a cell's control cells
            codes = torch.from_numpy(batches[places[:, 0]])
            batch["batch"] = codes[None].to(device)
        cells = predict(batch)[0]
        parts.append(cells.float().cpu().numpy())
    return parts
