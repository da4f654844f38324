"""Trained in parallel, decoded as a recurrence: what each token mixer costs against the length, counted not timed.

benchmarks/mixers.py has the times, docs/mixers.md the curves.
"""

import pytest
import torch

from octavo.models.cost import state_bytes
from octavo.models.decoder import Decoder, build
from octavo.nn.tables import TOKEN_MIXERS

pytestmark = pytest.mark.rows("S6")
NEAR, FAR = 1024, 8192


def layer(kind: str):
    heads = {"n_heads": 4} if "n_heads" in TOKEN_MIXERS[kind].Config.model_fields else {}
    block = {"mixer": {"kind": kind, **heads}, "channel": None}
    small = {"d_model": 64, "n_layers": 1, "vocab_size": 16, "max_seq_len": FAR, "blocks": {"block": block}}
    model = build(Decoder.Config.model_validate(small), device="meta")
    return model, model.mixers()["0.mixer"]


@pytest.mark.parametrize("kind", sorted(TOKEN_MIXERS))
def test_a_constant_state_means_linear_training_and_the_same_cost_for_every_new_token(kind):
    model, mixer = layer(kind)
    row = mixer.flops(FAR, FAR) / mixer.flops(NEAR, NEAR)
    token = mixer.flops(1, FAR) / mixer.flops(1, NEAR)
    held = [state_bytes(model.state_specs(), n, torch.float32) for n in (NEAR, FAR)]
    if mixer.capabilities.constant_state:
        assert row == pytest.approx(FAR / NEAR, rel=0.02) and token == 1
        assert held[0] == held[1] > 0
    else:
        assert row > 1.05 * FAR / NEAR or token > 1
        assert held[1] == pytest.approx(held[0] * FAR / NEAR, rel=0.01)


def test_both_sorts_are_there():
    promises = {kind: layer(kind)[1].capabilities.constant_state for kind in TOKEN_MIXERS}
    assert {"attention", "mla", "hyena"} <= {kind for kind, constant in promises.items() if not constant}
    assert {"mamba2", "mamba", "retention", "rwkv4", "rwkv6", "gla", "s4d", "lstm"} <= {
        kind for kind, constant in promises.items() if constant
    }
