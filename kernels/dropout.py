"""Dropout at a fifth of its cost on a CPU, of activations and of the weights of attention.

The plain forms, and what a page may use instead:

    F.dropout(x, rate)                                                           # 0, or x / (1 - rate)
    F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)

On a CPU a random number for each element costs more than what it decides on, and attention with dropout looks through
its weights several times. Here one draw of 64 bits serves four elements, 16 bits each: a rate is met to within
1 / 131,072, and what stays is divided by the share that does stay, so that the mean is exact. Other devices, attention
without dropout, and rates that 16 bits cannot tell from 0 or 1, go the plain way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 65_536  # of 16 bits
LOWEST = -32_768
MOST = 2**63 - 1


def plain_dropout(x: Tensor, rate: float) -> Tensor:
    """The plain form: what `dropout` is in distribution, of other random numbers."""
    return F.dropout(x, rate)


def dropout(x: Tensor, rate: float) -> Tensor:
    """x with a share `rate` of its elements, by the global generator, at 0 and the others divided by 1 - rate."""
    if not is_drawn(x, rate):
        return plain_dropout(x, rate)
    kept = factors(x.shape, rate)
    return x * kept.to(x.dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, rate: float) -> Tensor:
    """The plain form: what `attention` is without dropout, and in distribution with it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)


def attention(q: Tensor, k: Tensor, v: Tensor, rate: float) -> Tensor:
    """Causal attention of q, k, v [B, H, T, C], with dropout of its weights: position t sees positions up to t."""
    if not is_drawn(q, rate):
        return plain_attention(q, k, v, rate)
    T, C = q.shape[2:]
    scale = C**-0.5
    # All heads of all sequences are one batch of matrices.
    queries = q.reshape(-1, T, C)
    keys = k.reshape(-1, T, C)
    values = v.reshape(-1, T, C)
    later = torch.full((T, T), -torch.inf, dtype=q.dtype)
    later = later.triu(1)  # what is not seen
    scores = torch.baddbmm(later, queries, keys.mT, alpha=scale)  # [B H, T, T]
    weights = torch.softmax(scores, -1)
    weights = weights.to(v.dtype)
    weights = dropout(weights, rate)
    attended = torch.bmm(weights, values)
    return attended.view(q.shape)


def is_drawn(x: Tensor, rate: float) -> bool:
    """Whether anything is drawn, and by a CPU."""
    if x.device.type != "cpu":
        return False
    return 0 < round(rate * LEVELS) < LEVELS


def factors(shape: torch.Size, rate: float) -> Tensor:
    """0 with probability rate, else 1 / (1 - rate), for each element of a shape: on the CPU, in single precision."""
    size = shape.numel()
    dropped = round(rate * LEVELS)
    stay = LEVELS - dropped  # levels that do
    count = (size + 3) // 4
    draws = torch.randint(-MOST, MOST, (count,))  # 64 bits
    levels = draws.view(torch.int16)  # LOWEST and up
    levels = levels[:size].view(shape)
    first = LOWEST + dropped
    kept = torch.empty(shape)
    torch.ge(levels, first, out=kept)  # 1 or 0
    return kept.mul_(LEVELS / stay)
