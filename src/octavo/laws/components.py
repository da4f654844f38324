"""Every component of every table, and the small models in which each is examined.

What a new line in a table means follows from the table it stands in; only attention and the MLP, which stand beside
the others, are named here.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import did_you_mean
from octavo.nn.activation import ACTIVATIONS
from octavo.nn.attention import HEAD_NORMS
from octavo.nn.contracts import Mixer
from octavo.nn.norm import Norm
from octavo.nn.position import Positions
from octavo.nn.reader import Reader
from octavo.nn.readers import READERS
from octavo.nn.rope_scaling import ROPE_SCALINGS, RopeScaling
from octavo.nn.tables import CHANNEL_MIXERS, CROSS_MIXERS, NORMS, POSITIONS, TOKEN_MIXERS
from octavo.schema import Config, load_object

Model = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The model around a component. The laws' is small enough for hundreds of passes in float64."""

    d_model: int = 16
    n_heads: int = 4
    n_kv_heads: int = 2
    max_seq_len: int = 16

    def model(self, own: Any, /, **settings: Any) -> Model:
        causal = getattr(getattr(own, "capabilities", None), "causal", True)
        small = {"d_model": self.d_model, "n_layers": 2, "vocab_size": 19, "max_seq_len": self.max_seq_len}
        return {**small, **({} if causal else {"causal": False}), **settings}

    @property
    def attention(self) -> dict[str, Any]:
        return {"kind": "attention", "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads}


MLP = {"kind": "mlp", "activation": "gelu"}


def _around_mixer(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    small, attention = functools.partial(size.model, cls), size.attention
    heads = cls.heads(cls.Config.model_validate(own), size.d_model)
    if heads is not None and heads.rotary_width:  # one rotary table serves one width
        attention = {**attention, "head_dim": heads.rotary_width}
    hybrid = {"own": {"mixer": own, "channel": MLP}, "attention": {"mixer": attention, "channel": MLP}}
    return {
        "alone": small(blocks={"own": {"mixer": own, "channel": None}}),
        "hybrid": small(blocks=hybrid, pattern=("own", "attention", "own"), n_layers=3),
        "parallel": small(blocks={"own": {"mixer": own, "channel": MLP, "topology": "parallel"}}),
        "post": small(blocks={"own": {"mixer": own, "channel": MLP, "norm_placement": "post"}}),
    }


def _around_channel(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    small, attention = functools.partial(size.model, cls), size.attention
    sandwich = {"mixer": attention, "channel": own, "norm_placement": "sandwich"}
    return {
        "channel": small(blocks={"own": {"mixer": attention, "channel": own}}),
        "channel sandwich": small(blocks={"own": sandwich}),
    }


def _around_cross(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    small, block = functools.partial(size.model, cls), {"mixer": size.attention, "cross": own, "channel": MLP}
    last = {"first": {"mixer": size.attention}, "last": {"mixer": "lstm", "cross": own, "channel": None}}
    return {
        "between": small(blocks={"own": block}),
        "recurrent, in the last layer": small(blocks=last, n_layers=2),
        "parallel": small(blocks={"own": {**block, "topology": "parallel"}}),
        "post": small(blocks={"own": {**block, "norm_placement": "post"}}),
    }


def _around_norm(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    block = {"mixer": size.attention, "channel": MLP}
    found = {
        place: size.model(cls, norm=own, blocks={"block": {**block, "norm_placement": place}})
        for place in ("pre", "branch", "sandwich", "post")
    }
    shared = {**block, "topology": "parallel", "shared_norm": True}
    found["shared, and of the embedding"] = size.model(cls, norm=own, blocks={"block": shared}, embed_norm=True)
    if own["kind"] in HEAD_NORMS:
        of_heads = {**block, "mixer": {**size.attention, "qk_norm": own}}
        found["of queries and keys"] = size.model(cls, norm=own, blocks={"block": of_heads})
    return found


def _around_positions(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    attention = size.attention
    mixers = {
        "grouped heads": attention,
        "window": {**attention, "window": 5},
        "capped scores": {**attention, "n_kv_heads": size.n_heads, "softcap": 2.0},
    }
    return {name: size.model(cls, positions=own, blocks={"block": {"mixer": m}}) for name, m in mixers.items()}


def _around_scaling(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    mixers = {"half": size.attention, "interleaved": {**size.attention, "window": 5}}
    return {
        layout: size.model(
            cls, positions={"kind": "rope", "layout": layout, "scaling": own}, blocks={"block": {"mixer": mixer}}
        )
        for layout, mixer in mixers.items()
    }


def _around_reader(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    small = functools.partial(size.model, cls)
    mixer = {**size.attention, "reader": own}
    both = {"own": {"mixer": mixer}, "full": {"mixer": size.attention}}
    return {
        "alone": small(blocks={"own": {"mixer": mixer, "channel": None}}),
        "beside full attention": small(blocks=both, n_layers=3),
        "without positions": small(positions="none", blocks={"own": {"mixer": mixer}}),
        "capped scores": small(blocks={"own": {"mixer": {**mixer, "softcap": 2.0}}}),
    }


def _around_activation(own: dict[str, Any], cls: Any, size: Size) -> dict[str, Model]:
    return {
        kind: size.model(None, blocks={"block": {"mixer": size.attention, "channel": {"kind": kind, **own}}})
        for kind in ("mlp", "glu")
    }


@dataclass(frozen=True)
class Table:
    """A table of components: its name for people, its entries, the class that one of a user's own derives from."""

    title: str
    entries: Mapping[str, Any]
    base: type | None
    around: Callable[[dict[str, Any], Any, Size], dict[str, Model]]


TABLES: dict[str, Table] = {
    "mixer": Table("token mixer", TOKEN_MIXERS, Mixer, _around_mixer),
    "channel": Table("channel mixer", CHANNEL_MIXERS, Mixer, _around_channel),
    "cross": Table("cross mixer", CROSS_MIXERS, None, _around_cross),
    "norm": Table("norm", NORMS, Norm, _around_norm),
    "position": Table("position scheme", POSITIONS, Positions, _around_positions),
    "scaling": Table("rope scaling", ROPE_SCALINGS, RopeScaling, _around_scaling),
    "reader": Table("reader", READERS, Reader, _around_reader),
    "activation": Table("activation", ACTIVATIONS, None, _around_activation),
}


@dataclass(frozen=True)
class Component:
    """One value of a table, or a user's own class: ``tables`` names where it can stand."""

    kind: str
    tables: tuple[str, ...]
    cls: Any

    @property
    def own(self) -> bool:
        return ":" in self.kind

    @property
    def name(self) -> str:
        """What it is called by: its kind, with the table before it where two tables have that kind."""
        twice = sum(self.kind in table.entries for table in TABLES.values()) > 1
        return f"{self.tables[0]}-{self.kind}" if twice else self.kind

    @property
    def title(self) -> str:
        return " or ".join(TABLES[table].title for table in self.tables)

    def settings(self, size: Size | None = None) -> dict[str, Any]:
        """The kind, with a value for every setting that has no default."""
        if "activation" in self.tables:
            return {"activation": self.kind}
        values = {"kind": self.kind, **required(self.cls.Config, size or Size())}
        if self.kind == "attention":  # its default of eight heads leaves two channels each
            values["n_heads"] = (size or Size()).n_heads
        return values | small_reading(self.cls.Config, values) if size in (None, Size()) else values

    def models(self, size: Size | None = None, **settings: Any) -> dict[str, Model]:
        """Small models that put it to every use, by the name of the use."""
        size = size or Size()
        own = {**self.settings(size), **settings}
        found: dict[str, Model] = {}
        for table in self.tables:
            found |= TABLES[table].around(own, self.cls, size)
        return found


def components() -> list[Component]:
    """Every value of every table, table by table."""
    return [Component(kind, (name,), cls) for name, table in TABLES.items() for kind, cls in table.entries.items()]


def find(name: str) -> Component:
    """The component of that name: a table's, or a user's own by ``package.module:Class``.

    Raises:
        LookupError: no table has it.
        ValueError: a class that cannot be imported, or is no component.
    """
    if ":" in name:
        cls = load_object(name)
        tables = tuple(
            key for key, table in TABLES.items() if table.base and isinstance(cls, type) and issubclass(cls, table.base)
        )
        if not tables:
            bases = sorted({table.base.__name__ for table in TABLES.values() if table.base})
            raise ValueError(f"{name} is not a class derived from one of {', '.join(bases)}")
        if not isinstance(getattr(cls, "Config", None), type):
            raise ValueError(f"{name} has no nested Config class derived from octavo.schema.Config")
        return Component(name, tables, cls)
    found = {component.name: component for component in components()}
    if name not in found:
        raise LookupError(f"there is no component {name!r}; {did_you_mean(name, found)}")
    return found[name]


# The laws' texts are short: a reader is asked where its windows, blocks and choices are smaller than they are.
SMALL_READING: dict[str, int] = {
    "window": 5, "n_sinks": 2, "top_k": 2, "block": 2, "representatives": 1, "chunk": 2, "n_chunks": 3, "recent": 1,
}  # fmt: skip


def small_reading(config: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Small numbers for the settings of a reader that have large ones; none for what is not a reader."""
    if config not in [getattr(reader, "Config", None) for reader in READERS.values()]:
        return {}
    found = {
        name: small
        for name, small in SMALL_READING.items()
        if name in config.model_fields
        and isinstance(default := config.model_fields[name].default, int)
        and default > small
    }
    try:
        config.model_validate({**values, **found})
    except ValueError:
        return {}
    return found


# What a setting without a default is in the small models, by its name; ``Field(examples=[...])`` goes before.
BY_NAME: dict[str, Any] = {"original": 8, "extended": 64, "factor": 4.0, "window": 5, "stride": 3, "n_windows": 2}


def required(config: type[Config], size: Size) -> dict[str, Any]:
    """A value for each setting of ``config`` that has no default.

    The first of the field's ``examples``, else one for its name, else a plain one of its type; a list of numbers
    has one for each rotated pair of channels.
    """
    found: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        if field.is_required():
            lists = typing.get_origin(field.annotation) in (tuple, list)
            if field.examples:
                found[name] = field.examples[0]
            elif lists:
                found[name] = [1.0 + pair / 2 for pair in range(size.d_model // size.n_heads // 2)]
            else:
                found[name] = BY_NAME.get(name, {int: 4, float: 2.0, str: "x"}.get(field.annotation, 1))  # type: ignore[arg-type]
    return found
