"""Training tokenizers: configuration and text in, `Tokenizer` out, the same bytes for the same text."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from octavo.errors import DataError
from octavo.tokenizer.chat import CHATML
from octavo.tokenizer.config import (
    BPE,
    SPECIALS,
    UNKNOWN,
    Byte,
    ByteBPE,
    Character,
    Existing,
    Unigram,
    Word,
    WordPiece,
)
from octavo.tokenizer.core import Tokenizer
from octavo.tokenizer.pieces import byte_alphabet

ROLES: dict[str, str] = dict(zip(("pad", "bos", "eos", "turn_start", "turn_end"), SPECIALS, strict=True))
AnyConfig = ByteBPE | BPE | Unigram | WordPiece | Word | Character | Byte | Existing

_DIGITS = {"one": r"\p{N}", "three": r"\p{N}{1,3}", "run": r"\p{N}+"}
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Sources: GPT-2 encoder.py; the tokenizer.json of Qwen2 and Llama 3 (they differ only in how digits are cut).
_SPLITS = {
    "gpt2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?DIGITS| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "run"),
    "qwen2": (_MODERN, "one"),
    "llama3": (_MODERN, "three"),
    "spaces": (r" ?[^\s\p{N}]+| ?DIGITS|\s+(?!\S)|\s+", "run"),
}


def split_pattern(config: ByteBPE) -> str:
    """The regular expression (Oniguruma syntax) whose matches are merged separately."""
    pattern, digits = _SPLITS[config.split]
    return pattern.replace("DIGITS", _DIGITS[digits if config.digits == "auto" else config.digits])


def train(config: AnyConfig, texts: Iterable[str]) -> Tokenizer:
    """Train (or, for ``existing``, load) the tokenizer that ``config`` describes.

    Args:
        config: one of the classes in ``config.py``.
        texts: documents; read once, so a generator will do. Special tokens spelt in them are plain text.

    Returns:
        A tokenizer with the specials ``<|pad|> <|bos|> <|eos|> <|im_start|> <|im_end|>`` at ids 0 to 4 (unknown,
        where the kind has one, at 5) and the ChatML template. It may have fewer entries than ``vocab_size`` if
        the text does not yield more.

    Raises:
        DataError: there is no text, or it is not Unicode.
    """
    match config:
        case Existing():
            return Tokenizer.load(config.path)
        case Byte():
            return _finish(_byte_spec(), unknown=False)
        case ByteBPE():
            return _finish(_train_byte_bpe(config, texts), unknown=False)
        case BPE():
            return _finish(_train_bpe(config, texts), unknown=True)
        case Unigram():
            return _finish(_train_unigram(config, texts), unknown=True)
        case WordPiece():
            return _finish(_train_wordpiece(config, texts), unknown=True)
        case Word() | Character():
            return _finish(_train_words(config, texts), unknown=True)


def _finish(spec: dict[str, Any], *, unknown: bool) -> Tokenizer:
    names = [*SPECIALS, UNKNOWN] if unknown else list(SPECIALS)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] = [{"id": i, "content": name, **flags} for i, name in enumerate(names)]
    bos = {"SpecialToken": {"id": ROLES["bos"], "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    # A model trained here always saw bos first: other programs that read the file must put it there too.
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {
            ROLES["bos"]: {"id": ROLES["bos"], "ids": [SPECIALS.index(ROLES["bos"])], "tokens": [ROLES["bos"]]}
        },
    }
    roles: dict[str, str] = {**ROLES, "unk": UNKNOWN} if unknown else ROLES
    return Tokenizer(json.dumps(spec, ensure_ascii=False), special=roles, chat_template=CHATML)


def _readable(texts: Iterable[str]) -> Iterator[str]:
    count = 0
    for count, text in enumerate(texts, 1):
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                what = f"text {count} holds a lone surrogate at character {error.start}"
                raise DataError(what, fix="read the text with errors='replace'") from None
        yield text
    if count == 0:
        raise DataError("no text to train a tokenizer on", fix="check the data sources and filters")


class _Spool:
    """Texts kept on disk so that they can be read twice in constant memory, with their characters counted."""

    def __init__(self, texts: Iterable[str], normalizer: Any):
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="")  # noqa: SIM115 - lives as long as self
        self.chars: Counter[str] = Counter()
        for text in _readable(texts):
            text = normalizer.normalize_str(text) if normalizer else text
            self.chars.update(text)
            self._file.write(json.dumps(text) + "\n")

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)

    def alphabet(self, size: int) -> list[str]:
        """The ``size`` most frequent characters, ties by code point, in code point order."""
        return sorted(sorted(self.chars, key=lambda char: (-self.chars[char], char))[:size])


def _normalizer(name: str) -> Any:
    from tokenizers import normalizers

    if name == "none":
        return None
    if name == "nfkc_lower":
        return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[name]()


def _cap(chars: int) -> Any:
    """Cuts pieces into stretches of at most ``chars``.

    For training only, where every merge walks through the whole piece it is in; encoding is n log n in a piece.
    """
    from tokenizers import pre_tokenizers

    return pre_tokenizers.FixedLength(chars)


def _train_byte_bpe(config: ByteBPE, texts: Iterable[str]) -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rust = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(split_pattern(config)), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([split, _cap(config.max_piece_chars), level])
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=list(SPECIALS),
        initial_alphabet=list(byte_alphabet().values()),
        show_progress=False,
    )
    rust.train_from_iterator(_readable(texts), trainer)
    rust.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return json.loads(rust.to_str())


def _byte_spec() -> dict[str, Any]:
    vocab = {name: i for i, name in enumerate([*SPECIALS, *byte_alphabet().values()])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": vocab, "merges": []}
    base = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    return base | {"pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}


def _spaced(rust: Any, config: BPE | Unigram) -> Any:
    """Spaces as ``▁`` in front of words, nothing added or dropped, and the way back.

    Returns:
        The pre-tokenizer to train with.
    """
    from tokenizers import decoders, pre_tokenizers

    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if config.byte_fallback else []), decoders.Fuse()]
    rust.decoder = decoders.Sequence(steps)
    if config.normalize != "none":
        rust.normalizer = _normalizer(config.normalize)
    return pre_tokenizers.Sequence([rust.pre_tokenizer, _cap(config.max_piece_chars)])


def _byte_tokens(fallback: bool) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []


def _train_bpe(config: BPE, texts: Iterable[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, trainers

    rust = Tokenizer(models.BPE(unk_token=UNKNOWN))
    capped = _spaced(rust, config)
    final, rust.pre_tokenizer = rust.pre_tokenizer, capped
    spool = _Spool(texts, rust.normalizer)
    head = [*SPECIALS, UNKNOWN, *_byte_tokens(config.byte_fallback)]
    alphabet = sorted({"▁" if char == " " else char for char in spool.alphabet(config.alphabet_size)})
    # The trainer's own limit breaks ties at random: give it the letters and cut the text to them.
    keep = set(alphabet) | {" "}
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*head, *alphabet],
        show_progress=False,
    )
    limited = len(spool.chars) > config.alphabet_size
    rust.train_from_iterator((part for text in spool for part in _known(text, keep)) if limited else spool, trainer)
    rust.pre_tokenizer = final
    spec = json.loads(rust.to_str())
    spec["model"]["byte_fallback"] = config.byte_fallback
    return spec


def _known(text: str, keep: set[str]) -> Iterator[str]:
    """The stretches of ``text`` made of characters in ``keep``."""
    start = 0
    for i, char in enumerate(text):
        if char not in keep:
            if i > start:
                yield text[start:i]
            start = i + 1
    if start < len(text):
        yield text[start:]


def _train_unigram(config: Unigram, texts: Iterable[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer, models

    from octavo.tokenizer.unigram import FLOOR
    from octavo.tokenizer.unigram_train import train_pieces

    rust = Tokenizer(models.Unigram())
    capped = _spaced(rust, config)
    words: Counter[str] = Counter()
    for text in _readable(texts):
        text = rust.normalizer.normalize_str(text) if rust.normalizer else text
        words.update(piece for piece, _ in capped.pre_tokenize_str(text))
    head = [*SPECIALS, UNKNOWN, *_byte_tokens(config.byte_fallback)]
    pieces = train_pieces(
        words,
        size=config.vocab_size - len(head),
        seed_size=config.seed_size,
        keep=config.keep,
        em_steps=config.em_steps,
        max_chars=config.max_token_chars,
        alphabet_size=config.alphabet_size,
        train_chars=config.train_chars,
        # With these a text that spells "<0x0A>" always has a cheaper path than the byte of that name.
        letters="<0x123456789ABCDEF>" if config.byte_fallback else "",
    )
    spec = json.loads(rust.to_str())
    vocab = [[name, FLOOR * 10] for name in head] + [[piece, score] for piece, score in pieces if piece not in head]
    spec["model"] = {"type": "Unigram", "unk_id": len(SPECIALS), "vocab": vocab, "byte_fallback": config.byte_fallback}
    return spec


def _train_wordpiece(config: WordPiece, texts: Iterable[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if config.normalize != "none":
        rust.normalizer = _normalizer(config.normalize)
    spool = _Spool(texts, rust.normalizer)
    alphabet = [char for char in spool.alphabet(config.alphabet_size) if not char.isspace()]
    inside = {f"##{char}" for text in spool for word in text.split() for char in word[1:]} & {
        f"##{c}" for c in alphabet
    }
    # The trainer numbers the letters in the order of a hash table: number them here.
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*SPECIALS, UNKNOWN, *alphabet, *sorted(inside)],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    keep = set(alphabet)
    limited = len(spool.chars) > config.alphabet_size
    rust.train_from_iterator((part for text in spool for part in _known(text, keep)) if limited else spool, trainer)
    vocab = json.loads(rust.to_str())["model"]["vocab"]
    rust = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=config.max_word_chars))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    if config.normalize != "none":
        rust.normalizer = _normalizer(config.normalize)
    return json.loads(rust.to_str())


def _train_words(config: Word | Character, texts: Iterable[str]) -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rust = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    if isinstance(config, Character):
        rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        rust.decoder = decoders.Fuse()
    elif config.split == "words":
        rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\p{L}\p{M}\p{N}]+|\s+|[^\p{L}\p{M}\p{N}\s]"), "isolated")
        rust.decoder = decoders.Fuse()
    else:
        rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if isinstance(config, Word) and config.normalize != "none":
        rust.normalizer = _normalizer(config.normalize)
    trainer = trainers.WordLevelTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*SPECIALS, UNKNOWN],
        show_progress=False,
    )
    rust.train_from_iterator(_readable(texts), trainer)
    spec = json.loads(rust.to_str())
    # A text that spells a special would have overwritten its id.
    head, vocab = [*SPECIALS, UNKNOWN], spec["model"]["vocab"]
    words = [*head, *(word for word in sorted(vocab, key=vocab.__getitem__) if word not in head)]
    spec["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    return spec
