"""Decoding steps in one native call: what a small model spends in Python and dispatch, it spends on weights here.

Serves models of the common kind (see ``unsuitable``) on the CPU, one new token for each of some rows; prompts
are read by the model itself, and any other model decodes through its own forward pass, which is also the twin
that this is tested against. Activations are fp32 whatever the weights are.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from octavo.models.decoder import Decoder
from octavo.nn.attention import Attention
from octavo.nn.kernels import build
from octavo.nn.mlp import Glu, Mlp
from octavo.nn.norm import RMSNorm
from octavo.nn.reader import FullReader
from octavo.nn.rope import RotaryPositions
from octavo.nn.state import ContiguousState
from octavo.schema import Config

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BITS = {torch.float32: 32, torch.bfloat16: 16}
# The settings that the native step follows, or ``unsuitable`` asks about by name. Any other has to be at its default.
KNOWN = {
    "the model": frozenset(
        "kind d_model n_layers max_seq_len vocab_size blocks pattern norm positions final_norm tie_embeddings head_bias"
        " embed_scale embed_norm logit_softcap embed_dropout padding_id init shared multi_token".split()
    ),
    "a block": frozenset("mixer channel norm_placement topology residual_scale dropout".split()),
    "attention": frozenset(
        "kind n_heads n_kv_heads head_dim window reader rotate qkv_bias o_bias qk_norm qk_norm_over scale softcap"
        " dropout backend".split()
    ),
    "a channel mixer": frozenset("kind d_ff activation bias dropout".split()),
}


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The native library of this process, or why there is none; tried once."""
    try:
        loaded = ctypes.CDLL(str(build.build("decode")))
        calls: list[ctypes.c_void_p | None] = [build.team(), None, None]
        if calls[0] is not None:  # the same runtime's own counts
            names = ("omp_get_num_threads", "omp_get_thread_num")
            calls[1:] = [ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p) for name in names]
        loaded.decode_new.restype = ctypes.c_void_p
        loaded.decode_free.argtypes = (ctypes.c_void_p,)
        loaded.decode_step.argtypes = (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 5, ctypes.c_int)
        loaded.decode_init.argtypes = (ctypes.c_void_p,) * 3
        loaded.decode_init(*calls)
        return loaded, ""
    except (build.Unavailable, OSError, AttributeError) as error:
        return None, str(error)


def unsuitable(model: Any, state: Any) -> str:
    """Why ``model`` does not decode natively, in a few words; empty if it does."""
    if not isinstance(model, Decoder) or not isinstance(state, ContiguousState):
        return "not a decoder with a contiguous state"
    config, weight = model.config, model.embed.weight
    if weight.device.type != "cpu" or weight.dtype not in BITS:
        return "not fp32 or bf16 on the CPU"
    if config.positions.kind not in ("rope", "none"):
        return f"positions {config.positions.kind}"
    if (scaling := getattr(model.positions, "scaling", None)) is not None and scaling.by_length:
        return "a rotation that depends on the length of the text"
    if config.embed_norm or config.embed_scale != 1 or config.logit_softcap is not None:
        return "a scaled or normed embedding, or capped logits"
    if why := _beyond("the model", config):
        return why
    norms = [model.norm]
    for block in model.stack():
        parts = dict(block.sub_layers())
        attention, channel = parts["mixer"].mixer, parts["channel"].mixer if "channel" in parts else None
        if block.config.norm_placement != "pre" or block.config.topology != "sequential":
            return "norms not before the mixers, or parallel mixers"
        if block.residual_scale != 1:
            return "a residual scale"
        if type(attention) is not Attention or type(attention.reader) is not FullReader:
            return "not full attention"
        if attention.config.softcap is not None or not attention.config.rotate:
            return "capped attention, or layers that do not rotate"
        if type(channel) not in (Glu, Mlp) or channel.config.activation not in ACTIVATIONS:  # type: ignore[union-attr]
            return "not a GLU or MLP with a usual activation"
        settings = {"a block": block.config, "attention": attention.config, "a channel mixer": channel.config}  # type: ignore[union-attr]
        if why := next(filter(None, map(_beyond, settings, settings.values())), ""):
            return why
        heads = [attention.q_norm, attention.k_norm]
        if any(norm is not None and norm.d != attention.head_dim for norm in heads):
            return "norms over all heads"
        norms += [parts["mixer"].norm_in, parts["channel"].norm_in, *(n for n in heads if n is not None)]
    if not all(type(norm) is RMSNorm and norm.weight is not None and not norm.offset for norm in norms):
        return "not RMSNorm"
    if any(parameter.dtype != weight.dtype or not parameter.is_contiguous() for parameter in model.parameters()):
        return "weights of several kinds"
    shapes = {tuple(p.shape for p in block.parameters()) for block in model.stack()}
    kinds = {block.config.model_copy(update={"dropout": 0.0}).model_dump_json() for block in model.stack()}
    if len(shapes) > 1 or len(kinds) > 1:
        return "blocks of several kinds"
    return ""


