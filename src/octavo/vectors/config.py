"""The settings of word vectors: how they are trained, and how a model starts from them."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from octavo.schema import Config

MAX_OUTPUTS = 128  # of one prediction; the same number stands in nn/kernels/word2vec.cpp


class VectorsConfig(Config):
    """word2vec: every word predicts its neighbours (skip-gram), or the mean of its neighbours predicts it (CBOW).

    ``negative`` wrong words are told from each right one, drawn in proportion to count^``exponent``; or the right one
    is found by yes-or-no questions down a Huffman tree. Frequent words are left out at random: of a word that makes up
    the share f of the text, (sqrt(f / sample) + 1) sample / f is kept (0 keeps everything). The window of each word is
    drawn from 1 to ``window``; the learning rate falls linearly to ``lr_end``.

    In CBOW each of n neighbours owns 1/n of the mean, and its gradient has that factor (``cbow_step: gradient``).
    word2vec's program and gensim leave it out, and their learning rates go with that: ``whole``.
    Sources: Mikolov et al. 2013a (arXiv 1301.3781), 2013b (arXiv 1310.4546) sections 2.1 to 2.3; what is kept is as in
    their program, not as in the paper (1 - sqrt(sample / f) left out).
    """

    kind: Literal["skipgram", "cbow"] = "skipgram"
    loss: Literal["negative", "hierarchical"] = "negative"
    dim: int = Field(default=100, ge=1, le=1 << 14, description="numbers a word")
    cbow_step: Literal["whole", "gradient"] = "whole"
    window: int = Field(default=5, ge=1, le=1 << 10, description="neighbours on each side, at most")
    negative: int = Field(default=5, ge=1, lt=MAX_OUTPUTS, description="wrong words for each right one")
    exponent: float = Field(default=0.75, ge=-2, le=2)
    sample: float = Field(default=1e-3, ge=0, le=1)
    min_count: int = Field(default=5, ge=1, description="rarer words are left out")
    max_words: int | None = Field(default=None, ge=2, description="only the most frequent words")
    epochs: int = Field(default=5, ge=1)
    lr: float = Field(default=0.025, gt=0, le=10)
    lr_end: float = Field(default=1e-4, ge=0)
    seed: int = Field(default=1, ge=0, lt=2**63)
    threads: int = Field(default=1, ge=1, le=256, description="more than 1 is not repeatable")
    split: str = Field(default="words", min_length=1, description="words, spaces, characters, or a tokenizer's folder")
    lower: bool = False
    unit: Literal["line", "document"] = Field(default="line", description="what no window reaches beyond")
    backend: Literal["auto", "native", "plain"] = "auto"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.lr_end > self.lr:
            raise ValueError(f"lr_end = {self.lr_end:g} is above lr = {self.lr:g}")
        return self


class StartVectors(Config):
    """Word vectors from which a fresh model's token embedding starts; a bare string is the path.

    Tokens that the file does not know start as without it. ``match`` multiplies all vectors by one number, so that
    they are as large as the rows that start at random; ``keep`` takes them as they are.
    """

    path: str = Field(min_length=1)
    scale: Literal["match", "keep"] = "match"

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": os.fspath(value)} if isinstance(value, str | os.PathLike) else value
