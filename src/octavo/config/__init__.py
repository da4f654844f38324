"""One recipe describes a whole pipeline: data, tokenizer, model, train, tune, eval.

A recipe is YAML, shipped with the package or the user's own, with dotted overrides. Everything wrong with
it is reported at once, with the line it stands on and the nearest known name, before any data is read.
"""

from octavo.config.explaining import explain
from octavo.config.reading import apply_overrides, names, read_mapping
from octavo.config.recipe import (
    DENOISING,
    ChatData,
    FactsData,
    LabelledData,
    PairsData,
    Pretrained,
    Recipe,
    TaggedData,
    TuneConfig,
    schema,
)

__all__ = [
    "DENOISING",
    "ChatData",
    "FactsData",
    "LabelledData",
    "PairsData",
    "Pretrained",
    "Recipe",
    "TaggedData",
    "TuneConfig",
    "apply_overrides",
    "explain",
    "names",
    "read_mapping",
    "schema",
]
