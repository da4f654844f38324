"""Mamba-2 against transformers' Mamba2Mixer without its GPU kernels: outputs, gradients, decoding with a cache."""

from __future__ import annotations

import pytest
import torch
from proof import agree
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from octavo.nn.contracts import Dims, Inputs
from octavo.nn.mamba2 import Mamba2
from octavo.nn.state import ContiguousState, place

pytestmark = pytest.mark.rows("S2")
D, HEADS, WIDTH, N = 24, 6, 8, 10
REFERENCE = "transformers Mamba2Mixer"
NAMES = {
    "up.weight": "in_proj.weight", "up.bias": "in_proj.bias", "o.weight": "out_proj.weight", "o.bias": "out_proj.bias",
    "conv_bias": "conv1d.bias", "dt_bias": "dt_bias", "log_a": "A_log", "skip": "D", "scale": "norm.weight",
}  # fmt: skip


def pair(groups=2, bias=False, limit=None, dtype=torch.float32):
    """The same random weights in both."""
    torch.manual_seed(0)
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=D, num_heads=HEADS, head_dim=WIDTH, state_size=N, n_groups=groups, use_bias=bias, conv_kernel=4,
            use_conv_bias=bias, chunk_size=7, time_step_limit=limit or (0.0, float("inf")), num_hidden_layers=1,
        ),
        0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    ours = Mamba2(
        Mamba2.Config(
            n_heads=HEADS, head_dim=WIDTH, d_state=N, n_groups=groups, bias=bias, conv_bias=bias, dt_limit=limit,
            chunk=5,
        ),
        Dims(D, 1, 64),
    )  # fmt: skip
    weights = dict(theirs.named_parameters())
    own = {name: weights[source].detach() for name, source in NAMES.items() if source in weights}
    ours.load_state_dict(own | {"conv_weight": theirs.conv1d.weight.detach()[:, 0]})
    return ours.to(dtype), theirs.to(dtype)


def gradient(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


def inputs(n):
    return Inputs(torch.zeros(2, n, dtype=torch.long))


@pytest.mark.parametrize("settings", [{}, {"groups": 1}, {"groups": 6, "bias": True}, {"limit": (0.05, 0.4)}], ids=str)
@pytest.mark.parametrize("length", [1, 23])
def test_outputs_and_every_gradient(settings, length):
    ours, theirs = pair(**settings)
    x = torch.randn(2, length, D)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = ours(mine, place(inputs(length))[0])[0], theirs(yours)
    agree("mamba2", REFERENCE, got, wanted, case=f"outputs {settings} T={length}")
    direction = torch.randn_like(got)
    (got * direction).sum().backward()
    (wanted * direction).sum().backward()
    agree("mamba2", REFERENCE, gradient(mine), gradient(yours), case=f"input gradient {settings} T={length}")
    weights, own = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for name, source in NAMES.items():
        if source in weights:
            agree(
                "mamba2",
                REFERENCE,
                gradient(own[name]),
                gradient(weights[source]),
                case=f"gradient of {name} {settings}",
            )
    agree(
        "mamba2", REFERENCE, gradient(own["conv_weight"]), gradient(theirs.conv1d.weight)[:, 0], case="gradient of conv"
    )


@torch.no_grad()
def test_decoding_with_a_cache():
    ours, theirs = pair()
    x = torch.randn(2, 20, D)
    cache = DynamicCache(config=Mamba2Config(num_hidden_layers=1))
    state = ContiguousState({"0": ours.state_spec()}, 2, 20, torch.float32)
    for step, part in enumerate(x.split([9, *[1] * 11], 1)):
        got = ours(part, state.begin(inputs(part.shape[1])), state.layer("0"))[0]
        agree("mamba2", REFERENCE, got, theirs(part, cache_params=cache), case=f"cached, part {step}")


@torch.no_grad()
def test_bf16_stays_near():
    ours, theirs = pair(dtype=torch.bfloat16)
    x = torch.randn(2, 23, D).bfloat16()
    agree("mamba2", REFERENCE, ours(x, place(inputs(23))[0])[0], theirs(x), case="bf16")
