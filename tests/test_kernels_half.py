"""kernels/half.py, and the kernels on it: gradients of heads under autocast beside those in double precision."""

import pytest
import torch
from torch import Tensor

from kernels.half import head_gradients, plain_head_gradients, scaled_head_gradients
from kernels.log_probs import log_probs, plain_log_probs, shared_log_probs
from kernels.mean_xe import mean_xe, plain_mean_xe
from kernels.plan_contrast import plain_divergence, plain_information, plan_divergence, plan_information

KINDS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # and what its rounding may move, relatively
half_types = pytest.mark.parametrize("kind", KINDS, ids=["float16", "bfloat16"])


def drawn(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (mean + scale * torch.randn(shape, generator=generator)).requires_grad_()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_gradients(kind: torch.dtype, kernel, plain, inputs: list[Tensor], others: tuple = ()) -> None:
    """Those of the kernel under autocast are those of the plain form in double precision, but for rounding."""
    doubles = [tensor.double() for tensor in inputs]
    expected = torch.autograd.grad(plain(*doubles, *others), doubles)
    with torch.autocast("cpu", kind):
        value = kernel(*inputs, *others)
    for found, wanted in zip(torch.autograd.grad(value, inputs), expected, strict=True):
        assert found.dtype == torch.float32 and apart(found, wanted) < KINDS[kind]


@half_types
def test_the_weight_gradient_of_many_rows_is_a_sum_beyond_half_precision(kind):
    """20,000 rows that all push one way: their sum, before the mean is taken, is 120,000. float16 ends at 65,504."""
    x, weight = drawn(20_000, 8, scale=0.1, mean=8), drawn(4, 8, scale=0.01)
    assert_gradients(kind, mean_xe, plain_mean_xe, [x, weight], (torch.zeros(20_000, dtype=torch.int64),))


@half_types
@pytest.mark.parametrize("kernel, heads", [(log_probs, 2), (log_probs, 1), (shared_log_probs, 1)])
def test_so_is_that_of_looked_up_log_probabilities(kind, kernel, heads):
    x, weight, bias = drawn(20_000, 1, 8, scale=0.1, mean=8), drawn(4 * heads, 8, scale=0.01), drawn(2, 4)
    index = torch.zeros(20_000, 1, dtype=torch.int64)
    assert_gradients(kind, lambda *inputs: kernel(*inputs, index).sum(),
                     lambda *inputs: plain_log_probs(*inputs, index).sum(), [x, weight, bias])


@half_types
def test_the_contrast_of_plans_has_gradients_that_float16_by_itself_would_round_to_nothing(kind):
    """A mean over 256 rows of what 512 tokens and 4 plans that hardly differ share: the parts are about 1e-8."""
    x, weight, bias = drawn(256, 1, 16), drawn(4 * 512, 16, scale=0.1 / 16), drawn(4, 512, scale=0.0)
    log_belief = drawn(256, 4).detach().log_softmax(1)
    assert_gradients(kind, lambda *inputs: plan_information(*inputs, log_belief),
                     lambda *inputs: plain_information(*inputs, log_belief.double()), [x, weight, bias])
    assert_gradients(kind, plan_divergence, plain_divergence, [x, weight, bias])


@half_types
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_products_are_the_plain_ones_whatever_the_size_of_the_gradient(kind, size):
    delta, x, weight = drawn(60, 7).detach(), drawn(60, 5).detach().to(kind), drawn(7, 5).detach().to(kind)
    expected = plain_head_gradients(size * delta.double(), x.double(), weight.double())
    for function in (scaled_head_gradients, *[head_gradients] * (size == 1)):
        for found, wanted in zip(function(size * delta, x, weight), expected, strict=True):
            assert found.dtype == torch.float32 and apart(found, wanted) < KINDS[kind]
    assert all((g == 0).all() for g in scaled_head_gradients(0 * delta, x, weight))
