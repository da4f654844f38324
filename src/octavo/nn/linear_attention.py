"""Linear attention: a feature map in the place of the softmax, so that a text is a sum that a state can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from octavo.nn.chunked import Form, scan
from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Mixer, full_precision
from octavo.nn.projection import Projection
from octavo.nn.state import LayerState, StateSpec, recurrence_field
from octavo.schema import Config

FeatureMap = Literal["elu", "relu", "identity"]
FEATURE_MAPS: dict[FeatureMap, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
}


class LinearAttention(Mixer):
    """``y_t = f(q_t) S_t / (f(q_t) z_t)`` per head, ``S_t = S_{t-1} + f(k_t) v_t^T``, ``z_t = z_{t-1} + f(k_t)``.

    f is elu(x) + 1 (Katharopoulos et al. 2020, sections 3.2 to 3.4, equations 18 to 20), relu, or the identity. Without
    ``normalise`` nothing is divided by; with the identity nothing can be, because the sum may be zero. The sum z is
    carried as a last column of S, and ``eps`` is added to the divisor, as in the authors' code. ``backend``: the
    recurrence (plain), the squared form (parallel), or chunks, see nn/chunked.py. Nothing is rotated.
    """

    capabilities = Capabilities(constant_state=True)

    class Config(Config):
        kind: Literal["linear_attention"] = "linear_attention"
        n_heads: int = Field(default=8, ge=1)
        head_dim: int | None = Field(default=None, ge=1, description="default: d_model / n_heads")
        feature_map: FeatureMap = "elu"
        normalise: bool = True
        eps: float = Field(default=1e-6, ge=0)
        bias: bool = False
        chunk: int = Field(default=64, ge=1, description="tokens a matrix product spans; changes the time only")
        backend: Form = "auto"

        @model_validator(mode="after")
        def _divisible(self) -> LinearAttention.Config:
            if self.normalise and self.feature_map == "identity":
                raise ValueError("normalise needs a feature_map that is not negative: elu or relu")
            return self

    def __init__(self, config: LinearAttention.Config, dims: Dims):
        super().__init__()
        D, H = dims.d_model, config.n_heads
        if not config.head_dim and D % H:
            raise ValueError(f"n_heads = {H} must divide d_model = {D}, or head_dim must be given")
        self.config, self.n_heads, self.head_dim = config, H, config.head_dim or D // H
        self.q, self.k, self.v = (Projection(D, H * self.head_dim, role, bias=config.bias) for role in "qkv")
        self.o = Projection(H * self.head_dim, D, "o", bias=config.bias)

    @property
    def _columns(self) -> int:
        return self.head_dim + self.config.normalise

    def state_spec(self) -> StateSpec:
        return {"h": recurrence_field((self.n_heads, self.head_dim, self._columns), self.o.weight)}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        B, T, _ = x.shape
        features = FEATURE_MAPS[self.config.feature_map]
        q, k, v = (
            full_precision(product(x)).view(B, T, self.n_heads, self.head_dim)
            for product in (self.q, self.k, self.v)
        )  # fmt: skip
        v = F.pad(v, (0, 1), value=1.0) if self.config.normalise else v
        before = None if state is None else state.read("h")
        y, after = scan(
            features(q), features(k), v, None, ctx, before, form=self.config.backend, chunk=self.config.chunk
        )
        if state is not None:
            state.write(h=after)
        if self.config.normalise:
            y = y[..., :-1] / (y[..., -1:] + self.config.eps)
        return self.o(y.reshape(B, T, -1).to(x.dtype)), {}

    def flops(self, n_queries: int, n_keys: int) -> int:
        products = sum(p.d_in * p.d_out for p in (self.q, self.k, self.v, self.o))
        return 2 * n_queries * (products + 2 * self.n_heads * self.head_dim * self._columns)

    def predicted_parameters(self) -> int:
        return sum(p.n_parameters() for p in (self.q, self.k, self.v, self.o))
