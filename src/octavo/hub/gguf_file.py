"""The GGUF container, read strictly: every length, offset and count is checked before anything is made of it.

A file has a header, metadata by key, a list of tensors with name, shape, type and offset, and then their data. Source:
ggml, docs/gguf.md. What the numbers of quantised types mean is left to the `gguf` package.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from types import ModuleType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 24  # elements of a list, keys, tensors: ten times what the largest vocabulary needs
MAX_STRING_BYTES = 1 << 24
MAX_DIMS = 4
STRING, LIST = 8, 9
SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in the file: ``shape`` slowest axis first, ``type`` a number of ggml's, ``start`` in bytes."""

    shape: tuple[int, ...]
    type: int
    start: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says: metadata (scalars, texts, lists, arrays) and where its tensors lie."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    def array(self, name: str) -> np.ndarray:
        """One tensor as float32, or as float16 where that is how it is stored."""
        package, entry = require(), self.tensors[name]
        quant = package.GGMLQuantizationType(entry.type)
        raw = self.raw(name)
        if quant.name == "F16":
            return raw.view("<f2").reshape(entry.shape)
        if quant.name == "F32":
            return raw.view("<f4").reshape(entry.shape)
        try:
            return package.quants.dequantize(raw.reshape(*entry.shape[:-1], -1), quant).reshape(entry.shape)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path} stores {name} as {quant.name}, which the gguf package cannot read",
                fix="use a file with another quantisation, such as Q8_0 or Q4_K_M",
            ) from None

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor."""
        entry = self.tensors[name]
        return np.fromfile(self.path, np.uint8, entry.n_bytes, offset=entry.start)

    def type_name(self, name: str) -> str:
        """How a tensor is stored: F32, BF16, Q4_K ..."""
        return require().GGMLQuantizationType(self.tensors[name].type).name


def require() -> ModuleType:
    """The `gguf` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ConfigError("reading GGUF files needs the gguf package", fix="pip install 'octavo[gguf]'") from None
    return gguf


def open_file(path: Path) -> GGUFFile:
    """Read everything but the tensors' data.

    Raises:
        CheckpointError: damaged, cut off, of another version or byte order, or with a tensor type that cannot be read.
        ConfigError: the `gguf` package is not installed.
    """
    require()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).read()
    except (_Damaged, struct.error, UnicodeDecodeError, ValueError) as error:
        what = "a text in it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise CheckpointError(f"{path} is a damaged GGUF file: {what}", fix="fetch it again") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise CheckpointError(f"{path} cannot be read: {why}", fix="see to the file and its rights") from None


class _Damaged(Exception):
    """What is wrong with the file, for the message."""


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap):
        self.path, self.content, self.size, self.at = path, content, len(content), 0

    def read(self) -> GGUFFile:
        if self.bytes(4) != MAGIC:
            raise _Damaged("it does not begin with GGUF")
        version = self.number("<I")
        if version & 0xFFFF == 0 and version:
            raise _Damaged("its numbers are big-endian")
        if version not in VERSIONS:
            raise _Damaged(f"version {version} is not one of {', '.join(map(str, VERSIONS))}")
        n_tensors, n_keys = self.number("<Q"), self.number("<Q")
        # The smallest key and the smallest tensor entry take 13 and 24 bytes.
        if max(n_tensors, n_keys) > MAX_ENTRIES or n_keys * 13 + n_tensors * 24 > self.size:
            raise _Damaged(f"it claims {n_keys} keys and {n_tensors} tensors in {self.size:,} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in metadata:
                raise _Damaged(f"the key {key!r} is there twice")
            metadata[key] = self.value(key)
        entries = self.entries(n_tensors)
        return GGUFFile(self.path, metadata, self.placed(entries, metadata.get("general.alignment", 32)))

    # -- pieces

    def bytes(self, n: int) -> bytes:
        if n > self.size - self.at:
            raise _Damaged(f"it ends at byte {self.size:,} in the middle of its description")
        self.at += n
        return self.content[self.at - n : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self) -> str:
        n = self.number("<Q")
        if n > MAX_STRING_BYTES:
            raise _Damaged(f"it has a text of {n:,} bytes")
        return self.bytes(n).decode("utf-8")

    def value(self, key: str) -> Any:
        kind = self.number("<I")
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.array(kind, 1)[0].item()
        if kind != LIST:
            raise _Damaged(f"{key} has a value of the unknown type {kind}")
        kind, n = self.number("<I"), self.number("<Q")
        if n > MAX_ENTRIES or n > self.size:
            raise _Damaged(f"{key} claims {n:,} elements")
        if kind == STRING:
            return [self.text() for _ in range(n)]
        if kind not in SCALARS:
            raise _Damaged(f"{key} is a list of the unknown type {kind}")
        return self.array(kind, n)

    def array(self, kind: int, n: int) -> np.ndarray:
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.bytes(n * dtype.itemsize), dtype)

    # -- tensors

    def entries(self, n_tensors: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name, n_dims = self.text(), self.number("<I")
            if not 1 <= n_dims <= MAX_DIMS:
                raise _Damaged(f"{name} has {n_dims} dimensions")
            shape = tuple(self.number("<Q") for _ in range(n_dims))[::-1]
            if name in found:
                raise _Damaged(f"the tensor {name!r} is there twice")
            found[name] = (shape, self.number("<I"), self.number("<Q"))
        return found

    def placed(self, entries: Mapping[str, tuple[tuple[int, ...], int, int]], align: Any) -> dict[str, TensorEntry]:
        """Each tensor's place, when all lie within the file and not on each other."""
        if type(align) is not int or not 1 <= align <= 1 << 16 or align & (align - 1):
            raise _Damaged(f"general.alignment = {align!r} is not a power of two")
        package, start = require(), -(-self.at // align) * align
        placed: dict[str, TensorEntry] = {}
        for name, (shape, kind, offset) in entries.items():
            if kind not in list(package.GGMLQuantizationType):
                raise _Damaged(f"{name} is stored in the unknown type {kind}")
            quant = package.GGMLQuantizationType(kind)
            per_block, block_bytes = package.GGML_QUANT_SIZES[quant]
            if min(shape) < 1 or shape[-1] % per_block:
                raise _Damaged(f"{name} of shape {list(shape)} cannot be stored as {quant.name}")
            n_bytes = prod(shape) // per_block * block_bytes
            if offset % align or start + offset + n_bytes > self.size:
                raise _Damaged(f"{name} lies outside the file of {self.size:,} bytes")
            placed[name] = TensorEntry(shape, kind, start + offset, n_bytes)
        ends = start
        for name, entry in sorted(placed.items(), key=lambda item: item[1].start):
            if entry.start < ends:
                raise _Damaged(f"{name} lies on another tensor")
            ends = entry.start + entry.n_bytes
        return placed
