"""S4: memory of decoding: whatever is asked in whatever order, no block is lost, doubled or taken for another text.

The machines are those of tests/unit/infer, on longer walks; every step is counted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from boxed import SCALE
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

UNIT = Path(__file__).parents[1] / "unit" / "infer"
WALKS = {"blocks": (20 * SCALE, 80), "scheduler": (20 * SCALE, 60)}


def machine_of(name: str) -> Any:
    """The state machine of a unit test."""
    spec = importlib.util.spec_from_file_location(f"machine_of_{name}", UNIT / f"test_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Machine


@pytest.mark.parametrize("name", WALKS)
def test_a_long_walk_keeps_every_invariant(record: Callable[..., None], name: str) -> None:
    n_walks, n_steps = WALKS[name]
    counts = [0]

    class Counted(machine_of(name)):
        @invariant()
        def one_more_step(self) -> None:
            counts[0] += 1

    wrong = list[str]()
    walk = settings(
        max_examples=n_walks, stateful_step_count=n_steps, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        run_state_machine_as_test(Counted, settings=walk)
    except AssertionError as error:
        wrong.append(f"{name}: {error}")
    record("S4", counts[0] - n_walks, wrong, machine=name)  # the state before the first step is not a step
