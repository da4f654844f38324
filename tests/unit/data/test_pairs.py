"""Pairs from files and made ones, as rows; damaged texts and what mends them: counts, statistics, repeatability."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.data.denoising import (
    InfilledRows,
    PrefixRows,
    SpanRows,
    corrupt_spans,
    infill,
    permute_sentences,
    sentinels,
)
from octavo.data.made_pairs import MADE
from octavo.data.pack import Packed, PackReport, Piece
from octavo.data.pairs import PairRows, PairsConfig, read
from octavo.errors import ConfigError, DataError
from octavo.tokenizer import Byte, train

MARK = -1  # a sentinel or mask in the plain tests


class Texts(Packed):
    """Rows of letters without end, the last slots of every third empty."""

    def __init__(self, n_rows: int = 6, seq_len: int = 40):
        self.n_rows, self.seq_len, self.fingerprint = n_rows, seq_len, "texts"

    def rows(self, epoch, index):
        tokens = 97 + (np.asarray(index)[:, None] * 7 + np.arange(self.seq_len) ** 2) % 26
        valid = np.arange(self.seq_len) < np.where(np.asarray(index) % 3 == 2, 30, self.seq_len)[:, None]
        return {"tokens": tokens, "valid": valid}

    def pieces(self, epoch, number):
        return [Piece(0, self.seq_len, self.seq_len, number, 0, self.seq_len)]

    def report(self):
        return PackReport(self.n_rows, 0, 0, 0.0, self.n_rows)


@pytest.mark.rows("A4")
def test_made_pairs_are_the_same_everywhere_and_right():
    for name, make in MADE.items():
        pairs = make(3, 300)
        assert pairs == make(3, 300) != make(4, 300)
        assert len(dict(pairs)) == 300, name
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    for said, iso in MADE["dates"](1, 400):
        year, month, day = iso.split("-")
        assert year in said and months[int(month) - 1] in said and str(int(day)) in said
    for table, said in MADE["tables"](1, 200):
        cells = dict(cell.split("=") for cell in table.split(" | "))
        assert f"{cells['sky']} in {cells['city']}" in said
        assert f"between {cells['low']} and {cells['high']} degrees" in said
        assert (f"at {cells['wind']} km/h" in said) == (int(cells["wind"]) >= 20)
    assert all(word[::-1] == back for word, back in MADE["reverse"](1, 50))


def test_files_of_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"en": "dog", "de": "Hund", "more": 1}\n\n{"en": "cat", "de": "Katze"}\n')
    (tmp_path / "b.tsv").write_text("red\trot\nblue\tblau\n")
    config = PairsConfig(files=(str(tmp_path / "a.jsonl"),), source_key="en", target_key="de")
    assert [(p.source, p.target) for p in read(config)] == [("dog", "Hund"), ("cat", "Katze")]
    both = PairsConfig(files=(str(tmp_path / "b.tsv"),))
    assert [(p.source, p.target) for p in read(both)] == [("red", "rot"), ("blue", "blau")]
    before = both.fingerprint()
    (tmp_path / "b.tsv").write_text("red\trot\nblue\n")
    assert both.fingerprint() != before
    with pytest.raises(DataError, match=r"1 fields, a pair has two") as refused:
        read(both)
    assert "b.tsv:2" in str(refused.value)
    with pytest.raises(DataError, match="no pair: 'source'"):
        read(PairsConfig(files=(str(tmp_path / "a.jsonl"),)))
    with pytest.raises(ValueError, match="give one of files and made"):
        PairsConfig()


def test_a_pair_is_a_row():
    rows = PairRows([([5, 6], [7, 8, 2]), ([5], [9, 2]), ([1] * 9, [4, 2]), ([5], [3] * 9)], 1, 4, 5, pad=0)
    assert (rows.n_rows, rows.dropped, rows.seq_len, rows.numbers) == (2, 2, 3, [0, 1])
    batch = rows.rows(0, np.array([1, 0]))
    assert batch["tokens"].tolist() == [[1, 9, 0], [1, 7, 8]]
    assert batch["targets"].tolist() == [[9, 2, 0], [7, 8, 2]]
    assert batch["loss_mask"].tolist() == batch["valid"].tolist() == [[True, True, False], [True] * 3]
    assert batch["doc_ids"].tolist() == [[0, 0, -1], [0, 0, 0]]
    assert batch["source"].tolist() == [[5, 0], [5, 6]]
    assert batch["source_valid"].tolist() == [[True, False], [True] * 2]
    assert rows.fingerprint != PairRows([([5, 6], [7, 8, 2]), ([5], [9, 3])], 1, 4, 5).fingerprint
    with pytest.raises(DataError, match="none of 1 pairs fits"):
        PairRows([([1] * 9, [2])], 1, 4, 5)


def mended(source: list[int], target: list[int], marks: list[int]) -> list[int]:
    """A text out of what was kept and what the sentinels stand for."""
    spans, current = {}, None
    for token in target:
        if token in marks:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    out = []
    for token in source:
        out += spans.pop(token) if token in marks else [token]
    assert not spans
    return out


@pytest.mark.rows("A4")
@pytest.mark.parametrize("n", [2, 3, 7, 40, 512])
def test_spans_are_taken_and_can_be_put_back(n):
    marks = list(range(900, 1000))
    ids = np.arange(n) % 400
    for seed in range(20):
        source, target = corrupt_spans(np.random.default_rng(seed), ids, marks, 0.15, 3.0)
        assert mended(source.tolist(), target.tolist(), marks) == ids.tolist()
        n_noise = min(max(round(n * 0.15), 1), n - 1)
        n_spans = sum(token in marks for token in source.tolist())
        assert n_spans == max(1, round(n_noise / 3))
        assert len(target) == n_noise + n_spans and len(source) == n - n_noise + n_spans
        assert [t for t in source.tolist() if t in marks] == marks[:n_spans]
        assert source[0] not in marks


def test_spans_lie_anywhere_and_have_any_length():
    rng, n = np.random.default_rng(0), 60
    taken, lengths = np.zeros(n), []
    for _ in range(3000):
        _, target = corrupt_spans(rng, np.arange(n), [900, 901, 902, 903], 0.15, 3.0)
        text = target.tolist()
        taken[[t for t in text if t < n]] += 1
        lengths += [len(part) for part in "".join("|" if t >= n else "x" for t in text).split("|")[1:]]
    assert np.mean(lengths) == 3.0 and {1, 2, 3, 4, 5} <= set(lengths)
    share = taken / 3000
    assert share.mean() == pytest.approx(0.15) and taken[0] == 0
    assert share[10:50].min() > 0.08 and share[10:50].max() < 0.22


@pytest.mark.rows("A4")
def test_infilling_takes_its_share_in_poisson_spans():
    rng, ids, gone, masks = np.random.default_rng(0), np.arange(200), [], []
    for _ in range(400):
        out = infill(rng, ids, MARK, 0.3, 3.0)
        kept = out[out != MARK]
        assert (np.diff(kept) > 0).all()  # in order, nothing twice
        gone.append(200 - len(kept))
        masks.append(int((out == MARK).sum()))
        assert not ((out[1:] == MARK) & (out[:-1] == MARK)).any()
    assert set(gone) == {60}
    assert 17 < np.mean(masks) < 25  # 60 tokens in spans of 3 on average, those of none among them
    assert infill(rng, np.arange(2), MARK, 0.3, 3.0).tolist() in ([MARK, 1], [0, MARK])


def test_sentences_change_places_whole():
    ends = np.zeros(30, bool)
    ends[9] = True
    ids = np.array([1, 9, 2, 3, 9, 4, 9])
    seen = {tuple(permute_sentences(np.random.default_rng(s), ids, ends)) for s in range(60)}
    assert len(seen) == 6
    assert (2, 3, 9, 1, 9, 4, 9) in seen


@pytest.mark.rows("A4")
def test_damaged_rows_are_a_function_of_seed_pass_and_row():
    tokenizer = train(Byte(), []).with_mask()
    V = tokenizer.vocab_size
    named = tokenizer.with_sentinels(3)
    assert sentinels(named, 0) == [V, V + 1, V + 2] and named.with_sentinels() is named
    assert named.decode([V, 102]) == "a"
    with pytest.raises(ConfigError, match=r"model.vocab_size"):
        sentinels(tokenizer, V)
    made = {"spans": SpanRows(Texts(), tokenizer, 0, V + 50), "infilling": InfilledRows(Texts(), tokenizer, 0)}
    for name, rows in made.items():
        again = type(rows)(Texts(), tokenizer, 0, **({"vocab_size": V + 50} if name == "spans" else {}))
        index = np.array([4, 2, 0])
        one, same, alone = rows.rows(1, index), again.rows(1, index), rows.rows(1, np.array([2]))
        for field, value in one.items():
            assert (value == same[field]).all() and (value[1:2] == alone[field]).all(), field
        assert (one["source"] != rows.rows(2, index)["source"]).any()
        assert rows.fingerprint == again.fingerprint
        plain = Texts().rows(0, index)
        for row in range(3):
            text = plain["tokens"][row][plain["valid"][row]].tolist()
            source = one["source"][row][one["source_valid"][row]].tolist()
            target = one["targets"][row][one["valid"][row]].tolist()
            assert source.pop() == target.pop() == tokenizer.special.eos
            assert one["tokens"][row][0] == 0
            if name == "spans":
                assert mended(source, target, rows.sentinels) == text
            else:
                assert target == text and tokenizer.special.mask in source


@pytest.mark.rows("A5")
def test_a_prefix_ends_anywhere_in_its_document_and_is_not_learnt():
    class Two(Texts):
        """Two documents a row, of 10 and 30 slots."""

        def rows(self, epoch, index):
            batch = super().rows(epoch, index)
            valid = np.ones(batch["tokens"].shape, bool)
            learnt = valid.copy()
            learnt[:, 9] = False  # its target is in the next document
            return {**batch, "valid": valid, "loss_mask": learnt}

        def pieces(self, epoch, number):
            return [Piece(0, 10, 10, 2 * number, 0, 10), Piece(10, 30, 30, 2 * number + 1, 0, 30)]

    rows, index = PrefixRows(Two(500), seed=3), np.arange(500)
    batch = rows.rows(1, index)
    prefix, learnt = batch["prefix"], batch["loss_mask"]
    for start, slots in ((0, 10), (10, 30)):
        part = prefix[:, start : start + slots]
        ends = part.sum(1)
        assert (part == (np.arange(slots) < ends[:, None])).all()
        assert set(ends) == set(range(slots))  # one token is always left to foretell
        # the target of slot t is token t + 1: learnt from the last token of the prefix on
        wanted = np.arange(slots) >= np.maximum(ends - 1, 0)[:, None]
        wanted[:, -1] &= start != 0
        assert (learnt[:, start : start + slots] == wanted).all()
    assert (rows.rows(1, index[7:9])["prefix"] == prefix[7:9]).all()
    assert (rows.rows(2, index)["prefix"] != prefix).any()
