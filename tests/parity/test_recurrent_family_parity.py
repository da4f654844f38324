"""Mamba, Mamba-2, RWKV-4 and Bamba against transformers, both ways, on random weights."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import transformers
from family_checks import (
    ENDS,
    Cases,
    V,
    check_export,
    check_left_out,
    check_same_tensors,
    check_states,
    damaged,
    in_parts,
    refused,
    some_tokens,
    valid_of,
)
from proof import agree
from safetensors.torch import load_file

from octavo.hub.folder import FAMILIES, load_model, model_config, read_config, save_model
from octavo.nn.contracts import Inputs

SHAPE = {**ENDS, "hidden_size": 32, "num_hidden_layers": 3}
MAMBA2 = {**SHAPE, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8}
BAMBA = {
    **ENDS, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_layer_indices": [1, 2], "mamba_n_heads": 8, "mamba_n_groups": 2,
    "mamba_d_state": 16, "mamba_chunk_size": 8, "max_position_embeddings": 64,
}  # fmt: skip
RWKV = {**SHAPE, "context_length": 64, "rescale_every": 0}
CONFIGS = {
    "mamba": transformers.MambaConfig(**SHAPE, state_size=5),
    "mamba biased": transformers.MambaConfig(
        **SHAPE, state_size=4, expand=1, conv_kernel=3, time_step_rank=5, use_bias=True, use_conv_bias=False,
        tie_word_embeddings=False, layer_norm_epsilon=1e-3,
    ),
    "mamba2": transformers.Mamba2Config(**MAMBA2),
    "mamba2 tied": transformers.Mamba2Config(
        **MAMBA2, use_bias=True, use_conv_bias=False, tie_word_embeddings=True, layer_norm_epsilon=1e-3, conv_kernel=3
    ),
    "rwkv": transformers.RwkvConfig(**RWKV),
    "rwkv narrow": transformers.RwkvConfig(**RWKV, intermediate_size=40, tie_word_embeddings=True),
    "bamba": transformers.BambaConfig(**BAMBA),
    "bamba biased": transformers.BambaConfig(
        **{**BAMBA, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, mamba_proj_bias=True,
        mamba_conv_bias=False, tie_word_embeddings=True, rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ),
}  # fmt: skip


CASES = Cases(CONFIGS, spread=0.3)
pair = CASES.pairs()


def in_our_order(states):
    """No embedding there, and the last layer's output before and after the norm."""
    *layers, last = states
    return [None, *layers[:-1], last]


@pytest.mark.rows("A10", "A12")
def test_logits_and_every_hidden_state(pair):
    config = pair.ours.config
    same = functools.partial(agree, config.blocks[config.layer_names()[0]].mixer.kind, f"transformers {pair.family}")
    order = list if pair.family == "bamba" else in_our_order
    check_states(pair, takes=(), order=order, same=same, use_cache=False)


@torch.no_grad()
def test_padded_rows_say_what_each_says_alone(pair):
    """Theirs row by row without padding: their recurrences are not all built for it."""
    tokens = some_tokens()
    for side in ("left", "right"):
        valid = valid_of(side)
        got = pair.ours(Inputs(tokens, valid=valid)).logits
        for row in range(3):
            wanted = pair.theirs(tokens[row, valid[row]][None], use_cache=False).logits[0]
            agree("mamba", "transformers", got[row, valid[row]], wanted, case=f"padding {side}")


@pytest.mark.rows("A10", "A12")
def test_saved_here_it_loads_there_and_says_the_same(pair, tmp_path):
    same = functools.partial(agree, "mamba", "transformers", case="export")
    assert len(check_export(pair, tmp_path, same=same, prompts=(5, 7), use_cache=False)) > 1
    check_same_tensors(pair.folder, tmp_path)


# ---------------------------------------------------------------------------------------------- special cases


