"""The one form of errors, as the tests of messages ask for it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from octavo.cli.main import main
from octavo.errors import OctavoError

ONE_FORM = re.compile(r"error\[[A-Z]+\]: .+\. Fix: .+[.?]( Kept: .+\.)?")


def says(line: str, code: int, exit_code: int, *parts: str) -> None:
    """One line in the one form with that code and all of ``parts``."""
    assert exit_code == code, f"exit code {exit_code}: {line}"
    assert "\n" not in line.rstrip("\n") and ONE_FORM.fullmatch(line.rstrip("\n")), line
    for part in parts:
        assert part in line, f"{part!r} is not in {line!r}"


def refused(code: int, action: Callable[[], Any], *parts: str) -> None:
    """``action`` raises a refusal with that exit code whose line has all of ``parts``."""
    with pytest.raises(OctavoError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        action()
    says(str(caught.value), code, caught.value.exit_code, *parts)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run a command line; its exit code and the last line on the error stream, above which progress may stand."""
    code = main(list(words))
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("error[") <= 1, said
    return code, said.rstrip("\n").rpartition("\n")[2]
