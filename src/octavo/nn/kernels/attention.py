"""Causal attention by key ranges, as an operation of torch: ``octavo::attention``, for CPUs, fp32 and bf16.

q (B, H, T, K), k and v (B, G, T, K), any strides of rows, heads and tokens. Query t of a row reads the keys
first[t] .. t, which says documents, windows and padding; blocks outside the range are not computed. Source:
FlashAttention-2 (Dao 2023, algorithms 1 and 2).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from octavo.errors import ResourceError, UnsupportedError
from octavo.nn.dropout import draw_seed, threshold
from octavo.nn.kernels import build

BITS = {torch.float32: 32, torch.bfloat16: 16}


def supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel computes these tensors, if it can be built."""
    return (
        q.device.type == "cpu"
        and q.dtype in BITS
        and q.dtype == k.dtype == v.dtype
        and k.shape == v.shape
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and q.shape[-1] > 0
    )


@torch.compiler.assume_constant_result  # a build is not for the compiler to trace
def available() -> bool:
    """Whether the kernel is built, or could be built just now."""
    return build.attempt()[0] is not None


def causal(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of each query over the keys first .. itself: (B, H, T, K).

    Args:
        q: (B, H, T, K).
        k: (B, G, T, K), H a multiple of G; query head h reads key head h // (H / G).
        v: like k.
        first: (B, T) int32, the first key that each token reads; negative on padding, which reads nothing, is read
            by nothing and gives zeros. None: every token reads from the row's beginning.
        scale: of the scores; default K ** -0.5.
        dropout: the probability with which a weight is dropped after the softmax; others are divided by 1 - dropout.

    Raises:
        UnsupportedError: shapes, dtypes or a device that do not fit; or there is no kernel here.
    """
    scale, seed = q.shape[-1] ** -0.5 if scale is None else scale, draw_seed() if dropout else None
    return torch.ops.octavo.attention(q, k, v, first, scale, seed, dropout)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, seed: Tensor | None, p: float) -> None:
    wrong = ""
    if not all(x.ndim == 4 for x in (q, k, v)) or not supported(q, k, v):
        named = ", ".join(f"{n} {x.dtype} {tuple(x.shape)} on {x.device}" for n, x in zip("qkv", (q, k, v)))
        wrong = f"the attention kernel cannot take {named}"
    elif first is not None and (
        first.dtype != torch.int32 or first.shape != (q.shape[0], q.shape[2]) or first.device.type != "cpu"
    ):
        wrong = f"first {first.dtype} {tuple(first.shape)} must be int32 {(q.shape[0], q.shape[2])}"
    elif not 0 < scale < float("inf"):
        wrong = f"scale = {scale} must be above 0"
    elif not 0 <= p < 1 or (p and seed is None):
        wrong = f"dropout = {p} must be at least 0 and below 1, and have a seed"
    elif q.shape[2] >= 1 << 30:
        wrong = f"{q.shape[2]} tokens are more than the attention kernel counts"
    if wrong:
        raise UnsupportedError(wrong, fix="use backend sdpa")


def _call(
    name: str, q: Tensor, k: Tensor, first: Tensor | None, scale: float, seed: Tensor | None, p: float,
    tensors: list[Tensor], lse: int,
) -> None:  # fmt: skip
    """Hand the tensors over; the one at index ``lse`` is contiguous and has no strides to tell."""
    library, reason = build.attempt()
    if library is None:
        raise UnsupportedError(f"there is no attention kernel here: {reason}", fix="use backend sdpa")
    B, H, T, K = q.shape
    shape = (ctypes.c_int64 * 5)(B, H, k.shape[1], T, K)
    flat = [step for i, tensor in enumerate(tensors) if i != lse for step in tensor.stride()[:3]]
    strides = (ctypes.c_int64 * len(flat))(*flat)
    pointers = (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
    first = None if first is None else first.contiguous()
    begin = None if first is None else first.data_ptr()
    run = getattr(library, name)
    drops = (0, 0) if seed is None else (int(seed), threshold(p))
    if run(shape, strides, scale, torch.get_num_threads(), BITS[q.dtype], begin, *drops, pointers):
        raise ResourceError("no memory for the attention kernel", fix="use fewer rows at once (micro_batch_rows)")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """(B, H, T, K) laid out as (B, T, H, K), as the projections around attention read and write it."""
    B, H, T, K = x.shape
    return x.new_empty(B, T, H, K).transpose(1, 2)


@torch.library.custom_op("octavo::attention", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, first, scale, seed, p)
    out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel():
        _call("attention_forward", q, k, first, scale, seed, p, [_rows(q), _rows(k), _rows(v), out, lse], 4)
    return out, lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("octavo::attention_gradient", mutates_args=(), device_types="cpu")
def _gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, out: Tensor, lse: Tensor, scale: float,
    seed: Tensor | None = None, p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(q, k, v, first, scale, seed, p)
    if not grad.shape == out.shape == q.shape or not grad.dtype == out.dtype == q.dtype or lse.shape != q.shape[:3]:
        raise UnsupportedError(f"a gradient {grad.dtype} {tuple(grad.shape)} is not one of {q.dtype} {tuple(q.shape)}")
    to = [_like(x) for x in (q, k, v)]
    if q.numel():
        rows = [_rows(x) for x in (grad, q, k, v, out)]
        _call("attention_backward", q, k, first, scale, seed, p, [*rows, lse.contiguous(), *to], 5)
    return to[0], to[1], to[2]


@_gradient.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, out: Tensor, lse: Tensor, scale: float,
    seed: Tensor | None = None, p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(q), _like(k), _like(v)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, first, ctx.scale, seed, ctx.p = inputs
    ctx.save_for_backward(q, k, v, first, *output, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    *tensors, seed = ctx.saved_tensors
    return *torch.ops.octavo.attention_gradient(grad, *tensors, ctx.scale, seed, ctx.p), None, None, None, None


_attention.register_autograd(_backward, setup_context=_save)
