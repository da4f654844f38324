"""Position schemes: what is added to the embedding, what turns queries and keys, what is added to scores.

A scheme may add to the input (learned, sinusoidal), give the rotation that attention applies (nn/rope.py), or a bias
of its scores (nn/position_bias.py). They are different components: the sum of an embedding and a sinusoid is not a
rotation. Relative positions that have weights in every layer are mixers, in nn/relative.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Context, Keys
from octavo.nn.projection import Embedding
from octavo.schema import Config

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


class Positions(nn.Module):
    """The contract of a position scheme: built once for the model, asked once a forward. By itself it does nothing."""

    max_positions: int | None = None  # a hard limit, where a table ends
    biased = False  # whether ``bias`` is to be asked
    beyond = "shorten the text or use rope"  # the way out for a text beyond it

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block: x (B, T, D) with or without something added."""
        return x

    def rotation(self, positions: Tensor) -> Rotation | None:
        """The rotation for positions (B, T), or None."""
        return None

    def bias(self, ctx: Context, keys: Keys) -> Tensor:
        """What is added to the scaled scores of queries ``ctx`` and ``keys``: (1 or B, H, T, S) float."""
        raise TypeError(f"{type(self).__name__} adds nothing to scores")

    def predicted_parameters(self) -> int:
        return 0

    @classmethod
    def rotates_only(cls) -> bool:
        """Whether a block may have it for itself: what is added to embeddings or scores is the whole model's."""
        return cls.embed is Positions.embed and not cls.biased


class NoPositions(Positions):
    """``x``: nothing added, nothing turned. A causal model still sees order through its mask."""

    class Config(Config):
        kind: Literal["none"] = "none"

    def __init__(self, config: NoPositions.Config, dims: PositionDims):
        super().__init__()


class LearnedPositions(Positions):
    """``x_t + E[t + offset]``: one trained vector a position, added to the token's (GPT-2, BERT); ends hard.

    There are max_seq_len positions, and ``offset`` rows before the first that are not used (RoBERTa and BART: 2).
    Source: Gehring et al. 2017, section 3.1; Radford et al. 2018, section 3.1.
    """

    class Config(Config):
        kind: Literal["learned"] = "learned"
        offset: int = Field(default=0, ge=0, description="rows of the table before that of position 0")

    def __init__(self, config: LearnedPositions.Config, dims: PositionDims):
        super().__init__()
        self.max_positions, self.offset = dims.max_seq_len, config.offset
        self.table = Embedding(dims.max_seq_len + config.offset, dims.d_model, "position")

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table(positions + self.offset)

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
    """``x_t + PE(t)``, ``PE(t) = [sin(t w_i), cos(t w_i)]``: fixed waves, no limit of length, no parameters.

    PE(t + k) is a linear map of PE(t) that does not depend on t. Source: Vaswani et al. 2017, section 3.5.
    """

    class Config(Config):
        kind: Literal["sinusoidal"] = "sinusoidal"
        layout: RotaryLayout = "interleaved"
        base: float = Field(default=10000.0, gt=1)

    def __init__(self, config: SinusoidalPositions.Config, dims: PositionDims):
        super().__init__()
        self.config, self.d_model = config, dims.d_model

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + sinusoid(positions, self.d_model, self.config.layout, self.config.base).to(x.dtype)
