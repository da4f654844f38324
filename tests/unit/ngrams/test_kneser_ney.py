"""Kneser-Ney: numbers worked out by hand, the sum over the vocabulary, document borders, the two discounts."""

import itertools
import math

import numpy as np
import pytest

from octavo.errors import ConfigError, DataError
from octavo.ngrams.counting import NGramCounts, flatten
from octavo.ngrams.model import NGram
from octavo.ngrams.smoothing import closed_form

BOS, EOS = 0, 1
KIND = {False: "kneser_ney", True: "modified_kneser_ney"}


def corpus(vocab_size, n_documents, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [
        np.concatenate([[BOS], rng.integers(0, vocab_size, rng.integers(0, longest)), [EOS]])
        for _ in range(n_documents)
    ]


def discounts_of(counts, modified):
    found = closed_form(np.bincount(np.minimum(counts, 5), minlength=6), modified)
    return found or ((0.5, 1.0, 1.5) if modified else (0.5, 0.5, 0.5))


def slow_kneser_ney(documents, vocab_size, order, modified):
    """p(w | h) straight from the definition, with dictionaries."""
    raw = [{} for _ in range(order + 1)]
    left = [{} for _ in range(order + 1)]
    for document in documents:
        for i, k in itertools.product(range(1, len(document)), range(1, order + 1)):
            if k <= i + 1:
                gram = tuple(int(t) for t in document[i - k + 1 : i + 1])
                raw[k][gram] = raw[k].get(gram, 0) + 1
                if i - k >= 0:
                    left[k].setdefault(gram, set()).add(int(document[i - k]))
    adjusted = [
        {gram: n if k == order or gram not in left[k] else len(left[k][gram]) for gram, n in raw[k].items()}
        for k in range(order + 1)
    ]
    discounts = [discounts_of(np.array(list(a.values()), dtype=int), modified) for a in adjusted]

    def p(word, history):
        k = len(history) + 1
        lower = 1 / vocab_size if k == 1 else p(word, history[1:])
        following = {gram[-1]: n for gram, n in adjusted[k].items() if gram[:-1] == history}
        if not following:
            return lower
        d = {w: discounts[k][min(n, 3) - 1] for w, n in following.items()}
        total = sum(following.values())
        own = max(following[word] - d[word], 0) / total if word in following else 0.0
        return own + sum(d.values()) / total * lower

    return p


def test_bigram_by_hand():
    # Two documents over a vocabulary of 5: <bos> a b <eos> and <bos> a c <eos>, with a, b, c = 2, 3, 4.
    counts = NGramCounts.of([[0, 2, 3, 1], [0, 2, 4, 1]], vocab_size=5, max_order=2)
    model = counts.model(2, {"kind": "kneser_ney", "discounts": (0.5, 0.5)})
    # Distinct left neighbours: a 1 (bos), b 1 (a), c 1 (a), eos 2 (b, c): 5 in all, 4 kinds.
    gamma = 4 * 0.5 / 5
    unigram = {2: 0.5 / 5 + gamma / 5, 3: 0.5 / 5 + gamma / 5, 1: 1.5 / 5 + gamma / 5, 0: gamma / 5}
    assert math.exp(model.next_log_probs([])[0]) == pytest.approx(0.08)
    assert math.exp(model.next_log_probs([])[1]) == pytest.approx(0.38)
    # After a: b and c once each, so b gets (1 - 0.5) / 2 and hands down 2 * 0.5 / 2 = 0.5.
    after_a = np.exp(model.next_log_probs([0, 2]))
    assert after_a[3] == pytest.approx(0.25 + 0.5 * unigram[3])
    assert after_a[1] == pytest.approx(0.5 * unigram[1])
    # The document <bos> a b <eos>: a after bos was seen twice.
    expected = [1.5 / 2 + 0.25 * unigram[2], 0.25 + 0.5 * unigram[3], 0.5 + 0.5 * unigram[1]]
    np.testing.assert_allclose(np.exp(model.log_probs([0, 2, 3, 1])), expected, rtol=1e-12)


def test_unigram_uses_raw_counts_when_it_is_the_highest_order():
    model = NGramCounts.of([[0, 2, 2, 2, 3]], vocab_size=4, max_order=1).model(
        1, {"kind": "kneser_ney", "discounts": (0.5,)}
    )
    np.testing.assert_allclose(np.exp(model.next_log_probs([])), [0.0625, 0.0625, 0.6875, 0.1875], rtol=1e-12)


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6, 7])
def test_equals_the_definition_and_sums_to_one(order, modified):
    documents = corpus(4, 40, seed=order)
    model = NGramCounts.of(documents, 4, 7).model(order, KIND[modified])
    p = slow_kneser_ney(documents, 4, order, modified)
    for document in [*documents[:4], *corpus(4, 4, seed=99)]:
        scored = model.log_probs(document)
        for i in range(1, len(document)):
            history = tuple(int(t) for t in document[max(0, i - order + 1) : i])
            expected = [p(word, history) for word in range(4)]
            assert math.fsum(expected) == pytest.approx(1, abs=1e-12)
            np.testing.assert_allclose(np.exp(model.next_log_probs(document[:i])), expected, rtol=1e-9)
            assert math.exp(scored[i - 1]) == pytest.approx(expected[document[i]], rel=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_hits_are_the_most_probable_tokens(order):
    documents = corpus(30, 60, seed=3, longest=30)
    model = NGramCounts.of(documents, 30, order).model(order, "kneser_ney")
    for document in corpus(30, 5, seed=4, longest=30) + documents[:5]:
        _, hits = model.score(document)
        for i in range(1, len(document)):
            following = model.next_log_probs(document[:i])
            is_top = following[document[i]] >= following.max() - 1e-12
            is_only_top = is_top and np.count_nonzero(following >= following.max() - 1e-12) == 1
            assert hits[i - 1] <= is_top
            assert hits[i - 1] >= is_only_top


def test_one_count_serves_every_order():
    documents = corpus(9, 50)
    shared = NGramCounts.of(documents, 9, 7)
    test = corpus(9, 1, seed=7)[0]
    for order in (5, 1, 7, 3):
        alone = NGramCounts.of(documents, 9, order).model(order, "kneser_ney")
        np.testing.assert_array_equal(shared.model(order, "kneser_ney").log_probs(test), alone.log_probs(test))


def test_contexts_never_cross_a_document():
    first, second = [0, 2, 3, 1], [0, 4, 2, 1]
    model = NGramCounts.of([first, second, [0, 3, 3, 1]], 5, 3).model(3, "kneser_ney")
    together, alone = model.score(*flatten([first, second])), [model.score(first), model.score(second)]
    for joined, a, b in zip(together, *alone):
        np.testing.assert_array_equal(joined, np.concatenate([a, b]))
    # Counting one long document is something else: there "eos bos" and what follows are n-grams.
    merged = NGramCounts.of([[*first, *second, 0, 3, 3, 1]], 5, 3)
    assert merged.n_tokens == 11
    assert len(merged.levels[1].keys) > len(model.keys[1])


def test_a_prefix_scores_as_in_the_whole_document():
    model = NGramCounts.of(corpus(6, 80), 6, 4).model(4, "kneser_ney")
    document = corpus(6, 1, seed=5)[0]
    whole = model.log_probs(document)
    for stop in range(2, len(document)):
        np.testing.assert_array_equal(model.log_probs(document[:stop]), whole[: stop - 1])


def test_documents_shorter_than_the_order():
    model = NGramCounts.of([[0, 2, 1]], vocab_size=4, max_order=7).model(7, "kneser_ney")
    assert np.exp(model.next_log_probs([0, 2, 1, 2, 3, 2, 1, 0])).sum() == pytest.approx(1)
    assert np.isfinite(model.log_probs([0, 3, 3, 2, 1, 2, 2, 2, 1])).all()


def test_more_context_helps_on_text_that_has_structure():
    text = [0, *([2, 3, 4, 2, 4, 3] * 60), 1]
    counts = NGramCounts.of([text], 5, 4)
    losses = [-counts.model(order, "kneser_ney").log_probs(text).mean() for order in (1, 2, 3, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.1 < losses[0]


def test_discounts():
    counts = np.repeat([1, 2, 3, 4, 5], [10, 4, 2, 1, 7])
    assert discounts_of(counts, modified=False) == (10 / 18,) * 3
    y = 10 / 18
    expected = (1 - 2 * y * 4 / 10, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2)
    assert discounts_of(counts, modified=True) == pytest.approx(expected)
    assert discounts_of(np.array([5, 5]), modified=False) == (0.5, 0.5, 0.5)
    assert discounts_of(np.array([1, 1]), modified=True) == (0.5, 1.0, 1.5)


def test_config_and_fit():
    model = NGram.fit(NGram.Config(order=2), corpus(5, 20), 5)
    assert (model.order, model.config.smoothing.kind, model.vocab_size) == (2, "modified_kneser_ney", 5)
    assert len(model.said["discounts"]) == 2
    with pytest.raises(ValueError, match="order"):
        NGram.Config(order=0)


def test_refusals():
    with pytest.raises(DataError, match="at least one document of two tokens"):
        NGramCounts.of([[0], [0]], 4, 2)
    with pytest.raises(DataError, match="token id 9"):
        NGramCounts.of([[0, 9]], 4, 2)
    counts = NGramCounts.of([[0, 2, 1]], 4, 2)
    with pytest.raises(ConfigError, match=r"1\.\.2"):
        counts.model(3, "kneser_ney")
    with pytest.raises(DataError, match="vocabulary of 4"):
        counts.model(2, "kneser_ney").log_probs([0, 7])
    with pytest.raises(ConfigError, match="at least 1"):
        NGramCounts.of([[0, 2]], 4, 0)
