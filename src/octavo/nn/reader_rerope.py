"""ReRoPE and Leaky ReRoPE: rotary distances beyond a window stand still or grow slowly, on any trained model."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.nn.contracts import Context
from octavo.nn.reader import FullReader, Reading
from octavo.nn.reader_scores import QUERIES, products, record, refuse, softmax, turn, weighted
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


class ReRopeReader(FullReader):
    """``s_ij = q_i^T R(g(i - j)) k_j``, ``g(t) = t`` for t < w and ``w`` beyond: no distance above w is ever seen.

    Scores are computed twice, with every token at its position, and with the query at w and the keys at 0; the
    distance says which counts. Keys are kept unturned. Up to w tokens it is RoPE. ``trained`` multiplies
    queries by max(1, ln(t + 1) / ln(trained)), t their position, as the author's code does. Source: Su 2023
    (kexue.fm/archives/9708). For w take half of the trained length or less.
    """

    class Config(Config):
        kind: Literal["rerope"] = "rerope"
        window: int = Field(default=128, ge=1, description="w, in tokens")
        trained: int | None = Field(default=None, ge=2, description="scale queries by the logarithm of positions")

    name, slope = "rerope", 0.0  # the slope of g beyond the window
    score_passes = 2

    def __init__(self, config: ReRopeReader.Config, max_seq_len: int | None = None):
        self.within, self.trained = config.window, config.trained

    def state_spec(self, n_kv_heads: int, head_dim: int) -> StateSpec:
        return {**super().state_spec(n_kv_heads, head_dim), "positions": StateField("token", (), torch.long)}

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: LayerState | None, reading: Reading) -> Tensor:
        refuse(ctx, self.name)
        keys, positions = ctx.keys, ctx.positions
        if self.trained is not None:
            growth = (ctx.positions + 1).double().log() / math.log(self.trained)
            q = q * growth.clamp(min=1)[:, :, None, None].to(q.dtype)
        if state is not None:
            keys, held = state.append(ctx, k=k, v=v, positions=positions)
            k, v, positions = held["k"], held["v"], held["positions"]
        mask, parts, maps = self.mask(ctx, keys), [], []
        for begin in range(0, q.shape[1], QUERIES):
            part = slice(begin, begin + QUERIES)
            scores = self.scores(q[:, part], k, ctx.positions[:, part], positions, reading)
            maps.append(softmax(scores, mask[:, :, part], reading))
            parts.append(weighted(maps[-1], v, reading))
        record(ctx, maps)
        return torch.cat(parts, 1)

    def scores(self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, reading: Reading) -> Tensor:
        """``q_i^T R(g(i - j)) k_j``, scaled, (B, H, T, S); i and j are the positions ``at`` and ``keys_at``."""
        near = products(turn(q, at, reading.rotation), turn(k, keys_at, reading.rotation), reading)
        # Query at slope i + (1 - slope) w, key at slope j: their distance is w + slope (i - j - w).
        q = turn(q, at * self.slope + (1 - self.slope) * self.within, reading.rotation)
        far = products(q, turn(k, keys_at * self.slope, reading.rotation), reading)
        return torch.where((at[:, :, None] - keys_at[:, None, :])[:, None] < self.within, near, far)


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
        self.name, self.slope = config.kind, 1 / config.leak
