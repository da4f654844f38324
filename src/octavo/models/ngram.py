"""Interpolated Kneser-Ney n-gram models over token ids: the baseline every neural model is measured against.

A document is the stream ``[bos] tokens [eos]``. Its first token is context only and is never predicted; a
context never reaches into the document before. Each seen n-gram gets an integer id, and the n-gram one token
longer is the pair (id of its first n-1 tokens, last token), so counting is one sort per order and a query is
one binary search per order: no Python per token.

Source: Kneser & Ney 1995, "Improved backing-off for m-gram language modeling"; interpolated and modified
forms: Chen & Goodman 1998, "An empirical study of smoothing techniques", sections 2.7 and 3. With a(h w) the
adjusted count, D the discount and h' the context without its first token::

    p_k(w | h) = max(a(h w) - D, 0) / a(h .) + gamma(h) p_{k-1}(w | h'),   gamma(h) = sum_w D / a(h .)

The adjusted count is the raw count at the highest order and the number of distinct preceding tokens below it;
an n-gram that begins a document has nothing before it and keeps its raw count (as in KenLM). The recursion
ends in the uniform distribution over the whole vocabulary, so every token has mass and the sum is 1.

Differs from ``nltk.lm.KneserNeyInterpolated``: there the discount is one constant (0.1) for every order and
must be given, the unigram level is neither discounted nor mixed with the uniform distribution (an unseen token
has probability 0), and lower-order n-grams that begin a document have continuation count 0. With
``discounts=(0, d, ..., d)`` both agree on every full context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from octavo.errors import ConfigError, DataError
from octavo.schema import Config


@dataclass(frozen=True, slots=True)
class Level:
    """All seen n-grams of one order k, in ascending order of ``keys``; the index is the n-gram's id.

    Attributes:
        keys: (n,) int64, ``id of the first k-1 tokens * vocab_size + last token`` (order 1: the token id).
        suffix: (n,) int32, id at order k-1 of the n-gram without its first token (order 1: 0).
        raw: (n,) int32, how often it occurs as context and target (order 1: as target).
        continuation: (n,) int32, adjusted count below the highest order (at the top, the raw one).
    """

    keys: np.ndarray
    suffix: np.ndarray
    raw: np.ndarray
    continuation: np.ndarray


@dataclass(frozen=True, slots=True)
class Smoothed:
    """One order of a model: interpolated probabilities of seen n-grams, and what a context passes down.

    Attributes:
        prob: (n,) float64, p_k(last token | the tokens before it), lower orders mixed in.
        gamma: (contexts,) float64, weight of order k-1 after this context (1 after one never continued).
        best, best_prob: (contexts,) the most probable next token after each context and its probability.
        discounts: D for adjusted counts 1, 2 and 3 or more.
    """

    prob: np.ndarray
    gamma: np.ndarray
    best: np.ndarray
    best_prob: np.ndarray
    discounts: tuple[float, float, float]


def flatten(documents: Iterable[np.ndarray | Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Documents -> (tokens (N,) int32, offsets (documents + 1,) int64)."""
    arrays = [np.asarray(document, dtype=np.int32) for document in documents]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return (np.concatenate(arrays) if arrays else np.zeros(0, np.int32)), offsets


