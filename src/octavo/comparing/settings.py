"""What a comparison is: a recipe that all share, what each model changes in it, and what each may spend."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from octavo.config import Recipe, apply_overrides, explain, read_mapping
from octavo.errors import ConfigError, ConfigErrors, did_you_mean
from octavo.schema import Config

MAX_MODELS = 200


class Budget(Config):
    """What a model may spend on training, in one of three currencies; models that count take one pass in any case.

    seconds: processor time of the steps, validation left out. tokens: trained on. flops: of matrix products, forward
    and backward.
    """

    seconds: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    flops: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(value is not None for value in (self.seconds, self.tokens, self.flops)) != 1:
            raise ValueError("budget is one of seconds, tokens and flops")
        return self

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:g} CPU seconds"
        return f"{self.tokens:,} tokens" if self.tokens is not None else f"{self.flops:.3g} FLOPs"


class Pairs(Config):
    """Minimal pairs that every model is asked about; ``at_most`` of each file."""

    paths: tuple[str, ...]
    at_most: int | None = Field(default=None, ge=1)


class Comparison(Config):
    """Models of one bench. ``models`` maps a name to what differs from ``base``, a recipe.

    A section that names another ``kind`` than the base replaces the base's, others are merged into it.
    """

    name: str = Field(default="comparison", pattern=r"^[\w.-]+$")
    base: dict[str, Any]
    models: dict[Annotated[str, Field(pattern=r"^[\w.,=+-][\w.,=+ -]*$")], dict[str, Any]] = Field(min_length=1)
    budget: Budget = Budget(seconds=60)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(1, 2, 3), min_length=1)
    pairs: Pairs | None = None
    looks: int = Field(default=10, ge=1, description="validations along the way: the points of a curve")

    @model_validator(mode="after")
    def _possible(self) -> Comparison:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has one twice")
        if len(self.models) > MAX_MODELS:
            raise ValueError(f"{len(self.models)} models are too many; use at most {MAX_MODELS}")
        return self

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every model.

        Raises:
            ConfigErrors: all that is wrong with any of them, each with the model's name.
        """
        found, errors = {}, list[ConfigError]()
        for name, changes in self.models.items():
            try:
                found[name] = Recipe.parse(merged(self.base, changes), f"models.{name}")
            except ConfigErrors as error:
                errors += error.errors
        if errors:
            raise ConfigErrors(errors)
        return found

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Iterable[str] = ()) -> Comparison:
        """A comparison by name or path, with ``key=value`` overrides.

        Raises:
            ConfigErrors: everything that is wrong with it.
        """
        if Path(name_or_path).suffix in (".yaml", ".yml"):
            raw, lines, where = read_mapping(name_or_path)
        elif str(name_or_path) in names():
            file = str(resources.files("octavo") / "comparisons" / f"{name_or_path}.yaml")
            raw, lines, where = read_mapping(file, shown=f"{name_or_path}.yaml")
        else:
            fix = did_you_mean(str(name_or_path), names(), thing="comparison")
            raise ConfigError(f"there is no comparison `{name_or_path}`", fix=f"{fix} Or give a YAML file")
        raw = apply_overrides(raw, overrides, lines)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigErrors(explain(cls, raw, error, where, lines)) from None


def names() -> list[str]:
    """The comparisons shipped with the package."""
    folder = resources.files("octavo") / "comparisons"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def merged(base: Any, changes: Any) -> Any:
    """``base`` with ``changes``: mappings key by key, but one that names another kind as a whole."""
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    if "kind" in changes and changes["kind"] != base.get("kind"):
        return dict(changes)
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


def ablation(recipe: Recipe, fields: Sequence[tuple[str, Sequence[Any]]], **settings: Any) -> Comparison:
    """A recipe with every combination of the values of some dotted keys.

    Raises:
        ConfigError: too many combinations.
        ConfigErrors: keys or values that the recipe does not take.
    """
    plain, models = recipe.plain(), dict[str, dict[str, Any]]()
    n = 1
    for _, values in fields:
        n *= len(values)
    if n > MAX_MODELS:
        raise ConfigError(f"{n} combinations are too many", fix=f"give at most {MAX_MODELS}")
    for values in itertools.product(*(values for _, values in fields)):
        chosen = dict(zip((key for key, _ in fields), values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={_word(value)}" for key, value in chosen.items())
        models[name] = recipe.replace(chosen).plain()
    return Comparison.model_validate({"name": f"{recipe.name}-ablation", "base": plain, "models": models, **settings})


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = value.get("kind", str(value)) if isinstance(value, Mapping) else "null" if value is None else str(value)
    return "".join(char if char.isalnum() or char in "._+-" else "_" for char in text)
