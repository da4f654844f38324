"""Write src/octavo/laws/parity.json: how closely each component agrees with its named references.

    python scripts/parity.py                  run every parity test that records, then write the file anew
    python scripts/parity.py tests/...py      run these, and replace only what they recorded
    python scripts/parity.py --check          only compare the kinds in the file with the tables and the tests

A parity test records through ``agree`` in tests/parity/proof.py, which adds a line to the file named by
OCTAVO_PARITY.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from octavo.laws.components import components
from octavo.laws.parity import Parity, collect, recorded, to_json

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "src" / "octavo" / "laws" / "parity.json"


def recording_tests(folder: Path = ROOT / "tests" / "parity") -> list[Path]:
    """The test files that use ``agree``."""
    return [path for path in sorted(folder.glob("test_*.py")) if "agree(" in path.read_text("utf-8")]


def problems(records: dict[str, list[Parity]], kinds: Iterable[str], tests: Iterable[Path]) -> list[str]:
    """What is wrong between the record, the tables and the tests: unknown kinds, kinds and files without a record."""
    kinds, tests = set(kinds), list(tests)
    found = [f"{kind} is recorded and in no table" for kind in sorted(set(records) - kinds)]
    for path in tests:
        match = re.fullmatch(r"test_(\w+)_parity", path.stem)
        if match and match[1] in kinds and match[1] not in records:
            found.append(f"{match[1]} has {path.name} and no record")
    names = {path.name for path in tests}
    for kind, references in records.items():
        for one in references:
            found += [f"{kind}: there is no {test}" for test in one.tests if Path(test).name not in names]
    return found


def merged(old: dict[str, list[Parity]], new: dict[str, list[Parity]]) -> dict[str, list[Parity]]:
    """``new`` in place of the same references of ``old``; the others stay."""
    kept = {
        kind: [one for one in old[kind] if one.reference not in {other.reference for other in new.get(kind, ())}]
        for kind in old
    }
    return {
        kind: sorted([*kept.get(kind, ()), *new.get(kind, ())], key=lambda one: one.reference) for kind in {*old, *new}
    }


def run(tests: list[Path]) -> tuple[int, dict[str, list[Parity]]]:
    """Run the tests, slow ones too; pytest's exit code and what they recorded."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "parity.jsonl"
        os.environ["OCTAVO_PARITY"] = str(lines)
        try:
            code = int(pytest.main(["-q", "-m", "not soak", "-p", "no:cacheprovider", *map(str, tests)]))
        finally:
            del os.environ["OCTAVO_PARITY"]
        return code, collect(lines.read_text("utf-8").splitlines() if lines.exists() else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", type=Path, help="default: every file that records")
    parser.add_argument("--check", action="store_true", help="compare only; run and write nothing")
    arguments = parser.parse_args()
    code = 0
    if not arguments.check:
        code, records = run(arguments.tests or recording_tests())
        if code:
            print("a parity test failed: nothing is written", file=sys.stderr)
            return code
        records = merged(recorded(), records) if arguments.tests else records
        RECORD.write_text(json.dumps(to_json(records), indent=1) + "\n", encoding="utf-8")
    found = problems(recorded(), (component.kind for component in components()), recording_tests())
    for problem in found:
        print(problem, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
