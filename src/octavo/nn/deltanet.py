"""Mixers on the delta rule: DeltaNet, and gated DeltaNet, whose heads also fade."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Heads, Mixer, full_precision
from octavo.nn.delta_rule import chunked, recurrent
from octavo.nn.norm import RMSNorm
from octavo.nn.projection import Projection
from octavo.nn.shift import causal_convolution, tail
from octavo.nn.state import LayerState, StateField, StateSpec, recurrence_field
from octavo.schema import Config


class DeltaNet(Mixer):
    """``h_t = h_{t-1} + k_t (b_t (v_t - h_{t-1}^T k_t))^T, y_t = o(norm(h_t^T q_t / sqrt(K)))`` per head.

    q, k and v are products that pass a short causal convolution and SiLU; q and k then have length 1, so that b in
    (0, 1), a sigmoid, goes from leaving what h held for k to replacing it. With ``negative_eigenvalues`` b goes up to 2
    (Grazzi et al. 2024). h is (K, V) a head. Source: Schlag et al. 2021; this form Yang et al. 2024 (Parallelizing
    linear transformers with the delta rule), section 3. The convolution starts as the identity, not at random.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["deltanet"] = "deltanet"
        n_heads: int = Field(default=4, ge=1)
        head_dim: int | None = Field(default=None, ge=1, description="of queries and keys; default: d_model / n_heads")
        v_head_dim: int | None = Field(default=None, ge=1, description="of values; default: head_dim")
        conv_width: int = Field(default=4, ge=2, description="tokens the convolution sees")
        negative_eigenvalues: bool = Field(default=False, description="b up to 2: h may turn over")
        norm_eps: float = Field(default=1e-5, gt=0)
        chunk: int = Field(default=64, ge=1)
        backend: Literal["auto", "plain", "chunked"] = "auto"

    @classmethod
    def heads(cls, config: Any, d_model: int) -> Heads | None:
        if config.head_dim is None and d_model % config.n_heads:
            raise ValueError(f"n_heads = {config.n_heads} must divide d_model = {d_model}, or head_dim must be given")
        return None

    def __init__(self, config: DeltaNet.Config | GatedDeltaNet.Config, dims: Dims):
        super().__init__()
        self.config, D = config, dims.d_model
        self.H, self.G = config.n_heads, getattr(config, "n_key_heads", None) or config.n_heads
        self.K = config.head_dim or D // config.n_heads
        self.V = config.v_head_dim or self.K
        self.q, self.k = Projection(D, self.G * self.K, "q"), Projection(D, self.G * self.K, "k")
        self.v, self.beta = Projection(D, self.H * self.V, "v"), Projection(D, self.H, "beta")
        self.conv = nn.Parameter(torch.empty(2 * self.G * self.K + self.H * self.V, config.conv_width))
        self.norm = RMSNorm(RMSNorm.Config(eps=config.norm_eps), self.V)
        self.o = Projection(self.H * self.V, D, "o")

    def reset(self) -> None:
        with torch.no_grad():
            self.conv.zero_()[:, -1] = 1.0

    def state_spec(self) -> StateSpec:
        recent = StateField("row", (self.config.conv_width - 1, self.conv.shape[0]))
        return {"recent": recent, "h": recurrence_field((self.H, self.K, self.V), self.q.weight)}

    def log_decay(self, x: Tensor) -> Tensor | None:
        """The logarithm of each head's decay, (B, T, H), or None."""
        return None

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """From what heads read, y (B, T, H, V), to the stream."""
        return self.o(self.norm(y).flatten(2))

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        mixed = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        recent = None if state is None else state.read("recent")
        b, g = full_precision(self.beta(x)).sigmoid(), self.log_decay(x)
        b = 2 * b if self.config.negative_eigenvalues else b
        qkv = F.silu(causal_convolution(mixed, self.conv, None, ctx, recent).contiguous())
        q, k, v = qkv.split([self.G * self.K, self.G * self.K, self.H * self.V], -1)
        q, k = (unit(full_precision(t).view(B, T, self.G, self.K)) for t in (q, k))
        if self.G != self.H:
            q, k = (t.repeat_interleave(self.H // self.G, 2) for t in (q, k))
        if state is not None and recent is not None:
            state.write(recent=tail(mixed, recent, ctx))
            b = b.masked_fill(~ctx.valid[..., None], 0.0)  # padding writes nothing and lets nothing fade
            g = None if g is None else g.masked_fill(~ctx.valid[..., None], 0.0)
        starts, before = (ctx.starts if ctx.restarts else None), (None if state is None else state.read("h"))
        inputs = (q * self.K**-0.5, k, v.view(B, T, self.H, self.V), b, g, starts, before)
        if self.config.backend == "plain" or (self.config.backend == "auto" and T == 1):
            y, h = recurrent(*inputs)
        else:
            y, h = chunked(*inputs, chunk=self.config.chunk)
        if state is not None:
            state.write(h=h)
        return self.output(y.to(x.dtype), x), {}

    def products(self) -> list[Projection]:
        return [self.q, self.k, self.v, self.beta, self.o]

    def flops(self, n_queries: int, n_keys: int) -> int:
        """Of the recurrence: two readings and an outer product a token."""
        products = sum(p.d_in * p.d_out for p in self.products()) + 3 * self.H * self.K * self.V
        channels, width = self.conv.shape  # the convolution also makes the entries that reach beyond the last token
        return 2 * n_queries * products + 2 * channels * width * (n_queries + width - 1)

    def predicted_parameters(self) -> int:
        products = sum(p.n_parameters() for p in self.products())
        return products + self.norm.predicted_parameters() + self.conv.shape[0] * self.config.conv_width


class GatedDeltaNet(DeltaNet):
    """``h_t = a_t h_{t-1} + k_t (b_t (v_t - a_t h_{t-1}^T k_t))^T, y_t = o(silu(gate) * norm(h_t^T q_t / sqrt(K)))``.

    A DeltaNet whose heads fade: ``a_t = exp(-e^A softplus(decay(x_t) + c))``, A and c learnt, one number a head.
    n_key_heads below n_heads lets each query and key head serve several heads of values (Qwen3-Next). Source:
    Yang et al. 2024 (Gated delta networks), section 3; the decay's form is Mamba-2's. A and c start evenly spread,
    not at random, values are by default as wide as keys (the authors take twice).
    """

    class Config(Config):
        kind: Literal["gated_deltanet"] = "gated_deltanet"
        n_heads: int = Field(default=4, ge=1)
        n_key_heads: int | None = Field(default=None, ge=1, description="of queries and keys; default: n_heads")
        head_dim: int | None = Field(default=None, ge=1, description="of queries and keys; default: d_model / n_heads")
        v_head_dim: int | None = Field(default=None, ge=1, description="of values; default: head_dim")
        conv_width: int = Field(default=4, ge=2, description="tokens the convolution sees")
        negative_eigenvalues: bool = Field(default=False, description="b up to 2: h may turn over")
        norm_eps: float = Field(default=1e-5, gt=0)
        chunk: int = Field(default=64, ge=1)
        backend: Literal["auto", "plain", "chunked"] = "auto"

        @model_validator(mode="after")
        def _heads_divide(self) -> GatedDeltaNet.Config:
            if self.n_heads % (self.n_key_heads or self.n_heads):
                raise ValueError(f"n_key_heads = {self.n_key_heads} must divide n_heads = {self.n_heads}")
            return self

    def __init__(self, config: GatedDeltaNet.Config, dims: Dims):
        super().__init__(config, dims)
        self.decay = Projection(dims.d_model, self.H, "decay")
        self.gate = Projection(dims.d_model, self.H * self.V, "gate")
        self.rate, self.shift = nn.Parameter(torch.empty(self.H)), nn.Parameter(torch.empty(self.H))

    def reset(self) -> None:
        """Rates from 1 to 16 times steps from 0.1 down to 0.001, as softplus gives them where decay(x) is 0."""
        super().reset()
        with torch.no_grad():
            steps = torch.linspace(math.log(0.1), math.log(0.001), self.H).exp()
            self.shift.copy_(steps + (-(-steps).expm1()).log())
            self.rate.copy_(torch.linspace(1.0, 16.0, self.H).log())

    def log_decay(self, x: Tensor) -> Tensor:
        step = F.softplus(full_precision(self.decay(x)) + self.shift)
        return -full_precision(self.rate).exp() * step

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        gate = F.silu(full_precision(self.gate(x)))
        return self.o((self.norm(y).flatten(2) * gate).to(x.dtype))

    def products(self) -> list[Projection]:
        return [*super().products(), self.decay, self.gate]

    def predicted_parameters(self) -> int:
        return super().predicted_parameters() + 2 * self.H


def unit(x: Tensor) -> Tensor:
    """``x / sqrt(|x|^2 + 1e-6)`` over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
