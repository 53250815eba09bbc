"""HDF5 files of anybody: opened and read so that whatever is wrong with one is a sentence, and no other file is read.

A file of HDF5 may name others, whose bytes would be read as its own: by external links, by external storage and by
virtual data sets. All three are refused. Soft links are followed inside the file, one step at a time. Sizes are held
against what the file stores before memory is asked for, and types against what is expected: h5py converts numbers of
any layout to the nearest of numpy, so that one flipped bit of a type would change every value without a word.

Texts of any length lie in heaps, and HDF5 trusts these: of 3,500 small files with one damage each, 37 kept it in a loop
that nothing can interrupt, and two ended the process. So a process of its own reads the texts first.
"""

import contextlib
import faulthandler
import itertools
import math
import mmap
import os
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from h5py import h5t

from common.errors import DataError, machine_memory, reason, regular_file

DAMAGE = (  # what h5py raises of bytes that are not as they should be; UnicodeDecodeError is a ValueError
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    SystemError,
)
MOST_LINKS = 16  # soft links on the way to one member, as HDF5 itself follows: more are a circle
SMALL = 1 << 26  # bytes of a data set that need not be stored: it may be all fill values
MOST_PACKED = 2_000  # bytes that a stored byte can stand for; gzip comes to 1,032
NOT_PACKING = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
NUMBERS = "iufb"  # kinds of numpy that are numbers
STEP_SECONDS = 2  # of the processor, for an attribute or some thousand texts: thousands of times what they take
STEP_TEXTS = 10_000
WHOLE: set[tuple] = set()  # what tells versions of files apart, of those whose texts have been read
KINDS = {h5py.Dataset: "data set", h5py.Group: "group", h5py.Datatype: "type"}


def where(node, name: str = "") -> str:
    """A member as messages name it."""
    try:
        place = "/".join((node.name or "", name)).strip("/")
        return f"{node.file.filename}: {place or 'its root'}"
    except DAMAGE:  # so damaged that it has no name
        return name or "a member"


@contextlib.contextmanager
def guard(what: str) -> Iterator[None]:
    """What h5py says of bytes that are not as they should be, as a DataError; what: of which file and member."""
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(
            f"{what} cannot be read ({reason(error)}): the file is damaged or of an unknown layout"
        ) from error


def open_hdf5(path: str | Path) -> h5py.File:
    """An HDF5 file to read. Raises DataError for what is missing, no file, no HDF5, cut short, damaged or locked."""
    path = regular_file(path)
    try:
        file = h5py.File(path, "r")
    except BlockingIOError as error:
        raise DataError(f"{path} is being written by another process: wait for it") from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read ({error.strerror.split('(')[0].strip()}): see its permissions"
                        ) from error
    except DAMAGE as error:
        raise DataError(f"{path}: cut short, damaged or no HDF5 file: copy or make it again") from error
    try:
        probe(file, path)
    except BaseException:
        file.close()
        raise
    return file


def probe(file: h5py.File, path: Path) -> None:
    """Read the attributes and texts of a file in a process of its own, as a trial: once, as long as it stays as it is.

    Raises DataError if that process fails.
    """
    facts = os.stat(path)
    version = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if version in WHOLE:
        return
    progress = mmap.mmap(-1, mmap.PAGESIZE)  # shared: the member that is read
    with warnings.catch_warnings():  # of threads, which the child has not: it reads the file, and ends
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        faulthandler.disable()  # nobody needs to know where in HDF5 it crashed
        try:
            limit_memory(path)
            read_texts(file, progress)
            os._exit(0)
        except BaseException as error:
            place = progress[:].rstrip(b"\0") + f" ({reason(error)})".encode("utf-8", "replace")
            progress[:] = place[: len(progress)].ljust(len(progress), b"\0")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        place = progress[:].rstrip(b"\0").decode("utf-8", "replace")
        how = ", where HDF5 crashes or finds no end" if os.WIFSIGNALED(status) else ""
        raise DataError(f"{path} is damaged in {place}{how}: copy or make the file again")
    WHOLE.add(version)


def limit_memory(path: Path) -> None:
    """Texts are in a file as they are: they cannot take many times its size, whatever lengths it claims."""
    with contextlib.suppress(OSError):  # of systems that do not tell what a process has
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * mmap.PAGESIZE + (1 << 30) + 4 * path.stat().st_size
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (at_most(limit, hard), hard))


