"""What h5ad files of other programs hold in other forms: read as it is, converted or refused, not in silence."""

import contextlib
import math
from pathlib import Path

import h5py
import numpy as np
import pytest
from commands import refusal
from scipy.sparse import csr_array

import prepare_data
from common.errors import DataError
from sources.h5ad import H5ad, kind_of_values, write_h5ad
from sources.preprocess import variable_genes

N, G = 108, 30
GENES = [f"g{i}" for i in range(G)]
CONDITIONS = np.indices((3, 3, 2, 6)).reshape(4, N)  # 3 types x 3 perturbations x 2 batches, 6 cells of each
OBS = {"cell_type": np.array(["A", "B", "C"])[CONDITIONS[0]], "gem_group": np.array(["b0", "b1"])[CONDITIONS[2]],
       "gene": np.array(["non-targeting", "p1", "p2"])[CONDITIONS[1]]}
COUNTS = np.random.default_rng(0).poisson(np.linspace(0.3, 20, G), (N, G)).astype(np.float32)
SHARES = COUNTS / COUNTS.sum(1, keepdims=True)
LOG1P = np.log1p(1e4 * SHARES).astype(np.float32)


@pytest.fixture(autouse=True)
def here(in_a_folder_of_its_own):
    """Stand in an empty folder."""


def kind(key: str | None = None, path: str = "a.h5ad") -> str:
    with H5ad(path) as file:
        return kind_of_values(file.matrix(key).check())


def preprocess(*argv: str, path: str = "a.h5ad") -> dict:
    return prepare_data.main(["state", "preprocess", f"--input={path}", "--output=out.h5ad", *argv])


def matrix(key: str | None = None, path: str = "out.h5ad") -> np.ndarray:
    with H5ad(path) as file:
        return file.matrix(key).dense()


@contextlib.contextmanager
def opened(path: str = "a.h5ad"):
    with h5py.File(path, "a") as file:
        yield file


# ---------------------------------------------------------------------------------------------------------------
# What the values are
# ---------------------------------------------------------------------------------------------------------------
ONE_EMPTY = np.where(np.arange(N)[:, None] == 3, 0, 1)


@pytest.mark.parametrize("values, expected", [
    (COUNTS, "counts"), (LOG1P, "log1p"), (LOG1P * ONE_EMPTY, "log1p"), (SHARES, "normalised, not logged"),
    (1e4 * SHARES, "normalised, not logged"), (SHARES * ONE_EMPTY, "normalised, not logged"), (0 * COUNTS,
    "nothing but zeros"), (COUNTS * 1.5, "neither counts nor log1p"), (LOG1P - 1, "negative values"),
    (LOG1P[:, :9], "log1p"), (SHARES[:, :9], "normalised, not logged"), (np.tile(LOG1P[:1], (N, 1)), "log1p")])
@pytest.mark.parametrize("sparse", [True, False])
def test_what_values_are_is_told_by_sums_as_well_as_by_size(values, expected, sparse):
    values = values.astype(np.float32)
    names = GENES[: values.shape[1]]
    write_h5ad("a.h5ad", csr_array(values) if sparse else values, OBS, names)
    assert kind() == expected


@pytest.mark.parametrize("scale", [1, 1e4])
def test_shares_of_a_cell_are_normalised_and_become_log1p(scale, capsys):
    write_h5ad("a.h5ad", csr_array((scale * SHARES).astype(np.float32)), OBS, GENES)
    problems = prepare_data.main(["inspect", "a.h5ad"])["problems"]
    assert len(problems) == 1 and "normalised, not logged" in problems[0] and "counts=convert" in problems[0]
    assert "1 problem\n" in capsys.readouterr().out
    assert not preprocess()["log1p"]
    assert "normalised already, but not logged" in capsys.readouterr().out
    np.testing.assert_allclose(matrix(), LOG1P, rtol=1e-5)


def test_only_counts_are_kept_as_counts(capsys):
    for values, told in ((LOG1P, "holds log1p"), (SHARES, "holds normalised")):
        write_h5ad("a.h5ad", values, OBS, GENES)
        argv = ["state", "preprocess", "--input=a.h5ad", "--output=out.h5ad", "--keep_counts"]
        assert told in refusal(capsys, prepare_data.main, *argv) and not Path("out.h5ad").exists()


