"""docs/models.md: what it lists is what there is, and its two scripts make what convert reads."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def script(mark: str) -> str:
    """The Python between the quotes of the block after ``<!-- mark -->``."""
    match = re.search(rf'<!-- {mark} -->\n```sh\npython -c "(.*)" > \S+\n```', PAGE)
    assert match, f"docs/models.md has no script marked {mark}"
    return match[1]


def test_the_families_listed_are_the_families_there_are():
    from octavo.hub.folder import FAMILIES, NATIVE

    table = PAGE.partition("## Families")[2].partition("Only safetensors")[0]
    listed = {name for row in re.findall(r"^\| (`.*?`) \|", table, re.M) for name in re.findall(r"`([a-z0-9_]+)`", row)}
    assert listed - {"model_type"} == {*FAMILIES, NATIVE}


def test_the_architectures_and_cuts_listed_are_known():
    from octavo.hub import gguf, vocabulary

    said = PAGE.partition("## GGUF")[2].partition("## llama2.c")[0]
    assert set(re.findall(r"`(llama|qwen\d|gemma\d|mamba)`", said.partition("stored as")[0])) == set(gguf.ARCHITECTURES)
    named = set(re.findall(r"`([a-z0-9-]+)`", said.partition("words named")[2].partition("and others")[0]))
    assert named and named <= set(vocabulary.CUTS)


def test_the_scripts_write_what_convert_reads(tmp_path):
    from octavo.hub import vocabulary

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"b": 1, "a": 0}, "itos": {0: "a", 1: "b"}}))
    (tmp_path / "encoding.py").write_text(
        "class Encoding:\n    _pat_str = r'\\p{L}+|.'\n    _special_tokens = {'<|bos|>': 257}\n"
        "    _mergeable_ranks = {bytes([b]): b for b in range(256)} | {b'ab': 256}\n"
    )
    make = "import pickle, encoding; pickle.dump(encoding.Encoding(), open('tokenizer.pkl', 'wb'))"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True)
    for mark, text, ids in [("letters", "ab", [0, 1]), ("ranks", "abb", [256, 98])]:
        done = subprocess.run([sys.executable, "-c", script(mark)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
        (tmp_path / f"{mark}.json").write_text(done.stdout)
        assert vocabulary.load(tmp_path / f"{mark}.json").encode(text) == ids


def test_the_command_for_letters_is_the_one_the_error_names():
    from octavo.hub import nanogpt

    assert script("letters") in nanogpt.WRITE_LETTERS


@pytest.mark.parametrize("verb", ["pull", "convert"])
def test_every_verb_of_the_page_shows_an_example(verb, capsys):
    from octavo.cli.main import main

    assert f"octavo {verb}" in PAGE
    assert main([verb, "--help"]) == 0
    assert "Example:" in capsys.readouterr().out
