"""Starting a run: what is automatic is decided and frozen, the folder is taken, the pipeline goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from octavo import pipeline
from octavo.config import Pretrained, Recipe, apply_overrides
from octavo.errors import ConfigError
from octavo.plan import compiling_pays, refuse_counted
from octavo.run import RunFolder
from octavo.stop import StopSignal
from octavo.training.machine import has_device, resolve, restore_allocator, set_threads, tune_allocator
from octavo.training.progress import Console


def freeze(recipe: Recipe, existing: Mapping[str, Any] | None) -> tuple[Recipe, list[str]]:
    """Every ``auto`` of the training sections decided: as the run decided before, else for this machine."""
    notices: list[str] = []
    changes: dict[str, Any] = {}
    for name in ("train", "tune"):
        section = getattr(recipe, name)
        if section is None:
            continue
        if not has_device(section.device):
            raise ConfigError(f"{name}.device = {section.device}: torch finds no such device", fix="leave it out")
        before = (existing or {}).get(name) or {}
        known = {
            key: before[key]
            for key, auto in (("precision", "auto"), ("compile", "auto"), ("attention", "auto"), ("threads", None))
            if getattr(section, key) == auto and before.get(key) not in (None, auto)
        }
        section = section.model_copy(update=known)
        if section.compile == "auto" and not compiling_pays(recipe, "pretrain" if name == "train" else name):
            section = section.model_copy(update={"compile": "off"})
        section, new = resolve(section)
        notices += [line for line in new if line not in notices]
        changes[name] = section
    return recipe.model_copy(update=changes), notices


def run(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    max_time: str | None = None,
    allow: Sequence[str] = (),
    console: Console | None = None,
    workers: int | None = None,
    stop: StopSignal | None = None,
) -> RunFolder:
    """Run a recipe from raw text to a model, or go on with it.

    Args:
        recipe: a ``Recipe``, a shipped recipe's name, or a path.
        overrides: ``section.key=value`` texts.
        out: the run folder; default ``runs/NAME``.
        max_time: save and stop (StopRequested) after this long, such as ``50m``.
        allow: keys that may differ from what the folder was begun with.
        console: where progress is shown.
        workers: processes for data preparation; default: the cores.
        stop: what asks to stop, already listening; default: one for the time of this call.

    Returns:
        The run folder; ``octavo.load`` opens its model.

    Raises:
        OctavoError: the kinds in ``octavo.errors``, each with its place and fix.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, overrides)
    elif overrides:
        recipe = Recipe.parse(apply_overrides(recipe.plain(), overrides))
    if isinstance(recipe.model, Pretrained.Config):
        refuse_counted(recipe.model.path)  # before anything is made
    folder = RunFolder(out if out is not None else Path("runs") / recipe.name)
    console = console or Console()
    listening = nullcontext(stop) if stop is not None else StopSignal(max_time)
    with listening as stop, folder.lock():
        stop.notify = console.warn
        if folder.killed:
            console.note(f"{folder.killed} did not end by itself (killed, or out of memory or power); going on")
        try:
            tune_allocator()
            recipe, notices = freeze(recipe, folder.read_recipe())
            for line in folder.write_recipe(recipe.plain(), allow=allow):
                console.note(line)
            threads = next((s.threads for s in (recipe.train, recipe.tune) if s and s.threads), None)
            if threads:
                set_threads(threads)
            for line in [*notices, *folder.write_environment(threads=threads)]:
                console.warn(line)
            redo_data = any(key.split(".")[0] == "data" for key in allow)
            job = pipeline.Job(recipe, folder, console, stop, workers, redo_data)
            console.summary(pipeline.run(job))
        except BaseException as error:
            folder.log_error(error)
            raise
        finally:
            restore_allocator()  # whoever called goes on with the same process
    return folder
