"""Counted models keep the laws of every predictor, and their probabilities sum to one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.laws import decoding, reading
from octavo.laws.result import LawBroken, require, require_close
from octavo.nn.contracts import Capabilities, Inputs, Predictor
from octavo.predictors.kinds import PREDICTORS, count
from octavo.predictors.predictor import LOG_ZERO, NGramPredictor

V, BOS, EOS = 6, 0, 1
SMOOTHINGS = ["mle", "add_k", "katz", "stupid_backoff", "interpolated", "kneser_ney", "modified_kneser_ney"]
MODELS: dict[str, dict[str, Any]] = {
    "uniform": {"kind": "uniform"},
    "unigram": {"kind": "unigram"},
    **{f"order {n}": {"kind": "ngram", "order": n} for n in (1, 2, 3, 5, 9)},
    **{name: {"kind": "ngram", "order": 4, "smoothing": name} for name in SMOOTHINGS},
    "infinigram": {"kind": "infinigram"},
    "infinigram as published": {"kind": "infinigram", "unseen": 0.0},
    "infinigram, bounded": {"kind": "infinigram", "longest": 3},
}


def documents(n: int = 40, seed: int = 3) -> list[np.ndarray]:
    """Texts over the tokens 2 to 5 in which the next one follows the last two more often than not."""
    chance = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        text = [2, 3]
        while len(text) < 12:
            text.append(2 + (text[-1] + text[-2]) % 4 if chance.random() < 0.7 else int(chance.integers(2, V)))
        found.append(np.array([BOS, *text, EOS], np.int32))
    return found


def predictor(**settings: Any) -> NGramPredictor:
    config = PREDICTORS[settings["kind"]].Config.model_validate({**settings, "vocab_size": V, "max_seq_len": 32})
    return count(config, documents(), bos=BOS, eos=EOS)


@dataclass
class Counted:
    """What the laws of models ask of a subject."""

    model: NGramPredictor
    n_tokens: int = 12

    def tokens(self, rows: int, n: int | None = None, seed: int = 0) -> Tensor:
        """Random text, at whose start (and sometimes elsewhere) a document begins."""
        chance = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, V, (rows, n or self.n_tokens), generator=chance)
        ids[:, 0] = BOS
        return ids

    @torch.no_grad()
    def logits(self, tokens: Tensor, state: Any = None, **named: Any) -> Tensor:
        out = self.model(Inputs(tokens, **named), state=state).logits
        assert out is not None
        return out


class WithCapabilities(NGramPredictor):
    capabilities = Capabilities()


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest) -> Counted:
    made = predictor(**MODELS[request.param])
    return Counted(WithCapabilities(made.counted, max_seq_len=32, order=made.order, bos=BOS, config=made.config))


LAWS: dict[str, Callable[[Any], None]] = {
    "packed": reading.packed,
    "padding": reading.padding,
    "rows": reading.rows,
    "incremental": decoding.incremental,
    "state": decoding.state,
}


@pytest.mark.rows("N9")
@pytest.mark.parametrize("law", LAWS)
def test_a_counted_model_keeps_the_laws_of_models(subject, law):
    LAWS[law](subject)


def test_a_bounded_order_has_a_state_that_does_not_grow(subject):
    order = subject.model.order
    for tokens in (20, 40):
        held = subject.model.new_state(3, tokens)
        assert held.payload_bytes == 3 * 4 * (tokens if order is None else max(0, order - 2))
        subject.model(Inputs(subject.tokens(3)), state=held)
        assert held.truncate(torch.tensor([5, 5, 5])) is (order is None or order < 3)


def test_no_output_depends_on_a_later_token_and_every_one_on_its_own(subject):
    tokens = subject.tokens(2)
    whole = subject.logits(tokens)
    for t in range(1, subject.n_tokens):
        changed = tokens.clone()
        changed[:, t] = 1 + changed[:, t] % (V - 1)
        assert torch.equal(subject.logits(changed)[:, :t], whole[:, :t])
    assert torch.equal(whole, subject.logits(tokens))


def test_the_context_is_the_last_tokens_of_the_document_and_no_more():
    made = predictor(kind="ngram", order=3)
    one = made(Inputs(torch.tensor([[BOS, 2, 3, 4, 5]]))).logits
    for row in ([BOS, 5, 5, 4, 5], [2, 3, BOS, 4, 5]):
        other = made(Inputs(torch.tensor([row]))).logits
        assert torch.equal(other[0, -1], one[0, -1])
    assert not torch.equal(made(Inputs(torch.tensor([[BOS, 2, 3, 5, 5]]))).logits[0, -1], one[0, -1])


def test_a_document_that_begins_inside_a_row_hides_what_was_before():
    """Add-k has no back-off: a context that reached over the border would be one never seen."""
    made = predictor(kind="ngram", order=4, smoothing="add_k")
    alone = made(Inputs(torch.tensor([[BOS, 2, 3]]))).logits
    row = made(Inputs(torch.tensor([[5, 4, EOS, BOS, 2, 3]]))).logits
    assert torch.equal(row[:, 3:], alone)
    made.bos = None
    assert not torch.equal(made(Inputs(torch.tensor([[5, 4, EOS, BOS, 2, 3]]))).logits[:, 3:], alone)


@pytest.mark.rows("P1", "N1", "N2", "N3", "N4")
def test_the_probabilities_of_all_texts_sum_to_one(subject):
    """Brute force: of every text of four tokens, by the chain rule through the logits."""
    length = 4
    texts = torch.tensor([[BOS, *text] for text in itertools.product(range(V), repeat=length)])
    logits = subject.logits(texts).double()
    chain = logits[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0].sum(1)
    assert float(chain.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    own = float(logits.exp().sum(-1).sub(1).abs().max())
    assert own < 1e-5, "the logits are no log-probabilities"


def test_scores_are_the_logits_of_what_came(subject):
    texts = documents(6, seed=9)
    tokens, bounds = np.concatenate(texts), np.cumsum([0, *map(len, texts)])
    values, hits = subject.model.score(tokens, bounds)
    wanted = []
    for text in texts:
        row = torch.from_numpy(text.astype(np.int64))[None]
        wanted.append(subject.logits(row)[0, :-1].gather(-1, row[0, 1:, None])[:, 0])
    assert len(values) == len(hits) == len(tokens) - len(texts)
    assert torch.allclose(torch.from_numpy(values).float().clamp(min=LOG_ZERO), torch.cat(wanted), atol=1e-5)
    alone = [subject.model.score(text)[0] for text in texts]
    assert np.allclose(np.concatenate(alone), values)


def test_what_is_no_distribution_is_made_one():
    made = predictor(kind="ngram", order=4, smoothing="stupid_backoff")
    raw = np.exp(made.counted.next_log_probs([BOS, 2, 5]))
    assert abs(raw.sum() - 1) > 0.01
    assert np.allclose(np.exp(made.next_log_probs_of([np.array([BOS, 2, 5])])[0]), raw / raw.sum())


def test_what_a_counted_model_has_not_is_refused_by_name():
    made: Predictor = predictor(kind="ngram")
    with pytest.raises(UnsupportedError, match="no hidden, hidden_states"):
        made(Inputs(torch.tensor([[BOS, 2]])), needs=("logits", "hidden", "hidden_states"))


def test_the_state_goes_back_and_its_rows_can_be_copied_for_drafting(subject):
    """What a draft needs: guess on, go back, take up again after what was accepted."""
    tokens = subject.tokens(1)
    state = subject.model.new_state(1, 32)
    subject.logits(tokens[:, :5], state)
    saved = state.snapshot()
    guessed = [int(subject.logits(tokens[:, 4:5], state)[0, -1].argmax()) for _ in range(3)]
    state.restore(saved)
    assert state.lengths.tolist() == [5] and len(guessed) == 3
    state.select(torch.tensor([0, 0]))
    both = subject.logits(tokens[:, 5:].expand(2, -1), state)
    require_close(both[1:], subject.logits(tokens)[:, 5:], "copied row")


def broken(change: Callable[[NGramPredictor], None]) -> Counted:
    made = WithCapabilities(predictor(kind="ngram").counted, max_seq_len=32, order=5, bos=BOS)
    change(made)
    return Counted(made)


def test_the_laws_find_a_context_that_forgets_the_state():
    def forget(made: NGramPredictor) -> None:
        made.state_specs = dict  # type: ignore[method-assign]

    with pytest.raises(LawBroken):
        decoding.incremental(broken(forget))
    with pytest.raises(LawBroken):
        require(False, "a law that never breaks says nothing")
