"""Speculative decoding: the same tokens at temperature 0, the same distribution above, whatever is drafted."""

from __future__ import annotations

import collections
import random

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from test_engine import KINDS, PROMPTS, alone, answers, model_of, nothing_is_held

from octavo.errors import ConfigError
from octavo.infer.drafts import Asked, Draft, ModelDraft, ModuleDraft, PromptLookup
from octavo.infer.engine import Engine
from octavo.infer.request import EngineConfig, Request
from octavo.infer.said import Said
from octavo.infer.sampling import SamplingConfig, choose, draw_from, judge, shape
from octavo.infer.scheduler import Sequence
from octavo.models.decoder import Decoder
from octavo.nn.contracts import Inputs
from octavo.predictors.kinds import PREDICTORS, count
from octavo.schema import one_of
from octavo.tokenizer import Byte, Tokenizer, train

CONFIG = TypeAdapter(one_of(PREDICTORS))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


class Told:
    """Proposes what it is told: some of it right, some of it wrong."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], wrong_at: int):
        self.texts, self.wrong_at = texts, wrong_at

    def propose(self, asked):
        found = []
        for one in asked:
            text = one.text
            whole = self.texts[tuple(text.tokens[: text.n_prompt])]
            draft = whole[len(text.tokens) - text.n_prompt :][: one.room]
            found.append(Draft([t if i != self.wrong_at else (t + 1) % 200 for i, t in enumerate(draft)]))
        return found


def drafters(model: Decoder, expected: list[list[int]]):
    texts = {tuple(prompt): answer for prompt, answer in zip(PROMPTS, expected, strict=True)}
    other = model_of("attention", d_model=16)
    documents = [np.array(prompt + answer, np.int32) for prompt, answer in zip(PROMPTS, expected, strict=True)]
    counted = {
        kind: ModelDraft(count(CONFIG.validate_python({"vocab_size": 300} | values), iter(documents)), 4, n_slots=3)
        for kind, values in {
            "counted": {"kind": "ngram", "order": 3, "smoothing": "add_k"},
            "counted without bound": {"kind": "infinigram"},
        }.items()
    }
    found = {
        "right": Told(texts, 99), "wrong": Told(texts, 0), "partly": Told(texts, 2), "lookup": PromptLookup(),
        "itself": ModelDraft(model, 3, n_slots=3), "another": ModelDraft(other, 3, n_slots=3),
        "recurrent": ModelDraft(model_of("mamba2", d_model=16), 4, n_slots=3),
    }  # fmt: skip
    return found | counted


@pytest.mark.parametrize("kind", KINDS)
def test_at_temperature_0_every_draft_leads_to_the_same_text(kind, tokenizer):
    model, config = model_of(kind), SamplingConfig(max_new_tokens=12, temperature=0)
    expected = [alone(model, tokenizer, prompt, config) for prompt in PROMPTS]
    for name, drafter in drafters(model, expected).items():
        settings = EngineConfig(max_sequences=3, max_tokens=200, block_size=4, chunk=6, step_tokens=16)
        engine = Engine(model, tokenizer, settings, drafter=drafter)
        steps, requests = 0, [Request(prompt, config) for prompt in PROMPTS]
        for request in requests:
            engine.add(request)
        original = engine.executor

        def counted(works, original=original):
            nonlocal steps
            steps += 1
            return original(works)

        engine.executor = counted
        assert [rows[0] for rows in answers(engine, requests)] == expected, name
        assert nothing_is_held(engine), name
        figures = engine.figures()
        if name.startswith("counted"):  # of the very texts
            assert figures["tokens_accepted"] > figures["tokens_drafted"] / 2
        if name in ("right", "itself"):
            assert figures["tokens_accepted"] == figures["tokens_drafted"] > 0, name
            assert steps < 3 * 12
        if name == "wrong":
            assert figures["tokens_accepted"] == 0 < figures["tokens_drafted"]


def test_penalties_and_stops_reach_into_a_draft(tokenizer):
    model = model_of("attention")
    config = SamplingConfig(max_new_tokens=12, temperature=0, repetition_penalty=1.8, frequency_penalty=0.7)
    expected = [alone(model, tokenizer, prompt, config) for prompt in PROMPTS]
    engine = Engine(model, tokenizer, drafter=ModelDraft(model, 4))
    requests = [Request(prompt, config, stop_ids={answer[5]}) for prompt, answer in zip(PROMPTS, expected, strict=True)]
    for request in requests:
        engine.add(request)
    got = [rows[0] for rows in answers(engine, requests)]
    assert got == [answer[: answer.index(answer[5]) + 1] for answer in expected]


def test_the_distribution_is_that_without_a_draft():
    """Chi-square over all pairs of two tokens, drafted well, badly and impossibly."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 6, generator=generator)  # logits after each token
    config = SamplingConfig(temperature=0.7, top_k=5)
    stream = torch.Generator().manual_seed(1)
    n = 6000
    for draft in ([int(table[0].argmax())], [int(table[0].argsort()[-2])], [int(table[0].argmin())]):
        found: collections.Counter[int] = collections.Counter()
        for _ in range(n):
            found[judge(torch.stack([table[0], table[draft[0]]]), draft, config, [0], [], stream)[0]] += 1
        p = shape(table[:1], config, [[0]], [[]]).softmax(-1)[0]
        assert found.keys() <= set(p.nonzero().flatten().tolist())
        chi = sum((found[t] - n * float(q)) ** 2 / (n * float(q)) for t, q in enumerate(p) if q > 0)
        assert chi < 18.5  # 4 degrees of freedom: one in a thousand


