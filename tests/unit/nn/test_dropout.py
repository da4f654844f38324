"""Dropout of activations: which numbers it drops, that they are as good as random, what a pure mask promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from octavo.nn.dropout import COLUMNS, draw_seed, dropout, dropout_of_weights, kept, plain_dropout, threshold
from octavo.nn.kernels import build

SEEDS = (0, 1, 12345678901234567, 2**62 - 1)


@pytest.fixture(autouse=True)
def _as_found():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def run(x: Tensor, seed: int, p: float) -> Tensor:
    return torch.ops.octavo.dropout(x, torch.tensor(seed), p)


def by_hand(seed: int, head: int, query: int, key: int, p: float) -> bool:
    """The definition in Python's integers, one number at a time."""
    word = 2**32 - 1

    def fold(a: int, x: int) -> int:
        x = (a + (x + 1) * 0x9E3779B9) & word
        x = (x ^ x >> 16) * 0x7FEB352D & word
        x = (x ^ x >> 15) * 0x846CA68B & word
        return x ^ x >> 16

    a, b = 1, 2
    for number in (seed & word, seed >> 32, head, query):
        a, b = fold(a, number), fold(b, number)
    x = (a + key // 2 * 0x9E3779B9) & word
    x = (x ^ x >> 16) * 0x7FEB352D & word ^ b
    x = (x ^ x >> 15) * 0x846CA68B & word
    x ^= x >> 16
    return (x >> 16 if key % 2 else x & 0xFFFF) >= round(p * 65536)


# --------------------------------------------------------------------------------------- which numbers


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_the_written_function(seed):
    mask = kept(torch.tensor(seed), 0.3, torch.arange(3)[:, None, None], torch.arange(4)[:, None], 9)
    wanted = [[[by_hand(seed, h, q, k, 0.3) for k in range(9)] for q in range(4)] for h in range(3)]
    assert mask.tolist() == wanted
    flat = run(torch.ones(2 * COLUMNS + 5), seed, 0.3) != 0
    for i in (0, 1, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 4):
        assert bool(flat[i]) == by_hand(seed, 0, i // COLUMNS, i % COLUMNS, 0.3)


def test_the_stream_never_changes():
    """A run that was begun by an older version goes on with the same numbers."""
    mask = kept(torch.tensor(987654321987654321), 0.5, torch.tensor([3]), torch.tensor([5]), 24)
    assert "".join(str(int(x)) for x in mask) == "000011010100111111010010"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 2, 31, 33, COLUMNS, COLUMNS + 1, 17 * COLUMNS + 3])
def test_kernel_and_plain_form_agree_to_the_bit(n, dtype):
    x = torch.randn(n + 1, dtype=dtype)[1:]  # not at the beginning of its memory
    for seed in SEEDS:
        ours, plain = run(x, seed, 0.2), plain_dropout(x, torch.tensor(seed), 0.2)
        assert ours.dtype == dtype and torch.equal(ours, plain)


def test_the_order_of_the_mask_is_that_of_the_indices():
    x = torch.randn(6, 10, 4)
    assert torch.equal(run(x.transpose(0, 2), 3, 0.4), run(x.transpose(0, 2).contiguous(), 3, 0.4))
    assert run(x.transpose(0, 2), 3, 0.4).is_contiguous()
    assert torch.equal(run(x, 3, 0.4).flatten(), run(x.flatten(), 3, 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 33, 17 * COLUMNS + 3])
def test_a_sum_with_something_else_is_the_same_to_the_bit(n, dtype):
    """Kernel and plain form; what is added gets the whole gradient."""
    x, other, grad = (torch.randn(n, dtype=dtype) for _ in range(3))
    leaves = x.requires_grad_(), other.requires_grad_()
    y = torch.ops.octavo.dropout(*leaves[:1], torch.tensor(9), 0.2, other)
    assert torch.equal(y, plain_dropout(x, torch.tensor(9), 0.2, other))
    # bf16 is rounded once, so the sum of two roundings may lie a unit beside
    torch.testing.assert_close(y, other + run(x, 9, 0.2), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)
    slopes = torch.autograd.grad(y, leaves, grad)
    assert torch.equal(slopes[0], run(grad, 9, 0.2)) and torch.equal(slopes[1], grad)


