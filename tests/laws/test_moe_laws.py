"""The laws on mixtures of experts in their variants; the table's test has their defaults."""

from __future__ import annotations

from typing import Any

import pytest

from octavo import laws

VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek v3": {
        "kind": "moe", "n_experts": 4, "d_ff": 8, "score": "sigmoid", "n_groups": 2, "group_score": "two_largest",
        "selection_bias": True, "n_shared_experts": 1, "routed_scale": 2.5, "balance": "sequence", "z_loss": 0.01,
    },
    "switch": {
        "kind": "moe", "n_experts": 4, "experts_per_token": 1, "normalise": False, "gated": False, "balance": "switch",
        "capacity_factor": 1.25, "activation": "relu",
    },
    "capacity in a row": {"kind": "moe", "n_experts": 4, "eval_capacity_factor": 0.7, "capacity_over": "row"},
    "capacity in a batch": {"kind": "moe", "n_experts": 4, "eval_capacity_factor": 0.7},
    "notes": {"kind": "moe", "n_experts": 4, "order": "top_first", "balance": "sum", "shared_gate": True,
              "n_shared_experts": 2, "shared_d_ff": 12},
    "expert choice in a batch": {"kind": "expert_choice", "n_experts": 4, "over": "batch", "d_ff": 8},
}  # fmt: skip


@pytest.mark.rows("M2", "M3", "M5")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_law_on_a_variant(name):
    results = laws.check(laws.models_around(**VARIANTS[name])["channel"], seed=len(name))
    assert not [str(result) for result in results if not result.ok]
    held = {result.law for result in results if result.status == "holds"}
    assert {"gradients", "padding", "twins", "flops", "parameters"} <= held


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_compiles_without_a_graph_break(name):
    config = laws.models_around(**VARIANTS[name])["channel"]
    assert [result.status for result in laws.check(config, ["compilable"])] == ["holds"]
