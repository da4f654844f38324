"""Readers of the sparse transformer: each token reads about the square root of what came before.

There are as many parameters as before, and as many cached keys.
Windows and blocks are ranges of keys for the kernel that training has; columns and summaries are computed without the
other keys where nothing is cached or packed. Everything else, the unions among them, is full attention under a mask and
saves no time.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from octavo.nn.attend import causal_by_ranges
from octavo.nn.contracts import Context, Keys
from octavo.nn.reader import FullReader, Reading, attend_masked
from octavo.nn.rope import QueryRotation
from octavo.nn.state import LayerState
from octavo.schema import Config


class SparseReader(FullReader):
    """What both patterns share: ``mask`` from a rule on places, counted from the beginning of each document."""

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a token at ``query`` may read one at ``key``; both broadcast, causality is not this rule's."""
        raise TypeError(f"{type(self).__name__} has no pattern")

    def reads_all(self, ctx: Context) -> bool:
        return False

    def mask(self, ctx: Context, keys: Keys) -> Tensor:
        allowed = ctx.mask(keys, causal=ctx.causal)[:, 0]
        if ctx.plain:
            read = self.pattern(ctx.slots[:1, :, None], keys.slots[:1, None, :])
            return (allowed & read)[:, None]
        document = (keys.slots[:, None, :] >= 0) & (keys.doc_ids[:, None, :] == ctx.doc_ids[:, :, None])
        far = torch.iinfo(keys.slots.dtype).max
        begin = torch.where(document, keys.slots[:, None, :], far).amin(2, keepdim=True)
        read = self.pattern(ctx.slots[:, :, None] - begin, keys.slots[:, None, :] - begin)
        return (allowed & (read | ~ctx.valid[:, :, None]))[:, None]

    def whole(self, ctx: Context, state: LayerState | None, reading: Reading) -> bool:
        """Whether a place in the row is a place in the one document it holds, and nobody asks for the map."""
        fixed = not isinstance(reading.rotation, QueryRotation)
        bare = fixed and ctx.causal and ctx.bias is None and "attention" not in ctx.record
        return state is None and ctx.plain and bare and reading.backend != "plain"


class StridedReader(SparseReader):
    """``A_i = {i - l .. i} + {j : (i - j) mod l = 0}``: the last ``stride`` l tokens, and every l-th of all before.

    ``part`` local or column is one of the two sets, for layers that alternate between them; ``both`` the union.
    Source: Child et al. 2019, sections 4.3 and 5.2 (figure 3b). A column is computed as l rows of T / l tokens.
    """

    class Config(Config):
        kind: Literal["strided"] = "strided"
        stride: int = Field(ge=1, description="about the square root of the context")
        part: Literal["local", "column", "both"] = "both"

    def __init__(self, config: StridedReader.Config, max_seq_len: int | None = None):
        self.config = config
        self.ranged = config.part == "local"

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        back, part = query - key, self.config.part
        local, column = back.abs() <= self.config.stride, back % self.config.stride == 0
        return local if part == "local" else column if part == "column" else local | column

    def first_keys(self, ctx: Context) -> Tensor:
        return ctx.first_keys(self.config.stride + 1)

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        if self.config.part != "column" or not self.whole(ctx, state, reading):
            return super().read(q, k, v, ctx, state, reading)
        if reading.rotation is not None:
            q, k = reading.rotation(q), reading.rotation(k)
        T, stride = q.shape[1], self.config.stride
        # Token t goes to row t mod l; the padding that makes the rows equal stands last and is read by nobody else.
        q, k, v = (_columns(F.pad(x, (0, 0, 0, 0, 0, -T % stride)), stride) for x in (q, k, v))
        if self._by_ranges(q, k, v, ctx, state, reading):
            y = causal_by_ranges(q, k, v, scale=reading.scale, dropout=reading.dropout)
        else:
            y = attend_masked(q, k, v, None, ctx, ctx.keys, reading, flag=True)
        H, n, K = y.shape[1:]
        return y.view(-1, stride, H, n, K).permute(0, 3, 1, 2, 4).reshape(-1, n * stride, H, K)[:, :T]


def _columns(x: Tensor, stride: int) -> Tensor:
    """(B, T, H, K) to (B stride, H, T / stride, K): row r of each text has its tokens r, r + stride, ..."""
    B, T, H, K = x.shape
    return x.view(B, T // stride, stride, H, K).permute(0, 2, 3, 1, 4).reshape(B * stride, H, T // stride, K)


class FixedReader(SparseReader):
    """``A_i = {j : j div l = i div l} + {j : j mod l >= l - c}``: the own block, and the last c tokens of every block.

    ``stride`` is l, ``summary`` c. ``part`` block or summary is one of the two sets, for layers that alternate between
    them; ``both`` the union. Source: Child et al. 2019, sections 4.3 and 5.2 (figure 3c). Ours differs: with part
    summary the tokens before the first summary, which would read nothing, read themselves.
    """

    class Config(Config):
        kind: Literal["fixed"] = "fixed"
        stride: int = Field(ge=1, description="tokens of a block")
        summary: int = Field(default=1, ge=1, description="tokens at a block's end that all later ones read")
        part: Literal["block", "summary", "both"] = "both"

        @model_validator(mode="after")
        def _fits(self) -> FixedReader.Config:
            if self.summary > self.stride:
                raise ValueError(f"summary = {self.summary} must be at most stride = {self.stride}")
            return self

    def __init__(self, config: FixedReader.Config, max_seq_len: int | None = None):
        self.config = config
        self.ranged = config.part == "block"

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        size, part = self.config.stride, self.config.part
        begin = size - self.config.summary
        block = query.div(size, rounding_mode="floor") == key.div(size, rounding_mode="floor")
        summary = key % size >= begin
        if part == "summary":
            return summary | ((query == key) & (query < begin))
        return block if part == "block" else block | summary

    def first_keys(self, ctx: Context) -> Tensor:
        order = torch.arange(ctx.slots.shape[1], device=ctx.slots.device)
        begin = ctx.first_keys()
        return torch.where(begin < 0, begin, order - (order - begin) % self.config.stride).int()

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        size, T = self.config.stride, q.shape[1]
        begin = size - self.config.summary
        if self.config.part != "summary" or not self.whole(ctx, state, reading) or begin >= T or begin == 0:
            return super().read(q, k, v, ctx, state, reading)
        if reading.rotation is not None:
            q, k = reading.rotation(q), reading.rotation(k)
        # The keys that anybody reads: of the first block all (see above), of the others the summaries.
        kept = torch.tensor([t for t in range(T) if t < size or t % size >= begin], device=q.device)
        order = torch.arange(T, device=q.device)[:, None]
        mask = (self.pattern(order, kept) & (kept <= order))[None, None]
        q, k, v = q.transpose(1, 2), k[:, kept].transpose(1, 2), v[:, kept].transpose(1, 2)
        return attend_masked(q, k, v, mask, ctx, ctx.keys, reading).transpose(1, 2)
