"""Whole texts at a temperature, enumerated: what sampling token by token at that temperature is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.infer.sampling import with_temperature


def log_probs_of_all(next_logits: Callable[[Tensor], Tensor], length: int, temperature: float = 1.0) -> Tensor:
    """ln q of every sequence of ``length`` tokens drawn one by one: ``q = prod_t p(x_t | x_<t)^(1/T) / Z(x_<t)``.

    Args:
        next_logits: prefixes (N, t) -> logits (N, V) of what comes next; t begins at 0.

    Returns:
        (V, ..., V) float64, indexed by the tokens in their order.
    """
    logits = next_logits(torch.zeros(1, 0, dtype=torch.long)).double()
    size = logits.shape[-1]
    total = with_temperature(logits, temperature).log_softmax(-1).view(-1)
    for t in range(1, length):
        prefixes = torch.cartesian_prod(*[torch.arange(size)] * t).view(-1, t)
        step = with_temperature(next_logits(prefixes).double(), temperature).log_softmax(-1)
        total = (total[:, None] + step).view(-1)
    return total.view(*[size] * length)


def annealed(log_probs: Tensor, temperature: float) -> Tensor:
    """``p(x)^(1/T) / Z`` over whole sequences: (V, ..., V) log-probabilities at T = 1 -> probabilities.

    This is not the distribution of drawing every token at T. Its first token has probability in proportion to
    ``p(x1)^(1/T) * sum_rest p(rest | x1)^(1/T)``: tokens that lead to certain continuations gain (T < 1), which a
    choice that looks at one token cannot know. As T -> 0 it becomes the most probable *sequence*, the one that beam
    search looks for, while token by token it becomes the greedy one. Both agree at T = 1 and for a single token.
    """
    return with_temperature(log_probs.reshape(1, -1), temperature).softmax(-1).view(log_probs.shape)
