"""Do the tests notice small random changes of the code? Each mutant is tested in a copy of the project.

    python benchmarks/mutants.py --n 60 --seed 1        60 mutants of nn, models, training and data
    python benchmarks/mutants.py --n 10 --rooms nn      ten of one room
    python benchmarks/mutants.py --only training/loop.py:133:2 --seed 1

A mutant is one change in one place: a comparison, an arithmetic or boolean operator, a number, a condition turned
round, a statement left out. Survivors are listed with their line; some change nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = "src/octavo"
# What is asked first is what is most likely to notice; the rest only of mutants that live on.
TESTS = {
    "nn": ["tests/unit/nn", "tests/unit/models", "tests/laws", "tests/parity", "tests/unit/infer"],
    "models": ["tests/unit/models", "tests/laws", "tests/parity", "tests/unit/infer"],
    "training": ["tests/unit/train", "tests/parity", "tests/unit/objectives", "tests/fault"],
    "data": ["tests/unit/data", "tests/laws", "tests/fault"],
}
# They look for lines of the sources, and a mutated file is written anew: they would notice any mutant.
OF_SOURCES = ("tests/fault/test_guards.py", *(f"tests/laws/test_planted_{name}.py" for name in ("bugs", "components")))
SECONDS = 900
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """The ``number``-th way to change the file at ``path``."""

    path: str
    number: int
    line: int
    what: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}:{self.number}"


def ways(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Every node that can be changed, and how."""
    found: list[tuple[ast.AST, str]] = []
    skipped = {id(n) for node in ast.walk(tree) for n in _unseen(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
            found.append((node, "comparison"))
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
            found.append((node, "arithmetic"))
        elif isinstance(node, ast.BoolOp):
            found.append((node, "and/or"))
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            found.append((node, "condition turned round"))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and not isinstance(node.value, bool):
            found.append((node, "number"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            found.append((node, "true/false"))
        elif isinstance(node, (ast.Assign, ast.AugAssign)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            found.append((node, "statement left out"))
    return found


def _unseen(node: ast.AST) -> list[ast.AST]:
    """Parts whose change means nothing: annotations, docstrings, words of messages, settings' descriptions."""
    parts: list[ast.AST] = []
    if isinstance(node, ast.AnnAssign):
        parts += ast.walk(node.annotation)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for a in [*node.args.args, *node.args.kwonlyargs]:
            parts += ast.walk(a.annotation) if a.annotation else []
        parts += ast.walk(node.returns) if node.returns else []
    if isinstance(node, (ast.JoinedStr, ast.Raise)):
        parts += list(ast.walk(node))[1:]
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        parts += ast.walk(node)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
        parts.append(node)
    return parts


def change(node: ast.AST, what: str) -> None:
    """Change ``node`` in place."""
    if what == "comparison" and isinstance(node, ast.Compare):
        node.ops[0] = COMPARE[type(node.ops[0])]()
    elif what == "arithmetic" and isinstance(node, (ast.BinOp, ast.AugAssign)):
        node.op = ARITHMETIC[type(node.op)]()
    elif what == "and/or" and isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif what == "condition turned round" and isinstance(node, (ast.If, ast.IfExp, ast.While)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif what == "number" and isinstance(node, ast.Constant):
        node.value = node.value + 1  # type: ignore[operator]
    elif what == "true/false" and isinstance(node, ast.Constant):
        node.value = not node.value


def mutate(source: str, number: int) -> str:
    """``source`` with its ``number``-th change."""
    tree = ast.parse(source)
    node, what = ways(tree)[number]
    if what != "statement left out":
        change(node, what)
    else:
        for parent in ast.walk(tree):
            for name in ("body", "orelse", "finalbody"):
                body = getattr(parent, name, None)
                if isinstance(body, list) and node in body:
                    body[body.index(node)] = ast.copy_location(ast.Pass(), node)
    return ast.unparse(ast.fix_missing_locations(tree))


def choose(rooms: list[str], n: int, seed: int) -> list[Mutant]:
    """``n`` mutants, drawn evenly from all places of the rooms."""
    every = []
    for room in rooms:
        for path in sorted((ROOT / SOURCE / room).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            for number, (node, what) in enumerate(ways(tree)):
                every.append(Mutant(path.relative_to(ROOT / SOURCE).as_posix(), number, node.lineno, what))  # type: ignore[attr-defined]
    return random.Random(seed).sample(every, min(n, len(every)))


def copy_project(to: Path) -> None:
    for name in ("src", "tests", "benchmarks", "pyproject.toml", "README.md", "docs", "scripts", "setup.sh"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def noticed(folder: Path, tests: list[str]) -> str:
    """The first test that fails in a copy, or that it took too long; empty if none does."""
    env = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    end = time.monotonic() + SECONDS
    for test in tests:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test]
        command += [f"--ignore={name}" for name in OF_SOURCES]
        try:
            done = subprocess.run(
                command, cwd=folder, env=env, capture_output=True, text=True, timeout=max(1.0, end - time.monotonic())
            )
        except subprocess.TimeoutExpired:
            return "time ran out"
        if done.returncode == 5:
            continue
        if done.returncode:
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return failed[0].split(" - ")[0] if failed else f"pytest left with {done.returncode}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rooms", default="nn,models,training,data")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="one mutant by its name, FILE:LINE:NUMBER")
    args = parser.parse_args()
    rooms = args.rooms.split(",")
    mutants = choose(rooms, args.n, args.seed)
    if args.only:
        path, line, number = args.only.split(":")
        mutants = [Mutant(path, int(number), int(line), "")]
    with tempfile.TemporaryDirectory() as scratch:
        copies = [Path(scratch) / str(i) for i in range(args.jobs)]
        for folder in copies:
            copy_project(folder)
        free = copy.copy(copies)

        def test(mutant: Mutant) -> tuple[Mutant, str]:
            folder = free.pop()
            path = folder / SOURCE / mutant.path
            before = path.read_text("utf-8")
            try:
                path.write_text(mutate(before, mutant.number), "utf-8")
                return mutant, noticed(folder, TESTS[mutant.path.split("/")[0]])
            finally:
                path.write_text(before, "utf-8")
                free.append(folder)

        living = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for n, (mutant, by) in enumerate(pool.map(test, mutants), 1):
                print(f"{n:3} {mutant.name:45} {mutant.what:24} {by or 'SURVIVES'}", flush=True)
                if not by:
                    living.append(mutant)
    killed = len(mutants) - len(living)
    print(f"\n{killed} of {len(mutants)} mutants noticed ({killed / len(mutants):.0%}), seed {args.seed}")
    for mutant in living:
        line = (ROOT / SOURCE / mutant.path).read_text("utf-8").splitlines()[mutant.line - 1].strip()
        print(f"  {mutant.name}  {mutant.what}:  {line}")


if __name__ == "__main__":
    main()
