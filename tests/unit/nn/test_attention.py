"""Attention: heads, groups, scale, dropout, and what the notes say of them."""

from __future__ import annotations

import math

import pytest
import torch
from allocations import Allocated

from octavo.laws.subject import randomise
from octavo.models.block import Block, BlockConfig
from octavo.models.decoder import Decoder, build
from octavo.nn.attend import ATTENDS, attention_weights
from octavo.nn.attention import Attention
from octavo.nn.contracts import Context, Dims, Inputs
from octavo.nn.norm import NoNorm
from octavo.nn.state import ContiguousState, place


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def attention(d_model: int = 16, **values) -> Attention:
    mixer = Attention(Attention.Config(**values), Dims(d_model, 1, 32)).double()
    randomise(mixer, 0)
    return mixer


def context(B: int, T: int, **named) -> Context:
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), **named))[0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.rows("B1")
def test_without_the_scale_gradients_vanish_as_heads_get_wider():
    """Scores of random vectors have variance K: unscaled, the softmax saturates and its slope dies."""

    def slope(K: int, scale: float) -> float:
        q, k, v = random(8, 1, 32, K), random(8, 1, 32, K, seed=1), random(8, 1, 32, 4, seed=2)
        scores = (q @ k.transpose(-1, -2) * scale).requires_grad_()
        (gradient,) = torch.autograd.grad((scores.softmax(-1) @ v).sum(), scores)
        return float(gradient.abs().mean())

    widths = (4, 64, 1024, 4096)
    scaled, unscaled = ([slope(K, s(K)) for K in widths] for s in (lambda K: K**-0.5, lambda K: 1.0))
    assert max(scaled) / min(scaled) < 1.5
    assert all(a > 1.5 * b for a, b in zip(unscaled, unscaled[1:]))
    assert unscaled[-1] < 0.1 * scaled[-1]


def test_scale_is_a_setting():
    x = random(2, 5, 16)
    default, explicit, other = (attention(n_heads=4, scale=s) for s in (None, 4**-0.5, 1.0))
    assert torch.equal(default(x, context(2, 5))[0], explicit(x, context(2, 5))[0])
    assert not torch.allclose(default(x, context(2, 5))[0], other(x, context(2, 5))[0])


@pytest.mark.parametrize("n_kv_heads", [1, 4])
@pytest.mark.parametrize("backend", ATTENDS)
def test_capped_scores_are_bent_after_scaling_and_before_masking(backend, n_kv_heads):
    q, k, v = random(2, 4, 6, 8) * 5, random(2, n_kv_heads, 6, 8, seed=1), random(2, n_kv_heads, 6, 8, seed=2)
    heads = []
    for h in range(4):
        g = h * n_kv_heads // 4
        scores = 3 * torch.tanh(q[:, h] @ k[:, g].transpose(1, 2) * 0.5 / 3)
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, g])
    y = ATTENDS[backend](q, k, v, causal=True, scale=0.5, softcap=3.0)
    torch.testing.assert_close(y, torch.stack(heads, 1), rtol=0, atol=1e-12)
    assert not torch.allclose(y, ATTENDS[backend](q, k, v, causal=True, scale=0.5), atol=1e-2)


@torch.no_grad()
def test_the_cap_is_a_setting_and_its_weights_are_the_recorded_ones():
    x, mixer = random(2, 5, 16), attention(n_heads=1, softcap=0.1, scale=10.0)
    ctx = context(2, 5)
    ctx.record = frozenset({"attention"})
    y = mixer(x, ctx)[0]
    (weights,) = ctx.recorded["attention"]
    torch.testing.assert_close(y, mixer.o(weights[:, 0] @ mixer.v(x)), rtol=0, atol=1e-12)
    last = weights[:, 0, -1]  # scores within 0.1 of zero: no weight is e^0.2 times another
    assert float((last.max(-1).values / last.min(-1).values).max()) <= math.exp(0.2) + 1e-9


