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

BLOCK = {"cpu": 1 << 22}  # logits of a block, by kind of device
LARGE_BLOCK = 1 << 26  # of any other: a GPU needs more to be busy


def plain_mean_xe(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The plain form: what `mean_xe` equals, in value and gradients."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(_summing(logits.dtype)), targets)


@torch.compiler.disable  # a loop over blocks of rows, which tracing would unroll
def mean_xe(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of targets [R] under logits x W^T, for x [R, D] and weight W [V, D]."""
    return MeanXE.apply(x, weight, targets)


@torch.compiler.disable
def row_xe(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every row, [R]; without gradients."""
    blocks = stream(x.detach(), weight.detach(), targets, _computing(x))
    return torch.cat([xe for _, _, _, xe in blocks])


class MeanXE(torch.autograd.Function):
    """The gradients come with the value.

    The gradient of a row's logits is softmax - onehot, known as soon as the row is. So both matrix products of the
    backward pass are done in the forward one, and nothing of size R x V is kept for later.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kind = _computing(x)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        loss = torch.zeros((), device=x.device, dtype=_summing(kind))
        table = weight.to(kind)
        for rows, exps, total, xe in stream(x, table, targets, kind):
            loss += xe.sum()
            delta = exps.div_(total)  # softmax, in place
            delta.scatter_add_(1, targets[rows, None], -torch.ones_like(total))  # less onehot
            delta = delta.to(kind)
            dx[rows] = (delta @ table).to(dx.dtype)
            dw += delta.t() @ x[rows].to(kind)
        ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)
        return dx * scale, dw * scale, None


def stream(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, kind: torch.dtype) -> Iterator[tuple]:
    """(rows, exp of the shifted logits [r, V], their sums [r, 1], cross entropies [r]), a block of rows at a time.

    Products are of `kind`, as autocast would have them; everything after them is in single precision or better.
    """
    size = max(64, BLOCK.get(x.device.type, LARGE_BLOCK) // len(weight))
    table = weight.to(kind)
    for begin in range(0, len(x), size):
        rows = slice(begin, min(begin + size, len(x)))
        logits = (x[rows].to(kind) @ table.t()).to(_summing(kind))
        target = logits.gather(1, targets[rows, None])
        # log sum exp, shifted by the largest logit, so that no exponential overflows
        top = logits.amax(1, keepdim=True)
        exps = logits.sub_(top).exp_()
        total = exps.sum(1, keepdim=True)
        yield rows, exps, total, (total.log() + top - target)[:, 0]


def _computing(x: torch.Tensor) -> torch.dtype:
    """The type of the matrix products: that of autocast, where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _summing(kind: torch.dtype) -> torch.dtype:
    return torch.promote_types(kind, torch.float32)
