"""Learning-rate schedules: a factor of the peak rate for every step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from octavo.schema import Config


class Schedule:
    """The contract: ``factor(step, steps)`` in [0, 1] for step 0 .. steps-1."""

    class Config(Config):
        kind: str
        warmup: int = Field(default=0, ge=0, description="steps of linear rise")

    def __init__(self, config: Schedule.Config):
        self.config = config

    def factor(self, step: int, steps: int) -> float:
        warmup = self.config.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.after_warmup((step - warmup) / max(1, steps - warmup))

    def after_warmup(self, progress: float) -> float:
        """The factor at ``progress`` in [0, 1) of the steps after the warm-up."""
        return 1.0


class Constant(Schedule):
    """The peak rate to the end."""

    class Config(Schedule.Config):
        kind: Literal["constant"] = "constant"


class Cosine(Schedule):
    """Half a cosine down to ``final`` (Loshchilov and Hutter 2017, equation 5, without restarts)."""

    class Config(Schedule.Config):
        kind: Literal["cosine"] = "cosine"
        final: float = Field(default=0.1, ge=0, le=1)

    def after_warmup(self, progress: float) -> float:
        final = self.config.final  # type: ignore[attr-defined]
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class Linear(Schedule):
    """A straight line down to ``final``."""

    class Config(Schedule.Config):
        kind: Literal["linear"] = "linear"
        final: float = Field(default=0.0, ge=0, le=1)

    def after_warmup(self, progress: float) -> float:
        return 1 - (1 - self.config.final) * progress  # type: ignore[attr-defined]


class WarmupStableDecay(Schedule):
    """The peak rate, then a straight line down over the last ``decay`` of the steps (Hu et al. 2024, section 4)."""

    class Config(Schedule.Config):
        kind: Literal["wsd"] = "wsd"
        decay: float = Field(default=0.3, gt=0, le=1)
        final: float = Field(default=0.0, ge=0, le=1)

    def after_warmup(self, progress: float) -> float:
        config = self.config
        fallen = max(0.0, (progress - 1 + config.decay) / config.decay)  # type: ignore[attr-defined]
        return 1 - (1 - config.final) * fallen  # type: ignore[attr-defined]


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "linear": Linear,
    "wsd": WarmupStableDecay,
}
