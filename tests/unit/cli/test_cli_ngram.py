"""``octavo ngram``: train, score, ARPA files, coverage, and refusals in the one form."""

import math

import numpy as np
import pytest

from octavo.cli.main import main
from octavo.ngrams import load

TEXT = "the cat sat on the mat\nthe dog sat on the cat\n\na dog and a cat\n" * 3


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "new.txt").write_text("the cat sat\nthe zebra sat on a mat\n")
    return str(tmp_path / "train.txt"), str(tmp_path / "new.txt"), str(tmp_path / "lm")


def figures(out):
    return dict(line.split(":\t") for line in out.splitlines() if ":\t" in line)


@pytest.mark.parametrize("units", ["words", "characters", "bytes"])
@pytest.mark.parametrize("smoothing", ["modified_kneser_ney", "add_k", "infinigram"])
def test_train_and_score(texts, units, smoothing, capsys):
    train, new, lm = texts
    more = ["--set", "unseen=0.1"] if smoothing == "infinigram" else ["--memory", "32M"]
    more += ["--units", units, "--smoothing", smoothing]
    assert main(["ngram", "train", train, "--out", lm, "--order", "3", *more]) == 0
    assert main(["ngram", "score", lm, new, "--lines"]) == 0
    out = capsys.readouterr().out
    found = figures(out)
    n = {"words": 11, "characters": 35, "bytes": 35}[units]
    assert int(found["Tokens"]) == n
    assert int(found["OOVs"]) == {"words": 1, "characters": 3, "bytes": 0}[units]
    assert 1 < float(found["Perplexity including OOVs"]) < 300
    totals = [float(line.split()[1]) for line in out.splitlines() if line.startswith("Total:")]
    assert len(totals) == 2
    assert 10 ** (-sum(totals) / n) == pytest.approx(float(found["Perplexity including OOVs"]), rel=1e-4)


@pytest.mark.rows("N4")
def test_arpa_out_and_in(texts, tmp_path, capsys):
    train, new, lm = texts
    assert main(["ngram", "train", train, "--out", lm, "--order", "3"]) == 0
    assert "too little text" in capsys.readouterr().out
    arpa = str(tmp_path / "lm.arpa")
    assert main(["ngram", "arpa", lm, arpa]) == 0
    assert main(["ngram", "arpa", arpa, str(tmp_path / "again")]) == 0
    capsys.readouterr()
    said = []
    for model in (lm, arpa, str(tmp_path / "again")):
        assert main(["ngram", "score", model, new]) == 0
        said.append(figures(capsys.readouterr().out))
    for other in said[1:]:
        for name, value in said[0].items():
            assert float(other[name]) == pytest.approx(float(value), rel=1e-6)


def test_a_tokenizer_gives_the_units(texts, tmp_path, capsys):
    train, new, lm = texts
    tok = str(tmp_path / "tok")
    assert main(["tokenizer", "train", train, "--out", tok, "--kind", "byte_bpe", "--vocab-size", "300"]) == 0
    assert main(["ngram", "train", train, "--out", lm, "--order", "2", "--units", tok]) == 0
    assert main(["ngram", "score", lm, new]) == 0
    assert figures(capsys.readouterr().out)["OOVs"] == "0"
    assert main(["ngram", "arpa", lm, str(tmp_path / "lm.arpa")]) == 0
    model = load(lm)
    assert model.config.never is not None
    assert np.exp(model.next_log_probs([model.config.never])).sum() == pytest.approx(1)


@pytest.mark.rows("N6")
def test_coverage(texts, capsys):
    train, new, _ = texts
    assert main(["ngram", "coverage", train, "--held-out", new, "--order", "4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    shares = [float(row[2].rstrip("%")) for row in rows]
    assert shares[0] == pytest.approx(100 * 10 / 11, abs=0.01)
    assert shares == sorted(shares, reverse=True)
    assert len(rows) == 4


def test_interpolated_learns_on_held_out_text(texts, capsys):
    train, new, lm = texts
    assert main(["ngram", "train", train, "--out", lm, "--smoothing", "interpolated", "--held-out", new]) == 0
    assert len(load(lm).said["weights"]) == 5


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "TRAIN", "--out", "LM", "--smoothing", "kneser_nay"], 2, "did you mean `kneser_ney`"),
        (["train", "TRAIN", "--out", "LM", "--set", "k"], 2, "KEY=VALUE"),
        (["train", "TRAIN", "--out", "LM", "--set", "k=1"], 2, "smoothing"),
        (["train", "TRAIN", "--out", "LM", "--units", "syllables"], 2, "neither a unit nor a tokenizer"),
        (["train", "TRAIN", "--out", "LM", "--memory", "much"], 2, "is no size"),
        (["train", "TRAIN", "--out", "LM", "--memory", "1K"], 2, "too little"),
        (["train", "TRAIN", "--out", "LM", "--smoothing", "interpolated"], 2, "was given none"),
        (["train", "none.txt", "--out", "LM"], 3, "is no file"),
        (["score", "LM", "TRAIN"], 3, "does not exist"),
    ],
)
def test_refusals(texts, words, code, message, capsys):
    train, _, lm = texts
    words = [{"TRAIN": train, "LM": lm}.get(word, word) for word in words]
    assert main(["ngram", *words]) == code
    assert message in capsys.readouterr().err


def test_a_special_in_the_text_is_refused(texts, tmp_path, capsys):
    (tmp_path / "odd.txt").write_text("a <s> b\n")
    assert main(["ngram", "train", str(tmp_path / "odd.txt"), "--out", texts[2]]) == 3
    assert "'<s>' as a word" in capsys.readouterr().err


def test_a_score_that_is_no_probability_says_so(texts, capsys):
    train, new, lm = texts
    assert main(["ngram", "train", train, "--out", lm, "--smoothing", "stupid_backoff"]) == 0
    assert main(["ngram", "score", lm, new]) == 0
    out = capsys.readouterr().out
    assert "are not probabilities" in out
    assert float(figures(out)["Perplexity including OOVs"]) == math.inf  # zebra has a score of 0
    assert math.isfinite(float(figures(out)["Perplexity excluding OOVs"]))
