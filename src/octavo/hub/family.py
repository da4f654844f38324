"""What a checkpoint family is: a configuration and a name map, both in both directions.

Foreign names live in this package alone. A family is one file: how its config.json reads as ours, how ours
is written as its, and which of its tensors are made of which of ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.models.decoder import Decoder
from octavo.models.encoder_decoder import EncoderDecoder


@dataclass(frozen=True)
class Entry:
    """One foreign tensor: ``theirs`` is ``ours`` stacked along the first axis, then perhaps transposed.

    With ``groups`` n each of ours is cut into n equal pieces along the first axis, and theirs has the first piece
    of each, then the second of each: queries, keys and values side by side head by head. ``ones`` are the places,
    in their shape, of axes of size one that ours has not. ``cut`` (axis, index, n): theirs is one of n equal pieces
    of our one tensor, without the axis where that leaves a matrix (an expert). ``exchanged``: the two halves of its
    columns change places. ``repeats``: it is a copy of what another entry has, and may be left out.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    groups: int = 1
    ones: tuple[int, ...] = ()
    cut: tuple[int, int, int] | None = None
    exchanged: bool = False
    repeats: bool = False

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Their shape, from ours."""
        found = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if self.cut is not None:
            axis, _, n = self.cut
            found[axis] //= n
            found = found[1:] if len(found) == 3 else found
        found = found[::-1] if self.transposed else found
        for place in self.ones:
            found.insert(place, 1)
        return tuple(found)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Their tensor, in a memory of its own."""
        if self.cut is not None:
            axis, index, n = self.cut
            joined = parts[0].chunk(n, axis)[index]
            joined = joined.squeeze(0) if joined.dim() == 3 else joined
        else:
            pieces = zip(*(part.chunk(self.groups) for part in parts), strict=True)
            joined = torch.cat([piece for group in pieces for piece in group])
        joined = joined.roll(joined.shape[-1] // 2, -1) if self.exchanged else joined
        joined = joined.T if self.transposed else joined
        for place in self.ones:
            joined = joined.unsqueeze(place)
        return joined.contiguous().clone()

    def split(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Our tensors of theirs, or with ``cut`` the piece of ours; ``join`` of them is theirs again."""
        tensor = tensor.squeeze(self.ones)
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor.roll(tensor.shape[-1] // 2, -1) if self.exchanged else tensor
        if self.cut is not None:
            return [tensor[None] if len(shapes[0]) == 3 else tensor]
        sizes = [shape[0] // self.groups for shape in shapes]
        parts = zip(*(group.split(sizes) for group in tensor.chunk(self.groups)), strict=True)
        # Parts of one matrix must not stay in one memory: what holds the parameters later asks for one each.
        return [tensor] if len(shapes) == 1 else [torch.cat(part) for part in parts]


class Family(ABC):
    """The contract. Nothing is guessed from a model's name: only config.json decides."""

    model_type: str
    architecture: str
    ignored: tuple[str, ...] = ()  # patterns of tensors that hold no weights, such as stored masks
    optional_prefix: str = ""  # a prefix that some writers leave out
    copies: ClassVar[Mapping[str, str]] = {}  # tensors that may be there as copies of another, and of which
    renamed: ClassVar[Mapping[str, str]] = {}  # other spellings of names: pattern and replacement
    head = "lm_head.weight"  # the output matrix, which tied checkpoints may or may not repeat
    configures: ClassVar[type[Any]] = Decoder.Config  # what model its checkpoints are of
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

    def borne_out(self, hf: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, Any]:
        """``hf`` without what it speaks of where no tensor is there for it, and its own class may leave them out."""
        return hf

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


# Of a mixture: what only training feels.
TRAINING_ONLY = ("balance", "balance_weight", "bias_rate", "z_loss", "capacity_factor")


def canonical(config: Decoder.Config) -> dict[str, Any]:
    """What decides the function a model computes: defaults resolved, names and training-only settings dropped."""
    if isinstance(config, EncoderDecoder.Config):
        halves = {"encoder": canonical(config.encoder), "decoder": canonical(config.decoder)}
        return config.model_dump(mode="json", exclude={"encoder", "decoder", "start_id"}) | halves
    plain = config.model_dump(mode="json")
    names = config.layer_names()
    layers = [_layer(config, name) for name in names]
    if config.multi_token is not None:
        plain["multi_token"]["block"] = _layer(config, config.multi_token.block or names[-1])
    for key in ("blocks", "pattern", "init", "embed_dropout", "padding_id", "n_layers"):
        plain.pop(key)
    if config.classes is not None:
        plain["classes"] |= {"dropout": None, "n_classes": config.classes.n}
        plain["classes"] |= {"pooling": None} if config.classes.over == "token" else {}
    return plain | {"layers": layers}


def _layer(config: Decoder.Config, name: str) -> dict[str, Any]:
    block = config.blocks[name].model_dump(mode="json", exclude={"dropout"})
    block["positions"] = block["positions"] or config.positions.model_dump(mode="json")
    mixer, channel = block["mixer"], block["channel"] or {}
    if mixer.get("kind") == "attention":
        mixer["n_kv_heads"] = mixer["n_kv_heads"] or mixer["n_heads"]
        mixer["head_dim"] = mixer["head_dim"] or config.d_model // mixer["n_heads"]
        mixer["scale"] = mixer["scale"] or mixer["head_dim"] ** -0.5
        if mixer["qk_norm"] is None:
            mixer.pop("qk_norm_over")
    elif mixer.get("kind") == "mla":
        own: Any = config.blocks[name].mixer
        width = mixer["head_dim"] = own.head_dim or config.d_model // own.n_heads
        mixer["rope_dim"] = own.rope_dim or max(2, width // 4 * 2)
        mixer["v_head_dim"] = own.v_head_dim or width
        mixer["kv_rank"] = own.kv_rank or 4 * width
        scale = own.scale or (width + mixer["rope_dim"]) ** -0.5
        mixer["scale"] = scale * own.yarn.value() if mixer.pop("yarn") else scale
    if channel.get("kind") == "glu":
        channel["d_ff"] = channel["d_ff"] or -(-8 * config.d_model // 96) * 32
    elif channel.get("kind") == "mlp":
        channel["d_ff"] = channel["d_ff"] or 4 * config.d_model
    elif channel.get("kind") == "moe":
        experts: Any = config.blocks[name].channel
        channel["d_ff"] = experts.width(config.d_model)
        channel["shared_d_ff"] = experts.shared_d_ff or experts.n_shared_experts * channel["d_ff"]
        channel["n_shared_experts"] = experts.n_shared_experts > 0  # they are one mixer of shared_d_ff
        if experts.order == "top_first":  # the same thing
            channel |= {"order": "score_first", "normalise": True}
        unused = [*TRAINING_ONLY, *(("groups_per_token", "group_score") if experts.n_groups == 1 else ())]
        for key in [*unused, *(("capacity_over", "first") if experts.eval_capacity_factor is None else ())]:
            channel.pop(key)
    if cross := block["cross"] or {}:
        cross["n_kv_heads"] = cross["n_kv_heads"] or cross["n_heads"]
        cross["head_dim"] = cross["head_dim"] or config.d_model // cross["n_heads"]
        cross["scale"] = cross["scale"] or cross["head_dim"] ** -0.5
        cross["memory_width"] = cross["memory_width"] or config.d_model
    _resolve_recurrent(mixer, channel, config.d_model)
    for part in (mixer, cross, channel):
        part.pop("dropout", None)
        part.pop("backend", None)
    return block


def _resolve_recurrent(mixer: dict[str, Any], channel: dict[str, Any], d_model: int) -> None:
    """The widths of recurrent mixers, in place, without what only starting values or the time feel."""
    if mixer["kind"] == "mamba":
        mixer["expand"] = max(1, round(mixer["expand"] * d_model))
        mixer["dt_rank"] = mixer["dt_rank"] or -(-d_model // 16)
    elif mixer["kind"] == "mamba2":
        mixer["head_dim"] = mixer["head_dim"] or 2 * d_model // mixer["n_heads"]
        mixer["norm_groups"] = mixer["norm_groups"] or mixer["n_groups"]
    elif mixer["kind"] == "rwkv4":
        mixer["width"] = mixer["width"] or d_model
    if channel.get("kind") == "rwkv_channel":
        channel["d_ff"] = channel["d_ff"] or 4 * d_model
    if mixer["kind"] in ("mamba", "mamba2", "rwkv4"):
        for key in ("dt_min", "dt_max", "dt_init", "a_init", "chunk"):
            mixer.pop(key, None)


def activation(hf_name: str) -> str:
    """Our name of a Hugging Face activation."""
    names = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
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
