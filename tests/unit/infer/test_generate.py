"""Cached decoding equals the textbook loop, rows are independent, and text comes out whole."""

import pytest
import torch
from scripted import Scripted

from octavo.errors import ConfigError
from octavo.infer.generate import generate, pieces, stream
from octavo.infer.sampling import SamplingConfig
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.tokenizer import Byte, Tokenizer, train

GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    config = Decoder.Config(
        d_model=32,
        n_layers=2,
        max_seq_len=24,
        vocab_size=tokenizer.vocab_size + 3,  # rows that pad the table: never to be chosen
        blocks={"block": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}}},
        tie_embeddings=False,
    )
    return build(config, seed=5)


def textbook(model: Decoder, prompt: list[int], n_new: int, n_tokens: int) -> list[int]:
    """The loop of the notes: crop to the context, run everything, take the argmax, append."""
    ids = list(prompt)
    for _ in range(n_new):
        with torch.no_grad():
            logits = model(Inputs(torch.tensor([ids[-model.max_seq_len :]]))).logits
        ids.append(int(logits[0, -1, :n_tokens].argmax()))
    return ids[len(prompt) :]


def scripted(tokenizer: Tokenizer, text: str, **settings) -> Scripted:
    return Scripted([*tokenizer.encode(text), tokenizer.special.eos], tokenizer.vocab_size, **settings)


@pytest.mark.rows("I1", "I3")
@pytest.mark.parametrize("n_new", [12, 40])  # 40 runs past the context of 24
def test_cached_and_batched_equals_the_textbook_loop(model: Decoder, tokenizer: Tokenizer, n_new: int) -> None:
    prompts = [
        tokenizer.encode(text) for text in ("a", "To be, or not to be", "Q: what? and much more than it can hold")
    ]
    config = SamplingConfig(temperature=0, max_new_tokens=n_new)
    together = generate(model, tokenizer, prompts, config, stop_ids=())
    for prompt, completion in zip(prompts, together, strict=True):
        assert list(completion.ids) == textbook(model, prompt, n_new, tokenizer.vocab_size)
        assert completion.finish_reason == "length"


@pytest.mark.rows("I3")
def test_prefill_in_parts_changes_nothing(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tokenizer.encode(text) for text in ("abcdefghijk", "a", "abcdefgh")]
    whole = generate(model, tokenizer, prompts, GREEDY, stop_ids=())
    for n_at_once in (1, 4, 8):
        monkeypatch.setattr("octavo.infer.generate.PREFILL_TOKENS", n_at_once)
        assert generate(model, tokenizer, prompts, GREEDY, stop_ids=()) == whole


@pytest.mark.rows("I2")
def test_a_row_alone_is_the_row_in_a_batch(model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in ("one", "another one", "x")]
    settings = {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.1, "max_new_tokens": 10}
    together = generate(model, tokenizer, prompts, SamplingConfig(seed=40, **settings), stop_ids=())
    for row, prompt in enumerate(prompts):
        alone = generate(model, tokenizer, [prompt], SamplingConfig(seed=40 + row, **settings), stop_ids=())
        assert alone == [together[row]]
    assert together != generate(model, tokenizer, prompts, SamplingConfig(seed=41, **settings), stop_ids=())


def test_rows_end_by_themselves(model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in ("one", "another one")]
    free = generate(model, tokenizer, prompts, GREEDY, stop_ids=())
    end = free[0].ids[3]
    stopped = generate(model, tokenizer, prompts, GREEDY, stop_ids=(end,))
    cut = free[0].ids.index(end) + 1
    assert stopped[0].ids == free[0].ids[:cut] and stopped[0].finish_reason == "stop"
    rest = free[1].ids[: free[1].ids.index(end) + 1] if end in free[1].ids else free[1].ids
    assert stopped[1].ids == rest


