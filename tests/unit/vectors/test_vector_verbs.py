"""``octavo vectors``, and models that start from word vectors."""

import json

import numpy as np
import pytest
import yaml
from recipes import tiny_recipe, write_texts
from test_word2vec import planted

import octavo
from octavo.cli.main import main
from octavo.errors import ConfigError
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import Byte, ByteBPE, Word
from octavo.tokenizer import train as train_tokenizer
from octavo.vectors import StartVectors, Vectors, embedding, formats

SMALL = ["--dim", "8", "--min-count", "1", "--epochs", "2"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(planted(400)), encoding="utf-8")
    return "text.txt"


def refusal(capsys, *words: str, code: int = 2) -> str:
    assert main(["vectors", *words]) == code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.rows("N7")
def test_vectors_are_trained_asked_and_converted(text, tmp_path, capsys):
    train = ["vectors", "train", text, *SMALL, "--kind", "cbow"]
    assert main([*train, "--out", "a.vec"]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("words of 8 numbers -> a.vec\n")
    assert "2,000 words" in told.err and "training 4,000/4,000 words" in told.err and "loss" in told.err
    assert main([*train, "--out", "b.bin"]) == 0
    assert main(["vectors", "convert", "b.bin", "b.vec"]) == 0
    assert (tmp_path / "a.vec").read_bytes() == (tmp_path / "b.vec").read_bytes()
    assert main(["vectors", "convert", "a.vec", "c.txt", "--limit", "5"]) == 0
    assert "5 words of 8 numbers -> c.txt (glove)" in capsys.readouterr().out
    assert len((tmp_path / "c.txt").read_text().splitlines()) == 5

    assert main(["vectors", "near", "a.vec", "topic1a", "--n", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [[w, pytest.approx(s, abs=1e-5)] for w, s in formats.read("a.vec").near("topic1a", 3)]
    for method in ("add", "mul"):
        assert main(["vectors", "analogy", "a.vec", "topic1a", "topic1b", "topic2a", "--method", method]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 10
    (tmp_path / "q.txt").write_text(": all\ntopic1a topic1b topic2a topic2b\nno such words here\n")
    assert main(["vectors", "analogy", "a.vec", "--questions", "q.txt", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert sections[0]["asked"] == sections[1]["asked"] == 1 and sections[1]["unknown"] == 1
    assert not [p.name for p in tmp_path.iterdir() if "tmp" in p.name or "unfinished" in p.name]


def test_a_training_that_ran_out_of_time_goes_on(text, tmp_path, capsys, monkeypatch):
    train = ["vectors", "train", text, *SMALL, "--backend", "plain", "--dim", "4"]
    monkeypatch.setattr("octavo.vectors.training.BLOCK", {"native": 500, "plain": 500})
    assert main([*train, "--out", "whole.vec"]) == 0
    seconds = iter([0.0, 0.0])
    real = octavo.stop.StopSignal.reason.fget

    def reason(self):
        return real(self) or ("enough" if self.seconds_left < 1e9 and next(seconds, None) is None else "")

    with monkeypatch.context() as patched:
        patched.setattr("octavo.stop.StopSignal.reason", property(reason))
        assert main([*train, "--out", "a.vec", "--max-time", "1h"]) == 75
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error[STOPPED]") and "Kept: a.vec.unfinished" in error
    assert main([*train, "--out", "a.vec"]) == 0
    assert "going on from a.vec.unfinished" in capsys.readouterr().err
    assert (tmp_path / "a.vec").read_bytes() == (tmp_path / "whole.vec").read_bytes()
    assert not (tmp_path / "a.vec.unfinished").exists()


def test_text_is_split_by_a_tokenizer(text, tmp_path, capsys):
    train_tokenizer(ByteBPE(vocab_size=300), [(tmp_path / text).read_text()]).save(tmp_path / "tok")
    assert main(["vectors", "train", text, *SMALL, "--out", "a.vec", "--split", "tok"]) == 0
    known = set(octavo.tokenizer.load(tmp_path / "tok").tokens)
    assert set(formats.read("a.vec").words) <= known
    assert main(["vectors", "train", text, *SMALL, "--out", "c.vec", "--split", "characters"]) == 0
    assert all(len(word) == 1 for word in formats.read("c.vec").words)


def test_what_cannot_be_done_is_refused_in_one_line(text, tmp_path, capsys):
    out = ["--out", "x.vec"]
    assert "--kind bow" in refusal(capsys, "train", text, *out, "--kind", "bow")
    assert "--dim 0" in refusal(capsys, "train", text, *out, "--dim", "0")
    assert "no way of splitting" in refusal(capsys, "train", text, *out, "--split", "nothing")
    assert "no format" in refusal(capsys, "train", text, "--out", "x.npz")
    assert "does not exist" in refusal(capsys, "train", "nothing.txt", *out, code=3)
    assert "occur 900 times" in refusal(capsys, "train", text, *out, "--min-count", "900", code=3)
    (tmp_path / "x.vec").write_text("2 2\na 1 2\nb 1 x\n")
    assert "nothing is overwritten" in refusal(capsys, "train", text, *out)
    assert "x.vec:3" in refusal(capsys, "near", "x.vec", "a", code=3)
    assert "three words" in refusal(capsys, "analogy", "x.vec", "a", "b")
    assert "--method" in refusal(capsys, "analogy", "x.vec", "a", "b", "c", "--method", "divide")
    assert "no format" in refusal(capsys, "convert", "x.vec", "y.vec", "--to", "json")
    (tmp_path / "x.vec").write_text("1 2\na 1 2\n")
    assert "no vector for 'zebra'" in refusal(capsys, "near", "x.vec", "zebra")
    assert "no format" in refusal(capsys, "export", "nothing", "y.npz")


# ------------------------------------------------------------------------------------------ a model's embedding


def small(tokenizer, seed: int = 0, **settings) -> Decoder:
    blocks = {"block": {"mixer": {"n_heads": 2}}}
    shape = {"d_model": 8, "n_layers": 1, "vocab_size": tokenizer.vocab_size + 3, "max_seq_len": 16, "blocks": blocks}
    return build(Decoder.Config.model_validate(shape | settings), seed=seed)


def test_known_tokens_start_from_vectors_and_the_others_as_before(tmp_path):
    tokenizer = train_tokenizer(ByteBPE(vocab_size=330), ["the cat sat on the mat, the cat ran " * 20])
    assert {"Ġthe", "Ġcat"} <= set(tokenizer.tokens)
    chance = np.random.default_rng(0).normal(0, 3, (3, 8)).astype(np.float32)
    formats.write(Vectors(["the", "Ġcat", "<|pad|>"], chance), tmp_path / "x.vec")
    before, model = small(tokenizer), small(tokenizer)
    coverage = embedding.fill(model, tokenizer, StartVectors(path=str(tmp_path / "x.vec"), scale="keep"))
    weight, old = model.embed.weight.detach().numpy(), before.embed.weight.detach().numpy()
    the = [i for i, t in enumerate(tokenizer.tokens) if t in ("Ġthe", "the")]
    cat = tokenizer.tokens.index("Ġcat")
    assert all((weight[i] == chance[0]).all() for i in the) and (weight[cat] == chance[1]).all()
    others = [i for i in range(len(weight)) if i not in (*the, cat)]
    assert (weight[others] == old[others]).all()
    assert (coverage.known, coverage.by_text) == (len(the) + 1, 1)
    assert "start from word vectors" in str(coverage)

    matched = small(tokenizer)
    embedding.fill(matched, tokenizer, StartVectors(path=str(tmp_path / "x.vec")))
    rows = matched.embed.weight.detach().numpy()[[*the, cat]]
    assert np.sqrt((rows**2).mean()) == pytest.approx(np.sqrt((old[[*the, cat]] ** 2).mean()), rel=1e-5)
    assert (rows[-1] / rows[0]) == pytest.approx(chance[1] / chance[0], rel=1e-4)


def test_vectors_that_do_not_fit_are_refused(tmp_path):
    tokenizer = train_tokenizer(Word(), ["the cat"])
    for dim, word, what in ((7, "the", "has 7 numbers a word, the model's embedding 8"), (8, "dog", "none of the")):
        formats.write(Vectors([word], np.ones((1, dim), np.float32)), path := tmp_path / f"{dim}.vec")
        with pytest.raises(ConfigError, match=what):
            embedding.fill(small(tokenizer), tokenizer, StartVectors(path=str(path)))


@pytest.mark.rows("N7")
def test_an_exported_embedding_is_what_another_model_starts_from(tmp_path):
    tokenizer = train_tokenizer(ByteBPE(vocab_size=300), ["the cat sat on the mat " * 9])
    trained, fresh = small(tokenizer, tie_embeddings=False), small(tokenizer, seed=9)
    vectors, left_out = embedding.export(trained, tokenizer)
    assert left_out == 0 and len(vectors) == tokenizer.vocab_size
    formats.write(vectors, tmp_path / "x.vec")
    embedding.fill(fresh, tokenizer, StartVectors(path=str(tmp_path / "x.vec"), scale="keep"))
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    assert (fresh.embed.weight[plain] == trained.embed.weight[plain]).all()
    spaces = train_tokenizer(Word(), ["the cat  sat"])
    exported, left_out = embedding.export(small(spaces), spaces)
    assert left_out == 2 and {"the", "cat", "sat"} <= set(exported.words)  # " " and "  "


@pytest.mark.rows("N7")
def test_a_recipe_starts_from_vectors_and_its_model_is_exported(tmp_path, capsys):
    chance = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    formats.write(Vectors(["a", "b", "nowhere"], chance), tmp_path / "x.vec")
    raw = tiny_recipe(tmp_path, vectors={"path": str(tmp_path / "x.vec"), "scale": "keep"})
    raw["tune"], raw["eval"] = None, None
    raw["train"] |= {"optimizer": {"kind": "adamw", "lr": 1e-20}}
    recipe, folder = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(raw))
    assert main(["train", str(recipe), "--out", str(folder)]) == 0
    assert "2 of 256 tokens (0.8%) start from word vectors" in capsys.readouterr().err
    assert main(["vectors", "export", str(folder), str(tmp_path / "y.vec")]) == 0
    exported, tokenizer = formats.read(tmp_path / "y.vec"), octavo.load(folder).tokenizer
    for word, row in (("a", 0), ("b", 1)):
        got = exported[tokenizer.tokens[tokenizer.encode(word)[0]]]
        np.testing.assert_allclose(got, chance[row], rtol=1e-6)

    (tmp_path / "x.vec").unlink()  # a finished run needs it no longer
    assert main(["train", str(recipe), "--out", str(folder)]) == 0
    assert main(["train", str(recipe), "--out", str(tmp_path / "new")]) == 3
    assert "x.vec" in capsys.readouterr().err.splitlines()[-1]
    formats.write(Vectors(["a"], chance[:1, :9]), tmp_path / "x.vec")
    assert main(["train", str(recipe), "--out", str(tmp_path / "narrow")]) == 2
    assert "has 9 numbers a word, the model's embedding 16" in capsys.readouterr().err


def test_vectors_for_a_model_that_exists_are_refused(tmp_path, capsys):
    write_texts(tmp_path / "texts.jsonl")
    raw = tiny_recipe(tmp_path, vectors="x.vec", tokenizer={"kind": "byte_bpe", "vocab_size": 8192})
    raw["model"] = {"kind": "pretrained", "path": "x"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "leave the vectors section out" in capsys.readouterr().err


def test_bytes_have_vectors_too():
    tokenizer = train_tokenizer(Byte(), [])
    vectors, left_out = embedding.export(small(tokenizer), tokenizer)
    assert len(vectors) + left_out == tokenizer.vocab_size
