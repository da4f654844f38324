"""Which models the native step serves, and what it wants to know of their parts."""

from __future__ import annotations

from typing import Any

import torch

from octavo.infer.packing import GROUPS
from octavo.models.decoder import Decoder
from octavo.nn.attention import Attention
from octavo.nn.mlp import Glu, Mlp
from octavo.nn.norm import RMSNorm
from octavo.nn.quantized import Quantized, QuantizedProjection
from octavo.nn.reader import FullReader, WindowReader
from octavo.nn.rope import RotaryPositions
from octavo.schema import Config

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
DTYPES = (torch.float32, torch.bfloat16)
READERS = (FullReader, WindowReader)
PLACEMENTS = ("pre", "branch", "sandwich")
# The settings that the native step follows, or ``unsuitable`` asks about by name. Any other has to be at its default.
KNOWN = {
    "the model": frozenset(
        "kind d_model n_layers max_seq_len vocab_size blocks pattern norm positions final_norm tie_embeddings head_bias"
        " embed_scale embed_norm logit_softcap embed_dropout padding_id init shared multi_token".split()
    ),
    "a block": frozenset("mixer channel norm_placement topology residual_scale dropout positions".split()),
    "attention": frozenset(
        "kind n_heads n_kv_heads head_dim window reader rotate qkv_bias o_bias qk_norm qk_norm_over scale softcap"
        " dropout backend".split()
    ),
    "a channel mixer": frozenset("kind d_ff activation bias dropout".split()),
}


def unsuitable(model: Any) -> str:
    """Why ``model`` does not decode natively, in a few words; empty if it does."""
    if not isinstance(model, Decoder):
        return "not a decoder"
    config, weight = model.config, model.embed.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return "not fp32 or bf16 on the CPU"
    for scheme, kind in zip(schemes(model), (own.kind for own in config.schemes()), strict=True):
        if scheme is not None and kind not in ("rope", "none"):
            return f"positions {kind}"
        if (scaling := getattr(scheme, "scaling", None)) is not None and scaling.by_length:
            return "a rotation that depends on the length of the text"
    ropes = [scheme for scheme in schemes(model) if isinstance(scheme, RotaryPositions)]
    if len({(rope.dim, rope.config.layout) for rope in ropes}) > 1:
        return "rotations of several widths or layouts"
    if config.embed_norm:
        return "a normed embedding"
    if why := _beyond("the model", config):
        return why
    norms, head_norms = [model.norm], []
    for block in model.stack():
        parts = dict(block.sub_layers())
        attention, channel = parts["mixer"].mixer, parts["channel"].mixer if "channel" in parts else None
        if block.config.norm_placement not in PLACEMENTS or block.config.topology != "sequential":
            return "norms after the sum, or parallel mixers"
        if block.residual_scale != 1:
            return "a residual scale"
        if type(attention) is not Attention or type(attention.reader) not in READERS:
            return "not attention to all tokens or a window of them"
        if type(channel) not in (Glu, Mlp) or channel.config.activation not in ACTIVATIONS:  # type: ignore[union-attr]
            return "not a GLU or MLP with a usual activation"
        settings = {"a block": block.config, "attention": attention.config, "a channel mixer": channel.config}  # type: ignore[union-attr]
        if why := next(filter(None, map(_beyond, settings, settings.values())), ""):
            return why
        if why := next(filter(None, map(_mixed, together(attention, channel))), ""):
            return why
        own = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        if any(norm.d != attention.head_dim for norm in own):
            return "norms over all heads"
        norms += [norm for part in parts.values() for norm in (part.norm_in, part.norm_out) if norm is not None]
        head_norms += own
    if not all(type(n) is RMSNorm and n.weight is not None for n in norms + head_norms):
        return "not RMSNorm"
    if len({n.eps for n in norms}) > 1 or len({n.eps for n in head_norms}) > 1:  # type: ignore[union-attr]
        return "norms with several eps"
    if model.head is not None and (why := _mixed([model.head])):
        return why
    if any(parameter.dtype != weight.dtype for parameter in model.parameters()):
        return "weights of several kinds"
    return "blocks of several kinds" if len({_shape(block.config) for block in model.stack()}) > 1 else ""


def _shape(config: Any) -> str:
    """What has to be the same in every block."""
    mixer = config.mixer.model_copy(update={"window": None, "reader": None, "rotate": True, "dropout": 0.0})
    return config.model_copy(update={"mixer": mixer, "dropout": 0.0, "positions": None}).model_dump_json()


def schemes(model: Decoder) -> list[Any]:
    """The position schemes of the model's attention, the model's own first; None where no layer uses one."""
    used = {model.turns[name] for name in model.config.layer_names()}
    return [next(iter(tables.values())) if i in used else None for i, tables in enumerate(model.rotary)]


def _beyond(what: str, config: Config) -> str:
    """The first setting of ``config`` that is not known here and not at its default, in words."""
    for name, field in type(config).model_fields.items():
        if name not in KNOWN[what] and getattr(config, name) != field.get_default(call_default_factory=True):
            return f"{what} with {name} = {getattr(config, name)}"
    return ""


def together(attention: Any, channel: Any) -> list[list[Any]]:
    """The products that are made as one: qkv, o, up with its gate, down."""
    up = [channel.gate, channel.up] if isinstance(channel, Glu) else [channel.up]
    return [[attention.q, attention.k, attention.v], [attention.o], up, [channel.down]]


def _mixed(products: list[Any]) -> str:
    """Why products that are made as one cannot be, in words."""
    small = [p for p in products if isinstance(p, Quantized)]
    if any(not isinstance(p, QuantizedProjection) for p in small):
        return "weights of 8-bit floats"
    if any(p.storage.activations != "model" for p in small):  # type: ignore[union-attr]
        return "activations rounded to 8 bits"
    if wide := next((p.group for p in small if p.group not in GROUPS), 0):
        return f"one scale for {wide} inputs"
    kinds = {(p.bits, p.group) if isinstance(p, QuantizedProjection) else None for p in products}
    return "weights of several kinds" if len(kinds) > 1 else ""
