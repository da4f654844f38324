"""Matrix products of groups of rows, each group with a matrix of its own, and moving rows to their group and back.

Rows stand sorted by group, group g in ``[ends[g-1], ends[g])``; rows from ``ends[-1]`` on belong to none: they cost
nothing and give zeros. The work is a loop over groups with one matrix product each, on slices without copies. All four
operations are opaque to the compiler: sizes that depend on the data stay inside, and no gradient is added up in an
order that changes from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``y_i = x_i W_g^T`` for the rows i of group g.

    Args:
        x: (M, d_in), sorted by group.
        weight: (G, d_out, d_in).
        ends: (G,) int64, where the rows of each group end.

    Returns:
        (M, d_out).
    """
    return torch.ops.octavo.grouped_product(x, weight, ends, True)


def take_rows(x: Tensor, at: Tensor) -> Tensor:
    """``y_i = x[at_i]``: x (n, D), at (M,) int64, y (M, D)."""
    return torch.ops.octavo.take_rows(x, at)


def add_rows(rows: Tensor, at: Tensor, n: int) -> Tensor:
    """``y_j = sum of the rows i with at_i = j``, added in their order: rows (M, D), at (M,), y (n, D)."""
    return torch.ops.octavo.add_rows(rows, at, n)


@torch.library.custom_op("octavo::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])
    start = 0
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        if end > start:
            torch.mm(x[start:end], matrix.T if transposed else matrix, out=y[start:end])
        start = end
    y[start:].zero_()
    return y


@torch.library.custom_op("octavo::grouped_outer", mutates_args=())
def _outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """``grad_g^T x_g`` of the rows of each group: (M, d_out) and (M, d_in) to (G, d_out, d_in)."""
    out = x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    start = 0
    for matrix, end in zip(out, ends.tolist(), strict=True):
        if end > start:
            torch.mm(grad[start:end].T, x[start:end], out=matrix)
        else:
            matrix.zero_()
        start = end
    return out


@torch.library.custom_op("octavo::take_rows", mutates_args=())
def _take(x: Tensor, at: Tensor) -> Tensor:
    return x.index_select(0, at)


@torch.library.custom_op("octavo::add_rows", mutates_args=())
def _add(rows: Tensor, at: Tensor, n: int) -> Tensor:
    return rows.new_zeros(n, rows.shape[1]).index_add_(0, at, rows)


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


@_take.register_fake
def _(x: Tensor, at: Tensor) -> Tensor:
    return x.new_empty(at.shape[0], x.shape[1])


@_add.register_fake
def _(rows: Tensor, at: Tensor, n: int) -> Tensor:
    return rows.new_empty(n, rows.shape[1])


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ends, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, ends)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad, for_x, for_weight = grad.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        for_x = torch.ops.octavo.grouped_product(grad, weight, ends, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        pair = (grad, x) if ctx.transposed else (x, grad)
        for_weight = torch.ops.octavo.grouped_outer(*pair, ends)
    return for_x, for_weight, None, None


def _save_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, at = inputs
    ctx.save_for_backward(at)
    ctx.n = x.shape[0]


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.octavo.add_rows(grad.contiguous(), ctx.saved_tensors[0], ctx.n), None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.octavo.take_rows(grad.contiguous(), ctx.saved_tensors[0]), None, None


_product.register_autograd(_product_backward, setup_context=_save_product)
_take.register_autograd(_take_backward, setup_context=_save_take)
_add.register_autograd(_add_backward, setup_context=_save_add)


@register_flop_formula(torch.ops.octavo.grouped_product)
def _product_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """As if every row belonged to a group."""
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.octavo.grouped_outer)
def _outer_flops(grad: Any, x: Any, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]
