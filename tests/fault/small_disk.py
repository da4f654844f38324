"""Saving and training on disks of a few hundred kilobytes, for test_r05_full_disk.py.

``unshare -m python small_disk.py WORK N`` mounts them in a mount namespace of its own and prints one JSON object: what
was tried, how often, and what went wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from saving import names
from training import log_of, saved_step, trainer, weights_hash

from octavo.errors import ResourceError
from octavo.training import checkpoint

KIB = 1024


def big(step: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """About 190 KiB."""
    tensors = {"model/w": torch.full((160, 100), float(step)), "optimizer/m": torch.full((320, 100), step - 0.5)}
    return tensors, {"step": step}


def holds(path: Path, step: int) -> bool:
    tensors, state = checkpoint.load(path)
    expected, expected_state = big(step)
    return state == expected_state and all(torch.equal(tensors[name], expected[name]) for name in expected)


@contextlib.contextmanager
def disk(place: Path, kib: int) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "small", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def leave(place: Path, free_bytes: int) -> Path:
    """Fill the disk but for ``free_bytes``."""
    hog = place / "hog"
    status = os.statvfs(place)
    blocks = status.f_bavail - free_bytes // status.f_frsize
    with open(hog, "wb") as file:
        file.write(bytes(max(0, blocks) * status.f_frsize))
    return hog


def free(place: Path) -> int:
    return shutil.disk_usage(place).free


def full_at(place: Path, free_bytes: int, is_known: bool) -> list[str]:
    """Save where ``free_bytes`` are left; unless ``is_known`` others fill the disk after the saver asked for room."""
    wrong = []
    with disk(place, 1024) as root:
        folder = root / "checkpoints"
        checkpoint.save(folder, 100, *big(100), run_id="r")
        hog = leave(root, free_bytes)
        before, real = free(root), shutil.disk_usage
        if not is_known:
            shutil.disk_usage = lambda path: real(path)._replace(free=1 << 40)  # type: ignore[assignment]
        try:
            checkpoint.save(folder, 200, *big(200), run_id="r", keep=1)
            wrong.append("it was saved")
        except ResourceError as error:
            said = "free" if is_known else "No space left on device"
            if error.exit_code != 6 or said not in error.what or "step-00000100" not in error.kept:
                wrong.append(f"it said {error}")
        finally:
            shutil.disk_usage = real
        if names(folder) != ["step-00000100"] or not holds(folder / "step-00000100", 100):
            wrong.append(f"it left {names(folder)}")
        if free(root) != before:
            wrong.append(f"{before} bytes were free, then {free(root)}")
        hog.unlink()
        checkpoint.save(folder, 300, *big(300), run_id="r", keep=1)
        if names(folder) != ["step-00000300"] or not holds(folder / "step-00000300", 300):
            wrong.append(f"with room again: {names(folder)}")
    return [f"{free_bytes} bytes free, {'known' if is_known else 'not known'}: {text}" for text in wrong]


class Struck:
    """Call ``strike`` before this process's nth operation that opens a file or changes a name."""

    def __init__(self, strike: Callable[[], None], nth: int):
        self.count = 0
        self.real = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "unlink", "rmdir")}

        def wrap(function):
            def operation(*args, **kwargs):
                self.count += 1
                if self.count == nth:
                    strike()
                return function(*args, **kwargs)

            return operation

        for name, function in self.real.items():
            setattr(os, name, wrap(function))

    def stop(self) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)


def read_only_at(place: Path, nth: int) -> tuple[bool, list[str]]:
    """The disk turns read-only before the nth operation of a save. Whether there are that many, and what was wrong."""
    wrong = []
    with disk(place, 1024) as root:
        folder = root / "checkpoints"
        checkpoint.save(folder, 100, *big(100), run_id="r")
        struck: list[bool] = []

        def strike() -> None:
            struck.append(True)
            remount(root, "ro")

        operations = Struck(strike, nth)
        try:
            checkpoint.save(folder, 200, *big(200), run_id="r", keep=1)
            saved = True
        except ResourceError as error:
            saved = False
            if error.exit_code != 6 or "Read-only" not in error.what or "step-00000" not in error.kept:
                wrong.append(f"it said {error}")
        finally:
            operations.stop()
        found = checkpoint.newest(folder)
        if found is None or found.step != (200 if saved else found.step) or not holds(found.path, found.step):
            wrong.append(f"saved: {saved}, a reader finds {found}")
        remount(root, "rw")
        found = checkpoint.recover(folder)
        if found is None or not holds(found.path, found.step) or any(".tmp-" in name for name in names(folder)):
            wrong.append(f"writable again: {found}, {names(folder)}")
        checkpoint.save(folder, 300, *big(300), run_id="r", keep=1)
        if names(folder) != ["step-00000300"]:
            wrong.append(f"the next save left {names(folder)}")
    return bool(struck), [f"read-only before operation {nth}: {text}" for text in wrong]


