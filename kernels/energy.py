"""The energy distance of many pairs of sets, and its gradient, without a matrix of all pairs of cells.

The plain form, which `energy_distance` equals (values and gradients of x, held together by a test in float64):

    def plain_energy_distance(x, y):
        def mean_distance(a, b):
            squared = (a[:, :, None] - b[:, None]).square().sum(-1)  # [B, n, m]
            return squared.clamp_min(SMALLEST).sqrt().mean((1, 2))
        return mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2

That is geomloss.SamplesLoss("energy") too. The plain form keeps [B, n, m, D] for its gradient; this one is about twice
as fast as geomloss and holds `pairs` distances at a time.
"""

import contextlib
from collections.abc import Iterator

import torch

SMALLEST = 1e-8  # squared distances below are taken for it and have no gradient, as in geomloss


def plain_energy_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """E|x - y| - E|x - x'| / 2 - E|y - y'| / 2 (Szekely and Rizzo 2013): x [B, N, D], y [B, M, D] -> [B]."""

    def mean_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        squared = (a[:, :, None] - b[:, None]).square().sum(-1)  # [B, n, m]
        return squared.clamp_min(SMALLEST).sqrt().mean((1, 2))

    return mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2


def energy_distance(x: torch.Tensor, y: torch.Tensor, pairs: int = 1 << 23) -> torch.Tensor:
    """The same in blocks of rows; y has no gradient.

    Args:
        x, y: sets of cells [B, N, D] and [B, M, D], float32 or float64.
        pairs: most distances held in memory at a time.
    """
    with full_float32():
        return EnergyDistance.apply(x, y.detach(), pairs)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32: squared distances are small differences of large numbers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class EnergyDistance(torch.autograd.Function):
    """The distance with its gradient made on the way, so that no matrix of distances outlives a block of rows.

    d/dx_i = sum_j (x_i - y_j) / (N M |x_i - y_j|) - sum_j (x_i - x_j) / (N^2 |x_i - x_j|). Squared distances are
    |x|^2 - 2 x y + |y|^2 in geomloss's own order of operations: values agree to the last digits, in float32 too.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, y: torch.Tensor, pairs: int) -> torch.Tensor:
        (B, N, _), M = x.shape, y.shape[1]
        xx = x.square().sum(-1)  # [B, N]
        yy = y.square().sum(-1)  # [B, M]
        total = x.new_zeros(B)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        block = max(1, pairs // (B * max(N, M)))
        for start in range(0, N, block):
            rows = slice(start, start + block)
            among = _distances(x[:, rows], x, xx[:, rows], xx)
            across = _distances(x[:, rows], y, xx[:, rows], yy)
            total += across.sum((1, 2)) / (N * M) - among.sum((1, 2)) / (2 * N * N)
            if gradient is not None:
                pull = _inverse(across, N * M)
                push = _inverse(among, N * N)
                # Of a cell with itself rounding may have left a little; in its place stands what multiplies x_i.
                push.diagonal(start, 1, 2).zero_().copy_(pull.sum(-1) - push.sum(-1))
                torch.bmm(push, x, out=gradient[:, rows]).baddbmm_(pull, y, alpha=-1)
        # y with y: each pair once. Of four blocks of rows that leaves 5/8 of the work.
        block = min(block, max(32, M // 4))
        for start in range(0, M, block):
            rows = slice(start, start + block)
            apart = _distances(y[:, rows], y[:, start:], yy[:, rows], yy[:, start:])
            total -= (2 * apart.sum((1, 2)) - apart[:, :, :block].sum((1, 2))) / (2 * M * M)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        return outer[:, None, None] * ctx.saved_tensors[0], None, None


def _distances(a: torch.Tensor, b: torch.Tensor, aa: torch.Tensor, bb: torch.Tensor) -> torch.Tensor:
    """|a_i - b_j| [B, n, m] from squared norms aa [B, n] and bb [B, m]."""
    squared = torch.bmm(a, b.transpose(1, 2)).mul_(-2).add_(aa[:, :, None]).add_(bb[:, None])
    return squared.clamp_min_(SMALLEST).sqrt_()


def _inverse(distances: torch.Tensor, count: int) -> torch.Tensor:
    """1 / (count * distance), 0 where two cells are the same; takes the place of the distances."""
    near = distances <= SMALLEST**0.5
    return distances.mul_(count).reciprocal_().masked_fill_(near, 0.0)
