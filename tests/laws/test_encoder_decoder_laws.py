"""Every law on encoder-decoders of several makes, and on what reads a memory."""

from __future__ import annotations

from typing import Any

import pytest

from octavo import laws
from octavo.laws.model import LAWS

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "max_seq_len": 16}
ATTENTION = {"kind": "attention", "n_heads": 4}
MLP = {"kind": "mlp", "activation": "gelu"}


def pair(encoder: dict[str, Any], decoder: dict[str, Any], **settings: Any) -> dict[str, Any]:
    one = {**SMALL, "causal": False, **encoder}
    return {"kind": "encoder_decoder", "vocab_size": 19, "encoder": one, "decoder": {**SMALL, **decoder}, **settings}


def block(mixer: Any = ATTENTION, cross: Any = None, channel: Any = MLP, **settings: Any) -> dict[str, Any]:
    return {"blocks": {"block": {"mixer": mixer, "cross": cross, "channel": channel, **settings}}}


CROSS = {"kind": "cross_attention", "n_heads": 4}
PAIRS = {
    "2017": pair(
        {**block(norm_placement="post"), "positions": "sinusoidal", "final_norm": False},
        {**block(cross=CROSS, norm_placement="post"), "positions": "sinusoidal", "final_norm": False},
    ),
    "relative": pair({**block(), "positions": "t5"}, {**block(cross=CROSS), "positions": "t5", "logit_scale": 0.25}),
    "shared positions": pair(
        {**block(), "positions": {"kind": "learned", "offset": 2}, "embed_norm": True},
        {**block(cross=CROSS), "positions": {"kind": "learned", "offset": 2}, "embed_norm": True},
        share_positions=True,
    ),
    "own tables, other widths": pair(
        {**block(), "d_model": 24},
        {**block(cross={**CROSS, "n_kv_heads": 2, "memory_width": 24, "qkv_bias": True, "o_bias": True})},
        share_embedding=False,
    ),
    "recurrent": pair(
        block({"kind": "gru", "both": "concat"}, channel=None),
        block({"kind": "lstm"}, {"kind": "cross_attention", "n_heads": 1}, None),
    ),
    "bottleneck": pair(
        {**block({"kind": "lstm"}, channel=None), "positions": "none"},
        {**block({"kind": "lstm"}, {"kind": "cross_attention", "n_heads": 1}, None), "positions": "none"},
        memory="last",
    ),
}


@pytest.mark.rows("A4", "N12")
@pytest.mark.parametrize("name", PAIRS)
def test_every_law_on_an_encoder_decoder(name):
    # With a memory of one vector a product sums over nothing, and the counter sees no matrix product in it.
    found = laws.check(
        PAIRS[name], [law for law in LAWS if law != "compilable" and (name, law) != ("bottleneck", "flops")]
    )
    assert not [str(result) for result in found if not result.ok]
    asked = {result.law for result in found if result.status != "not asked"}
    assert {"causal", "padding", "rows", "gradients", "incremental", "state", "state_bytes", "parameters"} <= asked


@pytest.mark.rows("B3")
def test_every_law_on_what_reads_a_memory():
    for use, found in laws.check_component("cross_attention").items():
        assert not [str(result) for result in found if not result.ok], use


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2017", "shared positions"])
def test_an_encoder_decoder_compiles_without_a_break(name):
    (result,) = laws.check(PAIRS[name], ["compilable"], slow=True)
    assert result.ok, str(result)
