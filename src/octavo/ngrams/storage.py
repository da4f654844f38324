"""A saved n-gram model: ``config.json``, and one array a file, named after its content and mapped when loaded.

``config.json`` is replaced last, in one step, and names the files that belong to it: a reader, or whoever comes after a
crash, sees the model that was there or the new one. Nothing in the folder is code, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from octavo import files
from octavo.errors import CheckpointError
from octavo.ngrams.smoothing import Smoothed

FORMAT = 1
CONFIG = "config.json"
BLOCK = 1 << 24
FIX = "save the model again, or copy the whole folder again"


def write_arrays(folder: str | os.PathLike[str], arrays: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Write the arrays, then ``config.json`` with their sizes and hashes; then remove files of a model before."""
    folder = Path(folder)
    files.make_folder(folder)
    config = {**config, "format": FORMAT, "files": {}}
    for name, array in arrays.items():
        config["files"][name] = _write_array(folder, name, array)
    files.fsync_path(folder)
    files.write_json(folder / CONFIG, config)
    current = {entry["file"] for entry in config["files"].values()}
    for path in folder.glob("*.npy"):
        stem = path.stem.rpartition(".")[0]
        if path.name not in current and stem in arrays:
            path.unlink(missing_ok=True)


def _write_array(folder: Path, name: str, array: np.ndarray) -> dict[str, Any]:
    aside = folder / f"{name}.npy.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256()
    try:
        with open(aside, "xb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.flush()
            digest.update(aside.read_bytes())
            data = array.view(np.uint8).data
            for first in range(0, len(data), BLOCK):
                file.write(data[first : first + BLOCK])
                digest.update(data[first : first + BLOCK])
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"{name}.{digest.hexdigest()[:12]}.npy"
        size = aside.stat().st_size
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def kind_of(folder: str | os.PathLike[str]) -> str:
    """The kind of model that a folder says it holds."""
    found = _config(folder).get("kind")
    return found if isinstance(found, str) else ""


def _config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} holds no n-gram model: {CONFIG} is missing", fix="check the path") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix=FIX) from None
    return config if isinstance(config, dict) else {}


def read_config(folder: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The ``config.json`` of a saved model of ``kind``."""
    config, path = _config(folder), Path(folder) / CONFIG
    if config.get("kind") != kind:
        raise CheckpointError(
            f"{path} describes no model of kind {kind!r} but {config.get('kind')!r}", fix="check the path"
        )
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {config.get('format')!r}, not {FORMAT}", fix="load it with the version that wrote it"
        )
    return config


def read_array(
    folder: str | os.PathLike[str], config: dict[str, Any], name: str, dtype: Any, *, verify: bool
) -> np.ndarray:
    """One array of a saved model, mapped read-only.

    Raises:
        CheckpointError: it is missing, was cut, has another type, or (with ``verify``) other bytes than were written.
    """
    try:
        entry = config["files"][name]
        file, size, digest = str(entry["file"]), int(entry["bytes"]), str(entry["sha256"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{CONFIG} names no file for {name}", fix=FIX, where=str(folder)) from None
    path = Path(folder) / file
    if path.name != file or not path.is_file():
        raise CheckpointError(f"{path} is missing", fix=FIX)
    if path.stat().st_size != size:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, not {size}", fix=FIX)
    if verify and files.sha256_file(path) != digest:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}", fix=FIX)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no array: {error}", fix=FIX) from None
    if array.ndim != 1 or array.dtype != np.dtype(dtype):
        raise CheckpointError(f"{path} holds {array.dtype} {array.shape}, not a row of {np.dtype(dtype)}", fix=FIX)
    return array.view(np.ndarray)


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write an ``NGram``."""
    arrays: dict[str, np.ndarray] = {}
    for k, (keys, level) in enumerate(zip(model.keys, model.levels), start=1):
        if k > 1:
            arrays[f"keys-{k}"] = keys
        arrays[f"prob-{k}"], arrays[f"gamma-{k}"], arrays[f"best-{k}"] = level.prob, level.gamma, level.best
    config = {
        "kind": "ngram",
        "vocab_size": model.vocab_size,
        "settings": model.config.model_dump(mode="json"),
        "estimated": model.said,
    }
    write_arrays(folder, arrays, config)


def load(cls: Any, folder: str | os.PathLike[str], *, verify: bool) -> Any:
    """Read an ``NGram``."""
    found = read_config(folder, "ngram")
    try:
        vocab_size, said = int(found["vocab_size"]), dict(found["estimated"])
        config = cls.Config.model_validate(found["settings"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{Path(folder) / CONFIG} is incomplete: {error}", fix=FIX) from None

    def read(name: str, dtype: Any) -> np.ndarray:
        return read_array(folder, found, name, dtype, verify=verify)

    keys, levels, n_contexts = [np.arange(vocab_size, dtype=np.int64)], [], 1
    for k in range(1, config.order + 1):
        if k > 1:
            keys.append(read(f"keys-{k}", np.int64))
        level = Smoothed(read(f"prob-{k}", np.float64), read(f"gamma-{k}", np.float64), read(f"best-{k}", np.int32))
        if not (len(level.prob) == len(keys[-1]) and len(level.gamma) == len(level.best) == n_contexts):
            raise CheckpointError(f"the tables of order {k} in {folder} do not belong together", fix=FIX)
        n_contexts = len(keys[-1])
        levels.append(level)
    return cls(config, vocab_size, keys, levels, said)
