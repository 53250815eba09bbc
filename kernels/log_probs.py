"""Log-probabilities of a few tokens under K heads, streamed: the logits [T, K, V] never exist as a whole.

The plain form, which gives the same numbers and gradients and may stand in for it:

    def plain_log_probs(x, weight, bias, index, block=256):
        def of_rows(x, weight, bias, index):
            logits = block_logits(x, weight, bias)  # [R, K, V]
            every_plan = index[:, None].expand(-1, len(bias), -1)
            return logits.log_softmax(2).gather(2, every_plan)
        parts = []
        for rows in torch.arange(len(x)).split(block):
            parts.append(checkpoint(of_rows, x[rows], weight, bias, index[rows], use_reentrant=False))
        return torch.cat(parts)

log_probs keeps nothing of that size, and its backward pass turns a block's logits into their gradient in place. It
takes 0.85 of the plain form's time in blocks of 256 rows, half of it in blocks of 1,024 (one core, T 2,048, K 8,
V 1,024, H 128). shared_log_probs does the same where all plans share one head, for about the cost of one softmax: 0.4.
Low rank (K 8, r 16, H 256, V 2,048) costs 2.6 softmaxes, a head a plan 8.8.

T rows, K plans, V tokens, J tokens looked up a row, H what a head reads. x [T, P, H], weight [N V, H], bias [K, V],
where P N is K or 1: one head a plan (N = K), one input a plan (P = K), or neither, and plans differ by bias alone.
Low rank: x [T, 1, H + r] is (h, s) and weight [V, H + K r] is (W, U_1, ..., U_K), for logits W h + U_k s + b_k.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.compiling import uncompiled
from kernels.half import half_type, scaled_head_gradients

CPU_LOGITS = 1 << 24  # of a block: 64 MB, one buffer used again (smaller is slower)
GPU_LOGITS = 1 << 28  # 1 GB


def plain_log_probs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: Tensor,
    block: int = 256,
) -> Tensor:
    """log p_{t,k}(v) for v in index [T, J]: [T, K, J], by log_softmax and gather, a checkpointed block at a time."""

    def of_rows(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        logits = block_logits(x, weight, bias)  # [R, K, V]
        every_plan = index[:, None].expand(-1, len(bias), -1)
        return logits.log_softmax(2).gather(2, every_plan)

    parts = []
    for rows in torch.arange(len(x)).split(block):
        parts.append(checkpoint(of_rows, x[rows], weight, bias, index[rows], use_reentrant=False))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------
# Blocks of rows
# ---------------------------------------------------------------------------------------------------------------
def block_rows(K: int, V: int, device: torch.device) -> int:
    """Rows of a block."""
    logits = CPU_LOGITS if device.type == "cpu" else GPU_LOGITS
    return max(16, logits // (K * V))


def blocks(T: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover T rows."""
    slices = []
    for begin in range(0, T, size):
        end = min(begin + size, T)
        slices.append(slice(begin, end))
    return slices


def block_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits [R, K, V] of a block of x [R, P, H], in one matrix product for all plans."""
    K, V = bias.shape
    if is_low_rank(x, weight):
        return low_rank_logits(x[:, 0], weight, bias)
    product = x.flatten(0, 1) @ weight.t()
    product = product.to(bias.dtype)
    product = product.view(len(x), -1, V)  # [R, K or 1, V]
    if product.shape[1] == K:
        return product.add_(bias)  # in place: no second buffer of the block's size
    return product + bias


def is_low_rank(x: Tensor, weight: Tensor) -> bool:
    """Whether x [T, P, ...] and weight are of low rank: then heads are wider than what they read."""
    return weight.shape[1] != x.shape[2]


def low_rank_widths(x: Tensor, weight: Tensor, K: int) -> tuple[int, int]:
    """(H, r) of low rank: the widths of x and weight are H + r and H + K r."""
    rank = (weight.shape[1] - x.shape[-1]) // (K - 1)
    return x.shape[-1] - rank, rank


def low_rank_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W h + U_k s + b_k for x [R, H + r], as [R, K, V]: a product of all plans, and a thin one a plan."""
    H, rank = low_rank_widths(x, weight, len(bias))
    columns = weight.t()
    shared = x[:, :H] @ columns[:H]  # [R, V]
    logits = shared + bias[:, None]  # plan by plan [K, R, V], in the type of the bias
    features = x[:, H:].expand(len(bias), -1, -1)
    own = columns[H:].unflatten(0, (-1, rank))  # [K, r, V], without a copy
    if own.dtype == bias.dtype:
        logits.baddbmm_(features, own)  # without a buffer for the product
    else:
        logits += torch.bmm(features, own)
    return logits.transpose(0, 1)


