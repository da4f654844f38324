import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.data.pack import FIELDS, StreamRows, WholeRows, best_fit
from octavo.data.shards import Shards
from octavo.errors import DataError

PAD = 9


class MemoryShards(Shards):
    """Shards whose documents are given: every token is a different number."""

    def __init__(self, lengths):
        self.folder, self.fingerprint, self.special = "memory", f"{lengths}", {"pad": PAD, "bos": 1, "eos": 2}
        self.n_documents, self.n_tokens = len(lengths), sum(lengths)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = np.arange(1000, 1000 + self.n_tokens)

    def stream(self, start, stop):
        assert 0 <= start <= stop <= self.n_tokens
        return self.tokens[start:stop]


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=20).filter(lambda x: sum(x) > 1)


def owner(shards, tokens):
    return np.searchsorted(shards.offsets, tokens - 1000, side="right") - 1


def check_row(row, shards):
    valid, ids = row["valid"], row["doc_ids"]
    assert ((ids >= 0) == valid).all()
    assert (row["tokens"][~valid] == PAD).all() and not row["loss_mask"][~valid].any()
    assert (np.diff(valid.astype(int)) <= 0).all()  # padding only at the end
    learnt = row["loss_mask"].astype(bool)
    # No target of another document, and exactly the next token.
    assert (row["targets"][learnt] == row["tokens"][learnt] + 1).all()
    assert (owner(shards, row["targets"][learnt]) == owner(shards, row["tokens"][learnt])).all()
    # Document ids say which document a token is of; positions count on within a piece.
    owners = owner(shards, row["tokens"][valid])
    change = np.diff(owners) != 0
    assert (np.diff(ids[valid]) == change).all() and (ids[valid][0] == 0)
    assert row["positions"][0] == 0
    expected = np.where(change, 0, row["positions"][valid][:-1] + 1)
    assert (row["positions"][valid][1:] == expected).all()


@settings(max_examples=120, deadline=None)
@given(lengths, st.integers(1, 50), st.integers(0, 3), st.booleans())
def test_every_token_but_the_first_of_a_document_is_a_target_exactly_once(sizes, seq_len, epoch, shuffle):
    shards = MemoryShards(sizes)
    packed = StreamRows(shards, seq_len, seed=3, shuffle=shuffle)
    batch = packed.rows(epoch, np.arange(packed.n_rows))
    assert tuple(batch) == FIELDS and all(a.shape == (packed.n_rows, seq_len) for a in batch.values())
    targets = np.sort(batch["targets"][batch["loss_mask"]])
    wanted = np.delete(shards.tokens, shards.offsets[:-1])
    assert targets.tolist() == wanted.tolist()
    for r in range(packed.n_rows):
        check_row({name: values[r] for name, values in batch.items()}, shards)
    report = packed.report()
    assert report.targets == len(wanted) and report.rows == packed.n_rows
    assert report.padded_share == pytest.approx(1 - batch["valid"].mean() if not batch["valid"].all() else 0, abs=1e-9)


def test_documents_follow_each_other_anew_in_every_epoch_and_a_part_stays_a_part():
    shards = MemoryShards([7] * 30)
    packed = StreamRows(shards, 10, documents=range(5, 25), seed=1)
    index = np.arange(packed.n_rows)
    first, second = packed.rows(0, index), packed.rows(1, index)
    assert (first["tokens"] != second["tokens"]).any()
    assert (packed.rows(0, index)["tokens"] == first["tokens"]).all()
    for batch in (first, second):
        owners = owner(shards, batch["tokens"][batch["valid"]])
        assert set(owners) == set(range(5, 25))
    kept = StreamRows(shards, 10, shuffle=False)
    assert kept.rows(4, np.array([0]))["tokens"][0].tolist() == list(range(1000, 1010))


def test_documents_that_lie_across_rows_are_counted():
    assert StreamRows(MemoryShards([5, 5, 5]), 5, shuffle=False).report().split == 0
    assert StreamRows(MemoryShards([11, 5]), 5, shuffle=False).report().split == 1
    report = StreamRows(MemoryShards([4, 4]), 100).report()
    assert report.rows == 1 and report.padded_share == pytest.approx(0.92)


def test_too_little_text_for_a_row_is_an_error():
    with pytest.raises(DataError, match="too few"):
        StreamRows(MemoryShards([1]), 8)


samples = st.lists(
    st.integers(2, 30).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)), min_size=1, max_size=25
)


@settings(max_examples=120, deadline=None)
@given(samples, st.integers(4, 40))
def test_samples_stay_whole_and_only_what_is_marked_is_learnt(masks, seq_len):
    starts = np.cumsum([0, *map(len, masks)])[:-1] + 1000
    given_samples = [(list(range(s, s + len(m))), m) for s, m in zip(starts, masks, strict=True)]
    wanted = {s + j for s, m in zip(starts, masks, strict=True) for j in range(1, min(len(m), seq_len + 1)) if m[j]}
    if not wanted:
        with pytest.raises(DataError, match="token to learn from"):
            WholeRows(given_samples, seq_len, pad=PAD)
        return
    packed = WholeRows(given_samples, seq_len, pad=PAD)
    batch = packed.rows(0, np.arange(packed.n_rows))
    assert sorted(batch["targets"][batch["loss_mask"]].tolist()) == sorted(wanted)
    shards = MemoryShards([len(m) for m in masks])
    for r in range(packed.n_rows):
        row = {name: values[r] for name, values in batch.items()}
        check_row(row, shards)
        firsts = row["tokens"][(row["positions"] == 0) & row["valid"]]
        assert set(firsts) <= set(starts)  # never a piece from the middle
    report = packed.report()
    kept = [m for m in masks if any(m[1 : seq_len + 1])]
    assert report.samples == len(masks) and report.dropped == len(masks) - len(kept)
    assert report.truncated == sum(len(m) > seq_len + 1 for m in masks)
    assert report.targets == len(wanted)
    assert report.padded_share == pytest.approx(1 - batch["valid"].mean())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=60))
def test_best_fit_puts_every_item_in_one_bin_and_never_opens_one_too_many(lengths):
    bins = best_fit(lengths, 64)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in b) for b in bins]
    assert all(f <= 64 for f in fill)
    # First- and best-fit decreasing need at most 11/9 of the best possible, and 6/9 of a bin (Dosa 2007).
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 64) + len([x for x in lengths if x > 32]) + 1
    assert sum(f <= 32 for f in fill) <= 1


def test_best_fit_by_hand():
    assert best_fit([5, 7, 3, 5, 2], 10) == [[1, 2], [0, 3], [4]]
    assert best_fit([6, 7, 3], 10) == [[1, 2], [0]]  # there was room for the 3 with the 6 too, but more of it
