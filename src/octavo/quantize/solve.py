"""The codes and scales of one weight: rounded to nearest, clipped where that errs less, or solved against activations.

Written for weights W (N, K) in float32 or float64, N outputs and K inputs. With activations the error is that of the
product, ``sum over tokens of |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T)`` with ``H = sum x x^T`` (K, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.nn.quantized import ZERO, from_codes, integer_scales, to_codes

CLIPS = tuple(1 - 0.05 * i for i in range(10))
BLOCK = 128
ROUNDS = 2
SWEEPS = 2
DAMPING = 0.01


def nearest(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes (..., K), unpacked, and scales: every weight to the nearest step."""
    scales = integer_scales(weight, group, bits)
    return to_codes(weight, scales, bits), scales


def clipped(weight: Tensor, bits: int, group: int, importance: Tensor | None = None) -> Tensor:
    """Scales (..., K / group) that err least when rounding to nearest: some clip what is largest.

    Args:
        importance: (K,) mean square of each input; all the same by default.
    """
    widest = integer_scales(weight, group, bits)
    parts = weight.unflatten(-1, (-1, group))
    weights = 1 if importance is None else importance.to(weight).view(-1, group)
    best, least = widest.clone(), torch.full_like(widest, torch.inf, dtype=weight.dtype)
    for ratio in CLIPS:
        scales = (widest.float() * ratio).half()
        rounded = from_codes(to_codes(weight, scales, bits), scales, bits).unflatten(-1, (-1, group))
        error = ((rounded.to(weight) - parts).square() * weights).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def damped(moment: Tensor) -> Tensor:
    """H in float64 with a share of its mean diagonal added, so that it can be inverted (Frantar et al. 2022, 3.3)."""
    H = moment.double()
    diagonal = H.diagonal()
    mean = diagonal.mean()
    added = torch.where(diagonal > 0, DAMPING * mean, mean if mean > 0 else 1.0)
    return H + torch.diag(added)


def gptq(weight: Tensor, moment: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes (N, K), unpacked, by GPTQ (Frantar et al. 2022, section 3.3): column by column, each error made good.

    The error of rounding column j is spread over the columns not yet rounded, ``W_k -= e_j U_jk / U_jj`` with U the
    upper Cholesky factor of the inverse of H. Columns go in the order of falling ``H_jj``; the groups, and the scales
    given, stay where they are.
    """
    K = weight.shape[1]
    order = moment.diagonal().argsort(descending=True)
    H = damped(moment)[order][:, order]
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).to(weight.dtype)
    of_column = scales.to(weight.dtype).repeat_interleave(K // scales.shape[-1], -1)[:, order].T.contiguous()
    W = weight[:, order].T.contiguous()  # a column of W is a row here: what is touched lies together
    steps = torch.empty_like(W)
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        errors = torch.empty_like(W[start:stop])
        for j in range(start, stop):
            steps[j] = _step(W[j], of_column[j], bits)
            errors[j - start] = (W[j] - steps[j] * of_column[j]) / U[j, j]
            W[j + 1 : stop].addr_(U[j, j + 1 : stop], errors[j - start], alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    found = torch.empty_like(steps)
    found[order] = steps
    return _codes(found.T, bits)


def descended(weight: Tensor, moment: Tensor, codes: Tensor, scales: Tensor, bits: int, sweeps: int = SWEEPS) -> Tensor:
    """Codes after ``sweeps`` of coordinate descent: each column in turn set to its best, the others as they stand.

    The error of the product never grows (Behdin et al. 2023, QuantEase, section 3).
    """
    K = weight.shape[1]
    H = damped(moment).to(weight.dtype)
    of_column = scales.to(weight.dtype).repeat_interleave(K // scales.shape[-1], -1).T.contiguous()
    steps = (codes.to(weight.dtype) - ZERO[bits]).T.contiguous()
    pull = H @ (weight.T - steps * of_column)  # (K, N): minus half the gradient
    for _ in range(sweeps):
        for start in range(0, K, BLOCK):
            part = slice(start, min(start + BLOCK, K))
            before = steps[part].clone()
            near, near_H = pull[part].clone(), H[part, part]
            for j in range(part.stop - start):
                at = start + j
                wanted = steps[at] * of_column[at] + near[j] / H[at, at]
                new = _step(wanted, of_column[at], bits)
                near.addr_(near_H[:, j], (new - steps[at]) * of_column[at], alpha=-1)
                steps[at] = new
            pull.addmm_(H[:, part], (steps[part] - before) * of_column[part], alpha=-1)
    return _codes(steps.T, bits)


def refitted(weight: Tensor, moment: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The scales under which these codes err least: for each row a system of as many equations as it has groups."""
    (N, K), G = weight.shape, scales.shape[-1]
    H = damped(moment).to(weight.dtype)
    steps = (codes.to(weight.dtype) - ZERO[bits]).view(N, G, K // G)
    wanted = (steps * (weight @ H).view(N, G, -1)).sum(-1)
    left = torch.empty(N, G, G, dtype=weight.dtype)
    for g in range(G):
        part = slice(g * (K // G), (g + 1) * (K // G))
        left[:, g] = (steps * (steps[:, g] @ H[part]).view(N, G, -1)).sum(-1)
    diagonal = left.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + torch.where(diagonal == 0, 1.0, 0.0)
    solved = torch.linalg.solve(left.double(), wanted.double()[..., None])[..., 0].to(weight.dtype).half()
    return torch.where(solved.isfinite() & (wanted != 0), solved, scales)


def solved(weight: Tensor, moment: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales by GPTQ under clipped scales, then codes and scales in turn against the same moments."""
    scales = clipped(weight, bits, group, moment.diagonal())
    codes = gptq(weight, moment, scales, bits)
    for _ in range(ROUNDS):
        scales = refitted(weight, moment, codes, scales, bits)
        codes = descended(weight, moment, codes, scales, bits)
    return codes, scales


def product_error(weight: Tensor, moment: Tensor, codes: Tensor, scales: Tensor, bits: int) -> float:
    """``tr((W - Q) H (W - Q)^T)``, summed in float64."""
    away = weight.double() - from_codes(codes, scales, bits).double()
    return float(((away @ moment.double()) * away).sum())


def _step(column: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest whole steps of a column, codes minus zero."""
    low = -8 if bits == 4 else -127
    return (column / scales.where(scales != 0, 1)).round().clamp(low, ZERO[bits] - 1)


def _codes(steps: Tensor, bits: int) -> Tensor:
    return (steps + ZERO[bits]).to(torch.uint8).contiguous()
