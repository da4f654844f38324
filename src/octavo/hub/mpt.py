"""MPT (MosaicML 2023): ALiBi, no biases anywhere, q, k and v in one matrix one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.classic import Classic, mlp
from octavo.models.decoder import Decoder

# Of attn_config: what its class in transformers does not compute, or this one does not.
ATTENTION: Mapping[str, Any] = {
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "prefix_lm": False,
    "qk_ln": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "alibi_bias_max": 8,
}


class Mpt(Classic):
    """Norms have a scale alone; the MLP is four times as wide. Its dropouts are all attn_config's attn_pdrop.

    What its class knows as a key and ignores is refused here where the value is another than the one it computes:
    alibi_bias_max (StoryWriter has 16), learned positions, several kinds of attention.
    """

    model_type, architecture = "mpt", "MptForCausalLM"
    optional_prefix = "transformer."
    only: ClassVar[Mapping[str, Any]] = {"expansion_ratio": 4, "no_bias": True, "logit_scale": None}
    words: ClassVar[Mapping[str, str]] = {
        "d_model": "d_model",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "max_seq_len": "max_seq_len",
        "eps": "layer_norm_epsilon",
    }
    defaults: ClassVar[Mapping[str, Any]] = {"eps": 1e-5, "max_seq_len": 2048}
    default_tied = True
    norm_bias = False
    embedding, final_norm, layers = "wte", "norm_f", "blocks"
    norms: ClassVar[Mapping[str, str]] = {"norm_1": "layers.mixer.norm_in", "norm_2": "layers.channel.norm_in"}
    products: ClassVar[Mapping[str, str]] = {
        "attn.out_proj": "mixer.mixer.o",
        "ffn.up_proj": "channel.mixer.up",
        "ffn.down_proj": "channel.mixer.down",
    }

    def fused(self, config: Decoder.Config, block: Any) -> list[tuple[str, str, int]]:
        return [("attn.Wqkv", "qkv", 1)]

    def read_block(self, hf: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        said = hf.get("attn_config") or {}
        for key, plain in ATTENTION.items():
            if said.get(key) not in (None, plain):
                raise self.refuse(f"attn_config.{key}", said[key])
        dropout = said.get("attn_pdrop") or 0.0
        return {
            "mixer": {
                "kind": "attention",
                "n_heads": sizes["n_heads"],
                "scale": said.get("softmax_scale"),
                "dropout": dropout,
            },
            "channel": mlp(4 * sizes["d_model"], "gelu", bias=False),
            "dropout": dropout,
        }

    def write_block(self, config: Decoder.Config, block: Any) -> dict[str, Any]:
        # Its class takes whole numbers alone as attn_pdrop.
        said = {"alibi": True, "attn_pdrop": int(block.mixer.dropout), "softmax_scale": block.mixer.scale}
        return {"attn_config": said, "expansion_ratio": 4, "no_bias": True}

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read_ends(hf), "positions": {"kind": "alibi"}}
