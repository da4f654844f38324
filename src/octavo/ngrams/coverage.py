"""How much of a new text a table of n-grams knows, against n: why longer n-grams need more text than there is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from octavo.ngrams.counting import NGramCounts, places


@dataclass(frozen=True, slots=True)
class Coverage:
    """One order: n-grams of the new text, and how many of them the counted text has.

    Attributes:
        n, seen: occurrences.
        distinct, distinct_seen: different n-grams.
        contexts_seen: occurrences whose first n-1 tokens the counted text has with something after them.
    """

    order: int
    n: int
    seen: int
    distinct: int
    distinct_seen: int
    contexts_seen: int

    @property
    def share(self) -> float:
        return self.seen / self.n if self.n else 0.0


def coverage(counts: NGramCounts, tokens: np.ndarray, offsets: np.ndarray) -> list[Coverage]:
    """For every order counted: how many n-grams of the documents (each ``[bos] tokens [eos]``) were counted too."""
    V, place = counts.vocab_size, places(offsets)
    target = np.flatnonzero(place > 0)
    known = counts.levels[0].raw[tokens] > 0
    ids = tokens.astype(np.int64)
    own = ids.copy()  # numbers the n-grams of the new text by themselves
    found = [_row(1, own[target], known[target], np.ones(len(target), bool))]
    for order in range(2, counts.max_order + 1):
        level = counts.levels[order - 1]
        at = np.flatnonzero(place >= order - 1)
        context, follows = ids[at - 1], tokens[at].astype(np.int64)
        keys = context * V + follows
        here = np.full(len(at), -1)
        continued = np.zeros(len(at), bool)
        if len(level.keys):
            index = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
            here = np.where((context >= 0) & (level.keys[index] == keys), index, -1)
            first = np.minimum(np.searchsorted(level.keys, context * V), len(level.keys) - 1)
            continued = (context >= 0) & (level.keys[first] // V == context)
        own[at] = np.unique(own[at - 1] * V + follows, return_inverse=True)[1]
        found.append(_row(order, own[at], here >= 0, continued))
        ids = np.full(len(tokens), -1)
        ids[at] = here
    return found


def _row(order: int, own: np.ndarray, seen: np.ndarray, continued: np.ndarray) -> Coverage:
    return Coverage(
        order,
        len(own),
        int(seen.sum()),
        len(np.unique(own)),
        len(np.unique(own[seen])),
        int(continued.sum()),
    )
