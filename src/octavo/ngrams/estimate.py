"""From counts to the tables of a model, order by order, in blocks of whole contexts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from octavo.ngrams.counting import NGramCounts
from octavo.ngrams.scratch import Scratch
from octavo.ngrams.smoothing import BLOCK_BYTES, Outcomes, Smoothed, Smoothing

if TYPE_CHECKING:
    from octavo.ngrams.model import NGram


def blocks(keys: np.ndarray, vocab_size: int, n_contexts: int, step: int) -> Iterator[tuple[int, int, int, int]]:
    """Consecutive (first n-gram, end, first context, end), about ``step`` of each at most, contexts kept whole."""
    n, first, context = len(keys), 0, 0
    while context < n_contexts:
        end = n_contexts if first + step >= n else int(keys[first + step] // vocab_size)
        end = min(max(end, context + 1), context + step, n_contexts)
        stop = n if end == n_contexts else int(np.searchsorted(keys, end * vocab_size))
        yield first, stop, context, end
        first, context = stop, end


def estimate(smoothing: Smoothing, counts: NGramCounts, order: int, outcomes: Outcomes) -> list[Smoothed]:
    """One table per order, from 1 to ``order``; ``smoothing`` is prepared."""
    scratch, V = counts.scratch, counts.vocab_size
    levels: list[Smoothed] = []
    for k in range(1, order + 1):
        level = counts.levels[k - 1]
        of_level = counts.adjusted(k) if smoothing.continuation and k < order else level.raw
        if k == 1:
            prob, gamma = smoothing.unigrams(of_level, outcomes)
            levels.append(Smoothed(prob, np.array([gamma])))
            continue
        below, n_contexts = levels[-1].prob, len(counts.levels[k - 2].keys)
        prob, gamma = scratch.empty(len(level.keys), np.float64), scratch.empty(n_contexts, np.float64)
        step = scratch.block(BLOCK_BYTES, max(len(level.keys), n_contexts))
        for a, b, first, end in blocks(level.keys, V, n_contexts, step):
            context = level.keys[a:b] // V - first
            prob[a:b], gamma[first:end] = smoothing.mix(
                k, of_level[a:b], context, end - first, below[level.suffix[a:b]]
            )
        levels.append(Smoothed(prob, gamma))
    return levels


def find_best(model: NGram) -> None:
    """Note the most probable next token after every context, if that was not done yet.

    It is the best seen continuation of h, or the best token after h': any other unseen token has gamma(h) p(w | h'),
    and that is largest for the latter. Where the latter was itself seen after h and is the less probable for it (an
    interpolated model has no such case), the best token is not known here, and is searched for when it is asked for.
    """
    if len(model.levels[0].best):
        return
    V, outcomes = model.vocab_size, model.outcomes
    top = model.levels[0].prob
    model.levels[0].best = np.array([top.argmax()], np.int32)
    model.levels[0].best_prob = top[model.levels[0].best]
    suffixes = model.suffixes()
    scratch = Scratch(model.config.memory_bytes)
    for k in range(2, model.order + 1):
        level, below, keys = model.levels[k - 1], model.levels[k - 2], model.keys[k - 1]
        n_contexts = len(model.keys[k - 2])
        level.best, level.best_prob = scratch.empty(n_contexts, np.int32), scratch.empty(n_contexts, np.float64)
        step = scratch.block(BLOCK_BYTES, max(len(keys), n_contexts))
        for a, b, first, end in blocks(keys, V, n_contexts, step):
            shorter = suffixes[k - 2][first:end]
            if model.flat:
                best = np.full(end - first, outcomes.first, np.int32)
                best_prob = level.gamma[first:end] / outcomes.n
            else:
                best, best_prob = below.best[shorter], level.gamma[first:end] * below.best_prob[shorter]
            prob, token, context = level.prob[a:b], keys[a:b] % V, keys[a:b] // V - first
            if not model.interpolated:
                # The best token after h' was seen after h: what it has there is not gamma(h) p(w | h').
                contradicted = context[(best[context] == token) & (prob < best_prob[context])]
                best[contradicted] = -1
            starts = np.flatnonzero(np.diff(context, prepend=-1))
            if len(starts):
                peak = np.maximum.reduceat(prob, starts)
                at_peak = np.flatnonzero(prob == np.repeat(peak, np.diff(starts, append=len(prob))))[::-1]
                winner = np.zeros(end - first, np.int32)
                winner[context[at_peak]] = token[at_peak]
                seen = context[starts]
                wins = peak >= best_prob[seen]
                best[seen[wins]], best_prob[seen[wins]] = winner[seen[wins]], peak[wins]
            level.best[first:end], level.best_prob[first:end] = best, best_prob
