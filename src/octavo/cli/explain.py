"""``octavo explain``: what a component is, from its docstring, a real pass, its cost model and its record of proof."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example:  octavo explain attention     octavo explain rope --lang zh     octavo explain")
def explain(
    name: Annotated[
        str, typer.Argument(help="A component, or a class of your own, package.module:Class. Default: list all.")
    ] = "",
    lang: Annotated[Literal["en", "zh"], typer.Option(help="The language of the prose.")] = "en",
    write: Annotated[
        Path | None, typer.Option(help="Write all pages into this folder, and the index with fresh verdicts beside it.")
    ] = None,
) -> int:
    """Print the page of a component: what it is for, formula, shapes, cost, settings and proof.

    Without a name it lists every component. `--write` runs `octavo verify` on all of them, which takes minutes.
    """
    from octavo.cli.verify import examine_all, named
    from octavo.errors import ConfigError
    from octavo.explain.page import one_line, page, pages
    from octavo.explain.page import write as write_pages

    if name and write:
        raise ConfigError("--write is for all pages", fix="leave the name away")
    if write is not None:
        from octavo.laws.components import components

        verdicts = examine_all(components())
        typer.echo(f"{write_pages(write, verdicts)} pages in {write}, and {write.with_suffix('.md')}")
        return 1 if any(verdict.broken for verdict in verdicts) else 0
    if not name:
        for found, component in pages().items():
            typer.echo(
                f"{found:20} {component.title:16} {'' if found == 'activation' else one_line(component)}".rstrip()
            )
        return 0
    text = page(pages()[name] if name in pages() else named(name), lang)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        typer.echo(text, nl=False)
    return 0
