"""Checkpoints and run folders of arc-state and SmolState, to ours and back."""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import python, refusal

import prepare_data
import sample
import train_state
from common import checkpoint
from common.errors import CheckpointError, DataError
from configurator import configure
from sources.cells import load_features
from sources.foreign_checkpoints import read_checkpoint, source_file
from sources.foreign_state_files import convert, read_plain, toml_lines
from sources.h5ad import H5ad, as_dense, write_h5ad

pytestmark = pytest.mark.usefixtures("quickly")
FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(__file__).parent / "../../shared/reference")).resolve()
REFERENCES = sorted(path for path in FOLDER.glob("state_*.npz") if path.with_suffix(".json").exists())
TYPES, PERTS, BATCHES, GENES, HVGS, WIDTH = 4, ("ctrl", "p0", "p1"), ("b0", "b1"), 12, 8, 6
COLUMNS = {"pert_col": "target", "cell_type_key": "kind", "batch_col": "lane", "control_pert": "ctrl"}
TINY = ("--n_layers=1", "--d_model=16", "--n_heads=2", "--d_mlp=32", "--cell_set_len=4", "--batch_size=4", "--lr=1e-2",
        "--warmup_steps=0", "--eval_interval=2", "--max_steps=4", "--decoder_hidden_dims=8,8", "--device=cpu",
        "--precision=fp32", *(f"--{name}={value}" for name, value in COLUMNS.items()))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with cells.h5ad: obs target, kind, lane; X of 12 genes, X_hvg of 8 of them, X_state of 6 features; and
    cells.toml, which holds the last kind out."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    kind, target = np.divmod(np.repeat(np.arange(TYPES * len(PERTS)), 10), len(PERTS))
    X = np.log1p(rng.poisson(2.0 + kind[:, None] + 2 * target[:, None] * (np.arange(GENES) % 3 == 0))).astype("float32")
    marked = np.arange(GENES) < HVGS
    write_h5ad(
        folder / "cells.h5ad",
        X,
        {"target": np.array(PERTS)[target], "kind": np.char.add("k", kind.astype(str)),
         "lane": np.array(BATCHES)[np.arange(len(X)) % 2]},
        [f"g{i}" for i in range(GENES)],
        {"X_hvg": X[:, marked], "X_state": (X @ rng.normal(size=(GENES, WIDTH))).astype("float32")},
        var={"highly_variable": marked},
    )
    (folder / "cells.toml").write_text('[datasets]\nmine = "cells.h5ad"\n[training]\nmine = "train"\n'
                                       f'[zeroshot]\n"mine.k{TYPES - 1}" = "test"\n[fewshot."mine.k0"]\nval = ["p1"]\n')
    return folder


