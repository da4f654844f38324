"""The named tensors of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from octavo.nn.contracts import Inputs


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is asked of them.

    tokens, targets (B, T) int64; loss_mask (B, T) float, 0 where a target does not count; doc_ids and
    positions (B, T) int64; valid (B, T) bool. ``extra`` holds what one objective needs beside these, each
    with the row axis first.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    doc_ids: Tensor
    positions: Tensor
    valid: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_numpy(cls, arrays: Mapping[str, np.ndarray], device: str | torch.device = "cpu") -> Batch:
        """Take a loader's arrays; names that are not fields go to ``extra``."""
        dtypes = {"loss_mask": torch.float32, "valid": torch.bool}
        own = [f.name for f in fields(cls) if f.name != "extra"]
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(arrays[name])).to(device, dtypes.get(name, torch.long))
            for name in own
        }
        extra = {n: torch.from_numpy(np.ascontiguousarray(a)).to(device) for n, a in arrays.items() if n not in own}
        return cls(**tensors, extra=extra)

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def inputs(self) -> Inputs:
        """What the model is given."""
        return Inputs(self.tokens, valid=self.valid, doc_ids=self.doc_ids, positions=self.positions)

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most ``rows`` rows."""
        names = [f.name for f in fields(self) if f.name != "extra"]
        for start in range(0, self.rows, rows):
            part = slice(start, start + rows)
            tensors = {name: getattr(self, name)[part] for name in names}
            yield Batch(**tensors, extra={name: value[part] for name, value in self.extra.items()})
