"""A user's own mixer needs no fork: the contract serves a second kind of state."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from example_mixer import Gru

from octavo import laws
from octavo.laws.subject import Subject, randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

KIND = "example_mixer:Gru"


def test_a_recurrent_mixer_keeps_every_law():
    found = laws.check_component(KIND)
    assert {"alone", "hybrid", "parallel", "post", "channel"} <= set(found)
    for use, results in found.items():
        assert not [str(result) for result in results if not result.ok], use
    alone = {result.law: result.status for result in found["alone"]}
    assert alone["constant_state"] == alone["incremental"] == alone["packed"] == "holds"


def test_it_computes_what_torch_computes():
    config = Decoder.Config.model_validate(
        {"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 16, "positions": "none", "norm": "none",
         "blocks": {"block": {"mixer": {"kind": KIND, "width": 12}, "channel": None}}}
    )  # fmt: skip
    model = build(config).double()
    randomise(model, 0)
    mixer = model.blocks[0].layers["mixer"].mixer
    theirs = torch.nn.GRU(8, 12, batch_first=True).double()
    theirs.load_state_dict(
        {"weight_ih_l0": mixer.up.weight, "bias_ih_l0": mixer.up.bias,
         "weight_hh_l0": mixer.over.weight, "bias_hh_l0": mixer.over.bias}
    )  # fmt: skip
    tokens = torch.randint(11, (2, 9))
    x = model.embed(tokens)
    wanted = x + mixer.o(theirs(x)[0])
    assert torch.allclose(model(Inputs(tokens), needs=("hidden",)).hidden, wanted, atol=1e-12)


def without(line: str) -> type[Gru]:
    """The example with one line of its forward pass taken out."""
    import inspect

    source = inspect.getsource(sys.modules["example_mixer"])
    assert source.count(line) == 1
    module = types.ModuleType("broken_mixer")
    sys.modules["broken_mixer"] = module
    source = source.replace(line, "pass").replace("example_mixer:Gru", "broken_mixer:Gru")
    exec(compile(source, "broken_mixer", "exec"), module.__dict__)
    return module.Gru


@pytest.mark.parametrize(
    ("line", "law"),
    [
        ("h = torch.where(ctx.starts[:, t, None], torch.zeros_like(h), h)", "packed"),
        ("state.write(h=h)", "incremental"),
    ],
)
def test_a_mistake_in_it_is_found(line, law, monkeypatch):
    monkeypatch.setitem(sys.modules, "broken_mixer", types.ModuleType("broken_mixer"))
    without(line)
    config = laws.models_around("broken_mixer:Gru")["alone"]
    assert law in {result.law for result in laws.check(config) if not result.ok}


def test_a_promise_that_is_not_made_is_not_asked(monkeypatch):
    import dataclasses

    monkeypatch.setattr(Gru, "capabilities", dataclasses.replace(Gru.capabilities, packed=False, constant_state=False))
    results = {result.law: result.status for result in laws.check(laws.models_around(KIND)["alone"])}
    assert results["packed"] == results["constant_state"] == "not asked"


def test_every_depth_has_its_own_state():
    config = Decoder.Config.model_validate(laws.models_around(KIND)["hybrid"])
    subject = Subject(config)
    state = subject.model.new_state(2, 16)
    subject.logits(subject.tokens(2), state)
    first, last = state.layer("0.mixer").read("h"), state.layer("2.mixer").read("h")
    assert not torch.equal(first, last)
    assert state.layer("1.channel") is None
