"""The convolution that works block by block equals the plain one, silu behind it, with every gradient."""

import pytest
import torch
import torch.nn.functional as F

from octavo.nn import short_convolution as module
from octavo.nn.contracts import Inputs
from octavo.nn.shift import causal_convolution
from octavo.nn.short_convolution import convolve_silu
from octavo.nn.state import place


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("T", [1, 3, 16, 45])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_convolution(width, documents, T, bias, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1)  # the shortest blocks there are
    B, C = 2, 5
    generator = torch.Generator().manual_seed(T)
    doc_ids = torch.randint(2, (B, T), generator=generator).cumsum(1) if documents else None
    ctx = place(Inputs(torch.zeros(B, T, dtype=torch.long), doc_ids=doc_ids))[0]
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, T, C), (C, width), (C,))]
    leaves = [x.requires_grad_() for x in leaves[: 2 + bias]]
    x, weight, b = leaves[0], leaves[1], leaves[2] if bias else None
    direction = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    found = []
    for y in (convolve_silu(x, weight, b, ctx), F.silu(causal_convolution(x, weight, b, ctx))):
        found.append([y, *torch.autograd.grad((y * direction).sum(), leaves)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)
