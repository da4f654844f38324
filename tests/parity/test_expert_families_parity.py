"""Checkpoint families with mixtures of experts against transformers' classes, both ways; V3's further token too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from octavo.errors import CheckpointError
from octavo.hub.folder import FAMILIES, load_model, model_config, read_config, save_model
from octavo.infer.generate import generate
from octavo.infer.sampling import SamplingConfig
from octavo.models.cost import predicted_parameters
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

V, T, N = 61, 12, 3
SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": N, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
SMALL = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 32, "beta_slow": 1, "mscale": 0.9, "mscale_all_dim": 0.707}  # fmt: skip
LATENT: dict[str, Any] = {
    **SHAPE, "num_key_value_heads": 4, "kv_lora_rank": 20, "q_lora_rank": 14, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 10, "moe_intermediate_size": 24, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
CASES: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(**SHAPE, **THETA, num_local_experts=4, head_dim=12),
    "mixtral window": transformers.MixtralConfig(
        **SHAPE, sliding_window=4, num_local_experts=3, num_experts_per_tok=1, hidden_act="gelu",
        tie_word_embeddings=True,
    ),
    "qwen2_moe": transformers.Qwen2MoeConfig(**SHAPE, **SMALL, shared_expert_intermediate_size=20),
    "qwen2_moe sparse": transformers.Qwen2MoeConfig(
        **SHAPE, **SMALL, **THETA, shared_expert_intermediate_size=40, norm_topk_prob=True, mlp_only_layers=[2],
        use_sliding_window=True, sliding_window=4, max_window_layers=2,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **SMALL, head_dim=12, norm_topk_prob=True),
    "qwen3_moe steps": transformers.Qwen3MoeConfig(
        **SHAPE, **SMALL, decoder_sparse_step=2, attention_bias=True, tie_word_embeddings=True,
        use_sliding_window=True, sliding_window=5,
    ),
    "deepseek_v2": transformers.DeepseekV2Config(
        **LATENT, **GROUPS, topk_method="group_limited_greedy", routed_scaling_factor=2.0, rope_parameters=YARN,
    ),
    "deepseek_v2 lite": transformers.DeepseekV2Config(
        **LATENT | {"q_lora_rank": None, "first_k_dense_replace": 0}, **THETA, attention_bias=True
    ),
    "deepseek_v3": transformers.DeepseekV3Config(**LATENT, **GROUPS, rope_parameters=YARN),
    "deepseek_v3 half": transformers.DeepseekV3Config(
        **LATENT | {"q_lora_rank": None, "num_experts_per_tok": 3, "n_shared_experts": 1}, n_group=2, topk_group=2,
        norm_topk_prob=False, rope_interleave=False, routed_scaling_factor=1.5, num_mtp_layers=0,
    ),
}  # fmt: skip


@torch.no_grad()
def filled(model: Any, seed: int = 7) -> Any:
    """Weights that are neither zero nor one nor shared by accident, and scores of experts that are far apart."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if key.endswith(("inv_freq", "original_inv_freq")):
            continue
        wide = 0.6 if "gate.weight" in key or "correction_bias" in key else 0.2
        drawn = torch.randn(tensor.shape, generator=generator) * wide
        tensor.copy_(drawn + float("norm" in key and key.endswith("weight")))
    return model.float().eval()


def reference(name: str) -> Any:
    """A transformers model of one of the cases, experts computed one by one."""
    config = CASES[name]
    return filled(
        transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
    )


