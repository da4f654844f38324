"""``octavo resume``: go on with a run from its own recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.run import MaxTime, Quiet, Workers, perform, show_next

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo resume runs/quickstart --max-time 50m     octavo resume runs/quickstart --prove")
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a stopped run.")],
    max_time: MaxTime = None,
    workers: Workers = None,
    quiet: Quiet = False,
    prove: Annotated[bool, typer.Option("--prove", help="Train nothing; repeat the last steps and compare.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="With --prove: repeat at least so many.")] = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="With --prove: repeat all steps.")] = False,
    stage: Annotated[str | None, typer.Option(help="With --prove: pretrain or tune.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="With --prove: a folder to work in.")] = None,
) -> None:
    """Go on with a stopped run exactly where it was: same batches, same losses, same weights.

    With --prove the run is only read: its last steps are done again beside it, and every logged figure and every
    weight must come out the same to the last bit. Exit code 0 if they do, 4 if not.
    """
    from octavo.errors import ConfigError

    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no recipe.yaml", fix="start one with `octavo run`")
    if not prove:
        if steps or from_start or stage or scratch:
            raise ConfigError("--steps, --from-start, --stage and --scratch belong to --prove", fix="add --prove")
        show_next(perform(str(recipe), None, run, max_time, None, workers, quiet))
        return
    _prove(run, steps, from_start, stage, scratch, quiet)


def _prove(
    run: Path, steps: int | None, from_start: bool, stage: str | None, scratch: Path | None, quiet: bool
) -> None:
    from octavo.errors import CheckpointError
    from octavo.repeat import prove
    from octavo.training.progress import Console

    console = Console("quiet" if quiet else "auto")
    proof = prove(run, stage=stage, steps=steps, from_start=from_start, scratch=scratch, console=console)
    what = f"steps {proof.first} to {proof.last} of stage {proof.stage}"
    changed = f"; changed since its last start: {', '.join(proof.changes)}" if proof.changes else ""
    if proof.differences:
        raise CheckpointError(
            f"{run}: {what} do not repeat: {proof.differences[0]} ({len(proof.differences)} differences{changed})",
            fix="repeat with the machine, threads and versions in environment.json"
            if changed
            else "report this: octavo promises that they do",
            kept="the run was not touched",
        )
    typer.echo(
        f"proved: {what} come out the same in every bit: "
        f"{proof.lines} lines of figures, {proof.tensors} tensors{changed}"
    )
