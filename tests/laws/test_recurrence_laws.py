"""Every law on state spaces, convolutions and recurrent networks in the shapes that the table's defaults are not."""

from __future__ import annotations

import pytest

from octavo import laws

VARIANTS = {
    "s4d by long convolutions": {"kind": "s4d", "backend": "convolution", "state_size": 6},
    "s4d step by step": {"kind": "s4d", "backend": "plain", "state_size": 2},
    "mamba step by step": {"kind": "mamba", "backend": "plain"},
    "mamba without a convolution": {"kind": "mamba", "conv_width": 1, "bias": True, "expand": 0.5, "conv_bias": False},
    "rnn with a sigmoid": {"kind": "rnn", "activation": "sigmoid", "width": 5},
    "rnn with relu": {"kind": "rnn", "activation": "relu"},
    "lstm step by step": {"kind": "lstm", "backend": "plain", "width": 20},
    "bengio over one token": {"kind": "bengio", "context": 1},
    "bengio over more than the text": {"kind": "bengio", "context": 20, "direct": True},
    "convolution with gaps": {"kind": "convolution", "width": 3, "dilation": 3, "channels": 7, "bias": False},
    "convolution of one token": {"kind": "convolution", "width": 1},
    "hyena lag by lag": {"kind": "hyena", "backend": "plain", "filter_width": 8},
    "hyena as its authors count": {"kind": "hyena", "order": 3, "gate_first": True, "filter_width": 8},
    "hyena without long kernels": {"kind": "hyena", "order": 1, "gate_first": True, "short": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_law_on_a_variant(name):
    results = laws.check(laws.models_around(**VARIANTS[name])["alone"])
    assert not [str(result) for result in results if not result.ok]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s4d", "mamba", "rnn", "lstm", "gru", "bengio", "convolution", "hyena"])
def test_they_compile(kind):
    (result,) = laws.check(laws.models_around(kind)["alone"], ["compilable"])
    assert result.ok, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_both_directions_compile(kind):
    config = laws.models_around(kind, both="concat")["alone"] | {"causal": False}
    (result,) = laws.check(config, ["compilable"])
    assert result.ok, str(result)
