"""How much K heads differ in what they predict, streamed over blocks of rows; the gradients are found in the same pass.

The plain forms, which give the same numbers and gradients from logits [T, K, V] held whole:

    def plain_information(x, weight, bias, log_belief):  # sum_k b_k KL(p_k || sum_j b_j p_j)
        logs = block_logits(x, weight, bias).log_softmax(2)
        belief = log_belief.exp()[:, :, None]
        mixture = (belief * logs.exp()).sum(1, keepdim=True)
        return (belief * logs.exp() * (logs - mixture.log())).sum((1, 2)).mean()

    def plain_divergence(x, weight, bias):  # mean of JS(p_i, p_j) over the pairs i < j
        logs = block_logits(x, weight, bias).log_softmax(2)
        i, j = torch.triu_indices(len(bias), len(bias), 1)
        middle = torch.logaddexp(logs[:, i], logs[:, j]) - math.log(2)
        from_i = logs[:, i].exp() * (logs[:, i] - middle)
        from_j = logs[:, j].exp() * (logs[:, j] - middle)
        return 0.5 * (from_i + from_j).sum((1, 2)).mean() / max(1, len(i))

x, weight and bias are as in kernels/log_probs.py. The Jensen-Shannon divergence is Lin's (1991).
"""

import math

import torch
from torch import Tensor

from common.compiling import uncompiled
from kernels.half import half_type
from kernels.log_probs import Gradients, block_logits, block_rows, blocks


def plain_information(x: Tensor, weight: Tensor, bias: Tensor, log_belief: Tensor):
    """Mutual information of plan and token, a mean over rows; log_belief [T, K]."""
    logs = block_logits(x, weight, bias).log_softmax(2)
    belief = log_belief.exp()[:, :, None]
    mixture = (belief * logs.exp()).sum(1, keepdim=True)  # [T, 1, V]
    slope = logs - mixture.log()
    return (belief * logs.exp() * slope).sum((1, 2)).mean()


def plain_divergence(x: Tensor, weight: Tensor, bias: Tensor):
    """Jensen-Shannon divergence, a mean over rows and pairs of plans."""
    K = len(bias)
    logs = block_logits(x, weight, bias).log_softmax(2)
    i, j = torch.triu_indices(K, K, 1)
    # log of (p_i + p_j) / 2, [T, pairs, V]
    middle = torch.logaddexp(logs[:, i], logs[:, j]) - math.log(2)
    from_i = logs[:, i].exp() * (logs[:, i] - middle)
    from_j = logs[:, j].exp() * (logs[:, j] - middle)
    return 0.5 * (from_i + from_j).sum((1, 2)).mean() / max(1, len(i))


class PlanContrast(torch.autograd.Function):
    """The mutual information, given log_belief [T, K]; without, the divergence of all pairs.

    With weights w_k (the belief, or an equal share of the pairs) both are a mean of w_k sum_v p_k(v) s_k(v) with a
    slope s_k = log p_k - log mixture, or its sum over the other plans, and both have the gradient of the logits
    w_k p_k (s_k - sum_v p_k s_k): what s_k itself contributes cancels.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, log_belief: Tensor | None) -> Tensor:
        half = half_type(x)
        T = len(x)
        K, V = bias.shape
        tiny = torch.finfo(bias.dtype).tiny
        total = bias.new_zeros(())
        dbelief = None if log_belief is None else torch.empty_like(log_belief)
        pair_share = 0.5 / max(1, K * (K - 1) // 2)
        # Four tensors of a block's size live at once.
        size = block_rows(K, V, x.device) // 4
        size = max(8, size)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(half)
            weight = weight.to(half)
            gradients = Gradients(x, weight, bias)
            for rows in blocks(T, size):
                logs = block_logits(x[rows], weight, bias)
                logs.sub_(logs.logsumexp(2, keepdim=True))  # log p_k
                probs = logs.exp()
                if log_belief is None:
                    # Of every plan in a pair half of KL to the middle, of every pair an equal part.
                    share = torch.full_like(probs[:, :, :1], pair_share)
                    slope = pairwise(logs, probs)
                else:
                    share = log_belief[rows].exp()[:, :, None]
                    mixture = (share * probs).sum(1, keepdim=True)
                    mixture.clamp_min_(tiny).log_()  # where all p_k round to 0, a number still
                    slope = logs.sub_(mixture)  # in place: the logs are needed no more
                inner = (probs * slope).sum(2, keepdim=True)  # KL_k, or the sum of them over the other plans
                value = share * inner
                total += value.sum()
                if log_belief is not None:
                    # d/d log b_k = b_k (KL_k - 1): the mixture, too, is a function of the belief
                    delta_belief = value - share  # [R, K, 1]
                    dbelief[rows] = delta_belief[:, :, 0] / T
                delta = slope.sub_(inner).mul_(probs)  # in place of the slope
                gradients.add(rows, delta.mul_(share / T))
        ctx.gradients = gradients.dx, gradients.dweight, gradients.dbias, dbelief
        return total / T

    @staticmethod
    def backward(ctx, grad: Tensor):
        scaled = []
        for gradient in ctx.gradients:
            scaled.append(None if gradient is None else gradient * grad)
        return tuple(scaled)


def pairwise(logs: Tensor, probs: Tensor) -> Tensor:
    """sum_{j != i} log p_i - log m_ij for every plan i, with m_ij = (p_i + p_j) / 2: [R, K, V]."""
    K = logs.shape[1]
    tiny = torch.finfo(logs.dtype).tiny
    slope = logs * (K - 1)
    # One plan against all later ones: each pair once, and K - 1 tensors of a block's size rather than K^2.
    for i in range(K - 1):
        later = slice(i + 1, K)
        middle = probs[:, later] + probs[:, i : i + 1]
        middle.mul_(0.5).clamp_min_(tiny).log_()
        slope[:, i] -= middle.sum(1)
        slope[:, later] -= middle
    return slope


_contrast = uncompiled(PlanContrast.apply)  # a loop over blocks, which tracing would unroll


def plan_information(x: Tensor, weight: Tensor, bias: Tensor, log_belief: Tensor) -> Tensor:
    """Mutual information of plan and token in nats, a mean over rows; log_belief [T, K]."""
    return _contrast(x, weight, bias, log_belief)


def plan_divergence(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, a mean over rows and pairs of plans."""
    return _contrast(x, weight, bias, None)


def some_rows(T: int, share: float, device: torch.device):
    """A random share of T rows, drawn anew each time, to index with: a mean over them is unbiased."""
    if share == 1:
        return slice(None)
    count = max(1, round(share * T))
    return torch.randperm(T, device=device)[:count]
