"""The gated norm and the rotation with their gradients by hand, next to the same formulas by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.nn import gated_norm as module
from octavo.nn.gated_norm import gated_norm, turn
from octavo.nn.position import PositionDims
from octavo.nn.rope import RotaryPositions


@pytest.mark.rows("S4")
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_gated_norm_is_its_formula_with_every_gradient(eps, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 4)
    generator = torch.Generator().manual_seed(0)
    x, gate, d_out = torch.randn(3, 2, 7, 3, 5, generator=generator, dtype=torch.float64)
    x, gate = x.requires_grad_(), gate.requires_grad_()
    ours, plain = gated_norm(x, gate, eps), F.silu(gate) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(ours, plain)
    for got, want in zip(*(torch.autograd.grad(y, (x, gate), d_out) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_turn_is_the_rotation_with_its_gradient(layout):
    generator = torch.Generator().manual_seed(0)
    scheme = RotaryPositions(RotaryPositions.Config(layout=layout), PositionDims(16, 8, 64, 2))
    rotation = scheme.rotation(torch.arange(6).expand(2, 6))
    x, dy = torch.randn(2, 2, 6, 2, 8, generator=generator)
    x = x.requires_grad_()
    torch.testing.assert_close(turn(x, rotation), rotation(x))
    got, want = (torch.autograd.grad(y, x, dy)[0] for y in (turn(x, rotation), rotation(x)))
    torch.testing.assert_close(got, want)
