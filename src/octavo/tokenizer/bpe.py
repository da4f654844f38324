"""BPE written plainly: the training loop and the encoder, one visible step at a time.

The twin of the `tokenizers` library's `BpeTrainer` and `BPE` model. Training merges the most frequent adjacent
pair; among equally frequent pairs the one whose two ids are smallest, in that order (ids: letters by code point
first, then each merge as it is made). Source: Sennrich et al. 2016, algorithm 1; Gage 1994.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]


@dataclass(frozen=True)
class MergeStep:
    """One round of training.

    ``pair`` was merged into ``token`` because it occurred ``count`` times; ``ties`` are the other pairs as
    frequent; ``words`` is the text after the merge, as (symbols, times the word occurs).
    """

    pair: Pair
    token: str
    count: int
    ties: tuple[Pair, ...]
    words: tuple[tuple[tuple[str, ...], int], ...]


def pair_counts(words: Iterable[tuple[Sequence[str], int]]) -> Counter[Pair]:
    """How often each two symbols stand side by side, in words given with their frequencies."""
    counts: Counter[Pair] = Counter()
    for symbols, times in words:
        for pair in zip(symbols, symbols[1:], strict=False):
            counts[pair] += times
    return counts


def merge(symbols: Sequence[str], pair: Pair) -> tuple[str, ...]:
    """``symbols`` with every occurrence of ``pair`` joined, from left to right."""
    out: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return tuple(out)


def train_steps(
    words: Mapping[str, int], n_merges: int, *, min_frequency: int = 1, alphabet: Iterable[str] = ()
) -> Iterator[MergeStep]:
    """Train on ``words`` (each with its frequency), yielding every merge.

    Args:
        n_merges: at most this many; fewer if no pair is as frequent as ``min_frequency``.
        alphabet: further letters that have an id though the text does not contain them.
    """
    text = [(tuple(word), times) for word, times in words.items()]
    ids = {char: i for i, char in enumerate(sorted({char for word in words for char in word} | set(alphabet)))}
    for _ in range(n_merges):
        counts = pair_counts(text)
        if not counts:
            return
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        if counts[best] < min_frequency:
            return
        token = best[0] + best[1]
        ids.setdefault(token, len(ids))
        text = [(merge(symbols, best), times) for symbols, times in text]
        ties = tuple(pair for pair in counts if counts[pair] == counts[best] and pair != best)
        yield MergeStep(best, token, counts[best], ties, tuple(text))


def encode_steps(word: str, merges: Sequence[Pair]) -> Iterator[tuple[str, ...]]:
    """The symbols of ``word`` from single characters on, after each merge: always the earliest learnt, leftmost."""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    symbols = tuple(word)
    yield symbols
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in ranks]
        if not found:
            return
        _, i = min(found)
        symbols = (*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :])
        yield symbols


def encode(word: str, merges: Sequence[Pair]) -> tuple[str, ...]:
    """The pieces of ``word`` (the last of :func:`encode_steps`)."""
    *_, symbols = encode_steps(word, merges)
    return symbols
