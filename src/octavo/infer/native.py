"""Whole decoder steps in one native call: what a small model spends in Python and dispatch, it spends on weights here.

Serves models of the common kind (infer/suitable.py) on the CPU: any rows of any sequences whose keys and values lie in
blocks of a pool or in rings (nn/kernels/decode.cpp). Any other model decodes through its own forward pass, which is the
twin that this is tested against too. Activations are fp32 whatever the weights are, and rounded for products alone: to
15 bits with quantised weights, and where the processor has fp16 arithmetic to 11 with bf16 ones (decode_product.h).
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from octavo.infer.packing import GROUPS, Arena, Order, Source, pack
from octavo.infer.suitable import ACTIVATIONS, DTYPES, schemes, together, unsuitable
from octavo.models.decoder import Decoder
from octavo.nn.attention import Attention
from octavo.nn.kernels import build
from octavo.nn.mlp import Glu, Mlp
from octavo.nn.rope import RotaryPositions
from octavo.nn.state import ContiguousState

Weights = Literal["model", "bf16", "int8", "int4"]
ASKED = ("tokens", "sequence", "slots", "positions", "first", "wanted", "tables", "rows")
TURNS = 512  # positions whose rotation is computed at a time
Marks = tuple[Tensor, Tensor]  # of the entries of rings: which slot each holds, and of which document


def marks_of(buffers: dict[str, Tensor]) -> Marks | None:
    """The marks of a layer's rings; None where its keys lie in blocks."""
    return (buffers["_slots"], buffers["_docs"]) if "_slots" in buffers else None


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The native library of this process, or why there is none; tried once."""
    try:
        return load(), ""
    except (build.Unavailable, OSError, AttributeError) as error:
        return None, str(error)


def load(*, emulated: bool = False) -> ctypes.CDLL:
    """The library; ``emulated`` without the processor's dot products of whole numbers, in plain loops."""
    loaded = ctypes.CDLL(str(build.build("decode", emulated=emulated)))
    address = ctypes.c_void_p
    loaded.decode_new.restype = address
    loaded.decode_new.argtypes = (address,) * 3
    loaded.decode_free.argtypes = (address,)
    loaded.decode_step.argtypes = (address,) * 8
    loaded.decode_fp16.argtypes = ()
    loaded.decode_print.argtypes = (address, ctypes.c_int64)
    loaded.decode_print.restype = ctypes.c_uint64
    return loaded


