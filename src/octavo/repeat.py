"""Steps of a run done again, beside it: to prove that they come out the same, or to see where a NaN began.

Nothing here writes to the run or waits for its lock.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo import pipeline
from octavo.config import Recipe
from octavo.errors import CheckpointError, ConfigError
from octavo.launch import freeze
from octavo.metrics_file import read_metrics
from octavo.pipeline import Job, Ready
from octavo.run import RunFolder
from octavo.stop import StopSignal
from octavo.training import checkpoint
from octavo.training.loop import saved_steps
from octavo.training.machine import set_threads
from octavo.training.progress import Console
from octavo.training.replay import Replay, replay

TRAINED = ("tune", "pretrain")
TIMINGS = ("seconds", "tokens_per_second", "mfu")


@dataclass
class Proof:
    """Steps ``first`` to ``last`` of a stage, done again.

    Args:
        lines: of the log that were compared (losses, norms, rates, validation).
        tensors: weights and moments whose SHA-256 was compared.
        differences: what did not come out the same, the first first.
        changes: of the machine or the versions since the run's last start.
    """

    stage: str
    first: int
    last: int
    lines: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def prove(
    run: str | Path,
    *,
    stage: str | None = None,
    steps: int | None = None,
    from_start: bool = False,
    scratch: Path | None = None,
    console: Console | None = None,
) -> Proof:
    """Go from one checkpoint of a run to its newest again, and compare every logged figure and every tensor.

    Args:
        stage: ``pretrain`` or ``tune``; default: the later one that has checkpoints.
        steps: at least so many; default: from the checkpoint before the newest.
        from_start: from the first step, for which no checkpoint is needed.
        scratch: a folder to work in; default: the system's.

    Raises:
        CheckpointError: there is no checkpoint to begin with.
    """
    folder = _run_folder(run)
    stage = stage or next((name for name in TRAINED if saved_steps(folder.checkpoints_path(name))), "pretrain")
    found = saved_steps(folder.checkpoints_path(stage))
    if not found and "count" in folder.stages():
        raise ConfigError(f"{run} was counted: it has no steps to repeat", fix="count the text again in another folder")
    if not found:
        raise CheckpointError(f"{run} has no whole checkpoint of stage {stage}", fix="train until one is saved")
    last = _step(found[0])
    enough = [path for path in found[1:] if last - _step(path) >= (steps or 1)]
    if not enough and not from_start:
        held = ", ".join(str(_step(path)) for path in reversed(found))
        raise CheckpointError(
            f"{run} has checkpoints of step {held} and none far enough before the newest to begin with",
            fix=f"--from-start repeats all {last} steps; or go on with the run until there are two "
            "(keep_checkpoints, at least 2)",
        )
    start = None if from_start else enough[0]
    with _scratch(scratch) as place:
        ready, changes = _open(folder, stage, place, console)
        _copy_start(folder, stage, start, place)
        ready.trainer.held.sample = None
        proof = Proof(stage, _step(start) + 1 if start else 1, last, changes=changes)
        ready.trainer.fit(until=last)
        _compare_logs(folder.metrics_path(stage), place / "metrics.jsonl", proof)
        again = place / "checkpoints" / found[0].name
        ours, theirs = _hashes(found[0]), _hashes(again)
        proof.tensors = len(ours)
        differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if differ:
            proof.differences.append(f"{len(differ)} of {len(ours)} tensors at step {last}, first {differ[0]}")
    return proof


def replay_step(
    run: str | Path,
    step: int | None = None,
    *,
    stage: str | None = None,
    from_checkpoint: bool = False,
    scratch: Path | None = None,
    console: Console | None = None,
) -> tuple[Replay, list[str]]:
    """Compute a step again that could not be taken (``nan/step-N``), or any other that a checkpoint lies before.

    Args:
        step: optimizer steps done before it; default: the last one that was kept.
        from_checkpoint: begin with the checkpoint before it, not with the weights that were kept, and do the steps
            between again.

    Returns:
        What came out, and what changed of the machine or the versions since the run's last start.

    Raises:
        ConfigError: no such step.
    """
    folder = _run_folder(run)
    kept = {name: saved_steps(folder.path / name / "nan") for name in TRAINED if stage in (None, name)}
    found = {name: path for name, paths in kept.items() if (path := _choose(paths, step)) is not None}
    if not found and step is None:
        raise ConfigError(f"{run} has no step that could not be taken", fix="give the number of a step to look at it")
    trained = next((name for name in TRAINED if saved_steps(folder.checkpoints_path(name))), "pretrain")
    stage = stage or next(iter(found), trained)
    path = found.get(stage)
    number = _step(path) if path else int(step or 0)
    with _scratch(scratch) as place:
        ready, changes = _open(folder, stage, place, console)
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {"step": number, "seed": ready.trainer.seed, "updates": 0}
        if path is not None:
            tensors, state = checkpoint.load(path)
        if path is None or from_checkpoint:
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("batch/")}
            tensors |= _weights_at(folder, stage, number, ready, place)
            # The first one gave its buffers back when it was done.
            ready, _ = _open(folder, stage, place, console)
        if path is None:
            import torch

            arrays = ready.rows.source.batch(number)
            tensors |= {f"batch/{name}": torch.from_numpy(array) for name, array in arrays.items()}
            state |= _logged(folder.metrics_path(stage), number + 1)
        return replay(ready.trainer, tensors, state), changes


# ----------------------------------------------------------------------------------------------- parts


def _run_folder(run: str | Path) -> RunFolder:
    folder = RunFolder(run)
    if not folder.recipe_path.is_file():
        raise ConfigError(
            f"{run} is not the folder of a run: it has no recipe.yaml", fix="give a folder such as runs/NAME"
        )
    return folder


@contextmanager
def _scratch(place: Path | None) -> Iterator[Path]:
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="octavo-repeat-", dir=place) as name:
        yield Path(name)


def _open(folder: RunFolder, stage: str, place: Path, console: Console | None) -> tuple[Ready, list[str]]:
    """The stage as the run's own recipe makes it, writing to ``place``; what changed of the machine."""
    recipe, _ = freeze(Recipe.load(folder.recipe_path), folder.read_recipe())
    section = recipe.train if stage == "pretrain" else recipe.tune
    threads = section.threads if section else None
    if threads:
        set_threads(threads)
    job = Job(recipe, folder, console or Console("quiet"), StopSignal())
    return pipeline.ready(job, stage, place), folder.environment_changes(threads)


