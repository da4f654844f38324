"""Words of a text for lexical search: lower-case letters and digits, and Chinese, Japanese and Korean by characters."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

# Runs of letters and digits of scripts that put spaces between words; ideographs, kana and hangul one by one.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]+|[^\W{_IDEOGRAPH}]+")
_RUN = re.compile(rf"[{_IDEOGRAPH}]")


def words_of(text: str) -> list[str]:
    """What two texts can have in common; of a run of ideographs its characters and its pairs of neighbours."""
    found: list[str] = []
    for run in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        found += [*run, *(a + b for a, b in pairwise(run))] if _RUN.match(run) else [run]
    return found
