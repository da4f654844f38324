"""N-gram models as a kind of model in recipes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from octavo.ngrams import NGram
from octavo.ngrams.suffixes import InfiniGram
from octavo.predictors.settings import CountedConfig

WEIGHTS_EVERY = 20  # documents: one of so many is for the weights, where a smoothing learns some

Array = np.ndarray[Any, Any]


class NGramKind:
    """``{kind: ngram, order: 5, smoothing: modified_kneser_ney}``: see ``octavo.ngrams.NGram``."""

    class Config(NGram.Config, CountedConfig):
        """Settings of an n-gram model."""

    @classmethod
    def fit(
        cls,
        config: Config,
        documents: Iterable[Array],
        vocab_size: int,
        *,
        bos: int | None = None,
        scratch_folder: str | os.PathLike[str] | None = None,
    ) -> NGram:
        """Count and smooth. ``bos`` is never predicted: it only begins documents.

        A smoothing that learns weights gets every twentieth document for that, which is then not counted.
        """
        own = {name: getattr(config, name) for name in NGram.Config.model_fields}
        if own["never"] is None:
            own["never"] = bos
        settings = NGram.Config(**own)
        if config.smoothing.kind != "interpolated" or config.smoothing.weights is not None:
            return NGram.fit(settings, documents, vocab_size, scratch_folder=scratch_folder)
        every = list(documents)
        step = min(WEIGHTS_EVERY, len(every))
        counted = [document for number, document in enumerate(every, 1) if number % step] if step > 1 else every
        held_out = every[step - 1 :: step] if step > 1 else None
        return NGram.fit(settings, counted, vocab_size, held_out, scratch_folder=scratch_folder)

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> NGram:
        """As ``NGram.save`` left it."""
        return NGram.load(folder)


class InfiniGramKind:
    """``{kind: infinigram}``: n-grams of any length; see ``octavo.ngrams.suffixes.InfiniGram``."""

    class Config(InfiniGram.Config, CountedConfig):
        """Settings of an n-gram model of any length. A share for what was never seen is needed to score any text."""

        unseen: float = Field(default=0.05, ge=0, lt=1, description="Share of the distribution of single tokens.")

    @classmethod
    def fit(cls, config: Config, documents: Iterable[Array], vocab_size: int, **_: Any) -> InfiniGram:
        """Sort the text."""
        own = {name: getattr(config, name) for name in InfiniGram.Config.model_fields}
        return InfiniGram.fit(InfiniGram.Config(**own), documents, vocab_size)

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> InfiniGram:
        """As ``InfiniGram.save`` left it."""
        return InfiniGram.load(folder)
