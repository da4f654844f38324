"""The text of an HTML page."""

from __future__ import annotations

import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from octavo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

UNSEEN = frozenset("script style noscript template svg math head iframe object canvas".split())
BREAKS = frozenset(
    "address article aside blockquote br dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header "
    "hr li main nav ol p pre section table tr ul title option".split()
)
PARAGRAPHS = frozenset("article blockquote dl figure h1 h2 h3 h4 h5 h6 ol p pre section table ul".split())


class _Text(HTMLParser):
    """Collects what a reader of the page would see; text in ``pre`` keeps its line ends and spaces.

    Where something that was begun is never closed, Python's parser looks for its end again and again. Here the first
    search that fails is the last.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.unseen: list[str] = []
        self.open: Counter[str] = Counter()  # how often each tag stands in ``unseen``
        self.pre = 0
        self.endless: set[str] = set()

    def parse_comment(self, i: int, report: bool = True) -> int:
        """See the base class; returns where the comment ends, -1 if it does not."""
        return self._once("comment", super().parse_comment, i, report)

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """See the base class; returns where the section ends, -1 if it does not."""
        kind = self.rawdata[i + 3 : i + 5].lower()  # each kind has an end of its own
        return self._once(kind, super().parse_marked_section, i, report)

    def _once(self, kind: str, parse: Callable[[int, bool], int], i: int, report: bool) -> int:
        end = -1 if kind in self.endless else parse(i, report)
        if end < 0:
            self.endless.add(kind)
        return end

    def _break(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in BREAKS:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body" or (self.unseen == ["head"] and tag in PARAGRAPHS):
            self.unseen.clear()
            self.open.clear()
        if tag in UNSEEN:
            self.unseen.append(tag)
            self.open[tag] += 1
        self._break(tag)
        self.pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open[tag]:
            closed = self.unseen.pop()
            self.open[closed] -= 1
            if closed == tag:
                break
        self._break(tag)
        if tag == "pre" and self.pre:
            self.pre -= 1

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        lines = "".join(self.parts).replace("\r\n", "\n").split("\n")
        return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip(" \t") for line in lines)).strip()


def html_text(page: str, extract: str = "all") -> str | None:
    """The visible text (``all``), or the main article without menus and footers (``article``, by trafilatura).

    Returns:
        The text, which may be empty, or ``None`` if the page is beyond parsing.

    Raises:
        ConfigError: ``article`` was asked for and trafilatura is not installed.
    """
    if extract == "article":
        try:
            import trafilatura
        except ImportError as error:
            raise ConfigError(
                f"html: article needs trafilatura ({error})", fix="pip install 'octavo[data]', or use html: all"
            ) from error
        return trafilatura.extract(page, include_comments=False) or ""
    parser = _Text()
    end = page.rfind(">") + 1  # behind the last one nothing can be a tag, which the parser would try at every place
    try:
        parser.feed(page[:end])
        parser.close()
        parser.handle_data(unescape(page[end:]))
    except (AssertionError, ValueError, RecursionError):  # what html.parser raises on broken declarations
        return None
    return parser.text()
