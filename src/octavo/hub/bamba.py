"""Bamba (IBM, Princeton, CMU and UIUC 2024): a hybrid of Mamba-2 layers and a few of grouped attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import CheckpointError
from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.hub.mamba2 import mamba2_entries, read_limit, write_limit
from octavo.hub.rope_words import read_partial, write_partial
from octavo.models.decoder import Decoder


class Bamba(Family):
    """attn_layer_indices are the layers with attention; half of each head turns, whatever partial_rotary_factor says.

    time_step_limit: see ``Mamba2``.
    """

    model_type, architecture = "bamba", "BambaForCausalLM"
    ignored = (r".*\.rotary_emb\.inv_freq",)
    optional_prefix = "model."

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        D, n, H = hf["hidden_size"], hf["num_hidden_layers"], hf["num_attention_heads"]
        attends = set(hf.get("attn_layer_indices") or ())
        if outside := sorted(i for i in attends if not isinstance(i, int) or not 0 <= i < n):
            raise self.refuse("attn_layer_indices", outside, f"are none of {n} layers")
        inner, width = hf.get("mamba_expand", 2) * D, hf.get("mamba_d_head", "auto")
        heads = hf.get("mamba_n_heads", 128)
        if (inner // heads if width == "auto" else width) * heads != inner:
            raise self.refuse("mamba_d_head", width, f"is not {inner} channels with {heads} heads")
        eps, bias = hf.get("rms_norm_eps", 1e-5), hf.get("attention_bias", False)
        channel = {
            "kind": "glu",
            "d_ff": hf["intermediate_size"],
            "activation": activation(hf.get("hidden_act", "silu")),
            "bias": hf.get("mlp_bias", False),
        }
        recurrent = {
            "kind": "mamba2",
            "n_heads": heads,
            "head_dim": inner // heads,
            "d_state": hf.get("mamba_d_state", 256),
            "n_groups": hf.get("mamba_n_groups", 1),
            "conv_width": hf.get("mamba_d_conv", 4),
            "conv_bias": hf.get("mamba_conv_bias", True),
            "bias": hf.get("mamba_proj_bias", False),
            "dt_limit": read_limit(hf.get("time_step_limit")),
            "norm_eps": eps,
        }
        attention = {
            "kind": "attention",
            "n_heads": H,
            "n_kv_heads": hf.get("num_key_value_heads", 8) or H,
            "qkv_bias": bias,
            "o_bias": bias,
            "dropout": hf.get("attention_dropout") or 0.0,
        }
        tokens = hf.get("max_position_embeddings", 262144)
        rope = {"positions": read_partial(self, hf, D // H, 0.5, hf.get("rope_theta") or 10000.0, tokens)}
        blocks = {"mamba2": {"mixer": recurrent, "channel": channel}}
        blocks |= {"attention": {"mixer": attention, "channel": channel}} if attends else {}
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": D,
                "n_layers": n,
                "max_seq_len": tokens,
                "blocks": blocks,
                "pattern": ["attention" if i in attends else "mamba2" for i in range(n)],
                "norm": {"kind": "rmsnorm", "eps": eps},
                "tie_embeddings": hf.get("tie_word_embeddings", False),
                **rope,
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        names = config.layer_names()
        kinds = [config.blocks[name].mixer.kind for name in names]
        if set(kinds) != {"attention", "mamba2"}:
            raise CheckpointError("this model has not both kinds of layers", fix="write it as another family")
        attention, recurrent = (config.blocks[names[kinds.index(kind)]] for kind in ("attention", "mamba2"))
        own: Any = recurrent.mixer
        heads: Any = attention.mixer
        channel: Any = recurrent.channel
        width = own.head_dim or 2 * config.d_model // own.n_heads
        expand = own.n_heads * width / config.d_model
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "attn_layer_indices": [i for i, kind in enumerate(kinds) if kind == "attention"],
            "intermediate_size": channel.d_ff or -(-8 * config.d_model // 96) * 32,
            "hidden_act": hf_activation(channel.activation),
            "mlp_bias": channel.bias,
            "rms_norm_eps": config.norm.eps,
            "max_position_embeddings": config.max_seq_len,
            "tie_word_embeddings": config.tie_embeddings,
            "num_attention_heads": heads.n_heads,
            "num_key_value_heads": heads.n_kv_heads or heads.n_heads,
            "attention_bias": heads.qkv_bias,
            "attention_dropout": heads.dropout,
            "mamba_n_heads": own.n_heads,
            "mamba_d_head": width,
            "mamba_expand": int(expand) if expand == int(expand) else expand,
            "mamba_d_state": own.d_state,
            "mamba_n_groups": own.n_groups,
            "mamba_d_conv": own.conv_width,
            "mamba_conv_bias": own.conv_bias,
            "mamba_proj_bias": own.bias,
            **({} if own.dt_limit is None else {"time_step_limit": write_limit(own.dt_limit)}),
            **write_partial(config),
        }

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [
            Entry(f"{root}embed_tokens.weight", ("embed.weight",)),
            Entry(f"{root}final_layernorm.weight", ("norm.weight",)),
        ]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        for i, name in enumerate(config.layer_names()):
            block, theirs, ours = config.blocks[name], f"{root}layers.{i}", f"blocks.{i}.layers"
            channel: Any = block.channel
            mixer: Any = block.mixer
            products = {f"feed_forward.{p}_proj": (f"channel.mixer.{p}", channel.bias) for p in ("gate", "up", "down")}
            if mixer.kind == "attention":
                products |= {f"self_attn.{p}_proj": (f"mixer.mixer.{p}", mixer.qkv_bias) for p in "qkvo"}
            else:
                found += mamba2_entries(mixer, f"{theirs}.mamba", f"{ours}.mixer.mixer")
            found.append(Entry(f"{theirs}.input_layernorm.weight", (f"{ours}.mixer.norm_in.weight",)))
            found.append(Entry(f"{theirs}.pre_ff_layernorm.weight", (f"{ours}.channel.norm_in.weight",)))
            for product, (part, biased) in products.items():
                for kind in ("weight", "bias") if biased else ("weight",):
                    found.append(Entry(f"{theirs}.{product}.{kind}", (f"{ours}.{part}.{kind}",)))
        return found
