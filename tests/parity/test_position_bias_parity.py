"""ALiBi and T5's buckets against transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from proof import agree
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.attention import Attention
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.position import PositionDims
from octavo.nn.position_bias import AlibiPositions, T5Positions, alibi_slopes, t5_bucket
from octavo.nn.state import place

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def context(T: int, *, causal: bool = True, **named):
    ctx = place(Inputs(torch.zeros(2, T, dtype=torch.long), **named))[0]
    ctx.causal = causal
    return ctx


@pytest.mark.rows("R5")
@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 32, 71])
def test_slopes_of_any_number_of_heads(n_heads):
    ones = torch.ones(1, 5, dtype=torch.long)
    bloom = build_alibi_tensor(ones, n_heads, torch.float32)[:, 0]  # slope times position, rows differ by a constant
    agree("alibi", "transformers Bloom", alibi_slopes(n_heads), bloom[:, 1] - bloom[:, 0], case=f"{n_heads} heads")
    mpt = build_mpt_alibi_tensor(n_heads, 5)[:, 0]
    agree("alibi", "transformers MPT", alibi_slopes(n_heads), mpt[:, 1] - mpt[:, 0], case=f"{n_heads} heads")
    last = AlibiPositions(AlibiPositions.Config(), PositionDims(0, 0, 0, n_heads)).bias(context(5), context(5).keys)
    agree("alibi", "transformers MPT", last[0, :, -1], mpt, case=f"{n_heads} heads, bias of the last query")


@pytest.mark.rows("R5")
@pytest.mark.parametrize("n_heads", [4, 6])
@BOTH
def test_attention_with_alibi_equals_mpt(n_heads, dtype):
    D = 8 * n_heads
    config = transformers.MptConfig(d_model=D, n_heads=n_heads, max_seq_len=32)
    theirs = transformers.models.mpt.modeling_mpt.MptAttention(config, 0).to(dtype)
    ours = Attention(Attention.Config(n_heads=n_heads), Dims(D, 1, 32))
    randomise(ours, 0)
    ours = ours.to(dtype)
    theirs.Wqkv.weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight])
    theirs.out_proj.weight.data = ours.o.weight.data
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None]
    wanted = theirs(x, position_bias=build_mpt_alibi_tensor(n_heads, 9).to(dtype), attention_mask=later)[0]
    ctx = context(9)
    ctx.bias = AlibiPositions(AlibiPositions.Config(), PositionDims(D, 8, 32, n_heads)).bias
    agree("alibi", "transformers MptAttention", ours(x, ctx)[0], wanted, case=f"{n_heads} heads")


@pytest.mark.rows("R3")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (6, 9), (64, 1000)])
def test_buckets_equal_those_of_t5(causal, n_buckets, max_distance):
    ahead = torch.arange(-1200, 1201)
    wanted = T5Attention._relative_position_bucket(ahead, not causal, n_buckets, max_distance)
    assert torch.equal(t5_bucket(ahead, n_buckets, max_distance, causal=causal), wanted)


@pytest.mark.rows("R3")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@BOTH
def test_attention_with_buckets_equals_t5(causal, dtype):
    config = transformers.T5Config(d_model=24, d_kv=8, num_heads=3, relative_attention_num_buckets=8,
                                   relative_attention_max_distance=10, is_decoder=causal, dropout_rate=0.0)  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(dtype)
    ours = Attention(Attention.Config(n_heads=3, scale=1.0), Dims(24, 1, 32))
    scheme = T5Positions(T5Positions.Config(n_buckets=8, max_distance=10), PositionDims(24, 8, 32, 3))
    randomise(ours, 0), randomise(scheme, 1)
    ours, scheme = ours.to(dtype), scheme.to(dtype)
    theirs.load_state_dict(
        {**{f"{name}.weight": getattr(ours, name).weight for name in "qkvo"},
         "relative_attention_bias.weight": scheme.table.weight}
    )  # fmt: skip
    ctx = context(14, causal=causal)
    bias = scheme.bias(ctx, ctx.keys)
    agree("t5", "transformers T5Attention", bias[0], theirs.compute_bias(14, 14)[0], case=f"bias, causal {causal}")
    x = (torch.randn(2, 14, 24, generator=torch.Generator().manual_seed(0)) / 3).to(dtype).requires_grad_()
    hidden = torch.zeros(14, 14, dtype=dtype)
    if causal:
        hidden = hidden.masked_fill(torch.ones(14, 14, dtype=torch.bool).triu(1), torch.finfo(dtype).min)
    wanted = theirs(x, mask=hidden[None, None].expand(2, 1, 14, 14))[0]
    ctx.bias = scheme.bias
    got = ours(x, ctx)[0]
    agree("t5", "transformers T5Attention", got, wanted, case=f"causal {causal}")
    if dtype == torch.float32:
        pairs = [(ours.q.weight, theirs.q.weight), (scheme.table.weight, theirs.relative_attention_bias.weight)]
        for mine, other in pairs:
            (a,), (b,) = (
                torch.autograd.grad(y.square().sum(), p, retain_graph=True) for y, p in ((got, mine), (wanted, other))
            )
            agree("t5", "transformers T5Attention", a, b, case=f"gradient, causal {causal}")


@pytest.mark.rows("R3")
def test_one_table_serves_all_layers():
    config = {"d_model": 16, "n_layers": 3, "vocab_size": 19, "max_seq_len": 16, "positions": "t5",
              "blocks": {"block": {"mixer": {"kind": "attention", "n_heads": 2}}}}  # fmt: skip
    model = build(Decoder.Config.model_validate(config))
    assert [n for n, p in model.named_parameters() if p.shape == (32, 2)] == ["positions.table.weight"]
