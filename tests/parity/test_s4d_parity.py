"""S4D against scipy.signal, and its three forms against each other where chunks, documents and states meet."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from proof import agree
from safetensors.torch import load_file

from octavo.laws.subject import randomise
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.convolution import direct_convolution, long_convolution
from octavo.nn.s4d import S4d, chunked, kernel, recurrence, zero_order_hold
from octavo.nn.state import ContiguousState, place

GOLDEN = Path(__file__).parent / "golden" / "s4d.safetensors"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def context(T: int, B: int = 1, **named):
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), **named))[0]


@pytest.mark.rows("S1")
def test_recurrence_chunks_and_convolution_equal_scipy():
    """Random A, B, C, D of a linear system, sampled with zero-order hold by scipy and run by dlsim."""
    g = load_file(GOLDEN)
    system = zero_order_hold(*(torch.view_as_complex(g[name]) for name in "abc"), g["dt"])
    u, wanted, ctx = g["u"][None], g["y"][None], context(g["u"].shape[0])
    skip = g["d"] * u
    forms = {
        "recurrence": recurrence(u, system, ctx, None)[0],
        "chunks": chunked(u, system, ctx, None, keep=False)[0],
        "convolution by Fourier transforms": long_convolution(u, kernel(system, u.shape[1]), None),
        "direct convolution": direct_convolution(u, kernel(system, u.shape[1]), None),
    }
    for case, y in forms.items():
        agree("s4d", "scipy.signal.dlsim", y + skip, wanted, case=case)
        assert float((y + skip - wanted).abs().max()) < 1e-11, case


def layer(backend: str) -> S4d:
    mixer = S4d(S4d.Config(state_size=6, backend=backend), Dims(3, 1, 128)).double()
    randomise(mixer, 0)
    with torch.no_grad():
        mixer.log_dt.sub_(3.0)  # slow enough that a chunk does not forget what came before
    return mixer


T = 101
DOCUMENTS = torch.stack([torch.arange(T) // 37, (torch.arange(T) > 30).long() + (torch.arange(T) > 33)])
VALID = torch.arange(T) < torch.tensor([[T], [T - 40]])
CASES = {"whole": {}, "documents": {"doc_ids": DOCUMENTS}, "padding": {"doc_ids": DOCUMENTS, "valid": VALID}}


@pytest.mark.parametrize("backend", ["auto", "convolution"])
@pytest.mark.parametrize("case", CASES)
def test_over_several_chunks_the_forms_are_twins(backend, case):
    """The laws read 12 tokens, less than a chunk; outputs and gradients of 101 here."""
    ctx, x = context(T, 2, **CASES[case]), torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for name in ("plain", backend):
        mixer = layer(name)
        y = mixer(x, ctx)[0][ctx.valid]
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    for got, wanted in zip(found[1], found[0], strict=True):
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cuts", [[33, 1, 64, 3], [64, 37], [1, 100]])
def test_a_state_goes_on_over_chunks_documents_and_padding(cuts):
    mixer, x = layer("auto"), torch.randn(2, T, 3, dtype=torch.float64)
    whole = layer("plain")(x, context(T, 2, doc_ids=DOCUMENTS))[0]
    state = ContiguousState({"s4d": mixer.state_spec()}, 2, T + 9, torch.float64)
    parts = []
    for part, ids in zip(x.split(cuts, 1), DOCUMENTS.split(cuts, 1), strict=True):
        n = part.shape[1]
        valid = (torch.arange(n + 3) < n).expand(2, -1)  # three tokens of padding after each part
        inputs = Inputs(torch.zeros(2, n + 3, dtype=torch.long), valid, torch.nn.functional.pad(ids, (0, 3)))
        ctx = state.begin(inputs)
        noise = torch.randn(2, 3, 3, dtype=torch.float64)
        parts.append(mixer(torch.cat([part, noise], 1), ctx, state.layer("s4d"))[0][:, :n])
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_chunks_are_causal_to_the_last_bit_where_transforms_are_not():
    x = torch.randn(1, T, 3, dtype=torch.float64, requires_grad=True)
    later = {}
    for backend in ("auto", "convolution"):
        (gradient,) = torch.autograd.grad(layer(backend)(x, context(T))[0][:, 50].sum(), x)
        later[backend] = float(gradient[:, 51:].abs().max() / gradient.abs().max())
    assert later["auto"] == 0
    assert later["convolution"] < 1e-14


def test_it_starts_as_s4d_lin():
    mixer = S4d(S4d.Config(state_size=8), Dims(5, 1, 16))
    mixer.reset()
    system = mixer.system()
    steps = mixer.log_dt.detach().exp()
    a = system.z / steps[:, None]
    wanted = torch.complex(torch.tensor(-0.5), math.pi * torch.arange(4.0)).expand(5, 4)
    assert torch.allclose(a, wanted, atol=1e-3)
    assert float(steps.min()) == pytest.approx(0.001, rel=1e-5)
    assert float(steps.max()) == pytest.approx(0.1, rel=1e-5)


def test_small_steps_keep_their_digits_in_32_bits():
    """(e^z - 1) / A would lose four of seven digits at the smallest dt."""
    a, one = torch.full((1, 1), -0.5 + 0j), torch.ones(1, 1, dtype=torch.complex64)
    b = zero_order_hold(a, one, one, torch.tensor([1e-4])).b
    assert float(b.real) == pytest.approx(-math.expm1(-0.5e-4) / 0.5, rel=1e-6)
