"""A text with its tokens made visible: coloured spans with ids, for the terminal and as a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from octavo.tokenizer.core import Tokenizer

COLOURS = ("#bfdbfe", "#bbf7d0", "#fde68a", "#fecaca", "#ddd6fe", "#fbcfe8")
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Span:
    """One token: its id, its bytes, and how it is shown (bytes that are no whole character as ``⟨E4 BD⟩``)."""

    id: int
    raw: bytes
    shown: str
    special: bool


def spans(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Span]:
    """Each of ``ids`` with its bytes."""
    out = []
    for i in ids:
        raw = tokenizer.token_bytes(i)
        if i in tokenizer.special_ids:
            shown = tokenizer.tokens[i] or ""
        else:
            try:
                shown = raw.decode("utf-8")
                shown = "".join(
                    char if char.isprintable() or char in "\n\t\r" else f"⟨U+{ord(char):04X}⟩" for char in shown
                )
            except UnicodeDecodeError:
                shown = f"⟨{raw.hex(' ').upper()}⟩"
        out.append(Span(i, raw, shown, i in tokenizer.special_ids))
    return out


def to_rich(items: Sequence[Span], *, with_ids: bool = True) -> Text:
    """The spans for a terminal; control characters are shown as signs, so that text cannot steer the terminal."""
    from rich.text import Text

    out = Text()
    for k, span in enumerate(items):
        style = "bold reverse" if span.special else f"black on {COLOURS[k % len(COLOURS)]}"
        out.append(span.shown.translate(_VISIBLE) or "∅", style=style)
        if with_ids:
            out.append(f"{span.id} ", style="dim")
        if "\n" in span.shown:
            out.append("\n")
    return out


def to_html(items: Sequence[Span], *, title: str = "Tokens") -> str:
    """A page without scripts: every span with its id below it, its bytes when pointed at."""
    parts = []
    for k, span in enumerate(items):
        colour = "#1e293b;color:#fff" if span.special else COLOURS[k % len(COLOURS)]
        text = html.escape(span.shown.translate(_VISIBLE))
        parts.append(
            f'<span class="t" style="background:{colour}" title="id {span.id}, bytes {span.raw.hex(" ")}">'
            f"{text}<small>{span.id}</small></span>"
        )
        if "\n" in span.shown:
            parts.append("<br>")
    n_bytes = sum(len(span.raw) for span in items)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        "<style>body{font:16px/2.6 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        ".t{display:inline-block;white-space:pre;border-radius:3px;padding:0 2px;margin:0 1px;line-height:1.3;"
        "text-align:center;color:#111}.t small{display:block;font-size:9px;opacity:.65}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{len(items)} tokens, {n_bytes} bytes</p>\n"
        f"<div>{''.join(parts)}</div></html>\n"
    )
