"""SIGKILL at random moments of training: no logged loss, no weight and no moment differs afterwards.

The kills are done by ``benchmarks/kills.py`` in a process of its own, because this one has threads that a fork
would not copy; ``python benchmarks/kills.py --kills 3000`` does more of them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def kill(n: int, seed: int) -> dict:
    command = [sys.executable, str(KILLS), "--kills", str(n), "--seed", str(seed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
def test_a_training_killed_at_random_moments_ends_the_same_to_the_bit(record):
    result = kill(100, seed=100)
    assert result["kills"] == 100 and result["runs"] >= 5
    assert result["where"]["training"] > 50 and result["where"]["saving"] > 0
    record("R1", result["kills"], result["failures"], seed=100, runs=result["runs"], where=result["where"])


@pytest.mark.parametrize(
    ("found", "whole", "wrong"),
    [
        ([1, 2, 3], True, 0),
        ([1, 2], False, 0),
        ([1, 2], True, 1),
        ([1, 9], False, 1),
        ([1, 2, 3, 4], False, 1),
    ],
)
def test_the_comparison_sees_what_differs(tmp_path, found, whole, wrong, monkeypatch):
    monkeypatch.syspath_prepend(str(KILLS.parent))
    import kills

    def log(name: str, losses: list[int]) -> list[dict]:
        lines = [{"kind": "train", "step": i, "loss": loss / 3, "seconds": i * loss} for i, loss in enumerate(losses)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
        return kills.records(tmp_path / name)

    assert len(kills.differences(log("found", found), log("expected", [1, 2, 3]), whole=whole)) == wrong
