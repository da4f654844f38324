"""Many requests at once: each gets what it would get alone, whatever the memory, the order and the neighbours are."""

from __future__ import annotations

import pytest
import torch
from scripted import Scripted

from octavo.errors import ConfigError, ResourceError
from octavo.infer.drafts import PromptLookup
from octavo.infer.engine import Engine
from octavo.infer.generate import generate
from octavo.infer.request import EngineConfig, Failure, Request
from octavo.infer.sampling import SamplingConfig
from octavo.infer.text import Piece
from octavo.models.decoder import Decoder, build
from octavo.models.encoder_decoder import EncoderDecoder
from octavo.nn.contracts import Inputs
from octavo.tokenizer import Byte, Tokenizer, train

KINDS = {
    "attention": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}},
    "window": {"mixer": {"kind": "attention", "n_heads": 2, "window": 5}},
    "mla": {"mixer": {"kind": "mla", "n_heads": 2}},
    "mamba2": {"mixer": {"kind": "mamba2", "n_heads": 4, "d_state": 8}},
    "rwkv6": {"mixer": {"kind": "rwkv6", "n_heads": 2}, "channel": {"kind": "rwkv_channel"}},
    "lstm": {"mixer": {"kind": "lstm"}, "channel": None},
}
PROMPTS = [[5, 9, 3], [7] * 21, [5, 9, 3, 8, 8, 8, 8, 8, 2], [11], [5, 9, 3, 8, 8, 8, 8, 8, 2, 1, 1]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


def model_of(kind: str, **changes) -> Decoder:
    values = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "max_seq_len": 64, "blocks": {"block": KINDS[kind]}}
    return build(Decoder.Config.model_validate(values | changes), seed=3).eval()


def alone(model, tokenizer, prompt, config, **how):
    """The textbook: the whole text read anew for every token."""
    from octavo.infer.sampling import choose, generator

    ids, stream = list(prompt), generator(config, 0)
    with torch.no_grad():
        for _ in range(config.max_new_tokens):
            logits = model(Inputs(torch.tensor([ids]))).logits[:, -1, : tokenizer.vocab_size].float()
            ids += choose(logits, config, [prompt], [ids[len(prompt) :]], [stream])
    return ids[len(prompt) :]


def answers(engine: Engine, requests: list[Request]) -> list[list[list[int]]]:
    found: dict[int, list[list[int]]] = {id(r): [[] for _ in range(r.n)] for r in requests}
    for request, event in engine.run():
        assert isinstance(event, Piece), event
        found[id(request)][event.row].append(event.id)
    return [found[id(r)] for r in requests]


def nothing_is_held(engine: Engine) -> bool:
    figures = engine.figures()
    return not any(figures[name] for name in ("running", "waiting", "blocks_held", "slots_held"))


@pytest.mark.rows("I7")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [1000, 36], ids=["room", "pre-empted"])
def test_everybody_gets_what_he_would_get_alone(kind, max_tokens, tokenizer):
    model, config = model_of(kind), SamplingConfig(max_new_tokens=9, temperature=0.8, seed=4)
    expected = [alone(model, tokenizer, prompt, config) for prompt in PROMPTS]
    settings = EngineConfig(max_sequences=3, max_tokens=max_tokens, block_size=4, chunk=6, step_tokens=8)
    engine = Engine(model, tokenizer, settings)
    requests = [Request(prompt, config) for prompt in PROMPTS]
    for request in requests:
        engine.add(request)
    assert [rows[0] for rows in answers(engine, requests)] == expected
    assert nothing_is_held(engine)
    if max_tokens == 36 and engine.blocks is not None:
        assert engine.figures()["preempted"] > 0


def test_memory_runs_out_and_the_last_to_come_is_read_anew(tokenizer):
    model, config = model_of("attention"), SamplingConfig(max_new_tokens=20, temperature=0)
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    expected = [alone(model, tokenizer, prompt, config) for prompt in prompts]
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=4, max_tokens=40, block_size=4, share_prefixes=False))
    requests = [Request(prompt, config) for prompt in prompts]
    for request in requests:
        engine.add(request)
    assert [rows[0] for rows in answers(engine, requests)] == expected
    assert engine.figures()["preempted"] > 0 and nothing_is_held(engine)


@pytest.mark.rows("B7")
def test_texts_that_begin_alike_are_read_once(tokenizer):
    model, config = model_of("attention"), SamplingConfig(max_new_tokens=5, temperature=0)
    prompt = list(range(30))
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=2, max_tokens=200, block_size=4))
    first, second = Request(prompt, config), Request([*prompt[:22], 99, 98], config)
    for request in (first, second):
        engine.add(request)
        expected = alone(model, tokenizer, request.prompt, config)
        assert answers(engine, [request]) == [[expected]]
    assert engine.figures()["tokens_shared"] == 20  # whole blocks of four
    other = Request(prompt, config, within="another model")
    engine.add(other)
    answers(engine, [other])
    assert engine.figures()["tokens_shared"] == 20


