"""train_state.py: the model, its losses and the source's checkpoints, against reference numbers and second formulas."""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import pathlib

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from geomloss import SamplesLoss

import train_state as ts
from common.errors import CheckpointError
from common.runtime import Runtime
from sources.foreign_blocks import in_sentences
from sources.foreign_state import plain_name, read_source_checkpoint, source_settings, source_state_dict, translate

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
FOLDER = pathlib.Path(os.environ.get("REFERENCE_DIR", pathlib.Path(ts.__file__).parent / "../shared/reference"))
REFERENCES = sorted(path for path in FOLDER.resolve().glob("state_*.npz") if path.with_suffix(".json").exists())
B, S, D, H, P, G = 2, 6, 12, 16, 5, 20
LLAMA = dict(bidirectional_attention=True, hidden_size=H, intermediate_size=32, num_hidden_layers=2, head_dim=4,
             num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=S, use_cache=False)
GPT2 = dict(n_embd=H, n_layer=2, n_head=4, n_positions=S, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SETTINGS = dict(input_dim=D, hidden_dim=H, output_dim=D, pert_dim=P, batch_dim=3, gene_dim=G, hvg_dim=D,
                cell_set_len=S, output_space="gene", embed_key="X_hvg", blur=0.05, loss="energy", dropout=0.0,
                distributional_loss="energy", n_encoder_layers=2, n_decoder_layers=3, use_basal_projection=False,
                predict_residual=True, gene_decoder_bool=False, transformer_backbone_key="llama",
                transformer_backbone_kwargs=LLAMA)
AS_GPT2 = dict(transformer_backbone_key="GPT2", transformer_backbone_kwargs=GPT2)
CAUSAL = dict(transformer_backbone_kwargs={**LLAMA, "bidirectional_attention": False, "rotary": False})
ROTARY = dict(transformer_backbone_kwargs={**LLAMA, "rotary": True})
AS_OLD = dict(transformer_backbone_kwargs={k: v for k, v in LLAMA.items() if k != "bidirectional_attention"})
TOKEN = dict(use_batch_token=True, basal_mapping_strategy="batch")
TOKENS = {**TOKEN, "confidence_token": True}
DECODER = dict(embed_key="X_state", gene_decoder_bool=True,
               decoder_cfg=dict(latent_dim=D, gene_dim=G, hidden_dims=[8, 10, 6], dropout=0.0))
RESIDUAL = {**DECODER,
            "decoder_cfg": {**DECODER["decoder_cfg"], "hidden_dims": [8, 8, 6, 6, 5], "residual_decoder": True}}
EMBEDDING = dict(embed_key="X_state", output_space="embedding")
LORA = dict(lora=dict(enable=True, r=3, alpha=6, dropout=0.0, adapt_mlp=True))


def make(seed: int = 0, dtype=torch.float64, **changes) -> ts.StateTransitionPerturbationModel:
    """A small model in evaluation mode, with every weight moved off its start (norms and biases too)."""
    torch.manual_seed(seed)
    model = ts.build_model({**SETTINGS, **copy.deepcopy(changes)}).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def cells(seed: int = 1, dtype=torch.float64, n: int = B * S, **more) -> dict:
    """A batch as the source's loader gives it: every cell a row, sentence after sentence."""
    draw = torch.Generator().manual_seed(seed)
    rows = {"pert_emb": torch.randn(n // S, P, generator=draw).repeat_interleave(S, 0),
            "ctrl_cell_emb": torch.rand(n, D, generator=draw), "pert_cell_emb": torch.rand(n, D, generator=draw),
            "pert_cell_counts": torch.rand(n, G, generator=draw)}
    codes = torch.arange(n // S).remainder(2).add(1).repeat_interleave(S)
    return {k: v.to(dtype) for k, v in rows.items()} | {"batch": codes} | more


def predicted(model, batch, **options) -> torch.Tensor:
    found = model(batch, **options)
    return found[0] if isinstance(found, tuple) else found


def gradients(model, loss: torch.Tensor) -> dict:
    names, weights = zip(*[(k, w) for k, w in model.named_parameters() if w.requires_grad], strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return {k: g for k, g in zip(names, found, strict=True) if g is not None}


def close(a, b, atol: float = 1e-10, rtol: float = 0.0) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# Reference numbers -------------------------------------------------------------------------------------------------
references = pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
if not REFERENCES:
    references = pytest.mark.skip(f"no state_*.npz with a .json in {FOLDER}; set REFERENCE_DIR to the reference folder")


def reference(path: pathlib.Path, dtype) -> tuple:
    """(model with the reference's weights, batch, arrays, settings)."""
    settings, arrays = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), np.load(path)
    model = ts.build_model(settings).eval()
    model.load_source_state_dict({k[6:]: torch.tensor(arrays[k]) for k in arrays.files if k.startswith("param.")})
    batch = {k[3:]: torch.tensor(arrays[k]) for k in arrays.files if k.startswith("in.")}
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return model.to(dtype), batch, arrays, settings


@references
def test_state_reference_prediction_loss_and_confidence(path):
    """The reference is of single precision, in which |x - x| is rounding noise that differs between processors and
    that the loss holds: in double precision the gap to the reference is the same everywhere."""
    model, batch, arrays, _ = reference(path, torch.float64)
    with torch.no_grad():
        found, terms = model(batch), model(batch, losses=True)
    wanted = {k: torch.tensor(arrays[k]).double() for k in arrays.files if k.startswith("out.")}
    close(predicted(model, batch), wanted["out.pred"].reshape(-1, model.dims["output_dim"]), 1e-5)
    if "out.loss_per_set" in wanted:
        close(terms["per_set"], wanted["out.loss_per_set"].reshape(-1), 1e-4, 1e-5)
    if "out.confidence" in wanted:
        close(found[1].reshape(-1), wanted["out.confidence"].reshape(-1), 1e-5)
    model, batch, _, _ = reference(path, torch.float32)
    with torch.no_grad():
        close(predicted(model, batch).double(), wanted["out.pred"].reshape(-1, model.dims["output_dim"]), 1e-5)
        close(model(batch, losses=True)["per_set"].double(), terms["per_set"], 1e-3, 1e-4)


def geomloss_of(settings: dict, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of a setting as geomloss itself computes it, [B]."""
    def term(name):
        return SamplesLoss(name, blur=settings["blur"], backend="tensorized")(pred, target)

    if settings["loss"] == "se":
        return (settings.get("sinkhorn_weight", 0.01) * term("sinkhorn")
                + settings.get("energy_weight", 1.0) * term("energy"))
    return term(settings["distributional_loss"] if settings["loss"] == "energy" else settings["loss"])


@references
def test_state_reference_gradients_are_those_of_plain_geomloss(path):
    model, batch, _, settings = reference(path, torch.float64)
    if settings["loss"] == "mse" or settings.get("mmd_num_chunks", 1) > 1:
        pytest.skip("not one distance of geomloss")
    mine = gradients(model, model(batch, losses=True)["distance"])
    pred = predicted(model, batch).unflatten(0, (-1, model.cfg.cell_set_len))
    wanted = gradients(model, geomloss_of(settings, pred, batch["pert_cell_emb"].reshape(pred.shape)).nanmean())
    assert wanted and mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(mine[name], gradient, 1e-9)


# Symmetries --------------------------------------------------------------------------------------------------------
SETS = {"llama": {}, "gpt2": AS_GPT2, "batch encoder": dict(batch_encoder=True), "batch token": TOKEN,
        "confidence": dict(confidence_token=True), "both tokens": TOKENS,
        "grouped keys": dict(transformer_backbone_kwargs={**LLAMA, "num_key_value_heads": 2}),
        "all genes": dict(output_space="all"), "lora": LORA, "pert_norm": dict(pert_norm=True),
        "mask": dict(mask_attn=True)}


def permuted(batch: dict, order: torch.Tensor) -> dict:
    return {k: v[torch.cat([order, torch.arange(S, 2 * S)])] for k, v in batch.items()}


@pytest.mark.parametrize("options", SETS.values(), ids=SETS)
def test_the_order_of_cells_is_that_of_the_output_and_nothing_else(options):
    model, batch, order = make(**options), cells(), torch.tensor([3, 0, 5, 1, 4, 2])
    if options.get("batch_encoder"):
        batch["batch"] = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1, 1, 1, 1, 1])
    found, other = model(batch), model(permuted(batch, order))
    if isinstance(found, tuple):
        close(found[1], other[1])
        found, other = found[0], other[0]
    close(found[:S][order], other[:S])
    close(found[S:], other[S:])


@pytest.mark.parametrize("options", [CAUSAL, ROTARY, AS_OLD], ids=["causal", "rotary", "both"])
def test_causal_and_rotary_models_read_the_order(options):
    model, batch, order = make(**options), cells(), torch.tensor([3, 0, 5, 1, 4, 2])
    assert (predicted(model, batch)[:S][order] - predicted(model, permuted(batch, order))[:S]).abs().max() > 1e-4


def influences(model) -> torch.Tensor:
    """[cells out, cells in]: does the output of a cell change with the control cell?"""
    batch = cells()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: predicted(model, {**batch, "ctrl_cell_emb": x}).sum(-1), batch["ctrl_cell_emb"])
    return jacobian.abs().sum(-1) > 0


@pytest.mark.parametrize("backbone", [{}, AS_GPT2], ids=["llama", "gpt2"])
def test_a_cell_sees_its_sentence_only_and_behind_a_mask_itself_only(backbone):
    one_sentence = torch.block_diag(*[torch.ones(S, S)] * B).bool()
    assert torch.equal(influences(make(embed_key="X_state", **backbone)), one_sentence)
    masked = make(embed_key="X_state", mask_attn=True, **backbone)
    assert torch.equal(influences(masked), torch.eye(B * S).bool())


def test_a_causal_cell_sees_no_later_cell():
    before = torch.block_diag(*[torch.ones(S, S).tril()] * B).bool()
    assert torch.equal(influences(make(embed_key="X_state", **CAUSAL)), before)


# Distances between sets --------------------------------------------------------------------------------------------
LOSSES = ("energy", "se", "sinkhorn", "gaussian", "laplacian", "mse")


def sets(n: int = 7, m: int = 5, width: int = 9, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Three pairs of sets, of far and near cells; in double precision with cells twice in a set and one in both.

    In single precision a distance of zero is rounding noise, to geomloss too, and so is its gradient.
    """
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.rand(3, count, width, generator=draw).to(dtype) for count in (n, m))
    if dtype == torch.float64:
        x[:, 1], y[:, 2], y[0, 0] = x[:, 0], y[:, 1], x[0, 3]
        x[1, 4] = x[1, 5] + 1e-5  # nearer than what counts as a distance, so without gradient
    return x + torch.tensor([0.0, 0.5, 2.0])[:, None, None], y


def second(x, y, loss: str) -> torch.Tensor:
    return (x - y).square().mean((1, 2)) if loss == "mse" else geomloss_of(
        dict(blur=0.3, loss=loss, distributional_loss=loss, sinkhorn_weight=0.2, energy_weight=0.7), x, y)


def both(x, y, loss: str, of) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [B], gradient of a weighted sum of them with respect to x)."""
    x = x.clone().requires_grad_()
    values = of(x, y, loss)
    return values.detach(), torch.autograd.grad((values * torch.tensor([1.0, -2.0, 0.5])).sum(), x)[0]


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 3e-4)])
@pytest.mark.parametrize("loss", LOSSES)
def test_distances_and_gradients_equal_geomloss(loss, dtype, atol):
    x, y = sets(m=7 if loss == "mse" else 5, dtype=dtype)
    mine = both(x, y, loss, lambda a, b, k: ts.set_loss(a, b, k, 0.3, 0.2, 0.7))
    for found, wanted in zip(mine, both(x, y, loss, second), strict=True):
        close(found, wanted, atol, atol)


@pytest.mark.parametrize("loss", ["energy", "sinkhorn", "laplacian"])
@pytest.mark.parametrize("ordered", [False, True])
def test_feature_chunks_are_averaged(loss, ordered, monkeypatch):
    x, y = sets()
    order = torch.tensor([4, 8, 0, 3, 1, 7, 6, 2, 5]) if ordered else torch.arange(9)
    monkeypatch.setattr(torch, "randperm", lambda n, device: order)
    model = make(loss="energy", distributional_loss=loss, blur=0.3, mmd_num_chunks=4, randomize_mmd_chunks=ordered)
    mine = both(x, y, loss, lambda a, b, k: model.train().set_loss(a, b))
    groups = order.split(3)  # torch.chunk: nine features in four groups are three of three

    def averaged(a, b, k):
        return torch.stack([second(a[..., g], b[..., g], k) for g in groups]).mean(0)

    for found, wanted in zip(mine, both(x, y, loss, averaged), strict=True):
        close(found, wanted)
    assert (ts.set_loss(x, y, loss, 0.3) - mine[0]).abs().max() > 1e-3  # chunks do count


def test_more_chunks_than_features_are_single_features():
    x, y = sets(width=3)
    single = [ts.set_loss(x[..., i : i + 1], y[..., i : i + 1]) for i in range(3)]
    close(make(mmd_num_chunks=50).set_loss(x, y), torch.stack(single).mean(0))


def test_energy_equals_a_double_loop():
    x, y = sets()

    def mean(a, b):
        pairs = [sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) for u in a for v in b]
        return sum(max(1e-8, squared) ** 0.5 for squared in pairs) / len(pairs)

    for found, a, b in zip(ts.set_loss(x, y), x.tolist(), y.tolist(), strict=True):
        assert math.isclose(found, mean(a, b) - mean(a, a) / 2 - mean(b, b) / 2, abs_tol=1e-12)


def test_energy_is_no_negative_number_and_zero_for_equal_sets():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, n, 3, generator=draw, dtype=torch.float64) for n in (5, 4))
    # Distances of zero count 1e-4, as in geomloss: the diagonals may take that off a true energy of zero.
    assert (ts.set_loss(x, y) > -2e-4).all() and (ts.set_loss(x, y) > 0.01).float().mean() > 0.9
    close(ts.set_loss(x, x.flip(1)), torch.zeros(200, dtype=torch.float64), 1e-12)


def test_gradient_of_the_energy_equals_finite_differences():
    x, y = sets()
    x, y = x[[0, 2], 2:], y[[0, 2], 3:]  # no cell twice: there the energy has no derivative
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: ts.set_loss(a, y), x, eps=1e-7, atol=1e-6)


def test_no_gradient_is_made_where_none_is_asked_and_targets_get_none():
    x, y = sets()
    y.requires_grad_()
    assert not ts.set_loss(x, y).requires_grad
    assert torch.autograd.grad(ts.set_loss(x.requires_grad_(), y).sum(), y, allow_unused=True) == (None,)


def test_an_unknown_loss_is_named_and_sets_that_do_not_compare_are_refused():
    with pytest.raises(ValueError, match="energi"):
        ts.set_loss(*sets(), loss="energi")
    x, y = sets()
    for a, b, loss in ((x[:2], y, "energy"), (x[..., :2], y, "energy"), (x, y[:, :0], "energy"), (x, y[:, :1], "mse")):
        with pytest.raises(ValueError):
            ts.set_loss(a, b, loss)


# Backbones: second formulas ----------------------------------------------------------------------------------------
def softmax_attention(q, k, v, causal: bool) -> torch.Tensor:
    """One head, [T, C] each."""
    score = q @ k.T / q.shape[-1] ** 0.5
    if causal:
        score = score.masked_fill(torch.ones_like(score).triu(1).bool(), -torch.inf)
    return score.softmax(-1) @ v


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions as complex numbers: features i and i + C / 2 times exp(1j * position / 10000^(2i / C))."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def llama_by_hand(w: dict, x: torch.Tensor, heads: int, kv_heads: int, causal: bool, rotary: bool) -> torch.Tensor:
    """One sentence [T, H] through the blocks whose weights w holds."""
    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for i in range(len([k for k in w if k.endswith("q_proj.weight")])):
        get = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if k.startswith(f"layers.{i}.")}
        h = norm(x, get["input_layernorm.weight"])
        q, k, v = (h @ get[f"self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = q.chunk(heads, -1), k.chunk(kv_heads, -1), v.chunk(kv_heads, -1)
        turn = turned if rotary else (lambda t: t)
        out = [softmax_attention(turn(q[j]), turn(k[j * kv_heads // heads]), v[j * kv_heads // heads], causal)
               for j in range(heads)]
        x = x + torch.cat(out, -1) @ get["self_attn.o_proj.weight"].T
        h = norm(x, get["post_attention_layernorm.weight"])
        gate = h @ get["mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ get["mlp.up_proj.weight"].T)) @ get["mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"])


def gpt2_by_hand(w: dict, x: torch.Tensor, heads: int) -> torch.Tensor:
    def norm(x, name):
        return ((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                * w[f"{name}.weight"] + w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    for i in range(len([k for k in w if k.endswith("ln_1.weight")])):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        parts = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        x = x + linear(torch.cat([softmax_attention(*part, False) for part in parts], -1), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f")


FORMS = {"bidirectional": (4, 4, True, False), "grouped": (4, 2, True, False), "one key": (4, 1, True, False),
         "causal": (4, 4, False, False), "causal rotary": (4, 4, False, True),
         "grouped causal rotary": (4, 2, False, True),
         "rotary": (4, 2, True, True)}


def backbone(key: str, given: dict, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(5)
    settings, _ = translate(dict(hidden_dim=H, transformer_backbone_key=key, transformer_backbone_kwargs=given))
    stack = ts.BACKBONES[key](ts.Config(**settings)).to(dtype).eval().requires_grad_(False)
    for weight in stack.parameters():
        weight += 0.2 * torch.randn_like(weight)
    return stack


@pytest.mark.parametrize("heads, kv_heads, bidirectional, rotary", FORMS.values(), ids=FORMS)
def test_llama_blocks_equal_the_formula(heads, kv_heads, bidirectional, rotary):
    stack = backbone("llama", {**LLAMA, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 6,
                               "bidirectional_attention": bidirectional, "rotary": rotary})
    x = torch.randn(B, S, H, dtype=torch.float64)
    wanted = [llama_by_hand(stack.state_dict(), part, heads, kv_heads, not bidirectional, rotary) for part in x]
    close(stack(x), torch.stack(wanted), 1e-5 if rotary else 1e-12)  # angles are of single precision, as Llama's are


def test_gpt2_blocks_equal_the_formula():
    stack, x = backbone("GPT2", GPT2), torch.randn(B, S, H, dtype=torch.float64)
    close(stack(x), torch.stack([gpt2_by_hand(stack.state_dict(), part, 4) for part in x]), 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_llama_blocks_equal_transformers(kv_heads, bidirectional):
    transformers = pytest.importorskip("transformers")
    given = {**LLAMA, "num_key_value_heads": kv_heads, "bidirectional_attention": bidirectional}
    stack, x = backbone("llama", given, torch.float32), torch.randn(B, S, H)
    given.pop("bidirectional_attention")
    peer = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=2, **given)).eval()
    lost = peer.load_state_dict(stack.state_dict(), strict=False)
    assert lost.missing_keys == ["embed_tokens.weight"] and not lost.unexpected_keys
    options = {}
    if bidirectional:  # all visible, and every cell at position zero: rotary positions then turn nothing
        options = dict(attention_mask=torch.zeros(B, 1, S, S), position_ids=torch.zeros(B, S, dtype=torch.long))
    with torch.no_grad():
        close(stack(x), peer(inputs_embeds=x, **options).last_hidden_state, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_gpt2_blocks_equal_transformers():
    transformers = pytest.importorskip("transformers")
    stack, x = backbone("GPT2", GPT2, torch.float32), torch.randn(B, S, H)
    peer = transformers.GPT2Model(transformers.GPT2Config(vocab_size=2, **GPT2)).eval()
    nn.init.zeros_(peer.wpe.weight)
    lost = peer.load_state_dict(stack.state_dict(), strict=False)
    assert set(lost.missing_keys) == {"wte.weight", "wpe.weight"} and not lost.unexpected_keys
    with torch.no_grad():
        close(stack(x), peer(inputs_embeds=x, attention_mask=torch.zeros(B, 1, S, S)).last_hidden_state, 1e-5)


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="mamba"):
        make(transformer_backbone_key="mamba")


# The model around them ---------------------------------------------------------------------------------------------
def layers(model, name: str, x: torch.Tensor, act=F.gelu) -> torch.Tensor:
    """A stack of linear layers named 0, 3, 6 and so on."""
    weights = model.state_dict()
    numbers = sorted(int(k.split(".")[1]) for k in weights if k.startswith(name + ".") and k.endswith("weight"))
    assert numbers == list(range(0, 3 * len(numbers), 3))
    for i in numbers:
        x = F.linear(x, weights[f"{name}.{i}.weight"], weights[f"{name}.{i}.bias"])
        x = act(x) if i != numbers[-1] else x
    return x


def by_hand(model, batch: dict, predict_residual: bool = True, space: str = "gene", act=F.gelu, norm: bool = False):
    """Cells before any clipping, one sentence after the other."""
    w, out = model.state_dict(), []
    for i in range(len(batch["ctrl_cell_emb"]) // S):
        basal, pert = batch["ctrl_cell_emb"][i * S : (i + 1) * S], batch["pert_emb"][i * S : (i + 1) * S]
        encoded = layers(model, "pert_encoder", pert, act)
        if norm:
            encoded = F.layer_norm(encoded, (H,), w["pert_norm.weight"], w["pert_norm.bias"])
        control = (F.linear(basal, w["basal_encoder.weight"], w["basal_encoder.bias"]) if "basal_encoder.weight" in w
                   else layers(model, "basal_encoder", basal, act))
        change = llama_by_hand({k.removeprefix("transformer_backbone."): v for k, v in w.items() if "backbone" in k},
                               encoded + control, 4, 4, False, False)
        if predict_residual and space == "all":
            x = layers(model, "project_out", change, act) + basal
            up, down = ({k: w[f"final_down_then_up.{n}.{k}"] for k in ("weight", "bias")} for n in (2, 0))
            out.append(F.linear(F.gelu(F.linear(x, **down)), **up))
        else:
            out.append(layers(model, "project_out", change + control if predict_residual else change, act))
    return torch.cat(out)


OUTPUTS = {"residual": ({}, {}), "no residual": (dict(predict_residual=False), dict(predict_residual=False)),
           "all": (dict(output_space="all"), dict(space="all")),
           "all, no residual": (dict(output_space="all", predict_residual=False), dict(predict_residual=False)),
           "basal mlp": (dict(use_basal_projection=True), {}), "pert_norm": (dict(pert_norm=True), dict(norm=True)),
           "relu": (dict(activation="ReLU"), dict(act=F.relu)),
           "one layer": (dict(n_encoder_layers=1, n_decoder_layers=1), {})}


@pytest.mark.parametrize("options, formula", OUTPUTS.values(), ids=OUTPUTS)
def test_the_model_equals_its_formula(options, formula):
    batch = cells()
    raw = by_hand(make(embed_key="X_state", **options), batch, **formula)
    assert (raw < -1e-3).any() and (raw > 1e-3).any()
    close(predicted(make(embed_key="X_state", **options), batch), raw)
    for embed_key in ("X_hvg", None):  # expression
        close(predicted(make(embed_key=embed_key, **options), batch), raw.relu())


def test_embeddings_are_clipped_only_where_the_source_is_followed_and_no_decoder_reads_them():
    assert not make(**EMBEDDING).clips and make(compat_relu=True, **EMBEDDING).clips
    assert not make(compat_relu=True, **DECODER).clips
    assert make(**{**DECODER, "output_space": "embedding"}).gene_decoder is None
    assert make(**{**DECODER, "gene_decoder_bool": False}).gene_decoder is None


def test_down_then_up_goes_through_an_eighth_of_the_width():
    narrow = make(output_space="all").final_down_then_up
    assert [narrow[i].weight.shape for i in (0, 2)] == [(1, D), (D, 1)]


@pytest.mark.parametrize("options, residual", [(DECODER, False), (RESIDUAL, True)], ids=["plain", "residual"])
def test_the_gene_decoder_equals_its_formula(options, residual):
    decoder, x = make(**options).gene_decoder, torch.randn(B, S, D, dtype=torch.float64)
    w, outputs, hidden = decoder.state_dict(), [x], options["decoder_cfg"]["hidden_dims"]
    for i in range(len(hidden)):
        linear, norm = (f"blocks.{i}.0", f"blocks.{i}.1") if residual else (f"decoder.{4 * i}", f"decoder.{4 * i + 1}")
        y = F.linear(outputs[-1], w[f"{linear}.weight"], w[f"{linear}.bias"])
        y = F.gelu(F.layer_norm(y, y.shape[-1:], w[f"{norm}.weight"], w[f"{norm}.bias"]))
        outputs.append(y + outputs[-1] if residual and i % 2 else y)
    last = "final_layer.0" if residual else f"decoder.{4 * len(hidden)}"
    close(decoder(x), F.linear(outputs[-1], w[f"{last}.weight"], w[f"{last}.bias"]).relu())
    assert (decoder(x) == 0).any()


@pytest.mark.parametrize("widths, fits", [([8, 6], False), ([8, 8, 6], True), ([8], True), ([8, 8, 6, 5], False)])
def test_a_residual_decoder_of_unequal_widths_is_refused(widths, fits):
    wrong = ts.Config(residual_decoder=True, decoder_hidden_dims=widths).check()
    assert wrong == [] if fits else str(widths) in wrong[0]


BATCHES = {"codes of cells": lambda c: c, "column": lambda c: c[:, None], "sentences": lambda c: c.reshape(B, S),
           "sentences of columns": lambda c: c.reshape(B, S, 1), "codes of sentences": lambda c: c[::S],
           "one-hot": lambda c: F.one_hot(c, 3).double(), "whole one-hot": lambda c: F.one_hot(c, 3),
           "one-hot sentences": lambda c: F.one_hot(c, 3).double().reshape(B, S, 3),
           "whole one-hot sentences": lambda c: F.one_hot(c, 3).reshape(B, S, 3),
           "one-hot of sentences": lambda c: F.one_hot(c[::S], 3).double(), "short": lambda c: c.short()}


@pytest.mark.parametrize("form", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("options", [dict(batch_encoder=True), TOKEN], ids=["encoder", "token"])
def test_batches_are_read_in_every_shape(options, form):
    model, batch = make(**options), cells()
    wanted, codes = model(batch, losses=True)["loss"], batch["batch"]
    if "batch_encoder" in options:
        plain = make(**options)
        with torch.no_grad():  # a batch's embedding is the same as that much more bias of the control cells' encoder
            plain.batch_encoder.weight[:] = 0
            expected = []
            for i in range(B):
                part = copy.deepcopy(plain)
                part.pert_encoder[-1].bias += model.batch_encoder.weight[codes[i * S]]
                expected.append(predicted(part, {k: v[i * S : (i + 1) * S] for k, v in batch.items()}))
        close(predicted(model, batch).detach(), torch.cat(expected))
    close(model({**batch, "batch": form(codes)}, losses=True)["loss"], wanted)


def test_the_only_batch_there_is_needs_no_code():
    model, batch = make(batch_dim=1, batch_encoder=True), cells()
    wanted = predicted(model, {**batch, "batch": torch.zeros(B * S, dtype=torch.long)})
    close(predicted(model, {**batch, "batch": torch.ones(B * S, 1)}), wanted)


def test_rows_and_sentences_and_one_perturbation_a_sentence_are_the_same():
    for options in ({}, TOKENS, dict(pert_norm=True, batch_encoder=True)):
        model, rows = make(**options), cells()
        sentences = {k: v.reshape(B, S, -1) if v.is_floating_point() else v.reshape(B, S) for k, v in rows.items()}
        short = {**sentences, "pert_emb": sentences["pert_emb"][:, 0], "batch": sentences["batch"][:, 0]}
        wanted = model(rows, losses=True)
        for other in (sentences, short):
            close(predicted(model, other), predicted(model, rows))
            close(model(other, losses=True), wanted)


def test_unpadded_cells_are_one_sentence_of_any_length():
    model, batch = make(**TOKEN), cells(n=B * S)
    batch["batch"], some = torch.ones_like(batch["batch"]), {k: v[:4] for k, v in batch.items()}
    other = make(cell_set_len=4, **TOKEN)
    close(predicted(model, some, padded=False), predicted(other, some))
    close(model(some, padded=False, losses=True), other(some, losses=True))
    whole = predicted(model, batch, padded=False)
    assert whole.shape == (B * S, D) and (whole - predicted(model, batch)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="4 cells"):
        model(some)


def test_one_cell_is_a_sentence():
    model = make(cell_set_len=1, confidence_token=True)
    assert model(cells(), losses=True)["per_set"].shape == (B * S,)


def test_settings_of_the_source_without_effect_are_taken():
    model = make(softplus=True, confidence_head=False, transformer_decoder=False, extra_tokens=1, lr=1e-4)
    close(predicted(model, cells()), predicted(make(), cells()))


# Losses ------------------------------------------------------------------------------------------------------------
def test_the_batch_token_names_the_batch():
    model, batch = make(batch_token_weight=0.7, **TOKEN), cells()
    logits = model.predict(in_sentences(batch, S, 3))["batch_logits"]
    wanted = -logits.log_softmax(-1)[torch.arange(B), batch["batch"][::S]].mean()
    terms = model(batch, losses=True)
    close(terms["batch_token"].double(), wanted, 1e-5)
    close(terms["loss"], terms["distance"] + 0.7 * wanted, 1e-5)
    for off in (dict(use_batch_token=True), dict(batch_encoder=True, **TOKEN)):
        assert "batch_token" not in make(**off)(batch, losses=True)  # as the source switches it off


@pytest.mark.parametrize("per_set", [True, False])
def test_the_confidence_predicts_the_loss_and_does_not_change_it(per_set):
    options = dict(confidence_token=True, confidence_per_set=per_set, confidence_target_scale=3, confidence_weight=0.4)
    model, batch = make(**options, **DECODER), cells()
    terms, (_, confidence) = model(batch, losses=True), model(batch)
    before = terms["distance"] + terms["decoder"]
    wanted = (confidence[:, 0] - 3 * (terms["per_set"] if per_set else before.detach())).square().mean()
    close(terms["confidence"].double(), wanted, 1e-6, 1e-5)
    close(terms["loss"], before + 0.4 * wanted, 1e-6, 1e-5)
    mine, plain = gradients(model, terms["loss"]), gradients(model, before + 0.4 * wanted)
    for name, gradient in plain.items():
        close(mine[name], gradient, 1e-5, 1e-4)
    assert (confidence >= 0).all()


def test_the_decoder_learns_genes_and_the_model_through_it():
    model, batch = make(decoder_weight=0.3, **DECODER), cells()
    terms = model(batch, losses=True)
    genes = model.gene_decoder(predicted(model, batch)).reshape(B, S, G)
    wanted = geomloss_of(SETTINGS, genes, batch["pert_cell_counts"].reshape(B, S, G)).mean()
    close(terms["decoder"], wanted)
    close(terms["loss"], terms["distance"] + 0.3 * wanted)
    assert gradients(model, terms["decoder"])["project_out.0.weight"].abs().max() > 1e-6
    del batch["pert_cell_counts"]
    close(model(batch, losses=True)["loss"], terms["distance"])


def test_a_detached_decoder_teaches_the_model_nothing_and_reads_one_measured_batch_in_ten():
    model, batch, read = make(detach_decoder=True, **DECODER), cells(), []
    found = gradients(model, model(batch, losses=True)["decoder"])
    assert found and all(name.startswith("gene_decoder.") for name in found)
    target = batch["pert_cell_emb"].reshape(B, S, D)
    model.gene_decoder.register_forward_hook(lambda module, given, out: read.append(torch.equal(given[0], target)))
    with torch.no_grad():
        for _ in range(20):
            model(batch, losses=True)
        assert not any(read)  # in evaluation never
        model.train()
        read.clear()
        torch.manual_seed(0)
        for _ in range(400):
            model(batch, losses=True)
    assert 20 <= sum(read) <= 60  # four standard deviations around 40


def test_the_regularization_is_the_mean_change():
    model, batch = make(regularization=0.3), cells()
    terms = model(batch, losses=True)
    close(terms["l1"], (predicted(model, batch) - batch["ctrl_cell_emb"]).abs().mean())
    close(terms["loss"], terms["distance"] + 0.3 * terms["l1"])


def test_a_sentence_that_is_not_a_number_is_left_out_of_the_mean():
    model, batch = make(), cells()
    whole = model(batch, losses=True)["per_set"]
    batch["pert_cell_emb"][2] = torch.nan
    terms = model(batch, losses=True)
    assert terms["per_set"].isnan().tolist() == [True, False]
    close(terms["loss"], whole[1])


def test_features_are_reordered_in_training_only():
    model, batch = make(mmd_num_chunks=4, randomize_mmd_chunks=True), cells()
    assert len({model(batch, losses=True)["loss"].item() for _ in range(4)}) == 1
    assert len({model.train()(batch, losses=True)["loss"].item() for _ in range(4)}) == 4


@pytest.mark.parametrize("loss", LOSSES)
def test_the_settings_choose_the_distance(loss):
    options = dict(loss="energy", distributional_loss=loss) if loss in ("gaussian", "laplacian") else dict(loss=loss)
    model, batch = make(blur=0.3, sinkhorn_weight=0.2, energy_weight=0.7, **options), cells()
    pred, target = predicted(model, batch).reshape(B, S, D), batch["pert_cell_emb"].reshape(B, S, D)
    close(model(batch, losses=True)["per_set"], second(pred, target, loss).detach())


TRAINED = {**SETS, **{name: options for name, (options, _) in OUTPUTS.items()}, "decoder": DECODER, "causal": CAUSAL,
           "detached": {**DECODER, "detach_decoder": True}, "masked lora": {**LORA, "mask_attn": True},
           "masked gpt2": {**AS_GPT2, "mask_attn": True}, "frozen": dict(freeze_pert_backbone=True),
           "frozen mask": dict(freeze_pert_backbone=True, mask_attn=True)}


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_every_weight_that_is_trained_has_a_part_in_the_loss(options):
    model = make(**options).train()  # else DistributedDataParallel waits for its gradient for ever
    found = gradients(model, model(cells(), losses=True)["loss"])
    assert found.keys() == {k for k, w in model.named_parameters() if w.requires_grad}


# Adapters and what is frozen ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone_", [{}, AS_GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("adapt_mlp", [False, True])
def test_lora_changes_nothing_at_first_and_then_what_its_product_says(backbone_, adapt_mlp):
    torch.manual_seed(0)
    plain = ts.build_model({**SETTINGS, **backbone_}).double().eval()
    torch.manual_seed(0)
    lora = dict(enable=True, r=3, alpha=12, adapt_mlp=adapt_mlp)
    adapted = ts.build_model({**SETTINGS, **backbone_, "lora": lora}).double().eval()
    weights, own = plain.state_dict(), adapted.state_dict()
    adapted.load_state_dict(own | {k: weights[k.replace(".base_layer", "")] for k in own if "lora_" not in k})
    close(predicted(adapted, cells()), predicted(plain, cells()), 1e-12)

    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight))
    own = adapted.state_dict()
    merged = [k for k in own if k.endswith("base_layer.weight")]
    suffixes = {k.split(".")[-3] for k in merged}
    attention, more = (("c_attn c_proj", "c_fc") if backbone_ else
                       ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"))
    assert suffixes == {*attention.split(), *(more.split() if adapt_mlp else ())}
    for k in merged:
        a, b = (own[k.replace("base_layer", f"lora_{x}.default")] for x in "AB")
        weights[k.replace(".base_layer", "")] = own[k] + 4 * ((b @ a).T if backbone_ else b @ a)
    plain.load_state_dict(weights)
    close(predicted(adapted, cells()), predicted(plain, cells()), 1e-10)


def test_lora_trains_adapters_in_place_of_the_backbone():
    model = make(**LORA)
    frozen = {k for k, w in model.named_parameters() if not w.requires_grad}
    assert frozen == {k for k in model.state_dict() if k.startswith("transformer_backbone.") and "lora_" not in k}
    found = gradients(model, model(cells(), losses=True)["loss"])
    assert not frozen & found.keys() and any("lora_A" in k for k in found) and "pert_encoder.0.weight" in found


@pytest.mark.parametrize("options", [{}, LORA, AS_GPT2], ids=["llama", "lora", "gpt2"])
def test_freezing_takes_the_backbone_and_the_output_layer_only(options):
    model = make(freeze_pert_backbone=True, **options)
    assert {k for k, w in model.named_parameters() if not w.requires_grad} == {
        k for k in model.state_dict() if k.startswith(("transformer_backbone.", "project_out.")) and "lora_" not in k}
    assert not make(freeze_pert=True).project_out[0].weight.requires_grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key, adapt_mlp", [("llama", False), ("llama", True), ("GPT2", False), ("GPT2", True)])
def test_adapters_have_the_names_and_values_of_peft(key, adapt_mlp):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] + ["gate_proj", "up_proj", "down_proj"] * adapt_mlp
    options, given = {}, {k: v for k, v in LLAMA.items() if k != "bidirectional_attention"}
    if key == "GPT2":
        options, given, targets = AS_GPT2, GPT2, ["c_attn", "c_proj"] + ["mlp.c_fc", "mlp.c_proj"] * adapt_mlp
    peer = (transformers.GPT2Model(transformers.GPT2Config(vocab_size=2, **given)) if options else
            transformers.LlamaModel(transformers.LlamaConfig(vocab_size=2, **given)))
    peer = peft.get_peft_model(peer, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)).eval()
    model = make(dtype=torch.float32, lora=dict(enable=True, r=3, alpha=6, adapt_mlp=adapt_mlp),
                 **(options or dict(transformer_backbone_kwargs=given)))
    own = model.state_dict()
    backbone_ = {"transformer_backbone." + k: v for k, v in peer.state_dict().items()}
    weights = {k: v for k, v in own.items() if "backbone" not in k} | {
        k: torch.randn_like(v) * 0.1 if "lora_" in k else v for k, v in backbone_.items()}
    peer.load_state_dict({k.removeprefix("transformer_backbone."): v for k, v in weights.items() if "backbone" in k})
    assert model.load_source_state_dict(weights) == []
    x = torch.randn(B, S, H)
    if key == "GPT2":
        nn.init.zeros_(peer.base_model.model.wpe.weight)
        wanted = peer(inputs_embeds=x, attention_mask=torch.zeros(B, 1, S, S))
    else:
        wanted = peer(inputs_embeds=x)
    close(model.transformer_backbone(x), wanted.last_hidden_state, 1e-5)


# Checkpoints of the source -----------------------------------------------------------------------------------------
class Settings(dict):
    """A foreign class that is a dict."""


class Names(list):
    """A foreign class that is a list."""


class Trap:
    """Runs code when a pickle is read without care."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def lightning(model, settings: dict | None = None, step: int = 7, **hyper_parameters) -> dict:
    """What Lightning writes for a model of the source."""
    return {"epoch": 1, "global_step": step, "pytorch-lightning_version": "2.5.1", "loops": {}, "callbacks": {},
            "optimizer_states": [], "lr_schedulers": [], "state_dict": source_state_dict(model),
            "hparams_name": "kwargs", "hyper_parameters": {**SETTINGS, **(settings or {}), **hyper_parameters}}


def write(path: pathlib.Path, content) -> pathlib.Path:
    torch.save(content, path)
    return path


FOREIGN = {"module": lambda: nn.MSELoss(), "path": lambda: pathlib.Path("a/b"), "number": lambda: np.float64(3.5),
           "namespace": lambda: argparse.Namespace(a=[1]), "array": lambda: np.arange(3),
           "names": lambda: np.array(["a", "b"], object), "device": lambda: torch.device("cpu"),
           "class": lambda: torch.optim.Adam, "function": lambda: F.relu, "set": lambda: {"a"},
           "type": lambda: torch.float32, "dict": lambda: Settings(a=1), "list": lambda: Names(["a"])}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_a_checkpoint_of_lightning_with_foreign_things_in_its_settings_is_read(foreign, tmp_path):
    model = make(dtype=torch.float32)
    path = write(tmp_path / "last.ckpt", lightning(model, thing=foreign(), nested={"thing": [foreign()]}))
    cfg, read, step, _ = ts.load_run(path)
    assert step == 7 and cfg.cell_set_len == S
    close(predicted(read.eval(), cells(dtype=torch.float32)), predicted(model, cells(dtype=torch.float32)), 1e-5)


def test_numbers_of_numpy_and_settings_in_a_namespace_count(tmp_path):
    model = make(dtype=torch.float32)
    path = write(tmp_path / "last.ckpt", lightning(model, step=np.int64(11), input_dim=np.int64(D)))
    assert read_source_checkpoint(path)[2] == 11
    assert ts.load_run(path)[3]["dims"]["input_dim"] == D
    content = lightning(model)
    content["hyper_parameters"] = argparse.Namespace(**content["hyper_parameters"])
    assert ts.load_run(write(path, content))[0].d_model == H
    content = lightning(model, transformer_backbone_kwargs=Settings(LLAMA))
    assert ts.load_run(write(path, content))[0].d_head == 4


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("trap", ["system", "open", "eval", "getattr"])
def test_no_code_of_a_checkpoint_runs(trap, legacy, tmp_path):
    mark = tmp_path / "mark"
    traps = {"system": Trap(os.system, f"touch {mark}"), "open": Trap(open, str(mark), "w"),
             "eval": Trap(eval, f"open({str(mark)!r}, 'w')"), "getattr": Trap(getattr, Trap(os.mkdir, str(mark)), "a")}
    content, path = lightning(make(dtype=torch.float32), thing=traps[trap]), tmp_path / "last.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with contextlib.suppress(CheckpointError):
        ts.load_run(path)
    assert not mark.exists()


def changed(content: dict, **settings) -> dict:
    return content | {"hyper_parameters": content["hyper_parameters"] | settings}


def without(content: dict, *keys: str) -> dict:
    return {k: v for k, v in content.items() if k not in keys}


BAD = {"damaged": lambda c: b"PK\x03\x04 torn", "empty": lambda c: b"", "text": lambda c: b"hello",
       "list": lambda c: [1, 2], "other weights": lambda c: {"state_dict": {"a.weight": torch.zeros(2)}},
       "other script": lambda c: {"model": {"wte.weight": torch.zeros(2)}, "step": 1},
       "no settings": lambda c: without(c, "hyper_parameters"), "weights only": lambda c: c["state_dict"],
       "settings a list": lambda c: c | {"hyper_parameters": [1, 2]},
       "no width": lambda c: c | {"hyper_parameters": without(c["hyper_parameters"], "hidden_dim")},
       "width in letters": lambda c: changed(c, hidden_dim="wide"),
       "other width": lambda c: changed(c, hidden_dim=2 * H),
       "unknown activation": lambda c: changed(c, activation="silu"),
       "unknown backbone": lambda c: changed(c, transformer_backbone_key="mamba"),
       "a weight too few": lambda c: c | {"state_dict": without(c["state_dict"], "project_out.0.bias")},
       "a weight too many": lambda c: c | {"state_dict": c["state_dict"] | {"project_in.0.bias": torch.zeros(3)}}}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused_in_a_sentence(spoil, tmp_path, capsys):
    content, path = spoil(lightning(make(dtype=torch.float32))), tmp_path / "last.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises((CheckpointError, SystemExit)) as refusal:  # of a setting's value the configurator tells
        ts.load_run(path)
    told = capsys.readouterr().err.removesuffix("\n") or str(refusal.value)
    assert "\n" not in told and 20 < len(told) < 400
    with pytest.raises(CheckpointError):
        ts.load_run(tmp_path / "absent.ckpt")


def test_a_torn_checkpoint_is_refused(tmp_path):
    path = write(tmp_path / "last.ckpt", lightning(make(dtype=torch.float32)))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="last.ckpt"):
        read_source_checkpoint(path)


def test_a_checkpoint_of_smolstate_is_read(tmp_path):
    model = make(dtype=torch.float32, pert_norm=True)
    old = {k: v for k, v in SETTINGS.items() if k != "pert_norm"} | AS_OLD  # no key says that it is bidirectional
    content = {"model_state_dict": {"module._orig_mod." + k: v for k, v in model.state_dict().items()}, "step": 40,
               "optimizer_state_dict": {}, "config": {"model": {"name": "state", "kwargs": old}}}
    cfg, read, step, _ = ts.load_run(write(tmp_path / "step_40.pt", content))
    assert step == 40 and cfg.pert_norm
    close(predicted(read.eval(), cells(dtype=torch.float32)), predicted(model, cells(dtype=torch.float32)), 1e-5)


@pytest.mark.parametrize("given, attention, seen, rotary", [
    (LLAMA, "auto", True, False), (AS_OLD["transformer_backbone_kwargs"], "auto", False, True),
    (LLAMA | {"bidirectional_attention": False}, "auto", False, True),
    (AS_OLD["transformer_backbone_kwargs"], "bidirectional", True, False),
    (LLAMA, "causal", False, False), (AS_OLD["transformer_backbone_kwargs"], "rotary", False, True)])
def test_a_llama_is_causal_unless_it_says_otherwise(given, attention, seen, rotary, tmp_path):
    shape, _ = translate({**SETTINGS, "transformer_backbone_kwargs": given}, attention)
    assert (shape["bidirectional_attention"], shape["rotary"]) == (seen, rotary)
    sizes = ("n_layers", "n_heads", "d_head", "d_mlp", "d_model")
    assert [shape[name] for name in sizes] == [2, 4, 4, 32, H]
    path = write(tmp_path / "last.ckpt", lightning(make(dtype=torch.float32), transformer_backbone_kwargs=given))
    cfg = ts.load_run(path, "cpu", attention)[0]
    assert (cfg.bidirectional_attention, cfg.rotary) == (seen, rotary)


def test_a_gpt2_has_four_times_the_width_where_it_does_not_say():
    shape, _ = translate({**SETTINGS, **AS_GPT2})
    assert (shape["d_mlp"], shape["n_layers"], shape["n_heads"]) == (4 * H, 2, 4)
    assert shape["bidirectional_attention"] is True and shape["rotary"] is False


def test_a_checkpoint_of_embeddings_is_clipped_as_the_source_clips(tmp_path):
    path = write(tmp_path / "last.ckpt", lightning(make(dtype=torch.float32, **EMBEDDING), EMBEDDING))
    assert ts.load_run(path)[1].clips
    path = write(tmp_path / "last.ckpt", lightning(make(dtype=torch.float32, **DECODER), DECODER))
    assert not ts.load_run(path)[1].clips


@pytest.mark.parametrize("options", [DECODER, RESIDUAL], ids=["plain", "residual"])
def test_the_decoder_of_a_checkpoint_without_its_settings_is_read_off_the_weights(options, tmp_path):
    model, batch = make(dtype=torch.float32, **options), cells(dtype=torch.float32)
    told = {k: v for k, v in options.items() if k != "decoder_cfg"}
    _, read, *_ = ts.load_run(write(tmp_path / "last.ckpt", lightning(model, told)))
    close(ts.expressed(read.eval(), predicted(read, batch)), ts.expressed(model, predicted(model, batch)), 1e-5)


def test_weights_that_do_not_fit_are_named():
    weights = make(dtype=torch.float32).state_dict()
    weights["project_out.0.weight"], weights["other.bias"] = torch.zeros(2, 2), torch.zeros(1)
    del weights["basal_encoder.bias"]
    model = make(seed=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as refusal:
        model.load_source_state_dict(weights)
    wrong = ("project_out.0.weight is [2, 2], not [16, 16]", "basal_encoder.bias is missing", "other.bias is unknown")
    assert all(part in str(refusal.value) for part in wrong)
    close(model.state_dict(), before, 0.0)
    assert set(model.load_source_state_dict(weights, partial=True)) == {"project_out.0.weight", "basal_encoder.bias"}


ROUND = {**SETS, **{name: options for name, (options, _) in OUTPUTS.items()}, "decoder": DECODER, "causal": CAUSAL,
         "rotary": ROTARY, "old": AS_OLD, "residual": RESIDUAL, "frozen": dict(freeze_pert_backbone=True)}


def test_norms_and_rotary_positions_are_those_of_the_checkpoint():
    kwargs = {**SETTINGS["transformer_backbone_kwargs"], "rms_norm_eps": 1e-4, "rope_theta": 500.0}
    settings, dims = translate({**SETTINGS, **ROTARY, "transformer_backbone_kwargs": kwargs})
    cfg = ts.Config(**settings)
    assert (cfg.norm_eps, cfg.rope_theta) == (1e-4, 500.0)
    assert ts.build_model(cfg, dims).transformer_backbone.norm.eps == 1e-4
    assert translate(source_settings(cfg, dims))[0]["norm_eps"] == 1e-4
    gpt2, dims = translate({**SETTINGS, **AS_GPT2})
    sizes = [ts.build_model(ts.Config(**gpt2 | {"norm_eps": eps}), dims).transformer_backbone.ln_f.eps
             for eps in (None, 1e-3)]
    assert sizes == [1e-5, 1e-3]


@pytest.mark.parametrize("options", ROUND.values(), ids=ROUND)
def test_settings_go_out_and_come_back(options):
    settings, dims = translate({**SETTINGS, **options})
    cfg = ts.Config(**settings)
    assert ts.Config(**translate(source_settings(cfg, dims))[0]) == ts.Config(**settings | {
        "n_kv_heads": cfg.n_kv_heads or (None if options.get("transformer_backbone_key") else cfg.n_heads)})


@pytest.mark.parametrize("options", [{}, AS_GPT2, LORA, TOKENS, DECODER,
                                     dict(output_space="all")],
                         ids=["llama", "gpt2", "lora", "tokens", "decoder", "all"])
def test_weights_go_out_and_come_back(options):
    model = make(dtype=torch.float32, **options)
    other = make(seed=9, dtype=torch.float32, **options)
    assert other.load_source_state_dict(source_state_dict(model)) == []
    close(other.state_dict(), model.state_dict(), 0.0)


# Starting from another run -----------------------------------------------------------------------------------------
def started(weights: dict, model=None, **settings) -> tuple:
    """(model after `initialise`, names that start anew, weights before)."""
    model = model or make(seed=4, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    return model, set(ts.initialise(model, weights, ts.Config(init_from="other.ckpt", **settings))), before


def test_one_hot_names_start_anew_and_features_do_not():
    weights = make(dtype=torch.float32).state_dict()
    model, fresh, before = started(weights)
    assert fresh == {k for k in before if k.startswith("pert_encoder.")}
    for k, v in model.state_dict().items():
        close(v, before[k] if k in fresh else weights[k], 0.0)
    model, fresh, _ = started(weights, perturbation_features_file="features.pt")
    assert not fresh
    close(model.state_dict(), weights, 0.0)


def test_an_encoder_of_another_width_starts_anew_as_a_whole():
    weights = make(dtype=torch.float32, input_dim=7, use_basal_projection=True).state_dict()
    model = make(seed=4, dtype=torch.float32, use_basal_projection=True)
    model, fresh, before = started(weights, model, perturbation_features_file="f")
    assert fresh == {k for k in before if k.startswith("basal_encoder.")}  # its second layer would fit
    close(model.transformer_backbone.state_dict(), {k[21:]: v for k, v in weights.items() if "backbone" in k}, 0.0)


def test_a_plain_checkpoint_fills_the_layers_under_the_adapters():
    weights = make(dtype=torch.float32).state_dict()
    model, fresh, _ = started(weights, make(seed=4, dtype=torch.float32, **LORA), lora=True)
    assert {k for k in fresh if "backbone" in k} == {k for k in model.state_dict() if "lora_" in k}
    close(model.transformer_backbone.layers[0].self_attn.q_proj.base_layer.weight,
          weights["transformer_backbone.layers.0.self_attn.q_proj.weight"], 0.0)


@pytest.mark.parametrize("options", [dict(transformer_backbone_kwargs={**LLAMA, "num_hidden_layers": 1}), AS_GPT2,
                                     dict(hidden_dim=8, transformer_backbone_kwargs={**LLAMA, "hidden_size": 8})],
                         ids=["fewer layers", "gpt2", "narrower"])
def test_a_transformer_that_does_not_fit_is_refused(options):
    with pytest.raises(CheckpointError, match="other.ckpt"):
        started(make(dtype=torch.float32, **options).state_dict())


def test_the_shape_of_a_checkpoint_is_taken_over(tmp_path, capsys):
    path = write(tmp_path / "last.ckpt", lightning(make(dtype=torch.float32), transformer_backbone_key="llama"))
    cfg, weights = ts.start_from_checkpoint(ts.Config(init_from=str(path), lr=3e-4))
    sizes = ("d_model", "n_layers", "n_heads", "d_head", "d_mlp", "n_decoder_layers")
    assert [getattr(cfg, name) for name in sizes] == [H, 2, 4, 4, 32, 3]
    assert (cfg.use_basal_projection, cfg.bidirectional_attention, cfg.rotary, cfg.lr) == (False, True, False, 3e-4)
    assert f"d_model = {H}" in capsys.readouterr().err and "project_out.0.weight" in weights
    dims = dict(input_dim=D, output_dim=D, pert_dim=P, batch_dim=3, gene_dim=G, hvg_dim=D, decodes=False)
    model = ts.build_model(cfg, dims)
    assert all(k.startswith("pert_encoder.") for k in ts.initialise(model, weights, cfg))
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "absent.ckpt", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=wrong.name):
            ts.start_from_checkpoint(ts.Config(init_from=str(wrong)))


# Precision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, AS_GPT2, AS_OLD, TOKENS, DECODER, dict(loss="se")],
                         ids=["llama", "gpt2", "rotary", "tokens", "decoder", "se"])
def test_half_precision_is_within_a_few_percent(options):
    model, batch = make(dtype=torch.float32, **options), cells(dtype=torch.float32)
    wanted = model(batch, losses=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch, losses=True)
    assert found["loss"].dtype == torch.float32
    for name, value in wanted.items():
        close(found[name].float(), value, 0.02, 0.05)
    found["loss"].backward()
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)
    exact = model.double()({k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, losses=True)
    assert exact["loss"].dtype == torch.float64
    close(wanted["loss"].double(), exact["loss"], 1e-3, 1e-3)


@pytest.mark.parametrize("options", [{}, AS_GPT2, TOKENS, DECODER, {**DECODER, "detach_decoder": True}, LORA,
                                     dict(mmd_num_chunks=3, randomize_mmd_chunks=True), dict(output_space="all")],
                         ids=["llama", "gpt2", "tokens", "decoder", "detached", "lora", "chunks", "all"])
def test_a_training_step_needs_no_device_but_its_own(options, monkeypatch):
    """On torch's meta device a tensor left on the CPU fails, and so does a value that is waited for."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # which it has not
    rt = Runtime(ts.Config(device="cpu", precision="fp32"))
    model = make(dtype=torch.float32, **options).to("meta").train()
    batch = {name: value.to("meta") for name, value in cells(dtype=torch.float32).items()}
    batch = {name: value.unflatten(0, (B, S)) for name, value in batch.items()}
    terms = ts.train_step(model, batch, rt, model.cfg)
    assert terms["loss"].device.type == "meta"
    assert all(w.grad.shape == w.shape for w in model.parameters() if w.requires_grad)


# Against arc-state itself ------------------------------------------------------------------------------------------
PEERS = {"plain": {}, "causal": AS_OLD,
         "grouped": dict(transformer_backbone_kwargs={**LLAMA, "num_key_value_heads": 2}),
         "all": dict(output_space="all"), "no residual": dict(predict_residual=False), "embedding": EMBEDDING,
         "decoder": DECODER, "residual decoder": RESIDUAL, "token": TOKEN, "tokens": TOKENS,
         "basal": dict(use_basal_projection=True),
         "batch encoder": dict(batch_encoder=True), "chunks": dict(mmd_num_chunks=3), "l1": dict(regularization=0.3),
         "se": dict(loss="se"), "se in chunks": dict(loss="se", mmd_num_chunks=3), "mse": dict(loss="mse"),
         "sinkhorn": dict(loss="sinkhorn"), "laplacian": dict(distributional_loss="laplacian"), "lora": LORA}


@pytest.fixture(scope="module")
def arc_state():
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.importorskip("state")
        from state.tx.models.state_transition import StateTransitionPerturbationModel
    return StateTransitionPerturbationModel


def make_peer(arc_state, options: dict):
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        peer = arc_state(**copy.deepcopy({**SETTINGS, **options})).eval()
    peer.log = lambda *_, **__: None
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "embed_tokens" not in name:
                weight += 0.1 * torch.randn_like(weight)
    return peer


def peer_batch() -> dict:
    batch = cells(dtype=torch.float32)
    return batch | {"batch": F.one_hot(batch["batch"], 3).float()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", PEERS.values(), ids=PEERS)
def test_arc_state_predicts_loses_and_learns_the_same(arc_state, options):
    peer, batch = make_peer(arc_state, options), peer_batch()
    model = make(dtype=torch.float32, compat_relu=True, **options)
    model.load_source_state_dict(peer.state_dict())
    close(predicted(model, batch), predicted(peer, batch), 1e-5)
    # In double precision (but for the source's norms) the noise of distances near zero, 1e-3 in gradients, is gone.
    peer, model = peer.double(), model.double()
    batch = {k: v.double() for k, v in batch.items()}
    mine, wanted = model(batch, losses=True)["loss"], peer.training_step(batch, 0)
    close(mine, wanted, 1e-6)
    found, theirs = gradients(model, mine), {plain_name(k): v for k, v in gradients(peer, wanted).items()}
    assert found.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(found[name], gradient, 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, AS_OLD, EMBEDDING, DECODER, TOKENS, LORA, AS_GPT2],
                         ids=["llama", "old llama", "embedding", "decoder", "tokens", "lora", "gpt2"])
def test_arc_state_reads_our_weights(arc_state, options):
    try:
        peer = make_peer(arc_state, options)
    except AttributeError as e:
        pytest.skip(f"this arc-state cannot build it: {e}")
    if options is AS_GPT2:  # with sdpa, GPT2Attention is causal whatever arc-state asks of it
        peer.transformer_backbone.config._attn_implementation = "eager"
    model = make(seed=6, dtype=torch.float32, compat_relu=True, **options)
    peer.load_state_dict(source_state_dict(model), strict=True)
    close(predicted(peer.eval(), peer_batch()), predicted(model, peer_batch()), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, AS_OLD, EMBEDDING, DECODER, RESIDUAL, TOKENS, LORA],
                         ids=["llama", "old llama", "embedding", "decoder", "residual decoder", "tokens", "lora"])
def test_a_checkpoint_that_lightning_wrote_of_arc_state_predicts_the_same(arc_state, options, tmp_path, capsys):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pytest.importorskip("lightning.pytorch").Trainer(accelerator="cpu", **quiet)
    peer = make_peer(arc_state, options)
    del peer.log
    trainer.strategy.connect(peer)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    cfg, model, *_ = ts.load_run(tmp_path / "last.ckpt")
    close(predicted(model.eval(), peer_batch()), predicted(peer, peer_batch()), 1e-5)
    assert cfg.embed_key == {**SETTINGS, **options}["embed_key"]
    assert ("causal with rotary" in capsys.readouterr().out) == (options is AS_OLD)


@pytest.mark.parametrize("named", [False, True])
def test_a_lightning_checkpoint_without_the_setting_is_read_as_its_release_meant(tmp_path, named):
    """Releases before 0.9.32 know neither bidirectional_attention nor basal_mapping_strategy, and are bidirectional."""
    backbone = {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4, "intermediate_size": 8}
    settings = {"input_dim": 5, "hidden_dim": 8, "output_dim": 5, "pert_dim": 3, "transformer_backbone_key": "llama",
                "transformer_backbone_kwargs": backbone, "embed_key": "X_hvg", "gene_decoder_bool": False}
    weights = ts.build_model(settings).state_dict()
    saved = settings | {"control_pert": "x", "gene_names": None, "batch_size": 8}  # all that Lightning saves unasked
    saved |= {"basal_mapping_strategy": "random"} if named else {}
    torch.save({"state_dict": weights, "hyper_parameters": saved}, tmp_path / "a.ckpt")
    cfg = ts.load_run(tmp_path / "a.ckpt")[0]
    assert (cfg.bidirectional_attention, cfg.rotary) == (not named, named)
    assert ts.load_run(tmp_path / "a.ckpt", "auto", "bidirectional")[0].bidirectional_attention
