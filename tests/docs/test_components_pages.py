"""docs/components: every component has a page in two languages, and what is generated in it is fresh."""

import re
import unicodedata
from pathlib import Path

import pytest

from octavo.cli.main import main
from octavo.explain import facts
from octavo.explain.page import LANGS, MARKS, PROSE_LINES, SUFFIX, all_pages, page, pages, prose
from octavo.laws.components import components, find
from octavo.laws.examine import HEADINGS, Verdict, cells
from octavo.laws.parity import recorded

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "components"
WRITE = "run: octavo explain --write docs/components"


def lines_of(text: str, columns: int = 120) -> int:
    """How many lines of 120 columns the text takes; a Chinese character takes two columns."""
    width = lambda line: sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line)  # noqa: E731
    return sum(-(-width(line) // columns) for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("lang", LANGS)
def test_prose_has_at_most_fifteen_lines_and_stands_in_both_languages(lang):
    """A new component may come without: its page then says what can be generated."""
    named = {name for name in pages() if prose(name, lang)}
    assert named == {name for name in pages() if prose(name, "en")}
    assert len(named) > 50
    assert all(lines_of(prose(name, lang)) <= PROSE_LINES for name in named)


@pytest.mark.parametrize("lang", LANGS)
def test_no_prose_without_a_component(lang):
    there = {path.stem for path in (ROOT / "src" / "octavo" / "explain" / lang).iterdir()}
    assert there <= set(pages())


def test_prose_in_chinese_is_chinese():
    for name in (name for name in pages() if prose(name, "en")):
        assert sum("一" <= c <= "鿿" for c in prose(name, "zh")) > 20, name
        assert not any("一" <= c <= "鿿" for c in prose(name, "en")), name


def test_every_page_is_fresh():
    wanted = all_pages()
    written = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.md")} if FOLDER.is_dir() else {}
    assert set(written) == set(wanted), WRITE
    assert not [name for name in wanted if written[name] != wanted[name]], WRITE


def test_the_table_of_the_index_is_fresh_but_for_its_seconds():
    text = FOLDER.with_suffix(".md").read_text("utf-8")
    lines = text.partition(MARKS[0])[2].partition(MARKS[1])[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert rows[0] == [*HEADINGS, "standing"]
    records = recorded()
    for row, component in zip(rows[2:], components(), strict=True):
        name = re.match(r"\[([\w-]+)\]", row[0])
        assert name and name[1] == component.name, WRITE
        wanted = cells(Verdict(component, {}, records.get(component.kind, ()), 0.0))
        assert row[1:5] == wanted[1:5], f"{component.name}: {WRITE}"
        kept, asked = map(int, row[5].split(" of "))
        assert kept == asked >= 8, component.name
        assert row[7] == ("proven" if records.get(component.kind) else "keeps the laws"), WRITE


def test_links_of_the_pages_lead_somewhere():
    found = all_pages()
    for name, text in found.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if not target.startswith("http") and target != "../components.md":
                assert (FOLDER / target).resolve().exists() or target in found, f"{name}: {target}"


# -------------------------------------------------------------------------------- what the pages are made of


def test_shapes_are_those_of_a_real_pass():
    rows = {name: shape for name, shape, _ in facts.shapes(find("attention"))}
    assert rows["x"] == rows["y"] == "2 x 32 x 64"
    assert rows["q.weight"] == "64 x 64"
    roles = {name: note for name, _, note in facts.shapes(find("attention"))}
    assert roles["o.weight"] == "o"
    assert roles["k"] == f"state, token: {4 * 16 * 1024 * 4:,} bytes"
    assert ("cos", "2 x 32 x 8", "rotation") in facts.shapes(find("rope"))


def test_costs_are_those_of_the_formulas():
    found = dict(facts.costs(find("attention")))
    assert found["parameters"] == f"{4 * 512 * 512:,}"
    assert found["FLOPs of a row"] == f"{2 * 1024 * 4 * 512 * 512 + 4 * 1024 * 1024 * 512:,}"
    assert found["state bytes of a row"] == f"{2 * 1024 * 512 * 4:,}"
    assert facts.costs(find("window"))[0] == facts.costs(find("attention"))[0]
    assert facts.costs(find("longrope")) == []


def test_settings_come_from_the_class():
    rows = {name: rest for name, *rest in facts.settings(find("attention").cls.Config)}
    assert "kind" not in rows
    assert rows["n_heads"][:2] == ["integer >= 1", "`8`"]
    assert rows["qk_norm_over"][:2] == ["`head`, `all`", "`head`"]
    assert "`window`" in rows["reader"][0]
    assert rows["softcap"] == ["number > 0 or null", "", "bound of the scores, by tanh"]
    assert {r[0]: r[2] for r in facts.settings(find("window").cls.Config)} == {"window": "required"}


def test_a_page_has_all_its_parts_in_both_languages():
    component = find("attention")
    for lang, heads in (("en", "Formula Shapes Cost Settings Proof"), ("zh", "公式 形状 开销 设置 证明")):
        text = page(component, lang, root="../../")
        assert re.findall(r"^## (.*)$", text, re.M) == heads.split()
        assert prose("attention", lang) in text
        assert "`softmax(q k^T / sqrt(K)) v` per head" in text
        assert "torch MultiheadAttention" in text
        assert "(../../src/octavo/nn/attention.py)" in text and "(../../tests/parity/" in text
        assert SUFFIX["zh" if lang == "en" else "en"] in text.splitlines()[2]


def test_activations_share_a_page_with_their_values():
    text = page(pages()["activation"])
    assert "| relu_squared | 0.0000 | 0.0000 | 0.0000 | 1.0000 | 9.0000 |" in text
    assert "gelu" not in pages()


# -------------------------------------------------------------------------------------------------- the verb


def test_the_verb_prints_a_page_in_either_language(capsys):
    for words, said in (
        (["attention"], "## Formula"),
        (["rope", "--lang", "zh"], "## 公式"),
        (["gelu"], "# activation"),
    ):
        assert main(["explain", *words]) == 0
        assert said in capsys.readouterr().out


def test_the_verb_lists_every_component(capsys):
    assert main(["explain"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(pages())


def test_the_verb_explains_a_class_of_ones_own(tmp_path, monkeypatch, capsys):
    import sys

    (tmp_path / "explained_mixer.py").write_text(
        (ROOT / "tests" / "laws" / "example_mixer.py").read_text("utf-8").replace("example_mixer:", "explained_mixer:")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["explain", "explained_mixer:Gru"]) == 0
    out = capsys.readouterr().out
    assert "recurrent_in" in out and "state, row" in out and "explained_mixer.py" in out
    monkeypatch.delitem(sys.modules, "explained_mixer")


def test_the_verb_refuses_unknown_names_and_a_name_with_write(tmp_path, capsys):
    assert main(["explain", "atention"]) == 2
    assert "did you mean `attention`?" in capsys.readouterr().err
    assert main(["explain", "attention", "--write", str(tmp_path / "pages")]) == 2
    assert not (tmp_path / "pages").exists()


def test_writing_makes_pages_and_index_and_takes_away_what_is_gone(tmp_path, monkeypatch, capsys):
    from octavo.laws import examine
    from octavo.laws.result import LawResult

    def quick(component, parity=(), *, slow=False):
        return Verdict(component, {"alone": [LawResult("causal", "holds")]}, parity, 0.0)

    monkeypatch.setattr(examine, "examine", quick)
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "gone.md").write_text("old")
    assert main(["explain", "--write", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == set(all_pages())
    index = (tmp_path / "pages.md").read_text("utf-8")
    assert "[attention](pages/attention.md)" in index and "1 of 1" in index and MARKS[1] in index
    assert f"{len(all_pages())} pages" in capsys.readouterr().out
