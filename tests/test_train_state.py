"""train_state.py and sample.py as a user runs them: files, resuming, ranks, the source's settings, predictions."""

import csv
import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest
import torch
from commands import Job, brought_in_by, colours, ended, meanwhile, python, refusal, two_ranks, wait_for
from comparison import apart, unequal
from scipy.sparse import csr_array

import prepare_data
import sample
import train_state
from common import checkpoint
from common.errors import DataError
from common.runtime import Runtime
from sources import h5ad as h5ad_source
from sources.cells import read_toml
from sources.controls import names_in
from train_state import Config

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=32", "--cell_set_len=4", "--batch_size=4",
        "--decoder_hidden_dims=8,8", "--lr=1e-2", "--warmup_steps=0", "--eval_sentences=8", "--device=cpu",
        "--precision=fp32", "--out_dir=run")
RUN = (*TINY, "--max_steps=12", "--log_interval=2", "--eval_interval=5", "--save_interval=4", "--keep_last=-1",
       "--embed_key=X_state", "--output_space=gene", "--detach_decoder", "--dropout=0.1", "--mmd_num_chunks=2",
       "--randomize_mmd_chunks", "--source_files")
draw_pictures = train_state.effects.plot_metrics


@pytest.fixture(autouse=True)
def without_pictures(in_a_folder_of_its_own, monkeypatch):
    """Unless it asks, a test draws no pictures."""
    monkeypatch.setattr(train_state.effects, "plot_metrics", lambda *args, **options: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """synthetic.toml: 5 cell types, 4 perturbations and 24 genes. rich.toml: of these cells, X is everything, X_hvg
    the first 8 genes and X_state an embedding of 6 features; two perturbations of a known type are held out."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["state", "--num_cell_types=5", "--num_perturbations=4", "--num_genes=24", "--num_batches=2",
                       "--cells_per_condition=10", "--controls_per_cell_type=16", f"--out_dir={folder}"])
    rewrite(folder / "synthetic.h5ad", folder / "rich.h5ad", X_hvg=lambda X: X[:, :8], X_state=embedded)
    text = (folder / "synthetic.toml").read_text().replace("synthetic.h5ad", "rich.h5ad")
    (folder / "rich.toml").write_text(text.replace("synthetic", "rich"))
    return folder


def embedded(X: np.ndarray) -> np.ndarray:
    return (X @ np.random.default_rng(0).normal(size=(X.shape[1], 6)) / 5).astype(np.float32)


def rewrite(source: Path | str, target: Path | str, keep=None, order=None, X=None, obs=None, **obsm) -> None:
    """A copy of an h5ad of these cells and genes in this order, with X, obs and obsm (functions of X) as given."""
    with h5ad_source.H5ad(source) as file:
        keep = np.arange(file.n_obs) if keep is None else keep
        order = np.arange(file.n_vars) if order is None else order
        dense = cells_of(source)[keep][:, order] if X is None else X
        columns = {k: np.array(names)[codes][keep] for k in ("gene", "cell_type", "gem_group")
                   for codes, names in [file.column(k)]}
        made = {key: make(dense) for key, make in {"X_hvg": lambda X: X, **obsm}.items()}
        h5ad_source.write_h5ad(target, dense, columns | (obs or {}), file.gene_names[order], made,
                                var={"highly_variable": np.arange(len(order)) < made["X_hvg"].shape[1]})


def cells_of(path: Path | str, key: str | None = None) -> np.ndarray:
    """A matrix of an h5ad as a dense array; None is X."""
    with h5ad_source.H5ad(path) as file:
        matrix = file.matrix(key)
        return np.concatenate([h5ad_source.as_dense(block) for _, _, block in matrix.blocks()])


def labels(path: Path | str, column: str) -> np.ndarray:
    with h5ad_source.H5ad(path) as file:
        codes, names = file.column(column)
        return np.array(names)[codes]


@pytest.fixture(scope="module", autouse=True)
def at_work(request, data, tmp_path_factory):
    """What whole waits for."""
    yield from meanwhile(request, "whole", ROOT / "train_state.py", *RUN, f"--toml={data / 'rich.toml'}",
                         folder=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(at_work) -> Path:
    """The RUN by the real script, which nothing disturbed. Tests leave the folder as it is."""
    process, folder = at_work
    done = ended(process)
    assert done.returncode == 0 and all(row.split(" ...")[1:] for row in done.stderr.splitlines()), done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory, one_thread) -> Path:
    """A run on the synthetic cells: expression in, expression out. Tests leave the folder as it is."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state.effects, "plot_metrics", lambda *args, **options: None)
        run(data, "--max_steps=8", "--source_files", f"--out_dir={folder}")
    return folder


def run(data: Path, *settings: str, toml: str = "synthetic.toml") -> dict:
    return train_state.main([*TINY, "--max_steps=2", f"--toml={data / toml}", *settings])


def refused(capsys, *argv: str, code: int = 2) -> str:
    return refusal(capsys, train_state.main, *argv, code=code)


def read(path: Path | str):
    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def records(folder: Path | str, split: str) -> list[dict]:
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k not in ("time_s", "cells_per_s")} for r in lines if r["split"] == split]


def table(path: Path | str) -> list[dict]:
    """A CSV file: numbers are floats."""
    def value(text: str):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path) as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def weights(folder: Path | str, name: str = "last.pt") -> dict:
    return checkpoint.load(Path(folder) / name, "train_state.py")["model"]


def assert_as_if_uninterrupted(folder: Path | str, whole: Path | str) -> None:
    found, expected = (checkpoint.load(Path(path)) for path in (folder, whole))
    keys = ("step", "best", "model", "optimizer", "ranks", "extra")
    assert unequal({k: found[k] for k in keys}, {k: expected[k] for k in keys}) == []
    assert records(folder, "eval") == records(whole, "eval") != []
    assert read(Path(folder) / "results.json") == read(Path(whole) / "results.json")


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_the_promised_files_numbers_and_pictures(whole, data):
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "train.log", "summary.json", "results.json", "metrics.csv", "plots",
        "report.html", "train_state.py", "last.pt", "best.pt", "step_4.pt", "step_5.pt", "step_8.pt", "step_12.pt",
        "var_dims.json", "pert_onehot_map.pt", "cell_type_map.json", "batch_map.json", "checkpoints", "var_dims.pkl",
        "cell_type_onehot_map.torch", "batch_onehot_map.torch", "config.yaml", "data_module.torch", "data.toml"}
    pictures = {path.stem: matplotlib.image.imread(path) for path in (whole / "plots").iterdir()}
    assert {"delta", "loss", "pearson_delta_by_perturbation", "mae_by_perturbation"} <= pictures.keys()
    for name, image in pictures.items():
        assert min(image.shape[:2]) >= 200 and colours(image) > 30, name
    summary = read(whole / "summary.json")
    assert {"pearson_delta", "mae", "discrimination", "baselines", "cells_per_second", "config_hash", "seconds",
            "torch", "device", "val_loss"} <= summary.keys() and summary["steps"] == 12
    assert summary["baselines"].keys() == {"control_mean", "perturbation_mean", "context_mean"}
    assert all({"pearson_delta", "mae", "discrimination"} <= means.keys() for means in summary["baselines"].values())
    dims = read(whole / "var_dims.json")
    assert {k: dims[k] for k in ("input_dim", "output_dim", "hvg_dim", "gene_dim", "pert_dim", "batch_dim")} == {
        "input_dim": 6, "output_dim": 6, "hvg_dim": 8, "gene_dim": 24, "pert_dim": 5, "batch_dim": 2}
    assert dims["pert_names"] == ["non-targeting", "p0", "p1", "p2", "p3"] == list(
        features := torch.load(whole / "pert_onehot_map.pt", weights_only=True))
    assert torch.equal(torch.stack(list(features.values())), torch.eye(5))
    assert dims["gene_names"] == [f"g{i:02}" for i in range(8)] and read(whole / "batch_map.json") == {"b0": 0, "b1": 1}
    assert read(whole / "cell_type_map.json") == {f"c{i}": i for i in range(5)}


