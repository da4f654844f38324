"""Gemma 2 (Gemma Team 2024): norms around each branch, bounded scores and logits, windows in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.llama import Llama
from octavo.models.decoder import Decoder


class Gemma2(Llama):
    """Norms scale by 1 + w, token embeddings by sqrt(hidden_size), scores by 1 / sqrt(query_pre_attn_scalar)."""

    model_type, architecture = "gemma2", "Gemma2ForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {**Llama.only, "mlp_bias": False, "use_bidirectional_attention": False}
    placement = "sandwich"
    activation_key, default_activation = "hidden_activation", "gelu_pytorch_tanh"
    default_tied = True
    default_head_dim = 256
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "mixer.norm_in",
        "post_attention_layernorm": "mixer.norm_out",
        "pre_feedforward_layernorm": "channel.norm_in",
        "post_feedforward_layernorm": "channel.norm_out",
    }

    def read_norm(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read_norm(hf), "offset": True}

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        scale = hf.get("query_pre_attn_scalar", 256) ** -0.5
        cap = hf.get("attn_logit_softcapping", 50.0)
        return {**super().read_attention(hf), "scale": scale, "softcap": cap}

    def write_attention(self, mixer: Any) -> dict[str, Any]:
        width = mixer.head_dim if mixer.scale is None else round(mixer.scale**-2)
        return {
            **super().write_attention(mixer),
            "query_pre_attn_scalar": width,
            "attn_logit_softcapping": mixer.softcap,
        }

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        n = hf["num_hidden_layers"]
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
        return self.by_kind(hf, kinds, hf.get("sliding_window", 4096))

    def write_windows(self, windows: list[int | None]) -> dict[str, Any]:
        widths = sorted({window for window in windows if window is not None})
        return {
            "sliding_window": widths[0] if widths else 4096,  # its class wants one, used or not
            "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        }

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super().read_ends(hf),
            "embed_scale": hf["hidden_size"] ** 0.5,
            "logit_softcap": hf.get("final_logit_softcapping", 30.0),
        }

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        return {**super().write_ends(config), "final_logit_softcapping": config.logit_softcap}
