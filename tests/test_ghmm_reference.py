"""train_ghmm.py against numbers of the source system: every case of every ghmm_*.json in REFERENCE_DIR."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

import train_ghmm
from sources.processes import make_process

FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(train_ghmm.__file__).parent / "../shared/reference"))
FILES = sorted(FOLDER.glob("ghmm_*.json"))
CASES = [(path.name, case) for path in FILES for case in json.loads(path.read_text(encoding="utf-8"))["cases"]]
QUANTITIES = ("transition_matrices", "stationary_state", "normalizing_eigenvector", "word_probabilities",
              "belief_after_word", "myopic_entropy_nats")
ATOL = 1e-10


def name_of(value) -> str | None:
    if not isinstance(value, dict):
        return None
    return value["process"] + "".join(f"-{k}={v}" for k, v in value["params"].items()).replace(" ", "")


every_case = pytest.mark.parametrize("file, case", CASES, ids=name_of)
if not CASES:
    pytestmark = pytest.mark.skip(f"no ghmm_*.json with cases in {FOLDER}; set REFERENCE_DIR to the reference folder")
    every_case = pytest.mark.parametrize("file, case", [("", {})], ids=["absent"])


built = {}  # a process is checked for negative words when built, which takes a while: once is enough


@pytest.fixture
def process(case):
    key = name_of(case)
    if key not in built:
        built[key] = make_process(case["process"], **case["params"])
    return built[key]


def words_of(table: dict) -> list[list[int]]:
    return [[int(token) for token in word.split()] for word in table]


@every_case
def test_ghmm_reference_cases_hold_all_that_is_checked_here(file, case):
    assert set(QUANTITIES) <= set(case)
    assert case["word_probabilities"] and case["belief_after_word"] and case["myopic_entropy_nats"]


@every_case
def test_ghmm_reference_matrices_and_sizes(file, case, process):
    assert process.vocab_size == case["vocab_size"] and process.num_states == case["num_states"]
    np.testing.assert_allclose(process.transition_matrices, case["transition_matrices"], rtol=0, atol=ATOL)


@every_case
def test_ghmm_reference_stationary_state_and_eigenvector(file, case, process):
    np.testing.assert_allclose(process.normalizing_eigenvector, case["normalizing_eigenvector"], rtol=0, atol=ATOL)
    np.testing.assert_allclose(process.stationary_state, case["stationary_state"], rtol=0, atol=ATOL)


@every_case
def test_ghmm_reference_word_probabilities(file, case, process):
    found = [process.word_probability(word) for word in words_of(case["word_probabilities"])]
    np.testing.assert_allclose(found, list(case["word_probabilities"].values()), rtol=1e-9, atol=1e-12)


@every_case
def test_ghmm_reference_beliefs(file, case, process):
    for word, expected in zip(words_of(case["belief_after_word"]), case["belief_after_word"].values(), strict=True):
        np.testing.assert_allclose(process.beliefs([word])[0, -1], expected, rtol=0, atol=1e-9, err_msg=str(word))


@every_case
def test_ghmm_reference_myopic_entropies(file, case, process):
    expected = case["myopic_entropy_nats"]
    found = process.entropies(len(expected) - 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert all(e.error == 0 for e in found)
    last = process.myopic_entropy(len(expected) - 1)
    assert last == pytest.approx(expected[-1], abs=1e-9) and last.error == 0
    np.testing.assert_allclose(process.optimal_loss(len(expected) - 1), expected[1:], rtol=0, atol=1e-9)