@torch.no_grad()
def test_mamba2_limits_the_step_in_every_pass(tmp_path):
    """Theirs forgets time_step_limit where it decodes one token with its cache; one pass is the reference."""
    theirs = CASES.reference("mamba2", time_step_limit=(0.6, 0.8))
    theirs.save_pretrained(tmp_path)
    ours, tokens = load_model(tmp_path), some_tokens()
    assert ours.config.blocks["block"].mixer.dt_limit == (0.6, 0.8)
    wanted = theirs(tokens, use_cache=False).logits
    agree("mamba2", "transformers Mamba2ForCausalLM", ours(Inputs(tokens)).logits, wanted, case="limited")
    got = in_parts(ours, tokens, 1)
    agree("mamba2", "transformers Mamba2ForCausalLM", got, wanted, case="limited, decoding against one pass")
    free = CASES.reference("mamba2")(tokens, use_cache=False).logits
    assert float((wanted - free).abs().max()) > 0.01  # the limit is felt
    save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert tuple(again.config.time_step_limit) == (0.6, 0.8)


@pytest.mark.parametrize("limit", [[0.01, {"__float__": "Infinity"}], [0.01, float("inf")]], ids=["mapping", "number"])
def test_a_limit_on_one_side_alone_is_kept(limit):
    config = model_config(CASES.said("mamba2", time_step_limit=limit))
    assert config.blocks["block"].mixer.dt_limit == (0.01, 1e30)
    assert FAMILIES["mamba2"].fits(config)
    assert FAMILIES["mamba2"].write(config)["time_step_limit"] == [0.01, {"__float__": "Infinity"}]


@torch.no_grad()
def test_rwkv_rescaling_changes_nothing_but_what_eps_counts(tmp_path):
    """rescale_every halves their stream; every reader normalises it. Without eps nothing is left of it."""
    tokens, logits = some_tokens(), {}
    CASES.saved("rwkv", tmp_path)
    for every in (0, 1):
        (tmp_path / "config.json").write_text(json.dumps(read_config(tmp_path) | {"rescale_every": every}))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        logits[every, 1e-5] = theirs(tokens, use_cache=False).logits
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 0.0
        logits[every, 0.0] = theirs(tokens, use_cache=False).logits
        agree("rwkv4", "transformers RwkvForCausalLM", load_model(tmp_path)(Inputs(tokens)).logits, logits[0, 1e-5])
    agree("rwkv4", "transformers RwkvForCausalLM", logits[1, 0.0], logits[0, 0.0], case="theirs, halved or not")
    assert float((logits[1, 1e-5] - logits[0, 1e-5]).abs().max()) > 1e-4  # eps is felt


REFUSED = [
    ("mamba", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("mamba", {"expand": 1.01}, "expand = 1.01"),
    ("mamba2", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("mamba2", {"head_dim": 16}, "head_dim = 16"),
    ("mamba2", {"n_groups": 3}, "n_groups = 3 must divide"),
    ("rwkv", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon = 0.001"),
    ("bamba", {"mamba_d_head": 16}, "mamba_d_head = 16"),
    ("bamba", {"attn_layer_indices": [1, 9]}, "attn_layer_indices = [9]"),
    ("bamba", {"hidden_act": "mish"}, "mish"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=str)
def test_what_would_change_the_mathematics_is_refused_by_its_key(name, changes, said):
    refused(lambda: model_config(CASES.said(name, **changes)), said)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_is_left_out_means_what_its_class_means(name):
    check_left_out(CONFIGS[name].to_dict(), type(CONFIGS[name]), but=("time_step_rank",))  # the tensors say the rank


def test_a_missing_or_strange_tensor_is_named(tmp_path):
    layers = "backbone.layers"
    changes = {
        f"{layers}.1.mixer.A_log": None, f"{layers}.1.mixer.in_proj.bias": (128,),
        f"{layers}.0.mixer.conv1d.weight": (64, 4),
    }  # fmt: skip
    said = (f"missing: {layers}.1.mixer.A_log (1)", f"not used: {layers}.1.mixer.in_proj.bias (1)",
            "conv1d.weight has (64, 4), expected (64, 1, 4)")  # fmt: skip
    refused(lambda: load_model(damaged(CASES.saved("mamba", tmp_path), changes)), *said)


def test_the_early_spelling_of_mambas_embedding(tmp_path):
    embedding = load_file(CASES.saved("mamba", tmp_path) / "model.safetensors")["backbone.embeddings.weight"]
    changes = {"backbone.embedding.weight": embedding, "backbone.embeddings.weight": None}
    assert load_model(damaged(tmp_path, changes)).vocab_size == V
