"""Files of word vectors, of this and of other programs.

- ``vec``: the text format of word2vec, fastText and gensim: a line ``words numbers``, then a line for each word.
- ``glove``: the same without the first line.
- ``bin``: word2vec's binary format: that first line, then each word, a space, its numbers as little-endian fp32.

The fields of a line are separated by single spaces and nothing else: words of the wild contain all other white space.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np

from octavo.errors import ConfigError, DataError
from octavo.vectors.query import Vectors

Format = Literal["vec", "glove", "bin"]
SUFFIXES: dict[str, Format] = {".vec": "vec", ".bin": "bin", ".glove": "glove", ".txt": "glove"}
MAX_DIM, MAX_WORDS, MAX_WORD_BYTES = 1 << 16, 1 << 28, 1 << 12
HEADER = re.compile(rb"(\d{1,12}) (\d{1,12}) ?\r?\n?")
NUMBER_BYTES = 64  # of one number in a text
REFETCH = "fetch the file again"


def format_of(path: str | Path) -> Format:
    """The format that a file's name asks for.

    Raises:
        ConfigError: it asks for none.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: {suffix or 'no suffix'} is no format of word vectors", fix="name it .vec or .bin")
    return SUFFIXES[suffix]


def read(
    path: str | Path, format: Format | None = None, *, limit: int | None = None, only: Collection[str] | None = None
) -> Vectors:
    """Read word vectors.

    Args:
        format: by default told from the file: a first line of two whole numbers begins ``vec`` and ``bin``, which is
            ``bin`` where the second line is no text of that many numbers.
        limit: read only so many words from the beginning.
        only: keep only these words.

    Raises:
        DataError: the file is not what it says it is; names the line, or the word's number.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a plain file", fix="give a file of word vectors")
        with open(path, "rb") as file:
            return _read(file, path, format or _told(file), limit, only)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", fix="give a file of word vectors") from None


def dim_of(path: str | Path) -> int:
    """The numbers of each word, from the beginning of a file alone."""
    return read(path, limit=1).dim


def _told(file: IO[bytes]) -> Format:
    head = HEADER.fullmatch(file.readline(64))
    second = file.readline(1 << 20) if head else b""
    file.seek(0)
    if head is None:
        return "glove"
    fields = second.split(b" ")
    try:
        fine = [float(field) for field in fields[1:] if field.strip()]
    except ValueError:
        return "bin"
    # A text with one number a word may itself begin with two whole numbers: then the second line has one too.
    if len(fine) == 1 and int(head[2]) != 1:
        return "glove"
    return "vec" if fine else "bin"


def _read(file: IO[bytes], path: Path, format: Format, limit: int | None, only: Collection[str] | None) -> Vectors:
    size = os.fstat(file.fileno()).st_size
    n, dim = (None, None) if format == "glove" else _header(file, path, size, format)
    rows = _binary(file, path, n, dim) if format == "bin" else _text(file, path, n, dim)  # type: ignore[arg-type]
    words: list[str] = []
    seen: set[str] = set()
    blocks, block = [], list[np.ndarray]()
    kept = None if only is None else frozenset(only)
    for number, (word, vector, where) in enumerate(rows):
        if limit is not None and number >= limit:
            break
        if word in seen:
            raise DataError(f"the word {word!r} stands here a second time", where=where, fix="take one of them out")
        seen.add(word)
        if kept is not None and word not in kept:
            dim = len(vector)
            continue
        words.append(word)
        block.append(vector)
        if len(block) == 4096:
            blocks.append(np.stack(block))
            block = []
    if not seen:
        raise DataError(f"{path} has no word vectors", fix="give a file that has some")
    if block:
        blocks.append(np.stack(block))
    matrix = np.concatenate(blocks) if blocks else np.zeros((0, int(dim or 0)), np.float32)
    return Vectors(words, matrix)


def _header(file: IO[bytes], path: Path, size: int, format: Format) -> tuple[int, int]:
    line = file.readline(64)
    match = HEADER.fullmatch(line)
    if match is None:
        shown = line[:40].decode("utf-8", "backslashreplace").strip()
        what = f"the first line must be the number of words and of numbers a word, not {shown!r}"
        raise DataError(what, where=f"{path}:1", fix="convert it with --from glove if it has no such line")
    n, dim = int(match[1]), int(match[2])
    if not 0 < dim <= MAX_DIM or not 0 < n <= MAX_WORDS:
        what = f"{n:,} words of {dim:,} numbers are not possible"
        raise DataError(what, where=f"{path}:1", fix=f"there may be {MAX_WORDS:,} of {MAX_DIM:,}")
    least = n * (1 + (4 * dim + 1 if format == "bin" else 2 * dim))
    if least > size + 1:
        what = f"{n:,} words of {dim:,} numbers take {least:,} bytes or more, the file has {size:,}"
        raise DataError(what, where=f"{path}:1", fix=REFETCH)
    return n, dim


def _text(file: IO[bytes], path: Path, n: int | None, dim: int | None) -> Iterator[tuple[str, np.ndarray, str]]:
    first = 1 if n is None else 2
    number = first - 1
    longest = MAX_WORD_BYTES + NUMBER_BYTES * (dim or MAX_DIM)
    while line := file.readline(longest + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > longest:
            raise DataError(f"the line is longer than {longest:,} bytes", where=where, fix=REFETCH)
        word, *numbers = line.rstrip(b"\r\n").rstrip(b" ").split(b" ")
        if n is not None and number - first >= n:
            if not word and not numbers:
                continue
            raise DataError(f"here are more words than the {n:,} of the first line", where=where, fix=REFETCH)
        if dim is None:
            dim = len(numbers)
            if not 0 < dim <= MAX_DIM:
                raise DataError(f"a word with {dim:,} numbers is not possible", where=where, fix="give word vectors")
            longest = MAX_WORD_BYTES + NUMBER_BYTES * dim
        if len(numbers) != dim:
            what = f"{len(numbers)} numbers, where {dim} are expected"
            raise DataError(what, where=where, fix="a line is a word and its numbers, with one space between each")
        try:
            with np.errstate(over="ignore"):  # refused below
                vector = np.array([float(field) for field in numbers], np.float64).astype(np.float32)
        except ValueError as error:
            what = str(error).replace("could not convert string to float: b", "not a number: ")
            raise DataError(what, where=where, fix="correct the line") from None
        if any(b"_" in field for field in numbers) or not np.isfinite(vector).all():
            raise DataError("a number that is not finite, or not written as one", where=where, fix="correct the line")
        yield _word(word, where), vector, where
    if n is not None and number - first + 1 < n:
        what = f"the first line says {n:,} words, here are {number - first + 1:,}"
        raise DataError(what, where=f"{path}:{number}", fix=REFETCH)


def _binary(file: IO[bytes], path: Path, n: int, dim: int) -> Iterator[tuple[str, np.ndarray, str]]:
    rest = b""
    wanted = 4 * dim
    for number in range(1, n + 1):
        where = f"{path}, word {number:,} of {n:,}"
        while (space := rest.find(b" ", 0, MAX_WORD_BYTES + 2)) < 0 or len(rest) < space + 1 + wanted:
            if space < 0 and len(rest) > MAX_WORD_BYTES + 1:
                raise DataError(f"a word of more than {MAX_WORD_BYTES:,} bytes", where=where, fix=REFETCH)
            more = file.read(max(1 << 16, wanted))
            if not more:
                raise DataError("the file ends in the middle of a word", where=where, fix=REFETCH)
            rest += more
        word = rest[:space].lstrip(b"\n")
        vector = np.frombuffer(rest, "<f4", dim, space + 1).astype(np.float32)
        rest = rest[space + 1 + wanted :]
        if not np.isfinite(vector).all():
            raise DataError("a number that is not finite", where=where, fix=REFETCH)
        yield _word(word, where), vector, where
    if (rest + file.read(2)).strip(b"\n"):
        raise DataError(f"more follows after the {n:,} words of the first line", where=str(path), fix=REFETCH)


def _word(raw: bytes, where: str) -> str:
    if not raw or len(raw) > MAX_WORD_BYTES:
        raise DataError(f"a word of {len(raw):,} bytes", where=where, fix="give every line a word")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"a word that is not UTF-8: byte 0x{raw[error.start]:02X}"
        raise DataError(what, where=where, fix="convert the file with iconv") from None


def write(vectors: Vectors, path: str | Path, format: Format | None = None) -> None:
    """Write word vectors; the file appears whole or not at all, and reads back with the same bits.

    Raises:
        DataError: a word that the format cannot say: empty, with a space or a line's end in it.
    """
    path = Path(path)
    format = format or format_of(path)
    for word in vectors.words:
        if not word or any(c in " \n\r" for c in word) or len(word.encode("utf-8", "replace")) > MAX_WORD_BYTES:
            raise DataError(f"{format} has no way to write the word {word!r}", fix="leave it out")
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "xb") as file:
            _write(file, vectors, format)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write(file: IO[bytes], vectors: Vectors, format: Format) -> None:
    if format != "glove":
        file.write(f"{len(vectors)} {vectors.dim}\n".encode())
    shape = " ".join(["%.9g"] * vectors.dim)  # nine digits give every fp32 back
    for word, row in zip(vectors.words, vectors.matrix.astype(np.float32, copy=False), strict=True):
        if format == "bin":
            file.write(word.encode() + b" " + row.astype("<f4").tobytes() + b"\n")
        else:
            file.write(f"{word} {shape % tuple(row.tolist())}\n".encode())
