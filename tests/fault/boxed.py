"""A child process that is asked one hostile thing after another, with limits, and watched while it answers.

The child imports one function and calls it with each case; it reports what came back, the processor seconds and how
much higher its memory stood than before. A case that takes too long is ended with its child, and the next case gets
a new one.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCALE = int(os.environ.get("OCTAVO_FAULT_SCALE", "1"))
"""Counts are multiplied by this: ``OCTAVO_FAULT_SCALE=10 pytest tests/fault``."""
FIRST_SECONDS = 60.0  # the first cases import what they need, on a machine that may be busy


@dataclass(frozen=True)
class Outcome:
    """What a case did: ``result`` or ``error`` (a refusal in our form), or ``crash`` (anything else)."""

    seconds: float
    mebibytes: float
    result: Any = None
    error: str = ""
    exit_code: int = 0
    crash: str = ""

    def trouble(self, seconds: float, mebibytes: float) -> str:
        """What is wrong with it, if anything: a crash, a refusal not in the one form, too slow, too large."""
        if self.crash:
            return self.crash
        if self.error and not (self.error.startswith("error[") and ". Fix: " in self.error and "\n" not in self.error):
            return f"not in the one form: {self.error[:300]}"
        if len(self.error) > 4000:
            return f"an error of {len(self.error):,} characters"
        if self.seconds > seconds:
            return f"took {self.seconds:.2f} s"
        if self.mebibytes > mebibytes:
            return f"took {self.mebibytes:.0f} MiB"
        return ""


class Box:
    """Asks a child to call ``function`` (``module:name``, found in this folder) with one case after another.

    Args:
        function: takes what JSON can hold and returns what JSON can hold.
        memory_bytes: address space it may take beyond what its imports take.
        seconds: wall-clock time after which a case is ended.
        first: harmless cases that a new child is asked first: what the first use imports is not the attack's.
    """

    def __init__(self, function: str, *, memory_bytes: int = 1 << 30, seconds: float = 20.0, first: Any = ()):
        self.function, self.memory_bytes, self.seconds, self.first = function, memory_bytes, seconds, first
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, case: Any) -> Outcome:
        """Call the function with ``case`` in the child."""
        if self.child is None:
            self.child = self._start()
            for harmless in self.first:
                outcome = self._ask(harmless, FIRST_SECONDS)
                assert not outcome.crash and not outcome.error, outcome
        return self._ask(case, self.seconds)

    def _ask(self, case: Any, seconds: float) -> Outcome:
        assert self.child is not None and self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(json.dumps(case).encode() + b"\n")
        self.child.stdin.flush()
        ready, _, _ = select.select([self.child.stdout], [], [], seconds)
        answer = self.child.stdout.readline() if ready else b""
        if not answer:
            how = f"no answer in {seconds:.0f} s" if not ready else f"the child died ({self.child.wait()})"
            self.close()
            return Outcome(seconds, 0.0, crash=how)
        return Outcome(**json.loads(answer))

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(HERE / "boxed.py"), self.function, str(self.memory_bytes)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n", "the child could not start"
        return child

    def close(self) -> None:
        """End the child."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------- the child


def _memory_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


def _answer(function: Any, case: Any) -> dict[str, Any]:
    from octavo.errors import OctavoError

    found: dict[str, Any] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, began = _memory_kib("VmHWM"), time.process_time()
    try:
        found["result"] = function(case)
    except OctavoError as error:
        found |= {"error": str(error), "exit_code": error.exit_code}
    except BaseException as error:
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1]
        found["crash"] = f"{type(error).__name__}: {str(error)[:200]!r} at {place.filename}:{place.lineno}"
    found["seconds"] = time.process_time() - began
    found["mebibytes"] = (_memory_kib("VmHWM") - before) / 1024
    return found


def _serve(name: str, memory_bytes: int) -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever the code under test prints is no answer
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    limit = _memory_kib("VmSize") * 1024 + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.write(b"ready\n")
    for line in sys.stdin.buffer:
        answers.write(json.dumps(_answer(function, json.loads(line))).encode() + b"\n")


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
