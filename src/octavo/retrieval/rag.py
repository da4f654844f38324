"""RAG-token: every token may lean on another passage, and what is said is the sum over all of them.

    p(y_i | x, y_<i) = sum_z p(z | x) p(y_i | x, z, y_<i)

Source: Lewis et al. 2020, "Retrieval-Augmented Generation", section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from octavo.errors import ConfigError, UnsupportedError
from octavo.nn.contracts import Inputs, Outputs, Predictor
from octavo.nn.state import State, StateSpec


def marginal(logits: Tensor, scores: Tensor) -> Tensor:
    """``ln p(y | x)`` of every token, (B, T, V).

    Args:
        logits: (B, K, T, V), of a model that read each of K passages.
        scores: (B, K), how well each passage fits; their softmax is p(z | x).
    """
    return (logits.log_softmax(-1) + scores.log_softmax(-1)[:, :, None, None]).logsumexp(1)


def negative_likelihood(logits: Tensor, scores: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """``-sum_i ln p(y_i | x, y_<i)`` of each row, (B,), with gradients to logits and scores alike.

    Args:
        logits, scores: as in ``marginal``.
        targets: (B, T) int64.
        mask: (B, T), 0 where a target does not count.
    """
    said = marginal(logits, scores).gather(-1, targets[..., None]).squeeze(-1)
    return -(said if mask is None else said.where(mask != 0, said.new_zeros(()))).sum(-1)


class RagToken:
    """A predictor of B rows over a model that reads B times K prompts, one for each passage.

    The prompts are given once, with the first call: rows b K to b K + K - 1 are those of row b, padded on the left, so
    that all end together; what follows is fed to all K of them.

    Args:
        model: what reads; its state is kept for all B times K rows.
        scores: (B, K) of the passages.
    """

    def __init__(self, model: Predictor, scores: Tensor):
        if scores.ndim != 2 or not scores.shape[1]:
            raise ConfigError(
                f"scores of shape {tuple(scores.shape)}", fix="give (rows, passages), one passage or more"
            )
        self.model, self.scores = model, scores
        self.vocab_size, self.max_seq_len = model.vocab_size, model.max_seq_len

    def state_specs(self) -> dict[str, StateSpec]:
        return self.model.state_specs()

    def new_state(self, rows: int, max_tokens: int | None = None) -> State:
        """A state of ``rows`` rows times the number of passages."""
        return self.model.new_state(rows * self.scores.shape[1], max_tokens)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, state: Any = None, needs: Iterable[str] = ("logits",)) -> Outputs:
        """Log-probabilities (B, T, V); tokens are (B K, T) prompts, or (B, T) that go to all passages."""
        if unknown := sorted(set(needs) - {"logits"}):
            raise UnsupportedError(f"a mixture has no {', '.join(unknown)}", fix="ask for logits alone")
        B, K = self.scores.shape
        if len(inputs.tokens) == B and K > 1:
            repeat = [None if t is None else t.repeat_interleave(K, 0) for t in (inputs.tokens, inputs.valid)]
            inputs = Inputs(repeat[0], valid=repeat[1])  # type: ignore[arg-type]
        logits = self.model(inputs, state).logits
        assert logits is not None
        return Outputs(logits=marginal(logits.float().unflatten(0, (B, K)), self.scores.float()))
