"""docs/zh-CN: each page says what its English page says: the same code, headings, names, figures and links."""

import os
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER = DOCS / "zh-CN"
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
GENERATED = re.compile(r"<!-- ([\w ]+): begin -->.*?<!-- \1: end -->", re.S)
HEADING = re.compile(r"^(#+) (.*)$", re.M)
TABLE = re.compile(r"(?:^\|.*\n?)+", re.M)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"\d+(?:[,.]\d+)*(?: ?%)?")


def prose(text: str) -> str:
    """The page without code blocks and without what a command writes: that is not translated."""
    return FENCE.sub("", GENERATED.sub("", text))


def sections(text: str) -> list[tuple[str, str]]:
    """Heading line and text beneath it, for each heading in order."""
    parts = HEADING.split(prose(text))
    return [
        (f"{level} {title}", body) for level, title, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    ]


def figures(text: str) -> Counter[str]:
    """How often each number stands in ``text``, with its percent sign; names in code and links are not numbers."""
    bare = LINK.sub("]", SPAN.sub("", text))
    return Counter(found.replace(" ", "") for found in NUMBER.findall(bare))


def differences(english: Counter[str], chinese: Counter[str]) -> str:
    """What one side lacks, in words; empty where both are equal."""
    lacks = [f"{side} {', '.join(sorted(rest))}" for side, rest in
             (("lacks", english - chinese), ("has besides", chinese - english)) if rest]  # fmt: skip
    return "; ".join(lacks)


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def headed(text: str) -> list[str]:
    """Every heading with its level, code blocks left out."""
    return [title for title, _ in sections(text)]


def code_problems(english: str, chinese: str) -> list[str]:
    """Code blocks that are not the same bytes in the same order."""
    ours, theirs = FENCE.findall(chinese), FENCE.findall(english)
    found = []
    for number, (block, wanted) in enumerate(zip(ours, theirs, strict=False), 1):
        if block != wanted:
            sides = ([language, *code.split("\n")[:-1], "(its end)"] for language, code in (block, wanted))
            line, other = next((a, b) for a, b in zip_longest(*sides) if a != b)
            found.append(f"code block {number} of {len(theirs)}: has {line!r} where the English page has {other!r}")
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} code blocks, the English page has {len(theirs)}")
    return found


def text_problems(english: str, chinese: str) -> list[str]:
    """Sections whose level, figures or names in code differ, and tables whose figures do."""
    ours, theirs = sections(chinese), sections(english)
    levels = [[title.partition(" ")[0] for title, _ in side] for side in (ours, theirs)]
    if levels[0] != levels[1]:
        return [f"headings are {' '.join(levels[0])}, on the English page {' '.join(levels[1])}"]
    found = []
    for (title, body), (wanted, text) in zip(ours, theirs, strict=True):
        where = f"section {title!r} (English {wanted!r})"
        tables, others = TABLE.findall(body), TABLE.findall(text)
        if len(tables) != len(others):
            found.append(f"{where}: {len(tables)} tables, the English page has {len(others)}")
        for number, (table, other) in enumerate(zip(tables, others, strict=False), 1):
            if what := differences(figures(other), figures(table)):
                found.append(f"{where}: table {number} {what}")
        if what := differences(figures(TABLE.sub("", text)), figures(TABLE.sub("", body))):
            found.append(f"{where}: text {what}")
        if what := differences(Counter(set(SPAN.findall(text))), Counter(set(SPAN.findall(body)))):
            found.append(f"{where}: code in the text {what}")
    return found


def link_problems(docs: Path, name: str, english: str, chinese: str) -> list[str]:
    """The two pages lead to each other beneath their titles, and otherwise to the same places, all of which exist."""
    found, pages = [], docs / "zh-CN"
    for text, line, page in [
        (chinese, f"[English](../{name})", f"zh-CN/{name}"),
        (english, f"[中文](zh-CN/{name})", name),
    ]:
        if text.split("\n")[1:4] != ["", line, ""]:
            found.append(f"docs/{page} must have the line {line} beneath its title")
    targets = []
    for text, folder in ((english, docs), (chinese, pages)):
        there: Counter[str] = Counter()
        for target in LINK.findall(prose(text)):
            if re.match(r"[a-z]+:", target):
                there[target] = 1
                continue
            path, _, anchor = target.partition("#")
            full = Path(os.path.normpath(folder / path)) if path else None
            page = text if full is None else full.read_text("utf-8") if full.suffix == ".md" and full.exists() else ""
            if full and not full.exists():
                found.append(f"there is nothing at {target}")
            elif anchor and anchor not in {slug(title.partition(" ")[2]) for title in headed(page)}:
                found.append(f"no heading has the anchor of {target}")
            if full and folder == pages and full.parent == docs and full.name != name and (pages / full.name).exists():
                found.append(f"{target} is in Chinese too: link to {full.name}")
            if full and full.name != name:
                same = os.path.relpath(full, docs).removeprefix("zh-CN/").replace(".zh-CN.md", ".md")
                there[same] = 1
        targets.append(there)
    if what := differences(*targets):
        found.append(f"links: {what}")
    return found


