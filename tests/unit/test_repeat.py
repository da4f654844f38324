"""``octavo resume --prove`` and ``octavo replay``: the run is only read, and what differs is found."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import tiny_recipe

from octavo import repeat
from octavo.cli.main import main
from octavo.metrics_file import read_metrics
from octavo.pipeline import judging
from octavo.training import checkpoint
from octavo.training.loop import Trainer
from octavo.training.replay import Replay


@pytest.fixture(autouse=True, scope="module")
def no_page() -> Iterator[None]:
    """The page takes longer than all else in so small a run, and says nothing here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judging, "report", lambda _: {})
        yield


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def go(folder: Path, raw: dict[str, Any], code: int = 0) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(raw))
    words = ["run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--no-chat", "--quiet", "--workers", "1"]
    assert main(words) == code
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretraining saved at steps 3, 6 and 8, of which two are kept; tuning at 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    raw = tiny_recipe(folder)
    raw["model"]["blocks"]["block"]["dropout"] = 0.1
    return go(folder, raw)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def spoil(run: Path, name: str, stage: str = "pretrain") -> None:
    """Save the newest step again with one number changed by one bit, whole and verified."""
    found = checkpoint.newest(run / stage / "checkpoints")
    assert found is not None
    tensors, state = checkpoint.load(found.path)
    tensors[name].view(torch.int32).view(-1)[5] ^= 1
    checkpoint.save(found.path.parent, found.step, tensors, state, run_id="other", keep=2)


# --------------------------------------------------------------------------------------------- prove


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "steps 5 to 6 of stage tune come out the same in every bit: 3 lines of figures, 33 tensors"),
        (["--stage", "pretrain"], "steps 7 to 8 of stage pretrain come out the same in every bit"),
        (["--stage", "pretrain", "--steps", "2"], "steps 7 to 8"),
        (["--stage", "pretrain", "--from-start"], "steps 1 to 8 of stage pretrain come out the same in every bit: 10"),
    ],
)
def test_a_run_repeats_to_the_bit_and_is_not_touched(whole, words, said, capsys, tmp_path):
    before = snapshot(whole)
    assert main(["resume", str(whole), "--prove", "--quiet", "--scratch", str(tmp_path), *words]) == 0
    assert f"proved: {said}" in capsys.readouterr().out
    assert snapshot(whole) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model/norm.weight", "optimizer/exp_avg_sq/embed.weight"])
def test_one_changed_bit_of_a_tensor_is_found(run, name, capsys):
    spoil(run, name)
    assert main(["resume", str(run), "--prove", "--stage", "pretrain", "--quiet"]) == 4
    shown = capsys.readouterr().err
    assert f"1 of 33 tensors at step 8, first {name}" in shown and "Kept: the run was not touched" in shown


def test_one_changed_digit_of_a_logged_loss_is_found(run, capsys):
    log = run / "pretrain" / "metrics.jsonl"
    loss = [r for r in read_metrics(log) if r["kind"] == "train"][-1]["loss"]
    log.write_bytes(log.read_bytes().replace(repr(loss).encode(), repr(math.nextafter(loss, 0)).encode()))
    assert main(["resume", str(run), "--prove", "--stage", "pretrain", "--quiet"]) == 4
    assert "train at step 8: loss 0x" in capsys.readouterr().err


def test_steps_that_depend_on_anything_but_seed_and_step_do_not_repeat(run, capsys, monkeypatch):
    real, calls = Trainer.gradient, []

    def gradient(self, batch):
        calls.append(1)
        loss, norm = real(self, batch)
        self.optimizer.groups[0].total.mul_(1 + 1e-6 * len(calls))
        return loss, norm

    monkeypatch.setattr(Trainer, "gradient", gradient)
    assert main(["resume", str(run), "--prove", "--stage", "pretrain", "--quiet"]) == 4
    assert "do not repeat" in capsys.readouterr().err


def test_with_one_checkpoint_there_is_nothing_to_begin_with_but_the_start(run, capsys):
    shutil.rmtree(run / "pretrain" / "checkpoints" / "step-00000006")
    words = ["resume", str(run), "--prove", "--stage", "pretrain", "--quiet"]
    assert main(words) == 4
    shown = capsys.readouterr().err
    assert "has checkpoints of step 8 and none" in shown and "--from-start repeats all 8 steps" in shown
    assert main([*words, "--from-start"]) == 0
    shutil.rmtree(run / "pretrain" / "checkpoints" / "step-00000008")
    assert main(words) == 4 and "no whole checkpoint of stage pretrain" in capsys.readouterr().err


