"""Studies of a sweep: a cell type held out at a time, models of one size, and what their runs come to."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from commands import refusal

import sweep
import train_apelr
import train_ghmm
import train_state
from common.errors import DataError, InputError
from measure.holdouts import read_run, study_sections, table
from measure.plans import size_of
from sources.equal_size import parameters_of, resize
from sources.h5ad import write_h5ad
from sources.holdouts import plan
from sources.splits import SPLITS, read_toml


@pytest.fixture(autouse=True)
def here(in_a_folder_of_its_own):
    """Stand in an empty folder."""


# ---------------------------------------------------------------------------------------------------------------
# A cell type held out
# ---------------------------------------------------------------------------------------------------------------
def write_cells(path: str, types: dict[str, str]) -> None:
    """An h5ad of cells of these types: p perturbed, c control cells, three of each letter."""
    cell_types, perturbations = [], []
    for name, letters in types.items():
        for letter in letters:
            cell_types += [name] * 3
            perturbations += ["p" if letter == "p" else "ctrl"] * 3
    X = np.random.default_rng(0).uniform(0.1, 3, (len(cell_types), 5)).astype(np.float32)
    obs = {"gene": np.array(perturbations), "cell_type": np.array(cell_types)}
    write_h5ad(path, X, obs, [f"g{i}" for i in range(5)])


def settings(toml: str = "e.toml", **others) -> train_state.Config:
    return train_state.Config(**{
        "toml_config_path": toml, "embed_key": None, "output_space": "all", "control_pert": "ctrl", "batch_col": None,
        "val_fraction": 0.0, **others,
    })  # fmt: skip


def hold_out(holdout: str = "each", **others) -> list:
    return plan(train_state, settings(**others), SimpleNamespace(holdout=holdout))


def in_splits(variation) -> dict[str, set[str]]:
    """Which cell types have perturbed cells in each split of a variation."""
    cells = train_state.open_data(settings(variation.settings["toml_config_path"]))
    types = {}
    for split in SPLITS:
        types[split] = {cells.cell_types[code] for code in cells.cell_type[cells.rows(split, controls=False)]}
    return types


def test_each_cell_type_is_the_test_of_one_toml_in_which_all_others_train():
    write_cells("one.h5ad", {"a": "pc", "b": "pc", "quiet": "c"})
    write_cells("two.h5ad", {"b": "pc", "c": "pc"})
    # What it holds out itself does not count.
    Path("e.toml").write_text('[datasets]\none = "one.h5ad"\ntwo = "two.h5ad"\n[training]\none = "train"\n'
                              'two = "train"\n[zeroshot]\n"two.c" = "val"\n[fewshot."one.a"]\ntest = ["p"]\n')
    variations = hold_out()
    assert [variation.name for variation in variations] == ["a", "b", "c"]
    for variation in variations:
        name = variation.values["held_out"]
        assert in_splits(variation) == {"train": {"a", "b", "c"} - {name}, "val": set(), "test": {name}}
    # A type of both data sets is held out in both.
    paths = [Path(variation.settings["toml_config_path"]) for variation in variations]
    held_out = read_toml(paths[1]).zeroshot
    assert held_out == {("one", "b"): "test", ("two", "b"): "test"} and read_toml(paths[1]).training == {"one", "two"}
    assert len(list(Path("data/cells").iterdir())) == 1
    # The same command finds the same files, and leaves them alone; from elsewhere they name the same cells.
    before = [path.stat().st_mtime_ns for path in paths]
    assert hold_out() == variations and [path.stat().st_mtime_ns for path in paths] == before
    files = [path.absolute() for path in read_toml(paths[0]).files]
    places = [path.absolute() for path in paths]
    os.chdir("data")
    assert read_toml(places[0]).files == files
    assert sorted(path.name for path in places[0].parent.iterdir()) == ["a.toml", "b.toml", "c.toml"]


def test_what_the_toml_leaves_out_stays_out():
    write_cells("one.h5ad", {"a": "pc", "b": "pc", "c": "pc", "lonely": "p"})
    with pytest.raises(DataError, match="lonely in .*one.h5ad has perturbed cells but no control cells") as error:
        hold_out(toml="one.h5ad", strict=False)
    assert "under [zeroshot]" in str(error.value) and "strict" not in str(error.value)  # which would not help
    Path("e.toml").write_text('[datasets]\none = "one.h5ad"\n[zeroshot]\n"one.a" = "train"\n"one.b" = "test"\n')
    a, b = hold_out()
    assert in_splits(a) == {"train": {"b"}, "val": set(), "test": {"a"}}
    assert in_splits(b) == {"train": {"a"}, "val": set(), "test": {"b"}}
    with pytest.raises(DataError, match="holdout: e.toml has no perturbed cells of 'c' in any split"):
        hold_out("c")
    # Another choice is in another folder: a run may be reading this one.
    Path("e.toml").write_text(Path("e.toml").read_text() + '"one.c" = "train"\n')
    assert [variation.values["held_out"] for variation in hold_out()] == ["a", "b", "c"]
    assert in_splits(a)["train"] == {"b"}
    # A type is left out of one data set, and in two files of another; of a file with its control cells alone it is in.
    write_cells("more.h5ad", {"a": "c", "b": "pc"})
    write_cells("two.h5ad", {"a": "pc", "b": "pc"})
    Path("e.toml").write_text('[datasets]\none = "{one,more}.h5ad"\ntwo = "two.h5ad"\n'
                              '[zeroshot]\n"one.b" = "train"\n"two.b" = "train"\n[fewshot."one.a"]\ntest = ["p"]\n')
    toml = read_toml(hold_out("a")[0].settings["toml_config_path"])
    assert toml.zeroshot == {("one", "a"): "test", ("one", "b"): "train", ("two", "b"): "train"} and not toml.training


def test_cell_types_of_any_name_are_held_out_apart():
    names = ["CD4_T", "CD4%5FT", "CD14+ Mono", 'so "called"/x', "naïve\x7f, T", "a.b", "x" * 300, "x" * 299 + "y"]
    write_cells("one.h5ad", dict.fromkeys(names, "pc"))
    variations = hold_out(toml="one.h5ad")
    assert [variation.values["held_out"] for variation in variations] == sorted(names)
    folders = {variation.name for variation in variations}
    assert len(folders) == len(names) and all(len(name) <= 180 and "/" not in name for name in folders)
    for variation in variations:
        assert in_splits(variation)["test"] == {variation.values["held_out"]}
        assert len(in_splits(variation)["train"]) == len(names) - 1
    # By name, where a comma may be a part of one.
    assert [variation.values["held_out"] for variation in hold_out("a.b,CD4_T", toml="one.h5ad")] == ["a.b", "CD4_T"]
    for listed in (names[4], f"'{names[4]}'"):
        assert [variation.values["held_out"] for variation in hold_out(listed, toml="one.h5ad")] == [names[4]]


@pytest.mark.parametrize("holdout, types, words", [
    ("alpa", {"alpha": "pc", "b": "pc"}, "e.toml has no cell type 'alpa'; did you mean 'alpha'?"),
    ("all", {"alpha": "pc", "b": "pc"}, "; --holdout=each takes all in turn"),
    ("alpha,", {"alpha": "pc", "b": "pc"}, "has no cell type ''"),
    ("quiet", {"alpha": "pc", "b": "pc", "quiet": "c"}, "no perturbed cells of 'quiet' in any split, so there is not"),
    ("b,b", {"alpha": "pc", "b": "pc"}, "names 'b' twice"),
    ("each", {"alpha": "pc", "quiet": "c"}, "has perturbed cells of 'alpha' alone: without that type nothing is left"),
    ("each", {"alpha": "pc", "b": "p"}, "has perturbed cells but no control cells"),
])  # fmt: skip
def test_a_type_that_cannot_be_held_out_is_refused_before_anything_is_written(holdout, types, words):
    write_cells("one.h5ad", types)
    Path("e.toml").write_text('[datasets]\none = "one.h5ad"\n[training]\none = "train"\n')
    with pytest.raises(DataError, match="e.toml|one.h5ad|holdout") as error:
        hold_out(holdout)
    assert words in str(error.value) and not Path("data/holdouts").exists()


def test_only_a_page_of_cells_has_types_to_hold_out():
    with pytest.raises(DataError, match="holdout leaves cell types out, which only train_state.py has"):
        plan(train_ghmm, train_ghmm.Config(), SimpleNamespace(holdout="each"))
    with pytest.raises(DataError, match="there is no file nowhere.h5ad"):
        hold_out(toml="nowhere.h5ad")
    os.mkdir("a{b")
    write_cells("one.h5ad", {"a": "pc", "b": "pc"})
    Path("e.toml").write_text('[datasets]\n"v1.2" = "one.h5ad"\n[training]\n"v1.2" = "train"\n')
    with pytest.raises(DataError, match="e.toml: of the data set 'v1.2' no type can be named, for its name has a dot"):
        hold_out()
    write_cells("a{b/one.h5ad", {"a": "pc", "b": "pc"})
    with pytest.raises(DataError, match="one.h5ad: .datasets. cannot name a path with braces"):
        hold_out(toml="a{b/one.h5ad")


# ---------------------------------------------------------------------------------------------------------------
# What held-out types come to
# ---------------------------------------------------------------------------------------------------------------
def write_run(name: str, cell_type: str, seed: int, model: list, rival: list, cells: str = "c0ffee", script: str = "",
              **others) -> Path:
    """A run folder of train_state.py: Pearson delta and energy distance of the model and of the perturbation mean."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    config = {"seed": seed, "toml_config_path": f"{cell_type}.toml", "out_dir": str(folder), "lr": 1.0, **others}
    (folder / "config.json").write_text(json.dumps(config))
    results = {}
    for who, numbers in (("model", model), ("perturbation_mean", rival)):
        means = dict(zip(("pearson_delta", "energy_distance"), numbers, strict=True))
        record = {"file": f"{cells}.h5ad", "cell_type": cell_type, "perturbation": "p", **means}
        results[who] = {"mean": means, "per_condition": [record]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "summary.json").write_text(json.dumps({"data": {f"{cell_type}.toml": f"{cells}-of {cell_type}"}}))
    (folder / "train_state.py").write_text(script)
    return folder


