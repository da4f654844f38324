"""Recurrent mixers against torch.nn.RNN, LSTM and GRU, whose weights go straight in; documents as packed sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
from proof import agree
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from octavo import laws
from octavo.laws.subject import randomise
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.recurrent import Gru, Lstm, Rnn
from octavo.nn.state import ContiguousState, place

D, H, T = 6, 5, 23
KINDS = {
    "rnn tanh": (Rnn, torch.nn.RNN, {"activation": "tanh"}, {"nonlinearity": "tanh"}),
    "rnn relu": (Rnn, torch.nn.RNN, {"activation": "relu"}, {"nonlinearity": "relu"}),
    "lstm": (Lstm, torch.nn.LSTM, {}, {}),
    "gru": (Gru, torch.nn.GRU, {}, {}),
}
DOCUMENTS = torch.stack([torch.tensor([0] * 9 + [1] + [2] * 13), torch.tensor([4] * 2 + [7] * 21)])
VALID = torch.arange(T) < torch.tensor([[T], [T - 4]])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pair(name: str, both: str | None = None, backend: str = "auto"):
    ours, theirs, mine, yours = KINDS[name]
    mixer = ours(ours.Config(width=H, both=both, backend=backend, **mine), Dims(D, 1, 64)).double()
    randomise(mixer, 0)
    with torch.no_grad():  # the output as it comes: o is the identity
        mixer.o.weight.copy_(torch.eye(mixer.o.d_out, mixer.o.d_in))
    wide = 2 * H if both == "concat" else H
    mixer.o = torch.nn.Identity()
    reference = theirs(D, H, batch_first=True, bidirectional=both is not None, **yours).double()
    weights = {"": mixer.there} | ({"_reverse": mixer.back} if both else {})
    reference.load_state_dict(
        {
            f"{which}_{part}_l0{end}": getattr(getattr(cell, {"ih": "up", "hh": "over"}[part]), which)
            for end, cell in weights.items()
            for which, part in itertools.product(("weight", "bias"), ("ih", "hh"))
        }
    )
    return mixer, reference, wide


def by_document(reference, x: torch.Tensor) -> torch.Tensor:
    """Each document of each row alone, all of them packed by their lengths; padding stays zero."""
    places = []
    for row in range(2):
        last = None
        for t in range(T):
            if VALID[row, t]:
                if DOCUMENTS[row, t] != last:
                    places.append([])
                last = DOCUMENTS[row, t]
                places[-1].append((row, t))
    lengths = torch.tensor([len(p) for p in places])
    rows = torch.zeros(len(places), int(lengths.max()), D, dtype=x.dtype)
    for i, p in enumerate(places):
        rows[i, : len(p)] = torch.stack([x[at] for at in p])
    packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(reference(packed)[0], batch_first=True)
    y = torch.zeros(2, T, out.shape[-1], dtype=x.dtype)
    for i, p in enumerate(places):
        for t, at in enumerate(p):
            y[at] = out[i, t]
    return y


def context():
    return place(Inputs(torch.zeros(2, T, dtype=torch.long), VALID, DOCUMENTS))[0]


@pytest.mark.rows("N10")
@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("name", KINDS)
def test_documents_of_a_row_equal_packed_sequences(name, backend):
    mixer, reference, _ = pair(name, backend=backend)
    x = torch.randn(2, T, D, dtype=torch.float64)
    got, wanted = mixer(x, context())[0][VALID], by_document(reference, x)[VALID]
    agree(name.split()[0], f"torch.nn.{type(reference).__name__}", got, wanted, case=f"{name}, documents, {backend}")
    assert float((got - wanted).detach().abs().max()) < 1e-12


@pytest.mark.rows("N10")
@pytest.mark.parametrize("name", KINDS)
def test_whole_rows_and_gradients(name):
    mixer, reference, _ = pair(name)
    x = torch.randn(2, T, D, dtype=torch.float64)
    got = mixer(x, place(Inputs(torch.zeros(2, T, dtype=torch.long)))[0])[0]
    wanted = reference(x)[0]
    kind, said = name.split()[0], f"torch.nn.{type(reference).__name__}"
    agree(kind, said, got, wanted, case=name)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for mine, yours in zip(mixer.there.weights(), reference.parameters(), strict=True):
        agree(kind, said, mine.grad, yours.grad, case=f"{name}, gradients")


@pytest.mark.rows("N10")
@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn relu"])
@pytest.mark.parametrize("both", ["concat", "sum"])
def test_both_directions_within_documents(both, name, backend):
    mixer, reference, wide = pair(name, both, backend)
    x = torch.randn(2, T, D, dtype=torch.float64)
    got, wanted = mixer(x, context())[0], by_document(reference, x)
    wanted = wanted if both == "concat" else wanted[..., :H] + wanted[..., H:]
    assert got.shape[-1] == wide
    agree(name.split()[0], f"torch.nn.{type(reference).__name__}", got[VALID], wanted[VALID], case=f"{both}, {backend}")


def test_the_notes_simple_network_has_a_sigmoid():
    mixer = Rnn(Rnn.Config(width=H, activation="sigmoid"), Dims(D, 1, 64)).double()
    randomise(mixer, 0)
    x, h, ys = torch.randn(1, 4, D, dtype=torch.float64), torch.zeros(1, H, dtype=torch.float64), []
    v, u = mixer.there.up, mixer.there.over
    for t in range(4):
        h = torch.sigmoid(x[:, t] @ v.weight.T + h @ u.weight.T + v.bias + u.bias)
        ys.append(h @ mixer.o.weight.T)
    got = mixer(x, place(Inputs(torch.zeros(1, 4, dtype=torch.long)))[0])[0]
    assert torch.allclose(got, torch.stack(ys, 1), atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_a_state_continues_the_last_document_of_each_row(name):
    """With padding between, and a row that gets nothing in the second part."""
    mixer, reference, _ = pair(name)
    x = torch.randn(2, T, D, dtype=torch.float64)
    wanted = by_document(reference, x)
    state = ContiguousState({"m": mixer.state_spec()}, 2, T, torch.float64)
    for a, b in ((0, 12), (12, 20), (20, T)):
        inputs = Inputs(torch.zeros(2, b - a, dtype=torch.long), VALID[:, a:b], DOCUMENTS[:, a:b])
        got = mixer(x[:, a:b], state.begin(inputs), state.layer("m"))[0]
        assert torch.allclose(got[VALID[:, a:b]], wanted[:, a:b][VALID[:, a:b]], atol=1e-12)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_both_directions_keep_the_laws_of_models_that_read_both_ways(kind):
    config = laws.models_around(kind, both="concat")["hybrid"] | {"causal": False}
    results = {result.law: result for result in laws.check(config)}
    assert not [str(result) for result in results.values() if not result.ok]
    assert results["packed"].status == results["padding"].status == results["twins"].status == "holds"
    assert results["causal"].status == results["incremental"].status == "not asked"


def test_both_directions_are_refused_in_a_causal_model():
    config = laws.models_around("lstm", both="sum")["alone"]
    assert [(r.law, r.status) for r in laws.check(config)] == [("build", "broken")]


@pytest.mark.rows("N10")
@pytest.mark.parametrize("name", ["rnn tanh", "rnn relu", "gru"])
def test_the_gradient_of_the_input_where_weights_are_frozen(name):
    """The pass through time is written by hand: what is not asked for is not computed, and nothing else changes."""
    mixer, reference, _ = pair(name)
    x = torch.randn(3, T, D, dtype=torch.float64)
    weight = torch.randn(3, T, H, dtype=torch.float64)
    mixer.there.up.weight.requires_grad_(False)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (mixer(ours, place(Inputs(torch.zeros(3, T, dtype=torch.long)))[0])[0] * weight).sum().backward()
    (reference(theirs)[0] * weight).sum().backward()
    kind, said = name.split()[0], f"torch.nn.{type(reference).__name__}"
    agree(kind, said, ours.grad, theirs.grad, case=f"{name}, gradient of the input")
    assert mixer.there.up.weight.grad is None
    agree(kind, said, mixer.there.over.weight.grad, reference.weight_hh_l0.grad, case=f"{name}, frozen input weights")


@pytest.mark.rows("N10")
@pytest.mark.parametrize("name", ["rnn tanh", "rnn relu", "lstm", "gru"])
def test_sixteen_bits(name):
    """Gates and hidden states are rounded at every step on both sides; how near two such passes are is bfloat16's."""
    mixer, reference, _ = pair(name)
    x = torch.randn(2, T, D, dtype=torch.float64).bfloat16()
    got = mixer.bfloat16()(x, place(Inputs(torch.zeros(2, T, dtype=torch.long)))[0])[0]
    wanted = reference.bfloat16()(x)[0]
    got.float().sum().backward()
    wanted.float().sum().backward()
    kind, said = name.split()[0], f"torch.nn.{type(reference).__name__}"
    agree(kind, said, got, wanted, case=f"{name}, bf16")
    for mine, yours in zip(mixer.there.weights(), reference.parameters(), strict=True):
        agree(kind, said, mine.grad, yours.grad, case=f"{name}, bf16, gradients")
