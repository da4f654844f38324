"""How near written texts are to the ones they should be: equal, or by the n-grams of letters they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from octavo.errors import DataError
from octavo.eval.answers import normalise, wilson

ORDERS = 6  # of chrF's n-grams
BETA = 2.0  # a letter left out costs as much as this many squared too many


def chrf(given: Sequence[str], wanted: Sequence[str]) -> float:
    """chrF of a corpus, between 0 and 1: the F score of shared character n-grams, n = 1 to 6, spaces left out.

    Precision and recall are means over the orders for which both sides have any n-gram, from counts of the whole
    corpus; recall counts twice as much as precision. Source: Popovic 2015, section 2, with beta = 2 (chrF2).
    """
    shared, ours, theirs = ([0] * ORDERS for _ in range(3))
    for one, other in zip(given, wanted, strict=True):
        letters = "".join(one.split()), "".join(other.split())
        for n in range(1, ORDERS + 1):
            a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in letters)
            shared[n - 1] += sum((a & b).values())
            ours[n - 1] += sum(a.values())
            theirs[n - 1] += sum(b.values())
    orders = [n for n in range(ORDERS) if ours[n] and theirs[n]]
    if not orders:
        return 0.0
    precision = sum(shared[n] / ours[n] for n in orders) / len(orders)
    recall = sum(shared[n] / theirs[n] for n in orders) / len(orders)
    total = BETA**2 * precision + recall
    return (1 + BETA**2) * precision * recall / total if total else 0.0


def overlap(given: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """``exact_match`` with its 95 % interval, compared as answers are (``eval.answers.normalise``), and ``chrf``.

    Raises:
        DataError: no text.
    """
    if not wanted:
        raise DataError("there is nothing to compare", fix="hold out some pairs")
    right = sum(normalise(a) == normalise(b) for a, b in zip(given, wanted, strict=True))
    return {
        "pairs": len(wanted),
        "right": right,
        "exact_match": right / len(wanted),
        "interval_95": list(wilson(right, len(wanted))),
        "chrf": chrf(given, wanted),
    }
