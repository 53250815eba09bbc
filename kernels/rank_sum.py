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


def rank_sum(
    x: np.ndarray,
    y: np.ndarray,
    group: np.ndarray | None = None,
    n_groups: int = 1,
    block: int = 1 << 18,
) -> np.ndarray:
    """Two-sided p-values [n_groups, G] of the Mann-Whitney test of every group of cells x [n, G] against y [m, G].

    Normal approximation with tie and continuity correction, of float32 values; 1 where all values are equal, nan for a
    group without cells. Without group, all of x is one.

    Args:
        group: the group [n] of each cell of x, 0..n_groups - 1.
        block: values of a pass, which bound the memory.
    """
    m = len(y)
    n = len(x)
    G = x.shape[1]
    if group is None:
        group = np.zeros(n, int)

    # The code of a cell: 0 for y, 1 + its group for x.
    of_y = np.zeros(m, np.uint64)
    of_x = (group + 1).astype(np.uint64)
    code = np.concatenate([of_y, of_x])
    size = np.bincount(code.astype(int), minlength=n_groups + 1)  # cells of each code

    # A key of 64 bits holds the code in `shift` bits, a value in 32 and the gene in what is left.
    shift = n_groups.bit_length()
    step = max(1, block // (m + n))
    step = min(step, 1 << (32 - shift))
    u = np.zeros((n_groups, G))
    ties = np.zeros((n_groups, G))
    for start in range(0, G, step):
        genes = slice(start, start + step)
        cells = np.concatenate([y[:, genes], x[:, genes]])
        values = np.ascontiguousarray(cells.T, np.float32)  # [genes, m + n]
        pairs, tied = _count_pairs(values, code, size, shift)
        u[:, genes] = pairs
        ties[:, genes] = tied

    group_size = size[1:, None].astype(float)
    return _p_values(u, ties, group_size, m)


def _count_pairs(
    values: np.ndarray,
    code: np.ndarray,
    size: np.ndarray,
    shift: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(U, sum of t^3 - t over ties) [n_groups, genes] of each group against y, for the values [genes, cells].

    U counts the pairs in which the cell of the group is the larger, and half of those that are equal. Zeros are counted
    and not sorted.
    """
    n_genes = len(values)
    n_codes = len(size)
    of_y = values[:, : size[0]]
    zeros = (of_y == 0).sum(1)  # y's, by gene
    negative = (of_y < 0).sum(1)
    gene, member, value, count = _runs(values, code, shift)
    control_nonzero = size[0] - zeros
    equal, below = _control_counts(gene, member, value, count, control_nonzero)
    positive = value >> np.uint64(31)
    below += np.where(positive, zeros[gene], 0)  # y's zeros lie below what is positive
    place = gene * n_codes + member

    def per_group(weight: np.ndarray) -> np.ndarray:
        """Sums over the runs of every gene and code, [genes, codes]."""
        sums = np.bincount(place, weight, n_genes * n_codes)
        return sums.reshape(n_genes, n_codes)

    pairs = per_group(count * below)
    nonzero = per_group(count)
    # t^3 - t of a run joined with the equal one of y, less that of y alone, which is added once, as group 0, below.
    tied = per_group(_ties(equal + count) - _ties(equal))

    # Zeros were left out: those of a group are above y's negative values and equal to y's zeros.
    zero = size - nonzero  # [genes, codes]
    control_zero = zero[:, :1]
    group_zero = zero[:, 1:]
    below_zero = negative + zeros / 2
    u = pairs[:, 1:] + group_zero * below_zero[:, None]
    zero_ties = _ties(control_zero + group_zero)
    ties = tied[:, 1:] + tied[:, :1] + zero_ties
    return u.T, ties.T


def _control_counts(
    gene: np.ndarray,
    member: np.ndarray,
    value: np.ndarray,
    count: np.ndarray,
    nonzero: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(how many of y are equal, how many lie below and half of the equal) for each run, zeros of y left out.

    For a run of y itself, which is no tie with y, equal is 0. nonzero: y's values that are not 0, by gene.
    """
    # The first run of each value of a gene. That of y, whose code is 0, comes first among equal values.
    new_gene = gene[1:] != gene[:-1]
    new_value = value[1:] != value[:-1]
    is_first = np.concatenate([[True], new_gene | new_value])
    is_first = is_first[: len(gene)]  # where there is no run at all
    places = np.arange(len(is_first))
    first = np.maximum.accumulate(np.where(is_first, places, 0))

    control = member == 0
    equal = np.where(control[first], count[first], 0)
    of_y = np.where(control, count, 0)
    earlier = np.cumsum(nonzero) - nonzero  # sorted values of y that belong to earlier genes
    below = np.cumsum(of_y) - earlier[gene] - equal / 2
    equal[control] = 0
    return equal, below


def _runs(values: np.ndarray, code: np.ndarray, shift: int) -> tuple[np.ndarray, ...]:
    """Runs of equal (gene, value, code) among the values that are not 0, ascending: gene, code, value as bits that
    are ordered as the numbers are, and length. One sort of numbers of 64 bits does all genes and groups."""
    gene, cell = np.nonzero(values)
    bits = values[gene, cell].view(np.uint32)
    # The sign bit is set for positive numbers, and negative ones, whose bits grow with the size, count down.
    is_negative = bits >> 31
    positive_bits = bits | np.uint32(1 << 31)
    bits = np.where(is_negative, ~bits, positive_bits)

    gene_bits = gene.astype(np.uint64) << np.uint64(32)
    key = gene_bits | bits
    key = (key << np.uint64(shift)) | code[cell]
    key.sort()

    # A run begins where the key changes, and ends where the next begins.
    is_first = np.concatenate([[True], key[1:] != key[:-1]])
    first = np.flatnonzero(is_first[: len(key)])
    count = np.diff(first, append=len(key))
    key = key[first]

    code_mask = np.uint64((1 << shift) - 1)
    member = (key & code_mask).astype(int)
    key = key >> np.uint64(shift)
    value = key & np.uint64(0xFFFFFFFF)
    gene = (key >> np.uint64(32)).astype(int)
    return gene, member, value, count


def _p_values(u: np.ndarray, ties: np.ndarray, size: np.ndarray, m: int) -> np.ndarray:
    """Two-sided, of U of groups of these sizes [n_groups, 1] against m cells.

    z = (max(U, n m - U) - n m / 2 - 1/2) / sd with sd^2 = n m / 12 (N + 1 - ties / (N (N - 1))) and N = n + m.
    """
    total = size + m
    pairs = size * m
    with np.errstate(divide="ignore", invalid="ignore"):  # all equal, or a group without cells
        correction = ties / (total * (total - 1))
        deviation = np.sqrt(pairs / 12 * (total + 1 - correction))
        larger = np.maximum(u, pairs - u)
        z = (larger - pairs / 2 - 0.5) / deviation
    tail = torch.from_numpy(z / np.sqrt(2))
    p = torch.special.erfc(tail).numpy()
    p = p.clip(0, 1)  # the continuity correction may take z below 0
    p = np.where(deviation > 0, p, 1.0)
    return np.where(size == 0, np.nan, p)


def _ties(n: np.ndarray) -> np.ndarray:
    """n^3 - n."""
    n = n.astype(float)
    return n * n * n - n  # several times faster than n**3
