"""Hyena against the formulas of Poli et al. 2023, written out once more without any of our code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from proof import agree

from octavo.laws.subject import randomise
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.convolution import direct_convolution, long_convolution
from octavo.nn.hyena import Hyena
from octavo.nn.state import ContiguousState, place

D, L = 4, 90


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mixer(**values) -> Hyena:
    one = Hyena(Hyena.Config(**{"filter_width": 7, **values}), Dims(D, 1, L)).double()
    randomise(one, 0)
    return one


def context(T: int, B: int = 1, **named):
    return place(Inputs(torch.zeros(B, T, dtype=torch.long), **named))[0]


def published(m: Hyena, x: np.ndarray) -> np.ndarray:
    """Definition 3.1 token by token and lag by lag; the filters' constants are those of the authors' code."""
    w = {name: p.detach().numpy() for name, p in m.named_parameters()}
    T, N = len(x), m.config.order
    u = x @ w["up.weight"].T + w["up.bias"]
    mixed = np.zeros_like(u) + w["short_bias"]
    for t in range(T):
        for back in range(min(t + 1, m.config.short)):
            mixed[t] += w["short_weight"][:, m.config.short - 1 - back] * u[t - back]
    z, gates = mixed[:, :D], [mixed[:, (n + 1) * D : (n + 2) * D] for n in range(N)]
    bands = (m.config.filter_features - 1) // 2
    frequencies = [1e-4 + (bands - 1 - 1e-4) * i / max(1, bands - 1) for i in range(bands)]
    kernels = np.zeros((T, m.n_filters * D))
    for lag in range(T):
        angle = [2 * math.pi * lag / L * f for f in frequencies]
        h = np.array([lag / (L - 1), *(math.cos(a) for a in angle), *(-math.sin(a) for a in angle)])
        for i in range(m.config.filter_layers + 1):
            h = np.sin(w["filters.frequency"] * (w[f"filters.hidden.{i}.weight"] @ h + w[f"filters.hidden.{i}.bias"]))
        decays = np.linspace(math.log(100) / 1.5, math.log(100) / 0.3, m.n_filters * D)
        kernels[lag] = (w["filters.out.weight"] @ h) * np.exp(-lag / (L - 1) * decays)
    if m.config.gate_first:
        z = gates.pop(0) * z
    for n, gate in enumerate(gates):
        h = kernels[:, n * D : (n + 1) * D]
        z = gate * np.array([sum(h[t - s] * z[s] for s in range(t + 1)) + w["skip"][n] * z[t] for t in range(T)])
    return z @ w["o.weight"].T + w["o.bias"]


@pytest.mark.rows("S5")
@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_operator_equals_the_published_formulas(order, backend):
    m, x = mixer(order=order, backend=backend), torch.randn(1, 80, D, dtype=torch.float64)
    with torch.no_grad():
        got = m(x, context(80))[0][0]
    wanted = torch.from_numpy(published(m, x[0].numpy()))
    agree("hyena", "Poli et al. 2023, formulas in numpy", got, wanted, case=f"order {order}, {backend}")
    assert float((got - wanted).abs().max()) < 1e-11


@pytest.mark.rows("S5")
@pytest.mark.parametrize("features", [3, 5])
def test_the_authors_order_gates_first(features):
    m = mixer(order=3, gate_first=True, filter_features=features)
    x = torch.randn(1, 20, D, dtype=torch.float64)
    assert m.n_filters == 2
    with torch.no_grad():
        got = m(x, context(20))[0][0]
    assert float((got - torch.from_numpy(published(m, x[0].numpy()))).abs().max()) < 1e-11


@pytest.mark.rows("S5")
@pytest.mark.parametrize("T", [1, 2, 63, 65, 300])
@pytest.mark.parametrize("documents", [False, True])
def test_fourier_and_halving_convolutions_equal_the_direct_one(T, documents):
    """Outputs and both gradients; documents of 1 to 120 tokens."""
    random = torch.Generator().manual_seed(T)
    x, k = (torch.randn(*s, generator=random, dtype=torch.float64, requires_grad=True) for s in ((2, T, 3), (3, T)))
    segment = None
    if documents:
        cuts = torch.rand(2, T, generator=random) < torch.tensor([[0.02], [0.4]])
        segment = cuts.cumsum(1)
    found = []
    for convolve in (direct_convolution, long_convolution):
        y = convolve(x, k, segment)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, k])])
    for wanted, got in zip(*found, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-9)


@pytest.mark.rows("S5")
def test_it_is_causal_and_documents_stay_apart_over_long_rows():
    T = 300
    m, ids = mixer(), (torch.arange(T) >= 130).long()[None]
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(m(x, context(T))[0][:, 200].sum(), x)
    assert float(whole[:, 201:].abs().max() / whole.abs().max()) < 1e-13  # Fourier transforms: up to rounding
    assert (whole[:, :201] != 0).any(-1).all()
    (apart,) = torch.autograd.grad(m(x, context(T, doc_ids=ids))[0][:, 200].sum(), x)
    assert (apart[:, 201:] == 0).all() and (apart[:, :130] == 0).all()  # halving: exactly
    assert (apart[:, 130:201] != 0).any(-1).all()


def test_decoding_beyond_64_tokens_with_documents_is_the_whole_pass():
    T = 80
    m, x = mixer(order=3), torch.randn(2, T, D, dtype=torch.float64)
    ids = torch.stack([torch.arange(T) // 50, (torch.arange(T) >= 71).long()])
    with torch.no_grad():
        whole = m(x, context(T, 2, doc_ids=ids))[0]
        state = ContiguousState({"m": m.state_spec()}, 2, T, torch.float64)
        at = 0
        for n in (66, 1, 1, 5, 7):
            inputs = Inputs(torch.zeros(2, n, dtype=torch.long), doc_ids=ids[:, at : at + n])
            got = m(x[:, at : at + n], state.begin(inputs), state.layer("m"))[0]
            assert torch.allclose(got, whole[:, at : at + n], atol=1e-10)
            at += n


def test_the_state_holds_every_input_and_grows():
    spec = mixer(order=2).state_spec()
    assert {name: field.kind for name, field in spec.items()} == {"z0": "token", "z1": "token", "short": "row"}
    assert not Hyena.capabilities.constant_state
