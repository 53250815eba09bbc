"""common/ahead.py: batches that a thread makes while the step before is trained are those of the loop without it."""

import threading

import pytest
import torch

import train_state
from common import checkpoint
from common.ahead import Ahead, send
from common.errors import DataError
from common.runtime import Runtime

CPU = torch.device("cpu")
TINY = ("--n_layers=1 --d_model=16 --n_heads=2 --d_mlp=16 --cell_set_len=8 --batch_size=4 --eval_sentences=4 "
        "--device=cpu --warmup_steps=0 --max_steps=4 --eval_interval=4 --save_interval=2 --keep_last=-1").split()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


class Squares:
    """Batches that remember which were made, and by whom."""

    def __init__(self, fails_at: int = -1):
        self.made, self.fails_at = [], fails_at

    def __call__(self, step: int) -> int:
        if step == self.fails_at:
            raise DataError(f"step {step} has no batch")
        self.made.append((step, threading.current_thread() is threading.main_thread()))
        return step**2


def test_batches_are_those_of_their_steps_in_any_order_and_made_once_where_steps_follow_one_another():
    ahead = Ahead(Squares(), 6, CPU)
    assert [ahead(step) for step in range(6)] == [0, 1, 4, 9, 16, 25]
    assert ahead.made == [(step, False) for step in range(6)]  # nothing beyond the end
    assert [ahead(step) for step in (3, 1, 5, 7)] == [9, 1, 25, 49]
    ahead.close()
    assert not threads()


def test_the_next_batch_is_made_during_the_step():
    ahead = Ahead(Squares(), 3, CPU)
    assert ahead(1) == 1
    ahead.next.result(timeout=10)  # by nobody's call
    assert ahead.made == [(1, False), (2, False)]
    ahead.close()


def test_an_error_of_the_thread_is_raised_by_the_call_of_its_step():
    ahead = Ahead(Squares(fails_at=1), 3, CPU)
    assert ahead(0) == 0
    with pytest.raises(DataError, match="step 1 has no batch"):
        ahead(1)
    assert ahead(2) == 4
    ahead.close()


def test_a_runtime_ends_the_thread_also_where_the_loop_fails():
    rt = Runtime(train_state.Config(device="cpu"))
    batches = Squares()
    assert rt.ahead(batches, 3) is batches  # a CPU has no time to spare
    with pytest.raises(ZeroDivisionError), rt:
        rt.device = torch.device("meta")
        batches = rt.ahead(batches, 3)
        assert batches(0) == 0 and threads()
        raise ZeroDivisionError
    assert not threads()


def test_what_is_sent_arrives():
    tensor = torch.arange(3)
    assert send(tensor, "cpu") is tensor and send(tensor, torch.device("meta")).device.type == "meta"


def test_a_run_with_batches_ahead_is_the_one_without_and_goes_on_as_it(in_a_folder_of_its_own, quickly, monkeypatch):
    train_state.main([*TINY, "--out_dir=without"])
    wrapped = []

    def ahead(rt, batches, last):
        wrapped.append(Ahead(batches, last, rt.device))
        rt._stack.callback(wrapped[-1].close)
        return wrapped[-1]

    monkeypatch.setattr(Runtime, "ahead", ahead)
    train_state.main([*TINY, "--out_dir=with", "--resume=without/step_2.pt"])
    assert wrapped[0].step == 3 and not threads()
    whole, other = (checkpoint.load(f"{folder}/last.pt") for folder in ("without", "with"))
    assert all(torch.equal(weight, other["model"][name]) for name, weight in whole["model"].items())
    assert torch.equal(whole["ranks"][0]["torch_rng"], other["ranks"][0]["torch_rng"])
