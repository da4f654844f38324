"""Maximum likelihood of the next token: pretraining, and with the renderer's loss mask instruction tuning."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from octavo.batch import Batch
from octavo.nn.contracts import Aux, Outputs, full_precision
from octavo.objectives.contract import Objective
from octavo.objectives.head_loss import head_loss
from octavo.schema import Config


class FimConfig(Config):
    """A share ``rate`` of the documents is told with the middle last, of these a share ``spm`` suffix first."""

    rate: float = Field(default=0.5, gt=0, le=1)
    spm: float = Field(default=0.0, ge=0, le=1)


class CausalLikelihood(Objective):
    """``-sum log p(target | tokens so far)`` over targets whose mask is not zero.

    Targets come shifted with the batch, so nothing is shifted here. z_loss adds ``z * log(Z)^2`` a token,
    which keeps the normaliser near one (Chowdhery et al. 2022, section 5). With ``chunk_tokens`` head and loss
    are one, and only that many tokens' logits exist at a time (see ``head_loss``). multi_token_weight w trains the
    model's multi-token modules with w times the mean of their losses (DeepSeek-AI 2024, DeepSeek-V3, equation 25).
    ``fim`` changes the rows, not the loss: some documents have their middle last (data/fim.py), held-out ones never.
    """

    class Config(Config):
        kind: Literal["causal"] = "causal"
        z_loss: float = Field(default=0.0, ge=0)
        chunk_tokens: int | None = Field(default=None, ge=1, description="null: all logits at once")
        multi_token_weight: float = Field(default=0.0, ge=0, description="of the modules' mean loss; V3: 0.3, then 0.1")
        fim: FimConfig | None = Field(default=None, description="fill in the middle; in the train section alone")

    def __init__(self, config: CausalLikelihood.Config | None = None):
        self.config = config or CausalLikelihood.Config()
        if self.config.chunk_tokens:
            self.needs = ("hidden", "head")
        if self.config.multi_token_weight:
            self.training_needs = ("multi_token", "head")

    def extra(self, model: Any, rows: int, seq_len: int) -> dict[str, Tensor]:
        if model.kind != "encoder_decoder":
            return {}
        ids = torch.zeros(rows, seq_len, dtype=torch.long)  # how long sources are, nothing here says
        return {"source": ids, "source_valid": torch.ones_like(ids, dtype=torch.bool)}

    def weight(self, batch: Batch) -> Tensor:
        return batch.loss_mask.sum()

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        if self.config.chunk_tokens:
            return self._chunked(outputs, batch, self.config.chunk_tokens)
        logits = outputs.logits
        if logits is None:
            raise ValueError("CausalLikelihood needs the output `logits`")
        logits = full_precision(logits)
        losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        if self.config.z_loss:
            losses = losses + self.config.z_loss * logits.flatten(0, 1).logsumexp(-1).square()
        # A mask product would turn an infinite loss on padding into NaN: select instead.
        mask = batch.loss_mask.flatten()
        return (losses * mask).where(mask != 0, losses.new_zeros(())).sum()

    def _chunked(self, outputs: Outputs, batch: Batch, chunk: int) -> Tensor:
        hidden, head = outputs.hidden, outputs.head
        if hidden is None or head is None:
            raise ValueError("CausalLikelihood with chunk_tokens needs the outputs `hidden` and `head`")
        targets, weights = batch.targets.flatten(), batch.loss_mask.flatten()
        return head_loss(hidden.flatten(0, 1), head, targets, weights, z_loss=self.config.z_loss, chunk=chunk)

    def beside(self, outputs: Outputs, batch: Batch) -> Aux:
        """The multi-token loss. Module k's token t foretells ``targets[t + k]``, where both are of one document."""
        if not self.config.multi_token_weight:
            return {}
        if not outputs.multi_token or outputs.head is None:
            raise ValueError("multi_token_weight needs a model with multi_token modules")
        chunk, losses = self.config.chunk_tokens or batch.tokens.shape[1] * batch.rows, []
        for by, hidden in enumerate(outputs.multi_token, 1):
            same = batch.doc_ids[:, by:] == batch.doc_ids[:, :-by]
            weights, targets = batch.loss_mask[:, by:] * same, batch.targets[:, by:]
            part = hidden[:, :-by].flatten(0, 1)
            losses.append(head_loss(part, outputs.head, targets.flatten(), weights.flatten(), chunk=chunk))
        return {"loss.multi_token": self.config.multi_token_weight * torch.stack(losses).mean()}
