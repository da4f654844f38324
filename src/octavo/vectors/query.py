"""Word vectors and what can be asked of them: neighbours, analogies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from octavo.errors import ConfigError, DataError, nearest

Method = Literal["add", "mul"]
EPSILON = 1e-3  # Levy & Goldberg 2014, section 4.2
ROWS = 256  # questions answered at a time


@dataclass
class Vectors:
    """A vector for each word.

    Args:
        words: spellings, each once.
        matrix: (V, D) float32.
    """

    words: list[str]
    matrix: np.ndarray

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or len(self.words) != len(self.matrix):
            raise ValueError(f"{len(self.words)} words for a matrix of shape {self.matrix.shape}")

    @property
    def dim(self) -> int:
        return self.matrix.shape[1]

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.index

    def __getitem__(self, word: str) -> np.ndarray:
        """The vector of a word."""
        return self.matrix[self.find(word)]

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each word."""
        return {word: i for i, word in enumerate(self.words)}

    @cached_property
    def unit(self) -> np.ndarray:
        """The vectors with length 1; a zero vector stays zero."""
        length = np.linalg.norm(self.matrix, axis=1, keepdims=True)
        return self.matrix / np.maximum(length, np.finfo(np.float32).tiny)

    def find(self, word: str) -> int:
        """The row of ``word``.

        Raises:
            ConfigError: it has none.
        """
        row = self.index.get(word)
        if row is None:
            alike = (w for w in self.words if w[:1] == word[:1] and abs(len(w) - len(word)) < 3)
            close = nearest(word, [word.lower()] if word.lower() in self else alike)
            fix = f"did you mean `{close[0]}`?" if close else "ask for a word of the file, spelt as it is there"
            raise ConfigError(f"there is no vector for {word!r}", fix=fix)
        return row

    def near(self, word: str, n: int = 10) -> list[tuple[str, float]]:
        """The ``n`` words whose vectors point most nearly the same way, with the cosine; not the word itself."""
        row = self.find(word)
        return self._best(self.unit @ self.unit[row], [row], n)

    def analogy(self, a: str, b: str, c: str, n: int = 10, method: Method = "add") -> list[tuple[str, float]]:
        """``a`` is to ``b`` as ``c`` is to these: best first, the three words left out.

        Args:
            method: ``add``: cos(d, b - a + c) up to a factor (Mikolov et al. 2013c). ``mul``: cos(d, b) cos(d, c) /
                cos(d, a), cosines moved to 0 to 1 (Levy & Goldberg 2014, section 4.2).
        """
        rows = np.array([[self.find(word) for word in (a, b, c)]])
        return self._best(self._scores(rows, method)[0], rows[0], n)

    def answer(self, questions: Iterable[Sequence[str]], method: Method = "add") -> tuple[int, int]:
        """How many of the questions (a, b, c, d) are answered with d first, and how many have vectors for all four."""
        known = [[self.index[word] for word in q] for q in questions if all(word in self for word in q)]
        rows = np.array(known, np.int64).reshape(-1, 4)
        right = 0
        for at in range(0, len(rows), ROWS):
            block = rows[at : at + ROWS]
            scores = self._scores(block[:, :3], method)
            np.put_along_axis(scores, block[:, :3], -np.inf, 1)
            right += int((scores.argmax(1) == block[:, 3]).sum())
        return right, len(rows)

    def _scores(self, rows: np.ndarray, method: Method) -> np.ndarray:
        """Every word's score (Q, V) as the answer to questions (Q, 3)."""
        a, b, c = rows.T
        if method == "add":
            return (self.unit[b] - self.unit[a] + self.unit[c]) @ self.unit.T
        cos_a, cos_b, cos_c = ((self.unit[i] @ self.unit.T + 1) / 2 for i in (a, b, c))
        return cos_b * cos_c / (cos_a + EPSILON)

    def _best(self, scores: np.ndarray, without: Sequence[int] | np.ndarray, n: int) -> list[tuple[str, float]]:
        scores = scores.copy()
        scores[without] = -np.inf
        n = max(0, min(n, len(scores) - len(set(map(int, without)))))
        first = np.argpartition(-scores, n - 1)[:n] if n else np.zeros(0, np.int64)
        ranked = first[np.lexsort((first, -scores[first]))]
        return [(self.words[i], float(scores[i])) for i in ranked]


def questions(lines: Iterable[str], where: str) -> list[tuple[str, list[list[str]]]]:
    """The sections of an analogy file: lines ``: name`` begin one, other lines are four words (``#`` is a remark).

    Raises:
        DataError: a line is neither, or there is none; names it.
    """
    found: list[tuple[str, list[list[str]]]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if words[0] == ":":
            found.append((" ".join(words[1:]), []))
        elif len(words) == 4:
            if not found:
                found.append(("all", []))
            found[-1][1].append(words)
        else:
            what = f"an analogy has four words, here are {len(words)}"
            raise DataError(what, where=f"{where}:{number}", fix="write `a b c d`: a is to b as c is to d")
    if not any(asked for _, asked in found):
        raise DataError(f"{where} has no analogies", fix="write one a line: a b c d")
    return found