def test_asked_for_more_steps_an_earlier_checkpoint_is_taken(run, capsys):
    words = ["resume", str(run), "--prove", "--stage", "pretrain", "--quiet", "--steps"]
    assert main([*words, "3"]) == 4 and "step 6, 8 and none far enough" in capsys.readouterr().err


def test_what_changed_of_the_machine_is_named(run, capsys):
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0.0", "threads": 64}))
    assert main(["resume", str(run), "--prove", "--quiet"]) == 0
    assert "changed since its last start: torch 1.0.0 -> 2." in capsys.readouterr().out
    spoil(run, "model/norm.weight", "tune")
    assert main(["resume", str(run), "--prove", "--quiet"]) == 4
    shown = capsys.readouterr().err
    assert "threads 64 -> 1" in shown and "repeat with the machine, threads and versions in environment.json" in shown


def test_options_of_a_proof_without_it_are_refused(run, capsys):
    assert main(["resume", str(run), "--from-start"]) == 2 and "add --prove" in capsys.readouterr().err
    assert main(["resume", str(run.parent / "nothing"), "--prove"]) == 2


# -------------------------------------------------------------------------------------------- replay


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training whose loss overflows at step 3, one after a save: the rate grows until it does."""
    folder = tmp_path_factory.mktemp("broken")
    raw = tiny_recipe(folder)
    raw["tune"] = None
    raw["train"] |= {"optimizer": {"kind": "sgd", "lr": 1e3}, "clip_norm": None, "steps": 30, "save_every": 2}
    raw["train"] |= {"schedule": {"kind": "linear", "warmup": 29}, "keep_checkpoints": 5}
    return go(folder, raw, code=5)


def test_a_step_that_could_not_be_taken_comes_again_and_the_layer_is_named(broken, capsys):
    before = snapshot(broken)
    kept = next((broken / "pretrain" / "nan").iterdir()).name
    step = int(kept.removeprefix("step-"))
    for words in ([], [str(step)], [str(step), "--stage", "pretrain"]):
        assert main(["replay", str(broken), *words]) == 5
        shown = capsys.readouterr().out
        assert f"step {step}: loss" in shown and "it comes again: the same came out" in shown
        assert "the first activation that is not finite: the output of" in shown or "gradients not finite" in shown
    assert main(["replay", str(broken), "--from-checkpoint"]) == 5
    assert "it comes again: the same came out" in capsys.readouterr().out
    assert snapshot(broken) == before


def test_a_step_spoiled_from_outside_does_not_come_again(broken, tmp_path, capsys):
    run = Path(shutil.copytree(broken, tmp_path / "run"))
    kept = next((run / "pretrain" / "nan").iterdir())
    tensors, state = checkpoint.load(kept)
    good, _ = checkpoint.load(run / "pretrain" / "checkpoints" / "step-00000002")
    tensors |= {name: tensor for name, tensor in good.items() if name.startswith("model/")}
    shutil.rmtree(kept.parent)
    checkpoint.save(kept.parent, 3, tensors, state, run_id="other")
    assert main(["replay", str(run)]) == 0
    assert "it does not come again: the numbers were spoiled from outside" in capsys.readouterr().out


def test_any_step_after_a_checkpoint_can_be_looked_at(whole, capsys):
    assert main(["replay", str(whole), "7", "--stage", "pretrain"]) == 0
    shown = capsys.readouterr().out
    assert "step 7: loss" in shown and "nothing is wrong with this step" in shown and "recorded" not in shown
    assert main(["replay", str(whole), "2", "--stage", "pretrain"]) == 0  # from the first step on
    assert main(["replay", str(whole)]) == 2
    assert "has no step that could not be taken" in capsys.readouterr().err


def test_a_later_step_than_there_is_has_no_record(whole):
    found, changes = repeat.replay_step(whole, 8, stage="pretrain")
    assert found.is_finite and not found.reproduces and changes == []


def test_figures_that_differ_from_the_record_stand_beside_it():
    other = Replay(7, loss=2.5, grad_norm=0.5, recorded_loss=2.25, recorded_norm=0.125)
    assert other.lines()[0] == "step 7: loss 2.5, gradient norm 0.5; recorded: loss 2.25, gradient norm 0.125"
    same = Replay(7, 2.5, math.nan, 2.5, math.nan)
    assert same.reproduces and same.lines()[0] == "step 7: loss 2.5, gradient norm nan"
