"""The kernels' library: compiled once for this machine, kept in the user's cache folder, loaded with ctypes.

The folder is ``$XDG_CACHE_HOME/octavo/kernels/HASH`` (default ``~/.cache``); the hash covers the sources, the flags,
the compiler's version and what the processor can do. Processes that start together build once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-w", "-fPIC", "-shared", "-pthread")
# The AMX kernel on a tile unit made of plain loops, exact and slow: how machines without AMX test it.
EMULATED = "-DOCTAVO_EMULATED_TILES"
SECONDS = 300


class Unavailable(Exception):
    """Why there is no library, in one line."""


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use, or None."""
    if wanted := os.environ.get("CXX"):
        return shutil.which(wanted)
    names = ("clang++",) if sys.platform == "darwin" else ("g++", "c++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where built libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "kernels"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]} did not run: {type(error).__name__}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise Unavailable(f"{command[0]} failed: {lines[0].strip()[:160]}")
    return done.stdout


def _processor() -> str:
    """What decides whether code built for "native" runs here."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    first = text.split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.split(":")[0].strip() in wanted)


def build(name: str = "attention", *, emulated: bool = False) -> Path:
    """The file of the library made of ``name``.cpp, compiled if it is not there yet.

    Args:
        name: attention or decode.
        emulated: bf16 runs through the AMX kernel on an emulated tile unit.

    Raises:
        Unavailable: no compiler, it fails, or the cache folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        raise Unavailable(f"kernels are not built on {sys.platform}") from None
    program = compiler()
    if program is None:
        raise Unavailable("no C++ compiler found on PATH")
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    flags = [*FLAGS, native, *([EMULATED] if emulated else [])]
    source = FOLDER / f"{name}.cpp"
    sources = [source, *sorted(path for path in FOLDER.iterdir() if path.suffix == ".h")]
    digest = hashlib.sha256(repr((flags, program, platform.machine(), _processor())).encode())
    digest.update(_run([program, "--version"]).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_folder() / digest.hexdigest()[:24] / f"{name}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(target.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():  # another process may have built it meanwhile
                with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                    made = Path(folder) / target.name
                    _run([program, *flags, str(source), "-o", str(made)])
                    os.replace(made, target)
    except OSError as error:
        raise Unavailable(f"{cache_folder()} cannot be written: {error.strerror}") from None
    return target


def load(path: Path) -> ctypes.CDLL:
    """Load the library at ``path`` and make it ready.

    Raises:
        Unavailable: the file is not what was built.
    """
    try:
        library = ctypes.CDLL(str(path))
        address, whole, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        call = (address, address, ctypes.c_float, whole, whole, address, long, whole, address)
        library.attention_forward.argtypes = library.attention_backward.argtypes = call
        library.dropout.argtypes = (address, address, address, long, whole, long, whole, whole)
        library.dropout.restype = None
        library.attention_init.argtypes = (ctypes.c_void_p,)
        library.attention_init(team())
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)  # built anew by the next process
        raise Unavailable(f"{path} cannot be loaded: {str(error).splitlines()[0][:120]}") from None
    return library


def team() -> ctypes.c_void_p | None:
    """The entry point of the OpenMP runtime that torch runs on, if it is one that can be shared."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except AttributeError:
        return None


@functools.cache
def attempt() -> tuple[ctypes.CDLL | None, str]:
    """The library of this process, or why there is none; tried once."""
    try:
        return load(build()), ""
    except Unavailable as error:
        return None, str(error)
