"""Checkpoints of other systems: whose a file is, read without running anything that it names."""

import contextlib
import functools
import io
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from common import checkpoint, store
from common.errors import CheckpointError, InputError, reason
from common.plain import check_size

# What the checkpoints in the run folders of other systems are called, the first choice first.
NAMES = ("final.ckpt", "last.ckpt", "best.ckpt", "checkpoint.pt", "best_model.pt", "latest.pt")


class Inert(dict):
    """Takes the place of a class or function that a checkpoint names: it holds what it is given, and does nothing."""

    kind: type | None = None  # what torch's reader, which fills these only, must see instead: OrderedDict, list

    def __init__(self, *arguments, **named):
        super().__init__()

    def __setstate__(self, state) -> None:
        self.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key, value) -> None:
        type(self).kind = OrderedDict
        super().__setitem__(key, value)

    def __hash__(self) -> int:  # it may stand for a key, such as a text of numpy
        return id(self)

    def append(self, item) -> None:
        type(self).kind = list

    extend = append


class Structure(pickle.Unpickler):
    """Reads a pickle without calling anything that it names, to learn which names stand for dicts and for lists."""

    def __init__(self, file):
        super().__init__(file)
        self.named: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str):
        return self.named.setdefault(f"{module}.{name}", type(name, (Inert,), {}))

    def persistent_load(self, tensor) -> None:
        return None


