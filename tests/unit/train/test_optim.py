"""Flat optimizers: groups by role, 16-bit weights with masters, what a checkpoint takes and gives back."""

from __future__ import annotations

import pytest
import torch

from octavo.models.decoder import Decoder, build
from octavo.training.optim import OPTIMIZERS, role_of


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


BLOCK = {"mixer": {"kind": "attention", "n_heads": 2, "qkv_bias": True}}


def model(**changes) -> Decoder:
    config = {"d_model": 8, "n_layers": 1, "vocab_size": 13, "max_seq_len": 8, "blocks": {"block": BLOCK}} | changes
    return build(Decoder.Config.model_validate(config))


def make(kind: str, on: Decoder, dtype: torch.dtype = torch.float32, **values):
    return OPTIMIZERS[kind](OPTIMIZERS[kind].Config(**values), on, dtype)


def test_roles_of_every_parameter():
    roles = role_of(model(tie_embeddings=False, head_bias=True, positions="learned", norm="layernorm"))
    assert roles["embed.weight"] == "embed"
    assert roles["positions.table.weight"] == "position"
    assert roles["head.weight"] == "head"
    assert roles["head.bias"] == roles["blocks.0.layers.mixer.mixer.q.bias"] == roles["norm.bias"] == "bias"
    assert roles["blocks.0.layers.mixer.norm_in.weight"] == "norm"
    assert roles["blocks.0.layers.channel.mixer.down.weight"] == "down"
    assert "other" not in roles.values()
    assert role_of(model(head_bias=True))["head_bias"] == "bias"


def decay_of(kind: str, one: Decoder, **values) -> dict[str, bool]:
    """Which parameters shrink when the gradient is zero."""
    with torch.no_grad():
        for p in one.parameters():
            p.add_(1.0)
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    optimizer = make(kind, one, **values)
    optimizer.step(values["lr"])
    return {name: not torch.equal(p, before[name]) for name, p in one.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_decay_acts_by_role(kind):
    one = model()
    moved = decay_of(kind, one, lr=0.1, weight_decay=0.5)
    roles = role_of(one)
    assert {roles[name] for name, changed in moved.items() if changed} == {"q", "k", "v", "o", "gate", "up", "down"}
    moved = decay_of(kind, model(), lr=0.1, weight_decay=0.5, no_decay_roles=("q",))
    assert [name for name, changed in moved.items() if not changed] == ["blocks.0.layers.mixer.mixer.q.weight"]


def test_a_rate_by_role():
    one = model()
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    optimizer = make("sgd", one, lr=1.0, lr_scale={"embed": 0.1, "q": 0.0})
    for p in one.parameters():
        p.grad.fill_(1.0)
    optimizer.gather()
    optimizer.step(1.0)
    moved = {name: float((before[name] - p).mean()) for name, p in one.named_parameters()}
    assert moved["embed.weight"] == pytest.approx(0.1)
    assert moved["blocks.0.layers.mixer.mixer.q.weight"] == 0
    assert moved["blocks.0.layers.mixer.mixer.k.weight"] == pytest.approx(1.0)


def test_parameters_become_views_and_keep_their_values():
    one = model()
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    optimizer = make("adamw", one)
    for name, p in one.named_parameters():
        assert torch.equal(p, before[name])
        assert (p.grad == 0).all()
    assert sum(group.master.numel() for group in optimizer.groups) == sum(p.numel() for p in one.parameters())
    one.embed.weight.grad[3] = 2.0
    assert float(optimizer.grad_norm()) == pytest.approx(2 * 8**0.5)


def test_sixteen_bit_weights_learn_from_steps_smaller_than_their_rounding():
    one = model()
    with torch.no_grad():
        one.embed.weight.fill_(1.0)
    optimizer = make("sgd", one, torch.bfloat16, lr=1.0)
    assert one.embed.weight.dtype == torch.bfloat16
    for _ in range(8):
        one.embed.weight.grad.fill_(1.0)
        optimizer.gather()
        optimizer.step(1e-3)  # a bf16 weight of 1 cannot move by 0.001
    torch.testing.assert_close(one.embed.weight.float(), torch.full((13, 8), 0.992), rtol=0, atol=0.002)
    master = dict(optimizer.tensors())["model/embed.weight"]
    torch.testing.assert_close(master, torch.full((13, 8), 0.992))


def test_sixteen_bit_gradients_are_added_in_fp32():
    one = model()
    optimizer = make("sgd", one, torch.bfloat16)
    for _ in range(300):  # in bf16 a sum of ones stops at 256
        one.embed.weight.grad.fill_(1.0)
        optimizer.gather()
    total = next(g.views(g.total)[g.names.index("embed.weight")] for g in optimizer.groups if "embed.weight" in g.names)
    assert (total == 300).all()
    optimizer.clear()
    assert float(optimizer.grad_norm()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_saved_is_all_there_is(kind, dtype):
    """Restored into another model, the next steps are the same bits."""

    def steps(optimizer, one, n, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            for p in one.parameters():
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            optimizer.gather()
            optimizer.step(0.01)

    first, second = model(), model()
    a = make(kind, first, dtype)
    steps(a, first, 3, 0)
    saved = {name: tensor.clone() for name, tensor in a.tensors()}
    b = make(kind, second, dtype)
    b.restore(saved, a.updates)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    steps(a, first, 2, 1)
    steps(b, second, 2, 1)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert a.updates == b.updates == 5


def test_frozen_parameters_stay_out():
    one = model()
    one.embed.weight.requires_grad_(False)
    optimizer = make("adamw", one)
    assert "model/embed.weight" not in dict(optimizer.tensors())
