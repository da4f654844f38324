"""Counts of all n-grams up to an order, vectorised, in memory or within a given bound.

A document is the stream ``[bos] tokens [eos]``. Its first token is context only and is never predicted; a
context never reaches into the document before. Each seen n-gram gets an integer id, and the n-gram one token
longer is the pair (id of its first n-1 tokens, last token), so counting is one sort per order and a query is
one binary search per order: no Python per token.

Within a bound the text is sorted piece by piece; each piece leaves a sorted run of distinct n-grams in a file, the
runs are merged, and an n-gram's id is its rank in the merged file. Both ways give the same arrays to the bit.

Source: the id of an n-gram as a pair is the trie of Heafield 2011, "KenLM", section 3.2; sorted runs: Heafield et al.
2013, "Scalable modified Kneser-Ney language model estimation", section 3.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import ConfigError, DataError
from octavo.ngrams.scratch import Growing, Scratch

if TYPE_CHECKING:
    from octavo.ngrams.model import NGram

Documents = Iterable["np.ndarray | Sequence[int]"]

LONGEST_ORDER = 255
SORT_BYTES = 96  # allocated per token while a piece is sorted
MERGE_BYTES = 64


@dataclass(slots=True)
class Level:
    """All seen n-grams of one order k, in ascending order of ``keys``; the index is the n-gram's id.

    Attributes:
        keys: (n,) int64, ``id of the first k-1 tokens * vocab_size + last token`` (order 1: the token id).
        suffix: (n,) int32, id at order k-1 of the n-gram without its first token (order 1: 0).
        raw: (n,) int32, how often it occurs as context and target (order 1: as target).
    """

    keys: np.ndarray
    suffix: np.ndarray
    raw: np.ndarray


def flatten(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
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
        vocab_size: ids are 0..vocab_size-1.
        max_order: the longest n-gram counted.
        scratch: where arrays go, and what may be allocated.

    Raises:
        DataError: nothing to predict, or an id outside the vocabulary.

    Numerics: without a bound, memory is about 16 bytes per distinct n-gram plus 96 bytes per token while counting.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        vocab_size: int,
        max_order: int,
        scratch: Scratch | None = None,
    ):
        scratch = scratch or Scratch()
        text = TokenStream(scratch)
        step = scratch.block(32, max(len(tokens), len(offsets)))
        starts = np.asarray(offsets)
        if starts[-1] != len(tokens):
            raise DataError(f"offsets end at {starts[-1]} of {len(tokens)} tokens", fix="end them at the last token")
        for first in range(0, len(tokens), step):
            inside = starts[np.searchsorted(starts, first) : np.searchsorted(starts, first + step)]
            text.append(np.asarray(tokens[first : first + step]), inside - first)
        self._count(text, vocab_size, max_order)

    @classmethod
    def of(
        cls,
        documents: Documents,
        vocab_size: int,
        max_order: int,
        *,
        memory_bytes: int | None = None,
        scratch_folder: str | os.PathLike[str] | None = None,
    ) -> NGramCounts:
        """Counts of an iterable of documents, each ``[bos] tokens [eos]``, read once.

        Args:
            memory_bytes: what may be allocated; the rest lies in files. None for no bound.
            scratch_folder: where those files go; the system's folder for temporary files by default.
        """
        text = TokenStream(Scratch(memory_bytes, scratch_folder))
        piece: list[np.ndarray] = []
        n_piece, enough = 0, text.scratch.block(256, 1 << 22)
        for document in documents:
            array = np.asarray(document, np.int32)
            piece.append(array)
            n_piece += len(array) + 1
            if n_piece >= enough:
                text.append_documents(piece)
                piece, n_piece = [], 0
        text.append_documents(piece)
        return cls.from_stream(text, vocab_size, max_order)

    @classmethod
    def from_stream(cls, text: TokenStream, vocab_size: int, max_order: int) -> NGramCounts:
        """Counts of a text written piece by piece."""
        counts = cls.__new__(cls)
        counts._count(text, vocab_size, max_order)
        return counts

    def _count(self, text: TokenStream, vocab_size: int, max_order: int) -> None:
        if not 1 <= max_order <= LONGEST_ORDER:
            raise ConfigError(
                f"n-gram order = {max_order} must be at least 1 and at most {LONGEST_ORDER}",
                fix="use an order of 1 to 7",
            )
        tokens, place = text.arrays()
        self.scratch, self.vocab_size, self.max_order = text.scratch, vocab_size, max_order
        raw, self.n_tokens = self._unigrams(tokens, place)
        ids = tokens if self.scratch.bounded else tokens.copy()
        if self.scratch.bounded:
            ids = self.scratch.empty(len(tokens), np.int32)
            for a, b in self._pieces(len(tokens)):
                ids[a:b] = tokens[a:b]
        self.levels = [Level(np.arange(vocab_size, dtype=np.int64), np.zeros(vocab_size, np.int32), raw)]
        for order in range(2, max_order + 1):
            self.levels.append(self._count_order(order, tokens, place, ids))

    def _pieces(self, n: int, bytes_each: int = SORT_BYTES) -> Iterator[tuple[int, int]]:
        step = self.scratch.block(bytes_each, n)
        for first in range(0, n, step):
            yield first, min(n, first + step)

    def _unigrams(self, tokens: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, int]:
        V, total = self.vocab_size, 0
        raw = np.zeros(V, np.int64)
        for a, b in self._pieces(len(tokens)):
            if tokens[a:b].min() < 0 or tokens[a:b].max() >= V:
                raise DataError(
                    f"token id {int(tokens[a:b].max())} lies outside the vocabulary of {V}",
                    fix="count with the tokenizer that wrote the shards",
                )
            raw += np.bincount(tokens[a:b][place[a:b] > 0], minlength=V)
            total += int(np.count_nonzero(place[a:b]))
        if not total:
            raise DataError("an n-gram model needs at least one document of two tokens", fix="give it training text")
        return raw.astype(np.int32), total

    def _count_order(self, order: int, tokens: np.ndarray, place: np.ndarray, ids: np.ndarray) -> Level:
        """Number the n-grams of ``order``; on entry ``ids`` are those of order - 1, on return those of ``order``."""
        pieces = list(self._pieces(len(tokens)))
        if len(pieces) <= 1:
            at = np.flatnonzero(place >= order - 1)
            keys, own, first, raw = number(ids[at - 1].astype(np.int64) * self.vocab_size + tokens[at])
            suffix = ids[at[first]]
            ids[at] = own
            return Level(keys, suffix, raw)
        runs = [self.scratch.growing(kind) for kind in (np.int64, np.int32, np.int32)]
        ranks = self.scratch.growing(np.int32)
        edges = [0]
        for a, b in pieces:
            at = a + np.flatnonzero(place[a:b] >= order - 1)
            keys, own, first, raw = number(ids[at - 1].astype(np.int64) * self.vocab_size + tokens[at])
            for run, part in zip(runs, (keys, ids[at[first]], raw)):
                run.append(part)
            ranks.append(own)
            edges.append(edges[-1] + len(keys))
        run_keys, run_suffix, run_raw = (run.array() for run in runs)
        level = merge(run_keys, run_suffix, run_raw, edges, self.scratch)
        rank, n_seen = ranks.array(), 0
        for (a, b), first, last in zip(pieces, edges[:-1], edges[1:]):
            at = a + np.flatnonzero(place[a:b] >= order - 1)
            # A run is sorted like the level, so this reads the level once from its beginning to its end.
            known = np.searchsorted(level.keys, run_keys[first:last]).astype(np.int32)
            ids[at] = known[rank[n_seen : n_seen + len(at)]]
            n_seen += len(at)
        return level

    def model(self, order: int, smoothing: Any, **settings: Any) -> NGram:
        """The model of ``order`` (1..max_order) with ``smoothing`` (a kind, or a mapping with its settings)."""
        from octavo.ngrams.model import NGram  # it stands above counts

        if not 1 <= order <= self.max_order:
            raise ConfigError(f"n-gram order = {order} must lie in 1..{self.max_order}", fix="count a higher order")
        return NGram.of_counts(NGram.Config(order=order, smoothing=smoothing, **settings), self)

    def adjusted(self, order: int) -> np.ndarray:
        """(n,) int32: distinct tokens before each n-gram; the raw count where there is none (it begins a document).

        At ``max_order`` nothing longer was counted, and the raw counts are returned.
        """
        if order == self.max_order:
            return self.levels[order - 1].raw
        return self._adjusted[order - 1]

    @cached_property
    def _adjusted(self) -> list[np.ndarray]:
        return [self._distinct(order) for order in range(1, self.max_order)]

    def _distinct(self, order: int) -> np.ndarray:
        raw, above = self.levels[order - 1].raw, self.levels[order].suffix
        n = len(raw)
        if not self.scratch.bounded:
            distinct = np.bincount(above, minlength=n).astype(np.int32)
            return np.where(distinct > 0, distinct, raw)
        adjusted = self.scratch.zeros(n, np.int32)
        for a, b in self._pieces(len(above), 48):
            ids, times = np.unique(above[a:b], return_counts=True)
            adjusted[ids] += times.astype(np.int32)
        for a, b in self._pieces(n, 16):
            part = adjusted[a:b]
            np.copyto(part, raw[a:b], where=part == 0)
        return adjusted


class TokenStream:
    """Documents on their way into counts: their tokens, and each token's place in its document (255 at most)."""

    def __init__(self, scratch: Scratch | None = None):
        self.scratch = scratch or Scratch()
        self.tokens: Growing = self.scratch.growing(np.int32)
        self.place: Growing = self.scratch.growing(np.uint8)
        self.last_place = -1

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Add tokens; ``starts`` are the indices in them at which a document begins, ascending."""
        if len(tokens) == 0:
            return
        at = np.arange(len(tokens))
        begin = np.zeros(len(tokens), np.int64)
        begin[starts[starts < len(tokens)]] = starts[starts < len(tokens)]
        first = int(starts[0]) if len(starts) else len(tokens)
        place = at - np.maximum.accumulate(begin)
        place[:first] = at[:first] + self.last_place + 1  # the end of a document begun before
        self.last_place = int(place[-1])
        self.tokens.append(tokens)
        self.place.append(np.minimum(place, LONGEST_ORDER))

    def append_documents(self, documents: Sequence[np.ndarray]) -> None:
        tokens, offsets = flatten(documents)
        self.append(tokens, offsets[:-1])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens.array(), self.place.array()


def number(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ``keys`` ascending, the id of each given key, one index of each distinct key, and its count."""
    order = np.argsort(keys)
    ascending = keys[order]
    starts = np.flatnonzero(np.diff(ascending, prepend=-1))
    ids = np.empty(len(keys), np.int32)
    counts = np.diff(starts, append=len(keys)).astype(np.int32)
    ids[order] = np.repeat(np.arange(len(starts), dtype=np.int32), counts)
    return ascending[starts], ids, order[starts], counts


