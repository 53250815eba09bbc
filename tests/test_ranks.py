"""Several ranks: what they must agree on, what happens when one of them ends, and what their environment may be."""

import os
from types import SimpleNamespace

import pytest
from commands import two_ranks

from common.errors import DataError, InputError
from common.runtime import Runtime


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 7, "device": "cpu", "precision": "fp32", "compile": "false", **changes})


def exchange(argv: list[str]) -> None:
    """Both ranks: what rank 0 alone can read, what it cannot, what they have of one thing."""

    def missing():
        raise DataError("no such file")

    with Runtime(settings()) as rt:
        assert rt.from_main(lambda: {"read by": rt.rank}) == {"read by": 0}
        with pytest.raises(DataError, match="no such file"):
            rt.from_main(missing)
        rt.agree(lr=0.1, data={"a": "1"})
        with pytest.raises(InputError) as error:
            rt.agree(lr=0.1, data={"a": str(rt.rank)})
        host = os.uname().nodename
        assert str(error.value).startswith(f"data is not the same on all ranks: {{'a': '0'}} on rank 0 ({host}), "
                                           f"{{'a': '1'}} on rank 1 ({host}). ")


def test_ranks_know_what_rank_0_reads_and_whether_they_have_the_same(tmp_path):
    assert two_ranks("test_ranks", function="exchange", folder=tmp_path) == ""


def test_one_rank_reads_for_itself_and_agrees_with_itself():
    with Runtime(settings()) as rt:
        assert rt.from_main(lambda: 5) == 5
        rt.agree(lr=0.1)
