"""SIGTERM, Ctrl-C and the time limit at random moments: saved, exit code 75, nothing lost, no process left.

The signals are sent by ``benchmarks/stops.py`` in a process of its own, because this one has threads that a fork would
not copy; ``python benchmarks/stops.py --stops 300`` sends more of them, ``--compile`` into compiled trainings.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import tiny_recipe

from octavo.cli.main import main
from octavo.stop import StopSignal
from octavo.training import checkpoint
from octavo.training.loop import Trainer

STOPS = Path(__file__).parents[2] / "benchmarks" / "stops.py"


@pytest.mark.timeout(600)
def test_asked_to_stop_at_random_moments_a_run_saves_and_loses_nothing(record):
    command = [sys.executable, str(STOPS), "--stops", "20", "--seed", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    # On a busy machine a signal can come too late for its part: another run then makes up for it.
    assert result["kills"] == 20 and result["runs"] >= 2
    assert len(result["where"]) == 10 and min(result["where"].values()) >= 1
    record("R8", result["kills"], result["failures"], seed=8, where=result["where"])


def run(*words: str) -> int:
    return main([*words, "--quiet"])


@pytest.fixture
def ten_minutes_a_step(monkeypatch):
    """Time that passes with the steps of training alone, so that limits of hours are met in a moment."""
    now = [0.0]
    init, step = StopSignal.__init__, Trainer.train_step

    def with_clock(self, max_time=None, **named):
        init(self, max_time, **{**named, "clock": lambda: now[0]})

    def slow_step(self):
        figures = step(self)
        now[0] += 600.0
        return figures

    monkeypatch.setattr(StopSignal, "__init__", with_clock)
    monkeypatch.setattr(Trainer, "train_step", slow_step)


def test_the_time_limit_saves_in_every_verb_that_trains(tmp_path, capsys, ten_minutes_a_step):
    raw = tiny_recipe(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(raw))
    folder = tmp_path / "run"

    def saved(stage: str, of: Path = folder) -> int:
        found = checkpoint.newest(of / stage / "checkpoints")
        return found.step if found is not None else -1

    assert run("train", str(recipe), "--out", str(folder), "--max-time", "90s") == 75
    shown = capsys.readouterr().err
    assert "the time limit of 90s is reached, saved at step 1 of 8" in shown and f"octavo resume {folder}" in shown
    assert saved("pretrain") == 1
    assert run("resume", str(folder), "--max-time", "50m") == 75
    assert saved("pretrain") == 6
    assert run("run", str(recipe), "--no-chat", "--out", str(tmp_path / "whole"), "--max-time", "2h") == 75
    assert saved("pretrain", tmp_path / "whole") == 8 and saved("tune", tmp_path / "whole") == 4

    tuned = ["tune", str(tmp_path / "whole"), "--data", str(tmp_path / "pairs.jsonl"), "tune.compile=off"]
    tuned += ["tune.precision=fp32", "tune.step_tokens=128", "tune.steps=9", "tune.threads=1", "tune.schedule=constant"]
    assert run(*tuned, "--out", str(tmp_path / "tuned"), "--max-time", "1800") == 75
    assert saved("tune", tmp_path / "tuned") == 3


@pytest.mark.parametrize("limit", ["5 minutes", "0", "-3m", "m"])
def test_what_is_no_time_is_refused_before_anything_is_written(tmp_path, limit, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny_recipe(tmp_path)))
    assert run("run", str(recipe), "--out", str(tmp_path / "run"), f"--max-time={limit}") == 2
    assert "is not a length of time" in capsys.readouterr().err and not (tmp_path / "run").exists()
