"""The Mann-Whitney test of many groups of cells and all genes at once.

The plain form, which `rank_sum` equals (held together by a test):

    def plain_rank_sum(x, y):  # cells [n, G] and [m, G] -> p [G]
        return scipy.stats.mannwhitneyu(x, y, method="asymptotic", axis=0).pvalue

The plain one sorts every gene anew for every group, with the same control cells in each, and sorts the zeros, of which
expression is full; this one is 10 to 40 times as fast on 20 groups of sparse cells.
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

    Normal approximation with tie and continuity correction (scipy.stats.mannwhitneyu, method="asymptotic"), of
    float32 values; 1 where all values are equal. Without group, all of x is one. All groups are ranked by one sort
    of (gene, value, group) packed into 64 bits; zeros, most of expression, are counted and not sorted. block: values
    of a pass, which bound the memory.
    """
    n, m, G = len(x), len(y), x.shape[1]
    group = np.zeros(n, int) if group is None else group
    size = np.bincount(np.append(np.zeros(m, int), group + 1), minlength=n_groups + 1)  # group 0: y
    shift = np.uint64(n_groups.bit_length())
    code = np.append(np.zeros(m, np.uint64), (group + 1).astype(np.uint64))
    u, ties = np.zeros((2, n_groups, G))
    step = min(max(1, block // (m + n)), 1 << (32 - int(shift)))
    for start in range(0, G, step):
        genes = slice(start, start + step)
        values = np.ascontiguousarray(np.concatenate([y[:, genes], x[:, genes]]).T, np.float32)  # [genes, m + n]
        gene, cell = np.nonzero(values)
        bits = values[gene, cell].view(np.uint32)
        bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # as ordered as the numbers are
        key = (((gene.astype(np.uint64) << np.uint64(32)) | bits) << shift) | code[cell]
        key.sort()
        first = np.flatnonzero(np.append(True, key[1:] != key[:-1])[:len(key)])  # runs of gene, value and group
        count, key = np.diff(first, append=len(key)), key[first]
        member, value = (key & np.uint64((1 << int(shift)) - 1)).astype(int), key >> shift
        gene, control = (value >> np.uint64(32)).astype(int), member == 0
        head = np.append(True, value[1:] != value[:-1])[:len(value)]  # y's run comes first among equal values
        head = np.maximum.accumulate(np.where(head, np.arange(len(head)), 0))
        equal = np.where(control[head], count[head], 0)  # of y
        zeros, negative = (values[:, :m] == 0).sum(1), (values[:, :m] < 0).sum(1)
        before = np.cumsum(m - zeros) - (m - zeros)  # sorted values of y that belong to earlier genes
        below = np.cumsum(np.where(control, count, 0)) - before[gene] - equal / 2
        below += np.where((value >> np.uint64(31)) & np.uint64(1), zeros[gene], 0)
        equal[control] = 0  # from here on: of another run than this
        place, shape = gene * (n_groups + 1) + member, (len(values), n_groups + 1)
        pairs, tied, nonzero = (np.bincount(place, weight, shape[0] * shape[1]).reshape(shape)
                                for weight in (count * below, _ties(equal + count) - _ties(equal), count))
        zero = size - nonzero
        u[:, genes] = (pairs[:, 1:] + zero[:, 1:] * (negative + zeros / 2)[:, None]).T
        ties[:, genes] = (tied[:, 1:] + tied[:, :1] + _ties(zero[:, :1] + zero[:, 1:])).T
    size = size[1:, None].astype(float)
    total = size + m
    with np.errstate(divide="ignore", invalid="ignore"):  # all equal, or a group without cells
        sd = np.sqrt(size * m / 12 * (total + 1 - ties / (total * (total - 1))))
        z = (np.maximum(u, size * m - u) - size * m / 2 - 0.5) / sd
    p = torch.special.erfc(torch.from_numpy(z / np.sqrt(2))).numpy().clip(0, 1)
    return np.where(size == 0, np.nan, np.where(sd > 0, p, 1.0))


def _ties(n: np.ndarray) -> np.ndarray:
    n = n.astype(float)
    return n * n * n - n  # several times faster than n**3

