"""Minimal pairs: which sentence of two is likelier."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from octavo.errors import DataError
from octavo.eval import minimal_pairs
from octavo.eval.minimal_pairs import Pair
from octavo.tokenizer import train
from octavo.tokenizer.config import Byte

GOOD, BAD = "the mouse ate the cheese", "the cheese ate the mouse"


@pytest.fixture(scope="module")
def tokenizer():
    return train(Byte(), ())


def scorer_of(weight):
    """A scorer whose log-probability of a token is ``weight(document, place)``."""

    def score(documents):
        values = [weight(document, at) for document in documents for at in range(1, len(document))]
        return np.array(values, float), np.zeros(len(values), bool)

    return score


@pytest.mark.rows("X1")
def test_the_sentence_with_the_larger_sum_is_chosen(tokenizer):
    order = {tuple(ids): i for i, ids in enumerate(tokenizer.encode_batch([GOOD, BAD]))}

    def weight(document, at):
        return -1.0 - order[tuple(document[-len(GOOD) :])]

    found = minimal_pairs.score(scorer_of(weight), tokenizer, [Pair(GOOD, BAD, "a"), Pair(BAD, GOOD, "b")])
    assert (found.n, found.right, found.accuracy) == (2, 1.0, 0.5)
    assert found.groups == {"a": (1.0, 1), "b": (0.0, 1)}


def test_a_model_that_knows_nothing_is_right_half_the_time(tokenizer):
    found = minimal_pairs.score(scorer_of(lambda *_: -2.0), tokenizer, [Pair(GOOD, BAD)] * 3)
    assert found.figures()["accuracy"] == 0.5
    low, high = found.figures()["interval_95"]
    assert low < 0.5 < high


def test_longer_sentences_are_less_likely_where_all_tokens_are_equal(tokenizer):
    assert minimal_pairs.score(scorer_of(lambda *_: -2.0), tokenizer, [Pair("ab", "abc")]).accuracy == 1


def test_files_folders_and_archives_hold_the_same_pairs(tmp_path):
    row = {"sentence_good": GOOD, "sentence_bad": BAD, "field": "syntax"}
    text = json.dumps(row) + "\n" + json.dumps({"good": "a b", "bad": "b a"}) + "\n"
    (tmp_path / "word_order.jsonl").write_text(text, encoding="utf-8")
    archive = tmp_path / "pairs.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("data/word_order.jsonl", text)
        made.writestr("__MACOSX/data/._word_order.jsonl", b"\x00\x05\x16\xff")
    expected = [Pair(GOOD, BAD, "word_order"), Pair("a b", "b a", "word_order")]
    assert minimal_pairs.read([tmp_path / "word_order.jsonl"]) == expected
    assert minimal_pairs.read([tmp_path]) == expected
    assert minimal_pairs.read([archive]) == expected
    assert minimal_pairs.read([archive], at_most=1) == expected[:1]


def test_some_of_a_file_are_spread_over_all_of_it(tmp_path):
    rows = [json.dumps({"good": str(i), "bad": "x"}) for i in range(10)]
    (tmp_path / "many.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert [pair.good for pair in minimal_pairs.read([tmp_path], at_most=5)] == ["0", "2", "4", "6", "8"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"sentence_good": "a"}\n', "p:1 is no pair"),
        (b'{"good": "a", "bad": "b"}\nnot json\n', "p:2 is no pair"),
        (b"\xff\xfe", "is not UTF-8 text at byte 0"),
        (b"", "no minimal pairs"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, content, said):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said):
        minimal_pairs.read([tmp_path / "p.jsonl"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        minimal_pairs.read([tmp_path / "nowhere.jsonl"])
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(DataError, match=r"broken\.zip"):
        minimal_pairs.read([tmp_path / "broken.zip"])
