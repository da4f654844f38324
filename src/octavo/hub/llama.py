"""Llama (Touvron et al. 2023) and the shape that Qwen shares with it: RMSNorm, RoPE, SwiGLU, grouped heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.models.decoder import Decoder


class Llama(Family):
    """The base of the family tree; Qwen2 and Qwen3 say where they differ."""

    model_type, architecture = "llama", "LlamaForCausalLM"
    ignored = (r".*\.rotary_emb\.inv_freq",)
    optional_prefix = "model."
    default_theta = 10000.0
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads

    # -------------------------------------------------------------------------- what a sibling overrides

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The attention settings in which siblings differ."""
        bias = hf.get("attention_bias", False)
        return {"qkv_bias": bias, "o_bias": bias}

    def write_attention(self, mixer: Any) -> dict[str, Any]:
        return {"attention_bias": mixer.qkv_bias}

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        """The attention window of each layer."""
        if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
            raise self.refuse("layer_types", hf["layer_types"])
        return [None] * hf["num_hidden_layers"]

    def write_windows(self, windows: list[int | None]) -> dict[str, Any]:
        return {}

    # ------------------------------------------------------------------------------------------ contract

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise self.refuse("rope_scaling", rope)
        if hf.get("pretraining_tp", 1) != 1:
            raise self.refuse("pretraining_tp", hf["pretraining_tp"])
        mixer = {
            "kind": "attention",
            "n_heads": hf["num_attention_heads"],
            "n_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
            "head_dim": hf.get("head_dim", self.default_head_dim) or hf["hidden_size"] // hf["num_attention_heads"],
            "dropout": hf.get("attention_dropout", 0.0),
            **self.read_attention(hf),
        }
        channel = {
            "kind": "glu",
            "d_ff": hf["intermediate_size"],
            "activation": activation(hf.get("hidden_act", "silu")),
            "bias": hf.get("mlp_bias", False),
        }
        windows = self.windows(hf)
        names = ["full" if window is None else "window" for window in windows]
        blocks = {
            name: {"mixer": {**mixer, "window": window}, "channel": channel}
            for name, window in dict(zip(names, windows, strict=True)).items()
        }
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": hf["hidden_size"],
                "n_layers": hf["num_hidden_layers"],
                "max_seq_len": hf["max_position_embeddings"],
                "blocks": blocks,
                "pattern": names,
                "norm": {"kind": "rmsnorm", "eps": hf.get("rms_norm_eps", 1e-6)},
                "positions": {
                    "kind": "rope",
                    "theta": rope.get("rope_theta") or hf.get("rope_theta") or self.default_theta,
                    "fraction": rope.get("partial_rotary_factor", 1.0),
                },
                "tie_embeddings": hf.get("tie_word_embeddings", False),
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        blocks = [config.blocks[name] for name in config.layer_names()]
        mixer: Any = blocks[0].mixer
        channel: Any = blocks[0].channel
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": mixer.n_heads,
            "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads,
            "head_dim": mixer.head_dim or config.d_model // mixer.n_heads,
            "intermediate_size": channel.d_ff or -(-8 * config.d_model // 96) * 32,
            "hidden_act": hf_activation(channel.activation),
            "max_position_embeddings": config.max_seq_len,
            "rms_norm_eps": config.norm.eps,
            # Both spellings: readers before and after transformers 5 look for different ones.
            "rope_theta": config.positions.theta,
            "rope_parameters": {"rope_theta": config.positions.theta, "rope_type": "default"},
            "tie_word_embeddings": config.tie_embeddings,
            "attention_dropout": mixer.dropout,
            **({"mlp_bias": channel.bias} if self.model_type == "llama" else {}),
            **self.write_attention(mixer),
            **self.write_windows([block.mixer.window for block in blocks]),
        }

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [Entry(f"{root}embed_tokens.weight", ("embed.weight",)), Entry(f"{root}norm.weight", ("norm.weight",))]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        for i, name in enumerate(config.layer_names()):
            block, theirs, ours = config.blocks[name], f"{root}layers.{i}", f"blocks.{i}.layers"
            attention, mlp = f"{ours}.mixer.mixer", f"{ours}.channel.mixer"
            channel: Any = block.channel
            biased = dict.fromkeys("qkv", block.mixer.qkv_bias) | {"o": block.mixer.o_bias}
            for p, has_bias in biased.items():
                found += [
                    Entry(f"{theirs}.self_attn.{p}_proj.{part}", (f"{attention}.{p}.{part}",))
                    for part in ("weight", "bias")
                    if part == "weight" or has_bias
                ]
            for p in ("gate", "up", "down"):
                found += [
                    Entry(f"{theirs}.mlp.{p}_proj.{part}", (f"{mlp}.{p}.{part}",))
                    for part in ("weight", "bias")
                    if part == "weight" or channel.bias
                ]
            found.append(Entry(f"{theirs}.input_layernorm.weight", (f"{ours}.mixer.norm_in.weight",)))
            found.append(Entry(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.channel.norm_in.weight",)))
            if block.mixer.qk_norm:
                found += [Entry(f"{theirs}.self_attn.{p}_norm.weight", (f"{attention}.{p}_norm.weight",)) for p in "qk"]
        return found
