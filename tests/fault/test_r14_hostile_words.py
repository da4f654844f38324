"""R14: any text becomes ids and comes back, a word of a megabyte costs what its length explains, no text is special.

The reference is the plain twin in ``octavo.tokenizer.bpe``, fed by a splitter and a table of bytes written here.
"""

from __future__ import annotations

import json
import random
import time
from functools import cache, partial
from pathlib import Path

import pytest
import regex
from boxed import SCALE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.tokenizer import BPE, SPECIALS, Byte, ByteBPE, Character, Tokenizer, Unigram, Word, WordPiece, bpe, train

TEXTS, REFERENCED, SEED = 5_000 * SCALE, 2_000 * SCALE, 14
PER_EXAMPLE = 10
CORPUS = Path(__file__).parents[1] / "corpus" / "r14"
SOURCE = [
    Path(json.__file__).read_text(encoding="utf-8"),
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少？" * 4,
    "naïve café — Привет, мир! 👩‍🚀 e\u0301 12345 67 don't we'll\r\n\t  x",
    "0123456789ABCDEF <0x>" * 3,
]
KINDS = {
    "byte_bpe": ByteBPE(vocab_size=600),
    "byte_bpe gpt2": ByteBPE(vocab_size=500, split="gpt2"),
    "byte_bpe llama3": ByteBPE(vocab_size=500, split="llama3", digits="run"),
    "byte_bpe spaces": ByteBPE(vocab_size=500, split="spaces", digits="three"),
    "byte": Byte(),
    "bpe with bytes": BPE(vocab_size=800, byte_fallback=True, alphabet_size=80),
    "unigram with bytes": Unigram(vocab_size=700, byte_fallback=True, alphabet_size=80, seed_size=3000),
    "bpe": BPE(vocab_size=400),
    "unigram": Unigram(vocab_size=400, seed_size=3000),
    "wordpiece": WordPiece(vocab_size=400),
    "word": Word(vocab_size=2000),
    "character": Character(),
}
EXACT = [name for name in KINDS if "byte" in name]
QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
near = st.lists(
    st.sampled_from(
        [
            *[*SPECIALS, "<|unk|>", "<0x0A>", "<0xE4>", "##a", "the ", "\n\n", " ", "  ", "\r\n", "你好", "<|", "|>"],
            *["don't", "123", "\0", "\ufeff", "\ufffd", "\u200d", "e\u0301", "👩\u200d🚀", "\U0010ffff", "\x85"],
            *["\u2028", "Ġ", "Ċ", "aaaa", "ß"],
        ]
    ),
    max_size=8,
).map("".join)
texts = st.lists(anything | near, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE)


@cache
def tokenizer(kind: str) -> Tokenizer:
    return train(KINDS[kind], SOURCE)


def lost(kind: str, text: str) -> str:
    """What is wrong with a text's way to ids and back, if anything."""
    one = tokenizer(kind)
    if kind not in ("byte",) and not kind.startswith("byte_bpe"):
        text = text.replace("▁", " ")  # their one stated exception
    ids = one.encode(text)
    if one.decode(ids) != text or one.decode_bytes(ids) != text.encode():
        return f"{kind}: {text!r} comes back as {one.decode(ids)!r}"
    if not all(0 <= i < one.vocab_size for i in ids) or one.special_ids & set(ids):
        return f"{kind}: {text!r} gives {ids}"
    if b"".join(map(one.token_bytes, ids)) != text.encode():
        return f"{kind}: the tokens of {text!r} do not spell it"
    stream = one.stream()
    if "".join([*map(stream.push, ids), stream.flush()]) != text:
        return f"{kind}: streamed, {text!r} is another text"
    return ""


@pytest.mark.parametrize("kind", EXACT)
def test_any_text_comes_back(kind, record):
    tried, failures = 0, []

    @settings(max_examples=TEXTS // PER_EXAMPLE // len(EXACT), **QUIET)
    @given(texts)
    def holds(batch):
        nonlocal tried
        tried += len(batch)
        assert not (found := next(filter(None, (lost(kind, text) for text in batch)), "")), found
        arrays = tokenizer(kind).encode_batch(batch)
        alone = [tokenizer(kind).encode(text) for text in batch]
        assert [array.tolist() for array in arrays] == alone, "a batch is encoded in another way"

    try:
        holds()
    except AssertionError as error:
        failures = [str(error)[:500]]
    record("R14", tried, failures, seed="derandomized", kind=kind)


def test_what_once_went_wrong(record):
    files = sorted(CORPUS.glob("*.json"))
    cases = [(kind, text) for file in files for text in json.loads(file.read_text()) for kind in EXACT]
    record("R14", max(len(cases), 1), [found for kind, text in cases if (found := lost(kind, text))], attacks="corpus")


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_special(kind, record):
    """Neither alone nor as the content of a message: there the template's own specials are all there are."""
    one, failures, tried = tokenizer(kind), [], 0
    unknown = {one.special.unk}
    empty = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    expected = [i for i in one.render(empty).ids if i in one.special_ids - unknown]

    @settings(max_examples=60 * SCALE, **QUIET)
    @given(near, near)
    def holds(asked, answered):
        nonlocal tried
        tried += 2
        assert not (one.special_ids - unknown) & set(one.encode(asked)), f"{kind}: {asked!r}"
        told = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        found = [i for i in one.render(told).ids if i in one.special_ids - unknown]
        assert found == expected, f"{kind}: {asked!r}, {answered!r} as messages give {found}"

    try:
        holds()
    except AssertionError as error:
        failures = [str(error)[:500]]
    record("R14", tried, failures, seed="derandomized", attacks="injection", kind=kind)


# ------------------------------------------------------------------------------------------- reference

LETTERS = {"one": r"\p{N}", "three": r"\p{N}{1,3}", "run": r"\p{N}+"}
MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|N| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "byte_bpe": MODERN.replace("|N|", f"|{LETTERS['one']}|"),
    "byte_bpe gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "byte_bpe llama3": MODERN.replace("|N|", f"|{LETTERS['run']}|"),
}


