"""The rows of chat files with their lines, in constant memory: JSON lines, lists, objects one after another."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from octavo.data import readers
from octavo.data.chat_formats import BadRow
from octavo.data.opening import BLOCK_BYTES, reading

SUFFIXES = (".jsonl", ".ndjson", ".json")
SPACE = " \t\r\n"
MORE_BYTES = 16 * BLOCK_BYTES


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of a file (also .gz and .zst); what is not JSON comes as a ``BadRow`` in its place.

    Raises:
        DataError: the file cannot be opened, or its compression is damaged.
    """
    with reading(path) as file:
        start = file.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]  # type: ignore[attr-defined]
        if start == b"[" or path.name.removesuffix(".gz").removesuffix(".zst").endswith(".json"):
            yield from _values(file)
            return
        for line, raw in readers.lines(file, readers.MAX_ROW_BYTES):
            if raw is None:
                yield line, _too_long()
            elif raw.strip():
                row = readers.parse_row(raw, line, "utf-8", "error")
                yield line, BadRow(str(row)) if isinstance(row, readers.Bad) else row


def _too_long() -> BadRow:
    return BadRow(f"the row is longer than {readers.MAX_ROW_BYTES >> 20} MiB")


class _Text:
    """A file as text that is read as far as it is needed and forgotten behind that."""

    def __init__(self, file: BinaryIO):
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self, n: int = BLOCK_BYTES) -> None:
        """Read on.

        Raises:
            BadRow: the next bytes are not UTF-8.
        """
        self.text, self.at = self.text[self.at :], 0
        raw = self._file.read(n)
        self.ended = not raw
        try:
            self.text += self._decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            data = bytes(error.object)
            self.line += self.text.count("\n") + data[: error.start].count(b"\n")
            column = error.start - data.rfind(b"\n", 0, error.start)
            raise BadRow(f"byte 0x{data[error.start]:02X} at column {column:,} is not UTF-8") from None

    def go(self, at: int) -> None:
        """Forget what is before ``at``."""
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def next(self, passed_over: str) -> str:
        """The next character that is none of ``passed_over``; empty at the end."""
        while True:
            at = self.at
            while at < len(self.text) and self.text[at] in passed_over:
                at += 1
            self.go(at)
            if at < len(self.text):
                return self.text[at]
            if self.ended:
                return ""
            self.more()


def _values(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list, or objects one after another, with the line each begins at."""
    text = _Text(file)
    try:
        is_list = text.next(SPACE) == "["
        text.go(text.at + is_list)
        while (char := text.next(SPACE + ",")) and not (is_list and char == "]"):
            yield text.line, _value(text)
        if is_list and not char:
            raise BadRow("the list is not closed: the file ends early")
        text.go(text.at + is_list)
        if text.next(SPACE):
            raise BadRow("there is more behind the end of the list")
    except BadRow as error:
        yield text.line, error


def _value(text: _Text) -> Any:
    decoder = json.JSONDecoder(parse_constant=readers.refuse_constant)
    while True:
        try:
            value, end = decoder.raw_decode(text.text, text.at)
            if end < len(text.text) or text.ended:
                text.go(end)
                return value
        except json.JSONDecodeError as error:
            if text.ended:
                near = readers.excerpt(error.doc[max(0, error.pos - 30) : error.pos + 30])
                text.go(error.pos)
                raise BadRow(f"row is not JSON: {error.msg} at column {error.colno:,}, near `{near}`") from None
        except RecursionError:
            raise BadRow("row is nested too deeply") from None
        except ValueError as error:
            raise BadRow(f"row is not JSON: {str(error).split(';')[0]}") from None
        if len(text.text) - text.at > readers.MAX_ROW_BYTES:
            raise _too_long()
        text.more(min(max(BLOCK_BYTES, len(text.text) - text.at), MORE_BYTES))
