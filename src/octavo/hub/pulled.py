"""Where pulled repositories lie, and how they are named. No torch and no network here."""

from __future__ import annotations

import os
import re
from pathlib import Path

# What a hub allows: one slash, no part that begins or ends with a point or hyphen, no two of them in a row.
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-]))*(?<![.-])"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@([A-Za-z0-9][A-Za-z0-9_./-]*))?")


def is_name(text: str) -> bool:
    """Whether ``text`` is a repository's name, ``org/name`` or ``org/name@revision``."""
    return len(text) <= 200 and _NAME.fullmatch(text) is not None and ".." not in text


def split(text: str) -> tuple[str, str | None]:
    """The repository and the revision of a name."""
    repository, _, revision = text.partition("@")
    return repository, revision or None


def models_folder() -> Path:
    """Where repositories are pulled to: OCTAVO_MODELS, else octavo/models in the user's cache."""
    if chosen := os.environ.get("OCTAVO_MODELS"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "models"


def folder_of(name: str) -> Path:
    """The folder of a repository; another revision has one of its own."""
    return models_folder() / name.replace("/", "--")


def find(text: str) -> Path | None:
    """The folder of a pulled repository, None if ``text`` is no name or was not pulled."""
    if not is_name(text):
        return None
    folder = folder_of(text)
    return folder if (folder / "config.json").is_file() else None
