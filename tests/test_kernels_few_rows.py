"""kernels/few_rows.py: logits by packed heads are those of the plain form."""

import pytest
import torch

from kernels import few_rows
from kernels.log_probs import block_logits

K, V, H = 3, 11, 8


def heads(kind: str, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [R, P, H], weight and bias of a kind of experts."""
    draw = torch.Generator().manual_seed(0)
    inputs = K if kind == "an input a plan" else 1
    width = H + 2 if kind == "low rank" else H
    x = torch.randn(rows, inputs, width, generator=draw)
    if kind == "low rank":
        shape = V, H + 2 * K
    else:
        shape = V * (K if kind == "a head a plan" else 1), H
    return x, torch.randn(shape, generator=draw), torch.randn(K, V, generator=draw)


@pytest.fixture(params=["packed", "plain"])
def way(request, monkeypatch) -> str:
    """Heads of any size are packed, or none."""
    if request.param == "packed" and not few_rows.can_pack(torch.float32):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(few_rows, "LEAST", 0)
    if request.param == "plain":
        monkeypatch.setattr(few_rows, "can_pack", lambda kind: False)
    return request.param


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["a head a plan", "an input a plan", "a bias a plan", "low rank"])
def test_logits_are_the_plain_form(kind, rows, way):
    x, weight, bias = heads(kind, rows)
    kept = few_rows.Heads(weight, bias, x)
    # One row of one input is read at the rate of the memory either way, and low rank has a form of its own.
    assert kept.is_packed == (way == "packed" and kind != "low rank" and (rows > 1 or kind == "an input a plan"))
    for more in (rows, rows + 3):  # any number of rows is allowed
        x, _, _ = heads(kind, more)
        torch.testing.assert_close(kept.logits(x), block_logits(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_logits_in_half_precision_are_kept_in_single(rows, way):
    if way == "packed" and not few_rows.can_pack(torch.bfloat16):
        pytest.skip("this processor has no bfloat16")
    x, weight, bias = heads("a head a plan", rows)
    kept = few_rows.Heads(weight, bias, x, torch.bfloat16)
    assert kept.is_packed == (way == "packed")
    found = kept.logits(x)
    rounded = block_logits(x.bfloat16().float(), weight.bfloat16().float(), bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rounded, rtol=2e-2, atol=2e-2)  # of a product in bfloat16: 3 digits
    assert not few_rows.Heads(weight.double(), bias.double(), x.double()).is_packed
