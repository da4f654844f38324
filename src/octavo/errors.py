"""The one form of errors.

Every refusal names what is wrong, where, the one action that fixes it and what is safe:
``error[CONFIG]: model.n_heads = 3 must divide d_model = 256. Fix: use 1, 2, 4 or 8.``
Library users catch the typed exceptions; the command line prints ``str(error)`` and leaves with
``exit_code``. A traceback appears only with ``--debug`` and always in the run's log.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OctavoError(Exception):
    """Base of every refusal this library makes on purpose.

    Args:
        what: the path, the value and the rule it breaks, in one line without a final full stop.
        fix: one action that makes it work.
        where: file and line, rank or step, if there is one.
        kept: what is safe and where it is, if work was under way.
    """

    code = "ERROR"
    exit_code = 1

    def __init__(self, what: str, *, fix: str = "", where: str = "", kept: str = ""):
        self.what, self.fix, self.where, self.kept = what, fix, where, kept
        super().__init__(what)

    def __str__(self) -> str:
        what, where, fix, kept = map(_one_line, (self.what, self.where, self.fix, self.kept))
        line = f"error[{self.code}]: {what}"
        if where:
            line += f" ({where})"
        line += "."
        if fix:
            line += f" Fix: {fix.rstrip('.')}" + ("" if fix.endswith("?") else ".")
        if kept:
            line += f" Kept: {kept.rstrip('.')}."
        return line


PART_CHARACTERS = 1200


def _one_line(text: str) -> str:
    """``text`` as it may stand in a message, whatever file it was quoted from: printable, on one line, not endless."""
    if len(text) > PART_CHARACTERS:
        text = f"{text[: PART_CHARACTERS - 300]} ... {text[-200:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(OctavoError):
    """A recipe, an override or an argument that cannot mean anything: exit code 2."""

    code = "CONFIG"
    exit_code = 2


class UnsupportedError(ConfigError):
    """A component was asked for something it does not declare among its capabilities."""

    code = "UNSUPPORTED"


class LockedError(ConfigError):
    """Another process owns the run folder."""

    code = "LOCKED"


class DataError(OctavoError):
    """Input text that cannot be read as what it claims to be: exit code 3."""

    code = "DATA"
    exit_code = 3


class CheckpointError(OctavoError):
    """Missing, damaged or foreign weights or training state: exit code 4."""

    code = "CHECKPOINT"
    exit_code = 4


class NumericError(OctavoError):
    """A loss or gradient that is not a finite number: exit code 5."""

    code = "NUMERIC"
    exit_code = 5


class ResourceError(OctavoError):
    """Not enough disk or memory, or a platform that is not supported: exit code 6."""

    code = "RESOURCE"
    exit_code = 6


class StopRequested(OctavoError):
    """The run stopped on request (signal or time limit) after saving: exit code 75, resumable."""

    code = "STOPPED"
    exit_code = 75


class ConfigErrors(ConfigError):
    """Several configuration errors found in one pass, one line each."""

    def __init__(self, errors: Iterable[ConfigError]):
        self.errors = list(errors)
        super().__init__("; ".join(error.what for error in self.errors))

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def nearest(name: str, names: Iterable[str], n: int = 1) -> list[str]:
    """The ``n`` known names closest to ``name`` (for "did you mean"), best first; may be empty."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.6)


def did_you_mean(name: str, names: Iterable[str], *, thing: str = "name") -> str:
    """The text of a Fix: the nearest known name, or the list of all of them."""
    known = sorted(names)
    close = nearest(name, known)
    return f"did you mean `{close[0]}`?" if close else f"use one of the {thing}s: {', '.join(known)}"
