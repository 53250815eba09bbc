"""train_apelr.py: its mathematics, against brute force, second formulas and values of the source system."""

import itertools
import json
import math
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.log_probs
import kernels.plan_contrast
import train_apelr
from common.errors import CheckpointError, InputError
from measure import plans
from measure.writing import advance, draw, generate, look_ahead, predict, prefill
from sources.foreign_apelr import convert, is_source_checkpoint
from train_apelr import (
    ALIASES,
    V1_TERMS,
    V2_TERMS,
    Config,
    build_model,
    commitment,
    cross_iohmm,
    cross_source,
    load_source_checkpoint,
)

FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(train_apelr.__file__).parent / "../shared/reference")).resolve()
V1, V2, BASELINE = "v1_filtered_mixture", "v2_planner_required", "baseline"
V, K, H = 7, 3, 8
LOWRANK = {"experts": "lowrank", "expert_rank": 2}
VERSIONS = {"v1": {"version": V1}, "v2": {}, "v2-bias": {"experts": "bias"}, "v2-lowrank": LOWRANK}
BACKBONES = ("gru", "transformer")
pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def every(cases: dict, name: str = "settings"):
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


def config(**settings) -> Config:
    return Config(**{"version": V2, "vocab_size": V, "num_plan_states": K, "chunk_size": 4, "token_dim": 5,
                     "d_model": H, "fusion_dim": 6, "n_layers": 1, "n_heads": 2, "rep_window": 3,
                     "planner_context_scale": 0.7, **settings})


