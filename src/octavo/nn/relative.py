"""Attention whose scores meet a trained or a sinusoidal vector for each distance: Shaw et al., Transformer-XL."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.attend import ATTENDS, attention_weights
from octavo.nn.contracts import Aux, Context, Dims, Heads, Mixer
from octavo.nn.dropout import dropout
from octavo.nn.position import sinusoid
from octavo.nn.position_bias import behind
from octavo.nn.projection import Embedding, Projection
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


class RelativeConfig(Config):
    """What both have: heads, biases of the products, dropout, and which form computes the term of distances."""

    n_heads: int = Field(default=8, ge=1)
    head_dim: int | None = Field(default=None, ge=1, description="default: d_model / n_heads")
    qkv_bias: bool = False
    o_bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    backend: Literal["auto", "plain"] = "auto"


class RelativeAttention(Mixer):
    """Multi-head attention whose mixers add a term for each distance; keys are kept as they are."""

    config: RelativeConfig

    def __init__(self, config: RelativeConfig, dims: Dims):
        super().__init__()
        self.config, D = config, dims.d_model
        self.n_heads, self.head_dim = config.n_heads, config.head_dim or D // config.n_heads
        width = self.n_heads * self.head_dim
        self.q = Projection(D, width, "q", bias=config.qkv_bias)
        self.k = Projection(D, width, "k", bias=config.qkv_bias)
        self.v = Projection(D, width, "v", bias=config.qkv_bias)
        self.o = Projection(width, D, "o", bias=config.o_bias)

    @classmethod
    def heads(cls, config: RelativeConfig, d_model: int) -> Heads | None:
        if not config.head_dim and d_model % config.n_heads:
            raise ValueError(f"n_heads = {config.n_heads} must divide d_model = {d_model}, or head_dim must be given")
        return None  # no scheme of the model serves it: distances are its own

    def state_spec(self) -> StateSpec:
        entry = StateField("token", (self.n_heads, self.head_dim))
        return {"k": entry, "v": entry}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, self.n_heads, self.head_dim) for p in (self.q, self.k, self.v))
        keys = ctx.keys
        if state is not None:
            keys, held = state.append(ctx, k=k, v=v)
            k, v = held["k"], held["v"]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = self.read(q, k, v, behind(ctx, keys), ctx.mask(keys, causal=ctx.causal), ctx)
        return self.o(y.transpose(1, 2).reshape(B, T, -1)), {}

    @abstractmethod
    def read(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, mask: Tensor, ctx: Context) -> Tensor:
        """Attention (B, H, T, K) of q (B, H, T, K) over k, v (B, H, S, K), ``distance`` (B, T, S) tokens behind."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, ctx: Context) -> Tensor:
        """Softmax attention with ``bias`` (B, H, T, S) on scaled scores; maps are recorded if asked for."""
        if "attention" in ctx.record:
            weights = attention_weights(q, k, mask, bias=bias)
            ctx.recorded.setdefault("attention", []).append(weights)
        attend = ATTENDS["plain" if self.config.backend == "plain" else "sdpa"]
        return attend(q, k, v, mask, bias=bias, dropout=self.config.dropout if self.training else 0.0)

    def products(self) -> list[Projection]:
        """The weight products applied to every token."""
        return [self.q, self.k, self.v, self.o]

    def _reading_flops(self, n_queries: int, n_keys: int) -> int:
        """Products of tokens, content scores and sums of values."""
        each = self.n_heads * self.head_dim
        return 2 * n_queries * sum(p.d_in * p.d_out for p in self.products()) + 4 * n_queries * n_keys * each


