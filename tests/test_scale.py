"""How growth is measured, and that what grew faster than its law does not any more."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import racing, scale
from sources import cell_store
from sources.cells import open_cells
from sources.chunks import numbered
from sources.digests import Seen

SIZES = scale.doubled(10, 1_000)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_the_exponent_is_that_of_what_grows_whatever_the_fixed_cost(p):
    for fixed in (0.0, 30.0, 1e3):
        found, error = scale.exponent(SIZES, [fixed + size**p for size in SIZES])
        assert abs(found - p) < 0.02 and error < 0.01


def test_what_does_not_grow_has_the_exponent_0_also_where_it_is_noise():
    assert scale.exponent(SIZES, [3.0] * len(SIZES)) == (0.0, 0.0)
    found, error = scale.exponent(SIZES, [1.0, 1.2, 0.9, 1.1, 1.0])
    assert abs(found) < 0.1 and 0 < error < 0.1


def test_only_what_is_above_its_law_is_marked(monkeypatch, capsys):
    monkeypatch.setattr(racing, "RESULTS", [])
    squares = [size**2 * 1e-6 for size in SIZES]
    for law, is_marked in ((2, False), (1, True), (0, True)):
        told = scale.tell("x", SIZES, squares, law, "s")
        assert ("ABOVE ITS LAW" in told["against"]) == is_marked
        assert told["unit"] == "exponent" and told["against"].startswith("+- 0.00, law")
    # Memory below what an allocator moves by is none.
    assert "ABOVE" not in scale.tell("x", SIZES, [0.01, 0.1, 0.5, 1, 2], 0, "MB")["against"]
    assert capsys.readouterr().out.count("ABOVE") == 2


@pytest.fixture
def denormals():
    """measure() flushes them, in a process of its own; this one lives on."""
    yield
    torch.set_flush_denormal(False)


def test_memory_is_what_the_work_holds_at_most_beyond_what_was_there(monkeypatch, denormals):
    def start(size, folder):
        before = np.ones((8 << 20) // 8)  # 8 MB, which do not count
        return lambda: float(np.ones(size << 17).sum() + before[0])  # MB that are given back

    monkeypatch.setattr(scale, "LASTING", 0.0)  # one call
    monkeypatch.setattr(scale, "LAWS", [scale.Law("x", "MB", start, [64], 1, 1)])
    seconds, held, spent = scale.measure(0, 64)
    assert 0 < seconds < 10 and seconds < spent
    if scale.memory("VmHWM"):  # Linux
        assert 60 < held < 80


def test_the_time_of_its_processes_is_not_that_of_others(monkeypatch):
    """A fork server, not this process, waits for them."""
    monkeypatch.setattr(racing, "_own", [])
    before = racing._own_seconds()
    racing.count_as_own(100.0)
    assert 99.99 <= racing._own_seconds() - before < 110


def test_a_row_is_told_by_its_time_and_its_memory_and_counts_as_work_of_ours(monkeypatch):
    class Pool(contextlib.nullcontext):
        def __init__(self, *of, **options):
            super().__init__(self)

        def submit(self, measure, number, size):
            return SimpleNamespace(result=lambda: (size * 1e-3, 10.0, 2.0))  # s, MB, s of all

    monkeypatch.setattr(scale, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(scale, "server", lambda: None)
    monkeypatch.setattr(racing, "_own", [])
    monkeypatch.setattr(racing, "RESULTS", [])
    scale.bench(SimpleNamespace(only="state plan", short=True))
    assert [one["name"] for one in racing.RESULTS] == [f"state plan of an epoch: {it} in cells" for it in
                                                       ("time", "memory")]
    assert racing.RESULTS[0]["value"] > 0.5 and racing.RESULTS[1]["value"] == 0 and racing._own == [6.0]


SLOW = ("prepare", "state start", "ghmm analysis", "arxiv XE", "arxiv curves", "apelr step, full")
CHEAP = [law for law in scale.LAWS if not law.name.startswith(SLOW)]


@pytest.mark.parametrize("law", CHEAP, ids=lambda law: f"{law.name} in {law.work}")
def test_every_row_runs_at_its_least_size(law, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        run = law.start(law.sizes[0], tmp_path)
        run()


def test_rows_are_numbered_as_numpy_does_for_every_order_of_them():
    rng = np.random.default_rng(0)
    for count in (1, 2, 500):
        first, second = rng.integers(0, 3, count).astype(np.uint16), rng.integers(-4, 5, count)
        _, expected = np.unique(np.stack([first.astype(np.int64), second], 1), axis=0, return_inverse=True)
        assert numbered(first, second).tolist() == expected.ravel().tolist()


def test_cells_of_more_files_than_may_be_open_are_prepared_as_those_of_few(tmp_path, monkeypatch, capsys):
    toml = scale.cell_files(tmp_path, cells=3 * 64, files=3)
    of_all = open_cells(toml=toml, folder=tmp_path / "all")
    opened = []

    class Counted(cell_store.H5ad):
        def __enter__(self):
            opened.append(self.path)
            assert len(opened) == 1
            return super().__enter__()

        def __exit__(self, *error):
            opened.remove(self.path)
            super().__exit__(*error)

    monkeypatch.setattr(cell_store, "MOST_OPEN", 2)
    monkeypatch.setattr(cell_store, "H5ad", Counted)
    one_by_one = open_cells(toml=toml, folder=tmp_path / "one")
    assert one_by_one.fingerprint == of_all.fingerprint
    rows = np.arange(len(of_all.file))
    assert torch.equal(one_by_one.read(rows), of_all.read(rows))


def test_a_set_of_digests_has_what_was_added_and_nothing_else(monkeypatch):
    monkeypatch.setattr(Seen, "FEW", 3)
    seen, rng = Seen(), np.random.default_rng(0)
    known = set()
    for number in rng.integers(0, 400, 500).tolist() + [2**64 - 1, 0]:
        assert (number in seen) == (number in known)
        seen.add(number)
        known.add(number)
    assert len(seen.earlier) > 100 and all((number in seen) == (number in known) for number in range(500))
    assert 2**64 - 1 in seen and 2**64 - 2 not in seen
