"""Every smoothing: numbers by hand, the sum over the vocabulary, one number however it is asked for."""

import math

import numpy as np
import pytest

from octavo.errors import ConfigError, DataError
from octavo.ngrams import NGram, NGramCounts
from octavo.ngrams.backing_off import SMOOTHINGS, good_turing, learn_weights
from octavo.ngrams.counting import flatten

KINDS = [kind for kind in SMOOTHINGS if kind != "arpa"]
NORMALISED = [kind for kind in KINDS if kind != "stupid_backoff"]
V = 12


def corpus(n_documents, seed=0, longest=20, largest=9):
    rng = np.random.default_rng(seed)
    return [np.concatenate([[0], rng.integers(2, largest, rng.integers(0, longest)), [1]]) for _ in range(n_documents)]


def fit(kind, order, documents=None, **settings):
    config = NGram.Config(order=order, smoothing=kind, **settings)
    return NGram.fit(config, documents or corpus(200), V, corpus(30, seed=1))


@pytest.mark.rows("N1", "N2", "N3", "N4")
@pytest.mark.parametrize("never", [None, 0])
@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("kind", NORMALISED)
def test_sums_to_one_after_seen_and_unseen_contexts(kind, order, never):
    model = fit(kind, order, never=never)
    contexts = [[], [0], [0, 3], [3, 4, 5], [11, 11, 11], [4, 11, 3], [1, 1], *(d[:5] for d in corpus(20)[:9])]
    with np.errstate(divide="ignore"):
        following = model.next_log_probs_of(contexts)
    assert model.normalised
    np.testing.assert_allclose(np.exp(following).sum(1), 1, atol=1e-12)
    if never is not None:
        assert (following[:, never] == -math.inf).all()
    for context, row in zip(contexts, following):
        np.testing.assert_array_equal(model.next_log_probs(context), row)


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_hits_are_those_of_the_distributions(kind, order):
    model = fit(kind, order)
    documents = [*corpus(6), *corpus(10, seed=5, largest=12)]
    log_probs, hits = model.score(*flatten(documents))
    np.testing.assert_array_equal(log_probs, model.log_probs(*flatten(documents)))
    contexts = [document[:i] for document in documents for i in range(1, len(document))]
    targets = np.concatenate([document[1:] for document in documents])
    following = model.next_log_probs_of(contexts)
    own = following[np.arange(len(targets)), targets]
    np.testing.assert_allclose(np.exp(log_probs), np.exp(own), rtol=1e-12)
    top = np.exp(own) >= np.exp(following).max(1) - 1e-13
    alone = (np.exp(following) >= np.exp(following).max(1, keepdims=True) - 1e-13).sum(1) == 1
    assert (hits <= top).all()
    assert (hits[alone] == top[alone]).all()


@pytest.mark.rows("N1")
def test_students_opened_their():
    """The notes' example: of 1000 times "students opened their", 400 went on with books and 100 with exams."""
    students, opened, their, books, exams, other = 2, 3, 4, 5, 6, 7
    documents = [[0, students, opened, their, last, 1] for last in [books] * 400 + [exams] * 100 + [other] * 500]
    model = fit("mle", 4, documents)
    following = np.exp(model.next_log_probs([0, students, opened, their]))
    assert (following[books], following[exams]) == pytest.approx((0.4, 0.1), rel=1e-15)


@pytest.mark.rows("N2")
def test_laplace_and_lidstone_by_hand():
    documents = [[0, 2, 3, 1], [0, 2, 4, 1], [0, 2, 3, 1]]
    laplace = np.exp(fit({"kind": "add_k"}, 2, documents).next_log_probs([0, 2]))
    assert (laplace[3], laplace[4], laplace[5]) == pytest.approx((3 / 15, 2 / 15, 1 / 15))
    half = np.exp(fit({"kind": "add_k", "k": 0.5}, 2, documents).next_log_probs([0, 2]))
    assert (half[3], half[5]) == pytest.approx((2.5 / 9, 0.5 / 9))
    assert (laplace > 0).all()
    np.testing.assert_allclose(np.exp(fit("add_k", 2, documents).next_log_probs([9])), 1 / V)


