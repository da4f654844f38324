"""Qwen2-MoE (Yang et al. 2024, section 2.2.2) and Qwen3-MoE (Yang et al. 2025): Qwen with many small experts.

Experts stand in the layers i with ``(i + 1) % decoder_sparse_step == 0`` that mlp_only_layers does not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.experts import WithExperts, balance, whole, write_balance
from octavo.hub.qwen import Qwen2, Qwen3


class QwenMoe(WithExperts):
    """What both generations share."""

    def sparse(self, hf: Mapping[str, Any]) -> list[bool]:
        dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
        return [i not in dense and (i + 1) % step == 0 for i in range(hf["num_hidden_layers"])]

    def write_sparse(self, sparse: list[bool]) -> dict[str, Any]:
        # Any pattern is a list of exceptions to "every layer".
        return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, has in enumerate(sparse) if not has]}

    def read_experts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "n_experts": whole(hf, "num_experts" if "num_experts" in hf else "num_local_experts", self),
            "experts_per_token": whole(hf, "num_experts_per_tok", self),
            "d_ff": whole(hf, "moe_intermediate_size", self),
            "normalise": hf.get("norm_topk_prob") or False,
            **balance(hf),
        }

    def write_experts(self, experts: Any, d_model: int) -> dict[str, Any]:
        return {
            "num_experts": experts.n_experts,
            "num_experts_per_tok": experts.experts_per_token,
            "moe_intermediate_size": experts.width(d_model),
            "norm_topk_prob": experts.normalise or experts.order == "top_first",
            **write_balance(experts),
        }


class Qwen2Moe(QwenMoe, Qwen2):
    """A shared expert reads every token; a sigmoid of its own weights it."""

    model_type, architecture = "qwen2_moe", "Qwen2MoeForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**Qwen2.only, "qkv_bias": True}
    shared: ClassVar[Mapping[str, str]] = {p: f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")}
    shared_gate = "mlp.shared_expert_gate.weight"

    def read_experts(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        width = whole(hf, "shared_expert_intermediate_size", self)
        return {**super().read_experts(hf), "n_shared_experts": 1, "shared_d_ff": width, "shared_gate": True}

    def write_experts(self, experts: Any, d_model: int) -> dict[str, Any]:
        width = experts.shared_d_ff or experts.n_shared_experts * experts.width(d_model)
        return {**super().write_experts(experts, d_model), "shared_expert_intermediate_size": width}

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        n, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
        if not hf.get("use_sliding_window", False) or not window:
            return [None] * n
        # Without layer_types its class means every other layer below max_window_layers, unlike its dense sibling.
        last = hf.get("max_window_layers", 28)
        wanted = ["sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(n)]
        return self.by_kind(hf, wanted, window)


class Qwen3Moe(QwenMoe, Qwen3):
    """No shared experts; one window for every layer or none."""

    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    default_head_dim = None

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
        wanted = ["full_attention" if window is None else "sliding_attention"] * hf["num_hidden_layers"]
        if hf.get("layer_types") not in (None, wanted):  # its class in transformers does not look at them
            raise self.refuse("layer_types", hf["layer_types"])
        return [window] * hf["num_hidden_layers"]

    def write_windows(self, windows: list[int | None]) -> dict[str, Any]:
        return {"use_sliding_window": windows[0] is not None, "sliding_window": windows[0] or 4096}
