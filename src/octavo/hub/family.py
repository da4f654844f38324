"""What a checkpoint family is: a configuration and a name map, both in both directions.

Foreign names live in this package alone. A family is one file: how its config.json reads as ours, how ours
is written as its, and which of its tensors are made of which of ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import CheckpointError
from octavo.models.decoder import Decoder


@dataclass(frozen=True)
class Entry:
    """One foreign tensor: ``theirs`` is ``ours`` stacked along the first axis, then perhaps transposed."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


class Family(ABC):
    """The contract. Nothing is guessed from a model's name: only config.json decides."""

    model_type: str
    architecture: str
    ignored: tuple[str, ...] = ()  # patterns of tensors that hold no weights, such as stored masks
    optional_prefix: str = ""  # a prefix that some writers leave out
    head = "lm_head.weight"  # the output matrix, which tied checkpoints may or may not repeat
    automatic = True  # may be chosen for a model that names no family

    def of(self, hf: Mapping[str, Any]) -> Family:
        """The generation of this family that a config.json is of, where one model_type has several."""
        return self

    @abstractmethod
    def read(self, hf: Mapping[str, Any]) -> Decoder.Config:
        """Our configuration from theirs.

        Raises:
            CheckpointError: it asks for something this family is not built for here, by name.
        """

    @abstractmethod
    def write(self, config: Decoder.Config) -> dict[str, Any]:
        """Their configuration from ours, as far as they have words for it; ``fits`` says whether that is all."""

    @abstractmethod
    def entries(self, config: Decoder.Config) -> list[Entry]:
        """Every tensor of the checkpoint, tied ones left out."""

    def fits(self, config: Decoder.Config) -> bool:
        """Whether the family can say exactly this model: written and read back it is the same."""
        try:
            return canonical(self.read(self.write(config))) == canonical(config)
        except (CheckpointError, ValueError, AttributeError):
            return False

    def refuse(self, key: str, value: Any, why: str = "is not supported for this family") -> CheckpointError:
        """The error for a configuration value that would change the mathematics."""
        return CheckpointError(
            f"config.json has {key} = {value!r}, which {why} ({self.model_type})",
            fix="use a checkpoint without it",
        )


def canonical(config: Decoder.Config) -> dict[str, Any]:
    """What decides the function a model computes: defaults resolved, names and training-only settings dropped."""
    plain = config.model_dump(mode="json")
    layers = []
    for name in config.layer_names():
        block = config.blocks[name].model_dump(mode="json", exclude={"dropout"})
        mixer, channel = block["mixer"], block["channel"] or {}
        if mixer.get("kind") == "attention":
            mixer["n_kv_heads"] = mixer["n_kv_heads"] or mixer["n_heads"]
            mixer["head_dim"] = mixer["head_dim"] or config.d_model // mixer["n_heads"]
            mixer["scale"] = mixer["scale"] or mixer["head_dim"] ** -0.5
            if mixer["qk_norm"] is None:
                mixer.pop("qk_norm_over")
        if channel.get("kind") == "glu":
            channel["d_ff"] = channel["d_ff"] or -(-8 * config.d_model // 96) * 32
        elif channel.get("kind") == "mlp":
            channel["d_ff"] = channel["d_ff"] or 4 * config.d_model
        for part in (mixer, channel):
            part.pop("dropout", None)
            part.pop("backend", None)
        layers.append(block)
    for key in ("blocks", "pattern", "init", "embed_dropout", "padding_id", "n_layers"):
        plain.pop(key)
    return plain | {"layers": layers}


def activation(hf_name: str) -> str:
    """Our name of a Hugging Face activation."""
    names = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
        "relu2": "relu_squared",
        "sigmoid": "sigmoid",
        "tanh": "tanh",
    }
    if hf_name not in names:
        raise CheckpointError(f"config.json has the activation {hf_name!r}", fix=f"known are {', '.join(names)}")
    return names[hf_name]


def hf_activation(name: str) -> str:
    """The Hugging Face name of one of our activations."""
    return {"gelu_tanh": "gelu_pytorch_tanh", "relu_squared": "relu2"}.get(name, name)
