"""The unit of text that flows from sources to shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from.

    Args:
        text: the text.
        source: a path, or a name such as ``python-stdlib:json``.
        line: the line of ``source`` it starts at (1-based), 0 where that says nothing.
        meta: whatever the source knows about it.
    """

    text: str
    source: str
    line: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
