"""A number that is not finite never reaches a weight; what is left out is left out again by a resumed run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import VOCAB, Counted, log_of, packed, saved_step, tiny, trainer, weights_hash

from octavo.data.loader import Loader
from octavo.errors import CheckpointError, NumericError, StopRequested
from octavo.metrics_file import read_metrics
from octavo.objectives.likelihood import CausalLikelihood
from octavo.training import checkpoint
from octavo.training.loop import Trainer
from octavo.training.numeric import Guard, not_finite


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


def sour(folder: Path, bad: dict[int, float], **changes: Any) -> Trainer:
    return trainer(folder, source=Poisoned(bad), objective=Sour(), **changes)


def losses(folder: Path) -> dict[int, float | None]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"}


# ------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_number_that_is_not_finite_stops_before_any_weight_changes(tmp_path, poison, rows):
    made = sour(tmp_path, {5: poison}, micro_batch_rows=rows, save_every=2)
    with pytest.raises(NumericError) as caught:
        made.fit()
    assert caught.value.exit_code == 5 and "at step 5" in str(caught.value) and "Kept:" in str(caught.value)
    reference = sour(tmp_path / "short", {}, micro_batch_rows=rows)
    for _ in range(5):
        reference.train_step()
    for (name, tensor), (_, expected) in zip(made.optimizer.tensors(), reference.optimizer.tensors(), strict=True):
        assert torch.equal(tensor, expected), name
    assert made.optimizer.updates == 5
    assert saved_step(tmp_path) == 4
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]

    tensors, state = checkpoint.load(tmp_path / "nan" / "step-00000005")
    assert state["step"] == 5 and state["seed"] == 7 and state["updates"] == 5
    assert set(state["grad_norms"]) == {name for name, _ in made.model.named_parameters()}
    if poison == 1.0:
        assert state["gradients_not_finite"] and math.isfinite(float(state["loss"]))
    else:
        assert not state["gradients_not_finite"] and not math.isfinite(float(state["loss"]))
    for name, array in Poisoned({5: poison}).batch(5).items():
        assert np.array_equal(tensors[f"batch/{name}"].numpy(), array, equal_nan=True), name
    for name, expected in reference.model.named_parameters():
        assert torch.equal(tensors[f"model/{name}"], expected.detach()), name


def test_of_the_steps_that_were_not_taken_the_newest_three_are_kept(tmp_path):
    sour(tmp_path, dict.fromkeys((2, 4, 6, 8), math.nan), on_nan="skip").fit()
    assert sorted(p.name for p in (tmp_path / "nan").iterdir()) == [f"step-0000000{n}" for n in (4, 6, 8)]


def test_a_full_disk_does_not_hide_the_trouble(tmp_path, capsys):
    (tmp_path / "nan").write_text("")
    with pytest.raises(NumericError, match="the loss is nan"):
        sour(tmp_path, {2: math.nan}).fit()
    assert "error[RESOURCE]" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- skipping


def test_skipped_steps_take_no_part_and_the_run_goes_on(tmp_path, capsys):
    made = sour(tmp_path, {3: math.nan, 6: 1.0}, on_nan="skip")
    made.fit()
    assert made.optimizer.updates == 10 and made.step == 12
    records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"}
    assert records[4]["loss"] is None and records[7]["grad_norm"] is None
    assert all(math.isfinite(r["loss"]) for step, r in records.items() if step not in (4, 7))
    assert all(p.isfinite().all() for p in made.model.parameters())
    assert not not_finite(made.optimizer.tensors())
    assert all(map(math.isfinite, made.guard.losses)) and made.guard.refused == [3, 6]
    shown = capsys.readouterr().err
    assert "at step 3: left out" in shown and "at step 6: left out" in shown


def test_a_skipped_step_is_as_if_its_batch_had_not_been(tmp_path):
    made = sour(tmp_path / "poisoned", {3: math.nan}, on_nan="skip", steps=6)
    made.fit()
    twin = sour(tmp_path / "twin", {}, steps=6)
    for step in (0, 1, 2, 4, 5):
        twin.step = step
        twin.train_step()
    assert weights_hash(made.model) == weights_hash(twin.model)


@pytest.mark.parametrize("bad", [range(3, 6), (2, 4, 6)])
def test_more_skips_than_allowed_stop_the_run_also_across_a_resume(tmp_path, bad):
    poison = dict.fromkeys(bad, math.nan)
    last = max(bad)
    with pytest.raises(StopRequested):
        sour(tmp_path, poison, on_nan="skip", max_skips=2, stop_after=last).fit()
    with pytest.raises(NumericError, match=f"at step {last}, trouble 3 in 100 steps"):
        sour(tmp_path, poison, on_nan="skip", max_skips=2).fit()


def test_skips_long_ago_are_forgotten(tmp_path):
    made = sour(
        tmp_path, {0: math.nan, 105: math.nan}, on_nan="skip", max_skips=1, steps=110, valid_every=1000
    )  # fmt: skip
    made.fit()
    assert made.optimizer.updates == 108


# ---------------------------------------------------------------------------------------- rolling back


def test_a_rollback_leaves_out_every_step_since_the_last_save(tmp_path, capsys):
    made = sour(tmp_path / "poisoned", {7: math.nan}, on_nan="rollback", save_every=3)
    made.fit()
    twin = sour(tmp_path / "twin", {})
    for step in (0, 1, 2, 3, 4, 5, 8, 9, 10, 11):
        twin.step = step
        twin.train_step()
    assert weights_hash(made.model) == weights_hash(twin.model) and made.optimizer.updates == 10
    assert made.guard.rolled_back == [[6, 7]] and "at step 7: rolled back" in capsys.readouterr().err
    assert [step for step, loss in losses(tmp_path / "poisoned").items() if loss is None] == [8]


def test_before_the_first_save_a_rollback_goes_to_the_first_weights(tmp_path):
    made = sour(tmp_path / "poisoned", {2: 1.0}, on_nan="rollback")
    made.fit()
    twin = sour(tmp_path / "twin", {})
    for step in range(3, 12):
        twin.step = step
        twin.train_step()
    assert weights_hash(made.model) == weights_hash(twin.model) and made.guard.rolled_back == [[0, 2]]


@pytest.mark.parametrize("stop", [1, 4, 7, 8, 9, 10])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_resumed_run_leaves_out_the_same_steps(tmp_path, policy, stop):
    changes: dict[str, Any] = {"on_nan": policy, "save_every": 3}
    bad = {4: math.nan, 7: 1.0}
    whole = sour(tmp_path / "whole", bad, **changes)
    whole.fit()
    part = tmp_path / "part"
    with pytest.raises(StopRequested):
        sour(part, bad, stop_after=stop, **changes).fit()
    resumed = sour(part, bad, **changes)
    resumed.fit()
    assert weights_hash(resumed.model) == weights_hash(whole.model) and log_of(part) == log_of(tmp_path / "whole")
    assert resumed.guard.rolled_back == ([] if policy == "skip" else [[3, 4], [6, 7]])


def test_stopped_again_and_again_a_rollback_still_goes_to_the_save_that_was_due(tmp_path):
    changes: dict[str, Any] = {"on_nan": "rollback", "save_every": 6, "keep_checkpoints": 1}
    whole = sour(tmp_path / "whole", {10: math.nan}, **changes)
    whole.fit()
    part = tmp_path / "part"
    for _ in range(3):
        with pytest.raises(StopRequested):
            sour(part, {10: math.nan}, stop_after=3, **changes).fit()
    assert sorted(p.name for p in (part / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (6, 9)]
    resumed = sour(part, {10: math.nan}, **changes)
    resumed.fit()
    assert resumed.guard.rolled_back == whole.guard.rolled_back == [[6, 10]]
    assert weights_hash(resumed.model) == weights_hash(whole.model) and log_of(part) == log_of(tmp_path / "whole")
    assert sorted(p.name for p in (part / "checkpoints").iterdir()) == ["step-00000012"]


def test_a_run_killed_before_the_save_of_a_rollback_comes_to_it_again(tmp_path, monkeypatch):
    changes: dict[str, Any] = {"on_nan": "rollback", "save_every": 3}
    whole = sour(tmp_path / "whole", {7: math.nan}, **changes)
    whole.fit()

    class Killed(Exception):
        pass

    real = Trainer._save

    def save(self, metrics, *, last=False):
        if self.guard.rolled_back:
            raise Killed
        real(self, metrics, last=last)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "_save", save)
        sour(tmp_path / "part", {7: math.nan}, **changes).fit()
    resumed = sour(tmp_path / "part", {7: math.nan}, **changes)
    resumed.fit()
    assert weights_hash(resumed.model) == weights_hash(whole.model)
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")


def test_steps_that_were_left_out_stay_out_also_if_the_trouble_does_not_come_again(tmp_path):
    """A flipped bit spoils a step once. The rollback is saved at once, so a kill right after it changes nothing."""
    changes: dict[str, Any] = {"on_nan": "rollback", "save_every": 3}
    whole = sour(tmp_path / "whole", {7: math.nan}, **changes)
    whole.fit()

    class Killed(Exception):
        pass

    part = sour(tmp_path / "part", {7: math.nan}, **changes)
    real = part.train_step

    def step() -> dict[str, float]:
        if part.step == 8:
            raise Killed
        return real()

    part.train_step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        part.fit()
    resumed = sour(tmp_path / "part", {}, **changes)
    resumed.fit()
    assert resumed.guard.rolled_back == whole.guard.rolled_back == [[6, 7]]
    assert weights_hash(resumed.model) == weights_hash(whole.model)
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")


# -------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, policy):
    """A row of an untied table that no batch reads stays unnoticed until the weights are saved."""
    model = tiny(tie_embeddings=False, vocab_size=VOCAB + 1)
    made = trainer(tmp_path, model=model, on_nan=policy, save_every=3)
    real = made.train_step

    def step() -> dict[str, float]:
        figures = real()
        if made.step == 5:
            model.embed.weight.data[VOCAB] = math.inf
        return figures

    made.train_step = step  # type: ignore[method-assign]
    if policy == "rollback":
        made.fit()
        assert made.guard.rolled_back == [[3, 6]] and not not_finite(made.model.named_parameters())
    else:
        with pytest.raises(NumericError, match=r"model/embed\.weight: not finite at step 6"):
            made.fit()
    for saved in (tmp_path / "checkpoints").iterdir():
        assert not not_finite(checkpoint.load(saved)[0].items()), saved.name
    assert saved_step(tmp_path) == (12 if policy == "rollback" else 3)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_weight_is_named_and_not_skipped_over(tmp_path, policy):
    made = trainer(tmp_path, on_nan=policy)
    for _ in range(3):
        made.train_step()
    made.model.norm.weight.data[2] = math.nan
    with pytest.raises(NumericError, match=r"model/norm\.weight: not finite at step 3"):
        made.train_step()


def test_not_finite_names_every_kind():
    good = torch.tensor([1.0, -3e38, 3e38])
    tensors = {"good": good, "empty": good[:0], "whole": torch.tensor([1, 2])}
    for name, value in (("nan", math.nan), ("up", math.inf), ("down", -math.inf)):
        tensors[name] = torch.tensor([0.0, value, 1.0])
        tensors[f"{name} bf16"] = tensors[name].bfloat16()
    assert not_finite(tensors.items()) == [name for name in tensors if name.split()[0] in ("nan", "up", "down")]


# --------------------------------------------------------------------------------------------- spikes


def guard(tmp_path: Path, **changes: Any) -> Guard:
    return trainer(tmp_path, **changes).guard


def test_a_spike_is_measured_against_the_hundred_losses_before_it(tmp_path):
    rng = np.random.default_rng(0)
    judge = guard(tmp_path)
    past = (3 + 0.05 * rng.standard_normal(150)).tolist()
    for step, loss in enumerate(past):
        sigmas = judge.sigmas(loss)
        if step < 20:
            assert sigmas == 0
        else:
            window = np.array(past[max(0, step - 100) : step])
            spread = 1.4826 * np.median(np.abs(window - np.median(window)))
            assert sigmas == pytest.approx((loss - np.median(window)) / spread)
        assert judge.trouble(step, loss, 1.0, sigmas) == "" and abs(sigmas) < 6
    assert len(judge.losses) == 100 and judge.losses == past[50:]
    assert judge.sigmas(3.5) == pytest.approx(10, rel=0.3) and judge.sigmas(math.nan) == 0


def test_no_number_that_is_not_finite_enters_the_window(tmp_path):
    judge = guard(tmp_path)
    for loss in (1.0, math.nan, math.inf, 2.0):
        judge.trouble(0, loss, 1.0, 0.0)
    judge.trouble(0, 5.0, math.nan, 0.0)
    assert judge.losses == [1.0, 2.0]


def test_a_loss_that_hardly_moves_has_no_spikes(tmp_path):
    judge = guard(tmp_path)
    judge.losses = [2.0] * 50
    assert judge.sigmas(2.01) < 6 < judge.sigmas(2.02)


@pytest.mark.parametrize("on_spike", ["log", "skip"])
def test_a_spike_is_logged_and_left_out_if_asked(tmp_path, on_spike, capsys):
    changes: dict[str, Any] = {"steps": 40, "on_spike": on_spike, "valid_every": 100, "schedule": "constant"}
    changes |= {"optimizer": {"kind": "sgd", "lr": 1e-3}}
    made = sour(tmp_path, {30: 400.0}, **changes)
    made.fit()
    assert made.optimizer.updates == (39 if on_spike == "skip" else 40)
    lines = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"}
    assert [step for step, line in lines.items() if line["spike"] >= 6] == [31]
    shown = capsys.readouterr().err
    assert ("left out" in shown) is (on_spike == "skip") and "step 30" in shown
    with pytest.raises(StopRequested):
        sour(tmp_path / "part", {30: 400.0}, stop_after=29, **changes).fit()
    again = sour(tmp_path / "part", {30: 400.0}, **changes)
    again.fit()
    assert log_of(tmp_path / "part") == log_of(tmp_path) and weights_hash(again.model) == weights_hash(made.model)


# --------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", ["model/norm.weight", "optimizer/exp_avg/norm.weight"])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(tmp_path, name):
    with pytest.raises(StopRequested):
        trainer(tmp_path, stop_after=3).fit()
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    tensors, state = checkpoint.load(found.path)
    tensors[name][2] = math.nan
    checkpoint.save(tmp_path / "checkpoints", 4, tensors, {**state, "step": 4}, run_id="other", keep=1)
    with pytest.raises(CheckpointError, match=f"not finite: {name}"):
        trainer(tmp_path).fit()
