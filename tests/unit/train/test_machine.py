"""What is decided once for a machine: threads, number format, compiler; a choice made stays made."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.nn.kernels import build
from octavo.training import machine
from octavo.training.settings import TrainConfig


def test_cores_are_those_this_process_may_use():
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert machine.cores() == 1
        finally:
            os.sched_setaffinity(0, allowed)


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        machine.set_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        machine.set_threads(before)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("device", "there"), [("cpu", True), ("cuda:4096", False)])
def test_devices_that_are_not_there_are_known(device, there):
    assert machine.has_device(device) is there
    assert machine.has_device("cuda") is (torch.cuda.device_count() > 0)
    assert machine.has_device("mps") is torch.backends.mps.is_available()


def test_the_precision_is_what_the_processor_multiplies_faster(monkeypatch):
    for tiles, best in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert machine.best_precision() == best
        assert machine.resolve(TrainConfig(compile="off", threads=1))[0].precision == best


def script(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


def test_the_compiler_is_found_as_torch_finds_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compiler() is None
    found = script(tmp_path, "clang++" if sys.platform == "darwin" else "g++")
    assert machine.compiler() == str(found)
    mine = script(tmp_path, "mine")
    monkeypatch.setenv("CXX", "mine")
    assert machine.compiler() == str(mine)
    monkeypatch.setenv("CXX", "nothing-of-the-kind")
    assert machine.compiler() is None


def test_without_a_compiler_training_is_not_compiled_and_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    resolved, notices = machine.resolve(TrainConfig(attention="sdpa"))
    assert resolved.compile == "off"
    assert len(notices) == 1 and "no C++ compiler" in notices[0] and "\n" not in notices[0]


def test_without_a_compiler_attention_is_torchs_own_and_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "attempt", build.attempt.__wrapped__)  # this process may have built it before
    resolved, notices = machine.resolve(TrainConfig(compile="off"))
    assert resolved.attention == "sdpa"
    assert len(notices) == 1 and "no C++ compiler" in notices[0] and "\n" not in notices[0]
    kept, notices = machine.resolve(TrainConfig(compile="off", attention="kernel"))  # a run begun elsewhere
    assert kept.attention == "kernel" and len(notices) == 1


@pytest.mark.slow
def test_a_compiler_that_fails_is_no_compiler(tmp_path):
    # In a process of its own: torch remembers the compiler that worked before.
    code = "from octavo.training.machine import compile_works; print(compile_works())"
    broken = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(script(tmp_path, "broken"))}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **broken}, capture_output=True, text=True)
    reason = done.stdout.strip()
    assert reason.startswith("torch.compile failed") and "\n" not in reason


def test_the_compile_cache_outlives_the_process(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.use_compile_cache() == tmp_path / "octavo" / "inductor" and (tmp_path / "octavo").is_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "octavo" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert machine.use_compile_cache() == tmp_path / "mine"


def test_what_was_chosen_stays_and_the_rest_is_decided():
    given = TrainConfig(precision="bf16", compile="off", attention="sdpa", threads=3)
    assert machine.resolve(given) == (given, [])
    resolved, _ = machine.resolve(TrainConfig(compile="off"))
    assert resolved.threads == machine.cores() and resolved.precision in ("fp32", "bf16")
    assert machine.resolve(resolved)[0] == resolved


@pytest.mark.skipif(machine.compiler() is None, reason="no C++ compiler")
def test_attention_is_the_kernel_where_it_can_be_built():
    resolved, notices = machine.resolve(TrainConfig(compile="off"))
    assert resolved.attention == "kernel" and not notices
    assert machine.resolve(TrainConfig(compile="off", device="cuda"))[0].attention == "sdpa"


def test_the_peak_is_a_rate_of_this_machine():
    peak = machine.matmul_peak(torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e15


def test_freed_memory_is_kept_only_where_that_can_be_said():
    # In a process of its own: it changes the allocator of the whole process.
    code = "from octavo.training.machine import tune_allocator; print(tune_allocator())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's memory is read from /proc")
def test_memory_is_given_back_when_a_training_is_over():
    code = """
import ctypes, resource
from octavo.training.machine import restore_allocator, tune_allocator
def held(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
tune_allocator()
before = held()
block = libc.malloc(1 << 27)
ctypes.memset(block, 1, 1 << 27)
libc.free(block)
kept = held() - before
restore_allocator()
print(kept > 1 << 26, held() - before < 1 << 26)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tuned = platform.libc_ver()[0] == "glibc"
    assert done.stdout.split()[1] == "True" and (done.stdout.split()[0] == "True") == tuned