def shaken(model, scale: float = 0.5, seed: int = 0):
    """The model with weights at random, so that every part of it matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tiny(**settings):
    """A float64 model in evaluation mode whose plans, transitions and contexts differ clearly."""
    return shaken(build_model(config(**settings)).double()).eval()


def text(B: int = 2, L: int = 13, seed: int = 1, vocab: int = V) -> torch.Tensor:
    """Tokens [B, L + 1]."""
    return torch.randint(vocab, (B, L + 1), generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed: int = 2, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def filtered(model, ids: torch.Tensor, **options):
    """Beliefs over the tokens ids[:, 1:], each predicted from those before it."""
    h, _ = model.read(ids[:, :-1])
    evidence = model.look_up(h, ids[:, 1:, None])[..., 0]
    return model.filter(evidence, model.contexts(h), **options)


def number(value: torch.Tensor) -> float:
    return float(value.detach())


def close(found, expected, rtol: float = 1e-10, atol: float = 1e-10, msg: str | None = None) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=atol,
                               msg=msg and (lambda said: f"{msg}: {said}"))


# ---------------------------------------------------------------------------------------------------------------
# A second way to compute everything: dense logits, probabilities rather than logarithms, a loop over tokens
# ---------------------------------------------------------------------------------------------------------------
def dense_logits(model, h: torch.Tensor) -> torch.Tensor:
    """Logits [..., K, V] of every expert, by the formulas of the kinds."""
    e = model.experts
    if isinstance(e, train_apelr.TanhExperts):
        joint = torch.tanh((h @ e.state_proj.weight.T + e.state_proj.bias)[..., None, :]
                           + e.plan_emb.weight @ e.plan_proj.weight.T)
        return joint @ e.out_proj.weight.T + e.out_proj.bias + e.plan_vocab_bias
    if isinstance(e, train_apelr.BiasExperts):
        shared = (h @ e.head.weight.T + e.head.bias)[..., None, :] + e.plan_bias
        if not isinstance(e, train_apelr.LowRankExperts):
            return shared
        return shared + torch.einsum("...h,rh,kvr->...kv", h, e.features.weight, e.plan_weight)
    return torch.einsum("...h,kvh->...kv", h, e.weight) + e.bias


class Slow(NamedTuple):
    h: torch.Tensor  # [B, L, H]
    p: torch.Tensor  # p_{t,k}(v) [B, L, K, V]
    nll: torch.Tensor  # [B, L]
    before: torch.Tensor  # probabilities [B, L, K]
    gate: torch.Tensor
    after: torch.Tensor
    start: torch.Tensor  # [B, N, K]
    end: torch.Tensor


def slow_gate(b: torch.Tensor, P: torch.Tensor, a: float, S: int, tau: float) -> torch.Tensor:
    forecasts = [b @ torch.linalg.matrix_power(P, s) for s in range(1, S + 1)]
    mixed = (1 - a) * b + a * sum(forecasts) / S if a else b
    return mixed ** (1 / tau) / (mixed ** (1 / tau)).sum()


def context_of(model, seen: torch.Tensor) -> torch.Tensor:
    if model.cfg.version == V1:
        return model.cfg.planner_context_scale * model.planner_ctx_proj(seen)
    return model.cfg.planner_context_scale * model.planner_boundary_proj(seen) + model.planner_obs_proj(seen)


def context_at(model, h: torch.Tensor, t: int) -> torch.Tensor | None:
    """g [K] if a chunk begins with y_t, t > 0 or chunks of one token; h [L, H]."""
    C = model.cfg.chunk_size
    if model.cfg.version == V1:
        return context_of(model, h[t]) if t and t % C == 0 else None
    if model.cfg.carry_posterior:
        return context_of(model, h[t + 1 - C : t + 1].mean(0)) if (t + 1) % C == 0 else None
    return context_of(model, h[t - C : t].mean(0)) if t and t % C == 0 else None


def chain(model, g: torch.Tensor) -> torch.Tensor:
    """The transition matrix of a boundary: rows sum to 1."""
    return torch.softmax(model.planner_transition_logits + g[None, :], 1)


def slowly(model, x: torch.Tensor, y: torch.Tensor, rule: str = "iohmm", a: float = 0.0, S: int = 2,
           tau: float = 1.0) -> Slow:
    with torch.no_grad():
        h, _ = model.backbone(model.token_emb(x))
        p = dense_logits(model, h).softmax(-1)
        P, rows = model.planner_transition_logits.softmax(1), []
        for i in range(len(x)):
            b = start = model.planner_init_logits.softmax(0)
            row = {"nll": [], "before": [], "gate": [], "after": [], "start": [start], "end": []}
            for t in range(x.shape[1]):
                g = context_at(model, h[i], t)
                if g is not None:
                    row["end"].append(b)
                    b = b if model.cfg.carry_posterior else start
                    if rule == "iohmm":
                        b = b @ chain(model, g)
                    else:
                        b = (b @ P) * g.exp()
                        b = b / b.sum()
                    start = b
                    row["start"].append(b)
                gate = slow_gate(b, P, a, S, tau)
                likely = p[i, t, :, y[i, t]]
                row["before"].append(b)
                row["gate"].append(gate)
                row["nll"].append(-torch.log((gate * likely).sum()))
                if model.cfg.token_filtering:
                    b = b * likely / (b * likely).sum()
                row["after"].append(b)
            row["end"].append(b)
            rows.append({name: torch.stack(values) for name, values in row.items()})
        return Slow(h, p, *(torch.stack([row[name] for row in rows]) for name in
                            ("nll", "before", "gate", "after", "start", "end")))


def H_of(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum()


def KL(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


def mean_of(values: list) -> torch.Tensor:
    return sum(values) / len(values)


def pieces(L: int, C: int) -> list[range]:
    return [range(c, min(c + C, L)) for c in range(0, L, C)]


def slow_v1_terms(model, y: torch.Tensor, s: Slow) -> dict:
    (B, L), C = y.shape, model.cfg.chunk_size
    uniform = torch.full_like(s.start[0, 0], 1 / s.start.shape[2])
    places = list(itertools.product(range(B), range(L)))
    bow, post = [], []
    for i in range(B):
        for c, ts in enumerate(pieces(L, C)):
            word = sum(s.start[i, c, k] * s.p[i, t, k] / len(ts) for t in ts for k in range(len(uniform)))
            bow.append(mean_of([-word[y[i, t]].log() for t in ts]))
            q = model.chunk_post_proj(s.h[i, ts.start : ts.stop].mean(0)).softmax(0)
            post.append((KL(q, s.end[i, c]) + KL(s.end[i, c], q)) / 2)
    mi = [H_of(s.before[i, t] @ s.p[i, t]) - sum(b * H_of(p) for b, p in zip(s.before[i, t], s.p[i, t], strict=True))
          for i, t in places]
    return {"belief_entropy": mean_of([H_of(s.after[i, t]) for i, t in places]),
            "usage_kl": KL(mean_of([s.after[i, t] for i, t in places]), uniform),
            "chunk_bow": mean_of(bow), "plan_mi": mean_of(mi), "chunk_post_kl": mean_of(post)}


def slow_v2_terms(model, x: torch.Tensor, y: torch.Tensor, s: Slow, window: int, current: bool) -> dict:
    (B, L), C, tau = y.shape, model.cfg.chunk_size, model.cfg.planner_temperature
    plans = s.start.shape[2]
    uniform = torch.full_like(s.start[0, 0], 1 / plans)
    # The source counts no chunk that begins with the last token, as one does where chunks are whole.
    counted = math.ceil(L / C) if model.cfg.compat == "source" else s.start.shape[1]
    starts = [s.start[i, c] for i in range(B) for c in range(counted)]
    js, rep = [], []
    for i, t in itertools.product(range(B), range(L)):
        for j, k in itertools.combinations(range(plans), 2):
            p, q = s.p[i, t, j], s.p[i, t, k]
            js.append(H_of((p + q) / 2) - (H_of(p) + H_of(q)) / 2)
        last = t if current else t - 1  # the newest token that counts
        recent = set(x[i, max(0, last - window + 1) : last + 1].tolist()) - {int(y[i, t])}
        mixture = s.gate[i, t] @ s.p[i, t]
        if recent:
            rep.append(mean_of([-torch.log(1 - mixture[v]) for v in recent]))
    info, chunks = [], pieces(L, C)
    for d in range(1, min(model.cfg.future_horizon_chunks, len(chunks) - 1) + 1):
        pairs = list(itertools.product(range(B), range(len(chunks) - d)))
        plan = [s.start[i, c] @ model.plan_state_emb.weight for i, c in pairs]
        seen = [s.h[i, chunks[c + d].start : chunks[c + d].stop].mean(0) for i, c in pairs]
        future = [model.future_chunk_proj.weight @ m for m in seen]
        scores = [[torch.dot(u, v) / u.norm() / v.norm() / tau for v in future] for u in plan]
        info.append(mean_of([torch.logsumexp(torch.stack(row), 0) - row[n] for n, row in enumerate(scores)]))
    return {"boundary_entropy": mean_of([H_of(b) for b in starts]), "usage_balance": KL(mean_of(starts), uniform),
            "future_contrastive": mean_of(info), "plan_js_div": mean_of(js), "rep_unlikelihood": mean_of(rep)}


# ---------------------------------------------------------------------------------------------------------------
# Values of the source system
# ---------------------------------------------------------------------------------------------------------------
FILES = sorted(FOLDER.glob("apelr_v*.npz"))


def groups_of(path: Path) -> dict[str, dict[str, float]]:
    """{run: {name of ours: value}} of a reference file; the one run of version 1 is called normal."""
    found, first = {}, True
    with np.load(path) as file:
        first = "param.plan_emb.weight" in file
        for key in (k for k in file if k.startswith("out.")):
            run, name = ("normal", key.removeprefix("out.")) if first else key.removeprefix("out.").split(".", 1)
            name = name.removesuffix("_loss")
            if name == "usage_kl_to_uniform":
                name = "usage_kl" if first else "usage_balance"
            found.setdefault(run, {})[name] = float(file[key])
    return found


RUNS = [(path, run) for path in FILES for run in groups_of(path)]
reference = pytest.mark.parametrize("path, run", RUNS, ids=[f"{path.stem}-{run}" for path, run in RUNS])
reference_files = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
if not FILES:
    absent = pytest.mark.skip(f"no apelr_v*.npz in {FOLDER}; set REFERENCE_DIR to the reference folder")
    reference = pytest.mark.parametrize("path, run", [pytest.param(None, "", marks=absent)], ids=["absent"])
    reference_files = pytest.mark.parametrize("path", [pytest.param(None, marks=absent)], ids=["absent"])


def opened(path: Path) -> tuple[dict, dict, torch.Tensor, torch.Tensor]:
    """(state dict, model_config, inputs, targets) of a reference file."""
    with np.load(path) as file:
        weights = {k.removeprefix("param."): torch.tensor(file[k]) for k in file if k.startswith("param.")}
        x, y = torch.tensor(file["input_ids"]), torch.tensor(file["target_ids"])
    return weights, json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), x, y


def how(run: str) -> tuple[dict, dict]:
    """(settings, arguments of losses) that a run of a reference file was made with."""
    if run.startswith("forced_state_"):
        return {}, {"planner_mode": "forced_state", "forced_state": int(run.rsplit("_", 1)[1])}
    if re.fullmatch(r"rep\d+", run):
        return {"rep_window": int(run[3:])}, {}
    return {"normal": ({}, {}), "uniform_mask": ({}, {"planner_mode": "uniform_mask"}),
            "no_feedback": ({"lookahead_feedback_scale": 0.0}, {}),
            "no_token_filtering": ({"token_filtering": False}, {})}[run]


def as_checkpoint(weights: dict, settings: dict) -> dict:
    return {"model_state_dict": weights, "model_config": settings, "global_step": 3,
            "model_version": V1 if "plan_emb.weight" in weights else V2}


@reference
@pytest.mark.parametrize("form", ["checkpoint", "bare state dict"])
def test_apelr_reference_losses_are_those_of_the_source(path, run, form, capsys):
    weights, settings, x, y = opened(path)
    changes, options = how(run)
    if form == "checkpoint":
        model = load_source_checkpoint(as_checkpoint(weights, settings | changes))
    else:
        names = {f.name for f in fields(Config)}
        older = {} if "plan_emb.weight" in weights or "lookahead_horizon" in settings else \
            {"carry_posterior": False, "lookahead_feedback_scale": 0.0}
        ours = {ALIASES.get(k, k): v for k, v in (settings | changes | older).items()}
        model = load_source_checkpoint(weights, Config(**{k: v for k, v in ours.items() if k in names}))
    assert capsys.readouterr().out == ""  # no weight is missing, none unknown
    with torch.no_grad():
        found = model.eval().losses(x, y, **options)
    tolerance = 1e-5 if weights["token_emb.weight"].dtype == torch.float64 else 1e-4
    expected = groups_of(path)[run]
    assert {k: float(found[k]) for k in expected} == pytest.approx(expected, rel=0, abs=tolerance)


@reference_files
def test_apelr_reference_files_hold_the_runs_that_are_checked_here(path):
    groups = groups_of(path)
    assert "nll" in groups["normal"] and all(how(run) for run in groups)
    _, settings, _, _ = opened(path)
    first = "belief_entropy" in groups["normal"]
    wanted = V1_TERMS if first else V2_TERMS
    assert set(wanted) <= set(groups["normal"])
    assert first or "lookahead_horizon" not in settings or {"no_feedback", "no_token_filtering"} <= set(groups)


@reference_files
def test_apelr_reference_checkpoints_choose_the_rules_of_the_source_that_made_them(path):
    weights, settings, _, _ = opened(path)
    cfg = load_source_checkpoint(as_checkpoint(weights, settings)).cfg
    older = cfg.version == V2 and "lookahead_horizon" not in settings
    assert (cfg.compat, cfg.boundary_rule(), cfg.include_current()) == ("source", "source", False)
    assert cfg.carry_posterior is not older
    assert cfg.feedback() == (0.0 if cfg.version == V1 or older else settings["lookahead_feedback_scale"])


# ---------------------------------------------------------------------------------------------------------------
# The filter
# ---------------------------------------------------------------------------------------------------------------
def by_enumeration(model, x: torch.Tensor, y: torch.Tensor):
    """(nll, beliefs before every token, beliefs at the end of every chunk), summing over all paths of plans."""
    with torch.no_grad():
        h, _ = model.backbone(model.token_emb(x))
        p = dense_logits(model, h).softmax(-1)
        nll, before, ends = [], [], []
        for i in range(len(x)):
            chunk, chains = [], []
            for t in range(x.shape[1]):
                g = context_at(model, h[i], t)
                if g is not None:
                    chains.append(chain(model, g).tolist())
                chunk.append(len(chains))
            like = [p[i, t, :, y[i, t]].tolist() for t in range(x.shape[1])]
            first, N, plans = model.planner_init_logits.softmax(0).tolist(), len(chains) + 1, range(p.shape[2])

            def joint(tokens: int, c: int, k: int, first=first, chains=chains, like=like, chunk=chunk, plans=plans):
                """p(the first `tokens` targets, plan k in chunk c): over every path of plans that ends in k there."""
                total = 0.0
                for path in itertools.product(plans, repeat=c):
                    path = (*path, k)
                    weight = first[path[0]]
                    for step, matrix in enumerate(chains[:c]):
                        weight *= matrix[path[step]][path[step + 1]]
                    for t in range(tokens):
                        weight *= like[t][path[chunk[t]]]
                    total += weight
                return total

            def belief(tokens: int, c: int, joint=joint, plans=plans):
                each = [joint(tokens, c, k) for k in plans]
                return sum(each), [v / sum(each) for v in each]

            rows = [belief(t, chunk[t]) for t in range(len(chunk))]
            totals = [total for total, _ in rows] + [belief(len(chunk), N - 1)[0]]
            nll.append([math.log(a / b) for a, b in itertools.pairwise(totals)])
            before.append([b for _, b in rows])
            ends.append([belief(sum(c <= n for c in chunk), n)[1] for n in range(N)])
        return tuple(torch.tensor(v, dtype=torch.float64) for v in (nll, before, ends))


@every(VERSIONS)
@pytest.mark.parametrize("L, C", [(10, 3), (9, 3), (4, 1), (5, 4)])
def test_the_filter_equals_the_sum_over_all_paths_of_plans(settings, L, C):
    model, ids = tiny(chunk_size=C, **settings), text(2, L)
    nll, before, end = by_enumeration(model, ids[:, :-1], ids[:, 1:])
    found = filtered(model, ids)
    close(found.nll, nll)
    close(found.before.exp(), before)
    close(found.gate.exp(), before)
    close(found.end.exp(), end)


def test_the_probabilities_of_all_texts_of_a_length_sum_to_one():
    for settings in VERSIONS.values():
        model = tiny(**settings | {"vocab_size": 3, "chunk_size": 2})
        ids = torch.tensor([[1, *rest] for rest in itertools.product(range(3), repeat=5)])
        close((-filtered(model, ids).nll.sum(1)).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


OTHER_RULES = {
    "v1-source": {"version": V1, "compat": "source"}, "v2-source": {"compat": "source", "planner_temperature": 0.7},
    "v2-tau": {"planner_temperature": 1.6}, "v2-lookahead": {"lookahead_feedback_scale": 0.4, "lookahead_horizon": 3},
    "v2-no-token-filtering": {"token_filtering": False},
    "v1-no-token-filtering": {"version": V1, "token_filtering": False},
    "older-v2": {"compat": "source", "carry_posterior": False, "lookahead_feedback_scale": 0.0},
}


@every(OTHER_RULES | VERSIONS)
@pytest.mark.parametrize("L, C", [(13, 4), (12, 4), (4, 1), (5, 4), (11, 4)])
def test_the_filter_equals_bayes_rule_token_by_token(settings, L, C):
    model, ids = tiny(chunk_size=C, **settings), text(2, L)
    cfg = model.cfg
    s = slowly(model, ids[:, :-1], ids[:, 1:], cfg.boundary_rule(), cfg.feedback(), cfg.lookahead_horizon,
               cfg.planner_temperature)
    found = filtered(model, ids)
    for name in ("before", "gate", "start", "end"):
        close(getattr(found, name).exp(), getattr(s, name), msg=name)
    close(found.state, found.start)
    close(found.nll, s.nll)


def test_the_boundary_of_the_source_is_no_markov_chain_and_ours_is_one():
    A, g = noise(K, K), noise(2, K, seed=3)
    one, other = noise(2, K, seed=4).log_softmax(1), noise(2, K, seed=5).log_softmax(1)
    middle = torch.logaddexp(one, other) - math.log(2)

    def bend(cross, g):
        """How far the belief after a mixture is from the mixture of the beliefs after: 0 for every chain."""
        both = (cross(one, A, g).exp() + cross(other, A, g).exp()) / 2
        return number((cross(middle, A, g).exp() - both).abs().max())

    assert bend(cross_iohmm, g) < 1e-12 and bend(cross_source, g) > 1e-3
    flat = torch.zeros_like(g)
    assert bend(cross_source, flat) < 1e-12  # without a context both are the chain P
    close(cross_source(one, A, flat).exp(), one.exp() @ A.softmax(1))
    close(cross_iohmm(one, A, flat).exp(), one.exp() @ A.softmax(1))
    ids = text(4, 16)
    nll = [filtered(tiny(boundary=rule), ids).nll.sum(1) for rule in ("iohmm", "source")]
    assert number((nll[0] - nll[1]).abs().max()) > 1e-3


def test_beliefs_and_losses_stay_finite_when_a_plan_rules_out_a_token():
    model, ids = tiny(), text(2, 12)
    with torch.no_grad():
        model.experts.weight *= 100
        model.planner_init_logits.copy_(torch.tensor([60.0, 0.0, -60.0]))
    total, values = model(ids[:, :-1], ids[:, 1:], dict.fromkeys(V2_TERMS, 0.1))
    total.backward()
    assert all(torch.isfinite(v) for v in values.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


MODELS = VERSIONS | {"baseline": {"version": BASELINE}, "v2-transformer": {"backbone": "transformer"},
                     "v1-source": OTHER_RULES["v1-source"], "v2-source": OTHER_RULES["v2-source"]}


@every(MODELS)
def test_gradients_of_the_whole_model_are_those_of_finite_differences(settings):
    size = {"vocab_size": 5, "num_plan_states": 2, "chunk_size": 2, "token_dim": 3, "d_model": 4, "fusion_dim": 3,
            "n_heads": 1}
    model, ids = tiny(**size | settings), text(2, 5, vocab=5)
    terms = {V1: V1_TERMS, V2: V2_TERMS, BASELINE: ()}[model.cfg.version]
    names, values = zip(*model.named_parameters(), strict=True)

    def losses(*values):
        given = (ids[:, :-1], ids[:, 1:], dict.fromkeys(terms, 1.0))
        found = torch.func.functional_call(Losses(model), {f"model.{k}": v for k, v in zip(names, values, strict=True)},
                                           given)
        return tuple(found)

    assert torch.autograd.gradcheck(losses, tuple(v.detach().clone().requires_grad_() for v in values), fast_mode=True,
                                    atol=1e-6)


class Losses(torch.nn.Module):
    """nll and every auxiliary term that is given a weight, with their gradients."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, weights):
        values = self.model.losses(x, y, terms=tuple(weights))
        return [values[name] for name in ("nll", *weights)]


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=[None, 5], ids=["one block", "blocks of five"])
def blocks(request, monkeypatch):
    """Few rows at a time, or all at once."""
    if request.param:
        few_rows(monkeypatch, request.param)


