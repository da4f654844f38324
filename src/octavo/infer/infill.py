"""Filling a gap: the prompt that a model trained with its middles last completes with what stood between."""

from __future__ import annotations

from octavo.errors import UnsupportedError
from octavo.tokenizer import Tokenizer


def encode_gap(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """begin prefix hole suffix end, after what begins a text: as data/fim.py tells documents.

    Raises:
        UnsupportedError: the tokenizer has no such tokens, so the model never saw a gap.
    """
    if tokenizer.fim is None:
        raise UnsupportedError(
            "this model was not trained to fill gaps: its tokenizer has no tokens for it",
            fix="train one with train.objective.fim, or continue the text without --infill",
        )
    begin, hole, end = tokenizer.fim
    bos = [] if tokenizer.special.bos is None else [tokenizer.special.bos]
    return [*bos, begin, *tokenizer.encode(prefix), hole, *tokenizer.encode(suffix), end]
