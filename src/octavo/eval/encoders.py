"""What a model with a head of classes says of texts, and an encoder of hidden tokens: batch by batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import full_precision


@torch.no_grad()
def class_scores(model: Any, batch: Any) -> Tensor:
    """The scores of a batch's rows, (B, C) float32, before softmax or sigmoid."""
    return full_precision(model(batch.inputs(), needs=("classes",)).classes)


@torch.no_grad()
def tags_said(model: Any, batch: Any) -> list[tuple[list[int], list[int]]]:
    """Of each row of a batch the tags that are given and those that the model says, where there are any."""
    said, given = model(batch.inputs(), needs=("classes",)).classes.argmax(-1), batch.extra["labels"]
    there = given >= 0
    return [(given[row, at].tolist(), said[row, at].tolist()) for row, at in enumerate(there)]


@torch.no_grad()
def hidden_right(model: Any, batch: Any) -> np.ndarray:
    """Of each row's hidden tokens: the sum of nats, how many there are, and how many are foretold; (B, 3)."""
    chosen = batch.loss_mask > 0
    hidden = model(batch.inputs(), needs=("hidden",)).hidden[chosen]
    logits, aim = full_precision(model.logits(hidden)), batch.targets[chosen]
    nats = F.cross_entropy(logits, aim, reduction="none").double()
    each = torch.stack([nats, torch.ones_like(nats), (logits.argmax(-1) == aim).double()], 1)
    out = torch.zeros(len(chosen), 3, dtype=torch.float64, device=each.device)
    return out.index_add_(0, chosen.nonzero()[:, 0], each).cpu().numpy()
