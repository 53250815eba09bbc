"""Comparing checkpoints to the bit, and results to rounding."""

import math

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


def apart(a, b, rel: float = 1e-5, tiny: float = 1e-7, where: str = "") -> list[str]:
    """The places at which two nested results differ by more than rounding."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in apart(a[key], b[key], rel, tiny, f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in
                apart(*pair, rel, tiny, f"{where}/{i}")]
    if isinstance(a, float) and isinstance(b, float):
        same = math.isclose(a, b, rel_tol=rel, abs_tol=tiny) or math.isnan(a) and math.isnan(b)
        return [] if same else [f"{where}: {a} and {b}"]
    return [] if a == b else [f"{where}: {a} != {b}"]