def at_most(limit: int, hard: int) -> int:
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def allow_seconds() -> None:
    """From now on, the kernel ends this process after some seconds of computing; a slow disk does not count."""
    limit = int(time.process_time()) + STEP_SECONDS
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (at_most(limit, hard), hard))


def read_texts(file: h5py.File, progress: mmap.mmap) -> None:
    """Read every attribute, and every data set of texts of any length; raises what HDF5 says of one it cannot read.

    Two members that share bytes are told, too: one of them leads elsewhere. What else is wrong with a member is no
    matter here: who needs it will be told.
    """
    extents = []
    nodes = [file["/"]]
    places = set()  # in the file: a group may have several names, or hold itself
    while nodes:
        node = nodes.pop()
        place = h5py.h5o.get_info(node.id).addr
        if place in places:
            continue
        places.add(place)
        name = ((node.name or "").strip("/") or "its root").encode("utf-8", "replace")[: len(progress)]
        progress[:] = name.ljust(len(progress), b"\0")
        for attribute_name in node.attrs:
            allow_seconds()
            with contextlib.suppress(TypeError, ValueError):  # types that numpy has not
                node.attrs[attribute_name]
        if isinstance(node, h5py.Group):
            nodes += hard_linked(node)
            continue
        if isinstance(node, h5py.Dataset):
            extents += extents_of(node)
        if has_texts(node):
            for start in range(0, len(node), STEP_TEXTS):
                allow_seconds()
                node[start : start + STEP_TEXTS]
    for (begin, size, _), (following, _, name) in itertools.pairwise(sorted(extents)):
        if begin + size > following:
            raise OSError(f"{name} has bytes of another, at {following}")


def extents_of(node: h5py.Dataset) -> list[tuple[int, int, str]]:
    """(begin in the file, bytes, name) of the pieces of a data set.

    Raises OSError for a piece that is not packed as the others are.
    """
    if node.external or node.is_virtual or not node.size:
        return []
    if node.chunks is None:
        begin = node.id.get_offset()
        return [(begin, node.id.get_storage_size(), node.name)] if begin else []
    pieces = []

    def keep(piece) -> None:
        if len(pieces) % STEP_TEXTS == 0:
            allow_seconds()
        pieces.append(piece)

    node.id.chunk_iter(keep)
    unpacked = math.prod(node.chunks) * node.id.get_type().get_size()
    packing = sum(1 << i for i, code in enumerate(filters_of(node)) if code not in NOT_PACKING)
    for piece in pieces:
        # Only what does not get smaller is stored as it is; else the mark says that packed bytes are values.
        if piece.filter_mask & packing == packing and piece.size < unpacked:
            raise OSError(f"{piece.size} bytes are marked as a piece of {unpacked}")
    return [(piece.byte_offset, piece.size, node.name) for piece in pieces]


def hard_linked(group: h5py.Group) -> list:
    """The members of a group that are here, and not behind a link."""
    nodes = []
    for name in group:
        with contextlib.suppress(*DAMAGE):
            if isinstance(group.get(name, getlink=True), h5py.HardLink):
                nodes.append(group[name])
    return nodes


def has_texts(node: h5py.Dataset | h5py.Datatype) -> bool:
    """Whether it is a data set of things of any length, which is here and packed in a way that is known here."""
    with contextlib.suppress(*DAMAGE):
        is_here = not node.external and not node.is_virtual
        is_known = all(map(h5py.h5z.filter_avail, filters_of(node)))
        return bool(node.shape) and node.dtype.hasobject and is_here and is_known
    return False


def filters_of(node: h5py.Dataset) -> list[int]:
    """The codes of what the pieces of a data set are packed with, in the order of packing."""
    settings = node.id.get_create_plist()
    return [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]


# ---------------------------------------------------------------------------------------------------------------
# Members
# ---------------------------------------------------------------------------------------------------------------
def names(group: h5py.Group) -> list[str]:
    """Names of a group's members, those of dead links too."""
    with guard(where(group)):
        return list(group)


def has(group: h5py.Group, name: str) -> bool:
    """Whether there is a member of that name; one that cannot be read is there, and `member` says what is wrong."""
    node = group
    steps = [step for step in name.split("/") if step]
    for i, step in enumerate(steps):
        if not isinstance(node, h5py.Group):
            return False
        with guard(where(node, step)):
            if node.get(step, getlink=True) is None:
                return False
        if i < len(steps) - 1:
            node = member(node, step)
    return True