def train(data: Path, *settings: str) -> dict:
    return train_state.main([*TINY, f"--toml={data / 'cells.toml'}", *settings])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A function: the folder of a run of ours with these settings, trained once. Tests leave it as it is."""
    trained = {}

    def folder_of(*settings: str) -> Path:
        if settings not in trained:
            trained[settings] = tmp_path_factory.mktemp("runs") / "run"
            train(data, *settings, f"--out_dir={trained[settings]}")
        return trained[settings]

    return folder_of


OURS = ("config.json", "metrics.jsonl", "train.log", "summary.json", "results.json", "metrics.csv", "train_state.py",
        "last.pt", "best.pt", "var_dims.json", "cell_type_map.json", "batch_map.json")


def as_arc_state(run: Path, target: str, decoder: bool = True) -> Path:
    """A run of ours with --source_files as arc-state 0.11.1 leaves one: names of numpy, numbers of numpy, the names of
    genes in the checkpoint, and where cells are genes a decoder that it never trained."""
    folder = Path(target)
    shutil.copytree(run, folder)
    for name in OURS:
        (folder / name).unlink()
    for name in ("pert_onehot_map.pt", "batch_onehot_map.torch", "cell_type_onehot_map.torch"):
        vectors = torch.load(folder / name, weights_only=True)
        torch.save({np.str_(key): vector for key, vector in reversed(vectors.items())}, folder / name)
    sizes = read_plain(folder / "var_dims.pkl")
    sizes |= {"gene_dim": np.int64(sizes["gene_dim"]), "pert_names": list(map(np.str_, sizes["pert_names"]))}
    (folder / "var_dims.pkl").write_bytes(pickle.dumps(sizes))
    for file in (folder / "checkpoints").iterdir():
        content = torch.load(file, weights_only=True)
        settings, weights = content["hyper_parameters"], content["state_dict"]
        settings |= {"gene_names": sizes["gene_names"], "gene_dim": np.int64(settings["gene_dim"])}
        if decoder:
            wide = settings["output_dim"]
            settings |= {"gene_decoder_bool": True, "decoder_cfg": {
                "latent_dim": wide, "gene_dim": np.int64(wide), "hidden_dims": [5], "dropout": 0.1}}
            for i, shape in ((0, (5, wide)), (1, (5,)), (4, (wide, 5))):
                weights |= {f"gene_decoder.decoder.{i}.weight": torch.randn(shape),
                            f"gene_decoder.decoder.{i}.bias": torch.randn(shape[0])}
        torch.save(content, file)
    return folder


def cells_of(path: Path | str) -> np.ndarray:
    with H5ad(path) as file:
        return np.concatenate([as_dense(block) for _, _, block in file.matrix(None).blocks()])


def predicted(path: Path | str, out: str, *words: str) -> np.ndarray:
    sample.main([str(path), "--device=cpu", f"--out={out}", *words])
    return cells_of(f"{out}/{'predicted' if any('adata' in word for word in words) else 'pred'}.h5ad")


# ---------------------------------------------------------------------------------------------- their run folders


def test_a_run_folder_of_arc_state_is_sampled_imported_and_started_from(data, runs, capsys):
    """Its data, columns and names are what the folder says; no other setting is given."""
    run = runs("--source_files")
    folder = as_arc_state(run, "theirs")
    ours = predicted(run, "ours")
    capsys.readouterr()
    assert np.allclose(predicted(folder, "a"), ours, atol=1e-5) and ours.std() > 0.1
    assert "the gene decoder of theirs/checkpoints/final.ckpt is left out" in capsys.readouterr().out

    found = prepare_data.main(["import", str(folder), "--out_dir=out/x"])
    assert (found["experiment"], found["step"]) == ("state", 4)
    shutil.rmtree(folder)  # nothing of it is needed any more
    assert np.allclose(predicted("out/x", "b", f"--toml={data / 'cells.toml'}"), ours, atol=1e-5)
    kept = checkpoint.load(Path("out/x"))
    assert {name: kept["config"][name] for name in COLUMNS} == COLUMNS
    assert kept["config"]["toml_config_path"] == str(Path("theirs/data.toml").resolve()).replace(
        str(Path("theirs").resolve()), str(run.resolve()))
    assert kept["extra"]["batches"] == list(BATCHES) and kept["extra"]["perturbations"] == list(PERTS)
    assert kept["extra"]["genes"] == [f"g{i}" for i in range(HVGS)]

    train(data, "--init_from=out/x", "--d_model=32", "--max_steps=1", "--out_dir=tuned")
    assert checkpoint.load(Path("tuned"))["config"]["d_model"] == 16


@pytest.mark.parametrize("content, words", [
    (b"torn", "cannot be read"), ({"p0": 1}, "finite vectors of one length"),
    ({name: torch.ones(9) for name in PERTS}, "vectors of 9 numbers, where this checkpoint reads 3")])
def test_a_folder_whose_perturbations_cannot_be_read_makes_no_run(content, words, runs, capsys):
    folder = as_arc_state(runs("--source_files"), "theirs")
    path = folder / "pert_onehot_map.pt"
    torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
    for file in ("data_module.torch", "config.yaml"):
        (folder / file).unlink()
    assert words in refusal(capsys, prepare_data.main, "import", "theirs", "--out_dir=ours")
    assert not Path("ours").exists()


def test_names_of_a_wrong_kind_are_not_known(runs):
    folder = as_arc_state(runs("--source_files"), "theirs")
    for wrong in (5, "abc", {"p0": 1}, None):
        (folder / "var_dims.pkl").write_bytes(pickle.dumps({"pert_names": wrong, "gene_names": wrong}))
        assert "perturbations" not in convert(folder / "checkpoints/final.ckpt")[3]


def test_a_run_with_source_files_goes_on_as_ours_beside_its_own_ckpt(data, capsys):
    for _ in range(2):
        train(data, "--source_files", "--max_steps=1", "--out_dir=a")
    told = capsys.readouterr()
    assert "nothing was left to train" in told.out and "another system" not in told.err


def test_what_a_checkpoint_computed_wins_over_the_data_of_its_folder(runs):
    folder = as_arc_state(runs("--source_files"), "theirs")
    for file, content in (("checkpoints/final.ckpt", {"embed_key": "X_hvg"}), ("data_module.torch", {})):
        stored = read_checkpoint(folder / file)
        stored.get("hyper_parameters", stored).update(content or {"embed_key": "X_other"})
        stored.get("hyper_parameters", {}).pop("compat_relu", None)  # a setting of ours
        torch.save(stored, folder / file)
    settings = convert(folder / "checkpoints/final.ckpt")[0]
    assert settings["embed_key"] == "X_hvg" and settings["compat_relu"] and settings["pert_col"] == "target"


def test_a_checkpoint_of_smolstate_reads_the_cells_of_its_settings(runs):
    folder = runs("--source_files=smolstate", "--pert_norm", "--keep_last=-1") / "smolstate"
    content = torch.load(folder / "checkpoints/final.ckpt", weights_only=True)
    for settings in (content["hyper_parameters"], content["config"]["model"]["kwargs"]):
        settings.pop("embed_key", None)
    content["config"]["kwargs"]["embed_key"] = "X_state"
    torch.save(content, "final.ckpt")
    assert convert("final.ckpt")[0]["embed_key"] == "X_state"


def test_init_from_takes_a_folder_of_the_source(data, runs, capsys):
    folder = as_arc_state(runs("--source_files"), "theirs")
    frozen = ("--lr=0", "--min_lr=0", "--weight_decay=0", "--max_steps=1")
    train(data, f"--init_from={folder}", "--n_layers=3", *frozen, "--out_dir=tuned")
    assert "taken over from theirs: n_layers = 1" in capsys.readouterr().err
    theirs = read_checkpoint(folder / "checkpoints/final.ckpt")["state_dict"]
    mine = checkpoint.load(Path("tuned"))["model"]
    name = "transformer_backbone.layers.0.mlp.up_proj.weight"
    assert torch.equal(mine[name], theirs[name])


@pytest.mark.parametrize("settings", [
    ("--embed_key=X_state", "--batch_encoder"), ("--embed_key=none", "--output_space=all"), ("--output_space=all",)])
def test_every_space_of_a_run_folder_predicts_as_its_run(settings, runs):
    """Where a decoder was trained it is kept; without X_hvg the cells of a file are found by the names of genes."""
    run = runs("--source_files", *settings)
    folder = as_arc_state(run, "theirs", decoder="none" in settings[0])
    assert np.allclose(predicted(folder, "a"), predicted(run, "b"), atol=1e-5)
    prepare_data.main(["import", str(folder), "--out_dir=x"])
    assert np.allclose(predicted("x", "c"), cells_of("b/pred.h5ad"), atol=1e-5)


def test_control_cells_of_another_file_are_read_by_name_and_batches_by_theirs(data, runs):
    run = runs("--source_files", "--batch_encoder")
    folder = as_arc_state(run, "theirs")
    with H5ad(data / "cells.h5ad") as file:
        targets, lanes = (np.array(names)[codes] for codes, names in map(file.column, ("target", "lane")))
    X = cells_of(data / "cells.h5ad")
    keep = (targets == "ctrl") & (lanes == "b1")  # b1 alone is number 0 in this file, and 1 to the model
    order = np.random.default_rng(1).permutation(GENES)
    write_h5ad("other.h5ad", X[keep][:, order], {"target": targets[keep], "lane": lanes[keep],
                                                 "kind": np.repeat(["k0"], keep.sum())}, [f"g{i}" for i in order])
    words = ("--adata=other.h5ad", "--perturbations=p1")
    found = predicted(folder, "a", *words)
    assert np.allclose(found, predicted(run, "b", *words), atol=1e-5)
    _, model, _, _ = train_state.load_run(folder)
    control = torch.from_numpy(X[keep][:, :HVGS])
    with torch.no_grad():
        alone = [model.eval().predict({"ctrl_cell_emb": control[:, None], "pert_emb": torch.eye(3)[[2]],
                                       "batch": torch.full((len(control), 1), code)})["cells"] for code in (0, 1)]
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)  # so a wrong number would have been seen


def test_a_model_of_batches_without_their_names_is_not_given_others(data, runs, capsys):
    folder = as_arc_state(runs("--source_files", "--batch_encoder"), "theirs")
    (folder / "batch_onehot_map.torch").unlink()
    told = refusal(capsys, sample.main, str(folder), f"--adata={data / 'cells.h5ad'}", "--out=a")
    assert "its checkpoint does not name them" in told and not Path("a").exists()
    sample.main([str(folder), "--device=cpu", "--out=b"])
    assert "knows batches by number" in capsys.readouterr().out


def test_the_checkpoint_of_a_folder_is_the_final_one_or_the_last_or_the_best_or_the_newest():
    names = ["step=2.ckpt", "step=10-val_loss=0.5.ckpt", "best.ckpt", "last.ckpt", "final.ckpt"]
    folder = Path("run/checkpoints")
    folder.mkdir(parents=True)
    assert source_file(Path("run")) is None
    for age, name in enumerate(names):
        (folder / name).write_text("x")
        os.utime(folder / name, (age, age))
        assert source_file(Path("run")) == folder / name == source_file(folder)
    assert source_file(folder / "best.ckpt") == folder / "best.ckpt"  # named


def test_a_run_of_ours_with_source_files_stays_ours(runs):
    run = runs("--source_files")
    assert source_file(run) is None and train_state.load_run(run)[3]["cell_types"]
    shutil.copytree(run, "torn")
    for name in ("last.pt", "best.pt"):
        (Path("torn") / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="best.pt is damaged"):
        train_state.load_run("torn")


def test_a_run_is_not_imported_into_its_own_folder(runs, capsys):
    folder = as_arc_state(runs("--source_files"), "out/theirs")
    before = sorted(folder.rglob("*"))
    for words in ((folder,), (folder / "checkpoints/final.ckpt", f"--out_dir={folder}")):
        told = refusal(capsys, prepare_data.main, "import", *map(str, words))
        assert "holds what is to be imported" in told and sorted(folder.rglob("*")) == before


def test_a_checkpoint_that_does_not_say_its_cells_asks_for_them(runs, capsys):
    shutil.copy(runs("--source_files") / "checkpoints/final.ckpt", "alone.ckpt")
    told = refusal(capsys, sample.main, "alone.ckpt", "--out=a")
    assert "name your TOML, --toml=my.toml" in told and not Path("a").exists() and not Path("data").exists()


@pytest.mark.parametrize("changed, words", [
    ({"activation": "silu"}, "activation: expected"), ({"basal_mapping_strategy": "nearest"}, "expected random|batch"),
    ({"hidden_dim": None}, "d_model: expected"), ({"dropout": 2}, "dropout: expected"),
    ({"pert_dim": -3}, "its settings make no model")])
def test_a_checkpoint_whose_settings_mean_nothing_here_makes_no_run(changed, words, runs, capsys):
    content = torch.load(runs("--source_files") / "checkpoints/final.ckpt", weights_only=True)
    content["hyper_parameters"] |= changed
    torch.save(content, "odd.ckpt")
    assert words in refusal(capsys, prepare_data.main, "import", "odd.ckpt", "--out_dir=ours")
    assert not Path("ours").exists()
    if "hidden_dim" in changed:  # to train from it no other is of any matter
        assert words in refusal(capsys, train_state.main, "--init_from=odd.ckpt", "--out_dir=tuned")
        assert not Path("tuned").exists()


def test_weights_alone_are_refused_with_what_they_are_good_for(runs, capsys):
    content = torch.load(runs("--source_files") / "checkpoints/final.ckpt", weights_only=True)
    torch.save(content["state_dict"], "weights.ckpt")
    for command in (prepare_data.main, sample.main):
        words = ("import", "weights.ckpt") if command is prepare_data.main else ("weights.ckpt",)
        assert "--init_from=FILE --toml=my.toml with the sizes of its model" in refusal(capsys, command, *words)
    content["hyper_parameters"] |= {"embed_key": "X_state", "finetune_vci_decoder": True}
    torch.save(content, "weights.ckpt")
    assert "the decoder of an embedding model (finetune_vci_decoder)" in refusal(capsys, sample.main, "weights.ckpt")
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------- older folders


def older(run: Path, target: str, smol: bool) -> Path:
    """A folder as the State of July 2025 left it, or SmolState, with maps as pickles."""
    folder = as_arc_state(run, target, decoder=False)
    for name in ("batch_onehot_map", "cell_type_onehot_map"):
        vectors = read_checkpoint(folder / f"{name}.torch")
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(vectors))
        (folder / f"{name}.torch").unlink()
    content = read_checkpoint(folder / "checkpoints/final.ckpt")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    settings = content["hyper_parameters"]
    backbone = settings["transformer_backbone_kwargs"]
    del backbone["bidirectional_attention"]  # both always are
    if smol:
        name = "step_4.ckpt"
        (folder / "config.yaml").rename(folder / "config.json")
        del settings["embed_key"], settings["transformer_backbone_kwargs"], settings["transformer_backbone_key"]
        kwargs = {"transformer_backbone_key": "llama", "transformer_backbone_kwargs": backbone}
        content = {"model_state_dict": content["state_dict"], "step": 4, "epoch": 1, "loss": 0.1,
                   "optimizer_state_dict": {}, "hyper_parameters": settings,
                   "config": {"kwargs": {"embed_key": None}, "model": {"name": "state", "kwargs": kwargs}}}
    else:
        name = "step=4-val_loss=1.23.ckpt"
        del settings["basal_mapping_strategy"]
        settings |= {"batch_size": 4, "loss_fn": "mse"}
    torch.save(content, folder / "checkpoints" / name)
    return folder


@pytest.mark.parametrize("smol", [False, True], ids=["july", "smolstate"])
def test_folders_with_pickled_maps_are_read(smol, runs, capsys):
    spaces = ("--embed_key=none", "--output_space=gene", "--pert_norm") if smol else ()
    run = runs("--source_files", "--batch_encoder", *spaces)
    folder = older(run, "theirs", smol)
    assert np.allclose(predicted(folder, "a"), predicted(run, "b"), atol=1e-5)
    cfg, _, step, extra = train_state.load_run(folder)
    assert step == 4 and extra["batches"] == list(BATCHES) and cfg.bidirectional_attention and not cfg.rotary
    assert cfg.embed_key == (None if smol else "X_hvg") and cfg.pert_norm == smol
    assert "knows batches by number" not in capsys.readouterr().out
    prepare_data.main(["import", str(folder / "checkpoints"), "--out_dir=x"])
    assert np.allclose(predicted("x", "c"), cells_of("b/pred.h5ad"), atol=1e-5)


def test_where_no_state_of_the_data_is_left_config_yaml_says_it(runs):
    folder = as_arc_state(runs("--source_files"), "theirs")
    (folder / "data_module.torch").unlink()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["kwargs"] |= {"n_basal_samples": 2, "map_controls": "yes"}  # the one of its type, the other not
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    settings = convert(folder / "checkpoints/final.ckpt")[0]
    assert {name: settings[name] for name in COLUMNS} == COLUMNS
    assert settings["n_basal_samples"] == 2 and "map_controls" not in settings
    (folder / "config.yaml").write_text("data: [1]")
    with pytest.raises(CheckpointError, match="config.yaml does not say data: kwargs:"):
        convert(folder / "checkpoints/final.ckpt")


# ------------------------------------------------------------------------------------------ pickles that run code


class Trap:
    """Runs code when a pickle is read without care."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


