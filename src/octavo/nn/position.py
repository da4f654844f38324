"""Position schemes: what is added to the embedding, and what turns queries and keys.

A scheme may add to the input (learned, sinusoidal) or give the rotation that attention applies (RoPE). The
two are different components: the sum of an embedding and a sinusoid is not a rotation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.projection import Embedding
from octavo.schema import Config

RotaryLayout = Literal["half", "interleaved"]


@dataclass
class Rotation:
    """Rotary tables of one forward pass: cos and sin (B, T, R/2) for the first R of K channels."""

    cos: Tensor
    sin: Tensor
    layout: RotaryLayout

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

    @abstractmethod
    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block: x (B, T, D) with or without something added."""

    def rotation(self, positions: Tensor) -> Rotation | None:
        """The rotation for positions (B, T), or None."""
        return None

    def predicted_parameters(self) -> int:
        return 0


class NoPositions(Positions):
    """Nothing added, nothing turned: a causal model still sees order through its mask."""

    class Config(Config):
        kind: Literal["none"] = "none"

    def __init__(self, config: NoPositions.Config, d_model: int, head_dim: int, max_seq_len: int):
        super().__init__()

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


class LearnedPositions(Positions):
    """One trained vector a position, added to the token's (GPT-2, BERT); ends hard at max_seq_len."""

    class Config(Config):
        kind: Literal["learned"] = "learned"

    def __init__(self, config: LearnedPositions.Config, d_model: int, head_dim: int, max_seq_len: int):
        super().__init__()
        self.max_positions = max_seq_len
        self.table = Embedding(max_seq_len, d_model, "position")

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

    def __init__(self, config: SinusoidalPositions.Config, d_model: int, head_dim: int, max_seq_len: int):
        super().__init__()
        self.config, self.d_model = config, d_model

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + sinusoid(positions, self.d_model, self.config.layout, self.config.base).to(x.dtype)


def rope_frequencies(dim: int, theta: float) -> Tensor:
    """``theta^(-2i/dim)`` for i in 0..dim/2-1, float32 (Su et al. 2021, equation 15)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)


class RotaryPositions(Positions):
    """RoPE: queries and keys turn by an angle proportional to their position.

    ``layout`` says which channels form a pair: ``half`` pairs i with i + K/2 (Llama, Qwen), ``interleaved``
    pairs 2i with 2i + 1 (the paper, GPT-J). They differ by a fixed permutation of the q and k rows.
    ``fraction`` of the head width is turned. Source: Su et al. 2021, section 3.2.
    """

    class Config(Config):
        kind: Literal["rope"] = "rope"
        theta: float = Field(default=10000.0, gt=1)
        layout: RotaryLayout = "half"
        fraction: float = Field(default=1.0, gt=0, le=1)

    def __init__(self, config: RotaryPositions.Config, d_model: int, head_dim: int, max_seq_len: int):
        super().__init__()
        self.config = config
        self.dim = int(head_dim * config.fraction) // 2 * 2
        # A plain attribute, not a buffer: casting the model to 16 bits must not round the frequencies.
        self.frequencies = rope_frequencies(self.dim, config.theta)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def rotation(self, positions: Tensor) -> Rotation:
        frequencies = self.frequencies
        if frequencies.device != positions.device:
            frequencies = rope_frequencies(self.dim, self.config.theta).to(positions.device)
        angles = positions[..., None].float() * frequencies
        return Rotation(angles.cos(), angles.sin(), self.config.layout)