def member(group: h5py.Group, name: str, kind: type | None = None) -> h5py.Dataset | h5py.Group:
    """A data set or group by its name, or path, in a group; every link on the way is looked at before it is followed.

    kind: h5py.Dataset or h5py.Group. Raises DataError for what is not there, of another kind, in another file, behind
    a dead link, damaged, or larger than what is stored can be.
    """
    node = follow(group, name)
    wanted = KINDS.get(kind, "data set or group")
    if not isinstance(node, kind or (h5py.Dataset, h5py.Group)):
        raise DataError(f"{where(group, name)} should be a {wanted}, not a {KINDS.get(type(node), 'thing unknown')}")
    if isinstance(node, h5py.Dataset):
        check_dataset(node)
    return node


def follow(group: h5py.Group, name: str) -> h5py.Dataset | h5py.Group | h5py.Datatype:
    """What is at the end of a path, without leaving the file."""
    what = where(group, name)
    with guard(what):
        node = group.file["/"] if name.startswith("/") else group
        steps = name.split("/")[::-1]
        links = 0
        while steps:
            step = steps.pop()
            if step in ("", "."):
                continue
            link = node.get(step, getlink=True) if isinstance(node, h5py.Group) else None
            if link is None:
                on_the_way = f"; {where(node)} has no {step!r}" if steps or links else ""
                raise DataError(f"{what} is not there{on_the_way}")
            if isinstance(link, h5py.ExternalLink):
                raise DataError(f"{what} is a link to another file, {link.filename}, which is not followed: copy the "
                                "data into one file")
            if isinstance(link, h5py.HardLink):
                node = node[step]
                continue
            links += 1
            if links > MOST_LINKS:
                raise DataError(f"{what} is a soft link that leads back to itself: the file is damaged")
            if link.path.startswith("/"):
                node = node.file["/"]
            steps += link.path.split("/")[::-1]
        return node


def check_below(group: h5py.Group, name: str) -> None:
    """Raise DataError unless a member, and all that is in it, is of this file: HDF5 would copy links to others."""
    nodes = [member(group, name)]
    places = set()
    while nodes:
        node = nodes.pop()
        with guard(where(node)):
            place = h5py.h5o.get_info(node.id).addr
        if isinstance(node, h5py.Group) and place not in places:
            nodes += [member(node, inner) for inner in names(node)]
        places.add(place)


def check_dataset(node: h5py.Dataset) -> None:
    """Raise DataError for a data set of other files, or of more values than the file can hold. Nothing is read."""
    what = where(node)
    with guard(what):
        if node.external:
            raise DataError(f"{what} is stored in another file, {node.external[0][0]}, which is not read: copy the "
                            "data into one file")
        if node.is_virtual:
            check_sources(node)
            return
        size = 0 if node.shape is None else math.prod(node.shape) * node.dtype.itemsize
        stored = node.id.get_storage_size()
        if size > SMALL and size > MOST_PACKED * stored:
            raise DataError(f"{what} claims {size / 1e9:,.1f} GB, shape {node.shape}, where the file stores {stored:,} "
                            "bytes of it: it is damaged, or made to fill the memory")
        if size and not is_stored(node):
            raise DataError(f"{what} claims shape {node.shape}, but not all of its values are stored: zeros would be "
                            "read in their place")
        piece = math.prod(node.chunks or ()) * node.dtype.itemsize  # unpacked as a whole
        if piece > max(SMALL, MOST_PACKED * stored):
            raise DataError(f"{what} has chunks of {piece / 1e9:,.1f} GB, where the file stores {stored:,} bytes")


