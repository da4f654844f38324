"""Head and loss in one equals logits first, loss then: value, every gradient, any chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.nn.contracts import Head
from octavo.objectives.head_loss import head_loss

N, D, V = 13, 6, 17


def sample(dtype: torch.dtype = torch.float64, *, bias: bool = True):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    b = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    weights = torch.rand(N).mul(2) * (torch.arange(N) % 3 != 1)
    return hidden, weight, b, torch.randint(V, (N,)), weights


def by_hand(hidden, weight, bias, targets, weights, softcap, z_loss):
    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none") + z_loss * logits.logsumexp(-1).square()
    return (losses * weights).sum()


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize(("softcap", "z_loss", "bias"), [(None, 0.0, False), (2.0, 0.0, True), (3.0, 0.1, True)])
def test_value_and_gradients(chunk, softcap, z_loss, bias):
    hidden, weight, b, targets, weights = sample(bias=bias)
    leaves = [x for x in (hidden, weight, b) if x is not None]
    expected = by_hand(hidden, weight, b, targets, weights, softcap, z_loss)
    wanted = torch.autograd.grad(expected * 0.7, leaves)
    loss = head_loss(hidden, Head(weight, b, softcap), targets, weights, z_loss=z_loss, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    for found, want in zip(torch.autograd.grad(loss * 0.7, leaves), wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_without_gradients_nothing_but_the_loss_is_made():
    hidden, weight, b, targets, weights = sample()
    with torch.no_grad():
        loss = head_loss(hidden, Head(weight, b), targets, weights, chunk=5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_hand(hidden, weight, b, targets, weights, None, 0.0))


def test_nothing_counted_gives_zero_and_zero_gradients():
    hidden, weight, b, targets, weights = sample()
    loss = head_loss(hidden, Head(weight, b), targets, weights * 0, chunk=5)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight, b)))


def test_sixteen_bits_lose_only_their_rounding():
    hidden, weight, b, targets, weights = sample(torch.float32)
    expected = torch.autograd.grad(by_hand(hidden, weight, b, targets, weights, None, 0.0), (hidden, weight))
    narrow = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, b)]
    loss = head_loss(narrow[0], Head(narrow[1], narrow[2]), targets, weights, chunk=4)
    assert loss.dtype == torch.float32
    for found, want in zip(torch.autograd.grad(loss, narrow[:2]), expected, strict=True):
        assert float((found.float() - want).norm() / want.norm()) < 0.02


def test_the_operator_keeps_its_promises_to_torch():
    hidden, weight, b, targets, weights = sample(torch.float32)
    arguments = (hidden, weight, b, targets, weights, 2.0, 0.1, 4, True)
    torch.library.opcheck(torch.ops.octavo.head_loss.default, arguments)
    plain = (hidden.detach(), weight.detach(), None, *arguments[3:-1], False)
    torch.library.opcheck(torch.ops.octavo.head_loss.default, plain)
