"""The schemes by name: how weights are stored, and what is left as it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from octavo.errors import ConfigError, did_you_mean
from octavo.nn.quantized import Float8Weights, IntegerWeights
from octavo.schema import Config

KEPT_ROLES = frozenset({"router"})
"""Products that stay: a router's are few, and decide which experts are asked."""


class Scheme(Config):
    """How a model's weight products are stored.

    Everything else stays as it is: norms, biases, convolutions, routers, and the embedding, from which a token reads
    one row. A head that was tied to the embedding becomes a product of its own and is quantised like the others.
    """

    weights: IntegerWeights | Float8Weights = Field(default=IntegerWeights(), discriminator="kind")
    head: Literal["same", "int8", "kept"] = Field(default="same", description="the head: like the others, or milder")


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(weights=IntegerWeights(bits=8, group=64)),
    "int4": Scheme(weights=IntegerWeights(bits=4, group=32)),
    "int8-dynamic": Scheme(weights=IntegerWeights(bits=8, group=None, activations="int8")),
    "fp8": Scheme(weights=Float8Weights(format="e4m3")),
    "fp8-e5m2": Scheme(weights=Float8Weights(format="e5m2")),
    "fp8-blocks": Scheme(weights=Float8Weights(format="e4m3", block=128, activations="float8")),
}


def scheme_of(name: str, *, group: int | None = None, head: str | None = None) -> Scheme:
    """The scheme of a name.

    Args:
        group: inputs that share a scale, 0 for whole rows; by default what the scheme has.
        head: ``same``, ``int8`` or ``kept``.

    Raises:
        ConfigError: no such scheme, or a setting that it cannot have.
    """
    if name not in SCHEMES:
        raise ConfigError(f"there is no scheme {name!r}", fix=did_you_mean(name, SCHEMES, thing="scheme"))
    scheme = SCHEMES[name]
    weights = scheme.weights
    try:
        if group is not None:
            if isinstance(weights, Float8Weights):
                raise ConfigError(f"{name} has no groups", fix="leave --group out")
            weights = IntegerWeights.model_validate(weights.model_dump() | {"group": group or None})
        return Scheme.model_validate({"weights": weights.model_dump(), "head": head or scheme.head})
    except ValidationError as invalid:
        error = invalid.errors()[0]
        said = f"{error['loc'][-1]} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
        raise ConfigError(said, fix="groups are 32, 64, 128 or 0; the head is same, int8 or kept") from None
