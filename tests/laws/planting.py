"""Runs chosen tests against a copy of the package, each time in a fork of one process with the libraries loaded.

A line of JSON comes in ({"package": folder that holds octavo/, "tests": [...], "report": file}); when the file
holds the outcome, the line "done" goes out. Forking saves the seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

SECONDS = 100


class Recorder:
    """What failed, and in which phase."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.errors: list[str] = []
        self.passed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            (self.failed if report.when == "call" else self.errors).append(report.nodeid)
        elif report.when == "call":
            self.passed += report.passed

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.errors.append(report.nodeid)


def run(package: str, tests: list[str], report: str) -> None:
    import pytest

    signal.alarm(SECONDS)
    log = os.open(f"{report}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    recorder = Recorder()
    arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", f"pythonpath={package}"]
    code = pytest.main([*arguments, "--maxfail=3", *tests], plugins=[recorder])
    used = getattr(sys.modules.get("octavo"), "__file__", "")
    outcome = {"code": int(code), "failed": recorder.failed, "errors": recorder.errors,
               "passed": recorder.passed, "package": used}  # fmt: skip
    with open(report, "w") as file:
        json.dump(outcome, file)


def main() -> None:
    import numpy  # noqa: F401
    import pydantic  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch.utils.flop_counter  # noqa: F401
    import transformers
    from transformers.models.auto import modeling_auto  # noqa: F401

    for name in ("gpt2", "llama", "qwen2", "qwen3"):
        getattr(transformers, {"gpt2": "GPT2LMHeadModel"}.get(name, f"{name.capitalize()}ForCausalLM"))
    assert "octavo" not in sys.modules
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(**json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        print("done", flush=True)


if __name__ == "__main__":
    main()
