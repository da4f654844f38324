"""Channel mixers that treat every token alone: the MLP and the gated family."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from octavo.nn.activation import ACTIVATIONS, ActivationName
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer
from octavo.nn.dropout import dropout
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState
from octavo.schema import Config


class Mlp(Mixer):
    """``down(act(up(x)))``, by default four times as wide inside (Vaswani et al. 2017, section 3.3)."""

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["mlp"] = "mlp"
        d_ff: int | None = Field(default=None, ge=1, description="default: 4 d_model")
        activation: ActivationName = "gelu"
        bias: bool = False
        dropout: float = Field(default=0.0, ge=0, lt=1)

    def __init__(self, config: Mlp.Config, dims: Dims):
        super().__init__()
        self.config = config
        D, F_ = dims.d_model, config.d_ff or 4 * dims.d_model
        self.activation = ACTIVATIONS[config.activation]
        self.up = Projection(D, F_, "up", bias=config.bias)
        self.down = Projection(F_, D, "down", bias=config.bias)

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        hidden = self.activation(self.up(x))
        return self.down(dropout(hidden, self.config.dropout, self.training)), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * (self.up.d_in * self.up.d_out + self.down.d_in * self.down.d_out)

    def predicted_parameters(self) -> int:
        return self.up.n_parameters() + self.down.n_parameters()


class Glu(Mixer):
    """``down(act(gate(x)) * up(x))``: SwiGLU with silu, GEGLU with gelu, ReGLU, GLU, bilinear (Shazeer 2020).

    The default width is 8/3 d_model rounded up to a multiple of 32, so that it has the parameters of an MLP
    of four times the width.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["glu"] = "glu"
        d_ff: int | None = Field(default=None, ge=1, description="default: 8/3 d_model, a multiple of 32")
        activation: ActivationName = "silu"
        bias: bool = False
        dropout: float = Field(default=0.0, ge=0, lt=1)

    def __init__(self, config: Glu.Config, dims: Dims):
        super().__init__()
        self.config = config
        D, F_ = dims.d_model, config.d_ff or -(-8 * dims.d_model // 96) * 32
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Projection(D, F_, "gate", bias=config.bias)
        self.up = Projection(D, F_, "up", bias=config.bias)
        self.down = Projection(F_, D, "down", bias=config.bias)

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        hidden = self.activation(self.gate(x)) * self.up(x)
        return self.down(dropout(hidden, self.config.dropout, self.training)), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * 3 * self.up.d_in * self.up.d_out

    def predicted_parameters(self) -> int:
        return self.gate.n_parameters() + self.up.n_parameters() + self.down.n_parameters()
