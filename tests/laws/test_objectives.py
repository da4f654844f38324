"""Every objective of the table: a sum and a weight, so that accumulation is exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from octavo import laws
from octavo.laws.objective import uneven_batch
from octavo.laws.subject import randomise
from octavo.models.decoder import Decoder, build
from octavo.nn.contracts import Outputs
from octavo.objectives.classes import ClassLoss
from octavo.objectives.likelihood import CausalLikelihood
from octavo.objectives.masked import MaskedLikelihood
from octavo.objectives.tables import OBJECTIVES

SETTINGS = {"causal": [{}, {"z_loss": 0.01}], "masked": [{"chunk_tokens": None}]}
PROBLEMS = ("single_label", "multi_label", "regression")


@pytest.mark.rows("G1", "F8")
@pytest.mark.parametrize(
    ("kind", "values"), [(k, v) for k in OBJECTIVES if k != "classes" for v in SETTINGS.get(k, [{}])]
)
def test_every_objective(kind, values):
    objective = OBJECTIVES[kind](OBJECTIVES[kind].Config(**values))
    results = laws.check_objective(objective)
    assert len(results) == 4
    assert not [str(result) for result in results if not result.ok]


@pytest.mark.rows("A2")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("over", ["sequence", "token"])
def test_classes_of_every_problem(problem, over):
    """Against torch's own losses, and the laws of objectives on batches whose rows weigh differently."""
    if over == "token" and problem != "single_label":
        return
    generator = torch.Generator().manual_seed(2)
    block = {"mixer": {"kind": "attention", "n_heads": 2}}
    head = {"n_classes": 3, "over": over, "pooling": "last", "problem": problem}
    model = build(Decoder.Config.model_validate(
        {"d_model": 8, "n_layers": 1, "vocab_size": 13, "max_seq_len": 16, "blocks": {"b": block}, "classes": head}
    )).double()  # fmt: skip
    randomise(model, 1)
    batch = uneven_batch(13)
    labels = torch.randint(-1, 3, (6, 8) if over == "token" else (6,), generator=generator)
    several = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    several = several.round() if problem == "multi_label" else several
    batch = dataclasses.replace(batch, extra={"labels": labels if problem == "single_label" else several})
    objective = ClassLoss(ClassLoss.Config(problem=problem))
    results = laws.check_objective(objective, model=model, batch=batch, masks_tokens=False)
    assert not [str(result) for result in results if not result.ok]
    scores = model(batch.inputs(), needs=("classes",)).classes
    got = objective.loss_sum(Outputs(classes=scores), batch) / objective.weight(batch)
    wanted = {
        "single_label": lambda: torch.nn.CrossEntropyLoss(ignore_index=-1)(scores.flatten(0, -2), labels.flatten()),
        "multi_label": lambda: torch.nn.BCEWithLogitsLoss()(scores, several),
        "regression": lambda: torch.nn.MSELoss()(scores, several),
    }[problem]()
    assert torch.allclose(got, wanted, atol=1e-12)
    assert objective.extra(model.config, 6, 8)["labels"].shape == batch.extra["labels"].shape


@pytest.mark.rows("A1")
def test_masked_likelihood_through_the_head_in_chunks_is_the_same():
    """Also with a layer before the logits, whose gradients come from the chosen tokens alone."""
    config = {"d_model": 8, "n_layers": 1, "vocab_size": 13, "max_seq_len": 16, "causal": False, "head_bias": True,
              "blocks": {"b": {"mixer": {"kind": "attention", "n_heads": 2}}}, "head_transform": {}}  # fmt: skip
    model = build(Decoder.Config.model_validate(config)).double()
    randomise(model, 1)
    batch, found = uneven_batch(13), []
    for chunk in (None, 2, 1024):
        objective = MaskedLikelihood(MaskedLikelihood.Config(chunk_tokens=chunk))
        model.zero_grad()
        loss = objective.loss_sum(model(batch.inputs(), needs=objective.needs), batch)
        loss.backward()
        found.append(torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters())]).detach())
    assert torch.allclose(found[0], found[1], atol=1e-10) and torch.allclose(found[0], found[2], atol=1e-10)
    logits = model(batch.inputs()).logits
    chosen = batch.loss_mask > 0
    wanted = torch.nn.functional.cross_entropy(logits[chosen], batch.targets[chosen], reduction="sum")
    assert torch.allclose(found[0][0], wanted)


class MeanOfMeans(CausalLikelihood):
    """The mistake that accumulation laws are for."""

    def loss_sum(self, outputs, batch):
        return super().loss_sum(outputs, batch) / self.weight(batch).clamp(min=1)


class CountsPadding(CausalLikelihood):
    def loss_sum(self, outputs, batch):
        return super().loss_sum(outputs, dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask)))


@pytest.mark.parametrize(("wrong", "law"), [(MeanOfMeans, "accumulation"), (CountsPadding, "masked")])
def test_a_wrong_objective_is_found(wrong, law):
    assert law in {result.law for result in laws.check_objective(wrong()) if not result.ok}


def test_the_trial_batch_is_uneven():
    batch = uneven_batch(13)
    weights = [float(part.loss_mask.sum()) for part in batch.split(1)]
    assert 0.0 in weights
    assert len(set(weights)) > 2