TRAPS = {"system": lambda: Trap(os.system, "touch it_ran"), "eval": lambda: Trap(eval, "open('it_ran', 'w')"),
         "open": lambda: Trap(open, "it_ran", "w"),
         "inside a tensor": lambda: Trap(torch.storage._load_from_bytes, in_bytes(Trap(open, "it_ran", "w")))}


def in_bytes(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_no_code_of_a_pickle_runs_and_it_is_refused_in_a_sentence(trap, runs, capsys):
    folder = as_arc_state(runs("--source_files"), "theirs")
    for name in ("batch_onehot_map.pkl", "var_dims.pkl"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / "batch_onehot_map.torch").unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps({"b0": trap()}))
        told = refusal(capsys, sample.main, str(folder), "--out=a")
        assert name in told and "nothing of it was run" in told
        (folder / name).write_bytes(kept) if kept else (folder / name).unlink()
    for name in ("data_module.torch", "pert_onehot_map.pt"):
        torch.save({"toml_config_path": trap(), "p0": trap()}, folder / name)
    with contextlib.suppress(SystemExit):
        sample.main([str(folder), "--out=a"])
    assert not Path("it_ran").exists() and not Path("a").exists()


def test_a_pickle_of_plain_data_is_read_as_it_is():
    content = {np.str_("a"): torch.arange(3.0), "b": [np.int64(3), (1, None)], "c": np.array(["x", "y"]),
               "d": np.array([1, "z"], object), "e": {2.5: {1, 2}}}
    for protocol in (4, 5):
        Path("plain.pkl").write_bytes(pickle.dumps(content, protocol))
        found = read_plain(Path("plain.pkl"))
        assert torch.equal(found["a"], content["a"]) and found["b"] == content["b"] and found["e"] == content["e"]
        assert found["c"].tolist() == ["x", "y"] and found["d"].tolist() == [1, "z"]
    Path("torn.pkl").write_bytes(Path("plain.pkl").read_bytes()[:-20])
    for name in ("torn.pkl", "gone.pkl"):
        with pytest.raises(CheckpointError, match=name):
            read_plain(Path(name))


