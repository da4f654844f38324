"""``octavo resume``: go on with a run from its own recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.run import MaxTime, Quiet, Workers, perform, show_next

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo resume runs/quickstart --max-time 50m")
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a stopped run.")],
    max_time: MaxTime = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Go on with a stopped run exactly where it was: same batches, same losses, same weights."""
    from octavo.errors import ConfigError

    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no recipe.yaml", fix="start one with `octavo run`")
    show_next(perform(str(recipe), None, run, max_time, None, workers, quiet))
