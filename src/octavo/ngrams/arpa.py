"""ARPA files in and out: the text form of back-off models that SRILM, KenLM and speech tools read and write.

A line is ``log10 p <tab> words <tab> log10 back-off weight``; the highest order has no weight. As in KenLM ``<s>`` is
only ever context (its own probability is written as 0 and not read), ``</s>`` ends a sentence, and a word that is not
listed is ``<unk>``. A probability or weight of 0 is written as -99.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octavo import files
from octavo.errors import ConfigError, DataError
from octavo.ngrams.model import NGram
from octavo.ngrams.smoothing import Smoothed

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
ZERO = -99.0
UNLISTED = 1e-100  # of an unknown word, where a file has no <unk>; as in KenLM
BLOCK = 1 << 18
ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}  # words are bytes to those tools


def write_arpa(model: NGram, words: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write a model in ARPA form.

    Args:
        words: (V,) the text of every token id, without white space.

    Raises:
        ConfigError: the smoothing has no back-off form, or a word cannot stand in such a file.
    """
    if model.missing != 1.0 or (model.flat and model.order > 1):
        raise ConfigError(
            f"smoothing {model.config.smoothing.kind} has no ARPA form: unseen n-grams do not follow from lower orders",
            fix="use modified_kneser_ney, kneser_ney, katz, interpolated or mle",
        )
    if len(words) != model.vocab_size:
        raise ConfigError(f"{len(words)} words do not name {model.vocab_size} ids", fix="give one word for every id")
    bad = next((word for word in words if not word or any(c in word for c in " \t\n\r\0")), None)
    if bad is not None:
        raise ConfigError(f"the word {bad!r} cannot stand in an ARPA file", fix="name it without white space")
    names = np.array(list(words), object)
    path = Path(path)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(aside, "x", newline="\n", **ENCODING) as file:
            file.write("\\data\\\n")
            file.writelines(f"ngram {k}={len(keys)}\n" for k, keys in enumerate(model.keys, start=1))
            for order in range(1, model.order + 1):
                file.write(f"\n\\{order}-grams:\n")
                for first in range(0, len(model.keys[order - 1]), BLOCK):
                    file.writelines(_lines(model, names, order, first))
            file.write("\n\\end\\\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    files.fsync_path(path.parent)


def _lines(model: NGram, names: np.ndarray, order: int, first: int) -> Iterator[str]:
    """The lines of a block of n-grams of one order."""
    ids = np.arange(first, min(first + BLOCK, len(model.keys[order - 1])))
    log_prob = _log10(model.levels[order - 1].prob[ids])
    if order == 1 and model.config.never is not None:
        log_prob[ids == model.config.never] = 0.0
    columns: list[Any] = []
    left = ids
    for k in range(order, 0, -1):
        left, token = np.divmod(model.keys[k - 1][left], model.vocab_size)
        columns.insert(0, names[token])
    form = "%.8g\t" + " ".join(["%s"] * order)
    if order < model.order:
        columns.append(_log10(model.levels[order].gamma[ids]).tolist())
        form += "\t%.8g"
    return map((form + "\n").__mod__, zip(log_prob.tolist(), *columns))


def _log10(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log10(values), ZERO) + 0.0  # no -0


def read_arpa(path: str | os.PathLike[str]) -> tuple[NGram, list[str]]:
    """Read a model and its words; an id is the place of its word among the unigrams.

    Raises:
        DataError: the file is not what it says it is, with the line.
    """
    try:
        with open(path, "rb") as file:
            return _Reader(path, file.read()).model()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", fix="check the path") from None


class _Reader:
    """The sections of one file."""

    def __init__(self, path: Any, data: bytes):
        self.path = str(path)
        self.lines = data.translate(bytes.maketrans(b"\r\0", b"  ")).split(b"\n")

    def refuse(self, what: str, line: int) -> DataError:
        return DataError(what, fix="write the file again, or check where it was cut", where=f"{self.path}:{line + 1}")

    def header(self) -> tuple[list[int], int]:
        """How many n-grams each order has, and the line after the header."""
        at = next((i for i, line in enumerate(self.lines) if line.strip() == b"\\data\\"), None)
        if at is None:
            raise self.refuse("no \\data\\ line: this is no ARPA file", 0)
        sizes: list[int] = []
        for at in range(at + 1, len(self.lines)):  # noqa: B020 - goes on where the search stopped
            line = self.lines[at].strip()
            if line.startswith(b"\\"):
                break
            if line:
                order, equals, n = line.removeprefix(b"ngram ").partition(b"=")
                if not equals or not order.strip().isdigit() or not n.strip().isdigit():
                    raise self.refuse(f"the header says {line[:60].decode(**ENCODING)!r}", at)
                if int(order) != len(sizes) + 1:
                    raise self.refuse(f"order {int(order)} where {len(sizes) + 1} is next", at)
                sizes.append(int(n))
        if not sizes:
            raise self.refuse("the header names no n-grams", at)
        return sizes, at

    def model(self) -> tuple[NGram, list[str]]:
        sizes, at = self.header()
        keys: list[np.ndarray] = []
        levels: list[Smoothed] = []
        weight = np.ones(1)
        names: dict[bytes, int] = {}
        for order, n in enumerate(sizes, start=1):
            at = self._begin(at, f"\\{order}-grams:")
            prob, words, weights = self._columns(order, n, at, last=order == len(sizes))
            at += n
            if order == 1:
                names = {word: id for id, word in enumerate(words[0])}
                if len(names) != n:
                    raise self.refuse("a word is listed twice", at)
                never = names.get(BEGIN.encode())
                if never is not None:
                    prob[never] = 0.0
                if UNKNOWN.encode() not in names:
                    names[UNKNOWN.encode()] = n
                    prob, weights = np.append(prob, UNLISTED), np.append(weights, 1.0)
                key = np.arange(len(names))
            else:
                key = self._keys(order, at - n, words, names, keys)
            sort = np.argsort(key)
            if np.any(np.diff(key[sort]) == 0):
                raise self.refuse(f"an n-gram of order {order} is listed twice", at)
            keys.append(key[sort])
            levels.append(Smoothed(prob[sort], weight))
            weight = weights[sort]
        self._begin(at, "\\end\\")
        config = NGram.Config(order=len(sizes), smoothing="arpa", never=names.get(BEGIN.encode()))
        words_of_ids = [name.decode(**ENCODING) for name in names]
        return NGram(config, len(names), keys, levels, {"read_from": Path(self.path).name}), words_of_ids

    def _begin(self, at: int, title: str) -> int:
        while at < len(self.lines) and not self.lines[at].strip():
            at += 1
        if at == len(self.lines) or self.lines[at].strip() != title.encode():
            raise self.refuse(f"{title} should stand here", min(at, len(self.lines) - 1))
        return at + 1

    def _columns(self, order: int, n: int, at: int, *, last: bool) -> tuple[np.ndarray, list[list[bytes]], np.ndarray]:
        """Probabilities, words and weights of one section."""
        section = self.lines[at : at + n]
        width = order + 1 if last else order + 2
        fields = list(filter(None, b" ".join(section).replace(b"\t", b" ").split(b" ")))
        if len(fields) != n * width:  # a weight of 1 may be left out
            fields = []
            for number, line in enumerate(section):
                found = list(filter(None, line.replace(b"\t", b" ").split(b" ")))
                if not order + 1 <= len(found) <= order + 2 or line.startswith(b"\\"):
                    raise self.refuse(f"order {order} has no {n} n-grams of this form", at + number)
                fields += [*found, b"0"][:width]
            if len(section) < n:
                raise self.refuse("the file ends here", at + len(section) - 1)
        try:
            log_prob = np.array(fields[0::width], np.float64)
            weight = np.zeros(n) if last else np.array(fields[width - 1 :: width], np.float64)
        except ValueError as error:
            raise self.refuse(f"in order {order}: {error}", at) from None
        words = [fields[k::width] for k in range(1, order + 1)]
        return _power(log_prob), words, _power(weight)

    def _keys(
        self, order: int, at: int, words: list[list[bytes]], names: dict[bytes, int], keys: list[np.ndarray]
    ) -> np.ndarray:
        """The key of every n-gram of one section."""
        found = np.zeros(0, np.int64)
        for k, column in enumerate(words, start=1):
            try:
                token = np.fromiter(map(names.__getitem__, column), np.int64, len(column))
            except KeyError as error:
                raise self.refuse(f"order {order} has a word that is no unigram: {error.args[0]!r}", at) from None
            found = token if k == 1 else found * len(names) + token
            if k < order:
                place = np.minimum(np.searchsorted(keys[k - 1], found), len(keys[k - 1]) - 1)
                missing = np.flatnonzero(keys[k - 1][place] != found)
                if len(missing):
                    raise self.refuse(f"the first {k} words of this n-gram are not listed", at + int(missing[0]))
                found = place
        return found


def _power(log10: np.ndarray) -> np.ndarray:
    return np.where(log10 <= ZERO, 0.0, 10.0 ** np.maximum(log10, ZERO))
