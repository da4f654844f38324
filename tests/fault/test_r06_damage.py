"""R6: each byte of a checkpoint flipped, each length it can be cut to, blocks of zeros, files swapped, gone or added.

Every damage is found and its file named, by looking (``verify``) and by loading; what is not damaged is never accused.
"""

import os
import random
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.errors import CheckpointError
from octavo.training import checkpoint

SEED = 6
ENOUGH = 20  # failures: what a saver without a guard lets through would take minutes to list
BLOCK_BYTES = 4096


@pytest.fixture
def step(tmp_path) -> Path:
    """About 50 kB in four files."""
    chance = torch.Generator().manual_seed(SEED)
    tensors = {f"model/{i}": torch.randn(50 + i, 14, generator=chance) for i in range(5)}
    tensors |= {f"optimizer/{i}": torch.randn(50 + i, 28, generator=chance) for i in range(5)}
    state = {"step": 100, "random": [int(i) for i in torch.randint(0, 1 << 30, (250,), generator=chance)]}
    path = checkpoint.save(tmp_path / "checkpoints", 100, tensors, state, run_id="r")
    assert 45_000 < sum(file.stat().st_size for file in path.iterdir()) < 60_000
    return path


class Bytes:
    """A file's bytes, changed in place and put back."""

    def __init__(self, path: Path):
        self.path, self.data = path, path.read_bytes()
        self.descriptor = os.open(path, os.O_RDWR)

    def put(self, position: int, data: bytes) -> None:
        os.pwrite(self.descriptor, data, position)

    def restore(self, position: int, length: int) -> None:
        os.pwrite(self.descriptor, self.data[position : position + length], position)

    def cut(self, length: int) -> None:
        os.ftruncate(self.descriptor, length)

    def close(self) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, self.data, 0)
        os.close(self.descriptor)


def files(step: Path) -> Iterator[Bytes]:
    for path in sorted(step.iterdir()):
        file = Bytes(path)
        try:
            yield file
        finally:
            file.close()
    assert checkpoint.verify(step) == []


def not_found(step: Path, name: str, problem: str) -> bool:
    """Whether ``verify`` does not say exactly that: this file, this problem and no other file."""
    found = checkpoint.verify(step)
    # The one digit whose change may also mean something sound: the version of the format.
    version = len(found) == 1 and re.fullmatch(r"manifest\.json: format .*: newer, or damaged", found[0])
    return found != [f"{name}: {problem}"] and not (version and name == "manifest.json")


def differs(name: str) -> str:
    return "its own sha256 differs" if name == "manifest.json" else "sha256 differs"


def flips(step: Path, masks: range | None) -> tuple[int, list[str]]:
    n, failures = 0, []
    for file in files(step):
        name = file.path.name
        for position, byte in enumerate(file.data):
            for mask in [1 << (position % 8)] if masks is None else [1 << bit for bit in masks]:
                file.put(position, bytes([byte ^ mask]))
                n += 1
                if not_found(step, name, differs(name)):
                    failures.append(f"{name}, byte {position}, mask {mask}: {checkpoint.verify(step)}")
            file.restore(position, 1)
            if len(failures) >= ENOUGH:
                return n, failures
    return n, failures


@pytest.mark.timeout(300)
def test_each_flipped_byte_is_found_and_its_file_named(step, record):
    n, failures = flips(step, None)
    record("R6", n, failures, what="bytes flipped, looked at")
    assert n > 45_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_flipped_bit_is_found_and_its_file_named(step, record):
    n, failures = flips(step, range(8))
    record("R6", n, failures, what="bits flipped, looked at")
    assert n > 360_000


def load_refuses(step: Path, name: str) -> str:
    """Empty if loading is refused and the file named; otherwise what happened."""
    try:
        checkpoint.load(step)
    except CheckpointError as error:
        return "" if f"{step.name}/{name}" in str(error) and error.exit_code == 4 else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was loaded"