def test_the_table_of_conditions_averages_to_the_summary(whole):
    with open(whole / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    summary = read(whole / "summary.json")
    for name, means in {"model": summary, **summary["baselines"]}.items():
        mine = [row for row in rows if row["model"] == name]
        assert [(row["cell_type"], row["perturbation"]) for row in mine] == [("c4", f"p{i}") for i in range(4)]
        for metric in ("mae", "mse", "discrimination", "energy_distance"):
            assert np.mean([float(row[metric]) for row in mine]) == pytest.approx(means[metric]), (name, metric)


def test_baselines_and_errors_of_a_run_are_those_of_the_cells_in_the_file(plain, data, tmp_path):
    """Another way to the numbers: means by hand from the h5ad, predictions from what sample.py writes."""
    file = data / "synthetic.h5ad"
    X, types, perts = cells_of(file).astype(np.float64), labels(file, "cell_type"), labels(file, "gene")

    def mean(cell_type: str, pert: str) -> np.ndarray:
        return X[(types == cell_type) & (perts == pert)].mean(0)

    validated = set(re.search(r"val = \[(.*)\]", (data / "synthetic.toml").read_text())[1].replace('"', "").split(", "))
    found = read(plain / "summary.json")["baselines"]
    control, errors, correlations = mean("c4", "non-targeting"), [], []
    for pert in ("p0", "p1", "p2", "p3"):
        trained = ["c0", "c1", "c2"] + ["c3"] * (pert not in validated)
        effect = np.mean([mean(t, pert) - mean(t, "non-targeting") for t in trained], 0)
        errors.append(np.abs(control + effect - mean("c4", pert)).mean())
        correlations.append(np.corrcoef(effect, mean("c4", pert) - control)[0, 1])
    assert validated and found["perturbation_mean"]["mae"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert found["perturbation_mean"]["pearson_delta"] == pytest.approx(np.mean(correlations), abs=1e-4)
    sample.main([str(plain), "--device=cpu", f"--out={tmp_path / 'out'}"])
    predicted, names = tmp_path / "out/pred.h5ad", labels(tmp_path / "out/pred.h5ad", "gene")
    cells = cells_of(predicted).astype(np.float64)
    mae = np.mean([np.abs(cells[names == p].mean(0) - mean("c4", p)).mean() for p in ("p0", "p1", "p2", "p3")])
    assert read(plain / "summary.json")["mae"] == pytest.approx(mae, rel=1e-4)


def test_a_model_of_one_step_is_said_not_to_beat_the_baselines(data, capsys):
    result = run(data, "--max_steps=1", "--lr=1e-6")
    told = capsys.readouterr().out.splitlines()
    (verdict,) = [line for line in told if line.startswith("done: ")]
    rivals = {name: means["pearson_delta"] for name, means in result["baselines"].items()}
    best = max(rivals, key=rivals.get)
    assert result["pearson_delta"] < rivals[best]
    assert f"DOES NOT BEAT the baseline {best}" in verdict and f"{rivals[best]:.4f} ({best})" in verdict
    after = told[told.index(verdict) + 1 :]  # at most eight lines, of a terminal's width
    assert len(after) <= 8 and "report" in after[-1]
    assert [line.split()[0] for line in after[-5:-1]] == ["model", *rivals]
    assert f" {rivals[best]:.4g}*" in after[-5 + 1 + list(rivals).index(best)] and all(len(row) <= 100 for row in after)


@pytest.mark.parametrize("mine, words", [(0.6, "beats every baseline"), (0.5, "DOES NOT BEAT the baseline b"),
                                         (0.4, "DOES NOT BEAT the baseline b")])
def test_the_verdict_names_the_best_baseline_and_a_tie_beats_nothing(mine, words):
    result = {"pearson_delta": mine, "mae": 1.0, "conditions": 3, "baselines": {
        "a": {"pearson_delta": 0.1, "mae": 2.0}, "b": {"pearson_delta": 0.5, "mae": 3.0}}}
    assert words in train_state.effects.verdict(result)


def test_analyze_repeats_the_numbers(whole):
    shutil.copytree(whole, "run")
    result = train_state.main(["--analyze=run", "--device=cpu"])
    assert apart(read("run/analysis/results.json"), read(whole / "results.json")) == []
    assert result["pearson_delta"] == pytest.approx(read(whole / "summary.json")["pearson_delta"], rel=1e-5)


def test_the_final_numbers_are_those_of_the_best_weights(data):
    result = run(data, "--lr=0.1", "--warmup_steps=40", "--max_steps=8", "--eval_interval=2")
    history = [record["val_loss"] for record in records("run", "eval")]
    best = checkpoint.load(Path("run/best.pt"))
    assert result["val_loss"] == pytest.approx(min(history), rel=1e-5) and min(history) == best["best"] < history[-1]
    assert best["step"] == 2 + 2 * int(np.argmin(history))
    again, last = (train_state.main([f"--analyze=run/{name}.pt", "--device=cpu"])["mae"] for name in ("best", "last"))
    assert again == pytest.approx(result["mae"], rel=1e-5) and last != pytest.approx(result["mae"], rel=1e-3)


# ------------------------------------------------------------------------- control cells, and figures without a value


ONE_FILE = '[datasets]\nx = "{}"\n[training]\nx = "train"\n[zeroshot]\n"x.c4" = "test"\n'


class Unmoved(torch.nn.Module):
    """A stub that returns its own control cells."""

    gene_decoder = None

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg

    def predict(self, batch: dict) -> dict:
        return {"cells": batch["ctrl_cell_emb"]}


def unmoved(toml: str) -> tuple[dict, list[dict]]:
    """(results, parts) of the stub on what a TOML holds out."""
    cfg = Config(toml_config_path=toml, cell_set_len=4, device="cpu", precision="fp32", val_fraction=0.0)
    parts = []
    with Runtime(cfg) as rt:
        return train_state.evaluate(Unmoved(cfg), train_state.open_data(cfg), cfg, rt, parts.append), parts


def two_experiments(data: Path) -> None:
    """d.h5ad, whose cells lie elsewhere, and e.h5ad, of the same types and perturbations; TOMLs that test e.c4."""
    dense = cells_of(data / "synthetic.h5ad")
    moved = np.where(np.arange(dense.shape[1]) % 3, 0.5 * dense, dense + 2).astype(np.float32)
    rewrite(data / "synthetic.h5ad", "d.h5ad", X=moved)
    rewrite(data / "synthetic.h5ad", "e.h5ad")
    head, tail = '[datasets]\nd = "d.h5ad"\ne = "e.h5ad"\n[training]\ne = "train"\n', '[zeroshot]\n"e.c4" = "test"\n'
    Path("alone.toml").write_text(head + tail)
    Path("both.toml").write_text(head + 'd = "train"\n' + tail)
    Path("held.toml").write_text(head + 'd = "train"\n' + tail + '"d.c4" = "test"\n')
    Path("files.toml").write_text(ONE_FILE.format("{d,e}.h5ad"))


def test_another_data_set_changes_nothing_of_what_a_prediction_is_worth(data):
    """The control cells of a condition are those it was predicted from: of its own file."""
    two_experiments(data)
    (alone, _), (both, parts) = unmoved("alone.toml"), unmoved("both.toml")
    assert apart(both["model"]["per_condition"], alone["model"]["per_condition"]) == []
    assert apart(both["control_mean"]["per_condition"], alone["control_mean"]["per_condition"]) == []
    truth = cells_of("e.h5ad").astype(np.float64)
    types, perts = labels("e.h5ad", "cell_type"), labels("e.h5ad", "gene")
    control = truth[(types == "c4") & (perts == "non-targeting")].mean(0)
    for p, record in enumerate(both["model"]["per_condition"]):
        assert (record["dataset"], record["file"], record["perturbation"]) == ("e", "e.h5ad", f"p{p}")
        effect = truth[(types == "c4") & (perts == f"p{p}")].mean(0) - control
        np.testing.assert_allclose(both["model"]["real_delta"][p], effect, atol=1e-5)
        predicted = parts[0]["pred"][p * 10 : p * 10 + 10].mean(0, dtype=float) - control  # ten cells, by perturbation
        assert record["pearson_delta"] == pytest.approx(np.corrcoef(predicted, effect)[0, 1], abs=1e-4)
    assert [len(part["controls"]) for part in parts] == [16]


@pytest.mark.parametrize("toml", ["held.toml", "files.toml"])
def test_a_type_held_out_in_two_files_is_measured_in_each(toml, data):
    two_experiments(data)
    found, parts = unmoved(toml)
    alone, _ = unmoved("alone.toml")
    assert [record["file"] for record in found["model"]["per_condition"]] == ["d.h5ad"] * 4 + ["e.h5ad"] * 4
    for name in ("control_mean", "model"):
        for of_both, mine in zip(found[name]["real_delta"][4:], alone[name]["real_delta"], strict=True):
            np.testing.assert_array_equal(of_both, mine)
    assert {len(part["controls"]) for part in parts} == {16} and [part["file"] for part in parts] == [0, 1]


def test_sample_py_writes_the_control_cells_of_each_file_and_names_it(data):
    two_experiments(data)
    run(Path(), "--max_steps=1", toml="held.toml")
    predict("run", "--out=out")
    for name in ("pred", "real"):
        path = f"out/{name}.h5ad"
        kinds = zip(labels(path, "dataset"), labels(path, "file"), labels(path, "gene"), strict=True)
        assert Counter(kinds) == {(d, f"{d}.h5ad", p): 16 if p == "non-targeting" else 10
                                  for d in "de" for p in ("non-targeting", "p0", "p1", "p2", "p3")}
    of_d = cells_of("out/real.h5ad")[(labels("out/real.h5ad", "dataset") == "d")
                                     & (labels("out/real.h5ad", "gene") == "non-targeting")]
    mine = (labels("d.h5ad", "cell_type") == "c4") & (labels("d.h5ad", "gene") == "non-targeting")
    np.testing.assert_array_equal(np.sort(of_d, 0), np.sort(cells_of("d.h5ad")[mine], 0))


def without_training_controls(data: Path) -> None:
    """few.h5ad: only the type c4, which is held out, has control cells."""
    kept = (labels(data / "synthetic.h5ad", "gene") != "non-targeting") | (
        labels(data / "synthetic.h5ad", "cell_type") == "c4")
    rewrite(data / "synthetic.h5ad", "few.h5ad", keep=np.flatnonzero(kept))
    Path("few.toml").write_text(ONE_FILE.format("few.h5ad"))


def test_a_run_without_control_cells_to_train_on_starts_at_the_mean_of_its_cells(data, capsys):
    without_training_controls(data)
    settings = ("--no-strict", "--no-zeroshot_controls", "--max_steps=1", "--lr=0", "--min_lr=0", "--val_fraction=0")
    result = run(Path(), *settings, toml="few.toml")
    dense = cells_of("few.h5ad")[labels("few.h5ad", "cell_type") != "c4"]
    close = weights("run")["project_out.3.bias"].numpy() - dense.mean(0, dtype=np.float64)
    assert np.abs(close).max() < 1e-5 and result["pearson_delta"] > -1
    told = capsys.readouterr().out
    assert "nan" not in told and "inf" not in told and result["val_loss"] is None


def test_nothing_to_train_on_is_one_sentence(data, capsys):
    two_experiments(data)
    tables = [f'"e.c{i}" = "test"\n' for i in range(5)]
    Path("none.toml").write_text('[datasets]\ne = "e.h5ad"\n[zeroshot]\n' + "".join(tables))
    assert "no cells to train on" in refused(capsys, *TINY, "--no-zeroshot_controls", "--toml=none.toml")


def test_a_held_out_type_without_control_cells_is_measured_by_what_needs_none(data, capsys):
    kept = (labels(data / "synthetic.h5ad", "gene") != "non-targeting") | (
        labels(data / "synthetic.h5ad", "cell_type") != "c4")
    rewrite(data / "synthetic.h5ad", "lonely.h5ad", keep=np.flatnonzero(kept))
    Path("lonely.toml").write_text(ONE_FILE.format("lonely.h5ad"))
    for budget in (8, 1e-6):  # in memory, from disk
        result = run(Path(), "--no-strict", "--resume=never", f"--ram_budget_gb={budget}", toml="lonely.toml")
        told = capsys.readouterr().out
        assert result["pearson_delta"] is None and result["mae"] > 0 and result["discrimination"] > 0
        assert "nothing to judge" in told and "nan" not in told
        assert read("run/summary.json")["pearson_delta"] is None and read("run/results.json")
        assert {row["pearson_delta"] for row in table("run/metrics.csv")} == {""}
    assert predict("run", "--out=out", "--json=r.json")["pearson_delta"] is None and read("r.json")


# ------------------------------------------------------------------------------------------------ killed and resumed


@pytest.mark.parametrize("step", [3, 7, 11])
def test_a_run_stopped_and_started_again_ends_with_the_same_bits(step, data, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == step)
        assert run(data, *RUN, toml="rich.toml") == {"stopped_at": step}
    assert not Path("run/summary.json").exists() and checkpoint.load(Path("run"))["step"] == step
    assert run(data, *RUN, toml="rich.toml")["steps"] == 12
    assert_as_if_uninterrupted("run", whole)


LONG = (*RUN, "--max_steps=60", "--log_interval=1", "--keep_last=0")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory, one_thread) -> Path:
    """The LONG run, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state.effects, "plot_metrics", lambda *args, **options: None)
        train_state.main([*LONG, f"--toml={data / 'rich.toml'}", f"--out_dir={folder}"])
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ended_by_a_signal_and_started_again_ends_with_the_same_bits(number, data, alone):
    settings = [*LONG, f"--toml={data / 'rich.toml'}"]
    job, metrics = Job("train_state", *settings), Path("run/metrics.jsonl")
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 12, job, "line 12 of metrics.jsonl")
    job.send_signal(number)
    assert job.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert 0 < checkpoint.load(Path("run"))["step"] < 60 and not Path("run/summary.json").exists()
    assert train_state.main(settings)["steps"] == 60
    assert_as_if_uninterrupted("run", alone)


def test_other_seeds_give_other_bits(data, plain):
    """What the tests above call the same can be told from what is not."""
    run(data, "--max_steps=8", "--seed=43")
    assert unequal(weights("run"), weights(plain)) != []


def test_resume_never_trains_anew_and_a_finished_run_is_left_alone(data, plain, capsys):
    shutil.copytree(plain, "run")
    before = Path("run/last.pt").read_bytes()
    settings = ("--max_steps=8", "--source_files")
    assert run(data, *settings)["steps"] == 8 and Path("run/last.pt").read_bytes() == before
    assert "nothing was left to train" in capsys.readouterr().out
    run(data, *settings, "--resume=never")
    assert "nothing was left" not in capsys.readouterr().out and unequal(weights("run"), weights(plain)) == []


@pytest.mark.parametrize("change, words", [
    ("--lr=2e-2", "lr: 0.01 -> 0.02"), ("--max_steps=9", "max_steps: 8 -> 9"),
    ("--loss=mse", "loss: 'energy' -> 'mse'")])
def test_a_finished_run_with_another_setting_is_refused_with_the_choices(change, words, data, plain, capsys):
    shutil.copytree(plain, "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    told = refused(capsys, *TINY, "--max_steps=8", "--source_files", f"--toml={data / 'synthetic.toml'}", change)
    assert words in told and "resume=never" in told and "another --out_dir" in told
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", ["genes", "perturbations", "names of genes", "names of perturbations"])
def test_a_run_does_not_go_on_with_other_data(change, data, capsys):
    Path("d").mkdir()
    for name in ("synthetic.h5ad", "synthetic.toml"):
        shutil.copy(data / name, "d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == 2)
        run(Path("d"), "--max_steps=4")
    before = Path("run/last.pt").read_bytes()
    perts = labels("d/synthetic.h5ad", "gene")
    if change == "genes":
        rewrite(data / "synthetic.h5ad", "d/synthetic.h5ad", order=np.arange(20))
    elif change == "perturbations":
        rewrite(data / "synthetic.h5ad", "d/synthetic.h5ad", obs={"gene": np.where(
            (labels("d/synthetic.h5ad", "cell_type") == "c0") & (perts == "p0"), "p9", perts)})
    elif change == "names of genes":  # of the same number: what a gene means has changed
        rewrite(data / "synthetic.h5ad", "d/synthetic.h5ad", order=np.arange(24)[::-1])
    else:
        rewrite(data / "synthetic.h5ad", "d/synthetic.h5ad", obs={"gene": np.char.replace(perts, "p2", "p2b")})
    told = refused(capsys, *TINY, "--max_steps=4", "--toml=d/synthetic.toml")
    assert str(Path("run/last.pt")) in told and Path("run/last.pt").read_bytes() == before


# --------------------------------------------------------------------------------------------------- several ranks


RANKED = {  # what changes which parameters take part; dropout would differ between ranks
    "plain": (), "accumulated": ("--grad_accum=2",),
    "tokens": ("--use_batch_token", "--basal_mapping_strategy=batch", "--confidence_token"),
    "masked": ("--mask_attn", "--lora"), "gpt2": ("--transformer_backbone_key=GPT2", "--mask_attn", "--lora"),
    "all": ("--output_space=all", "--embed_key=none", "--no-predict_residual"),
    "frozen": ("--freeze_pert_backbone",), "lora": ("--lora", "--lora_mlp", "--freeze_pert_backbone"),
    "batches": ("--batch_encoder", "--embed_key=X_state"), "no_basal": ("--no-use_basal_projection",),
}  # fmt: skip


def many(commands: list[str]) -> None:
    train_state.effects.plot_metrics = lambda *args, **options: None
    for argv in commands:
        train_state.main(json.loads(argv))


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory) -> Path:
    """A run of two ranks for each of RANKED, one after the other in the same two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    commands = [json.dumps(ranked(data, name, f"--out_dir={name}")) for name in RANKED]
    told = two_ranks("test_train_state", *commands, folder=folder, function="many")
    assert told.count("done: the model") == len(RANKED)
    analysis = json.dumps([f"--analyze={next(iter(RANKED))}", "--device=cpu"])
    assert two_ranks("test_train_state", analysis, folder=folder, function="many").count(": the model") == 1
    return folder


def ranked(data: Path, name: str, *more: str) -> list[str]:
    toml = "rich.toml" if name == "batches" else "synthetic.toml"
    return [*TINY, "--max_steps=3", "--log_interval=1", "--dropout=0", "--lora_dropout=0", "--decoder_dropout=0",
            "--lr=1e-3", f"--toml={data / toml}", *RANKED[name], *more]


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_train_like_one(name, data, ranks):
    """To rounding, which Adam makes a step of lr where a gradient is next to nothing."""
    alone = train_state.main(ranked(data, name))
    mine, theirs = records("run", "train"), records(ranks / name, "train")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in theirs] == pytest.approx([r[key] for r in mine], rel=2e-2), key
        assert theirs[0][key] == pytest.approx(mine[0][key], rel=1e-3)
    found, expected, step = weights(ranks / name), weights("run"), sum(r["lr"] for r in mine)
    for key, value in expected.items():
        apart = (found[key] - value).abs()
        assert apart.mean() < 0.02 * step and apart.max() <= 2 * step, key
    two = read(ranks / name / "summary.json")
    assert two["mae"] == pytest.approx(alone["mae"], rel=1e-3) and two["steps"] == 3
    assert [r["val_loss"] for r in records(ranks / name, "eval")] == pytest.approx(
        [r["val_loss"] for r in records("run", "eval")], rel=1e-3)


