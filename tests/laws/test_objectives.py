"""Every objective of the table: a sum and a weight, so that accumulation is exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from octavo import laws
from octavo.laws.objective import uneven_batch
from octavo.objectives.likelihood import OBJECTIVES, CausalLikelihood

SETTINGS = {"causal": [{}, {"z_loss": 0.01}]}


@pytest.mark.rows("G1", "F8")
@pytest.mark.parametrize(("kind", "values"), [(k, v) for k in OBJECTIVES for v in SETTINGS.get(k, [{}])])
def test_every_objective(kind, values):
    objective = OBJECTIVES[kind](OBJECTIVES[kind].Config(**values))
    results = laws.check_objective(objective)
    assert len(results) == 4
    assert not [str(result) for result in results if not result.ok]


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
