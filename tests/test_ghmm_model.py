"""Models, metrics, evaluation, analysis and pictures of train_ghmm.py, against naive loops and enumeration."""
import contextlib
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.runtime import Meter, Runtime, learning_rate
from configurator import configure
from measure import belief_pictures as pictures
from measure import beliefs as measured
from measure.belief_pictures import plot_run
from measure.beliefs import (
    Prefixes,
    analyse,
    belief_in_words,
    collect_prefixes,
    deal_folds,
    deal_hands,
    pca,
    predict,
    regress,
)
from measure.figures import figure
from measure.tracker import MetricTracker
from sources.processes import make_process
from train_ghmm import Config, Contexts, build_model, evaluate, make_contexts, next_token_loss, rotate, train_step

V = 3
CPU = torch.device("cpu")
TRANSFORMERS = [{"positional": p, "normalization": n, "act": a}
                for p in ("learned", "rope", "none") for n in ("LN", "RMS", "none") for a in ("relu", "gelu")]
RECURRENT = [{"model": m} for m in ("rnn", "gru", "lstm")]
KEYS = {"step/tokens", "cum/tokens", "step/tokens_per_second", "loss/step", "loss/ma", "loss/ema", "loss/min",
        "loss/progress_to_optimal", "lr/step", "cum/lr_weighted_tokens", "cum/gradient_signal", "cum/fisher_proxy",
        "grads/l2_norm/step", "params/l2_norm", "params/update_l2_norm/step", "params/update_l2_norm/cum",
        "params/distance_from_init", "cum/tokens_per_second", "step/lr_weighted_tokens", "step/gradient_signal",
        "step/fisher_proxy", "model/max_params_distance"}
COSTLY = {"params/l2_norm", "params/distance_from_init", "model/max_params_distance"}


def config(**settings) -> Config:
    return Config(**{"device": "cpu", "n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 12, "n_ctx": 6} | settings)


def model_of(seed: int = 0, vocab_size: int = V, **settings) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(config(**settings), vocab_size)
    with torch.no_grad():  # biases start at 0, which would hide a missing one
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
    return model


def runtime(**settings) -> Runtime:
    return Runtime(config(**settings))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def label(settings: dict) -> str:
    return "-".join(str(x) for x in settings.values())


# Models ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", TRANSFORMERS + RECURRENT, ids=label)
def test_no_position_sees_a_later_token_and_every_position_sees_all_earlier_ones(settings):
    model = model_of(**settings)
    embedded = []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output.requires_grad_()))
    tokens = torch.randint(V, (2, 6), generator=seeded())
    logits, _ = model(tokens)
    for t in range(6):
        weights = torch.randn(2, V, generator=seeded(t))
        gradient, = torch.autograd.grad((logits[:, t] * weights).sum(), embedded[0], retain_graph=True)
        size = gradient.norm(dim=-1)
        assert (size[:, t + 1 :] == 0).all(), "a later token is seen"
        assert (size[:, : t + 1] > 1e-9).all(), "an earlier token is not seen"


@pytest.mark.parametrize("settings", TRANSFORMERS + RECURRENT, ids=label)
def test_outputs_of_a_prefix_are_those_of_the_prefix_alone(settings):
    model = model_of(**settings)
    tokens = torch.randint(V, (3, 6), generator=seeded(1))
    logits, activations = model(tokens)
    for t in (1, 3, 6):
        short, inner = model(tokens[:, :t])
        torch.testing.assert_close(short, logits[:, :t], rtol=1e-4, atol=1e-5)
        for a, b in zip(inner, activations, strict=True):
            torch.testing.assert_close(a, b[:, :t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", TRANSFORMERS + RECURRENT, ids=label)
def test_rows_of_a_batch_do_not_mix(settings):
    model = model_of(**settings)
    tokens = torch.randint(V, (4, 6), generator=seeded(1))
    logits, activations = model(tokens)
    alone, inner = model(tokens[2:3])
    torch.testing.assert_close(alone[0], logits[2], rtol=1e-4, atol=1e-5)
    for a, b in zip(inner, activations, strict=True):
        torch.testing.assert_close(a[0], b[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"n_layers": 3}, {"positional": "rope"}, *RECURRENT], ids=label)
def test_activations_are_the_embedding_and_one_stream_after_every_layer(settings):
    layers = settings.get("n_layers", 2)
    logits, activations = (model := model_of(**settings))(torch.randint(V, (3, 5), generator=seeded()))
    assert logits.shape == (3, 5, V)
    assert [a.shape for a in activations] == [(3, 5, 8)] * (layers + 1)
    last = activations[-1]
    torch.testing.assert_close(model.unembed(model.final_norm(last) if hasattr(model, "final_norm") else last), logits)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(activations))


def test_the_first_activation_is_token_plus_position():
    model = model_of()
    tokens = torch.tensor([[2, 0, 1]])
    _, activations = model(tokens)
    torch.testing.assert_close(activations[0][0], model.embed.weight[[2, 0, 1]] + model.position[:3])


def naive_block(block, x, heads: int, act, rope: bool):
    """One block for one sequence x [T, D] with explicit attention, for every head and position on its own."""
    normed = block.attention_norm(x)
    width = block.attention_out.in_features
    parts = zip(block.qkv.weight.split(width), block.qkv.bias.split(width), strict=True)
    q, k, v = (normed @ w.t() + b for w, b in parts)
    C, rows = width // heads, []
    for t in range(len(x)):
        parts = []
        for h in range(heads):
            head = slice(h * C, (h + 1) * C)
            queries, keys = q[:, head], k[:, head]
            if rope:
                queries, keys = rotate(queries[None, None])[0, 0], rotate(keys[None, None])[0, 0]
            scores = torch.stack([queries[t] @ keys[s] for s in range(t + 1)]) / math.sqrt(C)
            parts.append(scores.softmax(0) @ v[: t + 1, head])
        rows.append(torch.cat(parts))
    x = x + block.attention_out(torch.stack(rows))
    return x + block.mlp_out(act(block.mlp_in(block.mlp_norm(x))))


@pytest.mark.parametrize("settings", [
    {}, {"positional": "rope"}, {"normalization": "RMS", "act": "gelu"}, {"normalization": "none"}, {"d_head": 6},
    {"d_head": 6, "n_heads": 3, "positional": "rope"}], ids=label)
def test_a_transformer_equals_attention_written_as_loops(settings):
    cfg, model = config(**settings), model_of(**settings)
    tokens = torch.randint(V, (1, 6), generator=seeded(2))
    logits, activations = model(tokens)
    act = {"relu": torch.relu, "gelu": nn.functional.gelu}[cfg.act]
    x = activations[0][0]
    for block, activation in zip(model.blocks, activations[1:], strict=True):
        x = naive_block(block, x, cfg.n_heads, act, cfg.positional == "rope")
        torch.testing.assert_close(activation[0], x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[0], model.unembed(model.final_norm(x)), rtol=1e-4, atol=1e-5)


