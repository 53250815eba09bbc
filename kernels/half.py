"""Half precision: what the matrix products of a head run in under autocast, and how its gradients add up.

The plain form, of the gradient delta [R, V] of the logits x W^T, for x [R, H] and W [V, H]:

    def plain_head_gradients(delta, x, weight):
        return delta @ weight, delta.t() @ x

It rounds each sum to the type of its factors. A sum over thousands of rows can be beyond float16, whose largest number
is 65,504, and a delta of 1e-8, as a mean over rows has, is below its least. Here factors are half as wide, not sums.
A CPU adds up in single precision and has no product that leaves the sums so; bfloat16, which has the range of float32,
is rounded there once, to 0.2%, as autocast does everywhere: 62 ms instead of 172, of 1,024 rows, H 256 and V 16,384.
"""

import torch
from torch import Tensor

# torch.mm has had out_dtype since 2.8: the speed of half precision without a wider copy of the factors.
MIXED = hasattr(torch.ops.aten.mm, "dtype")


def half_type(tensor: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's type where it is on, or the tensor's own."""
    kind = tensor.device.type
    has_autocast = torch.amp.is_autocast_available(kind)
    if has_autocast and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def plain_head_gradients(delta: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x [R, H], of weight [V, H]) from that of the logits, delta [R, V]."""
    return delta @ weight, delta.t() @ x


def head_gradients(delta: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the type of delta, where x and weight are half as wide."""
    kind = delta.dtype
    half = weight.dtype
    if kind == half:
        return plain_head_gradients(delta, x, weight)
    narrow = delta.to(half)
    dx = wide_product(narrow, weight, kind)
    dweight = wide_product(narrow.t(), x, kind)
    return dx, dweight


def scaled_head_gradients(delta: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a delta of any size, which is overwritten. Softmax - onehot, between -1 and 1, needs no scale.

    By the largest entry, so that what rounds to 0 in float16 is below 1e-7 of it. bfloat16 has the range of float32.
    """
    if weight.dtype != torch.float16:
        return head_gradients(delta, x, weight)
    least = torch.finfo(delta.dtype).tiny
    scale = torch.linalg.vector_norm(delta, torch.inf)
    scale = scale.clamp_min(least)
    dx, dweight = head_gradients(delta.div_(scale), x, weight)
    return dx.mul_(scale), dweight.mul_(scale)


def wide_product(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """a b, whose sums are kept in the wider type `kind`, or in bfloat16 on a CPU rounded once and then widened."""
    with torch.autocast(a.device.type, enabled=False):
        if MIXED and a.is_cuda:
            return torch.mm(a, b, out_dtype=kind)
        if a.device.type == "cpu" and a.dtype == torch.bfloat16:
            return (a @ b).to(kind)
        a = a.to(kind)
        b = b.to(kind)
        return a @ b
