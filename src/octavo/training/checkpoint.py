"""Training state on disk: a folder per step that is either whole and verified, or is not used.

A step is written to ``step-N.tmp-RUN/``, each file forced to disk, ``manifest.json`` (size and SHA-256
of every file, and of itself) last, read back, then renamed to ``step-N/``. Older steps go only after
that. So a kill or a power cut at any moment leaves a step that verifies, if there ever was one, and a
damaged byte anywhere is found before it reaches a weight. Tensors are safetensors, the rest is JSON:
nothing is ever unpickled.

``save``, ``recover`` and ``remove_all`` change the folder: only the owner of the run's lock may call
them. ``newest``, ``verify`` and ``load`` only read. The moments at which tests kill or fail the saver
are in failpoint.py.
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
from octavo.failpoint import failpoint
from octavo.files import fsync_path, make_folder, write_durable
from octavo.training import manifest, tensor_file
from octavo.training.checkpoint_path import refuse_foreign
from octavo.training.manifest import MANIFEST, PLAIN_NAME, STATE, STEP_NAME, verify

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "load", "newest", "recover", "remove_all", "save", "verify"]

SPARE_FRACTION = 0.1
BLOCK_BYTES = 4096  # what the smallest file takes on most file systems
ASIDE_NAME = re.compile(r"step-(\d{8,})\.tmp-[\w-]+")


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
        failpoint("save.begin")
        make_folder(folder)
        _require_room(folder, [len(state_bytes), *map(tensor_file.size_bytes, groups.values())])
        if aside.exists():
            shutil.rmtree(aside)
        failpoint("save.mkdir")
        aside.mkdir()
        _write_files(aside, step, run_id, groups, state_bytes)
        failpoint("save.verify")
        _require_same_bytes(aside, name)
        if final.exists():
            failpoint("save.replace")
            replaced = _rename_aside(final, f"{name}.tmp-replaced")
        failpoint("save.rename")
        os.rename(aside, final)
        failpoint("save.fsync_parent")
        fsync_path(folder)
    except BaseException as error:
        # Nothing of an unfinished step may stay: on a full disk it would take the room of the next try.
        shutil.rmtree(aside, ignore_errors=True)
        if replaced and not final.exists():
            with contextlib.suppress(OSError):  # then the next start puts it back
                os.rename(replaced, final)
        if isinstance(error, OSError):
            raise _refused(f"{name} could not be saved in {folder}", folder, error) from error
        if isinstance(error, ResourceError):
            error.kept = _kept(folder)
        raise
    # What cannot be removed is no reason to call a saved step unsaved.
    with contextlib.suppress(OSError):
        failpoint("rotate.begin")
        # Also what an earlier save of this process could not remove; of other processes only a start clears.
        for pattern in ("drop.tmp-*", f"{name}.tmp-replaced-*", f"*.tmp-{run_id}"):
            for path in folder.glob(pattern):
                _remove(path)
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


def _require_room(folder: Path, file_bytes: list[int]) -> None:
    blocks = sum(-(-size // BLOCK_BYTES) for size in file_bytes) + 2  # and the manifest and the folder
    need_bytes = int(blocks * BLOCK_BYTES * (1 + SPARE_FRACTION))
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        raise ResourceError(
            f"a checkpoint needs {need_bytes:,} bytes and the disk of {folder} has {free_bytes:,} free",
            fix=f"free {need_bytes - free_bytes:,} bytes, or put the run on another disk",
        )


def _write_files(
    aside: Path, step: int, run_id: str, groups: Mapping[str, Mapping[str, torch.Tensor]], state_bytes: bytes
) -> None:
    """All on disk on return; the manifest comes last, so that where there is one the rest is whole."""
    files = {name: tensor_file.write(aside / name, group) for name, group in groups.items()}
    failpoint("save.state")
    write_durable(aside / STATE, state_bytes)
    files[STATE] = (len(state_bytes), hashlib.sha256(state_bytes).hexdigest())
    failpoint("save.manifest")
    write_durable(aside / MANIFEST, manifest.build(step, run_id, files))
    failpoint("save.fsync_folder")
    fsync_path(aside)


def _require_same_bytes(aside: Path, name: str) -> None:
    if problems := verify(aside):
        raise ResourceError(
            f"{name} reads back other bytes than were written: {'; '.join(problems)}",
            fix="check the disk, or put the run on another one",
        )


def _refused(what: str, folder: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{what}: {error.strerror or error}",
        fix="make room or mend the disk; the same command goes on from the last saved step",
        kept=_kept(folder),
    )


def _kept(folder: Path) -> str:
    try:
        steps = _steps(folder)
    except OSError:
        return "what was saved before"
    return str(steps[0][1]) if steps else "no step was saved yet"


# -------------------------------------------------------------------------------------------- remove


def _rotate(folder: Path, step: int, keep: int) -> None:
    """Remove all but ``step``, which was just verified, and the ``keep - 1`` whole ones before it.

    Later steps belong to a line of training that was given up (a damaged step, a rollback): left here,
    the next start would jump back onto it. Earlier ones count as kept only if all their files are there
    in their sizes: hashing them at every save would cost more than saving.
    """
    earlier = [path for number, path in _steps(folder) if number < step]
    later = [path for number, path in _steps(folder) if number > step]
    kept = [path for path in earlier if _looks_whole(path)][: keep - 1]
    spare = [path for path in earlier if path not in kept] if len(kept) == keep - 1 else []
    for path in later:
        _discard(path)
    if later:
        fsync_path(folder)
    for path in (*spare, *folder.glob("damaged-*")):
        _discard(path)


def _looks_whole(path: Path) -> bool:
    try:
        return not any(found.problem for found in manifest.compare_sizes(path, manifest.read(path)))
    except CheckpointError:
        return False


def _discard(path: Path) -> None:
    """Rename first, so that a kill while files are being removed leaves no half step under a step's name."""
    with contextlib.suppress(OSError):
        _remove(_rename_aside(path, f"drop.tmp-{path.name}"))