def few_rows(monkeypatch, rows: int) -> None:
    for module in (kernels.log_probs, kernels.plan_contrast, plans):
        monkeypatch.setattr(module, "block_rows", lambda *sizes: rows)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(v.numel() for v in tree_leaves(found) if isinstance(v, torch.Tensor))])
        return found


@every(VERSIONS)
@pytest.mark.parametrize("terms", ["nll alone", "all terms"])
def test_no_tensor_of_the_size_of_all_logits_is_ever_made(settings, terms, monkeypatch):
    model, ids = tiny(vocab_size=101, num_plan_states=4, aux_token_fraction=1.0, rep_window=2, **settings), text(8, 16)
    names = V1_TERMS if model.cfg.version == V1 else V2_TERMS
    weights = dict.fromkeys(names, 0.1) if terms == "all terms" else {}
    whole, sizes = 8 * 16 * 4 * 101, {}
    for rows in (4_096, 4):
        few_rows(monkeypatch, rows)
        with Largest() as largest:
            model(ids[:, :-1], ids[:, 1:], weights)[0].backward()
        sizes[rows] = largest.numel
    assert sizes[4] < whole / 4, sizes
    # The measure sees such tensors where blocks are as long as the text (SharedLogProbs has no K in its own).
    assert sizes[4_096] >= (whole if terms == "all terms" or settings != VERSIONS["v2-bias"] else whole / 4), sizes


# ---------------------------------------------------------------------------------------------------------------
# Writing token by token
# ---------------------------------------------------------------------------------------------------------------
WRITERS = VERSIONS | OTHER_RULES | {
    "v1-transformer": {"version": V1, "backbone": "transformer"}, "v2-transformer": {"backbone": "transformer"},
    "v2-chunks-of-one": {"chunk_size": 1}, "v1-chunks-of-one": {"version": V1, "chunk_size": 1},
    "v2-one-plan": {"num_plan_states": 1}, "v2-source-boundary": {"boundary": "source"},
    "older-v2-no-token-filtering": OTHER_RULES["older-v2"] | {"token_filtering": False},
    "older-v2-tau": OTHER_RULES["older-v2"] | {"planner_temperature": 0.6},
    "v2-two-layers": {"n_layers": 2}, "baseline": {"version": BASELINE},
}
MODES = {"normal": {}, "uniform_mask": {"planner_mode": "uniform_mask"},
         "forced_state": {"planner_mode": "forced_state", "forced_state": 1}}


@torch.no_grad()
def step_by_step(model, ids: torch.Tensor, prompt: int, **mode):
    """(nll, beliefs before) of the tokens ids[:, prompt:], read one at a time."""
    state, nll, beliefs = prefill(model, ids[:, :prompt]), [], []
    for t in range(prompt, ids.shape[1]):
        log_p, logs = predict(model, state, **mode)
        close(log_p.exp().sum(1), torch.ones(len(ids), dtype=log_p.dtype))
        close(logs.exp().sum(2), torch.ones(logs.shape[:2], dtype=log_p.dtype))
        nll.append(-log_p.gather(1, ids[:, t : t + 1])[:, 0])
        beliefs.append(state.get("belief"))
        state = advance(model, state, ids[:, t], logs, **mode)
    return torch.stack(nll, 1), beliefs


