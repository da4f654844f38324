"""Attention in tiles with an online softmax, written to be read: never more than one tile of scores in memory.

The signature and the meaning of everything are those of nn/attend.py. What is fast on a device does the same inside
one kernel; here every step is a line of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.nn.contracts import full_precision


@dataclass(frozen=True)
class Settings:
    """What is the same for every tile. ``seed`` makes the dropout of a tile repeatable in the backward pass."""

    causal: bool
    scale: float
    softcap: float | None
    dropout: float
    seed: int
    rows: int  # queries of a tile
    columns: int  # keys of a tile


class Tile(NamedTuple):
    """A block of queries against a block of keys; ``number`` is its place in the grid."""

    queries: slice
    keys: slice
    number: int


def tiles(T: int, S: int, how: Settings, queries_first: bool = True) -> Iterator[Tile]:
    """Every tile that is not wholly in the future, row by row or column by column."""
    t_cuts = [slice(t, min(t + how.rows, T)) for t in range(0, T, how.rows)]
    s_cuts = [slice(s, min(s + how.columns, S)) for s in range(0, S, how.columns)]
    grid = [Tile(t, s, i * len(s_cuts) + j) for i, t in enumerate(t_cuts) for j, s in enumerate(s_cuts)]
    seen = [tile for tile in grid if not how.causal or tile.keys.start < tile.queries.stop]
    return iter(seen if queries_first else sorted(seen, key=lambda tile: tile.keys.start))


class Block:
    """One tile's scores and what is needed to go back through them: q (B, G, R, T, K), k and v (B, G, S, K)."""

    def __init__(self, tile: Tile, q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, how: Settings):
        self.tile, self.how = tile, how
        self.q, self.k = q[:, :, :, tile.queries], k[:, :, tile.keys]
        B, G, R, t, K = self.q.shape
        # The R query heads of a key head are further rows of one product: keys are never repeated.
        scores = full_precision((self.q.reshape(B, G, R * t, K) @ self.k.transpose(2, 3)).view(B, G, R, t, -1))
        scores = scores * how.scale
        if how.softcap is not None:
            scores = torch.tanh(scores / how.softcap) * how.softcap
            self.slope = 1 - (scores / how.softcap).square()
        if bias is not None:
            scores = scores + full_precision(bias[:, :, :, tile.queries, tile.keys])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None, tile.queries, tile.keys], float("-inf"))
        if how.causal:
            t_at = torch.arange(tile.queries.start, tile.queries.stop, device=q.device)
            s_at = torch.arange(tile.keys.start, tile.keys.stop, device=q.device)
            scores = scores.masked_fill(s_at > t_at[:, None], float("-inf"))
        self.scores = scores

    def kept(self) -> Tensor | None:
        """0 or 1 / (1 - p) for each probability, the same at every call; None without dropout."""
        if not self.how.dropout:
            return None
        generator = torch.Generator(self.scores.device).manual_seed(self.how.seed + self.tile.number)
        drawn = torch.rand(self.scores.shape, generator=generator, device=self.scores.device)
        return (drawn >= self.how.dropout).to(self.scores.dtype) / (1 - self.how.dropout)


def by_key(weights: Tensor, x: Tensor) -> Tensor:
    """(B, G, R, t, s) times (B, G, s, K): (B, G, R, t, K)."""
    B, G, R, t, s = weights.shape
    return (weights.reshape(B, G, R * t, s) @ x).view(B, G, R, t, -1)


def by_query(weights: Tensor, x: Tensor) -> Tensor:
    """(B, G, R, t, s) transposed, times (B, G, R, t, K), summed over R and t: (B, G, s, K)."""
    B, G, R, t, s = weights.shape
    return weights.reshape(B, G, R * t, s).transpose(2, 3) @ x.reshape(B, G, R * t, -1)


