"""Files that are either the old ones or the new ones, never half of each.

Every file another process may read is written aside in the same folder, forced to disk and renamed
over its name. A reader, or a run that is continued after a power cut, sees one version or the other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace ``path`` with ``content`` (text as UTF-8) in one step; the folder must exist.

    Raises:
        OSError: the disk refused; the old file is untouched and nothing is left beside it.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_durable(aside, data)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """``write_atomic`` of ``value`` as indented JSON that ends in a newline."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_durable(path: str | os.PathLike[str], data: bytes) -> None:
    """Create ``path`` (it must not exist) and return when its bytes are on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: ``os.write`` may stop early, at a nearly full disk or at 2 GiB."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Force a file's bytes, or the names in a folder, to disk: then a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such call
            raise
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and those above it; on return their names are on disk, so that what is put in can be found."""
    path = Path(path)
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes in hexadecimal, read in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(BLOCK_BYTES, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
