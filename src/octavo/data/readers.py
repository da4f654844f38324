"""From bytes on disk to documents, in constant memory, with the place of everything that is wrong.

A reader yields documents and, where a row or a piece cannot be read, a ``Bad`` in its place. ``settle`` turns
those into one error per file (the first five places and the total) or into rejected rows, as the source says.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from octavo.data.document import Document
from octavo.data.markup import html_text
from octavo.data.opening import BLOCK_BYTES, reading
from octavo.errors import DataError, did_you_mean

MAX_ROW_BYTES = 64 << 20
EXCERPT_CHARACTERS = 60
SHOWN_ERRORS = 5
SHOWN_FIELDS = 30

Policy = Literal["error", "replace", "skip"]


@dataclass(frozen=True, slots=True)
class Bad:
    """One thing that cannot be read: ``line`` and ``column`` are 1-based (column 0: unknown)."""

    line: int
    column: int
    reason: str
    excerpt: str = ""
    kind: Literal["row", "encoding"] = "row"

    def __str__(self) -> str:
        at = f" at column {self.column:,}" if self.column else ""
        near = f", near `{self.excerpt}`" if self.excerpt else ""
        return f"{self.reason}{at}{near}"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row or piece that was skipped, and why: a line of ``rejected.jsonl``."""

    source: str
    line: int
    reason: str


