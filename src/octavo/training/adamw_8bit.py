"""AdamW whose moments take one byte each: 8-bit floats with a scale per block of 256."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.training.optim import AdamW, Group

BLOCK = 256
SLICE = 1 << 18
"""Numbers widened at a time, a multiple of the block: bounds the memory and stays in the cache."""
FLOAT8 = torch.float8_e4m3fn
LARGEST, SMALLEST = 448.0, 2.0**-9


def to_float8(x: Tensor, noise: Tensor, *, keep_positive: bool = False) -> tuple[Tensor, Tensor]:
    """``x`` (n,) fp32 as e4m3 codes (n,) uint8 and a scale per block (ceil(n / 256),) fp32.

    Rounded up or down by chance, in proportion to the distance: a running mean that moves by less than half a
    step of the format would otherwise never move. ``noise`` is uniform in [0, 1), at least n numbers of it.
    keep_positive: what is above zero stays above zero, so that nothing is ever divided by a lost denominator.
    """
    n = len(x)
    rows = F.pad(x, (0, -n % BLOCK)).view(-1, BLOCK)
    scale = rows.abs().amax(-1, keepdim=True) / LARGEST
    y = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)
    # The distance of neighbours at y: 2^(exponent - 3), and 2^-9 below the smallest normal number 2^-6.
    step = ((y.view(torch.int32) & 0x7F800000).view(torch.float32) / 8).clamp(min=SMALLEST)
    y = ((y / step + noise[: rows.numel()].view_as(rows)).floor() * step).clamp(-LARGEST, LARGEST)
    if keep_positive:
        y = torch.where(rows > 0, y.clamp(min=SMALLEST), y)
    return y.to(FLOAT8).view(torch.uint8).view(-1)[:n], scale.view(-1)


def from_float8(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 numbers of ``to_float8``."""
    n = len(codes)
    rows = F.pad(codes, (0, -n % BLOCK)).view(FLOAT8).view(-1, BLOCK).float()
    return (rows * scale[:, None]).view(-1)[:n]


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits: 2 bytes a weight instead of 8.

    The second moment is kept as its square root, whose range is half as many powers of two. Blocks, so that an
    outlier costs only its neighbours their precision: Dettmers et al. 2022, section 2; the number format is
    that of Peng et al. 2023 (FP8-LM), section 3, with rounding by chance in both moments.
    """

    class Config(AdamW.Config):
        kind: Literal["adamw_8bit"] = "adamw_8bit"  # type: ignore[assignment]

    moments = ()

    def __init__(self, config: Any, model: nn.Module, *arguments: Any, **named: Any):
        super().__init__(config, model, *arguments, **named)
        for group, state in zip(self.groups, self.state, strict=True):
            for name in AdamW.moments:
                state[name] = torch.zeros_like(group.master, dtype=torch.uint8)
        self.scales = [
            {name: torch.zeros(-(-len(g.master) // BLOCK), device=g.master.device) for name in AdamW.moments}
            for g in self.groups
        ]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors()
        for group, scales in zip(self.groups, self.scales, strict=True):
            yield from ((f"optimizer/{name}_scale/{group.names[0]}", scale) for name, scale in scales.items())

    @torch.no_grad()
    def update(self, group: Group, state: dict[str, Tensor], lr: float) -> None:
        index = next(i for i, other in enumerate(self.groups) if other is group)
        # The chances are a function of the update, as everything is; slices share them, which correlates nothing
        # that is added up.
        chance = torch.Generator(group.master.device).manual_seed(2 * self.updates)
        length = min(SLICE, -(-len(group.master) // BLOCK) * BLOCK)
        noise = [torch.rand(length, generator=chance, device=group.master.device) for _ in AdamW.moments]
        for start in range(0, len(group.master), SLICE):
            part = slice(start, start + SLICE)
            blocks = slice(start // BLOCK, (start + SLICE) // BLOCK)
            wide = [from_float8(state[n][part], self.scales[index][n][blocks]) for n in AdamW.moments]
            mean, square = wide[0], wide[1].square_()
            self.adam_on(group.master[part], group.total[part], mean, square, lr, group.decay)
            for i, (name, new) in enumerate(zip(AdamW.moments, (mean, square.sqrt_()), strict=True)):
                codes, scale = to_float8(new, noise[i], keep_positive=i == 1)
                state[name][part], self.scales[index][name][blocks] = codes, scale
