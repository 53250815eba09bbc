"""Columns of an h5ad file found by what they hold and are called, and the first TOML of its cells."""

import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from commands import refusal
from scipy.sparse import csr_array

import prepare_data
import train_state
from common.errors import DataError
from sources.h5ad import H5ad, write_h5ad
from sources.labels import find_labels, in_words
from sources.splits import read_toml
from sources.starter import make_starter, split_of

TINY = ("--d_model=16 --n_layers=1 --n_heads=2 --d_mlp=16 --cell_set_len=4 --batch_size=2 --max_steps=1 "
        "--warmup_steps=0 --device=cpu --precision=fp32").split()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path: str = "c.h5ad", seed: int = 0, **columns: list) -> None:
    """12 cells for each value of the first column under each of the second, counts of 6 genes.

    columns: name -> its values; those behind the second change from cell to cell.
    """
    names = list(columns)
    grid = np.indices((*(len(columns[name]) for name in names[:2]), 12)).reshape(3, -1)
    obs = {name: np.array(columns[name], object)[codes] for name, codes in zip(names[:2], grid[:2], strict=True)}
    for name in names[2:]:
        obs[name] = np.array(columns[name])[np.arange(grid.shape[1]) % len(columns[name])]
    counts = np.random.default_rng(seed).poisson(3, (grid.shape[1], 6)).astype(np.float32)
    write_h5ad(path, csr_array(counts), obs, [f"g{i}" for i in range(6)])


def words_of(path: str = "c.h5ad", **given: str) -> str:
    with H5ad(path) as cells:
        return find_labels(cells, **given).words()


@pytest.mark.parametrize("columns, words", [
    ({"cell_type": ["B", "T"], "gene": ["non-targeting", "STAT1"], "gem_group": ["1", "2"]},
     "--pert_col=gene --control_pert=non-targeting --cell_type_key=cell_type --batch_col=gem_group"),
    ({"celltype": ["B", "T"], "condition": ["ctrl", "stim"]},
     "--pert_col=condition --control_pert=ctrl --cell_type_key=celltype --batch_col="),
    ({"cell_line": ["K562", "A549"], "product_name": ["DMSO_TF", "(R)-x"], "plate": [7, 8]},
     "--pert_col=product_name --control_pert=DMSO_TF --cell_type_key=cell_line --batch_col=plate"),
    # Of two columns that name a control the better named; a column of anything else is not asked.
    ({"cell_type": ["B"], "target_gene": ["NT", "STAT1"], "guide_note": ["control", "x"]},
     "--pert_col=target_gene --control_pert=NT --cell_type_key=cell_type --batch_col="),
    # No control is known by its name; no type.
    ({"where": ["here", "there"], "treatment": ["zero", "one"]},
     "--pert_col=treatment --control_pert= --cell_type_key= --batch_col="),
])
def test_columns_are_found_by_what_they_hold_and_are_called(columns, words):
    write(**columns)
    assert words_of() == words


def test_a_batch_without_control_cells_is_no_batch():
    write(cell_type=["B", "T"], condition=["ctrl", "stim"], batch=["x", "y"])  # each has both
    assert words_of().endswith("--batch_col=batch")
    write(batch=["x", "y"], condition=["ctrl", "stim"], cell_type=["B", "T"])
    with H5ad("c.h5ad") as cells:
        condition = cells.frame("obs")["condition"]
        sample = np.array(["s0", "s1"])[condition.codes]  # a sample is control or stimulated
        obs = {**cells.frame("obs"), "batch": sample}
    write_h5ad("d.h5ad", csr_array(np.ones((len(sample), 2), np.float32)), obs, ["a", "b"])
    assert words_of("d.h5ad").endswith("--batch_col=")