def small(content: bytes) -> io.BytesIO:
    """A pickle to be read, which asks for no more memory than its own size suggests.

    Raises ValueError for a torn one, and for one that would have Python make a table of billions of places.
    """
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in ("PUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError("its pickle numbers more values than it has")
    return io.BytesIO(content)


def read_structure(path: Path) -> tuple[Structure, object]:
    """(the names in a checkpoint, its contents with None for every tensor): reads no tensor, and nothing of it runs."""
    checkpoint.check_archive(path, reads_all=False)
    with zipfile.ZipFile(path) as archive:
        content = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        structure = Structure(small(archive.read(content)))
        return structure, structure.load()


def scalar(dtype: np.dtype, content: bytes) -> np.generic:
    """A number of numpy as it pickles one; without its bytes numpy would make any size of zeros."""
    return np.float64(0).__reduce__()[0](dtype, content)


def stand_ins(path: Path) -> list[tuple]:
    """(what to use, name) for all that a checkpoint names beyond what torch's safe reader knows: nothing of it runs."""
    known = {"numpy.dtype": np.dtype, "numpy.core.multiarray.scalar": scalar, "numpy._core.multiarray.scalar": scalar}
    structure, _ = read_structure(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    dtypes = [type(np.dtype(kind)) for kind in np.typecodes["All"]]
    return dtypes + [(known.get(name) or structure.named[name].kind or Inert, name) for name in names]


def read_checkpoint(path: str | Path, mmap: bool = False) -> object:
    """What torch.save wrote, on the CPU: plain data and tensors as they are, anything else as an empty Inert.

    mmap: tensors are read when they are used.
    Raises CheckpointError if the file is missing or damaged, by the checksums in it too. No code of it runs.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        status = path.stat()
        verify(path.resolve(), status.st_size, status.st_mtime_ns)
        with torch.serialization.safe_globals(stand_ins(path)), warnings.catch_warnings(action="ignore"):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        check_sizes(contents)
    except Exception as error:  # torch raises a dozen kinds for torn files; each means the same here
        raise CheckpointError(f"{path} {checkpoint.damage(error)}") from error
    return contents


@functools.lru_cache(maxsize=16)
def verify(path: Path, size: int, changed: int) -> None:
    """Raise an error where the checksums of a file of this size and time are not those of its parts; once for each."""
    checkpoint.check_archive(path)


def check_sizes(contents: object) -> None:
    """Raise ValueError for a tensor that says more numbers than are stored, which would be made when it is used."""
    seen = set()
    left = [contents]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            check_size(value, "a tensor in it")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


@contextlib.contextmanager
def converting(path: object, system: str) -> Iterator[None]:
    """Around what makes ours of a checkpoint's contents, which may be anything: what fails there is a CheckpointError.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever values of other kinds and shapes make Python and torch raise
        raise CheckpointError(f"{path} is no whole checkpoint of {system} ({reason(error)})") from error


def source_file(path: Path) -> Path | None:
    """The checkpoint of another system that a file or a run folder of it stands for; None: it is ours, or no such.

    Of a folder of arc-state or SmolState that is final.ckpt, which their own tools take too, last.ckpt, best.ckpt, or
    the newest of a step; of APEL-R checkpoint.pt, of ICL-non-ergodic-arxiv the best or latest, of Simplexity the last
    step.
    """
    if checkpoint.experiment_of(path) or (path / "last.pt").exists():  # a damaged one is ours, too
        return None
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        steps = sorted(folder.glob("step*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in (*(folder / name for name in NAMES), *steps):
            if file.is_file():
                return file
        by_step = [file for file in folder.glob("*/model.*") if file.parent.name.isdecimal()]
        if by_step:
            return max(by_step, key=lambda file: int(file.parent.name))
    return None


def checkpoint_in(path: str | Path) -> Path:
    """The checkpoint that a run folder of another system stands for; any other path as it is, of a URL what is fetched.
    """
    path = store.local(path)
    return source_file(path) or path


# What a system is known by: how the names of some of its weights begin.
SYSTEMS = {
    "apelr": ("token_emb.weight", "tok_emb.weight"),
    "arxiv": ("token_embeddings.weight",),
    "ghmm": ("blocks.0.attn.W_Q",),
    "state": ("pert_encoder.",),
}
NUMPY = b"\x93NUMPY"  # what an array in a file begins with


def is_equinox(path: str | Path) -> bool:
    """Whether a file holds arrays one after the other, as Equinox writes the leaves of a model (Simplexity's .eqx)."""
    path = Path(path)
    if path.suffix == ".npy" or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(NUMPY)) == NUMPY


def system_of(path: Path) -> str:
    """Whose checkpoint a file is: apelr (APEL-R), arxiv (ICL-non-ergodic-arxiv), ghmm (Simplexity) or state.

    "" where it is of none, or cannot be read: what is wrong with it, reading it tells. No tensor is read.
    """
    if is_equinox(path):
        return "ghmm"
    try:
        _, contents = read_structure(path)
    except Exception:  # pickle raises a dozen kinds for torn files; each means the same here
        return ""
    if not isinstance(contents, dict):
        return ""
    for key in ("model_state_dict", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
    for name in contents:
        # What torch.compile and DistributedDataParallel put in front is no part of a name.
        plain = str(name).replace("_orig_mod.", "").removeprefix("module.").removeprefix("model.")
        for system, beginnings in SYSTEMS.items():
            if plain.startswith(beginnings):
                return system
    return ""


def importable(path: Path) -> str:
    """The system of a foreign checkpoint. Raises CheckpointError for a file that is ours already, or of no system."""
    if (path / "_METADATA").exists():
        raise CheckpointError(f"{path} is a checkpoint of Penzai (Orbax), whose networks are not built here")
    page = checkpoint.experiment_of(path)
    if page:
        raise CheckpointError(f"{path} is of {page}.py already, nothing to import: python sample.py {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder without a checkpoint of a known name: name the .pt or .ckpt file")
    if not is_equinox(path):
        read_checkpoint(path, mmap=True)  # which says what is wrong with a file that cannot be read
    system = system_of(path)
    if not system:
        known = ", ".join(f"{beginnings[0]}*" for beginnings in SYSTEMS.values())
        raise CheckpointError(f"{path} is no checkpoint of APEL-R, ICL-non-ergodic-arxiv, arc-state, SmolState "
                              f"or Simplexity: it has no weights {known}")
    return system
