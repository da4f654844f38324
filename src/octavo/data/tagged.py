"""Words with a tag each, for classes of tokens: read from JSON lines and column files, and made into rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from octavo.data.chat_formats import BadRow
from octavo.data.chat_rows import SUFFIXES
from octavo.data.chat_rows import rows as json_rows
from octavo.data.labelled import NO_LABEL, files
from octavo.data.opening import reading
from octavo.data.pack import Batch, Packed, PackReport, Piece
from octavo.data.permutation import permute
from octavo.errors import DataError
from octavo.files import sha256_file
from octavo.schema import Config
from octavo.tokenizer.words import Aligner, Carrier, rows_of

if TYPE_CHECKING:
    from octavo.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
TAG_KEYS = ("tags", "ner_tags", "pos_tags", "labels")


class TaggedConfig(Config):
    """Sentences as words, each with a tag: names, parts of speech, places where words end.

    Args:
        paths: files or globs. .jsonl and .json (also .gz, .zst) hold objects with a list of words and a list of tags.
            All others hold a word a line with columns beside it, an empty line between sentences (CoNLL).
        words: in .jsonl, where the words stand.
        tags: in .jsonl, where the tags stand; default: tags, ner_tags, pos_tags or labels, whichever is there.
        word_column, tag_column: in column files, counted from 0, or from the end with -1.
        labels: the tags in their order; default: all that occur. Tags that are numbers count in it.
        pieces: which of a word's tokens carries its tag: the first, the last (a decoder has then read the whole
            word), or all. The others are not trained on. What a model says of a word is read where its tag stood:
            of ``all``, from the first.
        separator: what stands between two words of the text: nothing in Chinese.
    """

    problem: ClassVar[Literal["single_label"]] = "single_label"

    paths: tuple[str, ...] = Field(min_length=1)
    words: str = "tokens"
    tags: str | None = None
    word_column: int = 0
    tag_column: int = -1
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    pieces: Carrier = "first"
    separator: str = " "


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words, the tag of each, and the file and line (1-based) at which they begin."""

    words: tuple[str, ...]
    tags: tuple[str | int, ...]
    source: str = ""
    line: int = 0


def read(config: TaggedConfig) -> list[Sentence]:
    """Every sentence of the files, in order.

    Raises:
        DataError: no file matches, or something in one cannot be read, with file and line.
    """
    found: list[Sentence] = []
    for path in files(config.paths):
        if path.name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES):
            found += (_of_json(row, config, path, line) for line, row in json_rows(path))
        else:
            found += _of_columns(path, config)
    if not found:
        raise DataError(f"no sentence in {', '.join(config.paths)}", fix="give words with a tag each")
    return found


def _of_json(row: Any, config: TaggedConfig, path: Path, line: int) -> Sentence:
    try:
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, Mapping):
            raise BadRow("expected an object with words and tags")
        keys = (config.tags,) if config.tags else TAG_KEYS
        given, tags = row.get(config.words), next((row[key] for key in keys if row.get(key) is not None), None)
        for name, value in ((repr(config.words), given), (" or ".join(map(repr, keys)), tags)):
            if not isinstance(value, list) or not value:
                raise BadRow(f"there is no list {name}; the keys are {', '.join(map(str, row))}")
        assert isinstance(given, list) and isinstance(tags, list)
        if len(given) != len(tags):
            raise BadRow(f"{len(given)} words, but {len(tags)} tags")
        if bad := [w for w in given if not isinstance(w, str) or not w]:
            raise BadRow(f"{bad[0]!r} is no word")
        if bad := [t for t in tags if isinstance(t, bool) or not isinstance(t, str | int)]:
            raise BadRow(f"the tag {bad[0]!r} is neither a name nor a number")
        return Sentence(tuple(given), tuple(tags), str(path), line)
    except BadRow as reason:
        fix = "correct it, or name the lists with words and tags"
        raise DataError(str(reason), where=f"{path}:{line}", fix=fix) from None


