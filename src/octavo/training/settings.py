"""What a recipe says about training, for pretraining and tuning alike."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from octavo.objectives.likelihood import CausalLikelihood
from octavo.objectives.tables import OBJECTIVES
from octavo.schema import Config, one_of
from octavo.training.optim import AdamW, WeightAverage
from octavo.training.optimizers import OPTIMIZERS
from octavo.training.schedule import SCHEDULES, Cosine


class TrainConfig(Config):
    """THE loop's settings.

    update says how many samples an optimizer step sees: ``mini_batch`` (step_tokens), ``per_sample`` (one
    row) or ``full_batch`` (all rows). A step is computed in micro-batches of ``micro_batch_rows``; the
    gradient is the same for any value. ``auto`` choices are made once and frozen in the run's recipe.
    """

    steps: int = Field(default=1000, ge=1)
    step_tokens: int = Field(default=8192, ge=1, description="tokens per optimizer step")
    update: Literal["mini_batch", "per_sample", "full_batch"] = "mini_batch"
    micro_batch_rows: int | None = Field(default=None, ge=1, description="rows computed at once; default: all")
    seq_len: int | None = Field(default=None, ge=2, description="tokens a row; default: the model's max_seq_len")
    objective: one_of(OBJECTIVES) = CausalLikelihood.Config()  # type: ignore[valid-type]
    optimizer: one_of(OPTIMIZERS, default="adamw") = AdamW.Config()  # type: ignore[valid-type]
    schedule: one_of(SCHEDULES, default="cosine") = Cosine.Config()  # type: ignore[valid-type]
    average: WeightAverage | None = Field(default=None, description="train.average: {decay: 0.999} keeps one")
    clip_norm: float | None = Field(default=1.0, gt=0, description="longest gradient (l2 norm); null: no limit")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "step", "off"] = "auto"
    attention: Literal["auto", "kernel", "sdpa"] = Field(default="auto", description="for mixers with backend auto")
    threads: int | None = Field(default=None, ge=1, description="default: the cores of this process")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?|mps)$")
    activation_checkpointing: bool = Field(default=False, description="recompute each block in the backward pass")
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="a loss or gradient that is not finite: stop, leave the step out, or leave out all steps since "
        "the last checkpoint",
    )
    on_spike: Literal["log", "skip"] = Field(default="log", description="a loss far above the last hundred")
    spike_sigmas: float = Field(default=6.0, gt=0, description="how far above is a spike, in standard deviations")
    max_skips: int = Field(default=10, ge=1, description="more steps left out of 100 stop the run")
    log_every: int = Field(default=10, ge=1)
    valid_every: int = Field(default=100, ge=1)
    valid_batches: int = Field(default=8, ge=0, description="batches of held-out rows per validation; 0: none")
    sample_every: int = Field(default=200, ge=1)
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = Field(default=48, ge=1)
    sample_temperature: float = Field(default=0.7, ge=0)
    save_every: int = Field(default=200, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    tensorboard: bool = False

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.schedule.warmup >= self.steps:
            raise ValueError(f"schedule.warmup = {self.schedule.warmup} must be below steps = {self.steps}")
        return self
