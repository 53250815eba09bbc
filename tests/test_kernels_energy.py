"""kernels/energy.py: the distance in blocks against its plain form, values and gradients; what it holds in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import products
from kernels.energy import energy_distance, plain_energy_distance


def sets(n: int = 7, m: int = 5, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Three pairs of sets, of far and near cells, with cells twice in a set and one in both."""
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.rand(3, count, width, generator=draw, dtype=torch.float64) for count in (n, m))
    x[:, 1], y[:, 2], y[0, 0] = x[:, 0], y[:, 1], x[0, 3]
    x[1, 4] = x[1, 5] + 1e-5  # nearer than what counts as a distance, so without gradient
    return x + torch.tensor([0.0, 0.5, 2.0])[:, None, None], y


def with_gradient(distance, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [B], gradient of a weighted sum of them with respect to x)."""
    x = x.clone().requires_grad_()
    values = distance(x, y)
    return values.detach(), torch.autograd.grad((values * torch.tensor([1.0, -2.0, 0.5])).sum(), x)[0]


def energy_with_gradient(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    values = energy_distance(x, y)
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


@pytest.mark.parametrize("pairs", [1, 6, 40, 1 << 23])
def test_values_and_gradients_are_those_of_the_plain_form(pairs):
    x, y = sets()
    ours = with_gradient(lambda a, b: energy_distance(a, b, pairs), x, y)
    for value, plain in zip(ours, with_gradient(plain_energy_distance, x, y), strict=True):
        torch.testing.assert_close(value, plain, atol=1e-10, rtol=0)


def test_gradients_equal_finite_differences():
    x, y = sets()
    x, y = x[[0, 2], 2:].requires_grad_(), y[[0, 2], 3:]  # no cell twice: there the energy has no derivative
    assert torch.autograd.gradcheck(lambda a: energy_distance(a, y, pairs=3), x, eps=1e-7, atol=1e-6)


def test_in_single_precision_no_cell_is_at_a_distance_from_itself():
    """Of cells of 2,000 genes rounding would make of it a hundredth, as a mean over a set 8e-5 of the value."""
    draw = torch.Generator().manual_seed(0)
    x, y = (scale * (torch.rand(4, 16, 2_000, generator=draw) - 0.9).relu() for scale in (30, 40))
    exact = energy_distance(x.double(), y.double())
    torch.testing.assert_close(energy_distance(x, y).double(), exact, atol=0, rtol=2e-5)
    x[:, 1] = x[:, 0]  # a cell that is there twice is not drawn apart from itself either
    slope, exact = (energy_with_gradient(x.to(kind), y.to(kind))[1] for kind in (torch.float32, torch.float64))
    torch.testing.assert_close(slope.double(), exact, atol=2e-6, rtol=0)
    assert exact.abs().max() > 2e-3


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made by any operation, and of the largest that is not of cells."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.any, self.pairs = width, 0, 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        found = call(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.any = max(self.any, tensor.numel())
                self.pairs = max(self.pairs, 0 if self.width in tensor.shape else tensor.numel())
        return found


def test_squared_distances_are_made_without_tf32(monkeypatch):
    """With ten bits of mantissa a cell of 2,000 genes is 0.1 (bits rounded) to 1 (bits cut off) away from itself."""
    found, bmm = [], torch.bmm
    monkeypatch.setattr(products, "exact", lambda: False)  # as on most processors
    monkeypatch.setattr(torch, "bmm", lambda *a: (found.append(torch.get_float32_matmul_precision()), bmm(*a))[1])
    torch.set_float32_matmul_precision("high")
    try:
        energy_distance(*(cells.float() for cells in sets()))
        assert set(found) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_thousand_cells_of_two_thousand_genes_need_no_matrix_of_all_pairs():
    cells_, genes = 1_024, 2_000
    x, y = torch.rand(1, cells_, genes, requires_grad=True), torch.rand(1, cells_, genes)
    with Largest(genes) as made:
        energy_distance(x, y, pairs=64 * cells_).backward()
    assert made.any == cells_ * genes and made.pairs <= 64 * cells_
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
