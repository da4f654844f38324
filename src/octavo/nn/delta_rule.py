"""The delta rule, with or without a decay a head: a memory that replaces what it held for a key.

``h_t = a_t h_{t-1} + k_t (b_t (v_t - (a_t h_{t-1})^T k_t))^T`` and ``y_t = h_t^T q_t`` with a_t = exp(g_t), g <= 0.
q, k (B, T, H, K), v (B, T, H, V), b and g (B, T, H), h (B, H, K, V). Without g nothing fades. ``starts`` (B, T) is True
where another document begins: h is nothing there. All in float32 or wider. Sources: Schlag et al. 2021, section 4.2;
Yang et al. 2024 (gated delta networks), section 3.
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import full_precision

SECTION = 1024  # tokens: what passes over them finds its intermediate results still in the cache


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None = None, starts: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token after token, as the formula stands: y (B, T, H, V) and the last h. ``before`` is h before the first."""
    q, k, v, b = (full_precision(x) for x in (q, k, v, b))
    B, _, H, K = k.shape
    h = v.new_zeros(B, H, K, v.shape[-1]) if before is None else before.to(v.dtype)
    decay = None if g is None else full_precision(g).exp()[..., None, None]
    seen = []
    for t, (q_t, k_t, v_t, b_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, b)), strict=True)):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None, None], 0.0)
        if decay is not None:
            h = decay[:, t] * h
        error = v_t[..., None, :] - k_t[..., None, :] @ h
        h = h + k_t[..., :, None] @ (b_t[..., None, None] * error)
        seen.append((q_t[..., None, :] @ h)[..., 0, :])
    return torch.stack(seen, 1), h


def chunked(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None = None, starts: Tensor | None = None,
    before: Tensor | None = None, *, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in matrix products, chunk by chunk (Yang et al. 2024: DeltaNet, section 3; gated, section 3.3).

    What a chunk's tokens write, ``e``, solves ``(1 + tril(b k k^T D, -1)) e = b v - b A k h``, with D the decay from
    writer to reader and A from the chunk's start: all chunks are solved at once, by forward substitution. (The series
    ``(1 - L)(1 + L^2)(1 + L^4) ...`` is products alone, but where keys repeat its terms grow beyond what float32 can
    cancel.) Decays are sums of what is <= 0, never differences; a document that begins is a decay of -inf.
    """
    length, h, parts = max(SECTION, chunk), before, []
    inputs = [x.split(length, 1) for x in (q, k, v, b)]
    flags = [[None] * len(inputs[0]) if x is None else x.split(length, 1) for x in (g, starts)]
    for q_part, k_part, v_part, b_part, g_part, begin in zip(*inputs, *flags, strict=True):
        y, h = _section(q_part, k_part, v_part, b_part, g_part, begin, h, chunk)
        parts.append(y)
    return torch.cat(parts, 1), typing.cast(Tensor, h)


def _section(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, starts: Tensor | None, before: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, dtype = q.shape[1], full_precision(v).dtype
    size = min(chunk, T)

    def cut(x: Tensor) -> Tensor:  # (B, T, H, C) to (B, H, N, size, C)
        return F.pad(full_precision(x).transpose(1, 2), (0, 0, 0, -T % size)).unflatten(2, (-1, size)).contiguous()

    q, k, v, b = cut(q), cut(k), cut(v), cut(b[..., None])
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if g is None and starts is None:
        between, into = past.to(dtype), torch.ones_like(b)
    else:
        log = torch.zeros_like(b) if g is None else cut(g[..., None])
        if starts is not None:
            reset = torch.zeros(starts.shape, dtype=dtype, device=q.device).masked_fill(starts, float("-inf"))
            log = log + cut(reset[..., None, None])
        # the decay from token j to token i is the sum over j < m <= i
        between = log.expand(*log.shape[:-1], size).masked_fill(~past.tril(-1), 0.0).cumsum(-2)
        between, into = between.exp() * past, log.cumsum(-2).exp()
    out, whole = between[..., -1, :, None], into[..., -1:, :]
    system = (b * k) @ k.mT * between
    solved = torch.linalg.solve_triangular(system, b * torch.cat([v, into * k], -1), upper=False, unitriangular=True)
    values, reads = solved.split([v.shape[-1], k.shape[-1]], -1)
    h = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]) if before is None else before.to(dtype)
    found, written = [], []
    for new, read, k_out, decay in zip(
        values.unbind(2),
        reads.unbind(2),
        (k * out).mT.unbind(2),
        whole.expand(*b.shape[:3], 1, 1).unbind(2),
        strict=True,
    ):
        found.append(h)
        written.append(new - read @ h)
        h = decay * h + k_out @ written[-1]
    y = (q * into) @ torch.stack(found, 2) + (q @ k.mT * between) @ torch.stack(written, 2)
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2), h
