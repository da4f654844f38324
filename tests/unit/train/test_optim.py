"""Flat optimizers: groups by role, 16-bit weights with masters, what a checkpoint takes and gives back."""

from __future__ import annotations

import pytest
import torch

from octavo.models.decoder import Decoder, build
from octavo.training.adamw_8bit import from_float8, to_float8
from octavo.training.optim import WeightAverage, role_of
from octavo.training.optimizers import OPTIMIZERS


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


def gradients_of_a_quadratic(on: Decoder) -> None:
    for p in on.parameters():
        p.grad.copy_(p.detach() - 0.5)


def test_the_average_is_the_running_mean_and_is_what_is_kept():
    one = model()
    optimizer = OPTIMIZERS["sgd"](OPTIMIZERS["sgd"].Config(lr=0.1), one, torch.float32, WeightAverage(decay=0.9))
    name, weight = next(iter(one.named_parameters()))
    expected = weight.detach().clone()
    for n in range(1, 30):
        gradients_of_a_quadratic(one)
        optimizer.step(0.1)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach()
    own = weight.detach().clone()
    assert not torch.allclose(own, expected, atol=1e-3)
    with optimizer.averaged():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), own)
    torch.testing.assert_close(dict(optimizer.tensors())[f"average/{name}"], expected)
    optimizer.release()
    torch.testing.assert_close(dict(one.named_parameters())[name].detach(), expected)


def test_float8_rounds_by_chance_and_stays_within_a_step():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator) * torch.logspace(-4, 2, 1000)
    found = torch.stack([from_float8(*to_float8(x, torch.rand(1024, generator=generator))) for _ in range(400)])
    step = (
        x.abs() / 8
        + 1e-6
        + torch.nn.functional.pad(x, (0, 24)).view(-1, 256).abs().amax(-1).repeat_interleave(256)[:1000] / 448 * 2**-9
    )
    assert ((found - x).abs() <= step).all()
    assert ((found.mean(0) - x).abs() <= step / 4).all()  # unbiased: 400 draws, five deviations


def test_float8_keeps_what_is_positive_positive_and_zero_zero():
    x = torch.zeros(300)
    x[7], x[8] = 1e-20, 1.0
    wide = from_float8(*to_float8(x, torch.full((512,), 0.5), keep_positive=True))
    assert wide[7] > 0 and float(wide[8]) == pytest.approx(1) and not wide[9:].any() and not wide[:7].any()


def test_eight_bit_moments_follow_adamw_and_take_a_quarter_of_the_memory():
    ends = {}
    for kind in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        one = model(d_model=32)
        optimizer = make(kind, one, lr=0.01, weight_decay=0.1)
        for _ in range(60):
            gradients_of_a_quadratic(one)
            optimizer.step(0.01)
        ends[kind] = torch.cat([p.detach().flatten() for p in one.parameters()])
        moments = sum(t.numel() * t.element_size() for n, t in optimizer.tensors() if n.startswith("optimizer/"))
        ends[f"{kind} bytes"] = moments / ends[kind].numel()
    assert float((ends["adamw"] - ends["adamw_8bit"]).abs().mean()) < 0.01
    assert float((ends["adamw"] - 0.5).abs().mean()) < 0.2  # it went somewhere
    assert ends["adamw bytes"] == 8 and ends["adamw_8bit bytes"] < 2.2


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_what_was_saved_goes_on_to_the_same_bits(kind):
    def run(on: Decoder, optimizer, n: int) -> None:
        for _ in range(n):
            gradients_of_a_quadratic(on)
            optimizer.step(0.01)

    torch.manual_seed(0)
    one = model()
    whole = OPTIMIZERS[kind](OPTIMIZERS[kind].Config(), one, torch.float32, WeightAverage())
    run(one, whole, 3)
    saved = {name: tensor.clone() for name, tensor in whole.tensors()}
    run(one, whole, 3)
    two = model()
    other = OPTIMIZERS[kind](OPTIMIZERS[kind].Config(), two, torch.float32, WeightAverage())
    other.restore(saved, 3)
    run(two, other, 3)
    for (name, found), (_, expected) in zip(other.tensors(), whole.tensors(), strict=True):
        assert torch.equal(found, expected), name
