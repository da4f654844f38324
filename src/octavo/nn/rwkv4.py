"""RWKV-4's time mixing: an average of the past with weights that fade, one rate a channel."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer, full_precision
from octavo.nn.projection import Projection
from octavo.nn.rwkv_channel import shift_ramp
from octavo.nn.shift import shift, tail
from octavo.nn.state import LayerState, StateField, StateSpec, recurrence_field
from octavo.schema import Config


class Rwkv4(Mixer):
    """``o(sigmoid(r_t) * sum_j p_tj v_j)``, ``p_tj ~ exp(k_j - (t-1-j) w)`` for j < t and ``p_tt ~ exp(k_t + u)``.

    r, k and v are products of ``m x_t + (1 - m) x_{t-1}``, each with its own learnt m (the token shift). w > 0 is
    how fast a channel forgets, u a bonus for the present token; both are learnt, one number a channel
    (Peng et al. 2023, section 3.1). State a channel: numerator, denominator, and the largest
    exponent, by which both are divided. ``plain`` goes token after token; ``chunked`` walks all chunks of about sqrt(T)
    tokens side by side and then joins them.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["rwkv4"] = "rwkv4"
        width: int | None = Field(default=None, ge=1, description="channels of the average; default: d_model")
        chunk: int | None = Field(default=None, ge=1, description="tokens; default: about the root of their number")
        backend: Literal["auto", "plain", "chunked"] = "auto"

    def __init__(self, config: Rwkv4.Config, dims: Dims):
        super().__init__()
        self.config, self.dims, D = config, dims, dims.d_model
        self.width = width = config.width or D
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(D)) for _ in range(3))
        self.decay, self.bonus = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.k, self.v, self.gate = Projection(D, width, "k"), Projection(D, width, "v"), Projection(D, width, "gate")
        self.o = Projection(width, D, "o")

    def reset(self) -> None:
        """The authors' starting values: rates from e^-5 to e^3, a bonus of about log 0.3 that differs by channel."""
        ramp, deep, late = shift_ramp(self.dims)
        place = torch.arange(self.width, dtype=torch.float32)
        with torch.no_grad():
            self.mix_k.copy_(ramp**late)
            self.mix_v.copy_(ramp**late + 0.3 * deep)
            self.mix_r.copy_(ramp ** (0.5 * late))
            self.decay.copy_(-5 + 8 * (place / max(self.width - 1, 1)) ** (0.7 + 1.3 * deep))
            self.bonus.copy_(math.log(0.3) + 0.5 * ((place + 1) % 3 - 1))

    def state_spec(self) -> StateSpec:
        field = recurrence_field((self.width,), self.k.weight)
        return {"x": StateField("row", (self.dims.d_model,)), "num": field, "den": field, "top": field}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        T = x.shape[1]
        back = shift(x, ctx, None if state is None else state.read("x")) - x
        k, v, r = (
            product(x + back * (1 - mix))
            for product, mix in ((self.k, self.mix_k), (self.v, self.mix_v), (self.gate, self.mix_r))
        )
        sums = empty(k)
        if state is not None:  # a new state's zeros are no exponent: of nothing, none is the largest
            num, den, top = (state.read(name) for name in Sums._fields)
            sums = Sums(num, den, top.masked_fill(den == 0, NOTHING))
        # padding, which is last, matters only to what is kept
        valid, starts = (None if state is None else ctx.valid), (ctx.starts if ctx.restarts else None)
        inputs = k, v, full_precision(self.decay).exp(), self.bonus, starts, valid, sums
        if self.config.backend == "plain" or (self.config.backend == "auto" and T == 1):
            y, after = recurrent(*inputs)
        else:
            y, after = chunked(*inputs, self.config.chunk)
        if state is not None:
            state.write(x=tail(x, state.read("x")[:, None], ctx)[:, 0], **after._asdict())
        return self.o(r.sigmoid() * y.to(x.dtype)), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        """The average takes no matrix products."""
        return 2 * n_queries * sum(p.d_in * p.d_out for p in (self.k, self.v, self.gate, self.o))

    def predicted_parameters(self) -> int:
        products = sum(p.n_parameters() for p in (self.k, self.v, self.gate, self.o))
        return products + 3 * self.dims.d_model + 2 * self.width


SECTION = 1024  # tokens: what passes over them finds its intermediate results still in the cache


class Sums(NamedTuple):
    """Numerator and denominator, both divided by e^top; (B, W) each."""

    num: Tensor
    den: Tensor
    top: Tensor


NOTHING = -1e30  # the exponent of what was never seen; finite, so that differences are


def empty(k: Tensor) -> Sums:
    """Nothing seen yet, for k (B, T, W)."""
    zero = torch.zeros_like(full_precision(k[:, 0]))
    return Sums(zero, zero, torch.full_like(zero, NOTHING))