def places(offsets: np.ndarray) -> np.ndarray:
    """(N,) position of every token in its own document, from 0."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


class NGramCounts:
    """Counts of all n-grams up to ``max_order``, from which a model of any order up to it is made.

    Args:
        tokens: (N,) token ids of all documents, one after the other, each ``[bos] tokens [eos]``.
        offsets: (documents + 1,) where each document starts in ``tokens``; the last entry is N.
        vocab_size: ids are 0..vocab_size-1; the size of the uniform distribution at the bottom.
        max_order: the longest n-gram counted.

    Raises:
        DataError: nothing to predict, or an id outside the vocabulary.

    Numerics: memory is about 16 bytes per distinct n-gram plus 60 bytes per token while counting.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int, max_order: int):
        if max_order < 1:
            raise ConfigError(f"n-gram order = {max_order} must be at least 1", fix="use an order of 1 to 7")
        place = places(offsets)
        if not np.any(place > 0):
            raise DataError("an n-gram model needs at least one document of two tokens", fix="give it training text")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise DataError(
                f"token id {int(tokens.max())} lies outside the vocabulary of {vocab_size}",
                fix="count with the tokenizer that wrote the shards",
            )
        self.vocab_size, self.max_order = vocab_size, max_order
        self.n_tokens = int(np.count_nonzero(place))
        ids = tokens.astype(np.int32)
        raw = np.bincount(tokens[place > 0], minlength=vocab_size).astype(np.int32)
        keys, suffix = np.arange(vocab_size, dtype=np.int64), np.zeros(vocab_size, np.int32)
        self.levels: list[Level] = []
        for order in range(2, max_order + 1):
            at = np.flatnonzero(place >= order - 1)
            new_keys, new_ids, first, new_raw = _number(ids[at - 1].astype(np.int64) * vocab_size + tokens[at])
            new_suffix = ids[at[first]]
            self.levels.append(Level(keys, suffix, raw, _continuation(raw, new_suffix)))
            keys, suffix, raw = new_keys, new_suffix, new_raw
            ids[at] = new_ids
        self.levels.append(Level(keys, suffix, raw, raw))
        self._lower: dict[bool, list[Smoothed]] = {False: [], True: []}

    @classmethod
    def of(cls, documents: Iterable[np.ndarray | Sequence[int]], vocab_size: int, max_order: int) -> NGramCounts:
        """Counts of an iterable of documents, each ``[bos] tokens [eos]``."""
        return cls(*flatten(documents), vocab_size=vocab_size, max_order=max_order)

    def model(self, order: int, *, modified: bool = False, discounts: Sequence[float] | None = None) -> KneserNey:
        """The Kneser-Ney model of ``order``; levels below the top are kept and shared between orders.

        Args:
            order: 1..max_order.
            modified: three discounts per order (adjusted counts 1, 2, 3 or more) in place of one.
            discounts: (order,) one given discount per order in place of the estimated ones.
        """
        if not 1 <= order <= self.max_order:
            raise ConfigError(f"n-gram order = {order} must lie in 1..{self.max_order}", fix="count a higher order")
        lower = self._lower[modified] if discounts is None else []
        for k in range(len(lower) + 1, order):
            given = None if discounts is None else discounts[k - 1]
            lower.append(self._smooth(k, self.levels[k - 1].continuation, lower, modified, given))
        given = None if discounts is None else discounts[order - 1]
        top = self._smooth(order, self.levels[order - 1].raw, lower[: order - 1], modified, given)
        return KneserNey(self, [*lower[: order - 1], top], modified)

    def _smooth(
        self, order: int, counts: np.ndarray, lower: list[Smoothed], modified: bool, given: float | None
    ) -> Smoothed:
        level = self.levels[order - 1]
        discounts = (given, given, given) if given is not None else estimate_discounts(counts, modified)
        discount = np.array([0.0, *discounts])[np.minimum(counts, 3)]
        if order == 1:
            total = counts.sum()
            gamma = discount.sum() / total
            prob = np.maximum(counts - discount, 0) / total + gamma / self.vocab_size
            best = int(prob.argmax())
            return Smoothed(prob, np.array([gamma]), np.array([best], np.int32), prob[[best]], discounts)
        below = lower[order - 2]
        context = level.keys // self.vocab_size
        n_contexts = len(self.levels[order - 2].keys)
        shorter = self.levels[order - 2].suffix
        if not len(context):  # every document is shorter than this order
            best, best_prob = below.best[shorter], below.best_prob[shorter]
            return Smoothed(np.zeros(0), np.ones(n_contexts), best, best_prob, discounts)
        total = np.bincount(context, weights=counts, minlength=n_contexts)
        continued = total > 0
        gamma = np.bincount(context, weights=discount, minlength=n_contexts)
        np.divide(gamma, total, out=gamma, where=continued)
        gamma[~continued] = 1.0
        prob = np.maximum(counts - discount, 0) / total[context] + gamma[context] * below.prob[level.suffix]
        # The best token after h is its best seen continuation or the best token after h': any other unseen one
        # has gamma(h) p(w | h'), and that is largest for the latter.
        best, best_prob = below.best[shorter], gamma * below.best_prob[shorter]
        starts = np.flatnonzero(np.diff(context, prepend=-1))
        peak = np.maximum.reduceat(prob, starts)
        at_peak = np.flatnonzero(prob == np.repeat(peak, np.diff(starts, append=len(prob))))[::-1]
        winner = np.zeros(n_contexts, np.int32)
        winner[context[at_peak]] = level.keys[at_peak] % self.vocab_size
        seen = context[starts]
        wins = peak >= best_prob[seen]
        best[seen[wins]], best_prob[seen[wins]] = winner[seen[wins]], peak[wins]
        return Smoothed(prob, gamma, best, best_prob, discounts)


