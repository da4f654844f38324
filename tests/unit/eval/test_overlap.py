"""Exact match and chrF of written texts."""

from __future__ import annotations

import pytest

from octavo.errors import DataError
from octavo.eval.overlap import chrf, overlap


def test_chrf_of_texts_counted_by_hand():
    assert chrf(["a cat"], ["a cat"]) == chrf(["acat"], ["a  cat"]) == 1.0
    assert chrf(["xyz"], ["abc"]) == chrf([""], ["abc"]) == 0.0
    # "abc" for "abd": 2 of 3 letters, 1 of 2 pairs, none of one triple; precision = recall = (2/3 + 1/2) / 3
    assert chrf(["abc"], ["abd"]) == pytest.approx((2 / 3 + 1 / 2) / 3)
    # "ab" for "abab": precision 1; recall (2/4 + 1/3) / 2 over the two orders both have; F with beta 2
    recall = (2 / 4 + 1 / 3) / 2
    assert chrf(["ab"], ["abab"]) == pytest.approx(5 * recall / (4 + recall))
    # counts are added over the corpus before they are divided
    assert chrf(["a", "b"], ["a", "cccc"]) != pytest.approx((1 + 0) / 2)


def test_overlap_counts_equal_texts():
    found = overlap(["1985-05-04", "x"], ["1985-05-04.", "y"])
    assert (found["pairs"], found["right"], found["exact_match"]) == (2, 1, 0.5)
    assert found["interval_95"][0] < 0.5 < found["interval_95"][1]
    with pytest.raises(DataError):
        overlap([], [])
