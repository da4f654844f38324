"""Words as tokens, and which tokens are whose: what classes of tokens are trained on and read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from octavo.errors import DataError
from octavo.tokenizer.frame import frame

if TYPE_CHECKING:
    from octavo.tokenizer.core import Tokenizer

Carrier = Literal["first", "last", "all"]


class Aligner:
    """Turns words into tokens, and knows which tokens are whose.

    A word is encoded as it is within a text, by itself: with the separator before it, unless the tokenizer marks
    a word's beginning without one.
    """

    def __init__(self, tokenizer: Tokenizer, *, separator: str = " "):
        self.tokenizer, self.separator = tokenizer, separator
        inside, before = tokenizer.encode(f"x{separator}a"), tokenizer.encode("x")
        self.marked = inside == [*before, *tokenizer.encode("a")]
        self._blank: dict[int, bool] = {}

    def encode(self, sentences: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The tokens of every word of every sentence; a word that has none in this vocabulary has its unknown one."""
        texts = [
            word if i == 0 or self.marked else self.separator + word
            for sentence in sentences
            for i, word in enumerate(sentence)
        ]
        unknown = [] if self.tokenizer.special.unk is None else [self.tokenizer.special.unk]
        found = (ids.tolist() or unknown for ids in self.tokenizer.encode_batch(texts))
        return [[next(found) for _ in sentence] for sentence in sentences]

    def place(self, ids: Sequence[int], pieces: Carrier) -> list[int]:
        """Which of a word's tokens carry its tag; one that is the separator alone does so only if there is no other."""
        own = [i for i, id in enumerate(ids) if not self._is_blank(id)] or list(range(len(ids)))
        return own if pieces == "all" else own[:1] if pieces == "first" else own[-1:]

    def _is_blank(self, id: int) -> bool:
        if id not in self._blank:
            raw = self.tokenizer.token_bytes(id)
            self._blank[id] = bool(raw) and not raw.strip()
        return self._blank[id]


def portions(words: Sequence[Sequence[int]], room: int) -> Iterator[range]:
    """Runs of whole words of at most ``room`` tokens; a word that is longer stands alone."""
    start = size = 0
    for i, ids in enumerate(words):
        if i > start and size + len(ids) > room:
            yield range(start, i)
            start, size = i, 0
        size += len(ids)
    if start < len(words):
        yield range(start, len(words))


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens between their special ones; of which words of which sentence, and where each word's tag is read."""

    ids: list[int]
    sentence: int
    words: range
    read_at: list[int]  # one a word; -1 where it has no token
    carry: list[list[int]]  # where each word's tag stands in training


def rows_of(aligner: Aligner, sentences: Sequence[Sequence[str]], seq_len: int, pieces: Carrier) -> list[Row]:
    """Sentences as rows of at most ``seq_len`` tokens; one that is longer stands in several.

    Raises:
        DataError: no word fits.
    """
    tokenizer, found = aligner.tokenizer, []
    empty, _ = frame(tokenizer, [])
    room, before = seq_len - len(empty), int(tokenizer.special.first is not None)
    if room < 1:
        raise DataError(f"rows of {seq_len} tokens have no room for a word", fix="use a larger seq_len")
    for number, words in enumerate(aligner.encode(sentences)):
        words = [ids[:room] for ids in words]
        for part in portions(words, room):
            at, carry = before, []
            for i in part:
                carry.append([at + k for k in aligner.place(words[i], pieces)] if words[i] else [])
                at += len(words[i])
            ids, _ = frame(tokenizer, [id for i in part for id in words[i]])
            found.append(Row(ids, number, part, [places[0] if places else -1 for places in carry], carry))
    return found
