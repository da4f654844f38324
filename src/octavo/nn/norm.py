"""Normalisation over the last axis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from octavo.nn.contracts import full_precision
from octavo.schema import Config


class Norm(nn.Module, ABC):
    """The contract: built from its Config and a width; ``reset`` sets the starting values."""

    role = "norm"

    @abstractmethod
    def predicted_parameters(self) -> int:
        """The parameter count by formula."""

    def reset(self) -> None:
        """Nothing to set where there are no weights."""


class LayerNorm(Norm):
    """``(x - mean) / sqrt(var + eps) * w + b``, in float32 inside.

    Source: Ba, Kiros and Hinton 2016, section 3.
    """

    class Config(Config):
        kind: Literal["layernorm"] = "layernorm"
        eps: float = Field(default=1e-5, ge=0)
        bias: bool = True

    def __init__(self, config: LayerNorm.Config, d: int):
        super().__init__()
        self.d, self.eps = d, config.eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if config.bias else None

    def reset(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def predicted_parameters(self) -> int:
        return self.d * (1 if self.bias is None else 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(Norm):
    """``x / sqrt(mean(x^2) + eps) * w``: float32 inside, cast back, then scaled.

    The cast comes before the scale, as in the Llama and Qwen checkpoints, so that 16-bit outputs round
    alike. With ``offset`` the scale is ``1 + w``, and w starts at zero, so that weight decay pulls towards
    no scale; there the cast comes last, as in the Gemma checkpoints (Gemma Team 2024). Without ``weight``
    nothing is scaled (nanochat). Source: Zhang and Sennrich 2019, equation 4.
    """

    class Config(Config):
        kind: Literal["rmsnorm"] = "rmsnorm"
        eps: float = Field(default=1e-6, ge=0)
        offset: bool = Field(default=False, description="scale by 1 + w")
        weight: bool = Field(default=True, description="false: no scale")

        @model_validator(mode="after")
        def _one_scale(self) -> RMSNorm.Config:
            if self.offset and not self.weight:
                raise ValueError("offset scales by 1 + w, and there is no w without weight")
            return self

    def __init__(self, config: RMSNorm.Config, d: int):
        super().__init__()
        self.d, self.eps, self.offset = d, config.eps, config.offset
        self.weight = nn.Parameter(torch.empty(d)) if config.weight else None
        self.reset()

    def reset(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.offset else 1.0)

    def predicted_parameters(self) -> int:
        return 0 if self.weight is None else self.d

    def forward(self, x: Tensor) -> Tensor:
        wide = full_precision(x)
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is None:
            return unit.to(x.dtype)
        if self.offset:
            return (unit * (1 + full_precision(self.weight))).to(x.dtype)
        return self.weight * unit.to(x.dtype)


class NoNorm(Norm):
    """The identity: to see what normalisation is for."""

    class Config(Config):
        kind: Literal["none"] = "none"

    def __init__(self, config: NoNorm.Config, d: int):
        super().__init__()

    def predicted_parameters(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return x
