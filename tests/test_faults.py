"""A few faults of every kind that faults.py knows: no traceback, no hang, nothing wrong without a word."""

import json
import random

import damage
import faults
import pytest
import torch
from commands import ended


@pytest.fixture(scope="module")
def short_form(faults_at_work) -> dict:
    """What came of the short form, tried once for all tests here: {"table": numbers of all, "wrong": what is not clear
    or right}."""
    process, folder = faults_at_work
    done = ended(process, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("kind", [name for name, kind in faults.KINDS.items() if kind.short])
def test_a_fault_ends_in_a_sentence_or_in_what_was_asked_for(kind, short_form):
    wrong = [trial for trial in short_form["wrong"] if trial["kind"] == kind and trial["column"] not in faults.GOOD]
    assert not wrong, "python tests/faults.py --only='{kind}:{number}' is {column}:\n{text}".format(**wrong[0])
    row = short_form["table"][kind]
    assert row["tried"] == faults.KINDS[kind].short == sum(row[column] for column in faults.GOOD)


def test_what_a_run_found_is_told_from_what_another_found():
    state = {"step": 3, "model": {"w": torch.arange(4.0)}, "seconds": 1.0}
    same = {"seconds": 2.0, "model": {"w": torch.arange(4.0)}, "step": 3}
    assert faults.fingerprint(state) == faults.fingerprint(same)
    others = [
        state | {"step": 4},
        state | {"model": {"w": torch.arange(4.0).nextafter(torch.tensor(9.0))}},
        state | {"model": {"w": torch.arange(4.0).double()}},
        state | {"more": None},
    ]
    for other in others:
        assert faults.fingerprint(other) != faults.fingerprint(state)


@pytest.mark.parametrize("text, code, column", [
    ("", 0, ""), ("error: x.pt is damaged: train anew", 2, "clear"), ("error: x", 2, "vague"), ("", 1, "vague"),
    ("Traceback (most recent call last):\nValueError\nerror: x.pt is damaged", 2, "traceback"), ("", -11, "traceback"),
    ("error: x.pt is damaged: train anew", None, "hang")])
def test_how_a_command_ended_has_a_column(text, code, column):
    assert faults.Ending(code, text, "").verdict() == column


def test_damage_is_a_function_of_the_seed_and_changes_the_file():
    whole = b'{"lr": 0.1, "steps": [1, 2, 3]}\n' * 9
    for accident in (damage.damaged_bytes, damage.damaged_text):
        found = [accident(whole, random.Random(f"{i}")) for i in range(50)]
        assert found == [accident(whole, random.Random(f"{i}")) for i in range(50)]
        assert sum(data != whole for data in found) > 40
