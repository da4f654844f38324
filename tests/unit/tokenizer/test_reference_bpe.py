"""The plain BPE, and what it shows of the notes' example."""

import pytest

from octavo.tokenizer import bpe, trace


@pytest.mark.rows("T3")
def test_the_notes_sentence_traced_step_by_step():
    steps = list(bpe.train_steps({trace.SENTENCE: 1}, 100, min_frequency=2))
    assert [(step.pair, step.count) for step in steps] == [
        (("e", " "), 3),
        (("c", "a"), 2),
        (("h", "e "), 2),
        (("k", " "), 2),
        (("t", " "), 2),
    ]
    counts = bpe.pair_counts([(tuple(trace.SENTENCE), 1)])
    assert counts["t", "h"] == 1  # the notes call it the most frequent (E18)
    assert max(counts.values()) == counts["e", " "] == 3
    assert steps[0].words[0][0][:4] == ("T", "h", "e ", "c")
    assert steps[1].ties == (("h", "e "), ("t", " "), ("k", " "))
    text = "\n".join(trace.compare_note())
    assert "('t', 'h') occurs 1 time" in text
    assert "('e', ' ') occurs 3 times" in text


@pytest.mark.rows("T2")
def test_the_notes_hello_world_needs_the_split_its_vocabulary_gives():
    pieces = trace.longest_match("hello world", trace.HELLO)
    assert pieces == ["he", "llo", " ", "wor", "ld"]  # not he-l-lo wor-l-d (E22)
    assert [trace.HELLO[p] for p in pieces] + [trace.HELLO_EOS] == [101, 102, 100, 104, 105, 200]
    by_id = {i: piece for piece, i in trace.HELLO.items()}
    assert "".join(by_id[i] for i in (101, 102, 100, 104, 105)) == "hello world"
    with pytest.raises(ValueError, match="character 5"):
        trace.longest_match("hello!", trace.HELLO)


@pytest.mark.rows("T3")
def test_ties_go_to_the_smallest_ids():
    first = next(bpe.train_steps({"ba": 1, "ab": 1, "bb": 1}, 1))
    assert first.pair == ("a", "b")
    assert first.ties == (("b", "a"), ("b", "b"))


@pytest.mark.rows("T3")
def test_overlaps_merge_from_the_left():
    assert bpe.merge("aaaaa", ("a", "a")) == ("aa", "aa", "a")
    assert next(bpe.train_steps({"aaaaa": 1}, 9)).count == 4


@pytest.mark.rows("T3")
def test_frequency_cut_off_and_merge_limit():
    words = {"aaab": 3, "cd": 1}
    assert [step.count for step in bpe.train_steps(words, 10, min_frequency=2)] == [6, 3, 3]
    assert len(list(bpe.train_steps(words, 1))) == 1


@pytest.mark.rows("T3")
def test_encoding_takes_the_earliest_merge_first():
    merges = [("b", "c"), ("a", "b"), ("a", "bc")]
    assert list(bpe.encode_steps("abcab", merges)) == [
        ("a", "b", "c", "a", "b"),
        ("a", "bc", "a", "b"),
        ("a", "bc", "ab"),
        ("abc", "ab"),
    ]
    assert bpe.encode("", merges) == ()
