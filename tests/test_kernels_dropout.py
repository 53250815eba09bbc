"""Dropout of few random bits: the right share, each element by itself; the plain form where nothing is drawn."""

import pytest
import torch
import torch.nn.functional as F

from kernels import dropout as kernel


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_each_of_the_four_elements_of_a_draw_is_dropped_at_the_rate(rate):
    torch.manual_seed(0)
    size = 400_000
    factors = kernel.factors(torch.Size([size]), rate)
    stay = 1 / (1 - rate)
    assert torch.all((factors == 0) | ((factors - stay).abs() < 1e-3 * stay))
    error = (rate * (1 - rate) / (size / 4)) ** 0.5  # of a share
    for i in range(4):
        share = float((factors[i::4] == 0).double().mean())
        assert abs(share - rate) < 5 * error + 1 / 65_536


def test_neighbours_are_dropped_independently_and_every_draw_is_another():
    torch.manual_seed(1)
    shape = torch.Size([300, 7, 33])  # no multiple of four
    first = kernel.factors(shape, 0.5).flatten() > 0
    second = kernel.factors(shape, 0.5).flatten() > 0
    assert abs(float((first == second).double().mean()) - 0.5) < 0.01
    for distance in range(1, 6):
        alike = first[distance:] == first[:-distance]
        assert abs(float(alike.double().mean()) - 0.5) < 0.01
    torch.manual_seed(1)
    assert torch.equal(kernel.factors(shape, 0.5).flatten() > 0, first)


def test_dropout_keeps_the_mean_and_its_gradient_is_its_mask():
    torch.manual_seed(2)
    x = torch.ones(1_000, 300, requires_grad=True)
    y = kernel.dropout(x, 0.3)
    y.sum().backward()
    assert abs(float(y.detach().mean()) - 1) < 0.01
    assert torch.equal(x.grad, y.detach())
    assert kernel.dropout(x.bfloat16(), 0.3).dtype == torch.bfloat16


@pytest.mark.parametrize("rate", [0.0, 1e-6, 1 - 1e-6, 1.0])
def test_a_rate_that_16_bits_do_not_hold_is_left_to_the_plain_form(rate):
    x = torch.ones(60, 500)
    torch.manual_seed(4)
    found = kernel.dropout(x, rate)
    torch.manual_seed(4)
    assert torch.equal(found, kernel.plain_dropout(x, rate))


def test_attention_with_dropout_equals_the_textbook_with_the_same_mask(monkeypatch):
    torch.manual_seed(3)
    B, H, T, C = 2, 3, 5, 4
    qkv = torch.randn(B, T, 3, H, C, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    mask = kernel.factors(torch.Size([B * H, T, T]), 0.4)
    monkeypatch.setattr(kernel, "factors", lambda shape, rate: mask.view(shape))

    def textbook(q, k, v):
        scores = q @ k.transpose(-1, -2) / C**0.5
        seen = torch.ones(T, T).tril().bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights * mask.view(B, H, T, T)) @ v

    results = []
    for function in (lambda q, k, v: kernel.attention(q, k, v, 0.4), textbook):
        inputs = [part.clone().requires_grad_() for part in qkv]
        out = function(*inputs)
        out.sin().sum().backward()
        results.append([out, *(part.grad for part in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_attention_without_dropout_is_the_plain_form():
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(kernel.attention(q, k, v, 0.0), expected)
