"""Rows, heads and lengths for tests of causal attention, and how far two answers are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.nn.attend import plain
from octavo.nn.contracts import Context, Inputs
from octavo.nn.kernels import attention as kernel
from octavo.nn.state import place

LENGTHS = (1, 2, 15, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 512)
WIDTHS = (32, 40, 64, 80, 96, 128, 160, 192, 256)
HEADS = ((8, 2), (3, 3), (4, 1), (1, 1))
KINDS = ("causal", "documents", "window", "left", "right", "holes", "all")


def tensors(B: int, T: int, H: int, G: int, K: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and a gradient as the projections make them: views of (B, T, heads, K)."""
    return [torch.randn(B, T, n, K, dtype=dtype).transpose(1, 2) for n in (H, G, G, H)]


def context(B: int, T: int, kind: str) -> tuple[Context, int | None]:
    """What a row of this kind looks like, and the window to read it with."""
    order = torch.arange(T).expand(B, T)
    lengths = torch.randint(0, T, (B, 1))
    named: dict[str, Tensor] = {}
    if kind in ("documents", "all"):
        named["doc_ids"] = (torch.rand(B, T) < 0.06).cumsum(1)
    if kind in ("left", "right", "holes"):
        named["valid"] = {"left": order >= lengths, "right": order <= lengths, "holes": torch.rand(B, T) < 0.8}[kind]
    if kind == "all":
        named["valid"] = (order >= lengths // 3) & (order < T - lengths // 3)
    window = max(1, T // 3) if kind in ("window", "all") else None
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), **named))[0], window


def by_mask(
    q: Tensor, k: Tensor, v: Tensor, ctx: Context, window: int | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Plain attention under the mask rule; padding gives zeros."""
    y = plain(q, k, v, ctx.mask(ctx.keys, window=window), scale=scale, dropout=dropout)
    return torch.where(ctx.valid[:, None, :, None], y, 0)


def grads(y: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def wanted(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, ctx: Context, window: int | None, scale: float, dropout: float = 0.0
) -> tuple[Tensor, ...]:
    """Output and gradients of plain attention in fp64."""
    leaves = tuple(x.double().requires_grad_() for x in (q, k, v))
    return grads(by_mask(*leaves, ctx, window, scale, dropout), leaves, grad.double())


def got(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, first: Tensor | None, scale: float, dropout: float = 0.0
) -> tuple[Tensor, ...]:
    """Output and gradients of the kernel."""
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    return grads(kernel.causal(*leaves, first, scale=scale, dropout=dropout), leaves, grad)


def worst(ours: tuple[Tensor, ...], true: tuple[Tensor, ...], floor: float) -> float:
    """The largest error relative to the norm of what is true, which counts as `floor` per entry at least."""
    sizes = [max(float(b.norm()), floor * b.numel() ** 0.5) for b in true]
    return max(float((a.double() - b).norm()) / size for a, b, size in zip(ours, true, sizes, strict=True))
