"""How much K heads differ in what they predict, streamed over blocks of rows; the gradients are found in the same pass.

The plain forms, which give the same numbers and gradients from logits [T, K, V] held whole:

    def plain_information(x, weight, bias, log_belief):  # sum_k b_k KL(p_k || sum_j b_j p_j)
        logs, belief = block_logits(x, weight, bias).log_softmax(2), log_belief.exp()[:, :, None]
        mixture = (belief * logs.exp()).sum(1, keepdim=True)
        return (belief * logs.exp() * (logs - mixture.log())).sum((1, 2)).mean()

    def plain_divergence(x, weight, bias):  # mean of JS(p_i, p_j) over the pairs i < j
        logs = block_logits(x, weight, bias).log_softmax(2)
        i, j = torch.triu_indices(len(bias), len(bias), 1)
        middle = torch.logaddexp(logs[:, i], logs[:, j]) - math.log(2)
        apart = logs[:, i].exp() * (logs[:, i] - middle) + logs[:, j].exp() * (logs[:, j] - middle)
        return 0.5 * apart.sum((1, 2)).mean() / max(1, len(i))

x, weight and bias are as in kernels/log_probs.py. The Jensen-Shannon divergence is Lin's (1991).
"""

import math

import torch

from kernels.log_probs import Gradients, block_logits, block_rows, blocks, half_type


def plain_information(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, log_belief: torch.Tensor):
    """Mutual information of plan and token, a mean over rows; log_belief [T, K]."""
    logs, belief = block_logits(x, weight, bias).log_softmax(2), log_belief.exp()[:, :, None]
    mixture = (belief * logs.exp()).sum(1, keepdim=True)
    return (belief * logs.exp() * (logs - mixture.log())).sum((1, 2)).mean()


def plain_divergence(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """Jensen-Shannon divergence, a mean over rows and pairs of plans."""
    logs = block_logits(x, weight, bias).log_softmax(2)
    i, j = torch.triu_indices(len(bias), len(bias), 1)
    middle = torch.logaddexp(logs[:, i], logs[:, j]) - math.log(2)
    apart = logs[:, i].exp() * (logs[:, i] - middle) + logs[:, j].exp() * (logs[:, j] - middle)
    return 0.5 * apart.sum((1, 2)).mean() / max(1, len(i))


class PlanContrast(torch.autograd.Function):
    """The mutual information, given log_belief [T, K]; without, the divergence of all pairs.

    With weights w_k (the belief, or an equal share of the pairs) both are a mean of w_k sum_v p_k(v) s_k(v) with a
    slope s_k = log p_k - log mixture, or its sum over the other plans, and both have the gradient of the logits
    w_k p_k (s_k - sum_v p_k s_k): what s_k itself contributes cancels.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, log_belief):
        half, K, T = half_type(x), len(bias), len(x)
        total = bias.new_zeros(())
        dbelief = None if log_belief is None else torch.empty_like(log_belief)
        size = max(8, block_rows(*bias.shape, x.device) // 4)  # four tensors of a block's size live at once
        with torch.autocast(x.device.type, enabled=False):
            x, weight = x.to(half), weight.to(half)
            gradients = Gradients(x, weight, bias)
            for rows in blocks(T, size):
                logs = block_logits(x[rows], weight, bias)
                logs = logs.sub_(logs.logsumexp(2, keepdim=True))
                probs = logs.exp()
                if log_belief is None:
                    share = torch.full_like(probs[:, :, :1], 0.5 / max(1, K * (K - 1) // 2))
                    slope = pairwise(logs, probs)
                else:
                    share = log_belief[rows].exp()[:, :, None]
                    mixture = (share * probs).sum(1, keepdim=True).clamp_min_(torch.finfo(bias.dtype).tiny)
                    slope = logs.sub_(mixture.log_())
                inner = (probs * slope).sum(2, keepdim=True)  # KL_k, or the sum of them over the other plans
                value = share * inner
                total += value.sum()
                if log_belief is not None:
                    dbelief[rows] = (value - share)[:, :, 0] / T
                gradients.add(rows, slope.sub_(inner).mul_(probs).mul_(share / T))
        ctx.gradients = gradients.dx, gradients.dweight, gradients.dbias, dbelief
        return total / T

    @staticmethod
    def backward(ctx, grad):
        return tuple(None if gradient is None else gradient * grad for gradient in ctx.gradients)


def pairwise(logs: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """sum_{j != i} log p_i - log m_ij for every plan i, with m_ij = (p_i + p_j) / 2: [R, K, V]."""
    K, tiny = logs.shape[1], torch.finfo(logs.dtype).tiny
    slope = logs * (K - 1)
    for i in range(K - 1):
        middle = (probs[:, i + 1 :] + probs[:, i : i + 1]).mul_(0.5).clamp_min_(tiny).log_()
        slope[:, i] -= middle.sum(1)
        slope[:, i + 1 :] -= middle
    return slope


_contrast = torch.compiler.disable(PlanContrast.apply)  # a loop over blocks, which tracing would unroll


def plan_information(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, log_belief: torch.Tensor):
    """Mutual information of plan and token in nats, a mean over rows; log_belief [T, K]."""
    return _contrast(x, weight, bias, log_belief)


def plan_divergence(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """Jensen-Shannon divergence in nats, a mean over rows and pairs of plans."""
    return _contrast(x, weight, bias, None)


def some_rows(T: int, share: float, device: torch.device):
    """A random share of T rows, drawn anew each time, to index with: a mean over them is unbiased."""
    if share == 1:
        return slice(None)
    return torch.randperm(T, device=device)[: max(1, round(share * T))]
