"""Mistral (Jiang et al. 2023): Llama's shape, and one sliding window for every layer or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.llama import Llama


class Mistral(Llama):
    """sliding_window may be null; where the key is missing its class means 4096."""

    model_type, architecture = "mistral", "MistralForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**Llama.only, "attention_bias": False, "mlp_bias": False}
    whole_heads = False
    default_window: int | None = 4096

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def write_attention(self, mixer: Any) -> dict[str, Any]:
        return {}

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        window = hf.get("sliding_window", self.default_window)
        wanted = ["full_attention" if window is None else "sliding_attention"] * hf["num_hidden_layers"]
        if hf.get("layer_types") not in (None, wanted):  # its class in transformers does not look at them
            raise self.refuse("layer_types", hf["layer_types"])
        return [window] * hf["num_hidden_layers"]

    def write_windows(self, windows: list[int | None]) -> dict[str, Any]:
        return {"sliding_window": windows[0]}
