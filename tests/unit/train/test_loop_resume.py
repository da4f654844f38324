"""Resumed runs change no bit; failed saves, stops and damaged steps are told truly."""

import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from training import Counted, log_of, packed, saved_step, settings, tiny, trainer, weights_hash

from octavo.data.loader import Loader
from octavo.errors import CheckpointError, ResourceError, StopRequested
from octavo.stop import StopSignal
from octavo.training import checkpoint

# --------------------------------------------------------------------------------------------- resume


def uninterrupted(folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], str]:
    made = trainer(folder, **changes)
    made.fit()
    return log_of(folder), weights_hash(made.model)


def resumed(folder: Path, stops: list[int], **changes: Any) -> tuple[list[dict[str, Any]], str]:
    done = 0
    for stop in stops:
        with pytest.raises(StopRequested) as caught:
            trainer(folder, stop_after=stop - done, **changes).fit()
        assert caught.value.exit_code == 75 and "octavo resume here" in str(caught.value)
        assert f"saved at step {stop} of" in str(caught.value)
        done = stop
    made = trainer(folder, **changes)
    made.fit()
    return log_of(folder), weights_hash(made.model)


@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_rows": 1}, {"activation_checkpointing": True}, {"precision": "bf16"},
     {"log_every": 5, "valid_every": 3}, {"optimizer": {"kind": "sgd", "momentum": 0.9}}],
    ids=lambda c: "-".join(c) or "plain",
)  # fmt: skip
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, changes):
    expected = uninterrupted(tmp_path / "whole", **changes)
    assert any(r["kind"] == "valid" for r in expected[0])
    assert resumed(tmp_path / "once", [5], **changes) == expected
    assert resumed(tmp_path / "often", [1, 2, 6, 11], **changes) == expected


def test_a_run_can_be_stopped_at_any_step(tmp_path):
    expected = uninterrupted(tmp_path / "whole")
    for stop in range(1, 12):
        assert resumed(tmp_path / str(stop), [stop]) == expected


