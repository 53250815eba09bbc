"""Data that are not as they should be, or no longer as they were, in training and prediction as a user runs them."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from commands import refusal

import sample
import train_state
from sources.h5ad import H5ad, write_h5ad

TINY = ("--max_steps=2", "--eval_interval=2", "--d_model=8", "--n_heads=1", "--n_layers=1", "--d_mlp=8", "--device=cpu",
        "--batch_size=2", "--cell_set_len=4", "--val_fraction=0", "--batch_col=", "--embed_key=", "--output_space=all")


@pytest.fixture(autouse=True)
def here(quickly):
    """Stand in an empty folder, and draw no pictures."""


def write_cells(path: str, lost: list[int]) -> None:
    """3 types x 3 perturbations, 12 cells of each; the perturbation of these cells is missing."""
    types, perturbations, _ = np.indices((3, 3, 12)).reshape(3, -1)
    names = np.array(["non-targeting", "p1", "p2"])[perturbations].astype(object)
    names[lost] = None
    X = np.random.default_rng(0).uniform(0.5, 6, (108, 7)).astype(np.float32)
    write_h5ad(path, X, {"cell_type": np.array(list("ABC"))[types], "gene": names}, [f"g{i}" for i in range(7)])


def test_cells_without_a_perturbation_are_left_out_of_training_and_of_prediction_when_asked_for(capsys):
    write_cells("one.h5ad", [3, 100])  # a control cell, and one of p2
    Path("e.toml").write_text('[datasets]\nd = "one.h5ad"\n[training]\nd = "train"\n[zeroshot]\n"d.C" = "test"\n')
    command = ["--toml=e.toml", "--out_dir=run", *TINY]
    told = refusal(capsys, train_state.main, *command)
    assert "2 of 108 rows, first for row 3" in told and "--drop_unlabelled" in told and not Path("run").exists()
    train_state.main([*command, "--drop_unlabelled"])
    sample.main(["run", "--device=cpu"])  # of the run's own settings
    with H5ad("run/predictions/real.h5ad") as file:
        assert file.n_obs == 35 and "100" not in file.obs_names and "99" in file.obs_names

    write_cells("whole.h5ad", [])
    sample.main(["run", "--adata=whole.h5ad", "--device=cpu", "--out=whole"])
    sample.main(["run", "--adata=one.h5ad", "--device=cpu", "--out=one"])
    for folder, count in (("whole", 12), ("one", 11)):
        with H5ad(f"{folder}/predicted.h5ad") as file:
            codes, names = file.column("gene")
            types, type_names = file.column("cell_type")
            of_condition = (codes == names.index("p2")) & (types == type_names.index("C"))
            assert of_condition.sum() == count


def test_prediction_names_the_switch_where_the_run_was_trained_without_it(capsys):
    write_cells("whole.h5ad", [])
    write_cells("one.h5ad", [3, 100])
    Path("e.toml").write_text('[datasets]\nd = "whole.h5ad"\n[training]\nd = "train"\n[zeroshot]\n"d.C" = "test"\n')
    train_state.main(["--toml=e.toml", "--out_dir=run", *TINY])
    command = ["run", "--adata=one.h5ad", "--device=cpu", "--out=one"]
    told = refusal(capsys, sample.main, *command)
    assert "one.h5ad: obs column 'gene' has no value for 2 of 108 rows" in told and "--drop_unlabelled" in told
    found = sample.main([*command, "--drop_unlabelled"])
    assert found["cells"] == 72 - 1


def write_toml(test: str) -> None:
    Path("e.toml").write_text(f'[datasets]\nd = "one.h5ad"\n[training]\nd = "train"\n[zeroshot]\n"d.{test}" = "test"\n')


@pytest.mark.parametrize("change", ["split", "values", "touched"])
def test_a_run_goes_on_only_with_the_cells_and_the_splits_it_began_with(change, capsys):
    write_cells("one.h5ad", [])
    write_toml("C")
    train_state.main(["--toml=e.toml", "--out_dir=run", *TINY])
    if change == "split":
        write_toml("A")  # whose cells have trained
    elif change == "values":
        with h5py.File("one.h5ad", "a") as file:
            file["X"][5, 2] += 1
    else:
        os.utime("one.h5ad", (1, 1))
    longer = ["--toml=e.toml", "--out_dir=run", *TINY, "--max_steps=4", "--resume=run/last.pt"]
    if change == "touched":
        train_state.main(longer)
        assert "resumed from" in capsys.readouterr().out
    else:
        assert "is of other data" in refusal(capsys, train_state.main, *longer)
        assert "is of other data" in refusal(capsys, train_state.main, "--analyze=run", "--device=cpu")