@pytest.mark.parametrize("n", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_sampled_flips_are_refused_by_loading(step, record, n):
    chance, failures, tried = random.Random(SEED), [], 0
    # Headers and JSON are where a changed byte still means something: half of the flips go to the first 1,500 bytes.
    places = [(path.name, size) for path in sorted(step.iterdir()) if (size := path.stat().st_size)]
    plan = [(name, chance.randrange(min(size, chance.choice([1500, size])))) for name, size in places * (n // 4)]
    for file in files(step):
        name = file.path.name
        for position in (position for where, position in plan if where == name):
            file.put(position, bytes([file.data[position] ^ chance.randint(1, 255)]))
            tried += 1
            if text := load_refuses(step, name):
                failures.append(f"{name}, byte {position}: {text}")
            file.restore(position, 1)
    record("R6", tried, failures, seed=SEED, what="bytes flipped, loaded")


def cut_files(step: Path, every: int) -> tuple[int, list[str]]:
    """Each length below a kilobyte, each near the end, and every so many between."""
    n, failures = 0, []
    for file in files(step):
        name, size = file.path.name, len(file.data)
        for length in range(size - 1, -1, -1):
            if length % every and 1024 < length < size - 16:
                continue
            file.cut(length)
            n += 1
            problem = differs(name) if name == "manifest.json" else f"{length} bytes, should be {size}"
            if not_found(step, name, problem):
                failures.append(f"{name} cut to {length}: {checkpoint.verify(step)}")
            if length % 997 == 0 and (text := load_refuses(step, name)):
                failures.append(f"{name} cut to {length}, loaded: {text}")
            if len(failures) >= ENOUGH:
                return n, failures
    return n, failures


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_each_truncation_is_found_with_both_sizes(step, record, every):
    n, failures = cut_files(step, every)
    record("R6", n, failures, what="truncations")


def test_blocks_of_zeros_are_found(step, record):
    n, failures = 0, []
    for file in files(step):
        name = file.path.name
        for position in range(0, len(file.data), BLOCK_BYTES):
            length = min(BLOCK_BYTES, len(file.data) - position)
            file.put(position, bytes(length))
            n += 1
            if not_found(step, name, differs(name)) or load_refuses(step, name):
                failures.append(f"{name}, zeros from {position}: {checkpoint.verify(step)}")
            file.restore(position, length)
        file.put(len(file.data), b"\0")
        n += 1
        grown = f"{len(file.data) + 1} bytes, should be {len(file.data)}"
        if not_found(step, name, differs(name) if name == "manifest.json" else grown) or load_refuses(step, name):
            failures.append(f"{name}, one byte longer: {checkpoint.verify(step)}")
    record("R6", n, failures, what="zeroed blocks and added bytes")


def test_files_that_are_missing_extra_swapped_or_not_plain_are_found(step, tmp_path, record):
    others = [tmp_path / "other" / name for name in ("step-00000100", "step-00000200")]
    for other in others:
        tensors, state = checkpoint.load(step)
        tensors["model/0"] += 1
        checkpoint.save(other.parent, int(other.name[5:]), tensors, {**state, "step": other.name}, run_id="o", keep=2)
    pristine = tmp_path / "pristine"
    shutil.copytree(step, pristine)
    n, failures = 0, []

    def check(label: str, name: str, problem: str) -> None:
        nonlocal n
        n += 1
        if not_found(step, name, problem) or load_refuses(step, name):
            failures.append(f"{label} {name}: {checkpoint.verify(step)}, {load_refuses(step, name)}")
        shutil.rmtree(step)
        shutil.copytree(pristine, step)

    for name in sorted(path.name for path in pristine.iterdir()):
        file = step / name
        file.unlink()
        check("missing", name, "missing")
        for label, make in {
            "folder": file.mkdir,
            "link": lambda file=file, name=name: file.symlink_to(pristine / name),
            "pipe": lambda file=file: os.mkfifo(file),
        }.items():
            file.unlink()
            make()
            check(label, name, "not a plain file")
        for other in others:
            same = (other / name).read_bytes() == (pristine / name).read_bytes()
            if same or name == "manifest.json":
                continue
            shutil.copyfile(other / name, file)
            size, expected = file.stat().st_size, (pristine / name).stat().st_size
            problem = "sha256 differs" if size == expected else f"{size} bytes, should be {expected}"
            check(f"from {other}", name, problem)
    for extra in ("notes.txt", "model.safetensors.bak", ".hidden", "more.safetensors"):
        (step / extra).write_bytes(b"x")
        check("extra", extra, "extra file")
    (step / "folder").mkdir()
    check("extra", "folder", "extra file")
    with socket.socket(socket.AF_UNIX) as bound:
        before = os.getcwd()
        os.chdir(step)  # the path of a socket may not be long
        try:
            bound.bind("socket")
        finally:
            os.chdir(before)
        check("extra", "socket", "extra file")
    record("R6", n, failures, what="files missing, extra, swapped or not plain")


@pytest.mark.parametrize("find", [checkpoint.newest, checkpoint.recover])
def test_a_folder_of_damaged_steps_is_never_a_start_from_nothing(step, record, find):
    tensors, state = checkpoint.load(step)
    checkpoint.save(step.parent, 200, tensors, state, run_id="r")
    (step / "optimizer.safetensors").unlink()
    (step.parent / "step-00000200" / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        find(step.parent)
    assert caught.value.exit_code == 4 and "step-00000200/state.json: 2 bytes" in caught.value.what
    assert "step-00000100/optimizer.safetensors: missing" in caught.value.what and caught.value.kept
    assert [path.name for path in sorted(step.parent.iterdir())] == ["step-00000100", "step-00000200"]
    record("R6", 1, 0, what="all steps damaged")


def test_a_step_under_another_number_or_with_another_manifest_is_found(step, tmp_path, record):
    renamed = step.with_name("step-00000900")
    step.rename(renamed)
    assert checkpoint.verify(renamed) == ["manifest.json: belongs to step 100"]
    assert not load_refuses(renamed, "manifest.json")
    renamed.rename(step)
    tensors, state = checkpoint.load(step)
    other = checkpoint.save(tmp_path / "other", 100, {**tensors, "model/0": tensors["model/0"] + 1}, state, run_id="r")
    shutil.copyfile(other / "manifest.json", step / "manifest.json")
    assert checkpoint.verify(step) == ["model.safetensors: sha256 differs"]
    assert not load_refuses(step, "model.safetensors")
    record("R6", 2, 0, what="steps renamed, manifests swapped")
