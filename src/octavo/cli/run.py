"""``octavo run``: a whole recipe, and ``octavo quickstart``, which is one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run folder. Default: runs/NAME.")]
MaxTime = Annotated[str | None, typer.Option(help="Save and stop after this long (90s, 50m, 2h); exit code 75.")]
Allow = Annotated[list[str] | None, typer.Option("--allow-change", help="A key that may differ from the run's own.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that prepare data. Default: the cores.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings.")]


def perform(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    max_time: str | None,
    allow: list[str] | None,
    workers: int | None,
    quiet: bool,
    *,
    sections: tuple[str, ...] | None = None,
) -> Path:
    """Run ``recipe`` (only some ``sections`` of it if given) and return the run folder."""
    from octavo.stop import StopSignal

    with StopSignal(max_time) as stop:  # before the imports, which take seconds
        from octavo.cli.main import log_to
        from octavo.config import Recipe
        from octavo.errors import LockedError
        from octavo.launch import run
        from octavo.training.progress import Console

        loaded = Recipe.load(recipe, overrides or [])
        if sections is not None:
            dropped = {name: None for name in ("train", "tune", "eval") if name not in sections}
            loaded = Recipe.parse(loaded.plain() | dropped, recipe)
        folder = out if out is not None else Path("runs") / loaded.name
        if folder.is_dir():
            log_to(folder / "log")
        console = Console("quiet" if quiet else "auto")
        try:
            return run(loaded, out=folder, allow=allow or (), console=console, workers=workers, stop=stop).path
        except LockedError:
            log_to(None)  # the log is the other's
            raise


@app.command(epilog="Example:  octavo quickstart     octavo run pretrain 'data.sources=[\"my/**/*.txt\"]'")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (quickstart, shakespeare, ...) or a YAML file.")],
    overrides: Overrides = None,
    out: Out = None,
    chat: Annotated[bool, typer.Option(help="Open a chat with the model at the end (on a terminal).")] = True,
    max_time: MaxTime = None,
    allow_change: Allow = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Run a whole recipe: data, tokenizer, training, tuning, scores, report.

    Stopped at any moment, the same command goes on where it was.
    """
    folder = perform(recipe, overrides, out, max_time, allow_change, workers, quiet)
    command = show_next(folder)
    if chat and sys.stdin.isatty() and sys.stdout.isatty() and command.startswith("octavo chat"):
        import octavo
        from octavo.cli.chat import converse
        from octavo.infer.sampling import SamplingConfig

        lm = octavo.load(folder, "decode")
        converse(lm.model, lm.tokenizer, SamplingConfig(temperature=0.0), name=folder.name)


def show_next(folder: Path) -> str:
    """Tell what can be done with a finished run; returns the command that it is tried with."""
    from octavo.report.folder import Run
    from octavo.report.next_step import try_command

    report = folder / "report.html"
    typer.echo(f"\nmodel   {folder / ('model' if (folder / 'model').is_dir() else 'base')}")
    if report.is_file():
        typer.echo(f"report  {report}")
    command = try_command(Run(folder))
    typer.echo(f"try     {command}")
    return command
