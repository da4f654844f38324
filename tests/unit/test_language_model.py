"""``octavo.load``: greedy text equal to transformers', cached decoding equal to its cache, save and load."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import octavo
from octavo.errors import ConfigError, OctavoError
from octavo.infer.generate import encode_prompt, generate
from octavo.infer.native import library
from octavo.infer.sampling import SamplingConfig
from octavo.language_model import LanguageModel
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.tokenizer import Byte, Tokenizer, train

CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(Byte(), [])


@pytest.fixture(scope="module")
def reference(tokenizer: Tokenizer):
    """A tiny random Llama of transformers, with weights large enough that its choices differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3,
        bos_token_id=tokenizer.special.bos, eos_token_id=tokenizer.special.eos, pad_token_id=tokenizer.special.pad,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(reference, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    reference.save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    return octavo.load(folder)


def prompts_of(tokenizer: Tokenizer) -> list[list[int]]:
    texts = ("a", "def f(x):", "The quick brown fox", "数", "one two three four")
    return [encode_prompt(tokenizer, text) for text in texts]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


# ----------------------------------------------------------------------------------------- greedy text


@pytest.mark.rows("I1")
def test_greedy_tokens_are_those_of_transformers(reference, lm):
    for prompt in prompts_of(lm.tokenizer):
        n_new = CONTEXT - len(prompt)
        theirs = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=n_new)[0, len(prompt) :]
        config = SamplingConfig(temperature=0.0, max_new_tokens=n_new)
        (ours,) = generate(lm.model, lm.tokenizer, [prompt], config, stop_ids=[lm.tokenizer.special.eos])
        assert list(ours.ids) == theirs.tolist()
        assert len(set(ours.ids)) > 3, "a reference that repeats one token proves little"


@pytest.mark.rows("I1", "I3")
def test_greedy_tokens_of_a_batch_are_those_of_transformers(reference, lm):
    """transformers pads on the left, we on the right: every row still gets what it would get alone."""
    prompts = prompts_of(lm.tokenizer)
    width = max(map(len, prompts))
    pad = lm.tokenizer.special.pad
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    eos = lm.tokenizer.special.eos
    theirs = reference.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)[:, width:].tolist()
    config = SamplingConfig(temperature=0.0, max_new_tokens=16)
    for ours, row in zip(generate(lm.model, lm.tokenizer, prompts, config, stop_ids=[eos]), theirs, strict=True):
        assert list(ours.ids) == (row[: row.index(eos) + 1] if eos in row else row)


@pytest.mark.rows("I1")
def test_past_the_context_the_last_tokens_are_read_anew(reference, lm):
    """The loop of GPT-2's sampler, with transformers' forward pass: crop, argmax, append."""
    ids = prompts_of(lm.tokenizer)[1]
    n_new = 2 * CONTEXT
    config = SamplingConfig(temperature=0.0, max_new_tokens=n_new)
    (ours,) = generate(lm.model, lm.tokenizer, [ids], config, stop_ids=())
    grown = list(ids)
    with torch.no_grad():
        for _ in range(n_new):
            grown.append(int(reference(torch.tensor([grown[-CONTEXT:]])).logits[0, -1].argmax()))
    assert list(ours.ids) == grown[len(ids) :]


