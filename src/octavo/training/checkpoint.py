"""Training state on disk: a folder per step that is either whole and verified, or is not used.

A step is written to ``step-N.tmp-RUN/``, each file forced to disk, ``manifest.json`` (size and SHA-256
of every file, and of itself) last, read back, then renamed to ``step-N/``. Older steps go only after
that. So a kill or a power cut at any moment leaves a step that verifies, if there ever was one, and a
damaged byte anywhere is found before it reaches a weight. Tensors are safetensors, the rest is JSON:
nothing is ever unpickled.

``save``, ``recover`` and ``clear_leftovers`` change the folder: only the owner of the run's lock may
call them. ``newest``, ``verify`` and ``load`` only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError, ResourceError
from octavo.files import fsync_path, make_folder, sha256_file, write_durable
from octavo.training import tensor_file

if TYPE_CHECKING:
    import torch

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SPARE_FRACTION = 0.1
STEP_NAME = re.compile(r"step-(\d{8,})")
ASIDE_NAME = re.compile(r"(step-\d{8,})\.tmp-[\w-]+")
PLAIN_NAME = re.compile(r"[\w-][\w.-]*")
PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True)
class Checkpoint:
    """A verified step.

    Attributes:
        path: its folder.
        step: optimizer steps done when it was saved.
        run_id: the process that saved it.
        notices: one line for each newer step that had to be passed over: which file, steps lost.
        damaged: the folders those lines speak of.
    """

    path: Path
    step: int
    run_id: str
    notices: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()


# ---------------------------------------------------------------------------------------------- save


def save(
    folder: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    run_id: str,
    keep: int = 2,
) -> Path:
    """Write one step, verify it, then let older ones go.

    Args:
        folder: the ``checkpoints`` folder; made if it is missing.
        step: optimizer steps done.
        tensors: weights and optimizer state. The part of a name before the first ``/`` names the file:
            ``model/blocks.0.norm.weight`` goes to ``model.safetensors``; without one, ``training.safetensors``.
        state: everything else, as JSON: random states, the loader's cursor, counters.
        run_id: letters, digits, ``-`` and ``_``; tells this process's unfinished folder from another's.
        keep: steps to leave, this one included, at least 1.

    Returns:
        The step's folder.

    Raises:
        ResourceError: no room, or the disk refused; what was there before is untouched.
    """
    if keep < 1 or not re.fullmatch(r"[\w-]+", run_id):
        raise ValueError(f"keep = {keep} must be at least 1 and run_id = {run_id!r} letters, digits, - and _")
    folder = Path(folder)
    name = f"step-{step:08d}"
    final, aside = folder / name, folder / f"{name}.tmp-{run_id}"
    groups = _by_file(tensors)
    state_bytes = json.dumps(dict(state), indent=1).encode() + b"\n"
    replaced = None
    try:
        make_folder(folder)
        _require_room(folder, len(state_bytes) + sum(map(tensor_file.size_bytes, groups.values())))
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir()
        files = {file: tensor_file.write(aside / file, group) for file, group in groups.items()}
        write_durable(aside / STATE, state_bytes)
        files[STATE] = (len(state_bytes), hashlib.sha256(state_bytes).hexdigest())
        write_durable(aside / MANIFEST, _manifest(step, run_id, files))
        fsync_path(aside)
        if problems := verify(aside):
            raise ResourceError(
                f"{name} reads back other bytes than were written: {'; '.join(problems)}",
                fix="check the disk, or put the run on another one",
                kept=_kept(folder),
            )
        if final.exists():
            replaced = _set_aside(final)
        os.rename(aside, final)
        fsync_path(folder)
    except BaseException as error:
        # Nothing of an unfinished step may stay: on a full disk it would take the room of the next try.
        shutil.rmtree(aside, ignore_errors=True)
        if replaced and not final.exists():
            os.rename(replaced, final)
        if isinstance(error, OSError):
            raise ResourceError(
                f"{name} could not be saved in {folder}: {error.strerror or error}",
                fix="make room or mend the disk; the same command goes on from the last saved step",
                kept=_kept(folder),
            ) from error
        raise
    # A folder that cannot be removed is no reason to call a saved step unsaved.
    with contextlib.suppress(OSError):
        if replaced:
            _remove(replaced)
        _rotate(folder, step, keep)
    return final


def _by_file(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        prefix = name.partition("/")[0] if "/" in name else "training"
        if not PLAIN_NAME.fullmatch(prefix):
            raise ValueError(f"tensor name {name!r}: {prefix!r} cannot name a file")
        groups.setdefault(f"{prefix}.safetensors", {})[name] = tensor
    return groups


def _manifest(step: int, run_id: str, files: Mapping[str, tuple[int, str]]) -> bytes:
    body: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "run_id": run_id,
        "files": {name: {"size": size, "sha256": sha256} for name, (size, sha256) in sorted(files.items())},
    }
    body["sha256"] = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps(body, indent=1).encode() + b"\n"


def _require_room(folder: Path, need_bytes: int) -> None:
    need_bytes = int(need_bytes * (1 + SPARE_FRACTION))
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise ResourceError(
            f"a checkpoint needs {need_bytes:,} bytes and the disk of {folder} has {free_bytes:,} free",
            fix=f"free {need_bytes - free_bytes:,} bytes, or put the run on another disk",
            kept=_kept(folder),
        )


def _kept(folder: Path) -> str:
    steps = _steps(folder)
    return str(steps[0][1]) if steps else "no step was saved yet"


def _rotate(folder: Path, step: int, keep: int) -> None:
    """Remove all but ``step`` and the ``keep - 1`` before it.

    Later steps belong to a line of training that was given up (a damaged step, a rollback): left here,
    the next start would jump back onto it.
    """
    earlier = [path for number, path in _steps(folder) if number < step]
    later = [path for number, path in _steps(folder) if number > step]
    for path in (*later, *earlier[keep - 1 :], *folder.glob("damaged-*")):
        _remove(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Rename first, so that a kill while files are being removed leaves no half step under a step's name."""
    aside = path.with_name(f"drop.tmp-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---------------------------------------------------------------------------------------- read, check


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Every problem of a step's folder, each naming the file; empty when all bytes are as written."""
    path = Path(path)
    try:
        manifest = _read_manifest(path)
    except CheckpointError as error:
        return [error.what]
    problems = _compare_names(path, manifest)
    named = {problem.partition(": ")[0] for problem in problems}
    for name, entry in manifest["files"].items():
        if name in named:
            continue
        try:
            sha256 = sha256_file(path / name)
        except OSError as error:
            problems.append(f"{name}: cannot be read ({error.strerror})")
            continue
        if sha256 != entry["sha256"]:
            problems.append(f"{name}: sha256 differs")
    return problems


def load(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (CPU, memory of their own) and the state of a step; each byte is hashed as it is read.

    Raises:
        CheckpointError: not a checkpoint, or any byte of it differs from what was saved.
    """
    path = Path(path)
    _refuse_foreign(path)
    fix = "load another step, or restore this one from a copy"
    try:
        manifest = _read_manifest(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}/{error.what}", fix=fix) from None
    if problems := _compare_names(path, manifest):
        raise CheckpointError(f"{path}/{'; '.join(problems)}", fix=fix)
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}
    for name, entry in manifest["files"].items():
        try:
            if name == STATE:
                data = (path / name).read_bytes()
                size, sha256 = len(data), hashlib.sha256(data).hexdigest()
            else:
                part, size, sha256 = tensor_file.read(path / name)
                tensors.update(part)
        except OSError as error:
            raise CheckpointError(f"{path}/{name}: cannot be read ({error.strerror})", fix=fix) from None
        if (size, sha256) != (entry["size"], entry["sha256"]):
            raise CheckpointError(f"{path}/{name}: sha256 differs", fix=fix)
        if name == STATE:
            state = json.loads(data)
    return tensors, state


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, whose own bytes are checked: they must be exactly what ``_manifest`` writes."""
    try:
        data = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST}: cannot be read ({error.strerror})") from None
    try:
        manifest = json.loads(data)
        version, step, run_id = manifest["format"], manifest["step"], manifest["run_id"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        sound = version != FORMAT or data == _manifest(step, run_id, files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{MANIFEST}: its own sha256 differs")
    if version != FORMAT:
        raise CheckpointError(f"{MANIFEST}: format {version!r}, this Octavo reads format {FORMAT}")
    if STATE not in files or not all(PLAIN_NAME.fullmatch(name) and name != MANIFEST for name in files):
        raise CheckpointError(f"{MANIFEST}: lists files that no checkpoint has")
    named = STEP_NAME.match(path.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{MANIFEST}: belongs to step {step}")
    return dict(manifest)


def _compare_names(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    try:
        entries = {entry.name: entry for entry in os.scandir(path)}
    except OSError as error:
        return [f"{path.name}: cannot be listed ({error.strerror})"]
    for name, expected in manifest["files"].items():
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name}: missing")
        elif not entry.is_file(follow_symlinks=False):
            problems.append(f"{name}: not a plain file")
        elif (size := (path / name).stat().st_size) != expected["size"]:
            problems.append(f"{name}: {size} bytes, should be {expected['size']}")
    extra = sorted(entries.keys() - manifest["files"].keys() - {MANIFEST})
    return problems + [f"{name}: extra file" for name in extra]


def _refuse_foreign(path: Path) -> None:
    """Say what a path that is no checkpoint folder is.

    Raises:
        CheckpointError: it does not exist, is a file, or holds pickled weights.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", fix="give the folder of a step, such as step-00000100")
    pickles = [path] if path.is_file() else [entry for entry in path.iterdir() if entry.is_file()]
    for file in pickles:
        if file.suffix in PICKLE_SUFFIXES or _starts_like_pickle(file):
            raise CheckpointError(
                f"{file} is a pickle, and unpickling can run code; only safetensors are read",
                fix="write it as .safetensors with the program that made it",
            )
    if path.is_file():
        raise CheckpointError(f"{path} is a file, not the folder of a step", fix=f"give its folder: {path.parent}")


def _starts_like_pickle(file: Path) -> bool:
    """Pickle protocol 2 and later, or the zip archive torch.save puts one in."""
    if file.suffix in (".safetensors", ".json"):  # a header of 640 bytes begins like a pickle
        return False
    try:
        with open(file, "rb") as opened:
            return opened.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
    except OSError:
        return False


# --------------------------------------------------------------------------------------------- choose


def newest(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest step that verifies; ``None`` when nothing was ever saved. Changes nothing.

    Raises:
        CheckpointError: there is something, but no step of it verifies: starting at step 0 would throw
            work away without a word.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    if folder.is_file():
        _refuse_foreign(folder)
    steps = _steps(folder)
    failures: list[tuple[int, Path, str]] = []
    for step, path in steps:
        problems = verify(path)
        if not problems:
            manifest = _read_manifest(path)
            notices = tuple(
                f"warning[CHECKPOINT]: {bad.name}/{why}. Going on from {path.name} ({number - step} steps lost)."
                for number, bad, why in failures
            )
            return Checkpoint(path, step, manifest["run_id"], notices, tuple(bad for _, bad, _ in failures))
        failures.append((step, path, "; ".join(problems)))
    others = sorted(entry.name for entry in folder.iterdir() if ".tmp-" not in entry.name and entry.name[0] != ".")
    if not others:
        return None
    if not steps:
        _refuse_foreign(folder)
    found = [f"{path.name}/{problem}" for _, path, problem in failures] or [f"it holds {', '.join(others)}"]
    raise CheckpointError(
        f"{folder} has no step that verifies: {'; '.join(found)}",
        fix="restore a step from a copy, or start in a new run folder",
        kept="nothing was removed",
    )


def recover(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """What the lock's owner calls at start: clear leftovers, take the newest step, move damaged ones out.

    A damaged step is renamed to ``damaged-step-N`` and goes when the next step is saved and verified;
    under its own name it would count as one of the steps to keep.

    Raises:
        CheckpointError: as ``newest``.
    """
    folder = Path(folder)
    clear_leftovers(folder)
    found = newest(folder)
    for path in found.damaged if found else ():
        os.rename(path, path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}"))
    return found


def clear_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed save left; if it was whole and only the rename was missing, finish it."""
    folder = Path(folder)
    for entry in sorted(folder.glob("*.tmp-*")):
        match = ASIDE_NAME.fullmatch(entry.name)
        if match and not verify(entry):
            final = folder / match[1]
            if not final.exists() or verify(final):
                if final.exists():
                    _remove(_set_aside(final))
                for path in (*entry.iterdir(), entry):  # the killed process may not have come to do it
                    fsync_path(path)
                os.rename(entry, final)
                fsync_path(folder)
                continue
        _remove(entry)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Every entry named like a step, the latest first, sound or not."""
    if not folder.is_dir():
        return []
    matches = [(STEP_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return sorted(((int(match[1]), entry) for match, entry in matches if match), reverse=True)