class NativeModel:
    """The weights of ``model``, packed once, and the steps of any number of sequences on them.

    The packed copy is in memory beside the model's own weights, which are only read again for the embedding of
    tokens; weights that change afterwards are not followed (``packed`` makes a new one then). ``weights`` ``model``
    keeps the format of each weight (fp32, bf16, or the codes of a quantised projection); ``bf16``, ``int8`` and
    ``int4`` round what has none yet, the codes to nearest, with one scale for ``group`` inputs.

    Steps run on a team of ``threads`` (default: torch's number at each step) that sleeps when it waits for long.
    Torch's own threads do not: they try for milliseconds after an operation that used them, on the cores it needs. The
    engine chooses its tokens under ``threads.one_thread``; a loop of one's own does best with
    ``torch.set_num_threads(1)`` around it, and ``threads`` here.

    Raises:
        ValueError: ``unsuitable`` or ``library`` says why.
    """

    def __init__(
        self,
        model: Decoder,
        weights: Weights = "model",
        *,
        group: int = 64,
        threads: int | None = None,
        library: ctypes.CDLL | None = None,
    ):
        loaded, why = (library, "") if library is not None else globals()["library"]()
        why = unsuitable(model) or why
        if loaded is None or why:
            raise ValueError(why)
        if weights not in get_args(Weights) or group not in GROUPS:
            raise ValueError(f"weights {weights} in groups of {group}: {', '.join(get_args(Weights))} of 16 to 256 are")
        self.library, self.positions, self.vocab_size = loaded, schemes(model), model.vocab_size
        self.threads, self.cap = threads, model.config.logit_softcap
        self.embedding = model.embed.weight.detach()
        self.arena = Arena()
        self.keep: list[Tensor] = [self.embedding]
        blocks = [dict(block.sub_layers()) for block in model.stack()]
        attention, channel = blocks[0]["mixer"].mixer, blocks[0]["channel"].mixer
        assert isinstance(attention, Attention) and isinstance(channel, (Glu, Mlp))
        rope = next((scheme for scheme in self.positions if isinstance(scheme, RotaryPositions)), None)
        self.heads = attention.n_kv_heads, attention.head_dim
        self.n_layers, self.R = len(blocks), rope.dim if rope else 0
        self.turns = torch.empty(len(self.positions), 0, self.R)
        sizes = [
            model.config.d_model, attention.n_heads, *self.heads, model.vocab_size, self.n_layers, self.R,
            int(rope is not None and rope.config.layout == "interleaved"), ACTIVATIONS[channel.config.activation],
            int(isinstance(channel, Glu)), int(self.embedding.dtype == torch.bfloat16),
        ]  # fmt: skip
        head_norm = attention.q_norm or attention.k_norm
        scale = attention.config.scale or attention.head_dim**-0.5
        enters = float(torch.full((), model.config.embed_scale, dtype=self.embedding.dtype))  # as the model rounds it
        floats = [_eps(model.norm), _eps(head_norm), scale, attention.config.softcap or 0.0, enters]
        rounding = weights, group
        head: Any = model.head if model.head is not None else Source(self.embedding, model.head_bias)
        parts = [self.embedding.data_ptr(), self._floats(model.norm), *self._matrix(rounding, "plain", [head])]
        packed: dict[int, list[int]] = {}
        for name, block in zip(model.config.layer_names(), blocks, strict=True):
            key = id(block["mixer"])
            packed[key] = packed[key] if key in packed else self._layer(rounding, block, model.turns[name])
            parts += packed[key]
        self.handle = loaded.decode_new(
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_float * len(floats))(*floats),
            (ctypes.c_int64 * len(parts))(*parts),
        )

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.decode_free(self.handle)

    @property
    def n_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.arena.used

    def _layer(self, rounding: tuple[Weights, int], block: dict[str, Any], scheme: int) -> list[int]:
        own, wide = block["mixer"].mixer, block["channel"].mixer
        norms = [block["mixer"].norm_in, block["channel"].norm_in, block["mixer"].norm_out, block["channel"].norm_out]
        qkv, o, up, down = together(own, wide)
        turns = own.config.rotate and isinstance(self.positions[scheme], RotaryPositions)
        return [
            *map(self._floats, [*norms, own.q_norm, own.k_norm]),
            own.reader.window or 0,
            scheme if turns else -1,
            *self._matrix(rounding, "heads", qkv, own.head_dim),
            *self._matrix(rounding, "plain", o),
            *self._matrix(rounding, "gated" if len(up) > 1 else "plain", up),
            *self._matrix(rounding, "plain", down),
        ]

    def _matrix(self, rounding: tuple[Weights, int], order: Order, products: list[Any], head_dim: int = 0) -> list[int]:
        sources = [Source.of(p, *rounding) for p in products]
        return pack(self.arena, sources, order, head_dim, fp16=bool(self.library.decode_fp16())).numbers()

    def _floats(self, norm: nn.Module | None) -> int:
        if norm is None:
            return 0
        weight: Any = norm.weight.detach().float() + (1.0 if norm.offset else 0.0)  # type: ignore[union-attr, operator]
        self.keep.append(weight.contiguous())
        return self.keep[-1].data_ptr()

    @torch.inference_mode()
    def step(
        self,
        tokens: Tensor,
        sequence: Tensor,
        slots: Tensor,
        positions: Tensor,
        tables: Tensor,
        block_size: int,
        first: Tensor,
        memory: Memory,
        wanted: Tensor,
        *,
        rows: Tensor | None = None,
        docs: Tensor | None = None,
    ) -> Tensor:
        """Run N tokens through the model, writing their keys and values before any is read.

        A row's logits do not depend on which other rows are in the step, nor on which blocks hold what it reads.

        Args:
            tokens: (N,) int64, as are the next four.
            sequence: whose each token is: a row of ``tables``.
            slots: where its key and value go; no slot of a sequence twice in a step.
            positions: what it is rotated by.
            tables: (n_sequences, n_max) int32, the blocks that hold slots 0, 1, ... of a sequence.
            block_size: slots of a block.
            first: the first slot each token reads; it reads on to its own.
            memory: the keys and values of all layers, made for this model.
            wanted: (W,) int64, the rows whose logits are needed.
            rows: (N,) int64, which of the rings is each token's. Several tokens of one then stand one after the other,
                and there is room for N entries behind the rings.
            docs: (N,) int64, which document each token is of; default: the first.

        Returns:
            logits (W, V) float32.

        Raises:
            ValueError: a number is outside of what it counts, or a ring has no room for several tokens.
        """
        zeros = torch.zeros_like(tokens)
        given = [zeros if t is None else t for t in (rows, docs)]
        numbers = torch.stack([tokens, sequence, slots, positions, first, *given])
        N, W = len(tokens), len(wanted)
        if self.R and N and (highest := int(positions.max())) >= self.turns.shape[1]:
            self._turn(highest)
        counts = [
            N, W, tables.shape[1], block_size, self.turns.shape[1] if self.R else 2**62, len(tables),
            memory.n_entries // block_size, memory.n_rows, memory.aside, int(memory.narrow),
            self.threads or torch.get_num_threads(),
        ]  # fmt: skip
        tables, wanted = tables.to(torch.int32).contiguous(), wanted.contiguous()
        logits = torch.empty(W, self.vocab_size)
        refused = self.library.decode_step(
            self.handle, (ctypes.c_int64 * len(counts))(*counts), numbers.data_ptr(), wanted.data_ptr(),
            tables.data_ptr(), self.turns.data_ptr(), memory.told, logits.data_ptr(),
        )  # fmt: skip
        if refused:
            raise ValueError(f"a number of {ASKED[refused - 1]} is outside of what it counts, or has no room")
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def _turn(self, highest: int) -> None:
        """Rotations up to that position, always computed in the same pieces: the same bits whoever asks first."""
        pieces = [self.turns]
        for start in range(self.turns.shape[1], highest + 1, TURNS):
            at, piece = torch.arange(start, start + TURNS)[:, None], torch.zeros(len(self.positions), TURNS, self.R)
            for own, scheme in zip(piece, self.positions, strict=True):
                if scheme is not None and (rotation := scheme.rotation(at)) is not None:
                    own.copy_(torch.cat([rotation.cos.flatten(1), rotation.sin.flatten(1)], 1))
            pieces.append(piece)
        self.turns = torch.cat(pieces, 1).contiguous()


