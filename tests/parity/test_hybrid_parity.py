"""A hybrid of state spaces and attention as one decoder, against transformers' Bamba: logits, gradients, decoding."""

import pytest
import torch
from proof import agree
from transformers import BambaConfig, BambaForCausalLM

from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

pytestmark = pytest.mark.rows("S2")
REFERENCE = "transformers BambaForCausalLM"
KINDS = ["mamba2", "attention", "mamba2", "mamba2", "attention"]
THEIRS = BambaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, attn_layer_indices=[1, 4], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2,
    mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=8, tie_word_embeddings=False,
    max_position_embeddings=64, pad_token_id=None, attn_implementation="eager",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
)  # fmt: skip
CHANNEL = {"kind": "glu", "d_ff": 48}
OURS = Decoder.Config.model_validate(
    {
        "d_model": 32, "n_layers": 5, "vocab_size": 61, "max_seq_len": 64, "tie_embeddings": False,
        "norm": {"kind": "rmsnorm", "eps": 1e-5}, "positions": {"kind": "rope", "fraction": 0.5},
        "pattern": KINDS,
        "blocks": {
            "mamba2": {
                "mixer": {"kind": "mamba2", "n_heads": 8, "head_dim": 8, "d_state": 16, "n_groups": 2},
                "channel": CHANNEL,
            },
            "attention": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}, "channel": CHANNEL},
        },
    }
)  # fmt: skip
NAMES = {
    "in_proj.weight": "up.weight", "conv1d.bias": "conv_bias", "dt_bias": "dt_bias", "A_log": "log_a", "D": "skip",
    "norm.weight": "scale", "out_proj.weight": "o.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    theirs, ours = BambaForCausalLM(THEIRS).eval(), build(OURS).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    found = {
        "embed.weight": theirs.model.embed_tokens.weight, "norm.weight": theirs.model.final_layernorm.weight,
        "head.weight": theirs.lm_head.weight,
    }  # fmt: skip
    for i, (kind, layer) in enumerate(zip(KINDS, theirs.model.layers, strict=True)):
        at = f"blocks.{i}.layers"
        found[f"{at}.mixer.norm_in.weight"] = layer.input_layernorm.weight
        found[f"{at}.channel.norm_in.weight"] = layer.pre_ff_layernorm.weight
        for name in ("gate", "up", "down"):
            found[f"{at}.channel.mixer.{name}.weight"] = getattr(layer.feed_forward, f"{name}_proj").weight
        if kind == "attention":
            for name in "qkvo":
                found[f"{at}.mixer.mixer.{name}.weight"] = getattr(layer.self_attn, f"{name}_proj").weight
        else:
            for name, own in NAMES.items():
                found[f"{at}.mixer.mixer.{own}"] = layer.mamba.get_parameter(name)
            found[f"{at}.mixer.mixer.conv_weight"] = layer.mamba.conv1d.weight[:, 0]
    ours.load_state_dict(found)
    return theirs, ours


def test_logits_and_gradients(pair):
    theirs, ours = pair
    tokens = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
    wanted, got = theirs(tokens).logits, ours(Inputs(tokens)).logits
    agree("mamba2", REFERENCE, got, wanted, case="hybrid, logits")
    for model, logits in ((theirs, wanted), (ours, got)):
        model.zero_grad()
        logits.square().mean().backward()
    for kind, names in (("mamba2", ("in_proj", "up")), ("attention", ("q_proj", "q"))):
        i = KINDS.index(kind)
        layer = theirs.model.layers[i]
        reference = (layer.mamba if kind == "mamba2" else layer.self_attn).get_submodule(names[0]).weight.grad
        own = ours.blocks[i].layers["mixer"].mixer.get_submodule(names[1]).weight.grad
        agree(kind, REFERENCE, own, reference, case="hybrid, gradient")


@torch.no_grad()
def test_decoding_with_a_state_equals_their_cache(pair):
    theirs, ours = pair
    tokens = torch.randint(61, (1, 12), generator=torch.Generator().manual_seed(2))
    state = ours.new_state(1)
    got = [ours(Inputs(tokens), state).logits]
    for _ in range(9):
        got.append(ours(Inputs(got[-1][:, -1:].argmax(-1)), state).logits)
    ids = torch.cat([tokens, *(logits[:, -1:].argmax(-1) for logits in got[:-1])], 1)
    agree("mamba2", REFERENCE, torch.cat(got, 1), theirs(ids).logits, case="hybrid, decoding against one pass")
    generated = theirs.generate(tokens, max_new_tokens=9, do_sample=False)
    assert generated[0].tolist() == ids[0].tolist()
