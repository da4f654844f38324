"""``octavo report``: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")]) -> None:
    """Write the report page of a run (report.html, one file that opens anywhere) and its plots (plots/*.png)."""
    from octavo.report.folder import Run
    from octavo.report.page import build, facts
    from octavo.report.words import printable

    page = build(run)
    for name, value, remark in facts(Run(run)):
        typer.echo(printable(f"{name:<20}{value:>10}   {remark}".rstrip()))
    typer.echo(f"\nreport  {page}")
    if (run / "plots").is_dir():
        typer.echo(f"plots   {run / 'plots'}")