def test_held_out_types_are_averaged_over_seeds_and_then_over_types():
    runs = [
        write_run("a0", "a", 0, [0.9, 1.0], [0.7, 2.0]),
        write_run("a1", "a", 1, [0.7, 3.0], [0.7, 2.0]),
        write_run("b0", "b", 0, [0.5, 0.0], [0.6, 1.0]),
        write_run("b1", "b", 1, [0.5, 1.0], [0.6, 1.0]),
        write_run("c0", "c", 0, [0.1, None], [None, 1.0]),  # of one gene, say: part of no mean
        write_run("c1", "c", 1, [0.3, None], [None, 1.0]),
    ]
    (section,), lines = study_sections(runs, Path("report"))
    a, b, c, mean = table([read_run(run) for run in runs])
    assert a["Pearson delta"] == pytest.approx(0.8) and a["delta, sd"] == pytest.approx(stdev([0.9, 0.7]))
    assert (b["Pearson delta"], b["delta, perturbation mean"], b["seeds"]) == (0.5, pytest.approx(0.6), 2)
    assert c["Pearson delta"] == pytest.approx(0.2) and c["energy distance"] is None
    assert mean["held out"] == "mean" and mean["seeds"] is None
    assert mean["Pearson delta"] == pytest.approx((0.8 + 0.5) / 2)
    assert mean["delta, perturbation mean"] == pytest.approx((0.7 + 0.6) / 2)
    assert mean["delta, sd"] == pytest.approx(stdev([(0.9 + 0.5 + 0.1) / 3, (0.7 + 0.5 + 0.3) / 3]))
    assert mean["energy distance"] == pytest.approx((2.0 + 0.5) / 2) and mean["energy, sd"] is None
    assert "0.000 above that of the perturbation mean (standard deviation over types 0.141)" in section.text[0]
    assert "2 held-out cell types with 2 seeds each; it is better on 1 of 2" in section.text[0]
    assert "with up to 2 seeds each" in study_sections(runs[1:], Path("report"))[0][0].text[0]
    assert table([read_run(run) for run in runs[1:]])[-1]["delta, sd"] is None  # one seed alone has all types
    assert lines[1].split("  ")[0] == "held out" and lines[4].split()[0] == "c" and "nan" not in "".join(lines)
    shown = section.tables[0]
    assert [row["Pearson delta"].text for row in shown] == [
        "0.800 ± 0.141", "0.500 ± 0.000", "0.200 ± 0.141", "0.650 ± 0.000"]
    assert shown[2]["energy distance"] is None and shown[3]["energy, perturbation mean"].text == "1.500"
    picture, _ = section.pictures[0]
    assert picture == Path("report/plots/holdouts.png") and picture.exists()


