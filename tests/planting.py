"""Mistakes planted in a copy of the project, and chosen tests run against it.

A mistake is a substitution in the text of one file; what it replaces must occur there exactly once. The tests run
in a fork of one process that has the libraries loaded, which saves the seconds that importing torch takes: a line of
JSON goes to it ({"project": folder, "tests": [...], "report": file, "maxfail": n}); when the file holds the outcome,
the line "done" comes back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240
COPIED = ("src", "tests", "benchmarks", "docs", "scripts", "pyproject.toml", "README.md", "setup.sh")
LIBRARIES = ("numpy", "pydantic", "safetensors.torch", "torch.utils.flop_counter", "pytest", "hypothesis")


@dataclass(frozen=True)
class Change:
    """A mistake: in which file of the package, what stands there, and what is put in its place."""

    file: str
    anchor: str
    planted: str

    def found(self, project: Path = ROOT) -> int:
        """How often the anchor occurs; it must be once."""
        return (project / "src" / "octavo" / self.file).read_text("utf-8").count(self.anchor)


@dataclass(frozen=True)
class Outcome:
    """What the tests said of a copy.

    Attributes:
        code: pytest's exit code; -1 where it left no report.
        failed: tests that ran and failed, each with the last line of what it said.
        errors: what could not be collected or set up: no verdict on the code.
        passed: how many passed.
        log: all that was printed.
    """

    code: int
    failed: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    passed: int = 0
    log: str = ""


class Planter:
    """A copy of the project in ``folder``, and a process that runs tests against it, one order at a time.

    Args:
        folder: where the copy goes; a new one.
        models: load the classes of transformers too, for tests of parity.
    """

    def __init__(self, folder: Path, *, models: bool = False):
        self.project = (folder / "project").resolve()
        self.project.mkdir(parents=True)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.project / name)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *["models"] * models],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.project,
        )  # fmt: skip
        self._expect("ready")

    def run(self, tests: Iterable[str], changes: Sequence[Change] = (), *, maxfail: int = 3) -> Outcome:
        """Run ``tests`` with ``changes`` made, which are taken back afterwards."""
        paths = [self.project / "src" / "octavo" / change.file for change in changes]
        before = {path: path.read_text("utf-8") for path in paths}
        report = self.project.parent / "report.json"
        report.unlink(missing_ok=True)
        try:
            for path, change in zip(paths, changes, strict=True):
                text = path.read_text("utf-8")
                assert text.count(change.anchor) == 1, f"{change.file} has not once {change.anchor!r}"
                _write(path, text.replace(change.anchor, change.planted))
            order = {"project": str(self.project), "tests": list(tests), "report": str(report), "maxfail": maxfail}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            self._expect("done")
        finally:
            for path, text in before.items():
                _write(path, text)
        log = Path(f"{report}.log").read_text("utf-8", errors="replace")
        if not report.is_file():
            return Outcome(-1, log=log)
        said = json.loads(report.read_text("utf-8"))
        used = said.pop("package")
        assert not used or Path(used).is_relative_to(self.project), f"the tests ran against {used}"
        return Outcome(**said, log=log)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        code = self._process.wait(timeout=30)
        self._process.stdout.close()
        assert code == 0, f"the process that runs the tests ended with {code}"

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line == word, f"the process that runs the tests said {line!r}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")
    # Of another text of the same length and second it would be taken for valid.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the process that runs the tests


class _Recorder:
    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.errors: list[str] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.when == "call":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = crash.message.splitlines()[0] if crash else str(report.longrepr)[-200:]
        elif report.failed:
            self.errors.append(report.nodeid)
        elif report.when == "call":
            self.passed += report.passed

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.errors.append(report.nodeid)


def _run(project: str, tests: list[str], report: str, maxfail: int) -> None:
    import pytest

    os.chdir(project)
    os.environ.pop("OCTAVO_RELIABILITY", None)  # these are no results of the fault tests
    log = os.open(f"{report}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    recorder = _Recorder()
    arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", project]
    arguments += ["-c", f"{project}/pyproject.toml", f"--maxfail={maxfail}", "--timeout=100"]
    code = pytest.main([*arguments, *tests], plugins=[recorder])
    used = getattr(sys.modules.get("octavo"), "__file__", "")
    outcome = {"code": int(code), "failed": recorder.failed, "errors": recorder.errors,
               "passed": recorder.passed, "package": used}  # fmt: skip
    with open(report, "w", encoding="utf-8") as file:
        json.dump(outcome, file)


def _wait(child: int) -> None:
    """For the end of ``child``, not for ever; what it started and left goes with it."""

    def end() -> None:
        os.killpg(child, signal.SIGKILL)

    timer = threading.Timer(SECONDS, end)
    timer.start()
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # not reaped yet: until the kill the number is its own
    finally:
        timer.cancel()
        timer.join()
        end()
        os.waitpid(child, 0)


def _load_models() -> None:
    import transformers
    from transformers.models.auto import modeling_auto  # noqa: F401

    for name in ("gpt2", "llama", "qwen2", "qwen3"):
        getattr(transformers, {"gpt2": "GPT2LMHeadModel"}.get(name, f"{name.capitalize()}ForCausalLM"))


def _main() -> None:
    sys.path.pop(0)  # this folder: the copy has its own
    for name in LIBRARIES:
        importlib.import_module(name)
    if "models" in sys.argv[1:]:
        _load_models()
    assert "octavo" not in sys.modules
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                os.setpgid(0, 0)
                _run(**json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        _wait(child)
        print("done", flush=True)


if __name__ == "__main__":
    _main()
