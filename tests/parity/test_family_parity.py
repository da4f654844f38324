"""What sets the families of the second wave apart, against transformers: caps, placements, fused matrices, longrope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_checks import (
    ENDS,
    Cases,
    check_same_tensors,
    close,
    damaged,
    in_parts,
    read_there,
    refused,
    some_tokens,
)

from octavo.errors import UnsupportedError
from octavo.hub.folder import load_model, model_config, read_config, save_model
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.norm import RMSNorm

SHAPE: dict[str, Any] = {
    **ENDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.5, 3.0, 7.0, 30.0]}  # fmt: skip
CASES = Cases({
    "llama": transformers.LlamaConfig(**SHAPE, head_dim=64, rope_parameters=ROPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=4, rope_parameters=ROPE),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, head_dim=12, sliding_window=4, query_pre_attn_scalar=5, rope_parameters=ROPE,
        attn_logit_softcapping=1.0, final_logit_softcapping=2.0,
    ),
    "olmo2": transformers.Olmo2Config(**SHAPE, rope_parameters=ROPE),
    "phi3": transformers.Phi3Config(
        **SHAPE, sliding_window=4, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}
    ),
    "phi3 long": transformers.Phi3Config(**SHAPE, rope_parameters=LONG, original_max_position_embeddings=16),
})  # fmt: skip


def again(model: Decoder, **changes: Any) -> Decoder:
    """The same weights under another configuration."""
    other = build(Decoder.Config.model_validate(model.config.model_dump() | changes)).eval()
    other.load_state_dict(model.state_dict())
    return other


# -------------------------------------------------------------------------------------- what is said matters

MIXER = {
    "gemma2": [{"softcap": None}, {"softcap": 2.0}, {"scale": None}, {"window": None}],
    "olmo2": [{"qk_norm": {"kind": "rmsnorm", "eps": 0.3}}],
    "mistral": [{"window": None}, {"window": 5}],
    "phi3": [{"window": None}],
}
WHOLE = {
    "gemma2": [{"embed_scale": 1.0}, {"logit_softcap": None}, {"norm": {"kind": "rmsnorm", "offset": False}}],
    "phi3": [{"positions": {"kind": "rope", "theta": 5000.0}}],
    "olmo2": [{"norm": {"kind": "rmsnorm", "eps": 0.3}}],
}


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [(n, "mixer", c) for n, all_of in MIXER.items() for c in all_of]
    + [(n, "whole", c) for n, all_of in WHOLE.items() for c in all_of],
    ids=str,
)
@torch.no_grad()
def test_each_setting_makes_a_difference(name, part, change, tmp_path):
    """Parity would say nothing of a setting that these weights and texts do not feel."""
    model, tokens = load_model(CASES.saved(name, tmp_path)), some_tokens(2)
    close(model(Inputs(tokens)).logits, CASES.reference(name)(tokens).logits)
    if part == "mixer":
        blocks = model.config.model_dump()["blocks"]
        change = {"blocks": {n: b | {"mixer": b["mixer"] | change} for n, b in blocks.items()}}
    other = again(model, **change)
    assert float((other(Inputs(tokens)).logits - model(Inputs(tokens)).logits).abs().max()) > 0.01


@pytest.mark.rows("F4")
def test_offset_norms_round_as_theirs_in_sixteen_bits():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    theirs, ours = Gemma2RMSNorm(64, 1e-6), RMSNorm(RMSNorm.Config(offset=True), 64)
    for dtype in (torch.bfloat16, torch.float16):
        weight, x = torch.randn(64) * 0.3, torch.randn(50, 64, dtype=dtype)
        theirs.weight.data = ours.weight.data = weight.to(dtype)
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.rows("R4")
@pytest.mark.parametrize("name", ["llama", "phi3 long"])
@torch.no_grad()
def test_far_positions_turn_by_the_same_bits(name, tmp_path):
    """At position 100,000 one last bit of a frequency can turn a head by 0.006."""
    theirs, ours = CASES.reference(name), load_model(CASES.saved(name, tmp_path))
    if name == "phi3 long":
        ours = again(ours, max_seq_len=200_000)
    at = torch.arange(100_000, 100_012)[None].expand(2, -1)
    tokens = some_tokens(2)
    close(ours(Inputs(tokens, positions=at)).logits, theirs(tokens, position_ids=at).logits)


# ------------------------------------------------------------------------------------------------ longrope


@pytest.mark.rows("R10")
@torch.no_grad()
def test_longrope_on_either_side_of_its_first_length(tmp_path):
    """Read with the short factors, which end at the first length; a longer max_seq_len takes the long ones."""
    theirs, short = CASES.reference("phi3 long"), load_model(CASES.saved("phi3 long", tmp_path))
    assert short.max_seq_len == 16
    tokens = some_tokens(2, 24)
    close(short(Inputs(tokens[:, :16])).logits, theirs(tokens[:, :16]).logits)
    with pytest.raises(UnsupportedError, match="position 23 is beyond the 16"):
        short(Inputs(tokens))
    long = again(short, max_seq_len=64)
    wanted = theirs(tokens).logits
    close(long(Inputs(tokens)).logits, wanted)
    close(in_parts(long, tokens, 7), wanted)
    assert float((long(Inputs(tokens[:, :16])).logits - theirs(tokens[:, :16]).logits).abs().max()) > 0.01


@pytest.mark.rows("R10")
@pytest.mark.parametrize("said", [{"attention_factor": 1.7}, {"factor": 3.0}, {"factor": 0.5}], ids=str)
@torch.no_grad()
def test_a_longrope_magnitude_that_is_told(said, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.Phi3Config(**SHAPE, rope_parameters=LONG | said, original_max_position_embeddings=16),
        attn_implementation="eager",
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = some_tokens(2)
    ours = load_model(tmp_path / "theirs")
    close(ours(Inputs(tokens)).logits, theirs(tokens).logits)
    assert save_model(ours, tmp_path / "ours") == "phi3"
    close(read_there(tmp_path / "ours")(tokens).logits, theirs(tokens).logits)


def test_a_model_with_long_factors_in_use_is_kept_in_our_layout(tmp_path):
    """Its class there would use the short ones on short texts."""
    long = again(load_model(CASES.saved("phi3 long", tmp_path / "theirs")), max_seq_len=64)
    assert save_model(long, tmp_path / "ours") == "octavo"
    tokens = some_tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "ours")(Inputs(tokens)).logits, long(Inputs(tokens)).logits)


# ------------------------------------------------------------------------------------------ both spellings

OLDER = {
    "mistral": {"rope_theta": 5000.0},
    "gemma2": {"rope_theta": 5000.0, "layer_types": None, "hidden_act": "gelu_pytorch_tanh"},
    "olmo2": {"rope_theta": 5000.0},
    "phi3": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    "phi3 long": {
        "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "su", "short_factor": LONG["short_factor"], "long_factor": LONG["long_factor"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
@torch.no_grad()
def test_the_spelling_before_version_5(name, tmp_path):
    folder = CASES.saved(name, tmp_path, rope_parameters=None, **OLDER[name])
    assert "rope_parameters" not in read_config(folder)
    tokens = some_tokens(2)
    close(load_model(folder)(Inputs(tokens)).logits, CASES.reference(name)(tokens).logits)


@pytest.mark.parametrize("name", OLDER)
def test_what_is_written_reads_the_same_in_the_older_spelling_alone(name, tmp_path):
    save_model(load_model(CASES.saved(name, tmp_path / "theirs")), tmp_path / "ours")
    config = read_config(tmp_path / "ours")
    both = model_config(config)
    config.pop("rope_parameters")
    assert model_config(config) == both


def test_missing_keys_mean_what_their_class_means():
    """Mistral without sliding_window has one of 4096, Gemma 2 every other layer; null is none."""
    plain = {key: SHAPE[key] for key in SHAPE if not key.endswith("token_id")}

    def layers(**said: Any) -> list[Any]:
        config = model_config(plain | said)
        return [config.blocks[name].mixer for name in config.layer_names()]

    assert [m.window for m in layers(model_type="mistral")] == [4096, 4096]
    assert [m.window for m in layers(model_type="mistral", sliding_window=None)] == [None, None]
    gemma = layers(model_type="gemma2")
    assert [(m.window, m.softcap, m.scale, m.head_dim) for m in gemma] == [
        (4096, 50, 1 / 16, 256),
        (None, 50, 1 / 16, 256),
    ]
    assert model_config(plain | {"model_type": "gemma2"}).logit_softcap == 30
    assert model_config(plain | {"model_type": "gemma2", "final_logit_softcapping": None}).logit_softcap is None
    assert [m.window for m in layers(model_type="phi3")] == [None, None]
    assert [m.qk_norm.eps for m in layers(model_type="olmo2")] == [1e-5, 1e-5]


REFUSED = [
    ("mistral", {"attention_bias": True}, "attention_bias = True"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("mistral", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "no low_freq_factor"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("gemma2", {"hidden_activation": "mish"}, "mish"),
    ("gemma2", {"mlp_bias": True}, "mlp_bias"),
    ("gemma2", {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}, "rope_parameters"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
    ("olmo2", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling"),
    ("olmo2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("olmo2", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("phi3", {"attention_bias": True}, "attention_bias"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = 'linear'"),
    ("phi3", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.4}}, "partial_rotary_factor = 0.4"),
    ("phi3 long", {"rope_parameters": LONG | {"short_factor": [1.0]}}, "short has 1 factors for 4 pairs"),
    ("phi3 long", {"rope_parameters": {k: v for k, v in LONG.items() if k != "long_factor"}}, "no long_factor"),
    ("phi3 long", {"original_max_position_embeddings": 8}, "original_max_position_embeddings = 8"),
    ("phi3 long", {"head_dim": 12}, "head_dim = 12"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=str)
def test_what_cannot_be_represented_is_refused_by_its_key(name, changes, said):
    refused(lambda: model_config(CASES.said(name, **changes)), said)


def test_gemma2_windows_of_null_width_are_refused():
    plain = {key: SHAPE[key] for key in SHAPE if not key.endswith("token_id")} | {"model_type": "gemma2"}
    refused(lambda: model_config(plain | {"sliding_window": None}), "sliding layers without a sliding_window")


# ------------------------------------------------------------------------------------------ fused matrices


def test_parts_of_a_fused_matrix_have_a_memory_each(tmp_path):
    """Views into one matrix would be refused by the writer of our own layout, and kept whole by a copy of one."""
    model = load_model(CASES.saved("phi3", tmp_path / "theirs"))
    places = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert save_model(model, tmp_path / "own", family="octavo") == "octavo"
    tokens = some_tokens(2)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "own")(Inputs(tokens)).logits, model(Inputs(tokens)).logits)


def test_fused_matrices_are_joined_again_to_the_bit(tmp_path):
    CASES.saved("phi3", tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    check_same_tensors(tmp_path / "theirs", tmp_path / "ours")


L = "model.layers.1"
DAMAGED = [
    ("phi3", f"{L}.self_attn.qkv_proj.weight", (60, 32), "has (60, 32), expected (64, 32)"),
    ("phi3", f"{L}.mlp.gate_up_proj.weight", None, "missing: model.layers.1.mlp.gate_up_proj.weight (1)"),
    ("phi3", f"{L}.self_attn.q_proj.weight", (32, 32), "not used: model.layers.1.self_attn.q_proj.weight (1)"),
    ("gemma2", f"{L}.pre_feedforward_layernorm.weight", None, "missing: model.layers.1.pre_feedforward"),
    ("olmo2", f"{L}.self_attn.q_norm.weight", (8,), "has (8,), expected (32,)"),
    ("olmo2", f"{L}.self_attn.k_norm.weight", (32,), "has (32,), expected (16,)"),
    ("olmo2", f"{L}.input_layernorm.weight", (32,), "not used: model.layers.1.input_layernorm.weight (1)"),
    ("mistral", f"{L}.self_attn.q_proj.bias", (32,), "not used: model.layers.1.self_attn.q_proj.bias (1)"),
]


@pytest.mark.parametrize(("name", "tensor", "shape", "said"), DAMAGED, ids=lambda v: v if isinstance(v, str) else "")
def test_every_tensor_is_accounted_for_here_too(name, tensor, shape, said, tmp_path):
    refused(lambda: load_model(damaged(CASES.saved(name, tmp_path), {tensor: shape})), said)
