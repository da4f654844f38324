"""How a folder of our own says that its weight products are quantised: ``quantization`` in config.json; and how codes
of another program's file come into a model without loss.

``weights`` is how products are stored, ``others`` names those that are stored in another way, or null for as they were.
Codes and scales stand in the safetensors file as ``NAME.codes`` and ``NAME.scales``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from octavo.errors import CheckpointError, ConfigError
from octavo.hub.family import Entry
from octavo.nn.projection import GroupedProjection, Projection
from octavo.nn.quantized import (
    ZERO,
    Float8Weights,
    IntegerWeights,
    QuantizedProjection,
    Storage,
    empty_for,
    from_codes,
    packed,
    put,
    quantized_modules,
    unpacked,
)

KEY = "quantization"
TOGETHER = ({"q", "k", "v"}, {"gate", "up"})
"""Products that read the same inputs and are made as one."""
STORAGE: TypeAdapter[Storage] = TypeAdapter(Float8Weights | IntegerWeights)


def described(model: nn.Module) -> dict[str, Any] | None:
    """What config.json says of the products of ``model``; None if they are not quantised."""
    small = quantized_modules(model)
    if not small:
        return None
    kinds = {name: module.storage.model_dump(mode="json") for name, module in small.items()}
    usual = max(Counter(map(str, kinds.values())).items(), key=lambda item: item[1])[0]
    weights = next(kind for kind in kinds.values() if str(kind) == usual)
    others: dict[str, Any] = {name: kind for name, kind in kinds.items() if kind != weights}
    others |= dict.fromkeys(n for n, m in model.named_modules() if isinstance(m, Projection | GroupedProjection))
    return {"weights": weights, "others": others}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Codes and scales by their names in the file."""
    small = quantized_modules(model)
    return {f"{name}.{part}": getattr(m, part) for name, m in small.items() for part in ("codes", "scales")}


def make_small(model: nn.Module, words: Any) -> None:
    """Put quantised products, without values, where config.json says so.

    Raises:
        CheckpointError: it says nothing that can be meant.
    """
    try:
        if not isinstance(words, Mapping) or set(words) != {"weights", "others"}:
            raise ValueError("it has weights and others")
        usual = STORAGE.validate_python(words["weights"])
        others = {n: None if kind is None else STORAGE.validate_python(kind) for n, kind in words["others"].items()}
        products = {n: m for n, m in model.named_modules() if isinstance(m, Projection | GroupedProjection)}
        if unknown := [name for name in others if name not in products]:
            raise ValueError(f"others names {unknown[0]!r}, which is no product of this model")
    except (ValidationError, ValueError, AttributeError, TypeError) as error:
        lines = str(error).splitlines()
        raise CheckpointError(f"config.json does not make sense: {KEY}: {lines[0]}", fix="restore the file") from None
    with torch.device("meta"):
        for name, module in products.items():
            storage = others.get(name, usual)
            if storage is not None:
                put(model, name, empty_for(module, storage))


