"""A root mean square norm under a SiLU gate, and a rotation, with their gradients written out: fewer passes."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import full_precision
from octavo.nn.position import Rotation

TOKENS = 128  # worked on at a time: what lies between two passes stays in the nearest cache


def gated_norm(x: Tensor, gate: Tensor, eps: float) -> Tensor:
    """``silu(gate) * x / sqrt(mean(x^2) + eps)`` with x, gate and result (B, T, H, P), the mean over P."""
    return _GatedNorm.apply(full_precision(x), full_precision(gate), eps).to(gate.dtype)  # type: ignore[misc]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, eps):  # type: ignore[no-untyped-def]
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt_()
        for x_, gate_, scale_, out_ in zip(*(y.split(TOKENS, 1) for y in (x, gate, scale, out)), strict=True):
            out_.copy_(F.silu(gate_).mul_(x_).mul_(scale_))
        ctx.save_for_backward(x, gate, scale)
        return out

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        x, gate, scale = ctx.saved_tensors
        dx, d_gate = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, gate))
        pieces = (y.split(TOKENS, 1) for y in (x, gate, scale, d_out, dx, d_gate))
        for x_, gate_, scale_, d_out_, dx_, d_gate_ in zip(*pieces, strict=True):
            swish, product = F.silu(gate_), x_ * d_out_
            along = (product * swish).sum(-1, keepdim=True).mul_(scale_.square() / -x.shape[-1])
            dx_.copy_(swish.mul_(d_out_).addcmul_(x_, along).mul_(scale_))
            d_gate_.copy_(torch.ops.aten.silu_backward(product.mul_(scale_), gate_))
        return dx, d_gate, None


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """``rotation(x)``; the gradient is turned back, not taken apart."""
    return _Turn.apply(x, rotation.cos, rotation.sin, rotation)  # type: ignore[misc]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, rotation):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        ctx.rotation = rotation
        return rotation(x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return replace(ctx.rotation, cos=cos, sin=-sin)(dy), None, None, None
