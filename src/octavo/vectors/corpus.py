"""Text as one long array of word ids: read once, in bounded memory, the ids kept in a temporary file."""

from __future__ import annotations

import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import DataError, ResourceError

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

# Scripts without spaces between words: each character stands alone.
ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORDS = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+(?:['’][^\W_{ALONE}]+)*")
SPLITS: dict[str, Callable[[str], list[str]]] = {
    "words": WORDS.findall,
    "spaces": str.split,
    "characters": lambda text: [c for c in text if not c.isspace()],
}
MAX_DISTINCT = 1 << 26  # words held in memory while counting
BLOCK = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """Text as ids of its words, most frequent first.

    Attributes:
        words: the spelling of each id.
        counts: (V,) int64, how often each occurs.
        tokens: (N,) int32, the text without the words that were left out.
        starts: (S + 1,) int64, where each unit of text begins in ``tokens``, and N.
        left_out: words of the text that were too rare.
    """

    words: list[str]
    counts: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    left_out: int = 0


def read(
    texts: Iterable[str],
    *,
    split: str | Tokenizer = "words",
    lower: bool = False,
    unit: str = "line",
    min_count: int = 5,
    max_words: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Split documents into words, count them and write them down as ids.

    Args:
        texts: documents, read once.
        split: a name in ``SPLITS``, or a tokenizer.
        unit: ``line`` or ``document``; no window reaches beyond it.
        progress: is told the characters read after every document.

    Raises:
        DataError: fewer than two words occur often enough.
    """
    with tempfile.TemporaryFile() as spool:
        lengths = array("q")
        spellings = _spool(texts, split, lower, unit, spool, lengths, progress)
        spool.flush()
        n = sum(lengths)
        first = np.memmap(spool, np.int32, "r", shape=(n,)) if n else np.zeros(0, np.int32)
        counts = np.zeros(len(spellings), np.int64)
        for block in _blocks(first):
            counts += np.bincount(block, minlength=len(spellings))
        order = np.argsort(-counts, kind="stable")
        order = order[counts[order] >= min_count][:max_words]
        if len(order) < 2:
            raise DataError(
                f"{len(order)} of {np.count_nonzero(counts):,} words occur {min_count} times or more",
                fix="give more text, or lower --min-count" if n else "give files with text in them",
            )
        new = np.full(len(spellings), -1, np.int32)
        new[order] = np.arange(len(order), dtype=np.int32)
        tokens, starts = _renumber(first, new, np.frombuffer(lengths, np.int64))
    return Corpus([spellings[i] for i in order], counts[order], tokens, starts, n - len(tokens))


class _Numbers(dict[str, int]):
    """A word's number, given at its first appearance."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_DISTINCT:
            raise ResourceError(
                f"the text has more than {MAX_DISTINCT:,} different words", fix="use another --split, or less text"
            )
        number = self[word] = len(self)
        return number


def _units(text: str, unit: str) -> list[str]:
    return [line for line in text.split("\n") if line] if unit == "line" else [text]


def _spool(
    texts: Iterable[str],
    split: str | Tokenizer,
    lower: bool,
    unit: str,
    spool: Any,
    lengths: array[int],
    progress: Callable[[int], None] | None,
) -> list[str]:
    """Write the words of every unit to ``spool`` in numbers of their own; returns their spellings."""
    numbers = _Numbers()
    if isinstance(split, str):
        number, cut = numbers.__getitem__, SPLITS[split]
        spellings = None

        def ids_of(units: list[str]) -> Iterator[np.ndarray]:
            return (np.fromiter(map(number, cut(u)), np.int32) for u in units)

    else:
        spellings = [token or "" for token in split.tokens]
        words = [i not in split.special_ids and is_word(token) for i, token in enumerate(spellings)]
        usable = np.array([*words, False])

        def ids_of(units: list[str]) -> Iterator[np.ndarray]:
            return (ids[usable[ids]] for ids in split.encode_batch(units))

    for text in texts:
        for ids in ids_of(_units(text.lower() if lower else text, unit)):
            spool.write(np.ascontiguousarray(ids, np.int32).tobytes())
            lengths.append(len(ids))
        if progress is not None:
            progress(len(text))
    return list(numbers) if spellings is None else spellings


def is_word(token: str) -> bool:
    """Whether a token can stand in a file whose fields are separated by spaces."""
    return bool(token) and not any(c in " \t\n\r\v\f\0" for c in token)


def _blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[at : at + BLOCK] for at in range(0, len(tokens), BLOCK))


def _renumber(first: np.ndarray, new: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids that words keep, without those that keep none, and where each unit begins among them."""
    old = np.concatenate([[0], np.cumsum(lengths)])
    starts = np.zeros(len(old), np.int64)
    kept = 0
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the map of it
    for number, block in enumerate(_blocks(first)):
        ids = new[block]
        stays = ids >= 0
        before = np.concatenate([[0], np.cumsum(stays)]) + kept
        at = number * BLOCK
        lo, hi = np.searchsorted(old, at), np.searchsorted(old, at + len(block), "right")
        starts[lo:hi] = before[old[lo:hi] - at]
        file.write(ids[stays].tobytes())
        kept = int(before[-1])
    file.flush()
    tokens = np.memmap(file, np.int32, "r", shape=(kept,)) if kept else np.zeros(0, np.int32)
    return tokens, np.unique(starts)
