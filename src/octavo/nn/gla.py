"""Gated linear attention: a linear memory whose key channels fade at rates the input sets."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Heads, Mixer, full_precision
from octavo.nn.norm import RMSNorm
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState, StateSpec, recurrence_field
from octavo.nn.vector_decay import ChunkLength, chunked, recurrent, step
from octavo.schema import Config


class Gla(Mixer):
    """``h_t = diag(a_t) h_{t-1} + k_t v_t^T, y_t = o(silu(gate(x_t)) * norm(h_t^T q_t / sqrt(K)))`` per head.

    ``a_t = sigmoid(decay(x_t))^(1 / decay_divisor)``, a decay per key channel through a product of low rank
    (Yang et al. 2023, section 4.4). h is (K, V) a head; keys are by default half as wide as values. ``chunked`` and
    ``plain`` compute the same, see nn/vector_decay.py. The norm of each head is an RMSNorm, as in the authors' code;
    the paper writes LayerNorm.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["gla"] = "gla"
        n_heads: int = Field(default=4, ge=1)
        head_dim: int | None = Field(default=None, ge=1, description="of keys; default: d_model / (2 n_heads)")
        v_head_dim: int | None = Field(default=None, ge=1, description="of values; default: d_model / n_heads")
        decay_rank: int = Field(default=16, ge=1, description="inner width of the decay's product")
        decay_divisor: float = Field(default=16.0, gt=0, description="of the decay's logarithm; large: slow fading")
        norm_eps: float = Field(default=1e-5, gt=0)
        chunk: ChunkLength = 64
        backend: Literal["auto", "plain", "chunked"] = "auto"

    @classmethod
    def heads(cls, config: Gla.Config, d_model: int) -> Heads | None:
        if config.v_head_dim is None and d_model % config.n_heads:
            raise ValueError(f"n_heads = {config.n_heads} must divide d_model = {d_model}, or v_head_dim must be given")
        if config.head_dim is None and d_model % (2 * config.n_heads):
            twice = f"2 n_heads = {2 * config.n_heads}"
            raise ValueError(f"{twice} must divide d_model = {d_model}, or head_dim must be given")
        return None

    def __init__(self, config: Gla.Config, dims: Dims):
        super().__init__()
        self.config, D, H = config, dims.d_model, config.n_heads
        self.K = K = config.head_dim or D // (2 * H)
        self.V = V = config.v_head_dim or D // H
        self.q, self.k = Projection(D, H * K, "q"), Projection(D, H * K, "k")
        self.v, self.gate = Projection(D, H * V, "v"), Projection(D, H * V, "gate")
        self.decay_in = Projection(D, config.decay_rank, "decay")
        self.decay_out = Projection(config.decay_rank, H * K, "decay", bias=True)
        self.norm = RMSNorm(RMSNorm.Config(eps=config.norm_eps), V)
        self.o = Projection(H * V, D, "o")

    def state_spec(self) -> StateSpec:
        return {"h": recurrence_field((self.config.n_heads, self.K, self.V), self.q.weight)}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        H, config = self.config.n_heads, self.config
        q, k = (p(x).view(B, T, H, self.K) for p in (self.q, self.k))
        v = self.v(x).view(B, T, H, self.V)
        g = F.logsigmoid(full_precision(self.decay_out(self.decay_in(x)))).view(B, T, H, self.K) / config.decay_divisor
        if state is not None:  # padding writes nothing and lets nothing fade
            padding = ~ctx.valid[:, :, None, None]
            k, g = k.masked_fill(padding, 0.0), g.masked_fill(padding, 0.0)
        before = None if state is None else state.read("h")
        inputs = (q * self.K**-0.5, k, v, g, ctx.starts if ctx.restarts else None, before)
        if config.backend == "plain":
            y, h = recurrent(*inputs)
        elif config.backend == "auto" and T == 1:
            y, h = step(*inputs)
        else:
            y, h = chunked(*inputs, chunk=config.chunk)
        if state is not None:
            state.write(h=h)
        y = self.norm(y.to(x.dtype)).reshape(B, T, -1)
        return self.o(y * F.silu(self.gate(x))), {}

    def products(self) -> list[Projection]:
        return [self.q, self.k, self.v, self.gate, self.decay_in, self.decay_out, self.o]

    def flops(self, n_queries: int, n_keys: int) -> int:
        """Of the recurrence: one outer product and one reading a token."""
        memory = 4 * self.config.n_heads * self.K * self.V
        return n_queries * (memory + 2 * sum(p.d_in * p.d_out for p in self.products()))

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in self.products()) + self.norm.predicted_parameters()
