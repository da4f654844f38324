"""Every law on every component: all pairs of values of the axes that make up a block."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from octavo import laws
from octavo.laws.model import LAWS
from octavo.models.block import NormPlacement
from octavo.nn.activation import ACTIVATIONS
from octavo.nn.tables import CHANNEL_MIXERS, NORMS, POSITIONS, TOKEN_MIXERS

# What one kind can look like; a component that is not named here is examined with its defaults.
TOKEN_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "multi-head": {"n_heads": 4},
        "grouped": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": {"kind": "rmsnorm"}},
        "multi-query": {"n_heads": 4, "n_kv_heads": 1, "qkv_bias": True, "o_bias": True, "scale": 0.3},
        "window": {"n_heads": 2, "head_dim": 6, "window": 3},
        "plain": {"n_heads": 4, "n_kv_heads": 2, "backend": "plain", "qk_norm": {"kind": "layernorm"}},
        "capped": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": "rmsnorm", "qk_norm_over": "all", "softcap": 2.0},
    },
    "mla": {"": {"n_heads": 4, "kv_rank": 6, "q_rank": 5, "v_head_dim": 3}},
    "side_by_side": {
        "": {"mixers": {"near": {"kind": "attention", "n_heads": 2, "window": 4}}, "scales": {"near": 0.5}}
    },
}
CHANNEL_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "mlp": {"plain": {"activation": "gelu_tanh", "bias": True}},
    "glu": {"swiglu": {"d_ff": 20}, "biased": {"d_ff": 24, "activation": "gelu", "bias": True}},
}
POSITION_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "rope": {"half": {}, "interleaved": {"layout": "interleaved"}, "part": {"fraction": 0.5, "theta": 500.0}},
    "sinusoidal": {"interleaved": {}, "half": {"layout": "half"}},
}
NORM_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {"rmsnorm": {"plain": {}, "offset": {"offset": True}}}
LAYOUTS = {
    **{placement: {"norm_placement": placement} for placement in NormPlacement.__args__},
    "parallel": {"topology": "parallel"},
    "parallel branch": {"topology": "parallel", "norm_placement": "branch"},
    "parallel sandwich": {"topology": "parallel", "norm_placement": "sandwich"},
    "parallel shared": {"topology": "parallel", "shared_norm": True},
    "scaled residual": {"norm_placement": "post", "residual_scale": 1.7},
}
ENDS = {
    "tied": {},
    "untied": {"tie_embeddings": False, "head_bias": True},
    "tied bias": {"head_bias": True, "final_norm": False},
    "scaled and capped": {"embed_scale": 4.0, "logit_softcap": 3.0},
}


def variants(table: dict[str, Any], settings: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {
        f"{kind} {name}".strip(): {"kind": kind, **values}
        for kind in table
        for name, values in settings.get(kind, {"": {}}).items()
    }


AXES: dict[str, dict[str, Any]] = {
    "mixer": variants(TOKEN_MIXERS, TOKEN_SETTINGS),
    "channel": {**variants(CHANNEL_MIXERS, CHANNEL_SETTINGS), "no channel": None},
    "norm": variants(NORMS, NORM_SETTINGS),
    "layout": LAYOUTS,
    "positions": variants(POSITIONS, POSITION_SETTINGS),
    "ends": ENDS,
}


def all_pairs(axes: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Few combinations in which any two values of two axes meet (greedy)."""
    names = list(axes)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x, y in itertools.product(axes[a], axes[b])
    }
    found = []
    while missing:
        a, x, b, y = min(missing)
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(
                    axes[name],
                    key=lambda value: sum(
                        pair in missing
                        for other, chosen in row.items()
                        for pair in ((other, chosen, name, value), (name, value, other, chosen))
                    ),
                )
        missing -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}
        found.append(row)
    return found


