"""What makes a step's folder whole: the list of its files with size and SHA-256, and the comparison with it.

Nothing here writes. The manifest also holds the hash of itself, so its own bytes are checked like all others.
A hash finds accidents; who can change the files can change the manifest too, and is stopped by the formats:
safetensors and JSON run no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError
from octavo.files import sha256_file

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
STEP_NAME = re.compile(r"step-(\d{8,})")
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file of a step's folder.

    Attributes:
        name: its name.
        size: its bytes on disk.
        problem: how it differs from what was saved; empty if it does not.
        seconds: what reading it took, 0 if it was not read.
    """

    name: str
    size: int
    problem: str = ""
    seconds: float = 0.0


def build(step: int, run_id: str, files: Mapping[str, tuple[int, str]]) -> bytes:
    """The manifest of ``files``: name -> (size in bytes, SHA-256 in hexadecimal)."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "run_id": run_id,
        "files": {name: {"size": size, "sha256": sha256} for name, (size, sha256) in sorted(files.items())},
    }
    text = json.dumps(body, indent=1)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-2]},\n "sha256": "{sha256}"\n}}\n'.encode()


def read(path: Path) -> dict[str, Any]:
    """The manifest of the step in the folder ``path``: its bytes must be exactly what ``build`` makes.

    Raises:
        CheckpointError: ``manifest.json: `` and what is wrong with it.
    """
    try:
        file = os.path.join(path, MANIFEST)
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise CheckpointError(f"{MANIFEST}: not a plain file")
        with open(file, "rb") as opened:
            data = opened.read()
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: cannot be read ({error.strerror})") from None
    try:
        manifest = json.loads(data)
        version, step, run_id = manifest["format"], manifest["step"], manifest["run_id"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        sound = version != FORMAT or data == build(step, run_id, files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{MANIFEST}: its own sha256 differs")
    if version != FORMAT:
        raise CheckpointError(f"{MANIFEST}: format {version!r} where this Octavo reads {FORMAT}: newer, or damaged")
    if STATE not in files or not all(PLAIN_NAME.fullmatch(name) and name != MANIFEST for name in files):
        raise CheckpointError(f"{MANIFEST}: lists files that no checkpoint has")
    named = STEP_NAME.match(path.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{MANIFEST}: belongs to step {step}")
    return dict(manifest)


def compare_sizes(path: Path, manifest: Mapping[str, Any]) -> list[FileCheck]:
    """Each file the folder should have or has, the manifest first, compared by name, kind and size only."""
    try:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path)}
    except OSError as error:
        return [FileCheck(MANIFEST, 0, f"its folder cannot be listed ({error.strerror})")]
    checks = [FileCheck(MANIFEST, found[MANIFEST].st_size) if MANIFEST in found else FileCheck(MANIFEST, 0, "missing")]
    for name, expected in manifest["files"].items():
        status = found.get(name)
        if status is None:
            checks.append(FileCheck(name, 0, "missing"))
        elif not stat.S_ISREG(status.st_mode):
            checks.append(FileCheck(name, 0, "not a plain file"))
        elif status.st_size != expected["size"]:
            checks.append(FileCheck(name, status.st_size, f"{status.st_size} bytes, should be {expected['size']}"))
        else:
            checks.append(FileCheck(name, status.st_size))
    extra = sorted(found.keys() - manifest["files"].keys() - {MANIFEST})
    return checks + [FileCheck(name, found[name].st_size, "extra file") for name in extra]


def check(path: str | os.PathLike[str]) -> list[FileCheck]:
    """Every file of a step's folder, the manifest first, each byte read and compared with what was saved.

    A manifest that is not sound is the only entry: what the other files should be is not known then.
    """
    path = Path(path)
    try:
        manifest = read(path)
    except CheckpointError as error:
        name, _, problem = error.what.partition(": ")
        return [FileCheck(name, 0, problem)]
    files = manifest["files"]
    return [
        _compare_bytes(path, found, files[found.name]["sha256"]) if found.name in files and not found.problem else found
        for found in compare_sizes(path, manifest)
    ]


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Every problem of a step's folder, each naming the file; empty when all bytes are as written."""
    return [f"{found.name}: {found.problem}" for found in check(path) if found.problem]


def _compare_bytes(path: Path, found: FileCheck, sha256: str) -> FileCheck:
    began = time.perf_counter()
    try:
        problem = "" if sha256_file(os.path.join(path, found.name)) == sha256 else "sha256 differs"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    return FileCheck(found.name, found.size, problem, time.perf_counter() - began)
