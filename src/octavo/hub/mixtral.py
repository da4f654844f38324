"""Mixtral (Jiang et al. 2024): Mistral with eight experts in every layer, of which two read a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.experts import WithExperts, balance, whole, write_balance
from octavo.hub.mistral import Mistral


class Mixtral(WithExperts, Mistral):
    """intermediate_size is the width of one expert; w1, w2 and w3 are gate, down and up."""

    model_type, architecture = "mixtral", "MixtralForCausalLM"
    # Noise on what the router reads would be a training unlike any here.
    only: ClassVar[Mapping[str, Any]] = {**Mistral.only, "router_jitter_noise": 0.0}
    default_theta, default_eps = 1e6, 1e-5
    default_window = None
    router = "block_sparse_moe.gate.weight"
    expert: ClassVar[Mapping[str, str]] = {
        product: f"block_sparse_moe.experts.{{}}.{name}.weight"
        for product, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }

    def sparse(self, hf: Mapping[str, Any]) -> list[bool]:
        return [True] * hf["num_hidden_layers"]

    def write_sparse(self, sparse: list[bool]) -> dict[str, Any]:
        return {}

    def read_experts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "n_experts": whole(hf, "num_experts" if "num_experts" in hf else "num_local_experts", self),
            "experts_per_token": hf.get("num_experts_per_tok", 2),
            "d_ff": hf["intermediate_size"],
            **balance(hf),
        }

    def write_experts(self, experts: Any, d_model: int) -> dict[str, Any]:
        return {
            "num_local_experts": experts.n_experts,
            "num_experts_per_tok": experts.experts_per_token,
            "intermediate_size": experts.width(d_model),
            **write_balance(experts),
        }
