"""What the parity tests found when they last ran: the recorded agreement with independent implementations.

``scripts/parity.py`` runs them and writes parity.json; a user's own tests can write the same lines and
``octavo verify --parity FILE`` reads them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

DTYPES = ("fp32", "bf16", "fp64")


@dataclass(frozen=True)
class Parity:
    """Agreement with one reference.

    Errors are the largest difference relative to max(1, the largest value of the reference), over all cases;
    None where nothing was compared in that precision. fp64 says that both sides computed in float64.
    """

    reference: str
    cases: int
    fp32: float | None = None
    bf16: float | None = None
    fp64: float | None = None
    tests: tuple[str, ...] = ()


def collect(lines: Iterable[str]) -> dict[str, list[Parity]]:
    """Records by kind out of the JSON lines that parity tests wrote: one for each reference."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in filter(str.strip, lines):
        one = json.loads(line)
        found[one["kind"], one["reference"]].append(one)
    records: dict[str, list[Parity]] = {}
    for (kind, reference), cases in sorted(found.items()):
        errors = {
            dtype: max((_rounded(c["error"]) for c in cases if c["dtype"] == dtype), default=None) for dtype in DTYPES
        }
        tests = tuple(sorted({c["test"] for c in cases if c.get("test")}))
        records.setdefault(kind, []).append(Parity(reference, len(cases), **errors, tests=tests))
    return records


def _rounded(error: float) -> float:
    return float(f"{error:.1e}")


def to_json(records: Mapping[str, list[Parity]]) -> dict[str, Any]:
    return {
        kind: [{k: v for k, v in asdict(one).items() if v is not None} for one in records[kind]]
        for kind in sorted(records)
    }


def from_json(plain: Mapping[str, Any]) -> dict[str, list[Parity]]:
    return {kind: [Parity(**{**one, "tests": tuple(one["tests"])}) for one in plain[kind]] for kind in plain}


def recorded() -> dict[str, list[Parity]]:
    """The records that come with the package."""
    return from_json(json.loads((resources.files("octavo.laws") / "parity.json").read_text("utf-8")))


def from_lines(path: Path) -> dict[str, list[Parity]]:
    """The records in a file of JSON lines, as tests write it that are run with OCTAVO_PARITY naming it.

    Raises:
        ValueError: lines of another form.
    """
    try:
        return collect(path.read_text("utf-8").splitlines())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no lines of parity tests: {error!r}") from None
