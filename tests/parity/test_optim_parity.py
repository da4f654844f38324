"""Optimizers, schedules and the loss against torch and transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from octavo.batch import Batch
from octavo.hub.folder import FAMILIES
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Outputs
from octavo.objectives.likelihood import CausalLikelihood
from octavo.training.optim import role_of
from octavo.training.optimizers import OPTIMIZERS
from octavo.training.schedule import SCHEDULES


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small() -> Decoder:
    block = {"mixer": {"kind": "attention", "n_heads": 2, "qkv_bias": True}}
    config = {"d_model": 8, "n_layers": 2, "vocab_size": 13, "max_seq_len": 16, "blocks": {"block": block}}
    model = build(Decoder.Config.model_validate(config))
    randomise(model, 0)
    return model


CASES = {
    "adamw": ({"lr": 0.03, "weight_decay": 0.2, "beta2": 0.97}, torch.optim.AdamW, {"betas": (0.9, 0.97)}),
    "sgd": ({"lr": 0.05, "weight_decay": 0.1}, torch.optim.SGD, {}),
    "sgd momentum": ({"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
}


def test_five_steps_of_muon_equal_torch(monkeypatch):
    """Matrices by torch.optim.Muon, which makes them orthogonal in bf16: here both do it in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    kind = OPTIMIZERS["muon"]
    config = kind.Config(lr=0.02, weight_decay=0.1, momentum=0.9, other_scale=0.5)
    ours_model, model = small(), small()
    ours, roles = kind(config, ours_model), role_of(model)
    matrices = [p for n, p in model.named_parameters() if ours.rule_of(p, roles[n]) == "muon"]
    assert len(matrices) == 2 * 7, "q, k, v, o, gate, up and down of two layers"
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in rest]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, q in zip(ours_model.parameters(), model.parameters(), strict=True):
            drawn = torch.randn(p.shape, generator=generator)
            p.grad.copy_(drawn)
            q.grad = drawn.clone()
        ours.gather()
        ours.step(0.02)
        theirs.step()
    ours_of = dict(ours_model.named_parameters())
    for name, q in model.named_parameters():
        if any(q is p for p in matrices):
            torch.testing.assert_close(ours_of[name], q, rtol=1e-4, atol=1e-5, msg=name)
    changed = [ours_of[n] for n, p in model.named_parameters() if any(p is q for q in rest)]
    assert all((new - old).abs().max() > 1e-3 for new, old in zip(changed, before, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_torch(name):
    values, theirs, more = CASES[name]
    kind = OPTIMIZERS[name.split()[0]]
    ours_model, model = small(), small()
    ours = kind(kind.Config(**values), ours_model)
    roles = role_of(model)
    plain = {"norm", "bias", "other", "embed", "position"}
    groups = [
        {"params": [p for n, p in model.named_parameters() if (roles[n] in plain) == undecayed], "weight_decay": decay}
        for undecayed, decay in ((True, 0.0), (False, values["weight_decay"]))
    ]
    reference = theirs(groups, lr=values["lr"], **more)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for p, q in zip(ours_model.parameters(), model.parameters(), strict=True):
            drawn = torch.randn(p.shape, generator=generator)
            p.grad.copy_(drawn)
            q.grad = drawn.clone()
        rate = values["lr"] * (step + 1) / 5
        for group in reference.param_groups:
            group["lr"] = rate
        ours.gather()
        ours.step(rate)
        reference.step()
    for (key, p), q in zip(ours_model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=key)


def test_gradient_norm_and_clipping_equal_torch():
    ours_model, model = small(), small()
    kind = OPTIMIZERS["sgd"]
    ours = kind(kind.Config(lr=1.0), ours_model)
    for p, q in zip(ours_model.parameters(), model.parameters(), strict=True):
        p.grad.copy_(torch.randn(p.shape))
        q.grad = p.grad.clone()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.7)
    assert float(ours.grad_norm()) == pytest.approx(float(norm), rel=1e-5)
    before = [p.detach().clone() for p in ours_model.parameters()]
    ours.step(1.0, 0.7 / (float(ours.grad_norm()) + 1e-6))
    for start, p, q in zip(before, ours_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(start - p, q.grad, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------- schedules


def torch_rates(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


REFERENCES = {
    "constant": ({}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    "cosine": ({"final": 0.1}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1)),
    "linear": ({"final": 0.2}, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, 40)),
    "wsd": (
        {"decay": 0.25, "final": 0.0},
        lambda o: transformers.get_wsd_schedule(
            o, num_warmup_steps=0, num_stable_steps=30, num_decay_steps=10, decay_type="linear"
        ),
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_torch_after_the_warm_up(kind, warmup):
    """40 steps after ``warmup`` steps of linear rise that neither begin with zero nor repeat the peak."""
    values, make = REFERENCES[kind]
    ours = SCHEDULES[kind](SCHEDULES[kind].Config(warmup=warmup, **values))
    steps = 40 + warmup
    got = [ours.factor(step, steps) for step in range(steps)]
    assert got[warmup:] == pytest.approx(torch_rates(make, 40), abs=1e-9)
    rise = torch_rates(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1 / (warmup + 1), 1.0, warmup), warmup)
    assert got[:warmup] == pytest.approx(rise)


# -------------------------------------------------------------------------------------------------- loss


@pytest.mark.rows("F8", "G1")
def test_the_loss_of_shifted_tokens_equals_transformers():
    """Their model shifts labels itself; our batches come shifted. Prompt and padding are -100 there, masked here."""
    hf = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    theirs = transformers.LlamaForCausalLM(hf).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.2)
    ours = build(FAMILIES["llama"].read(hf.to_dict())).eval()
    family = FAMILIES["llama"]
    with torch.no_grad():
        state, own = theirs.state_dict(), dict(ours.named_parameters())
        for entry in family.entries(ours.config):
            own[entry.ours[0]].copy_(state[entry.theirs])
    text, n = torch.randint(23, (3, 10)), torch.tensor([10, 7, 4])
    counted = (torch.arange(10) >= 2) & (torch.arange(10) < n[:, None])
    mask = (torch.arange(10) < n[:, None]).long()
    labels = torch.where(counted, text, -100)
    wanted = theirs(text, attention_mask=mask, labels=labels).loss
    order = torch.arange(9).expand(3, 9)
    valid = mask[:, :-1].bool()
    batch = Batch(text[:, :-1], text[:, 1:], counted[:, 1:].float(), torch.where(valid, 0, -1), order, valid)
    objective = CausalLikelihood()
    loss = objective.loss_sum(ours(batch.inputs()), batch) / objective.weight(batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.rows("F8")
def test_the_loss_per_token_equals_torch():
    logits, targets = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    mask = (torch.rand(3, 5) < 0.6).float()
    batch = Batch(targets, targets, mask, targets, targets, mask.bool())
    wanted = F.cross_entropy(
        logits.flatten(0, 1), torch.where(mask.bool(), targets, -100).flatten(), ignore_index=-100, reduction="sum"
    )
    got = CausalLikelihood().loss_sum(Outputs(logits=logits), batch)
    torch.testing.assert_close(got, wanted)
    by_hand = sum(
        float(torch.logsumexp(logits[b, t], -1) - logits[b, t, targets[b, t]])
        for b in range(3) for t in range(5) if mask[b, t]
    )  # fmt: skip
    assert float(got) == pytest.approx(by_hand, rel=1e-5)
