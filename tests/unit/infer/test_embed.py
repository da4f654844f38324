"""Texts as vectors: batches by length change nothing; the same word in two contexts has two."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from octavo.cli.main import main
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.tokenizer import train
from octavo.tokenizer.config import Word
from octavo.tokenizer.frame import frame

TEXTS = ["the bank of the river", "the bank gave money", "money", "the river of money gave the bank a river", ""]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    tokenizer = train(Word(vocab_size=60, split="whitespace"), TEXTS * 3)
    block = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "mlp"}}
    config = {"d_model": 16, "n_layers": 2, "max_seq_len": 32, "vocab_size": tokenizer.vocab_size, "causal": False,
              "blocks": {"b": block}, "init": {"std": 0.4}}  # fmt: skip
    return LanguageModel(build(Decoder.Config.model_validate(config), seed=3).eval(), tokenizer)


@pytest.mark.rows("A6")
def test_the_same_word_in_two_contexts_has_two_vectors_and_one_static_one(lm):
    word, places, layers = lm.tokenizer.encode("bank")[0], [], []
    for text in TEXTS[:2]:
        ids = lm.tokenizer.encode(text)
        places.append(ids.index(word))
        layers.append([state[places[-1]] for state in lm.hidden_states(ids)])
    assert places[0] == places[1]
    assert torch.equal(layers[0][0], layers[1][0])  # the embedding: one vector a word
    assert all(float((a - b).norm()) > 0.1 for a, b in zip(layers[0][1:], layers[1][1:], strict=True))


@pytest.mark.rows("A6")
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_vectors_are_what_each_text_gives_alone(lm, pooling):
    got = lm.embed(TEXTS, pooling=pooling)
    assert got.shape == (5, 16) and got.dtype == np.float32
    for text, vector in zip(TEXTS, got, strict=True):
        ids = frame(lm.tokenizer, lm.tokenizer.encode(text))[0]
        with torch.no_grad():
            hidden = lm.model(Inputs(torch.tensor([ids])), needs=("hidden",)).hidden[0]
        wanted = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        assert np.allclose(vector, wanted.numpy(), atol=1e-5), text


def test_vectors_may_be_one_long_and_texts_cut(lm):
    assert np.allclose(np.linalg.norm(lm.embed(TEXTS, normalise=True), axis=1), 1, atol=1e-5)
    cut = lm.embed([TEXTS[3]], max_tokens=5)
    assert np.allclose(cut, lm.embed([" ".join(TEXTS[3].split()[:3])]), atol=1e-5)
    told = []
    lm.embed(TEXTS, progress=told.append)
    assert told[-1] == len(TEXTS)


def test_the_command_reads_lines_and_json_lines_and_writes_both(lm, tmp_path, capsys):
    lm.save(tmp_path / "model")
    (tmp_path / "t.txt").write_text("\n".join(TEXTS[:3]) + "\n")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[:3]))
    wanted = lm.embed(TEXTS[:3])
    model, npy, jsonl = (str(tmp_path / name) for name in ("model", "v.npy", "v.jsonl"))
    assert main(["embed", model, str(tmp_path / "t.txt"), "--out", npy]) == 0
    assert np.allclose(np.load(npy), wanted, atol=1e-5)
    assert main(["embed", model, str(tmp_path / "t.jsonl"), "--column", "body", "--out", jsonl]) == 0
    rows = [json.loads(line)["vector"] for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert np.allclose(rows, wanted, atol=1e-5)
    capsys.readouterr()
    for args, code, said in [
        ([model, str(tmp_path / "t.txt"), "--pooling", "max"], 2, "use mean, first, last"),
        ([model, str(tmp_path / "t.txt"), "--out", "v.csv"], 2, "neither .npy nor .jsonl"),
        ([model, str(tmp_path / "t.jsonl")], 3, "t.jsonl:1"),
        ([model, str(tmp_path / "none.txt")], 3, "cannot be read"),
    ]:
        assert main(["embed", *args]) == code
        assert said in capsys.readouterr().err
