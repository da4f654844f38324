"""Weight products with small weights: integers of 8 or 4 bits in groups, or 8-bit floats, with a scale for each group.

A quantised product holds ``codes`` and ``scales`` as buffers, which keep their number formats whatever the model is
cast to. Its forward pass is the plain twin of faster kernels: the weight is made anew in float32, then multiplied.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.errors import UnsupportedError
from octavo.nn.contracts import full_precision
from octavo.nn.grouped import grouped_product
from octavo.nn.projection import GroupedProjection, Projection
from octavo.schema import Config

ZERO = {4: 8, 8: 128}
"""The code that stands for 0."""
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FLOAT8_GROUP = 128
"""Activations that share a scale where weights come in blocks (DeepSeek-AI 2024, section 3.3.2)."""
SMALLEST_GROUP = 16


class IntegerWeights(Config):
    """``W = (codes - zero) * scales``: symmetric integers, a float16 scale for each row and group of inputs.

    int8 has codes of -127..127; int4 of -8..7, with a group's largest magnitude on -8, so a scale may be negative.
    With activations int8 each token's are rounded to 127 steps either way of its own largest magnitude.
    """

    kind: Literal["integer"] = "integer"
    bits: Literal[4, 8] = 8
    group: Literal[32, 64, 128] | None = Field(default=64, description="inputs that share a scale; null: a whole row")
    activations: Literal["model", "int8"] = "model"

    def group_of(self, d_in: int) -> int:
        """The group in a product of ``d_in`` inputs: halved until it divides them, and the whole row below 16."""
        group: int = self.group or d_in
        while group >= SMALLEST_GROUP and d_in % group:
            group //= 2
        return group if group >= SMALLEST_GROUP else d_in


class Float8Weights(Config):
    """``W = codes * scales`` with codes of OCP 8-bit floats and one float32 scale for all or for each square block.

    ``activations``: as the model has them, or rounded to the same format, with a scale for each token and, where
    weights come in blocks, for each 128 of its inputs (DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2).
    """

    kind: Literal["float8"] = "float8"
    format: Literal["e4m3", "e5m2"] = "e4m3"
    block: Literal[128] | None = Field(default=None, description="side of the blocks; null: one for the whole weight")
    activations: Literal["model", "float8"] = "model"


Storage = IntegerWeights | Float8Weights


class Quantized(nn.Module):
    """What quantised products share: codes and scales (..., d_out, d_in or fewer), and the weight they stand for."""

    codes: Tensor
    scales: Tensor
    like: Tensor

    def __init__(self, storage: Storage, d_in: int, d_out: int, role: str):
        super().__init__()
        self.storage, self.d_in, self.d_out, self.role = storage, d_in, d_out, role

    def _hold(self, codes: tuple[int, ...], scales: tuple[int, ...]) -> None:
        whole = isinstance(self.storage, IntegerWeights)
        kind, of_scales = (torch.uint8, torch.float16) if whole else (FLOAT8[self.storage.format], torch.float32)  # type: ignore[union-attr]
        self.register_buffer("codes", torch.zeros(codes, dtype=kind))
        self.register_buffer("scales", torch.zeros(scales, dtype=of_scales))
        self.register_buffer("like", torch.zeros(0), persistent=False)  # follows the model's dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        kept = {"codes": self.codes, "scales": self.scales}
        super()._apply(fn, recurse)
        for name, was in kept.items():  # a cast of the model is none of what is stored
            if getattr(self, name).dtype != was.dtype:
                setattr(self, name, was.to(self.like.device))
        return self

    def train(self, mode: bool = True) -> Quantized:
        if mode:
            raise UnsupportedError(
                "the model's weights are quantised: they cannot be trained",
                fix="octavo convert MODEL TARGET --dequantize",
            )
        return super().train(mode)

    @property
    def weight(self) -> Tensor:
        """The weight in the model's dtype, made anew at each call."""
        return self.dequantised().to(self.like.dtype)

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The weight in float32."""

    def rounded(self, x: Tensor) -> Tensor:
        """Activations (..., d_in), at least in float32, as the product reads them."""
        x = full_precision(x)
        if isinstance(self.storage, IntegerWeights):
            return x if self.storage.activations == "model" else int8_activations(x)
        if self.storage.activations == "model":
            return x
        return float8_activations(x, self.storage.format, FLOAT8_GROUP if self.storage.block else None)

    def extra_repr(self) -> str:
        return f"{self.d_in}, {self.d_out}, role={self.role}, {self.storage!r}"


class QuantizedProjection(Quantized):
    """``y = x W^T + b`` with ``W[n, k] = (codes[n, k] - zero) * scales[n, k // group]``; x (..., d_in), y (..., d_out).

    codes: uint8, (d_out, d_in) with zero 128 for 8 bits; (d_out, ceil(d_in / 2)) for 4, two codes a byte, the low
    nibble first, zero 8. scales: float16, (d_out, d_in / group).
    """

    def __init__(self, d_in: int, d_out: int, role: str, bits: Literal[4, 8], group: int, bias: bool = False,
                 activations: Literal["model", "int8"] = "model"):  # fmt: skip
        if d_in % group:
            raise ValueError(f"groups of {group} do not divide {d_in} inputs")
        stored = IntegerWeights.model_construct(bits=bits, group=group, activations=activations)  # type: ignore[arg-type]
        super().__init__(stored, d_in, d_out, role)
        self.bits: Literal[4, 8] = bits
        self.group = group
        self._hold((d_out, packed_width(d_in, bits)), (d_out, d_in // group))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def unpacked(self) -> Tensor:
        """The codes, (d_out, d_in) uint8."""
        return unpacked(self.codes, self.d_in, self.bits)

    def dequantised(self) -> Tensor:
        return from_codes(self.unpacked(), self.scales, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return product(self.rounded(x), self.dequantised(), self.bias).to(x.dtype)

    def n_parameters(self) -> int:
        return self.d_in * self.d_out + (self.d_out if self.bias is not None else 0)


class Float8Projection(Quantized):
    """``y = x W^T + b`` with W of 8-bit floats, scaled as a whole or in blocks of 128 x 128.

    codes: (d_out, d_in) in the format of torch; scales: float32, (ceil(d_out / 128), ceil(d_in / 128)), or (1, 1).
    """

    def __init__(self, d_in: int, d_out: int, role: str, storage: Float8Weights, bias: bool = False):
        super().__init__(storage, d_in, d_out, role)
        self._hold((d_out, d_in), n_blocks(d_out, d_in, storage.block))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def dequantised(self) -> Tensor:
        return from_float8(self.codes, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        return product(self.rounded(x), self.dequantised(), self.bias).to(x.dtype)

    def n_parameters(self) -> int:
        return self.d_in * self.d_out + (self.d_out if self.bias is not None else 0)


class QuantizedGroupedProjection(Quantized):
    """``y_i = x_i W_g^T`` for the rows i of group g: the products of n experts, each stored as one alone would be."""

    def __init__(self, n: int, d_in: int, d_out: int, role: str, storage: Storage):
        super().__init__(storage, d_in, d_out, role)
        self.n = n
        if isinstance(storage, IntegerWeights):
            self.group = storage.group_of(d_in)
            self._hold((n, d_out, packed_width(d_in, storage.bits)), (n, d_out, d_in // self.group))
        else:
            self._hold((n, d_out, d_in), (n, *n_blocks(d_out, d_in, storage.block)))

    def dequantised(self) -> Tensor:
        if isinstance(self.storage, IntegerWeights):
            bits = self.storage.bits
            return from_codes(unpacked(self.codes, self.d_in, bits), self.scales, bits)
        return from_float8(self.codes, self.scales)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (M, d_in), sorted by group, to (M, d_out); ``ends`` (n,) says where each group's rows end."""
        read = self.rounded(x)
        return grouped_product(read, self.dequantised().to(read.dtype), ends).to(x.dtype)

    def every(self, x: Tensor) -> Tensor:
        """Every group's product: x (N, d_in), or (n, N, d_in) with one of its own for each, to (n, N, d_out)."""
        read = self.rounded(x)
        return (read @ self.dequantised().to(read.dtype).mT).to(x.dtype)

    def n_parameters(self) -> int:
        return self.n * self.d_in * self.d_out


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def empty_for(module: Projection | GroupedProjection, storage: Storage) -> Quantized:
    """The quantised product that takes the place of ``module``, without values."""
    if isinstance(module, GroupedProjection):
        return QuantizedGroupedProjection(module.n, module.d_in, module.d_out, module.role, storage)
    d_in, d_out, role, bias = module.d_in, module.d_out, module.role, module.bias is not None
    if isinstance(storage, Float8Weights):
        return Float8Projection(d_in, d_out, role, storage, bias)
    made = QuantizedProjection(d_in, d_out, role, storage.bits, storage.group_of(d_in), bias, storage.activations)
    made.storage = storage  # as it is said for the whole model
    return made


def quantized_modules(model: nn.Module) -> dict[str, Quantized]:
    """The quantised products of a model by name; none in one that is not quantised."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Make ``module`` the submodule ``name`` of ``model``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def packed_width(d_in: int, bits: int) -> int:
    """Bytes of the codes of one row."""
    return d_in if bits == 8 else -(-d_in // 2)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., K) uint8 as they are stored: for 4 bits two a byte, the low nibble first."""
    if bits == 8:
        return codes.contiguous()
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpacked(codes: Tensor, d_in: int, bits: int) -> Tensor:
    """The inverse of ``packed``: (..., d_in) uint8."""
    if bits == 8:
        return codes
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :d_in]


