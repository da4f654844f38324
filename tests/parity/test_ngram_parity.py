"""Interpolated Kneser-Ney against nltk, where the two definitions coincide: given discounts, full contexts."""

import math

import numpy as np
import pytest
from nltk.lm import KneserNeyInterpolated
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