def _copy_start(folder: RunFolder, stage: str, start: Path | None, place: Path) -> None:
    """What a stage finds that goes on from ``start``: that checkpoint, and the log as far as it knew of it."""
    if start is None:
        return
    shutil.copytree(start, place / "checkpoints" / start.name)
    known = json.loads((start / "state.json").read_text(encoding="utf-8"))["metrics"]["bytes"]
    with open(folder.metrics_path(stage), "rb") as file:
        (place / "metrics.jsonl").write_bytes(file.read(known))


def _compare_logs(log: Path, again: Path, proof: Proof) -> None:
    def figures(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
        return {
            (record["kind"], record["step"]): {key: _bits(value) for key, value in record.items() if key not in TIMINGS}
            for record in read_metrics(path)
            if record["kind"] in ("train", "valid") and proof.first <= record["step"] <= proof.last
        }

    then, now = figures(log), figures(again)
    proof.lines = len(then)
    for key in sorted(then.keys() | now.keys(), key=lambda key: (key[1], key[0])):
        a, b = then.get(key, {}), now.get(key, {})
        if wrong := [
            f"{name} {a.get(name)} then, {b.get(name)} now" for name in {**a, **b} if a.get(name) != b.get(name)
        ]:
            proof.differences.append(f"{key[0]} at step {key[1]}: {wrong[0]}")


def _bits(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def _hashes(path: Path) -> dict[str, str]:
    tensors, _ = checkpoint.load(path)
    return {name: hashlib.sha256(_bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _weights_at(folder: RunFolder, stage: str, step: int, ready: Ready, place: Path) -> dict[str, Tensor]:
    """The weights after ``step`` steps, from the newest checkpoint that is not later, else from the first step."""
    earlier = [path for path in saved_steps(folder.checkpoints_path(stage)) if _step(path) <= step]
    if earlier and _step(earlier[0]) == step:
        return _weights(checkpoint.load(earlier[0])[0])
    _copy_start(folder, stage, earlier[0] if earlier else None, place)
    ready.trainer.held.sample = None
    if not step:
        return {name: tensor.clone() for name, tensor in ready.trainer.optimizer.tensors() if name.startswith("model/")}
    ready.trainer.fit(until=step)
    return _weights(checkpoint.load(place / "checkpoints" / f"step-{step:08d}")[0])


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}


def _logged(log: Path, step: int) -> dict[str, str]:
    """Loss and gradient norm of a step as they were logged; a number that was none is null there."""
    line = next((r for r in read_metrics(log) if r["kind"] == "train" and r["step"] == step), {})
    return {name: repr(float("nan") if (value := line.get(name)) is None else value) for name in ("loss", "grad_norm")}


def _choose(paths: list[Path], step: int | None) -> Path | None:
    return next((path for path in paths if step in (None, _step(path))), None)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
