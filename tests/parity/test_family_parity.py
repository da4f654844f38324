"""What sets the families of the second wave apart, against transformers: caps, placements, fused matrices, longrope."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo.errors import CheckpointError, UnsupportedError
from octavo.hub.folder import FAMILIES, load_model, model_config, read_config, save_model
from octavo.models.cost import predicted_parameters
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs
from octavo.nn.norm import RMSNorm

V = 61
SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.5, 3.0, 7.0, 30.0]}  # fmt: skip
PLAIN = {
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
}  # fmt: skip


def reference(name: str) -> transformers.PreTrainedModel:
    """A transformers model with weights that are neither zero nor one."""
    model = transformers.AutoModelForCausalLM.from_config(PLAIN[name], attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            start = float("norm" in key and not name.startswith("gemma"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + start)
    return model


def saved(name: str, folder: Path, **changes: Any) -> Path:
    """A folder of ``name``, some keys of its config.json changed (None removes one)."""
    reference(name).save_pretrained(folder)
    config = read_config(folder) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def again(model: Decoder, **changes: Any) -> Decoder:
    """The same weights under another configuration."""
    other = build(Decoder.Config.model_validate(model.config.model_dump() | changes)).eval()
    other.load_state_dict(model.state_dict())
    return other


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


def some_tokens(rows: int = 2, n: int = 12) -> torch.Tensor:
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(3))


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
    model, tokens = load_model(saved(name, tmp_path)), some_tokens()
    close(model(Inputs(tokens)).logits, reference(name)(tokens).logits)
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
    theirs, ours = reference(name), load_model(saved(name, tmp_path))
    if name == "phi3 long":
        ours = again(ours, max_seq_len=200_000)
    at = torch.arange(100_000, 100_012)[None].expand(2, -1)
    tokens = some_tokens()
    close(ours(Inputs(tokens, positions=at)).logits, theirs(tokens, position_ids=at).logits)


# ------------------------------------------------------------------------------------------------ longrope


@pytest.mark.rows("R10")
@torch.no_grad()
def test_longrope_on_either_side_of_its_first_length(tmp_path):
    """Read with the short factors, which end at the first length; a longer max_seq_len takes the long ones."""
    theirs, short = reference("phi3 long"), load_model(saved("phi3 long", tmp_path))
    assert short.max_seq_len == 16
    tokens = some_tokens(2, 24)
    close(short(Inputs(tokens[:, :16])).logits, theirs(tokens[:, :16]).logits)
    with pytest.raises(UnsupportedError, match="position 23 is beyond the 16"):
        short(Inputs(tokens))
    long = again(short, max_seq_len=64)
    wanted = theirs(tokens).logits
    close(long(Inputs(tokens)).logits, wanted)
    state = long.new_state(2, 24)
    close(torch.cat([long(Inputs(part), state=state).logits for part in tokens.split(7, 1)], 1), wanted)
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
    tokens = some_tokens()
    ours = load_model(tmp_path / "theirs")
    close(ours(Inputs(tokens)).logits, theirs(tokens).logits)
    assert save_model(ours, tmp_path / "ours") == "phi3"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    close(back(tokens).logits, theirs(tokens).logits)


def test_a_model_with_long_factors_in_use_is_kept_in_our_layout(tmp_path):
    """Its class there would use the short ones on short texts."""
    long = again(load_model(saved("phi3 long", tmp_path / "theirs")), max_seq_len=64)
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
    folder = saved(name, tmp_path, rope_parameters=None, **OLDER[name])
    assert "rope_parameters" not in read_config(folder)
    tokens = some_tokens()
    close(load_model(folder)(Inputs(tokens)).logits, reference(name)(tokens).logits)


@pytest.mark.parametrize("name", OLDER)
def test_what_is_written_reads_the_same_in_the_older_spelling_alone(name, tmp_path):
    save_model(load_model(saved(name, tmp_path / "theirs")), tmp_path / "ours")
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
def test_what_cannot_be_represented_is_refused_by_its_key(name, changes, said, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_model(saved(name, tmp_path, **changes))
    assert said in str(caught.value)
    assert "Fix:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gemma2_windows_of_null_width_are_refused():
    plain = {key: SHAPE[key] for key in SHAPE if not key.endswith("token_id")} | {"model_type": "gemma2"}
    with pytest.raises(CheckpointError, match="sliding layers without a sliding_window"):
        model_config(plain | {"sliding_window": None})


# ------------------------------------------------------------------------------------------ fused matrices


def test_parts_of_a_fused_matrix_have_a_memory_each(tmp_path):
    """Views into one matrix would be refused by the writer of our own layout, and kept whole by a copy of one."""
    model = load_model(saved("phi3", tmp_path / "theirs"))
    places = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert save_model(model, tmp_path / "own", family="octavo") == "octavo"
    tokens = some_tokens()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "own")(Inputs(tokens)).logits, model(Inputs(tokens)).logits)


def test_fused_matrices_are_joined_again_to_the_bit(tmp_path):
    saved("phi3", tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


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
    path = saved(name, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    if shape is None:
        tensors.pop(tensor)
    else:
        tensors[tensor] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert said in str(caught.value)


# ------------------------------------------------------------------------------------------ published sizes

WIDE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "rms_norm_eps": 1e-5}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {  # as their config.json said
    "Mistral 7B v0.1": ("mistral", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "hidden_act": "silu", "tie_word_embeddings": False}),
    "Gemma 2 2B": ("gemma2", {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    "OLMo 2 7B": ("olmo2", {
        "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 500000, "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False}),
    "Phi-3 mini 4k": ("phi3", WIDE | {
        "vocab_size": 32064, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": None,
        "sliding_window": 2047, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False}),
    "Phi-3 mini 128k": ("phi3", WIDE | {
        "vocab_size": 32064, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [8.0] * 48}}),
    "Phi-4 mini": ("phi3", WIDE | {
        "vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_tensors_of_their_class(name):
    """Names, shapes and the count of parameters, without weights."""
    model_type, said = PUBLISHED[name]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **said))
    wanted = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    config = model_config({"model_type": model_type, **said})
    ours = build(config, device="meta")
    own = dict(ours.named_parameters())
    if config.tie_embeddings:
        wanted.pop("lm_head.weight")
    found = {}
    for entry in FAMILIES[model_type].entries(config):
        parts = [tuple(own[part].shape) for part in entry.ours]
        found[entry.theirs] = (sum(part[0] for part in parts), *parts[0][1:])
    assert found == wanted
    assert predicted_parameters(ours) == sum(p.numel() for p in theirs.parameters())
    assert FAMILIES[model_type].fits(config)
    assert config.max_seq_len == min(
        said["max_position_embeddings"], said.get("original_max_position_embeddings", 10**9)
    )
