"""Llama (Touvron et al. 2023) and the shape that most families share with it: RMSNorm, RoPE, SwiGLU, grouped heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.hub.labels import read_labels, write_labels
from octavo.hub.rope_words import WORDS, read_scaling, write_scaling
from octavo.models.block import BlockConfig, NormPlacement
from octavo.models.decoder import Decoder

KINDS = {"full_attention": False, "sliding_attention": True}  # layer_types, and whether a window is meant

# Those that transformers has with a head of classes, `score`, in the place of the language model's.
CLASSIFIED = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"})


class Llama(Family):
    """The base of the family tree; a sibling says where it differs."""

    model_type, architecture = "llama", "LlamaForCausalLM"
    ignored = (r".*\.rotary_emb\.inv_freq",)
    optional_prefix = "model."
    embedding = "embed_tokens"

    # What a sibling overrides. `only` holds keys with a single value that is read here: those that would change the
    # mathematics, and those that its class in transformers knows from others but ignores.
    only: ClassVar[Mapping[str, Any]] = {"pretraining_tp": 1, "partial_rotary_factor": 1.0}
    placement: NormPlacement = "pre"
    activation_key, default_activation = "hidden_act", "silu"
    default_theta, default_eps = 10000.0, 1e-6
    default_tied = False
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    scalable = True  # its class knows the scalings of rotation
    whole_heads = True  # its class refuses a hidden_size that num_attention_heads does not divide, whatever head_dim is
    products: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{f"self_attn.{name}_proj": (f"mixer.mixer.{name}",) for name in "qkvo"},
        **{f"mlp.{name}_proj": (f"channel.mixer.{name}",) for name in ("gate", "up", "down")},
    }
    norms: ClassVar[Mapping[str, str]] = {
        "input_layernorm": "mixer.norm_in",
        "post_attention_layernorm": "channel.norm_in",
    }

    def read_norm(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"kind": "rmsnorm", "eps": hf.get("rms_norm_eps", self.default_eps)}

    def read_attention(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The attention settings in which siblings differ."""
        bias = hf.get("attention_bias", False)
        return {"qkv_bias": bias, "o_bias": bias}

    def write_attention(self, mixer: Any) -> dict[str, Any]:
        return {"attention_bias": mixer.qkv_bias}

    def read_ends(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """What is around the blocks: settings of the embedding and the head."""
        return {"tie_embeddings": hf.get("tie_word_embeddings", self.default_tied)}

    def write_ends(self, config: Decoder.Config) -> dict[str, Any]:
        return {"tie_word_embeddings": config.tie_embeddings}

    def read_positions(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The position scheme; max_seq_len too, where the scheme decides it."""
        rope = self.rope(hf)
        theta = rope.get("rope_theta") or hf.get("rope_theta") or self.default_theta
        kind = rope.get("rope_type", rope.get("type")) or "default"
        if kind == "default":
            return {"positions": {"kind": "rope", "theta": theta}}
        if kind not in WORDS or not self.scalable:
            raise self.refuse("rope_scaling", rope if len(str(rope)) < 100 else kind)
        return {"positions": {"kind": "rope", "theta": theta, "scaling": read_scaling(kind, rope, hf)}}

    def write_positions(self, config: Decoder.Config) -> dict[str, Any]:
        positions: Any = config.positions
        theta, scaling = positions.theta, write_scaling(positions.scaling, config.max_seq_len)
        return {
            "max_position_embeddings": config.max_seq_len,
            # Both spellings: readers before and after transformers 5 look for different ones.
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling},
            **({"rope_scaling": {"rope_theta": theta, **scaling}} if scaling else {}),
        }

    def windows(self, hf: Mapping[str, Any]) -> list[int | None]:
        """The attention window of each layer."""
        return self.by_kind(hf, ["full_attention"] * hf["num_hidden_layers"], None)

    def write_windows(self, windows: list[int | None]) -> dict[str, Any]:
        return {}

    # ----------------------------------------------------------------------------------------- for siblings

    def rope(self, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings of rotation, wherever they stand; one for all layers."""
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise self.refuse("rope_parameters", list(rope), "is one rotation for each kind of layer")
        if "partial_rotary_factor" in self.only and rope.get("partial_rotary_factor", 1.0) != 1:
            raise self.refuse("partial_rotary_factor", rope["partial_rotary_factor"])
        return rope

    def by_kind(self, hf: Mapping[str, Any], wanted: list[str], window: int | None) -> list[int | None]:
        """The windows that layer_types asks for; ``wanted`` is what this family's class does without them."""
        kinds = hf.get("layer_types") or wanted
        if any(kind not in KINDS for kind in kinds) or len(kinds) != len(wanted):
            raise self.refuse("layer_types", kinds)
        if window is None and "sliding_attention" in kinds:
            raise self.refuse("layer_types", kinds, "has sliding layers without a sliding_window")
        return [window if KINDS[kind] else None for kind in kinds]

    # ----------------------------------------------------------------------------- the two mixers of a layer

    def read_mixer(self, hf: Mapping[str, Any], window: int | None) -> dict[str, Any]:
        return {
            "kind": "attention",
            "n_heads": hf["num_attention_heads"],
            "n_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
            "head_dim": hf.get("head_dim", self.default_head_dim) or hf["hidden_size"] // hf["num_attention_heads"],
            "dropout": hf.get("attention_dropout") or 0.0,
            "window": window,
            **self.read_attention(hf),
        }

    def write_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        mixer = mixer.model_copy(update={"head_dim": mixer.head_dim or d_model // mixer.n_heads})
        return {
            "num_attention_heads": mixer.n_heads,
            "num_key_value_heads": mixer.n_kv_heads or mixer.n_heads,
            "head_dim": mixer.head_dim,
            "attention_dropout": mixer.dropout,
            **self.write_attention(mixer),
        }

    def mixer_entries(self, block: BlockConfig, theirs: str, ours: str) -> list[Entry]:
        """The tensors of a layer's attention, below the names ``theirs`` and ``ours``."""
        found = self.product_entries(block, "mixer", theirs, ours)
        for p in "qk" if block.mixer.qk_norm else "":
            found.append(Entry(f"{theirs}.self_attn.{p}_norm.weight", (f"{ours}.mixer.mixer.{p}_norm.weight",)))
        return found

    def channels(self, hf: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Each layer's channel mixer, and the name of its block where attention has no window."""
        return [("full", self.read_glu(hf))] * hf["num_hidden_layers"]

    def read_glu(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "kind": "glu",
            "d_ff": hf["intermediate_size"],
            "activation": activation(hf.get(self.activation_key) or self.default_activation),
            "bias": hf.get("mlp_bias") or False,
        }

    def write_channels(self, config: Decoder.Config) -> dict[str, Any]:
        channel: Any = config.blocks[config.layer_names()[0]].channel
        return {
            "intermediate_size": channel.d_ff or -(-8 * config.d_model // 96) * 32,
            self.activation_key: hf_activation(channel.activation),
            **({} if "mlp_bias" in self.only else {"mlp_bias": channel.bias}),
        }

    def channel_entries(self, block: BlockConfig, theirs: str, ours: str) -> list[Entry]:
        """The tensors of a layer's channel mixer."""
        return self.product_entries(block, "channel", theirs, ours)

    def product_entries(self, block: BlockConfig, side: str, theirs: str, ours: str) -> list[Entry]:
        found = []
        for product, parts in self.products.items():
            if parts[0].startswith(side):
                for kind in ("weight", "bias") if _biased(block, parts[0]) else ("weight",):
                    found.append(Entry(f"{theirs}.{product}.{kind}", tuple(f"{ours}.{part}.{kind}" for part in parts)))
        return found

    def layer_entries(self, block: BlockConfig, theirs: str, ours: str) -> list[Entry]:
        """All tensors of one layer."""
        norms = [Entry(f"{theirs}.{norm}.weight", (f"{ours}.{part}.weight",)) for norm, part in self.norms.items()]
        return [*self.mixer_entries(block, theirs, ours), *self.channel_entries(block, theirs, ours), *norms]

    # ------------------------------------------------------------------------------------------- classes

    def read_classes(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The head of classes of a folder that has one: of the last token, or of every token with a bias."""
        named = (hf.get("architectures") or [""])[0]
        if self.architecture not in CLASSIFIED or named not in (known := self._classified()):
            return {}
        over = known[named]
        head: dict[str, Any] = {"pooling": "last", "bias": False}
        if over == "token":
            dropout = next((hf[k] for k in ("classifier_dropout", "hidden_dropout") if hf.get(k) is not None), 0.1)
            head = {"bias": hf.get("token_classification_bias", True), "dropout": dropout}
        return {"tie_embeddings": True, "classes": {**read_labels(self, hf, over), **head}}

    def write_classes(self, config: Decoder.Config) -> dict[str, Any]:
        if config.classes is None or self.architecture not in CLASSIFIED:
            return {}
        named = next(name for name, over in self._classified().items() if over == config.classes.over)
        own = {"classifier_dropout": config.classes.dropout} if config.classes.over == "token" else {}
        bias = {} if config.classes.bias or config.classes.over != "token" else {"token_classification_bias": False}
        return {"architectures": [named], **write_labels(config), **own, **bias}

    def _classified(self) -> dict[str, Literal["sequence", "token"]]:
        stem = self.architecture.removesuffix("ForCausalLM")
        return {f"{stem}ForSequenceClassification": "sequence", f"{stem}ForTokenClassification": "token"}

    # ------------------------------------------------------------------------------------------ contract

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        for key, plain in self.only.items():
            if hf.get(key) not in (None, plain):
                raise self.refuse(key, hf[key])
        windows, channels = self.windows(hf), self.channels(hf)
        names = [
            name if window is None else {"full": "window"}.get(name, f"{name}_window")
            for (name, _), window in zip(channels, windows, strict=True)
        ]
        blocks = {
            name: {
                "mixer": self.read_mixer(hf, window),
                "channel": channel,
                "norm_placement": self.placement,
                "dropout": hf.get("resid_pdrop") or 0.0,
            }
            for name, (window, (_, channel)) in dict(
                zip(names, zip(windows, channels, strict=True), strict=True)
            ).items()
        }
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": hf["hidden_size"],
                "n_layers": hf["num_hidden_layers"],
                "max_seq_len": hf["max_position_embeddings"],
                "blocks": blocks,
                "pattern": names,
                "norm": self.read_norm(hf),
                **self.read_positions(hf),
                **self.read_ends(hf),
                **self.read_classes(hf),
            }
        )

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        blocks = [config.blocks[name] for name in config.layer_names()]
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "rms_norm_eps": config.norm.eps,
            **self.write_mixer(blocks[0].mixer, config.d_model),
            **self.write_channels(config),
            **self.write_positions(config),
            **self.write_windows([getattr(block.mixer, "window", None) for block in blocks]),
            **self.write_ends(config),
            **self.write_classes(config),
        }

    def fits(self, config: Decoder.Config) -> bool:
        heads = getattr(config.blocks[config.layer_names()[0]].mixer, "n_heads", 1)
        return not (self.whole_heads and config.d_model % heads) and super().fits(config)

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [
            Entry(f"{root}{self.embedding}.weight", ("embed.weight",)),
            Entry(f"{root}norm.weight", ("norm.weight",)),
        ]
        if not config.tie_embeddings:
            found.append(Entry(self.head, ("head.weight",)))
        if config.classes is not None:
            for part in ("weight", "bias") if config.classes.bias else ("weight",):
                found.append(Entry(f"score.{part}", (f"classes.out.{part}",)))
        for i, name in enumerate(config.layer_names()):
            found += self.layer_entries(config.blocks[name], f"{root}layers.{i}", f"blocks.{i}.layers")
        return found


def _biased(block: BlockConfig, part: str) -> bool:
    """Whether the product ``part`` of a block has a bias."""
    channel: Any = block.channel
    if part.startswith("channel"):
        return channel.bias
    return block.mixer.o_bias if part.endswith(".o") else block.mixer.qkv_bias
