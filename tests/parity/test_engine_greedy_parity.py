"""The engine's greedy text is that of transformers' generate, whatever the memory, the neighbours and the executor are.

Five families that differ in kind, on random weights in fp32. Where two tokens are all but equal in transformers' own
logits, sums in another order may choose the other one: such a text is compared up to there, and listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from family_checks import ENDS, Bare, filled

from octavo.hub.folder import load_model
from octavo.infer import native
from octavo.infer.engine import Engine
from octavo.infer.executors import Executor, NativeExecutor, PlainExecutor
from octavo.infer.request import EngineConfig, Request
from octavo.infer.sampling import SamplingConfig
from octavo.infer.scheduler import Work
from octavo.infer.text import Piece
from octavo.models.decoder import Decoder

V, N_NEW, CONTEXT, LONGEST = 199, 14, 64, 44
ALL_BUT_EQUAL = 1e-4
FEW, ALL = 12, 200
SHAPE: dict[str, Any] = {
    **ENDS, "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": CONTEXT,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True),
    "gemma3_text": transformers.Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 3}, head_dim=12, query_pre_attn_scalar=5, sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4}, kv_lora_rank=20, q_lora_rank=14, qk_nope_head_dim=12, qk_rope_head_dim=8,
        v_head_dim=10, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, n_group=4, topk_group=2,
    ),
    "mamba2": transformers.Mamba2Config(
        **ENDS | {"vocab_size": V}, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=16,
        n_groups=2, chunk_size=8,
    ),
}  # fmt: skip
NATIVE = ("llama", "qwen3", "gemma3_text")
PAGED: dict[str, Any] = {"block_size": 4, "chunk": 7, "step_tokens": 24}
WAYS: dict[str, dict[str, Any]] = {
    "cached": {"max_sequences": 1, "block_size": CONTEXT, "share_prefixes": False},
    "batched": {"max_sequences": 8, "block_size": CONTEXT, "share_prefixes": False},
    "paged and chunked": {**PAGED, "max_sequences": 8, "share_prefixes": False},
    "shared": {**PAGED, "max_sequences": 16},
    "pre-empted": {**PAGED, "max_sequences": 6, "max_tokens": 80, "share_prefixes": False},
    "deterministic": {**PAGED, "max_sequences": 6, "max_tokens": 80, "deterministic": True},
}


class Tokens(Bare):
    vocab_size = V


class Watched:
    """An executor that says what it was given."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.n_works = self.n_tokens = self.n_parts = self.widest = 0

    def __call__(self, works: Sequence[Work]) -> Iterable[Any]:
        self.n_works += len(works)
        self.n_tokens += sum(work.n for work in works)
        self.n_parts += sum(not work.completes for work in works)
        self.widest = max(self.widest, len(works))
        return self.executor(works)


@dataclass(frozen=True)
class Reference:
    """A model here, and transformers' greedy text for each prompt with the two best tokens of every step."""

    name: str
    ours: Decoder
    prompts: list[list[int]]
    texts: list[list[int]]
    seconds: list[list[int]]
    gaps: list[list[float]]


def some_prompts(n: int) -> list[list[int]]:
    """Prompts of 2 to 44 tokens; each four have a beginning in common, of very different lengths."""
    generator = torch.Generator().manual_seed(11)

    def drawn(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(V, (length,), generator=generator).tolist()

    prompts: list[list[int]] = []
    while len(prompts) < n:
        beginning = drawn(1, LONGEST - 12)
        prompts += [beginning + drawn(1, 12) for _ in range(4)]
    return prompts[:n]


@torch.no_grad()
def generated(theirs: Any, prompt: list[int]) -> tuple[list[int], list[int], list[float]]:
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=N_NEW, pad_token_id=0,
        use_cache=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(out.logits).topk(2)
    text = out.sequences[0, len(prompt) :].tolist()
    assert text == best.indices[:, 0].tolist()
    return text, best.indices[:, 1].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory) -> Reference:
    name, n = request.param
    theirs = filled(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), spread=0.3)
    folder = tmp_path_factory.mktemp("greedy")
    theirs.save_pretrained(folder)
    prompts = some_prompts(n)
    texts, seconds, gaps = zip(*(generated(theirs, prompt) for prompt in prompts), strict=True)
    return Reference(name, load_model(folder), prompts, list(texts), list(seconds), list(gaps))


def engine_of(reference: Reference, way: str, executor: str) -> tuple[Engine, Watched, Watched]:
    """An engine, what its executor is given, and what of that reaches the plain one."""
    config, watched = EngineConfig(**WAYS[way]), list[Watched]()

    def make(model: Any, pool: Any) -> Executor:
        plain = PlainExecutor(model, pool, deterministic=config.deterministic)
        watched.append(Watched(plain))
        whole = watched[0] if executor == "plain" else Watched(NativeExecutor(model, pool, watched[0]))  # type: ignore[arg-type]
        watched.append(whole)
        return whole

    engine = Engine(reference.ours, Tokens(), config, executor=make)  # type: ignore[arg-type]
    return engine, watched[1], watched[0]