def configuration(row: dict[str, str]) -> dict[str, Any]:
    value = {axis: AXES[axis][name] for axis, name in row.items()}
    block = {"mixer": value["mixer"], "channel": value["channel"], **value["layout"]}
    other = {"mixer": {"kind": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": None}, "channel": None}
    examined = TOKEN_MIXERS[value["mixer"]["kind"]]
    heads = examined.heads(examined.Config.model_validate(value["mixer"]), 16)
    if heads:  # positions that add to scores serve one number of heads
        other["mixer"]["n_heads"] = heads.n_heads
    other["mixer"]["head_dim"] = heads.rotary_width if heads and heads.rotary_width else 8  # one table, one width
    kinds = [examined, *([CHANNEL_MIXERS[value["channel"]["kind"]]] if value["channel"] else [])]
    return {
        "causal": all(kind.capabilities.causal for kind in kinds),
        "d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "padding_id": None,
        "blocks": {"examined": block, "other": other}, "norm": value["norm"], "positions": value["positions"],
        **value["ends"],
    }  # fmt: skip


ROWS = all_pairs(AXES)


def broken(results: list[laws.LawResult]) -> list[str]:
    return [str(result) for result in results if not result.ok]


@pytest.mark.parametrize("row", ROWS, ids=[", ".join(row.values()) for row in ROWS])
def test_every_law_on_every_pair_of_components(row):
    config = configuration(row)
    results = laws.check(config, seed=len(str(row)))
    assert not broken(results)
    assert sum(result.status == "holds" for result in results) >= (13 if config["causal"] else 9)


def test_all_pairs_meet_and_all_tables_are_covered():
    for (a, xs), (b, ys) in itertools.combinations(AXES.items(), 2):
        assert {(row[a], row[b]) for row in ROWS} == set(itertools.product(xs, ys))
    kinds = {AXES["mixer"][row["mixer"]]["kind"] for row in ROWS}
    assert kinds == set(TOKEN_MIXERS)
    assert {AXES["norm"][row["norm"]]["kind"] for row in ROWS} == set(NORMS)
    assert {AXES["positions"][row["positions"]]["kind"] for row in ROWS} == set(POSITIONS)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation):
    block = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": {"kind": "glu", "activation": activation}}
    config = {"d_model": 16, "n_layers": 1, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block}}
    assert not broken(laws.check(config, ["causal", "gradients", "config", "parameters"]))


@pytest.mark.parametrize("original", [16, 8], ids=["short factors", "long factors"])
def test_longrope_keeps_every_law_on_either_side_of_its_first_length(original):
    """The choice by the length of a text would break causality and caches; here it is made once."""
    scaling = {"kind": "longrope", "short": [1.0, 1.5], "long": [2.0, 9.0], "original": original, "extended": 64}
    block = {"mixer": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2}}
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block},
              "positions": {"kind": "rope", "scaling": scaling}}  # fmt: skip
    assert not broken(laws.check(config))


@pytest.mark.parametrize("kind", [*TOKEN_MIXERS, *CHANNEL_MIXERS])
def test_every_mixer_in_every_use(kind):
    settings = {"n_heads": 4} if kind == "attention" else {}
    for use, results in laws.check_component(kind, **settings).items():
        assert not broken(results), use


def test_attention_compiles_without_a_graph_break():
    capped = {"n_heads": 4, "n_kv_heads": 2, "window": 5, "softcap": 2.0, "qk_norm": "rmsnorm", "qk_norm_over": "all"}
    for mixer, more in [({"n_heads": 4, "n_kv_heads": 2, "window": 5}, {}), (capped, {"embed_scale": 4.0})]:
        block = {"mixer": {"kind": "attention", **mixer}}
        config = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 16, "blocks": {"block": block}}
        assert [result.status for result in laws.check(config | more, ["compilable"])] == ["holds"]


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match="causal"):
        laws.check({"vocab_size": 5}, ["casual"])
    assert all(law.says for law in LAWS.values())
