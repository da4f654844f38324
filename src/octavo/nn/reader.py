"""Readers: which keys attention reads, at which positions, cached how. The part of attention that has no weights.

A reader is replaceable on a loaded model, because nothing in it was trained (``use_reader`` in nn/attention.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from octavo.nn.attend import Attend, AttendName, attention_weights, by_ranges, causal_by_ranges
from octavo.nn.contracts import Capabilities, Context, Keys
from octavo.nn.position import Rotation
from octavo.nn.reader_raw import read_raw
from octavo.nn.rope import QueryRotation
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


@dataclass(frozen=True)
class Reading:
    """What an attention layer tells its reader about one pass.

    rotation is None where nothing is turned. dropout is zero in evaluation. attend computes softmax attention from
    (B, H, T, K), see nn/attend.py; ``backend`` is the name behind it. sinks (H,) are learned scores of no key.
    """

    rotation: Rotation | None
    attend: Attend
    backend: AttendName
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    training: bool = False
    sinks: Tensor | None = None


class Reader(ABC):
    """The contract: state for what is kept between calls, and one pass over queries and keys."""

    Config: ClassVar[type[Config]]
    capabilities: ClassVar[Capabilities] = Capabilities()
    window: int | None = None
    score_passes: ClassVar[int] = 1  # how often all scores are computed

    @abstractmethod
    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        """What must be kept between calls."""

    @abstractmethod
    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        """Attention of q (B, T, H, K) over k, v (B, T, G, K), not yet rotated, and what is kept: (B, T, H, K)."""

    def flops(self, n_queries: int, n_keys: int, n_heads: int, n_kv_heads: int, head_dim: int) -> int:
        """Multiply-adds times two of one row's pass, matrix products only."""
        return 2 * (1 + self.score_passes) * n_queries * n_keys * n_heads * head_dim

    def apart(self, n_tokens: int) -> int:
        """Of ``n_tokens`` kept, how many no query reads but those chosen for it: they could be in slower memory."""
        return 0


class FullReader(Reader):
    """Every earlier token of the document. Keys are kept rotated."""

    class Config(Config):
        kind: Literal["full"] = "full"

    kind: Literal["token", "ring"] = "token"
    ranged: bool = True  # whether what a token reads is all from one token on

    def __init__(self, config: FullReader.Config | None = None, max_seq_len: int | None = None):
        pass

    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        entry = StateField(self.kind, (n_kv_heads, head_dim), length=self.window)
        return {"k": entry, "v": entry}

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        if isinstance(reading.rotation, QueryRotation):  # keys cannot be kept turned then
            return read_raw(self, q, k, v, ctx, state, reading, reading.rotation)
        if reading.rotation is not None:
            q, k = reading.rotation(q), reading.rotation(k)
        keys = ctx.keys
        if state is not None:
            keys, held = state.append(ctx, k=k, v=v)
            k, v = held["k"], held["v"]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.ranged and self._by_ranges(q, k, v, ctx, state, reading):
            first = None if self.reads_all(ctx) else self.first_keys(ctx)
            y = causal_by_ranges(q, k, v, first, scale=reading.scale, dropout=reading.dropout)
            return y.transpose(1, 2)
        # Only when nothing is packed, padded, cached or windowed does a flag say all that the mask would.
        flag = self.reads_all(ctx) and ctx.causal and ctx.bias is None
        return attend_masked(q, k, v, None if flag else self.mask(ctx, keys), ctx, keys, reading, flag).transpose(1, 2)

    def reads_all(self, ctx: Context) -> bool:
        """Whether each token surely reads the whole row, or all of it up to itself."""
        return ctx.plain and (self.window is None or self.window >= ctx.slots.shape[1])

    def first_keys(self, ctx: Context) -> Tensor:
        """``mask`` without state as ranges, see ``Context.first_keys``; asked only if ``ranged``."""
        return ctx.first_keys(self.window)

    def mask(self, ctx: Context, keys: Keys) -> Tensor:
        """Who may read whom, (B, 1, T, S)."""
        return ctx.mask(keys, causal=ctx.causal, window=self.window)

    def _by_ranges(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading
    ) -> bool:
        causal = ctx.causal and ctx.prefix is None
        told = reading.training and causal and state is None and "attention" not in ctx.record
        bare = reading.softcap is None and reading.sinks is None and ctx.bias is None
        return told and bare and by_ranges(reading.backend, q, k, v)


class WindowReader(FullReader):
    """The last ``window`` tokens, itself included (Beltagy et al. 2020, section 3.1).

    They are kept in a ring of constant size, unless that would be larger than all tokens of a text of
    max_seq_len: published windows go up to 262144 tokens where the context has 4096.
    """

    class Config(Config):
        kind: Literal["window"] = "window"
        window: int = Field(ge=1)

    def __init__(self, config: WindowReader.Config, max_seq_len: int | None = None):
        self.window = config.window
        self.kind = "ring" if max_seq_len is None or config.window < max_seq_len else "token"


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ctx: Context, keys: Keys, reading: Reading, flag: bool = False
) -> Tensor:
    """Softmax attention of (B, H, T, K) under ``mask`` and the scheme's bias; maps are recorded if asked for."""
    bias = ctx.score_bias(keys)
    how = {"causal": flag, "scale": reading.scale, "softcap": reading.softcap, "bias": bias, "sinks": reading.sinks}
    if "attention" in ctx.record:
        ctx.recorded.setdefault("attention", []).append(attention_weights(q, k, mask, **how))  # type: ignore[arg-type]
    return reading.attend(q, k, v, mask, dropout=reading.dropout, **how)
