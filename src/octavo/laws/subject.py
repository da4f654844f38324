"""The model a law examines: small, float64, with weights that hide nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.schema import Config


@torch.no_grad()
def randomise(model: nn.Module, seed: int, std: float = 0.3) -> None:
    """Draw every parameter: a fresh model's zero biases and unit norms would hide what is done with them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
        if parameter.dim() == 1 and not name.endswith("bias"):
            drawn += 1  # the scale of a norm
        parameter.copy_(drawn)


@dataclass
class Subject:
    """A configuration and what laws ask of it; everything random follows ``seed``."""

    config: Config
    seed: int = 0

    @cached_property
    def model(self) -> Decoder:
        return self.fresh()

    def fresh(self, config: Config | None = None) -> Decoder:
        """Another model with the weights this one was given."""
        model = build(config or self.config).double().eval()
        randomise(model, self.seed)
        return model

    @property
    def n_tokens(self) -> int:
        """Tokens of a row in the laws."""
        return min(12, self.model.max_seq_len)

    def tokens(self, rows: int, n: int | None = None, seed: int = 0) -> Tensor:
        """Random ids (rows, n)."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randint(self.model.vocab_size, (rows, n or self.n_tokens), generator=generator)

    @torch.no_grad()
    def logits(self, tokens: Tensor, state: Any = None, **named: Any) -> Tensor:
        """What the model says to ``tokens`` (B, T): (B, T, V), without gradients."""
        out = self.model(Inputs(tokens, **named), state=state).logits
        if out is None:
            raise ValueError("the model gave no logits")
        return out