class Gradients:
    """Gradients of heads, added up block by block: of x (whole), weight and bias.

    Sums are in the type of the bias, products in that of the weight, which under autocast is half as wide.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor):
        self.x = x
        self.weight = weight
        self.half = weight.dtype
        V = bias.shape[1]
        self.shared = x.shape[1] * len(weight) == V  # one product for all plans
        self.low_rank = is_low_rank(x, weight)
        self.dx = torch.empty(x.shape, dtype=bias.dtype, device=x.device)
        self.dweight = torch.zeros(weight.shape, dtype=bias.dtype, device=x.device)
        self.dbias = torch.zeros_like(bias)

    def add(self, rows: slice, delta: Tensor) -> None:
        """delta [R, K, V]: the gradient of the block's logits, which is overwritten."""
        self.dbias += delta.sum(0)
        if self.low_rank:
            self.add_low_rank(rows, delta)
            return
        # What a product of block_logits gave, row by row: the logits of all plans where they share it.
        if self.shared:
            flat = delta.sum(1)
        else:
            flat = delta.view(-1, len(self.weight))
        x = self.x[rows].flatten(0, 1)
        dx = self.dx[rows]
        if flat.dtype == self.half:
            dx.copy_((flat @ self.weight).view(dx.shape))
            self.dweight.addmm_(flat.t(), x)  # without a buffer for the product
        else:
            of_x, of_weight = scaled_head_gradients(flat, x, self.weight)
            dx.copy_(of_x.view(dx.shape))
            self.dweight += of_weight

    def add_low_rank(self, rows: slice, delta: Tensor) -> None:
        """The same of low rank: h and W get the sum over plans, s that of each plan's U_k."""
        x = self.x[rows, 0]
        dx = self.dx[rows, 0]
        H, rank = low_rank_widths(x, self.weight, delta.shape[1])
        of_h, of_shared = scaled_head_gradients(delta.sum(1), x[:, :H], self.weight[:, :H])
        dx[:, :H] = of_h
        dx[:, H:] = 0
        self.dweight[:, :H] += of_shared
        for k, own in enumerate(delta.unbind(1)):
            columns = slice(H + k * rank, H + (k + 1) * rank)
            factors = x[:, H:], self.weight[:, columns]
            if own.dtype == self.half:
                # Thin factors from the left: three times as fast on a CPU as from the right.
                of_s = (factors[1].t() @ own.t()).t()
                of_own = (factors[0].t() @ own).t()
            else:
                of_s, of_own = scaled_head_gradients(own, *factors)
            dx[:, H:] += of_s
            self.dweight[:, columns] += of_own


