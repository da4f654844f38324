"""The one form of errors, and the exit code of each kind."""

import pytest

from octavo import errors
from octavo.errors import ConfigError, ConfigErrors, OctavoError, did_you_mean, nearest


def test_message_has_what_where_fix_and_kept_in_this_order():
    error = ConfigError(
        "model.n_heads = 3 must divide d_model = 256", fix="use 1, 2, 4 or 8.", where="a.yaml:7", kept="x"
    )
    assert str(error) == (
        "error[CONFIG]: model.n_heads = 3 must divide d_model = 256 (a.yaml:7). Fix: use 1, 2, 4 or 8. Kept: x."
    )
    assert str(OctavoError("it broke")) == "error[ERROR]: it broke."
    assert (error.what, error.fix, error.where, error.kept) == (
        "model.n_heads = 3 must divide d_model = 256",
        "use 1, 2, 4 or 8.",
        "a.yaml:7",
        "x",
    )


@pytest.mark.parametrize(
    ("name", "code", "exit_code"),
    [
        ("ConfigError", "CONFIG", 2),
        ("UnsupportedError", "UNSUPPORTED", 2),
        ("LockedError", "LOCKED", 2),
        ("DataError", "DATA", 3),
        ("CheckpointError", "CHECKPOINT", 4),
        ("NumericError", "NUMERIC", 5),
        ("ResourceError", "RESOURCE", 6),
        ("StopRequested", "STOPPED", 75),
    ],
)
def test_exit_codes(name, code, exit_code):
    error = getattr(errors, name)("x")
    assert (error.code, error.exit_code) == (code, exit_code)
    assert isinstance(error, OctavoError)
    assert str(error).startswith(f"error[{code}]: x.")


def test_every_error_has_a_code_and_an_exit_code_of_its_own_kind():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OctavoError)]
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4, 5, 6, 75}
    assert all(kind.code == kind.code.upper() for kind in kinds)


def test_several_errors_are_all_shown_one_line_each():
    error = ConfigErrors(ConfigError(what, fix="f") for what in ("a", "b"))
    assert str(error).splitlines() == ["error[CONFIG]: a. Fix: f.", "error[CONFIG]: b. Fix: f."]
    assert error.exit_code == 2 and [e.what for e in error.errors] == ["a", "b"]


def test_nearest_name_is_suggested_and_far_names_are_listed():
    names = ["learning_rate", "warmup_steps"]
    assert nearest("lerning_rate", names) == ["learning_rate"]
    assert nearest("zzz", names) == []
    assert did_you_mean("lerning_rate", names) == "did you mean `learning_rate`?"
    assert did_you_mean("zzz", reversed(names), thing="key") == "use one of the keys: learning_rate, warmup_steps"
