"""The causal convolution and the shift, against loops over documents; cut into pieces with a state in between."""

import pytest
import torch

from octavo.nn.contracts import Inputs
from octavo.nn.shift import causal_convolution, shift, tail
from octavo.nn.state import ContiguousState, place

B, T, C = 3, 11, 5
DOCS = torch.tensor([[0] * 11, [0] * 4 + [1] * 7, [2, 3, 3] + [4] * 8])
VALID = torch.arange(T) < torch.tensor([[11], [9], [6]])


def contexts(cuts):
    """The inputs and contexts of a packed, padded batch read in pieces."""
    state = ContiguousState({}, B, T, torch.float64)
    for begin, end in zip([0, *cuts], [*cuts, T]):
        tokens = torch.zeros(B, end - begin, dtype=torch.long)
        named = Inputs(tokens, valid=VALID[:, begin:end], doc_ids=DOCS[:, begin:end], padding="end")
        yield slice(begin, end), state.begin(named)


def by_hand(x, weight, bias):
    y = torch.zeros_like(x)
    for row in range(B):
        for t in range(T):
            for back in range(weight.shape[1]):
                if t - back >= 0 and DOCS[row, t - back] == DOCS[row, t]:
                    y[row, t] += x[row, t - back] * weight[:, -1 - back]
    return (y + bias)[VALID]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [5], [4, 6], list(range(1, T))])
def test_convolution(width, cuts):
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((B, T, C), (C, width), (C,)))
    before, parts = torch.zeros(B, width - 1, C, dtype=torch.float64), []
    for part, ctx in contexts(cuts):
        parts.append(causal_convolution(x[:, part], weight, bias, ctx, before))
        before = tail(x[:, part], before, ctx)
    torch.testing.assert_close(torch.cat(parts, 1)[VALID], by_hand(x, weight, bias))


def test_convolution_without_documents_is_the_plain_one():
    x, weight = torch.randn(B, T, C, dtype=torch.float64), torch.randn(C, 4, dtype=torch.float64)
    ctx = place(Inputs(torch.zeros(B, T, dtype=torch.long)))[0]
    general = place(Inputs(torch.zeros(B, T, dtype=torch.long), doc_ids=torch.zeros(B, T, dtype=torch.long)))[0]
    assert not ctx.restarts and general.restarts
    torch.testing.assert_close(causal_convolution(x, weight, None, ctx), causal_convolution(x, weight, None, general))


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [5]])
def test_shift(cuts):
    x, kernel = torch.randn(B, T, C, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64).expand(C, 2)
    before, parts = torch.zeros(B, 1, C, dtype=torch.float64), []
    for part, ctx in contexts(cuts):
        parts.append(shift(x[:, part], ctx, before[:, 0]))
        before = tail(x[:, part], before, ctx)
    torch.testing.assert_close(torch.cat(parts, 1)[VALID], by_hand(x, kernel, torch.zeros(C, dtype=torch.float64)))