@pytest.mark.parametrize("kind", ["stupid_backoff", "katz"])
def test_the_best_token_is_searched_for_where_back_off_contradicts_it(kind):
    """After 2 ten tokens came once each, 11 among them; elsewhere 11 is nearly everything. After 2 it is one of ten."""
    documents = [*([0, 2, token] for token in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11)), [0, *[11] * 200]]
    model = fit(kind, 2, documents)
    best = int(model.next_log_probs([0, 2]).argmax())
    hits = {token: bool(model.score([0, 2, token])[1][1]) for token in range(V)}
    assert hits == {token: token == best for token in range(V)}
    assert best != 11


@pytest.mark.rows("N3")
def test_stupid_backoff_by_hand_says_that_it_is_not_normalised():
    model = fit("stupid_backoff", 3, [[0, 2, 3, 1], [0, 2, 4, 1]])
    assert model.normalised is False
    after = np.exp(model.next_log_probs([0, 2]))
    # 0 2 is followed by 3 and 4, once each; 1 is a third of the tokens predicted, two orders down.
    assert (after[3], after[1], after[2]) == pytest.approx((0.5, 0.16 / 3, 0.16 / 3))
    assert after.sum() != pytest.approx(1)


def test_trap_e2_a_bigram_is_order_two_and_only_some_smoothings_sum_to_one():
    """The notes call a trigram n = 2 and print add-k and back-off as if they were distributions.

    A bigram sees one token of context; back-off goes from h to h without its first token; plain back-off sums to
    something else than 1, and says so.
    """
    documents = corpus(100)
    for kind in NORMALISED:
        bigram = fit(kind, 2, documents)
        np.testing.assert_array_equal(bigram.next_log_probs([5, 4, 3]), bigram.next_log_probs([3]))
        assert not np.array_equal(bigram.next_log_probs([4]), bigram.next_log_probs([3]))
    backoff = fit("stupid_backoff", 3, documents)
    unseen = backoff.next_log_probs([11, 3])  # the longest seen end is [3]: 0.4 times what comes after that
    np.testing.assert_allclose(np.exp(unseen), 0.4 * np.exp(backoff.next_log_probs([3])))
    sums = {kind: np.exp(fit(kind, 3, documents).next_log_probs([11, 3])).sum() for kind in KINDS}
    assert {kind for kind, total in sums.items() if abs(total - 1) > 1e-9} == {"stupid_backoff"}


@pytest.mark.rows("N3")
def test_katz_by_hand():
    n = np.array([0, 100, 40, 20, 10, 5, 2, 1, 0, 0, 0, 0])
    factors = good_turing(n, 3)
    common = 4 * 10 / 100
    assert factors[1:] == pytest.approx([((c + 1) * n[c + 1] / n[c] / c - common) / (1 - common) for c in (1, 2, 3)])
    assert good_turing(np.zeros(12), 3)[1:] == pytest.approx([0.5, 0.75, 2.5 / 3])  # no text to estimate from
    model = fit("katz", 2, corpus(8))
    counts = NGramCounts.of(corpus(8), V, 2)
    discounts = model.said["discounts"][1]
    after, lower = np.exp(model.next_log_probs([3])), np.exp(model.next_log_probs([]))
    keys = counts.levels[1].keys
    here = keys // V == 3
    seen, raw = keys[here] % V, counts.levels[1].raw[here]
    factor = np.array([discounts[c - 1] if c <= len(discounts) else 1.0 for c in raw])
    np.testing.assert_allclose(after[seen], factor * raw / raw.sum())
    unseen = np.setdiff1d(np.arange(V), seen)
    np.testing.assert_allclose(after[unseen] / lower[unseen], (1 - after[seen].sum()) / lower[unseen].sum())


