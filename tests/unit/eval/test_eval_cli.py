"""``octavo eval``: what it reads and what it refuses before any model is loaded."""

import json

import pytest

from octavo.cli.eval import open_documents, read_questions
from octavo.cli.main import main
from octavo.errors import ConfigError, DataError
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import Byte, train


def test_text_becomes_documents(tmp_path):
    (tmp_path / "a.txt").write_text("ab", encoding="utf-8")
    (tmp_path / "b.txt").write_text("中", encoding="utf-8")
    tokenizer = train(Byte(), [])
    documents = open_documents(tmp_path, tokenizer)
    assert documents.n_documents == 2
    assert [tokenizer.decode_bytes(documents.document(i)) for i in range(2)] == [b"ab", "中".encode()]
    assert documents.document(0)[0] == tokenizer.special.bos


def test_questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "q"}], "answer": "a"}\n', encoding="utf-8")
    assert [question.answer for question in read_questions(path)] == ["a"]
    path.write_text(path.read_text() + "{nonsense\n", encoding="utf-8")
    with pytest.raises(DataError, match="not JSON") as refused:
        read_questions(path)
    assert refused.value.where == f"{path}:2"
    with pytest.raises(ConfigError, match="does not exist"):
        read_questions(tmp_path / "none.jsonl")


def test_a_model_folder_without_held_out_text_is_refused_before_loading(tmp_path, capsys):
    (tmp_path / "config.json").write_text("not even JSON")
    assert main(["eval", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[CONFIG]: ")
    assert "--data PATH" in error
    assert main(["eval", str(tmp_path / "gone"), "--data", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_model_folder_is_scored_next_to_a_baseline(tmp_path, capsys):
    tokenizer = train(Byte(), [])
    config = Decoder.Config(d_model=32, n_layers=1, max_seq_len=16, vocab_size=tokenizer.vocab_size)
    LanguageModel(build(config, seed=1), tokenizer).save(tmp_path / "model")
    (tmp_path / "train.txt").write_text("one two three " * 50, encoding="utf-8")
    (tmp_path / "held.txt").write_text("two one three 三", encoding="utf-8")
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}], "answer": "a"}\n')
    words = {"data": "held.txt", "train": "train.txt", "questions": "asked.jsonl", "out": "scores.json"}
    options = [word for name, file in words.items() for word in (f"--{name}", str(tmp_path / file))]
    assert main(["eval", str(tmp_path / "model"), *options]) == 0
    shown = capsys.readouterr()
    assert "Kneser-Ney order 3" in shown.out + shown.err
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["model"]["bytes"] == len("two one three 三".encode())
    assert scores["scored"]["byte_exact"] is True
    assert scores["baseline"]["trained_on"]["tokens"] == 14 * 50 + 2
    assert scores["differences"]["model_minus_trigram"] > 0
    assert scores["answers"]["questions"] == 1
