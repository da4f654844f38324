"""Pointwise activations by name. Sources: GELU, Hendrycks and Gimpel 2016; SiLU, Elfwing et al. 2018."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def relu_squared(x: Tensor) -> Tensor:
    """``max(x, 0)^2`` (So et al. 2021, Primer, section 4.2)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation: what GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    """``x``: with a GLU this is the bilinear form of Shazeer 2020."""
    return x


ActivationName = Literal["sigmoid", "tanh", "relu", "relu_squared", "gelu", "gelu_tanh", "silu", "identity"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu_squared": relu_squared,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "identity": identity,
}
