"""Decode state: described by the mixer, owned by the caller.

``StateField`` says what one field is; ``State`` is what a caller holds for a batch of rows and what it can
do with it (snapshot, restore, truncate, count bytes); ``LayerState`` is the slice that one mixer sees.
``ContiguousState`` keeps every field in one buffer per row; a paged engine implements the same two classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from octavo.errors import ResourceError
from octavo.nn.contracts import Context, Inputs, Keys


@dataclass(frozen=True)
class StateField:
    """One named field of a mixer's state.

    kind: ``token`` grows by one entry a token; ``ring`` keeps the last ``length`` tokens; ``row`` is fixed
    per row; ``memory`` is filled once (an encoder's keys). shape: of one entry, without row and token axes.
    dtype: None means the model's compute dtype. length: entries of a ring or memory; a memory without one has none
    until it is written, and then as many as were written.
    """

    kind: Literal["token", "ring", "row", "memory"]
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    length: int | None = None

    def n_bytes(self, max_tokens: int, dtype: torch.dtype, n_memory: int = 0) -> int:
        """Bytes of one row of this field when up to ``max_tokens`` tokens are held, and ``n_memory`` of a source."""
        length = self.length or (n_memory if self.kind == "memory" else 0)
        entries = {"token": max_tokens, "row": 1, "ring": min(length, max_tokens)}.get(self.kind, length)
        return entries * prod(self.shape) * (self.dtype or dtype).itemsize


StateSpec = dict[str, StateField]


def recurrence_field(shape: tuple[int, ...], weight: Tensor) -> StateField:
    """A row field for a sum over the past: float32 where ``weight`` has 16 bits, else of the model's dtype."""
    return StateField("row", shape, torch.float32 if weight.dtype.itemsize < 4 else None)


class LayerState(ABC):
    """One mixer's slice of the state, for the duration of a forward pass."""

    @abstractmethod
    def append(self, ctx: Context, **new: Tensor) -> tuple[Keys, dict[str, Tensor]]:
        """Store the valid tokens of (B, T, ...) tensors; returns everything readable now, (B, S, ...), and its Keys."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A row or memory field, (B, ...)."""

    @abstractmethod
    def write(self, **new: Tensor) -> None:
        """Replace row or memory fields."""


class State(ABC):
    """The decode state of a batch of rows. ``lengths`` (B,) counts the valid tokens each row has seen."""

    lengths: Tensor

    @abstractmethod
    def begin(self, inputs: Inputs) -> Context:
        """Place the new tokens and build the context of this forward pass."""

    @abstractmethod
    def layer(self, name: str) -> LayerState | None:
        """The slice of the mixer called ``name``; None if it keeps nothing."""

    @abstractmethod
    def snapshot(self) -> object:
        """A copy that ``restore`` can go back to."""

    @abstractmethod
    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this state."""

    @abstractmethod
    def truncate(self, lengths: Tensor) -> bool:
        """Forget tokens beyond ``lengths`` (B,). False, and no change, where a field cannot go back."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes held."""

    @property
    @abstractmethod
    def payload_bytes(self) -> int:
        """Bytes of the fields the specs describe, at full capacity: ``n_bytes`` without what keeping them costs."""


def place(
    inputs: Inputs, lengths: Tensor | None = None, last_doc: Tensor | None = None, doc_start: Tensor | None = None
) -> tuple[Context, Tensor, Tensor, Tensor]:
    """Slots, positions and document starts of new tokens, given what each row has seen.

    Returns the context (its keys are the new tokens alone) and the carried values after these tokens:
    lengths, last document id and the slot at which that document began, each (B,).
    """
    tokens = inputs.tokens
    B, T = tokens.shape
    device = tokens.device
    plain = inputs.valid is None and inputs.doc_ids is None and inputs.positions is None and lengths is None
    valid = inputs.valid if inputs.valid is not None else torch.ones(B, T, dtype=torch.bool, device=device)
    doc_ids = inputs.doc_ids if inputs.doc_ids is not None else torch.zeros(B, T, dtype=torch.long, device=device)
    fresh = lengths is None
    if lengths is None or last_doc is None or doc_start is None:
        lengths = torch.zeros(B, dtype=torch.long, device=device)
        last_doc, doc_start = torch.full_like(lengths, -1), torch.zeros_like(lengths)
    order = torch.arange(T, device=device)
    slots = lengths[:, None] + valid.cumsum(1) - 1

    # The last valid token at or before each one, so that padding anywhere is invisible to its neighbours.
    latest = torch.where(valid, order, -1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    previous_doc = torch.where(before >= 0, doc_ids.gather(1, before.clamp(min=0)), last_doc[:, None])
    starts = valid & (doc_ids != previous_doc)

    begin = torch.where(starts, slots, -1).cummax(1).values
    begin = torch.where(begin >= 0, begin, doc_start[:, None])
    positions = inputs.positions if inputs.positions is not None else (slots - begin).clamp(min=0)
    seen = latest[:, -1:] >= 0
    last = torch.where(seen, doc_ids.gather(1, latest[:, -1:].clamp(min=0)), last_doc[:, None])[:, 0]
    keys = Keys(torch.where(valid, slots, -1), doc_ids)
    restarts = inputs.doc_ids is not None or not fresh
    ctx = Context(positions, slots, doc_ids, valid, starts, plain and fresh, keys, restarts)
    return ctx, lengths + valid.sum(1), last, begin[:, -1]


def _full(max_tokens: int, needed: int) -> ResourceError:
    return ResourceError(
        f"the decode state holds {max_tokens} tokens a row, {needed} are needed",
        fix="ask for a state with more tokens, or start a new one",
    )


def ring_marks(spec: StateSpec, rows: int, max_tokens: int, device: torch.device | str) -> dict[str, Tensor]:
    """Which slot each entry of a mixer's rings holds, and its document; nothing where it has no ring."""
    lengths = {field.length or 0 for field in spec.values() if field.kind == "ring"}
    if not lengths:
        return {}
    (length,) = lengths
    marks = torch.full((rows, min(length, max_tokens) + 1), -1, dtype=torch.long, device=device)
    return {"_slots": marks, "_docs": marks.clone()}


def append_to_ring(
    buffers: dict[str, Tensor], rows: Tensor, ctx: Context, lengths: Tensor, new: dict[str, Tensor]
) -> tuple[Keys, dict[str, Tensor]]:
    """Store new tokens (B, T, ...) in the rings of ``rows`` (B, 1) of ``buffers``: what ``LayerState.append`` gives.

    lengths (B,): tokens each row has seen, these included. The last entry of a ring takes what is not kept.
    """
    length = buffers["_slots"].shape[1] - 1
    everything = torch.arange(length, device=rows.device)
    old = {name: buffers[name][rows, everything] for name in (*new, "_slots", "_docs")}
    slots = torch.cat([old["_slots"], torch.where(ctx.valid, ctx.slots, -1)], 1)
    keys = Keys(slots, torch.cat([old["_docs"], ctx.doc_ids], 1))
    out = {name: torch.cat([old[name], value.to(old[name].dtype)], 1) for name, value in new.items()}
    # Of more new tokens than the ring holds only the last may be written: two writes to one entry have no order.
    last = lengths[:, None] - length
    target = torch.where(ctx.valid & (ctx.slots >= last), ctx.slots % max(length, 1), length)
    for name, value in [*new.items(), ("_slots", ctx.slots), ("_docs", ctx.doc_ids)]:
        buffers[name][rows, target] = value.to(buffers[name].dtype)
    return keys, out


class ContiguousState(State):
    """Every field in one buffer: (B, max_tokens + 1, ...) for tokens, (B, length + 1, ...) for rings.

    The extra entry at the end takes what must not be kept (padding), so that writing needs no branch.
    """

    def __init__(
        self,
        specs: dict[str, StateSpec],
        rows: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        self.max_tokens = max_tokens
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.last_doc = torch.full_like(self.lengths, -1)
        self.doc_start = torch.zeros_like(self.lengths)
        self.doc_ids = torch.full((rows, max_tokens + 1), -1, dtype=torch.long, device=device)
        self.used = 0  # an upper bound of lengths, known without asking the device
        self.layers = {n: _ContiguousLayer(self, spec, rows, dtype, device) for n, spec in specs.items() if spec}

    def begin(self, inputs: Inputs) -> Context:
        T = inputs.tokens.shape[1]
        if self.used + T > self.max_tokens:  # the bound counts padding too: only now ask for the real lengths
            added = T if inputs.valid is None else inputs.valid.sum(1)
            self.used, needed = int(self.lengths.max()), int((self.lengths + added).max())
            if needed > self.max_tokens:
                raise _full(self.max_tokens, needed)
        ctx, self.lengths, self.last_doc, self.doc_start = place(inputs, self.lengths, self.last_doc, self.doc_start)
        self.used = min(self.used + T, self.max_tokens)
        slots = torch.where(ctx.valid, ctx.slots, self.max_tokens)
        self.doc_ids.scatter_(1, slots, ctx.doc_ids)
        place_of = torch.arange(self.used, device=slots.device)
        filled = torch.where(place_of < self.lengths[:, None], place_of, -1)
        ctx.keys = Keys(filled, self.doc_ids[:, : self.used])
        return ctx

    def advance(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for one more token of the last document of each of ``rows`` (M,), each at most once.

        Returns the slots to write to and the first slots that may be read, (M,) each. What ``begin`` does for
        the one case that decoding is made of; whoever asks writes the fields itself.
        """
        if self.used >= self.max_tokens:
            self.used = int(self.lengths.max())
            if bool((self.lengths[rows] >= self.max_tokens).any()):
                raise _full(self.max_tokens, self.used + 1)
        slots, docs = self.lengths[rows], self.last_doc[rows].clamp(min=0)
        self.doc_ids[rows, slots] = docs
        self.last_doc = self.last_doc.index_copy(0, rows, docs)
        self.lengths = self.lengths.index_add(0, rows, torch.ones_like(rows))
        self.used = min(self.used + 1, self.max_tokens)
        return slots, self.doc_start[rows]

    def layer(self, name: str) -> LayerState | None:
        return self.layers.get(name)

    def _tensors(self) -> dict[str, Tensor]:
        own = {"lengths": self.lengths, "last_doc": self.last_doc, "doc_start": self.doc_start, "doc_ids": self.doc_ids}
        return own | {f"{n}.{f}": t for n, layer in self.layers.items() for f, t in layer.buffers.items()}

    def snapshot(self) -> object:
        return self.used, {name: tensor.clone() for name, tensor in self._tensors().items()}

    def restore(self, snapshot: object) -> None:
        self.used, saved = snapshot  # type: ignore[misc]
        for name, layer in self.layers.items():
            for field in layer.spec:  # a memory may have been filled since, or have another length now
                if layer.spec[field].kind == "memory":
                    layer.buffers[field] = saved[f"{name}.{field}"].clone()
        for name, tensor in self._tensors().items():
            tensor.copy_(saved[name])

    def truncate(self, lengths: Tensor) -> bool:
        fields = [field for layer in self.layers.values() for field in layer.spec.values()]
        if any(field.kind in ("row", "ring") for field in fields) and bool((lengths < self.lengths).any()):
            return False
        self.lengths = torch.minimum(self.lengths, lengths)
        self.used = int(self.lengths.max())
        self.last_doc = self.doc_ids.gather(1, (self.lengths - 1).clamp(min=0)[:, None])[:, 0]
        self.last_doc = torch.where(self.lengths > 0, self.last_doc, -1)
        same = (self.doc_ids[:, : self.max_tokens] == self.last_doc[:, None]) & (
            torch.arange(self.max_tokens, device=lengths.device) < self.lengths[:, None]
        )
        self.doc_start = torch.where(self.lengths > 0, same.int().argmax(1), 0)
        return True

    def select(self, rows: Tensor) -> None:
        """Keep (or copy) the rows given by index (B',), in that order."""
        self.lengths, self.last_doc = self.lengths[rows], self.last_doc[rows]
        self.doc_start, self.doc_ids = self.doc_start[rows], self.doc_ids[rows]
        for layer in self.layers.values():
            layer.buffers = {name: tensor[rows] for name, tensor in layer.buffers.items()}

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers.values() for t in layer.buffers.values())

    @property
    def payload_bytes(self) -> int:
        total = 0
        for layer in self.layers.values():
            for name, field in layer.spec.items():
                kept = layer.buffers[name]
                kept = kept[:, :-1] if field.kind in ("token", "ring") else kept  # without the spare entry
                total += kept.numel() * kept.element_size()
        return total


class _ContiguousLayer(LayerState):
    def __init__(
        self, owner: ContiguousState, spec: StateSpec, rows: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.owner, self.spec = owner, spec
        self.buffers: dict[str, Tensor] = {}
        for name, field in spec.items():
            entries = {"token": (owner.max_tokens + 1,), "row": ()}.get(field.kind)
            if entries is None:
                # A ring that is longer than the row can become would only be kept empty.
                length = field.length or 0
                entries = (min(length, owner.max_tokens) + 1,) if field.kind == "ring" else (length,)
            shape = (rows, *entries, *field.shape)
            self.buffers[name] = torch.zeros(shape, dtype=field.dtype or dtype, device=device)
        self.buffers |= ring_marks(spec, rows, owner.max_tokens, device)

    def append(self, ctx: Context, **new: Tensor) -> tuple[Keys, dict[str, Tensor]]:
        kinds = {self.spec[name].kind for name in new}
        rows = torch.arange(ctx.slots.shape[0], device=ctx.slots.device)[:, None]
        if kinds == {"ring"}:
            return append_to_ring(self.buffers, rows, ctx, self.owner.lengths, new)
        slots = torch.where(ctx.valid, ctx.slots, self.owner.max_tokens)
        for name, value in new.items():
            self.buffers[name][rows, slots] = value.to(self.buffers[name].dtype)
        return ctx.keys, {name: self.buffers[name][:, : self.owner.used] for name in new}

    def read(self, name: str) -> Tensor:
        return self.buffers[name]

    def write(self, **new: Tensor) -> None:
        for name, value in new.items():
            if self.spec[name].kind == "memory" and self.spec[name].length is None:
                self.buffers[name] = value.detach().to(self.buffers[name].dtype)
            else:
                self.buffers[name].copy_(value)
