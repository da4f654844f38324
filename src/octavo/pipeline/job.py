"""What every stage of a run works with: the recipe, the folder, where progress is told and what asks to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from octavo.config import Recipe
from octavo.errors import ConfigError
from octavo.run import RunFolder
from octavo.stop import StopSignal
from octavo.tokenizer import Tokenizer
from octavo.training.progress import Console

A = TypeVar("A")
T = TypeVar("T")


@dataclass
class Job:
    """One run of a recipe in a folder.

    Args:
        workers: processes that read, clean and tokenise; None for as many as there are cores.
        redo_data: whether text that changed since a run began to train on it is prepared anew.
    """

    recipe: Recipe
    folder: RunFolder
    console: Console
    stop: StopSignal
    workers: int | None = None
    redo_data: bool = False

    @property
    def resume_command(self) -> str:
        return f"octavo resume {self.folder.path}"

    def tokenizer(self) -> Tokenizer:
        """That of the run, once its stage is done."""
        return Tokenizer.load(self.folder.path / "tokenizer")

    def stoppable(self, items: Iterable[T], where: str) -> Iterator[T]:
        """``items``; asked to stop, it stops between two of them."""
        for item in items:
            self.stop.check(where)
            yield item

    def polled(self, work: Callable[[A], T], where: str) -> Callable[[A], T]:
        """``work`` that is not begun again once the job is asked to stop."""

        def polled(argument: A) -> T:
            self.stop.check(where)  # the time limit; a signal comes by itself
            return work(argument)

        return polled

    @contextmanager
    def bytes_bar(self) -> Iterator[Callable[[str, int, int], None]]:
        """A progress line for work counted in bytes; asked to stop, it stops between two pieces."""
        done = 0
        bar = None

        def progress(what: str, now: int, total: int) -> None:
            nonlocal done, bar
            if bar is None:
                bar = self.console.bar(total or None, "byte", what)
            bar.update(now - done)
            done = now
            self.stop.check("while preparing")

        try:
            yield progress
        finally:
            if bar is not None:
                bar.close()


def sized(config: Any, tokenizer: Tokenizer) -> Any:
    """A model's settings with the vocabulary's size in them.

    Raises:
        ConfigError: the tokenizer has more ids than they allow.
    """
    if config.vocab_size is None:
        config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {config.vocab_size}",
            fix="leave model.vocab_size out",
        )
    return config