# ---------------------------------------------------------------------------------------------------------------
# What is asked for and is not there
# ---------------------------------------------------------------------------------------------------------------
def test_all_names_that_are_not_there_are_one_error_with_the_words_to_type(capsys):
    write(celltype=["B", "T"], target_gene=["control", "STAT1"])
    Path("c.toml").write_text('[datasets]\nc = "c.h5ad"\n[training]\nc = "train"\n')
    told = refusal(capsys, train_state.main, "--toml=c.toml", "--counts=convert")
    assert told.count("error:") == 1 and "\n" not in told.strip()
    assert "c.h5ad: no column 'gene' in obs (did you mean 'target_gene'?)" in told
    assert "no column 'cell_type' in obs (did you mean 'celltype'?)" in told
    assert "no column 'gem_group' in obs, nor one like it (empty: all cells are of one)" in told
    assert "none has target_gene = 'non-targeting' (did you mean 'control'?), but 'STAT1', 'control'" in told
    assert "no matrix 'X_hvg': python prepare_data.py state preprocess --input=c.h5ad" in told
    assert "its columns are 'celltype', 'target_gene'" in told
    words = told.split("; try ")[1].split()
    assert words == ["--pert_col=target_gene", "--cell_type_key=celltype", "--batch_col=", "--control_pert=control"]
    right = ["--toml=c.toml", *words, "--embed_key=none", "--output_space=all", "--counts=convert", *TINY]
    assert train_state.main(right)["steps"] == 1  # so typed, it trains


@pytest.mark.parametrize("words, told", [
    # What was typed comes before what a column is usually called.
    ("--pert_col=perts", "no column 'perts' in obs (did you mean 'pert'?)"),
    ("--pert_col=pert --control_pert=vehicles", "none has pert = 'vehicles' (did you mean 'vehicle'?)"),
    ("--pert_col=pert --embed_key=X_scvi", "no matrix 'X_scvi'; there are 'X'"),
])
def test_the_nearest_name_is_suggested(words, told, capsys):
    write(cell_type=["B", "T"], pert=["vehicle", "y"], gem_group=["1"], condition=["control", "z"])
    Path("c.toml").write_text('[datasets]\nc = "c.h5ad"\n[training]\nc = "train"\n')
    assert told in refusal(capsys, prepare_data.main, "cells", "--toml=c.toml", *words.split())


# ---------------------------------------------------------------------------------------------------------------
# What is held out
# ---------------------------------------------------------------------------------------------------------------
def test_held_out_is_the_middle_type_of_those_with_most_perturbations():
    types, perts = ["a", "b", "c", "d"], ["ctrl", "p", "q"]
    cells = np.array([[9, 50, 50], [9, 8, 7], [9, 20, 20], [9, 99, 0]])  # d lacks q
    assert vars(split_of(cells, types, perts, "ctrl")) == {
        "cell_type": "c", "perturbations": [], "cells": 40, "left_out": []}
    cells[2, 0] = 0  # no control cells of c
    split = split_of(cells, types, perts, "ctrl")
    assert split.cell_type == "a" and split.left_out == ["c"]


def test_of_one_type_every_fifth_perturbation_is_held_out_or_nothing_can_be():
    perts = ["ctrl", *(f"p{i}" for i in range(10))]
    split = split_of(np.full((1, 11), 3), ["only"], perts, "ctrl")
    assert split.perturbations == ["p4", "p9"] and split.cells == 6
    assert split_of(np.full((1, 3), 3), ["only"], perts[:3], "ctrl").perturbations == ["p1"]
    with pytest.raises(DataError, match="only is the only cell type, and p0 its only perturbation"):
        split_of(np.full((1, 2), 3), ["only"], perts[:2], "ctrl")
    with pytest.raises(DataError, match="no cell type has both"):
        split_of(np.array([[3, 0], [0, 3]]), ["a", "b"], perts[:2], "ctrl")


# ---------------------------------------------------------------------------------------------------------------
# The TOML, and the next command
# ---------------------------------------------------------------------------------------------------------------
def preprocess(capsys, *words: str) -> list[str]:
    """The words of the next command that preprocess of c.h5ad prints, checked to be the last line."""
    prepare_data.main(["state", "preprocess", "--input=c.h5ad", "--out_dir=data/my cells", *words])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("next: python train_state.py --toml='data/my cells/c.toml' ")
    return shlex.split(last)[3:]


