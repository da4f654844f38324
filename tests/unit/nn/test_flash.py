"""The tiled form: equal to the plain one for any tiles, with memory that grows with the length alone."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocated
from torch import Tensor

from octavo.nn.attend import plain
from octavo.nn.flash import tiled

pytestmark = pytest.mark.rows("B6")
TILES = [(1, 1), (2, 3), (3, 2), (64, 64), (1, 7), (8, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def case(name: str, B: int, H: int, T: int, S: int) -> dict[str, Tensor | bool | float]:
    """What is given beside q, k and v."""
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(3)) < 0.6
    return {
        "nothing": {},
        "causal": {"causal": True, "scale": 0.3},
        "mask": {"mask": mask},
        "capped": {"mask": mask, "softcap": 0.7},
        "biased": {"causal": True, "bias": random(1, H, T, S, seed=4)},
        "biased rows": {"mask": mask, "bias": random(B, H, T, S, seed=4), "softcap": 2.0},
        "sinks": {"causal": True, "sinks": random(H, seed=5)},
        "all": {"mask": mask, "bias": random(1, H, T, S, seed=4), "sinks": random(H, seed=5), "softcap": 2.0},
    }[name]


@pytest.mark.parametrize(("rows", "columns"), TILES)
@pytest.mark.parametrize("name", ["nothing", "causal", "mask", "capped", "biased", "biased rows", "sinks", "all"])
def test_any_tiles_equal_the_plain_form(name, rows, columns):
    """Outputs and every gradient; some queries may read nothing, groups share keys, values are wider than keys."""
    for H, G, T, S in ((4, 2, 7, 7), (3, 1, 9, 9), (2, 2, 1, 6)):
        if T != S and name in ("causal", "biased", "sinks"):
            continue
        q, k, v, given = (
            random(2, H, T, 6),
            random(2, G, S, 6, seed=1),
            random(2, G, S, 8, seed=2),
            case(name, 2, H, T, S),
        )
        leaves = [q, k, v, *(given[n] for n in ("bias", "sinks") if n in given)]
        wanted, got = plain(q, k, v, **given), tiled(q, k, v, **given, rows=rows, columns=columns)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        weight = random(*wanted.shape, seed=6).detach()
        for a, b in zip(
            torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((wanted * weight).sum(), leaves)
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_large_scores_do_not_overflow():
    """The running maximum is what makes it safe: e^1000 is never asked for, in whatever order the tiles come."""
    q, k, v = (torch.full((1, 1, 6, 1), 40.0), torch.linspace(-25, 25, 6).view(1, 1, 6, 1), random(1, 1, 6, 3).float())
    for keys in (k, k.flip(2)):
        got = tiled(q, keys, v, scale=1.0, rows=2, columns=2)
        torch.testing.assert_close(got, plain(q, keys, v, scale=1.0), rtol=1e-5, atol=1e-6)
        assert bool(torch.isfinite(got).all())


def test_in_bf16_sums_are_kept_in_fp32():
    q, k, v = (random(1, 2, 200, 16, seed=s).detach().bfloat16() for s in range(3))
    exact = plain(q.double(), k.double(), v.double(), causal=True)
    error = (tiled(q, k, v, causal=True, columns=1).double() - exact).abs().max()
    assert float(error) < 0.01


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_with_the_length_not_with_its_square(causal):
    """The largest tensor that the forward and the backward pass make, at T and at 2 T; the plain form's beside it."""

    def largest(form, T: int) -> int:
        q, k, v = (torch.randn(1, 2, T, 8, requires_grad=True) for _ in range(3))
        with Allocated([q, k, v]) as seen:
            form(q, k, v, causal=causal).square().sum().backward()
        return seen.largest

    def in_tiles(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return tiled(q, k, v, causal=causal, rows=16, columns=16)

    n = 96
    assert largest(in_tiles, n) == n * 2 * 8 * 4  # no tensor is larger than the output
    assert largest(in_tiles, 2 * n) == 2 * largest(in_tiles, n)
    assert largest(plain, 2 * n) == 4 * largest(plain, n) == 4 * (2 * n * n * 4)


def test_dropped_weights_are_the_same_on_the_way_back():
    """The derivative of what was computed, by finite differences, with several tiles and a probability of 0.3."""
    q, k, v = random(1, 2, 3, 2), random(1, 1, 3, 2, seed=1), random(1, 1, 3, 2, seed=2)

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(0)
        return tiled(q, k, v, dropout=0.3, rows=2, columns=2)

    assert torch.autograd.gradcheck(dropped, (q, k, v), atol=1e-7)
    torch.manual_seed(1)
    assert not torch.equal(dropped(q, k, v), tiled(q, k, v, dropout=0.3, rows=2, columns=2))