def test_accumulated_steps_are_one_step_of_the_whole_batch(data):
    for folder, parts in (("one", 1), ("four", 4)):
        run(data, "--batch_size=8", "--dropout=0", f"--grad_accum={parts}", "--lr=1e-3", f"--out_dir={folder}")
    one, four = (records(folder, "train")[-1] for folder in ("one", "four"))
    assert (four["loss"], four["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-2)
    for name, value in weights("four").items():  # of a gradient that is next to nothing Adam makes a whole step
        assert (weights("one")[name] - value).abs().mean() < 2e-5, name


# ----------------------------------------------------------------------------------------------------------- config/


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("state*.toml")), ids=lambda path: path.stem)
def test_an_example_toml_lacks_nothing_but_its_files(path):
    with pytest.raises(DataError, match="there is no h5 or h5ad file at .*k562.h5"):
        read_toml(path)
    names = re.findall(r"\{(.*?)\}", path.read_text())[-1].split(",")
    folder = Path("data/replogle")
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.h5").touch()
    Path("config").mkdir()
    plan = read_toml(shutil.copy(path, "config"))
    assert [file.stem for file in plan.datasets["replogle"]] == names and plan.training == {"replogle"}
    assert len(plan.zeroshot) + len(plan.fewshot) == 1


# -------------------------------------------------------------------------------------------------------- sample.py