def test_features_of_perturbations_may_have_names_of_numpy():
    torch.save({np.str_("p0"): torch.ones(2), "p1": torch.zeros(2)}, "features.pt")
    assert {name: vector.tolist() for name, vector in load_features("features.pt").items()} == {
        "p0": [1.0, 1.0], "p1": [0.0, 0.0]}
    assert all(type(name) is str for name in load_features("features.pt"))
    for content in ({np.str_("p0"): Trap(open, "it_ran", "w")}, Trap(open, "it_ran", "w")):
        torch.save(content, "features.pt")
        with pytest.raises(DataError, match="holds other things than tensors"):
            load_features("features.pt")
    assert not Path("it_ran").exists()


# --------------------------------------------------------------------------------------------- ours for their tools


def test_source_files_are_what_the_tools_of_arc_state_look_for(data, runs):
    run = runs("--source_files")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert Path(config["output_dir"], config["name"]) == run.resolve()  # where `tx predict` looks
    assert config["training"]["train_seed"] == 42 and config["model"]["name"] == "state"
    assert config["model"]["kwargs"]["hidden_dim"] == 16
    state = torch.load(run / "data_module.torch", weights_only=True)  # as cell-load reads it
    assert {name: state[name] for name in COLUMNS} == COLUMNS
    assert (state["batch_size"], state["cell_sentence_len"], state["embed_key"]) == (4, 4, "X_hvg")
    assert state["is_log1p"] is True
    theirs, mine = (tomllib.loads(Path(path).read_text()) for path in (state["toml_config_path"], data / "cells.toml"))
    assert Path(theirs["datasets"].pop("mine")) == (data / "cells.h5ad").resolve()
    del mine["datasets"]
    assert theirs == mine | {"datasets": {}}
    vectors = torch.load(state["perturbation_features_file"], weights_only=True)
    assert list(vectors) == list(PERTS) and torch.equal(torch.stack(list(vectors.values())), torch.eye(3))
    for name, weights in (("last", "last.pt"), ("best", "best.pt"), ("final", "best.pt")):
        content = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)
        wanted = checkpoint.load(run / weights)
        assert torch.equal(content["state_dict"]["project_out.0.weight"], wanted["model"]["project_out.0.weight"])
        assert content["global_step"] == (4 if name == "final" else wanted["step"])