@pytest.mark.parametrize("base", [2, 10])
def test_a_logarithm_to_another_base_is_brought_to_the_natural_one(base, capsys):
    write_h5ad("a.h5ad", csr_array((LOG1P / math.log(base)).astype(np.float32)), OBS, GENES, uns={"log1p": {
        "base": base}})
    assert kind() == "log1p"
    prepare_data.main(["inspect", "a.h5ad"])
    assert f"log1p to base {base}" in capsys.readouterr().out
    assert preprocess("--num_hvgs=10")["log1p"] and f"to base {base}" in capsys.readouterr().out
    np.testing.assert_allclose(matrix(), LOG1P, rtol=1e-5)
    rates = np.expm1(LOG1P.astype(np.float64))
    chosen = variable_genes(rates.sum(0), (rates**2).sum(0), N, 10)["highly_variable"]
    np.testing.assert_allclose(matrix("X_hvg"), LOG1P[:, chosen], rtol=1e-5)
    with h5py.File("out.h5ad") as file:
        assert "base" not in file["uns/log1p"]


def test_a_base_that_is_none_is_refused_and_counts_have_none():
    write_h5ad("a.h5ad", COUNTS, OBS, GENES, uns={"log1p": {"base": 2}})
    preprocess()
    np.testing.assert_allclose(matrix(), LOG1P, rtol=1e-5)
    write_h5ad("a.h5ad", LOG1P, OBS, GENES, uns={"log1p": {"base": 1}})
    with pytest.raises(DataError, match="uns/log1p/base is 1, no base"):
        kind()
    with opened() as file:
        del file["uns/log1p/base"]
        file["uns/log1p/base"] = h5py.Empty("f4")  # None, as anndata writes it
    assert kind() == "log1p"


def test_a_virtual_matrix_of_another_file_is_refused(capsys):
    argv = ["state", "preprocess", "--input=a.h5ad", "--output=out.h5ad"]
    write_h5ad("a.h5ad", 0 * COUNTS, OBS, GENES)
    assert "nothing but zeros" in refusal(capsys, prepare_data.main, *argv, "--drop_empty")
    assert prepare_data.main(["inspect", "a.h5ad"])["problems"] == ["X holds nothing but zeros"]
    with opened("source.h5") as source:
        source["values"] = COUNTS
    layout = h5py.VirtualLayout(COUNTS.shape, np.float32)
    layout[...] = h5py.VirtualSource("source.h5", "values", COUNTS.shape)
    with opened() as file:
        del file["X"]
        file.create_virtual_dataset("X", layout)
    told = refusal(capsys, prepare_data.main, *argv)
    assert "X is a virtual data set of another file, source.h5, which is not read: copy the data into one file" in told


# ---------------------------------------------------------------------------------------------------------------
# Where the values are
# ---------------------------------------------------------------------------------------------------------------
def test_x_is_needed_only_where_it_is_read(capsys):
    write_h5ad("a.h5ad", COUNTS, OBS, GENES, {"X_hvg": LOG1P[:, :9]}, layers={"counts": csr_array(COUNTS)})
    with opened() as file:
        del file["X"]
    with H5ad("a.h5ad") as file:
        assert file.keys == ["obsm/X_hvg", "layers/counts"] and file.n_vars == G
    assert prepare_data.main(["inspect", "a.h5ad"])["problems"] == []
    preprocess("--layer=counts")
    np.testing.assert_allclose(matrix(), LOG1P, rtol=1e-5)
    argv = ["state", "preprocess", "--input=a.h5ad", "--output=out.h5ad"]
    assert "a.h5ad: no matrix 'X'; there are 'X_hvg', 'counts'" in refusal(capsys, prepare_data.main, *argv)


