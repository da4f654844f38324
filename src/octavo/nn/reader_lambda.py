"""The lambda-shaped window: a document's first tokens and its last ones, in a cache of constant size."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.nn.contracts import Capabilities, Context
from octavo.nn.reader import Reader, Reading
from octavo.nn.reader_scores import QUERIES, products, record, refuse, softmax, turn, weighted
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


class LambdaReader(Reader):
    """``softmax over {first n_sinks tokens of the document} and {last window tokens}``.

    Without its first tokens, onto which heads put what they do not need, a window's perplexity breaks down as soon
    as they leave it. Distances within the window are the real ones; those to the first tokens never exceed what the
    cache holds: with ``positions`` cache, token i stands at place i of the n_sinks + window places of the cache and
    the newest token at its end (Xiao et al. 2023, StreamingLLM, section 3.2); with ``capped``, distances end at
    ``limit`` (Han et al. 2023, LM-Infinite, section 3). Keys are kept as they were before rotation. The window
    counts the token itself, which StreamingLLM's cache comes on top of; LM-Infinite's top-k tokens in the middle,
    an option there, are the reader ``external_memory``. Positions stay small however long the text gets: in fp32,
    angles of positions of millions would be wrong.
    """

    kind = "lambda"
    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["lambda"] = "lambda"
        n_sinks: int = Field(default=4, ge=1, description="first tokens of a document that stay")
        window: int = Field(default=128, ge=1, description="last tokens, itself included")
        positions: Literal["cache", "capped"] = "cache"
        limit: int | None = Field(default=None, ge=1, description="of capped distances; default: window")

    def __init__(self, config: LambdaReader.Config, max_seq_len: int | None = None):
        self.config, self.width, self.n_sinks = config, config.window, config.n_sinks
        self.limit = config.limit or config.window

    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        last = StateField("ring", (n_kv_heads, head_dim), length=self.width)
        first = StateField("row", (self.n_sinks, n_kv_heads, head_dim))
        return {"k": last, "v": last, "sink_k": first, "sink_v": first, "begin": StateField("row", (), torch.long)}

    def flops(self, n_queries: int, n_keys: int, n_heads: int, n_kv_heads: int, head_dim: int) -> int:
        sinks, total = min(self.n_sinks, n_keys), 0
        for start in range(0, n_queries, QUERIES):
            stop = min(start + QUERIES, n_queries)
            recent = stop - max(0, start - self.width + 1)
            total += (stop - start) * (recent * 3 + sinks * (2 if self.config.positions == "cache" else 3))
        return 2 * total * n_heads * head_dim

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        refuse(ctx, self.kind)
        held = state.read("begin").clone() if state is not None else torch.zeros_like(ctx.slots[:, 0])
        begins = torch.where(ctx.starts, ctx.slots, -1).cummax(1).values
        begins = torch.where(begins >= 0, begins, held[:, None])
        sinks = self._sinks(k, v, ctx, state, begins, held)
        slots, recent = torch.where(ctx.valid, ctx.slots, -1), {"k": k, "v": v}
        key_begins = begins
        if state is not None:
            keys, recent = state.append(ctx, k=k, v=v)
            slots = keys.slots
            self._keep(k, v, ctx, state, begins, held)
        n_old = slots.shape[1] - q.shape[1]
        if n_old:
            key_begins = torch.cat([held[:, None].expand(-1, n_old), begins], 1)
        index = (slots - key_begins).clamp(min=0)
        age = index // self.width
        near = turn(recent["k"], index - self.width * (age - 1).clamp(min=0), reading.rotation)
        older = turn(recent["k"], index % self.width, reading.rotation)
        outputs, maps = [], []
        for start in range(0, q.shape[1], QUERIES):
            some = slice(start, start + QUERIES)
            first = 0 if start < self.width else n_old + start - self.width + 1
            columns = slice(first, n_old + min(start + QUERIES, q.shape[1]))
            at, begin = ctx.slots[:, some, None], begins[:, some, None]
            distance = at - slots[:, None, columns]
            allowed = (slots[:, None, columns] >= begin) & (distance >= 0) & (distance < self.width)
            p = at - begin
            same = (age[:, None, columns] == p // self.width)[:, None]
            here = turn(q[:, some], (p - self.width * (p // self.width - 1).clamp(min=0))[..., 0], reading.rotation)
            scores = torch.where(
                same, products(here, near[:, columns], reading), products(here, older[:, columns], reading)
            )
            far, far_allowed = self._far(q[:, some], p[..., 0], at, begin, sinks, reading)
            allowed = torch.cat([far_allowed, allowed], -1)[:, None]
            weights = softmax(torch.cat([far, scores], -1), allowed, reading)
            outputs.append(weighted(weights, torch.cat([sinks["v"], recent["v"][:, columns]], 1), reading))
            if "attention" in ctx.record:
                width = q.shape[1] if state is None else int(ctx.slots.max()) + 1
                places = torch.cat([sinks["slots"], slots[:, columns]], 1).clamp(min=0)[:, None, None]
                full = torch.zeros(*weights.shape[:3], width, dtype=weights.dtype, device=weights.device)
                maps.append(full.scatter_add(-1, places.expand_as(weights), weights))
        record(ctx, maps)
        return torch.cat(outputs, 1)

    def _sinks(
        self, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, begins: Tensor, held: Tensor
    ) -> dict[str, Tensor]:
        """Every first token that a query of this pass may read: k, v (B, F, G, K), slots and begins (B, F)."""
        first = ctx.valid & (ctx.slots - begins < self.n_sinks)
        n = k.shape[1] if state is None and ctx.restarts else min(self.n_sinks, k.shape[1])
        columns = torch.arange(n, device=k.device) if state is None else first.any(0).nonzero()[:, 0]
        slots = torch.where(first, ctx.slots, -1)[:, columns]
        found = {"k": k[:, columns], "v": v[:, columns], "slots": slots, "begins": begins[:, columns]}
        if state is None:
            return found
        places = held[:, None] + torch.arange(self.n_sinks, device=k.device)
        places = torch.where(places < _seen(ctx)[:, None], places, -1)
        own = {"k": state.read("sink_k"), "v": state.read("sink_v"), "slots": places}
        own["begins"] = held[:, None].expand_as(places)
        return {name: torch.cat([own[name], found[name]], 1) for name in found}

    def _far(
        self, q: Tensor, p: Tensor, at: Tensor, begin: Tensor, sinks: dict[str, Tensor], reading: Reading
    ) -> tuple[Tensor, Tensor]:
        """Scores of q (B, T, H, K), its number in the document p (B, T), and first tokens, and which count here."""
        slots, rotation = sinks["slots"][:, None], reading.rotation
        places = (sinks["slots"] - sinks["begins"]).clamp(min=0)
        allowed = (slots >= 0) & (sinks["begins"][:, None] == begin) & (at - slots >= self.width)
        if self.config.positions == "cache":
            end = self.n_sinks + self.width - 1
            return products(turn(q, p.clamp(max=end), rotation), turn(sinks["k"], places, rotation), reading), allowed
        true = products(
            turn(q, p.clamp(max=self.limit + self.n_sinks), rotation), turn(sinks["k"], places, rotation), reading
        )
        edge = turn(q, torch.full_like(p, self.limit), rotation)
        capped = products(edge, turn(sinks["k"], torch.zeros_like(places), rotation), reading)
        return torch.where((at - slots <= self.limit)[:, None], true, capped), allowed

    def _keep(self, k: Tensor, v: Tensor, ctx: Context, state: LayerState, begins: Tensor, held: Tensor) -> None:
        """Store the first tokens of the document that the next token may belong to."""
        n = ctx.valid.sum(1)
        last = (n - 1).clamp(min=0)[:, None]
        begin = torch.where(n > 0, begins.gather(1, last)[:, 0], held)
        column = begin[:, None] + torch.arange(self.n_sinks, device=k.device) - _seen(ctx)[:, None]
        new = ((column >= 0) & (column < n[:, None]))[:, :, None, None]
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        column = column.clamp(0, k.shape[1] - 1)
        kept = {name: state.read(name) for name in ("sink_k", "sink_v")}
        state.write(
            sink_k=torch.where(new, k[rows, column].to(kept["sink_k"].dtype), kept["sink_k"]),
            sink_v=torch.where(new, v[rows, column].to(kept["sink_v"].dtype), kept["sink_v"]),
            begin=begin,
        )


def _seen(ctx: Context) -> Tensor:
    """How many tokens each row had before this pass, (B,)."""
    return ctx.slots[:, 0] + (~ctx.valid[:, 0]).long()
