"""Checkpoint families with mixtures of experts against transformers' classes, both ways; V3's further token too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_checks import (
    ENDS,
    Cases,
    T,
    V,
    check_decoding,
    check_export,
    check_greedy,
    check_left_out,
    check_same_tensors,
    check_states,
    close,
    damaged,
    filled,
    refused,
    some_tokens,
    tensors_of,
)
from safetensors.torch import load_file
from transformers.modeling_layers import MtpModel

from octavo.hub.folder import FAMILIES, load_model, model_config, read_config, save_model
from octavo.models.cost import predicted_parameters
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

N = 3
SHAPE: dict[str, Any] = {
    **ENDS, "hidden_size": 32, "num_hidden_layers": N, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
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
CONFIGS: dict[str, Any] = {
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


CASES = Cases(CONFIGS, experts_implementation="eager")  # one by one
pair = CASES.pairs()


def test_a_folder_has_a_tensor_for_each_expert(pair):
    """What transformers writes is what is published; the fused form is theirs and ours in memory alone."""
    names = [*load_file(pair.folder / "model.safetensors")]
    assert any(".experts.2." in name for name in names)
    assert not any("gate_up_proj" in name for name in names)


@pytest.mark.rows("A9", "A10", "M2", "M5")
def test_logits_and_every_hidden_state(pair):
    check_states(pair)


def test_left_padded_rows_and_cached_steps(pair):
    check_decoding(pair, (4, 7))


@pytest.mark.rows("A9", "A10", "I1")
def test_saved_here_it_loads_there_and_says_the_same_text(pair, tmp_path):
    assert len(check_export(pair, tmp_path, shard_bytes=30_000)) > 1


def test_written_and_read_again_the_tensors_are_the_same_bits(pair, tmp_path):
    save_model(pair.ours, tmp_path)
    check_same_tensors(pair.folder, tmp_path)


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
    check_greedy(ours, main, [tokens[0, :5]], 10, use_mtp=True)


@torch.no_grad()
def test_the_module_comes_back_with_its_copies_or_without(tmp_path):
    ours, tokens = with_module(), some_tokens(2)
    save_model(ours, tmp_path)
    stored, last = load_file(tmp_path / "model.safetensors"), f"model.layers.{N}"
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    assert all(torch.equal(stored[f"{last}.{name}"], stored[of]) for name, of in copies.items())

    def further(model: Decoder) -> torch.Tensor:
        return model(Inputs(tokens), needs=("multi_token",)).multi_token[0]

    assert torch.equal(further(load_model(tmp_path)), further(ours))
    damaged(tmp_path, {f"{last}.{name}": None for name in copies})
    assert torch.equal(further(load_model(tmp_path)), further(ours))
    damaged(tmp_path, {f"{last}.embed_tokens.weight": stored["model.embed_tokens.weight"] + 1})
    refused(lambda: load_model(tmp_path), f"{last}.embed_tokens.weight is not the copy it should be")
    damaged(tmp_path, {f"{last}.embed_tokens.weight": None, f"{last}.eh_proj.weight": None})
    refused(lambda: load_model(tmp_path), f"missing: {last}.eh_proj.weight (1)")


@torch.no_grad()
def test_a_folder_that_speaks_of_a_module_and_has_none_is_read_without(tmp_path):
    """That is what transformers saves."""
    folder = CASES.saved("deepseek_v3", tmp_path)
    said = read_config(folder)
    assert said.get("num_nextn_predict_layers", said.get("num_mtp_layers")) == 1
    assert model_config(said | {"num_nextn_predict_layers": 1}).multi_token is not None
    assert load_model(folder).config.multi_token is None


@torch.no_grad()
def test_the_bias_of_the_choice_is_no_weight_and_keeps_its_precision(tmp_path):
    """Its class keeps it in float32: rounded, other experts are chosen."""
    theirs = CASES.reference("deepseek_v3").bfloat16()
    theirs.model.layers[1].mlp.gate.e_score_correction_bias = torch.rand(8) + 1
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    bias = ours.get_submodule("blocks.1.layers.channel.mixer").selection_bias
    assert ours.embed.weight.dtype == torch.bfloat16
    assert bias.dtype == torch.float32
    assert torch.equal(bias, theirs.model.layers[1].mlp.gate.e_score_correction_bias)
    assert not bias.requires_grad
    save_model(ours, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


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
    refused(lambda: model_config(CASES.said(name, **changes)), said)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_is_left_out_means_what_its_class_means(name):
    """But where the tensors speak: the rank of the queries, and the module of a further token."""
    check_left_out(CASES.said(name), type(CONFIGS[name]), but=("q_lora_rank", "num_nextn_predict_layers"))


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
    refused(lambda: load_model(damaged(CASES.saved(name, tmp_path), {tensor: shape})), said)


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


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_a_saved_folder(name, tmp_path):
    theirs = {key: tuple(t.shape) for key, t in load_file(CASES.saved(name, tmp_path) / "model.safetensors").items()}
    model = load_model(tmp_path)
    head = {"lm_head.weight": (V, 32)}  # tied ones are in no folder
    assert {**head, **tensors_of(model.config, name.split()[0])} == {**head, **theirs}
    assert predicted_parameters(model) == sum(p.numel() for p in model.parameters())
