"""What a law says about a subject, and the words in which laws are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Status = Literal["holds", "broken", "not asked"]

TOLERANCE = 1e-9
"""Relative to the largest value, in float64: far above rounding, far below any mistake."""


class LawBroken(Exception):
    """A subject does not have the property."""


@dataclass(frozen=True)
class LawResult:
    """The verdict of one law: ``detail`` says what was seen where it is broken."""

    law: str
    status: Status
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.status != "broken"

    def __str__(self) -> str:
        return f"{self.law}: {self.status}" + (f" ({self.detail})" if self.detail else "")


def verdict(name: str, law: Callable[..., None], *subject: Any, asked: bool = True) -> LawResult:
    """Run one law. A subject that raises has broken it: the error is the detail."""
    if not asked:
        return LawResult(name, "not asked")
    try:
        law(*subject)
    except LawBroken as broken:
        return LawResult(name, "broken", str(broken))
    except Exception as error:
        return LawResult(name, "broken", f"{type(error).__name__}: {error}".splitlines()[0])
    return LawResult(name, "holds")


def require(condition: bool | Tensor, what: str) -> None:
    """The law is broken unless ``condition``."""
    if not bool(condition):
        raise LawBroken(what)


def require_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """The law is broken unless the two agree, relative to the largest wanted value."""
    require(got.shape == wanted.shape, f"{what}: shapes {tuple(got.shape)} and {tuple(wanted.shape)}")
    require(bool(torch.isfinite(got).all()), f"{what}: not finite")
    if wanted.numel():
        difference = float((got - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        require(difference <= tolerance, f"{what}: differs by {difference:.1e}, allowed {tolerance:.0e}")
