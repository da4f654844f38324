"""What the inner loop works on, in C++ or plainly: the text, the tables of chance, the two matrices."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from octavo.vectors.config import VectorsConfig
from octavo.vectors.corpus import Corpus
from octavo.vectors.draws import alias, epoch_key, keep
from octavo.vectors.huffman import Tree, tree

ALIGNMENT = 16  # floats; rows begin at multiples of it, for the widest registers


@dataclass
class Task:
    """Everything of a training that does not change, and the weights, which do.

    Attributes:
        input: (V, width) the word vectors; beyond ``dim`` both matrices are zero and stay so.
        output: (V, width) what they are multiplied with: a row for each word, or for each node of the tree.
    """

    input: np.ndarray
    output: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    keep: np.ndarray
    share: np.ndarray
    other: np.ndarray
    tree: Tree | None
    config: VectorsConfig
    cbow: bool = field(init=False)
    whole: bool = field(init=False)
    window: int = field(init=False)
    negative: int = field(init=False)

    def __post_init__(self) -> None:
        self.cbow, self.window = self.config.kind == "cbow", self.config.window
        self.whole = self.config.cbow_step == "whole"
        self.negative = 0 if self.tree is not None else self.config.negative

    def key(self, epoch: int) -> int:
        return epoch_key(self.config.seed, epoch)

    @property
    def total(self) -> int:
        """Words to go through in all."""
        return len(self.tokens) * self.config.epochs

    def rate_at(self, epoch: int, place: int) -> float:
        """The learning rate at a word of the text."""
        progress = (len(self.tokens) * epoch + place) / self.total
        return max(self.config.lr_end, self.config.lr - (self.config.lr - self.config.lr_end) * progress)


def make_task(corpus: Corpus, config: VectorsConfig) -> Task:
    """The beginning: word vectors uniform within 0.5 / dim, outputs zero."""
    n, width = len(corpus.words), -(-config.dim // ALIGNMENT) * ALIGNMENT
    start = _aligned(n, width)
    random = np.random.default_rng(config.seed)
    for at in range(0, n, 1 << 16):  # in blocks: no second matrix in memory
        rows = start[at : at + (1 << 16), : config.dim]
        rows[:] = (random.random(rows.shape, np.float32) - np.float32(0.5)) / np.float32(config.dim)
    share, other = alias(corpus.counts, config.exponent)
    return Task(
        start, _aligned(n, width), corpus.tokens, corpus.starts, keep(corpus.counts, config.sample), share, other,
        tree(corpus.counts) if config.loss == "hierarchical" else None, config,
    )  # fmt: skip


def _aligned(n: int, width: int) -> np.ndarray:
    raw = np.zeros(n * width + ALIGNMENT, np.float32)
    at = -(raw.ctypes.data // 4) % ALIGNMENT
    return raw[at : at + n * width].reshape(n, width)
