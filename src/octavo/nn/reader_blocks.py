"""Readers that choose among blocks of earlier text by one vector a block: LongHeads and InfLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from octavo.nn.contracts import Capabilities, full_precision
from octavo.nn.dropout import dropout
from octavo.nn.reader import Reading
from octavo.nn.reader_scores import Places, ScoringReader, products, softmax, turn, weighted
from octavo.schema import Config


@dataclass
class Blocks:
    """The keys of each row in blocks of ``length`` tokens that begin after a document's first ``skip`` tokens.

    of_key (B, S): each key's block, numbered along the row, -1 for what stands before. For C blocks: columns (B, C,
    length), where their tokens are among the keys; inside (B, C, length), whether there is one; number (B, C) in the
    document, -1 where there is no block; begins (B, C), where that document begins.
    """

    of_key: Tensor
    columns: Tensor
    inside: Tensor
    number: Tensor
    begins: Tensor

    @classmethod
    def of(cls, places: Places, length: int, skip: int = 0) -> Blocks:
        index = places.key_index - skip
        B, S = index.shape
        held = (places.keys >= 0) & (index >= 0)
        first = held & (index % length == 0)
        of_key = torch.where(held, first.cumsum(1) - 1, -1)
        # One document a row has no more blocks than this; of several, the row has to be asked.
        C = max(1, int(of_key.max()) + 1 if places.restarts else n_blocks(S, length, skip))
        order = torch.arange(S, device=index.device).expand(B, S)
        start = torch.full((B, C + 1), -1, device=index.device)
        start = start.scatter(1, torch.where(first, of_key, C), order)[:, :C]
        there, at = start >= 0, start.clamp(min=0)
        columns = at[:, :, None] + torch.arange(length, device=index.device)
        among = columns.clamp(max=S - 1)
        same = of_key.gather(1, among.flatten(1)).view_as(columns) == torch.arange(C, device=index.device)[:, None]
        number = torch.where(there, index.gather(1, at) // length, -1)
        return cls(of_key, among, same & (columns < S), number, places.key_begins.gather(1, at))

    def take(self, x: Tensor) -> Tensor:
        """x (B, S, ...) block by block: (B, C, length, ...)."""
        return x[torch.arange(x.shape[0], device=x.device)[:, None, None], self.columns]

    def to_keys(self, of_blocks: Tensor, n_keys: int) -> Tensor:
        """What holds for blocks (B, H, T, C) as it holds for keys, (B, H, T, n_keys); False outside of blocks."""
        of_key = self.of_key[:, :n_keys]
        index = of_key.clamp(min=0)[:, None, None].expand(*of_blocks.shape[:3], -1)
        return of_blocks.gather(-1, index) & (of_key >= 0)[:, None, None]

    def of_document(self, places: Places) -> Tensor:
        """Which blocks belong to each query's document, (B, T, C)."""
        return (self.begins[:, None] == places.begins[:, :, None]) & (self.number >= 0)[:, None]