@pytest.mark.parametrize("prefix", ["raw/", "raw."])  # now, and before anndata 0.7
def test_raw_is_read_with_its_own_genes(prefix, capsys):
    fewer = LOG1P[:, 5:] - LOG1P[:, 5:].mean(0)
    write_h5ad("a.h5ad", fewer, OBS, GENES[5:], uns={"log1p": {}})
    write_h5ad("b.h5ad", csr_array(COUNTS), OBS, GENES, var={"gene_name": np.array([f"G{i}" for i in range(G)])})
    with opened() as file, h5py.File("b.h5ad") as other:
        for part in ("X", "var"):
            other.copy(part, file, f"{prefix}{part}")
    told = refusal(capsys, prepare_data.main, "state", "preprocess", "--input=a.h5ad", "--output=out.h5ad")
    assert "use --layer= one of raw/X" in told
    found = preprocess("--layer=raw/X", "--num_hvgs=9", "--keep_counts")
    assert found["genes"] == G and found["left_out"] == ["X as it was"]
    np.testing.assert_allclose(matrix(), LOG1P, rtol=1e-5)
    np.testing.assert_array_equal(matrix("counts"), COUNTS)
    with H5ad("out.h5ad") as file, H5ad("a.h5ad") as source:
        assert file.row_names("var").tolist() == GENES and file.gene_names.tolist() == [f"G{i}" for i in range(G)]
        assert source.gene_names.tolist() == GENES[5:] and source.genes_of(source.var_part("raw/X")).tolist()[0] == "G0"
        assert source.matrix("raw/X").shape == (N, G)


@pytest.mark.parametrize("missing", ["category", "empty", "mask"])
def test_a_gene_without_a_name_keeps_that_of_the_index(missing):
    names = np.array([f"G{i}" for i in range(G)], object)
    names[4] = {"category": None, "empty": "", "mask": "x"}[missing]
    write_h5ad("a.h5ad", LOG1P, OBS, GENES, var={"gene_name": names})
    if missing == "mask":
        with opened() as file:
            del file["var/gene_name"]
            file["var/gene_name/values"] = names
            file["var/gene_name/mask"] = np.arange(G) == 4
    expected = [f"G{i}" for i in range(G)]
    expected[4] = "g4"
    with H5ad("a.h5ad") as file:
        assert file.gene_names.tolist() == expected


def test_a_column_that_the_order_of_columns_leaves_out_is_none():
    write_h5ad("a.h5ad", COUNTS, OBS, GENES)
    with opened() as file:
        file["obs"].attrs["column-order"] = ["cell_type", "gem_group"]  # gene is there all the same
    with H5ad("a.h5ad") as file, pytest.raises(DataError, match="no column 'gene' in obs; there are 'cell_type'"):
        file.column("gene")


# ---------------------------------------------------------------------------------------------------------------
# What preprocess keeps
# ---------------------------------------------------------------------------------------------------------------
LEVELS = ["low", "high", "unused", "middle"]


def rich_file() -> None:
    """Ordered categories, nullable columns, tables, arrays of every kind, and what cannot go along; cell 3 is empty."""
    write_h5ad("a.h5ad", csr_array(COUNTS * ONE_EMPTY), OBS, GENES,
               {"X_hvg": LOG1P[:, :9], "few": csr_array(COUNTS[:, :4])},
               layers={"spliced": COUNTS}, uns={"log1p": {"base": 7}, "note": {"seed": 3}, "hvg_names": np.ones(1)})
    with opened() as file:
        obs = file["obs"]
        obs.create_group("level").attrs.update({"encoding-type": "categorical", "ordered": True})
        obs["level/codes"], obs["level/categories"] = (np.arange(N) % 3 - 1).astype(np.int8), LEVELS
        obs.create_group("flag").attrs["encoding-type"] = "nullable-boolean"
        obs["flag/values"], obs["flag/mask"] = np.arange(N) % 2 == 0, np.arange(N) % 5 == 0
        obs.create_group("size").attrs["encoding-type"] = "nullable-integer"
        obs["size/values"], obs["size/mask"] = np.arange(N), np.arange(N) % 7 == 0
        obs.attrs["column-order"] = [*OBS, "level", "flag", "size"]
        obs.move("_index", "barcode")
        obs.attrs["_index"] = "barcode"
        table = file.create_group("obsm/table")
        table.attrs.update({"encoding-type": "dataframe", "_index": "_index", "column-order": ["b", "a"]})
        table["_index"], table["a"], table["b"] = [str(i) for i in range(N)], np.arange(N), np.arange(N) / 4
        file["obsm/X_pca"] = np.arange(2.0 * N).reshape(N, 2) + 1e-9
        file["obsm/cube"] = np.arange(N * 4).reshape(N, 2, 2)
        file["obsm/words"], file["obsm/letters"], file["mod/rna"] = ["a"] * N, [["a", "b"]] * N, 1
        file["varm/PCs"], file["obsp/near"] = np.ones((G, 2)), np.eye(N)
        file.copy("X", file.create_group("raw"), "X")
        file.copy("var", file["raw"], "var")


