"""BLOOM (Le Scao et al. 2022): ALiBi, a norm after the embedding, q, k and v in one matrix head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.classic import Classic, mlp
from octavo.models.decoder import Decoder


class Bloom(Classic):
    """Everything has a bias; the MLP is four times as wide, with GELU's tanh form.

    pretraining_tp changes nothing by itself. Together with slow_but_exact, which is refused, its class in transformers
    sums the outputs of both branches in slices and leaves out their biases.
    """

    model_type, architecture = "bloom", "BloomForCausalLM"
    optional_prefix = "transformer."
    only: ClassVar[Mapping[str, Any]] = {"apply_residual_connection_post_layernorm": False}
    words: ClassVar[Mapping[str, str]] = {
        "d_model": "hidden_size",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "max_seq_len": "seq_length",
        "eps": "layer_norm_epsilon",
    }
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embed",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    }
    defaults: ClassVar[Mapping[str, Any]] = {"eps": 1e-5, "max_seq_len": 2048}
    default_tied = True
    embedding, embedding_norm, final_norm, layers = "word_embeddings", "word_embeddings_layernorm", "ln_f", "h"
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "layers.mixer.norm_in",
        "post_attention_layernorm": "layers.channel.norm_in",
    }
    products: ClassVar[Mapping[str, str]] = {
        "self_attention.dense": "mixer.mixer.o",
        "mlp.dense_h_to_4h": "channel.mixer.up",
        "mlp.dense_4h_to_h": "channel.mixer.down",
    }

    def fused(self, config: Decoder.Config, block: Any) -> list[tuple[str, str, int]]:
        return [("self_attention.query_key_value", "qkv", block.mixer.n_heads)]

    def read_block(self, hf: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        if hf.get("slow_but_exact") and (hf.get("pretraining_tp") or 1) > 1:
            raise self.refuse("slow_but_exact", True, "loses biases in its class together with pretraining_tp")
        return {
            "mixer": {
                "kind": "attention",
                "n_heads": sizes["n_heads"],
                "qkv_bias": True,
                "o_bias": True,
                "dropout": hf.get("attention_dropout") or 0.0,
            },
            "channel": mlp(4 * sizes["d_model"], "gelu_new", bias=True),
            "dropout": hf.get("hidden_dropout") or 0.0,
        }

    def write_block(self, config: Decoder.Config, block: Any) -> dict[str, Any]:
        return {"attention_dropout": block.mixer.dropout, "hidden_dropout": block.dropout}

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().read_ends(hf), "positions": {"kind": "alibi"}, "embed_norm": True}
