"""The feed-forward language model's mixer: one hidden layer over the last n tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer
from octavo.nn.convolution import windows
from octavo.nn.projection import Projection
from octavo.nn.shift import tail
from octavo.nn.state import LayerState, StateField, StateSpec
from octavo.schema import Config


class Bengio(Mixer):
    """``o(tanh(H [x_{t-n+1}; ...; x_t] + d))``, and with ``direct`` also ``W [x_{t-n+1}; ...; x_t]``.

    Bengio et al. 2003, section 2: the last n inputs one after the other (zeros before a document), a hidden layer,
    and connections that leave it out. Ours gives a vector of d_model to the residual stream, not logits: the model's
    head makes those. One such layer alone is the model of the paper, whose prediction depends on exactly n tokens.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["bengio"] = "bengio"
        context: int = Field(default=8, ge=1, description="n, the tokens that are read")
        width: int | None = Field(default=None, ge=1, description="of the hidden layer; default: 2 d_model")
        direct: bool = Field(default=False, description="connections past the hidden layer")

    def __init__(self, config: Bengio.Config, dims: Dims):
        super().__init__()
        self.config, self.d_model = config, dims.d_model
        inputs, width = config.context * dims.d_model, config.width or 2 * dims.d_model
        self.up = Projection(inputs, width, "up", bias=True)
        self.o = Projection(width, dims.d_model, "o", bias=True)
        self.direct = Projection(inputs, dims.d_model, "o") if config.direct else None

    def state_spec(self) -> StateSpec:
        n = self.config.context - 1
        return {"x": StateField("row", (n, self.d_model))} if n else {}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        before = state.read("x") if state is not None else None
        seen = windows(x, self.config.context, 1, ctx, before).flatten(2)
        if state is not None and before is not None:
            state.write(x=tail(x, before, ctx))
        y = self.o(self.up(seen).tanh())
        return (y if self.direct is None else y + self.direct(seen)), {}

    def _products(self) -> list[Projection]:
        return [p for p in (self.up, self.o, self.direct) if p is not None]

    def flops(self, n_queries: int, n_keys: int) -> int:
        return 2 * n_queries * sum(p.d_in * p.d_out for p in self._products())

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in self._products())
