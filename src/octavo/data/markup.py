"""The text of an HTML page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from octavo.errors import ConfigError

UNSEEN = frozenset("script style noscript template svg math head iframe object canvas".split())
BREAKS = frozenset(
    "address article aside blockquote br dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header "
    "hr li main nav ol p pre section table tr ul title option".split()
)
PARAGRAPHS = frozenset("article blockquote dl figure h1 h2 h3 h4 h5 h6 ol p pre section table ul".split())


class _Text(HTMLParser):
    """Collects what a reader of the page would see; text in ``pre`` keeps its line ends and spaces."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.unseen: list[str] = []
        self.pre = 0

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
        if tag in UNSEEN:
            self.unseen.append(tag)
        self._break(tag)
        self.pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unseen:
            while self.unseen.pop() != tag:
                pass
        self._break(tag)
        if tag == "pre" and self.pre:
            self.pre -= 1

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        joined = re.sub(r"[ \t]*\n[ \t]*(?=\n)|[ \t]+(?=\n)", "\n", "".join(self.parts).replace("\r\n", "\n"))
        return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)[ \t]+$", "", joined)).strip()


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
    try:
        parser.feed(page)
        parser.close()
    except (AssertionError, ValueError, RecursionError):  # what html.parser raises on broken declarations
        return None
    return parser.text()
