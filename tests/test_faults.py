"""A few faults of every kind that faults.py knows: no traceback, no hang, nothing wrong without a word."""

import random

import damage
import faults
import pytest
import torch


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[faults.Told]:
    """What came of the short form, tried once for all tests here: the slow kinds, which are the last, first."""
    wanted = [(name, i) for name, kind in reversed(faults.KINDS.items()) for i in range(kind.short)]
    return list(faults.all_trials(wanted, tmp_path_factory.mktemp("faults"), seed=1, jobs=2))


@pytest.mark.parametrize("kind", [name for name, kind in faults.KINDS.items() if kind.short])
def test_a_fault_ends_in_a_sentence_or_in_what_was_asked_for(kind, told):
    wrong = [trial for trial in told if trial.kind == kind and trial.column not in faults.GOOD]
    assert not wrong, f"python tests/faults.py --only='{kind}:{wrong[0].number}' is {wrong[0].column}:\n{wrong[0].text}"
    assert sum(trial.kind == kind for trial in told) == faults.KINDS[kind].short


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
