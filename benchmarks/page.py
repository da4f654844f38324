"""A measured table's place in a page of docs/: between two marks that name it."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def put(page: str, mark: str, text: str) -> None:
    """Replace what stands between ``mark: begin`` and ``mark: end``."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    path = DOCS / page
    before, rest = path.read_text("utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}", "utf-8")
