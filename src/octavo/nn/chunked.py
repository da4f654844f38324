"""One linear recurrence with a decay per head and token, in three forms that are equal: read, squared, in chunks.

``h_t = a_t h_{t-1} + k_t v_t^T,  y_t = q_t h_t`` with a_t in (0, 1]: linear attention (a = 1), retention (a fixed per
head) and Mamba-2 (a depends on the token). Shapes, also of every function below:

    q, k        (B, T, G, N)    G divides H; one query and key serve H / G heads and are never copied for them
    v           (B, T, H, P)
    log_decay   (B or 1, T, H), finite, at most 0; (H,) is the same for every token; None is no decay
    segments    (B, T) int, not decreasing: the state begins at zero where they change; None is one document.
                0 continues ``state``.
    state       (B, H, N, P) or None for zero
    returns     y (B, T, H, P) and the state after the last token (B, H, N, P), in float32 or wider
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import Context, full_precision
from octavo.nn.fixed_decay import fixed_decay
from octavo.nn.shift import segments as segments_of

Form = Literal["auto", "plain", "parallel", "chunked"]
SPAN = 1024  # tokens of a row worked on at a time: what lies between the products of a span stays in the caches


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    heads = v.shape[2] // q.shape[2]
    q, k, v = (full_precision(x) for x in (q.repeat_interleave(heads, 2), k.repeat_interleave(heads, 2), v))
    h = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if state is None else state.to(v.dtype)
    decay = None if log_decay is None else _by_token(log_decay, v.shape[1]).exp()
    out = []
    for t in range(v.shape[1]):
        if segments is not None:
            before = segments[:, t - 1] if t else 0
            h = h * (segments[:, t] == before)[:, None, None, None]
        if decay is not None:
            h = h * decay[:, t, :, None, None]
        h = h + k[:, t, :, :, None] @ v[:, t, :, None, :]
        out.append((q[:, t, :, None, :] @ h)[:, :, 0])
    return torch.stack(out, 1), h


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, starts: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, T = 1, in as few passes over the state as there can be. ``starts`` (B, 1): a document begins there."""
    (B, _, H, P), (G, N) = v.shape, q.shape[2:]
    q, k, v = (full_precision(x[:, 0]) for x in (q, k, v))
    k, v = k[:, :, None, :, None], v.unflatten(1, (G, -1))[..., None, :]
    left = (~starts).to(v.dtype) if log_decay is None else _by_token(log_decay, 1)[:, 0].exp() * ~starts
    h = (state.to(v.dtype) * left.expand(B, H)[..., None, None]).unflatten(1, (G, -1)).addcmul_(k, v)
    y = q[:, :, None, None] @ h
    return y.view(B, 1, H, P), h.view(B, H, N, P)


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Like attention: ``y = (q k^T * D) v`` with ``D_ts = a_{s+1} ... a_t`` for s <= t. Memory grows with T^2."""
    heads, T = v.shape[2] // q.shape[2], v.shape[1]
    q, k, v = (
        full_precision(x).transpose(1, 2) for x in (q.repeat_interleave(heads, 2), k.repeat_interleave(heads, 2), v)
    )
    total = v.new_zeros(1, 1, T) if log_decay is None else _by_token(log_decay, T).cumsum(1).transpose(1, 2)
    allowed = torch.ones(T, T, dtype=torch.bool, device=v.device).tril()
    decay = torch.where(allowed, total[..., :, None] - total[..., None, :], -torch.inf).exp()
    if segments is not None:
        decay = decay * (segments[:, :, None] == segments[:, None, :])[:, None]
    y, end = (q @ k.transpose(2, 3) * decay) @ v, k.transpose(2, 3) @ (v * decay[:, :, -1, :, None])
    if state is not None:
        carried = total.exp()
        if segments is not None:
            carried = carried * (segments == 0)[:, None]
        y = y + q @ state.to(v.dtype) * carried[..., None]
        end = end + state.to(v.dtype) * carried[:, :, -1, None, None]
    return y.transpose(1, 2), end


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Matrix products: the squared form inside chunks of ``chunk`` tokens, the recurrence between them.

    Source: Dao and Gu 2024 (Mamba-2), section 6, and Sun et al. 2023 (RetNet), equation 7. Only differences of summed
    log-decays that are at most 0 are exponentiated. Ours works in float32 or wider, takes any length, keeps
    documents apart, and has its gradient written out: nothing of size chunk x chunk is summed over for the decays.
    """
    T, at_once = v.shape[1], max(1, SPAN // chunk) * chunk
    if log_decay is not None and log_decay.dim() == 1 and not log_decay.requires_grad:
        if segments is None and q.shape[2] == v.shape[2]:
            q, k, v = (full_precision(x) for x in (q, k, v))
            return fixed_decay(q, k, v, log_decay.to(v.dtype), None if state is None else state.to(v.dtype), chunk)
    if at_once >= T:
        return _span(q, k, v, log_decay, segments, state, min(chunk, T))
    by_token = log_decay is not None and log_decay.dim() == 3
    cuts = [x.split(at_once, 1) for x in (q, k, v)]  # not sliced: a slice's gradient is as long as the row
    decays = log_decay.split(at_once, 1) if log_decay is not None and by_token else [log_decay] * len(cuts[0])
    parts = []
    for i, (q, k, v, decay) in enumerate(zip(*cuts, decays, strict=True)):
        own, begin = segments, i * at_once
        if segments is not None:  # counted from the one that the state belongs to
            own = segments[:, begin : begin + at_once] - (segments[:, begin - 1 : begin] if begin else 0)
        y, state = _span(q, k, v, decay, own, state, chunk)
        parts.append(y)
    return torch.cat(parts, 1), state  # type: ignore[return-value]


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    ctx: Context,
    state: Tensor | None = None,
    *,
    form: Form = "auto",
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence over the tokens of ``ctx`` in a form of choice: padding changes nothing, documents stay apart."""
    if not ctx.plain:  # padding stores nothing and forgets nothing
        k = k * ctx.valid[:, :, None, None].to(k.dtype)
        if log_decay is not None:
            log_decay = _by_token(log_decay, v.shape[1]) * ctx.valid[:, :, None]
    if form == "auto" and v.shape[1] == 1 and state is not None:  # without one the decay would get no gradient at all
        y, end = step(q, k, v, log_decay, ctx.starts, state)
        return y.to(v.dtype), end
    segments = segments_of(ctx) if ctx.restarts or state is not None else None
    if form == "plain":
        y, end = recurrent(q, k, v, log_decay, segments, state)
    elif form == "parallel":
        y, end = parallel(q, k, v, log_decay, segments, state)
    else:
        y, end = chunked(q, k, v, log_decay, segments, state, chunk)
    return y.to(v.dtype), end


def _by_token(log_decay: Tensor, T: int) -> Tensor:
    """(B or 1, T, H), also from (H,)."""
    return full_precision(log_decay.expand(1, T, -1) if log_decay.dim() == 1 else log_decay)


def _span(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, segments: Tensor | None, state: Tensor | None, C: int
) -> tuple[Tensor, Tensor]:
    """Cut into n chunks of C tokens, (n, B, G, C, ...), and back."""
    B, T, H, P = v.shape
    G, n = q.shape[2], -(-T // C)
    missing, R = n * C - T, H // G
    if log_decay is not None and log_decay.dim() == 1 and missing:
        log_decay = log_decay.expand(1, T, H)
    if missing:  # like padding
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
        if log_decay is not None:
            log_decay = F.pad(log_decay, (0, 0, 0, missing))
        if segments is not None:
            segments = torch.cat([segments, segments[:, -1:].expand(B, missing)], 1)
    q, k = (full_precision(x).reshape(B, n, C, G, -1).permute(1, 0, 3, 2, 4).contiguous() for x in (q, k))
    v = full_precision(v).reshape(B, n, C, G, R, P).permute(1, 0, 3, 2, 4, 5).contiguous()
    if log_decay is not None and log_decay.dim() == 1:
        order = torch.arange(1, C + 1, device=v.device, dtype=v.dtype)
        summed = (order[:, None] * log_decay.to(v.dtype)).reshape(1, 1, C, G, R).permute(0, 1, 3, 2, 4)
    elif log_decay is not None:
        summed = log_decay.to(v.dtype).reshape(-1, n, C, G, R).cumsum(2).permute(1, 0, 3, 2, 4)
    else:
        summed = None
    if segments is not None:
        segments = segments.reshape(B, n, C).transpose(0, 1)
    if state is not None:
        state = state.to(v.dtype).reshape(B, G, R, -1, P).transpose(2, 3)
    y, end = _Chunks.apply(q, k, v, summed, segments, state)  # type: ignore[misc]
    y = y.permute(1, 0, 3, 2, 4, 5).reshape(B, n * C, H, P)
    return y[:, :T] if missing else y, end.transpose(2, 3).reshape(B, H, -1, P)


class _Weights(NamedTuple):
    """What is left of a token: ``inner`` (.., C, C) of s at t, ``begin`` of the state before the chunk at t, ``end`` of
    s after the chunk, both (n, .., C, R, 1), ``whole`` of the state after the chunk, (n, .., 1, R, 1). None: all."""

    inner: Tensor
    begin: Tensor | None
    end: Tensor | None
    whole: Tensor | None


def _weights(v: Tensor, summed: Tensor | None, segments: Tensor | None) -> _Weights:
    n, C = v.shape[0], v.shape[3]
    same = torch.ones(C, C, dtype=torch.bool, device=v.device).tril()
    if segments is not None:
        before = F.pad(segments[:-1, :, -1], (0, 0, 1, 0))[..., None]
        same = (same & (segments[..., :, None] == segments[..., None, :]))[:, :, None, None]
        begin, end = ((segments == s)[:, :, None, :, None, None].to(v.dtype) for s in (before, segments[..., -1:]))
        whole = (before == segments[..., -1:])[:, :, None, :, None, None].to(v.dtype)
    else:
        begin = end = whole = None
    if summed is None:
        return _Weights(same.to(v.dtype), begin, end, whole)
    by_head, last = summed.transpose(-1, -2), summed[..., -1:, :]
    barred = torch.zeros_like(same, dtype=v.dtype).masked_fill_(~same, -torch.inf)  # a sum is faster than a choice
    inner = (by_head[..., :, None] - by_head[..., None, :]).add(barred).exp_()
    decays = [x.exp()[..., None] for x in (summed, last - summed, last)]
    if begin is not None:
        decays = [a * b for a, b in zip(decays, (begin, end, whole))]  # type: ignore[operator]
    return _Weights(inner, *(x.expand(n, *x.shape[1:]) for x in decays))


def _weigh(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _scores(q: Tensor, k: Tensor, w: _Weights) -> Tensor:
    """(n, B, G, R, C, C), or 1 for R where no head has decays of its own."""
    return (q @ k.transpose(3, 4))[:, :, :, None] * w.inner


class _Chunks(torch.autograd.Function):
    """q, k (n, B, G, C, N), v (n, B, G, C, R, P), summed log-decays (n or 1, B or 1, G, C, R), segments (n, B, C),
    state (B, G, N, R, P): y like v, and the state after the last chunk. R heads share a group's query and key."""

    @staticmethod
    def forward(ctx, q, k, v, summed, segments, state):  # type: ignore[no-untyped-def]
        w = _weights(v, summed, segments)
        y = (_scores(q, k, w) @ v.transpose(3, 4)).transpose(3, 4)
        kept = k.transpose(3, 4) @ _weigh(v, w.end).flatten(4)
        kept = kept.view(*kept.shape[:4], *v.shape[4:])  # (n, B, G, N, R, P), after each chunk
        for i in range(len(kept)):
            before = kept[i - 1] if i else state
            if before is not None:
                _add(kept[i], before, w.whole, i)
        if len(kept) > 1:
            _add(y[1:], (q[1:] @ kept[:-1].flatten(4)).view_as(y[1:]), w.begin, slice(1, None))
        if state is not None:
            _add(y[0], (q[0] @ state.flatten(3)).view_as(y[0]), w.begin, 0)
        ctx.save_for_backward(q, k, v, summed, state, kept, y, *w)
        ctx.set_materialize_grads(False)
        return y, kept[-1].clone()

    @staticmethod
    def backward(ctx, dy, d_end):  # type: ignore[no-untyped-def]
        q, k, v, summed, state, kept, y, *rest = ctx.saved_tensors
        w, n = _Weights(*rest), len(q)
        dy = torch.zeros_like(v) if dy is None else dy
        by_head = dy.transpose(3, 4).contiguous()
        dv = (_scores(q, k, w).transpose(4, 5) @ by_head).transpose(3, 4)
        d_scores = (by_head @ v.transpose(3, 4).transpose(4, 5)).mul_(w.inner)
        d_scores = d_scores.sum(3) if d_scores.shape[3] > 1 else d_scores[:, :, :, 0]
        dq, dk = d_scores @ k, d_scores.transpose(3, 4) @ q

        # dh[i] is the gradient of the state before chunk i, from what chunk i reads and what it hands on.
        read = _weigh(dy, w.begin).flatten(4)
        dh = (q.transpose(3, 4) @ read).view_as(kept)
        for i in reversed(range(n)):
            after = dh[i + 1] if i + 1 < n else d_end
            if after is not None:
                _add(dh[i], after, w.whole, i)
        if n > 1:
            dq[1:] += read[1:] @ kept[:-1].flatten(4).transpose(3, 4)
        if state is not None:
            dq[0] += read[0] @ state.flatten(3).transpose(2, 3)

        stored = [(slice(0, n - 1), dh[1:])] if n > 1 else []
        stored += [(slice(n - 1, n), d_end[None])] if d_end is not None else []
        for part, d_kept in stored:
            flat, end = d_kept.flatten(4), None if w.end is None else w.end[part]
            dk[part] += _weigh(v[part], end).flatten(4) @ flat.transpose(3, 4)
            _add(dv[part], (k[part] @ flat).view_as(v[part]), w.end, part)

        d_summed = None
        if summed is not None:
            # Every term of y_t has the factor exp(summed_t), every term with v_s the factor exp(-summed_s), and every
            # term of the state after a chunk the factor exp(summed at its last token).
            d_summed = (dy * y).sum(-1) - (dv * v).sum(-1)
            for part, d_kept in stored:
                d_summed[part, :, :, -1] += (d_kept * kept[part]).sum((3, 5))
            d_summed = d_summed.sum_to_size(summed.shape)
        return dq, dk, dv, d_summed, None, dh[0] if state is not None else None


def _add(to: Tensor, x: Tensor, weight: Tensor | None, at: int | slice) -> None:
    """In place: ``to += weight[at] x``."""
    if weight is None:
        to.add_(x)
    else:
        to.addcmul_(x, weight[at])
