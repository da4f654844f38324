"""Every key that a recipe may have, in a recipe that has it: read off the configuration classes themselves."""

from __future__ import annotations

import copy
import random
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from octavo.config import Recipe
from octavo.schema import Config

Path = tuple[str | int, ...]
BASE: dict[str, Any] = {"data": {"sources": ["a.txt"]}, "train": {}}
POOL: list[Any] = ["many", -7.5, [[1]], {"no": "such"}, True, 3]


@dataclass(frozen=True)
class Key:
    """One key: where it stands, the class and field it belongs to, and a recipe that may hold it."""

    path: Path
    owner: type[Config]
    field: FieldInfo
    raw: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.path[-1])

    @property
    def dotted(self) -> str:
        return ".".join(map(str, self.path))

    def with_value(self, value: Any, name: str | None = None) -> dict[str, Any]:
        """The recipe with the key set, perhaps under another name."""
        raw = copy.deepcopy(self.raw)
        section: Any = raw
        for part in self.path[:-1]:
            section = section[part]
        section.pop(self.name, None)
        section[name or self.name] = value
        return raw

    def accepts(self, value: Any) -> bool:
        """Whether the value alone could stand here."""
        annotation: Any = self.field.annotation
        if self.field.metadata:
            annotation = typing.Annotated[annotation, *self.field.metadata]
        try:
            TypeAdapter(annotation).validate_python(value)
        except (ValidationError, ValueError):
            return False
        return True


def keys() -> list[Key]:
    """All of them; a class that stands in several places is looked at in the first."""
    seen: set[type[Config]] = set()
    return list(_walk(Recipe, (), copy.deepcopy(BASE), seen))


def _walk(owner: type[Config], path: Path, raw: dict[str, Any], seen: set[type[Config]]) -> Iterator[Key]:
    seen.add(owner)
    for name, field in owner.model_fields.items():
        yield Key((*path, name), owner, field, raw)
        for inside, config in _configs((field.annotation, *field.metadata), (*path, name)):
            if config not in seen:
                yield from _walk(config, inside, _opened(raw, inside, config), seen)


def _configs(annotation: Any, path: Path) -> Iterator[tuple[Path, type[Config]]]:
    """Each configuration class inside an annotation, and where in the recipe it stands."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Config):
            yield path, annotation
        return
    origin = typing.get_origin(annotation)
    if origin is dict:
        path = (*path, "block")
    elif origin in (tuple, list):
        path = (*path, 0)
    for part in annotation if isinstance(annotation, tuple) else typing.get_args(annotation):
        yield from _configs(part, path)


def _opened(raw: dict[str, Any], path: Path, config: type[Config]) -> dict[str, Any]:
    """``raw`` with a section of that kind at ``path``."""
    kind = config.model_fields["kind"].default if "kind" in config.model_fields else None
    section: Any = {} if kind is None else {"kind": kind}
    needed = {"path": "a.txt", "paths": ["a.jsonl"], "sources": ["a.txt"]}
    section |= {name: needed.get(name, "x") for name, field in config.model_fields.items() if field.is_required()}
    raw = copy.deepcopy(raw)
    place: Any = raw
    for i, part in enumerate(path[:-1]):
        empty: Any = [] if path[i + 1] == 0 else {}
        if isinstance(place, list):
            place[:] = place or [empty]
            if not isinstance(place[0], dict | list):
                place[0] = empty
            place = place[0]
            continue
        if not isinstance(place.get(part), dict | list):
            place[part] = empty
        place = place[part]
    if path[-1] == 0:
        place[:] = [section]
    else:
        before = place.get(path[-1])
        place[path[-1]] = {**before, **section} if isinstance(before, dict) else section
    return raw


def misspelt(name: str, siblings: typing.Container[str], chance: random.Random) -> str:
    """One edit away from ``name``, and no other key."""
    while True:
        at = chance.randrange(len(name))
        letter = chance.choice("abcdefghijklmnopqrstuvwxyz")
        turned = name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :]
        new = chance.choice([name[:at] + name[at + 1 :], name[:at] + letter + name[at:], turned, name + letter])
        new = new if chance.random() < 0.8 else name[:at] + letter + name[at + 1 :]
        if new and new != name and new not in siblings:
            return new


def wrong_types(key: Key) -> list[Any]:
    """Values of a type that cannot stand there."""
    return [value for value in POOL if not key.accepts(value)]


def out_of_range(key: Key) -> list[Any]:
    """Values of the right type beyond the limits that the key declares."""
    limits: list[Any] = [*key.field.metadata]
    for part in typing.get_args(key.field.annotation):
        limits += typing.get_args(part)[1:] if typing.get_origin(part) is typing.Annotated else []
    values: list[Any] = []
    for limit in limits:
        if isinstance(limit, annotated_types.Ge):
            values += [limit.ge - 1]
        elif isinstance(limit, annotated_types.Gt):
            values += [limit.gt, limit.gt - 1]
        elif isinstance(limit, annotated_types.Le):
            values += [limit.le + 1]
        elif isinstance(limit, annotated_types.Lt):
            values += [limit.lt]
        elif isinstance(limit, annotated_types.MinLen):
            values += ["" if key.accepts("x") else []]
        elif getattr(limit, "pattern", None):
            values += ["../ x\n"]
    values += [float("nan"), float("inf"), 10**290] if float in _types(key.field.annotation) else []
    return [value for value in values if not key.accepts(value)]


def _types(annotation: Any) -> list[Any]:
    return [annotation, *(inner for part in typing.get_args(annotation) for inner in _types(part))]
