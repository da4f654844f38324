"""Whatever `encode_batch` runs on, its ids are those of `tokenizers`."""

import importlib.util
import json
import random
import sys
import types
import unicodedata

import numpy as np
import pytest
from tokenizer_texts import CODE, PROSE, TEXTS, trained

from octavo.errors import DataError
from octavo.tokenizer import ByteBPE, Tokenizer, fast, train
from octavo.tokenizer.core import WORTH_FASTER
from octavo.tokenizer.train import split_pattern

SCANNED = ("byte_bpe", "byte_bpe-gpt2", "byte_bpe-llama3")
needs_fastokens = pytest.mark.skipif(
    importlib.util.find_spec("fastokens") is None, reason="fastokens is not installed (pip install 'octavo[fast]')"
)
SPACES = [
    chr(c) for c in (9, 10, 11, 12, 13, 28, 32, 0x85, 0xA0, 0x1680, 0x180E, 0x2003, 0x2028, 0x200B, 0x3000, 0xFEFF)
]
MARKS = [chr(c) for c in range(0x10000) if unicodedata.category(chr(c)).startswith("M")]
NUMBERS = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)).startswith("N")]
ENDINGS = ("'s", "'S", "'t", "'re", "'LL", "'ve", "'\u017f", "'d", "'m", "\u2019s", "''", "' ", "'\u017ft")
WORDS = [*PROSE.split(" "), *CODE.split("\n")]
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<|im_", "<think>")


def spec_of(kind="byte_bpe"):
    return json.loads(trained(kind).to_json())


def rebuilt(spec) -> Tokenizer:
    return Tokenizer(json.dumps(spec))


@pytest.fixture(scope="module")
def scanned():
    """One tokenizer for each allowed way to cut, and what can be said about their models."""
    llama3 = train(ByteBPE(vocab_size=600, split="llama3"), TEXTS)
    made = {"qwen2": trained("byte_bpe"), "gpt2": trained("byte_bpe-gpt2"), "llama3": llama3}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made["gpt2 as released"] = rebuilt({**spec_of("byte_bpe-gpt2"), "pre_tokenizer": level})
    spec = json.loads(llama3.to_json())
    spec["model"]["ignore_merges"] = True
    made["whole pieces first"] = rebuilt(spec)
    made["nfc"] = rebuilt({**spec_of(), "normalizer": {"type": "NFC"}})
    spec = spec_of()
    think = {"content": "<think>", "single_word": False, "lstrip": False, "rstrip": False, "special": False}
    n = max(spec["model"]["vocab"].values()) + 1
    spec["added_tokens"] += [{**think, "id": n, "normalized": False}]
    spec["added_tokens"] += [{**think, "id": n + 1, "content": "don't ", "normalized": True}]
    made["added words"] = rebuilt(spec)
    return made


def random_text(rng: random.Random) -> str:
    def unit():
        match rng.randrange(12):
            case 0:
                return rng.choice(SPACES) * rng.choice((1, 1, 2, 3, 40))
            case 1:
                return chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
            case 2:
                return rng.choice(ENDINGS)
            case 3:
                return rng.choice(MARKS)
            case 4:
                return "".join(rng.choices(NUMBERS if rng.random() < 0.3 else "0123456789", k=rng.randrange(1, 9)))
            case 5:
                return "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(rng.randrange(1, 12)))
            case 6:
                return rng.choice(SPECIALS)
            case 7:
                return rng.choice("!?-_=/.,;:()[]{}<>|\\\"'`~@#$%^&*+") * rng.randrange(1, 6)
            case 8:
                return chr(rng.randrange(0x1F300, 0x1FAFF)) + rng.choice(("", "\u200d", "\ufe0f"))
            case _:
                return rng.choice((" ", "")) + rng.choice(WORDS)

    return "".join(unit() for _ in range(rng.randrange(24)))


def assert_same(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encoder  # looked for, however small the texts are
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), tokenizer._encode_all(texts), strict=True):
        assert ours.dtype == theirs.dtype == np.int32
        assert ours.tolist() == theirs.tolist(), text[:200]


# ---- what is used ----


