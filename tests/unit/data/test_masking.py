"""Masked rows: what is chosen and changed, by statistics and by hand, and what it depends on."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.data import show
from octavo.data.loader import Loader
from octavo.data.masking import MaskedRows
from octavo.data.pack import WholeRows
from octavo.errors import ConfigError
from octavo.laws.loader import partitioned, resumed
from octavo.tokenizer import Tokenizer, train
from octavo.tokenizer.config import ByteBPE, WordPiece

TEXT = "the quick brown fox jumps over the lazy dog, and unbelievably the dog does not mind it at all. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(ByteBPE(vocab_size=300), [TEXT * 20]).with_mask()


def rows_of(tokenizer: Tokenizer, n: int = 120, seq_len: int = 128, **settings) -> MaskedRows:
    ids = tokenizer.encode(TEXT * 12)
    samples = [
        ([tokenizer.special.bos, *ids[i : i + 90], tokenizer.special.eos], [1] * 92) for i in range(n)
    ]  # fmt: skip
    return MaskedRows(WholeRows(samples, seq_len, pad=tokenizer.special.pad), tokenizer, **settings)


def chi_square(seen: list[float], expected: list[float]) -> float:
    return float(sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True)))


@pytest.mark.rows("A1")
def test_the_shares_are_those_asked_for(tokenizer):
    """15 % chosen; of them 80, 10 and 10 %: chi-square with 3 degrees of freedom, 16.3 is one in a thousand."""
    rows, plain = rows_of(tokenizer), rows_of(tokenizer).packed
    index = np.arange(rows.n_rows)
    got, was = rows.rows(0, index), plain.rows(0, index)
    usual = was["valid"] & ~np.isin(was["tokens"], list(tokenizer.special_ids))
    n, chosen = usual.sum(), got["loss_mask"]
    hidden = chosen & (got["tokens"] == tokenizer.special.mask)
    same = chosen & (got["tokens"] == was["tokens"])
    other = chosen & ~hidden & ~same
    usual_ids = len(rows.replacements)
    shares = [0.85, 0.15 * 0.8, 0.15 * 0.1 * (1 - 1 / usual_ids), 0.15 * 0.1 * (1 + 1 / usual_ids)]
    seen = [float((usual & ~chosen).sum()), float(hidden.sum()), float(other.sum()), float(same.sum())]
    assert sum(seen) == n > 9000
    assert chi_square(seen, [share * n for share in shares]) < 16.3
    assert not (chosen & ~usual).any()
    assert np.array_equal(got["targets"], was["tokens"])
    assert np.array_equal(got["tokens"][~chosen], was["tokens"][~chosen])


@pytest.mark.rows("A1")
def test_what_replaces_a_token_is_drawn_evenly_from_all_that_are_not_special(tokenizer):
    rows = rows_of(tokenizer, 300, probability=1.0, mask=0.0, random=1.0)
    got = rows.rows(0, np.arange(rows.n_rows))
    drawn = got["tokens"][got["loss_mask"]]
    assert not np.isin(drawn, list(tokenizer.special_ids)).any()
    counts = np.bincount(drawn, minlength=tokenizer.vocab_size)[rows.replacements]
    k = len(counts)
    assert chi_square(counts.tolist(), [len(drawn) / k] * k) < k + 4 * (2 * k) ** 0.5


@pytest.mark.rows("A1")
def test_dynamic_masking_changes_with_the_pass_and_static_does_not(tokenizer):
    index = np.arange(50)
    for static in (False, True):
        rows = rows_of(tokenizer, static=static)
        one, two = rows.rows(0, index), rows.rows(1, index)
        assert np.array_equal(one["loss_mask"], two["loss_mask"]) == static
        assert np.array_equal(one["tokens"], two["tokens"]) == static
        again = rows_of(tokenizer, static=static).rows(0, index)
        assert all(np.array_equal(one[name], again[name]) for name in one)
        other = rows_of(tokenizer, static=static, seed=1).rows(0, index)
        assert not np.array_equal(one["loss_mask"], other["loss_mask"])


def test_dynamic_choices_of_two_passes_are_independent(tokenizer):
    rows, index = rows_of(tokenizer), np.arange(120)
    one, two = (rows.rows(epoch, index)["loss_mask"] for epoch in (0, 1))
    usual = rows.rows(0, index)["valid"].sum()
    both = float((one & two).sum())
    expected = usual * 0.15**2
    assert abs(both - expected) < 5 * expected**0.5


@pytest.mark.rows("A1")
def test_a_static_mask_belongs_to_the_text_however_rows_are_cut(tokenizer):
    def masks(seq_len: int) -> dict[tuple[int, int], bool]:
        rows = rows_of(tokenizer, 40, seq_len, static=True)
        batch = rows.rows(0, np.arange(rows.n_rows))
        return {
            (piece.number, piece.offset + k): bool(batch["loss_mask"][row, piece.start + k])
            for row in range(rows.n_rows)
            for piece in rows.pieces(0, row)
            for k in range(piece.slots)
        }

    one, two = masks(128), masks(320)
    assert one == two and any(one.values())


def test_words_are_chosen_whole():
    tokenizer = train(WordPiece(vocab_size=60), [TEXT * 20]).with_mask()
    ids = tokenizer.encode(TEXT * 4)
    on = np.array([(tokenizer.tokens[i] or "").startswith("##") for i in ids])
    assert on.any()
    rows = MaskedRows(WholeRows([(ids, [1] * len(ids))] * 30, len(ids)), tokenizer, whole_words=True)
    batch = rows.rows(0, np.arange(30))
    on = on[: batch["tokens"].shape[1]][: len(ids) - 1]
    for chosen in batch["loss_mask"][:, : len(on)]:
        assert np.array_equal(chosen[1:][on[1:]], chosen[:-1][on[1:]])
    share = batch["loss_mask"][:, : len(on)].mean()
    assert 0.08 < share < 0.25


def test_words_of_byte_pieces_begin_at_spaces_and_signs(tokenizer):
    rows = rows_of(tokenizer, 2, whole_words=True)
    assert rows.words is not None
    ids = np.array([[i for text in (" dog", ",", " un", "b", "el") for i in tokenizer.encode(text)]])
    texts = [tokenizer.token_bytes(i).decode() for i in ids[0]]
    begin = rows.words.begin(ids, np.zeros_like(ids), np.arange(ids.shape[1])[None])
    for k in range(1, len(texts)):
        joined = texts[k][0].isalnum() and texts[k - 1][-1].isalnum()
        assert (begin[0, k] == begin[0, k - 1]) == joined, texts[k]


@pytest.mark.rows("A1")
def test_batches_are_a_function_of_their_step(tokenizer):
    loader = Loader(rows_of(tokenizer), 12, seed=3)
    resumed(loader, 6)
    partitioned(loader, 4)
    assert loader.fingerprint != Loader(rows_of(tokenizer, probability=0.3), 12, seed=3).fingerprint


def test_what_is_hidden_is_shown_with_what_is_asked_for(tokenizer):
    loader = Loader(rows_of(tokenizer), 2, seed=3)
    rows = show.rows_of(loader.batch(0), loader.places(0, 2), tokenizer)
    shown = [token for row in rows for part in row.parts for token in part.tokens]
    trained = [token for token in shown if token.state == "trained"]
    assert len(trained) == int(loader.batch(0)["loss_mask"].sum())
    assert any(token.special.startswith("<|mask|>|") for token in trained)
    assert "<|mask|>|" in show.to_plain(rows, "document")


def test_a_tokenizer_without_a_mask_token_is_refused():
    plain = train(ByteBPE(vocab_size=300), [TEXT * 20])
    with pytest.raises(ConfigError, match="no mask token"):
        MaskedRows(WholeRows([([6, 7, 8], [1, 1, 1])], 8), plain)


def test_a_mask_token_is_added_behind_all_others(tmp_path):
    plain = train(ByteBPE(vocab_size=300), [TEXT * 20])
    more = plain.with_mask()
    assert more.special.mask == plain.vocab_size and more.vocab_size == plain.vocab_size + 1
    assert more.with_mask() is more
    assert more.encode(TEXT) == plain.encode(TEXT)
    assert more.special.mask not in more.encode("a <|mask|> b")
    assert more.hash != plain.hash
    more.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.special == more.special and again.hash == more.hash
