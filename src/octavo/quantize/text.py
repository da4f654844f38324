"""Rows of calibration text: pieces of equal length from all over it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from octavo.errors import DataError

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

ROW_TOKENS = 512
CHARACTERS = 8
"""More than a token has on average: as many a token are cut out before they are encoded."""


def calibration_rows(
    texts: Iterable[str], tokenizer: Tokenizer, n_tokens: int, row_tokens: int = ROW_TOKENS
) -> list[list[int]]:
    """About ``n_tokens`` tokens in rows of ``row_tokens``, each ``[bos]`` and a piece of the text, at even distances.

    Raises:
        DataError: less text than a single row.
    """
    text = "\n\n".join(texts)
    bos = [] if tokenizer.special.bos is None else [tokenizer.special.bos]
    n_rows, length = max(1, n_tokens // row_tokens), row_tokens * CHARACTERS
    starts = sorted({i * max(0, len(text) - length) // max(1, n_rows - 1) for i in range(n_rows)})
    rows = [[*bos, *tokenizer.encode(text[start : start + length])][:row_tokens] for start in starts]
    if not (rows := [row for row in rows if len(row) == row_tokens]):
        raise DataError(f"the calibration text is shorter than one row of {row_tokens} tokens", fix="give more text")
    return rows
