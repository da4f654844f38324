"""The checks of files that no run has prepared: texts and conversations, told apart by their first row."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.data import chat, chat_formats, check, check_chat, readers, sources
from octavo.data.chat import ChatConfig, ChatReport, Conversation
from octavo.data.check import Documents, Finding, HeldOut
from octavo.data.document import Document
from octavo.data.sources import SourceConfig
from octavo.errors import DataError, OctavoError

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

BATCH = 512
CHAT_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".ndjson")


def refusal(name: str, error: OctavoError) -> Finding:
    """A refusal of the training as a finding."""
    first, *more = error.what.splitlines()
    where = f" ({error.where})" if error.where else ""
    return Finding(name, "fail", f"{first.rstrip(':')}{where}", error.fix, examples=[line.strip() for line in more])


def split(paths: Iterable[str], settings: dict[str, Any]) -> tuple[list[SourceConfig], list[str]]:
    """Sources of text, and files of conversations.

    Raises:
        DataError: a path is not there, or nothing in it can be read.
    """
    texts: list[SourceConfig] = []
    told: list[str] = []
    for path in paths:
        if path.endswith(".json") and Path(path).is_file():
            told.append(path)
            continue
        source = SourceConfig.model_validate({"path": path, **settings})
        files = sources.expand(source)
        for file in files:
            if has_conversations(file, source.text_field):
                told.append(str(file))
            else:
                texts.append(source.model_copy(update={"path": str(file)}))
        if not files:  # the built-in corpus
            texts.append(source)
    return texts, told


def has_conversations(path: Path, text_field: str) -> bool:
    """Whether the first row of a file is one of a conversation, and not one with text."""
    if not path.name.endswith(CHAT_SUFFIXES):
        return False
    try:
        row = next(item[1] for item in readers.read_rows(path) if not isinstance(item, readers.Bad))
        if not isinstance(row, dict) or isinstance(row.get(text_field), str):
            return False
        chat_formats.detect(row)
    except (StopIteration, DataError, chat_formats.BadRow):
        return False
    return True


def files(
    paths: Sequence[str],
    *,
    held_out: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seq_len: int | None = None,
    limit: int = 20_000,
    settings: dict[str, Any] | None = None,
) -> Iterator[tuple[str, Finding]]:
    """Findings about files, each with the part of the data it is about.

    Args:
        paths: files, folders and patterns.
        held_out: the same of what must not be trained on.
        tokenizer: counts tokens and renders conversations.
        seq_len: tokens in a row.
        limit: documents and conversations that are looked at.
        settings: of the sources of text (text_field, encoding).
    """
    settings = settings or {}
    texts, told = split(paths, settings)
    other_texts, other_told = split(held_out, settings)
    if texts:
        yield from (("text", found) for found in _texts(texts, other_texts, tokenizer, seq_len, limit))
    if told:
        report = ChatReport()
        trained = yield from _read("conversations", told, report)
        kept = (yield from _read("held-out conversations", other_told, ChatReport())) if other_told else []
        if trained:
            yield from (("conversations", found) for found in check_chat.rows(trained, report))
        if trained and kept:
            yield from (("conversations", found) for found in check_chat.overlap(trained, kept))
        if trained and tokenizer is not None:
            made = check_chat.rendering(trained, tokenizer, seq_len or 1 << 30, limit)
            yield from (("conversations", found) for found in made)


def _texts(
    texts: Iterable[SourceConfig], held_out: Sequence[SourceConfig], tokenizer: Tokenizer | None, seq_len: int | None,
    limit: int,
) -> Iterator[Finding]:  # fmt: skip
    other = HeldOut(item.text for item in _scan(held_out, []) if isinstance(item, Document)) if held_out else None
    looked, refused, counted = Documents(limit, other), list[Finding](), None
    if tokenizer is not None:
        counted = _Counts(tokenizer, limit)
    for item in _scan(texts, refused):
        looked.add(item)
        if counted is not None and isinstance(item, Document):
            counted.add(item.text)
    yield from refused
    yield from looked.findings(cleaned=False)
    if tokenizer is not None and counted is not None and looked.n:
        yield from counted.findings(seq_len)
        if tokenizer.special.eos is None:
            yield check.document_ends((), tokenizer)


def _scan(texts: Iterable[SourceConfig], refused: list[Finding]) -> Iterator[Document | readers.Rejected]:
    """The documents of all files; what cannot be read is passed over, and a damaged file is one finding."""
    for source in texts:
        lenient = source.model_copy(update={"on_bad_row": "skip", "encoding_errors": "skip"})
        try:
            for _, item in sources.scan([lenient]):
                yield item
        except DataError as error:
            refused.append(refusal("unreadable file", error))


def _read(
    part: str, paths: Sequence[str], report: ChatReport
) -> Generator[tuple[str, Finding], None, list[Conversation]]:
    """The conversations of the files; rows that would stop a training are found, and then passed over."""
    config = ChatConfig(paths=tuple(paths))
    try:
        return chat.read(config, report)
    except DataError as error:
        yield part, refusal("rows", error)
        if not report.dropped["bad row"]:
            return []
    for counts in (report.dropped, report.formats):
        counts.clear()
    report.rows = report.kept = 0
    try:
        return chat.read(config.model_copy(update={"on_bad_row": "skip"}), report)
    except DataError:
        return []


class _Counts:
    """Counts the tokens of texts."""

    def __init__(self, tokenizer: Tokenizer, limit: int):
        self.tokenizer, self.limit = tokenizer, limit
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.lengths: list[int] = []
        self.bytes = 0
        self.waiting: list[str] = []

    def add(self, text: str) -> None:
        if len(self.lengths) + len(self.waiting) >= self.limit:
            return
        self.waiting.append(text)
        if len(self.waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        for text, ids in zip(self.waiting, self.tokenizer.encode_batch(self.waiting), strict=True):
            self.counts += np.bincount(ids, minlength=len(self.counts))
            self.lengths.append(len(ids))
            self.bytes += len(text.encode())
        self.waiting = []

    def findings(self, seq_len: int | None) -> Iterator[Finding]:
        self._flush()
        yield from check.token_counts(self.counts, self.bytes, np.array(self.lengths), self.tokenizer, seq_len)


def as_json(words: Sequence[str], found: Sequence[tuple[str, Finding]]) -> str:
    """Everything found, for programs."""
    findings = [{"part": part, **finding.to_dict()} for part, finding in found]
    verdict = check.worst(finding for _, finding in found)
    return json.dumps({"checked": list(words), "verdict": verdict, "findings": findings}, indent=2, ensure_ascii=False)
