"""Every law on what attention can be beside its usual forms; each option alone, in one small model."""

from __future__ import annotations

from typing import Any

import pytest

from octavo import laws

ATTENTION = {"kind": "attention", "n_heads": 4}
MLA = {"kind": "mla", "n_heads": 4}
READERS = {
    "strided": {"kind": "strided", "stride": 3},
    "strided local": {"kind": "strided", "stride": 3, "part": "local"},
    "strided column": {"kind": "strided", "stride": 3, "part": "column"},
    "fixed": {"kind": "fixed", "stride": 4, "summary": 2},
    "fixed block": {"kind": "fixed", "stride": 4, "summary": 2, "part": "block"},
    "fixed summary": {"kind": "fixed", "stride": 4, "summary": 2, "part": "summary"},
}
MIXERS: dict[str, dict[str, Any]] = {
    "sinks": ATTENTION | {"n_kv_heads": 2, "sinks": True},
    "sinks in a window, a gate for each head": ATTENTION | {"sinks": True, "gate": "head", "window": 3},
    "sinks beside capped scores": ATTENTION | {"sinks": True, "softcap": 2.0},
    "a gate for each channel": ATTENTION | {"gate": "channel", "n_kv_heads": 1},
    "queries are keys": ATTENTION | {"keys": "query", "qk_norm": "rmsnorm"},
    "values are keys": ATTENTION | {"keys": "value", "n_kv_heads": 2, "v_rank": 5},
    "x is the values": ATTENTION | {"values": "input"},
    "values of low rank": ATTENTION | {"v_rank": 3, "qkv_bias": True},
    "tiled": ATTENTION | {"backend": "tiled", "sinks": True, "n_kv_heads": 2},
    "mla as DeepSeek V2": MLA | {"q_rank": 5, "kv_rank": 6, "v_head_dim": 3, "rope_dim": 4, "bias": True,
                                 "yarn": {"factor": 40.0, "mscale": 0.707}},
    "mla absorbed": MLA | {"backend": "absorbed", "kv_rank": 5, "v_head_dim": 6},
    **{f"reader {name}": ATTENTION | {"n_kv_heads": 2, "reader": reader} for name, reader in READERS.items()},
}  # fmt: skip


def model(mixer: dict[str, Any]) -> dict[str, Any]:
    blocks = {"own": {"mixer": mixer, "channel": None}}
    return {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": blocks}


@pytest.mark.parametrize("name", MIXERS)
def test_every_law_on_every_option(name):
    results = laws.check(model(MIXERS[name]))
    assert not [str(result) for result in results if not result.ok]
    assert sum(result.status == "holds" for result in results) >= 13


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sinks in a window, a gate for each head", "mla absorbed", "reader fixed", "reader strided column"]
)
def test_no_option_breaks_the_compilers_graph(name):
    assert [result.status for result in laws.check(model(MIXERS[name]), ["compilable"])] == ["holds"]


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        ({"keys": "query", "n_kv_heads": 2}, "n_kv_heads = n_heads = 4"),
        ({"values": "input", "n_kv_heads": 2}, r"n_kv_heads \* head_dim = d_model = 16, not 8"),
        ({"values": "input", "v_rank": 3}, "no value matrix"),
        ({"values": "input", "keys": "value"}, "no value matrix"),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(mixer, said):
    with pytest.raises(ValueError, match=said):
        laws.check({"d_model": 16, "vocab_size": 19, "blocks": {"own": {"mixer": ATTENTION | mixer}}}, ["config"])
