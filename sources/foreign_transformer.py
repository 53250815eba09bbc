"""transformer_lm of APEL-R, its baseline: a decoder with learned positions, as a backbone of train_apelr.py.

    version=baseline, backbone=transformer_lm, token_dim = d_model

Names of its parameters are the source's. Dimensions: B batch, L tokens, H hidden.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError

START = 0.02  # standard deviation of all matrices at the start


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        H = cfg.d_model
        self.n_heads = cfg.n_heads
        self.dropout = cfg.dropout
        self.qkv = nn.Linear(H, 3 * H, bias=False)
        self.out = nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor, past: tuple | None) -> tuple[Tensor, tuple]:
        """(what x [B, L, H] attends to, (keys, values)); past: those of the tokens before, where L is 1."""
        B, L, _ = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, L, R]
        if past:
            k = torch.cat([past[0], k], 2)
            v = torch.cat([past[1], v], 2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=past is None)
        attended = attended.transpose(1, 2).reshape(B, L, -1)
        return self.out(attended), (k, v)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg.d_ff or 4 * cfg.d_model
        self.fc1 = nn.Linear(cfg.d_model, width)
        self.fc2 = nn.Linear(width, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, cfg):
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.d_model)
        self.attn = Attention(cfg)
        self.ln2 = nn.LayerNorm(cfg.d_model)
        self.mlp = MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, past: tuple | None) -> tuple[Tensor, tuple]:
        attended, past = self.attn(self.ln1(x), past)
        x = x + self.drop(attended)
        hidden = self.mlp(self.ln2(x))
        return x + self.drop(hidden), past


class TransformerLM(nn.Module):
    """Of cfg it reads d_model, token_dim, n_layers, n_heads, d_ff, dropout and max_seq_len.

    The state is the embeddings of the last max_seq_len tokens, [B, L, H], and keys and values of every layer. Where a
    text is longer, all of it but these is forgotten, and they are read anew with every token, as in the source.
    Raises InputError for sizes that make no such model, and for windows of more tokens than it has positions for.
    """

    def __init__(self, cfg):
        super().__init__()
        H = cfg.d_model
        if H % cfg.n_heads:
            raise InputError(f"backbone=transformer_lm: d_model = {H} must be a multiple of n_heads = {cfg.n_heads}")
        if cfg.token_dim != H:
            raise InputError(
                f"backbone=transformer_lm: token_dim = {cfg.token_dim} must equal d_model = {H}, for token embeddings "
                "are what its first block reads"
            )
        self.places = cfg.max_seq_len
        self.pos_emb = nn.Embedding(self.places, H)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(H)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=START)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def layers(self) -> nn.ModuleList:
        """Of attention, which measure/speed.py counts."""
        return self.blocks

    def read(self, x: Tensor, pasts: list) -> tuple[Tensor, list]:
        """x [B, L, H] after the tokens of pasts: (h [B, L, H], keys and values of every layer)."""
        before = pasts[0][0].shape[2] if pasts[0] else 0
        after = before + x.shape[1]
        places = torch.arange(before, after, device=x.device)
        x = self.drop(x + self.pos_emb(places))
        states = []
        for block, past in zip(self.blocks, pasts, strict=True):
            x, state = block(x, past)
            states.append(state)
        return self.ln_f(x), states

    def forward(self, x: Tensor) -> tuple[Tensor, tuple]:
        if x.shape[1] > self.places:
            raise InputError(
                f"{x.shape[1]} tokens at once, and max_seq_len = {self.places} positions: use a shorter seq_len or "
                "prompt, or train with more max_seq_len"
            )
        h, pasts = self.read(x, [None] * len(self.blocks))
        return h, (x, pasts)

    def step(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        seen, pasts = state
        seen = torch.cat([seen, x[:, None]], 1)
        if seen.shape[1] > self.places:
            # Without the first of them all others are at other places.
            h, state = self(seen[:, -self.places :])
            return h[:, -1], state
        h, pasts = self.read(x[:, None], pasts)
        return h[:, -1], (seen, pasts)


def plain_head(model: nn.Module) -> None:
    """Embeddings and the head of a model as transformer_lm starts with them, without a bias; in place.

    Raises InputError for a model whose plans share a head.
    """
    if not hasattr(model.experts, "weight"):
        raise InputError("backbone=transformer_lm starts no head that plans share, as version=v1_filtered_mixture, "
                         "experts=bias and experts=lowrank have it: use backbone=transformer")
    nn.init.normal_(model.token_emb.weight, std=START)
    nn.init.normal_(model.experts.weight, std=START)
    # Its head has no bias: 0, and nothing that trains.
    bias = torch.zeros_like(model.experts.bias.data)
    del model.experts.bias
    model.experts.register_buffer("bias", bias)
