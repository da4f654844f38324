"""Retention (RetNet): linear attention whose heads forget, each at its own fixed rate."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from octavo.nn.activation import ACTIVATIONS, ActivationName
from octavo.nn.attention import HEAD_NORMS
from octavo.nn.chunked import Form, scan
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Heads, Mixer, full_precision
from octavo.nn.gated_norm import gated_norm, turn
from octavo.nn.norm import Norm, RMSNorm
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState, StateSpec, recurrence_field
from octavo.schema import Config, component, one_of


class Retention(Mixer):
    """``S_t = g S_{t-1} + k_t v_t^T, y_t = q_t S_t`` per head, ``o(swish(gate(x)) * norm(y))``, g = 1 - 2^(-5 - head).

    Multi-scale retention (Sun et al. 2023, section 2.3, equations 5 to 8): queries and keys are rotated by the model's
    rotary positions, each head's output is normalised on its own, values are ``value_dim`` wide in all (default twice
    d_model). ``backend``: the recurrence (plain), the squared form (parallel) or chunks, see nn/chunked.py.

    Where ours differs from torchscale 0.3: it divides scores and states by sums of decays and scores, differently in
    its three forms, and relies on the norm's indifference to scale; ours does not, so that its forms are equal before
    the norm too. What remains visible is the norm's eps, next to smaller numbers there. Its rotary angles are those
    of ``rope`` with layout interleaved and theta = 10000^(K / (K - 2)), K the width of a head's keys. The paper calls
    the norm GroupNorm; the code has a root mean square without weights, the default here.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["retention"] = "retention"
        n_heads: int = Field(default=8, ge=1)
        value_dim: int | None = Field(default=None, ge=1, description="of all heads; default: 2 d_model")
        rotate: bool = Field(default=True, description="by the model's rotary positions, if it has them")
        gate: ActivationName = "silu"
        norm: one_of(HEAD_NORMS) = RMSNorm.Config(weight=False)  # type: ignore[valid-type]
        chunk: int = Field(default=64, ge=1, description="tokens a matrix product spans; changes the time only")
        backend: Form = "auto"

        @model_validator(mode="after")
        def _heads_divide(self) -> Retention.Config:
            if self.value_dim is not None and self.value_dim % self.n_heads:
                raise ValueError(f"n_heads = {self.n_heads} must divide value_dim = {self.value_dim}")
            return self

    @classmethod
    def heads(cls, config: Retention.Config, d_model: int) -> Heads:
        if d_model % config.n_heads:
            raise ValueError(f"n_heads = {config.n_heads} must divide d_model = {d_model}")
        return Heads(config.n_heads, d_model // config.n_heads if config.rotate else 0)

    def __init__(self, config: Retention.Config, dims: Dims):
        super().__init__()
        D, self.n_heads = dims.d_model, config.n_heads
        wide = config.value_dim or 2 * D
        self.config, self.key_dim, self.value_dim = config, D // self.n_heads, wide // self.n_heads
        self.q, self.k = Projection(D, D, "q"), Projection(D, D, "k")
        self.v, self.gate = Projection(D, wide, "v"), Projection(D, wide, "gate")
        self.o = Projection(wide, D, "o")
        self.norm: Norm = component(HEAD_NORMS, config.norm.kind)(config.norm, self.value_dim)

    def state_spec(self) -> StateSpec:
        return {"h": recurrence_field((self.n_heads, self.key_dim, self.value_dim), self.o.weight)}

    def log_decay(self, like: Tensor) -> Tensor:
        """log g of each head, (H,), as wide as ``like`` or float32: the slowest of 20 heads is 1 - 6e-8."""
        heads = torch.arange(self.n_heads, dtype=torch.float64, device=like.device)
        return torch.log1p(-torch.exp2(-5 - heads)).to(full_precision(like).dtype)

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        q, k = (product(x).view(B, T, self.n_heads, self.key_dim) for product in (self.q, self.k))
        if self.config.rotate and (rotation := ctx.rotation(q.shape[-1])) is not None:
            q, k = turn(q, rotation), turn(k, rotation)
        v = self.v(x).view(B, T, self.n_heads, self.value_dim)
        before = None if state is None else state.read("h")
        y, after = scan(
            q, k * self.key_dim**-0.5, v, self.log_decay(x), ctx, before,
            form=self.config.backend, chunk=self.config.chunk,
        )  # fmt: skip
        if state is not None:
            state.write(h=after)
        gate = self.gate(x)
        if self.config.gate == "silu" and isinstance(self.norm, RMSNorm) and self.norm.weight is None:
            return self.o(gated_norm(y, gate.view(y.shape), self.norm.eps).flatten(2)), {}
        return self.o(ACTIVATIONS[self.config.gate](gate) * self.norm(y).flatten(2)), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        products = sum(p.d_in * p.d_out for p in (self.q, self.k, self.v, self.gate, self.o))
        return 2 * n_queries * (products + 2 * self.n_heads * self.key_dim * self.value_dim)

    def predicted_parameters(self) -> int:
        products = sum(p.n_parameters() for p in (self.q, self.k, self.v, self.gate, self.o))
        return products + self.norm.predicted_parameters()
