"""Parts of a model against torch and transformers: what is consistently wrong only a stranger can see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from proof import agree
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotate
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, repeat_kv
from transformers.models.t5.modeling_t5 import T5LayerNorm

from octavo.hub.folder import FAMILIES
from octavo.laws.subject import randomise
from octavo.models.cost import predicted_parameters
from octavo.models.decoder import build
from octavo.nn.activation import ACTIVATIONS
from octavo.nn.attend import ATTENDS, attention_weights
from octavo.nn.attention import Attention
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.mlp import Glu, Mlp
from octavo.nn.norm import LayerNorm, RMSNorm
from octavo.nn.position import PositionDims, Rotation, sinusoid
from octavo.nn.rope import RotaryPositions
from octavo.nn.rope_scaling import rope_frequencies
from octavo.nn.state import place


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


DIMS = Dims(16, 1, 32)


def attention(dims: Dims = DIMS, **values) -> Attention:
    mixer = Attention(Attention.Config(**values), dims).double()
    randomise(mixer, 0)
    return mixer


def context(B: int = 2, T: int = 7, **named):
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), **named))[0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------- attention


@pytest.mark.rows("B1")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ATTENDS)
def test_scaled_dot_product_step_by_step(backend, causal):
    q, k, v = (random(2, 3, 5, 8, seed=s).requires_grad_() for s in range(3))
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)  # 1. every query with every key, 2. scaled
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)  # 3. hidden ones out
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)  # 4. shares
    by_hand = weights @ v  # 5. mixture of values
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    ours = ATTENDS[backend](q, k, v, causal=causal)
    for other in (by_hand, torchs):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)
        wanted = torch.autograd.grad(other.square().sum(), (q, k, v), retain_graph=True)
        got = torch.autograd.grad(ours.square().sum(), (q, k, v), retain_graph=True)
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    torch.testing.assert_close(attention_weights(q, k, None, causal=causal), weights, rtol=0, atol=1e-12)


@pytest.mark.rows("B2")
@pytest.mark.parametrize("backend", ATTENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_multi_head_equals_torch(backend, dtype):
    ours = attention(n_heads=4, qkv_bias=True, o_bias=True, backend=backend).to(dtype)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).to(dtype)
    parts = (ours.q, ours.k, ours.v)
    theirs.load_state_dict(
        {"in_proj_weight": torch.cat([p.weight for p in parts]), "in_proj_bias": torch.cat([p.bias for p in parts]),
         "out_proj.weight": ours.o.weight, "out_proj.bias": ours.o.bias}
    )  # fmt: skip
    x = random(2, 7, 16).to(dtype)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    wanted, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    ctx = context()
    ctx.record = frozenset({"attention"})
    agree("attention", "torch MultiheadAttention", ours(x, ctx)[0], wanted, case=f"multi-head, {backend}")
    agree("attention", "torch MultiheadAttention", ctx.recorded["attention"][0], weights, case=f"weights, {backend}")


@pytest.mark.rows("B4")
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", ATTENDS)
def test_grouped_heads_equal_repeated_ones(backend, n_kv_heads):
    """transformers repeats keys and values in memory; query head h reads key head h // (H / G)."""
    q, k, v = random(2, 4, 5, 8), random(2, n_kv_heads, 9, 8, seed=1), random(2, n_kv_heads, 9, 8, seed=2)
    mask = torch.ones(2, 1, 5, 9, dtype=torch.bool).tril(4)
    repeated = [repeat_kv(x, 4 // n_kv_heads) for x in (k, v)]
    wanted = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask)
    torch.testing.assert_close(ATTENDS[backend](q, k, v, mask), wanted, rtol=0, atol=1e-12)
    one = F.scaled_dot_product_attention(q[:, :, :1], *repeated, attn_mask=mask[:, :, :1])
    torch.testing.assert_close(ATTENDS[backend](q[:, :, :1], k, v, mask[:, :, :1]), one, rtol=0, atol=1e-12)


@pytest.mark.rows("B4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 3, 6], ids=["full", "window of 3", "window of 6"])
def test_grouped_attention_equals_qwen2(window, dtype):
    """One layer with its rotation, biases and window; transformers cuts the window in its mask."""
    hf = transformers.Qwen2Config(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=8,
        vocab_size=8, use_sliding_window=window is not None, sliding_window=window, max_window_layers=0,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.Qwen2Model(hf).to(dtype)
    layer = theirs.layers[0].self_attn
    ours = attention(n_heads=4, n_kv_heads=2, qkv_bias=True, window=window).to(dtype)
    for name in ("q", "k", "v", "o"):
        getattr(layer, f"{name}_proj").load_state_dict(getattr(ours, name).state_dict())
    x = random(2, 9, 16).to(dtype)
    order = torch.arange(9)
    hidden = (order > order[:, None]) | (order <= order[:, None] - (window or 9))
    mask = torch.zeros(9, 9, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]
    wanted = layer(x, position_embeddings=theirs.rotary_emb(x, order[None]), attention_mask=mask)[0]
    ctx = context(2, 9)
    ctx.rotations = {4: rotation(9, 4, "half")}
    for training in (True, False):  # by ranges of keys, and by a mask
        got = ours.train(training)(x, ctx)[0]
        case = f"window {window}, {'training' if training else 'evaluation'}"
        agree("attention", "transformers Qwen2Attention", got, wanted, case=case)
        agree("window" if window else "full", "transformers Qwen2Attention", got, wanted, case=case)


# --------------------------------------------------------------------------------------------- positions


def rotation(T: int, K: int, layout: str) -> Rotation:
    return RotaryPositions(RotaryPositions.Config(layout=layout), PositionDims(0, K, 0)).rotation(torch.arange(T)[None])


@pytest.mark.rows("R4")
def test_rope_half_equals_llama():
    x = torch.randn(1, 11, 3, 8)
    config = transformers.LlamaConfig(hidden_size=24, num_attention_heads=3, max_position_embeddings=16)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = theirs(x, torch.arange(11)[None])
    wanted, _ = llama_rotate(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    agree("rope", "transformers Llama", rotation(11, 8, "half")(x), wanted.transpose(1, 2), case="half")
    low, _ = llama_rotate(*[x.transpose(1, 2).bfloat16()] * 2, cos.bfloat16(), sin.bfloat16())
    agree("rope", "transformers Llama", rotation(11, 8, "half")(x.bfloat16()), low.transpose(1, 2), case="half")
    torch.testing.assert_close(rope_frequencies(8, 10000.0), theirs.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.rows("R4")
def test_rope_interleaved_equals_gptj_and_the_complex_form():
    x = torch.randn(1, 11, 3, 8)
    sin, cos = create_sinusoidal_positions(11, 8).chunk(2, -1)
    ours = rotation(11, 8, "interleaved")(x)
    agree("rope", "transformers GPT-J", ours, gptj_rotate(x, sin[None], cos[None]), case="interleaved")
    angles = torch.arange(11)[:, None].float() * rope_frequencies(8, 10000.0)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(ours, torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-6)


def timing_signal(length: int, channels: int, min_timescale: float = 1.0, max_timescale: float = 1.0e4) -> np.ndarray:
    """tensor2tensor's get_timing_signal_1d, in numpy."""
    n = channels // 2
    increment = math.log(max_timescale / min_timescale) / max(n - 1, 1)
    scales = min_timescale * np.exp(np.arange(n) * -increment)
    time = np.arange(length)[:, None] * scales[None]
    return np.pad(np.concatenate([np.sin(time), np.cos(time)], axis=1), [(0, 0), (0, channels % 2)])


@pytest.mark.rows("R1")
@pytest.mark.parametrize("d", [8, 9])
def test_sinusoid_half_equals_tensor2tensor(d):
    ours, theirs = sinusoid(torch.arange(50), d, "half"), torch.from_numpy(timing_signal(50, d))
    agree("sinusoidal", "tensor2tensor get_timing_signal_1d", ours, theirs, case=f"half, {d} channels")


@pytest.mark.rows("R1")
def test_sinusoid_interleaved_equals_the_paper():
    ours = sinusoid(torch.arange(40), 10, "interleaved")
    for t in (0, 1, 7, 39):
        for i in range(5):
            angle = t / 10000 ** (2 * i / 10)
            assert float(ours[t, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(ours[t, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.rows("T8", "R2")
def test_gpt2_embedding_path():
    hf = transformers.GPT2Config(vocab_size=23, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    theirs = transformers.GPT2Model(hf).eval()
    ours = build(FAMILIES["gpt2"].read(hf.to_dict())).eval()
    with torch.no_grad():
        ours.embed.weight.copy_(theirs.wte.weight)
        ours.positions.table.weight.copy_(theirs.wpe.weight)
        tokens = torch.randint(23, (2, 12))
        wanted = theirs(tokens, output_hidden_states=True).hidden_states[0]
        got = ours(Inputs(tokens), needs=("hidden_states",)).hidden_states[0]
        assert torch.equal(got, wanted)
        agree("learned", "transformers GPT2Model", got, wanted)
    assert ours.config.embed_dropout == hf.embd_pdrop == 0.1
    ours.train()
    dropped = ours(Inputs(tokens), needs=("hidden_states",)).hidden_states[0]
    survived = dropped != 0
    assert 0.8 < float(survived.float().mean()) < 0.98
    torch.testing.assert_close(dropped[survived], wanted[survived] / 0.9, rtol=1e-4, atol=0)
    low = theirs.bfloat16()(tokens, output_hidden_states=True).hidden_states[0]
    got = ours.eval().bfloat16()(Inputs(tokens), needs=("hidden_states",)).hidden_states[0]
    agree("learned", "transformers GPT2Model", got, low)


# ------------------------------------------------------------------------- activations, norms, feed-forward

THEIR_NAMES = {
    "sigmoid": ["sigmoid"], "tanh": ["tanh"], "relu": ["relu"], "relu_squared": ["relu2"],
    "gelu": ["gelu", "gelu_python"], "gelu_tanh": ["gelu_new", "gelu_pytorch_tanh"], "silu": ["silu", "swish"],
    "identity": ["linear"],
}  # fmt: skip


@pytest.mark.rows("F2")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients(name):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()  # 0 is where relu's derivative is a choice
    ours = ACTIVATIONS[name](x)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    for theirs in THEIR_NAMES[name]:
        wanted = ACT2FN[theirs](x)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), x)[0], rtol=0, atol=1e-6)
        for dtype in (torch.float32, torch.bfloat16):
            low = x.detach().to(dtype)
            agree(name, f"transformers ACT2FN {theirs}", ACTIVATIONS[name](low), ACT2FN[theirs](low))
    closed = {
        "sigmoid": lambda t: 1 / (1 + math.exp(-t)),
        "tanh": math.tanh,
        "relu": lambda t: max(t, 0.0),
        "relu_squared": lambda t: max(t, 0.0) ** 2,
        "gelu": lambda t: t * 0.5 * (1 + math.erf(t / math.sqrt(2))),
        "gelu_tanh": lambda t: 0.5 * t * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))),
        "silu": lambda t: t / (1 + math.exp(-t)),
        "identity": lambda t: t,
    }[name]
    values = torch.tensor([closed(t) for t in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours.detach(), values, rtol=0, atol=1e-9)


@pytest.mark.rows("F3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_swiglu_equals_qwen2(dtype):
    theirs = Qwen2MLP(transformers.Qwen2Config(hidden_size=16, intermediate_size=40)).to(dtype)
    ours = Glu(Glu.Config(d_ff=40), DIMS)
    for name in ("gate", "up", "down"):
        getattr(ours, name).weight = getattr(theirs, f"{name}_proj").weight
    x = torch.randn(2, 5, 16).to(dtype)
    agree("glu", "transformers Qwen2MLP", ours(x, context(2, 5))[0], theirs(x))


@pytest.mark.rows("F1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mlp_equals_gpt2(dtype):
    theirs = GPT2MLP(64, transformers.GPT2Config(n_embd=16, resid_pdrop=0.0)).to(dtype)
    ours = Mlp(Mlp.Config(activation="gelu_tanh", bias=True), DIMS).to(dtype)
    for mine, other in ((ours.up, theirs.c_fc), (ours.down, theirs.c_proj)):
        randomise(mine, 0)
        other.load_state_dict({"weight": mine.weight.T, "bias": mine.bias})
    x = torch.randn(2, 5, 16).to(dtype)
    agree("mlp", "transformers GPT2MLP", ours(x, context(2, 5))[0], theirs(x))


@pytest.mark.rows("F4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_round_like_the_references(dtype):
    """In 16 bits the order of cast and scale is visible: equal means bit for bit."""
    x = (torch.randn(64, 48) * 3).to(dtype)
    weight, bias = torch.randn(48).to(dtype), torch.randn(48).to(dtype)
    rms, llama = RMSNorm(RMSNorm.Config(eps=1e-6), 48), LlamaRMSNorm(48, eps=1e-6)
    layer, theirs = LayerNorm(LayerNorm.Config(eps=1e-5), 48), nn.LayerNorm(48, eps=1e-5, dtype=dtype)
    for norm in (rms, llama, layer, theirs):
        norm.weight.data = weight
    layer.bias.data = theirs.bias.data = bias
    assert torch.equal(rms(x), llama(x))
    assert torch.equal(layer(x), theirs(x))
    if dtype != torch.float16:
        agree("rmsnorm", "transformers LlamaRMSNorm", rms(x), llama(x))
        agree("layernorm", "torch LayerNorm", layer(x), theirs(x))
    if dtype == torch.float32:
        t5 = T5LayerNorm(48, eps=1e-6)
        t5.weight.data = weight
        agree("rmsnorm", "transformers T5LayerNorm", rms(x), t5(x))
        torchs = nn.RMSNorm(48, eps=1e-6)
        torchs.weight.data = weight
        agree("rmsnorm", "torch RMSNorm", rms(x), torchs(x))


@pytest.mark.rows("T7", "X3")
def test_look_up_equals_torch_with_a_padding_row():
    from octavo.nn.projection import Embedding

    ours, theirs = Embedding(9, 5, "embed", padding_id=2), nn.Embedding(9, 5, padding_idx=2)
    ours.weight.data = theirs.weight.data.clone()
    ids = torch.tensor([[1, 2, 2, 4], [4, 0, 1, 2]])
    assert torch.equal(ours(ids), theirs(ids))
    (ours(ids) ** 3).sum().backward()
    (theirs(ids) ** 3).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert (ours.weight.grad[2] == 0).all()
    assert (ours.weight.grad[4] != 0).all()


# --------------------------------------------------------------------------------------- whole shapes


@pytest.mark.rows("A8")
def test_the_fields_of_qwen2():
    """The published shape of Qwen2-7B, on the meta device: every field read, every parameter counted."""
    hf = transformers.Qwen2Config(
        vocab_size=151936 + 128, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072, sliding_window=131072,
        use_sliding_window=False, max_window_layers=28, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    config = FAMILIES["qwen2"].read(hf.to_dict())
    mixer, channel = config.blocks["full"].mixer, config.blocks["full"].channel
    assert (mixer.n_heads, mixer.n_kv_heads, mixer.head_dim, mixer.window) == (28, 4, 128, None)
    assert (mixer.qkv_bias, mixer.o_bias, mixer.qk_norm) == (True, False, None)
    assert (channel.kind, channel.d_ff, channel.activation, channel.bias) == ("glu", 18944, "silu", False)
    assert (config.positions.kind, config.positions.theta, config.positions.layout) == ("rope", 1e6, "half")
    assert (config.norm.kind, config.norm.eps, config.max_seq_len) == ("rmsnorm", 1e-6, 131072)
    assert not config.tie_embeddings
    assert config.init.std == hf.initializer_range == 0.02
    with torch.device("meta"):
        theirs = transformers.Qwen2ForCausalLM(hf)
    ours = build(config, device="meta")
    count = sum(p.numel() for p in theirs.parameters())
    assert count == predicted_parameters(ours) == sum(p.numel() for p in ours.parameters())
    assert count == 7_615_616_512


@pytest.mark.rows("A3")
@pytest.mark.parametrize(("layers", "d", "heads", "count"), [(12, 768, 12, 124_439_808), (48, 1600, 25, 1_557_611_200)])
def test_gpt2_is_counted_as_published(layers, d, heads, count):
    hf = transformers.GPT2Config(n_layer=layers, n_embd=d, n_head=heads)
    model = build(FAMILIES["gpt2"].read(hf.to_dict()), device="meta")
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(hf)
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert sum(p.numel() for p in model.parameters()) == predicted_parameters(model) == count
