"""What a checkpoint may hold: plain values and tensors. Their digest, and whether they are of the kinds that are read.

torch.load notices neither a flipped bit nor a value of another kind; what goes on from one would be silently wrong.
"""

import hashlib
import math
import struct
from collections import OrderedDict

import numpy as np
import torch

MOST_REPEATED = 1_000_000  # values: lists that hold each other can stand for more than there is time for
REPEATED_BYTES = 1 << 24  # and a tensor can repeat a few stored numbers, which is no use beyond this
NUMBERS = (int, float)


def digest(value: object, hashes: bool = True) -> str:
    """sha256 of plain values and tensors: of their kinds, order, shapes and every bit; "" with hashes=False.

    Equal for equal numbers, in whatever layout and on whatever device a tensor is; no memory is copied where it is
    contiguous. Raises ValueError for what a checkpoint cannot hold, and what says more than is stored.
    """
    hashed = hashlib.sha256()
    seen: set[int] = set()
    repeated = 0

    def add(piece: str | bytes | np.ndarray) -> None:
        if hashes:
            hashed.update(piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece)

    def walk(value: object, where: str) -> None:
        """Depth first; each kind begins with its name and size, so that no two values are alike."""
        nonlocal repeated
        kind = type(value)
        if kind in (dict, OrderedDict, list, tuple, torch.Size):
            repeated += len(value) if id(value) in seen else 0
            seen.add(id(value))
            if repeated > MOST_REPEATED:
                raise ValueError("it holds more values than its size allows")
            add(f"{'list' if kind is list else 'tuple' if issubclass(kind, tuple) else 'dict'} {len(value)};")
        if kind in (torch.Tensor, torch.nn.Parameter):
            tensor = _numbers(value.detach(), where)
            add(f"{value.dtype} {list(value.shape)};")
            add(tensor)
        elif kind in (dict, OrderedDict):
            for name, part in value.items():
                walk(name, where)
                walk(part, f"{where}.{name}" if where else str(name))
            if kind is OrderedDict and vars(value):  # the versions of modules, in a state_dict of torch
                walk(vars(value), where)
        elif kind in (list, tuple, torch.Size):
            for part in value:
                walk(part, where)
        elif kind is float:
            add(b"float " + struct.pack("<d", value))  # which tells -0.0 from 0.0, and one NaN from another
        elif kind in (str, bytes):
            add(f"{kind.__name__} {len(value)};")
            add(value)
        elif value is None or kind in (bool, int):
            add(f"{value};")
        else:
            raise ValueError(f"{where or 'it'} is a {kind.__module__}.{kind.__name__}, which is no plain value")

    walk(value, "")
    return hashed.hexdigest() if hashes else ""


def _numbers(tensor: torch.Tensor, where: str) -> np.ndarray:
    """The bytes of a tensor, row after row."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ValueError(f"{where} is a tensor of another kind than numbers in rows")
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), REPEATED_BYTES):
        raise ValueError(f"{where} says {list(tensor.shape)}, more numbers than are stored")
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def objection(state: dict) -> str:
    """What of the values of a checkpoint is of another kind than common/checkpoint.py writes; "" for none of it."""
    wrong = []
    for name, fits in (
        ("format_version", is_count(state["format_version"]) and state["format_version"] > 0),
        ("experiment", type(state["experiment"]) is str),
        ("config", _is_dict(state["config"], str)),
        ("step", is_count(state["step"])),
        ("best", type(state["best"]) in NUMBERS and not math.isnan(state["best"])),
        ("model", _is_dict(state["model"], str, torch.Tensor)),
        ("optimizer", state["optimizer"] == {} or _is_optimizer(state["optimizer"])),
        ("scaler", _is_dict(state["scaler"], str, NUMBERS)),
        ("ranks", type(state["ranks"]) is list and all(map(_is_rank, state["ranks"]))),
        ("meter", "meter" not in state or _is_meter(state["meter"])),
        ("extra", _is_dict(state["extra"], str)),
    ):
        wrong += [] if fits else [name]
    if not wrong:
        extra = state["extra"]
        wrong += [] if _is_dict(extra.get("data", {}), str, str) else ["extra.data"]
        wrong += [] if type(extra.get("ended", False)) is bool else ["extra.ended"]
    return ", ".join(wrong)


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_dict(value: object, keys: type, values: type | tuple = object) -> bool:
    """A dict of such keys and values; what modules of torch add to a state_dict of theirs may be anything plain."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(key, keys) and (isinstance(part, values) or str(key).endswith("_extra_state"))
               for key, part in value.items())


def _is_optimizer(value: object) -> bool:
    if not isinstance(value, dict) or not _is_dict(value.get("state"), int, dict):
        return False
    groups = value.get("param_groups")
    return type(groups) is list and all(_is_dict(group, str) and type(group.get("params")) is list for group in groups)


def _is_rank(value: object) -> bool:
    """Whether these are random numbers as _random_state has them, perhaps with more."""
    if not _is_dict(value, str) or not {"torch_rng", "cuda_rng", "numpy_rng"} <= value.keys():
        return False
    numpy, cuda = value["numpy_rng"], value["cuda_rng"]
    return (_is_vector(value["torch_rng"], torch.uint8) and (cuda is None or _is_vector(cuda, torch.uint8))
            and _is_dict(numpy, str) and numpy.keys() == {"keys", "pos", "gauss", "cached"}
            and _is_vector(numpy["keys"], torch.int64) and len(numpy["keys"]) == 624
            and is_count(numpy["pos"]) and numpy["pos"] <= 624 and numpy["gauss"] in (0, 1)
            and type(numpy["cached"]) is float)


def _is_meter(value: object) -> bool:
    if not _is_dict(value, str) or value.keys() != {"seconds", "units", "since", "elapsed"}:
        return False
    times, since = [value["seconds"], value["elapsed"]], value["since"]
    columns = list(since.values()) if _is_dict(since, str, torch.Tensor) else [None]
    return (all(type(seconds) in NUMBERS and 0 <= seconds < math.inf for seconds in times) and is_count(value["units"])
            and all(_is_vector(column) and len(column) == len(columns[0]) for column in columns))


def _is_vector(value: object, dtype: torch.dtype | None = None) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 1 and value.dtype == (dtype or value.dtype)


def unlike(value: object, example: object, where: str) -> str:
    """Where a value is not of the kind of an example: its names, types, and of tensors the shape; "" if it is.

    None stands for a number that is not known yet.
    """
    if isinstance(example, dict):
        if not isinstance(value, dict) or value.keys() != example.keys():
            return where
        return next((wrong for name in example if (wrong := unlike(value[name], example[name], f"{where}.{name}"))), "")
    if isinstance(example, torch.Tensor):
        alike = isinstance(value, torch.Tensor) and value.shape == example.shape and value.is_floating_point()
    elif example is None:
        alike = value is None or type(value) in NUMBERS
    else:
        alike = type(value) is type(example) or type(value) in NUMBERS and type(example) in NUMBERS
    return "" if alike else where
