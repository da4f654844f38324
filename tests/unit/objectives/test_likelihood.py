"""The causal likelihood, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.batch import Batch
from octavo.nn.contracts import Outputs
from octavo.objectives.likelihood import CausalLikelihood


def batch(targets: list[list[int]], mask: list[list[float]]) -> Batch:
    ids = torch.tensor(targets)
    return Batch(
        ids, ids, torch.tensor(mask), torch.zeros_like(ids), torch.zeros_like(ids), torch.ones_like(ids).bool()
    )


def logits(rows: list[list[list[float]]]) -> Outputs:
    return Outputs(logits=torch.tensor(rows, dtype=torch.float64).log())


@pytest.mark.rows("F8")
def test_the_sum_over_counted_targets():
    out = logits([[[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]])
    objective = CausalLikelihood()
    one = batch([[1, 0, 1]], [[1.0, 0.0, 1.0]])
    assert float(objective.loss_sum(out, one)) == pytest.approx(-math.log(0.8) - math.log(0.1))
    assert float(objective.weight(one)) == 2


@pytest.mark.rows("F8")
def test_padding_contributes_nothing_whatever_stands_there():
    out = logits([[[0.2, 0.8], [1.0, 0.0]]])  # the masked target would cost infinitely much
    one = batch([[1, 1]], [[1.0, 0.0]])
    out.logits.requires_grad_()
    loss = CausalLikelihood().loss_sum(out, one)
    assert float(loss) == pytest.approx(-math.log(0.8))
    loss.backward()
    assert (out.logits.grad[0, 1] == 0).all()


def test_a_fractional_mask_weighs():
    out = logits([[[0.2, 0.8], [0.5, 0.5]]])
    objective = CausalLikelihood()
    one = batch([[1, 1]], [[0.5, 2.0]])
    assert float(objective.loss_sum(out, one)) == pytest.approx(-0.5 * math.log(0.8) - 2 * math.log(0.5))
    assert float(objective.weight(one)) == 2.5


def test_z_loss_is_the_squared_log_normaliser():
    out = Outputs(logits=torch.tensor([[[1.0, 2.0, 0.5]]]))
    one = batch([[1]], [[1.0]])
    z = math.log(sum(math.exp(v) for v in (1.0, 2.0, 0.5)))
    plain = CausalLikelihood().loss_sum(out, one)
    extra = CausalLikelihood(CausalLikelihood.Config(z_loss=0.1)).loss_sum(out, one)
    assert float(extra - plain) == pytest.approx(0.1 * z**2, rel=1e-5)


def test_sixteen_bit_logits_are_summed_in_full_precision():
    out = Outputs(logits=torch.zeros(1, 5000, 2, dtype=torch.bfloat16))
    one = batch([[0] * 5000], [[1.0] * 5000])
    loss = CausalLikelihood().loss_sum(out, one)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(5000 * math.log(2), rel=1e-4)


def test_it_says_which_output_it_needs():
    assert CausalLikelihood.needs == ("logits",)
    with pytest.raises(ValueError, match="logits"):
        CausalLikelihood().loss_sum(Outputs(), batch([[0]], [[1.0]]))
