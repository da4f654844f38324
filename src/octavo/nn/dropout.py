"""Dropout: some numbers become zero, the others grow so that the mean stays (Srivastava et al. 2014, inverted).

What is kept is a pure function of (seed, head, query, key), so no mask is stored: the backward pass computes it again,
and any part of it can be computed alone. A seed is one draw from torch's generator for each call. On the CPU a kernel
computes it (kernels/dropout.h); here is the same in torch's integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import full_precision
from octavo.nn.kernels import build

WORD, GOLDEN = 0xFFFFFFFF, 0x9E3779B9
COLUMNS = 4096  # a flat array is taken for the queries of head 0, each with this many keys
BITS = {torch.float32: 32, torch.bfloat16: 16}


def dropout(x: Tensor, p: float, training: bool = True, onto: Tensor | None = None) -> Tensor:
    """x with each number zero with probability p, the others divided by 1 - p, in training; added to ``onto``."""
    if training and p and x.device.type in ("cpu", "meta"):
        together = onto is not None and (onto.shape, onto.dtype) == (x.shape, x.dtype)
        y = torch.ops.octavo.dropout(x, draw_seed(), p, onto if together else None)
        return y if together or onto is None else onto + y
    y = F.dropout(x, p) if training and p else x
    return y if onto is None else onto + y


def draw_seed() -> Tensor:
    """What one call of dropout depends on: an int64, from torch's generator."""
    return torch.randint(2**62, (), dtype=torch.int64)


def threshold(p: float) -> int:
    """Of 65,536 numbers so many are dropped: p to 16 bits, and never all of them."""
    return min(int(p * 65536 + 0.5), 65535)


def kept(seed: Tensor, p: float, heads: Tensor, queries: Tensor, n_keys: int) -> Tensor:
    """Whether each of the keys 0 .. n_keys - 1 is kept, (..., n_keys), heads and queries being (..., 1)."""
    first, second = torch.ones_like(seed), torch.full_like(seed, 2)
    for number in (seed & WORD, seed >> 32 & WORD, heads, queries):
        first, second = _fold(first, number), _fold(second, number)
    x = first + torch.arange(-(-n_keys // 2), device=seed.device) * GOLDEN & WORD  # a draw tells of two keys
    x = (x ^ x >> 16) * 0x7FEB352D & WORD ^ second
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    x ^= x >> 16
    return torch.stack([x & 0xFFFF, x >> 16], -1).flatten(-2)[..., :n_keys] >= threshold(p)


def _fold(key: Tensor, number: Tensor) -> Tensor:
    x = key + (number + 1) * GOLDEN & WORD
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def without(x: Tensor, keep: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """x where ``keep`` says so, grown so that the mean stays, and the sum; in float32 at least, rounded once."""
    grown = full_precision(x) * (65536 / (65536 - threshold(p)))
    y = torch.where(keep, grown, 0.0)
    return (y if onto is None else y + onto).to(x.dtype)


def dropout_of_weights(weights: Tensor, seed: Tensor, p: float) -> Tensor:
    """For probabilities (B, H, T, S), as the attention kernel does it: head h of row b is number b H + h."""
    B, H, T, S = weights.shape
    heads, queries = (torch.arange(n, device=seed.device) for n in (B * H, T))
    return without(weights, kept(seed, p, heads[:, None, None], queries[:, None], S).view(B, H, T, S), p)


def plain_dropout(x: Tensor, seed: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    """The operation without a kernel, for any dtype: the same mask."""
    queries = torch.arange(-(-x.numel() // COLUMNS), device=x.device)[:, None]
    keep = kept(seed, p, torch.zeros_like(queries), queries, COLUMNS)
    return without(x, keep.flatten()[: x.numel()].view(x.shape), p, onto)


@torch.library.custom_op("octavo::dropout", mutates_args=(), device_types="cpu")
def _dropout(x: Tensor, seed: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    library, _ = build.attempt()
    x, onto = x.contiguous(), None if onto is None else onto.contiguous()
    if library is None or x.dtype not in BITS:
        return plain_dropout(x, seed, p, onto)
    y, at = torch.empty_like(x), None if onto is None else onto.data_ptr()
    how = (x.numel(), BITS[x.dtype], int(seed), threshold(p), torch.get_num_threads())
    library.dropout(x.data_ptr(), at, y.data_ptr(), *how)
    return y


@_dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float, onto: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, seed, ctx.p, ctx.onto = *inputs[:3], inputs[3] is not None
    ctx.save_for_backward(seed)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return torch.ops.octavo.dropout(grad, *ctx.saved_tensors, ctx.p, None), None, None, grad if ctx.onto else None


_dropout.register_autograd(_backward, setup_context=_save)
