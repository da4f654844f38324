"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each branch, one stacked q, k, v matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.models.decoder import Decoder


class GPT2(Family):
    """Weights are stored (in, out), so every product is transposed; the head is always tied unless it says not."""

    model_type, architecture = "gpt2", "GPT2LMHeadModel"
    ignored = (r".*\.attn\.(bias|masked_bias)",)
    optional_prefix = "transformer."

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        for key, plain in {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }.items():
            if hf.get(key, plain) != plain:
                raise self.refuse(key, hf[key])
        D = hf["n_embd"]
        mixer = {
            "kind": "attention",
            "n_heads": hf["n_head"],
            "qkv_bias": True,
            "o_bias": True,
            "dropout": hf.get("attn_pdrop", 0.1),
        }
        channel = {
            "kind": "mlp",
            "d_ff": hf.get("n_inner") or 4 * D,
            "activation": activation(hf.get("activation_function", "gelu_new")),
            "bias": True,
        }
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": D,
                "n_layers": hf["n_layer"],
                "max_seq_len": hf["n_positions"],
                "blocks": {"block": {"mixer": mixer, "channel": channel, "dropout": hf.get("resid_pdrop", 0.1)}},
                "norm": {"kind": "layernorm", "eps": hf.get("layer_norm_epsilon", 1e-5)},
                "positions": {"kind": "learned"},
                "tie_embeddings": hf.get("tie_word_embeddings", True),
                "embed_dropout": hf.get("embd_pdrop", 0.1),
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        block = config.blocks[config.layer_names()[0]]
        channel: Any = block.channel
        return {
            "vocab_size": config.vocab_size,
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": block.mixer.n_heads,
            "n_inner": channel.d_ff or 4 * config.d_model,
            "n_positions": config.max_seq_len,
            "activation_function": hf_activation(channel.activation),
            "layer_norm_epsilon": config.norm.eps,
            "tie_word_embeddings": config.tie_embeddings,
            "attn_pdrop": block.mixer.dropout,
            "resid_pdrop": block.dropout,
            "embd_pdrop": config.embed_dropout,
        }

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [
            Entry(f"{root}wte.weight", ("embed.weight",)),
            Entry(f"{root}wpe.weight", ("positions.table.weight",)),
            *(Entry(f"{root}ln_f.{part}", (f"norm.{part}",)) for part in ("weight", "bias")),
        ]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        for i in range(config.n_layers):
            theirs, ours = f"{root}h.{i}", f"blocks.{i}.layers"
            for part in ("weight", "bias"):
                turned = part == "weight"
                stacked = tuple(f"{ours}.mixer.mixer.{name}.{part}" for name in "qkv")
                found += [
                    Entry(f"{theirs}.ln_1.{part}", (f"{ours}.mixer.norm_in.{part}",)),
                    Entry(f"{theirs}.attn.c_attn.{part}", stacked, turned),
                    Entry(f"{theirs}.attn.c_proj.{part}", (f"{ours}.mixer.mixer.o.{part}",), turned),
                    Entry(f"{theirs}.ln_2.{part}", (f"{ours}.channel.norm_in.{part}",)),
                    Entry(f"{theirs}.mlp.c_fc.{part}", (f"{ours}.channel.mixer.up.{part}",), turned),
                    Entry(f"{theirs}.mlp.c_proj.{part}", (f"{ours}.channel.mixer.down.{part}",), turned),
                ]
        return found
