"""Scaled dot-product attention: a plain twin and the fast path, one signature.

q (B, H, T, K), k and v (B, G, S, K) with H a multiple of G: query head h reads key head h // (H / G).
mask (B, 1, T, S) is True where reading is allowed; None means nothing is hidden except, with ``causal``,
later tokens (T = S then); a query from which the mask hides every key gets zeros. ``softcap`` c bends the scaled
scores s, before masking, to c tanh(s / c). ``bias`` (1 or B, H, T, S) is added to them after that. ``sinks`` (H,)
are one more score for each query of a head, of a key that no mask hides and whose value is zero: what it takes of the
softmax is given to nobody. Values may be of another width than keys. Returns (B, H, T, width of values).
Source: Vaswani et al. 2017, section 3.2.1; grouped heads, Ainslie et al. 2023; soft-capping, Gemma 2 (Gemma Team
2024, section 2); sinks, gpt-oss (OpenAI 2025, section 2), after Xiao et al. 2023 and Miller 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import full_precision
from octavo.nn.dropout import draw_seed, dropout_of_weights
from octavo.nn.flash import tiled
from octavo.nn.kernels import attention

Attend = Callable[..., Tensor]


def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The probabilities themselves, (B, H, T, S), softmax in float32. Grouped heads are broadcast, never copied."""
    B, H, T, K = q.shape
    G, S = k.shape[1], k.shape[2]
    scores = torch.einsum("bgrtk,bgsk->bgrts", q.reshape(B, G, H // G, T, K), k) * (scale or K**-0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.reshape(-1, G, H // G, T, S)
    if causal:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    scores, empty = full_precision(scores), None
    if mask is not None:
        empty = ~mask.any(-1, keepdim=True)[:, :, None]  # a softmax over nothing is NaN: such a query reads nothing
        scores = scores.masked_fill(~mask[:, :, None] & ~empty, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).reshape(G, H // G, 1, 1).expand(B, -1, -1, T, 1)], -1)
    weights = scores.softmax(-1)[..., :S]
    weights = weights if empty is None else weights.masked_fill(empty, 0.0)
    return weights.to(q.dtype).reshape(B, H, T, S)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The textbook form, all scores in memory: the reference of every fast path."""
    B, H, T, _ = q.shape
    G, S = v.shape[1], v.shape[2]
    weights = attention_weights(q, k, mask, causal=causal, scale=scale, softcap=softcap, bias=bias, sinks=sinks)
    if dropout:
        weights = dropout_of_weights(weights, draw_seed(), dropout)
    y = torch.einsum("bgrts,bgsk->bgrtk", weights.reshape(B, G, H // G, T, S), v)
    return y.reshape(B, H, T, v.shape[-1])


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """torch's fused kernels: tiles with an online softmax where the device has them.

    Grouped heads (enable_gqa): on the CPU the fused kernel, forward and backward, reads key head h // (H / G)
    in place. With dropout there is no fused kernel on the CPU: torch's plain one then repeats k and v in memory.
    None of the kernels bends scores: with ``softcap`` this is ``plain``. Sinks become a token before the first,
    see ``with_sink``; one query alone is not worth copying the keys for. Values of another width than keys leave
    the CPU's fused kernel, which at 1,024 tokens takes twice the time and the memory of all scores: there they are
    padded.
    """
    if softcap is not None or (sinks is not None and q.shape[2] == 1):
        return plain(
            q, k, v, mask, causal=causal, scale=scale, softcap=softcap, bias=bias, sinks=sinks, dropout=dropout
        )
    if sinks is not None:
        q, k, v, mask, bias = with_sink(q, k, v, mask, bias, sinks, scale or q.shape[-1] ** -0.5)
        y = sdpa(q, k, v, mask, causal=causal, scale=1.0, bias=bias, dropout=dropout)
        return y[:, :, 1:, :-1]
    # Meta tensors stand for the CPU's; torch gives them the width of the keys otherwise.
    width, fused = v.shape[-1], q.device.type in ("cpu", "meta") and not dropout and q.shape[2] > 1
    if fused and width != q.shape[-1]:
        scale = scale or q.shape[-1] ** -0.5
        return sdpa(*_equally_wide(q, k, v), mask, causal=causal, scale=scale, bias=bias)[..., :width]
    if bias is not None:  # as one mask of numbers; the flag has to be in it then
        allowed = mask if mask is not None else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        allowed = allowed.tril() if causal else allowed
        mask, causal = bias.to(q.dtype).masked_fill(~allowed, float("-inf")), False
    B, H, T, K = q.shape
    G = k.shape[1]
    if T == 1 and G != H and not causal and bias is None:
        # One query a head: the group's queries form the query axis, and each key head is read once.
        q = q.reshape(B, G, H // G, K)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)
        return y.reshape(B, H, 1, v.shape[-1])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=G != H
    )


def with_sink(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same attention with scale 1, in which the sinks are an ordinary token before the first, for any kernel.

    One more channel holds the sink's score in queries, 1 in the sink's key and 0 in all others. The sink is a query
    too, so that a causal flag stays a diagonal; its row of the result is to be dropped, and the last channel.
    """
    B, H, T, _ = q.shape
    finite = sinks.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)  # times 0 in other keys
    score = finite[:, None, None].expand(B, H, T, 1)
    q = F.pad(torch.cat([q * scale, score], -1), (0, 0, 1, 0))
    k, v = F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
    k = torch.cat([F.pad(torch.ones_like(k[:, :, :1, -1:]), (k.shape[-1] - 1, 0)), k[:, :, 1:]], 2)
    mask = None if mask is None else F.pad(mask, (1, 0, 1, 0), value=True)
    return q, k, v, mask, None if bias is None else F.pad(bias, (1, 0, 1, 0))


# kernel: this library's own, for causal training passes on the CPU, elsewhere sdpa; auto: kernel where there is one.
# tiled: the one to read, nn/flash.py.
AttendName = Literal["auto", "sdpa", "plain", "kernel", "tiled"]
ATTENDS: dict[str, Attend] = {"sdpa": sdpa, "plain": plain, "tiled": tiled}


def by_ranges(backend: AttendName, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether causal attention over a row's own tokens runs through ``kernels.attention.causal``.

    Only with gradients: what is read without them reads the same through every door, cached or not.
    """
    wanted = backend in ("auto", "kernel") and torch.is_grad_enabled() and attention.supported(*_equally_wide(q, k, v))
    return wanted and attention.available()


def causal_by_ranges(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """``kernels.attention.causal``, also where values are not as wide as keys."""
    width, scale = v.shape[-1], scale or q.shape[-1] ** -0.5
    return attention.causal(*_equally_wide(q, k, v), first, scale=scale, dropout=dropout)[..., :width]


def _equally_wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Channels of zeros at the end of the narrower change no score and no value."""
    K, V = k.shape[-1], v.shape[-1]
    if K == V:
        return q, k, v
    wide = max(K, V)
    return F.pad(q, (0, wide - K)), F.pad(k, (0, wide - K)), F.pad(v, (0, wide - V))
