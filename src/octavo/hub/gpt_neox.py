"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): both branches read one x, part of a head turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.classic import Classic, act, mlp, width
from octavo.hub.rope_words import read_partial, write_partial
from octavo.models.decoder import Decoder


class GPTNeoX(Classic):
    """q, k and v are one matrix, head by head; the branches stand side by side unless use_parallel_residual is false.

    The head is called ``embed_out`` in what is published, ``lm_head`` in transformers since version 5: both are read.
    """

    model_type, architecture = "gpt_neox", "GPTNeoXForCausalLM"
    ignored = (r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
    optional_prefix = "gpt_neox."
    renamed: ClassVar[Mapping[str, str]] = {r"^lm_head\.": "embed_out."}
    head = "embed_out.weight"
    only: ClassVar[Mapping[str, Any]] = {"is_decoder": False}
    defaults: ClassVar[Mapping[str, Any]] = {"eps": 1e-5, "max_seq_len": 2048}
    embedding, final_norm = "embed_in", "final_layer_norm"
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "layers.mixer.norm_in",
        "post_attention_layernorm": "layers.channel.norm_in",
    }
    products: ClassVar[Mapping[str, str]] = {
        "attention.dense": "mixer.mixer.o",
        "mlp.dense_h_to_4h": "channel.mixer.up",
        "mlp.dense_4h_to_h": "channel.mixer.down",
    }

    def fused(self, config: Decoder.Config, block: Any) -> list[tuple[str, str, int]]:
        return [("attention.query_key_value", "qkv", block.mixer.n_heads)]

    def read_block(self, hf: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        bias = hf.get("attention_bias", True)
        return {
            "mixer": {
                "kind": "attention",
                "n_heads": sizes["n_heads"],
                "qkv_bias": bias,
                "o_bias": bias,
                "dropout": hf.get("attention_dropout") or 0.0,
            },
            "channel": mlp(hf["intermediate_size"], hf.get("hidden_act", "gelu"), bias=True),
            "topology": "parallel" if hf.get("use_parallel_residual", True) else "sequential",
            "dropout": hf.get("hidden_dropout") or 0.0,
        }

    def write_block(self, config: Decoder.Config, block: Any) -> dict[str, Any]:
        return {
            "intermediate_size": width(config, block.channel),
            "hidden_act": act(block.channel),
            "attention_bias": block.mixer.qkv_bias,
            "attention_dropout": block.mixer.dropout,
            "hidden_dropout": block.dropout,
            "use_parallel_residual": block.topology == "parallel",
        }

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        fraction, theta = hf.get("rotary_pct", 0.25), hf.get("rotary_emb_base", 10000)
        dropout = hf.get("hidden_dropout") or 0.0
        rope = read_partial(self, hf, head_dim, fraction, theta, hf.get("max_position_embeddings") or 2048)
        return {**super().read_ends(hf), "positions": rope, "embed_dropout": dropout}

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        rope = write_partial(config)
        older = {"rotary_pct": rope.pop("partial_rotary_factor"), "rotary_emb_base": rope.pop("rope_theta")}
        return {**super().write_ends(config), **rope, **older}