def asked(text: Sequence, room: int) -> Asked:
    config, stream = SamplingConfig(), torch.Generator()
    return Asked(text, room, config, [], Said(text.tokens, text.n_prompt), stream, (), 300)


def test_the_distribution_is_that_of_the_model_whatever_the_draft_was_drawn_from():
    """Chi-square over two tokens in a row, for drafts drawn from the model's own distribution, near it and far off."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 6, generator=generator)  # logits after each token
    config, stream, n = SamplingConfig(temperature=0.7, top_k=5), torch.Generator().manual_seed(1), 6000
    p = shape(table, config, [[0]] * 6, [[]] * 6).double().softmax(-1)
    for share, accepted in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.1)):
        other = (1 - share) * p + share * torch.rand(6, 6, generator=generator).softmax(-1).double()
        found, n_accepted = collections.Counter[tuple[int, ...]](), 0
        for _ in range(n):
            first = int(draw_from(other[:1], [stream])[0])
            draft = [first, int(draw_from(other[first : first + 1], [stream])[0])]
            logits, drawn_from = table[[0, *draft]], other[[0, first]]
            said = judge(logits, draft, config, [0], [], stream, drawn_from)
            n_accepted += len(said) - 1
            if len(said) == 1:
                said += choose(table[said], config, [[0]], [said], [stream])
            found[tuple(said[:2])] += 1
        wanted = {(a, b): n * float(p[0, a] * p[a, b]) for a in range(6) for b in range(6) if p[0, a] * p[a, b] > 0}
        assert found.keys() <= wanted.keys() and len(wanted) == 25
        chi = sum((found[pair] - expected) ** 2 / expected for pair, expected in wanted.items())
        assert chi < 51.2  # 24 degrees of freedom: one in a thousand
        assert n_accepted >= 2 * n * accepted


def test_a_model_that_drafts_for_itself_is_always_right(tokenizer):
    """Also where tokens are drawn: what it draws has the probability that it is judged by, penalties and all."""
    model = model_of("attention")
    config = SamplingConfig(max_new_tokens=24, temperature=1.3, top_p=0.9, frequency_penalty=0.5, seed=4)
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=3, max_tokens=200), drafter=ModelDraft(model, 3))
    requests = [Request(prompt, config) for prompt in PROMPTS]
    for request in requests:
        engine.add(request)
    answers(engine, requests)
    figures = engine.figures()
    assert figures["tokens_drafted"] > 30
    assert figures["tokens_accepted"] >= figures["tokens_drafted"] - 2  # but for rounding, in other sizes of products


def test_lookup_takes_the_last_time_it_was_said():
    text = Sequence([1, 2, 3, 9, 1, 2, 3, 4, 5, 6, 1, 2, 3], 3, (0, 0))
    assert PromptLookup(n=3).propose([asked(text, 9)]) == [Draft([4, 5, 6])]
    assert PromptLookup(n=3).propose([asked(text, 2)]) == [Draft([4, 5])]
    assert PromptLookup().propose([asked(Sequence([1, 2], 2, (0, 0)), 9)]) == [Draft()]


@pytest.mark.parametrize("kind", ["attention", "mamba2"])
@pytest.mark.parametrize("draft", ["lookup", "model", "module"])
def test_sampled_text_has_the_models_distribution(kind, draft, tokenizer):
    """Chi-square over three tokens drawn through the engine: drafts are read, kept and put back around the third."""
    if (kind, draft) == ("mamba2", "module"):
        with pytest.raises(ConfigError, match="cannot go back"):
            ModuleDraft(model_of(kind, multi_token={"n_modules": 1}))
        return
    model = model_of(kind, vocab_size=259, multi_token={"n_modules": 1} if draft == "module" else None)
    other = model_of("attention", vocab_size=259, d_model=16)
    with torch.no_grad():
        for made in (model, other):
            made.embed.weight[:3] *= 6  # the draft speaks of few tokens, so that it is sometimes right
    kept = SamplingConfig(max_new_tokens=4, temperature=4, top_k=3, seed=0, logit_bias=dict.fromkeys(range(3), 90.0))
    prompt, n = [0, 1, 2, 0, 1], 300
    drafter = {
        "lookup": PromptLookup, "model": lambda: ModelDraft(other, 2),
        "module": lambda: ModuleDraft(model),
    }[draft]()  # fmt: skip
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=60, max_tokens=60 * 64), drafter=drafter)
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    for first in range(0, n, 60):
        requests = [Request(prompt, kept, first_stream=first + i) for i in range(60)]
        for request in requests:
            engine.add(request)
        found.update(tuple(rows[0][:3]) for rows in answers(engine, requests))
    p = {(): 1.0}
    for _ in range(3):
        further = {}
        for said, share in p.items():
            logits = model(Inputs(torch.tensor([[*prompt, *said]]))).logits[:, -1, :259].detach().float()
            for token, q in enumerate(shape(logits, kept, [prompt], [said]).softmax(-1)[0].tolist()):
                if q > 0:
                    further[*said, token] = share * q
        p = further
    assert found.keys() <= p.keys() and len(p) == 27
    assert 30 < engine.figures()["tokens_accepted"] < engine.figures()["tokens_drafted"] - 30
    many = {said: q for said, q in p.items() if n * q >= 5}
    rest = n - sum(found[said] for said in many), n * (1 - sum(many.values()))
    chi = sum((found[said] - n * q) ** 2 / (n * q) for said, q in many.items())
    chi += (rest[0] - rest[1]) ** 2 / rest[1] if rest[1] > 1 else 0
    free = len(many)
    assert chi < free + 3.1 * (2 * free) ** 0.5 + 5, (chi, free)  # about one in a thousand


def test_a_recurrence_is_put_back_and_reads_again(tokenizer):
    """After a draft that does not hold, the state is that of the text read without it."""
    model, config = model_of("mamba2"), SamplingConfig(max_new_tokens=8, temperature=0)
    expected = alone(model, tokenizer, PROMPTS[0], config)
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=1), drafter=Told({tuple(PROMPTS[0]): expected}, 1))
    loads, original = [], engine.pool.load

    def noted(slot, saved):
        original(slot, saved)
        (sequence,) = engine.scheduler.running
        read = model.new_state(1)
        with torch.inference_mode():
            model(Inputs(torch.tensor([sequence.tokens[: sequence.length]])), state=read)
        for layer, own in engine.pool.buffers.items():
            for name, held in own.items():
                torch.testing.assert_close(held[slot], read.layers[layer].read(name)[0], rtol=1e-4, atol=1e-5)
        loads.append(sequence.length)

    engine.pool.load = noted
    engine.add(request := Request(PROMPTS[0], config))
    assert answers(engine, [request]) == [[expected]]
    assert len(loads) > 1 and loads == sorted(loads)


def searched(tokens: list[int], n: int, longest: int, shortest: int) -> list[int]:
    """What lookup means: the whole text gone through backwards for its own end, the longest end first."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                return tokens[start + length : start + length + n]
    return []


