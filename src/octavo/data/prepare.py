"""From sources to the cleaned documents of a run: read, repair, filter, remove duplicates, hold some out.

Work goes forward in segments of a few megabytes. A segment's files are written aside and renamed, then the journal
is: a preparation that was killed goes on after its last segment and ends in the same bytes, with any number of
workers. Memory holds a few batches of text and the index of duplicates.

    out/documents/documents-00000.jsonl.zst ...   the documents that stay, in the order of the sources
    out/documents/held_out.npy                    which of them are held out
    out/documents/manifest.json                   fingerprint, counts, size and SHA-256 of every file
    out/report.json, out/rejected.jsonl           what went and why; rows that could not be read
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from octavo.data import sources
from octavo.data.clean import CleanConfig, Cleaned, clean_batch
from octavo.data.document import Document
from octavo.data.duplicates import NearIndex
from octavo.data.readers import Rejected, excerpt
from octavo.data.report import Report
from octavo.data.sources import SourceConfig
from octavo.data.workers import ordered_map
from octavo.errors import DataError
from octavo.files import sha256_file, write_atomic, write_json
from octavo.schema import Config

FORMAT = 2  # 2: other signatures of near duplicates
SEGMENT_BYTES = 8 << 20
SEGMENT_ITEMS = 50_000
BATCH_BYTES = 1 << 20
BATCH_ITEMS = 512

Progress = Callable[[str, int, int], None]
"""Called with the stage, what is done and the total (0 where unknown), in bytes of text."""


class SplitConfig(Config):
    """Which documents are held out for validation.

    Args:
        held_out: a share of the documents (0.01), or a number of them (50); 0 for none.
        seed: another seed holds out other documents.
    """

    held_out: int | float = 0.01
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("held_out")
    @classmethod
    def _share_or_count(cls, value: int | float) -> int | float:
        if not (0 <= value < 1 or (value >= 1 and value == int(value))):
            raise ValueError("held_out must be a share below 1 or a whole number of documents")
        return value


class DataConfig(Config):
    """Everything that decides the documents of a run; a single source or a list of them.

    Args:
        sources: where text comes from.
        clean: what is repaired and left out.
        split: what is held out.
    """

    sources: tuple[SourceConfig, ...]
    clean: CleanConfig = CleanConfig()
    split: SplitConfig = SplitConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("sources"), str):
            return {**value, "sources": [value["sources"]]}
        return value

    @field_validator("sources")
    @classmethod
    def _some_source(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if not value:  # here and not as a length of the field, which would also fail for each bad source
            raise ValueError("there must be at least one source: a path, or python-stdlib")
        return value

    def fingerprint(self) -> str:
        """SHA-256 over the settings and the state of the files: the same one gives the same documents."""
        settings = self.model_dump(mode="json", exclude={"sources"})
        described = [FORMAT, settings, sources.fingerprint(self.sources)]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def clean_documents(
    config: DataConfig, out: str | Path, *, workers: int | None = None, progress: Progress | None = None
) -> Report:
    """Write the cleaned documents of ``config`` below ``out``, or find that they are there already.

    Raises:
        DataError: a source cannot be read, or nothing is left of it.
    """
    out = Path(out)
    folder = out / "documents"
    fingerprint = config.fingerprint()
    if (manifest := read_json(folder / "manifest.json")) and manifest.get("fingerprint") == fingerprint:
        return Report.from_dict(read_json(out / "report.json") or manifest["report"])
    folder.mkdir(parents=True, exist_ok=True)
    preparation = _Preparation(config, folder, fingerprint)
    preparation.run(workers, progress)
    return preparation.finish(out)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or ``None`` if there is no such file or it holds no JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _batches(items: Iterator[tuple[int, Document | Rejected]]) -> Iterator[list[tuple[int, Document | Rejected]]]:
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[1].text) if isinstance(item[1], Document) else 0
        if size >= BATCH_BYTES or len(batch) >= BATCH_ITEMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Preparation:
    """The state of a preparation: the index of duplicates, the report, and the segment being filled."""

    def __init__(self, config: DataConfig, folder: Path, fingerprint: str):
        self.config, self.folder, self.fingerprint = config, folder, fingerprint
        near = config.clean.near_duplicates
        width = near.hashes if near else 0
        self.state_type = np.dtype([("hash", "S16"), ("bytes", "<i8"), ("signature", "<u4", (width,))])
        self.near = NearIndex(near) if near else None
        self.exact: set[bytes] = set()
        self.report = Report(sources=[s.path for s in config.sources])
        self.segments: list[int] = []  # documents in each finished one
        self.items = 0
        self._start_segment()
        self._continue()

    # -- segments on disk --

    def _path(self, kind: str, number: int) -> Path:
        suffix = {"documents": ".jsonl.zst", "state": ".npy", "rejected": ".jsonl"}[kind]
        return self.folder / f"{kind}-{number:05d}{suffix}"

    def _continue(self) -> None:
        for leftover in self.folder.glob("*.tmp-*"):
            leftover.unlink()
        journal = read_json(self.folder / "journal.json")
        if journal is None or journal["fingerprint"] != self.fingerprint:
            (self.folder / "manifest.json").unlink(missing_ok=True)
            (self.folder / "journal.json").unlink(missing_ok=True)
            for kind in ("documents", "state", "rejected"):
                for old in self.folder.glob(f"{kind}-*"):
                    old.unlink()
            return
        self.items, self.segments = journal["items"], journal["segments"]
        self.report = Report.from_dict(journal["report"])
        for state in self._states():
            if self.config.clean.exact_duplicates:
                self.exact.update(bytes(h).ljust(16, b"\0") for h in state["hash"])
            if self.near is not None:
                for marks in state["signature"]:
                    self.near.add(marks)

    def _states(self) -> Iterator[np.ndarray[Any, Any]]:
        for number in range(len(self.segments)):
            yield np.load(self._path("state", number))

    def _start_segment(self) -> None:
        self.lines: list[bytes] = []
        self.state: list[tuple[Any, ...]] = []
        self.rejected: list[bytes] = []
        self.segment_bytes = self.segment_items = 0

    def _end_segment(self) -> None:
        import zstandard

        number = len(self.segments)
        packed = zstandard.ZstdCompressor(level=3).compress(b"".join(self.lines))
        write_atomic(self._path("documents", number), packed)
        buffer = io.BytesIO()
        np.save(buffer, np.array(self.state, dtype=self.state_type))
        write_atomic(self._path("state", number), buffer.getvalue())
        write_atomic(self._path("rejected", number), b"".join(self.rejected))
        self.segments.append(len(self.lines))
        self.items += self.segment_items
        journal = {"fingerprint": self.fingerprint, "items": self.items, "segments": self.segments}
        write_json(self.folder / "journal.json", {**journal, "report": self.report.to_dict()})
        self._start_segment()

    # -- documents --

    def run(self, workers: int | None, progress: Progress | None) -> None:
        """Read and clean what is not yet in a finished segment."""
        total = sources.total_bytes(self.config.sources) if progress else 0
        waiting: list[list[tuple[int, Document | Rejected]]] = []

        def tasks() -> Iterator[tuple[Any, ...]]:
            for batch in _batches(islice(sources.scan(self.config.sources), self.items, None)):
                waiting.append(batch)
                yield [item.text for _, item in batch if isinstance(item, Document)], self.config.clean

        for cleaned in ordered_map(clean_batch, tasks(), workers):
            results = iter(cleaned)
            for source, item in waiting.pop(0):
                if isinstance(item, Rejected):
                    self._reject(item)
                else:
                    self._take(source, item, next(results))
                self.segment_items += 1
                if self.segment_bytes >= SEGMENT_BYTES or self.segment_items >= SEGMENT_ITEMS:
                    self._end_segment()
            if progress:
                progress("clean", self.report.bytes, total)
        if self.segment_items:
            self._end_segment()

    def _reject(self, item: Rejected) -> None:
        row = {"source": item.source, "line": item.line, "reason": item.reason}
        self.rejected.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.report.reject("unreadable_row", 0, item.source, item.line, "", item.reason)

    def _take(self, source: int, document: Document, cleaned: Cleaned) -> None:
        size = len(document.text.encode())
        self.report.read(source, size, cleaned.repaired)
        reason, detail = cleaned.reason, cleaned.detail
        if not reason and self.config.clean.exact_duplicates:
            if cleaned.hash in self.exact:
                reason = "exact_duplicate"
            self.exact.add(cleaned.hash)
        if not reason and self.near is not None:
            twin = self.near.find(cleaned.signature)
            if twin is not None:
                reason = "near_duplicate"
                if self.report.wants_example(reason):
                    detail = f"{twin[1]:.2f} like {self._place(twin[0])}"
        if reason:
            self.report.reject(reason, size, document.source, document.line, excerpt(cleaned.text), detail)
            return
        if self.near is not None:
            self.near.add(cleaned.signature)
        size = len(cleaned.text.encode())
        self.report.keep(source, size)
        row = {"text": cleaned.text, "source": document.source, "line": document.line}
        self.lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.state.append((cleaned.hash, size, cleaned.signature))
        self.segment_bytes += size

    def _place(self, number: int) -> str:
        """Where the kept document of that number came from."""
        for segment, count in enumerate(self.segments):
            if number < count:
                row = next(islice(_rows(self._path("documents", segment)), number, None))
                break
            number -= count
        else:
            row = json.loads(self.lines[number])
        return f"{row['source']}:{row['line']}" if row["line"] else row["source"]

    # -- the end --

    def finish(self, out: Path) -> Report:
        """Choose what is held out and write report and manifest."""
        if not self.report.kept_documents:
            raise _nothing_left(self.report)
        hashes, sizes = [], []
        for state in self._states():
            hashes.extend(bytes(h).ljust(16, b"\0") for h in state["hash"])
            sizes.append(state["bytes"])
        held = hold_out(hashes, self.config.split)
        self.report.split(held, np.concatenate(sizes))
        buffer = io.BytesIO()
        np.save(buffer, held)
        write_atomic(self.folder / "held_out.npy", buffer.getvalue())
        rejected = [self._path("rejected", number) for number in range(len(self.segments))]
        (out / "rejected.jsonl").unlink(missing_ok=True)
        if any(path.stat().st_size for path in rejected):
            write_atomic(out / "rejected.jsonl", b"".join(path.read_bytes() for path in rejected))
        names = [self._path("documents", number) for number in range(len(self.segments))]
        files = [{"name": p.name, "size": p.stat().st_size, "sha256": sha256_file(p)} for p in names]
        report = self.report.to_dict()
        write_json(out / "report.json", report)
        manifest = {"format": FORMAT, "fingerprint": self.fingerprint, "segments": self.segments, "files": files}
        write_json(self.folder / "manifest.json", {**manifest, "report": report})
        for number in range(len(self.segments)):
            self._path("state", number).unlink(missing_ok=True)
            self._path("rejected", number).unlink(missing_ok=True)
        (self.folder / "journal.json").unlink(missing_ok=True)
        return self.report


def _nothing_left(report: Report) -> DataError:
    if not report.documents and not report.removed:
        return DataError("the sources hold no text", fix="give files that are not empty")
    counts = ", ".join(f"{name} {entry['documents']:,}" for name, entry in report.removed.items())
    return DataError(
        f"no document is left of {report.documents:,} read: {counts}",
        fix="loosen the rule that took most (data.clean.filters, `null` switches a rule off)",
    )


def hold_out(hashes: list[bytes], split: SplitConfig) -> np.ndarray[Any, Any]:
    """Which documents are held out (bool): those whose text has the smallest keyed hash, wherever it stands.

    At least one document is held out and one is not, if any is to be.

    Raises:
        DataError: there are too few documents.
    """
    key = split.seed.to_bytes(8, "little")
    keys = np.array(
        [int.from_bytes(hashlib.blake2b(h, digest_size=8, key=key).digest(), "little") for h in hashes], dtype=np.uint64
    )
    if not split.held_out:
        return np.zeros(len(keys), dtype=bool)
    needed = int(split.held_out) if split.held_out >= 1 else 1
    distinct = np.unique(keys)
    if len(distinct) <= needed:
        raise DataError(
            f"{len(distinct):,} different documents are too few to hold out {needed:,} and keep one",
            fix="set `document_bytes` of the sources (4096, say) to cut long texts into documents, or `held_out: 0`",
        )
    if split.held_out >= 1:
        return keys <= distinct[needed - 1]
    bound = np.uint64(min(int(split.held_out * 2.0**64), 2**64 - 1))
    return keys <= min(max(bound, distinct[0]), distinct[-2])


# ---- reading back ----


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import zstandard

    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.BufferedReader(stream):
            yield json.loads(line)


def segments(out: str | Path) -> tuple[dict[str, Any], list[tuple[Path, np.ndarray[Any, Any]]]]:
    """The manifest of the cleaned documents below ``out``, and per file which of its documents are held out.

    Raises:
        DataError: there are none, or a file is missing or has another size.
    """
    folder = Path(out) / "documents"
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        raise DataError(f"no prepared documents in {folder}", fix="run `octavo data prepare` first")
    held = np.load(folder / "held_out.npy")
    bounds = np.cumsum([0, *manifest["segments"]])
    parts = []
    for i, file in enumerate(manifest["files"]):
        path = folder / file["name"]
        if not path.is_file() or path.stat().st_size != file["size"]:
            raise DataError(f"{path} is missing or was changed", fix=f"delete {folder} and prepare again")
        parts.append((path, held[bounds[i] : bounds[i + 1]]))
    return manifest, parts


def part_documents(path: Path, held: np.ndarray[Any, Any], split: str) -> Iterator[Document]:
    """The documents of one file that belong to ``split`` (``train`` or ``valid``)."""
    for row, is_held in zip(_rows(path), held, strict=True):
        if bool(is_held) == (split == "valid"):
            yield Document(row["text"], row["source"], row["line"])


def iter_documents(out: str | Path, split: str) -> Iterator[Document]:
    """The cleaned documents of ``split`` (``train`` or ``valid``), in constant memory."""
    for path, held in segments(out)[1]:
        yield from part_documents(path, held, split)


def iter_texts(out: str | Path, split: str) -> Iterator[str]:
    """The texts of ``iter_documents``: what a tokenizer is trained on."""
    return (document.text for document in iter_documents(out, split))
