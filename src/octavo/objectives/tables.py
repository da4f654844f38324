"""The table of objectives: what ``train.objective.kind`` can be."""

from __future__ import annotations

from octavo.objectives.classes import ClassLoss
from octavo.objectives.denoising import Infilling, PrefixLikelihood, SpanCorruption
from octavo.objectives.likelihood import CausalLikelihood
from octavo.objectives.masked import MaskedLikelihood

OBJECTIVES: dict[str, type[CausalLikelihood] | type[MaskedLikelihood] | type[ClassLoss]] = {
    "causal": CausalLikelihood,
    "masked": MaskedLikelihood,
    "classes": ClassLoss,
    "spans": SpanCorruption,
    "infilling": Infilling,
    "prefix": PrefixLikelihood,
}
