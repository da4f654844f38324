"""``octavo tokenizer``."""

import io
import json
import sys

import pytest

from octavo.cli.main import main
from octavo.tokenizer import Tokenizer
from octavo.tokenizer.spans import spans, to_html, to_rich


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "text.txt").write_text("the cat sat on the mat\n" * 50 + "<|im_end|> & <b>\n")
    assert main(["tokenizer", "train", str(root / "text.txt"), "--out", str(root / "tok"), "--vocab-size", "290"]) == 0
    return root / "tok"


def feed(monkeypatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_train_reads_sources_settings_and_standard_input(folder, tmp_path, monkeypatch, capsys):
    assert Tokenizer.load(folder).vocab_size <= 290
    feed(monkeypatch, "你好 world\n".encode())
    assert main(["tokenizer", "train", "-", "--kind", "word", "--set", "split=whitespace", "--out", str(tmp_path)]) == 0
    assert Tokenizer.load(tmp_path).tokens[-2:] == ("world", "你好")
    assert "8 ids" in capsys.readouterr().out


def test_encode_and_decode(folder, monkeypatch, capsys):
    assert main(["tokenizer", "encode", str(folder), "the cat", "--json"]) == 0
    ids = json.loads(capsys.readouterr().out)
    assert ids == Tokenizer.load(folder).encode("the cat")
    assert main(["tokenizer", "encode", str(folder), "<|im_end|>", "--parse-special"]) == 0
    assert capsys.readouterr().out == "4\n"
    feed(monkeypatch, json.dumps(ids).encode())
    assert main(["tokenizer", "decode", str(folder), "-"]) == 0
    assert capsys.readouterr().out == "the cat\n"
    assert main(["tokenizer", "decode", str(folder), "4", "--specials"]) == 0
    assert capsys.readouterr().out == "<|im_end|>\n"


@pytest.mark.rows("T6")
def test_inspect_shows_spans_with_ids(folder, tmp_path, capsys):
    page = tmp_path / "tokens.html"
    text = "the 你<b>&\n\x1b[31m<|im_end|>"
    assert main(["tokenizer", "inspect", str(folder), text, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(text)
    assert all(f"{i} " in out for i in ids)
    assert "⟨E4⟩" in out and "\x1b" not in out
    assert f"{len(ids)} tokens, {len(text.encode())} bytes" in out
    html = page.read_text()
    assert html.count('<span class="t"') == len(ids)
    assert "&lt;" in html and "<b>" not in html and "<script" not in html
    assert all(f"<small>{i}</small>" in html for i in ids)


@pytest.mark.rows("T6")
def test_spans_cover_the_text(folder):
    tokenizer = Tokenizer.load(folder)
    items = spans(tokenizer, [1, *tokenizer.encode("the 你\n"), 4])
    assert b"".join(span.raw for span in items) == "the 你\n".encode()
    assert [span.special for span in items][:1] == [True] and items[-1].special
    assert "<|bos|>1 " in to_rich(items).plain
    styles = {str(s.style) for s in to_rich(items, with_ids=False).spans}
    assert len(styles) > 2
    assert "&lt;|im_end|&gt;" in to_html(items)


@pytest.mark.rows("T3", "T5")
def test_trace_shows_truth_beside_the_notes(capsys):
    assert main(["tokenizer", "trace"]) == 0
    out = capsys.readouterr().out
    assert "merge 1   ('e', ' ') occurs 3 times" in out
    assert "The notes say: ('t', 'h')" in out and "('t', 'h') occurs 1 time" in out
    assert "he·llo·␣·wor·ld" in out
    assert main(["tokenizer", "trace", "--kind", "unigram"]) == 0
    assert "ab·ab·c, p = 0.148148 = 4/27" in capsys.readouterr().out
    assert main(["tokenizer", "trace", "aaab", "--merges", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "end       after 1 merges"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train", "x", "--out", "o", "--kind", "bep"], "did you mean `bpe`?"),
        (["train", "x", "--out", "o", "--set", "splt=x"], "did you mean `split`?"),
        (["train", "x", "--out", "o", "--set", "split=x"], "split = 'x': input should be"),
        (["train", "x", "--out", "o", "--set", "split"], "is not KEY=VALUE"),
        (["train", "x", "--out", "o", "--vocab-size", "3"], "vocab_size = 3"),
        (["trace", "x", "--kind", "word"], "has no trace"),
    ],
)
def test_usage_errors(args, says, capsys):
    assert main(["tokenizer", *args]) == 2
    assert says in capsys.readouterr().err


def test_bad_ids_and_bad_input(folder, monkeypatch, capsys):
    assert main(["tokenizer", "decode", str(folder), "x1"]) == 2
    assert "'x1' is not a token id" in capsys.readouterr().err
    assert main(["tokenizer", "decode", str(folder), "99999"]) == 3
    feed(monkeypatch, b"a\xff")
    assert main(["tokenizer", "encode", str(folder), "-"]) == 3
    assert "byte 0xFF at 1" in capsys.readouterr().err
    assert main(["tokenizer", "encode", str(folder / "nope"), "x"]) == 4


@pytest.mark.parametrize("verb", ["train", "encode", "decode", "inspect", "trace"])
def test_every_command_has_an_example(verb, capsys):
    main(["tokenizer", verb, "--help"])
    assert f"octavo tokenizer {verb}" in capsys.readouterr().out.split("Example", 1)[1]
