"""Text to ids and back, for every kind."""

import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import CHINESE, KINDS, LOSSLESS, MIXED, TEXTS, trained

from octavo.errors import DataError
from octavo.tokenizer import BPE, SPECIALS, Byte, Character, Existing, Unigram, Word, WordPiece, train

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PIECES = st.lists(
    st.sampled_from([*SPECIALS, "<|unk|>", "<0x0A>", "▁", "##a", "the ", "\n\n", "你好", "<|"]), max_size=8
)


@pytest.mark.rows("T1", "T4")
@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_kinds_return_any_text(make, kind):
    tokenizer = make(kind)

    @settings(max_examples=150, deadline=None)
    @given(TEXT | PIECES.map("".join))
    def holds(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(len(tokenizer.token_bytes(i)) for i in ids) == len(text.encode())
        assert all(5 <= i < tokenizer.vocab_size for i in ids)

    holds()


@pytest.mark.rows("T1", "T4")
@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=80))
def test_byte_kind_holds_any_bytes(raw):
    tokenizer = BYTE
    ids = [5 + byte for byte in raw]
    assert tokenizer.decode_bytes(ids) == raw
    assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")


BYTE = train(Byte(), [])


@pytest.mark.rows("T4")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_for_any_ids(data):
    kind = data.draw(st.sampled_from(list(KINDS)))
    tokenizer = trained(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip_special=skip)
    parts = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(parts) == tokenizer.decode(ids, skip_special=skip)
    assert tokenizer.decode_bytes(ids).decode(errors="replace") == tokenizer.decode(ids)


@pytest.mark.rows("T4")
def test_stream_gives_whole_characters_only():
    stream = BYTE.stream()
    out = [stream.push(5 + byte) for byte in "é你👩".encode()]
    assert out == ["", "é", "", "", "你", "", "", "", "👩"]
    assert stream.push(5 + 0xE4) == ""
    assert stream.push(5 + ord("x")) == "\ufffdx"
    assert stream.push(5 + 0xE4) == ""
    assert stream.flush() == "\ufffd"


@pytest.mark.rows("T1")
def test_known_text_comes_back_as_far_as_the_kind_allows(any_tokenizer, request):
    tokenizer, kind = any_tokenizer, request.node.callspec.params["any_tokenizer"]
    for text in [CHINESE, "def f(x):\n    return x", "naïve café — Привет, мир!"]:
        back = tokenizer.decode(tokenizer.encode(text))
        if kind in ("wordpiece", "word-whitespace"):  # white space is not kept, and cleanup moves punctuation
            known = [i != tokenizer.special.unk for i in tokenizer.encode(text)]
            if all(known):
                assert "".join(back.split()) == "".join(text.split())
        elif tokenizer.special.unk not in tokenizer.encode(text):
            assert back == text
    assert tokenizer.decode([]) == tokenizer.decode(tokenizer.encode("")) == ""


@pytest.mark.rows("T1")
def test_byte_fallback_makes_bpe_and_unigram_lossless(make):
    for kind in ("bpe-bytes", "unigram-bytes"):
        tokenizer = make(kind)
        for text in ["ጤና ይስጥልኝ 龘 \x00<0x0A><0xFF>\u2028 x", MIXED, " two  spaces ", "<0x41>", "\n"]:
            ids = tokenizer.encode(text)
            assert tokenizer.special.unk not in ids
            assert tokenizer.decode(ids) == text
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"  # the one stated exception


@pytest.mark.rows("T1")
def test_words_are_those_of_str_split(make):
    tokenizer = make("word-whitespace")
    text = " wrap  a paragraph\tof text\n"
    assert [tokenizer.token_text(i) for i in tokenizer.encode(text)] == text.split()
    assert tokenizer.decode(tokenizer.encode(text)) == "wrap a paragraph of text"


@pytest.mark.rows("T1")
def test_characters_are_code_points(make):
    tokenizer = make("character")
    assert [tokenizer.token_text(i) for i in tokenizer.encode("é知\r\n")] == list("é知\r\n")


@pytest.mark.rows("T2")
def test_specials_have_their_ids_and_unknown_words_the_unk_id(any_tokenizer):
    special = any_tokenizer.special
    assert (special.pad, special.bos, special.eos, special.turn_start, special.turn_end) == (0, 1, 2, 3, 4)
    assert any_tokenizer.tokens[:5] == SPECIALS
    assert special.unk in (None, 5)
    if special.unk is not None:
        unknown = train(KINDS["word"].model_copy(update={"vocab_size": 20}), TEXTS).encode("zyxwv")
        assert unknown == [5]
    assert all(any_tokenizer.token_bytes(i) == b"" for i in any_tokenizer.special_ids)
    assert any_tokenizer.decode([1, 2, 0]) == ""
    assert any_tokenizer.decode_bytes([1, 2, 0]) == b""


@pytest.mark.rows("T2")
def test_special_text_is_plain_unless_parsed(any_tokenizer):
    for name in any_tokenizer.special_text.values():
        for text in [name, f"the {name} end", f"{name}{name}", f"<{name}>", f" {name}"]:
            plain = any_tokenizer.encode(text)
            assert not (any_tokenizer.special_ids - {any_tokenizer.special.unk}) & set(plain)
            if any_tokenizer.special.unk not in plain and "##" not in str(any_tokenizer.tokens):
                assert any_tokenizer.decode(plain) == text
            assert any_tokenizer.tokens.index(name) in any_tokenizer.encode(text, parse_special=True)
    text = "the cat is here, at 10:30."
    assert any_tokenizer.encode(text) == any_tokenizer.encode(text, parse_special=True)