def test_sums_of_all_kinds():
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(dropout(x, 0.5, False, other), x + other) and torch.equal(dropout(x, 0.0, onto=other), x + other)
    for onto in (other, other[:1], other.double(), other.T.contiguous().T):  # the same, another shape, dtype, order
        torch.manual_seed(1)
        y = dropout(x, 0.5, onto=onto)
        torch.manual_seed(1)
        torch.testing.assert_close(y, dropout(x, 0.5) + onto)


def test_what_is_kept_grows_so_that_the_mean_stays():
    for p in (0.5, 0.25, 0.1, 0.9):
        y = run(torch.full((1000,), 3.0), 1, p)
        assert set(y.tolist()) == {0.0, y.max().item()}
        assert y.max().item() == pytest.approx(3 / (1 - p), rel=2e-4)
        assert y.max().item() == pytest.approx(3 / (1 - threshold(p) / 65536), rel=1e-6)  # the p that is really used
    assert threshold(1 - 1e-9) == 65535 and threshold(1e-9) == 0
    assert torch.isfinite(run(torch.ones(70000), 2, 1 - 1e-9)).all()
    assert torch.equal(run(torch.arange(9.0), 2, 1e-9), torch.arange(9.0))


def test_what_is_dropped_is_zero_whatever_it_was():
    x = torch.full((100,), math.inf)
    x[::2] = math.nan
    dropped = run(torch.ones(100), 4, 0.5) == 0
    y = run(x, 4, 0.5)
    assert bool((y[dropped] == 0).all()) and not torch.isfinite(y[~dropped]).any()


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_every_number_of_threads_gives_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        x, results = torch.randn(70 * COLUMNS + 77, dtype=dtype), []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(x, 8, 0.2))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_without_a_kernel_the_numbers_are_the_same(monkeypatch):
    x = torch.randn(3, 700)
    with_kernel = run(x, 6, 0.2)
    monkeypatch.setattr(build, "attempt", lambda: (None, "no C++ compiler found on PATH"))
    assert torch.equal(run(x, 6, 0.2), with_kernel)


