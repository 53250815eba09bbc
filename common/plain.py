"""What a checkpoint may hold: plain values and tensors. Their digest, and whether they are of the kinds that are read.

torch.load notices neither a flipped bit nor a value of another kind; what goes on from one would be silently wrong.
"""

import hashlib
import types
from collections import OrderedDict

import numpy as np
import torch

MOST_REPEATED = 100_000  # values: lists that hold each other can stand for more than there is time for
REPEATED_BYTES = 1 << 24  # and a tensor can repeat a few stored numbers, which is no use beyond this
DICTS = (dict, OrderedDict)
LISTS = (list, tuple, torch.Size)
SINGLE = (str, bytes, bool, int, float, type(None))


def digest(value: object) -> str:
    """sha256 of plain values and tensors: of their kinds, order, shapes and every bit.

    Equal for equal numbers, in whatever layout and on whatever device a tensor is; no memory is copied where it is
    contiguous. Raises ValueError for what a checkpoint cannot hold, and what says more than is stored.
    """
    hashed = hashlib.sha256()
    seen: set[int] = set()
    repeated = 0

    def add(text: str) -> None:
        hashed.update(text.encode())

    def walk(value: object, where: str) -> None:
        """Depth first; each kind says its name and size, or is spelled as Python reads it: no two values are alike."""
        nonlocal repeated
        kind = type(value)
        if kind in DICTS + LISTS:
            repeated += len(value) if id(value) in seen else 0
            seen.add(id(value))
            if repeated > MOST_REPEATED:
                raise ValueError("it holds more values than its size allows")
            names = {OrderedDict: "dict", torch.Size: "tuple"}  # torch.load has its own mind about these
            add(f"{names.get(kind, kind.__name__)} {len(value)};")
        if kind in DICTS:
            for name, part in value.items():
                walk(name, where)
                walk(part, f"{where}.{name}" if where else str(name))
            if kind is OrderedDict and vars(value):  # the versions of modules, in a state_dict of torch
                walk(vars(value), where)
        elif kind in LISTS:
            for part in value:
                walk(part, where)
        elif kind in (torch.Tensor, torch.nn.Parameter):
            numbers = in_rows(value.detach(), where)
            add(f"{value.dtype} {list(value.shape)};")
            hashed.update(numbers)
        elif kind in SINGLE:
            add(f"{value!r};")
        else:
            raise ValueError(f"{where or 'it'} is a {kind.__module__}.{kind.__name__}, which is no plain value")

    walk(value, "")
    return hashed.hexdigest()


def in_rows(tensor: torch.Tensor, where: str) -> np.ndarray:
    """The bytes of a tensor, row after row. Raises ValueError for one that repeats what is stored."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ValueError(f"{where} is a tensor of another kind than numbers in rows")
    check_size(tensor, where)
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def check_size(tensor: torch.Tensor, where: str) -> None:
    """Raise ValueError for a tensor that says more numbers than are stored, which would be made when it is used."""
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), REPEATED_BYTES):
        raise ValueError(f"{where} says {list(tensor.shape)}, more numbers than are stored")


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a kind.

    kind: a type (int: a count from 0; float: a number, or a count; dict: texts are its keys; list: of texts); X | None;
    [kind], a list of it; {str: kind}, a dict of it; {name: kind, ...}, a dict of exactly these.
    """
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in kind.__args__)
    if isinstance(kind, list):
        return type(value) is list and all(fits(part, kind[0]) for part in value)
    if isinstance(kind, dict):
        kinds = dict.fromkeys(value, kind[str]) if str in kind and fits(value, dict) else kind
        return fits(value, dict) and value.keys() == kinds.keys() and all(fits(value[n], kinds[n]) for n in kinds)
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 62
    if kind is float:
        return type(value) is float and value == value or fits(value, int)  # NaN is none
    if kind is list:
        return fits(value, [str])
    return isinstance(value, kind) and (kind is not dict or all(type(name) is str for name in value))