@pytest.mark.rows("B7")
@pytest.mark.parametrize("kind", ["attention", "mamba2", "window"])
def test_several_answers_to_one_prompt_are_forks(kind, tokenizer):
    model, config = model_of(kind), SamplingConfig(max_new_tokens=6, seed=10)
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=4, max_tokens=300, block_size=4))
    request = Request(PROMPTS[2], config, n=3)
    engine.add(request)
    read = []
    original = engine.executor

    def watched(works):
        read.extend(work.n for work in works)
        return original(works)

    engine.executor = watched
    got = answers(engine, [request])[0]
    expected = [alone(model, tokenizer, PROMPTS[2], config.model_copy(update={"seed": 10 + i})) for i in range(3)]
    assert got == expected
    assert sum(read) == len(PROMPTS[2]) + 3 * 5  # the prompt once, then each its own tokens
    assert nothing_is_held(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_the_deterministic_mode_is_bitwise(kind, tokenizer):
    """Log-probabilities and tokens are the same bits alone, among others, and after having been put back."""
    model, config = model_of(kind), SamplingConfig(max_new_tokens=9, temperature=0.8, seed=4)
    small = {"block_size": 4, "chunk": 4, "step_tokens": 12, "deterministic": True}

    def scores(prompts, **settings):
        engine = Engine(model, tokenizer, EngineConfig(**small, **settings))
        requests = [Request(prompt, config, n_top=2) for prompt in prompts]
        for request in requests:
            engine.add(request)
        found: dict[int, list] = {id(request): [] for request in requests}
        for request, piece in engine.run():
            assert isinstance(piece, Piece)
            found[id(request)].append(piece.score)
        return [found[id(request)] for request in requests], engine.figures()["preempted"]

    expected = [scores([prompt], max_sequences=1, max_tokens=64)[0][0] for prompt in PROMPTS]
    together, _ = scores(PROMPTS, max_sequences=5, max_tokens=400)
    cramped, n_preempted = scores(PROMPTS, max_sequences=5, max_tokens=64)
    assert together == expected and cramped == expected
    if Engine(model, tokenizer, EngineConfig(max_sequences=1)).blocks is not None:
        assert n_preempted > 0


@pytest.mark.rows("B7")
@pytest.mark.parametrize("kind", KINDS)
def test_paged_equals_contiguous_bit_for_bit(kind, tokenizer):
    """Blocks of 4 tokens anywhere, and one block for a whole text: the same sums."""
    model, config = model_of(kind), SamplingConfig(max_new_tokens=9, temperature=0, seed=4)
    found = []
    for size in (4, 64):
        engine = Engine(model, tokenizer, EngineConfig(block_size=size, max_sequences=5, max_tokens=5 * 64, chunk=7))
        requests = [Request(prompt, config, n_top=3) for prompt in PROMPTS]
        for request in requests:
            engine.add(request)
        found.append([event for _, event in engine.run()])
    assert found[0] == found[1]


def test_an_encoder_decoder_reads_its_source(tokenizer):
    block = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "mlp"}}
    half = {"d_model": 16, "n_layers": 1, "max_seq_len": 32, "init": {"std": 0.4}}
    crossed = {**block, "cross": {"kind": "cross_attention", "n_heads": 2}}
    values = {
        "vocab_size": 300,
        "encoder": half | {"blocks": {"b": block}},
        "decoder": half | {"blocks": {"b": crossed}},
    }
    model = build(EncoderDecoder.Config.model_validate(values), seed=1).eval()
    config = SamplingConfig(max_new_tokens=6, temperature=0)
    sources = [[5, 9, 3], [7] * 9, [1, 2]]
    each = [generate(model, tokenizer, [source], config)[0].ids for source in sources]
    assert [c.ids for c in generate(model, tokenizer, sources, config)] == each
    assert len(set(each)) > 1


def test_cancelling_frees_at_once(tokenizer):
    model = model_of("attention")
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=2, max_tokens=256, block_size=4))
    requests = [Request(prompt, SamplingConfig(max_new_tokens=30), n=2) for prompt in PROMPTS]
    for request in requests:
        engine.add(request)
    engine.step()
    for request in requests:
        engine.cancel(request)
    assert not engine.busy and nothing_is_held(engine)


