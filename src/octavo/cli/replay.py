"""``octavo replay``: where did the NaN begin?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo replay runs/mine     octavo replay runs/mine 512 --from-checkpoint")
def replay(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    step: Annotated[int | None, typer.Argument(min=0, help="N of nan/step-N. Default: the last one.")] = None,
    stage: Annotated[str | None, typer.Option(help="pretrain or tune. Default: the one that has the step.")] = None,
    from_checkpoint: Annotated[
        bool, typer.Option(help="Begin with the checkpoint before it and do the steps between again.")
    ] = False,
    scratch: Annotated[Path | None, typer.Option(help="A folder to work in. Default: the system's.")] = None,
) -> int:
    """Compute a step that could not be taken again and name the first layer whose numbers are not finite.

    The run is only read. Exit code 5 if the trouble comes again, 0 if it does not.
    """
    from octavo.errors import NumericError
    from octavo.repeat import replay_step

    found, changes = replay_step(run, step, stage=stage, from_checkpoint=from_checkpoint, scratch=scratch)
    for line in found.lines():
        typer.echo(line)
    if changes:
        typer.echo(f"changed since the run's last start: {', '.join(changes)}")
    if found.is_finite and found.reproduces:
        typer.echo("nothing is wrong with this step")
        return 0
    if found.is_finite:
        typer.echo("it does not come again: the numbers were spoiled from outside (memory, hardware), not by the data")
        return 0
    came = "the same came out" if found.reproduces else "it comes out otherwise, and still is not finite"
    typer.echo(f"it comes again: {came}")
    return NumericError.exit_code
