"""Chinese typed as pinyin: the channel that turns characters into syllables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from octavo.channel.contract import Edge
from octavo.errors import ConfigError, DataError

SEPARATORS = " '"


class PinyinChannel:
    """p(syllable | character) by counts: every character is typed as one of its syllables.

    Syllables may stand close together or be parted by spaces and apostrophes, which stand for nothing. Everything
    else is typed as it is; a letter that is part of no syllable too, at the price ``verbatim``.

    Args:
        table: syllable -> character -> how often, all of them positive.
        verbatim: probability that a letter stands for itself.
    """

    max_gap, end = 0, 0.0

    def __init__(self, table: Mapping[str, Mapping[str, float]], verbatim: float = 1e-6):
        if not table:
            raise ConfigError("the table has no syllable", fix="give lines of pinyin, a tab, characters")
        if not 0 < verbatim < 1:
            raise ConfigError(f"verbatim = {verbatim} must lie between 0 and 1", fix="use 1e-6")
        self.table = {syllable: dict(characters) for syllable, characters in table.items()}
        self.verbatim, self._longest = verbatim, max(map(len, self.table))
        totals: dict[str, float] = {}
        for characters in self.table.values():
            for character, n in characters.items():
                totals[character] = totals.get(character, 0.0) + n
        self._log_probs = {
            syllable: [(character, math.log(n / totals[character])) for character, n in characters.items()]
            for syllable, characters in self.table.items()
        }

    def edges(self, signal: str, at: int) -> list[Edge]:
        """Every way on from character ``at`` of the signal."""
        if at == len(signal):
            return []
        if signal[at] in SEPARATORS:
            return [Edge(at + 1, "", 0.0)]
        if not signal[at].isalpha():
            return [Edge(at + 1, signal[at], 0.0)]
        found = [Edge(at + 1, signal[at], math.log(self.verbatim))]
        for stop in range(at + 1, min(at + self._longest, len(signal)) + 1):
            for character, log_prob in self._log_probs.get(signal[at:stop].lower(), ()):
                found.append(Edge(stop, character, log_prob))
        return found

    def learn(self, pairs: Iterable[tuple[str, str]]) -> PinyinChannel:
        """The table with what (pinyin, text) pairs show added: one syllable, parted by spaces, for each character.

        Raises:
            DataError: a pair has not as many syllables as characters.
        """
        table = {syllable: dict(characters) for syllable, characters in self.table.items()}
        _add(table, pairs)
        return PinyinChannel(table, self.verbatim)

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[str, str]], verbatim: float = 1e-6) -> PinyinChannel:
        """The channel of nothing but (pinyin, text) pairs; see ``learn``."""
        table: dict[str, dict[str, float]] = {}
        _add(table, pairs)
        return cls(table, verbatim)

    @classmethod
    def read(cls, lines: Iterable[str], where: str, verbatim: float = 1e-6) -> PinyinChannel:
        """The channel of a table: lines of pinyin, a tab, its characters, and if known a tab and how often each.

        Raises:
            DataError: a line that is none, by number.
        """
        table: dict[str, dict[str, float]] = {}
        for number, line in enumerate(lines, 1):
            line = line.rstrip("\r\n")
            if not line.strip() or line.startswith("#"):
                continue
            syllable, *rest = line.split("\t")
            characters = "".join(rest[0].split()) if rest else ""
            counts = rest[1].split() if len(rest) > 1 else ["1"] * len(characters)
            try:
                values = [float(n) for n in counts]
            except ValueError:
                values = []
            good = len(values) == len(characters) and all(0 < n < math.inf for n in values)
            if not (syllable.strip().isalnum() and characters and len(rest) < 3 and good):
                raise DataError(
                    f"{where}:{number} is not pinyin, a tab and characters", fix="write a line like ma, a tab, 妈马吗"
                )
            into = table.setdefault(syllable.strip().lower(), {})
            for character, n in zip(characters, values, strict=True):
                into[character] = into.get(character, 0.0) + n
        return cls(table, verbatim)

    def lines(self) -> list[str]:
        """The table as ``read`` takes it."""
        return [
            f"{syllable}\t{''.join(characters)}\t{' '.join(f'{n:g}' for n in characters.values())}"
            for syllable, characters in sorted(self.table.items())
        ]

    @property
    def characters(self) -> Sequence[str]:
        """Every character that can be meant."""
        return list(dict.fromkeys(character for characters in self.table.values() for character in characters))


def _add(table: dict[str, dict[str, float]], pairs: Iterable[tuple[str, str]]) -> None:
    for pinyin, text in pairs:
        syllables, characters = pinyin.lower().split(), [c for c in text if not c.isspace()]
        if len(syllables) != len(characters):
            raise DataError(
                f"{pinyin!r} has {len(syllables)} syllables, {text!r} {len(characters)} characters",
                fix="write one syllable, parted by spaces, for each character",
            )
        for syllable, character in zip(syllables, characters, strict=True):
            if syllable.isalnum() and character.isalpha():
                into = table.setdefault(syllable, {})
                into[character] = into.get(character, 0.0) + 1