@every(WRITERS)
@every(MODES, "mode")
def test_text_is_written_with_the_beliefs_and_probabilities_it_is_trained_with(settings, mode):
    model, ids = tiny(**{"chunk_size": 3} | settings), text(2, 11)
    if model.cfg.version == BASELINE:
        expected = -dense_logits(model, model.read(ids[:, :-1])[0])[:, :, 0].log_softmax(2).gather(2, ids[:, 1:, None])
        expected, before = expected[..., 0], None
    else:
        if model.cfg.plans() == 1 and mode.get("forced_state"):
            mode = mode | {"forced_state": 0}
        found = filtered(model, ids, **mode)
        expected, before = found.nll, found.before
    for prompt in range(1, 9):
        nll, beliefs = step_by_step(model, ids, prompt, **mode)
        close(nll, expected[:, prompt - 1 :], msg=f"prompt of {prompt}")
        if before is not None and not mode:
            close(torch.stack(beliefs, 1), before[:, prompt - 1 :], msg=f"prompt of {prompt}")


@every({k: v for k, v in WRITERS.items() if k != "baseline"})
def test_a_frozen_planner_keeps_the_belief_of_the_prompt(settings):
    model, ids = tiny(**settings), text(2, 6)
    state = prefill(model, ids[:, :2])
    first = state["belief"]
    for t in range(2, 7):
        _, logs = predict(model, state)
        state = advance(model, state, ids[:, t], logs, frozen=True)
        close(state["belief"], first)


@every({k: v for k, v in WRITERS.items() if k != "baseline"})
def test_written_beliefs_and_forecasts_are_those_of_the_written_text(settings):
    model = tiny(**settings)
    written = generate(model, text(3, 2)[:, :2], 9, torch.Generator().manual_seed(0), forecast_steps=2)
    assert written.tokens.shape == (3, 11)
    expected = filtered(model, written.tokens).before[:, 1:]
    close(written.beliefs, expected)
    P = model.planner_transition_logits.softmax(1)
    close(written.forecasts[:, :, 0], expected.exp() @ P)
    close(written.forecasts[:, :, 1], expected.exp() @ P @ P)


@every({k: WRITERS[k] for k in ("v2", "v2-source", "v1")})
def test_temperature_and_lookahead_of_the_gate_can_be_asked_for_while_writing(settings):
    model, ids = tiny(**settings), text(2, 4)
    state = prefill(model, ids)
    for feedback, horizon in ((0.3, 3), (0.6, 3), (0.6, 1)):  # of one state, which keeps what it looks ahead by
        log_p, logs = predict(model, state, tau=0.5, feedback=feedback, horizon=horizon)
        for i in range(2):
            P = model.planner_transition_logits.softmax(1)
            gate = slow_gate(state["belief"][i].exp(), P, feedback, horizon, 0.5)
            close(log_p[i].exp(), gate @ logs[i].exp())


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "normal"])
def test_chunks_of_a_fixed_belief_begin_with_what_the_one_before_ended_with(mode, carries):
    """But not the first, which begins with the prior, nor where boundaries know of earlier boundaries alone."""
    model, ids = tiny(carry_posterior=carries), text(2, 13)
    fixed, normal = (filtered(model, ids, **MODES[name]) for name in (mode, "normal"))
    close(fixed.end, fixed.state)
    assert fixed.state.shape[1] > 2
    expected = torch.cat([normal.start[:, :1], fixed.end[:, :-1]], 1) if carries else normal.start
    close(fixed.start, expected)


@pytest.mark.parametrize("mode", [{"planner_mode": "forced_state"}, {"planner_mode": "forced_state", "forced_state": K},
                                  {"planner_mode": "forced_state", "forced_state": -1}, {"planner_mode": "unheard"}])
def test_a_planner_mode_that_makes_no_sense_is_refused(mode):
    model, ids = tiny(), text()
    with pytest.raises(ValueError, match="expected"):
        filtered(model, ids, **mode)
    with pytest.raises(ValueError, match="expected"):
        predict(model, prefill(model, ids), **mode)


# ---------------------------------------------------------------------------------------------------------------
# Symmetries
# ---------------------------------------------------------------------------------------------------------------
BY_PLAN = ("planner_init_logits", "planner_ctx_proj", "planner_boundary_proj", "planner_obs_proj", "plan_state_emb",
           "chunk_post_proj", "experts.weight", "experts.bias", "experts.plan_bias", "experts.plan_weight",
           "experts.plan_emb", "experts.plan_vocab_bias")  # what has a row for every plan


@every(VERSIONS | {"v2-source": OTHER_RULES["v2-source"], "v1-source": OTHER_RULES["v1-source"]})
def test_the_names_of_plans_do_not_matter(settings):
    model, other, ids = tiny(**settings), tiny(**settings), text()
    order = torch.tensor([2, 0, 1])
    weights = {k: v[order] if k.startswith(BY_PLAN) else v for k, v in model.state_dict().items()}
    weights["planner_transition_logits"] = weights["planner_transition_logits"][order][:, order]
    other.load_state_dict(weights)
    one, two = filtered(model, ids), filtered(other, ids)
    close(two.nll, one.nll)
    close(two.before, one.before[:, :, order])
    assert number((one.before - one.before[:, :, order]).abs().max()) > 0.1
    ours, theirs = model.losses(ids[:, :-1], ids[:, 1:]), other.losses(ids[:, :-1], ids[:, 1:])
    for name, value in ours.items():
        close(theirs[name], value, msg=name)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_plan_is_the_baseline(backbone):
    model, ids = tiny(num_plan_states=1, backbone=backbone), text()
    baseline = tiny(version=BASELINE, backbone=backbone)
    baseline.load_state_dict({k: v for k, v in model.state_dict().items() if k in baseline.state_dict()})
    x, y = ids[:, :-1], ids[:, 1:]
    values = model.losses(x, y)
    close(values["nll"], baseline.losses(x, y)["nll"])
    close(baseline.losses(x, y)["nll"], F.cross_entropy(dense_logits(model, model.read(x)[0])[:, :, 0].flatten(0, 1),
                                                        y.flatten()))
    assert all(torch.isfinite(v) for v in values.values()) and set(V2_TERMS) < set(values)
    assert abs(number(values["plan_js_div"])) < 1e-12 and abs(number(values["usage_balance"])) < 1e-12
    total, _ = model(x, y, dict.fromkeys(V2_TERMS, 0.1))
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_version_one_works_with_one_plan():
    model, ids = tiny(version=V1, num_plan_states=1), text()
    values = model.losses(ids[:, :-1], ids[:, 1:])
    p = dense_logits(model, model.read(ids[:, :-1])[0]).log_softmax(3)
    close(values["nll"], -p[:, :, 0].gather(2, ids[:, 1:, None]).mean())
    assert all(torch.isfinite(v) for v in values.values()) and abs(number(values["plan_mi"])) < 1e-12


@every(VERSIONS | {"v2-source": OTHER_RULES["v2-source"], "older-v2": OTHER_RULES["older-v2"]})
def test_masked_and_forced_planners_mix_and_pick_experts(settings):
    model, ids = tiny(**settings), text()
    p = dense_logits(model, model.read(ids[:, :-1])[0]).softmax(3)
    p = p.gather(3, ids[:, 1:, None, None].expand(-1, -1, K, -1))[..., 0]  # p_{t,k}(y_t)
    close(filtered(model, ids, planner_mode="uniform_mask").nll, -p.mean(2).log())
    for k in range(K):
        found = filtered(model, ids, planner_mode="forced_state", forced_state=k)
        close(found.nll, -p[:, :, k].log())
        assert (found.state.exp() == F.one_hot(torch.tensor(k), K)).all()
        values = model.losses(ids[:, :-1], ids[:, 1:], "forced_state", k)
        close(values["nll"], -p[:, :, k].log().mean())
        assert not any(torch.isnan(v) for v in values.values())


@every(VERSIONS | {"v2-source": OTHER_RULES["v2-source"], "older-v2": OTHER_RULES["older-v2"],
                   "v2-chunks-of-one": {"chunk_size": 1}})
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_token_is_predicted_from_what_comes_after_it(settings, backbone):
    model, ids = tiny(**settings | {"backbone": backbone}), text(2, 10)
    nll = filtered(model, ids).nll
    for t in range(10):  # nll up to y_t = ids[t + 1]
        other = ids.clone()
        other[:, t + 2 :] = (other[:, t + 2 :] + 3) % V
        close(filtered(model, other).nll[:, : t + 1], nll[:, : t + 1])
    embedded = model.token_emb(ids[:, :-1]).detach().requires_grad_()
    h, _ = model.backbone(embedded)
    found = model.filter(model.look_up(h, ids[:, 1:, None])[..., 0], model.contexts(h)).nll
    for t in range(10):
        slope, = torch.autograd.grad(found[:, t].sum(), embedded, retain_graph=True)
        size = slope.abs().sum(2)
        assert (size[:, t + 1 :] == 0).all() and (size[:, : t + 1] > 0).all(), f"token {t}"


# ---------------------------------------------------------------------------------------------------------------
# Auxiliary losses
# ---------------------------------------------------------------------------------------------------------------
LENGTHS = pytest.mark.parametrize("L, C", [(13, 4), (12, 4), (11, 4), (4, 1), (5, 4)])


