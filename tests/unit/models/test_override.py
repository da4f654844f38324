"""The rotary scaling of a model that has its weights."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import UnsupportedError
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.models.override import set_rope_scaling
from octavo.nn.contracts import Inputs
from octavo.nn.rope_scaling import ROPE_SCALINGS, Dynamic, Linear, LongRope, Ntk, Yarn


def model(positions="rope", head_dim: int = 8) -> Decoder:
    block = {"mixer": {"kind": "attention", "n_heads": 2, "head_dim": head_dim}}
    config = {"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 8, "positions": positions,
              "blocks": {"block": block}}  # fmt: skip
    built = build(Decoder.Config.model_validate(config)).double().eval()
    randomise(built, 3)
    return built


def tokens() -> Inputs:
    return Inputs(torch.randint(19, (2, 24), generator=torch.Generator().manual_seed(0)))


@pytest.mark.rows("R6", "R7", "R9", "R10")
@pytest.mark.parametrize("kind", [kind for kind in ROPE_SCALINGS if kind != "longrope"])
@torch.no_grad()
def test_a_changed_model_is_one_built_with_that_scaling(kind):
    changed, wanted = model(), model({"kind": "rope", "scaling": kind})
    before = {name: p.clone() for name, p in changed.named_parameters()}
    plain = changed(tokens()).logits
    set_rope_scaling(changed, ROPE_SCALINGS[kind].Config())
    got = changed(tokens()).logits
    assert torch.equal(got, wanted(tokens()).logits)
    assert not torch.equal(got, plain)
    assert changed.config == wanted.config and changed.max_seq_len == 8
    assert all(torch.equal(p, before[name]) for name, p in changed.named_parameters())
    set_rope_scaling(changed, None)
    assert torch.equal(changed(tokens()).logits, plain)


def test_the_trained_length_is_the_models():
    changed = model()
    set_rope_scaling(changed, Yarn.Config(factor=4.0))
    assert changed.positions.scaling.original == 8
    set_rope_scaling(changed, Yarn.Config(factor=4.0, original=6))
    assert changed.positions.scaling.original == 6


@torch.no_grad()
def test_a_state_made_afterwards_serves_it():
    changed = model()
    set_rope_scaling(changed, Dynamic.Config(factor=2.0))
    text = tokens().tokens
    state = changed.new_state(2, 24)
    parts = [changed(Inputs(t), state=state).logits for t in text.split([5, 1, 4, 14], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), changed(tokens()).logits, rtol=0, atol=1e-10)


def test_what_does_not_turn_is_refused():
    for positions in ("none", "learned", "alibi"):
        with pytest.raises(UnsupportedError, match=f"positions {positions}"):
            set_rope_scaling(model(positions), Linear.Config())


def test_what_does_not_fit_the_heads_is_refused():
    narrow = model(head_dim=2)
    with pytest.raises(UnsupportedError, match="two pairs of channels"):
        set_rope_scaling(narrow, Ntk.Config())
    long = LongRope.Config(short=(1.0,), long=(1.0,), original=8, extended=16)
    with pytest.raises(UnsupportedError, match="1 factors for 4 pairs"):
        set_rope_scaling(model(), long)
    assert narrow.config == model(head_dim=2).config
