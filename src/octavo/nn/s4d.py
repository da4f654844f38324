"""S4D: a diagonal linear state space per channel, as a recurrence, in chunks, or as a long convolution."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer, full_precision
from octavo.nn.convolution import long_convolution, masked_convolution, toeplitz
from octavo.nn.projection import Projection
from octavo.nn.shift import n_valid, segments
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config

CHUNK = 32


class Discrete(NamedTuple):
    """A diagonal system in discrete time: ``h_t = e^z h_{t-1} + b u_t``, ``y_t = 2 Re(c h_t)``; complex (D, N) each."""

    z: Tensor
    b: Tensor
    c: Tensor

    def powers(self, n: int) -> Tensor:
        """``e^{z l}`` for l < n, (D, N, n)."""
        return (self.z[..., None] * torch.arange(n, device=self.z.device)).exp()


def zero_order_hold(a: Tensor, b: Tensor, c: Tensor, step: Tensor) -> Discrete:
    """``h' = a h + b u`` sampled with u constant over each ``step``: a, b, c complex (D, N), step (D,)."""
    z = a * step[:, None]
    return Discrete(z, torch.expm1(z) / a * b, c)


def recurrence(u: Tensor, system: Discrete, ctx: Context, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """The plain twin, token by token: u (B, T, D), h (B, D, N) to y (B, T, D) and the last h."""
    decay, ys = system.z.exp(), []
    h = torch.zeros_like(u[:, 0, :, None] * system.b) if h is None else h
    for t, now in enumerate(u.unbind(1)):
        h = torch.where(ctx.starts[:, t, None, None], 0.0, h)
        new = decay * h + system.b * now[..., None]
        h = torch.where(ctx.valid[:, t, None, None], new, h)
        ys.append(2 * (system.c * h).real.sum(-1))
    return torch.stack(ys, 1), h


def kernel(system: Discrete, n: int) -> Tensor:
    """The system's answer to a single one, ``K_l = 2 Re(c e^{zl} b)`` for l < n: (D, n).

    Powers of l = CHUNK i + j are products of two: no (D, N, n) tensor is made.
    """
    blocks = -(-n // CHUNK)
    coarse = ((system.z * CHUNK)[..., None] * torch.arange(blocks, device=system.z.device)).exp()
    coarse = (system.c * system.b)[..., None] * coarse
    return _real_product(coarse.transpose(1, 2), system.powers(CHUNK)).flatten(1)[:, :n]


def _real_product(p: Tensor, q: Tensor) -> Tensor:
    """``2 Re(p q)`` as one real product: complex (D, R, N) and (D, N, S) to (D, R, S)."""
    p = torch.view_as_real(p.conj().resolve_conj()).flatten(-2)
    return 2 * p @ torch.view_as_real(q).transpose(2, 3).flatten(1, 2)


def chunked(u: Tensor, system: Discrete, ctx: Context, h: Tensor | None, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The recurrence as matrix products: a convolution inside chunks, states from chunk to chunk. Exactly causal.

    Returns y (B, T, D) and, if ``keep``, the state after each row's last valid token, (B, D, N).
    """
    B, T, D = u.shape
    N, count = system.z.shape[1], -(-T // CHUNK)
    size = count * CHUNK
    x = F.pad(u, (0, 0, 0, size - T))
    powers, response = system.powers(CHUNK + 1), kernel(system, CHUNK)
    by_channel = x.view(B, count, CHUNK, D).permute(3, 2, 0, 1)  # (D, CHUNK, B, count)
    joined = by_channel.reshape(D, CHUNK, -1)

    local = None
    if ctx.restarts or h is not None:  # documents counted from each chunk's first token, whose own start is 1
        local = F.pad(ctx.starts, (0, size - T)).view(B, count, CHUNK).cumsum(2)
        inside = masked_convolution(x.transpose(1, 2), response, local.flatten(1), CHUNK).transpose(1, 2)
        last = (local == local[..., -1:]).permute(2, 0, 1).to(u.dtype)  # (CHUNK, B, count): its last document
        joined = (by_channel * last).reshape(D, CHUNK, -1)
    else:
        inside = toeplitz(F.pad(response, (CHUNK - 1, 0))) @ joined
        inside = inside.view(D, CHUNK, B, count).permute(2, 3, 1, 0).reshape(B, size, D)

    into = torch.view_as_real(system.b[..., None] * powers[..., :CHUNK].flip(-1)).transpose(2, 3)  # (D, N, 2, CHUNK)
    added = (into.flatten(1, 2) @ joined).view(D, N, 2, B, count).permute(4, 3, 0, 1, 2)
    added = torch.view_as_complex(added.contiguous())  # (count, B, D, N): what each chunk adds
    state = torch.zeros_like(added[0]) if h is None else h
    decay = powers[..., CHUNK].expand(count, B, D, N)
    if local is not None:
        decay = decay * (local[..., -1] == 0).t()[..., None, None]
    before = []
    for scale, new in zip(decay.unbind(0), added.unbind(0), strict=True):
        before.append(state)
        state = torch.addcmul(new, scale, state)
    came = torch.stack(before, 1)  # (B, count, D, N)

    out = (system.c[..., None] * powers[..., 1:]).transpose(1, 2)  # (D, CHUNK, N)
    carried = _real_product(out, came.permute(2, 3, 0, 1).reshape(D, N, -1)).view(D, CHUNK, B, count)
    carried = carried.permute(2, 3, 1, 0)
    if local is not None:
        carried = carried * (local == 0)[..., None].to(u.dtype)
    y = (inside + carried.reshape(B, size, D))[:, :T]
    return y, _final(x, came, local, powers, system, ctx) if keep and local is not None else None


def _final(x: Tensor, came: Tensor, local: Tensor, powers: Tensor, system: Discrete, ctx: Context) -> Tensor:
    """The state after each row's last valid token: from the chunk that holds it."""
    B, count, _ = local.shape
    n, row = n_valid(ctx), torch.arange(B, device=x.device)
    chunk = (n // CHUNK).clamp(max=count - 1)
    rest = n - chunk * CHUNK  # tokens of that chunk that count, 0 to CHUNK
    state, segment = came[row, chunk], F.pad(local[row, chunk], (1, 0))  # document 0 is the state's
    order = torch.arange(CHUNK, device=x.device)
    document = segment.gather(1, rest[:, None])
    counts = (order < rest[:, None]) & (segment[:, 1:] == document)
    weights = powers[..., (rest[:, None] - 1 - order).clamp(min=0)]  # (D, N, B, CHUNK)
    inputs = x.view(B, count, CHUNK, -1)[row, chunk] * counts[..., None].to(x.dtype)
    new = torch.einsum("dnbl,bld->bdn", weights, inputs.to(weights.dtype)) * system.b
    kept = powers[..., rest].permute(2, 0, 1) * (document == 0)[..., None]
    return kept * state + new


class S4d(Mixer):
    """``o(gelu(y))``, ``y_t = sum_s K_{t-s} x_s + D x_t``, ``K_l = 2 Re(C e^{l dt A} B')``, for each channel.

    The diagonal state space of Gu et al. 2022 ("On the Parameterization and Initialization of Diagonal State Space
    Models"): ``h' = A h + B x``, ``y = C h + D x`` with A diagonal and complex (one of each conjugate pair, so
    state_size / 2 numbers a channel), made discrete by zero-order hold, B' = (e^{dt A} - 1) / A B. It starts as
    S4D-Lin, A_n = -1/2 + i pi n (their equation 8), B = 1; o has twice the width and a GLU, as in the authors' code.
    B is trained beside C here, although only their product counts; steps dt stand evenly on the scale of logarithms
    where the authors draw them.

    backend: ``plain`` is the recurrence, ``convolution`` the long kernel by Fourier transforms (causal up to rounding
    beyond 64 tokens), ``auto`` matrix products over chunks of 32 tokens, which is the quickest on a CPU and exactly
    causal. With a state, ``convolution`` reads in chunks too.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["s4d"] = "s4d"
        state_size: int = Field(default=64, ge=2, multiple_of=2, description="of a channel's state, real numbers")
        dt_min: float = Field(default=0.001, gt=0)
        dt_max: float = Field(default=0.1, gt=0)
        backend: Literal["auto", "plain", "convolution"] = "auto"

    def __init__(self, config: S4d.Config, dims: Dims):
        super().__init__()
        self.config, self.depth, D, N = config, dims.depth, dims.d_model, config.state_size // 2
        self.log_dt = nn.Parameter(torch.empty(D))
        self.a_log = nn.Parameter(torch.empty(D, N))  # Re A = -exp(a_log): it cannot grow
        self.a_imag = nn.Parameter(torch.empty(D, N))
        self.b = nn.Parameter(torch.empty(D, N, 2))
        self.c = nn.Parameter(torch.empty(D, N, 2))
        self.skip = nn.Parameter(torch.empty(D))
        self.o = Projection(D, 2 * D, "o", bias=True)

    def reset(self) -> None:
        """S4D-Lin; C is drawn, the same for every seed."""
        with torch.no_grad():
            D, N = self.a_log.shape
            self.log_dt.copy_(torch.linspace(math.log(self.config.dt_min), math.log(self.config.dt_max), D))
            self.a_log.fill_(math.log(0.5))
            self.a_imag.copy_((math.pi * torch.arange(N)).expand(D, N))
            self.b.copy_(torch.tensor([1.0, 0.0]).expand_as(self.b))
            generator = torch.Generator().manual_seed(self.depth)
            self.c.copy_(torch.empty(self.c.shape).normal_(0.0, 0.5**0.5, generator=generator))
            self.skip.fill_(1.0)

    def system(self) -> Discrete:
        """The parameters in discrete time."""
        a = torch.complex(-full_precision(self.a_log).exp(), full_precision(self.a_imag))
        b, c = (torch.view_as_complex(full_precision(p).contiguous()) for p in (self.b, self.c))
        return zero_order_hold(a, b, c, full_precision(self.log_dt).exp())

    def state_spec(self) -> StateSpec:
        return {"h": StateField("row", tuple(self.b.shape), dtype=full_precision(self.b).dtype)}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        u, system, new = full_precision(x), self.system(), None
        h = None if state is None else torch.view_as_complex(full_precision(state.read("h")))
        if self.config.backend == "plain" or (state is not None and x.shape[1] == 1):
            y, new = recurrence(u, system, ctx, h)
        elif self.config.backend == "convolution" and h is None:
            y = long_convolution(u, kernel(system, x.shape[1]), segments(ctx) if ctx.restarts else None)
        else:
            y, new = chunked(u, system, ctx, h, keep=state is not None)
        if state is not None and new is not None:
            state.write(h=torch.view_as_real(new))
        y = F.gelu(y + full_precision(self.skip) * u).to(x.dtype)
        return F.glu(self.o(y), -1), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * self.o.d_in * self.o.d_out

    def predicted_parameters(self) -> int:
        D, N = self.o.d_in, self.config.state_size // 2
        return 2 * D + 6 * D * N + self.o.n_parameters()
