"""bench.py and benchmarks/: what it lists, refuses and writes; how it measures; that each side does what it says."""

import importlib.util
import json
import math
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from commands import refusal

import bench
import train_state
from benchmarks import apelr, arxiv, ghmm, gpu, racing, state
from benchmarks.racing import Rounds
from common.products import exact, float32_products

TINY = {"tiny": (2, {"cell_set_len": 4, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 16})}


@pytest.fixture(autouse=True)
def untouched(monkeypatch, tmp_path):
    """A trainer lives in a process of its own and restores nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(racing, "SHORT", True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with float32_products("highest", torch.device("cpu"), are_small=True):  # as torch has them
        yield
        racing._entered.clear()
    racing.RESULTS.clear()
    torch.set_flush_denormal(False)
    for number, handler in before.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------- the door
def test_without_a_name_it_lists_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(ghmm, "bench", lambda options: pytest.fail("it measures"))
    assert bench.main([]) == []
    printed = capsys.readouterr().out
    listed = re.findall(r"^  (\w+) +(\d+) min ", printed, re.MULTILINE)
    minutes = {name: it.minutes for name, it in bench.BENCHES.items()}
    assert {name: int(each) for name, each in listed} == minutes | {"all": sum(minutes.values()) - minutes["gpu"]}
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert max(map(len, (printed + capsys.readouterr().out).splitlines())) <= 100


def test_all_is_what_needs_no_gpu():
    for names in (["all"], ["all", "ghmm", "all"]):  # each once
        options = bench.parse(names)
        bench.check(options)
        assert options.names == [name for name in bench.BENCHES if name != "gpu"]


def checkout(name: str, file: str) -> Path:
    path = Path(name) / file
    path.parent.mkdir(parents=True)
    path.touch()
    return Path(name).resolve()


def test_a_checkout_goes_to_the_benchmark_whose_file_it_has(capsys):
    nanogpt, source = checkout("nano", "model.py"), checkout("apel", "src/apelr/model_v2.py")
    options = bench.parse(["arxiv", "apelr", "--peer=nano", "--peer=apel"])
    bench.check(options)
    assert options.peers == {"arxiv": nanogpt, "apelr": source}


@pytest.mark.parametrize("line, words", [
    ("ghm", "did you mean 'ghmm'"), ("ghmm zebra", "'zebra'"), ("all ghm", "did you mean 'ghmm'"),
    ("ghmm --json=absent/out.json", "absent"), ("ghmm --json=.", "name a file"), ("ghmm --json=", "name a file"),
    ("ghmm --only=x", "--only is for scale and gpu alone"), ("scale --only=zebra", "There are: ghmm step"),
    ("ghmm --device=cpu", "--device is for gpu alone"), ("gpu --device=meta --short", "invalid choice: 'meta'"),
    ("gpu --device=cpu --short --only=zebra", "There are: ghmm default"), ("arxiv --full", "apelr and state"),
    ("ghmm --jsn=x", "--jsn=x: no such option, did you mean '--json'?"), ("al", "did you mean 'all'"),
    ("arxiv --peer_python=x", "is for ghmm alone"),
    ("arxiv --peer=.", "no model.py (nanoGPT, for arxiv)"),
    ("arxiv apelr --peer=.", "no model.py (nanoGPT, for arxiv) or src/apelr/model_v2.py (APEL-R, for apelr)"),
    ("state --peer=.", "no benchmark named here takes a checkout"),
    ("ghmm --peer=simplex", "needs JAX"), ("ghmm --peer=simplex --peer_python=nowhere", "No such file"),
    ("ghmm --peer=simplex --peer_python={python}", "cannot import Simplexity: ModuleNotFoundError")])
def test_bad_input_is_one_line_before_anything_is_measured(capsys, monkeypatch, line, words):


    monkeypatch.setattr(ghmm, "bench", lambda options: pytest.fail("it measures"))
    checkout("simplex", "simplexity/generative_processes/hidden_markov_model.py")
    assert words in refusal(capsys, bench.main, *line.replace("{python}", sys.executable).split())


def test_json_has_the_machine_the_settings_and_every_result(monkeypatch, capsys):
    rounds, others = Rounds((1.0, 2.0)), Rounds((4.0, 4.0))
    monkeypatch.setattr(ghmm, "bench", lambda options: racing.report("a", rounds, "s", "b", others))
    found = bench.main(["ghmm", "--json=out.json", "--short"])
    about, result = json.loads(Path("out.json").read_text())
    assert [result] == found and result == {
        "name": "a", "value": 1.5, "unit": "s", "against": "b", "ratio": 0.375, "spread": 1 / 3,
        "ratio_spread": 1 / 3, "marked": True}
    assert about["machine"]["torch"] == torch.__version__ and about["settings"]["names"] == "['ghmm']"
    printed = capsys.readouterr().out
    assert "+-33% !" in printed and racing.LEGEND in printed
    assert "ghmm: load" in printed and torch.__version__ in printed


# -------------------------------------------------------------------------------------------------------- measuring
def test_a_ratio_is_the_median_of_the_ratios_of_each_round():
    ours, theirs = Rounds((1.0, 2.0, 3.0)), Rounds((10.0, 2.0, 9.0))
    found = racing.report("x", ours.rate(6), "tokens/s", "peer", theirs.rate(6))
    assert found["value"] == 3.0 and found["ratio"] == 3.0  # of 10, 1 and 3; the ratio of the medians is 4.5
    assert found["spread"] == pytest.approx((4.5 - 2.5) / 3) and found["marked"]
    assert not racing.report("x", Rounds((1.0, 1.01, 0.99)), "s")["marked"]
    assert racing.report("x", 2.0, "s", spread=0.3)["marked"] and Rounds((1.0,)).spread is None
    assert racing.report("x", 2.0, "MB", "peer", 4.0)["ratio"] == 0.5


def test_what_cannot_take_part_is_a_line_and_a_result_without_a_value(capsys):
    racing.absent("ghmm hmmlearn", "pip install hmmlearn")
    assert "missing: pip install hmmlearn" in capsys.readouterr().out
    assert racing.RESULTS[0]["value"] is None and racing.RESULTS[0].keys() == racing.result("", 1.0, "").keys()


def test_it_warms_up_until_two_windows_agree(monkeypatch):
    windows = iter([10.0, 5.0, 2.0, 1.05, 1.0, math.nan])
    monkeypatch.setattr(racing, "window", lambda *given: next(windows))
    racing.warm_up(None, torch.device("cpu"), 0.1)
    assert math.isnan(next(windows))


def test_sides_take_turns_once_both_are_warm():
    calls = []
    found = racing.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=9)
    turns = "".join(calls)
    assert turns.endswith("abab") and "b" not in turns.rstrip("ab") and len(found["a"]) == 2  # --short: two rounds
    assert turns.lstrip("a").startswith("bb")


def test_batches_differ_and_words_are_as_frequent_as_in_a_text():
    draw = racing.pool(racing.zipf_tokens(1_000, 50, 100, torch.device("cpu"), count=3))
    first, second, third, again = (draw() for _ in range(4))
    assert again is first and not torch.equal(first, second) and first.shape == (50, 100)
    counts = torch.stack([first, second, third]).flatten().bincount(minlength=1_000)
    weights = 1 / (torch.arange(1_000) + 3.7)
    assert (counts[:3] / counts.sum() / (weights / weights.sum())[:3] - 1).abs().max() < 0.15


class Doubling(racing.Trainer):
    """A side that holds a denormal number."""

    def __init__(self, side: str):
        self.device = torch.device("cpu")
        self.smallest = torch.tensor([1e-39])
        self.step = lambda: None
        if side == "ours":
            self.rt = None

    def flops_per_token(self) -> float:
        return float((self.smallest / 2).item() == 0)  # whether the process takes denormals as 0


def test_a_side_takes_denormals_as_0_and_says_what_it_has_counted():
    racing._start(Doubling, "ours")
    assert racing._flops() == 1.0 and racing._window(0.0) > 0
    racing._start(Doubling, "peer")
    assert racing._flops() is None


# ------------------------------------------------------------------------------------------------ the other pages
@pytest.mark.parametrize("make, shape", [
    (ghmm.GhmmTrainer, (4, 6, 1, "cpu")), (arxiv.ArxivTrainer, (1, 8, 16, 50, 2, 0.0, "fp32", "cpu")),
    (apelr.ApelrTrainer, ("v2", 30, 2, 32, 16, True, "fp32", "cpu")),
    (apelr.ApelrTrainer, ("v1", 30, 2, 32, 16, True, "bf16", "cpu"))], ids=["ghmm", "arxiv", "v2", "v1"])
def test_our_side_trains_on_another_batch_every_step(make, shape):
    side = make("ours", *shape)
    batches = []
    draw = side.draw
    side.draw = lambda: batches.append(draw()) or batches[-1]
    before = [parameter.clone() for parameter in side.model.parameters()]
    for _ in range(2):
        side.step()
    assert not torch.equal(*batches) and side.flops_per_token() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, side.model.parameters(), strict=True))


def test_writing_is_measured_one_text_at_a_time_and_in_batches(monkeypatch):
    monkeypatch.setattr(apelr, "MIDDLE", (30, 2, 32, 16))
    found = apelr.measure_writing(None, "cpu", short=True, count=4)
    assert [name for name, *_ in found] == [f"apelr {version} writing, batch {batch} cpu"
                                            for version in ("v1", "v2") for batch in (1, 8, 64)]
    assert all(rates.median > 0 for _, rates, *_ in found)


NANOGPT = """
import torch
from types import SimpleNamespace as GPTConfig
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.emb = torch.nn.Embedding(config.vocab_size, config.n_embd)
    def configure_optimizers(self, weight_decay, lr, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=lr, betas=betas)
    def forward(self, idx, targets):
        logits = self.emb(idx) @ self.emb.weight.t()
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss
"""


def test_nanogpt_gets_targets_that_its_loss_can_view(monkeypatch):
    checkout("nano", "model.py").joinpath("model.py").write_text(NANOGPT)
    monkeypatch.setattr("sys.path", list(sys.path))
    side = arxiv.ArxivTrainer(str(Path("nano").resolve()), 1, 8, 16, 50, 2, 0.0, "fp32", "cpu")
    before = side.model.emb.weight.clone()
    side.step()
    assert not torch.equal(before, side.model.emb.weight)


def test_hmmlearn_or_its_absence_is_told_for_every_hidden_markov_process():
    ghmm.bench_process("mess3", 8, 16, torch.device("cpu"))
    found = {result["name"]: result for result in racing.RESULTS}
    for kind in ("sampling", "beliefs", "log_prob"):
        assert found[f"ghmm {kind}, mess3 8x16 cpu"]["value"] > 0
    if racing.missing("hmmlearn"):
        assert found["ghmm hmmlearn, mess3 8x16 cpu"]["against"] == "missing: pip install hmmlearn"
    else:
        assert found["ghmm log_prob, mess3 8x16 cpu"]["ratio"] > 0


def test_a_race_of_sides_that_disagree_stops():
    with pytest.raises(AssertionError, match="disagree by 1.0e-03 nats a token"):
        ghmm.agree("Simplexity", -1.001, -1.0, 1, "mess3")
    ghmm.agree("Simplexity", -1_000.001, -1_000.0, 1_000, "mess3")


# ----------------------------------------------------------------------------------------------------------- gpu
def test_without_a_gpu_its_benchmark_is_refused_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in ("gpu", "gpu --short", "gpu --device=cpu"):
        assert "sees no GPU; --device=cpu --short drives it in miniature" in refusal(capsys, bench.main, *words.split())


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """(settings of a workload in miniature); its data are made once."""
    folder = tmp_path_factory.mktemp("gpu")
    return lambda name: gpu.settings(name, folder, "cpu", short=True)


@pytest.mark.parametrize("name", ["ghmm published", "arxiv published", "apelr v2_fast", "state state_lg"])
def test_a_run_of_the_gpu_benchmark_trains_with_the_settings_of_its_config(stand_ins, name):
    it = gpu.WORKLOADS[name]
    side = gpu.PageTrainer("eager", it.page, stand_ins(name), None, ["--precision=bf16"])
    before = [parameter.clone() for parameter in side.run.model.parameters()]
    losses = [side.step() for _ in range(2)]
    side.rt.__exit__(None, None, None)
    assert all(loss.isfinite() for loss in losses) and side.flops_per_token() > 0 and side.units() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, side.run.model.parameters(), strict=True))
    given = {"ghmm published": ("max_steps", 100_000), "arxiv published": ("grad_accum", 4),
             "apelr v2_fast": ("lr", 6e-4), "state state_lg": ("n_encoder_layers", 4)}[name]
    assert getattr(side.cfg, given[0]) == given[1] and side.cfg.precision == "bf16"


def test_a_goal_is_judged_on_what_was_measured_and_not_in_miniature(monkeypatch):
    monkeypatch.setattr(racing, "RESULTS", [])
    for is_short, value, goal in ((False, 2.0, 2.0), (False, 1.9, 2.0), (True, 9.0, 2.0), (False, 1.0, None)):
        monkeypatch.setattr(racing, "SHORT", is_short)
        gpu.say_goal("x", value, goal)
    assert [it["against"] for it in racing.RESULTS] == [
        "goal >= 2: met", "goal >= 2: not met", "goal >= 2: not judged in miniature", "no goal"]


# --------------------------------------------------------------------------------------------------------- state
@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "GENES", 30)
        return str(state.write_cells(tmp_path_factory.mktemp("cells")))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(state, "SIZES", TINY)


def lacks(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def test_the_cells_fill_every_set_of_64_and_are_the_same_dense_and_sparse(toml):
    dense = state.cell_batches(toml, "cpu", batch_size=3, cell_set_len=64)
    sparse = state.cell_batches(toml, "cpu", batch_size=3, cell_set_len=64, embed_key=None, output_space="all")
    assert (dense.sentences.sizes % 64 == 0).all() and dense.sentences.sizes.sum() == 10_240
    for name, values in dense(5).items():
        assert torch.equal(values, sparse(5)[name])
    cells = dense(5)["pert_cell_emb"]
    assert 0.05 < (cells > 0).float().mean() < 0.15 and cells.max() <= 3.001


def test_the_loader_is_measured_in_every_form(toml):
    found = state.measure_cells(toml, "cpu", ["arc-state", "cell-load"])
    assert [name for name, *_ in found] == [f"state loader, {kind} cpu" for kind in (
        "dense X_hvg in memory", "dense X_hvg, streamed", "sparse X in memory", "sparse X, streamed")]
    assert all(min(rates) > 0 and unit == "cells/s" and not against for _, rates, unit, *against in found)


@pytest.mark.parametrize("loads", [False, True])
def test_a_step_of_the_benchmark_is_a_step_of_training(toml, tiny, loads):
    trainer = state.StateTrainer("ours", "tiny", toml, loads, "highest", "cpu")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.step()
    batches = state.cell_batches(toml, "cpu", batch_size=2, **TINY["tiny"][1])
    model = train_state.build_model(batches.cfg, batches.cells.dims())
    model.load_state_dict(before)
    optimizer = torch.optim.Adam(model.parameters(), lr=batches.cfg.lr)
    model(batches(0), losses=True)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
    optimizer.step()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
        assert not torch.equal(value, before[name])


@pytest.mark.parametrize("precision, matmul, half", [
    ("highest", "highest", False), ("medium", "medium", False), ("bf16", "highest", True)])
def test_both_sides_have_the_precision_of_the_race(toml, tiny, precision, matmul, half):
    trainer = state.StateTrainer("ours", "tiny", toml, False, precision, "cpu")
    assert trainer.rt.matmul_precision == matmul
    with trainer.rt.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert (product.dtype is torch.bfloat16) == half


def test_a_peer_races_as_it_comes_and_where_ours_has_other_products_with_those(monkeypatch):
    cfg = train_state.Config(device="cpu")
    both = {"peer": "P", "peer" + racing.AS_OURS: "P" + racing.AS_OURS}
    assert racing.both_ways({"peer": "P"}, cfg) == (both if exact() else {"peer": "P"})
    assert racing.peer_name("peer", cfg) == "peer" and torch.get_float32_matmul_precision() == "highest"
    assert racing.peer_name("peer" + racing.AS_OURS, cfg) == "peer"
    assert torch.get_float32_matmul_precision() == ("medium" if exact() else "highest")


def test_operations_of_a_cell_are_those_counted_by_hand(toml, tiny):
    G, H, S, d_mlp, P = 30, 8, 4, 16, 17
    basal, pert, layer, out = G * H, P * H + H * H, 4 * H * H + 3 * H * d_mlp, H * H + H * G
    wanted = 4 * basal + 6 * (pert / S + layer + out) + 12 * S * H + 10 * S * G
    trainer = state.StateTrainer("ours", "tiny", toml, False, "highest", "cpu")
    assert trainer.flops_per_token() == pytest.approx(wanted)


def test_bench_state_says_which_peers_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(state, "missing", lambda module: module in ("state", "cell_load"))
    monkeypatch.setattr(state, "GENES", 30)
    monkeypatch.setattr(state, "ProcessPoolExecutor", lambda *given: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception, match="stop here"):
        bench.main(["state"])
    printed = capsys.readouterr().out
    assert "state arc-state" in printed and "missing: pip install arc-state" in printed
    assert "missing: pip install cell-load" in printed


@pytest.mark.filterwarnings("ignore")  # of the packages compared with
@pytest.mark.skipif(lacks("state") or lacks("cell_load"), reason="needs arc-state and cell-load")
def test_arc_state_has_the_same_loss_and_takes_the_same_step(toml, tiny):
    found = state.measure_agreement(toml, "cpu", [])
    assert len(found) == 2 and all(gap <= 1e-4 for _, gap, *_ in found)
    for loads in (False, True):
        state.StateTrainer("arc-state", "tiny", toml, loads, "highest", "cpu").step()
    batches = state.cell_batches(toml, "cpu", batch_size=16, cell_set_len=64)
    with racing.quiet():
        batch = next(state.cell_load(toml, batches.cfg))
    assert batch["pert_cell_emb"].shape == batch["ctrl_cell_emb"].shape == (16 * 64, 30)