def test_what_was_logged_after_the_last_save_is_done_again_not_doubled(tmp_path):
    """A kill leaves lines in the log that no checkpoint knows of."""
    expected = uninterrupted(tmp_path / "whole", save_every=5)
    part = tmp_path / "part"
    with pytest.raises(StopRequested):
        trainer(part, save_every=5, stop_after=9).fit()
    shutil.rmtree(part / "checkpoints" / "step-00000009")
    with (part / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": 10, "lo')
    assert resumed(part, [], save_every=5) == expected


def test_samples_are_part_of_the_resumed_log(tmp_path):
    def sample() -> list[dict[str, str]]:
        return [{"prompt": "p", "text": "t"}]

    expected = uninterrupted(tmp_path / "whole", sample=sample, sample_every=2)
    assert resumed(tmp_path / "part", [4, 5], sample=sample, sample_every=2) == expected


def test_random_numbers_drawn_beside_the_steps_go_on_too(tmp_path):
    """A step seeds torch's generator alone; what else draws, here the sampling, goes on where it was."""

    def sample() -> list[dict[str, str]]:
        return [{"prompt": "", "text": f"{random.random()} {np.random.rand()}"}]

    def seed(number: int) -> None:
        random.seed(number)
        np.random.seed(number)

    trainer(tmp_path / "first", steps=4).fit()  # what torch imports at its first step draws numbers
    seed(1)
    expected = uninterrupted(tmp_path / "whole", sample=sample, sample_every=2)
    seed(1)
    with pytest.raises(StopRequested):
        trainer(tmp_path / "part", stop_after=5, sample=sample, sample_every=2).fit()
    seed(2)
    assert resumed(tmp_path / "part", [], sample=sample, sample_every=2) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resumed_compiled_run_is_bitwise_the_uninterrupted_one(tmp_path):
    changes = {"compile": "step", "steps": 6, "micro_batch_rows": 2}
    expected = uninterrupted(tmp_path / "whole", **changes)
    assert resumed(tmp_path / "part", [2], **changes) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_step_computes_what_the_eager_step_does(tmp_path):
    losses = {}
    for kind in ("off", "step"):
        made = trainer(tmp_path / kind, model=tiny(dropout=0.0), compile=kind, steps=8)
        made.fit()
        losses[kind] = [float.fromhex(r["loss"]) for r in log_of(tmp_path / kind) if r["kind"] == "train"]
    assert losses["step"] == pytest.approx(losses["off"], abs=1e-4)


def test_a_finished_stage_is_left_as_it_is(tmp_path):
    first = uninterrupted(tmp_path)
    source = Counted(Loader(packed(), 4, seed=3))
    made = trainer(tmp_path, source=source)
    made.fit()
    assert source.n == 0 and (log_of(tmp_path), weights_hash(made.model)) == first


def test_other_data_another_seed_or_another_model_is_refused(tmp_path):
    with pytest.raises(StopRequested):
        trainer(tmp_path, stop_after=3).fit()
    before = checkpoint.newest(tmp_path / "checkpoints")
    assert before is not None
    with pytest.raises(CheckpointError, match="other data or with another seed"):
        trainer(tmp_path, seed=8).fit()
    with pytest.raises(CheckpointError, match="other data or with another seed"):
        trainer(tmp_path, source=Loader(packed(seed=1), 4, seed=3)).fit()
    with pytest.raises(CheckpointError, match="other data or with another seed"):
        trainer(tmp_path, source=Loader(packed(), 4, seed=4)).fit()
    with pytest.raises(CheckpointError, match=r"other weights than this model: .*blocks\.2"):
        trainer(tmp_path, model=tiny(n_layers=3)).fit()
    with pytest.raises(CheckpointError, match=r"other weights than this model: .*blocks\.0"):
        trainer(tmp_path, model=tiny(d_model=32)).fit()
    assert checkpoint.newest(tmp_path / "checkpoints") == before


def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(tmp_path):
    with pytest.raises(StopRequested):
        trainer(tmp_path, stop_after=3).fit()
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    tensors, state = checkpoint.load(found.path)
    tensors["optimizer/exp_avg/norm.weight"][2] = math.nan
    checkpoint.save(tmp_path / "checkpoints", 4, tensors, {**state, "step": 4}, run_id="other", keep=1)
    with pytest.raises(CheckpointError, match=r"not finite: optimizer/exp_avg/norm\.weight"):
        trainer(tmp_path).fit()


def test_a_step_that_was_damaged_is_passed_over_in_words(tmp_path, capsys):
    expected = uninterrupted(tmp_path / "whole", save_every=3)
    part = tmp_path / "part"
    with pytest.raises(StopRequested):
        trainer(part, save_every=3, stop_after=8).fit()
    file = part / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert resumed(part, [], save_every=3) == expected
    assert "step-00000008" in (shown := capsys.readouterr().err) and "2 steps lost" in shown


# --------------------------------------------------------------------------------- stopping and saving


def test_a_stop_before_the_first_step_is_saved_too(tmp_path):
    expected = uninterrupted(tmp_path / "whole")
    made = trainer(tmp_path / "part", source=(source := Counted(Loader(packed(), 4, seed=3))), stop_after=1)
    source.n = 1
    with pytest.raises(StopRequested, match="saved at step 0 of 12"):
        made.fit()
    assert resumed(tmp_path / "part", []) == expected


def test_a_stop_breaks_off_a_validation_which_is_done_again(tmp_path):
    changes: dict[str, Any] = {"valid_every": 4, "micro_batch_rows": 1}
    expected = uninterrupted(tmp_path / "whole", **changes)
    made, looked = trainer(tmp_path / "part", **changes), []
    whole = made._losses

    def counted(batch: Any) -> Any:
        looked.append(batch)
        return whole(batch)

    made._losses = counted  # validation calls it; a step calls what it was when the trainer was made
    made.held.stop = StopSignal(2, clock=lambda: len(looked))
    with pytest.raises(StopRequested, match="saved at step 4 of 12"):
        made.fit()
    assert len(looked) == 2 < sum(batch.rows for batch in made.held.valid)
    assert not [r for r in log_of(tmp_path / "part") if r["kind"] == "valid"]
    assert resumed(tmp_path / "part", [], **changes) == expected


def test_a_step_that_takes_too_long_is_given_up(tmp_path):
    expected = uninterrupted(tmp_path / "whole", micro_batch_rows=1)
    made, clock = trainer(tmp_path / "part", micro_batch_rows=1), [0]
    whole = made.forward

    def slow(batch: Any) -> Any:
        clock[0] += 5
        return whole(batch)

    made.forward = slow
    made.held.stop = StopSignal(21, clock=lambda: clock[0])
    with pytest.raises(StopRequested, match="saved at step 1 of 12"):
        made.fit()
    assert clock[0] == 25, "one row of the second step, not four"
    assert resumed(tmp_path / "part", [], micro_batch_rows=1) == expected


def test_checkpoints_are_rotated_and_the_last_is_kept(tmp_path):
    trainer(tmp_path, save_every=3, keep_checkpoints=2).fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


class Blocked:
    """Puts a file where the checkpoints folder should be while ``step`` is in ``steps``: no save can succeed."""

    def __init__(self, folder: Path, steps: range):
        self.folder, self.steps, self.calls = folder / "checkpoints", steps, 0

    def __call__(self) -> list[dict[str, str]]:
        self.calls += 1
        aside = self.folder.with_name("aside")
        if self.calls in self.steps and not self.folder.is_file():
            if self.folder.exists():
                self.folder.rename(aside)
            self.folder.write_text("")
        elif self.calls not in self.steps and self.folder.is_file():
            self.folder.unlink()
            if aside.exists():
                aside.rename(self.folder)
        return []


def test_one_failed_save_is_only_a_warning(tmp_path, capsys):
    expected = uninterrupted(tmp_path / "whole")
    part = tmp_path / "part"
    made = trainer(part, sample=Blocked(part, range(4, 6)), sample_every=1, save_every=1)
    made.fit()
    assert capsys.readouterr().err.count("error[RESOURCE]") == 2
    assert (log_of(part), weights_hash(made.model)) == expected
    assert saved_step(part) == 12


def test_three_failed_saves_in_a_row_stop_the_run_and_it_resumes(tmp_path):
    expected = uninterrupted(tmp_path / "whole")
    part = tmp_path / "part"
    made = trainer(part, sample=Blocked(part, range(4, 13)), sample_every=1, save_every=1)
    with pytest.raises(ResourceError) as caught:
        made.fit()
    assert caught.value.exit_code == 6 and made.step == 6, "not the last save but the third that failed ends the run"
    (part / "checkpoints").unlink()
    (part / "aside").rename(part / "checkpoints")
    assert saved_step(part) == 3
    assert resumed(part, []) == expected


def test_a_last_save_that_fails_is_an_error(tmp_path):
    with pytest.raises(ResourceError):
        trainer(tmp_path, sample=Blocked(tmp_path, range(1, 13)), sample_every=12).fit()


def test_a_stop_whose_save_fails_does_not_claim_to_be_saved(tmp_path):
    with pytest.raises(ResourceError):
        trainer(tmp_path, sample=Blocked(tmp_path, range(5, 13)), sample_every=1, stop_after=6).fit()


def test_unresolved_choices_are_refused(tmp_path):
    choices: list[dict[str, Any]] = [{"precision": "auto"}, {"compile": "auto"}]
    for auto in choices:
        with pytest.raises(ValueError, match="resolve"):
            trainer(tmp_path, **auto)
    with pytest.raises(ValidationError, match="must be below steps"):
        settings(steps=2, schedule={"kind": "linear", "warmup": 2})
