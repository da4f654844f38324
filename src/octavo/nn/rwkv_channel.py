"""RWKV's channel mixing: a squared-ReLU MLP that sees the token before and gates what it says."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer
from octavo.nn.projection import Projection
from octavo.nn.shift import shift, tail
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


class RwkvChannel(Mixer):
    """``sigmoid(gate(x_r)) * down(relu(up(x_k))^2)`` with ``x_i = m_i x_t + (1 - m_i) x_{t-1}`` (the token shift).

    m is learnt, one number a channel; x_{t-1} is zero at the first token of a document and is the mixer's state.
    Versions 4 to 6 compute the same (Peng et al. 2023, section 3.1; Peng et al. 2024, section 4);
    the code of 5 and 6 stores 1 - m, and takes 3.5 d_model instead of 4 for the width inside.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["rwkv_channel"] = "rwkv_channel"
        d_ff: int | None = Field(default=None, ge=1, description="default: 4 d_model")

    def __init__(self, config: RwkvChannel.Config, dims: Dims):
        super().__init__()
        self.dims, D = dims, dims.d_model
        width = config.d_ff or 4 * D
        self.mix_k, self.mix_r = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.gate, self.up, self.down = (
            Projection(D, D, "gate"), Projection(D, width, "up"), Projection(width, D, "down"),
        )  # fmt: skip

    def reset(self) -> None:
        """From channels that see only the token before to channels that see only the token."""
        ramp, _, late = shift_ramp(self.dims)
        with torch.no_grad():
            self.mix_k.copy_(ramp**late)
            self.mix_r.copy_(ramp**late)

    def state_spec(self) -> StateSpec:
        return {"x": StateField("row", (self.dims.d_model,))}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        before = None if state is None else state.read("x")
        back = shift(x, ctx, before) - x
        if state is not None and before is not None:
            state.write(x=tail(x, before[:, None], ctx)[:, 0])
        inner = self.up(x + back * (1 - self.mix_k)).relu().square()
        return self.gate(x + back * (1 - self.mix_r)).sigmoid() * self.down(inner), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * sum(p.d_in * p.d_out for p in (self.gate, self.up, self.down))

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in (self.gate, self.up, self.down)) + 2 * self.dims.d_model


def shift_ramp(dims: Dims) -> tuple[Tensor, float, float]:
    """What the published starting values are made of: channels 0 to 1, depth from 0 to 1, depth from 1 to nearly 0."""
    ramp = torch.arange(dims.d_model, dtype=torch.float32) / dims.d_model
    return ramp, dims.depth / max(dims.n_layers - 1, 1), 1 - dims.depth / dims.n_layers
