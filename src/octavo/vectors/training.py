"""Training word vectors: passes over the text in blocks, stoppable between two and resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ConfigError, NumericError, StopRequested
from octavo.files import fsync_path
from octavo.stop import StopSignal
from octavo.vectors import native, plain
from octavo.vectors.config import VectorsConfig
from octavo.vectors.corpus import Corpus
from octavo.vectors.query import Vectors
from octavo.vectors.task import make_task

BLOCK = {"native": 100_000, "plain": 1_000}  # words for each thread, until progress is told and stopping is possible
SAVE_SECONDS = 600.0
MAX_HEADER = 1 << 12


class Training:
    """A training under way: ``step`` until it is ``done``.

    Args:
        notice: is told in one line if the slow backend has to do.

    Raises:
        ConfigError: ``backend: native`` where there is no kernel.
    """

    def __init__(self, corpus: Corpus, config: VectorsConfig, notice: Callable[[str], None] | None = None):
        self.corpus, self.config = corpus, config
        reason = native.library()[1] if config.backend != "plain" else ""
        if reason and config.backend == "native":
            raise ConfigError(f"there is no kernel: {reason}", fix="use --backend plain")
        if reason and notice is not None:
            notice(f"word vectors are trained without the kernel, some hundred times slower: {reason}")
        self.backend = "plain" if reason or config.backend == "plain" else "native"
        self.task = make_task(corpus, config)
        self.epoch, self.unit = 0, 0  # where the next block begins
        self.loss = float("nan")
        many = self.backend == "native" and config.threads > 1
        self._pool = ThreadPoolExecutor(config.threads) if many else None

    @property
    def done(self) -> bool:
        return self.epoch >= self.config.epochs

    @property
    def words_done(self) -> int:
        """Words of the text gone through, those that were left out by chance included."""
        return self.epoch * len(self.corpus.tokens) + int(self.corpus.starts[self.unit])

    def step(self) -> int:
        """Train on the next block; returns how many words it had.

        Raises:
            NumericError: the loss is no number any more.
        """
        starts, before = self.corpus.starts, self.words_done
        edges, units = [self.unit], len(starts) - 1
        for _ in range(self.config.threads if self._pool else 1):
            wanted = starts[edges[-1]] + BLOCK[self.backend]
            edges.append(min(max(int(np.searchsorted(starts, wanted, "right")) - 1, edges[-1] + 1), units))
        pieces = [(a, b) for a, b in zip(edges, edges[1:]) if a < b]
        if self.backend == "native":
            loss, answers = native.train(self.task, self.epoch, pieces, self._pool)
        else:
            loss, answers = plain.train(self.task, self.epoch, *pieces[0])
        if not np.isfinite(loss):
            raise NumericError(f"the loss of word vectors is {loss} in epoch {self.epoch + 1}", fix="lower --lr")
        self.loss = loss / answers if answers else self.loss
        self.unit = edges[-1]
        if self.unit == units:
            self.epoch, self.unit = self.epoch + 1, 0
        return self.words_done - before

    def result(self) -> Vectors:
        """The word vectors."""
        matrix = np.ascontiguousarray(self.task.input[:, : self.config.dim])
        return Vectors(list(self.corpus.words), matrix)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write what is needed to go on; the old file stays until the new one is whole."""
        aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        try:
            with open(aside, "wb") as file:
                file.write(json.dumps(self._header(fingerprint)).encode() + b"\n")
                for matrix in (self.task.input, self.task.output):
                    file.write(matrix.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        fsync_path(path.parent)

    def go_on(self, path: Path, fingerprint: str) -> bool:
        """Take up what ``save`` wrote; False where it belongs to another training or is cut off."""
        with open(path, "rb") as file:
            try:
                header = json.loads(file.readline(MAX_HEADER))
            except ValueError:
                return False
            here, both = self._header(fingerprint), (self.task.input, self.task.output)
            same = isinstance(header, dict) and all(header.get(key) == here[key] for key in here if key not in MOVING)
            size = file.tell() + sum(matrix.nbytes for matrix in both)
            if not same or os.fstat(file.fileno()).st_size != size:
                return False
            for matrix in both:
                file.readinto(matrix.data.cast("B"))
        self.epoch, self.unit = int(header["epoch"]), int(header["unit"])
        return True

    def _header(self, fingerprint: str) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude={"threads", "backend"})
        shape = [len(self.corpus.words), len(self.corpus.tokens), len(self.corpus.starts)]
        return {"config": config, "text": fingerprint, "shape": shape, "epoch": self.epoch, "unit": self.unit}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


MOVING = ("epoch", "unit")


def train(
    corpus: Corpus,
    config: VectorsConfig | None = None,
    *,
    stop: StopSignal | None = None,
    unfinished: Path | None = None,
    fingerprint: str = "",
    progress: Callable[[int, float], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Vectors:
    """Train word vectors on a text.

    Args:
        stop: what asks to stop; between two blocks it is asked.
        unfinished: the file that a stopped training leaves and goes on from; gone at the end.
        fingerprint: of the text, so that one training is not continued on another text.
        progress: is told, after every block, the words done and the mean loss of a yes-or-no answer.
        notice: is told in one line what the user should know.

    Raises:
        StopRequested: it was asked to stop; what was done is in ``unfinished``.
    """
    training = Training(corpus, config or VectorsConfig(), notice)
    say = notice or (lambda line: None)
    saved = time.monotonic()
    with stop if stop is not None else nullcontext():
        try:
            if unfinished is not None and unfinished.is_file():
                if training.go_on(unfinished, fingerprint):
                    say(f"going on from {unfinished}, epoch {training.epoch + 1}")
                else:
                    say(f"{unfinished} is of other settings or another text: beginning anew")
            if progress is not None and training.words_done:
                progress(training.words_done, training.loss)
            while not training.done:
                words = training.step()
                if progress is not None:
                    progress(words, training.loss)
                asked = stop is not None and stop.requested and not training.done
                if unfinished is not None and (asked or time.monotonic() - saved > SAVE_SECONDS):
                    training.save(unfinished, fingerprint)
                    saved = time.monotonic()
                if asked and stop is not None:
                    kept = "" if unfinished is None else str(unfinished)
                    fix = "give the same command again to go on" if kept else ""
                    raise StopRequested(f"{stop.reason}, in epoch {training.epoch + 1}", fix=fix, kept=kept)
        finally:
            training.close()
    return training.result()
