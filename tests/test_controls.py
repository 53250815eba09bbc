"""sources/controls.py: which columns of a file are those that a model reads, and what is said of the others."""

import numpy as np
import pytest

from common.errors import DataError
from sources.controls import find_controls, gene_order, matrix_to_read, names_in
from sources.h5ad import H5ad, write_h5ad

GENES = ["g0", "g1", "g2", "g3"]


def file_of(genes: list[str], X_hvg: int = 0) -> H5ad:
    """Two cells, their genes, and of those the first in X_hvg."""
    X = np.arange(2 * len(genes), dtype=np.float32).reshape(2, -1)
    obsm = {"X_hvg": X[:, :X_hvg]} if X_hvg else {}
    write_h5ad("cells.h5ad", X, {"gene": np.array(["p", "q"], object)}, np.array(genes), obsm)
    return H5ad("cells.h5ad")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_genes_of_one_name_stay_where_they_are_in_a_file_like_the_models():
    genes = ["g0", "twin", "g2", "twin"]
    with file_of(genes) as file:
        assert gene_order(file, None, list(genes))[1].tolist() == [0, 1, 2, 3]
        assert gene_order(file, None, None)[1].tolist() == [0, 1, 2, 3]
        assert gene_order(file, None, ["g2", "g0"])[1].tolist() == [2, 0]  # which are told apart


@pytest.mark.parametrize("in_model, in_file, words", [
    (["g0", "twin"], ["twin", "g0", "twin"], "2 genes of the name 'twin', and 1 in the model's data"),
    (["twin", "g0", "twin"], ["twin", "g0"], "1 gene of the name 'twin', and 2 in the model's data")])
def test_a_gene_that_is_not_told_apart_is_refused(in_model, in_file, words):
    with file_of(in_file) as file, pytest.raises(DataError, match=words):
        gene_order(file, None, in_model)


def test_where_neither_matrix_has_a_gene_it_is_named():
    with file_of(GENES) as file:
        assert matrix_to_read(file, "X_hvg", GENES[:2]) is None
        wanted = [*GENES, "G9"]
        with pytest.raises(DataError, match="has no gene 'G9', which this model reads"):
            gene_order(file, matrix_to_read(file, "X_hvg", wanted), wanted)
    with file_of(GENES, X_hvg=2) as file:
        assert matrix_to_read(file, "X_hvg", ["g9"]) == "X_hvg"


def test_a_misspelt_name_with_commas_is_not_taken_to_pieces():
    known = ["[('Drug, (R)-x', 5.0, 'uM')]", "[('8-Hydroxyquinoline', 0.05, 'uM')]", "STAT1", "IRF1"]
    with pytest.raises(DataError) as error:
        names_in(["[('drug, (R)-x', 5.0, 'uM')]"], known, "the model")
    assert "\"[('drug, (R)-x', 5.0, 'uM')]\" is not known" in str(error.value)
    assert "did you mean \"[('Drug, (R)-x', 5.0, 'uM')]\"?" in str(error.value)
    with pytest.raises(DataError, match="'IRF' is not known to the model.*did you mean 'IRF1'"):
        names_in(["STAT1,IRF"], known, "the model")


def test_a_control_cell_without_type_or_batch_serves_nobody_where_such_are_left_out():
    obs = {"type": ["A", "A", None, "A", "A", None], "gene": ["ctrl", "ctrl", "ctrl", "p", None, "p"],
           "batch": ["b0", None, "b0", "b0", "b0", "b0"]}
    columns = {name: np.array(values, object) for name, values in obs.items()}
    write_h5ad("cells.h5ad", np.ones((6, 2), np.float32), columns, np.array(["g0", "g1"]))
    with H5ad("cells.h5ad") as file:
        found = find_controls(file, "type", "gene", "batch", "ctrl", drop_unlabelled=True)
        assert found.rows.tolist() == [0] and dict(found.perturbed) == {("A", "p"): 1}
        without = find_controls(file, "type", "gene", None, "ctrl", drop_unlabelled=True)
        assert without.rows.tolist() == [0, 1] and without.batch is None
        with pytest.raises(DataError, match="'type' has no value for 2 of 6 rows.*--drop_unlabelled"):
            find_controls(file, "type", "gene", None, "ctrl")