def _of_columns(path: Path, config: TaggedConfig) -> Iterator[Sentence]:
    """A word a line: columns between tabs, or where a line has none between blanks.

    Lines of -DOCSTART- say nothing, nor do in .conllu files comments and tokens of several words or of none.
    """
    try:
        with reading(path) as file:
            lines = file.read().decode("utf-8-sig").split("\n")  # a word may be one of Unicode's other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", fix="save it as UTF-8") from None
    words: list[str] = []
    tags: list[str] = []
    width = began = 0
    for number, line in enumerate([*lines, ""], 1):
        line = line.strip("\r ")
        columns = [part.strip(" ") for part in line.split("\t")] if "\t" in line else line.split(" ")
        columns = columns if "\t" in line else [part for part in columns if part]
        if columns and path.suffix == ".conllu" and not columns[0].isdigit():
            continue
        if not any(columns) or columns[0] == "-DOCSTART-":
            if words:
                yield Sentence(tuple(words), tuple(tags), str(path), began)
            words, tags = [], []
            continue
        width = width or len(columns)
        try:
            if len(columns) != width:
                raise BadRow(f"{len(columns)} columns instead of {width}")
            if width < 2:
                raise BadRow("one column: a word without a tag")
            word, tag = columns[config.word_column], columns[config.tag_column]
            if not word or not tag:
                raise BadRow("an empty column")
        except IndexError:
            what = f"word_column {config.word_column} or tag_column {config.tag_column} is not among {width} columns"
            raise DataError(what, where=f"{path}:{number}", fix="count them from 0") from None
        except BadRow as reason:
            fix = "write a word a line with its tag behind it, an empty line between sentences"
            raise DataError(str(reason), where=f"{path}:{number}", fix=fix) from None
        began = began if words else number
        words.append(word)
        tags.append(tag)