def test_one_seed_has_no_spread_and_runs_of_other_settings_are_a_study_of_their_own(monkeypatch):
    monkeypatch.setattr("measure.holdouts.draw", lambda *_: None)  # slow
    runs = [write_run(f"{name}{lr}", name, 0, [lr, 1.0], [0.0, 1.0], lr=lr) for lr in (0.25, 0.5) for name in "ab"]
    sections, lines = study_sections(runs, Path("report"))
    assert [section.title for section in sections] == [f"Each cell type held out, lr = {lr}" for lr in (0.25, 0.5)]
    for section, lr in zip(sections, (0.25, 0.5), strict=True):
        assert [row["Pearson delta"].text for row in section.tables[0]] == [f"{lr:.3f}"] * 3
    assert not any("sd" in name for name in table([read_run(run) for run in runs[:2]])[0])
    assert sections[0].pictures[0][0] != sections[1].pictures[0][0] and len(lines) == 2 * 7
    # The same types of other cells, or by another script, are no seeds.
    others = [write_run(f"other {name}", name, 1, [0.5, 1.0], [0.9, 1.0], "decaf", lr=0.25) for name in "ab"]
    titles = [section.title for section in study_sections([*runs[:2], *others], Path("report"))[0]]
    assert titles == [f"Each cell type held out, cells = {name}.h5ad ({name})" for name in ("c0ffee", "decaf")]
    edited = [write_run(f"edited {name}", name, 1, [0.5, 1.0], [0.9, 1.0], script="#", lr=0.25) for name in "ab"]
    sections, _ = study_sections([*runs[:2], *edited], Path("report"))
    assert [row["seeds"] for section in sections for row in section.tables[0]] == [1, 1, None] * 2
    assert "0.400 below that of the perturbation mean" in sections[1].text[0]
    (runs[0] / "summary.json").write_text(json.dumps({"data": {"a.toml": "0123"}}))  # of before: nothing of the cells
    (runs[1] / "summary.json").write_text(json.dumps({"data": {"b.toml": "4567"}}))
    assert len(study_sections(runs[:2], Path("report"))[0]) == 1
    # No study: one type alone, a run of something else, a damaged one.
    assert study_sections(runs[:1], Path("report")) == ([], [])
    (runs[1] / "results.json").write_text("{")
    assert study_sections(runs, Path("report")) == ([], [])