# --------------------------------------------------------------------------------------- as good as random


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """How many standard deviations the statistic lies from what chance gives it."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_everywhere_as_many_are_dropped_as_asked(p):
    """By key, by query and by head: each count is binomial, and they scatter neither more nor less than that."""
    mask = kept(torch.tensor(77), p, torch.arange(64)[:, None, None], torch.arange(128)[:, None], 256).double()
    true = 1 - threshold(p) / 65536
    assert abs(float(mask.mean()) - true) < 4 * (true * (1 - true) / mask.numel()) ** 0.5
    for axes in ((0, 1), (0, 2), (1, 2)):
        counts = mask.sum(axes)
        n = mask.numel() / counts.numel()
        z = (counts - n * true) / (n * true * (1 - true)) ** 0.5
        statistic = (float(z.square().sum()) - len(z)) / (2 * len(z)) ** 0.5
        assert abs(statistic) < 4, axes


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_neighbours_are_independent(p):
    """The next key, both halves of a draw, the next query, head and seed: all four cases as often as for two coins."""
    heads, queries = torch.arange(32)[:, None, None], torch.arange(128)[:, None]
    mask, other = (kept(torch.tensor(seed), p, heads, queries, 256) for seed in (4, 5))
    pairs = {
        "halves of a draw": (mask[..., 0::2], mask[..., 1::2]),
        "draws": (mask[..., 1:-1:2], mask[..., 2::2]),
        "low halves": (mask[..., 0:-2:2], mask[..., 2::2]),
        "queries": (mask[:, :-1], mask[:, 1:]),
        "diagonal": (mask[:, :-1, :-1], mask[:, 1:, 1:]),
        "heads": (mask[:-1], mask[1:]),
        "seeds": (mask, other),
        "high seeds": (mask, kept(torch.tensor(4 + 2**32), p, heads, queries, 256)),
    }
    keep = 1 - threshold(p) / 65536
    chances = torch.tensor([(1 - keep) ** 2, keep * (1 - keep), keep * (1 - keep), keep**2], dtype=torch.float64)
    for name, (a, b) in pairs.items():
        counts = torch.bincount((a.long() * 2 + b.long()).flatten(), minlength=4).double()
        assert chi_square(counts, chances * a.numel()) < 6, name


def test_words_of_eight_neighbours_are_uniform():
    for seed in (0, 1, 2, 99):
        mask = kept(torch.tensor(seed), 0.5, torch.zeros(1, 1).long(), torch.arange(512)[:, None], 1024)
        words = (mask.view(-1, 8).long() * 2 ** torch.arange(8)).sum(-1)
        counts = torch.bincount(words, minlength=256).double()
        assert abs(chi_square(counts, torch.full((256,), len(words) / 256, dtype=torch.float64))) < 5, seed


def test_the_mean_of_what_comes_out_is_what_went_in():
    x = torch.rand(400_000) + 1
    assert float(run(x, 11, 0.2).mean()) == pytest.approx(float(x.mean()), rel=5 * (0.25 / 400_000) ** 0.5)
    weights = torch.full((4, 8, 64, 64), 1 / 64)
    y = dropout_of_weights(weights, torch.tensor(3), 0.2).sum(-1)
    assert float(y.mean()) == pytest.approx(1.0, abs=5 * (0.25 / weights.numel()) ** 0.5)


# --------------------------------------------------------------------------------------- in training


def test_off_in_evaluation_and_at_zero():
    x = torch.randn(5)
    assert dropout(x, 0.5, False) is x and dropout(x, 0.0) is x
    before = torch.get_rng_state()
    dropout(x, 0.5, False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_is_one_draw_from_the_generator():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second, state = dropout(x, 0.5), dropout(x, 0.5), torch.get_rng_state()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert torch.equal(run(x, int(draw_seed()), 0.5), second) and torch.equal(torch.get_rng_state(), state)


def test_the_gradient_has_the_same_mask():
    x = torch.randn(3, 1000, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.3)
    (slope,) = torch.autograd.grad((y * y).sum() / 2, x, create_graph=True)
    scale = 1 / (1 - threshold(0.3) / 65536)
    torch.testing.assert_close(slope, y.detach() * scale)
    (again,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(again, (y != 0).double() * scale**2)


def test_nothing_but_the_seed_is_kept_for_the_backward():
    kept_sizes = []
    pack = lambda t: kept_sizes.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dropout(torch.randn(10_000, requires_grad=True), 0.3)
    assert kept_sizes == [1]


def test_the_operation_keeps_the_rules_of_torch():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 33, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.octavo.dropout, (x, draw_seed(), 0.3))
        torch.library.opcheck(torch.ops.octavo.dropout, (x, draw_seed(), 0.3, torch.randn_like(x)))
    meta = dropout(torch.empty(3, 4, device="meta"), 0.3)
    assert meta.shape == (3, 4) and meta.device.type == "meta"


def test_computing_again_drops_the_same():
    x = torch.randn(2000, requires_grad=True)
    y = checkpoint(lambda x: dropout(x, 0.5) * 1.0, x, use_reentrant=False)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x * slope)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_that_drops_the_same_both_ways(compiler):
    def twice(x: Tensor) -> Tensor:
        return dropout(dropout(x, 0.5).sin(), 0.5, onto=x).cos()

    def again(x: Tensor) -> Tensor:
        return checkpoint(twice, x, use_reentrant=False)  # type: ignore[return-value]

    for function in (twice, again):
        torch._dynamo.reset()
        x = torch.rand(2000, requires_grad=True)
        compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
        torch.manual_seed(4)
        y = compiled(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        z = x.detach()
        either, both = -torch.sin(z), -torch.sin(z + 2 * (2 * z).sin()) * (1 + 4 * (2 * z).cos())
        dropped = (y.detach() - z.cos()).abs() < 1e-6
        assert 0.65 < float(dropped.float().mean()) < 0.85
        torch.testing.assert_close(slope, torch.where(dropped, either, both), rtol=1e-4, atol=1e-4)
        second = compiled(x)
        torch.manual_seed(4)
        assert torch.equal(compiled(x), y) and not torch.equal(second, y)