def problems(docs: Path, name: str) -> list[str]:
    """All that keeps the Chinese page ``name`` from being its English page in Chinese."""
    english, chinese = ((folder / name).read_text("utf-8") for folder in (docs, docs / "zh-CN"))
    found = [
        *code_problems(english, chinese),
        *text_problems(english, chinese),
        *link_problems(docs, name, english, chinese),
    ]
    return [f"docs/zh-CN/{name}: {what}" for what in found]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_says_what_its_english_page_says(name):
    assert (DOCS / name).exists(), f"docs/zh-CN/{name} has no English page"
    found = problems(DOCS, name)
    assert not found, "\n".join(["one page changed without the other:", *found])


def test_every_page_that_names_a_chinese_page_has_one():
    named = {path.name for path in DOCS.glob("*.md") if "](zh-CN/" in path.read_text("utf-8")}
    assert named == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_in_chinese(name):
    for title, body in sections((FOLDER / name).read_text("utf-8")):
        for paragraph in TABLE.sub("", body).split("\n\n"):
            words = re.findall(r"[A-Za-z]{2,}", LINK.sub("]", SPAN.sub("", paragraph)))
            han = sum("一" <= letter <= "鿿" for letter in paragraph)
            assert len(words) <= han + 4, f"docs/zh-CN/{name}, {title}: {paragraph.strip()[:60]!r} is not translated"


ENGLISH = """# Text

[中文](zh-CN/text.md)

Keeps 5 % with `--keep`, see [the shop](other.md#shards).

```sh
octavo one
octavo two
```

## Sizes

| key | size |
|---|---|
| `a` | 8 MiB |
<!-- counted: begin -->
| x | 9 |
<!-- counted: end -->
"""
CHINESE = """# 文本

[English](../text.md)

用 `--keep` 保留 5%，见[这里](../other.md#shards)。

```sh
octavo one
octavo two
```

## 大小

| 键 | 大小 |
|---|---|
| `a` | 8 MiB |
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "octavo two\n",
            "octavo three\n",
            "code block 1 of 1: has 'octavo three' where the English page has 'octavo two'",
        ),
        ("```sh\n", "```text\n", "code block 1 of 1: has 'text' where the English page has 'sh'"),
        ("octavo two\n", "", "code block 1 of 1: has '(its end)' where the English page has 'octavo two'"),
        ("octavo two\n", "octavo two\n\n", "code block 1 of 1: has '' where the English page has '(its end)'"),
        ("## 大小", "### 大小", "headings are # ###, on the English page # ##"),
        ("8 MiB", "4 MiB", "section '## 大小' (English '## Sizes'): table 1 lacks 8; has besides 4"),
        ("5%", "5", "section '# 文本' (English '# Text'): text lacks 5%; has besides 5"),
        (
            "`--keep`",
            "`--kept`",
            "section '# 文本' (English '# Text'): code in the text lacks --keep; has besides --kept",
        ),
        (
            "[English](../text.md)\n",
            "",
            "docs/zh-CN/text.md must have the line [English](../text.md) beneath its title",
        ),
        ("../other.md#shards", "../gone.md", "there is nothing at ../gone.md"),
        ("../other.md#shards", "../other.md#gone", "no heading has the anchor of ../other.md#gone"),
        ("../other.md#shards", "../rows.md", "links: lacks other.md; has besides rows.md"),
    ],
)
def test_every_difference_is_named(tmp_path, old, new, said):
    (tmp_path / "zh-CN").mkdir()
    (tmp_path / "text.md").write_text(ENGLISH, "utf-8")
    (tmp_path / "other.md").write_text("# Other\n\n## Shards\n", "utf-8")
    (tmp_path / "rows.md").write_text("# Rows\n", "utf-8")
    page = tmp_path / "zh-CN" / "text.md"
    page.write_text(CHINESE, "utf-8")
    assert not problems(tmp_path, "text.md")
    assert old in CHINESE
    page.write_text(CHINESE.replace(old, new), "utf-8")
    assert f"docs/zh-CN/text.md: {said}" in problems(tmp_path, "text.md")


def test_a_link_leads_to_the_chinese_page_where_there_is_one(tmp_path):
    (tmp_path / "zh-CN").mkdir()
    for folder in (tmp_path, tmp_path / "zh-CN"):
        (folder / "other.md").write_text("# Shards\n", "utf-8")
    (tmp_path / "text.md").write_text(ENGLISH.replace("#shards", ""), "utf-8")
    page = tmp_path / "zh-CN" / "text.md"
    page.write_text(CHINESE.replace("#shards", ""), "utf-8")
    assert problems(tmp_path, "text.md") == ["docs/zh-CN/text.md: ../other.md is in Chinese too: link to other.md"]
    page.write_text(CHINESE.replace("../other.md#shards", "other.md"), "utf-8")
    assert not problems(tmp_path, "text.md")
