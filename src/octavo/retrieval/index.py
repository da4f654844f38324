"""Two ways to find passages: by words they share with a question (BM25), and by vectors that lie near its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from octavo.errors import ConfigError, DataError
from octavo.retrieval.words import words_of
from octavo.schema import Config

Embed = Callable[[Sequence[str]], np.ndarray]
EXACT = 50_000  # vectors that are compared one by one; more go into a graph


class Index(ABC):
    """What finds passages of a fixed list by number."""

    @abstractmethod
    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """At most ``k`` numbers of passages and their scores, the best first."""


class Bm25(Index):
    """``sum_w idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean |d|))`` over the words of the question.

    Source: Robertson & Zaragoza 2009, section 3.4.3, with idf = ln(1 + (N - n + 0.5) / (n + 0.5)), as Lucene has it;
    the constant factor k1 + 1 is left out, which changes no order. Passages without a common word are not found.
    """

    class Config(Config):
        kind: Literal["bm25"] = "bm25"
        k1: float = Field(default=1.5, ge=0)
        b: float = Field(default=0.75, ge=0, le=1)

    def __init__(self, config: Bm25.Config, texts: Sequence[str]):
        self.known = dict[str, int]()
        ids = [[self.known.setdefault(w, len(self.known)) for w in words_of(text)] for text in texts]
        self.index = None
        if self.known:
            made = _bm25s().BM25(method="lucene", k1=config.k1, b=config.b)
            made.index((ids, self.known), show_progress=False)
            self.index = made

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        asked = [word for word in words_of(query) if word in self.known]
        if self.index is None or not asked:
            return []
        scores = self.index.get_scores(asked)
        best = np.argsort(-scores, kind="stable")[:k]  # equal ones in the order of the passages
        return [(int(i), float(scores[i])) for i in best if scores[i] > 0]


class Dense(Index):
    """The cosine between the vectors of question and passage; ``model`` makes both.

    Up to ``EXACT`` passages every one is compared; beyond, a graph of neighbours (HNSW: Malkov & Yashunin 2018) finds
    most of the nearest.
    """

    class Config(Config):
        kind: Literal["dense"] = "dense"
        model: str = Field(description="a run or a model folder whose embeddings are compared")

    def __init__(self, vectors: np.ndarray, embed: Embed, *, exact: bool | None = None):
        self.vectors, self.embed = unit(vectors), embed
        self.graph = None
        if not (len(vectors) <= EXACT if exact is None else exact):
            self.graph = _usearch().Index(ndim=vectors.shape[1], metric="cos", dtype="f32")
            self.graph.add(np.arange(len(vectors)), self.vectors)

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        if not len(self.vectors):
            return []
        asked = unit(self.embed([query]))[0]
        if self.graph is not None:
            near = self.graph.search(asked, min(k, len(self.vectors)))
            return [(int(i), 1.0 - float(d)) for i, d in zip(near.keys, near.distances, strict=True)]
        scores = self.vectors @ asked
        best = np.argsort(-scores, kind="stable")[:k]
        return [(int(i), float(scores[i])) for i in best]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, (N, D) float32; a row of zeros stays."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise DataError("an embedding is not a finite vector", fix="check the model that embeds")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise ConfigError("search by words needs the package bm25s", fix="./setup.sh --extras rag") from None
    return bm25s


def _usearch() -> Any:
    try:
        import usearch.index as found
    except ImportError:
        raise ConfigError(
            f"a dense store of more than {EXACT:,} passages needs the package usearch", fix="./setup.sh --extras rag"
        ) from None
    return found