def saved(name: str, folder: Path, **changes: Any) -> Path:
    """A folder of transformers' own, some keys of its config.json changed (None removes one)."""
    reference(name).save_pretrained(folder)
    config = read_config(folder) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def some_tokens(rows: int = 3, n: int = T) -> torch.Tensor:
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(their model, ours loaded from its folder, the folder)."""
    theirs = reference(request.param)
    folder = tmp_path_factory.mktemp("experts")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def test_a_folder_has_a_tensor_for_each_expert(pair):
    """What transformers writes is what is published; the fused form is theirs and ours in memory alone."""
    names = [*load_file(pair[2] / "model.safetensors")]
    assert any(".experts.2." in name for name in names)
    assert not any("gate_up_proj" in name for name in names)


@pytest.mark.rows("A9", "A10", "M2", "M5")
@torch.no_grad()
def test_logits_and_every_hidden_state(pair):
    theirs, ours, _ = pair
    tokens = some_tokens()
    a = theirs(tokens, output_hidden_states=True)
    b = ours(Inputs(tokens), needs=("logits", "hidden_states"))
    assert len(a.hidden_states) == N + 1
    for wanted, got in zip((a.logits, *a.hidden_states), (b.logits, *b.hidden_states), strict=True):
        close(got, wanted)
    assert float(a.logits.std()) > 0.5


@torch.no_grad()
def test_left_padded_rows_and_cached_steps(pair):
    theirs, ours, _ = pair
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


@pytest.mark.rows("A9", "A10", "I1")
@torch.no_grad()
def test_saved_here_it_loads_there_and_says_the_same_text(pair, tmp_path):
    theirs, ours, folder = pair
    assert save_model(ours, tmp_path / "ours", shard_bytes=30_000) == read_config(folder)["model_type"]
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    assert not [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    tokens = some_tokens()
    close(again.eval()(tokens).logits, theirs(tokens).logits)
    close(load_model(tmp_path / "ours")(Inputs(tokens)).logits, theirs(tokens).logits)
    prompt = tokens[0, :5]
    greedy = theirs.generate(
        prompt[None], do_sample=False, max_new_tokens=20, attention_mask=torch.ones(1, 5), pad_token_id=0
    )[0, 5:]  # fmt: skip
    (mine,) = generate(ours, Bare(), [prompt.tolist()], SamplingConfig(temperature=0, max_new_tokens=20), stop_ids=())
    assert list(mine.ids) == greedy.tolist()
    assert len(set(mine.ids)) > 1


def test_written_and_read_again_the_tensors_are_the_same_bits(pair, tmp_path):
    _, ours, folder = pair
    save_model(ours, tmp_path / "ours")
    theirs, mine = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "ours"))
    tied = {"lm_head.weight"} if ours.config.tie_embeddings else set()
    assert theirs.keys() - tied == mine.keys() - tied
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)


# ---------------------------------------------------------------------------------- the token after the next

DEEP = {"num_hidden_layers": 61, "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 8,
        "first_k_dense_replace": 60, "vocab_size": V}  # fmt: skip


def with_module(**changes: Any) -> Decoder:
    """A DeepSeek-V3 with its module, weights drawn."""
    hf = transformers.DeepseekV3Config(**LATENT | changes, **GROUPS, rope_parameters=YARN).to_dict()
    return filled(build(model_config(hf), seed=1))


@pytest.mark.rows("A10")
@torch.no_grad()
def test_the_module_is_read_by_transformers_and_predicts_the_same(tmp_path):
    """61 layers, as transformers knows the module by the name of the published one's layer."""
    ours = with_module(**DEEP)
    assert save_model(ours, tmp_path) == "deepseek_v3"
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False, dtype=torch.float32)
    further = MtpModel.from_pretrained(main.eval()).eval()
    tokens = some_tokens(2)
    out = ours(Inputs(tokens), needs=("hidden", "logits", "multi_token"))
    close(out.logits, main(tokens).logits, 2e-5)
    # Module 1 reads the hidden state of token i and the embedding of token i + 1, at the position of token i here.
    shifted = further.forward_layer(0, out.hidden[:, :-1], torch.arange(T - 1)[None], None, input_ids=tokens[:, 1:])
    close(out.multi_token[0][:, :-1], shifted, 2e-5)
    close(ours.logits(out.multi_token[0])[:, :-1], further.shared_head(shifted), 2e-5)
    prompt, asked = tokens[:1, :5], {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    drafted = main.generate(prompt, attention_mask=torch.ones(1, 5), use_mtp=True, **asked)[0, 5:]
    config = SamplingConfig(temperature=0, max_new_tokens=10)
    (mine,) = generate(ours, Bare(), [prompt[0].tolist()], config, stop_ids=())
    assert list(mine.ids) == drafted.tolist()


@torch.no_grad()
def test_the_module_comes_back_with_its_copies_or_without(tmp_path):
    ours, tokens = with_module(), some_tokens(2)
    save_model(ours, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    last = f"model.layers.{N}"
    for name, of in (
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("shared_head.head.weight", "lm_head.weight"),
    ):
        assert torch.equal(tensors[f"{last}.{name}"], tensors[of])
    wanted = ours(Inputs(tokens), needs=("multi_token",)).multi_token[0]
    again = load_model(tmp_path)
    assert torch.equal(again(Inputs(tokens), needs=("multi_token",)).multi_token[0], wanted)
    slim = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith((f"{last}.embed", f"{last}.shared_head.head"))
    }
    save_file(slim, path)
    assert torch.equal(load_model(tmp_path)(Inputs(tokens), needs=("multi_token",)).multi_token[0], wanted)
    save_file({**tensors, f"{last}.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=rf"{last}\.embed_tokens\.weight is not the copy it should be"):
        load_model(tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if name != f"{last}.eh_proj.weight"}, path)
    with pytest.raises(CheckpointError, match=rf"missing: {last}\.eh_proj\.weight \(1\)"):
        load_model(tmp_path)


@torch.no_grad()
def test_a_folder_that_speaks_of_a_module_and_has_none_is_read_without(tmp_path):
    """That is what transformers saves."""
    folder = saved("deepseek_v3", tmp_path)
    said = read_config(folder)
    assert said.get("num_nextn_predict_layers", said.get("num_mtp_layers")) == 1
    assert model_config(said | {"num_nextn_predict_layers": 1}).multi_token is not None
    assert load_model(folder).config.multi_token is None


@torch.no_grad()
def test_the_bias_of_the_choice_is_no_weight_and_keeps_its_precision(tmp_path):
    """Its class keeps it in float32: rounded, other experts are chosen."""
    theirs = reference("deepseek_v3").bfloat16()
    theirs.model.layers[1].mlp.gate.e_score_correction_bias = torch.rand(8) + 1
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    bias = ours.get_submodule("blocks.1.layers.channel.mixer").selection_bias
    assert ours.embed.weight.dtype == torch.bfloat16
    assert bias.dtype == torch.float32
    assert torch.equal(bias, theirs.model.layers[1].mlp.gate.e_score_correction_bias)
    assert not bias.requires_grad
    save_model(ours, tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"].dtype
        == torch.float32
    )


# ----------------------------------------------------------------------------------------------- strictness

REFUSED = [
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts = 0"),
    ("qwen2_moe", {"qkv_bias": False}, "qkv_bias = False"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size = 0"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "does not make sense"),
    ("qwen3_moe", {"layer_types": ["sliding_attention"] * N}, "layer_types"),
    ("qwen3_moe", {"mlp_bias": True}, "mlp_bias = True"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid'"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    ("deepseek_v2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "linear"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "topk_method = 'group_limited_greedy'"),
    ("deepseek_v3", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2"),
    ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts = 0"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "'fp8'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=str)
def test_what_would_change_the_mathematics_is_refused_by_its_key(name, changes, said):
    hf = {**CASES[name].to_dict(), **changes}
    with pytest.raises(CheckpointError) as caught:
        model_config(hf)
    assert said in str(caught.value)
    assert "Fix:" in str(caught.value)
    assert "\n" not in str(caught.value)


E2 = "experts.2.down_proj.weight"
DAMAGED = [
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", None, "missing: model.layers.1.block"),
    ("qwen3_moe", "model.layers.0.mlp.experts.5.up_proj.weight", (24, 32), "not used: model.layers.0.mlp.experts.5"),
    ("qwen2_moe", f"model.layers.0.mlp.{E2}", (24, 32), "has (24, 32), expected (32, 24)"),
    ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight", (2, 32), "has (2, 32), expected (1, 32)"),
    ("deepseek_v2", "model.layers.1.self_attn.kv_b_proj.weight", (44, 20), "has (44, 20), expected (88, 20)"),
    ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", None, "missing: model.layers.1.mlp.gate.e"),
    ("deepseek_v3", "model.layers.3.eh_proj.weight", (32, 64), "missing: model.layers.3."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tensor", "shape", "said"), DAMAGED, ids=lambda v: v if isinstance(v, str) else "")
def test_every_tensor_is_accounted_for(name, tensor, shape, said, tmp_path):
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


MOE = {"kind": "moe", "n_experts": 4, "d_ff": 24}
UNSAYABLE: list[dict[str, Any]] = [
    {"gated": False},
    {"eval_capacity_factor": 2.0},
    {"score": "sigmoid"},
    {"n_shared_experts": 1, "normalise": False},
    {"n_groups": 2, "groups_per_token": 1, "n_shared_experts": 1, "normalise": False, "experts_per_token": 1},
]


@pytest.mark.parametrize("change", UNSAYABLE, ids=str)
def test_a_mixture_that_no_family_can_say_stays_in_our_layout(change):
    channel = MOE | change
    config = Decoder.Config.model_validate({"vocab_size": V, "d_model": 32, "blocks": {"b": {"channel": channel}}})
    assert not [name for name, family in FAMILIES.items() if family.fits(config)]


@pytest.mark.parametrize(
    "change", [{}, {"normalise": False}, {"z_loss": 0.1, "balance": "sum", "capacity_factor": 1.2}, {"d_ff": None}]
)
def test_a_mixture_trained_here_is_written_as_a_family(change):
    """What only training feels (losses, capacity) is no reason against it."""
    config = Decoder.Config.model_validate(
        {"vocab_size": V, "d_model": 32, "blocks": {"b": {"mixer": {"n_heads": 4}, "channel": MOE | change}}}
    )
    fitting = [name for name, family in FAMILIES.items() if family.fits(config)]
    assert fitting == ([] if "normalise" in change else ["mixtral"])


def test_a_balance_loss_comes_back_where_the_family_has_words_for_it():
    block = {"mixer": {"n_heads": 4}, "channel": MOE | {"balance": "switch", "balance_weight": 0.02}}
    config = Decoder.Config.model_validate({"vocab_size": V, "d_model": 32, "blocks": {"b": block}})
    said = FAMILIES["mixtral"].write(config)
    assert (said["output_router_logits"], said["router_aux_loss_coef"]) == (True, 0.02)
    channel: Any = next(iter(FAMILIES["mixtral"].read(said).blocks.values())).channel
    assert (channel.balance, channel.balance_weight) == ("switch", 0.02)


# --------------------------------------------------------------------------------------- every tensor by name


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_a_saved_folder(name, tmp_path):
    theirs = {key: tuple(t.shape) for key, t in load_file(saved(name, tmp_path) / "model.safetensors").items()}
    config = load_model(tmp_path).config
    model = build(config, device="meta")
    own = {key: tuple(p.shape) for key, p in model.named_parameters()}
    found = {e.theirs: e.shape([own[part] for part in e.ours]) for e in FAMILIES[config_type(tmp_path)].entries(config)}
    assert {**found, **({"lm_head.weight": theirs["lm_head.weight"]} if "lm_head.weight" in theirs else {})} == theirs
    assert predicted_parameters(model) == sum(p.numel() for p in model.parameters())


def config_type(folder: Path) -> str:
    return read_config(folder)["model_type"]
