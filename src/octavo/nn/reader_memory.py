"""External memory: the last tokens as always, and of all before them those that a head's query fits best."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.nn.reader import Reading
from octavo.nn.reader_scores import Places, ScoringReader, products, softmax, turn, weighted
from octavo.schema import Config


class ExternalMemoryReader(ScoringReader):
    """``softmax over {last window tokens} and {the top_k older ones of largest q . k, per head}``.

    One softmax over both. With ``positions`` border every token of the memory is read as if it stood ``window``
    tokens back, just outside the local window; ``true`` leaves it where it is, and then without ``top_k`` this is
    full attention. All keys of the memory are compared (no index), so time grows with the text like that of full
    attention. Source: Tworkowski et al. 2023 (Focused Transformer), section 3.1; positions, section 3.2 and LongLLaMA.
    There some layers have a memory; here every layer whose reader this is.
    """

    kind = "external_memory"

    class Config(Config):
        kind: Literal["external_memory"] = "external_memory"
        window: int = Field(default=128, ge=1, description="local tokens, itself included")
        top_k: int | None = Field(default=32, ge=1, description="memory tokens each head reads; null: all")
        positions: Literal["border", "true"] = "border"

    def __init__(self, config: ExternalMemoryReader.Config, max_seq_len: int | None = None):
        self.config = config

    def flops(self, n_queries: int, n_keys: int, n_heads: int, n_kv_heads: int, head_dim: int) -> int:
        products = 3 if self.config.positions == "border" else 2
        return 2 * products * self.pairs(n_queries, n_keys) * n_heads * head_dim

    def apart(self, n_tokens: int) -> int:
        return max(0, n_tokens - self.config.window)

    def prepare(self, held: dict[str, Tensor], places: Places, reading: Reading) -> dict[str, Tensor]:
        k, index = held["k"], places.key_index
        return {"near": turn(k, index, reading.rotation), "far": turn(k, torch.zeros_like(index), reading.rotation)}

    def read_part(
        self, q: Tensor, held: dict[str, Tensor], places: Places, prepared: dict[str, Tensor], reading: Reading
    ) -> tuple[Tensor, Tensor]:
        config, index, n = self.config, places.index, places.keys.shape[1]
        distance, allowed = places.pairs()
        outside = (allowed & (distance >= config.window))[:, None]
        scores = products(turn(q, index, reading.rotation), prepared["near"][:, :n], reading)
        if config.positions == "border":
            border = turn(q, torch.full_like(index, config.window), reading.rotation)
            scores = torch.where(outside, products(border, prepared["far"][:, :n], reading), scores)
        chosen = allowed[:, None]
        if config.top_k is not None and config.top_k < scores.shape[-1]:
            best = scores.masked_fill(~outside, float("-inf")).topk(config.top_k, -1).indices
            chosen = chosen & (~outside | torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True))
        weights = softmax(scores, chosen, reading)
        return weighted(weights, held["v"], reading), weights
