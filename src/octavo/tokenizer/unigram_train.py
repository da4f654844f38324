"""The Unigram trainer on arrays: what unigram.py does, for millions of characters.

The `tokenizers` library adds its counts in the order of a hash table, which is another one in every process, so
its result is not reproducible to the byte; this one is. All words' lattices are edges of one graph and every pass
walks it by the position inside the word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from octavo.errors import DataError
from octavo.tokenizer.unigram import FLOOR


def train_pieces(
    words: Mapping[str, int],
    *,
    size: int,
    seed_size: int,
    keep: float,
    em_steps: int,
    max_chars: int,
    alphabet_size: int,
    train_chars: int,
    letters: str = "",
) -> list[tuple[str, float]]:
    """Train on ``words`` (each with its frequency).

    Args:
        size: pieces to end with (never below the number of letters).
        seed_size: longer pieces to begin with.
        keep: share of the vocabulary that survives a pruning.
        em_steps: EM steps between prunings.
        max_chars: longest piece.
        alphabet_size: letters that are kept, the most frequent ones.
        train_chars: the most frequent words are used until they have this many characters together.
        letters: characters that get a piece whether the text has them or not.

    Returns:
        (piece, log-probability), most probable first.

    Raises:
        DataError: there is no text.
    """
    chars: Counter[str] = Counter()
    for word, times in words.items():
        for char in word:
            chars[char] += times
    room = max(1, min(alphabet_size, size - len(set(letters))))
    known = set(sorted(chars, key=lambda char: (-chars[char], char))[:room])
    size -= len(set(letters) - known)
    parts: Counter[str] = Counter()
    for word, times in words.items():
        for part in "".join(char if char in known else "\0" for char in word).split("\0"):
            if part:
                parts[part] += times
    if not parts:
        raise DataError("no text to train a tokenizer on", fix="check the data sources and filters")
    ranked = sorted(parts, key=lambda part: (-parts[part], part))
    sizes = np.cumsum([len(part) for part in ranked])
    chosen = sorted(ranked[: max(1, int(np.searchsorted(sizes, train_chars, side="right")))])
    for char in sorted(known.difference("".join(chosen))):  # a letter of words that were left out
        chosen.append(char)
    pieces, scores, graph, inner = _seed(
        chosen, np.array([parts[part] or 1 for part in chosen], np.float64), seed_size, max_chars
    )
    is_letter = np.array([len(piece) == 1 for piece in pieces])
    alive = np.ones(len(pieces), bool)
    while True:
        counts = np.zeros(len(pieces))
        for _ in range(em_steps):
            counts, _ = graph.expected(scores)
            alive &= (counts > 0) | is_letter
            with np.errstate(divide="ignore"):
                scores = np.maximum(np.log(counts) - np.log(counts.sum()), FLOOR)
            scores[~alive] = -np.inf
        excess = int(alive.sum()) - max(size, int((alive & is_letter).sum()))
        if excess <= 0:
            break
        prunable = alive & ~is_letter
        loss = np.full(len(pieces), np.inf)
        loss[prunable] = counts[prunable] * (scores - inner.best(scores))[prunable]
        n_gone = min(excess, int(alive.sum()) - int(alive.sum() * keep))
        order = np.lexsort((np.arange(len(loss)), loss))
        alive[order[:n_gone]] = False
        scores[~alive] = -np.inf
        graph.keep(alive)
        inner.keep(alive)
    result = {pieces[i]: float(scores[i]) for i in np.flatnonzero(alive)}
    for char in letters:
        result.setdefault(char, FLOOR)
    return sorted(result.items(), key=lambda item: (-item[1], item[0]))


class _Graph:
    """Lattices side by side: nodes are places between characters, edges are pieces.

    Args:
        lengths: characters of each word. Word w owns nodes base[w] .. base[w] + lengths[w].
        times: how often each word occurs.
        start, stop: nodes of each edge.
        piece: its piece.
        n_pieces: number of pieces.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        times: np.ndarray,
        start: np.ndarray,
        stop: np.ndarray,
        piece: np.ndarray,
        n_pieces: int,
    ):
        self.base = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]]).astype(np.int64)
        self.last = self.base + lengths
        self.word = np.repeat(np.arange(len(lengths)), lengths + 1)
        self.place = np.arange(len(self.word)) - self.base[self.word]
        self.times, self.n_pieces = times, n_pieces
        # Twice the same edges: sorted for the walk from the left and for the walk from the right.
        n = len(self.word)
        order = np.argsort(self.place[stop] * n + stop, kind="stable")
        self.left = (start[order], stop[order], piece[order])
        order = np.argsort((self.place.max() - self.place[start]) * n + start, kind="stable")
        self.right = (start[order], stop[order], piece[order])
        self._index()

    def _index(self) -> None:
        self.forward = _levels(self.left[1], self.place)
        self.backward = _levels(self.right[0], self.place)

    def keep(self, alive: np.ndarray) -> None:
        """Drop the edges of pieces that are gone."""
        for name in ("left", "right"):
            edges = getattr(self, name)
            here = alive[edges[2]]
            setattr(self, name, tuple(part[here] for part in edges))
        self._index()

    def _alpha(self, scores: np.ndarray, best: bool) -> np.ndarray:
        alpha = np.full(len(self.word), -np.inf)
        alpha[self.base] = 0.0
        start, stop, piece = self.left
        for lo, hi, cuts in self.forward:
            values = alpha[start[lo:hi]] + scores[piece[lo:hi]]
            alpha[stop[lo + cuts]] = _reduce(values, cuts, best)
        return alpha

    def expected(self, scores: np.ndarray) -> tuple[np.ndarray, float]:
        """Expected count of each piece, and the log-likelihood in nats."""
        alpha = self._alpha(scores, False)
        beta = np.full(len(self.word), -np.inf)
        beta[self.last] = 0.0
        start, stop, piece = self.right
        for lo, hi, cuts in self.backward:
            values = scores[piece[lo:hi]] + beta[stop[lo:hi]]
            beta[start[lo + cuts]] = _reduce(values, cuts, False)
        total = alpha[self.last]
        word = self.word[start]
        share = np.exp(alpha[start] + scores[piece] + beta[stop] - total[word])
        counts = np.bincount(piece, share * self.times[word], minlength=self.n_pieces)
        return counts, float(total @ self.times)

    def best(self, scores: np.ndarray) -> np.ndarray:
        """Score of the best path through each word."""
        return self._alpha(scores, True)[self.last]


