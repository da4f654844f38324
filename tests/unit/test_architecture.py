"""Imports point one way, and what must be there at once does without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import octavo

SOURCE = Path(octavo.__file__).parent
FOUNDATION = {"errors", "schema", "files", "failpoint", "stop", "metrics_file"}

# Room -> the rooms it may import, beside the foundation and itself.
MAY_SEE: dict[str, set[str]] = {
    **{name: set() for name in FOUNDATION},
    "run": {"hub"},
    "report": {"tokenizer", "hub", "models"},
    "tokenizer": set(),
    "data": {"tokenizer", "report"},
    "nn": set(),
    "ngrams": set(),
    "models": {"nn"},
    "predictors": {"nn", "ngrams"},
    "channel": {"predictors", "tokenizer"},
    "batch": {"nn"},
    "objectives": {"nn", "batch"},
    "explain": {"nn", "models", "laws"},
    "laws": {"nn", "models", "batch", "objectives", "data"},
    "hub": {"nn", "models", "tokenizer"},
    "training": {"nn", "models", "batch", "objectives", "report"},
    "quantize": {"nn", "models", "tokenizer"},
    "infer": {"nn", "models", "tokenizer"},
    "eval": {"ngrams", "nn", "models", "tokenizer", "infer", "report"},
    "retrieval": {"nn", "models"},
    "serve": {"tokenizer", "infer"},
    "vectors": {"nn", "tokenizer"},
    "presets": {"hub", "models"},
}
# These put the rooms together; only the command line stands above them.
ASSEMBLY = {"certify", "comparing", "config", "count", "feed", "language_model", "launch", "pipeline", "plan", "repeat"}

TORCH_FREE = (
    "octavo", "octavo.run", "octavo.schema", "octavo.cli.main",
    "octavo.data.prepare", "octavo.data.shards", "octavo.data.loader", "octavo.data.workers", "octavo.data.chat",
    "octavo.hub.formats", "octavo.hub.gguf", "octavo.hub.llama2c", "octavo.hub.pull",
    "octavo.ngrams", "octavo.tokenizer", "octavo.serve.settings", "octavo.training.progress", "octavo.vectors",
)  # fmt: skip


def imported(tree: ast.AST, room: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import of ours in a module, also inside functions and for types only."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [
                f"{node.module}.{alias.name}" if node.module == "octavo" else str(node.module) for alias in node.names
            ]
        for name in names:
            parts = name.split(".")
            if parts[0] == "octavo" and len(parts) > 1 and parts[1] not in (room, "__version__"):
                yield node.lineno, parts[1]


def wrong_imports(room: str, name: str, source: str) -> list[str]:
    """Every import in a module of ``room`` that points the wrong way."""
    found = []
    for line, other in imported(ast.parse(source), room):
        if room in ("cli", "__main__", "__init__"):
            continue
        allowed = other != "cli" if room in ASSEMBLY else other in FOUNDATION | MAY_SEE[room]
        if not allowed:
            found.append(f"{name}:{line} imports octavo.{other}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).parts[0].removesuffix(".py"), path


def test_imports_point_one_way():
    wrong = []
    for room, path in modules():
        wrong += wrong_imports(room, path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place():
    rooms = {room for room, _ in modules()}
    assert rooms == set(MAY_SEE) | ASSEMBLY | {"cli", "__init__", "__main__"}


@pytest.mark.parametrize(
    ("room", "source", "line"),
    [
        ("infer", "import torch\n\ndef f():\n    from octavo.training.loop import Trainer\n", 4),
        ("nn", "from octavo.models import decoder\n", 1),
        ("data", "from octavo import pipeline\n", 1),
        ("pipeline", "import octavo.cli.main\n", 1),
    ],
)
def test_an_import_that_points_back_is_found(room, source, line):
    assert [problem.split()[0] for problem in wrong_imports(room, "x.py", source)] == [f"x.py:{line}"]


def torch_at_module_level(source: str) -> bool:
    """Whether importing this source imports torch."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
                for inner in ("body", "orelse", "finalbody"):
                    yield from statements(getattr(node, inner, []))

    for node in statements(ast.parse(source).body):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "torch" for name in names):
            return True
    return False


def test_rooms_of_text_do_not_import_torch():
    rooms = FOUNDATION | {"data", "tokenizer", "ngrams", "cli", "report", "run"}
    found = [str(p) for room, p in modules() if room in rooms and torch_at_module_level(p.read_text(encoding="utf-8"))]
    assert not found
    assert torch_at_module_level("try:\n    import torch.nn\nexcept ImportError:\n    pass\n")
    assert not torch_at_module_level("if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n")


@pytest.mark.parametrize("name", TORCH_FREE)
def test_module_is_there_without_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
