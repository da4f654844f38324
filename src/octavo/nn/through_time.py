"""Recurrent networks through time, as one node of the graph: on the CPU faster than a node for each token.

Backwards, the gradient of a step's gates is linear in the gradient of its hidden state. All factors are therefore made
for the whole row at once; step by step there is left one elementwise product and one matrix product, and the weights'
gradients are one product over all tokens instead of a sum of as many. torch's own simple network and GRU make several
nodes of every token and add up a matrix of the weights' shape for each; its LSTM is a kernel of its own, and quicker
than this would be. The recurrent matrix is laid out once a pass the way the steps read it. Tensors here are
(T, B, ...): what a step needs lies together.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

DERIVATIVES = {  # of the activation, from its value
    "tanh": lambda h: 1 - h * h,
    "relu": lambda h: (h > 0).to(h.dtype),
    "sigmoid": lambda h: h * (1 - h),
}


class Network(Protocol):
    """``inner`` (T, B, gates H) is the input's share of the gates; y (T + 1, B, H) are the hidden states from h_0 = 0.

    ahead fills y from its second row on, may use up ``inner`` and returns what ``back`` will need; over is the
    recurrent matrix, transposed, and bias its bias. back gets the gradient of y without h_0, which it may use up, and
    the recurrent matrix; it returns the gradients of the input's share of the gates and of the hidden state's.
    """

    def ahead(self, inner: Tensor, y: Tensor, over: Tensor, bias: Tensor) -> tuple[Tensor, ...]: ...

    def back(self, dy: Tensor, y: Tensor, over: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]: ...


def through_time(network: Network, x: Tensor, weights: list[Tensor]) -> Tensor:
    """x (B, T, D) to the hidden states (B, T, H) of rows that begin at nothing.

    ``weights`` are (gates H, D), (gates H, H) and two biases, as torch's kernels take them. Not under autocast, and
    derivatives of the first order only.
    """
    return _ThroughTime.apply(network, x, *weights)


def _steps(x: Tensor) -> range:
    """Tensors without data are only counted, and the steps make no new ones."""
    return range(0 if x.is_meta else len(x))


class _ThroughTime(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, network: Network, x: Tensor, up: Tensor, over: Tensor, bias: Tensor, bias_over: Tensor
    ) -> Tensor:  # type: ignore[override]
        inner = F.linear(x.transpose(0, 1), up, bias)
        y = inner.new_empty(len(inner) + 1, len(x), over.shape[1])
        y[0] = 0.0
        kept = network.ahead(inner, y, over.t().contiguous(), bias_over)
        ctx.network = network
        ctx.save_for_backward(x, up, over, y, *kept)
        return y[1:].transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, up, over, y, *kept = ctx.saved_tensors
        own = dy.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        inner, outer = (d.flatten(0, 1) for d in ctx.network.back(own, y, over, tuple(kept)))
        _, of_x, of_up, of_over, *_ = ctx.needs_input_grad
        dx = (inner @ up).view(*own.shape[:2], -1).transpose(0, 1) if of_x else None
        d_up = inner.t() @ x.transpose(0, 1).flatten(0, 1) if of_up else None
        d_over = outer.t() @ y[:-1].flatten(0, 1) if of_over else None
        return None, dx, d_up, d_over, inner.sum(0), outer.sum(0)


class SimpleSteps:
    """``h_t = act(inner_t + U h_{t-1} + b)``."""

    def __init__(self, activation: str):
        self.activation = activation

    def ahead(self, inner: Tensor, y: Tensor, over: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        act, inners, hidden = getattr(torch, f"{self.activation}_"), inner.add_(bias).unbind(0), y.unbind(0)
        for t in _steps(inner):
            act(torch.addmm(inners[t], hidden[t], over, out=hidden[t + 1]))
        return ()

    def back(self, dy: Tensor, y: Tensor, over: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        slope, dh = DERIVATIVES[self.activation](y[1:]).unbind(0), dy.unbind(0)
        for t in reversed(_steps(dy)):
            dh[t].mul_(slope[t])
            if t:
                dh[t - 1].addmm_(dh[t], over)
        return dy, dy


class GruSteps:
    """``h_t = n + z (h_{t-1} - n)``, ``n = tanh(inner_n + r (U_n h_{t-1} + b_n))``; gates in the order r, z, n."""

    def ahead(self, inner: Tensor, y: Tensor, over: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        H, outer = y.shape[2], torch.empty_like(inner)
        r, z, n = (part.unbind(0) for part in inner.chunk(3, -1))
        rz, outer_rz, outer_n = (
            inner[..., : 2 * H].unbind(0),
            outer[..., : 2 * H].unbind(0),
            outer[..., 2 * H :].unbind(0),
        )
        outers, hidden = outer.unbind(0), y.unbind(0)
        for t in _steps(inner):
            torch.addmm(bias, hidden[t], over, out=outers[t])
            rz[t].add_(outer_rz[t]).sigmoid_()
            n[t].addcmul_(r[t], outer_n[t]).tanh_()
            torch.lerp(n[t], hidden[t], z[t], out=hidden[t + 1])
        return inner, outer[..., 2 * H :].contiguous()

    def back(self, dy: Tensor, y: Tensor, over: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        gates, outer_n = kept
        r, z, n = gates.chunk(3, -1)
        of_n = (1 - z) * (1 - n * n)
        by_gate = torch.stack([of_n * outer_n * r * (1 - r), (y[:-1] - n) * z * (1 - z), of_n * r], 2)
        outer = by_gate.flatten(2)
        keep, dh, own, outers, gates_t = (a.unbind(0) for a in (z, dy, dy[:, :, None], outer, by_gate))
        for t in reversed(_steps(dy)):
            gates_t[t].mul_(own[t])
            if t:
                dh[t - 1].addcmul_(dh[t], keep[t]).addmm_(outers[t], over)
        inner = outer.clone()
        torch.mul(dy, of_n, out=inner[..., -dy.shape[2] :])
        return inner, outer