def test_a_piece_that_spells_a_special_is_never_learnt_as_one():
    flood = ["<|im_end|> <|im_end|><|im_end|> x<|eos|>y "] * 50
    for kind in (*KINDS.values(), Word(split="whitespace")):
        if isinstance(kind, Byte):
            continue
        tokenizer = train(kind, [*flood, "a b c"])
        ids = tokenizer.encode("<|im_end|> x<|eos|>y <|im_start|> <|unk|>")
        assert not (tokenizer.special_ids - {tokenizer.special.unk}) & set(ids), kind


@pytest.mark.rows("T2")
def test_batches_equal_single_texts(any_tokenizer):
    texts = [*TEXTS, "", "<|im_end|>", MIXED]
    batch = any_tokenizer.encode_batch(texts)
    assert all(ids.dtype == np.int32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [any_tokenizer.encode(text) for text in texts]
    assert any_tokenizer.encode_batch([]) == []


def test_training_again_gives_the_same_file(any_tokenizer, request):
    config = KINDS[request.node.callspec.params["any_tokenizer"]]
    assert train(config, iter(TEXTS)).to_json() == any_tokenizer.to_json()
    assert any_tokenizer.vocab_size <= getattr(config, "vocab_size", 261)


def test_training_in_another_process_gives_the_same_file(make):
    # Hash tables are seeded per process: order must not leak out of them.
    code = (
        "from tokenizer_texts import *; from octavo.tokenizer import train; import hashlib\n"
        "for kind in ('bpe', 'unigram', 'wordpiece', 'word', 'byte_bpe'):\n"
        "    print(kind, hashlib.sha256(train(KINDS[kind], TEXTS).to_json().encode()).hexdigest())"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=__file__[: __file__.rindex("/")],
        ).stdout
        for _ in range(2)
    }
    assert len(outs) == 1


def test_text_order_and_special_text_do_not_matter_to_the_size():
    config = KINDS["byte_bpe"]
    assert train(config, ["aaaa " * 50]).vocab_size < config.vocab_size  # nothing more to merge


@pytest.mark.parametrize("config", [KINDS["byte_bpe"], BPE(), Unigram(), WordPiece(), Word(), Character()])
def test_no_text_and_no_unicode_are_refused(config):
    with pytest.raises(DataError, match="no text"):
        train(config, [])
    with pytest.raises(DataError, match="surrogate"):
        train(config, ["fine", "a\ud800b"])


def test_bad_text_and_bad_ids_are_refused_by_place(make):
    tokenizer = make("byte_bpe")
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ok", text])):
        with pytest.raises(DataError, match=r"character 2 is the lone surrogate U\+DC80"):
            call("ab\udc80")
    with pytest.raises(DataError, match="not int"):
        tokenizer.encode(3)
    for ids in ([600], [-1], [2**40]):
        with pytest.raises(DataError, match=r"outside the vocabulary 0\.\.599"):
            tokenizer.decode(ids)


def test_pickled_tokenizer_is_the_same(make):
    tokenizer = make("byte_bpe")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    assert copy.special == tokenizer.special
    assert copy.encode(MIXED) == tokenizer.encode(MIXED)


def test_hash_tells_tokenizers_apart(make):
    hashes = {make(kind).hash for kind in KINDS}
    assert len(hashes) == len(KINDS)
    assert train(KINDS["byte_bpe"], TEXTS).hash == make("byte_bpe").hash


def test_normalisation_is_what_it_says():
    tokenizer = train(BPE(vocab_size=100, normalize="nfkc_lower"), ["Ａbc ﬁn e\u0301"] * 3)
    assert tokenizer.decode(tokenizer.encode("Ａbc ﬁn e\u0301")) == unicodedata.normalize("NFKC", "Ａbc ﬁn é").lower()


def test_digits_are_cut_as_configured(make):
    from octavo.tokenizer import ByteBPE

    many = ["2024 2024 2024 1234567 1234567"] * 20
    pieces = {}
    for digits in ("one", "three", "run"):
        tokenizer = train(ByteBPE(vocab_size=400, digits=digits), many)
        pieces[digits] = [tokenizer.token_text(i) for i in tokenizer.encode("1234567")]
    assert pieces == {"one": list("1234567"), "three": ["123", "456", "7"], "run": ["1234567"]}


def test_training_cuts_endless_pieces():
    from octavo.tokenizer import ByteBPE

    word = "ab" * 50_000
    tokenizer = train(ByteBPE(vocab_size=300, max_piece_chars=16), [word] * 2)
    assert max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)) == 16
    assert tokenizer.decode(tokenizer.encode(word)) == word


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "unigram", "wordpiece"])
def test_one_endless_word_takes_linear_time(make, kind):
    import time

    tokenizer = make(kind)
    tokenizer.encode("warm up")

    def seconds(n):
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            tokenizer.encode("wrap" * (n // 4))
            best = min(best, time.process_time() - start)
        return best

    assert seconds(1_000_000) <= 3 * seconds(500_000) + 0.02


def test_existing_is_loaded(make, tmp_path):
    make("byte_bpe").save(tmp_path)
    assert train(Existing(path=str(tmp_path)), []).hash == make("byte_bpe").hash


def test_import_is_free_of_torch_and_the_fast_libraries():
    heavy = ("torch", "tokenizers", "transformers")
    code = f"import sys, octavo.tokenizer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