def test_d_head_sets_the_width_of_a_head():
    assert config(d_head=6, n_heads=3).head_width() == 6 and config(n_heads=2).head_width() == 4
    block = model_of(d_head=6, n_heads=3).blocks[0]
    assert block.qkv.weight.shape == (3 * 18, 8) and block.attention_out.weight.shape == (8, 18)


@pytest.mark.parametrize("normalization, kind", [("LN", nn.LayerNorm), ("RMS", nn.RMSNorm), ("none", nn.Identity)])
def test_normalization_is_the_one_asked_for(normalization, kind):
    model = model_of(normalization=normalization)
    assert all(isinstance(n, kind) for b in model.blocks for n in (b.attention_norm, b.mlp_norm))
    assert isinstance(model.final_norm, kind)


@pytest.mark.parametrize("name, kind", [("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_recurrent_model_is_the_one_asked_for(name, kind):
    assert [type(layer) for layer in model_of(model=name).layers] == [kind, kind]


def test_a_transformer_without_positions_counts_tokens_but_does_not_order_earlier_ones():
    """One layer and no positions: the last output is a function of the multiset before it; with positions it is not."""
    one, two = torch.tensor([[0, 1, 2, 2, 1]]), torch.tensor([[2, 0, 2, 1, 1]])
    for positional, equal in (("none", True), ("learned", False), ("rope", False)):
        model = model_of(positional=positional, n_layers=1)
        same = torch.allclose(model(one)[0][0, -1], model(two)[0][0, -1], atol=1e-5)
        assert same == equal, positional


def test_rotated_products_depend_on_relative_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=seeded(3), dtype=torch.float64).expand(2, 1, 1, 12, 8)
    scores = (rotate(q) @ rotate(k).transpose(-1, -2))[0, 0]  # the same query and key at every position
    for gap in range(-11, 12):
        diagonal = scores.diagonal(gap)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    offsets = torch.stack([scores.diagonal(gap)[0] for gap in range(-11, 12)])
    assert (offsets[:, None] - offsets).abs().fill_diagonal_(1).min() > 1e-6  # and differ between gaps


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = torch.randn(2, 3, 7, 6, generator=seeded(4))
    turned = rotate(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[..., 0, :], x[..., 0, :])
    torch.testing.assert_close(torch.complex(turned[..., 1, 0], turned[..., 1, 3]),  # the fastest pair: one radian
                               torch.complex(x[..., 1, 0], x[..., 1, 3]) * complex(math.cos(1), math.sin(1)))


def test_next_token_loss_is_the_mean_negative_log_probability():
    logits, targets = torch.randn(2, 4, V, generator=seeded(5)), torch.randint(V, (2, 4), generator=seeded(6))
    expected = -np.mean([math.log(logits[b, t].softmax(0)[targets[b, t]]) for b in range(2) for t in range(4)])
    assert float(next_token_loss(logits, targets)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"positional": "rope", "act": "gelu", "normalization": "RMS"}, *RECURRENT],
                         ids=label)
def test_a_step_that_logs_nothing_reads_nothing_from_the_device(settings):
    """On the meta device there are no numbers to read, and no tensor of the CPU fits in."""
    rt = runtime(**settings)
    rt.device = torch.device("meta")
    model = model_of(**settings).to("meta")
    optimizer = torch.optim.AdamW(model.parameters(), fused=False, foreach=False)
    tracker, meter = MetricTracker(model, optimizer), Meter(rt, 24, 0.0)
    tokens = torch.randint(V, (4, 7), device="meta")
    loss = train_step(model, tokens, rt, config(grad_accum=2, **settings))
    norm = rt.step(optimizer, list(model.parameters()), 1.0, 1e-3)
    meter.check(1, loss)
    assert tracker.update(step=1, loss=loss, tokens_in_batch=24, grad_norm=norm, log=False) == {}
    assert loss.device.type == norm.device.type == "meta"


# Metrics -----------------------------------------------------------------------------------------------------------

class Loop:
    """Linear regression by SGD, with all metrics kept by hand."""

    def __init__(self, steps: int, optimal: float = 0.1, initial: float | None = 9.0, log=lambda step: True,
                 drops_gradients: bool = False, **options):
        torch.manual_seed(0)
        self.drops_gradients = drops_gradients
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.tracker = MetricTracker(self.model, self.optimizer, optimal_loss=optimal, **options)
        if initial is not None:
            self.tracker.record_initial_loss(initial)
        self.start = self.flat()
        self.optimal, self.initial, self.log = optimal, initial, log
        self.losses, self.norms, self.lrs, self.tokens, self.moves, self.found = [], [], [], [], [], []
        self.distances = []
        for step in range(1, steps + 1):
            self.step(step)

    def flat(self) -> np.ndarray:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).double().numpy()

    def step(self, step: int) -> None:
        x, before = torch.randn(5, 3, generator=seeded(step)), self.flat()
        self.optimizer.param_groups[0]["lr"] = lr = 0.05 / step
        self.optimizer.zero_grad()
        loss = ((self.model(x) - x[:, :2]) ** 2).mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()]).double().numpy().copy()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.norms.append(float(np.linalg.norm(gradient)))
        self.lrs.append(lr)
        self.tokens.append(10 + step)
        self.moves.append(float(np.linalg.norm(self.flat() - before)))
        if self.log(step):
            self.distances.append(float(np.linalg.norm(self.flat() - self.start)))
        if self.drops_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        self.found.append(self.tracker.update(step=step, loss=loss, tokens_in_batch=10 + step, log=self.log(step)))

    def expected(self) -> dict:
        loss, norm, lr, n, move = map(np.array, (self.losses, self.norms, self.lrs, self.tokens, self.moves))
        ema = loss[0]
        for x in loss[1:]:
            ema = 0.9 * ema + 0.1 * x
        initial = loss[0] if self.initial is None else self.initial
        return {"step/tokens": n[-1], "cum/tokens": n.sum(), "loss/step": loss[-1], "loss/ma": loss[-100:].mean(),
                "loss/ema": ema, "loss/min": loss.min(), "lr/step": lr[-1], "grads/l2_norm/step": norm[-1],
                "loss/progress_to_optimal": (loss[-1] - self.optimal) / (initial - self.optimal),
                "cum/lr_weighted_tokens": (lr * n).sum(), "cum/gradient_signal": (lr * norm * n).sum(),
                "cum/fisher_proxy": (norm**2 * n).sum(),
                "step/fisher_proxy": norm[-1] ** 2 * n[-1], "step/lr_weighted_tokens": lr[-1] * n[-1],
                "step/gradient_signal": lr[-1] * norm[-1] * n[-1], "model/max_params_distance": max(self.distances),
                "params/update_l2_norm/step": move[-1],
                "params/update_l2_norm/cum": move.sum(), "params/l2_norm": np.linalg.norm(self.flat()),
                "params/distance_from_init": np.linalg.norm(self.flat() - self.start)}


