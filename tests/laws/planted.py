"""A planted mistake, and the two questions asked of it: do the tests pass without it, does one see it?

``planting.Planter`` makes the copy of the project and runs the tests; this is what the tables of mistakes share.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

from planting import ROOT, Change, Planter


@dataclass(frozen=True)
class Bug:
    """A mistake: where, what stands there, what is put there, and which tests ought to see it.

    Attributes:
        kind: a name of its own.
        file: below src/octavo.
        anchor: occurs exactly once in the file.
        planted: stands in its place.
        tests: as pytest names them: ``path``, ``path::name`` or ``path::name[parameters]``. One has to fail.
    """

    kind: str
    file: str
    anchor: str
    planted: str
    tests: tuple[str, ...]


def check_control(planter: Planter, bugs: Iterable[Bug]) -> None:
    """The control: the copy, the fork and every selected test work as long as nothing is planted."""
    tests = tuple(dict.fromkeys(test for bug in bugs for test in bug.tests))
    outcome = planter.run(tests)
    assert outcome.code == 0, outcome.log[-3000:]
    assert outcome.passed >= len(tests)


def check_bug(planter: Planter, bug: Bug) -> str:
    """Assert that a test fails, not that one cannot be collected or set up; says which, or which law."""
    outcome = planter.run(bug.tests, [Change(bug.file, bug.anchor, bug.planted)])
    assert outcome.failed and not outcome.errors, f"nobody saw it: {outcome.log[-3000:]}"
    laws = sorted(set(re.findall(r"(\w+): broken", outcome.log)))
    said = f"{bug.kind}: caught by {', '.join([f'the law {law!r}' for law in laws] or outcome.failed)}"
    print(said)
    return said


def unplantable(bugs: Iterable[Bug]) -> list[str]:
    """What a look at the files says against a table of mistakes: anchors that moved, tests that are not there."""
    found, names = [], set()
    for bug in bugs:
        if bug.kind in names:
            found.append(f"{bug.kind}: another mistake has this name")
        names.add(bug.kind)
        if (times := Change(bug.file, bug.anchor, bug.planted).found()) != 1:
            found.append(f"{bug.kind}: {bug.file} has its anchor {times} times")
        if not bug.tests:
            found.append(f"{bug.kind}: names no test")
        for test in bug.tests:
            path, _, name = test.partition("::")
            tree = ast.parse((ROOT / path).read_text("utf-8")) if (ROOT / path).is_file() else ast.Module([], [])
            defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            if not tree.body or (name and name.partition("[")[0].rpartition("::")[2] not in defined):
                found.append(f"{bug.kind}: there is no test {test}")
    return found
