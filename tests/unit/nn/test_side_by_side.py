"""Mixers side by side: the scaled sum of what each makes alone, with the state of each."""

import pytest
import torch

from octavo import laws
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Inputs

TWO = {
    "kind": "side_by_side",
    "mixers": {"near": {"kind": "attention", "n_heads": 4, "window": 3}, "far": {"kind": "attention", "n_heads": 4}},
    "scales": {"far": 0.5},
}


def config(mixer) -> Decoder.Config:
    blocks = {"block": {"mixer": mixer, "channel": None}}
    small = {"d_model": 16, "n_layers": 1, "vocab_size": 17, "max_seq_len": 16, "norm": "none", "blocks": blocks}
    return Decoder.Config.model_validate(small)


def test_it_is_the_scaled_sum():
    both = build(config(TWO)).double()
    tokens, x = torch.randint(17, (2, 9)), {}
    x["both"] = both(Inputs(tokens), needs=("hidden_states",)).hidden_states
    for name in ("near", "far"):
        one = build(config(TWO["mixers"][name])).double()
        part = both.blocks[0].layers["mixer"].mixer.parts[name]
        one.load_state_dict({k: v for k, v in both.state_dict().items() if "mixer" not in k}, strict=False)
        one.blocks[0].layers["mixer"].mixer.load_state_dict(part.state_dict())
        states = one(Inputs(tokens), needs=("hidden_states",)).hidden_states
        x[name] = states[1] - states[0]
    torch.testing.assert_close(x["both"][1] - x["both"][0], x["near"] + 0.5 * x["far"])


def test_every_law_holds_and_each_has_its_state():
    made = build(config(TWO))
    fields = made.state_specs()["0.mixer"]
    assert {name: field.kind for name, field in fields.items()} == {
        "near.k": "ring", "near.v": "ring", "far.k": "token", "far.v": "token",
    }  # fmt: skip
    for use, results in laws.check_component(**TWO).items():
        assert not [str(result) for result in results if not result.ok], use


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scales": {"nobody": 1.0}}, r"scales names \['nobody'\]"),
        ({"mixers": {"a": "what"}}, "'what' is no token mixer"),
        ({"mixers": {"a": {"kind": "attention", "n_heads": 4}, "b": {"kind": "attention", "n_heads": 2}}, "scales": {}},
         "heads of several kinds"),
        ({"mixers": {}, "scales": {}}, "at least 1"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        config(TWO | change)


def test_the_configuration_survives_being_written():
    made = config(TWO)
    assert Decoder.Config.model_validate_json(made.model_dump_json()) == made
