"""Text to tokens and back: training, loading, chat rendering. No torch here."""

from octavo.tokenizer.chat import CHATML, Rendered
from octavo.tokenizer.config import (
    BPE,
    CONFIGS,
    SPECIALS,
    UNKNOWN,
    Byte,
    ByteBPE,
    Character,
    Existing,
    TokenizerConfig,
    Unigram,
    Word,
    WordPiece,
)
from octavo.tokenizer.core import Special, Tokenizer
from octavo.tokenizer.pieces import StreamDecoder
from octavo.tokenizer.train import train

load = Tokenizer.load

__all__ = [
    "BPE",
    "CHATML",
    "CONFIGS",
    "SPECIALS",
    "UNKNOWN",
    "Byte",
    "ByteBPE",
    "Character",
    "Existing",
    "Rendered",
    "Special",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "Unigram",
    "Word",
    "WordPiece",
    "load",
    "train",
]
