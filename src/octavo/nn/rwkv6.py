"""RWKV-6's time mixing: a matrix a head that fades at rates the input sets, and a shift the input sets too."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Heads, Mixer, full_precision
from octavo.nn.projection import Projection
from octavo.nn.rwkv_channel import shift_ramp
from octavo.nn.shift import shift, tail
from octavo.nn.state import LayerState, StateField, StateSpec, recurrence_field
from octavo.nn.vector_decay import ChunkLength, chunked, recurrent, step
from octavo.schema import Config


class Rwkv6(Mixer):
    """``h_t = diag(a_t) h_{t-1} + k_t v_t^T, y_t = o(silu(g_t) * norm((h_{t-1} + diag(u) k_t v_t^T)^T r_t))`` per head.

    ``a_t = exp(-exp(decay_t))``, a decay per key channel and token; u is a learnt bonus for the present token; the
    norm is each head's LayerNorm (GroupNorm). Each of decay, k, v, r and g is a product of its own
    ``x_t + (x_{t-1} - x_t) * (m + b tanh(a z_t))``, where z_t is such a mixture with a fixed m: the token shift depends
    on the data, by products of low rank. Source: Peng et al. 2024 (Eagle and Finch), section 4.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["rwkv6"] = "rwkv6"
        n_heads: int = Field(default=4, ge=1, description="published models: d_model / 64")
        mix_rank: int = Field(default=32, ge=1, description="inner width of the shift's products")
        decay_rank: int = Field(default=64, ge=1, description="inner width of the decay's product")
        norm_eps: float = Field(default=64e-5, gt=0)
        chunk: ChunkLength = 64
        backend: Literal["auto", "plain", "chunked"] = "auto"

    MIXED = ("decay", "k", "v", "r", "gate")

    @classmethod
    def heads(cls, config: Rwkv6.Config, d_model: int) -> Heads | None:
        if d_model % config.n_heads:
            raise ValueError(f"n_heads = {config.n_heads} must divide d_model = {d_model}")
        return None

    def __init__(self, config: Rwkv6.Config, dims: Dims):
        super().__init__()
        self.config, self.dims, D = config, dims, dims.d_model
        R = config.mix_rank
        self.mix_first, self.mix = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(len(self.MIXED), D))
        self.mix_in = Projection(D, len(self.MIXED) * R, "mix")
        self.mix_out = nn.ModuleList(Projection(R, D, "mix") for _ in self.MIXED)
        self.decay, self.bonus = (
            nn.Parameter(torch.empty(D)),
            nn.Parameter(torch.empty(config.n_heads, D // config.n_heads)),
        )
        self.decay_in = Projection(D, config.decay_rank, "decay")
        self.decay_out = Projection(config.decay_rank, D, "decay")
        self.q, self.k, self.v = Projection(D, D, "q"), Projection(D, D, "k"), Projection(D, D, "v")
        self.gate, self.o = Projection(D, D, "gate"), Projection(D, D, "o")
        self.norm_weight, self.norm_bias = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))

    def reset(self) -> None:
        """The authors' starting values: rates from e^-6 to e^-1 over the channels, small bonuses that differ."""
        ramp, deep, late = shift_ramp(self.dims)
        D = self.dims.d_model
        place = torch.arange(D, dtype=torch.float32) / max(D - 1, 1)
        zigzag = 0.1 * ((torch.arange(D) + 1) % 3 - 1)
        with torch.no_grad():
            self.mix_first.copy_(1 - ramp**late)
            per_use = [1 - ramp**late, 1 - ramp**late, 1 - (ramp**late + 0.3 * deep)]
            self.mix.copy_(torch.stack([*per_use, *[1 - ramp ** (0.5 * late)] * 2]))
            self.decay.copy_(-6 + 5 * place ** (0.7 + 1.3 * deep))
            self.bonus.copy_((deep * (1 - place) + zigzag).view_as(self.bonus))
            self.norm_weight.fill_(1.0)
            self.norm_bias.zero_()

    def state_spec(self) -> StateSpec:
        D, H = self.dims.d_model, self.config.n_heads
        return {"x": StateField("row", (D,)), "h": recurrence_field((H, D // H, D // H), self.q.weight)}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, D = x.shape
        H = self.config.n_heads
        before = None if state is None else state.read("h")
        mixed = self._shifted(x, shift(x, ctx, None if state is None else state.read("x")) - x)
        decay = full_precision(self.decay_out(self.decay_in(mixed["decay"]).tanh())) + self.decay
        r, k, v, g = (
            t.view(B, T, H, D // H) for t in (self.q(mixed["r"]), self.k(mixed["k"]), self.v(mixed["v"]), -decay.exp())
        )
        if state is not None:  # padding writes nothing and lets nothing fade
            state.write(x=tail(x, state.read("x")[:, None], ctx)[:, 0])
            padding = ~ctx.valid[:, :, None, None]
            k, g = k.masked_fill(padding, 0.0), g.masked_fill(padding, 0.0)
        inputs = (r, k, v, g, ctx.starts if ctx.restarts else None, before, full_precision(self.bonus))
        if self.config.backend == "plain":
            y, h = recurrent(*inputs)
        elif self.config.backend == "auto" and T == 1:
            y, h = step(*inputs)
        else:
            y, h = chunked(*inputs, chunk=self.config.chunk)
        if state is not None:
            state.write(h=h)
        weight, bias = self.norm_weight.to(y.dtype), self.norm_bias.to(y.dtype)
        y = F.group_norm(y.reshape(B * T, D), H, weight, bias, self.config.norm_eps)
        return self.o(y.view(B, T, D).to(x.dtype) * F.silu(self.gate(mixed["gate"]))), {}

    def _shifted(self, x: Tensor, back: Tensor) -> dict[str, Tensor]:
        """What each product reads: x (B, T, D), and ``back`` is how the token before differs."""
        inner = self.mix_in(x + back * self.mix_first).tanh().chunk(len(self.MIXED), -1)
        return {
            name: x + back * (own + out(part))
            for name, own, out, part in zip(self.MIXED, self.mix, self.mix_out, inner, strict=True)
        }

    def products(self) -> list[Projection]:
        low = [self.mix_in, *self.mix_out, self.decay_in, self.decay_out]
        return [*low, self.q, self.k, self.v, self.gate, self.o]  # type: ignore[list-item]

    def flops(self, n_queries: int, n_keys: int) -> int:
        """Of the recurrence: one outer product and one reading a token."""
        memory = 4 * self.dims.d_model**2 // self.config.n_heads
        return n_queries * (memory + 2 * sum(p.d_in * p.d_out for p in self.products()))

    def predicted_parameters(self) -> int:
        vectors = 5 + len(self.MIXED)  # mix_first, mix, decay, bonus, and the norm's two
        return sum(p.n_parameters() for p in self.products()) + vectors * self.dims.d_model
