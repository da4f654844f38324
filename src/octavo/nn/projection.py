"""Weight products with a role, and how each role is initialised.

Roles are the vocabulary by which initialisation, optimizer groups, adapters, quantisation, tensor-parallel
plans and checkpoint importers speak of weights: embed, position, q, k, v, o, gate, up, down, router, expert.gate,
expert.up, expert.down, head, norm.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Mixer
from octavo.nn.grouped import grouped_product
from octavo.nn.norm import Norm
from octavo.schema import Config

# Roles whose product is added to the residual stream: their variance adds up over the depth.
RESIDUAL_ROLES = frozenset({"o", "down", "expert.down"})


class InitConfig(Config):
    """How weights start. ``normal``: N(0, std); biases zero, norms one.

    scale_residual divides the std of products that feed the residual stream by sqrt(2 n_layers)
    (GPT-2: Radford et al. 2019, section 2.3).
    """

    kind: Literal["normal"] = "normal"
    std: float = Field(default=0.02, ge=0)
    scale_residual: bool = True


class Projection(nn.Module):
    """``y = x W^T + b`` with weight (d_out, d_in): x (..., d_in) to (..., d_out)."""

    def __init__(self, d_in: int, d_out: int, role: str, *, bias: bool = False):
        super().__init__()
        self.d_in, self.d_out, self.role = d_in, d_out, role
        self.gain = 1.0  # of the starting values
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def n_parameters(self) -> int:
        return self.d_in * self.d_out + (self.d_out if self.bias is not None else 0)

    def extra_repr(self) -> str:
        return f"{self.d_in}, {self.d_out}, role={self.role}, bias={self.bias is not None}"


class GroupedProjection(nn.Module):
    """``y_i = x_i W_g^T`` for the rows i of group g, with one weight (n, d_out, d_in) for all n groups."""

    def __init__(self, n: int, d_in: int, d_out: int, role: str):
        super().__init__()
        self.n, self.d_in, self.d_out, self.role = n, d_in, d_out, role
        self.weight = nn.Parameter(torch.empty(n, d_out, d_in))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (M, d_in), sorted by group, to (M, d_out); ``ends`` (n,) says where each group's rows end."""
        return grouped_product(x, self.weight, ends)

    def every(self, x: Tensor) -> Tensor:
        """Every group's product: x (N, d_in), or (n, N, d_in) with one of its own for each, to (n, N, d_out)."""
        return x @ self.weight.mT

    def n_parameters(self) -> int:
        return self.n * self.d_in * self.d_out

    def extra_repr(self) -> str:
        return f"{self.n} x ({self.d_in}, {self.d_out}), role={self.role}"


@torch.library.custom_op("octavo::look_up", mutates_args=())
def _look_up(weight: Tensor, ids: Tensor, padding_id: int) -> Tensor:
    return F.embedding(ids, weight)


# Opaque to the compiler on purpose: the gradient it would generate adds rows atomically from several threads,
# in an order that differs from run to run, and a resumed run could not be bit-identical.
@torch.library.custom_op("octavo::look_up_gradient", mutates_args=())
def _look_up_gradient(grad: Tensor, ids: Tensor, n: int, padding_id: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, ids, n, padding_id, False)


@_look_up.register_fake
def _(weight: Tensor, ids: Tensor, padding_id: int) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@_look_up_gradient.register_fake
def _(grad: Tensor, ids: Tensor, n: int, padding_id: int) -> Tensor:
    return grad.new_empty(n, grad.shape[-1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, ids, padding_id = inputs
    ctx.save_for_backward(ids)
    ctx.n, ctx.padding_id = weight.shape[0], padding_id


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    return torch.ops.octavo.look_up_gradient(grad.contiguous(), ids, ctx.n, ctx.padding_id), None, None


_look_up.register_autograd(_backward, setup_context=_save)


class Embedding(nn.Module):
    """One row of the weight (n, d) per id: ids (...) to (..., d). ``padding_id``'s row gets no gradient."""

    def __init__(self, n: int, d: int, role: str, *, padding_id: int | None = None):
        super().__init__()
        self.n, self.d, self.role, self.padding_id = n, d, role, padding_id
        self.weight = nn.Parameter(torch.empty(n, d))

    def forward(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.octavo.look_up(self.weight, ids, -1 if self.padding_id is None else self.padding_id)
        return F.embedding(ids, self.weight, self.padding_id)

    def extra_repr(self) -> str:
        return f"{self.n}, {self.d}, role={self.role}"


@torch.no_grad()
def initialise(model: nn.Module, config: InitConfig, n_layers: int, generator: torch.Generator | None = None) -> None:
    """Set every weight of ``model`` in place by its role; other parameters are set by ``reset``."""
    for module in model.modules():
        if isinstance(module, Projection | GroupedProjection | Embedding):
            scale = (2 * n_layers) ** -0.5 if config.scale_residual and module.role in RESIDUAL_ROLES else 1.0
            # Drawn in fp32 on the CPU so that the start does not depend on dtype or device.
            weight = torch.empty(module.weight.shape, dtype=torch.float32)
            scale *= module.gain if isinstance(module, Projection) else 1.0
            weight.normal_(0.0, config.std * scale, generator=generator)
            module.weight.copy_(weight)
            if isinstance(module, Embedding) and module.padding_id is not None:
                module.weight[module.padding_id].zero_()
            if isinstance(module, Projection) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, Mixer | Norm):
            module.reset()
