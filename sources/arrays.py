"""Arrays of numpy's files by anybody: nothing in them is executed, and no more memory is asked for than they hold."""

import zipfile
from pathlib import Path

import numpy as np

from common.errors import DataError, reason, regular_file

MOST_BYTES = 1 << 30  # of an array in an .npz, unpacked: a stored byte can stand for a thousand


def open_npy(path: str | Path) -> np.ndarray:
    """The array of an .npy file, as a memory map. Raises DataError for a file that is missing, damaged or pickled."""
    path = regular_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a header is a literal of Python's, and raises whatever its parser raises
        raise DataError(f"{path} is damaged, or no .npy file of plain numbers ({reason(error)})") from error
    surplus = path.stat().st_size - array.offset - array.nbytes
    if surplus:
        raise DataError(f"{path} has {surplus:,} bytes more than its array {array.shape}: copy or make it again")
    return array


def read_array(path: str | Path, name: str) -> np.ndarray:
    """The array of an .npy file; of an .npz file the one of this name, or its only one, held against its checksum.

    Raises DataError for a file that is missing, damaged, pickled or lacks it, and for more than 1 GB in an .npz.
    """
    path = regular_file(path)
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"PK"
    if not is_packed:
        return np.array(open_npy(path))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if name not in arrays.files and len(arrays.files) == 1:
                name = arrays.files[0]
            if name not in arrays.files:
                held = ", ".join(arrays.files[:8]) or "none"
                raise DataError(f"{path} has no array called {name!r}, and not one alone; it holds: {held}")
            size = size_of(arrays.zip, name)
            if size > MOST_BYTES:
                raise DataError(f"{path}: {name} unpacks to {size / 1e9:.1f} GB, and more than "
                                f"{MOST_BYTES / 1e9:.1f} GB are not read")
            return arrays[name]
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds
        raise DataError(f"{path} is damaged, or no .npz file of plain numbers ({reason(error)})") from error


def size_of(packed: zipfile.ZipFile, name: str) -> int:
    """Bytes of an array once it is unpacked; 0 where there is none of that name."""
    return sum(member.file_size for member in packed.infolist() if member.filename in (name, f"{name}.npy"))
