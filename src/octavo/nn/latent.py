"""Multi-head latent attention: keys and values are made from one narrow vector a token, and only that is cached."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.nn.attend import ATTENDS, AttendName, sdpa
from octavo.nn.contracts import Aux, Context, Dims, Heads, Keys, Mixer
from octavo.nn.norm import RMSNorm
from octavo.nn.projection import Projection
from octavo.nn.reader import FullReader, Reading, attend_masked
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config

# absorbed: keys are never expanded. All others are names of nn/attend.py, for expanded keys; auto: the cheaper form.
LatentBackend = Literal["auto", "sdpa", "plain", "kernel", "tiled", "absorbed"]


class YarnScale(Config):
    """What YaRN's longer context does to the scores: times m^2, m = 0.1 mscale ln(factor) + 1.

    Source: Peng et al. 2023, section 3.4; mscale (``mscale_all_dim``), DeepSeek V2 and its code.
    """

    factor: float = Field(ge=1)
    mscale: float = Field(default=1.0, ge=0)

    def value(self) -> float:
        """m^2."""
        return (0.1 * self.mscale * math.log(self.factor) + 1) ** 2


class LatentAttention(Mixer):
    """``softmax((q k^T + q' k'^T) / sqrt(K + K')) v``, ``k = U c``, ``v = W c``, ``c = norm(x D)``, ``k' = rope(x R)``.

    c (B, T, kv_rank) and the rotary key k' (B, T, rope_dim), one for all H heads, are all that is cached. q (H, K)
    and its rotary part q' (H, K') come from x, or with ``q_rank`` from a normed narrow vector too; K is head_dim, K'
    rope_dim, and values are v_head_dim wide. As q k^T = (U^T q) c^T, and W can wait until c has been read, decoding
    needs no keys and values: the absorbed form is multi-query attention over vectors (c, k'). backend ``auto`` takes
    the form with fewer multiplications: expanded for prompts and training, absorbed for single tokens. ``yarn``
    belongs to checkpoints whose rotary table was stretched. Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1 and
    appendix C. Ours differs: U, W and the products into c and k' are matrices of their own.
    """

    class Config(Config):
        kind: Literal["mla"] = "mla"
        n_heads: int = Field(default=8, ge=1)
        head_dim: int | None = Field(default=None, ge=1, description="default: d_model / n_heads")
        rope_dim: int | None = Field(default=None, ge=1, description="default: half of head_dim, even")
        v_head_dim: int | None = Field(default=None, ge=1, description="default: head_dim")
        kv_rank: int | None = Field(default=None, ge=1, description="default: 4 head_dim")
        q_rank: int | None = Field(default=None, ge=1, description="default: queries are not compressed")
        norm: RMSNorm.Config = RMSNorm.Config()
        bias: bool = Field(default=False, description="of the products into the narrow vectors, and of the last")
        scale: float | None = Field(default=None, gt=0, description="default: (head_dim + rope_dim) ** -0.5")
        yarn: YarnScale | None = None
        dropout: float = Field(default=0.0, ge=0, lt=1)
        backend: LatentBackend = "auto"

    @classmethod
    def heads(cls, config: LatentAttention.Config, d_model: int) -> Heads:
        if not config.head_dim and d_model % config.n_heads:
            raise ValueError(f"n_heads = {config.n_heads} must divide d_model = {d_model}, or head_dim must be given")
        width = config.head_dim or d_model // config.n_heads
        return Heads(config.n_heads, config.rope_dim or max(2, width // 4 * 2))

    def __init__(self, config: LatentAttention.Config, dims: Dims):
        super().__init__()
        self.config, D, H = config, dims.d_model, config.n_heads
        self.n_heads, self.rope_dim = self.heads(config, D)
        self.head_dim = K = config.head_dim or D // H
        self.v_head_dim = config.v_head_dim or K
        self.kv_rank = R = config.kv_rank or 4 * K
        self.q_down = Projection(D, config.q_rank, "q_down", bias=config.bias) if config.q_rank else None
        self.q_norm = RMSNorm(config.norm, config.q_rank) if config.q_rank else None
        self.q = Projection(config.q_rank or D, H * (K + self.rope_dim), "q")
        self.kv_down = Projection(D, R, "kv_down", bias=config.bias)
        self.kv_norm = RMSNorm(config.norm, R)
        self.k_rope = Projection(D, self.rope_dim, "k_rope", bias=config.bias)
        self.k = Projection(R, H * K, "k")
        self.v = Projection(R, H * self.v_head_dim, "v")
        self.o = Projection(H * self.v_head_dim, D, "o", bias=config.bias)
        scale = config.scale or (K + self.rope_dim) ** -0.5
        self.scale = scale * config.yarn.value() if config.yarn else scale
        self.reader = FullReader()
        self.backend: LatentBackend = config.backend  # training puts what it chose in the place of auto

    def state_spec(self) -> StateSpec:
        return {"latent": StateField("token", (self.kv_rank + self.rope_dim,))}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        q = self.q(x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x)))
        q = q.view(B, T, self.n_heads, -1)
        content, turned, k_rope = q[..., : self.head_dim], q[..., self.head_dim :], self.k_rope(x)[:, :, None]
        if (rotation := ctx.rotation(turned.shape[-1])) is not None:
            turned, k_rope = rotation(turned), rotation(k_rope)
        latent, keys = torch.cat([self.kv_norm(self.kv_down(x)), k_rope[:, :, 0]], -1), ctx.keys
        if state is not None:
            keys, held = state.append(ctx, latent=latent)
            latent = held["latent"]
        attends: AttendName = "auto" if self.backend == "absorbed" else self.backend
        reading = Reading(
            None, ATTENDS.get(attends, sdpa), attends, self.scale, None,
            self.config.dropout if self.training else 0.0, self.training,
        )  # fmt: skip
        read = self._absorbed if self.absorbs(T, latent.shape[1]) else self._expanded
        y = read(content, turned, latent, ctx, keys, state, reading)
        return self.o(y.reshape(B, T, -1)), {}

    def absorbs(self, n_queries: int, n_keys: int) -> bool:
        """Whether so many queries read so many keys in the absorbed form."""
        if self.config.backend != "auto":
            return self.backend == "absorbed"
        R, K, V = self.kv_rank, self.head_dim, self.v_head_dim
        expanded = n_keys * R * (K + V) + n_queries * n_keys * (K + self.rope_dim + V)
        return n_queries * R * (K + V) + n_queries * n_keys * 2 * (R + self.rope_dim) < expanded

    def _expanded(
        self, content: Tensor, turned: Tensor, latent: Tensor, ctx: Context, keys: Keys, state: LayerState | None,
        reading: Reading,
    ) -> Tensor:  # fmt: skip
        """Keys and values of every head, made from what is held: (B, T, H, V)."""
        (B, S, _), H = latent.shape, self.n_heads
        c, k_rope = latent[..., : self.kv_rank], latent[..., self.kv_rank :]
        k = torch.cat([self.k(c).view(B, S, H, -1), k_rope[:, :, None].expand(-1, -1, H, -1)], -1)
        v, q = self.v(c).view(B, S, H, -1), torch.cat([content, turned], -1)
        if state is None:
            return self.reader.read(q, k, v, ctx, None, reading)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attend_masked(q, k, v, self.reader.mask(ctx, keys), ctx, keys, reading).transpose(1, 2)

    def _absorbed(
        self, content: Tensor, turned: Tensor, latent: Tensor, ctx: Context, keys: Keys, state: LayerState | None,
        reading: Reading,
    ) -> Tensor:  # fmt: skip
        """Multi-query attention over what is held, the key matrix on the queries, the value matrix on the result."""
        H = self.n_heads
        to_latent = self.k.weight.view(H, self.head_dim, -1)
        q = torch.cat([torch.einsum("bthk,hkr->bthr", content, to_latent), turned], -1)
        held = latent[:, :, None]  # values as wide as keys, for the fused kernels; the rotary part is not read
        if state is None:
            read = self.reader.read(q, held, held, ctx, None, reading)
        else:
            q, held = q.transpose(1, 2), held.transpose(1, 2)
            read = attend_masked(q, held, held, self.reader.mask(ctx, keys), ctx, keys, reading).transpose(1, 2)
        to_value = self.v.weight.view(H, self.v_head_dim, -1)
        return torch.einsum("bthr,hvr->bthv", read[..., : self.kv_rank], to_value)

    def flops(self, n_queries: int, n_keys: int) -> int:
        expands = (self.k, self.v)
        of_x = sum(p.d_in * p.d_out for p in self.products() if p not in expands)
        of_keys = sum(p.d_in * p.d_out for p in expands)
        width = self.head_dim + self.rope_dim + self.v_head_dim
        return 2 * (n_queries * of_x + n_keys * of_keys + n_queries * n_keys * self.n_heads * width)

    def predicted_parameters(self) -> int:
        norms = [norm for norm in (self.q_norm, self.kv_norm) if norm is not None]
        return sum(p.n_parameters() for p in self.products()) + sum(norm.predicted_parameters() for norm in norms)

    def products(self) -> list[Projection]:
        """The weight products there are."""
        found = (self.q_down, self.q, self.kv_down, self.k_rope, self.k, self.v, self.o)
        return [p for p in found if p is not None]
