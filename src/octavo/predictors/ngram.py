"""N-gram models as a kind of model in recipes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from octavo.ngrams import NGram
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
        held_out: list[Array] | None = None
        if config.smoothing.kind == "interpolated":
            held_out = []
            documents = _without(documents, held_out)
        settings = NGram.Config(**own)
        if held_out is None:
            return NGram.fit(settings, documents, vocab_size, scratch_folder=scratch_folder)
        counted = list(documents)
        return NGram.fit(settings, counted, vocab_size, held_out or counted, scratch_folder=scratch_folder)

    @classmethod
    def load(cls, folder: str | Path, config: Config) -> NGram:
        """As ``NGram.save`` left it."""
        return NGram.load(folder)


def _without(documents: Iterable[Array], held_out: list[Array]) -> Iterator[Array]:
    """All documents but those that go into ``held_out``."""
    for number, document in enumerate(documents, 1):
        if number % WEIGHTS_EVERY:
            yield document
        else:
            held_out.append(document)