def stand_ins() -> dict[int, str]:
    """GPT-2's printable character for each byte, written anew."""
    found, free = {}, 256
    for byte in range(256):
        if chr(byte).isprintable() and byte not in (0x20, 0xAD) and (byte < 0x7F or byte > 0xA0):
            found[byte] = chr(byte)
        else:
            found[byte], free = chr(free), free + 1
    return found


@pytest.mark.parametrize("kind", SPLITS)
def test_ids_are_those_of_the_plain_reference(kind, record):
    one, table = tokenizer(kind), stand_ins()
    spec = json.loads(one.to_json())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in spec["merges"]]
    pattern, cache_, chance, failures = regex.compile(SPLITS[kind]), {}, random.Random(SEED), []
    n = REFERENCED // len(SPLITS)
    words = [
        *"the The import 1 2024 don't é 你 好。 👩\u200d🚀 ... _x <|eos|> 'LL ſ".split(),
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
    ]
    for _ in range(n):
        if chance.random() < 0.5:
            text = "".join(chance.choices(words, k=chance.randrange(12)))
        else:
            planes = (range(128), range(0x2FFF), range(0x1F000, 0x1FAFF))
            text = "".join(chr(chance.choice(chance.choice(planes))) for _ in range(chance.randrange(25)))
        expected = []
        for word in pattern.findall(text):
            symbols = "".join(table[byte] for byte in word.encode())
            if symbols not in cache_:
                cache_[symbols] = [spec["vocab"][piece] for piece in bpe.encode(symbols, merges)] if symbols else []
            expected += cache_[symbols]
        if one.encode(text) != expected:
            failures.append(f"{kind}: {text!r} gives {one.encode(text)}, the reference {expected}")
    record("R14", n, failures, seed=SEED, attacks="reference", kind=kind)


# ------------------------------------------------------------------------------------------- long words

MEBIBYTE = 1 << 20
WORDS = {
    "one letter": "a",
    "a syllable": "the",
    "letters in turn": "abcdefghijklmnopqrstuvwxyz",
    "digits": "0123456789",
    "Chinese": "春眠不觉晓",
    "combining marks": "e\u0301\u0302",
    "emoji": "👩‍🚀",
    "spaces": " ",
    "line ends": "\r\n",
    "punctuation": "<|!?",
    "specials": "<|im_end|>",
    "NUL": "\0",
}


def seconds(work, text: str, times: int = 1) -> float:
    best = float("inf")
    for _ in range(times):
        began = time.process_time()
        work(text)
        best = min(best, time.process_time() - began)
    return best


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_of_a_megabyte_costs_what_its_length_explains(kind, record):
    """Four times the text may take nine times as long: n log n takes 4.4 times, n^2 sixteen."""
    one, failures = tokenizer(kind), []
    chance = random.Random(SEED)
    chosen = list(WORDS) if SCALE > 1 else chance.sample(list(WORDS), 2 if kind.startswith("byte") else 1)
    for name in chosen:
        unit = WORDS[name]
        long = unit * (MEBIBYTE // len(unit.encode()))
        short = long[: len(long) // 4]
        quarter, whole = seconds(one.encode, short, 2), seconds(one.encode, long)
        if whole > 9 * quarter + 0.1:
            failures.append(f"{kind}, {name}: {quarter:.3f} s for a quarter, {whole:.3f} s for all")
        if kind in EXACT and one.decode(one.encode(short)) != short:
            failures.append(f"{kind}, {name}: another text comes back")
    record("R14", len(chosen), failures, seed=SEED, attacks="long words", kind=kind)


def test_training_on_a_word_of_a_megabyte_ends(record):
    """Each merge walks through the piece it is in: pieces are capped."""
    failures = []
    for config in (ByteBPE(vocab_size=300), BPE(vocab_size=60), Unigram(vocab_size=60, seed_size=500)):
        work = partial(_train_on, config)
        quarter, whole = (seconds(work, "abcab" * (size // 5)) for size in (MEBIBYTE // 4, MEBIBYTE))
        if whole > 9 * quarter + 0.5:
            failures.append(f"{config.kind}: {quarter:.2f} s for a quarter, {whole:.2f} s for all")
    record("R14", 3, failures, attacks="training on a long word")


def _train_on(config, text: str) -> None:
    train(config, [text])
