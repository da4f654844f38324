"""scores.json: the model, the baselines on the same tokens and from the given text alone, the differences."""

import json

import numpy as np
import pytest
import torch

from octavo.eval.answers import Question
from octavo.eval.metrics import ngram_scorer, score_documents
from octavo.eval.runner import EvalConfig, evaluate, summary, take
from octavo.ngrams.counting import NGramCounts

BOS, EOS, V = 1, 2, 20


class Special:
    bos, eos = BOS, EOS


class Letters:
    """A byte vocabulary of a few letters."""

    vocab_size, special = V, Special()

    def token_bytes(self, id):
        return b"" if id < 3 else bytes([ord("a") + id - 3])


class Stored:
    def __init__(self, documents):
        self.documents, self.read = documents, set()
        self.n_documents = len(documents)

    def document(self, index):
        self.read.add(index)
        return self.documents[index]


def text(n_documents, seed):
    """Letters that follow a fixed cycle nine times out of ten."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(n_documents):
        tokens = [BOS]
        for _ in range(40):
            tokens.append(3 + (tokens[-1] * 7 + 1) % 17 if rng.random() < 0.9 else int(rng.integers(3, V)))
        documents.append(np.array([*tokens, EOS], np.uint16))
    return documents


def uniform(tokens):
    return torch.zeros(*tokens.shape, V)


def run(**changes):
    arguments = {
        "logits_fn": uniform,
        "max_seq_len": 16,
        "tokenizer": Letters(),
        "held_out": Stored(text(10, 1)),
        "trained_on": Stored(text(60, 2)),
        "config": EvalConfig(),
    } | changes
    return evaluate(**arguments)


def test_model_and_baselines(tmp_path):
    held_out, trained_on = text(10, 1), text(60, 2)
    result = run(out=tmp_path / "scores.json", about={"model": "m"}, n_bytes=400)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    assert result["model"]["bits_per_byte"] == pytest.approx(np.log2(V))
    assert (result["model"]["tokens"], result["model"]["bytes"], result["model"]["documents"]) == (400, 400, 10)
    assert result["scored"]["byte_exact"] is True
    assert run(n_bytes=401)["scored"]["byte_exact"] is False

    baseline = result["baseline"]
    assert list(baseline["orders"]) == ["1", "2", "3", "4", "5", "6", "7"]
    assert baseline["trained_on"] == {"documents": 60, "tokens": 60 * 42, "all_of_the_training_text": True}
    lengths = np.array([0, 0, 0] + [1] * 17)
    for order in (1, 3, 7):
        model = NGramCounts.of(trained_on, V, order).model(order, "kneser_ney")
        alone = score_documents(ngram_scorer(model), held_out, lengths, EOS)
        assert baseline["orders"][str(order)] == alone.figures()
    bits = {int(order): figures["bits_per_byte"] for order, figures in baseline["orders"].items()}
    assert baseline["trigram_bits_per_byte"] == bits[3]
    assert baseline["best_order"] == min(range(3, 8), key=bits.__getitem__)
    assert bits[2] < bits[1]
    assert {figures["tokens"] for figures in baseline["orders"].values()} == {400}
    assert result["differences"] == {
        "model_minus_trigram": result["model"]["bits_per_byte"] - bits[3],
        "model_minus_best": result["model"]["bits_per_byte"] - baseline["best_bits_per_byte"],
    }
    lines = summary(result)
    assert lines["Kneser-Ney order 3"].startswith(f"{bits[3]:.4f}   (model +")


def test_the_baseline_reads_all_the_training_text_and_no_other():
    held_out, trained_on = Stored(text(4, 1)), Stored(text(9, 2))
    run(held_out=held_out, trained_on=trained_on)
    assert trained_on.read == set(range(9))
    assert run(trained_on=None)["baseline"] is None
    assert run(config=EvalConfig(orders=()))["baseline"] is None


def test_a_baseline_on_part_of_the_text_says_so():
    baseline = run(config=EvalConfig(max_baseline_tokens=42 * 5 + 10, orders=(2,)))["baseline"]
    assert baseline["trained_on"] == {"documents": 5, "tokens": 210, "all_of_the_training_text": False}
    assert (baseline["best_order"], baseline["trigram_bits_per_byte"]) == (None, None)
    assert run(config=EvalConfig(orders=(2,)))["differences"] == {}


def test_modified_baseline():
    plain, modified = run()["baseline"], run(config=EvalConfig(modified=True))["baseline"]
    assert modified["kind"] == "modified Kneser-Ney"
    assert modified["orders"]["3"]["bits_per_byte"] != plain["orders"]["3"]["bits_per_byte"]


def test_limits():
    stored = Stored(text(10, 1))
    lengths = np.array([0, 0, 0] + [1] * 17)
    assert len(list(take(stored, lengths, None, None))) == 10
    assert len(list(take(stored, lengths, 3, None))) == 3
    assert len(list(take(stored, lengths, None, 81))) == 3
    assert len(list(take(stored, lengths, 2, 81))) == 2
    result = run(config=EvalConfig(max_documents=2))
    assert (result["scored"]["documents"], result["scored"]["held_out_documents"]) == (2, 10)


def test_answers():
    questions = [Question([{"role": "user", "content": str(i)}], "yes", "k") for i in range(10)]
    result = run(
        questions=questions,
        generate_fn=lambda conversations: [("yes.", True)] * len(conversations),
        config=EvalConfig(answers=4),
    )
    assert (result["answers"]["questions"], result["answers"]["exact_match"]) == (4, 1.0)
    assert summary(result)["stops by itself"] == "100.0%"
    assert run(questions=questions)["answers"] is None


def test_the_config_refuses_nonsense():
    for nonsense in ({"orders": (0,)}, {"orders": (40,)}, {"stride": 0}, {"answers": -1}, {"order": 3}):
        with pytest.raises(ValueError, match=next(iter(nonsense))):
            EvalConfig(**nonsense)