class TiledAttention(torch.autograd.Function):
    """``softmax(q k^T) v`` from running maxima m and sums l, one tile at a time.

    Forward (Dao et al. 2022, algorithm 1, section 3.1): a new tile with row maxima m' turns what was summed so far
    by exp(m - max(m, m')). A sink is where the sums begin: m = sink, l = 1. Kept for the way back: the output and
    m + ln l, (B, H, T). Backward (algorithm 4, appendix B.4): every tile's probabilities are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        how: Settings,
    ) -> Tensor:  # fmt: skip
        B, G, R, T, _ = q.shape
        out = full_precision(q.new_zeros(B, G, R, T, v.shape[-1]))
        top, total = out.new_full((B, G, R, T, 1), float("-inf")), out.new_zeros(B, G, R, T, 1)
        if sinks is not None:
            top, total = top.copy_(sinks.view(G, R, 1, 1)), total + 1
        for tile in tiles(T, k.shape[2], how):
            block, rows = Block(tile, q, k, mask, bias, how), tile.queries
            old, m = top[:, :, :, rows], block.scores.amax(-1, keepdim=True)
            new = torch.maximum(old, m)
            base = new.masked_fill(new == float("-inf"), 0.0)  # a row that has read nothing yet
            shares, turn, kept = (block.scores - base).exp(), (old - base).exp(), block.kept()
            total[:, :, :, rows] = total[:, :, :, rows] * turn + shares.sum(-1, keepdim=True)
            shares = shares if kept is None else shares * kept
            read = by_key(shares, full_precision(v[:, :, tile.keys]))
            out[:, :, :, rows] = out[:, :, :, rows] * turn + read
            top[:, :, :, rows] = new
        out = torch.where(total > 0, out / total, 0.0)  # a row that may read nothing gives nothing
        ctx.how, lse = how, top + total.log()
        ctx.save_for_backward(q, k, v, mask, bias, sinks, out, lse)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, bias, sinks, out, lse = ctx.saved_tensors
        how: Settings = ctx.how
        grad = full_precision(grads[0])
        dq, dk, dv = (torch.zeros_like(x, dtype=grad.dtype) for x in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=grad.dtype) if bias is not None and ctx.needs_input_grad[4] else None
        delta = (grad * out).sum(-1, keepdim=True)  # sum over keys of probability times its gradient
        for tile in tiles(q.shape[3], k.shape[2], how, queries_first=False):
            block, rows, columns = Block(tile, q, k, mask, bias, how), tile.queries, tile.keys
            base = lse[:, :, :, rows]
            shares = (block.scores - base.masked_fill(base == float("-inf"), 0.0)).exp()
            g, kept = grad[:, :, :, rows], block.kept()
            dshares = by_key(g, full_precision(v[:, :, columns]).transpose(2, 3))
            dv[:, :, columns] += by_query(shares if kept is None else shares * kept, g)
            dscores = shares * ((dshares if kept is None else dshares * kept) - delta[:, :, :, rows])
            if dbias is not None:
                dbias[:, :, :, rows, columns] += dscores.sum(0, keepdim=True) if len(dbias) == 1 else dscores
            dscores = dscores * how.scale if how.softcap is None else dscores * block.slope * how.scale
            dq[:, :, :, rows] += by_key(dscores, full_precision(block.k))
            dk[:, :, columns] += by_query(dscores, full_precision(block.q))
        dsinks = None
        if sinks is not None:
            share = (sinks.to(lse.dtype).view(-1, *q.shape[2:3], 1, 1) - lse).exp()
            dsinks = -(share * delta).sum((0, 3, 4)).flatten().to(sinks.dtype)
        to_bias = dbias.to(bias.dtype) if dbias is not None and bias is not None else None
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, to_bias, dsinks, None


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    rows: int = 64,
    columns: int = 64,
) -> Tensor:
    """Attention in tiles of ``rows`` queries and ``columns`` keys: memory that grows with T + S, not with T S.

    Where a mask hides every key of a query, its output is zero.
    """
    B, H, T, K = q.shape
    G, S = k.shape[1], k.shape[2]
    seed = int(torch.randint(2**62, ())) if dropout else 0
    how = Settings(causal, scale or K**-0.5, softcap, dropout, seed, rows, columns)
    bias = None if bias is None else bias.reshape(-1, G, H // G, T, S)
    y = TiledAttention.apply(q.reshape(B, G, H // G, T, K), k, v, mask, bias, sinks, how)
    return y.reshape(B, H, T, v.shape[-1])  # type: ignore[union-attr]
