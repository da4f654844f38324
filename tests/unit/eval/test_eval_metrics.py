"""Scores: hand-computed figures, byte-exact counting, windows that tile, padding that does not matter."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError, DataError, NumericError
from octavo.eval.metrics import (
    Scores,
    neural_scorer,
    ngram_scorer,
    score_documents,
    token_byte_lengths,
    windows,
)
from octavo.ngrams.counting import NGramCounts

PAD, BOS, EOS = 0, 1, 2


@dataclass
class Pieces:
    """A vocabulary given as bytes."""

    pieces: list[bytes]

    @property
    def vocab_size(self):
        return len(self.pieces)

    def token_bytes(self, id):
        return self.pieces[id]


def running_sum_logits(tokens, vocab_size=11, reach=None):
    """A causal toy model: the logits at t depend on the last ``reach`` tokens up to t."""
    weight = torch.sin(torch.arange(1, vocab_size + 1).double()[:, None] * torch.arange(1, vocab_size + 1).double())
    one_hot = torch.nn.functional.one_hot(tokens, vocab_size).double() @ weight
    total = one_hot.cumsum(1)
    if reach is not None:
        total = total - torch.nn.functional.pad(total, (0, 0, reach, 0))[:, : total.shape[1]]
    return total


def plain_log_probs(document, **kwargs):
    tokens = torch.tensor(document)[None]
    log_probs = running_sum_logits(tokens[:, :-1], **kwargs).float().log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None])[0, :, 0].double().numpy()


def documents(sizes, vocab_size=11, seed=0):
    rng = np.random.default_rng(seed)
    return [np.concatenate([[BOS], rng.integers(3, vocab_size, size), [EOS]]) for size in sizes]


def test_figures_by_hand():
    # p = 1/2, 1/4, 1/8 over the text tokens, 1/16 for eos; the tokens hold 1, 2 and 3 bytes.
    log_probs = np.log([1 / 2, 1 / 4, 1 / 8, 1 / 16])
    hits = np.array([True, False, True, True])
    lengths = np.array([0, 0, 0, 1, 2, 3])
    scores = score_documents(lambda _: (log_probs, hits), [np.array([BOS, 3, 4, 5, EOS])], lengths, EOS)
    assert (scores.n_tokens, scores.n_bytes, scores.n_hits, scores.n_eos) == (3, 6, 2, 1)
    assert scores.bits_per_byte == pytest.approx((1 + 2 + 3) / 6)
    # The exponential of the mean is the geometric mean of the branching: (2 * 4 * 8)^(1/3).
    assert scores.perplexity == pytest.approx((2 * 4 * 8) ** (1 / 3))
    assert math.log2(scores.perplexity) == pytest.approx(2.0)  # positive: minus the mean of log p
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.figures()["eos_nats"] == pytest.approx(math.log(16))


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    scorer = neural_scorer(lambda tokens: torch.zeros(*tokens.shape, 11), 8, vocab_size=11)
    scores = score_documents(scorer, documents([20, 3, 0]), np.ones(11, int), EOS)
    assert scores.perplexity == pytest.approx(11)
    assert scores.bits_per_byte == pytest.approx(math.log2(11))
    assert (scores.n_documents, scores.n_tokens, scores.n_eos) == (3, 23, 3)


def test_bytes_of_chinese_and_of_tokens_that_are_not_utf8():
    # 中 is e4 b8 ad: one token holds two of its bytes, the next the third and a letter. Neither is UTF-8.
    tokenizer = Pieces([b"", b"", b"", b"\xe4\xb8", b"\xad" + b"a", "国".encode()])
    document = np.array([BOS, 3, 4, 5, EOS])
    lengths = token_byte_lengths(tokenizer)
    scores = score_documents(
        neural_scorer(lambda tokens: torch.zeros(*tokens.shape, 6), 4, vocab_size=6), [document], lengths, EOS
    )
    assert scores.n_bytes == len("中a国".encode()) == 7
    assert scores.bits_per_byte == pytest.approx(3 * math.log2(6) / 7)


def test_eos_is_text_only_where_it_ends_nothing():
    log_probs = np.log(np.full(3, 0.5))
    scores = score_documents(
        lambda _: (log_probs, np.ones(3, bool)), [np.array([BOS, 3, EOS, 4])], np.array([0, 0, 0, 1, 1]), EOS
    )
    assert (scores.n_tokens, scores.n_eos, scores.n_bytes) == (3, 0, 2)
    assert scores.figures()["eos_nats"] is None


@pytest.mark.parametrize("n_inputs", [0, 1, 7, 8, 9, 12, 13, 29, 64])
@pytest.mark.parametrize(("length", "stride"), [(8, 1), (8, 3), (8, 4), (8, 8), (1, 1)])
def test_windows_score_everything_once_with_enough_context(n_inputs, length, stride):
    scored = []
    for start, stop, skip in windows(n_inputs, length, stride):
        assert 0 <= start < stop <= n_inputs
        assert stop - start <= length
        for at in range(start + skip, stop):
            # Input tokens the prediction at `at` can read, itself included.
            assert at - start + 1 >= min(at + 1, length - stride + 1)
            scored.append(at)
    assert scored == list(range(n_inputs))


def test_short_documents_equal_one_plain_pass_and_padding_is_harmless():
    held_out = documents([5, 1, 30, 0, 17])
    scorer = neural_scorer(running_sum_logits, 64, vocab_size=11)
    log_probs, hits = scorer(held_out)
    np.testing.assert_allclose(log_probs, np.concatenate([plain_log_probs(d) for d in held_out]), atol=1e-6)
    assert len(hits) == len(log_probs)
    best = running_sum_logits(torch.tensor(held_out[2])[None, :-1])[0].argmax(-1).numpy()
    start = sum(len(d) - 1 for d in held_out[:2])
    np.testing.assert_array_equal(hits[start : start + 31], best == held_out[2][1:])


@pytest.mark.parametrize("stride", [None, 1, 5, 12])
def test_windows_are_exact_for_a_model_that_reads_no_further_than_the_context_they_keep(stride):
    # max_seq_len 16: with stride s every token keeps at least 16 - s + 1 inputs.
    reach = 16 - (stride or 8) + 1
    held_out = documents([200, 15, 16, 17, 3], seed=1)
    log_probs, _ = neural_scorer(lambda t: running_sum_logits(t, reach=reach), 16, stride, vocab_size=11)(held_out)
    expected = np.concatenate([plain_log_probs(d, reach=reach) for d in held_out])
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)


def test_small_batches_give_the_same_scores(monkeypatch):
    held_out = documents([40, 3, 12, 25, 9], seed=2)
    whole = neural_scorer(running_sum_logits, 16, vocab_size=11)(held_out)[0]
    monkeypatch.setattr("octavo.eval.metrics.BATCH_LOGITS", 1)
    monkeypatch.setattr("octavo.eval.metrics.CHUNK_LOGITS", 33)
    np.testing.assert_allclose(neural_scorer(running_sum_logits, 16, vocab_size=11)(held_out)[0], whole, atol=1e-6)
    monkeypatch.setattr("octavo.eval.metrics.GROUP_TOKENS", 10)
    lengths = np.ones(11, int)
    grouped = score_documents(neural_scorer(running_sum_logits, 16, vocab_size=11), held_out, lengths, EOS)
    assert grouped.n_tokens == sum(len(d) - 2 for d in held_out)
    assert grouped.nats + grouped.eos_nats == pytest.approx(-whole.sum())


def test_ngram_and_neural_models_are_scored_on_the_same_tokens():
    train, held_out = documents([30] * 20), documents([9, 0, 22], seed=5)
    lengths = np.arange(11)
    ngram = score_documents(ngram_scorer(NGramCounts.of(train, 11, 3).model(3, "kneser_ney")), held_out, lengths, EOS)
    neural = score_documents(neural_scorer(running_sum_logits, 8, vocab_size=11), held_out, lengths, EOS)
    n_bytes = sum(int(document[1:-1].sum()) for document in held_out)
    for scores in (ngram, neural):
        assert (scores.n_documents, scores.n_tokens, scores.n_bytes, scores.n_eos) == (3, 31, n_bytes, 3)


def test_cross_entropy_is_never_below_the_entropy():
    # The notes have it the other way round: H(p, q) >= H(p), equal for q = p.
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    tokens = np.repeat(np.arange(3, 7), [4, 2, 1, 1])
    entropy = -(p * np.log2(p)).sum()

    def bits(q):
        scorer = neural_scorer(lambda t: torch.tensor(np.log(q)).expand(*t.shape, 7), 16, vocab_size=7)
        return score_documents(scorer, [np.array([BOS, *tokens])], np.ones(7, int), EOS).bits_per_byte

    assert bits(np.array([1e-30, 1e-30, 1e-30, *p])) == pytest.approx(entropy)
    assert all(bits(rng.dirichlet(np.ones(7))) > entropy for _ in range(20))


def test_refusals():
    with pytest.raises(ConfigError, match=r"eval\.stride = 9"):
        neural_scorer(running_sum_logits, 8, 9, vocab_size=11)
    with pytest.raises(DataError, match="no text"):
        score_documents(neural_scorer(running_sum_logits, 8, vocab_size=11), documents([0]), np.ones(11), EOS)
    with pytest.raises(NumericError, match="not finite"):
        score_documents(
            neural_scorer(lambda t: torch.full((*t.shape, 11), torch.nan), 8, vocab_size=11),
            documents([3]),
            np.ones(11, int),
            EOS,
        )
    assert math.isnan(Scores().bits_per_byte)