@pytest.mark.parametrize(
    ("reply", "stop", "text", "reason"),
    [
        ("one two three", (), "one two three", "stop"),
        ("one STOP three", ("STOP",), "one ", "stop"),
        ("one STO three", ("STOP",), "one STO three", "stop"),
        ("aabaabaac", ("aabaac",), "aab", "stop"),  # a match that begins inside a failed one
        ("one two", ("two", "ne"), "o", "stop"),
        ("ends in STO", ("STOP",), "ends in STO", "stop"),
        ("你好，世界🎉!", (), "你好，世界🎉!", "stop"),
        ("你好，世界", ("，世",), "你好", "stop"),
    ],
)
def test_stop_strings_and_whole_characters(
    tokenizer: Tokenizer, reply: str, stop: tuple[str, ...], text: str, reason: str
) -> None:
    model = scripted(tokenizer, reply)
    config = SamplingConfig(temperature=0, max_new_tokens=100, stop=stop)
    parts = list(pieces(model, tokenizer, [tokenizer.encode("say:")], config))
    assert "".join(part.text for part in parts) == text
    assert parts[-1].finish_reason == reason and all(part.finish_reason is None for part in parts[:-1])
    assert "�" not in "".join(part.text for part in parts)
    assert list(stream(model, tokenizer, tokenizer.encode("say:"), config)) == [p.text for p in parts if p.text]


def test_text_is_given_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    parts = pieces(scripted(tokenizer, "abXc"), tokenizer, [[5]], SamplingConfig(temperature=0, stop=("XYZ",)))
    assert [part.text for part in parts] == ["a", "b", "", "Xc", ""]


def test_a_cut_text_gives_what_was_held_back(tokenizer: Tokenizer) -> None:
    config = SamplingConfig(temperature=0, max_new_tokens=3, stop=("bcd",))
    (completion,) = generate(scripted(tokenizer, "abcx"), tokenizer, [[5]], config)
    assert (completion.text, completion.finish_reason) == ("abc", "length")


def test_a_character_begun_in_the_prompt_is_finished(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("好!")
    model = Scripted([*whole[1:], tokenizer.special.eos], tokenizer.vocab_size)
    (completion,) = generate(model, tokenizer, [whole[:1]], SamplingConfig(temperature=0))
    assert completion.text == "好!"


def test_log_probabilities_are_the_models_own(model: Decoder, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("hello")
    config = SamplingConfig(temperature=0.3, top_k=2, seed=1, max_new_tokens=4)
    (completion,) = generate(model, tokenizer, [prompt], config, stop_ids=(), n_top=3)
    ids = torch.tensor([[*prompt, *completion.ids]])
    with torch.no_grad():
        table = model(Inputs(ids)).logits[0, :, : tokenizer.vocab_size].log_softmax(-1)
    for i, score in enumerate(completion.scores):
        row = table[len(prompt) - 1 + i]
        assert score.id == completion.ids[i]
        assert score.logprob == pytest.approx(float(row[score.id]), abs=1e-5)
        assert [token for token, _ in score.top] == row.topk(3).indices.tolist()


def test_a_chat_ends_where_the_context_ends(model: Decoder, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("x" * 20)
    config = SamplingConfig(temperature=0, max_new_tokens=100)
    (completion,) = generate(model, tokenizer, [prompt], config, stop_ids=(), on_full="stop")
    assert len(completion.ids) == 4 and completion.finish_reason == "length"
    with pytest.raises(ConfigError, match="has 24 tokens, the model's context is 24"):
        generate(model, tokenizer, [prompt + prompt[:4]], config, on_full="stop")


def test_sampling_leaves_a_model_in_training_as_it_was(model: Decoder, tokenizer: Tokenizer) -> None:
    model.train()
    parts = pieces(model, tokenizer, [[5, 6]], GREEDY)
    next(parts)
    assert not model.training
    parts.close()
    assert model.training
    loss = model(Inputs(torch.tensor([[5, 6, 7]]))).logits.sum()
    loss.backward()  # nothing of inference mode is left behind
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("prompts", [[], [[]], [[5], []], [[-1]], [[10**6]]])
def test_impossible_prompts_are_refused(model: Decoder, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
    with pytest.raises(ConfigError):
        generate(model, tokenizer, prompts, GREEDY)


def test_a_bias_outside_the_vocabulary_is_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="logit_bias names token 100000"):
        generate(model, tokenizer, [[5]], SamplingConfig(logit_bias={100000: 1.0}))
