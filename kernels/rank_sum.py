"""The Mann-Whitney test of many groups of cells and all genes at once.

The plain form, which `rank_sum` equals (held together by a test):

    def plain_rank_sum(x, y):  # cells [n, G] and [m, G] -> p [G]
        return scipy.stats.mannwhitneyu(x, y, method="asymptotic", axis=0).pvalue

The plain one sorts every gene anew for every group, with the same control cells in each, and sorts the zeros, of which
expression is full. On 20 groups of 100 cells against 1,000 and 1,000 genes this one is some 10 times as fast where half
of the values are zeros, and 50 times where nine tenths are.
"""

import numpy as np
import torch


def plain_rank_sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two-sided p-values [G] of cells x [n, G] against y [m, G], by the normal approximation."""
    from scipy.stats import mannwhitneyu  # a second to import, and used in tests only

    return mannwhitneyu(x, y, method="asymptotic", axis=0).pvalue


def rank_sum(x: np.ndarray, y: np.ndarray, group: np.ndarray | None = None, n_groups: int = 1,
             block: int = 1 << 18) -> np.ndarray:
    """Two-sided p-values [n_groups, G] of the Mann-Whitney test of every group of cells x [n, G] against y [m, G].

    Normal approximation with tie and continuity correction, of float32 values; 1 where all values are equal, nan for a
    group without cells. Without group, all of x is one.

    Args:
        block: values of a pass, which bound the memory.
    """
    n, m, G = len(x), len(y), x.shape[1]
    group = np.zeros(n, int) if group is None else group
    code = np.concatenate([np.zeros(m, np.uint64), (group + 1).astype(np.uint64)])  # of a cell; 0: of y
    size = np.bincount(code.astype(int), minlength=n_groups + 1)
    u, ties = np.zeros((2, n_groups, G))
    shift = n_groups.bit_length()
    step = min(max(1, block // (m + n)), 1 << (32 - shift))
    for start in range(0, G, step):
        genes = slice(start, start + step)
        values = np.concatenate([y[:, genes], x[:, genes]]).T
        values = np.ascontiguousarray(values, np.float32)  # [genes, m + n]
        u[:, genes], ties[:, genes] = _count_pairs(values, code, size, shift)
    return _p_values(u, ties, size[1:, None].astype(float), m)


def _count_pairs(values: np.ndarray, code: np.ndarray, size: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """(U, sum of t^3 - t over ties) [n_groups, genes] of each group against y, for the values [genes, cells].

    Zeros are counted and not sorted.
    """
    gene, member, above, count = _runs(values, code, shift)
    m, control = size[0], member == 0
    # Of each run of equal values: how many of y are equal, and how many lie below.
    head = np.concatenate([[True], (gene[1:] != gene[:-1]) | (above[1:] != above[:-1])])[: len(gene)]
    head = np.maximum.accumulate(np.where(head, np.arange(len(head)), 0))  # y's run comes first among equal values
    equal = np.where(control[head], count[head], 0)
    of_y = values[:, :m]
    zeros, negative = (of_y == 0).sum(1), (of_y < 0).sum(1)
    earlier = np.cumsum(m - zeros) - (m - zeros)  # sorted values of y that belong to earlier genes
    below = np.cumsum(np.where(control, count, 0)) - earlier[gene] - equal / 2
    below += np.where(above >> np.uint64(31), zeros[gene], 0)  # y's zeros lie below what is positive
    equal[control] = 0  # from here on: of another run than this

    def per_group(weight: np.ndarray) -> np.ndarray:
        shape = len(values), len(size)
        return np.bincount(gene * len(size) + member, weight, shape[0] * shape[1]).reshape(shape)

    pairs, nonzero = per_group(count * below), per_group(count)
    tied = per_group(_ties(equal + count) - _ties(equal))
    # The zeros of a group: above y's negative values, equal to its zeros.
    zero = size - nonzero
    u = pairs[:, 1:] + zero[:, 1:] * (negative + zeros / 2)[:, None]
    ties = tied[:, 1:] + tied[:, :1] + _ties(zero[:, :1] + zero[:, 1:])
    return u.T, ties.T


def _runs(values: np.ndarray, code: np.ndarray, shift: int) -> tuple[np.ndarray, ...]:
    """Runs of equal (gene, value, group) among the values that are not 0, ascending: gene, group, value as bits that
    are ordered as the numbers are, and length. One sort of numbers of 64 bits does all genes and groups."""
    gene, cell = np.nonzero(values)
    bits = values[gene, cell].view(np.uint32)
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # negative numbers count down
    key = (gene.astype(np.uint64) << np.uint64(32)) | bits
    key = (key << np.uint64(shift)) | code[cell]
    key.sort()
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    count, key = np.diff(first, append=len(key)), key[first]
    member = (key & np.uint64((1 << shift) - 1)).astype(int)
    value = key >> np.uint64(shift)
    return (value >> np.uint64(32)).astype(int), member, value & np.uint64(0xFFFFFFFF), count


def _p_values(u: np.ndarray, ties: np.ndarray, size: np.ndarray, m: int) -> np.ndarray:
    """Two-sided, of U of groups of these sizes [n_groups, 1] against m cells."""
    total = size + m
    with np.errstate(divide="ignore", invalid="ignore"):  # all equal, or a group without cells
        deviation = np.sqrt(size * m / 12 * (total + 1 - ties / (total * (total - 1))))
        larger = np.maximum(u, size * m - u)
        z = (larger - size * m / 2 - 0.5) / deviation
    p = torch.special.erfc(torch.from_numpy(z / np.sqrt(2))).numpy().clip(0, 1)
    p = np.where(deviation > 0, p, 1.0)
    return np.where(size == 0, np.nan, p)


def _ties(n: np.ndarray) -> np.ndarray:
    n = n.astype(float)
    return n * n * n - n  # several times faster than n**3