def said(engine: Engine, prompts: list[list[int]], n: int) -> list[list[list[int]]]:
    """Every text of every prompt, all asked at once. A model whose state does not grow is never short of memory: where
    that is wanted, each text is made to give its own up in the middle."""
    config = SamplingConfig(temperature=0, max_new_tokens=N_NEW)
    requests = [Request(prompt, config, n=n) for prompt in prompts]
    for request in requests:
        engine.add(request)
    texts: dict[int, list[list[int]]] = {id(request): [[] for _ in range(n)] for request in requests}
    forced, put_back = engine.blocks is None and engine.config.max_tokens, set[int]()
    while engine.busy:
        for request, event in engine.step():
            assert isinstance(event, Piece), event
            texts[id(request)][event.row].append(event.id)
        for sequence in list(engine.scheduler.running) if forced else ():
            if len(sequence.tokens) - sequence.n_prompt == N_NEW // 2 and id(sequence) not in put_back:
                put_back.add(id(sequence))
                engine.scheduler.put_back(sequence)
    return [texts[id(request)] for request in requests]


def differing(reference: Reference, texts: list[list[list[int]]]) -> list[str]:
    """The prompts whose text is another one, each of which must part where two tokens are all but equal."""
    found = []
    for i, (wanted, mine) in enumerate(zip(reference.texts, texts, strict=True)):
        for text in mine:
            assert len(text) == len(wanted)
            if text == wanted:
                continue
            at = next(t for t in range(N_NEW) if text[t] != wanted[t])
            gap = reference.gaps[i][at]
            where = f"{reference.name}, prompt {i}, token {at}: {text[at]} for {wanted[at]}, {gap:.2g} apart"
            assert gap < ALL_BUT_EQUAL and text[at] == reference.seconds[i][at], where
            found.append(where)
            break
    return found


HOW_MANY = [pytest.param(FEW), pytest.param(ALL, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
EVERY = [
    pytest.param((name, *n.values), executor, marks=n.marks, id=f"{name}-{n.values[0]}-{executor}")
    for name in CONFIGS
    for n in HOW_MANY
    for executor in ("plain", "native")
    if executor == "plain" or name in NATIVE
]


@pytest.mark.rows("I1", "I7", "B7")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("reference", "executor"), EVERY, indirect=["reference"], scope="module")
def test_greedy_text_is_that_of_transformers(reference, way, executor, capsys):
    assert (not native.unsuitable(reference.ours)) == (reference.name in NATIVE)
    if executor == "native" and native.library()[1]:
        pytest.skip(native.library()[1])
    engine, watched, plain = engine_of(reference, way, executor)
    n_texts = 2 if way == "shared" else 1
    listed = differing(reference, said(engine, reference.prompts, n_texts))
    with capsys.disabled():
        print(*(f"\n  {way}, {executor}: {line}" for line in listed), sep="", end="")
    assert len(listed) <= len(reference.prompts) // 100

    # That it went the way it says.
    figures, lengths = engine.figures(), [len(prompt) for prompt in reference.prompts]
    alone = n_texts * sum(length + N_NEW - 1 for length in lengths)
    assert (watched.widest == 1) == (way == "cached")
    assert (watched.n_parts > 0) == ("chunk" in WAYS[way])
    assert (figures["preempted"] > 0) == ("max_tokens" in WAYS[way])
    if way == "shared":
        assert (figures["tokens_shared"] > 0) == engine.pool.only_tokens
        assert watched.n_tokens < alone - figures["tokens_shared"]  # second texts are forks of the first
    elif "max_tokens" not in WAYS[way]:
        assert watched.n_tokens == alone and not figures["tokens_shared"]
    else:
        assert watched.n_tokens + figures["tokens_shared"] > alone  # something was read anew
    if executor == "native":
        assert plain.n_works < watched.n_works
        assert not plain.n_works or "chunk" not in WAYS[way]  # its parts are all short enough


@pytest.mark.parametrize("reference", [(name, FEW) for name in CONFIGS], indirect=True, scope="module", ids=str)
def test_the_texts_say_something(reference):
    """Not one token over and over, and choices that are far apart as a rule."""
    distinct = [len(set(text)) for text in reference.texts]
    assert sum(distinct) / len(distinct) > N_NEW / 3
    assert len({tuple(text) for text in reference.texts}) > 0.9 * len(reference.texts)
    assert float(torch.tensor(reference.gaps).median()) > 0.1