def test_katz_leaves_something_where_no_count_is_small():
    """Every count above the discounted ones: the total is raised by one, and unseen tokens share 1 / (total + 1)."""
    documents = [[0, 2, 3, 1]] * 20
    after = np.exp(fit({"kind": "katz", "largest": 5}, 2, documents).next_log_probs([0, 2]))
    assert after[3] == pytest.approx(20 / 21)
    assert after.sum() == pytest.approx(1)


@pytest.mark.rows("N3")
@pytest.mark.parametrize("seed", range(4))
def test_em_never_lowers_the_held_out_likelihood(seed):
    documents = [*corpus(40, seed), [0, *([2, 3, 4, 5] * 40), 1]]
    held_out = [*corpus(10, seed + 10), [0, *([2, 3, 4, 5] * 9), 1]]
    counts = NGramCounts.of(documents, V, 4)
    model = NGram.of_counts(NGram.Config(order=4, smoothing="interpolated"), counts, held_out)
    trace = [-nats for nats in model.said["held_out_nats_per_token"]]
    assert len(trace) > 3
    assert all(after >= before - 1e-12 for before, after in zip(trace, trace[1:]))
    assert trace[-1] > trace[0]
    assert model.log_probs(*flatten(held_out)).mean() == pytest.approx(trace[-1], abs=1e-6)
    best = np.array(model.said["weights"])
    for k in range(4):  # no weight nearby is better
        for change in (-0.03, 0.03):
            weights = best.copy()
            weights[k] = np.clip(weights[k] + change, 0, 0.999)
            other = {"kind": "interpolated", "weights": tuple(weights)}
            assert counts.model(4, other).log_probs(*flatten(held_out)).mean() <= trace[-1] + 1e-5


def test_em_finds_the_weights_a_text_was_drawn_with():
    rng = np.random.default_rng(0)
    probs = np.stack([np.full(20000, 0.1), rng.uniform(0, 0.9, 20000)])
    # Tokens drawn with p = 0.7 probs[1] + 0.3 probs[0], by keeping each with that probability.
    kept = rng.random(20000) < 0.7 * probs[1] + 0.3 * probs[0]
    weights, _ = learn_weights(np.ones((2, kept.sum()), bool), probs[:, kept], 200)
    likelihood = [np.log(m * probs[1, kept] + (1 - m) * probs[0, kept]).mean() for m in np.linspace(0, 0.999, 1000)]
    assert weights[0] == pytest.approx(np.linspace(0, 0.999, 1000)[np.argmax(likelihood)], abs=0.02)


def test_trap_e20_log_perplexity_has_a_minus_sign():
    """The notes' log-perplexity loses its minus, and its code is "of length 1/q(x)": it is log2(1/q(x)) bits long."""
    model = fit("modified_kneser_ney", 2)
    document = corpus(1, seed=3)[0]
    log_probs = model.log_probs(document)
    perplexity = math.exp(-log_probs.mean())
    assert perplexity > 1
    bits = np.log2(1 / np.exp(log_probs)).sum()
    assert 2 ** (bits / len(log_probs)) == pytest.approx(perplexity)
    uniform = fit("add_k", 2, [[0, 2, 1]])
    assert math.exp(-uniform.log_probs([9, 8])[0]) == pytest.approx(V)


def test_refusals():
    with pytest.raises(ConfigError, match="was given none"):
        NGram.fit(NGram.Config(smoothing="interpolated"), corpus(5), V)
    with pytest.raises(ConfigError, match="do not serve order 3"):
        fit({"kind": "interpolated", "weights": [0.5]}, 3)
    with pytest.raises(ConfigError, match="do not serve order 3"):
        fit({"kind": "kneser_ney", "discounts": [0.5]}, 3)
    with pytest.raises(ConfigError, match="read, not fitted"):
        fit("arpa", 2)
    with pytest.raises(DataError, match="never predicted"):
        fit("mle", 2, never=3)
    with pytest.raises(ValueError, match="add_k"):
        NGram.Config(smoothing={"kind": "nonsense"})
    with pytest.raises(DataError, match="outside the vocabulary"):
        fit("mle", 2).next_log_probs([99])
