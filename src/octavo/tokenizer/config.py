"""The settings of each kind of tokenizer; ``TokenizerConfig`` is the union that a recipe holds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from octavo.schema import Config

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
UNKNOWN = "<|unk|>"
BYTES = 256

Normalize = Literal["none", "nfc", "nfkc", "nfkc_lower"]


class ByteBPE(Config):
    """Byte-level BPE: lossless on any text, no unknown token.

    ``split`` is the regular expression that cuts the text before merging; ``digits`` overrides how it cuts
    numbers (one digit, groups of three, or the whole run). While training, pieces longer than ``max_piece_chars``
    are cut, so that one endless word costs linear time.
    Source: Radford et al. 2019, section 2.2.
    """

    kind: Literal["byte_bpe"] = "byte_bpe"
    vocab_size: int = Field(default=8192, ge=len(SPECIALS) + BYTES)
    split: Literal["gpt2", "qwen2", "llama3", "spaces"] = "qwen2"
    digits: Literal["auto", "one", "three", "run"] = "auto"
    min_frequency: int = Field(default=2, ge=1)
    max_piece_chars: int = Field(default=256, ge=1)


class BPE(Config):
    """BPE over characters (Sennrich et al. 2016), spaces kept as ``▁``.

    Characters outside the ``alphabet_size`` most frequent ones become unknown, or with ``byte_fallback`` the
    bytes they consist of (then only the character ``▁`` itself does not come back: it reads as a space).
    """

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=8192, ge=len(SPECIALS) + 2)
    alphabet_size: int = Field(default=2000, ge=1)
    byte_fallback: bool = False
    normalize: Normalize = "none"
    min_frequency: int = Field(default=2, ge=1)
    max_piece_chars: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _room(self) -> Self:
        _check_room(self)
        return self


class Unigram(Config):
    """Unigram language model over pieces (Kudo 2018), spaces kept as ``▁``.

    ``keep`` is the share of pieces that survives one pruning round; ``seed_size`` the number of candidate
    pieces it starts from; it learns from the most frequent words, up to ``train_chars`` characters of them. Unknown
    characters as in :class:`BPE`.
    """

    kind: Literal["unigram"] = "unigram"
    vocab_size: int = Field(default=8192, ge=len(SPECIALS) + 2)
    seed_size: int = Field(default=100_000, ge=1)
    keep: float = Field(default=0.8, gt=0, lt=1)
    em_steps: int = Field(default=2, ge=1)
    max_token_chars: int = Field(default=16, ge=1)
    alphabet_size: int = Field(default=2000, ge=1)
    byte_fallback: bool = False
    normalize: Normalize = "none"
    train_chars: int = Field(default=4_000_000, ge=1)
    max_piece_chars: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _room(self) -> Self:
        _check_room(self)
        return self


class WordPiece(Config):
    """WordPiece as in BERT: words and punctuation, pieces inside a word begin with ``##``.

    White space is not kept: decoding puts one space between words. A word that cannot be spelt from the
    vocabulary is unknown as a whole.
    """

    kind: Literal["wordpiece"] = "wordpiece"
    vocab_size: int = Field(default=8192, ge=len(SPECIALS) + 2)
    alphabet_size: int = Field(default=1000, ge=1)
    normalize: Normalize = "none"
    min_frequency: int = Field(default=2, ge=1)
    max_word_chars: int = Field(default=100, ge=1)


class Word(Config):
    """One id per word, the ``vocab_size`` most frequent ones.

    ``split: words`` keeps runs of letters and digits, runs of white space and single other characters as tokens, so
    known words come back exactly; ``split: whitespace`` is ``str.split`` (decoding joins with one space).
    """

    kind: Literal["word"] = "word"
    vocab_size: int = Field(default=8192, ge=len(SPECIALS) + 2)
    split: Literal["words", "whitespace"] = "words"
    normalize: Normalize = "none"
    min_frequency: int = Field(default=1, ge=1)


class Character(Config):
    """One id per Unicode code point, the ``vocab_size`` most frequent ones; lossless on known characters."""

    kind: Literal["character"] = "character"
    vocab_size: int = Field(default=4096, ge=len(SPECIALS) + 2)
    min_frequency: int = Field(default=1, ge=1)


class Byte(Config):
    """One id per byte: nothing to train, lossless on any text. Ids are 5 + byte value."""

    kind: Literal["byte"] = "byte"


class Existing(Config):
    """A tokenizer that exists: a Hugging Face folder, a tokenizer.json, or GPT-2's encoder.json + vocab.bpe."""

    kind: Literal["existing"] = "existing"
    path: str


CONFIGS: dict[str, type[Config]] = {
    "byte_bpe": ByteBPE,
    "bpe": BPE,
    "unigram": Unigram,
    "wordpiece": WordPiece,
    "word": Word,
    "character": Character,
    "byte": Byte,
    "existing": Existing,
}
TokenizerConfig = Annotated[
    ByteBPE | BPE | Unigram | WordPiece | Word | Character | Byte | Existing, Field(discriminator="kind")
]


def _check_room(config: BPE | Unigram) -> None:
    least = len(SPECIALS) + 2 + BYTES
    if config.byte_fallback and config.vocab_size < least:
        raise ValueError(f"vocab_size = {config.vocab_size} must be at least {least} with byte_fallback")
