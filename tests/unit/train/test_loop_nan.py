"""A loss or gradient that is not finite never reaches a weight."""

import json
import math

import numpy as np
import pytest
import torch
from training import Counted, packed, saved_step, trainer

from octavo.data.loader import Loader
from octavo.errors import NumericError, StopRequested
from octavo.metrics_file import read_metrics
from octavo.objectives.likelihood import CausalLikelihood

# --------------------------------------------------------------------------------------- not a number


class Poisoned(Counted):
    """At the steps in ``bad`` the batch carries a poison that ``Sour`` adds to the loss or the gradient."""

    def __init__(self, bad: dict[int, float]):
        super().__init__(Loader(packed(), 4, seed=3))
        self.bad = bad

    def prefetch(self, step: int) -> None:
        """Nothing to make ahead."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        batch = super().batch(step)
        return {**batch, "poison": np.full(len(batch["tokens"]), self.bad.get(step, 0.0))}


class Sour(CausalLikelihood):
    """A poison of 1 leaves the loss finite and makes the gradient NaN; any other is added to the loss."""

    def loss_sum(self, outputs, batch):
        loss, poison = super().loss_sum(outputs, batch), batch.extra.get("poison", torch.zeros(1))
        if (poison == 1).any():
            return loss + (loss * 0).square().sqrt()
        return loss + poison.sum()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_number_that_is_not_finite_stops_before_any_weight_changes(tmp_path, poison, rows):
    made = trainer(tmp_path, source=Poisoned({5: poison}), objective=Sour(), micro_batch_rows=rows, save_every=2)
    with pytest.raises(NumericError) as caught:
        made.fit()
    assert caught.value.exit_code == 5 and "at step 5" in str(caught.value) and "Kept:" in str(caught.value)
    reference = trainer(tmp_path / "short", source=Poisoned({}), objective=Sour(), micro_batch_rows=rows)
    for _ in range(5):
        reference.train_step()
    for (name, tensor), (_, expected) in zip(made.optimizer.tensors(), reference.optimizer.tensors(), strict=True):
        assert torch.equal(tensor, expected), name
    assert made.optimizer.updates == 5
    record = json.loads((tmp_path / "nan" / "step-00000005.json").read_text())
    assert (
        record["step"] == 5
        and record["seed"] == 7
        and set(record["grad_norms"]) == {name for name, _ in made.model.named_parameters()}
    )
    if poison == 1.0:
        assert record["not_finite"] and math.isfinite(float(record["loss"]))
    assert saved_step(tmp_path) == 4
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_skipped_steps_take_no_part_and_the_run_goes_on(tmp_path, capsys):
    made = trainer(tmp_path, source=Poisoned({3: math.nan, 6: 1.0}), objective=Sour(), on_nan="skip")
    made.fit()
    assert made.optimizer.updates == 10 and made.step == 12
    records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"}
    assert records[4]["loss"] is None and records[7]["grad_norm"] is None
    assert all(math.isfinite(r["loss"]) for step, r in records.items() if step not in (4, 7))
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert all(flat.isfinite().all() for state in made.optimizer.state for flat in state.values())
    assert sorted(p.name for p in (tmp_path / "nan").iterdir()) == ["step-00000003.json", "step-00000006.json"]
    shown = capsys.readouterr().err
    assert "step 3 skipped" in shown and "step 6 skipped" in shown


@pytest.mark.parametrize("bad", [range(3, 6), (2, 4, 6)])
def test_more_skips_than_allowed_stop_the_run_also_across_a_resume(tmp_path, bad):
    poison = dict.fromkeys(bad, math.nan)
    last = max(bad)
    with pytest.raises(StopRequested):
        trainer(tmp_path, source=Poisoned(poison), objective=Sour(), on_nan="skip", max_skips=2, stop_after=last).fit()
    with pytest.raises(NumericError, match=f"at step {last}"):
        trainer(tmp_path, source=Poisoned(poison), objective=Sour(), on_nan="skip", max_skips=2).fit()


def test_skips_long_ago_are_forgotten(tmp_path):
    made = trainer(
        tmp_path, source=Poisoned({0: math.nan, 105: math.nan}), objective=Sour(), on_nan="skip", max_skips=1,
        steps=110, valid_every=1000,
    )  # fmt: skip
    made.fit()
    assert made.optimizer.updates == 108