@pytest.mark.parametrize("columns, tables", [
    ({"celltype": ['T "x" cells', "B.1"], "condition": ["ctrl", "stim 1"]}, {"zeroshot": {'c.T "x" cells': "test"}}),
    ({"cell_type": ["THP-1"], "perturbation": ["NT", "A", "B"], "bio_rep": ["r1", "r2", "r3"]},
     {"zeroshot": {"c.r2": "test"}}),
    ({"cell_type": ["THP-1"], "perturbation": ["NT", "A", "B"]}, {"fewshot": {"c.THP-1": {"test": ["B"]}}}),
    ({"what": ["x"], "drug": ["DMSO", "A", "B", "C"]}, {"fewshot": {"c.all": {"test": ["C"]}}}),
])
def test_preprocess_writes_a_toml_and_prints_a_command_that_trains(columns, tables, capsys):
    write(**columns)
    words = preprocess(capsys)
    plan = tomllib.loads(Path("data/my cells/c.toml").read_text())
    assert plan == {"datasets": {"c": "c.h5ad"}, "training": {"c": "train"}, **tables}
    summary = train_state.main([*words, *TINY])
    assert summary["steps"] == 1 and Path("out/c/summary.json").exists()
    assert Path("data/my cells/c.toml").read_text().startswith("# python train_state.py --toml='data/my cells/c.toml'")


def test_a_column_that_may_be_of_cell_types_is_asked_for(capsys):
    write(kind=["T", "B"], drug=["DMSO", "A", "B", "C"])
    prepare_data.main(["state", "preprocess", "--input=c.h5ad", "--out_dir=data"])
    told = capsys.readouterr().out
    assert "1 of 3 perturbations of all cells alike" in told and "--cell_type_key= one of 'kind'?" in told


def test_types_without_control_cells_are_left_out_of_the_toml(capsys):
    write(cell_type=["B", "T", "NK"], gene=["non-targeting", "p", "q"])
    with H5ad("c.h5ad") as cells:
        obs = cells.frame("obs")
        lonely = (obs["cell_type"].codes == 1) & (obs["gene"].codes == 0)  # sorted: NK
        counts = np.concatenate([block.toarray() for _, _, block in cells.matrix("X").blocks()])
    write_h5ad("c.h5ad", csr_array(counts[~lonely]), {name: column[~lonely] for name, column in obs.items()},
               [f"g{i}" for i in range(6)])
    words = preprocess(capsys)
    plan = read_toml("data/my cells/c.toml")
    assert plan.zeroshot == {("c", "B"): "train", ("c", "T"): "test"} and not plan.training
    assert train_state.main([*words, *TINY])["steps"] == 1


def test_a_toml_that_is_there_stays_with_its_columns(capsys):
    write(cell_type=["B", "T"], gene=["non-targeting", "p"], donor=["x", "y"])
    words = preprocess(capsys)
    toml = Path("data/my cells/c.toml")
    assert preprocess(capsys, "--cell_type_key=donor") == words and "--cell_type_key=cell_type" in words
    toml.write_text("# mine\n")
    assert "--cell_type_key=donor" in preprocess(capsys, "--cell_type_key=donor")
    assert toml.read_text() == "# mine\n"
    toml.unlink()
    made = prepare_data.main(["state", "toml", "--input=data/my cells/c.h5ad"])
    assert "is there already" not in capsys.readouterr().out and made["toml"] == str(toml)
    assert read_toml(toml).zeroshot == {("c", "T"): "test"}


