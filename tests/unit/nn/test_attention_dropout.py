"""Dropout inside the attention kernel: against plain attention in fp64 under the same mask, whatever the path."""

from __future__ import annotations

import ctypes

import pytest
import torch
from attention_cases import HEADS, KINDS, context, got, tensors, wanted, worst
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from octavo.errors import UnsupportedError
from octavo.nn.attention import Attention
from octavo.nn.contracts import Dims
from octavo.nn.dropout import draw_seed
from octavo.nn.kernels import attention as kernel
from octavo.nn.kernels import build
from octavo.nn.latent import LatentAttention

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

LENGTHS = (1, 2, 15, 33, 97, 130, 257)
WIDTHS = (32, 40, 64, 34, 128, 7, 96)


@pytest.fixture(autouse=True)
def _as_found():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def both(given: list[Tensor], ctx, window: int | None, scale: float, p: float):  # type: ignore[no-untyped-def]
    """The kernel's answer and plain attention's, from the same state of the generator."""
    first = ctx.first_keys(window)
    torch.manual_seed(5)
    ours = got(*given, first, scale, p)
    torch.manual_seed(5)
    return ours, wanted(*given, ctx, window, scale, p)


@pytest.mark.rows("B10")
@pytest.mark.parametrize("T", LENGTHS)
def test_output_and_gradients_equal_plain_attention_under_the_same_mask(T):
    """Every kind of row at every length; widths, heads and probabilities take turns."""
    for turn, kind in enumerate(KINDS):
        (H, G), K = HEADS[(LENGTHS.index(T) + turn) % len(HEADS)], WIDTHS[(3 * turn + LENGTHS.index(T)) % len(WIDTHS)]
        ctx, window = context(2, T, kind)
        ours, true = both(tensors(2, T, H, G, K), ctx, window, K**-0.5, (0.2, 0.5, 0.05)[turn % 3])
        assert worst(ours, true, floor=1.0) < 2e-6, f"{kind} {H=} {G=} {K=}"


@pytest.mark.parametrize("T", [1, 33, 97])
def test_bf16_drops_the_same_and_rounds_once(T):
    for kind in ("causal", "all"):
        ctx, window = context(2, T, kind)
        ours, true = both(tensors(2, T, 4, 2, 64, torch.bfloat16), ctx, window, 0.125, 0.2)
        assert worst(ours, true, floor=1.0) < 4e-3, kind


@pytest.mark.parametrize("T", [1, 33, 129, 300])
def test_tiles_drop_the_same(T, monkeypatch):
    library: ctypes.CDLL = build.load(build.build(emulated=True))
    assert library.attention_tiles() == 1
    monkeypatch.setattr(build, "attempt", lambda: (library, ""))
    for turn, kind in enumerate(("causal", "documents", "window", "all")):
        (H, G), K = HEADS[(T + turn) % len(HEADS)], (64, 40, 34, 96)[turn]
        ctx, window = context(1, T, kind)
        ours, true = both(tensors(1, T, H, G, K, torch.bfloat16), ctx, window, K**-0.5, 0.3)
        assert worst(ours, true, floor=1.0) < 7e-3, f"{kind} {H=} {G=} {K=}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "H", "G", "T"), [(1, 1, 1, 300), (1, 8, 2, 257), (3, 3, 3, 100)])
def test_every_number_of_threads_gives_the_same_bits(B, H, G, T, dtype):
    given = tensors(B, T, H, G, 40, dtype)
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        torch.manual_seed(1)
        results.append(got(*given, None, 0.2, 0.2))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_what_a_query_drops_depends_on_no_other_row_token_or_gradient():
    q, k, v, _ = tensors(3, 200, 4, 2, 32)
    seed = draw_seed()
    run = lambda q, k, v: torch.ops.octavo.attention(q, k, v, None, 0.2, seed, 0.4)[0]  # noqa: E731
    whole = run(q, k, v)
    assert torch.equal(run(q[:1], k[:1], v[:1]), whole[:1])  # fewer rows
    torch.testing.assert_close(run(q[:, :, :77], k[:, :, :77], v[:, :, :77]), whole[:, :, :77])  # fewer tokens
    other = torch.ops.octavo.attention(q, k, v, None, 0.2, seed + 1, 0.4)[0]
    assert not torch.allclose(other, whole)


