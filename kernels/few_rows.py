"""Logits of a few rows by large heads, as in writing, where every token reads all heads.

The plain form:

    def plain_logits(x, weight, bias):
        return block_logits(x, weight, bias)  # of kernels/log_probs.py

What is multiplied again and again is kept as the processor reads it best, packed by oneDNN. On one core of an EPYC
eight rows times 16,384 x 256 take 400 us instead of 1,480, one row in bfloat16 106 us instead of 350. One row in
float32 takes 170 us by MKL from columns, and no less packed: that is the rate of the memory. torch reaches the packed
product by operators of its compiler; where these are missing the plain form stays.
"""

import torch
from torch import Tensor

from kernels.log_probs import block_logits, is_low_rank

LEAST = 1 << 18  # numbers of heads that are packed: of fewer the call takes longer than the product


def can_pack(kind: torch.dtype) -> bool:
    """Whether oneDNN packs matrices of this type here."""
    known = torch.ops.mkldnn
    for operator in ("_linear_pointwise", "_reorder_linear_weight"):
        if not hasattr(known, operator):
            return False
    if not torch.backends.mkldnn.is_available():
        return False
    if kind == torch.bfloat16:
        return bool(known._is_mkldnn_bf16_supported())
    return kind == torch.float32


class Heads:
    """Heads [N V, H] with their bias [K, V], as of kernels/log_probs.py.

    x [R, P, H]: an input as they will have. kind: what they are kept in; bfloat16 halves what a token reads.
    """

    def __init__(self, weight: Tensor, bias: Tensor, x: Tensor, kind: torch.dtype | None = None):
        self.kind = kind or weight.dtype
        self.bias = bias
        rows = x.shape[0] * x.shape[1]
        by_memory = rows == 1 and self.kind == torch.float32
        on_cpu = weight.device.type == "cpu"
        large = on_cpu and weight.numel() >= LEAST
        plain = by_memory or is_low_rank(x, weight)
        self.is_packed = large and not plain and can_pack(self.kind)
        weight = weight.detach().to(self.kind)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        else:
            # Transposed in memory: a few rows times it are faster.
            self.weight = weight.t().contiguous().t()

    def logits(self, x: Tensor) -> Tensor:
        """[R, K, V] of inputs x [R, P, H]."""
        x = x.to(self.kind)
        if not self.is_packed:
            return block_logits(x, self.weight, self.bias)
        flat = x.flatten(0, 1)
        product = torch.ops.mkldnn._linear_pointwise(flat, self.weight, None, "none", [], "")
        product = product.to(self.bias.dtype).view(len(x), -1, self.bias.shape[1])
        if product.shape[1] == len(self.bias):
            return product.add_(self.bias)
        return product + self.bias
