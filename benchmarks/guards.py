"""Is each guard held by a test? Every guard is switched off in turn in a copy of the project; a test must turn red.

    python benchmarks/guards.py                       all of them, one after another
    python benchmarks/guards.py --jobs 2 --json       two at a time, the outcome as JSON
    python benchmarks/guards.py --only "hash" --only "lock"

First the named tests are run on an unchanged copy: they must pass. A guard is held when a test runs and fails without
it; a test that cannot be collected or set up does not count. The exit code is 1 if a guard is not held.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

# One thread: the harness forks, and a pool of threads does not survive a fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from guard_table import GUARDS, Guard
from planting import Change, Planter


@dataclass(frozen=True)
class Verdict:
    """What became of the tests of one guard: ``held`` by ``test``, which said ``why``."""

    name: str
    held: bool
    test: str
    why: str
    seconds: float


def try_guards(guards: Sequence[Guard], jobs: int = 1, *, tell=lambda line: None) -> tuple[str, list[Verdict]]:
    """Each guard's verdict, and what is wrong with the tests on an unchanged copy (empty if nothing)."""
    tests = list(dict.fromkeys(test for guard in guards for test in guard.tests))
    free: SimpleQueue[Planter] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="octavo-guards-") as scratch:
        planters = [Planter(Path(scratch) / str(i)) for i in range(max(1, min(jobs, len(guards))))]
        for planter in planters:
            free.put(planter)

        def control(part: Sequence[str]) -> str:
            planter = free.get()
            outcome = planter.run(part, maxfail=1000)
            free.put(planter)
            good = outcome.code == 0 and outcome.passed >= len(part)
            return "" if good else "; ".join([*outcome.failed, *outcome.errors]) or outcome.log[-2000:]

        def switch_off(guard: Guard) -> Verdict:
            planter, began = free.get(), time.monotonic()
            outcome = planter.run(guard.tests, [Change(guard.file, guard.anchor, guard.off)], maxfail=1)
            free.put(planter)
            test, why = next(iter(outcome.failed.items()), ("", ""))
            if not test:
                why = f"cannot be run: {', '.join(outcome.errors)}" if outcome.errors else "no test fails"
                why = f"no report: {outcome.log[-300:]}" if outcome.code < 0 else why
            verdict = Verdict(guard.name, bool(test), test, why, round(time.monotonic() - began, 1))
            said = f"{test.rpartition('::')[2]}: {why}" if test else why
            tell(f"{verdict.name:40} {'held' if test else 'NOT HELD':8} {verdict.seconds:5.1f} s  {said[:160]}")
            return verdict

        try:
            with ThreadPoolExecutor(len(planters)) as pool:
                parts = [tests[i :: len(planters)] for i in range(len(planters))]
                wrong = "; ".join(filter(None, pool.map(control, parts)))
                return wrong, [] if wrong else list(pool.map(switch_off, guards))
        finally:
            for planter in planters:
                planter.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="guards whose name contains this; repeatable")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--list", action="store_true", help="only the names")
    args = parser.parse_args()
    guards = [guard for guard in GUARDS if not args.only or any(part in guard.name for part in args.only)]
    if args.list or not guards:
        print("\n".join(guard.name for guard in (guards or GUARDS)))
        return 0 if args.list else 2
    wrong, verdicts = try_guards(guards, args.jobs, tell=lambda line: args.json or print(line, flush=True))
    held = sum(verdict.held for verdict in verdicts)
    if args.json:
        print(json.dumps({"n": len(guards), "held": held, "control": wrong, "guards": list(map(asdict, verdicts))}))
    elif wrong:
        print(f"these tests fail with every guard in place: {wrong}")
    else:
        print(f"\n{held} of {len(guards)} guards held")
    return 0 if held == len(guards) else 1


if __name__ == "__main__":
    sys.exit(main())
