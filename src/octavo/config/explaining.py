"""Everything that is wrong with a recipe, each in our form: its path, its line, the rule and the nearest known name."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from octavo.config.reading import shown
from octavo.errors import ConfigError, did_you_mean, nearest
from octavo.schema import Config


def explain(
    root: type[Config],
    raw: Mapping[str, Any],
    error: ValidationError,
    where: str,
    lines: Mapping[tuple[Any, ...], str | int],
) -> list[ConfigError]:
    """One error in our form for every problem pydantic found."""
    found = []
    for problem in error.errors(include_url=False):
        path = _path(raw, problem["loc"])
        dotted = _visible(".".join(map(str, path))) or "the recipe"
        line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        place = f"{where}:{line}" if isinstance(line, int) else (line or where)
        kind, value = problem["type"], problem.get("input")
        fix = ""
        if kind == "extra_forbidden":
            what = f"{dotted} is not a known key"
            config = owner(root, raw, path[:-1])
            fix = did_you_mean(str(path[-1]), config.model_fields if config else (), thing="key")
            fix = fix.replace("did you mean `", f"did you mean `{'.'.join(map(str, (*path[:-1], '')))}")
        elif kind == "missing":
            missing = problem["loc"][-1]
            what, fix = f"{'.'.join(map(str, (*path, missing)))} is missing", "give it a value"
        elif kind == "union_tag_not_found":
            what = f"{dotted} has no kind"
            choices = _choices(root, raw, path)[0]
            known = {name for config in choices for name in config.model_fields}
            wrong = nearest("kind", [str(name) for name in value if name not in known] if value else ())
            if wrong:
                what, fix = f"{dotted}.{_visible(wrong[0])} is not a known key", f"did you mean `{dotted}.kind`?"
                line = lines.get((*path, wrong[0]), line)
                place = f"{where}:{line}" if isinstance(line, int) else (line or where)
            else:
                kinds = ", ".join(str(config.model_fields["kind"].default) for config in choices)
                fix = f"add {dotted}.kind, one of {kinds}"
        elif kind in ("union_tag_invalid", "literal_error"):
            expected = problem.get("ctx", {}).get("expected_tags") or problem.get("ctx", {}).get("expected", "")
            options = [part.strip(" '") for part in str(expected).replace(" or ", ", ").split(",") if part.strip(" '")]
            given = value.get("kind") if isinstance(value, dict) else value
            what = f"{dotted} = {shown(given)} is not one of {', '.join(options)}"
            fix = did_you_mean(str(given), options, thing="value")
        elif kind == "value_error":
            what = str(problem.get("ctx", {})["error"])
            what = what if path == () else f"{dotted}: {what}"
            what, _, fix = what.partition("; use ")
            fix = f"use {fix}" if fix else "change what it names"
        else:
            what = f"{dotted} = {shown(value)}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
            fix = "correct the value"
        found.append(ConfigError(what, where=place, fix=fix))
    return found


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _path(raw: Any, loc: Sequence[Any]) -> tuple[Any, ...]:
    """The part of a pydantic location that a reader of the file knows: union tags and validators left out."""
    path: list[Any] = []
    for part in loc:
        if (isinstance(raw, Mapping) and part in raw) or (
            isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw)
        ):
            path.append(part)
            raw = raw[part]
    return tuple(path)


def owner(root: type[Config], raw: Any, path: Sequence[Any]) -> type[Config] | None:
    """The configuration class that the section at ``path`` is read as."""
    return _chosen(*_choices(root, raw, path))


def _choices(root: type[Config], raw: Any, path: Sequence[Any]) -> tuple[list[type[Config]], Any]:
    """The configuration classes that the section at ``path`` may be read as, and what is written there."""
    annotation: Any = root
    for part in path:
        config = _chosen(_configs(annotation), raw)
        raw = raw[part] if isinstance(raw, Mapping | list | tuple) else None
        if config is not None and part in config.model_fields:
            field = config.model_fields[part]
            annotation = (field.annotation, *field.metadata)
        # a key of a dict or an index of a list: the same annotation's inner configs
    return _configs(annotation), raw


def _configs(annotation: Any) -> list[type[Config]]:
    """Every configuration class inside an annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Config) else []
    parts = annotation if isinstance(annotation, tuple) else typing.get_args(annotation)
    return [config for part in parts for config in _configs(part)]


def _chosen(choices: list[type[Config]], raw: Any) -> type[Config] | None:
    kind = raw.get("kind") if isinstance(raw, Mapping) else raw
    for config in choices:
        field = config.model_fields.get("kind")
        if field is not None and kind in typing.get_args(field.annotation):
            return config
    return choices[0] if choices else None
