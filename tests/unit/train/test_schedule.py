"""Learning-rate schedules at the points that can be computed in the head."""

from __future__ import annotations

import pytest

from octavo.training.schedule import SCHEDULES


def factors(kind: str, steps: int, **values) -> list[float]:
    schedule = SCHEDULES[kind](SCHEDULES[kind].Config(**values))
    return [schedule.factor(step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_every_schedule_stays_in_range_and_reaches_the_peak(kind, warmup):
    found = factors(kind, 100, warmup=warmup)
    assert all(0 <= value <= 1 for value in found)
    assert max(found) == found[warmup] == 1
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert found[0] > 0  # a first step with no rate is a step thrown away


def test_the_warm_up_rises_evenly():
    assert factors("constant", 10, warmup=3)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_is_half_way_in_the_middle():
    found = factors("cosine", 100, final=0.2)
    assert found[50] == pytest.approx(0.6)
    assert found[25] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + 2**-0.5))


def test_linear_and_its_end():
    assert factors("linear", 4, final=0.0) == [1.0, 0.75, 0.5, 0.25]


def test_warm_up_stable_decay():
    found = factors("wsd", 12, warmup=2, decay=0.4, final=0.1)
    assert found[:8] == [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]
    assert found[8:] == pytest.approx([1.0, 0.775, 0.55, 0.325])


def test_one_step_is_a_whole_schedule():
    for kind in SCHEDULES:
        assert factors(kind, 1) == [1.0]
