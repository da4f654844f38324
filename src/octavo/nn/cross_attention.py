"""Attention of a text over a memory: what an encoder made of another text, read by every token alike."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.nn.attend import ATTENDS, attention_weights, sdpa
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


class CrossAttention(Mixer):
    """``softmax(q(x) k(m)^T / sqrt(K)) v(m)`` per head: queries of the text x, keys and values of the memory m.

    Every token reads the whole memory, padding left out; a row whose memory is all padding reads zeros. No positions:
    which token of the memory stands where, the encoder has said in it. Only here do keys and values come from the
    encoder; a decoder's attention over its own text has its own (Vaswani et al. 2017, section 3.2.3). With a state the
    memory's keys and values are made once, when the memory is given, and read from then on. On a recurrent decoder
    with one head this is the attention of Luong et al. 2015, section 3.1, in its bilinear form.

    memory_width is the encoder's d_model where it is not the decoder's. Other settings as in ``attention``.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["cross_attention"] = "cross_attention"
        n_heads: int = Field(default=8, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1, description="default: n_heads")
        head_dim: int | None = Field(default=None, ge=1, description="default: d_model / n_heads")
        memory_width: int | None = Field(default=None, ge=1, description="default: d_model")
        qkv_bias: bool = False
        o_bias: bool = False
        scale: float | None = Field(default=None, gt=0, description="default: head_dim ** -0.5")
        dropout: float = Field(default=0.0, ge=0, lt=1)
        backend: Literal["auto", "plain"] = "auto"

        @model_validator(mode="after")
        def _groups(self) -> CrossAttention.Config:
            if self.n_heads % (self.n_kv_heads or self.n_heads):
                raise ValueError(f"n_kv_heads = {self.n_kv_heads} must divide n_heads = {self.n_heads}")
            return self

    def __init__(self, config: CrossAttention.Config, dims: Dims):
        super().__init__()
        D, M = dims.d_model, config.memory_width or dims.d_model
        if not config.head_dim and D % config.n_heads:
            raise UnsupportedError(
                f"cross: n_heads = {config.n_heads} must divide d_model = {D}", fix="change one, or give head_dim"
            )
        self.config = config
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or D // config.n_heads
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        self.q = Projection(D, H * K, "q", bias=config.qkv_bias)
        self.k = Projection(M, G * K, "k", bias=config.qkv_bias)
        self.v = Projection(M, G * K, "v", bias=config.qkv_bias)
        self.o = Projection(H * K, D, "o", bias=config.o_bias)
        self.attend = ATTENDS.get(config.backend, sdpa)

    def state_spec(self) -> StateSpec:
        entry = StateField("memory", (self.n_kv_heads, self.head_dim))
        return {"k": entry, "v": entry, "valid": StateField("memory", (), torch.bool)}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k, v, mask = self._memory(ctx, state)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if "cross_attention" in ctx.record:
            weights = attention_weights(q, k, mask, scale=self.config.scale)
            ctx.recorded.setdefault("cross_attention", []).append(weights)
        dropout = self.config.dropout if self.training else 0.0
        y = self.attend(q, k, v, mask, scale=self.config.scale, dropout=dropout)
        return self.o(y.transpose(1, 2).reshape(B, T, -1)), {}

    def _memory(self, ctx: Context, state: LayerState | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, S, G, K) and who may read them, (B, 1, 1 or T, S): new ones, or those in the state."""
        memory = ctx.memory
        if memory is None:
            if state is None or not state.read("valid").shape[1]:
                raise UnsupportedError(
                    "cross-attention has no memory to read",
                    fix="give Inputs.memory (of an encoder-decoder: source) with the first tokens",
                )
            return state.read("k"), state.read("v"), state.read("valid")[:, None, None]
        k, v = (p(memory.hidden).unflatten(-1, (self.n_kv_heads, self.head_dim)) for p in (self.k, self.v))
        mask = memory.valid[:, None, None]
        if memory.doc_ids is not None:
            if state is not None:
                raise UnsupportedError("packed memories cannot be decoded from", fix="give one pair a row")
            mask = mask & (memory.doc_ids[:, None, None] == ctx.doc_ids[:, None, :, None])
        if state is not None:
            state.write(k=k, v=v, valid=memory.valid)
        return k, v, mask

    def flops(self, n_queries: int, n_keys: int) -> int:
        """Here ``n_keys`` counts the memory, whose keys and values are made in the same pass."""
        text = n_queries * (self.q.d_in * self.q.d_out + self.o.d_in * self.o.d_out)
        memory = n_keys * (self.k.d_in * self.k.d_out + self.v.d_in * self.v.d_out)
        return 2 * (text + memory) + 4 * n_queries * n_keys * self.n_heads * self.head_dim

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in (self.q, self.k, self.v, self.o))
