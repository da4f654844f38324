"""A counted model as a predictor: what evaluation, decoding, serving and drafting need of any model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.nn.contracts import Context, Inputs, Keys, Outputs
from octavo.nn.state import ContiguousState, State, StateField, StateSpec, place

CHUNK = 1 << 23  # probabilities that are held in float64 at once
LAYER = "text"
LOG_ZERO = -1e4  # finite, and its exponential is 0

Array = np.ndarray[Any, Any]


class Counted(Protocol):
    """What is asked of a table of counts. ``normalised``: the probabilities of all tokens sum to one."""

    vocab_size: int

    @property
    def normalised(self) -> bool: ...

    def score(self, tokens: Array | Sequence[int], offsets: Array | None = None) -> tuple[Array, Array]: ...

    def next_log_probs_of(self, contexts: Sequence[Array]) -> Array: ...

    def save(self, folder: str | Path) -> None: ...


class NGramPredictor:
    """logits = ln p(next token | the last order - 1 tokens of its document), (B, T, V) float32; where p = 0, -10,000.

    A document begins at a row's first token, where the document id changes, and at ``bos``: no context reaches
    further back. Where the counted model does not sum to one (stupid back-off) the logits do, divided by their sum.

    State: a ring of the ``order - 2`` tokens before the newest, none up to order 2; every token where the order has
    no bound. So a state of a bounded order never grows, and it goes back by ``restore``; one without a bound can
    be truncated too.

    Args:
        counted: the table.
        order: one more than the tokens that are read; None where every token of the document may be.
        max_seq_len: tokens that a state may hold by default; what is read of them is bounded by the order alone.
        bos: the id that begins a document; None if none does.
        config: what it was made from, written into config.json.
    """

    def __init__(
        self,
        counted: Counted,
        *,
        max_seq_len: int,
        order: int | None,
        bos: int | None = None,
        config: Any = None,
    ):
        self.counted, self.max_seq_len, self.order = counted, max_seq_len, order
        self.bos, self.config = bos, config
        self.vocab_size = counted.vocab_size

    def state_specs(self) -> dict[str, StateSpec]:
        order = self.order
        if order is None:
            return {LAYER: {"tokens": StateField("token", (), torch.int32)}}
        return {LAYER: {"tokens": StateField("ring", (), torch.int32, order - 2)}} if order > 2 else {}

    def new_state(self, rows: int, max_tokens: int | None = None) -> ContiguousState:
        """An empty decode state for ``rows`` rows of up to ``max_tokens`` tokens (default: max_seq_len)."""
        return ContiguousState(self.state_specs(), rows, max_tokens or self.max_seq_len, torch.float32)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, state: State | None = None, needs: Iterable[str] = ("logits",)) -> Outputs:
        """Log-probabilities after every token of ``inputs.tokens`` (B, T); zeros on padding.

        Raises:
            UnsupportedError: anything but logits was asked for.
        """
        if unknown := sorted(set(needs) - {"logits"}):
            raise UnsupportedError(f"a counted model has no {', '.join(unknown)}", fix="ask for logits alone")
        ctx = state.begin(inputs) if state is not None else place(inputs)[0]
        keys, tokens = ctx.keys, inputs.tokens
        layer = state.layer(LAYER) if state is not None else None
        if layer is not None:
            keys, held = layer.append(ctx, tokens=tokens)
            tokens = held["tokens"]
        elif state is not None:  # up to order 2 the new tokens are all that is read
            keys = Keys(torch.where(ctx.valid, ctx.slots, -1), ctx.doc_ids)
        logits = torch.zeros(*inputs.tokens.shape, self.vocab_size)
        if bool(ctx.valid.any()):
            logits[ctx.valid.cpu()] = self._log_probs(list(self._contexts(ctx, keys, tokens)))
        return Outputs(logits=logits.to(inputs.tokens.device))

    def score(self, tokens: Array | Sequence[int], offsets: Array | None = None) -> tuple[Array, Array]:
        """ln p of every token but each document's first, and whether it was the most probable one.

        The same as through the logits, without ever holding them; see ``Counted.score``.
        """
        if self.counted.normalised:
            return self.counted.score(tokens, offsets)
        tokens = np.asarray(tokens, np.int64)
        bounds = np.array([0, len(tokens)]) if offsets is None else offsets
        width = len(tokens) if self.order is None else max(self.order - 1, 0)
        contexts = [
            tokens[max(start, at - width) : at]
            for start, stop in zip(bounds, bounds[1:])
            for at in range(start + 1, stop)
        ]
        targets = np.delete(tokens, bounds[:-1][np.diff(bounds) > 0])
        values, hits = np.empty(len(targets)), np.empty(len(targets), bool)
        step = max(1, CHUNK // self.vocab_size)
        for at in range(0, len(targets), step):
            table, target = self.next_log_probs_of(contexts[at : at + step]), targets[at : at + step]
            values[at : at + step] = table[np.arange(len(target)), target]
            hits[at : at + step] = table.argmax(1) == target
        return values, hits

    def next_log_probs_of(self, contexts: Sequence[Array]) -> Array:
        """(n, V) float64: ln p of every token after each context, which sum to one."""
        rows = np.asarray(self.counted.next_log_probs_of(contexts))
        return rows if self.counted.normalised else rows - np.logaddexp.reduce(rows, -1, keepdims=True)

    def _log_probs(self, contexts: Sequence[Array]) -> Tensor:
        out = torch.empty(len(contexts), self.vocab_size)
        step = max(1, CHUNK // self.vocab_size)
        for at in range(0, len(contexts), step):
            out[at : at + step] = torch.from_numpy(self.next_log_probs_of(contexts[at : at + step]))
        return out.clamp(min=LOG_ZERO)

    def _contexts(self, ctx: Context, keys: Keys, tokens: Tensor) -> Iterator[Array]:
        """What is known before the next token, for every valid token, row by row."""
        width = self.order - 1 if self.order is not None else None
        rows = (ctx.slots, ctx.valid, keys.slots, keys.doc_ids, tokens.long())
        for asked, valid, slots, docs, row in zip(*(t.cpu().numpy() for t in rows), strict=True):
            order = np.argsort(slots, kind="stable")
            order = order[slots[order] >= 0]
            if not len(order):
                continue
            text, docs, first = row[order], docs[order], int(slots[order[0]])
            new = np.diff(docs, prepend=docs[0]) != 0
            begins = new if self.bos is None else new | (text == self.bos)
            since = np.maximum.accumulate(np.where(begins, np.arange(len(text)), 0))
            for at in (asked[valid] - first).tolist():  # the slots of a row have no holes
                start = int(since[at]) if width is None else max(int(since[at]), at + 1 - width)
                yield text[start : at + 1]
