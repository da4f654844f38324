"""Modified Kneser-Ney, ARPA files and perplexities against KenLM's lmplz and query, number by number."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from octavo.ngrams import NGramCounts, read_arpa, write_arpa
from octavo.ngrams.counting import TokenStream
from octavo.ngrams.text import BOS, Vocabulary, encode_files

GOLDEN = Path(__file__).parent / "golden" / "kenlm"
CLOSE = 1e-5  # of a log10; KenLM computes in single precision


def ours(name, order):
    vocabulary, stream = Vocabulary("words"), TokenStream()
    for piece in encode_files(vocabulary, [GOLDEN / f"{name}.txt"], grow=True):
        stream.append(*piece)
    counts = NGramCounts.from_stream(stream, len(vocabulary), order)
    return counts.model(order, "modified_kneser_ney", never=BOS), vocabulary


def theirs(name, folder):
    path = folder / "theirs.arpa"
    path.write_bytes(gzip.decompress((GOLDEN / f"{name}.arpa.gz").read_bytes()))
    return path


def log10(values):
    with np.errstate(divide="ignore"):
        return np.nan_to_num(np.log10(values), neginf=-99)


@pytest.mark.rows("N4")
@pytest.mark.parametrize(("text", "order"), [*(("text", order) for order in range(1, 6)), ("tiny", 3)])
def test_every_number_of_lmplz(text, order, tmp_path):
    model, vocabulary = ours(text, order)
    write_arpa(model, vocabulary.names, tmp_path / "ours.arpa")
    (mine, words), (reference, their_words) = (
        read_arpa(tmp_path / "ours.arpa"),
        read_arpa(theirs(f"{text}-{order}", tmp_path)),
    )
    assert words == their_words
    assert words[:3] == ["<unk>", "<s>", "</s>"]
    assert len(mine.levels) == len(reference.levels) == order
    for k in range(order):
        np.testing.assert_array_equal(mine.keys[k], reference.keys[k])
        assert np.abs(log10(mine.levels[k].prob) - log10(reference.levels[k].prob)).max() < CLOSE
        assert np.abs(log10(mine.levels[k].gamma) - log10(reference.levels[k].gamma)).max() < CLOSE
    assert bool(model.said["fallback_orders"]) == (text == "tiny")
    if order > 1:
        assert (log10(reference.levels[1].gamma) < -0.1).any()


@pytest.mark.rows("N4")
def test_perplexity_of_query(tmp_path):
    """Line by line and in all, unknown words included and not; our model and lmplz's file give the same."""
    said = json.loads((GOLDEN / "query.json").read_text())
    lines = [line.split() for line in said if line.startswith("Total:")]
    summary = [line.split(":")[1].strip() for line in said if not line.startswith("Total:")]
    model, vocabulary = ours("text", 3)
    read, words = read_arpa(theirs("text-3", tmp_path))
    for scored in (model, read):
        ((tokens, starts),) = encode_files(Vocabulary("words", words), [GOLDEN / "new.txt"])
        log_probs = scored.log_probs(tokens, np.append(starts, len(tokens))) / np.log(10)
        first = np.zeros(len(tokens), bool)
        first[starts] = True
        unknown = tokens[~first] == vocabulary.unk
        line = np.cumsum(first)[~first] - 1
        assert len(lines) == line[-1] + 1
        for i, (_, total, _, n_unknown) in enumerate(lines):
            assert log_probs[line == i].sum() == pytest.approx(float(total), abs=2e-4)
            assert unknown[line == i].sum() == int(n_unknown)
        assert int(summary[2]) == unknown.sum() == 1
        assert int(summary[3]) == len(log_probs)
        assert 10 ** -log_probs.mean() == pytest.approx(float(summary[0]), rel=1e-4)
        assert 10 ** -log_probs[~unknown].mean() == pytest.approx(float(summary[1]), rel=1e-4)
