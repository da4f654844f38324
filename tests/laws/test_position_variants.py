"""Every law on the values of position schemes, scalings, readers and relative mixers that defaults leave out."""

from __future__ import annotations

import pytest
import torch

from octavo import laws

GROUPED = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}
SMALL = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16}

# The trained length lies inside the laws' texts of 12 tokens, so that both sides of it are examined.
CASES = {
    "dynamic": (GROUPED, {"kind": "rope", "scaling": {"kind": "dynamic", "original": 5, "factor": 3.0}}),
    "dynamic, window": (
        {**GROUPED, "window": 4},
        {"kind": "rope", "layout": "interleaved", "fraction": 0.5,
         "scaling": {"kind": "dynamic_simple", "original": 6}, "reverse": True},
    ),
    "dynamic, plain": (
        {**GROUPED, "backend": "plain", "softcap": 2.0, "qk_norm": "rmsnorm"},
        {"kind": "rope", "scaling": {"kind": "dynamic", "original": 7}},
    ),
    "yarn": (GROUPED, {"kind": "rope", "scaling": {"kind": "yarn", "original": 8, "mscale": 1.0}}),
    "truncation": (GROUPED, {"kind": "rope", "scaling": {"kind": "truncation", "original": 8}}),
    "rerope": ({**GROUPED, "reader": {"kind": "rerope", "window": 4}, "softcap": 2.0}, "rope"),
    "leaky rerope": (
        {**GROUPED, "reader": {"kind": "leaky_rerope", "window": 3, "leak": 2.5, "trained": 6}},
        {"kind": "rope", "scaling": {"kind": "yarn", "original": 8}},
    ),
    "alibi, window": ({**GROUPED, "window": 4, "softcap": 2.0}, "alibi"),
    "t5": ({**GROUPED, "backend": "plain"}, {"kind": "t5", "n_buckets": 8, "max_distance": 9}),
    "shaw, keys": ({"kind": "shaw", "n_heads": 4, "clip": 20, "values": False, "qkv_bias": True}, "alibi"),
    "shaw, near": ({"kind": "shaw", "n_heads": 2, "head_dim": 5, "clip": 2, "o_bias": True}, "none"),
    "transformer_xl": ({"kind": "transformer_xl", "n_heads": 2, "head_dim": 5, "qkv_bias": True}, "none"),
}  # fmt: skip


def config(name: str, **more):
    mixer, positions = CASES[name]
    # A neighbour with as many heads, for what adds to scores.
    beside = {"kind": "attention", "n_heads": mixer["n_heads"], "head_dim": 4}
    blocks = {"own": {"mixer": mixer}, "other": {"mixer": beside, "channel": None}}
    return {**SMALL, "blocks": blocks, "positions": positions, **more}


def broken(results):
    return [str(result) for result in results if not result.ok]


@pytest.mark.rows("R3", "R5", "R7", "R8", "R9", "R10")
@pytest.mark.parametrize("name", CASES)
def test_every_law(name):
    results = laws.check(config(name), seed=len(name))
    assert not broken(results)
    assert sum(result.status == "holds" for result in results) >= 13


@pytest.mark.rows("R3")
@pytest.mark.parametrize("name", ["alibi, window", "t5", "shaw, near", "transformer_xl"])
def test_laws_of_models_that_read_both_ways(name):
    asked = ["packed", "padding", "rows", "gradients", "twins", "flops"]
    assert not broken(laws.check(config(name, causal=False), asked, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic", "leaky rerope", "t5", "shaw, near", "transformer_xl"])
def test_compiled_without_a_graph_break(name):
    torch._dynamo.reset()
    assert not broken(laws.check(config(name, n_layers=1), ["compilable"]))
