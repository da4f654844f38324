"""Qwen2 (Yang et al. 2024) and Qwen3 (Yang et al. 2025): Llama's shape with biased q, k, v or normed heads,
and a sliding window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.llama import Llama


class Qwen2(Llama):
    """q, k and v have biases, o has none."""

    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**Llama.only, "mlp_bias": False}
    whole_heads = False

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": True, "o_bias": False}

    def write_attention(self, mixer: Any) -> dict[str, Any]:
        return {}

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        n, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
        if not hf.get("use_sliding_window", False) or window is None:
            return [None] * n
        # Without layer_types, the older spelling: layers from max_window_layers on.
        first = hf.get("max_window_layers", 28)
        return self.by_kind(hf, ["sliding_attention" if i >= first else "full_attention" for i in range(n)], window)

    def write_windows(self, windows: list[int | None]) -> dict[str, Any]:
        widths = sorted({window for window in windows if window is not None})
        if not widths:
            return {"use_sliding_window": False, "max_window_layers": len(windows)}
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return {
            "use_sliding_window": True,
            "sliding_window": widths[0],
            "max_window_layers": kinds.index("sliding_attention"),
            "layer_types": kinds,
        }


class Qwen3(Qwen2):
    """Each head's queries and keys are normed; no biases unless attention_bias says so."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    default_head_dim = 128

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        bias = hf.get("attention_bias", False)
        return {"qkv_bias": bias, "o_bias": bias, "qk_norm": self.read_norm(hf)}

    def write_attention(self, mixer: Any) -> dict[str, Any]:
        return {"attention_bias": mixer.qkv_bias}
