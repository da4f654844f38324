"""Checkpoint families against transformers: its folders here, ours there, on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo.errors import CheckpointError, ConfigError
from octavo.hub.folder import load_model, read_config, save_model
from octavo.nn.contracts import Inputs

TOLERANCE = 1e-5
V, T = 61, 12
SHAPE = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32,
        "bos_token_id": None, "eos_token_id": None}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
PART = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.5, 3.0, 7.0, 30.0]}  # fmt: skip

CASES = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2 untied": transformers.GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=40, activation_function="relu"),
    "llama": transformers.LlamaConfig(**SHAPE, **THETA),
    "llama tied biased": transformers.LlamaConfig(
        **SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12, rms_norm_eps=1e-3
    ),
    "llama multi-head": transformers.LlamaConfig(**SHAPE | {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "qwen2": transformers.Qwen2Config(**SHAPE, **THETA, tie_word_embeddings=True),
    "qwen2 window": transformers.Qwen2Config(**SHAPE, **WINDOWED),
    "qwen2 every other window": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True),
    "qwen3 window": transformers.Qwen3Config(**SHAPE, **WINDOWED, **THETA, head_dim=8, attention_bias=True),
    "mistral": transformers.MistralConfig(**SHAPE, **THETA, sliding_window=None),
    "mistral window": transformers.MistralConfig(**SHAPE, sliding_window=4, head_dim=12, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, **THETA, head_dim=12, sliding_window=4, query_pre_attn_scalar=5,
        attn_logit_softcapping=0.5, final_logit_softcapping=1.5,
    ),
    "gemma2 uncapped": transformers.Gemma2Config(
        **SHAPE | {"num_key_value_heads": 4}, head_dim=8, query_pre_attn_scalar=8, attention_bias=True,
        tie_word_embeddings=False, attn_logit_softcapping=None, final_logit_softcapping=None,
        layer_types=["full_attention"] * 3, hidden_activation="silu",
    ),
    "olmo2": transformers.Olmo2Config(**SHAPE, **THETA),
    "olmo2 biased": transformers.Olmo2Config(
        **SHAPE | {"num_key_value_heads": None}, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3
    ),
    "phi3": transformers.Phi3Config(**SHAPE, **THETA, sliding_window=4),
    "phi3 part": transformers.Phi3Config(**SHAPE, rope_parameters=PART, tie_word_embeddings=True),
    "phi3 long": transformers.Phi3Config(
        **SHAPE | {"num_key_value_heads": 4}, rope_parameters=LONG, original_max_position_embeddings=24
    ),
    "nanochat": transformers.NanoChatConfig(**SHAPE, **THETA, final_logit_softcapping=3.0),
    "nanochat biased": transformers.NanoChatConfig(
        **SHAPE | {"num_key_value_heads": 4}, attention_bias=True, tie_word_embeddings=True, hidden_act="gelu"
    ),
}  # fmt: skip


def reference(name: str, attention: str = "eager") -> transformers.PreTrainedModel:
    """A transformers model in which no weight is zero, one or shared by accident."""
    model = transformers.AutoModelForCausalLM.from_config(CASES[name], attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = any(part in key for part in ("norm", "ln_")) and key.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + float(is_norm))
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(their model, ours loaded from its folder, the folder)."""
    theirs = reference(request.param)
    folder = tmp_path_factory.mktemp("hub")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
    assert float((got - wanted).abs().max()) <= limit


def some_tokens(rows: int = 3, n: int = T) -> torch.Tensor:
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def both(pair, tokens, valid=None):
    """Logits and hidden states of both, at valid positions."""
    theirs, ours = pair[:2]
    mask = valid if valid is not None else torch.ones_like(tokens, dtype=torch.bool)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    a = theirs(tokens, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True)
    b = ours(Inputs(tokens, valid=valid), needs=("logits", "hidden_states"))
    pick = lambda x: x[mask]  # noqa: E731
    return [pick(x) for x in (a.logits, *a.hidden_states)], [pick(x) for x in (b.logits, *b.hidden_states)]


@pytest.mark.rows("A8", "X4", "F5", "F7", "T8", "R2")
def test_logits_and_every_hidden_state(pair):
    wanted, got = both(pair, some_tokens())
    assert len(wanted) == len(got) == 5
    for a, b in zip(wanted, got):
        close(b, a)
    assert float(wanted[0].std()) > 0.5  # an agreement about something


@pytest.mark.rows("A8")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(pair, side):
    n = torch.tensor([T, T - 5, 2])
    order = torch.arange(T)
    valid = order < n[:, None] if side == "right" else order >= T - n[:, None]
    wanted, got = both(pair, some_tokens(), valid)
    for a, b in zip(wanted, got):
        close(b, a)


