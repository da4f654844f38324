"""RoBERTa (Liu et al. 2019): BERT's layers with another head, and positions counted from padding's id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.bert import Bert, Purpose


class Roberta(Bert):
    """Position 0 is the row after padding's: ``pad_token_id + 1``."""

    model_type, stem = "roberta", "Roberta"
    optional_prefix = "roberta."
    head = "lm_head.decoder.weight"
    copies: ClassVar[Mapping[str, str]] = {"lm_head.decoder.bias": "lm_head.bias"}
    synonyms: ClassVar[Mapping[str, Purpose]] = {}
    unused: ClassVar[Mapping[Purpose, tuple[str, ...]]] = {
        "Model": (r"roberta\.pooler\..*", r"roberta\.lm_head\..*", r"lm_head\..*"),
        "ForMaskedLM": (r"roberta\.pooler\..*",),
        "ForSequenceClassification": (r"roberta\.pooler\..*",),
        "ForTokenClassification": (r"roberta\.pooler\..*",),
    }
    transform: ClassVar[Mapping[str, str]] = {
        "dense": "lm_head.dense",
        "norm": "lm_head.layer_norm",
        "bias": "lm_head.bias",
    }
    classifier: ClassVar[Mapping[str, str]] = {"transform.dense": "classifier.dense", "out": "classifier.out_proj"}

    def offset(self, hf: Mapping[str, Any]) -> int:
        pad = hf.get("pad_token_id", 1)
        return (1 if pad is None else pad) + 1

    def write_offset(self, offset: int) -> dict[str, Any]:
        if not offset:
            raise self.refuse("offset", offset)
        return {"pad_token_id": offset - 1}

    def head_activation(self, hf: Mapping[str, Any]) -> str:
        return "gelu"  # whatever hidden_act says
