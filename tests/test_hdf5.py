"""HDF5 files that are damaged, or made to read what is not theirs: one sentence each, and soft links work."""

import os

import h5py
import numpy as np
import pytest
from h5py import h5t

from common.errors import DataError
from sources import hdf5

SECRET = np.arange(100, 105, dtype=np.float32)


def odd_type(file: h5py.File, name: str, kind) -> None:
    node = h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple((5,)))
    node.write(h5py.h5s.ALL, h5py.h5s.ALL, np.zeros(5, np.uint32), kind)


def other_bias():
    kind = h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)  # as one flipped bit of the type would have it
    return kind


def virtual(file: h5py.File, name: str, source: str, dataset: str) -> None:
    layout = h5py.VirtualLayout((5,), np.float32)
    layout[:] = h5py.VirtualSource(source, dataset, (5,))
    file.create_virtual_dataset(name, layout)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["values"] = SECRET
    SECRET.tofile(tmp_path / "secret.bin")
    with h5py.File(path, "w") as file:
        file["inner/values"] = np.arange(5, dtype=np.float32)
        file["big_endian"] = np.arange(5, dtype=">f4")
        file["flags"] = np.array([True, False])
        file["soft"] = h5py.SoftLink("/inner/values")
        file["inner/up"] = h5py.SoftLink("./values")
        file["group"] = h5py.SoftLink("inner")
        file["dead"] = h5py.SoftLink("/inner/nothing")
        file["circle"] = h5py.SoftLink("/circle")
        file["outside"] = h5py.ExternalLink("secret.h5", "/values")
        file["root of another"] = h5py.ExternalLink("secret.h5", "/")
        file["around"] = h5py.SoftLink("/root of another/values")
        file.create_dataset("elsewhere", (5,), np.float32, external=[(str(tmp_path / "secret.bin"), 0, 20)])
        virtual(file, "virtual outside", "secret.h5", "values")
        virtual(file, "virtual inside", ".", "inner/values")
        virtual(file, "virtual around", ".", "outside")
        virtual(file, "virtual elsewhere", ".", "elsewhere")
        virtual(file, "virtual itself", ".", "virtual itself")
        file.create_dataset("huge", (10**12,), np.float32, chunks=(1000,))
        file["null"] = h5py.Empty("f4")
        file["scalar"] = 3.0
        file["words"] = ["a", "b"]
        file["complex"] = np.zeros(3, complex)
        file.create_dataset("references", (3,), h5py.ref_dtype, data=np.array([file.ref] * 3, h5py.ref_dtype))
        file.create_dataset("ragged", (3,), h5py.vlen_dtype(np.int32))[...] = [[1], [2], [3]]
        file["opaque"] = np.zeros(3, "V5")
        file.create_dataset("nothing written", (3,), np.float32)
        file.create_dataset("holes", (9,), np.float32, chunks=(3,))[:6] = 1
        file["type"] = np.dtype("f4")
        odd_type(file, "bits", h5t.STD_B32LE)
        odd_type(file, "other bias", other_bias())
        file.attrs["empty"] = h5py.Empty("f4")
        file.attrs["number"] = 3
    return path


@pytest.mark.parametrize("name", ["inner/values", "/inner/values", "soft", "group/values", "group/up", "inner/up",
                                  "big_endian", "virtual inside"])
def test_members_are_read_also_through_soft_links_inside_the_file(path, name):
    with hdf5.open_hdf5(path) as file:
        assert hdf5.has(file, name)
        values = hdf5.read(hdf5.numbers(file, name))
    assert values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("name", "told"), [
    ("nothing", "nothing is not there"),
    ("inner/values/deeper", "deeper is not there"),
    ("dead", "dead is not there; "),
    ("circle", "a soft link that leads back to itself"),
    ("outside", "a link to another file, secret.h5"),
    ("around", "a link to another file, secret.h5"),
    ("elsewhere", "is stored in another file"),
    ("virtual outside", "a virtual data set of another file, secret.h5"),
    ("virtual around", "a link to another file, secret.h5"),
    ("virtual elsewhere", "which is no plain data set"),
    ("virtual itself", "which is no plain data set"),
    ("huge", "claims 4,000.0 GB, shape (1000000000000,), where the file stores 0 bytes"),
    ("null", "holds nothing"),
    ("nothing written", "not all of its values are stored"),
    ("holes", "not all of its values are stored"),
    ("scalar", "has shape (), not 1 dimension"),
    ("words", "not numbers"),
    ("complex", "not numbers"),
    ("references", "not numbers"),
    ("ragged", "not numbers"),
    ("opaque", "not numbers"),
    ("bits", "numbers of an unknown layout"),
    ("other bias", "numbers of an unknown layout"),
    ("type", "should be a data set, not a type"),
    ("inner", "should be a data set, not a group"),
])
def test_what_cannot_be_numbers_of_this_file_is_refused(path, name, told):
    with hdf5.open_hdf5(path) as file, pytest.raises(DataError) as error:
        hdf5.read(hdf5.numbers(file, name))
    assert told in str(error.value)
    assert str(path) in str(error.value)