def fill_small(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give quantised products their codes and scales, whose names and shapes have been checked.

    Raises:
        CheckpointError: a tensor of another number format.
    """
    for name, module in quantized_modules(model).items():
        for part in ("codes", "scales"):
            own, found = getattr(module, part), tensors[f"{name}.{part}"]
            if found.dtype != own.dtype:
                raise CheckpointError(
                    f"{name}.{part} holds {found.dtype}, expected {own.dtype}", fix="restore the file"
                )
            setattr(module, part, found.contiguous())
        module.like = torch.zeros(0, dtype=dtype)


def refuse(family: str) -> ConfigError:
    """The refusal to write a quantised model in a layout that has no words for it."""
    return ConfigError(
        f"the model's weights are quantised, and {family} has no words for that here",
        fix="give --dequantize, or write it as octavo",
    )


# ------------------------------------------------------------------------------------- codes of other files


@dataclass(frozen=True)
class Codes:
    """A weight (N, K) of integers in groups of 32 inputs, in the form of ``QuantizedProjection``.

    codes: (N, K) uint8, for 4 bits two a byte; scales: (N, K / 32) float16; ``kind`` is the file's word for it.
    """

    bits: Literal[4, 8]
    codes: Tensor
    scales: Tensor
    kind: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), 32 * self.scales.shape[1]

    def unpacked(self) -> Tensor:
        return unpacked(self.codes, self.shape[1], self.bits)

    def plain(self) -> Tensor:
        """What the codes stand for, in float32."""
        return from_codes(self.unpacked(), self.scales, self.bits)

    def wider(self) -> Codes:
        """The same weight in 8 bits."""
        if self.bits == 8:
            return self
        return Codes(8, packed(self.unpacked() + (ZERO[8] - ZERO[self.bits]), 8), self.scales, self.kind)


def settle(
    model: nn.Module, entries: Sequence[Entry], tensors: Mapping[str, Tensor | Codes], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Codes]]:
    """Which products of ``model`` keep the codes of a file: the file's tensors, and codes by the name of a product.

    For what is kept a tensor without values stands among the tensors, so that names and shapes are checked as always.
    Anything else than a product, such as the embedding, and products of which others that are made with them have no
    codes, become plain. Where some of them have 4 bits and others 8, all have 8: the numbers stay the same.
    """
    found: dict[str, Codes] = {}
    source: dict[str, str] = {}
    products = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, Projection)}
    for entry in entries:
        small = tensors.get(entry.theirs)
        if not isinstance(small, Codes) or entry != Entry(entry.theirs, entry.ours):
            continue
        names = [name.removesuffix(".weight") for name in entry.ours]
        modules = [products.get(name) for name in entry.ours]
        if sizes := [(m.d_out, m.d_in) for m in modules if isinstance(m, Projection)]:
            rows = [n for n, _ in sizes]
            if len(rows) == len(names) and (sum(rows), sizes[0][1]) == small.shape:
                parts = zip(small.codes.split(rows), small.scales.split(rows), strict=True)
                found |= {n: Codes(small.bits, *p, small.kind) for n, p in zip(names, parts, strict=True)}
                source |= dict.fromkeys(names, entry.theirs)
    _alike(model, found)
    kept = {source[name] for name in found}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Codes):
            plain[name] = tensor
        elif name in kept:
            plain[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
        else:
            plain[name] = tensor.plain()
    return plain, found


def _alike(model: nn.Module, found: dict[str, Codes]) -> None:
    """Give products that are made as one the same bits, in place; or none of them codes."""
    for parent in {name.rpartition(".")[0] for name in found}:
        for leaves in TOGETHER:
            mixer = model.get_submodule(parent)
            names = [f"{parent}.{leaf}" for leaf in leaves if isinstance(getattr(mixer, leaf, None), Projection)]
            if not all(name in found for name in names):
                for name in names:
                    found.pop(name, None)
            elif len({found[name].bits for name in names}) > 1:
                found.update({name: found[name].wider() for name in names})


def place(model: nn.Module, found: Mapping[str, Codes], dtype: torch.dtype) -> None:
    """Put quantised products with these codes where ``model`` has plain ones; their biases stay."""
    for name, codes in found.items():
        module = model.get_submodule(name)
        assert isinstance(module, Projection)
        with torch.device("meta"):
            made = empty_for(module, IntegerWeights(bits=codes.bits, group=32))
        made.codes, made.scales = codes.codes.clone(), codes.scales.clone()  # not a piece of what others hold
        made.like = torch.zeros(0, dtype=dtype)
        if module.bias is not None:
            made.bias = module.bias
        put(model, name, made)


def codes_of(modules: Sequence[nn.Module]) -> Codes | None:
    """Products that are stacked in a file, as codes in groups of 32, if that is what they are; wider groups repeat."""
    if not all(isinstance(m, QuantizedProjection) and m.group % 32 == 0 for m in modules):
        return None
    if len({m.bits for m in modules}) > 1:  # type: ignore[union-attr]
        return None
    scales = [m.scales.repeat_interleave(m.group // 32, 1) for m in modules]  # type: ignore[union-attr, operator]
    return Codes(modules[0].bits, torch.cat([m.codes for m in modules]), torch.cat(scales))  # type: ignore[union-attr, arg-type]


def read_as(model: nn.Module, quantised: Mapping[str, str]) -> str:
    """What became of a file's quantised tensors, which are named with their types; empty where there were none."""
    if not quantised:
        return ""
    types = Counter(quantised.values())
    said = ", ".join(f"{n} x {kind}" for kind, n in sorted(types.items()))
    kept = Counter(m.bits for m in quantized_modules(model).values() if isinstance(m, QuantizedProjection))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    words = [f"{n} product{'s keep their' if n > 1 else ' keeps its'} codes (int{b})" for b, n in sorted(kept.items())]
    return f"{said}: {', '.join([*words, f'all else is {dtype}' if words else f'dequantised to {dtype}'])}"
