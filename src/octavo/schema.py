"""The base of every configuration object, and the tagged union over a component table.

A configuration is a frozen pydantic model that refuses unknown keys. Where one of several components
is chosen, the choice is a ``kind`` and the other keys belong to that kind alone, so that options which
exclude each other cannot be written down together.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator


class Config(BaseModel):
    """Base of all configuration: immutable, unknown keys and numbers that are not finite refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


ALLOW_CODE = "OCTAVO_ALLOW_CODE"
_no_imports: ContextVar[bool] = ContextVar("no_imports", default=False)


@contextlib.contextmanager
def no_imports() -> Iterator[None]:
    """Inside, a configuration may name only classes of modules that are loaded: a file from a stranger runs nothing.

    The environment variable OCTAVO_ALLOW_CODE=1 lifts it.
    """
    token = _no_imports.set(True)
    try:
        yield
    finally:
        _no_imports.reset(token)


def load_object(path: str) -> Any:
    """Import ``package.module:Name``.

    Raises:
        ValueError: the module or the name in it does not exist or may not be imported (pydantic reports where it was
            written).
    """
    module, _, name = path.partition(":")
    if _no_imports.get() and module not in sys.modules and os.environ.get(ALLOW_CODE) != "1":
        raise ValueError(f"{path!r} is code to run; import {module} first, or set {ALLOW_CODE}=1 if you trust it")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever running a stranger's or a half-finished module comes to
        raise ValueError(f"cannot import {path!r}: {error}") from None


def one_of(table: Mapping[str, type], default: str | None = None) -> Any:
    """The type of a field that holds one component's configuration out of ``table``.

    ``table`` maps a ``kind`` to a component class whose nested ``Config`` has ``kind: Literal[...]``.
    A ``kind`` with a colon, ``package.module:Class``, names a user's own component: its ``Config`` is
    used the same way. A bare string is short for ``{kind: string}``.
    """
    configs: list[Any] = [entry.Config for entry in table.values()]  # type: ignore[attr-defined]
    union: Any = Union[tuple(configs)]  # noqa: UP007 - built at run time
    if len(configs) > 1:
        union = Annotated[union, Field(discriminator="kind")]

    def choose(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, str):
            value = {"kind": value}
        if isinstance(value, BaseModel):
            return value
        if isinstance(value, Mapping):
            if "kind" not in value and default is not None:
                value = {"kind": default, **value}
            kind = value.get("kind")
            if isinstance(kind, str) and ":" in kind:
                own = getattr(load_object(kind), "Config", None)
                if not (isinstance(own, type) and issubclass(own, Config)):
                    raise ValueError(f"{kind!r} has no nested Config class derived from octavo.schema.Config")
                return own.model_validate(dict(value))
        return handler(value)

    return Annotated[SerializeAsAny[union], WrapValidator(choose)]


def component(table: Mapping[str, type], kind: str) -> type:
    """The class behind a ``kind``: a table entry, or a user's own ``package.module:Class``."""
    return load_object(kind) if ":" in kind else table[kind]
