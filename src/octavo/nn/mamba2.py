"""Mamba-2: a state space model with one selective decay per head, computed by matrix products (SSD)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.chunked import Form, scan
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer, full_precision
from octavo.nn.projection import Projection
from octavo.nn.shift import causal_convolution, tail
from octavo.nn.short_convolution import convolve_silu
from octavo.nn.state import LayerState, StateField, StateSpec, recurrence_field
from octavo.schema import Config


class Mamba2(Mixer):
    """``h_t = exp(d_t A) h_{t-1} + d_t B_t x_t^T, y_t = C_t h_t + D x_t`` per head, ``o(norm(y * silu(z)))``.

    One product gives z, x, B, C and d; x, B and C pass a causal depthwise convolution and silu; d_t =
    softplus(. + bias), within ``dt_limit``. B and C (``d_state`` wide) are shared by the heads of a group. d, B and C
    depend on the token; A < 0 and D are one parameter a head: what forgets selectively is the step d_t (Gu and Dao
    2023, section 3.5.2). The norm is a root mean square over each of ``norm_groups`` groups of channels, after the
    gate or, with ``norm_before_gate``, before it; without ``norm`` the gate stands alone.

    Source: Dao and Gu 2024, sections 6 and 7; initial values from their code's ranges, here spread evenly rather than
    drawn (steps evenly in their logarithm). The state is the convolution's last inputs and h: constant bytes.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["mamba2"] = "mamba2"
        n_heads: int = Field(default=8, ge=1)
        head_dim: int | None = Field(default=None, ge=1, description="default: 2 d_model / n_heads")
        d_state: int = Field(default=64, ge=1)
        n_groups: int = Field(default=1, ge=1, description="heads of a group share B and C")
        conv_width: int = Field(default=4, ge=1)
        conv_bias: bool = True
        bias: bool = False
        dt_limit: tuple[float, float] | None = Field(default=None, description="bounds of the step d")
        dt_init: tuple[float, float] = (0.001, 0.1)
        a_init: tuple[float, float] = (1.0, 16.0)
        norm: bool = True
        norm_before_gate: bool = False
        norm_groups: int | None = Field(default=None, ge=1, description="default: n_groups")
        norm_eps: float = Field(default=1e-5, ge=0)
        chunk: int = Field(default=64, ge=1, description="tokens a matrix product spans; changes the time only")
        backend: Form = "auto"

        @model_validator(mode="after")
        def _possible(self) -> Mamba2.Config:
            if self.n_heads % self.n_groups:
                raise ValueError(f"n_groups = {self.n_groups} must divide n_heads = {self.n_heads}")
            for name in ("dt_limit", "dt_init", "a_init"):
                low, high = getattr(self, name) or (0.0, 0.0)
                if low > high or low < 0 or (name != "dt_limit" and low == 0):
                    raise ValueError(f"{name} = {(low, high)} must be two positive numbers, the lower one first")
            return self

    def __init__(self, config: Mamba2.Config, dims: Dims):
        super().__init__()
        D, H = dims.d_model, config.n_heads
        if not config.head_dim and 2 * D % H:
            raise ValueError(f"n_heads = {H} must divide 2 d_model = {2 * D}, or head_dim must be given")
        self.config, self.depth, self.n_heads = config, dims.depth, H
        self.head_dim = config.head_dim or 2 * D // H
        self.inner, self.shared = H * self.head_dim, config.n_groups * config.d_state
        self.norm_groups = config.norm_groups or config.n_groups
        if self.inner % self.norm_groups:
            raise ValueError(f"norm_groups = {self.norm_groups} must divide n_heads * head_dim = {self.inner}")
        self.convolved = self.inner + 2 * self.shared
        self.up = Projection(D, self.inner + self.convolved + H, "up", bias=config.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.convolved, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(self.convolved)) if config.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.log_a = nn.Parameter(torch.empty(H))
        self.skip = nn.Parameter(torch.empty(H))
        self.scale = nn.Parameter(torch.empty(self.inner)) if config.norm else None
        self.o = Projection(self.inner, D, "o", bias=config.bias)

    @torch.no_grad()
    def reset(self) -> None:
        """Steps from slow to fast over the heads; A over its range in an order that has nothing to do with that."""
        config, H = self.config, self.n_heads
        low, high = (math.log(dt) for dt in config.dt_init)
        dt = torch.linspace(low, high, H, dtype=torch.float64).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt back
        golden = torch.arange(H, dtype=torch.float64) * (5**0.5 - 1) / 2 % 1
        self.log_a.copy_(torch.log(config.a_init[0] + (config.a_init[1] - config.a_init[0]) * golden))
        self.skip.fill_(1.0)
        bound = config.conv_width**-0.5
        drawn = torch.rand(self.conv_weight.shape, generator=torch.Generator().manual_seed(self.depth))
        self.conv_weight.copy_((2 * drawn - 1) * bound)
        if self.conv_bias is not None:
            self.conv_bias.zero_()
        if self.scale is not None:
            self.scale.fill_(1.0)

    def state_spec(self) -> StateSpec:
        return {
            "conv": StateField("row", (self.config.conv_width - 1, self.convolved)),
            "h": recurrence_field((self.n_heads, self.config.d_state, self.head_dim), self.o.weight),
        }

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        H, G, N = self.n_heads, self.config.n_groups, self.config.d_state
        z, mixed, dt = self.up(x).split([self.inner, self.convolved, H], -1)
        recent = None if state is None else state.read("conv")
        if recent is None and self.config.backend != "plain":
            convolved = convolve_silu(mixed, self.conv_weight, self.conv_bias, ctx)
        else:
            convolved = F.silu(causal_convolution(mixed, self.conv_weight, self.conv_bias, ctx, recent))
        v, k, q = convolved.split([self.inner, self.shared, self.shared], -1)
        v, k, q = v.reshape(B, T, H, -1), k.reshape(B, T, G, N), q.reshape(B, T, G, N)
        dt = F.softplus(full_precision(dt) + full_precision(self.dt_bias))
        if self.config.dt_limit is not None:
            dt = dt.clamp(*self.config.dt_limit)
        y, h = scan(
            q, k, full_precision(v) * dt[..., None], -full_precision(self.log_a).exp() * dt, ctx,
            None if state is None else state.read("h"), form=self.config.backend, chunk=self.config.chunk,
        )  # fmt: skip
        if state is not None and recent is not None:
            state.write(conv=tail(mixed, recent, ctx), h=h)
        y = torch.addcmul(y, full_precision(v), full_precision(self.skip)[:, None])
        return self.o(self._gated(y.flatten(2), z)), {}

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        gate = F.silu(full_precision(z))
        if self.scale is None:
            return (y * gate).to(z.dtype)
        y = y if self.config.norm_before_gate else y * gate
        groups = y.unflatten(-1, (self.norm_groups, -1))
        unit = F.rms_norm(groups, groups.shape[-1:], eps=self.config.norm_eps).flatten(-2)
        if self.config.norm_before_gate:
            return (unit * full_precision(self.scale) * gate).to(z.dtype)
        return unit.to(z.dtype) * self.scale  # cast first: checkpoints were trained so

    def flops(self, n_queries: int, n_keys: int) -> int:
        products = self.up.d_in * self.up.d_out + self.o.d_in * self.o.d_out
        scanned = 2 * self.n_heads * self.config.d_state * self.head_dim
        width = self.config.conv_width
        convolution = (n_queries + width - 1) * self.convolved * width  # its library computes the border too
        return 2 * (n_queries * (products + scanned) + convolution)

    def predicted_parameters(self) -> int:
        convolution = self.convolved * (self.config.conv_width + self.config.conv_bias)
        scale = self.inner if self.config.norm else 0
        return self.up.n_parameters() + self.o.n_parameters() + convolution + 3 * self.n_heads + scale