@pytest.mark.parametrize(("n", "longest", "shortest"), [(8, 3, 1), (2, 4, 2), (5, 1, 1)])
def test_lookup_by_an_index_is_the_search(n, longest, shortest):
    """Several texts side by side that grow by one or more tokens; few kinds of tokens, so that ends come again."""
    draw = random.Random(0)
    lookup, found = PromptLookup(n, longest, shortest), 0
    texts = [Sequence([draw.randrange(kinds)], 1, (0, 0)) for kinds in (2, 3, 5, 20)]
    for _ in range(150):
        for text, kinds in zip(texts, (2, 3, 5, 20), strict=True):
            text.tokens += [draw.randrange(kinds) for _ in range(draw.choice([0, 1, 1, 4]))]
        drafts = [draft.tokens for draft in lookup.propose([asked(text, 6) for text in texts])]
        wanted = [searched(text.tokens, n, longest, shortest)[:6] for text in texts]
        assert drafts == wanted
        found += sum(map(bool, wanted))
    assert found > 200
    del texts, text
    assert not lookup.places  # what has ended is forgotten


def test_lookup_looks_at_a_text_once():
    class Counting(list[int]):
        read = 0

        def __getitem__(self, at):
            got = super().__getitem__(at)
            Counting.read += len(got) if isinstance(at, slice) else 1
            return got

    text, lookup = Sequence(Counting(range(5000)), 5000, (0, 0)), PromptLookup()
    lookup.propose([asked(text, 8)])
    Counting.read = 0
    for token in range(100):
        text.tokens.append(token)
        lookup.propose([asked(text, 8)])
    assert 0 < Counting.read < 100 * 30