def excerpt(text: str, column: int = 1) -> str:
    """At most 60 characters of ``text`` around a 1-based column, safe to print on one line."""
    start = max(0, min(column - 1 - EXCERPT_CHARACTERS // 2, len(text) - EXCERPT_CHARACTERS))
    part = text[start : start + EXCERPT_CHARACTERS]
    return "".join(c if c.isprintable() else "·" for c in part)


def shown(value: Any) -> str:
    """The beginning of a JSON value as it may stand in a message, however large or deep the value is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxlong = 3, 12, 4, 60, 40
    return excerpt(short.repr(value))


def settle(
    items: Iterator[Document | Bad], path: Path, on_bad_row: str, encoding_errors: str
) -> Iterator[Document | Rejected]:
    """Apply the policies of a source to what a reader found.

    Raises:
        DataError: there was something bad and the policy is ``error``; the file is read to its end first, so
            that the message can give the total, but no document after the first bad row is yielded.
    """
    bad: list[Bad] = []
    total = 0
    for item in items:
        if not isinstance(item, Bad):
            if not total:
                yield item
        elif (encoding_errors if item.kind == "encoding" else on_bad_row) == "skip":
            if not total:
                yield Rejected(str(path), item.line, str(item))
        else:
            total += 1
            if len(bad) < SHOWN_ERRORS:
                bad.append(item)
    if bad:
        raise _refusal(path, bad, total)


def _refusal(path: Path, bad: list[Bad], total: int) -> DataError:
    first, lines = bad[0], ", ".join(str(b.line) for b in bad)
    what = f"{first}"
    if total > 1:
        what += f"; {total:,} bad rows in this file, the first at lines {lines}"
    if first.kind == "encoding":
        fix = "set `encoding` of the source if it is another one (gb18030, latin-1), or `encoding_errors: replace`"
    elif first.reason.startswith("no field"):
        fix = "set `text_field` of the source, or `on_bad_row: skip`"
    else:
        fix = "correct the rows, or set `on_bad_row: skip` (they are then listed in rejected.jsonl)"
    return DataError(what, where=f"{path}:{first.line}", fix=fix)


# ---- bytes ----


def lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines with their ends removed; ``None`` in place of one longer than ``max_bytes``."""
    number = 0
    while line := file.readline(max_bytes + 2):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := file.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.rstrip(b"\r\n")


def _encoding_bad(error: UnicodeDecodeError, line: int, data: bytes, column: int) -> Bad:
    byte = data[error.start] if error.start < len(data) else 0
    near = excerpt(data[max(0, error.start - 40) : error.start + 40].decode("utf-8", "replace"), 40)
    return Bad(line, column, f"byte 0x{byte:02X} is not {error.encoding}", near, kind="encoding")


def forbidden(text: str) -> tuple[int, str] | None:
    """Column and name of the first character no text may hold (NUL, a lone surrogate), or ``None``."""
    if (at := text.find("\0")) >= 0:
        return at + 1, "NUL character (a binary or UTF-16 file?)"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start + 1, f"lone surrogate U+{ord(text[error.start]):04X}"
    return None


# ---- cutting ----


def cut(data: bytes, limit: int) -> tuple[list[bytes], bytes]:
    """Pieces of at most ``limit`` bytes off the front of UTF-8 ``data`` until what is left is no longer.

    The cut is after the last blank line in reach, else after a line, else after a space, else between
    characters. Nothing is lost: the pieces and the rest join to ``data``. Whether the text came at once or in
    blocks makes no difference.
    """
    pieces, start = [], 0
    while len(data) - start > limit:
        end = start + limit
        low = start + limit // 4
        for mark in (b"\n\n", b"\n", b" "):
            if (at := data.rfind(mark, low, end)) >= 0:
                end = at + len(mark)
                break
        else:
            while data[end] & 0xC0 == 0x80:
                end -= 1
        pieces.append(data[start:end])
        start = end
    return pieces, data[start:]


def cut_documents(text: str, limit: int, source: str, line: int, count_lines: bool = True) -> Iterator[Document]:
    """``text`` as one document, or as several if it is longer than ``limit`` bytes."""
    data = text.encode()
    pieces, rest = cut(data, limit)
    for piece in [*pieces, rest]:
        yield Document(piece.decode(), source, line)
        if count_lines:
            line += piece.count(b"\n")


# ---- formats ----


def read_text(path: Path, limit: int, encoding: str, errors: Policy) -> Iterator[Document | Bad]:
    """A text file as documents of at most ``limit`` bytes, in memory for one of them."""
    decoder = codecs.getincrementaldecoder(encoding)("replace" if errors == "replace" else "strict")
    buffer, line, start_line, found = bytearray(), 1, 1, list[Bad]()
    column, first = 0, True

    def flush(pieces: list[bytes]) -> Iterator[Document | Bad]:
        nonlocal start_line, found
        for piece in pieces:
            end_line = start_line + piece.count(b"\n")
            last = end_line - piece.endswith(b"\n")
            here = [b for b in found if b.line <= last]
            found = [b for b in found if b.line > last]
            if not here:
                yield Document(piece.decode(), str(path), start_line)
            yield from here
            start_line = end_line

    with reading(path) as file:
        while True:
            raw = file.readline(BLOCK_BYTES)
            if raw.endswith(b"\r"):  # may be half of a CRLF
                raw += file.read(1)
            if first and encoding.replace("_", "-").lower() in ("utf-8", "utf8"):
                raw = raw.removeprefix(codecs.BOM_UTF8)
            first = False
            ended = raw.endswith(b"\n") or not raw
            try:
                text = decoder.decode(raw, final=ended)
            except UnicodeDecodeError as error:
                found.append(_encoding_bad(error, line, bytes(error.object), column + error.start + 1))
                decoder.reset()
                text = raw.decode(encoding, "replace")
            if (wrong := forbidden(text)) is not None:
                if errors != "replace":
                    at, reason = wrong
                    found.append(Bad(line, column + at, reason, excerpt(text, at), kind="encoding"))
                text = _replaced(text)
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            buffer += text.encode()
            column = 0 if ended else column + len(raw)
            line += text.count("\n")
            if not raw:
                break
            if len(buffer) > limit:
                pieces, rest = cut(bytes(buffer), limit)
                yield from flush(pieces)
                buffer = bytearray(rest)
    if buffer:
        yield from flush([bytes(buffer)])
    yield from found


def parse_row(raw: bytes, line: int, encoding: str, errors: Policy) -> Any:
    """The value of a line of JSON, or a ``Bad`` that says why it is none."""
    try:
        text = raw.decode(encoding, "replace" if errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        return _encoding_bad(error, line, raw, error.start + 1)
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        return Bad(line, error.pos + 1, f"row is not JSON: {error.msg}", excerpt(text, error.pos + 1))
    except RecursionError:
        return Bad(line, 0, "row is nested too deeply", excerpt(text))
    except ValueError as error:
        return Bad(line, 0, f"row is not JSON: {str(error).split(';')[0]}", excerpt(text))


def refuse_constant(name: str) -> Any:
    """For ``json``, which takes NaN and Infinity for numbers."""
    raise ValueError(f"{name} is not a JSON number")


def read_rows(path: Path, encoding: str = "utf-8", errors: Policy = "error") -> Iterator[tuple[int, Any] | Bad]:
    """The rows of a .jsonl file (also .gz, .zst) with their line numbers; blank lines are passed over."""
    with reading(path) as file:
        for number, raw in lines(file, MAX_ROW_BYTES):
            if raw is None:
                yield Bad(number, 0, f"row is longer than {MAX_ROW_BYTES >> 20} MiB")
            elif raw.strip():
                value = parse_row(raw, number, encoding, errors)
                yield value if isinstance(value, Bad) else (number, value)


def field_text(row: Any, name: str, line: int, errors: Policy) -> str | Bad:
    """The text in field ``name`` of a row (a list of strings is joined by line ends), or what is wrong."""
    if not isinstance(row, dict):
        return Bad(line, 0, f"expected an object with `{name}`, got {_json_type(row)}", shown(row))
    if name not in row:
        names = [field[:60] for field in islice(row, SHOWN_FIELDS)]
        hint = did_you_mean(name, names, thing="field") if row else "it is empty"
        return Bad(line, 0, f"no field `{name}` in the row ({hint})")
    value = row[name]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        return Bad(line, 0, f"`{name}` must be text, got {_json_type(value)}", shown(value))
    return _checked(value, line, errors)


def _checked(text: str, line: int, errors: Policy) -> str | Bad:
    if (found := forbidden(text)) is not None:
        if errors != "replace":
            reason = f"{found[1]} at character {found[0]:,} of the text"
            return Bad(line, 0, reason, excerpt(text, found[0]), kind="encoding" if errors == "skip" else "row")
        text = _replaced(text)
    return text.replace("\r\n", "\n")


def _replaced(text: str) -> str:
    """``text`` with U+FFFD for what no text may hold."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def read_jsonl(path: Path, limit: int, field: str, encoding: str, errors: Policy) -> Iterator[Document | Bad]:
    """The texts of a .jsonl file, one row a document."""
    for row in read_rows(path, encoding, errors):
        if isinstance(row, Bad):
            yield row
            continue
        line, value = row
        text = field_text(value, field, line, errors)
        if isinstance(text, Bad):
            yield text
        else:
            yield from cut_documents(text, limit, str(path), line, count_lines=False)


def read_html(path: Path, limit: int, encoding: str, errors: Policy, extract: str) -> Iterator[Document | Bad]:
    """The text of an HTML page (see ``markup``)."""
    with reading(path) as file:
        raw = file.read(MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        yield Bad(1, 0, f"page is larger than {MAX_ROW_BYTES >> 20} MiB")
        return
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        page = raw.decode(encoding, "replace" if errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        yield _encoding_bad(error, raw.count(b"\n", 0, error.start) + 1, raw, error.start - line_start + 1)
        return
    text = html_text(page, extract)
    if text is None:
        yield Bad(1, 0, "page cannot be parsed as HTML", excerpt(page))
        return
    checked = _checked(text, 1, errors)
    if isinstance(checked, Bad):
        yield checked
    else:
        yield from cut_documents(checked, limit, str(path), 0, count_lines=False)


def read_parquet(path: Path, limit: int, field: str, errors: Policy) -> Iterator[Document | Bad]:
    """The texts in one column of a Parquet file; ``line`` is the row number."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            "reading .parquet needs pyarrow", where=str(path), fix="pip install 'octavo[data]', or convert to .jsonl"
        ) from error
    line = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(
                    f"no column `{field}` in the file",
                    where=f"{path}:0",
                    fix=f"set `text_field` of the source: {did_you_mean(field, names, thing='column')}",
                )
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for value in batch.column(0).to_pylist():
                    line += 1
                    text = field_text({field: value}, field, line, errors)
                    if isinstance(text, Bad):
                        yield text
                    else:
                        yield from cut_documents(text, limit, str(path), line, count_lines=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read as Parquet: {reason}", where=f"{path}:{line}", fix="replace the file"
        ) from error
