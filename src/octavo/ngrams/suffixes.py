"""N-grams of any length: a suffix array of the whole text in place of tables, and the longest context that occurs.

The text is kept backwards, each document after a mark, and its suffixes are put in order once. What ends in a given
context then stands together, and one more token to the left narrows the range: the longest end of a context that was
ever followed by something is found by binary searches alone, for all positions of a text at once.

Source: Liu et al. 2024, "Infini-gram: scaling unbounded n-gram language models to a trillion tokens", sections 2 and 3.
Theirs is the array of the text forwards, where a context is searched for anew for every length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from octavo.errors import CheckpointError, DataError
from octavo.ngrams import storage
from octavo.ngrams.counting import Documents, flatten, places
from octavo.ngrams.model import ends
from octavo.schema import Config

MARK = 0
LARGE = 4096
FLAT_ITEMS = 1 << 22


class InfiniGram:
    """``p(w | h) = c(h* w) / c(h*)`` with h* the longest end of h that was ever followed by a token.

    An order without bound, and no smoothing: where h* was never followed by w the probability is 0, unless ``unseen``
    gives a share to single tokens.

    Attributes:
        order: the length of the longest document: no context that occurs is longer.
        normalised: probabilities sum to 1.
        text: (N,) the documents backwards, each id raised by one, after a 0 each.
        array: (N,) where each suffix of ``text`` begins, in ascending order of the suffixes.
        final: where in ``array`` those stand that begin with a document's last token: nothing followed it.
        predicted: (V,) how often each token occurs, as a document's first left out.
    """

    class Config(Config):
        """Settings of an n-gram model of any length."""

        kind: Literal["infinigram"] = "infinigram"
        unseen: float = Field(
            default=0.0,
            ge=0,
            lt=1,
            description="Share of single tokens (their counts raised by one) in a distribution; 0: the paper's model.",
        )
        longest: int | None = Field(default=None, ge=1, description="The longest context looked for; null: any.")

    normalised = True

    def __init__(self, config: InfiniGram.Config, vocab_size: int, order: int, tables: dict[str, np.ndarray]):
        self.config, self.vocab_size, self.order, self.tables = config, vocab_size, order, tables
        self.text, self.array, self.final = tables["text"], tables["array"], tables["final"]
        counts = tables["counts"]
        self.begin = np.concatenate([[0], np.cumsum(counts)])
        self.predicted = counts[1:] - tables["firsts"]
        self.single = (self.predicted + 1) / (self.predicted.sum() + vocab_size)

    @classmethod
    def fit(
        cls, config: InfiniGram.Config, documents: Documents, vocab_size: int, held_out: Documents | None = None
    ) -> InfiniGram:
        """Sort the suffixes of ``documents`` (each ``[bos] tokens [eos]``); ``held_out`` is not needed."""
        tokens, offsets = flatten(documents)
        n = np.diff(offsets)
        tokens, n = tokens.astype(np.int32), n[n > 0]
        if not np.any(n > 1):
            raise DataError("an n-gram model needs at least one document of two tokens", fix="give it training text")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise DataError(
                f"token id {int(tokens.max())} lies outside the vocabulary of {vocab_size}",
                fix="count with the tokenizer that wrote the shards",
            )
        begin = np.cumsum(n) - n
        text = np.zeros(len(tokens) + len(n) + 1, np.int32)
        at = np.arange(len(tokens))
        document = np.repeat(np.arange(len(n)), n)
        text[document + 1 + 2 * begin[document] + n[document] - 1 - at] = tokens + 1
        array = suffix_array(text)
        marks = np.flatnonzero(text == MARK)
        ending = np.zeros(len(text), bool)
        ending[marks[:-1] + 1] = True
        tables = {
            "text": text,
            "array": array.astype(np.int32) if len(text) < 2**31 else array,
            "final": np.flatnonzero(ending[array]),
            "counts": np.bincount(text, minlength=vocab_size + 1),
            "firsts": np.bincount(text[marks[1:] - 1], minlength=vocab_size + 1)[1:],
        }
        return cls(config, vocab_size, int(n.max()), tables)

    def log_probs(self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None = None) -> np.ndarray:
        """As ``NGram.log_probs``."""
        return self._score(tokens, offsets, want_best=False)[0]

    def score(
        self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``NGram.score``: (T - documents,) ln p of every token but a document's first, and was it the best?"""
        return self._score(tokens, offsets, want_best=True)

    def next_log_probs(self, context: np.ndarray | Sequence[int]) -> np.ndarray:
        """(V,) float64: ln p(w | context) for every token w."""
        return self.next_log_probs_of([context])[0]

    def next_log_probs_of(self, contexts: Sequence[np.ndarray | Sequence[int]]) -> np.ndarray:
        """(contexts, V) float64: ``next_log_probs`` of every context."""
        longest = max((len(context) for context in contexts), default=0)
        history = ends(contexts, min(longest, self._deepest(longest + 1) - 1))
        if history.size and history.max() >= self.vocab_size:
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}", fix="encode it anew")
        low, high = np.full(len(history), self.begin[1]), np.full(len(history), len(self.array))
        for _, rows, first, end in self._narrow(lambda rows, depth: history[rows, -depth], len(low), history.shape[1]):
            followed = self._followed(first, end) > 0
            low[rows[followed]], high[rows[followed]] = first[followed], end[followed]
        prob = [self._distribution(a, b) for a, b in zip(low.tolist(), high.tolist())]
        with np.errstate(divide="ignore"):
            return np.log(np.stack(prob)) if prob else np.zeros((0, self.vocab_size))

    def longest_match(
        self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(T - documents,) for every predicted token: how long its context h* is, and how often that was followed."""
        tokens, place = self._given(tokens, offsets)
        length, _, _, followed, _ = self._match(tokens, place)
        return length[place > 0], followed[place > 0]

    def _given(self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.asarray(tokens, np.int64)
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}", fix="encode it anew")
        return tokens, np.arange(len(tokens)) if offsets is None else places(offsets)

    def _score(
        self, tokens: np.ndarray | Sequence[int], offsets: np.ndarray | None, *, want_best: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens, place = self._given(tokens, offsets)
        _, low, high, followed, times = self._match(tokens, place)
        prob = (1 - self.config.unseen) * times / np.maximum(followed, 1) + self.config.unseen * self.single[tokens]
        target = place > 0
        best = self._best(low[target], high[target]) if want_best else np.zeros(0, np.int64)
        with np.errstate(divide="ignore"):
            return np.log(prob[target]), best == tokens[target] if want_best else best

    def _match(self, tokens: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of every position: length, range of h*, how often it was followed, and how often by the token there."""
        n, longest = len(tokens), self.config.longest or len(tokens)
        length = np.zeros(n, np.int64)
        low, high = np.full(n, self.begin[1]), np.full(n, len(self.array))
        followed, times = np.full(n, self.predicted.sum()), self.predicted[tokens]
        end_place = np.concatenate([[-1], place])

        def token_before(rows: np.ndarray, depth: int) -> np.ndarray:
            # Row i reads what ends with token i - 1, in its document; row n serves the last token's own n-grams.
            return np.where(end_place[rows] >= depth - 1, tokens[rows - depth], -1)

        occurs = np.zeros(n + 1, np.int64)
        matched = np.zeros(0, np.int64)  # positions whose context of the depth before was followed by something
        for depth, rows, first, end in self._narrow(token_before, n + 1, self._deepest(n)):
            occurs[rows] = end - first
            times[matched] = occurs[matched + 1]
            occurs[rows] = 0
            alive = self._followed(first, end)
            good = np.flatnonzero((alive > 0) & (rows < n) & (depth <= longest))
            matched = rows[good]
            length[matched], times[matched] = depth, 0  # unless the next depth finds the token after it
            low[matched], high[matched], followed[matched] = first[good], end[good], alive[good]
        return length, low, high, followed, times

    def _deepest(self, n: int) -> int:
        """The longest n-gram to look for in ``n`` tokens, the predicted one included."""
        return min(n, self.order, (self.config.longest or n) + 1)

    def _followed(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """How many of the occurrences in each range have a token after them."""
        return high - low - (np.searchsorted(self.final, high) - np.searchsorted(self.final, low))

    def _narrow(
        self, token_at: Callable[[np.ndarray, int], np.ndarray], n: int, deepest: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """For every depth: rows whose last ``depth`` tokens occur, and the range in which."""
        rows = np.arange(n)
        low = high = np.zeros(n, np.int64)
        for depth in range(1, deepest + 1):
            token = token_at(rows, depth)
            here = token >= 0
            rows, low, high, token = rows[here], low[here], high[here], token[here] + 1
            if depth == 1:
                low, high = self.begin[token], self.begin[token + 1]
            else:
                low, high = self._bound(low, high, depth - 1, token), self._bound(low, high, depth - 1, token + 1)
            found = high > low
            rows, low, high = rows[found], low[found], high[found]
            if not len(rows):
                return
            yield depth, rows, low, high

    def _bound(self, low: np.ndarray, high: np.ndarray, offset: int, token: np.ndarray) -> np.ndarray:
        """In every range the first suffix whose token at ``offset`` is not below ``token``."""
        low, high = low.copy(), high.copy()
        open_ = np.flatnonzero(low < high)
        while len(open_):
            middle = (low[open_] + high[open_]) >> 1
            less = self.text[self.array[middle] + offset] < token[open_]
            low[open_[less]] = middle[less] + 1
            high[open_[~less]] = middle[~less]
            open_ = open_[low[open_] < high[open_]]
        return low

    def _distribution(self, low: int, high: int) -> np.ndarray:
        """(V,) probabilities after one range."""
        times = np.zeros(self.vocab_size + 1)
        for first in range(low, high, FLAT_ITEMS):
            after = self.text[self.array[first : min(high, first + FLAT_ITEMS)] - 1]
            times += np.bincount(after, minlength=self.vocab_size + 1)
        times = times[1:]  # documents' ends left out
        return (1 - self.config.unseen) * times / times.sum() + self.config.unseen * self.single

    def _best(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The most probable token after each range."""
        ranges, which = np.unique(np.stack([low, high], 1), axis=0, return_inverse=True)
        found = np.zeros(len(ranges), np.int64)
        size = ranges[:, 1] - ranges[:, 0]
        for i in np.flatnonzero(size > LARGE):
            found[i] = self._distribution(*ranges[i].tolist()).argmax()
        small = np.flatnonzero(size <= LARGE)
        step = max(1, FLAT_ITEMS // LARGE)
        for first in range(0, len(small), step):
            part = small[first : first + step]
            n = size[part]
            at = np.arange(n.sum()) + np.repeat(ranges[part, 0] - np.cumsum(n) + n, n)
            after = self.text[self.array[at] - 1].astype(np.int64)
            row = np.repeat(np.arange(len(part)), n)[after != MARK]
            pairs, times = np.unique(row * (self.vocab_size + 1) + after[after != MARK], return_counts=True)
            row, token = np.divmod(pairs, self.vocab_size + 1)
            total = np.bincount(row, weights=times, minlength=len(part))
            value = (1 - self.config.unseen) * times / total[row] + self.config.unseen * self.single[token - 1]
            order = np.lexsort([-token, value, row])  # the last of a row has the most, and of equals the least id
            last = np.append(np.flatnonzero(np.diff(row[order])), len(row) - 1)
            favourite = int(self.single.argmax())
            rare = value[order[last]] < self.config.unseen * self.single[favourite]
            found[part] = np.where(rare, favourite, token[order[last]] - 1)
        return found[which.ravel()]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json``, the text and the array; what was there stays whole until all is written."""
        config = {
            "kind": "infinigram",
            "vocab_size": self.vocab_size,
            "order": self.order,
            "wide": self.array.dtype == np.int64,
            "settings": self.config.model_dump(mode="json"),
        }
        storage.write_arrays(folder, self.tables, config)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> InfiniGram:
        """A saved model; text and array stay on disk and are mapped. See ``NGram.load``."""
        found = storage.read_config(folder, "infinigram")
        try:
            vocab_size, order = int(found["vocab_size"]), int(found["order"])
            config = cls.Config.model_validate(found["settings"])
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise CheckpointError(f"{folder}/{storage.CONFIG} is incomplete: {error}", fix=storage.FIX) from None
        wide = np.int64 if found.get("wide") else np.int32
        dtypes = {"text": np.int32, "array": wide, "final": np.int64, "counts": np.int64, "firsts": np.int64}
        tables = {name: storage.read_array(folder, found, name, dtype, verify=verify) for name, dtype in dtypes.items()}
        n = len(tables["text"])
        sizes = (len(tables["array"]), int(tables["counts"].sum()), len(tables["counts"]), len(tables["firsts"]))
        if n < 2 or sizes != (n, n, vocab_size + 1, vocab_size):
            raise CheckpointError(f"the tables in {folder} do not belong together", fix=storage.FIX)
        return cls(config, vocab_size, order, tables)


def suffix_array(text: np.ndarray) -> np.ndarray:
    """(N,) int64: where the suffixes of ``text`` begin, in ascending order; a suffix precedes those it begins.

    Prefix doubling (Manber & Myers 1990): sorted by 1, 2, 4, ... tokens, each time with the ranks of the time before as
    keys; a suffix that has its place already is not sorted again (Larsson & Sadakane 2007).
    """
    n = len(text)
    array = np.argsort(text, kind="stable")
    values = text[array]
    head = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    rank = np.empty(n + 1, np.int64)
    rank[n] = -1  # beyond the end: below everything
    rank[array] = np.repeat(head, np.diff(head, append=n))
    sizes = np.diff(head, append=n)
    open_ = np.flatnonzero(np.repeat(sizes > 1, sizes))
    length = 1
    while len(open_):
        at = array[open_]
        key = rank[at] * (n + 1) + rank[np.minimum(at + length, n)] + 1
        order = np.argsort(key)
        at, key = at[order], key[order]
        array[open_] = at
        head = np.flatnonzero(np.diff(key, prepend=-1))
        sizes = np.diff(head, append=len(key))
        rank[at] = np.repeat(open_[head], sizes)
        open_ = open_[np.repeat(sizes > 1, sizes)]
        length *= 2
    return array
