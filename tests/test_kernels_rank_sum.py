"""kernels/rank_sum.py: the fast test against its plain form, that of scipy, and by hand."""

import math

import numpy as np
import pytest

from kernels.rank_sum import plain_rank_sum, rank_sum


def expression(rng: np.random.Generator, n: int, G: int, level: float = 1.0) -> np.ndarray:
    """Cells [n, G] as log1p data are: many zeros, ties, no negative value."""
    return np.log1p(rng.poisson(np.broadcast_to(level, (n, G)))).astype(np.float32)


@pytest.mark.parametrize("block", [50, 1 << 18], ids=["a gene at a time", "in one pass"])
def test_rank_sum_equals_scipy_in_every_group_and_gene(block):
    rng = np.random.default_rng(5)
    x, y = expression(rng, 60, 12), expression(rng, 31, 12, 1.5)
    x[:, 1], y[:, 1] = 0, 0  # constant
    x[:, 2] = 0  # all zero in one of them
    x[:, 3], y[:, 3] = rng.normal(size=60), rng.normal(1, 1, size=31)  # both signs, no ties
    x[:, 4] -= 1  # both signs and ties, -1 and 0 among them
    y[:, 4] -= 1
    x[:, 5], y[:, 5] = rng.normal(9, 1, size=60), rng.normal(size=31)  # separate
    x[::2, 6], y[::3, 6] = -0.0, -1  # -0.0 is 0
    x[:, 7] = y[0, 7] = 2.0
    group = rng.integers(1, 4, size=60)
    group[group == 3] = 1
    group[7] = 3  # a group of one cell; group 0 and 4 have none
    p = rank_sum(x, y, group, 5, block)
    for g in (1, 2, 3):
        a, b = x[group == g].astype(float), y.astype(float)  # of float32 it computes in float32
        expected = plain_rank_sum(a, b)
        expected[1] = 1.0  # scipy: nan or 1, by version
        np.testing.assert_allclose(p[g], expected, rtol=1e-9, err_msg=f"group {g}")
    assert np.isnan(p[[0, 4]]).all()
    np.testing.assert_allclose(rank_sum(x[group == 2], y), p[2:3], rtol=1e-12)


def test_rank_sum_by_hand():
    # U = 2 of 2 x 3 pairs (6 > 5 twice less a tie): pairs (1: 0, 6: 2 + 1/2) against (3, 5, 6) -> U = 2.5, mean 3
    x, y = np.array([[1.0], [6]]), np.array([[3.0], [5], [6]])
    sd = math.sqrt(2 * 3 / 12 * (6 - (2**3 - 2) / (5 * 4)))
    assert rank_sum(x, y)[0, 0] == pytest.approx(math.erfc((3.5 - 3 - 0.5) / sd / math.sqrt(2)))
    x = np.array([[7.0], [9]])  # U = 6: z = (6 - 3 - 1/2) / sd
    assert rank_sum(x, y)[0, 0] == pytest.approx(math.erfc(2.5 / math.sqrt(2 * 3 / 12 * 6) / math.sqrt(2)))
