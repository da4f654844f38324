"""The recurrence of nn/chunked.py where the decay is a constant of each head: a walk over the chunks of one document.

``h_t = g h_{t-1} + k_t v_t^T,  y_t = q_t h_t``. What is left of a token depends on its distance only, so one table
serves all chunks; nothing is laid out anew, and what lies between two products of a chunk stays in the nearest cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCORES = 1 << 17  # rows are taken together while their scores in a chunk are fewer


class _Left(NamedTuple):
    """What is left at t of s (B H, C, C), at t of the state before the chunk and after the chunk of s (C, H, N), and of
    the state before it (B H, 1, 1)."""

    inner: Tensor
    begin: Tensor
    end: Tensor
    whole: Tensor


def fixed_decay(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """As nn/chunked.py says, with a key for each head, q, k (B, T, H, N), and log_decay (H,), which is not learned."""
    B, T, H, P = v.shape
    C = min(chunk, T)
    powers = (log_decay[:, None] * torch.arange(C + 1, device=v.device)).exp()  # g^0 to g^C
    before = v.new_zeros(B, H, q.shape[3], P) if state is None else state
    rows = (x.split(max(1, SCORES // (H * C * C))) for x in (q, k, v, before))
    parts = [_Walk.apply(*row, powers) for row in zip(*rows, strict=True)]  # type: ignore[misc]
    if len(parts) == 1:
        return parts[0]
    y, end = zip(*parts, strict=True)
    return torch.cat(y), torch.cat(end)


def _table(powers: Tensor, like: Tensor) -> _Left:
    """For a chunk of q or k (B, C, H, N). As wide as these, so that weighing runs over memory in its order."""
    B, C, _, N = like.shape
    order = torch.arange(C, device=powers.device)
    inner = powers[:, (order[:, None] - order).clamp(min=0)].tril()
    begin, end = (x.T[..., None].expand(-1, -1, N) for x in (powers[:, 1 : C + 1], powers[:, :C].flip(1)))
    return _Left(inner.repeat(B, 1, 1), begin.contiguous(), end.contiguous(), powers[:, C, None, None].repeat(B, 1, 1))


def _tables(powers: Tensor, q: Tensor) -> list[tuple[slice, _Left]]:
    """The tokens of each chunk and its table."""
    T, C = q.shape[1], powers.shape[1] - 1
    whole, over = T // C, T % C
    found = [(slice(i * C, (i + 1) * C), left) for left in [_table(powers, q[:, :C])] for i in range(whole)]
    return [*found, (slice(T - over, T), _table(powers, q[:, :over]))] if over else found


def _heads(x: Tensor) -> Tensor:
    """(B, C, H, N) to (B H, C, N): a view where there is one row, which a product takes as it is."""
    return x.transpose(1, 2).flatten(0, 1)


def _tokens(x: Tensor, B: int) -> Tensor:
    return x.unflatten(0, (B, -1)).transpose(1, 2)


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, state, powers):  # type: ignore[no-untyped-def]
        B, y, h, before = len(v), torch.empty_like(v, memory_format=torch.contiguous_format), state.flatten(0, 1), []
        for at, left in _tables(powers, q):
            qs, ks, vs = (_heads(x[:, at]) for x in (q, k, v))
            scores = torch.bmm(qs, ks.mT).mul_(left.inner)
            y[:, at] = _tokens(torch.bmm(_heads(q[:, at] * left.begin), h).baddbmm_(scores, vs), B)
            before.append(h)
            h = (h * left.whole).baddbmm_(_heads(k[:, at] * left.end).mT, vs)
        ctx.save_for_backward(q, k, v, powers, *before)
        ctx.set_materialize_grads(False)
        return y, h.view_as(state)

    @staticmethod
    def backward(ctx, dy, dh):  # type: ignore[no-untyped-def]
        q, k, v, powers, *before = ctx.saved_tensors
        B = len(v)
        dy = torch.zeros_like(v) if dy is None else dy
        dh = torch.zeros_like(before[0]) if dh is None else dh.flatten(0, 1)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for (at, left), h in zip(reversed(_tables(powers, q)), reversed(before), strict=True):
            qs, ks, vs, dys = (_heads(x[:, at]) for x in (q, k, v, dy))
            scores = torch.bmm(qs, ks.mT).mul_(left.inner)
            d_scores = torch.bmm(dys, vs.mT).mul_(left.inner)
            # dh is the gradient of the state after this chunk, then of the state before it.
            dv[:, at] = _tokens(torch.bmm(_heads(k[:, at] * left.end), dh).baddbmm_(scores.mT, dys), B)
            dq[:, at] = _tokens(torch.bmm(dys, h.mT), B)
            dq[:, at].mul_(left.begin).add_(_tokens(torch.bmm(d_scores, ks), B))
            dk[:, at] = _tokens(torch.bmm(vs, dh.mT), B)
            dk[:, at].mul_(left.end).add_(_tokens(torch.bmm(d_scores.mT, qs), B))
            dh = (dh * left.whole).baddbmm_(_heads(q[:, at] * left.begin).mT, dys)
        return dq, dk, dv, dh.unflatten(0, (B, -1)), None