class Shaw(RelativeAttention):
    """``e_ij = q_i (k_j + a^K_c)^T / sqrt(K)``, ``y_i = sum_j softmax(e_i)_j (v_j + a^V_c)``, ``c = clip(j - i)``.

    a^K and a^V (2C + 1, K) are trained, one pair of tables for all heads of the layer; distances are clipped to
    -C..C, C being ``clip``: further than that all are one. ``values`` false leaves a^V out. In a causal model the
    rows of later tokens stay idle. The fast form multiplies queries with the table once and picks by distance; for
    values it sums the probabilities of each distance first. Source: Shaw et al. 2018, equations 3 to 5.
    """

    class Config(RelativeConfig):
        kind: Literal["shaw"] = "shaw"
        clip: int = Field(default=16, ge=1, description="the longest distance that is told apart")
        values: bool = True

    def __init__(self, config: Shaw.Config, dims: Dims):
        super().__init__(config, dims)
        self.clip = config.clip
        self.key_table = Embedding(2 * config.clip + 1, self.head_dim, "position")
        self.value_table = Embedding(2 * config.clip + 1, self.head_dim, "position") if config.values else None

    def read(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, mask: Tensor, ctx: Context) -> Tensor:
        place = (-distance).clamp(-self.clip, self.clip) + self.clip  # of each pair in the tables, (B, T, S)
        H, scale = self.n_heads, self.head_dim**-0.5
        if self.config.backend == "plain":
            bias = torch.einsum("bhtk,btsk->bhts", q, self.key_table(place))
        else:
            bias = (q @ self.key_table.weight.T).gather(3, place[:, None].expand(-1, H, -1, -1))
        if self.value_table is None:
            return self.attend(q, k, v, mask, bias * scale, ctx)
        weights = attention_weights(q, k, mask, bias=bias * scale)
        if "attention" in ctx.record:
            ctx.recorded.setdefault("attention", []).append(weights)
        weights = dropout(weights, self.config.dropout, self.training)
        if self.config.backend == "plain":
            return weights @ v + torch.einsum("bhts,btsk->bhtk", weights, self.value_table(place))
        sums = weights.new_zeros(*weights.shape[:3], self.value_table.n)
        sums = sums.scatter_add(3, place[:, None].expand(-1, H, -1, -1), weights)
        return weights @ v + sums @ self.value_table.weight

    def flops(self, n_queries: int, n_keys: int) -> int:
        met = n_keys if self.config.backend == "plain" else self.key_table.n
        tables = 2 * n_queries * met * self.n_heads * self.head_dim
        return self._reading_flops(n_queries, n_keys) + tables * (1 if self.value_table is None else 2)

    def predicted_parameters(self) -> int:
        tables = [table for table in (self.key_table, self.value_table) if table is not None]
        return sum(p.n_parameters() for p in self.products()) + sum(table.n * table.d for table in tables)


class TransformerXl(RelativeAttention):
    """``A_ij = ((q_i + u) k_j^T + (q_i + v) (W_r R_(i-j))^T) / sqrt(K)``, softmax over j, times the values.

    R_d is the sinusoid of distance d (``interleaved`` channels, where the authors' code concatenates halves: the
    columns of W_r differ by a permutation), W_r (H K, D) makes a key of it, u and v (H, K) are trained and start
    at zero. The fast form multiplies queries with every distance once and picks by distance, in place of the
    paper's shift of rows, which serves no caches and no packed rows. A decode state holds all keys; the paper's
    memory of the segment before is that state in training, which is not kept here: a row is a text of its own.
    Source: Dai et al. 2019, section 3.3 and appendix B.
    """

    class Config(RelativeConfig):
        kind: Literal["transformer_xl"] = "transformer_xl"

    def __init__(self, config: TransformerXl.Config, dims: Dims):
        super().__init__(config, dims)
        self.d_model = dims.d_model
        self.r = Projection(dims.d_model, self.n_heads * self.head_dim, "r")
        self.u = nn.Parameter(torch.empty(self.n_heads, self.head_dim))
        self.v_r = nn.Parameter(torch.empty(self.n_heads, self.head_dim))

    def reset(self) -> None:
        nn.init.zeros_(self.u)
        nn.init.zeros_(self.v_r)

    def read(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, mask: Tensor, ctx: Context) -> Tensor:
        S = k.shape[2]
        plain = self.config.backend == "plain"
        first = 0 if ctx.causal and not plain else 1 - S  # no key that is read stands S or more tokens behind
        waves = sinusoid(torch.arange(first, S, device=q.device), self.d_model, "interleaved").to(q.dtype)
        place = (distance - first).clamp(0, S - 1 - first)
        asking, (H, K, T, D) = q + self.v_r[:, None], (self.n_heads, self.head_dim, q.shape[2], self.d_model)
        if plain:
            bias = torch.einsum("bhtk,btshk->bhts", asking, self.r(waves).unflatten(-1, (H, K))[place])
        else:
            if T * (D - K) < D * K:  # few queries: they go through W_r, not every distance
                of_all = torch.einsum("bhtk,hkd->bhtd", asking, self.r.weight.view(H, K, D)) @ waves.T
            else:
                of_all = asking @ self.r(waves).unflatten(-1, (H, K)).permute(1, 2, 0)
            bias = of_all.gather(3, place[:, None].expand(-1, H, -1, -1))
        return self.attend(q + self.u[:, None], k, v, mask, bias * self.head_dim**-0.5, ctx)

    def flops(self, n_queries: int, n_keys: int) -> int:
        """``auto`` in a causal model: both ways it meets twice the distances, and few queries take a cheaper order."""
        each = self.n_heads * self.head_dim
        n_distances = 2 * n_keys - 1 if self.config.backend == "plain" else n_keys
        distances = 2 * n_distances * self.r.d_in * self.r.d_out + 2 * n_queries * n_keys * each
        return self._reading_flops(n_queries, n_keys) + distances

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in (*self.products(), self.r)) + 2 * self.n_heads * self.head_dim
