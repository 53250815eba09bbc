"""Token sequences: drawn from a process or a model, and what the model says of each token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.telling import bar

PIECE = 4_096  # tokens of a process that are drawn at once: between pieces one can see how far it is


def process_sequences(
    process,
    start: Tensor,
    length: int,
    tokens: torch.Generator,
    states: torch.Generator,
    told: str = "",
) -> Tensor:
    """Sequences [B, length] of a process that begin with `start` [B, T]; the generators are on the process's device.

    told: what is being made, for a progress bar; "" has none.
    """
    B, T = start.shape
    uniforms = torch.rand(
        (length + 1, B),
        generator=tokens,
        dtype=torch.float64,
        device=tokens.device,
    )
    belief = process.beliefs(start)[:, -1]
    if process.is_hmm:  # a belief is the distribution of the hidden state to go on from
        belief = torch.multinomial(belief, 1, generator=states)[:, 0]
    pieces = [start]
    for begin in bar(range(0, length, PIECE), told, active=bool(told)):
        piece, belief = process.generate(uniforms[begin : begin + PIECE + 1], belief)
        pieces.append(piece)
    sequences = torch.cat(pieces, 1)
    return sequences[:, : max(length, T)]


@torch.no_grad()
def continue_sequences(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    n_ctx: int,
    generator: torch.Generator,
    device: torch.device,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    told: str = "",
) -> Tensor:
    """Draw from the model until the sequences [B, T] have the length; it reads the last n_ctx tokens of each.

    Args:
        temperature: divides the logits; 0 takes the likeliest token, the first of equals, and draws nothing.
        top_k, top_p: draw from the k likeliest tokens, and of them from the fewest that have a share of top_p.
        told: what is being made, for a progress bar; "" has none.

    The draws are made where tokens and generator are, so that they are the same on every device.
    """
    B, T = tokens.shape
    if T >= length:
        return tokens
    sequences = tokens.new_empty(B, length)
    sequences[:, :T] = tokens
    for t in bar(range(T, length), told, unit="token", active=bool(told)):
        context = sequences[:, max(0, t - n_ctx) : t].to(device)
        logits, _ = model(context)
        logits = logits[:, -1].to(tokens.device)  # of the next token [B, V]
        logits = logits.double()
        if temperature == 0:
            sequences[:, t] = first_largest(logits)
            continue
        logits = logits / temperature
        if top_k and top_k < logits.shape[1]:
            logits = best_only(logits, top_k)
        if top_p < 1:
            logits = logits.masked_fill(beyond_share(logits.softmax(1), top_p), -torch.inf)
        sequences[:, t] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return sequences


def first_largest(values: Tensor) -> Tensor:
    """The place [B] of the largest value of each row [B, V], the lowest of equals on every device."""
    V = values.shape[1]
    places = torch.arange(V, device=values.device)
    is_largest = values == values.amax(1, keepdim=True)
    return torch.where(is_largest, places, V - 1).amin(1)


def best_only(logits: Tensor, k: int) -> Tensor:
    """Logits [B, V] with all but the k largest of a row at -inf; of equal ones the first stay."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    return logits.scatter(1, order[:, k:], -torch.inf)


def beyond_share(p: Tensor, share: float) -> Tensor:
    """Which tokens [B, V] are not among the fewest that have this share of the probability p [B, V].

    The token that crosses the share is among them, and so is the likeliest, always.
    """
    ordered, order = p.sort(1, descending=True)
    likelier = ordered.cumsum(1) - ordered  # the share of those before it
    drop = likelier >= share
    drop[:, 0] = False
    return torch.zeros_like(drop).scatter(1, order, drop)  # in the order of the vocabulary


@torch.no_grad()
def sequence_xe(model: nn.Module, tokens: Tensor, n_ctx: int, told: str = "") -> Tensor:
    """Cross entropy in nats of every token but the first, [B, L - 1]; each is predicted from the n_ctx before it.

    told: what is being done, for a progress bar; "" has none.
    """
    B, L = tokens.shape
    if L < 2:
        return torch.zeros(B, 0)
    # One pass for what fits into the context, then one for each token: its context is another.
    head = tokens[:, : n_ctx + 1]
    logits, _ = model(head[:, :-1])
    parts = [token_xe(logits, head[:, 1:])]
    for t in bar(range(n_ctx + 1, L), told, unit="token", active=bool(told)):
        logits, _ = model(tokens[:, t - n_ctx : t])
        target = tokens[:, t : t + 1]
        parts.append(token_xe(logits[:, -1:], target))
    return torch.cat(parts, 1)


def token_xe(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of targets [B, T] under logits [B, T, V]."""
    by_class = logits.float().transpose(1, 2)  # [B, V, T], as cross_entropy has them
    return F.cross_entropy(by_class, targets, reduction="none")
