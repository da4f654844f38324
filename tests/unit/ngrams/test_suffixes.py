"""N-grams of any length: the suffix array against sorting, the model against tables of a high order."""

import numpy as np
import pytest

from octavo.errors import DataError
from octavo.ngrams import InfiniGram, NGram
from octavo.ngrams.counting import flatten
from octavo.ngrams.suffixes import suffix_array

V = 8


def corpus(n, seed=0, longest=15, largest=6):
    rng = np.random.default_rng(seed)
    return [np.concatenate([[0], rng.integers(2, largest, rng.integers(0, longest)), [1]]) for _ in range(n)]


@pytest.mark.parametrize(
    "text",
    [[3, 1, 4, 1, 5, 9, 2, 6], [1] * 50, [1, 2] * 30 + [0], np.random.default_rng(0).integers(0, 3, 400).tolist(), [7]],
)
def test_suffixes_are_in_order(text):
    expected = sorted(range(len(text)), key=lambda i: text[i:])
    assert suffix_array(np.array(text, np.int32)).tolist() == expected


@pytest.mark.rows("N3")
def test_equals_tables_of_a_high_order():
    """With the longest seen end of a context, relative frequencies of order 16 are the same numbers."""
    documents, test = corpus(80), [*corpus(5), *corpus(30, seed=4, longest=20, largest=8)]
    tables = NGram.fit(NGram.Config(order=16, smoothing="mle"), documents, V)
    model = InfiniGram.fit(InfiniGram.Config(), documents, V)
    for ours, theirs in zip(model.score(*flatten(test)), tables.score(*flatten(test))):
        np.testing.assert_array_equal(ours, theirs)
    contexts = [document[:i] for document in test for i in range(len(document))]
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(
            np.exp(model.next_log_probs_of(contexts)), np.exp(tables.next_log_probs_of(contexts)), atol=1e-12
        )


@pytest.mark.parametrize("longest", [None, 1, 3])
@pytest.mark.parametrize("unseen", [0.0, 0.2])
def test_one_number_however_it_is_asked_for(unseen, longest):
    config = InfiniGram.Config(unseen=unseen, longest=longest)
    model = InfiniGram.fit(config, corpus(60), V)
    test = [*corpus(5), *corpus(20, seed=4, largest=8)]
    log_probs, hits = model.score(*flatten(test))
    np.testing.assert_array_equal(model.log_probs(*flatten(test)), log_probs)
    following = np.stack([model.next_log_probs(document[:i]) for document in test for i in range(1, len(document))])
    targets = np.concatenate([document[1:] for document in test])
    np.testing.assert_allclose(np.exp(following).sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(np.exp(log_probs), np.exp(following[np.arange(len(targets)), targets]), rtol=1e-12)
    np.testing.assert_array_equal(hits, following.argmax(1) == targets)
    assert np.isfinite(log_probs).all() == (unseen > 0)


def test_longest_match():
    documents = [[0, 2, 3, 4, 5, 1], [0, 3, 4, 2, 1]]
    model = InfiniGram.fit(InfiniGram.Config(), documents, V)
    length, times = model.longest_match([0, 2, 3, 4, 2, 7, 5, 1])
    # before 2: [0]; 3: [0 2]; 4: [0 2 3]; 2: [0 2 3 4]; 7: [3 4 2] of the second document; nothing ends in 7.
    assert length.tolist() == [1, 2, 3, 4, 3, 0, 1]
    assert times.tolist() == [2, 1, 1, 1, 1, 9, 1]
    assert model.order == 6
    capped = InfiniGram.fit(InfiniGram.Config(longest=2), documents, V)
    assert capped.longest_match([0, 2, 3, 4, 2, 7, 5, 1])[0].tolist() == [1, 2, 2, 2, 2, 0, 1]


def test_contexts_never_cross_a_document():
    documents = [[0, 2, 3], [0, 4, 5]]
    model = InfiniGram.fit(InfiniGram.Config(), documents, V)
    assert np.exp(model.next_log_probs([3])).tolist() == np.exp(model.next_log_probs([])).tolist()
    # Here the training text has "eos bos" inside a document, so that a context that crossed would be found.
    documents, model = [[0, 2, 3], [0, 4, 5]], InfiniGram.fit(InfiniGram.Config(), [[0, 2, 3, 0, 4, 6], [0, 4, 5]], V)
    apart = np.concatenate([model.log_probs(document) for document in documents])
    np.testing.assert_array_equal(model.log_probs(*flatten(documents)), apart)


def test_refusals():
    with pytest.raises(DataError, match="two tokens"):
        InfiniGram.fit(InfiniGram.Config(), [[0], []], V)
    with pytest.raises(DataError, match="outside the vocabulary of 8"):
        InfiniGram.fit(InfiniGram.Config(), [[0, 8]], V)
    with pytest.raises(DataError, match="outside the vocabulary"):
        InfiniGram.fit(InfiniGram.Config(), [[0, 2]], V).score([0, 99])
