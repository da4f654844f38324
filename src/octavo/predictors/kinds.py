"""The table of counted models: what ``model.kind`` of a recipe without training can be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from octavo.ngrams import NGram
from octavo.ngrams.suffixes import InfiniGram
from octavo.predictors.ngram import InfiniGramKind, NGramKind
from octavo.predictors.predictor import NGramPredictor
from octavo.predictors.settings import CountedConfig
from octavo.predictors.simple import Uniform, Unigram

PREDICTORS: dict[str, Any] = {
    "uniform": Uniform,
    "unigram": Unigram,
    "ngram": NGramKind,
    "infinigram": InfiniGramKind,
}


def count(
    config: CountedConfig,
    documents: Iterable[np.ndarray[Any, Any]],
    *,
    bos: int | None = None,
    eos: int | None = None,
    scratch_folder: str | os.PathLike[str] | None = None,
) -> NGramPredictor:
    """A predictor counted from documents ``[bos] tokens [eos]``; ``config.vocab_size`` is given.

    Args:
        bos: begins every document, so it is never predicted; unless it is ``eos`` too.
        scratch_folder: for what does not fit into the memory allowed.

    Raises:
        DataError: there is nothing to count, or an id outside the vocabulary.
    """
    kind = PREDICTORS[config.kind]  # type: ignore[attr-defined] - every entry of the table has one
    only_begins = bos if bos != eos else None
    counted = kind.fit(config, documents, config.size, bos=only_begins, scratch_folder=scratch_folder)
    return predictor(config, counted, only_begins)


def predictor(config: CountedConfig, counted: Any, bos: int | None) -> NGramPredictor:
    """A table behind the contract of all predictors; ``bos`` begins a document wherever it stands."""
    order = counted.order
    if isinstance(counted, InfiniGram):
        order = None if counted.config.longest is None else counted.config.longest + 1
    return NGramPredictor(counted, max_seq_len=config.max_seq_len, order=order, bos=bos, config=config)


def facts(predictor: NGramPredictor) -> dict[str, Any]:
    """What was counted, in figures: ``entries`` is the number of different n-grams of every length."""
    counted = predictor.counted
    if isinstance(counted, NGram):
        return {"entries": sum(map(len, counted.keys)), "entries_by_order": [len(keys) for keys in counted.keys]}
    if isinstance(counted, InfiniGram):
        return {"entries": len(counted.array)}
    return dict(getattr(counted, "facts", {}))
