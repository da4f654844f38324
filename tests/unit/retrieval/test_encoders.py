"""Stores that are searched by the vectors of a model: which one it is, where it lies, what is said when it is not."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import octavo
from octavo.cli.main import main
from octavo.errors import ConfigError
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.retrieval.index import Dense
from octavo.retrieval.store import PROBE, Store, StoreConfig
from octavo.tokenizer import train
from octavo.tokenizer.config import ByteBPE

TEXTS = ["the tower of Velm was built in 1307", "a library in Orsk keeps nine thousand maps", "it rained"]


def encoder(folder, seed, **more):
    tokenizer = train(ByteBPE(vocab_size=300), TEXTS)
    block = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "mlp"}}
    config = {"d_model": 16, "n_layers": 1, "max_seq_len": 64, "vocab_size": tokenizer.vocab_size, "causal": False,
              "blocks": {"b": block}, "init": {"std": 0.4}, **more}  # fmt: skip
    LanguageModel(build(Decoder.Config.model_validate(config), seed=seed).eval(), tokenizer).save(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with texts, two encoders and a store by the vectors of the first, and the place we stand in."""
    encoder(tmp_path / "one", 1)
    encoder(tmp_path / "two", 2)
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    monkeypatch.chdir(tmp_path)
    assert main(["store", "build", "facts", "notes.jsonl", "--model", "one"]) == 0
    return tmp_path


def first(capsys, *args):
    capsys.readouterr()
    assert main(["store", "search", *args, "-k", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["hits"][0]


@pytest.mark.rows("A7")
def test_the_vectors_are_those_of_the_model_and_their_cosine_is_the_score(place, capsys):
    lm = octavo.load("one")
    vectors = lm.embed(TEXTS, normalise=True)
    (file,) = (place / "facts").glob("vectors-*.npy")
    np.testing.assert_allclose(np.load(file), vectors, atol=1e-6)
    hit = first(capsys, "facts", "a library of maps")
    scores = vectors @ lm.embed(["a library of maps"], normalise=True)[0]
    assert (hit["id"], hit["score"]) == (int(scores.argmax()) + 1, pytest.approx(float(scores.max()), abs=1e-5))
    assert first(capsys, "facts", TEXTS[2])["score"] == pytest.approx(1, abs=1e-5)


def test_a_store_finds_its_model_from_elsewhere_and_after_both_have_moved(place, capsys, monkeypatch):
    (place / "away").mkdir()
    monkeypatch.chdir(place / "away")
    assert first(capsys, "../facts", TEXTS[0])["text"] == TEXTS[0]
    (place / "new").mkdir()
    for name in ("facts", "one"):
        shutil.move(place / name, place / "new" / name)
    assert first(capsys, "../new/facts", TEXTS[0])["text"] == TEXTS[0]


def test_another_model_in_the_place_of_the_first_is_refused_until_the_store_is_indexed_anew(place, capsys):
    shutil.rmtree("one")
    shutil.copytree("two", "one")
    for args in (["search", "facts", "x"], ["add", "facts", "notes.jsonl"]):
        capsys.readouterr()
        assert main(["store", *args]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "the vectors of facts are of another model than one is now" in line
        assert line.endswith("Fix: octavo store index facts --model MODEL.")
    assert main(["store", "index", "facts", "--model", "two"]) == 0
    assert first(capsys, "facts", TEXTS[1])["score"] == pytest.approx(1, abs=1e-5)
    assert main(["store", "index", "facts"]) == 0
    assert first(capsys, "facts", "library")["id"] == 2
    assert not list((place / "facts").glob("vectors-*"))
    assert main(["store", "index", "facts", "--model", "one"]) == 0
    assert first(capsys, "facts", TEXTS[0])["score"] == pytest.approx(1, abs=1e-5)


def test_the_same_model_in_another_number_format_is_the_same(place):
    lm = octavo.load("one", torch.bfloat16)
    Store.open("facts", lm.embed)


def test_vectors_of_another_width_are_refused(place):
    with pytest.raises(ConfigError, match="another model"):
        Store.open("facts", lambda texts: np.ones((len(texts), 5), np.float32))


def test_a_store_written_before_models_were_recognised_still_opens(place):
    about = json.loads((place / "facts" / "store.json").read_text())
    assert len(about.pop("probe")) == 16
    (place / "facts" / "store.json").write_text(json.dumps(about))
    assert Store.open("facts", octavo.load("two").embed).probe is None


def test_one_line_says_which_model_is_missing_or_makes_no_vectors(place, capsys):
    shutil.rmtree("one")
    (place / "none").mkdir()
    cases = [
        (["search", "facts", "x"], "facts is searched with a model: one does not exist", "octavo store index facts"),
        (["build", "new", "notes.jsonl", "--model", "nowhere"], "nowhere does not exist", "Fix:"),
        (["build", "new", "notes.jsonl", "--model", "none"], "none is an empty folder", "Fix:"),
        (["build", "facts", "notes.jsonl", "--model", "two"], "facts exists and is not empty", "octavo store add"),
    ]  # fmt: skip
    for args, said, fix in cases:
        capsys.readouterr()
        assert main(["store", *args]) == 2, args
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error[CONFIG]: ") and said in line and fix in line, line
    assert not (place / "new").exists()


def test_a_package_that_is_not_installed_is_named(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    assert main(["store", "build", "words", "notes.jsonl"]) == 0
    capsys.readouterr()
    assert main(["store", "search", "words", "library"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error[CONFIG]: search by words needs the package bm25s. Fix: ./setup.sh --extras rag."
    with pytest.raises(ConfigError, match="more than 50,000 passages needs the package usearch"):
        Dense(np.ones((3, 4), np.float32), lambda _: np.ones((1, 4)), exact=False)
    assert first(capsys, "facts", TEXTS[0])["text"] == TEXTS[0]  # few vectors need neither


def test_passages_whose_end_the_model_does_not_read_are_counted(place, capsys):
    (place / "long.txt").write_text("word " * 100)
    capsys.readouterr()
    assert main(["store", "add", "facts", "long.txt"]) == 0
    assert "1 of them are longer than the 64 tokens that the model reads" in capsys.readouterr().err
    assert main(["store", "add", "facts", "notes.jsonl"]) == 0
    assert "longer than" not in capsys.readouterr().err
    assert main(["store", "index", "facts", "--model", "two"]) == 0
    assert "1 of them are longer" in capsys.readouterr().err


def test_a_change_of_the_way_of_search_keeps_passages_and_numbers(tmp_path):
    made = Store.create(tmp_path / "facts", StoreConfig())
    made.add((text, "a.txt") for text in TEXTS)
    made.remove(ids=[1])
    asked = []

    def embed(texts):
        asked.append(list(texts))
        return np.array([[len(text), text.count("a")] for text in texts], np.float32)

    made.index_by(StoreConfig(index=Dense.Config(model="letters")), embed)
    assert asked == [TEXTS[1:], [PROBE]]
    again = Store.open(tmp_path / "facts", embed)
    assert [passage.id for passage in again.passages] == [2, 3] and again.next_id == 4
    assert again.search(TEXTS[2], 1)[0].passage.id == 3
