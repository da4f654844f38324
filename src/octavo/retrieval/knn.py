"""A language model that remembers: next tokens of stored contexts like this one (kNN-LM).

Source: Khandelwal et al. 2020, "Generalization through Memorization", section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import ConfigError, DataError, UnsupportedError
from octavo.nn.contracts import Inputs, Outputs
from octavo.nn.state import State, StateSpec

if TYPE_CHECKING:
    from octavo.models.decoder import Decoder


class KnnPredictor:
    """``p(y) = w p_knn(y) + (1 - w) p(y)``, with ``p_knn(y) ~ sum over the k nearest (h', y) of exp(-|h - h'|^2 / t)``.

    h is the model's last hidden state (normed; the paper takes the input of the last feed-forward layer). logits are
    log-probabilities. The state is the model's own: what is remembered belongs to nobody's conversation.

    Args:
        model: a decoder.
        keys, values: (N, D) hidden states and (N,) the tokens that followed, from ``remember``.
        k: neighbours that are looked at.
        temperature: t; larger spreads the mass over more neighbours.
        weight: w, the share of what is remembered.
    """

    def __init__(
        self,
        model: Decoder,
        keys: Tensor,
        values: Tensor,
        *,
        k: int = 16,
        temperature: float = 10.0,
        weight: float = 0.25,
    ):
        if not 0 <= weight <= 1 or temperature <= 0 or k < 1:
            raise ConfigError(
                f"weight = {weight}, temperature = {temperature}, k = {k} do not make sense",
                fix="use a weight of 0 to 1, a temperature above 0 and k of at least 1",
            )
        if len(keys) != len(values) or not len(keys):
            raise DataError(f"{len(keys)} keys and {len(values)} values to remember", fix="use what `remember` returns")
        self.model, self.keys, self.values = model, keys.float(), values.long()
        self.k, self.temperature, self.weight = min(k, len(keys)), temperature, weight
        self.lengths = self.keys.square().sum(1)
        self.vocab_size, self.max_seq_len = model.vocab_size, model.max_seq_len

    def state_specs(self) -> dict[str, StateSpec]:
        return self.model.state_specs()

    def new_state(self, rows: int, max_tokens: int | None = None) -> State:
        return self.model.new_state(rows, max_tokens)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, state: Any = None, needs: Iterable[str] = ("logits",)) -> Outputs:
        """Log-probabilities (B, T, V) of the mixture.

        Raises:
            UnsupportedError: anything but logits was asked for.
        """
        if unknown := sorted(set(needs) - {"logits"}):
            raise UnsupportedError(f"a mixture has no {', '.join(unknown)}", fix="ask for logits alone")
        made = self.model(inputs, state, needs=("logits", "hidden"))
        assert made.logits is not None and made.hidden is not None
        own = made.logits.float().log_softmax(-1)
        near = self.remembered(made.hidden.flatten(0, 1).float()).view_as(own)
        mixed = torch.logaddexp(own + _log(1 - self.weight), near + _log(self.weight))
        return Outputs(logits=mixed)

    def remembered(self, hidden: Tensor) -> Tensor:
        """``ln p_knn`` of every token, (M, V), after hidden states (M, D); minus infinity without such a neighbour."""
        found = []
        for part in hidden.split(256):
            near, which = self.neighbours(part)
            weights = (-near / self.temperature).softmax(-1)
            mass = weights.new_zeros(len(part), self.vocab_size)
            mass.scatter_add_(1, self.values[which], weights)
            found.append(mass.log())
        return torch.cat(found)

    def neighbours(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances and numbers of the k keys next to hidden states (M, D), the nearest first: (M, k) both."""
        distances = hidden.square().sum(1, keepdim=True) + self.lengths - 2 * hidden @ self.keys.T
        return distances.clamp(min=0).topk(self.k, largest=False)


def _log(share: float) -> float:
    return float(np.log(share)) if share > 0 else -torch.inf


@torch.no_grad()
def remember(model: Decoder, documents: Iterable[Sequence[int] | np.ndarray]) -> tuple[Tensor, Tensor]:
    """Keys and values of every token but the first of documents: (N, D) and (N,).

    Longer documents are read in pieces of ``max_seq_len`` tokens.
    """
    keys, values = [], []
    was_training, limit = model.training, model.max_seq_len
    model.eval()
    try:
        for document in documents:
            tokens = torch.as_tensor(np.asarray(document, np.int64))
            for start in range(0, len(tokens) - 1, limit):
                piece = tokens[start : start + limit + 1]
                hidden = model(Inputs(piece[None, :-1]), needs=("hidden",)).hidden
                assert hidden is not None
                keys.append(hidden[0].float())
                values.append(piece[1:])
    finally:
        model.train(was_training)
    if not keys:
        raise DataError("there is nothing to remember", fix="give documents of two tokens and more")
    return torch.cat(keys), torch.cat(values)