class Memory:
    """The keys and values of all layers of a model, as the native step is told of them.

    Args:
        keys: of each layer, (n_blocks * block_size, G, K), fp32 or bf16, contiguous; (n_rows, length, G, K) where
            ``rings`` says so, and as much more behind the n_rows rings as a step is to have room for. Slot s is at
            s % (length - 1); the last entry of a ring takes nothing here.
        values: like ``keys``.
        rings: of each layer whose keys lie in rings, which slot each entry holds and of which document, both
            (n_rows, length) int64; None for the others.

    Raises:
        ValueError: they are not as described, or do not fit the model.
    """

    def __init__(
        self, model: NativeModel, keys: Sequence[Tensor], values: Sequence[Tensor], rings: Sequence[Marks | None] = ()
    ):
        rings = rings or [None] * len(keys)
        if not len(keys) == len(values) == len(rings) == model.n_layers:
            raise ValueError(f"pools of {len(keys)} layers do not fit the model")
        entries, rows, told, self.aside = set[int](), set[int](), list[int](), 2**62
        for k, v, marks in zip(keys, values, rings, strict=True):
            if k.shape[-2:] != model.heads or k.ndim != (3 if marks is None else 4) or k.dtype not in DTYPES:
                raise ValueError(f"pools of {tuple(k.shape)}, {k.dtype} do not fit the model")
            alike = k.shape == v.shape and k.dtype == v.dtype == keys[0].dtype
            alike &= all(own.shape == (len(own), k.shape[1]) and len(own) <= len(k) for own in marks or ())
            if not alike or not all(own.is_contiguous() for own in (k, v, *(marks or ()))):
                raise ValueError("pools of several shapes or kinds, or not contiguous")
            told += [k.data_ptr(), v.data_ptr()]
            if marks is None:
                entries.add(len(k))
                told += [0, 0, 0]
            else:
                rows.add(len(marks[0]))
                told += [k.shape[1], *(own.data_ptr() for own in marks)]
                self.aside = min(self.aside, (len(k) - len(marks[0])) * k.shape[1])
        if len(entries) > 1 or len(rows) > 1:
            raise ValueError("pools of several shapes or kinds, or not contiguous")
        self.n_entries, self.n_rows = max(entries, default=0), max(rows, default=0)
        self.narrow, self.told = keys[0].dtype == torch.bfloat16, (ctypes.c_int64 * len(told))(*told)
        self.keep = keys, values, rings


