"""``octavo report``: the page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from octavo.report.compare import Side

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo report runs/quickstart     octavo report runs/a runs/b --out a-and-b.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="The folders of runs, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page. Default: report.html, or comparison-with-OTHERS.html, in the first run's folder."),
    ] = None,
) -> None:
    """Write the page of a run, or one that has several runs side by side; one file that opens anywhere.

    One run: its report.html and its plots (plots/*.png). Several: their curves in one drawing, the settings that
    differ, what came of each and the differences to the first.
    """
    from octavo.report.words import printable

    if len(runs) > 1:
        from octavo.report import compare

        page = compare.build(runs, out)
        typer.echo("\n".join(map(printable, _table(compare.open_sides(runs)))))
        typer.echo(f"\npage  {page}")
        return
    from octavo.report.folder import Run
    from octavo.report.page import build, facts

    run = runs[0]
    page = build(run, out)
    for name, value, remark in facts(Run(run)):
        typer.echo(printable(f"{name:<20}{value:>10}   {remark}".rstrip()))
    typer.echo(f"\nreport  {page}")
    if out is None and (run / "plots").is_dir():
        typer.echo(f"plots   {run / 'plots'}")


def _table(sides: list[Side]) -> list[str]:
    """What came of each run, for the terminal."""
    from octavo.report.compare import NOTHING, difference, figures, shared

    same = shared(sides)
    rows = [["", *(side.label for side in sides)]]
    for figure, values in figures(sides):
        cells = [NOTHING if value is None else figure.show(value) for value in values]
        gaps = [difference(figure, value, values[0], one) for value, one in zip(values, same, strict=True)]
        rows.append([figure.name, *(f"{cell} ({gap})" if gap else cell for cell, gap in zip(cells, gaps, strict=True))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return lines
