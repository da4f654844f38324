"""Conversations for instruction tuning: read from the usual file formats, checked, and made into samples.

Files are .jsonl or .json (a list of rows), also .gz and .zst; `octavo.data.chat_formats` has the four shapes of
rows. A row that is not what it claims to be is an error with file and line; a row that is well formed but holds
nothing to learn is dropped and counted.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from octavo.data.chat_formats import COLUMNS, BadRow, Format, Message, Useless, convert, detect, kind_of
from octavo.data.chat_rows import SUFFIXES, rows
from octavo.data.opening import COMPRESSED, is_dir, is_file
from octavo.errors import DataError, did_you_mean
from octavo.files import sha256_file
from octavo.schema import Config

if TYPE_CHECKING:
    from octavo.tokenizer import Rendered, Tokenizer

SHOWN_ERRORS = 5
CHECKED_ROWS = 64


class ChatConfig(Config):
    """Where conversations come from and how their rows are read.

    Args:
        paths: files, folders (every .jsonl and .json below them, also .gz and .zst) or globs.
        format: the shape of the rows; ``auto`` looks at the first row of each file.
        columns: our column name -> the file's, where it is not one of the usual ones, such as
            ``{prompt: frage, completion: antwort}``; the format is then best given too.
        on_bad_row: ``error`` reports the first five with their lines and stops; ``skip`` counts them.
    """

    paths: tuple[str, ...] = Field(min_length=1)
    format: Literal["auto"] | Format = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    on_bad_row: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _columns_are_known(self) -> ChatConfig:
        formats = COLUMNS.values() if self.format == "auto" else [COLUMNS[self.format]]
        known = {name for columns in formats for name in columns}
        for name in self.columns:
            if name not in known:
                raise ValueError(f"columns.{name} is not a column of {self.format}: {did_you_mean(name, known)}")
        return self


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages ``{role, content}`` with the file and line (1-based) they stand in, and the tools they may call."""

    messages: list[Message]
    source: str = ""
    line: int = 0
    tools: list[Any] | None = None


@dataclass(slots=True)
class ChatReport:
    """What became of the rows: read and kept, dropped by reason, formats by file, and what to warn about."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_answers: int = 0
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Keep a warning for the report and show it."""
        self.warnings.append(text)
        warnings.warn(text, stacklevel=3)


