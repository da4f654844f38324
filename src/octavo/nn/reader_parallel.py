"""Parallel context windows: pieces of a text that do not see each other, all seen by what follows them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.nn.reader import Reading
from octavo.nn.reader_scores import Places, ScoringReader, products, softmax, turn, weighted
from octavo.schema import Config


class ParallelWindowsReader(ScoringReader):
    """``position(p) = p mod window in the windows, window + p - n_windows window after them``.

    The first ``n_windows * window`` tokens of a document are windows: a token there reads its own window only, and
    every window has the same positions. The tokens after them (the task) read all windows and each other, at
    positions that follow the longest window, so no more than ``window`` and the task's length are ever needed. With
    one window this is full attention. Source: Ratner et al. 2023 (Parallel Context Windows), section 2; positions as
    its code's ``generate_pcw_position_ids``. There each window is a text of its own length that is told apart by the
    caller; here windows are equally long and told apart by where a token stands, so that a state needs to know
    nothing, and a token of the windows can be predicted too.
    """

    kind = "parallel_windows"

    class Config(Config):
        kind: Literal["parallel_windows"] = "parallel_windows"
        window: int = Field(ge=1, description="tokens of a window")
        n_windows: int = Field(ge=0, description="the tokens after so many windows are the task")

    def __init__(self, config: ParallelWindowsReader.Config, max_seq_len: int | None = None):
        self.length, self.task = config.window, config.window * config.n_windows

    def flops(self, n_queries: int, n_keys: int, n_heads: int, n_kv_heads: int, head_dim: int) -> int:
        return 4 * self.pairs(n_queries, n_keys) * n_heads * head_dim

    def positions(self, index: Tensor) -> Tensor:
        """The position at which a document's token ``index`` is read."""
        return torch.where(index < self.task, index % self.length, min(self.length, self.task) + index - self.task)

    def prepare(self, held: dict[str, Tensor], places: Places, reading: Reading) -> dict[str, Tensor]:
        return {"k": turn(held["k"], self.positions(places.key_index), reading.rotation)}

    def read_part(
        self, q: Tensor, held: dict[str, Tensor], places: Places, prepared: dict[str, Tensor], reading: Reading
    ) -> tuple[Tensor, Tensor]:
        index, key_index = places.index[:, :, None], places.key_index[:, None, :]
        allowed = places.pairs()[1] & ((index >= self.task) | (index // self.length == key_index // self.length))
        k = prepared["k"][:, : places.keys.shape[1]]
        scores = products(turn(q, self.positions(places.index), reading.rotation), k, reading)
        weights = softmax(scores, allowed[:, None], reading)
        return weighted(weights, held["v"], reading), weights
