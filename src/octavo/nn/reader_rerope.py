"""ReRoPE and Leaky ReRoPE: rotary distances beyond a window stand still or grow slowly, on any trained model."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from octavo.nn.contracts import Context, full_precision
from octavo.nn.position import Rotation
from octavo.nn.reader import FullReader, Reading
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config

SCORES = 1 << 24  # held at once, in queries of a pass


class ReRopeReader(FullReader):
    """``s_ij = q_i^T R(g(i - j)) k_j``, ``g(t) = t`` for t < w and ``w`` beyond: no distance above w is ever seen.

    Scores are computed twice, with every token at its position, and with the query at w and the keys at 0; the
    distance says which counts. Keys are kept unturned. Up to w tokens it is RoPE. ``trained`` multiplies
    queries by max(1, ln(t + 1) / ln(trained)), t their position, as the author's code does. Source: Su 2023
    (kexue.fm/archives/9708). For w take half of the trained length or less. Layers that do not rotate read as ``full``.
    """

    class Config(Config):
        kind: Literal["rerope"] = "rerope"
        window: int = Field(default=128, ge=1, description="w, in tokens")
        trained: int | None = Field(default=None, ge=2, description="scale queries by the logarithm of positions")

    slope = 0.0  # of g beyond the window
    score_passes = 2

    def __init__(self, config: ReRopeReader.Config, max_seq_len: int | None = None):
        self.within, self.trained = config.window, config.trained

    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        return {**super().state_spec(n_kv_heads, head_dim), "positions": StateField("token", (), torch.long)}

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        keys, positions = ctx.keys, ctx.positions
        if self.trained is not None:
            growth = (ctx.positions + 1).double().log() / math.log(self.trained)
            q = q * growth.clamp(min=1)[:, :, None, None].to(q.dtype)
        if state is not None:
            keys, held = state.append(ctx, k=k, v=v, positions=positions)
            k, v, positions = held["k"], held["v"], held["positions"]
        mask, bias = self.mask(ctx, keys), ctx.score_bias(keys)
        B, T, H, K = q.shape
        step = max(1, SCORES // (B * H * k.shape[1]))
        parts, maps = [], []
        for begin in range(0, T, step):
            part = slice(begin, begin + step)
            own = (q[:, part], k, ctx.positions[:, part], positions)
            scores = self.scores(*own, reading.rotation, both_ways=not ctx.causal) * (reading.scale or K**-0.5)
            if reading.softcap is not None:
                scores = torch.tanh(scores / reading.softcap) * reading.softcap
            if bias is not None:
                scores = scores + bias[:, :, part]
            scores = full_precision(scores.masked_fill(~mask[:, :, part], float("-inf")))
            weights = _softmax(scores, reading.sinks).to(q.dtype)
            maps.append(weights)
            weights = F.dropout(weights, reading.dropout).unflatten(1, (v.shape[2], -1))
            parts.append(torch.einsum("bgrts,bsgk->btgrk", weights, v).flatten(2, 3))
        if "attention" in ctx.record:
            ctx.recorded.setdefault("attention", []).append(torch.cat(maps, 2))
        return torch.cat(parts, 1)

    def scores(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, rotation: Rotation | None, *, both_ways: bool = False
    ) -> Tensor:
        """``q_i^T R(g(i - j)) k_j``, (B, H, T, S), not scaled; i and j are the positions ``at`` and ``keys_at``."""

        def turn(x: Tensor, positions: Tensor) -> Tensor:
            return x if rotation is None else rotation.at(positions)(x)

        near = _products(turn(q, at), turn(k, keys_at))
        # Query at slope i + (1 - slope) w, key at slope j: their distance is w + slope (i - j - w).
        slowed, key = at * self.slope, turn(k, keys_at * self.slope)
        offset = (1 - self.slope) * self.within
        far = _products(turn(q, slowed + offset), key)
        distance = (at[:, :, None] - keys_at[:, None, :])[:, None]
        if both_ways:
            far = torch.where(distance > 0, far, _products(turn(q, slowed - offset), key))
        return torch.where(distance.abs() < self.within, near, far)


class LeakyReRopeReader(ReRopeReader):
    """``s_ij = q_i^T R(g(i - j)) k_j``, ``g(t) = t`` for t < w and ``w + (t - w) / k`` beyond.

    ``leak`` is k: with k = 1 it is RoPE, with k without bound ReRoPE. A text of L' tokens stays within L trained
    ones if k >= (L' - w) / (L - w). Otherwise as ``rerope``, same source.
    """

    class Config(ReRopeReader.Config):
        kind: Literal["leaky_rerope"] = "leaky_rerope"  # type: ignore[assignment]
        leak: float = Field(default=16.0, ge=1, description="k: beyond the window k tokens count as one")

    def __init__(self, config: LeakyReRopeReader.Config, max_seq_len: int | None = None):
        super().__init__(config, max_seq_len)
        self.slope = 1 / config.leak


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q (B, T, H, K) with k (B, S, G, K): (B, H, T, S)."""
    return torch.einsum("btgrk,bsgk->bgrts", q.unflatten(2, (k.shape[2], -1)), k).flatten(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return scores.softmax(-1)
    B, H, T, S = scores.shape
    sink = sinks.to(scores.dtype)[:, None, None].expand(B, H, T, 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :S]