@pytest.mark.rows("I3")
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 9, 4], [12, 2]])
def test_cached_decoding_is_uncached_decoding_and_transformers_cache_at_every_step(reference, lm, lengths):
    from transformers import DynamicCache

    rng = np.random.default_rng(sum(lengths))
    rows = [rng.integers(5, lm.tokenizer.vocab_size, n).tolist() for n in lengths]
    new = rng.integers(5, lm.tokenizer.vocab_size, (10, len(rows)))
    width = max(lengths)
    state = lm.model.new_state(len(rows), CONTEXT)
    cache = DynamicCache(config=reference.config)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    valid = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    their_tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for step in range(len(new) + 1):
            ours = lm.model(Inputs(tokens, valid=valid), state=state).logits
            theirs = reference(
                their_tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
            for i, row in enumerate(rows):
                n = len(row) if step == 0 else 1
                uncached = lm.logits(row)[-n:]
                close(ours[i, :n], uncached)
                close(ours[i, :n], theirs[i, -n:])
            if step == len(new):
                break
            rows = [[*row, int(token)] for row, token in zip(rows, new[step], strict=True)]
            tokens = their_tokens = torch.tensor(new[step])[:, None]
            valid = torch.ones_like(tokens, dtype=torch.bool)
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
            positions = torch.tensor([[len(row) - 1] for row in rows])


# -------------------------------------------------------------------------------------------- the model


@pytest.mark.rows("X4")
def test_logits_and_hidden_states_of_one_text_or_of_rows(reference, lm):
    ids = torch.randint(5, lm.tokenizer.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = reference(ids, output_hidden_states=True)
    close(lm.logits(ids), theirs.logits)
    close(lm.logits(ids[0].tolist()), theirs.logits[0])
    ours = lm.hidden_states(ids)
    assert len(ours) == len(theirs.hidden_states) == 3
    for a, b, alone in zip(ours, theirs.hidden_states, lm.hidden_states(ids[0]), strict=True):
        close(a, b)
        close(alone, b[0])
    assert not lm.logits(ids).requires_grad


def test_a_score_is_the_mean_log_probability_of_the_text(lm):
    text = "Zwölf große Boxkämpfer. 十二"
    special = lm.tokenizer.special
    ids = [special.bos, *lm.tokenizer.encode(text), special.eos]
    assert len(ids) <= CONTEXT
    losses = F.cross_entropy(lm.logits(ids[:-1]), torch.tensor(ids[1:]), reduction="none").double()
    figures = lm.score(text)  # the end of the text is scored apart
    n_bytes = len(text.encode())
    assert figures["bits_per_byte"] == pytest.approx(float(losses[:-1].sum()) / np.log(2) / n_bytes, rel=1e-5)
    with pytest.raises(ConfigError):
        lm.score("")


def test_text_comes_whole_or_in_pieces_the_same(lm):
    settings = {"max_new_tokens": 30, "temperature": 1.0, "seed": 4}
    for prompt in ("Once", [{"role": "user", "content": "Hi"}]):
        whole = lm.generate(prompt, **settings)
        assert "".join(lm.stream(prompt, **settings)) == whole == lm.complete(prompt, **settings).text
        assert lm.generate(prompt, SamplingConfig(**settings)) == whole
        assert lm.generate(prompt, SamplingConfig(max_new_tokens=3), **settings) == whole
        assert lm.generate(prompt, **{**settings, "seed": 5}) != whole


def test_a_prompt_begins_as_texts_did_in_training(lm):
    special, encode = lm.tokenizer.special, lm.tokenizer.encode
    assert lm.prompt_ids("ab") == [special.bos, *encode("ab")]
    assert lm.prompt_ids("") == [special.bos]
    chat = lm.prompt_ids([{"role": "user", "content": "Hi<|im_end|>"}])
    assert chat[0] == special.bos and chat.count(special.turn_start) == 2 and chat.count(special.turn_end) == 1
    assert chat[-len(encode("assistant\n")) :] == encode("assistant\n")


@pytest.mark.parametrize(
    "settings",
    [{"temprature": 1.0}, {"temperature": -1.0}, {"temperature": "hot"}, {"max_new_tokens": 0}, {"top_p": 2.0}],
)
@pytest.mark.parametrize("config", [None, SamplingConfig()])
def test_sampling_settings_that_cannot_be_are_refused(lm, settings, config):
    with pytest.raises(ConfigError) as caught:
        lm.generate("a", config, **settings)
    assert next(iter(settings)) in str(caught.value)


# ------------------------------------------------------------------------------------------ save and load


def test_what_is_saved_is_loaded_and_transformers_loads_it_too(reference, lm, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert lm.save(tmp_path / "copy") == "llama"
    again = octavo.load(tmp_path / "copy")
    assert again.tokenizer.hash == lm.tokenizer.hash and again.max_seq_len == CONTEXT
    for name, weight in lm.model.state_dict().items():
        assert weight.equal(again.model.state_dict()[name]), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", trust_remote_code=False)
    ids = torch.tensor([lm.prompt_ids("def f(x):")])
    with torch.no_grad():
        close(theirs(ids).logits, reference(ids).logits)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy", trust_remote_code=False)
    assert their_tokenizer.encode("hé 数", add_special_tokens=False) == lm.tokenizer.encode("hé 数")
    ends = json.loads((tmp_path / "copy" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {lm.tokenizer.special.eos, lm.tokenizer.special.turn_end}


def test_a_model_of_our_own_is_saved_as_such(tokenizer, tmp_path):
    config = Decoder.Config.model_validate(
        {"d_model": 16, "n_layers": 1, "max_seq_len": 16, "vocab_size": tokenizer.vocab_size,
         "blocks": {"block": {"norm_placement": "sandwich", "mixer": {"n_heads": 2}}}}
    )  # fmt: skip
    lm = LanguageModel(build(config, seed=1), tokenizer)
    assert lm.save(tmp_path) == "octavo"
    again = octavo.load(tmp_path)
    assert again.model.config == config and again.logits([1, 2, 3]).equal(lm.logits([1, 2, 3]))


def test_the_number_format_can_be_chosen(folder, tmp_path):
    assert octavo.load(folder).model.embed.weight.dtype == torch.float32
    assert octavo.load(folder, torch.bfloat16).model.embed.weight.dtype == torch.bfloat16
    assert octavo.load(folder, "bfloat16").model.embed.weight.dtype == torch.bfloat16
    for dtype in ("float99", "nn", "int64"):
        with pytest.raises(ConfigError, match="dtype"):
            octavo.load(folder, dtype)


@pytest.mark.parametrize("native", [True, False])
def test_to_decode_bf16_stays_where_the_native_step_reads_it(tokenizer, tmp_path, monkeypatch, native):
    attention = {"kind": "attention" if native else "mla", "n_heads": 2}
    blocks = {"b": {"mixer": attention, "channel": {"kind": "glu"}}}
    config = {"d_model": 32, "n_layers": 2, "max_seq_len": 32, "vocab_size": tokenizer.vocab_size, "blocks": blocks}
    model = build(Decoder.Config.model_validate(config)).to(torch.bfloat16)
    LanguageModel(model, tokenizer).save(tmp_path / "saved")
    monkeypatch.setattr("octavo.training.machine.best_precision", lambda: "fp32")
    if library()[1]:
        pytest.skip(library()[1])
    kept = octavo.load(tmp_path / "saved", "decode").model
    assert kept.embed.weight.dtype == (torch.bfloat16 if native else torch.float32)
    assert octavo.load(tmp_path / "saved").model.embed.weight.dtype == torch.float32
    monkeypatch.setattr("octavo.training.machine.best_precision", lambda: "bf16")
    assert octavo.load(tmp_path / "saved", "decode").model.embed.weight.dtype == torch.bfloat16


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    config = Decoder.Config.model_validate({"d_model": 16, "n_layers": 1, "vocab_size": tokenizer.vocab_size - 1})
    with pytest.raises(ConfigError, match=f"{tokenizer.vocab_size} ids, the embedding {tokenizer.vocab_size - 1}"):
        LanguageModel(build(config), tokenizer)


def test_what_is_no_model_is_refused_by_what_it_is(folder, tmp_path):
    for path in (tmp_path, tmp_path / "nothing", folder / "config.json", "https://example.com/model"):
        with pytest.raises(OctavoError) as caught:
            octavo.load(path)
        assert caught.value.exit_code == 2 and caught.value.fix
