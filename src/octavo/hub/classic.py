"""The shape of the GPT-2 era that GPT-NeoX, Phi, Bloom, Falcon and MPT share: LayerNorm, and an MLP of two matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.models.decoder import Decoder


class Classic(Family):
    """One kind of block all the way up, attention and an MLP, each after a LayerNorm.

    A sibling says what its keys and tensors are called, and where it differs. ``only`` holds keys with a single value
    that is read here, ``words`` their names of sizes by ours.
    """

    only: ClassVar[Mapping[str, Any]] = {}
    words: ClassVar[Mapping[str, str]] = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
        "eps": "layer_norm_eps",
    }
    spelled: ClassVar[Mapping[str, str]] = {}  # their older names of sizes, by the newer
    defaults: ClassVar[Mapping[str, Any]] = {}  # of sizes that may be left out
    default_tied = False
    norm_bias = True
    embedding = "embed_tokens"
    embedding_norm: str | None = None
    final_norm = "final_layernorm"
    layers = "layers"
    norms: ClassVar[Mapping[str, str]] = {}
    products: ClassVar[Mapping[str, str]] = {}  # theirs and ours, without q, k and v

    @abstractmethod
    def read_block(self, hf: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """The one block."""

    @abstractmethod
    def write_block(self, config: Decoder.Config, block: Any) -> dict[str, Any]: ...

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """What is around the blocks, positions among it."""
        return {"tie_embeddings": hf.get("tie_word_embeddings", self.default_tied)}

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        return {"tie_word_embeddings": config.tie_embeddings}

    def fused(self, config: Decoder.Config, block: Any) -> list[tuple[str, str, int]]:
        """Their matrices of queries, keys and values: name, which of ours are in it, in how many groups."""
        return []

    def norms_of(self, block: Any) -> Mapping[str, str]:
        """Their norms of a layer and ours."""
        return self.norms

    # ------------------------------------------------------------------------------------------- contract

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        hf = {**hf, **{new: hf[old] for new, old in self.spelled.items() if hf.get(new) is None and old in hf}}
        for key, plain in self.only.items():
            if hf.get(key) not in (None, plain):
                raise self.refuse(key, hf[key])
        sizes = {
            ours: self.defaults[ours] if ours in self.defaults and hf.get(theirs) is None else hf[theirs]
            for ours, theirs in self.words.items()
        }
        if sizes["d_model"] % sizes["n_heads"]:
            raise self.refuse(self.words["d_model"], sizes["d_model"], f"{sizes['n_heads']} heads do not divide")
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                **{key: sizes[key] for key in ("d_model", "n_layers", "max_seq_len")},
                "blocks": {"block": self.read_block(hf, sizes)},
                "norm": {"kind": "layernorm", "eps": sizes["eps"], "bias": self.norm_bias},
                **self.read_ends(hf),
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        block: Any = config.blocks[config.layer_names()[0]]
        sizes = {
            "d_model": config.d_model,
            "n_layers": config.n_layers,
            "n_heads": block.mixer.n_heads,
            "max_seq_len": config.max_seq_len,
            "eps": config.norm.eps,
        }
        return {
            "vocab_size": config.vocab_size,
            **{self.words[ours]: value for ours, value in sizes.items()},
            **self.write_block(config, block),
            **self.write_ends(config),
        }

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root, block = self.optional_prefix, config.blocks[config.layer_names()[0]]
        mixer: Any = block.mixer
        channel: Any = block.channel
        parts = ("weight", "bias") if self.norm_bias else ("weight",)
        ends = {self.final_norm: "norm"} | ({self.embedding_norm: "embed_norm"} if self.embedding_norm else {})
        found = [Entry(f"{root}{self.embedding}.weight", ("embed.weight",))]
        found += [
            Entry(f"{root}{theirs}.{part}", (f"{ours}.{part}",)) for theirs, ours in ends.items() for part in parts
        ]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        if config.head_bias:
            where = "head_bias" if config.tie_embeddings else "head.bias"
            found.append(Entry(self.head.replace("weight", "bias"), (where,)))
        biased = {"mixer.mixer.o": mixer.o_bias, "channel.mixer.up": channel.bias, "channel.mixer.down": channel.bias}
        for i in range(config.n_layers):
            theirs, ours = f"{root}{self.layers}.{i}", f"blocks.{i}"
            for name, norm in self.norms_of(block).items():
                found += [Entry(f"{theirs}.{name}.{part}", (f"{ours}.{norm}.{part}",)) for part in parts]
            for name, which, groups in self.fused(config, block):
                for part in ("weight", "bias") if mixer.qkv_bias else ("weight",):
                    stacked = tuple(f"{ours}.layers.mixer.mixer.{p}.{part}" for p in which)
                    found.append(Entry(f"{theirs}.{name}.{part}", stacked, groups=groups))
            for name, product in self.products.items():
                for part in ("weight", "bias") if biased[product] else ("weight",):
                    found.append(Entry(f"{theirs}.{name}.{part}", (f"{ours}.layers.{product}.{part}",)))
        return found


def mlp(d_ff: int, name: str, *, bias: bool) -> dict[str, Any]:
    """Our MLP with one of their activations."""
    return {"kind": "mlp", "d_ff": d_ff, "activation": activation(name), "bias": bias}


def width(config: Decoder.Config, channel: Any) -> int:
    """The inner width of an MLP."""
    return channel.d_ff or 4 * config.d_model


def act(channel: Any) -> str:
    """The Hugging Face name of an MLP's activation."""
    return hf_activation(channel.activation)
