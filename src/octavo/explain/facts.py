"""What a page says of a component that can be found out: shapes from a real pass, costs, settings, promises."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import octavo
from octavo.laws.components import Component, Size
from octavo.laws.model import LAWS
from octavo.models.cost import state_bytes
from octavo.models.decoder import Decoder, build
from octavo.nn.activation import ACTIVATIONS
from octavo.nn.contracts import Inputs, Memory, Mixer
from octavo.nn.norm import Norm
from octavo.nn.rope import RotaryPositions
from octavo.nn.rope_scaling import rope_frequencies
from octavo.nn.state import StateSpec

SHOWN = Size(d_model=64, n_heads=4, n_kv_heads=4, max_seq_len=64)
ROWS, TOKENS = 2, 32
COUNTED = Size(d_model=512, n_heads=8, n_kv_heads=8, max_seq_len=2048)
COUNTED_TOKENS = 1024

Row = tuple[str, ...]


def model_around(component: Component, size: Size, device: str = "cpu") -> Decoder:
    """The first of the small models around it, at ``size``."""
    values = next(iter(component.models(size).values()))
    return build(Decoder.Config.model_validate({**values, "n_layers": 1, "pattern": None}), device=device)


def examined(component: Component, model: Decoder) -> nn.Module:
    """The module of ``model`` that a page is about; a reader's and an activation's is the mixer it stands in."""
    table = component.tables[0]
    if table in ("position", "scaling"):
        return model.positions
    if table == "norm":
        return next(module for module in model.modules() if isinstance(module, Norm))
    return model.mixers()[{"channel": "0.channel", "activation": "0.channel", "cross": "0.cross"}.get(table, "0.mixer")]


@functools.cache
def shapes(component: Component) -> list[Row]:
    """Name, shape and meaning of what goes in and out in a real pass, every parameter, every field of the state."""
    model = model_around(component, SHOWN).eval()
    part, table, seen = examined(component, model), component.tables[0], []
    hook = part.register_forward_hook(lambda _, given, got: seen.append((given, got)))
    tokens = torch.randint(model.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), hook:
        model(Inputs(tokens, memory=_memory(tokens) if table == "cross" else None))
    rows: list[Row] = []
    if table in ("position", "scaling"):
        rows += _of_positions(model)
    else:
        given, got = seen[0]
        rows += [("x", _shape(given[0]), "input"), ("y", _shape(got[0] if isinstance(got, tuple) else got), "output")]
    if table not in ("reader", "activation"):
        rows += parameters(part)
    if isinstance(part, Mixer) and table != "activation":
        rows += state_fields(part.state_spec())
    return rows


def _memory(tokens: Tensor) -> Memory:
    """As long as ``tokens`` (B, T), so that a page speaks of one length."""
    return Memory(torch.zeros(*tokens.shape, SHOWN.d_model), torch.ones_like(tokens, dtype=torch.bool))


def _of_positions(model: Decoder) -> list[Row]:
    ctx = model.new_state(ROWS).begin(Inputs(torch.zeros(ROWS, TOKENS, dtype=torch.long)))
    x = torch.zeros(ROWS, TOKENS, SHOWN.d_model)
    rows: list[Row] = [
        ("x", _shape(x), "input"),
        ("embed(x)", _shape(model.positions.embed(x, ctx.positions)), "output"),
    ]
    if (rotation := model.positions.rotation(ctx.positions)) is not None:
        rows += [("cos", _shape(rotation.cos), "rotation"), ("sin", _shape(rotation.sin), "rotation")]
    if model.positions.biased:
        rows.append(("bias", _shape(model.positions.bias(ctx, ctx.keys)), "added to scores"))
    return rows


def parameters(part: nn.Module) -> list[Row]:
    """Name, shape and role of each parameter; "own" where it is not in a product with a role."""
    return [
        (name, _shape(value), str(getattr(part.get_submodule(name.rpartition(".")[0]), "role", "own")))
        for name, value in part.named_parameters()
    ]


def state_fields(spec: StateSpec) -> list[Row]:
    """Name, shape of an entry, and its kind with the bytes of a row of COUNTED_TOKENS tokens in float32."""
    return [
        (
            name,
            _shape(field),
            f"state, {field.kind}: {field.n_bytes(COUNTED_TOKENS, torch.float32, COUNTED_TOKENS):,} bytes",
        )
        for name, field in spec.items()
    ]


def _shape(of: Any) -> str:
    dims = tuple(of.shape)
    return " x ".join(map(str, dims)) or "scalar"


@functools.cache
def costs(component: Component) -> list[Row]:
    """Name and figure, for one layer at COUNTED; nothing for what has neither weights nor products of its own."""
    table = component.tables[0]
    if table in ("scaling", "activation"):
        return []
    part = examined(component, model_around(component, COUNTED, "meta"))
    count = part.predicted_parameters()  # type: ignore[operator]
    if not isinstance(part, Mixer):
        return [("parameters", f"{count:,}")]
    T, bytes_of = COUNTED_TOKENS, lambda n: state_bytes({"": part.state_spec()}, n, torch.float32, T)
    return [
        ("parameters", f"{count:,}"),
        ("FLOPs of a row", f"{part.flops(T, T):,}"),
        # A memory's keys and values are not made again for it.
        *([] if table == "cross" else [("FLOPs of the next token", f"{part.flops(1, T):,}")]),
        ("state bytes of a row", f"{bytes_of(T):,}"),
        ("state bytes of a row twice as long", f"{bytes_of(2 * T):,}"),
    ]


@functools.cache
def frequencies(component: Component) -> list[Row]:
    """Pair, wavelength in tokens without and with the scaling, for a few pairs of a head of 64 channels."""
    model = model_around(component, COUNTED, "meta")
    assert isinstance(model.positions, RotaryPositions)
    plain, scaled = rope_frequencies(model.positions.dim, model.positions.config.theta), model.positions.table()
    if scaled.shape != plain.shape:
        return []
    waves = lambda f: f"{2 * torch.pi / float(f):,.1f}" if float(f) else "never turns"  # noqa: E731
    pairs = sorted({0, len(plain) // 4, len(plain) // 2, 3 * len(plain) // 4, len(plain) - 1})
    return [(str(i), waves(plain[i]), waves(scaled[i])) for i in pairs]


def activation_values() -> list[Row]:
    """Name and values at a few points, for every activation."""
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)

    def shown(values: Tensor) -> tuple[str, ...]:
        return tuple(f"{value:.4f}".replace("-0.0000", "0.0000") for value in values.tolist())

    return [("x", *(f"{v:g}" for v in x.tolist())), *((name, *shown(f(x))) for name, f in ACTIVATIONS.items())]


def settings(config: Any) -> list[Row]:
    """Name, what it may be, default and description of each setting but the kind."""
    schema = config.model_json_schema()
    needed, definitions = schema.get("required", ()), schema.get("$defs", {})
    return [
        (name, _type(prop, definitions), "required" if name in needed else _value(prop.get("default")),
         prop.get("description", ""))
        for name, prop in schema["properties"].items()
        if name != "kind"
    ]  # fmt: skip


def _type(prop: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in prop:
        target = definitions[prop["$ref"].rpartition("/")[2]]
        kind = target.get("properties", {}).get("kind", {})
        return f"`{kind['const']}`" if "const" in kind else _type(target, definitions)
    for several in ("anyOf", "oneOf"):
        if several in prop:
            return " or ".join(dict.fromkeys(_type(one, definitions) for one in prop[several]))
    if "enum" in prop:
        return ", ".join(f"`{value}`" for value in prop["enum"])
    if "const" in prop:
        return f"`{prop['const']}`"
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = ", ".join(f"{sign} {prop[name]:g}" for name, sign in limits.items() if name in prop)
    if prop.get("type") == "array":
        return f"list of {_type(prop.get('items', {}), definitions)}"
    return " ".join(filter(None, (prop.get("type", "any"), bounds)))


def _value(default: Any) -> str:
    if isinstance(default, Mapping):
        return f"`{default.get('kind', dict(default))}`"
    return "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


@functools.cache
def promises(component: Component) -> tuple[list[str], list[str]]:
    """The laws that are asked of it, and those that are not because it does not promise what they say."""
    asked: list[str] = []
    for values in component.models().values():
        promised = build(Decoder.Config.model_validate(values), device="meta").capabilities
        asked += [name for name, law in LAWS.items() if law.asked(promised) and name not in asked]
    ordered = [name for name in LAWS if name in asked]
    return ordered, [name for name in LAWS if name not in asked]


def source(component: Component) -> str:
    """The file of its code: below the project for ours, whole for others."""
    of = component.cls if isinstance(component.cls, type) else ACTIVATIONS["identity"]
    path = Path(inspect.getsourcefile(of) or "")
    package = Path(octavo.__file__).parent
    return f"src/octavo/{path.relative_to(package).as_posix()}" if path.is_relative_to(package) else str(path)


def parity_rows(parity: Any) -> list[Row]:
    """Reference, cases, and the error in each precision."""
    found = []
    for one in parity:
        errors = asdict(one)
        shown = [
            "" if errors[d] is None else "0" if errors[d] == 0 else f"{errors[d]:.1e}" for d in ("fp32", "bf16", "fp64")
        ]
        found.append((one.reference, str(one.cases), *shown))
    return found
