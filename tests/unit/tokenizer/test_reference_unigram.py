"""The plain Unigram model and its twin on arrays."""

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import PROSE

from octavo.errors import DataError
from octavo.tokenizer import unigram
from octavo.tokenizer.unigram_train import train_pieces

WORDS = Counter(PROSE.split()[:1200])
SMALL = st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(1, 5), min_size=1, max_size=8)


def all_splits(word):
    for cuts in itertools.product([False, True], repeat=max(0, len(word) - 1)):
        marks = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(word)]
        yield tuple(word[a:b] for a, b in itertools.pairwise(marks))


def scored_splits(word, scores):
    splits = [(s, sum(scores[p] for p in s)) for s in all_splits(word) if all(p in scores for p in s)]
    return sorted(splits, key=lambda item: (-item[1], item[0]))


@pytest.mark.rows("T5")
def test_ababc_is_ab_ab_c_with_four_twenty_sevenths():
    scores = {"ab": math.log(2 / 3), "c": math.log(1 / 3)}
    path, score = unigram.viterbi("ababc", scores)
    assert path == ("ab", "ab", "c")
    assert math.exp(score) == pytest.approx(4 / 27, abs=1e-15)
    assert math.exp(unigram.log_probability("ababc", scores)) == pytest.approx(4 / 27)
    counts, _ = unigram.expected_counts({"ababc": 1}, scores)
    assert counts == {"ab": pytest.approx(2), "c": pytest.approx(1)}
    assert unigram.maximise(counts) == {piece: pytest.approx(score) for piece, score in scores.items()}


@pytest.mark.rows("T5")
@settings(max_examples=40, deadline=None)
@given(SMALL)
def test_em_never_lowers_the_likelihood(words):
    scores = unigram.seed(words, 20, 5)
    last = -math.inf
    for _ in range(8):
        counts, likelihood = unigram.expected_counts(words, scores)
        assert likelihood >= last - 1e-9 * max(1.0, abs(last))
        last, scores = likelihood, unigram.maximise(counts)


@pytest.mark.rows("T5")
def test_training_shrinks_by_the_share_and_em_rises_between_prunings():
    steps = list(unigram.train_steps(WORDS, 150, seed_size=500, max_chars=8, em_steps=3))
    sizes, rising = [], []
    for step in steps:
        if step.action == "em":
            rising.append(step.log_likelihood)
            assert rising == sorted(rising)
            assert sum(map(math.exp, step.scores.values())) == pytest.approx(1)
        else:
            rising = []
            sizes.append(len(step.scores))
    assert sizes[-1] == 150
    assert all(b == max(150, int(a * 0.8)) for a, b in itertools.pairwise(sizes))
    letters = {char for word in WORDS for char in word}
    assert letters <= set(steps[-1].scores)
    gone = [loss for _, loss in next(step for step in steps if step.action == "prune").removed]
    assert gone == sorted(gone)


@pytest.mark.rows("T5")
@settings(max_examples=60, deadline=None)
@given(st.text("abc", min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_paths_are_those_of_brute_force(word, rng):
    pieces = {"a", "b", "c", *("".join(rng.choices("abc", k=rng.randint(2, 4))) for _ in range(6))}
    scores = {piece: math.log(rng.uniform(0.01, 1)) for piece in sorted(pieces)}
    brute = scored_splits(word, scores)
    found = unigram.n_best(word, scores, 5)
    assert [score for _, score in found] == pytest.approx([score for _, score in brute[:5]])
    assert all(score == pytest.approx(dict(brute)[path]) for path, score in found)
    assert len({path for path, _ in found}) == min(5, len(brute))
    assert unigram.viterbi(word, scores)[1] == pytest.approx(brute[0][1])
    total = math.log(sum(math.exp(score) for _, score in brute))
    assert unigram.log_probability(word, scores) == pytest.approx(total, abs=1e-9)


@pytest.mark.rows("T5")
def test_samples_follow_the_distribution():
    scores = {"a": math.log(0.3), "b": math.log(0.3), "ab": math.log(0.2), "ba": math.log(0.2)}
    rng = random.Random(0)
    for sharpness in (1.0, 0.3):
        weights = {path: math.exp(sharpness * score) for path, score in scored_splits("abab", scores)}
        drawn = Counter(unigram.sample("abab", scores, rng, sharpness=sharpness) for _ in range(4000))
        for path, weight in weights.items():
            assert drawn[path] / 4000 == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_what_cannot_be_spelt_has_no_path():
    assert unigram.viterbi("xyz", {"x": -1.0}) == ((), -math.inf)
    assert unigram.log_probability("xyz", {"x": -1.0}) == -math.inf


@pytest.mark.rows("T5")
@pytest.mark.parametrize("keep", [0.8, 0.6])
def test_arrays_give_what_the_plain_loop_gives(keep):
    *_, last = unigram.train_steps(WORDS, 120, seed_size=400, max_chars=7, keep=keep)
    settings_ = {"seed_size": 400, "max_chars": 7, "keep": keep, "em_steps": 2}
    fast = dict(train_pieces(WORDS, size=120, alphabet_size=1000, train_chars=10**6, **settings_))
    assert fast.keys() == last.scores.keys()
    assert fast == {piece: pytest.approx(score, abs=1e-9) for piece, score in last.scores.items()}


@settings(max_examples=40, deadline=None)
@given(SMALL)
def test_arrays_agree_on_tiny_texts(words):
    *_, last = unigram.train_steps(words, 4, seed_size=50, max_chars=4)
    settings_ = {"seed_size": 50, "max_chars": 4, "keep": 0.8, "em_steps": 2}
    fast = dict(train_pieces(words, size=4, alphabet_size=10, train_chars=10**6, **settings_))
    # Equal losses may break either way after rounding: then the sizes still agree.
    assert len(fast) == len(last.scores)
    assert all(math.isfinite(score) for score in fast.values())


def test_letters_beyond_the_limit_and_long_texts_are_cut():
    settings_ = {"seed_size": 50, "max_chars": 4, "keep": 0.8, "em_steps": 2}
    pieces = dict(
        train_pieces(
            {"aab": 5, "zzz": 1, "aq": 2}, size=9, alphabet_size=2, train_chars=10**6, letters="<x>", **settings_
        )
    )
    assert {"a", "b", "<", "x", ">"} <= set(pieces)
    assert not {"z", "q"} & set("".join(pieces))
    short = dict(train_pieces({"ab": 9, "cd": 1}, size=9, alphabet_size=9, train_chars=2, **settings_))
    assert {"a", "b", "c", "d"} <= set(short)
    assert "cd" not in short
    with pytest.raises(DataError, match="no text"):
        train_pieces({}, size=9, alphabet_size=9, train_chars=9, **settings_)
