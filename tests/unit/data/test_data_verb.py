import pytest

from octavo.cli.main import main
from octavo.tokenizer import train
from octavo.tokenizer.config import Byte


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paragraphs = [f"Paragraph {i} tells of {i * i} apples and of {i * i * i} pears in the garden." for i in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    return tmp_path


def test_prepare_and_stats(corpus, capsys):
    train(Byte(), ["x"]).save(corpus / "tok")
    command = "data prepare book.txt --out out --document-bytes 500 --held-out 3 --tokenizer tok --workers 1".split()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "valid        3 documents" in shown and "train: " in shown and "tokens in out/train" in shown
    assert main(["data", "stats", "out", "--seq-len", "64"]) == 0
    shown = capsys.readouterr().out
    assert "verified" in shown and "packed at 64: 201 rows, 12,792 targets" in shown
    tokens = corpus / "out/valid/tokens-00000.npy"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\1")
    assert main(["data", "stats", "out"]) == 3
    assert "SHA-256 differs" in capsys.readouterr().err


def test_a_recipe_gives_its_data_section(corpus, capsys):
    (corpus / "mine.yaml").write_text("data: {sources: [{path: book.txt, document_bytes: 500}]}\ntrain: {}\n")
    assert main(["data", "prepare", "mine.yaml", "data.split.held_out=5", "--out", "out", "--workers", "1"]) == 0
    assert "valid        5 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["prepare", "bok.txt"], 3, "did you mean book.txt?"),
        (["prepare", "book.txt"], 3, "set `document_bytes`"),
        (["prepare", "book.txt", "--document-bytes", "5"], 2, "document_bytes"),
        (["prepare", "book.txt", "--on-bad-row", "ignore"], 2, "on_bad_row"),
        (["prepare", "book.txt", "data.clean=null"], 2, "without a recipe"),
        (["stats", "."], 3, "no prepared data"),
        (["stats", "nowhere"], 3, "is not a folder"),
    ],
)
def test_refusals(corpus, capsys, words, code, message):
    assert main(["data", *words]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("verb", ["prepare", "stats"])
def test_help_has_an_example(verb, capsys):
    assert main(["data", verb, "--help"]) == 0
    assert "Example" in capsys.readouterr().out
