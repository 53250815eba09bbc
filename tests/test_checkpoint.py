"""common/checkpoint.py and common/plain.py: what a file holds is what was written, or it is refused with a sentence."""

import os
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prepare_data
import train_apelr
import train_arxiv
import train_ghmm
import train_state
from common import checkpoint
from common.errors import CheckpointError, RunError
from common.plain import digest
from common.runtime import Meter, Runtime
from configurator import config_dict
from sources import foreign_checkpoints
from sources.foreign_ghmm import read_leaves
from sources.foreign_state_files import read_plain

SCRIPT = __file__


def machine() -> Runtime:
    return Runtime(SimpleNamespace(device="cpu", precision="fp32", compile=False, seed=1))


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model, and the optimizer of its first step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(step: int = 5, **changes) -> dict:
    """A whole checkpoint of that model."""
    model, optimizer = trained()
    rt = machine()
    meter = Meter(rt, 10, 0.0)
    meter.add({"loss": torch.tensor(1.5)})
    extra = {"data": {"data/x": "abc"}, "ended": False, "names": ["a", "b"], "none": None}
    return checkpoint.capture(rt, SCRIPT, {"lr": 0.1, "max_steps": 9}, step, model, optimizer, 0.5, meter, extra,
                              {"carried": None}) | changes  # fmt: skip


def written(state: dict, path: Path) -> Path:
    """A file of a state, with the digest that belongs to it."""
    torch.save(checkpoint.seal(state), path)
    return path


def refusal(path: Path, *arguments, **kinds) -> str:
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, *arguments, **kinds)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def settings(resume: str = "auto") -> SimpleNamespace:
    return SimpleNamespace(resume=resume)


def start(folder: Path, resume: str = "auto"):
    return checkpoint.start_from(machine(), settings(resume), folder, SCRIPT, lambda old, path: [], {})


# ------------------------------------------------------------------------------------------------------- the digest


UNLIKE = [
    (0.0, -0.0), ("1", "1; 1"), (1, 1.0), (1, True), ("1", 1), (None, "None"), ("a", b"a"), ([1], (1,)), ([], {}),
    (["ab"], ["a", "b"]), ([[1], 2], [[1, 2]]), ({"a": 1, "b": 2}, {"a": 2, "b": 1}), ({1: 0}, {"1": 0}),
    (torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(1), torch.zeros(())), (torch.zeros(0), torch.zeros(0, 2)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.int32)), (torch.tensor(0.0), torch.tensor(-0.0)),
    (torch.zeros(4), torch.zeros(4).to(torch.bfloat16)), (torch.tensor([0, 1]), torch.tensor([1, 0])),
    (torch.nn.BatchNorm1d(2).state_dict(), dict(torch.nn.BatchNorm1d(2).state_dict())),  # which has versions of modules
]  # fmt: skip


def test_values_that_differ_in_anything_have_another_digest():
    for one, other in UNLIKE:
        assert digest({"x": one}) != digest({"x": other}), (one, other)
        assert digest({"x": one}) == digest({"x": one})


@pytest.mark.parametrize("tensor", [
    torch.arange(24.0).reshape(4, 6)[::2, 1::2], torch.arange(6).reshape(2, 3).T, torch.randn(9)[3:],
    torch.randn(3, 4).to(torch.bfloat16).T, torch.tensor(2.5), torch.zeros(0, 3), torch.tensor([True, False]),
    torch.zeros(1).expand(5, 7), torch.randn(2, 2, dtype=torch.complex64)], ids=str)  # fmt: skip
def test_the_digest_is_of_the_numbers_whatever_their_layout_and_survives_a_file(tensor, tmp_path):
    torch.save({"x": tensor}, tmp_path / "x.pt")
    read = torch.load(tmp_path / "x.pt", weights_only=True)
    assert digest(read) == digest({"x": tensor}) == digest({"x": tensor.clone().contiguous()})


@pytest.mark.parametrize("value, words", [
    (np.float64(1), "numpy.float64"), ({1, 2}, "set"), (torch.zeros(2).to_sparse(), "another kind"),
    (torch.empty(2, device="meta"), "another kind"), (torch.zeros(1).expand(1 << 40), "more numbers than are stored")])
