"""Configurations as they are published: a model of the published size, every tensor of its class, without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_checks import tensors_of

from octavo.hub.folder import FAMILIES, model_config
from octavo.models.cost import predicted_parameters
from octavo.models.decoder import build

WIDE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "rms_norm_eps": 1e-5}
# Family, config.json as far as it is read, and the number of parameters (tied weights once).
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "EleutherAI/pythia-160m": ("gpt_neox", {
        "vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0}, 162_322_944),
    "EleutherAI/gpt-neox-20b": ("gpt_neox", {
        "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu_fast", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False},
        20_554_567_680),
    "microsoft/phi-2": ("phi", {
        "vocab_size": 51200, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 10240, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_theta": 10000.0,
        "rope_scaling": None, "tie_word_embeddings": False, "embd_pdrop": 0.0, "resid_pdrop": 0.1}, 2_779_683_840),
    "microsoft/phi-1_5": ("phi", {
        "vocab_size": 51200, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": None, "intermediate_size": 8192, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
        "tie_word_embeddings": False}, 1_418_270_720),
    "bigscience/bloom-560m": ("bloom", {
        "vocab_size": 250880, "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False, "pretraining_tp": 1, "offset_alibi": 100,
        "skip_bias_add": True, "n_inner": None, "seq_length": 2048}, 559_214_592),
    "bigscience/bloom": ("bloom", {
        "vocab_size": 250880, "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False, "pretraining_tp": 4, "slow_but_exact": False,
        "seq_length": 2048}, 176_247_271_424),
    "mosaicml/mpt-7b": ("mpt", {
        "vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32, "max_seq_len": 2048, "expansion_ratio": 4,
        "learned_pos_emb": True, "no_bias": True, "norm_type": "low_precision_layernorm", "logit_scale": None,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
                        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
                        "prefix_lm": False, "qk_ln": False, "softmax_scale": None}}, 6_649_286_656),
    "tiiuae/falcon-7b": ("falcon", {
        "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "alibi": False,
        "apply_residual_connection_post_layernorm": False, "bias": False, "layer_norm_epsilon": 1e-5,
        "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}, 6_921_720_704),
    "tiiuae/falcon-40b": ("falcon", {
        "vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_kv_heads": 8, "alibi": False, "bias": False, "layer_norm_epsilon": 1e-5, "multi_query": True,
        "new_decoder_architecture": True, "parallel_attn": True}, 41_303_293_952),
    "tiiuae/falcon-rw-1b": ("falcon", {
        "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "alibi": True,
        "apply_residual_connection_post_layernorm": False, "bias": True, "layer_norm_epsilon": 1e-5,
        "multi_query": False, "new_decoder_architecture": False, "parallel_attn": False}, 1_311_625_216),
    "state-spaces/mamba-130m-hf": ("mamba", {
        "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "expand": 2,
        "conv_kernel": 4, "time_step_rank": 48, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5, "residual_in_fp32": True, "intermediate_size": 1536}, 129_135_360),
    "state-spaces/mamba-2.8b-hf": ("mamba", {
        "vocab_size": 50280, "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16, "expand": 2,
        "conv_kernel": 4, "time_step_rank": 160, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5}, 2_768_345_600),
    "mistralai/Mamba-Codestral-7B-v0.1": ("mamba2", {
        "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64,
        "state_size": 128, "n_groups": 8, "expand": 2, "conv_kernel": 4, "chunk_size": 256, "use_bias": False,
        "use_conv_bias": True, "hidden_act": "silu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
        "time_step_limit": [0.0, float("inf")]}, 7_285_403_648),
    "RWKV/rwkv-4-169m-pile": ("rwkv", {
        "vocab_size": 50277, "hidden_size": 768, "num_hidden_layers": 12, "attention_hidden_size": 768,
        "intermediate_size": 3072, "context_length": 1024, "layer_norm_epsilon": 1e-5, "rescale_every": 6,
        "tie_word_embeddings": False}, 169_342_464),
    "ibm-ai-platform/Bamba-9B-v1": ("bamba", {
        "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attn_layer_indices": [9, 18, 27], "hidden_act": "silu",
        "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4,
        "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 262144, "tie_word_embeddings": False},
        9_780_235_392),  # its card says 9.78 B
    "Mistral 7B v0.1": ("mistral", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "hidden_act": "silu", "tie_word_embeddings": False},
        7_241_732_096),
    "Gemma 2 2B": ("gemma2", {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}, 2_614_341_888),
    "OLMo 2 7B": ("olmo2", {
        "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_theta": 500000, "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False},
        7_298_617_344),
    "Phi-3 mini 4k": ("phi3", WIDE | {
        "vocab_size": 32064, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": None,
        "sliding_window": 2047, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False}, 3_821_079_552),
    "Phi-3 mini 128k": ("phi3", WIDE | {
        "vocab_size": 32064, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [8.0] * 48}}, 3_821_079_552),
    "Phi-4 mini": ("phi3", WIDE | {
        "vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}}, 3_836_021_760),
}  # fmt: skip


@pytest.mark.rows("A10", "A12")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_tensors_of_their_class(name):
    model_type, said, published = PUBLISHED[name]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **said))
    family, config = FAMILIES[model_type], model_config({"model_type": model_type, **said})
    ours = build(config, device="meta")
    wanted = {key: tuple(tensor.shape) for key, tensor in theirs.named_parameters()}
    head = "head.weight" if model_type == "rwkv" else "lm_head.weight"
    assert (head in wanted) != config.tie_embeddings
    wanted = {family.head if key == head else key: shape for key, shape in wanted.items()}
    assert tensors_of(config, model_type) == wanted
    assert predicted_parameters(ours) == published == sum(p.numel() for p in theirs.parameters())
    assert family.fits(config)
    longest = [said[key] for key in ("max_position_embeddings", "original_max_position_embeddings") if key in said]
    assert not longest or config.max_seq_len == min(longest)
