"""Softmax attention over a row's own tokens: multi-head, grouped-query, multi-query, full or windowed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.attend import ATTENDS, Attend, AttendName, attention_weights, by_ranges, sdpa
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Keys, Mixer
from octavo.nn.kernels.attention import causal
from octavo.nn.norm import LayerNorm, Norm, RMSNorm
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config, component, one_of

HEAD_NORMS: dict[str, type[Norm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Reader(ABC):
    """Which keys are read, at which positions, cached how: the part of attention that has no weights.

    Replaceable on a loaded model, because nothing here was trained.
    """

    causal = True
    window: int | None = None

    @abstractmethod
    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        """What must be kept between calls."""

    @abstractmethod
    def gather(self, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None) -> tuple[Keys, Tensor, Tensor]:
        """The keys and values to read, (B, S, G, K) each, given the rotated new ones (B, T, G, K)."""


class FullReader(Reader):
    """Every earlier token of the document."""

    kind: Literal["token", "ring"] = "token"

    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        entry = StateField(self.kind, (n_kv_heads, head_dim), length=self.window)
        return {"k": entry, "v": entry}

    def gather(self, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None) -> tuple[Keys, Tensor, Tensor]:
        if state is None:
            return ctx.keys, k, v
        keys, held = state.append(ctx, k=k, v=v)
        return keys, held["k"], held["v"]


class WindowReader(FullReader):
    """The last ``window`` tokens, itself included (Beltagy et al. 2020, section 3.1).

    They are kept in a ring of constant size, unless that would be larger than all tokens of a text of
    max_seq_len: published windows go up to 262144 tokens where the context has 4096.
    """

    def __init__(self, window: int, max_seq_len: int | None = None):
        self.window = window
        self.kind = "ring" if max_seq_len is None or window < max_seq_len else "token"


class Attention(Mixer):
    """``softmax(q k^T / sqrt(K)) v`` per head, heads concatenated, projected back.

    n_kv_heads = n_heads is multi-head attention (Vaswani et al. 2017, section 3.2.2), 1 is multi-query
    (Shazeer 2019), anything between grouped-query (Ainslie et al. 2023). qk_norm normalises queries and keys
    before the rotation (Dehghani et al. 2023, section 2): each head's own (Qwen3), or with qk_norm_over
    ``all`` heads' channels as one vector (OLMo 2: Walsh et al. 2024). ``softcap`` c keeps scores within
    (-c, c) by c tanh(s / c) (Gemma 2: Gemma Team 2024, section 2). ``dropout`` acts on the probabilities, after
    the softmax.
    """

    capabilities = Capabilities()

    class Config(Config):
        kind: Literal["attention"] = "attention"
        n_heads: int = Field(default=8, ge=1)
        n_kv_heads: int | None = Field(default=None, ge=1, description="default: n_heads")
        head_dim: int | None = Field(default=None, ge=1, description="default: d_model / n_heads")
        window: int | None = Field(default=None, ge=1, description="read only this many last tokens")
        qkv_bias: bool = False
        o_bias: bool = False
        qk_norm: one_of(HEAD_NORMS) | None = None  # type: ignore[valid-type]
        qk_norm_over: Literal["head", "all"] = "head"
        scale: float | None = Field(default=None, gt=0, description="default: head_dim ** -0.5")
        softcap: float | None = Field(default=None, gt=0, description="bound of the scores, by tanh")
        dropout: float = Field(default=0.0, ge=0, lt=1)
        backend: AttendName = "auto"

        @model_validator(mode="after")
        def _heads_divide(self) -> Attention.Config:
            if self.n_heads % (self.n_kv_heads or self.n_heads):
                divisors = [str(g) for g in range(1, self.n_heads + 1) if self.n_heads % g == 0]
                raise ValueError(
                    f"n_kv_heads = {self.n_kv_heads} must divide n_heads = {self.n_heads}; use {', '.join(divisors)}"
                )
            return self

    def __init__(self, config: Attention.Config, dims: Dims):
        super().__init__()
        self.config, D = config, dims.d_model
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or D // config.n_heads
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        self.q = Projection(D, H * K, "q", bias=config.qkv_bias)
        self.k = Projection(D, G * K, "k", bias=config.qkv_bias)
        self.v = Projection(D, G * K, "v", bias=config.qkv_bias)
        self.o = Projection(H * K, D, "o", bias=config.o_bias)
        make = component(HEAD_NORMS, config.qk_norm.kind) if config.qk_norm else None
        together = config.qk_norm_over == "all"
        self.q_norm: Norm | None = make(config.qk_norm, H * K if together else K) if make else None
        self.k_norm: Norm | None = make(config.qk_norm, G * K if together else K) if make else None
        self.reader: Reader = WindowReader(config.window, dims.max_seq_len) if config.window else FullReader()
        self.attend: Attend = ATTENDS.get(config.backend, sdpa)
        self.backend: AttendName = config.backend  # training puts what it chose in the place of auto

    def state_spec(self) -> StateSpec:
        return self.reader.state_spec(self.n_kv_heads, self.head_dim)

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_heads, self.head_dim)
        k = self.k(x).view(B, T, self.n_kv_heads, self.head_dim)
        v = self.v(x).view(B, T, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            start = 2 if self.config.qk_norm_over == "all" else 3
            q, k = self.q_norm(q.flatten(start)).view_as(q), self.k_norm(k.flatten(start)).view_as(k)
        if ctx.rotation is not None:
            q, k = ctx.rotation(q), ctx.rotation(k)
        keys, k, v = self.reader.gather(k, v, ctx, state)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scale = self.config.scale
        if self._by_ranges(q, k, v, ctx, state):
            first = None if ctx.plain and self.reader.window is None else ctx.first_keys(self.reader.window)
            return self.o(causal(q, k, v, first, scale=scale).transpose(1, 2).reshape(B, T, -1)), {}
        # Only when nothing is packed, padded, cached or windowed does a flag say all that the mask would.
        flag = ctx.plain and self.reader.causal and (self.reader.window is None or self.reader.window >= T)
        mask = None if flag else ctx.mask(keys, causal=self.reader.causal, window=self.reader.window)
        softcap = self.config.softcap
        if "attention" in ctx.record:
            weights = attention_weights(q, k, mask, causal=flag, scale=scale, softcap=softcap)
            ctx.recorded.setdefault("attention", []).append(weights)
        dropout = self.config.dropout if self.training else 0.0
        y = self.attend(q, k, v, mask, causal=flag, scale=scale, softcap=softcap, dropout=dropout)
        return self.o(y.transpose(1, 2).reshape(B, T, -1)), {}

    def _by_ranges(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None) -> bool:
        c = self.config
        told = self.training and self.reader.causal and state is None and "attention" not in ctx.record
        return told and not c.dropout and c.softcap is None and by_ranges(self.backend, q, k, v)

    def flops(self, n_queries: int, n_keys: int) -> int:
        projections = sum(p.d_in * p.d_out for p in (self.q, self.k, self.v, self.o))
        return 2 * n_queries * projections + 4 * n_queries * n_keys * self.n_heads * self.head_dim

    def predicted_parameters(self) -> int:
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        products = sum(p.n_parameters() for p in (self.q, self.k, self.v, self.o))
        return products + sum(norm.predicted_parameters() for norm in norms)


def use_backend(model: nn.Module, backend: AttendName) -> None:
    """Let every attention of ``model`` whose own setting is ``auto`` use ``backend`` from now on."""
    for module in model.modules():
        if isinstance(module, Attention) and module.config.backend == "auto":
            module.backend = backend
