"""Every guard of benchmarks/guard_table.py can be switched off, and of a sample it is seen that a test then fails.

``python benchmarks/guards.py`` switches off all of them, which takes many minutes.
"""

import ast
import sys

import pytest
from planting import ROOT, Change

sys.path.insert(0, str(ROOT / "benchmarks"))
from guard_table import GUARDS, Guard

SAMPLE = ("manifest last", "NaN guard on the gradient norm", "size cap of a JSONL row")


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_stands_once_in_its_file_and_the_file_is_python_without_it(guard: Guard):
    assert Change(guard.file, guard.anchor, guard.off).found() == 1
    text = (ROOT / "src" / "octavo" / guard.file).read_text("utf-8")
    assert guard.off != guard.anchor
    ast.parse(text.replace(guard.anchor, guard.off))


def test_each_guard_has_a_name_of_its_own_and_tests_that_are_there():
    assert len({guard.name for guard in GUARDS}) == len(GUARDS) >= 28
    functions: dict[str, set[str]] = {}
    for test in {test for guard in GUARDS for test in guard.tests}:
        path, _, name = test.partition("::")
        if path not in functions:
            tree = ast.parse((ROOT / path).read_text("utf-8"))
            functions[path] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in functions[path], test


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_guard_a_test_fails_and_with_all_of_them_none():
    import guards

    # A guard that nothing needs: the words of a docstring. It must be told from those that are held.
    idle = Guard("nothing", "files.py", "Replace ``path`` with", "Put at ``path``", GUARDS[0].tests)
    chosen = [*(guard for guard in GUARDS if guard.name in SAMPLE), idle]
    wrong, verdicts = guards.try_guards(chosen)
    assert not wrong and len(verdicts) == len(SAMPLE) + 1
    assert [verdict.held for verdict in verdicts] == [True] * len(SAMPLE) + [False], verdicts
    assert verdicts[-1].why == "no test fails"
