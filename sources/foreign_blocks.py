"""Parts of train_state.py's model that checkpoints and batches of other systems need, in plain PyTorch.

Blocks of GPT-2 as transformers has them, rotary positions, low-rank adapters as PEFT has them, the confidence token,
the decoder from embeddings to genes, and batches with a row a cell. Parameters bear the names they have there.
cfg: settings of train_state.py.
"""

from itertools import chain, pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions (Su et al. 2021), pairing feature i with i + C / 2 as Llama does. x [B, heads, T, C]."""
    T, C = x.shape[2:]
    feature = torch.arange(0, C, 2, device=x.device)
    position = torch.arange(T, device=x.device)
    frequency = theta ** (-feature / C)
    angle = position[:, None] * torch.cat([frequency, frequency])  # [T, C]
    left, right = x.chunk(2, -1)
    turned = torch.cat([-right, left], -1)  # each pair by a quarter turn
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# GPT-2
# ---------------------------------------------------------------------------------------------------------------
class Conv1D(nn.Module):
    """A linear layer with its weight [in, out] the other way round, as GPT-2 stores it."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(width_out))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.T, self.bias)


class GPT2Block(nn.Module):
    """Pre-norm block of GPT-2 (Radford et al. 2019): LayerNorm, attention, LayerNorm, GELU; all with biases."""

    def __init__(self, cfg):
        super().__init__()
        H = cfg.d_model
        self.cfg = cfg
        self.ln_1 = nn.LayerNorm(H, cfg.norm_eps or 1e-5)
        self.ln_2 = nn.LayerNorm(H, cfg.norm_eps or 1e-5)
        self.attn = nn.ModuleDict({
            "c_attn": Conv1D(H, 3 * H),  # q, k, v
            "c_proj": Conv1D(H, H),
        })
        self.mlp = nn.ModuleDict({
            "c_fc": Conv1D(H, cfg.d_mlp),
            "c_proj": Conv1D(cfg.d_mlp, H),
        })
        self.drop = nn.Dropout(cfg.residual_dropout)  # dropout on what a block adds to the stream
        # What writes to the stream shrinks with depth, so that the sum of 2 n_layers of them does not grow.
        std = 0.02 * (2 * cfg.n_layers) ** -0.5
        nn.init.normal_(self.attn["c_proj"].weight, std=std)
        nn.init.normal_(self.mlp["c_proj"].weight, std=std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]."""
        normed = self.ln_1(x)
        qkv = self.attn["c_attn"](normed)  # [B, T, 3 H]
        q, k, v = qkv.unflatten(-1, (3, self.cfg.n_heads, -1)).unbind(2)  # [B, T, heads, C] each
        q = q.transpose(1, 2)  # [B, heads, T, C]
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        if not self.cfg.mask_attn:  # masked, a cell sees only itself: the softmax of one number is 1
            dropout = self.cfg.attention_dropout if self.training else 0.0
            v = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        attended = v.transpose(1, 2).flatten(2)  # [B, T, H]
        x = x + self.drop(self.attn["c_proj"](attended))
        normed = self.ln_2(x)
        hidden = self.mlp["c_fc"](normed)
        hidden = F.gelu(hidden, approximate="tanh")  # as GPT-2 was trained
        return x + self.drop(self.mlp["c_proj"](hidden))


class GPT2(nn.Module):
    """A stack of GPT-2 blocks over cells: bidirectional, no positions."""

    def __init__(self, cfg):
        super().__init__()
        self.h = nn.ModuleList(GPT2Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(cfg.d_model, cfg.norm_eps or 1e-5)
        self.drop = nn.Dropout(cfg.embedding_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H] -> [B, T, H]."""
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


# ---------------------------------------------------------------------------------------------------------------
# Low-rank adapters
# ---------------------------------------------------------------------------------------------------------------
class LoRA(nn.Module):
    """W x + alpha / r * B A dropout(x), with W frozen and B zero at first (Hu et al. 2021). Names as in PEFT."""

    def __init__(self, base: nn.Module, cfg):
        super().__init__()
        self.base_layer = base
        self.scale = cfg.lora_alpha / cfg.lora_r
        self.drop = nn.Dropout(cfg.lora_dropout)
        if isinstance(base, Conv1D):
            width_in, width_out = base.weight.shape
        else:
            width_out, width_in = base.weight.shape
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width_in, cfg.lora_r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(cfg.lora_r, width_out, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.lora_A["default"](self.drop(x))  # [..., r]
        return self.base_layer(x) + self.scale * self.lora_B["default"](low)


def add_lora(backbone: nn.Module, cfg) -> None:
    """Freeze the backbone, and put an adapter on every attention projection (and the MLPs' where asked)."""
    backbone.requires_grad_(False)
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj"}
    if cfg.lora_mlp:
        targets |= {"gate_proj", "up_proj", "down_proj", "c_fc"}
    # Lists, because the modules change under the loop.
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, (nn.Linear, Conv1D)):
                parent.add_module(name, LoRA(child, cfg))


