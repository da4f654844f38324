"""Files opened for reading: which names are files at all, and their bytes, decompressed as they are read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from octavo.errors import DataError

COMPRESSED = (".gz", ".zst")
BLOCK_BYTES = 1 << 20


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_dir(path: Path) -> bool:
    """Whether ``path`` is a folder; a name that none can have is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames; unlike the library's own reader, a file that ends
    inside a frame is an error and not the end."""

    FEED_BYTES = 256  # bounds what one call can inflate to (8 MiB, at 128 KiB for 4 bytes)

    def __init__(self, file: BinaryIO):
        import zstandard

        self._library, self._file = zstandard, file
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._pending or self._file.read(self.FEED_BYTES)
            self._pending = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed stream ends early")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file, decompressing .gz and .zst.

    Raises:
        DataError: it cannot be opened, or its compression is damaged or cut off.
    """
    failures: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    raw: Any = None
    try:
        suffix = path.suffix.lower()
        if suffix == ".zst":
            import zstandard

            failures = (*failures, zstandard.ZstdError)
        raw = open(path, "rb")  # noqa: SIM115 - closed below, whatever wraps it
        if suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[misc]
        elif suffix == ".zst":
            yield io.BufferedReader(_ZstdStream(raw), BLOCK_BYTES)
        else:
            yield raw
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there any more", fix="put it back and run the command again") from error
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path} cannot be read: {reason}", where=f"{path}:1", fix="replace the file with an undamaged copy"
        ) from error
    finally:
        if raw is not None:
            raw.close()
