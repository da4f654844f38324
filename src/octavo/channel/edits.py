"""A typist who drops, doubles, exchanges and mistakes letters: the channel of spelling correction."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from octavo.channel.contract import Edge
from octavo.errors import ConfigError, DataError

RATES = ("insert", "delete", "substitute", "transpose")


@dataclass(frozen=True)
class EditChannel:
    """Before every character and at the end any number of letters slip in, each with probability ``insert``. Then the
    character is left out (``delete``), another one is typed (``substitute``), it changes places with the next one
    (``transpose``), or it is typed as meant.

    This is a distribution over signals: it sums to one for every text. What slips in is any letter of the alphabet
    alike; what is typed for another is any other one alike, or as ``confusions`` counts it (one added to each).
    Characters outside the alphabet are typed as meant.

    Source: Kernighan, Church & Gale 1990 (the four operations and confusion counts); the decoder, not one edit a
    word, looks for all of them together.
    """

    alphabet: str
    insert: float = 0.005
    delete: float = 0.01
    substitute: float = 0.015
    transpose: float = 0.005
    confusions: Mapping[tuple[str, str], float] = field(default_factory=dict)
    max_gap: int = 2

    def __post_init__(self) -> None:
        if len(set(self.alphabet)) != len(self.alphabet) or len(self.alphabet) < 2:
            raise ConfigError("an alphabet needs two or more different characters", fix="give each of them once")
        for name in RATES:
            if not 0 < getattr(self, name) < 0.5:
                raise ConfigError(f"{name} = {getattr(self, name)} must lie between 0 and 0.5", fix="use 0.01")
        if self.keep <= self.transpose:
            raise ConfigError("more is mistyped than not: the rates leave nothing to go by", fix="use lower rates")

    @property
    def keep(self) -> float:
        """How often a character is typed as it was meant."""
        return 1 - self.delete - self.substitute - self.transpose

    @property
    def end(self) -> float:
        return math.log1p(-self.insert)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.alphabet)

    @cached_property
    def _totals(self) -> Counter[str]:
        totals: Counter[str] = Counter()
        for (meant, _), n in self.confusions.items():
            totals[meant] += n  # type: ignore[assignment] - counts may be fractions
        return totals

    def mistaken(self, meant: str, typed: str) -> float:
        """p(this letter is typed | another one than ``meant`` is)."""
        return (self.confusions.get((meant, typed), 0.0) + 1) / (self._totals[meant] + len(self.alphabet) - 1)

    def edges(self, signal: str, at: int) -> list[Edge]:
        """Every way on from character ``at`` of the signal."""
        stop = self.end
        found = [Edge(at, meant, stop + math.log(self.delete)) for meant in self.alphabet]
        if at == len(signal):
            return found
        typed = signal[at]
        if typed not in self._known:
            return [*found, Edge(at + 1, typed, stop)]
        found.append(Edge(at + 1, "", math.log(self.insert / len(self.alphabet))))
        found.append(Edge(at + 1, typed, stop + math.log(self.keep)))
        found += [
            Edge(at + 1, meant, stop + math.log(self.substitute * self.mistaken(meant, typed)))
            for meant in self.alphabet
            if meant != typed
        ]
        after = signal[at + 1] if at + 1 < len(signal) else typed
        if after != typed and after in self._known:
            found.append(Edge(at + 2, after + typed, stop + math.log(self.transpose)))
        return found

    def log_prob(self, signal: str, text: str) -> float:
        """ln p(signal | text), summed over every way in which one could have become the other."""
        n, m, stop = len(signal), len(text), 1 - self.insert
        table = np.zeros((n + 3, m + 3))
        table[0, 0] = 1.0
        slip = self.insert / len(self.alphabet)
        for j in range(m + 1):
            for i in range(n + 1):
                here = table[i, j]
                if here == 0:
                    continue
                typed = signal[i] if i < n else ""
                if typed in self._known:
                    table[i + 1, j] += here * slip
                if j == m:
                    continue
                meant, after = text[j], text[j + 1] if j + 1 < m else ""
                go = here * stop
                if meant not in self._known:
                    table[i + 1, j + 1] += go * (typed == meant)
                    continue
                swaps = after in self._known and after != meant
                table[i, j + 1] += go * self.delete
                if typed == meant:  # what cannot change places is typed as meant
                    table[i + 1, j + 1] += go * (self.keep + (0 if swaps else self.transpose))
                elif typed in self._known:
                    table[i + 1, j + 1] += go * self.substitute * self.mistaken(meant, typed)
                if swaps and signal[i : i + 2] == after + meant:
                    table[i + 2, j + 2] += go * self.transpose
        total = float(table[n, m]) * stop
        return math.log(total) if total > 0 else -math.inf

    def align(self, signal: str, text: str) -> list[tuple[str, str, str]]:
        """The likeliest way: (operation, meant, typed) in order; empty strings for what is not there.

        Raises:
            DataError: the signal cannot have come from the text (it has a foreign character that the text has not).
        """
        n, m = len(signal), len(text)
        best = np.full((n + 1, m + 1), -np.inf)
        back: dict[tuple[int, int], tuple[int, int, tuple[str, str, str]]] = {}
        best[0, 0] = 0.0
        for j in range(m + 1):
            for i in range(n + 1):
                here = float(best[i, j])
                if here == -np.inf:
                    continue
                for di, dj, log_prob in self._ways(signal[i : i + 2], text[j : j + 2]):
                    if here + log_prob > best[i + di, j + dj]:
                        best[i + di, j + dj] = here + log_prob
                        back[i + di, j + dj] = (i, j, _step(signal[i : i + di], text[j : j + dj]))
        if best[n, m] == -np.inf:
            raise DataError(f"{signal!r} cannot be a misspelling of {text!r}", fix="give the pair as typed, then meant")
        steps, at = [], (n, m)
        while at != (0, 0):
            i, j, step = back[at]
            steps.append(step)
            at = (i, j)
        return steps[::-1]

    def _ways(self, typed: str, meant: str) -> Iterator[tuple[int, int, float]]:
        """How many characters of each the next operation may take, and its log-probability."""
        one, stop = typed[:1], self.end
        if one in self._known and one:
            yield 1, 0, math.log(self.insert / len(self.alphabet))
        if not meant:
            return
        if meant[0] not in self._known:
            if one == meant[0]:
                yield 1, 1, stop
            return
        yield 0, 1, stop + math.log(self.delete)
        if one == meant[0]:
            yield 1, 1, stop + math.log(self.keep)
        elif one and one in self._known:
            yield 1, 1, stop + math.log(self.substitute * self.mistaken(meant[0], one))
        if len(meant) == 2 and typed == meant[::-1] != meant and meant[1] in self._known:
            yield 2, 2, stop + math.log(self.transpose)

    def learn(self, pairs: Iterable[tuple[str, str]], *, rounds: int = 10, confusions: bool = True) -> EditChannel:
        """The channel that fits (signal, text) pairs: rates and confusions counted along the likeliest alignments.

        Repeated until the counts stay as they are (Viterbi training). Rates are counted with one half added, so that
        none is zero.
        """
        pairs, channel, before = list(pairs), self, None
        if not pairs:
            raise DataError("there are no pairs to learn from", fix="give lines of typed, a tab, meant")
        for _ in range(rounds):
            steps = [step for signal, text in pairs for step in channel.align(signal, text)]
            counts = Counter(name for name, meant, _ in steps if name == "insert" or meant[:1] in self._known)
            if counts == before:
                break
            before = counts
            units = sum(counts[name] for name in ("keep", "delete", "substitute", "transpose")) + 2.0
            gaps = sum(counts.values()) + len(pairs) + 1.0
            rates = {name: min(0.2, (counts[name] + 0.5) / (gaps if name == "insert" else units)) for name in RATES}
            seen = Counter((meant, typed) for name, meant, typed in steps if name == "substitute")
            channel = EditChannel(
                self.alphabet, **rates, confusions=dict(seen) if confusions else {}, max_gap=self.max_gap
            )
        return channel

    def sample(self, text: str, chance: np.random.Generator) -> str:
        """A signal drawn from p(signal | text)."""
        letters, out, at = list(self.alphabet), list[str](), 0
        while True:
            while chance.random() < self.insert:
                out.append(str(chance.choice(letters)))
            if at == len(text):
                return "".join(out)
            meant, after = text[at], text[at + 1 : at + 2]
            at += 1
            if meant not in self._known:
                out.append(meant)
                continue
            drawn = chance.random()
            if drawn < self.delete:
                continue
            if drawn < self.delete + self.substitute:
                others = [letter for letter in letters if letter != meant]
                out.append(str(chance.choice(others, p=[self.mistaken(meant, other) for other in others])))
            elif drawn < self.delete + self.substitute + self.transpose and after in self._known and after != meant:
                out += [after, meant]
                at += 1
            else:
                out.append(meant)


def _step(typed: str, meant: str) -> tuple[str, str, str]:
    if not meant:
        return "insert", "", typed
    if not typed:
        return "delete", meant, ""
    if len(meant) == 2:
        return "transpose", meant, typed
    return ("keep" if typed == meant else "substitute"), meant, typed


def read_pairs(lines: Sequence[str], where: str) -> list[tuple[str, str]]:
    """Pairs from lines of signal, a tab, text.

    Raises:
        DataError: a line without exactly one tab, by number.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        signal, tab, text = line.rstrip("\r\n").partition("\t")
        if not tab or "\t" in text:
            raise DataError(
                f"{where}:{number} is not two texts with one tab between", fix="write the signal, a tab, the text"
            )
        found.append((signal, text))
    return found
