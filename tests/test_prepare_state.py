"""prepare_data.py and cells: h5ad files of every kind read as anndata reads them; what cannot be used is refused."""

import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from commands import refusal
from scipy.sparse import csr_array

import prepare_data
from common.errors import DataError
from sources import h5ad as h5ad_source
from sources import populations as populations_source
from sources import preprocess as preprocess_source
from sources.h5ad import H5ad, as_dense, looks_log1p, write_h5ad

ROOT = Path(__file__).resolve().parents[1]
KANG = ROOT.parent / "shared" / "data" / "perturb" / "kang_pbmc_scgen_valid.h5ad"
VALUES = np.array([[0, 1.5, 0, 2], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0.5, 7], [1, 2, 3, 4]], np.float32)
N, V = VALUES.shape
GENES = ["B", "A", "D", "C"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compressed(values: np.ndarray, by_columns: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR, or CSC, by loops."""
    data, indices, pointers = [], [], [0]
    for line in values.T if by_columns else values:
        data += [x for x in line if x]
        indices += [i for i, x in enumerate(line) if x]
        pointers.append(len(data))
    return np.array(data, np.float32), np.array(indices, np.int32), np.array(pointers)


def put(file, key: str, values: np.ndarray, layout: str, **storage) -> None:
    if layout == "dense":
        file.create_dataset(key, data=values, **storage).attrs["encoding-type"] = "array"
        return
    group = file.create_group(key)
    group.attrs.update({"encoding-type": f"{layout}_matrix", "shape": values.shape})
    for name, part in zip(("data", "indices", "indptr"), compressed(values, layout == "csc"), strict=True):
        group.create_dataset(name, data=part, **storage)


def make(path="cells.h5ad", layout="csr", values=VALUES, columns=None, obsm=None, **storage) -> Path:
    """An h5ad by h5py alone; columns: {name: function(obs group) that writes it}."""
    with h5py.File(path, "w") as file:
        put(file, "X", values, layout, **storage)
        for part, names in (("obs", [f"cell{i}" for i in range(len(values))]), ("var", GENES)):
            file.create_group(part)["_index"] = names
            file[part].attrs["_index"] = "_index"
        for name, write in (columns or {}).items():
            write(file["obs"], name)
        for name, matrix in (obsm or {}).items():
            put(file, f"obsm/{name}", matrix, layout)
    return Path(path)


def categorical(codes, categories):
    def write(obs, name):
        obs.create_group(name).attrs["encoding-type"] = "categorical"
        obs[name]["codes"], obs[name]["categories"] = np.array(codes, np.int8), categories
    return write


def old_categorical(codes, categories):
    def write(obs, name):
        obs[f"__categories/{name}"], obs[name] = categories, np.array(codes, np.int8)
        obs[name].attrs["categories"] = obs[f"__categories/{name}"].ref
    return write


def nullable(values, mask):
    def write(obs, name):
        obs.create_group(name).attrs["encoding-type"] = "nullable"
        obs[name]["values"], obs[name]["mask"] = values, np.array(mask, bool)
    return write


def array(values):
    return lambda obs, name: obs.create_dataset(name, data=values)


TYPES = ["b", "a", "b", "b", "a"]
CODES = [1, 0, 1, 1, 0]
COLUMNS = {
    "plain": array(TYPES), "bytes": array(np.array(TYPES, "S1")), "categorical": categorical(CODES, ["a", "b"]),
    "unsorted": categorical([0, 2, 0, 0, 2], ["b", "unused", "a"]), "reference": old_categorical(CODES, ["a", "b"]),
    "nullable": nullable(TYPES, [0] * 5), "accents": categorical([0, 0, 0, 0, 0], ["né"])}
NUMBERS = {"integers": (array(np.array([10, 9, 10, 10, 9])), ["10", "9"], [0, 1, 0, 0, 1]),
           "bools": (array(np.array([True, False, True, True, False])), ["False", "True"], [1, 0, 1, 1, 0]),
           "floats": (array(np.array([2.5, 1, 2.5, 2.5, 1])), ["1.0", "2.5"], [1, 0, 1, 1, 0]),
           "numbered": (categorical(CODES, np.array([3, 20])), ["20", "3"], [0, 1, 0, 0, 1]),
           "nullable": (nullable(np.array([7, 8, 7, 7, 8]), [0] * 5), ["7", "8"], [0, 1, 0, 0, 1])}


def test_columns_of_every_encoding_read_the_same():
    with H5ad(make(columns=COLUMNS)) as cells:
        assert set(cells.columns) == set(COLUMNS) and cells.obs_names[3] == "cell3"
        assert cells.gene_names.tolist() == cells.var_names.tolist() == GENES
        for name in set(COLUMNS) - {"accents"}:
            codes, names = cells.column(name)
            assert (codes.tolist(), names, codes.dtype) == (CODES, ["a", "b"], np.int32), name
        assert cells.column("accents")[1] == ["né"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_read_as_their_text(kind):
    write, names, codes = NUMBERS[kind]
    with H5ad(make(columns={"x": write})) as cells:
        found, text = cells.column("x")
    assert (text, found.tolist()) == (names, codes)


STORAGE = {"contiguous": {}, "chunked": {"chunks": True}, "gzip": {"compression": "gzip"}}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
def test_matrices_of_every_layout_read_the_same(layout, storage, monkeypatch):
    monkeypatch.setattr(h5ad_source.Matrix, "entries", 3)  # rows one by one, columns one by one
    make(layout=layout, obsm={"X_hvg": VALUES[:, :2]}, **STORAGE[storage])
    with H5ad("cells.h5ad") as cells:
        assert cells.keys == ["X", "obsm/X_hvg"]
        for key, values in ((None, VALUES), ("X", VALUES), ("X_hvg", VALUES[:, :2]), ("obsm/X_hvg", VALUES[:, :2])):
            matrix = cells.matrix(key)
            assert (matrix.shape, matrix.format) == (values.shape, layout)
            np.testing.assert_array_equal(matrix.dense(), values)
            rows = [(start, stop, as_dense(block)) for start, stop, block in matrix.blocks(2)]
            assert [row[0] for row in rows] == [0] + [row[1] for row in rows[:-1]] and rows[-1][1] == N
            assert max(stop - start for start, stop, _ in rows) <= 2
            np.testing.assert_array_equal(np.concatenate([row[2] for row in rows]), values)
        found = cells.matrix("X").check()
        np.testing.assert_array_equal(found.pop("row_sums"), VALUES.sum(1))
        assert found == {"min": 0, "max": 7, "integer": False, "nnz": 10, "largest_row_sum": 10, "normalised": False,
                         "log_base": np.e}
        if layout != "dense":
            block = next(cells.matrix(None).blocks())[2]
            assert block.has_sorted_indices and block.dtype == np.float32 and block.indices.dtype == np.int32


def test_indices_out_of_order_are_sorted_and_repeats_refused():
    with h5py.File(make(), "a") as file:
        data, indices = file["X/data"][:], file["X/indices"][:]
        file["X/data"][:2], file["X/indices"][:2] = data[1::-1], indices[1::-1]
    with H5ad("cells.h5ad") as cells:
        blocks = [block for _, _, block in cells.matrix(None).blocks()]
        np.testing.assert_array_equal(np.concatenate([block.indices for block in blocks]), indices)
        np.testing.assert_array_equal(cells.matrix(None).dense(), VALUES)
    with h5py.File("cells.h5ad", "a") as file:
        file["X/indices"][1] = 3
    with pytest.raises(DataError, match="two values for row 0, column 3"):
        H5ad("cells.h5ad").matrix(None).check()


def legacy(path: str = "old.h5ad", bytes_: bool = False) -> None:
    """The layout of anndata before 0.7: compound data sets, categories in uns."""
    obs = np.zeros(N, [("index", "S5"), ("cell_type", "i1"), ("n", "f4"), ("label", "S2")])
    obs["index"], obs["cell_type"] = [f"cell{i}".encode() for i in range(N)], CODES
    obs["n"], obs["label"] = range(N), [t.encode() for t in TYPES]
    with h5py.File(path, "w") as file:
        file["obs"], file["var"] = obs, np.array([(g.encode(), 1) for g in GENES], [("index", "S1"), ("n", "i8")])
        file["obsm"] = np.array([(row,) for row in VALUES], [("X_pca", "f4", (V,))])
        file["uns/cell_type_categories"] = np.array([b"a", b"b"])
        for name, part in zip(("data", "indices", "indptr"), compressed(VALUES), strict=True):
            file[f"X/{name}"] = part
        file["X"].attrs.update({"h5sparse_format": b"csr" if bytes_ else "csr", "h5sparse_shape": (N, V)})


@pytest.mark.parametrize("bytes_", [False, True])
def test_a_file_of_an_old_anndata_reads_like_a_new_one(bytes_):
    legacy(bytes_=bytes_)
    with H5ad("old.h5ad") as cells:
        assert cells.columns == ["cell_type", "n", "label"] and cells.var_names.tolist() == GENES
        for name in ("cell_type", "label"):
            assert (cells.column(name)[0].tolist(), cells.column(name)[1]) == (CODES, ["a", "b"])
        np.testing.assert_array_equal(cells.matrix(None).dense(), VALUES)
        np.testing.assert_array_equal(cells.matrix("X_pca").dense(), VALUES)


@pytest.mark.skipif(not KANG.exists(), reason="no Kang data")
def test_the_kang_file_of_an_old_anndata_reads():
    with H5ad(KANG) as cells:
        codes, names = cells.column("condition")
        assert (cells.n_obs, cells.n_vars, names) == (1_975, 6_998, ["control", "stimulated"]) and len(codes) == 1_975
        assert len(cells.column("cell_type")[1]) == 7 and cells.matrix("X_pca").shape == (1_975, 50)
        found = cells.matrix(None).check()
        with h5py.File(KANG) as file:
            assert found["max"] == file["X/data"][:].max() and found["nnz"] == np.count_nonzero(file["X/data"][:])
        assert looks_log1p(found)


# ---------------------------------------------------------------------------------------------------------------
# anndata's own files
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
def test_files_by_anndata_equal_what_anndata_reads(layout, compression):
    anndata = pytest.importorskip("anndata")
    import pandas
    import scipy.sparse

    wrap = {"dense": np.array, "csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}[layout]
    values = np.random.default_rng(3).poisson(0.3, (50, 20)).astype(np.float32)
    draw = np.random.default_rng(4).integers(0, 3, 50)
    words = np.array(["b", "a", "né"])[draw]
    obs = pandas.DataFrame({"strings": words, "number": draw, "flag": draw > 0, "real": draw / 2}, [f"c{i}" for i in
                                                                                                  range(50)])
    obs["category"] = pandas.Categorical(words, ["né", "b", "unused", "a"])
    obs["levels"] = pandas.Categorical(draw)
    obs["null_string"] = pandas.array(words, "string")
    obs["null_integer"] = pandas.array(draw, "Int64")
    obs["null_flag"] = pandas.array(draw > 1, "boolean")
    var = pandas.DataFrame({"gene_name": [f"G{i % 19}" for i in range(20)]}, [f"ENS{i}" for i in range(20)])
    adata = anndata.AnnData(wrap(values), obs, var, obsm={"X_pca": values[:, :3] / 2, "X_hvg": wrap(values[:, 4:9])},
                            layers={"counts": wrap(values * 2)})
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad("by.h5ad", compression=compression)
    read = anndata.read_h5ad("by.h5ad")
    with H5ad("by.h5ad") as cells:
        assert cells.columns == list(read.obs.columns) and cells.obs_names.tolist() == list(read.obs_names)
        assert cells.gene_names.tolist() == list(read.var["gene_name"])
        for name in cells.columns:
            codes, names = cells.column(name)
            assert [names[code] for code in codes] == [str(value) for value in read.obs[name]], name
            assert names == sorted(set(names))
        for key, matrix in (("X", read.X), ("X_hvg", read.obsm["X_hvg"]), ("X_pca", read.obsm["X_pca"]),
                            ("counts", read.layers["counts"])):
            expected = matrix.toarray() if scipy.sparse.issparse(matrix) else matrix
            np.testing.assert_array_equal(cells.matrix(key).dense(), expected)


@pytest.mark.filterwarnings("default")
def test_anndata_opens_what_is_written():
    anndata = pytest.importorskip("anndata")
    obs = {"cell_type": np.array(TYPES), "n": np.arange(N), "gap": np.array(["x", None, "y", "x", "x"], object)}
    write_h5ad("new.h5ad", csr_array(VALUES), obs, GENES, obsm={"X_hvg": VALUES[:, :2]},
               var={"highly_variable": np.array([1, 0, 1, 0], bool), "gene_name": np.array(list("wxyz"))},
               layers={"counts": csr_array(VALUES * 2)},
               uns={"log1p": {}, "note": {"seed": 3, "text": "né", "list": np.array(["p", "q"]), "mean": np.ones(2)}})
    read = anndata.read_h5ad("new.h5ad")
    np.testing.assert_array_equal(read.X.toarray(), VALUES)
    np.testing.assert_array_equal(read.layers["counts"].toarray(), VALUES * 2)
    np.testing.assert_array_equal(read.obsm["X_hvg"], VALUES[:, :2])
    assert read.obs["cell_type"].dtype == "category" and list(read.obs["cell_type"]) == TYPES
    assert list(read.obs["gap"].isna()) == [False, True, False, False, False] and list(read.obs["n"]) == list(range(N))
    assert list(read.var_names) == GENES and list(read.var["highly_variable"]) == [True, False, True, False]
    assert read.uns["note"]["seed"] == 3 and read.uns["note"]["text"] == "né" and list(read.uns["note"]["list"]) == [
        "p", "q"] and "log1p" in read.uns


def test_what_is_written_reads_back():
    write_h5ad("new.h5ad", VALUES, {"cell_type": np.array(TYPES)}, GENES, layers={"c": csr_array(VALUES)})
    with H5ad("new.h5ad") as cells:
        assert cells.matrix(None).format == "dense" and cells.matrix("c").format == "csr"
        assert cells.column("cell_type")[1] == ["a", "b"]
        for key in (None, "c"):
            np.testing.assert_array_equal(cells.matrix(key).dense(), VALUES)


# ---------------------------------------------------------------------------------------------------------------
# What cannot be used
# ---------------------------------------------------------------------------------------------------------------
def spoil(change) -> Path:
    with h5py.File(make(columns=COLUMNS), "a") as file:
        change(file)
    return Path("cells.h5ad")


def replace(file, key, values):
    del file[key]
    file[key] = values


BROKEN = {
    "no matrix": (lambda f: f.pop("X"), "has no X, and nothing in layers, obsm or raw"),
    "no obs": (lambda f: f.pop("obs"), "has no obs"),
    "indptr": (lambda f: replace(f, "X/indptr", [0, 10]), "not of one sparse matrix of 5 x 4"),
    "indices": (lambda f: replace(f, "X/indices", np.zeros(3, int)), "not of one sparse matrix"),
    "shape": (lambda f: f["X"].attrs.update(shape=(5, 3)), "X is 5 x 3, but there are 5 cells and 4 genes"),
    "fewer names": (lambda f: replace(f, "var/_index", ["A", "B"]), "X is 5 x 4, but there are 5 cells and 2 genes"),
    "encoding": (lambda f: f["X"].attrs.update({"encoding-type": "awkward"}), "not dense, CSR or CSC"),
    "words": (lambda f: replace(f, "X", ["a"] * 5), "not a table of numbers"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused_when_opened(fault):
    change, told = BROKEN[fault]
    with pytest.raises(DataError, match=re.escape(told)) as error:
        H5ad(spoil(change))
    assert "cells.h5ad" in str(error.value) and "\n" not in str(error.value)


VALUE_FAULTS = {
    "nan": (lambda f: f["X/data"].__setitem__(3, np.nan), "holds nan for cell 2 (cell2)"),
    "inf": (lambda f: f["X/data"].__setitem__(9, np.inf), "holds inf for cell 4 (cell4)"),
    "column": (lambda f: f["X/indices"].__setitem__(0, 4), "indices 0 to 4 for 4 columns"),
    "negative": (lambda f: f["X/indices"].__setitem__(0, -1), "indices -1 to 3 for 4 columns"),
    "falls": (lambda f: f["X/indptr"].__setitem__(1, 9), "indptr falls"),
}


@pytest.mark.parametrize("fault", VALUE_FAULTS)
def test_broken_values_are_found_by_check(fault):
    change, told = VALUE_FAULTS[fault]
    matrix = H5ad(spoil(change)).matrix(None)
    with pytest.raises(DataError, match=re.escape(told)):
        matrix.check()


COLUMN_FAULTS = {
    "typo": ("cell_typ", {"cell_type": array(TYPES)}, "no column 'cell_typ' in obs; did you mean 'cell_type'?"),
    "code": ("x", {"x": categorical([0, -1, 1, -1, 0], ["a", "b"])}, "no value for 2 of 5 rows, first for row 1"),
    "float": ("x", {"x": array([1.0, 2, np.nan, 1, 1])}, "no value for 1 of 5 rows, first for row 2"),
    "mask": ("x", {"x": nullable(TYPES, [0, 0, 0, 0, 1])}, "no value for 1 of 5 rows, first for row 4"),
    "length": ("x", {"x": array(["a"] * 4)}, "has shape (4,) for 5 rows"),
    "beyond": ("x", {"x": categorical([0, 1, 2, 0, 0], ["a", "b"])}, "codes 0 to 2 for 2 categories"),
    "half": ("x", {"x": lambda obs, name: obs.create_group(name)}, "cells.h5ad: obs/x/values is not there"),
}


@pytest.mark.parametrize("fault", COLUMN_FAULTS)
def test_a_column_that_cannot_be_used_is_refused(fault):
    name, columns, told = COLUMN_FAULTS[fault]
    with pytest.raises(DataError, match=re.escape(told)) as error:
        H5ad(make(columns=columns)).column(name)
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.h5ad").write_text("no")
    whole = make(values=np.ones((500, 4), np.float32), layout="dense").read_bytes()
    Path("cut.h5ad").write_bytes(whole[: len(whole) // 2])
    for path, told in (("none.h5ad", "no such file"), (".", "folder"), ("text.h5ad", "damaged"), ("cut.h5ad", "cut")):
        with pytest.raises(DataError, match=told):
            H5ad(path)
    with pytest.raises(DataError, match=r"no matrix 'X_hgv'; did you mean 'X_hvg'\?"):
        H5ad(make(obsm={"X_hvg": VALUES})).matrix("X_hgv")


def test_nothing_is_left_of_a_file_that_cannot_be_written():
    with pytest.raises(DataError, match="'t' has 2 values for 5 rows"):
        write_h5ad("new.h5ad", VALUES, {"t": np.array(["a", "b"])}, GENES)
    assert os.listdir() == []


# ---------------------------------------------------------------------------------------------------------------
# preprocess
# ---------------------------------------------------------------------------------------------------------------
def counts_file(path="counts.h5ad", layout="csr", cells=300, genes=60, empty=(), columns=None, **more) -> np.ndarray:
    draw = np.random.default_rng(7)
    values = draw.poisson(draw.gamma(1, 2, (cells, genes)) * draw.gamma(1, 1, genes)).astype(np.float32)
    values[:, 5] = 0  # a gene that never occurs
    values[list(empty)] = 0
    wrapped = values if layout == "dense" else csr_array(values)
    obs = columns or {"gene": np.array(["non-targeting", "TP53"])[np.arange(cells) % 2], "n": np.arange(cells)}
    write_h5ad(path, wrapped, obs, [f"g{i}" for i in range(genes)], **more)
    return values


def run(*argv: str) -> dict:
    return prepare_data.main(["state", *argv])


def expected_log1p(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts.astype(np.float64) / counts.sum(1, keepdims=True) * 1e4)


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_preprocess_is_the_same_in_blocks_of_any_size(layout, monkeypatch, capsys):
    other = np.arange(600, dtype=np.float32).reshape(300, 2)
    counts = counts_file(layout=layout, empty=(0, 7, 299), obsm={"X_pca": other})
    kept, more = counts.sum(1) > 0, ("--num_hvgs=20", "--drop_empty", "--keep_counts")
    whole = run("preprocess", "--adata=counts.h5ad", "--output=a.h5ad", "--control_pert=non-targeting", *more)
    assert (whole["cells"], whole["hvgs"], whole["dropped"]) == (297, 20, 3)
    assert "3 empty ones left out" in capsys.readouterr().out
    monkeypatch.setattr(h5ad_source.Matrix, "entries", 100)
    run("preprocess", "--input=counts.h5ad", "--output=b.h5ad", *more)
    with H5ad("a.h5ad") as a, H5ad("b.h5ad") as b:
        np.testing.assert_allclose(a.matrix(None).dense(), expected_log1p(counts[kept]), rtol=1e-6)
        np.testing.assert_array_equal(a.matrix("counts").dense(), counts[kept])
        np.testing.assert_array_equal(a.matrix("X_pca").dense(), other[kept])
        assert a.column("gene")[1] == ["TP53", "non-targeting"] and (a.frame("obs")["n"] == np.flatnonzero(kept)).all()
        chosen = a.frame("var")["highly_variable"]
        np.testing.assert_array_equal(a.matrix("X_hvg").dense(), a.matrix(None).dense()[:, chosen])
        for key in a.keys:
            np.testing.assert_allclose(a.matrix(key).dense(), b.matrix(key).dense(), rtol=1e-6)
        assert looks_log1p(a.matrix(None)) and not looks_log1p(a.matrix("counts"))


def test_variable_genes_by_hand():
    """Two ranges of the mean: in each, the gene whose dispersion is above the others' is taken first."""
    draw = np.random.default_rng(0)
    cells = np.c_[draw.normal(10, 1, (400, 6)), draw.normal(1_000, 10, (400, 6)), np.zeros(400), np.full(400, 333.3)]
    cells[:, 3], cells[:, 8] = draw.normal(10, 3, 400), draw.normal(1_000, 30, 400)
    found = preprocess_source.variable_genes(cells.sum(0), (cells**2).sum(0), 400, 2)
    assert np.flatnonzero(found["highly_variable"]).tolist() == [3, 8]
    dispersion = np.log(cells[:, :12].var(0, ddof=1) / cells[:, :12].mean(0))
    np.testing.assert_allclose(found["dispersions"][:12], dispersion, rtol=1e-6)
    np.testing.assert_allclose(found["means"], np.log1p(cells.mean(0)), rtol=1e-6, atol=1e-11)
    first = dispersion[:6]
    np.testing.assert_allclose(found["dispersions_norm"][:6], (first - first.mean()) / first.std(ddof=1), rtol=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("source", ["random", "kang counts"])
def test_preprocess_agrees_with_scanpy(source):
    scanpy, anndata = pytest.importorskip("scanpy"), pytest.importorskip("anndata")
    path, most = Path("counts.h5ad"), 30
    if source != "random":
        path, most = KANG.with_name("kang_pbmc_muscat_counts.h5ad"), 300
        if not path.exists():
            pytest.skip("no Kang data")
    else:
        counts_file()
    run("preprocess", f"--input={path}", f"--num_hvgs={most}", "--output=ours.h5ad")
    theirs = anndata.read_h5ad(path)
    scanpy.pp.normalize_total(theirs, target_sum=1e4)
    scanpy.pp.log1p(theirs)
    scanpy.pp.highly_variable_genes(theirs, n_top_genes=most, flavor="seurat")
    ours = anndata.read_h5ad("ours.h5ad")
    assert ours.var["highly_variable"].tolist() == theirs.var["highly_variable"].tolist()
    np.testing.assert_allclose(ours.X.toarray(), theirs.X.toarray(), rtol=1e-5)
    np.testing.assert_allclose(ours.obsm["X_hvg"], theirs[:, theirs.var["highly_variable"]].X.toarray(), rtol=1e-5)
    for name in ("means", "dispersions", "dispersions_norm"):
        np.testing.assert_allclose(ours.var[name], theirs.var[name], rtol=1e-4, atol=1e-5)


def test_preprocess_leaves_log1p_as_it_is(capsys):
    counts_file()
    run("preprocess", "--input=counts.h5ad", "--num_hvgs=1000", "--output=once.h5ad")
    assert "all that vary: num_hvgs is 1,000" in capsys.readouterr().out
    assert run("preprocess", "--input=once.h5ad", "--num_hvgs=59", "--output=twice.h5ad")["log1p"]
    assert "log1p already" in capsys.readouterr().out
    with H5ad("once.h5ad") as once, H5ad("twice.h5ad") as twice:
        for key in ("X", "X_hvg"):
            np.testing.assert_array_equal(once.matrix(key).dense(), twice.matrix(key).dense())
        assert once.matrix("X_hvg").shape == (300, 59)  # the gene that never occurs is not variable


def test_a_file_of_an_old_anndata_is_preprocessed(capsys):
    legacy()
    found = run("preprocess", "--input=old.h5ad", "--num_hvgs=2", "--drop_empty", "--cell_type_key=cell_type")
    assert (found["cells"], found["log1p"]) == (4, True)
    with H5ad("data/state/old.h5ad") as cells:
        assert cells.columns == ["cell_type", "n", "label"] and cells.column("cell_type")[1] == ["a", "b"]


REFUSED = {
    "empty": (["--input=counts.h5ad"], "1 cell without any count, first cell 4 (4): leave them out with --drop_empty"),
    "column": (["--input=counts.h5ad", "--pert_col=genes"], "no column 'genes' in obs (did you mean 'gene'?)"),
    "control": (["--input=counts.h5ad", "--control_pert=non_targeting"], "did you mean 'non-targeting'?"),
    "layer": (["--input=counts.h5ad", "--layer=count"], "no matrix 'count'"),
    "itself": (["--input=counts.h5ad", "--output=./counts.h5ad"], "is the input"),
    "input": ([], "preprocess needs cells: --input=FILE.h5ad"),
    "missing": (["--input=none.h5ad"], "none.h5ad: no such file"),
    "place": (["--input=fine.h5ad", "--output=fine.h5ad/x.h5ad"], "fine.h5ad cannot be made"),
    "negative": (["--input=negative.h5ad"], "X holds values from -1 to"),
    "constant": (["--input=constant.h5ad"], "no gene differs between cells"),
    "fractions": (["--input=fractions.h5ad"], "fractions among them: neither counts nor log1p"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_preprocess_refuses_in_one_line_and_writes_nothing(fault, capsys):
    counts_file(empty=[4])
    values = counts_file("fine.h5ad")
    for name, changed in {"negative": values - (values == values[0, 0]), "fractions": values * 1.5,
                          "constant": values * 0 + 3}.items():
        write_h5ad(f"{name}.h5ad", changed, {"gene": np.array(["a"] * 300)}, [f"g{i}" for i in range(60)])
    before = sorted(os.listdir())
    argv, told = REFUSED[fault]
    assert told in refusal(capsys, prepare_data.main, "state", "preprocess", *argv)
    assert sorted(p for p in os.listdir() if p != "data") == before and not list(Path(".").glob("data/**/*.*"))


# ---------------------------------------------------------------------------------------------------------------
# synthetic, inspect
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def populations(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("state")
    return folder, prepare_data.main(["state", f"--out_dir={folder}"])


def means(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(mean log1p expression of the cells of the file [K, P + 1, G], the control first; the true deltas [K, P, G])."""
    with H5ad(folder / "synthetic.h5ad") as cells, np.load(folder / "truth.npz") as truth:
        X = cells.matrix("X_hvg").dense()
        (kind, types), (pert, perts) = cells.column("cell_type"), cells.column("gene")
        order = [perts.index(name) for name in ("non-targeting", *truth["perturbations"])]
        assert types == truth["cell_types"].tolist() and cells.var_names.tolist() == truth["genes"].tolist()
        found = [[X[(kind == k) & (pert == p)].mean(0) for p in order] for k in range(len(types))]
        return np.array(found), truth["delta"]


def row_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]))


def test_synthetic_effects_are_those_of_the_cells(populations):
    folder, told = populations
    found, truth = means(folder)
    deltas = found[:, 1:] - found[:, :1]
    for k in range(len(truth)):
        assert row_correlation(deltas[k], truth[k]) > 0.96
        assert np.abs(deltas[k] - truth[k]).mean() < 0.1  # no bias beyond the noise of 40 cells
    assert told["noise_ceiling"] >= 0.97 and 0.6 < told["perturbation_mean"] < 0.85
    assert told["perturbation_mean"] == pytest.approx(row_correlation(deltas[:-1].mean(0), truth[-1]), abs=1e-4)


def test_effects_on_the_last_type_can_be_read_from_its_control_cells(populations):
    """A line in two directions of the control means, fitted on the other types, beats the perturbation mean."""
    found, truth = means(populations[0])
    deltas, basal = found[:-1, 1:] - found[:-1, :1], found[:, 0]
    center = basal[:-1].mean(0)
    directions = np.linalg.svd(basal[:-1] - center, full_matrices=False)[2][:2]
    known = np.c_[np.ones(len(basal)), (basal - center) @ directions.T]
    line = np.linalg.lstsq(known[:-1], deltas.reshape(len(deltas), -1), rcond=None)[0]
    predicted = (known[-1] @ line).reshape(truth[-1].shape)
    assert row_correlation(predicted, truth[-1]) > 0.93 > row_correlation(deltas.mean(0), truth[-1]) + 0.1


def test_synthetic_files_hold_what_they_promise(populations):
    import tomllib

    folder, told = populations
    with H5ad(folder / "synthetic.h5ad") as cells:
        assert cells.keys == ["X", "obsm/X_hvg", "layers/counts"] and cells.n_obs == told["cells"] == 10_240
        counts = cells.matrix("counts").dense()
        np.testing.assert_allclose(cells.matrix(None).dense(), expected_log1p(counts), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(cells.matrix(None).dense(), cells.matrix("X_hvg").dense())
        assert cells.column("gem_group")[1] == ["b0", "b1", "b2", "b3"]
        sizes = counts.sum(1)
        assert 0.2 < np.log(sizes).std() < 0.45 and sizes.mean() < 5_500
    toml = tomllib.loads((folder / "synthetic.toml").read_text())
    assert toml == {"datasets": {"synthetic": "synthetic.h5ad"}, "training": {"synthetic": "train"},
                    "zeroshot": {"synthetic.c15": "test"}, "fewshot": {"synthetic.c14": {"val": ["p01", "p05", "p09"]}}}


def test_synthetic_is_the_same_for_the_same_seed(capsys):
    small = ("--num_cell_types=4", "--num_genes=20", "--num_perturbations=2", "--cells_per_condition=5")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("synthetic", f"--out_dir={out}", f"--seed={seed}", *small)
    truth = [np.load(f"{out}/truth.npz")["delta"] for out in "abc"]
    counts = [H5ad(f"{out}/synthetic.h5ad").matrix("counts").dense() for out in "abc"]
    for a, b, c in (truth, counts):
        assert (a == b).all() and (a != c).any()


def test_dropout_loses_a_gene_with_its_probability():
    """All genes alike at an expected count of 1 a zero has probability e^-1 + (1 - e^-1) p."""
    populations = populations_source.make_populations(4, 2, num_genes=500, num_batches=1, effect=0, seed=0)
    alike = populations_source.Populations(**{name: values * 0 for name, values in vars(populations).items()})
    for dropout in (0, 0.5):
        draw, cells = np.random.default_rng(1), np.zeros(400, int)
        counts, _ = populations_source.simulate(alike, cells, cells, 500, dropout, draw)
        sizes = np.exp(0.3 * np.random.default_rng(2).normal(size=4_000))  # of cells: log-normal
        expected = (np.exp(-sizes) + (1 - np.exp(-sizes)) * dropout**sizes).mean()
        assert (counts == 0).mean() == pytest.approx(expected, abs=0.015)


def test_a_correlation_that_is_not_defined_is_left_out():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(3, 9)), draw.normal(size=(3, 9))
    b[1] = 0
    expected = np.mean([np.corrcoef(a[i], b[i])[0, 1] for i in (0, 2)])
    assert populations_source.mean_pearson(a, b) == pytest.approx(expected)
    assert populations_source.mean_pearson(a, 0 * b) is None
    X, kinds = draw.normal(size=(96, 9)), np.indices((4, 2, 12)).reshape(3, -1)
    report = populations_source.noise_report(X, kinds[0], kinds[1], np.zeros((4, 1, 9)))
    assert report == {"noise_ceiling": None, "perturbation_mean": None}
    assert populations_source.noise_in_words(report, "c3") == "no perturbation has an effect on c3"
    told = populations_source.noise_in_words({"noise_ceiling": 0.5, "perturbation_mean": None}, "c3")
    assert told == "Pearson delta with the truth on c3: 0.500 of half its own cells (noise ceiling)"


def test_inspect_tells_what_an_h5ad_holds(populations, capsys):
    told = prepare_data.main(["state", "inspect", str(populations[0] / "synthetic.h5ad")])
    assert told["problems"] == [] and len(told["columns"]["gene"]) == 13
    assert {key: found["kind"] for key, found in told["matrices"].items()} == {
        "X": "log1p", "obsm/X_hvg": "log1p", "layers/counts": "counts"}
    assert "10,240 x 200 csr, counts" in capsys.readouterr().out
    spoil(lambda f: (f["X/data"].__setitem__(3, np.nan), replace(f, "obs/plain", np.full(N, np.nan))))
    problems = prepare_data.main(["inspect", "cells.h5ad"])["problems"]
    assert len(problems) == 2 and "'plain' has no value" in problems[0] and "nan for cell 2" in problems[1]


def test_inspect_of_an_experiment_refuses_a_toml_that_is_not_there(capsys):
    for command in (["inspect"], ["state", "inspect"]):
        told = refusal(capsys, prepare_data.main, *command, "x.toml", "--pert_col=target")
        assert told.startswith("error: there is no file x.toml")


def test_words_after_state_are_understood_or_corrected(capsys):
    assert "did you mean 'preprocess'?" in refusal(capsys, prepare_data.main, "state", "preproces")
    told = refusal(capsys, prepare_data.main, "state", "--num_genes=3")
    assert "num_genes: expected int >= 20, got '3': must be at least 20" in told


@pytest.mark.parametrize("word", ["--depth=1e30", "--effect=1e30"])
def test_synthetic_cells_of_more_counts_than_there_are_numbers_are_refused(tmp_path, capsys, word):
    told = refusal(capsys, prepare_data.main, "state", f"--out_dir={tmp_path / 'new'}", "--num_genes=20", word)
    assert "the effects are too large: a gene has more than 1,000,000,000 counts" in told
