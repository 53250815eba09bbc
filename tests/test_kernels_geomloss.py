"""kernels/geomloss_distance.py: geomloss' own values and gradients, made in full float32 whatever is on around them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import products
from kernels.geomloss_distance import geomloss_distance, plain_geomloss_distance
from train_state import set_loss

LOSSES = ("sinkhorn", "gaussian", "laplacian")
BLUR = 3.0  # a few times less than cells are apart: no kernel vanishes


def sets(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    x, y = (3 * torch.rand(3, n, 40, generator=draw, dtype=torch.float64) for n in (16, 12))
    return (x + 0.5).to(dtype), y.to(dtype)


def with_gradient(distance, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [B], gradient of a weighted sum of them with respect to x)."""
    x = x.clone().requires_grad_()
    values = distance(x, y)
    (values * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    return values.detach(), x.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_are_those_of_geomloss(loss):
    x, y = sets(torch.float64)
    ours = with_gradient(lambda a, b: geomloss_distance(a, b, loss, BLUR), x, y)
    plain = with_gradient(lambda a, b: plain_geomloss_distance(a, b, loss, BLUR), x, y)
    for value, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=0)
        assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("distance, loss", [(set_loss, loss) for loss in (*LOSSES, "energy", "se")]
                         + [(geomloss_distance, loss) for loss in LOSSES])
def test_a_distance_under_autocast_has_the_value_and_the_gradient_of_float32(distance, loss):
    x, y = sets()
    exact = with_gradient(lambda a, b: distance(a, b, loss, BLUR), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradient(lambda a, b: distance(a, b, loss, BLUR), x, y)
    for value, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(value, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_product_of_matrices_is_made_with_tf32(loss, monkeypatch):
    found = []
    monkeypatch.setattr(products, "exact", lambda: False)  # as on most processors

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            if "mm" in str(call):
                found.append(torch.get_float32_matmul_precision())
            return call(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("high")
    try:
        with Products():
            with_gradient(lambda a, b: geomloss_distance(a, b, loss, BLUR), *sets())
        assert set(found) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_no_gradient_is_made_where_none_is_asked_and_gradients_stay_as_they_were_switched():
    x, y = sets()
    assert not geomloss_distance(x, y, "sinkhorn", BLUR).requires_grad
    with torch.no_grad():
        assert not geomloss_distance(x.requires_grad_(), y, "sinkhorn", BLUR).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and geomloss_distance(x, y, "sinkhorn", BLUR).requires_grad
