"""The table of optimizers."""

from __future__ import annotations

from octavo.training.adamw_8bit import AdamW8bit
from octavo.training.muon import Muon
from octavo.training.optim import AdamW, Optimizer, Sgd

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "adamw_8bit": AdamW8bit, "muon": Muon, "sgd": Sgd}
