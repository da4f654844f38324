"""What a path given for a checkpoint is: a step, a folder of steps, a run; or none, and then which other thing."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from pathlib import Path

from octavo.errors import CheckpointError
from octavo.training.manifest import MANIFEST, STATE, STEP_NAME

PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
WEB_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def find_steps(path: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """The single steps and the folders of steps meant by ``path``: a step, such a folder, a stage or a run.

    Raises:
        CheckpointError: it is none of these.
    """
    refuse_foreign(path)
    path = Path(path)
    if is_step(path):
        return [path], []
    folders = [path] if _holds_steps(path) else []
    for place in (path, *sorted(path.iterdir())):
        if place.is_dir() and _holds_steps(place / "checkpoints"):
            folders.append(place / "checkpoints")
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint", fix=names_like(path))
    return [], folders


def is_step(path: Path) -> bool:
    return bool(STEP_NAME.match(path.name)) or all((path / name).exists() for name in (MANIFEST, STATE))


def _holds_steps(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(STEP_NAME.match(entry.name) for entry in path.iterdir())
    return False


def refuse_foreign(given: str | os.PathLike[str]) -> None:
    """Say what a path is that is no folder with something in it.

    Raises:
        CheckpointError: it is a web address, does not exist, is a file, is empty, or holds pickled weights.
    """
    path = Path(given)
    if WEB_ADDRESS.match(os.fspath(given)):
        raise CheckpointError(f"{given} is a web address, not a folder", fix="download it and give the folder")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", fix=names_like(path))
    if path.is_dir() and not any(path.iterdir()):
        raise CheckpointError(f"{path} is an empty folder", fix=names_like(path))
    for file in sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]:
        if file.suffix in PICKLE_SUFFIXES or _starts_like_pickle(file):
            raise CheckpointError(
                f"{file} is a pickle, and unpickling can run code; only safetensors are read",
                fix=f"octavo convert --from-pickle {file} FOLDER makes a model safetensors, in a process with limits",
                kept="it was not opened as a pickle",
            )
    if not path.is_dir():
        fix = f"give its folder: {path.parent}" if is_step(path.parent) else names_like(path)
        raise CheckpointError(f"{path} is a file, not the folder of a step", fix=fix)


def names_like(path: Path) -> str:
    """The three steps, folders of steps or runs nearby whose names are nearest, as a question."""
    found: dict[str, str] = {}
    for place in (path.parent, path.parent.parent, Path("runs")):
        with contextlib.suppress(OSError):
            for entry in sorted(place.iterdir(), reverse=True):
                known = is_step(entry) or _holds_steps(entry) or (entry / "recipe.yaml").is_file()
                if entry.is_dir() and entry != path and known and ".tmp-" not in entry.name:
                    found.setdefault(entry.name, str(entry))
    nearest = difflib.get_close_matches(path.name, found, n=3, cutoff=0.3) or list(found)[:3]
    if not nearest:
        return "give a run, its checkpoints folder, or the folder of a step such as step-00000100"
    return "did you mean " + ", ".join(f"`{found[name]}`" for name in nearest) + "?"


def _starts_like_pickle(file: Path) -> bool:
    """Pickle protocol 2 and later, or the zip archive torch.save puts one in."""
    if file.suffix in (".safetensors", ".json"):  # a header of 640 bytes begins like a pickle
        return False
    try:
        with open(file, "rb") as opened:
            return opened.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
    except OSError:
        return False
