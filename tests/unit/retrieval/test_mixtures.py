"""Models that look things up: kNN-LM and RAG-token, by brute force and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError, DataError, UnsupportedError
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.retrieval.knn import KnnPredictor, remember
from octavo.retrieval.rag import RagToken, marginal, negative_likelihood


@pytest.fixture(scope="module")
def model():
    blocks = {"block": {"mixer": {"kind": "attention", "n_heads": 2}}}
    config = Decoder.Config.model_validate(
        {"d_model": 16, "n_layers": 2, "max_seq_len": 32, "vocab_size": 11, "blocks": blocks}
    )
    return build(config, seed=3).eval()


def tokens_of(*shape, seed=0):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_remembered_are_hidden_states_and_the_tokens_after_them(model):
    long, short = tokens_of(40).numpy(), tokens_of(5, seed=1).numpy()
    keys, values = remember(model, [long, short])
    assert values.tolist() == [*long[1:], *short[1:]]
    hidden = model(Inputs(torch.from_numpy(short[None, :-1])), needs=("hidden",)).hidden
    torch.testing.assert_close(keys[-4:], hidden[0])
    hidden = model(Inputs(torch.from_numpy(long[None, 32:-1])), needs=("hidden",)).hidden  # the second piece
    torch.testing.assert_close(keys[32:39], hidden[0])


def test_the_mixture_is_that_of_the_formula(model):
    keys, values = remember(model, [tokens_of(30, seed=2).numpy()])
    mixed = KnnPredictor(model, keys, values, k=5, temperature=2.0, weight=0.3)
    inputs = Inputs(tokens_of(2, 6, seed=4))
    made = model(inputs, needs=("logits", "hidden"))
    expected = torch.zeros(2, 6, 11)
    for b in range(2):
        for t in range(6):
            distances = (keys - made.hidden[b, t]).square().sum(1)
            near = distances.argsort()[:5]
            weights = (-distances[near] / 2.0).softmax(0)
            for i, weight in zip(near, weights, strict=True):
                expected[b, t, values[i]] += 0.3 * weight
    expected += 0.7 * made.logits.softmax(-1)
    logits = mixed(inputs).logits
    torch.testing.assert_close(logits.exp(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 6))


def test_without_weight_it_is_the_model_and_with_all_of_it_the_memory(model):
    keys, values = remember(model, [tokens_of(30, seed=2).numpy()])
    inputs = Inputs(tokens_of(1, 5))
    own = model(inputs).logits.log_softmax(-1)
    torch.testing.assert_close(KnnPredictor(model, keys, values, weight=0.0)(inputs).logits, own)
    only = KnnPredictor(model, keys, values, k=1, weight=1.0)(inputs).logits.exp()
    assert sorted(only.unique().tolist()) == [0.0, 1.0]


def test_prefill_and_decoding_equal_a_full_pass(model):
    keys, values = remember(model, [tokens_of(30, seed=2).numpy()])
    mixed, ids = KnnPredictor(model, keys, values), tokens_of(2, 8, seed=5)
    state = mixed.new_state(2)
    parts = [mixed(Inputs(ids[:, a:b]), state).logits for a, b in ((0, 3), (3, 4), (4, 8))]
    torch.testing.assert_close(torch.cat(parts, 1), mixed(Inputs(ids)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.rows("A7")
def test_memory_lowers_the_perplexity_of_text_that_repeats(model):
    """A held-out half that repeats the first half, and a model that never saw either."""
    random = np.random.default_rng(0)
    phrases = [random.integers(0, 11, 8) for _ in range(12)]
    first = np.concatenate([phrases[i] for i in random.permutation(12)])
    second = np.concatenate([phrases[i] for i in random.permutation(12)])
    mixed = KnnPredictor(model, *remember(model, [first]), k=4, temperature=1.0, weight=0.5)
    inputs = Inputs(torch.from_numpy(second[None, :32]))
    targets = torch.from_numpy(second[1:33])

    @torch.no_grad()
    def nats(logits):
        return float(-logits[0].log_softmax(-1).gather(-1, targets[:, None]).mean())

    assert nats(mixed(inputs).logits) < nats(model(inputs).logits.detach()) - 0.1


@pytest.mark.parametrize("settings", [{"weight": 1.5}, {"temperature": 0.0}, {"k": 0}])
def test_settings_without_sense_are_refused(model, settings):
    keys, values = remember(model, [tokens_of(5).numpy()])
    with pytest.raises(ConfigError, match="do not make sense"):
        KnnPredictor(model, keys, values, **settings)


def test_nothing_to_remember_and_other_outputs_are_refused(model):
    with pytest.raises(DataError, match="nothing to remember"):
        remember(model, [np.array([1])])
    keys, values = remember(model, [tokens_of(5).numpy()])
    with pytest.raises(DataError, match="4 keys and 3 values"):
        KnnPredictor(model, keys, values[:3])
    with pytest.raises(UnsupportedError, match="hidden"):
        KnnPredictor(model, keys, values)(Inputs(tokens_of(1, 3)), needs=("hidden",))


@pytest.mark.rows("A7")
def test_the_marginal_likelihood_is_that_of_transformers():
    """The reference counts a target's first token apart only for RAG-sequence; RAG-token sums over every one."""
    from transformers.models.rag.modeling_rag import RagTokenForGeneration

    B, K, T, V = 3, 4, 5, 11
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(B, K, T, V, generator=draw, requires_grad=True)
    scores = torch.randn(B, K, generator=draw, requires_grad=True)
    theirs = RagTokenForGeneration.marginalize(None, logits.view(B * K, T, V), scores, K)
    torch.testing.assert_close(marginal(logits, scores), theirs)
    targets = torch.randint(0, V, (B, T), generator=draw)
    expected = -theirs.gather(-1, targets[..., None]).squeeze(-1).sum(1)
    ours = negative_likelihood(logits, scores, targets)
    torch.testing.assert_close(ours, expected)
    ours_grads = torch.autograd.grad(ours.sum(), (logits, scores))
    their_grads = torch.autograd.grad(expected.sum(), (logits, scores))
    for mine, other in zip(ours_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other)
    half = negative_likelihood(logits, scores, targets, torch.arange(T).expand(B, T) < 2)
    torch.testing.assert_close(half, -theirs.gather(-1, targets[..., None]).squeeze(-1)[:, :2].sum(1))


@pytest.mark.rows("A7")
def test_decoding_over_passages_is_the_marginal_of_full_passes(model):
    scores = torch.tensor([[1.0, -0.5, 0.3], [0.0, 2.0, 1.0]])
    prompts, answer = tokens_of(6, 7, seed=6), tokens_of(2, 4, seed=7)
    rag = RagToken(model, scores)
    state = rag.new_state(2)
    first = rag(Inputs(prompts), state).logits[:, -1:]
    rest = [rag(Inputs(answer[:, i : i + 1]), state).logits for i in range(4)]
    full = model(Inputs(torch.cat([prompts, answer.repeat_interleave(3, 0)], 1))).logits[:, 6:]
    expected = marginal(full.unflatten(0, (2, 3)), scores)
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(expected.exp().sum(-1), torch.ones(2, 5))


def test_a_passage_that_fits_decides(model):
    one = RagToken(model, torch.tensor([[50.0, 0.0]]))
    prompts = tokens_of(2, 5, seed=8)
    alone = model(Inputs(prompts[:1])).logits.log_softmax(-1)
    torch.testing.assert_close(one(Inputs(prompts)).logits, alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="passages"):
        RagToken(model, torch.zeros(2, 0))