@pytest.mark.filterwarnings("ignore:settings without effect")
def test_source_files_count_batches_and_steps_as_the_source_does(data, capsys):
    """A batch of arc-state is that of a micro-step, and its validation counts these; SmolState has no micro-steps."""
    train(data, "--grad_accum=2", "--source_files", "--out_dir=a", "--max_steps=2")
    config = yaml.safe_load(Path("a/config.yaml").read_text())
    named = ("batch_size", "gradient_accumulation_steps", "val_freq", "max_steps")
    assert [config["training"][name] for name in named] == [2, 2, 4, 2]
    assert torch.load("a/data_module.torch", weights_only=True)["batch_size"] == 2
    cfg = configure(train_state.Config, ["a/config.yaml"], train_state.ALIASES, train_state.STATE)  # and back
    assert (cfg.batch_size, cfg.grad_accum, cfg.eval_interval, cfg.max_steps) == (4, 2, 2, 2)
    train(data, "--grad_accum=2", "--source_files=smolstate", "--pert_norm", "--out_dir=b", "--max_steps=2")
    config = json.loads(Path("b/smolstate/config.json").read_text())
    assert [config["training"][name] for name in named] == [4, 1, 2, 2]


def test_where_the_tools_of_the_source_compute_otherwise_is_said(data, capsys):
    train(data, "--embed_key=X_state", "--output_space=embedding", "--source_files", "--max_steps=1", "--out_dir=a")
    told = capsys.readouterr().out
    assert "clip embeddings at 0" in told and "no multiple" not in told
    train(data, "--d_model=18", "--n_heads=4", "--d_head=4", "--source_files", "--max_steps=1", "--out_dir=c")
    assert "d_model be no multiple of n_heads" in capsys.readouterr().out
    train(data, "--source_files", "--max_steps=1", "--out_dir=b", "--batch_col=")
    assert "clip embeddings" not in capsys.readouterr().out
    assert torch.load("b/data_module.torch", weights_only=True)["batch_col"] == "kind"  # it cannot do without