def fingerprint(config: TaggedConfig) -> str:
    """SHA-256 over the names and contents of the files."""
    described = [(str(path), sha256_file(path)) for path in files(config.paths)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def classes(sentences: Sequence[Sentence], config: TaggedConfig) -> tuple[str, ...]:
    """The names of the tags: those given, or all that occur, ``O`` first.

    Raises:
        DataError: a tag is not among those given, or there is one tag only.
    """
    seen = {tag for sentence in sentences for tag in sentence.tags}
    if config.labels is not None:
        n = len(config.labels)
        for tag in sorted(seen, key=str):
            if tag not in config.labels if isinstance(tag, str) else not 0 <= tag < n:
                raise DataError(f"the tag {tag!r} is not one of labels", fix="add it, or correct the file")
        return config.labels
    if len(seen) < 2:
        raise DataError(f"there is one tag, {next(iter(seen), None)!r}", fix="give words with two tags or more")
    if all(isinstance(tag, int) for tag in seen):
        return tuple(str(tag) for tag in sorted(seen))  # type: ignore[type-var]
    if len(names := {str(tag) for tag in seen}) < len(seen) or not all(isinstance(tag, str) for tag in seen):
        raise DataError("some tags are names and some are numbers", fix="name the numbers with labels")
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


def targets(sentence: Sentence, names: Sequence[str], *, named: bool) -> list[int]:
    """The tags as numbers; with ``named`` those that are numbers already count in ``names``."""
    places = {name: i for i, name in enumerate(names)}
    return [tag if isinstance(tag, int) and named else places[str(tag)] for tag in sentence.tags]


class TaggedRows(Packed):
    """One sentence a row, or a part of it; ``labels`` (B, T) beside the fields, below zero where no tag stands.

    Args:
        once: a tag stands once only, where it is read: for held-out rows, so that every word counts as one.
    """

    def __init__(
        self,
        sentences: Sequence[Sentence],
        labels: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        pieces: Carrier = "first",
        separator: str = " ",
        once: bool = False,
    ):
        self.given, self.seq_len = sentences, seq_len
        self.pad = tokenizer.special.pad if tokenizer.special.pad is not None else 0
        aligner = Aligner(tokenizer, separator=separator)
        self.framed = rows_of(aligner, [sentence.words for sentence in sentences], seq_len, pieces)
        self.n_rows = len(self.framed)
        self.n_split = self.n_rows - len({row.sentence for row in self.framed})
        self.labels = []
        for row in self.framed:
            tags = np.full(len(row.ids), NO_LABEL, np.int64)
            for i, places in zip(row.words, row.carry, strict=True):
                tags[places[:1] if once else places] = labels[row.sentence][i]
            self.labels.append(tags)
        digest = hashlib.sha256(f"tagged {seq_len} {tokenizer.hash}".encode())
        for row, tags in zip(self.framed, self.labels, strict=True):
            digest.update(np.asarray([len(row.ids), *row.ids, *tags], np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def n_tokens(self) -> int:
        return sum(len(row.ids) for row in self.framed)

    @property
    def n_trained(self) -> int:
        """Tokens that carry a tag."""
        return sum(int((tags >= 0).sum()) for tags in self.labels)

    def joined(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[list[list[int]], list[list[int]]]:
        """What is given and said of every row, in their order, as one list a sentence."""
        given: list[list[int]] = [[] for _ in self.given]
        said: list[list[int]] = [[] for _ in self.given]
        for row, (there, told) in zip(self.framed, rows, strict=True):
            given[row.sentence] += there
            said[row.sentence] += told
        return given, said

    def rows(self, epoch: int, index: Array) -> Batch:
        shape = (len(index), self.seq_len)
        tokens, labels = np.full(shape, self.pad, np.int64), np.full(shape, NO_LABEL, np.int64)
        valid = np.zeros(shape, bool)
        for row, number in enumerate(index):
            ids = self.framed[int(number)].ids
            tokens[row, : len(ids)], labels[row, : len(ids)] = ids, self.labels[int(number)]
            valid[row, : len(ids)] = True
        return {
            "tokens": tokens,
            "targets": tokens,
            "loss_mask": np.zeros(shape, bool),
            "doc_ids": np.where(valid, 0, -1),
            "positions": np.where(valid, np.arange(self.seq_len), 0),
            "valid": valid,
            "labels": labels,
        }

    def pieces(self, epoch: int, number: int) -> list[Piece]:
        row = self.framed[number]
        n = len(row.ids)
        return [Piece(0, n, n, row.sentence, 0, n)]

    def report(self) -> PackReport:
        slots = self.n_rows * self.seq_len
        padded = 1 - self.n_tokens / slots
        return PackReport(self.n_rows, slots, self.n_trained, padded, len(self.given), split=self.n_split)


def prepare(
    config: TaggedConfig, tokenizer: Tokenizer, seq_len: int, *, held_out: float, seed: int
) -> tuple[TaggedRows, TaggedRows | None, tuple[str, ...]]:
    """The rows that are trained on, the share of sentences that is held out, and the names of the tags.

    Raises:
        DataError: see ``read`` and ``classes``; or nothing is left to train on.
    """
    every = read(config)
    names = classes(every, config)
    order = permute(np.arange(len(every)), len(every), seed, 3)
    n = int(len(every) * held_out)
    if n == len(every):
        raise DataError("no sentence is left to train on", fix="hold out fewer, or give more")

    def rows(some: Array, *, once: bool) -> TaggedRows:
        part = [every[i] for i in sorted(some)]
        tags = [targets(sentence, names, named=config.labels is not None) for sentence in part]
        how = {"pieces": config.pieces, "separator": config.separator, "once": once}
        return TaggedRows(part, tags, tokenizer, seq_len, **how)

    return rows(order[n:], once=False), rows(order[:n], once=True) if n else None, names


def told(tokens: Sequence[str], tags: Sequence[str | int | None]) -> str:
    """``Anna/B-PER lives/O``: words with their tags, for people."""
    return " ".join(f"{word}/{tag}" for word, tag in zip(tokens, tags, strict=True))
