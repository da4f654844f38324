"""N-gram models: counting in or out of memory, smoothings, saved tables, ARPA files, n-grams of any length."""

from __future__ import annotations

import os

from octavo.ngrams import storage
from octavo.ngrams.arpa import read_arpa, write_arpa
from octavo.ngrams.counting import NGramCounts
from octavo.ngrams.model import NGram
from octavo.ngrams.suffixes import InfiniGram

__all__ = ["InfiniGram", "NGram", "NGramCounts", "load", "read_arpa", "write_arpa"]


def load(folder: str | os.PathLike[str], *, verify: bool = True) -> NGram | InfiniGram:
    """A saved model of either class."""
    if storage.kind_of(folder) == "infinigram":
        return InfiniGram.load(folder, verify=verify)
    return NGram.load(folder, verify=verify)
