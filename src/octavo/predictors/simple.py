"""The two simplest predictors: every token alike, and every token as often as it occurred."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from octavo.errors import CheckpointError, DataError
from octavo.predictors.settings import CountedConfig

FILE = "unigram.npy"

Array = np.ndarray[Any, Any]


class Flat:
    """One distribution whatever came before: (V,) log-probabilities."""

    order, normalised = 1, True

    def __init__(self, log_probs: Array):
        self.log_probs, self.vocab_size = log_probs, len(log_probs)

    def score(self, tokens: Array | Sequence[int], offsets: Array | None = None) -> tuple[Array, Array]:
        """ln p of every token but each document's first, and whether it was the most probable one."""
        tokens = np.asarray(tokens, np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise DataError(f"a token id lies outside the vocabulary of {self.vocab_size}", fix="encode it anew")
        first = np.zeros(len(tokens), bool)
        bounds = np.array([0, len(tokens)]) if offsets is None else np.asarray(offsets)
        first[bounds[:-1][np.diff(bounds) > 0]] = True
        targets = tokens[~first]
        return self.log_probs[targets], targets == int(self.log_probs.argmax())

    def next_log_probs(self, context: Array | Sequence[int]) -> Array:
        """(V,) float64, the same for every context."""
        return self.log_probs.copy()

    def next_log_probs_of(self, contexts: Sequence[Array]) -> Array:
        """(n, V) float64."""
        return np.broadcast_to(self.log_probs, (len(contexts), self.vocab_size)).copy()


class Uniform(Flat):
    """``p(w) = 1 / V``: what a model has to beat."""

    class Config(CountedConfig):
        """Every token alike."""

        kind: Literal["uniform"] = "uniform"

    def __init__(self, vocab_size: int):
        super().__init__(np.full(vocab_size, -math.log(vocab_size)))

    @classmethod
    def fit(cls, config: Config, documents: Iterable[Array], vocab_size: int, **_: Any) -> Self:
        """Nothing is counted."""
        return cls(vocab_size)

    @property
    def facts(self) -> dict[str, Any]:
        return {"entries": 0}

    def save(self, folder: str | Path) -> None:
        """Nothing to keep beside the vocabulary's size, which stands in config.json."""

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> Self:
        """As ``save`` left it."""
        return cls(config.size)


class Unigram(Flat):
    """``p(w) = (count(w) + k) / (N + k V)``: tokens as often as they occurred, k for each added (Laplace: k = 1)."""

    class Config(CountedConfig):
        """Every token as often as it occurred."""

        kind: Literal["unigram"] = "unigram"
        add_k: float = Field(default=1.0, gt=0, description="added to every count")

    def __init__(self, counts: Array, add_k: float):
        self.counts = counts
        super().__init__(np.log(counts + add_k) - math.log(float(counts.sum()) + add_k * len(counts)))

    @classmethod
    def fit(cls, config: Config, documents: Iterable[Array], vocab_size: int, **_: Any) -> Self:
        """Count every token but each document's first, which is given and never foretold."""
        counts = np.zeros(vocab_size, np.int64)
        for document in documents:
            counts += np.bincount(np.asarray(document)[1:], minlength=vocab_size)
        if not counts.any():
            raise DataError("there is no token to count", fix="give it training text")
        return cls(counts, config.add_k)

    @property
    def facts(self) -> dict[str, Any]:
        return {"entries": int(np.count_nonzero(self.counts)), "tokens": int(self.counts.sum())}

    def save(self, folder: str | Path) -> None:
        """Write the counts."""
        np.save(Path(folder) / FILE, self.counts)

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> Self:
        """Read the counts.

        Raises:
            CheckpointError: they are missing, damaged or of another vocabulary.
        """
        path = Path(folder) / FILE
        try:
            counts = np.load(path, allow_pickle=False)
            if counts.dtype != np.int64 or counts.shape != (config.size,) or counts.min() < 0:
                raise ValueError(f"it holds {counts.dtype} {counts.shape}")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing", fix="count again, or restore the file") from None
        except (ValueError, OSError, EOFError) as error:
            raise CheckpointError(f"{path} is damaged: {error}", fix="count again, or restore the file") from None
        return cls(counts, config.add_k)