class KneserNey:
    """An interpolated Kneser-Ney model: made by ``NGramCounts.model`` or ``KneserNey.fit``."""

    class Config(Config):
        """Settings of an n-gram model."""

        kind: Literal["kneser_ney"] = "kneser_ney"
        order: int = Field(
            default=5, ge=1, le=16, description="Length of the longest n-gram, the predicted token included."
        )
        modified: bool = Field(default=False, description="Three discounts per order (Chen & Goodman) in place of one.")

    def __init__(self, counts: NGramCounts, levels: list[Smoothed], modified: bool):
        self.counts, self.levels, self.modified = counts, levels, modified
        self.order, self.vocab_size = len(levels), counts.vocab_size

    @classmethod
    def fit(cls, config: KneserNey.Config, documents: Iterable[np.ndarray], vocab_size: int) -> KneserNey:
        """Count ``documents`` (each ``[bos] tokens [eos]``) and smooth."""
        return NGramCounts.of(documents, vocab_size, config.order).model(config.order, modified=config.modified)

    @property
    def discounts(self) -> list[tuple[float, float, float]]:
        """Per order 1..order: the discounts of adjusted counts 1, 2 and 3 or more."""
        return [level.discounts for level in self.levels]

    def log_probs(self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None = None) -> np.ndarray:
        """ln p(token | the tokens before it in its document), one value per token but a document's first.

        Args:
            tokens: (T,) one document ``[bos] tokens [eos]``, or several with ``offsets`` (documents + 1,).

        Returns:
            (T - documents,) float64, in nats.
        """
        return self.score(tokens, offsets)[0]

    def score(
        self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``log_probs``, with a second array (T - documents,) bool: was the token the most probable one?"""
        tokens = np.asarray(tokens, np.int64)
        place = np.arange(len(tokens)) if offsets is None else places(offsets)
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}", fix="encode it anew")
        prob = self.levels[0].prob[tokens]
        best = np.full(len(tokens), self.levels[0].best[0])
        ids = tokens.copy()
        for order in range(2, self.order + 1):
            at = np.flatnonzero((place >= order - 1) & (np.roll(ids, 1) >= 0))
            level = self.levels[order - 1]
            if not len(level.prob):
                break
            context = ids[at - 1]
            found = self._find(order, context * self.vocab_size + tokens[at])
            prob[at] = np.where(found >= 0, level.prob[found], level.gamma[context] * prob[at])
            best[at] = level.best[context]
            ids = np.full(len(tokens), -1)
            ids[at] = found
        target = place > 0
        return np.log(prob[target]), (best == tokens)[target]

    def next_log_probs(self, context: np.ndarray | Sequence[int]) -> np.ndarray:
        """(V,) float64: ln p(w | context) for every token w; ``context`` starts with bos at a document's start."""
        history = [int(token) for token in context][max(0, len(context) - self.order + 1) :]
        prob = self.levels[0].prob.copy()
        for order in range(2, len(history) + 2):
            found = history[-(order - 1)]
            for k, token in enumerate(history[len(history) - order + 2 :], start=2):
                found = int(self._find(k, np.array([found * self.vocab_size + token]))[0])
                if found < 0:
                    return np.log(prob)
            level, keys = self.levels[order - 1], self.counts.levels[order - 1].keys
            start, stop = np.searchsorted(keys, [found * self.vocab_size, (found + 1) * self.vocab_size])
            prob *= level.gamma[found]
            prob[keys[start:stop] % self.vocab_size] = level.prob[start:stop]
        return np.log(prob)

    def _find(self, order: int, keys: np.ndarray) -> np.ndarray:
        """(n,) ids of n-grams of ``order`` by key, -1 where never seen."""
        known = self.counts.levels[order - 1].keys
        if not len(known):  # every document is shorter than this order
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[at] == keys, at, -1)


def estimate_discounts(counts: np.ndarray, modified: bool) -> tuple[float, float, float]:
    """Discounts from the counts of counts n1..n4: D = n1 / (n1 + 2 n2), or Chen & Goodman's three.

    Too little text leaves some of them undefined or outside (0, c]; then 0.5 is used, or 0.5, 1 and 1.5.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    if not modified:
        d = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
        return d, d, d
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        three = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 < d <= c for c, d in enumerate(three, start=1)):
            return three
    return 0.5, 1.0, 1.5


def _number(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ``keys`` ascending, the id of each given key, one index of each distinct key, and its count."""
    order = np.argsort(keys)
    ascending = keys[order]
    starts = np.flatnonzero(np.diff(ascending, prepend=-1))
    ids = np.empty(len(keys), np.int32)
    counts = np.diff(starts, append=len(keys)).astype(np.int32)
    ids[order] = np.repeat(np.arange(len(starts), dtype=np.int32), counts)
    return ascending[starts], ids, order[starts], counts


def _continuation(raw: np.ndarray, suffix_above: np.ndarray) -> np.ndarray:
    """Distinct preceding tokens of each n-gram; the raw count where there is none (it begins a document)."""
    distinct = np.bincount(suffix_above, minlength=len(raw)).astype(np.int32)
    return np.where(distinct > 0, distinct, raw)
