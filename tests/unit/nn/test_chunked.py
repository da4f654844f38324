"""The recurrence with one decay a head: its three forms are equal, also at borders, in pieces, under strong decay."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from octavo.nn import chunked as module
from octavo.nn import fixed_decay as walk
from octavo.nn.chunked import chunked, parallel, recurrent, step


def example(T, groups=2, heads=4, decay="token", borders=True, state=True, dtype=torch.float64) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    q, k, v = draw(2, T, groups, 3), draw(2, T, groups, 3), draw(2, T, heads, 5)
    shape = {"token": (2, T, heads), "shared by rows": (1, T, heads), "fixed": (heads,), "none": None}[decay]
    log_decay = None if shape is None else -3 * draw(*shape).abs()
    segments = (draw(2, T) > 0.6).long().cumsum(1) if borders else None
    return q, k, v, log_decay, segments, draw(2, heads, 3, 5) if state else None


def gradients(form, q, k, v, log_decay, segments, state) -> list[Any]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v, log_decay, state) if x is not None]
    named = iter(leaves)
    given = [None if x is None else next(named) for x in (q, k, v, log_decay, state)]
    y, end = form(*given[:4], segments, given[4])
    weights = torch.Generator().manual_seed(9)
    loss = torch.stack(
        [(x * torch.randn(x.shape, generator=weights, dtype=torch.float64).to(x)).sum() for x in (y, end)]
    )
    loss = loss.sum()
    return [y, end, *torch.autograd.grad(loss, leaves)]


@pytest.mark.rows("B9", "S4", "S2")
@pytest.mark.parametrize("decay", ["token", "shared by rows", "fixed", "none"])
@pytest.mark.parametrize("T, chunk, span", [(1, 4, 8), (13, 4, 1024), (13, 4, 8), (12, 5, 5), (12, 16, 1024)])
def test_three_forms_are_equal_with_every_gradient(decay, T, chunk, span, monkeypatch):
    monkeypatch.setattr(module, "SPAN", span)
    for groups, borders, state in itertools.product((1, 2, 4), (True, False), (True, False)):
        case = example(T, groups, 4, decay, borders, state)
        wanted = gradients(recurrent, *case)
        for form in (parallel, lambda *args: chunked(*args, chunk=chunk)):
            for got, want in zip(gradients(form, *case), wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", ["token", "shared by rows", "fixed", "none"])
def test_one_token_is_the_recurrence_of_one(decay):
    starts = torch.tensor([[False], [True]])
    for groups in (1, 2, 4):
        q, k, v, log_decay, _, before = example(1, groups, 4, decay, state=True)
        wanted = recurrent(q, k, v, log_decay, starts.long(), before)
        for got, want in zip(step(q, k, v, log_decay, starts, before), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_numbers_by_hand():
    """Two tokens, one channel each: h_1 = 2 * 3, h_2 = h_1 / 2 + 5 * 7, read by 1 and by 10."""
    one = lambda *values: torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)  # noqa: E731
    decay = torch.tensor([0.25, 0.5], dtype=torch.float64).log().view(1, 2, 1)
    for form in (recurrent, parallel, chunked):
        y, end = form(one(1, 10), one(2, 5), one(3, 7), decay)
        assert y.flatten().tolist() == pytest.approx([6.0, 380.0]) and float(end) == pytest.approx(38.0)
        y, end = form(one(1, 10), one(2, 5), one(3, 7), decay, torch.tensor([[0, 1]]), one(8))
        assert y.flatten().tolist() == pytest.approx([8.0, 350.0]) and float(end) == pytest.approx(35.0)


@pytest.mark.rows("S1")
def test_a_fixed_linear_state_space_is_a_convolution():
    """With k and q the same for every token, y is v convolved with ``q k a^n``: two ways to compute one model."""
    T, heads, N, P = 50, 3, 4, 2
    generator = torch.Generator().manual_seed(0)
    b, c = torch.randn(2, heads, N, generator=generator, dtype=torch.float64)
    v = torch.randn(1, T, heads, P, generator=generator, dtype=torch.float64)
    log_decay = -torch.rand(heads, generator=generator, dtype=torch.float64)
    kernel = (b * c).sum(-1)[:, None] * torch.exp(log_decay[:, None] * torch.arange(T))  # (H, T)
    x = F.pad(v[0].permute(1, 2, 0), (T - 1, 0))  # (H, P, T)
    wanted = torch.stack([F.conv1d(x[h][:, None], kernel[h].flip(0)[None, None])[:, 0] for h in range(heads)])
    for form in (recurrent, parallel, chunked):
        y, _ = form(c.expand(1, T, heads, N), b.expand(1, T, heads, N), v, log_decay)
        torch.testing.assert_close(y[0].permute(1, 2, 0), wanted)


@pytest.mark.parametrize("strength", [1e-8, 30.0, 1e4])
def test_no_decay_overflows_in_float32(strength):
    q, k, v, log_decay, segments, state = example(200, dtype=torch.float32, state=True)
    log_decay = log_decay * strength
    exact = (q.double(), k.double(), v.double(), log_decay.double(), segments, state.double())
    wanted = gradients(recurrent, *exact)
    for got, want in zip(gradients(chunked, q, k, v, log_decay, segments, state), wanted, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_sixteen_bits_are_added_up_in_float32():
    case = example(300, decay="none", borders=False, state=False, dtype=torch.bfloat16)
    for form in (recurrent, parallel, chunked):
        y, end = form(*case)
        assert y.dtype == end.dtype == torch.float32
        wanted, _ = recurrent(case[0].double(), case[1].double(), case[2].double())
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


def test_pieces_joined_by_the_state_are_the_whole():
    q, k, v, log_decay, segments, _ = example(30, state=False)
    whole, end = chunked(q, k, v, log_decay, segments, None, 7)
    state: Any = None
    parts, seen = [], torch.zeros(2, 1, dtype=torch.long)
    for a, b in ((0, 3), (3, 4), (4, 21), (21, 30)):
        y, state = chunked(q[:, a:b], k[:, a:b], v[:, a:b], log_decay[:, a:b], segments[:, a:b] - seen, state, 7)
        seen = segments[:, b - 1 : b]
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.rows("S4")
@pytest.mark.parametrize("T, chunk", [(1, 4), (12, 4), (13, 4), (13, 64)])
@pytest.mark.parametrize("scores", [1, 1 << 17])
def test_a_decay_that_is_not_learned_gives_the_same_with_every_gradient(T, chunk, scores, monkeypatch):
    """Without a gradient of the decay and without borders the chunks are walked one by one."""
    monkeypatch.setattr(walk, "SCORES", scores)
    for state in (True, False):
        q, k, v, log_decay, _, h = example(T, 4, 4, "fixed", borders=False, state=state)

        def fixed(form: Any, *more: int, rate: Any = log_decay) -> Any:
            return lambda a, b, c, decay, *rest: form(a, b, c, rate, *rest, *more)

        wanted = gradients(fixed(recurrent), q, k, v, None, None, h)
        for got, want in zip(gradients(fixed(chunked, chunk), q, k, v, None, None, h), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
