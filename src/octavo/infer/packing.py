"""Weights in the order in which the native step reads them, in one arena of large pages (nn/kernels/decode_product.h).

Outputs go by blocks of 16, a unit of work is one or two of them side by side, and inputs are padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.infer.pages import PAGE, large_pages
from octavo.nn.quantized import ZERO, QuantizedProjection

Order = Literal["plain", "heads", "gated"]
CHUNK = 32 << 20
LANES = 16
WIDTH = 2  # blocks of a unit: read side by side by all rows, so a product passes over each line once
# The formats of the kernel: its number, and how many inputs of an output stand together in 32 bits.
FORMATS = {32: (0, 1), 16: (1, 2), 8: (2, 4), 4: (3, 8)}
FP16 = 4
GROUPS = (16, 32, 64, 128, 256)  # inputs that share a scale: whole vectors, and sums that 32 bits hold


class Arena:
    """Memory for weights, in large pages where the system has them: they are read from end to end for every token.

    With pages of 4 KiB a core spends a quarter of that time looking up addresses. Small matrices share a page.
    """

    def __init__(self) -> None:
        self.chunks, self.taken, self.used = [torch.empty(0, dtype=torch.uint8)], 0, 0

    def take(self, n_bytes: int) -> Tensor:
        """(n_bytes,) uint8 at a multiple of 64 bytes, which stays as long as the arena does."""
        wanted = -(-n_bytes // 64) * 64
        if self.taken + wanted > len(self.chunks[-1]):
            self.chunks.append(large_pages(max(CHUNK, -(-wanted // PAGE) * PAGE)))
            self.taken = 0
        start, self.taken, self.used = self.taken, self.taken + wanted, self.used + wanted
        return self.chunks[-1][start : start + n_bytes]


@dataclass
class Source:
    """A weight (N, K) with its bias: floats, or codes with fp16 scales (N, K / group) of 8 or 4 bits."""

    weight: Tensor
    bias: Tensor | None = None
    bits: int = 0
    scales: Tensor | None = None
    group: int = 0

    @classmethod
    def of(cls, product: Any, weights: str, group: int) -> Source:
        """A projection's weight as it is if it is quantised, else in the format that ``weights`` names."""
        bias = None if product.bias is None else product.bias.detach()
        if isinstance(product, QuantizedProjection):
            return cls(product.unpacked(), bias, product.bits, product.scales, product.group)
        weight = product.weight.detach()
        if weights in ("int8", "int4"):
            bits = int(weights[3:])
            return cls(*rounded(weight, bits, group, bias))
        weight = weight.bfloat16() if weights == "bf16" else weight
        return cls(weight, bias, 8 * weight.element_size())


def rounded(
    weight: Tensor, bits: int, group: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None, int, Tensor, int]:
    """Codes to nearest, symmetric in groups of inputs; of 4 bits the largest magnitude is -8, a level more than 7."""
    short = -weight.shape[1] % group
    parts = F.pad(weight.float(), (0, short)).unflatten(1, (-1, group))
    if bits == 8:
        scales = parts.abs().amax(-1) / 127
    else:
        scales = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    scales = scales.half()
    inverse = torch.where(scales == 0, 0, 1 / scales.float())[..., None]
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    codes = (parts * inverse).round_().clamp_(low, high) + ZERO[bits]
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8), bias, bits, scales, group


@dataclass
class Packed:
    """A matrix as the kernel is told of it, and the tensors that hold it."""

    format: int
    units: int
    width: int
    depth: int
    group: int
    tensors: tuple[Tensor, Tensor | None, Tensor | None]  # weights with their scales, bias, powers

    def numbers(self) -> list[int]:
        addresses = [0 if t is None else t.data_ptr() for t in self.tensors]
        return [self.format, self.units, self.width, self.depth, self.group, *addresses]


def pack(arena: Arena, sources: list[Source], order: Order, head_dim: int = 0, *, fp16: bool = False) -> Packed:
    """Weights that read the same inputs, as one matrix in the arena; with ``fp16`` so those of 16 bits.

    ``heads`` starts each head of ``head_dim`` outputs on a unit of its own; ``gated`` puts as many outputs of the
    first (the gate) as of the second (up) into a unit.
    """
    bits, group = sources[0].bits, sources[0].group
    weight = torch.cat([s.weight for s in sources])
    rows, width = _rows(order, len(weight), head_dim)
    units = len(rows) // (width * LANES)
    K = weight.shape[1]
    multiple = max(64, group)
    depth = -(-K // multiple) * multiple
    number, together = FORMATS[bits]
    kept = rows.clamp(min=0)
    lines = torch.full((len(rows), depth), ZERO.get(bits, 0), dtype=weight.dtype)
    lines[:, :K] = torch.where(
        (rows >= 0)[:, None], weight[kept], torch.full((), ZERO.get(bits, 0), dtype=weight.dtype)
    )
    if bits == 4:
        pairs = lines.unflatten(1, (-1, 2, 4))
        lines = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
        together //= 2
    powers = None
    if bits == 16 and fp16:
        number = FP16
        found = 0.5 * 2.0 ** lines.abs().amax(1).float().frexp().exponent  # the largest: 1 to 2
        powers = _place(arena, found)
        lines = (lines.float() / found[:, None]).half()
    turned = lines.view(units, width, LANES, -1, together).permute(0, 3, 1, 2, 4)
    if bits in ZERO:
        found = torch.cat([s.scales for s in sources])  # type: ignore[misc]
        full = torch.zeros(len(rows), depth // group, dtype=torch.float16)
        full[:, : found.shape[1]] = torch.where((rows >= 0)[:, None], found[kept], 0)
        scales = full.view(units, width, LANES, -1).permute(0, 3, 1, 2).flatten(1).view(torch.uint8)
        turned = torch.cat([turned.flatten(1), F.pad(scales, (0, -scales.shape[1] % 64))], 1)
    weights = _place(arena, turned)
    bias = None
    if any(s.bias is not None for s in sources):
        parts = [torch.zeros(len(s.weight)) if s.bias is None else s.bias.float() for s in sources]
        bias = _place(arena, torch.where(rows >= 0, torch.cat(parts)[kept], 0.0))
    return Packed(number, units, width, depth, group, (weights, bias, powers))


def _place(arena: Arena, x: Tensor) -> Tensor:
    room = arena.take(x.numel() * x.element_size()).view(x.dtype).view(x.shape)
    return room.copy_(x)


def _rows(order: Order, n: int, head_dim: int) -> tuple[Tensor, int]:
    """Which of n outputs each place of the packed matrix has, -1 for none, and how many blocks make a unit."""
    if order == "heads":
        blocks = -(-head_dim // LANES)
        width = 1 if blocks == 1 else WIDTH
        room = -(-blocks // width) * width * LANES
        places = F.pad(torch.arange(n).view(-1, head_dim), (0, room - head_dim), value=-1)
        return places.flatten(), width
    width = WIDTH
    share = width * LANES // (2 if order == "gated" else 1)
    each = n // 2 if order == "gated" else n
    one = F.pad(torch.arange(each), (0, -each % share), value=-1).view(-1, share)
    if order == "plain":
        return one.flatten(), width
    return torch.cat([one, torch.where(one >= 0, one + each, -1)], 1).flatten(), width
