"""kernels/mean_xe.py: the streamed cross entropy of a vocabulary head beside its plain form."""

import pytest
import torch
import torch.nn.functional as F

from kernels import mean_xe as kernel
from kernels.mean_xe import mean_xe, plain_mean_xe, row_xe


def head(R: int = 150, D: int = 8, V: int = 23, kind: torch.dtype = torch.float64) -> tuple:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, D, dtype=kind, generator=draw, requires_grad=True) for n in (R, V))
    return x, weight, torch.randint(V, (R,), generator=draw)


def value_and_gradients(function, x, weight, targets, scale: float = 3.0) -> list[torch.Tensor]:
    loss = function(x, weight, targets)
    return [loss.detach(), *torch.autograd.grad(scale * loss, [x, weight])]


@pytest.fixture(params=[64, 1 << 22], ids=["many blocks", "one block"])
def block(request, monkeypatch):
    """Blocks of 64 rows, the last of them 22; and one block for all."""
    monkeypatch.setitem(kernel.BLOCK, "cpu", request.param)


def test_streamed_and_plain_mean_have_the_same_value_and_gradients_in_double_precision(block):
    inputs = head()
    streamed, plain = (value_and_gradients(function, *inputs) for function in (mean_xe, plain_mean_xe))
    for ours, expected in zip(streamed, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert streamed[0].dtype == torch.float64 and streamed[1].abs().max() > 0


def test_the_gradients_are_those_of_finite_differences(block):
    x, weight, targets = head(R=70, D=2, V=5)
    assert torch.autograd.gradcheck(lambda x, weight: mean_xe(x, weight, targets), (x, weight))


def test_rows_are_those_of_the_plain_form(block):
    x, weight, targets = head()
    with torch.no_grad():
        expected = F.cross_entropy(F.linear(x, weight), targets, reduction="none")
        torch.testing.assert_close(row_xe(x, weight, targets), expected, rtol=1e-12, atol=1e-14)


def test_large_logits_do_not_overflow(block):
    x, weight, targets = head(kind=torch.float32)
    with torch.no_grad():
        x *= 1_000
    streamed, plain = (value_and_gradients(function, x, weight, targets) for function in (mean_xe, plain_mean_xe))
    for ours, expected in zip(streamed, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_under_autocast_products_are_bfloat16_and_sums_are_single_precision(block):
    inputs = head(kind=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        streamed, plain = (value_and_gradients(function, *inputs) for function in (mean_xe, plain_mean_xe))
        rows = row_xe(*inputs)
    assert [tensor.dtype for tensor in streamed] == [torch.float32] * 3 and rows.dtype == torch.float32
    torch.testing.assert_close(streamed[0], plain[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(rows.mean(), plain[0], rtol=1e-3, atol=0)
    for ours, expected in zip(streamed[1:], plain[1:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=3e-2, atol=2e-3)
    assert (streamed[0] - value_and_gradients(plain_mean_xe, *inputs)[0]).abs() > 1e-6  # rounded indeed


def test_it_runs_without_a_device_that_computes():
    """A tensor left behind on the CPU, or a number read in the middle, fails on the meta device."""
    x, weight = (torch.zeros(n, 4, device="meta", requires_grad=True) for n in (10, 7))
    loss = mean_xe(x, weight, torch.zeros(10, dtype=torch.int64, device="meta"))
    loss.backward()
    assert loss.device.type == x.grad.device.type == "meta" and weight.grad.shape == (7, 4)
