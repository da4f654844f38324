"""BERT (Devlin et al. 2019), and what its descendants share with it: a masked language model, or a head of classes.

Which of the two a folder holds is said by ``architectures``, as transformers writes it. The second half of BERT's own
pretraining, which sentence follows which, is not built here: its weights are left out of a folder that has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from octavo.errors import CheckpointError
from octavo.hub.family import Entry, Family, activation, hf_activation
from octavo.hub.labels import read_labels, write_labels
from octavo.models.decoder import Decoder

Purpose = Literal["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"]
PURPOSES: tuple[Purpose, ...] = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


class Encoder(Family):
    """What encoders with a masked-language-model head or one of classes say in the same words."""

    stem: str  # of their classes' names: Bert, Roberta ...
    synonyms: ClassVar[Mapping[str, Purpose]] = {}
    unused: ClassVar[Mapping[Purpose, tuple[str, ...]]] = {}  # tensors that are there, and nothing reads

    def __init__(self, purpose: Purpose = "ForMaskedLM"):
        self.purpose: Purpose = purpose
        self.ignored = (r".*position_ids", *self.unused.get(purpose, ()))

    @property
    def architecture(self) -> str:  # type: ignore[override]
        return self.stem + self.purpose

    def of(self, hf: Mapping[str, Any]) -> Self:
        named = (hf.get("architectures") or [f"{self.stem}ForMaskedLM"])[0]
        known: dict[str, Purpose] = {self.stem + p: p for p in PURPOSES}
        known |= {self.stem + name: purpose for name, purpose in self.synonyms.items()}
        if named not in known:
            raise CheckpointError(
                f"config.json has the architecture {named!r}, whose head is not known here ({self.model_type})",
                fix=f"known are {', '.join(known)}",
            )
        return type(self)(known[named])

    def purpose_of(self, config: Decoder.Config) -> Purpose:
        """What a model of ours would be called."""
        if config.classes is not None:
            return "ForTokenClassification" if config.classes.over == "token" else "ForSequenceClassification"
        return "Model" if config.head_transform is None else "ForMaskedLM"


class Bert(Encoder):
    """Post-norm layers over tokens, positions and token types; classes are read from [CLS] through a tanh layer."""

    model_type, stem = "bert", "Bert"
    optional_prefix = "bert."
    head = "cls.predictions.decoder.weight"
    copies: ClassVar[Mapping[str, str]] = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    renamed: ClassVar[Mapping[str, str]] = {
        r"LayerNorm\.gamma$": "LayerNorm.weight",
        r"LayerNorm\.beta$": "LayerNorm.bias",
    }
    synonyms: ClassVar[Mapping[str, Purpose]] = {"ForPreTraining": "ForMaskedLM"}
    unused: ClassVar[Mapping[Purpose, tuple[str, ...]]] = {
        "Model": (r"bert\.pooler\..*", r"bert\.cls\..*", r"cls\..*"),
        "ForMaskedLM": (r"bert\.pooler\..*", r"cls\.seq_relationship\..*"),
    }
    only: ClassVar[Mapping[str, Any]] = {
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }
    default_eps, default_types, default_positions = 1e-12, 2, 512
    transform: ClassVar[Mapping[str, str]] = {  # the layer before the logits
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    }
    classifier: ClassVar[Mapping[str, str]] = {"transform.dense": "bert.pooler.dense", "out": "classifier"}

    def offset(self, hf: Mapping[str, Any]) -> int:
        """Rows of the position table before that of position 0."""
        return 0

    def write_offset(self, offset: int) -> dict[str, Any]:
        if offset:
            raise self.refuse("offset", offset)
        return {}

    def head_activation(self, hf: Mapping[str, Any]) -> str:
        return activation(hf.get("hidden_act") or "gelu")

    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        for key, plain in self.only.items():
            if hf.get(key) not in (None, plain):
                raise self.refuse(key, hf[key])
        me = self.of(hf)
        dropout, offset = hf.get("hidden_dropout_prob", 0.1), self.offset(hf)
        mixer = {
            "kind": "attention",
            "n_heads": hf["num_attention_heads"],
            "qkv_bias": True,
            "o_bias": True,
            "dropout": hf.get("attention_probs_dropout_prob", 0.1),
        }
        channel = {
            "kind": "mlp",
            "d_ff": hf["intermediate_size"],
            "activation": activation(hf.get("hidden_act") or "gelu"),
            "bias": True,
        }
        block = {"mixer": mixer, "channel": channel, "norm_placement": "post", "dropout": dropout}
        masked = me.purpose == "ForMaskedLM"
        return Decoder.Config.model_validate(
            {
                "vocab_size": hf["vocab_size"],
                "d_model": hf["hidden_size"],
                "n_layers": hf["num_hidden_layers"],
                "max_seq_len": hf.get("max_position_embeddings", self.default_positions) - offset,
                "causal": False,
                "blocks": {"block": block},
                "norm": {"kind": "layernorm", "eps": hf.get("layer_norm_eps", self.default_eps)},
                "positions": {"kind": "learned", "offset": offset},
                "n_token_types": hf.get("type_vocab_size", self.default_types),
                "embed_norm": True,
                "embed_dropout": dropout,
                "final_norm": False,
                "tie_embeddings": True,
                "head_bias": masked,
                "head_transform": {"activation": self.head_activation(hf)} if masked else None,
                "classes": me.read_classes(hf, dropout) if "Classification" in me.purpose else None,
            }
        )

    def read_classes(self, hf: Mapping[str, Any], dropout: float) -> dict[str, Any]:
        own = hf.get("classifier_dropout")
        pooler = {"activation": "tanh", "norm": False}
        return {
            **read_labels(self, hf, "token" if "Token" in self.purpose else "sequence"),
            "dropout": dropout if own is None else own,
            "transform": None if "Token" in self.purpose else pooler,
        }

    def write(self, config: Decoder.Config) -> dict[str, Any]:
        block = config.blocks[config.layer_names()[0]]
        channel: Any = block.channel
        positions: Any = config.positions
        return {
            "architectures": [self.stem + self.purpose_of(config)],
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": block.mixer.n_heads,
            "intermediate_size": channel.d_ff or 4 * config.d_model,
            "hidden_act": hf_activation(channel.activation),
            "hidden_dropout_prob": block.dropout,
            "attention_probs_dropout_prob": block.mixer.dropout,
            "max_position_embeddings": config.max_seq_len + positions.offset,
            "type_vocab_size": config.n_token_types,
            "layer_norm_eps": config.norm.eps,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            **self.write_offset(positions.offset),
            **({"classifier_dropout": config.classes.dropout} if config.classes else {}),
            **write_labels(config),
        }

    def entries(self, config: Decoder.Config) -> list[Entry]:
        root = self.optional_prefix
        found = [
            Entry(f"{root}embeddings.word_embeddings.weight", ("embed.weight",)),
            Entry(f"{root}embeddings.position_embeddings.weight", ("positions.table.weight",)),
            Entry(f"{root}embeddings.token_type_embeddings.weight", ("token_types.weight",)),
            *_both(f"{root}embeddings.LayerNorm", "embed_norm"),
        ]
        for i in range(config.n_layers):
            theirs, ours = f"{root}encoder.layer.{i}", f"blocks.{i}.layers"
            for part, name in (("query", "q"), ("key", "k"), ("value", "v")):
                found += _both(f"{theirs}.attention.self.{part}", f"{ours}.mixer.mixer.{name}")
            found += _both(f"{theirs}.attention.output.dense", f"{ours}.mixer.mixer.o")
            found += _both(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer.norm_sum")
            found += _both(f"{theirs}.intermediate.dense", f"{ours}.channel.mixer.up")
            found += _both(f"{theirs}.output.dense", f"{ours}.channel.mixer.down")
            found += _both(f"{theirs}.output.LayerNorm", f"{ours}.channel.norm_sum")
        if config.head_transform is not None:
            found += _both(self.transform["dense"], "head_transform.dense")
            found += _both(self.transform["norm"], "head_transform.norm")
            found.append(Entry(self.transform["bias"], ("head_bias",)))
        if config.classes is not None and config.classes.over == "token":
            found += _both("classifier", "classes.out")
        elif config.classes is not None:
            for ours, theirs in self.classifier.items():
                found += _both(theirs, f"classes.{ours}")
        return found


def _both(theirs: str, ours: str) -> list[Entry]:
    """A weight and its bias."""
    return [Entry(f"{theirs}.{part}", (f"{ours}.{part}",)) for part in ("weight", "bias")]
