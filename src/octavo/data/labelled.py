"""Texts with a label, for classification: read from .jsonl, .json, .csv and .tsv, made into rows of one text each."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from octavo.data.chat_formats import BadRow
from octavo.data.chat_rows import rows as json_rows
from octavo.data.pack import Batch, Packed, PackReport, Piece
from octavo.data.permutation import permute
from octavo.errors import DataError
from octavo.files import sha256_file
from octavo.schema import Config
from octavo.tokenizer.frame import frame

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
Label = str | tuple[str, ...] | tuple[float, ...]
Problem = Literal["single_label", "multi_label", "regression"]
NO_LABEL = -1


class LabelledConfig(Config):
    """Rows of a text, perhaps a second one, and a label.

    Args:
        paths: files or globs; .jsonl and .json (also .gz, .zst) hold objects, .csv and .tsv a line of column names.
        text, text_b, label: the names of the columns; text_b may be missing.
        problem: ``single_label`` reads a label as a name; ``multi_label`` a list of names, in tables with | between
            them; ``regression`` a number or a list of them.
        labels: the classes in their order; default: all that occur, sorted.
        pooling: what the classes are read from; default: an encoder's first token, a decoder's last.
    """

    paths: tuple[str, ...] = Field(min_length=1)
    text: str = "text"
    text_b: str = "text_b"
    label: str = "label"
    problem: Problem = "single_label"
    labels: tuple[str, ...] | None = Field(default=None, min_length=1)
    pooling: Literal["first", "last", "mean"] | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, the second of a pair or None, its label, and the file and line (1-based) they stand in."""

    text: str
    second: str | None
    label: Label
    source: str = ""
    line: int = 0


def read(config: LabelledConfig) -> list[Labelled]:
    """Every row of the files, in order.

    Raises:
        DataError: no file matches, or a row cannot be read, with file and line.
    """
    found = []
    for path in files(config.paths):
        for line, row in _rows(path):
            try:
                if isinstance(row, BadRow):
                    raise row
                if not isinstance(row, Mapping):
                    raise BadRow("expected an object with a text and a label")
                for name in (config.text, config.label):
                    if row.get(name) is None:
                        raise BadRow(f"there is no {name!r}; the columns are {', '.join(map(str, row))}")
                second = row.get(config.text_b)
                if not isinstance(row[config.text], str) or not isinstance(second, str | None):
                    raise BadRow("a text is not a string")
                found.append(Labelled(row[config.text], second, _label(row[config.label], config), str(path), line))
            except BadRow as reason:
                fix = "correct it, or name the columns with text, text_b and label"
                raise DataError(str(reason), where=f"{path}:{line}", fix=fix) from None
    if not found:
        raise DataError(f"no row in {', '.join(config.paths)}", fix="give rows with a text and a label")
    return found


