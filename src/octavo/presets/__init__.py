"""Models of published shape by name: what their config.json says, kept as data, and read as any folder's is.

In a recipe ``model: {preset: gpt2-medium, max_seq_len: 512}`` is that shape with one value changed; the run's own
recipe has the whole configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from octavo.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from octavo.models.decoder import Decoder


@dataclass(frozen=True)
class Preset:
    """One published shape.

    published: ``parameters`` (exact where the checkpoint says it, else as in the paper) and, for mixtures, ``active``.
    trained: what was published of its training: ``tokens``, ``length`` of a row, ``flops``, ``device_hours`` on a
    ``device`` of a ``peak`` rate.
    """

    name: str
    title: str
    source: str
    hf: Mapping[str, Any]
    published: Mapping[str, float] = field(default_factory=dict)
    trained: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Decoder.Config:
        """The model's configuration."""
        from octavo.hub.folder import model_config

        return model_config(self.hf)


@cache
def presets() -> dict[str, Preset]:
    """All of them by name."""
    raw: dict[str, dict[str, Any]] = {}
    folder = resources.files("octavo") / "presets"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            raw |= yaml.safe_load(file.read_text(encoding="utf-8"))
    found: dict[str, Preset] = {}
    for name, said in raw.items():
        base = found.get(said.get("like", ""))
        inherited = base is not None and "published" not in said
        found[name] = Preset(
            name,
            said["title"],
            said["source"],
            {**(base.hf if base else {}), **said.get("config", {})},
            base.published if inherited and base else said.get("published", {}),
            said.get("trained", base.trained if base else {}),
        )
    return found


def preset(name: str) -> Preset:
    """One by name.

    Raises:
        ConfigError: there is none.
    """
    if name not in presets():
        raise ConfigError(f"there is no preset `{name}`", fix=did_you_mean(name, presets(), thing="preset"))
    return presets()[name]


def expand(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model section that names a ``preset``, as a whole configuration with the section's other keys put in.

    Raises:
        ValueError: there is no such preset, or a kind stands beside it.
    """
    rest = {key: value for key, value in model.items() if key != "preset"}
    if rest.pop("kind", "decoder") != "decoder":
        raise ValueError("model.preset says what the model is: leave model.kind out")
    try:
        plain = preset(str(model["preset"])).config().model_dump(mode="json")
    except ConfigError as error:
        raise ValueError(f"model.preset: {error.what}; {error.fix}") from None
    return _merged(plain, rest)


def _merged(plain: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``plain`` with ``changes`` put in, mappings key by key unless they choose another ``kind``."""
    result = dict(plain)
    for key, value in changes.items():
        old = result.get(key)
        same = isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") in (None, old.get("kind"))
        result[key] = _merged(dict(old), value) if same and isinstance(old, Mapping) else value
    return result
