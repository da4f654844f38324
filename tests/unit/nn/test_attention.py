"""Attention: heads, groups, scale, dropout, and what the notes say of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.laws.subject import randomise
from octavo.nn.attend import ATTENDS, attention_weights
from octavo.nn.attention import Attention
from octavo.nn.contracts import Context, Dims, Inputs
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
def test_values_and_output_meet_in_one_block_a_head():
    """E14: W_V and W_O are per-head blocks of two matrices; the output is the sum over heads of A W_V W_O."""
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


def test_self_attention_reads_its_own_keys_and_values():
    """E15: only cross-attention reads an encoder; here all three come from the same x."""
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
def test_the_group_of_a_head_and_the_layout():
    """E19: the noted repeat_kv on (batch, seq, head) mixes axes; here head h reads key head h // (H / G)."""
    q, k = random(1, 8, 3, 4), random(1, 2, 5, 4, seed=1)
    weights = attention_weights(q, k, None)
    for h in range(8):
        wanted = (q[:, h] @ k[:, h // 4].transpose(1, 2) / 2).softmax(-1)
        torch.testing.assert_close(weights[:, h], wanted, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError):  # as printed in the note: 8 query heads against 2, on the wrong axes
        torch.matmul(random(1, 3, 8, 4), random(1, 3, 2, 4).transpose(2, 3)[:, :, None].expand(1, 3, 4, 4, 2))


class Allocated(TorchDispatchMode):
    """The largest storage that any operation created."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                size = tensor.untyped_storage().nbytes()
                if size > self.largest:
                    self.largest, self.by = size, str(function)
        return out


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
def test_dropout_acts_on_the_probabilities_after_the_softmax(backend, n_kv_heads, n_queries):
    """E12: not before it. A kept weight is 1 / (1 - p) times what it was; rows no longer add up to one."""
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