def bilinear(q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float]:
    """<out, g> from the forward and <v, dv> from the backward: equal if both dropped the same weights."""
    v = v.detach().requires_grad_()
    g = torch.randn_like(q)
    out = checkpoint(lambda v: kernel.causal(q, k, v, dropout=0.5), v, use_reentrant=False)
    (slope,) = torch.autograd.grad(out, v, g)
    return float((out * g).sum().detach()), float((v * slope).sum().detach())


def test_computing_again_drops_the_same():
    q, k, v, _ = tensors(2, 50, 2, 2, 16)
    forward, backward = bilinear(q, k, v)
    assert forward == pytest.approx(backward, rel=1e-4) and abs(forward) > 1e-2


def test_the_operation_keeps_the_rules_of_torch():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, grad = (x.requires_grad_() for x in tensors(2, 9, 4, 2, 16, dtype))
        seed = draw_seed()
        torch.library.opcheck(torch.ops.octavo.attention, (q, k, v, None, 0.25, seed, 0.3))
        out, lse = (x.detach() for x in torch.ops.octavo.attention(q, k, v, None, 0.25, seed, 0.3))
        given = [x.detach() for x in (grad, q, k, v)]
        torch.library.opcheck(torch.ops.octavo.attention_gradient, (*given, None, out, lse, 0.25, seed, 0.3))


@pytest.mark.parametrize(("seed", "p"), [(True, 1.0), (True, -0.1), (True, float("nan")), (False, 0.1)])
def test_a_probability_that_is_none_is_refused(seed, p):
    q, k, v, _ = tensors(1, 4, 1, 1, 8)
    with pytest.raises(UnsupportedError, match="dropout"):
        torch.ops.octavo.attention(q, k, v, None, 0.2, draw_seed() if seed else None, p)


# ------------------------------------------------------------------------------------------- as a part of a model


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"window": 9},
        {"n_kv_heads": 2},
        {"reader": {"kind": "fixed", "stride": 4, "part": "block"}},
    ],
)
def test_training_through_the_kernel_equals_plain_attention(values):
    x, results = torch.randn(2, 60, 64), []
    ctx, _ = context(2, 60, "documents")
    for backend in ("plain", "kernel"):
        torch.manual_seed(3)
        made = Attention(Attention.Config(n_heads=4, dropout=0.3, backend=backend, **values), Dims(64, 1, 64))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        torch.manual_seed(4)
        y = made(x, ctx)[0]
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(made.parameters()))))
    assert worst(results[1], tuple(r.double() for r in results[0]), floor=1e-3) < 5e-6


@pytest.mark.parametrize("reader", [{"kind": "strided", "stride": 4, "part": "column"}, None])
def test_other_ways_through_the_kernel_drop_too(reader, monkeypatch):
    """Columns of a text as rows, and values that are not as wide as keys."""
    calls = []
    real = kernel.causal
    monkeypatch.setattr(kernel, "causal", lambda *a, **n: calls.append(n["dropout"]) or real(*a, **n))
    if reader:
        made = Attention(Attention.Config(n_heads=4, dropout=0.3, reader=reader), Dims(64, 1, 64))
    else:
        made = LatentAttention(LatentAttention.Config(n_heads=4, dropout=0.3), Dims(64, 1, 64))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    ctx, _ = context(1, 12, "causal")
    x = torch.randn(1, 12, 64)
    first, second = made(x, ctx)[0], made(x, ctx)[0]
    assert calls == [0.3, 0.3] and not torch.allclose(first, second)
    made.eval()
    assert torch.equal(made(x, ctx)[0], made(x, ctx)[0])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_that_drops_the_same_both_ways(compiler):
    q, k, v, g = tensors(2, 50, 2, 2, 16)

    def read(v: Tensor) -> Tensor:
        return kernel.causal(q, k, v, dropout=0.5) * 1.0

    def again(v: Tensor) -> Tensor:
        return checkpoint(read, v, use_reentrant=False)  # type: ignore[return-value]

    for function in (read, again):
        torch._dynamo.reset()
        leaf = v.detach().requires_grad_()
        run = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)
        torch.manual_seed(2)
        out = run(leaf)
        (slope,) = torch.autograd.grad(out, leaf, g)
        assert float((out * g).sum().detach()) == pytest.approx(float((v * slope).sum()), rel=1e-4)
        second = run(leaf)
        torch.manual_seed(2)
        assert torch.equal(run(leaf), out) and not torch.allclose(second, out)