class NativeStep:
    """One step of ``model`` on ``state``: built once for a conversation, called for each token.

    Raises:
        ValueError: ``unsuitable`` says why.
    """

    def __init__(self, model: Decoder, state: ContiguousState):
        loaded, why = library()
        why = why or unsuitable(model, state)
        if loaded is None or why:
            raise ValueError(why)
        self.library, self.model, self.state = loaded, model, state
        blocks = [dict(block.sub_layers()) for block in model.stack()]
        attention, channel = blocks[0]["mixer"].mixer, blocks[0]["channel"].mixer
        assert isinstance(attention, Attention) and isinstance(channel, (Glu, Mlp))
        rope = model.positions if isinstance(model.positions, RotaryPositions) else None
        self.caches = [state.layers[f"{depth}.mixer"].buffers for depth in range(len(model.uses))]
        H, G, K = attention.n_heads, attention.n_kv_heads, attention.head_dim
        sizes = [
            model.config.d_model, H, G, K, channel.up.d_out, model.vocab_size, len(blocks),
            self.caches[0]["k"].shape[1], rope.dim if rope else 0,
            int(rope is not None and rope.config.layout == "interleaved"),
            ACTIVATIONS[channel.config.activation], len(state.lengths),
        ]  # fmt: skip
        head_norm = attention.q_norm or attention.k_norm
        floats = [_eps(model.norm), _eps(head_norm), attention.config.scale or K**-0.5]
        if any(_eps(part.norm_in) != floats[0] for block in blocks for part in block.values()):
            raise ValueError("norms with several eps")
        pointers: list[Tensor | None] = [model.embed.weight, model.norm.weight, *_head(model)]  # type: ignore[list-item]
        for block in blocks:
            own, wide = block["mixer"].mixer, block["channel"].mixer
            assert isinstance(own, Attention) and isinstance(wide, (Glu, Mlp))
            norms = [block["mixer"].norm_in, block["channel"].norm_in, own.q_norm, own.k_norm]
            pointers += [getattr(norm, "weight", None) for norm in norms]
            for product in (own.q, own.k, own.v, own.o, getattr(wide, "gate", None), wide.up, wide.down):
                pointers += [getattr(product, "weight", None), getattr(product, "bias", None)]
        bits = BITS[model.embed.weight.dtype]
        self.handle = loaded.decode_new(
            (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_float * 3)(*floats), bits, _addresses(pointers)
        )

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.decode_free(ctypes.c_void_p(self.handle))

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """One more token for some rows.

        Args:
            tokens: (M,) int64, the next token of each.
            rows: (M,) int64, which rows of the state they continue, each at most once.

        Returns:
            logits (M, V) float32.

        Raises:
            ResourceError: the state is full.
        """
        slots, starts = self.state.advance(rows)
        model, M = self.model, len(tokens)
        rotation = model.positions.rotation((slots - starts)[:, None])
        cos, sin = (rotation.cos.contiguous(), rotation.sin.contiguous()) if rotation is not None else (None, None)
        numbers = torch.cat([tokens, rows, slots, starts])
        logits = torch.empty(M, model.vocab_size)
        caches = _addresses([cache[name] for cache in self.caches for name in ("k", "v")])
        self.library.decode_step(
            self.handle, M, numbers.data_ptr(), cos.data_ptr() if cos is not None else None,
            sin.data_ptr() if sin is not None else None, caches, logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return logits


def _beyond(what: str, config: Config) -> str:
    """The first setting of ``config`` that is not known here and not at its default, in words."""
    for name, field in type(config).model_fields.items():
        if name not in KNOWN[what] and getattr(config, name) != field.get_default(call_default_factory=True):
            return f"{what} with {name} = {getattr(config, name)}"
    return ""


def _eps(norm: nn.Module | None) -> float:
    return float(getattr(norm, "eps", 0.0))


def _head(model: Decoder) -> list[Tensor | None]:
    head = model.output_head()
    return [head.weight, head.bias]


def _addresses(tensors: list[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
