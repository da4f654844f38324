"""Smoothings against nltk, where the two definitions coincide (Kneser-Ney: given discounts, full contexts)."""

import math

import numpy as np
import pytest
from nltk.lm import MLE, KneserNeyInterpolated, Laplace, Lidstone, StupidBackoff
from nltk.util import everygrams

from octavo.ngrams import NGramCounts


@pytest.mark.parametrize("discount", [0.1, 0.75])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_kneser_ney_equals_nltk(order, discount):
    rng = np.random.default_rng(order)
    vocab_size = 8
    documents = [np.concatenate([[0], rng.integers(2, vocab_size, 30), [1]]) for _ in range(12)]
    words = [[str(t) for t in document] for document in documents]
    theirs = KneserNeyInterpolated(order, discount=discount)
    theirs.fit([list(everygrams(text, max_len=order)) for text in words], [w for text in words for w in text])
    # nltk leaves the unigram level undiscounted, and its vocabulary has no uniform floor below it.
    ours = NGramCounts.of(documents, vocab_size, order).model(
        order, {"kind": "kneser_ney", "discounts": (0.0, *[discount] * (order - 1))}
    )
    compared = 0
    for document in [*documents[:3], *[np.concatenate([[0], rng.integers(2, vocab_size, 30), [1]]) for _ in range(3)]]:
        scored = ours.log_probs(document)
        for i in range(order, len(document)):
            context = [str(t) for t in document[i - order + 1 : i]]
            reference = theirs.score(str(document[i]), context)
            assert math.exp(scored[i - 1]) == pytest.approx(reference, rel=1e-9)
            compared += 1
    assert compared > 60


@pytest.mark.rows("N1", "N2", "N3")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["mle", "laplace", "lidstone", "stupid_backoff"])
def test_the_older_smoothings_equal_nltk(kind, order):
    """On every context seen; nltk gives 0 after an unseen one for mle, where ours goes to the longest seen end."""
    rng = np.random.default_rng(order)
    vocab_size = 8
    documents = [np.concatenate([[0], rng.integers(2, vocab_size, 25), [1]]) for _ in range(10)]
    # nltk counts a document's first token too: as unigrams it is left out, as ours is only ever given.
    words = [[str(t) for t in document] for document in documents]
    grams = [[gram for gram in everygrams(text, max_len=order) if gram != ("0",)] for text in words]
    theirs, smoothing = {
        "mle": (MLE(order), "mle"),
        "laplace": (Laplace(order), "add_k"),
        "lidstone": (Lidstone(0.3, order), {"kind": "add_k", "k": 0.3}),
        "stupid_backoff": (StupidBackoff(0.4, order), "stupid_backoff"),
    }[kind]
    theirs.fit(grams, [word for text in words for word in text if word != "0"])
    # Its vocabulary has <UNK> where ours has the begin of a document: the same size, V.
    assert len(theirs.vocab) == vocab_size
    ours = NGramCounts.of(documents, vocab_size, order).model(order, smoothing)
    compared = 0
    for document in [*documents[:3], *[np.concatenate([[0], rng.integers(2, vocab_size, 25), [1]]) for _ in range(3)]]:
        scored = ours.log_probs(document)
        for i in range(max(1, order - 1), len(document)):
            context = [str(t) for t in document[i - order + 1 : i]]
            if kind == "mle" and context and not theirs.counts[context].N():
                continue
            reference = theirs.score(str(document[i]), context or None)
            assert math.exp(scored[i - 1]) == pytest.approx(reference, rel=1e-12, abs=1e-300)
            compared += 1
    assert compared > 60
