"""HTML that is escaped by construction: text becomes markup only by passing through `tag`."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from octavo.errors import ConfigError
from octavo.report import words

# No script runs, nothing is fetched, nothing is sent; style attributes and inline drawings are allowed.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
GENERATOR = "Octavo"
GENERATOR_MARK = f'<meta name="generator" content="{GENERATOR}">'
VOID = frozenset(("meta", "br", "input", "wbr"))

Child = object


class Html(str):
    """Markup that is safe as it is."""

    __slots__ = ()


def text(value: object) -> Html:
    """``value`` as text: `Html` stays, anything else is escaped and its control characters made visible."""
    return value if isinstance(value, Html) else Html(html.escape(words.printable(str(value)), quote=True))


def join(parts: Iterable[Child]) -> Html:
    """All parts one after the other, each escaped unless it is `Html`."""
    return Html("".join(text(part) for part in parts if part is not None))


def tag(element: str, *children: Child, **attributes: object) -> Html:
    """An element; attribute names lose a final ``_`` (``class_``), values are escaped, None leaves one out."""
    inner = "".join(
        f' {key.rstrip("_")}="{text(str(value))}"' for key, value in attributes.items() if value is not None
    )
    return Html(f"<{element}{inner}>" if element in VOID else f"<{element}{inner}>{join(children)}</{element}>")


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], *, numbers: Sequence[int] = (), class_: str | None = None
) -> Html:
    """A table that scrolls sideways on a narrow screen; the columns ``numbers`` are set flush right."""

    def cell(name: str, column: int, content: Child) -> Html:
        return tag(name, content, class_="number" if column in numbers else None)

    header = tag("thead", tag("tr", *(cell("th", i, name) for i, name in enumerate(head)))) if head else None
    body = tag("tbody", *(tag("tr", *(cell("td", i, item) for i, item in enumerate(row))) for row in rows))
    return tag("div", tag("table", header, body, class_=class_), class_="scroll")


def pairs(rows: Iterable[tuple[Child, Child]]) -> Html:
    """Names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows), class_="pairs")


def section(title: str, *children: Child, lead: Child = None) -> Html:
    """A part of the page with its heading, which the page's contents point at; "" when it has no content."""
    content = join(children)
    if not content:
        return Html("")
    return tag(
        "section", tag("h2", title), None if lead is None else tag("p", lead, class_="lead"), content, id=slug(title)
    )


def slug(title: str) -> str:
    """The address of a section within the page."""
    return "-".join("".join(char if char.isalnum() else " " for char in title.lower()).split())


def check_ours(path: str | os.PathLike[str]) -> None:
    """Refuse to write a page over a file that is not one of ours.

    Raises:
        ConfigError: there is such a file, or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", fix="give the name of a file")
    if path.exists() and GENERATOR_MARK.encode() not in path.read_bytes()[:4096]:
        raise ConfigError(
            f"{path} is not a page of Octavo and stays as it is", fix="give another name, or move it away"
        )


def document(title: str, style: str, *body: Child) -> str:
    """A whole page in one file, ``style`` being our own style sheet."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=GENERATOR),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f'<!doctype html>\n<html lang="en">{head}{tag("body", *body)}</html>\n'