class NativeStep:
    """Steps of ``packed`` weights on a contiguous state: blocks as long as a row, each its own.

    Raises:
        ValueError: the model is not served (``unsuitable``).
    """

    def __init__(self, model: Decoder, state: ContiguousState):
        self.model, self.state = packed(model), state

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
        tables = torch.arange(len(self.state.lengths), dtype=torch.int32)[:, None]
        caches = [self.state.layers[f"{depth}.mixer"].buffers for depth in range(self.model.n_layers)]
        rings = [marks_of(cache) for cache in caches]
        keys, values = (
            [cache[name].flatten(0, int(ring is None)) for cache, ring in zip(caches, rings, strict=True)]
            for name in ("k", "v")
        )
        return self.model.step(
            tokens, rows, slots, slots - starts, tables, self.state.max_tokens + 1, starts,
            Memory(self.model, keys, values, rings), torch.arange(len(tokens)), rows=rows,
            docs=self.state.last_doc[rows],
        )  # fmt: skip


_PACKED: weakref.WeakKeyDictionary[Decoder, tuple[int, NativeModel]] = weakref.WeakKeyDictionary()


def packed(model: Decoder) -> NativeModel:
    """The model's weights in their own formats, packed at the first call and whenever they are not the same any more.

    What they are is read, at the cost of about one token: a version counter misses what writes past it.
    """
    loaded, why = library()
    if loaded is None:
        raise ValueError(why)
    seen = fingerprint(model, loaded)
    held = _PACKED.get(model)
    if held is None or held[0] != seen or list(map(id, held[1].positions)) != list(map(id, schemes(model))):
        _PACKED.pop(model, None)  # before the next is made: not two at a time
        held = _PACKED[model] = (seen, NativeModel(model))
    return held[1]


def fingerprint(model: nn.Module, loaded: ctypes.CDLL) -> int:
    """A number that says what all weights of ``model`` are, bit for bit."""
    tensors = [t.detach().contiguous() for t in (*model.parameters(), *model.buffers())]
    return hash(tuple(loaded.decode_print(t.data_ptr(), t.nbytes) for t in tensors))


def _eps(norm: nn.Module | None) -> float:
    return float(getattr(norm, "eps", 0.0))
