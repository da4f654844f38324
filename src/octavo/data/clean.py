"""What is repaired in a text, and which texts are left out: each rule is one named setting.

The rules follow those of C4 and Gopher, with limits mild enough for poems, code and Chinese text.

Source: Raffel et al. 2020, section 2.2 (C4); Rae et al. 2021, appendix A1.1 (Gopher). Ours measure characters where
they measure words, because Chinese has no spaces between words.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from octavo.data.duplicates import CJK, Array, NearDuplicatesConfig, shingles, signature, unit_ids
from octavo.schema import Config


class FilterConfig(Config):
    """Limits beyond which a document is left out; ``null`` switches a rule off.

    Args:
        min_characters: shorter texts (without the white space around them).
        max_characters: longer texts.
        max_symbol_share: of the characters, those that are neither letters, digits nor white space.
        max_repeated_line_share: of the characters, those in lines that stood in the text before.
        max_repeated_phrase_share: of the runs of 8 words (in Chinese: characters), those that stood before.
        max_mean_line_characters: length of a line on average (minified code, dumps).
        max_word_characters: the longest run without white space, punctuation or Chinese characters (base64, keys).
        min_letter_share: of the characters that are not white space, letters (Chinese characters among them).
        max_bullet_share: of the lines, those that start with a bullet.
        max_ellipsis_share: of the lines, those that end in an ellipsis.
        banned_phrases: texts with one of these in them (``lorem ipsum``), in any case.
    """

    min_characters: int | None = Field(default=16, ge=1)
    max_characters: int | None = Field(default=None, ge=1)
    max_symbol_share: float | None = Field(default=0.6, gt=0, le=1)
    max_repeated_line_share: float | None = Field(default=0.6, gt=0, le=1)
    max_repeated_phrase_share: float | None = Field(default=0.8, gt=0, le=1)
    max_mean_line_characters: float | None = Field(default=50_000, gt=0)
    max_word_characters: int | None = Field(default=2_000, ge=1)
    min_letter_share: float | None = Field(default=0.2, gt=0, le=1)
    max_bullet_share: float | None = Field(default=0.95, gt=0, le=1)
    max_ellipsis_share: float | None = Field(default=0.5, gt=0, le=1)
    banned_phrases: tuple[str, ...] = ()


class CleanConfig(Config):
    """How documents are cleaned.

    Args:
        repair_unicode: undo wrong decoding (``cafÃ©``), remove control characters, normalise to NFC.
        exact_duplicates: keep the first of texts that are equal but for case and white space.
        near_duplicates: keep the first of texts that are nearly equal; ``null`` keeps all.
        filters: quality rules; ``null`` keeps all.
    """

    repair_unicode: bool = True
    exact_duplicates: bool = True
    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()
    filters: FilterConfig | None = FilterConfig()


# ---- repair ----

# What colours a terminal, then controls but tab and line feed, then marks of byte order and interlinear text.
CONTROLS = re.compile("\x1b\\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufff9-\ufffb]")


def repair(text: str) -> str:
    """``text`` with wrong decodings undone, control characters removed, in Unicode form NFC.

    Quotes, ligatures, full-width forms and HTML entities stay as they are: they are somebody's choice, and
    narrowing them would rewrite Chinese punctuation.
    """
    if not text.isascii():
        import ftfy
        from ftfy.badness import is_bad

        if is_bad(text):
            text = ftfy.fix_text(
                text,
                unescape_html=False,
                uncurl_quotes=False,
                fix_character_width=False,
                fix_latin_ligatures=False,
                explain=False,
            )
        text = unicodedata.normalize("NFC", text)
    return CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


# ---- filters ----

LETTERS = re.compile(r"[^\W\d_]+")
SYMBOLS = re.compile(r"[^\w\s]+")
LONG_WORD = re.compile(rf"[^\s{CJK}.,;:!?()\[\]{{}}<>\"'|]+")
BULLETS = ("-", "*", "•", "·", "‣", "◦", "●", "○", "■", "□")
PHRASE_UNITS = 8


def _lines(text: str) -> list[str]:
    return [line for raw in text.split("\n") if (line := raw.strip())]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _symbol_share(text: str) -> float:
    return _share(sum(map(len, SYMBOLS.findall(text))), len(text))


def _letter_share(text: str) -> float:
    return _share(sum(map(len, LETTERS.findall(text))), sum(map(len, text.split())))


def _repeated_line_share(text: str) -> float:
    seen: set[str] = set()
    repeated = total = 0
    for line in _lines(text):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return _share(repeated, total)


def _repeated_phrase_share(text: str) -> float:
    ids = unit_ids(text)
    if len(ids) < 4 * PHRASE_UNITS:  # too few for the share to say anything
        return 0.0
    phrases = shingles(ids, PHRASE_UNITS)
    return 1 - len(np.unique(phrases)) / len(phrases)


def _mean_line_characters(text: str) -> float:
    lines = _lines(text)
    return _share(sum(map(len, lines)), len(lines))


def _word_characters(text: str) -> float:
    longest = max(map(len, text.split()), default=0)
    if longest < 64:  # an upper bound, and much faster to have
        return longest
    return max((len(m[0]) for m in LONG_WORD.finditer(text)), default=0)


def _bullet_share(text: str) -> float:
    lines = _lines(text)
    return _share(sum(line.startswith(BULLETS) for line in lines), len(lines))


def _ellipsis_share(text: str) -> float:
    lines = _lines(text)
    return _share(sum(line.endswith(("...", "…")) for line in lines), len(lines))


# Setting -> what it measures. A setting that starts with ``min`` is a lower limit.
MEASURES: dict[str, Callable[[str], float]] = {
    "min_characters": lambda text: len(text.strip()),
    "max_characters": len,
    "max_symbol_share": _symbol_share,
    "min_letter_share": _letter_share,
    "max_repeated_line_share": _repeated_line_share,
    "max_mean_line_characters": _mean_line_characters,
    "max_word_characters": _word_characters,
    "max_bullet_share": _bullet_share,
    "max_ellipsis_share": _ellipsis_share,
    "max_repeated_phrase_share": _repeated_phrase_share,
}


def why_not(text: str, filters: FilterConfig) -> tuple[str, str] | None:
    """The first rule that leaves ``text`` out, and what was measured; ``None`` if it stays."""
    for name, measure in MEASURES.items():
        limit = getattr(filters, name)
        if limit is not None:
            value = measure(text)
            if value < limit if name.startswith("min") else value > limit:
                return name, f"{value:.4g}, limit {limit:g}"
    if filters.banned_phrases:
        folded = text.casefold()
        for phrase in filters.banned_phrases:
            if phrase.casefold() in folded:
                return "banned_phrases", repr(phrase)
    return None


# ---- one document ----


NO_SIGNATURE: Array = np.zeros(0, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text after cleaning, with what the search for duplicates needs, or why it was left out."""

    text: str
    repaired: bool
    reason: str = ""
    detail: str = ""
    hash: bytes = b""
    signature: Array = field(default_factory=lambda: NO_SIGNATURE)


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts equal but for case, white space and Unicode form."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normal.encode(), digest_size=16).digest()


def clean_text(text: str, config: CleanConfig) -> Cleaned:
    """Repair, filter and fingerprint one text."""
    repaired = repair(text) if config.repair_unicode else text
    changed = repaired != text
    if not repaired.strip():
        return Cleaned("", changed, "empty")
    if config.filters is not None and (found := why_not(repaired, config.filters)) is not None:
        return Cleaned(repaired, changed, *found)
    near = config.near_duplicates
    marks = NO_SIGNATURE if near is None else signature(repaired, near)
    return Cleaned(repaired, changed, hash=text_hash(repaired), signature=marks)


def clean_batch(texts: Sequence[str], config: CleanConfig) -> list[Cleaned]:
    """``clean_text`` of each: the unit of work of a worker process."""
    return [clean_text(text, config) for text in texts]