def assert_metrics(found: dict, expected: dict) -> None:
    assert found.keys() >= expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("steps, drops_gradients", [(1, False), (2, False), (7, True), (130, False)])
def test_metrics_of_a_plain_sgd_loop_equal_those_kept_by_hand(steps, drops_gradients):
    """Also where the loop drops its gradients before it asks for the metrics."""
    loop = Loop(steps, drops_gradients=drops_gradients)
    assert set(loop.found[-1]) == KEYS
    assert all(isinstance(v, (int, float)) for v in loop.found[-1].values())
    assert loop.found[-1]["step/tokens_per_second"] > 0
    assert_metrics(loop.found[-1], loop.expected())


def test_steps_that_log_nothing_return_nothing_and_still_count():
    loop = Loop(6, log=lambda step: step == 6)
    assert loop.found[:5] == [{}] * 5
    assert_metrics(loop.found[-1], loop.expected())


@pytest.mark.parametrize("log", [lambda step: True, lambda step: step == 4], ids=["every step", "the last step"])
def test_without_a_recorded_initial_loss_progress_counts_from_the_first_step(log):
    loop = Loop(4, initial=None, log=log)
    assert_metrics(loop.found[-1], loop.expected())


def test_costly_metrics_may_be_left_out():
    loop = Loop(2)
    found = loop.tracker.update(step=3, loss=1.0, tokens_in_batch=1, costly=False)
    assert set(found) == KEYS - COSTLY


def test_a_schedule_function_and_a_given_gradient_norm_replace_what_is_read_from_the_loop():
    loop = Loop(0, lr_schedule_fn=lambda step: 0.01 * step)
    for step in (1, 2):
        found = loop.tracker.update(step=step, loss=torch.tensor(2.0), tokens_in_batch=10, grad_norm=torch.tensor(3.0))
    assert found["lr/step"] == pytest.approx(0.02)
    assert found["cum/lr_weighted_tokens"] == pytest.approx(0.3) and found["cum/gradient_signal"] == pytest.approx(0.9)
    assert found["cum/fisher_proxy"] == pytest.approx(180) and found["grads/l2_norm/step"] == pytest.approx(3)
    assert found["params/update_l2_norm/step"] == 0 and found["params/distance_from_init"] == 0


def test_progress_falls_to_zero_at_the_optimum_and_is_undefined_where_there_is_nothing_to_gain():
    loop = Loop(0, optimal=0.5, initial=2.5)
    progress = [loop.tracker.update(step=1, loss=x, tokens_in_batch=1, grad_norm=0.0)["loss/progress_to_optimal"]
                for x in (2.5, 1.5, 0.5)]
    assert progress == pytest.approx([1, 0.5, 0])
    flat = Loop(0, optimal=0.5, initial=0.5).tracker
    assert math.isnan(flat.update(step=1, loss=0.5, tokens_in_batch=1, grad_norm=0.0)["loss/progress_to_optimal"])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_norm_that_is_not_finite_is_left_out_of_the_sums(bad):
    """A step that mixed precision skips has one: it may not make every later sum infinite."""
    tracker = Loop(0).tracker
    for norm in (2.0, bad, 1.0):
        found = tracker.update(step=1, loss=1.0, tokens_in_batch=10, grad_norm=torch.tensor(norm))
    assert found["cum/fisher_proxy"] == pytest.approx(50) and found["step/fisher_proxy"] == pytest.approx(10)
    assert found["cum/gradient_signal"] == pytest.approx(0.05 * 10 * 3)


def test_without_a_step_and_without_gradients_their_norm_is_undefined_and_counts_nothing():
    found = Loop(0).tracker.update(step=1, loss=1.0, tokens_in_batch=10)
    assert math.isnan(found["grads/l2_norm/step"]) and found["cum/fisher_proxy"] == 0


def test_the_largest_distance_is_kept_when_parameters_come_back():
    loop = Loop(3)
    far = loop.found[-1]["params/distance_from_init"]
    with torch.no_grad():
        for parameter, start in zip(loop.model.parameters(), loop.tracker.initial, strict=True):
            parameter.copy_(start)
    found = loop.tracker.update(step=4, loss=1.0, tokens_in_batch=1)
    assert found["params/distance_from_init"] == 0 and found["model/max_params_distance"] == pytest.approx(far)


def test_frozen_parameters_do_not_count():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    tracker = MetricTracker(model, torch.optim.SGD([model.weight], lr=0.1))
    found = tracker.update(step=1, loss=1.0, tokens_in_batch=1, grad_norm=1.0)
    assert found["params/l2_norm"] == pytest.approx(float(model.weight.detach().norm()), rel=1e-5)


def test_metrics_go_on_from_a_saved_state_as_if_never_interrupted(tmp_path):
    whole, first = Loop(9), Loop(5)
    torch.save(first.tracker.state_dict(), tmp_path / "state.pt")
    second = Loop(0, initial=None)  # the same initial parameters, as from the same seed
    second.model.load_state_dict(first.model.state_dict())
    second.tracker.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(6, 10):
        second.step(step)
    timed = {"step/tokens_per_second", "cum/tokens_per_second"}
    assert_metrics(second.found[-1], {k: whole.found[-1][k] for k in KEYS - timed})


def test_tokens_a_second_are_since_a_state_was_taken_up():
    first, second = Loop(3), Loop(0)
    state = first.tracker.state_dict() | {"tokens": 10**12}
    second.tracker.load_state_dict(state)
    found = second.tracker.update(step=4, loss=1.0, tokens_in_batch=10, grad_norm=1.0)
    assert found["cum/tokens"] == 10**12 + 10
    assert 0 < found["cum/tokens_per_second"] < 1e10  # of 10 tokens: those of before took time of before


def test_a_loaded_state_is_not_shared_with_the_tracker_it_came_from():
    """As with a module's or an optimizer's state: what one tracker counts afterwards is not the other's."""
    first = Loop(3)
    second = Loop(0)
    second.tracker.load_state_dict(first.tracker.state_dict())
    options = {"step": 4, "loss": 7.0, "tokens_in_batch": 10, "grad_norm": 2.0}
    expected = first.expected()["cum/fisher_proxy"] + 4 * 10
    assert second.tracker.update(**options)["cum/fisher_proxy"] == pytest.approx(expected, rel=1e-5)
    assert first.tracker.update(**options)["cum/fisher_proxy"] == pytest.approx(expected, rel=1e-5)