@LENGTHS
@pytest.mark.parametrize("compat", ["", "source"])
def test_losses_of_version_one_are_those_of_slow_loops(L, C, compat):
    model, ids = tiny(version=V1, chunk_size=C, compat=compat), text(2, L)
    x, y = ids[:, :-1], ids[:, 1:]
    s, values = slowly(model, x, y, compat or "iohmm"), model.losses(x, y)
    close(values["nll"], s.nll.mean())
    for name, expected in slow_v1_terms(model, y, s).items():
        close(values[name], expected, msg=name)


@LENGTHS
@pytest.mark.parametrize("settings", [{}, {"experts": "bias"}, LOWRANK,
                                      {"compat": "source", "planner_temperature": 0.7},
                                      {"rep_include_current": False, "rep_window": 5}, {"rep_window": 1}],
                         ids=["v2", "bias", "lowrank", "source", "window of 5 before x_t", "window of x_t"])
def test_losses_of_version_two_are_those_of_slow_loops(L, C, settings):
    model, ids = tiny(chunk_size=C, **settings), text(2, L)
    x, y, cfg = ids[:, :-1], ids[:, 1:], model.cfg
    s = slowly(model, x, y, cfg.boundary_rule(), cfg.feedback(), cfg.lookahead_horizon, cfg.planner_temperature)
    values = model.losses(x, y)
    close(values["nll"], s.nll.mean())
    for name, expected in slow_v2_terms(model, x, y, s, cfg.rep_window, cfg.include_current()).items():
        close(values[name], expected, msg=name)
    start = s.start[:, : math.ceil(L / C)] if cfg.compat == "source" else s.start
    chosen = start.argmax(2)
    if start.shape[1] > 1:
        close(values["state_persistence"], (chosen[:, 1:] == chosen[:, :-1]).double().mean())
    else:
        assert "state_persistence" not in values
    close(values["expert_utilization"], H_of(start.mean((0, 1))) / math.log(K))


