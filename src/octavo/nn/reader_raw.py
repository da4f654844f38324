"""Reading under a rotation whose frequencies are each query's own: keys are kept unturned and turned at every pass.

It serves any reader that keeps every token or a window of them; see ``Dynamic`` in nn/rope_scaling.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.nn.attend import attention_weights
from octavo.nn.contracts import Context, Keys
from octavo.nn.rope import QueryRotation
from octavo.nn.state import LayerState

if TYPE_CHECKING:
    from octavo.nn.reader import FullReader, Reading

NUMBERS = 1 << 24  # of turned keys that are held at once


def read_raw(
    reader: FullReader,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: Context,
    state: LayerState | None,
    reading: Reading,
    rotation: QueryRotation,
) -> Tensor:
    """``q_t^T R_h(t)(s - t) k_s`` for each query t with its own frequencies h(t): what ``Reader.read`` gives.

    Queries of a row that have the same frequencies, all of them up to the trained length, share one turn of
    the keys; any other query turns all keys for itself, which costs S K for each instead of once. Distances are
    counted in slots: positions that a caller gives must count a document's tokens one by one.
    """
    keys = ctx.keys
    if state is not None:
        keys, held = state.append(ctx, k=k, v=v)
        k, v = held["k"], held["v"]
    mask = reader.mask(ctx, keys)
    B, T = q.shape[:2]
    step = T if _shared(rotation.frequencies) else max(1, NUMBERS // (B * k[0].numel()))
    parts, maps = [], []
    for begin in range(0, T, step):
        part = slice(begin, begin + step)
        y, weights = _read_part(q[:, part], k, v, mask[:, :, part], ctx.slots[:, part], keys,
                                rotation.frequencies[:, part], ctx, reading, rotation)  # fmt: skip
        parts.append(y)
        maps.append(weights)
    if "attention" in ctx.record:
        ctx.recorded.setdefault("attention", []).append(torch.cat(maps, 2))
    return torch.cat(parts, 1)


def _read_part(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, slots: Tensor, keys: Keys, frequencies: Tensor,
    ctx: Context, reading: Reading, rotation: QueryRotation,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of queries q (B, T', H, K), (B, T', H, K), and its map (B, H, T', S) if it is recorded."""
    B, T, H, K = q.shape
    shared = _shared(frequencies)
    if shared:
        q = rotation.turned(q, slots, frequencies)
        k = rotation.turned(k, keys.slots, frequencies[:, :1])
    else:  # each query is a row of its own
        ahead = (keys.slots[:, None] - slots[:, :, None]).flatten(0, 1)
        each = frequencies.flatten(0, 1)[:, None]
        k = rotation.turned(k.repeat_interleave(T, 0), ahead, each)
        q, v, mask = q.reshape(B * T, 1, H, K), v.repeat_interleave(T, 0), mask.transpose(1, 2).flatten(0, 1)[:, None]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    how = {"scale": reading.scale, "softcap": reading.softcap, "sinks": reading.sinks}
    y = reading.attend(q, k, v, mask, dropout=reading.dropout, **how).transpose(1, 2).reshape(B, T, H, K)
    if "attention" not in ctx.record:
        return y, y
    weights = attention_weights(q, k, mask, **how)  # type: ignore[arg-type]
    return y, weights if shared else weights.unflatten(0, (B, T)).squeeze(3).transpose(1, 2)


def _shared(frequencies: Tensor) -> bool:
    """Whether the queries of each row have the same frequencies; a compiled pass, in which values are not known, no."""
    if frequencies.shape[1] == 1:
        return True
    return not torch.compiler.is_compiling() and bool((frequencies == frequencies[:, :1]).all())