def test_the_layout_of_smolstate(runs):
    run = runs("--source_files=smolstate", "--pert_norm", "--keep_last=-1")
    folder = run / "smolstate"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {
        "config.json", "cell_type_onehot_map.pkl", "pert_onehot_map.pt", "batch_onehot_map.pkl", "var_dims.pkl",
        "data_module.torch", "data.toml", "checkpoints", "checkpoints/last.ckpt", "checkpoints/final.ckpt",
        "checkpoints/step_2.ckpt", "checkpoints/step_4.ckpt"}
    config = json.loads((folder / "config.json").read_text())
    assert config["kwargs"]["pert_col"] == "target" and config["training_spec"] == {"mine": "train"}
    assert config["zeroshot"] == {f"mine.k{TYPES - 1}": "test"} and config["training"]["max_steps"] == 4
    state = torch.load(folder / "data_module.torch", weights_only=True)
    assert len(state) == 11 and state["control_pert"] == "ctrl"
    lanes = read_plain(folder / "batch_onehot_map.pkl")
    assert {name: vector.tolist() for name, vector in lanes.items()} == {"b0": [1.0, 0.0], "b1": [0.0, 1.0]}
    content = torch.load(folder / "checkpoints/step_2.ckpt", weights_only=True)
    assert content["step"] == 2 and content["config"] == config and content["hyper_parameters"]["pert_dim"] == 3
    assert torch.equal(content["model_state_dict"]["pert_norm.weight"],
                       checkpoint.load(run / "step_2.pt")["model"]["pert_norm.weight"])
    assert np.allclose(predicted(folder, "a"), predicted(run, "b"), atol=1e-5)