# Evaluation --------------------------------------------------------------------------------------------------------

class Oracle(nn.Module):
    """Log of the exact next-token probabilities, -inf where a token cannot come."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, tokens):
        beliefs = self.process.beliefs(tokens)[:, 1:]
        return self.process.next_token_probs(beliefs).log(), [beliefs, beliefs]


TINY = {"mess3": {"name": "mess3"}, "no_consecutive_ones": {"name": "no_consecutive_ones", "p": 0.3},
        "rrxor": {"name": "rrxor"}, "fanizza": {"name": "fanizza"}, "bos": {"name": "sns", "add_bos": True}}


def contexts_of(process, length: int, most: int = 10_000, samples: int = 500) -> Contexts:
    return make_contexts(process, length, most, samples, 1)


def direct_weight(process, word) -> float:
    v = process.initial_state.numpy()
    for token in word:
        v = v @ process.transition_matrices.numpy()[token]
    return float(v @ process.normalizing_eigenvector.numpy())


@pytest.mark.parametrize("key", TINY)
def test_loss_by_position_equals_the_expected_cross_entropy_of_all_words(key):
    process, length = make_process(**TINY[key]), 4
    model = model_of(vocab_size=process.vocab_size)
    contexts = contexts_of(process, length)
    found = evaluate(model, contexts, process.optimal_loss(length), runtime())
    for t in range(1, length + 1):
        words = [w for w in itertools.product(range(process.vocab_size), repeat=t) if direct_weight(process, w) > 1e-12]
        log_q = model(torch.tensor(words))[0][:, -1].double().log_softmax(-1).tolist()
        expected, floor = 0.0, 0.0
        for word, row in zip(words, log_q, strict=True):
            before = direct_weight(process, word)
            for token in range(process.vocab_size):
                p = max(0.0, direct_weight(process, (*word, token)))
                expected -= p * row[token]
                floor -= p * math.log(p / before) if p > 1e-15 else 0.0
        assert found["loss_by_position"][t - 1] == pytest.approx(expected, abs=1e-5)
        assert found["optimal_loss_by_position"][t - 1] == pytest.approx(floor, abs=1e-9)
        assert found["kl_by_position"][t - 1] == pytest.approx(expected - floor, abs=1e-5)
    assert found["loss"] == pytest.approx(np.mean(found["loss_by_position"]))
    assert found["optimal_loss"] == pytest.approx(np.mean(found["optimal_loss_by_position"]))
    assert found["excess_loss"] == pytest.approx(np.mean(found["kl_by_position"])) and found["excess_loss"] > 1e-3


@pytest.mark.parametrize("key", TINY)
def test_the_exact_predictor_has_no_excess_loss(key):
    process = make_process(**TINY[key])
    found = evaluate(Oracle(process), contexts_of(process, 5), process.optimal_loss(5), runtime())
    assert found["excess_loss"] == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(found["kl_by_position"], 0, atol=1e-10)


def test_evaluation_in_small_batches_and_over_ranks_adds_up():
    process, model = make_process("mess3"), model_of()
    contexts, floor = contexts_of(process, 3), process.optimal_loss(3)
    whole = evaluate(model, contexts, floor, runtime())
    split = evaluate(model, contexts, floor, runtime(), batch=4)
    np.testing.assert_allclose(split["kl_by_position"], whole["kl_by_position"], rtol=1e-4)


def test_contexts_are_all_words_while_there_are_few_and_distinct_samples_beyond():
    process = make_process("no_consecutive_ones", p=0.3)
    exact = make_contexts(process, 5, 13, 50, 2)  # 13 words of length 5 without 11
    assert exact.exact and len(exact.words) == 13
    expected = [w for w in itertools.product(range(2), repeat=5) if direct_weight(process, w) > 0]
    assert [tuple(w) for w in exact.words.tolist()] == expected
    np.testing.assert_allclose(exact.weights, [direct_weight(process, w) for w in expected], atol=1e-12)
    torch.testing.assert_close(exact.beliefs, process.beliefs(exact.words)[:, 1:])
    assert exact.beliefs.shape == (13, 5, 2)

    sampled = make_contexts(process, 5, 12, 2_000, 2)
    words = [tuple(w) for w in sampled.words.tolist()]
    assert not sampled.exact and words == sorted(set(words)) and set(words) <= set(expected)
    assert float(sampled.weights.sum()) == pytest.approx(1)
    drawn = [tuple(w) for w in process.sample(2_000, 5, seeded(2)).tolist()]
    np.testing.assert_allclose(sampled.weights, [drawn.count(w) / 2_000 for w in words], atol=1e-12)
    torch.testing.assert_close(sampled.beliefs, process.beliefs(sampled.words)[:, 1:])


def test_all_words_gives_up_past_the_budget():
    process = make_process("coin", p=0.3)
    words, weights = process.all_words(4, 16)
    assert len(words) == 16 and float(weights.sum()) == pytest.approx(1)
    assert process.all_words(4, 15) is None


# Analysis ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, settings", [("mess3", {}), ("no_consecutive_ones", {}), ("rrxor", {"model": "gru"}),
                                           ("bos", {"positional": "rope"})])
@pytest.mark.parametrize("last_token_only", [False, True])
def test_every_distinct_prefix_is_collected_once_with_its_probability_and_activations(key, settings, last_token_only):
    process, length = make_process(**TINY[key]), 4
    model = model_of(vocab_size=process.vocab_size, **settings)
    found = collect_prefixes(model, contexts_of(process, length), CPU, last_token_only, batch=7)
    lengths = [length] if last_token_only else range(1, length + 1)
    expected = {}  # prefix -> probability
    for n in lengths:
        for word in itertools.product(range(process.vocab_size), repeat=n):
            if (p := direct_weight(process, word)) > 1e-12:
                expected[word] = p
    assert len(found.weights) == len(expected)
    unseen = dict(expected)
    streams = {w: [a[0, -1].double() for a in model(torch.tensor([w]))[1]] for w in expected}
    table = torch.stack([torch.cat(streams[w]) for w in expected]).detach()
    keys = list(expected)
    rows = torch.cat(list(found.activations)).detach()  # the embedding, then the layers
    assert torch.equal(torch.cat(list(found.activations)), rows)  # a second pass gives the same
    for i in range(len(rows)):  # prefixes come without their words: find each by its activations
        distance = (table - rows[i]).norm(dim=1)
        word = keys[int(distance.argmin())]
        assert float(distance.min()) < 1e-4
        assert float(found.weights[i]) == pytest.approx(unseen.pop(word) / len(lengths), rel=1e-9)
        assert int(found.lengths[i]) == len(word)
        torch.testing.assert_close(found.beliefs[i], process.beliefs([word])[0, -1])
    assert not unseen
    assert found.columns == {"embed": slice(0, 8), "layer_1": slice(8, 16), "layer_2": slice(16, 24),
                             "concat": slice(8, 24)}


def test_prefixes_of_sampled_contexts_are_distinct_and_weighted_by_their_frequency():
    process = make_process("mess3")
    contexts = contexts_of(process, 4, most=10, samples=60)
    found = collect_prefixes(model_of(), contexts, CPU)
    expected = {}
    for word, share in zip(contexts.words.tolist(), contexts.weights.tolist(), strict=True):
        for n in range(1, 5):
            expected[tuple(word[:n])] = expected.get(tuple(word[:n]), 0) + share / 4
    assert len(found.weights) == len(expected)
    np.testing.assert_allclose(np.sort(found.weights), np.sort(list(expected.values())), atol=1e-12)
    assert float(found.weights.sum()) == pytest.approx(1)


def test_a_single_possible_word_has_one_prefix_of_each_length():
    process = make_process("coin", p=1.0)
    found = collect_prefixes(model_of(vocab_size=2), contexts_of(process, 4), CPU)
    assert found.lengths.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(found.weights, 0.25)


def cloud(count: int = 1_500, seed: int = 0):
    """(beliefs [P, 3] in the simplex, uneven weights [P], a generator)."""
    rng = np.random.default_rng(seed)
    beliefs = torch.from_numpy(rng.dirichlet([0.7, 0.7, 0.7], count))
    weights = torch.from_numpy(rng.gamma(1.0, size=count))
    return beliefs, weights / weights.sum(), rng


def regressed(features: torch.Tensor, beliefs: torch.Tensor, weights: torch.Tensor, seed: int = 0, **options) -> dict:
    """The regression of these beliefs on these features, in three blocks, with `predicted`."""
    blocks = features.split(len(features) // 3 + 1)
    prefixes = Prefixes(blocks, {"concat": slice(0, features.shape[1])}, beliefs, weights, torch.ones(len(beliefs)))
    results = regress(prefixes, seed, **options)
    predicted = predict(prefixes, results)
    return results["concat"] | {"predicted": predicted}


def test_beliefs_that_are_embedded_linearly_are_read_out_without_error():
    beliefs, weights, rng = cloud()
    mixed = np.hstack([beliefs[:, :2].numpy(), rng.normal(size=(len(beliefs), 6))]) @ rng.normal(size=(8, 12)) + 5
    found = regressed(torch.from_numpy(mixed), beliefs, weights)
    assert found["r2"] == pytest.approx(1, abs=1e-9) and found["r2_fit"] == pytest.approx(1, abs=1e-9)
    assert found["rmse"] < 1e-5 and found["mae"] < 1e-6 and found["dist"] < 1e-6 and found["r2_spread"] < 1e-9
    torch.testing.assert_close(found["predicted"], beliefs, atol=1e-6, rtol=0)
    assert abs(found["shuffled_r2"]) < 0.1


def test_noise_features_explain_nothing_of_held_out_beliefs():
    beliefs, weights, rng = cloud()
    found = regressed(torch.from_numpy(rng.normal(size=(len(beliefs), 30))), beliefs, weights)
    assert abs(found["r2"]) < 0.1 and abs(found["shuffled_r2"]) < 0.1
    assert found["dist"] > 0.3


def test_r2_is_that_of_held_out_prefixes():
    """As many features as prefixes to fit: a perfect fit of what was seen, and nothing else."""
    beliefs, weights, rng = cloud(100)
    found = regressed(torch.from_numpy(rng.normal(size=(100, 80))), beliefs, weights)
    assert found["r2"] < 0.3


@pytest.mark.parametrize("seed", [0, 5])
def test_regression_equals_lstsq_with_root_weights_on_the_folds_that_fit(seed, monkeypatch):
    monkeypatch.setattr(measured, "RCONDS", (1e-6,))
    beliefs, weights, rng = cloud(400)
    features = torch.from_numpy(np.hstack([beliefs[:, :1].numpy() ** 2, rng.normal(size=(400, 5))]) + 3)
    found = regressed(features, beliefs, weights, seed, deals=3)
    generator = seeded(seed)  # draws hands, shuffled beliefs, then folds
    hand = deal_hands(weights, generator)
    torch.randperm(400, generator=generator)
    deals = [deal_folds(5, generator)[hand].numpy() for _ in range(3)]
    assert np.array_equal(found["folds"].numpy(), deals)
    design, root = np.hstack([features.numpy(), np.ones((400, 1))]), np.sqrt(weights.numpy())[:, None]

    def fitted(rows):
        return design @ np.linalg.lstsq(design[rows] * root[rows], beliefs.numpy()[rows] * root[rows], rcond=None)[0]

    np.testing.assert_allclose(found["predicted"], fitted(hand.numpy() >= 0), atol=1e-9)
    w, target = weights.numpy(), beliefs.numpy()
    spread = target - w @ target
    expected = {"r2": [], "rmse": [], "mae": [], "dist": []}
    for fold in deals:
        predicted = np.empty((400, 3))
        for k in range(5):
            predicted[fold == k] = fitted(fold != k)[fold == k]
        residual = predicted - target
        expected["r2"].append(1 - (w @ residual**2).sum() / (w @ spread**2).sum())
        expected["rmse"].append(np.sqrt(w @ residual**2).mean())
        expected["mae"].append((w @ np.abs(residual)).mean())
        expected["dist"].append(w @ np.linalg.norm(residual, axis=1))
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-7), name
    assert found["r2_spread"] == pytest.approx(np.std(expected["r2"], ddof=1), rel=1e-5)
    assert 0.1 < found["r2"] < 0.9  # neither trivially 0 nor 1
    assert found["r2_fit"] > found["r2"]


def test_hands_and_folds_are_of_like_size_and_weight():
    _, weights, _ = cloud(403)
    generator = seeded(1)
    hand = deal_hands(weights, generator)
    assert set(torch.bincount(hand).tolist()) == {16, 17} and len(torch.bincount(hand)) == 25
    heavy = weights.argsort(descending=True)
    deals = [deal_folds(5, generator)[hand] for _ in range(4)]
    for fold in deals:
        assert all(set(fold[heavy[i : i + 5]].tolist()) == set(range(5)) for i in range(0, 400, 5))
        sums = torch.zeros(5).double().index_add_(0, fold, weights)
        torch.testing.assert_close(sums, torch.full((5,), 0.2).double(), rtol=0.05, atol=0)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(deals, 2))
    assert not torch.equal(hand, deal_hands(weights, seeded(2)))


def heavy_tailed(count: int = 300):
    """Features whose rare large values few heavy prefixes have, as the contexts of a simple process do: which of them
    are seen decides what a map says of the others."""
    rng = np.random.default_rng(0)
    weights = 0.8 ** np.arange(count) + 1e-4
    beliefs = rng.normal(size=(count, 2)) * (1 + 5 * weights[:, None])
    features = np.hstack([beliefs + 0.2 * beliefs**2, rng.normal(size=(count, 20))]) @ rng.normal(size=(22, 40))
    return (torch.from_numpy(x) for x in (features, beliefs, weights / weights.sum()))


def test_r2_hardly_depends_on_the_seed_that_deals_the_folds():
    """One deal gives one r2 with one seed and another with the next; their mean does not move by much, and the spread
    says how far single deals are apart."""
    features, beliefs, weights = heavy_tailed()
    single = [regressed(features, beliefs, weights, seed, deals=1)["r2"] for seed in range(8)]
    means = [regressed(features, beliefs, weights, seed) for seed in range(8)]
    moved = np.std([found["r2"] for found in means])
    assert np.std(single) > 2 * moved
    assert moved < np.mean([found["r2_spread"] for found in means])


def test_one_deal_has_no_spread():
    beliefs, weights, _ = cloud(60)
    assert regressed(beliefs, beliefs, weights, deals=1)["r2_spread"] is None


def test_rcond_search_drops_directions_that_only_amplify_noise():
    """Most features are a little noise that fits the sample by chance: full rank loses, the search does not."""
    beliefs, weights, rng = cloud(120)
    signal = beliefs[:, :2].numpy() + rng.normal(size=(120, 2)) * 0.05
    features = torch.from_numpy(np.hstack([signal, 1e-4 * rng.normal(size=(120, 60))]))
    found = regressed(features, beliefs, weights)
    assert found["rcond"] > 1e-4 and found["r2"] > 0.9


def test_rounding_decides_neither_the_rank_nor_r2():
    """Activations of other threads differ in the last digit of float32."""
    beliefs, weights, rng = cloud(500)
    features = torch.from_numpy(np.hstack([beliefs.numpy(), rng.normal(size=(500, 20))]) @ rng.normal(size=(23, 60)))
    once, again = (regressed((features * (1 + 6e-8 * torch.from_numpy(rng.normal(size=features.shape)))).float(),
                             beliefs, weights) for _ in range(2))
    assert once["rcond"] == again["rcond"] and once["r2"] == pytest.approx(again["r2"], abs=1e-9)


def test_constant_features_give_no_credit_and_of_constant_beliefs_there_is_no_r2():
    beliefs, weights, rng = cloud(60)
    assert regressed(torch.ones(60, 4).double() * 0.1, beliefs, weights)["r2"] <= 1e-9
    for size in (58, 59, 60):  # weights add up to 1 but for rounding
        constant = torch.ones(size, 1).double() / 3
        found = regressed(torch.from_numpy(rng.normal(size=(size, 4))), constant, weights[:size] / weights[:size].sum())
        assert [found[name] for name in ("r2", "r2_spread", "r2_fit", "shuffled_r2")] == [None] * 4
        assert found["dist"] < 1e-9


def test_too_few_prefixes_are_refused_with_what_to_raise():
    beliefs, weights, _ = cloud(2)
    with pytest.raises(ValueError, match="too few.*n_ctx or max_words"):
        regressed(beliefs, beliefs, weights)


def test_wide_networks_have_one_deal(monkeypatch):
    monkeypatch.setattr(measured, "MOMENT_BYTES", 25 * 8**2 * 8)
    beliefs, weights, _ = cloud(60)
    narrow, wide = (regressed(beliefs[:, :width], beliefs, weights) for width in (1, 3))
    assert len(narrow["maps"]) == 10 and len(wide["maps"]) == 1 and wide["r2"] == pytest.approx(1)


class Long(nn.Module):
    """A model that keeps nothing, and counts the largest number of tokens that it saw at once."""

    largest = 0

    def forward(self, tokens):
        self.largest = max(self.largest, tokens.numel())
        x = F.one_hot(tokens, V).float()
        total = x.cumsum(1) / (1 + torch.arange(tokens.shape[1]))[:, None]
        return x, [x, total]


def test_an_analysis_holds_a_part_of_its_activations_at_a_time(monkeypatch):
    """With nothing kept and small blocks, the result is that of all at once."""
    contexts, model = contexts_of(make_process("mess3"), 6), Long()
    whole, _ = analyse(model, Long(), contexts, CPU)
    monkeypatch.setattr(measured, "TOKENS", 600)
    monkeypatch.setattr(measured, "ROWS", 70)
    monkeypatch.setattr(measured, "KEPT_BYTES", 0)
    model.largest = 0
    prefixes = collect_prefixes(model, contexts, CPU)
    assert max(map(len, prefixes.activations)) <= 70 and model.largest <= 600
    assert not prefixes.activations.kept
    parts, geometry = analyse(model, Long(), contexts, CPU)
    assert parts["r2_concat"] == pytest.approx(whole["r2_concat"], rel=1e-6)
    assert parts["layers"]["embed"]["dist"] == pytest.approx(whole["layers"]["embed"]["dist"], rel=1e-6)
    assert geometry["predicted"].shape == geometry["beliefs"].shape


def test_evaluation_reads_long_contexts_in_parts(monkeypatch):
    contexts, model = contexts_of(make_process("mess3"), 6), Long()
    floor = make_process("mess3").optimal_loss(6)
    whole = evaluate(model, contexts, floor, runtime())
    monkeypatch.setattr(measured, "TOKENS", 600)
    model.largest = 0
    assert evaluate(model, contexts, floor, runtime())["loss"] == pytest.approx(whole["loss"], rel=1e-9)
    assert model.largest <= 600


@pytest.mark.parametrize("r2, spread, untrained, claims", [
    (0.99, 0.001, 0.9, True), (0.5, 0.05, 0.47, False), (0.9, 0.001, 0.95, False), (-0.1, 0.0, -0.5, False),
    (0.5, None, 0.1, True)])
def test_the_verdict_claims_the_belief_only_where_training_gained(r2, spread, untrained, claims):
    told = belief_in_words({"r2_concat": r2, "r2_concat_spread": spread, "untrained_r2_concat": untrained,
                            "untrained_r2_concat_spread": None})
    assert ("reads the belief out" in told) == claims and ("no gain" in told) != claims
    assert f"{r2:.4f}" in told and f"{untrained:.4f}" in told and "None" not in told


def test_pca_equals_numpy_on_the_weighted_covariance():
    _, weights, rng = cloud(200)
    features = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 2
    found = pca(torch.from_numpy(features), weights, components=2)
    covariance = np.cov(features.T, aweights=weights.numpy(), bias=True)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    np.testing.assert_allclose(found["explained"], values / values.sum(), atol=1e-10)
    expected = (features - weights.numpy() @ features) @ vectors[:, :2]
    np.testing.assert_allclose(np.abs(found["coordinates"].numpy()), np.abs(expected), atol=1e-8)
    assert found["axes"].shape == (6, 2)
    np.testing.assert_allclose(np.abs(found["axes"].numpy()), np.abs(vectors[:, :2]), atol=1e-8)
    running = np.cumsum(values / values.sum())
    for percent in (80, 90, 95, 99):
        assert found[f"components_{percent}"] == int(np.argmax(running >= percent / 100)) + 1


def test_pca_counts_components_exactly_at_a_threshold():
    features = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    found = pca(features, torch.full((4,), 0.25).double())
    np.testing.assert_allclose(found["explained"], [0.9, 0.1])
    assert [found[f"components_{p}"] for p in (80, 90, 95, 99)] == [1, 1, 2, 2]


def test_analysis_of_the_exact_predictor_finds_the_belief_in_its_layer_and_not_in_a_shuffle():
    process = make_process("mess3")
    contexts = contexts_of(process, 5)
    result, geometry = analyse(Oracle(process), model_of(n_ctx=5), contexts, CPU)
    assert result["deals"] == 10 and result["r2_concat_spread"] < 1e-9
    assert result["prefixes"] == 3 + 9 + 27 + 81 + 243 and result["all_prefixes"]
    assert result["r2_concat"] == pytest.approx(1, abs=1e-9)
    assert set(result["r2_by_layer"]) == {"embed", "layer_1"}
    assert set(result["layers"]) == {"embed", "layer_1", "concat"}
    assert result["r2_by_layer"]["layer_1"] == pytest.approx(1, abs=1e-9)
    assert abs(result["shuffled_r2_concat"]) < 0.3  # few prefixes hold most of the weight
    assert result["untrained_r2_concat"] < 0.999
    torch.testing.assert_close(geometry["predicted"], geometry["beliefs"], atol=1e-8, rtol=0)
    json.dumps(result, allow_nan=False)


# Schedule, pictures, settings --------------------------------------------------------------------------------------

def test_learning_rate_warms_up_and_falls_as_a_cosine():
    cfg = config(lr=0.1, min_lr=0.02, warmup_steps=4, max_steps=14)
    rates = [learning_rate(step, cfg) for step in range(15)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[9] == pytest.approx(0.06) and rates[14] == pytest.approx(0.02)
    assert rates[6] == pytest.approx(0.02 + 0.04 * (1 + math.cos(0.2 * math.pi)))
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(100, cfg) == pytest.approx(0.02)


def test_learning_rate_stays_where_the_schedule_is_constant():
    cfg = config(lr=0.1, warmup_steps=2, max_steps=10, schedule="constant")
    assert [learning_rate(s, cfg) for s in (0, 1, 2, 9)] == pytest.approx([0.05, 0.1, 0.1, 0.1])
    assert learning_rate(0, config(lr=0.1, warmup_steps=0)) == pytest.approx(0.1)
    assert learning_rate(3, config(lr=0.1, warmup_steps=10, max_steps=4)) == pytest.approx(0.04)


@pytest.mark.parametrize("name, states", [("coin", 1), ("sns", 2), ("mess3", 3), ("rrxor", 5), ("days_of_week", 7)])
def test_pictures_are_drawn_for_any_number_of_states(name, states, tmp_path):
    from matplotlib.image import imread

    process = make_process(name)
    assert process.num_states == states
    length = 4 if process.vocab_size < 5 else 2
    model, contexts = model_of(vocab_size=process.vocab_size), contexts_of(process, length)
    result = evaluate(model, contexts, process.optimal_loss(length), runtime())
    analysis, geometry = analyse(model, model_of(seed=1, vocab_size=process.vocab_size), contexts, CPU)
    lines = [{"step": s, "split": "eval", "excess_loss": 1 / s} for s in (1, 2)] + [{"step": 1, "split": "train"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_run(tmp_path, "title", result, analysis, geometry)
    files = {path.name: path for path in (tmp_path / "plots").iterdir()}
    of_beliefs = {"beliefs.png", "r2_by_layer.png"} if states > 1 else set()  # one state: nothing to see
    assert files.keys() == {"excess_loss.png", "loss_by_position.png"} | of_beliefs
    for picture in files.values():
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert imread(picture)[..., :3].std() > 0.01, f"{picture.name} is blank"


def watched(monkeypatch) -> list:
    """The axes of the pictures that are drawn from now on."""
    drawn = []

    @contextlib.contextmanager
    def watch(*args, **options):
        with figure(*args, **options) as axes:
            yield axes
            drawn.append(axes)

    monkeypatch.setattr(pictures, "figure", watch)
    return drawn


def test_a_bar_of_no_height_shows_no_spread_around_0(tmp_path, monkeypatch):
    drawn = watched(monkeypatch)
    layers = {"embed": {"r2": -0.3, "r2_spread": 0.2}, "concat": {"r2": 0.5, "r2_spread": 0.1}}
    pictures.plot_r2_by_layer(tmp_path, "title", {"layers": layers, "untrained_r2_concat": 0.1,
                                                  "shuffled_r2_concat": -0.1})
    axes, = drawn
    lines, = (container.errorbar.lines[2][0] for container in axes.containers if hasattr(container, "errorbar"))
    below, above = (segment[:, 1] for segment in lines.get_segments())
    np.testing.assert_allclose(below, [0, 0])
    np.testing.assert_allclose(above, [0.4, 0.6])
    assert [text.get_text() for text in axes.texts] == ["-0.3000", "0.5000"]


@pytest.mark.parametrize("beliefs, label", [
    ([[1.0, 0.0], [0.3, 0.7], [0.9, 0.1]], "probability of state 1"),
    ([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.2, 0.4, 0.4]], "the line on which all lie")])
def test_beliefs_on_a_line_are_drawn_as_predicted_against_true(beliefs, label, tmp_path, monkeypatch):
    """A second axis would show their rounding, magnified to the size of the picture."""
    drawn = watched(monkeypatch)
    beliefs = torch.tensor(beliefs).double()
    predicted = beliefs + 0.05
    geometry = {"beliefs": beliefs, "predicted": predicted, "weights": torch.tensor([0.5, 0.2, 0.3]).double()}
    pictures.plot_beliefs(tmp_path, "title", geometry, 0.9)
    axes, = drawn
    assert label in axes.get_xlabel() and "true" in axes.get_xlabel()
    points = axes.collections[0].get_offsets()
    assert np.ptp(points[:, 0]) > 0.3
    if len(beliefs[0]) == 2:
        order = geometry["weights"].argsort()
        np.testing.assert_allclose(points[:, 0], beliefs[order, 1], atol=1e-9)
        np.testing.assert_allclose(points[:, 1], predicted[order, 1], atol=1e-9)


def geometry_of(process, length: int) -> dict:
    """What plot_beliefs takes, of a model that holds the beliefs but for a shift."""
    contexts = contexts_of(process, length)
    beliefs = contexts.beliefs[:, -1]
    return {"beliefs": beliefs, "predicted": beliefs + 0.05, "weights": contexts.weights, "names": contexts.states}


def test_beliefs_over_three_states_are_points_of_a_triangle_in_the_colours_of_its_corners(tmp_path, monkeypatch):
    from matplotlib.colors import to_rgb

    drawn = watched(monkeypatch)
    certain = torch.eye(3, dtype=torch.float64)
    beliefs = torch.cat([certain, torch.full((1, 3), 1 / 3, dtype=torch.float64)])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    geometry = {"beliefs": beliefs, "predicted": beliefs, "weights": weights}
    pictures.plot_beliefs(tmp_path, "title", geometry, 0.9)
    (left, right), = drawn
    for axes in (left, right):
        points = axes.collections[0]
        np.testing.assert_allclose(points.get_offsets(), [[0, 0], [1, 0], [0.5, 0.75**0.5], [0.5, 0.75**0.5 / 3]])
        np.testing.assert_allclose(points.get_facecolors()[:3, :3], [to_rgb(colour) for colour in pictures.CORNERS])
        assert [text.get_text() for text in axes.texts] == ["state 0", "state 1", "state 2"]


@pytest.mark.parametrize("name, planes", [("rrxor", 2), ("tom_quantum", 1), ("fanizza", 2)])
def test_beliefs_of_more_dimensions_are_drawn_in_planes_of_their_components(name, planes, tmp_path, monkeypatch):
    """Both sides in the same coordinates and range; the shares of the variance stand on the axes."""
    drawn = watched(monkeypatch)
    geometry = geometry_of(make_process(name), 5)
    pictures.plot_beliefs(tmp_path, "title", geometry, 0.9)
    rows, = drawn
    assert rows.shape == (planes, 2)
    explained = pca(geometry["beliefs"], geometry["weights"])["explained"]
    for left, right in rows:
        assert left.axis() == right.axis()
        of_true, of_read = (axes.collections[0].get_offsets() for axes in (left, right))
        shift = of_read - of_true
        np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-12)
    first, second = rows[0][0].get_xlabel(), rows[0][0].get_ylabel()
    assert f"component 1, {explained[0]:.0%}" in first and f"component 2, {explained[1]:.0%}" in second
    scales = [axes.get_ylabel() for axes in left.figure.axes if axes not in rows.flat]
    assert len(scales) == planes and all("shade in both: component" in scale for scale in scales)
    kind = "state" if name == "rrxor" else "dimension"
    assert kind in first and not {"state", "dimension"} <= set(first.split())


def test_names_of_states_are_off_one_another_and_those_of_one_place_are_one(tmp_path):
    with figure(tmp_path, "names", 10.6, 5.5, columns=2) as panels:
        for axes in panels:
            axes.set(xlim=(0, 1), ylim=(0, 1))
        places = torch.tensor([[0.5, 0.5], [0.51, 0.51], [0.3, 0.5], [0.56, 0.53], [0.98, 0.5], [1.5, 0.5]])
        pictures.mark_states(panels, [f"state {s}" for s in range(6)], places)
    texts = panels[0].texts
    assert [text.get_text() for text in texts] == ["state 0, state 1", "state 2", "state 3", "state 4"]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x1 <= panels[0].bbox.x1 for box in boxes) and not panels[1].texts


def test_states_of_a_mixture_are_named_by_their_component(tmp_path, monkeypatch):
    drawn = watched(monkeypatch)
    process = make_process("nonergodic", components=[{"process": "sns"}, {"process": "sns", "p": 0.9}])
    pictures.plot_beliefs(tmp_path, "title", geometry_of(process, 6), 0.9)
    labels = " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in drawn[0].flat)
    assert "1 sns 0" in labels and "2 sns 1" in labels


def test_an_excess_that_is_not_above_zero_has_no_place_on_a_logarithmic_axis(tmp_path):
    lines = [{"step": s, "split": "eval", "excess_loss": x} for s, x in ((1, 0.0), (2, -1e-12))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures.plot_excess_loss(tmp_path, "title")
    assert not (tmp_path / "plots").exists()


def test_without_an_analysis_there_are_pictures_of_the_loss_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "eval", "excess_loss": 2.0}\n')
    plot_run(tmp_path, "title", {"loss_by_position": [2.0, 1.0], "optimal_loss_by_position": [0.0, 0.0]}, None, None)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss_by_position.png", "excess_loss.png"}


@pytest.mark.parametrize("settings, message", [
    ({"seed": 2**63}, "seed = 9223372036854775808: must be below 2**63"),
    ({"d_model": 10, "n_heads": 4}, "d_model = 10 is no multiple of n_heads = 4"),
    ({"positional": "rope", "d_model": 6, "n_heads": 2}, "rope needs an even head width, not 3"),
    ({"positional": "rope", "d_head": 5}, "rope needs an even head width, not 5"),
    ({"carry_state": True, "add_bos": True}, "carry_state"),
    ({"carry_state": True, "initial_state": [1.0, 0.0, 0.0]}, "carry_state")])
def test_a_wrong_combination_of_settings_is_named(settings, message):
    wrong = config(**settings).check()
    assert len(wrong) == 1 and message in wrong[0]


@pytest.mark.parametrize("settings", [
    {}, {"d_model": 10, "n_heads": 4, "d_head": 3}, {"d_model": 10, "n_heads": 4, "model": "gru"},
    {"positional": "rope", "d_head": 6}, {"carry_state": True}, {"grad_clip": 0.0, "warmup_steps": 0}], ids=str)
def test_a_right_combination_of_settings_is_accepted(settings):
    assert config(**settings).check() == []


@pytest.mark.parametrize("settings, message", [
    ("n_ctx=0", "must be at least 1"), ("max_steps=-5", "must be at least 1"), ("lr=-1e-3", "not negative"),
    ("seed=-1", "must not be negative"), ("d_head=0", "must be at least 1"), ("init_scale=0", "above 0"),
    ("beta2=1", "must be in [0, 1)"), ("grad_clip=inf", "must be finite")])
def test_a_number_out_of_its_range_is_named(settings, message, capsys):
    with pytest.raises(SystemExit):
        configure(Config, [settings])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and settings.split("=")[0] in error and message in error


def test_all_that_is_wrong_with_the_settings_is_said_at_once(capsys):
    with pytest.raises(SystemExit):
        configure(Config, ["n_ctx=0", "lr=-1"])
    assert capsys.readouterr().err.count("error: ") == 2
    assert len(config(d_model=10, n_heads=4, carry_state=True, add_bos=True).check()) == 2
