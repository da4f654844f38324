"""ModernBERT (Warner et al. 2024): pre-norm GEGLU layers, most of which read a window and turn by their own base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from octavo.hub.bert import Encoder, Purpose
from octavo.hub.family import Entry, activation, hf_activation
from octavo.hub.labels import read_labels, write_labels
from octavo.models.decoder import Decoder

THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}


class ModernBert(Encoder):
    """Every third layer reads the whole text; the others ``local_attention / 2`` tokens to either side."""

    model_type, stem = "modernbert", "ModernBert"
    optional_prefix = "model."
    head = "decoder.weight"
    unused: ClassVar[Mapping[Purpose, tuple[str, ...]]] = {
        "Model": (r"model\.(head|decoder)\..*", r"(head|decoder)\..*")
    }
    only: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}

    def of(self, hf: Mapping[str, Any]) -> ModernBert:
        return super().of(hf)  # type: ignore[return-value]

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        for key, plain in self.only.items():
            if hf.get(key) not in (None, plain):
                raise self.refuse(key, hf[key])
        me, n = self.of(hf), hf["num_hidden_layers"]
        every = hf.get("global_attn_every_n_layers") or 3
        kinds = hf.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(n)]
        if len(kinds) != n or any(kind not in THETAS for kind in kinds):
            raise self.refuse("layer_types", kinds)
        bias = hf.get("attention_bias") or False
        mixer = {
            "kind": "attention",
            "n_heads": hf["num_attention_heads"],
            "qkv_bias": bias,
            "o_bias": bias,
            "dropout": hf.get("attention_dropout") or 0.0,
        }
        channel = {
            "kind": "glu",
            "d_ff": hf["intermediate_size"],
            "activation": activation(hf.get("hidden_activation") or "gelu"),
            "bias": hf.get("mlp_bias") or False,
            "dropout": hf.get("mlp_dropout") or 0.0,
        }
        rotations = {kind: {"kind": "rope", "theta": self._theta(hf, kind)} for kind in THETAS}
        wide = {"mixer": mixer, "channel": channel}
        window = {**mixer, "window": hf.get("local_attention", 128) // 2 + 1}
        near = {"mixer": window, "channel": channel, "positions": rotations["sliding_attention"]}
        blocks = {"first": {**(wide if kinds[0] == "full_attention" else near), "mixer_norm": False}}
        blocks |= {"global": wide} if "full_attention" in kinds[1:] else {}
        blocks |= {"local": near} if "sliding_attention" in kinds[1:] else {}
        names = {"full_attention": "global", "sliding_attention": "local"}
        norm_bias = hf.get("norm_bias") or False
        dense = {
            "activation": activation(hf.get("classifier_activation") or "gelu"),
            "bias": hf.get("classifier_bias") or False,
        }
        masked, classified = me.purpose == "ForMaskedLM", "Classification" in me.purpose
        classes = {
            **read_labels(self, hf, "token" if "Token" in me.purpose else "sequence"),
            "pooling": {"cls": "first", "mean": "mean"}[hf.get("classifier_pooling") or "cls"],
            "transform": dense,
            "dropout": hf.get("classifier_dropout") or 0.0,
        }
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": hf["hidden_size"],
                "n_layers": n,
                "max_seq_len": hf["max_position_embeddings"],
                "causal": False,
                "blocks": blocks,
                "pattern": ["first", *(names[kind] for kind in kinds[1:])],
                "norm": {"kind": "layernorm", "eps": hf.get("norm_eps", 1e-5), "bias": norm_bias},
                "positions": rotations["full_attention"],
                "embed_norm": True,
                "embed_dropout": hf.get("embedding_dropout") or 0.0,
                "tie_embeddings": True,
                "head_bias": masked and hf.get("decoder_bias", True),
                "head_transform": dense if masked else None,
                "classes": classes if classified else None,
            }
        )

    def _theta(self, hf: Mapping[str, Any], kind: str) -> float:
        rope = (hf.get("rope_parameters") or {}).get(kind) or {}
        if rope.get("rope_type", "default") != "default" or hf.get("rope_scaling"):
            raise self.refuse("rope_parameters", rope or hf["rope_scaling"])
        older, usual = THETAS[kind]
        return rope.get("rope_theta") or hf.get(older) or usual

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        blocks = [config.blocks[name] for name in config.layer_names()]
        mixer, dense = blocks[0].mixer, self._dense(config)
        channel: Any = blocks[0].channel
        kinds = ["full_attention" if block.mixer.window is None else "sliding_attention" for block in blocks]
        near: Any = next((b for b, kind in zip(blocks, kinds, strict=True) if kind == "sliding_attention"), None)
        theta = {"full_attention": config.positions.theta}
        theta["sliding_attention"] = near.positions.theta if near else THETAS["sliding_attention"][1]
        pooling = config.classes.pooling if config.classes and config.classes.over == "sequence" else "first"
        return {
            "architectures": [self.stem + self.purpose_of(config)],
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": mixer.n_heads,
            "intermediate_size": channel.d_ff or -(-8 * config.d_model // 96) * 32,
            "hidden_activation": hf_activation(channel.activation),
            "max_position_embeddings": config.max_seq_len,
            "norm_eps": config.norm.eps,
            "norm_bias": config.norm.bias,
            "attention_bias": mixer.qkv_bias,
            "attention_dropout": mixer.dropout,
            "mlp_bias": channel.bias,
            "mlp_dropout": channel.dropout,
            "embedding_dropout": config.embed_dropout,
            "decoder_bias": config.head_bias,
            "classifier_pooling": {"first": "cls"}.get(pooling, pooling),
            "classifier_bias": dense.bias if dense else False,
            "classifier_activation": hf_activation(dense.activation) if dense else "gelu",
            "classifier_dropout": config.classes.dropout if config.classes else 0.0,
            "local_attention": 2 * (near.mixer.window - 1) if near else 128,
            "layer_types": kinds,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta[kind]} for kind in THETAS},
            **{THETAS[kind][0]: theta[kind] for kind in THETAS},
            "tie_word_embeddings": True,
            **write_labels(config),
        }

    def _dense(self, config: Decoder.Config) -> Any:
        return config.classes.transform if config.classes else config.head_transform

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root, dense = self.optional_prefix, self._dense(config)

        def norm(theirs: str, ours: str) -> list[Entry]:
            parts = ("weight", "bias") if config.norm.bias else ("weight",)
            return [Entry(f"{theirs}.{part}", (f"{ours}.{part}",)) for part in parts]

        def product(theirs: str, ours: tuple[str, ...], bias: bool) -> list[Entry]:
            parts = ("weight", "bias") if bias else ("weight",)
            return [Entry(f"{theirs}.{part}", tuple(f"{name}.{part}" for name in ours)) for part in parts]

        found = [
            Entry(f"{root}embeddings.tok_embeddings.weight", ("embed.weight",)),
            *norm(f"{root}embeddings.norm", "embed_norm"),
            *norm(f"{root}final_norm", "norm"),
        ]
        for i, name in enumerate(config.layer_names()):
            block, theirs, ours = config.blocks[name], f"{root}layers.{i}", f"blocks.{i}.layers"
            channel: Any = block.channel
            stacked = tuple(f"{ours}.mixer.mixer.{part}" for part in "qkv")
            both = (f"{ours}.channel.mixer.gate", f"{ours}.channel.mixer.up")
            found += norm(f"{theirs}.attn_norm", f"{ours}.mixer.norm_in") if block.mixer_norm else []
            found += product(f"{theirs}.attn.Wqkv", stacked, block.mixer.qkv_bias)
            found += product(f"{theirs}.attn.Wo", (f"{ours}.mixer.mixer.o",), block.mixer.o_bias)
            found += norm(f"{theirs}.mlp_norm", f"{ours}.channel.norm_in")
            found += product(f"{theirs}.mlp.Wi", both, channel.bias)
            found += product(f"{theirs}.mlp.Wo", (f"{ours}.channel.mixer.down",), channel.bias)
        if dense is not None:
            ours = "classes.transform" if config.classes else "head_transform"
            found += [*product("head.dense", (f"{ours}.dense",), dense.bias), *norm("head.norm", f"{ours}.norm")]
        if config.head_bias:
            found.append(Entry("decoder.bias", ("head_bias",)))
        if config.classes is not None:
            found += product("classifier", ("classes.out",), True)
        return found
