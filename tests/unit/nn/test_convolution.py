"""Windows over the last tokens: the convolution mixer, Bengio's, and one interface for every sequence model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.bengio import Bengio
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.convolution import Convolution
from octavo.nn.state import place

D = 6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def context(T: int, **named):
    return place(Inputs(torch.zeros(1, T, dtype=torch.long), **named))[0]


def model(*mixers: dict, **values) -> Decoder:
    """One layer a mixer, nothing between them but the residual stream."""
    blocks = {str(i): {"mixer": mixer, "channel": None} for i, mixer in enumerate(mixers)}
    config = {"d_model": 8, "n_layers": len(mixers), "vocab_size": 11, "max_seq_len": 64, "blocks": blocks,
              "positions": "none", **values}  # fmt: skip
    made = build(Decoder.Config.model_validate(config)).double()
    randomise(made, 0)
    return made


def seen_by(made: Decoder, T: int, at: int) -> list[int]:
    """The tokens whose embedding the prediction at ``at`` depends on, by its gradient."""
    leaves = []
    hook = made.embed.register_forward_hook(lambda m, a, out: leaves.append(out.detach().requires_grad_()) or leaves[0])
    logits = made(Inputs(torch.randint(11, (1, T)))).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, at].square().sum(), leaves[0])
    return gradient[0].ne(0).any(-1).nonzero().flatten().tolist()


@pytest.mark.rows("N13")
@pytest.mark.parametrize(("width", "dilation"), [(4, 1), (3, 2), (1, 1), (2, 5)])
def test_it_is_torchs_convolution_padded_on_the_left(width, dilation):
    mixer = Convolution(Convolution.Config(width=width, dilation=dilation, channels=5), Dims(D, 1, 64)).double()
    randomise(mixer, 0)
    theirs = torch.nn.Conv1d(D, 5, width, dilation=dilation).double()
    with torch.no_grad():
        theirs.weight.copy_(mixer.up.weight.view(5, width, D).transpose(1, 2))
        theirs.bias.copy_(mixer.up.bias)
    x = torch.randn(1, 17, D, dtype=torch.float64)
    padded = F.pad(x.transpose(1, 2), ((width - 1) * dilation, 0))
    wanted = mixer.o(F.gelu(theirs(padded).transpose(1, 2)))
    assert torch.allclose(mixer(x, context(17))[0], wanted, atol=1e-12)


@pytest.mark.rows("N13")
@pytest.mark.parametrize("shapes", [[(4, 1)], [(2, 1), (2, 2), (2, 4)], [(3, 1), (5, 3)], [(3, 2), (1, 7)]])
def test_the_receptive_field_is_the_formula(shapes):
    made = model(*({"kind": "convolution", "width": w, "dilation": d} for w, d in shapes))
    field = 1 + sum((w - 1) * d for w, d in shapes)
    assert sum(mixer.reach for mixer in made.mixers().values()) == field - 1
    seen = seen_by(made, 40, 30)
    assert seen[-1] == 30 and seen[0] == 30 - field + 1
    if all(d <= 1 + sum((w - 1) * e for w, e in shapes[:i]) for i, (_, d) in enumerate(shapes)):
        assert len(seen) == field  # without gaps


@pytest.mark.rows("N8")
@pytest.mark.parametrize(("n", "direct"), [(1, False), (3, False), (7, True)])
def test_bengios_prediction_depends_on_exactly_n_tokens(n, direct):
    made = model({"kind": "bengio", "context": n, "direct": direct})
    assert seen_by(made, 20, 12) == list(range(12 - n + 1, 13))
    assert seen_by(made, 20, 1) == list(range(max(0, 2 - n), 2))  # before the text there is nothing


@pytest.mark.rows("N8")
@torch.no_grad()
def test_bengios_layer_is_tanh_of_the_inputs_in_a_row():
    mixer = Bengio(Bengio.Config(context=3, width=5, direct=True), Dims(D, 1, 64)).double()
    randomise(mixer, 0)
    x = torch.randn(1, 9, D, dtype=torch.float64)
    got = mixer(x, context(9))[0][0]
    for t in range(9):
        row = torch.cat([x[0, s] if s >= 0 else torch.zeros(D, dtype=x.dtype) for s in (t - 2, t - 1, t)])
        hidden = torch.tanh(mixer.up.weight @ row + mixer.up.bias)
        wanted = mixer.o.weight @ hidden + mixer.o.bias + mixer.direct.weight @ row
        assert torch.allclose(got[t], wanted, atol=1e-12)


@pytest.mark.rows("N9")
def test_one_interface_serves_every_sequence_model():
    """Vectors of tokens to vectors of their contexts, (B, T, D) to (B, T, D), in one decoder, mixed as one likes."""
    kinds = ["bengio", "rnn", "lstm", "gru", "convolution", "attention", "s4d", "mamba", "hyena"]
    tokens = torch.randint(11, (2, 13))
    for kind in kinds:
        made = model({"kind": kind} | ({"n_heads": 2} if kind == "attention" else {}))
        (mixer,) = made.mixers().values()
        x = torch.randn(2, 13, 8, dtype=torch.float64)
        y, aux = mixer(x, place(Inputs(tokens))[0])
        assert y.shape == x.shape and not aux
        whole, state = made(Inputs(tokens)).logits, made.new_state(2, 13)
        parts = [made(Inputs(part), state).logits for part in tokens.split([6, 1, 6], 1)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10), kind
    every = model(*({"kind": kind} | ({"n_heads": 2} if kind == "attention" else {}) for kind in kinds))
    assert every(Inputs(tokens), needs=("hidden",)).hidden.shape == (2, 13, 8)