class Sample(NamedTuple):
    """One conversation as tokens: ``ids`` (T,) uint32, ``loss_mask`` (T,) uint8 (1: this token is trained).

    ``number`` says which of the conversations given it is: some have no sample.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    number: int = 0


def read(config: ChatConfig, report: ChatReport | None = None) -> list[Conversation]:
    """Every conversation of the files, in the order of the files and their rows.

    Raises:
        DataError: no file matches; a file or row cannot be read (first five and the total, each with file:line);
            nothing is left.
    """
    report = report if report is not None else ChatReport()
    conversations: list[Conversation] = []
    bad: list[tuple[str, str]] = []  # place and reason of the first ones
    n_bad = 0
    for path in _files(config.paths):
        layout: tuple[Format, dict[str, str]] | None = None
        for line, row in rows(path):
            report.rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                if not isinstance(row, dict):
                    raise BadRow(f"expected an object, got {kind_of(row)}")
                if layout is None:
                    layout = detect(row, config.format, config.columns)
                    report.formats[str(path)] = layout[0]
                messages, tools = convert(row, *layout)
                conversations.append(Conversation(messages, str(path), line, tools))
                report.kept += 1
            except Useless as reason:
                report.dropped[str(reason)] += 1
            except BadRow as reason:
                n_bad += 1
                report.dropped["bad row"] += 1
                if len(bad) < SHOWN_ERRORS:
                    bad.append((f"{path}:{line}", str(reason)))
    if bad and config.on_bad_row == "error":
        (where, what), *others = bad
        places = ", ".join(place for place, _ in others)
        raise DataError(
            f"{what}; {n_bad} of {report.rows} rows cannot be read" + (f", the next are {places}" if others else ""),
            where=where,
            fix="correct these rows, name the columns with `columns`, or set on_bad_row=skip",
        )
    if not conversations:
        reasons = ", ".join(f"{n} {reason}" for reason, n in report.dropped.items()) or "the files are empty"
        raise DataError(
            f"no conversation in {', '.join(config.paths)}: {reasons}",
            fix="give rows that end with an assistant's answer",
        )
    if report.rows - report.kept > report.rows / 100:
        reasons = ", ".join(f"{n} {reason}" for reason, n in report.dropped.items())
        report.warn(f"{report.rows - report.kept} of {report.rows} rows were dropped: {reasons}")
    return conversations


def fingerprint(config: ChatConfig) -> str:
    """SHA-256 over the names and contents of the files: other conversations, another value.

    Raises:
        DataError: no file matches.
    """
    described = [(str(path), sha256_file(path)) for path in _files(config.paths)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def tokenise(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, seq_len: int, report: ChatReport | None = None
) -> list[Sample]:
    """Render conversations into samples of at most ``seq_len`` tokens through the tokenizer's chat template.

    Longer ones lose their end. One without a trained token in it (no answer, or all of it cut off) is dropped and
    counted; more than half of the answers cut, or more than 1 % of the rows dropped, is a warning.

    Raises:
        DataError: nothing is left to train on; or the template cannot render a row, or renders one of the first 64
            such that the model would learn what it is never asked, or not to stop (the message names the row).
    """
    report = report if report is not None else ChatReport()
    samples: list[Sample] = []
    n = truncated = dropped = 0
    for n, conversation in enumerate(conversations, 1):
        try:
            rendered = tokenizer.render(conversation.messages, tools=conversation.tools)
            if n <= CHECKED_ROWS:
                _check_rendered(conversation, rendered, tokenizer)
        except DataError as error:
            place = f"{conversation.source}:{conversation.line}" if conversation.source else f"conversation {n}"
            where = f"{place}, {error.where}" if error.where else place
            raise DataError(error.what, where=where, fix=error.fix, kept=error.kept) from None
        sample = Sample(
            np.asarray(rendered.ids[:seq_len], dtype=np.uint32),
            np.asarray(rendered.loss_mask[:seq_len], dtype=np.uint8),
            n - 1,
        )
        calls = [call["function"]["name"] for m in conversation.messages for call in m.get("tool_calls", ())]
        cut = any(rendered.loss_mask[seq_len:])
        truncated += cut
        # The names stand in the list of tools too, so only what is trained can tell.
        trained = tokenizer.decode(i for i, m in zip(rendered.ids, rendered.loss_mask) if m) if calls else ""
        if not all(name in trained for name in calls):
            report.dropped["tool calls unknown to the chat template"] += 1
        elif not sample.loss_mask[1:].any():  # nothing stands before the first token to predict it from
            report.dropped["answer cut off" if cut else "no trained token"] += 1
        else:
            samples.append(sample)
            report.tokens += len(sample.ids)
            report.trained_tokens += int(sample.loss_mask[1:].sum())
            continue
        dropped += 1
    report.samples += len(samples)
    report.truncated_answers += truncated
    if not samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "no conversations"
        raise DataError(
            f"no conversation has a trained token within seq_len = {seq_len}: {reasons}",
            fix="raise seq_len, or give conversations that an assistant answers",
        )
    if truncated > n / 2:
        report.warn(f"{truncated} of {n} answers are cut at seq_len = {seq_len}; a larger one trains on whole answers")
    if dropped > n / 100:
        report.warn(f"{dropped} of {n} conversations have nothing to train on and were dropped")
    return samples


def _check_rendered(conversation: Conversation, rendered: Rendered, tokenizer: Tokenizer) -> None:
    """What the model is trained on must be what it will be asked, and end with what ends an answer."""
    ids, mask, bos = rendered.ids, rendered.loss_mask, tokenizer.special.bos
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(
            f"the rendered conversation begins twice with {tokenizer.tokens[bos]}",
            fix="let the chat template write bos_token once",
        )
    last = len(mask) - 1 - mask[::-1].index(1) if 1 in mask else -1
    first = last
    while first > 0 and mask[first - 1]:
        first -= 1
    if last >= 0 and not tokenizer.stop_ids.intersection(ids[first : last + 1]):
        stops = ", ".join(tokenizer.tokens[i] or "" for i in sorted(tokenizer.stop_ids)) or "it has none"
        raise DataError(
            f"the last answer is trained without a token that ends it ({stops}): the model would never stop",
            fix="let the chat template write eos_token, or the token that ends a turn, inside the generation block",
        )
    prompt = tokenizer.render(conversation.messages[:-1], add_generation_prompt=True, tools=conversation.tools)
    if not rendered.text.startswith(prompt.text):
        raise DataError(
            "the prompt before the last answer is not how the rendered conversation begins",
            fix="let add_generation_prompt write exactly what stands before an answer in the chat template",
        )


def _files(patterns: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if is_dir(path):
            files = sorted(p for p in path.rglob("*") if _is_chat(p) and p.is_file())
        elif is_file(path):
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob(pattern, recursive=True)) if Path(name).is_file()]
        if not files:
            raise DataError(f"{pattern} matches no chat file", fix="give a .jsonl or .json file (also .gz and .zst)")
        found += [file for file in files if file not in found]
    return found


def _is_chat(path: Path) -> bool:
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name.endswith(SUFFIXES)
