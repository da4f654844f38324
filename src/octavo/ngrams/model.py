"""An n-gram model of any order and smoothing: what scores text and gives the distribution of the next token.

The model is a sorted table per order. A query walks up the orders: an n-gram's key is made of the id of its first
tokens and its last token, so the id found for one position is what the next position's longer n-gram is looked up
with. Everything is done for all positions at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from octavo.errors import ConfigError, DataError
from octavo.ngrams import storage
from octavo.ngrams.backing_off import SMOOTHINGS, SmoothingConfig
from octavo.ngrams.counting import Documents, NGramCounts, flatten, places
from octavo.ngrams.estimate import estimate, find_best
from octavo.ngrams.smoothing import Outcomes, Smoothed, Smoothing
from octavo.schema import Config, component

DENSE_BYTES = 64 << 20


class NGram:
    """``p(w | the order - 1 tokens before it)``: an n-gram model over token ids.

    Args (of ``NGram.fit``; the constructor takes tables that are ready):
        config: order, smoothing, what is never predicted.
        documents: arrays ``[bos] tokens [eos]``; a document's first token is given, never predicted.
        vocab_size: ids are 0..vocab_size-1.
        held_out: documents on which ``interpolated`` learns its weights.

    Attributes:
        order, vocab_size: what they say.
        normalised: whether probabilities sum to 1 (all smoothings but stupid back-off).
        keys: per order, (n,) int64 ascending: ``id of the first tokens * vocab_size + last token``.
        levels: per order, the probabilities and weights.
    """

    class Config(Config):
        """Settings of an n-gram model."""

        kind: Literal["ngram"] = "ngram"
        order: int = Field(
            default=5, ge=1, le=16, description="Length of the longest n-gram, the predicted token included."
        )
        smoothing: SmoothingConfig = Field(  # type: ignore[valid-type]
            default="modified_kneser_ney", validate_default=True, description="How counts become probabilities."
        )
        never: int | None = Field(
            default=None, ge=0, description="Id that is only ever given (the begin of a document): it gets no mass."
        )
        memory_bytes: int | None = Field(
            default=None, gt=0, description="What fitting may allocate; the rest lies in files. null: no bound."
        )

    def __init__(
        self,
        config: NGram.Config,
        vocab_size: int,
        keys: Sequence[np.ndarray],
        levels: Sequence[Smoothed],
        said: dict[str, Any] | None = None,
        suffixes: Sequence[np.ndarray] | None = None,
    ):
        self.config, self.vocab_size, self.order = config, vocab_size, len(levels)
        self.keys, self.levels, self.said = list(keys), list(levels), said or {}
        self._suffixes = None if suffixes is None else list(suffixes)
        smoothing = smoothing_of(config)
        self.normalised, self.flat, self.missing = smoothing.normalised, smoothing.flat, smoothing.missing
        self.interpolated = smoothing.interpolated
        self.outcomes = Outcomes.of(vocab_size, config.never)

    @classmethod
    def fit(
        cls,
        config: NGram.Config,
        documents: Documents,
        vocab_size: int,
        held_out: Documents | None = None,
        *,
        scratch_folder: str | os.PathLike[str] | None = None,
    ) -> NGram:
        """Count ``documents`` (each ``[bos] tokens [eos]``, read once) and smooth."""
        counts = NGramCounts.of(
            documents,
            vocab_size,
            config.order,
            memory_bytes=config.memory_bytes,
            scratch_folder=scratch_folder,
        )
        return cls.of_counts(config, counts, held_out)

    @classmethod
    def of_counts(cls, config: NGram.Config, counts: NGramCounts, held_out: Documents | None = None) -> NGram:
        """The model of ``config`` from counts of its order or a higher one."""
        if config.order > counts.max_order:
            raise ConfigError(
                f"n-gram order = {config.order} must lie in 1..{counts.max_order}", fix="count a higher order"
            )
        if config.never is not None and (config.never >= counts.vocab_size or counts.levels[0].raw[config.never]):
            raise DataError(
                f"token {config.never} is never predicted, but stands inside a document or outside the vocabulary",
                fix="put it only at the begin of documents",
            )
        smoothing = smoothing_of(config)
        outcomes = Outcomes.of(counts.vocab_size, config.never)
        smoothing.prepare(counts, config.order, None if held_out is None else flatten(held_out), outcomes)
        levels = estimate(smoothing, counts, config.order, outcomes)
        return cls(
            config,
            counts.vocab_size,
            [level.keys for level in counts.levels[: config.order]],
            levels,
            smoothing.said(),
            [level.suffix for level in counts.levels[: config.order]],
        )

    def suffixes(self) -> list[np.ndarray]:
        """Per order, the id one order below of every n-gram without its first token (order 1: 0)."""
        if self._suffixes is None:
            self._suffixes = [np.zeros(self.vocab_size, np.int32)]
            for k in range(2, self.order + 1):
                context, token = np.divmod(self.keys[k - 1], self.vocab_size)
                shorter = self._suffixes[-1][context].astype(np.int64)
                found = token if k == 2 else self.find(k - 1, shorter * self.vocab_size + token)
                self._suffixes.append(found.astype(np.int32))
        return self._suffixes

    def log_probs(self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None = None) -> np.ndarray:
        """ln p(token | the tokens before it in its document), one value per token but a document's first.

        Args:
            tokens: (T,) one document ``[bos] tokens [eos]``, or several with ``offsets`` (documents + 1,).

        Returns:
            (T - documents,) float64, in nats; -inf where the probability is 0.
        """
        tokens, place = self._given(tokens, offsets)
        prob = self._walk(tokens, place)[0]
        with np.errstate(divide="ignore"):
            return np.log(prob[place > 0])

    def score(
        self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``log_probs``, with a second array (T - documents,) bool: was the token the most probable one?"""
        find_best(self)
        tokens, place = self._given(tokens, offsets)
        prob, best = self._walk(tokens, place, want_best=True)
        target = place > 0
        unknown = np.flatnonzero(target & (best < 0))
        if len(unknown):
            best[unknown] = self._search_best(tokens, place, unknown)
        with np.errstate(divide="ignore"):
            return np.log(prob[target]), (best == tokens)[target]

    def next_log_probs(self, context: np.ndarray | Sequence[int]) -> np.ndarray:
        """(V,) float64: ln p(w | context) for every token w; ``context`` starts with bos at a document's start."""
        return self.next_log_probs_of([context])[0]

    def next_log_probs_of(self, contexts: Sequence[np.ndarray | Sequence[int]]) -> np.ndarray:
        """(contexts, V) float64: ``next_log_probs`` of every context; they may differ in length."""
        with np.errstate(divide="ignore"):
            return np.log(self._next(ends(contexts, self.order - 1)))

    def _next(self, history: np.ndarray) -> np.ndarray:
        """(B, V) probabilities after each row of ``history`` (B, order - 1), right-aligned, -1 where there is none."""
        if history.size and history.max() >= self.vocab_size:
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}", fix="encode it anew")
        prob = np.repeat(self.levels[0].prob[None], len(history), axis=0)
        for length in range(1, history.shape[1] + 1):
            rows = np.flatnonzero(history[:, -length] >= 0)
            if not len(rows):
                break
            if self.flat:
                prob[rows] = self.outcomes.uniform
            found = history[rows, -length].astype(np.int64)
            for k in range(2, length + 1):
                known = found >= 0
                found[known] = self.find(k, found[known] * self.vocab_size + history[rows[known], k - 1 - length])
            if self.missing != 1.0:
                prob[rows[found < 0]] *= self.missing
            rows, found = rows[found >= 0], found[found >= 0]
            level, keys = self.levels[length], self.keys[length]
            prob[rows] *= level.gamma[found][:, None]
            first = np.searchsorted(keys, found * self.vocab_size)
            n = np.searchsorted(keys, (found + 1) * self.vocab_size) - first
            at = np.arange(n.sum()) + np.repeat(first - np.cumsum(n) + n, n)
            prob[np.repeat(rows, n), keys[at] % self.vocab_size] = level.prob[at]
        return prob

    def _given(self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.asarray(tokens, np.int64)
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}", fix="encode it anew")
        return tokens, np.arange(len(tokens)) if offsets is None else places(offsets)

    def _walk(self, tokens: np.ndarray, place: np.ndarray, *, want_best: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Probability of every token, and the most probable token in its place (-1: not known)."""
        prob = self.levels[0].prob[tokens]
        best = np.full(len(tokens), self.levels[0].best[0] if want_best else -1)
        for order, at, context, found in self.walk(tokens, place):
            level = self.levels[order - 1]
            lower = self.outcomes.uniform[tokens[at]] if self.flat else prob[at]
            if not len(level.prob):
                prob[at] = self.missing * lower
                if want_best and self.flat:
                    best[at] = self.outcomes.first
                continue
            known = context >= 0
            weight = np.where(known, level.gamma[context], self.missing)
            prob[at] = np.where(found >= 0, level.prob[found], weight * lower)
            if want_best:
                below = self.outcomes.first if self.flat else best[at]
                best[at] = np.where(known, level.best[context], below)
        return prob, best

    def walk(self, tokens: np.ndarray, place: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """For every order from 2: (order, positions, id of the context, id of the n-gram); ids are -1 if never seen."""
        ids = tokens
        for order in range(2, self.order + 1):
            at = np.flatnonzero(place >= order - 1)
            context = ids[at - 1]
            found = np.full(len(at), -1)
            known = np.flatnonzero(context >= 0)
            found[known] = self.find(order, context[known] * self.vocab_size + tokens[at[known]])
            yield order, at, context, found
            ids = np.full(len(tokens), -1)
            ids[at] = found

    def _search_best(self, tokens: np.ndarray, place: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The most probable token at each of the positions ``at``, from whole distributions."""
        back = np.arange(self.order - 1, 0, -1)
        history = np.where(place[at][:, None] >= back, tokens[at[:, None] - back], -1)
        distinct, which = np.unique(history, axis=0, return_inverse=True)
        step = max(1, DENSE_BYTES // (8 * self.vocab_size))
        found = [self._next(distinct[a : a + step]).argmax(1) for a in range(0, len(distinct), step)]
        return np.concatenate(found)[which.ravel()]

    def find(self, order: int, keys: np.ndarray) -> np.ndarray:
        """(n,) ids of n-grams of ``order`` by key, -1 where never seen."""
        known = self.keys[order - 1]
        if not len(known):  # every document is shorter than this order
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[at] == keys, at, -1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and the tables into ``folder``; what was there stays whole until all is written."""
        find_best(self)
        storage.save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> NGram:
        """A saved model; its tables stay on disk and are mapped.

        Args:
            verify: read every byte once and compare its SHA-256; without it only sizes and headers are checked.

        Raises:
            CheckpointError: missing, damaged or foreign files.
        """
        return storage.load(cls, folder, verify=verify)


def smoothing_of(config: NGram.Config) -> Smoothing:
    return component(SMOOTHINGS, config.smoothing.kind)(config.smoothing)


def ends(contexts: Iterable[np.ndarray | Sequence[int]], length: int) -> np.ndarray:
    """(B, length) the last tokens of every context, right-aligned; -1 where it is shorter."""
    contexts = list(contexts)
    history = np.full((len(contexts), length), -1, np.int64)
    for row, context in enumerate(contexts):
        tail = np.asarray(context, np.int64)[max(0, len(context) - length) :]
        if len(tail) and tail.min() < 0:
            raise DataError("a token id of a context is negative", fix="encode it anew")
        history[row, length - len(tail) :] = tail
    return history
