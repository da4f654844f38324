"""R5: the disk is full, fails, lies or turns read-only while a step is saved; the step before stays, nothing half does.

Real full disks are small tmpfs mounted by ``small_disk.py`` in a mount namespace of its own, which takes root; the
limit on a file's size, and errors put in place of each operation, work for everyone.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from saving import in_child, names, save, wrong

from octavo.errors import ResourceError
from octavo.training import checkpoint, tensor_file

SMALL_DISK = Path(__file__).with_name("small_disk.py")


def can_mount() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "mount", "umount"))):
        return False
    trial = "mount -t tmpfs -o size=4k trial /mnt && umount /mnt"
    return subprocess.run(["unshare", "-m", "sh", "-c", trial], capture_output=True).returncode == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("n_sizes", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_small_disks_that_fill_up_or_turn_read_only(tmp_path, record, n_sizes):
    if not can_mount():
        record("R5", 0, 0, skipped="no root, or no mount namespaces", what="small disks")
        pytest.skip("R5 NOT TRIED on real full disks: that needs root and mount namespaces")
    folders = os.pathsep.join([str(SMALL_DISK.parents[1]), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        ["unshare", "-m", sys.executable, str(SMALL_DISK), str(tmp_path / "work"), str(n_sizes)],
        env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for what, result in json.loads(done.stdout).items():
        assert result["n"] >= 6
        record("R5", **result, what=what)


@pytest.mark.parametrize("n_sizes", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_a_file_that_may_not_grow_beyond_any_size(tmp_path, record, n_sizes):
    save(tmp_path, 100)
    largest = max(file.stat().st_size for file in (tmp_path / "step-00000100").iterdir())
    failures = []
    for i in range(n_sizes):
        limit = largest * i // n_sizes

        def work(limit=limit) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save(tmp_path, 200)
            except ResourceError as error:
                return error.exit_code
            return 0

        if (code := in_child(work)) != 6:
            failures.append(f"at most {limit} bytes: exit {code}")
        if names(tmp_path) != ["step-00000100"] or wrong(tmp_path / "step-00000100", 100):
            failures.append(f"at most {limit} bytes: left {names(tmp_path)}")
    record("R5", n_sizes, failures, what="a limit on file sizes")


# --------------------------------------------------------------------------------- errors in place of operations

OPERATIONS = ("open", "write", "mkdir", "rename", "unlink", "rmdir", "fsync")
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)


def fail_at(number: int, code: int) -> list[int]:
    """This process's operation ``number`` (from 1) fails with ``code``; the count so far, in a list."""
    count = [0]

    def wrap(real: Callable) -> Callable:
        def operation(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))
    return count


@pytest.mark.parametrize(("step", "keep"), [(200, 1), (100, 1)])
def test_an_error_in_place_of_each_operation(tmp_path, record, monkeypatch, step, keep):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    number, failures = 0, []
    while True:
        number += 1
        folder, code = tmp_path / str(number), CODES[number % len(CODES)]
        save(folder, 100)

        def work(folder=folder, code=code, number=number) -> int:
            count = fail_at(number, code)
            try:
                save(folder, step, keep=keep)
            except ResourceError as error:
                return 6 if os.strerror(code) in error.what and "step-00000" in error.kept else 8
            return 7 if count[0] >= number else 0

        exit_code = in_child(work)
        if exit_code == 0:
            break
        found = checkpoint.newest(folder)
        if exit_code not in (6, 7) or found is None or wrong(found.path, found.step):
            failures.append(f"operation {number}: exit {exit_code}, {found}")
        elif exit_code == 7 and found.step != step:
            failures.append(f"operation {number}: saved, but {found}")
        left = [name for name in names(folder) if name.startswith(f"step-{step:08d}.tmp-r1")]
        recovered = checkpoint.recover(folder)
        if left or recovered is None or recovered.step != (found and found.step) or ".tmp-" in str(names(folder)):
            failures.append(f"operation {number}: left {left}, then {recovered}, {names(folder)}")
    assert number > 15
    record("R5", number - 1, failures, what="an error in place of each operation")


def test_an_error_in_place_of_each_operation_of_a_start_is_said(tmp_path, record, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    number, failures = 0, []
    while True:
        number += 1
        folder, code = tmp_path / str(number), CODES[number % len(CODES)]
        save(folder, 100)
        save(folder / "x", 200).rename(folder / "step-00000200.tmp-dead")
        save(folder / "x", 300).rename(folder / "drop.tmp-step-00000300-ab")
        (folder / "x").rmdir()

        def work(folder=folder, code=code, number=number) -> int:
            count = fail_at(number, code)
            try:
                found = checkpoint.recover(folder)
            except ResourceError as error:
                return 6 if os.strerror(code) in error.what else 8
            return (7 if found is not None and found.step == 200 else 8) if count[0] >= number else 0

        exit_code = in_child(work)
        if exit_code == 0:
            break
        recovered = checkpoint.recover(folder)
        if exit_code not in (6, 7) or recovered is None or recovered.step != 200 or wrong(recovered.path, 200):
            failures.append(f"operation {number}: exit {exit_code}, then {recovered}")
    assert number > 5
    record("R5", number - 1, failures, what="an error in place of each operation of a start")


# ------------------------------------------------------------------------------------------------ asked and told


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch, record):
    save(tmp_path, 100)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300))
    monkeypatch.setattr(os, "mkdir", lambda *args: pytest.fail("it began to write"))
    with pytest.raises(ResourceError, match="has 300 free") as caught:
        save(tmp_path, 200)
    assert "step-00000100" in caught.value.kept and "bytes" in caught.value.fix
    assert names(tmp_path) == ["step-00000100"]
    record("R5", 1, 0, what="too little room is said first")


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("step", [200, 100])
def test_a_disk_that_gives_other_bytes_back_loses_nothing_old(tmp_path, monkeypatch, record, step, keep):
    save(tmp_path, 100, keep=keep)
    real = tensor_file.write

    def lying_disk(path, tensors):
        result = real(path, tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 4
        path.write_bytes(data)
        return result

    monkeypatch.setattr(tensor_file, "write", lying_disk)
    with pytest.raises(ResourceError, match="reads back other bytes") as caught:
        save(tmp_path, step, keep=keep)
    assert "model.safetensors" in caught.value.what and "step-00000100" in caught.value.kept
    assert names(tmp_path) == ["step-00000100"] and not wrong(tmp_path / "step-00000100", 100)
    record("R5", 1, 0, what="a disk that lies")