@pytest.mark.rows("A8", "I3")
@torch.no_grad()
def test_cached_decoding_step_by_step(pair):
    theirs, ours = pair[:2]
    tokens, cache, state = some_tokens(2), None, ours.new_state(2, T)
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, T))]:
        part = tokens[:, start:stop]
        a = theirs(part, past_key_values=cache, use_cache=True)
        cache = a.past_key_values
        close(ours(Inputs(part), state=state).logits, a.logits)


@pytest.mark.rows("I3")
@torch.no_grad()
def test_cached_decoding_of_left_padded_prompts(pair):
    theirs, ours = pair[:2]
    tokens, n = some_tokens(2), torch.tensor([4, 7])
    valid = torch.ones(2, T, dtype=torch.bool)
    valid[:, :7] = torch.arange(7) >= 7 - n[:, None]
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    cache, state = None, ours.new_state(2, T)
    for start, stop in [(0, 7), *((t, t + 1) for t in range(7, T))]:
        span = slice(start, stop)
        a = theirs(
            tokens[:, span], attention_mask=valid[:, :stop].long(), position_ids=positions[:, span],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = a.past_key_values
        b = ours(Inputs(tokens[:, span], valid=valid[:, span]), state=state)
        close(b.logits[valid[:, span]], a.logits[valid[:, span]])


class Bare:
    """As much of a tokenizer as decoding needs."""

    class special:
        pad = bos = eos = unk = turn_start = turn_end = None

    vocab_size = V

    def stream(self):
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


@pytest.mark.rows("I1")
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
@torch.no_grad()
def test_saved_here_it_loads_there(pair, tmp_path, shard_bytes):
    from octavo.infer.generate import generate
    from octavo.infer.sampling import SamplingConfig

    theirs, ours, _ = pair
    target = tmp_path / "ours"
    family = save_model(ours, target, shard_bytes=shard_bytes)
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        target, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    assert not [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    # An untied Llama shape without biases can be said as Llama or Qwen: the class may differ, not the function.
    assert family in ("llama", "qwen2", "qwen3", "gpt2", "mistral", "gemma2", "olmo2", "phi3", "nanochat")
    tokens = some_tokens()
    wanted = theirs(tokens).logits
    close(again.eval()(tokens).logits, wanted)
    close(load_model(target)(Inputs(tokens)).logits, wanted)
    prompt = tokens[0, :5]
    greedy = again.generate(
        prompt[None], do_sample=False, max_new_tokens=15, attention_mask=torch.ones(1, 5), pad_token_id=0
    )[0, 5:]
    config = SamplingConfig(temperature=0, max_new_tokens=15)
    (mine,) = generate(ours, Bare(), [prompt.tolist()], config, stop_ids=())
    assert list(mine.ids) == greedy.tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2 window", "qwen3", "mistral", "gemma2", "olmo2", "phi3"])
def test_sharded_by_transformers(name, tmp_path):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = some_tokens()
    with torch.no_grad():
        close(load_model(tmp_path)(Inputs(tokens)).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma2", "phi3"])
def test_a_base_model_without_prefix_and_head(name, tmp_path):
    """transformers writes the backbone alone without `model.` before its names; tied heads need no more."""
    theirs = reference(name)
    theirs.base_model.save_pretrained(tmp_path)
    tied = CASES[name].tie_word_embeddings
    if not tied:
        with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight \(1\)"):
            load_model(tmp_path)
        return
    tokens = some_tokens()
    with torch.no_grad():
        close(load_model(tmp_path)(Inputs(tokens)).logits, theirs(tokens).logits)


@pytest.mark.rows("A8")
@pytest.mark.parametrize("backend", ["sdpa", "plain"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_window_works_in_every_backend(backend, attention, tmp_path):
    """The noted version 4.39 of transformers only warned that its SDPA path ignored the window."""
    from octavo.nn.attend import ATTENDS

    theirs = reference("qwen2 window", attention)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path), some_tokens()
    windows = []
    for block in ours.blocks:
        mixer = block.layers["mixer"].mixer
        mixer.attend = ATTENDS[backend]
        windows.append(mixer.config.window)
    assert windows == [None, 4, 4]
    close(ours(Inputs(tokens)).logits, theirs(tokens).logits)
    for block in ours.blocks:
        block.layers["mixer"].mixer.reader.window = None
    full = ours(Inputs(tokens)).logits
    assert float((full - theirs(tokens).logits).abs().max()) > 0.1  # the window made a difference


# --------------------------------------------------------------------------------------- both spellings


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2 window", "qwen3"])
@torch.no_grad()
def test_the_older_spelling_of_config_json(name, tmp_path):
    """Before version 5: rope_theta at the top, torch_dtype, no layer_types."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = some_tokens()
    close(load_model(tmp_path)(Inputs(tokens)).logits, theirs(tokens).logits)
    assert rope["rope_theta"] == (5000.0 if name in ("llama", "qwen2") else 10000.0)


def test_written_config_has_both_spellings(tmp_path):
    reference("qwen2 window").save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", extra={"eos_token_id": 5})
    config = read_config(tmp_path / "ours")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert (config["max_window_layers"], config["sliding_window"]) == (1, 4)
    assert config["eos_token_id"] == 5
    assert config["model_type"] == "qwen2"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "mrope", "factor": 2.0}}),
        ("llama", {"pretraining_tp": 2}),
        ("llama", {"hidden_act": "mish"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"add_cross_attention": True}),
        ("llama", {"model_type": "lama"}),
        ("llama", {"num_key_value_heads": 3}),
    ],
    ids=str,
)
def test_what_would_change_the_mathematics_is_refused(name, changes, tmp_path):
    reference(name).save_pretrained(tmp_path)
    config = read_config(tmp_path) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert "Fix:" in str(caught.value)


# ------------------------------------------------------------------------------------------- strictness


def damaged(folder: Path, name: str, change) -> Path:
    reference(name).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name):
    return lambda tensors: tensors.update({name: torch.zeros(3)})


def shape(name, *size):
    return lambda tensors: tensors.update({name: torch.zeros(size)})


Q = "model.layers.1.self_attn.q_proj"
C = "transformer.h.1.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", drop(f"{Q}.weight"), f"missing: {Q}.weight (1)"),
        ("llama", add(f"{Q}.bias"), f"not used: {Q}.bias (1)"),
        ("llama", shape(f"{Q}.weight", 32, 31), f"of another shape: {Q}.weight has (32, 31), expected (32, 32) (1)"),
        ("llama", shape(f"{Q}.weight", 31, 32), f"{Q}.weight has (31, 32), expected (32, 32)"),
        ("llama", shape(f"{Q}.weight"), f"{Q}.weight has (), expected (32, 32)"),
        ("qwen2", drop(f"{Q}.bias"), f"missing: {Q}.bias (1)"),
        ("qwen3", drop("model.layers.0.self_attn.q_norm.weight"), "missing: model.layers.0.self_attn.q_norm.weight"),
        ("gpt2", shape(C, 96, 32), f"{C} has (96, 32), expected (32, 96)"),
        ("gpt2 untied", drop("lm_head.weight"), "missing: lm_head.weight (1)"),
        ("qwen2", shape("lm_head.weight", V, 32), "lm_head.weight differs from model.embed_tokens.weight"),
        ("gpt2", shape("lm_head.weight", V, 31), "lm_head.weight differs from transformer.wte.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_tensor_is_accounted_for(name, change, said, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_model(damaged(tmp_path, name, change))
    assert said in str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path):
    def change(tensors):
        tensors.pop("model.norm.weight")
        tensors.pop(f"{Q}.weight")
        tensors["more"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(2, 2)

    with pytest.raises(CheckpointError) as caught:
        load_model(damaged(tmp_path, "llama", change))
    for part in ("model.norm.weight", f"{Q}.weight", "(2)", "not used: more", "lm_head.weight has (2, 2)"):
        assert part in str(caught.value)


def test_a_repeated_tied_head_is_accepted_and_stored_masks_are_ignored(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    model = load_model(damaged(tmp_path, "gpt2", change))
    assert model.head is None


def test_a_model_no_family_can_say_is_refused_by_name_or_kept_in_our_layout(tmp_path):
    from octavo.models.decoder import Decoder, build

    config = Decoder.Config.model_validate(
        {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16,
         "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 2}, "topology": "parallel"}}}
    )  # fmt: skip
    model = build(config)
    with pytest.raises(ConfigError, match="llama"):
        save_model(model, tmp_path / "as-llama", family="llama")
    assert save_model(model, tmp_path / "own") == "octavo"
    again = load_model(tmp_path / "own")
    tokens = torch.randint(19, (2, 8))
    assert torch.equal(again(Inputs(tokens)).logits, model.eval()(Inputs(tokens)).logits)
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    assert "head.weight" not in tensors  # tied weights once
    tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "own" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight \(1\)"):
        load_model(tmp_path / "own")


def test_sixteen_bits_are_kept(tmp_path):
    reference("llama").bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).embed.weight.dtype == torch.bfloat16
    wide = load_model(tmp_path, torch.float32)
    assert wide.embed.weight.dtype == torch.float32
    save_model(wide, tmp_path / "back", dtype=torch.bfloat16)
    assert read_config(tmp_path / "back")["dtype"] == "bfloat16"
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "model.safetensors")[name]), name
