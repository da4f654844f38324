"""Counting: against a dictionary, and the same arrays to the bit within a bound of memory."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from octavo.errors import ConfigError, DataError
from octavo.ngrams import NGram, NGramCounts
from octavo.ngrams.counting import TokenStream, flatten
from octavo.ngrams.coverage import coverage
from octavo.ngrams.scratch import Scratch


def corpus(vocab_size, n_documents, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size - 1)
    return [
        np.concatenate([[0], 2 + rng.choice(vocab_size - 2, rng.integers(0, longest), p=weights / weights.sum()), [1]])
        for _ in range(n_documents)
    ]


def spelled(counts, order):
    """Every n-gram of one order as its tokens, with its count."""
    tokens, left = [], np.arange(len(counts.levels[order - 1].keys))
    for k in range(order, 0, -1):
        left, token = np.divmod(counts.levels[k - 1].keys[left], counts.vocab_size)
        tokens.insert(0, token.tolist())
    return dict(zip(zip(*tokens), counts.levels[order - 1].raw.tolist()))


def test_counts_are_those_of_a_dictionary():
    documents = corpus(7, 60)
    counts = NGramCounts.of(documents, 7, 5)
    for order in range(2, 6):
        slow = Counter(tuple(d[i - order + 1 : i + 1].tolist()) for d in documents for i in range(order - 1, len(d)))
        assert spelled(counts, order) == slow
        grams = list(spelled(counts, order))
        shorter = list(spelled(counts, order - 1))
        assert [shorter[i] for i in counts.levels[order - 1].suffix] == [gram[1:] for gram in grams]


@pytest.mark.parametrize("memory_bytes", [1 << 14, 1 << 17])
def test_a_bound_changes_no_bit(memory_bytes, monkeypatch):
    monkeypatch.setattr("octavo.ngrams.scratch.LEAST_BYTES", 1)
    documents = corpus(30, 300)
    free = NGramCounts.of(documents, 30, 5)
    bounded = NGramCounts.of(documents, 30, 5, memory_bytes=memory_bytes)
    flat = NGramCounts(*flatten(documents), 30, 5, Scratch(memory_bytes))
    assert free.n_tokens == bounded.n_tokens
    for order in range(1, 6):
        for other in (bounded, flat):
            for name in ("keys", "suffix", "raw"):
                ours, theirs = getattr(free.levels[order - 1], name), getattr(other.levels[order - 1], name)
                np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(free.adjusted(order), other.adjusted(order))
    for kind in ("modified_kneser_ney", "katz", "add_k"):
        config = NGram.Config(order=4, smoothing=kind, never=0)
        a, b = NGram.of_counts(config, free), NGram.of_counts(config, bounded)
        for x, y in zip(a.levels, b.levels):
            np.testing.assert_allclose(x.prob, y.prob, rtol=1e-12)
            np.testing.assert_allclose(x.gamma, y.gamma, rtol=1e-9)
        test = flatten(corpus(30, 20, seed=9))
        np.testing.assert_array_equal(a.score(*test)[1], b.score(*test)[1])


def test_memory_stays_below_the_bound():
    """120 thousand tokens take 11 MiB to sort at once; within 8 MiB nothing larger than that is allocated."""
    documents = (np.concatenate([[0], part]) for part in np.random.default_rng(0).integers(2, 3000, (200, 600)))
    bound = 8 << 20
    tracemalloc.start()
    counts = NGramCounts.of(documents, 3000, 4, memory_bytes=bound)
    model = counts.model(4, "modified_kneser_ney")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(model.keys[3]) > 115_000
    assert peak < bound
    with pytest.raises(ConfigError, match="memory_bytes = 5 is too little"):
        Scratch(5)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_stream_cut_anywhere_is_the_same_text(cut):
    documents = [*corpus(9, 40), np.full(700, 3)]
    tokens, offsets = flatten(documents)
    stream = TokenStream()
    for a in range(0, len(tokens), cut):
        inside = offsets[:-1][(offsets[:-1] >= a) & (offsets[:-1] < a + cut)]
        stream.append(tokens[a : a + cut], inside - a)
    whole = TokenStream()
    whole.append_documents(documents)
    for ours, theirs in zip(stream.arrays(), whole.arrays()):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.rows("N6")
def test_coverage_falls_with_n():
    """The longer the n-gram, the less of a new text was seen: by hand, and as a curve."""
    counts = NGramCounts.of([[0, 2, 3, 4, 1]], 6, 4)
    rows = coverage(counts, *flatten([[0, 2, 3, 5, 1], [0, 4, 1]]))
    # Predicted: 2 3 5 1 4 1. Bigrams: 02 23 35 51 | 04 41, of which 02 23 41 are known; after 0 2 3 4 something came.
    assert [(row.order, row.n, row.seen) for row in rows] == [(1, 6, 5), (2, 6, 3), (3, 4, 1), (4, 2, 0)]
    assert [row.contexts_seen for row in rows] == [6, 5, 2, 1]
    assert [(row.distinct, row.distinct_seen) for row in rows] == [(5, 4), (6, 3), (4, 1), (2, 0)]
    counts = NGramCounts.of(corpus(200, 800), 200, 7)
    shares = [row.share for row in coverage(counts, *flatten(corpus(200, 100, seed=1)))]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[1] > 0.6
    assert shares[5] < 0.05


def test_refusals():
    with pytest.raises(DataError, match="offsets end at 2 of 3"):
        NGramCounts(np.array([0, 1, 2]), np.array([0, 2]), 5, 2)
    with pytest.raises(DataError, match="outside the vocabulary of 5"):
        NGramCounts.of([[0, -3]], 5, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        NGramCounts.of([[0, 1]], 5, 300)
