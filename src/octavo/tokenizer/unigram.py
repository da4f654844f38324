"""The Unigram language model written plainly: lattice, EM, pruning, best paths and sampling.

A piece has a probability, a segmentation the product of its pieces', a text the sum over its segmentations. The
twin of :mod:`octavo.tokenizer.unigram_train`, which does the same on arrays. Source: Kudo 2018; Kudo and
Richardson 2018 (SentencePiece), where our M step differs: it is the plain maximum (no digamma), so that the
likelihood never decreases; and the loss of a piece uses its expected count rather than that of the best paths.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Letters must stay usable however rare: far below anything that changes a likelihood in its printed digits.
FLOOR = -60.0


@dataclass(frozen=True)
class UnigramStep:
    """One moment of training: ``em`` (with the likelihood before the step, in nats) or ``prune``."""

    action: str
    scores: dict[str, float]
    log_likelihood: float | None = None
    removed: tuple[tuple[str, float], ...] = ()


def _log_add(a: float, b: float) -> float:
    if a == -math.inf or b == -math.inf:
        return max(a, b)
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def edges(word: str, scores: Mapping[str, float]) -> list[tuple[int, int, float]]:
    """All (start, stop, score) where a known piece stands in ``word``, by stop."""
    longest = max(map(len, scores), default=0)
    return [
        (i, j, scores[word[i:j]])
        for j in range(1, len(word) + 1)
        for i in range(max(0, j - longest), j)
        if word[i:j] in scores
    ]


def log_probability(word: str, scores: Mapping[str, float]) -> float:
    """log p(word), summed over all segmentations; -inf if there is none."""
    alpha = [0.0] + [-math.inf] * len(word)
    for i, j, score in edges(word, scores):
        alpha[j] = _log_add(alpha[j], alpha[i] + score)
    return alpha[-1]


def expected_counts(words: Mapping[str, int], scores: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """The E step: how often each piece is expected to occur, and the log-likelihood of ``words`` in nats."""
    counts = dict.fromkeys(scores, 0.0)
    total = 0.0
    for word, times in words.items():
        lattice = edges(word, scores)
        alpha, beta = [0.0] + [-math.inf] * len(word), [-math.inf] * len(word) + [0.0]
        for i, j, score in lattice:
            alpha[j] = _log_add(alpha[j], alpha[i] + score)
        for i, j, score in reversed(lattice):
            beta[i] = _log_add(beta[i], score + beta[j])
        total += times * alpha[-1]
        for i, j, score in lattice:
            counts[word[i:j]] += times * math.exp(alpha[i] + score + beta[j] - alpha[-1])
    return counts, total


def maximise(counts: Mapping[str, float]) -> dict[str, float]:
    """The M step: scores (log-probabilities) proportional to the counts."""
    total = math.log(sum(counts.values()))
    return {
        piece: max(math.log(count) - total, FLOOR) if count > 0 else FLOOR
        for piece, count in counts.items()
        if count > 0 or len(piece) == 1
    }


def losses(scores: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """What removing each longer piece would cost in nats, if its occurrences took its best other spelling."""
    loss = {}
    for piece, score in scores.items():
        if len(piece) > 1:
            others = {other: s for other, s in scores.items() if other != piece}
            loss[piece] = counts[piece] * (score - viterbi(piece, others)[1])
    return loss


def prune(
    scores: Mapping[str, float], counts: Mapping[str, float], size: int, keep: float
) -> tuple[dict[str, float], tuple[tuple[str, float], ...]]:
    """Keep all letters and the costliest share ``keep`` of the vocabulary, not below ``size`` pieces in all.

    Returns:
        The scores of the pieces kept, and what went with its loss, cheapest first.
    """
    loss = losses(scores, counts)
    target = max(size, int(len(scores) * keep))
    cheapest = sorted(loss, key=lambda piece: (loss[piece], piece))
    gone = cheapest[: max(0, len(scores) - target)]
    kept = {piece: score for piece, score in scores.items() if piece not in set(gone)}
    return kept, tuple((piece, loss[piece]) for piece in gone)


def seed(words: Mapping[str, int], size: int, max_chars: int) -> dict[str, float]:
    """All letters, and the ``size`` substrings of most frequency x length that occur at least twice."""
    letters: Counter[str] = Counter()
    longer: Counter[str] = Counter()
    for word, times in words.items():
        letters.update({char: n * times for char, n in Counter(word).items()})
        for i in range(len(word)):
            for j in range(i + 2, min(len(word), i + max_chars) + 1):
                longer[word[i:j]] += times
    weights = {piece: n * len(piece) for piece, n in longer.items() if n >= 2}
    best = sorted(weights, key=lambda piece: (-weights[piece], piece))[:size]
    return maximise({**{c: float(n) for c, n in letters.items()}, **{p: float(weights[p]) for p in best}})


def train_steps(
    words: Mapping[str, int],
    size: int,
    *,
    seed_size: int = 10_000,
    keep: float = 0.8,
    em_steps: int = 2,
    max_chars: int = 16,
) -> Iterator[UnigramStep]:
    """Train on ``words`` (each with its frequency): EM, prune, and again until ``size`` pieces are left.

    Yields:
        The seed (``seed``), then every step. The last one's ``scores`` are the result.
    """
    scores = seed(words, seed_size, max_chars)
    yield UnigramStep("seed", dict(scores))
    while True:
        counts: dict[str, float] = {}
        for _ in range(em_steps):
            counts, likelihood = expected_counts(words, scores)
            scores = maximise(counts)
            yield UnigramStep("em", dict(scores), likelihood)
        n_letters = sum(len(piece) == 1 for piece in scores)
        if len(scores) <= max(size, n_letters):
            return
        scores, removed = prune(scores, {piece: counts[piece] for piece in scores}, size, keep)
        yield UnigramStep("prune", dict(scores), None, removed)


# -- segmentation


def viterbi(word: str, scores: Mapping[str, float]) -> tuple[tuple[str, ...], float]:
    """The most probable segmentation and its log-probability; ((), -inf) if there is none."""
    paths = n_best(word, scores, 1)
    return paths[0] if paths else ((), -math.inf)


def n_best(word: str, scores: Mapping[str, float], n: int) -> list[tuple[tuple[str, ...], float]]:
    """The ``n`` most probable segmentations with their log-probabilities, best first."""
    paths: list[list[tuple[float, tuple[str, ...]]]] = [[(0.0, ())], *([] for _ in word)]
    for j in range(1, len(word) + 1):
        ways = (
            (total + score, (*path, word[i:j]))
            for i, stop, score in _ending_at(word, scores, j)
            for total, path in paths[i]
            if stop == j
        )
        paths[j] = heapq.nsmallest(n, ways, key=lambda way: (-way[0], way[1]))
    return [(path, total) for total, path in paths[-1]]


def _ending_at(word: str, scores: Mapping[str, float], stop: int) -> Iterator[tuple[int, int, float]]:
    for start in range(stop):
        if word[start:stop] in scores:
            yield start, stop, scores[word[start:stop]]


def sample(word: str, scores: Mapping[str, float], rng: random.Random, *, sharpness: float = 1.0) -> tuple[str, ...]:
    """A segmentation drawn with probability proportional to p(segmentation) ** ``sharpness``.

    Source: Kudo 2018, section 3 (subword regularisation), by forward filtering and backward sampling.
    """
    alpha = [0.0] + [-math.inf] * len(word)
    for i, j, score in edges(word, scores):
        alpha[j] = _log_add(alpha[j], alpha[i] + sharpness * score)
    path: list[str] = []
    j = len(word)
    while j > 0:
        ways = [(i, alpha[i] + sharpness * score) for i, _, score in _ending_at(word, scores, j)]
        weights = [math.exp(value - alpha[j]) for _, value in ways]
        i = rng.choices([i for i, _ in ways], weights)[0]
        path.append(word[i:j])
        j = i
    return tuple(reversed(path))