def test_names_of_any_signs_make_a_toml_that_is_read():
    write("µ'ü (1).h5ad", cell_type=["B", "T"], gene=["non-targeting", "p"])
    made = prepare_data.main(["state", "toml", "--input=µ'ü (1).h5ad"])
    assert list(read_toml(made["toml"]).zeroshot.values()) == ["test"]
    write("{x}.h5ad", cell_type=["B", "T"], gene=["non-targeting", "p"])
    with pytest.raises(DataError, match="cannot name a path with braces"):
        make_starter(Path("{x}.h5ad"), beside=True)


def test_lists_of_names_are_comments_of_some_lines():
    write(cell_type=["only"], gene=["non-targeting", *(f"a long name of a gene {i}" for i in range(9))])
    starter = make_starter(Path("c.h5ad"), beside=True)
    assert "names alone tell a model nothing" in starter.held_out
    comments = [line for line in starter.text.splitlines() if '"a long name' in line and line.startswith("#")]
    assert len(comments) == 3 and all(len(line) <= 100 and line.count('"') % 2 == 0 for line in comments)
    assert tomllib.loads(starter.text)["fewshot"]


def test_inspect_of_one_type_leaves_its_place_to_replicates(capsys):
    write(cell_type=["only"], gene=["non-targeting", "p"], bio_rep=["r1", "r2", "r3"], size=np.arange(99) / 7)
    prepare_data.main(["inspect", "c.h5ad"])
    told = capsys.readouterr().out.splitlines()
    assert max(map(len, told[:-1])) <= 100 and any("obs size" in line and line.endswith(", ...") for line in told)
    assert told[-1].startswith("next: ")
    prepare_data.main([*shlex.split(told[-1])[3:], "--out_dir=data"])
    assert "held out is r2, 1 of 3 of bio_rep" in capsys.readouterr().out


def test_columns_that_cannot_be_told_are_a_note_and_the_cells_are_written_all_the_same(capsys):
    write(cell_type=["B", "T"], treatment=["zero", "one"])
    prepare_data.main(["state", "preprocess", "--input=c.h5ad", "--out_dir=data"])
    told = capsys.readouterr().err
    assert "no value of treatment looks like the control: say --pert_col=treatment --control_pert= one of" in told
    assert Path("data/c.h5ad").exists() and not Path("data/c.toml").exists()
    prepare_data.main(["state", "toml", "--input=data/c.h5ad", "--pert_col=treatment", "--control_pert=zero"])
    assert "--pert_col=treatment --control_pert=zero --cell_type_key=cell_type" in capsys.readouterr().out
    told = refusal(capsys, prepare_data.main, "state", "toml", "--input=data/c.h5ad", "--pert_col=treat")
    assert re.search(r"no column 'treat' in obs .did you mean 'treatment'.*try --pert_col=treatment", told)


def test_an_h5ad_file_in_the_place_of_a_toml_has_its_starter(capsys):
    write(cell_type=["B", "T"], gene=["non-targeting", "p"])
    preprocess(capsys)
    path = "data/my cells/c.h5ad"
    words = [f"--toml={path}", "--batch_col=", "--out_dir=out/direct"]
    assert train_state.main([*words, *TINY])["steps"] == 1
    assert f"note: {path} is cells and no TOML: held out is T, 1 of 2 cell types (12" in capsys.readouterr().err
    starters = list(Path("data/starters").iterdir())
    assert len(starters) == 1 and read_toml(starters[0]).zeroshot == {("c", "T"): "test"}
    assert train_state.main(["--analyze=out/direct"])["conditions"] == 1  # which finds it again
    assert list(Path("data/starters").iterdir()) == starters
    told = refusal(capsys, train_state.main, f"--toml={path}", "--pert_col=guide")
    assert "no column 'guide' in obs (did you mean 'gene'?)" in told and "'gem_group'" in told


def test_words_are_typed_as_a_shell_reads_them():
    settings = {"pert_col": "a b", "control_pert": "[('DMSO', 0.0)]", "batch_col": ""}
    assert shlex.split(in_words(settings)) == ["--pert_col=a b", "--control_pert=[('DMSO', 0.0)]", "--batch_col="]
