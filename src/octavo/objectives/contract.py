"""What an objective is: outputs it needs, a weight known from the batch alone, and a sum of losses.

An objective never calls the model. Because it returns a sum and the weight does not depend on the model,
the gradient of k micro-batches (or ranks) is exactly that of one large batch:
``sum_i loss_sum_i / sum_i weight_i``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from octavo.batch import Batch
from octavo.nn.contracts import Aux, Outputs


class Objective(ABC):
    """The contract. ``needs`` names the model outputs ``loss_sum`` reads."""

    needs: tuple[str, ...] = ("logits",)
    training_needs: tuple[str, ...] = ()  # what ``beside`` reads, too

    @abstractmethod
    def weight(self, batch: Batch) -> Tensor:
        """What the loss of this batch is divided by, a scalar; zero where nothing counts."""

    @abstractmethod
    def loss_sum(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The sum of losses over the batch, a scalar in nats."""

    def extra(self, model: Any, rows: int, seq_len: int) -> dict[str, Tensor]:
        """A stand-in for what it reads of ``batch.extra``, given a model's configuration: for measuring."""
        return {}

    def beside(self, outputs: Outputs, batch: Batch) -> Aux:
        """What else is trained on, sums by names that begin with ``loss.``; held-out losses leave it out."""
        return {}
