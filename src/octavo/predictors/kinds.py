"""The table of counted models: what ``model.kind`` of a recipe without training can be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from octavo.predictors.predictor import NGramPredictor
from octavo.predictors.settings import CountedConfig
from octavo.predictors.simple import Uniform, Unigram

PREDICTORS: dict[str, Any] = {"uniform": Uniform, "unigram": Unigram}


def count(config: CountedConfig, documents: Iterable[np.ndarray[Any, Any]], bos: int | None = None) -> NGramPredictor:
    """A predictor counted from documents ``[bos] tokens [eos]``; ``config.vocab_size`` is given.

    Raises:
        DataError: there is nothing to count, or an id outside the vocabulary.
    """
    kind = PREDICTORS[config.kind]  # type: ignore[attr-defined] - every entry of the table has one
    counted = kind.fit(config, documents, config.size)
    return NGramPredictor(counted, max_seq_len=config.max_seq_len, bos=bos, config=config)