# ---------------------------------------------------------------------------------------------------------------
# Models of one size
# ---------------------------------------------------------------------------------------------------------------
def with_corpus(vocab_size: int = 500) -> ModuleType:
    """train_apelr.py on a text of so many words, which needs no files."""
    page = ModuleType("train_apelr_on_words")
    page.EXPERIMENT, page.Config, page.build_model = "apelr", train_apelr.Config, train_apelr.build_model
    page.open_data = lambda cfg: SimpleNamespace(vocab_size=vocab_size)
    return page


@pytest.mark.parametrize("others", [{}, {"backbone": "transformer", "n_heads": 2}, {"version": "v1_filtered_mixture"},
                                    {"backbone": "transformer_lm", "token_dim": 128}], ids=str)
def test_plans_of_any_number_get_one_size(others):
    reference = train_apelr.Config(**others)
    wanted = size_of(train_apelr.build_model(reference, 500))
    cfgs = [replace(reference, num_plan_states=K) for K in (1, 2, 4, 8)]
    sizes = []
    for cfg, settings in zip(cfgs, resize(with_corpus(), reference, cfgs), strict=True):
        widths = {name: int(value) for name, value in settings.items()}
        assert widths.get("token_dim", widths["d_model"]) == widths["d_model"]
        sized = replace(cfg, **widths)
        assert sized.check() == [] and replace(sized, **{name: getattr(cfg, name) for name in widths}) == cfg
        sizes.append(size_of(train_apelr.build_model(sized, 500)))
        assert sizes[-1] == parameters_of(train_apelr.build_model, sized, 500)
        assert abs(sizes[-1] / wanted - 1) < 0.03
        assert sized.d_model > 128 or cfg == reference  # fewer plans are wider
    # The reference, where it is one of the runs, stays as it is; a run's width is its own, whatever else is listed.
    assert sizes[-1] == wanted and sized == reference
    assert resize(with_corpus(), reference, cfgs[1:2]) == resize(with_corpus(), reference, cfgs)[1:2]


