"""RWKV-4 (Peng et al. 2023) in transformers' form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.hub.family import Entry, Family
from octavo.models.decoder import Decoder

EPS = 1e-5
TIME = {"time_decay": "decay", "time_first": "bonus"}
TIME_MIXES = {"time_mix_key": "mix_k", "time_mix_value": "mix_v", "time_mix_receptance": "mix_r"}
TIME_PRODUCTS = {"key": "k", "value": "v", "receptance": "gate", "output": "o"}
CHANNEL_PRODUCTS = {"key": "up", "value": "down", "receptance": "gate"}


class Rwkv(Family):
    """Time mixing and channel mixing, LayerNorm everywhere, one more of them after the embedding.

    rescale_every, which halves the stream every so many layers for 16-bit inference, is not done: every reader of the
    stream normalises it, so that all it changes is how much the norms' eps counts. It is written as 0. context_length
    bounds one pass there and is max_seq_len here. Decoding there is right for one row alone (its state is read and
    written transposed where there are several), and only where attention_hidden_size is hidden_size.
    """

    model_type, architecture = "rwkv", "RwkvForCausalLM"
    optional_prefix = "rwkv."
    head = "head.weight"

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        D, eps = hf["hidden_size"], hf.get("layer_norm_epsilon", EPS)
        if eps != EPS:
            raise self.refuse("layer_norm_epsilon", eps, f"its class does not use in the last norm, which has {EPS}")
        block = {
            "mixer": {"kind": "rwkv4", "width": hf.get("attention_hidden_size") or D},
            "channel": {"kind": "rwkv_channel", "d_ff": hf.get("intermediate_size") or 4 * D},
        }
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": D,
                "n_layers": hf["num_hidden_layers"],
                "max_seq_len": hf.get("context_length", 1024),
                "blocks": {"block": block},
                "norm": {"kind": "layernorm", "eps": eps},
                "positions": {"kind": "none"},
                "tie_embeddings": hf.get("tie_word_embeddings", False),
                "embed_norm": True,
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        block: Any = config.blocks[config.layer_names()[0]]
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "context_length": config.max_seq_len,
            "attention_hidden_size": block.mixer.width or config.d_model,
            "intermediate_size": block.channel.d_ff or 4 * config.d_model,
            "layer_norm_epsilon": config.norm.eps,
            "tie_word_embeddings": config.tie_embeddings,
            "rescale_every": 0,
        }

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [Entry(f"{root}embeddings.weight", ("embed.weight",))]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        norms = {"blocks.0.pre_ln": "embed_norm", "ln_out": "norm"}
        for i in range(config.n_layers):
            norms |= {f"blocks.{i}.ln1": f"blocks.{i}.layers.mixer.norm_in"}
            norms |= {f"blocks.{i}.ln2": f"blocks.{i}.layers.channel.norm_in"}
            theirs, ours = f"{root}blocks.{i}.attention", f"blocks.{i}.layers.mixer.mixer"
            found += [Entry(f"{theirs}.{name}", (f"{ours}.{own}",)) for name, own in TIME.items()]
            found += [Entry(f"{theirs}.{name}", (f"{ours}.{own}",), ones=(0, 1)) for name, own in TIME_MIXES.items()]
            found += [Entry(f"{theirs}.{n}.weight", (f"{ours}.{own}.weight",)) for n, own in TIME_PRODUCTS.items()]
            theirs, ours = f"{root}blocks.{i}.feed_forward", f"blocks.{i}.layers.channel.mixer"
            for name in ("time_mix_key", "time_mix_receptance"):
                found.append(Entry(f"{theirs}.{name}", (f"{ours}.{TIME_MIXES[name]}",), ones=(0, 1)))
            found += [Entry(f"{theirs}.{n}.weight", (f"{ours}.{own}.weight",)) for n, own in CHANNEL_PRODUCTS.items()]
        for theirs, ours in norms.items():
            found += [Entry(f"{root}{theirs}.{part}", (f"{ours}.{part}",)) for part in ("weight", "bias")]
        return found
