"""Hyena: gates and long convolutions whose kernels a small network writes."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Context, Dims, Mixer, full_precision
from octavo.nn.convolution import direct_convolution, long_convolution
from octavo.nn.projection import Projection
from octavo.nn.shift import causal_convolution, segments, tail
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


class Filters(nn.Module):
    """``h_i = (W_m sin(f (... sin(f (W_0 z_i + b_0)) ...))) e^{-d i / L}``: kernels written by a network of the lag i.

    z_i are features of the lag: ``i / (L - 1)`` and cosines and sines of ``2 pi i / L`` times a few frequencies, with
    L the model's max_seq_len (longer lags go on in the same way). The window's decays d stand evenly from one that
    leaves 1 % after 1.5 L to one that leaves 1 % after 0.3 L (Poli et al. 2023, section 3.3 and appendix D.3; the
    constants are those of the authors' code, where z may be trained too).
    """

    def __init__(self, channels: int, width: int, layers: int, features: int, length: int):
        super().__init__()
        self.channels, self.features, self.length = channels, features, length
        widths = [features] + [width] * (layers + 1)
        self.hidden = nn.ModuleList(Projection(a, b, "filter", bias=True) for a, b in zip(widths, widths[1:]))
        self.out = Projection(width, channels, "filter")
        self.frequency = nn.Parameter(torch.empty(width))

    def forward(self, n: int) -> Tensor:
        """The kernels of lags 0 to n - 1, (channels, n)."""
        weight = self.out.weight
        lag = torch.arange(n, device=weight.device, dtype=full_precision(weight).dtype)
        like = {"device": lag.device, "dtype": lag.dtype}
        bands = torch.linspace(1e-4, self.features // 2 - 1, self.features // 2, **like)
        turn = (2 * math.pi / self.length) * lag[:, None] * bands
        time = lag[:, None] / max(1, self.length - 1)
        z = torch.cat([time, turn.cos(), -turn.sin()], 1)
        for layer in self.hidden:
            z = (full_precision(self.frequency) * _wide(layer, z)).sin()  # type: ignore[arg-type]
        slow, fast = (-math.log(0.01) / share for share in (1.5, 0.3))
        decay = torch.linspace(slow, fast, self.channels, **like)
        return (_wide(self.out, z) * (-time * decay).exp()).transpose(0, 1)

    def products(self) -> list[Projection]:
        """Every weight product."""
        return [*self.hidden, self.out]  # type: ignore[list-item]


def _wide(product: Projection, z: Tensor) -> Tensor:
    """The product in full precision: in 16 bits neighbouring lags would be one."""
    bias = None if product.bias is None else full_precision(product.bias)
    return F.linear(z, full_precision(product.weight), bias)


class Hyena(Mixer):
    """``z_1 = v, z_{n+1} = x_n * (h_n conv z_n + s_n z_n)``, ``o(z_{N+1})``: long convolutions and gates.

    Definition 3.1 and section 3.3 of Poli et al. 2023: v, x_1 ... x_N are projections of the input, each passed
    through a causal convolution of ``short`` tokens; the N long kernels h_n come from ``Filters``, s_n is the skip of
    the authors' code. With ``gate_first`` the first of the N kernels is left out (h_1 conv z = z), which is what the
    authors' code calls order N. Decoding keeps the inputs of every long convolution, as attention keeps keys: a token
    costs O(T), the state grows. Documents are kept apart in packed rows, at the price of a factor of log T.
    """

    class Config(Config):
        kind: Literal["hyena"] = "hyena"
        order: int = Field(default=2, ge=1, description="N, the number of gates")
        gate_first: bool = Field(default=False, description="no long kernel before the first gate")
        short: int = Field(default=3, ge=1, description="tokens under the short convolution")
        filter_width: int = Field(default=64, ge=1)
        filter_layers: int = Field(default=2, ge=0, description="hidden layers after the first")
        filter_features: int = Field(default=5, ge=3, description="of a lag; odd")
        frequency: float = Field(default=10.0, gt=0, description="of the sines in the filter network, at the start")
        backend: Literal["auto", "plain"] = "auto"

        @field_validator("filter_features")
        @classmethod
        def _odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError(f"filter_features = {value} must be odd: the lag, and cosines with as many sines")
            return value

    def __init__(self, config: Hyena.Config, dims: Dims):
        super().__init__()
        self.config, self.d_model, self.depth = config, dims.d_model, dims.depth
        D, N = dims.d_model, config.order
        self.n_filters = N - config.gate_first
        self.up = Projection(D, (N + 1) * D, "up", bias=True)
        self.short_weight = nn.Parameter(torch.empty((N + 1) * D, config.short))
        self.short_bias = nn.Parameter(torch.empty((N + 1) * D))
        self.o = Projection(D, D, "o", bias=True)
        self.filters = self.skip = None
        if self.n_filters:
            width, layers, features = config.filter_width, config.filter_layers, config.filter_features
            self.filters = Filters(self.n_filters * D, width, layers, features, dims.max_seq_len)
            self.skip = nn.Parameter(torch.empty(self.n_filters, D))

    def reset(self) -> None:
        """Short convolutions as torch.nn.Conv1d starts them, the same ones for every seed; skips of one."""
        with torch.no_grad():
            generator = torch.Generator().manual_seed(self.depth)
            bound = self.config.short**-0.5
            drawn = torch.empty(self.short_weight.shape).uniform_(-bound, bound, generator=generator)
            self.short_weight.copy_(drawn)
            self.short_bias.zero_()
            if self.filters is not None and self.skip is not None:
                self.skip.fill_(1.0)
                self.filters.frequency.fill_(self.config.frequency)

    def state_spec(self) -> StateSpec:
        spec = {f"z{n}": StateField("token", (self.d_model,)) for n in range(self.n_filters)}
        if self.config.short > 1:
            spec["short"] = StateField("row", (self.config.short - 1, self.short_weight.shape[0]))
        return spec

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        u = self.up(x)
        before = state.read("short") if state is not None and self.config.short > 1 else None
        z, *gates = causal_convolution(u, self.short_weight, self.short_bias, ctx, before).chunk(
            self.config.order + 1, -1
        )
        if state is not None and before is not None:
            state.write(short=tail(u, before, ctx))
        old = _seen_before(ctx) if state is not None else 0
        kernels = self.filters(old + x.shape[1]).chunk(self.n_filters) if self.filters is not None else ()
        if self.config.gate_first:
            z = gates.pop(0) * z
        for n, (kernel, gate) in enumerate(zip(kernels, gates, strict=True)):
            z = gate * self._convolve(n, z, kernel, ctx, state, old)
        return self.o(z), {}

    def _convolve(self, n: int, z: Tensor, kernel: Tensor, ctx: Context, state: LayerState | None, old: int) -> Tensor:
        """``h_n conv z + s_n z`` over z (B, T, D) and the ``old`` tokens that a state holds."""
        wide = full_precision(z)
        segment = segments(ctx) if ctx.restarts else None
        if state is not None:
            keys, held = state.append(ctx, **{f"z{n}": z})
            if old:
                past = _last(held[f"z{n}"], keys.doc_ids, ctx, old)
                wide = torch.cat([full_precision(past), wide], 1)
                segment = F.pad(segments(ctx), (old, 0))
        if old and z.shape[1] == 1:  # one token: one product with the kernel, read backwards
            own = (segment == segment[:, -1:])[..., None].to(wide.dtype) if segment is not None else 1
            y = (wide * own * kernel.flip(-1).transpose(0, 1)).sum(1, keepdim=True)
        else:
            convolve = direct_convolution if self.config.backend == "plain" else long_convolution
            y = convolve(wide, kernel, segment)[:, old:]
        skip = self.skip[n] if self.skip is not None else 0
        return (y + full_precision(z) * skip).to(z.dtype)

    def flops(self, n_queries: int, n_keys: int) -> int:
        products = 2 * n_queries * sum(p.d_in * p.d_out for p in (self.up, self.o))
        filters = sum(p.d_in * p.d_out for p in self.filters.products()) if self.filters is not None else 0
        short = 2 * (n_queries + self.config.short - 1) * self.short_weight.numel()
        return products + 2 * n_keys * filters + short

    def predicted_parameters(self) -> int:
        D, c = self.d_model, self.config
        products = self.up.n_parameters() + self.o.n_parameters() + (c.order + 1) * D * (c.short + 1)
        if self.filters is None:
            return products
        return products + sum(p.n_parameters() for p in self.filters.products()) + c.filter_width + self.n_filters * D


def _seen_before(ctx: Context) -> int:
    """The most tokens that any row had seen before this pass."""
    return int(torch.where(ctx.valid[:, 0], ctx.slots[:, 0], 0).max())


def _last(held: Tensor, doc_ids: Tensor, ctx: Context, old: int) -> Tensor:
    """The ``old`` tokens before this pass of each row's document, the last of them last: (B, S, D) to (B, old, D)."""
    at = ctx.slots[:, :1] - old + torch.arange(old, device=held.device)
    there = (at >= 0) & ctx.valid[:, :1]
    at = at.clamp(min=0)
    there = there & (doc_ids.gather(1, at) == ctx.doc_ids[:, :1])
    past = held[torch.arange(len(held), device=held.device)[:, None], at]
    return past * there[..., None].to(past.dtype)
