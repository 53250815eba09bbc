"""train_state.py's data: which cells are in which split, how they are drawn, and what a batch holds."""

import json
import math
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from common.errors import DataError
from common.runtime import Runtime
from sources.cell_store import read_rows
from sources.cells import Cells, Reading, inspect, open_cells, survey_toml
from sources.h5ad import H5ad, write_h5ad
from sources.splits import SPLITS, expand_braces, read_toml
from train_state import OF_DATA, Batches, Sentences, make_batch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("REFERENCE_DIR", ROOT / "../shared/reference")) / "state_splits"
TOMLS = sorted(FOLDER.glob("*.toml"))
DEFAULTS = {
    "pert_col": "gene", "cell_type_key": "cell_type", "batch_col": "gem_group", "control_pert": "non-targeting",
    "embed_key": None, "output_space": "gene", "perturbation_features_file": None, "basal_mapping_strategy": "random",
    "n_basal_samples": 1, "should_yield_control_cells": True, "map_controls": True, "downsample_cells": None,
    "cell_set_len": 4, "batch_size": 6, "seed": 0, "strict": True, "zeroshot_controls": True, "val_fraction": 0.0,
    "ram_budget_gb": 8.0, "counts": "auto", "drop_unlabelled": False}  # fmt: skip
TWO = '[datasets]\none = "one.h5ad"\ntwo = "sub/*.h5ad"\n'


@pytest.fixture(autouse=True)
def here(in_a_folder_of_its_own):
    """Stand in an empty folder."""


def settings(toml: str | Path = "e.toml", **changes) -> SimpleNamespace:
    """Settings for this TOML file; a text with a table is written to e.toml first."""
    if "[" in str(toml):
        Path("e.toml").write_text(toml, encoding="utf-8")
        toml = "e.toml"
    return SimpleNamespace(toml_config_path=str(toml), **{**DEFAULTS, **changes})


def cells(path: str, n: int = 120, types="abc", perts: str = "pqr", seed: int = 0, genes: int = 5, **more) -> dict:
    """An h5ad of n cells of random type, perturbation and batch with values in (0, 14); what it has, as arrays."""
    rng = np.random.default_rng(seed)
    obs = {"cell_type": rng.choice(list(types), n), "gem_group": rng.integers(1, 4, n).astype(str),
           "gene": rng.choice(["non-targeting", *perts], n)}
    obs.update(more.pop("obs", {}))
    X = more.pop("X", np.where(rng.random((n, genes)) < 0.4, rng.uniform(0.1, 14, (n, genes)), 0).astype(np.float32))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_h5ad(path, csr_array(X) if more.pop("sparse", False) else X, obs,
               more.pop("var_names", [f"g{i}" for i in range(X.shape[1])]), **more)
    return {**obs, "X": X}


def simple(n: int = 120, **more) -> dict:
    """One file one.h5ad, whose type c is for the test and of whose type b perturbation q validates."""
    made = cells("one.h5ad", n, **more)
    Path("e.toml").write_text('[datasets]\none = "one.h5ad"\n[training]\none = "train"\n[zeroshot]\n"one.c" = "test"\n'
                              '[fewshot."one.b"]\nval = ["q"]\n', encoding="utf-8")
    return made


def survey(cfg: SimpleNamespace) -> Cells:
    """The cells of these settings without their expression."""
    names = [name for name in OF_DATA if name not in ("counts", "ram_budget_gb")]
    return survey_toml(cfg.toml_config_path, Reading(**{name: getattr(cfg, name) for name in names}))


def opened(cfg: SimpleNamespace) -> Cells:
    """The cells of these settings, prepared."""
    return open_cells(toml=cfg.toml_config_path, **{name: getattr(cfg, name) for name in OF_DATA})


def runtime(rank: int = 0, world_size: int = 1) -> Runtime:
    rt = Runtime(SimpleNamespace(seed=7, device="cpu", precision="fp32", compile="false"))
    rt.rank, rt.world_size = rank, world_size
    return rt