def fingerprint(config: LabelledConfig) -> str:
    """SHA-256 over the names and contents of the files."""
    described = [(str(path), sha256_file(path)) for path in files(config.paths)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def classes(rows: Sequence[Labelled], config: LabelledConfig) -> tuple[str, ...]:
    """The names of the classes: those given, or all that occur; of numbers, their places.

    Raises:
        DataError: a label is not among those given, or there are fewer than two classes.
    """
    if config.problem == "regression":
        return config.labels or tuple(f"value_{i}" for i in range(len(rows[0].label)))
    seen = {name for row in rows for name in ([row.label] if isinstance(row.label, str) else row.label)}
    if config.labels is not None:
        if unknown := sorted(map(str, seen - set(config.labels))):
            raise DataError(f"the label {unknown[0]!r} is not one of labels", fix="add it, or correct the rows")
        return config.labels
    if len(seen) < 2:
        raise DataError(f"there is one class, {next(iter(seen), None)!r}", fix="give rows of two classes or more")
    return tuple(sorted(map(str, seen)))


def targets(rows: Sequence[Labelled], names: Sequence[str], problem: Problem) -> Array:
    """Labels as numbers: (N,) int64, or (N, C) float32 where a text may have several.

    Raises:
        DataError: a row has another number of values than the first.
    """
    places = {name: i for i, name in enumerate(names)}
    if problem == "single_label":
        return np.array([places[str(row.label)] for row in rows], np.int64)
    out = np.zeros((len(rows), len(names)), np.float32)
    for i, row in enumerate(rows):
        if problem == "multi_label":
            out[i, [places[str(name)] for name in row.label]] = 1
        elif len(row.label) != len(names):
            raise DataError(
                f"{len(row.label)} numbers instead of {len(names)}",
                where=f"{row.source}:{row.line}",
                fix="give every row as many as the first",
            )
        else:
            out[i] = row.label
    return out


class LabelledRows(Packed):
    """One text or pair a row, framed by its special tokens, the longer one cut to fit; ``labels`` beside the fields.

    Args:
        typed: whether the model has types for the texts of a pair: then the rows have ``token_types``.
    """

    def __init__(
        self, rows: Sequence[Labelled], labels: Array, tokenizer: Tokenizer, seq_len: int, *, typed: bool = False
    ):
        self.given, self.labels, self.typed = rows, labels, typed
        self.seq_len, self.n_rows = seq_len, len(rows)
        self.pad = tokenizer.special.pad if tokenizer.special.pad is not None else 0
        firsts = tokenizer.encode_batch([row.text for row in rows])
        seconds = iter(tokenizer.encode_batch([row.second for row in rows if row.second is not None]))
        self.framed = [
            frame(tokenizer, ids.tolist(), next(seconds).tolist() if row.second is not None else None,
                  max_tokens=seq_len)
            for ids, row in zip(firsts, rows, strict=True)
        ]  # fmt: skip
        self.cut = sum(len(ids) >= seq_len for ids, _ in self.framed)
        digest = hashlib.sha256(f"labelled {seq_len} {typed} {tokenizer.hash}".encode())
        digest.update(labels.tobytes())
        for ids, _ in self.framed:
            digest.update(np.asarray([len(ids), *ids], np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def n_tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.framed)

    def rows(self, epoch: int, index: Array) -> Batch:
        shape = (len(index), self.seq_len)
        tokens, types = np.full(shape, self.pad, np.int64), np.zeros(shape, np.int64)
        valid = np.zeros(shape, bool)
        for row, number in enumerate(index):
            ids, kinds = self.framed[int(number)]
            tokens[row, : len(ids)], types[row, : len(ids)], valid[row, : len(ids)] = ids, kinds, True
        batch = {
            "tokens": tokens,
            "targets": tokens,
            "loss_mask": np.zeros(shape, bool),
            "doc_ids": np.where(valid, 0, -1),
            "positions": np.where(valid, np.arange(self.seq_len), 0),
            "valid": valid,
            "labels": self.labels[index],
        }
        return {**batch, "token_types": types} if self.typed else batch

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        n = len(self.framed[number][0])
        return [Piece(0, n, n, number, 0, n)]

    def report(self) -> PackReport:
        slots = self.n_rows * self.seq_len
        return PackReport(self.n_rows, slots, self.n_rows, 1 - self.n_tokens / slots, self.n_rows, truncated=self.cut)


def _label(value: Any, config: LabelledConfig) -> Label:
    if config.problem == "single_label":
        if isinstance(value, list | dict):
            raise BadRow("a label is not one name; set problem to multi_label")
        return str(value)
    if config.problem == "multi_label":
        names = value if isinstance(value, list) else [part for part in str(value).split("|") if part]
        return tuple(str(name) for name in names)
    try:
        return tuple(float(number) for number in (value if isinstance(value, list) else [value]))
    except (TypeError, ValueError):
        raise BadRow(f"the label {value!r} is not a number") from None


def files(paths: Sequence[str]) -> list[Path]:
    """The files that these paths and globs name, in order.

    Raises:
        DataError: one names none.
    """
    found: list[Path] = []
    for pattern in paths:
        here = [Path(pattern)] if Path(pattern).is_file() else sorted(Path(name) for name in glob(pattern))
        if not here:
            raise DataError(f"no file matches {pattern}", fix="check the path")
        found += here
    return found


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix not in (".csv", ".tsv"):
        yield from json_rows(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", fix="save it as UTF-8") from None
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        for row in table:
            yield table.line_num, {name: value or None for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise DataError(f"{path} is no table: {error}", where=f"{path}:{table.line_num}", fix="save it again") from None


def prepare(
    config: LabelledConfig, tokenizer: Tokenizer, seq_len: int, *, held_out: float, seed: int, typed: bool
) -> tuple[LabelledRows, LabelledRows | None, tuple[str, ...]]:
    """The rows that are trained on, the share that is held out, and the names of the classes.

    Which are held out depends on the seed and their number alone: files are often sorted by class.

    Raises:
        DataError: see ``read`` and ``classes``; or nothing is left to train on.
    """
    every = read(config)
    names = classes(every, config)
    order = permute(np.arange(len(every)), len(every), seed, 3)
    n = int(len(every) * held_out)
    parts = [[every[i] for i in sorted(some)] for some in (order[n:], order[:n])]
    if not parts[0]:
        raise DataError("no text is left to train on", fix="hold out fewer, or give more rows")
    made = [
        LabelledRows(part, targets(part, names, config.problem), tokenizer, seq_len, typed=typed) if part else None
        for part in parts
    ]
    assert made[0] is not None
    return made[0], made[1], names