def test_a_failing_request_takes_nobody_with_it(tokenizer):
    """A pass that fails is read anew, each text alone; the guilty one ends, the others get what they would have got."""
    model, config = model_of("mamba2"), SamplingConfig(max_new_tokens=8, temperature=0)
    expected = [alone(model, tokenizer, prompt, config) for prompt in PROMPTS]
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=6))
    requests = [Request(prompt, config) for prompt in PROMPTS]
    guilty = Request([250, 3], config)
    for request in (requests[0], guilty, *requests[1:]):
        engine.add(request)
    forward = model.forward

    def broken(inputs, state=None, needs=("logits",)):
        if (
            state is not None
            and state.slots.shape
            and any(
                row.sequence.slot in state.slots.tolist() and len(row.produced) == 3
                for row in engine.rows.values()
                if row.request is guilty
            )
        ):
            raise RuntimeError("planted")
        return forward(inputs, state, needs)

    model.forward = broken
    found: dict[int, list[int]] = {id(r): [] for r in requests}
    failures = []
    for request, event in engine.run():
        if isinstance(event, Failure):
            failures.append((request, str(event.error)))
        elif request is not guilty:
            found[id(request)].append(event.id)
    assert failures == [(guilty, "planted")]
    assert list(found.values()) == expected and nothing_is_held(engine)


def test_a_row_that_is_not_a_number_fails_alone(tokenizer):
    class Sick(Scripted):
        def __call__(self, inputs, state=None, needs=("logits",)):
            out = super().__call__(inputs, state, needs)
            out.logits[inputs.tokens[:, 0] == 66] = float("nan")
            return out

    model = Sick([1, 2, 3, 0], 256)
    engine = Engine(model, tokenizer, EngineConfig(max_sequences=4))
    well, ill = Request([1], SamplingConfig(max_new_tokens=2)), Request([66], SamplingConfig(max_new_tokens=2))
    engine.add(well)
    engine.add(ill)
    events = list(engine.run())
    assert [type(e).__name__ for r, e in events if r is ill] == ["Failure"]
    assert [e.id for r, e in events if r is well] == [2, 3]


def test_what_cannot_be_held_is_refused(tokenizer):
    engine = Engine(model_of("attention"), tokenizer, EngineConfig(max_sequences=2, max_tokens=16, block_size=4))
    with pytest.raises(ResourceError, match="may grow to 23 tokens"):
        engine.add(Request([1, 2, 3], SamplingConfig(max_new_tokens=20)))
    with pytest.raises(ConfigError, match="logit_bias names token 900"):
        engine.add(Request([1], SamplingConfig(max_new_tokens=2, logit_bias={900: 1.0})))
    assert not engine.busy


def test_priority_goes_first(tokenizer):
    engine = Engine(Scripted([1, 2, 3, 0], 256), tokenizer, EngineConfig(max_sequences=1))
    config = SamplingConfig(max_new_tokens=2)
    low, high = Request([1], config, priority=1), Request([1], config)
    engine.add(low)
    engine.add(high)
    assert [request for request, _ in engine.run()] == [high, high, low, low]


def test_a_constraint_is_followed_and_ends_the_text(tokenizer):
    class Counting:
        """Only 40, 41, 42, 43 in this order."""

        def __init__(self, prompt, stop_ids):
            assert (list(prompt), list(stop_ids)) == ([5, 9], [3])
            self.next = 40

        def mask(self, logits):
            kept = logits[self.next].clone()
            logits.fill_(-float("inf"))
            logits[self.next] = kept

        def accept(self, token):
            assert token == self.next
            self.next += 1
            return self.next == 44

    engine = Engine(model_of("attention"), tokenizer, EngineConfig(max_sequences=3), drafter=PromptLookup())
    free = Request([5, 9], SamplingConfig(max_new_tokens=7, temperature=0))
    bound = Request([5, 9], SamplingConfig(max_new_tokens=9), n=2, constraint=Counting, stop_ids=(3,))
    engine.add(free)
    engine.add(bound)
    pieces = [(request, piece) for request, piece in engine.run()]
    assert [p.id for r, p in pieces if r is free] == alone(engine.model, tokenizer, [5, 9], free.config)
    for row in range(2):
        mine = [p for r, p in pieces if r is bound and p.row == row]
        assert [p.id for p in mine] == [40, 41, 42, 43] and mine[-1].finish_reason == "stop"


@pytest.mark.parametrize("kind", ["attention", "mamba2", "window"])
def test_bytes_are_counted(kind):
    """A view's bytes are those of its blocks and slots, in the model's own number format."""
    model = model_of(kind).bfloat16()
    pool = Engine(model, train(Byte(), []), EngineConfig(max_sequences=3, max_tokens=96, block_size=8)).pool
    tables = [[1, 2], [3, 4]] if pool.block_bytes else [[], []]
    held = pool.view(tables, [0, 2], [9, 3]).n_bytes
    assert held == 4 * pool.block_bytes * bool(pool.block_bytes) + 2 * pool.slot_bytes > 0
    n_blocks = 1 + 96 // 8 if pool.block_bytes else 0
    rings = [own[name] for own in pool.buffers.values() for name in ("k", "v") if "_slots" in own]
    behind = sum(ring[3:].nbytes for ring in rings)  # for the tokens of a step that follow each other
    assert pool.n_bytes == n_blocks * pool.block_bytes + 3 * pool.slot_bytes + behind
    assert not behind or all(ring[3:].flatten(0, 1).shape[0] >= 512 for ring in rings)
