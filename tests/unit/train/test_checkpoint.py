"""Checkpoints: exact round trips, every damage found, and a good step left after any kill or full disk."""

import errno
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.errors import CheckpointError, ResourceError
from octavo.training import checkpoint, tensor_file
from octavo.training.random_state import capture_random, restore_random


def content(step: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and state that tell which step they are of, so that a mixture would show."""
    tensors = {"model/w": torch.full((7, 3), float(step)), "optimizer/m": torch.full((5,), step, dtype=torch.bfloat16)}
    return tensors, {"step": step, "cursor": [step, 2 * step]}


def save(folder: Path, step: int, keep: int = 2, run_id: str = "r1") -> Path:
    return checkpoint.save(folder, step, *content(step), run_id=run_id, keep=keep)


def assert_holds(path: Path, step: int) -> None:
    tensors, state = checkpoint.load(path)
    expected, expected_state = content(step)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --------------------------------------------------------------------------------------- round trips


def test_every_dtype_and_layout_round_trips(tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "fp32": base,
        "view": base[1:3, ::2],
        "transposed": base.T,
        "same_storage": base.view(8, 6),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "bool": torch.tensor([True, False]),
        "odd_bytes": torch.arange(3, dtype=torch.uint8),
        **{str(t): torch.arange(5).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64)},
        **{str(t): torch.arange(5).to(t) for t in (torch.int32, torch.int16, torch.int8)},
    }
    path = checkpoint.save(tmp_path / "checkpoints", 3, tensors, {"x": 0.1}, run_id="r")
    assert path.name == "step-00000003"
    assert names(path) == ["manifest.json", "state.json", "training.safetensors"]
    loaded, state = checkpoint.load(path)
    assert state == {"x": 0.1}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], tensor)]
        assert torch.equal(*as_bytes)
    loaded["fp32"].zero_()
    assert loaded["same_storage"].abs().sum() > 0


def test_the_same_state_gives_the_same_bytes(tmp_path):
    first, second = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names(first))


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()
    path = checkpoint.save(tmp_path, 1, {}, {"random": capture_random()}, run_id="r")
    expected = [draw() for _ in range(3)]
    restore_random(checkpoint.load(path)[1]["random"])
    assert [draw() for _ in range(3)] == expected
    with pytest.raises(CheckpointError, match="random state"):
        restore_random({"python": [3, [1, 2], None]})


# --------------------------------------------------------------------------------------------- damage


def test_every_flipped_byte_is_found_and_its_file_named(tmp_path):
    path = save(tmp_path, 350)
    flipped = 0
    for name in names(path):
        data = (path / name).read_bytes()
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << (position % 8)
            (path / name).write_bytes(damaged)
            problems = checkpoint.verify(path)
            assert problems and problems[0].startswith(f"{name}: "), (name, position, problems)
            if position % 23 == 0:
                with pytest.raises(CheckpointError, match=name):
                    checkpoint.load(path)
            flipped += 1
        (path / name).write_bytes(data)
    assert flipped > 700
    assert checkpoint.verify(path) == []


def test_truncated_missing_extra_and_swapped_files_are_found(tmp_path):
    path, other = save(tmp_path / "a", 350), save(tmp_path / "b", 400)
    for name in names(path):
        data = (path / name).read_bytes()
        for size in {0, 1, len(data) // 2, len(data) - 1}:
            (path / name).write_bytes(data[:size])
            assert any(problem.startswith(f"{name}: ") for problem in checkpoint.verify(path))
        (path / name).write_bytes(data + b"\0")
        assert any(problem.startswith(f"{name}: ") for problem in checkpoint.verify(path))
        (path / name).write_bytes((other / name).read_bytes())
        assert checkpoint.verify(path)
        (path / name).unlink()
        assert checkpoint.verify(path) == [f"{name}: missing"]
        (path / name).symlink_to(other / name)
        assert checkpoint.verify(path)
        (path / name).unlink()
        (path / name).write_bytes(data)
    (path / "notes.txt").write_text("hello")
    assert checkpoint.verify(path) == ["notes.txt: extra file"]
    (path / "notes.txt").unlink()
    assert checkpoint.verify(path) == []
    renamed = path.rename(path.with_name("step-00000900"))
    assert checkpoint.verify(renamed) == ["manifest.json: belongs to step 350"]


def damage(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_a_damaged_newest_step_is_passed_over_with_a_line_that_says_so(tmp_path):
    save(tmp_path, 350)
    damage(save(tmp_path, 400))
    found = checkpoint.newest(tmp_path)
    assert (found.step, found.run_id) == (350, "r1")
    assert found.notices == (
        f"warning[CHECKPOINT]: {tmp_path}/step-00000400/model.safetensors: sha256 differs. "
        "Fix: step-00000350 is used instead (50 steps lost). Kept: step-00000350, every byte verified.",
    )
    assert names(tmp_path) == ["step-00000350", "step-00000400"], "a reader changes nothing"

    assert checkpoint.recover(tmp_path).notices == found.notices
    assert checkpoint.recover(tmp_path).notices == ()
    save(tmp_path, 375)
    assert names(tmp_path) == ["step-00000350", "step-00000375"]


def test_no_valid_step_is_an_error_and_never_step_0(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.newest(tmp_path) is None
    for step in (100, 200):
        damage(save(tmp_path, step))
    for find in (checkpoint.newest, checkpoint.recover):
        with pytest.raises(CheckpointError, match=r"step-00000200/model\.safetensors") as caught:
            find(tmp_path)
        assert caught.value.exit_code == 4 and "step-00000100/model.safetensors" in str(caught.value)
    assert names(tmp_path) == ["step-00000100", "step-00000200"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights.txt").write_text("1 2 3")
    with pytest.raises(CheckpointError, match=r"it holds weights\.txt"):
        checkpoint.newest(foreign)


def test_pickles_are_never_opened(tmp_path):
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("model.pt", "no_suffix"):
        torch.save({"w": Bomb()}, folder / name)
        for path in (folder, folder / name) if name == "model.pt" else (folder / name,):
            with pytest.raises(CheckpointError, match="pickle") as caught:
                checkpoint.load(path)
            assert "safetensors" in caught.value.fix
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoint.newest(folder)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------- rotation


def test_rotation_keeps_the_newest_and_drops_a_line_of_training_that_was_given_up(tmp_path):
    for step in (100, 200, 300, 400):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000300", "step-00000400"]
    save(tmp_path, 350, keep=2)
    assert names(tmp_path) == ["step-00000300", "step-00000350"]
    save(tmp_path, 360, keep=1)
    assert names(tmp_path) == ["step-00000360"]
    assert_holds(tmp_path / "step-00000360", 360)


def test_nothing_old_goes_when_the_new_step_reads_back_wrong(tmp_path, monkeypatch):
    save(tmp_path, 100, keep=1)
    real = tensor_file.write

    def lying_disk(path, tensors):
        result = real(path, tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 4
        path.write_bytes(data)
        return result

    monkeypatch.setattr(tensor_file, "write", lying_disk)
    with pytest.raises(ResourceError, match="reads back other bytes"):
        save(tmp_path, 200, keep=1)
    with pytest.raises(ResourceError, match="reads back other bytes"):
        save(tmp_path, 100, keep=1)
    assert names(tmp_path) == ["step-00000100"]
    assert_holds(tmp_path / "step-00000100", 100)


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 100)
    tensors, state = content(100)
    checkpoint.save(tmp_path, 100, tensors, {**state, "again": True}, run_id="r2")
    assert names(tmp_path) == ["step-00000100"]
    assert checkpoint.load(tmp_path / "step-00000100")[1]["again"] is True
    damage(tmp_path / "step-00000100")
    save(tmp_path, 100)
    assert_holds(tmp_path / "step-00000100", 100)


def test_leftovers_go_but_a_whole_one_is_finished(tmp_path):
    save(tmp_path, 100)
    whole = save(tmp_path / "elsewhere", 200)
    whole.rename(tmp_path / "step-00000200.tmp-dead")
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "step-00000300.tmp-dead").mkdir()
    (tmp_path / "step-00000300.tmp-dead" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "step-00000100", tmp_path / "drop.tmp-step-00000050-ab")
    assert checkpoint.newest(tmp_path).step == 100
    assert len(names(tmp_path)) == 4, "a reader removes nothing"
    assert checkpoint.recover(tmp_path).step == 200
    assert names(tmp_path) == ["step-00000100", "step-00000200"]
    assert_holds(tmp_path / "step-00000200", 200)


# ---------------------------------------------------------------------------------------------- kills

# A kill before an fsync leaves what a kill after the write before it does, so only failing disks need it.
OPERATIONS = ("open", "write", "mkdir", "rename", "unlink", "rmdir")


def fail_at(number: int, fail: Callable[[], None], operations: tuple[str, ...] = OPERATIONS) -> list[int]:
    """Have this process's file operation ``number`` (from 1) ``fail`` instead; the count so far, in a list."""
    count = [0]

    def wrap(real):
        def operation(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                fail()
            return real(*args, **kwargs)

        return operation

    for name in operations:
        setattr(os, name, wrap(getattr(os, name)))
    return count


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("before, step, keep", [((), 100, 1), ((100,), 200, 1), ((100, 200), 300, 2), ((100,), 100, 1)])
def test_a_kill_before_each_file_operation_leaves_a_verified_step(tmp_path, before, step, keep):
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        for earlier in before:
            save(folder, earlier)

        def work(folder=folder, number=number):
            fail_at(number, kill_self)
            save(folder, step, keep=keep, run_id="killed")

        code = in_child(work)
        found = checkpoint.recover(folder)
        assert not [name for name in names(folder) if "tmp-" in name]
        assert not [path for path in folder.iterdir() if checkpoint.verify(path)], f"operation {number}: half a step"
        if found is None:
            assert not before, f"operation {number}: the earlier step is gone"
        else:
            assert found.step in (*before[-1:], step) and not found.notices
            assert_holds(found.path, found.step)
        shutil.rmtree(folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert number > 10


def test_random_kills_lose_at_most_the_step_being_saved(tmp_path):
    def work(report: int) -> None:
        found = checkpoint.recover(tmp_path)
        step = found.step if found else 0
        while True:
            step += 1
            save(tmp_path, step, run_id=f"p{os.getpid()}")
            os.write(report, step.to_bytes(8, "little"))

    chance = random.Random(7)
    last = 0
    for _ in range(20):
        reader, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                work(report)
            finally:
                os._exit(99)
        os.close(report)
        os.read(reader, 8)  # the first save is done: from here any moment is as likely as another
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        reported = b""
        while block := os.read(reader, 65536):
            reported += block
        os.close(reader)
        saved = int.from_bytes(reported[-8:], "little") if reported else last + 1
        found = checkpoint.newest(tmp_path)
        assert found.step >= saved > last and not found.notices
        assert_holds(found.path, found.step)
        last = found.step
    assert last >= 20


# ------------------------------------------------------------------------------------------ full disks


@pytest.mark.parametrize("step", [200, 100])
def test_a_failing_disk_keeps_a_step_and_leaves_nothing_behind(tmp_path, step):
    codes = (errno.ENOSPC, errno.EIO, errno.EROFS)
    number, code = 0, 6
    while code:
        number += 1
        folder = tmp_path / str(number)
        save(folder, 100)

        def fail(code=codes[number % 3]):
            raise OSError(code, os.strerror(code))

        def work(folder=folder, number=number, fail=fail):
            count = fail_at(number, fail, (*OPERATIONS, "fsync"))
            try:
                save(folder, step, keep=1)
            except ResourceError as error:
                assert error.exit_code == 6 and "step-00000" in error.kept
                os._exit(6)
            os._exit(7 if count[0] >= number else 0)

        code = in_child(work)
        assert code in (0, 6, 7)
        found = checkpoint.newest(folder)
        assert found.step == step or code == 6
        assert_holds(found.path, found.step)
        if code == 6:
            assert not [name for name in names(folder) if "tmp-step" not in name and ".tmp-replaced-" not in name and "tmp-" in name]
        assert checkpoint.recover(folder).step == found.step
        assert not [name for name in names(folder) if "tmp-" in name]
    assert number > 15


def test_a_file_size_limit_at_any_size_is_reported_and_cleaned_up(tmp_path):
    save(tmp_path, 100)
    largest = max(file.stat().st_size for file in (tmp_path / "step-00000100").iterdir())
    for limit in range(0, largest, max(1, largest // 24)):

        def work(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save(tmp_path, 200)
            except ResourceError:
                os._exit(6)

        assert in_child(work) == 6
        assert names(tmp_path) == ["step-00000100"]
    assert_holds(tmp_path / "step-00000100", 100)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 100)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300))
    monkeypatch.setattr(os, "mkdir", lambda *args: pytest.fail("it began to write"))
    with pytest.raises(ResourceError, match="has 300 free") as caught:
        save(tmp_path, 200)
    assert "step-00000100" in caught.value.kept
    assert names(tmp_path) == ["step-00000100"]