def train(folder: Path, full: range = range(0), root: Path | None = None) -> tuple[str, str]:
    """A training whose disk is full while the number of done steps is in ``full``; its weights and what it said."""
    steps = []

    def look() -> list[dict[str, str]]:
        steps.append(1)
        if root is not None and len(steps) == full.start:
            leave(root, 0)
        if root is not None and len(steps) == full.stop:
            (root / "hog").unlink(missing_ok=True)
        return [{"prompt": "", "text": "more than a block of the disk " * 200}]

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        made = trainer(folder, sample=look, sample_every=1, save_every=2, valid_every=100)
        try:
            made.fit()
        except ResourceError as error:
            return f"exit {error.exit_code}", said.getvalue()
    return weights_hash(made.model), said.getvalue()


def train_on_a_full_disk(work: Path) -> tuple[int, list[str]]:
    """Full for one, for two and for three saves: a warning each, then exit 6; going on ends with the same bits."""
    (work / "whole").mkdir()
    weights, _ = train(work / "whole")
    log = log_of(work / "whole")
    wrong = []
    cases = [
        (range(3, 5), 1),
        (range(3, 6), 1),
        (range(3, 7), 2),
        (range(5, 9), 2),
        (range(1, 3), 1),
        (range(5, 40), 3),
    ]
    for full, saves in cases:
        with disk(work / "small", 2048) as root:
            folder = root / "run"
            found, said = train(folder, full, root)
            expected = weights if saves < 3 else "exit 6"
            if found != expected or said.count("error[RESOURCE]") != min(saves, 2):
                wrong.append(f"full in {full}: {found}, expected {expected}; said {said!r}")
            if saves >= 3:
                if saved_step(folder) != 4:
                    wrong.append(f"full in {full}: step {saved_step(folder)} is left")
                (root / "hog").unlink()
                found, _ = train(folder)
            if found != weights or log_of(folder) != log:
                wrong.append(f"full in {full}: in the end other weights or another log")
            if left := [name for name in names(folder / "checkpoints") if ".tmp-" in name]:
                wrong.append(f"full in {full}: left {left}")
    return len(cases), wrong


def every_size(work: Path, n: int, is_known: bool) -> tuple[int, list[str]]:
    """n sizes between nothing and what a checkpoint takes."""
    checkpoint.save(work / "sized", 100, *big(100), run_id="r")
    need = sum(-(-path.stat().st_size // 4096) * 4096 for path in (work / "sized" / "step-00000100").iterdir())
    return n, [text for i in range(n) for text in full_at(work / "small", need * i // n, is_known)]


def every_operation(work: Path) -> tuple[int, list[str]]:
    n, wrong = 0, []
    while True:
        struck, found = read_only_at(work / "small", n + 1)
        wrong += found
        if not struck:
            return n, wrong
        n += 1


def main(work: Path, n_sizes: int) -> dict[str, dict[str, object]]:
    work.mkdir(exist_ok=True)
    results = {}
    for what, try_it in {
        "a disk that fills while saving": lambda: every_size(work, n_sizes, is_known=False),
        "a disk known to be too full": lambda: every_size(work, n_sizes, is_known=True),
        "a disk that turns read-only": lambda: every_operation(work),
        "training on a full disk": lambda: train_on_a_full_disk(work),
    }.items():
        began = time.monotonic()
        n, failures = try_it()
        results[what] = {"n": n, "failures": failures, "seconds": round(time.monotonic() - began, 2)}
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