# ---------------------------------------------------------------------------------------------------------------
# Heads: of the confidence, and from embeddings to genes
# ---------------------------------------------------------------------------------------------------------------
class ConfidenceToken(nn.Module):
    """A token at the end of every sentence whose output predicts the sentence's loss."""

    def __init__(self, cfg):
        super().__init__()
        H = cfg.d_model
        self.confidence_token = nn.Parameter(torch.randn(1, 1, H))
        modules = []
        for width, half in ((H, H // 2), (H // 2, H // 4)):
            modules += [
                nn.Linear(width, half),
                nn.LayerNorm(half),
                nn.GELU(),
                nn.Dropout(cfg.dropout),
            ]
        modules += [nn.Linear(H // 4, 1), nn.ReLU()]  # a loss is not negative
        self.confidence_projection = nn.Sequential(*modules)


class LatentToGeneDecoder(nn.Module):
    """From the embedding of a cell to its genes: Linear, LayerNorm, GELU, dropout, ..., Linear, ReLU.

    residual_decoder: every second hidden layer also adds the output of the one before it, as the source does.
    """

    def __init__(self, latent_dim: int, gene_dim: int, cfg):
        super().__init__()
        self.residual = cfg.residual_decoder
        widths = [latent_dim, *cfg.decoder_hidden_dims]
        blocks = []
        for width_in, width_out in pairwise(widths):
            block = [
                nn.Linear(width_in, width_out),
                nn.LayerNorm(width_out),
                nn.GELU(),
                nn.Dropout(cfg.decoder_dropout),
            ]
            blocks.append(block)
        last = [nn.Linear(widths[-1], gene_dim), nn.ReLU()]
        # The source names the layers of the two forms differently.
        if self.residual:
            self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks)
            self.final_layer = nn.Sequential(*last)
        else:
            self.decoder = nn.Sequential(*chain.from_iterable(blocks), *last)

    @property
    def last(self) -> nn.Linear:
        """The layer that writes the genes."""
        layers = self.final_layer if self.residual else self.decoder
        return layers[-2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., latent_dim] -> [..., G], not negative."""
        if not self.residual:
            return self.decoder(x)
        for i, block in enumerate(self.blocks):
            y = block(x)
            if i % 2:
                y = y + x
            x = y
        return self.final_layer(x)


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------
def in_sentences(batch: dict, S: int, batch_dim: int | None) -> dict:
    """A batch with a row a cell, as the source's loaders give it, as sentences of S cells; one of sentences stays.

    Cells become [B, S, D], the perturbation [B, S or 1, P], and batch, where it is there, codes [B, S or 1].

    Args:
        batch_dim: batches that the model knows; None or 0: it reads none, and batch stays as it is.
    Raises ValueError where the rows are no whole sentences.
    """
    batch = dict(batch)
    rows = batch["ctrl_cell_emb"]
    # One vector for each sentence is that of all its cells.
    if rows.ndim == 3 and batch["pert_emb"].ndim == 2:
        batch["pert_emb"] = batch["pert_emb"][:, None]
    for name in ("pert_emb", "ctrl_cell_emb", "pert_cell_emb", "pert_cell_counts"):
        if name not in batch or batch[name].ndim != 2:
            continue
        if len(batch[name]) % S:
            raise ValueError(f"{len(rows)} cells are no whole sentences of {S}")
        batch[name] = batch[name].unflatten(0, (-1, S))
    if "batch" in batch and batch_dim:
        B, cells = batch["ctrl_cell_emb"].shape[:2]
        batch["batch"] = batch_codes(batch["batch"], B, cells, batch_dim)
    return batch


def batch_codes(codes: torch.Tensor, B: int, S: int, batch_dim: int) -> torch.Tensor:
    """Batches as codes [B, S or 1], from codes or one-hot vectors of each cell or each sentence."""
    if batch_dim == 1:
        return torch.zeros(B, 1, dtype=torch.long, device=codes.device)
    # With batch_dim = S, one-hot vectors of sentences are as many numbers as codes of cells: floats are vectors.
    are_vectors = codes.is_floating_point() and codes.numel() == B * batch_dim
    if are_vectors or codes.numel() not in (B, B * S):
        codes = codes.argmax(-1)
    return codes.reshape(B, -1).long()
