"""kernels/ of train_apelr.py: each is its plain form, in values and gradients, whatever the size of its blocks."""

import itertools
import math

import pytest
import torch

import kernels.log_probs
import kernels.plan_contrast
from kernels.log_probs import log_probs, plain_log_probs, shared_log_probs
from kernels.plan_contrast import plain_divergence, plain_information, plan_divergence, plan_information, some_rows
from kernels.token_terms import (
    chunk_bow,
    chunk_targets,
    plain_chunk_bow,
    plain_repetition,
    recent_tokens,
    repetition,
)

K, V, H, T = 3, 11, 8, 37
R = 2  # of low rank
KINDS = ("a head a plan", "an input a plan", "a bias a plan", "low rank", "shared")


def noise(*shape, seed: int = 2, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def close(found, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-10, atol=1e-10)


def heads(kind: str, rows: int = T, vocab: int = V) -> tuple:
    """x, weight and bias of a kind."""
    if kind == "low rank":
        x = noise(rows, 1, H + R, seed=10, grad=True)
        weight = noise(vocab, H + K * R, seed=11, grad=True)
        return x, weight, noise(K, vocab, seed=12, grad=True)
    x = noise(rows, K if kind == "an input a plan" else 1, H, seed=10, grad=True)
    weight = noise(vocab * (K if kind == "a head a plan" else 1), H, seed=11, grad=True)
    return x, weight, noise(K, vocab, seed=12, grad=True)


def dense_logits(kind: str, x, weight, bias) -> torch.Tensor:
    """Logits [T, K, V] by the formula of the kind."""
    if kind == "an input a plan":
        return x @ weight.T + bias
    if kind == "a head a plan":
        return torch.einsum("th,kvh->tkv", x[:, 0], weight.view(*bias.shape, H)) + bias
    if kind == "low rank":
        shared = x[:, 0, :H] @ weight[:, :H].T
        own = torch.einsum("tr,vkr->tkv", x[:, 0, H:], weight[:, H:].view(-1, K, R))
        return shared[:, None] + own + bias
    return (x[:, 0] @ weight.T)[:, None] + bias


def streamed(kind: str):
    return shared_log_probs if kind == "shared" else log_probs


def same_with_gradients(found, expected, inputs, upstream) -> None:
    close(found, expected)
    ours = torch.autograd.grad(found, inputs, upstream, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@pytest.fixture(params=[None, 32, 5], ids=["one block", "blocks of 32", "blocks of five"])
def blocks(request, monkeypatch):
    """Few rows at a time, or all at once."""
    for module in (kernels.log_probs, kernels.plan_contrast) if request.param else ():
        monkeypatch.setattr(module, "block_rows", lambda *sizes: request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_log_probabilities_are_the_plain_form_with_the_same_gradients(kind, blocks):
    inputs = heads(kind)
    index = torch.randint(V, (T, 4), generator=torch.Generator().manual_seed(3))
    index[:, 3] = index[:, 0]  # looked up twice, so gradients add up
    upstream = noise(T, K, 4, seed=13)
    same_with_gradients(streamed(kind)(*inputs, index), plain_log_probs(*inputs, index, block=9), inputs, upstream)
    logs = dense_logits(kind, *inputs).log_softmax(2)
    close(plain_log_probs(*inputs, index), logs.gather(2, index[:, None].expand(-1, K, -1)))


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_streamed_information_is_the_plain_form_with_the_same_gradients(kind, blocks):
    inputs, raw = heads(kind), noise(T, K, seed=14, grad=True)
    belief, upstream = raw.log_softmax(1), torch.tensor(-1.7, dtype=torch.float64)
    plain = plain_information(*inputs, belief)
    same_with_gradients(plan_information(*inputs, belief), plain, (*inputs, raw), upstream)
    p = dense_logits(kind, *inputs).softmax(2)
    mixture, own = (belief.exp()[..., None] * p).sum(1), -(p * p.log()).sum(2)
    close(plain, (-(mixture * mixture.log()).sum(1) - (belief.exp() * own).sum(1)).mean())


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_streamed_divergence_is_the_plain_form_with_the_same_gradients(kind, blocks):
    inputs = heads(kind)
    plain = plain_divergence(*inputs)
    same_with_gradients(plan_divergence(*inputs), plain, inputs, torch.tensor(-1.7, dtype=torch.float64))
    p, pairs = dense_logits(kind, *inputs).softmax(2), []
    for i, j in itertools.combinations(range(K), 2):
        m = (p[:, i] + p[:, j]) / 2
        pairs.append(((p[:, i] * (p[:, i] / m).log()).sum(1) + (p[:, j] * (p[:, j] / m).log()).sum(1)).mean() / 2)
    close(plain, sum(pairs) / len(pairs))


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_gradients_are_those_of_finite_differences(kind, blocks):
    inputs = heads(kind, 12, 4)
    index = torch.randint(4, (12, 2), generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(lambda *given: streamed(kind)(*given, index), inputs)
    if kind == "shared":
        return
    assert torch.autograd.gradcheck(plan_divergence, inputs)
    if kind == "a head a plan":
        belief = noise(12, K, seed=14).log_softmax(1).requires_grad_()  # as if it were free
        assert torch.autograd.gradcheck(plan_information, (*inputs, belief))


def test_the_shared_normalisers_hold_for_large_logits():
    x, weight, bias = 30 * noise(6, 1, H), noise(V, H, seed=3), 20 * noise(K, V, seed=4)
    index = torch.arange(6)[:, None] % V
    close(shared_log_probs(x, weight, bias, index), plain_log_probs(x, weight, bias, index))


def test_one_plan_differs_from_no_other():
    x, weight, bias = noise(5, 1, H), noise(V, H, seed=3), noise(1, V, seed=4)
    assert abs(float(plan_divergence(x, weight, bias))) < 1e-12
    assert abs(float(plan_information(x, weight, bias, torch.zeros(5, 1, dtype=torch.float64)))) < 1e-12


def test_a_share_of_the_rows_is_drawn_anew():
    assert some_rows(12, 1, torch.device("cpu")) == slice(None)
    torch.manual_seed(0)
    draws = [some_rows(12, 1 / 3, torch.device("cpu")).tolist() for _ in range(50)]
    assert all(len(set(rows)) == 4 and set(rows) <= set(range(12)) for rows in draws)
    assert {row for rows in draws for row in rows} == set(range(12))
    assert len(some_rows(12, 0.01, torch.device("cpu"))) == 1


# ---------------------------------------------------------------------------------------------------------------
# Terms from looked-up tokens
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("L, C", [(13, 4), (12, 4), (4, 1), (5, 4)])
def test_the_bag_of_a_chunk_is_the_plain_form_with_the_same_gradients(L, C):
    logits, raw = noise(2, L, K, V, grad=True), noise(2, -(-L // C), K, seed=3, grad=True)
    y = torch.randint(V, (2, L), generator=torch.Generator().manual_seed(3))
    start, logs = raw.log_softmax(2), logits.log_softmax(3)
    words = logs.gather(3, chunk_targets(y, C)[:, :, None].expand(-1, -1, K, -1))
    plain = plain_chunk_bow(logs.exp(), y, start, C)
    same_with_gradients(chunk_bow(words, start), plain, (logits, raw), torch.tensor(0.7, dtype=torch.float64))


@pytest.mark.parametrize("window, current", [(1, True), (3, True), (3, False), (99, True)])
def test_the_unlikelihood_of_recent_tokens_is_the_plain_form_with_the_same_gradients(window, current):
    logits, raw = noise(2, 9, K, V, grad=True), noise(2, 9, K, seed=3, grad=True)
    text = torch.randint(5, (2, 10), generator=torch.Generator().manual_seed(3))
    x, y, gate, logs = text[:, :-1], text[:, 1:], raw.log_softmax(2), logits.log_softmax(3)
    recent, counts = recent_tokens(x, y, window, current)
    words = logs.gather(3, recent[:, :, None].expand(-1, -1, K, -1))
    plain = plain_repetition((gate.exp()[..., None] * logs.exp()).sum(2), x, y, window, current)
    same_with_gradients(repetition(gate, words, counts), plain, (logits, raw), torch.tensor(0.7, dtype=torch.float64))


def test_a_certain_token_has_a_finite_unlikelihood():
    words = torch.zeros(1, 1, K, 1)  # p = 1
    found = repetition(torch.full((1, 1, K), -math.log(K)), words, torch.ones(1, 1, 1, dtype=torch.bool))
    assert torch.isfinite(found) and found > 10


def test_a_recent_token_counts_once_and_the_target_never():
    x, y = torch.tensor([[1, 1, 2, 1, 3]]), torch.tensor([[1, 2, 1, 3, 1]])

    def counted(window, current):
        recent, counts = (part[0].tolist() for part in recent_tokens(x, y, window, current))
        return [sorted(v for v, n in zip(*pair, strict=True) if n) for pair in zip(recent, counts, strict=True)]

    assert counted(1, True) == [[], [1], [2], [1], [3]]
    assert counted(1, False) == [[], [1], [], [2], []]
    assert counted(3, True) == [[], [1], [2], [1, 2], [2, 3]]
    assert counted(9, True) == [[], [1], [2], [1, 2], [2, 3]]
    assert counted(9, False) == [[], [1], [], [1, 2], [2]]




@pytest.mark.parametrize("kind", ["a head a plan", "an input a plan", "low rank"])
def test_a_second_backward_pass_gives_the_same_gradients(kind):
    """The logits of the last block are used up by the first."""
    inputs = heads(kind)
    index = torch.randint(V, (T, 2), generator=torch.Generator().manual_seed(0))
    total = log_probs(*inputs, index).sin().sum()
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    for found, expected in zip(torch.autograd.grad(total, inputs), first, strict=True):
        close(found, expected)