# ---------------------------------------------------------------------------------------------------------------
# A head or an input of its own for each plan
# ---------------------------------------------------------------------------------------------------------------
class LogProbs(torch.autograd.Function):
    """log p_{t,k}(v) for v in index [T, J]: [T, K, J]. Memory grows with T K J and with the block.

    Backward computes the logits of a block again, turns them into scatter(g) - softmax * sum_j g in place, and does the
    two products of that block. Those of the last block are still there: where all rows are one block, a product of four
    is saved. The softmaxes are torch's own, in place, which take half the time of their parts.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        half = half_type(x)
        K, V = bias.shape
        T, J = index.shape
        picked = bias.new_empty(T, K, J)
        size = block_rows(K, V, x.device)
        if is_low_rank(x, weight):
            # Low rank is passes over memory, not products: 8 MB come from the heap again and again, 64 MB from fresh
            # pages, which makes these passes 1.4 times as long.
            size = max(16, size // 8)
        ctx.blocks = blocks(T, size)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(half)
            weight = weight.to(half)
            for rows in ctx.blocks:
                logs = in_place(torch.log_softmax, block_logits(x[rows], weight, bias))
                every_plan = index[rows, None].expand(-1, K, -1)  # the same tokens under each plan
                torch.gather(logs, 2, every_plan, out=picked[rows])
        ctx.save_for_backward(x, weight, bias, index)
        ctx.last = logs if any(ctx.needs_input_grad) else None
        return picked

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, index = ctx.saved_tensors
        gradients = Gradients(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            for rows in ctx.blocks:
                upstream = grad[rows]  # [R, K, J]
                if rows is not ctx.blocks[-1]:
                    delta = in_place(torch.softmax, block_logits(x[rows], weight, bias))
                else:
                    logs = ctx.last
                    ctx.last = None  # used up: a second pass over the same graph computes it again
                    if logs is None:
                        logs = in_place(torch.log_softmax, block_logits(x[rows], weight, bias))
                    delta = logs.exp_()
                total = upstream.sum(2, keepdim=True)
                delta.mul_(total.neg_())  # each look-up takes softmax off all logits of its row ...
                every_plan = index[rows, None].expand_as(upstream)
                delta.scatter_add_(2, every_plan, upstream)  # ... and adds to its own
                gradients.add(rows, delta)
        return gradients.dx, gradients.dweight, gradients.dbias, None


def in_place(softmax: Callable, logits: Tensor) -> Tensor:
    """softmax or log_softmax of logits [R, K, V] over V, in their own memory."""
    memory = logits
    if not logits.is_contiguous():
        memory = logits.transpose(0, 1)  # of low rank, plan by plan; any other way round is copied
    softmax(memory, 2, out=memory)
    return logits


# ---------------------------------------------------------------------------------------------------------------
# One head for all plans
# ---------------------------------------------------------------------------------------------------------------
class SharedLogProbs(torch.autograd.Function):
    """The same where plans differ by bias alone: log p_{t,k}(v) = z_t(v) + b_k(v) - Z_{t,k} with one z = W h.

    All K normalisers come from one product, Z = m + n + log(exp(z - m) . exp(b - n)), m and n the maxima of z_t and
    b_k: K plans cost about as much as one softmax, and nothing of size K V is made for a token.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        half = half_type(x)
        K, V = bias.shape
        T, J = index.shape
        picked = bias.new_empty(T, K, J)
        normaliser = bias.new_empty(T, K)
        tops = bias.new_empty(T, 1)  # m
        high = bias.amax(1, keepdim=True)  # n, [K, 1]
        table = (bias - high).exp()  # [K, V]
        tiny = torch.finfo(bias.dtype).tiny
        size = block_rows(1, V, x.device)  # of one plan: nothing has the size K V
        ctx.blocks = blocks(T, size)
        with torch.autocast(x.device.type, enabled=False):
            x = x[:, 0].to(half)
            weight = weight.to(half)
            for rows in ctx.blocks:
                z = x[rows] @ weight.t()
                z = z.to(bias.dtype)  # [R, V]
                picked[rows] = z.gather(1, index[rows])[:, None]
                tops[rows] = z.amax(1, keepdim=True)
                z.sub_(tops[rows]).exp_()
                total = z @ table.t()  # [R, K]
                # A plan whose bias is far below its maximum wherever z is large: the product may round to 0.
                total.clamp_min_(tiny).log_()
                normaliser[rows] = total + tops[rows] + high.t()
        ctx.save_for_backward(x, weight, table, index, normaliser, tops, high)
        log_p = picked + bias.t()[index].transpose(1, 2)
        return log_p - normaliser[..., None]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, table, index, normaliser, tops, high = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=table.dtype, device=x.device)
        dweight = torch.zeros_like(weight, dtype=table.dtype)
        dbias = torch.zeros_like(table)
        with torch.autocast(x.device.type, enabled=False):
            for rows in ctx.blocks:
                upstream = grad[rows]  # [R, K, J]
                z = x[rows] @ weight.t()
                z = z.to(table.dtype)
                z.sub_(tops[rows]).exp_()
                # p_{t,k}(v) = exp(z - m) exp(b - n) / total: one factor of size [R, V], one [K, V], one [R, K].
                log_inverse = tops[rows] + high.t() - normaliser[rows]  # -log total
                share = upstream.sum(2) * log_inverse.exp_()  # sum_j g / total, [R, K]
                dbias -= table * (share.t() @ z)
                # The gradient of z, in place of it: scatter(g) - exp(z - m) * sum_k share_k exp(b_k - n_k).
                z.mul_(share @ table).neg_()
                z.scatter_add_(1, index[rows], upstream.sum(1))
                of_x, of_weight = scaled_head_gradients(z, x[rows], weight)
                dx[rows] = of_x
                dweight += of_weight
        # What the looked-up tokens give to the bias, for all rows at once.
        flat = grad.transpose(0, 1).reshape(len(table), -1)  # [K, T J]
        every_plan = index.reshape(1, -1).expand_as(flat)
        dbias.scatter_add_(1, every_plan, flat)
        return dx[:, None], dweight, dbias, None


# Loops over blocks, which tracing would unroll.
log_probs = uncompiled(LogProbs.apply)
shared_log_probs = uncompiled(SharedLogProbs.apply)
