"""Where text comes from: files, folders, patterns and the built-in corpus, always in the same order."""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from octavo.data import readers
from octavo.data.document import Document
from octavo.data.opening import COMPRESSED, is_dir, is_file
from octavo.data.readers import Rejected
from octavo.data.stdlib import StdlibConfig
from octavo.data.stdlib import documents as stdlib_documents
from octavo.errors import DataError, nearest
from octavo.schema import Config

STDLIB = "python-stdlib"
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
DOCUMENT_BYTES = 8 << 20


class SourceConfig(Config):
    """One source of text; a bare string is its path.

    Args:
        path: a file, a folder, a pattern (``books/**/*.txt``), or ``python-stdlib``.
        weight: how often its documents are seen in a pass over the data, relative to the other sources.
        format: by default told from the file name.
        text_field: the field or column that holds the text, in .jsonl and .parquet.
        document_bytes: longer texts are cut at blank lines into documents of at most this size.
        encoding: of text, HTML and .jsonl files.
        on_bad_row: what to do with a row that is not what it should be.
        encoding_errors: what to do with bytes that are not text in that encoding.
        html: ``all`` visible text, or the main ``article`` (needs the ``data`` extra).
        stdlib: which parts of the standard library, for ``python-stdlib``.
    """

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    format: Literal["auto", "text", "html", "jsonl", "parquet"] = "auto"
    text_field: str = Field(default="text", min_length=1)
    document_bytes: int = Field(default=DOCUMENT_BYTES, ge=64, le=readers.MAX_ROW_BYTES)
    encoding: str = "utf-8"
    on_bad_row: Literal["error", "skip"] = "error"
    encoding_errors: Literal["error", "replace", "skip"] = "error"
    html: Literal["all", "article"] = "all"
    stdlib: StdlibConfig = StdlibConfig()

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": os.fspath(value)} if isinstance(value, str | os.PathLike) else value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            codecs.lookup(value)
            ascii_lines = "\n".encode(value) == b"\n"
        except LookupError:
            raise ValueError(
                f"unknown encoding {value!r}; use utf-8, gb18030, big5 or another codec of Python"
            ) from None
        if not ascii_lines:
            raise ValueError(f"encoding {value!r} has no single-byte line ends; convert the files to utf-8")
        try:
            codecs.getincrementaldecoder(value)("replace").decode(b"\xff\x80a\\u", final=True)
        except Exception:  # whatever a codec that is not made for files does
            raise ValueError(f"encoding {value!r} cannot read files; use utf-8, gb18030, big5 or the like") from None
        return value


def expand(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted by path; none for ``python-stdlib``.

    Raises:
        DataError: nothing is there, or nothing in a format that can be read.
    """
    if source.path == STDLIB:
        return []
    if "://" in source.path:
        raise DataError(f"source {source.path} is a URL", fix="download it first and give the file")
    try:
        path = Path(source.path).expanduser()
    except RuntimeError:
        raise DataError(f"source {source.path}: there is no such user", fix="write the path in full") from None
    if is_file(path):
        _format(path, source)
        return [path]
    if is_dir(path):
        found = sorted(_walk(path), key=_order)
        kept = [p for p in found if source.format != "auto" or _known(p)]
        if not kept:
            raise _nothing(f"folder {path}", found)
        return kept
    if glob.has_magic(source.path):
        found = sorted((Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)), key=_order)
        kept = [p for p in found if source.format != "auto" or _known(p)]
        if not kept:
            raise _nothing(f"pattern {source.path}", found)
        return kept
    raise _missing(path)


def _order(path: Path) -> tuple[str, ...]:
    return path.parts


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for path in (Path(root, name) for name in names if not name.startswith(".")):
            if path.is_file() or not path.exists():  # a pipe or a device would never end
                yield path


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _known(path: Path) -> bool:
    return _suffix(path) in FORMATS


def _format(path: Path, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    if not _known(path):
        raise DataError(
            f"{path} has no known format ({_suffix(path) or 'no suffix'})",
            fix=f"set `format: text` of the source, or use one of {' '.join(FORMATS)} (also .gz and .zst)",
        )
    return FORMATS[_suffix(path)]


def _nothing(what: str, found: Sequence[Path]) -> DataError:
    others = ", ".join(sorted({_suffix(p) or "no suffix" for p in found})[:8])
    seen = f"; it has {len(found):,} files of other kinds ({others})" if found else "; it has no files"
    return DataError(
        f"nothing to read in {what}{seen}",
        fix=f"give files of {' '.join(FORMATS)} (also .gz and .zst), or set `format: text`",
    )


def _missing(path: Path) -> DataError:
    parent = path.parent
    while not is_dir(parent) and parent != parent.parent:
        path, parent = parent, parent.parent
    names = sorted(os.listdir(parent))
    close = nearest(path.name, names, n=3)
    if close:
        fix = f"did you mean {' or '.join(str(parent / name) for name in close)}?"
    else:
        shown = ", ".join(names[:5]) or "nothing"
        fix = f"give a path that exists; {parent.resolve()} has {shown}{' ...' if len(names) > 5 else ''}"
    return DataError(f"source {path} does not exist", fix=fix)


def scan(sources: Sequence[SourceConfig]) -> Iterator[tuple[int, Document | Rejected]]:
    """Every document and every skipped row, each with the number of its source, in order."""
    for number, source in enumerate(sources):
        if source.path == STDLIB:
            for document in stdlib_documents(source.stdlib):
                yield number, document
        for path in expand(source):
            items = readers.settle(_open(path, source), path, source.on_bad_row, source.encoding_errors)
            for item in items:
                yield number, item


def _open(path: Path, source: SourceConfig) -> Iterator[Document | readers.Bad]:
    kind, limit, errors = _format(path, source), source.document_bytes, source.encoding_errors
    if kind == "jsonl":
        return readers.read_jsonl(path, limit, source.text_field, source.encoding, errors)
    if kind == "parquet":
        return readers.read_parquet(path, limit, source.text_field, errors)
    if kind == "html":
        return readers.read_html(path, limit, source.encoding, errors, source.html)
    return readers.read_text(path, limit, source.encoding, errors)


def read(sources: Sequence[SourceConfig | str]) -> Iterator[Document]:
    """The documents of all sources in a fixed order, in constant memory.

    Raises:
        DataError: a source is missing or a row is bad (and not to be skipped); names file and line.
    """
    for _, item in scan([SourceConfig.model_validate(source) for source in sources]):
        if isinstance(item, Document):
            yield item


def fingerprint(sources: Sequence[SourceConfig]) -> str:
    """SHA-256 over what decides the documents: the settings, and path, size and time of every file."""
    described = []
    for source in sources:
        files = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in expand(source)]
        settings = source.model_dump(exclude={"weight"})
        described.append([settings, files or sys.version])
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def total_bytes(sources: Sequence[SourceConfig]) -> int:
    """Bytes of text to come, or 0 where that is not known beforehand (compressed files, the built-in corpus)."""
    total = 0
    for source in sources:
        files = expand(source)
        if not files or any(_format(p, source) not in ("text", "jsonl") or p.suffix in COMPRESSED for p in files):
            return 0
        total += sum(p.stat().st_size for p in files)
    return total
