"""Too little memory: refused before the first step with what to change, or left in one line with all steps whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = Path(__file__).parents[1] / "short_of_memory.py"


@pytest.mark.timeout(300)
def test_a_run_that_is_short_of_memory_leaves_with_6_and_loses_nothing(tmp_path, record):
    if not sys.platform.startswith("linux"):
        record("R12", 0, 0, skipped="limits of the address space are Linux's")
        pytest.skip("limits of the address space are Linux's")
    done = subprocess.run([sys.executable, str(SHORT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, wrong = json.loads(done.stdout), []

    def expect(name: str, *parts: str) -> None:
        code, said = found[name]["code"], found[name]["said"]
        if code != 6 or said.count("\n") != 1 or not said.startswith("error[RESOURCE]"):
            wrong.append(f"{name}: exit code {code}: {said}")
        wrong.extend(f"{name} does not say {part!r}: {said}" for part in parts if part not in said)

    expect(
        "wide", "train needs about", "train.micro_batch_rows=", "train.activation_checkpointing=true", "Kept: nothing"
    )
    expect("large", "lower model.d_model or model.n_layers", "train.optimizer.kind=adamw_8bit")
    expect("short", "memory ran out in training: this process held", "Kept: step-00000003 is the last that was saved")
    if found["wide"]["steps"] or found["large"]["steps"]:
        wrong.append("something was trained that cannot fit")
    if found["short"]["stopped"] != 75 or found["short"]["steps"] != ["step-00000002", "step-00000003"]:
        wrong.append(f"the checkpoints are {found['short']['steps']}")
    if found["again"]["code"] != 0 or not found["again"]["same"]:
        wrong.append(f"gone on with, the run is another one: {found['again']}")
    record("R12", 3, wrong)
