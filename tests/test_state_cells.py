"""The prepared cells of train_state.py: made once, whole or not there, shared by ranks, and remade when need be."""

import fcntl
import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from commands import Job, refusal, wait_for
from scipy.sparse import csr_array

import prepare_data
from common.errors import DataError
from sources import cell_store, shared
from sources.cells import open_cells
from sources.h5ad import H5ad, write_h5ad

GENES = [f"g{i}" for i in range(6)]
KEYS = {"toml": "e.toml", "embed_key": None, "val_fraction": 0.0}


@pytest.fixture(autouse=True)
def here(in_a_folder_of_its_own):
    """Stand in an empty folder."""


def write_cells(path: str = "one.h5ad", seed: int = 0, n: int = 200, sparse: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    X = np.where(rng.random((n, 6)) < 0.4, rng.uniform(0.1, 14, (n, 6)), 0).astype(np.float32)
    obs = {"gene": rng.choice(["non-targeting", "p", "q"], n), "cell_type": rng.choice(["a", "b", "c"], n),
           "gem_group": rng.choice(["x", "y"], n)}
    write_h5ad(path, csr_array(X) if sparse else X, obs, GENES)
    return X


def write_toml(test: str = "c", path: str = "e.toml", files: str = "one.h5ad") -> None:
    Path(path).write_text(f'[datasets]\none = "{files}"\n[training]\none = "train"\n'
                          f'[zeroshot]\n"one.{test}" = "test"\n')


def stores() -> list[str]:
    return sorted(path.name for path in Path("data/cells").iterdir())


def test_who_waits_for_another_that_makes_the_cells_says_so(monkeypatch, capsys):
    target, waits, made, asked = Path("cells-0"), Path("cells-0.lock"), [], threading.Event()

    def ask(handle, how: int = fcntl.LOCK_EX) -> None:
        if how == fcntl.LOCK_EX:  # which waits: all is said
            asked.set()
        fcntl.flock(handle, how)

    monkeypatch.setattr(cell_store, "flock", ask)
    with open(waits, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        other = threading.Thread(target=cell_store.make_store, args=(target, made.append))
        other.start()
        assert asked.wait(60) and made == []
        told = capsys.readouterr().out
        assert "waiting for another process" in told and f"holds {waits}" in told
        target.mkdir()
    other.join(60)
    assert not other.is_alive() and made == []


def test_a_folder_is_made_once_and_said_to_be_then_mapped(capsys):
    X = write_cells()
    write_toml()
    first = open_cells(**KEYS)
    told = capsys.readouterr().out
    said = r"preparing 200 cells x 6 columns of X of e.toml \(1 file\), once: 0.00 GB in data/cells/e-\w+\n"
    assert re.fullmatch(said, told)
    before = {file: file.stat().st_mtime_ns for file in first.store.iterdir()}
    again = open_cells(**KEYS)
    assert stores() == [first.store.name] and capsys.readouterr().out == ""
    assert before == {file: file.stat().st_mtime_ns for file in again.store.iterdir()}
    for name in ("file", "row", "cell_type", "perturbation", "batch", "member", "is_control"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.dims() == again.dims() and first.maps() == again.maps()
    rows = np.random.default_rng(1).permutation(200)
    assert np.array_equal(first.read(rows), X[rows]) and np.array_equal(again.read(rows), X[rows])


def test_rows_lie_sorted_and_the_order_of_cells_is_that_of_the_files():
    write_cells("one.h5ad"), write_cells("two.h5ad", seed=1, sparse=True)
    write_toml(files="{one,two}.h5ad")
    cells = open_cells(**KEYS)
    assert np.array_equal(cells.row, np.tile(np.arange(200), 2)) and np.array_equal(cells.file, np.repeat([0, 1], 200))
    stored = np.argsort(cells.place)
    codes = np.stack([cells.file, cells.cell_type, cells.perturbation, cells.batch], 1)
    kinds = codes[stored].tolist()
    assert kinds == sorted(kinds) and np.array_equal(np.sort(cells.place), np.arange(400))
    for split in ("train", "test"):
        assert np.array_equal(cells.rows(split, True), np.sort(cells.rows(split, True)))


def test_it_is_made_anew_when_a_file_or_what_is_read_of_it_changes(capsys):
    write_cells()
    write_toml()
    seen = {open_cells(**KEYS).store}
    os.utime("one.h5ad", ns=(1, 1))
    seen.add(open_cells(**KEYS).store)
    X = write_cells(seed=3)
    changed = open_cells(**KEYS)
    assert np.array_equal(changed.read(np.arange(200)), X)
    seen.add(changed.store)
    for change in ({"batch_col": None}, {"counts": "log1p"}, {"pert_col": "cell_type", "control_pert": "a"}):
        if "pert_col" in change:
            write_toml("q")
            change |= {"cell_type_key": "gene"}
        seen.add(open_cells(**KEYS | change).store)
    write_cells("two.h5ad")
    write_toml(files="{one,two}.h5ad")
    seen.add(open_cells(**KEYS).store)
    assert len(seen) == 7 and capsys.readouterr().out.count("preparing") == 7


def test_who_trains_is_no_matter_of_the_folder(capsys):
    write_cells()
    write_toml("c")
    cells = open_cells(**KEYS)
    write_toml("b")  # the same files, other splits
    other = open_cells(**KEYS)
    write_toml("a", "another.toml")
    third = open_cells(**KEYS | {"toml": "another.toml", "seed": 3, "val_fraction": 0.5, "zeroshot_controls": False})
    assert stores() == [cells.store.name] and cells.store == other.store == third.store
    for opened, test in ((cells, "c"), (other, "b"), (third, "a")):
        held = np.unique(opened.cell_type[opened.rows("test", False)])
        assert [opened.cell_types[code] for code in held] == [test]
    assert len(third.rows("val", False)) and not len(cells.rows("val", False))
    assert capsys.readouterr().out.count("preparing") == 1


DAMAGE = {
    "short": lambda store: os.truncate(store / "input.npy", 300),
    "gone": lambda store: (store / "place.npy").unlink(),
    "no list": lambda store: (store / "meta.json").unlink(),
    "half a list": lambda store: (store / "meta.json").write_text((store / "meta.json").read_text()[:100]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_a_sentence_and_made_anew_once_deleted(damage):
    X = write_cells()
    write_toml()
    store = open_cells(**KEYS).store
    DAMAGE[damage](store)
    with pytest.raises(DataError, match=f"{store} is damaged, .*: delete this folder, and the next start makes it"):
        open_cells(**KEYS)
    shutil.rmtree(store)
    cells = open_cells(**KEYS)
    assert cells.store == store and np.array_equal(cells.read(np.arange(200)), X)


def test_what_is_wrong_with_values_leaves_no_folder():
    X = write_cells()
    X[7, 2] = np.nan
    with h5py.File("one.h5ad", "r+") as file:
        file["X"][...] = X
    write_toml()
    with pytest.raises(DataError, match=r"one.h5ad: X holds nan for cell 7 \(7\)"):
        open_cells(**KEYS)
    assert not [name for name in stores() if not name.endswith(".lock")]


def test_a_full_disk_is_one_sentence(monkeypatch):
    write_cells()
    write_toml()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(DataError, match="the prepared cells take 0.0 GB in data/cells/e-.*, where 0.0 GB are free"):
            open_cells(**KEYS)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(DataError, match="cannot be written to data/cells/e-.*No space left on device.*free some"):
            open_cells(**KEYS)
    assert not [name for name in stores() if not name.endswith(".lock")]
    Path("data").rename("other")
    Path("data").touch()
    with pytest.raises(DataError, match="cannot be written to data/cells"):
        open_cells(**KEYS)


# ---------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------
def open_slowly(argv: list[str]) -> None:
    """Open e.toml; the writer waits in the middle until there is a file "go"."""
    write = cell_store.Draft.write

    def slow(draft, bar):
        Path(f"writing.{os.getpid()}").touch()
        while not Path("go").exists():
            pass
        write(draft, bar)

    cell_store.Draft.write = slow
    cells = open_cells(**KEYS)
    print("read", float(cells.read(np.arange(len(cells.file))).double().sum()))


def writers() -> list[Path]:
    return list(Path().glob("writing.*"))


@pytest.mark.parametrize("ranks", [True, False], ids=["ranks", "strangers"])
def test_of_two_processes_one_writes_and_both_read_one_copy(ranks):
    X = write_cells()
    write_toml()
    jobs = [Job("test_state_cells", function="open_slowly", console=f"console.{i}",
                LOCAL_RANK=str(i) if ranks else "0") for i in range(2)]
    wait_for(writers, jobs[0])
    Path("go").touch()
    assert [job.wait() for job in jobs] == [0, 0]
    told = [job.console.read_text() for job in jobs]
    assert len(writers()) == 1 and "".join(told).count("preparing") == 1
    for text in told:
        assert float(text.split("read")[1]) == pytest.approx(X.sum(dtype=np.float64))
    assert len(stores()) == 1


def test_a_kill_half_way_leaves_nothing_that_looks_whole():
    X = write_cells()
    write_toml()
    job = Job("test_state_cells", function="open_slowly")
    wait_for(writers, job)
    job.kill()
    job.wait()
    assert stores() and all(name.endswith((".making", ".lock")) for name in stores())
    cells = open_cells(**KEYS)  # clears away what is left of it
    assert stores() == [cells.store.name] and np.array_equal(cells.read(np.arange(200)), X)


# ---------------------------------------------------------------------------------------------------------------
# Matrices
# ---------------------------------------------------------------------------------------------------------------
def resident(path: Path) -> int:
    """Kilobytes of a mapped file that are in the memory of this process."""
    size, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):  # a mapping begins
            here = line.endswith(str(path.resolve()))
        elif here and line.startswith("Rss:"):
            size += int(line.split()[1])
    return size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc")
def test_what_is_held_is_a_map_and_what_is_streamed_is_not_in_memory():
    write_cells(n=4_000)
    write_toml()
    held, streamed = open_cells(**KEYS), open_cells(**KEYS, ram_budget_gb=1e-6)
    assert (held.streamed, streamed.streamed) == (False, True)
    path = held.store / "input.npy"
    streamed.read(np.arange(4_000))
    before = resident(path)
    held.read(np.arange(4_000))
    assert before == 0 and resident(path) > 90


def overwrite(path: Path, begin: int, content: bytes) -> None:
    """Change bytes of a file, but not its size."""
    whole = bytearray(path.read_bytes())
    whole[begin : begin + len(content)] = content
    path.write_bytes(whole)


@pytest.mark.parametrize("name, begin", [("place.npy", -8), ("cell_type.npy", -4), ("input.npy", 0), ("meta.json", 40)])
def test_a_changed_file_of_the_right_size_is_refused(name, begin):
    write_cells()
    write_toml()
    store = open_cells(**KEYS).store
    overwrite(store / name, begin if begin >= 0 else (store / name).stat().st_size + begin, b"\x7f\x7f\x7f\x7f")
    with pytest.raises(DataError, match="is damaged.*delete this folder"):
        open_cells(**KEYS)


def rewrite(change):
    """Change meta.json of a folder and seal it again, as nobody but we should."""
    def damage(store: Path) -> None:
        meta = cell_store.read_meta(store)
        change(meta)
        cell_store.write_meta(store, meta)
    return damage


def as_whole_numbers(store: Path) -> None:
    path = store / "input.npy"
    path.write_bytes(path.read_bytes().replace(b"<f4", b"<i4"))
    rewrite(lambda meta: meta["checksums"].update({"input.npy": cell_store.checksums_of(path)[0]}))


ODD = {
    "nested": lambda store: (store / "meta.json").write_text("[" * 100_000),
    "a list": lambda store: (store / "meta.json").write_text("[1]"),
    "a huge number": lambda store: (store / "meta.json").write_text('{"checksum": ' + "9" * 10_000 + "}"),
    "not utf-8": lambda store: (store / "meta.json").write_bytes(b"\xff\xfe"),
    "a pipe": lambda store: [(store / "meta.json").unlink(), os.mkfifo(store / "meta.json")],
    "a folder": lambda store: [(store / "input.npy").unlink(), (store / "input.npy").mkdir()],
    "no survey": rewrite(lambda meta: meta.pop("survey")),
    "a survey of less": rewrite(lambda meta: meta["survey"].pop("batches")),
    "wrong types": rewrite(lambda meta: meta.update(sizes=3)),
    "other columns": rewrite(lambda meta: meta["matrices"]["input"].update(columns=7)),
    "whole numbers": as_whole_numbers,
    "pickled": lambda store: np.save(store / "batch.npy", np.array([{}] * 200, object)),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_folder_of_anything_else_is_refused_in_a_sentence(odd):
    write_cells()
    write_toml()
    store = open_cells(**KEYS).store
    ODD[odd](store)
    with pytest.raises(DataError, match=f"{store} is damaged, .*: delete this folder"):
        cell_store.read_meta(store)


def test_of_a_large_file_a_start_verifies_a_sample_and_inspect_all(monkeypatch, capsys):
    monkeypatch.setattr(cell_store, "BLOCK", 512)
    monkeypatch.setattr(cell_store, "PIECE", 128)
    monkeypatch.setattr(cell_store, "MOST_BLOCKS", 3)
    write_cells()
    write_toml()
    store = open_cells(**KEYS).store  # of 200 x 6 numbers in 10 blocks
    overwrite(store / "input.npy", 4_000, b"\x7f")
    found = 0
    for _ in range(60):  # two of nine blocks each time: with 1 - 3e-7 some find it, and with 1 - 3e-40 some do not
        try:
            cell_store.read_meta(store)
        except DataError as error:
            assert "input.npy does not hold what was written" in str(error)
            found += 1
    assert 0 < found < 60
    assert "input.npy does not hold what was written" in refusal(capsys, prepare_data.main, "inspect", str(store))
    rewritten = json.loads((store / "meta.json").read_text())
    del rewritten["checksum"], rewritten["blocks"]
    cell_store.write_meta(store, rewritten)  # as it was before there were checksums of blocks
    cell_store.read_meta(store)
    assert "has no checksums of parts, so input.npy is not verified" in capsys.readouterr().err


def test_who_waits_for_a_folder_that_nobody_makes_is_told(monkeypatch):
    monkeypatch.setattr(shared, "WAIT_S", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(DataError, match="data/cells/0123456789ab did not come into .*: start the ranks"):
        cell_store.wait_for_store("data/cells", "0123456789ab")


def test_of_more_than_two_billion_values_nothing_is_copied(monkeypatch):
    """indptr is of 64 bits then: rows are read from the files, to the same values."""
    X = write_cells(sparse=True)
    write_toml()
    store = open_cells(**KEYS).store
    path, meta = store / "input_indptr.npy", json.loads((store / "meta.json").read_text())
    np.save(path, np.load(path).astype(np.int64))
    meta["sizes"][path.name] = path.stat().st_size
    meta["checksums"][path.name] = cell_store.checksums_of(path)[0]
    del meta["checksum"]
    cell_store.write_meta(store, meta)
    cells = open_cells(**KEYS)
    assert not cells.streamed and not cells.matrices["input"].held
    rows = np.random.default_rng(1).permutation(200)
    assert np.array_equal(cells.read(rows), X[rows])


def test_an_accelerator_fills_in_the_zeros_of_sparse_rows_itself():
    X = write_cells(sparse=True)
    X[[3, 4, 199]] = 0
    rows = csr_array(X)
    assert np.array_equal(cell_store.unpack(rows, torch.device("cpu")), X)
    assert cell_store.unpack(rows[:0], torch.device("cpu")).shape == (0, 6)
    on_meta = cell_store.unpack(rows, torch.device("meta"))
    assert on_meta.shape == X.shape and on_meta.device.type == "meta"  # nothing is left on the CPU, nothing waits


@pytest.mark.parametrize("many", ["dense", "sparse"])
def test_dense_and_sparse_files_make_one_matrix_of_the_more_frequent_form(many):
    X = [write_cells("one.h5ad", n=300, sparse=many == "sparse"), write_cells("two.h5ad", 1, 100, many == "dense")]
    write_toml(files="{one,two}.h5ad")
    for budget in (8.0, 1e-6):
        cells = open_cells(**KEYS, ram_budget_gb=budget)
        assert (cells.store / "input.npy").exists() == (many == "dense")
        rows = np.random.default_rng(1).permutation(400)
        assert np.array_equal(cells.read(rows), np.concatenate(X)[rows])


def test_a_row_that_the_disk_lost_meanwhile_is_a_sentence():
    write_cells()
    write_toml()
    cells = open_cells(**KEYS, ram_budget_gb=1e-6)
    os.truncate(cells.store / "input.npy", 300)
    with pytest.raises(DataError, match="input.npy was changed, or its disk is full: delete"):
        cells.read(np.arange(200))


# ---------------------------------------------------------------------------------------------------------------
# prepare_data.py
# ---------------------------------------------------------------------------------------------------------------
def test_the_job_prepares_what_a_start_then_finds(capsys):
    write_cells()
    write_toml()
    told = prepare_data.main(["cells", "--toml=e.toml", "--embed_key=none"])
    printed = capsys.readouterr().out
    assert "preparing 200 cells" in printed and f"are ready in {told['folder']}\n" in printed
    assert told["cells"] == 200 and told["columns"] == 6 and told["bytes"] > 200 * 6 * 4
    assert str(open_cells(**KEYS).store) == told["folder"] and capsys.readouterr().out == ""
    assert "cells needs the TOML of your data" in refusal(capsys, prepare_data.main, "cells")
    assert "there is no file x.toml" in refusal(capsys, prepare_data.main, "cells", "--toml=x.toml")


def test_counts_are_converted_once():
    counts = np.random.default_rng(5).poisson(0.4, (200, 6)).astype(np.float32)
    write_cells()
    with H5ad("one.h5ad") as file:
        obs = file.frame("obs")
    write_toml()
    expected = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
    for sparse in (False, True):
        write_h5ad("one.h5ad", csr_array(counts) if sparse else counts, obs, GENES)
        cells = open_cells(**KEYS, counts="convert")
        assert np.allclose(cells.read(np.arange(200)), expected, rtol=1e-6)
        assert cells.read(np.arange(3)).dtype == torch.float32
        values = np.load(cells.store / ("input_data.npy" if sparse else "input.npy"))
        assert values.max() < 10  # log1p in the folder itself


# ---------------------------------------------------------------------------------------------------------------
# The identity of what a run sees
# ---------------------------------------------------------------------------------------------------------------
def identity(toml: str = "e.toml", **changes) -> str:
    """The fingerprint of the cells of a TOML, prepared anew."""
    shutil.rmtree("data/cells", ignore_errors=True)
    cells = open_cells(**{**KEYS, "toml": toml, **changes})
    again = open_cells(**{**KEYS, "toml": toml, **changes})  # from the folder
    assert re.fullmatch("[0-9a-f]{16}", cells.fingerprint) and cells.fingerprint == again.fingerprint
    return cells.fingerprint


@pytest.mark.parametrize("sparse", [False, True])
def test_the_fingerprint_is_of_content_not_of_paths_times_or_blocks(sparse, monkeypatch):
    write_cells(sparse=sparse)
    write_toml()
    before = identity()
    os.utime("one.h5ad", (1, 1))
    assert identity() == before
    assert identity(ram_budget_gb=1e-6) == before
    monkeypatch.setattr(cell_store.Matrix, "entries", 7)
    assert identity() == before
    Path("elsewhere").mkdir()
    for name in ("one.h5ad", "e.toml"):
        shutil.move(name, f"elsewhere/{name}")
    assert identity("elsewhere/e.toml") == before


@pytest.mark.parametrize("sparse", [False, True])
def test_the_fingerprint_changes_with_every_value_place_and_name(sparse):
    X = write_cells(sparse=sparse)
    write_toml()
    with H5ad("one.h5ad") as file:
        obs = {name: column.categories[column.codes] for name, column in file.frame("obs").items()}

    def written(values: np.ndarray = X, genes: list[str] = GENES, **columns) -> str:
        write_h5ad("one.h5ad", csr_array(values) if sparse else values, {**obs, **columns}, genes)
        return identity()

    kinds = [written()]
    assert kinds[0] == written()
    other = X.copy()
    other[X > 0] = np.nextafter(other[X > 0], 15)[: (X > 0).sum()]  # the last bit of every value
    kinds.append(written(other))
    other = X.copy()
    row = int(np.flatnonzero((X[:, 0] > 0) & (X[:, 1] == 0))[0])
    other[row, :2] = other[row, 1::-1]  # the same values, one of them in another column
    kinds.append(written(other))
    kinds.append(written(X[::-1]))
    kinds.append(written(genes=[*GENES[:5], "h"]))
    for column in obs:
        names = obs[column].copy()
        names[0] = next(name for name in sorted(set(names)) if name not in (names[0], "non-targeting"))
        kinds.append(written(**{column: names}))
    written()
    write_toml(test="b")  # other cells train
    kinds.append(identity())
    write_toml()
    np.savez("f.npz", p=np.ones(2), q=np.zeros(2))
    kinds.append(identity(perturbation_features_file="f.npz"))
    np.savez("f.npz", p=np.ones(2), q=np.ones(2))
    kinds.append(identity(perturbation_features_file="f.npz"))
    assert len(set(kinds)) == len(kinds), kinds


def test_runs_whose_seeds_draw_other_validation_sets_have_one_task():
    write_cells()
    write_toml()

    def task(toml: str = "e.toml", **changes) -> tuple[str, str, str]:
        """(what is in the files, what the TOML makes of it, what the seed makes of that)"""
        cells = open_cells(**{**KEYS, "toml": toml, "val_fraction": 0.5, **changes})
        (name, text), = cells.task.items()
        assert name == toml
        return *text.split("-"), cells.fingerprint

    content, split, drawn = task(seed=0)
    others = [task(seed=seed) for seed in range(1, 4)]
    assert {other[:2] for other in others} == {(content, split)} and {other[2] for other in others} - {drawn}
    assert task(val_fraction=0.0)[1:] == (split, split)
    write_toml("b", "b.toml")
    assert task("b.toml")[0] == content and task("b.toml")[1] != split
    write_cells(seed=1)
    assert task()[0] != content


def test_the_fingerprint_is_of_the_genes_that_all_files_have_in_the_order_of_each():
    X = write_cells()
    write_toml(files="*.h5ad")
    with H5ad("one.h5ad") as file:
        obs = file.frame("obs")
    kinds = set()
    for genes in (GENES, GENES[::-1]):
        write_h5ad("two.h5ad", X, obs, genes)
        kinds.add(identity())
    assert len(kinds) == 2


def test_the_synthetic_cells_have_the_same_fingerprint_each_time_they_are_made(capsys):
    settings = ["--num_cell_types=4", "--num_perturbations=2", "--num_genes=20", "--cells_per_condition=4"]
    found = []
    for seed in (1, 1, 2):
        prepare_data.main(["state", *settings, f"--seed={seed}"])
        found.append(identity("data/state/synthetic.toml", embed_key="X_hvg"))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("sparse, name", [(False, "input.npy"), (True, "input_data.npy"), (True, "input_indices.npy")])
def test_inspect_reads_a_folder_whole_and_finds_a_flipped_bit(sparse, name, capsys):
    write_cells(sparse=sparse)
    write_toml()
    store = open_cells(**KEYS).store
    found = prepare_data.main(["inspect", str(store)])
    assert found["cells"] == 200 and "whole; content " + found["content"] in capsys.readouterr().out
    content = bytearray((store / name).read_bytes())
    content[-9] ^= 1
    (store / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} does not hold what was written: delete this folder"):
        open_cells(**KEYS)
    told = refusal(capsys, prepare_data.main, "inspect", str(store))
    assert f"{name} does not hold what was written: delete this folder" in told


def test_a_folder_of_an_earlier_version_is_named_so(capsys):
    write_cells()
    write_toml()
    store = open_cells(**KEYS).store
    meta = cell_store.read_meta(store)
    del meta["checksums"]["input.npy"]
    cell_store.write_meta(store, meta | {"version": 2})
    assert "is of an earlier version" in refusal(capsys, prepare_data.main, "inspect", str(store))
