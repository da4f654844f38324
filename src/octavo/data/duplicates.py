"""Texts that are equal or nearly so: exact hashes, MinHash signatures and locality-sensitive hashing.

The first of a group of duplicates stays. Documents are asked about in their order by one process, so the outcome
does not depend on how many made the signatures.

Source: Broder 1997 (MinHash); Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4 (bands). The
signatures are rensa's (R-MinHash); ours differ from its own deduplicator in that a match of bands is only a
candidate, whose similarity is then estimated from the whole signature.
"""

from __future__ import annotations

import functools
import re
import zlib
from typing import Any

import numpy as np
from pydantic import Field

from octavo.data.permutation import mix
from octavo.schema import Config

Array = np.ndarray[Any, Any]

SEED = 20_240_601
MAX_MEMBERS = 64
FOUND_AT_THRESHOLD = 0.9


class NearDuplicatesConfig(Config):
    """When two texts count as the same.

    Args:
        threshold: Jaccard similarity of their sets of shingles from which on the later one goes.
        shingle_units: words, or Chinese, Japanese and Korean characters, in a shingle.
        hashes: length of a signature; the error of an estimate is about 0.5 / sqrt(hashes).
    """

    threshold: float = Field(default=0.8, ge=0.3, le=1)
    shingle_units: int = Field(default=5, ge=1, le=32)
    hashes: int = Field(default=128, ge=16, le=1024, multiple_of=16)


CJK = "\u2e80-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
WORD, ALONE = 1, 2  # a character of a word; one that is a unit by itself
_PLACES = 1 << 10  # characters of a word with a weight of their own; the weights repeat in longer ones
_BLOCK = 1 << 16  # units at a time, so that a large text needs little more memory than its characters
_MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


@functools.cache
def _weights(n: int) -> Array:
    return mix(np.arange(SEED, SEED + n, dtype=np.uint64)) | np.uint64(1)


@functools.cache
def _kinds() -> Array:
    """For every code point: 0 (between units), ``WORD`` or ``ALONE``."""
    every = np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    kinds = np.zeros(0x110000, np.uint8)
    for pattern, kind in ((r"\w+", WORD), (f"[{CJK}]+", ALONE)):
        for run in re.finditer(pattern, every):
            kinds[run.start() : run.end()] = kind
    return kinds


@functools.lru_cache(maxsize=1)  # the phrase filter and the signature ask for the same text
def unit_ids(text: str) -> Array:
    """A 64-bit hash of each unit of ``text``, in order and regardless of case.

    A unit is a word, or a character where there are no spaces between words; the whole text where there is neither. Its
    hash is the sum of its characters, each times the odd weight of its place in the unit. It is taken over
    the whole text at once: a call of a hash function for every word took most of the time.

    Source: Lemire and Kaser 2014 (Strongly universal string hashing is fast), section 2 (multilinear).
    """
    folded = text.casefold()
    codes = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), "<u4")
    kinds = _kinds().take(codes)
    word = kinds == WORD
    begins = word | (kinds == ALONE)
    begins[1:] &= ~(word[1:] & word[:-1])
    bounds = np.append(np.flatnonzero(begins), len(codes))
    if len(bounds) == 1:
        return np.array([zlib.crc32(folded.encode("utf-8", "surrogatepass"))], dtype=np.uint64)
    ids = np.empty(len(bounds) - 1, np.uint64)
    for at in range(0, len(ids), _BLOCK):
        part = bounds[at : at + _BLOCK + 1]
        here = slice(part[0], part[-1])
        starts = part[:-1] - part[0]
        place = np.arange(part[-1] - part[0])
        place -= np.repeat(starts, part[1:] - part[:-1])
        place &= _PLACES - 1
        values = _weights(_PLACES).take(place)
        values *= codes[here]
        values *= kinds[here] != 0
        ids[at : at + _BLOCK] = np.add.reduceat(values, starts)
    return ids


def shingles(ids: Array, size: int) -> Array:
    """A 64-bit hash of every run of ``size`` numbers, in order (one for fewer numbers than ``size``)."""
    size = min(size, len(ids))
    n = len(ids) - size + 1
    runs = np.zeros(n, dtype=np.uint64)
    for i in range(size):
        runs ^= ids[i : i + n]
        runs *= _MIX1
        runs ^= runs >> np.uint64(29)
    runs ^= runs >> np.uint64(32)
    runs *= _MIX2
    runs ^= runs >> np.uint64(32)
    return runs


def signature(text: str, config: NearDuplicatesConfig) -> Array:
    """The MinHash signature of a text: ``hashes`` uint32."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] - compiled, without stubs

    marks = shingles(unit_ids(text), config.shingle_units)
    offsets = np.array([0, len(marks)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(marks, offsets, config.hashes, SEED)
    return np.array(matrix.to_rows()[0], dtype=np.uint32)


def band_rows(config: NearDuplicatesConfig) -> int:
    """Signature values in a band: the most for which a pair at the threshold is still found nearly always."""
    found = 1
    for rows in (2, 4, 8, 16):
        bands = config.hashes // rows
        if 1 - (1 - config.threshold**rows) ** bands >= FOUND_AT_THRESHOLD:
            found = rows
    return found


class NearIndex:
    """Signatures of the documents kept so far.

    Memory grows by about two kilobytes a document. A question looks at the documents that share a band, a bounded
    number of them, so its cost does not grow with the number of documents.
    """

    def __init__(self, config: NearDuplicatesConfig):
        self.config = config
        self.rows = band_rows(config)
        self.signatures = np.zeros((1024, config.hashes), dtype=np.uint32)
        self.n = 0
        self.buckets: dict[int, int | list[int]] = {}  # a list only where documents share a band: most do not
        shape = (config.hashes // self.rows, self.rows)  # weights of its own: the same band elsewhere is another key
        self._weights = _weights(config.hashes).reshape(shape)
        self._last: tuple[Array | None, list[int]] = (None, [])

    def _bands(self, marks: Array) -> list[int]:
        if self._last[0] is not marks:  # a document that is kept was asked about just before
            keys = np.einsum("br,br->b", marks.reshape(self._weights.shape), self._weights)
            self._last = marks, (keys ^ (keys >> np.uint64(32))).tolist()
        return self._last[1]

    def find(self, marks: Array) -> tuple[int, float] | None:
        """Number and estimated similarity of the first kept document that is nearly this one, if there is one."""
        found: set[int] = set()
        for key in self._bands(marks):
            members = self.buckets.get(key, ())
            found.update((members,) if isinstance(members, int) else members)
        if not found:
            return None
        candidates = sorted(found)
        alike = (self.signatures[candidates] == marks).mean(axis=1)
        hits = np.flatnonzero(alike >= self.config.threshold)
        return (candidates[hits[0]], float(alike[hits[0]])) if len(hits) else None

    def add(self, marks: Array) -> None:
        """Keep the next document."""
        if self.n == len(self.signatures):
            self.signatures = np.concatenate([self.signatures, np.zeros_like(self.signatures)])
        self.signatures[self.n] = marks
        for key in self._bands(marks):
            members = self.buckets.setdefault(key, self.n)
            if isinstance(members, int):
                if members != self.n:
                    self.buckets[key] = [members, self.n]
            elif len(members) < MAX_MEMBERS:
                members.append(self.n)
        self.n += 1
