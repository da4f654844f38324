"""What this machine can do, decided once: threads, allocator, number format, compiler, peak rate."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from pathlib import Path
from typing import Literal

import torch

from octavo.nn.kernels import build
from octavo.nn.kernels.build import compiler
from octavo.training.settings import TrainConfig

Precision = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def set_threads(n: int) -> None:
    """Use ``n`` threads inside tensor operations."""
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def tune_allocator() -> bool:
    """Keep freed memory in the process (glibc only); True if it was done.

    By default every activation above 32 MiB is mapped and unmapped anew, and the page faults cost a
    fifth of a training step. Effective for what is allocated afterwards. It pays where the same sizes come again and
    again; for tensors of ever other sizes the memory only grows: ``restore_allocator`` when the training is over.
    """
    return _set_allocator(mmap_max=0, trim_threshold=1 << 30, top_pad=1 << 26)


def restore_allocator() -> None:
    """Give memory back again when it is freed, and what is free now."""
    if _set_allocator(mmap_max=65536, trim_threshold=1 << 17, top_pad=1 << 17):
        ctypes.CDLL(None).malloc_trim(0)


def _set_allocator(*, mmap_max: int, trim_threshold: int, top_pad: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    libc = ctypes.CDLL(None)
    settings = ((M_MMAP_MAX, mmap_max), (M_TRIM_THRESHOLD, trim_threshold), (M_TOP_PAD, top_pad))
    return all(libc.mallopt(name, value) for name, value in settings)


def has_device(device: str) -> bool:
    """Whether torch can compute on ``device`` here: cpu, cuda, cuda:N or mps."""
    kind, _, number = device.partition(":")
    if kind == "cuda":
        return int(number or 0) < torch.cuda.device_count()
    return kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available())


def best_precision(device: str = "cpu") -> Precision:
    """bf16 where the processor multiplies it faster than fp32, else fp32.

    On CPUs that means matrix tiles (AMX): with vector instructions alone (AVX512-BF16 or less) bf16
    products were measured at half the rate of fp32.
    """
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def use_compile_cache() -> Path:
    """Let compiled code survive the process: in TORCHINDUCTOR_CACHE_DIR or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "octavo" / "inductor"
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_works() -> str:
    """Empty if torch.compile can build and run code here, else why not, in one line."""
    if compiler() is None:
        return "no C++ compiler found on PATH"
    use_compile_cache()
    try:
        x = torch.arange(64, dtype=torch.float32)
        torch.compile(lambda t: torch.sin(t) * 2 + t, dynamic=False)(x)
    except Exception as error:  # the chain below torch.compile raises many unrelated types
        return f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return ""


def matmul_peak(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product on this machine with the present threads: the base of MFU."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    with torch.no_grad():
        a @ b
        while not best or time.perf_counter() < end:  # once at least, however slow the first one was
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def resolve(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Every ``auto`` choice made for this machine, and one line of notice for each that costs speed."""
    changes: dict[str, object] = {}
    notices = []
    if config.threads is None:
        changes["threads"] = cores()
    if config.precision == "auto":
        changes["precision"] = best_precision(config.device)
    if config.compile == "auto":
        reason = compile_works()
        changes["compile"] = "off" if reason else "step"
        if reason:
            notices.append(f"training runs uncompiled, about half as fast: {reason}")
    if config.attention != "sdpa" and config.device == "cpu":
        reason = build.attempt()[1]
        if reason:
            notices.append(f"attention and dropout run through torch alone, slower: {reason}")
        if config.attention == "auto":
            changes["attention"] = "sdpa" if reason else "kernel"
    elif config.attention == "auto":
        changes["attention"] = "sdpa"
    return config.model_copy(update=changes), notices