def merge(keys: np.ndarray, suffix: np.ndarray, raw: np.ndarray, edges: Sequence[int], scratch: Scratch) -> Level:
    """One level of several sorted runs, which stand one after the other in the arrays, from edge to edge."""
    at, ends = list(edges[:-1]), list(edges[1:])
    step = max(1, scratch.block(MERGE_BYTES, len(keys)) // len(at))
    merged = [scratch.growing(kind) for kind in (np.int64, np.int32, np.int32)]
    while any(a < end for a, end in zip(at, ends)):
        # Up to the least of the last keys in sight every run is known, so that much can be put in order.
        bound = min((keys[a + step - 1] for a, end in zip(at, ends) if a + step < end), default=None)
        taken = []
        for run, (a, end) in enumerate(zip(at, ends)):
            stop = min(a + step, end)
            stop = stop if bound is None else a + int(np.searchsorted(keys[a:stop], bound, side="right"))
            taken.append(slice(a, stop))
            at[run] = stop
        together = np.concatenate([keys[part] for part in taken])
        order = np.argsort(together, kind="stable")  # timsort: runs that are sorted already are merged
        together = together[order]
        starts = np.flatnonzero(np.diff(together, prepend=-1))
        merged[0].append(together[starts])
        merged[1].append(np.concatenate([suffix[part] for part in taken])[order[starts]])
        merged[2].append(np.add.reduceat(np.concatenate([raw[part] for part in taken])[order], starts))
    return Level(*(part.array() for part in merged))
