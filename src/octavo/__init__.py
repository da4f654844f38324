"""Octavo: from raw text to a language model you can talk to, on the machine you have.

import octavo
run = octavo.train("quickstart")
print(octavo.load(run).generate("def "))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from octavo.config import Recipe
    from octavo.language_model import LanguageModel, load
    from octavo.launch import run as train

__all__ = ["LanguageModel", "Recipe", "__version__", "load", "train"]

# Where each public name lives. Imported when first used: `import octavo` stays fast and without torch.
_HOMES = {
    "LanguageModel": ("octavo.language_model", "LanguageModel"),
    "Recipe": ("octavo.config", "Recipe"),
    "load": ("octavo.language_model", "load"),
    "train": ("octavo.launch", "run"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
