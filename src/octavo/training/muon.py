"""Muon: momentum whose matrices are made orthogonal before they are applied."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from octavo.training.optim import AdamW, Group


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each of (..., a, b), roughly: singular values go to about 1.

    The quintic Newton-Schulz iteration of Jordan et al. 2024 (Muon), with their coefficients: it does not
    converge to 1 exactly, it brings every singular value into [0.7, 1.2] in few products.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-1, -2) if wide else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if wide else x


class Muon(AdamW):
    """Orthogonalised momentum for the matrices inside the blocks, AdamW for the rest.

    ``lr`` is that of the matrices, whose update has a root-mean-square of 0.2 as Adam's has (Liu et al. 2025,
    section 2.2), so that one rate and one decay serve both rules; ``other_scale`` multiplies it for tables,
    norms, biases and the head. Source: Jordan et al. 2024.
    """

    moments = ("exp_avg", "exp_avg_sq")

    class Config(AdamW.Config):
        kind: Literal["muon"] = "muon"  # type: ignore[assignment]
        lr: float = Field(default=3e-3, gt=0)
        momentum: float = Field(default=0.95, ge=0, lt=1)
        steps: int = Field(default=5, ge=1, description="Newton-Schulz steps")
        other_scale: float = Field(default=1.0, gt=0, description="a factor of lr for what is not a matrix")

    def rule_of(self, parameter: nn.Parameter, role: str) -> str:
        matrices = parameter.ndim == 2 or role.startswith("expert.")  # one a group, each made orthogonal alone
        return "muon" if matrices and role not in ("embed", "position", "router", "head") else "adam"

    @torch.no_grad()
    def update(self, group: Group, state: dict[str, Tensor], lr: float) -> None:
        config = self.config
        if group.rule == "adam":
            self.adam(group, state, lr * config.other_scale)  # type: ignore[attr-defined]
            return
        beta = config.momentum  # type: ignore[attr-defined]
        momentum = state["exp_avg"].lerp_(group.total, 1 - beta)
        ahead = group.total.lerp(momentum, beta)  # Nesterov's look ahead
        group.master.mul_(1 - lr * group.decay)
        weights, directions = group.views(group.master), group.views(ahead)
        for shape in dict.fromkeys(group.shapes):  # equal shapes go through the products together
            here = [i for i, other in enumerate(group.shapes) if other == shape]
            turned = orthogonalise(torch.stack([directions[i] for i in here]), config.steps)  # type: ignore[attr-defined]
            scale = 0.2 * max(shape[-2:]) ** 0.5
            for i, direction in zip(here, turned, strict=True):
                weights[i].add_(direction, alpha=-lr * scale)
