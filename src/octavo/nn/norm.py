"""Normalisation over the last axis."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.nn.contracts import full_precision
from octavo.schema import Config


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * w + b``, in float32 inside.

    Source: Ba, Kiros and Hinton 2016, section 3.
    """

    role = "norm"

    class Config(Config):
        kind: Literal["layernorm"] = "layernorm"
        eps: float = 1e-5
        bias: bool = True

    def __init__(self, config: LayerNorm.Config, d: int):
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if config.bias else None

    def reset(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * w``: float32 inside, cast back, then scaled.

    The cast comes before the scale, as in the Llama and Qwen checkpoints, so that 16-bit outputs round
    alike. Source: Zhang and Sennrich 2019, equation 4.
    """

    role = "norm"

    class Config(Config):
        kind: Literal["rmsnorm"] = "rmsnorm"
        eps: float = 1e-6

    def __init__(self, config: RMSNorm.Config, d: int):
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(d))

    def reset(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = full_precision(x)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class NoNorm(nn.Module):
    """The identity: to see what normalisation is for."""

    class Config(Config):
        kind: Literal["none"] = "none"

    def __init__(self, config: NoNorm.Config, d: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x
