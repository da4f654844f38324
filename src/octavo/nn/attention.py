"""Softmax attention over a row's own tokens: multi-head, grouped-query, multi-query, with any reader; its ablations."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.attend import ATTENDS, Attend, AttendName, sdpa
from octavo.nn.contracts import Aux, Context, Dims, Heads, Mixer
from octavo.nn.latent import LatentAttention
from octavo.nn.norm import LayerNorm, Norm, RMSNorm
from octavo.nn.projection import Projection
from octavo.nn.reader import FullReader, Reader, Reading, WindowReader
from octavo.nn.readers import READERS
from octavo.nn.state import LayerState, StateSpec
from octavo.schema import Config, component, one_of

HEAD_NORMS: dict[str, type[Norm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Attention(Mixer):
    """``softmax(q k^T / sqrt(K)) v`` per head, heads concatenated, projected back.

    n_kv_heads = n_heads is multi-head attention (Vaswani et al. 2017, section 3.2.2), 1 is multi-query
    (Shazeer 2019), anything between grouped-query (Ainslie et al. 2023). qk_norm normalises queries and keys
    before the rotation (Dehghani et al. 2023, section 2): each head's own (Qwen3), or with qk_norm_over
    ``all`` heads' channels as one vector (OLMo 2: Walsh et al. 2024). ``softcap`` c keeps scores within
    (-c, c) by c tanh(s / c) (Gemma 2: Gemma Team 2024, section 2). ``dropout`` acts on the probabilities, after
    the softmax. ``reader`` says which keys are read; ``window`` is short for the reader of that name. ``rotate``
    false leaves this layer's queries and keys as they are.

    ``sinks`` gives each head one learned score of no key, so that a head can read little (gpt-oss: OpenAI 2025,
    section 2). ``gate`` multiplies what was read by the sigmoid of one more product of x, a number for each head or
    each channel (Qiu et al. 2025; Qwen3-Next). ``v_rank`` r makes the value matrix a product of two, D to r to its
    channels. To see what each matrix is for: ``keys`` makes the queries or the values serve as keys too, before
    norms and rotation (of grouped heads only the values can), and ``values`` ``input`` reads x itself, cut into heads.
    """

    class Config(Config):
        kind: Literal["attention"] = "attention"
        n_heads: int = Field(default=8, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1, description="default: n_heads")
        head_dim: int | None = Field(default=None, ge=1, description="default: d_model / n_heads")
        window: int | None = Field(default=None, ge=1, description="read only this many last tokens")
        reader: one_of(READERS) | None = None  # type: ignore[valid-type]
        rotate: bool = Field(default=True, description="by the model's rotary positions, if it has them")
        qkv_bias: bool = False
        o_bias: bool = False
        qk_norm: one_of(HEAD_NORMS) | None = None  # type: ignore[valid-type]
        qk_norm_over: Literal["head", "all"] = "head"
        scale: float | None = Field(default=None, gt=0, description="default: head_dim ** -0.5")
        softcap: float | None = Field(default=None, gt=0, description="bound of the scores, by tanh")
        dropout: float = Field(default=0.0, ge=0, lt=1)
        sinks: bool = Field(default=False, description="a learned score of no key for each head")
        gate: Literal["head", "channel"] | None = Field(default=None, description="sigmoid gate on what was read")
        keys: Literal["own", "query", "value"] = Field(default="own", description="whose product the keys are")
        values: Literal["own", "input"] = Field(default="own", description="a product of x, or x itself")
        v_rank: int | None = Field(default=None, ge=1, description="the value matrix is a product through this width")
        backend: AttendName = "auto"

        @model_validator(mode="after")
        def _heads_divide(self) -> Attention.Config:
            if self.n_heads % (self.n_kv_heads or self.n_heads):
                divisors = [str(g) for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
                raise ValueError(
                    f"n_kv_heads = {self.n_kv_heads} must divide n_heads = {self.n_heads}; use {', '.join(divisors)}"
                )
            if self.window is not None and self.reader is not None:
                raise ValueError("window is short for a reader; give one of window and reader")
            if self.keys == "query" and (self.n_kv_heads or self.n_heads) != self.n_heads:
                raise ValueError(f"keys = query needs n_kv_heads = n_heads = {self.n_heads}")
            if self.values == "input" and (self.v_rank is not None or self.keys == "value"):
                raise ValueError("values = input leaves no value matrix, of which v_rank and keys = value speak")
            return self

    @classmethod
    def heads(cls, config: Attention.Config, d_model: int) -> Heads:
        if not config.head_dim and d_model % config.n_heads:
            raise ValueError(f"n_heads = {config.n_heads} must divide d_model = {d_model}, or head_dim must be given")
        K, G = config.head_dim or d_model // config.n_heads, config.n_kv_heads or config.n_heads
        if config.values == "input" and d_model != G * K:
            raise ValueError(f"values = input needs n_kv_heads * head_dim = d_model = {d_model}, not {G * K}")
        return Heads(config.n_heads, K if config.rotate else 0)

    def __init__(self, config: Attention.Config, dims: Dims):
        super().__init__()
        self.config, D = config, dims.d_model
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or D // config.n_heads
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        self.q = Projection(D, H * K, "q", bias=config.qkv_bias)
        self.k = Projection(D, G * K, "k", bias=config.qkv_bias) if config.keys == "own" else None
        own = config.values == "own"
        self.v_down = Projection(D, config.v_rank, "v_down") if config.v_rank else None
        self.v = Projection(config.v_rank or D, G * K, "v", bias=config.qkv_bias) if own else None
        widths = {"head": H, "channel": H * K}
        self.gate = Projection(D, widths[config.gate], "gate") if config.gate else None
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None
        self.o = Projection(H * K, D, "o", bias=config.o_bias)
        make = component(HEAD_NORMS, config.qk_norm.kind) if config.qk_norm else None
        together = config.qk_norm_over == "all"
        self.q_norm: Norm | None = make(config.qk_norm, H * K if together else K) if make else None
        self.k_norm: Norm | None = make(config.qk_norm, G * K if together else K) if make else None
        chosen = WindowReader.Config(window=config.window) if config.window else config.reader or FullReader.Config()
        self.use_reader(chosen, dims.max_seq_len)
        self.attend: Attend = ATTENDS.get(config.backend, sdpa)
        self.backend: AttendName = config.backend  # training puts what it chose in the place of auto

    def use_reader(self, config: Config, max_seq_len: int) -> None:
        """Read other keys from now on; states made before do not fit."""
        self.reader: Reader = component(READERS, config.kind)(config, max_seq_len)  # type: ignore[attr-defined]
        self.capabilities = self.reader.capabilities  # type: ignore[misc]

    def reset(self) -> None:
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def state_spec(self) -> StateSpec:
        return self.reader.state_spec(self.n_kv_heads, self.head_dim)

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_heads, self.head_dim)
        v = self.v(x if self.v_down is None else self.v_down(x)) if self.v is not None else x
        v = v.reshape(B, T, self.n_kv_heads, self.head_dim)
        shared = q if self.config.keys == "query" else v
        k = self.k(x).view(B, T, self.n_kv_heads, self.head_dim) if self.k is not None else shared
        if self.q_norm is not None and self.k_norm is not None:
            start = 2 if self.config.qk_norm_over == "all" else 3
            q, k = self.q_norm(q.flatten(start)).view_as(q), self.k_norm(k.flatten(start)).view_as(k)
        reading = Reading(
            ctx.rotation(self.head_dim) if self.config.rotate else None, self.attend, self.backend, self.config.scale,
            self.config.softcap, self.config.dropout if self.training else 0.0, self.training, self.sinks,
        )  # fmt: skip
        y = self.reader.read(q, k, v, ctx, state, reading)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid().view(B, T, self.n_heads, -1)
        return self.o(y.reshape(B, T, -1)), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        products = sum(p.d_in * p.d_out for p in self.products())
        reading = self.reader.flops(n_queries, n_keys, self.n_heads, self.n_kv_heads, self.head_dim)
        return 2 * n_queries * products + reading

    def predicted_parameters(self) -> int:
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        total = sum(p.n_parameters() for p in self.products()) + (self.n_heads if self.config.sinks else 0)
        return total + sum(norm.predicted_parameters() for norm in norms)

    def products(self) -> list[Projection]:
        """The weight products there are."""
        return [p for p in (self.q, self.k, self.v_down, self.v, self.gate, self.o) if p is not None]


def use_reader(model: nn.Module, config: Config, max_seq_len: int) -> None:
    """Let every attention of ``model`` read as ``config`` says (one of READERS), for texts up to ``max_seq_len``."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.use_reader(config, max_seq_len)


def use_backend(model: nn.Module, backend: AttendName) -> None:
    """Let every attention of ``model`` whose own setting is ``auto`` use ``backend`` from now on."""
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention) and module.config.backend == "auto":
            module.backend = backend
