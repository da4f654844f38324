"""The recorded parity that comes with the package names the components and the tests there are."""

from pathlib import Path

import parity as script

from octavo.laws.components import components
from octavo.laws.parity import Parity, recorded

KINDS = [component.kind for component in components()]


def test_the_record_is_fresh():
    found = script.problems(recorded(), KINDS, script.recording_tests())
    assert not found, "\n".join([*found, "run: python scripts/parity.py"])


def test_every_record_has_a_reference_and_an_error_within_its_bound():
    for kind, references in recorded().items():
        for one in references:
            errors = [error for error in (one.fp32, one.bf16, one.fp64) if error is not None]
            assert errors and one.cases >= 1 and one.reference and one.tests, kind
            assert all(0 <= error <= 0.02 for error in errors), kind


def test_problems_are_found():
    tests = [Path("tests/parity/test_glu_parity.py"), Path("tests/parity/test_nn_parity.py")]
    records = {
        "gone": [Parity("x", 1, fp32=0.0)],
        "mlp": [Parity("x", 1, fp32=0.0, tests=("tests/parity/test_old.py",))],
    }
    assert script.problems(records, ["mlp", "glu"], tests) == [
        "gone is recorded and in no table",
        "glu has test_glu_parity.py and no record",
        "mlp: there is no tests/parity/test_old.py",
    ]


def test_a_run_of_some_tests_keeps_what_others_recorded():
    old = {"a": [Parity("one", 1, fp32=0.1), Parity("two", 1, fp32=0.2)], "b": [Parity("three", 1, fp32=0.3)]}
    new = {"a": [Parity("two", 5, fp32=0.0)], "c": [Parity("four", 1, fp32=0.0)]}
    assert script.merged(old, new) == {
        "a": [Parity("one", 1, fp32=0.1), Parity("two", 5, fp32=0.0)],
        "b": old["b"],
        "c": new["c"],
    }