def recurrent(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, starts: Tensor | None, valid: Tensor | None, sums: Sums
) -> tuple[Tensor, Sums]:
    """Token after token: the averages (B, T, W) and the sums after each row's last valid token.

    w and u (W,); ``starts`` (B, T) is True where another document begins; ``valid`` (B, T) False on padding, which
    None says there is none of, or that the sums after are not needed.
    """
    k, v, u = full_precision(k), full_precision(v), full_precision(u)
    num, den, top = (x.to(k.dtype) for x in sums)
    seen = []
    for t, (k_t, v_t) in enumerate(zip(k.unbind(1), v.unbind(1), strict=True)):
        if starts is not None:
            top = top.masked_fill(starts[:, t, None], NOTHING)
        high = torch.maximum(top, k_t + u)
        past, now = (top - high).exp(), (k_t + u - high).exp()
        seen.append((past * num + now * v_t) / (past * den + now))
        high = torch.maximum(top - w, k_t)
        past, now = (top - w - high).exp(), (k_t - high).exp()
        after = past * num + now * v_t, past * den + now, high
        if valid is not None:
            live = valid[:, t, None]
            after = tuple(torch.where(live, new, old) for new, old in zip(after, (num, den, top), strict=True))
        num, den, top = after
    return torch.stack(seen, 1), Sums(num, den, top)


SECTION = 1024  # tokens: what passes over them finds its intermediate results still in the cache


def chunked(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, starts: Tensor | None, valid: Tensor | None, sums: Sums,
    chunk: int | None = None,
) -> tuple[Tensor, Sums]:  # fmt: skip
    """The same, all chunks side by side: as many steps as a chunk has tokens, and as many as there are chunks.

    The largest exponent comes first, by itself. Then both sums are one linear recurrence whose coefficients lie in
    [0, 1] and whose products over any stretch are known in closed form from it, so that nothing overflows.
    """
    size = chunk or math.isqrt(min(k.shape[1], SECTION) - 1) + 1
    length = max(SECTION // size, 1) * size
    parts = k.split(length, 1), v.split(length, 1)
    flags = [[None] * len(parts[0]) if x is None else x.split(length, 1) for x in (starts, valid)]
    seen = []
    for k_part, v_part, begin, live in zip(*parts, *flags, strict=True):
        y, sums = _section(k_part, v_part, begin, live, w, full_precision(u), sums, size)
        seen.append(y)
    return torch.cat(seen, 1), sums


def _section(
    k: Tensor, v: Tensor, starts: Tensor | None, valid: Tensor | None, w: Tensor, u: Tensor, sums: Sums, size: int
) -> tuple[Tensor, Sums]:
    T, (num, den, top) = k.shape[1], (full_precision(x) for x in sums)
    k, v = _in_chunks(full_precision(k), size), _in_chunks(full_precision(v), size)
    drop = -w.expand(1, 1, size, -1)  # what each token takes from the exponents before it
    reset = torch.zeros((), dtype=k.dtype, device=k.device)
    live = None if valid is None else _in_chunks(valid[..., None], size)
    if live is not None:
        k, drop = k.masked_fill(~live, NOTHING), drop * live
    if starts is not None:
        reset = torch.zeros_like(k[..., :1]).masked_fill(_in_chunks(starts[..., None], size), NOTHING)
        drop = drop + reset
    through = drop.cumsum(2)

    with torch.no_grad():  # the largest exponent: it cancels, and so do its gradients
        local, m = [], torch.full_like(k[:, :, 0], NOTHING)
        for k_t, drop_t in zip(k.unbind(2), drop.expand_as(k).unbind(2), strict=True):
            m = torch.maximum(m + drop_t, k_t)
            local.append(m)
        entries, m = [], top
        for end, drop_n in zip(local[-1].unbind(1), through.expand_as(k)[:, :, -1].unbind(1), strict=True):
            entries.append(m)
            m = torch.maximum(m + drop_n, end)
        entry = torch.stack(entries, 1)[:, :, None]  # before each chunk
        high = torch.maximum(torch.stack(local, 2), entry + through)
        high_before = torch.cat([entry, high[:, :, :-1]], 2)

    keep, now = (high_before + drop - high).exp(), (k - high).exp()
    now = now if live is None else now * live
    state, within = torch.zeros_like(k[:, :, 0]).expand(2, *k[:, :, 0].shape), []
    for x_t, keep_t in zip(torch.stack([now * v, now]).unbind(3), keep.unbind(2), strict=True):
        within.append(state)
        state = torch.addcmul(x_t, keep_t, state)
    last = (entry + through[:, :, -1:] - high[:, :, -1:]).exp()[:, :, 0]
    held, found = torch.stack([num, den]), []
    for end, kept in zip(state.unbind(2), last.unbind(1), strict=True):
        found.append(held)
        held = torch.addcmul(end, kept, held)
    carried = (entry + torch.cat([torch.zeros_like(through[:, :, :1]), through[:, :, :-1]], 2) - high_before).exp()
    num, den = (torch.stack(within, 3) + carried * torch.stack(found, 2)[:, :, :, None]).unbind(0)

    best = torch.maximum(high_before + reset, k.detach() + u.detach())
    past, now = (high_before + reset - best).exp(), (k + u - best).exp()
    y = (past * num + now * v) / (past * den + now)
    return y.flatten(1, 2)[:, :T], Sums(held[0], held[1], m)


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, C) as (B, N, size, C), zeros at the end."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
