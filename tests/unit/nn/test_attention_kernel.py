"""The attention kernel: its numbers against plain attention in fp64, its independence of threads, its building."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attention_cases import HEADS, KINDS, LENGTHS, WIDTHS, context, got, grads, tensors, wanted, worst
from torch import Tensor

from octavo.errors import UnsupportedError
from octavo.nn import attend
from octavo.nn.attend import plain
from octavo.nn.attention import Attention, use_backend
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.kernels import attention as kernel
from octavo.nn.kernels import build
from octavo.nn.state import place

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _as_found():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("T", LENGTHS)
def test_output_and_gradients_equal_plain_attention(T):
    """Every kind of row at every length; widths and head counts take turns, so that every pair meets somewhere."""
    for turn, kind in enumerate(KINDS):
        index = LENGTHS.index(T) + turn
        (H, G), K = HEADS[index % len(HEADS)], WIDTHS[(3 * turn + LENGTHS.index(T)) % len(WIDTHS)]
        q, k, v, grad = tensors(2, T, H, G, K)
        ctx, window = context(2, T, kind)
        scale = K**-0.5 * (1 + turn % 3)
        ours = got(q, k, v, grad, ctx.first_keys(window), scale)
        true = wanted(q, k, v, grad, ctx, window, scale)
        error = worst(ours, true, floor=1.0)
        assert error < 2e-6, f"{kind} {H=} {G=} {K=}: {error}"


@pytest.mark.parametrize("K", [*WIDTHS, 2, 6, 7, 34])
def test_any_width_of_a_head(K):
    q, k, v, grad = tensors(1, 70, 2, 1, K)
    ctx, _ = context(1, 70, "causal")
    ours, true = got(q, k, v, grad, None, 0.3), wanted(q, k, v, grad, ctx, None, 0.3)
    assert worst(ours, true, floor=1.0) < 2e-6


@pytest.mark.parametrize("T", [1, 33, 64, 129, 257])
def test_bf16_is_computed_in_fp32_and_rounded_once(T):
    for kind in ("causal", "documents", "all"):
        q, k, v, grad = tensors(2, T, 8, 2, 64, torch.bfloat16)
        ctx, window = context(2, T, kind)
        ours = got(q, k, v, grad, ctx.first_keys(window), 0.125)
        true = wanted(q, k, v, grad, ctx, window, 0.125)
        assert all(x.dtype == torch.bfloat16 for x in ours)
        assert worst(ours, true, floor=1.0) < 4e-3, kind
        assert worst(ours[:1], true[:1], floor=1.0) < 2.2e-3, kind  # half a unit of 8 bits, root mean square 1.7e-3


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_say_what_the_mask_says(kind):
    B, T = 4, 50
    ctx, window = context(B, T, kind)
    first, order = ctx.first_keys(window), torch.arange(T)
    readable = (first[:, :, None] <= order) & (order <= order[:, None]) & ctx.valid[:, None, :]
    allowed = ctx.mask(ctx.keys, window=window)[:, 0]
    assert torch.equal(readable & ctx.valid[:, :, None], allowed & ctx.valid[:, :, None])
    assert torch.equal(first < 0, ~ctx.valid) and first.dtype == torch.int32
    assert ctx.first_keys(window) is first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "H", "G", "T"), [(1, 1, 1, 300), (1, 4, 1, 193), (1, 8, 2, 512), (3, 3, 3, 100)])
def test_every_number_of_threads_gives_the_same_bits(B, H, G, T, dtype):
    q, k, v, grad = tensors(B, T, H, G, 40, dtype)
    ctx, window = context(B, T, "documents")
    for first in (None, ctx.first_keys(window)):
        results = []
        for n in (1, 2, 2, 5):
            torch.set_num_threads(n)
            results.append(got(q, k, v, grad, first, 0.2))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strides_are_taken_as_they_come():
    B, T, H, G, K = 2, 37, 4, 2, 32
    fused = torch.randn(B, T, (H + 2 * G) * K)  # q, k and v out of one product
    q, k, v = (x.unflatten(2, (-1, K)).transpose(1, 2) for x in fused.split([H * K, G * K, G * K], 2))
    heads_first = torch.randn(B, H, T, K)
    slow_last = torch.randn(B, H, K, T).transpose(2, 3)
    for grad in (heads_first, slow_last, torch.ones(1).expand(B, H, T, K)):
        plain_copy = [x.contiguous() for x in (q, k, v, grad)]
        ours, copied = got(q, k, v, grad, None, 0.2), got(*plain_copy, None, 0.2)
        assert all(torch.equal(a, b) for a, b in zip(ours, copied, strict=True))


def test_what_stands_on_padding_changes_nothing():
    q, k, v, grad = tensors(2, 40, 4, 2, 32)
    ctx, window = context(2, 40, "all")
    first = ctx.first_keys(window)
    clean = got(q, k, v, grad, first, 0.2)
    for x in (q, k, v, grad):
        x.masked_fill_(~ctx.valid[:, None, :, None], float("nan"))
    dirty = got(q, k, v, grad, first, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    hidden = ~ctx.valid[:, None, :, None].expand_as(q)
    assert hidden.any() and not dirty[0][hidden].any() and not dirty[1][hidden].any()


def test_numbers_that_are_not_finite_stay_visible():
    q, k, v, grad = tensors(1, 20, 1, 1, 16)
    k[0, 0, 10, 3] = float("nan")
    y, dq, *_ = got(q, k, v, grad, None, 0.25)
    assert y[0, 0, :10].isfinite().all() and y[0, 0, 10:].isnan().all() and dq[0, 0, 10:].isnan().all()


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 1e4])
def test_scores_of_any_size_keep_their_softmax(size):
    q, k, v, grad = tensors(1, 100, 2, 1, 32)
    ctx, _ = context(1, 100, "causal")
    ours, true = got(q * size, k, v, grad, None, 0.2), wanted(q * size, k, v, grad, ctx, None, 0.2)
    # A score of size s is known to s units in the last place, so its exponential is too.
    assert worst(ours[:1], true[:1], floor=1.0) < 2e-6 * max(1.0, size)


def test_the_operation_keeps_the_rules_of_torch():
    for dtype, first in ((torch.float32, torch.zeros(2, 9, dtype=torch.int32)), (torch.bfloat16, None)):
        q, k, v, grad = (x.requires_grad_() for x in tensors(2, 9, 4, 2, 16, dtype))
        torch.library.opcheck(torch.ops.octavo.attention, (q, k, v, first, 0.25))
        out, lse = (x.detach() for x in torch.ops.octavo.attention(q, k, v, first, 0.25))
        given = [x.detach() for x in (grad, q, k, v)]
        torch.library.opcheck(torch.ops.octavo.attention_gradient, (*given, first, out, lse, 0.25))


def test_there_is_no_second_derivative_and_none_of_the_sum():
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 5, 1, 1, 8))
    (slope,) = torch.autograd.grad(kernel.causal(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(slope.sum(), q)
    out, lse = torch.ops.octavo.attention(q, k, v, None, 0.3)
    assert out.requires_grad and not lse.requires_grad


def test_no_rows_no_tokens():
    for B, T in ((0, 4), (2, 0)):
        q, k, v, grad = tensors(B, T, 2, 1, 8)
        assert [x.shape for x in got(q, k, v, grad, None, 0.3)] == [x.shape for x in (q, q, k, v)]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(k=a["k"][:, :, :-1]),
        lambda a: a.update(k=a["k"][..., :-2], v=a["v"][..., :-2]),
        lambda a: a.update(q=a["q"][:, :3]),
        lambda a: a.update(q=a["q"][0], k=a["k"][0], v=a["v"][0]),
        lambda a: a.update(k=a["k"][:1], v=a["v"][:1]),
        lambda a: a.update(v=a["v"].bfloat16()),
        lambda a: a.update(q=a["q"].double(), k=a["k"].double(), v=a["v"].double()),
        lambda a: a.update(k=a["k"][:, :0], v=a["v"][:, :0]),
        lambda a: a.update(q=a["q"][..., :0], k=a["k"][..., :0], v=a["v"][..., :0]),
        lambda a: a.update(first=a["first"].long()),
        lambda a: a.update(first=a["first"][:, :-1]),
        lambda a: a.update(scale=0.0),
        lambda a: a.update(scale=float("nan")),
    ],
)
def test_what_does_not_fit_is_refused(change):
    q, k, v, _ = tensors(2, 6, 4, 2, 8)
    given = {"q": q, "k": k, "v": v, "first": torch.zeros(2, 6, dtype=torch.int32), "scale": 0.3}
    kernel.causal(**given)
    change(given)
    with pytest.raises(UnsupportedError):
        kernel.causal(**given)


def test_first_keys_of_any_value_are_safe():
    q, k, v, grad = tensors(1, 50, 1, 1, 16)
    first = torch.randint(-(2**31), 2**31 - 1, (1, 50), dtype=torch.int64).int()
    first[0, ::3] = torch.randint(0, 50, (17,)).int()  # in no order; some after their own token
    ours = got(q, k, v, grad, first, 0.25)
    order = torch.arange(50)
    mask = (first[0, :, None] <= order) & (order <= order[:, None]) & (first[0, :, None] >= 0) & (first[0] >= 0)
    some = mask.any(1)
    leaves = tuple(x.double().requires_grad_() for x in (q, k, v))
    y = plain(*leaves, (mask | ~some[:, None])[None, None], scale=0.25)
    true = grads(torch.where(some[:, None], y, 0), leaves, grad.double())
    assert some.any() and not some.all() and worst(ours, true, floor=1.0) < 2e-6


# ------------------------------------------------------------------------------------------- AMX tiles, emulated


@pytest.fixture(scope="module")
def emulated_library() -> ctypes.CDLL:
    return build.load(build.build(emulated=True))


@pytest.fixture
def emulated(emulated_library, monkeypatch) -> ctypes.CDLL:
    assert emulated_library.attention_tiles() == 1
    monkeypatch.setattr(build, "attempt", lambda: (emulated_library, ""))
    return emulated_library


@pytest.mark.parametrize("T", [1, 31, 33, 64, 129, 257, 300])
def test_tiles_equal_plain_attention(T, emulated):
    for turn, kind in enumerate(KINDS):
        (H, G), K = HEADS[(T + turn) % len(HEADS)], (64, 32, 40, 128, 96, 34, 64)[turn]
        q, k, v, grad = tensors(1, T, H, G, K, torch.bfloat16)
        ctx, window = context(1, T, kind)
        ours = got(q, k, v, grad, ctx.first_keys(window), K**-0.5)
        true = wanted(q, k, v, grad, ctx, window, K**-0.5)
        assert worst(ours, true, floor=1.0) < 5e-3, f"{kind} {H=} {G=} {K=}"


def test_tiles_give_the_same_bits_for_every_number_of_threads(emulated):
    q, k, v, grad = tensors(1, 300, 4, 1, 40, torch.bfloat16)
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(got(q, k, v, grad, None, 0.2))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_tiles_do_not_read_what_stands_on_padding(emulated):
    q, k, v, grad = tensors(1, 70, 2, 1, 32, torch.bfloat16)
    ctx, window = context(1, 70, "all")
    clean = got(q, k, v, grad, ctx.first_keys(window), 0.2)
    for x in (q, k, v, grad):
        x.masked_fill_(~ctx.valid[:, None, :, None], float("nan"))
    dirty = got(q, k, v, grad, ctx.first_keys(window), 0.2)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_the_emulated_unit_computes_as_documented(emulated):
    """TDPBF16PS: even and odd pairs summed apart by fused steps, then added, then added to what was there."""
    a = torch.randn(16, 32).mul(torch.logspace(-3, 3, 32)).bfloat16()
    b = torch.randn(16, 32).bfloat16()  # row k: the pairs (2k, 2k + 1) of 16 columns
    c = torch.randn(16, 16)
    even, odd = torch.zeros(16, 16), torch.zeros(16, 16)
    for k in range(16):  # exact products; in fp64 the sums are too, and rounded once
        even = (even.double() + a[:, 2 * k, None].double() * b[k, 0::2].double()).float()
        odd = (odd.double() + a[:, 2 * k + 1, None].double() * b[k, 1::2].double()).float()
    true = c + (even + odd)
    in_order = c.clone()
    for k in range(32):
        in_order += a[:, k, None].float() * b[k // 2, k % 2 :: 2].float()
    emulated.attention_tile_dot(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)))
    assert torch.equal(c, true) and not torch.equal(c, in_order)


def test_the_emulated_unit_takes_denormals_for_zeros(emulated):
    a, b, c = torch.zeros(16, 32).bfloat16(), torch.zeros(16, 32).bfloat16(), torch.zeros(16, 16)
    a[0, 0], b[0, 0] = 2.0**-130, 2.0**100  # an input below the normal numbers
    a[1, 0], b[0, 2] = 2.0**-100, 2.0**-30  # a product below them
    a[2, 0], b[0, 4], c[2, 2] = 2.0**-10, 1.0, 2.0**-140  # so is what was there
    c[3, 3] = -(2.0**-140)
    emulated.attention_tile_dot(*(ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)))
    assert c[0, 0] == 0 and c[1, 1] == 0 and c[2, 2] == 2.0**-10 and c[3, 3] == 0


# ------------------------------------------------------------------------------------------- as a part of attention


def mixer(**values) -> Attention:
    made = Attention(Attention.Config(n_heads=4, n_kv_heads=2, **values), Dims(64, 1, 64))
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.1)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_training_through_the_kernel_equals_plain_attention(kind):
    made, x = mixer(window=20 if kind in ("window", "all") else None), torch.randn(2, 60, 64)
    ctx, _ = context(2, 60, kind)
    results = []
    for backend in ("plain", "kernel"):
        other = mixer(window=made.config.window, backend=backend)
        other.load_state_dict(made.state_dict())
        y = other(x, ctx)[0][ctx.valid]
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(other.parameters()))))
    assert worst(results[1], tuple(r.double() for r in results[0]), floor=1e-3) < 5e-6


def kernels_called(monkeypatch, made: Attention, grad: bool = True, **named) -> int:
    calls = []
    monkeypatch.setattr(
        "octavo.nn.reader.causal_by_ranges", lambda *a, **n: calls.append(1) or attend.causal_by_ranges(*a, **n)
    )
    with torch.set_grad_enabled(grad):
        ctx = named.pop("ctx", None) or context(2, 10, "causal")[0]
        made(torch.randn(2, 10, 64, dtype=made.q.weight.dtype), ctx, **named)
    return len(calls)


def test_where_the_kernel_is_taken(monkeypatch):
    assert kernels_called(monkeypatch, mixer()) == kernels_called(monkeypatch, mixer(backend="kernel")) == 1
    assert kernels_called(monkeypatch, mixer().bfloat16()) == kernels_called(monkeypatch, mixer(window=3)) == 1
    assert kernels_called(monkeypatch, mixer(gate="head", v_rank=3, dropout=0.1)) == 1
    assert kernels_called(monkeypatch, mixer(reader={"kind": "fixed", "stride": 4, "part": "block"})) == 1
    recorded = context(2, 10, "causal")[0]
    recorded.record = frozenset({"attention"})
    for made, named in (
        (mixer(backend="sdpa"), {}), (mixer(backend="plain"), {}), (mixer().eval(), {}), (mixer().double(), {}),
        (mixer(softcap=5.0), {}), (mixer(), {"grad": False}), (mixer(), {"ctx": recorded}),
        (mixer(sinks=True), {}), (mixer(backend="tiled"), {}), (mixer(reader={"kind": "strided", "stride": 4}), {}),
    ):  # fmt: skip
        assert kernels_called(monkeypatch, made, **named) == 0


def test_training_chooses_for_what_is_left_to_it(monkeypatch):
    own, left = mixer(backend="kernel"), mixer()
    for made in (own, left):
        use_backend(made, "sdpa")
    assert kernels_called(monkeypatch, own) == 1 and kernels_called(monkeypatch, left) == 0


def test_without_the_kernel_attention_is_torchs_own(monkeypatch):
    monkeypatch.setattr(build, "attempt", lambda: (None, "no C++ compiler found on PATH"))
    x, ctx = torch.randn(2, 10, 64), context(2, 10, "documents")[0]
    made = mixer(backend="kernel")
    y = made(x, ctx)[0]
    made.attend = attend.sdpa
    made.backend = "sdpa"
    assert torch.equal(y, made(x, ctx)[0])
    with pytest.raises(UnsupportedError, match="no C\\+\\+ compiler"):
        kernel.causal(*tensors(1, 4, 1, 1, 8)[:3])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_and_the_same_numbers(compiler):
    made, x = mixer(), torch.randn(2, 33, 64)

    def loss(x: Tensor, doc_ids: Tensor, valid: Tensor) -> Tensor:
        ctx = place(Inputs(torch.zeros(2, 33, dtype=torch.long), doc_ids=doc_ids, valid=valid))[0]
        return made(x, ctx)[0].square().sum()

    doc_ids, valid = (torch.rand(2, 33) < 0.1).cumsum(1), torch.arange(33).expand(2, 33) >= torch.tensor([[0], [4]])
    weights = list(made.parameters())
    eager = torch.autograd.grad(loss(x, doc_ids, valid), weights)
    compiled = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, dynamic=False, backend=compiler)(x, doc_ids, valid), weights
    )
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- building


def fake_compiler(folder: Path, monkeypatch, body: str) -> Path:
    """A g++ that does `body` when asked to compile; its calls are counted in the file it returns."""
    folder.mkdir()
    count, program = folder / "count", folder / "g++"
    program.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit; fi\necho x >> {count}\n{body}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return count


def copying(path: Path) -> str:
    return f'while [ $# -gt 1 ]; do shift; done\nsleep 0.2\ncp {path} "$1"'


def test_the_library_is_built_once_and_kept(tmp_path, monkeypatch):
    real = build.build()
    count = fake_compiler(tmp_path / "one", monkeypatch, copying(real))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build(), range(4)))
    (path,) = paths
    assert path.is_relative_to(tmp_path / "one" / "cache" / "octavo" / "kernels")
    assert build.build() == path and count.read_text() == "x\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["attention.so", "lock"]
    assert path.read_bytes() == real.read_bytes()
    assert build.build(emulated=True) != path  # other flags, another library


@pytest.mark.parametrize(
    ("body", "says"),
    [("echo attention.cpp:1: error: what is this >&2; exit 1", "error: what is this"), ("kill -9 $$", "failed")],
)
def test_a_compiler_that_fails_leaves_nothing(body, says, tmp_path, monkeypatch):
    fake_compiler(tmp_path / "bad", monkeypatch, body)
    library, reason = build.attempt.__wrapped__()
    assert library is None and says in reason and "\n" not in reason
    assert not list((tmp_path / "bad" / "cache").rglob("*.so"))


def test_a_damaged_library_is_removed_and_said(tmp_path, monkeypatch):
    fake_compiler(tmp_path / "junk", monkeypatch, copying(Path(__file__)))
    library, reason = build.attempt.__wrapped__()
    assert library is None and "cannot be loaded" in reason and "\n" not in reason
    assert not list((tmp_path / "junk" / "cache").rglob("*.so"))


def test_no_compiler_or_no_place_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.attempt.__wrapped__() == (None, "no C++ compiler found on PATH")
    fake_compiler(tmp_path / "no", monkeypatch, "exit 1")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library, reason = build.attempt.__wrapped__()
    assert library is None and "cannot be written" in reason


def test_a_forked_child_computes_too(tmp_path):
    """The threads of the parent's pool do not exist in the child."""
    code = """
import os, torch
from octavo.nn.kernels.attention import causal
torch.set_num_threads(2)
q = torch.linspace(-1, 1, 300 * 32).reshape(1, 1, 300, 32)
wanted = causal(q, q, q)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(causal(q, q, q), wanted) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(causal(q, q, q), wanted)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, capture_output=True, text=True, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_sources_stand_beside_the_code_that_builds_them():
    names = {path.name for path in build.FOLDER.iterdir()}
    included = {
        line.split('"')[1]
        for path in build.FOLDER.iterdir()
        if path.suffix in (".cpp", ".h")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith('#include "')
    }
    assert "attention.cpp" in names and included <= names
