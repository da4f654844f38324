"""Pairs of a source and a target: translation, summaries, tables and what is said of them.

From files (JSON lines or tab-separated), or made here: the made ones are the same on every machine and need no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from octavo.data.made_pairs import MADE
from octavo.data.pack import Batch, Packed, PackReport, Piece
from octavo.errors import DataError
from octavo.files import make_folder, write_atomic
from octavo.schema import Config

Array = np.ndarray[Any, Any]
SUFFIXES = (".jsonl", ".tsv")


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and what is to be written for it; ``where`` it stands, FILE:LINE, if it was read."""

    source: str
    target: str
    where: str = field(default="", compare=False)


class PairsConfig(Config):
    """Files of pairs, or a task that makes them.

    A line of a .jsonl file is an object with the keys ``source`` and ``target``, or as ``source_key`` and
    ``target_key`` say; one of a .tsv file is a source, a tab and a target. ``made`` are pairs of this package's own:
    ``dates`` (a date in words and in ISO form), ``tables`` (a small table and a sentence that says it), ``reverse``
    (a word and its letters backwards).
    """

    files: tuple[str, ...] = ()
    made: Literal["dates", "tables", "reverse"] | None = None
    n: int = Field(default=4000, ge=2, description="how many are made")
    source_key: str = "source"
    target_key: str = "target"
    max_source: int | None = Field(default=None, ge=1, description="tokens, of pairs that are kept; default: all")

    @model_validator(mode="after")
    def _one(self) -> PairsConfig:
        if bool(self.files) == (self.made is not None):
            raise ValueError("pairs come from files or are made; give one of files and made")
        return self

    def fingerprint(self) -> str:
        """Of the settings and the files' bytes."""
        digest = hashlib.sha256(self.model_dump_json().encode())
        for path in map(Path, self.files):
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}", fix="check the path") from None
        return digest.hexdigest()


def read(config: PairsConfig, seed: int = 0) -> list[Pair]:
    """All pairs, in the order of the files, or made by ``seed``.

    Raises:
        DataError: a file that cannot be read, a line that is no pair, or none at all.
    """
    if config.made is not None:
        return [Pair(source, target) for source, target in MADE[config.made](seed, config.n)]
    found: list[Pair] = []
    for path in map(Path, config.files):
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} is no file of pairs", fix=f"give {' or '.join(SUFFIXES)}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}", fix="check the path; files are UTF-8") from None
        lines = enumerate(text.split("\n"), 1)
        found += [_pair(line, f"{path}:{number}", path.suffix, config) for number, line in lines if line.strip()]
    if not found:
        raise DataError(f"there is no pair in {', '.join(config.files)}", fix="give some")
    return found


def write(path: Path, some: Iterable[Pair]) -> None:
    """A file of pairs that ``read`` reads."""
    lines = (json.dumps({"source": p.source, "target": p.target}, ensure_ascii=False) + "\n" for p in some)
    make_folder(path.parent)
    write_atomic(path, "".join(lines))


def _pair(line: str, where: str, suffix: str, config: PairsConfig) -> Pair:
    if suffix == ".tsv":
        parts = line.rstrip("\r").split("\t")
        if len(parts) != 2:
            raise DataError(f"{len(parts)} fields, a pair has two", fix="separate them by one tab", where=where)
        return Pair(parts[0], parts[1], where)
    try:
        row = json.loads(line)
        source, target = row[config.source_key], row[config.target_key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"no pair: {error}", fix="set source_key and target_key as in the file", where=where) from None
    if not isinstance(source, str) or not isinstance(target, str):
        raise DataError("source and target must be texts", fix="write them as texts", where=where)
    return Pair(source, target, where)


class PairRows(Packed):
    """One pair a row: the target shifted in ``tokens`` and ``targets``, and ``source`` with ``source_valid`` beside it.

    Args:
        pairs: ids of whole sources, and of targets without their first token but with the one that ends them.
        start: the token that every target begins with.
        seq_len: the longest target; max_source: the longest source. Pairs beyond either are left out.
    """

    def __init__(
        self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], start: int, seq_len: int, max_source: int,
        pad: int = 0,
    ):  # fmt: skip
        given = [(list(source), list(target)) for source, target in pairs]
        self.numbers = [i for i, (s, t) in enumerate(given) if 0 < len(s) <= max_source and 0 < len(t) <= seq_len]
        if not self.numbers:
            raise DataError(
                f"none of {len(given):,} pairs fits: sources up to {max_source} tokens, targets up to {seq_len}",
                fix="use a larger seq_len or max_source",
            )
        kept = [given[i] for i in self.numbers]
        self.n_rows, self.dropped, self.pad = len(kept), len(given) - len(kept), pad
        self.seq_len = max(len(target) for _, target in kept)
        self.source, self.source_valid = _padded([source for source, _ in kept], pad)
        self.targets, self.valid = _padded([target for _, target in kept], pad)
        self.tokens = np.where(self.valid, np.pad(self.targets, ((0, 0), (1, 0)), constant_values=start)[:, :-1], pad)
        parts = (self.source, self.source_valid, self.tokens, self.targets, self.valid)
        self.fingerprint = hashlib.sha256(b"pairs" + b"".join(part.tobytes() for part in parts)).hexdigest()

    def rows(self, epoch: int, index: Array) -> Batch:
        valid = self.valid[index]
        return {
            "tokens": self.tokens[index],
            "targets": self.targets[index],
            "loss_mask": valid.copy(),
            "doc_ids": np.where(valid, 0, -1),
            "positions": np.where(valid, np.arange(self.seq_len), 0),
            "valid": valid,
            "source": self.source[index],
            "source_valid": self.source_valid[index],
        }

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        n = int(self.valid[number].sum())
        return [Piece(0, n, n, number, 0, n)]

    def report(self) -> PackReport:
        targets, slots = int(self.valid.sum()), self.valid.size
        padded, samples = 1 - targets / slots, self.n_rows + self.dropped
        return PackReport(self.n_rows, slots, targets, padded, samples, dropped=self.dropped)


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Array, Array]:
    lengths = np.array([len(row) for row in rows])
    valid = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(valid.shape, pad, np.int64)
    ids[valid] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return ids, valid