@needs_fastokens
def test_the_allowed_ways_to_cut_run_on_fastokens(scanned):
    assert {name: t.encoder for name, t in scanned.items() if not t.encoder.startswith("fastokens 0.3.")} == {}
    assert {split_pattern(ByteBPE(split=s)) for s in ("gpt2", "qwen2", "llama3")} == {  # pyright: ignore[reportArgumentType]
        fast.GPT2,
        fast.QWEN2,
        fast.LLAMA3,
    }


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("byte_bpe-spaces", "how it cuts text"),
        ("byte_bpe-llama3", "how it cuts text"),  # digits: run
        ("bpe", "does not have every byte"),
        ("bpe-bytes", "byte_fallback"),
        ("unigram", "it is Unigram"),
        ("wordpiece", "it is WordPiece"),
        ("character", "it is WordLevel"),
    ],
)
def test_the_others_say_why_not(kind, why):
    tokenizer = trained(kind)
    assert tokenizer.encoder.startswith("tokenizers: ") and why in tokenizer.encoder
    assert_same(tokenizer, TEXTS[:20])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s["model"].update(dropout=0.1), "dropout"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"), "how it cuts"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "how it cuts"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "how it cuts"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "how it cuts"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\W"), "how it cuts"),
        (lambda s: s.update(pre_tokenizer=None), "how it cuts"),
        (
            lambda s: s["added_tokens"].append(
                {"id": 600, "content": "zq!ab", "single_word": True, "lstrip": False, "rstrip": False}
                | {"normalized": False, "special": False}
            ),
            "a way of its own",
        ),
    ],
)
def test_what_was_not_compared_is_not_used(change, why):
    spec = spec_of()
    change(spec)
    assert why in rebuilt(spec).encoder


def test_it_must_be_there_and_of_a_version_that_was_compared(monkeypatch):
    spec = json.dumps(spec_of())
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert "fastokens is not there" in Tokenizer(spec).encoder
    monkeypatch.setitem(sys.modules, "fastokens", types.ModuleType("fastokens"))
    for version in ("0.3.4", "0.4.0", "0.3.5rc1", "1.0"):
        monkeypatch.setattr(fast, "fastokens_version", lambda version=version: version)
        tokenizer = Tokenizer(spec)
        assert tokenizer.encoder == f"tokenizers: fastokens {version} was not compared"
        assert_same(tokenizer, TEXTS[:3])


class Panic(BaseException):
    """As the bindings raise it."""


def pretend(monkeypatch, encode):
    """A module that looks like fastokens and encodes by ``encode(reference ids, text)``."""
    module = types.ModuleType("fastokens")

    class Fake:
        def __init__(self, text):
            self.twin = Tokenizer(text)

        @classmethod
        def from_json_str(cls, text):
            return cls(text)

        def encode_batch_flat(self, texts):
            made = [encode(ids, text) for ids, text in zip(self.twin._encode_all(texts), texts)]
            offsets = np.cumsum([0, *map(len, made)]).astype(np.uint64)
            return np.concatenate([*made, []]).astype(np.uint32).tobytes(), offsets.tobytes()

    module.Tokenizer = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastokens", module)
    monkeypatch.setattr(fast, "fastokens_version", lambda: "0.3.9")
    return Tokenizer(json.dumps(spec_of()))


def test_one_other_id_anywhere_on_the_probe_and_it_is_not_used(monkeypatch):
    assert pretend(monkeypatch, lambda ids, text: ids).encoder == "fastokens 0.3.9"
    differs = {
        "vowel separator": lambda ids, text: ids[:-1] if "\u180e" in text else ids,
        "digits": lambda ids, text: ids[::-1] if "٣٤٥" in text else ids,
        "long runs": lambda ids, text: np.append(ids, 7) if " " * 3000 in text else ids,
        "one token": lambda ids, text: np.where(ids == 590, 591, ids),  # seen in the probe of the vocabulary only
    }
    for what, encode in differs.items():
        tokenizer = pretend(monkeypatch, encode)
        assert tokenizer.encoder == "tokenizers: its ids differ on the probe", what
        assert_same(tokenizer, ["a\u180eb 12 ٣٤٥", *TEXTS[:3]])


@needs_fastokens
def test_the_probe_tells_the_regular_expressions_from_the_scanners(monkeypatch):
    """U+180E before a contraction: white space to the engine that runs patterns without a scanner."""
    tokenizer = train(ByteBPE(vocab_size=600, split="gpt2"), [*TEXTS, "it's that's let's Bob's " * 20])
    assert Tokenizer(tokenizer.to_json()).encoder.startswith("fastokens")
    monkeypatch.setattr(fast, "_splitter", lambda step: step)  # the pattern as it stands, not in the scanner's form
    assert Tokenizer(tokenizer.to_json()).encoder == "tokenizers: its ids differ on the probe"


def test_what_it_fails_at_later_is_encoded_as_usual(monkeypatch):
    def panics(ids, text):
        if "boom" in text:
            raise Panic("index out of bounds")
        return ids

    tokenizer = pretend(monkeypatch, panics)
    assert tokenizer.encoder == "fastokens 0.3.9"
    assert_same(tokenizer, ["a boom", "b"])