def test_preprocess_keeps_what_fits_and_says_what_does_not(capsys):
    rich_file()
    found = preprocess("--drop_empty")
    kept = np.flatnonzero(np.arange(N) != 3)
    parts = ["layers (spliced)", "mod (rna)", "obsm (X_hvg (chosen anew), letters, words)", "obsp (near)", "raw"]
    assert sorted(found["left_out"]) == parts
    assert f"note: left out of a.h5ad: {', '.join(found['left_out'])}\n" in capsys.readouterr().err
    with h5py.File("out.h5ad") as file:
        obs = file["obs"]
        assert obs["level"].attrs["ordered"] and obs["level/categories"].asstr()[:].tolist() == LEVELS
        assert obs["level/codes"][:].tolist() == (kept % 3 - 1).tolist()
        for name, expected in (("flag", kept % 2 == 0), ("size", kept)):
            mask = kept % (5 if name == "flag" else 7) == 0
            assert obs[name]["mask"][:].tolist() == mask.tolist()
            assert obs[name]["values"][:][~mask].tolist() == expected[~mask].tolist()
        assert obs["flag"].attrs["encoding-type"] == "nullable-boolean"
        assert obs["size"].attrs["encoding-type"] == "nullable-integer"
        assert obs.attrs["_index"] == "barcode" and len(obs["barcode"]) == len(kept)
        assert file["obsm/table"].attrs["column-order"].tolist() == ["b", "a"]
        assert file["obsm/table/b"][:].tolist() == (kept / 4).tolist()
        assert file["obsm/cube"][:].tolist() == np.arange(N * 4).reshape(N, 2, 2)[kept].tolist()
        assert file["obsm/X_pca"].dtype == np.float64 and file["obsm/X_pca"][0, 0] == 1e-9
        assert file["varm/PCs"].shape == (G, 2) and file["uns/note/seed"][()] == 3
        assert list(file["uns"]) == ["log1p", "note"] and list(file["uns/log1p"]) == []
    np.testing.assert_array_equal(matrix("few"), COUNTS[kept, :4])
    np.testing.assert_array_equal(matrix("table"), np.stack((kept / 4, kept), 1).astype(np.float32))


def test_pairs_of_cells_go_along_where_all_cells_do():
    rich_file()
    with opened() as file:
        del file["X"]
    preprocess("--layer=spliced")
    with h5py.File("out.h5ad") as file:
        assert file["obsp/near"].shape == (N, N)


def test_cells_without_a_label_are_left_out_if_asked_for(capsys):
    perturbation = OBS["gene"].astype(object)
    perturbation[[3, 50]] = None
    write_h5ad("a.h5ad", csr_array(COUNTS), {**OBS, "gene": perturbation}, GENES)
    argv = ["state", "preprocess", "--input=a.h5ad", "--output=out.h5ad", "--pert_col=gene"]
    told = refusal(capsys, prepare_data.main, *argv)
    assert "'gene' has no value for 2 of 108 rows, first for row 3" in told and "--drop_unlabelled" in told
    assert preprocess("--pert_col=gene", "--drop_unlabelled", "--keep_counts")["cells"] == N - 2
    assert "2 without a value" in capsys.readouterr().out
    np.testing.assert_array_equal(matrix("counts"), np.delete(COUNTS, [3, 50], 0))
    np.testing.assert_allclose(matrix(), np.delete(LOG1P, [3, 50], 0), rtol=1e-5)
