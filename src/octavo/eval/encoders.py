"""What a model with a head of classes says of texts, and an encoder of hidden tokens: batch by batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import full_precision


@torch.no_grad()
def class_scores(model: Any, batch: Any) -> Tensor:
    """The scores of a batch's rows, (B, C) float32, before softmax or sigmoid."""
    return full_precision(model(batch.inputs(), needs=("classes",)).classes)


@torch.no_grad()
def hidden_right(model: Any, batch: Any) -> tuple[float, int, int]:
    """Of a batch's hidden tokens: the sum of nats, how many there are, and how many are foretold."""
    chosen = batch.loss_mask > 0
    hidden = model(batch.inputs(), needs=("hidden",)).hidden[chosen]
    logits, aim = full_precision(model.logits(hidden)), batch.targets[chosen]
    nats = F.cross_entropy(logits, aim, reduction="sum") if len(aim) else logits.new_zeros(())
    return float(nats), len(aim), int((logits.argmax(-1) == aim).sum())
