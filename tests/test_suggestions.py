"""Words of messages: what is offered for a misspelt name, whatever its case, blanks to be seen; numbers of things."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from commands import refusal

import train_arxiv
import train_state
from configurator import configure
from sources.chunks import range_problems
from sources.processes import ProcessError, make_process
from sources.shared import closest, counted, nearest, quoted, suggest
from sources.study_arxiv import named_runs


@dataclass
class Config:
    max_steps: int = 1
    kind: Literal["a", "b"] = "a"


def test_case_does_not_hide_the_name_that_is_meant():
    assert nearest("ISG15", ["isg15", "IFIT1"]) == "isg15" and nearest("cs.ds", ["math.AC", "cs.DS"]) == "cs.DS"
    assert closest("NK CELLS", ["B cells", "NK cells"]) == ", did you mean 'NK cells'?"
    assert nearest("zebra", ["isg15"]) is None and closest("zebra", ["isg15"]) == ""


def test_a_word_of_one_name_alone_is_that_name():
    names = ["no_consecutive_ones", "days_of_week", "days_of_a_month"]
    assert closest("WEEK", names) == ", did you mean 'days_of_week'?"
    assert closest("days", names) == "" == closest("", ["_a"]) == closest("wee", names)


def test_a_blank_at_the_end_of_a_name_is_seen_in_what_is_offered_and_in_the_list():
    assert suggest("gene", ["gene ", "batch"]) == "; did you mean 'gene '? There are 'gene ', 'batch'"
    assert suggest("zebra", ["gene ", 3]) == "; there are 'gene ', '3'" and suggest("x", []) == "; there are none"
    assert quoted(range(15)).endswith("'10', '11' and 3 more") and quoted([]) == "none"


def test_every_part_of_the_program_ignores_case(capsys):
    with pytest.raises(ProcessError, match="did you mean 'mess3'"):
        make_process("MESS3")
    with pytest.raises(Exception, match="did you mean 'K1_csDS'"):
        named_runs("k1_CSds", [["cs.DS"]], ["cs.DS"])
    assert "did you mean max_steps?" in refusal(capsys, lambda argv: configure(Config, argv), "--MAX-STEP=3")
    told = refusal(capsys, lambda argv: configure(train_state.Config, argv), "config/STATE_SM.py")
    assert "; there is config/state_sm.py" in told


def test_one_of_a_thing_is_not_called_many():
    assert [counted(n, "batch", "batches") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert [counted(n, "cell type") for n in (0, 1, 2, 12_345)] == ["0 cell types", "1 cell type", "2 cell types",
                                                                    "12,345 cell types"]


def test_a_blank_in_the_name_of_a_setting_is_seen(capsys, tmp_path):
    (tmp_path / "a.json").write_text('{"max_steps ": 3}')
    told = refusal(capsys, lambda argv: configure(Config, argv), str(tmp_path / "a.json"))
    assert "'max_steps ': no such setting, did you mean max_steps?" in told


def test_a_run_of_one_of_each_thing_is_described_so():
    model = torch.nn.Linear(1, 1)
    ones = {"max_steps": 1, "batch_size": 1, "out_dir": "x"}
    cells = train_state.describe(model, list(model.parameters()), train_state.Config(**ones, cell_set_len=1))
    assert cells == "State: 2 parameters | 1 step of 1 sentence of 1 cell | x"
    chunks = SimpleNamespace(codes=np.array([0]), names=["a"], code=lambda name: 0, size=2, n_ctx=1, vocab_size=5)
    cfg = train_arxiv.Config(**ones)
    text = train_arxiv.describe(chunks, np.array([0]), ["a"], model, 1, cfg)
    assert text.startswith("K = 1 of 1 category of ") and text.endswith("2 parameters | 1 step of 1 token | x")


def test_verbs_go_with_their_number():
    assert range_problems(np.array([5, 1]), 1, 1) == ["1 token is beyond vocab_size = 1", "1 token is negative"]
    assert range_problems(np.array([5, 2]), 0, 1) == ["2 tokens are beyond vocab_size = 1"]
