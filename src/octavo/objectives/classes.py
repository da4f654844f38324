"""What a head of classes is trained on: one class, any number of classes, or numbers, of a text or of its tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.batch import Batch
from octavo.nn.contracts import Outputs, full_precision
from octavo.objectives.contract import Objective
from octavo.schema import Config


class ClassLoss(Objective):
    """Cross-entropy of one class, binary cross-entropies of several, or squared errors, as ``problem`` says.

    The batch brings ``labels`` in ``extra``: (B,) int64 of texts or (B, T) of tokens, below zero where there is none;
    or (B, C) float, one number for each class. Several classes of one text, or several numbers, count as their mean,
    so that a text weighs one.
    """

    needs = ("classes",)

    class Config(Config):
        kind: Literal["classes"] = "classes"
        problem: Literal["single_label", "multi_label", "regression"] = "single_label"

    def __init__(self, config: ClassLoss.Config | None = None):
        self.config = config or ClassLoss.Config()

    def extra(self, model: Any, rows: int, seq_len: int) -> dict[str, Tensor]:
        if self.config.problem != "single_label":
            return {"labels": torch.zeros(rows, model.classes.n)}
        shape = (rows, seq_len) if model.classes.over == "token" else (rows,)
        return {"labels": torch.zeros(shape, dtype=torch.long)}

    def weight(self, batch: Batch) -> Tensor:
        labels = batch.extra["labels"]
        if self.config.problem == "single_label":
            return (labels >= 0).sum().float()
        return labels.new_tensor(len(labels))

    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        if outputs.classes is None:
            raise ValueError("ClassLoss needs the output `classes`")
        scores, labels = full_precision(outputs.classes), batch.extra["labels"]
        if self.config.problem == "single_label":
            known = labels.flatten().clamp(min=-1)
            return F.cross_entropy(scores.flatten(0, -2), known, ignore_index=-1, reduction="sum")
        if self.config.problem == "multi_label":
            losses = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
        else:
            losses = (scores - labels.to(scores.dtype)).square()
        return losses.mean(-1).sum()
