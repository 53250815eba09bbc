"""Auxiliary terms from a few looked-up log-probabilities, where the plain forms hold whole distributions [B, L, K, V].

chunk_bow in its plain form, with p = softmax(logits) [B, L, K, V], targets y [B, L] and start [B, N, K] a chunk's log
belief:

    def plain_chunk_bow(p, y, start, C):
        losses = []
        for c, (p_c, y_c) in enumerate(zip(p.split(C, 1), y.split(C, 1))):
            belief = start[:, c, :, None].exp()  # [B, K, 1]
            bag = (belief * p_c.mean(1)).sum(1)  # what the chunk's tokens should look like, [B, V]
            likelihood = bag.gather(1, y_c)
            losses.append(-likelihood.log().mean(1))
        return torch.stack(losses).mean()

rep_unlikelihood in its plain form, with the mixture p [B, L, V]:

    def plain_repetition(p, x, y, window, include_current):
        losses = []
        for b, t in itertools.product(range(B), range(L)):
            last = t + 1 if include_current else t
            first = max(0, last - window)
            before = x[b, first:last].tolist()
            recent = set(before) - {int(y[b, t])}
            if recent:
                again = p[b, t, list(recent)]
                losses.append(-torch.log(1 - again).mean())
        return torch.stack(losses).mean()  # 0 where no token has one to avoid

Here `chunk_targets` and `recent_tokens` say which tokens to look up, and the terms are computed from their
log-probabilities. Dimensions: B batch, L tokens, C tokens of a chunk, N chunks, K plans, V vocabulary, W window.
"""

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError


def check_terms(terms: Iterable[str], known: tuple[str, ...]) -> None:
    """Raises InputError for a term that a model does not have, rather than compute the loss without it."""
    for term in terms:
        if term not in known:
            have = ", ".join(known) or "none"
            raise InputError(f"the losses of this model have no term {term!r}: it has {have}")


def plain_chunk_bow(p: Tensor, y: Tensor, start: Tensor, C: int) -> Tensor:
    """Mean over chunks of the cross entropy of its tokens and sum_k b_start(k) mean_t p_{t,k}.

    p [B, L, K, V], y [B, L], start [B, N, K].
    """
    losses = []
    chunks = zip(p.split(C, 1), y.split(C, 1), strict=True)
    for c, (p_c, y_c) in enumerate(chunks):
        belief = start[:, c, :, None].exp()  # [B, K, 1]
        bag = (belief * p_c.mean(1)).sum(1)  # what the chunk's tokens should look like, [B, V]
        likelihood = bag.gather(1, y_c)
        losses.append(-likelihood.log().mean(1))
    return torch.stack(losses).mean()


def plain_repetition(p: Tensor, x: Tensor, y: Tensor, window: int, include_current: bool) -> Tensor:
    """Mean over t of the mean -log(1 - p) of the distinct tokens of the window before y_t, y_t itself left out.

    p [B, L, V], inputs x [B, L], targets y [B, L]; 0 where no token has one to avoid.
    """
    B, L = y.shape
    losses = []
    for b, t in itertools.product(range(B), range(L)):
        last = t + 1 if include_current else t
        first = max(0, last - window)
        target = int(y[b, t])
        before = x[b, first:last].tolist()
        recent = set(before) - {target}  # each once
        if recent:
            again = p[b, t, list(recent)]
            losses.append(-torch.log(1 - again).mean())
    if not losses:
        return torch.zeros((), dtype=p.dtype)
    return torch.stack(losses).mean()


def chunk_sizes(L: int, C: int, like: Tensor) -> Tensor:
    """Tokens of each chunk of L tokens [ceil(L / C)]: C, and in the last one what is left."""
    padding = -L % C
    n_chunks = (L + padding) // C
    sizes = torch.full(
        (n_chunks,),
        float(C),
        dtype=like.dtype,
        device=like.device,
    )
    sizes[-1] = C - padding
    return sizes


def chunk_targets(targets: Tensor, C: int) -> Tensor:
    """The targets of the chunk that y_t is in, [B, L, C], padded by 0."""
    B, L = targets.shape
    padded = F.pad(targets, (0, -L % C))
    chunks = padded.view(B, -1, 1, C)
    # Every token of a chunk looks up all the targets of that chunk.
    of_tokens = chunks.expand(-1, -1, C, -1)  # [B, N, C, C]
    return of_tokens.reshape(B, -1, C)[:, :L]


def chunk_bow(words: Tensor, start: Tensor) -> Tensor:
    """The term from log p_{t,k}(v) of the chunk's targets, words [B, L, K, C], and start [B, N, K]."""
    B, L, K, C = words.shape
    size = chunk_sizes(L, C, words)  # [N]
    padding = (0, 0, 0, 0, 0, -L % C)
    padded = F.pad(words, padding, value=-torch.inf)  # a probability of 0, which adds nothing to a mean over t
    by_chunk = padded.view(B, -1, C, K, C)
    # log mean_t p_{t,k}(v): what plan k expects of a whole chunk
    total = torch.logsumexp(by_chunk, 2)
    mean = total - size[:, None, None].log()  # [B, N, K, C]
    # log sum_k b_start(k) mean_t p_{t,k}(v) of each word of the chunk
    log_p = torch.logsumexp(start[..., None] + mean, 2)  # [B, N, C]
    # The last chunk may be short: its padding is no word.
    place = torch.arange(C, device=size.device)
    valid = (place < size[:, None]).to(log_p.dtype)  # [N, C]
    chunk_log_p = (log_p * valid).sum(2) / size
    return -chunk_log_p.mean()


def recent_tokens(
    inputs: Tensor,
    targets: Tensor,
    window: int,
    include_current: bool,
) -> tuple[Tensor, Tensor]:
    """(the `window` tokens before y_t [B, L, W], where one counts): each once, not y_t itself, not before the text."""
    device = inputs.device
    L = inputs.shape[1]
    nearest = 0 if include_current else 1  # input t is the token just before target t
    lags = torch.arange(window, device=device) + nearest
    place = torch.arange(L, device=device)[:, None] - lags  # [L, W]
    recent = inputs[:, place.clamp_min(0)]
    # Of a token that is there twice the nearer one counts: [B, L, W, W], below the diagonal.
    same = recent[..., :, None] == recent[..., None, :]
    repeats = same.tril(-1).any(3)
    in_text = place >= 0
    unwanted = recent != targets[..., None]
    return recent, in_text & unwanted & ~repeats


def repetition(gate: Tensor, words: Tensor, counts: Tensor) -> Tensor:
    """The term from log p_{t,k}(v) of the recent tokens, words [B, L, K, W], gate [B, L, K] and counts [B, L, W].

    -log(1 - p) with p = sum_k gate_k p_k, the unlikelihood of Welleck et al. (2019).
    """
    log_p = torch.logsumexp(gate[..., None] + words, 2)  # [B, L, W]
    p = log_p.exp().clamp_max(1 - 1e-6)  # log(1 - p) has no value at 1
    penalty = -torch.log1p(-p) * counts
    number = counts.sum(2).clamp_min(1)
    mean = penalty.sum(2) / number  # [B, L]
    # A mean over the tokens that have one to avoid.
    some = counts.any(2)
    return (mean * some).sum() / some.sum().clamp_min(1)