@pytest.mark.rows("B2")
@pytest.mark.parametrize("backend", ATTENDS)
def test_a_loop_over_heads_equals_the_batched_form(backend):
    mixer, x = attention(n_heads=4, backend=backend), random(2, 6, 16)
    heads = []
    for h in range(4):
        rows = slice(4 * h, 4 * h + 4)
        q, k, v = (x @ p.weight[rows].T for p in (mixer.q, mixer.k, mixer.v))
        scores = (q @ k.transpose(1, 2) / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    wanted = torch.cat(heads, -1) @ mixer.o.weight.T
    torch.testing.assert_close(mixer(x, context(2, 6))[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.rows("B2")
def test_trap_e14_values_and_output_meet_in_one_block_a_head():
    """The note calls W_V = W_down W_up a trick of storage. W_V and W_O are blocks of two matrices, one for each head.

    The output is the sum over heads of A W_V W_O.
    """
    mixer, x = attention(n_heads=4), random(1, 6, 16)
    ctx = context(1, 6)
    ctx.record = frozenset({"attention"})
    y, _ = mixer(x, ctx)
    weights = ctx.recorded["attention"][0]
    total = torch.zeros_like(y)
    for h in range(4):
        rows = slice(4 * h, 4 * h + 4)
        total += weights[:, h] @ x @ (mixer.o.weight[:, rows] @ mixer.v.weight[rows]).T
    torch.testing.assert_close(y, total, rtol=0, atol=1e-12)


@pytest.mark.rows("B3")
def test_trap_e15_self_attention_reads_its_own_keys_and_values():
    """The note takes every decoder attention's keys and values from an encoder. Only cross-attention does."""
    mixer, x = attention(n_heads=2), random(1, 4, 16)
    first = mixer(x, context(1, 4))[0][:, 0]
    torch.testing.assert_close(first, mixer.o(mixer.v(x))[:, 0], rtol=0, atol=1e-12)  # token 0 sees itself alone


@pytest.mark.rows("B4")
def test_as_many_key_heads_as_heads_is_multi_head_and_one_is_multi_query():
    x = random(2, 6, 16)
    default, explicit = attention(n_heads=4), attention(n_heads=4, n_kv_heads=4)
    assert torch.equal(default(x, context(2, 6))[0], explicit(x, context(2, 6))[0])
    one = attention(n_heads=4, n_kv_heads=1)
    assert one.k.weight.shape == one.v.weight.shape == (4, 16)
    repeated = attention(n_heads=4)
    for name in "qkvo":
        weight = getattr(one, name).weight
        getattr(repeated, name).weight.data = weight.repeat(4, 1) if name in "kv" else weight.data
    torch.testing.assert_close(one(x, context(2, 6))[0], repeated(x, context(2, 6))[0], rtol=0, atol=1e-12)


@pytest.mark.rows("B4")
def test_trap_e19_the_group_of_a_head_and_the_layout():
    """The noted repeat_kv, on (batch, seq, head), mixes axes, and its reshape copies. Head h reads h // (H / G)."""
    q, k = random(1, 8, 3, 4), random(1, 2, 5, 4, seed=1)
    weights = attention_weights(q, k, None)
    for h in range(8):
        wanted = (q[:, h] @ k[:, h // 4].transpose(1, 2) / 2).softmax(-1)
        torch.testing.assert_close(weights[:, h], wanted, rtol=0, atol=1e-12)
    expanded = k[:, :, None].expand(1, 2, 4, 5, 4)
    assert expanded.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()  # expanding copies nothing
    assert expanded.reshape(1, 8, 5, 4).untyped_storage().nbytes() == 4 * k.untyped_storage().nbytes()  # this does
    with pytest.raises(RuntimeError):  # as printed in the note: 8 query heads against 2, on the wrong axes
        torch.matmul(random(1, 3, 8, 4), random(1, 3, 2, 4).transpose(2, 3)[:, :, None].expand(1, 3, 4, 4, 2))


@pytest.mark.rows("B4")
@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("backend", ATTENDS)
def test_keys_and_values_are_never_repeated_in_memory(backend, n_queries):
    """Not by the plain twin, not by what is around the fused kernel, and not by that (forward and backward)."""
    B, H, G, S, K = 1, 16, 2, 64, 16
    q = torch.randn(B, H, n_queries, K, requires_grad=True)
    k, v = (torch.randn(B, G, S, K, requires_grad=True) for _ in range(2))
    mask = torch.ones(B, 1, n_queries, S, dtype=torch.bool)
    with Allocated([q, k, v, mask]) as seen:
        ATTENDS[backend](q, k, v, mask).sum().backward()
    assert 0 < seen.largest < B * H * S * K * 4, seen.by
    with Allocated([q, k, v]) as repeated:
        k.detach().repeat_interleave(H // G, 1)
    assert repeated.largest == B * H * S * K * 4  # the meter sees it when it happens


@pytest.mark.rows("B4")
@torch.no_grad()
def test_decoding_with_a_state_repeats_nothing_either():
    mixer = attention(64, n_heads=16, n_kv_heads=2, head_dim=16).float()
    state = ContiguousState({"0.mixer": mixer.state_spec()}, 1, 64, torch.float32)
    prompt = Inputs(torch.zeros(1, 63, dtype=torch.long))
    mixer(torch.randn(1, 63, 64), state.begin(prompt), state.layer("0.mixer"))
    x, ctx = torch.randn(1, 1, 64), state.begin(Inputs(torch.zeros(1, 1, dtype=torch.long)))
    with Allocated([*mixer.parameters(), *state.layer("0.mixer").buffers.values()]) as seen:
        mixer(x, ctx, state.layer("0.mixer"))
    assert seen.largest < 16 * 64 * 16 * 4, seen.by


@pytest.mark.rows("B4")
def test_state_bytes_shrink_with_the_groups():
    sizes = {}
    for G in (8, 2, 1):
        mixer = attention(64, n_heads=8, n_kv_heads=G)
        state = ContiguousState({"0.mixer": mixer.state_spec()}, 3, 100, torch.float32)
        sizes[G] = state.payload_bytes
        assert sizes[G] == 3 * 100 * 2 * G * 8 * 4  # rows, tokens, k and v, heads, width, bytes
    assert sizes[8] == 4 * sizes[2] == 8 * sizes[1]


def test_a_window_holds_a_constant_state():
    mixer = attention(n_heads=2, window=5)
    sizes = [ContiguousState({"0": mixer.state_spec()}, 1, n, torch.float32).payload_bytes for n in (10, 1000)]
    assert sizes[0] == sizes[1] == 5 * 2 * 16 * 4


@torch.no_grad()
def test_a_window_wider_than_the_context_holds_no_more_than_the_context():
    """A ring of 262144 entries for 7 tokens is memory for nothing; the window acts all the same where it can."""
    wide, narrow = attention(n_heads=2, window=262144), attention(n_heads=2, window=32)  # max_seq_len is 32
    for mixer in (wide, narrow):
        state = ContiguousState({"0": mixer.state_spec()}, 1, 7, torch.float32)
        assert state.payload_bytes == 7 * 2 * 16 * 4
    x = random(1, 40, 16)
    state = ContiguousState({"0": narrow.state_spec()}, 1, 40, torch.float64)
    parts, start = [], 0
    for n in (20, 1, 15, 4):
        ctx = state.begin(Inputs(torch.zeros(1, n, dtype=torch.long)))
        parts.append(narrow(x[:, start : start + n], ctx, state.layer("0"))[0])
        start += n
    full = attention(n_heads=2)
    full.load_state_dict(narrow.state_dict())
    wanted = narrow(x, context(1, 40))[0]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(wanted[:, -1], full(x, context(1, 40))[0][:, -1], atol=1e-6)


# ----------------------------------------------------------------------------------------------- dropout


@pytest.mark.rows("B10")
@pytest.mark.parametrize("n_queries", [1, 6])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
@pytest.mark.parametrize("backend", ATTENDS)
def test_trap_e12_dropout_acts_on_the_probabilities_after_the_softmax(backend, n_kv_heads, n_queries):
    """The note feeds dropped weights to the softmax, which comes before. What is kept is 1 / (1 - p) times what it was.

    Rows no longer add up to one.
    """
    q, k = random(4, 2, n_queries, 8), random(4, n_kv_heads, 6, 8, seed=1)
    v = torch.eye(6, dtype=torch.float64).expand(4, n_kv_heads, 6, 6)
    weights = attention_weights(q, k, None)
    torch.manual_seed(0)
    dropped = ATTENDS[backend](q, k, v, dropout=0.25)  # with the identity as values the output is the weights
    kept = dropped != 0
    assert 0.5 < float(kept.double().mean()) < 0.95
    torch.testing.assert_close(dropped[kept], (weights / 0.75)[kept], rtol=1e-9, atol=0)
    assert not torch.allclose(dropped.sum(-1), torch.ones(()).double())


@pytest.mark.rows("B10")
@pytest.mark.parametrize("backend", ATTENDS)
def test_dropout_keeps_the_expectation_and_is_off_in_evaluation(backend):
    mixer, x = attention(n_heads=2, dropout=0.4, backend=backend), random(1, 4, 16)
    calm = attention(n_heads=2, backend=backend)(x, context(1, 4))[0]
    mixer.eval()
    assert torch.equal(mixer(x, context(1, 4))[0], mixer(x, context(1, 4))[0])
    torch.testing.assert_close(mixer(x, context(1, 4))[0], calm, rtol=0, atol=1e-12)
    mixer.train()
    torch.manual_seed(1)
    many = mixer(x.expand(4000, 4, 16), context(4000, 4))[0]
    error = many.detach().std(0) / 4000**0.5
    assert float(error.max()) > 0
    assert bool(((many.mean(0, keepdim=True) - calm).abs() < 5 * error + 1e-12).all())


@pytest.mark.rows("B10")
def test_the_second_place_of_dropout_is_the_branch_before_it_is_added():
    """With everything dropped but the residual, the block is the identity; in evaluation nothing is dropped."""
    config = {"mixer": {"kind": "attention", "n_heads": 2}, "channel": None, "dropout": 0.5}
    block = Block(BlockConfig.model_validate(config), NoNorm.Config(), Dims(16, 1, 32)).double()
    randomise(block, 0)
    x, ctx = random(1, 4, 16).expand(3000, 4, 16), context(3000, 4)
    calm = block.eval()(x[:1], context(1, 4))[0] - x[:1]
    torch.manual_seed(0)
    branch = (block.train()(x, ctx)[0] - x).detach()
    kept = branch != 0
    assert 0.45 < float(kept.double().mean()) < 0.55
    torch.testing.assert_close(branch[kept], (2 * calm).expand_as(branch)[kept], rtol=1e-9, atol=1e-12)
    assert bool(((branch.mean(0) - calm).abs() < 5 * branch.std(0) / 3000**0.5).all())


# -------------------------------------------------------------------------------- what a query may not read


@pytest.mark.rows("B3")
@pytest.mark.parametrize("backend", ATTENDS)
def test_a_query_that_may_read_nothing_gets_zeros_and_finite_gradients(backend):
    """Hidden scores are -inf before the softmax; over nothing else that would be NaN."""
    q, k, v = (random(2, 2, 4, 8, seed=s).requires_grad_() for s in range(3))
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    mask[0, 0, 2] = False
    y = ATTENDS[backend](q, k, v, mask)
    assert bool((y[0, :, 2] == 0).all())
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    assert bool((gradients[0][0, :, 2] == 0).all())
    seen = (q[0, :, 3] * k[0].transpose(0, 1)).sum(-1).T / 8**0.5
    torch.testing.assert_close(y[0, :, 3], (seen.softmax(-1)[:, None] @ v[0])[:, 0], rtol=0, atol=1e-12)


@pytest.mark.rows("B3")
def test_hidden_scores_weigh_exactly_nothing():
    """-inf before the softmax, not zero after it: the readable ones add up to one."""
    weights = attention_weights(random(2, 4, 6, 8), random(2, 2, 6, 8, seed=1), None, causal=True)
    assert bool((weights.triu(1) == 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6).double(), rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------- the maps


@pytest.mark.rows("B11")
@pytest.mark.parametrize("backend", ["auto", "plain", "tiled"])
def test_the_map_of_every_head_of_every_layer_can_be_had(backend):
    """Whatever computes the output: full, windowed and latent layers, grouped heads, sinks, padding on the left."""
    mixers = {
        "grouped": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "backend": backend},
        "window": {"kind": "attention", "n_heads": 4, "window": 3, "backend": backend},
        "sinks": {"kind": "attention", "n_heads": 4, "sinks": True, "backend": backend},
        "latent": {"kind": "mla", "n_heads": 4, "rope_dim": 4, "backend": backend},
    }
    model = build(
        Decoder.Config.model_validate(
            {"d_model": 16, "n_layers": 4, "vocab_size": 19, "max_seq_len": 16,
             "blocks": {name: {"mixer": mixer} for name, mixer in mixers.items()}}
        )
    ).double()  # fmt: skip
    randomise(model, 0)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :2] = False
    tokens = torch.randint(19, (2, 7))
    out = model(Inputs(tokens, valid=valid), needs=("attention", "logits"))
    assert [tuple(m.shape) for m in out.attention] == [(2, 4, 7, 7)] * 4
    readable = torch.ones(7, 7).tril()[None, None].double() * valid[:, None, None]
    for name, weights in zip(mixers, out.attention, strict=True):
        own = weights * valid[:, None, :, None]
        assert bool((own * (1 - readable) == 0).all()), name
        total = weights.sum(-1).transpose(1, 2)[valid]
        assert bool((total < 1).all()) if name == "sinks" else torch.allclose(total, torch.ones(()).double()), name
    assert bool((out.attention[1].tril(-3)[0] == 0).all())
    plain = model(Inputs(tokens, valid=valid)).logits  # asking changes nothing
    torch.testing.assert_close(plain[valid], out.logits[valid], rtol=0, atol=1e-12)
    state = model.new_state(2, 8)
    parts = [model(Inputs(part), state, ("attention",)).attention for part in tokens.split([6, 1], 1)]
    whole = model(Inputs(tokens), needs=("attention",)).attention
    for layer in (0, 2, 3):  # a ring has other columns
        torch.testing.assert_close(parts[1][layer], whole[layer][:, :, -1:], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------- sinks, gates and ablations


def test_a_sink_takes_its_share_and_gives_nothing():
    x, mixer, none = random(2, 6, 16), attention(n_heads=2, sinks=True), attention(n_heads=2)
    none.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if name != "sinks"})
    with torch.no_grad():
        mixer.sinks.fill_(-math.inf)
        torch.testing.assert_close(mixer(x, context(2, 6))[0], none(x, context(2, 6))[0], rtol=0, atol=1e-12)
        mixer.sinks.fill_(1e4)
        assert float(mixer(x, context(2, 6))[0].abs().max()) < 1e-12
        mixer.sinks.copy_(torch.tensor([0.3, -0.2]))
    ctx = context(2, 6)
    ctx.record = frozenset({"attention"})
    mixer(x, ctx)
    q, k = (p(x).view(2, 6, 2, 8).transpose(1, 2) for p in (mixer.q, mixer.k))
    shares = (q @ k.transpose(2, 3) / 8**0.5).exp().tril()
    wanted = shares / (shares.sum(-1, keepdim=True) + mixer.sinks.exp().view(2, 1, 1))
    torch.testing.assert_close(ctx.recorded["attention"][0], wanted, rtol=0, atol=1e-12)


@pytest.mark.rows("B12")
@pytest.mark.parametrize(("gate", "widths"), [("head", 4), ("channel", 16)])
def test_a_third_matrix_as_a_gate(gate, widths):
    x, mixer, open_ = random(2, 6, 16), attention(n_heads=4, gate=gate), attention(n_heads=4)
    open_.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if "gate" not in name})
    assert mixer.predicted_parameters() - open_.predicted_parameters() == 16 * widths
    read = []
    open_.o.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    open_(x, context(2, 6))
    factors = (x @ mixer.gate.weight.T).sigmoid().repeat_interleave(16 // widths, -1)
    torch.testing.assert_close(mixer(x, context(2, 6))[0], mixer.o(read[0] * factors), rtol=0, atol=1e-12)


@pytest.mark.rows("B12")
def test_queries_as_keys_score_alike_in_both_directions():
    """The kernel of the scores is then symmetric: what i thinks of j is what j thinks of i, before the mask."""
    x, tied = random(1, 5, 16), attention(n_heads=2, keys="query")
    assert tied.k is None
    own = attention(n_heads=2)
    own.load_state_dict(tied.state_dict() | {"k.weight": tied.q.weight})
    torch.testing.assert_close(tied(x, context(1, 5))[0], own(x, context(1, 5))[0], rtol=0, atol=1e-12)
    assert tied.predicted_parameters() == own.predicted_parameters() - 16 * 16


@pytest.mark.rows("B12")
def test_without_keys_of_their_own_queries_meet_the_values():
    x, mixer, own = (
        random(1, 5, 16),
        attention(n_heads=4, n_kv_heads=2, keys="value"),
        attention(n_heads=4, n_kv_heads=2),
    )
    own.load_state_dict(mixer.state_dict() | {"k.weight": mixer.v.weight})
    torch.testing.assert_close(mixer(x, context(1, 5))[0], own(x, context(1, 5))[0], rtol=0, atol=1e-12)


@pytest.mark.rows("B12")
def test_without_a_value_matrix_x_itself_is_read():
    x, mixer, own = random(1, 5, 16), attention(n_heads=4, values="input"), attention(n_heads=4)
    own.load_state_dict(mixer.state_dict() | {"v.weight": torch.eye(16).double()})
    torch.testing.assert_close(mixer(x, context(1, 5))[0], own(x, context(1, 5))[0], rtol=0, atol=1e-12)


@pytest.mark.rows("B12")
def test_trap_e14_a_value_matrix_of_low_rank_is_a_choice():
    """The note says W_V = W_down W_up always; it is only so where ``v_rank`` makes it so, with fewer parameters."""
    x, mixer, own = random(1, 5, 16), attention(n_heads=4, v_rank=3), attention(n_heads=4)
    product = mixer.v.weight @ mixer.v_down.weight
    own.load_state_dict({n: w for n, w in mixer.state_dict().items() if n != "v_down.weight"} | {"v.weight": product})
    torch.testing.assert_close(mixer(x, context(1, 5))[0], own(x, context(1, 5))[0], rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(product) == 3 < torch.linalg.matrix_rank(attention(n_heads=4).v.weight)
    assert mixer.predicted_parameters() == own.predicted_parameters() - 16 * 16 + 3 * (16 + 16)


# ------------------------------------------------------------------------------------------ configuration


def test_heads_must_divide():
    with pytest.raises(ValueError, match="use 1, 2, 4, 8"):
        Attention.Config(n_heads=8, n_kv_heads=3)


def test_fully_padded_rows_are_finite():
    mixer, x = attention(n_heads=2), random(2, 3, 16)
    valid = torch.tensor([[True, True, True], [False, False, False]])
    for backend in ATTENDS.values():
        mixer.attend = backend
        assert bool(torch.isfinite(mixer(x, context(2, 3, valid=valid))[0]).all())