def refused(*args, **changes) -> str:
    """The sentence of the DataError that reading this experiment, cells and all, ends with."""
    with pytest.raises(DataError) as error:
        opened(settings(*args, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def kinds(e: Cells, rows) -> set[tuple]:
    return {(e.names[e.file[r]], e.cell_types[e.cell_type[r]], e.perturbations[e.perturbation[r]])
            for r in np.asarray(rows).ravel()}


# ------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.skipif(not TOMLS, reason=f"no TOML in {FOLDER}; set REFERENCE_DIR to the reference folder")
@pytest.mark.parametrize("yields", [True, False])
@pytest.mark.parametrize("toml", TOMLS, ids=lambda path: path.stem)
def test_state_split_reference(toml, yields):
    told = json.loads((FOLDER / "splits.json").read_text(encoding="utf-8"))["splits"]
    told, indices = told[toml.stem + ("" if yields else "|should_yield_control_cells=false")], np.load(
        FOLDER / "indices.npz")
    cfg = settings(toml, embed_key="X_hvg", should_yield_control_cells=yields, strict=False, cell_set_len=32)
    e = survey(cfg)
    for split in SPLITS:
        expected = indices[f"{toml.stem}.{split}"]
        control = indices[f"{toml.stem}.{split}.is_control"] if len(expected) else np.zeros(0, bool)
        order = np.argsort(expected[control <= yields])
        rows = e.rows(split, yields)
        assert np.array_equal(e.row[rows], expected[control <= yields][order]) and len(rows) == told[split]["n_cells"]
        assert np.array_equal(e.is_control[rows], control[control <= yields][order])
        for made in told[split]["subsets"]:
            of_type = rows[np.isin(e.cell_type[rows], [e.cell_types.index(name) for name in made["cell_types"]])]
            counts = np.bincount(e.perturbation[of_type], minlength=len(e.perturbations))
            assert {p: n for p, n in zip(e.perturbations, counts.tolist(), strict=True) if n} == made["perts"]
    for split in ("train", "test"):
        if isinstance(sampler := told.get(f"{split}_sampler"), dict):
            assert len(Sentences(e, split, cfg)) == sampler["n_sentences"]
    for name, value in told.get("var_dims", {}).items():
        found = {"gene_names": len(e.genes), "pert_names": len(e.perturbations)}.get(name)
        assert value == (getattr(e, name) if found is None else found)


MIXED = TWO + """[training]
one = "train"
[zeroshot]
"one.c" = "test"
"two.a" = "val"
"two.x.y" = "train"
[fewshot."one.b"]
val = ["p"]
test = ["q", "r"]
[fewshot."one.c"]
val = ["p"]
[fewshot."two.b"]
test = ["p"]
"""


def two_data_sets() -> None:
    cells("one.h5ad", 200)
    cells("sub/k1.h5ad", 150, types=["a", "b", "c", "x.y"], seed=1)
    cells("sub/k2.h5ad", 100, types=["a", "b", "x.y"], perts="ps", seed=2)


def by_hand(name: str, cell_type: str, pert: str) -> set[str]:
    """The splits of a cell under MIXED, from the rules in words."""
    control = pert == "non-targeting"
    if (name, cell_type) in {("one", "c"), ("two", "a")}:
        return {"test" if name == "one" else "val"} | ({"train"} if control else set())
    if (name, cell_type) == ("one", "b"):
        return {"train", "val", "test"} if control else {{"p": "val", "q": "test", "r": "test"}[pert]}
    if (name, cell_type) == ("two", "b"):
        return {"train", "test"} if control else {"test" if pert == "p" else "train"}
    return {"train"} if (name, cell_type) in {("one", "a"), ("two", "x.y")} else set()


def test_every_cell_of_several_data_sets_is_where_the_rules_put_it():
    two_data_sets()
    e = survey(settings(MIXED))
    assert e.names == ["one", "two", "two"] and len(e.member) == 450 and e.perturbations == [
        "non-targeting", "p", "q", "r", "s"] and e.cell_types == ["a", "b", "c", "x.y"] and e.batches == ["1", "2", "3"]
    members = {split: set(e.rows(split, True).tolist()) for split in SPLITS}
    for row in range(450):
        (kind,) = kinds(e, [row])
        assert {split for split in SPLITS if row in members[split]} == by_hand(*kind), kind
    for f, path in enumerate(e.files):  # the codes are those of the files
        with H5ad(path) as file:
            for column, codes, names in (("gene", e.perturbation, e.perturbations), ("cell_type", e.cell_type,
                                         e.cell_types), ("gem_group", e.batch, e.batches)):
                found, known = file.column(column)
                assert [names[c] for c in codes[e.file == f]] == [known[c] for c in found]
    assert all(set(e.rows(s, False)) == {r for r in members[s] if not e.is_control[r]} for s in SPLITS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("yields", [True, False])
def test_splits_are_those_of_cell_load_where_it_is_installed(yields):
    modules = pytest.importorskip("cell_load.data_modules")
    two_data_sets()
    text = MIXED.replace('test = ["q", "r"]', 'test = ["q", "p", "unknown"]')  # p in val and test: in both
    e = survey(settings(text, strict=False, should_yield_control_cells=yields))
    Path("peer.toml").write_text(text.replace('"one.h5ad"', f'"{Path.cwd()}/one.h5ad"').replace(
        '"sub/*.h5ad"', f'"{Path.cwd()}/sub/*.h5ad"'), encoding="utf-8")
    peer = modules.PerturbationDataModule("peer.toml", num_workers=0, embed_key=None, output_space="all",
                                          should_yield_control_cells=yields)
    peer.setup()
    for split in SPLITS:
        expected = {(subset.dataset.h5_path.resolve(), int(i)) for subset in getattr(peer, f"{split}_datasets")
                    for i in subset.indices}
        found = e.rows(split, yields)
        assert {(e.files[e.file[r]].resolve(), int(e.row[r])) for r in found} == expected and len(found) > 0


def test_controls_of_zeroshot_types_can_be_kept_from_training():
    two_data_sets()
    with_, without = (survey(settings(MIXED, zeroshot_controls=value)) for value in (True, False))
    lost = set(with_.rows("train", True)) - set(without.rows("train", True))
    assert kinds(with_, list(lost)) == {("one", "c", "non-targeting"), ("two", "a", "non-targeting")}
    for split in ("val", "test"):
        assert np.array_equal(with_.rows(split, True), without.rows(split, True))
    sentences = Sentences(without, "train", settings())
    assert not lost & set(np.stack(sentences.plan(0)[1]).ravel())


def test_without_a_val_split_some_conditions_of_train_validate_and_none_of_test():
    cells("one.h5ad", 400)
    text = '[datasets]\none = "one.h5ad"\n[training]\none = "train"\n[zeroshot]\n"one.c" = "test"\n'
    whole, seen = survey(settings(text)), set()
    assert len(whole.rows("val", True)) == 0
    for seed in range(6):
        for fraction, count in ((0.1, 1), (0.34, 2), (0.5, 3), (0.99, 5)):  # of six conditions
            e = survey(settings(text, val_fraction=fraction, seed=seed))
            held = kinds(e, e.rows("val", False))
            assert len(held) == count and held <= {("one", t, p) for t in "ab" for p in "pqr"}
            assert not held & kinds(e, e.rows("train", False))
            together = np.sort(np.append(e.rows("train", False), e.rows("val", False)))
            assert np.array_equal(together, whole.rows("train", False))
            assert all(np.array_equal(e.rows(s, True)[e.is_control[e.rows(s, True)]],
                                      np.flatnonzero(e.is_control & np.isin(e.cell_type, types)))
                       for s, types in (("train", [0, 1, 2]), ("val", sorted({"abc".index(t) for _, t, _ in held}))))
            assert np.array_equal(e.rows("test", True), whole.rows("test", True))
            seen |= held if count == 1 else set()
    assert len(seen) > 1
    cells("one.h5ad", 40, types="a", perts="p")
    assert len(survey(settings(text.split("[zero")[0], val_fraction=0.5)).rows("val", True)) == 0


# --------------------------------------------------------------------------------------------------------- the TOML


TRAIN = '[training]\none = "train"\n'
ONE = '[datasets]\none = "one.h5ad"\n' + TRAIN
TRAPS = {  # what is refused, and with strict=False only told
    ONE + "[zeroshto]\n": r"\[zeroshto\].*did you mean 'zeroshot'",
    ONE.replace('"train"', '"trian"') + '[zeroshot]\n"one.a" = "train"\n': "'trian': only \"train\" counts",
    ONE + '[zeroshot]\n"one.bb" = "test"\n': "no cell type 'bb'; did you mean|no cell type 'bb'.* a, b, c",
    ONE + '[zeroshot]\none = "test"\n': '"one.CELL TYPE" in quotes',
    ONE + '[fewshot.one.a]\nval = ["p"]\n': None,
    ONE + '[fewshot."one.a"]\nval = ["p"]\ntest = ["q", "p"]\n': "has p in val and in test",
    ONE + '[fewshot."one.a"]\ntest = ["p1"]\n': "no a cells of 'p1'",
    ONE + '[fewshot."one.a"]\ntest = ["non-targeting"]\n': "is the control, which is never split",
    ONE + '[fewshot."one.a"]\ntset = ["p"]\n': "tset: only val and test count.*did you mean 'test'",
    '[datasets]\none = "{one,two}.h5ad"\n' + TRAIN: "no h5 or h5ad file at .*two.h5ad",
    '[datasets]\none = "{one,sub/one}.h5ad"\n' + TRAIN: "two files called one: .*rename",
    '[datasets]\none = "one.h5ad"\ntwo = "./one.h5ad"\n' + TRAIN + 'two = "train"\n': "is in the data sets one and two",
}


@pytest.mark.parametrize("text", TRAPS)
def test_what_cell_load_passes_over_is_refused_or_with_strict_false_told(text, capsys):
    cells("one.h5ad"), cells("sub/one.h5ad", seed=1)
    expected = TRAPS[text] or '"one.CELL TYPE" in quotes'
    with pytest.raises(DataError, match=expected):
        survey(settings(text))
    if TRAPS[text] is None:  # an unquoted table is a table of tables: [fewshot] one = {a = ...}
        return
    capsys.readouterr()
    e = survey(settings(text, strict=False))
    assert len(e.rows("train", True)) and capsys.readouterr().err.startswith("note: ")


@pytest.mark.parametrize("text, expected", [
    ("[datasets\n", "cannot be read as TOML"),
    (ONE.replace("one.h5ad", "nowhere"), "nowhere"),
    (ONE.replace("one.h5ad", r"one\u0000.h5ad"), "a NUL character"),
    (ONE.replace('"one.h5ad"', "7"), "should be a path or a pattern"),
    (ONE + 'twoo = "train"\n', r"names the data set 'twoo', which is none of \[datasets\]"),
    (ONE + '[zeroshot]\n"on.a" = "test"\n', "names the data set 'on'.*did you mean 'one'"),
    (ONE + '[zeroshot]\n"one.a" = "tset"\n', "'tset' is none of train, val, test"),
    (ONE + '[fewshot."one.a"]\nval = "p"\n', "should be a list of perturbations"),
    ('datasets = "one.h5ad"\n' + TRAIN, r"should be a table \[datasets\]")])
def test_a_toml_that_means_nothing_is_refused_in_any_case(text, expected):
    cells("one.h5ad")
    for strict in (True, False):
        with pytest.raises(DataError, match=expected):
            survey(settings(text, strict=strict))
    with pytest.raises(DataError, match="missing.toml"):
        read_toml("missing.toml")


def test_a_perturbation_in_val_and_test_is_in_both_as_in_cell_load(capsys):
    made = cells("one.h5ad")
    e = survey(settings(ONE + '[fewshot."one.a"]\nval = ["p"]\ntest = ["p", "q"]\n', strict=False))
    both = np.flatnonzero((made["cell_type"] == "a") & (made["gene"] == "p"))
    assert set(both) == set(e.rows("val", False)) and set(both) < set(e.rows("test", False))
    assert not set(both) & set(e.rows("train", False)) and "has p in val and in test" in capsys.readouterr().err


@pytest.mark.parametrize("text, expected", [
    ("d/a.h5ad", ["d/a.h5ad"]), ("d", ["d/b.h5", "d/z.h5", "d/a.h5ad", "d/c.h5ad"]), ("d/", ["d/b.h5", "d/z.h5",
     "d/a.h5ad", "d/c.h5ad"]), ("d/*.h5ad", ["d/a.h5ad", "d/c.h5ad"]), ("d/{c,a}.h5ad", ["d/c.h5ad", "d/a.h5ad"]),
    ("{e,d}/{a,c}.h5ad", ["e/a.h5ad", "e/c.h5ad", "d/a.h5ad", "d/c.h5ad"]), ("d/[ab].h5*", ["d/b.h5", "d/a.h5ad"]),
    ("{d,f}", ["d/b.h5", "d/z.h5", "d/a.h5ad", "d/c.h5ad", "f/x.h5ad"]), ("[df]", ["d/b.h5", "d/z.h5", "d/a.h5ad",
     "d/c.h5ad", "f/x.h5ad"]), ("d/*", ["d/deeper/n.h5ad"]), ("d/[a-c]*", ["d/b.h5", "d/a.h5ad", "d/c.h5ad"]),
    ("f/?", ["f/x.h5ad"])])
def test_patterns_name_files_relative_to_the_toml(text, expected):
    for name in ("d/a.h5ad", "d/c.h5ad", "d/b.h5", "d/z.h5", "d/deeper/n.h5ad", "d/a.txt", "e/a.h5ad", "e/c.h5ad",
                 "f/x.h5ad"):
        (Path("t") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("t") / name).touch()
    Path("t/e.toml").write_text(f'[datasets]\none = "{text}"\nnot_used = "nowhere"\n[training]\none = "train"\n')
    found = read_toml("t/e.toml", strict="{e,d}" not in text).datasets
    stems = {Path(name).stem: name for name in expected}  # of two files of a stem the last
    assert found == {"one": [Path("t") / stems[stem] for stem in stems]}


def test_patterns_of_the_source_are_relative_to_where_it_is_started():
    """Only where nothing is beside the TOML."""
    for folder in ("t", "d"):
        Path(folder).mkdir()
    Path("t/e.toml").write_text('[datasets]\none = "d/{a,b}.h5ad"\n[training]\none = "train"\n')
    for name in ("d/a.h5ad", "d/b.h5ad"):
        Path(name).touch()
    assert read_toml("t/e.toml").datasets == {"one": [Path("d/a.h5ad"), Path("d/b.h5ad")]}
    Path("t/d").mkdir()
    for name in ("t/d/a.h5ad", "t/d/b.h5ad"):
        Path(name).touch()
    assert read_toml("t/e.toml").datasets == {"one": [Path("t/d/a.h5ad"), Path("t/d/b.h5ad")]}


def test_braces_expand_to_every_combination():
    assert expand_braces("a{b, c}d{e,f}") == ["abde", "abdf", "acde", "acdf"] and expand_braces("a") == ["a"]


# --------------------------------------------------------------------------------------------------- what files lack


def test_braces_nest_and_have_an_end():
    assert expand_braces("{a,{b,c}d}e") == ["ae", "bde", "ae", "cde"]
    assert expand_braces("{a}" * 2_000) == ["a" * 2_000]
    with pytest.raises(DataError, match="stands for more than 10,000 names: use"):
        expand_braces("{a,b}" * 40)
    with pytest.raises(DataError, match="longer than 20,000 characters"):
        expand_braces("a" * 1_000_000)


ODD_TOMLS = {
    "nul": b"[datasets]\na = \"\x00\"",
    "an escaped nul": b'[datasets]\na = "\\u0000.h5ad"\n[training]\na = "train"',
    "brackets": b"a = " + b"[" * 100_000,
    "dots": b"[datasets]\na" + b".a" * 5_000 + b" = 1\n[training]\na = 'train'",
    "a table of dots": b"[zeroshot]\n'one.a'" + b".a" * 5_000 + b" = 1",
    "a long line": b"[datasets]\na = '" + b"x" * 2_000_000 + b"'\n[training]\na = 'train'",
    "a long name": b"[datasets]\na = '" + b"x" * 5_000 + b".h5ad'\n[training]\na = 'train'",
    "a long key": b"y" * 2_000_000 + b" = 1",
    "twice": b"[training]\na = 1\na = 2",
    "not utf-8": b"[datasets]\na = '\xff'",
    "utf-16": "[datasets]".encode("utf-16"),
    "a date": b"[datasets]\na = 2026-01-01\n[training]\na = 'train'",
    "infinity": b"[training]\na = inf",
    "an array": b"[[datasets]]\na = 'b'",
    "a number": b"datasets = 1",
    "lists": b"[zeroshot]\n'a.b' = ['test']",
    "no list": b"[datasets]\na = 'one.h5ad'\n[fewshot.'a.b']\nval = 'p'",
    "numbers in a list": b"[datasets]\na = 'one.h5ad'\n[fewshot.'a.b']\nval = [1]",
    "nothing": b"",
}


@pytest.mark.parametrize("odd", ODD_TOMLS)
def test_an_odd_toml_is_refused_in_a_short_sentence(odd, tmp_path):
    path = tmp_path / "odd.toml"
    path.write_bytes(ODD_TOMLS[odd])
    with pytest.raises(DataError) as error:
        read_toml(path)
    assert str(path) in str(error.value) or "characters: use" in str(error.value)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("kind, told", [
    ("pipe", "is a pipe"), ("folder", "is a folder"), ("circle", "there is no file")])
def test_what_is_no_file_is_no_toml(kind, told, tmp_path):
    path = tmp_path / "odd.toml"
    {"pipe": os.mkfifo, "folder": os.mkdir, "circle": lambda path: path.symlink_to(path)}[kind](path)
    with pytest.raises(DataError, match=told):
        read_toml(path)


def test_files_that_cannot_serve_are_refused_in_a_sentence():
    made = simple()
    told = refused(cell_type_key="celltype")
    assert "one.h5ad: no column 'celltype' in obs (did you mean 'cell_type'?)" in told
    assert "no matrix 'X_hgv'" in refused(embed_key="X_hgv")
    assert "no control cells: none has gene = 'DMSO' (did you mean 'non-targeting'?)" in refused(control_pert="DMSO")
    whole = Path("one.h5ad").read_bytes()
    Path("one.h5ad").write_bytes(whole[: len(whole) // 2])
    assert "one.h5ad: cut short" in refused()
    for bad, text in ((np.nan, "holds nan for cell 17 (17)"), (-1.5, "holds -1.5 for cell 17 (17)")):
        X = made["X"].copy()
        X[17, 3] = bad
        for sparse in (False, True):
            simple(X=X, sparse=sparse)
            assert "one.h5ad: X " + text in refused()


def test_a_cell_type_without_controls_is_refused_or_starts_from_zero(capsys):
    made = cells("one.h5ad", types="abz")
    made["cell_type"][0] = "z"  # the first cell is in no split
    gene = np.where((made["cell_type"] == "b") & (made["gene"] == "non-targeting"), "p", made["gene"])
    cells("one.h5ad", obs={"gene": gene, "cell_type": made["cell_type"]}, obsm={"X_hvg": made["X"] + 1})
    text = '[datasets]\none = "one.h5ad"\n[zeroshot]\n"one.a" = "train"\n"one.b" = "train"\n'
    assert "b in one.h5ad has perturbed cells but no control cells" in refused(text)
    assert "b in one.h5ad" in refused(strict=False)  # zeros are cell-load's way of embeddings only
    cfg = settings(strict=False, embed_key="X_hvg", n_basal_samples=2)
    e = opened(cfg)
    assert capsys.readouterr().err.count("note: b in one.h5ad") == 1
    batches = Batches(runtime(), e, cfg)
    for step in range(8):
        batch = batches(step)
        is_b = torch.from_numpy(e.cell_type[batches.rows(step)[0][:, 0]] == e.cell_types.index("b"))
        assert (batch["ctrl_cell_emb"][is_b] == 0).all() and (batch["ctrl_cell_emb"][~is_b] >= 1).all()


def test_raw_counts_are_refused_converted_or_taken_as_they_are(capsys):
    counts = np.random.default_rng(5).poisson(0.5, (120, 5)).astype(np.float32)
    counts[3] = 0
    for sparse in (False, True):
        simple(X=counts, sparse=sparse, layers={"log": np.log1p(counts) / 3})
        told = refused()
        assert "holds raw counts up to" in told and "preprocess" in told and "counts=convert" in told
        expected = np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)
        for how, values in (("convert", expected), ("counts", counts), ("log1p", counts)):
            for budget in (8.0, 1e-6):
                e = opened(settings(counts=how, ram_budget_gb=budget))
                rows = e.rows("train", True)
                assert np.allclose(e.read(rows), values[rows], rtol=1e-6) and e.streamed == (budget < 1)
        e = opened(settings(counts="convert", embed_key="log", output_space="embedding"))  # log1p already: stays
        assert np.allclose(e.read(rows), np.log1p(counts[rows]) / 3)
    simple(obsm={"X_hvg": counts, "X_state": counts - 3})
    assert "counts=convert" not in refused(embed_key="X_hvg", counts="convert")
    e = opened(settings(embed_key="X_state", output_space="embedding"))  # an embedding may be anything
    assert np.array_equal(e.read(rows), counts[rows] - 3)


# ---------------------------------------------------------------------------------------------------- several files


def aligned(names: list[str], **changes) -> tuple[Cells, dict, dict]:
    """Two files, the second with its genes called so."""
    one, two = cells("one.h5ad"), cells("sub/two.h5ad", seed=3, genes=len(names), var_names=names, sparse=True)
    text = TWO + TRAIN + 'two = "train"\n'
    return opened(settings(text, **changes)), one, two


@pytest.mark.parametrize("budget", [8.0, 1e-6])
def test_genes_of_several_files_are_aligned_by_name(budget, capsys):
    e, one, two = aligned(["g3", "g1", "g0", "g4", "g2"], ram_budget_gb=budget)
    expected = np.concatenate([one["X"], two["X"][:, [2, 1, 4, 0, 3]]])
    assert e.genes == [f"g{i}" for i in range(5)]
    rows = np.random.default_rng(0).permutation(240)
    assert np.array_equal(e.read(rows), expected[rows])
    with pytest.raises(DataError, match="different genes in X: 2 genes in one only, such as g4"):
        aligned(["g3", "g1", "g0", "other", "g2"])
    e, one, two = aligned(["g3", "g1", "g0", "other", "g2", "more"], strict=False, ram_budget_gb=budget)
    assert e.genes == ["g0", "g1", "g2", "g3"] and e.input_dim == 4 and "note: " in capsys.readouterr().err
    expected = np.concatenate([one["X"][:, :4], two["X"][:, [2, 1, 4, 0]]])
    assert np.array_equal(e.read(rows), expected[rows])
    with pytest.raises(DataError, match="no gene in common"):
        aligned(list("vwxyz"), strict=False)
    with pytest.raises(DataError, match="two.h5ad has several genes of the name 'g3'"):
        aligned(["g3", "g3", "g0", "g1", "g2"])


def test_embeddings_need_one_width_and_hvg_have_names():
    mask, hvg = np.array([True, False, True, False, True]), np.ones((120, 3), np.float32) / 3
    cells("one.h5ad", obsm={"X_hvg": hvg, "X_state": np.ones((120, 7))}, var={"highly_variable": mask})
    cells("sub/two.h5ad", obsm={"X_hvg": hvg, "X_state": np.ones((120, 6))}, var={"highly_variable": mask})
    text = TWO + TRAIN + 'two = "train"\n'
    assert survey(settings(text, embed_key="X_hvg")).genes == ["g0", "g2", "g4"]
    with pytest.raises(DataError, match="X_state has 7 columns in .*one.h5ad but 6 in .*two.h5ad"):
        survey(settings(text, embed_key="X_state"))
    e = survey(settings(ONE, embed_key="X_state"))
    assert e.genes[:2] == ["X_state_0", "X_state_1"] and e.count_genes == ["g0", "g2", "g4"]
    assert (e.input_dim, e.output_dim, e.gene_dim, e.hvg_dim, e.pert_dim, e.batch_dim) == (7, 7, 5, 3, 4, 3)


@pytest.mark.parametrize("form", ["npz", "pt"])
def test_features_of_perturbations_come_from_a_file(form):
    simple()
    table = {name: np.random.default_rng(ord(name)).normal(size=3).astype(np.float32) for name in "pqrz"}
    path = f"features.{form}"

    def save(table: dict) -> None:
        if form == "npz":
            np.savez(path, **table)
        else:
            torch.save({k: torch.from_numpy(v) for k, v in table.items()}, path)

    save(table)
    cfg = settings(perturbation_features_file=path)
    e = opened(cfg)
    assert e.pert_dim == 3 and np.array_equal(e.perturbation_features, np.stack([np.zeros(3), *map(table.get, "pqr")]))
    batches = Batches(runtime(), e, cfg)
    batch, pert = batches(0), e.perturbation[batches.rows(0)[0][:, 0]]
    assert torch.equal(batch["pert_emb"], e.perturbation_features[pert]) and batch["pert_emb"].shape == (6, 3)
    save({"p": table["p"], "q": table["q"]})
    assert "no vector for 1 perturbation, such as 'r'" in refused(perturbation_features_file=path)
    assert (survey(settings(perturbation_features_file=path, strict=False)).perturbation_features[3] == 0).all()
    save({"p": table["p"], "q": np.ones(2, np.float32)})
    assert "vectors of one length" in refused(perturbation_features_file=path)
    for damaged in (b"nonsense", Path(path).read_bytes()[:150], b""):
        Path(path).write_bytes(damaged)
        assert f"{path} cannot be read" in refused(perturbation_features_file=path)
    assert "nowhere.pt cannot be read" in refused(perturbation_features_file="nowhere.pt")
    assert torch.equal(survey(settings()).perturbation_features, torch.eye(4))


# ---------------------------------------------------------------------------------------------------------- sentences


def groups_of(e: Cells, rows: np.ndarray, batch: bool) -> list[tuple]:
    return list(zip(*(code[rows].tolist() for code in (e.file, e.cell_type, e.perturbation, *([e.batch] * batch))),
                    strict=True))


@pytest.mark.parametrize("strategy", ["random", "batch"])
@pytest.mark.parametrize("yields", [True, False])
def test_an_epoch_has_every_cell_in_sets_of_one_kind_completed_from_it(strategy, yields):
    two_data_sets()
    cfg = settings(MIXED, basal_mapping_strategy=strategy, should_yield_control_cells=yields, n_basal_samples=3)
    e, batch = survey(cfg), strategy == "batch"
    for split in ("train", "val"):
        rows, sentences = e.rows(split, yields), Sentences(e, split, cfg)
        sizes = {}
        for group in groups_of(e, rows, batch):
            sizes[group] = sizes.get(group, 0) + 1
        assert len(sentences) == sum(math.ceil(n / 4) for n in sizes.values())
        plans = [sentences.plan(epoch) for epoch in (0, 1)]
        for targets, controls in plans:
            assert targets.shape == (len(sentences), 4) and controls.shape == (len(sentences), 4, 3)
            assert all(len(set(groups_of(e, target, batch))) == 1 for target in targets)
            assert set(targets.ravel()) == set(rows)
            for target, control in zip(targets.ravel(), controls.reshape(-1, 3), strict=True):
                pool = e.is_control & (e.file == e.file[target]) & (e.cell_type == e.cell_type[target])
                pool &= (e.batch == e.batch[target]) | (not batch)
                assert pool[control].all() and set(control) <= set(e.rows(split, True))
            whole = [group for group in sizes if sizes[group] % 4 == 0]
            inside = [t for t in targets if groups_of(e, t, batch)[0] in whole]
            assert whole and len(set(np.ravel(inside))) == np.size(inside)  # none twice unless it must
        together = [{tuple(sorted(t)) for t in targets.tolist() if sizes[groups_of(e, np.array(t), batch)[0]] > 8}
                    for targets, _ in plans]  # not only another order, other company
        assert len(together[0] & together[1]) < 0.2 * len(together[0]) or len(together[0]) < 9
        again, other = (Sentences(e, split, SimpleNamespace(**{**vars(cfg), "seed": seed})).plan(1) for seed in (0, 1))
        assert all(np.array_equal(a, b) for a, b in zip(again, plans[1], strict=True))
        assert not np.array_equal(other[0], plans[1][0])


@pytest.mark.parametrize("strategy", ["random", "batch"])
def test_a_test_has_every_cell_once_and_its_last_sets_are_short(strategy):
    two_data_sets()
    cfg = settings(MIXED, basal_mapping_strategy=strategy)
    e, batch = survey(cfg), strategy == "batch"
    targets, controls = zip(*Sentences(e, "test", cfg).whole(), strict=True)
    assert np.array_equal(np.sort(np.concatenate(targets)), e.rows("test", True))
    assert all(len(set(groups_of(e, t, batch))) == 1 and c.shape == (len(t), 1) for t, c in
               zip(targets, controls, strict=True))
    lengths = {}
    for target in targets:
        lengths.setdefault(groups_of(e, target, batch)[0], []).append(len(target))
    assert all(set(n[:-1]) <= {4} and 1 <= n[-1] <= 4 for n in lengths.values()) and min(map(min, lengths.values())) < 4


def test_every_control_is_drawn_equally_often():
    simple(300)
    cfg = settings()
    e = survey(cfg)
    sentences, counts = Sentences(e, "train", cfg), np.zeros(300)
    for epoch in range(40):
        np.add.at(counts, sentences.plan(epoch)[1].ravel(), 1)
    for code in range(3):
        found = counts[e.is_control & (e.cell_type == code)]
        assert found.min() > 0 and ((found - found.mean()) ** 2 / found.mean()).sum() < 1.6 * len(found)  # chi squared
    assert counts[~e.is_control].sum() == 0


def test_a_batch_without_controls_takes_those_of_the_type(capsys):
    made = cells("one.h5ad", types="a")
    gene = np.where((made["gem_group"] == "2") & (made["gene"] == "non-targeting"), "p", made["gene"])
    cells("one.h5ad", types="a", obs={"gene": gene})
    cfg = settings(ONE, basal_mapping_strategy="batch")
    e = survey(cfg)
    targets, controls = Sentences(e, "train", cfg).plan(0)
    told = capsys.readouterr().err
    assert "batch '2' has no a control cells" in told and told.count("note") == 1
    code = e.batches.index("2")
    for target, control in zip(targets, controls, strict=True):
        found = set(e.batch[control].ravel())
        assert e.is_control[control].all() and (found <= {0, 2} if e.batch[target[0]] == code else
                                                found == {e.batch[target[0]]})
    assert set(e.batch[controls[e.batch[targets[:, 0]] == code]].ravel()) == {0, 2}


def test_control_targets_start_from_another_control_or_from_themselves():
    simple()
    for mapped in (True, False):
        cfg = settings(map_controls=mapped, n_basal_samples=2)
        e = survey(cfg)
        targets, controls = Sentences(e, "train", cfg).plan(0)
        same = (controls == targets[..., None]).all(-1)[e.is_control[targets]]
        assert same.mean() < 0.5 if mapped else same.all()
        assert e.is_control[controls].all()


def test_downsample_keeps_a_seeded_choice_of_every_group():
    two_data_sets()
    chosen = []
    for seed in (0, 0, 1):
        cfg = settings(MIXED, downsample_cells=3, seed=seed, cell_set_len=2)
        e = survey(cfg)
        sentences = Sentences(e, "train", cfg)
        kept = [set(sentences.plan(epoch)[0].ravel()) for epoch in (0, 1, 2)]
        assert kept[0] == kept[1] == kept[2] < set(e.rows("train", True))
        sizes, all_of = ({g: groups.count(g) for g in groups} for groups in
                         (groups_of(e, np.array(sorted(rows)), False) for rows in (kept[0], e.rows("train", True))))
        assert sizes == {group: min(n, 3) for group, n in all_of.items()}
        chosen.append(kept[0])
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_split_without_cells_is_refused():
    cells("one.h5ad")
    cfg = settings('[datasets]\none = "one.h5ad"\n[zeroshot]\n"one.a" = "test"\n', zeroshot_controls=False)
    with pytest.raises(DataError, match="e.toml has no cells to train on: see python prepare_data.py inspect e.toml"):
        Sentences(survey(cfg), "train", cfg)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("form", ["dense", "csr", "X_hvg"])
def test_a_batch_holds_the_cells_of_the_plan(form):
    hvg = np.random.default_rng(2).uniform(0.1, 9, (120, 3)).astype(np.float32)
    made = simple(sparse=form == "csr", obsm={"X_hvg": hvg})
    cfg = settings(embed_key="X_hvg" if form == "X_hvg" else None, n_basal_samples=2)
    X, e = hvg if form == "X_hvg" else made["X"], opened(cfg)
    batches = Batches(runtime(), e, cfg)
    for step in range(12):
        (targets, controls), batch = batches.rows(step), batches(step)
        assert targets.shape == (6, 4) and np.array_equal(batch["pert_cell_emb"], X[targets])
        assert np.allclose(batch["ctrl_cell_emb"], X[controls].mean(2), rtol=1e-6)
        assert np.array_equal(np.array(e.batches)[batch["batch"]], made["gem_group"][targets])
        assert (np.array(e.perturbations)[batch["pert_emb"].argmax(1)][:, None] == made["gene"][targets]).all()
        assert batch["pert_emb"].sum() == 6 and batch["batch"].dtype == torch.int64
        assert "pert_cell_counts" not in batch


@pytest.mark.parametrize("space", ["gene", "all", "embedding"])
def test_a_decoder_gets_the_genes_of_the_targets(space):
    hvg, state = np.random.default_rng(2).uniform(0.1, 9, (2, 120, 3)).astype(np.float32)
    made = simple(sparse=True, obsm={"X_hvg": hvg, "X_state": -state})
    cfg = settings(embed_key="X_state", output_space=space)
    e = opened(cfg)
    batches = Batches(runtime(), e, cfg)
    batch, (targets, _) = batches(0), batches.rows(0)
    assert np.array_equal(batch["pert_cell_emb"], -state[targets])
    expected = {"gene": hvg, "all": made["X"]}.get(space)
    assert ("pert_cell_counts" in batch) == e.needs_counts == (expected is not None)
    assert expected is None or np.array_equal(batch["pert_cell_counts"], expected[targets])
    assert not survey(settings(embed_key="X_hvg")).needs_counts
    assert survey(settings(embed_key="X_hvg", output_space="all")).needs_counts
    assert not survey(settings(output_space="all")).needs_counts


def test_a_batch_is_a_function_of_seed_and_step_ranks_share_it_and_epochs_have_no_seam():
    two_data_sets()
    cfg = settings(MIXED)
    e = opened(cfg)
    drawn = Batches(runtime(), e, cfg)
    forward = [drawn(step) for step in range(40)]
    n = len(drawn.sentences)
    assert 2 * n < 40 * 6 and n % 6  # three epochs, and batches across their ends
    targets = np.concatenate([drawn.rows(step)[0] for step in range(40)])
    for epoch in (0, 1):
        assert np.array_equal(targets[epoch * n : (epoch + 1) * n], drawn.sentences.plan(epoch)[0])
    for step in (39, 3, 17, 0):
        parts = [Batches(runtime(rank, 2), e, cfg)(step) for rank in (0, 1)]
        for key, value in forward[step].items():
            assert torch.equal(drawn(step)[key], value)
            assert torch.equal(torch.stack([part[key] for part in parts], 1).flatten(0, 1), value)


def packed(path: str, key: str = "X") -> None:
    """Rewrite a matrix in compressed chunks."""
    with h5py.File(path, "r+") as file:
        node = file[key]
        for name in list(node) if isinstance(node, h5py.Group) else [""]:
            part, where = (node[name], f"{key}/{name}") if name else (node, key)
            values, attributes = part[:], dict(part.attrs)
            del file[where]
            file.create_dataset(where, data=values, compression="gzip", chunks=True).attrs.update(attributes)


def replace_matrix(path: str, X: np.ndarray, form: str) -> None:
    """X as float64, or in CSC, in the place of the one that is there."""
    with h5py.File(path, "r+") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        if form == "dense64":
            file.create_dataset("X", data=X).attrs.update(attributes)
            return
        by_column, group = csr_array(X.T), file.create_group("X")
        group.attrs.update({**attributes, "encoding-type": "csc_matrix"})
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(by_column, name))


FORMS = ["dense", "dense64", "dense packed", "csr", "csr packed", "csc", "nearly dense csr"]


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_the_budget_is_streamed_to_the_same_bits(form):
    rng = np.random.default_rng(1)
    X = np.where(rng.random((300, 40)) < (0.9 if "nearly" in form else 0.3), rng.uniform(0.1, 14, (300, 40)), 0)
    X = X if form == "dense64" else X.astype(np.float32)
    X[[0, 5, 299]] = 0  # empty rows, the last one too
    simple(300, X=X, sparse="cs" in form)
    if form in ("dense64", "csc"):
        replace_matrix("one.h5ad", X, form)
    elif "packed" in form:
        packed("one.h5ad")
    drawn = []
    for budget in (8.0, 1e-5):
        cfg = settings(ram_budget_gb=budget)
        drawn.append(Batches(runtime(), opened(cfg), cfg))
    held, streamed = (batches.cells for batches in drawn)
    assert (held.streamed, streamed.streamed) == (False, True) and held.store == streamed.store
    names = {file.name for file in held.store.iterdir()}
    assert ("input.npy" in names) == ("dense" in form) and ("input_indptr.npy" in names) == ("dense" not in form)
    for step in range(10):
        (one, two), (targets, _) = (batches(step) for batches in drawn), drawn[0].rows(step)
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert np.array_equal(one["pert_cell_emb"], X[targets].astype(np.float32))
    for cells in (held, streamed):
        assert cells.read(np.zeros(0, int)).shape == (0, 40)
        assert np.array_equal(cells.read(np.arange(300)), X.astype(np.float32))


@pytest.mark.parametrize("form", ["dense", "csr packed"])
def test_streaming_keeps_to_the_budget(form):
    rng = np.random.default_rng(1)
    X = np.where(rng.random((4_000, 1_500)) < (0.9 if form == "dense" else 0.3), 2.5, 0).astype(np.float32)
    X *= rng.random((4_000, 1), np.float32)
    simple(4_000, X=X, sparse=form != "dense")  # 24 MB dense, 14 MB sparse
    if form != "dense":
        packed("one.h5ad")
    cfg = settings(ram_budget_gb=8e-3, batch_size=2)
    tracemalloc.start()
    batches = Batches(runtime(), opened(cfg), cfg)  # makes the folder too
    for step in range(30):
        batches(step)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert batches.cells.streamed and peak < 8


def test_make_batch_takes_a_short_sentence_of_the_test():
    made = simple()
    cfg = settings()
    e = opened(cfg)
    targets, controls = min(Sentences(e, "test", cfg).whole(), key=lambda sentence: len(sentence[0]))
    batch = make_batch(e, targets[None], controls[None], torch.device("cpu"))
    assert len(targets) < 4 and np.array_equal(batch["pert_cell_emb"][0], made["X"][targets])
    assert np.array_equal(batch["ctrl_cell_emb"][0], made["X"][controls[:, 0]])


def test_without_a_batch_column_all_cells_are_of_one_batch():
    simple()
    e = survey(settings(batch_col=None))
    assert e.batches == ["all"] and e.batch_dim == 1 and not e.batch.any()


def test_inspect_counts_what_the_splits_hold(capsys):
    two_data_sets()
    cfg = settings(MIXED)
    names = ("pert_col", "control_pert", "embed_key", "val_fraction")
    e, found = survey(cfg), inspect("e.toml", **{name: getattr(cfg, name) for name in names})
    assert not Path("data").exists()  # nothing is prepared
    told = capsys.readouterr().out
    for split in SPLITS:
        rows, made = e.rows(split, True), found["splits"][split]
        assert made["perturbed"] + made["control"] == len(rows) == sum(made["cell_type"].values())
        assert made["perturbation"]["non-targeting"] == made["control"] == e.is_control[rows].sum()
        assert made["cell_type"] == {t: n for t in e.cell_types if (n := int((e.cell_type[rows]
                                     == e.cell_types.index(t)).sum()))}
    line = next(line for line in told.splitlines() if line.startswith("cell_type x.y"))
    assert line.split()[2:] == [str(found["splits"]["train"]["cell_type"]["x.y"]), "-", "-"]
    assert f"; in no split: {(e.member == 0).sum()} cells" in told
    assert told.splitlines()[-1] == ("next: python train_state.py --toml=e.toml --pert_col=gene "
                                     "--control_pert=non-targeting --cell_type_key=cell_type --batch_col=gem_group "
                                     "--embed_key=none --output_space=all")


# ------------------------------------------------------------------------------------------- files in other forms


def test_no_embed_key_is_x_however_it_is_said():
    simple()
    for embed_key in (None, ""):
        e = opened(settings(embed_key=embed_key, output_space="all"))
        assert e.count_genes is None and e.genes == [f"g{i}" for i in range(5)]


HVG = ["g4", "g0", "g2"]  # in the order of the columns of X_hvg
MARKED = np.isin(np.arange(5), [0, 2, 4])


def named_hvg(path: str, form: str, seed: int, order: list[str] = HVG) -> np.ndarray:
    """A file whose X_hvg says in this form which genes its columns are; X_hvg in the order g0, g2, g4."""
    if form in ("bools", "integers", "nullable", "words"):
        order = ["g0", "g2", "g4"]  # where genes are marked, columns are in the order of var
    places = [int(name[1:]) for name in order]
    X = np.random.default_rng(seed).uniform(0.1, 9, (120, 5)).astype(np.float32)
    forms = {
        "uns": {"uns": {"X_hvg_var_names": np.array(order)}}, "old uns": {"uns": {"hvg_names": np.array(order)}},
        "bools": {"var": {"highly_variable": MARKED}}, "integers": {"var": {"highly_variable": MARKED.astype(np.int8)}},
        "words": {"var": {"highly_variable": np.where(MARKED, "True", "False")}}}
    cells(path, X=X, obsm={"X_hvg": X[:, places]}, **forms.get(form, {}))
    with h5py.File(path, "a") as file:
        if form == "nullable":
            column = file["var"].create_group("highly_variable")
            column["values"], column["mask"] = np.arange(5) != 3, ~MARKED & (np.arange(5) != 3)
            file["var"].attrs["column-order"] = ["highly_variable"]
        if form == "table":
            del file["obsm/X_hvg"]
            table = file["obsm"].create_group("X_hvg")
            table.attrs.update({"encoding-type": "dataframe", "_index": "_index", "column-order": order})
            table["_index"] = [str(i) for i in range(120)]
            for name, place in zip(order, places, strict=True):
                table[name] = X[:, place]
    return X[:, [0, 2, 4]]


@pytest.mark.parametrize("form", ["uns", "old uns", "bools", "integers", "nullable", "words", "table"])
def test_columns_of_hvg_are_put_together_by_name_however_a_file_names_them(form):
    one = named_hvg("one.h5ad", "bools", 1)
    two = named_hvg("sub/two.h5ad", form, 2)
    e = opened(settings(TWO + TRAIN + 'two = "train"\n', embed_key="X_hvg"))
    assert e.genes == ["g0", "g2", "g4"]
    assert np.array_equal(e.read(np.arange(240)), np.concatenate([one, two]))


def test_hvg_of_several_files_without_names_or_of_other_genes_are_refused(capsys):
    text = TWO + TRAIN + 'two = "train"\n'
    one = named_hvg("one.h5ad", "uns", 1)
    named_hvg("sub/two.h5ad", "none", 2)
    told = refused(text, embed_key="X_hvg")
    assert "two.h5ad does not say which genes the columns of its X_hvg are" in told and "X_hvg_var_names" in told
    assert opened(settings(text, embed_key="X_hvg", strict=False)).genes == ["X_hvg_0", "X_hvg_1", "X_hvg_2"]
    assert "note: sub/two.h5ad does not say" in capsys.readouterr().err
    assert opened(settings(ONE, embed_key="X_hvg")).genes == HVG  # alone it may be as it is
    two = named_hvg("sub/two.h5ad", "uns", 2, ["g1", "g2", "g0"])
    assert "2 genes in one only, such as g1" in refused(text, embed_key="X_hvg")
    e = opened(settings(text, embed_key="X_hvg", strict=False))
    assert e.genes == ["g0", "g2"] and np.array_equal(e.read(np.arange(240)), np.concatenate([one, two])[:, :2])
    with h5py.File("one.h5ad", "a") as file:
        del file["uns/X_hvg_var_names"]
        file["uns/X_hvg_var_names"] = ["g0", "g1"]
    assert "has 2 names, and obsm/X_hvg 3 columns" in refused(ONE, embed_key="X_hvg")


def test_names_of_hvg_in_the_index_become_the_gene_names_that_the_other_matrices_have():
    X = np.random.default_rng(0).uniform(0.1, 9, (120, 5)).astype(np.float32)
    cells("one.h5ad", X=X, obsm={"X_hvg": X[:, [4, 0, 2]]}, uns={"X_hvg_var_names": np.array(HVG)},
          var={"gene_name": np.array(["A", "B", None, "D", "E"], object)})
    assert opened(settings(ONE, embed_key="X_hvg")).genes == ["E", "A", "g2"]  # g2 has no gene_name


SHARES = np.random.default_rng(3).dirichlet(np.ones(5), 120).astype(np.float32)


@pytest.mark.parametrize("sparse", [False, True])
def test_normalised_values_without_logarithm_are_refused_or_converted(sparse):
    simple(X=SHARES, sparse=sparse)
    told = refused()
    assert "X holds normalised values up to" in told and "not log1p" in told and "counts=convert" in told
    rows = np.arange(120)
    assert np.allclose(opened(settings(counts="convert")).read(rows), np.log1p(1e4 * SHARES), rtol=1e-5)
    assert np.array_equal(opened(settings(counts="log1p")).read(rows), SHARES)  # whoever says so may be right
    simple(obsm={"X_hvg": SHARES[:, :3]})  # of some genes: other sums, but none above 1
    told = refused(embed_key="X_hvg")
    assert "obsm/X_hvg holds normalised values up to" in told and "counts=log1p if these are logarithms" in told


def test_scaled_values_are_refused_and_raw_is_named_where_there_is_one():
    X = np.random.default_rng(0).normal(size=(120, 5)).astype(np.float32)
    simple(X=X)
    assert "expression is never negative" in refused() and "raw" not in refused()
    with h5py.File("one.h5ad", "a") as file:
        raw = file.create_group("raw")
        raw["X"] = np.random.default_rng(1).uniform(0.1, 9, (120, 5))
        file.copy("var", raw, "var")
    assert "--input=one.h5ad --layer=raw/X" in refused()
    assert opened(settings(embed_key="raw/X", output_space="embedding")).genes == [f"g{i}" for i in range(5)]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_logarithm_to_base_two_is_read_as_the_natural_one(sparse, capsys):
    natural = np.random.default_rng(1).uniform(0.1, 14, (120, 5)).astype(np.float32)
    more = {"uns": {"log1p": {"base": 2}}, "obsm": {"X_hvg": natural[:, :3] / np.float32(math.log(2)),
                                                    "X_state": natural[:, :2]}}
    simple(X=natural / np.float32(math.log(2)), sparse=sparse, **more)
    for embed_key, expected in ((None, natural), ("X_hvg", natural[:, :3])):
        e = opened(settings(embed_key=embed_key))
        assert np.allclose(e.read(np.arange(120)), expected, rtol=1e-5)
        assert "is log1p to base 2: brought to the natural logarithm" in capsys.readouterr().err
    e = opened(settings(embed_key="X_state", output_space="embedding"))  # no logarithm
    assert np.array_equal(e.read(np.arange(120)), natural[:, :2]) and "base 2" not in capsys.readouterr().err
    assert np.allclose(read_rows(H5ad("one.h5ad"), None, "auto", np.arange(9)), natural[:9], rtol=1e-5)


@pytest.mark.parametrize("key", [None, "X_hvg", "X_state"])
def test_zeros_are_refused_before_anything_is_written(key):
    simple(X=np.zeros((120, 5), np.float32), obsm={"X_hvg": np.zeros((120, 2)), "X_state": np.zeros((120, 2))})
    told = refused(embed_key=key, output_space="embedding")
    assert "holds nothing but zeros" in told and not any(path.is_dir() for path in Path("data/cells").iterdir())


def test_a_file_without_x_trains_on_what_it_has():
    made = cells("one.h5ad", obsm={"X_hvg": np.full((120, 2), 1.5, np.float32)}, layers={"log": np.ones((120, 5)) / 2})
    with h5py.File("one.h5ad", "a") as file:
        del file["X"]
    e = opened(settings(ONE, embed_key="X_hvg"))
    assert e.input_dim == 2 and len(e.file) == len(made["X"])
    assert opened(settings(ONE, embed_key="log")).genes == [f"g{i}" for i in range(5)]
    assert "one.h5ad: no matrix 'X'; there are 'X_hvg', 'log'" in refused(ONE)


def test_what_a_decoder_would_learn_is_asked_for_by_its_reason():
    simple(obsm={})
    told = refused(embed_key="X", output_space="gene")
    assert "no X_hvg, which output_space=gene learns from X" in told and "embed_key=none" in told
    assert opened(settings(embed_key="X", output_space="all")).genes == opened(settings(embed_key=None)).genes


def test_cells_without_a_label_are_refused_by_name_of_the_switch_that_leaves_them_out(capsys):
    made = cells("one.h5ad")
    lost = {"gene": [3, 50], "cell_type": [50, 51], "gem_group": [119]}
    obs = {}
    for column, rows in lost.items():
        obs[column] = made[column].astype(object)
        obs[column][rows] = None
    cells("one.h5ad", obs=obs)
    told = refused(ONE)
    assert "one.h5ad: obs column 'cell_type' has no value for 2 of 120 rows, first for row 50" in told
    assert "--drop_unlabelled" in told
    kept = np.delete(np.arange(120), [3, 50, 51, 119])
    for _ in range(2):  # made, and found ready
        e = opened(settings(ONE, drop_unlabelled=True))
        assert "note: e.toml: left out are 4 cells without a value in a column" in capsys.readouterr().err
        assert np.array_equal(e.row, kept) and np.array_equal(e.read(np.arange(116)), made["X"][kept])
        for column, codes, names in (("gene", e.perturbation, e.perturbations), ("gem_group", e.batch, e.batches),
                                     ("cell_type", e.cell_type, e.cell_types)):
            assert [names[code] for code in codes] == made[column][kept].tolist()
    assert "has no value" in refused(ONE)  # the folder is there, and still it must be asked for
    assert inspect("e.toml", drop_unlabelled=True)["splits"]["train"]["control"] == (made["gene"][kept]
                                                                                     == "non-targeting").sum()
    cells("one.h5ad", obs={"gene": np.full(120, None)})
    assert "no cell has a value in all of cell_type, gene, gem_group" in refused(ONE, drop_unlabelled=True)
