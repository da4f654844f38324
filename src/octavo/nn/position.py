"""Position schemes: what is added to the embedding, what turns queries and keys, what is added to scores.

A scheme may add to the input (learned, sinusoidal), give the rotation that attention applies (RoPE), or a bias of
its scores. They are different components: the sum of an embedding and a sinusoid is not a rotation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.contracts import Context, Keys
from octavo.nn.projection import Embedding
from octavo.schema import Config, component, one_of

RotaryLayout = Literal["half", "interleaved"]


class PositionDims(NamedTuple):
    """What a position scheme may know about the model. n_heads is None where the blocks differ."""

    d_model: int
    head_dim: int
    max_seq_len: int
    n_heads: int | None = None


@dataclass
class Rotation:
    """Rotary tables of one forward pass: cos and sin (B, T, R/2) for the first R of K channels.

    ``at`` gives the rotation for other positions (B, S): for keys that are kept as they were before rotation.
    """

    cos: Tensor
    sin: Tensor
    layout: RotaryLayout
    at: Callable[[Tensor], Rotation]

    def __call__(self, x: Tensor) -> Tensor:
        """Turn x (B, T, H, K) by its token's position. fp32 tables; the result has x's dtype."""
        cos, sin = self.cos[:, :, None].to(x.dtype), self.sin[:, :, None].to(x.dtype)
        R = 2 * cos.shape[-1]
        turned, rest = x[..., :R], x[..., R:]
        if self.layout == "half":
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


class Positions(nn.Module, ABC):
    """The contract of a position scheme: built once for the model, asked once a forward."""

    max_positions: int | None = None  # a hard limit, where a table ends
    biased = False  # whether ``bias`` is to be asked
    beyond = "shorten the text or use rope"  # the way out for a text beyond it

    @abstractmethod
    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block: x (B, T, D) with or without something added."""

    def rotation(self, positions: Tensor) -> Rotation | None:
        """The rotation for positions (B, T), or None."""
        return None

    def bias(self, ctx: Context, keys: Keys) -> Tensor:
        """What is added to the scaled scores of queries ``ctx`` and ``keys``: (1 or B, H, T, S) float."""
        raise TypeError(f"{type(self).__name__} adds nothing to scores")

    def predicted_parameters(self) -> int:
        return 0


class NoPositions(Positions):
    """Nothing added, nothing turned: a causal model still sees order through its mask."""

    class Config(Config):
        kind: Literal["none"] = "none"

    def __init__(self, config: NoPositions.Config, dims: PositionDims):
        super().__init__()

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


class LearnedPositions(Positions):
    """One trained vector a position, added to the token's (GPT-2, BERT); ends hard at max_seq_len."""

    class Config(Config):
        kind: Literal["learned"] = "learned"

    def __init__(self, config: LearnedPositions.Config, dims: PositionDims):
        super().__init__()
        self.max_positions = dims.max_seq_len
        self.table = Embedding(dims.max_seq_len, dims.d_model, "position")

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table(positions)

    def predicted_parameters(self) -> int:
        return self.table.n * self.table.d


def sinusoid(positions: Tensor, d: int, layout: RotaryLayout, base: float = 10000.0) -> Tensor:
    """The fixed wave table: positions (...) to (..., d), float32.

    ``interleaved``: sin in even, cos in odd channels (Vaswani et al. 2017, section 3.5). ``half``: all sines,
    then all cosines, as in the code of the authors' tensor2tensor; its wavelengths end exactly at ``base``.
    An odd ``d`` gets a last channel of zeros.
    """
    half = d // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32)
    spacing = 2 * steps / d if layout == "interleaved" else steps / max(half - 1, 1)
    angles = positions[..., None].float() * base**-spacing
    wave = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
    if layout == "half":
        wave = torch.cat([angles.sin(), angles.cos()], -1)
    return wave if d % 2 == 0 else torch.nn.functional.pad(wave, (0, 1))


class SinusoidalPositions(Positions):
    """Fixed waves added to the embedding; no limit of length, no parameters."""

    class Config(Config):
        kind: Literal["sinusoidal"] = "sinusoidal"
        layout: RotaryLayout = "interleaved"
        base: float = Field(default=10000.0, gt=1)

    def __init__(self, config: SinusoidalPositions.Config, dims: PositionDims):
        super().__init__()
        self.config, self.d_model = config, dims.d_model

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + sinusoid(positions, self.d_model, self.config.layout, self.config.base).to(x.dtype)


