"""Do the laws and the parity tests find mistakes in components? Each of planted_components.BUGS, one at a time."""

from __future__ import annotations

import pytest
from planted import Bug, check_bug, check_control, unplantable
from planted_components import BUGS
from planting import Planter


@pytest.fixture(scope="module")
def planter(tmp_path_factory):
    one = Planter(tmp_path_factory.mktemp("planted_components"), models=True)
    yield one
    one.close()


def test_every_bug_can_be_planted_and_names_tests_there_are():
    found = unplantable(BUGS)
    assert not found, "\n".join(found)


def test_what_cannot_be_planted_is_said():
    moved = Bug("moved", "nn/shift.py", "no such text", "", ("tests/laws/test_models.py::test_nowhere", "nofile.py"))
    assert unplantable([moved, moved]) == [
        "moved: nn/shift.py has its anchor 0 times",
        "moved: there is no test tests/laws/test_models.py::test_nowhere",
        "moved: there is no test nofile.py",
        "moved: another mistake has this name",
        "moved: nn/shift.py has its anchor 0 times",
        "moved: there is no test tests/laws/test_models.py::test_nowhere",
        "moved: there is no test nofile.py",
    ]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_without_a_bug_the_tests_pass(planter):
    check_control(planter, BUGS)


@pytest.mark.slow
@pytest.mark.timeout(250)
@pytest.mark.parametrize("bug", BUGS, ids=[bug.kind for bug in BUGS])
def test_a_planted_bug_in_a_component_is_caught(bug, planter, record_property):
    record_property("caught", check_bug(planter, bug))
