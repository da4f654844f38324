"""One text or two between their special tokens, as encoders were trained to read them: ``[CLS] a [SEP] b [SEP]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.tokenizer.core import Tokenizer


def frame(
    tokenizer: Tokenizer, first: Sequence[int], second: Sequence[int] | None = None, *, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Ids of a text or a pair with what stands before, between and after, and the type of each: 0, then 1.

    Args:
        tokenizer: its cls and sep, or where it has none bos and eos, are what stands around.
        first, second: ids without special tokens.
        max_tokens: the longer text loses its end, a token at a time, until all of it fits.
    """
    special = tokenizer.special
    before = [] if special.first is None else [special.first]
    after = [] if special.last is None else [special.last]
    between = after * separators(tokenizer)
    a, b = list(first), list(second or ())
    room = max_tokens - len(before) - len(after) - (len(between) if second is not None else 0) if max_tokens else None
    if room is not None and len(a) + len(b) > room:
        over, longer = len(a) + len(b) - room, abs(len(a) - len(b))
        level = min(over, longer)  # what the longer one loses alone; the rest both lose, the second first
        both = over - level
        cut_a = both // 2 + (level if len(a) >= len(b) else 0)
        a, b = a[: max(0, len(a) - cut_a)], b[: max(0, len(b) - (over - cut_a))]
    if second is None:
        ids = [*before, *a, *after]
        return ids, [0] * len(ids)
    head = [*before, *a, *between]
    tail = [*b, *after]
    # Of two separators in the middle (RoBERTa) both belong to the first text: its models have one type.
    return [*head, *tail], [0] * len(head) + [1] * len(tail)


def separators(tokenizer: Tokenizer) -> int:
    """How many separators stand between two texts, as the tokenizer's own file says: RoBERTa has two."""
    said: Mapping[str, Any] = tokenizer.post_processor
    if said.get("type") == "RobertaProcessing":
        return 2
    parts = said.get("pair") if said.get("type") == "TemplateProcessing" else None
    if not isinstance(parts, list) or tokenizer.special.sep is None:
        return 1
    names = [next(iter(part)) if isinstance(part, Mapping) and part else "" for part in parts]
    places = [i for i, name in enumerate(names) if name == "Sequence"]
    return max(1, places[1] - places[0] - 1) if len(places) == 2 else 1
