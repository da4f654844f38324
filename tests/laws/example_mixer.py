"""Somebody's own recurrent mixer: a gated recurrent unit whose state is one vector a row.

It stands in a recipe as ``kind: "example_mixer:Gru"`` and uses nothing that is not in the contract.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config as Base


class Gru(Mixer):
    """h' = (1 - z) n + z h, with update and reset gates (Cho et al. 2014), as in ``torch.nn.GRU``."""

    capabilities = Capabilities(constant_state=True)

    class Config(Base):
        kind: Literal["example_mixer:Gru"] = "example_mixer:Gru"
        width: int | None = Field(None, ge=1, description="default: d_model")

    def __init__(self, config: Gru.Config, dims: Dims):
        super().__init__()
        self.config, self.width = config, config.width or dims.d_model
        self.up = Projection(dims.d_model, 3 * self.width, "recurrent_in", bias=True)
        self.over = Projection(self.width, 3 * self.width, "recurrent", bias=True)
        self.o = Projection(self.width, dims.d_model, "o")

    def state_spec(self) -> StateSpec:
        return {"h": StateField("row", (self.width,))}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        h = x.new_zeros(x.shape[0], self.width) if state is None else state.read("h")
        inner, outputs = self.up(x), []
        for t in range(x.shape[1]):
            h = torch.where(ctx.starts[:, t, None], torch.zeros_like(h), h)
            ir, iz, inn = inner[:, t].chunk(3, -1)
            hr, hz, hn = self.over(h).chunk(3, -1)
            z = (iz + hz).sigmoid()
            new = (1 - z) * (inn + (ir + hr).sigmoid() * hn).tanh() + z * h
            h = torch.where(ctx.valid[:, t, None], new, h)
            outputs.append(h)
        if state is not None:
            state.write(h=h)
        return self.o(torch.stack(outputs, 1)), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * sum(p.d_in * p.d_out for p in (self.up, self.over, self.o))

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in (self.up, self.over, self.o))
