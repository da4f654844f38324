"""Solving for codes: below rounding, equal to the formula of the paper, near the best there is where all are tried."""

from __future__ import annotations

import itertools

import pytest
import torch

from octavo.nn.quantized import from_codes, integer_scales, to_codes
from octavo.quantize.solve import (
    clipped,
    damped,
    descended,
    gptq,
    nearest,
    product_error,
    refitted,
    solved,
)


def correlated(n_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs that depend on each other, some large and some small, as activations do."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw) * torch.linspace(0.1, 2, width)
    return torch.randn(n_tokens, width, generator=draw) @ mix * 0.1 + torch.randn(n_tokens, width, generator=draw) * 0.1


def weight_of(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_solved_codes_err_less_than_rounded_ones(bits, group):
    x, weight = correlated(1000, 128), weight_of(48, 128)
    H = x.T @ x
    rounded = product_error(weight, H, *nearest(weight, bits, group), bits)
    assert product_error(weight, H, *solved(weight, H, bits, group), bits) < 0.6 * rounded
    scales = integer_scales(weight, group, bits)
    assert product_error(weight, H, gptq(weight, H, scales, bits), scales, bits) < 0.6 * rounded


def test_the_error_is_that_of_the_product():
    x, weight = correlated(300, 64).double(), weight_of(10, 64)
    codes, scales = nearest(weight, 4, 32)
    away = x @ (weight - from_codes(codes, scales, 4)).double().T
    assert product_error(weight, x.T @ x, codes, scales, 4) == pytest.approx(float(away.square().sum()), rel=1e-9)


def by_the_paper(weight: torch.Tensor, H: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Frantar et al. 2022, equation 2, without blocks or Cholesky: the inverse is taken anew at every column."""
    W, H = weight.double().clone(), damped(H)
    of_column = scales.double().repeat_interleave(W.shape[1] // scales.shape[1], -1)
    left = [int(i) for i in H.diagonal().argsort(descending=True)]
    steps = torch.zeros_like(W)
    while left:
        j, inverse = left[0], torch.linalg.inv(H[left][:, left])
        steps[:, j] = (W[:, j] / of_column[:, j]).round().clamp(-8 if bits == 4 else -127, 7 if bits == 4 else 127)
        error = (W[:, j] - steps[:, j] * of_column[:, j]) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return (steps + (8 if bits == 4 else 128)).to(torch.uint8)


@pytest.mark.parametrize("width", [32, 160])
def test_gptq_is_the_formula_of_the_paper(width):
    x, weight = correlated(500, width).double(), weight_of(6, width).double()
    H = x.T @ x
    scales = integer_scales(weight, 32, 4)
    assert torch.equal(gptq(weight, H, scales, 4), by_the_paper(weight, H, scales, 4))


def test_solving_comes_near_the_best_of_all_codes():
    """Four weights have 16^4 ways to be coded: all are tried."""
    x, weight = correlated(200, 4).double(), weight_of(5, 4).double()
    H = x.T @ x
    scales = integer_scales(weight, 4, 4)
    every = torch.tensor(list(itertools.product(range(16), repeat=4)), dtype=torch.uint8)
    best = sum(
        min(product_error(row.expand(1, 4), H, codes[None], scale[None], 4) for codes in _near(row, scale, every))
        for row, scale in zip(weight, scales, strict=True)
    )
    codes = descended(weight, H, gptq(weight, H, scales, 4), scales, 4)
    reached = product_error(weight, H, codes, scales, 4)
    rounded = product_error(weight, H, to_codes(weight, scales, 4), scales, 4)
    assert best <= reached * (1 + 1e-9)
    assert reached <= best + 0.35 * (rounded - best)


def _near(row: torch.Tensor, scale: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
    """The codes at most three steps from the weight in each place: what is further off is not best here."""
    steps = row / scale.double()
    return every[((every.double() - 8 - steps).abs() <= 3).all(-1)]


def test_descending_and_refitting_never_err_more():
    x, weight = correlated(600, 96), weight_of(20, 96)
    H = damped(x.T @ x).float()
    codes, scales = nearest(weight, 4, 32)
    errors = [product_error(weight, H, codes, scales, 4)]
    for _ in range(3):
        codes = descended(weight, H, codes, scales, 4, 1)
        errors.append(product_error(weight, H, codes, scales, 4))
        scales = refitted(weight, H, codes, scales, 4)
        errors.append(product_error(weight, H, codes, scales, 4))
    assert all(after <= before * 1.002 for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.7 * errors[0]


def test_refitted_scales_are_the_least_squares_of_float64():
    x, weight = correlated(400, 32).double(), weight_of(3, 32).double()
    H = x.T @ x
    codes, scales = nearest(weight, 4, 16)
    found = refitted(weight, H, codes, scales, 4)
    root = torch.linalg.cholesky(damped(H)).T
    for row in range(3):
        steps = (codes[row].double() - 8).view(2, 16)
        columns = torch.stack([root[:, g * 16 : g * 16 + 16] @ steps[g] for g in range(2)], -1)
        expected = torch.linalg.lstsq(columns, (root @ weight[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row].double(), expected, rtol=2e-3, atol=1e-6)


def test_clipping_errs_no_more_than_the_whole_range():
    weight = weight_of(30, 64)
    weight[:, ::64] *= 6
    widest = integer_scales(weight, 32, 4)
    scales = clipped(weight, 4, 32)
    errors = [(from_codes(to_codes(weight, s, 4), s, 4) - weight).square().sum() for s in (scales, widest)]
    assert errors[0] < 0.97 * errors[1]
    assert (scales.abs() <= widest.abs()).all()


def test_inputs_that_are_never_there_do_no_harm():
    x, weight = correlated(300, 64), weight_of(8, 64)
    x[:, 5] = 0
    H = x.T @ x
    codes, scales = solved(weight, H, 4, 32)
    assert product_error(weight, H, codes, scales, 4) < product_error(weight, H, *nearest(weight, 4, 32), 4)
    assert torch.isfinite(from_codes(codes, scales, 4)).all()
