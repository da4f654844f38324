"""What recurrent mixers share: document segments, the causal depthwise convolution, the shift by one token.

All of it respects document borders and leaves padding, which stands at the end of every row, without effect.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import Context


def segments(ctx: Context) -> Tensor:
    """Which document of this pass each token belongs to, (B, T) int64: 0 continues what a state has seen."""
    return ctx.starts.cumsum(1)


def n_valid(ctx: Context) -> Tensor:
    """The valid tokens of each row in this pass, (B,): the recurrences end after them."""
    return ctx.valid.sum(1)


def tail(x: Tensor, before: Tensor, ctx: Context) -> Tensor:
    """What a window over the past must keep: the last W valid entries of ``before`` (B, W, ...) and x (B, T, ...).

    Entries of documents other than the last become zero. Returns (B, W, ...).
    """
    width = before.shape[1]
    if x.shape[1] == 1:
        joined, axes = _with_one(x, before, ctx), [1] * (x.dim() - 2)
        return torch.where(ctx.valid.view(-1, 1, *axes), joined[:, 1:], joined[:, :-1])
    joined = torch.cat([before.to(x.dtype), x], 1)
    at = n_valid(ctx)[:, None] + torch.arange(width, device=x.device)
    kept = joined[torch.arange(len(x), device=x.device)[:, None], at]
    segment = F.pad(segments(ctx), (width, 0))  # what came before is segment 0
    own = segment.gather(1, at) == segment.gather(1, at[:, -1:])
    return kept * own.reshape(*own.shape, *[1] * (x.dim() - 2)).to(x.dtype)


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, ctx: Context, before: Tensor | None = None
) -> Tensor:
    """``y_t = sum_i w_i x_{t - (W-1) + i} + b`` channel by channel, within documents.

    Args:
        x: (B, T, C).
        weight: (C, W); the last column meets the token itself, as in torch.nn.Conv1d.
        bias: (C,) or None.
        before: (B, W - 1, C), what ``tail`` kept of the tokens before; None: nothing was before.

    Returns:
        (B, T, C).
    """
    T, C = x.shape[1:]
    width = weight.shape[1]
    if before is None and not ctx.restarts:
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=width - 1, groups=C)
        return y[..., :T].transpose(1, 2)
    if before is not None and T == 1:
        y = (_with_one(x, before, ctx) * weight.T).sum(1, keepdim=True)
        return y if bias is None else y + bias
    padded = F.pad(x, (0, 0, width - 1, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
    segment = F.pad(segments(ctx), (width - 1, 0))
    y = x * weight[:, -1]
    for back in range(1, width):
        begin = width - 1 - back
        same = segment[:, begin : begin + T] == segment[:, width - 1 :]
        y = y + padded[:, begin : begin + T] * same[..., None].to(x.dtype) * weight[:, begin]
    return y if bias is None else y + bias


def _with_one(x: Tensor, before: Tensor, ctx: Context) -> Tensor:
    """``before`` (B, W, ...), nothing where a document begins, and one token after it: few and small operations."""
    begins = ctx.starts.view(-1, *[1] * (x.dim() - 1))
    return torch.cat([before.to(x.dtype).masked_fill(begins, 0), x], 1)


def shift(x: Tensor, ctx: Context, before: Tensor | None = None) -> Tensor:
    """The token before each, (B, T, C): zeros at the first of a document. ``before`` (B, C) continues a text."""
    first = torch.zeros_like(x[:, :1]) if before is None else before[:, None].to(x.dtype)
    moved = torch.cat([first, x[:, :-1]], 1)
    return moved * (~ctx.starts)[..., None].to(x.dtype) if ctx.restarts else moved
