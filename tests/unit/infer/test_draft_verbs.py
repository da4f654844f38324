"""``--draft module``: the model's own module guesses ahead, in every verb that decodes."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from octavo.cli.main import main
from octavo.infer.drafts import ModuleDraft
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import Byte, Tokenizer, train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, changes in {"with": {"multi_token": {"n_modules": 1}}, "without": {}}.items():
        (path / name).mkdir()
        values = {"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 1, "max_seq_len": 64}
        LanguageModel(build(Decoder.Config.model_validate(values | changes), seed=3), tokenizer).save(path / name)
    return path


@pytest.fixture
def n_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each module was asked for at each step."""
    made, propose = list[int](), ModuleDraft.propose

    def noted(self, texts):
        drafts = propose(self, texts)
        made.extend(len(draft.tokens) for draft in drafts)
        return drafts

    monkeypatch.setattr(ModuleDraft, "propose", noted)
    return made


def test_generate_says_the_same(folders: Path, capsys: pytest.CaptureFixture[str], n_made: list[int]) -> None:
    words = ["generate", str(folders / "with"), "To be", "--temperature", "0", "--max-new-tokens", "12"]
    said = []
    for draft in ([], ["--draft", "module"]):
        assert main([*words, *draft]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and sum(n_made) > 4


def test_chat_says_the_same(folders, capsys, monkeypatch, n_made: list[int]) -> None:
    said = []
    for draft in ([], ["--draft", "module"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand?\n"))
        assert main(["chat", str(folders / "with"), "--temperature", "0", "--max-new-tokens", "8", *draft]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and sum(n_made) > 4


@pytest.mark.parametrize("words", [["generate", "{}", "To be"], ["chat", "{}"], ["serve", "{}", "--port", "0"]])
def test_a_model_without_one_is_refused_in_one_line(words, folders: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    monkeypatch.setattr("octavo.serve.listen.listen", lambda *_: pytest.fail("it was served"))
    words = [word.format(folders / "without") for word in words]
    assert main([*words, "--draft", "module"]) == 2
    said = capsys.readouterr().err
    assert "no multi_token modules" in said and len(said.strip().splitlines()) <= 2
