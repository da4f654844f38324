"""``html: article``: the optional way to read a page, by trafilatura."""

import importlib.util
import json
import sys

import pytest

from octavo.data.markup import html_text
from octavo.data.prepare import DataConfig, clean_documents, iter_texts
from octavo.errors import ConfigError

needs_trafilatura = pytest.mark.skipif(
    importlib.util.find_spec("trafilatura") is None, reason="trafilatura is not installed (pip install 'octavo[data]')"
)
PARAGRAPHS = (
    "The river rises in the hills behind the town and runs for forty miles before it meets the sea at the harbour.",
    "In spring it floods the lower fields, and the farmers wait until the water has gone before they sow.",
)
PAGE = (
    "<html><head><title>Rivers</title></head><body><nav><a href='/'>Home</a> <a href='/about'>About us</a></nav>"
    f"<article><h1>The river</h1><p>{PARAGRAPHS[0]}</p><p>{PARAGRAPHS[1]}</p></article>"
    "<aside>Subscribe to our newsletter!</aside><footer>All rights reserved</footer></body></html>"
)


@needs_trafilatura
def test_the_article_without_menus_and_footers():
    article, everything = html_text(PAGE, "article"), html_text(PAGE)
    assert article is not None and everything is not None
    for paragraph in PARAGRAPHS:
        assert paragraph in article and paragraph in everything
    for around in ("About us", "newsletter", "rights reserved"):
        assert around not in article and around in everything


@needs_trafilatura
@pytest.mark.parametrize(
    "page", ["", "<", "<html></html>", "\x00<p>x", "<p" * 1000, "<div>" * 5000, "<![CDATA[", "\ufeff"]
)
def test_a_page_without_an_article_is_empty_not_an_error(page):
    assert isinstance(html_text(page, "article"), str)


@needs_trafilatura
def test_a_source_that_asks_for_articles(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    source = {"path": str(tmp_path / "a.html"), "html": "article"}
    clean_documents(DataConfig.model_validate({"sources": [source], "split": {"held_out": 0}}), tmp_path / "out")
    (text,) = iter_texts(tmp_path / "out", "train")
    assert PARAGRAPHS[0] in text and "newsletter" not in text
    assert json.loads((tmp_path / "out/report.json").read_text())["documents"] == 1


@pytest.mark.parametrize("missing", ["trafilatura", pytest.param("lxml.html.clean", marks=needs_trafilatura)])
def test_what_is_missing_is_named(monkeypatch, missing):
    """Also where trafilatura is there but something it imports is not."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("trafilatura", "justext")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"html: article needs trafilatura \(.*{missing.split('.')[0]}") as caught:
        html_text(PAGE, "article")
    assert "octavo[data]" in caught.value.fix
