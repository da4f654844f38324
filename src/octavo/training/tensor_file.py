"""Safetensors files whose SHA-256 is taken over the very bytes that pass: one pass to write, one to read.

The safetensors library reads and writes whole files behind one call. Training state is several times
the model, so here it streams: no second copy in memory, a hash that belongs to what was really written
or loaded, and the operating system's own error when the disk is full.

Source: the format is https://github.com/huggingface/safetensors#format; every file written here opens
with that library and the other way round (tests/unit/train/test_checkpoint.py).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError
from octavo.failpoint import failpoint
from octavo.files import write_all

if TYPE_CHECKING:
    import torch

# The format's name of each dtype and torch's.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
HEADER_LIMIT_BYTES = 100_000_000
MOST_DIMENSIONS, MOST_ELEMENTS = 64, 1 << 62


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Create ``path`` (it must not exist) holding ``tensors``, forced to disk.

    Views, tensors that share storage and tensors on other devices are written out each on their own.

    Returns:
        The file's size in bytes and its SHA-256 in hexadecimal.

    Raises:
        OSError: the disk refused.
        TypeError: a dtype the format has no name for.
    """
    digest = hashlib.sha256()
    size = 0
    failpoint("save.file")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        ordered, header = _layout(tensors)
        parts: Iterator[bytes | memoryview] = itertools.chain([header], map(_bytes, ordered))
        for data in parts:
            digest.update(data)
            failpoint("save.bytes")
            write_all(descriptor, data)
            size += len(data)
        failpoint("save.fsync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def read(path: Path) -> tuple[dict[str, torch.Tensor], int, str]:
    """The tensors of ``path`` in memory of their own, and the size and SHA-256 of the bytes read.

    Raises:
        CheckpointError: the bytes are not a safetensors file, or the file ends early.
        OSError: it cannot be read.
    """
    import torch

    digest = hashlib.sha256()
    tensors: dict[str, torch.Tensor] = {}
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = _fill(file, bytearray(8), path)
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > min(size - 8, HEADER_LIMIT_BYTES):
            raise _damaged(path, f"its header of {header_bytes} bytes is longer than the file allows")
        header = _fill(file, bytearray(header_bytes), path)
        digest.update(prefix)
        digest.update(header)
        for name, dtype, shape in _entries(path, bytes(header), size - 8 - header_bytes):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            digest.update(_fill(file, _bytes(tensor), path))
            tensors[name] = tensor
    return tensors, size, digest.hexdigest()


def size_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """About what a file of ``tensors`` takes on disk: the data, and 256 bytes of header for each."""
    return sum(tensor.numel() * tensor.element_size() + 256 for tensor in tensors.values())


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's own bytes where it is dense and on the CPU, otherwise those of a copy."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _layout(tensors: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], bytes]:
    names = {torch_name: name for name, torch_name in DTYPES.items()}
    header: dict[str, Any] = {}
    ordered = []
    start = 0
    # Wide dtypes first keeps every tensor aligned to its own item size, which memory-mapping readers need.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        dtype = names.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        ordered.append(tensor)
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return ordered, len(text).to_bytes(8, "little") + text


def _entries(path: Path, header: bytes, data_bytes: int) -> list[tuple[str, str, list[int]]]:
    """Name, torch dtype and shape of each tensor in file order; together they cover the data exactly."""
    import torch

    try:
        table = json.loads(header)
        table.pop("__metadata__", None)
        rows = []
        for name, entry in table.items():
            start, end = entry["data_offsets"]
            rows.append((start, end, name, entry["dtype"], entry["shape"]))
        rows.sort(key=lambda row: row[:3])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from None
    entries, position = [], 0
    for start, end, name, dtype, shape in rows:
        valid = (
            isinstance(dtype, str)
            and dtype in DTYPES
            and start == position
            and type(end) is int
            and isinstance(shape, list)
            and len(shape) <= MOST_DIMENSIONS
            and all(type(length) is int and length >= 0 for length in shape)
            and math.prod(length or 1 for length in shape) <= MOST_ELEMENTS
            and end - start == math.prod(shape) * getattr(torch, DTYPES[dtype]).itemsize
        )
        if not valid:
            raise _damaged(path, f"its entry {str(name)[:80]!r} does not fit the file")
        entries.append((name, DTYPES[dtype], shape))
        position = end
    if position != data_bytes:
        raise _damaged(path, f"it holds {data_bytes} bytes of data where the header says {position}")
    return entries


def _fill(file: Any, buffer: Any, path: Path) -> Any:
    """Read until ``buffer`` is full: one call returns at most 2 GiB."""
    rest = memoryview(buffer)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise _damaged(path, "it ends early")
        rest = rest[count:]
    return buffer


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound safetensors file: {why}",
        fix="load another step, or restore this file from a copy",
        kept="nothing was changed",
    )
