"""A memory of outer products with a decay per key channel: the recurrence of GLA and RWKV-6, in two forms.

``h_t = diag(exp(g_t)) h_{t-1} + k_t v_t^T`` and ``y_t = h_t^T q_t``; with a bonus u (RWKV) the reading comes before the
decay, ``y_t = (h_{t-1} + diag(u) k_t v_t^T)^T q_t``. q, k, g (B, T, H, K) with g <= 0, v (B, T, H, V), u (H, K),
h (B, H, K, V). ``starts`` (B, T) is True where another document begins: h is nothing there. All in float32 or wider.
"""

from __future__ import annotations

import typing
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from octavo.nn.contracts import full_precision


def _power_of_two(n: int) -> int:
    if n & (n - 1):
        raise ValueError(f"{n} is not a power of two; use {1 << (n.bit_length() - 1)} or {1 << n.bit_length()}")
    return n


SECTION = 1024  # tokens: what passes over them finds its intermediate results still in the cache

ChunkLength = Annotated[int, Field(ge=1), AfterValidator(_power_of_two)]


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, starts: Tensor | None = None, before: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token after token, as the formula stands: y (B, T, H, V) and the last h. ``before`` is h before the first."""
    q, k, v, g = (full_precision(x) for x in (q, k, v, g))
    B, _, H, K = k.shape
    h = v.new_zeros(B, H, K, v.shape[-1]) if before is None else before.to(v.dtype)
    seen = []
    for t, (q_t, k_t, v_t, decay) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, g.exp())), strict=True)):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None, None], 0.0)
        new = k_t[..., :, None] @ v_t[..., None, :]
        after = decay[..., None] * h + new
        read = after if bonus is None else h + bonus[..., None] * new
        seen.append((q_t[..., None, :] @ read)[..., 0, :])
        h = after
    return torch.stack(seen, 1), h


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, starts: Tensor | None = None, before: Tensor | None = None,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token, T = 1, in as few passes over h as there can be."""
    if before is None:
        return recurrent(q, k, v, g, starts, before, bonus)
    q, k, v, g = (full_precision(x[:, 0]) for x in (q, k, v, g))
    h, decay = before.to(v.dtype), g.exp()
    old = None if starts is None else (~starts)[..., None].to(v.dtype)  # 0 where a document begins
    decay = decay if old is None else decay * old
    after = (h * decay[..., None]).addcmul_(k[..., None], v[..., None, :])
    if bonus is None:
        return (q[..., None, :] @ after).transpose(1, 2), after
    read = (q if old is None else q * old)[..., None, :] @ h
    at_once = (q * bonus * k).sum(-1, keepdim=True) * v
    return (read[..., 0, :] + at_once)[:, None], after


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, starts: Tensor | None = None, before: Tensor | None = None,
    bonus: Tensor | None = None, *, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in matrix products, chunk by chunk.

    Within a chunk, blocks of 1, 2, 4 ... tokens are joined in pairs: the second block reads the first through the
    border between them, ``(q exp(into)) (k exp(out))^T``, where ``into`` sums the decays from the border to the reader
    and ``out`` those from the writer to the border. Both are sums of what is <= 0 and are never got by subtraction,
    so that nothing overflows however strong the decay, and a document that begins is a decay of -inf. (Yang et al.
    2023, section 4.3, takes one reference a sub-chunk instead and computes diagonal blocks entry by entry.)
    """
    h, parts = before, []
    length = max(SECTION, chunk)
    inputs = [x.split(length, 1) for x in (q, k, v, g)]
    begins = [None] * len(inputs[0]) if starts is None else starts.split(length, 1)
    for q_part, k_part, v_part, g_part, begin in zip(*inputs, begins, strict=True):
        y, h = _section(q_part, k_part, v_part, g_part, begin, h, bonus, chunk)
        parts.append(y)
    return torch.cat(parts, 1), typing.cast(Tensor, h)


def _section(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, starts: Tensor | None, before: Tensor | None, bonus: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, H = q.shape[1:3]
    size = min(chunk, 1 << (T - 1).bit_length())
    shape = (q.shape[0], H, -1)
    q, k, v, g = (F.pad(full_precision(x).transpose(1, 2), (0, 0, 0, -T % size)).contiguous() for x in (q, k, v, g))
    K = q.shape[-1]
    reset = torch.zeros((), dtype=g.dtype, device=g.device).expand(g.shape)
    if starts is not None:
        reset = torch.zeros(starts.shape, dtype=g.dtype, device=g.device).masked_fill(starts, float("-inf"))
        reset = F.pad(reset, (0, -T % size))[:, None, :, None].expand(g.shape)
    whole = (g if starts is None else g + reset)[..., None, :]  # each block's decay from border to border
    into = whole if bonus is None else reset[..., None, :]
    out = torch.zeros_like(g)[..., None, :]
    at_once = q * k if bonus is None else q * k * full_precision(bonus)[:, None]
    scores, width = at_once.sum(-1)[..., None, None], 1
    while width < size:
        (_, q2), (k1, _) = (x.view(*shape, 2, width, K).unbind(3) for x in (q, k))
        (into1, into2), (out1, out2) = _pairs(into), _pairs(out)
        (whole1, whole2), (scores1, scores2) = _pairs(whole), _pairs(scores)
        across = (q2 * into2.exp()) @ (k1 * out1.exp()).mT
        scores = torch.cat([F.pad(scores1, (0, width)), torch.cat([across, scores2], 4)], 3)
        into, out = torch.cat([into1, into2 + whole1], 3), torch.cat([out1 + whole2, out2], 3)
        whole, width = whole1 + whole2, 2 * width
    q, k, v = (x.view(*shape, size, x.shape[-1]) for x in (q, k, v))
    written = ((k * out.exp()).mT @ v).unbind(2)
    kept = whole.exp().mT.unbind(2)
    h = torch.zeros_like(written[0]) if before is None else before.to(v.dtype)
    found = []
    for decay, new in zip(kept, written, strict=True):
        found.append(h)
        h = decay * h + new
    y = scores @ v + (q * into.exp()) @ torch.stack(found, 2)
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2), h


def _pairs(x: Tensor) -> tuple[Tensor, ...]:
    """(B, H, blocks, n, C) as first and second blocks, (B, H, blocks / 2, n, C) each."""
    return x.unflatten(2, (-1, 2)).unbind(3)
