"""Parts of train_apelr.py's model that compute as APEL-R does (compat=source) where ours does otherwise."""

import torch
import torch.nn.functional as F
from torch import Tensor

EMBEDDING_SIZE = 0.02  # standard deviation of token embeddings at the start, where ours have 1


def cross_source(belief: Tensor, transition: Tensor, context: Tensor) -> Tensor:
    """softmax(log(b P) + g): it renormalises over all plans at once, as no Markov chain does.

    Log beliefs [B, K] in and out. transition: logits [K, K] (from, to); context: g [B, K].
    """
    log_P = F.log_softmax(transition, 1)
    log_bP = torch.logsumexp(belief[:, :, None] + log_P, 1)
    return F.log_softmax(log_bP + context, 1)


def commit_source(belief: Tensor, tau: float, hard_fraction: float) -> Tensor:
    """What a chunk works with, given the log belief [B, K] at its start: a sample, of which a share is one plan.

    The share is straight-through, the rest softmax((log b + Gumbel noise) / tau) of the same noise; ours has the belief
    itself in its place.
    """
    soft = F.gumbel_softmax(belief.float(), tau, dim=1)
    chosen = F.one_hot(soft.argmax(1), soft.shape[1])
    hard = chosen - soft.detach() + soft
    mixed = hard_fraction * hard + (1 - hard_fraction) * soft
    # Floor: the sample has zeros, and gradients pass through their logarithm.
    floored = mixed.clamp_min(0) + 1e-9
    return floored.log().to(belief)


@torch.no_grad()
def start_as_source(model: torch.nn.Module, head_gain: float) -> None:
    """Smaller embeddings and heads, in place. head_gain: what the heads are larger by than Xavier's bound."""
    model.token_emb.weight.mul_(EMBEDDING_SIZE)
    heads, _ = model.experts.table()  # shares the memory of the weights
    if hasattr(model.experts, "head"):  # of all plans
        heads = model.experts.head.weight
    heads.div_(head_gain)
