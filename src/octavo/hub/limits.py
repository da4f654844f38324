"""What a model folder may ask of us before any of it is believed: no number in it may cost more time or memory than
its files explain. That nothing in it runs is seen to by ``octavo.schema.no_imports`` and by reading no pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError

MAX_JSON_BYTES = 32 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_LAYERS = 1024  # more than any model has
MAX_SIZES = {"n_layers": MAX_LAYERS, "max_seq_len": 1 << 26, "head_dim": 1 << 16, "n_heads": 1 << 16}
MAX_SIZE = 1 << 24  # of any other width, and of the vocabulary


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        CheckpointError: it is missing, no plain file, too large, or not JSON.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a plain file", fix="restore the file")
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size:,} bytes, more than {max_bytes:,}", fix="restore the file")
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", fix="give the folder of a model") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", fix="check the path and its rights") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error})", fix="restore the file") from None


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is longer than that of any model, before a library reads it.

    Raises:
        CheckpointError: the file is no plain file, or its header cannot be honest.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a plain file", fix="restore the file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return  # the caller says which index names it
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="check the path and its rights") from None
    if length > min(size, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path} is damaged: its header says it has {length:,} bytes", fix="restore the file")


def check_layers(hf: Mapping[str, Any]) -> None:
    """Refuse a config.json with more layers than any model has, before a family makes a list of them.

    Raises:
        CheckpointError: it does, by name.
    """
    for key, value in hf.items():
        if "layer" in key and isinstance(value, int) and value > MAX_LAYERS:
            raise CheckpointError(f"config.json has {key} = {value:,}, more than {MAX_LAYERS}", fix="restore the file")


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse sizes of our own configuration that no model has, before anything is built of that size.

    Raises:
        CheckpointError: one is too large, by name.
    """
    for key, value in _leaves(config):
        limit = MAX_SIZES.get(key, MAX_SIZE)
        if isinstance(value, int) and value > limit:
            raise CheckpointError(f"config.json gives {key} = {value:,}, more than {limit:,}", fix="restore the file")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no list or mapping, with the name it stands under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value