def _rename_aside(path: Path, name: str) -> Path:
    aside = path.with_name(f"{name}-{secrets.token_hex(4)}")
    failpoint("rotate.rename")
    os.rename(path, aside)
    return aside


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        for entry in path.iterdir():
            failpoint("remove.file")
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        failpoint("remove.folder")
        path.rmdir()


def remove_all(folder: str | os.PathLike[str]) -> None:
    """Give up all that was saved: each step goes as a whole, so that a kill between leaves only whole ones."""
    for entry in sorted(Path(folder).iterdir()):
        _discard(entry)


# ---------------------------------------------------------------------------------------------- read


def load(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (CPU, memory of their own) and the state of a step; each byte is hashed as it is read.

    Raises:
        CheckpointError: not a checkpoint, or any byte of it differs from what was saved.
    """
    refuse_foreign(path)
    path = Path(path)
    try:
        listed = manifest.read(path)
    except CheckpointError as error:
        raise _unsound(path, error.what) from None
    sizes = manifest.compare_sizes(path, listed)
    if problems := [f"{found.name}: {found.problem}" for found in sizes if found.problem]:
        raise _unsound(path, "; ".join(problems))
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}
    for name, entry in listed["files"].items():
        try:
            if name == STATE:
                data = (path / name).read_bytes()
                size, sha256 = len(data), hashlib.sha256(data).hexdigest()
            else:
                part, size, sha256 = tensor_file.read(path / name)
                tensors.update(part)
        except OSError as error:
            raise _unsound(path, f"{name}: cannot be read ({error.strerror})") from None
        if (size, sha256) != (entry["size"], entry["sha256"]):
            raise _unsound(path, f"{name}: sha256 differs")
        if name == STATE:
            state = _parse_state(data, path)
    return tensors, state


def _parse_state(data: bytes, path: Path) -> dict[str, Any]:
    """The state in a file whose hash is right: what was made wrong with a right hash must not get further either."""
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unsound(path, f"{STATE}: not JSON ({error})") from None
    if not isinstance(state, dict):
        raise _unsound(path, f"{STATE}: no JSON object")
    return state


def _unsound(path: Path, problem: str) -> CheckpointError:
    fix = "load another step, or restore this one from a copy"
    return CheckpointError(f"{path}/{problem}", fix=fix, kept="nothing was changed")


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
        refuse_foreign(folder)
    steps: list[tuple[int, Path]] = []
    failures: list[tuple[int, Path, str]] = []
    for _ in range(10):  # a training that is under way may remove what was just listed
        # While the only step is being replaced by another of its number, both lie aside for a moment.
        steps = _steps(folder) or _steps(folder, ASIDE_NAME)
        failures = []
        for step, path in steps:
            problems = verify(path)
            if not problems:
                return _chosen(path, step, failures)
            failures.append((step, path, "; ".join(problems)))
        if steps == (_steps(folder) or _steps(folder, ASIDE_NAME)):
            break
    others = sorted(entry.name for entry in folder.iterdir() if ".tmp-" not in entry.name and entry.name[0] != ".")
    if not others:
        return None
    if not failures:
        refuse_foreign(folder)
    found = [f"{path.name}/{problem}" for _, path, problem in failures] or [f"it holds {', '.join(others)}"]
    raise CheckpointError(
        f"{folder} has no step that verifies: {'; '.join(found)}",
        fix="restore a step from a copy, or start in a new run folder",
        kept="nothing was removed",
    )


def _chosen(path: Path, step: int, failures: list[tuple[int, Path, str]]) -> Checkpoint:
    notices = tuple(
        f"warning[CHECKPOINT]: {bad}/{why}. Fix: {path.name} is used instead ({number - step} steps lost)."
        f" Kept: {path.name}, every byte verified."
        for number, bad, why in failures
    )
    return Checkpoint(path, step, manifest.read(path)["run_id"], notices, tuple(bad for _, bad, _ in failures))


def recover(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """What the lock's owner calls at start: clear leftovers, take the newest step, move damaged ones out.

    A damaged step is renamed to ``damaged-step-N`` and goes when the next step is saved and verified;
    under its own name it would count as one of the steps to keep.

    Raises:
        CheckpointError: as ``newest``.
        ResourceError: the disk refused.
    """
    folder = Path(folder)
    try:
        if folder.is_dir():  # a killed process may have renamed a step and not come to force its name to disk
            fsync_path(folder)
            fsync_path(folder.parent)
            _clear_leftovers(folder)
        found = newest(folder)
        for path in found.damaged if found else ():
            failpoint("recover.damaged")
            os.rename(path, path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}"))
    except OSError as error:
        raise _refused(f"the steps in {folder} cannot be cleared of what a killed save left", folder, error) from error
    return found


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed save left; if it was whole and only the rename was missing, finish it."""
    for entry in sorted(folder.glob("*.tmp-*")):
        failpoint("recover.leftover")
        match = ASIDE_NAME.fullmatch(entry.name)
        final = folder / f"step-{match[1]}" if match else entry
        if match is None or verify(entry) or (final.exists() and not verify(final)):
            _remove(entry)
            continue
        if final.exists():
            _discard(final)
        failpoint("recover.fsync")
        for path in (*entry.iterdir(), entry):  # the killed process may not have come to do it
            fsync_path(path)
        failpoint("recover.rename")
        os.rename(entry, final)
        fsync_path(folder)


def _steps(folder: Path, pattern: re.Pattern[str] = STEP_NAME) -> list[tuple[int, Path]]:
    """Every entry named like a step, the latest first, sound or not."""
    if not folder.is_dir():
        return []
    matches = [(pattern.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return sorted(((int(match[1]), entry) for match, entry in matches if match), reverse=True)