def is_stored(node: h5py.Dataset) -> bool:
    """Whether all pieces of a data set are in the file."""
    if node.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS:
        return node.id.get_offset() is not None
    if node.chunks is None:  # within the header of the data set
        return True
    pieces = math.prod(-(-length // piece) for length, piece in zip(node.shape, node.chunks, strict=True))
    return node.id.get_num_chunks() >= pieces


def check_sources(node: h5py.Dataset) -> None:
    """Raise DataError for a virtual data set of anything but plain data sets of its own file.

    HDF5 reads zeros in the place of a source that is gone, without a word.
    """
    what = where(node)
    for file_name, name in {(source.file_name, source.dset_name) for source in node.virtual_sources()}:
        if file_name != ".":
            raise DataError(f"{what} is a virtual data set of another file, {file_name}, which is not read: copy the "
                            "data into one file")
        source = follow(node.file, name)
        if not isinstance(source, h5py.Dataset) or source.is_virtual or source.external:
            raise DataError(f"{what} is a virtual data set of {name}, which is no plain data set: copy the data")
        check_dataset(source)


# ---------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------
def read(node: h5py.Dataset, selection=()) -> np.ndarray:
    """node[selection] as h5py gives it; selection: () for all, slices or anything that h5py takes.

    Raises DataError for a null space, for more than the machine's memory, and for what is damaged.
    """
    what = where(node)
    with guard(what):
        if node.shape is None:
            raise DataError(f"{what} holds nothing (its space is null)")
        size = node.dtype.itemsize
        parts = selection if isinstance(selection, tuple) else (selection,)
        for i, length in enumerate(node.shape):
            part = parts[i] if i < len(parts) else slice(None)
            size *= len(range(*part.indices(length))) if isinstance(part, slice) else np.size(part)
        if size > machine_memory():
            raise DataError(f"{what} takes {size / 1e9:,.1f} GB, more than the memory of this machine")
        return node[selection]


def check_numbers(node: h5py.Dataset, kinds: str = NUMBERS, ndim: int | None = None) -> None:
    """Raise DataError unless a data set holds numbers of these kinds (of numpy: iufb), in so many dimensions.

    Numbers of a layout that numpy has not, which h5py would convert, are refused, and so are bits and references.
    """
    what = where(node)
    with guard(what):
        shape = node.shape
        kind = node.id.get_type()
    if node.dtype.kind not in kinds:
        raise DataError(f"{what} holds {node.dtype} of shape {shape}, not {'whole ' if kinds in 'iu' else ''}numbers")
    if shape is None:
        raise DataError(f"{what} holds nothing (its space is null)")
    if ndim is not None and len(shape) != ndim:
        raise DataError(f"{what} has shape {shape}, not {ndim} dimension{'s' if ndim != 1 else ''}")
    check_layout(kind, node.dtype, what)


def check_layout(kind: h5t.TypeID, dtype: np.dtype, what: str) -> None:
    """Raise DataError unless a type of HDF5 is what numpy calls dtype, bit by bit, and not merely turned into it."""
    with guard(what):
        if kind.get_class() == h5t.ENUM and dtype.kind != "b":
            kind = kind.get_super()
        is_plain = kind.equal(h5t.py_create(dtype))
    if not is_plain:
        raise DataError(f"{what} holds numbers of an unknown layout, which would be read as {dtype}: the file is "
                        "damaged, or written by a system that should write plain ones")


def check_field(node: h5py.Dataset, name: str) -> None:
    """check_layout of a field of a compound data set, if it holds numbers; raises DataError, too, if it is not there.
    """
    what = where(node, name)
    with guard(what):
        dtype = node.dtype[name]
        kind = node.id.get_type()
        kind = kind.get_member_type(kind.get_member_index(name.encode()))
        if kind.get_class() == h5t.ARRAY:
            kind = kind.get_super()
    if dtype.base.kind in NUMBERS:
        check_layout(kind, dtype.base, what)


def referred(node: h5py.Dataset, reference: h5py.Reference) -> h5py.Dataset:
    """The data set of the same file that a reference, an attribute of `node`, means."""
    with guard(f"what {where(node)} refers to"):
        found = node.file[reference]
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{where(node)} refers to {where(found)}, which is no data set")
    check_dataset(found)
    return found


def numbers(group: h5py.Group, name: str, kinds: str = NUMBERS, ndim: int | None = 1) -> h5py.Dataset:
    """A data set of plain numbers: `member` with `check_numbers`."""
    node = member(group, name, h5py.Dataset)
    check_numbers(node, kinds, ndim)
    return node


def attribute(node: h5py.Dataset | h5py.Group, name: str, default=None):
    """An attribute as h5py gives it, or the default where there is none. Raises DataError for one that is damaged."""
    with guard(f"{where(node)}, attribute {name!r},"):
        if name not in node.attrs:
            return default
        value = node.attrs[name]
        if isinstance(value, h5py.Empty):
            raise DataError(f"{where(node)}, attribute {name!r}, holds nothing")
        return value


def as_text(value, what: str) -> str:
    """A value of HDF5 as text. Raises DataError for bytes that are not UTF-8; what: whose they are."""
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
        text.encode("utf-8")  # h5py hides bytes that are not UTF-8 in surrogates
        return text
    except UnicodeError:
        raise DataError(f"{what} has the text {value!r:.60}, which is not UTF-8: write it anew, or copy the file again"
                        ) from None
