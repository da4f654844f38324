"""Maximum likelihood of what mends a damaged text: T5's spans, BART's infilling; and of what follows a prefix.

The rows come damaged or divided, from data/denoising.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.objectives.likelihood import CausalLikelihood
from octavo.schema import Config


class _Denoising(CausalLikelihood):
    """The likelihood of the target, given the source and the target so far; damage is done by data/denoising.py."""

    def __init__(self, config: Any = None):
        self.own = config or type(self).Config()
        told = {name: getattr(self.own, name) for name in ("z_loss", "chunk_tokens")}
        super().__init__(CausalLikelihood.Config(**told))


class SpanCorruption(_Denoising):
    """``-sum log p(the spans that were taken out | the text with a sentinel for each)``.

    Of all tokens a share ``probability`` is taken, in spans of ``mean_span`` on average. Sentinels are the tokenizer's
    <extra_id_0> and on, else the rows of the model's table beyond the tokenizer's. Source: Raffel et al. 2020,
    section 3.1.4, with its 15 % and 3 (section 3.3.4).
    """

    class Config(Config):
        kind: Literal["spans"] = "spans"
        probability: float = Field(default=0.15, gt=0, lt=1)
        mean_span: float = Field(default=3.0, ge=1)
        z_loss: float = Field(default=0.0, ge=0)
        chunk_tokens: int | None = Field(default=None, ge=1, description="null: all logits at once")


class Infilling(_Denoising):
    """``-sum log p(the text | its sentences in another order, and masks for some of its spans)``.

    Spans of a Poisson number of tokens, ``mean_span`` on average, 0 among them, are each replaced by one mask token
    until a share ``probability`` of the text is gone. Source: Lewis et al. 2020, section 2.2, with the 30 % of its
    section 5.1.
    """

    class Config(Config):
        kind: Literal["infilling"] = "infilling"
        probability: float = Field(default=0.3, gt=0, lt=1)
        mean_span: float = Field(default=3.0, gt=0)
        permute: bool = Field(default=True, description="sentences too")
        z_loss: float = Field(default=0.0, ge=0)
        chunk_tokens: int | None = Field(default=None, ge=1, description="null: all logits at once")


class PrefixLikelihood(_Denoising):
    """``-sum log p(token | all of the prefix and the tokens so far)`` over the tokens after each document's prefix.

    A decoder whose attention reads the prefix both ways: where it ends is drawn anew for each document and pass, every
    place equally likely. Source: Raffel et al. 2020, section 3.2.3.
    """

    class Config(Config):
        kind: Literal["prefix"] = "prefix"
        z_loss: float = Field(default=0.0, ge=0)
        chunk_tokens: int | None = Field(default=None, ge=1, description="null: all logits at once")

    def extra(self, model: Any, rows: int, seq_len: int) -> dict[str, Tensor]:
        return {"prefix": torch.zeros(rows, seq_len, dtype=torch.bool)}
