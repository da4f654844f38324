"""Room for large arrays: in memory, or in files without a name that the system may page out.

With a bound, every array that grows with the text lies in such a file and work on it goes block by block, so that
what is allocated stays below the bound for a text of any size. The file has no name: its space is free again as soon
as the array is, also when the process is killed.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

from octavo.errors import ConfigError

LEAST_BYTES = 8 << 20


class Scratch:
    """Where arrays go.

    Args:
        memory_bytes: what work in progress may allocate; None for no bound, and arrays in memory.
        folder: where the files go; the system's folder for temporary files by default. On a file system that is
            itself memory (tmpfs) nothing is gained.
    """

    def __init__(self, memory_bytes: int | None = None, folder: str | os.PathLike[str] | None = None):
        if memory_bytes is not None and memory_bytes < LEAST_BYTES:
            raise ConfigError(f"memory_bytes = {memory_bytes} is too little", fix=f"give at least {LEAST_BYTES}")
        self.memory_bytes, self.folder = memory_bytes, folder

    @property
    def bounded(self) -> bool:
        return self.memory_bytes is not None

    def block(self, bytes_each: int, n: int) -> int:
        """How many of ``n`` items may be worked on at once, if one takes ``bytes_each``."""
        return max(1, n) if self.memory_bytes is None else max(1, self.memory_bytes // bytes_each)

    def empty(self, n: int, dtype: Any) -> np.ndarray:
        """(n,) zeros in a file, or whatever in memory."""
        if self.memory_bytes is None or n == 0:
            return np.empty(n, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return np.memmap(file, dtype, mode="w+", shape=(n,)).view(np.ndarray)

    def zeros(self, n: int, dtype: Any) -> np.ndarray:
        return np.zeros(n, dtype) if self.memory_bytes is None or n == 0 else self.empty(n, dtype)

    def growing(self, dtype: Any) -> Growing:
        """An array whose length is not known yet."""
        return Growing(self, dtype)


class Growing:
    """An array that is written from its beginning to its end."""

    def __init__(self, scratch: Scratch, dtype: Any):
        self.scratch, self.dtype = scratch, np.dtype(dtype)
        self.parts: list[np.ndarray] = []
        self.file = tempfile.TemporaryFile(dir=scratch.folder) if scratch.bounded else None  # noqa: SIM115
        self.n = 0

    def append(self, part: np.ndarray) -> None:
        part = np.ascontiguousarray(part, self.dtype)
        self.n += len(part)
        if self.file is None:
            self.parts.append(part)
        elif len(part):
            self.file.write(part.data)

    def array(self) -> np.ndarray:
        """Everything appended; nothing may be appended after."""
        if self.file is None:
            parts, self.parts = self.parts, []
            if len(parts) == 1:
                return parts[0]
            return np.concatenate(parts) if parts else np.empty(0, self.dtype)
        if not self.n:
            return np.empty(0, self.dtype)
        with self.file as file:
            file.flush()
            return np.memmap(file, self.dtype, mode="r+", shape=(self.n,)).view(np.ndarray)
