"""Head and cross-entropy in one: the logits of a whole batch never exist.

A vocabulary of 150,000 makes the logits the largest tensor of a step. Here a chunk of tokens goes through the
head, its loss and its gradient are computed at once, and the chunk's logits are forgotten; tokens whose
weight is zero (padding, the prompt of a conversation) do not go through the head at all. The gradient is
computed in the forward pass, so backward is a multiplication. Source: Wijmans et al. 2024 (Cut Cross-Entropy),
section 4, in the simpler chunked form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.nn.contracts import Head, full_precision


def head_loss(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, *, z_loss: float = 0.0, chunk: int = 1024
) -> Tensor:
    """``sum_i weights_i (-log p(targets_i) + z log(Z_i)^2)``, a scalar in nats.

    Args:
        hidden: (N, D), what the head reads.
        head: weight (V, D), bias (V,) or None, the cap of the logits, and what is done to ``hidden`` first.
        targets: (N,) int64.
        weights: (N,) float32; tokens of weight 0 cost nothing.
        chunk: tokens whose logits exist at a time.
    """
    hidden = hidden if head.transform is None else head.transform(hidden)
    gradients = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    softcap = head.softcap or 0.0
    return _forward(hidden, head.weight, head.bias, targets, weights, softcap, z_loss, chunk, gradients)[0]


@torch.library.custom_op("octavo::head_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    softcap: float,
    z_loss: float,
    chunk: int,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and, if asked for, its gradients for hidden, weight and bias (else empty)."""
    wide = full_precision(hidden[:0]).dtype
    counted = weights.nonzero().flatten()
    everything = len(counted) == len(weights)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    # Products of one chunk are rounded to the model's dtype; their sum over chunks is not.
    for_hidden = torch.zeros_like(hidden) if gradients else hidden.new_empty(0)
    for_weight = torch.zeros(weight.shape if gradients else 0, dtype=wide, device=weight.device)
    for_bias = torch.zeros(len(bias) if gradients and bias is not None else 0, dtype=wide, device=weight.device)
    for ids in counted.split(chunk):
        part = slice(int(ids[0]), int(ids[-1]) + 1) if everything else ids
        x, mass = hidden[part], weights[part].to(wide)
        logits = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
        logits = logits.to(wide)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        aim = targets[part, None]
        aimed, top = logits.gather(-1, aim).squeeze(-1), logits.amax(-1)
        slope = 1 - (logits / softcap).square() if softcap and gradients else None
        grad = logits.softmax(-1)
        lse = top - grad.amax(-1).log()  # the largest probability is at least 1 / V: its log is exact enough
        loss += ((lse - aimed + z_loss * lse.square()) * mass).sum()
        if not gradients:
            continue
        if z_loss:
            grad.mul_(1 + 2 * z_loss * lse[:, None])
        grad.scatter_add_(-1, aim, grad.new_full((1, 1), -1.0).expand(aim.shape))
        if slope is not None:
            grad.mul_(slope)
        # The weights go to the narrow side of each product: D columns, not V.
        narrow, x = grad.to(weight.dtype), x * mass[:, None].to(x.dtype)
        for_hidden[part] = torch.mm(narrow, weight) * mass[:, None].to(x.dtype)
        if narrow.dtype == wide:
            for_weight.addmm_(narrow.T, x)
        else:
            for_weight += torch.mm(narrow.T, x)
        if bias is not None:
            for_bias += mass @ grad
    return loss, for_hidden, for_weight.to(weight.dtype), for_bias.to(weight.dtype)


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    softcap: float,
    z_loss: float,
    chunk: int,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=full_precision(hidden[:0]).dtype)
    if not gradients:
        return loss, hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(0 if bias is None else len(bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.has_bias = inputs[2] is not None
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    for_hidden, for_weight, for_bias = ctx.saved_tensors
    scaled = [g * grad.to(g.dtype) for g in (for_hidden, for_weight, for_bias)]
    return scaled[0], scaled[1], scaled[2] if ctx.has_bias else None, None, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
