"""Recipes as they are written: YAML with the line of every key, and dotted overrides."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from octavo.errors import ConfigError, ConfigErrors, did_you_mean

MAX_BYTES, MAX_ENTRIES, MAX_DEPTH, MAX_DIGITS = 1 << 18, 20_000, 50, 300
# What PyYAML raises, of its own and by accident, where a tag stands before what it cannot be.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
# The line of every key, or words for where it comes from.
Lines = dict[tuple[Any, ...], str | int]


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``off`` and ``no`` are words, ``3e-4`` is a number (YAML 1.2's core schema)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$|^[-+]?0x[0-9a-fA-F_]+$"), "-+0123456789"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    "-+0123456789.",
)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > MAX_DIGITS:
        raise yaml.MarkedYAMLError(problem=f"a number of {len(text)} digits", problem_mark=node.start_mark)
    return int(text, 16) if "x" in text else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _parse_yaml(text: str) -> tuple[Any, Lines]:
    lines = _lines(yaml.compose(text, Loader=_Loader))  # refuses what would grow without end, before it is built
    return yaml.load(text, Loader=_Loader), lines


def _read_yaml(text: str, where: str) -> tuple[Any, Lines]:
    """Plain values and the line of every key.

    Raises:
        ConfigErrors: no YAML, a value that does not exist (a 13th month), a key given twice, or aliases that
            make it endless.
    """
    try:
        return _parse_yaml(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        line = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigErrors([ConfigError(f"{where} cannot be read as YAML: {why}", where=line, fix="mend it")]) from None


def read_mapping(name_or_path: str | Path, shown: str = "") -> tuple[dict[str, Any], Lines, str]:
    """A recipe's plain values, the line of every key, and the file's name for errors (``shown`` instead, if given).

    Raises:
        ConfigErrors: it cannot be read, or is no mapping.
    """
    text, where = _read(name_or_path)
    where = shown or where
    raw, lines = _read_yaml(text, where)
    if not isinstance(raw, dict):
        raise ConfigErrors([ConfigError(f"{where} is not a mapping of sections", fix="see `octavo schema`")])
    return raw, lines, where


def names() -> list[str]:
    """The recipes shipped with the package."""
    folder = resources.files("octavo") / "recipes"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def _read(name_or_path: str | Path) -> tuple[str, str]:
    name = str(name_or_path)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or _is_file(path):
        try:
            if path.exists() and not path.is_file():
                raise ConfigError(f"recipe {name} is not a file", fix="check the path")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise ConfigError(f"recipe {name} has {size:,} bytes, more than {MAX_BYTES:,}", fix="check the path")
            return path.read_text(encoding="utf-8"), name
        except OSError as error:
            raise ConfigError(f"recipe {name} cannot be read: {error.strerror}", fix="check the path") from None
        except UnicodeDecodeError as error:
            byte, at = error.object[error.start], error.start
            line = error.object.count(b"\n", 0, at) + 1
            raise ConfigError(
                f"recipe {name} is not UTF-8 text: byte 0x{byte:02X} at {at:,}", where=f"{name}:{line}",
                fix="save it as UTF-8",
            ) from None  # fmt: skip
        except ValueError as error:  # a name that no file can have
            raise ConfigError(f"recipe {name} cannot be read: {error}", fix="check the path") from None
    if name not in names():
        raise ConfigError(f"there is no recipe `{name}`", fix=did_you_mean(name, names(), thing="recipe"))
    return (resources.files("octavo") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than any file name
        return False


def _lines(node: yaml.Node | None, path: tuple[Any, ...] = (), found: Lines | None = None) -> Lines:
    """The line every key stands on. An alias counts as often as it is used."""
    found = {} if found is None else found
    if len(found) > MAX_ENTRIES or len(path) > MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem="it is too large or contains itself", problem_mark=node and node.start_mark)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value if isinstance(key, yaml.ScalarNode) else id(key))
            if here in found:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            found[here] = key.start_mark.line + 1
            _lines(value, here, found)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*path, index)] = value.start_mark.line + 1
            _lines(value, (*path, index), found)
    return found


def shown(value: Any) -> str:
    """As it stands in a message: not endless."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str], lines: Lines | None = None) -> dict[str, Any]:
    """``raw`` with ``a.b.c=value`` applied; the value is read as YAML (``3e-4``, ``[a, b]``, ``null``)."""
    result: dict[str, Any] = copy.deepcopy(dict(raw))
    errors = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path) or len(path) > MAX_DEPTH:
            errors.append(ConfigError(f"override {shown(text)} is not KEY=VALUE", fix="write it like train.steps=500"))
            continue
        try:
            parsed, _ = _parse_yaml(value)
        except YAML_ERRORS:
            errors.append(ConfigError(f"override {shown(text)}: the value is not YAML", fix="put quotes around it"))
            continue
        problem = set_key(result, path, parsed)
        if problem:
            errors.append(ConfigError(f"override {shown(text)}: {problem}", fix="check the key with `octavo schema`"))
        elif lines is not None:
            new = [tuple(path[:n]) for n in range(1, len(path) + 1)]
            lines |= {key: "command line" for key in new if key not in lines or key == tuple(path)}
    if errors:
        raise ConfigErrors(errors)
    return result


def set_key(raw: Any, path: Sequence[str], value: Any) -> str:
    """Set a dotted path in nested mappings and lists; returns what is wrong, or nothing."""
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(raw, list):
            if not (part.isascii() and part.isdigit() and len(part) < 9 and int(part) < len(raw)):
                return f"{'.'.join(path[:depth])} is a list of {len(raw)}, {part!r} is no index of it"
            if last:
                raw[int(part)] = value
            raw = raw[int(part)]
        elif isinstance(raw, dict):
            if last:
                raw[part] = value
            elif raw.get(part) is None:
                raw[part] = {}
            elif isinstance(raw[part], str):  # a bare kind opens up: `schedule: cosine`, then schedule.warmup=10
                raw[part] = {"kind": raw[part]}
            raw = raw[part]
        else:
            return f"{'.'.join(path[:depth])} is a value, not a section"
    return ""
