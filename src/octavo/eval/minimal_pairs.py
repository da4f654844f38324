"""Minimal pairs: two sentences that differ in one thing, of which one is right. Does the model find it likelier?

The likelihood is that of the whole sentence after ``bos``, the end of the document left out. Source: Warstadt et al.
2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs", section 3; its files are read as they are.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import DataError
from octavo.eval.answers import wilson
from octavo.eval.metrics import Scorer

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

MAX_BYTES = 1 << 28
KEYS = (("sentence_good", "sentence_bad"), ("good", "bad"))


@dataclass(frozen=True, slots=True)
class Pair:
    """``good`` should be likelier than ``bad``; ``group`` says what the pair is about."""

    good: str
    bad: str
    group: str = ""


@dataclass
class PairScores:
    """How many pairs were put right, all and by group; pairs of equal likelihood count half."""

    n: int = 0
    right: float = 0.0
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.right / self.n if self.n else float("nan")

    def figures(self) -> dict[str, Any]:
        """Ready for JSON; the interval is Wilson's at 95 %, chance is one half."""
        return {
            "pairs": self.n,
            "right": self.right,
            "accuracy": self.accuracy,
            "interval_95": list(wilson(round(self.right), self.n)),
            "groups": {name: right / n for name, (right, n) in sorted(self.groups.items())},
        }


def read(paths: Iterable[str | Path], at_most: int | None = None) -> list[Pair]:
    """Pairs of JSONL files, of the JSONL files in a folder or in a zip archive; a file's name is its group.

    Args:
        at_most: pairs of each file, evenly spread over it.

    Raises:
        DataError: a file is missing, too large, not JSON or without the two sentences, with its line.
    """
    found: list[Pair] = []
    for name, text in _files(paths):
        rows = [_pair(line, name, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        step = max(1.0, len(rows) / at_most) if at_most else 1.0
        found += [rows[int(i * step)] for i in range(int(len(rows) / step))]
    if not found:
        raise DataError("there are no minimal pairs in the files given", fix="give JSONL with sentence_good and _bad")
    return found


def _files(paths: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    for path in map(Path, paths):
        try:
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    for info in archive.infolist():
                        inside = Path(info.filename)
                        if inside.suffix == ".jsonl" and not inside.name.startswith("."):
                            yield inside.stem, _text(path / inside, info.file_size, partial(archive.read, info))
                continue
            for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
                yield file.stem, _text(file, file.stat().st_size, file.read_bytes)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} cannot be read: {error}", fix="give JSONL files, a folder or a zip") from None


def _text(path: Path, n_bytes: int, get: Callable[[], bytes]) -> str:
    if n_bytes > MAX_BYTES:
        raise DataError(f"{path} holds {n_bytes:,} bytes, more than {MAX_BYTES:,}", fix="give a smaller file")
    try:
        return get().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text at byte {error.start:,}", fix="save it as UTF-8") from None


def _pair(line: str, name: str, number: int) -> Pair:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    for good, bad in KEYS:
        if isinstance(row, dict) and isinstance(row.get(good), str) and isinstance(row.get(bad), str):
            return Pair(row[good], row[bad], name)
    raise DataError(f"{name}:{number} is no pair", fix="a line is {sentence_good: ..., sentence_bad: ...}")


def score(scorer: Scorer, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> PairScores:
    """Ask ``scorer`` for the likelihood of both sentences of every pair.

    Without a ``bos`` a sentence's first token is given, not scored: pairs that differ only there cannot be told apart.
    """
    bos = tokenizer.special.bos
    before = [] if bos is None else [bos]
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    documents = [np.array([*before, *ids], np.int32) for ids in tokenizer.encode_batch(texts)]
    known = [document for document in documents if len(document) > 1]
    log_probs, _ = scorer(known)
    sums = iter(np.add.reduceat(log_probs, np.cumsum([0, *(len(d) - 1 for d in known[:-1])])) if known else ())
    likelihood = [float(next(sums)) if len(document) > 1 else 0.0 for document in documents]
    found = PairScores()
    for pair, good, bad in zip(pairs, likelihood[::2], likelihood[1::2], strict=True):
        right = 1.0 if good > bad else 0.5 if good == bad else 0.0
        before_right, n = found.groups.get(pair.group, (0.0, 0))
        found.groups[pair.group] = (before_right + right, n + 1)
        found.n, found.right = found.n + 1, found.right + right
    return found