def test_a_faster_encoder_is_made_when_it_is_worth_it(monkeypatch):
    asked = []
    tokenizer = pretend(monkeypatch, lambda ids, text: asked.append(text) or ids)
    tokenizer.encode_batch(["small"] * 100)
    assert not asked
    tokenizer.encode_batch(["large " * (WORTH_FASTER // 6 + 1)])
    assert asked[-1].startswith("large")
    tokenizer.encode_batch(["small"])
    assert asked[-1] == "small"


def test_a_text_that_is_none_is_refused_in_words(scanned):
    for tokenizer in scanned.values():
        assert tokenizer.encoder
        with pytest.raises(DataError, match=r"U\+D800"):
            tokenizer.encode_batch(["fine", "a\ud800b"])
        with pytest.raises(DataError, match="must be a string"):
            tokenizer.encode_batch(["fine", None])  # type: ignore[list-item]
        assert tokenizer.encode_batch([]) == []
        assert [len(ids) for ids in tokenizer.encode_batch(["", "", "a"])] == [0, 0, 1]


# ---- the same ids ----


@needs_fastokens
def test_5000_random_texts(scanned):
    rng = random.Random(5)
    texts = [random_text(rng) for _ in range(5000)]
    assert len({char for text in texts for char in text}) > 5000
    for tokenizer in scanned.values():
        assert_same(tokenizer, texts)


@needs_fastokens
def test_real_text_and_long_runs(scanned):
    """Texts beyond every size at which the work may be cut among threads."""
    long = [*TEXTS, PROSE * 5 + CODE * 5, "中文" * 9000, "a" * 40_000, "x " * 30_000]
    for run in (" ", "\n", "-", "é", "7", " \n", "'s", "\u3000"):
        long += [CODE[:5000] + run * n + PROSE[:5000] for n in (1025, 20_000)]
    for name in ("qwen2", "gpt2", "llama3", "added words"):
        assert_same(scanned[name], long)


@needs_fastokens
def test_ids_do_not_depend_on_the_text_before(scanned):
    start = (PROSE + CODE)[:5000]
    for tokenizer in scanned.values():
        for run in (" " * 700, "\n" * 700, " "):
            for end in (" ", "\n", "\tx", "y", ""):
                tokenizer.encode_batch([f"{start}{run}x{CODE[:2000]}"])
                assert_same(tokenizer, [f"{start}{run}{end}"])


@needs_fastokens
@pytest.mark.parametrize("seed", range(20))
def test_any_table_of_merges(seed):
    """Merges in an order no training gives, several ways to the same token, tokens no merge leads to."""
    rng = random.Random(seed)
    spec = spec_of()
    letters = [t for t in spec["model"]["vocab"] if len(t) == 1]
    vocab = {t: i for i, t in enumerate([*letters, "Ġthe", "zq", "qz"])}
    pool, merges = [c for c in letters if c in "abcdeĠ"] * 3, []
    for _ in range(rng.choice((20, 120))):
        a, b = rng.choice(pool), rng.choice(pool)
        if len(a + b) < 12 and [a, b] not in merges:
            merges.append([a, b])
            pool.append(a + b)
            vocab.setdefault(a + b, len(vocab))
    if seed % 2:
        rng.shuffle(merges)
    spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": seed % 3 == 0}
    tokenizer = rebuilt({**spec, "added_tokens": []})
    texts = ["".join(rng.choices("aabbccdde ", k=rng.randrange(40))) for _ in range(1000)]
    assert_same(tokenizer, [*texts, "zqz the the qzq"])
    assert tokenizer.encoder.startswith("fastokens") or "differ" in tokenizer.encoder


def test_bytes_are_looked_up(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenizer = trained("byte")
    assert tokenizer.encoder == "a table of bytes"
    rng = random.Random(1)
    assert_same(tokenizer, ["", *TEXTS, *(random_text(rng) for _ in range(500))])


@needs_fastokens
def test_text_that_normalisation_changes_goes_the_usual_way(scanned):
    tokenizer = scanned["nfc"]
    decomposed = unicodedata.normalize("NFD", "Éphémère, 한국어, Việt Nam, été")
    mixed = [decomposed, "plain", unicodedata.normalize("NFC", decomposed), "e\u0301", "中文", "\u1100\u1161"]
    assert_same(tokenizer, mixed)
    ids = tokenizer.encode_batch(mixed)
    assert ids[0].tolist() == ids[2].tolist() != scanned["qwen2"].encode(decomposed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_fastokens
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama3", "nfc"])
def test_every_code_point(scanned, name):
    chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for form in ("{0}", "{0}a{0}a {0}{0} 1{0}1\n{0}\r!{0}", "中{0}文 '{0}t {0}'s'{0}\u0301 {0} {0}  {0}"):
        for start in range(0, len(chars), 20_000):
            texts = [form.format(char) for char in chars[start : start + 20_000]]
            ours, theirs = scanned[name].encode_batch(texts), scanned[name]._encode_all(texts)
            assert np.array_equal(np.concatenate(ours), np.concatenate(theirs)), (form, hex(start))
