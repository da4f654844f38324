"""RoPE: queries and keys are turned by an angle proportional to their position, so that scores see distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.nn.contracts import full_precision
from octavo.nn.position import PositionDims, Positions, RotaryLayout, Rotation
from octavo.nn.rope_scaling import ROPE_SCALINGS, RopeScaling, rope_frequencies
from octavo.schema import Config, component, one_of


class RotaryPositions(Positions):
    """``q_t <- R_t q_t, k_s <- R_s k_s``, where R_t turns pair i of channels by t theta_i: scores see t - s alone.

    theta_i = theta^(-2i/K). ``layout`` says which channels form a pair: ``half`` pairs i with i + K/2 (Llama, Qwen),
    ``interleaved`` pairs 2i with 2i + 1 (the paper, GPT-J). They differ by a fixed permutation of the q and k rows.
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

    def rotation(self, positions: Tensor) -> Rotation:
        if self.scaling is not None and self.scaling.by_length:
            return self._by_query(positions)
        cos, sin = tables(positions[..., None].float() * self.frequencies.to(positions.device))
        if self.scaling is not None:
            cos, sin = cos * self.scaling.magnitude, sin * self.scaling.magnitude
        sin = -sin if self.config.reverse else sin
        return Rotation(cos, sin, self.config.layout, self.rotation)

    def _by_query(self, positions: Tensor) -> QueryRotation:
        assert self.scaling is not None
        lengths = positions + 1
        frequencies = self.scaling.frequencies_for(lengths, self.dim, self.config.theta)
        frequencies = -frequencies if self.config.reverse else frequencies
        cos, sin = tables(positions[..., None].float() * frequencies)
        return QueryRotation(cos, sin, self.config.layout, self._by_query, positions, frequencies)


def tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of ``angles``."""
    return angles.cos(), angles.sin()


@dataclass
class QueryRotation(Rotation):
    """A rotation whose frequencies are set by each query's own position: keys have to be kept as they were.

    frequencies (B, T, R/2) belong to the queries at ``positions`` (B, T). A layer that would keep turned keys
    is refused: a key turned by one base does not meet a query turned by another.
    """

    positions: Tensor
    frequencies: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        raise UnsupportedError(
            "this rope scaling has other frequencies for each query, so keys must be kept unturned",
            fix="use the mixer attention with the reader full or window, or a scaling that is the same for all lengths",
        )

    def turned(self, x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        """x (B, S, H, K) at ``positions`` (B, S), turned by ``frequencies`` (B or 1, 1 or S, R/2)."""
        wide = full_precision(x).dtype  # the angles of a float64 model are exact to its rounding
        cos, sin = tables(positions[..., None].to(wide) * frequencies.to(wide))
        return Rotation(cos, sin, self.layout, self.at)(x)


def turned_as_complex(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """``(x_2i + j x_2i+1) e^(j t theta_i)``: the interleaved rotation as the paper writes it, in complex numbers.

    x (B, T, H, K) at positions (B, T), frequencies (K/2,). The plain twin of ``Rotation``: Su et al. 2021,
    equation 12.
    """
    pairs = torch.view_as_complex(full_precision(x).unflatten(-1, (-1, 2)).contiguous())
    angles = positions[..., None, None].to(pairs.real.dtype) * frequencies.to(pairs.real.dtype)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class CriticalPair(NamedTuple):
    """A pair of channels that a training of ``trained`` tokens never turned once around."""

    pair: int
    frequency: float
    wavelength: float
    turns: float


def critical_pairs(frequencies: Tensor, trained: int) -> list[CriticalPair]:
    """The pairs whose wavelength ``2 pi / theta_i`` exceeds ``trained`` tokens: longer texts show them new angles."""
    found = []
    for i, frequency in enumerate(frequencies.double().tolist()):
        wavelength = 2 * torch.pi / frequency if frequency else float("inf")
        if wavelength > trained:
            found.append(CriticalPair(i, frequency, wavelength, trained / wavelength))
    return found


def critical_table(frequencies: Tensor, trained: int) -> str:
    """``critical_pairs`` as lines to print: pair, frequency, wavelength in tokens, turns within the training."""
    found = critical_pairs(frequencies, trained)
    lines = [f"{len(found)} of {len(frequencies)} pairs turn less than once in {trained} tokens"]
    lines += [f"{'pair':>6}{'frequency':>14}{'wavelength':>14}{'turns':>9}"] if found else []
    lines += [f"{p.pair:>6}{p.frequency:>14.4e}{p.wavelength:>14.1f}{p.turns:>9.3f}" for p in found]
    return "\n".join(lines)
