"""Phi-1, Phi-1.5 and Phi-2 (Li et al. 2023): one norm for both branches, part of a head turns, a bias on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.classic import Classic, act, mlp, width
from octavo.hub.family import Entry
from octavo.hub.rope_words import read_partial, write_partial
from octavo.models.decoder import Decoder


class Phi(Classic):
    """Every product has a bias. With qk_layernorm one LayerNorm for all heads' queries and one for their keys."""

    model_type, architecture = "phi", "PhiForCausalLM"
    ignored = (r".*\.rotary_emb\.inv_freq",)
    optional_prefix = "model."
    defaults: ClassVar[Mapping[str, Any]] = {"eps": 1e-5, "max_seq_len": 2048}
    norms: ClassVar[Mapping[str, str]] = {"input_layernorm": "norm"}
    products: ClassVar[Mapping[str, str]] = {
        "self_attn.dense": "mixer.mixer.o",
        "mlp.fc1": "channel.mixer.up",
        "mlp.fc2": "channel.mixer.down",
    }

    def fused(self, config: Decoder.Config, block: Any) -> list[tuple[str, str, int]]:
        return [(f"self_attn.{p}_proj", p, 1) for p in "qkv"]

    def read_block(self, hf: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "mixer": {
                "kind": "attention",
                "n_heads": sizes["n_heads"],
                "n_kv_heads": hf.get("num_key_value_heads") or sizes["n_heads"],
                "qkv_bias": True,
                "o_bias": True,
                "qk_norm": {"kind": "layernorm", "eps": sizes["eps"]} if hf.get("qk_layernorm") else None,
                "dropout": hf.get("attention_dropout") or 0.0,
            },
            "channel": mlp(hf["intermediate_size"], hf.get("hidden_act", "gelu_new"), bias=True),
            "topology": "parallel",
            "shared_norm": True,
            "dropout": hf.get("resid_pdrop") or 0.0,
        }

    def write_block(self, config: Decoder.Config, block: Any) -> dict[str, Any]:
        return {
            "num_key_value_heads": block.mixer.n_kv_heads or block.mixer.n_heads,
            "intermediate_size": width(config, block.channel),
            "hidden_act": act(block.channel),
            "qk_layernorm": block.mixer.qk_norm is not None,
            "attention_dropout": block.mixer.dropout,
            "resid_pdrop": block.dropout,
            "embd_pdrop": config.embed_dropout,
        }

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        head_dim = hf["hidden_size"] // hf["num_attention_heads"]
        fraction, theta = hf.get("partial_rotary_factor", 0.5), hf.get("rope_theta") or 10000.0
        more = {"head_bias": True, "embed_dropout": hf.get("embd_pdrop") or 0.0}
        rope = read_partial(self, hf, head_dim, fraction, theta, hf.get("max_position_embeddings") or 2048)
        return {**super().read_ends(hf), "positions": rope, **more}

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        return {**super().write_ends(config), **write_partial(config)}

    def entries(self, config: Decoder.Config) -> list[Entry]:
        found = super().entries(config)
        block: Any = config.blocks[config.layer_names()[0]]
        for i in range(config.n_layers) if block.mixer.qk_norm else ():
            for p in "qk":
                theirs, ours = f"model.layers.{i}.self_attn.{p}_layernorm", f"blocks.{i}.layers.mixer.mixer.{p}_norm"
                found += [Entry(f"{theirs}.{part}", (f"{ours}.{part}",)) for part in ("weight", "bias")]
        return found
