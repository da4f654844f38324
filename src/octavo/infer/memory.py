"""The decode state of many sequences: blocks of tokens wherever they lie, and one slot each for what does not grow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.infer.pages import zeros
from octavo.nn.contracts import Context, Inputs, Keys
from octavo.nn.state import LayerState, State, StateSpec, append_to_ring, place, ring_marks

MARKS = ("_slots", "_docs")


class Pool:
    """Every field of every layer, for all sequences together.

    A token field is (entries, ...): entry ``table[s // block_size] * block_size + s % block_size`` holds slot s of a
    sequence whose blocks are ``table``. Other fields have one row for each of ``n_slots`` sequences. A memory without a
    length (what an encoder made of a source) is kept as it was written, for each sequence apart.

    Args:
        specs: the model's, by layer.
        n_blocks: beside the scrap block.
        max_tokens: of a sequence; no ring is longer.
        aside: tokens that rings have room for behind the last sequence's, while a step has still to read what they will
            replace.
    """

    def __init__(
        self,
        specs: dict[str, StateSpec],
        *,
        n_blocks: int,
        block_size: int,
        n_slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        aside: int = 0,
    ):
        self.specs = {name: spec for name, spec in specs.items() if spec}
        self.block_size, self.n_slots, self.device = block_size, n_slots, torch.device(device)
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self.memories: dict[tuple[str, str], dict[int, Tensor]] = {}
        for layer, spec in self.specs.items():
            own: dict[str, Tensor] = {}
            for name, field in spec.items():
                if field.kind == "memory" and field.length is None:
                    self.memories[layer, name] = {}
                    continue
                ring = min(field.length or 0, max_tokens) + 1
                leading = {
                    "token": ((n_blocks + 1) * block_size,),
                    "row": (n_slots,),
                    "ring": (n_slots - -aside // ring, ring),
                    "memory": (n_slots, field.length or 0),
                }[field.kind]
                own[name] = zeros(*leading, *field.shape, dtype=field.dtype or dtype, device=self.device)
            self.buffers[layer] = own | ring_marks(spec, n_slots, max_tokens, device)
        fields = [field for spec in self.specs.values() for field in spec.values()]
        self.only_tokens = all(field.kind == "token" for field in fields)
        """Whether all that is known of a text lies in its blocks, so that another may begin with them."""
        self.goes_back = all(field.kind in ("token", "memory") for field in fields)
        """Whether the last tokens of a sequence can be forgotten by counting them out."""
        self._apart = [
            (own, name, self.specs[layer].get(name))
            for layer, own in self.buffers.items()
            for name in own
            if name in MARKS or self.specs[layer][name].kind != "token"
        ]
        self._tokens = [
            own[name]
            for layer, own in self.buffers.items()
            for name, f in self.specs[layer].items()
            if f.kind == "token"
        ]

    def clear(self, slot: int) -> None:
        """What a new sequence finds in ``slot``: nothing."""
        for own, name, _ in self._apart:
            own[name][slot] = -1 if name in MARKS else 0
        for kept in self.memories.values():
            kept.pop(slot, None)

    def copy_block(self, source: int, target: int) -> None:
        size = self.block_size
        for tensor in self._tokens:
            tensor[target * size : (target + 1) * size] = tensor[source * size : (source + 1) * size]

    def copy_slot(self, source: int, target: int) -> None:
        self.load(target, self.save(source))

    def save(self, slot: int) -> list[Tensor | None]:
        """All that a sequence keeps outside its blocks, for ``load``."""
        saved: list[Tensor | None] = [own[name][slot].clone() for own, name, _ in self._apart]
        return saved + [kept.get(slot) for kept in self.memories.values()]

    def load(self, slot: int, saved: Sequence[Tensor | None]) -> None:
        for (own, name, _), tensor in zip(self._apart, saved):
            assert tensor is not None
            own[name][slot] = tensor
        for kept, memory in zip(self.memories.values(), saved[len(self._apart) :], strict=True):
            kept.pop(slot, None)
            if memory is not None:
                kept[slot] = memory

    @property
    def block_bytes(self) -> int:
        return sum(t[: self.block_size].numel() * t.element_size() for t in self._tokens)

    @property
    def slot_bytes(self) -> int:
        """Of what one sequence keeps outside its blocks, memories without a length left out."""
        return sum(own[name][0].numel() * own[name].element_size() for own, name, _ in self._apart)

    @property
    def n_bytes(self) -> int:
        held = sum(t.numel() * t.element_size() for own in self.buffers.values() for t in own.values())
        return held + sum(t.numel() * t.element_size() for kept in self.memories.values() for t in kept.values())

    def view(self, tables: Sequence[Sequence[int]], slots: Sequence[int], lengths: Sequence[int]) -> PagedState:
        """The state of some sequences for one pass: their blocks, which must have room, slots and tokens held."""
        return PagedState(self, tables, slots, lengths)


def bytes_of(specs: dict[str, StateSpec], dtype: torch.dtype, max_tokens: int, n_memory: int = 0) -> tuple[int, int]:
    """Bytes of one token in blocks, and of one slot for what does not grow with the tokens."""
    fields = [field for spec in specs.values() for field in spec.values()]
    token = sum(prod(f.shape) * (f.dtype or dtype).itemsize for f in fields if f.kind == "token")
    return token, sum(f.n_bytes(max_tokens, dtype, n_memory) for f in fields if f.kind != "token")


def kind_of(model: Any) -> tuple[torch.dtype, torch.device]:
    """Number format and device of the state that a model makes for itself."""
    state = model.new_state(1, 1)
    for layer, spec in model.state_specs().items():
        for name, field in spec.items():
            if field.dtype is None and field.kind != "memory":
                return state.layers[layer].buffers[name].dtype, state.lengths.device
    return torch.float32, state.lengths.device


def free_bytes(device: torch.device) -> int:
    """Memory that can be had, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # another system than Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class PagedState(State):
    """Some sequences of a pool as a batch; one document each. Equal to ``ContiguousState`` bit for bit."""

    def __init__(
        self, pool: Pool, tables: Sequence[Sequence[int]], slots: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self.pool = pool
        device = pool.device
        self.lengths = torch.tensor(lengths, device=device)
        self.last_doc = torch.where(self.lengths > 0, 0, -1)
        self.slots, self.places = torch.tensor(slots, device=device), slots
        widest = max(map(len, tables), default=0)
        self.tables = torch.tensor([[*t, *[0] * (widest - len(t))] for t in tables], device=device).long()
        self.tables = self.tables.view(len(tables), widest)
        self.used = max(lengths, default=0)  # the longest, known without asking the device
        self.entries = self.written = torch.empty(0, dtype=torch.long, device=device)
        self.layers = {name: _PagedLayer(self, name) for name in pool.specs}

    def begin(self, inputs: Inputs) -> Context:
        if inputs.doc_ids is not None:
            raise UnsupportedError("a sequence of the engine is one document", fix="give each document a sequence")
        ctx, self.lengths, self.last_doc, _ = place(inputs, self.lengths, self.last_doc, torch.zeros_like(self.lengths))
        size, tables = self.pool.block_size, self.tables
        self.used += inputs.tokens.shape[1]
        if inputs.valid is not None:
            self.used = int(self.lengths.max())
        if tables.shape[1]:
            blocks = tables.gather(1, (ctx.slots.clamp(min=0) // size).clamp(max=tables.shape[1] - 1))
            self.written = torch.where(ctx.valid, blocks * size + ctx.slots % size, 0)
            order = torch.arange(self.used, device=tables.device)
            self.entries = tables[:, order // size] * size + order % size
            filled = torch.where(order < self.lengths[:, None], order, -1)
            ctx.keys = Keys(filled, torch.zeros_like(filled))
        return ctx

    def layer(self, name: str) -> LayerState | None:
        return self.layers.get(name)

    def snapshot(self) -> object:
        kept = [self.pool.save(slot) for slot in self.slots.tolist()]
        return self.lengths.clone(), self.last_doc.clone(), self.used, kept

    def restore(self, snapshot: object) -> None:
        self.lengths, self.last_doc, self.used, kept = snapshot  # type: ignore[misc]
        for slot, saved in zip(self.slots.tolist(), kept, strict=True):
            self.pool.load(slot, saved)

    def truncate(self, lengths: Tensor) -> bool:
        if not self.pool.goes_back and bool((lengths < self.lengths).any()):
            return False
        self.lengths = torch.minimum(self.lengths, lengths)
        self.last_doc = torch.where(self.lengths > 0, 0, -1)
        self.used = int(self.lengths.max())
        return True

    @property
    def n_bytes(self) -> int:
        return self.payload_bytes

    @property
    def payload_bytes(self) -> int:
        return self.pool.block_bytes * self.tables.numel() + self.pool.slot_bytes * len(self.slots)


class NextTokens(PagedState):
    """Some sequences of a pool, each for one more token: told in tensors alone, so that one compiled pass serves all.

    It reads as many entries as its tables have, and masks those that hold nothing.
    """

    def __init__(self, pool: Pool, lengths: Tensor, slots: Tensor, tables: Tensor) -> None:
        self.pool, self.lengths, self.slots, self.tables = pool, lengths, slots, tables
        self.places = ()
        self.last_doc = torch.where(lengths > 0, 0, -1)
        self.layers = {name: _PagedLayer(self, name) for name in pool.specs}

    def begin(self, inputs: Inputs) -> Context:
        ctx, self.lengths, self.last_doc, _ = place(inputs, self.lengths, self.last_doc, torch.zeros_like(self.lengths))
        if not self.pool._tokens:
            return ctx
        size, tables = self.pool.block_size, self.tables
        self.written = tables.gather(1, ctx.slots // size) * size + ctx.slots % size
        order = torch.arange(tables.shape[1] * size, device=tables.device)
        self.entries = tables[:, order // size] * size + order % size
        filled = torch.where(order < self.lengths[:, None], order, -1)
        ctx.keys = Keys(filled, torch.zeros_like(filled))
        return ctx


class _PagedLayer(LayerState):
    def __init__(self, owner: PagedState, name: str):
        self.owner, self.name, self.spec = owner, name, owner.pool.specs[name]
        self.buffers = owner.pool.buffers[name]

    def append(self, ctx: Context, **new: Tensor) -> tuple[Keys, dict[str, Tensor]]:
        owner = self.owner
        if {self.spec[name].kind for name in new} == {"ring"}:
            return append_to_ring(self.buffers, owner.slots[:, None], ctx, owner.lengths, new)
        held = {}
        for name, value in new.items():
            buffer = self.buffers[name]
            buffer[owner.written] = value.to(buffer.dtype)
            held[name] = buffer[owner.entries]
        return ctx.keys, held

    def read(self, name: str) -> Tensor:
        if (kept := self.owner.pool.memories.get((self.name, name))) is None:
            return self.buffers[name].index_select(0, self.owner.slots)
        slots = self.owner.slots.tolist()
        field, known = self.spec[name], next(iter(kept.values()), None)
        longest = max((len(kept[slot]) for slot in slots if slot in kept), default=0)
        dtype = known.dtype if known is not None else field.dtype or torch.float32
        memory = torch.zeros(len(slots), longest, *field.shape, dtype=dtype, device=self.owner.pool.device)
        for row, slot in enumerate(slots):
            if slot in kept:
                memory[row, : len(kept[slot])] = kept[slot]
        return memory

    def write(self, **new: Tensor) -> None:
        for name, value in new.items():
            kept = self.owner.pool.memories.get((self.name, name))
            if kept is None:
                if len(self.owner.places) == 1:  # a plain copy, where an index would go number by number
                    self.buffers[name][self.owner.places[0]] = value[0]
                else:
                    self.buffers[name][self.owner.slots] = value.to(self.buffers[name].dtype)
                continue
            for slot, row in zip(self.owner.slots.tolist(), value.detach(), strict=True):
                kept[slot] = row.to(self.spec[name].dtype or row.dtype).clone()
