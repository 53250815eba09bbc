"""Comparing checkpoints to the bit."""

import torch


def unequal(a, b, where: str = "") -> list[str]:
    """The places at which two nested states are not the same to the bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [f"{where}: keys"]
        return [place for key in a for place in unequal(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in unequal(*pair, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} != {b}"]
