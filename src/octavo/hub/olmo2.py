"""OLMo 2 (Walsh et al. 2024): the norms stand on the branches' outputs, q and k are normed over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.llama import Llama


class Olmo2(Llama):
    """No norm before a branch; multi-head attention unless num_key_value_heads says otherwise."""

    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**Llama.only, "mlp_bias": False, "clip_qkv": None, "sliding_window": None}
    placement = "branch"
    default_eps = 1e-5
    whole_heads = False
    norms: ClassVar[Mapping[str, str]] = {
        "post_attention_layernorm": "mixer.norm_out",
        "post_feedforward_layernorm": "channel.norm_out",
    }

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read_attention(hf), "qk_norm": self.read_norm(hf), "qk_norm_over": "all"}
