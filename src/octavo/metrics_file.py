"""The figures of a training stage, one JSON object a line, as the run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError, ResourceError
from octavo.files import fsync_path, make_folder, write_all


class MetricsFile:
    """``metrics.jsonl``: appended line by line, and cut back to what a checkpoint knows of on resume.

    A checkpoint stores ``position()``. Going on from it removes the lines written after it, so that the
    finished file equals that of a run which was never interrupted, but for its timings.

    Args:
        path: the file; its folder is made.
        position: from the checkpoint gone on from; None at step 0, which empties the file.

    Attributes:
        notices: lines for the user, such as that the file was lost.

    Raises:
        CheckpointError: the file's beginning is not what the checkpoint saw.
    """

    def __init__(self, path: str | os.PathLike[str], position: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.notices: list[str] = []
        make_folder(self.path.parent)
        keep_bytes, sha256 = (position["bytes"], position["sha256"]) if position else (0, None)
        if keep_bytes and not self.path.exists():
            self.notices.append(f"warning[METRICS]: {self.path} is missing; a new one begins at this step.")
            keep_bytes = 0
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._digest = hashlib.sha256()
            self._bytes = 0
            self._waiting = b""
            while self._bytes < keep_bytes:
                block = os.pread(self._descriptor, min(1 << 20, keep_bytes - self._bytes), self._bytes)
                if not block:
                    break
                self._digest.update(block)
                self._bytes += len(block)
            if keep_bytes and (self._bytes < keep_bytes or self._digest.hexdigest() != sha256):
                raise CheckpointError(
                    f"the first {keep_bytes:,} bytes of {self.path} are not those its checkpoint was saved with",
                    fix="restore the file, or move it away to begin a new one at this step",
                    kept="nothing was changed",
                )
            os.ftruncate(self._descriptor, keep_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; a number that is not finite becomes null. Survives a kill at once.

        A line that the disk refuses waits for the next one, so that a disk that is full for a while costs nothing;
        ``position`` and ``close`` say so if it still is.
        """
        plain = {
            key: None if isinstance(value, float) and value - value != 0 else value for key, value in record.items()
        }
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._waiting += line
        with contextlib.suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        try:
            write_all(self._descriptor, self._waiting)
        except OSError:
            with contextlib.suppress(OSError):  # no half line for readers; the next try begins where it began
                os.ftruncate(self._descriptor, self._bytes)
            raise
        self._digest.update(self._waiting)
        self._bytes += len(self._waiting)
        self._waiting = b""

    def position(self) -> dict[str, Any]:
        """Where the file stands, for the checkpoint; the lines up to here are on disk on return.

        Raises:
            ResourceError: the disk refused.
        """
        try:
            self._flush()
            os.fsync(self._descriptor)
            fsync_path(self.path.parent)
        except OSError as error:
            raise self._refused(error) from error
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _refused(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"{self.path} could not be written: {error.strerror}",
            fix="make room or mend the disk; the same command goes on from the last saved step",
            kept="every saved step",
        )

    def close(self) -> None:
        """Write what waits, and close.

        Raises:
            ResourceError: the disk still refuses.
        """
        if self._descriptor < 0:
            return
        try:
            self._flush()
        except OSError as error:
            raise self._refused(error) from error
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ResourceError) if exception[0] else contextlib.nullcontext():
            self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, also while it is being written: an unfinished last line is left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]