def test_what_could_not_be_read_again_is_refused_when_it_is_saved(value, words, tmp_path):
    with pytest.raises(CheckpointError, match=words) as error:
        checkpoint.save(state_of(extra={"mine": value}), tmp_path)
    assert "extra.mine" in str(error.value) and list(tmp_path.iterdir()) == []


def test_any_flipped_bit_is_refused_or_changes_no_value(tmp_path):
    checkpoint.save(state_of(), tmp_path)
    path, draw = tmp_path / "last.pt", random.Random(3)
    content, good, refused = path.read_bytes(), digest(checkpoint.load(tmp_path)), 0
    weights = content.index(state_of()["model"]["weight"].numpy().tobytes())
    places = [*range(weights, weights + 24, 5), *draw.sample(range(len(content)), 120)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert digest(checkpoint.load(path)) == good, place
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
            assert "damaged" in str(error) or "no checkpoint" in str(error) or "newer" in str(error)
        else:
            assert not weights <= place < weights + 24
    assert refused > 60


def test_no_key_of_a_state_escapes_the_digest(tmp_path):
    state = checkpoint.seal(state_of())
    other = {dict: {"more": 1.0}, list: [], str: "train_other", int: 1, float: 7.5}
    assert state.keys() >= checkpoint.KINDS.keys()
    for key, value in state.items():
        kind = dict if isinstance(value, dict) else type(value)
        torch.save(state | {key: other[kind]}, tmp_path / "last.pt")
        assert "digest" in refusal(tmp_path / "last.pt"), key
    torch.save(state | {"one more": None}, tmp_path / "last.pt")
    assert "digest" in refusal(tmp_path / "last.pt")


# --------------------------------------------------------------------------------------------------- format versions


def test_an_older_checkpoint_without_a_digest_loads_with_a_note(tmp_path, capsys):
    torch.save(state_of(format_version=1), tmp_path / "last.pt")
    assert checkpoint.load(tmp_path)["step"] == 5
    told = capsys.readouterr().err
    assert str(tmp_path / "last.pt") in told and "without a digest" in told and len(told.splitlines()) == 1


def test_a_flipped_weight_of_an_older_checkpoint_is_seen_by_its_zip_checksum(tmp_path):
    state = state_of(format_version=1)
    torch.save(state, tmp_path / "last.pt")
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[content.index(state["model"]["weight"].numpy().tobytes()) + 5] ^= 64
    (tmp_path / "last.pt").write_bytes(content)
    assert "checksum of its part" in refusal(tmp_path / "last.pt")


@pytest.mark.parametrize("version, sealed", [(2, False), (1, True), (0, True), (0, False)])
def test_a_version_that_does_not_go_with_its_digest_is_damage(version, sealed, tmp_path):
    state = state_of(format_version=version)
    torch.save(state | {"digest": digest(state)} if sealed else state, tmp_path / "last.pt")
    assert "digest" in refusal(tmp_path / "last.pt") or version == 0


# ------------------------------------------------------------------------------------------------ values of each key


RANK, METER = state_of()["ranks"][0], state_of()["meter"]
ODD = [
    ("format_version", "2"), ("experiment", 3), ("config", []), ("config", {3: 1}),
    ("step", -1), ("step", True), ("step", 5.0), ("step", "5"), ("step", 1 << 70), ("best", "low"),
    ("best", float("nan")), ("best", torch.tensor(1.0)), ("model", []), ("model", {"weight": 3}),
    ("model", {3: torch.zeros(1)}), ("optimizer", []), ("scaler", None), ("ranks", {}), ("ranks", [3]),
    ("best", 1 << 2000), ("meter", 3), *(("meter", METER | change) for change in (
        {"seconds": None}, {"units": 0.5}, {"elapsed": "1"}, {"since": []}, {"since": {"loss": 1.0}}, {"more": 1},
        {"since": {"a": torch.zeros(2), "b": torch.zeros(3)}}, {"since": {"a": torch.zeros(2, 2)}},
        {"since": {"a": torch.zeros(2, dtype=torch.int64)}}, {"since": {"a": torch.tensor(1.0)}})),
    ("extra", []), ("extra", {3: 1}), ("extra", {"data": ["x"]}), ("extra", {"data": {"x": 1}}),
    ("extra", {"ended": 1}),
]  # fmt: skip


def test_a_value_of_another_kind_is_named(tmp_path):
    good = state_of()
    for key, value in ODD:
        state = good | {key: value}
        torch.save(state | {"digest": digest(state)}, tmp_path / "last.pt")
        assert key in refusal(tmp_path / "last.pt"), value
        torch.save(good | {"format_version": 1} | {key: value}, tmp_path / "last.pt")  # and of older ones
        assert key in refusal(tmp_path / "last.pt") or key == "format_version", value


@pytest.mark.parametrize("kind, good, odd", [
    (int, [0, 7], [-1, True, 1.0, "7", None, 1 << 80]), (float, [0.5, 3, float("inf")], [None, "x", []]),
    (bool, [True], [1, None]), (str, ["x"], [b"x", None]), (dict, [{}, {"a": 1}], [{1: 2}, []]),
    (list, [[], ["a"]], [[1], "ab", None]), (list | None, [None, ["a"]], [[1], {}])])  # fmt: skip
def test_what_a_page_reads_of_the_extra_state_is_of_its_kind(kind, good, odd, tmp_path):
    for value in good:
        path = written(state_of(extra={"mine": value}), tmp_path / "last.pt")
        assert checkpoint.load(path, SCRIPT, mine=kind)["extra"] == {"mine": value}
    for value in odd:
        path = written(state_of(extra={"mine": value}), tmp_path / "last.pt")
        assert "look at mine" in refusal(path, SCRIPT, mine=kind)


PAGES = [
    (train_arxiv, {"vocab_size": 4, "n_ctx": 5, "chunk_size": 6, "categories": ["a"]},
     [{"vocab_size": "4"}, {"n_ctx": None}, {"categories": [1]}, {"vocab_size": 10**12}, {"n_ctx": 10**12}]),
    (train_apelr, {"vocab_size": 4}, [{"vocab_size": True}, {"vocab_size": 10**12}]),
    (train_state, {"dims": {"input_dim": 3, "output_dim": 3, "pert_dim": 2, "batch_dim": None, "gene_dim": 3,
                            "hvg_dim": 3, "decodes": False}, "perturbations": ["p"]},
     [{"dims": []}, {"dims": {}}, {"perturbations": [0]}, {"genes": "x"}, {"dims": dict.fromkeys(("input_dim",), 3)}]),
]  # fmt: skip


@pytest.mark.parametrize("page, extra, odd", PAGES, ids=["arxiv", "apelr", "state"])
def test_every_page_refuses_an_extra_state_that_its_model_cannot_be_built_of(page, extra, odd, tmp_path):
    cfg = page.Config(d_model=8, n_layers=1, **({} if page is train_apelr else {"n_heads": 2, "d_mlp": 8}))
    sizes = [extra[name] for name in ("vocab_size", "n_ctx", "dims") if name in extra]
    state = checkpoint.weights_alone(page.__file__, config_dict(cfg), 3, page.build_model(cfg, *sizes), extra)
    written(state, tmp_path / "last.pt")
    assert page.load_run(tmp_path / "last.pt", "cpu")[2] == 3
    for change in odd:
        written(state | {"extra": extra | change}, tmp_path / "last.pt")
        with pytest.raises(CheckpointError, match="last.pt"):
            page.load_run(tmp_path / "last.pt", "cpu")
    written(state | {"config": state["config"] | {"n_layers": 10**9}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="larger model than its weights"):
        page.load_run(tmp_path / "last.pt", "cpu")


def test_metrics_of_another_kind_are_refused():
    model, optimizer = trained()
    tracker = train_ghmm.MetricTracker(model, optimizer)
    good = tracker.state_dict()
    tracker.load_state_dict(good | {"initial_loss": 1.0})
    for change in ({"ema": torch.zeros(3)}, {"steps": "4"}, {"update": 3}, {"sums": {}}, {"window": [1.0]}):
        with pytest.raises(CheckpointError, match="run/last.pt has metrics"):
            tracker.load_state_dict(good | change, "run/last.pt")


# ------------------------------------------------------------------------------------- files that are out to do harm


def test_no_file_asks_for_more_memory_or_time_than_its_size(tmp_path):
    path = tmp_path / "last.pt"
    nested = []
    for _ in range(100):  # 2 ** 100 values in a kilobyte
        nested = [nested, nested]
    torch.save(state_of(format_version=1, extra={"mine": nested}), path)
    assert "more values than its size allows" in refusal(path)
    torch.save(state_of(format_version=1, model={"weight": torch.zeros(1).expand(1 << 50)}), path)
    assert "more numbers than are stored" in refusal(path)
    torch.save(state_of(), path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "larger than the file" in refusal(tmp_path / "packed.pt")


def test_a_pipe_or_a_folder_in_the_place_of_a_checkpoint_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "last.pt")
    assert "is no file" in refusal(tmp_path / "last.pt")
    (tmp_path / "best.pt").mkdir()
    assert "no checkpoint at" in refusal(tmp_path / "best.pt" / "last.pt")
    assert checkpoint.experiment_of(tmp_path) == ""


def test_settings_that_make_no_model_or_another_are_a_sentence():
    model, _ = trained()

    def wrong(size):
        raise ValueError(f"no model of {size}")

    with pytest.raises(CheckpointError, match="x.pt: its settings make no model .*no model of 3"):
        checkpoint.build_with(model.state_dict(), "x.pt", lambda: wrong(3))
    with pytest.raises(CheckpointError, match="x.pt does not fit the model"):  # and 4 TB are not asked for
        checkpoint.build_with(model.state_dict(), "x.pt", lambda: torch.nn.Linear(10**6, 10**6))
    built = checkpoint.build_with(model.state_dict(), "x.pt", lambda: torch.nn.Linear(3, 2))
    assert torch.equal(built.weight, model.weight) and not built.weight.is_meta


def test_a_model_that_cannot_be_built_without_memory_is_built():
    class Edited(torch.nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.scale = float(self.weight.detach().abs().max())  # meta tensors have no numbers

    model, _ = trained()
    assert torch.equal(checkpoint.build_with(model.state_dict(), "x.pt", Edited).weight, model.weight)


# ---------------------------------------------------------------------------------------------------- going on again


def restored(**changes) -> tuple:
    model, optimizer = trained()
    return checkpoint.restore(machine(), state_of(**changes), Path("run/last.pt"), model, optimizer)


def test_a_state_goes_back_as_it_was():
    step, best, extra, mine = restored()
    assert (step, best, extra["names"], mine) == (5, 0.5, ["a", "b"], {"carried": None})


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_goes_on_with_its_moments_and_the_settings_of_now(fused):
    """Also with that of the machine: whether its kernel is fused."""
    model, _ = trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, betas=(0.5, 0.6), weight_decay=0.7, fused=fused)
    saved = state_of()
    saved["optimizer"]["param_groups"][0]["fused"] = not fused
    checkpoint.restore(machine(), saved, Path("run/last.pt"), model, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.3, (0.5, 0.6), 0.7, fused)
    moments_before = saved["optimizer"]["state"][0]
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moments_before["exp_avg"])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert float(optimizer.state[model.weight]["step"]) == 2


def test_means_after_a_resumption_are_of_the_terms_that_the_loss_has_now():
    meter = Meter(machine(), 10, 0.0, {"meter": METER})
    meter.add({"loss": torch.tensor(2.5)})
    assert meter.read() == {"loss": 2.0}  # with the 1.5 of the checkpoint
    meter = Meter(machine(), 10, 0.0, {"meter": METER})
    meter.add({"loss": torch.tensor(2.5), "plan": torch.tensor(1.0)})
    assert meter.read() == {"loss": 2.5, "plan": 1.0}


def moments(**changes) -> dict:
    state = state_of()["optimizer"]
    state["state"][0] |= changes
    return state


@pytest.mark.parametrize("changes", [
    *({"ranks": [rank]} for rank in ({}, RANK | {"torch_rng": torch.zeros(7, dtype=torch.uint8)},
        RANK | {"torch_rng": RANK["torch_rng"] | 255},
        RANK | {"torch_rng": torch.zeros(5)}, RANK | {"numpy_rng": []})),
    *({"ranks": [RANK | {"numpy_rng": RANK["numpy_rng"] | change}]} for change in (
        {"keys": torch.zeros(3, dtype=torch.int64)}, {"pos": 700}, {"pos": -1}, {"pos": "1"}, {"cached": None})),
    *({"optimizer": optimizer} for optimizer in (
        {"state": {}}, {"state": {"a": {}}, "param_groups": []}, {"state": {}, "param_groups": [{}]},
        moments() | {"state": {0: 1}}, moments() | {"state": 3}, moments() | {"param_groups": 7})),
    {"optimizer": moments(exp_avg=torch.zeros(3))}, {"optimizer": moments(exp_avg="x")},
    {"optimizer": moments(step="x")}, {"optimizer": moments(exp_avg_sq=None)},
    {"optimizer": {"state": {7: {"exp_avg": torch.zeros(2)}}, "param_groups": state_of()["optimizer"]["param_groups"]}},
    {"optimizer": {"state": {}, "param_groups": []}}, {"model": {}}, {"model": {"weight": torch.zeros(2, 9)}},
], ids=str)  # fmt: skip
def test_a_state_that_is_not_of_this_model_optimizer_or_torch_is_one_sentence(changes):
    with pytest.raises(CheckpointError, match="run/last.pt"):
        restored(**changes)


def test_a_damaged_best_checkpoint_is_told_before_training_goes_on(tmp_path):
    checkpoint.save(state_of(4), tmp_path, is_best=True)
    checkpoint.save(state_of(5), tmp_path)
    assert start(tmp_path)[1]["best"] == 0.5
    (tmp_path / "best.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="best.pt is damaged.*[Mm]ove it away.*goes on from .*last.pt"):
        start(tmp_path)
    (tmp_path / "best.pt").unlink()
    assert start(tmp_path)[1]["best"] == float("inf")  # so that the next evaluation writes another


def test_the_best_checkpoint_of_another_run_does_not_stay(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    checkpoint.save(state_of(4), tmp_path / "a", is_best=True)
    checkpoint.save(state_of(3), tmp_path / "b", is_best=True)
    _, state, _ = start(tmp_path / "b", resume=str(tmp_path / "a" / "last.pt"))
    checkpoint.clear(tmp_path / "b", state["step"], state["best"])
    assert state["best"] == float("inf") and not (tmp_path / "b" / "best.pt").exists()


def test_a_damaged_best_checkpoint_at_the_end_leaves_the_last_and_says_what_to_do(tmp_path):
    checkpoint.save(state_of(5), tmp_path, is_best=True)
    model, _ = trained()
    with torch.no_grad():
        model.weight.zero_()
    checkpoint.load_best(machine(), tmp_path, SCRIPT, model)
    assert torch.equal(model.weight, state_of()["model"]["weight"])
    content = bytearray((tmp_path / "best.pt").read_bytes())
    content[content.index(model.weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "best.pt").unlink()  # a name that it shares with last.pt
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(RunError, match="best.pt is damaged.*last.pt is kept: move .*best.pt away") as error:
        checkpoint.load_best(machine(), tmp_path, SCRIPT, model)
    assert "\n" not in str(error.value) and checkpoint.load(tmp_path)["step"] == 5
    (tmp_path / "best.pt").unlink()
    checkpoint.load_best(machine(), tmp_path, SCRIPT, model)


def test_what_a_killed_run_left_to_prune_goes_when_it_is_started_again(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(state_of(step), tmp_path, keep_step=True, keep_last=2)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_prune", killed)
        checkpoint.save(state_of(4), tmp_path, keep_step=True, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_2.pt", "step_3.pt", "step_4.pt"]
    assert start(tmp_path)[1]["step"] == 4
    checkpoint.clear(tmp_path, 4, 0.5, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_3.pt", "step_4.pt"]
    checkpoint.clear(tmp_path, 4, 0.5, keep_last=-1)
    assert len(list(tmp_path.glob("step_*"))) == 2


# ------------------------------------------------------------------------------------- checkpoints of other systems


def foreign(path: Path, **changes) -> Path:
    weights = {"token_emb.weight": torch.randn(5, 4), "backbone.weight_hh_l0": torch.randn(12, 4)}
    torch.save({"model_state_dict": weights, "global_step": 3} | changes, path)
    return path


def test_a_flipped_bit_in_a_checkpoint_of_another_system_is_refused(tmp_path):
    path = foreign(tmp_path / "x.pt")
    weight = foreign_checkpoints.read_checkpoint(path)["model_state_dict"]["token_emb.weight"]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 7] ^= 1
    path.write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match="x.pt is damaged.*checksum"):
            foreign_checkpoints.read_checkpoint(path, mmap)


def with_pickle(path: Path, pickle: bytes) -> Path:
    """A file as torch.save writes it with this in its pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle)
        archive.writestr("x/version", "3\n")
    return path


def test_a_pickle_that_asks_for_billions_of_places_is_refused_before_it_is_read(tmp_path):
    places = b"\x80\x02}r\xff\xff\xff\xf0."  # LONG_BINPUT, for which Python makes a table of 30 GB
    path = with_pickle(tmp_path / "x.ckpt", places)
    assert foreign_checkpoints.system_of(path) == ""
    with pytest.raises(CheckpointError, match="x.ckpt is damaged"):
        foreign_checkpoints.read_checkpoint(path)
    (tmp_path / "x.pkl").write_bytes(places)
    with pytest.raises(CheckpointError, match="x.pkl is damaged"):
        read_plain(tmp_path / "x.pkl")


def test_tensors_of_more_numbers_than_a_foreign_file_has_are_refused(tmp_path):
    path = foreign(tmp_path / "x.pt", more=[torch.zeros(1).expand(1 << 45)])
    with pytest.raises(CheckpointError, match="more numbers than are stored"):
        foreign_checkpoints.read_checkpoint(path)


def test_an_array_of_numpy_gets_no_size_that_its_bytes_do_not_have(tmp_path):
    array = b"cnumpy\nndarray\n(I100000000000\ntR."  # np.ndarray(100 GB)
    (tmp_path / "x.pkl").write_bytes(array)
    with pytest.raises(CheckpointError, match="x.pkl is damaged"):
        read_plain(tmp_path / "x.pkl")


@pytest.mark.parametrize("leaf", [np.array([1.0, np.nan]), np.array([1, 2]), np.array(["a"])], ids=str)
def test_leaves_of_equinox_are_finite_numbers(leaf, tmp_path):
    with open(tmp_path / "x.eqx", "wb") as file:
        np.save(file, np.ones(2))
        np.save(file, leaf)
    with pytest.raises(CheckpointError, match="x.eqx is damaged"):
        read_leaves(tmp_path / "x.eqx")


def test_odd_contents_of_a_foreign_checkpoint_are_one_sentence_at_the_import(tmp_path, capsys):
    heads = {f"blocks.0.attn.{name}": torch.zeros(3) for name in ("W_Q", "b_Q", "W_K")}
    torch.save(heads, tmp_path / "model.pt")
    (tmp_path / "config.yaml").write_text("process: mess3\n")
    with pytest.raises(SystemExit) as end:
        prepare_data.main(["import", str(tmp_path / "model.pt"), f"--out_dir={tmp_path / 'new'}"])
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert end.value.code == 2 and len(told) == 1 and not (tmp_path / "new").exists()
    assert "model.pt is no whole checkpoint" in told[0]


def test_an_imported_run_has_the_digest_too(tmp_path):
    model, _ = trained()
    checkpoint.save(checkpoint.weights_alone(SCRIPT, {}, 3, model, {}), tmp_path, is_best=True)
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert content["format_version"] == 2 and content.pop("digest") == digest(content)
