"""Mamba: a state space whose step and whose input and output follow the text."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer, full_precision
from octavo.nn.projection import Projection
from octavo.nn.shift import causal_convolution, tail
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


def scan_by_steps(
    dt: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t a) h_{t-1} + dt_t b_t x_t``, ``y_t = c_t h_t``, token by token: the plain twin.

    Args:
        dt, x: (B, T, E).
        a: (E, N), negative.
        b, c: (B, T, N).
        starts: (B, T), where h begins anew; None: nowhere.
        h: (B, E, N), the state before.

    Returns:
        y (B, T, E) and the state after.
    """
    ys = []
    for t, (step, now, into, out) in enumerate(zip(*(v.unbind(1) for v in (dt, x, b, c)), strict=True)):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        h = (step[..., None] * a).exp() * h + (step * now)[..., None] * into[:, None]
        ys.append((h * out[:, None]).sum(-1))
    return torch.stack(ys, 1), h


def scan(
    dt: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """``scan_by_steps`` in blocks: (B, block, E, N) at a time, and one fused operation a token.

    Decays are never divided by, so that any of them may be as small as it likes. Memory does not hold all states:
    those before each block are kept, and the backward pass makes a block's states again. On a CPU this is quicker
    than an associative scan, which reads and writes everything several times.
    """
    y, borders = torch.ops.octavo.selective_scan(dt, x, a, b, c, starts, h)
    return y, borders[-1]


def _block(rows: int, width: int, n: int) -> int:
    """Tokens at a time: what fits a processor's cache, but so many that the kept states are few."""
    return max(16, min(256, 2**18 // max(1, rows * width * n)))


def _states(dt: Tensor, x: Tensor, a: Tensor, b: Tensor, starts: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of one block, time first: (L, B, E, N) each."""
    decay = (dt[..., None] * a).exp_()
    if starts is not None:
        decay.masked_fill_(starts[..., None, None], 0.0)
    states = (dt * x)[..., None] * b[:, :, None]
    for scale, state in zip(decay.unbind(0), states.unbind(0), strict=True):
        h = state.addcmul_(scale, h)
    return decay, states


def _blocks(T: int, length: int) -> list[slice]:
    return [slice(begin, min(begin + length, T)) for begin in range(0, T, length)]


@torch.library.custom_op("octavo::selective_scan", mutates_args=())
def _scan(
    dt: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    dt, x, b, c = (v.transpose(0, 1) for v in (dt, x, b, c))
    first = None if starts is None else starts.transpose(0, 1)
    y, borders = torch.empty_like(x, memory_format=torch.contiguous_format), [h]
    for at in _blocks(len(x), _block(*h.shape)):
        now = None if first is None else first[at]
        _, states = _states(dt[at], x[at], a, b[at], now, borders[-1])
        torch.matmul(states, c[at, :, :, None], out=y[at, :, :, None])
        borders.append(states[-1].clone())
    return y.transpose(0, 1).contiguous(), torch.stack(borders)


@torch.library.custom_op("octavo::selective_scan_gradient", mutates_args=())
def _scan_gradient(
    dy: Tensor, dborders: Tensor, dt: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, dt, x, b, c = (v.transpose(0, 1) for v in (dy, dt, x, b, c))
    first = None if starts is None else starts.transpose(0, 1)
    grads = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in (dt, x, b, c)]
    ddt, dx, db, dc = grads
    da, carry = torch.zeros_like(a), dborders[-1].clone()
    blocks = _blocks(len(x), _block(*borders.shape[1:]))
    for i, at in reversed(list(enumerate(blocks))):
        now = None if first is None else first[at]
        decay, states = _states(dt[at], x[at], a, b[at], now, borders[i])
        g = dy[at, :, :, None] * c[at, :, None]  # becomes the gradient of every state
        g[-1] += carry
        decays, gs = decay.unbind(0), g.unbind(0)
        for t in range(len(gs) - 2, -1, -1):
            gs[t].addcmul_(decays[t + 1], gs[t + 1])
        carry = torch.addcmul(dborders[i], decays[0], gs[0])
        dc[at] = torch.matmul(dy[at, :, None], states).squeeze(2)
        db[at] = torch.matmul((dt[at] * x[at])[:, :, None], g).squeeze(2)
        from_input = torch.matmul(g, b[at, :, :, None]).squeeze(3)
        dx[at] = dt[at] * from_input
        decay[0] *= borders[i]
        decay[1:] *= states[:-1]
        decay *= g  # the gradient of dt_t a
        da += torch.einsum("lben,lbe->en", decay, dt[at])
        ddt[at] = torch.einsum("lben,en->lbe", decay, a) + x[at] * from_input
    ddt, dx, db, dc = (v.transpose(0, 1).contiguous() for v in grads)
    return ddt, dx, da, db, dc, carry


@_scan.register_fake
def _(dt, x, a, b, c, starts, h):  # type: ignore[no-untyped-def]
    n = -(-x.shape[1] // _block(*h.shape)) + 1
    return torch.empty_like(x, memory_format=torch.contiguous_format), h.new_empty(n, *h.shape)


@_scan_gradient.register_fake
def _(dy, dborders, dt, x, a, b, c, starts, borders):  # type: ignore[no-untyped-def]
    made = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in (dt, x, a, b, c)]
    return (*made, torch.empty_like(borders[0]))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *kept, _ = inputs
    ctx.save_for_backward(*kept, output[1])


def _backward(ctx, dy, dborders):  # type: ignore[no-untyped-def]
    *kept, borders = ctx.saved_tensors
    ddt, dx, da, db, dc, dh = torch.ops.octavo.selective_scan_gradient(dy, dborders, *kept, borders)
    return ddt, dx, da, db, dc, None, dh


_scan.register_autograd(_backward, setup_context=_save)


class Mamba(Mixer):
    """``o(y * silu(gate(x)))``, ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t h_t + D u_t``.

    Gu and Dao 2023, sections 3.2 to 3.4: u = silu(conv(up(x))), E = expand d_model channels wide, with N states each.
    dt, B and C are functions of the token, dt_t = softplus(dt(r_t) + bias) with (r_t, B_t, C_t) = select(u_t). A and D
    are not: A = -exp(a_log), (E, N), is a parameter and meets the text through dt alone (section 3.5.2). B is made
    discrete as dt B, not by zero-order hold, as in the authors' code. At the start A_n = -n and dt between dt_min and
    dt_max, evenly on the scale of logarithms where the authors draw it.

    backend: ``plain`` goes token by token, ``auto`` in blocks with a backward pass of its own; see ``scan``.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["mamba"] = "mamba"
        expand: float = Field(default=2.0, gt=0, description="E / d_model")
        state_size: int = Field(default=16, ge=1, description="N, states of a channel")
        conv_width: int = Field(default=4, ge=1, description="tokens under the convolution")
        dt_rank: int | None = Field(default=None, ge=1, description="default: d_model / 16, rounded up")
        dt_min: float = Field(default=0.001, gt=0)
        dt_max: float = Field(default=0.1, gt=0)
        conv_bias: bool = True
        bias: bool = False
        backend: Literal["auto", "plain"] = "auto"

    def __init__(self, config: Mamba.Config, dims: Dims):
        super().__init__()
        self.config, self.depth, D = config, dims.depth, dims.d_model
        self.width, self.rank = max(1, round(config.expand * D)), config.dt_rank or -(-D // 16)
        E, N = self.width, config.state_size
        self.up = Projection(D, E, "up", bias=config.bias)
        self.gate = Projection(D, E, "gate", bias=config.bias)
        self.conv_weight = nn.Parameter(torch.empty(E, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(E)) if config.conv_bias else None
        self.select = Projection(E, self.rank + 2 * N, "select")
        self.dt = Projection(self.rank, E, "dt")
        self.dt_bias = nn.Parameter(torch.empty(E))
        self.a_log = nn.Parameter(torch.empty(E, N))
        self.skip = nn.Parameter(torch.empty(E))
        self.o = Projection(E, D, "o", bias=config.bias)

    def reset(self) -> None:
        """As the class says; the convolution as torch.nn.Conv1d starts one, the same for every seed."""
        with torch.no_grad():
            N, width = self.config.state_size, self.config.conv_width
            generator = torch.Generator().manual_seed(self.depth)
            drawn = torch.empty(self.conv_weight.shape).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            self.conv_weight.copy_(drawn)
            if self.conv_bias is not None:
                self.conv_bias.zero_()
            steps = torch.linspace(math.log(self.config.dt_min), math.log(self.config.dt_max), self.width).exp()
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step
            self.a_log.copy_(torch.arange(1, N + 1).log().expand(self.width, N))
            self.skip.fill_(1.0)

    def state_spec(self) -> StateSpec:
        spec = {"h": StateField("row", tuple(self.a_log.shape), dtype=full_precision(self.a_log).dtype)}
        if self.config.conv_width > 1:
            spec["conv"] = StateField("row", (self.config.conv_width - 1, self.width))
        return spec

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        u, gate = self.up(x), self.gate(x)
        before = state.read("conv") if state is not None and self.config.conv_width > 1 else None
        mixed = F.silu(causal_convolution(u, self.conv_weight, self.conv_bias, ctx, before))
        if state is not None and before is not None:
            state.write(conv=tail(u, before, ctx))
        u = mixed
        N = self.config.state_size
        rank, b, c = self.select(u).split([self.rank, N, N], -1)
        dt = F.softplus(full_precision(self.dt(rank)) + full_precision(self.dt_bias))
        a, wide = -full_precision(self.a_log).exp(), full_precision(u)
        if state is None:
            h = wide.new_zeros(len(u), *a.shape)
        else:
            h = full_precision(state.read("h"))
            dt = dt * ctx.valid[..., None].to(dt.dtype)  # a step of no time changes no state
        run = scan_by_steps if self.config.backend == "plain" else scan
        starts = ctx.starts if ctx.restarts else None
        y, h = run(dt, wide, a, full_precision(b), full_precision(c), starts, h)
        if state is not None:
            state.write(h=h)
        y = (y + full_precision(self.skip) * wide) * F.silu(full_precision(gate))
        return self.o(y.to(u.dtype)), {}

    def _products(self) -> list[Projection]:
        return [self.up, self.gate, self.select, self.dt, self.o]

    def flops(self, n_queries: int, n_keys: int) -> int:
        width = self.config.conv_width
        convolution = 2 * (n_queries + width - 1) * self.width * width
        return 2 * n_queries * sum(p.d_in * p.d_out for p in self._products()) + convolution

    def predicted_parameters(self) -> int:
        own = self.config.conv_width + self.config.conv_bias + 2 + self.config.state_size
        return sum(p.n_parameters() for p in self._products()) + self.width * own