def test_bits_and_drafts_exclude_each_other(tokenizer):
    with pytest.raises(ConfigError, match="draft"):
        Engine(model_of("attention"), tokenizer, EngineConfig(deterministic=True), drafter=PromptLookup())


@pytest.mark.parametrize("max_tokens", [200, 40], ids=["room", "pre-empted"])
def test_a_model_drafts_with_its_own_module(max_tokens, tokenizer):
    """The module reads what it would in a whole pass, so a model whose module repeats it would be right throughout."""
    model = model_of("attention", multi_token={"n_modules": 1})
    config = SamplingConfig(max_new_tokens=12, temperature=0)
    expected = [alone(model, tokenizer, prompt, config) for prompt in PROMPTS]
    drafter = ModuleDraft(model, n_slots=3)
    settings = EngineConfig(max_sequences=3, max_tokens=max_tokens, block_size=4, chunk=6, step_tokens=16)
    engine = Engine(model, tokenizer, settings, drafter=drafter)
    proposed = []
    original = drafter.propose

    def noted(texts):
        drafts = original(texts)
        proposed.extend((list(one.text.tokens), draft.tokens) for one, draft in zip(texts, drafts, strict=True))
        return drafts

    drafter.propose = noted
    requests = [Request(prompt, config) for prompt in PROMPTS]
    for request in requests:
        engine.add(request)
    assert [rows[0] for rows in answers(engine, requests)] == expected
    assert engine.figures()["tokens_drafted"] > 20 and nothing_is_held(engine)
    assert max_tokens == 200 or engine.figures()["preempted"]
    for tokens, draft in proposed:
        further = model(Inputs(torch.tensor([tokens])), needs=("multi_token",)).multi_token[0]
        if draft:  # module 1 at the last token but one foretells what comes after the last
            assert draft == [int(model.logits(further[0, -2])[: engine.n_tokens].argmax())]


def test_a_model_without_a_module_says_so():
    with pytest.raises(ConfigError, match="no multi_token modules"):
        ModuleDraft(model_of("attention"))
