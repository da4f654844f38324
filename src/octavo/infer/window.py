"""What a model has read of some rows that go on together, for searches that keep, copy and drop whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.infer import native
from octavo.nn.contracts import Inputs, Memory
from octavo.nn.state import ContiguousState

PREFILL_TOKENS = 256
"""Tokens a row reads in one pass: bounds the memory of the logits."""


class Window:
    """What the model has read of each row: cached while all fit into its context, then cropped and read anew.

    A source is encoded once; what the model reads of it, it keeps in the state, or is given again.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sources: Sequence[Sequence[int]] | None = None,
    ):
        self.model = model
        self.memory: Memory | None = None
        self.rows: list[list[int]] = [[] for _ in prompts]
        needed = max(len(prompt) for prompt in prompts) + max_new_tokens
        with torch.inference_mode():
            self.state = model.new_state(len(prompts), min(needed, model.max_seq_len))
        self.device = self.state.lengths.device
        served = isinstance(self.state, ContiguousState) and not native.unsuitable(model)
        self.native = served and native.library()[0] is not None
        self.step: native.NativeStep | None = None
        if sources is not None:
            source, valid = _padded(sources)
            with torch.inference_mode():
                self.memory = model.encode(source.to(self.device), valid.to(self.device))

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Append ``new`` tokens to each row; the logits (B, V) after each row's last token, any where none is new."""
        for row, ids in zip(self.rows, new, strict=True):
            row.extend(ids)
        limit = self.model.max_seq_len
        if self.state is not None and max(len(row) for row, ids in zip(self.rows, new, strict=True) if ids) <= limit:
            if self.native and max(map(len, new)) == 1:
                return self._native_step(new)
            return self._forward(new, PREFILL_TOKENS)
        self.state = None
        return self._forward(
            [row[-limit:] if ids else row[-1:] for row, ids in zip(self.rows, new, strict=True)], limit
        )

    def select(self, rows: Sequence[int]) -> None:
        """Keep (or copy) the rows given by index, in that order."""
        assert self.state is not None
        self.rows = [list(self.rows[row]) for row in rows]
        with torch.inference_mode():
            self.state.select(torch.tensor(rows, device=self.device))

    def _native_step(self, new: Sequence[Sequence[int]]) -> Tensor:
        if self.step is None:
            assert isinstance(self.state, ContiguousState)
            self.step = native.NativeStep(self.model, self.state)
        rows = [row for row, ids in enumerate(new) if ids]
        logits = self.step(torch.tensor([new[row][0] for row in rows]), torch.tensor(rows))
        if len(rows) == len(new):
            return logits
        return logits.new_zeros(len(new), logits.shape[1]).index_copy_(0, torch.tensor(rows), logits)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]], n_at_once: int) -> Tensor:
        lengths = [len(row) for row in rows]
        tokens, valid = (tensor.to(self.device) for tensor in _padded(rows))
        last: list[Tensor | None] = [None] * len(rows)
        for start in range(0, tokens.shape[1], n_at_once):
            part = slice(start, start + n_at_once)
            padded = min(lengths) < min(part.stop, tokens.shape[1])
            inputs = Inputs(tokens[:, part], valid=valid[:, part] if padded else None)
            if self.memory is not None and (self.state is None or not self.state.used):
                inputs.memory = self.memory
            logits = self.model(inputs, state=self.state, needs=("logits",)).logits
            for row, length in enumerate(lengths):
                if part.start < length <= part.stop:
                    last[row] = logits[row, length - 1 - start]
        nothing = next(row for row in last if row is not None)
        return torch.stack([nothing if row is None else row for row in last])


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, T), padded at the end, and where they are text."""
    lengths = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