def test_flags_and_attributes(path):
    with hdf5.open_hdf5(path) as file:
        assert hdf5.read(hdf5.numbers(file, "flags")).tolist() == [True, False]
        assert hdf5.attribute(file, "number") == 3
        assert hdf5.attribute(file, "missing", "default") == "default"
        with pytest.raises(DataError, match="attribute 'empty', holds nothing"):
            hdf5.attribute(file, "empty")


def test_more_than_the_memory_of_the_machine_is_not_asked_for(path, monkeypatch):
    monkeypatch.setattr(hdf5, "machine_memory", lambda: 12)
    with hdf5.open_hdf5(path) as file:
        values = hdf5.numbers(file, "inner/values")
        assert hdf5.read(values, slice(1, 4)).tolist() == [1, 2, 3]
        with pytest.raises(DataError, match="more than the memory"):
            hdf5.read(values)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "empty", "text", "missing", "nul", "long"])
def test_what_is_no_hdf5_file_is_told_at_once(tmp_path, kind):
    path = {"device": "/dev/zero", "nul": "a\0b", "long": "x" * 5000}.get(kind, tmp_path / "a.h5")
    if kind == "pipe":
        os.mkfifo(path)  # to open it is to wait for ever
    elif kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "words")
    told = {"pipe": "is a pipe", "folder": "is a folder", "device": "is a device", "empty": "is empty",
            "text": "no HDF5 file", "missing": "no such file", "nul": "no name of a file", "long": "too long"}[kind]
    with pytest.raises(DataError, match=told):
        hdf5.open_hdf5(path)


@pytest.mark.parametrize("damage", ["leads elsewhere", "not unpacked"])
@pytest.mark.usefixtures("hdf5_on_trial")
def test_pieces_that_cannot_be_those_of_their_data_set_are_refused(tmp_path, damage):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["first"] = np.arange(100.0)
        file["second"] = np.arange(100.0) + 1000
        values = np.r_[np.sqrt(np.arange(60)), np.zeros(40)]
        file.create_dataset("packed", data=values, chunks=(100,), compression="gzip", shuffle=True)
        offsets = {name: file[name].id.get_offset() for name in ("first", "second")}
        piece = file["packed"].id.get_chunk_info(0)
    data = path.read_bytes()
    if damage == "leads elsewhere":
        data = data.replace(offsets["second"].to_bytes(8, "little"), (offsets["first"] + 8).to_bytes(8, "little"))
        told = "/second has bytes of another"
    else:  # as of a piece that gzip did not make smaller: its packed bytes would be read as values
        size = piece.size.to_bytes(4, "little")
        assert data.count(size + bytes(4)) == 1
        data = data.replace(size + bytes(4), size + b"\2" + bytes(3))  # of the second, gzip
        told = f"packed .OSError: {piece.size} bytes are marked as a piece of 800"
    path.write_bytes(data)
    with pytest.raises(DataError, match=told):
        hdf5.open_hdf5(path)


@pytest.mark.parametrize("damage", ["no end", "a size beyond memory"])
@pytest.mark.usefixtures("hdf5_on_trial")
def test_a_damaged_heap_of_texts_ends_with_a_sentence(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(hdf5, "STEP_SECONDS", 1)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("words", data=["abcdefgh"] * 5, dtype=h5py.string_dtype())
        offset = file["words"].id.get_offset()
    data = bytearray(path.read_bytes())
    if damage == "no end":  # objects of no size, of which HDF5 seeks the last
        heap = data.index(b"GCOL")
        data[heap + 16 : heap + 400] = bytes(384)
    else:  # the length and the heap of the first text
        data[offset : offset + 12] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.h5 is damaged in words"):
        hdf5.open_hdf5(path)


def test_text_that_is_not_utf_8_is_refused():
    assert hdf5.as_text("\u00b5g".encode(), "x") == hdf5.as_text("\u00b5g", "x") == "\u00b5g"
    with pytest.raises(DataError, match="not UTF-8"):
        hdf5.as_text("\u00b5g".encode("latin-1"), "x")
    with pytest.raises(DataError, match="not UTF-8"):
        hdf5.as_text("a\udcb5", "x")


def test_a_piece_that_unpacks_to_more_than_its_bytes_can_hold_is_refused_before_it_is_read(tmp_path):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        node = file.create_dataset("x", (10,), "f4", chunks=(1 << 26,), maxshape=(None,), compression="gzip")
        node.id.write_direct_chunk((0,), b"a few bytes")
    told = "x has chunks of 0.3 GB, where .* 11 bytes"
    with hdf5.open_hdf5(tmp_path / "bomb.h5") as file, pytest.raises(DataError, match=told):
        hdf5.member(file, "x")