def predict(*argv: str | Path) -> dict:
    return sample.main([*map(str, argv), "--device=cpu"])


def by_condition(path: Path | str) -> dict[tuple, np.ndarray]:
    """Cells of an h5ad by (cell type, perturbation)."""
    cells, kinds = cells_of(path), [labels(path, column) for column in ("cell_type", "gene")]
    return {kind: cells[[pair == kind for pair in zip(*kinds, strict=True)]] for kind in zip(*kinds, strict=True)}


def test_held_out_conditions_are_written_as_cells_with_metrics_and_pictures(whole, data, monkeypatch):
    monkeypatch.setattr(train_state.effects, "plot_metrics", draw_pictures)
    shutil.copytree(whole, "run")
    result = predict("run", "--json=r.json")
    folder = Path("run/predictions")
    assert {"pred.h5ad", "real.h5ad", "metrics.csv", "plots", "results.json"} == {p.name for p in folder.iterdir()}
    assert apart(table(folder / "metrics.csv"), table(whole / "metrics.csv")) == []
    assert "delta" in {path.stem for path in (folder / "plots").iterdir()}
    assert result["pearson_delta"] == read("r.json")["pearson_delta"]
    assert result["pearson_delta"] == pytest.approx(read(whole / "summary.json")["pearson_delta"], rel=1e-5)
    pred, real = by_condition(folder / "pred.h5ad"), by_condition(folder / "real.h5ad")
    assert pred.keys() == real.keys() == {("c4", p) for p in ("non-targeting", "p0", "p1", "p2", "p3")}
    truth, kinds = cells_of(data / "rich.h5ad", "X_hvg"), labels(data / "rich.h5ad", "gene")
    for (_, pert), cells in real.items():
        mine = truth[(kinds == pert) & (labels(data / "rich.h5ad", "cell_type") == "c4")]
        assert pred["c4", pert].shape == cells.shape and np.array_equal(np.sort(cells, 0), np.sort(mine, 0))
        assert np.array_equal(pred["c4", pert], cells) == (pert == "non-targeting")
    assert (cells_of(folder / "pred.h5ad") >= 0).all()


