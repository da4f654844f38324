"""Spans as conlleval counts them, on cases worked out by hand; figures of tagged sentences."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.eval.tags import are_spans, judge_tags, spans

CASES = [
    ("O O", []),
    ("B-PER I-PER O", [("PER", 0, 2)]),
    ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
    ("I-PER I-PER O I-PER", [("PER", 0, 2), ("PER", 3, 4)]),  # IOB1: no B is needed
    ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),  # IOB1: B only between two of a kind
    ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # another type ends one and begins one
    ("I-LOC I-PER I-PER", [("LOC", 0, 1), ("PER", 1, 3)]),
    ("O I-LOC", [("LOC", 1, 2)]),
    ("B-X E-X S-X O S-X", [("X", 0, 2), ("X", 2, 3), ("X", 4, 5)]),  # IOBES
    ("B-X E-X I-X", [("X", 0, 2), ("X", 2, 3)]),  # nothing goes on after an end
    ("S-X I-X E-X", [("X", 0, 1), ("X", 1, 3)]),
    ("B-X I-X L-X U-X", [("X", 0, 3), ("X", 3, 4)]),  # BILOU
    ("B M E S B E", [("", 0, 3), ("", 3, 4), ("", 4, 6)]),  # words of Chinese
    ("B-a-b I-a-b I-a", [("a-b", 0, 2), ("a", 2, 3)]),  # a type may have a stroke
]


@pytest.mark.rows("A2")
@pytest.mark.parametrize(("tags", "wanted"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_spans_by_hand(tags, wanted):
    assert spans(tags.split()) == wanted


def test_which_tags_are_of_spans():
    assert are_spans(("O", "B-X", "I-X")) and are_spans(("B", "M", "E", "S"))
    assert not are_spans(("O", "NOUN")) and not are_spans(("0", "1")) and not are_spans(("O", "E-X"))


NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def numbers(text: str) -> list[int]:
    return [NAMES.index(tag) for tag in text.split()]


@pytest.mark.rows("A2")
def test_figures_of_tags_by_hand():
    """Three spans are right of six said and four given: precision 3/6, recall 3/4, F1 6/10."""
    given = ["B-PER I-PER O B-LOC", "B-PER O", "O B-LOC I-LOC"]
    said = ["B-PER I-PER O B-LOC", "B-PER B-PER", "B-LOC B-LOC O"]
    found = judge_tags([numbers(tags) for tags in given], [numbers(tags) for tags in said], NAMES)
    assert (found["sentences"], found["words"]) == (3, 9)
    assert found["accuracy"] == pytest.approx(6 / 9) and found["majority_accuracy"] == pytest.approx(3 / 9)
    whole = found["spans"]
    assert (whole["right"], whole["said"], whole["given"]) == (3, 6, 4)
    assert whole["precision"] == 0.5 and whole["recall"] == 0.75 and whole["f1"] == pytest.approx(6 / 10)
    low, high = whole["f1_interval_95"]
    assert 0 <= low < whole["f1"] < high <= 1
    assert found["types"]["LOC"]["f1"] == pytest.approx(2 / 5) and found["types"]["PER"]["precision"] == pytest.approx(
        2 / 3
    )
    table = np.array(found["confusion"])
    assert table.sum() == 9 and np.trace(table) == 6 and table[0].tolist() == [1, 1, 0, 1, 0]


def test_spans_do_not_cross_sentences_and_none_at_all_is_no_success():
    found = judge_tags([numbers("B-PER"), numbers("I-PER")], [numbers("B-PER"), numbers("I-PER")], NAMES)
    assert found["spans"]["right"] == 2
    nothing = judge_tags([numbers("O O")], [numbers("O O")], NAMES)
    assert nothing["spans"]["f1"] == 0.0 and nothing["accuracy"] == 1.0 and nothing["types"] == {}


def test_parts_of_speech_have_accuracy_and_macro_f1_but_no_spans():
    found = judge_tags([[0, 1, 1], [0]], [[0, 1, 0], [0]], ("NOUN", "VERB"))
    assert "spans" not in found and found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
