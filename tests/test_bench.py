"""bench.py state: what it measures is what the model and the loader of train_state.py do; it says what is missing."""

import importlib.util
import signal

import pytest
import torch

import bench
import train_state

TINY = {"tiny": (2, {"cell_set_len": 4, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 16})}


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STATE_GENES", 30)
        return str(bench.write_cells(tmp_path_factory.mktemp("cells")))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "STATE_SIZES", TINY)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    yield  # a trainer lives in a process of its own and restores nothing
    torch.set_float32_matmul_precision(precision)
    for number, handler in before.items():
        signal.signal(number, handler)


def lacks(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def test_the_cells_fill_every_set_of_64_and_are_the_same_dense_and_sparse(toml):
    dense = bench.cell_batches(toml, "cpu", batch_size=3, cell_set_len=64)
    sparse = bench.cell_batches(toml, "cpu", batch_size=3, cell_set_len=64, embed_key=None, output_space="all")
    assert (dense.sentences.sizes % 64 == 0).all() and dense.sentences.sizes.sum() == 10_240
    for name, values in dense(5).items():
        assert torch.equal(values, sparse(5)[name])
    cells = dense(5)["pert_cell_emb"]
    assert 0.05 < (cells > 0).float().mean() < 0.15 and cells.max() <= 3.001


def test_the_loader_is_measured_in_every_form(toml):
    found = bench.measure_cells(toml, "cpu", ["arc-state", "cell-load"])
    assert [name for name, *_ in found] == [f"state loader, {kind} cpu" for kind in (
        "dense X_hvg in memory", "dense X_hvg, streamed", "sparse X in memory", "sparse X, streamed")]
    assert all(rate > 0 and unit == "cells/s" and not against for _, rate, unit, *against in found)


@pytest.mark.parametrize("loads", [False, True])
def test_a_step_of_the_benchmark_is_a_step_of_training(toml, tiny, loads):
    trainer = bench.StateTrainer("ours", "tiny", toml, loads, "cpu")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.step()
    batches = bench.cell_batches(toml, "cpu", batch_size=2, **TINY["tiny"][1])
    model = train_state.build_model(batches.cfg, batches.cells.dims())
    model.load_state_dict(before)
    optimizer = torch.optim.Adam(model.parameters(), lr=batches.cfg.lr)
    model(batches(0), losses=True)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
    optimizer.step()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
        assert not torch.equal(value, before[name])


def test_operations_of_a_cell_are_those_counted_by_hand(toml, tiny):
    G, H, S, d_mlp, P = 30, 8, 4, 16, 17
    basal, pert, layer, out = G * H, P * H + H * H, 4 * H * H + 3 * H * d_mlp, H * H + H * G
    wanted = 4 * basal + 6 * (pert / S + layer + out) + 12 * S * H + 10 * S * G
    assert bench.StateTrainer("ours", "tiny", toml, False, "cpu").flops_per_token() == pytest.approx(wanted)


def test_bench_state_says_which_peers_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(bench, "missing", lambda module: module in ("state", "cell_load"))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *given: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception, match="stop here"):
        bench.main(["state"])
    printed = capsys.readouterr().out
    assert "arc-state missing: pip install arc-state" in printed and "cell-load missing" in printed


@pytest.mark.filterwarnings("ignore")  # of the packages compared with
@pytest.mark.skipif(lacks("state") or lacks("cell_load"), reason="needs arc-state and cell-load")
def test_arc_state_has_the_same_loss_and_takes_the_same_step(toml, tiny):
    found = bench.measure_agreement(toml, "cpu", [])
    assert len(found) == 2 and all(gap <= 1e-5 for _, gap, *_ in found)
    for loads in (False, True):
        bench.StateTrainer("arc-state", "tiny", toml, loads, "cpu").step()
    batches = bench.cell_batches(toml, "cpu", batch_size=16, cell_set_len=64)
    with bench.quiet():
        batch = next(bench.cell_load(toml, batches.cfg))
    assert batch["pert_cell_emb"].shape == batch["ctrl_cell_emb"].shape == (16 * 64, 30)
