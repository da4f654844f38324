"""Weights from files of ``torch.save``: the only place that unpickles, in a child process with limits.

Pickle is a program. torch's ``weights_only`` reader runs only the few steps that build tensors; should it have a hole,
or the file ask for the memory of the world, it happens in a process that holds nothing, may not grow or run long, and
hands back a safetensors file and a JSON text, which are then read like any other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError
from octavo.hub.formats import Foreign
from octavo.hub.limits import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.tokenizer import Tokenizer

MAX_PROGRAM_BYTES = 64 << 20  # of the pickle itself, without the numbers
MAX_ENTRIES = 1 << 20
BASE_MEMORY_BYTES = 4 << 30  # address space: importing torch takes 0.6 GiB of it, a build for GPUs some more
BASE_SECONDS, BYTES_PER_SECOND = 60, 20 << 20
MAX_VALUES = 1 << 20
SKIPPED = ("optimizer",)  # never of use in a converted model, and twice as large
TENSORS, TREE = "tensors.safetensors", "tree.json"
PICKLED_MODEL = "pytorch_model.bin"


def read(path: Path, tokenizer: Tokenizer | None = None) -> Foreign:
    """The model of a nanoGPT or nanochat checkpoint, or of a Hugging Face folder with pytorch_model.bin.

    Raises:
        CheckpointError: something else, damaged, or without a tokenizer.
    """
    from octavo.hub import nanochat, nanogpt

    if path.is_dir():
        return _read_folder(path, tokenizer)
    tree, tensors = unpickle(path)
    if nanogpt.recognises(tree):
        return nanogpt.read(path, tree, tensors, tokenizer)
    if nanochat.recognises(tensors):
        return nanochat.read(path, tensors, tokenizer)
    if (path.parent / "config.json").is_file():
        return _read_folder(path.parent, tokenizer)
    raise CheckpointError(
        f"{path} holds weights of no known kind",
        fix="give a nanoGPT or nanochat checkpoint, or a folder with config.json",
    )


def _read_folder(folder: Path, tokenizer: Tokenizer | None) -> Foreign:
    from octavo.tokenizer import Tokenizer

    config, index = read_json(folder / "config.json"), folder / f"{PICKLED_MODEL}.index.json"
    try:
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [PICKLED_MODEL]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}", fix="fetch it again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / 'config.json'} names no model_type", fix="fetch it again")
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index} points outside its folder: {outside[0]!r}", fix="do not use it")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= unpickle(folder / name)[1]
    return Foreign(config, tensors, tokenizer or Tokenizer.load(folder))


def unpickle(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of ``torch.save`` holds: its plain values, nested as they are, and its tensors by path (``a/b``).

    Raises:
        CheckpointError: it is damaged, holds more than weights, or needs more memory or time than its size explains.
    """
    from safetensors.torch import load_file

    check_archive(path)
    with tempfile.TemporaryDirectory(prefix="octavo-pickle-") as folder:
        _run_child(path, Path(folder))
        tree = json.loads((Path(folder) / TREE).read_text(encoding="utf-8"))
        return tree, load_file(Path(folder) / TENSORS)


def check_archive(path: Path) -> None:
    """Refuse what cannot be honest before anything reads it.

    Raises:
        CheckpointError: not the archive that torch writes since version 1.6, or it unpacks to more than itself.
    """
    fix = "save it again with torch.save where it comes from"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        what = f"{path} is damaged, or older than torch 1.6" if path.is_file() else f"{path} is not a file"
        raise CheckpointError(what, fix=fix) from None
    programs = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    total = sum(entry.file_size for entry in entries)
    if (
        len(programs) != 1
        or len(entries) > MAX_ENTRIES
        or programs[0].file_size > MAX_PROGRAM_BYTES
        or total > path.stat().st_size
        or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    ):
        raise CheckpointError(f"{path} is not an archive that torch.save writes", fix=fix)


def _run_child(path: Path, folder: Path) -> None:
    size = path.stat().st_size
    memory, seconds = BASE_MEMORY_BYTES + 4 * size, BASE_SECONDS + size // BYTES_PER_SECOND
    source = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, "PYTHONPATH": os.pathsep.join([source, *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "octavo.hub.pickled", str(path.resolve()), str(folder), str(memory), str(seconds)]
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * seconds
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{path} took longer than {2 * seconds} s to read", fix="do not use it") from None
    if done.returncode == 0:
        return
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    said = json.loads(lines[-1])["error"] if done.returncode == 3 and lines else ""
    if not said:
        why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        said = f"reading it was ended by {why}; it asks for more memory or time than its size explains"
    raise refused(path, said)


def refused(path: Path, said: str) -> CheckpointError:
    """The error for what the child says of a file."""
    return CheckpointError(f"{path}: {said}", fix="do not use it, or ask its author for safetensors")


# ------------------------------------------------------------------------------------------- the child


def main(source: str, folder: str, memory: str, seconds: str) -> int:
    """Read ``source`` under limits and write what it holds to ``folder``; the last line printed says what failed."""
    import resource

    size = os.path.getsize(source)
    limits = {
        resource.RLIMIT_AS: int(memory),
        resource.RLIMIT_CPU: int(seconds),
        resource.RLIMIT_FSIZE: 2 * size + (64 << 20),
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    try:
        _convert(source, folder, 2 * size)
    except Exception as error:
        print(json.dumps({"error": _explain(error)}))
        return 3
    return 0


def _convert(source: str, folder: str, max_bytes: int) -> None:
    import torch
    from safetensors.torch import save_file

    loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    tree = {} if not isinstance(loaded, Mapping) else {k: v for k, v in loaded.items() if k not in SKIPPED}
    _count(tree, MAX_VALUES)
    for name, tensor in _tensors(tree):
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} is not a plain tensor")
        max_bytes -= tensor.numel() * tensor.element_size()
        if max_bytes < 0:
            raise ValueError("its tensors are larger than the file")
        # safetensors takes no two tensors of one memory, which is how torch saves tied weights.
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        form = torch.contiguous_format
        tensors[name] = tensor.detach().clone(memory_format=form) if shared else tensor.detach().contiguous()
    save_file(tensors, os.path.join(folder, TENSORS))
    with open(os.path.join(folder, TREE), "w", encoding="utf-8") as file:
        json.dump(_plain(tree), file)


def _count(value: Any, left: int) -> int:
    """How many values may still follow; one that is held in many places counts as often."""
    left -= 1
    if left < 0:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            left = _count(item, left)
    return left


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if hasattr(value, "untyped_storage"):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}/{key}" if path else str(key))


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and mappings; anything else is left out."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not hasattr(item, "untyped_storage")}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if not hasattr(item, "untyped_storage")]
    return value if isinstance(value, str | int | float | bool | None) else None


def _explain(error: Exception) -> str:
    text = " ".join(str(error).split())
    if match := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds more than weights: {match[1]}"
    if "Weights only load failed" in text:
        return "it holds more than weights, or is damaged"
    return f"it cannot be read: {text.partition('. ')[0][:200] or type(error).__name__}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
