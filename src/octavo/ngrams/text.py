"""Text as token ids for n-gram models: words between blanks, characters, or bytes.

A line is a document ``<s> tokens </s>``, an empty one too, as in KenLM. A vocabulary made here
has ``<unk>``, ``<s>`` and ``</s>`` as ids 0, 1 and 2, and words and characters in the order in which they were met.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from octavo import files
from octavo.errors import CheckpointError, DataError
from octavo.ngrams.arpa import BEGIN, ENCODING, END, UNKNOWN

BOS = 1
FILE = "vocabulary.json"
READ_BYTES = 1 << 24
BLANKS = bytes.maketrans(b"\0\t\r", b"   ")
Units = Literal["words", "characters", "bytes"]


class Vocabulary:
    """What an id stands for.

    Args:
        units: what a token is.
        names: the tokens from id 0 on, the three specials among them; None for these three alone.
    """

    def __init__(self, units: Units, names: list[str] | None = None):
        self.units: Units = units
        self.names = [UNKNOWN, BEGIN, END] if names is None else list(names)
        if names is None and units == "bytes":
            self.names += [f"<0x{byte:02X}>" for byte in range(256)]
        self._ids = {name.encode(**ENCODING): id for id, name in enumerate(self.names)}
        try:
            self.unk, self.bos, self.eos = (self._ids[name.encode()] for name in (UNKNOWN, BEGIN, END))
        except KeyError as error:
            raise DataError(
                f"the vocabulary has no {error.args[0].decode()}", fix="use a model made of sentences <s> ... </s>"
            ) from None

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, lines: bytes, *, grow: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Whole lines, each with its line feed -> (tokens (N,) int32, where each document begins).

        Args:
            grow: give tokens that were never met ids of their own; else they are ``<unk>``.

        Raises:
            DataError: ``grow``, and the text has one of the specials as a word; or characters that are not UTF-8.
        """
        if self.units == "words":
            ids = self._words(lines, grow)
        elif self.units == "bytes":
            codes = np.frombuffer(lines, np.uint8)
            ids = np.array([self._ids.get(f"<0x{byte:02X}>".encode(), self.unk) for byte in range(256)], np.int32)[
                codes
            ]
            ids[codes == 10] = -1
        else:
            ids = self._characters(lines, grow)
        return framed(ids, self.bos, self.eos)

    def _words(self, lines: bytes, grow: bool) -> np.ndarray:
        words = list(filter(None, lines.translate(BLANKS).replace(b"\n", b" \n ").split(b" ")))
        table = _Growing(self._ids) if grow else _Fixed(self._ids, self.unk)
        table[b"\n"] = -1
        ids = np.fromiter(map(table.__getitem__, words), np.int32, len(words))
        if grow:
            del table[b"\n"]
            special = np.flatnonzero(np.isin(ids, (self.unk, self.bos, self.eos)))
            if len(special):
                raise DataError(
                    f"the text has {self.names[ids[special[0]]]!r} as a word", fix="remove it, or write it another way"
                )
            self._ids = dict(table)
            self.names += [word.decode(**ENCODING) for word in list(self._ids)[len(self.names) :]]
        else:
            ids[(ids == self.bos) | (ids == self.eos)] = self.unk
        return ids

    def _characters(self, lines: bytes, grow: bool) -> np.ndarray:
        try:
            text = lines.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"the text is not UTF-8: {error}", fix="convert it, or use bytes") from None
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
        distinct, first, which = np.unique(codes, return_index=True, return_inverse=True)
        ids = np.zeros(len(distinct), np.int32)
        for i in np.argsort(first):
            name = character_name(int(distinct[i]))
            if grow and distinct[i] != 10 and name.encode() not in self._ids:
                self._ids[name.encode()] = len(self.names)
                self.names.append(name)
            ids[i] = -1 if distinct[i] == 10 else self._ids.get(name.encode(), self.unk)
        return ids[which]


class _Growing(dict[bytes, int]):
    """Gives a word that is asked for the first time the next id (the line feed has none)."""

    def __missing__(self, word: bytes) -> int:
        self[word] = id = len(self) - 1
        return id


class _Fixed(dict[bytes, int]):
    """Gives every other word the id of the unknown one."""

    def __init__(self, ids: dict[bytes, int], unknown: int):
        super().__init__(ids)
        self.unknown = unknown

    def __missing__(self, word: bytes) -> int:
        return self.unknown


def character_name(code: int) -> str:
    """A character as a word: itself, or its number where it would be blank or invisible."""
    character = chr(code)
    return character if character.isprintable() and not character.isspace() else f"<0x{code:02X}>"


def framed(ids: np.ndarray, bos: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids with -1 at line feeds -> ``</s>`` there and ``<s>`` before every line; and where the lines begin."""
    end = ids == -1
    n_lines = int(np.count_nonzero(end))
    tokens = np.empty(len(ids) + n_lines, np.int32)
    place = np.arange(len(ids)) + np.cumsum(end) - end + 1
    tokens[place] = np.where(end, eos, ids)
    starts = np.concatenate([[0], place[end] + 1])[:n_lines]
    tokens[starts] = bos
    return tokens, starts


def read_lines(paths: list[Path], block: int = READ_BYTES) -> Iterator[bytes]:
    """Files as pieces of whole lines, about ``block`` bytes each; a last line without a line feed gets one."""
    for path in paths:
        rest = b""
        with open(path, "rb") as file:
            while data := file.read(block):
                cut = data.rfind(b"\n") + 1
                if cut:
                    yield rest + data[:cut]
                    rest = data[cut:]
                else:
                    rest += data
        if rest:
            yield rest + b"\n"


def encode_files(
    vocabulary: Vocabulary, paths: Sequence[str | os.PathLike[str]], *, grow: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of tokens and the begins of documents in them, of files in their order."""
    for lines in read_lines([Path(path) for path in paths]):
        yield vocabulary.encode(lines, grow=grow)


def save_vocabulary(vocabulary: Vocabulary, folder: str | os.PathLike[str]) -> None:
    """Write ``vocabulary.json`` beside a model."""
    files.write_json(Path(folder) / FILE, {"units": vocabulary.units, "names": vocabulary.names})


def load_vocabulary(folder: str | os.PathLike[str], vocab_size: int) -> Vocabulary:
    """The vocabulary beside a model.

    Raises:
        CheckpointError: there is none, or another model's.
    """
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        units, names = found["units"], [str(name) for name in found["names"]]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", fix="train with `octavo ngram train`") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="copy the whole folder again") from None
    if units not in ("words", "characters", "bytes") or len(names) != vocab_size:
        raise CheckpointError(f"{path} is not the vocabulary of this model", fix="copy the whole folder again")
    return Vocabulary(units, names)