def from_codes(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """``(codes - zero) * scales``: unpacked codes (..., K) and scales (..., K / group) to float32."""
    steps = (codes.float() - ZERO[bits]).unflatten(-1, (scales.shape[-1], -1))
    return (steps * scales.float()[..., None]).flatten(-2)


def to_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes (..., K) nearest to a weight under scales (..., K / group), unpacked."""
    scales = scales.to(weight.dtype)[..., None]
    steps = weight.unflatten(-1, (scales.shape[-2], -1)) / scales.where(scales != 0, 1)
    low = -8 if bits == 4 else -127
    return (steps.round().clamp(low, ZERO[bits] - 1) + ZERO[bits]).flatten(-2).to(torch.uint8)


def integer_scales(weight: Tensor, group: int, bits: int) -> Tensor:
    """Scales (..., K / group) float16 under which a group's largest magnitude is the outermost code."""
    parts = weight.unflatten(-1, (-1, group))
    if bits == 8:
        return (parts.abs().amax(-1) / 127).half()
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))[..., 0]
    return (largest / -8).half()


def n_blocks(d_out: int, d_in: int, block: int | None) -> tuple[int, int]:
    return (1, 1) if block is None else (-(-d_out // block), -(-d_in // block))


def _spread(scales: Tensor, d_out: int, d_in: int) -> Tensor:
    """Scales of blocks (..., R, C) on every weight of theirs."""
    if scales.shape[-2:] == (1, 1):
        return scales
    rows = scales.repeat_interleave(FLOAT8_GROUP, -2)[..., :d_out, :]
    return rows.repeat_interleave(FLOAT8_GROUP, -1)[..., :d_in]


def from_float8(codes: Tensor, scales: Tensor) -> Tensor:
    """``codes * scales`` of 8-bit floats (..., d_out, d_in) in float32."""
    return codes.float() * _spread(scales, *codes.shape[-2:])


def to_float8(weight: Tensor, format: str, block: int | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight (..., d_out, d_in): a block's largest magnitude is the format's largest number."""
    *lead, d_out, d_in = weight.shape
    rows, columns = n_blocks(d_out, d_in, block)
    if block is None:
        largest = weight.abs().amax((-2, -1), keepdim=True)
    else:
        whole = F.pad(weight.abs(), (0, columns * block - d_in, 0, rows * block - d_out))
        largest = whole.view(*lead, rows, block, columns, block).amax((-3, -1))
    scales = largest.float() / torch.finfo(FLOAT8[format]).max
    spread = _spread(scales, d_out, d_in)
    return (weight / spread.where(spread != 0, 1)).to(FLOAT8[format]), scales


def int8_activations(x: Tensor) -> Tensor:
    """x (..., K) in 127 steps either way of each token's largest magnitude."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.where(scale != 0, 1)).round() * scale


def float8_activations(x: Tensor, format: str, group: int | None) -> Tensor:
    """x (..., K) in 8-bit floats scaled for each token, or for each ``group`` of its inputs."""
    width = x.shape[-1]
    size = group or width
    parts = F.pad(x, (0, -width % size)).unflatten(-1, (-1, size))
    scale = parts.abs().amax(-1, keepdim=True) / torch.finfo(FLOAT8[format]).max
    rounded = (parts / scale.where(scale != 0, 1)).to(FLOAT8[format]).to(x.dtype) * scale
    return rounded.flatten(-2)[..., :width]
