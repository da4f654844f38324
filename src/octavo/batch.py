"""The named tensors of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from octavo.nn.contracts import Inputs

TENSORS = ("tokens", "targets", "loss_mask", "doc_ids", "positions", "valid")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is asked of them.

    tokens, targets (B, T) int64; loss_mask (B, T) float, 0 where a target does not count; doc_ids and
    positions (B, T) int64; valid (B, T) bool. ``extra`` holds what one objective needs beside these, each
    with the row axis first, and the ``source`` (B, S) and ``source_valid`` of pairs. ``padding`` "end" says that what
    is not valid stands at the end of every row.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    doc_ids: Tensor
    positions: Tensor
    valid: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    padding: Literal["anywhere", "end"] = "anywhere"

    @classmethod
    def from_numpy(cls, arrays: Mapping[str, np.ndarray], device: str | torch.device = "cpu") -> Batch:
        """Take a loader's arrays; names that are not fields go to ``extra``."""
        if "labels" in arrays:  # texts one a row: what is padding in all of them is left out
            longest = -(-max(1, int(np.flatnonzero(arrays["valid"].any(0)).max(initial=0)) + 1) // 8) * 8
            of_tokens = arrays["labels"].ndim == 2 and arrays["labels"].dtype.kind == "i"
            cut = (*TENSORS, "token_types", *(("labels",) if of_tokens else ()))
            arrays = {name: a[:, :longest] if name in cut else a for name, a in arrays.items()}
        dtypes = {"loss_mask": torch.float32, "valid": torch.bool}
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(arrays[name])).to(device, dtypes.get(name, torch.long))
            for name in TENSORS
        }
        rest = {name: array for name, array in arrays.items() if name not in TENSORS}
        extra = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in rest.items()}
        valid = arrays["valid"].astype(bool)
        scattered = bool((valid[:, 1:] & ~valid[:, :-1]).any())
        return cls(**tensors, extra=extra, padding="anywhere" if scattered else "end")

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def inputs(self) -> Inputs:
        """What the model is given."""
        return Inputs(
            self.tokens, valid=self.valid, doc_ids=self.doc_ids, positions=self.positions, padding=self.padding,
            token_types=self.extra.get("token_types"), source=self.extra.get("source"),
            source_valid=self.extra.get("source_valid"), prefix=self.extra.get("prefix"),
        )  # fmt: skip

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of at most ``rows`` rows."""
        for start in range(0, self.rows, rows):
            part = slice(start, start + rows)
            tensors = {name: getattr(self, name)[part] for name in TENSORS}
            extra = {name: value[part] for name, value in self.extra.items()}
            yield Batch(**tensors, extra=extra, padding=self.padding)
