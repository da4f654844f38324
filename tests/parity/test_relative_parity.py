"""Shaw's and Transformer-XL's attention against transformers' speech encoder, and the papers' sums in a loop."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from proof import agree
from torch import Tensor
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import (
    Wav2Vec2BertRelPositionalEmbedding,
    Wav2Vec2BertSelfAttention,
)

from octavo.laws.subject import randomise
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.relative import RelativeAttention, Shaw, TransformerXl
from octavo.nn.state import place

D, H, T = 16, 2, 11
K = D // H
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "plain"])


def context(*, causal: bool):
    ctx = place(Inputs(torch.zeros(2, T, dtype=torch.long)))[0]
    ctx.causal = causal
    return ctx


def made(kind: type[RelativeAttention], seed: int = 0, **values) -> RelativeAttention:
    mixer = kind(kind.Config(n_heads=H, **values), Dims(D, 1, 32)).double()
    randomise(mixer, seed)
    return mixer


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def reference(kind: str, mixer: RelativeAttention, **values) -> Wav2Vec2BertSelfAttention:
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=D, num_attention_heads=H, position_embeddings_type=kind, attention_dropout=0.0,
        attn_implementation="eager", **values,
    )  # fmt: skip
    theirs = Wav2Vec2BertSelfAttention(config).double().eval()
    with torch.no_grad():
        for name, own in (("q", mixer.q), ("k", mixer.k), ("v", mixer.v), ("out", mixer.o)):
            getattr(theirs, f"linear_{name}").load_state_dict(own.state_dict())
    return theirs


@pytest.mark.rows("R3")
@pytest.mark.parametrize("clip", [3, 20])
@BACKENDS
@BOTH
def test_shaw_without_values_equals_transformers(backend, clip, dtype):
    ours = made(Shaw, clip=clip, values=False, qkv_bias=True, o_bias=True, backend=backend)
    theirs = reference("relative_key", ours, left_max_position_embeddings=clip, right_max_position_embeddings=clip)
    theirs.distance_embedding.weight.data = ours.key_table.weight.data
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), random(2, T, D).to(dtype)
    got, wanted = ours(x, context(causal=False))[0], theirs(x)[0]
    agree("shaw", "transformers Wav2Vec2BertSelfAttention", got, wanted, case=f"keys, clip {clip}, {backend}")


@pytest.mark.rows("R3")
@BACKENDS
@BOTH
def test_transformer_xl_equals_transformers(backend, dtype):
    ours = made(TransformerXl, qkv_bias=True, o_bias=True, backend=backend)
    theirs = reference("relative", ours)
    with torch.no_grad():
        theirs.linear_pos.weight.copy_(ours.r.weight)
        theirs.pos_bias_u.copy_(ours.u), theirs.pos_bias_v.copy_(ours.v_r)
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), random(2, T, D).to(dtype)
    waves = Wav2Vec2BertRelPositionalEmbedding(theirs.config)(x).to(dtype)
    got, wanted = ours(x, context(causal=False))[0], theirs(x, relative_position_embeddings=waves)[0]
    agree("transformer_xl", "transformers Wav2Vec2BertSelfAttention", got, wanted, case=f"both ways, {backend}")


def by_hand(mixer: RelativeAttention, x: Tensor, *, causal: bool) -> Tensor:
    """The papers' equations, one pair of tokens and one head at a time, in Python floats."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        q, k, v = (p(x[b]).view(T, H, K) for p in (mixer.q, mixer.k, mixer.v))
        for i in range(T):
            y = torch.zeros(H, K, dtype=x.dtype)
            for h in range(H):
                read = range(i + 1 if causal else T)
                scores = [pair_score(mixer, q[i, h], k[j, h], h, i - j) / math.sqrt(K) for j in read]
                top = max(scores)
                total = sum(math.exp(s - top) for s in scores)
                for j, s in zip(read, scores, strict=True):
                    y[h] += math.exp(s - top) / total * (v[j, h] + value_of(mixer, i - j))
            out[b, i] = mixer.o(y.flatten())
    return out


def row(mixer: Shaw, behind: int) -> int:
    return max(-mixer.clip, min(mixer.clip, -behind)) + mixer.clip


def value_of(mixer: RelativeAttention, behind: int) -> Tensor | float:
    return mixer.value_table.weight[row(mixer, behind)] if isinstance(mixer, Shaw) and mixer.value_table else 0.0


def pair_score(mixer: RelativeAttention, q: Tensor, k: Tensor, h: int, behind: int) -> float:
    if isinstance(mixer, Shaw):
        return float(q @ (k + mixer.key_table.weight[row(mixer, behind)]))
    wave = torch.zeros(D, dtype=torch.float64)
    for c in range(0, D, 2):
        angle = behind * 10000 ** (-c / D)
        wave[c], wave[c + 1] = math.sin(angle), math.cos(angle)
    key = mixer.r.weight.view(H, K, D)[h] @ wave
    return float((q + mixer.u[h]) @ k + (q + mixer.v_r[h]) @ key)


@pytest.mark.rows("R3")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(("kind", "values"), [(Shaw, {"clip": 3}), (Shaw, {"clip": 20}), (TransformerXl, {})])
@BACKENDS
@torch.no_grad()
def test_equals_the_papers_sums(kind, values, causal, backend):
    mixer = made(kind, 2, backend=backend, **values)
    x = random(2, T, D)
    name = mixer.config.kind
    got, wanted = mixer(x, context(causal=causal))[0], by_hand(mixer, x, causal=causal)
    agree(name, "the paper's equations, in a loop", got, wanted, case=f"causal {causal}, {values}, {backend}")
