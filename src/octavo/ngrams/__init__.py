"""N-gram models: counting in or out of memory, smoothings, saved tables, ARPA files, n-grams of any length."""

from octavo.ngrams.counting import NGramCounts
from octavo.ngrams.model import NGram

__all__ = ["NGram", "NGramCounts"]
