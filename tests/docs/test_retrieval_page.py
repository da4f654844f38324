"""docs/retrieval.md: its commands run in their order on its own texts, its Python runs, its options exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from octavo.cli.main import main
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import train
from octavo.tokenizer.config import ByteBPE

PAGE = (Path(__file__).parents[2] / "docs" / "retrieval.md").read_text(encoding="utf-8")
NOTES = [
    "The tower of Velm was built in 1307 by stonemasons from the coast.",
    "A library in Orsk keeps nine thousand maps of the northern sea.",
]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the texts of the page and tiny models of the names that it gives."""
    tokenizer = train(ByteBPE(vocab_size=280), NOTES)
    block = {"mixer": {"kind": "attention", "n_heads": 2}}
    for name, causal in (("runs/quickstart", True), ("runs/encoder", False), ("all-MiniLM-L6-v2", False)):
        config = {"d_model": 16, "n_layers": 1, "max_seq_len": 256, "vocab_size": tokenizer.vocab_size,
                  "causal": causal, "blocks": {"b": block}}  # fmt: skip
        LanguageModel(build(Decoder.Config.model_validate(config)).eval(), tokenizer).save(tmp_path / name)
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in NOTES))
    (tmp_path / "notes.md").write_text("\n\n".join(NOTES) + "\n")
    (tmp_path / "news.md").write_text("In 1990 the tower of Velm was rebuilt after a fire.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.rows("A7")
def test_the_commands_of_the_page_run_in_their_order(place, capsys):
    """Passages of 80 characters, so that each of the short notes is one."""
    lines = [line[2:] for block in blocks("sh") for line in block.splitlines() if line.startswith("$ octavo store")]
    assert len(lines) == 9
    for line in lines:
        args = shlex.split(line)[1:]
        capsys.readouterr()
        assert main([*args, "--size", "80"] if args[1] in ("build", "add") else args) == 0, line
        if args[1] == "search" and args[2] == "facts":
            first = capsys.readouterr().out.split("\n\n")[0]
            assert "#1  notes.md\n" + NOTES[0] in first and first in PAGE


def test_the_python_of_the_page_runs(place, capsys):
    assert main(["store", "build", "facts", "notes.jsonl"]) == 0
    names: dict = {}
    torch.manual_seed(0)
    for code in blocks("python"):
        exec(code, names)
    assert torch.allclose(names["log_probs"].exp().sum(-1), torch.ones(1), atol=1e-4)
    assert len(names["answer"]) == 8 and len(names["hits"]) == 2


def test_the_verbs_and_options_of_the_page_exist():
    from octavo.cli.chat import app as chat
    from octavo.cli.serve import app as serve
    from octavo.cli.store import app

    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"octavo store (\w+)", PAGE)) == set(verbs)
    options = {o for verb in verbs.values() for p in verb.params for o in p.opts}
    for other in (chat, serve):
        options |= {o for p in typer.main.get_command(other).params for o in p.opts}
    shown = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", PAGE.partition("## Measured")[0])) - {"--extras"}
    assert shown <= options
