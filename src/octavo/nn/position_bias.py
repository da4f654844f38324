"""Position schemes that add to attention's scores, by the distance of query and key: ALiBi and T5's buckets.

Distances are counted in slots, so that a cache, padding and packed documents change nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.nn.contracts import Context, Keys
from octavo.nn.position import PositionDims, Positions
from octavo.nn.projection import Embedding
from octavo.schema import Config


def behind(ctx: Context, keys: Keys) -> Tensor:
    """How many tokens each key stands before each query, (B, T, S); negative after it, of no meaning where masked."""
    return ctx.slots[:, :, None] - keys.slots[:, None, :]


class _Biased(Positions, ABC):
    biased = True

    def __init__(self, kind: str, dims: PositionDims):
        super().__init__()
        if dims.n_heads is None:
            raise UnsupportedError(
                f"positions {kind} add to the scores of every head; the blocks have none, or several numbers of heads",
                fix="give all attention the same n_heads, or use rope",
            )
        self.n_heads = dims.n_heads

    @abstractmethod
    def bias(self, ctx: Context, keys: Keys) -> Tensor: ...


def alibi_slopes(n_heads: int) -> Tensor:
    """The slope m of each head, (H,) float32: ``2^(-8h/H)``, h = 1..H, for a power of two.

    For other numbers: the slopes of the next lower power of two, then every other one of the next higher power's,
    from its first (the code of Press et al. 2021).
    """
    lower = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * h / lower) for h in range(1, lower + 1)]
    between = [2 ** (-8 * h / (2 * lower)) for h in range(1, 2 * lower + 1, 2)]
    return torch.tensor((slopes + between)[:n_heads], dtype=torch.float32)


class AlibiPositions(_Biased):
    """``s_ij + (-m_h |i - j|)``: what is added to the scaled score of query i and key j in head h.

    Slopes m are fixed, see ``alibi_slopes``; no parameters, no limit of length. In a model that reads both ways
    distance counts on both sides. Source: Press et al. 2021, section 3. ``rounding`` bfloat16 adds ``m_h j`` instead,
    j the key's place in its document, with m, j and their product rounded so: what Falcon's code does.
    """

    class Config(Config):
        kind: Literal["alibi"] = "alibi"
        scale: float = Field(default=1.0, gt=0, description="of the slopes; Falcon: head_dim ** -0.5")
        rounding: Literal["none", "bfloat16"] = "none"

    def __init__(self, config: AlibiPositions.Config, dims: PositionDims):
        super().__init__(config.kind, dims)
        # A plain attribute, not a buffer: casting the model to 16 bits must not round the slopes.
        with torch.device("cpu"):
            self.slopes = alibi_slopes(self.n_heads)
        self.scale, self.rounded = config.scale, config.rounding == "bfloat16"

    def bias(self, ctx: Context, keys: Keys) -> Tensor:
        if self.rounded:
            slopes = self.slopes.to(keys.slots.device).bfloat16()[:, None, None]
            return (slopes * places(keys)[:, None, None]).float() * self.scale
        distance = behind(ctx, keys).abs().float()
        return -self.scale * self.slopes.to(distance.device)[:, None, None] * distance[:, None]


def places(keys: Keys) -> Tensor:
    """The place of each key in its document, (B, S), of keys in the order of the text."""
    begins = F.pad(keys.doc_ids[:, 1:] != keys.doc_ids[:, :-1], (1, 0))
    return keys.slots - torch.where(begins, keys.slots, 0).cummax(1).values


class T5Positions(_Biased):
    """``s_ij + B[bucket(j - i), h]``: a trained number for each head and range of distances, one table for all layers.

    Half of the buckets hold one distance each, the others ranges that widen logarithmically up to max_distance,
    beyond which all is one bucket. In a model that reads both ways half of the buckets are for later tokens.
    Source: Raffel et al. 2020, section 2.1. (T5 does not scale its scores; that is attention's ``scale``.)
    """

    class Config(Config):
        kind: Literal["t5"] = "t5"
        n_buckets: int = Field(default=32, ge=4)
        max_distance: int = Field(default=128, ge=2)

        @model_validator(mode="after")
        def _wide(self) -> T5Positions.Config:
            if self.max_distance <= self.n_buckets // 2:
                raise ValueError(f"max_distance = {self.max_distance} must exceed half of n_buckets = {self.n_buckets}")
            return self

    def __init__(self, config: T5Positions.Config, dims: PositionDims):
        super().__init__(config.kind, dims)
        self.config = config
        self.table = Embedding(config.n_buckets, self.n_heads, "position")

    def bias(self, ctx: Context, keys: Keys) -> Tensor:
        buckets = t5_bucket(-behind(ctx, keys), self.config.n_buckets, self.config.max_distance, causal=ctx.causal)
        return self.table(buckets).permute(0, 3, 1, 2)

    def predicted_parameters(self) -> int:
        return self.table.n * self.table.d


def t5_bucket(ahead: Tensor, n_buckets: int, max_distance: int, *, causal: bool) -> Tensor:
    """The bucket of keys that stand ``ahead`` (...) tokens after their query, int64 in 0..n_buckets-1.

    The logarithm is taken in float32 and cut off, in the order of the published code: borders fall on the same side.
    """
    first = torch.zeros_like(ahead)
    if causal:
        distance = (-ahead).clamp(min=0)
    else:
        n_buckets //= 2
        first, distance = (ahead > 0).long() * n_buckets, ahead.abs()
    single = n_buckets // 2
    logarithm = torch.log(distance.clamp(min=1).float() / single) / math.log(max_distance / single)
    ranges = (single + (logarithm * (n_buckets - single)).long()).clamp(max=n_buckets - 1)
    return first + torch.where(distance < single, distance, ranges)
