"""Checkpoints of the source systems: which system a file is of, and a reader that runs none of a file's code."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from common.errors import CheckpointError

# What a system is known by: the beginning of a name that all of its weights have among them.
SYSTEMS = {"apelr": "token_emb.weight", "state": "pert_encoder."}

# ------------------------------------------------------------------------------------------------------------ dispatch


def system_of(path: Path) -> str:
    """apelr (APEL-R) or state (arc-state, SmolState): whose checkpoint a file is; "" where it is of neither."""
    try:
        names = [name for name in weights_of(read(path)) if isinstance(name, str)]
    except CheckpointError:
        return ""
    for system, beginning in SYSTEMS.items():
        if any(plain_name(name).startswith(beginning) for name in names):
            return system
    return ""


def importable(path: Path) -> str:
    """The system of a foreign checkpoint. Raises CheckpointError for a file that is ours already, or of no system."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    stem = checkpoint.experiment_of(path)
    if stem:
        raise CheckpointError(f"{path} is a checkpoint of {stem}.py already: nothing to import")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name the checkpoint in it, a .pt or .ckpt file")
    read(path)  # tells what is wrong with it where it cannot be read
    system = system_of(path)
    if not system:
        raise CheckpointError(f"{path} is no checkpoint of APEL-R, arc-state or SmolState: it has neither weights "
                              f"{SYSTEMS['apelr']} nor {SYSTEMS['state']}*")
    return system


def weights_of(contents: dict) -> dict:
    """The weights among what a checkpoint holds; a bare state dict is all weights."""
    for key in ("model_state_dict", "state_dict"):
        if isinstance(contents.get(key), dict):
            return contents[key]
    return contents


def plain_name(name: str) -> str:
    """A weight's name without what torch.compile and DistributedDataParallel put in front."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


# -------------------------------------------------------------------------------------------------------------- reader


class Inert(dict):
    """Takes the place of a class or function that a checkpoint names: it holds what it is given, and does nothing."""

    kind: type | None = None  # what torch's reader, which fills these only, must see instead: OrderedDict, list

    def __init__(self, *arguments, **named):
        super().__init__()

    def __setstate__(self, state) -> None:
        self.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key, value) -> None:
        type(self).kind = OrderedDict

    def append(self, item) -> None:
        type(self).kind = list

    extend = append


class Structure(pickle.Unpickler):
    """Reads a pickle without calling anything that it names, to learn which names stand for dicts and for lists."""

    def __init__(self, file):
        super().__init__(file)
        self.found: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str):
        return self.found.setdefault(f"{module}.{name}", type(name, (Inert,), {}))

    def persistent_load(self, tensor) -> None:
        return None


def stand_ins(path: Path) -> list[tuple]:
    """(what to use, name) for all that a checkpoint names beyond what torch's safe reader knows: nothing of it runs."""
    number = np.float64(0).__reduce__()[0]  # makes a numpy scalar of a dtype and bytes
    known = {"numpy.dtype": np.dtype, "numpy.core.multiarray.scalar": number, "numpy._core.multiarray.scalar": number}
    with zipfile.ZipFile(path) as archive:
        content = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(content) as file:
            structure = Structure(file)
            structure.load()
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [type(np.dtype(kind)) for kind in np.typecodes["All"]] + [
        (known.get(name) or structure.found[name].kind or Inert, name) for name in names]


def read(path: Path) -> dict:
    """What a checkpoint holds, on the CPU. Raises CheckpointError where it cannot be read."""
    try:
        with torch.serialization.safe_globals(stand_ins(path) if zipfile.is_zipfile(path) else []):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises a dozen kinds for torn files; each means the same here
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(e).__name__})") from e
    return contents if isinstance(contents, dict) else {}
