"""Falcon (Almazrouei et al. 2023): 7B (one head of keys, one norm), 40B (grouped heads, two norms), RW (ALiBi)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.classic import Classic, act, mlp, width
from octavo.hub.rope_words import read_partial, write_partial
from octavo.models.decoder import Decoder


class Falcon(Classic):
    """q, k and v are one matrix: for each head of keys its queries, its keys, its values.

    ``new_decoder_architecture`` (40B, 180B, 11B) has grouped heads and both branches read one x, after a norm each, or
    one for both if num_ln_in_parallel_attn is 1. Before it, ``multi_query`` is one head of keys for all and
    ``parallel_attn`` both branches after one norm; RW has neither, biases, and ALiBi.

    ALiBi is divided by sqrt(head width) together with the scores, and each key's place times the slope is rounded to
    bfloat16: ``positions.rounding``, as its class does it in any precision. (Its eager form adds ALiBi twice, its
    default form once, as the published code did: once is what is computed here.)
    """

    model_type, architecture = "falcon", "FalconForCausalLM"
    ignored = (r".*\.rotary_emb\.inv_freq",)
    optional_prefix = "transformer."
    only: ClassVar[Mapping[str, Any]] = {"apply_residual_connection_post_layernorm": False}
    words: ClassVar[Mapping[str, str]] = {**Classic.words, "eps": "layer_norm_epsilon"}
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embed",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    defaults: ClassVar[Mapping[str, Any]] = {"eps": 1e-5, "max_seq_len": 2048}
    default_tied = True
    embedding, final_norm, layers = "word_embeddings", "ln_f", "h"
    products: ClassVar[Mapping[str, str]] = {
        "self_attention.dense": "mixer.mixer.o",
        "mlp.dense_h_to_4h": "channel.mixer.up",
        "mlp.dense_4h_to_h": "channel.mixer.down",
    }

    def fused(self, config: Decoder.Config, block: Any) -> list[tuple[str, str, int]]:
        return [("self_attention.query_key_value", "qkv", block.mixer.n_kv_heads or block.mixer.n_heads)]

    def norms_of(self, block: Any) -> Mapping[str, str]:
        if block.shared_norm:
            return {"input_layernorm": "norm"}
        names = (
            ("ln_attn", "ln_mlp") if block.topology == "parallel" else ("input_layernorm", "post_attention_layernorm")
        )
        return dict(zip(names, ("layers.mixer.norm_in", "layers.channel.norm_in"), strict=True))

    def read_block(self, hf: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        new, n_heads = bool(hf.get("new_decoder_architecture")), sizes["n_heads"]
        parallel, n_norms = hf.get("parallel_attn", True), hf.get("num_ln_in_parallel_attn")
        if new and not parallel:
            raise self.refuse("parallel_attn", parallel, "its class cannot build with new_decoder_architecture")
        if n_norms not in ((None, 1, 2) if new else (None, 1)):
            raise self.refuse("num_ln_in_parallel_attn", n_norms)
        grouped = hf.get("num_kv_heads") or n_heads
        if not new and not hf.get("multi_query", True) and grouped != n_heads:
            raise self.refuse("num_kv_heads", grouped, "needs new_decoder_architecture or multi_query")
        bias = bool(hf.get("bias", False))
        return {
            "mixer": {
                "kind": "attention",
                "n_heads": n_heads,
                "n_kv_heads": grouped if new else 1 if hf.get("multi_query", True) else n_heads,
                "qkv_bias": bias,
                "o_bias": bias,
                "dropout": hf.get("attention_dropout") or 0.0,
            },
            "channel": mlp(
                hf.get("ffn_hidden_size") or 4 * sizes["d_model"], hf.get("activation") or "gelu", bias=bias
            ),
            "topology": "parallel" if parallel else "sequential",
            "shared_norm": bool(parallel and (n_norms == 1 or not new)),
            "dropout": hf.get("hidden_dropout") or 0.0,
        }

    def write_block(self, config: Decoder.Config, block: Any) -> dict[str, Any]:
        H, G, parallel = (
            block.mixer.n_heads,
            block.mixer.n_kv_heads or block.mixer.n_heads,
            block.topology == "parallel",
        )
        new = parallel and (not block.shared_norm or G not in (1, H))
        return {
            "num_kv_heads": G,
            "multi_query": G == 1,
            "new_decoder_architecture": new,
            "parallel_attn": parallel,
            "num_ln_in_parallel_attn": (1 if block.shared_norm else 2) if new else None,
            "bias": block.channel.bias,
            "ffn_hidden_size": width(config, block.channel),
            "activation": act(block.channel),
            "attention_dropout": block.mixer.dropout,
            "hidden_dropout": block.dropout,
        }

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        if hf.get("alibi"):
            alibi = {"kind": "alibi", "scale": head_dim**-0.5, "rounding": "bfloat16"}
            return {**super().read_ends(hf), "positions": alibi}
        theta = hf.get("rope_theta") or 10000.0
        rope = read_partial(self, hf, head_dim, 1.0, theta, hf.get("max_position_embeddings") or 2048)
        if rope["fraction"] != 1:
            raise self.refuse("partial_rotary_factor", rope["fraction"])
        return {**super().read_ends(hf), "positions": rope}

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        alibi = config.positions.kind == "alibi"
        return {**super().write_ends(config), "alibi": alibi, **({} if alibi else write_partial(config))}