def test_anndata_opens_predictions_and_their_cells_match(whole):
    anndata = pytest.importorskip("anndata")
    predict(whole, "--out=out")
    pred, real = (anndata.read_h5ad(f"out/{name}.h5ad") for name in ("pred", "real"))
    assert pred.obs.equals(real.obs) and list(pred.var_names) == list(real.var_names) == [f"g{i:02}" for i in range(8)]
    assert set(pred.obs["gene"]) == {"non-targeting", "p0", "p1", "p2", "p3"} and pred.obs["gem_group"].nunique() == 2


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory, one_thread) -> Path:
    """A run of a model whose cells see only themselves: what a control cell becomes depends on no company."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state.effects, "plot_metrics", lambda *args, **options: None)
        run(data, "--mask_attn", "--max_steps=8", f"--out_dir={folder}")
    return folder


def becomes(folder: Path, controls: np.ndarray, code: int) -> np.ndarray:
    """Control cells [n, G] under the perturbation of this number, by the model itself."""
    model = train_state.load_run(folder, "cpu")[1].eval()
    with torch.no_grad():
        return model.predict({"ctrl_cell_emb": torch.from_numpy(controls)[None], "pert_emb": torch.eye(5)[[code]]}
                             )["cells"][0].numpy()


def test_another_toml_of_fewer_perturbations_is_read_by_the_numbers_of_the_run(alone, data):
    names = labels(data / "synthetic.h5ad", "gene")
    Path("sub").mkdir()
    rewrite(data / "synthetic.h5ad", "sub/few.h5ad", keep=np.flatnonzero(np.isin(names, ["non-targeting", "p2", "p3"])))
    Path("sub/few.toml").write_text('[datasets]\nx = "few.h5ad"\n[training]\nx = "train"\n[zeroshot]\n'
                                    '"x.c4" = "test"\n')
    predict(alone, "--toml=sub/few.toml", "--out=few")
    few = by_condition("few/pred.h5ad")
    assert few.keys() == {("c4", p) for p in ("non-targeting", "p2", "p3")}
    for code, pert in ((3, "p2"), (4, "p3")):  # each cell is what one of the control cells becomes
        answers = becomes(alone, few["c4", "non-targeting"], code)
        assert np.abs(few["c4", pert][:, None] - answers).max(2).min(1).max() < 1e-5
        other = becomes(alone, few["c4", "non-targeting"], 7 - code)
        assert np.abs(few["c4", pert][:, None] - other).max(2).min(1).min() > 1e-3


@pytest.mark.parametrize("change, words", [("perturbation", "'p1x' is not of this model's training; did you mean 'p1'"),
                                           ("genes", "other genes"), ("fewer", "other genes")])
def test_data_that_the_model_does_not_know_are_refused(change, words, plain, data, capsys):
    names = labels(data / "synthetic.h5ad", "gene")
    order = {"genes": np.arange(24)[::-1], "fewer": np.arange(23)}.get(change)
    obs = {"gene": np.char.replace(names, "p1", "p1x")} if change == "perturbation" else None
    rewrite(data / "synthetic.h5ad", "synthetic.h5ad", order=order, obs=obs)
    Path("s.toml").write_text((data / "synthetic.toml").read_text().replace('"p1"', '"p1x"' if obs else '"p1"'))
    assert words in refusal(capsys, sample.main, str(plain), "--toml=s.toml", "--device=cpu", "--out=out")
    assert not Path("out").exists()


def controls_file(data: Path, path: str = "controls.h5ad", order=None, perturbed: bool = False) -> None:
    names = labels(data / "synthetic.h5ad", "gene")
    kept = np.flatnonzero((names == "non-targeting") | perturbed & (names == "p2"))
    rewrite(data / "synthetic.h5ad", path, keep=kept, order=order)


def test_control_cells_of_a_file_each_become_what_the_model_says(alone, data):
    controls_file(data)
    predict(alone, "--adata=controls.h5ad", "--perturbations=p3,p0", "--out=out")
    found, given = by_condition("out/predicted.h5ad"), by_condition("controls.h5ad")
    assert found.keys() == {(f"c{t}", p) for t in range(5) for p in ("p0", "p3")}
    for (cell_type, pert), cells in found.items():
        expected = becomes(alone, given[cell_type, "non-targeting"], {"p0": 1, "p3": 4}[pert])
        assert np.allclose(np.sort(cells, 0), np.sort(expected, 0), atol=1e-5) and len(cells) == 16


def test_genes_of_a_file_may_stand_in_another_order(plain, data):
    controls_file(data)
    controls_file(data, "turned.h5ad", order=np.random.default_rng(1).permutation(24))
    for name in ("controls", "turned"):
        predict(plain, f"--adata={name}.h5ad", "--perturbations=p1", f"--out={name}")
    assert np.allclose(cells_of("controls/predicted.h5ad"), cells_of("turned/predicted.h5ad"), atol=1e-5)
    controls_file(data, "short.h5ad", order=np.arange(23))
    with pytest.raises(SystemExit):
        predict(plain, "--adata=short.h5ad", "--perturbations=p1", "--out=short")
    assert not Path("short").exists()


def test_a_decoder_writes_the_genes_of_controls_too(whole, data):
    kept = np.flatnonzero(labels(data / "rich.h5ad", "gene") == "non-targeting")
    rewrite(data / "rich.h5ad", "controls.h5ad", keep=kept, X_hvg=lambda X: X[:, :8], X_state=embedded)
    assert predict(whole, "--adata=controls.h5ad", "--perturbations=p1", "--out=out")["cells"] == 5 * 16
    with h5ad_source.H5ad("out/predicted.h5ad") as file:
        assert list(file.gene_names) == [f"g{i:02}" for i in range(8)]


def test_what_is_wanted_is_read_from_the_labels_of_the_file_or_is_all(plain, data):
    controls_file(data)
    controls_file(data, "some.h5ad", perturbed=True)
    assert predict(plain, "--adata=some.h5ad", "--out=some")["perturbations"] == ["p2"]
    found = by_condition("some/predicted.h5ad")
    assert {kind: len(cells) for kind, cells in found.items()} == {(f"c{t}", "p2"): 10 for t in range(5)}
    assert predict(plain, "--adata=controls.h5ad", "--cells=3", "--out=all")["cells"] == 5 * 4 * 3


ODD = ["[('Drug, (R)-x', 5.0, 'uM')]", "[('8-Hydroxyquinoline', 0.05, 'uM')]", "p, q", '["p3"]']


@pytest.fixture(scope="module")
def odd(data, tmp_path_factory, one_thread) -> Path:
    """A run on perturbations whose names look like lists, beside odd.h5ad."""
    folder = tmp_path_factory.mktemp("odd")
    names = labels(data / "synthetic.h5ad", "gene")
    known = dict(zip(("non-targeting", "p0", "p1", "p2", "p3"), ("non-targeting", *ODD), strict=True))
    rewrite(data / "synthetic.h5ad", folder / "odd.h5ad", obs={"gene": np.array([known[name] for name in names])})
    (folder / "odd.toml").write_text(ONE_FILE.format("odd.h5ad"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state.effects, "plot_metrics", lambda *args, **options: None)
        run(folder, "--max_steps=1", f"--out_dir={folder / 'run'}", toml="odd.toml")
    return folder


@pytest.mark.parametrize("words, wanted", [
    *(([f"--perturbations={name}"], [name]) for name in ODD),
    (["--perturbations", ODD[0]], [ODD[0]]), ([f"perturbations={ODD[0]}"], [ODD[0]]),
    ([f"--perturbations={ODD[1]},{ODD[0]},p, q"], [ODD[1], ODD[0], "p, q"]),
    ([f"--perturbations={json.dumps(ODD[:2])}"], ODD[:2]), ([f"--perturbations={ODD[2:]!r}"], ODD[2:]),
    (["--perturbations="], sorted(ODD)), ([], sorted(ODD))])
def test_a_perturbation_that_there_is_is_a_name_whatever_it_looks_like(words, wanted, odd):
    found = predict(odd / "run", f"--adata={odd / 'odd.h5ad'}", "--cells=2", "--out=out", *words)["perturbations"]
    assert found == wanted
    assert {name for _, name in by_condition("out/predicted.h5ad")} == set(wanted)


def test_only_the_value_of_the_setting_becomes_one_text():
    words = ["--out", "perturbations", "a=b", "--perturbations", "--cells=2", "--perturbations", "p,q",
             "perturbations=[r"]
    assert sample.as_one_text(words, "perturbations") == [*words[:6], '["p,q"]', 'perturbations=["[r"]']


def test_a_name_of_a_list_in_a_file_of_settings_is_one_name(odd):
    Path("s.json").write_text(json.dumps({"perturbations": [ODD[0], "p, q"]}))
    found = predict(odd / "run", "s.json", f"--adata={odd / 'odd.h5ad'}", "--cells=2", "--out=out")
    assert found["perturbations"] == [ODD[0], "p, q"]


@pytest.mark.parametrize("text", ["[('Drug', 5.0, 'uM')]", "p,r", "[p3"])
def test_a_name_that_nobody_knows_is_refused_with_how_to_quote(text, odd, capsys):
    told = refusal(capsys, sample.main, str(odd / "run"), f"--adata={odd / 'odd.h5ad'}", f"--perturbations={text}",
                   "--device=cpu", "--out=out")
    assert """--perturbations='["NAME", "NAME"]'""" in told and text in told and not Path("out").exists()


def test_names_in_plain_lists_are_read_as_ever():
    known = ["a", "b", "c d", "e"]
    for text, wanted in {"a,b": ["a", "b"], "[a, b]": ["a", "b"], "['a', 'b']": ["a", "b"], '"a", "b"': ["a", "b"],
                         "c d,e": ["c d", "e"], "e,": ["e"], "": []}.items():
        assert names_in([text], known, "w") == wanted, text


@pytest.mark.parametrize("change", ["missing", "others", "unnamed"])
def test_genes_that_x_has_are_read_by_name_where_x_hvg_has_not(change, data, capsys):
    """The model reads the first eight of 24 genes; X of the other file has all of them, in another order."""
    run(data, "--max_steps=2", "--mask_attn", toml="rich.toml")
    names = labels(data / "rich.h5ad", "gene")
    kept = np.flatnonzero(names == "non-targeting")
    order = np.random.default_rng(1).permutation(24)
    rewrite(data / "rich.h5ad", "given.h5ad", keep=kept, X_hvg=lambda X: X[:, :8])
    rewrite(data / "rich.h5ad", "other.h5ad", keep=kept, order=order, X_hvg=lambda X: X[:, :8])
    with h5py.File("other.h5ad", "a") as file:
        if change != "others":
            del file["var/highly_variable"]
            file["var"].attrs["column-order"] = np.array([], dtype=h5py.string_dtype())
        if change == "missing":
            del file["obsm/X_hvg"]
    capsys.readouterr()
    for name in ("given", "other"):
        predict("run", f"--adata={name}.h5ad", "--perturbations=p1", f"--out={name}")
        assert ("read from X, by name" in capsys.readouterr().err) == (name == "other")
    assert np.allclose(cells_of("given/predicted.h5ad"), cells_of("other/predicted.h5ad"), atol=1e-5)
    with h5ad_source.H5ad("other/predicted.h5ad") as file:
        assert list(file.gene_names) == [f"g{i:02}" for i in range(8)]
    raw = np.round(10 * np.expm1(cells_of("other.h5ad"))).astype(np.float32)
    rewrite("other.h5ad", "raw.h5ad", X=raw, X_hvg=lambda X: X[:, :3])
    told = refusal(capsys, sample.main, "run", "--adata=raw.h5ad", "--device=cpu", "--out=raw")
    assert "raw.h5ad: X holds raw counts" in told  # what is read is checked


@pytest.mark.parametrize("argv, words", [
    ("--adata=gone.h5ad", "gone.h5ad"), ("--adata=controls.h5ad --perturbations=p7", "p7"),
    ("--adata=short.h5ad", "has no gene 'g23'"), ("--toml=gone.toml", "gone.toml"),
    ('--adata=controls.h5ad --columns={"control_pert":"ctrl"}', "no control cells"),
    ('--adata=controls.h5ad --columns={"pert_col":"gen"}', "did you mean 'gene'"), ("--adata=wild.h5ad", "nan"),
    ("--perturbations=p1", "go with adata"), ('--columns={"pert_cal":"x"}', "pert_cal")])
def test_predictions_that_cannot_be_made_are_refused(argv, words, plain, data, capsys):
    controls_file(data)
    controls_file(data, "short.h5ad", order=np.arange(23))
    rewrite("controls.h5ad", "wild.h5ad", X_hvg=lambda X: np.where(np.arange(24) == 3, np.nan, X).astype(np.float32))
    told = refusal(capsys, sample.main, str(plain), *argv.split(), "--device=cpu", "--out=out")
    assert words.lower() in told.lower() and not Path("out").exists()


@pytest.mark.parametrize("which", ["plain", "whole"])
def test_a_checkpoint_in_the_form_of_the_source_predicts_like_the_run(which, data, request):
    folder, toml = request.getfixturevalue(which), data / ("synthetic.toml" if which == "plain" else "rich.toml")
    for name, path in (("ours", folder), ("theirs", folder / "checkpoints/final.ckpt")):
        predict(path, f"--toml={toml}", f"--out={name}")
    assert np.allclose(cells_of("ours/pred.h5ad"), cells_of("theirs/pred.h5ad"), atol=1e-5)
    assert by_condition("ours/pred.h5ad").keys() == by_condition("theirs/pred.h5ad").keys()
    assert apart(table("ours/metrics.csv"), table("theirs/metrics.csv"), rel=1e-4) == []


def test_the_tool_of_arc_state_predicts_the_same_from_a_run_in_its_form(plain, data):
    """Sets of one cell: whichever control cells it draws, each must become what this model makes of it."""
    pytest.importorskip("state")
    controls_file(data, "some.h5ad", perturbed=True)
    command = ("tx", "infer", "--model-dir", plain, "--adata", "some.h5ad", "--embed-key", "X_hvg", "--pert-col",
               "gene", "--celltype-col", "cell_type", "--max-set-len", 1, "--output", "o.h5ad")
    done = python("-c", "from state.__main__ import main; main()", *command, folder=Path.cwd())
    assert done.returncode == 0, done.stderr[-2000:]
    model = train_state.load_run(plain / "checkpoints/final.ckpt")[1].eval()
    given = by_condition("some.h5ad")
    predicted, names, types = cells_of("o.h5ad", "X_hvg"), labels("o.h5ad", "gene"), labels("o.h5ad", "cell_type")
    for cell_type in ("c0", "c4"):
        controls = torch.from_numpy(given[cell_type, "non-targeting"])[:, None]
        with torch.no_grad():
            pert = torch.eye(5)[[3]].expand(len(controls), -1)
            ours = model.predict({"ctrl_cell_emb": controls, "pert_emb": pert})["cells"][:, 0].numpy()
        theirs = predicted[(names == "p2") & (types == cell_type)]
        assert len(theirs) == 10 and np.abs(theirs[:, None] - ours).max(2).min(1).max() < 1e-5


# --------------------------------------------------------------------------------------- what can be trained together


@pytest.mark.parametrize("settings", [
    "--embed_key=X_hvg", "--embed_key=none --output_space=all", "--embed_key=X_hvg --output_space=all",
    "--embed_key=X_state", "--embed_key=X_state --output_space=all", "--embed_key=X_state --output_space=embedding",
    "--embed_key=X_state --residual_decoder --decoder_hidden_dims=8,8,8", "--embed_key=X_state --no-gene_decoder_bool",
    "--transformer_backbone_key=GPT2", "--batch_encoder", "--use_batch_token --basal_mapping_strategy=batch",
    "--confidence_token", "--lora --lora_mlp", "--mask_attn", "--no-predict_residual",
    "--rotary --no-bidirectional_attention", "--loss=sinkhorn", "--loss=se", "--loss=mse",
    "--distributional_loss=gaussian", "--regularization=0.1",
    "--n_basal_samples=3 --no-map_controls", "--no-should_yield_control_cells --downsample_cells=5", "--batch_col=",
    "--optimizer=adam --schedule=constant", "--pert_norm --confidence_token --no-confidence_per_set", "--n_kv_heads=1",
    "--counts=convert --embed_key=none --output_space=all", "--precision=bf16", "--activation=relu --head_dim=12"])
def test_settings_train_and_are_measured_and_can_be_loaded(settings, data, monkeypatch):
    loaded, load_run = [], train_state.load_run
    monkeypatch.setattr(train_state, "load_run", lambda *args: loaded.append(load_run(*args)) or loaded[-1])
    result = run(data, *settings.split(), toml="rich.toml")
    again = predict("run", "--out=out")
    (cfg, model, step, extra), = loaded
    dims = extra["dims"]
    if "X_state" in settings and "embedding" not in settings and "no-gene" not in settings:
        assert model.gene_decoder is not None and dims["decodes"]
    elif settings == "--embed_key=X_hvg --output_space=all":
        assert model.gene_decoder is not None and dims["gene_dim"] == 24
    else:
        assert model.gene_decoder is None
    assert step == 2 and np.isfinite(result["mae"]) and result["conditions"] == 4
    assert again["mae"] == pytest.approx(result["mae"], rel=1e-5 if cfg.precision == "fp32" else 1e-2)


def test_features_of_perturbations_and_several_data_sets(data):
    rewrite(data / "synthetic.h5ad", "b.h5ad", order=np.random.default_rng(1).permutation(24))
    shutil.copy(data / "synthetic.h5ad", "a.h5ad")
    Path("two.toml").write_text('[datasets]\na = "a.h5ad"\nb = "b.h5ad"\n[training]\na = "train"\nb = "train"\n'
                                '[zeroshot]\n"a.c4" = "test"\n"b.c4" = "val"\n')
    draw = torch.Generator().manual_seed(0)
    torch.save({name: torch.randn(3, generator=draw) for name in ("p0", "p1", "p2", "p3", "new")}, "f.pt")
    result = run(Path(), "--perturbation_features_file=f.pt", toml="two.toml")
    dims = read("run/var_dims.json")
    assert result["conditions"] == 4 and dims["pert_dim"] == weights("run")["pert_encoder.0.weight"].shape[1] == 3
    assert predict("run", "--out=out")["mae"] == pytest.approx(result["mae"])
    assert predict("run", "--adata=b.h5ad", "--perturbations=p1,new", "--out=other")["cells"] == 5 * (10 + 16)
    found = by_condition("other/predicted.h5ad")  # of a perturbation never seen, the features are known
    assert not np.allclose(found["c0", "new"].mean(0), found["c0", "p1"].mean(0), atol=1e-3)


def test_without_validation_the_last_weights_are_measured(data):
    text = (data / "synthetic.toml").read_text()
    Path("s.toml").write_text(text[: text.index("[fewshot")].replace("synthetic.h5ad", str(data / "synthetic.h5ad")))
    result = run(Path(), "--val_fraction=0", "--max_steps=4", "--eval_interval=2", toml="s.toml")
    assert records("run", "eval") == [] and not Path("run/best.pt").exists()
    assert read("run/summary.json")["val_loss"] is None
    assert predict("run", "--out=out")["mae"] == pytest.approx(result["mae"], rel=1e-5)


@pytest.mark.parametrize("form", ["run", "run/best.pt", "run/checkpoints/final.ckpt"])
def test_training_starts_from_another_run(form, data, plain, capsys):
    source = plain / Path(form).relative_to("run")
    result = run(data, f"--init_from={source}", "--max_steps=1", "--lr=0", "--min_lr=0", "--weight_decay=0",
                 "--out_dir=new", "--d_model=32", "--n_layers=2")  # its sizes are taken over
    told, before, after = "".join(capsys.readouterr()), weights(plain, "best.pt"), weights("new")
    assert "taken over" in told and "d_model = 16" in told and "start anew: pert_encoder." in told
    fresh = {k for k in after if not torch.equal(after[k], before[k])}
    assert fresh == {"pert_encoder.0.weight", "pert_encoder.3.weight", "pert_encoder.0.bias", "pert_encoder.3.bias"}
    assert result["steps"] == 1


# ---------------------------------------------------------------------------------------------------------- bad input


def spoil(name: str) -> None:
    """Damage d/s.h5ad, d/s.toml or what else is named."""
    toml, cells = Path("d/s.toml"), Path("d/s.h5ad")
    text = toml.read_text()
    changed = {"typo": text.replace("[training]", "[trainin]"), "type": text.replace("synthetic.c4", "synthetic.c9"),
               "syntax": text.replace("[datasets]", "[datasets"), "pert": text.replace('"p1"', '"p11"'),
               "file": text.replace("s.h5ad", "t.h5ad"), "empty": "",
               "nothing": text[: text.index("[zeroshot")]}
    if name in changed:
        toml.write_text(changed[name])
    elif name in ("nan", "counts", "negative"):
        X = cells_of(cells)
        X = np.round(np.expm1(X)) if name == "counts" else np.where(np.arange(X.size).reshape(X.shape) == 777,
                                                                    np.nan if name == "nan" else -1, X)
        rewrite(cells, cells, X=X.astype(np.float32))
    elif name == "torn":
        cells.write_bytes(cells.read_bytes()[:-5_000])
    elif name == "control":
        rewrite(cells, cells, obs={"gene": np.char.replace(labels(cells, "gene"), "non-targeting", "ctrl")})
    elif name == "lonely":
        kept = (labels(cells, "gene") != "non-targeting") | (labels(cells, "cell_type") != "c2")
        rewrite(cells, cells, keep=np.flatnonzero(kept))
    elif name in ("checkpoint", "run"):
        Path("torn.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
        torch.save({"model": 1}, "foreign.pt")


@pytest.mark.parametrize("damage, line, words", [
    ("", "--toml=d/gone.toml", "gone.toml"), ("typo", "", "did you mean 'training'"), ("type", "", "did you mean 'c"),
    ("syntax", "", "cannot be read as TOML"), ("pert", "", "did you mean 'p1'"), ("file", "", "t.h5ad"),
    ("empty", "", "s.toml"), ("nothing", "--val_fraction=0", "hold"), ("nan", "", "nan"), ("negative", "", "-1"),
    ("counts", "", "counts"), ("torn", "", "s.h5ad"), ("control", "", "no control cells"), ("lonely", "", "c2"),
    ("", "--pert_col=gen", "did you mean 'gene'"), ("", "--cell_type_key=celltype", "did you mean 'cell_type'"),
    ("", "--batch_col=gem", "gem"), ("", "--control_pert=nontargeting", "did you mean 'non-targeting'"),
    ("", "--embed_key=X_hgv", "did you mean 'X_hvg'"), ("", "--embed_key=X_state", "X_state"),
    ("", "--gene_decoder_bool", "decoder"), ("", "--use_batch_token", "basal_mapping_strategy = batch"),
    ("", "--perturbation_features_file=gone.pt", "gone.pt"), ("checkpoint", "--init_from=gone.pt", "gone.pt"),
    ("checkpoint", "--init_from=torn.pt", "torn.pt"), ("checkpoint", "--init_from=foreign.pt", "foreign.pt"),
    ("checkpoint", "--resume=torn.pt", "torn.pt"), ("checkpoint", "--resume=gone.pt", "gone.pt"),
    ("", "--load_checkpoint_step=3", "step_3.pt"), ("", "--analyze=nowhere", "nowhere"),
    ("", "--batch_size=6 --grad_accum=4", "multiple of grad_accum"), ("", "--n_heads=3", "no multiple of n_heads = 3"),
    ("", "--lr=-1", "lr: expected float >= 0"), ("", "--max_steps=0", "max_steps: expected int >= 1"),
    ("", "--dropout=1", "dropout: expected float in [0, 1)"),
    ("", "--cell_set_len=-4", "cell_set_len: expected int >= 1"), ("", "--d_modl=4", "did you mean"),
    ("", "--loss=enery", "energy"), ("", "--ram_budget_gb=0", "ram_budget_gb"),
    ("", "--toml=", "empty")])
def test_bad_input_is_one_line_and_nothing_is_written(damage, line, words, data, capsys):
    Path("d").mkdir()
    shutil.copy(data / "synthetic.h5ad", "d/s.h5ad")
    Path("d/s.toml").write_text((data / "synthetic.toml").read_text().replace("synthetic.h5ad", "s.h5ad"))
    spoil(damage)
    before = everything()
    told = refused(capsys, *TINY, "--max_steps=2", "--toml=d/s.toml", *line.split())
    assert words.lower() in told.lower() and everything() == before


def everything() -> list[Path]:
    """All files here, but for prepared cells, which are good for the next start whatever happens to this one."""
    return sorted(path for path in Path.cwd().rglob("*") if "data/cells" not in path.as_posix() and path.name != "data")


def test_a_checkpoint_of_another_size_is_refused(data, plain, capsys):
    shutil.copytree(plain, "run")
    Path("run/summary.json").unlink()
    told = refused(capsys, *TINY, "--max_steps=8", "--source_files", f"--toml={data / 'synthetic.toml'}",
                   "--d_model=32", "--resume=run/last.pt")
    assert "does not fit" in told and "last.pt" in told


def test_a_torn_last_checkpoint_names_the_good_one(data, whole, capsys):
    shutil.copytree(whole, "run")
    torn = Path("run/last.pt").read_bytes()[:-3_000]
    Path("run/last.pt").unlink()
    Path("run/last.pt").write_bytes(torn)
    told = refused(capsys, *RUN, f"--toml={data / 'rich.toml'}")
    assert "last.pt is damaged" in told and "step_12.pt" in told


def test_a_loss_that_is_not_finite_ends_the_run_naming_the_step_and_keeps_the_last_good_checkpoint(data, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "stopping", lambda self, now: now == 2)
        run(data, "--max_steps=9", "--log_interval=1")
    before = Path("run/last.pt").read_bytes()
    told = refused(capsys, *TINY, "--max_steps=9", "--log_interval=1", f"--toml={data / 'synthetic.toml'}", "--lr=1e30",
                   "--schedule=constant", code=1)
    assert re.search(r"step [3-5]\b", told) and Path("run/last.pt").read_bytes() == before
    assert not Path("run/summary.json").exists()


# ---------------------------------------------------------------------------------------------- memory and the start


def test_cells_beyond_the_memory_budget_are_streamed_to_the_same_losses(data):
    rng, n = np.random.default_rng(0), 20_000
    X = np.where(rng.random((n, 40)) < 0.2, rng.uniform(0.1, 4, (n, 40)), 0).astype(np.float32)
    obs = {"cell_type": rng.choice(["a", "b", "c"], n), "gene": rng.choice(["non-targeting", "p", "q"], n),
           "gem_group": rng.choice(["x", "y"], n)}
    h5ad_source.write_h5ad("s.h5ad", csr_array(X), obs, [f"g{i}" for i in range(40)])
    Path("s.toml").write_text('[datasets]\ns = "s.h5ad"\n[training]\ns = "train"\n[fewshot."s.c"]\ntest = ["q"]\n')
    settings = ("--embed_key=none", "--output_space=all", "--max_steps=4", "--log_interval=1", "--eval_interval=2")
    for folder, budget in (("memory", 8), ("disk", 0.001)):
        run(Path(), *settings, f"--ram_budget_gb={budget}", f"--out_dir={folder}", toml="s.toml")
    assert "held in memory" in Path("memory/train.log").read_text()
    assert "read from disk" in Path("disk/train.log").read_text()
    for split in ("train", "eval"):
        assert records("memory", split) != [] == apart(records("memory", split), records("disk", split), rel=1e-4)
    assert all((weights("memory")[k] - v).abs().mean() < 1e-5 for k, v in weights("disk").items())
    assert apart(read("memory/results.json"), read("disk/results.json"), rel=1e-4) == []


def first_biases(data: Path, *settings: str) -> dict[str, torch.Tensor]:
    """Gradients of the last biases of a model at its start, over a batch."""
    seen = {}

    def look(model, batch, rt, cfg):
        model.eval()
        model(batch, losses=True)["loss"].backward()
        seen.update({k: p.grad for k, p in model.named_parameters() if k.endswith("bias")})
        raise DataError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_state, "train_step", look)
        with pytest.raises(SystemExit):
            run(data, *settings, "--batch_size=16")
    return seen


@pytest.mark.parametrize("settings, name", [
    ((), "project_out.3.bias"), (("--no-predict_residual",), "project_out.3.bias"),
    (("--output_space=all", "--embed_key=none"), "final_down_then_up.2.bias"),
    (("--output_space=all", "--embed_key=none", "--no-predict_residual"), "project_out.3.bias")])
def test_no_gene_is_dead_at_the_start(settings, name, data, monkeypatch):
    alive = first_biases(data, *settings)[name]
    monkeypatch.setattr(train_state, "start_at_mean", lambda *args: None)
    without = first_biases(data, *settings)[name]
    assert (alive.abs() > 0).all() and len(alive) == 24
    assert (without == 0).any() or settings, "the ReLU kills none: the test shows nothing"


def test_importing_the_script_starts_nothing_and_brings_no_other_experiment():
    brought = brought_in_by("train_state")
    assert "train_state" in brought and not {"train_arxiv", "train_apelr", "matplotlib"} & brought
