"""A small checkpoint whose every number tells its step, and a process of its own to save it in."""

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octavo.training import checkpoint

SECONDS_AT_MOST = 60


def content(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state that tell which step they are of, so that a mixture would show."""
    tensors = {"model/w": torch.full((7, 3), float(step)), "optimizer/m": torch.full((5,), step, dtype=torch.bfloat16)}
    return tensors, {"step": step, "cursor": [step, 2 * step]}


def save(folder: Path, step: int, keep: int = 2, run_id: str = "r1") -> Path:
    return checkpoint.save(folder, step, *content(step), run_id=run_id, keep=keep)


def wrong(path: Path, step: int) -> list[str]:
    """What a step that loads holds that it should not; an error of loading is raised."""
    tensors, state = checkpoint.load(path)
    expected, expected_state = content(step)
    found = [] if state == expected_state else [f"state {state}"]
    if tensors.keys() != expected.keys():
        return [*found, f"tensors {sorted(tensors)}"]
    return found + [
        f"{name} = {tensors[name].flatten()[:3].tolist()} in step {step}"
        for name, tensor in expected.items()
        if tensors[name].dtype != tensor.dtype or not torch.equal(tensors[name], tensor)
    ]


def assert_holds(path: Path, step: int) -> None:
    assert wrong(path, step) == []


def damage(path: Path, name: str = "model.safetensors") -> None:
    """Flip the lowest bit of a file's last byte."""
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def in_child(work: Callable[[], Any]) -> int:
    """Run ``work`` in a forked child; its exit code (what ``work`` returns, if a number), or minus its signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.alarm(SECONDS_AT_MOST)
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
