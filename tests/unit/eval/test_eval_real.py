"""The evaluation with our own tokenizer and decoder: bytes of real text, windows, answers."""

import numpy as np
import pytest
import torch

from octavo.eval.answers import Question, greedy, score_answers
from octavo.eval.metrics import neural_scorer, score_documents, token_byte_lengths
from octavo.eval.runner import Encoded, EvalConfig, evaluate
from octavo.infer import native
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.tokenizer import Byte, ByteBPE, Tokenizer, train

EMOJI = "a\u0301 🙂 \U0001f9d1\u200d\U0001f52c naïve"
TEXTS = ["The model reads text.\n", "模型先读文字，再说话。", EMOJI, "", "<|eos|> is plain here"]


def small(vocab_size: int, max_seq_len: int) -> Decoder:
    config = Decoder.Config(
        d_model=32,
        n_layers=2,
        max_seq_len=max_seq_len,
        vocab_size=vocab_size,
        blocks={"block": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}}},
    )
    return build(config, seed=5).eval()


@pytest.fixture(scope="module", params=["byte", "byte_bpe"])
def tokenizer(request) -> Tokenizer:
    return train(Byte(), []) if request.param == "byte" else train(ByteBPE(vocab_size=300), TEXTS * 3)


def test_bytes_of_real_text(tokenizer):
    documents = Encoded(TEXTS, tokenizer)
    lengths = token_byte_lengths(tokenizer)
    scorer = neural_scorer(lambda t: torch.zeros(*t.shape, tokenizer.vocab_size), 8, vocab_size=tokenizer.vocab_size)
    every = [documents.document(i) for i in range(documents.n_documents)]
    for text, document in zip(TEXTS, every):
        assert (document[0], document[-1]) == (tokenizer.special.bos, tokenizer.special.eos)
        if text:
            scores = score_documents(scorer, [document], lengths, tokenizer.special.eos)
            assert scores.n_bytes == len(text.encode())
            assert scores.n_tokens == len(tokenizer.encode(text))


def test_a_decoder_scores_as_in_one_plain_pass(tokenizer):
    long, short = "0123456789" * 9, "短文"
    documents = Encoded([long, short], tokenizer)
    pair = [documents.document(i) for i in range(2)]
    model = small(tokenizer.vocab_size, 256)
    scorer = neural_scorer(lambda t: model(Inputs(t)).logits, 256, vocab_size=tokenizer.vocab_size)
    expected = []
    for document in pair:
        tokens = torch.from_numpy(document.astype(np.int64))[None]
        with torch.no_grad():
            log_probs = model(Inputs(tokens[:, :-1])).logits.log_softmax(-1)
        expected.append(log_probs.gather(-1, tokens[:, 1:, None]).flatten().numpy())
    np.testing.assert_allclose(scorer(pair)[0], np.concatenate(expected), atol=1e-5)


def test_a_whole_evaluation_with_a_context_shorter_than_the_documents(tokenizer):
    model = small(tokenizer.vocab_size, 32)
    questions = [Question([{"role": "user", "content": f"Say {i}"}], str(i)) for i in range(3)]
    held_out = Encoded(TEXTS * 4, tokenizer)
    result = evaluate(
        logits_fn=lambda t: model(Inputs(t)).logits,
        max_seq_len=32,
        tokenizer=tokenizer,
        held_out=held_out,
        n_bytes=held_out.n_bytes,
        trained_on=Encoded(TEXTS * 10, tokenizer),
        config=EvalConfig(orders=(1, 3), stride=8),
        questions=questions,
        generate_fn=greedy(model, tokenizer, max_new_tokens=5),
    )
    assert result["scored"]["byte_exact"] is True
    assert result["model"]["bytes"] == sum(len(text.encode()) for text in TEXTS * 4)
    # The baseline has seen these very texts, the model nothing at all.
    assert result["differences"]["model_minus_trigram"] > 1
    assert result["answers"]["questions"] == 3


def test_greedy_stops_where_the_model_ends_its_turn(tokenizer, monkeypatch):
    monkeypatch.setattr(native, "unsuitable", lambda model: "its logits are changed here")
    model = small(tokenizer.vocab_size, 64)
    batches, logits = [], model.logits
    always_end = {"ends": True}

    def bias(hidden):
        batches.append(len(hidden))
        found = logits(hidden)
        if always_end["ends"]:
            found[..., tokenizer.special.turn_end] += 1e4
        return found

    model.logits = bias
    question = [Question([{"role": "user", "content": "Hi"}], "Hi")] * 2
    assert score_answers(question, greedy(model, tokenizer, 4))["stopped_by_itself"] == 1.0
    assert set(batches) == {2}  # both in one batch
    always_end["ends"] = False
    assert score_answers(question, greedy(model, tokenizer, 4))["stopped_by_itself"] < 1.0
