"""How a folder of our own says that its weight products are quantised: ``quantization`` in config.json.

``weights`` is how products are stored, ``others`` names those that are stored in another way, or null for as they were.
Codes and scales stand in the safetensors file as ``NAME.codes`` and ``NAME.scales``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from octavo.errors import CheckpointError, ConfigError
from octavo.nn.projection import GroupedProjection, Projection
from octavo.nn.quantized import Float8Weights, IntegerWeights, Storage, empty_for, put, quantized_modules

KEY = "quantization"
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