def n_blocks(n_keys: int, length: int, skip: int = 0) -> int:
    """Blocks of one document of ``n_keys`` tokens; room for one at least."""
    return max(1, -(-max(n_keys - skip, 0) // length))


def group_mean(q: Tensor, n_kv_heads: int) -> Tensor:
    """The mean query of the heads that share a key: (B, T, H, K) to (B, T, G, K)."""
    B, T, H, K = q.shape
    return q.view(B, T, n_kv_heads, H // n_kv_heads, K).mean(3)


class LongHeadsReader(ScoringReader):
    """``softmax over the n_chunks chunks that a head chooses, positions counted along them``.

    A document is cut into chunks. Each head of each token reads the first chunk, the last ``recent`` ones (the
    token's own is the last) and, of the others, those with the largest inner product of its query, not rotated, and
    the chunk's vector. The chosen chunks, in their order, are read at positions 0, 1, 2, ..., so that no position
    exceeds n_chunks * chunk. A chunk's vector: attention inside it, the mean of its outputs as a query over its keys
    (rotated within the chunk), the mean of the keys under those weights. Where all chunks are chosen this is full
    attention. Source: Lu et al. 2024 (LongHeads), sections 2.1 and 2.2, and its code. There every query head has its
    own chunk vector; here heads that share a key share it, made with the mean of their queries. Vectors are made anew
    in each pass from the keys, values and queries that are kept.
    """

    kind = "longheads"
    capabilities = Capabilities(compilable=False)  # packed rows are asked how many chunks they have
    kept_names = ("k", "v", "q")
    queries = 64  # keys are gathered for each query

    class Config(Config):
        kind: Literal["longheads"] = "longheads"
        chunk: int = Field(default=32, ge=1, description="tokens of a chunk")
        n_chunks: int | None = Field(default=8, ge=2, description="chunks a head reads; null: all")
        recent: int = Field(default=2, ge=1, description="last chunks that every head reads, its own included")

        @model_validator(mode="after")
        def _room(self) -> LongHeadsReader.Config:
            if self.n_chunks is not None and self.n_chunks <= self.recent:
                raise ValueError(
                    f"n_chunks = {self.n_chunks} must exceed recent = {self.recent}: the first is read too"
                )
            return self

    def __init__(self, config: LongHeadsReader.Config, max_seq_len: int | None = None):
        self.config, self.length = config, config.chunk

    def flops(self, n_queries: int, n_keys: int, n_heads: int, n_kv_heads: int, head_dim: int) -> int:
        C = n_blocks(n_keys, self.length)
        chosen = min(self.config.n_chunks or C, C) * self.length
        vectors = C * n_kv_heads * head_dim * (2 * self.length**2 + 2 * self.length)
        return 2 * (n_queries * n_heads * head_dim * (C + 2 * chosen) + vectors)

    def apart(self, n_tokens: int) -> int:
        return 0 if self.config.n_chunks is None else max(0, n_tokens - self.config.n_chunks * self.length)

    def kept(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"k": k, "v": v, "q": group_mean(q, k.shape[2])}

    def prepare(self, held: dict[str, Tensor], places: Places, reading: Reading) -> tuple[Blocks, Tensor, Tensor]:
        blocks, place = Blocks.of(places, self.length), places.key_index % self.length
        k = turn(held["k"], place, reading.rotation)
        return blocks, k, self._vectors(turn(held["q"], place, reading.rotation), k, held["v"], blocks, reading)

    def _vectors(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, reading: Reading) -> Tensor:
        """The vector of each chunk, (B, C, G, K), from its own queries and keys."""
        q, k, v = blocks.take(q), blocks.take(k), blocks.take(v)
        scale, nothing = reading.scale or q.shape[-1] ** -0.5, torch.finfo(q.dtype).min
        scores = torch.einsum("bctgk,bcsgk->bcgts", q, k) * scale
        weights = scores.masked_fill(~blocks.inside[:, :, None, None], nothing).softmax(-1)
        inside = torch.einsum("bcgts,bcsgk->bctgk", weights, v) * blocks.inside[:, :, :, None, None].to(v.dtype)
        mean = inside.sum(2) / blocks.inside.sum(2).clamp(min=1).to(v.dtype)[:, :, None, None]
        scores = torch.einsum("bcgk,bcsgk->bcgs", mean, k) * scale
        weights = scores.masked_fill(~blocks.inside[:, :, None], nothing).softmax(-1)
        return torch.einsum("bcgs,bcsgk->bcgk", weights, k)

    def choose(self, q: Tensor, places: Places, blocks: Blocks, vectors: Tensor, reading: Reading) -> Tensor:
        """The chunks each head of each query reads, in their order, -1 where there are no more: (B, H, T, n)."""
        own, number = (places.index // self.length)[:, :, None], blocks.number[:, None]
        seen = (blocks.of_document(places) & (number <= own))[:, None]
        always = seen & ((number == 0) | (number > own - self.config.recent))[:, None]
        affinity = products(q, vectors, reading).masked_fill(~seen, float("-inf")).masked_fill(always, float("inf"))
        C = blocks.number.shape[1]
        picked = affinity.topk(min(self.config.n_chunks or C, C), -1).indices.sort(-1).values
        return torch.where(seen.expand_as(affinity).gather(-1, picked), picked, -1)

    def read_part(
        self,
        q: Tensor,
        held: dict[str, Tensor],
        places: Places,
        prepared: tuple[Blocks, Tensor, Tensor],
        reading: Reading,
    ) -> tuple[Tensor, Tensor]:
        blocks, k, vectors = prepared
        picked = self.choose(q, places, blocks, vectors, reading)
        (B, H, T, n), G, K, v = picked.shape, k.shape[2], k.shape[3], held["v"]
        chosen, picked = picked >= 0, picked.clamp(min=0)
        behind = chosen.flip(-1).cumsum(-1).flip(-1) - chosen.long()  # chosen chunks after this one
        positions = behind * self.length + (places.index % self.length)[:, None, :, None]
        each = q.transpose(1, 2)[:, :, :, None].expand(B, H, T, n, K).reshape(B, -1, 1, K)
        each = turn(each, positions.reshape(B, -1), reading.rotation).view(B, H, T, n, K)
        rows = torch.arange(B, device=q.device)[:, None, None, None]
        columns = blocks.columns[rows, picked].flatten(3)  # (B, H, T, n * length)
        group = (torch.arange(H, device=q.device) // (H // G))[None, :, None, None]
        earlier = columns <= places.slots[:, None, :, None]  # a key's column is its slot
        columns = columns.clamp(max=places.keys.shape[1] - 1)
        keys = k[rows, columns, group].view(B, H, T, n, self.length, K)
        scores = torch.einsum("bhtnk,bhtnlk->bhtnl", each, keys).flatten(3) * (reading.scale or K**-0.5)
        allowed = (chosen[..., None] & blocks.inside[rows, picked]).flatten(3) & earlier
        weights = softmax(scores, allowed, reading)
        used = dropout(weights.to(v.dtype), reading.dropout)
        y = torch.einsum("bhts,bhtsk->bthk", used, v[rows, columns, group])
        return y, weights.new_zeros(B, H, T, places.keys.shape[1]).scatter_add(-1, columns, weights)


class InfLlmReader(ScoringReader):
    """``softmax over {first n_sinks tokens}, {last window tokens} and {the top_k blocks that fit best}``.

    What lies between is cut into blocks; what has left the window but fills no block yet is read too. A block stands
    for its ``representatives`` tokens that the ``window`` tokens after each one attended to most (the mean inner
    product of their queries and its key); its fit to a query is that of those keys' mean, summed over heads (or
    ``per_head``). With ``positions`` capped nothing is further away than ``window``, and with all blocks this is full
    attention with distances capped there; ``true`` leaves distances as they are, which makes that full attention.
    Blocks that are not chosen are not touched and could be kept in slower memory: ``apart`` counts their tokens.
    Source: Xiao et al. 2024 (InfLLM), sections 3.1 to 3.3, and its code. There selection is done once for some hundred
    tokens of a prompt; here by every token, so that a prompt read at once equals one read token by token. The mean
    inner product is of keys and queries before rotation: differences of a running sum.
    """

    kind = "infllm"
    capabilities = Capabilities(compilable=False)  # packed rows are asked how many blocks they have
    kept_names = ("k", "v", "q")

    class Config(Config):
        kind: Literal["infllm"] = "infllm"
        n_sinks: int = Field(default=4, ge=0, description="first tokens of a document, always read")
        window: int = Field(default=96, ge=1, description="last tokens, itself included")
        block: int = Field(default=16, ge=1, description="tokens of a block")
        top_k: int | None = Field(default=4, ge=1, description="blocks read; null: all")
        representatives: int = Field(default=4, ge=1, description="tokens that stand for a block")
        per_head: bool = Field(default=False, description="every head chooses for itself")
        positions: Literal["capped", "true"] = "capped"

    def __init__(self, config: InfLlmReader.Config, max_seq_len: int | None = None):
        self.config = config

    def flops(self, n_queries: int, n_keys: int, n_heads: int, n_kv_heads: int, head_dim: int) -> int:
        C = n_blocks(n_keys, self.config.block, self.config.n_sinks)
        per_pair = 3 if self.config.positions == "capped" else 2
        return 2 * n_heads * head_dim * (per_pair * self.pairs(n_queries, n_keys) + n_queries * C)

    def apart(self, n_tokens: int) -> int:
        c = self.config
        return 0 if c.top_k is None else max(0, n_tokens - c.n_sinks - c.window - c.block * (1 + c.top_k))

    def kept(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"k": k, "v": v, "q": group_mean(q, k.shape[2])}

    def prepare(
        self, held: dict[str, Tensor], places: Places, reading: Reading
    ) -> tuple[Blocks, Tensor, Tensor, Tensor]:
        blocks, index = Blocks.of(places, self.config.block, self.config.n_sinks), places.key_index
        far = turn(held["k"], torch.zeros_like(index), reading.rotation)
        return blocks, turn(held["k"], index, reading.rotation), far, self._vectors(held, far, blocks)

    def _vectors(self, held: dict[str, Tensor], far: Tensor, blocks: Blocks) -> Tensor:
        """The mean key of each block's representatives, (B, C, G, K)."""
        k, total = held["k"], full_precision(held["q"]).cumsum(1)
        S = k.shape[1]
        ahead = (torch.arange(S, device=k.device) + self.config.window).clamp(max=S - 1)
        attended = ((total[:, ahead] - total) * k).sum(-1)  # only blocks are asked whose tokens all have so many after
        attended = blocks.take(attended).masked_fill(~blocks.inside[..., None], float("-inf"))
        best = attended.topk(min(self.config.representatives, self.config.block), 2).indices  # (B, C, r, G)
        return blocks.take(far).gather(2, best[..., None].expand(*best.shape, k.shape[-1])).mean(2)

    def read_part(
        self,
        q: Tensor,
        held: dict[str, Tensor],
        places: Places,
        prepared: tuple[Blocks, Tensor, Tensor, Tensor],
        reading: Reading,
    ) -> tuple[Tensor, Tensor]:
        (blocks, k, k_far, vectors), config, index, n = prepared, self.config, places.index, places.keys.shape[1]
        distance, allowed = places.pairs()
        q_far = turn(q, torch.full_like(index, config.window), reading.rotation)
        scores = products(turn(q, index, reading.rotation), k[:, :n], reading)
        if config.positions == "capped":
            far = products(q_far, k_far[:, :n], reading)
            scores = torch.where((distance < config.window)[:, None], scores, far)
        end = config.n_sinks + (blocks.number + 1) * config.block - 1  # of a block, in its document
        left = (blocks.of_document(places) & (end[:, None] <= (index - config.window)[:, :, None]))[:, None]
        fit = products(q_far, vectors, reading)
        fit = (fit if config.per_head else fit.mean(1, keepdim=True)).masked_fill(~left, float("-inf"))
        C = fit.shape[-1]
        picked = fit.topk(min(config.top_k or C, C), -1).indices
        chosen = torch.zeros_like(fit, dtype=torch.bool).scatter(-1, picked, True) & left
        readable = allowed[:, None] & (~blocks.to_keys(left, n) | blocks.to_keys(chosen, n))
        weights = softmax(scores, readable, reading)
        return weighted(weights, held["v"], reading), weights
