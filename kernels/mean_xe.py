"""Cross entropy of a vocabulary head, in nats, without ever holding its logits.

The plain form is two lines, and what a page may use instead:

    logits = F.linear(x, weight)                 # x [R, D], weight [V, D] -> [R, V]
    loss = F.cross_entropy(logits, targets)      # targets [R] -> the mean over rows

The logits would be the largest tensor of all: written and read five times in a step, in memory that is fresh each time.
Here they exist for a block of rows at a time, 16 MB on a CPU, which is reused and large enough for full speed.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from common.compiling import uncompiled
from kernels.half import half_type, head_gradients

BLOCK = {"cpu": 1 << 22}  # logits of a block, by kind of device
LARGE_BLOCK = 1 << 26  # of any other: a GPU needs more to be busy


def plain_mean_xe(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain form: what `mean_xe` equals, in value and gradients."""
    logits = F.linear(x, weight)
    logits = logits.to(_summing(logits.dtype))
    return F.cross_entropy(logits, targets)


@uncompiled  # a loop over blocks of rows, which tracing would unroll
def mean_xe(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of targets [R] under logits x W^T, for x [R, D] and weight W [V, D]."""
    return MeanXE.apply(x, weight, targets)


@uncompiled
def row_xe(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every row, [R]; without gradients."""
    kind = half_type(x)
    x = x.detach()
    weight = weight.detach()
    parts = []
    for _, _, xe in stream(x, weight, targets, kind):
        parts.append(xe[:, 0])
    return torch.cat(parts)


class MeanXE(torch.autograd.Function):
    """The gradients come with the value.

    The gradient of a row's logits is softmax - onehot, known as soon as the row is. So both matrix products of the
    backward pass are done in the forward one, and nothing of size R x V is kept for later.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = half_type(x)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=_summing(kind))  # of all rows: half precision is too narrow for the sum
        loss = torch.zeros((), device=x.device, dtype=_summing(kind))
        table = weight.to(kind)
        for rows, delta, xe in stream(x, table, targets, kind):
            loss += xe.sum()
            ones = torch.ones_like(xe)
            delta.scatter_add_(1, targets[rows, None], -ones)  # softmax less onehot
            of_x, of_weight = head_gradients(delta, x[rows].to(kind), table)
            dx[rows] = of_x.to(dx.dtype)
            dw += of_weight
        # Of the sum over rows; backward divides by their number, as the loss is divided here.
        ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)
        return dx * scale, dw * scale, None


def stream(x: Tensor, weight: Tensor, targets: Tensor, kind: torch.dtype) -> Iterator[tuple]:
    """(rows, softmax of their logits [r, V], their cross entropies [r, 1]), a block of rows at a time.

    Products are of `kind`, as autocast would have them; everything after them is in single precision or better.
    """
    V = len(weight)
    R = len(x)
    size = max(64, BLOCK.get(x.device.type, LARGE_BLOCK) // V)
    table = weight.to(kind)
    for begin in range(0, R, size):
        end = min(begin + size, R)
        rows = slice(begin, end)
        logits = x[rows].to(kind) @ table.t()
        logits = logits.to(_summing(kind))
        target = logits.gather(1, targets[rows, None])  # z_y, before the logits are overwritten
        top = logits.amax(1, keepdim=True)
        # torch's own softmax reads a row from the cache after the first time; exp, sum and division would from memory.
        probs = torch.softmax(logits, 1, out=logits)
        # The largest is exp 0 / sum of exp(z - top), so log sum exp z = top - its log, which cannot overflow.
        largest = probs.amax(1, keepdim=True)
        log_sum = top - largest.log()
        yield rows, probs, log_sum - target


def _summing(kind: torch.dtype) -> torch.dtype:
    """The type of sums and exponentials: single precision, or double where the products are."""
    return torch.promote_types(kind, torch.float32)
