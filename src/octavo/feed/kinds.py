"""The contract of what tuning can read: one class for each kind of ``tune.data``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

from octavo.config import Recipe, TuneConfig
from octavo.data import show
from octavo.data.check import Finding
from octavo.feed.rows import Feed
from octavo.tokenizer import Tokenizer

T = TypeVar("T")


class Kind(ABC):
    """How one kind of ``tune.data`` is read, shown and checked. It holds nothing: the settings come with each call."""

    noun: str  # of one of the things that are read
    many: str  # of all of them
    asks = False  # whether sample prompts are questions of a user; else they are read as they stand
    of_pairs = False  # whether it is for models that read a source and write a target, and for no others

    @abstractmethod
    def read(self, recipe: Recipe, tune: TuneConfig, tokenizer: Tokenizer, seq_len: int, keep: Path | None) -> Feed:
        """Rows of ``seq_len`` tokens.

        Args:
            keep: a folder in which what is held out is written for the scores.

        Raises:
            DataError: nothing can be read, or nothing in it can be trained on.
        """

    @abstractmethod
    def told(self, one: Any, tokenizer: Tokenizer) -> show.Told:
        """What is known of one of the things read."""

    def fingerprint(self, data: Any) -> str | None:
        """Of the files that are read; None where there are none."""
        return None

    def shape(self, shape: Any, data: Any, feed: Feed) -> Any:
        """The configuration of the model that is tuned, for one that was pretrained with ``shape``."""
        return shape

    def findings(
        self, tune: TuneConfig, seed: int, tokenizer: Tokenizer, seq_len: int, limit: int
    ) -> Iterator[Finding]:
        """What ``octavo data check`` says of it, looking at no more than ``limit`` of the things read."""
        yield from ()


def spread(rows: list[T], share: float) -> tuple[list[T], list[T]]:
    """What is trained on, and a share held out, spread over all: a file sorted by topic is not split by topic."""
    held = [int((i + 1) * share) > int(i * share) for i in range(len(rows))]
    return list(compress(rows, (not out for out in held))), list(compress(rows, held))
