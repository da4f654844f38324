"""Models in one file, as other programs write them: which format a file is in, and which module reads it.

A format is told by a file's first bytes. Nothing here or at the top of a format's module imports torch, so that
finding a model costs nothing.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.hub.small_weights import Codes
    from octavo.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEAD_BYTES = 512
PICKLE = "pickle"


@dataclass(frozen=True)
class Foreign:
    """A model file read: what a Hugging Face folder of the same model would hold.

    ``config`` is its config.json, ``tensors`` have the names of the family that it says. ``quantised`` says by name of
    which type those were in the file that were not numbers by themselves.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor | Codes]
    tokenizer: Tokenizer | None = None
    quantised: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """``module`` has ``recognises(head, size, name)`` and ``read(path, tokenizer)``."""

    title: str
    module: str


FORMATS: dict[str, Format] = {
    "gguf": Format("GGUF", "octavo.hub.gguf"),
    "llama2c": Format("llama2.c", "octavo.hub.llama2c"),
}


def recognise(path: Path) -> str | None:
    """The format of a file: a key of ``FORMATS``, ``pickle``, or None for anything else."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        size = path.stat().st_size
    except OSError:
        return None
    for name, known in FORMATS.items():
        if importlib.import_module(known.module).recognises(head, size, path.name):
            return name
    return PICKLE if is_pickle(path, head) else None


def is_pickle(path: Path, head: bytes) -> bool:
    """Whether ``torch.save`` or ``pickle.dump`` wrote the file that begins with ``head``."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head[:4] != b"PK\x03\x04":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return path.suffix in PICKLED  # cut off: the table of contents stands at the end


def locate(folder: Path) -> Path | None:
    """The one model file of a folder without config.json; None where there is none.

    Raises:
        CheckpointError: there are several.
    """
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and recognise(path) in FORMATS]
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise CheckpointError(f"{folder} holds several models: {names}", fix=f"name one: {found[0]}")
    return found[0] if found else None


def read(path: Path, tokenizer: Tokenizer | None = None) -> Foreign:
    """Read a model file; ``tokenizer`` takes the place of the one that stands in or beside it.

    Raises:
        CheckpointError: unknown, damaged, or a model this library cannot compute exactly.
    """
    name = recognise(path)
    if name not in FORMATS:
        titles = ", ".join(known.title for known in FORMATS.values())
        raise CheckpointError(f"{path} is in no known format", fix=f"give one of {titles}")
    return importlib.import_module(FORMATS[name].module).read(path, tokenizer)