@pytest.mark.parametrize("L, chunks", [(11, 3), (12, 3), (13, 4), (15, 4), (16, 4)])
def test_the_chunks_that_are_counted_are_those_of_the_source_where_it_is_to_be_like_that(L, chunks):
    """Chunks of 4: with y_11 of 12 tokens a fourth one begins, which ours counts and the source does not."""
    ids = text(2, L)
    for compat, count in (("source", chunks), ("", (L + 1 + 3) // 4)):
        model = tiny(chunk_size=4, compat=compat)
        h, _ = model.read(ids[:, :-1])
        evidence = model.look_up(h, ids[:, 1:, None])[..., 0]
        start = model.filter(evidence, model.contexts(h)).start[:, :count].exp()
        values = model.losses(ids[:, :-1], ids[:, 1:])
        mean = start.mean((0, 1))
        close(values["boundary_entropy"], -(start * start.log()).sum(2).mean())
        close(values["usage_balance"], (mean * (mean * K).log()).sum())
        close(values["expert_utilization"], -(mean * mean.log()).sum() / math.log(K))
        kept = plans.window_numbers(model, h, evidence)[3]
        close(kept.exp(), start)
        assert start.shape[1] == count


@pytest.mark.parametrize("version, known", [(V1, V1_TERMS), (V2, V2_TERMS), (BASELINE, ())])
def test_a_term_that_a_version_does_not_have_is_refused_by_name(version, known):
    model, ids = tiny(version=version), text()
    for terms in (("plan_jsd",), (*known, "plan_jsd")):
        with pytest.raises(InputError, match="no term 'plan_jsd'.* has " + (", ".join(known) or "none")):
            model.losses(ids[:, :-1], ids[:, 1:], terms=terms)
    with pytest.raises(InputError, match="'plan_jsd'"):
        model(ids[:, :-1], ids[:, 1:], {"plan_jsd": 0.1})
    assert set(known) <= set(model.losses(ids[:, :-1], ids[:, 1:], terms=known))


def test_what_one_plan_or_one_chunk_does_not_have_is_left_out():
    ids = text(2, 8)
    alone = tiny(num_plan_states=1).losses(ids[:, :-1], ids[:, 1:])
    assert not {"state_persistence", "expert_utilization"} & alone.keys()
    short = tiny(chunk_size=9).losses(ids[:, :-1], ids[:, 1:])
    assert "expert_utilization" in short and "state_persistence" not in short
    assert {"state_persistence", "expert_utilization"} < tiny().losses(ids[:, :-1], ids[:, 1:]).keys()


def test_the_repetition_window_is_that_of_the_settings():
    ids = text()
    x, y = ids[:, :-1], ids[:, 1:]
    by_setting = tiny(rep_window=5).losses(x, y)["rep_unlikelihood"]
    by_weight = tiny(rep_window=0, loss_weights={"rep_window": 5}).losses(x, y)["rep_unlikelihood"]
    model = tiny(rep_window=2)
    close(by_setting, by_weight)
    assert abs(number(model.losses(x, y)["rep_unlikelihood"]) - number(by_setting)) > 1e-6
    assert abs(number(tiny(rep_window=0).losses(x, y)["rep_unlikelihood"])) < 1e-12


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of auxiliary terms, in the order they were called."""
    made = []
    for owner, names in ((train_apelr.PlannerRequired, ("future_contrastive",)),
                         (train_apelr, ("chunk_bow", "chunk_targets", "recent_tokens", "repetition", "kl_to_uniform",
                                        "plan_information", "plan_divergence"))):
        for name in names:
            function = getattr(owner, name)

            def counted(*args, name=name, function=function):
                made.append(name)
                return function(*args)

            monkeypatch.setattr(owner, name, counted)
    return made


USES = {"belief_entropy": set(), "usage_kl": {"kl_to_uniform"}, "chunk_bow": {"chunk_bow", "chunk_targets"},
        "plan_mi": {"plan_information"}, "chunk_post_kl": set(), "boundary_entropy": set(),
        "usage_balance": {"kl_to_uniform"}, "future_contrastive": {"future_contrastive"},
        "plan_js_div": {"plan_divergence"}, "rep_unlikelihood": {"recent_tokens", "repetition"}}


@pytest.mark.parametrize("term", [None, *V1_TERMS, *V2_TERMS])
def test_a_term_of_weight_zero_is_not_computed_and_the_others_add_up(term, calls):
    for version, terms in ((V1, V1_TERMS), (V2, V2_TERMS)):
        if term in (None, *terms):
            ids, settings = text(), {"loss_weights": {}}
            if version == V2 and term:
                settings["loss_weights"] = dict.fromkeys(V2_TERMS, 0.0) | {term: 0.3}
            elif term:
                name = {"belief_entropy": "entropy_reg", "usage_kl": "usage_balance"}.get(term, term)
                settings[f"{name}_weight"] = 0.3
            model = tiny(version=version, **settings)
            total, values = model(ids[:, :-1], ids[:, 1:])
            assert set(calls) == (USES[term] if term else set())
            assert set(values) & {*V1_TERMS, *V2_TERMS} == ({term} if term else set())
            sign = -0.3 if term in ("plan_mi", "plan_js_div") else 0.3
            close(total, values["nll"] + (sign * values[term] if term else 0))


def test_weights_follow_the_settings_of_either_version_and_the_warm_up():
    first = config(version=V1, entropy_reg_weight=0.1, chunk_bow_weight=0.8, chunk_bow_warmup_steps=4)
    assert [first.weights(step)["chunk_bow"] for step in (0, 1, 3, 9)] == pytest.approx([0.2, 0.4, 0.8, 0.8])
    assert set(first.weights(0)) == {"belief_entropy", "chunk_bow"}
    second = config(usage_balance_weight=0.5, entropy_reg_weight=0.2, rep_window=4,
                    loss_weights={"usage_balance": 0.1, "plan_js_div": 0.0, "rep_unlikelihood": 0.3, "rep_window": 4})
    assert second.weights() == {"boundary_entropy": 0.2, "usage_balance": 0.1, "rep_unlikelihood": 0.3}
    assert config(version=BASELINE).weights() == {}


@pytest.mark.parametrize("settings, term, kernel", [({"version": V1}, "plan_mi", "plan_information"),
                                                    ({}, "plan_js_div", "plan_divergence")])
def test_looking_at_a_share_of_the_tokens_is_unbiased(settings, term, kernel, monkeypatch):
    model, ids = tiny(aux_token_fraction=1 / 3, **settings), text(2, 6)
    x, y = ids[:, :-1], ids[:, 1:]
    sizes, streamed = [], getattr(train_apelr, kernel)

    def recorded(*args):
        sizes.append(len(args[0]))
        return streamed(*args)

    monkeypatch.setattr(train_apelr, kernel, recorded)
    whole = model.losses(x, y, terms=(term,))[term]
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([model.losses(x, y, terms=(term,))[term].detach() for _ in range(300)])
    assert sizes == [12] + [4] * 300
    assert draws.std() > 0 and abs(number(draws.mean() - whole)) < 4 * number(draws.std()) / math.sqrt(300)
    each = []  # every token is drawn equally often over the turns of a circle: the mean is the whole to rounding
    for turn in range(12):
        monkeypatch.setattr(torch, "randperm", lambda n, device=None, turn=turn: (torch.arange(n) + turn) % n)
        each.append(model.losses(x, y, terms=(term,))[term].detach())
    close(torch.stack(each).mean(), whole)


# ---------------------------------------------------------------------------------------------------------------
# Commitment
# ---------------------------------------------------------------------------------------------------------------
def test_a_committed_plan_is_one_plan_and_its_gradient_reaches_the_planner():
    model, ids = tiny().train(), text(4, 13)
    torch.manual_seed(0)
    found = filtered(model, ids, hard_fraction=1.0, tau=0.8)
    states = found.state.exp()
    assert states.max(2).values.sub(1).abs().max() < 1e-6 and states.sum(2).sub(1).abs().max() < 1e-6
    assert len(set(states.argmax(2).flatten().tolist())) > 1
    found.nll.mean().backward()
    for name in ("planner_init_logits", "planner_transition_logits", "planner_boundary_proj.weight"):
        gradient = model.get_parameter(name).grad
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 1e-6, name
    close(filtered(model, ids, hard_fraction=0.0).state, filtered(model, ids).start)


def test_a_hard_fraction_mixes_the_sample_with_the_belief():
    model, ids, states = tiny(), text(), []
    for fraction in (1.0, 0.25):
        torch.manual_seed(3)
        found = filtered(model, ids, hard_fraction=fraction)
        states.append(found.state[:, 0].exp())
    start = found.start[:, 0].exp()
    close(states[1], 0.25 * states[0] + 0.75 * start, rtol=0, atol=1e-6)


def test_committed_plans_are_drawn_as_often_as_they_are_believed():
    model = tiny()
    torch.manual_seed(1)
    for tau in (0.3, 2.0):
        states = model.filter(torch.zeros(20_000, 2, K, dtype=torch.float64), torch.zeros(20_000, 0, K), tau=tau,
                              hard_fraction=1.0).state[:, 0].exp()
        expected = model.planner_init_logits.softmax(0)
        assert (states.mean(0) - expected).abs().max() < 4 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_committed_plan_is_that_of_the_soft_sample(dtype):
    """The straight-through estimator: the value of the sample, the slope of softmax((log b + noise) / tau)."""
    model, rows, tau = tiny().to(dtype), 400, 0.8
    evidence = noise(rows, 1, K).to(dtype)
    torch.manual_seed(5)
    found = model.filter(evidence, torch.zeros(rows, 0, K, dtype=dtype), tau=tau, hard_fraction=1.0)
    parameter = model.planner_init_logits
    ours, = torch.autograd.grad(-torch.logsumexp(found.state[:, 0] + evidence[:, 0], 1).sum(), parameter)
    torch.manual_seed(5)
    belief = parameter.log_softmax(0).expand(rows, K)
    gumbels = -torch.empty(rows, K).exponential_().log()
    soft = ((belief.float() + gumbels) / tau).softmax(1)
    hard = F.one_hot(soft.argmax(1), K)
    assert (found.state[:, 0].argmax(1) == soft.argmax(1)).all()
    sample = hard + (soft - soft.detach())
    theirs, = torch.autograd.grad(-(sample.to(dtype) * evidence[:, 0].exp()).sum(1).log().sum(), parameter)
    close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_temperature_and_commitment_follow_their_schedules():
    soft = config(planner_temperature=0.9, max_steps=11)
    assert [commitment(step, soft) for step in (0, 5, 10)] == [(0.9, 0.0)] * 3
    cooled = config(planner_temperature=0.9, plan_temperature_start=2.0, plan_temperature_end=1.0, max_steps=11)
    assert [commitment(step, cooled)[0] for step in (0, 5, 10, 20)] == pytest.approx([2.0, 1.5, 1.0, 1.0])
    assert commitment(3, config(planner_temperature=0.9, plan_temperature_start=2.0)) == (2.0, 0.0)
    assert commitment(599, config(planner_temperature=0.9, plan_temperature_end=0.5))[0] == pytest.approx(0.5)
    ramp = config(plan_commitment="gumbel_st", commitment_warmup_steps=10, commitment_ramp_steps=4)
    assert [commitment(step, ramp)[1] for step in (0, 9, 10, 11, 13, 14, 99)] == [0, 0, 0, 0.25, 0.75, 1, 1]
    sudden = config(plan_commitment="gumbel_st", commitment_warmup_steps=10)
    assert [commitment(step, sudden)[1] for step in (9, 10, 11)] == [0, 1, 1]
    assert commitment(0, config(plan_commitment="gumbel_st"))[1] == 1


# ---------------------------------------------------------------------------------------------------------------
# Precision and dropout
# ---------------------------------------------------------------------------------------------------------------
@every(VERSIONS | {"v2-source": OTHER_RULES["v2-source"]})
@pytest.mark.parametrize("backbone", BACKBONES)
def test_under_autocast_beliefs_stay_float32_and_the_loss_hardly_changes(settings, backbone):
    model, ids = tiny(**settings | {"backbone": backbone}).float(), text(4, 16)
    terms = V1_TERMS if model.cfg.version == V1 else V2_TERMS
    exact = model.losses(ids[:, :-1], ids[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, _ = model.read(ids[:, :-1])
        evidence = model.look_up(h, ids[:, 1:, None])
        found = model.filter(evidence[..., 0], model.contexts(h))
        total, values = model(ids[:, :-1], ids[:, 1:], dict.fromkeys(terms, 0.1))
    assert evidence.dtype == torch.float32 and all(part.dtype == torch.float32 for part in found)
    assert total.dtype == torch.float32
    for name in ("nll", *terms):
        assert values[name].dtype == torch.float32
        assert number(values[name]) == pytest.approx(number(exact[name]), abs=1e-2 if name == "nll" else 5e-2), name
    total.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


@every(VERSIONS | OTHER_RULES)
def test_autocast_does_not_reach_the_filter(settings):
    model, ids = tiny(**settings).float(), text(4, 16)
    with torch.no_grad():
        h, _ = model.read(ids[:, :-1])
        evidence = model.look_up(h, ids[:, 1:, None])[..., 0]
        plain = model.filter(evidence, model.contexts(h))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.filter(evidence, model.contexts(h))
    for name in plain._fields:
        close(getattr(found, name), getattr(plain, name), rtol=0, atol=1e-6, msg=name)


def test_autocast_does_not_reach_forecasts():
    belief, A = noise(4, K).float().log_softmax(1), noise(K, K, seed=3).float()
    expected = look_ahead(belief, A, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(look_ahead(belief, A, 3), expected, rtol=0, atol=1e-6)


@every(VERSIONS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_dropout_does_not_tell_plans_apart(settings, backbone):
    settings = settings | {"dropout": 0.5, "aux_token_fraction": 1.0, "backbone": backbone, "n_layers": 2}
    model, ids = tiny(**settings).train(), text()
    with torch.no_grad():
        for name, parameter in model.experts.named_parameters():
            if f"experts.{name}".startswith(BY_PLAN):
                parameter.copy_(parameter[:1].expand_as(parameter))
    torch.manual_seed(0)
    h, _ = model.read(ids[:, :-1])
    found = model.look_up(h, ids[:, 1:, None])[..., 0]
    close(found, found[:, :, :1].expand_as(found))
    term = "plan_mi" if model.cfg.version == V1 else "plan_js_div"
    first, second = (model.losses(ids[:, :-1], ids[:, 1:]) for _ in range(2))
    assert abs(number(first[term])) < 1e-12
    assert abs(number(first["nll"]) - number(second["nll"])) > 1e-6  # there is dropout
    model.eval()
    close(*(model.losses(ids[:, :-1], ids[:, 1:])["nll"].detach() for _ in range(2)))


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints of the source
# ---------------------------------------------------------------------------------------------------------------
def source_names(model) -> dict[str, torch.Tensor]:
    """The model's weights as the source names them."""
    found = {}
    for name, value in model.state_dict().items():
        plain = name.removeprefix("experts.")
        if name in ("experts.weight", "experts.bias"):
            found |= {f"expert_heads.{k}.{plain}": v.clone() for k, v in enumerate(value)}
        else:
            found[plain] = value.clone()
    return found


SETTINGS = {"num_plan_states": "num_plan_states", "chunk_size": "chunk_size", "token_dim": "token_dim",
            "hidden_dim": "d_model", "fusion_dim": "fusion_dim", "num_layers": "n_layers",
            "planner_context_scale": "planner_context_scale", "future_horizon_chunks": "future_horizon_chunks",
            "lookahead_horizon": "lookahead_horizon", "planner_temperature": "planner_temperature",
            "rep_window": "rep_window", "vocab_size": "vocab_size"}  # theirs: ours


def as_source(model, version: str | None = None) -> dict:
    settings = {theirs: getattr(model.cfg, ours) for theirs, ours in SETTINGS.items()} | {"dropout": 0.0}
    return {"model_state_dict": source_names(model), "model_config": settings, "global_step": 7,
            "model_version": version or model.cfg.version}


SOURCES = {"v1": {"version": V1, "compat": "source", "n_layers": 2}, "v2": {"compat": "source"}}


@every(SOURCES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_saved_under_the_names_of_the_source_come_back_to_the_bit(settings, prefix, capsys):
    model, ids = tiny(**settings), text()
    saved = as_source(model)
    saved["model_state_dict"] = {prefix + k: v for k, v in saved["model_state_dict"].items()}
    torch.save(saved, "source.pt")
    expected = model.losses(ids[:, :-1], ids[:, 1:])
    for source in (saved, "source.pt", Path("source.pt")):
        loaded = load_source_checkpoint(source).eval()
        assert capsys.readouterr().out == ""
        found = loaded.losses(ids[:, :-1], ids[:, 1:])
        assert set(found) == set(expected)
        for k, value in expected.items():
            close(found[k], value, msg=k)
    bare = load_source_checkpoint(saved["model_state_dict"], model.cfg).eval()
    assert capsys.readouterr().out == ""
    close(filtered(bare, ids).nll, filtered(model, ids).nll)


@every(SOURCES)
def test_a_checkpoint_of_the_source_becomes_settings_and_weights_of_ours(settings):
    model = tiny(**settings)
    ours, weights, step = convert(as_source(model))
    other = build_model(Config(**ours)).double()
    other.load_state_dict(weights)  # strictly
    assert step == 7 and ours["version"] == model.cfg.version and ours["compat"] == "source"
    close(filtered(other.eval(), text()).nll, filtered(model, text()).nll)


def test_telling_a_checkpoint_of_the_source_reads_no_tensor(monkeypatch):
    torch.save(as_source(tiny(**SOURCES["v1"])), "source.pt")
    torch.save({"model": {}, "step": 3}, "ours.pt")
    Path("text.pt").write_text("no checkpoint at all", encoding="utf-8")
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was read"))
    assert is_source_checkpoint("source.pt")
    assert not any(map(is_source_checkpoint, ("ours.pt", "text.pt", "absent.pt", ".", "")))


def test_a_checkpoint_without_a_version_is_version_one():
    saved = as_source(tiny(**SOURCES["v1"]))
    del saved["model_version"]
    assert load_source_checkpoint(saved).cfg.version == V1


def test_settings_of_version_two_do_not_change_version_one_of_the_source():
    model, ids = tiny(**SOURCES["v1"]), text()
    saved = as_source(model)
    saved["model_config"] |= {"lookahead_feedback_scale": 0.25, "lookahead_horizon": 2, "planner_temperature": 0.7}
    close(filtered(load_source_checkpoint(saved).eval(), ids).nll, filtered(model, ids).nll)


@pytest.mark.parametrize("kind, name", [
    ("v1", "planner_ctx_proj.bias"), ("v1", "chunk_post_proj.weight"), ("v1", "plan_emb.weight"),
    ("v1", "planner_init_logits"), ("v1", "backbone.weight_hh_l0"), ("v1", "planner_transition_logits"),
    ("v2", "future_chunk_proj.weight"), ("v2", "planner_init_logits"), ("v2", "expert_heads.1.bias"),
    ("v2", "expert_heads.2.weight"), ("v2", "plan_state_emb.weight")])
def test_a_missing_weight_is_reported_and_the_others_are_loaded(kind, name, capsys):
    model = tiny(**SOURCES[kind])
    saved = as_source(model)
    del saved["model_state_dict"][name]
    loaded = load_source_checkpoint(saved)
    said = capsys.readouterr().out
    assert "missing" in said and (name in said or f"experts.{name.split('.')[-1]}" in said) and "unknown" not in said
    left = {k: v for k, v in source_names(loaded).items() if k != name}
    for key, value in left.items():
        assert torch.equal(value, source_names(model)[key]), key


@pytest.mark.parametrize("name", ["shared_head.weight", "expert_heads.3.weight"])
def test_an_unknown_weight_is_reported_and_left_out(name, capsys):
    model, ids = tiny(**SOURCES["v2"]), text()
    saved = as_source(model)
    saved["model_state_dict"][name] = torch.zeros(V, H, dtype=torch.float64)
    loaded = load_source_checkpoint(saved).eval()
    said = capsys.readouterr().out
    assert "unknown" in said and name in said and "missing" not in said
    close(filtered(loaded, ids).nll, filtered(model, ids).nll)


@pytest.mark.parametrize("content", [
    {"weights": torch.zeros(3)}, {"model_state_dict": {"other": torch.zeros(2)}}, {"model_state_dict": 3}, {}, [1, 2],
    torch.zeros(3), {1: 2}, {"token_emb.weight": "text"}, {"token_emb.weight": torch.zeros(3)}],
    ids=["foreign", "foreign weights", "no weights", "empty", "list", "tensor", "numbered", "text", "vector"])
def test_a_file_that_is_no_checkpoint_is_refused(content):
    torch.save(content, "other.pt")
    with pytest.raises(CheckpointError):
        load_source_checkpoint("other.pt")


def test_a_damaged_or_absent_file_and_one_that_does_not_fit_are_refused():
    torch.save(as_source(tiny(**SOURCES["v1"])), "whole.pt")
    torn = Path("whole.pt").read_bytes()
    Path("torn.pt").write_bytes(torn[: len(torn) // 2])
    Path("text.pt").write_text("no checkpoint at all", encoding="utf-8")
    for name in ("torn.pt", "text.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_source_checkpoint(name)
    saved = as_source(tiny(**SOURCES["v2"]))
    saved["model_config"]["hidden_dim"] = H + 2
    with pytest.raises(CheckpointError, match="does not fit"):
        load_source_checkpoint(saved)
    with pytest.raises(CheckpointError, match="v9"):
        load_source_checkpoint(as_source(tiny(**SOURCES["v2"]), version="v9"))


# ---------------------------------------------------------------------------------------------------------------
# Drawing tokens
# ---------------------------------------------------------------------------------------------------------------
def drawn(p: list[float], count: int = 20_000, top_k=None, top_p: float = 1.0) -> torch.Tensor:
    """Shares of the tokens in many draws from probabilities p."""
    log_p = torch.tensor(p, dtype=torch.float64).log().expand(count, -1)
    found = draw(log_p, top_k, top_p, torch.Generator().manual_seed(0))
    assert found.shape == (count,)
    return torch.bincount(found, minlength=len(p)) / count


def deviates(found: torch.Tensor, p: list[float], count: int = 20_000) -> float:
    """Pearson's chi-square, over the tokens that can come."""
    p = torch.tensor(p, dtype=torch.float64)
    assert (found[p == 0] == 0).all()
    return number(((found - p) ** 2 / p)[p > 0].sum()) * count


def test_tokens_are_drawn_by_their_probabilities():
    p = [0.4, 0.3, 0.15, 0.1, 0.04, 0.01]
    assert deviates(drawn(p), p) < 20.5  # p = 0.001 at 5 degrees of freedom
    assert deviates(drawn(p, top_k=6), p) < 20.5 and deviates(drawn(p, top_k=60), p) < 20.5
    assert torch.equal(draw(torch.tensor(p).log()[None] + 3, None, 1.0, torch.Generator().manual_seed(4)),
                       draw(torch.tensor(p).log()[None], None, 1.0, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("top_p, kept", [
    (0.01, 1), (0.3, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.99, 4)])
def test_top_p_keeps_the_token_that_crosses_it(top_p, kept):
    p = [0.125, 0.5, 0.125, 0.25]  # in order of probability: tokens 1, 3, then 0 and 2
    found = drawn(p, top_p=top_p)
    assert int((found > 0).sum()) == kept and found[1] > 0 and (kept < 2 or found[3] > 0)
    left = [v if found[i] > 0 else 0.0 for i, v in enumerate(p)]
    assert deviates(found, [v / sum(left) for v in left]) < 16.3


def test_top_k_keeps_the_likeliest():
    p = [0.1, 0.4, 0.2, 0.3]
    assert deviates(drawn(p, top_k=2), [0, 4 / 7, 0, 3 / 7]) < 10.9
    assert drawn(p, top_k=1)[1] == 1 and drawn(p, top_k=3)[0] == 0
    assert deviates(drawn(p, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]) < 10.9  # a share of what top_k left


def test_a_banned_token_never_comes():
    assert drawn([0.0, 0.5, 0.5, 0.0])[[0, 3]].sum() == 0


WRITING = {"v1": {"version": V1}, "v2": {}, "transformer": {"backbone": "transformer"},
           "baseline": {"version": BASELINE}}


@every(WRITING)
def test_a_text_is_decided_by_its_generator(settings):
    model, prompt = tiny(**settings), text(2, 3)
    written = [generate(model, prompt, 12, torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2)]
    assert torch.equal(written[0], written[1]) and not torch.equal(written[0], written[2])
    assert torch.equal(written[0][:, :4], prompt) and written[0].shape == (2, 16)
    assert generate(model, prompt, 0, torch.Generator()).tokens.shape == (2, 4)


@every(WRITING)
def test_without_chance_the_likeliest_token_is_written_alone_or_in_a_batch(settings):
    model, prompt = tiny(**settings), text(1, 3)
    batch = generate(model, prompt.expand(5, -1), 12, torch.Generator().manual_seed(0), temperature=1e-6).tokens
    alone = generate(model, prompt, 12, torch.Generator().manual_seed(9), top_k=1).tokens
    assert torch.equal(batch, alone.expand(5, -1))
    state = prefill(model, prompt)
    assert int(batch[0, 4]) == int(predict(model, state)[0].argmax())
    mixed = torch.cat([prompt, text(1, 3, seed=5)])
    rows = generate(model, mixed, 12, torch.Generator().manual_seed(0), temperature=1e-6).tokens
    assert torch.equal(rows[:1], alone)


def test_texts_are_drawn_by_the_probabilities_of_the_model():
    model, prompt, count = tiny(), text(1, 5), 8_000
    written = generate(model, prompt.expand(count, -1), 1, torch.Generator().manual_seed(0), temperature=0.7).tokens
    p = (predict(model, prefill(model, prompt))[0][0] / 0.7).softmax(0).tolist()
    assert deviates(torch.bincount(written[:, -1], minlength=V) / count, p, count) < 22.5


def test_a_forced_plan_writes_by_its_own_expert():
    model, prompt = tiny(), text(1, 5)
    for k in range(K):
        written = generate(model, prompt, 6, torch.Generator().manual_seed(0), temperature=1e-6,
                           planner_mode="forced_state", forced_state=k)
        expected = dense_logits(model, model.read(written.tokens[:, :-1])[0])[0, 5:, k].argmax(1)
        assert torch.equal(written.tokens[0, 6:], expected)
        assert (written.beliefs.exp() == F.one_hot(torch.tensor(k), K)).all()


def test_a_repetition_penalty_makes_used_tokens_rare():
    model, prompt = tiny(), text(3, 1)[:, :1]
    tokens = generate(model, prompt, V - 1, torch.Generator().manual_seed(0), repetition_penalty=1e30).tokens
    assert all(len(set(row)) == V for row in tokens.tolist())
    log_p = predict(model, prefill(model, prompt[:1]))[0][0]
    log_p[int(prompt[0, 0])] -= math.log(2.0)
    found = generate(model, prompt[:1].expand(8_000, -1), 1, torch.Generator().manual_seed(1), repetition_penalty=2.0)
    share = torch.bincount(found.tokens[:, 1], minlength=V) / 8_000
    assert deviates(share, log_p.softmax(0).tolist(), 8_000) < 22.5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_n_tokens_come_twice(n):
    model, prompt, count = tiny(), torch.tensor([[1], [3]]), {1: V - 1, 2: 20, 3: 60}[n]
    plain = generate(model, prompt, count, torch.Generator().manual_seed(0), temperature=0.3).tokens
    written = generate(model, prompt, count, torch.Generator().manual_seed(0), temperature=0.3,
                       no_repeat_ngram_size=n).tokens

    def repeats(row):
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        return len(grams) - len(set(grams))

    assert all(repeats(row) == 0 for row in written.tolist())
    assert any(repeats(row) for row in plain.tolist())


def test_a_text_with_no_choice_left_repeats_itself():
    written = generate(tiny(), torch.tensor([[1]]), 2 * V, torch.Generator().manual_seed(0), no_repeat_ngram_size=1)
    assert written.tokens.shape == (1, 2 * V + 1) and len(set(written.tokens[0, :V].tolist())) == V


def test_a_complete_text_is_filled_with_its_end():
    model, prompt = tiny(), text(6, 3)
    plain = generate(model, prompt, 30, torch.Generator().manual_seed(0)).tokens.tolist()
    ended = generate(model, prompt, 30, torch.Generator().manual_seed(0), eos_id=2).tokens.tolist()
    places = []
    for row, other in zip(ended, plain, strict=True):
        place = next((i for i in range(4, len(other)) if other[i] == 2), len(other))
        places.append(place)
        assert row[: place + 1] == other[: place + 1][: len(row)] and set(row[place:]) <= {2}
    assert len(set(places)) > 1
    assert len(ended[0]) == min(34, max(places) + 1)


# ---------------------------------------------------------------------------------------------------------------
# Transformer and measures
# ---------------------------------------------------------------------------------------------------------------
@every({name: {"backbone": name, "n_layers": 2} for name in BACKBONES})
@pytest.mark.parametrize("first", [1, 4, 8])
def test_a_backbone_reads_token_by_token_as_at_once(settings, first):
    model, ids = tiny(**settings), text(2, 8)
    whole, _ = model.read(ids)
    h, state = model.read(ids[:, :first])
    found = [h]
    for token in ids[:, first:].unbind(1):
        h, state = model.backbone.step(model.token_emb(token), state)
        found.append(h[:, None])
    close(torch.cat(found, 1), whole)


def test_a_transformer_tells_places_apart_and_looks_at_distances_alone():
    model = tiny(backbone="transformer")
    h, _ = model.read(torch.tensor([[1, 2, 3], [2, 1, 3]]))
    assert number((h[0, 2] - h[1, 2]).abs().max()) > 1e-3
    layer = model.backbone
    q, k = noise(1, 2, 1, 4), noise(1, 2, 1, 4, seed=3)

    def score(i, j):
        turned = [train_apelr.rotate(x, torch.tensor([[float(n)]]) * layer.frequency) for x, n in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum(-1)

    close(score(5, 3), score(12, 10), atol=1e-5)  # angles are of single precision
    assert number((score(5, 3) - score(5, 4)).abs().max()) > 1e-3


@pytest.mark.parametrize("heads, width", [(1, 2), (3, 18), (5, 70), (6, 84), (3, 294), (4, 392), (8, 784), (12, 768)])
def test_a_transformer_has_a_frequency_for_every_pair_of_a_head(heads, width):
    model = build_model(config(backbone="transformer", n_heads=heads, d_model=width, n_layers=1))
    assert len(model.backbone.frequency) == width // heads // 2
    assert model.read(torch.tensor([[1, 2]]))[0].shape == (1, 2, width)


def test_normalised_mutual_information_by_hand():
    nmi = plans.normalised_mutual_information
    a = np.array([0, 0, 1, 1, 2, 2])
    assert nmi(a, a) == pytest.approx(1) and nmi(a, (a + 1) % 3) == pytest.approx(1)
    for n in (4, 6, 49):  # a constant says nothing of what varies, and nothing can be said of two
        one, other = np.zeros(n, int), np.arange(n) % 2
        assert nmi(one, one) is None and nmi(one, one + 2) is None
        assert nmi(one, other) == nmi(other, one) == nmi(one + 1, other) == 0
    assert nmi(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(0, abs=1e-12)
    known = -0.75 * (2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))  # H(a | b), where b is 0 for three of four
    H_a, H_b = math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert nmi(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])) == pytest.approx((H_a - known) / math.sqrt(H_a * H_b))


def test_kl_to_uniform_and_entropy_by_hand():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    close(train_apelr.kl_to_uniform(p), torch.tensor(math.log(4) - 1.5 * math.log(2), dtype=torch.float64))
    close(train_apelr.kl_to_uniform(torch.full((5,), 0.2, dtype=torch.float64)), torch.tensor(0.0, dtype=torch.float64))
    close(train_apelr.entropy(p.log()), torch.tensor(1.5 * math.log(2), dtype=torch.float64))
    free = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    train_apelr.kl_to_uniform(free).backward()
    assert torch.isfinite(free.grad).all()


@every(VERSIONS)
def test_divergences_and_mean_probabilities_of_experts_are_those_of_dense_formulas(settings, blocks):
    model = tiny(**settings)
    h = noise(37, H)
    with torch.no_grad():
        divergence, mean = plans.compare_experts(model, h)
        p = dense_logits(model, h).softmax(2)
    close(mean, p.mean(0))
    close(divergence.diagonal(), torch.zeros(K, dtype=torch.float64))
    for i, j in itertools.permutations(range(K), 2):
        m = (p[:, i] + p[:, j]) / 2
        close(divergence[i, j], (KL(p[:, i], m) + KL(p[:, j], m)) / 2 / 37)


def test_gates_of_extreme_chains_have_finite_gradients():
    A = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)  # off the diagonal P is 0 in float32
    belief = torch.tensor([[0.9, 0.1]]).log()
    model = build_model(config(num_plan_states=2))
    model.planner_transition_logits = torch.nn.Parameter(A.detach())
    A = model.planner_transition_logits
    gate = model.gate(belief, 1.0, model.ahead(0.25, 2))
    close(gate.exp(), torch.tensor([[0.9, 0.1]]), rtol=0, atol=1e-6)
    gate[0, 0].backward()
    assert torch.isfinite(A.grad).all()
