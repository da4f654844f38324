"""Scaled dot-product attention: a plain twin and the fast path, one signature.

q (B, H, T, K), k and v (B, G, S, K) with H a multiple of G: query head h reads key head h // (H / G).
mask (B, 1, T, S) is True where reading is allowed; None means nothing is hidden except, with ``causal``,
later tokens (T = S then). ``softcap`` c bends the scaled scores s, before masking, to c tanh(s / c). ``bias``
(1 or B, H, T, S) is added to them after that. Returns (B, H, T, K). Source: Vaswani et al. 2017, section 3.2.1;
grouped heads, Ainslie et al. 2023; soft-capping, Gemma 2 (Gemma Team 2024, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.nn.contracts import full_precision
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
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return full_precision(scores).softmax(-1).to(q.dtype).reshape(B, H, T, S)


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
    dropout: float = 0.0,
) -> Tensor:
    """The textbook form, all scores in memory: the reference of every fast path."""
    B, H, T, _ = q.shape
    G, S = v.shape[1], v.shape[2]
    weights = attention_weights(q, k, mask, causal=causal, scale=scale, softcap=softcap, bias=bias)
    weights = F.dropout(weights, dropout)
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
    dropout: float = 0.0,
) -> Tensor:
    """torch's fused kernels: tiles with an online softmax where the device has them.

    Grouped heads (enable_gqa): on the CPU the fused kernel, forward and backward, reads key head h // (H / G)
    in place. With dropout there is no fused kernel on the CPU: torch's plain one then repeats k and v in memory.
    None of the kernels bends scores: with ``softcap`` this is ``plain``.
    """
    if softcap is not None:
        return plain(q, k, v, mask, causal=causal, scale=scale, softcap=softcap, bias=bias, dropout=dropout)
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


# kernel: this library's own, for causal training passes on the CPU, elsewhere sdpa; auto: kernel where there is one.
AttendName = Literal["auto", "sdpa", "plain", "kernel"]
ATTENDS: dict[str, Attend] = {"sdpa": sdpa, "plain": plain}


def by_ranges(backend: AttendName, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether causal attention over a row's own tokens runs through ``kernels.attention.causal``.

    Only with gradients: what is read without them reads the same through every door, cached or not.
    """
    wanted = backend in ("auto", "kernel") and torch.is_grad_enabled() and attention.supported(q, k, v)
    return wanted and attention.available()