def test_models_that_cannot_be_of_one_size_are_refused():
    reference = train_apelr.Config()
    two = replace(reference, num_plan_states=2)
    with pytest.raises(DataError, match="equal_parameters makes models of train_apelr.py equal in size"):
        resize(train_ghmm, train_ghmm.Config(), [train_ghmm.Config(n_layers=2)])
    with pytest.raises(DataError, match="equal_parameters decides about d_model: take it out of the lists"):
        resize(with_corpus(), reference, [two, replace(reference, d_model=64)])
    with pytest.raises(DataError, match="equal_parameters: all runs have 769,400 parameters as they are"):
        resize(with_corpus(), reference, [reference, replace(reference, lr=1.0)])
    wide = replace(reference, backbone="transformer", n_heads=32)
    with pytest.raises(InputError, match=r"equal_parameters: no width has within 3% of the [\d,]+ parameters of .* "
                                         r"\(in steps of 64\): change n_heads"):
        resize(with_corpus(), wide, [replace(wide, num_plan_states=1)])


# ---------------------------------------------------------------------------------------------------------------
# As they are typed
# ---------------------------------------------------------------------------------------------------------------
def commands_of(capsys, *words: str) -> list[dict[str, str]]:
    """{setting: value} of each run that a sweep would make, by the commands it shows."""
    capsys.readouterr()
    assert sweep.main([*words, "--print_config"]) == []
    commands = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("python "):
            commands.append(dict(word.removeprefix("--").split("=", 1) for word in shlex.split(line)[2:]))
    return commands


def test_each_type_under_each_seed_is_a_command_that_trains(capsys, quickly):
    write_cells("one.h5ad", {"a": "ppcc", "b_1": "ppcc"})
    words = ["--toml=one.h5ad", "--embed_key=", "--output_space=all", "--control_pert=ctrl", "--batch_col=",
             "--val_fraction=0", "--d_model=8", "--d_mlp=8", "--n_layers=1", "--n_heads=1", "--cell_set_len=4",
             "--batch_size=2", "--max_steps=2"]  # fmt: skip
    commands = commands_of(capsys, "train_state.py", "--holdout=each", "--seed=0,1", "--out_dir=out/types", *words)
    assert [command["out_dir"] for command in commands] == [
        "out/types/a_seed0", "out/types/b%5F1_seed0", "out/types/a_seed1", "out/types/b%5F1_seed1"]
    for command in commands[:2]:
        train_state.main([f"--{name}={value}" for name, value in command.items()])
    folders = [Path(command["out_dir"]) for command in commands]
    (section,), _ = study_sections(folders[:2], Path("report"))
    assert section.tables
    rows = table([read_run(folder) for folder in folders[:2]])
    assert [row["held out"] for row in rows] == ["a", "b_1", "mean"]
    for row, folder in zip(rows[:2], folders[:2], strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        assert row["Pearson delta"] == pytest.approx(summary["pearson_delta"])
        rival = summary["baselines"]["perturbation_mean"]
        assert row["energy, perturbation mean"] == pytest.approx(rival["energy_distance"])


def test_plans_of_one_size_are_swept_over_beside_other_settings(capsys, monkeypatch):
    monkeypatch.setattr(train_apelr, "open_data", lambda cfg: SimpleNamespace(vocab_size=500))
    words = ("train_apelr.py", "--num_plan_states=1,8", "--seed=0,1", "--equal_parameters", "--out_dir=out/plans")
    commands = commands_of(capsys, *words)
    names = [Path(command["out_dir"]).name for command in commands]
    assert names == [f"num_plan_states={K},seed={seed}" for K in (1, 8) for seed in (0, 1)]
    widths = [int(command["d_model"]) for command in commands]
    assert widths[0] == widths[1] > widths[2] == widths[3] == 128


@pytest.mark.parametrize("words, told", [
    (["train_ghmm.py", "--process=mess3,rrxor", "--x=0.1"], "process rrxor has no parameter 'x': it takes p1, p2"),
    (["train_ghmm.py", "--process=mess3,rrxo"], "unknown process 'rrxo', did you mean 'rrxor'?"),
    (["train_state.py", "--holdout=", "--batch_col="], "holdout is empty: --holdout=each, or leave it out"),
    (["train_state.py", "--holdout", "--batch_col="], "--holdout needs a value: --holdout=VALUE"),
    (["train_state.py", "--batch_col="], "no setting lists values"),
    (["train_ghmm.py", "--holdout=each"], "--holdout is of the study of train_state.py"),
    (["train_ghmm.py", "--n_layers=2,4", "--equal_parameters"], "makes models of train_apelr.py equal in size"),
    (["train_apelr.py", "--d_model=64,128", "--equal_parameters"], "equal_parameters decides about d_model"),
])  # fmt: skip
def test_what_cannot_be_swept_over_is_refused_before_the_first_run(words, told, capsys):
    assert told in refusal(capsys, sweep.main, *words) and not Path("out").exists()
