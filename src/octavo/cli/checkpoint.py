"""``octavo checkpoint``: is what was saved still what was saved?"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at saved training state.\n\nExample: octavo checkpoint check runs/quickstart",
)

LARGE_BYTES = 1 << 20  # below, a rate says nothing


@app.callback()
def checkpoint_command() -> None:
    """A group, although it has one command so far."""


@app.command()
def check(
    path: Annotated[str, typer.Argument(help="A run, its checkpoints folder, or the folder of a step.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read every byte of every saved step and compare it with what was saved; changes nothing.

    Leaves with 0 if all is whole, with 4 if any file is not; each bad file is named.

    Examples: [bold]octavo checkpoint check runs/quickstart[/bold]   ·
    [bold]octavo checkpoint check runs/quickstart/pretrain/checkpoints/step-00000400 --json[/bold]
    """
    from octavo.training.checkpoint_path import find_steps

    single, folders = find_steps(path)
    checked = [_step(step) for step in single]
    if not as_json:
        for step in checked:
            _show(step)
    places = []
    for folder in folders:
        places.append(_folder(folder, shown=not as_json))
        checked += places[-1]["steps"]
    bad = [
        f"{step['path']}/{file['name']}: {file['problem']}"
        for step in checked
        for file in step["files"]
        if file["problem"]
    ]
    if as_json:
        found = {"ok": not bad, "bad": bad, "folders": places} | ({"steps": checked} if single else {})
        typer.echo(json.dumps(found, indent=1))
    if bad:
        _refuse(bad, checked, places)
    if not as_json:
        typer.echo(f"{len(checked)} of {len(checked)} whole: every byte is as it was saved")


def _step(path: Path) -> dict[str, Any]:
    from octavo.training import manifest

    files = [asdict(found) for found in manifest.check(path)]
    return {"path": str(path), "ok": not any(file["problem"] for file in files), "files": files}


def _folder(folder: Path, shown: bool) -> dict[str, Any]:
    """All entries of a folder of steps, the newest first, and the step a start would go on from."""
    from octavo.training.manifest import STEP_NAME

    if shown:
        typer.echo(f"{folder}")
    names = sorted((name for name in os.listdir(folder) if STEP_NAME.match(name)), key=_number, reverse=True)
    steps, unfinished = [], []
    for name in names:
        step = _step(folder / name)
        if not step["ok"] and not (folder / name).exists():
            continue  # a training that is under way has removed it meanwhile
        if ".tmp-" in name:
            unfinished.append(str(folder / name))
            line = f"  {name}: a save that did not finish; the next start of the run clears or completes it"
        else:
            steps.append(step)
            line = ""
        if shown:
            typer.echo(line) if line else _show(step, indent="  ")
    used = next((_number(Path(step["path"]).name) for step in steps if step["ok"]), None)
    lost = _number(Path(steps[0]["path"]).name) - used if used is not None else None
    return {"path": str(folder), "used": used, "steps_lost": lost, "steps": steps, "unfinished": unfinished}


def _number(name: str) -> int:
    return int(name.partition(".")[0].removeprefix("step-"))


def _show(step: dict[str, Any], indent: str = "") -> None:
    from octavo.report import words

    n_bytes = sum(file["size"] for file in step["files"])
    word = "ok" if step["ok"] else "BAD"
    typer.echo(f"{indent}{Path(step['path']).name}  {word}  {len(step['files'])} files, {words.size(n_bytes)}")
    width = max((len(file["name"]) for file in step["files"]), default=0)
    for file in step["files"]:
        line = f"{words.printable(file['name']):{width}}  {words.size(file['size']):>10}  "
        line += f"BAD  {file['problem']}" if file["problem"] else "ok"
        if file["size"] >= LARGE_BYTES and file["seconds"]:
            line += f"  {words.size(file['size'] / file['seconds'])}/s"
        typer.echo(f"{indent}  {line}")


def _refuse(bad: list[str], checked: list[dict[str, Any]], places: list[dict[str, Any]]) -> None:
    from octavo.errors import CheckpointError

    n_bad, n = sum(not step["ok"] for step in checked), len(checked)
    what = "the step is damaged" if n == 1 else f"{n_bad} of {n} steps {'is' if n_bad == 1 else 'are'} damaged"
    fixes = []
    for place in places:
        if any(not step["ok"] for step in place["steps"]):
            used = "restore a step from a copy, or start in a new run folder: none is whole"
            if place["used"] is not None:
                used = f"going on uses step-{place['used']:08d} ({place['steps_lost']} steps lost)"
            fixes.append(used if len(places) == 1 else f"in {place['path']}: {used}")
    raise CheckpointError(
        f"{what}: {'; '.join(bad)}",
        fix="; ".join(fixes) or "load another step, or restore this one from a copy",
        kept="nothing was changed",
    )