def test_smolstate_goes_on_from_the_step_of_its_cosine(runs):
    """Its --resume loads these states into an AdamW over all its parameters and a cosine of torch."""
    folder = runs("--source_files=smolstate", "--pert_norm", "--keep_last=-1") / "smolstate"
    content = torch.load(folder / "checkpoints/step_2.ckpt", weights_only=True)
    weights = [torch.nn.Parameter(weight) for weight in content["model_state_dict"].values()]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=1e-6)
    optimizer.load_state_dict(content["optimizer_state_dict"])
    schedule.load_state_dict(content["scheduler_state_dict"])
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for step in (2, 3):
        expected = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * step / 4)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("settings, words", [
    ("", "set pert_norm = true"), ("--pert_norm --lora", "no lora"),
    ("--pert_norm --use_batch_token --basal_mapping_strategy=batch", "no use_batch_token"),
    ("--pert_norm --no-bidirectional_attention", "bidirectional")])
def test_what_smolstate_cannot_load_is_refused_before_training(settings, words, data, capsys):
    told = refusal(capsys, train_state.main, *TINY, f"--toml={data / 'cells.toml'}", "--source_files=smolstate",
                   *settings.split())
    assert "source_files = smolstate" in told and words in told and not Path("out").exists()


def test_tables_come_back_from_their_toml():
    tables = {"datasets": {"a b": "/x/{c,d}/*.h5ad", "e": 'f"\\g'}, "training": {"e": "train"},
              "fewshot": {"e.k0": {"val": ["p,1", "ü"], "test": []}, "n": {"k": {"val": ["q"]}}}}
    assert tomllib.loads("\n".join(toml_lines(tables))) == tables


def test_the_evaluation_of_arc_state_runs_on_a_run_of_ours(runs):
    pytest.importorskip("state")
    run = runs("--source_files")
    done = python("-c", "from state.__main__ import main; main()", "tx", "predict", "--output-dir", run,
                  "--checkpoint", "final.ckpt", "--predict-only", folder=Path.cwd())
    assert done.returncode == 0, done.stderr[-2000:]
    predicted(run, "a")
    for name in PERTS[1:]:
        theirs, ours = perturbed(run / "eval_final.ckpt/adata_pred.h5ad", name), perturbed("a/pred.h5ad", name)
        assert len(theirs) == len(ours) == 10
        assert abs(theirs.mean(0) - ours.mean(0)).max() < 0.1 < ours.mean(0).std()  # they draw other control cells
    shutil.rmtree(run / "eval_final.ckpt")


