"""The compiled decode step: the same text, compiled at most twice however many texts there are and however long."""

from __future__ import annotations

import pytest
import torch
from test_engine import KINDS, PROMPTS, alone, answers, model_of, nothing_is_held

from octavo.errors import ConfigError
from octavo.infer.engine import Engine
from octavo.infer.executors import CompiledExecutor, NativeExecutor, PlainExecutor
from octavo.infer.request import EngineConfig, Request
from octavo.infer.sampling import SamplingConfig
from octavo.models.decoder import Decoder, build
from octavo.tokenizer import Byte, Tokenizer, train

GLU = {"kind": "glu", "d_ff": 48}
BLOCKS = {name: KINDS[name] for name in ("mla", "mamba2", "window")} | {
    "softcap": {"mixer": {"kind": "attention", "n_heads": 2, "softcap": 20.0}, "channel": GLU},
    "moe": {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "moe", "n_experts": 4, "d_ff": 16}},
}
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()


def made_of(kind: str) -> Decoder:
    values = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "max_seq_len": 64, "blocks": {"block": BLOCKS[kind]}}
    return build(Decoder.Config.model_validate(values), seed=3).eval()


def engine_of(model: Decoder, tokenizer: Tokenizer, backend, **settings) -> Engine:
    config = EngineConfig(**{"max_sequences": 3, "max_tokens": 200, "block_size": 4, "chunk": 6, **settings})
    make = lambda model, pool: CompiledExecutor(  # noqa: E731
        model, pool, PlainExecutor(model, pool, deterministic=config.deterministic), backend
    )
    return Engine(model, tokenizer, config, make)


def same_text(engine: Engine, model: Decoder, tokenizer: Tokenizer) -> None:
    """Of texts together, three at a time, and then of one alone."""
    for prompts in (PROMPTS, PROMPTS[:1]):
        requests = [Request(prompt, GREEDY) for prompt in prompts]
        for request in requests:
            engine.add(request)
        expected = [alone(model, tokenizer, prompt, GREEDY) for prompt in prompts]
        assert [rows[0] for rows in answers(engine, requests)] == expected
    assert nothing_is_held(engine)


@pytest.mark.parametrize("kind", ["mla", "mamba2", *(pytest.param(k, marks=pytest.mark.slow) for k in BLOCKS)])
def test_greedy_text_is_the_same_and_little_is_compiled(kind, tokenizer):
    compiled, run = 0, 0

    def counting(graph, _):
        nonlocal compiled
        compiled += 1

        def call(*inputs):
            nonlocal run
            run += 1
            return graph.forward(*inputs)

        return call

    model = made_of(kind)
    engine = engine_of(model, tokenizer, counting)
    same_text(engine, model, tokenizer)
    assert not engine.executor.broken and run > 30
    assert compiled <= 2, "lengths or numbers of texts are compiled in"


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_greedy_text_of_compiled_code_is_the_same(kind, tokenizer):
    model = made_of(kind)
    engine = engine_of(model, tokenizer, "inductor")
    same_text(engine, model, tokenizer)
    assert not engine.executor.broken


def test_answers_are_those_alone_to_the_bit(tokenizer):
    model = made_of("mamba2")
    how = SamplingConfig(max_new_tokens=6, temperature=1, seed=2)
    together = engine_of(model, tokenizer, "eager", deterministic=True)
    requests = [Request(prompt, how, n_top=0) for prompt in PROMPTS[:3]]
    for request in requests:
        together.add(request)
    found = {id(request): [] for request in requests}
    for request, piece in together.run():
        found[id(request)].append((piece.id, piece.score.logprob))
    for request in requests:
        together.reset()
        together.add(again := Request(request.prompt, how, n_top=0))
        assert [(piece.id, piece.score.logprob) for _, piece in together.run()] == found[id(request)], again.prompt


def test_however_many_engines_there_were_the_next_is_compiled_too(tokenizer):
    """torch compiles a function for so many objects only; here, more engines than that have one step each."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for kind in list(BLOCKS)[:4]:
            engine = engine_of(made_of(kind), tokenizer, "eager")
            engine.add(Request(PROMPTS[0], SamplingConfig(max_new_tokens=3, temperature=0)))
            list(engine.run())
            assert not engine.executor.broken


def test_what_cannot_be_compiled_is_read_plainly(tokenizer, caplog):
    def fails(graph, inputs):
        raise RuntimeError("there is no compiler")

    model = made_of("mamba2")
    engine = engine_of(model, tokenizer, fails)
    same_text(engine, model, tokenizer)
    assert engine.executor.broken
    (record,) = [r for r in caplog.records if "compiled" in r.message]
    assert "\n" not in record.message


def test_the_executor_is_a_setting(tokenizer):
    kinds = {"auto": PlainExecutor, "plain": PlainExecutor, "compiled": CompiledExecutor}
    for name, kind in kinds.items():
        engine = Engine(made_of("mamba2"), tokenizer, EngineConfig(max_sequences=1, executor=name))
        assert type(engine.executor) is kind
    with pytest.raises(ConfigError, match="the native step does not serve this model"):
        Engine(made_of("mamba2"), tokenizer, EngineConfig(max_sequences=1, executor="native"))
    common = Engine(model_of("attention"), tokenizer, EngineConfig(max_sequences=1, executor="plain"))
    assert type(common.executor) is PlainExecutor and not isinstance(common.executor, NativeExecutor)
