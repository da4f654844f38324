"""How much of an error reaches earlier tokens, against a loop over autograd, and what it shows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from octavo.errors import UnsupportedError
from octavo.eval.gradients import gradient_by_position
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

V, D = 11, 16


def model_of(mixer, n_layers=1):
    config = {
        "vocab_size": V, "d_model": D, "n_layers": n_layers, "max_seq_len": 64, "positions": "none",
        "blocks": {"block": {"mixer": mixer, "channel": None}}, "init": {"std": D**-0.5},
    }  # fmt: skip
    return build(Decoder.Config.model_validate(config), seed=3).double()


def texts(rows=2, length=48):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (rows, length), generator=generator)
    return tokens, torch.randint(V, (rows,), generator=generator)


@pytest.mark.rows("N11")
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru", "attention"])
@pytest.mark.parametrize("layer", [0, 1])
def test_it_is_the_gradient_of_each_rows_own_last_loss(kind, layer):
    """Row by row without its padding, which stands at the end of one row and before the other."""
    model = model_of({"kind": kind} | ({"n_heads": 2} if kind == "attention" else {}), n_layers=2)
    tokens, targets = texts(length=9)
    order = torch.arange(9)
    valid = torch.stack([order < 7, order >= 3])
    found = gradient_by_position(model, Inputs(tokens, valid), targets, layer=layer)
    for row in range(2):
        one = Inputs(tokens[row : row + 1, valid[row]])
        outputs = model(one, needs=("logits", "hidden_states"))
        loss = cross_entropy(outputs.logits[0, -1], targets[row])
        (wanted,) = torch.autograd.grad(loss, outputs.hidden_states[layer])
        assert torch.allclose(found[row, valid[row]], wanted[0].square().sum(-1).sqrt(), atol=1e-14, rtol=1e-10)
        assert not found[row, ~valid[row]].any()
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.rows("N11")
def test_it_is_the_derivative_that_differences_show():
    """Without autograd: the loss when one channel of one embedded token moves a little."""
    model = model_of({"kind": "rnn"})
    tokens, targets = texts(rows=1, length=4)
    tokens[0] = torch.tensor([1, 2, 3, 4])  # each row of the table is one token of the text
    found = gradient_by_position(model, Inputs(tokens), targets)
    apart = build(model.config.model_copy(update={"tie_embeddings": False}), seed=3).double()
    apart.load_state_dict(model.state_dict() | {"head.weight": model.embed.weight.detach().clone()})
    with torch.no_grad():
        for t in range(4):
            slopes = []
            for channel in range(D):
                losses = []
                for step in (1e-5, -1e-5):
                    apart.embed.weight[t + 1, channel] += step
                    losses.append(cross_entropy(apart(Inputs(tokens)).logits[0, -1], targets[0]))
                    apart.embed.weight[t + 1, channel] -= step
                slopes.append((losses[0] - losses[1]) / 2e-5)
            assert float(torch.stack(slopes).norm()) == pytest.approx(float(found[0, t]), rel=1e-5)


@pytest.mark.rows("N11")
def test_relative_is_in_units_of_the_error_at_the_logits():
    model = model_of({"kind": "gru"})
    tokens, targets = texts()
    plain, relative = (gradient_by_position(model, Inputs(tokens), targets, relative=r) for r in (False, True))
    logits = model(Inputs(tokens)).logits[:, -1].detach()
    error = (logits.softmax(-1) - torch.eye(V, dtype=logits.dtype)[targets]).norm(dim=-1)
    assert torch.allclose(plain, relative * error[:, None], rtol=1e-10, atol=0)


@pytest.mark.rows("N11")
def test_it_vanishes_in_a_simple_network_and_not_in_attention():
    """Before any training, 47 tokens back against 2 tokens back."""
    tokens, targets = texts(rows=8)

    def left(kind, **settings):
        norms = gradient_by_position(model_of({"kind": kind, **settings}), Inputs(tokens), targets)
        return float(norms[:, 0].mean() / norms[:, -3].mean())

    assert left("rnn") < 1e-4
    assert 0.1 < left("attention", n_heads=2) < 10


@pytest.mark.rows("N11")
def test_an_lstm_that_keeps_its_cell_carries_it_further_than_one_that_halves_it():
    """The gradient along the cell is the product of the forget gates (Gers et al. 2000; Jozefowicz et al. 2015)."""
    tokens, targets = texts(rows=8)
    found = []
    for bias in (0.0, 4.0):
        model = model_of({"kind": "lstm"})
        with torch.no_grad():
            model.mixers()["0.mixer"].there.up.bias[D : 2 * D] = bias
        norms = gradient_by_position(model, Inputs(tokens), targets)
        found.append(float(norms[:, 0].mean() / norms[:, -3].mean()))
    assert found[0] < 1e-6 < 1e-3 < found[1]


def test_no_such_layer():
    tokens, targets = texts()
    with pytest.raises(UnsupportedError, match="no layer 1"):
        gradient_by_position(model_of({"kind": "rnn"}), Inputs(tokens), targets, layer=1)
