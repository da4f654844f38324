"""Checkpoint families against transformers: its folders here, ours there, on random weights."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from family_checks import (
    ENDS,
    Cases,
    V,
    check_decoding,
    check_export,
    check_left_out,
    check_states,
    close,
    damaged,
    refused,
    some_tokens,
)
from safetensors.torch import load_file

from octavo.errors import ConfigError
from octavo.hub.folder import load_model, model_config, read_config, save_model
from octavo.nn.contracts import Inputs

SHAPE = {
    **ENDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32,
        "bos_token_id": None, "eos_token_id": None}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
PART = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.5, 3.0, 7.0, 30.0]}  # fmt: skip

CONFIGS = {
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


CASES = Cases(CONFIGS)
pair = CASES.pairs()
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "mistral", "gemma2", "olmo2", "phi3", "nanochat")


@pytest.mark.rows("A8", "X4", "F5", "F7", "T8", "R2")
def test_logits_and_every_hidden_state(pair):
    check_states(pair)


@pytest.mark.rows("A8")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(pair, side):
    check_states(pair, side)


@pytest.mark.rows("A8", "I3")
def test_cached_decoding_step_by_step(pair):
    check_decoding(pair)


@pytest.mark.rows("I3")
def test_cached_decoding_of_left_padded_prompts(pair):
    check_decoding(pair, (4, 7))


@pytest.mark.rows("I1")
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
def test_saved_here_it_loads_there(pair, tmp_path, shard_bytes):
    # An untied Llama shape without biases can be said as Llama or Qwen: the class may differ, not the function.
    check_export(pair, tmp_path, FAMILIES, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2 window", "qwen3", "mistral", "gemma2", "olmo2", "phi3"])
def test_sharded_by_transformers(name, tmp_path):
    theirs = CASES.reference(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = some_tokens()
    with torch.no_grad():
        close(load_model(tmp_path)(Inputs(tokens)).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma2", "phi3"])
def test_a_base_model_without_prefix_and_head(name, tmp_path):
    """transformers writes the backbone alone without `model.` before its names; tied heads need no more."""
    theirs = CASES.reference(name)
    theirs.base_model.save_pretrained(tmp_path)
    if not CONFIGS[name].tie_word_embeddings:
        refused(lambda: load_model(tmp_path), "missing: lm_head.weight (1)")
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

    theirs = CASES.reference("qwen2 window", attention)
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
    theirs = CASES.reference(name)
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
    ours = load_model(CASES.saved("qwen2 window", tmp_path / "theirs"))
    save_model(ours, tmp_path / "ours", extra={"eos_token_id": 5})
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
def test_what_would_change_the_mathematics_is_refused(name, changes):
    refused(lambda: model_config(CASES.said(name, **changes)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_is_left_out_means_what_its_class_means(name):
    check_left_out(CASES.said(name), type(CONFIGS[name]))


# ------------------------------------------------------------------------------------------- strictness


Q = "model.layers.1.self_attn.q_proj"
C = "transformer.h.1.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {f"{Q}.weight": None}, f"missing: {Q}.weight (1)"),
        ("llama", {f"{Q}.bias": (3,)}, f"not used: {Q}.bias (1)"),
        ("llama", {f"{Q}.weight": (32, 31)}, f"of another shape: {Q}.weight has (32, 31), expected (32, 32) (1)"),
        ("llama", {f"{Q}.weight": (31, 32)}, f"{Q}.weight has (31, 32), expected (32, 32)"),
        ("llama", {f"{Q}.weight": ()}, f"{Q}.weight has (), expected (32, 32)"),
        ("qwen2", {f"{Q}.bias": None}, f"missing: {Q}.bias (1)"),
        ("qwen3", {"model.layers.0.self_attn.q_norm.weight": None}, "missing: model.layers.0.self_attn.q_norm.weight"),
        ("gpt2", {C: (96, 32)}, f"{C} has (96, 32), expected (32, 96)"),
        ("gpt2 untied", {"lm_head.weight": None}, "missing: lm_head.weight (1)"),
        ("qwen2", {"lm_head.weight": (V, 32)}, "lm_head.weight differs from model.embed_tokens.weight"),
        ("gpt2", {"lm_head.weight": (V, 31)}, "lm_head.weight differs from transformer.wte.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_tensor_is_accounted_for(name, change, said, tmp_path):
    refused(lambda: load_model(damaged(CASES.saved(name, tmp_path), change)), said)


def test_all_problems_are_listed_at_once(tmp_path):
    folder = damaged(
        CASES.saved("llama", tmp_path),
        {"model.norm.weight": None, f"{Q}.weight": None, "more": (1,), "lm_head.weight": (2, 2)},
    )
    said = ("model.norm.weight", f"{Q}.weight", "(2)", "not used: more", "lm_head.weight has (2, 2)")
    refused(lambda: load_model(folder), *said)


def test_a_repeated_tied_head_is_accepted_and_stored_masks_are_ignored(tmp_path):
    folder = CASES.saved("gpt2", tmp_path)
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    attn = "transformer.h.0.attn"
    more = {"lm_head.weight": embedding.clone(), f"{attn}.bias": (1, 1, 32, 32), f"{attn}.masked_bias": ()}
    assert load_model(damaged(folder, more)).head is None


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
    assert "head.weight" not in load_file(tmp_path / "own" / "model.safetensors")  # tied weights once
    refused(lambda: load_model(damaged(tmp_path / "own", {"norm.weight": None})), "missing: norm.weight (1)")


def test_sixteen_bits_are_kept(tmp_path):
    CASES.reference("llama").bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).embed.weight.dtype == torch.bfloat16
    wide = load_model(tmp_path, torch.float32)
    assert wide.embed.weight.dtype == torch.float32
    save_model(wide, tmp_path / "back", dtype=torch.bfloat16)
    assert read_config(tmp_path / "back")["dtype"] == "bfloat16"
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "model.safetensors")[name]), name
