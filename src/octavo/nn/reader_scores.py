"""What readers share that set distances themselves: who stands where in its document, and one softmax over all parts.

Such a reader serves rotary positions, or none, in models that read from left to right. It counts positions from
each document's first token; positions given by a caller are not looked at.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.nn.contracts import Context, Keys, full_precision
from octavo.nn.dropout import dropout
from octavo.nn.position import Rotation
from octavo.nn.reader import Reader, Reading
from octavo.nn.state import LayerState, StateField, StateSpec

QUERIES = 256  # so many queries are scored at once, which bounds the memory of long texts


def refuse(ctx: Context, kind: str) -> None:
    """Raise UnsupportedError where distances of the reader's own choice would be wrong."""
    if not ctx.causal:
        raise UnsupportedError(f"the reader {kind} reads from left to right", fix="use it on a causal model")
    if ctx.bias is not None:
        raise UnsupportedError(
            f"the reader {kind} sets distances itself, the model's positions add biases to scores",
            fix="use it on a model with rotary positions, or without any",
        )


def turn(x: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
    """x (B, T, H, K) as it is at ``positions`` (B, T)."""
    return x if rotation is None else rotation.at(positions.clamp(min=0))(x)


def products(q: Tensor, k: Tensor, reading: Reading) -> Tensor:
    """Scaled inner products of q (B, T, H, K) and k (B, S, G, K): (B, H, T, S)."""
    B, T, H, K = q.shape
    G = k.shape[2]
    scores = torch.einsum("btgrk,bsgk->bgrts", q.reshape(B, T, G, H // G, K), k)
    return scores.reshape(B, H, T, k.shape[1]) * (reading.scale or K**-0.5)


def softmax(scores: Tensor, allowed: Tensor, reading: Reading) -> Tensor:
    """Probabilities (B, H, T, S) of scores where ``allowed`` (B, 1 or H, T, S); 0 for a query that may read nothing."""
    if reading.softcap is not None:
        scores = torch.tanh(scores / reading.softcap) * reading.softcap
    scores, S = full_precision(scores), scores.shape[-1]
    empty = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~allowed & ~empty, float("-inf"))
    if reading.sinks is not None:
        B, H, T, _ = scores.shape
        scores = torch.cat([scores, reading.sinks.to(scores.dtype)[:, None, None].expand(B, H, T, 1)], -1)
    return scores.softmax(-1)[..., :S].masked_fill(empty, 0.0)


def weighted(weights: Tensor, v: Tensor, reading: Reading) -> Tensor:
    """The mean of v (B, S, G, K) under weights (B, H, T, S): (B, T, H, K)."""
    B, H, T, S = weights.shape
    G = v.shape[2]
    used = dropout(weights.to(v.dtype), reading.dropout).reshape(B, G, H // G, T, S)
    return torch.einsum("bgrts,bsgk->btgrk", used, v).reshape(B, T, H, v.shape[-1])


def record(ctx: Context, maps: list[Tensor]) -> None:
    """Keep the maps (B, H, T, S) of a layer's parts, if they are asked for; column s is the token of slot s."""
    if "attention" in ctx.record:
        ctx.recorded.setdefault("attention", []).append(torch.cat(maps, 2))


@dataclass
class Places:
    """Where queries and keys stand: slots, and the slot at which each one's document begins.

    Queries (B, T); keys (B, S) in the order of their slots, -1 where there is none.
    """

    slots: Tensor
    begins: Tensor
    keys: Tensor
    key_begins: Tensor
    restarts: bool
    cached: bool

    @classmethod
    def of(cls, ctx: Context, keys: Keys, cached: bool) -> Places:
        """From keys that stand at their slots: a row's own tokens, or all that a state holds."""
        before = torch.cat([torch.full_like(keys.doc_ids[:, :1], -1), keys.doc_ids[:, :-1]], 1)
        first = keys.doc_ids != before
        first[:, 0] = True
        key_begins = torch.where(first, keys.slots, -1).cummax(1).values.clamp(min=0)
        begins = key_begins.gather(1, ctx.slots.clamp(min=0))
        return cls(ctx.slots, begins, keys.slots, key_begins, ctx.restarts, cached)

    @property
    def index(self) -> Tensor:
        """The number of each query in its document, (B, T)."""
        return self.slots - self.begins

    @property
    def key_index(self) -> Tensor:
        """The number of each key in its document, (B, S)."""
        return (self.keys - self.key_begins).clamp(min=0)

    def part(self, queries: slice) -> Places:
        """The same for some of the queries, and the keys that are not later than all of them."""
        slots = self.slots[:, queries]
        # A state may hold more than the row has: it is asked. Without one a token's place is its slot.
        n = int(slots.max()) + 1 if self.cached else min(queries.stop, self.keys.shape[1])
        keys, key_begins = self.keys[:, : max(n, 1)], self.key_begins[:, : max(n, 1)]
        return Places(slots, self.begins[:, queries], keys, key_begins, self.restarts, self.cached)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """How far back each key is, and whether it is an earlier token of the same document: (B, T, S) each."""
        distance = self.slots[:, :, None] - self.keys[:, None, :]
        same = self.key_begins[:, None, :] == self.begins[:, :, None]
        return distance, same & (self.keys >= 0)[:, None, :] & (distance >= 0)


class ScoringReader(Reader):
    """A reader that keeps every token, its key not rotated, and scores pairs of tokens itself."""

    kind: str
    queries = QUERIES

    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        entry = StateField("token", (n_kv_heads, head_dim))
        return dict.fromkeys(self.kept_names, entry)

    kept_names: tuple[str, ...] = ("k", "v")

    def kept(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What is kept of new tokens, (B, T, G, K) each, under ``kept_names``."""
        return {"k": k, "v": v}

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        refuse(ctx, self.kind)
        keys, held = ctx.keys, self.kept(q, k, v)
        if state is not None:
            keys, held = state.append(ctx, **held)
        places = Places.of(ctx, keys, state is not None)
        prepared = self.prepare(held, places, reading)
        outputs, maps = [], []
        for start in range(0, q.shape[1], self.queries):
            some = slice(start, start + self.queries)
            here = places.part(some)
            n = here.keys.shape[1]
            y, weights = self.read_part(
                q[:, some], {name: x[:, :n] for name, x in held.items()}, here, prepared, reading
            )
            outputs.append(y)
            if "attention" in ctx.record:
                maps.append(F.pad(weights, (0, keys.slots.shape[1] - n)))
        record(ctx, maps)
        return torch.cat(outputs, 1)

    def prepare(self, held: dict[str, Tensor], places: Places, reading: Reading) -> Any:
        """What all queries of a pass share."""
        return None

    def pairs(self, n_queries: int, n_keys: int) -> int:
        """Pairs of queries and keys that are scored."""
        stops = [min(start + self.queries, n_queries) for start in range(0, n_queries, self.queries)]
        starts = [0, *stops[:-1]]
        return sum((b - a) * (n_keys - n_queries + b) for a, b in zip(starts, stops, strict=True))

    @abstractmethod
    def read_part(
        self, q: Tensor, held: dict[str, Tensor], places: Places, prepared: Any, reading: Reading
    ) -> tuple[Tensor, Tensor]:
        """Some queries (B, T, H, K) with the keys up to the last of them: their outputs and their map (B, H, T, S)."""