def rope_frequencies(dim: int, theta: float, factors: Tensor | float = 1.0) -> Tensor:
    """``1 / (factor_i theta^(2i/dim))`` for i in 0..dim/2-1, float32 (Su et al. 2021, equation 15).

    The order of operations is that of the published checkpoints' code: far positions multiply a last bit.
    """
    return 1.0 / (factors * theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


class RopeScaling(ABC):
    """How a rotary table reaches beyond the lengths it was first trained on: other frequencies, a magnitude."""

    magnitude: float = 1.0  # what cos and sin are multiplied by
    limit: int | None = None  # positions this table is good for, if it ends

    @abstractmethod
    def frequencies(self, dim: int, theta: float) -> Tensor:
        """The frequency of each of the dim/2 pairs, float32, on the CPU."""


class LongRope(RopeScaling):
    """Each pair's frequency divided by a searched factor: one list for short texts, one for long ones.

    Which list is used is settled once, when the model is built: ``long`` if its max_seq_len exceeds
    ``original``, else ``short``, and then the table ends at ``original``. A token's rotation depends on its
    position alone, so a cache stays true. (transformers chooses at every call, by the longest row of the
    batch, and drops the cache where the choice changes.) cos and sin are multiplied by ``magnitude``, by
    default ``sqrt(1 + ln(extended / original) / ln(original))``. Source: Ding et al. 2024 (LongRoPE), section 3;
    the magnitude, Abdin et al. 2024 (Phi-3) and its code.
    """

    class Config(Config):
        kind: Literal["longrope"] = "longrope"
        short: tuple[float, ...]
        long: tuple[float, ...]
        original: int = Field(ge=2, description="tokens of the first training")
        extended: int = Field(ge=2, description="tokens the long factors reach to")
        magnitude: float | None = Field(default=None, gt=0)

        @model_validator(mode="after")
        def _positive(self) -> LongRope.Config:
            if any(factor <= 0 for factor in (*self.short, *self.long)):
                raise ValueError("the factors of longrope must be positive")
            return self

        def check(self, n_pairs: int) -> None:
            """Raise ValueError unless there is one factor a pair."""
            for name, factors in (("short", self.short), ("long", self.long)):
                if len(factors) != n_pairs:
                    raise ValueError(f"longrope.{name} has {len(factors)} factors for {n_pairs} pairs of channels")

    def __init__(self, config: LongRope.Config, max_seq_len: int):
        reach = math.log(max(config.extended / config.original, 1.0)) / math.log(config.original)
        self.magnitude = config.magnitude or math.sqrt(1 + reach)
        self.factors = config.long if max_seq_len > config.original else config.short
        self.limit = None if max_seq_len > config.original else config.original

    def frequencies(self, dim: int, theta: float) -> Tensor:
        return rope_frequencies(dim, theta, torch.tensor(self.factors, dtype=torch.float32))


ROPE_SCALINGS: dict[str, type[RopeScaling]] = {"longrope": LongRope}


class RotaryPositions(Positions):
    """RoPE: queries and keys turn by an angle proportional to their position.

    ``layout`` says which channels form a pair: ``half`` pairs i with i + K/2 (Llama, Qwen), ``interleaved``
    pairs 2i with 2i + 1 (the paper, GPT-J). They differ by a fixed permutation of the q and k rows.
    ``fraction`` of the head width is turned (GPT-NeoX: Black et al. 2022, section 2.1.1). ``scaling`` changes
    the frequencies for longer texts. ``reverse`` turns the other way (nanochat). Source: Su et al. 2021, section 3.2.
    """

    class Config(Config):
        kind: Literal["rope"] = "rope"
        theta: float = Field(default=10000.0, gt=1)
        layout: RotaryLayout = "half"
        fraction: float = Field(default=1.0, gt=0, le=1)
        reverse: bool = Field(default=False, description="turn clockwise")
        scaling: one_of(ROPE_SCALINGS) | None = None  # type: ignore[valid-type]

        def check(self, head_dim: int) -> None:
            """Raise ValueError if this cannot turn heads of that width."""
            if head_dim % 2:
                raise ValueError(f"rope turns pairs of channels, head_dim = {head_dim} is odd")
            scaling: Any = self.scaling
            if scaling is not None and hasattr(scaling, "check"):
                scaling.check(int(head_dim * self.fraction) // 2)

    def __init__(self, config: RotaryPositions.Config, dims: PositionDims):
        super().__init__()
        self.config = config
        self.dim = int(dims.head_dim * config.fraction) // 2 * 2
        make = component(ROPE_SCALINGS, config.scaling.kind) if config.scaling else None
        self.scaling: RopeScaling | None = make(config.scaling, dims.max_seq_len) if make else None
        if self.scaling is not None and self.scaling.limit is not None:
            self.max_positions = self.scaling.limit
            self.beyond = f"shorten the text, or build the model with max_seq_len above {self.scaling.limit}"
        # A plain attribute, not a buffer: casting the model to 16 bits must not round the frequencies.
        with torch.device("cpu"):  # also for a model built without weights, on the meta device
            self.frequencies = self.table()

    def table(self) -> Tensor:
        """The frequency of each pair, (R/2,)."""
        if self.scaling is not None:
            return self.scaling.frequencies(self.dim, self.config.theta)
        return rope_frequencies(self.dim, self.config.theta)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def rotation(self, positions: Tensor) -> Rotation:
        angles = positions[..., None].float() * self.frequencies.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if self.scaling is not None:
            cos, sin = cos * self.scaling.magnitude, sin * self.scaling.magnitude
        sin = -sin if self.config.reverse else sin
        return Rotation(cos, sin, self.config.layout, self.rotation)
