"""What a model of any shape weighs and costs, counted without a weight in memory: the figures of papers, recomputed.

The counts are exact for what is written here (``models.cost``); times and shares of a peak rate are divisions of them
by figures that somebody else gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from octavo.config import Recipe, apply_overrides, explain
from octavo.errors import ConfigError, ConfigErrors
from octavo.models.cost import active_parameters, cost, further_parameters, state_bytes
from octavo.models.decoder import build
from octavo.models.tables import MODELS
from octavo.predictors.settings import CountedConfig
from octavo.presets import expand, presets
from octavo.schema import Config, one_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Count:
    """One model, counted for rows of ``length`` tokens.

    parameters: all but ``further``, those of modules for further tokens. active: read by one token's pass.
    tables: of the embedding and learned positions. state_per_token: bytes the decode state grows by with each token
    while it grows; state_constant: bytes it has before; state: at ``length``. all_heads_per_token: bytes if every
    attention layer kept a key and a value of head_dim for each of its query heads. forward_flops and train_flops: a
    token's, attention over the full square of a row as in ``cost``.
    """

    name: str
    length: int
    dtype: str
    parameters: int
    further: int
    active: int
    tables: int
    state_per_token: int
    state_constant: int
    state: int
    all_heads_per_token: int
    forward_flops: float
    train_flops: float


def count(config: Any, name: str, length: int | None = None, dtype: str = "bf16") -> Count:
    """Count a model's configuration; ``length`` is max_seq_len, but 4,096 at most, if not given."""
    model = build(config, device="meta")
    rows = length or min(model.max_seq_len, 4096)
    kept, specs = DTYPES[dtype], model.state_specs()
    one, two = (state_bytes(specs, n, kept) for n in (1, 2))
    total = cost(model, rows, kept)
    further = further_parameters(model)
    return Count(
        name, rows, dtype,
        parameters=total.parameters - further,
        further=further,
        active=active_parameters(model),
        tables=total.embedding_parameters,
        state_per_token=two - one,
        state_constant=2 * one - two,
        state=total.state_bytes,
        all_heads_per_token=kept.itemsize * sum(_head_channels(mixer) for mixer in model.mixers().values()),
        forward_flops=total.forward_flops / rows,
        train_flops=total.train_flops / rows,
    )  # fmt: skip


def _head_channels(mixer: Any) -> int:
    """Channels of a key and a value for each query head of an attention."""
    if getattr(mixer.config, "kind", "") not in ("attention", "mla"):
        return 0
    return 2 * mixer.n_heads * mixer.head_dim


@dataclass(frozen=True)
class Training:
    """A training of ``tokens``: its FLOPs, and what follows from a rate or from the hours it took.

    rate: FLOP/s of one device, given or (``hours`` given) implied; share: of ``peak``, if that is given.
    """

    tokens: float
    flops: float
    device: str = "device"
    rate: float | None = None
    hours: float | None = None
    peak: float | None = None

    @property
    def share(self) -> float | None:
        return self.rate / self.peak if self.rate and self.peak else None


def training(
    counted: Count, tokens: float, *, rate: float | None = None, hours: float | None = None, peak: float | None = None,
    device: str = "device",
) -> Training:  # fmt: skip
    """What ``tokens`` of training take, in device hours at ``rate``, or the rate that ``hours`` mean."""
    flops = counted.train_flops * tokens
    if hours is None:
        hours = flops / rate / 3600 if rate else None
    else:
        rate = flops / (hours * 3600)
    return Training(tokens, flops, device, rate, hours, peak)


def shape(given: str, overrides: Sequence[str] = ()) -> tuple[str, Any]:
    """The name and configuration of a preset, a model folder, a run or a recipe.

    Args:
        overrides: ``model.key=value`` for a preset, any of a recipe's for a recipe.

    Raises:
        ConfigError: it is none of them, or a folder with overrides.
    """
    if given in presets():
        raw = apply_overrides({"model": {"preset": given}}, overrides)
        if odd := [key for key in raw if key != "model"]:
            raise ConfigError(f"{odd[0]} is no key of a preset", fix="override model.KEY=VALUE")
        return given, _model({"model": expand(raw["model"])}, given)
    if Path(given).is_dir():
        if overrides:
            raise ConfigError(f"{given} is a folder: its shape is what it is", fix="leave the overrides out")
        return given, _of_folder(Path(given))
    from octavo.plan import model_of

    recipe = Recipe.load(given, overrides)
    if isinstance(recipe.model, CountedConfig):
        raise ConfigError(f"the model of {given} is counted from text and has no weights", fix="count a neural one")
    return given, model_of(recipe)


class _Shape(Config):
    model: one_of(MODELS)  # type: ignore[valid-type]


def _model(raw: dict[str, Any], where: str) -> Any:
    try:
        return _Shape.model_validate(raw).model
    except ValidationError as error:
        raise ConfigErrors(explain(_Shape, raw, error, where, {})) from None


def _of_folder(folder: Path) -> Any:
    """What a folder's config.json and the names of its tensors say."""
    from octavo.hub.folder import NATIVE, family_of, model_config, read_config, tensor_names
    from octavo.run import find_model

    place = find_model(str(folder))
    hf: Mapping[str, Any] = read_config(place)
    if hf["model_type"] != NATIVE and (names := tensor_names(place)):
        hf = family_of(hf["model_type"]).of(hf).borne_out(hf, names)
    return model_config(hf)