def _levels(node: np.ndarray, place: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Ranges of edges (sorted by ``node``) with equal place in the word, and where each node's edges begin in them."""
    if not len(node):
        return []
    level = place[node]
    cuts = np.flatnonzero(np.diff(level)) + 1
    bounds = [0, *cuts.tolist(), len(node)]
    out = []
    for lo, hi in zip(bounds[:-1], bounds[1:], strict=True):
        out.append((lo, hi, np.concatenate([[0], np.flatnonzero(np.diff(node[lo:hi])) + 1])))
    return out


def _reduce(values: np.ndarray, cuts: np.ndarray, best: bool) -> np.ndarray:
    """Maximum, or log of the sum of exponentials, of each stretch of ``values`` that begins at ``cuts``."""
    top = np.maximum.reduceat(values, cuts)
    if best:
        return top
    sizes = np.diff(np.append(cuts, len(values)))
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.add.reduceat(np.exp(values - np.repeat(safe, sizes)), cuts))


def _seed(
    words: list[str], times: np.ndarray, size: int, max_chars: int
) -> tuple[list[str], np.ndarray, _Graph, _Graph]:
    """Letters and frequent substrings, their first scores, the graph of all their occurrences, and the graph of
    each one's spellings by the others."""
    lengths = np.array([len(word) for word in words])
    text = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
    letters, code = np.unique(text, return_inverse=True)
    word = np.repeat(np.arange(len(words)), lengths)
    ends = np.cumsum(lengths)[word]
    at, name = np.arange(len(text)), code.astype(np.int64)
    found = [(at, name, 1)]  # (where, which of this length, length)
    candidates = []
    for length in range(2, max_chars + 1):
        inside = at + length <= ends[at]
        at, name = at[inside], name[inside]
        if not len(at):
            break
        keys, first, name = np.unique(
            name * len(letters) + code[at + length - 1], return_index=True, return_inverse=True
        )
        count = np.bincount(name, times[word[at]])
        often = count >= 2
        candidates.append((count * length, at[first], np.full(len(keys), length), often))
        here = often[name]
        renamed = np.cumsum(often) - 1
        at, name = at[here], renamed[name[here]]
        found.append((at, name, length))
    score, place, length = (
        np.concatenate([c[k][c[3]] for c in candidates]) if candidates else np.zeros(0, np.int64) for k in range(3)
    )
    joined = "".join(words)
    near = np.flatnonzero(score >= np.sort(score)[-size]) if len(score) > size else np.arange(len(score))
    longer = {joined[place[i] : place[i] + length[i]]: i for i in near.tolist()}
    chosen = sorted(longer, key=lambda piece: (-score[longer[piece]], piece))[:size]
    pieces = sorted([*map(chr, letters.tolist()), *chosen])
    ids = {piece: i for i, piece in enumerate(pieces)}
    number = np.full(len(score), -1, np.int64)
    for piece in chosen:
        number[longer[piece]] = ids[piece]
    letter_ids = np.array([ids[chr(c)] for c in letters.tolist()])
    total = np.zeros(len(pieces))
    total[letter_ids] = np.bincount(code, times[word])
    total[number[number >= 0]] = score[number >= 0]
    base = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    shift = base[word] - (np.cumsum(lengths) - lengths)[word]
    # Where each piece stands once: its other spellings are the pieces that stand inside it there.
    spot = np.zeros(len(pieces), np.int64)
    spot[number[number >= 0]] = place[number >= 0]
    sizes = np.array([len(piece) for piece in pieces])
    inner_base = np.concatenate([[0], np.cumsum(sizes + 1)[:-1]])
    edges: list[tuple[np.ndarray, ...]] = []
    inner_edges: list[tuple[np.ndarray, ...]] = []
    before = 0
    for at, name, length in found:
        if length == 1:
            name = letter_ids[name]
        else:
            n = int(name.max(initial=-1)) + 1
            name, before = number[before + name], before + n
            at, name = at[name >= 0], name[name >= 0]
        edges.append((at + shift[at], at + shift[at] + length, name))
        standing = np.full(len(text), -1, np.int32)
        standing[at] = name
        outer = np.flatnonzero(sizes > length)
        turns = sizes[outer] - length + 1
        outer = np.repeat(outer, turns)
        step = np.arange(len(outer)) - np.repeat(np.cumsum(turns) - turns, turns)
        inside = standing[spot[outer] + step]
        outer, step, inside = outer[inside >= 0], step[inside >= 0], inside[inside >= 0].astype(np.int64)
        inner_edges.append((inner_base[outer] + step, inner_base[outer] + step + length, inside))
    graph = _Graph(lengths, times, *map(np.concatenate, zip(*edges, strict=True)), n_pieces=len(pieces))
    ones = np.ones(len(pieces))
    inner = _Graph(sizes, ones, *map(np.concatenate, zip(*inner_edges, strict=True)), n_pieces=len(pieces))
    return pieces, np.log(total) - np.log(total.sum()), graph, inner
