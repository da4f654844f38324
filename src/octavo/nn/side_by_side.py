"""Several token mixers over the same input, added up: heads of attention beside a state space in one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor, nn

from octavo.nn.contracts import Aux, Capabilities, Context, Dims, Heads, Keys, Mixer
from octavo.nn.state import LayerState, StateSpec
from octavo.schema import Config as Base
from octavo.schema import component


class SideBySide(Mixer):
    """``sum_i s_i f_i(x)`` with mixers f_i and fixed scales s_i.

    Source: Dong et al. 2024 (Hymba), section 2.1; Falcon-LLM Team 2025 (Falcon-H1), section 2.1. There is no norm
    of each output before the sum, as in Falcon-H1. State: the mixers' fields, each name led by its mixer's.
    """

    table: Mapping[str, type[Mixer]] = {}  # TOKEN_MIXERS, once it is whole

    class Config(Base):
        kind: Literal["side_by_side"] = "side_by_side"
        mixers: dict[str, SerializeAsAny[Base]] = Field(
            default_factory=lambda: {"attention": _config({"kind": "attention", "n_heads": 4})},
            min_length=1,
            description="token mixers by a name",
        )
        scales: dict[str, float] = Field(default={}, description="by the same names; default: 1")

        @field_validator("mixers", mode="before")
        @classmethod
        def _choose(cls, mixers: Any) -> Any:
            if not isinstance(mixers, Mapping):
                return mixers
            return {name: value if isinstance(value, Base) else _config(value) for name, value in mixers.items()}

        @field_validator("scales")
        @classmethod
        def _named(cls, scales: dict[str, float], info: Any) -> dict[str, float]:
            if unknown := sorted(set(scales).difference(info.data.get("mixers", scales))):
                raise ValueError(f"scales names {unknown}, which are no mixers")
            return scales

    def __init__(self, config: SideBySide.Config, dims: Dims):
        super().__init__()
        made = {name: component(self.table, own.kind)(own, dims) for name, own in config.mixers.items()}  # type: ignore[attr-defined]
        self.parts = nn.ModuleDict(made)
        self.scales = {name: config.scales.get(name, 1.0) for name in made}
        promises = [part.capabilities for part in made.values()]
        fields = Capabilities.__dataclass_fields__
        kept = {f: all(getattr(p, f) for p in promises) for f in fields}
        self.capabilities = Capabilities(**kept)  # type: ignore[misc]

    @classmethod
    def heads(cls, config: SideBySide.Config, d_model: int) -> Heads | None:
        found = [component(cls.table, own.kind).heads(own, d_model) for own in config.mixers.values()]  # type: ignore[attr-defined]
        wanted = {heads for heads in found if heads is not None}
        if len(wanted) > 1:
            raise ValueError(f"mixers have heads of several kinds, {sorted(wanted)}: one position scheme serves one")
        return wanted.pop() if wanted else None

    def named(self) -> dict[str, Mixer]:
        """The mixers by name."""
        return dict(self.parts.items())  # type: ignore[arg-type]

    def state_spec(self) -> StateSpec:
        parts = self.named().items()
        return {f"{name}.{field}": spec for name, part in parts for field, spec in part.state_spec().items()}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        total, aux = None, {}
        for name, part in self.named().items():
            own = _Part(state, name) if state is not None and part.state_spec() else None
            y, new = part(x, ctx, own)
            y = y if self.scales[name] == 1 else y * self.scales[name]
            total = y if total is None else total + y
            aux |= {key: aux[key] + value if key in aux else value for key, value in new.items()}
        assert total is not None
        return total, aux

    def flops(self, n_queries: int, n_keys: int) -> int:
        return sum(part.flops(n_queries, n_keys) for part in self.named().values())

    def predicted_parameters(self) -> int:
        return sum(part.predicted_parameters() for part in self.named().values())


def _config(value: Any) -> Any:
    value = {"kind": value} if isinstance(value, str) else value
    kind = value.get("kind")
    if not isinstance(kind, str) or (":" not in kind and kind not in SideBySide.table):
        raise ValueError(f"{kind!r} is no token mixer; there are {', '.join(SideBySide.table)}")
    return component(SideBySide.table, kind).Config.model_validate(dict(value))  # type: ignore[attr-defined]


class _Part(LayerState):
    """One mixer's fields of a layer's state."""

    def __init__(self, whole: LayerState, name: str):
        self.whole, self.name = whole, name

    def append(self, ctx: Context, **new: Tensor) -> tuple[Keys, dict[str, Tensor]]:
        keys, held = self.whole.append(ctx, **{f"{self.name}.{field}": value for field, value in new.items()})
        return keys, {field: held[f"{self.name}.{field}"] for field in new}

    def read(self, name: str) -> Tensor:
        return self.whole.read(f"{self.name}.{name}")

    def write(self, **new: Tensor) -> None:
        self.whole.write(**{f"{self.name}.{field}": value for field, value in new.items()})
