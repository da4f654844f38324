"""Maximum likelihood of tokens that were hidden, from both sides: BERT's first task, RoBERTa's only one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from octavo.batch import Batch
from octavo.nn.contracts import Outputs
from octavo.objectives.contract import Objective
from octavo.objectives.likelihood import CausalLikelihood
from octavo.schema import Config


class MaskedLikelihood(Objective):
    """``-sum log p(token | the text with some of it hidden)`` over the tokens that were chosen.

    The rows come masked (data/masking.py), targets in their own slots. Of all tokens a share ``probability`` is
    chosen (BERT 0.15, ModernBERT 0.3); of these ``mask`` are hidden, ``random`` replaced by another token, the rest
    left as they are. ``static`` masks a document the same way in every pass, ``whole_words`` all tokens of a word or
    none. Only chosen tokens go through the head, ``chunk_tokens`` at a time. Source: Devlin et al. 2019, section 3.1;
    Liu et al. 2019, section 4.1.
    """

    class Config(Config):
        kind: Literal["masked"] = "masked"
        probability: float = Field(default=0.15, gt=0, le=1)
        mask: float = Field(default=0.8, ge=0, le=1, description="share of the chosen that is hidden")
        random: float = Field(default=0.1, ge=0, le=1, description="share of the chosen that becomes another token")
        static: bool = False
        whole_words: bool = False
        z_loss: float = Field(default=0.0, ge=0)
        chunk_tokens: int | None = Field(default=1024, ge=1, description="null: the logits of all tokens at once")

        @model_validator(mode="after")
        def _shares(self) -> MaskedLikelihood.Config:
            if self.mask + self.random > 1:
                raise ValueError(f"mask + random = {self.mask + self.random:g} must not exceed 1")
            return self

    def __init__(self, config: MaskedLikelihood.Config | None = None):
        self.config = config or MaskedLikelihood.Config()
        own = CausalLikelihood.Config(z_loss=self.config.z_loss, chunk_tokens=self.config.chunk_tokens)
        self.likelihood = CausalLikelihood(own)  # which reads targets where they stand
        self.needs = self.likelihood.needs

    def weight(self, batch: Batch) -> Tensor:
        return self.likelihood.weight(batch)

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        return self.likelihood.loss_sum(outputs, batch)