@pytest.mark.filterwarnings("ignore")  # of its packages
@pytest.mark.parametrize("space", [("X_hvg", "gene"), ("X_state", "gene"), ("null", "all")])
def test_a_folder_that_arc_state_itself_wrote_predicts_the_same(space, data, tmp_path):
    pytest.importorskip("state")
    text = (data / "cells.toml").read_text().replace("cells.h5ad", str(data / "cells.h5ad"))
    Path("whole.toml").write_text(text)
    kwargs = {"toml_config_path": Path("whole.toml").resolve(), "embed_key": space[0], "output_space": space[1],
              "num_workers": 0, **COLUMNS}
    backbone = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "head_dim": 8}
    words = [f"data.kwargs.{name}={value}" for name, value in kwargs.items()]
    words += [f"model.kwargs.transformer_backbone_kwargs.{name}={value}" for name, value in backbone.items()]
    words += ["model.kwargs.cell_set_len=4", "model.kwargs.hidden_dim=16", "model.kwargs.batch_encoder=true",
              "training.max_steps=2", "training.batch_size=2", "training.val_freq=2", "use_wandb=false", "name=theirs",
              f"output_dir={Path.cwd()}"]
    done = python("-c", "from state.__main__ import main; main()", "tx", "train", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]

    from state.tx.models.state_transition import StateTransitionPerturbationModel

    saved = read_checkpoint("theirs/checkpoints/final.ckpt")
    peer = StateTransitionPerturbationModel(**saved["hyper_parameters"])
    peer.load_state_dict(saved["state_dict"])
    cfg, model, step, extra = train_state.load_run("theirs", "cpu")
    assert step == 2 and extra["batches"] == list(BATCHES) and cfg.pert_col == "target"
    cells = torch.rand(5, peer.input_dim)
    batch = {"ctrl_cell_emb": cells, "pert_emb": torch.eye(3)[[1] * 5], "batch": torch.ones(5, dtype=torch.long)}
    with torch.no_grad():
        theirs = peer.eval().predict_step(batch, 0, padded=False)
        ours = model.eval()(batch, padded=False)
        torch.testing.assert_close(ours, theirs["preds"], atol=1e-5, rtol=1e-5)
        written = theirs["pert_cell_counts_preds" if space[0] == "X_state" else "preds"]  # what its own tools write
        torch.testing.assert_close(train_state.expressed(model, ours), written, atol=1e-5, rtol=1e-5)
    assert predicted("theirs", "a").shape[1] == {"X_hvg": HVGS, "X_state": HVGS, "null": GENES}[space[0]]


def perturbed(path: Path | str, name: str) -> np.ndarray:
    """The cells of an h5ad under this perturbation."""
    with H5ad(path) as file:
        codes, names = file.column("target")
    return cells_of(path)[codes == names.index(name)]


# ------------------------------------------------------------------------------------- numbers of the source itself


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_state_reference_numbers_after_import(path):
    """Weights of the source as a .ckpt of Lightning, through the command, against its predictions and losses."""
    settings, arrays = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), np.load(path)
    torch.save({"global_step": 3, "hyper_parameters": settings, "state_dict": {
        name[6:]: torch.tensor(arrays[name]) for name in arrays.files if name.startswith("param.")}}, "theirs.ckpt")
    prepare_data.main(["import", "theirs.ckpt", "--out_dir=ours"])
    cfg, model, step, _ = train_state.load_run("ours", "cpu")
    batch = {name[3:]: torch.tensor(arrays[name]) for name in arrays.files if name.startswith("in.")}
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        found = model.eval().double()(batch)
        per_set = model(batch, losses=True)["per_set"]
    pred = found[0] if isinstance(found, tuple) else found
    wanted = torch.tensor(arrays["out.pred"]).double().reshape(pred.shape)
    torch.testing.assert_close(pred, wanted, atol=1e-5, rtol=0)
    if "out.loss_per_set" in arrays.files:
        wanted = torch.tensor(arrays["out.loss_per_set"]).double().reshape(-1)
        torch.testing.assert_close(per_set, wanted, atol=1e-4, rtol=1e-5)
    assert step == 3 and cfg.cell_set_len == settings["cell_set_len"]


# ------------------------------------------------------------------------------------------------ from Python

MINIMAL = """
from configurator import configure
from train_state import ALIASES, STATE, Config, train
words = "--dialect=smolstate --toml=starter.toml training.max_steps=2 hidden_dim=64 cell_set_len=32".split()
cfg = configure(Config, words, ALIASES, STATE)  # absent settings are SmolState's
summary = train(cfg)  # into cfg.out_dir
"""


def test_the_minimal_training_run_from_python(data):
    with H5ad(data / "cells.h5ad") as file:
        columns = {new: np.array(names, object)[codes].astype("U20") for new, (codes, names) in zip(
            ("target_gene", "cell_type", "batch_var"), map(file.column, ("target", "kind", "lane")), strict=True)}
    columns["target_gene"][columns["target_gene"] == "ctrl"] = "non-targeting"
    X = cells_of(data / "cells.h5ad")
    write_h5ad("cells.h5ad", X, columns, [f"g{i}" for i in range(GENES)], {"X_hvg": X})
    shutil.copy(data / "cells.toml", "starter.toml")
    names = {}
    assert MINIMAL in Path(train_state.__file__).with_name("docs").joinpath("sources.md").read_text()
    exec(MINIMAL, names)  # noqa: S102
    assert names["summary"]["steps"] == 2 and names["summary"]["conditions"] == 2
    cfg = names["cfg"]
    assert (cfg.d_model, cfg.n_layers, cfg.optimizer, cfg.pert_col) == (64, 6, "adamw", "target_gene")
    assert (Path(cfg.out_dir) / "last.pt").exists()
