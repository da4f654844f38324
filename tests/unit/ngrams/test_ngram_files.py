"""Saved models and ARPA files: what comes back, what is refused."""

import json
import math
import os

import numpy as np
import pytest

from octavo.errors import CheckpointError, ConfigError, DataError
from octavo.ngrams import InfiniGram, NGram, load, read_arpa, write_arpa
from octavo.ngrams.counting import flatten
from octavo.ngrams.text import Vocabulary, encode_files

V = 9


def corpus(n, seed=0):
    rng = np.random.default_rng(seed)
    return [np.concatenate([[0], rng.integers(2, 8, rng.integers(0, 15)), [1]]) for _ in range(n)]


def fitted(kind="modified_kneser_ney", order=3):
    if kind == "infinigram":
        return InfiniGram.fit(InfiniGram.Config(unseen=0.1), corpus(60), V)
    config = NGram.Config(order=order, smoothing=kind, never=0)
    return NGram.fit(config, corpus(60), V, corpus(9, seed=3))


@pytest.mark.parametrize(
    "kind", ["modified_kneser_ney", "katz", "interpolated", "add_k", "stupid_backoff", "infinigram"]
)
def test_a_saved_model_is_the_same_model(kind, tmp_path):
    model, test = fitted(kind), flatten(corpus(20, seed=8))
    model.save(tmp_path / "lm")
    loaded = load(tmp_path / "lm")
    assert type(loaded) is type(model)
    assert (loaded.order, loaded.vocab_size, loaded.normalised) == (model.order, V, model.normalised)
    assert loaded.config == model.config
    for ours, theirs in zip(model.score(*test), loaded.score(*test)):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(model.next_log_probs([0, 3, 4]), loaded.next_log_probs([0, 3, 4]))
    array = loaded.array if kind == "infinigram" else loaded.levels[2].prob
    assert isinstance(array.base, np.memmap)  # mapped, not read
    assert not array.flags.writeable


def test_saving_over_a_model_leaves_only_the_new_one(tmp_path):
    fitted(order=4).save(tmp_path)
    fitted(order=2).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert load(tmp_path).order == 2
    current = {entry["file"] for entry in config["files"].values()}
    assert current <= {path.name for path in tmp_path.iterdir()}
    tables = {path.name for path in tmp_path.glob("*-[12].*.npy")}
    assert tables == {name for name in current if name.split(".")[0][-1] in "12"}


def test_a_crash_while_saving_keeps_the_model_before(tmp_path, monkeypatch):
    first = fitted(order=2)
    first.save(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        fitted(order=3).save(tmp_path)
    assert load(tmp_path).order == 2
    assert not list(tmp_path.glob("*.tmp-*"))


def damage(path, how):
    if how == "cut":
        os.truncate(path, path.stat().st_size - 3)
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["modified_kneser_ney", "infinigram"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_damage_is_refused(kind, how, tmp_path):
    fitted(kind).save(tmp_path)
    files = sorted(tmp_path.glob("*.npy"))
    assert len(files) >= 5
    for path in files:
        whole = path.read_bytes()
        damage(path, how)
        with pytest.raises(CheckpointError, match=path.name.split(".")[0]):
            load(tmp_path)
        path.write_bytes(whole)
    load(tmp_path)


def test_a_foreign_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no n-gram model"):
        load(tmp_path)
    fitted().save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in [
        ({"kind": "decoder"}, "no model of kind"),
        ({"format": 99}, "format 99"),
        ({"settings": {"order": "many"}}, "incomplete"),
        ({"settings": {**config["settings"], "order": 2, "smoothing": {"kind": "octavo:nothing"}}}, "incomplete"),
        ({"files": {}}, "names no file"),
        ({"files": {**config["files"], "keys-2": {**config["files"]["keys-2"], "file": "../keys"}}}, "missing"),
        ({"vocab_size": V + 1}, "do not belong together"),
    ]:
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.rows("N4")
@pytest.mark.parametrize("kind", ["modified_kneser_ney", "kneser_ney", "katz", "interpolated", "mle"])
def test_arpa_and_back(kind, tmp_path):
    model, test = fitted(kind), flatten(corpus(20, seed=8))
    words = ["<s>", "</s>", *"abcdef", "<unk>"]
    write_arpa(model, words, tmp_path / "lm.arpa")
    loaded, names = read_arpa(tmp_path / "lm.arpa")
    assert names == words
    assert loaded.config.never == 0
    np.testing.assert_allclose(np.exp(loaded.log_probs(*test)), np.exp(model.log_probs(*test)), rtol=1e-6)
    loaded.save(tmp_path / "lm")
    ours, theirs = loaded.score(*test), load(tmp_path / "lm").score(*test)
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_an_arpa_file_of_another_tool(tmp_path):
    """Any order of lines, weights left out, no <unk>; numbers by hand."""
    text = """made by hand
\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1.0\tb\t-0.5
-99\t<s>\t-0.25
-0.5\ta
-0.7\t</s>

\\2-grams:
-0.2\tb a
-0.1 <s> b
\\end\\
"""
    path = tmp_path / "lm.arpa"
    path.write_text(text)
    model, words = read_arpa(path)
    assert words == ["b", "<s>", "a", "</s>", "<unk>"]
    vocabulary = Vocabulary("words", words)
    (tmp_path / "new.txt").write_text("b a a zebra\n")
    ((tokens, starts),) = encode_files(vocabulary, [tmp_path / "new.txt"])
    assert tokens.tolist() == [1, 0, 2, 2, 4, 3]
    log10 = model.log_probs(tokens, np.append(starts, len(tokens))) / math.log(10)
    # <s> b listed; b a listed; a after a: no weight, so p(a); an unknown word; </s> after it.
    assert log10 == pytest.approx([-0.1, -0.2, -0.5, -100, -0.7])
    assert model.next_log_probs([0])[3] / math.log(10) == pytest.approx(-0.5 - 0.7)


def test_refused_arpa_files(tmp_path):
    path = tmp_path / "lm.arpa"
    write_arpa(fitted(order=2), ["<s>", "</s>", *"abcdef", "<unk>"], path)
    good = path.read_text()
    for bad, message in [
        ("nothing", "no .data. line"),
        (good.replace("ngram 2=", "ngram 3="), "order 3 where 2 is next"),
        (good.replace("ngram 1=9", "ngram 1=8"), "should stand here"),
        (good[: len(good) // 2], "order 2|ends here"),
        (good.replace("\\end\\", ""), "should stand here"),
        (good.replace("\ta b", "\ta zebra"), "no unigram"),
        (good.replace("\ta b", "\ta c"), "listed twice"),
        (good.replace("\tf\t", "\ta\t"), "word is listed twice"),
        (good.replace("\\2-grams:\n-", "\\2-grams:\nx"), "in order 2"),
    ]:
        assert bad != good
        path.write_text(bad)
        with pytest.raises(DataError, match=message):
            read_arpa(path)
    with pytest.raises(DataError, match="does not exist"):
        read_arpa(tmp_path / "none.arpa")
    with pytest.raises(ConfigError, match="no ARPA form"):
        write_arpa(fitted("stupid_backoff"), ["x"] * V, path)
    with pytest.raises(ConfigError, match="no ARPA form"):
        write_arpa(fitted("add_k"), ["x"] * V, path)
    with pytest.raises(ConfigError, match="white space"):
        write_arpa(fitted(), ["a b"] * V, path)
    with pytest.raises(ConfigError, match="do not name"):
        write_arpa(fitted(), ["a"], path)
