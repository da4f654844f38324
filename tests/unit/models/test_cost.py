"""Counts against the published ones, on the meta device."""

from __future__ import annotations

import pytest
import torch

from octavo.models.cost import cost, predicted_parameters, state_bytes
from octavo.models.decoder import Decoder, build


def gpt(layers: int, d: int, heads: int, vocab: int, context: int) -> Decoder:
    block = {
        "mixer": {"kind": "attention", "n_heads": heads, "qkv_bias": True, "o_bias": True},
        "channel": {"kind": "mlp", "activation": "gelu_tanh", "bias": True},
    }
    config = {"d_model": d, "n_layers": layers, "vocab_size": vocab, "max_seq_len": context, "norm": "layernorm",
              "positions": "learned", "blocks": {"block": block}}  # fmt: skip
    return build(Decoder.Config.model_validate(config), device="meta")


@pytest.mark.rows("A3")
def test_gpt3_has_the_parameters_of_the_formula():
    L, d, V, context = 96, 12288, 50257, 2048
    model = gpt(L, d, 96, V, context)
    assert all(p.device.type == "meta" for p in model.parameters())
    mixer, channel = model.blocks[0].layers["mixer"].mixer, model.blocks[0].layers["channel"].mixer
    assert (mixer.head_dim, channel.up.d_out) == (128, 4 * d)
    formula = 12 * d**2 * L + (V + context) * d
    assert round(formula / 1e9, 1) == 174.6
    biases_and_norms = L * (4 * d + 5 * d + 4 * d) + 2 * d
    assert cost(model).parameters == predicted_parameters(model) == formula + biases_and_norms
    assert cost(model).embedding_parameters == (V + context) * d
    assert cost(model, dtype=torch.bfloat16).state_bytes == 2 * 2 * L * d * context  # k and v, two bytes each


@pytest.mark.rows("F1")
def test_the_feed_forward_has_two_thirds_of_a_block():
    model = gpt(1, 512, 8, 100, 64)
    mixer, channel = (model.blocks[0].layers[name].mixer for name in ("mixer", "channel"))
    ratio = channel.predicted_parameters() / (mixer.predicted_parameters() + channel.predicted_parameters())
    assert f"{ratio:.3f}" == "0.667"
    assert [channel.up.d_out, channel.down.d_in] == [2048, 2048]
    glu = Decoder.Config.model_validate({"d_model": 768, "vocab_size": 10, "blocks": {"b": {"channel": "glu"}}})
    wide = build(glu, device="meta").blocks[0].layers["channel"].mixer.predicted_parameters()
    assert wide == 8 * 768**2  # as many as an MLP of four times the width


def test_flops_by_hand():
    """d 4, one head, ff 16, V 10, T 3: projections 4, scores and values, up and down, head."""
    block = {"mixer": {"kind": "attention", "n_heads": 1}, "channel": {"kind": "mlp"}}
    config = {"d_model": 4, "n_layers": 2, "vocab_size": 10, "max_seq_len": 8, "blocks": {"block": block}}
    model = build(Decoder.Config.model_validate(config))
    per_layer = 2 * 3 * 4 * 16 + 2 * (2 * 3 * 3 * 4) + 2 * 3 * 2 * 4 * 16
    counted = cost(model, 3)
    assert counted.forward_flops == 2 * per_layer + 2 * 3 * 4 * 10
    assert counted.train_flops == 3 * counted.forward_flops


def test_state_bytes_by_hand():
    blocks = {"full": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}},
              "window": {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 1, "window": 5}}}  # fmt: skip
    config = {"d_model": 32, "n_layers": 3, "vocab_size": 10, "max_seq_len": 64, "blocks": blocks,
              "pattern": ("full", "window")}  # fmt: skip
    specs = build(Decoder.Config.model_validate(config), device="meta").state_specs()
    assert state_bytes(specs, 64, torch.float32) == 4 * (2 * (64 * 2 * 2 * 8) + 5 * 2 * 8)
