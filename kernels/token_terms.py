"""Auxiliary terms from a few looked-up log-probabilities, where the plain forms hold whole distributions [B, L, K, V].

chunk_bow in its plain form, with p = softmax(logits) [B, L, K, V], targets y [B, L] and start [B, N, K] a chunk's log
belief:

    def plain_chunk_bow(p, y, start, C):
        losses = []
        for c, (p_c, y_c) in enumerate(zip(p.split(C, 1), y.split(C, 1))):
            bag = (start[:, c, :, None].exp() * p_c.mean(1)).sum(1)  # what the chunk's tokens should look like, [B, V]
            losses.append(-bag.gather(1, y_c).log().mean(1))
        return torch.stack(losses).mean()

rep_unlikelihood in its plain form, with the mixture p [B, L, V]:

    def plain_repetition(p, x, y, window, include_current):
        losses = []
        for b, t in itertools.product(*map(range, y.shape)):
            last = t + 1 if include_current else t
            recent = set(x[b, max(0, last - window) : last].tolist()) - {int(y[b, t])}
            if recent:
                losses.append(-torch.log(1 - p[b, t, list(recent)]).mean())
        return torch.stack(losses).mean() if losses else torch.zeros(())

Here `chunk_targets` and `recent_tokens` say which tokens to look up, and the terms are computed from what was found.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_chunk_bow(p: Tensor, y: Tensor, start: Tensor, C: int) -> Tensor:
    """Mean over chunks of the cross entropy of its tokens and sum_k b_start(k) mean_t p_{t,k}."""
    losses = []
    for c, (p_c, y_c) in enumerate(zip(p.split(C, 1), y.split(C, 1), strict=True)):
        bag = (start[:, c, :, None].exp() * p_c.mean(1)).sum(1)  # what the chunk's tokens should look like, [B, V]
        losses.append(-bag.gather(1, y_c).log().mean(1))
    return torch.stack(losses).mean()


def plain_repetition(p: Tensor, x: Tensor, y: Tensor, window: int, include_current: bool) -> Tensor:
    """Mean over t of the mean -log(1 - p) of the distinct tokens of the window before y_t, y_t itself left out."""
    losses = []
    for b, t in itertools.product(*map(range, y.shape)):
        last = t + 1 if include_current else t
        recent = set(x[b, max(0, last - window) : last].tolist()) - {int(y[b, t])}
        if recent:
            losses.append(-torch.log(1 - p[b, t, list(recent)]).mean())
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=p.dtype)


def chunk_sizes(L: int, C: int, like: Tensor) -> Tensor:
    """Tokens of each chunk of L tokens [ceil(L / C)]: C, and in the last one what is left."""
    sizes = torch.full((-(-L // C),), float(C), dtype=like.dtype, device=like.device)
    sizes[-1] = C - -L % C
    return sizes


def chunk_targets(targets: Tensor, C: int) -> Tensor:
    """The targets of the chunk that y_t is in, [B, L, C], padded by 0."""
    B, L = targets.shape
    chunks = F.pad(targets, (0, -L % C)).view(B, -1, 1, C)
    return chunks.expand(-1, -1, C, -1).reshape(B, -1, C)[:, :L]


def chunk_bow(words: Tensor, start: Tensor) -> Tensor:
    """The term from log p_{t,k}(v) of the chunk's targets, words [B, L, K, C], and start [B, N, K]."""
    B, L, K, C = words.shape
    size = chunk_sizes(L, C, words)
    by_chunk = F.pad(words, (0, 0, 0, 0, 0, -L % C), value=-torch.inf).view(B, -1, C, K, C)
    mean = torch.logsumexp(by_chunk, 2) - size[:, None, None].log()  # over t: [B, N, K, C]
    log_p = torch.logsumexp(start[..., None] + mean, 2)  # of each word of the chunk, [B, N, C]
    valid = (torch.arange(C, device=size.device) < size[:, None]).to(log_p.dtype)  # [N, C]
    return -((log_p * valid).sum(2) / size).mean()


def recent_tokens(inputs: Tensor, targets: Tensor, window: int, include_current: bool) -> tuple[Tensor, Tensor]:
    """(the `window` tokens before y_t [B, L, W], where one counts): each once, not y_t itself, not before the text."""
    lags = torch.arange(window, device=inputs.device) + (0 if include_current else 1)
    place = torch.arange(inputs.shape[1], device=inputs.device)[:, None] - lags  # [L, W]
    recent = inputs[:, place.clamp_min(0)]
    repeats = (recent[..., :, None] == recent[..., None, :]).tril(-1).any(3)
    return recent, (place >= 0) & (recent != targets[..., None]) & ~repeats


def repetition(gate: Tensor, words: Tensor, counts: Tensor) -> Tensor:
    """The term from log p_{t,k}(v) of the recent tokens, words [B, L, K, W], gate [B, L, K] and counts [B, L, W]."""
    p = torch.logsumexp(gate[..., None] + words, 2).exp().clamp_max(1 - 1e-6)
    mean = (-torch.log1p(-p) * counts).sum(2) / counts.sum(2).clamp_min(1)  # [B, L]
    some = counts.any(2)
    return (mean * some).sum() / some.sum().clamp_min(1)
