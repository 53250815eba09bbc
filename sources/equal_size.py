"""Models of equal size: the width at which a model has as many parameters as another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from common.errors import DataError, InputError

WITHIN = 0.03  # the share by which sizes may differ


def equal_width(size_at: Callable[[int], int], wanted: int, unit: int = 1, purpose: str = "") -> tuple[int, int]:
    """(width, parameters) of the model that is nearest in size to `wanted` parameters.

    size_at: parameters of a width, which grow with it. unit: widths are multiples of it. purpose: the setting that asks
    for it, for the error. Raises InputError where the nearest is further away than WITHIN.
    """
    above = 1
    while size_at(above * unit) < wanted:
        above *= 2
    below = above // 2  # too small, or 0, which is no width
    while above - below > 1:
        middle = (above + below) // 2
        if size_at(middle * unit) < wanted:
            below = middle
        else:
            above = middle
    widths = [number * unit for number in (below, above) if number]
    sizes = {width: size_at(width) for width in widths}
    nearest = min(sizes, key=lambda width: abs(sizes[width] - wanted))
    if abs(sizes[nearest] - wanted) > WITHIN * wanted:
        raise InputError(
            f"{purpose}: no width has within {WITHIN:.0%} of the {wanted:,} parameters of the model to compare with, "
            f"the nearest has {sizes[nearest]:,} at d_model={nearest} (in steps of {unit}): "
            "change n_heads, token_dim or n_layers"
        )
    return nearest, sizes[nearest]


def parameters_of(build: Callable, cfg, vocab_size: int) -> int:
    """How many parameters the model build(cfg, vocab_size) has; shapes alone are made."""
    with torch.device("meta"):
        model = build(cfg, vocab_size)
    return sum(parameter.numel() for parameter in model.parameters())


def as_large(build: Callable, cfg, vocab_size: int, wanted: int, purpose: str) -> tuple[dict[str, int], int]:
    """({setting: width}, parameters) with which the model of a Config of train_apelr.py is as large as wanted.

    Raises InputError as equal_width does.
    """

    def widths(width: int) -> dict[str, int]:
        if cfg.backbone == "transformer_lm":  # its blocks read the token embeddings themselves
            return {"d_model": width, "token_dim": width}
        return {"d_model": width}

    def size_at(width: int) -> int:
        return parameters_of(build, replace(cfg, **widths(width)), vocab_size)

    # A head of a transformer is a whole number of channels, in pairs where positions turn them.
    units = {"transformer": 2 * cfg.n_heads, "transformer_lm": cfg.n_heads}
    width, parameters = equal_width(size_at, wanted, units.get(cfg.backbone, 1), purpose)
    return widths(width), parameters


def resize(page: ModuleType, reference: Any, cfgs: Sequence) -> list[dict[str, str]]:
    """For the Config of each run {setting: value as typed} that gives its model the size of the reference's: d_model.

    The width makes up for what else a run changes, such as the number of plans. The reference is what the page would
    train without any list, so that runs which are added later leave those that there are as they were.

    Args:
        page: train_apelr.py or a copy. reference: its Config.
    Raises DataError for another page, where d_model itself is listed, and where no run differs in size; InputError
    where no width fits.
    """
    if getattr(page, "EXPERIMENT", "") != "apelr":
        raise DataError("equal_parameters makes models of train_apelr.py equal in size, those of no other page: "
                        "leave it out")
    if any(cfg.d_model != reference.d_model for cfg in cfgs):
        raise DataError("equal_parameters decides about d_model: take it out of the lists, or leave equal_parameters "
                        "out")
    wanted = size_in(page, reference)
    if all(size_in(page, cfg) == wanted for cfg in cfgs):
        raise DataError(f"equal_parameters: all runs have {wanted:,} parameters as they are: list what changes the "
                        "size, such as --num_plan_states=1,2,4,8, or leave it out")
    settings = []
    for cfg in cfgs:
        vocab_size = page.open_data(cfg).vocab_size
        widths, _ = as_large(page.build_model, cfg, vocab_size, wanted, "equal_parameters")
        settings.append({name: str(width) for name, width in widths.items()})
    return settings


def size_in(page: ModuleType, cfg: Any) -> int:
    """Parameters of the model that a page trains on the data of cfg."""
    return parameters_of(page.build_model, cfg, page.open_data(cfg).vocab_size)
